"""The counts, and that nothing else counts differently."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.model.geometry import fold, num_tokens, patch_grid

SIDE = st.integers(1, 64)


@given(rows=SIDE, columns=SIDE, patch=st.integers(1, 32), rest=st.integers(0, 31))
def test_a_picture_of_whole_patches_and_a_rest_has_just_the_whole_patches(rows, columns, patch, rest):
    size = (rows * patch + rest % patch, columns * patch + rest % patch)
    assert patch_grid(*size, patch) == (rows, columns)


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
