"""MMBench: circular and vanilla accuracy as the official code has them, whatever form the files come in."""

import base64
import functools
import gzip
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image
from tinymodal.eval.benchmark import Problems
from tinymodal.eval.files import read_rows
from tinymodal.eval.rules.choices import DIRECTLY, DIRECTLY_CHINESE
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks import mmbench

DATA = Path(__file__).parents[4] / "shared" / "data" / "eval" / "mmbench"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: official answers and scores")
HEAD = (
    *("index", "question", "hint", "A", "B", "C", "D"),
    *("answer", "category", "image", "source", "l2-category", "comment", "split"),
)
PICTURE = base64.b64encode(b"a picture of more than sixty-four characters in base64, as all are").decode()
Q1 = ("What is it?", "", "dog", "cat", "bee", "nan", "B", "naming")
Q2 = ("Is it red?", "Look closely.", "yes", "no", "", "", "A", "colour")
LEVELS = {"naming": "coarse_perception", "colour": "logic_reasoning"}


def cells(index, row, image=PICTURE):
    return [str(index), *row, image, "", LEVELS[row[-1]], "", "dev"]


def turned(row, k):
    """Copy k as the official files have it: the last k options first."""
    question, hint, *options, answer, category = row
    options = [option for option in options if option not in ("", "nan")]
    right = "ABCD"[("ABCD".index(answer) + k) % len(options)]
    moved = options[len(options) - k :] + options[: len(options) - k]
    return (question, hint, *moved, *[""] * (4 - len(moved)), right, category)


def table(path, rows, head=HEAD):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join("\t".join(row) for row in [head, *rows]) + "\n", encoding="utf-8")
    return path.parent


CIRCULAR = [
    cells(1, Q1),
    cells(2, Q2),
    *(cells(1 + k * 1_000_000, turned(Q1, k), "1") for k in (1, 2)),
    cells(1_000_002, turned(Q2, 1), "2"),
]
RIGHT = {"1": "B", "1000001": "C", "2000001": "A", "2": "A", "1000002": "B"}


@pytest.fixture
def folder(tmp_path):
    return table(tmp_path / "mmbench" / "mmbench_dev_20230712.tsv", CIRCULAR)


@pytest.fixture
def once(tmp_path):
    """The file with each question once, as of the test set's first release."""
    return table(tmp_path / "mmbench" / "mmbench_dev_20230712.tsv", CIRCULAR[:2])


def replies(path, texts):
    path.write_text("".join(json.dumps({"id": n, "reply": text}) + "\n" for n, text in texts.items()))
    return path


def asked(task, folder):
    return {question.sample.id: question for question in task.open(folder, Problems()).load()}


@functools.cache
def official():
    return {row["index"]: row for _, row in read_rows(DATA / "llava-v1.5-13b.xlsx", Problems())}


@functools.cache
def asked_officially():
    problems = Problems()
    questions = {question.sample.id: question for question in mmbench.TASK.open(DATA, problems).load()}
    assert not problems
    return questions


@needs_data
@pytest.mark.parametrize("answers", ["llava-v1.5-13b.answers.jsonl.gz", "llava-v1.5-13b.xlsx"])
def test_scores_equal_the_official_ones(answers, tmp_path):
    expected = json.loads((DATA / "expected.json").read_text())["llava-v1.5-13b"]
    del expected["published_dev_circular"]  # a number of a paper, printed by no code
    # The table is read once for all tests: that takes a second.
    benchmark = replace(mmbench.TASK.open(DATA, Problems()), load=lambda: asked_officially().values())
    result = score_answers(benchmark, DATA / answers, tmp_path)
    assert not result.problems
    assert result.metrics == expected
    low, high = result.interval
    assert low < expected["circular_acc"] < high


