"""Code of the user's own in a benchmark: what goes wrong there is told in one line, not as a bug of ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinymodal.core.errors import DataError, TinyModalError
from tinymodal.eval.benchmark import Benchmark, Question, Score


def checked(benchmark: Benchmark) -> Benchmark:
    """The same benchmark; where its scorer fails, the question and the reason are told.

    Raises:
        DataError: its name is no plain file name; replies go to ``NAME.replies.jsonl``.
    """
    name = benchmark.name
    if not name or Path(name).name != name or name in (".", "..") or "\\" in name or not name.isprintable():
        raise DataError(
            f"{name!r}: a benchmark's name is that of its file of replies too; expected one without folders. "
            f"Rename it."
        )
    if not is_own(benchmark.score):
        return benchmark

    def score(question: Question, reply: str) -> Score:
        try:
            found = benchmark.score(question, reply)
        except TinyModalError:
            raise
        except Exception as error:
            raise fault(benchmark, f"its scorer fails at question {question.sample.id!r}", error) from error
        value = getattr(found, "value", None)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(
                f"{name}: its scorer makes {found!r} of question {question.sample.id!r}; expected "
                f"Score(value) with a number from 0 to 1. Mend it."
            )
        return found

    return replace(benchmark, score=score)


def numbers(benchmark: Benchmark, how: Callable[[Sequence[Score]], Any], scores: Sequence[Score]) -> Any:
    """What ``how``, the benchmark's ``reduce`` or ``report``, makes of the scores.

    Raises:
        DataError: the user's own code fails.
    """
    try:
        return how(scores)
    except TinyModalError:
        raise
    except Exception as error:
        if is_own(how):
            raise fault(benchmark, f"its numbers over {len(scores):,} scores fail", error) from error
        raise


def is_own(code: object) -> bool:
    """Whether it is no code of this package."""
    return not str(getattr(code, "__module__", "")).startswith("tinymodal.")


def fault(benchmark: Benchmark, what: str, error: Exception) -> DataError:
    return DataError(
        f"{benchmark.name}: {what}: {type(error).__name__}: {error}. Mend it; TINYMODAL_DEBUG=1 shows where."
    )
