"""What was read before is not read again: files, pictures and sounds, and the beginnings of prompts.

Three things are kept under one limit, and what was not used for longest goes first: prepared media by their
source, embeddings of media by what was prepared, and keys and values of a conversation in blocks of ``BLOCK``
tokens. A block is named by a digest of all that stands before its end: the ids of the words, and for each
placeholder the digest of the medium that it shows and which of its embeddings. So a block is found only where
everything before it is the same, the second turn of a conversation finds all but its last few tokens, and two
conversations that begin alike share what they share.

Right while the weights stay as they are: for a model that is being trained, keep nothing.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from tinymodal.core.types import Encoded, MediaItem
from tinymodal.model.layout import Prepared

# Shapes: T tokens, F numbers that all layers keep of one, K embeddings of a medium, D language width.

BLOCK = 16
"""Tokens of a block: fewer are computed again at the end of what is known."""


class Kept:
    """A store of a limited size. May be used by several threads.

    Args:
        mb: limit in megabytes (10^6 bytes); 0 keeps nothing.
    """

    def __init__(self, mb: int) -> None:
        self.limit = mb * 1_000_000
        self.bytes = 0
        self._things: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._things)

    def get(self, key: Any) -> Any:
        """What was put under ``key``; None where it is not there, or not any more."""
        with self._lock:
            if key not in self._things:
                return None
            self._things.move_to_end(key)
            return self._things[key][0]

    def put(self, key: Any, value: Any, num_bytes: int) -> None:
        """Keep ``value``, if it is not larger than everything that may be kept."""
        if num_bytes > self.limit:
            return
        with self._lock:
            self.bytes += num_bytes - self._things.pop(key, (None, 0))[1]
            self._things[key] = (value, num_bytes)
            while self.bytes > self.limit:
                _, (_, freed) = self._things.popitem(last=False)
                self.bytes -= freed

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._things.clear()
            self.bytes = 0

    # Media

    def embeddings(self, item: MediaItem) -> Tensor | None:
        """What the tower and the connector made of a medium, [K, D]; None: not known."""
        found: Tensor | None = self.get(("seen", digest_of(item))) if self.limit else None
        return found

    def keep_embeddings(self, item: MediaItem, seen_KD: Tensor) -> None:
        if self.limit:
            self.put(("seen", digest_of(item)), seen_KD, seen_KD.nbytes)

    # Conversations

    def find(self, names: Sequence[bytes]) -> list[Tensor]:
        """The blocks of a conversation's beginning that are known, [BLOCK, F] each, without a gap."""
        found = []
        for name in names:
            block = self.get(name)
            if block is None:
                break
            found.append(block)
        self._touch(names[: len(found)])
        return found

    def keep(self, names: Sequence[bytes], cut: Callable[[int, int], Tensor]) -> None:
        """Keep a conversation's beginning.

        Args:
            names: of its blocks, from the first.
            cut: what all layers keep of the tokens from one to before another, [T, F].
        """
        missing = [n for n, name in enumerate(names) if name not in self._things]
        if not self.limit or not missing:
            return
        first, last = missing[0], missing[-1] + 1
        blocks = cut(first * BLOCK, last * BLOCK).split(BLOCK)
        if sum(block.nbytes for block in blocks) > self.limit:
            return
        for name, block in zip(names[first:last], blocks, strict=True):
            # A copy: a view would keep its neighbours alive when they have gone.
            self.put(name, block.clone(), block.nbytes)
        self._touch(names[:last])

    def _touch(self, names: Sequence[bytes]) -> None:
        """From the last block to the first: what is found only behind another must not outlive it."""
        with self._lock:
            for name in reversed(names):
                if name in self._things:
                    self._things.move_to_end(name)


def digest_of(item: MediaItem) -> bytes:
    """All that decides a prepared medium's embeddings, in a few bytes."""
    if item.key:
        return item.key.encode()
    return digest(item.kind, item.tiles, item.order)