@needs_data
def test_prompts_are_those_that_llava_asked():
    questions = asked_officially()
    num_same = 0
    for row in map(
        json.loads, gzip.decompress((DATA / "llava-v1.5-13b.answers.jsonl.gz").read_bytes()).splitlines()
    ):
        question = questions[str(row["question_id"])]
        text = question.sample.messages[0].parts[1].text
        # The shared table has no hints; LLaVA put them first.
        assert row["prompt"].endswith(text.removesuffix(DIRECTLY))
        num_same += row["prompt"] + DIRECTLY == text
    assert num_same == 4055


@needs_data
def test_turned_options_are_those_of_the_official_copies():
    num_same = 0
    for index, row in official().items():
        if index < 1_000_000:
            copies = mmbench._turned({key: str(value or "") for key, value in row.items()})
            for k, copy in enumerate(copies):
                theirs = official().get(index + k * 1_000_000)
                assert copy["index"] == str(index + k * 1_000_000)
                num_same += theirs is not None and [copy[x] or None for x in "ABCD"] == [
                    theirs[x] for x in "ABCD"
                ]
    # In 106 the official ones keep an option such as "all of these" in its place.
    assert num_same == len(official()) - 106


@needs_data
def test_a_submission_is_what_llava_handed_in(tmp_path):
    questions = list(asked_officially().values())[:200]
    texts = {str(index): row["prediction"] for index, row in official().items()}
    mmbench.submission(questions, texts, tmp_path / "out.xlsx")
    ours = [row for _, row in read_rows(tmp_path / "out.xlsx", Problems())]
    assert len(ours) == 200
    for row in ours:
        assert {key: row[key] for key in row if "category" not in key} == official()[row["index"]]


def test_a_question_is_right_if_all_its_rows_are(folder, tmp_path):
    answers = replies(tmp_path / "a.jsonl", RIGHT | {"1000001": "B"})
    result = score_answers(mmbench.TASK, answers, tmp_path / "out", data=folder.parent)
    assert not result.problems
    assert result.metrics == {
        "groups": 2,
        "circular_acc": 0.5,
        "l2-category": {"CP": 0.0, "LR": 1.0},
        "category": {"colour": 1.0, "naming": 0.0},
        "vanilla_acc_first_pass": 1.0,
        "vanilla": {"l2-category": {"CP": 1.0, "LR": 1.0}, "category": {"colour": 1.0, "naming": 1.0}},
        "n_rows": 5,
    }


def test_a_missing_answer_is_wrong_and_named(folder, tmp_path):
    texts = {name: text for name, text in RIGHT.items() if name != "2000001"}
    result = score_answers(
        mmbench.TASK, replies(tmp_path / "a.jsonl", texts), tmp_path / "out", data=folder.parent
    )
    assert result.metrics["circular_acc"] == 0.5
    assert result.problems.counts == {"questions without an answer": 1}


def test_a_table_with_the_reply_and_the_right_answer_is_never_misread(folder, tmp_path):
    questions = asked(mmbench.TASK, folder).values()
    mmbench.submission(questions, {"1": "B", "1000001": "C", "2000001": "A"}, tmp_path / "a.xlsx")
    result = score_answers(mmbench.TASK, tmp_path / "a.xlsx", tmp_path / "out", data=folder.parent)
    assert [row.reply for row in result.answered] == ["B", "C", "A", "", ""]
    assert result.metrics["circular_acc"] == 0.5
    # The table holds the questions too: it can be scored without any other file.
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "a.xlsx").rename(alone / "a.xlsx")
    again = score_answers(mmbench.TASK, alone / "a.xlsx", tmp_path / "o2", data=alone)
    assert again.metrics == result.metrics


def test_rows_come_question_by_question_and_halves_of_one_do_not_count(folder):
    benchmark = mmbench.TASK.open(folder, Problems())
    ids = [question.sample.id for question in benchmark.load()]
    assert ids == ["1", "1000001", "2000001", "2", "1000002"]
    first = [
        benchmark.score(question, RIGHT[question.sample.id])
        for question in itertools.islice(benchmark.load(), 4)
    ]
    metas = [question.meta for question in benchmark.load()]
    scores = [type(score)(score.value, score.parsed, meta) for score, meta in zip(first, metas, strict=False)]
    assert benchmark.report(scores)["groups"] == 1
    assert benchmark.report(scores)["vanilla_acc_first_pass"] == 1.0
    assert "circular_acc" not in benchmark.report(scores[:2])
    assert benchmark.report([]) == {"n_rows": 0}


