"""Codes of spoken answers, made once and kept: one small file a sound, for any number of processes at once.

:class:`CodeBook` stands before collating, in the process that trains: a spoken answer comes as a wave and
goes on as codes, read from the folder or made by the codec and written there. Each sound goes through the
codec alone, so its codes depend neither on its neighbours in the batch nor on whether they were kept.

A key is all that decides the codes: the samples, and the codec (its class, its config, its codebooks, every
weight). Nothing is found under a key that another codec wrote. A file is written beside its place and moved
there; it carries a checksum, and whatever is wrong with one makes it a miss that is written anew. Ten seconds
of two books at 25 Hz take a kilobyte, so the folder has no bound.

Measured for 3 s on one core: 0.2 ms to hash the wave, 0.15 ms to read codes, 25 ms to make them with a
``tinymodal_codec``.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinymodal.core.errors import DataError
from tinymodal.core.log import say
from tinymodal.core.types import SpeechItem
from tinymodal.data.pack import Row
from tinymodal.model.codec import Codec

MAGIC = b"tmcode01"

HEAD = struct.Struct("<8sI32sII")
"""``MAGIC``, the checksum (CRC-32) of all that follows, the key, codebooks and frames."""


class CodeBook:
    """Sounds to codes of one codec, by way of a folder."""

    def __init__(self, folder: str | Path | None, codec: Codec) -> None:
        """Read every weight of the codec once, for its name; nothing is made or read in the folder yet.

        Args:
            folder: made when the first file is written; None: nothing is kept.
            codec: frozen, in eval mode. Run where it lies.

        Raises:
            ValueError: something in it trains.
        """
        if codec.training or any(parameter.requires_grad for parameter in codec.parameters()):
            raise ValueError("codes are kept of a codec that is frozen and in eval mode; see open_codec")
        self.folder = None if folder is None else Path(folder).expanduser()
        self.codec = codec
        self.name = codec_name(codec)
        self.num_hits = 0
        """Sounds whose codes were there, or that came twice in a batch."""
        self.num_new = 0
        """Sounds that went through the codec."""
        self.num_broken = 0
        """Files that were found cut short or changed."""
        self.writing = folder is not None
        """Whether new files are written; ends with the first that cannot be."""

    def complete(self, rows: Sequence[Row]) -> list[Row]:
        """The same rows, with codes in place of waves everywhere.

        Raises:
            DataError: a spoken answer is too short or broken for the codec; names the sample.
        """
        known: dict[str, Tensor] = {}
        completed = []
        for row in rows:
            new = Row()
            for sample, index in zip(row.samples, row.indices, strict=True):
                if any(item.codes is None for item in sample.speech):
                    spoken = tuple(self._done(item, sample.sample_id, known) for item in sample.speech)
                    sample = replace(sample, speech=spoken)
                new.append(sample, index)
            completed.append(new)
        return completed

    def codes(self, wave: Tensor) -> Tensor:
        """Codes of one sound, kept or made.

        Args:
            wave: float32 [samples] at the codec's rate.

        Returns:
            int64 [Q, F], on the CPU.

        Raises:
            ValueError: as :meth:`Codec.encode`.
        """
        return self._codes(self.key(wave), wave)

    def key(self, wave: Tensor) -> str:
        """Under which the codes of a sound are kept."""
        samples = wave.detach().to("cpu", torch.float32).contiguous()
        found = hashlib.sha256(f"{self.name}\n{len(samples)}\n".encode())
        found.update(samples.numpy().data)
        return found.hexdigest()

    def path(self, key: str) -> Path:
        """Where the file of ``key`` is or would be.

        Raises:
            ValueError: nothing is kept.
        """
        if self.folder is None:
            raise ValueError("these codes are kept nowhere; give CodeBook a folder")
        return self.folder / key[:2] / key

    def _done(self, item: SpeechItem, sample_id: str, known: dict[str, Tensor]) -> SpeechItem:
        if item.codes is not None:
            return item
        if item.wave is None:
            raise DataError(f"{sample_id}: a spoken answer without a sound and without codes")
        key = self.key(item.wave)
        if key in known:
            self.num_hits += 1
        else:
            try:
                known[key] = self._codes(key, item.wave)
            except ValueError as error:
                raise DataError(f"{sample_id}: a spoken answer cannot become codes: {error}") from error
        return replace(item, wave=None, codes=known[key], key=key)

    def _codes(self, key: str, wave: Tensor) -> Tensor:
        kept = self._read(key)
        if kept is not None:
            self.num_hits += 1
            return kept
        self.num_new += 1
        codes = self.codec.encode(wave).cpu()
        if self.writing:
            try:
                self._write(self.path(key), pack(key, codes))
            except OSError as error:
                self.writing = False
                say(
                    f"the codes in {self.folder} cannot be written ({error.strerror or error}); training "
                    f"goes on, and makes those that are not there each time"
                )
        return codes

    def _read(self, key: str) -> Tensor | None:
        if self.folder is None:
            return None
        try:
            return unpack(self.path(key).read_bytes(), key)
        except OSError:
            return None
        except ValueError:
            self.num_broken += 1
            return None

    def _write(self, path: Path, data: bytes) -> None:
        part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise


def codec_name(codec: Codec) -> str:
    """One word for all that decides which codes a codec makes."""
    own: Any = codec
    config = own.config if hasattr(own, "config") else own.model.config.to_dict()
    # What a config says of where it came from, and what the codec itself says.
    left_out = ("transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype", "books")
    said = {key: value for key, value in dict(config).items() if key not in left_out}
    found = hashlib.sha256(
        json.dumps([type(codec).__name__, codec.books, said], sort_keys=True, default=str).encode()
    )
    for name, tensor in sorted(codec.state_dict().items()):
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole = tensor.detach().cpu().contiguous()
        found.update(whole.flatten().view(torch.uint8).numpy().data if whole.numel() else b"")
    return found.hexdigest()


def pack(key: str, codes: Tensor) -> bytes:
    """The bytes of a file: int64 [Q, F] as 32-bit numbers, or 16-bit where they fit."""
    wide = bool(codes.numel()) and int(codes.max()) >= 2**16
    numbers = codes.numpy().astype(np.uint32 if wide else np.uint16).tobytes()
    tail = HEAD.pack(MAGIC, 0, bytes.fromhex(key), *codes.shape)[12:] + numbers
    return MAGIC + struct.pack("<I", zlib.crc32(tail)) + tail


def unpack(data: bytes, key: str) -> Tensor:
    """What :func:`pack` packed.

    Raises:
        ValueError: these are not such bytes, or those of another key.
    """
    if len(data) < HEAD.size:
        raise ValueError("no head")
    magic, checksum, said, books, frames = HEAD.unpack_from(data)
    if magic != MAGIC or zlib.crc32(data[12:]) != checksum or said.hex() != key:
        raise ValueError("not the codes of this key, whole")
    size = (len(data) - HEAD.size) // max(books * frames, 1)
    if books * frames and size not in (2, 4):
        raise ValueError("the length is another")
    numbers = np.frombuffer(data, np.uint32 if size == 4 else np.uint16, books * frames, HEAD.size)
    return torch.from_numpy(numbers.astype(np.int64)).view(books, frames)
