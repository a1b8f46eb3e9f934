"""Data files as numbered rows: ``open_source("chats/*.jsonl", "messages")``.

Memory does not grow with the files. Where each row lies is found once, kept beside the file and mapped into
memory (``data/index.py``); a row is read when it is asked for. Starting with 2,000,000 rows of 500 bytes took
1.5 s of one core the first time and 0.02 s from then on, and the process 150 MB in all; a row then takes 23
µs. No file stays open, so a source can be pickled and forked, and workers share what is mapped.

Parquet is read by row group, and a group is the least that can be read. So the groups are told to the mixture
(``Rows.blocks``), which keeps ``WINDOW`` of them in play at a time: rows of 50 KB in groups of 100 take 0.3
ms, in any order they took 4.2 ms. Files written with about 100 rows a group suit this best. A group of more
than ``HEAVY_BYTES`` is written out once as a file that can be mapped, see ``data/spool.py``.

A ``row_id`` is ``file:row`` with rows (of .jsonl: lines) counted from 1, as an editor counts; in a tar file
``file:key``.
"""

from __future__ import annotations

import glob
import hashlib
import json
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from tinymodal.core.errors import DataError, TinyModalError
from tinymodal.core.log import say
from tinymodal.core.lookup import find
from tinymodal.core.types import Sample
from tinymodal.data.convert import CONVERTERS, Convert, Folders, Members
from tinymodal.data.index import Scan, open_index
from tinymodal.data.scan import scan_json, scan_jsonl
from tinymodal.data.spool import Spool, spool_folder
from tinymodal.data.tar import TarRows

HEAVY_BYTES = 64_000_000
"""A row group of parquet with more than this, unpacked, is not kept in memory."""

WINDOW = 8
"""Row groups of parquet that are shuffled together, and that stay decoded in memory, of all files of a
source."""


class Source(Protocol):
    """What the loader draws from. One with a length is drawn in epochs; one without counts up for ever."""

    def sample(self, index: int) -> Sample: ...


class Rowed(Protocol):
    """One file of rows."""

    path: Path
    blocks: tuple[int, ...] | None
    """Rows in each stretch that is read at once; None where every row is read by itself."""

    def __len__(self) -> int: ...

    def label(self, n: int) -> str:
        """How row ``n`` is found in the file by a person."""
        ...

    def row(self, n: int) -> Any: ...

    def members(self, n: int) -> Members | None:
        """The files that belong to row ``n`` alone."""
        ...


