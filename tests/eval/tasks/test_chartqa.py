"""ChartQA: relaxed accuracy of both halves, answers by id or by chart and question, all three layouts."""

import json
from pathlib import Path

import pytest

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Text
from tinymodal.eval.benchmark import Problems
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks.chartqa import TASK

SHORT = "\nAnswer the question using a single word or phrase."
HUMAN = [
    ("1.png", "How many bars?", "14"),
    ("1.png", "Is it more?", "No"),
    ("2.png", "How many bars?", "0.03"),
]
AUGMENTED = [("3.png", "What was the value in 2010?", "100")]


def rows(half: list[tuple[str, str, str]]) -> list[dict]:
    return [{"imgname": chart, "query": words, "label": label} for chart, words, label in half]


def both_halves(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test_human.json").write_text(json.dumps(rows(HUMAN)))
    (folder / "test_augmented.json").write_text(json.dumps(rows(AUGMENTED)))
    return folder


def answer(path: Path, *told: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    return path


def by_id(**texts: str) -> list[dict]:
    return [{"question_id": name.replace("_", "/"), "text": text} for name, text in texts.items()]


def test_a_question_is_asked_about_its_chart(tmp_path):
    folder = both_halves(tmp_path / "ChartQA Dataset" / "test")
    (folder / "png").mkdir()
    (folder / "png" / "1.png").touch()
    questions = list(TASK.open(tmp_path, Problems()).load())
    assert [q.sample.id for q in questions] == ["human/0", "human/1", "human/2", "augmented/0"]
    assert questions[3].sample.messages[0].parts == (
        Image(folder / "png" / "3.png"),
        Text("What was the value in 2010?" + SHORT),
    )


def test_numbers_are_told_for_all_each_half_and_the_mean_of_the_halves(tmp_path):
    told = by_id(human_0="14.5", human_1="no", human_2="0.04", augmented_0="105")
    result = score_answers(
        TASK, answer(tmp_path / "a.jsonl", *told), tmp_path / "out", data=both_halves(tmp_path)
    )
    assert result.metrics == {
        "relaxed_overall": 0.75,
        "relaxed_human_split": pytest.approx(2 / 3),
        "relaxed_augmented_split": 1.0,
        "relaxed_mean": pytest.approx((2 / 3 + 1) / 2),
    }
    assert not result.problems
    low, high = result.interval
    assert low <= result.metrics["relaxed_mean"] <= high


def test_a_half_that_was_not_asked_is_left_out(tmp_path):
    told = by_id(human_0="14", human_1="Yes")
    result = score_answers(
        TASK, answer(tmp_path / "a.jsonl", *told), tmp_path / "out", data=both_halves(tmp_path)
    )
    assert result.metrics == {"relaxed_overall": 0.5, "relaxed_human_split": 0.5, "relaxed_mean": 0.5}
    assert result.interval is not None
    assert result.problems.counts == {"questions without an answer": 2}


def test_a_percentage_is_a_hundredth(tmp_path):
    told = by_id(human_2="3%", human_0="14%")
    result = score_answers(
        TASK, answer(tmp_path / "a.jsonl", *told), tmp_path / "out", data=both_halves(tmp_path)
    )
    assert [a.score.value for a in result.answered] == [0, 1]


def test_answers_are_joined_by_chart_and_question_too(tmp_path):
    told = [
        {"imgname": "2.png", "query": "How many bars?", "prediction": "0.03"},
        {"image": "3.png", "prompt": "What was the value in 2010?" + SHORT, "text": "100"},
        {"imgname": "1.png", "question": "Is it more?", "answer": "No"},
        {"id": "human/0", "reply": "14", "answer": "right"},
        {"imgname": "9.png", "query": "How many bars?", "prediction": "1"},
        {"prediction": "1"},
    ]
    result = score_answers(
        TASK, answer(tmp_path / "a.jsonl", *told), tmp_path / "out", data=both_halves(tmp_path)
    )
    assert result.metrics["relaxed_overall"] == 1
    assert {kind: told["named"] for kind, told in result.problems.told().items()} == {
        "answers to no question": ["a.jsonl: line 5: '9.png How many bars?'"],
        "answers that do not tell their question": ["a.jsonl: line 6"],
    }


def test_a_question_that_was_written_twice_takes_two_answers(tmp_path):
    folder = both_halves(tmp_path)
    (folder / "test_augmented.json").write_text(json.dumps(rows(AUGMENTED * 2)))
    told = [{"imgname": "3.png", "query": AUGMENTED[0][1], "prediction": text} for text in ("100", "1")]
    result = score_answers(TASK, answer(tmp_path / "a.jsonl", *told), tmp_path / "out", data=folder)
    assert [(a.question.sample.id, a.score.value) for a in result.answered] == [
        ("augmented/0", 1),
        ("augmented/1", 0),
    ]


def test_bad_questions_are_named_and_the_others_keep_their_ids(tmp_path):
    folder = both_halves(tmp_path)
    bad = [
        {"imgname": "1.png", "label": "1"},
        {"query": "?", "label": "1"},
        {"imgname": "1.png", "query": "?"},
    ]
    (folder / "test_augmented.json").write_text(json.dumps([*bad, *rows(AUGMENTED)]))
    problems = Problems()
    assert [q.sample.id for q in TASK.open(folder, problems).load()][3:] == ["augmented/3"]
    assert problems.counts == {
        "questions without words or chart": 2,
        "questions without answers to score by": 1,
    }
    (folder / "test_augmented.json").unlink()
    with pytest.raises(DataError, match=r"chartqa: .* holds no test_augmented\.json"):
        list(TASK.open(folder, Problems()).load())


@pytest.mark.parametrize("publisher", ["lmms-lab", "HuggingFaceM4"])
def test_parquet_of_the_hub_is_the_same_task(tmp_path, publisher):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    told = []
    for half, kind in ((AUGMENTED, "augmented"), (HUMAN, "human")):
        for _, words, label in half:
            row = {"image": {"bytes": b"png", "path": None}}
            if publisher == "lmms-lab":
                row |= {"type": f"{kind}_test", "question": words, "answer": label}
            else:
                row |= {"human_or_machine": int(kind != "human"), "query": words, "label": [label]}
            told.append(row)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(
        pa.Table.from_pylist(told), tmp_path / "hub" / "data" / "test-00000-of-00001.parquet"
    )
    ours = {q.sample.id: (q.answer, q.meta) for q in TASK.open(both_halves(tmp_path), Problems()).load()}
    theirs = list(TASK.open(tmp_path / "hub", Problems()).load())
    assert {q.sample.id: (q.answer, q.meta) for q in theirs} == ours
    assert theirs[0].sample.messages[0].parts[0] == Image(b"png")
