"""Two models on the same questions: what their mean scores differ by, how surely, and where.

Reads what an evaluation writes down (``NAME.replies.jsonl``; ``results.json`` for the official numbers
beside), so no model is loaded. Questions are the same where id and right answer are. A difference is always
the second less the first. Its interval draws questions in pairs (:mod:`tinymodal.eval.intervals`). The
p-value is that of the exact sign test over the questions whose scores differ; where replies are either right
or wrong that is McNemar's ("Note on the sampling error of the difference between correlated proportions or
percentages", Psychometrika 12, 1947).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tinymodal.core.errors import DataError
from tinymodal.core.log import say
from tinymodal.eval.compare import names as names_of
from tinymodal.eval.folder import RESULTS, read_rows, read_summaries, replies_path
from tinymodal.eval.intervals import Interval, difference
from tinymodal.eval.pages import answers as page
from tinymodal.eval.results import cell, flat

if TYPE_CHECKING:
    from rich.table import Table

BELOW = "eval"
"""Where a model's folder holds its evaluation."""
SURE = 0.05
"""A p-value below it is a difference that luck would seldom make; as for intervals of 95 %."""
NAMED = 3
"""Of questions that are wrong in some way, named in an error or a note."""


class Row(NamedTuple):
    """What one model made of one question."""

    id: str
    prompt: str
    reply: str
    answer: str
    parsed: str
    score: float
    kind: str
    digest: str


@dataclass(frozen=True, slots=True)
class Gap:
    """Two models over the same questions."""

    n: int
    first: float
    """Mean score, 0..1."""
    second: float
    difference: float
    """``second - first``."""
    interval_95: Interval | None
    """Of the difference; None of fewer than two questions."""
    both_right: int
    only_first_right: int
    only_second_right: int
    both_wrong: int
    first_better: int
    """Questions on which the first scores higher; more than ``only_first_right`` where scores have parts."""
    second_better: int
    p_value: float
    """Two-sided."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two models on one benchmark."""

    name: str
    models: tuple[str, str]
    rows: tuple[tuple[Row, Row], ...]
    """Of the questions that both answered, in the first one's order."""
    whole: Gap
    kinds: Mapping[str, Gap]
    """By ``meta["kind"]``; empty where there are not several."""
    alone: tuple[int, int]
    """Questions that only the first, only the second answered."""
    asked_otherwise: int
    """Questions with other words or other media in the two, as far as the rows tell."""
    ungraded: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """Questions whose reply by the first, by the second has no grade; they are left out."""
    told: tuple[Mapping[str, Any], Mapping[str, Any]] = field(default=({}, {}))
    """What ``results.json`` tells of each; empty where it tells nothing of these replies."""

    def summary(self) -> dict[str, Any]:
        """For a file: everything but the rows."""
        return {
            "models": list(self.models),
            **asdict(self.whole),
            "kinds": {kind: asdict(gap) for kind, gap in self.kinds.items()},
            "only_first_answered": self.alone[0],
            "only_second_answered": self.alone[1],
            "asked_otherwise": self.asked_otherwise,
            "first_ungraded": len(self.ungraded[0]),
            "second_ungraded": len(self.ungraded[1]),
        }


def compare_folders(a: Path, b: Path, names: Sequence[str] = ()) -> list[Pair]:
    """Compare two evaluations, benchmark by benchmark.

    Args:
        a: a folder with replies, or a model's that holds one as ``eval``; the first of each pair.
        b: likewise; the second.
        names: of benchmarks; none: all that both were asked. What only one was asked is told then.

    Raises:
        DataError: a folder without replies, nothing in common, or questions that are not the same.
    """
    places = evaluation(a), evaluation(b)
    if names:
        return [compare(a, b, name) for name in names]
    first, second = (_asked(place) for place in places)
    both = [name for name in first if name in second]
    if not both:
        raise DataError(
            f"{places[0]} and {places[1]}: no benchmark in common; expected replies to the same one, found "
            f"{_list(first)} and {_list(second)}. Evaluate both with the same --on."
        )
    for found, place in ((first, places[0]), (second, places[1])):
        if alone := [name for name in found if name not in both]:
            say(f"{place}: only here: {_list(alone)}; left out of the comparison")
    return [compare(a, b, name) for name in both]


