"""Answers that were made elsewhere: read, joined with the questions by id, scored without a model.

Read are LLaVA's jsonl of answers (``question_id``, ``text``), our own ``NAME.replies.jsonl``, lists of
``{question_id, answer}``, ``{questionId, prediction}`` and ``{image, answer}`` as test servers take them, and
a json object of id -> answer; each also with ``.gz``. Where an id alone does not name a question, a benchmark
reads its answers itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymodal.core.errors import DataError
from tinymodal.eval.benchmark import Benchmark, Given, Problems, Question
from tinymodal.eval.files import PACKED, read_json, read_rows, text_of

IDS = ("question_id", "questionId", "id", "index", "image")
TEXTS = ("text", "prediction", "reply", "response", "caption", "pred", "answer")
"""``answer`` is last: beside any other it is the right one, in our rows and in tables of results."""
UNKNOWN = "answers to no question"
DOUBLE = "questions answered more than once"
MISSING = "questions without an answer"


def answer_rows(path: Path, problems: Problems) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """``(where, row)`` of each answer in a file; an object of id -> answer becomes rows of ``id``, ``text``.

    Raises:
        DataError: the file is not there, or of a kind that is not known.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; expected answers. Give the file with --answers.")
    name = path.name
    for end in reversed(PACKED):
        name = name.removesuffix(end)
    if name.endswith(".json"):
        try:
            value = read_json(path)
        except DataError:
            value = None  # jsonl that is called json
        if isinstance(value, dict) and not any(key in value for key in IDS):
            for key, text in value.items():
                yield f"{path.name}: {key}", {"id": key, "text": text}
            return
    yield from read_rows(path, problems)


def first_of(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The value of the first of ``names`` that the row has, as text; None where it has none.

    An empty cell is an empty text: a prediction that is missing must not become the next column.
    """
    for name in names:
        if name in row:
            return text_of(row[name])
    return None


def plain_answers(path: Path, problems: Problems) -> Iterator[Given]:
    """Answers by the id in their row; rows without id or answer are noted and left out."""
    for where, row in answer_rows(path, problems):
        name, text = first_of(row, IDS), first_of(row, TEXTS)
        if name is None:
            problems.add("answers without an id", f"{where}: none of {', '.join(IDS)}")
        elif text is None:
            problems.add("unreadable answers", f"{where}: none of {', '.join(TEXTS)}")
        else:
            yield Given(name, text, where)


def unique(questions: Iterable[Question], problems: Problems) -> list[Question]:
    """The questions; of those with one id the first counts, and the others are noted."""
    kept: dict[str, Question] = {}
    for question in questions:
        if question.sample.id in kept:
            problems.add("questions with the id of another", question.sample.id)
        else:
            kept[question.sample.id] = question
    return list(kept.values())


def join(
    benchmark: Benchmark, questions: Sequence[Question], path: Path, problems: Problems
) -> dict[str, Given]:
    """Each question's answer by id, the first where there are several.

    Answers to no question, second answers that differ, and questions without one are noted.

    Raises:
        DataError: the file cannot be read, or answers none of the questions.
    """
    asked = {question.sample.id for question in questions}
    answers = benchmark.answers(path) if benchmark.answers else plain_answers(path, problems)
    found: dict[str, Given] = {}
    for given in answers:
        if given.id not in asked:
            problems.add(UNKNOWN, f"{given.where}: {given.id!r}")
        elif given.id in found:
            problems.add(DOUBLE, f"{given.where}: {given.id!r}, as {found[given.id].where}")
        else:
            found[given.id] = given
    if not found:
        example = questions[0].sample.id if questions else ""
        raise DataError(
            f"{path}: answers none of the {len(asked):,} questions of {benchmark.name}; expected ids such as "
            f"{example!r}. Is it the file of another benchmark or split?"
        )
    for question in questions:
        if question.sample.id not in found:
            problems.add(MISSING, question.sample.id)
    return found
