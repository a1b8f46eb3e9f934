"""ScienceQA: questions of school science with two to five choices, half of them with a picture.

4,241 problems of the test split, 2,017 with a picture (Lu et al., NeurIPS 2022, arXiv:2209.09513). Asked and
scored as LLaVA-1.5 does: the problem with its context and options from ``llava_test_CQM-A.json``, one letter
asked for. Without that file the same words are made from ``problems.json``. A reply with no letter or with
one that is no option is wrong, and so is a problem without a reply. That does not count among those with a
picture, as in LLaVA's scorer, which tells them by the prompt in the answer file. Papers that name one number
(SQA-I) mean ``img_acc_pct``.

A folder of the Hub's derek-thomas/ScienceQA or lmms-lab/ScienceQA is read too (``test-*.parquet`` with image,
question, choices, answer, hint, subject, grade); its rows have no ids, so they are called ``test-ROW``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymodal.core.types import Image, Message, Part, Sample, Text
from tinymodal.eval.benchmark import Benchmark, File, Metrics, OnDisk, Problems, Question, Score
from tinymodal.eval.files import files_of, find_file, need, read_json, read_rows, text_of
from tinymodal.eval.given import UNANSWERED, plain_answers
from tinymodal.eval.intervals import percent_sums
from tinymodal.eval.rules.answers import LETTERS, option_letter
from tinymodal.eval.rules.choices import DIRECTLY

SOURCE = "https://github.com/haotian-liu/LLaVA/blob/v1.2.2/llava/eval/eval_science_qa.py"
ORIGIN = "https://github.com/lupantech/ScienceQA/tree/main/data/scienceqa"
PROBLEMS = File(("problems.json", "problems*.json"), "the problems with their answers", ORIGIN)
SPLITS = File(("pid_splits.json", "pid_splits*.json"), "which problems are the test", ORIGIN, optional=True)
ASKED = File(
    ("llava_test_CQM-A.json",),
    "the problems as LLaVA asks them",
    "https://github.com/haotian-liu/LLaVA/blob/v1.2.2/docs/Evaluation.md",
    optional=True,
)
PICTURES = File(("images/test/*/image.png",), "pictures of the test", ORIGIN, optional=True)
FROM_HUB = "test-*.parquet"
SPLIT = "test"
FAILED = "FAILED"
CATEGORIES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "acc_natural": ("subject", ("natural science",)),
    "acc_social": ("subject", ("social science",)),
    "acc_language": ("subject", ("language science",)),
    "acc_has_text": ("text", ("yes",)),
    "acc_has_image": ("picture", ("yes",)),
    "acc_no_context": ("context", ("no",)),
    "acc_grade_1_6": ("grade", tuple(f"grade{n}" for n in range(1, 7))),
    "acc_grade_7_12": ("grade", tuple(f"grade{n}" for n in range(7, 13))),
}
"""Name of the authors' own scorer -> what they are about; tools/evaluate_acc.py of lupantech/ScienceQA."""


def open_folder(folder: Path, problems: Problems) -> Benchmark:
    """ScienceQA over a folder with the problems, and pictures as ``images/test/ID/image.png``."""

    def load() -> Iterator[Question]:
        rows = _from_hub if find_file(folder, *PROBLEMS.patterns) is None else _from_authors
        for name, row, asked, picture in rows(folder, problems):
            choices, answer = row.get("choices") or (), row.get("answer")
            if not isinstance(answer, int) or not 0 <= answer < len(choices) <= len(LETTERS):
                problems.add("questions without choices or answer", f"{name}: {choices!r}, {answer!r}")
                continue
            words = (asked or _words(row)).replace("<image>", "").strip() + DIRECTLY
            parts: tuple[Part, ...] = (Text(words),) if picture is None else (Image(picture), Text(words))
            meta = {"picture": "no" if picture is None else "yes", "choices": str(len(choices))}
            meta |= {key: row[key] for key in ("subject", "grade") if row.get(key)}
            if "hint" in row:
                meta["text"] = "yes" if row["hint"] else "no"
                meta["context"] = "yes" if row["hint"] or picture is not None else "no"
            yield Question(Sample((Message("user", parts),), name), LETTERS[answer], meta)

    return Benchmark(
        name="scienceqa",
        load=load,
        score=score,
        source=SOURCE,
        report=report,
        headline="acc",
        sums=percent_sums,
        answers=lambda path: plain_answers(path, problems),
        unanswered="wrong",
        max_new_tokens=1024,
    )


