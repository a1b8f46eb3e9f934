"""Which tiles a picture becomes: as each published system has it, and never more pixels than allowed."""

from __future__ import annotations

import random
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.model.image import LLAVA_NEXT, Preparation
from tinymodal.model.strategies import ONE_TILE, STRATEGIES, Plan, best_resolution, plan, room

SHAPE = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
STRIPS = [(60_000, 1), (1, 60_000), (60_000, 10), (10, 60_000), (1, 1), (89_478_485, 1), (1, 89_478_485)]


def how(resize: str, size: int = 448, **options) -> Preparation:
    return Preparation(size, size, mean=(0.5,) * 3, std=(0.5,) * 3, resize=resize, **options)


def random_sizes(count: int, longest: int, ratio: int = 200) -> list[tuple[int, int]]:
    """Reproducible sizes, even in the logarithm, no side ``ratio`` times the other."""
    draw = random.Random(0)
    sizes: list[tuple[int, int]] = []
    while len(sizes) < count:
        height, width = (int(longest ** draw.random()) for _ in range(2))
        if max(height, width) < ratio * min(height, width):
            sizes.append((height, width))
    return sizes


# ---- one tile


def test_a_picture_is_cropped_from_the_smallest_size_that_covers_the_tile():
    assert plan((480, 640), how("crop", 336)).resized_px == (336, 448)
    assert plan((640, 480), how("crop", 336)).resized_px == (448, 336)
    wide = replace(how("crop", 336), height_px=100)
    assert plan((640, 480), wide).resized_px == (448, 336)
    assert plan((100, 1000), wide).resized_px == (100, 1000)


def test_a_picture_is_padded_in_its_own_pixels_unless_that_takes_too_many():
    assert plan((480, 640), how("pad")).canvas_px == (640, 640)
    strip = plan((1, 60_000), how("pad"))
    assert strip.resized_px == (1, 4096)
    assert strip.canvas_px == (4096, 4096)
    # A photograph of 48 megapixels is padded exactly.
    assert plan((6048, 8064), how("pad")).resized_px == (6048, 8064)


@given(size=SHAPE, target=st.tuples(st.integers(1, 500), st.integers(1, 500)))
def test_a_padded_picture_has_the_tiles_shape_to_a_pixel_and_holds_the_source(size, target):
    wanted = Preparation(*target, mean=(0.5,) * 3, std=(0.5,) * 3, resize="pad")
    made = plan(size, wanted)
    assert made.canvas_px is not None
    (tall, wide), (height, width) = made.canvas_px, made.resized_px
    assert tall >= height
    assert wide >= width
    assert tall == height or wide == width
    assert abs(tall * target[1] - wide * target[0]) <= max(target)


def test_native_sizes_are_those_of_qwen2_vl_and_naflex():
    """Where Qwen2-VL's function gives an answer that keeps its own limits."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    kept = 0
    for size in random_sizes(1000, 4000):
        theirs = smart_resize(*size, factor=28, min_pixels=3136, max_pixels=1_003_520)
        ours = plan(size, how("native", step_px=28, fit_pixels=(3136, 1_003_520))).tiles_px
        if prod(theirs) <= 1_003_520:
            kept += 1
            assert ours == (theirs,), size
        theirs = get_image_size_for_max_num_patches(*size, patch_size=16, max_num_patches=256)
        assert plan(size, how("native", 256, step_px=16)).tiles_px == (theirs,), size
    assert kept > 990


@given(
    size=SHAPE | st.sampled_from(STRIPS),
    step=st.integers(1, 40),
    limits=st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)),
)
def test_native_sides_are_whole_steps_and_pixels_stay_below_the_limit(size, step, limits):
    least, most = min(limits), max(*limits, step**2)
    (made,) = plan(size, how("native", step_px=step, fit_pixels=(least, most))).tiles_px
    assert made[0] % step == made[1] % step == 0
    assert step**2 <= prod(made) <= most


# ---- several tiles

LLAVA = tuple((rows * 336, columns * 336) for rows, columns in LLAVA_NEXT)
TRANSFORMERS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@pytest.mark.parametrize(
    ("width", "height", "best"),
    [(336, 336, (672, 336)), (640, 480, (672, 672)), (1000, 300, (336, 1008)), (100, 50, (672, 336)),
     (50, 100, (672, 336)), (1, 1, (672, 336))],
)  # fmt: skip
def test_the_best_canvas_is_the_one_llava_next_takes(width, height, best):
    """Height x width here; LLaVA's own list has the width first."""
    assert plan((height, width), how("anyres", 336)).canvas_px == best


def test_the_best_canvas_and_the_picture_on_it_are_those_of_transformers():
    """Their list has the height first, in LLaVA's order of (width, height): small pictures fit another."""
    import numpy as np
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
    from transformers.image_utils import ChannelDimension

    for size in [*random_sizes(1000, 3000), (577, 1153), (601, 1203), (19, 19), (106, 159)]:
        best = select_best_resolution(size, [list(p) for p in TRANSFORMERS])
        made = plan(size, how("anyres", 336, pinpoints=TRANSFORMERS))
        assert made.canvas_px == tuple(best), size
        shape = np.broadcast_to(np.uint8(0), (3, *size))
        assert made.resized_px == get_patch_output_size(shape, best, ChannelDimension.FIRST), size
        assert (made.rows * 336, made.columns * 336) == tuple(best)
    assert best_resolution((10, 10), TRANSFORMERS) != best_resolution((10, 10), LLAVA)


