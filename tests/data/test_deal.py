import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.core.errors import CheckpointError
from tinymodal.core.types import Image
from tinymodal.data.deal import Deal, merge_states

from .test_loader import Made, content, make


class Numbered:
    """Rows of 3 to 22 tokens; some are bad, some longer than a row of 24, some have a picture."""

    def __init__(self, name, size):
        self.name, self.size = name, size

    def __len__(self):
        return self.size

    def sample(self, index):
        words = f"bad {index}" if index % 11 == 3 else f"{index} " + "w" * (index * 7 % 23)
        return Made.words(words, f"{self.name} {index}", (Image(b"7"),) if index % 5 == 0 else ())


def usable(draws, seq_len=24):
    """How often each sample should be trained, told by its words alone."""
    samples = [Numbered(n, 0).sample(row) for n, row in draws]
    long = [
        sum(2 if isinstance(p, Image) else len(p.text) for m in s.messages for p in m.parts) for s in samples
    ]
    return Counter(
        s.id for s, n in zip(samples, long, strict=True) if int(s.id.split()[1]) % 11 != 3 and n < seq_len
    )


class Training:
    """Loaders of one rank after the other, which step together."""

    def __init__(self, sources, state=None, *, world, **options):
        self.ranks = [make(sources, rank=r, world=world, bad_rows="skip", **options) for r in range(world)]
        if state is not None:
            for loader in self.ranks:
                loader.load_state_dict(json.loads(json.dumps(state)))

    def step(self):
        return [next(loader, None) for loader in self.ranks]

    def state(self):
        return merge_states([loader.state_dict() for loader in reversed(self.ranks)])

    def sum(self, name):
        return sum(getattr(loader, name) for loader in self.ranks)


def names(batches):
    return Counter(name for batch in batches if batch is not None for name in batch.sample_ids)


changes = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=4)
batchings = st.sampled_from(["pack", "grouped"])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    changes,
    batchings,
    st.sampled_from(["drop", "stop"]),
    st.integers(1, 3),
    st.integers(0, 9),
    st.data(),
)
def test_however_often_the_number_of_ranks_changes_each_sample_is_trained_as_often_as_it_should(
    sizes, segments, batching, ends, rows, seed, data
):
    """A bad row or a long one, a rank that has run ahead, the end: none loses or repeats a sample."""
    epochs = data.draw(st.lists(st.integers(1, 2), min_size=len(sizes), max_size=len(sizes)))
    sources = [Numbered(n, size) for n, size in enumerate(sizes)]
    options = {"seq_len": 24, "batch_tokens": 24 * rows, "open_rows": 3, "seed": seed, "patches": 8}
    options |= {"batching": batching, "ends": ends, "epochs": epochs}
    mixture = make(sources, **options).mixture
    expected = usable(map(mixture, range(mixture.total)))
    if not expected:
        return

    trained, state, done = Counter(), None, 0
    for world, steps in [*segments, (segments[0][0], 10_000)]:
        run = Training(sources, state, world=world, **options)
        assert run.sum("done") == done
        for _ in range(steps):
            batches = run.step()
            trained += names(batches)
            done += sum(batch.num_draws for batch in batches if batch is not None)
            assert run.sum("done") == done <= mixture.total
            if all(loader.ended for loader in run.ranks):
                break
        state = run.state()
    assert trained == expected
    assert done == mixture.total
    assert run.sum("num_skipped") + run.sum("num_dropped") == mixture.total - expected.total()


@settings(deadline=None, max_examples=40)
@given(changes, batchings, st.integers(0, 9))
def test_data_that_repeat_go_on_with_what_was_not_trained_on(segments, batching, seed):
    """Trained, unusable and still to come: together every draw up to here, each once."""
    sources = [Numbered(0, 50), Numbered(1, 7)]
    options = {"seq_len": 24, "batch_tokens": 48, "open_rows": 3, "seed": seed, "batching": batching}
    trained, state = Counter(), None
    for world, steps in segments:
        run = Training(sources, state, world=world, **options)
        for _ in range(steps):
            trained += names(run.step())
        state = run.state()

    alone = Training(sources, state, world=1, **options).ranks[0]
    if segments[-1][0] == 1:  # then nothing was dealt anew
        alone = Training(sources, Training(sources, state, world=2, **options).state(), world=1, **options)
        alone = alone.ranks[0]
    came = usable(map(alone.mixture, range(alone.deal.start)))
    comes = usable(map(alone.mixture, alone.deal.backlog))
    assert trained + comes == came
    assert len(alone.deal.backlog) == len(set(alone.deal.backlog))


