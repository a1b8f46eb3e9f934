"""A folder of tower features, one file a picture or sound; any number of processes read and write at once.

A file is written beside its place and moved there, so that nobody sees half of it; it carries a checksum, so
that what a crash or a disk left behind is found out. Whatever is wrong with a file makes it a miss: its
features are computed again and it is written anew. Nothing waits for the disk to have it (no fsync), for the
same reason.

The folder is bounded. A file's time of last use is its modification time, renewed when it is read
(``TOUCH_S``); when a process has written a sixty-fourth of the bound, it lists the folder, and if that holds
too much, removes what was not used for longest. So it holds at most a sixty-fourth more for each process that
writes. What is removed while another process looks for it is a miss there, and what that one has opened
already stays readable.

Measured on one core, for 729 positions of 1,152 numbers: bfloat16 takes 1.68 MB, written in 3.1 ms and read
in 1.0 ms; float8 takes 0.84 MB, written in 4.8 ms and read in 2.0 ms.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinymodal.core.log import say

CacheDtype = Literal["bfloat16", "float8"]

DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}

FLOAT8_MAX = 448.0
"""The greatest number of float8_e4m3fn."""

MAGIC = b"tmseen01"

HEAD = struct.Struct("<8sII")
"""``MAGIC``, the checksum (CRC-32) of all that follows, bytes of the outline."""

ALIGN = 64
"""The numbers begin at a multiple of so many bytes."""

TOUCH_S = 60.0
"""A file that was used less than so long ago is not marked as used again."""

ABANDONED_S = 3600.0
"""A file that is being written for so long belongs to a process that is gone."""

SHARE = 64
"""The folder is listed after so many parts of its bound were written."""

KEEP = 0.9
"""How full the folder is after old files were removed."""


class Entry(NamedTuple):
    """What is kept of a picture or a sound."""

    size: tuple[int, int]
    """Of a picture height and width in pixels, upright; of a sound its samples, and 1. The layout follows
    from that (``layout`` of its processor)."""
    tiles: tuple[Tensor, ...]
    """The tower's features of each tile or window, bfloat16 [*grid, E]."""
    num_bytes: int
    """On disk."""