def test_the_prompt_is_llavas_with_the_hint_first(folder):
    questions = asked(mmbench.TASK, folder)
    assert questions["1"].sample.messages[0].parts[1].text == "What is it?\nA. dog\nB. cat\nC. bee" + DIRECTLY
    assert (
        questions["2"].sample.messages[0].parts[1].text
        == "Look closely.\nIs it red?\nA. yes\nB. no" + DIRECTLY
    )


def test_copies_show_the_picture_of_the_row_they_name(folder):
    questions = asked(mmbench.TASK, folder)
    assert {q.sample.messages[0].parts[0] for q in questions.values()} == {Image(base64.b64decode(PICTURE))}


def test_a_table_without_pictures_names_the_files_they_would_be_in(tmp_path):
    row = ["7", *Q1[:7]]
    there = table(tmp_path / "mmbench" / "MMBench_DEV_EN.tsv", [row], HEAD[:8])
    assert asked(mmbench.TASK, there)["7"].sample.messages[0].parts[0] == Image(there / "images" / "7.jpg")


@pytest.mark.parametrize("name", ["mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv"])
def test_a_chinese_file_is_asked_in_chinese(tmp_path, name):
    there = table(tmp_path / "mmbench" / name, CIRCULAR)
    chinese = asked(mmbench.IN_CHINESE, there)
    assert chinese["1"].sample.messages[0].parts[1].text.endswith("C. bee" + DIRECTLY_CHINESE)
    for task in (mmbench.TASK, mmbench.CIRCULAR):
        with pytest.raises(DataError, match=rf"{task.name}: .*{name} is the Chinese table.*--on mmbench_cn"):
            asked(task, there)


@pytest.mark.parametrize("name", ["MMBench_V11.tsv", "MMBench_DEV_EN_V11.tsv"])
def test_the_english_table_is_taken_whatever_the_chinese_one_beside_it_is_called(tmp_path, name):
    table(tmp_path / "cn" / "mmbench_cn.tsv", CIRCULAR[:2])
    there = table(tmp_path / "cn" / name, CIRCULAR)
    if "EN" in name:
        assert len(asked(mmbench.TASK, there)) == 5
    else:  # its folder says that it is Chinese
        with pytest.raises(DataError, match="is the Chinese table"):
            asked(mmbench.TASK, there)
    there = there.rename(tmp_path / "mmbench")
    assert asked(mmbench.TASK, there)["1"].sample.messages[0].parts[1].text.endswith("C. bee" + DIRECTLY)
    assert len(asked(mmbench.TASK, there)) == 5
    assert len(asked(mmbench.IN_CHINESE, there)) == 2


def test_a_chinese_table_of_results_belongs_to_the_chinese_benchmark(folder, tmp_path):
    book = pytest.importorskip("openpyxl").Workbook()
    for row in (HEAD, *CIRCULAR):
        book.worksheets[0].append(row)
    there = tmp_path / "results"
    there.mkdir()
    book.save(there / "mine_MMBench_DEV_CN.xlsx")
    assert len(asked(mmbench.IN_CHINESE, there)) == 5
    with pytest.raises(DataError, match="is the Chinese table"):
        asked(mmbench.TASK, there)


def test_of_both_languages_each_task_takes_its_own(folder):
    table(folder / "mmbench_dev_cn_20231003.tsv", CIRCULAR[:2])
    assert len(asked(mmbench.TASK, folder)) == 5
    assert len(asked(mmbench.IN_CHINESE, folder)) == 2


