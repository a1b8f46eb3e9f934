"""MMStar: questions that cannot be answered without looking.

1,500 questions with four options, 250 in each of six categories (Chen et al., NeurIPS 2024,
arXiv:2403.20330). The options stand in the question. A reply counts by the letter that it begins with; a
missing one is wrong.

Files: ``mmstar.parquet`` or ``MMStar.tsv`` of https://huggingface.co/datasets/Lin-Chen/MMStar (columns
``index, question, image, answer, category, l2_category``), or VLMEvalKit's tsv, whose options have columns
of their own. Prompt: LLaVA's for options, https://github.com/haotian-liu/LLaVA/blob/v1.2.2/docs/Evaluation.md
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.eval.benchmark import Benchmark, File, Given, Metrics, OnDisk, Problems, Question, Score
from tinymodal.eval.files import id_of, need, parts_of, read_rows, text_of
from tinymodal.eval.intervals import mean_sums
from tinymodal.eval.rules.choices import (
    DIRECTLY,
    leading_letter,
    option_lines,
    options_of,
    picture,
    said_rows,
)

SOURCE = "https://github.com/MMStar-Benchmark/MMStar/blob/79e6d1cbab00576162fc8c878a4ad584f98b4868/eval/vlmeval/evaluate/mmstar.py"
QUESTIONS = File(
    ("mmstar.parquet", "MMStar.tsv", "val/*.parquet", "*MMStar*.tsv", "*.parquet"),
    "questions, pictures and answers",
    "https://huggingface.co/datasets/Lin-Chen/MMStar",
)
CATEGORIES = (
    "coarse perception",
    "fine-grained perception",
    "instance reasoning",
    "logical reasoning",
    "science & technology",
    "math",
)
"""In the order in which the official scorer prints them."""


def open_folder(folder: Path, problems: Problems) -> Benchmark:
    """MMStar over a folder with its parquet or tsv."""

    def load() -> Iterator[Question]:
        for path in parts_of(need(folder, QUESTIONS, "mmstar"), problems):
            for where, row in read_rows(path, problems):
                name, answer = id_of(row.get("index")), text_of(row.get("answer")).strip().upper()
                if not name or not answer or answer not in "ABCD":
                    problems.add("questions without id or answer", where)
                    continue
                source = picture(row.get("image"), folder / "images" / f"{name}.jpg", where, problems)
                asked = text_of(row.get("question")).strip() + option_lines(options_of(row)) + DIRECTLY
                meta = {key: text_of(row.get(key)) for key in ("category", "l2_category")}
                yield Question(Sample((Message("user", (Image(source), Text(asked))),), name), answer, meta)

    def answers(path: Path) -> Iterator[Given]:
        return (Given(said.id, said.text, said.where) for said in said_rows(path, problems))

    return Benchmark(
        name="mmstar",
        load=load,
        score=score,
        source=SOURCE,
        report=report,
        headline="final score",
        sums=mean_sums,
        answers=answers,
        unanswered="wrong",
        max_new_tokens=32,
    )


def score(question: Question, reply: str) -> Score:
    said = leading_letter(reply)
    return Score(float(said == question.answer), parsed=said or "")


def report(scores: Sequence[Score]) -> Metrics:
    """Accuracy, 0 to 1: of all, of each category, and of each part of a category in brackets."""
    values: dict[str, dict[str, list[float]]] = {}
    for one in scores:
        parts = values.setdefault(one.meta["category"], {})
        parts.setdefault(one.meta["l2_category"], []).append(one.value)
    found: Metrics = {"final score": _mean([one.value for one in scores])} if scores else {}
    for category in sorted(values, key=lambda name: CATEGORIES.index(name) if name in CATEGORIES else 99):
        found[category] = _mean([value for part in values[category].values() for value in part])
        found |= {f"{category}({part})": _mean(of_part) for part, of_part in values[category].items()}
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


TASK = OnDisk(
    name="mmstar",
    title="questions that cannot be answered without looking",
    source=SOURCE,
    files=(QUESTIONS,),
    open=open_folder,
    folders=("MMStar",),
)
