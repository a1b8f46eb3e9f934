"""MM-Vet is summed up as officially, from official grades or from those of a judge."""

import gzip
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
from tinymodal.eval.tasks import mmvet
from tinymodal.eval.tasks.mmvet import TASK

DATA = Path(__file__).parents[4] / "shared" / "data" / "eval"
official = pytest.mark.skipif(not (DATA / "mmvet").is_dir(), reason="needs ../shared/data/eval/mmvet")
QUESTIONS = {
    "v1_0": {"imagename": "a.png", "question": "x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]},
    "v1_1": {"imagename": "a.png", "question": "y?", "answer": "1<OR>one", "capability": ["math", "ocr"]},
    "v1_2": {"imagename": "b.jpg", "question": "who?", "answer": "a dog", "capability": ["rec"]},
    "v1_10": {"imagename": "c.jpg", "question": "why?", "answer": "no", "capability": ["rec", "ocr"]},
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "mm-vet"
    folder.mkdir()
    (folder / "mm-vet.json").write_text(json.dumps(QUESTIONS))
    (folder / "bard_set.json").write_text(json.dumps(["v1_0", "v1_2"]))
    return folder


def graded(*scores, content=None):
    told = [str(score) for score in scores] if content is None else content
    return {"model": ["gpt-4"] * len(scores), "content": told, "score": list(scores)}


def scored(folder, answers, **options):
    path = folder / "given.json"
    path.write_text(json.dumps(answers))
    return score_answers(TASK, path, folder / "out", data=folder, **options)


@official
def test_official_grades_give_the_official_numbers(tmp_path):
    expected = json.loads((DATA / "mmvet" / "expected.json").read_text())
    file = DATA / "mmvet" / "llava-v1.5-13b_gpt-4-grade-1runs.json.gz"
    result = score_answers(TASK, file, tmp_path, data=DATA)
    whole, bard = expected.values()
    assert result.metrics == {**whole, "bardset": bard}
    assert not result.problems
    assert len(result.answered) == 218
    assert result.interval.low < 36.1 < result.interval.high


@official
@pytest.mark.parametrize("name", ["llava-v1.5-13b.answers.jsonl", "llava-v1.5-13b.predictions.json"])
def test_answers_of_llava_are_joined_and_graded(tmp_path, name):
    with Endpoint(lambda *_: completion("0.5")) as endpoint:
        one = judge(endpoint.url, tmp_path / "out")
        result = score_answers(TASK, DATA / "mmvet" / name, tmp_path / "out", data=DATA, judge=one)
        assert len(endpoint.bodies) == 218
    assert result.metrics["cap"]["total"] == 50.0
    assert not result.problems
    row = "What is d in the last equation? | 1.25 <OR> =1.25 <OR> 5/4 | In the last equation, d is "
    assert any(row in asked for asked in endpoint.asked)


def test_runs_are_averaged_and_their_spread_is_told(folder):
    grades = {
        "v1_0": graded(1.0, 0.5),
        "v1_1": graded(0.0, 0.0),
        "v1_2": graded(0.3, 0.4),
        "v1_10": graded(1.0, 1.0),
    }
    result = scored(folder, grades)
    assert not result.problems
    # Totals 2.3 / 4 and 1.9 / 4; ocr 2.0 / 3 and 1.5 / 3; rec 1.3 / 2 and 1.4 / 2; math 0.5 and 0.25.
    both = {"total": 52.5, "std": 5.0, "runs": "[57.5, 47.5]"}
    assert result.metrics["cap"] == {"ocr": 58.3, "math": 37.5, "rec": 67.5, **both}
    assert result.metrics["cap_int"] == {"math+ocr": 37.5, "rec": 35.0, "ocr+rec": 100.0, **both}
    bard = {"total": 55.0, "std": 10.0, "runs": "[65.0, 45.0]"}
    assert result.metrics["bardset"]["cap"] == {"ocr": 75.0, "math": 75.0, "rec": 35.0, **bard}
    assert result.answered[0].score == Score(0.75, "1.0; 0.5", {"capability": "math+ocr", "bard_set": "yes"})


def test_without_bards_set_there_are_no_numbers_of_it(folder):
    (folder / "bard_set.json").unlink()
    assert scored(folder, {"v1_2": graded(0.3)}).metrics.keys() == {"cap", "cap_int"}


def test_a_verdict_that_the_official_scorer_could_not_read_counts_as_it_stands_and_is_named(folder):
    grades = {name: graded(1.0) for name in QUESTIONS} | {"v1_2": graded(0.0, content=["It is good"])}
    result = scored(folder, grades)
    assert result.metrics["cap"]["total"] == 75.0
    kind = "answers whose verdicts cannot be read, graded as the file has it"
    assert result.problems.named == {kind: ["given.json: v1_2"]}


def test_grades_that_are_none_are_named_and_left_out(folder):
    grades = {
        "v1_0": graded(0.5),
        "v1_1": graded(1.5),
        "v1_2": {"score": "high"},
        "v1_10": {"score": ["0.5"]},
    }
    result = scored(folder, grades)
    assert result.metrics["cap"]["total"] == 50.0
    counts = {"unreadable answers": 2, UNREAD: 1, "questions without an answer": 2}
    assert result.problems.counts == counts
    assert "given.json: v1_1: expected a grade from 0.0 to 1.0, found '1.5'" in result.problems.named[UNREAD]


def test_a_question_that_lacks_a_run_is_named_and_missing_from_that_run_only(folder):
    grades = {name: graded(1.0, 0.5) for name in QUESTIONS} | {"v1_2": graded(0.0)}
    result = scored(folder, grades)
    assert result.metrics["cap"]["runs"] == "[75.0, 50.0]"
    assert result.metrics["cap_int"]["rec"] == 0.0
    assert result.problems.counts == {"answers graded in fewer runs than others": 1}


def test_answers_without_a_judge_have_no_score(folder, capsys):
    result = scored(folder, {name: "hello" for name in QUESTIONS})
    assert result.metrics == {}
    assert result.interval is None
    assert result.problems.counts == {UNGRADED: 4}
    summary = json.loads((folder / "out" / "results.json").read_text())["mmvet"]
    assert (summary["metrics"], summary["n"], summary["complete"]) == ({}, 0, False)
    assert "a language model has to grade them" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["llava", "ours", "packed"])
def test_every_form_of_answers_is_read(folder, form):
    path = folder / {"llava": "a.jsonl", "ours": "mmvet.replies.jsonl", "packed": "a.jsonl.gz"}[form]
    rows = [
        {"id": name, "reply": f"r{name}"}
        if form == "ours"
        else {"question_id": int(name[3:]), "text": f"r{name}"}
        for name in QUESTIONS
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if form == "packed" else text.encode())
    problems = Problems()
    assert {one.id: one.text for one in mmvet.answers(path, problems)} == {
        name: f"r{name}" for name in QUESTIONS
    }
    assert not problems


def test_questions_are_asked_as_llava_asks_them(folder):
    problems = Problems()
    first, *_ = TASK.open(folder, problems).load()
    assert first.sample.id == "v1_0"
    assert first.sample.messages[0].parts == (Image(folder / "images" / "a.png"), Text("x?"))
    assert first.answer == "-1<AND>-5"


def test_the_judge_is_shown_a_table_to_complete(folder):
    benchmark = TASK.open(folder, Problems())
    first, *_ = benchmark.load()
    (message,) = benchmark.judge.prompt(first, "x = -1")
    rows = message["content"].split("\n")
    assert rows[-1] == "x? | -1 <AND> -5 | x = -1 | "
    start = rows.index("Question | Ground truth | Prediction | Correctness")
    examples = [row.split(" | ") for row in rows[start + 2 : -2]]
    assert [float(row[-1]) for row in examples] == [0.0, 0.5, 0.5, 0.5, 1.0, 0.4, 1.0]
    assert all(len(row) == 4 for row in examples)
    assert "<AND>" in rows[0]
    assert "<OR>" in rows[0]
    assert (benchmark.judge.max_tokens, benchmark.judge.temperature) == (3, 0.0)


def test_the_words_of_the_official_scorer_are_used_where_it_lies_in_the_folder(folder):
    source = 'import openai\n\nother = "no"\nprompt = """Official\nwords\n"""\nraise SystemExit\n'
    (folder / "mm-vet_evaluator.py").write_text(source)
    benchmark = TASK.open(folder, Problems())
    first, *_ = benchmark.load()
    (message,) = benchmark.judge.prompt(first, "r")
    assert message["content"] == "Official\nwords\n\nx? | -1 <AND> -5 | r | "
    assert benchmark.judge.wording == "that of mm-vet_evaluator.py"
    for broken in ("prompt = 3\n", "def ("):
        (folder / "mm-vet_evaluator.py").write_text(broken)
        with pytest.raises(DataError, match="expected the official scorer"):
            TASK.open(folder, Problems()).judge.prompt(first, "r")


def test_questions_that_lack_something_are_named(folder):
    bad = {
        "v1_3": {**QUESTIONS["v1_2"], "answer": ""},
        "v1_4": {**QUESTIONS["v1_2"], "capability": []},
        "v1_5": {**QUESTIONS["v1_2"], "imagename": None},
        "v1_6": {**QUESTIONS["v1_2"], "question": None},
        "v1_7": "what?",
        "": QUESTIONS["v1_2"],
    }
    (folder / "mm-vet.json").write_text(json.dumps(QUESTIONS | bad))
    (folder / "bard_set.json").write_text(json.dumps(["v1_0", "v1_99"]))
    problems = Problems()
    assert [q.sample.id for q in TASK.open(folder, problems).load()] == list(QUESTIONS)
    assert problems.counts == {
        "questions without id, words, answer, capability or picture": 5,
        "unreadable rows": 1,
        "ids of Bard's set that no question has": 1,
    }


@pytest.mark.parametrize(
    ("name", "content"), [("mm-vet.json", "[]"), ("mm-vet.json", "{"), ("bard_set.json", "7")]
)
def test_a_file_of_something_else_is_refused(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=name):
        list(TASK.open(folder, Problems()).load())


def test_missing_questions_say_where_they_are_from(tmp_path):
    with pytest.raises(DataError, match=r"holds no mm-vet\.json.*it is from https://github\.com/yuweihao"):
        list(TASK.open(tmp_path, Problems()).load())


def test_the_hubs_parquet_holds_the_same_questions(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [
        {
            "question_id": name,
            "image": {"bytes": b"png", "path": "a.png"},
            "question": row["question"],
            "answer": row["answer"],
            "capability": ",".join(row["capability"]),
        }
        for name, row in QUESTIONS.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test-00000-of-00001.parquet")
    problems = Problems()
    found = list(TASK.open(tmp_path, problems).load())
    assert [q.sample.id for q in found] == list(QUESTIONS)
    assert [q.meta["capability"] for q in found] == ["math+ocr", "math+ocr", "rec", "ocr+rec"]
    assert found[0].sample.messages[0].parts[0] == Image(b"png")
    assert not problems


@given(verdict=st.text(max_size=20) | st.floats().map(str) | st.floats(0, 1).map(lambda x: f" {x}\nbecause"))
def test_a_verdict_is_read_as_a_grade_from_0_to_1_or_refused(verdict):
    try:
        score = mmvet.read(None, "", verdict)
    except ValueError as error:
        assert "expected a grade" in str(error)  # noqa: PT017
    else:
        assert 0 <= score.value == float(verdict.split(" ")[0]) <= 1


@pytest.mark.parametrize(
    ("verdict", "value"), [("0.5", 0.5), ("1.0\n", 1.0), ("0.3 because 0.9", 0.3), ("1", 1.0)]
)
def test_the_number_before_the_first_space_counts(verdict, value):
    assert mmvet.read(None, "", verdict).value == value


@pytest.mark.parametrize(
    ("tenths", "total"),
    [
        ([6, 6, 0, 4, 8, 7, 6, 4], 51.3),  # a sum without error of rounding would make it 51.2
        ([1, 3, 1, 9, 10, 3, 4, 4], 43.7),  # numpy's sum 43.8
        ([10] * 101 + [1] + [0] * 98, 50.6),  # 50.55, and Python's rounding makes it 50.5
    ],
)
def test_the_last_digit_is_that_of_the_official_sum_and_rounding(tenths, total):
    """Grades are added one after another, and numpy rounds."""
    scores = [Score(tenth / 10, repr(tenth / 10), {"capability": "rec"}) for tenth in tenths]
    assert mmvet.report(scores)["cap"]["total"] == total


@given(st.lists(st.integers(0, 10), min_size=1, max_size=60))
def test_the_total_is_that_of_the_official_formula(tenths):
    total = 0.0
    for tenth in tenths:
        total += tenth / 10
    scores = [Score(tenth / 10, repr(tenth / 10), {"capability": "rec"}) for tenth in tenths]
    expected = round((np.array([total]) / len(tenths) * 100).mean(), 1)
    assert mmvet.report(scores)["cap"] == {
        "rec": expected,
        "total": expected,
        "std": 0.0,
        "runs": f"[{expected}]",
    }
