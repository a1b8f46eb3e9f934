"""Short answers: both official normalisers on their own golden strings, and the accuracies made of them."""

import json
import zlib
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinymodal.eval.rules import vqa
from tinymodal.eval.rules.vqa import (
    agreement,
    anls,
    edits,
    m4c_accuracy,
    m4c_words,
    relaxed,
    tidy,
    total,
    vqa_accuracy,
    vqa_words,
)

GOLDEN = Path(__file__).parents[4] / "shared" / "data" / "eval" / "vqa_normalisation" / "golden.json"
MARKS = ';/[]"{}()=+\\_-><@`,?!'
nasty = st.text(st.sampled_from([*MARKS, *"aAeiİΣßs'’.0159٣ \n\t\u00a0\u2028"])) | st.text()


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the folder of real answers is not here")
def test_both_normalisers_equal_the_official_ones():
    rows = json.loads(GOLDEN.read_text())
    assert len(rows) > 100
    for row in rows:
        text = row["input"]
        found = {
            "input": text,
            "evalai": m4c_words(text),
            "vqaeval_punct": vqa._unpunctuated(tidy(text)),
            "vqaeval": vqa_words(tidy(text)),
        }
        assert found == row


def test_the_table_of_contractions_is_the_official_one():
    """By checksum; without its entries with a capital I, for words are lower-cased, and without those that
    change nothing."""
    table = json.dumps(sorted(vqa.CONTRACTIONS.items()))
    assert zlib.crc32(table.encode()) == 2299611692
    assert vqa.CONTRACTIONS["couldnt've"] == vqa.CONTRACTIONS["couldn'tve"] == "couldn't've"
    assert vqa.CONTRACTIONS["somebody'd"] == "somebodyd"


@pytest.mark.parametrize(
    ("text", "of_vqa", "of_m4c"),
    [
        # 's is a word of its own for m4c only.
        ("A man's hat", "man's hat", "man 's hat"),
        ("let's go", "let's go", "let 's go"),
        ("wheres he", "where's he", "where's he"),
        # m4c drops commas and question marks before it looks at what stands beside them.
        ("red,green", "red green", "redgreen"),
        ("who?me", "who me", "whome"),
        ("red, green?", "red green", "red green"),
        # A comma between digits makes every mark vanish, for VQA's scorer.
        ("1,000 red-green", "1000 redgreen", "1000 red green"),
        ("1,,000 red-green", "1 000 red green", "1000 red green"),
        # One space beside a mark anywhere, and all marks of its kind vanish.
        ("red-green - blue", "redgreen blue", "redgreen blue"),
        ("red-green/blue", "red green blue", "red green blue"),
        ("-red-", "red", "red"),
        # Periods go unless a digit follows.
        ("U.S.A.", "usa", "usa"),
        ("1.5.", "1.5", "1.5"),
        ("no.1", "no.1", "no.1"),
        ("3.x", "3x", "3x"),
        ("٣.٤", "٣.٤", "٣.٤"),
        ("." * 40, "." * 8, "." * 8),
        # Numbers up to ten, articles, contractions: of whole words.
        ("None", "0", "0"),
        ("ten eleven", "10 eleven", "10 eleven"),
        ("twenty-one", "twenty 1", "twenty 1"),
        ("The", "", ""),
        ("an apple a day", "apple day", "apple day"),
        ("theatre", "theatre", "theatre"),
        ("DONT", "don't", "don't"),
        ("Im here", "im here", "im here"),
        ("couldntve", "couldntve", "couldntve"),
        ("'ow'sat", "'ow's'at", "'ow 'sat"),
        # What is no ASCII mark stays.
        ("dog’s", "dog’s", "dog’s"),
        ("3，4。", "3，4。", "3，4。"),
        ("a\u00a0cat\u2003", "cat", "cat"),
        ("ÉCLAIR", "éclair", "éclair"),
        ("日本", "日本", "日本"),
        ("yes\nno\tmaybe", "yes no maybe", "yes no maybe"),
        ("", "", ""),
        (" \n\t ", "", ""),
        ("?!.,;", "", ""),
    ],
)
def test_adversarial_strings(text, of_vqa, of_m4c):
    assert vqa_words(tidy(text)) == of_vqa
    assert m4c_words(text) == of_m4c


