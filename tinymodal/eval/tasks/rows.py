"""Your own questions, by exact match: a .json, .jsonl or .parquet file of rows.

A row is ``{"image", "question", "answer"}``. ``image`` is a path beside the file, a list of them, or null.
With ``audio``, a path too, it is played behind the pictures, and is the question where there is no other.
Rows with a ``kind`` (any word but ``mean``) are also told apart by it, and an ``id`` names the question in
what is written and in answers made elsewhere. Where exact match is not the right
score, write a ``my_bench.py`` with a ``BENCHMARK`` of your own instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tinymodal.core.errors import DataError
from tinymodal.core.types import Text
from tinymodal.eval.benchmark import MEAN, Benchmark, Problems, Question, Score, by_category, mean
from tinymodal.eval.given import first_of
from tinymodal.eval.rules.answers import exact

MAX_NEW_TOKENS = 64
SUFFIXES = (".json", ".jsonl", ".parquet")


def from_file(path: Path) -> Benchmark:
    """The benchmark over one file, named after it.

    Raises:
        DataError: the file cannot be read. A row that cannot, or whose picture is not there, is left out,
            named and counted, and the score is then incomplete.
    """
    problems = Problems()
    return Benchmark(
        name=path.stem,
        load=lambda: _questions(path, problems),
        problems=problems,
        score=exact,
        reduce=_reduce,
        max_new_tokens=MAX_NEW_TOKENS,
        source=f"{path}; exact match of the normalised answer",
    )


def _questions(path: Path, problems: Problems) -> Iterator[Question]:
    from tinymodal.data.sources import open_source

    rows, spoken = open_source(path, "vqa"), None
    for i in range(len(rows)):
        try:
            if rows.row(i).get("audio") is None:
                sample = rows.sample(i)
            else:
                spoken = spoken or open_source(path, "spoken")
                sample = spoken.sample(i)
        except DataError as error:
            problems.add("questions that cannot be read", str(error))
            continue
        *asked, told = sample.messages
        answer = "".join(part.text for part in told.parts if isinstance(part, Text))
        kind = rows.row(i).get("kind")
        if str(kind) == MEAN:
            raise DataError(
                f"{sample.id}: kind is {MEAN!r}, which names the mean of all kinds; expected another word. "
                f"Rename it"
            )
        # By its own name, or by file and line: wherever it is asked from, it is the same question.
        own = first_of(rows.row(i), ("question_id", "id"))
        name = sample.id.replace(str(path), path.name) if own is None else own
        yield Question(
            replace(sample, messages=tuple(asked), id=name), answer, {"kind": str(kind)} if kind else {}
        )


def _reduce(scores: Sequence[Score]) -> dict[str, float]:
    return by_category("kind")(scores) if any(score.meta for score in scores) else mean(scores)
