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
from tinymodal.eval.files import PACKED, TABLES, id_of, read_json, read_jsonl, read_rows, read_text, rows_in

IDS = ("question_id", "questionId", "id", "index", "image")
LISTS = ("outputs", "results", "annotations", "predictions", "answers")
"""Under which some files keep their rows; ``outputs`` first, beside which ScienceQA's hold letters."""
TEXTS = ("text", "prediction", "reply", "response", "caption", "pred", "hyp", "answer")
"""``answer`` is last: beside any other it is the right one, in our rows and in tables of results."""
UNKNOWN = "answers to no question"
DOUBLE = "questions answered more than once"
MISSING = "questions without an answer"
UNREADABLE = "unreadable answers"
NULL = "answers that are null"
UNANSWERED = "no answer"
"""What is understood of a question without one, where it counts as wrong."""
COMPARED = 50
"""Answers that are looked at to tell a file of questions from one of answers."""


def answer_rows(path: Path, problems: Problems) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """``(where, row)`` of each answer in a file; an object of id -> answer becomes rows of ``id``, ``text``.

    Rows may lie in an object, as ``{"results": [...]}``. A file without a known ending is json or jsonl.

    Raises:
        DataError: the file is not there, or cannot be read.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; expected answers. Give the file with --answers.")
    name = path.name
    for end in reversed(PACKED):
        name = name.removesuffix(end)
    if name.endswith((".jsonl", *TABLES)):
        yield from read_rows(path, problems)
        return
    try:
        value = read_json(path, problems if read_text(path).lstrip().startswith("{") else None)
    except DataError:
        yield from read_jsonl(path, problems)  # jsonl that is called otherwise
        return
    if isinstance(value, dict) and not any(key in value for key in IDS):
        value = next((value[key] for key in LISTS if isinstance(value.get(key), list | dict)), value)
        if isinstance(value, dict):
            for key, text in value.items():
                yield f"{path.name}: {key}", {"id": key, "text": text}
            return
    yield from rows_in(value if isinstance(value, list) else [value], path, problems)


def first_of(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The value of the first of ``names`` that the row has, as text; None where it has none."""
    for name in names:
        if name in row:
            return id_of(row[name])
    return None


def reply_in(
    row: Mapping[str, Any], where: str, problems: Problems, names: Sequence[str] = TEXTS
) -> str | None:
    """The reply in a row, under the first of ``names`` that it has; None, and a note, where there is none.

    An empty cell or null is an empty reply, and noted: it must not become the next column, which may hold the
    right answer. A list or an object is no reply.
    """
    name = next((name for name in names if name in row), None)
    if name is None:
        problems.add(UNREADABLE, f"{where}: none of {', '.join(names)}")
        return None
    value = row[name]
    if isinstance(value, str):
        return value
    if value is None or value != value:  # nan
        problems.add(NULL, f"{where}: {name}")
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    problems.add(UNREADABLE, f"{where}: {name} is a {type(value).__name__}; expected text")
    return None


def plain_answers(path: Path, problems: Problems) -> Iterator[Given]:
    """Answers by the id in their row; rows without id or answer are noted and left out."""
    for where, row in answer_rows(path, problems):
        name = first_of(row, IDS)
        if name is None:
            problems.add("answers without an id", f"{where}: none of {', '.join(IDS)}")
        elif (text := reply_in(row, where, problems)) is not None:
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

    Answers to no question, second answers, and questions without one are noted.

    Raises:
        DataError: the file cannot be read, answers none of the questions, or holds the questions themselves.
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
    words = {question.sample.id: question.words.strip() for question in questions[:COMPARED]}
    both = [(found[name].text.strip(), asked) for name, asked in words.items() if name in found and asked]
    if len(both) > 1 and all(said == asked for said, asked in both):
        raise DataError(
            f"{path}: holds the questions of {benchmark.name} under 'text', not replies to them; expected a "
            f"file of answers."
        )
    for question in questions:
        if question.sample.id not in found:
            problems.add(MISSING, question.sample.id)
    return found
