"""ScienceQA is scored as LLaVA's scorer does, of all problems and of those with a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Text
from tinymodal.eval.benchmark import Problems, Score
from tinymodal.eval.given import DOUBLE, MISSING, UNKNOWN
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks.scienceqa import TASK, report

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "eval" / "scienceqa"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the real answers are not at hand")
DIRECT = "\nAnswer with the option's letter from the given choices directly."


def problem(answer: int, num_choices: int = 3, **more: object) -> dict:
    choices = ["red", "green", "blue", "black", "white"][:num_choices]
    return {
        "question": "Which one?",
        "choices": choices,
        "answer": answer,
        "image": None,
        "split": "test",
        **more,
    }


@pytest.fixture
def folder(tmp_path):
    """Four problems of the test, two with a picture, one of the training; nothing of LLaVA's."""
    problems = {
        "4": problem(1, hint="It is grass.", subject="natural science", grade="grade3"),
        "5": problem(0, image="image.png", hint="", subject="social science", grade="grade8"),
        "7": problem(2, image="image.png", hint="Look.", subject="natural science", grade="grade6"),
        "9": problem(0, 2, hint="", subject="language science", grade="grade12"),
        "1": problem(0, split="train"),
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["1"], "test": ["4", "5", "7", "9"]}))
    return tmp_path


def score(folder, texts, **more):
    path = folder / "answers.jsonl"
    rows = [{"question_id": name, "prompt": "", "text": text} for name, text in texts.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return score_answers(TASK, path, folder / "out", data=folder, **more)


def questions(folder, problems=None):
    return list(TASK.open(folder, Problems() if problems is None else problems).load())


@real
def test_the_official_numbers_are_met_to_the_last_digit(tmp_path):
    expected = json.loads((DATA / "expected.json").read_text())["llava-v1.5-13b"]
    result = score_answers(TASK, DATA / "llava-v1.5-13b.answers.jsonl.gz", tmp_path, data=DATA.parent)
    assert result.metrics == expected
    told = json.loads((tmp_path / "results.json").read_text())["scienceqa"]
    assert (told["metrics"], told["n"], told["complete"]) == (expected, 4241, True)
    assert told["interval_95"][0] < expected["acc"] < told["interval_95"][1]


@real
def test_the_questions_are_asked_in_llavas_words():
    asked = {question.sample.id: question for question in questions(DATA)}
    first, seen = asked["4"].sample.messages[0].parts, asked["5"].sample.messages[0].parts
    assert len(first) == 1
    assert first[0].text.endswith("\nA. chiasmus\nB. apostrophe" + DIRECT)
    assert seen[0] == Image(DATA / "images" / "test" / "5" / "image.png")
    assert seen[1].text.startswith("Context: People can use the engineering-design process")


@real
def test_without_llavas_file_the_same_words_are_made(tmp_path):
    for file in DATA.glob("p*.gz"):
        (tmp_path / file.name).symlink_to(file)
    words = [
        {question.sample.id: question.sample.messages[0].parts[-1] for question in questions(each)}
        for each in (DATA, tmp_path)
    ]
    assert len(words[0]) == 4241
    assert words[0] == words[1]


def test_a_problem_with_context_options_and_picture_becomes_a_prompt(folder):
    text, picture, both, _ = questions(folder)
    assert text.sample.messages[0].parts == (
        Text("Context: It is grass.\nWhich one?\nA. red\nB. green\nC. blue" + DIRECT),
    )
    assert picture.sample.messages[0].parts == (
        Image(folder / "images" / "test" / "5" / "image.png"),
        Text("Which one?\nA. red\nB. green\nC. blue" + DIRECT),
    )
    assert (text.answer, picture.answer, both.answer) == ("B", "A", "C")


def test_letters_that_are_none_or_no_option_are_told_apart(folder):
    result = score(folder, {"4": "B", "5": "E", "7": "blue", "9": "The answer is X."})
    assert [row.score.parsed for row in result.answered] == ["B", "E: no option", "FAILED", "X: no option"]
    found = result.metrics
    assert (found["total"], found["correct"], found["acc"]) == (4, 1, 25.0)
    assert (found["parse_failed"], found["pred_idx_minus1"]) == (1, 3)


def test_a_problem_without_an_answer_is_wrong_but_not_one_with_a_picture(folder):
    """LLaVA's scorer knows a picture by the prompt in the answers, and there is none."""
    result = score(folder, {"4": "B", "5": "A"})
    found = result.metrics
    assert (found["total"], found["correct"], found["parse_failed"], found["pred_idx_minus1"]) == (4, 2, 2, 2)
    assert (found["n_img"], found["img_correct"], found["img_acc_pct"]) == (1, 1, 100.0)
    assert result.problems.counts == {MISSING: 2}
    assert not result.summary()["complete"]


def test_an_answer_without_a_word_is_one_about_a_picture(folder):
    found = score(folder, {"4": "B", "5": "A", "7": "", "9": "A"}).metrics
    assert (found["n_img"], found["img_acc_pct"], found["parse_failed"]) == (2, 50.0, 1)


def test_numbers_by_subject_context_and_grade_stand_beside(folder):
    found = score(folder, {"4": "B", "5": "A", "7": "A", "9": "B"}).metrics
    assert found["categories"] == {
        "acc_natural": 50.0,
        "acc_social": 100.0,
        "acc_language": 0.0,
        "acc_has_text": 50.0,
        "acc_has_image": 50.0,
        "acc_no_context": 0.0,
        "acc_grade_1_6": 50.0,
        "acc_grade_7_12": 50.0,
    }


def test_some_scores_alone_leave_categories_out_and_divide_by_nothing():
    assert report([]) == {}
    found = report([Score(1.0, "A", {"picture": "no", "subject": "natural science"})])
    assert "img_acc_pct" not in found
    assert report([Score(1.0, "A", {"picture": "no"})]).keys() == {
        "total", "correct", "acc", "parse_failed", "pred_idx_minus1",
    }  # fmt: skip


def test_bad_problems_and_answers_are_named_and_counted(folder):
    known = json.loads((folder / "problems.json").read_text())
    known["7"]["answer"] = 3
    del known["9"]["choices"]
    known["11"] = None
    (folder / "problems.json").write_text(json.dumps(known))
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["4", "5", "7", "9", "11", "99"]}))
    path = folder / "answers.jsonl"
    lines = ['{"question_id": "4", "text": "B"}', '{"question_id": "4", "text": "A"}', '{"text": "B"}']
    lines += ["not json", '{"question_id": "5"}', '{"question_id": "6", "text": "A"}']
    path.write_text("\n".join(lines))
    result = score_answers(TASK, path, folder / "out", data=folder)
    assert result.problems.counts == {
        "questions of the split that are no problem": 1,
        "questions without choices or answer": 3,
        DOUBLE: 1,
        "answers without an id": 1,
        "unreadable rows": 1,
        "unreadable answers": 1,
        UNKNOWN: 1,
        MISSING: 1,
    }
    assert result.metrics["correct"] == 1


