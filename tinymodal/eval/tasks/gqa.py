"""GQA: questions about scenes whose answer is a word or two.

12,578 questions of testdev-balanced (Hudson and Manning, CVPR 2019, arXiv:1902.09506). A prediction counts
if it is the answer, letter by letter. LLaVA's answers, and a model's replies, become predictions by taking
full stops off the end and capitals away; in the official ``[{questionId, prediction}]`` they stand already
and are compared as they are. ``Distribution`` is the chi-square distance between the answers that were given
and those that are right, over groups of questions; lower is better. ``Validity`` and ``Plausibility`` need
the file of choices and are 0 without it, as the official scorer prints them.

Files: ``testdev_balanced_questions.json``, or the folder ``testdev_balanced_instructions`` of
https://huggingface.co/datasets/lmms-lab/GQA (parquet with the keys of the json and ``id``; pictures beside it
in ``testdev_balanced_images``, columns ``id, image``). Prompt: LLaVA's,
https://github.com/haotian-liu/LLaVA/blob/v1.2.2/docs/Evaluation.md
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.eval.benchmark import Benchmark, File, Given, Metrics, OnDisk, Problems, Question, Score
from tinymodal.eval.files import find_file, need, parts_of, read_json, read_rows, rows_by_id, text_of
from tinymodal.eval.given import TEXTS, answer_rows, first_of, reply_in
from tinymodal.eval.intervals import percent_sums
from tinymodal.eval.rules.vqa import SHORT

SOURCE = (
    "eval.py of https://cs.stanford.edu/people/dorarad/gqa/evaluate.html, as in https://github.com/SHI-Labs/"
    "VCoder/blob/2f95684dddff603383b18d59dd7153481a98863e/playground/data/eval/gqa/data/eval/eval.py; "
    "replies as in https://github.com/haotian-liu/LLaVA/blob/a689fd8c73e7d3cdaf5cb8f5a0686f1dbe2c4afc/scripts/"
    "convert_gqa_for_eval.py"
)
ORIGIN = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
QUESTIONS = File(
    ("testdev_balanced_questions.json", "testdev_balanced_instructions/*.parquet"),
    "questions, answers and types",
    ORIGIN,
)
CHOICES = File(
    ("testdev_balanced_choices.json",), "valid and plausible answers to each question", ORIGIN, optional=True
)
PICTURES = File(
    ("images/n*.jpg", "testdev_balanced_images/*.parquet"), "pictures, by their id", ORIGIN, optional=True
)
SECTIONS = {
    "structural type": "structural",
    "semantic type": "semantic",
    "steps number": "steps",
    "words number": "words",
}
"""Name of a section of the report -> key of the questions' meta."""
UNCOUNTED = ("exist", "query: name", "choose name")
"""Operations that are no step of reasoning."""
COMMON = ("color", "material", "shape")
"""What is valid and plausible where a question asks what two things have in common."""


class Final(str):
    """A prediction that is compared as it stands."""


def open_folder(folder: Path, problems: Problems) -> Benchmark:
    """GQA over a folder with the questions, and the pictures in ``images`` or ``data/images``."""
    choices_file = find_file(folder, *CHOICES.patterns)

    def load() -> Iterator[Question]:
        path = need(folder, QUESTIONS, "gqa")
        place = next(
            (at for at in (folder / "images", folder / "data/images") if at.is_dir()), folder / "images"
        )
        pictures = _pictures(folder, problems) if path.suffix == ".parquet" else {}
        for where, name, row in rows_by_id(path, "id", problems):
            if row.get("isBalanced") is False:
                continue
            try:
                meta = _meta(row)
            except (KeyError, TypeError, AttributeError):
                problems.add("questions without answer or type", where)
                continue
            if choices_file is not None:
                meta |= {"id": name, "detailed": text_of(row["types"].get("detailed"))}
            picture = text_of(row.get("imageId"))
            source = pictures.get(picture, place / f"{picture}.jpg")
            parts = (Image(source), Text(row["question"] + SHORT))
            yield Question(Sample((Message("user", parts),), name), meta["answer"], meta)

    def answers(path: Path) -> Iterator[Given]:
        for where, row in answer_rows(path, problems):
            name = first_of(row, ("question_id", "questionId", "id"))
            if name is None:
                problems.add("answers without an id", where)
                continue
            final = "questionId" in row and "prediction" in row
            text = reply_in(row, where, problems, ("prediction",) if final else TEXTS)
            if text is not None:
                yield Given(name, Final(text) if final else text, where)

    def report_of(scores: Sequence[Score]) -> Metrics:
        return report(scores, read_json(choices_file) if choices_file is not None else {})

    return Benchmark(
        name="gqa",
        load=load,
        score=score,
        source=SOURCE,
        report=report_of,
        headline="Accuracy",
        sums=percent_sums,
        answers=answers,
        max_new_tokens=16,
    )


