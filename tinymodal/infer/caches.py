"""Key-value caches of rows that come and go: grown in place, joined on the right, cut out again.

All rows of a cache end at its last column; what a shorter one lacks is on its left and masked. So a row is
known by its length alone, and rows of several caches are joined by moving them to one right edge.

transformers keeps for a layer with a sliding window only the window. Here such a layer keeps everything, and
the window is in the mask, where transformers puts it anyway; that costs memory for texts longer than the
window and lets rows of different lengths meet. Linear attention and convolutions keep a state that is no
column: caches with such layers are not joined (:attr:`Kind.joins`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Shapes: B rows, A heads, T columns, R columns there is room for, H width of a head, F numbers of all layers
# for one token.

ROOM = 64
"""Columns added at least when a layer has no room left: the copies of a long reply are as many as its tokens
over this."""
JOINED = {"full_attention", "sliding_attention"}
"""Kinds of layers, as configs name them, whose caches can be joined."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values with room behind them, so that a step writes one column instead of copying all."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None, columns: int = 0) -> None:
        """Begin empty, or with ``columns`` columns of [B, A, R, H]."""
        super().__init__()
        self.room: list[Tensor] = []
        """Keys and values with their room; empty before the first column."""
        self.columns = columns
        if keys is not None and values is not None:
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self.put([keys, values], columns)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See transformers' ``DynamicLayer.update``."""
        before, after = self.columns, self.columns + key_states.shape[-2]
        given = [key_states, value_states]
        if not self.room:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            # The prompt as it is: most of it is never copied again.
            self.room = given
        else:
            if after > self.room[0].shape[2]:
                more = max(ROOM, after // 4)
                self.room = [_wider(kept, before, after + more) for kept in self.room]
            for kept, new in zip(self.room, given, strict=True):
                kept[:, :, before:after] = new
        self.columns = after
        keys, values = (kept[:, :, :after] for kept in self.room)
        self.keys, self.values = keys, values
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx``, which may repeat some."""
        if self.room:
            self.put([kept.index_select(0, beam_idx.to(kept.device)) for kept in self.room], self.columns)

    def put(self, room: list[Tensor], columns: int) -> None:
        """Other keys and values in place of these."""
        self.room, self.columns = room, columns
        self.keys, self.values = (kept[:, :, :columns] for kept in room)


def _wider(kept: Tensor, columns: int, room: int) -> Tensor:
    wider = kept.new_empty(*kept.shape[:2], room, kept.shape[3])
    wider[:, :, :columns] = kept[:, :, :columns]
    return wider


class Kind(NamedTuple):
    """What can be done with the caches of a language model."""

    joins: bool
    """Whether they can be joined and cut: every layer's is keys and values."""
    slides: bool
    """Whether some layer looks at a window of columns only, so that no gap may lie within a row."""
    num_layers: int


def kind_of(text_config: Any) -> Kind:
    """What can be done with the caches of a language model, from its config."""
    layers = DynamicCache(config=text_config).layers
    kinds = set(getattr(text_config, "layer_types", None) or ())
    joins = kinds <= JOINED and all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers)
    slides = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)
    return Kind(joins and bool(layers), slides, len(layers))


def empty(text_config: Any, kind: Kind) -> Any:
    """A cache for new rows: of growing layers where they can be joined, else transformers' own."""
    if not kind.joins:
        return DynamicCache(config=text_config)
    return _of([GrowingLayer() for _ in range(kind.num_layers)])


def _of(layers: list[GrowingLayer]) -> Any:
    cache: Any = DynamicCache()
    cache.layer_class_to_replicate = None
    cache.layers = layers
    return cache


def join(pieces: Sequence[tuple[Cache, Sequence[int]]], lengths: Sequence[int]) -> Any:
    """One cache of some rows of several.

    Args:
        pieces: caches of one language model, each with the numbers of the rows that are kept.
        lengths: of all kept rows in this order, in columns.
    """
    columns = max(lengths)
    found = []
    for layers in zip(*(cache.layers for cache, _ in pieces), strict=True):
        keys, values = _joined(layers, pieces, columns)
        found.append(GrowingLayer(keys, values, columns))
    return _of(found)


