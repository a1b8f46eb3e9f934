"""Run benchmarks: ask, score, write every prompt, reply and score down.

``FOLDER/NAME.replies.jsonl`` gets one row per question as it is answered. A run that was stopped goes on
where it was; what another model said, or the same one with other settings or about another question or
picture, is asked again, never mixed in. When all are answered the rows lie in the order of the questions: the
same file, however often the run was stopped and however many processes asked. Where a language model grades,
a row's score is null until the last of these runs had it graded. ``FOLDER/results.json`` gets the numbers,
those of one model. See :mod:`tinymodal.eval.folder`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tinymodal.core.errors import DataError
from tinymodal.core.log import Progress, say
from tinymodal.eval.benchmark import Benchmark, Given, Listener, Problems, Question, Score
from tinymodal.eval.folder import (
    RESULTS,
    alone,
    digest,
    fingerprint,
    line,
    rank_path,
    read_rows,
    read_summaries,
    replies_path,
    write_atomically,
)
from tinymodal.eval.given import unique
from tinymodal.eval.names import benchmarks
from tinymodal.eval.own import checked
from tinymodal.eval.protocol import protocol_of
from tinymodal.eval.results import Answered, Result
from tinymodal.eval.score import grade
from tinymodal.eval.speaking import TIMED, aloud, built_in, check_apart, time_speech
from tinymodal.train.world import ALONE, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from tinymodal.compose.build import Composed
    from tinymodal.eval.judge import Judge
    from tinymodal.infer.engine import Engine, Reply

BATCH_SIZE = 64
SAVE_EVERY = 512
"""Questions between two writes: what a kill costs at most."""
NO_PICTURE = "questions whose picture or sound is missing"
UNREADABLE = "questions that cannot be prepared"


class Said(NamedTuple):
    """A reply's text, and what a listener heard of it; None where it was not spoken."""

    text: str
    heard: str | None = None


class Asking(NamedTuple):
    """Whom a run asks, and how."""

    mark: str
    """Of the model, see :func:`fingerprint`."""
    limit: int | None = None
    """The first N questions only."""
    batch_size: int = BATCH_SIZE
    world: World = ALONE
    judge: Judge | None = None


class Digests:
    """The digests of a benchmark's questions: their pictures and sounds are read once in a run."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def of(self, question: Question) -> str:
        """See :func:`digest`."""
        name = question.sample.id
        if name not in self.known:
            self.known[name] = digest(question)
        return self.known[name]

    def fits(self, question: Question, told: object) -> bool:
        """Whether a row tells the question's digest; no row fits one that cannot be read."""
        try:
            return self.of(question) == told
        except DataError:
            return False


