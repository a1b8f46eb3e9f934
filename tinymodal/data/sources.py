"""Data files as numbered rows: ``open_source("chats/*.jsonl", "messages")``.

What stays in memory is where each row lies (16 bytes), never the rows: 665,000 of them take 11 MB, and worker
processes share those. No file stays open, so a source can be pickled and forked. Opening 100,000 rows of 850
bytes takes 0.2 s for .jsonl and 1.1 s for a .json list, which is read whole once; a row then takes 35 µs.

Parquet is read by row group, and a group is the least that can be read. So the groups are told to the mixture
(``Rows.blocks``), which keeps ``WINDOW`` of them in play at a time: rows of 50 KB in groups of 100 take 0.3
ms, in any order they took 4.2 ms. Files written with about 100 rows a group suit this best.

A ``row_id`` is ``file:row`` with rows (of .jsonl: lines) counted from 1, as an editor counts.
"""

from __future__ import annotations

import glob
import json
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tinymodal.core.errors import DataError, TinyModalError
from tinymodal.core.lookup import find
from tinymodal.core.types import Sample
from tinymodal.data.convert import CONVERTERS, Convert, Folders

WINDOW = 8
"""Row groups of parquet that are shuffled together, and that stay decoded in memory, of all files of a
source."""


class Source(Protocol):
    """What the loader draws from. One with a length is drawn in epochs; one without counts up for ever."""

    def sample(self, index: int) -> Sample: ...


class Rows:
    """The rows of one or more files of one format, in the order of the files' names."""

    def __init__(
        self, files: Sequence[_JsonRows | _ParquetRows], convert: Convert, images: Path | None
    ) -> None:
        self.files = tuple(files)
        self.convert = convert
        self.images = images
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
        row = file.row(n)
        if not isinstance(row, dict):
            raise DataError(
                f"{self.row_id(index)}: the row is {type(row).__name__} ({str(row)[:40]!r}); expected an "
                f"object with named values. Write it as {{...}}"
            )
        return row

    def row_id(self, index: int) -> str:
        file, n = self._place(index)
        return f"{file.path}:{file.number(n)}"

    def sample(self, index: int) -> Sample:
        """Row ``index`` converted. What a converter of yours raises becomes a ``DataError`` of that row."""
        file, _ = self._place(index)
        row, row_id = self.row(index), self.row_id(index)
        folders = Folders(file.path.parent, self.images)
        if self.convert in CONVERTERS.values():
            return self.convert(row, row_id=row_id, images=folders)
        try:
            sample = self.convert(row, row_id=row_id, images=folders)
            if not isinstance(sample, Sample):
                raise TypeError(f"it returned {type(sample).__name__}")
            return sample
        except TinyModalError:
            raise
        except Exception as error:
            name = getattr(self.convert, "__name__", "your converter")
            raise DataError(
                f"{row_id}: {name} raised {type(error).__name__}: {_line(error)}. Expected a Sample; correct "
                f"the row or the function (TINYMODAL_DEBUG=1 shows where)"
            ) from error

    def _place(self, index: int) -> tuple[_JsonRows | _ParquetRows, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        which = bisect_right(self._ends, index)
        return self.files[which], index - (self._ends[which - 1] if which else 0)


def open_source(path: str | Path, format: str, images: str | Path | None = None) -> Rows:
    """Open the data files that ``path`` names.

    Args:
        path: a .json (list of rows), .jsonl (a row a line) or .parquet file; or a pattern, ``chats/*.jsonl``.
        format: a name in ``CONVERTERS``, or ``"my_rows.py:convert"``.
        images: folder of the pictures, where paths in the rows are not relative to the data file.

    Raises:
        DataError: no such file, an unknown kind of file, a broken list, or no row at all.
    """
    convert = find(format, CONVERTERS, "row format")
    folder = Path(images).expanduser() if images is not None else None
    if folder is not None and not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder of pictures (key images of the source {path}); correct the path"
        )
    files = [_open_file(file) for file in _files(path)]
    if not sum(map(len, files)):
        raise DataError(f"{path}: no rows; expected at least one. Remove the source, or fill the file")
    return Rows(files, convert, folder)


def _files(path: str | Path) -> list[Path]:
    pattern = Path(path).expanduser()
    if pattern.is_file():
        return [pattern]
    if pattern.is_dir():
        raise DataError(f"{path}: a folder; expected files. Name them, for example {pattern / '*.jsonl'}")
    found = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True) if Path(name).is_file())
    if not found:
        beside = sorted(file.name for file in pattern.parent.glob("*") if file.suffix in _READERS)[:5]
        there = (
            f"{pattern.parent} holds {', '.join(beside)}"
            if beside
            else f"no data file in {pattern.parent} either"
        )
        raise DataError(f"{path}: no such file ({there}); correct the path")
    return found


