"""Where in a picture or a sound each of its tokens looked, for every way to cut it and every grid of a tower.

What a token stands for is found in three steps, all of them integers of ``model/geometry.py`` turned round: a
token is made of some of the tower's positions, a position lies in its tile, a tile lies in the picture (or a
window in the sound). Tiles may overlap, as an overview does with the tiles below it; padding lies outside the
picture and is not drawn.

Learned queries look everywhere. Which position each of them asked is not arithmetic but the resampler's own
attention (``explain_attention.py``), and is given from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinymodal.core.types import Image
from tinymodal.model.audio_connectors import WindowQFormer
from tinymodal.model.connectors import Interleave, find_connector
from tinymodal.model.encoders import encoder_of
from tinymodal.model.geometry import Plan, num_tokens

# Shapes: K tokens of a medium, T tokens of a tile, S its tower's positions, C = S those that have a place.

Box = tuple[float, float, float, float]
"""Top, left, bottom, right as fractions of the picture. Of a sound left and right are of its length, top and
bottom 0 and 1. A box may reach beyond the picture, into padding."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
NO_PLACE = (
    "its tokens are learned queries, which have no place in it, and this connector's own attention is not "
    "known here"
)


@dataclass(frozen=True, slots=True)
class TilePlaces:
    """One tile of a picture, or one window of a sound."""

    boxes_C4: Tensor
    """float64 [C, 4], see :data:`Box`."""
    share_TC: Tensor
    """float32 [T, C]: of what each token is made; a row sums to 1, or to 0 where the token has no place."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the K tokens of a picture or a sound lie in it."""

    tiles: tuple[TilePlaces, ...]
    order: Tensor | None
    """int64 [K], which embedding stands at each place (``geometry.arrange``); None: tile after tile."""
    note: str = ""
    """Why nothing can be drawn; empty where it can."""

    @property
    def boxes_C4(self) -> Tensor:
        """Those of all tiles, float64 [C, 4]."""
        return torch.cat([tile.boxes_C4 for tile in self.tiles])

    def at_boxes(self, weights_K: Tensor) -> Tensor:
        """Weights of tokens -> of boxes, float32 [C]. Marks between the tokens have none."""
        sizes = [len(tile.share_TC) for tile in self.tiles]
        weights = weights_K.float()
        if self.order is not None:
            laid = torch.zeros(sum(sizes))
            put = self.order >= 0
            # A token may stand in the text more than once, as with tiles that are shown twice.
            laid.index_add_(0, self.order[put], weights[put])
            weights = laid
        parts = zip(weights.split(sizes), self.tiles, strict=True)
        return torch.cat([part @ tile.share_TC for part, tile in parts])


# ---- pictures


def places_of_picture(
    processor: Any, part: Image, size_px: tuple[int, int], asked: Sequence[Tensor] | None = None
) -> Places:
    """Where the tokens of a picture lie.

    Args:
        processor: of the model.
        part: the picture.
        size_px: its height and width, upright.
        asked: of a connector with learned queries, what each looked at: float [T, S] for each tile.
    """
    eyes = processor.image_processor
    how = eyes.preparation_for(part.max_tiles, part.fit_pixels)
    layout = eyes.layout(size_px, 0, part.max_tiles, part.fit_pixels)
    tower, connector = encoder_of(eyes.vision_config), find_connector(eyes.connector)
    tiles, note = [], ""
    made: dict[Any, Tensor | None] = {}
    for number, (box, tile_px, grid) in enumerate(
        zip(tile_boxes(layout.plan, how.resize), layout.plan.tiles_px, layout.feature_grids, strict=True)
    ):
        rows, columns = tower.patches(eyes.vision_config, tile_px)
        share: Tensor | None
        if asked is not None:
            share = asked[number].float()
        else:
            if (tile_px, grid) not in made:
                made[tile_px, grid] = made_of(grid, connector.shrink(grid, **eyes.options), connector)
            share = made[tile_px, grid]
        if share is None:
            share, note = torch.zeros(layout.tile_tokens[number], num_tokens(grid)), NO_PLACE
        edge = tower.patch_px(eyes.vision_config)
        seen = (min(1.0, rows * edge / tile_px[0]), min(1.0, columns * edge / tile_px[1]))
        tiles.append(TilePlaces(patches(box, (rows, columns), seen), with_place(share, rows * columns)))
    return Places(tuple(tiles), None if layout.order is None else torch.tensor(layout.order), note)


def tile_boxes(plan: Plan, resize: str) -> list[Box]:
    """Where in the picture each tile lies, in the order of ``plan.tiles_px``.

    Args:
        plan: of ``model/strategies.py``.
        resize: the strategy that made it.
    """
    height, width = plan.resized_px
    canvas = plan.canvas_px or plan.resized_px
    # As model/tiles.py places the picture in its frame: an odd rest goes to the right and below.
    top, left = (canvas[0] - height) // 2, (canvas[1] - width) // 2
    boxes: list[Box] = []
    if plan.overview:
        tall, wide = plan.tiles_px[0]
        if resize == "crop":
            above, beside = (height - tall) // 2, (width - wide) // 2
            boxes.append((above / height, beside / width, (above + tall) / height, (beside + wide) / width))
        elif resize == "pad":
            boxes.append(
                (-top / height, -left / width, (canvas[0] - top) / height, (canvas[1] - left) / width)
            )
        else:
            boxes.append(WHOLE)
    if plan.rows:
        tall, wide = plan.tiles_px[-1]
        for y in range(-top, plan.rows * tall - top, tall):
            for x in range(-left, plan.columns * wide - left, wide):
                boxes.append((y / height, x / width, (y + tall) / height, (x + wide) / width))
    return boxes


