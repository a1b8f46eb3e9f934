"""What a picture or sound costs, where a batch's embeddings lie, and which of them each placeholder takes.

Tiles of one size go through the tower together, so their embeddings lie end to end size by size, in the
order in which sizes first come; behind them lie the learned marks. A sound's tiles are its windows, and their
size is their length. Training and generation both find their way with :func:`lay_out`, kind by kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .geometry import num_tokens


@dataclass(frozen=True, slots=True)
class Layout:
    """What a picture of a given size, or a sound of a given length, costs, and where its tokens go.

    Needs no pixels, no samples and no weights.
    """

    feature_grids: tuple[tuple[int, ...], ...]
    """Positions of the tower for each tile, before the connector: rows and columns of patches, or of a window
    of sound their number."""
    tile_tokens: tuple[int, ...]
    """Embeddings of each tile."""
    grid: tuple[int, ...]
    """Rows and columns of tokens, or their number where they are no rectangle; ``prod(grid) == tokens``."""
    order: tuple[int, ...] | None
    """Which embedding stands at each place (``geometry.arrange``); None: one tile, in its own order."""

    @property
    def tokens(self) -> int:
        """Placeholders it needs among the words."""
        return num_tokens(self.grid)

    @property
    def patches(self) -> int:
        """Positions the tower computes."""
        return sum(num_tokens(grid) for grid in self.feature_grids)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One picture or sound, ready for the tower, and what it costs."""

    tiles: tuple[Tensor, ...]
    """float32 [3, H, W] each; windows of a sound [bands, frames] or [1, samples]; ``seen``: the tower's
    features, [*grid, E] each"""
    layout: Layout
    seconds: float | None = None
    """Of the stretch of a sound that was read, before silence was put behind it; None: a picture."""
    seen: bool = False
    """The tower has run already."""
    key: str = ""
    """Under which the tower's features are kept; empty: nowhere."""

    @property
    def feature_grids(self) -> tuple[tuple[int, ...], ...]:
        return self.layout.feature_grids

    @property
    def tile_tokens(self) -> tuple[int, ...]:
        return self.layout.tile_tokens

    @property
    def grid(self) -> tuple[int, ...]:
        return self.layout.grid

    @property
    def order(self) -> tuple[int, ...] | None:
        return self.layout.order

    @property
    def tokens(self) -> int:
        return self.layout.tokens

    @property
    def patches(self) -> int:
        return self.layout.patches


class Tiled(NamedTuple):
    """One prepared picture or sound."""

    tiles: Sequence[Tensor]
    """float32 [3, H, W] each; of a sound [bands, frames] or [1, samples]"""
    tile_tokens: Sequence[int]
    """Embeddings of each tile."""
    order: Tensor | None
    """int64 [tokens] of ``geometry.arrange``; None: the tiles' embeddings one after the other."""


def lay_out(media: Sequence[Tiled]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Stack the tiles of some media of one kind, and find the embedding of every placeholder.

    Args:
        media: at least one, in reading order.

    Returns:
        float32 [I, *size] for each size of tile, e.g. [I, 3, H, W]; and int64 [K], the places in the
        embeddings of these tensors laid end to end, with the marks after them.

    Raises:
        ValueError: tiles of one size that take different numbers of tokens: they are not of one processor.
    """
    sizes: dict[torch.Size, list[Tensor]] = {}
    each: dict[torch.Size, int] = {}
    found: list[list[tuple[torch.Size, int]]] = []
    for medium in media:
        places = []
        for tile, tokens in zip(medium.tiles, medium.tile_tokens, strict=True):
            if each.setdefault(tile.shape, tokens) != tokens:
                raise ValueError(
                    f"a tile of {list(tile.shape)} takes {tokens} tokens here and {each[tile.shape]} before; "
                    f"expected one number for one size"
                )
            same = sizes.setdefault(tile.shape, [])
            places.append((tile.shape, len(same)))
            same.append(tile)
        found.append(places)
    starts, total = {}, 0
    for shape, tiles in sizes.items():
        starts[shape] = total
        total += len(tiles) * each[shape]
    take = []
    for medium, places in zip(media, found, strict=True):
        own = torch.cat([torch.arange(each[s]) + starts[s] + n * each[s] for s, n in places])
        if medium.order is not None:
            own = torch.where(medium.order < 0, total - 1 - medium.order, own[medium.order.clamp(min=0)])
        take.append(own)
    return tuple(torch.stack(tiles) for tiles in sizes.values()), torch.cat(take)


VALUES = {"image": "pixel_values", "audio": "audio_values"}
"""What the model's forward calls the tiles of each kind."""


def as_inputs(media: Sequence[Any], kind: str) -> dict[str, Any]:
    """What the model's forward takes for some prepared media of one kind in reading order.

    Args:
        media: at least one, with ``tiles``, ``tile_tokens`` and ``order``.
        kind: ``image`` or ``audio``.

    Returns:
        ``pixel_values`` (or ``audio_values``) float32 [I, *size], or a list of one such tensor for each size
        of tile; and, unless every medium is one tile of one size without marks, ``image_take`` (or
        ``audio_take``) int64 [K].
    """
    orders = [None if medium.order is None else torch.tensor(medium.order) for medium in media]
    stacked, take = lay_out(
        [Tiled(m.tiles, m.tile_tokens, order) for m, order in zip(media, orders, strict=True)]
    )
    if len(stacked) == 1 and not any(order is not None for order in orders):
        return {VALUES[kind]: stacked[0]}
    return {VALUES[kind]: stacked[0] if len(stacked) == 1 else list(stacked), f"{kind}_take": take}


def as_list(media: Any) -> list[Any]:
    """One picture or sound, several, or several lists of them -> one list in reading order."""
    if not isinstance(media, (list, tuple)):
        return [media]
    return [medium for entry in media for medium in as_list(entry)]
