import itertools
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.core.errors import RecipeError
from tinymodal.data.mixture import PERIOD, Mixture
from tinymodal.data.sources import WINDOW


class Sized:
    def __init__(self, size, blocks=None):
        self.size, self.blocks = size, blocks

    def __len__(self):
        return self.size

    def sample(self, index):
        raise AssertionError("a mixture draws, it does not read")


class Made:
    def sample(self, index):
        raise AssertionError("a mixture draws, it does not read")


def draws(mixture, start, stop):
    return [mixture(n) for n in range(start, stop)]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 2**32), st.data())
def test_every_epoch_of_every_source_holds_each_row_once(sizes, seed, data):
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    mixture = Mixture([Sized(size) for size in sizes], weights, seed)
    rows = {n: [] for n in range(len(sizes))}
    for draw in draws(mixture, 0, 400):
        rows[draw.source].append(draw.row)

    for n, size in enumerate(sizes):
        for start in range(0, len(rows[n]) - size + 1, size):
            assert sorted(rows[n][start : start + size]) == list(range(size))


THREE = ([Sized(1000), Made(), Sized(7)], [3, 2, 0.5], 5)
IN_ORDER = draws(Mixture(*THREE), 0, 3 * PERIOD + 1)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 3 * PERIOD), min_size=1, max_size=20))
def test_a_draw_depends_on_its_number_alone(numbers):
    one = Mixture(*THREE)
    assert [one(n) for n in numbers] == [IN_ORDER[n] for n in numbers]


def test_the_order_is_this_one_on_every_machine():
    """Resume relies on it: a change here makes every saved position meaningless."""
    mixture = Mixture([Sized(5), Made()], [2, 1], seed=1)
    assert [tuple(draw) for draw in draws(mixture, 0, 12)] == GOLDEN


GOLDEN = [(0, 2), (0, 4), (1, 0), (0, 1), (1, 1), (0, 0), (0, 3), (1, 2), (0, 3), (1, 3), (0, 1), (0, 0)]


def test_shares_follow_the_weights_over_any_stretch():
    weights = [5, 3, 1.5, 0.5]
    mixture = Mixture([Made()] * 4, weights, seed=3)
    sources = [draw.source for draw in draws(mixture, 0, 3 * PERIOD)]

    # Most ever seen off over 100 seeds: 1.85 draws; independent draws are off by 55 after this many.
    counts = Counter()
    for n, source in enumerate(sources, 1):
        counts[source] += 1
        for s, weight in enumerate(weights):
            assert abs(counts[s] - n * weight / 10) < 3


def test_a_source_that_counts_up_never_repeats_or_leaves_out_a_number():
    mixture = Mixture([Made(), Sized(3)], [1, 2])
    made = [draw.row for draw in draws(mixture, 0, 2 * PERIOD) if draw.source == 0]
    assert made == list(range(len(made)))


def test_orders_differ_between_epochs_seeds_and_sources():
    def order(seed, source, epoch):
        mixture = Mixture([Sized(50), Sized(50)], seed=seed)
        rows = [d.row for d in draws(mixture, 0, 400) if d.source == source]
        return tuple(rows[50 * epoch : 50 * epoch + 50])

    orders = {order(*key) for key in itertools.product((0, 1), (0, 1), (0, 1, 2))}
    assert len(orders) == 12


def test_every_order_of_four_rows_is_equally_likely():
    mixture = Mixture([Sized(4)])
    seen = Counter(tuple(mixture(4 * e + n).row for n in range(4)) for e in range(9_600))

    # chi-square of 24 equal classes: mean 23, and above 49.7 once in 1,000 generators that are fair.
    assert len(seen) == 24
    assert sum((count - 400) ** 2 / 400 for count in seen.values()) < 49.7


def test_rows_of_parquet_stay_within_a_few_groups_at_a_time_and_are_still_shuffled():
    blocks = (100,) * 40
    mixture = Mixture([Sized(4000, blocks)], seed=2)
    rows = [draw.row for draw in draws(mixture, 0, 4000)]

    assert sorted(rows) == list(range(4000))
    windows = [[row // 100 for row in rows[n : n + 100 * WINDOW]] for n in range(0, 4000, 100 * WINDOW)]
    assert all(len(set(window)) == WINDOW for window in windows)
    assert all(len(set(window[:50])) == WINDOW for window in windows)
    assert set(windows[0]) != set(range(WINDOW))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1, 0], r"data\[1\].weight: 0; expected a number above 0"),
        ([float("nan"), 1], r"data\[0\].weight: nan"),
        ([1, float("inf")], r"data\[1\].weight: inf"),
        ([1], "2 sources with 1 weights"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights, words):
    with pytest.raises(RecipeError, match=words):
        Mixture([Made(), Made()], weights)


