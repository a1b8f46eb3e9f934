"""What a benchmark is: questions with answers, a score per reply, and how scores become numbers.

Data, not a class hierarchy: a benchmark of your own is one file with one ``BENCHMARK = Benchmark(...)`` in
it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tinymodal.core.errors import DataError
from tinymodal.core.types import Sample, Text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that ends with the user's turn, and the right answer to it."""

    sample: Sample
    answer: str
    meta: Mapping[str, str] = field(default_factory=dict)
    """What the reducers group by, e.g. ``{"kind": "colour"}``; written beside every reply."""

    @property
    def words(self) -> str:
        """What is asked, without its pictures and sounds."""
        parts = (part for message in self.sample.messages for part in message.parts)
        return "".join([part.text for part in parts if isinstance(part, Text)])


@dataclass(frozen=True, slots=True)
class Score:
    """What one reply is worth."""

    value: float
    """0 (wrong) to 1 (right)."""
    parsed: str = ""
    """What the scorer understood the reply to say."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """The question's ``meta``; filled in by the run, a scorer leaves it empty."""


MEAN = "mean"
"""Names the number that a benchmark is known by; no category may be called so."""

Reducer = Callable[[Sequence[Score]], dict[str, float]]
Metrics = dict[str, Any]
"""Name -> number or further ``Metrics``: nested and in the units in which the official scorer prints them."""


class Sums(NamedTuple):
    """A number as a function of sums over units, which is all that a bootstrap has to know."""

    rows: NDArray[np.float64]
    """[units, columns]. A unit is what is drawn together: a question, or all questions about one picture."""
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    """Sums, [..., columns] -> the number, [...]."""


class Given(NamedTuple):
    """An answer that was made elsewhere."""

    id: str
    """Of the question it answers: its ``sample.id``."""
    text: str
    where: str
    """File and row, for errors."""
    verdicts: tuple[str, ...] = ()
    """What judges wrote about it, one each, where the file tells; the score's value is then their mean, and
    ``parsed`` what was understood of each, with :data:`BETWEEN` between."""


BETWEEN = "; "
"""Stands between what was understood of several verdicts, in :attr:`Score.parsed`."""


class Problems:
    """What is wrong with questions and answers: named, counted, and then the score is incomplete."""

    KEPT = 20
    """So many of each kind are named; all are counted."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.named: dict[str, list[str]] = {}

    def add(self, kind: str, what: str) -> None:
        """Note one: ``kind`` in the plural ("answers to no question"), ``what`` names file and row or id."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(names := self.named.setdefault(kind, [])) < self.KEPT:
            names.append(what)

    def clear(self) -> None:
        """Forget all: the questions are read anew."""
        self.counts.clear()
        self.named.clear()

    def merge(self, told: Mapping[str, Any]) -> None:
        """Add what another one :meth:`told`."""
        for kind, one in told.items():
            self.counts[kind] = self.counts.get(kind, 0) + one["count"]
            names = self.named.setdefault(kind, [])
            names += one["named"][: self.KEPT - len(names)]

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """``3 questions without an answer: a; b; c``, and so on."""
        return "; ".join(
            f"{count:,} {kind}: {'; '.join(self.named[kind][:3])}" for kind, count in self.counts.items()
        )

    def told(self) -> dict[str, Any]:
        """``{kind: {"count", "named"}}`` for ``results.json``."""
        return {kind: {"count": count, "named": self.named[kind]} for kind, count in self.counts.items()}


def mean(scores: Sequence[Score]) -> dict[str, float]:
    """``{"mean": ...}`` over all scores; empty where there is none."""
    return {MEAN: sum(score.value for score in scores) / len(scores)} if scores else {}


def by_category(key: str) -> Reducer:
    """A mean per value of ``meta[key]``, in order of appearance, and ``mean``: the unweighted mean of those.

    Unweighted, so that a category with many questions does not drown the others. A category that is itself
    called ``mean`` is a ``DataError``.
    """

    def reduce(scores: Sequence[Score]) -> dict[str, float]:
        groups: dict[str, list[float]] = {}
        for score in scores:
            groups.setdefault(score.meta.get(key, "other"), []).append(score.value)
        if MEAN in groups:
            raise DataError(f"a question's {key} is {MEAN!r}, which names the mean of all; rename the {key}.")
        means = {name: sum(values) / len(values) for name, values in groups.items()}
        return means | {MEAN: sum(means.values()) / len(means)} if means else {}

    return reduce


@dataclass(frozen=True, kw_only=True, slots=True)
class Listener:
    """Who writes down what a model says aloud."""

    name: str
    mark: str
    """Changes with what it would hear: replies that another one heard are asked again."""
    hear: Callable[[Sequence[Tensor], int], list[str]]
    """Sounds, float32 [samples] each, and their rate -> a transcript of each; of no samples an empty one."""
    written: Callable[[str], str]
    """A text as this listener would write it."""


@dataclass(frozen=True, slots=True)
class Aloud:
    """Replies are spoken and heard."""

    listener: Callable[[], Listener]
    voice: str | None = None
    """In which the model speaks; None: its first."""


