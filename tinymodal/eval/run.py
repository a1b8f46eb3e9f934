"""Run benchmarks: ask, score, write every prompt, reply and score down, and print the table.

``FOLDER/NAME.replies.jsonl`` gets one row per question as it is answered. A run that was stopped goes on
where it was; what another model said, or the same one with other settings or about another question or
picture, is asked again, never mixed in. ``FOLDER/results.json`` gets the numbers, those of one model. See
:mod:`tinymodal.eval.folder`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tinymodal.core.errors import DataError
from tinymodal.core.log import Progress, say
from tinymodal.core.lookup import find
from tinymodal.eval.benchmark import MEAN, Benchmark, Listener, Question, Score, best_constants
from tinymodal.eval.folder import (
    RESULTS,
    alone,
    digest,
    fingerprint,
    line,
    read_rows,
    read_summaries,
    replies_path,
)
from tinymodal.eval.folder import write_atomically as write_atomically
from tinymodal.eval.speaking import TIMED, Timing, aloud, built_in, check_apart, time_speech
from tinymodal.eval.tasks.librispeech import from_folder, is_librispeech
from tinymodal.eval.tasks.rows import SUFFIXES, from_file
from tinymodal.eval.tasks.table import TASKS

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from tinymodal.compose.build import Composed
    from tinymodal.infer.engine import Engine, Reply

BATCH_SIZE = 64
ROWS = {"wer": "words (wer)", "cer": "characters (cer)"}
"""What a table calls some numbers."""
SAVE_EVERY = 512
"""Questions between two writes: what a kill costs at most."""


class Said(NamedTuple):
    """A reply's text, and what a listener heard of it; None where it was not spoken."""

    text: str
    heard: str | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """One question with what came of it."""

    question: Question
    reply: str
    score: Score
    heard: str | None = None
    """What a listener heard, where replies were spoken."""


@dataclass(frozen=True, slots=True)
class Result:
    """One benchmark's numbers over one model."""

    benchmark: Benchmark
    answered: tuple[Answered, ...]
    limit: int | None
    mark: str
    """Of the model, see :func:`fingerprint`."""
    timing: Timing | None = None
    """Of the first replies, where they were spoken and any had a word."""

    @property
    def numbers(self) -> dict[str, float]:
        return self.benchmark.reduce([row.score for row in self.answered])

    def summary(self) -> dict[str, Any]:
        """What ``results.json`` holds of it."""
        questions = [row.question for row in self.answered]
        constants = {}
        if not self.benchmark.lower_is_better and any(q.meta.get("kind") for q in questions):
            constants = best_constants(questions)
        heard = self.benchmark.aloud
        spoken: dict[str, Any] = {} if heard is None else {"listener": heard.listener().name}
        if self.timing is not None:
            spoken["timing"] = asdict(self.timing)
        return {
            "metric": self.benchmark.metric,
            "numbers": self.numbers,
            "questions": len(self.answered),
            "limit": self.limit,
            "best_constant": {
                kind: {"answer": c.answer, "accuracy": c.accuracy} for kind, c in constants.items()
            },
            "source": self.benchmark.source,
            "run": self.mark,
            **spoken,
        }

    @property
    def speech(self) -> dict[str, float]:
        """``wer``, ``cer``, ``first_sound_ms`` and ``real_time_factor`` of replies that were spoken.

        Empty where they were not, or none had a word.
        """
        if self.timing is None:
            return {}
        when = {key: getattr(self.timing, key) for key in ("first_sound_ms", "real_time_factor")}
        return self.numbers | when


def benchmark(name: str) -> Benchmark:
    """The benchmark that ``--on`` names: a built-in, a file of rows, or ``my_bench.py:BENCHMARK``.

    Raises:
        RecipeError: nobody knows the name, or what it names is no benchmark.
        DataError: the file of rows is not there, or is called as a built-in benchmark is.
    """
    path = Path(name)
    if name not in TASKS and path.suffix in SUFFIXES:
        if not path.is_file():
            raise DataError(f"{name}: no such file; expected rows of image, question and answer.")
        found = from_file(path)
    elif is_librispeech(Path(name)):
        found = from_folder(Path(name))
    else:
        found = find(name, TASKS, "benchmark")
    if not isinstance(found, Benchmark):
        raise DataError(f"{name}: expected a Benchmark(...), found {type(found).__name__}.")
    if TASKS.get(found.name, found) is not found:
        raise DataError(
            f"{name}: is called {found.name!r}, as a built-in benchmark is; expected another name. Rename it."
        )
    return found


def benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """All that ``--on`` names, in order.

    Raises:
        RecipeError: as :func:`benchmark`.
        DataError: as :func:`benchmark`; or two have one name, under which both would be written.
    """
    found: dict[str, tuple[str, Benchmark]] = {}
    for name in names:
        each = benchmark(name)
        if each.name in found:
            first = found[each.name][0]
            both = f"{name}: named twice" if first == name else f"{first} and {name}: both are {each.name!r}"
            raise DataError(f"{both}; expected benchmarks of different names. Rename one, or leave it out.")
        found[each.name] = name, each
    return [each for _, each in found.values()]


def evaluate(
    composed: Composed,
    names: Sequence[str],
    *,
    folder: Path,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    spoken: bool = False,
    listener: Callable[[], Listener] = built_in,
    voice: str | None = None,
) -> list[Result]:
    """Score a model on benchmarks by name; writes into ``folder`` and returns the results in order.

    Args:
        composed: the model, as ``compose.build.load`` gives it.
        names: see :func:`benchmark`. All are looked up before the first question is asked.
        folder: where rows and results go.
        limit: the first N questions of each, for a quick look.
        batch_size: questions answered together.
        spoken: the replies are spoken, and what counts is how they are understood, see ``speaking.aloud``.
        listener: who listens then.
        voice: in which the model speaks then; None: its first.

    Raises:
        RecipeError: an unknown benchmark.
        CheckpointError: replies are to be spoken by a model that does not speak.
        DataError: a question that cannot be read; two benchmarks of one name; a folder that another process
            writes into, or that holds other things under our files' names.
    """
    from tinymodal.infer.engine import Engine

    found = benchmarks(names)
    if spoken:
        found = [aloud(each, listener, voice=voice, name=each.name if each.aloud else "") for each in found]
    engine = Engine(composed)
    path = folder / RESULTS
    with alone(folder):
        for each in found:
            read_rows(replies_path(folder, each.name))  # refused now, not when its turn comes in an hour
        told = read_summaries(path)
        results = [_ask(each, engine, folder, limit, batch_size, each.name) for each in found]
        told |= {result.benchmark.name: result.summary() for result in results}
        mark = fingerprint(engine)  # numbers of other weights would be taken for this model's
        told = {name: summary for name, summary in told.items() if summary["run"] == mark}
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
        DataError: a question that cannot be read, or none at all; a folder that another process writes into;
            a file of the name of ours that is not ours.
    """
    with alone(folder):
        return _ask(benchmark, engine, folder, limit, batch_size, title or benchmark.name)


def tables(results: Sequence[Result]) -> list[Table]:
    """The results for the terminal; benchmarks of one family stand side by side."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.benchmark.family or result.benchmark.name, []).append(result)
    return [_table(group) for group in groups.values()]


def _ask(
    benchmark: Benchmark, engine: Engine, folder: Path, limit: int | None, batch_size: int, title: str
) -> Result:
    """:func:`run`, in a folder that is ours alone."""
    from tinymodal.infer.engine import Sampling

    questions = list(itertools.islice(benchmark.load(), limit))
    _check(benchmark, questions)
    sampling = Sampling(max_new_tokens=benchmark.max_new_tokens)
    mark = fingerprint(engine)
    of_run = f"{mark}/{benchmark.max_new_tokens}"
    heard = benchmark.aloud
    extra: dict[str, Any] = {}
    if heard is not None:
        engine.mouth.known(heard.voice)
        check_apart(heard.listener(), mark, benchmark.name)
        of_run += f"/{heard.listener().mark}/{heard.voice or ''}"
        extra = {"speak": True, "voice": heard.voice}
    path = replies_path(folder, benchmark.name)
    replies = _kept(path, of_run, benchmark, questions)
    left = [question for question in questions if question.sample.id not in replies]
    if replies and left:
        say(f"{path}: {len(replies):,} of {len(questions):,} questions were already answered; going on")
    # Sounds take memory until they are heard.
    at_once = batch_size if heard is not None else SAVE_EVERY
    with (
        Progress(title, len(questions), "questions", start=len(replies)) as progress,
        path.open("a", encoding="utf-8") as file,
    ):
        for start in range(0, len(left), at_once):
            chunk = left[start : start + at_once]
            given = engine.reply(
                [q.sample for q in chunk], sampling, batch_size, done=progress.advance, **extra
            )
            for question, reply, said in zip(chunk, given, _heard(benchmark, given), strict=True):
                row = {
                    "id": question.sample.id,
                    "prompt": reply.prompt,
                    "reply": reply.text,
                    "stopped_by": reply.stopped_by,
                    **_scored(benchmark, question, said),
                    "digest": digest(question),
                    "run": of_run,
                }
                file.write(line(row))
                replies[question.sample.id] = said
            file.flush()
    answered = []
    for question in questions:
        said = replies[question.sample.id]
        answered.append(Answered(question, said.text, _score(benchmark, question, said), said.heard))
    timing = None
    if heard is not None:
        timing = time_speech(engine, [q.sample for q in questions[:TIMED]], sampling, heard.voice)
    return Result(benchmark, tuple(answered), limit, mark, timing)


