"""MMMU is scored by its authors' rules, whichever way questions and answers come."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.eval.benchmark import Problems, Question, Score
from tinymodal.eval.given import DOUBLE, MISSING, UNKNOWN
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks.mmmu import NUMBERS, TASK, is_right, read_choice, read_open, report, score

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "eval" / "mmmu"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the real answers are not at hand")
OPTIONS = {"A": "a red fox", "B": "the fox", "C": "Two Birds", "D": "12"}
CHOICE, SHORT = "multiple-choice", "short-answer"
KEY = {
    "validation_Art_1": {"question_type": CHOICE, "ground_truth": "B"},
    "validation_Art_Theory_1": {"question_type": CHOICE, "ground_truth": "A"},
    "validation_Math_2": {"question_type": SHORT, "ground_truth": ["24/7", "3.429"]},
}
OUTPUTS = [
    {
        "id": "validation_Art_1",
        "question_type": CHOICE,
        "index2ans": OPTIONS,
        "response": "I think it is (B).",
    },
    {"id": "validation_Art_Theory_1", "question_type": CHOICE, "index2ans": OPTIONS, "response": "A) fox"},
    {"id": "validation_Math_2", "question_type": SHORT, "response": "The slope is 3.43."},
]


@pytest.fixture
def folder(tmp_path):
    """Only the right answers to three questions."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "answer_dict_val.json").write_text(json.dumps(KEY))
    return tmp_path / "data"


def scored(folder, value, name="answers.json"):
    path = folder.parent / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(value) if name.endswith("json") else "\n".join(map(json.dumps, value)))
    return score_answers(TASK, path, folder.parent / "out", data=folder)


def questions(folder, problems=None):
    return list(TASK.open(folder, Problems() if problems is None else problems).load())


def asked(name="validation_Art_1", right="B", kind=CHOICE):
    return Question(Sample((Message("user", (Text("?"),)),), name), right, {"subject": "Art", "type": kind})


@real
def test_the_official_numbers_of_parsed_answers_are_met_to_the_last_digit(tmp_path):
    expected = json.loads((DATA / "expected.json").read_text())["llava1.5_13b"]["eval_only"]
    result = score_answers(TASK, DATA / "llava1.5_13b_total_val_output.json", tmp_path, data=DATA.parent)
    assert result.metrics["eval_only"] == expected
    assert list(result.metrics["eval_only"]) == list(expected)
    told = json.loads((tmp_path / "results.json").read_text())["mmmu"]
    assert (told["metrics"]["eval_only"], told["n"], told["complete"]) == (expected, 900, True)
    assert told["interval_95"][0] < expected["Overall"]["acc"] < told["interval_95"][1]


@real
def test_the_official_numbers_of_whole_replies_are_met_to_the_last_digit(tmp_path):
    """Where the authors draw an option the draws here happen to come out as in their published run."""
    expected = json.loads((DATA / "expected.json").read_text())["llava1.5_13b"]
    result = score_answers(TASK, DATA / "llava1.5_13b_outputs.json.gz", tmp_path, data=DATA)
    assert result.metrics == expected


