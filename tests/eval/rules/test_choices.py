"""Questions with lettered options: what a table holds, what is shown, what each scorer reads in a reply."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.eval.benchmark import Problems
from tinymodal.eval.files import id_of
from tinymodal.eval.rules import choices

OPTIONS = {"A": "a dog", "B": "a cat", "C": "two cats", "D": "None of these"}
WORDS = st.text(alphabet=st.characters(codec="utf-8"), max_size=60)


def test_options_end_at_the_first_empty_cell_as_pandas_sees_it():
    row = {"A": "one", "B": 2, "C": "None", "D": "four"}
    assert choices.options_of(row) == {"A": "one", "B": "2"}
    assert choices.options_of({"A": "x", "B": float("nan"), "C": "y"}) == {"A": "x"}
    assert choices.options_of({"A": "", "B": "x"}) == {}


def test_each_option_has_a_line_of_its_own():
    assert choices.option_lines(choices.lettered(["red", "blue"])) == "\nA. red\nB. blue"


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("b. a cat", "B"),
        ("(C) two cats", "C"),
        ("Option D", "D"),
        ("The answer is A.", "A"),
        ("\nB\n", "B"),
        ("dog", "D"),  # the official scorer looks at one character
        ("It is B", None),
        ("Answer: B", "A"),
        ("", None),
        ("(", None),
        ("the answer is", None),
        ("E", None),
    ],
)
def test_mmstar_reads_the_letter_a_reply_begins_with(reply, letter):
    assert choices.leading_letter(reply) == letter


@given(st.sampled_from("ABCD"), st.sampled_from(["", "(", "Option ", "the answer is "]), WORDS)
def test_what_follows_the_first_letter_does_not_count(letter, before, rest):
    assert choices.leading_letter(before + letter + rest) == letter


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("**D**", "D"),
        ("Answer: B, I think", "B"),
        ("A dog is shown", "A"),  # the article is taken for the letter
        ("b", None),
        ("it shows two cats, certainly", "C"),
        ("It shows A CAT", "A"),  # a letter that stands alone comes before the text
        ("it shows a Cat", "B"),
        ("a dog and a cat", None),
        ("A or B", None),
        ("Z", "Z"),
        ("Cannot determine the answer from B", "Z"),
        ("Failed to obtain answer via API B", None),
        ("Failed to obtain answer via API: a cat", "B"),
        ("a spider", None),
        ("", None),
    ],
)
def test_vlmevalkit_matches_a_letter_and_then_an_options_text(reply, letter):
    assert choices.matched_letter(reply, OPTIONS) == letter


@given(st.sampled_from("ABCD"), st.text(alphabet=".()[],:;!*#{} \n\t", max_size=8))
def test_a_letter_is_read_among_any_signs(letter, signs):
    assert choices.matched_letter(signs + letter + signs, OPTIONS) == letter


@given(WORDS)
def test_no_reply_chooses_an_option_that_was_not_offered(reply):
    assert choices.matched_letter(reply, OPTIONS) in (*OPTIONS, "Z", None)
    assert choices.leading_letter(reply) in (*"ABCD", None)


def test_a_judge_is_asked_in_the_language_of_the_question():
    [english] = choices.judge_prompt("What is {this}?", OPTIONS, "a {spider}")
    [chinese] = choices.judge_prompt("这是什么?", OPTIONS, "蜘蛛")
    assert english["role"] == "user"
    assert "Question: What is {this}?\nOptions: A. a dog B. a cat" in english["content"]
    assert english["content"].endswith("Reply: a {spider}\nLetter: ")
    assert "问题：这是什么?" in chinese["content"]
    assert "Question" not in chinese["content"]


def test_the_right_answer_in_a_table_is_never_taken_for_the_reply(tmp_path):
    file = tmp_path / "results.csv"
    file.write_text("index,prediction,answer\n1,,B\n2,C,B\n,C,B\n")
    problems = Problems()
    said = [(row.id, row.text) for row in choices.said_rows(file, problems)]
    assert said == [("1", ""), ("2", "C")]
    assert problems.counts == {"answers without an id": 1}


def test_rows_without_a_reply_are_named(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"question_id": 7, "answer": "B"}\nnot json\n')
    problems = Problems()
    assert list(choices.said_rows(file, problems)) == []
    assert problems.counts == {"unreadable answers": 1, "unreadable rows": 1}


def test_an_id_that_a_table_holds_as_a_fraction_is_whole():
    assert id_of(241.0) == "241"
    assert id_of("v1738") == "v1738"
    assert id_of(None) == ""


def test_a_picture_is_bytes_base64_or_a_file(tmp_path):
    problems, elsewhere = Problems(), tmp_path / "1.jpg"
    encoded = base64.b64encode(b"picture").decode()
    for value in (b"picture", encoded, {"bytes": b"picture", "path": None}, [{"bytes": b"picture"}]):
        assert choices.picture(value, elsewhere, "row 1", problems) == b"picture"
    for value in (None, "", float("nan"), {"bytes": None, "path": "1.jpg"}, []):
        assert choices.picture(value, elsewhere, "row 1", problems) == elsewhere
    assert not problems
    assert choices.picture("no base64!", elsewhere, "row 2", problems) == elsewhere
    assert "row 2" in problems.named["unreadable pictures"][0]


def test_a_table_keeps_replies_as_they_are(tmp_path):
    from tinymodal.eval.files import read_rows

    rows = [{"index": 3, "prediction": text} for text in ("=1+1", "#N/A", "None", "B\x00", None)]
    choices.write_xlsx(tmp_path / "out.xlsx", ("index", "prediction", "split"), rows)
    read = [row for _, row in read_rows(tmp_path / "out.xlsx", Problems())]
    assert [row["prediction"] for row in read] == ["=1+1", "#N/A", "None", "B", None]
    assert list(read[0]) == ["index", "prediction", "split"]
    assert read[0]["index"] == 3