OUR_WORDING = "ours, in the official structure"


@dataclass(frozen=True, kw_only=True, slots=True)
class Judging:
    """How a language model grades a reply."""

    prompt: Callable[[Question, str], Sequence[Mapping[str, str]]]
    """Question and reply -> the messages for the judge, ``{"role", "content"}`` each; none where the reply
    needs no judge and :attr:`Benchmark.score` holds. ``ValueError``: what a judge has to know is missing."""
    read: Callable[[Question, str, str], Score]
    """Question, reply, what the judge wrote -> the score. A verdict that cannot be read is a ``ValueError``:
    the judge is asked again. Where code of your own fails otherwise the reply has no grade in this run."""
    again: str = ""
    """Is put behind the last message then."""
    wording: str = OUR_WORDING
    """Whose words the prompt is in; told in the results."""
    temperature: float = 0.0
    max_tokens: int = 1024
    model: str = "gpt-4"
    """What the official protocol asks; it may be replaced, and is then told."""
    fallback: bool = False
    """Without a judge :attr:`Benchmark.score` counts, as in the official code; else there is no score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Everything a run has to know about one benchmark."""

    name: str
    load: Callable[[], Iterable[Question]]
    score: Callable[[Question, str], Score]
    """Pure: the reply's text in, 0..1 and what was understood out."""
    source: str
    """The official protocol: paper and commit-pinned code, or where the questions come from."""
    reduce: Reducer = mean
    max_new_tokens: int = 64
    metric: str = "accuracy"
    family: str = ""
    """Benchmarks of one family share a table: their numbers have the same names and belong side by side."""
    lower_is_better: bool = False
    """The numbers are rates of errors: no constant answer is put beside them."""
    report: Callable[[Sequence[Score]], Metrics] | None = None
    """The numbers as the official scorer prints them; None: those of ``reduce``."""
    headline: str = MEAN
    """The number it is known by: its path in the report, with dots."""
    sums: Callable[[Sequence[Score]], Sums] | None = None
    """Of the headline, for its confidence interval; None: the mean of the scores' values."""
    answers: Callable[[Path], Iterable[Given]] | None = None
    """Reads a file of answers made elsewhere; None: ``eval/given.py`` does, by the questions' ids."""
    unanswered: Literal["left out", "wrong"] = "left out"
    """What the official scorer makes of a question without an answer; the score is incomplete in any case."""
    submit: Callable[[Mapping[str, str], Path, Problems], None] | None = None
    """Writes the file that the benchmark's test server takes: replies by question id, where to, and where
    questions without a reply are noted."""
    problems: Problems = field(default_factory=Problems, compare=False)
    """What was wrong with its files when they were read."""
    judge: Judging | None = None
    """Replies are graded by a language model; ``score`` is then what can be said without it."""
    aloud: Aloud | None = None
    """Replies are spoken as well: ``score`` is given the question with the reply's text as its answer (and as
    ``meta["reference"]``), and what the listener heard as the reply."""


@dataclass(frozen=True, slots=True)
class File:
    """One thing that a benchmark needs on disk."""

    patterns: tuple[str, ...]
    """Names under which it is found in the folder or below it, the usual one first; ``*`` stands for any
    characters. ``.gz`` and a place inside a ``.tar.gz`` are found as well."""
    what: str
    """What it holds, in a few words."""
    origin: str
    """Where it is from: an address."""
    optional: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class OnDisk:
    """A benchmark whose files the user has: named by ``--on``, found under ``--data``."""

    name: str
    title: str
    """The benchmark in a line."""
    source: str
    files: tuple[File, ...]
    open: Callable[[Path, Problems], Benchmark]
    """The benchmark over the folder. Reads questions lazily (``load``), so that it is quick."""
    folders: tuple[str, ...] = ()
    """Further names that its folder goes by under ``--data``, as in LLaVA's ``playground/data/eval``."""


@dataclass(frozen=True, slots=True)
class Constant:
    """The answer that scores best when it is given to every question, and what it scores."""

    answer: str
    """One for each set of choices that questions offer, joined by `` / ``."""
    accuracy: float


def best_constants(questions: Iterable[Question], key: str = "kind") -> dict[str, Constant]:
    """The best constant answer to each category of questions, found on the questions themselves.

    A model that does not look cannot reliably do better than this, so it stands beside every score. Where a
    question offers its choices (``meta["choices"]``, as in "left or right?") even a blind model knows them,
    so each set of choices has a constant of its own.
    """
    answers: dict[str, dict[str, Counter[str]]] = {}
    for question in questions:
        by_choices = answers.setdefault(question.meta.get(key, "other"), {})
        by_choices.setdefault(question.meta.get("choices", ""), Counter())[question.answer] += 1
    best = {}
    for name, by_choices in answers.items():
        tops = [counter.most_common(1)[0] for counter in by_choices.values()]
        total = sum(counter.total() for counter in by_choices.values())
        best[name] = Constant(" / ".join(answer for answer, _ in tops), sum(n for _, n in tops) / total)
    return best
