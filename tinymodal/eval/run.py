"""Run benchmarks: ask, score, write every prompt, reply and score down, and print the table.

``FOLDER/NAME.jsonl`` gets one row per question as it is answered. A run that was stopped goes on where it
was; rows of another model, or of other settings, are asked again, never mixed in: each row carries the mark
of its run. ``FOLDER/results.json`` gets the numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymodal.core.errors import DataError
from tinymodal.core.log import Progress, say
from tinymodal.core.lookup import find
from tinymodal.eval.benchmark import Benchmark, Question, Score, best_constants
from tinymodal.eval.tasks.rows import SUFFIXES, from_file
from tinymodal.eval.tasks.table import TASKS

if TYPE_CHECKING:
    from rich.table import Table

    from tinymodal.compose.build import Composed
    from tinymodal.infer.engine import Engine

BATCH_SIZE = 64
SAVE_EVERY = 512
"""Questions between two writes: what a kill costs at most."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One question with what came of it."""

    question: Question
    reply: str
    score: Score


@dataclass(frozen=True, slots=True)
class Result:
    """One benchmark's numbers over one model."""

    benchmark: Benchmark
    answered: tuple[Answered, ...]
    limit: int | None

    @property
    def numbers(self) -> dict[str, float]:
        return self.benchmark.reduce([row.score for row in self.answered])

    def summary(self) -> dict[str, Any]:
        """What ``results.json`` holds of it."""
        questions = [row.question for row in self.answered]
        constants = best_constants(questions) if any(q.meta.get("kind") for q in questions) else {}
        return {
            "metric": self.benchmark.metric,
            "numbers": self.numbers,
            "questions": len(self.answered),
            "limit": self.limit,
            "best_constant": {
                kind: {"answer": c.answer, "accuracy": c.accuracy} for kind, c in constants.items()
            },
            "source": self.benchmark.source,
        }


def benchmark(name: str) -> Benchmark:
    """The benchmark that ``--on`` names: a built-in, a file of rows, or ``my_bench.py:BENCHMARK``.

    Raises:
        RecipeError: nobody knows the name, or what it names is no benchmark.
        DataError: the file of rows is not there.
    """
    path = Path(name)
    if name not in TASKS and path.suffix in SUFFIXES:
        if not path.is_file():
            raise DataError(f"{name}: no such file; expected rows of image, question and answer.")
        return from_file(path)
    found = find(name, TASKS, "benchmark")
    if not isinstance(found, Benchmark):
        raise DataError(f"{name}: expected a Benchmark(...), found {type(found).__name__}.")
    return found