class Rows:
    """The rows of one or more files of one format, in the order of the files' names."""

    in_order = False
    """Whether rows far apart cannot be read one after the other: the mixture then goes through ``blocks`` in
    order, and shuffles inside ``WINDOW`` of them."""

    def __init__(
        self,
        files: Sequence[Rowed],
        convert: Convert,
        images: Path | None,
        sounds: Path | None = None,
    ) -> None:
        self.files = tuple(files)
        self.convert = convert
        self.images, self.sounds = images, sounds
        self.decoded = _Decoded()
        for file in self.files:
            if isinstance(file, _ParquetRows):
                file.decoded = self.decoded
        self._ends = list(accumulate(len(file) for file in self.files))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def blocks(self) -> tuple[int, ...] | None:
        """Rows in each stretch that is read at once, None where every row can be read by itself."""
        if all(file.blocks is None for file in self.files):
            return None
        return tuple(size for file in self.files for size in (file.blocks or (len(file),)))

    def row(self, index: int) -> dict[str, Any]:
        """Row ``index`` as it was written; ``DataError`` with file and row if it cannot be read."""
        file, n = self._place(index)
        return checked(file.row(n), self.row_id(index))

    def row_id(self, index: int) -> str:
        file, n = self._place(index)
        return f"{file.path}:{file.label(n)}"

    def sample(self, index: int) -> Sample:
        """Row ``index`` converted. What a converter of yours raises becomes a ``DataError`` of that row."""
        file, n = self._place(index)
        folders = Folders(file.path.parent, self.images, file.members(n), self.sounds)
        return converted(self.convert, self.row(index), self.row_id(index), folders)

    def _place(self, index: int) -> tuple[Rowed, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        which = bisect_right(self._ends, index)
        return self.files[which], index - (self._ends[which - 1] if which else 0)


def checked(row: Any, row_id: str) -> dict[str, Any]:
    """The row, if it is one."""
    if not isinstance(row, dict):
        raise DataError(
            f"{row_id}: the row is {type(row).__name__} ({str(row)[:40]!r}); expected an object with named "
            f"values. Write it as {{...}}"
        )
    return row


def converted(convert: Convert, row: dict[str, Any], row_id: str, folders: Folders) -> Sample:
    """The row as a sample. What a converter of yours raises becomes a ``DataError`` of that row."""
    if convert in CONVERTERS.values():
        return convert(row, row_id=row_id, images=folders)
    try:
        sample = convert(row, row_id=row_id, images=folders)
        if not isinstance(sample, Sample):
            raise TypeError(f"it returned {type(sample).__name__}")
        return sample
    except TinyModalError:
        raise
    except Exception as error:
        name = getattr(convert, "__name__", "your converter")
        raise DataError(
            f"{row_id}: {name} raised {type(error).__name__}: {one_line(error)}. Expected a Sample; correct "
            f"the row or the function (TINYMODAL_DEBUG=1 shows where)"
        ) from error


def open_source(
    path: str | Path | Sequence[str | Path],
    format: str,
    images: str | Path | None = None,
    sounds: str | Path | None = None,
) -> Rows:
    """Open the data files that ``path`` names.

    Args:
        path: a .json (list of rows), .jsonl (a row a line), .parquet or .tar file; a pattern,
            ``chats/*.jsonl``; or several of these, which are read one behind the other.
        format: a name in ``CONVERTERS``, or ``"my_rows.py:convert"``.
        images: folder of the pictures, where paths in the rows are not relative to the data file.
        sounds: folder of the sounds, likewise.

    Raises:
        DataError: no such file, an unknown kind of file, a broken list, or no row at all.
    """
    convert = find(format, CONVERTERS, "row format")
    folders = picture_folder(images, str(path)), sound_folder(sounds, str(path))
    paths = [path] if isinstance(path, str | Path) else list(path)
    named = [file for one in paths for file in _files(one)]
    if len(set(named)) < len(named):
        twice = Counter(named).most_common(1)[0][0]
        raise DataError(
            f"{twice}: named twice by the paths of one source ({', '.join(map(str, paths))}); expected once. "
            f"Correct the patterns, or raise the source's weight"
        )
    files = [_open_file(file) for file in named]
    if not sum(map(len, files)):
        told = path if isinstance(path, str | Path) else ", ".join(map(str, paths))
        raise DataError(f"{told}: no rows; expected at least one. Remove the source, or fill the file")
    if all(isinstance(file, TarRows) and file.is_lost for file in files):
        files[0].row(0)
    return Rows(files, convert, *folders)


def picture_folder(images: str | Path | None, source: str) -> Path | None:
    """The ``images`` folder of a source, which must exist."""
    return _folder(images, f"pictures (key images of the source {source})")


def sound_folder(sounds: str | Path | None, source: str) -> Path | None:
    """The ``sounds`` folder of a source, which must exist."""
    return _folder(sounds, f"sounds (key sounds of the source {source})")


def _folder(given: str | Path | None, what: str) -> Path | None:
    folder = Path(given).expanduser() if given is not None else None
    if folder is not None and not folder.is_dir():
        raise DataError(f"{folder}: no such folder of {what}; correct the path")
    return folder


def _files(path: str | Path) -> list[Path]:
    pattern = Path(path).expanduser()
    if pattern.is_file():
        return [pattern]
    if pattern.is_dir():
        ending = ".tar" if next(pattern.glob("*.tar"), None) else ".jsonl"
        raise DataError(f"{path}: a folder; expected files. Name them, for example {pattern / f'*{ending}'}")
    found = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True) if Path(name).is_file())
    if not found:
        beside = sorted(file.name for file in pattern.parent.glob("*") if file.suffix in READABLE)[:5]
        there = (
            f"{pattern.parent} holds {', '.join(beside)}"
            if beside
            else f"no data file in {pattern.parent} either"
        )
        raise DataError(f"{path}: no such file ({there}); correct the path")
    return found


def _open_file(path: Path) -> Rowed:
    reader = READABLE.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: a file of kind {path.suffix!r}; expected {', '.join(READABLE)}. Convert or rename it"
        )
    try:
        return reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


