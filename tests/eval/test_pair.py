"""Two models on the same questions: the difference, how sure it is, and what cannot be compared."""

import io
import json
import math
import re
from collections import Counter
from fractions import Fraction

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.eval import pair as pairing
from tinymodal.eval.benchmark import Benchmark, Question, Score
from tinymodal.eval.intervals import difference
from tinymodal.eval.pages.pair import samples_of, write_pair_page
from tinymodal.eval.pair import (
    compare,
    compare_folders,
    notes,
    pair_tables,
    sentence,
    sign_test,
)
from tinymodal.eval.results import Answered, Result

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)> [bold]你好"


def row(name, score, answer="red", kind="", run="one/64", **more):
    row = {"id": name, "prompt": f"asked {name}", "reply": f"said {name}", "stopped_by": "stop"}
    row |= {"answer": answer, "parsed": "", "score": score, "meta": {"kind": kind} if kind else {}}
    return row | {"digest": "", "run": run} | more


def summary(run="one", headline="mean_f1", value=85.4321, complete=True):
    numbers = {"mean_f1": value, "random": {"f1": value}}
    told = {"metric": "F1", "metrics": numbers, "headline": headline, "n": 4, "complete": complete}
    return told | {"protocol": {}, "run": run}


@pytest.fixture
def folder(tmp_path):
    """Makes an evaluation: name -> rows, and name -> what ``results.json`` tells."""

    def make(name, results=None, **replies):
        place = tmp_path / name
        place.mkdir(parents=True, exist_ok=True)
        for benchmark, rows in replies.items():
            lines = "".join(json.dumps(each) + "\n" for each in rows)
            (place / f"{benchmark}.replies.jsonl").write_text(lines)
        if results is not None:
            (place / "results.json").write_text(json.dumps(results))
        return place

    return make


def scores(values, kinds=("",), **more):
    return [row(f"q{i}", value, kind=kinds[i % len(kinds)], **more) for i, value in enumerate(values)]


def terminal(pairs):
    console = Console(width=160, record=True, file=io.StringIO())
    for table in pair_tables(pairs):
        console.print(table)
    return console.export_text()


# How sure it is


def exact_p(wins, losses):
    n, k = wins + losses, min(wins, losses)
    tail = sum(Fraction(math.comb(n, i), 2**n) for i in range(k + 1))
    return float(min(Fraction(1), 2 * tail))


@given(st.integers(0, 150), st.integers(0, 150))
def test_the_p_value_is_the_exact_one(wins, losses):
    assert sign_test(wins, losses) == pytest.approx(exact_p(wins, losses), rel=1e-12)
    assert sign_test(wins, losses) == sign_test(losses, wins)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 20_000), st.integers(-2_000, 2_000))
def test_the_p_value_of_many_questions_is_that_of_scipy(wins, more):
    stats = pytest.importorskip("scipy.stats")
    losses = max(0, wins + more)
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_the_p_value_neither_overflows_nor_leaves_its_range():
    assert sign_test(0, 0) == 1.0
    assert sign_test(7, 7) == 1.0
    assert sign_test(0, 100_000) == 0.0
    assert sign_test(500_000, 500_001) == 1.0
    assert sign_test(500_000, 501_000) == pytest.approx(0.3178, abs=1e-3)
    assert sign_test(5, 0) == 2 / 32


# What is compared


def test_the_difference_is_the_second_less_the_first_with_its_paired_interval(folder):
    first, second = [1, 1, 0, 0, 1, 0, 0, 1] * 5, [1, 0, 1, 1, 1, 1, 0, 1] * 5
    pair = compare(folder("a", pope=scores(first)), folder("b", pope=scores(second)), "pope")
    gap = pair.whole
    assert (gap.n, gap.first, gap.second) == (40, 0.5, 0.75)
    assert (gap.difference, gap.interval_95) == difference(first, second)
    assert gap.difference == 0.25
    counts = gap.both_right, gap.only_first_right, gap.only_second_right, gap.both_wrong
    assert counts == (15, 5, 15, 5)
    assert gap.p_value == pytest.approx(exact_p(15, 5), rel=1e-12)
    assert pair.models == ("a", "b")
    assert sentence(pair).startswith("b is better: b less a is +25.0 points (95 % interval +")


