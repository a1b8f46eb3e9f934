"""VizWiz: what blind people asked about pictures that they took, with the answers of ten people each.

4,319 questions of val (Gurari et al., CVPR 2018, arXiv:1802.08218), many of which cannot be answered; the
prompt says what to reply then. Accuracy is that of VQA's scorer, with the ten people told apart by their
place: told apart by what they said, as in files without ``answer_id`` it does, those who agree would be one
person. VizWiz's own script does not normalise what people said (73.25 for 73.51 on the answers of one of
them). Answers to test are not public: there is no score but a file for its server, see :func:`submission`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymodal.eval.benchmark import Benchmark, File, Given, Metrics, OnDisk, Problems, Question, Score
from tinymodal.eval.files import find_file, need, rows_of
from tinymodal.eval.given import IDS, first_of
from tinymodal.eval.rules.vqa import (
    MAX_NEW_TOKENS,
    SHORT,
    UNSCORED,
    VQA_SOURCE,
    Pictures,
    ask,
    percent,
    percent_by,
    read_answers,
    score_vqa,
    scored,
    scored_sums,
    server_rows,
    told_answers,
    vqa_rows,
)

HINT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
"""LLaVA-1.5's, arXiv:2310.03744; its question file for test holds it."""
ORIGIN = "https://vizwiz.org/tasks-and-datasets/vqa/"
VAL = File(("val.json", "test.json"), "questions and answers of val, or questions of test", ORIGIN)
QUESTIONS = File(
    ("val_questions_vqa_format.json", "vizwiz_val_questions.json"),
    "questions in VQA's format, instead of val.json",
    "https://github.com/QwenLM/Qwen-VL/blob/master/eval_mm/EVALUATION.md",
    optional=True,
)
ANSWERS = File(
    ("val_annotations_vqa_format.json", "vizwiz_val_annotations.json"),
    "answers in VQA's format",
    QUESTIONS.origin,
    optional=True,
)
ASKED = File(
    ("llava_test.jsonl",),
    "questions of test as LLaVA asks them",
    "eval.zip of https://github.com/haotian-liu/LLaVA/blob/v1.2.2/docs/Evaluation.md",
    optional=True,
)
PICTURES = File(("VizWiz_val_*.jpg", "VizWiz_test_*.jpg"), "pictures", ORIGIN, optional=True)


def open_folder(folder: Path, problems: Problems) -> Benchmark:
    """VizWiz over a folder with ``val.json``, val in VQA's format, or the questions of test.

    Pictures are in it or below ``val`` and ``test``.
    """

    def load() -> Iterator[Question]:
        pictures: dict[str, Pictures] = {}
        for where, row in _rows(folder, problems):
            name, image, answers = row.get("question_id"), row.get("image"), told_answers(row.get("answers"))
            words = row.get("text") or row.get("question")
            if name is None or not isinstance(image, str) or not isinstance(words, str):
                problems.add("questions without id, picture or words", where)
                continue
            if "answers" in row and not answers:
                problems.add("questions whose answers cannot be read", where)
                continue
            if not answers:
                problems.add(UNSCORED, str(name))
            split = "test" if "_test_" in image else "val"
            if split not in pictures:
                pictures[split] = Pictures(folder, f"VizWiz_{split}_*.jpg", split)
            prompt = words if "text" in row else words + HINT + SHORT
            kind = row.get("answer_type") or row.get("question_type")
            meta = {"image": image} | ({"answer_type": str(kind)} if kind else {})
            yield ask(name, pictures[split](image), prompt, answers, **meta)

    def answers(path: Path) -> Iterator[Given]:
        # Results name a question by its number or its picture.
        names = {str(row.get("image")): str(row.get("question_id")) for _, row in _rows(folder, Problems())}

        def name(row: Mapping[str, Any]) -> str | None:
            told = first_of(row, IDS)
            return None if told is None else names.get(told, told)

        return read_answers(path, problems, name)

    def submit(texts: Mapping[str, str], path: Path, noted: Problems) -> None:
        path.write_text(submission(load(), texts, noted), encoding="utf-8")

    return Benchmark(
        submit=submit,
        name="vizwiz",
        load=load,
        score=score_vqa,
        source=VQA_SOURCE,
        report=report,
        headline="overall",
        sums=scored_sums,
        answers=answers,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def _rows(folder: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(where, row)`` with ``question_id`` and ``image``, of whichever layout is there."""
    key = find_file(folder, *ANSWERS.patterns)
    if key is not None:
        for where, row in vqa_rows(need(folder, QUESTIONS, "vizwiz"), key, problems):
            yield where, row | {"image": row.get("image_id")}
        return
    path = find_file(folder, "val.json", *ASKED.patterns) or need(folder, VAL, "vizwiz")
    for where, row in rows_of(path, "data", problems):
        yield where, {"question_id": row.get("image")} | row


def report(scores: Sequence[Score]) -> Metrics:
    """Accuracy in %, and per type of answer; empty where no answers are public."""
    known = scored(scores)
    if not known:
        return {}
    return {
        "overall": percent([score.value for score in known]),
        "perAnswerType": percent_by("answer_type", known),
    }


def submission(questions: Iterable[Question], texts: Mapping[str, str], problems: Problems) -> str:
    """The json for the test server, https://eval.ai/web/challenges/challenge-page/1911.

    Args:
        questions: all of test.
        texts: replies by question id; those without one are sent empty, and noted.
        problems: where they are noted.
    """
    names = ((question.sample.id, question.meta["image"]) for question in questions)
    return server_rows("image", names, texts, problems)


TASK = OnDisk(
    name="vizwiz",
    title="what blind people ask about their pictures, or that it cannot be answered",
    source=VQA_SOURCE,
    files=(VAL, QUESTIONS, ANSWERS, ASKED, PICTURES),
    open=open_folder,
    folders=("VizWiz",),
)