class _JsonRows:
    """Rows of a .json or .jsonl file as stretches of bytes, parsed when asked for."""

    blocks: tuple[int, ...] | None = None

    def __init__(self, path: Path, scan: Scan) -> None:
        self.path = path
        self.index = open_index(path, scan)

    def __len__(self) -> int:
        return len(self.index.arrays["spans"])

    def label(self, n: int) -> str:
        # Kept only where blank lines make row and line differ.
        lines = self.index.arrays.get("lines")
        return str(n + 1 if lines is None else int(lines[n]))

    def row(self, n: int) -> Any:
        start, end = self.index.arrays["spans"][n].tolist()
        try:
            return json.loads(self.index.read(start, end))
        except (ValueError, RecursionError) as error:  # broken JSON, or bytes that are not UTF-8
            raise DataError(
                f"{self.path}:{self.label(n)}: not JSON ({error}); expected one object on the line. Correct "
                f"or remove it"
            ) from error
        except OSError as error:
            raise DataError(
                f"{self.path}:{self.label(n)}: cannot be read ({error.strerror}); is the file still there?"
            ) from error

    def members(self, n: int) -> None:
        return None


def _open_jsonl(path: Path) -> _JsonRows:
    return _JsonRows(path, scan_jsonl)


def _open_json(path: Path) -> _JsonRows:
    return _JsonRows(path, scan_json)


class _Decoded:
    """The ``WINDOW`` row groups that were read last, of whichever files share it."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[Path, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_groups": OrderedDict()}  # a worker decodes its own

    def __len__(self) -> int:
        return len(self._groups)

    def group(self, path: Path, number: int) -> Any:
        """A row group as a table; ``OSError`` or ``ValueError`` if it cannot be read."""
        key = path, number
        if key not in self._groups:
            with _parquet(path) as file:
                self._groups[key] = _heavy(path, file, number) or _light(file, number)
            if len(self._groups) > WINDOW:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


def _light(file: Any, number: int) -> Any:
    # One thread: a pool of threads does not survive the fork of a worker.
    return file.read_row_group(number, use_threads=False)


def _heavy(path: Path, file: Any, number: int) -> Any | None:
    """A group that would take much memory, mapped from a file it is written to; None for any other."""
    if file.metadata.row_group(number).total_byte_size < HEAVY_BYTES:
        return None
    stat = path.stat()
    content = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    spool = Spool(spool_folder() / "parquet" / hashlib.sha1(content.encode()).hexdigest()[:20])
    try:
        return spool.fetch(
            f"{number:06}", lambda: file.iter_batches(64, row_groups=[number], use_threads=False)
        )
    except OSError as error:
        say(f"{path}: row group {number + 1} is read into memory: {spool.folder} cannot be written ({error})")
        return None


class _ParquetRows:
    """Rows of a parquet file; ``decoded`` is given by the source it belongs to."""

    decoded: _Decoded

    def __init__(self, path: Path) -> None:
        self.path = path
        with _parquet(path) as file:
            self.blocks: tuple[int, ...] | None = tuple(
                file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)
            )
        self._ends = list(accumulate(self.blocks))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def label(self, n: int) -> str:
        return str(n + 1)

    def members(self, n: int) -> None:
        return None

    def row(self, n: int) -> Any:
        number = bisect_right(self._ends, n)
        try:
            group = self.decoded.group(self.path, number)
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise DataError(
                f"{self.path}:{n + 1}: cannot be read ({one_line(error)}); expected a whole file. Restore it"
            ) from error
        return group.slice(n - (self._ends[number - 1] if number else 0), 1).to_pylist()[0]


def _parquet(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            f"{path}: reading parquet needs pyarrow, which is not installed; pip install 'tinymodal[data]'"
        ) from error
    try:
        # Neither reads ahead: a heavy group is written on piece by piece.
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path}: not a parquet file ({one_line(error)}); expected a whole one. Restore it"
        ) from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


READABLE: dict[str, Callable[[Path], Rowed]] = {
    ".json": _open_json,
    ".jsonl": _open_jsonl,
    ".ndjson": _open_jsonl,
    ".parquet": _ParquetRows,
    ".tar": TarRows,
}
