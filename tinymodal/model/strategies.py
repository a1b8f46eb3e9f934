"""Which tiles a picture becomes: seven strategies, sizes only. No tensor, no pixel.

Most of it is integer arithmetic. Where the published systems round a floating point number, the same
operations stand here in the same order: with exact fractions one size in some thousands would come out a
pixel or a tile apart from what their weights were trained on. Sizes are (height, width).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, isqrt, log, prod, sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .image import Preparation

Size = tuple[int, int]

ROOM_PIXELS = 4096**2
"""A picture in between (padded to a square, or resized before its middle is cut out) may have so many
pixels, or four times those of its source if that is more. A photograph is never affected; a strip of 60,000
x 1 is."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which tiles a picture becomes."""

    tiles_px: tuple[Size, ...]
    """Height and width of each tile, in the order in which the tower sees them: the overview first, then the
    grid row by row."""
    source_px: Size
    """The picture that is cut."""
    resized_px: Size
    """What the picture is resized to before tiles are cut from it, or before it is framed."""
    overview: bool = True
    """Tile 0 shows the whole picture."""
    rows: int = 0
    """Rows of the other tiles; 0 where there are none."""
    columns: int = 0
    """Columns of the other tiles; 0 where there are none."""
    canvas_px: Size | None = None
    """Frame in whose middle the resized picture stands; None where there is none."""
    first_px: tuple[Size, ...] = ()
    """Sizes the picture takes one after the other before anything else (SmolVLM's two)."""
    overview_last: bool = False
    """The overview is read after the other tiles."""


def plan(size_px: Size, how: Preparation) -> Plan:
    """Which tiles a picture of a given size becomes.

    Args:
        size_px: height and width of the picture, upright.
        how: the strategy, ``how.resize``, and its numbers; ``docs/resolutions.md`` has the table.

    Raises:
        ValueError: for a picture without pixels.
    """
    if min(size_px) < 1:
        raise ValueError(f"a picture of {size_px[0]} x {size_px[1]} px holds no pixel")
    return STRATEGIES[how.resize](size_px, how)


def room(size_px: Size, how: Preparation) -> int:
    """Most pixels of a picture in between, see :data:`ROOM_PIXELS`; never more than ``max_pixels``."""
    least = how.height_px * how.width_px
    return max(least, min(how.max_pixels, max(ROOM_PIXELS, 4 * size_px[0] * size_px[1])))


# ---- strategies with one tile


def _square(size_px: Size, how: Preparation) -> Plan:
    """Stretch, whatever the shape."""
    return Plan((how.size_px,), size_px, how.size_px)


def _crop(size_px: Size, how: Preparation) -> Plan:
    """Shrink until the target is just covered, then cut out the middle: what CLIP's processor does."""
    (height, width), (tall, wide) = size_px, how.size_px
    if width * tall >= height * wide:
        resized = tall, width * tall // height
    else:
        resized = height * wide // width, wide
    return Plan((how.size_px,), size_px, resized)