def test_rows_are_joined_by_id_and_what_only_one_answered_is_counted_and_left_out(folder):
    first = [row("x", 1), row("y", 0), row("z", 1)]
    second = [row("w", 0), row("z", 0), row("v", 0), row("y", 1)]
    pair = compare(folder("a", pope=first), folder("b", pope=second), "pope")
    assert [(one.id, other.id) for one, other in pair.rows] == [("y", "y"), ("z", "z")]
    assert pair.alone == (1, 2)
    assert (pair.whole.first, pair.whole.second) == (0.5, 0.5)
    assert "1 questions that only a answered are left out." in notes(pair)
    assert "2 questions that only b answered are left out." in notes(pair)


def test_replies_without_a_grade_are_left_out_counted_and_named_and_not_taken_for_wrong(folder):
    a = folder("a", opinions=[row("q0", 1), row("q1", None), row("q2", 0.5), row("only", 1)])
    b = folder("b", opinions=[row("q0", 1), row("q1", 1), row("q2", None)])
    pair = compare(a, b, "opinions")
    assert [first.id for first, _ in pair.rows] == ["q0"]
    assert (pair.whole.first, pair.whole.second, pair.alone) == (1, 1, (1, 0))
    assert pair.ungraded == (("q1",), ("q2",))
    assert "1 replies of a without a grade are left out: 'q1'." in notes(pair)
    told = pair.summary()
    assert (told["first_ungraded"], told["second_ungraded"]) == (1, 1)


def test_scores_with_parts_count_as_right_from_half_and_as_better_by_any_part(folder):
    first, second = [0.3, 0.6, 0.9, 0.0], [0.5, 0.9, 0.9, 0.3]
    gap = compare(folder("a", vqa=scores(first)), folder("b", vqa=scores(second)), "vqa").whole
    assert (gap.both_right, gap.only_first_right, gap.only_second_right, gap.both_wrong) == (2, 0, 1, 1)
    assert (gap.first_better, gap.second_better) == (0, 3)
    assert gap.p_value == 2 / 8


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.sampled_from([0, 0.3, 0.5, 1])] * 2, st.sampled_from("xyz")), min_size=1, max_size=20
    )
)
def test_kinds_add_up_to_the_whole(tmp_path_factory, given):
    folder = tmp_path_factory.mktemp("pair")
    for place, side in (("a", 0), ("b", 1)):
        (folder / place).mkdir()
        lines = [json.dumps(row(f"q{i}", each[side], kind=each[2])) + "\n" for i, each in enumerate(given)]
        (folder / place / "t.replies.jsonl").write_text("".join(lines))
    pair = compare(folder / "a", folder / "b", "t")
    assert len(pair.kinds) in (0, *range(2, 4))
    gaps = list(pair.kinds.values()) or [pair.whole]
    for key in ("n", "both_right", "only_first_right", "only_second_right", "both_wrong", "second_better"):
        assert sum(getattr(gap, key) for gap in gaps) == getattr(pair.whole, key)
    mean = sum(gap.difference * gap.n for gap in gaps) / pair.whole.n
    assert mean == pytest.approx(pair.whole.difference, abs=1e-12)
    assert pair.whole.second - pair.whole.first == pytest.approx(pair.whole.difference, abs=1e-12)


def test_the_folder_of_a_model_and_that_of_its_evaluation_are_the_same(folder):
    folder("runs/a/eval", pope=scores([1, 0]))
    folder("runs/b/eval", pope=scores([1, 1]))
    place = folder("runs")
    by_model = compare(place / "a", place / "b", "pope")
    assert by_model.models == ("a", "b")
    inside = compare(place / "a" / "eval", place / "b" / "eval", "pope")
    assert inside.models == ("a/eval", "b/eval")
    assert inside.whole == by_model.whole


def test_without_names_all_that_both_were_asked_is_compared_and_the_rest_is_told(folder, monkeypatch):
    said = []
    monkeypatch.setattr(pairing, "say", said.append)
    a = folder("a", pope=scores([1]), mme=scores([1]), only_a=scores([1]))
    b = folder("b", pope=scores([0]), mme=scores([0]), only_b=scores([1]))
    assert [pair.name for pair in compare_folders(a, b)] == ["mme", "pope"]
    assert [re.sub(r".*/", "", line) for line in said] == [
        "a: only here: only_a; left out of the comparison",
        "b: only here: only_b; left out of the comparison",
    ]
    assert [pair.name for pair in compare_folders(a, b, ["pope"])] == ["pope"]


