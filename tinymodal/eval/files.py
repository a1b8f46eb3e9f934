"""The files of benchmarks as their authors publish them: json, jsonl, tsv, csv, xlsx, parquet; packed or not.

A row comes with the words that name it in an error, ``file: line 3``. What cannot be read is noted in
:class:`~tinymodal.eval.benchmark.Problems` and left out where rows are independent of each other, and refused
where the whole file is one value.
"""

from __future__ import annotations

import csv
import fnmatch
import gzip
import io
import itertools
import json
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymodal.core.errors import DataError
from tinymodal.eval.benchmark import File, OnDisk, Problems

Row = Mapping[str, Any]
PACKED = (".gz", ".tar.gz", ".tgz")
PACKED_RE = "|".join(map(re.escape, PACKED))
TABLES = (".tsv", ".csv", ".xlsx", ".parquet")
WIDEST_FIELD = 1 << 30
"""Characters of one field: MMBench keeps whole pictures in its tsv."""


def find_file(folder: Path, *patterns: str) -> Path | None:
    """The file of the first pattern that fits any, packed or not; the one nearest to the top, by name.

    Patterns are relative to ``folder`` or to any folder below it; linked folders are followed.
    """
    names = sorted(_names(folder), key=lambda name: (name.count("/"), name))
    for pattern in patterns:
        fits = re.compile(rf"(?s:.*/)?{fnmatch.translate(pattern)[:-2]}(?:{PACKED_RE})?\Z").match
        if (name := next(filter(fits, names), None)) is not None:
            return folder / name
        # GQA's questions come as testdev_balanced_questions.tar.gz, without the .json of the file inside.
        stem = pattern.rpartition(".")[0]
        ends = tuple(stem + end for end in PACKED[1:])
        if stem and (name := next((name for name in names if name.endswith(ends)), None)) is not None:
            return folder / name
    return None


def _names(folder: Path) -> Iterator[str]:
    """All files below a folder, relative to it. COCO's has 120,000: no Path is made of each."""
    been: set[tuple[int, int]] = set()
    left = [""]
    while left:
        below = left.pop()
        try:
            told = os.stat(folder / below)
            if (told.st_dev, told.st_ino) in been:  # a link to a folder above it
                continue
            been.add((told.st_dev, told.st_ino))
            entries = list(os.scandir(folder / below))
        except OSError:
            continue  # one that may not be read holds nothing for us
        for entry in entries:
            name = below + entry.name
            if entry.is_dir():
                left.append(name + "/")
            elif entry.is_file():
                yield name


def parts_of(path: Path, problems: Problems) -> list[Path]:
    """The file, or all parts of one that is published in parts: ``test-00000-of-00004.parquet``, in order.

    Parts that are not there are noted.
    """
    part = re.fullmatch(r"(.*-)\d{5}-of-(\d{5})(.*)", path.name)
    if part is None:
        return [path]
    same = re.compile(rf"{re.escape(part[1])}\d{{5}}-of-{part[2]}.*{re.escape(path.suffix)}")
    found = sorted(other for other in path.parent.iterdir() if same.fullmatch(other.name))
    if len(found) < int(part[2]):
        problems.add("parts of files that are missing", f"{path}: found {len(found)} of {int(part[2])}")
    return found


def files_of(folder: Path, pattern: str, problems: Problems) -> list[Path]:
    """All files of a name below a folder, in order; parts of theirs that are not there are noted."""
    found = sorted(folder.rglob(pattern))
    seen: set[Path] = set()
    for path in found:
        if path not in seen:
            seen.update(parts_of(path, problems))
    return found


def need(folder: Path, file: File, task: str) -> Path:
    """The file, or a sentence about where it is from.

    Raises:
        DataError: it is not there.
    """
    found = find_file(folder, *file.patterns)
    if found is None:
        raise DataError(
            f"{task}: {folder} holds no {' or '.join(file.patterns)} ({file.what}); it is from "
            f"{file.origin}. 'tinymodal eval --where --on {task} --data {folder}' lists all that is expected."
        )
    return found


def folder_of(task: OnDisk, data: Path) -> Path:
    """Where a benchmark's files are under ``--data``: in a folder of its name, or in ``data`` itself."""
    named = (data / name for name in (task.name, *task.folders))
    return next((folder for folder in named if folder.is_dir()), data)


def read_bytes(path: Path) -> bytes:
    """What a file holds, unpacked: a ``.gz``, or the only file in a ``.tar.gz``.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if path.name.endswith((".tar.gz", ".tgz")):
            with tarfile.open(path) as archive:
                inside = [member for member in archive if member.isfile()]
                if len(inside) != 1:
                    raise DataError(f"{path}: holds {len(inside)} files; expected one. Unpack it.")
                stream = archive.extractfile(inside[0])
                assert stream is not None
                return stream.read()
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def read_text(path: Path) -> str:
    """The text of a file, unpacked as by :func:`read_bytes`.

    Raises:
        DataError: it cannot be read, or is no UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def read_json(path: Path, problems: Problems | None = None) -> Any:
    """The value of a json file.

    Args:
        path: of the file.
        problems: keys that an object holds twice are noted there, of which the last counts. None: they are
            not looked for, which is three times as fast.

    Raises:
        DataError: it is not there, or is no json.
    """

    def noted(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and problems is not None:
            for key, count in Counter(key for key, _ in pairs).items():
                if count > 1:
                    problems.add("keys that an object repeats", f"{path.name}: {key!r}")
        return found

    try:
        return json.loads(read_text(path), object_pairs_hook=None if problems is None else noted)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno}: {error.msg}; expected json") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists
        raise DataError(f"{path}: {error}; expected json that can be read") from error