def test_a_problem_that_llavas_file_leaves_out_is_named(folder):
    turns = [{"from": "human", "value": "<image>\nSay it."}]
    row = {"id": "4", "conversations": turns, "image": "4/image.png"}
    (folder / "llava_test_CQM-A.json").write_text(json.dumps([row]))
    problems = Problems()
    first = questions(folder, problems)[0]
    assert first.sample.messages[0].parts == (
        Image(folder / "images" / "test" / "4" / "image.png"), Text("Say it." + DIRECT),
    )  # fmt: skip
    assert problems.counts == {"questions that LLaVA's file does not ask": 3}


def test_a_folder_without_problems_is_an_error_that_says_where_they_are_from(tmp_path):
    with pytest.raises(DataError, match=r"problems\.json.*github\.com/lupantech/ScienceQA"):
        questions(tmp_path)


def test_the_hubs_rows_are_read_with_their_pictures(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [
        {**problem(1, hint="It is grass.", subject="natural science", grade="grade3"), "image": None},
        {
            **problem(0, hint="", subject="social science", grade="grade8"),
            "image": {"bytes": b"x", "path": "a"},
        },
    ]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "test-00000-of-00001.parquet")
    first, second = questions(tmp_path)
    assert (first.sample.id, first.answer) == ("test-0", "B")
    assert first.sample.messages[0].parts[0].text.startswith("Context: It is grass.\n")
    assert second.sample.messages[0].parts[0] == Image(b"x")
    (tmp_path / "data" / "test-00000-of-00001.parquet").rename(
        tmp_path / "data" / "test-00000-of-00002.parquet"
    )
    problems = Problems()
    assert len(questions(tmp_path, problems)) == 2
    assert problems.counts == {"parts of files that are missing": 1}


@given(st.text())
def test_a_reply_is_right_only_by_its_letter(reply):
    """Whatever a reply holds it counts, and what is not failed is one letter."""
    benchmark = TASK.open(Path("nowhere"), Problems())
    question = type(
        "Asked", (), {"meta": {"choices": "4"}, "answer": "B", "sample": type("S", (), {"id": "1"})}
    )
    found = benchmark.score(question, reply)
    assert found.parsed == "FAILED" or found.parsed[0].isupper()
    assert (found.value == 1.0) == (found.parsed == "B")