def test_orders_are_made_where_the_file_has_none(once):
    questions = asked(mmbench.CIRCULAR, once)
    assert {name: question.answer for name, question in questions.items()} == RIGHT
    text = questions["1000001"].sample.messages[0].parts[1].text
    assert text == "What is it?\nA. bee\nB. dog\nC. cat" + DIRECTLY
    assert set(asked(mmbench.TASK, once)) == {"1", "2"}


def test_made_orders_are_those_of_a_file_that_has_them(folder, tmp_path):
    there = table(tmp_path / "other" / "mmbench_dev_20230712.tsv", CIRCULAR[:2])
    assert asked(mmbench.CIRCULAR, there) == asked(mmbench.TASK, folder) == asked(mmbench.CIRCULAR, folder)


def test_without_copies_there_is_no_circular_accuracy(once, tmp_path):
    answers = replies(tmp_path / "a.jsonl", {"1": "B", "2": "B"})
    result = score_answers(mmbench.TASK, answers, tmp_path / "out", data=once.parent)
    assert (result.metrics["vanilla_acc_first_pass"], result.metrics["n_rows"]) == (0.5, 2)
    assert "circular_acc" not in result.metrics
    low, high = result.interval
    assert (low, high) == (0.0, 1.0)


def llava_rounds(path, rows):
    """LLaVA's answers with all rounds: the options turned the other way, the letters in place."""
    lines = []
    for index, row in rows:
        options = [option for option in row[2:6] if option not in ("", "nan")]
        gold = row["ABCD".index(row[6]) + 2]
        for k in range(len(options)):
            moved = options[k:] + options[:k]
            line = {"question_id": index, "round_id": k, "text": "ABCD"[moved.index(gold)], "options": moved}
            lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(("task", "table_of"), [(mmbench.TASK, "folder"), (mmbench.CIRCULAR, "once")])
def test_llavas_rounds_are_joined_by_the_order_of_options(task, table_of, request, tmp_path):
    there = request.getfixturevalue(table_of)
    answers = llava_rounds(tmp_path / "a.jsonl", [(1, Q1), (2, Q2)])
    result = score_answers(task, answers, tmp_path / "out", data=there.parent)
    assert not result.problems
    assert result.metrics["circular_acc"] == 1.0
    assert {row.question.sample.id: row.reply for row in result.answered} == RIGHT


def test_rounds_that_were_not_asked_are_named(once, tmp_path):
    answers = llava_rounds(tmp_path / "a.jsonl", [(1, Q1), (2, Q2)])
    result = score_answers(mmbench.TASK, answers, tmp_path / "out", data=once.parent)
    assert result.problems.counts == {"answers to an order of options that was not asked": 3}
    assert result.metrics["vanilla_acc_first_pass"] == 1.0


def test_an_options_text_counts_and_a_judge_is_asked_for_the_rest(folder):
    benchmark = mmbench.TASK.open(folder, Problems())
    question = asked(mmbench.TASK, folder)["1"]
    for reply, parsed in (("B", "B"), ("I see a CAT.", "B"), ("(A)", "A"), ("", "")):
        assert benchmark.score(question, reply).parsed == parsed
        assert benchmark.judge.prompt(question, reply) == ()
    [message] = benchmark.judge.prompt(question, "a kitten")
    assert "Question: What is it?\nOptions: A. dog B. cat C. bee\nReply: a kitten" in message["content"]
    # Without a judge it is wrong, as by the official exact matching.
    assert benchmark.score(question, "a kitten").value == 0.0


def test_a_verdict_is_a_letter_or_asked_for_again(folder):
    judge = mmbench.TASK.open(folder, Problems()).judge
    question = asked(mmbench.TASK, folder)["1"]
    assert judge.read(question, "a kitten", "B").value == 1.0
    assert judge.read(question, "a kitten", "Letter: A").value == 0.0
    nothing = judge.read(question, "a kitten", "Z")
    assert (nothing.value, nothing.parsed) == (0.0, "Z")
    for verdict in ("", "A or B", "D"):
        with pytest.raises(ValueError, match="names no option; expected one letter of A, B, C or Z"):
            judge.read(question, "a kitten", verdict)


