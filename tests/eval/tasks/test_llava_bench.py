"""LLaVA-Bench is summed up as officially, from official reviews or from those of a judge."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.eval.test_judge import Endpoint, completion, judge
from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Text
from tinymodal.eval.benchmark import Problems, Score
from tinymodal.eval.judge import UNGRADED, UNREAD
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks import llava_bench
from tinymodal.eval.tasks.llava_bench import TASK

DATA = Path(__file__).parents[4] / "shared" / "data" / "eval"
official = pytest.mark.skipif(
    not (DATA / "llava_bench").is_dir(), reason="needs ../shared/data/eval/llava_bench"
)
QUESTIONS = [
    {"question_id": 0, "image": "001.jpg", "text": "What is it?", "category": "conv"},
    {"question_id": 1, "image": "001.jpg", "text": "Describe it.", "category": "detail"},
    {"question_id": 7, "image": "002.jpg", "text": "Why?", "category": "complex"},
]
MINUS_ONE = "reviews without two numbers, which count as -1"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "llava-bench-in-the-wild"
    folder.mkdir()
    write(folder / "questions.jsonl", QUESTIONS)
    context = [
        {"id": "001", "image": "001.jpg", "caption": "A cat."},
        {"image": "002.jpg", "caption": "Rain."},
    ]
    write(folder / "context.jsonl", context)
    write(folder / "answers_gpt4.jsonl", [{"question_id": i, "text": f"gpt {i}"} for i in (0, 1, 7)])
    return folder


def review(i, content, **more):
    return {"id": 9, "question_id": i, "category": "llava_bench_conv", "content": content, **more}


def scored(folder, rows, **options):
    path = write(folder / "given.jsonl", rows)
    return score_answers(TASK, path, folder / "out", data=folder, **options)


@official
def test_official_reviews_give_the_official_numbers(tmp_path):
    expected = json.loads((DATA / "llava_bench" / "expected.json").read_text())
    file = DATA / "llava_bench" / "reviews" / "llava-v1.5-13b-eval1.jsonl"
    result = score_answers(TASK, file, tmp_path, data=DATA)
    assert result.metrics == expected[file.name]
    assert not result.problems
    assert len(result.answered) == 60
    assert result.interval.low < 72.8 < result.interval.high


@official
def test_a_judge_that_repeats_the_official_reviews_gives_the_official_numbers(tmp_path):
    """Prompts name each answer, so that the endpoint can look its review up."""
    place = DATA / "llava_bench"
    answers = [json.loads(line) for line in (place / "llava-v1.5-13b.answers.jsonl").open()]
    reviews = [json.loads(line) for line in (place / "reviews" / "llava-v1.5-13b-eval1.jsonl").open()]
    content = {a["prompt"] + a["text"]: r["content"] for a, r in zip(answers, reviews, strict=True)}

    def answer(body, number):
        user = body["messages"][1]["content"]
        words = user.split("[Question]\n")[1].split("\n\n[Assistant 1]")[0]
        text = user.split("[Assistant 2]\n")[1].split("\n\n[End of Assistant 2]")[0]
        return completion(content[words + text])

    with Endpoint(answer) as endpoint:
        one = judge(endpoint.url, tmp_path)
        file = place / "llava-v1.5-13b.answers.jsonl"
        result = score_answers(TASK, file, tmp_path, data=DATA, judge=one)
    assert result.metrics == json.loads((place / "expected.json").read_text())["llava-v1.5-13b-eval1.jsonl"]
    assert not result.problems
    assert result.summary()["protocol"]["judge"]["wording"] == "that of rule.json"


def test_a_review_without_two_numbers_counts_minus_one_for_both_and_is_named(folder):
    rows = [review(0, "8 6\nGood."), review(1, "Both are good.\n9 9"), review(7, "9 9", tuple=[-1, -1])]
    result = scored(folder, rows)
    # (8 - 1 - 1) / 3 and (6 - 1 - 1) / 3; 1.333 / 2.
    assert result.metrics == {
        "all": [66.6, 20.0, 13.3],
        "llava_bench_complex": [100.0, -10.0, -10.0],
        "llava_bench_conv": [75.0, 80.0, 60.0],
        "llava_bench_detail": [100.0, -10.0, -10.0],
    }
    assert result.problems.named == {MINUS_ONE: ["given.jsonl: line 2", "given.jsonl: line 3"]}
    assert [row.score.value for row in result.answered] == [0.6, 0.0, 0.0]


@pytest.mark.parametrize(
    ("content", "grades"),
    [
        ("8 6\nwords", "8.0 6.0"),
        ("8,6.5", "8.0 6.5"),
        ("8 6\r\nwords", "8.0 6.0"),
        ("\t8 6", "8.0 6.0"),
        ("8, 6\n", None),
        ("8 6 ", None),
        ("\n8 6", None),
        ("8  6", None),
        ("8 6 7", None),
        ("8/10 6/10", None),
        ("Assistant 1: 8", None),
        ("nan 6", None),
        ("", None),
    ],
)
def test_the_first_line_is_two_numbers_with_one_space_or_comma_between(folder, content, grades):
    """The strictness is the official code's: a comma and a space are two separators."""
    path = write(folder / "one.jsonl", [review(0, content)])
    problems = Problems()
    (one,) = llava_bench.answers(path, problems)
    assert one.verdicts == (grades or "-1.0 -1.0",)
    assert bool(problems) == (grades is None)
    if grades is None:
        with pytest.raises(ValueError, match="expected two grades"):
            llava_bench.read(None, "", content)


