"""LLaVA-Bench in the wild: long answers, graded side by side with GPT-4's by a language model.

60 questions on 24 pictures: conversation, description, reasoning (Liu et al., 2023, arXiv:2304.08485). The
judge reads a description of the picture, the question, GPT-4's answer (which had the description too) and the
model's, and grades both from 1 to 10. Per category and in all there are three numbers: the model's mean in %
of GPT-4's, GPT-4's mean and the model's, both times ten. The prompt is the question alone, as LLaVA-1.5 asks
it. Published scores of LLaVA-1.5 are means of three reviews by gpt-4-0314.

Officially a review whose first line is not two numbers with one space or comma between them scores -1 for
both, and these count in the means. In files of reviews they count so here too, and are named. Our judge is
asked again instead, and where that does not help the question is left out and named.

The judge's prompt has the official structure, also in that the description has a line for each character:
the official code joins its letters as if they were lines. The instruction comes from ``rule.json`` in the
folder; without it, and for the system's words, it is our own.

Also read is the Hub's lmms-lab/llava-bench-in-the-wild (parquet: ``question_id``, ``question``, ``image``,
``caption``, ``gpt_answer``, ``category``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.eval.benchmark import (
    BETWEEN,
    OUR_WORDING,
    Benchmark,
    File,
    Given,
    Judging,
    Metrics,
    OnDisk,
    Problems,
    Question,
    Score,
    Sums,
)
from tinymodal.eval.files import find_file, need, read_json, read_rows, text_of
from tinymodal.eval.given import answer_rows, first_of, reply_in

SOURCE = "https://github.com/haotian-liu/LLaVA/blob/v1.2.2/llava/eval/summarize_gpt_review.py"
JUDGING = "https://github.com/haotian-liu/LLaVA/blob/v1.2.2/llava/eval/eval_gpt_review_bench.py"
ORIGIN = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
ASKED = File(("questions.jsonl", "train-*.parquet"), "questions with their categories", ORIGIN)
CONTEXT = File(("context.jsonl",), "descriptions of the pictures, for the judge", ORIGIN, optional=True)
REFERENCE = File(("answers_gpt4.jsonl",), "GPT-4's answers, for the judge", ORIGIN, optional=True)
RULE = File(
    ("rule.json",),
    "the official instructions for the judge",
    "https://github.com/haotian-liu/LLaVA/blob/v1.2.2/llava/eval/table/rule.json",
    optional=True,
)
PICTURES = File(("images/*.jpg",), "pictures", ORIGIN, optional=True)
PREFIX = "llava_bench_"
MAX_NEW_TOKENS = 1024
"""LLaVA's, https://github.com/haotian-liu/LLaVA/blob/v1.2.2/llava/eval/model_vqa.py"""
SYSTEM = "You check the quality of answers, precisely and to the benefit of whoever asked."
INSTRUCTION = """\
Two AI assistants have answered the question above, which a user asked about a picture. You cannot see the \
picture; the context above describes it in a few sentences.
Judge how helpful, relevant, accurate and detailed each answer is, and give each assistant one grade for all \
of that from 1 to 10, where more is better.
On the first line write two numbers and nothing else: the grade of Assistant 1 and that of Assistant 2, with \
one space between them. From the second line on explain your grades in full; favour neither side, and let \
the order of the answers have no influence."""


def open_folder(folder: Path, problems: Problems) -> Benchmark:
    """LLaVA-Bench over a folder with ``questions.jsonl``, its pictures in ``images`` beside it."""
    descriptions: dict[str, str] = {}

    def load() -> Iterator[Question]:
        asked = need(folder, ASKED, "llava_bench")
        references = _column(folder, REFERENCE, "question_id", "text", problems)
        by_image = _column(folder, CONTEXT, "image", "caption", problems)
        for where, row in read_rows(asked, problems):
            name, words = first_of(row, ("question_id",)), first_of(row, ("text", "question"))
            kind, image = text_of(row.get("category")), row.get("image")
            pixels = image.get("bytes") if isinstance(image, Mapping) else None
            if not (name and words and kind and image):
                problems.add("questions without id, words, category or picture", where)
                continue
            picture = Image(pixels or asked.parent / "images" / text_of(image))
            caption = row.get("caption") or by_image.get(text_of(image))
            # The letters of a text become lines, as officially.
            descriptions[name] = "\n".join(map(text_of, caption)) if isinstance(caption, str | list) else ""
            answer = text_of(row.get("gpt_answer") or references.get(name))
            meta = {"category": PREFIX + kind.removeprefix(PREFIX)}
            yield Question(Sample((Message("user", (picture, Text(words))),), name), answer, meta)

    @functools.cache
    def rules() -> Mapping[str, Any]:
        found = find_file(folder, *RULE.patterns)
        told = {} if found is None else read_json(found)
        if not isinstance(told, dict):
            raise DataError(f"{found}: expected an object of category -> rule, found {type(told).__name__}.")
        return told

    def prompt(question: Question, reply: str) -> Sequence[Mapping[str, str]]:
        name, kind = question.sample.id, question.meta["category"]
        description = descriptions.get(name)
        if not description or not question.answer:
            missing = REFERENCE if description else CONTEXT
            raise ValueError(f"nothing in {missing.patterns[0]} about it; expected {missing.what}")
        rule = rules().get(kind, {}) if rules() else {"role": "Assistant", "prompt": INSTRUCTION}
        if not isinstance(rule, Mapping) or not rule.keys() >= {"role", "prompt"}:
            raise ValueError(f"{RULE.patterns[0]} holds no role and prompt for {kind}")
        sections = [f"[Context]\n{description}", f"[Question]\n{question.words}"]
        for number, answer in enumerate((question.answer, reply), 1):
            who = f"{rule['role']} {number}"
            sections += [f"[{who}]\n{answer}", f"[End of {who}]"]
        sections += [f"[System]\n{rule['prompt']}", ""]
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n\n".join(sections)}]

    wording = "that of rule.json" if find_file(folder, *RULE.patterns) else OUR_WORDING
    return Benchmark(
        name="llava_bench",
        load=load,
        score=score,
        source=f"{SOURCE}, {JUDGING}",
        report=report,
        headline="all.0",
        sums=sums,
        answers=lambda path: answers(path, problems),
        max_new_tokens=MAX_NEW_TOKENS,
        metric="% of GPT-4's grade",
        judge=Judging(prompt=prompt, read=read, temperature=0.2, model="gpt-4-0314", wording=wording),
    )