def score(question: Question, reply: str) -> Score:
    said = option_letter(reply, int(question.meta["choices"]))
    return Score(float(said == question.answer), parsed=said or _no_option(reply))


def _from_authors(
    folder: Path, problems: Problems
) -> Iterator[tuple[str, Mapping[str, Any], str, Path | None]]:
    """Id, problem, LLaVA's words for it if known, and its picture, of each problem of the test."""
    known = read_json(need(folder, PROBLEMS, "scienceqa"))
    splits, llava = (find_file(folder, *file.patterns) for file in (SPLITS, ASKED))
    asked = {text_of(row.get("id")): row for _, row in read_rows(llava, problems)} if llava else {}
    names = [
        name for name, row in known.items() if not isinstance(row, dict) or row.get("split", SPLIT) == SPLIT
    ]
    for name in read_json(splits)[SPLIT] if splits else names:
        if name not in known:
            problems.add("questions of the split that are no problem", name)
            continue
        row, words = known[name], ""
        if not isinstance(row, dict):
            problems.add("questions without choices or answer", f"{name}: no object")
            continue
        has_picture = bool(row.get("image"))
        if turns := asked.get(name, {}).get("conversations"):
            words, has_picture = text_of(turns[0].get("value")), "image" in asked[name]
        elif llava:
            problems.add("questions that LLaVA's file does not ask", name)
        yield name, row, words, folder / "images" / SPLIT / name / "image.png" if has_picture else None


def _from_hub(folder: Path, problems: Problems) -> Iterator[tuple[str, Mapping[str, Any], str, bytes | None]]:
    files = files_of(folder, FROM_HUB, problems)
    if not files:
        need(folder, PROBLEMS, "scienceqa")
    rows = (row for file in files for _, row in read_rows(file, problems))
    for number, row in enumerate(rows):
        yield f"{SPLIT}-{number}", row, "", (row.get("image") or {}).get("bytes")


def _words(row: Mapping[str, Any]) -> str:
    """The problem as in LLaVA's file: context, question, and an option on each line."""
    context = f"Context: {row['hint']}\n" if row.get("hint") else ""
    options = (f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False))
    return f"{context}{text_of(row.get('question'))}{''.join(options)}"


def _no_option(reply: str) -> str:
    """What the scorer calls a reply that chooses no option: the letter that is none, or FAILED."""
    letter = option_letter(reply, len(LETTERS))
    letters = [letter] if letter else re.findall(r"The answer is ([A-Z]).", reply)
    return f"{letters[0]}: no option" if len(letters) == 1 else FAILED


def report(scores: Sequence[Score]) -> Metrics:
    """Of all and of those with a picture, in per cent; by subject, context, grade where these are known."""
    if not scores:
        return {}
    total, correct = len(scores), int(sum(score.value for score in scores))
    seen = [score for score in scores if score.meta["picture"] == "yes" and score.parsed != UNANSWERED]
    failed = sum(score.parsed in (FAILED, UNANSWERED) for score in scores)
    found: Metrics = {"total": total, "correct": correct, "acc": correct / total * 100}
    if seen:
        right = int(sum(score.value for score in seen))
        found |= {"img_acc_pct": round(right / len(seen) * 100, 2), "n_img": len(seen), "img_correct": right}
    found |= {"parse_failed": failed}
    found["pred_idx_minus1"] = failed + sum(score.parsed.endswith("no option") for score in scores)
    categories = {}
    for name, (key, values) in CATEGORIES.items():
        if of := [score.value for score in scores if score.meta.get(key) in values]:
            categories[name] = round(sum(of) / len(of) * 100, 2)
    # Of the shortened problems only acc_has_image is known, which is told above.
    return found | ({"categories": categories} if len(categories) > 1 else {})


TASK = OnDisk(
    name="scienceqa",
    title="science of school classes, half of it with a picture",
    source=SOURCE,
    files=(PROBLEMS, SPLITS, ASKED, PICTURES),
    open=open_folder,
    folders=("ScienceQA",),
)
