"""Which embedding each placeholder takes, where tiles differ in size and marks stand between them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.model.layout import Tiled, lay_out

SIZES = {(2, 2): 4, (2, 3): 6, (4, 2): 8}
"""Height and width of a tile, and the embeddings it gives."""
NUM_MARKS = 3


@st.composite
def pictures(draw):
    """Up to four pictures of up to three tiles each, in any order of their embeddings and marks."""
    made = []
    for _ in range(draw(st.integers(1, 4))):
        sizes = draw(st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=3))
        total = sum(SIZES[size] for size in sizes)
        order = None
        if draw(st.booleans()):
            order = torch.tensor(draw(st.lists(st.integers(-NUM_MARKS, total - 1), min_size=1, max_size=12)))
        made.append((sizes, order))
    return made


@given(pictures())
def test_every_place_gets_its_own_embedding(made):
    """Each embedding is told apart by picture, tile and position; marks by their row."""
    given_pictures, expected, names = [], [], {}
    for p, (sizes, order) in enumerate(made):
        tiles = [torch.full((3, *size), 10.0 * p + t) for t, size in enumerate(sizes)]
        own = [(p, t, s) for t, size in enumerate(sizes) for s in range(SIZES[size])]
        for t in range(len(sizes)):
            names[10.0 * p + t] = (p, t)
        given_pictures.append(Tiled(tiles, [SIZES[size] for size in sizes], order))
        chosen = range(len(own)) if order is None else order.tolist()
        expected += [own[i] if i >= 0 else ("mark", -1 - i) for i in chosen]
    stacked, take = lay_out(given_pictures)
    bank = []
    for tiles in stacked:
        for tile in tiles:
            size = tuple(tile.shape[1:])
            bank += [(*names[float(tile[0, 0, 0])], s) for s in range(SIZES[size])]
    bank += [("mark", row) for row in range(NUM_MARKS)]
    assert [bank[i] for i in take.tolist()] == expected


def test_tiles_of_one_size_are_stacked_once():
    a, b = torch.zeros(3, 2, 2), torch.zeros(3, 2, 3)
    stacked, _ = lay_out([Tiled([a, b], [4, 6], None), Tiled([b, a], [6, 4], None)])
    assert [tuple(tiles.shape) for tiles in stacked] == [(2, 3, 2, 2), (2, 3, 2, 3)]


def test_one_size_with_two_numbers_of_tokens_is_refused():
    tile = torch.zeros(3, 2, 2)
    with pytest.raises(ValueError, match=r"a tile of \[3, 2, 2\] takes 6 tokens here and 4 before"):
        lay_out([Tiled([tile], [4], None), Tiled([tile], [6], None)])