@given(nasty)
@example("a" * 100_000)
@example("a. " * 30_000)
@example("\ud800")
@settings(deadline=None)
def test_no_text_makes_a_normaliser_raise_or_change_its_mind(text):
    for rule in (tidy, vqa_words, m4c_words):
        once = rule(text)
        assert rule(text) == once == rule.__self__.rule(text)
    for words in (vqa_words(tidy(text)), m4c_words(text)):
        assert words == " ".join(words.split())
        assert not {"a", "an", "the", "none", "ten"} & set(words.split())


@given(nasty)
def test_a_tidied_text_has_the_same_words(text):
    """Reports compute one scorer's number from the text that was tidied for the other."""
    assert tidy(tidy(text)) == tidy(text)
    assert m4c_words(tidy(text)) == m4c_words(text)


@given(nasty)
def test_marks_are_judged_one_by_one_by_the_whole_text(text):
    found, around = text, zip(text, text[1:], text[2:], strict=False)
    thousands = any(a.isdecimal() and b == "," and c.isdecimal() for a, b, c in around)
    for mark in reversed(MARKS):  # the order does not matter
        alone = thousands or mark + " " in text or " " + mark in text
        found = found.replace(mark, "" if alone else " ")
    # Periods are dropped from the left, 32 at most.
    kept, dropped = "", 0
    for i, letter in enumerate(found):
        if letter == "." and not found[i + 1 : i + 2].isdecimal() and dropped < 32:
            dropped += 1
        else:
            kept += letter
    assert vqa._unpunctuated(text) == kept


@pytest.mark.parametrize("same", range(11))
def test_an_answer_is_right_by_a_third_for_each_who_gave_it(same):
    """0, 0.3, 0.6, 0.9, and 1 from four people on: the mean over leaving each of the ten out."""
    truth = ["red"] * same + ["blue"] * (10 - same)
    assert agreement("red", truth) == pytest.approx(min(1.0, 0.3 * same))
    assert agreement("green", truth) == 0
    assert agreement("green", []) == 0


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_agreement_is_the_mean_over_leaving_each_one_out(truth):
    left_out = [truth[:i] + truth[i + 1 :] for i in range(len(truth))]
    parts = [min(1.0, others.count("a") / 3) for others in left_out]
    expected = 0.0
    for part in parts:
        expected += part
    assert agreement("a", truth) == expected / len(truth)


def test_vqa_normalises_only_where_the_answers_differ():
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy("the  cat", ["the  cat"] * 10) == 1
    assert m4c_accuracy("Yes.", ["yes"] * 10) == 1


def test_line_ends_and_tabs_are_spaces_on_both_sides_before_answers_are_compared():
    assert vqa_accuracy("hot\ndog\n", ["hot\tdog"] * 10) == 1
    # Answers that differ in that alone do not differ.
    assert vqa_accuracy("Hot dog", ["hot\tdog"] * 5 + [" hot dog"] * 5) == 0


def test_sums_run_from_left_to_right():
    """0.1 ten times is not 1 then; Python 3.12's sum() says 1.0."""
    assert total([0.1] * 10) == 0.9999999999999999
    assert total([]) == 0


@pytest.mark.parametrize(
    ("reply", "answers", "value"),
    [
        ("Coca  Cola", ["coca cola"], 1.0),
        ("itc limited", ["ITC Ltd", "ITC Limited"], 1.0),
        ("abce", ["abcd"], 0.75),
        ("ab", ["abcd"], 0.5),  # a half counts
        ("a", ["abc"], 0.0),
        ("", ["abc"], 0.0),
        ("", [""], 1.0),
        ("x", [""], 0.0),
        # Characters are counted before spaces collapse, so padding a wrong reply makes it less wrong.
        ("abXX", ["abcd"], 0.5),
        ("abXX    ", ["abcd"], 0.75),
        ("aße", ["aßa"], 0.75),  # capitals are counted, and ß has two
    ],
)
def test_likeness_is_that_of_the_official_script(reply, answers, value):
    assert anls(reply, answers) == value