@real
def test_every_reply_is_read_as_the_authors_read_it(tmp_path):
    expected = json.loads(gzip.decompress((DATA / "llava1.5_13b_expected_parsed.json.gz").read_bytes()))
    result = score_answers(TASK, DATA / "llava1.5_13b_outputs.json.gz", tmp_path, data=DATA)
    found = {row.question.sample.id: row.score for row in result.answered}
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        parsed, drawn = found[name].parsed, found[name].parsed.endswith("(drawn)")
        assert drawn == wanted["random_fallback"], name
        if drawn:
            continue
        if isinstance(wanted["parsed"], list):
            assert sorted(parsed.split(" | ")) == sorted(map(str, wanted["parsed"])), name
        else:
            assert parsed == wanted["parsed"], name
        assert found[name].value == wanted["correct"], name


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("'B'", "B"),
        ("!B.,", "B"),
        (".,'B'!", None),  # each mark is stripped once, in this order: , . ! ? ; : '
        ("(B) or C or (A) then", "A"),
        ("I say (C), not B", "C"),
        ("maybe A or B , then C .", "C"),
        ("A) fox", None),
        ("b", None),
        ("B: the fox", None),
        ("we can see the fox here now", "B"),
        ("we can see a red fox here now", "A"),
        ("the fox and a red fox here now", "A"),
        ("two birds then the fox", None),  # five words are too few
        ("two birds then the fox here", "B"),
        ("A man who sees TWO BIRDS", "A"),
        ("E", None),
        ("", None),
    ],
)
def test_a_choice_is_read_in_three_ways_and_the_last_counts(reply, letter):
    assert read_choice(reply, OPTIONS) == letter


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("36 watts", {"36 watts", 36.0}),
        ("1/4", {"1/4", 1.0, 4.0}),
        ("20,000,000", {20000000.0, 0.0}),  # 000 is a number as well
        ("$1.00", {"$1.00", 1.0}),
        ("C", {" c", "c "}),
        ("So the answer is 12.345. Good", {"12.345. good", 12.35}),
        ("x = 3\nwe have 2 = 1", {1.0}),  # only in the last line = tells
        ("It is red.\nThe final answer is blue.", {"red.", "blue"}),
        ("", {""}),
        ("-1.5e3", {-1500.0, -1.0, 3.0}),
    ],
)
def test_an_open_reply_says_the_ends_of_its_lines_and_the_numbers_there(reply, said):
    assert set(read_open(reply)) == said


@pytest.mark.parametrize(
    ("reply", "right", "value"),
    [
        ("step b", ["B"], 1),  # found as " b"
        ("abc", ["B"], 0),
        ("b", ["B"], 1),
        ("The slope is 3.4291", ["24/7", "3.429"], 1),
        ("24/7", ["24/7", "3.429"], 1),
        ("30.004 watts", ["30"], 1),
        ("36 watts", ["30"], 0),
        ("1,249", ["1249"], 1),
        ("it is embryonic development", ["embryonic"], 1),
        ("embryo", ["embryonic"], 0),
        ("", ["30"], 0),
    ],
)
def test_an_open_reply_is_right_by_number_or_by_a_part_of_it(reply, right, value):
    assert is_right(read_open(reply), right) == bool(value)


@given(st.text())
def test_an_answer_given_back_is_right_unless_it_is_cut(text):
    """Words that nothing cuts, and that are no number."""
    plain = "".join(c for c in text.lower() if c.isalpha() and c.lower() == c)
    if len(plain) > 1 and plain not in ("nan", "inf", "infinity"):
        assert is_right(read_open(plain), [plain])


@given(st.text(), st.text(alphabet="(ABCD) .\nis=0123,"))
def test_any_reply_is_scored_and_the_same_each_time(one, other):
    for reply in (one, other, one + other):
        first, again = (score(asked(), reply, OPTIONS) for _ in range(2))
        assert first == again
        assert first.parsed[0] in OPTIONS
        assert score(asked(kind=SHORT), reply, {}).value in (0, 1)


def test_where_nothing_is_read_the_question_draws_an_option_and_they_differ():
    drawn = [score(asked(f"validation_Art_{n}"), "", OPTIONS) for n in range(100)]
    assert {one.parsed for one in drawn} == {f"{letter} (drawn)" for letter in OPTIONS}
    assert sum(one.value for one in drawn) == sum(one.parsed[0] == "B" for one in drawn)


def test_whole_replies_are_read_by_the_options_in_their_rows(folder):
    result = scored(folder, {"Art": OUTPUTS[:2], "Math": OUTPUTS[2:]})
    assert result.answered[0].score.parsed == "B"
    assert result.answered[1].score.parsed.endswith("(drawn)")
    assert result.answered[2].score.value == 1
    assert result.answered[2].reply == "The slope is 3.43."
    counts = {"n": 2, "correct": 2, "random_fallback_rows": 1}
    assert result.metrics["parse_and_eval_deterministic_rows"] == counts
    assert result.summary()["complete"]