def read_jsonl(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(where, row)`` of each line; a line that holds no json object is noted and left out."""
    name, decode = path.name, json.JSONDecoder().raw_decode
    # Not splitlines(): a text may hold one of the rarer line ends that it cuts at.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        where = f"{name}: line {number}"
        try:
            row, end = decode(line)
        except (ValueError, RecursionError):
            row, end = None, 0
        if isinstance(row, dict) and end == len(line):
            yield where, row
        else:
            problems.add("unreadable rows", where)


def read_rows(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(where, row)`` of a jsonl, a json list of objects, a tsv, csv, xlsx or parquet; by the file's name.

    Raises:
        DataError: the file cannot be read, or is of another kind.
    """
    name = path.name
    for end in reversed(PACKED):
        name = name.removesuffix(end)
    kind = Path(name).suffix
    if kind in (".json", ".jsonl"):
        # jsonl that is called json, as POPE's is, and a list that is called jsonl are read as what they are.
        text = read_text(path)
        try:
            value = json.loads(text) if kind == ".json" or text.lstrip().startswith("[") else None
        except (ValueError, RecursionError):
            value = None
        if value is None:
            yield from read_jsonl(path, problems)
        else:
            yield from rows_in(value if isinstance(value, list) else [value], path, problems)
    elif kind in TABLES:
        for number, row in enumerate(_table(path, kind), 1):
            where = f"{path.name}: row {number}"
            if row.pop(None, None):  # type: ignore[call-overload]
                problems.add("rows with more cells than columns", where)
            yield where, row
    else:
        raise DataError(f"{path}: expected .jsonl, .json, {', '.join(TABLES)}, or one of these with .gz")


def rows_in(values: Sequence[Any], path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(where, row)`` of each object in a list of a file; what is no object is noted and left out."""
    name = path.name
    for number, row in enumerate(values, 1):
        where = f"{name}: row {number}"
        if isinstance(row, dict):
            yield where, row
        else:
            problems.add("unreadable rows", where)


def rows_of(path: Path, key: str, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(where, row)`` of a jsonl, of a json list or the one that is ``key`` in an object, or of parquet.

    A parquet file of several, ``test-00000-of-00002.parquet``, stands for all of them.

    Raises:
        DataError: it cannot be read, or holds no such list.
    """
    if path.suffix == ".parquet":
        for part in parts_of(path, problems):
            yield from read_rows(part, problems)
        return
    if ".jsonl" in path.name:
        yield from read_rows(path, problems)
        return
    value = read_json(path)
    rows = value.get(key) if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: holds no rows; expected a list of rows, or an object with a list called {key!r}. Is it "
            f"another file?"
        )
    yield from rows_in(rows, path, problems)


def rows_by_id(path: Path, key: str, problems: Problems) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """``(where, id, row)`` of a json object of id -> row, or of parquet, whose rows hold their id as ``key``.

    Raises:
        DataError: it cannot be read, or holds no object.
    """
    if path.suffix == ".parquet":
        for where, row in rows_of(path, key, problems):
            yield where, text_of(row.get(key)), row
        return
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(
            f"{path}: expected an object of id -> question, found {type(value).__name__}. Is it another file?"
        )
    for name, row in value.items():
        where = f"{path.name}: {name!r}"
        if isinstance(row, dict):
            yield where, name, row
        else:
            problems.add("unreadable rows", where)


def _table(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    if kind == ".xlsx":
        yield from _xlsx(path)
    elif kind == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(
                f"{path}: reading parquet needs pyarrow: pip install 'tinymodal[data]'"
            ) from error
        try:
            # Rows hold pictures: not more of them at once than need be.
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
                yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from error
    else:
        before = csv.field_size_limit(WIDEST_FIELD)
        try:
            lines = io.StringIO(read_text(path), newline="")
            yield from csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ",")
        finally:
            csv.field_size_limit(before)


def _xlsx(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import openpyxl
    except ImportError as error:
        raise DataError(f"{path}: xlsx needs openpyxl: pip install 'tinymodal[eval]'") from error
    try:
        # From memory: it may be packed, and openpyxl asks files for their ending.
        book = openpyxl.load_workbook(io.BytesIO(read_bytes(path)), read_only=True, data_only=True)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, SyntaxError) as error:
        raise DataError(f"{path}: cannot be read as xlsx: {error}") from error
    try:
        rows = book.worksheets[0].iter_rows(values_only=True)
        head = [str(cell) if cell is not None else "" for cell in next(rows, ())]
        for row in rows:
            yield {key: value for key, value in itertools.zip_longest(head, row[: len(head)]) if key}
    finally:
        book.close()


def id_of(value: object) -> str:
    """An id as text; a table's ``241.0`` is 241."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else text_of(value)


def text_of(value: object) -> str:
    """A cell as text; one without anything in it, as tables have them (``None``, ``nan``), is empty."""
    if value is None or value != value:  # nan
        return ""
    return str(value)
