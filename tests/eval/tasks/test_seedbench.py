"""SEED-Bench: the part about pictures, counted as LLaVA counts it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Sample
from tinymodal.eval.benchmark import Problems, Question
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks import seedbench


def row(name, kind, answer, data_type="image", **more):
    options = {f"choice_{letter}": f"option {letter}" for letter in "abcd"}
    asked = {"question": "How many towels are in the image?", "data_id": f"14_{name}"}
    told = {"question_id": name, "question_type_id": kind, "answer": answer, "data_type": data_type}
    return options | asked | told | more


ROWS = [
    row("101669", 5, "A"),
    row("104933", 1, "B"),
    row("3", 1, "C"),
    row("4", 9, "D"),
    row("v1738", 10, "A", "video"),
]
ANSWERS = {"101669": "A", "104933": "B", "3": "C.", "4": "D", "v1738": "B"}


@pytest.fixture
def folder(tmp_path):
    there = tmp_path / "seed_bench"
    there.mkdir()
    return write(there, ROWS)


def write(there, rows):
    (there / "SEED-Bench.json").write_text(json.dumps({"questions": rows, "question_type": {}}))
    return there


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def llava(path, answers):
    """LLaVA writes whole numbers as numbers, and answers to the videos into the same file."""
    return lines(
        path,
        [{"question_id": int(n) if n.isdigit() else n, "prompt": "", "text": t} for n, t in answers.items()],
    )


def test_each_type_and_all_pictures_in_percent_as_printed(folder, tmp_path):
    answers = llava(tmp_path / "a.jsonl", ANSWERS)
    result = score_answers(seedbench.TASK, answers, tmp_path / "out", data=folder.parent)
    assert not result.problems
    assert result.metrics == {
        "Scene Understanding": 50.0,
        "Instances Counting": 100.0,
        "Text Understanding": 100.0,
        "image accuracy": 75.0,
    }
    assert result.summary()["n"] == 4


def test_numbers_have_two_decimals(tmp_path):
    folder = write(tmp_path, [row(str(n), 2, "A") for n in range(3)])
    answers = llava(tmp_path / "a.jsonl", {"0": "A", "1": "A", "2": "B"})
    result = score_answers(seedbench.TASK, answers, tmp_path / "out", data=folder)
    assert result.metrics == {"Instance Identity": 66.67, "image accuracy": 66.67}


@pytest.mark.parametrize("keys", [("question_id", "prediction"), ("q_id", "prediction"), ("id", "reply")])
def test_official_results_and_our_replies_are_read(folder, tmp_path, keys):
    answers = lines(tmp_path / "a.jsonl", [dict(zip(keys, pair, strict=True)) for pair in ANSWERS.items()])
    result = score_answers(seedbench.TASK, answers, tmp_path / "out", data=folder.parent)
    assert not result.problems
    assert result.metrics["image accuracy"] == 75.0


def test_a_missing_answer_is_wrong_and_named(folder, tmp_path):
    answers = llava(tmp_path / "a.jsonl", {"4": "D", "9": "A"})
    result = score_answers(seedbench.TASK, answers, tmp_path / "out", data=folder.parent)
    assert result.metrics["image accuracy"] == 25.0
    assert result.problems.counts == {"answers to no question": 1, "questions without an answer": 3}


@given(st.text(max_size=4))
def test_nothing_but_the_letter_is_right(reply):
    assert seedbench.score(Question(Sample((), "1"), "B"), reply).value == (reply == "B")


def test_a_question_asks_as_llava_does(folder):
    question = next(iter(seedbench.TASK.open(folder, Problems()).load()))
    picture, text = question.sample.messages[0].parts
    assert text.text == (
        "How many towels are in the image?\nA. option a\nB. option b\nC. option c\nD. option d\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert picture == Image(folder / "SEED-Bench-image" / "14_101669")


def test_the_parquet_of_the_hub_is_read_in_all_its_parts(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    (tmp_path / "data").mkdir()
    images = {"image": [{"bytes": b"a picture", "path": None}]}
    for part in range(2):
        rows = [each | images for each in ROWS[part * 3 : part * 3 + 3]]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"test-0000{part}-of-00002.parquet")
    questions = list(seedbench.TASK.open(tmp_path, Problems()).load())
    assert [q.sample.id for q in questions] == ["101669", "104933", "3", "4"]
    assert questions[3].sample.messages[0].parts[0] == Image(b"a picture")


def test_what_is_wrong_with_questions_is_named(folder):
    bad = [row("", 1, "A"), row("5", 13, "A"), row("6", 1, "E"), row("7", 1, None), row("8", "x", "A"), [1]]
    write(folder, ROWS + bad)
    problems = Problems()
    assert len(list(seedbench.TASK.open(folder, problems).load())) == 4
    assert problems.counts == {"questions without id, type or answer": 5, "unreadable rows": 1}


def test_a_file_of_another_kind_is_refused(folder):
    (folder / "SEED-Bench.json").write_text('{"rows": []}')
    with pytest.raises(DataError, match="a list called 'questions'"):
        list(seedbench.TASK.open(folder, Problems()).load())
    (folder / "SEED-Bench.json").unlink()
    with pytest.raises(DataError, match="AILab-CVC/SEED-Bench"):
        list(seedbench.TASK.open(folder, Problems()).load())
