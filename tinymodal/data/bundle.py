"""Samples on their way from a worker process, without loss and with few messages.

A chunk of samples becomes one ``Bundle``: its pictures and sounds go through shared memory as the bytes of
one tensor, as each tensor sent takes a file handle and about 0.9 ms. The rest is small and goes through the
pipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinymodal.core.errors import DataError
from tinymodal.core.types import Encoded, MediaItem, SpeechItem

Outline = tuple[torch.dtype, torch.Size]
"""Of a tensor that is sent as bytes."""


class Bad(NamedTuple):
    """A row that cannot be used, in place of its sample."""

    sample_id: str
    error: DataError


class Bundle(NamedTuple):
    """A chunk of samples."""

    items: list[_Outline | Bad]
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    targets: NDArray[np.int64]
    values: Tensor


class _Outline(NamedTuple):
    """An ``Encoded`` without its tensors."""

    sample_id: str
    length: int
    parts: tuple[int, ...]
    source: int
    media: list[_Shape]
    speech: list[_Spoken]


class _Shape(NamedTuple):
    """A ``MediaItem`` without its tensors."""

    item: MediaItem
    """With neither tiles nor targets nor order."""
    tiles: tuple[Outline, ...]
    targets: torch.Size | None
    order: NDArray[np.int64] | None


class _Spoken(NamedTuple):
    """A ``SpeechItem`` without its tensors."""

    item: SpeechItem
    """With neither wave nor codes."""
    wave: Outline | None
    codes: Outline | None


def bundle(chunk: list[Encoded | Bad]) -> Bundle:
    """Lay the tensors of a chunk end to end."""
    good = [item for item in chunk if not isinstance(item, Bad)]
    media = [medium for item in good for medium in item.media]
    return Bundle(
        [
            item
            if isinstance(item, Bad)
            else _Outline(
                item.sample_id,
                len(item),
                item.parts,
                item.source,
                list(map(_shape, item.media)),
                list(map(_spoken, item.speech)),
            )
            for item in chunk
        ],
        _flat([item.ids for item in good], torch.int64).numpy(),
        _flat([item.labels for item in good], torch.int64).numpy(),
        _flat([medium.targets for medium in media if medium.targets is not None], torch.int64).numpy(),
        _flat([_bytes(tensor) for item in good for tensor in _sent(item)], torch.uint8),
    )


def unbundle(parcel: Bundle) -> Iterator[Encoded | Bad]:
    """The chunk's items again, in order."""
    ids, labels, targets = map(torch.from_numpy, (parcel.ids, parcel.labels, parcel.targets))
    at = values_at = targets_at = 0

    def next_tensor(outline: Outline) -> Tensor:
        nonlocal values_at
        dtype, size = outline
        begin, values_at = values_at, values_at + size.numel() * dtype.itemsize
        # A copy: a view would keep the whole chunk in shared memory while a sample waits in a row.
        return parcel.values[begin:values_at].clone().view(dtype).view(size)

    for item in parcel.items:
        if isinstance(item, Bad):
            yield item
            continue
        media = []
        for shape in item.media:
            tiles = tuple(map(next_tensor, shape.tiles))
            target = None
            if shape.targets is not None:
                end = targets_at + shape.targets.numel()
                target, targets_at = targets[targets_at:end].view(shape.targets), end
            order = None if shape.order is None else torch.from_numpy(shape.order)
            media.append(replace(shape.item, tiles=tiles, targets=target, order=order))
        speech = tuple(
            replace(
                spoken.item,
                wave=None if spoken.wave is None else next_tensor(spoken.wave),
                codes=None if spoken.codes is None else next_tensor(spoken.codes),
            )
            for spoken in item.speech
        )
        end = at + item.length
        yield Encoded(
            ids[at:end], labels[at:end], tuple(media), item.sample_id, item.parts, item.source, speech
        )
        at = end


def _sent(sample: Encoded) -> Iterator[Tensor]:
    """The tensors that go as bytes, in the order in which :func:`unbundle` takes them."""
    for item in sample.media:
        yield from item.tiles
    for spoken in sample.speech:
        yield from (tensor for tensor in (spoken.wave, spoken.codes) if tensor is not None)


def _shape(item: MediaItem) -> _Shape:
    return _Shape(
        replace(item, tiles=(), targets=None, order=None),
        tuple((tile.dtype, tile.shape) for tile in item.tiles),
        None if item.targets is None else item.targets.shape,
        None if item.order is None else item.order.numpy(),
    )


def _spoken(item: SpeechItem) -> _Spoken:
    return _Spoken(
        replace(item, wave=None, codes=None),
        None if item.wave is None else (item.wave.dtype, item.wave.shape),
        None if item.codes is None else (item.codes.dtype, item.codes.shape),
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _flat(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else torch.empty(0, dtype=dtype)
