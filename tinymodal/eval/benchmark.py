"""What a benchmark is: questions with answers, a score per reply, and how scores become numbers.

Data, not a class hierarchy: a benchmark of your own is one file with one ``BENCHMARK = Benchmark(...)`` in
it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tinymodal.core.errors import DataError
from tinymodal.core.types import Sample

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that ends with the user's turn, and the right answer to it."""

    sample: Sample
    answer: str
    meta: Mapping[str, str] = field(default_factory=dict)
    """What the reducers group by, e.g. ``{"kind": "colour"}``; written beside every reply."""


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
    aloud: Aloud | None = None
    """Replies are spoken as well: ``score`` is given the question with the reply's text as its answer (and as
    ``meta["reference"]``), and what the listener heard as the reply."""


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