def test_what_the_official_code_made_of_a_review_goes_before_its_words(folder):
    result = scored(folder, [review(0, "1 1", tuple=[8, 4])])
    assert result.metrics["all"] == [50.0, 80.0, 40.0]


def test_a_question_that_is_reviewed_twice_counts_twice_and_is_named(folder):
    result = scored(folder, [review(0, "8 8"), review(0, "8 4"), review(1, "10 10"), review(7, "10 10")])
    assert result.metrics["llava_bench_conv"] == [75.0, 80.0, 60.0]
    assert result.metrics["all"] == [88.9, 90.0, 80.0]
    assert result.problems.named == {
        "questions reviewed more than once": ["given.jsonl: line 2: '0', as given.jsonl: line 1"]
    }


def test_missing_unknown_and_unreadable_reviews_are_named(folder):
    rows = [review(0, "8 8"), review(99, "8 8"), {"id": 1, "content": "8 8"}, {"question_id": 7}]
    result = scored(folder, rows)
    assert result.metrics == {"all": [100.0, 80.0, 80.0], "llava_bench_conv": [100.0, 80.0, 80.0]}
    assert result.problems.counts == {
        "answers to no question": 1,
        "answers without an id": 1,
        "unreadable answers": 1,
        "questions without an answer": 2,
    }


def test_means_are_rounded_before_they_are_divided():
    """1.833 / 5.667 is 32.345 %, and without rounding it would be 32.353 %."""
    pairs = [(2.5, 1.0), (8.5, 2.5), (6.0, 2.0)]
    scores = [Score(0, f"{a} {b}", {"category": "llava_bench_conv"}) for a, b in pairs]
    assert llava_bench.report(scores)["all"] == [32.3, 56.7, 18.3]


@given(st.lists(st.tuples(*[st.sampled_from([x / 2 for x in range(2, 21)])] * 2), min_size=1, max_size=40))
def test_numbers_are_those_of_the_official_formula(pairs):
    scores = [Score(0, f"{a} {b}", {"category": "llava_bench_conv"}) for a, b in pairs]
    stats = [round(x, 3) for x in np.asarray(pairs).mean(0).tolist()]
    expected = [round(stats[1] / stats[0] * 100, 1), round(stats[0] * 10, 1), round(stats[1] * 10, 1)]
    assert llava_bench.report(scores) == {"all": expected, "llava_bench_conv": expected}


def test_grades_of_nothing_are_left_out_of_the_report():
    assert llava_bench.report([Score(0, "0 8", {"category": "llava_bench_conv"}), Score(0)]) == {}


def test_answers_without_a_judge_have_no_score(folder):
    result = scored(folder, [{"question_id": i, "text": "hello"} for i in (0, 1, 7)])
    assert result.metrics == {}
    assert result.interval is None
    assert result.problems.counts == {UNGRADED: 3}


def test_questions_are_asked_as_llava_asks_them(folder):
    first, *_ = TASK.open(folder, Problems()).load()
    assert first.sample.id == "0"
    assert first.sample.messages[0].parts == (Image(folder / "images" / "001.jpg"), Text("What is it?"))
    assert first.answer == "gpt 0"
    assert first.meta == {"category": "llava_bench_conv"}


