"""The file that a benchmark's test server takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tinymodal.core.errors import RecipeError
from tinymodal.eval.benchmark import Benchmark, Problems
from tinymodal.eval.given import MISSING
from tinymodal.eval.results import Result

Submit = Callable[[Mapping[str, str], Path, Problems], None]


def check_submission(benchmarks: Sequence[Benchmark], path: Path) -> None:
    """Refuse what cannot be written, before anything is asked.

    Raises:
        RecipeError: there is not exactly one benchmark, or it has no test server; something is at ``path``.
    """
    _of_one(benchmarks)
    if path.is_dir():
        raise RecipeError(f"--submission {path}: is a folder; expected the name of a file in it")
    if path.exists() or path.is_symlink():
        raise RecipeError(f"--submission {path}: is there already; move it away, or give another name")
    if (blocked := file_above(path)) is not None:
        raise RecipeError(f"--submission {path}: {blocked} is a file; expected a folder to write into")


def file_above(path: Path) -> Path | None:
    """What keeps the folder of ``path`` from being made: the nearest thing above it, where that is a file."""
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    return None if nearest.is_dir() else nearest


def _of_one(benchmarks: Sequence[Benchmark]) -> Submit:
    if len(benchmarks) != 1:
        raise RecipeError(f"--submission is of one benchmark; --on names {len(benchmarks)}")
    (benchmark,) = benchmarks
    if benchmark.submit is None:
        raise RecipeError(
            f"--submission: {benchmark.name} has no test server that we write for; expected vqav2, vizwiz or "
            f"mmbench. Its replies are in the jsonl."
        )
    return benchmark.submit


def write_submission(results: Sequence[Result], path: Path) -> str:
    """Write it, and say in a sentence what is in it.

    Raises:
        RecipeError: there is not exactly one benchmark, or it has no test server.
    """
    submit = _of_one([result.benchmark for result in results])
    (result,) = results
    texts = {row.question.sample.id: row.reply for row in result.answered}
    noted = Problems()
    path.parent.mkdir(parents=True, exist_ok=True)
    submit(texts, path, noted)
    left = noted.counts.get(MISSING, 0) or result.problems.counts.get(MISSING, 0)
    missing = f"; left empty: {left:,} {MISSING}" if left else ""
    return f"For the test server: {path}, {len(texts):,} replies{missing}"
