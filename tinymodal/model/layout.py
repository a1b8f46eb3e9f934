"""Where the embeddings of a batch's tiles lie, and which of them each placeholder takes.

Tiles of one size go through the tower together, so their embeddings lie end to end size by size, in the
order in which sizes first come; behind them lie the learned marks. Training and generation both find their
way with :func:`lay_out`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Picture(NamedTuple):
    """One prepared picture."""

    tiles: Sequence[Tensor]
    """float32 [3, H, W] each"""
    tile_tokens: Sequence[int]
    """Embeddings of each tile."""
    order: Tensor | None
    """int64 [tokens] of ``geometry.arrange``; None: the tiles' embeddings one after the other."""


def lay_out(pictures: Sequence[Picture]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Stack the tiles of some pictures, and find the embedding of every placeholder.

    Args:
        pictures: at least one, in reading order.

    Returns:
        float32 [I, 3, H, W] for each size of tile; and int64 [K], the places in the embeddings of these
        tensors laid end to end, with the marks after them.

    Raises:
        ValueError: tiles of one size that take different numbers of tokens: they are not of one processor.
    """
    sizes: dict[torch.Size, list[Tensor]] = {}
    each: dict[torch.Size, int] = {}
    found: list[list[tuple[torch.Size, int]]] = []
    for picture in pictures:
        places = []
        for tile, tokens in zip(picture.tiles, picture.tile_tokens, strict=True):
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
    for picture, places in zip(pictures, found, strict=True):
        own = torch.cat([torch.arange(each[s]) + starts[s] + n * each[s] for s, n in places])
        if picture.order is not None:
            own = torch.where(picture.order < 0, total - 1 - picture.order, own[picture.order.clamp(min=0)])
        take.append(own)
    return tuple(torch.stack(tiles) for tiles in sizes.values()), torch.cat(take)
