"""DocVQA: likeness to the answers as the official script has it, both layouts, and types of questions."""

import json
from pathlib import Path

import pytest

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Text
from tinymodal.eval.benchmark import Problems
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks.docvqa import TASK

SHORT = "\nAnswer the question using a single word or phrase."
ROWS = [
    {"questionId": 49153, "question": "What is the rate?", "question_types": ["form", "layout"],
     "image": "documents/ab_1.png", "answers": ["0.28", "28 %"]},
    {"questionId": 49154, "question": "Who signed?", "question_types": ["handwritten"],
     "image": "documents/ab_1.png", "answers": ["T.F. Riehl"]},
    {"questionId": 49155, "question": "Which form?", "question_types": ["form"],
     "image": "documents/ab_2.png", "answers": ["Itc limited"]},
]  # fmt: skip


def val(folder: Path, name: str = "val_v1.0_withQT.json") -> Path:
    told = {"dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": "val", "data": ROWS}
    (folder / name).write_text(json.dumps(told))
    return folder


def answer(path: Path, texts: dict) -> Path:
    path.write_text(json.dumps([{"questionId": name, "answer": text} for name, text in texts.items()]))
    return path


def test_a_question_is_asked_about_its_page(tmp_path):
    first, _, third = TASK.open(val(tmp_path), Problems()).load()
    assert first.sample.id == "49153"
    assert first.sample.messages[0].parts == (
        Image(tmp_path / "documents" / "ab_1.png"),
        Text("What is the rate?" + SHORT),
    )
    assert first.answer == "0.28"
    assert third.sample.messages[0].parts[0] == Image(tmp_path / "documents" / "ab_2.png")


@pytest.mark.parametrize("place", ["spdocvqa_images", "val/documents"])
def test_pages_are_found_in_both_archives(tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "ab_1.png").touch()
    question = next(iter(TASK.open(val(tmp_path, "val_v1.0.json"), Problems()).load()))
    assert question.sample.messages[0].parts[0] == Image(tmp_path / place / "ab_1.png")


def test_likeness_is_averaged_over_all_and_over_each_type(tmp_path):
    texts = {49155: "ITC  Limited", 49153: "28%", 49154: "T.F. Riehm"}
    result = score_answers(TASK, answer(tmp_path / "a.json", texts), tmp_path / "out", data=val(tmp_path))
    # 28% lacks one character of four, Riehm has one wrong of ten.
    assert result.metrics == {
        "anls": pytest.approx((0.75 + 0.9 + 1) / 3),
        "question_types": {"form": (0.75 + 1) / 2, "layout": 0.75, "handwritten": 0.9},
    }
    assert not result.problems
    low, high = result.interval
    assert low <= result.metrics["anls"] <= high


def test_a_reply_that_is_less_than_half_right_is_wrong(tmp_path):
    texts = {49153: "0.5", 49154: "the signature is T.F. Riehl", 49155: ""}
    result = score_answers(TASK, answer(tmp_path / "a.json", texts), tmp_path / "out", data=val(tmp_path))
    assert [a.score.value for a in result.answered] == [0.5, 0, 0]


def test_missing_answers_and_bad_questions_are_named(tmp_path):
    folder = val(tmp_path)
    told = json.loads((folder / "val_v1.0_withQT.json").read_text())
    told["data"] += [{"questionId": 1}, {**ROWS[0], "questionId": 2, "answers": None}, {**ROWS[0]}]
    (folder / "val_v1.0_withQT.json").write_text(json.dumps(told))
    path = answer(tmp_path / "a.json", {49153: "0.28", 7: "x"})
    result = score_answers(TASK, path, tmp_path / "out", data=folder)
    assert result.metrics == {"anls": 1.0, "question_types": {"form": 1.0, "layout": 1.0}}
    assert {kind: told["named"] for kind, told in result.problems.told().items()} == {
        "questions without id, page or words": ["val_v1.0_withQT.json: row 4"],
        "questions without answers to score by": ["val_v1.0_withQT.json: row 5"],
        "questions with the id of another": ["49153"],
        "answers to no question": ["a.json: row 2: '7'"],
        "questions without an answer": ["49154", "49155"],
    }
    with pytest.raises(DataError, match=r"docvqa: .* holds no val_v1\.0_withQT\.json"):
        list(TASK.open(tmp_path / "nowhere", Problems()).load())


def test_parquet_of_the_hub_is_the_same_task_and_a_page_is_kept_once(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    (tmp_path / "hub" / "DocVQA").mkdir(parents=True)
    for part, rows in enumerate((ROWS[:2], ROWS[2:])):
        told = [
            {**row, "questionId": str(row["questionId"]), "image": {"bytes": b"png", "path": "ab.png"}}
            for row in rows
        ]
        path = tmp_path / "hub" / "DocVQA" / f"validation-0000{part}-of-00002.parquet"
        pyarrow.parquet.write_table(pa.Table.from_pylist(told), path)
    problems = Problems()
    ours = list(TASK.open(val(tmp_path), Problems()).load())
    theirs = list(TASK.open(tmp_path / "hub", problems).load())
    assert not problems
    assert [(q.sample.id, q.answer, q.meta) for q in ours] == [
        (q.sample.id, q.answer, q.meta) for q in theirs
    ]
    pages = [q.sample.messages[0].parts[0].source for q in theirs]
    assert pages == [b"png"] * 3
    assert pages[0] is pages[1] is pages[2]
