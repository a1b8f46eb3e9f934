"""TextCaps is scored with CIDEr and BLEU over the pictures that have a caption."""

from __future__ import annotations

import json
import time

import pytest

from tests.eval.rules.test_captions import CAPTIONS, OFFICIAL, REFERENCES
from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Text
from tinymodal.eval.benchmark import Problems
from tinymodal.eval.given import DOUBLE, MISSING, UNKNOWN
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks.textcaps import TASK


@pytest.fixture
def folder(tmp_path):
    """Five pictures in the layout of TextCaps_0.1_val.json: a row for each reference."""
    rows = [
        {
            "image_id": name,
            "caption_id": f"{name}{n}",
            "caption_str": caption,
            "reference_strs": REFERENCES[name],
        }
        for n in range(5)
        for name, caption in zip(REFERENCES, (REFERENCES[name][n] for name in REFERENCES), strict=True)
    ]
    (tmp_path / "TextCaps_0.1_val.json").write_text(json.dumps({"dataset_name": "textcaps", "data": rows}))
    return tmp_path


def scored(folder, value, name="answers.json"):
    path = folder / name
    path.write_text(json.dumps(value) if name.endswith(".json") else "\n".join(map(json.dumps, value)))
    return score_answers(TASK, path, folder / "out", data=folder)


def assert_official(metrics, names):
    ciders, bleus = OFFICIAL[names]
    assert metrics["CIDEr"] == pytest.approx(sum(ciders) / len(ciders), rel=1e-13)
    assert [metrics[f"Bleu_{n}"] for n in range(1, 5)] == pytest.approx(bleus, rel=1e-13)


def test_a_picture_is_asked_once_with_all_its_references(folder):
    found = list(TASK.open(folder, Problems()).load())
    assert [question.sample.id for question in found] == [*REFERENCES]
    assert found[0].answer == "\n".join(REFERENCES["a1"])
    assert found[0].sample.messages[0].parts == (
        Image(folder / "train_images" / "a1.jpg"),
        Text("Provide a one-sentence caption for the provided image."),
    )


def test_captions_as_test_servers_take_them_have_the_official_scores(folder):
    result = scored(folder, [{"image_id": name, "caption": caption} for name, caption in CAPTIONS.items()])
    assert_official(result.metrics, ("a1", "b2", "c3", "d4", "e5"))
    told = json.loads((folder / "out" / "results.json").read_text())["textcaps"]
    assert told["complete"]
    assert told["interval_95"][0] < told["metrics"]["CIDEr"] < told["interval_95"][1]
    # A tenth of each picture's own CIDEr, for comparisons question by question.
    ciders = OFFICIAL["a1", "b2", "c3", "d4", "e5"][0]
    assert [row.score.value for row in result.answered] == pytest.approx([one / 10 for one in ciders])


def test_without_some_captions_words_weigh_as_among_the_others(folder):
    """As pycocoevalcap scores a part of the pictures."""
    result = scored(folder, {name: CAPTIONS[name] for name in ("a1", "c3", "e5")})
    assert_official(result.metrics, ("a1", "c3", "e5"))
    assert result.problems.counts == {MISSING: 2}


def test_rows_of_llava_and_ours_and_one_for_each_reference_are_read(folder):
    rows = [{"question_id": name, "text": caption} for name, caption in CAPTIONS.items()]
    assert_official(scored(folder, rows, "a.jsonl").metrics, ("a1", "b2", "c3", "d4", "e5"))
    rows = [{"id": name, "reply": caption} for name, caption in CAPTIONS.items()]
    assert_official(scored(folder, rows, "b.jsonl").metrics, ("a1", "b2", "c3", "d4", "e5"))
    rows = [
        {"image_id": f"{name}.jpg", "caption_id": n, "caption": CAPTIONS[name]}
        for name in CAPTIONS
        for n in "12"
    ]
    result = scored(folder, rows)
    assert_official(result.metrics, ("a1", "b2", "c3", "d4", "e5"))
    assert result.summary()["complete"]


def test_bad_rows_and_answers_are_named_and_counted(folder):
    path = folder / "TextCaps_0.1_val.json"
    value = json.loads(path.read_text())
    value["data"] += [{"image_id": "x"}, {"caption_str": "A sign."}, "what"]
    path.write_text(json.dumps(value))
    rows = [{"image_id": name, "caption": caption} for name, caption in CAPTIONS.items()]
    result = scored(
        folder, [*rows, {**rows[0], "caption": "Another."}, {"image_id": "z", "caption": "A"}, {"a": 1}]
    )
    assert result.problems.counts == {
        "questions without id or references": 2,
        "unreadable rows": 1,
        DOUBLE: 1,
        UNKNOWN: 1,
        "answers without an id": 1,
    }
    assert_official(result.metrics, ("a1", "b2", "c3", "d4", "e5"))


def test_rows_that_hold_only_their_own_reference_are_put_together(folder):
    path = folder / "TextCaps_0.1_val.json"
    value = json.loads(path.read_text())
    for row in value["data"]:
        del row["reference_strs"]
    path.write_text(json.dumps(value))
    assert_official(scored(folder, CAPTIONS).metrics, ("a1", "b2", "c3", "d4", "e5"))


def test_a_folder_without_references_is_an_error_that_says_where_they_are_from(tmp_path):
    with pytest.raises(DataError, match=r"TextCaps_0\.1_val\.json.*textvqa\.org/textcaps"):
        list(TASK.open(tmp_path, Problems()).load())


def test_no_scores_make_no_numbers(folder):
    assert TASK.open(folder, Problems()).report([]) == {}


def test_the_hubs_rows_are_read_with_their_pictures(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"image_id": name, "caption_str": written, "image": {"bytes": name.encode(), "path": "a.jpg"}}
        for name, written in REFERENCES.items()
    ]
    for part in (0, 1):
        table = pa.Table.from_pylist(rows[part::2])
        pq.write_table(table, tmp_path / f"val-0000{part}-of-00002.parquet")
    found = {question.sample.id: question for question in TASK.open(tmp_path, Problems()).load()}
    assert found.keys() == REFERENCES.keys()
    assert found["a1"].sample.messages[0].parts[0] == Image(b"a1")
    assert_official(scored(tmp_path, CAPTIONS).metrics, ("a1", "b2", "c3", "d4", "e5"))


def test_hundreds_of_pictures_are_scored_in_seconds(tmp_path):
    rows = [
        {"image_id": f"{name}{n}", "reference_strs": [f"{caption} and {n}" for caption in REFERENCES[name]]}
        for name in REFERENCES
        for n in range(80)
    ]
    (tmp_path / "TextCaps_0.1_val.json").write_text(json.dumps({"data": rows}))
    start = time.perf_counter()
    result = scored(tmp_path, {row["image_id"]: CAPTIONS[row["image_id"][:2]] for row in rows})
    assert len(result.answered) == 400
    assert time.perf_counter() - start < 10  # 1 s