def _pictures(folder: Path, problems: Problems) -> dict[str, bytes]:
    """Picture id -> its bytes, of the dataset folder's parquet; 398 pictures, 66 MB."""
    path = find_file(folder, "testdev_balanced_images/*.parquet")
    parts = parts_of(path, problems) if path else []
    rows = (row for part in parts for _, row in read_rows(part, problems))
    return {text_of(row["id"]): row["image"]["bytes"] for row in rows}


def _meta(row: Mapping[str, Any]) -> dict[str, str]:
    """What the report needs of a question: answer, types, lengths, and the group of its answers."""
    steps = row["semantic"]
    if isinstance(steps, Mapping):  # parquet may hold a list of objects as an object of lists
        named = list(zip(steps["operation"], steps["argument"], strict=True))
    else:
        named = [(step["operation"], step["argument"]) for step in steps]
    said = [f"{operation}: {argument}" for operation, argument in named]
    # A group may be called "" and is one then; only null is none.
    group = (row.get("groups") or {}).get("global")
    return ({} if group is None else {"group": str(group)}) | {
        "answer": str(row["answer"]),
        "structural": str(row["types"]["structural"]),
        "semantic": str(row["types"]["semantic"]),
        "steps": str(sum(not any(name in step for name in UNCOUNTED) for step in said)),
        "words": str(len(row["question"].split())),
    }


def score(question: Question, reply: str) -> Score:
    said = str(reply) if isinstance(reply, Final) else reply.rstrip(".").lower()
    return Score(float(said == question.answer), parsed=said)


def report(scores: Sequence[Score], choices: Mapping[str, Any]) -> Metrics:
    """Percentages with two decimals as they are printed, and ``[percent, questions]`` in the sections."""
    if not scores:
        return {}
    binary = [one.value for one in scores if one.meta["structural"] != "query"]
    open_ = [one.value for one in scores if one.meta["structural"] == "query"]
    found: Metrics = {"Binary": _percent(binary)} if binary else {}
    found |= {"Open": _percent(open_)} if open_ else {}
    found["Accuracy"] = _percent([one.value for one in scores])
    for title, key in (("Validity", "valid"), ("Plausibility", "plausible")):
        found[title] = _percent([_belongs(one, choices, key) for one in scores])
    if any("group" in one.meta for one in scores):
        found["Distribution"] = float(f"{_distribution(scores):.2f}")
    found["sections"] = {title: _section(scores, key) for title, key in SECTIONS.items()}
    return found


def _belongs(one: Score, choices: Mapping[str, Any], key: str) -> float:
    if not choices:
        return 0.0
    group = COMMON if "Common" in one.meta["detailed"] else choices.get(one.meta["id"], {}).get(key, ())
    return float(one.parsed in group)


def _distribution(scores: Sequence[Score]) -> float:
    """Chi-square of the answers given against the right ones, per group, weighted by its questions; / 100."""
    right: dict[str, Counter[str]] = {}
    given: dict[str, Counter[str]] = {}
    for one in scores:
        if (group := one.meta.get("group")) is not None:
            right.setdefault(group, Counter())[one.meta["answer"]] += 1
            given.setdefault(group, Counter())[one.parsed] += 1
    total = 0.0
    for group, expected in right.items():
        distance = sum((given[group][answer] - n) ** 2 / n for answer, n in expected.items())
        total += distance * expected.total()
    return total / sum(expected.total() for expected in right.values()) / 100


def _section(scores: Sequence[Score], key: str) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for one in scores:
        values.setdefault(one.meta[key], []).append(one.value)
    in_order = sorted(values, key=lambda name: (int(name) if name.isdigit() else 0, name))
    return {name: [_percent(values[name]), len(values[name])] for name in in_order}


def _percent(values: Sequence[float]) -> float:
    return float(f"{sum(values) / len(values) * 100:.2f}")


TASK = OnDisk(
    name="gqa",
    title="short answers about scenes",
    source=SOURCE,
    files=(QUESTIONS, CHOICES, PICTURES),
    open=open_folder,
    folders=("GQA",),
)
