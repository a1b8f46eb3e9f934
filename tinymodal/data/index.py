"""Where the rows of a large file lie: found once, kept on disk, mapped into memory when it is opened again.

The index of ``chats.jsonl`` is ``.chats.jsonl.index`` beside it, or a file in ``cache_folder()`` where that
folder cannot be written; where nothing can be written it stays in memory, and a line says so. Files below
``KEEP_FROM_BYTES`` are scanned each time. An index belongs to one content: size, time of change and a hash of
the first and last 64 KB; any other is built anew. It is written whole or not at all, and one process builds
it while the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinymodal.core.errors import DataError
from tinymodal.core.log import say
from tinymodal.data.whole import sweep, whole

Arrays = dict[str, NDArray[Any]]
Scan = Callable[[Path], Arrays]

KEEP_FROM_BYTES = 8_000_000
"""Scanning less takes 0.2 s at most, and nobody wants a file beside each small one."""

SAY_FROM_BYTES = 500_000_000
"""A scan of so much takes seconds, which a line explains."""

_MAGIC = "tinymodal index 1"
_EDGE_BYTES = 1 << 16
_HEADER_BYTES = 4096


class Signature(NamedTuple):
    """What a file's content is recognised by, without reading it."""

    size: int
    mtime_ns: int
    edges: str
    """Hash of the first and the last 64 KB."""

    def still(self, stat: os.stat_result) -> bool:
        """Whether the file has not been written since; costs nothing."""
        return stat.st_size == self.size and stat.st_mtime_ns == self.mtime_ns


class Index:
    """Arrays about one file. Sent to another process it is mapped there, not copied, where it is kept."""

    def __init__(
        self, path: Path, scan: Scan, signature: Signature, arrays: Arrays, place: Path | None
    ) -> None:
        self.path = path
        self.scan = scan
        self.signature = signature
        self.arrays = arrays
        self.place = place
        """The file it is mapped from; None: it is in memory only."""

    def __reduce__(self) -> tuple[Any, ...]:
        if self.place is None:
            return Index, (self.path, self.scan, self.signature, self.arrays, None)
        return _again, (self.path, self.scan, self.signature)

    def read(self, start: int, end: int) -> bytes:
        """Bytes of the file, as long as it is the one that was indexed.

        No file stays open between two calls, so nothing is shared by processes that fork.

        Raises:
            OSError: it cannot be read.
            DataError: it has changed.
        """
        file = os.open(self.path, os.O_RDONLY)  # a file object would take as long as all the rest
        try:
            if not self.signature.still(os.fstat(file)):
                raise changed(self.path)
            return os.pread(file, end - start, start)
        finally:
            os.close(file)


def open_index(path: Path, scan: Scan) -> Index:
    """The index of ``path`` as ``scan`` makes it: kept from an earlier time, or made and kept now.

    Raises:
        OSError: the file cannot be read.
        DataError: from ``scan``; or the file changed meanwhile.
    """
    now = sign(path)
    if now.size < KEEP_FROM_BYTES:
        return Index(path, scan, now, _scanned(path, scan, now), None)
    if found := _kept(path, scan, now):
        return found
    with _alone(path) as alone:
        # Who waited finds what the other has built.
        if found := _kept(path, scan, now):
            return found
        if now.size >= SAY_FROM_BYTES:
            say(f"{path}: finding its rows ({now.size / 1e9:.1f} GB), once")
        arrays = _scanned(path, scan, now)
        reason: OSError | None = None
        for place in _places(path):
            try:
                if place.parent != path.parent:
                    place.parent.mkdir(parents=True, exist_ok=True)
                if alone:
                    sweep(place)
                _write(place, scan, now, arrays)
            except OSError as error:
                reason = error
                continue
            return _kept(path, scan, now) or Index(path, scan, now, arrays, None)
    say(
        f"{path}: where its rows lie could not be kept beside it, nor in {cache_folder()} ({reason}); it is "
        f"found anew at each start. Free some space, or set TINYMODAL_CACHE to a folder"
    )
    return Index(path, scan, now, arrays, None)


