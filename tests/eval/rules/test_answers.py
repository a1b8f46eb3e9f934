"""The rules that read a reply, held against the official scorers' own results on a real model's answers."""

import gzip
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.core.types import Message, Sample, Text
from tinymodal.eval.benchmark import Question
from tinymodal.eval.rules.answers import exact, normalise, number, option_letter, yes_no

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "eval"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real answers is not here")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.open(path, "rt")]


def question(answer: str) -> Question:
    return Question(Sample((Message("user", (Text("?"),)),), "q"), answer)


@pytest.mark.parametrize(
    ("reply", "same"),
    [("Red.", True), ("  red ", True), ("RED", True), ("dark red", False), ("", False), ("red..", True)],
)
def test_a_short_answer_is_compared_without_case_and_full_stop(reply, same):
    score = exact(question("red"), reply)
    assert score.value == float(same)
    assert score.parsed == normalise(reply)


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("No, there is none", "no"),
        ("There is not.", "no"),
        ("Yes. But no second one", "yes"),
        ("NO", "yes"),  # the official scorer knows three spellings
        ("Nope", "yes"),
        ("", "yes"),
    ],
)
def test_the_first_sentence_says_yes_or_no(reply, said):
    assert yes_no(reply) == said


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("There are 3 cats", 3),
        ("three", 3),
        ("Ten or so", 10),
        ("1,234.5 km", 1234.5),
        ("-7", -7),
        ("none", None),
        ("someone", None),
        ("It is -3.5 degrees", -3.5),
        ("COVID-19", 19),
        ("step-3", 3),
        ("3-5 people", 3),
        ("(-4)", -4),
        ("1,2345", 1),
        ("1,234,5", 1),
        ("1,234,567 and 8", 1234567),
        ("1,234, 5", 1234),
        ("12345,678", 12345),
        ("$1,000.50.", 1000.5),
    ],
)
def test_the_first_number_counts_in_digits_or_as_a_word(reply, value):
    assert number(reply) == value


@given(st.integers(-(10**6), 10**6))
def test_a_number_written_out_is_read_back(value):
    assert number(f"It is {value}.") == value
    assert number(f"It is {value:,} km") == value


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("B. a dog", "B"),
        ("The answer is C.", "C"),
        ("B.", None),
        ("E", None),
        ("a", None),
        ("The answer is A. The answer is B.", None),
        ("", None),
    ],
)
def test_an_option_is_chosen_by_its_letter(reply, letter):
    assert option_letter(reply, num_options=4) == letter


@real
def test_yes_no_gives_the_official_counts_of_pope():
    folder = DATA / "pope"
    expected = json.loads((folder / "expected.json").read_text())["llava-v1.5-13b"]
    asked = {row["question_id"]: row for row in lines(folder / "llava_pope_test.jsonl.gz")}
    replies = lines(folder / "llava-v1.5-13b.answers.jsonl.gz")
    for split in ("adversarial", "popular", "random"):
        truth = {
            (row["image"], row["text"]): row["label"]
            for row in lines(folder / "coco_llava8910" / f"coco_pope_{split}.json.gz")
        }
        counts = {(said, label): 0 for said in ("yes", "no") for label in ("yes", "no")}
        for reply in replies:
            row = asked[reply["question_id"]]
            if row["category"] == split:
                counts[yes_no(reply["text"]), truth[row["image"], row["text"].split("\n")[0]]] += 1
        found = [counts[pair] for pair in (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"))]
        assert found == [expected[split][key] for key in ("TP", "FP", "TN", "FN")]


@real
def test_exact_match_gives_the_official_accuracy_of_gqa():
    folder = DATA / "gqa"
    expected = json.loads((folder / "expected.json").read_text())["llava-v1.5-13b"]["Accuracy"]
    with tarfile.open(folder / "testdev_balanced_questions.tar.gz") as archive:
        truth = json.load(archive.extractfile(archive.getmembers()[0]))
    replies = lines(folder / "llava-v1.5-13b.answers.jsonl.gz")
    right = sum(exact(question(truth[row["question_id"]]["answer"]), row["text"]).value for row in replies)
    assert round(100 * right / len(truth), 2) == expected


@real
def test_option_letters_give_the_official_accuracy_of_scienceqa():
    folder = DATA / "scienceqa"
    expected = json.loads((folder / "expected.json").read_text())["llava-v1.5-13b"]
    problems = json.loads(gzip.decompress((folder / "problems_test_min.json.gz").read_bytes()))
    replies = {row["question_id"]: row["text"] for row in lines(folder / "llava-v1.5-13b.answers.jsonl.gz")}
    right = 0
    for name, problem in problems.items():
        said = option_letter(replies.get(name, ""), len(problem["choices"]))
        right += said is not None and "ABCDE".index(said) == problem["answer"]
    assert (right, len(problems)) == (expected["correct"], expected["total"])
