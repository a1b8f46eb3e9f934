"""Bootstrap intervals: seeded, and as wide as the theory says."""

from __future__ import annotations

import numpy as np
import pytest

from tinymodal.eval.benchmark import Score, Sums
from tinymodal.eval.intervals import _resampled, difference, interval, mean_sums, percent_sums


def scores(values):
    return [Score(float(value)) for value in values]


def test_the_interval_of_a_share_is_that_of_the_binomial():
    found = interval(mean_sums(scores([1] * 300 + [0] * 700)))
    # 1.96 standard errors of a share of 0.3 among 1,000: 0.0284.
    assert found.low == pytest.approx(0.3 - 0.0284, abs=0.004)
    assert found.high == pytest.approx(0.3 + 0.0284, abs=0.004)


def test_the_same_scores_have_the_same_interval():
    some = scores(np.random.default_rng(3).random(50))
    assert interval(mean_sums(some)) == interval(mean_sums(some))
    assert interval(mean_sums(some)) != interval(mean_sums(some), seed=1)


def test_per_cent_are_a_hundred_times_the_mean():
    some = scores(np.random.default_rng(3).random(50))
    assert interval(percent_sums(some)) == pytest.approx([100 * at for at in interval(mean_sums(some))])


def test_one_question_has_no_interval():
    assert interval(mean_sums(scores([1]))) is None


def test_values_drawn_by_their_number_are_spread_as_units_drawn_one_by_one():
    rows = np.repeat([[0.0, 1.0], [1.0, 1.0]], [600, 400], axis=0)
    many = _resampled(rows, np.random.default_rng(0), 4_000)[:, 0]
    # No value occurs twice, so units are drawn; the noise is far below what is measured.
    apart = rows + np.linspace(0, 1e-9, len(rows))[:, None]
    single = _resampled(apart, np.random.default_rng(0), 4_000)[:, 0]
    assert many.mean() == pytest.approx(single.mean(), rel=0.01)
    assert many.std() == pytest.approx(single.std(), rel=0.05)


def test_pairs_are_told_apart_where_single_scores_could_not_be():
    """A model that is better by little on questions of very different difficulty."""
    hard = np.random.default_rng(1).random(200)
    gap, span = difference(hard, hard + 0.02)
    assert gap == pytest.approx(0.02)
    assert span.low == pytest.approx(0.02)
    alone = interval(mean_sums(scores(hard)))
    assert alone.high - alone.low > 0.05


def test_a_draw_in_which_the_number_does_not_exist_is_left_out():
    rows = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    found = interval(Sums(rows, lambda sums: sums[..., 0] / sums[..., 1]))
    assert found == (1.0, 1.0)