def test_the_judge_reads_the_official_sections(folder):
    (folder / "rule.json").write_text(json.dumps({"llava_bench_conv": {"role": "Bot", "prompt": "Grade!"}}))
    benchmark = TASK.open(folder, Problems())
    first, second, _ = benchmark.load()
    system, user = benchmark.judge.prompt(first, "mine")
    assert system["role"] == "system"
    # Each letter of the description on a line: the official code joins a text as if it were a list.
    assert user["content"] == (
        "[Context]\nA\n \nc\na\nt\n.\n\n[Question]\nWhat is it?\n\n[Bot 1]\ngpt 0\n\n[End of Bot 1]\n\n"
        "[Bot 2]\nmine\n\n[End of Bot 2]\n\n[System]\nGrade!\n\n"
    )
    with pytest.raises(ValueError, match=r"rule\.json holds no role and prompt for llava_bench_detail"):
        benchmark.judge.prompt(second, "mine")
    judging = benchmark.judge
    assert (judging.temperature, judging.max_tokens, judging.model) == (0.2, 1024, "gpt-4-0314")


def test_without_rule_json_the_instruction_is_our_own(folder):
    benchmark = TASK.open(folder, Problems())
    first, *_ = benchmark.load()
    user = benchmark.judge.prompt(first, "mine")[1]["content"]
    assert "[Assistant 2]\nmine\n\n[End of Assistant 2]" in user
    assert user.endswith(f"[System]\n{llava_bench.INSTRUCTION}\n\n")
    assert benchmark.judge.wording.startswith("ours")


@pytest.mark.parametrize(
    ("gone", "named"), [("context.jsonl", "descriptions"), ("answers_gpt4.jsonl", "GPT-4's")]
)
def test_what_the_judge_needs_is_named_where_it_is_missing_and_reviews_need_none_of_it(folder, gone, named):
    (folder / gone).unlink()
    assert not scored(folder, [review(i, "8 4") for i in (0, 1, 7)]).problems
    with Endpoint(lambda *_: completion("8 4")) as endpoint:
        one = judge(endpoint.url, folder / "out")
        result = scored(folder, [{"question_id": i, "text": "hello"} for i in (0, 1, 7)], judge=one)
        assert not endpoint.bodies
    assert result.problems.counts == {UNGRADED: 3}
    assert f"0: nothing in {gone} about it; expected {named}" in result.problems.named[UNGRADED][0]


def test_a_judge_that_does_not_keep_to_the_form_is_asked_again_and_then_left_out(folder):
    def answer(body, number):
        if "Why?" in body["messages"][1]["content"]:
            return completion("Both are fine.")
        return completion("8 4\nbecause" if body["temperature"] > 0.2 else "Grades: 8 and 4")

    with Endpoint(answer) as endpoint:
        one = judge(endpoint.url, folder / "out")
        result = scored(folder, [{"question_id": i, "text": "hello"} for i in (0, 1, 7)], judge=one)
        assert len(endpoint.bodies) == 2 + 2 + 5
    assert result.metrics["all"] == [50.0, 80.0, 40.0]
    assert result.problems.counts == {UNREAD: 1}


def test_questions_that_lack_something_are_named(folder):
    bad = [{key: value for key, value in QUESTIONS[0].items() if key != gone} for gone in QUESTIONS[0]]
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*bad, *QUESTIONS]) + "{oops\n"
    )
    problems = Problems()
    assert [q.sample.id for q in TASK.open(folder, problems).load()] == ["0", "1", "7"]
    assert problems.counts == {"questions without id, words, category or picture": 4, "unreadable rows": 1}


def test_a_rule_json_of_something_else_is_refused(folder):
    (folder / "rule.json").write_text("[]")
    benchmark = TASK.open(folder, Problems())
    first, *_ = benchmark.load()
    with pytest.raises(DataError, match=r"rule\.json: expected an object"):
        benchmark.judge.prompt(first, "mine")


def test_the_hubs_parquet_holds_questions_descriptions_and_answers(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    row = {
        "question_id": 3,
        "question": "What is it?",
        "image": {"bytes": b"jpg", "path": "001.jpg"},
        "caption": "A cat.",
        "gpt_answer": "It is a cat.",
        "category": "conv",
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train-00000-of-00001.parquet")
    problems = Problems()
    benchmark = TASK.open(tmp_path, problems)
    (found,) = benchmark.load()
    assert not problems
    assert (found.sample.id, found.answer) == ("3", "It is a cat.")
    assert found.sample.messages[0].parts[0] == Image(b"jpg")
    assert "[Context]\nA\n \nc\na\nt\n." in benchmark.judge.prompt(found, "")[1]["content"]
