"""GQA: exactly what the official script prints, to the last section."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Sample, Text
from tinymodal.eval.benchmark import Problems, Question
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks import gqa

DATA = Path(__file__).parents[4] / "shared" / "data" / "eval" / "gqa"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: official answers and scores")


STEPS = (("select", "dog (1)"), ("query", "color"))


def row(
    answer, structural="query", semantic="attr", group="colour", question="What is it?", steps=STEPS, **more
):
    return {
        "question": question,
        "imageId": "n7",
        "isBalanced": True,
        "answer": answer,
        "semantic": [{"operation": operation, "argument": argument} for operation, argument in steps],
        "types": {"structural": structural, "semantic": semantic, "detailed": "x"},
        "groups": {"global": group, "local": "y"},
    } | more


QUESTIONS = {
    "01": row("red"),
    "02": row("red"),
    "03": row("blue", question="Which colour does it have?"),
    "04": row("yes", "verify", "obj", None, "Is it there?", steps=[("exist", "?")]),
    "05": row("man", group="", steps=[("query", "name")] * 2),
}
REPLIES = {"01": "Red.", "02": "blue", "03": "Blue", "04": "Yes..", "05": "a man"}


@pytest.fixture
def folder(tmp_path):
    there = tmp_path / "gqa"
    there.mkdir()
    return write(there, QUESTIONS)


def write(there, questions):
    (there / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    return there


def llava(path, replies):
    rows = [{"question_id": name, "prompt": "", "text": text} for name, text in replies.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def official(path, replies):
    path.write_text(json.dumps([{"questionId": name, "prediction": text} for name, text in replies.items()]))
    return path


@needs_data
def test_every_number_equals_the_official_one(tmp_path):
    expected = json.loads((DATA / "expected.json").read_text())["llava-v1.5-13b"]
    result = score_answers(gqa.TASK, DATA / "llava-v1.5-13b.answers.jsonl.gz", tmp_path, data=DATA)
    assert not result.problems
    assert result.metrics == expected
    assert list(result.metrics["sections"]["steps number"]) == [str(n) for n in range(1, 10)]
    low, high = result.interval
    assert low < expected["Accuracy"] < high


def test_the_numbers_are_those_of_a_sum_by_hand(folder, tmp_path):
    result = score_answers(
        gqa.TASK, llava(tmp_path / "a.jsonl", REPLIES), tmp_path / "out", data=folder.parent
    )
    assert result.metrics == {
        "Binary": 100.0,
        "Open": 50.0,
        "Accuracy": 60.0,
        "Validity": 0.0,
        "Plausibility": 0.0,
        # Group colour: 1 of 2 red, 2 of 1 blue: 1/2 + 1/1, three questions. Group "": 0 of 1 man: 1, one
        # question. (1.5 * 3 + 1 * 1) / 4 / 100.
        "Distribution": 0.01,
        "sections": {
            "structural type": {"query": [50.0, 4], "verify": [100.0, 1]},
            "semantic type": {"attr": [50.0, 4], "obj": [100.0, 1]},
            "steps number": {"0": [50.0, 2], "2": [66.67, 3]},
            "words number": {"3": [50.0, 4], "5": [100.0, 1]},
        },
    }


def test_the_group_without_a_name_is_a_group(tmp_path):
    folder = write(tmp_path, {str(n): row("man", group="") for n in range(100)})
    answers = llava(tmp_path / "a.jsonl", {str(n): "woman" for n in range(100)})
    assert score_answers(gqa.TASK, answers, tmp_path / "out", data=folder).metrics["Distribution"] == 1.0


def test_replies_become_predictions_and_predictions_stay_as_they_are(folder, tmp_path):
    replies = {name: question["answer"].upper() + "." for name, question in QUESTIONS.items()}
    ours = score_answers(gqa.TASK, llava(tmp_path / "a.jsonl", replies), tmp_path / "out", data=folder.parent)
    assert ours.metrics["Accuracy"] == 100.0
    theirs = score_answers(
        gqa.TASK, official(tmp_path / "a.json", replies), tmp_path / "o2", data=folder.parent
    )
    assert theirs.metrics["Accuracy"] == 0.0
    converted = {name: text.rstrip(".").lower() for name, text in replies.items()}
    answers = official(tmp_path / "b.json", converted)
    assert score_answers(gqa.TASK, answers, tmp_path / "o3", data=folder.parent).metrics["Accuracy"] == 100.0


@given(st.text(max_size=20))
def test_a_prediction_is_the_reply_without_capitals_and_last_stops(reply):
    said = gqa.score(Question(Sample((), "x"), "red"), reply).parsed
    assert said == said.lower()
    assert not said.endswith(".")
    assert gqa.score(Question(Sample((), "x"), "red"), said).parsed == said
    assert gqa.score(Question(Sample((), "x"), "red"), gqa.Final(reply)).parsed == reply


def test_the_file_of_choices_gives_validity_and_plausibility(folder, tmp_path):
    both = {"valid": ["red", "blue"], "plausible": ["red"]}
    choices = {name: both for name in ("01", "02", "03")}
    (folder / "testdev_balanced_choices.json").write_text(json.dumps(choices))
    common = dict(QUESTIONS) | {"05": row("color", types={**row("")["types"], "detailed": "twoCommon"})}
    write(folder, common)
    answers = llava(tmp_path / "a.jsonl", REPLIES | {"05": "shape"})
    metrics = score_answers(gqa.TASK, answers, tmp_path / "out", data=folder.parent).metrics
    assert (metrics["Validity"], metrics["Plausibility"]) == (80.0, 40.0)


def test_a_question_asks_as_llava_does(folder):
    question = next(iter(gqa.TASK.open(folder, Problems()).load()))
    picture, text = question.sample.messages[0].parts
    assert text == Text("What is it?\nAnswer the question using a single word or phrase.")
    assert picture == Image(folder / "images" / "n7.jpg")
    (folder / "data" / "images").mkdir(parents=True)
    question = next(iter(gqa.TASK.open(folder, Problems()).load()))
    assert question.sample.messages[0].parts[0] == Image(folder / "data" / "images" / "n7.jpg")


@pytest.mark.parametrize("nested", [False, True])
def test_the_dataset_folder_of_the_hub_is_read_with_its_pictures(tmp_path, nested):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    rows = [{"id": name, **question} for name, question in QUESTIONS.items()]
    if nested:
        for each in rows:
            steps = each["semantic"]
            each["semantic"] = {key: [step[key] for step in steps] for key in ("operation", "argument")}
    for name, table in (
        ("testdev_balanced_instructions", rows),
        ("testdev_balanced_images", [{"id": "n7", "image": {"bytes": b"a picture", "path": None}}]),
    ):
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(table), tmp_path / name / "testdev-00000-of-00001.parquet")
    questions = list(gqa.TASK.open(tmp_path, Problems()).load())
    assert [q.sample.id for q in questions] == list(QUESTIONS)
    assert questions[0].sample.messages[0].parts[0] == Image(b"a picture")
    assert [q.meta["steps"] for q in questions] == ["2", "2", "2", "0", "0"]
    assert "group" not in questions[3].meta
    assert questions[4].meta["group"] == ""


def test_what_is_wrong_with_questions_and_answers_is_named(folder, tmp_path):
    write(folder, QUESTIONS | {"06": {"question": "?"}, "07": "text", "08": row("a", isBalanced=False)})
    answers = llava(tmp_path / "a.jsonl", REPLIES | {"99": "what?"})
    with answers.open("a") as file:
        file.write('{"question_id": "01", "text": "green"}\n{"question_id": "01"}\n[]\n')
    result = score_answers(gqa.TASK, answers, tmp_path / "out", data=folder.parent)
    assert result.problems.counts == {
        "questions without answer or type": 1,
        "unreadable rows": 2,
        "answers to no question": 1,
        "questions answered more than once": 1,
        "unreadable answers": 1,
    }
    assert result.metrics["Accuracy"] == 60.0


def test_missing_answers_are_left_out_and_named(folder, tmp_path):
    result = score_answers(
        gqa.TASK, llava(tmp_path / "a.jsonl", {"04": "yes"}), tmp_path / "out", data=folder.parent
    )
    assert result.problems.counts == {"questions without an answer": 4}
    assert result.metrics["Accuracy"] == 100.0
    assert not {"Open", "Distribution"} & set(result.metrics)
    assert not result.summary()["complete"]


def test_a_file_of_another_kind_is_refused(folder, tmp_path):
    (folder / "testdev_balanced_questions.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="object of id -> question, found list"):
        list(gqa.TASK.open(folder, Problems()).load())
    (folder / "testdev_balanced_questions.json").unlink()
    with pytest.raises(DataError, match=r"testdev_balanced_questions\.json"):
        list(gqa.TASK.open(folder, Problems()).load())


def test_our_own_replies_are_scored_again(folder, tmp_path):
    first = score_answers(
        gqa.TASK, llava(tmp_path / "a.jsonl", REPLIES), tmp_path / "out", data=folder.parent
    )
    again = score_answers(
        gqa.TASK, tmp_path / "out" / "gqa.replies.jsonl", tmp_path / "o2", data=folder.parent
    )
    assert not again.problems
    assert again.metrics == first.metrics
