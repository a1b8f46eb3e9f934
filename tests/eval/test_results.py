"""Numbers reach the terminal and the file as they are, whatever data and scorers make of them."""

from __future__ import annotations

import json
import math

import pytest
from rich.console import Console

from tinymodal.core.types import Message, Sample, Text
from tinymodal.eval.benchmark import Benchmark, Question, Score, by_category
from tinymodal.eval.results import NOT_FINITE, Answered, Result, problem_lines, tables


def result(kinds=("a", "b"), name="mine", **more):
    rows = []
    for i, kind in enumerate(kinds):
        question = Question(Sample((Message("user", (Text("?"),)),), f"q{i}"), "yes", {"kind": kind})
        rows.append(Answered(question, "yes", Score(float(i % 2), "yes", question.meta)))
    more = {"reduce": by_category("kind")} | more
    benchmark = Benchmark(name=name, load=list, score=lambda *_: Score(1.0), source="here", **more)
    return Result(benchmark, tuple(rows), None, "mark")


def shown(*results):
    console = Console(width=120)
    with console.capture() as captured:
        for table in tables(results):
            console.print(table)
    return captured.get()


def test_what_looks_like_markup_in_names_and_kinds_is_shown_as_it_is():
    text = shown(result(kinds=("[/b]", "[red]"), name="[/i]", metric="[/x]"))
    for told in ("[/b]", "[red]", "[/i] ([/x] in %)"):
        assert told in text
    both = shown(result(name="[/i]", family="[/f]"), result(name="other", family="[/f]"))
    assert "[/i]" in both
    assert "[/f]" in both


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_in_the_file_and_a_problem(broken):
    found = result(report=lambda _: {"whole": 0.5, "parts": {"a": broken, "b": [1, broken]}})
    told = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert told["metrics"] == {"whole": 0.5, "parts": {"a": None, "b": [1, None]}}
    assert (told["complete"], told["problems"][NOT_FINITE]["count"]) == (False, 2)
    found.summary()
    assert problem_lines(found) == [
        f"mine: incomplete: 2 {NOT_FINITE}: parts.a is {broken}; parts.b.1 is {broken}"
    ]
    assert "whole" in shown(found)