def _column(folder: Path, file: File, key: str, value: str, problems: Problems) -> dict[str, Any]:
    """``key`` -> ``value`` of a file's rows; nothing where it is not there."""
    found = find_file(folder, *file.patterns)
    if found is None:
        return {}
    return {text_of(row.get(key)): row.get(value) for _, row in read_rows(found, problems)}


def answers(path: Path, problems: Problems) -> Iterator[Given]:
    """LLaVA's jsonl, our replies, and official files of reviews, of which all to one question count."""
    reviews: dict[str, tuple[str, list[str]]] = {}
    for where, row in answer_rows(path, problems):
        reviewed = "tuple" in row or "content" in row
        # A review's "id" is its place in the file.
        name = first_of(row, ("question_id",) if reviewed else ("question_id", "id"))
        if name is None:
            problems.add("answers without an id", where)
        elif not reviewed:
            if (text := reply_in(row, where, problems)) is not None:
                yield Given(name, text, where)
        else:
            if name in reviews:
                problems.add("questions reviewed more than once", f"{where}: {name!r}, as {reviews[name][0]}")
            # "tuple" is what the official code made of "content", and what it counts.
            grades = _numbers(row.get("tuple")) or _pair(text_of(row.get("content"))) or (-1.0, -1.0)
            if grades == (-1.0, -1.0):
                problems.add("reviews without two numbers, which count as -1", where)
            reviews.setdefault(name, (where, []))[1].append(f"{grades[0]!r} {grades[1]!r}")
    for name, (where, verdicts) in reviews.items():
        yield Given(name, "", where, tuple(verdicts))


def _numbers(value: object) -> tuple[float, float] | None:
    """Two finite numbers in a list; None where it holds anything else."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    if not all(isinstance(one, int | float) and math.isfinite(one) for one in value):
        return None
    return float(value[0]), float(value[1])


def _pair(review: str) -> tuple[float, float] | None:
    """The two numbers of a review's first line; None where the official code finds none."""
    words = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        return _numbers([float(word) for word in words])
    except ValueError:
        return None


def read(question: Question, reply: str, verdict: str) -> Score:
    """Worth a tenth of the model's grade; both grades are what is understood."""
    grades = _pair(verdict)
    if grades is None:
        raise ValueError(f"expected two grades on the first line, found {verdict[:40]!r}")
    return Score(min(max(grades[1] / 10, 0.0), 1.0), parsed=f"{grades[0]!r} {grades[1]!r}")


def score(question: Question, reply: str) -> Score:
    """Without a judge nothing can be said: ``parsed`` is empty, and the report leaves it out."""
    return Score(0.0)


def _grades(score: Score) -> list[list[float]]:
    """GPT-4's grade and the model's, of each review; none where nobody has reviewed."""
    return [[float(one) for one in pair.split(" ")] for pair in score.parsed.split(BETWEEN) if pair]


def report(scores: Sequence[Score]) -> Metrics:
    """Category -> the model's mean in % of GPT-4's, GPT-4's mean x 10, the model's x 10."""
    groups: dict[str, list[list[float]]] = {}
    for score in scores:
        for grades in _grades(score):
            groups.setdefault("all", []).append(grades)
            groups.setdefault(score.meta["category"], []).append(grades)
    found: Metrics = {}
    for name, pairs in sorted(groups.items()):
        # Rounded before it is divided, as officially.
        theirs, own = (round(mean, 3) for mean in np.asarray(pairs).mean(axis=0).tolist())
        if theirs:
            found[name] = [round(own / theirs * 100, 1), round(theirs * 10, 1), round(own * 10, 1)]
    return found


def sums(scores: Sequence[Score]) -> Sums:
    """Of the ratio over all questions."""
    rows = np.array([np.sum(_grades(score), axis=0) for score in scores if score.parsed]).reshape(-1, 2)
    return Sums(rows, lambda all_: all_[..., 1] / all_[..., 0] * 100)


TASK = OnDisk(
    name="llava_bench",
    title="long answers, beside those of GPT-4; wants a judge",
    source=SOURCE,
    files=(ASKED, CONTEXT, REFERENCE, RULE, PICTURES),
    open=open_folder,
    folders=("llava-bench-in-the-wild", "llava_bench_in_the_wild"),
)