def _open_file(path: Path) -> _JsonRows | _ParquetRows:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: a file of kind {path.suffix!r}; expected {', '.join(_READERS)}. Convert or rename it"
        )
    try:
        return reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


class _JsonRows:
    """Rows of a .json or .jsonl file as stretches of bytes, parsed when asked for."""

    blocks: tuple[int, ...] | None = None

    def __init__(
        self, path: Path, spans: Sequence[tuple[int, int]], lines: Sequence[int] | None = None
    ) -> None:
        self.path = path
        self.spans: NDArray[np.int64] = np.array(spans, dtype=np.int64).reshape(-1, 2)
        # Kept only where blank lines make row and line differ.
        self.lines = None if lines is None else np.array(lines, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.spans)

    def number(self, n: int) -> int:
        return n + 1 if self.lines is None else int(self.lines[n])

    def row(self, n: int) -> Any:
        start, end = (int(at) for at in self.spans[n])
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return json.loads(file.read(end - start))
        except (ValueError, RecursionError) as error:  # broken JSON, or bytes that are not UTF-8
            raise DataError(
                f"{self.path}:{self.number(n)}: not JSON ({error}); expected one object on the line. Correct "
                f"or remove it"
            ) from error
        except OSError as error:
            raise DataError(
                f"{self.path}:{self.number(n)}: cannot be read ({error.strerror}); is the file still there?"
            ) from error


def _open_jsonl(path: Path) -> _JsonRows:
    spans, lines, at = [], [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip(_BOM + b" \t\r\n"):
                spans.append((at, at + len(line)))
                lines.append(number)
            at += len(line)
    return _JsonRows(path, spans, lines if lines and lines[-1] != len(lines) else None)


def _open_json(path: Path) -> _JsonRows:
    """Find where each row of a JSON list lies, without keeping any."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte {error.start}; expected UTF-8 text. Save it so"
        ) from error
    at = _space(text, 0)
    if text[at : at + 1] != "[":
        found = "an object" if text[at : at + 1] == "{" else repr(text[at : at + 20])
        raise DataError(
            f"{path}: begins with {found}; expected a list of rows, [...]. If it has a row on each line, "
            f"name it .jsonl"
        )
    decode = json.JSONDecoder().raw_decode
    # Python counts characters and files count bytes; both walk along together.
    ascii_only, byte, seen = text.isascii(), len(raw) - len(raw.removeprefix(_BOM)), 0

    def bytes_to(character: int) -> int:
        nonlocal byte, seen
        byte += character - seen if ascii_only else len(text[seen:character].encode())
        seen = character
        return byte

    spans: list[tuple[int, int]] = []
    at = _space(text, at + 1)
    if text[at : at + 1] != "]":
        while True:
            try:
                _, end = decode(text, at)
            except (ValueError, RecursionError) as error:
                raise _broken(
                    path, text, getattr(error, "pos", at), str(getattr(error, "msg", error))
                ) from error
            spans.append((bytes_to(at), bytes_to(end)))
            at = _space(text, end)
            if text[at : at + 1] != ",":
                break
            at = _space(text, at + 1)
    if text[at : at + 1] != "]" or _space(text, at + 1) != len(text):
        raise _broken(
            path, text, at, "expected , or ] and then the end" if at < len(text) else "the list has no end"
        )
    return _JsonRows(path, spans)


def _broken(path: Path, text: str, at: int, what: str) -> DataError:
    line = text.count("\n", 0, at) + 1
    return DataError(
        f"{path}: broken JSON at line {line}: {what}; expected a list of rows. Correct or restore the file"
    )


def _space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


_BOM = b"\xef\xbb\xbf"
"""What some editors put before UTF-8; json skips it."""

_SPACE = re.compile(r"[ \t\r\n]*")


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
                # One thread: a pool of threads does not survive the fork of a worker.
                self._groups[key] = file.read_row_group(number, use_threads=False)
            if len(self._groups) > WINDOW:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


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

    def number(self, n: int) -> int:
        return n + 1

    def row(self, n: int) -> Any:
        number = bisect_right(self._ends, n)
        try:
            group = self.decoded.group(self.path, number)
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise DataError(
                f"{self.path}:{n + 1}: cannot be read ({_line(error)}); expected a whole file. Restore it"
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
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path}: not a parquet file ({_line(error)}); expected a whole one. Restore it"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


_READERS: dict[str, Callable[[Path], _JsonRows | _ParquetRows]] = {
    ".json": _open_json,
    ".jsonl": _open_jsonl,
    ".ndjson": _open_jsonl,
    ".parquet": _ParquetRows,
}