def patches(box: Box, grid: tuple[int, int], seen: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Boxes of a tile's patches in reading order, float64 [rows * columns, 4].

    Args:
        box: of the tile.
        grid: rows and columns.
        seen: the share of the tile's height and width that whole patches cover, from the top left.
    """
    (top, left, bottom, right), (rows, columns) = box, grid
    tall, wide = (bottom - top) * seen[0] / rows, (right - left) * seen[1] / columns
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    corners = (top + y * tall, left + x * wide, top + (y + 1) * tall, left + (x + 1) * wide)
    return torch.stack([corner.flatten() for corner in corners], dim=1)


def with_place(share_TS: Tensor, num_patches: int) -> Tensor:
    """Of positions only those that have a place in the picture, [T, patches].

    Class token and registers stand before the patches and have none; a patch that the tower leaves out is
    the first.
    """
    num_tokens, num_positions = share_TS.shape
    if num_positions >= num_patches:
        return share_TS[:, num_positions - num_patches :]
    return torch.cat([share_TS.new_zeros(num_tokens, num_patches - num_positions), share_TS], dim=1)


def made_of(grid: tuple[int, ...], tokens: tuple[int, ...], connector: Any) -> Tensor | None:
    """Of which positions each token is made, float32 [T, S]; None where arithmetic cannot tell.

    Args:
        grid: of the tower's positions.
        tokens: what the connector makes of it.
        connector: its class.
    """
    if issubclass(connector, Interleave):
        # Two features of every position, one behind the other.
        return torch.eye(num_tokens(grid)).repeat_interleave(2, dim=0)
    if len(tokens) == len(grid) == 2:
        down, across = (mean_of(a, b) for a, b in zip(grid, tokens, strict=True))
        return torch.einsum("tr,uc->turc", down, across).flatten(2).flatten(0, 1)
    return torch.eye(num_tokens(grid)) if tokens == grid else None


def mean_of(num_positions: int, num_groups: int, step: int = 0) -> Tensor:
    """Neighbours that become one, float32 [groups, positions], rows sum to 1.

    Args:
        num_positions: of the tower.
        num_groups: that become of them.
        step: positions of a group, the last of which may have fewer; 0: the length at which so many positions
            make as many groups, or where there is none those of adaptive pooling, which may share a position
            (``torch.nn.AdaptiveAvgPool1d``).
    """
    step = step or -(-num_positions // num_groups)
    share = torch.zeros(num_groups, num_positions)
    for group in range(num_groups):
        if -(-num_positions // step) == num_groups:
            first, last = group * step, min((group + 1) * step, num_positions)
        else:
            first = group * num_positions // num_groups
            last = -(-(group + 1) * num_positions // num_groups)
        share[group, first:last] = 1 / (last - first)
    return share


# ---- sounds


def places_of_sound(processor: Any, num_samples: int, asked: Sequence[Tensor] | None = None) -> Places:
    """Where the tokens of a sound lie in it.

    Args:
        processor: of the model.
        num_samples: of the sound, at the rate that the tower hears.
        asked: as of :func:`places_of_picture`, for each window.
    """
    ear = processor.feature_extractor
    connector = find_connector(ear.connector)
    layout = ear.layout(num_samples)
    tiles: list[TilePlaces] = []
    begin = 0
    for number, (samples, grid) in enumerate(
        zip(ear.hearing.windows(num_samples), layout.feature_grids, strict=True)
    ):
        num_positions, tokens = num_tokens(grid), layout.tile_tokens[number]
        share = (
            asked[number].float()
            if asked is not None
            else heard_in(num_positions, tokens, connector, ear.options)
        )
        # The window's silence lies behind the sound's end, as padding lies beside a picture.
        box = (0.0, begin / num_samples, 1.0, (begin + samples) / num_samples)
        tiles.append(TilePlaces(patches(box, (1, num_positions)), share))
        begin += samples
    return Places(tuple(tiles), None if layout.order is None else torch.tensor(layout.order))


def heard_in(num_positions: int, num_tokens: int, connector: Any, options: Mapping[str, Any]) -> Tensor:
    """Of which positions each token of a window is made, float32 [T, S]: neighbours in time."""
    each = options["num_queries"] if issubclass(connector, WindowQFormer) else 1
    share = mean_of(num_positions, num_tokens // each, options.get("factor", 0))
    return share.repeat_interleave(each, dim=0)


# ---- drawing ground


def spread(weights_C: Tensor, boxes_C4: Tensor, size: tuple[int, int]) -> Tensor:
    """Weights of boxes as a field over the picture, float32 [H, W].

    A box spreads its weight evenly over its own area; what lies outside the picture is left out. Where boxes
    overlap they add up, so the field's sum is the weight that lies inside the picture.

    Args:
        weights_C: float [C].
        boxes_C4: [C, 4], see :data:`Box`.
        size: rows and columns of the field.
    """
    height, width = size
    rows_CH = _overlap(boxes_C4[:, 0], boxes_C4[:, 2], height)
    columns_CW = _overlap(boxes_C4[:, 1], boxes_C4[:, 3], width)
    return ((weights_C.double()[:, None] * rows_CH).T @ columns_CW).float()


def _overlap(first_C: Tensor, last_C: Tensor, number: int) -> Tensor:
    """The share of each stretch that lies in each of ``number`` equal pieces of 0..1, float64 [C, number]."""
    edges = torch.arange(number + 1, dtype=torch.float64) / number
    inside = torch.minimum(last_C[:, None], edges[1:]) - torch.maximum(first_C[:, None], edges[:-1])
    return inside.clamp(min=0) / (last_C - first_C)[:, None]