def test_a_folder_of_outputs_scores_the_same_as_one_file(folder):
    one = scored(folder, {"Art": OUTPUTS[:2], "Math": OUTPUTS[2:]}).metrics
    for subject, rows in (("Art", OUTPUTS[:2]), ("Math", OUTPUTS[2:])):
        place = folder.parent / "model" / subject
        place.mkdir(parents=True)
        (place / "output.json").write_text(json.dumps(rows))
    result = score_answers(TASK, folder.parent / "model", folder.parent / "out", data=folder)
    assert result.metrics == one
    assert scored(folder, OUTPUTS).metrics == one


def test_parsed_answers_are_taken_as_they_are(folder):
    """``(B)`` would be read as B, and nothing is drawn."""
    result = scored(folder, dict(zip(KEY, ("(B)", "A", "24/7"), strict=True)))
    assert [row.score.value for row in result.answered] == [0, 1, 1]
    assert [row.score.parsed for row in result.answered][:2] == ["(B)", "A"]


def test_rows_of_llava_and_ours_are_read(folder):
    rows = [{"question_id": name, "prompt": [], "text": "B"} for name in KEY]
    assert scored(folder, rows, "a.jsonl").metrics["eval_only"]["Overall"] == {"num": 3, "acc": 0.333}
    rows = [{"id": name, "reply": "B", "parsed": "B"} for name in KEY]
    assert scored(folder, rows, "b.jsonl").metrics["eval_only"]["Overall"] == {"num": 3, "acc": 0.333}


def test_subjects_without_answers_are_left_out_and_missing_ones_make_it_incomplete(folder):
    result = scored(folder, {"validation_Art_1": "B"})
    assert result.metrics["eval_only"] == {
        "Overall-Art and Design": {"num": 1, "acc": 1.0},
        "Art": {"num": 1, "acc": 1.0},
        "Overall": {"num": 1, "acc": 1.0},
    }
    assert result.problems.counts == {MISSING: 2}
    assert report([])["eval_only"] == {}


def test_bad_rows_are_named_and_counted(folder):
    rows = [
        *OUTPUTS,
        OUTPUTS[0],
        {**OUTPUTS[0], "id": "validation_Art_9"},
        {"id": "validation_Art_1"},
        "what",
    ]
    result = scored(folder, {"Art": rows})
    assert result.problems.counts == {
        DOUBLE: 1,
        UNKNOWN: 1,
        "unreadable answers": 1,
        "answers without an id": 1,
    }
    assert result.metrics["eval_only"]["Overall"]["num"] == 3
    key = {
        **KEY,
        "validation_Cooking_1": KEY["validation_Art_1"],
        "validation_Art_2": {"question_type": CHOICE},
    }
    (folder / "answer_dict_val.json").write_text(json.dumps(key))
    assert scored(folder, {"Art": OUTPUTS}).problems.counts == {
        "questions without id, subject, type or answer": 2
    }


def test_a_folder_with_nothing_is_an_error_that_says_where_things_are_from(tmp_path):
    with pytest.raises(DataError, match=r"answer_dict_val\.json.*MMMU-Benchmark"):
        questions(tmp_path)


def test_a_question_of_which_only_the_answer_is_there_cannot_be_asked_by_mistake(folder):
    assert all(isinstance(q.sample.messages[0].parts[0], Image) for q in questions(folder))


def test_tinyllavas_questions_show_their_picture(folder):
    row = {"id": "validation_Art_1", "question_type": CHOICE, "index2ans": OPTIONS, "all_choices": [*OPTIONS]}
    rows = [
        {**row, "prompt": "Who?", "image": "a.png"},
        {**row, "prompt": "Both?", "id": "validation_Art_Theory_1"},
    ]
    (folder / "anns_for_eval.json").write_text(json.dumps(rows))
    problems = Problems()
    first, second, _ = questions(folder, problems)
    assert first.sample.messages[0].parts == (Image(folder / "all_images" / "a.png"), Text("Who?"))
    assert second.sample.messages[0].parts == (Text("Both?"),)
    assert (first.answer, second.answer) == ("B", "A")
    assert problems.counts == {"questions of which only the answer is there": 1}


