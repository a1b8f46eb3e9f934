"""VizWiz: the official scorer's numbers on real answers, both layouts of val, and the server's file."""

import json
from pathlib import Path

import pytest

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Text
from tinymodal.eval.benchmark import Problems
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks.vizwiz import TASK, submission

DATA = Path(__file__).parents[4] / "shared" / "data" / "eval" / "vizwiz"
SHORT = "\nAnswer the question using a single word or phrase."
HINT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
TRUTH = [("VizWiz_val_00000000.jpg", ["unanswerable"] * 10, "unanswerable"),
         ("VizWiz_val_00000001.jpg", ["the Red"] * 2 + ["blue"] * 8, "other")]  # fmt: skip


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def told(answers: list[str]) -> list[dict]:
    return [{"answer": answer, "answer_confidence": "yes"} for answer in answers]


def official(folder: Path) -> Path:
    rows = [
        {
            "image": name,
            "question": "What is it? ",
            "answers": told(answers),
            "answer_type": kind,
            "answerable": 1,
        }
        for name, answers, kind in TRUTH
    ]
    write(folder / "val.json", rows)
    return folder


def as_vqa(folder: Path) -> Path:
    asked = [
        {"question_id": i, "image_id": row[0], "question": "What is it? "} for i, row in enumerate(TRUTH)
    ]
    write(folder / "val_questions_vqa_format.json", {"questions": asked})
    rows = [
        {"question_id": i, "image_id": name, "question_type": kind, "answers": told(answers)}
        for i, (name, answers, kind) in enumerate(TRUTH)
    ]
    write(folder / "val_annotations_vqa_format.json", {"annotations": rows})
    return folder


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real answers is not here")
def test_numbers_of_real_answers_equal_the_official_ones(tmp_path):
    result = score_answers(TASK, DATA / "pred_human1.json.gz", tmp_path, data=DATA)
    assert result.metrics == json.loads((DATA / "expected.json").read_text())["human1"]
    assert not result.problems
    low, high = result.interval
    assert low < 73.51 < high < low + 3


@pytest.mark.parametrize("layout", [official, as_vqa])
def test_a_question_is_asked_with_the_hint_and_its_picture_is_below_val(tmp_path, layout):
    first, second = TASK.open(layout(tmp_path), Problems()).load()
    assert first.sample.messages[0].parts == (
        Image(tmp_path / "val" / "VizWiz_val_00000000.jpg"),
        Text("What is it? " + HINT + SHORT),
    )
    assert (first.answer, second.answer) == ("unanswerable", "blue")
    assert first.meta["answer_type"] == "unanswerable"


@pytest.mark.parametrize("layout", [official, as_vqa])
@pytest.mark.parametrize("key", ["question_id", "image"])
def test_people_who_agree_are_still_ten_and_answers_go_by_picture_or_number(tmp_path, layout, key):
    """VQA's scorer tells people apart by what they said where answers have no id: then 0 for the first."""
    texts = {"VizWiz_val_00000001.jpg": "A red!", "VizWiz_val_00000000.jpg": "unanswerable"}
    rows = [{key: name, "answer": text} for name, text in texts.items()]
    result = score_answers(TASK, write(tmp_path / "a.json", rows), tmp_path / "out", data=layout(tmp_path))
    assert result.metrics == {"overall": 80.0, "perAnswerType": {"unanswerable": 100.0, "other": 60.0}}
    assert not result.problems


def test_results_in_vqas_format_go_by_number_and_ours_by_id(tmp_path):
    folder = as_vqa(tmp_path)
    rows = [{"question_id": 1, "answer": "blue"}, {"id": "0", "reply": "unanswerable", "answer": "truth"}]
    result = score_answers(TASK, write(tmp_path / "a.json", rows), tmp_path / "out", data=folder)
    assert result.metrics["overall"] == 100
    assert not result.problems


def test_a_category_without_answers_is_left_out_and_what_is_missing_is_named(tmp_path):
    rows = [
        {"image": "VizWiz_val_00000001.jpg", "answer": "blue"},
        {"image": "VizWiz_val_7.jpg", "answer": ""},
    ]
    rows += [{"image": "VizWiz_val_00000000.jpg"}, {"answer": "blue"}]
    path = write(tmp_path / "a.json", rows)
    result = score_answers(TASK, path, tmp_path / "out", data=official(tmp_path))
    assert result.metrics == {"overall": 100.0, "perAnswerType": {"other": 100.0}}
    assert {kind: told["named"] for kind, told in result.problems.told().items()} == {
        "answers to no question": ["a.json: row 2: 'VizWiz_val_7.jpg'"],
        "unreadable answers": [
            "a.json: row 3: none of text, prediction, reply, response, caption, pred, hyp, answer"
        ],
        "answers that do not tell their question": ["a.json: row 4"],
        "questions without an answer": ["VizWiz_val_00000000.jpg"],
    }


def test_questions_that_cannot_be_read_are_named(tmp_path):
    rows = [{"image": "a.jpg", "question": "?", "answers": "red"}, {"question": "?"}, {"image": "b.jpg"}, 3]
    write(tmp_path / "val.json", rows)
    problems = Problems()
    assert list(TASK.open(tmp_path, problems).load()) == []
    assert problems.counts == {
        "questions whose answers cannot be read": 1,
        "questions without id, picture or words": 2,
        "unreadable rows": 1,
    }
    with pytest.raises(DataError, match=r"holds no val\.json or test\.json"):
        list(TASK.open(tmp_path / "nowhere", Problems()).load())


def test_test_has_no_score_but_a_file_for_the_server(tmp_path):
    names = ["VizWiz_test_00000000.jpg", "VizWiz_test_00000001.jpg"]
    lines = [{"question_id": name, "image": name, "text": f"Why?{HINT}{SHORT}"} for name in names]
    (tmp_path / "llava_test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write(tmp_path / "test.json", [{"image": name, "question": "Why?"} for name in names])
    problems = Problems()
    questions = list(TASK.open(tmp_path, problems).load())
    assert questions[0].sample.messages[0].parts == (
        Image(tmp_path / "test" / names[0]),
        Text(f"Why?{HINT}{SHORT}"),
    )
    assert problems.told()["questions without answers to score by"]["named"] == names

    missing = Problems()
    text = submission(questions, {names[1]: "The Unanswerable?"}, missing)
    assert text == json.dumps(
        [{"image": names[0], "answer": ""}, {"image": names[1], "answer": "unanswerable"}]
    )
    assert missing.told() == {"questions without an answer": {"count": 1, "named": [names[0]]}}

    rows = [{"image": name, "answer": "no"} for name in names]
    result = score_answers(TASK, write(tmp_path / "a.json", rows), tmp_path / "out", data=tmp_path)
    assert result.metrics == {}
    assert not result.summary()["complete"]

    (tmp_path / "llava_test.jsonl").unlink()
    assert list(TASK.open(tmp_path, Problems()).load()) == questions