def cache_folder() -> Path:
    """Where things are kept that can be made again: ``$TINYMODAL_CACHE``, or ``~/.cache/tinymodal``."""
    if named := os.environ.get("TINYMODAL_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tinymodal"


def sign(path: Path) -> Signature:
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        edges = file.read(_EDGE_BYTES)
        file.seek(max(0, stat.st_size - _EDGE_BYTES))
        edges += file.read(_EDGE_BYTES)
    return Signature(stat.st_size, stat.st_mtime_ns, hashlib.blake2b(edges, digest_size=16).hexdigest())


def changed(path: Path) -> DataError:
    return DataError(
        f"{path}: written to since it was opened; expected a file that stays as it is. Start again once it "
        f"is finished"
    )


@contextmanager
def locked(file: BinaryIO) -> Iterator[bool]:
    """While the block runs no other process holds this file so. False: the file system knows no locks."""
    try:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
    except (ImportError, OSError):
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):
            fcntl.flock(file.fileno(), fcntl.LOCK_UN)


def _scanned(path: Path, scan: Scan, signature: Signature) -> Arrays:
    try:
        arrays = scan(path)
    except DataError:
        if not signature.still(path.stat()):
            raise changed(path) from None
        raise
    if not signature.still(path.stat()):
        raise changed(path)
    return arrays


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    # The data file itself is the lock: there is no other file that every process can surely open.
    with path.open("rb") as file, locked(file) as alone:
        yield alone


def _again(path: Path, scan: Scan, signature: Signature) -> Index:
    try:
        index = open_index(path, scan)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); is it still there?") from error
    if index.signature != signature:
        raise changed(path)
    return index


def _places(path: Path) -> tuple[Path, Path]:
    whole_path = path.resolve()
    name = f"{path.name}-{hashlib.sha1(str(whole_path).encode()).hexdigest()[:16]}.index"
    return whole_path.with_name(f".{whole_path.name}.index"), cache_folder() / "index" / name


def _kept(path: Path, scan: Scan, signature: Signature) -> Index | None:
    for place in _places(path):
        # A file that is cut, damaged or of another version is no index; it is replaced by the next one.
        with suppress(OSError, ValueError, KeyError, TypeError):
            return Index(path, scan, signature, _read(place, scan, signature), place)
    return None


def _write(place: Path, scan: Scan, signature: Signature, arrays: Arrays) -> None:
    parts, at = {}, _HEADER_BYTES
    for name, array in arrays.items():
        parts[name] = {
            "dtype": array.dtype.str,
            "shape": array.shape,
            "at": at,
            "crc": zlib.crc32(np.ascontiguousarray(array).data.cast("B")) if array.size else 0,
        }
        at += -(-array.nbytes // 64) * 64
    header = {"magic": _MAGIC, "scan": scan.__name__, "signature": signature, "arrays": parts, "bytes": at}
    with whole(place) as file:
        file.write(json.dumps(header).encode().ljust(_HEADER_BYTES))
        for array in arrays.values():
            raw = np.ascontiguousarray(array).tobytes()
            file.write(raw.ljust(-(-len(raw) // 64) * 64, b"\0"))


def _read(place: Path, scan: Scan, signature: Signature) -> Arrays:
    """The arrays of a kept index; an exception if it is none, or none of this content."""
    with place.open("rb") as file:
        header = json.loads(file.read(_HEADER_BYTES))
        size = os.fstat(file.fileno()).st_size
    expected = [_MAGIC, scan.__name__, list(signature), size]
    if [header["magic"], header["scan"], header["signature"], header["bytes"]] != expected:
        raise ValueError("of another content")
    arrays: Arrays = {}
    for name, part in header["arrays"].items():
        shape, dtype = tuple(part["shape"]), np.dtype(part["dtype"])
        if not int(np.prod(shape)):
            arrays[name] = np.empty(shape, dtype)
            continue
        array = np.memmap(place, dtype, "r", part["at"], shape)
        # 1 s for each GB of index: 65 million rows.
        if zlib.crc32(array.data.cast("B")) != part["crc"]:
            raise ValueError("damaged")
        arrays[name] = array.view(np.ndarray)  # the same memory; a memmap takes 5 µs for each look
    return arrays
