"""SEED-Bench, the part about pictures: nine types of questions with four options.

14,233 questions (Li et al., 2023, arXiv:2307.16125). As LLaVA counts: the reply is the letter and nothing
else, or it is wrong; so is a missing one. The questions about videos are left out, and answers to them are
passed over. The paper itself ranks the options by likelihood; its published numbers of LLaVA-1.5 do not.

Files: ``SEED-Bench.json`` with the pictures in ``SEED-Bench-image``, or the parquet of
https://huggingface.co/datasets/lmms-lab/SEED-Bench (columns as the keys of the json, and ``image``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.eval.benchmark import Benchmark, File, Given, Metrics, OnDisk, Problems, Question, Score
from tinymodal.eval.files import id_of, need, rows_of, text_of
from tinymodal.eval.intervals import percent_sums
from tinymodal.eval.rules.choices import DIRECTLY, lettered, option_lines, picture, said_rows

SOURCE = "https://github.com/haotian-liu/LLaVA/blob/524a75b74254717057ee196b507668ebd314a280/scripts/convert_seed_for_submission.py"
QUESTIONS = File(
    ("SEED-Bench.json", "test-*.parquet"),
    "questions with options and answers",
    "https://huggingface.co/datasets/AILab-CVC/SEED-Bench",
)
PICTURES = File(
    ("SEED-Bench-image/*",), "pictures", "https://huggingface.co/datasets/AILab-CVC/SEED-Bench", optional=True
)
TYPES = (
    "Scene Understanding",
    "Instance Identity",
    "Instance Attributes",
    "Instance Location",
    "Instances Counting",
    "Spatial Relation",
    "Instance Interaction",
    "Visual Reasoning",
    "Text Understanding",
)
"""Names of the types 1 to 9 in the official file, https://github.com/AILab-CVC/SEED-Bench/blob/main/DATASET.md"""
KEYS = ("choice_a", "choice_b", "choice_c", "choice_d")


def open_folder(folder: Path, problems: Problems) -> Benchmark:
    """SEED-Bench's pictures over a folder with ``SEED-Bench.json``."""
    of_videos: set[str] = set()

    def load() -> Iterator[Question]:
        place = folder / "SEED-Bench-image"
        for where, row in rows_of(need(folder, QUESTIONS, "seedbench"), "questions", problems):
            name, answer, kind = id_of(row.get("question_id")), text_of(row.get("answer")), _type(row)
            if name and text_of(row.get("data_type")) != "image":
                of_videos.add(name)
                continue
            if not name or not kind or not answer or answer not in "ABCD":
                problems.add("questions without id, type or answer", where)
                continue
            source = picture(row.get("image"), place / text_of(row.get("data_id")), where, problems)
            options = lettered([text_of(row.get(key)) for key in KEYS])
            parts = (Image(source), Text(text_of(row.get("question")) + option_lines(options) + DIRECTLY))
            yield Question(Sample((Message("user", parts),), name), answer, {"type": kind})

    def answers(path: Path) -> Iterator[Given]:
        # load() comes before: it knows which questions are about videos.
        for said in said_rows(path, problems, ("question_id", "q_id", "id")):
            if said.id not in of_videos:
                yield Given(said.id, said.text, said.where)

    return Benchmark(
        name="seedbench",
        load=load,
        score=score,
        source=SOURCE,
        report=report,
        headline="image accuracy",
        sums=percent_sums,
        answers=answers,
        unanswered="wrong",
        max_new_tokens=16,
    )


def _type(row: Mapping[str, Any]) -> str:
    """Name of the row's type; empty where it is none of the nine."""
    number = id_of(row.get("question_type_id"))
    return TYPES[int(number) - 1] if number in map(str, range(1, len(TYPES) + 1)) else ""


def score(question: Question, reply: str) -> Score:
    return Score(float(reply == question.answer), parsed=reply if reply in tuple("ABCD") else "")


def report(scores: Sequence[Score]) -> Metrics:
    """Accuracy of each type and of all, in percent with two decimals as it is printed."""
    values: dict[str, list[float]] = {}
    for one in scores:
        values.setdefault(one.meta["type"], []).append(one.value)
    found = {name: _percent(values[name]) for name in TYPES if name in values}
    return found | ({"image accuracy": _percent([one.value for one in scores])} if scores else {})


def _percent(values: Sequence[float]) -> float:
    return float(f"{sum(values) / len(values) * 100:.2f}")


TASK = OnDisk(
    name="seedbench",
    title="nine types of questions with four options about pictures",
    source=SOURCE,
    files=(QUESTIONS, PICTURES),
    open=open_folder,
    folders=("seed_bench", "SEED-Bench"),
)