def _joined(
    layers: Sequence[Any], pieces: Sequence[tuple[Cache, Sequence[int]]], columns: int
) -> tuple[Tensor | None, Tensor | None]:
    if not layers[0].is_initialized:  # it shares another layer's
        return None, None
    both: list[Tensor] = []
    for name in ("keys", "values"):
        like = getattr(layers[0], name)
        num = sum(len(rows) for _, rows in pieces)
        # Zeros, not what lies there: a masked column counts for nothing only where it is a number.
        room = like.new_zeros(num, like.shape[1], columns + ROOM, like.shape[3])
        at = 0
        for layer, (_, rows) in zip(layers, pieces, strict=True):
            kept = getattr(layer, name)
            wide = min(columns, kept.shape[2])
            index = torch.tensor(rows, device=kept.device)
            room[at : at + len(rows), :, columns - wide : columns] = kept[:, :, kept.shape[2] - wide :][index]
            at += len(rows)
        both.append(room)
    return both[0], both[1]


def close_gaps(cache: Any, prefix: int, before: Sequence[int], new: Sequence[int]) -> int:
    """Move rows of a prefix and what was read after it together, to the right edge; in place.

    Args:
        cache: of ``prefix`` columns and those of the longest new part.
        prefix: columns.
        before: of them, those that each row uses: the last ones.
        new: columns that each row uses of the new part: the last ones.

    Returns:
        How many columns there are now.
    """
    if all(n == max(new) for b, n in zip(before, new, strict=True) if b):
        return prefix + max(new)
    longest_new, columns = max(new), max(b + n for b, n in zip(before, new, strict=True))
    index_BT = torch.zeros(len(new), columns, dtype=torch.int64)
    for i, (b, n) in enumerate(zip(before, new, strict=True)):
        index_BT[i, columns - n - b : columns - n] = torch.arange(prefix - b, prefix)
        index_BT[i, columns - n :] = torch.arange(prefix + longest_new - n, prefix + longest_new)
    for layer in cache.layers:
        if not layer.is_initialized:
            continue
        take = index_BT.to(layer.keys.device)[:, None, :, None]
        both = [x.gather(2, take.expand(-1, x.shape[1], -1, x.shape[3])) for x in (layer.keys, layer.values)]
        layer.put(both, columns)
    return columns


def crop(cache: Any, columns: int) -> None:
    """Take the last columns away, but for so many."""
    for layer in cache.layers:
        if layer.is_initialized:
            layer.put(layer.room, columns)


def cut(cache: Any, row: int, first: int, last: int) -> Tensor:
    """What all layers keep of some columns of one row, [T, F]."""
    kept = []
    for layer in cache.layers:
        if layer.is_initialized:
            for x in (layer.keys, layer.values):
                kept.append(x[row, :, first:last].transpose(0, 1).flatten(1))
    return torch.cat(kept, 1)


def filled(rows: Sequence[Tensor], shapes: Sequence[tuple[int, int, int]]) -> Any:
    """A cache of rows that :func:`cut` cut out, at one right edge.

    Args:
        rows: [T, F] each; T may be 0.
        shapes: of each layer, heads and the widths of a key and of a value; (0, 0, 0): it keeps nothing.
    """
    columns = max(len(row) for row in rows)
    like = rows[0]
    all_BTF = like.new_zeros(len(rows), columns, like.shape[1])
    for i, row in enumerate(rows):
        all_BTF[i, columns - len(row) :] = row
    layers, at = [], 0
    for heads, key, value in shapes:
        if not heads:
            layers.append(GrowingLayer())
            continue
        both = []
        for width in (key, value):
            part = all_BTF[:, :, at : at + heads * width].unflatten(2, (heads, width))
            room = part.new_zeros(len(rows), heads, columns + ROOM, width)
            room[:, :, :columns] = part.transpose(1, 2)
            both.append(room)
            at += heads * width
        layers.append(GrowingLayer(both[0], both[1], columns))
    return _of(layers)


def shapes(cache: Any) -> list[tuple[int, int, int]]:
    """Of each layer, heads and the widths of a key and of a value."""
    return [
        (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        if layer.is_initialized
        else (0, 0, 0)
        for layer in cache.layers
    ]
