"""How many: pixels to patches to tokens. Pure integers, and the only place that counts.

The processor (no weights) and the model call the same functions, so a count cannot differ between the two.
"""

from __future__ import annotations

from math import prod


def patch_grid(height_px: int, width_px: int, patch_px: int) -> tuple[int, int]:
    """Rows and columns of square patches in a picture.

    Args:
        height_px: height of the picture, at least one patch.
        width_px: width of the picture, at least one patch.
        patch_px: edge of one patch.

    Returns:
        (rows, columns). A rest smaller than a patch at the right or the bottom is not seen, as in every tower
        with a strided convolution: 384 px at 14 px a patch are 27 patches, and 6 px are dropped.

    Raises:
        ValueError: if not one patch fits.
    """
    if patch_px < 1:
        raise ValueError(f"a patch must be at least 1 px, got {patch_px}")
    rows, columns = height_px // patch_px, width_px // patch_px
    if rows < 1 or columns < 1:
        raise ValueError(
            f"a picture of {height_px} x {width_px} px holds no patch of {patch_px} px; "
            f"prepare it at {patch_px} x {patch_px} px or more"
        )
    return rows, columns


def fold(grid: tuple[int, ...], ratio: int) -> tuple[int, int]:
    """Grid after each ratio x ratio block of positions became one.

    Raises:
        ValueError: if the grid is not two-dimensional or not divisible by ``ratio``.
    """
    if ratio < 1:
        raise ValueError(f"ratio must be 1 or more, got {ratio}")
    if len(grid) != 2:
        raise ValueError(f"folding needs a grid of rows and columns, got {grid}")
    rows, columns = grid
    if rows % ratio or columns % ratio:
        fits = [r for r in range(2, min(rows, columns) + 1) if rows % r == 0 and columns % r == 0]
        advice = (
            f"ratios that fit: {', '.join(map(str, fits))}" if fits else "no ratio above 1 fits this grid"
        )
        raise ValueError(
            f"ratio {ratio} needs a grid divisible by {ratio}, got {rows} x {columns} patches; {advice}"
        )
    return rows // ratio, columns // ratio


def num_tokens(grid: tuple[int, ...]) -> int:
    """Positions of a grid."""
    return prod(grid)
