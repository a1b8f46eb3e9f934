"""ChartQA: questions about charts.

2,500 of test: 1,250 that people wrote, ``human``, and 1,250 made of their summaries, ``augmented`` (Masry et
al., Findings of ACL 2022, arXiv:2203.10244). A number is right within 5 %, anything else if it is the same.
LLaVA-1.5 reports none; the prompt is its prompt for short answers, as lmms-eval asks, and so are the names of
the numbers, https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/0dc9a47afe9a61214f11053dae5641716052f30f.
``relaxed_mean`` is the mean of both halves, which pix2struct and most papers report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinymodal.eval.benchmark import Benchmark, File, Given, Metrics, OnDisk, Problems, Question, Score, Sums
from tinymodal.eval.files import find_file, need, rows_of
from tinymodal.eval.given import IDS, first_of
from tinymodal.eval.rules.vqa import (
    RELAXED_SOURCE,
    SHORT,
    UNSCORED,
    Pictures,
    ask,
    groups,
    people,
    read_answers,
    relaxed,
    told_answers,
    total,
)

MAX_NEW_TOKENS = 16
"""As lmms-eval; the longest answers are names of categories."""
ORIGIN = "https://github.com/vis-nlp/ChartQA/tree/main/ChartQA%20Dataset/test"
KINDS = ("human", "augmented")
HALVES = tuple(File((f"test_{kind}.json",), f"questions and answers of {kind}", ORIGIN) for kind in KINDS)
PARQUET = File(
    ("test-*.parquet",),
    "instead: https://huggingface.co/datasets/lmms-lab/ChartQA, or HuggingFaceM4/ChartQA",
    "https://huggingface.co/datasets/lmms-lab/ChartQA",
    optional=True,
)
PICTURES = File(("png/*.png",), "the charts", ORIGIN, optional=True)


def open_folder(folder: Path, problems: Problems) -> Benchmark:
    """ChartQA over a folder with both halves of test, and charts below ``png``.

    Parquet has the columns ``type``, ``question``, ``answer`` and ``image``, or ``human_or_machine``,
    ``query``, ``label`` and ``image``. A question has no id; here it is its number in its half, ``human/0``.
    """

    def load() -> Iterator[Question]:
        charts = Pictures(folder, "png/*.png", "png")
        for where, name, kind, row in _rows(folder, problems):
            words, chart, answers = _words(row), row.get("imgname", row.get("image")), _answers(row)
            if words is None or chart is None:
                problems.add("questions without words or chart", where)
            elif not answers:
                problems.add(UNSCORED, where)
            else:
                yield ask(name, charts(chart), words + SHORT, answers, half=kind)

    def answers(path: Path) -> Iterator[Given]:
        names: dict[tuple[str, str], list[str]] = {}
        known = set()
        for _, name, _, row in _rows(folder, Problems()):
            known.add(name)
            names.setdefault((str(row.get("imgname")), str(_words(row))), []).append(name)

        def find(row: Mapping[str, Any]) -> str | None:
            told = first_of(row, IDS)
            if told in known:
                return told
            chart, words = first_of(row, ("imgname", "image")), _words(row) or row.get("prompt")
            if chart is None or not isinstance(words, str):
                return told
            same = names.get((chart, words.removesuffix(SHORT)))
            if same is None:
                return f"{chart} {words}"
            return same.pop(0) if len(same) > 1 else same[0]

        return read_answers(path, problems, find)

    return Benchmark(
        name="chartqa",
        load=load,
        score=score,
        source=RELAXED_SOURCE,
        report=report,
        headline="relaxed_mean",
        sums=sums,
        answers=answers,
        max_new_tokens=MAX_NEW_TOKENS,
        metric="relaxed accuracy",
    )


def _rows(folder: Path, problems: Problems) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Where a row is, its id, its half, the row."""
    parquet = find_file(folder, *PARQUET.patterns)
    if parquet is None or find_file(folder, *HALVES[0].patterns):
        for kind, file in zip(KINDS, HALVES, strict=True):
            for number, (where, row) in enumerate(rows_of(need(folder, file, "chartqa"), "data", problems)):
                yield where, f"{kind}/{number}", kind, row
        return
    counts = dict.fromkeys(KINDS, 0)
    for where, row in rows_of(parquet, "data", problems):
        human = row.get("type") == "human_test" or row.get("human_or_machine") == 0
        kind = KINDS[0 if human else 1]
        yield where, f"{kind}/{counts[kind]}", kind, row
        counts[kind] += 1


def _words(row: Mapping[str, Any]) -> str | None:
    words = row.get("query", row.get("question"))
    return words if isinstance(words, str) else None


def _answers(row: Mapping[str, Any]) -> list[str]:
    told = row.get("label", row.get("answer"))
    return [told] if isinstance(told, str) else told_answers(told)


def score(question: Question, reply: str) -> Score:
    right = any(relaxed(reply, answer) for answer in people(question.meta))
    return Score(float(right), parsed=reply)


def sums(scores: Sequence[Score]) -> Sums:
    """Of the mean of the halves that were asked."""
    rows = np.zeros((len(scores), 4))
    for i, one in enumerate(scores):
        half = 2 * KINDS.index(one.meta["half"])
        rows[i, half : half + 2] = one.value, 1.0
    asked = [half for half in (0, 2) if rows[:, half + 1].any()]
    return Sums(rows, lambda all_: np.mean([all_[..., h] / all_[..., h + 1] for h in asked], axis=0))


def report(scores: Sequence[Score]) -> Metrics:
    """Relaxed accuracy, 0 to 1: of all, of each half, and the mean of the halves."""
    if not scores:
        return {}
    halves = {kind: total(values) / len(values) for kind, values in groups("half", scores).items()}
    return {
        "relaxed_overall": total(score.value for score in scores) / len(scores),
        **{f"relaxed_{kind}_split": halves[kind] for kind in KINDS if kind in halves},
        "relaxed_mean": total(halves.values()) / len(halves),
    }


TASK = OnDisk(
    name="chartqa",
    title="charts, with 5 % of tolerance for numbers",
    source=RELAXED_SOURCE,
    files=(*HALVES, PARQUET, PICTURES),
    open=open_folder,
    folders=("ChartQA", "ChartQA Dataset"),
)
