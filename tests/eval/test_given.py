"""Answers that were made elsewhere are read in every form, joined by id, and what is wrong is counted."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.core.types import Message, Sample, Text
from tinymodal.eval.benchmark import Benchmark, Given, Judging, Problems, Question, Score
from tinymodal.eval.given import DOUBLE, MISSING, NULL, UNKNOWN, UNREADABLE, join, plain_answers
from tinymodal.eval.judge import UNGRADED
from tinymodal.eval.rules.answers import exact
from tinymodal.eval.score import score_answers


def question(name, answer="yes"):
    return Question(Sample((Message("user", (Text(f"{name}?"),)),), name), answer)


def asked(names="ab", **more):
    return Benchmark(
        name="asked", load=lambda: [question(n) for n in names], score=exact, source="nowhere", **more
    )


def put(folder, value, name="answers.json"):
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def read(path):
    problems = Problems()
    return {one.id: one.text for one in plain_answers(path, problems)}, problems


@pytest.mark.parametrize(
    "value",
    [
        [{"question_id": "a", "answer": "x"}, {"question_id": "b", "answer": ""}],
        [{"questionId": "a", "prediction": "x"}, {"questionId": "b", "prediction": ""}],
        [{"image": "a", "answer": "x"}, {"image": "b", "answer": ""}],
        [{"id": "a", "reply": "x", "answer": "gold"}, {"id": "b", "reply": "", "answer": "gold"}],
        [{"index": "a", "prediction": "x", "answer": "A"}, {"index": "b", "prediction": None, "answer": "A"}],
        {"a": "x", "b": ""},
    ],
    ids=["vqa", "gqa", "vizwiz", "ours", "a table with the right answer", "an object"],
)
def test_every_form_gives_the_same_answers(tmp_path, value):
    assert read(put(tmp_path, value))[0] == {"a": "x", "b": ""}
    packed = tmp_path / "answers.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(value).encode()))
    assert read(packed)[0] == {"a": "x", "b": ""}
    if isinstance(value, list):
        lines = put(tmp_path, "\n".join(map(json.dumps, value)), "answers.jsonl")
        assert read(lines)[0] == {"a": "x", "b": ""}


def test_numbers_as_ids_are_those_of_the_questions(tmp_path):
    assert read(put(tmp_path, [{"question_id": 42, "answer": 7}]))[0] == {"42": "7"}


def test_rows_without_id_or_answer_are_named(tmp_path):
    found, problems = read(put(tmp_path, [{"text": "x"}, {"id": "a"}, 3, {"id": "b", "text": "y"}]))
    assert found == {"b": "y"}
    assert {kind: told["count"] for kind, told in problems.told().items()} == {
        "answers without an id": 1,
        "unreadable answers": 1,
        "unreadable rows": 1,
    }


def test_the_first_of_two_answers_counts_and_all_that_is_amiss_is_told(tmp_path):
    problems = Problems()
    path = put(tmp_path, [{"id": n, "text": t} for n, t in (("a", "1"), ("a", "2"), ("z", "3"))])
    found = join(asked("ab"), [question("a"), question("b")], path, problems)
    assert found == {"a": Given("a", "1", "answers.json: row 1")}
    assert {kind: told["count"] for kind, told in problems.told().items()} == {
        DOUBLE: 1,
        UNKNOWN: 1,
        MISSING: 1,
    }
    assert "'a', as answers.json: row 1" in problems.told()[DOUBLE]["named"][0]


def test_answers_to_another_benchmark_are_refused_with_an_example(tmp_path):
    with pytest.raises(
        DataError, match=r"answers none of the 2 questions of asked; expected ids such as 'a'"
    ):
        join(asked(), [question("a"), question("b")], put(tmp_path, {"z": "1"}), Problems())
    with pytest.raises(DataError, match="no such file"):
        join(asked(), [question("a")], tmp_path / "none.json", Problems())


@drawn(st.dictionaries(st.text(min_size=1), st.text(), min_size=1))
def test_any_text_comes_through_unchanged(tmp_path_factory, answers):
    folder = tmp_path_factory.mktemp("any")
    if any(name in ("question_id", "questionId", "id", "index", "image") for name in answers):
        return  # an object with such a key is a row
    assert read(put(folder, answers))[0] == answers


def test_a_missing_answer_is_left_out_or_wrong_as_the_official_scorer_has_it_and_never_complete(tmp_path):
    path = put(tmp_path, {"a": "yes"})
    for unanswered, n, mean in (("left out", 1, 1.0), ("wrong", 2, 0.5)):
        result = score_answers(asked(unanswered=unanswered), path, tmp_path / unanswered)
        told = result.summary()
        assert (told["n"], told["metrics"]["mean"], told["complete"]) == (n, mean, False)


def test_replies_of_a_model_are_not_overwritten_by_answers(tmp_path):
    row = {"id": "a", "prompt": "", "reply": "no", "stopped_by": "stop", "answer": "yes", "parsed": "no"}
    row |= {"score": 0.0, "meta": {}, "digest": "", "run": "0123456789abcdef/64"}
    (tmp_path / "asked.replies.jsonl").write_text(json.dumps(row) + "\n")
    path = put(tmp_path, {"a": "yes", "b": "yes"})
    with pytest.raises(DataError, match="holds replies of a model to asked, which would be lost"):
        score_answers(asked(), path, tmp_path)
    # What was scored from a file may be scored again, and our own rows are a file of answers.
    first = score_answers(asked("a"), tmp_path / "asked.replies.jsonl", tmp_path / "again")
    assert (first.metrics["mean"], first.answered[0].reply) == (0.0, "no")
    assert score_answers(asked(), path, tmp_path / "again").metrics["mean"] == 1.0


def test_without_a_judge_the_official_fallback_counts_where_there_is_one(tmp_path):
    def judging(fallback):
        return Judging(
            prompt=lambda q, reply: [] if reply == "yes" else [{"role": "user", "content": reply}],
            read=lambda q, reply, verdict: Score(float(verdict)),
            fallback=fallback,
        )

    path = put(tmp_path, {"a": "yes", "b": "well, yes"})
    for fallback, n, mean in ((True, 2, 0.5), (False, 1, 1.0)):
        result = score_answers(asked(judge=judging(fallback)), path, tmp_path / str(fallback))
        assert (len(result.answered), result.metrics["mean"]) == (n, mean)
        assert result.problems.told()[UNGRADED]["named"] == ["b"]


def test_a_judge_that_fails_leaves_the_official_fallback(tmp_path):
    class Failing:
        def grade_all(self, judging, asked, problems):
            return [None for _ in asked]

        def told(self, judging):
            return {}

        def bill(self):
            return ""

    for fallback, n in ((True, 2), (False, 1)):
        judging = Judging(
            prompt=lambda q, reply: [] if reply == "yes" else [{"role": "user", "content": reply}],
            read=lambda q, reply, verdict: Score(float(verdict)),
            fallback=fallback,
        )
        path = put(tmp_path, {"a": "yes", "b": "well, yes"})
        result = score_answers(asked(judge=judging), path, tmp_path / str(fallback), judge=Failing())
        assert len(result.answered) == n


def test_null_is_an_empty_answer_and_noted_and_what_is_no_text_is_none(tmp_path):
    rows = [
        {"id": "a", "text": None, "answer": "gold"},
        {"id": "b", "text": ["x"]},
        {"id": "c", "text": {"parsed": "x"}},
        {"id": "d", "text": True},
        {"id": "e", "text": ""},
        {"id": "f", "text": 7.5},
    ]
    found, problems = read(put(tmp_path, rows))
    assert found == {"a": "", "e": "", "f": "7.5"}
    assert {kind: told["count"] for kind, told in problems.told().items()} == {NULL: 1, UNREADABLE: 3}
    assert "expected text" in str(problems)


@pytest.mark.parametrize("key", ["results", "annotations", "outputs"])
def test_answers_inside_of_an_object_are_found(tmp_path, key):
    rows = [{"question_id": 1, "answer": "x"}]
    inside = {"info": {}, key: {"1": "x"} if key == "outputs" else rows}
    assert read(put(tmp_path, inside))[0] == {"1": "x"}


def test_a_list_that_is_called_jsonl_and_lines_without_an_ending_are_read(tmp_path):
    rows = [{"id": "a", "text": "x"}, {"id": "b", "text": "y"}]
    assert read(put(tmp_path, rows, "answers.jsonl"))[0] == {"a": "x", "b": "y"}
    lines = "\n".join(map(json.dumps, rows))
    for name in ("answers", "answers.txt"):
        assert read(put(tmp_path, lines, name))[0] == {"a": "x", "b": "y"}


def test_numbers_that_a_table_made_fractions_are_whole_ids(tmp_path):
    assert read(put(tmp_path, '[{"question_id": 262148000.0, "answer": "x"}]'))[0] == {"262148000": "x"}


def test_keys_that_an_object_repeats_are_noted(tmp_path):
    found, problems = read(put(tmp_path, '{"a": "Yes", "b": "No", "a": "No"}'))
    assert found == {"a": "No", "b": "No"}
    assert problems.told()["keys that an object repeats"]["named"] == ["answers.json: 'a'"]


def test_a_file_of_the_questions_is_refused(tmp_path):
    path = put(tmp_path, [{"question_id": n, "text": f"{n}?", "answer": "yes"} for n in "ab"])
    with pytest.raises(DataError, match="holds the questions of asked under 'text'"):
        join(asked(), [question(n) for n in "ab"], path, Problems())


def test_half_a_character_in_a_reply_costs_nothing_but_itself(tmp_path):
    path = put(tmp_path, '[{"id": "a", "text": "yes"}, {"id": "b", "text": "no \\ud83d"}]')
    assert score_answers(asked(), path, tmp_path / "out").metrics == {"mean": 0.5}
    rows = (tmp_path / "out" / "asked.replies.jsonl").read_text().splitlines()
    assert [json.loads(row)["reply"] for row in rows] == ["yes", "no ?"]
