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
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tinymodal.core.errors import DataError
from tinymodal.eval.benchmark import File, OnDisk, Problems

Row = Mapping[str, Any]
PACKED = (".gz", ".tar.gz", ".tgz")
TABLES = (".tsv", ".csv", ".xlsx", ".parquet")
WIDEST_FIELD = 1 << 30
"""Characters of one field: MMBench keeps whole pictures in its tsv."""


def find_file(folder: Path, *patterns: str) -> Path | None:
    """The file of the first pattern that fits any, packed or not; the one nearest to the top, by name.

    Patterns are relative to ``folder`` or to any folder below it.
    """
    below = sorted(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: (len(path.parts), str(path))
    )
    names = [(path, path.relative_to(folder).as_posix()) for path in below]
    for pattern in patterns:
        for path, name in names:
            for end in ("", *PACKED):
                if fnmatch.fnmatch(name, pattern + end) or fnmatch.fnmatch(name, f"*/{pattern}{end}"):
                    return path
        # GQA's questions come as testdev_balanced_questions.tar.gz, without the .json of the file inside.
        stem = pattern.rpartition(".")[0]
        for path, name in names:
            if stem and any(name.endswith(f"{stem}{end}") for end in PACKED[1:]):
                return path
    return None


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


def read_text(path: Path) -> str:
    """The text of a file, unpacked: of a ``.gz``, or of the only file in a ``.tar.gz``.

    Raises:
        DataError: it cannot be read, or is no UTF-8.
    """
    try:
        if path.name.endswith((".tar.gz", ".tgz")):
            with tarfile.open(path) as archive:
                inside = [member for member in archive if member.isfile()]
                if len(inside) != 1:
                    raise DataError(f"{path}: holds {len(inside)} files; expected one. Unpack it.")
                stream = archive.extractfile(inside[0])
                assert stream is not None
                content = stream.read()
        elif path.suffix == ".gz":
            content = gzip.decompress(path.read_bytes())
        else:
            content = path.read_bytes()
        return content.decode("utf-8-sig")
    except (OSError, EOFError, tarfile.TarError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def read_json(path: Path) -> Any:
    """The value of a json file.

    Raises:
        DataError: it is not there, or is no json.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno}: {error.msg}; expected json") from error


def read_jsonl(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(where, row)`` of each line; a line that holds no json object is noted and left out."""
    # Not splitlines(): a text may hold one of the rarer line ends that it cuts at.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name}: line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict):
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
    if kind == ".jsonl":
        yield from read_jsonl(path, problems)
    elif kind == ".json":
        text = read_text(path)
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            # jsonl that is called json, as POPE's are.
            yield from read_jsonl(path, problems)
            return
        if isinstance(value, dict):
            value = [value]
        for number, row in enumerate(value, 1):
            if isinstance(row, dict):
                yield f"{path.name}: row {number}", row
            else:
                problems.add("unreadable rows", f"{path.name}: row {number}")
    elif kind in TABLES:
        yield from ((f"{path.name}: row {n}", row) for n, row in enumerate(_table(path, kind), 1))
    else:
        raise DataError(f"{path}: expected .jsonl, .json, {', '.join(TABLES)}, or one of these with .gz")


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
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
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
    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        rows = book.worksheets[0].iter_rows(values_only=True)
        head = [str(cell) if cell is not None else "" for cell in next(rows, ())]
        for row in rows:
            yield {key: value for key, value in zip(head, row, strict=False) if key}
    finally:
        book.close()


def text_of(value: object) -> str:
    """A cell as text; one without anything in it, as tables have them (``None``, ``nan``), is empty."""
    if value is None or value != value:  # nan
        return ""
    return str(value)
