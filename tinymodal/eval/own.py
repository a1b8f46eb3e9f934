"""Code of the user's own in a benchmark: what goes wrong there is told in one line, not as a bug of ours."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinymodal.core.errors import DataError, TinyModalError
from tinymodal.eval.benchmark import Benchmark, Judging, Question, Score


class JudgingFails(ValueError):
    """The user's own code of a :class:`Judging` fails at a reply, which then has no grade; the others have.

    Unlike a scorer's failure it ends no run: verdicts cost time and money.
    """


def checked(benchmark: Benchmark) -> Benchmark:
    """The same benchmark; where its scorer fails, the question and the reason are told.

    Where its judging does, that is a :class:`JudgingFails`.

    Raises:
        DataError: its name is no plain file name; replies go to ``NAME.replies.jsonl``.
    """
    name = benchmark.name
    if not name or Path(name).name != name or name in (".", "..") or "\\" in name or not name.isprintable():
        raise DataError(
            f"{name!r}: a benchmark's name is that of its file of replies too; expected one without folders. "
            f"Rename it."
        )
    if benchmark.judge is not None:
        benchmark = replace(benchmark, judge=_checked(benchmark.judge))
    if not is_own(benchmark.score):
        return benchmark

    def score(question: Question, reply: str) -> Score:
        try:
            found = benchmark.score(question, reply)
        except TinyModalError:
            raise
        except Exception as error:
            raise fault(benchmark, f"its scorer fails at question {question.sample.id!r}", error) from error
        if not _is_score(found):
            raise DataError(
                f"{name}: its scorer makes {found!r} of question {question.sample.id!r}; expected "
                f"Score(value) with a number from 0 to 1. Mend it."
            )
        return found

    return replace(benchmark, score=score)


def _checked(judging: Judging) -> Judging:
    """What a ``ValueError`` says goes on to whom it is for; anything else that goes wrong becomes one."""

    def prompt(question: Question, reply: str) -> Sequence[Mapping[str, str]]:
        try:
            messages = [{**message} for message in judging.prompt(question, reply) or ()]
            json.dumps([(message["role"], message["content"]) for message in messages])
        except ValueError:
            raise
        except Exception as error:
            raise JudgingFails(f"its judge's prompt fails: {type(error).__name__}: {error}") from error
        return messages

    def read(question: Question, reply: str, verdict: str) -> Score:
        try:
            found = judging.read(question, reply, verdict)
        except ValueError:
            raise
        except Exception as error:
            raise JudgingFails(
                f"its judge's read fails at {verdict[:80]!r}: {type(error).__name__}: {error}"
            ) from error
        if not _is_score(found):
            raise JudgingFails(f"its judge's read makes {found!r} of {verdict[:80]!r}; expected Score(value)")
        return found

    # Of a built-in one a failure is a bug of ours.
    return replace(
        judging,
        prompt=prompt if is_own(judging.prompt) else judging.prompt,
        read=read if is_own(judging.read) else judging.read,
    )


def _is_score(found: object) -> bool:
    value = found.value if isinstance(found, Score) else None
    return isinstance(value, int | float) and math.isfinite(value)


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
