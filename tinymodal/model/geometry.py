"""How many: pixels to tiles to patches to tokens, samples to windows. No tensor; the only place that counts.

The processor (no weights) and the model call the same functions, so a count cannot differ between the two.
:func:`plan` (``strategies.py``) says which tiles a picture becomes, :func:`patch_grid` and :func:`fold` what
tower and connector make of one tile, and :func:`arrange` in which order the language model reads the
embeddings of all.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import accumulate
from math import prod

from .strategies import Plan, Size, plan

__all__ = [
    "MARKS",
    "MERGES",
    "Plan",
    "arrange",
    "fold",
    "mark_rows",
    "num_marks",
    "num_tokens",
    "patch_grid",
    "plan",
    "sound_windows",
    "stack",
    "unpadding",
]


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


def sound_windows(num_samples: int, window: int, step: int) -> list[int]:
    """Samples of each window that a sound is cut into.

    Args:
        num_samples: of the sound, 1 or more.
        window: most samples of one.
        step: the last window is filled with silence to a multiple of so many samples, so that many sounds
            have one length; never beyond ``window``.

    Returns:
        Windows in order: all but the last have ``window`` samples. 70 s in windows of 30 s and steps of 0.5 s
        are 30, 30 and 10 s; 1.2 s are 1.5 s.

    Raises:
        ValueError: if there is no sample, or a step is longer than a window.
    """
    if num_samples < 1:
        raise ValueError(f"a sound has at least 1 sample, got {num_samples}")
    if not 1 <= step <= window:
        raise ValueError(f"a step has 1 sample to the window's {window}, got {step}")
    rest = (num_samples - 1) % window + 1
    return [window] * ((num_samples - rest) // window) + [min(-(-rest // step) * step, window)]


def stack(length: int, factor: int) -> int:
    """Groups of ``factor`` positions that follow one another; the last one may be smaller.

    Raises:
        ValueError: if either is below 1.
    """
    if length < 1 or factor < 1:
        raise ValueError(f"groups need 1 position or more and a factor of 1 or more, got {length}, {factor}")
    return -(-length // factor)


def num_tokens(grid: tuple[int, ...]) -> int:
    """Positions of a grid."""
    return prod(grid)


MARKS: dict[str, int] = {
    "start": 1,
    "end": 1,
    "newline": 1,
    "tile_start": 1,
    "tile_end": 1,
    "tile_newline": 1,
    "id": 12,
}
"""Learned embeddings around and between a picture's tokens, and how many rows each takes. ``id`` are twelve:
one that opens the number, the ten digits, one that closes it."""

MERGES = ("flat", "spatial", "spatial_unpad")


def mark_rows(marks: Sequence[str]) -> dict[str, int]:
    """First row of each mark, in the order given.

    Raises:
        ValueError: for an unknown mark, or one named twice.
    """
    rows: dict[str, int] = {}
    total = 0
    for mark in marks:
        if mark not in MARKS:
            close = difflib.get_close_matches(mark, MARKS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown mark {mark!r}; known: {', '.join(MARKS)}{hint}")
        if mark in rows:
            raise ValueError(f"mark {mark!r} is named twice; name each once")
        rows[mark] = total
        total += MARKS[mark]
    return rows


def num_marks(marks: Sequence[str]) -> int:
    """Rows of all marks together."""
    return sum(MARKS[mark] for mark in mark_rows(marks))


def arrange(
    plan: Plan,
    grids: Sequence[tuple[int, ...]],
    marks: Sequence[str] = (),
    merge: str = "flat",
    number: int = 0,
) -> list[int]:
    """The order in which a picture's embeddings and marks are read.

    Args:
        plan: of :func:`plan`.
        grids: rows and columns of each tile's tokens after tower and connector; one number where they have no
            places (queries, or with a class token).
        marks: which of :data:`MARKS` the model has. ``id`` opens the picture with its ``number``; ``start``
            and ``end`` enclose the picture, or only the overview where slices are enclosed by
            ``tile_start`` and ``tile_end`` themselves (MiniCPM-V 2.6); ``tile_newline`` stands between rows
            of tiles, ``newline`` after each row of tokens.
        merge: ``flat`` reads tile by tile. ``spatial`` puts the tokens of all tiles but the overview
            together as the picture lies, and reads row by row over all; ``spatial_unpad`` also leaves out
            the rows and columns of a padded canvas. In both the overview has no ``newline``, as in
            LLaVA-NeXT; with nothing but the overview ``spatial_unpad`` gives one at its end.
        number: which picture of the conversation it is, from 0.

    Returns:
        One entry a token: 0 or more is a place in the tiles' embeddings laid end to end, -1 - r is row r of
        the marks (:func:`mark_rows`).

    Raises:
        ValueError: if the grids are not those of the plan, or cannot be merged as asked.
    """
    if len(grids) != len(plan.tiles_px):
        raise ValueError(f"a plan of {len(plan.tiles_px)} tiles needs as many grids, got {len(grids)}")
    if merge not in MERGES:
        raise ValueError(f"unknown merge {merge!r}; known: {', '.join(MERGES)}")
    if merge != "flat" and {"tile_start", "tile_end", "tile_newline"} & set(marks):
        raise ValueError(
            f"merge {merge!r} leaves no tile in one piece and has no place for tile_start, tile_end and "
            f"tile_newline; got the marks {list(marks)}; use merge 'flat'"
        )
    rows = mark_rows(marks)
    put = {name: [-1 - rows[name]] if name in rows else [] for name in MARKS}
    starts = [0, *accumulate(num_tokens(grid) for grid in grids)]

    def read(tile: int, closed: list[int]) -> list[int]:
        start, grid = starts[tile], grids[tile]
        if len(grid) != 2 or not closed:
            return list(range(start, start + num_tokens(grid)))
        lines = range(start, start + num_tokens(grid), grid[1])
        return [place for line in lines for place in (*range(line, line + grid[1]), *closed)]

    whole: list[int] = []
    if plan.overview:
        alone = plan.rows == 0
        whole = read(0, put["newline"] if merge == "flat" or (alone and merge == "spatial") else [])
        if alone and merge == "spatial_unpad":
            whole += put["newline"]
    rest: list[int] = []
    if plan.rows and merge == "flat":
        for row in range(plan.rows):
            rest += put["tile_newline"] if row else []
            first = plan.overview + row * plan.columns
            for tile in range(first, first + plan.columns):
                rest += [*put["tile_start"], *read(tile, put["newline"]), *put["tile_end"]]
    elif plan.rows:
        rest = _merged(plan, grids, starts, put["newline"], unpad=merge == "spatial_unpad")

    apart = plan.overview and bool(put["tile_start"] or put["tile_end"])
    if apart:
        whole = [*put["start"], *whole, *put["end"]]
    tokens = [*rest, *whole] if plan.overview_last else [*whole, *rest]
    if not apart:
        tokens = [*put["start"], *tokens, *put["end"]]
    return [*_written(number, rows), *tokens]


def _merged(
    plan: Plan, grids: Sequence[tuple[int, ...]], starts: Sequence[int], newline: list[int], unpad: bool
) -> list[int]:
    """All tiles but the overview, row by row over the picture.

    ``spatial`` and ``unpad`` of LLaVA-NeXT's ``mm_patch_merge_type``, ``llava/model/llava_arch.py``.
    """
    pieces = set(grids[plan.overview :])
    if any(len(piece) != 2 for piece in pieces):
        raise ValueError(
            "tiles are merged by their rows and columns of tokens, and these have none (queries, or a class "
            "token before them); use merge 'flat', or a connector such as 'mlp' or 'pixel_shuffle'"
        )
    if len(pieces) != 1:
        raise ValueError(
            f"tiles are merged only if all have the same rows and columns of tokens, got "
            f"{sorted(set(grids))}; use merge 'flat'"
        )
    tall, wide = pieces.pop()
    height, width = plan.rows * tall, plan.columns * wide
    above, beside = unpadding(plan.source_px, (height, width)) if unpad and plan.canvas_px else (0, 0)
    order: list[int] = []
    for line in range(above, height - above):
        row, y = divmod(line, tall)
        places: list[int] = []
        for column in range(plan.columns):
            start = starts[plan.overview + row * plan.columns + column] + y * wide
            places += range(start, start + wide)
        order += places[beside : width - beside]
        order += newline
    return order


def unpadding(source_px: Size, grid: Size) -> Size:
    """Rows above and below, and columns left and right, that show only padding.

    LLaVA-NeXT's ``unpad_image``, ``llava/model/llava_arch.py``, in integers: there ``int(height * (columns /
    width))`` is one too small where the product is whole and its floating point is not; transformers rounds
    to seven digits first, which is this.
    """
    (height, width), (rows, columns) = source_px, grid
    if width * rows > columns * height:
        return (rows - height * columns // width) // 2, 0
    return 0, (columns - width * rows // height) // 2


def _written(number: int, rows: dict[str, int]) -> list[int]:
    """The picture's number in marks: opened, its decimal digits, closed; nothing without the mark ``id``."""
    if "id" not in rows:
        return []
    if number < 0:
        raise ValueError(f"pictures are numbered from 0, got {number}")
    first = -1 - rows["id"]
    return [first, *(first - 1 - int(digit) for digit in str(number)), first - 11]