@pytest.mark.parametrize("batching", ["pack", "grouped"])
@pytest.mark.parametrize("ends", ["repeat", "drop"])
@pytest.mark.parametrize("stop", [0, 1, 3, 7, 40])
def test_as_many_ranks_go_on_bit_for_bit(batching, ends, stop):
    sources = [Numbered(0, 70), Numbered(1, 20)]
    options = {"seq_len": 32, "batch_tokens": 64, "open_rows": 3, "batching": batching, "ends": ends}
    whole = Training(sources, world=3, **options)
    expected = [[content(batch) for batch in whole.step()] for _ in range(stop + 12)]

    first = Training(sources, world=3, **options)
    for _ in range(stop):
        first.step()
    second = Training(sources, first.state(), world=3, **options)
    assert second.sum("done") == first.sum("done")
    found = [[content(batch) for batch in second.step()] for _ in range(12)]
    assert found == expected[stop:]
    assert second.state() == whole.state()

    # A rank's own part is enough for it.
    third = make(sources, rank=1, world=3, bad_rows="skip", **options)
    third.load_state_dict(first.ranks[1].state_dict())
    assert [content(next(third)) for _ in range(12)] == [batches[1] for batches in expected[stop:]]


def test_a_process_alone_may_become_several_without_merging():
    sources = [Numbered(0, 70)]
    options = {"seq_len": 32, "batch_tokens": 64, "ends": "drop"}
    first = Training(sources, world=1, **options)
    trained = names(first.step())
    second = Training(sources, first.ranks[0].state_dict(), world=2, **options)
    for _ in range(50):
        trained += names(second.step())
    assert trained == usable([(0, row) for row in range(70)], seq_len=32)


@settings(deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(0, 30), unique=True, max_size=9), st.integers(31, 50))
def test_each_draw_is_dealt_to_one_rank(world, backlog, total):
    dealt = [list(Deal(r, world, tuple(backlog), 31, total).numbers(0)) for r in range(world)]
    assert sorted(n for own in dealt for n in own) == sorted([*backlog, *range(31, total)])
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert [own[0] for own in dealt if own] == [*backlog, *range(31, total)][:world]


def test_states_that_do_not_belong_together_are_refused():
    states = [loader.state_dict() for loader in Training([Numbered(0, 9)], world=2).ranks]
    other = Training([Numbered(0, 9)], merge_states(states), world=3).ranks[0].state_dict()
    for wrong in ([], states[:1], [states[0], states[0]], [*states, other]):
        with pytest.raises(ValueError, match="one of each rank"):
            merge_states(wrong)
    with pytest.raises(ValueError, match="dealt from different draws"):
        merge_states([states[0], states[1] | {"start": 3}])
    with pytest.raises(CheckpointError, match="position of rank 1 of 2 alone, and there are 3 now"):
        make([Numbered(0, 9)], world=3).load_state_dict(states[1])


def test_what_was_left_out_is_still_listed_after_the_number_of_ranks_changes():
    sources = [Numbered(0, 70)]
    first = Training(sources, world=2, seq_len=24, batch_tokens=24)
    for _ in range(40):
        first.step()
    second = Training(sources, first.state(), world=3, seq_len=24, batch_tokens=24)
    for kind in ("skipped", "dropped"):
        before = {row for loader in first.ranks for row in getattr(loader, kind)}
        assert len(before) > 3
        for loader in second.ranks:
            assert set(getattr(loader, kind)) == before
        assert second.sum(f"num_{kind}") == first.sum(f"num_{kind}")
