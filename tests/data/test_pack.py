from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.core.errors import RecipeError
from tinymodal.core.types import IGNORE, Encoded, MediaItem
from tinymodal.data.pack import Packer

VALUES = torch.zeros(3, 2, 2)


def sample(tokens, patches=0, name="s"):
    media = (MediaItem("image", (VALUES,), (1, 1), 1, patches),) if patches else ()
    return Encoded(torch.zeros(tokens, dtype=torch.int64), torch.full((tokens,), IGNORE), media, name)


sizes = st.tuples(st.integers(1, 24), st.integers(0, 12))


def pack(packer, items):
    rows = [row for n, item in enumerate(items) for row in packer.add(sample(*item, name=str(n)), n)]
    return rows + packer.flush()


@settings(deadline=None)
@given(st.lists(sizes, max_size=60), st.integers(1, 20), st.none() | st.integers(1, 10), st.integers(1, 5))
def test_every_sample_is_in_one_row_whole_or_dropped_by_name(items, seq_len, patches, open_rows):
    packer = Packer(seq_len, patches, open_rows)
    rows = pack(packer, items)

    packed = [e for row in rows for e in row]
    assert sorted([e.sample_id for e in packed] + [d.sample_id for d in packer.dropped]) == sorted(
        map(str, range(len(items)))
    )
    for row in rows:
        assert [int(e.sample_id) for e in row] == row.indices == sorted(row.indices)
        assert sum(map(len, row)) == row.tokens <= seq_len
        assert sum(e.num_patches for e in row) == row.patches <= (patches or row.patches)
    for e in packed:
        assert (len(e), e.num_patches) == items[int(e.sample_id)]
    for gone in packer.dropped:
        tokens, taken = items[int(gone.sample_id)]
        assert tokens > seq_len or taken > patches
        assert str(tokens if tokens > seq_len else taken) in gone.reason


@settings(deadline=None)
@given(st.lists(sizes, max_size=60), st.integers(0, 60), st.integers(1, 4))
def test_a_restored_packer_goes_on_as_if_it_had_never_stopped(items, stop, open_rows):
    whole = Packer(24, 12, open_rows)
    rows = pack(whole, items)

    first, second = Packer(24, 12, open_rows), Packer(24, 12, open_rows)
    stop = min(stop, len(items))
    before = [row for n in range(stop) for row in first.add(sample(*items[n]), n)]
    second.restore([(sample(*items[n]), n) for n in row] for row in first.state())
    after = [row for n in range(stop, len(items)) for row in second.add(sample(*items[n]), n)]

    assert [r.indices for r in before + after + second.flush()] == [r.indices for r in rows]


def indices(rows):
    return [row.indices for row in rows]


def test_a_sample_goes_to_the_fullest_row_that_can_take_it_and_of_equals_to_the_oldest():
    packer = Packer(10)
    for n, tokens in enumerate((6, 7, 5)):
        assert packer.add(sample(tokens), n) == []
    assert packer.state() == [[0], [1], [2]]
    assert packer.add(sample(2), 3) == []
    assert packer.state() == [[0], [1, 3], [2]]
    assert packer.add(sample(2), 4) == []  # 9 of 10 cannot take it, so the next fullest
    assert packer.state() == [[0, 4], [1, 3], [2]]
    assert packer.add(sample(3), 5) == []
    assert packer.state() == [[0, 4], [1, 3], [2, 5]]
    assert packer.add(sample(2), 6)[0].indices == [0, 4, 6]


def test_a_row_closes_when_it_is_full_and_the_fullest_when_there_are_too_many():
    packer = Packer(10, open_rows=2)
    assert indices(packer.add(sample(10), 0)) == [[0]]
    assert packer.add(sample(6), 1) == []
    assert packer.add(sample(8), 2) == []
    assert indices(packer.add(sample(7), 3)) == [[2]]
    assert indices(packer.add(sample(10), 4)) == [[3], [4]]
    assert indices(packer.flush()) == [[1]]
    assert packer.flush() == []


def test_the_patch_budget_keeps_pictures_apart_where_tokens_would_fit():
    packer = Packer(100, patches=16)
    packer.add(sample(10, 9), 0)
    packer.add(sample(10, 9), 1)
    packer.add(sample(10), 2)
    packer.add(sample(10, 7), 3)
    assert packer.state() == [[0, 2, 3], [1]]


def test_short_questions_leave_few_positions_empty():
    """The first line of the table in ``data/pack.py``."""
    rng, packer = Random(0), Packer(512)
    rows = [row for _ in range(3000) for row in packer.add(sample(17 + int(rng.lognormvariate(3, 0.4))))]

    empty = 1 - sum(row.tokens for row in rows) / (512 * len(rows))
    assert empty < 0.02  # measured: 0.015; with open_rows=1 0.038


def test_what_fits_no_row_is_named_with_the_key_to_change():
    packer = Packer(8, patches=4)
    assert packer.add(sample(9, name="a.jsonl:3")) == packer.add(sample(1, 5, name="a.jsonl:4")) == []
    (long, wide), state = packer.dropped, packer.state()

    assert long == ("a.jsonl:3", "9 tokens; a row holds 8 (seq_len). Raise it, or shorten the sample")
    assert wide == ("a.jsonl:4", "5 image patches; a row holds 4 (patches). Raise it, or use fewer pictures")
    assert state == []


def test_a_budget_of_nothing_is_refused():
    for key, value in {"seq_len": 0, "patches": 0, "open_rows": -1}.items():
        with pytest.raises(RecipeError, match=f"{key}: {value}; expected 1 or more"):
            Packer(**{"seq_len": 1, key: value})
