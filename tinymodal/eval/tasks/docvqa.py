"""DocVQA: questions about scanned pages.

5,349 questions of val about 1,286 pages (Mathew et al., WACV 2021, arXiv:2007.00398). A reply is scored by
its likeness to the nearest of the answers (ANLS, 0 below a half), so that a misread letter costs little.
LLaVA-1.5 reports none; the prompt is its prompt for short answers, as lmms-eval asks,
https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/0ad7b14f25e3e63b3d989e6c9021473a6c102ef0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinymodal.eval.benchmark import Benchmark, File, Metrics, OnDisk, Problems, Question, Score
from tinymodal.eval.files import need, rows_of
from tinymodal.eval.intervals import mean_sums
from tinymodal.eval.rules.vqa import (
    ANLS_SOURCE,
    MAX_NEW_TOKENS,
    SHORT,
    UNSCORED,
    Pictures,
    anls,
    ask,
    people,
    told_answers,
    total,
)

ORIGIN = "https://rrc.cvc.uab.es/?ch=17&com=downloads"
QUESTIONS = File(
    ("val_v1.0_withQT.json", "val_v1.0.json", "validation-*.parquet"),
    "questions and answers of val; or parquet of https://huggingface.co/datasets/lmms-lab/DocVQA",
    ORIGIN,
)
PICTURES = File(("documents/*.png", "spdocvqa_images/*.png"), "the pages", ORIGIN, optional=True)


def open_folder(folder: Path, problems: Problems) -> Benchmark:
    """DocVQA over a folder with the annotations of val, and pages below ``documents`` or ``spdocvqa_images``.

    Parquet has the columns ``questionId``, ``question``, ``question_types``, ``answers`` and ``image``.
    """

    def load() -> Iterator[Question]:
        source = need(folder, QUESTIONS, "docvqa")
        pages = Pictures(folder, "spdocvqa_images/*.png", "spdocvqa_images")
        if not pages.folder.is_dir():
            pages = Pictures(folder, "documents/*.png", "documents")
        for where, row in rows_of(source, "data", problems):
            name, words, image = row.get("questionId"), row.get("question"), row.get("image")
            answers, types = told_answers(row.get("answers")), row.get("question_types")
            if name is None or not isinstance(words, str) or image is None:
                problems.add("questions without id, page or words", where)
            elif not answers:
                problems.add(UNSCORED, where)
            else:
                page = pages(Path(image).name if isinstance(image, str) else image)
                kinds = json.dumps([str(kind) for kind in types] if isinstance(types, list) else [])
                yield ask(name, page, words + SHORT, answers, question_types=kinds)

    return Benchmark(
        name="docvqa",
        load=load,
        score=score,
        source=ANLS_SOURCE,
        report=report,
        headline="anls",
        sums=mean_sums,
        max_new_tokens=MAX_NEW_TOKENS,
        metric="ANLS",
    )


def score(question: Question, reply: str) -> Score:
    return Score(anls(reply, people(question.meta)), parsed=" ".join(reply.lower().split()))


def report(scores: Sequence[Score]) -> Metrics:
    """ANLS, 0 to 1, and of each type of question; a question may be of several."""
    if not scores:
        return {}
    types: dict[str, list[float]] = {}
    for score in scores:
        for kind in json.loads(score.meta["question_types"]):
            types.setdefault(kind, []).append(score.value)
    return {
        "anls": total(score.value for score in scores) / len(scores),
        "question_types": {kind: total(values) / len(values) for kind, values in types.items()},
    }


TASK = OnDisk(
    name="docvqa",
    title="scanned pages, by likeness to the answers",
    source=ANLS_SOURCE,
    files=(QUESTIONS, PICTURES),
    open=open_folder,
    folders=("DocVQA",),
)
