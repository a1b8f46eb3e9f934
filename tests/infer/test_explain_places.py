"""Where a token is said to lie is what the tower was shown there, for every way to cut a picture."""

import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.infer.explain_places import (
    Places,
    TilePlaces,
    heard_in,
    made_of,
    mean_of,
    patches,
    spread,
    tile_boxes,
    with_place,
)
from tinymodal.model.connectors import CONNECTORS, find_connector
from tinymodal.model.image import Preparation
from tinymodal.model.media import Features
from tinymodal.model.strategies import plan
from tinymodal.model.tiles import cut

STD = (1.0, 1.0, 1.0)
WAYS = {
    "square": {},
    "crop": {},
    "pad": {},
    "native": {"fit_pixels": (56 * 56, 112 * 112), "step_px": 14},
    "anyres": {},
    "slices": {"step_px": 14},
    "tiles": {"max_tiles": 6},
    "smolvlm": {"longest_px": 224},
}


def told_by_colour(height: int, width: int) -> PIL.Image.Image:
    """Red grows downwards, green to the right: a colour is a place. Blue is full, and 0 in black padding."""
    y = torch.linspace(0, 255, height).round().byte()[:, None].expand(height, width)
    x = torch.linspace(0, 255, width).round().byte()[None].expand(height, width)
    return PIL.Image.fromarray(torch.stack([y, x, torch.full_like(y, 255)], dim=-1).numpy())


@settings(max_examples=25, deadline=None)
@given(height=st.integers(40, 400), width=st.integers(40, 400))
@pytest.mark.parametrize("way", WAYS)
def test_what_a_patch_shows_is_what_lies_in_its_box(way, height, width):
    # The mean is black, so that what pads is told apart from the picture.
    resize = "tiles" if way == "smolvlm" else way
    how = Preparation(56, 56, (0.0, 0.0, 0.0), STD, resize=resize, **WAYS[way])
    cut_up = plan((height, width), how)
    tiles = cut(told_by_colour(height, width), how, cut_up)
    boxes = tile_boxes(cut_up, how.resize)
    assert len(boxes) == len(tiles)
    checked = 0
    for tile, box in zip(tiles, boxes, strict=True):
        rows, columns = tile.shape[1] // 14, tile.shape[2] // 14
        shown = torch.nn.functional.avg_pool2d(tile, 14).flatten(1).T
        seen = (rows * 14 / tile.shape[1], columns * 14 / tile.shape[2])
        for colour, place in zip(shown, patches(box, (rows, columns), seen), strict=True):
            middle = (place[:2] + place[2:]) / 2
            if colour[2] > 0.999:  # no padding in it
                # Resizing blurs over a pixel or two at edges, and rounding moves a picture by half of one.
                assert torch.allclose(colour[:2].double(), middle, atol=0.035), (box, place, colour)
                checked += 1
            elif colour[2] < 0.001:
                assert not (0 < middle[0] < 1 and 0 < middle[1] < 1), "padding lies outside the picture"
    # In a frame around a long picture every patch may hold some padding.
    assert checked or way == "pad"


@pytest.mark.parametrize("name", [name for name in CONNECTORS if name not in ("identity",)])
def test_a_token_is_made_of_the_positions_that_change_it(name):
    connector = find_connector(name)
    sound = "factor" in connector.defaults
    grid, widths = ((21,), (16,)) if sound else ((8, 6), (16, 16) if name == "interleave" else (16,))
    small = {"num_queries": 4, "depth": 1, "num_heads": 2, "width": 16}
    options = connector.settle({k: v for k, v in small.items() if k in connector.defaults})
    if name == "mlp" or "activation" in connector.defaults:
        options["depth"] = connector.defaults["depth"]
    module = connector.build(widths, 32, **options).eval()
    tokens = connector.shrink(grid, **options)
    share = heard_in(21, tokens[0], connector, options) if sound else made_of(grid, tokens, connector)
    if share is None:
        assert name in ("perceiver", "sincos", "qformer"), "only learned queries have no place"
        return
    torch.manual_seed(0)
    values = torch.randn(1, share.shape[1], sum(widths))
    with torch.no_grad():
        before = module(Features(values, grid))[0]
        assert len(before) == len(share)
        torch.testing.assert_close(share.sum(1), torch.ones(len(share)))
        for position in range(share.shape[1]):
            changed = values.clone()
            changed[0, position] += 3 * torch.randn(sum(widths))
            moved = (module(Features(changed, grid))[0] - before).norm(dim=1)
            own = share[:, position] > 0
            if name in ("ldp", "conv_frames"):
                # A convolution of random weights may move a neighbour more; of what is made of the position
                # some part moves all the same, and nothing far from it.
                assert moved[own].min() > 1e-3
                assert name == "ldp" or moved[~own].count_nonzero() <= 2
            else:
                assert own[moved.argmax()]


@given(num=st.integers(1, 60), groups=st.integers(1, 60))
def test_groups_cover_every_position_in_order(num, groups):
    if groups > num:
        return
    share = mean_of(num, groups)
    assert (share.sum(0) > 0).all()
    torch.testing.assert_close(share.sum(1), torch.ones(groups))
    centres = (share * torch.arange(num)).sum(1)
    assert (centres.diff() > 0).all()


def test_class_token_and_left_out_patch_are_no_places():
    share = torch.eye(7)
    torch.testing.assert_close(with_place(share, 6), torch.eye(7)[:, 1:])
    shorter = with_place(torch.eye(5), 6)
    assert shorter.shape == (5, 6)
    assert shorter[0].tolist() == [0, 1, 0, 0, 0, 0]


def test_marks_have_no_place_and_tokens_go_to_their_tiles():
    tiles = tuple(TilePlaces(patches((0, 0, 1, 1), (1, 2)), torch.eye(2)) for _ in range(2))
    places = Places(tiles, torch.tensor([-1, 2, 3, -2, 0, 1]))
    assert places.at_boxes(torch.tensor([9.0, 3, 4, 9, 1, 2])).tolist() == [1, 2, 3, 4]


@given(
    boxes=st.lists(
        st.tuples(*[st.floats(0, 0.8, allow_nan=False)] * 2, *[st.floats(0.05, 0.2)] * 2),
        min_size=1,
        max_size=8,
    ),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_a_field_holds_the_weight_that_lies_inside(boxes, size):
    corners = torch.tensor([(y, x, y + h, x + w) for y, x, h, w in boxes], dtype=torch.float64)
    weights = torch.arange(1.0, len(boxes) + 1)
    field = spread(weights, corners, size)
    assert field.shape == size
    assert float(field.sum()) == pytest.approx(float(weights.sum()), rel=1e-5)
    half_outside = spread(torch.ones(1), torch.tensor([[-0.5, 0.0, 0.5, 1.0]], dtype=torch.float64), size)
    assert float(half_outside.sum()) == pytest.approx(0.5, rel=1e-5)