@given(nasty, st.lists(nasty, min_size=1, max_size=3))
def test_likeness_lies_between_a_half_and_one_or_is_zero(reply, answers):
    value = anls(reply, answers)
    assert value == 0 or 0.5 <= value <= 1
    assert anls(answers[0], answers) == 1


def test_the_likeness_of_very_long_texts_is_quick():
    assert anls("x" * 200_000, ["total: 5"]) == 0
    assert anls("ab" * 5_000, ["ba" * 5_000]) == 1 - 2 / 10_000


@given(st.text("abc", max_size=9), st.text("abc", max_size=9))
def test_edits_are_counted_as_by_the_plain_table(first, second):
    rows = [[i + j if not i * j else 0 for j in range(len(second) + 1)] for i in range(len(first) + 1)]
    for i, one in enumerate(first, 1):
        for j, other in enumerate(second, 1):
            changed = rows[i - 1][j - 1] + (one != other)
            rows[i][j] = min(changed, rows[i - 1][j] + 1, rows[i][j - 1] + 1)
    assert edits(first, second) == rows[-1][-1]


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("abc", "Abc", True),
        ("100%", "96%", True),
        ("100%", "95%", False),
        ("100%", "0.96", True),
        ("100%", "0.94", False),
        ("Don't", "Won't", False),
        ("5%", "5", False),
        ("5", "5%", False),
        ("105", "100", True),
        ("95", "100", True),
        ("94.9", "100", False),
        ("-100", "100", False),
        ("1e2", "100", True),
        ("1,000", "1000", False),
        ("$5", "5", False),
        ("0", "0", True),
        ("0.0", "0", False),  # no share of zero: the same words
        ("0%", "0", False),
        (" 5", "5", True),
        ("5.", "5", True),
        ("Yes.", "Yes", False),
        ("yes ", "yes", False),
        ("nan", "5", False),
        ("nan", "nan", False),
        ("inf", "inf", False),
        ("%", "%", True),
        ("", "", True),
        ("", "5", False),
    ],
)
def test_relaxed_correctness_is_that_of_pix2struct(reply, answer, right):
    assert relaxed(reply, answer) is right


@given(nasty | st.floats().map(str), nasty | st.floats().map(str))
def test_relaxed_correctness_never_raises(reply, answer):
    assert relaxed(reply, answer) in (True, False)


def test_answers_are_texts_or_objects_and_nothing_else():
    assert vqa.told_answers([{"answer": "a"}, {"answer": "b", "answer_id": 2}]) == ["a", "b"]
    assert vqa.told_answers(["a"]) == ["a"]
    for unreadable in (None, [], "a", [1], ["a", None], [{"answer": 2}], [{}], {"answer": "a"}):
        assert vqa.told_answers(unreadable) == []


def test_people_are_kept_apart_even_where_an_answer_has_lines():
    question = vqa.ask(7, b"", "?", ["b", "a\nb", "a\nb", ""])
    assert vqa.people(question.meta) == ["b", "a b", "a b", ""]
    assert question.answer == "a\nb"
    assert question.sample.id == "7"
    assert vqa.people(vqa.ask(7, b"", "?", [""]).meta) == [""]
    assert vqa.people(vqa.ask(7, b"", "?", []).meta) == []


def test_one_picture_is_kept_once(tmp_path):
    pictures = vqa.Pictures(tmp_path, "*.png", "png")
    first, second = bytes([1, 2, 3]), bytes(bytearray([1, 2, 3]))
    assert first is not second
    assert pictures({"bytes": first, "path": "a.png"}) is pictures({"bytes": second, "path": None})
    assert pictures({"bytes": None, "path": "a.png"}) == pictures("a.png") == tmp_path / "png" / "a.png"
