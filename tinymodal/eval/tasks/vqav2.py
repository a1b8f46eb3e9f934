"""VQA v2: questions about pictures of COCO, with the answers of ten people each.

214,354 questions about val2014 (Goyal et al., CVPR 2017, arXiv:1612.00837); an answer is right by a third for
each person who gave it. Answers to test2015 are not public: there is no score for those, but a file for the
test server, see :func:`submission`. LLaVA-1.5 reports test-dev, by its own question file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tinymodal.eval.benchmark import Benchmark, File, Metrics, OnDisk, Problems, Question, Score
from tinymodal.eval.files import find_file, need, rows_of
from tinymodal.eval.rules.vqa import (
    MAX_NEW_TOKENS,
    SHORT,
    UNSCORED,
    VQA_SOURCE,
    Pictures,
    ask,
    m4c_accuracy,
    people,
    percent,
    percent_by,
    score_vqa,
    scored,
    scored_sums,
    server_rows,
    told_answers,
    total,
    vqa_rows,
)

ORIGIN = "https://visualqa.org/download.html"
ANSWERS = File(
    ("v2_mscoco_val2014_annotations.json", "annotations.json"), "answers to val2014", ORIGIN, optional=True
)
QUESTIONS = File(
    (
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_OpenEnded_mscoco_test-dev2015_questions.json",
        "v2_OpenEnded_mscoco_test2015_questions.json",
        "questions.json",
    ),
    "questions",
    ORIGIN,
)
ASKED = File(
    ("llava_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_test2015.jsonl"),
    "questions of the test splits as LLaVA asks them, where there are no answers",
    "eval.zip of https://github.com/haotian-liu/LLaVA/blob/v1.2.2/docs/Evaluation.md",
    optional=True,
)
SERVER = File(
    ("llava_vqav2_mscoco_test2015.jsonl", "v2_OpenEnded_mscoco_test2015_questions.json"),
    "all questions of test2015, which the test server wants answered",
    ORIGIN,
    optional=True,
)
PICTURES = File(("COCO_*2014_*.jpg", "COCO_*2015_*.jpg"), "pictures of COCO", ORIGIN, optional=True)


def open_folder(folder: Path, problems: Problems) -> Benchmark:
    """VQA v2 over a folder with questions and annotations, or with the questions of a test split.

    Pictures are in it or below ``val2014`` and ``test2015``.
    """
    key = find_file(folder, *ANSWERS.patterns)

    def load() -> Iterator[Question]:
        if key is not None:
            yield from _val(folder, key, problems)
            return
        asked = find_file(folder, *ASKED.patterns) or need(folder, QUESTIONS, "vqav2")
        for question in _test(folder, asked, problems):
            problems.add(UNSCORED, question.sample.id)
            yield question

    def submit(texts: Mapping[str, str], path: Path, noted: Problems) -> None:
        path.write_text(submission(to_submit(folder, noted), texts, noted), encoding="utf-8")

    return Benchmark(
        submit=submit,
        name="vqav2",
        load=load,
        score=score_vqa,
        source=VQA_SOURCE,
        report=report,
        headline="overall",
        sums=scored_sums,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def _pictures(folder: Path, file: Path) -> tuple[Pictures, str]:
    """Where the pictures of a file's split are, and how their names begin."""
    told = re.search(r"(train|val|test)(-dev)?(20\d\d)", file.name)
    split = told[1] + told[3] if told else "val2014"
    return Pictures(folder, f"COCO_{split}_*.jpg", split), f"COCO_{split}_"


def _val(folder: Path, key: Path, problems: Problems) -> Iterator[Question]:
    questions = need(folder, QUESTIONS, "vqav2")
    pictures, begin = _pictures(folder, key)
    for where, row in vqa_rows(questions, key, problems):
        answers, words = told_answers(row.get("answers")), row.get("question")
        if not answers or not isinstance(words, str) or row.get("question_id") is None:
            problems.add("questions without id, words or answers", where)
            continue
        types = {name: str(row[name]) for name in ("question_type", "answer_type") if row.get(name)}
        picture = pictures(f"{begin}{str(row.get('image_id')).zfill(12)}.jpg")
        yield ask(row["question_id"], picture, words + SHORT, answers, **types)


def _test(folder: Path, asked: Path, problems: Problems) -> Iterator[Question]:
    pictures, begin = _pictures(folder, asked)
    for where, row in rows_of(asked, "questions", problems):
        name, ready, words = row.get("question_id"), row.get("text"), row.get("question")
        if name is None or not isinstance(ready or words, str):
            problems.add("questions without id or words", where)
            continue
        picture = row.get("image") or f"{begin}{str(row.get('image_id')).zfill(12)}.jpg"
        yield ask(name, pictures(picture), ready or f"{words}{SHORT}", ())


def report(scores: Sequence[Score]) -> Metrics:
    """Accuracy in %, per type of question and of answer; ``m4c_soft`` is TextVQA's accuracy, 0 to 1.

    Empty where no answers are public.
    """
    known = scored(scores)
    if not known:
        return {}
    soft = [m4c_accuracy(score.parsed, people(score.meta)) for score in known]
    return {
        "overall": percent([score.value for score in known]),
        "perQuestionType": percent_by("question_type", known),
        "perAnswerType": percent_by("answer_type", known),
        "m4c_soft": total(soft) / len(soft),
    }


def to_submit(folder: Path, problems: Problems) -> Iterator[Question]:
    """All questions that the test server wants: of test2015, whose part test-dev is; else those at hand."""
    asked = find_file(folder, *SERVER.patterns, *ASKED.patterns) or need(folder, QUESTIONS, "vqav2")
    return _test(folder, asked, problems)


def submission(questions: Iterable[Question], texts: Mapping[str, str], problems: Problems) -> str:
    """The json for the test server, https://eval.ai/web/challenges/challenge-page/830.

    Args:
        questions: of :func:`to_submit`.
        texts: replies by question id; those without one are sent empty, and noted.
        problems: where they are noted.
    """
    names = (question.sample.id for question in questions)
    return server_rows("question_id", ((n, int(n) if n.isdecimal() else n) for n in names), texts, problems)


TASK = OnDisk(
    name="vqav2",
    title="short answers about COCO's pictures, against those of ten people",
    source=VQA_SOURCE,
    files=(QUESTIONS, ANSWERS, ASKED, SERVER, PICTURES),
    open=open_folder,
    folders=("VQAv2", "vqa"),
)