def _pad(size_px: Size, how: Preparation) -> Plan:
    """Fill up to the target's shape, then resize: ``expand2square`` of LLaVA, ``llava/mm_utils.py``."""
    frame, most = _frame(size_px, how), room(size_px, how)
    if prod(frame) <= most:
        return Plan((how.size_px,), size_px, size_px, canvas_px=frame)
    height, width = (max(1, edge * isqrt(most) // isqrt(prod(frame))) for edge in size_px)
    return Plan((how.size_px,), size_px, (height, width), canvas_px=_frame((height, width), how))


def _frame(size_px: Size, how: Preparation) -> Size:
    """The smallest frame of the target's shape that holds a picture; for a square its longest side."""
    height, width = size_px
    return (
        max(height, -(-width * how.height_px // how.width_px)),
        max(width, -(-height * how.width_px // how.height_px)),
    )


def _native(size_px: Size, how: Preparation) -> Plan:
    """Keep the shape; sides are multiples of ``step_px``, pixels lie within ``fit_pixels``.

    With two different limits a picture between them keeps its size, rounded to the step, as in Qwen2-VL
    (``smart_resize``, ``qwen_vl_utils/vision_process.py``). With two equal ones every picture gets as many
    patches as fit, as in NaFlex (SigLIP 2, arXiv:2502.14786). What is too narrow for its length loses
    length.
    """
    least, most = how.fit_pixels
    step = how.step_px
    if least == most:
        height, width = _most_patches(size_px, step, most // step**2)
    else:
        height, width = (round(edge / step) * step for edge in size_px)
        if height * width > most:
            shrink = sqrt(prod(size_px) / most)
            height, width = (max(step, floor(edge / shrink / step) * step) for edge in size_px)
        elif height * width < least:
            grow = sqrt(least / prod(size_px))
            height, width = (ceil(edge * grow / step) * step for edge in size_px)
    while height * width > most:
        longer = max(step, most // min(height, width) // step * step)
        height, width = (longer, width) if height > width else (height, longer)
    return Plan(((height, width),), size_px, (height, width))


def _most_patches(size_px: Size, step: int, most: int) -> Size:
    """Sides at the largest scale, up to 100, at which at most ``most`` patches cover the picture.

    Found by halving to 1e-5 as transformers does, whose rounding is thereby ours.
    """
    low, high = 1e-5 / 10, 100.0
    while high - low >= 1e-5:
        scale = (low + high) / 2
        if prod(max(1, ceil(edge * scale / step)) for edge in size_px) <= most:
            low = scale
        else:
            high = scale
    height, width = (max(1, ceil(edge * low / step)) * step for edge in size_px)
    return height, width


# ---- strategies with several tiles


def _anyres(size_px: Size, how: Preparation) -> Plan:
    """The whole picture squashed into one tile, and the canvas that holds it best cut into tiles.

    LLaVA-NeXT, ``llava/mm_utils.py``: ``select_best_resolution``, ``resize_and_pad_image``,
    ``divide_to_patches``.
    """
    (height, width), (tall, wide) = size_px, how.size_px
    canvases = how.pinpoints
    if how.max_tiles:
        canvases = tuple(p for p in canvases if p[0] // tall * (p[1] // wide) <= how.max_tiles)
    if not canvases:
        return Plan((how.size_px,), size_px, how.size_px)
    canvas = best_resolution(size_px, canvases)
    scale_y, scale_x = canvas[0] / height, canvas[1] / width
    if scale_x < scale_y:
        resized = min(ceil(height * scale_x), canvas[0]), canvas[1]
    else:
        resized = canvas[0], min(ceil(width * scale_y), canvas[1])
    rows, columns = canvas[0] // tall, canvas[1] // wide
    tiles = (how.size_px,) * (1 + rows * columns)
    return Plan(tiles, size_px, resized, rows=rows, columns=columns, canvas_px=canvas)


def best_resolution(size_px: Size, canvases: Sequence[Size]) -> Size:
    """The canvas that shows most pixels of a picture, then wastes fewest; of equal ones the first.

    All canvases are equal for a picture smaller than each, so their order matters.
    """

    def shown(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / size_px[1], canvas[0] / size_px[0])
        pixels = min(int(size_px[0] * scale) * int(size_px[1] * scale), prod(size_px))
        return pixels, pixels - prod(canvas)

    return max(canvases, key=shown)


def _slices(size_px: Size, how: Preparation) -> Plan:
    """A thumbnail, and up to ``max_tiles`` slices, each of about the tile's area in the picture's own shape.

    MiniCPM-V 2.5 and 2.6, ``finetune/dataset.py`` (``slice_image``), arXiv:2408.01800.
    """
    height, width = size_px
    edge, step = how.height_px, how.step_px
    thumbnail = _of_area(height, width, edge, step)
    times = min(ceil(width * height / (edge * edge)), how.max_tiles)
    if times <= 1:
        return Plan((thumbnail,), size_px, thumbnail)
    grids = [
        (columns, num // columns)
        for num in (times - 1, times, times + 1)
        if 1 < num <= how.max_tiles
        for columns in range(1, num + 1)
        if num % columns == 0
    ]
    columns, rows = min(grids, key=lambda grid: abs(log(width / height) - log(grid[0] / grid[1])))
    tall, wide = _of_area(_multiple(height, rows) // rows, _multiple(width, columns) // columns, edge, step)
    tiles = (thumbnail, *[(tall, wide)] * (rows * columns))
    return Plan(tiles, size_px, (tall * rows, wide * columns), rows=rows, columns=columns)


def _of_area(height: int, width: int, edge: int, step: int) -> Size:
    """The shape of height x width at the area of an ``edge`` squared, in multiples of ``step``.

    Of a shape so narrow that it is widened to one ``step``, no side is longer than keeps it within four times
    the area: 14 px from 16,000 : 1 on, where the published code makes ever longer ones.
    """
    ratio = width / height
    tall = int(edge / sqrt(ratio))
    wide = int(tall * ratio)
    longest = max(step, 4 * edge * edge // step // step * step)
    return min(_multiple(tall, step), longest), min(_multiple(wide, step), longest)


def _multiple(length: float, step: int) -> int:
    """The nearest multiple, to even in the middle; at least one."""
    return max(round(length / step) * step, step)


def _tiles(size_px: Size, how: Preparation) -> Plan:
    """Tiles of one size that together have nearly the picture's shape, and a thumbnail that is read last.

    The grid is InternVL's: the nearest aspect ratio (``dynamic_preprocess``, arXiv:2404.16821), or with
    ``longest_px`` Idefics3's and SmolVLM's: the longest edge at that length, then both sides rounded up to
    whole tiles (arXiv:2408.12637, arXiv:2504.05299), with a tile less at a time until ``max_tiles`` hold it.
    """
    tall, wide = how.size_px
    first: tuple[Size, ...] = ()
    if how.longest_px:
        for longest in range(how.longest_px, 0, -tall):
            first = _at_longest(size_px, longest, tall)
            rows, columns = first[1][0] // tall, first[1][1] // wide
            if rows * columns <= how.max_tiles:
                break
    else:
        rows, columns = _nearest_grid(size_px, how)
    if rows * columns == 1:
        return Plan((how.size_px,), size_px, how.size_px, first_px=first)
    return Plan(
        (how.size_px,) * (rows * columns + how.thumbnail),
        source_px=size_px,
        resized_px=(rows * tall, columns * wide),
        overview=how.thumbnail,
        rows=rows,
        columns=columns,
        first_px=first,
        overview_last=True,
    )


def _nearest_grid(size_px: Size, how: Preparation) -> Size:
    """Rows and columns of the nearest aspect ratio; of equals the most tiles, short of twice the picture."""
    height, width = size_px
    most = how.max_tiles
    grids = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most]
    best, nearest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=prod):
        apart = abs(width / height - columns / rows)
        large = width * height > 0.5 * prod(how.size_px) * columns * rows
        if apart < nearest or (apart == nearest and large):
            best, nearest = (rows, columns), apart
    return best


def _at_longest(size_px: Size, longest: int, edge: int) -> tuple[Size, Size]:
    """The picture with its longest side at ``longest``, the other even; and rounded up to whole tiles."""
    height, width = size_px
    ratio = width / height
    if width >= height:
        short = int(longest / ratio)
        height, width = max(short + short % 2, 1), longest
    else:
        short = int(longest * ratio)
        height, width = longest, max(short + short % 2, 1)
    ratio = width / height
    if width >= height:
        wide = ceil(width / edge) * edge
        return (height, width), (ceil(int(wide / ratio) / edge) * edge, wide)
    tall = ceil(height / edge) * edge
    return (height, width), (tall, ceil(int(tall * ratio) / edge) * edge)


STRATEGIES: dict[str, Callable[[Size, Preparation], Plan]] = {
    "square": _square,
    "crop": _crop,
    "pad": _pad,
    "anyres": _anyres,
    "slices": _slices,
    "tiles": _tiles,
    "native": _native,
}
"""How a picture becomes tiles."""

ONE_TILE = ("square", "crop", "pad", "native")
"""Strategies that never make a second tile."""