class FeatureCache:
    """The files of one folder. Can be pickled; each process has its own counts."""

    def __init__(
        self, folder: str | Path, dtype: CacheDtype = "bfloat16", max_bytes: int = 50 * 10**9
    ) -> None:
        """Nothing is made or read yet.

        Args:
            folder: made when the first file is written.
            dtype: of the features that are written. ``float8`` (e4m3) has a scale for each tile, three bits
                of precision, and is read as bfloat16.
            max_bytes: that the folder may hold, whoever wrote them.
        """
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be 1 or more, got {max_bytes}")
        self.folder = Path(folder).expanduser()
        self.dtype: CacheDtype = dtype
        self.max_bytes = max_bytes
        self.writing = True
        """Whether new files are written; ends with the first that cannot be."""
        self.num_broken = 0
        """Files that :meth:`get` found cut short or changed."""
        self.num_removed = 0
        """Files that this process removed to make room."""
        self._written_bytes: int | None = None  # since the folder was listed; None: never
        self._to_say = ["cannot be written"]  # taken by the first of several threads

    def path(self, key: str) -> Path:
        """Where the file of ``key`` is or would be."""
        return self.folder / key[:2] / key

    def peek(self, key: str) -> Entry | None:
        """What is kept under ``key``, for a process that will not write: a file that is broken is left."""
        try:
            return self._read(key)
        except (OSError, ValueError):
            return None

    def get(self, key: str) -> Entry | None:
        """What is kept under ``key``; a file that is broken is counted, for the caller to write anew."""
        try:
            return self._read(key)
        except OSError:
            # Not there, removed this moment, or not to be read: all the same to who can compute it.
            return None
        except ValueError:
            self.num_broken += 1
            return None

    def has(self, key: str) -> int:
        """Bytes of the file of ``key``, 0 if there is none as long as it should be; reads no features."""
        try:
            with self.path(key).open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                start = file.read(HEAD.size)
                outline = _outline(start + file.read(_head(start)[1]), key)
                whole = outline.begin + sum(outline.sizes)
        except (OSError, ValueError):
            return 0
        return size if size == whole else 0

    def put(self, key: str, size: tuple[int, int], tiles: Sequence[Tensor]) -> Entry:
        """Keep features; what comes back is what :meth:`get` will read, rounded as it will be.

        Features that are not finite are not written: a step without a finite loss must not come back with
        every epoch.

        Args:
            key: hexadecimal digits.
            size: see :class:`Entry`.
            tiles: [*grid, E] each, on the CPU.
        """
        data = pack(key, size, tiles, self.dtype)
        entry = unpack(data, key)
        if (
            self.writing
            and len(data) <= self.max_bytes
            and all(bool(t.isfinite().all()) for t in entry.tiles)
        ):
            try:
                self._write(self.path(key), data)
            except OSError as error:
                self._stop(error)
            else:
                self._make_room(len(data))
        return entry

    def rounded(self, tiles: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Features as they would be read again, kept nowhere."""
        return _entry(pack("", (0, 0), tiles, self.dtype), "").tiles

    def sweep(self) -> int | None:
        """Remove what was not used for longest until the folder is below its bound; the bytes it then holds.

        None if another process is at it, or the folder cannot be listed.
        """
        self._written_bytes = 0
        try:
            with _alone(self.folder / "sweep.lock") as alone:
                return self._sweep() if alone else None
        except OSError:
            return None

    def _read(self, key: str) -> Entry:
        """Raises OSError if there is no file, ValueError if it is not what was written."""
        path = self.path(key)
        with path.open("rb", buffering=0) as file:
            state = os.fstat(file.fileno())
            data = bytearray(state.st_size)
            view, at = memoryview(data), 0
            while at < len(data) and (count := file.readinto(view[at:])):
                at += count
        if at < len(data):
            raise ValueError(f"{path}: {at} of {len(data)} bytes")
        entry = unpack(data, key)
        if time.time() - state.st_mtime > TOUCH_S:
            with suppress(OSError):  # a folder that may only be read
                os.utime(path)
        return entry

    def _write(self, path: Path, data: bytearray) -> None:
        part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        for last in (False, True):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with part.open("wb", buffering=0) as file:
                    view = memoryview(data)
                    while len(view):
                        view = view[file.write(view) :]
                os.replace(part, path)
                return
            except BaseException as error:
                with suppress(OSError):
                    part.unlink()
                # The folder may vanish between two lines, once; a person cleans up.
                if last or not isinstance(error, FileNotFoundError):
                    raise

    def _stop(self, error: OSError) -> None:
        self.writing = False
        with suppress(IndexError):
            what = self._to_say.pop()
            say(
                f"the cache {self.folder} {what} ({error.strerror or error}); training goes on without "
                f"writing, and encodes what is not in it each time"
            )

    def _make_room(self, num_bytes: int) -> None:
        if self._written_bytes is not None:
            self._written_bytes += num_bytes
        if self._written_bytes is None or self._written_bytes >= self.max_bytes // SHARE:
            self.sweep()

    def _sweep(self) -> int:
        now, total = time.time(), 0
        for path, state in self._files():
            if path.endswith(".part") and now - state.st_mtime > ABANDONED_S:
                with suppress(OSError):
                    os.unlink(path)
                continue
            total += state.st_size
        if total <= self.max_bytes:
            return total
        whole = ((path, state) for path, state in self._files() if not path.endswith(".part"))
        for _, path, size in sorted((state.st_mtime, path, state.st_size) for path, state in whole):
            if total <= KEEP * self.max_bytes:
                break
            with suppress(OSError):
                os.unlink(path)
                self.num_removed += 1
            # Not there any more, whoever took it.
            total -= size
        return total

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every file of the shards, unless it vanishes first; 6 s for a million."""
        with os.scandir(self.folder) as shards:
            folders = [shard.path for shard in shards if len(shard.name) == 2]
        for folder in folders:
            with suppress(OSError), os.scandir(folder) as files:
                for file in files:
                    with suppress(OSError):
                        yield file.path, file.stat()


def pack(key: str, size: tuple[int, int], tiles: Sequence[Tensor], dtype: CacheDtype) -> bytearray:
    """The bytes of a file."""
    scales: list[float] = []
    numbers = []
    for tile in tiles:
        x = tile.detach()
        if dtype == "float8":
            scale = x.float().abs().amax() / FLOAT8_MAX
            scale = torch.where(scale > 0, scale, 1.0)
            scales.append(float(scale))
            x = x.float() / scale
        numbers.append(x.to(DTYPES[dtype]).contiguous().flatten().view(torch.uint8))
    outline = json.dumps(
        {
            "key": key,
            "size_px": list(size),
            "dtype": dtype,
            "shapes": [list(tile.shape) for tile in tiles],
            "scales": scales,
        }
    ).encode()
    outline += b" " * (-(HEAD.size + len(outline)) % ALIGN)
    data = bytearray(HEAD.size) + outline
    for values in numbers:
        data += values.numpy().data
    checksum = zlib.crc32(memoryview(data)[HEAD.size :])
    data[: HEAD.size] = HEAD.pack(MAGIC, checksum, len(outline))
    return data


def unpack(data: bytearray, key: str) -> Entry:
    """What :func:`pack` packed; bfloat16 features share the memory of ``data``.

    Raises:
        ValueError: if these are not such bytes, or those of another key.
    """
    checksum, _ = _head(data)
    if zlib.crc32(memoryview(data)[HEAD.size :]) != checksum:
        raise ValueError("the checksum is another")
    return _entry(data, key)


def _entry(data: bytearray, key: str) -> Entry:
    outline = _outline(data, key)
    if len(data) != outline.begin + sum(outline.sizes):
        raise ValueError("the length is another")
    tiles, at = [], outline.begin
    for i, (shape, size) in enumerate(zip(outline.shapes, outline.sizes, strict=True)):
        if outline.dtype == "float8":
            # What each of the 256 bytes means for this tile; a fifth of the time of converting each number.
            numbers = torch.arange(256, dtype=torch.uint8).view(DTYPES["float8"]).float() * outline.scales[i]
            meant = numbers.to(torch.bfloat16).view(torch.int16).numpy()
            found = np.take(meant, np.frombuffer(data, np.uint8, size, at))
            tiles.append(torch.from_numpy(found).view(torch.bfloat16).view(shape))
        else:
            x = torch.frombuffer(data, dtype=torch.bfloat16, count=prod(shape), offset=at)
            tiles.append(x.view(shape))
        at += size
    return Entry(outline.size, tuple(tiles), len(data))


class _Outline(NamedTuple):
    """What a file says of itself."""

    size: tuple[int, int]
    dtype: str
    shapes: list[tuple[int, ...]]
    scales: list[float]
    sizes: list[int]
    """Bytes of each tile."""
    begin: int
    """Where the first begins."""


def _head(data: bytes | bytearray) -> tuple[int, int]:
    """Checksum, and bytes of the outline."""
    if len(data) < HEAD.size:
        raise ValueError("no head")
    magic, checksum, length = HEAD.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("not a file of features")
    return checksum, length


def _outline(data: bytes | bytearray, key: str) -> _Outline:
    _, length = _head(data)
    try:
        said: dict[str, Any] = json.loads(bytes(data[HEAD.size : HEAD.size + length]))
        height, width = said["size_px"]
        shapes = [tuple(map(int, shape)) for shape in said["shapes"]]
        item_bytes = DTYPES[said["dtype"]].itemsize
    except (KeyError, TypeError) as error:
        raise ValueError(f"an outline that says nothing ({error})") from error
    if said["key"] != key or len(said["scales"]) != (len(shapes) if said["dtype"] == "float8" else 0):
        raise ValueError("the file of another key or kind")
    sizes = [prod(shape) * item_bytes for shape in shapes]
    return _Outline((height, width), said["dtype"], shapes, said["scales"], sizes, HEAD.size + length)


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether no other process is in here; the lock of one that was killed is gone with it."""
    try:
        import fcntl
    except ImportError:  # Windows: two may remove the same files, which harms neither
        yield True
        return
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            yield False
            return
        yield True