def test_a_file_without_answers_can_be_asked_and_handed_in(tmp_path):
    rows = [[*row[:7], "", *row[8:]] for row in CIRCULAR]
    there = table(tmp_path / "mmbench" / "MMBench_TEST_EN.tsv", rows)
    result = score_answers(
        mmbench.TASK, replies(tmp_path / "a.jsonl", RIGHT), tmp_path / "out", data=there.parent
    )
    assert result.metrics == {"n_rows": 5}
    assert result.interval is None
    assert result.problems.counts == {"files without answers": 1}
    mmbench.submission(asked(mmbench.TASK, there).values(), RIGHT, tmp_path / "out.xlsx")
    written = [row for _, row in read_rows(tmp_path / "out.xlsx", Problems())]
    assert [(row["index"], row["prediction"], row["answer"]) for row in written] == [
        *((1, "B", None), (2, "A", None), (1000001, "C", None), (1000002, "B", None), (2000001, "A", None))
    ]


def test_a_submission_has_the_columns_that_the_server_reads(folder, tmp_path):
    texts = RIGHT | {"1": "=HYPERLINK(1)\x07"}
    mmbench.submission(asked(mmbench.TASK, folder).values(), texts, tmp_path / "out.xlsx")
    first = next(row for _, row in read_rows(tmp_path / "out.xlsx", Problems()))
    assert first == {
        "index": 1,
        "question": "What is it?",
        "A": "dog",
        "B": "cat",
        "C": "bee",
        "D": None,
        "prediction": "=HYPERLINK(1)",
        "answer": "B",
        "split": "dev",
        "category": "naming",
        "l2-category": "coarse_perception",
    }


def test_the_parquet_of_the_hub_is_read(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    rows = [dict(zip(HEAD, row, strict=True)) for row in CIRCULAR]
    for row in rows:
        row |= {
            "index": int(row["index"]),
            "image": {"bytes": b"a picture", "path": None},
            "L2-category": "x",
        }
        row["hint"] = row["hint"] or None
        del row["l2-category"]
    (tmp_path / "en").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "en" / "dev-00000-of-00001.parquet")
    questions = asked(mmbench.TASK, tmp_path)
    assert {name: question.answer for name, question in questions.items()} == RIGHT
    assert questions["1"].meta["l2-category"] == "x"
    assert questions["1000001"].sample.messages[0].parts[0] == Image(b"a picture")
    assert questions["2"].sample.messages[0].parts[1].text.startswith("Look closely.\n")


def test_what_is_wrong_with_rows_is_named_and_their_question_not_counted_as_right(tmp_path):
    bad = [
        cells("x", Q1),
        cells("", Q1),
        cells(3, (*Q1[:6], "BC", "naming")),
        cells(4, Q1, "no base64!" * 10),
        cells(1, Q2),
        cells(5, Q1),
        cells(1_000_005, (*Q1[:6], "", "naming")),
    ]
    there = table(tmp_path / "mmbench" / "mmbench_dev_20230712.tsv", CIRCULAR + bad)
    texts = RIGHT | {"4": "B", "5": "B", "77": "A"}
    result = score_answers(
        mmbench.TASK, replies(tmp_path / "a.jsonl", texts), tmp_path / "out", data=there.parent
    )
    assert result.problems.counts == {
        "questions without id or answer": 4,
        "unreadable pictures": 1,
        "questions with the id of another": 1,
        "answers to no question": 1,
    }
    # Of question 5 a copy cannot be asked: it counts for the first pass only.
    assert (result.metrics["groups"], result.metrics["circular_acc"]) == (3, 1.0)
    assert result.metrics["vanilla_acc_first_pass"] == 1.0
    assert not result.summary()["complete"]


def test_missing_files_are_told_with_their_origin(tmp_path):
    for task in mmbench.TASKS:
        with pytest.raises(DataError, match=f"--where --on {task.name} "):
            list(task.open(tmp_path, Problems()).load())
