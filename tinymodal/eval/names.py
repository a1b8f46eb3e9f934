"""Which benchmark a name means, and where its files are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tinymodal.core.errors import DataError
from tinymodal.core.lookup import find
from tinymodal.eval.benchmark import Benchmark, OnDisk, Problems
from tinymodal.eval.files import find_file, folder_of
from tinymodal.eval.tasks.librispeech import from_folder, is_librispeech
from tinymodal.eval.tasks.rows import SUFFIXES, from_file
from tinymodal.eval.tasks.table import ON_DISK, TASKS

ALIASES = {"speech_roundtrip": "speech-roundtrip"}
"""What else a benchmark is called."""
MEDIA = (".jpg", ".png", ".flac", ".wav", ".ogg", ".opus", ".mp3")
"""Benchmarks share COCO's pictures: these may lie in the folder of another one."""


def benchmark(name: str, data: Path | None = None) -> Benchmark:
    """The benchmark that ``--on`` names.

    Args:
        name: a built-in, one of the field, a file of rows, a folder as LibriSpeech's, ``my_bench.py:NAME``.
        data: where the files of those of the field are, see ``files.folder_of``.

    Raises:
        RecipeError: nobody knows the name, or what it names is no benchmark.
        DataError: the file of rows is not there, or is called as a built-in benchmark is; one of the field
            without ``data``.
    """
    name = ALIASES.get(name, name)
    path = Path(name)
    known = TASKS | ON_DISK
    found: object
    if name not in known and path.suffix in SUFFIXES:
        if not path.is_file():
            raise DataError(f"{name}: no such file; expected rows of image, question and answer.")
        found = from_file(path)
    elif is_librispeech(path):
        found = from_folder(path)
    else:
        found = find(name, known, "benchmark")
    if isinstance(found, OnDisk):
        return opened(found, data)
    if not isinstance(found, Benchmark):
        raise DataError(f"{name}: expected a Benchmark(...), found {type(found).__name__}.")
    if known.get(found.name, found) is not found:
        raise DataError(
            f"{name}: is called {found.name!r}, as a built-in benchmark is; expected another name. Rename it."
        )
    return found


def opened(task: OnDisk, data: Path | None) -> Benchmark:
    """A benchmark of the field over the user's files.

    Raises:
        DataError: ``data`` is missing, or no folder.
    """
    if data is None:
        raise DataError(
            f"{task.name}: needs its files; expected their folder with --data. What should lie there: "
            f"tinymodal eval --where --on {task.name}"
        )
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; expected the files of {task.name} in it.")
    folder = folder_of(task, data)
    for file in task.files:
        found = find_file(folder, *file.patterns)
        if found is not None and (other := _owner(task, data, found)) is not None:
            raise DataError(
                f"{task.name}: {data} holds no folder {task.name}, and {found} is in that of {other}; "
                f"expected its own files in a folder of its name. tinymodal eval --where --on {task.name} "
                f"--data {data} lists them."
            )
    problems = Problems()
    return replace(task.open(folder, problems), problems=problems)


def _owner(task: OnDisk, data: Path, file: Path) -> str | None:
    """The other benchmark in whose folder below ``data`` a file lies; None: nobody's, or a picture of it."""
    inside = file.relative_to(data).parts[:-1]
    if not inside or inside[0] in (task.name, *task.folders) or file.suffix in MEDIA:
        return None
    each = (one for one in ON_DISK.values() if inside[0] in (one.name, *one.folders))
    return next((one.name for one in each), None)


def benchmarks(names: Sequence[str], data: Path | None = None) -> list[Benchmark]:
    """All that ``--on`` names, in order.

    Raises:
        RecipeError: as :func:`benchmark`.
        DataError: as :func:`benchmark`; or two have one name, under which both would be written.
    """
    found: dict[str, tuple[str, Benchmark]] = {}
    for name in names:
        each = benchmark(name, data)
        if each.name in found:
            first = found[each.name][0]
            both = f"{name}: named twice" if first == name else f"{first} and {name}: both are {each.name!r}"
            raise DataError(f"{both}; expected benchmarks of different names. Rename one, or leave it out.")
        found[each.name] = name, each
    return [each for _, each in found.values()]


class Place(NamedTuple):
    """Where the files of one benchmark were looked for, and found."""

    task: OnDisk
    folder: Path | None
    """None: no folder was named."""
    found: tuple[Path | None, ...]
    """Of each of :attr:`OnDisk.files`."""


def places(names: Sequence[str], data: Path | None) -> list[Place]:
    """What benchmarks of the field need on disk.

    Args:
        names: which; none: all.
        data: where to look; None: nowhere.

    Raises:
        RecipeError: a name that nobody knows.
    """
    tasks = [find(name, ON_DISK, "benchmark with files") for name in names] if names else [*ON_DISK.values()]
    rows = []
    for task in tasks:
        folder = folder_of(task, data) if data is not None else None
        found = [find_file(folder, *file.patterns) if folder is not None else None for file in task.files]
        if data is not None:
            found = [at if at is None or _owner(task, data, at) is None else None for at in found]
        rows.append(Place(task, folder, tuple(found)))
    return rows