def test_canvases_of_more_than_max_tiles_are_left_out_and_without_any_the_overview_stays():
    assert plan((700, 700), how("anyres", 336)).canvas_px == (672, 672)
    assert plan((700, 1000), how("anyres", 336, max_tiles=2)).canvas_px == (336, 672)
    assert plan((700, 1000), how("anyres", 336, max_tiles=1)) == Plan(((336, 336),), (700, 1000), (336, 336))


@pytest.mark.parametrize(
    ("width", "height", "source", "grid", "slice_"),
    [
        (448, 448, (448, 448), (0, 0), None),
        (640, 480, (518, 392), (2, 1), (364, 546)),
        (1920, 1080, (602, 336), (4, 2), (420, 476)),
        (2000, 2000, (448, 448), (3, 3), (448, 448)),
        (4000, 500, (1260, 154), (8, 1), (448, 448)),
        (449, 448, (448, 448), (2, 1), (322, 630)),
        (100, 50, (630, 322), (0, 0), None),
        # Both 8 x 1 and 4 x 2 are a factor 2 away from 4 : 1; the system's logarithms round to 8 x 1.
        (2600, 650, (896, 224), (8, 1), (322, 630)),
    ],
)
def test_slices_are_those_of_minicpm_v(width, height, source, grid, slice_):
    """Width x height, as its own code prints them."""
    made = plan((height, width), how("slices"))
    assert made.tiles_px[0][::-1] == source
    assert (made.columns, made.rows) == grid
    assert {tile[::-1] for tile in made.tiles_px[1:]} == ({slice_} if slice_ else set())
    assert len(made.tiles_px) == 1 + grid[0] * grid[1]


@pytest.mark.parametrize(("patch", "mode", "step"), [(7, "4x", 14), (14, "16x", 56)])
def test_slices_are_those_of_transformers_minicpm_v(patch, mode, step):
    """Version 4.6 rounds to blocks of patches; blocks of 2 x 2 patches of 7 px are the patches of 2.6."""
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    theirs = MiniCPMV4_6ImageProcessorPil()
    for size in random_sizes(500, 4000, ratio=16 * (448 // step) ** 2):
        for most in (9, 4, 1):
            made = plan(size, how("slices", max_tiles=most, step_px=step))
            grid = theirs.get_sliced_grid(size, most, 448)
            assert made.tiles_px[0] == theirs.find_best_resize(size, 448, patch, mode, True), size
            assert [made.rows, made.columns] == (grid or [0, 0]), size
            if grid:
                assert made.resized_px == theirs.get_refine_size(size, grid, 448, patch, mode, True), size


def test_tiles_are_those_of_transformers_internvl():
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    for size in [*random_sizes(1000, 4000), (448, 448), (1200, 500), (1000, 1500)]:
        for most in (1, 6, 12):
            made = plan(size, how("tiles", max_tiles=most))
            columns, rows = get_optimal_tiled_canvas(size, (448, 448), 1, most)
            several = columns * rows > 1
            assert (made.rows, made.columns) == ((rows, columns) if several else (0, 0)), size
            assert len(made.tiles_px) == rows * columns + several
            assert made.overview_last == several


def test_tiles_at_a_longest_edge_are_those_of_transformers_smolvlm():
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    theirs = SmolVLMImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    for size in random_sizes(1000, 4000):
        made = plan(size, how("tiles", 512, longest_px=2048))
        expected = theirs.get_number_of_image_patches(*size)
        assert (len(made.tiles_px), made.rows, made.columns) == expected, size


def test_fewer_tiles_at_a_longest_edge_are_a_smaller_picture():
    assert how("tiles", 512, longest_px=2048).max_tiles == 16
    made = plan((2000, 2000), how("tiles", 512, longest_px=2048, max_tiles=10))
    assert (made.rows, made.columns) == (3, 3)
    assert plan((2000, 2000), how("tiles", 512, longest_px=2048, max_tiles=1)).tiles_px == ((512, 512),)
    without = plan((2000, 2000), how("tiles", 512, longest_px=2048, thumbnail=False))
    assert (len(without.tiles_px), without.overview) == (16, False)


# ---- all


@given(
    size=SHAPE | st.sampled_from(STRIPS),
    resize=st.sampled_from(sorted(STRATEGIES)),
    most=st.integers(1, 12),
)
def test_no_picture_becomes_more_pixels_than_its_limits_allow(size, resize, most):
    limit = {"max_tiles": most} if resize in ("anyres", "slices", "tiles") else {}
    wanted = how(resize, **limit)
    made = plan(size, wanted)
    assert min(map(min, made.tiles_px)) >= 1
    assert min(made.resized_px) >= 1
    assert made.source_px == size
    assert len(made.tiles_px) == made.overview + made.rows * made.columns
    assert made.rows * made.columns <= most
    if resize in ONE_TILE:
        assert len(made.tiles_px) == 1
    assert max(map(prod, made.tiles_px)) <= (4 if resize == "slices" else 1) * 448 * 448
    if made.rows:
        assert prod(made.resized_px) <= made.rows * made.columns * max(map(prod, made.tiles_px))
    if made.canvas_px and resize == "pad":
        assert prod(made.canvas_px) <= 1.01 * room(size, wanted)


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(ValueError, match="a picture of 0 x 5 px holds no pixel"):
        plan((0, 5), how("square"))