@pytest.fixture
def hub(tmp_path):
    """Three questions as the Hub has them, with one, several and no picture."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def row(number, question, options, answer, pictures, kind=CHOICE):
        columns = {
            f"image_{n}": {"bytes": b"%d" % n, "path": "x"} if n in pictures else None for n in range(1, 8)
        }
        found = {"id": f"validation_Art_{number}", "question": question, "options": options, "answer": answer}
        return {**found, "question_type": kind, **columns}

    rows = [
        row(1, "See <image 1>?", "['red', \"it's\"]", "A", [1]),
        row(2, "Is <image 2> as <image 1>, and <image 1>?", "['<image 3>', 'no']", "B", [1, 2, 3, 4]),
        row(3, "How many?", "[]", "['two', '2']", [], SHORT),
        row(4, "Bad options", "['", "A", []),
    ]
    (tmp_path / "Art").mkdir()
    kinds = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.Table.from_pylist(rows)
    for n in range(1, 8):
        column = pa.array([each[f"image_{n}"] for each in rows], kinds)
        table = table.set_column(table.schema.get_field_index(f"image_{n}"), f"image_{n}", column)
    pq.write_table(table, tmp_path / "Art" / "validation-00000-of-00001.parquet")
    return tmp_path


def test_the_hubs_pictures_stand_before_the_words_or_where_they_are_named(hub):
    problems = Problems()
    one, several, none, _ = (question.sample.messages[0].parts for question in questions(hub, problems))
    choose = "\n\nAnswer with the option's letter from the given choices directly."
    assert one == (Image(b"1"), Text("See <image 1>?\n(A) red\n(B) it's" + choose))
    assert several == (
        Image(b"4"), Text("Is "), Image(b"2"), Text(" as "), Image(b"1"), Text(", and "), Text("<image 1>"),
        Text("?\n(A) "), Image(b"3"), Text("\n(B) no" + choose),
    )  # fmt: skip
    assert none == (Text("How many?\nAnswer the question using a single word or phrase."),)
    assert problems.counts == {"questions without options": 1}


def test_the_hubs_answers_are_read_and_questions_with_several_pictures_told_apart(hub):
    path = hub / "answers.jsonl"
    replies = {"1": "(A)", "2": "(A)", "3": "It is 2", "4": "A"}
    rows = ({"question_id": f"validation_Art_{name}", "text": text} for name, text in replies.items())
    path.write_text("\n".join(map(json.dumps, rows)))
    result = score_answers(TASK, path, hub / "out", data=hub)
    assert [row.score.value for row in result.answered] == [1, 0, 1, 1]
    assert result.metrics["pictures"] == {"one": {"num": 3, "acc": 1.0}, "several": {"num": 1, "acc": 0.0}}


def test_a_part_of_a_subject_that_is_missing_is_told(hub):
    whole = hub / "Art" / "validation-00000-of-00001.parquet"
    whole.rename(whole.with_name("validation-00001-of-00002.parquet"))
    problems = Problems()
    assert len(questions(hub, problems)) == 4
    assert problems.counts["parts of files that are missing"] == 1


def test_the_sum_is_rounded_as_the_authors_round_it():
    """Of 0.0625 they print 0.062, of 30 subjects the mean weighted by their questions."""
    scores = [Score(float(n == 0), "A", {"subject": "Art", "pictures": "1"}) for n in range(16)]
    found = report(scores)["eval_only"]
    assert found["Art"] == found["Overall"] == {"num": 16, "acc": 0.062}


THEIRS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
"""Of extract_numbers in eval/eval_utils.py of MMMU's repository."""


@given(st.text("0123.,-+eEx ", max_size=16))
def test_numbers_are_those_that_the_official_patterns_find(text):
    assert [re.findall(form, text) for form in NUMBERS] == [re.findall(form, text) for form in THEIRS]


def test_a_reply_of_many_digits_takes_no_longer_than_one_of_many_words():
    assert read_open("so " + "1" * 100_000 + "x")  # minutes, if every digit began a search of its own
