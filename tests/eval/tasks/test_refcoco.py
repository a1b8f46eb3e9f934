"""RefCOCO, RefCOCO+ and RefCOCOg are scored by boxes that overlap by one half, of each split."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Text
from tinymodal.eval.benchmark import Problems
from tinymodal.eval.given import MISSING, UNKNOWN
from tinymodal.eval.intervals import interval
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks.refcoco import TASKS, report, sums

TASK = {task.name: task for task in TASKS}
DOG, CAT = "COCO_train2014_000000000001_7", "COCO_train2014_000000000002_1"


def row(thing, said, box, width=200, height=100):
    return {"img_id": thing, "sents": said, "bbox": box, "height": height, "width": width}


@pytest.fixture
def folder(tmp_path):
    """Two phrases about a dog and one about a cat in testA, one about a cat in val."""
    place = tmp_path / "refcoco"
    place.mkdir()
    dog = [row(DOG, said, [20, 10, 100, 50]) for said in ("left dog", "the dog")]
    (place / "refcoco_testA.json").write_text(json.dumps([*dog, row(CAT, "cat", [0, 0, 100, 100], 100, 100)]))
    (place / "refcoco_val.json").write_text(json.dumps([row(CAT, "grey cat", [0, 0, 50, 50], 100, 100)]))
    return tmp_path


def scored(folder, value, name="answers.json", task="refcoco"):
    path = folder / name
    path.write_text(json.dumps(value) if name.endswith(".json") else "\n".join(map(json.dumps, value)))
    return score_answers(TASK[task], path, folder / "out", data=folder)


def questions(folder, task="refcoco", problems=None):
    problems = Problems() if problems is None else problems
    return list(TASK[task].open(folder / "refcoco", problems).load())


RIGHT = {DOG: ["{<10><10><60><60>}", "[0.1, 0.1, 0.6, 0.6]"], CAT: ["{<0><0><100><100>}"]}


def test_a_phrase_and_its_picture_become_a_question_in_llavas_words(folder):
    cat, first, second, _ = questions(folder)
    assert first.sample.messages[0].parts == (
        Image(folder / "refcoco" / "train2014" / "COCO_train2014_000000000001.jpg"),
        Text("Please provide the bounding box coordinate of the region this sentence describes: left dog."),
    )
    assert (first.sample.id, second.sample.id) == (f"testA/{DOG}/0", f"testA/{DOG}/1")
    assert (cat.sample.id, first.answer) == (f"val/{CAT}/0", "[0.10, 0.10, 0.60, 0.60]")


def test_minigpts_own_result_of_a_split_is_scored_without_the_other_splits(folder):
    result = scored(folder, RIGHT, "['refcoco']_testA.json")
    every = {"n": 3, "acc": 100.0, "acc_plain": 100.0}
    assert {key: result.metrics["testA"][key] for key in every} == every
    assert result.metrics.keys() == {"testA", "mean"}
    assert result.problems.counts == {MISSING: 1}  # the one of val


def test_replies_that_minigpt_dropped_and_those_without_a_box_are_wrong(folder):
    result = scored(folder, {DOG: ["{<10><10><60><60>}"], CAT: ["no cat"]}, "refcoco_testA.json")
    assert result.metrics["testA"]["acc"] == pytest.approx(100 / 3)
    parsed = {row.question.sample.id: row.score.parsed for row in result.answered}
    assert parsed[f"testA/{DOG}/1"] == "no answer"
    assert parsed[f"testA/{CAT}/0"] == "no box"
    assert result.problems.counts == {MISSING: 2}


def test_a_folder_of_results_is_all_splits_and_the_headline_their_mean(folder):
    place = folder / "results"
    place.mkdir()
    (place / "refcoco_testA.json").write_text(json.dumps(RIGHT))
    (place / "refcoco_val.json").write_text(json.dumps({CAT: ["{<50><50><99><99>}"]}))
    result = score_answers(TASK["refcoco"], place, folder / "out", data=folder)
    assert [result.metrics[split]["acc"] for split in ("val", "testA")] == [0.0, 100.0]
    assert result.metrics["mean"] == 50.0
    assert result.summary()["complete"]


def test_rows_of_llava_and_ours_go_by_our_ids(folder):
    ids = [question.sample.id for question in questions(folder)]
    for field, text in (("question_id", "text"), ("id", "reply")):
        result = scored(folder, [{field: name, text: "[0.1, 0.1, 0.6, 0.6]"} for name in ids], "a.jsonl")
        assert result.metrics["testA"]["acc"] == pytest.approx(200 / 3)
        assert result.summary()["complete"]


def test_the_last_pixel_decides_near_one_half_and_a_tie_is_right(folder):
    """Of a box of 10 x 10 pixels, 100 wide in hundredths: its upper 4 to 5 rows."""
    (folder / "refcoco" / "refcoco_val.json").unlink()
    rows = [row(DOG, said, [0, 0, 9, 9], 100, 100) for said in ("a", "b", "c")]
    (folder / "refcoco" / "refcoco_testA.json").write_text(json.dumps(rows))
    result = scored(folder, {DOG: [f"{{<0><0><9><{y}>}}" for y in (3, 4, 5)]})
    # 40, 50 and 60 of 100 pixels with the last ones, 27, 36 and 45 of 81 without.
    assert [row.score.value for row in result.answered] == [0, 1, 1]
    assert result.metrics["testA"]["acc_plain"] == pytest.approx(100 / 3)


def test_boxes_of_the_padded_square_are_told_beside(folder):
    """The picture is twice as wide as high: it lies between a quarter and three quarters of the square."""
    rows = [row(DOG, said, [20, 10, 100, 20]) for said in ("a", "b")]
    (folder / "refcoco" / "refcoco_testA.json").write_text(json.dumps(rows))
    result = scored(folder, {DOG: ["[0.1, 0.3, 0.6, 0.4]", "[0.1, 0.1, 0.6, 0.3]"]}, "refcoco_testA.json")
    assert [each.score.value for each in result.answered if each.question.meta["split"] == "testA"] == [0, 1]
    assert result.metrics["testA"] == {"n": 2, "acc": 50.0, "acc_plain": 50.0, "acc_padded": 50.0}
    both = scored(folder, {DOG: ["[0.1, 0.3, 0.6, 0.4]"] * 2}, "refcoco_testA.json").metrics["testA"]
    assert (both["acc"], both["acc_padded"]) == (0.0, 100.0)


def test_bad_rows_are_named_and_counted(folder):
    good = row(DOG, "dog", [0, 0, 9, 9])
    bad = [
        {**good, "bbox": [1, 2]}, {**good, "sents": ""}, {**good, "img_id": None}, {**good, "width": None}, 7,
    ]  # fmt: skip
    (folder / "refcoco" / "refcoco_val.json").write_text(json.dumps([good, *bad]))
    result = scored(folder, {DOG: ["[0, 0, 0.045, 0.09]"], "COCO_x": ["[0, 0, 1, 1]"]}, "refcoco_val.json")
    assert result.problems.counts == {
        "questions without id, phrase, box or size": 4,
        "unreadable rows": 1,
        UNKNOWN: 1,
        MISSING: 3,
    }
    assert result.metrics["val"]["acc"] == 100.0
    found = scored(folder, [{"question_id": f"val/{DOG}/0", "text": "x"}, {"text": "x"}], "a.jsonl").problems
    assert found.counts["answers without an id"] == 1


def test_a_folder_without_any_split_is_an_error_that_says_where_they_are_from(tmp_path):
    with pytest.raises(DataError, match=r"refcoco\+_val\.json.*MiniGPT-4"):
        list(TASK["refcoco+"].open(tmp_path, Problems()).load())


def test_each_data_set_has_its_own_names_and_splits(tmp_path):
    for task, split in (("refcoco+", "testB"), ("refcocog", "test")):
        rows = [row(DOG, ["one dog.", "two"], [0, 0, 9, 9])]
        (tmp_path / f"{task}_{split}.json").write_text(json.dumps(rows))
        found = list(TASK[task].open(tmp_path, Problems()).load())
        assert [question.sample.id for question in found] == [f"{split}/{DOG}/0", f"{split}/{DOG}/1"]
        assert found[0].sample.messages[0].parts[1].text.endswith("describes: one dog.")


def test_the_hubs_rows_are_read_with_their_pictures(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    PIL_Image = pytest.importorskip("PIL.Image")
    content = io.BytesIO()
    PIL_Image.new("RGB", (40, 20)).save(content, "png")
    rows = [
        {"question_id": "469", "answer": ["left dog", "dog"], "bbox": [0.0, 0.0, 20.0, 10.0],
         "image": {"bytes": content.getvalue(), "path": "a.png"}},
        {"question_id": "470", "answer": ["a"], "bbox": [0.0] * 4, "image": {"bytes": b"broken", "path": ""}},
    ]  # fmt: skip
    (tmp_path / "refcoco" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "refcoco" / "data" / "testB-00000-of-00001.parquet")
    problems = Problems()
    first, second = questions(tmp_path, problems=problems)
    assert problems.counts == {"questions without id, phrase, box or size": 1}  # the broken picture
    assert (first.sample.id, second.sample.id, first.answer) == (
        "testB/469/0", "testB/469/1", "[0.00, 0.00, 0.50, 0.50]",
    )  # fmt: skip
    assert first.sample.messages[0].parts[0] == Image(content.getvalue())
    assert scored(tmp_path, {"469": ["[0, 0, 0.5, 0.5]"] * 2}).metrics["testB"]["acc"] == 100.0


def test_the_interval_is_around_the_mean_over_the_splits(folder):
    rows = [row(f"{DOG}{n}", "dog", [0, 0, 9, 9], 10, 10) for n in range(60)]
    (folder / "refcoco" / "refcoco_testB.json").write_text(json.dumps(rows))
    half = {f"{DOG}{n}": ["[0, 0, 1, 1]" if n % 2 else "none"] for n in range(60)}
    result = scored(folder, {**half, **RIGHT}, "all.json")
    scores = [each.score for each in result.answered]
    low, high = interval(sums(scores))
    # val has the cat's answer by its id as well, which is first of testA's.
    assert result.metrics["testB"]["acc"] == 50.0
    assert low < result.metrics["mean"] < high
    assert report([]) == {}


@given(
    st.tuples(*[st.integers(-50, 2000)] * 4),
    st.sampled_from(["[{}, {}, {}, {}]", "{{<{}><{}><{}><{}>}}", "{}{}{}{}"]),
)
def test_any_reply_is_scored_and_read_back_for_the_report(edges, form):
    task = TASK["refcoco"].open(None, Problems())
    meta = {"split": "val", "box": "1.5,2,30,40,64,48"}
    question = type("Asked", (), {"meta": meta, "sample": type("S", (), {"id": "1"})})
    score = replace(task.score(question, form.format(*edges)), meta=meta)
    assert report([score])["val"]["acc"] == 100 * score.value