def digest(kind: str, tiles: Sequence[Tensor], order: Any) -> bytes:
    """Of prepared tiles and the order in which their embeddings stand."""
    found = hashlib.sha256(kind.encode())
    for tile in tiles:
        found.update(f"{tile.dtype}{list(tile.shape)}".encode())
        found.update(tile.contiguous().numpy().data)
    if order is not None:
        found.update(np.asarray(order, dtype=np.int64).tobytes())
    return found.digest()


class Names:
    """The names of a conversation's blocks, while it grows.

    Args:
        encoded: its prompt.
        places: ids of the placeholders, by kind of media.
    """

    def __init__(self, encoded: Encoded, places: Mapping[str, int]) -> None:
        self.found: list[bytes] = []
        self._last = b""
        told = np.zeros((len(encoded), 3), dtype=np.int64)
        told[:, 0] = encoded.ids.numpy()
        for kind, place in places.items():
            at = np.flatnonzero(told[:, 0] == place)
            for item in encoded.media:
                if item.kind == kind:
                    own, at = at[: item.tokens], at[item.tokens :]
                    name = hashlib.sha256(digest_of(item)).digest()[:16]
                    told[own, 1:] = np.frombuffer(name, dtype=np.int64)
                    told[own, 0] += np.arange(1, item.tokens + 1) << 32
        self._rest = told
        self._name()

    def grow(self, ids: Sequence[int]) -> None:
        """Words that were said."""
        told = np.zeros((len(ids), 3), dtype=np.int64)
        told[:, 0] = ids
        self._rest = np.concatenate([self._rest, told])
        self._name()

    def _name(self) -> None:
        whole = len(self._rest) // BLOCK
        for block in self._rest[: whole * BLOCK].reshape(whole, BLOCK * 3):
            self._last = hashlib.sha256(self._last + block.tobytes()).digest()
            self.found.append(self._last)
        self._rest = self._rest[whole * BLOCK :]


class Reading:
    """Prepares pictures and sounds for an encoder, each source once; see ``Encoder.using``."""

    def __init__(self, kept: Kept, prepare: Callable[..., Prepared], kind: str) -> None:
        self.kept, self.prepare, self.kind = kept, prepare, kind

    def __call__(self, source: Any, *how: Any, **more: Any) -> Prepared:
        """As ``prepare``, with a key by which the model knows what it perceived of it.

        Raises:
            ValueError: as ``prepare``.
        """
        if more.get("change") is not None or (name := name_of(source)) is None:
            return self.prepare(source, *how, **more)
        key = ("read", self.kind, name, how, tuple(sorted(more.items())))
        found: Prepared | None = self.kept.get(key)
        if found is None:
            found = self.prepare(source, *how, **more)
            if not found.key:
                found = replace(found, key=digest(self.kind, found.tiles, found.order).hex())
            self.kept.put(key, found, sum(tile.nbytes for tile in found.tiles))
        return found


def name_of(source: Any) -> Any:
    """What tells one source from another without decoding it; None: nothing does."""
    if isinstance(source, str | Path):
        try:
            at = Path(source).stat()
        except OSError:
            return None
        return str(Path(source).absolute()), at.st_mtime_ns, at.st_size, at.st_ino
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    if isinstance(source, PIL.Image.Image):
        # Pixels, and what a file says beside them, such as which side is up. Others have a palette as well.
        if source.mode not in ("RGB", "L"):
            return None
        found = hashlib.sha256(repr((source.mode, source.size)).encode())
        found.update(source.tobytes())
        found.update(repr(sorted(source.info.items())).encode())
        return found.digest()
    if isinstance(source, Tensor) and source.device.type == "cpu" and source.dtype == torch.float32:
        found = hashlib.sha256(repr(list(source.shape)).encode())
        found.update(source.detach().contiguous().numpy().data)
        return found.digest()
    return None
