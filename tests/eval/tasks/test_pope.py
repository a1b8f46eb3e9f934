"""POPE is scored as its authors score it, whichever of the two sets of files is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinymodal.core.errors import DataError
from tinymodal.eval.given import DOUBLE, MISSING, UNKNOWN
from tinymodal.eval.intervals import interval
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks.pope import SPLITS, TASK, sums

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "eval" / "pope"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the real answers are not at hand")
ASKED = [
    ("a.jpg", "Is there a cat?", "yes"),
    ("a.jpg", "Is there a dog?", "no"),
    ("b.jpg", "Is there a hat?", "yes"),
]


@pytest.fixture
def folder(tmp_path):
    """Three questions a split, and LLaVA's numbering of all nine, in another order."""
    numbered = []
    for split in SPLITS:
        rows = [{"question_id": i, "image": m, "text": t, "label": a} for i, (m, t, a) in enumerate(ASKED, 1)]
        (tmp_path / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)))
        numbered += [(row["image"], row["text"], split) for row in reversed(rows)]
    with (tmp_path / "llava_pope_test.jsonl").open("w") as file:
        for i, (image, text, split) in enumerate(numbered, 1):
            row = {"question_id": i, "image": image, "category": split}
            file.write(
                json.dumps({**row, "text": f"{text}\nAnswer the question using a single word or phrase."})
                + "\n"
            )
    return tmp_path


def answers(folder, rows):
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@real
def test_the_official_numbers_are_met_to_the_last_digit(tmp_path):
    expected = json.loads((DATA / "expected.json").read_text())["llava-v1.5-13b"]
    result = score_answers(TASK, DATA / "llava-v1.5-13b.answers.jsonl.gz", tmp_path, data=DATA)
    assert result.metrics == expected
    told = json.loads((tmp_path / "results.json").read_text())["pope"]
    assert (told["metrics"], told["n"], told["complete"]) == (expected, 8910, True)
    assert told["interval_95"][0] < expected["mean_f1"] < told["interval_95"][1]


def test_answers_by_llavas_numbers_are_joined_by_question_and_not_by_position(folder):
    # Right answers in LLaVA's order, which is another than that of the labels.
    given = [{"question_id": i, "text": "No" if i % 3 == 2 else "Yes, there is."} for i in range(1, 10)]
    result = score_answers(TASK, answers(folder, given), folder / "out", data=folder)
    assert result.metrics["mean_f1"] == 1.0
    assert result.metrics["random"] == {
        "n": 3, "TP": 2, "FP": 0, "TN": 1, "FN": 0,
        "accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0, "yes_ratio": 2 / 3,
    }  # fmt: skip


def test_our_own_replies_are_read_by_the_ids_that_we_write(folder):
    given = [{"id": f"{split}/{i}", "reply": "yes"} for split in SPLITS for i in (1, 2, 3)]
    result = score_answers(TASK, answers(folder, given), folder / "out", data=folder)
    assert (result.metrics["popular"]["FP"], result.metrics["popular"]["yes_ratio"]) == (1, 1.0)
    assert result.summary()["complete"]


def test_a_model_that_never_says_yes_has_an_f1_of_zero_and_no_division_fails(folder):
    given = [{"id": f"{split}/{i}", "reply": "no"} for split in SPLITS for i in (1, 2, 3)]
    result = score_answers(TASK, answers(folder, given), folder / "out", data=folder)
    assert result.metrics["mean_f1"] == 0.0
    assert result.metrics["adversarial"]["precision"] == 0.0


def test_what_is_wrong_with_answers_is_counted_and_the_score_is_incomplete(folder):
    given = [{"id": name, "reply": "yes"} for name in ("random/1", "random/1", "nowhere/7")]
    given.append({"id": "random/2"})
    result = score_answers(TASK, answers(folder, given), folder / "out", data=folder)
    counts = {kind: told["count"] for kind, told in result.problems.told().items()}
    assert counts == {UNKNOWN: 1, DOUBLE: 1, MISSING: 8, "unreadable answers": 1}
    told = result.summary()
    assert (told["n"], told["complete"]) == (1, False)
    assert told["metrics"]["random"]["TP"] == 1  # the first answer counts
    assert set(told["metrics"]) == {"random", "mean_f1"}