def evaluate(
    composed: Composed,
    names: Sequence[str],
    *,
    folder: Path,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    spoken: bool = False,
    listener: Callable[[], Listener] = built_in,
    voice: str | None = None,
    judge: Judge | None = None,
    world: World = ALONE,
) -> list[Result]:
    """Score a model on benchmarks by name; writes into ``folder`` and returns the results in order.

    Of several processes the first one does; the others get an empty list.

    Args:
        composed: the model, as ``compose.build.load`` gives it.
        names: see ``names.benchmark``. All are looked up before the first question is asked.
        folder: where rows and results go.
        data: where the files of the field's benchmarks are.
        limit: the first N questions of each, for a quick look.
        batch_size: questions answered together.
        spoken: the replies are spoken, and what counts is how they are understood, see ``speaking.aloud``.
        listener: who listens then.
        voice: in which the model speaks then; None: its first.
        judge: who grades where a benchmark wants it.
        world: the processes that share the questions; each is asked by one of them.

    Raises:
        RecipeError: an unknown benchmark.
        CheckpointError: replies are to be spoken by a model that does not speak.
        DataError: no question that can be asked; two benchmarks of one name; a folder that another process
            writes into, or that holds other things under our files' names; a scorer of the user's that fails.
    """
    from tinymodal.infer.engine import Engine

    found = [checked(each) for each in benchmarks(names, data)]
    if spoken:
        found = [aloud(each, listener, voice=voice, name=each.name if each.aloud else "") for each in found]
    engine = Engine(composed)
    path = folder / RESULTS
    mark = fingerprint(engine)
    how = Asking(mark, limit, batch_size, world, judge)
    with _ours(folder, world):
        for each in found:
            read_rows(replies_path(folder, each.name))  # refused now, not when its turn comes in an hour
        # Numbers of other weights would be taken for this model's.
        told = {name: summary for name, summary in read_summaries(path).items() if summary["run"] == mark}
        results = []
        for each in found:
            if (result := _ask(each, engine, folder, how, each.name)) is None:
                continue
            results.append(result)
            told[each.name] = result.summary()
            # Now, not at the end: the next one may fail, or take hours and be killed.
            write_atomically(path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return results


def run(
    benchmark: Benchmark,
    engine: Engine,
    folder: Path,
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    title: str | None = None,
) -> Result:
    """Ask one benchmark's questions, those already answered by this very model left out.

    Args:
        benchmark: what to ask.
        engine: who answers.
        folder: gets ``NAME.replies.jsonl``.
        limit: the first N questions only.
        batch_size: questions answered together.
        title: what the progress bar says; the benchmark's name if None.

    Raises:
        DataError: no question that can be asked; a folder that another process writes into; a file of the
            name of ours that is not ours.
    """
    benchmark = checked(benchmark)
    how = Asking(fingerprint(engine), limit, batch_size)
    with alone(folder):
        found = _ask(benchmark, engine, folder, how, title or benchmark.name)
    assert found is not None  # one process, the first
    return found


@contextlib.contextmanager
def _ours(folder: Path, world: World) -> Iterator[None]:
    """The folder, for the processes of this run alone: the first holds it for all."""
    if world.main:
        with alone(folder):
            world.barrier()
            yield
            world.barrier()
    else:
        world.barrier()
        yield
        world.barrier()


def _ask(benchmark: Benchmark, engine: Engine, folder: Path, how: Asking, title: str) -> Result | None:
    """:func:`run`, in a folder that is ours alone; None in processes other than the first."""
    from tinymodal.infer.engine import Sampling

    questions, problems = _questions(benchmark, how.limit)
    sampling = Sampling(max_new_tokens=benchmark.max_new_tokens)
    of_run = f"{how.mark}/{benchmark.max_new_tokens}"
    heard = benchmark.aloud
    extra: dict[str, Any] = {}
    if heard is not None:
        engine.mouth.known(heard.voice)
        check_apart(heard.listener(), how.mark, benchmark.name)
        of_run += f"/{heard.listener().mark}/{heard.voice or ''}"
        extra = {"speak": True, "voice": heard.voice}
    path, world, digests = replies_path(folder, benchmark.name), how.world, Digests()
    if world.main:
        _absorb(path, of_run, benchmark, questions, digests)
    world.barrier()
    done = {row["id"] for row in read_rows(path) if row["run"] == of_run}
    left = [question for question in questions if question.sample.id not in done]
    start = len(questions) - len(left)
    if start and left and world.main:
        say(f"{path}: {start:,} of {len(questions):,} questions were already answered; going on")
    world.barrier()  # nobody writes before all have read
    own = path if world.size == 1 else rank_path(path, world.rank)
    # Sounds take memory until they are heard.
    at_once = how.batch_size if heard is not None else SAVE_EVERY
    mine, broken = left[world.rank :: world.size], Problems()

    def ask(chunk: Sequence[Question], done: Callable[[int], None]) -> Sequence[Reply]:
        return engine.reply([q.sample for q in chunk], sampling, how.batch_size, done=done, **extra)

    with (
        Progress(title, start + len(mine), "questions", start=start, shown=world.main) as progress,
        own.open("a", encoding="utf-8") as file,
    ):
        for first in range(0, len(mine), at_once):
            pairs = _replies(mine[first : first + at_once], broken, ask, progress)
            heard_of = _heard(benchmark, [reply for _, reply in pairs])
            for (question, reply), said in zip(pairs, heard_of, strict=True):
                row = {
                    "id": question.sample.id,
                    "prompt": reply.prompt,
                    "reply": reply.text,
                    "stopped_by": reply.stopped_by,
                    **_scored(question, said, _score(benchmark, question, said)),
                    "digest": digests.of(question),
                    "run": of_run,
                }
                file.write(line(row))
            file.flush()
    for noted in world.gather(broken.told()):
        problems.merge(noted)
    if world.main:
        _absorb(path, of_run, benchmark, questions, digests)
    return _result(benchmark, engine, questions, path, of_run, how, problems) if world.main else None


def _result(
    benchmark: Benchmark,
    engine: Engine,
    questions: Sequence[Question],
    path: Path,
    of_run: str,
    how: Asking,
    problems: Problems,
) -> Result:
    """Grade what was answered, and write the grades into the rows."""
    from tinymodal.infer.engine import Sampling

    rows = {row["id"]: row for row in read_rows(path) if row["run"] == of_run}
    asked = [question for question in questions if question.sample.id in rows]
    if not asked:
        raise DataError(f"{benchmark.name}: none of {len(questions):,} questions could be asked; {problems}")
    said = [Said(rows[q.sample.id]["reply"], rows[q.sample.id].get("heard")) for q in asked]
    scores: list[Score | None]
    if benchmark.judge is None:
        scores = [_score(benchmark, *pair) for pair in zip(asked, said, strict=True)]
    else:
        given = {
            q.sample.id: Given(q.sample.id, one.text, q.sample.id) for q, one in zip(asked, said, strict=True)
        }
        scores = grade(benchmark, asked, given, problems, how.judge)
        for question, one, score in zip(asked, said, scores, strict=True):
            rows[question.sample.id] |= _scored(question, one, score)
        write_atomically(path, "".join(map(line, rows.values())))
    answered = tuple(
        Answered(question, one.text, score, one.heard)
        for question, one, score in zip(asked, said, scores, strict=True)
        if score is not None
    )
    timing = None
    if benchmark.aloud is not None:
        sampling = Sampling(max_new_tokens=benchmark.max_new_tokens)
        timing = time_speech(engine, [q.sample for q in asked[:TIMED]], sampling, benchmark.aloud.voice)
    protocol = protocol_of(engine, rows[asked[0].sample.id]["prompt"], how.mark)
    if how.judge is not None and benchmark.judge is not None:
        protocol["judge"] = how.judge.told(benchmark.judge)
    return Result(benchmark, answered, how.limit, how.mark, timing, problems=problems, protocol=protocol)


def _questions(benchmark: Benchmark, limit: int | None) -> tuple[list[Question], Problems]:
    """The questions that can be asked, and what is wrong with the others."""
    noted = Problems()
    benchmark.problems.clear()
    loaded = unique(itertools.islice(benchmark.load(), limit), noted)
    noted.merge(benchmark.problems.told())
    if not loaded:
        raise DataError(f"{benchmark.name}: no questions; expected at least one. {noted}".rstrip())
    for question in loaded:
        words = "".join((question.sample.id, question.answer, *question.meta.values()))
        broken = next((c for c in words if "\ud800" <= c <= "\udfff"), None)
        if broken is not None:
            raise DataError(
                f"{question.sample.id}: answer or kind holds half a character (U+{ord(broken):04X}), which "
                f"no file can hold; it was cut inside an emoji or decoded wrongly. Mend the row."
            )
    there = []
    for question in loaded:
        gone = next((str(part.source) for part in question.sample.media() if _is_gone(part.source)), None)
        if gone is not None:
            noted.add(NO_PICTURE, f"{question.sample.id}: no file {gone}")
        else:
            there.append(question)
    if not there:
        raise DataError(f"{benchmark.name}: no question has its picture; {noted}")
    return there, noted


def _is_gone(source: object) -> bool:
    return isinstance(source, Path) and not source.is_file()


def _replies(
    questions: Sequence[Question],
    problems: Problems,
    ask: Callable[[Sequence[Question], Callable[[int], None]], Sequence[Reply]],
    progress: Progress,
) -> list[tuple[Question, Reply]]:
    """Each question with its reply; those that cannot be prepared are noted and left out.

    They are found by halves: a broken picture is rare, and to try every one beforehand would decode all of
    them twice.
    """
    counted = 0

    def advance(count: int) -> None:
        nonlocal counted
        counted += count
        progress.advance(count)

    try:
        return list(zip(questions, ask(questions, advance), strict=True))
    except DataError as error:
        progress.advance(-counted)
        if len(questions) == 1:
            problems.add(UNREADABLE, str(error))
            return []
        middle = len(questions) // 2
        halves = questions[:middle], questions[middle:]
        return [pair for half in halves for pair in _replies(half, problems, ask, progress)]


def _heard(benchmark: Benchmark, replies: Sequence[Reply]) -> list[Said]:
    """The replies' texts, and what the benchmark's listener hears of them if they are spoken."""
    if benchmark.aloud is None:
        return [Said(reply.text) for reply in replies]
    sounds = [reply.audio for reply in replies if reply.audio is not None]
    if not sounds:
        return []
    rate_hz = next(reply.rate_hz for reply in replies if reply.rate_hz is not None)
    heard = benchmark.aloud.listener().hear(sounds, rate_hz)
    return [Said(reply.text, words) for reply, words in zip(replies, heard, strict=True)]


def _score(benchmark: Benchmark, question: Question, said: Said) -> Score | None:
    """What the reply is worth; None where that is for a judge to say, see :func:`_result`."""
    if benchmark.judge is not None:
        return None
    text = said.text
    if said.heard is not None:
        question = replace(question, answer=said.text, meta={**question.meta, "reference": said.text})
        text = said.heard
    return replace(benchmark.score(question, text), meta=question.meta)


def _scored(question: Question, said: Said, score: Score | None) -> dict[str, Any]:
    """The part of a row that a reply's score decides; without one ``score`` is null."""
    return {
        "answer": question.answer,
        "parsed": "" if score is None else score.parsed,
        "score": None if score is None else score.value,
        "meta": dict(question.meta if score is None else score.meta),
        **({} if said.heard is None else {"heard": said.heard}),
    }


def _absorb(
    path: Path, of_run: str, benchmark: Benchmark, questions: Sequence[Question], digests: Digests
) -> None:
    """Leave in the file exactly the rows that still hold, those that several processes wrote among them.

    A row counts where model, settings, question and answer are the same; its score is that of now. The
    questions' order comes first. Rows of the same model about questions that are not asked now (``--limit``)
    stay behind them, without a grade: it may be that of another judge.
    """
    order = {question.sample.id: i for i, question in enumerate(questions)}
    parts = sorted(path.parent.glob(rank_path(path, None).name))
    kept: dict[str, tuple[int, str]] = {}
    for row in (row for file in (path, *parts) for row in read_rows(file)):
        name = row["id"]
        if row["run"] != of_run or name in kept:
            continue
        if name in order:
            question = questions[order[name]]
            if row["answer"] != question.answer or not digests.fits(question, row["digest"]):
                continue
            said = Said(row["reply"], row.get("heard"))
            row |= _scored(question, said, _score(benchmark, question, said))
        elif benchmark.judge is not None:
            row |= {"parsed": "", "score": None}
        kept[name] = order.get(name, len(order)), line(row)
    write_atomically(path, "".join(text for _, text in sorted(kept.values(), key=lambda pair: pair[0])))
    for part in parts:
        part.unlink()