def _heard(benchmark: Benchmark, replies: Sequence[Reply]) -> list[Said]:
    """The replies' texts, and what the benchmark's listener hears of them if they are spoken."""
    if benchmark.aloud is None:
        return [Said(reply.text) for reply in replies]
    sounds = [reply.audio for reply in replies if reply.audio is not None]
    rate_hz = next(reply.rate_hz for reply in replies if reply.rate_hz is not None)
    heard = benchmark.aloud.listener().hear(sounds, rate_hz)
    return [Said(reply.text, words) for reply, words in zip(replies, heard, strict=True)]


def _check(benchmark: Benchmark, questions: Sequence[Question]) -> None:
    """Refuse questions whose replies could not be told apart, or not be written down."""
    if not questions:
        raise DataError(f"{benchmark.name}: no questions; expected at least one.")
    if len({question.sample.id for question in questions}) < len(questions):
        raise DataError(f"{benchmark.name}: two questions have one id, so replies could not be told apart.")
    for question in questions:
        words = "".join((question.sample.id, question.answer, *question.meta.values()))
        broken = next((c for c in words if "\ud800" <= c <= "\udfff"), None)
        if broken is not None:
            raise DataError(
                f"{question.sample.id}: answer or kind holds half a character (U+{ord(broken):04X}), which "
                f"no file can hold; it was cut inside an emoji or decoded wrongly. Mend the row."
            )


def _score(benchmark: Benchmark, question: Question, said: Said) -> Score:
    text = said.text
    if said.heard is not None:
        question = replace(question, answer=said.text, meta={**question.meta, "reference": said.text})
        text = said.heard
    return replace(benchmark.score(question, text), meta=question.meta)


def _scored(benchmark: Benchmark, question: Question, said: Said) -> dict[str, Any]:
    """The part of a row that a reply's score decides."""
    score = _score(benchmark, question, said)
    return {
        "answer": question.answer,
        "parsed": score.parsed,
        "score": score.value,
        "meta": dict(score.meta),
        **({} if said.heard is None else {"heard": said.heard}),
    }


def _kept(path: Path, of_run: str, benchmark: Benchmark, questions: Sequence[Question]) -> dict[str, Said]:
    """Replies of an earlier run that still hold, by question id; the file then holds exactly their rows.

    A row counts where model, settings, question and answer are the same; its score is that of now. Rows of
    the same model about questions that are not asked now (``--limit``) stay in the file.
    """
    asked = {question.sample.id: question for question in questions}
    kept: dict[str, Said] = {}
    lines = []
    for row in read_rows(path):
        name, question = row["id"], asked.get(row["id"])
        if row["run"] != of_run or name in kept:
            continue
        if question is not None:
            if (row["answer"], row["digest"]) != (question.answer, digest(question)):
                continue
            kept[name] = Said(row["reply"], row.get("heard"))
            row |= _scored(benchmark, question, kept[name])
        lines.append(line(row))
    write_atomically(path, "".join(lines))
    return kept


def _table(group: Sequence[Result]) -> Table:
    from rich.table import Table

    first = group[0]
    single = len(group) == 1
    limited = f", first {first.limit} questions only" if first.limit is not None else ""
    lower = ", lower is better" if first.benchmark.lower_is_better else ""
    name = first.benchmark.name if single else first.benchmark.family
    title = f"{name} ({first.benchmark.metric} in %{lower}{limited})"
    # rich breaks a title where its table ends, and one of two rates is narrow.
    table = Table(title=title, title_justify="left", title_style="bold", min_width=min(len(title), 80))
    summaries = [result.summary() for result in group]
    constant: Mapping[str, Any] = summaries[0]["best_constant"]
    table.add_column("")
    for result in group:
        shown = "errors" if lower else "score"
        table.add_column(shown if single else result.benchmark.name, justify="right")
    if constant:
        table.add_column("best constant", justify="right", style="dim")
    keys = list(dict.fromkeys(key for summary in summaries for key in summary["numbers"]))
    if constant or MEAN in keys:
        keys = [*(key for key in keys if key != MEAN), MEAN]
    for key in keys:
        if key == MEAN:
            table.add_section()
        cells = [_cell(summary["numbers"].get(key)) for summary in summaries]
        if constant:
            values = [c["accuracy"] for c in constant.values()]
            cells.append(_cell(constant[key]["accuracy"] if key in constant else sum(values) / len(values)))
        table.add_row(ROWS.get(key, key), *cells, style="bold" if key in (MEAN, "wer") else None)
    table.add_row("questions", *(f"{summary['questions']:,}" for summary in summaries), style="dim")
    return table


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