def test_no_source_is_refused_and_the_rarest_is_still_drawn():
    with pytest.raises(RecipeError, match="0 sources"):
        Mixture([])
    mixture = Mixture([Made(), Made()], [1, 1e-9])
    assert sum(draw.source for draw in draws(mixture, 0, 3 * PERIOD)) == 3


sources_of = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(sources_of, st.integers(0, 99), st.data())
def test_sources_that_leave_are_read_as_often_as_they_should_and_then_no_more(sizes, seed, data):
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(sizes), max_size=len(sizes)))
    epochs = data.draw(st.lists(st.none() | st.integers(1, 3), min_size=len(sizes), max_size=len(sizes)))
    mixture = Mixture([Sized(size) for size in sizes], weights, seed, "drop", epochs)

    assert mixture.total == sum(size * (times or 1) for size, times in zip(sizes, epochs, strict=True))
    found = Counter(draws(mixture, 0, mixture.total))
    assert found == {
        (n, row): times or 1
        for n, (size, times) in enumerate(zip(sizes, epochs, strict=True))
        for row in range(size)
    }
    with pytest.raises(IndexError):
        mixture(mixture.total)


@settings(deadline=None, max_examples=40)
@given(sources_of, st.integers(0, 99), st.data())
def test_stopping_is_when_the_first_source_has_been_read(sizes, seed, data):
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    epochs = data.draw(st.lists(st.integers(1, 3), min_size=len(sizes), max_size=len(sizes)))
    sources = [Sized(size) for size in sizes]
    mixture = Mixture([*sources, Made()], [*weights, 1], seed, "stop", [*epochs, None])

    found = draws(mixture, 0, mixture.total)
    drawn = Counter(draw.source for draw in found)
    ended = [n for n, size in enumerate(sizes) if drawn[n] == size * epochs[n]]
    assert ended == [found[-1].source]
    assert all(drawn[n] <= size * epochs[n] for n, size in enumerate(sizes))
    # Up to there nothing differs from a mixture that goes on.
    assert found == draws(Mixture([*sources, Made()], [*weights, 1], seed), 0, mixture.total)


def test_those_that_stay_keep_their_shares_among_themselves():
    mixture = Mixture([Sized(500), Sized(9000), Sized(3000)], [2, 3, 1], 4, "drop")
    sources = [draw.source for draw in draws(mixture, 0, mixture.total)]
    gone = len(sources) - 1 - sources[::-1].index(0) + 1
    assert gone == pytest.approx(1500, abs=6)
    after = Counter(sources[gone : gone + 4000])
    assert after[1] == pytest.approx(3000, abs=6)
    assert after[0] == 0


def test_a_source_without_a_length_never_leaves():
    assert Mixture([Made(), Made()], ends="stop").total is None
    mixture = Mixture([Made(), Sized(5)], ends="drop")
    assert mixture.total is None
    drawn = draws(mixture, 0, 2 * PERIOD)
    assert sorted(draw.row for draw in drawn if draw.source == 1) == list(range(5))
    assert [draw.row for draw in drawn if draw.source == 0] == list(range(2 * PERIOD - 5))


ENDING = ([Sized(900), Sized(7000), Sized(7)], [3, 2, 0.5], 5, "drop", [2, 1, 9])
IN_ORDER_TO_THE_END = draws(Mixture(*ENDING), 0, 8863)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 8862), min_size=1, max_size=20))
def test_a_draw_of_a_mixture_that_ends_depends_on_its_number_alone(numbers):
    one = Mixture(*ENDING)
    assert [one(n) for n in numbers] == [IN_ORDER_TO_THE_END[n] for n in numbers]


def test_an_epoch_of_two_million_rows_takes_little_memory():
    mixture = Mixture([Sized(2_000_000)])
    tracemalloc.start()
    try:
        mixture(0), mixture(2_000_000), mixture(4_000_000)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 20e6  # two epochs of 4 bytes a row
    assert most < 120e6
