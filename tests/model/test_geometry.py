"""The counts, and that nothing else counts differently."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.model.geometry import (
    MARKS,
    arrange,
    fold,
    mark_rows,
    num_marks,
    num_tokens,
    patch_grid,
    plan,
    sound_windows,
    unpadding,
)
from tinymodal.model.image import Preparation
from tinymodal.model.strategies import STRATEGIES

from .test_strategies import TRANSFORMERS, random_sizes

SIDE = st.integers(1, 64)
SHAPE = st.tuples(st.integers(1, 2500), st.integers(1, 2500))


@given(rows=SIDE, columns=SIDE, patch=st.integers(1, 32), rest=st.integers(0, 31))
def test_a_picture_of_whole_patches_and_a_rest_has_just_the_whole_patches(rows, columns, patch, rest):
    size = (rows * patch + rest % patch, columns * patch + rest % patch)
    assert patch_grid(*size, patch) == (rows, columns)


@given(samples=st.integers(1, 5_000), window=st.integers(1, 1_000), step=st.integers(1, 1_000))
def test_windows_hold_the_sound_and_less_than_a_step_of_silence(samples, window, step):
    step = min(step, window)
    sizes = sound_windows(samples, window, step)
    assert all(size == window for size in sizes[:-1])
    assert sizes[-1] % step == 0 or sizes[-1] == window
    assert samples <= sum(sizes) < samples + step


def test_70_s_are_two_windows_of_30_s_and_one_of_10():
    assert sound_windows(700, 300, 5) == [300, 300, 100]
    assert sound_windows(12, 300, 5) == [15]
    assert sound_windows(600, 300, 5) == [300, 300]
    for wrong in ((0, 300, 5), (1, 300, 0), (1, 300, 301)):
        with pytest.raises(ValueError, match="got"):
            sound_windows(*wrong)


def test_384_px_at_14_px_a_patch_are_the_729_tokens_of_siglip():
    assert num_tokens(patch_grid(384, 384, 14)) == 729


@given(rows=SIDE, columns=SIDE, ratio=st.integers(1, 8))
def test_folding_divides_the_tokens_by_the_square_of_the_ratio(rows, columns, ratio):
    grid = (rows * ratio, columns * ratio)
    assert fold(grid, ratio) == (rows, columns)
    assert num_tokens(fold(grid, ratio)) * ratio**2 == num_tokens(grid)


def test_a_grid_that_does_not_fold_names_the_ratios_that_do():
    with pytest.raises(
        ValueError, match=r"ratio 2 needs a grid divisible by 2, got 27 x 27 patches.*fit: 3, 9, 27"
    ):
        fold((27, 27), 2)


def test_a_picture_smaller_than_a_patch_is_refused_with_the_size_it_needs():
    with pytest.raises(ValueError, match="1 x 640 px holds no patch of 14 px; prepare it at 14 x 14"):
        patch_grid(1, 640, 14)


# ---- marks


def test_marks_take_their_rows_in_the_order_given():
    assert mark_rows(["newline", "id", "end"]) == {"newline": 0, "id": 1, "end": 13}
    assert num_marks(["newline", "id", "end"]) == 14
    assert num_marks(()) == 0
    with pytest.raises(
        ValueError, match=r"unknown mark 'new_line'; known: start, .*; did you mean 'newline'"
    ):
        mark_rows(["new_line"])
    with pytest.raises(ValueError, match="mark 'end' is named twice"):
        mark_rows(["end", "end"])


# ---- the order of tokens


def how(resize: str, size: int = 336, **options) -> Preparation:
    return Preparation(size, size, mean=(0.5,) * 3, std=(0.5,) * 3, resize=resize, **options)


def llava_next(height: int, width: int, **options) -> list[int]:
    made = plan((height, width), how("anyres", **options))
    return arrange(made, [(24, 24)] * len(made.tiles_px), ["newline"], "spatial_unpad")


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [(336, 336, 1176), (640, 480, 2340), (480, 640, 2352), (1000, 300, 2182), (300, 1000, 2232),
     (1920, 1080, 1948), (672, 672, 2928), (100, 50, 876), (50, 100, 1776)],
)  # fmt: skip
def test_llava_1_6_takes_as_many_tokens_as_it_is_known_for(width, height, tokens):
    assert len(llava_next(height, width)) == tokens


def test_the_tokens_of_llava_next_are_those_that_transformers_packs():
    """Its own function over features that are their own numbers: which are kept, in which order, where the
    newline stands; and its processor's count.
    """  # fmt: skip
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    vision = SimpleNamespace(image_size=336, patch_size=14)
    pinpoints = [list(p) for p in TRANSFORMERS]
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    for height, width in [*random_sizes(200, 3000, ratio=3000), (3000, 1), (1, 3000)]:
        ours = llava_next(height, width, pinpoints=TRANSFORMERS)
        made = plan((height, width), how("anyres", pinpoints=TRANSFORMERS))
        features = torch.arange(len(made.tiles_px) * 576.0).view(-1, 576, 1)
        (theirs,), _ = LlavaNextModel.pack_image_features(
            model, [features], [(height, width)], "default", torch.tensor([-1.0])
        )
        assert theirs.flatten().long().tolist() == ours, (height, width)
        rest, newlines = LlavaNextProcessor._get_unpadded_features(
            None, height, width, 24, 24, made.rows, made.columns
        )
        assert len(ours) == 576 + rest + newlines


@settings(max_examples=300)
@given(size=SHAPE, grid=st.tuples(st.integers(1, 90), st.integers(1, 90)))
def test_padding_is_taken_off_as_transformers_does_where_its_rows_are_whole_numbers_or_not(size, grid):
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    above, beside = unpadding(size, grid)
    left = unpad_image(torch.arange(grid[0] * grid[1]).view(1, *grid), size)
    expected = [
        [row * grid[1] + column for column in range(beside, grid[1] - beside)]
        for row in range(above, grid[0] - above)
    ]
    assert left[0].tolist() == expected


def test_tiles_read_as_the_picture_lies_give_its_tokens_row_by_row():
    """Tokens named by their place in the picture; a picture of 2 x 2 tiles of 3 x 2 tokens."""
    made = plan((672, 672), how("anyres"))
    place = {i: ("whole", i) for i in range(6)}
    for tile in range(4):
        for y in range(3):
            for x in range(2):
                place[6 + tile * 6 + y * 2 + x] = (tile // 2 * 3 + y, tile % 2 * 2 + x)
    order = arrange(made, [(3, 2)] * 5, (), "spatial")
    assert [place[i] for i in order[6:]] == [(y, x) for y in range(6) for x in range(4)]
    with_newline = arrange(made, [(3, 2)] * 5, ["newline"], "spatial")
    assert [i for i in with_newline if i >= 0] == order
    assert [i for i, token in enumerate(with_newline[6:]) if token < 0] == [4, 9, 14, 19, 24, 29]
    assert arrange(made, [(3, 2)] * 5) == list(range(30))


def test_a_newline_closes_each_row_of_one_tile_and_one_overview_of_llava_next():
    made = plan((480, 640), how("square"))
    assert arrange(made, [(2, 3)], ["newline"]) == [0, 1, 2, -1, 3, 4, 5, -1]
    assert arrange(made, [(2, 3)], ["newline"], "spatial") == [0, 1, 2, -1, 3, 4, 5, -1]
    assert arrange(made, [(2, 3)], ["newline"], "spatial_unpad") == [0, 1, 2, 3, 4, 5, -1]
    # Queries have no rows.
    assert arrange(made, [(6,)], ["newline"]) == [0, 1, 2, 3, 4, 5]


def test_start_and_end_enclose_a_picture_of_one_tile_or_several():
    one, several = plan((5, 5), how("square")), plan((480, 640), how("anyres"))
    assert arrange(one, [(3,)], ["start", "end"]) == [-1, 0, 1, 2, -2]
    assert arrange(several, [(1,)] * 5, ["end", "start"]) == [-2, 0, 1, 2, 3, 4, -1]


def written(order: list[int], marks: list[str], words: dict[str, str]) -> str:
    """The order as text: a dot for a token."""
    names = [word for mark in marks for word in (words[mark].split("|") if mark == "id" else [words[mark]])]
    return "".join("." if token >= 0 else names[-1 - token] for token in order)


@pytest.mark.parametrize(
    ("width", "height", "number", "text"),
    [
        (448, 448, 0, "<image_id>0</image_id><image>..</image>"),
        (640, 480, 10, "<image_id>10</image_id><image>..</image><slice>..</slice><slice>..</slice>"),
        (480, 640, 7, "<image_id>7</image_id><image>..</image><slice>..</slice>\n<slice>..</slice>"),
        (
            1000, 900, 1, "<image_id>1</image_id><image>..</image><slice>..</slice><slice>..</slice>"
            "\n<slice>..</slice><slice>..</slice>",
        ),
    ],
)  # fmt: skip
def test_slices_are_read_as_minicpm_v_2_6_writes_them(width, height, number, text):
    """Its placeholder text with two queries a slice, character by character."""
    marks = ["tile_newline", "id", "start", "end", "tile_start", "tile_end"]
    words = {"start": "<image>", "end": "</image>", "tile_start": "<slice>", "tile_end": "</slice>",
             "tile_newline": "\n", "id": "<image_id>|0|1|2|3|4|5|6|7|8|9|</image_id>"}  # fmt: skip
    made = plan((height, width), how("slices", 448))
    order = arrange(made, [(2,)] * len(made.tiles_px), marks, number=number)
    assert written(order, marks, words) == text
    assert [token for token in order if token >= 0] == list(range(2 * len(made.tiles_px)))


def test_the_thumbnail_of_internvl_is_read_last():
    made = plan((448, 896), how("tiles", 448))
    assert arrange(made, [(2,)] * 3) == [2, 3, 4, 5, 0, 1]
    assert arrange(made, [(1,)] * 3, ["start", "end", "tile_end"]) == [1, -3, 2, -3, -1, 0, -2]
    without = plan((448, 896), how("tiles", 448, thumbnail=False))
    assert arrange(without, [(1,)] * 2, ["start", "end", "tile_end"]) == [-1, 0, -3, 1, -3, -2]


@settings(max_examples=1000, deadline=None)
@given(
    size=SHAPE,
    resize=st.sampled_from(sorted(STRATEGIES)),
    merge=st.sampled_from(["flat", "spatial", "spatial_unpad"]),
    marks=st.lists(st.sampled_from(sorted(MARKS)), unique=True),
    number=st.integers(0, 120),
    patch=st.sampled_from([28, 56]),
    queries=st.booleans(),
)
def test_every_token_is_read_once_or_is_padding_and_the_count_is_the_formula(
    size, resize, merge, marks, number, patch, queries
):
    if merge != "flat":
        queries = False
        marks = [mark for mark in marks if not mark.startswith("tile_")]
        resize = "anyres" if resize == "slices" else resize
    made = plan(size, how(resize, 224, **({"step_px": 56} if resize in ("native", "slices") else {})))
    grids = [(7,) if queries else patch_grid(*tile, patch) for tile in made.tiles_px]
    order = arrange(made, grids, marks, merge, number)

    tokens = [token for token in order if token >= 0]
    total = sum(map(num_tokens, grids))
    assert len(set(tokens)) == len(tokens)
    assert all(0 <= token < total for token in tokens)
    assert all(0 <= -1 - token < num_marks(marks) for token in order if token < 0)
    if not (merge == "spatial_unpad" and made.rows and resize == "anyres"):
        assert len(tokens) == total

    lines = 0
    if queries:
        pass
    elif merge == "flat":
        lines = sum(rows for rows, _ in grids)
    elif made.rows:
        lines = (len(tokens) - num_tokens(grids[0])) // (made.columns * grids[-1][1])
        if made.canvas_px and merge == "spatial_unpad":
            above, _ = unpadding(size, (made.rows * grids[-1][0], made.columns * grids[-1][1]))
            lines = made.rows * grids[-1][0] - 2 * above
    else:
        lines = grids[0][0] if merge == "spatial" else 1
    slices, digits = made.rows * made.columns, len(str(number))
    count = {
        "start": 1, "end": 1, "newline": lines, "tile_start": slices, "tile_end": slices,
        "tile_newline": max(0, made.rows - 1), "id": 2 + digits,
    }  # fmt: skip
    assert len(order) == len(tokens) + sum(count[mark] for mark in marks)


def test_what_cannot_be_arranged_is_refused():
    made = plan((480, 640), how("anyres"))
    with pytest.raises(ValueError, match="a plan of 5 tiles needs as many grids, got 1"):
        arrange(made, [(2, 2)])
    with pytest.raises(ValueError, match="unknown merge 'unpad'; known: flat, spatial, spatial_unpad"):
        arrange(made, [(2, 2)] * 5, merge="unpad")
    with pytest.raises(ValueError, match=r"has no place for tile_start.*use merge 'flat'"):
        arrange(made, [(2, 2)] * 5, ["tile_end"], merge="spatial")
    with pytest.raises(ValueError, match=r"these have none \(queries, .*\); use merge 'flat'"):
        arrange(made, [(4,)] * 5, merge="spatial")
    with pytest.raises(ValueError, match="numbered from 0, got -1"):
        arrange(made, [(4,)] * 5, ["id"], number=-1)


SETTINGS = [
    (how("square"), 14, 1, (), "flat"),
    (how("anyres"), 14, 1, ["newline"], "spatial_unpad"),
    (how("anyres"), 14, 1, (), "flat"),
    (how("slices", 448), None, 64, [mark for mark in MARKS if mark != "newline"], "flat"),
    (how("tiles", 448), 14, 2, (), "flat"),
    (how("tiles", 512, longest_px=2048), 16, 4, (), "flat"),
    (how("native", 256, step_px=16), 16, 1, (), "flat"),
    (how("native", 448, step_px=28, fit_pixels=(3136, 1_003_520)), 14, 2, (), "flat"),
]
"""Of each row on the page: patch (None: queries), how many are folded or queried, marks, merge."""


def test_the_page_on_resolutions_tells_the_counts():
    page = (Path(__file__).parents[2] / "docs/resolutions.md").read_text()
    head, _, *rows = page[page.index("| setting |") :].split("\n\n")[0].splitlines()
    sizes = [tuple(map(int, cell.split(" x "))) for cell in head.strip("| ").split(" | ")[1:]]
    for row, (wanted, patch, ratio, marks, merge) in zip(rows, SETTINGS, strict=True):
        for (width, height), told in zip(sizes, row.strip("| ").split(" | ")[1:], strict=True):
            made = plan((height, width), wanted)
            grids = [
                (ratio,) if patch is None else fold(patch_grid(*px, patch), ratio) for px in made.tiles_px
            ]
            assert len(arrange(made, grids, marks, merge)) == int(told), (row, width, height)