def compare(a: Path, b: Path, name: str) -> Pair:
    """Compare two evaluations on the benchmark called ``name``.

    Raises:
        DataError: no replies to it, none in common, or questions that are not the same.
    """
    places, labels = [evaluation(folder) for folder in (a, b)], names_of([a, b])
    (first, no_first, told_first), (second, no_second, told_second) = (_read(place, name) for place in places)
    rows = tuple((row, second[row.id]) for row in first.values() if row.id in second)
    if not rows:
        raise DataError(
            f"{name}: {labels[0]} and {labels[1]} answered no question in common (of {len(first):,}, e.g. "
            f"{next(iter(first))!r}, and {len(second):,}, e.g. {next(iter(second))!r}); expected the same "
            f"ids. Evaluate both on the same files."
        )
    _check_same(rows, name, labels)
    kinds: dict[str, list[tuple[Row, Row]]] = {}
    for pair in rows:
        kinds.setdefault(pair[0].kind, []).append(pair)
    return Pair(
        name=name,
        models=(labels[0], labels[1]),
        rows=rows,
        whole=gap(rows),
        kinds={kind: gap(found) for kind, found in kinds.items()} if len(kinds) > 1 else {},
        alone=(
            len(first.keys() - second.keys() - set(no_second)),
            len(second.keys() - first.keys() - set(no_first)),
        ),
        asked_otherwise=sum(bool(x.digest and y.digest) and x.digest != y.digest for x, y in rows),
        ungraded=(no_first, no_second),
        told=(told_first, told_second),
    )