def test_replies_that_another_model_left_behind_are_not_compared_unless_named(folder):
    a = folder("a", {"pope": summary()}, pope=scores([1]), old=scores([1], run="other/64"))
    b = folder("b", pope=scores([0]), old=scores([0]))
    assert [pair.name for pair in compare_folders(a, b)] == ["pope"]
    assert [pair.name for pair in compare_folders(a, b, ["old"])] == ["old"]


def test_official_numbers_are_told_where_they_are_about_these_replies(folder):
    a = folder("a", {"pope": summary(value=85.4321)}, pope=scores([1, 1]))
    b = folder("b", {"pope": summary(value=86.0, complete=False)}, pope=scores([1, 0]))
    text = terminal([compare(a, b, "pope")])
    assert re.search(r"F1 \(mean_f1\) .* 85.43 .* 86.00 ", text)
    assert "The evaluation of b is incomplete." in text
    assert "The evaluation of a is incomplete." not in text
    stale = folder("c", {"pope": summary(run="another")}, pope=scores([1, 0]))
    assert "F1" not in terminal([compare(a, stale, "pope")])


def test_questions_that_were_asked_in_other_words_are_counted(folder):
    first = [row("x", 1, digest="aa"), row("y", 1, digest="bb"), row("z", 1, digest="")]
    second = [row("x", 1, digest="aa"), row("y", 1, digest="cc"), row("z", 1, digest="dd")]
    pair = compare(folder("a", pope=first), folder("b", pope=second), "pope")
    assert pair.asked_otherwise == 1
    assert "1 questions were put to the two in other words or pictures." in notes(pair)


# What cannot be compared


def test_other_answers_to_the_same_ids_are_refused_by_name(folder):
    a = folder("a", pope=[row("x", 1, answer="yes"), row("y", 1)])
    b = folder("b", pope=[row("x", 1, answer="no"), row("y", 1)])
    with pytest.raises(
        DataError, match=r"^pope: 1 questions have one right answer in a .* \(x: 'yes' and 'no'\)"
    ):
        compare(a, b, "pope")


def test_nothing_in_common_is_refused(folder):
    a, b = folder("a", pope=scores([1])), folder("b", pope=[row("other", 1)])
    with pytest.raises(
        DataError, match=r"answered no question in common \(of 1, e.g. 'q0', and 1, e.g. 'other'\)"
    ):
        compare(a, b, "pope")
    c = folder("c", mme=scores([1]))
    with pytest.raises(DataError, match=r"no benchmark in common; .* found pope and mme\. Evaluate both"):
        compare_folders(a, c)
    with pytest.raises(DataError, match=r"no replies to pope; .* found replies to mme\. Run tinymodal eval"):
        compare_folders(a, c, ["pope"])


def test_what_is_no_evaluation_is_refused(folder, tmp_path):
    a = folder("a", pope=scores([1]))
    with pytest.raises(DataError, match=r"nowhere: is no folder; expected NAME\.replies\.jsonl"):
        compare_folders(a, tmp_path / "nowhere")
    with pytest.raises(DataError, match="empty: holds no replies"):
        compare_folders(folder("empty"), a)
    folder("broken").joinpath("pope.replies.jsonl").write_text("my own notes\n")
    with pytest.raises(DataError, match="holds something of somebody's own"):
        compare_folders(a, tmp_path / "broken", ["pope"])


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([row("x", 1), row("x", 0)], "two rows answer 'x'; expected one"),
        ([row("x", 1), row("y", 1, run="two/64")], r"holds replies of 2 runs \(one/64, two/64\)"),
        ([row("x", "1")], "'x': score is '1'"),
        ([row("x", None)], "none of 1 replies to pope has a grade"),
        ([row("x", math.nan)], "'x': score is nan"),
        ([row("x", 1, meta="colour")], "'x': score is 1 and meta 'colour'"),
        ([], "no replies to pope"),
    ],
)
def test_rows_that_cannot_be_counted_are_refused(folder, rows, told):
    a, b = folder("a", pope=scores([1])), folder("b", pope=rows)
    with pytest.raises(DataError, match=told):
        compare(a, b, "pope")


# What is shown