def evaluate(
    composed: Composed,
    names: Sequence[str],
    *,
    folder: Path,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[Result]:
    """Score a model on benchmarks by name; writes into ``folder`` and returns the results in order.

    Args:
        composed: the model, as ``compose.build.load`` gives it.
        names: see :func:`benchmark`. All are looked up before the first question is asked.
        folder: where rows and results go.
        limit: the first N questions of each, for a quick look.
        batch_size: questions answered together.

    Raises:
        RecipeError: an unknown benchmark.
        DataError: a question that cannot be read.
    """
    from tinymodal.infer.engine import Engine

    benchmarks = [benchmark(name) for name in names]
    engine = Engine(composed)
    results = [run(each, engine, folder, limit=limit, batch_size=batch_size) for each in benchmarks]
    path = folder / "results.json"
    told = _read_json(path) | {result.benchmark.name: result.summary() for result in results}
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
        folder: gets ``NAME.jsonl``.
        limit: the first N questions only.
        batch_size: questions answered together.
        title: what the progress bar says; the benchmark's name if None.

    Raises:
        DataError: a question that cannot be read, or none at all.
    """
    from tinymodal.infer.engine import Sampling

    questions = list(itertools.islice(benchmark.load(), limit))
    if not questions:
        raise DataError(f"{benchmark.name}: no questions; expected at least one.")
    if len({question.sample.id for question in questions}) < len(questions):
        raise DataError(f"{benchmark.name}: two questions have one id, so replies could not be told apart.")
    sampling = Sampling(max_new_tokens=benchmark.max_new_tokens)
    mark = fingerprint(engine, benchmark.max_new_tokens)
    path = folder / f"{benchmark.name}.jsonl"
    replies = _kept(path, mark, questions)
    left = [question for question in questions if question.sample.id not in replies]
    if replies and left:
        say(f"{path}: {len(replies):,} of {len(questions):,} questions were already answered; going on")
    name = title or benchmark.name
    with Progress(name, len(questions), "questions", start=len(replies)) as progress, path.open("a") as file:
        for start in range(0, len(left), SAVE_EVERY):
            chunk = left[start : start + SAVE_EVERY]
            said = engine.reply([q.sample for q in chunk], sampling, batch_size, done=progress.advance)
            for question, reply in zip(chunk, said, strict=True):
                score = _score(benchmark, question, reply.text)
                row = {
                    "id": question.sample.id,
                    "prompt": reply.prompt,
                    "reply": reply.text,
                    "stopped_by": reply.stopped_by,
                    "answer": question.answer,
                    "parsed": score.parsed,
                    "score": score.value,
                    "meta": dict(question.meta),
                    "run": mark,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                replies[question.sample.id] = reply.text
            file.flush()
    answered = []
    for question in questions:
        text = replies[question.sample.id]
        answered.append(Answered(question, text, _score(benchmark, question, text)))
    return Result(benchmark, tuple(answered), limit)


def tables(results: Sequence[Result]) -> list[Table]:
    """The results for the terminal; benchmarks of one family stand side by side."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.benchmark.family or result.benchmark.name, []).append(result)
    return [_table(group) for group in groups.values()]


def fingerprint(engine: Engine, max_new_tokens: int) -> str:
    """16 hex digits that change with the weights, the template and the length of a reply.

    Every tensor is sampled at up to 64 places: any step of training changes nearly all of them, and a model
    of several gigabytes is read in a moment.
    """
    import torch

    digest = hashlib.sha256(f"{engine.encoder.template.name}/{max_new_tokens}".encode())
    for name, tensor in engine.model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(len(flat) - 1, 0), min(64, len(flat)), dtype=torch.float64).long()
        digest.update(name.encode() + flat[places.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """The whole text or nothing: a kill leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def _score(benchmark: Benchmark, question: Question, reply: str) -> Score:
    return replace(benchmark.score(question, reply), meta=question.meta)


def _kept(path: Path, mark: str, questions: Iterable[Question]) -> dict[str, str]:
    """Replies of an earlier run that still hold, by question id; the file then holds exactly their rows.

    A row counts where model, settings, question and answer are the same. Rows of the same model about
    questions that are not asked now (``--limit``) stay in the file. The half line that a kill leaves does
    not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    expected = {question.sample.id: question.answer for question in questions}
    kept: dict[str, str] = {}
    lines = []
    # Not splitlines(): a reply may hold one of the rarer line ends that it cuts at.
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        row = _json_object(line)
        name = str(row.get("id"))
        if (
            row.get("run") != mark
            or name in kept
            or expected.get(name, row.get("answer")) != row.get("answer")
        ):
            continue
        lines.append(line + "\n")
        if name in expected:
            kept[name] = row["reply"]
    write_atomically(path, "".join(lines))
    return kept


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    return _json_object(path.read_text(encoding="utf-8")) if path.exists() else {}


def _table(group: Sequence[Result]) -> Table:
    from rich.table import Table

    first = group[0]
    single = len(group) == 1
    limited = f", first {first.limit} questions only" if first.limit is not None else ""
    name = first.benchmark.name if single else first.benchmark.family
    table = Table(
        title=f"{name} ({first.benchmark.metric}{limited})", title_justify="left", title_style="bold"
    )
    summaries = [result.summary() for result in group]
    constant: Mapping[str, Any] = summaries[0]["best_constant"]
    table.add_column("")
    for result in group:
        table.add_column("score" if single else result.benchmark.name, justify="right")
    if constant:
        table.add_column("best constant", justify="right", style="dim")
    keys = list(dict.fromkeys(key for summary in summaries for key in summary["numbers"] if key != "mean"))
    for key in [*keys, "mean"]:
        if key == "mean":
            table.add_section()
        cells = [_cell(summary["numbers"].get(key)) for summary in summaries]
        if constant:
            values = [c["accuracy"] for c in constant.values()]
            cells.append(_cell(constant[key]["accuracy"] if key in constant else sum(values) / len(values)))
        table.add_row(key, *cells, style="bold" if key == "mean" else None)
    table.add_row("questions", *(f"{summary['questions']:,}" for summary in summaries), style="dim")
    return table


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