def gap(rows: Sequence[tuple[Row, Row]]) -> Gap:
    """The numbers over questions that both answered; at least one."""
    scores = [(x.score, y.score) for x, y in rows]
    first, second = ([pair[side] for pair in scores] for side in (0, 1))
    mean, interval = difference(first, second)
    rights = [(page.is_right(x), page.is_right(y)) for x, y in scores]
    first_better, second_better = sum(x > y for x, y in scores), sum(x < y for x, y in scores)
    return Gap(
        n=len(rows),
        first=math.fsum(first) / len(rows),
        second=math.fsum(second) / len(rows),
        difference=mean,
        interval_95=interval,
        both_right=rights.count((True, True)),
        only_first_right=rights.count((True, False)),
        only_second_right=rights.count((False, True)),
        both_wrong=rights.count((False, False)),
        first_better=first_better,
        second_better=second_better,
        p_value=sign_test(first_better, second_better),
    )


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of so many wins and losses where either is as likely; ties do not count.

    Twice the probability of the rarer side being so rare or rarer, at most 1. Exact but for rounding: first
    the likeliest of these terms, a product whose exponent is kept apart so that nothing overflows, then the
    others as ever smaller shares of it.
    """
    n, k = wins + losses, min(wins, losses)
    if abs(wins - losses) <= 1:
        return 1.0
    last, exponent = 1.0, 1 - n
    for i in range(1, k + 1):
        last, more = math.frexp(last * (n - k + i) / i)
        exponent += more
    total = share = 1.0
    for i in range(k, 0, -1):
        share *= i / (n - i + 1)
        total += share
        if share < 1e-18:
            break
    return min(1.0, math.ldexp(last * total, exponent))


# What is compared


def evaluation(folder: Path) -> Path:
    """The folder with the replies: ``folder`` itself, or ``eval`` in it.

    Raises:
        DataError: neither holds any.
    """
    for place in (folder, folder / BELOW):
        if any(place.glob(f"*{_END}")):
            return place
    what = "holds no replies" if folder.is_dir() else "is no folder"
    raise DataError(
        f"{folder}: {what}; expected NAME{_END} of an evaluation, there or in {BELOW}. Run tinymodal eval "
        f"first."
    )


_END = replies_path(Path(), "").name


def _asked(folder: Path) -> list[str]:
    """Names of the benchmarks; without those that are left there from another model."""
    found = sorted(path.name.removesuffix(_END) for path in folder.glob(f"*{_END}"))
    summaries = read_summaries(folder / RESULTS)
    return [name for name in found if name in summaries] if summaries else found


def _read(folder: Path, name: str) -> tuple[dict[str, Row], tuple[str, ...], Mapping[str, Any]]:
    """Graded replies by the ids of their questions, the ids of the others, and what the results tell of them.

    Nothing where the results are about other replies.
    """
    path = replies_path(folder, name)
    found: dict[str, Row] = {}
    ungraded: dict[str, None] = {}
    runs: dict[str, None] = {}
    for each in read_rows(path):
        if (key := str(each["id"])) in found or key in ungraded:
            raise DataError(
                f"{path}: two rows answer {key!r}; expected one. Evaluate again, or take one out."
            )
        runs[str(each["run"])] = None
        if each["score"] is None:
            ungraded[key] = None
        else:
            found[key] = _row(each, path)
    if ungraded and not found:
        raise DataError(
            f"{path}: none of {len(ungraded):,} replies to {name} has a grade; expected those of a language "
            f"model. Evaluate again with --judge."
        )
    if not found:
        others = [other for other in _asked(folder) if other != name]
        raise DataError(
            f"{path}: no replies to {name}; expected a row for each question, found replies to "
            f"{_list(others)}. Run tinymodal eval with --on {name}."
        )
    if len(runs) > 1:
        raise DataError(
            f"{path}: holds replies of {len(runs)} runs ({_list(list(runs))}); expected those of one model. "
            f"Let the evaluation run to its end."
        )
    summary = read_summaries(folder / RESULTS).get(name, {})
    told = summary if next(iter(runs)).startswith(str(summary.get("run"))) else {}
    return found, tuple(ungraded), told


def _row(row: Mapping[str, Any], path: Path) -> Row:
    score, meta = row["score"], row["meta"]
    if not isinstance(score, int | float) or not math.isfinite(score) or not isinstance(meta, Mapping):
        raise DataError(
            f"{path}: {row['id']!r}: score is {score!r} and meta {str(meta)[:60]!r}; expected a number and "
            f"an object. Evaluate again."
        )
    name, prompt, reply, answer, parsed = (
        str(row[key]) for key in ("id", "prompt", "reply", "answer", "parsed")
    )
    kind, digest = str(meta.get("kind", "")), str(row["digest"] or "")
    return Row(name, prompt, reply, answer, parsed, float(score), kind, digest)


def _check_same(rows: Iterable[tuple[Row, Row]], name: str, labels: Sequence[str]) -> None:
    """Refuse questions whose right answers differ."""
    other = [(x.id, x.answer, y.answer) for x, y in rows if x.answer != y.answer]
    if other:
        shown = "; ".join(f"{row}: {_short(x)} and {_short(y)}" for row, x, y in other[:NAMED])
        raise DataError(
            f"{name}: {len(other):,} questions have one right answer in {labels[0]} and another in "
            f"{labels[1]} ({shown}{'; ...' if len(other) > NAMED else ''}); expected the same questions. "
            f"Evaluate both on the same files."
        )


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"


def _named(names: Sequence[str]) -> str:
    return ", ".join(map(_short, names[:NAMED])) + (", ..." if len(names) > NAMED else "")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


# What is shown


def sentence(pair: Pair) -> str:
    """Who is better, by how much, and how surely."""
    gap, (first, second) = pair.whole, pair.models
    span = f" (95 % interval {span_of(gap.interval_95)})" if gap.interval_95 else ""
    if gap.first_better == gap.second_better == 0:
        return f"{first} and {second} score the same on every question."
    by = f"{in_points(gap.difference)} points{span}, {p_value(gap.p_value)}"
    if gap.p_value >= SURE or not gap.interval_95 or gap.interval_95[0] <= 0 <= gap.interval_95[1]:
        return f"No sure difference: {second} less {first} is {by}."
    return f"{second if gap.difference > 0 else first} is better: {second} less {first} is {by}."


def notes(pair: Pair) -> list[str]:
    """What else has to be known: counts, and what makes the comparison less than whole."""
    gap, (first, second) = pair.whole, pair.models
    lines = [
        f"Both right {gap.both_right:,}, only {first} {gap.only_first_right:,}, only {second} "
        f"{gap.only_second_right:,}, both wrong {gap.both_wrong:,}."
    ]
    if (gap.first_better, gap.second_better) != (gap.only_first_right, gap.only_second_right):
        lines.append(f"{first} scores higher on {gap.first_better:,}, {second} on {gap.second_better:,}.")
    for name, alone in zip(pair.models, pair.alone, strict=True):
        if alone:
            lines.append(f"{alone:,} questions that only {name} answered are left out.")
    for name, ungraded in zip(pair.models, pair.ungraded, strict=True):
        if ungraded:
            lines.append(
                f"{len(ungraded):,} replies of {name} without a grade are left out: {_named(ungraded)}."
            )
    if pair.asked_otherwise:
        lines.append(f"{pair.asked_otherwise:,} questions were put to the two in other words or pictures.")
    for name, told_of in zip(pair.models, pair.told, strict=True):
        if told_of and not told_of["complete"]:
            lines.append(f"The evaluation of {name} is incomplete.")
    return lines


def pair_tables(pairs: Sequence[Pair]) -> list[Table]:
    """The comparisons for the terminal, in per cent."""
    return [_terminal(pair) for pair in pairs]


def _terminal(pair: Pair) -> Table:
    from rich.table import Table
    from rich.text import Text

    first, second = pair.models
    caption = "\n".join([sentence(pair), *notes(pair)])
    table = Table(
        title=Text(f"{pair.name}: {second} less {first}, mean score in %", style="bold"),
        title_justify="left",
        caption=Text(caption, style="dim"),
        caption_justify="left",
        min_width=min(80, len(pair.name) + len(first) + len(second) + 32),
    )
    table.add_column("")
    for name in (first, second, "difference", "95 % interval", "p", "questions"):
        table.add_column(Text(name), justify="right")
    for kind, gap in pair.kinds.items():
        table.add_row(Text(kind or "other"), *cells_of(gap))
    table.add_section()
    table.add_row("mean score", *cells_of(pair.whole), style="bold")
    if official := headlines_of(pair):
        table.add_row(*map(Text, official), style="dim")
    return table


def cells_of(gap: Gap) -> list[str]:
    return [
        f"{100 * gap.first:.1f}",
        f"{100 * gap.second:.1f}",
        in_points(gap.difference),
        span_of(gap.interval_95),
        p_value(gap.p_value).removeprefix("p ").removeprefix("= "),
        f"{gap.n:,}",
    ]


def headlines_of(pair: Pair) -> tuple[str, str, str] | None:
    """The benchmarks' own number of each as their results have it, over all that each was asked."""
    found = [flat(told_of["metrics"]) for told_of in pair.told if told_of]
    path = str(pair.told[0].get("headline", ""))
    if len(found) < 2 or any(path not in numbers for numbers in found):
        return None
    return f"{pair.told[0]['metric']} ({path})", cell(found[0][path], True), cell(found[1][path], True)


def in_points(value: float) -> str:
    return f"{100 * value:+.1f}"


def span_of(interval: Interval | None) -> str:
    return f"{in_points(interval[0])} to {in_points(interval[1])}" if interval else "–"


def p_value(value: float) -> str:
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"
