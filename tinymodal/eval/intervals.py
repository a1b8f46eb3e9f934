"""How far a score could be off by the luck of the questions: percentile bootstrap intervals.

Questions (or the units that are drawn together, such as the two questions about one picture of MME) are drawn
with replacement as often as there are any, and the number is computed again, 1,000 times; the interval holds
the middle 95 %. Source: B. Efron, "Bootstrap methods: another look at the jackknife", 1979. Seeded: the same
scores have the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinymodal.eval.benchmark import Score, Sums

RESAMPLES = 1_000
LEVEL = 0.95
FEW = 20
"""Where units have so many times fewer distinct values than there are units, values are drawn, not units."""


class Interval(NamedTuple):
    """From, to."""

    low: float
    high: float


def mean_of(values: Sequence[float] | NDArray[np.float64]) -> Sums:
    """The mean of values, each of a unit of its own."""
    column = np.asarray(values, dtype=np.float64)
    return Sums(np.stack([column, np.ones_like(column)], axis=1), lambda sums: sums[..., 0] / sums[..., 1])


def mean_sums(scores: Sequence[Score]) -> Sums:
    """The mean of the scores' values."""
    return mean_of([score.value for score in scores])


def percent_sums(scores: Sequence[Score]) -> Sums:
    """The mean of the scores' values in %."""
    return Sums(mean_sums(scores).rows, lambda sums: 100 * sums[..., 0] / sums[..., 1])


def interval(sums: Sums, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval | None:
    """The 95 % interval of the number that ``sums`` computes; None where there are fewer than two units."""
    if len(sums.rows) < 2:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = sums.value(_resampled(sums.rows, np.random.default_rng(seed), resamples))
    drawn = drawn[np.isfinite(drawn)]  # a category may be missing from a draw
    if not len(drawn):
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(low), float(high))


def difference(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0
) -> tuple[float, Interval | None]:
    """Mean of ``second - first`` over the same questions, and its interval.

    The questions are drawn in pairs, so what makes a question hard for both models is no noise.
    """
    gaps = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    return float(gaps.mean()), interval(mean_of(gaps), seed=seed)


def _resampled(rows: NDArray[np.float64], rng: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    """Sums over units drawn with replacement, float64 [resamples, columns]."""
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    if len(distinct) * FEW <= len(rows):
        # The same distribution: how often each value is drawn is multinomial.
        draws = rng.multinomial(len(rows), counts / len(rows), size=resamples)
        return draws.astype(np.float64) @ distinct
    found = np.empty((resamples, rows.shape[1]))
    for i in range(resamples):
        draws = np.bincount(rng.integers(0, len(rows), len(rows)), minlength=len(rows))
        found[i] = draws @ rows
    return found
