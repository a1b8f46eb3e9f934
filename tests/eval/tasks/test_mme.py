"""MME: exactly the official numbers, whatever form questions and answers come in."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Sample, Text
from tinymodal.eval.benchmark import Problems, Question
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks import mme

DATA = Path(__file__).parents[4] / "shared" / "data" / "eval" / "mme"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: official answers and scores")
SHORT = "\nAnswer the question using a single word or phrase."

ROWS = [
    ("OCR", "1.jpg", "Is the word 'a'? Please answer yes or no.", "Yes"),
    ("OCR", "1.jpg", "Is the word 'b'?  Please answer yes or no.", "No"),
    ("OCR", "2.jpg", "Is the word 'a'? Please answer yes or no.", "Yes"),
    ("OCR", "2.jpg", "Is the word 'b'? Please answer yes or no.", "No"),
    ("scene", "3.jpg", "Is this a bar? Please answer yes or no.", "Yes"),
    ("scene", "3.jpg", "Is this a church Please answer yes or no.", "No"),
    ("code_reasoning", "1.png", "Is it 1? Please answer yes or no.", "Yes"),
    ("code_reasoning", "1.png", "Is it 2? Please answer yes or no.", "No"),
]


@pytest.fixture
def folder(tmp_path):
    there = tmp_path / "mme"
    there.mkdir()
    keys = ("category", "image", "question", "answer")
    lines(there / "gt.jsonl", [dict(zip(keys, row, strict=True)) for row in ROWS])
    return there


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def llava(path, replies):
    """Answers as LLaVA writes them, to the questions of ``ROWS``."""
    rows = []
    for (subtask, image, question, _), reply in zip(ROWS, replies, strict=False):
        prompt = " ".join(question.replace("Please answer yes or no.", "").split()) + SHORT
        place = "images/" if subtask == "scene" else ""
        rows.append({"question_id": f"{subtask}/{place}{image}", "prompt": prompt, "text": reply})
    return lines(path, rows)


@needs_data
@pytest.mark.parametrize(
    ("answers", "key"), [("LaVIN", "LaVIN"), ("llava-v1.5-13b.answers.jsonl.gz", "llava-v1.5-13b")]
)
def test_scores_equal_the_official_ones(answers, key, tmp_path):
    expected = json.loads((DATA / "expected.json").read_text())[key]
    result = score_answers(mme.TASK, DATA / answers, tmp_path, data=DATA)
    assert not result.problems
    assert {name: result.metrics[name] for name in expected} == expected
    low, high = result.interval
    assert low < expected["perception"] < high


@needs_data
def test_every_prompt_is_the_one_that_llava_asked():
    rows = map(json.loads, gzip.decompress((DATA / "llava_mme.jsonl.gz").read_bytes()).splitlines())
    asked = {(row["image"], row["text"]) for row in rows}
    questions = list(mme.TASK.open(DATA, Problems()).load())
    assert len(questions) == len(asked) == 2374
    for question in questions:
        picture, text = question.sample.messages[0].parts
        assert (
            picture.source.relative_to(DATA / "MME_Benchmark_release_version").as_posix(),
            text.text,
        ) in asked


def test_a_score_is_accuracy_and_pictures_with_both_right(folder, tmp_path):
    answers = llava(tmp_path / "a.jsonl", ["Yes", "No", "Yes", "Yes", "No", "No", "perhaps", "no"])
    result = score_answers(mme.TASK, answers, tmp_path / "out", data=folder.parent)
    assert result.metrics == {
        "perception": 75.0 + 50.0 + 50.0 + 0.0,
        "cognition": 50.0 + 0.0,
        "tasks": {"scene": 50.0, "OCR": 125.0, "code_reasoning": 50.0},
        "acc": {"scene": 50.0, "OCR": 75.0, "code_reasoning": 50.0},
        "acc_plus": {"scene": 0.0, "OCR": 50.0, "code_reasoning": 0.0},
    }
    assert result.summary()["complete"]


def test_answers_are_joined_by_picture_and_words_in_any_order(folder, tmp_path):
    answers = llava(tmp_path / "a.jsonl", ["Yes", "No"] * 4)
    answers.write_text("".join(sorted(answers.read_text().splitlines(keepends=True), reverse=True)))
    result = score_answers(mme.TASK, answers, tmp_path / "out", data=folder.parent)
    assert not result.problems
    assert result.metrics["tasks"] == {"scene": 200.0, "OCR": 200.0, "code_reasoning": 200.0}


def test_the_folder_of_results_is_read_and_its_other_files_are_not(folder, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    for subtask in ("OCR", "scene", "code_reasoning"):
        rows = [row for row in ROWS if row[0] == subtask]
        text = "".join(f"{image}\t{asked}\t{label}\t{label}, it is\n" for _, image, asked, label in rows)
        (results / f"{subtask}.txt").write_text(
            text.replace("1.jpg", "1.txt")
        )  # LLaVA's conversion has it so
    (results / "notes.txt").write_text("by hand")
    result = score_answers(mme.TASK, results, tmp_path / "out", data=folder.parent)
    assert not result.problems
    assert result.metrics["perception"] == 400.0


def test_short_lines_and_other_labels_in_results_are_named(folder, tmp_path):
    file = tmp_path / "OCR.txt"
    file.write_text(f"1.jpg\t{ROWS[0][2]}\tNo\tyes\n1.jpg\tno reply\tNo\n")
    result = score_answers(mme.TASK, file, tmp_path / "out", data=folder.parent)
    assert result.problems.counts["unreadable answers"] == 1
    assert result.problems.counts["answers beside another label than the question's"] == 1
    assert not result.summary()["complete"]


def test_a_folder_without_results_is_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"existence\.txt"):
        score_answers(mme.TASK, tmp_path / "empty", tmp_path / "out", data=folder.parent)


def test_the_official_folder_of_questions_gives_the_same_questions(folder, tmp_path):
    root = tmp_path / "official" / "MME_Benchmark_release_version"
    for subtask, image, _, _ in ROWS:
        place = root / subtask
        for inside in [place / "images", place / "questions_answers_YN"] if subtask == "scene" else [place]:
            inside.mkdir(parents=True, exist_ok=True)
        texts = place / "questions_answers_YN" if subtask == "scene" else place
        told = [f"{asked}\t{label}" for s, i, asked, label in ROWS if (s, i) == (subtask, image)]
        (texts / Path(image).with_suffix(".txt")).write_text("\n".join(told))
        (place / ("images" if subtask == "scene" else "") / image).write_bytes(b"a picture")
    (root / "existence").mkdir()
    (root / "existence" / "9.txt").write_text("Is it there? Please answer yes or no.\tYes\nno label\n")
    problems = Problems()
    theirs = {q.sample.id: q for q in mme.TASK.open(tmp_path / "official", problems).load()}
    ours = {q.sample.id: q for q in mme.TASK.open(folder, Problems()).load()}
    assert set(theirs) - set(ours) == {"existence/9: Is it there?"}
    for name, question in ours.items():
        assert theirs[name].answer == question.answer
        assert theirs[name].sample.messages[0].parts[1] == question.sample.messages[0].parts[1]
        assert theirs[name].sample.messages[0].parts[0].source.is_file()
    assert problems.counts == {
        "questions without picture, subtask or label": 1,
        "subtasks without questions": 10,
    }


def test_the_parquet_of_the_hub_is_read_with_its_pictures(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    rows = [
        {
            "question_id": f"{subtask}/{image}",
            "image": {"bytes": b"a picture", "path": None},
            "question": asked,
            "answer": label,
            "category": subtask,
        }
        for subtask, image, asked, label in ROWS
    ]
    (tmp_path / "data").mkdir()
    for part in range(2):
        table = pa.Table.from_pylist(rows[part * 4 : part * 4 + 4])
        pq.write_table(table, tmp_path / "data" / f"test-0000{part}-of-00002-ab.parquet")
    problems = Problems()
    questions = list(mme.TASK.open(tmp_path, problems).load())
    assert not problems
    assert [q.sample.id for q in questions][:2] == ["OCR/1: Is the word 'a'?", "OCR/1: Is the word 'b'?"]
    assert len(questions) == 8
    assert questions[7].sample.messages[0].parts[0] == Image(b"a picture")


def test_the_prompt_is_llavas(folder):
    question = list(mme.TASK.open(folder, Problems()).load())[1]
    picture, text = question.sample.messages[0].parts
    assert text == Text("Is the word 'b'?" + SHORT)
    assert picture.source == folder / "MME_Benchmark_release_version" / "OCR" / "1.jpg"


def test_our_own_replies_are_scored_again(folder, tmp_path):
    first = score_answers(
        mme.TASK, llava(tmp_path / "a.jsonl", ["Yes"] * 8), tmp_path / "out", data=folder.parent
    )
    again = score_answers(
        mme.TASK, tmp_path / "out" / "mme.replies.jsonl", tmp_path / "o2", data=folder.parent
    )
    assert not again.problems
    assert again.metrics == first.metrics


def test_a_picture_with_one_question_counts_for_accuracy_only(folder, tmp_path):
    answers = llava(tmp_path / "a.jsonl", ["Yes", "No", "No"])
    result = score_answers(mme.TASK, answers, tmp_path / "out", data=folder.parent)
    assert result.metrics["acc"] == {"OCR": pytest.approx(200 / 3)}
    assert result.metrics["acc_plus"] == {"OCR": 100.0}
    assert "cognition" not in result.metrics
    assert result.problems.counts == {"questions without an answer": 5}


def test_only_halves_of_pictures_give_no_number(folder, tmp_path):
    result = score_answers(
        mme.TASK, llava(tmp_path / "a.jsonl", ["Yes"]), tmp_path / "out", data=folder.parent
    )
    assert result.metrics == {}
    assert result.interval is None


def test_questions_without_label_or_subtask_are_named(folder, tmp_path):
    with (folder / "gt.jsonl").open("a") as file:
        for bad in ({"answer": "maybe"}, {"category": "unheard"}, {"image": ""}, {"answer": None}):
            row = dict(zip(("category", "image", "question", "answer"), ROWS[0], strict=True)) | bad
            file.write(json.dumps(row | {"question": "Is it?"}) + "\n")
        file.write("{half a row\n")
    problems = Problems()
    assert len(list(mme.TASK.open(folder, problems).load())) == 8
    assert problems.counts == {"questions without picture, subtask or label": 4, "unreadable rows": 1}


def test_double_questions_and_strange_answers_are_named(folder, tmp_path):
    with (folder / "gt.jsonl").open("a") as file:
        file.write((folder / "gt.jsonl").read_text().splitlines()[0] + "\n")
    answers = llava(tmp_path / "a.jsonl", ["Yes", "No"] * 4)
    with answers.open("a") as file:
        file.write(json.dumps({"question_id": "OCR/9.jpg", "prompt": "Is it?", "text": "Yes"}) + "\n")
        file.write(
            json.dumps({"question_id": "OCR/1.jpg", "prompt": "Is the word 'a'?", "text": "No"}) + "\n"
        )
        file.write(json.dumps({"question_id": "OCR/1.jpg", "prompt": "Is it?"}) + "\n")
    result = score_answers(mme.TASK, answers, tmp_path / "out", data=folder.parent)
    assert result.problems.counts == {
        "questions with the id of another": 1,
        "answers to no question": 1,
        "questions answered more than once": 1,
        "unreadable answers": 1,
    }
    assert result.metrics["perception"] == 400.0


def test_missing_files_are_told_with_their_origin(tmp_path):
    with pytest.raises(DataError, match=r"gt\.jsonl .* --where --on mme"):
        list(mme.TASK.open(tmp_path, Problems()).load())


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("Yes", "yes"),
        ("no, it is not", "no"),
        ("eyes", "yes"),  # anywhere in the first four characters
        ("know", "no"),
        ("unknown", "other"),
        ("    yes", "other"),
        ("", "other"),
    ],
)
def test_the_first_four_characters_decide(reply, said):
    assert mme.score(Question(Sample((), "x"), "yes"), reply).parsed == said


@given(st.text(max_size=12))
def test_no_reply_is_both_or_neither(reply):
    yes = mme.score(Question(Sample((), "x"), "yes"), reply)
    no = mme.score(Question(Sample((), "x"), "no"), reply)
    assert yes.value + no.value == (yes.parsed != "other")


def test_sums_of_many_draws_at_once_are_those_of_each(folder, tmp_path):
    answers = llava(tmp_path / "a.jsonl", ["Yes", "No", "Yes", "Yes", "No", "No", "perhaps", "no"])
    result = score_answers(mme.TASK, answers, tmp_path / "out", data=folder.parent)
    sums = mme.sums([row.score for row in result.answered])
    total = sums.rows.sum(axis=0)
    assert sums.value(total) == result.metrics["perception"]
    np.testing.assert_array_equal(sums.value(np.stack([total, total])), [175.0, 175.0])
