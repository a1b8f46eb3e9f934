"""What came of a benchmark: the replies with their scores, the numbers, and how they were made.

``results.json`` holds ``{task: {metrics, n, complete, protocol, ...}}``: the numbers as the official scorer
prints them, of how many questions, whether nothing was missing, and by which rules.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tinymodal.eval.benchmark import MEAN, Benchmark, Metrics, Problems, Question, Score, best_constants, mean
from tinymodal.eval.intervals import Interval, interval, mean_sums
from tinymodal.eval.own import numbers
from tinymodal.eval.speaking import Timing

if TYPE_CHECKING:
    from rich.table import Table

ROWS = {"wer": "words (wer)", "cer": "characters (cer)"}
"""What a table calls some numbers."""
NOT_FINITE = "numbers that are not finite"


@dataclass(frozen=True, slots=True)
class Answered:
    """One question with what came of it."""

    question: Question
    reply: str
    score: Score
    heard: str | None = None
    """What a listener heard, where replies were spoken."""


@dataclass(frozen=True)
class Result:
    """One benchmark's numbers over one model."""

    benchmark: Benchmark
    answered: tuple[Answered, ...]
    limit: int | None
    mark: str
    """Of the model, see :func:`fingerprint`."""
    timing: Timing | None = None
    """Of the first replies, where they were spoken and any had a word."""
    problems: Problems = field(default_factory=Problems)
    """Of questions and answers; with any the score is incomplete."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """How the replies were made, beside what the benchmark itself says."""

    @functools.cached_property
    def numbers(self) -> dict[str, float]:
        made: dict[str, float] = numbers(self.benchmark, self.benchmark.reduce, self.scores)
        return made

    @property
    def scores(self) -> list[Score]:
        return [row.score for row in self.answered]

    @functools.cached_property
    def metrics(self) -> Metrics:
        """The numbers as the official scorer prints them; None, and a problem noted, for one not finite."""
        report = self.benchmark.report
        made = self.numbers if report is None else numbers(self.benchmark, report, self.scores)
        for path, value in flat(made).items():
            if not math.isfinite(value):
                self.problems.add(NOT_FINITE, f"{path} is {value}")
        told: Metrics = _finite(made)
        return told

    @functools.cached_property
    def interval(self) -> Interval | None:
        """95 % of the headline; None where it cannot be told."""
        scores = self.scores
        if not scores:
            return None
        if self.benchmark.sums is not None:
            found = interval(self.benchmark.sums(scores))
        elif self.benchmark.report is not None or self.benchmark.reduce is not mean:
            return None  # its headline need not be the mean of the values, or not in their unit
        else:
            found = interval(mean_sums(scores))
        return found if found is not None and all(map(math.isfinite, found)) else None

    def summary(self) -> dict[str, Any]:
        """What ``results.json`` holds of it."""
        questions = [row.question for row in self.answered]
        constants = {}
        official = self.benchmark.report is not None
        if not (self.benchmark.lower_is_better or official) and any(q.meta.get("kind") for q in questions):
            constants = best_constants(questions)
        heard = self.benchmark.aloud
        spoken: dict[str, Any] = {} if heard is None else {"listener": heard.listener().name}
        if self.timing is not None:
            spoken["timing"] = asdict(self.timing)
        return {
            "metric": self.benchmark.metric,
            "metrics": self.metrics,
            "headline": self.benchmark.headline,
            "interval_95": self.interval,
            "n": len(self.answered),
            "complete": self.limit is None and not self.problems,
            "problems": self.problems.told(),
            "protocol": {
                "source": self.benchmark.source,
                "max_new_tokens": self.benchmark.max_new_tokens,
                **self.protocol,
            },
            "limit": self.limit,
            "best_constant": {
                kind: {"answer": c.answer, "accuracy": c.accuracy} for kind, c in constants.items()
            },
            "run": self.mark,
            **spoken,
        }

    @property
    def speech(self) -> dict[str, float]:
        """``wer``, ``cer``, ``first_sound_ms`` and ``real_time_factor`` of replies that were spoken.

        Empty where they were not, or none had a word.
        """
        if self.timing is None:
            return {}
        when = {key: getattr(self.timing, key) for key in ("first_sound_ms", "real_time_factor")}
        return self.numbers | when


def tables(results: Sequence[Result]) -> list[Table]:
    """The results for the terminal; benchmarks of one family stand side by side."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.benchmark.family or result.benchmark.name, []).append(result)
    return [_table(group) for group in groups.values()]


def _table(group: Sequence[Result]) -> Table:
    from rich.table import Table
    from rich.text import Text

    first = group[0]
    single = len(group) == 1
    official = first.benchmark.report is not None
    limited = f", first {first.limit} questions only" if first.limit is not None else ""
    lower = ", lower is better" if first.benchmark.lower_is_better else ""
    name = first.benchmark.name if single else first.benchmark.family
    unit = "" if official else " in %"
    # As Text: what comes from a file may look like markup.
    title = Text(f"{name} ({first.benchmark.metric}{unit}{lower}{limited})", style="bold")
    # rich breaks a title where its table ends, and one of two rates is narrow.
    table = Table(title=title, title_justify="left", min_width=min(len(title), 80))
    summaries = [result.summary() for result in group]
    constant: Mapping[str, Any] = summaries[0]["best_constant"]
    table.add_column("")
    for result in group:
        shown = "errors" if lower else "score"
        table.add_column(Text(shown if single else result.benchmark.name), justify="right")
    if constant:
        table.add_column("best constant", justify="right", style="dim")
    flats = [flat(summary["metrics"]) for summary in summaries]
    keys = list(dict.fromkeys(key for found in flats for key in found))
    if constant or MEAN in keys:
        keys = [*(key for key in keys if key != MEAN), MEAN]
    for key in keys:
        if key == MEAN:
            table.add_section()
        cells = [cell(found.get(key), official) for found in flats]
        if constant:
            values = [c["accuracy"] for c in constant.values()]
            cells.append(cell(constant[key]["accuracy"] if key in constant else sum(values) / len(values)))
        bold = key in (MEAN, "wer", first.benchmark.headline)
        table.add_row(Text(ROWS.get(key, key)), *cells, style="bold" if bold else None)
    if any(summary["interval_95"] for summary in summaries):
        spans = [summary["interval_95"] for summary in summaries]
        between = [f"{cell(s[0], official)} to {cell(s[1], official)}" if s else "–" for s in spans]
        table.add_row("95 % interval", *between, *([""] if constant else []), style="dim")
    table.add_row("questions", *(f"{summary['n']:,}" for summary in summaries), style="dim")
    return table


def _finite(value: Any) -> Any:
    """The same with None for each number that is not finite: json has no word for it."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(metrics: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """Nested numbers by their path with dots; what is no number is left out."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, list):
            value = {str(place): one for place, one in enumerate(value)}
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{key}.")
        elif isinstance(value, int | float):
            found[before + key] = value
    return found


def cell(value: float | None, official: bool = False) -> str:
    """A number as tables show it: a share in per cent, or as the official scorer prints it."""
    if value is None:
        return "–"
    if not official:
        return f"{100 * value:.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}"


def problem_lines(result: Result) -> list[str]:
    """A sentence for each kind of problem, with the first few by name."""
    lines = []
    for kind, told in result.problems.told().items():
        names = "; ".join(told["named"][:3]) + ("; ..." if told["count"] > 3 else "")
        lines.append(f"{result.benchmark.name}: incomplete: {told['count']:,} {kind}: {names}")
    return lines
