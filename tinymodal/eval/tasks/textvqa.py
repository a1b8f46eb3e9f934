"""TextVQA: questions that need the words in a picture, with the answers of ten people each.

5,000 questions of val (Singh et al., CVPR 2019, arXiv:1904.08920). ``textvqa`` asks them alone,
``textvqa_ocr`` together with the words that an OCR found, as LLaVA-1.5 does: a different task, some points
easier, so a score has to say which. Answers are joined by picture and question, never by position.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tinymodal.eval.benchmark import Benchmark, File, Given, Metrics, OnDisk, Problems, Question, Score
from tinymodal.eval.files import need, read_jsonl, rows_of
from tinymodal.eval.given import IDS, first_of
from tinymodal.eval.intervals import percent_sums
from tinymodal.eval.rules.vqa import (
    M4C_SOURCE,
    MAX_NEW_TOKENS,
    SHORT,
    UNSCORED,
    Pictures,
    ask,
    m4c_accuracy,
    m4c_words,
    people,
    percent,
    read_answers,
    tidy,
    told_answers,
    total,
    vqa_accuracy,
)

ORIGIN = "https://textvqa.org/dataset/"
QUESTIONS = File(
    ("TextVQA_0.5.1_val.json", "validation-*.parquet"),
    "questions and answers of val; or parquet of https://huggingface.co/datasets/lmms-lab/textvqa",
    ORIGIN,
)
ASKED = File(
    ("llava_textvqa_val_v051_ocr.jsonl",),
    "questions with OCR tokens as LLaVA asks them",
    "eval.zip of https://github.com/haotian-liu/LLaVA/blob/v1.2.2/docs/Evaluation.md",
)
PICTURES = File(("train_images/*.jpg",), "pictures of train and val", ORIGIN, optional=True)

Key = tuple[str, str]
"""Picture and question, which is in lower case."""


def open_folder(ocr: bool, folder: Path, problems: Problems) -> Benchmark:
    """TextVQA over a folder with the annotations of val, and pictures below ``train_images``.

    Parquet has the columns ``question_id``, ``image_id``, ``question``, ``answers`` and ``image``.
    """
    name = "textvqa_ocr" if ocr else "textvqa"
    asked: dict[Key, str] = {}
    """The id of each question that was loaded."""

    def load() -> Iterator[Question]:
        tokens = _asked(need(folder, ASKED, name), problems) if ocr else {}
        pictures = Pictures(folder, "train_images/*.jpg", "train_images")
        for where, row in _rows(folder, name, problems):
            key, answers = _key(row), told_answers(row.get("answers"))
            if key is None or row.get("question_id") is None:
                problems.add("questions without id, picture or words", where)
            elif not answers:
                problems.add(UNSCORED, where)
            elif ocr and key not in tokens:
                problems.add("questions without OCR tokens", where)
            else:
                # LLaVA's file has them so too.
                prompt = tokens[key] if ocr else row["question"].capitalize() + SHORT
                picture = pictures(row.get("image") or f"{key[0]}.jpg")
                asked[key] = str(row["question_id"])
                yield ask(row["question_id"], picture, prompt, answers)

    def answers(path: Path) -> Iterator[Given]:
        names = asked or {
            key: str(row.get("question_id"))
            for _, row in _rows(folder, name, Problems())
            if (key := _key(row)) is not None
        }
        known = set(names.values())

        def find(row: Mapping[str, Any]) -> str | None:
            told, prompt = first_of(row, IDS), row.get("prompt")
            if told is None or told in known:
                return told
            words = question_of(prompt) if isinstance(prompt, str) else None
            # LLaVA's question_id is the picture.
            return None if words is None else names.get((told, words), f"{told} {words}")

        return read_answers(path, problems, find)

    return Benchmark(
        name=name,
        load=load,
        score=score,
        source=M4C_SOURCE,
        report=report,
        headline="accuracy_pct_official",
        sums=percent_sums,
        answers=answers,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def _rows(folder: Path, name: str, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    return rows_of(need(folder, QUESTIONS, name), "data", problems)


def _key(row: Mapping[str, Any]) -> Key | None:
    image, words = row.get("image_id"), row.get("question")
    return (str(image), words.lower()) if image is not None and isinstance(words, str) else None


def _asked(path: Path, problems: Problems) -> dict[Key, str]:
    """LLaVA's prompts."""
    found: dict[Key, str] = {}
    for where, row in read_jsonl(path, problems):
        prompt = row.get("text")
        words = question_of(prompt) if isinstance(prompt, str) else None
        if words is None:
            problems.add("prompts that hold no question", where)
        else:
            found[str(row.get("question_id")), words] = str(prompt)
    return found


def question_of(prompt: str) -> str | None:
    """The question in one of LLaVA's three forms of prompt, in lower case; None where it has none of them.

    Source: https://github.com/haotian-liu/LLaVA/blob/v1.2.2/llava/eval/eval_textvqa.py
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found[1].lower() if found else None
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


def score(question: Question, reply: str) -> Score:
    """Parsed is only tidied, for numbers by other rules are computed of it."""
    return Score(m4c_accuracy(reply, people(question.meta)), parsed=tidy(reply))


def report(scores: Sequence[Score]) -> Metrics:
    """The accuracy in % as it is printed, in full, and what VQA's scorer makes of the replies.

    That one is told for the reply as it is, and for what m4c's normaliser makes of it.
    """
    if not scores:
        return {}
    values = [score.value for score in scores]
    raw, plain = [], []
    for score in scores:
        answers = people(score.meta)
        raw.append(vqa_accuracy(score.parsed, answers))
        plain.append(vqa_accuracy(m4c_words(score.parsed), answers))
    return {
        "accuracy_pct_official": percent(values),
        "accuracy": total(values) / len(values),
        "n": len(values),
        "VQAEval_overall_raw": percent(raw),
        "VQAEval_overall_evalai_normalised": percent(plain),
    }


TASK = OnDisk(
    name="textvqa",
    title="words in pictures, against the answers of ten people",
    source=M4C_SOURCE,
    files=(QUESTIONS, PICTURES),
    open=partial(open_folder, False),
    folders=("TextVQA",),
)
TASK_OCR = OnDisk(
    name="textvqa_ocr",
    title="the same with the words that an OCR found, as LLaVA-1.5 is scored",
    source=M4C_SOURCE,
    files=(QUESTIONS, ASKED, PICTURES),
    open=partial(open_folder, True),
    folders=("textvqa", "TextVQA"),
)