def test_the_missing_file_is_named_with_its_origin(folder):
    (folder / "coco_pope_popular.json").unlink()
    with pytest.raises(DataError, match=r"holds no coco_pope_popular\.json .*AoiDragon"):
        score_answers(
            TASK, answers(folder, [{"id": "random/1", "reply": "yes"}]), folder / "out", data=folder
        )


def test_a_prompt_shows_the_picture_and_asks_for_one_word(folder):
    from tinymodal.eval.benchmark import Problems

    first = next(iter(TASK.open(folder, Problems()).load()))
    picture, text = first.sample.messages[0].parts
    assert picture.source == folder / "val2014" / "a.jpg"
    assert text.text == "Is there a cat?\nAnswer the question using a single word or phrase."
    (folder / "images").mkdir()
    (folder / "images" / "COCO_val2014_1.jpg").touch()
    first = next(iter(TASK.open(folder, Problems()).load()))
    assert first.sample.messages[0].parts[0].source == folder / "images" / "a.jpg"


def test_the_interval_is_that_of_the_reported_number(folder):
    given = [{"id": f"{split}/{i}", "reply": "yes"} for split in SPLITS for i in (1, 2, 3)]
    result = score_answers(TASK, answers(folder, given), folder / "out", data=folder)
    all_sums = sums([row.score for row in result.answered])
    assert all_sums.value(all_sums.rows.sum(axis=0)) == pytest.approx(result.metrics["mean_f1"])
    assert interval(all_sums) is not None


def test_a_splits_answers_by_the_authors_numbers_go_to_that_split(folder):
    rows = [
        {"question_id": i, "image": m, "question": t, "category": "random", "text": a}
        for i, (m, t, a) in enumerate(ASKED, 1)
    ]
    result = score_answers(TASK, answers(folder, rows), folder / "out", data=folder)
    assert set(result.metrics) == {"random", "mean_f1"}
    assert result.metrics["random"]["accuracy"] == 1.0
    assert result.problems.counts == {MISSING: 6}


def test_the_authors_own_format_is_read_in_order_by_the_files_name(folder):
    path = folder / "answers_popular.jsonl"
    path.write_text("\n".join(json.dumps({"question": t, "answer": a}) for _, t, a in ASKED))
    result = score_answers(TASK, path, folder / "out", data=folder)
    assert result.metrics["popular"]["f1"] == 1.0
    assert result.metrics["popular"]["n"] == 3


def test_an_answer_to_other_words_than_its_questions_does_not_count(folder):
    rows = [{"id": f"random/{i}", "prompt": t, "reply": a} for i, (_, t, a) in enumerate(ASKED, 1)]
    rows[1]["prompt"] = "Is there a horse?"
    result = score_answers(TASK, answers(folder, rows), folder / "out", data=folder)
    assert result.metrics["random"]["n"] == 2
    assert result.problems.counts["answers to other words than their question's"] == 1


@pytest.mark.parametrize("gone", ["question_id", "image", "text", "label"])
def test_a_question_that_lacks_a_part_is_noted_and_the_others_are_scored(folder, gone):
    path = folder / "coco_pope_random.json"
    first, *others = path.read_text().split("\n")
    row = json.loads(first)
    del row[gone]
    path.write_text("\n".join((json.dumps(row), *others)))
    rows = [{"id": f"random/{i}", "reply": a} for i, (_, _, a) in enumerate(ASKED, 1)]
    result = score_answers(TASK, answers(folder, rows), folder / "out", data=folder)
    assert result.metrics["random"]["n"] == 2
    assert sum("without" in kind for kind in result.problems.counts) >= 1
