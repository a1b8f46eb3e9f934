"""The file that a benchmark's test server takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinymodal.core.errors import RecipeError
from tinymodal.eval.benchmark import Problems
from tinymodal.eval.given import MISSING
from tinymodal.eval.results import Result


def write_submission(results: Sequence[Result], path: Path) -> str:
    """Write it, and say in a sentence what is in it.

    Raises:
        RecipeError: there is not exactly one benchmark, or it has no test server.
    """
    if len(results) != 1:
        raise RecipeError(f"--submission is of one benchmark; --on names {len(results)}")
    (result,) = results
    submit = result.benchmark.submit
    if submit is None:
        raise RecipeError(
            f"--submission: {result.benchmark.name} has no test server that we write for; expected vqav2, "
            f"vizwiz or mmbench. Its replies are in the jsonl."
        )
    texts = {row.question.sample.id: row.reply for row in result.answered}
    noted = Problems()
    path.parent.mkdir(parents=True, exist_ok=True)
    submit(texts, path, noted)
    left = noted.counts.get(MISSING, 0) or result.problems.counts.get(MISSING, 0)
    missing = f"; left empty: {left:,} {MISSING}" if left else ""
    return f"For the test server: {path}, {len(texts):,} replies{missing}"