def test_the_table_shows_kinds_the_whole_and_in_words_how_sure_it_is(folder):
    a = folder("[red]a", pope=scores([1, 0, 0, 0] * 10, kinds=("x", "[bold]y")))
    b = folder("b", pope=scores([1, 0, 1, 0] * 10, kinds=("x", "[bold]y")))
    text = terminal([compare(a, b, "pope")])
    assert re.search(r"│ x +│ +50\.0 │ +100\.0 │ +\+50\.0 │ \+\d+\.\d to \+\d+\.\d │ +0\.002 │ +20 │", text)
    assert re.search(r"│ \[bold\]y +│ +0\.0 │ +0\.0 │ +\+0\.0 │ +\+0\.0 to \+0\.0 │ +1 │ +20 │", text)
    assert re.search(r"│ mean score +│ +25\.0 │ +50\.0 │ +\+25\.0 │", text)
    assert "b is better: b less [red]a is +25.0 points" in text
    assert "Both right 10, only [red]a 0, only b 10, both wrong 20." in text


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([1, 0] * 9, [1, 0] * 9, "a and b score the same on every question."),
        ([1, 0, 0], [1, 1, 0], "No sure difference: b less a is +33.3 points"),
        ([1] * 20, [0] * 20, "a is better: b less a is -100.0 points"),
        ([1], [0], "No sure difference: b less a is -100.0 points, p = 1."),
    ],
)
def test_one_sentence_says_who_is_better_only_where_it_is_sure(folder, first, second, said):
    pair = compare(folder("a", pope=scores(first)), folder("b", pope=scores(second)), "pope")
    assert sentence(pair).startswith(said)


def test_the_summary_goes_into_a_file(folder):
    a, b = folder("a", pope=scores([1, 0], kinds="xy")), folder("b", pope=scores([1, 1], kinds="xy"))
    told = json.loads(json.dumps(compare(a, b, "pope").summary()))
    assert (told["models"], told["n"], told["difference"]) == (["a", "b"], 2, 0.5)
    assert told["kinds"]["y"]["only_second_right"] == 1


def question(name):
    parts = (Image(PIL.Image.new("RGB", (400, 300), "red")), Text("What colour?"))
    return Question(Sample((Message("user", parts),), name), "red")


def test_the_page_shows_the_questions_on_which_they_differ_with_their_pictures(folder, tmp_path):
    a = folder("a", pope=scores([1, 0, 1, 0.5], kinds="xy"))
    b = folder("b", pope=scores([1, 1, 0, 0.6], kinds="xy"))
    benchmark = Benchmark(name="pope", load=list, score=lambda q, r: Score(1.0), source="")
    asked = tuple(Answered(question(f"q{i}"), "", Score(1.0)) for i in range(4))
    pairs = compare_folders(a, b)
    samples = samples_of([Result(benchmark, asked, None, "")])
    html = write_pair_page(tmp_path / "page.html", pairs, samples).read_text()
    assert Counter(re.findall(r'<li class="card" data-group="(\d)"', html)) == {"0": 1, "1": 2}
    assert html.count("data:image/jpeg;base64,") == 3
    assert "What colour?" in html
    assert "3 of 3 questions with different scores are shown: 1 of 1 a better, 2 of 2 b better" in html
    assert "said q1" in html
    assert "said q0" not in html
    bare = write_pair_page(tmp_path / "bare.html", pairs).read_text()
    assert "asked q1" in bare
    assert "data:image" not in bare


def test_the_page_shows_as_many_of_either_and_is_the_same_each_time(folder, tmp_path):
    a, b = folder("a", t=scores([1, 0, 0, 0] * 30)), folder("b", t=scores([0, 1, 1, 1] * 30))
    first = write_pair_page(tmp_path / "1.html", compare_folders(a, b), cards=20).read_bytes()
    again = write_pair_page(tmp_path / "2.html", compare_folders(a, b), cards=20).read_bytes()
    assert first == again
    groups = Counter(re.findall(r'<li class="card" data-group="(\d)"', first.decode()))
    assert groups == {"0": 10, "1": 10}


def test_whatever_rows_say_is_text_on_the_page(folder, tmp_path):
    evil = {"prompt": EVIL, "reply": EVIL + "\ud800", "answer": EVIL, "parsed": EVIL + "p", "kind": EVIL}
    a, b = (
        folder("<b>a", t=[row(EVIL, 1, **evil), row("y", 1)]),
        folder("b", t=[row(EVIL, 0, **evil), row("y", 1)]),
    )
    html = write_pair_page(tmp_path / "page.html", compare_folders(a, b)).read_text()
    assert html.count("<script>") == 1
    assert "<img" not in html
    assert "<b>a" not in html
    assert "&lt;img src=x onerror=alert(1)&gt; [bold]你好" in html
