"""Score answers that were made elsewhere, or that an earlier run wrote down, without loading a model.

``OUT/NAME.replies.jsonl`` gets a row per question, ``OUT/results.json`` the numbers; the same files as those
of a run over a model.
"""

from __future__ import annotations

import contextlib
import gc
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymodal.core.errors import DataError
from tinymodal.core.log import say
from tinymodal.eval.benchmark import BETWEEN, Benchmark, Given, Judging, OnDisk, Problems, Question, Score
from tinymodal.eval.folder import (
    RESULTS,
    alone,
    line,
    read_rows,
    read_summaries,
    replies_path,
    write_atomically,
)
from tinymodal.eval.given import UNANSWERED, join, unique
from tinymodal.eval.judge import UNGRADED, UNREAD
from tinymodal.eval.names import opened
from tinymodal.eval.own import JudgingFails, checked
from tinymodal.eval.results import Answered, Result

if TYPE_CHECKING:
    from tinymodal.eval.judge import Judge

MARK = "answers/"
"""What the mark of rows begins with that no model of ours said."""


def score_answers(
    task: OnDisk | Benchmark,
    answers: Path,
    out: Path,
    *,
    data: Path | None = None,
    judge: Judge | None = None,
) -> Result:
    """Score a file of answers; writes into ``out`` and returns the result.

    Args:
        task: what was asked.
        answers: see :mod:`tinymodal.eval.given`; official formats of the benchmark too.
        out: where rows and results go.
        data: where the benchmark's files are, see ``files.folder_of``.
        judge: who grades, where a benchmark wants one and the file does not hold its verdicts.

    Raises:
        DataError: files are missing or cannot be read, or the answers are to other questions.
    """
    benchmark = checked(opened(task, data) if isinstance(task, OnDisk) else task)
    problems = benchmark.problems
    rows_path = replies_path(out, benchmark.name)
    with alone(out), without_collector():
        if any(not row["run"].startswith(MARK) for row in read_rows(rows_path)):
            raise DataError(
                f"{out}: holds replies of a model to {benchmark.name}, which would be lost; give another "
                f"folder with --out"
            )
        told = read_summaries(out / RESULTS)
        if benchmark.name in told and answers.exists():
            # Until these are scored there is no number: that of other answers would be taken for theirs.
            _write(out, {name: summary for name, summary in told.items() if name != benchmark.name})
        questions = unique(benchmark.load(), problems)
        given = join(benchmark, questions, answers, problems)
        content = answers.read_bytes() if answers.is_file() else answers.name.encode()
        mark = f"{MARK}{zlib.crc32(content):08x}"
        asked = [q for q in questions if q.sample.id in given or benchmark.unanswered == "wrong"]
        scores = grade(benchmark, asked, given, problems, judge)
        answered = tuple(
            Answered(question, given[question.sample.id].text if question.sample.id in given else "", score)
            for question, score in zip(asked, scores, strict=True)
            if score is not None
        )
        protocol: dict[str, object] = {"answers": answers.as_posix(), "run": mark}
        if judge is not None and benchmark.judge is not None:
            protocol["judge"] = judge.told(benchmark.judge)
        result = Result(benchmark, answered, None, mark, problems=problems, protocol=protocol)
        told[benchmark.name] = result.summary()
        write_atomically(rows_path, (line(_row(row, mark)) for row in answered))
        _write(out, told)
    return result


def _write(out: Path, told: Mapping[str, Any]) -> None:
    if told:
        write_atomically(out / RESULTS, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    else:
        (out / RESULTS).unlink()


def folder_for(answers: Path, name: str, place: Path) -> Path:
    """Where the scores of a file of answers to a benchmark go: never over those of another file.

    Answers of one model to several benchmarks, as a rule files of one name, share a folder.

    Args:
        answers: the file.
        name: of the benchmark.
        place: the folder that is meant; where it holds the scores of another file, the next of
            ``place-2``, ``place-3``, ... that does not is taken.

    Raises:
        DataError: a folder holds something of somebody's own as its results.
    """
    folder, others = place, []
    while (told := read_summaries(folder / RESULTS).get(name)) is not None:
        other = told["protocol"].get("answers", "a model")
        if Path(other).resolve() == answers.resolve():
            break
        others.append(other)
        folder = place.with_name(f"{place.name}-{len(others) + 1}")
    if others:
        say(f"{place}: holds the scores of {others[0]} on {name}; those of {answers} go to {folder}")
    return folder


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Hundreds of thousands of rows, none in a circle: looking for circles took two thirds of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def grade(
    benchmark: Benchmark,
    asked: list[Question],
    given: dict[str, Given],
    problems: Problems,
    judge: Judge | None,
) -> list[Score | None]:
    """A score of each question, 0 of one without an answer.

    None, and a note, where only a judge could tell and there is none.
    """
    judging = benchmark.judge
    found: list[Score | None] = []
    waiting: dict[int, tuple[Question, str]] = {}
    for question in asked:
        answer = given.get(question.sample.id)
        if answer is None:
            found.append(Score(0.0, parsed=UNANSWERED))
        elif judging is not None and answer.verdicts:
            found.append(_read(judging, question, answer, problems))
        elif judging is not None and _judged(judging, question, answer.text):
            waiting[len(found)] = question, answer.text
            found.append(None)
        else:
            found.append(benchmark.score(question, answer.text))
    if judging is not None and judge is not None:
        scores = judge.grade_all(judging, list(waiting.values()), problems)
        for (i, (question, reply)), score in zip(waiting.items(), scores, strict=True):
            # As without a judge: a question that is left out would make the others count more.
            found[i] = benchmark.score(question, reply) if score is None and judging.fallback else score
        say(judge.bill())
    elif judging is not None and waiting:
        for place, (question, reply) in waiting.items():
            problems.add(UNGRADED, question.sample.id)
            if judging.fallback:
                found[place] = benchmark.score(question, reply)
        say(
            f"{benchmark.name}: {len(waiting):,} answers have no score, a language model has to grade them; "
            f"name one behind an OpenAI-compatible endpoint with --judge."
        )
    return [
        score and Score(score.value, score.parsed, question.meta)
        for question, score in zip(asked, found, strict=True)
    ]


def _judged(judging: Judging, question: Question, reply: str) -> bool:
    """Whether the reply needs a judge."""
    try:
        return bool(judging.prompt(question, reply))
    except ValueError:
        return True  # something is missing: the judge says what


def _read(judging: Judging, question: Question, answer: Given, problems: Problems) -> Score | None:
    """The mean of the verdicts that came with the answer."""
    try:
        read = [judging.read(question, answer.text, verdict) for verdict in answer.verdicts]
    except ValueError as error:
        problems.add(UNGRADED if isinstance(error, JudgingFails) else UNREAD, f"{answer.where}: {error}")
        return None
    value = sum(score.value for score in read) / len(read)
    return Score(value, parsed=BETWEEN.join(score.parsed for score in read))


def _row(answered: Answered, mark: str) -> dict[str, object]:
    question = answered.question
    return {
        "id": question.sample.id,
        "prompt": question.words,
        "reply": answered.reply,
        "stopped_by": "given",
        "answer": question.answer,
        "parsed": answered.score.parsed,
        "score": answered.score.value,
        "meta": dict(question.meta),
        "digest": "",
        "run": mark,
    }
