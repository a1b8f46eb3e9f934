"""POPE: does a model claim objects that are not in the picture?

3,000 yes/no questions a split over 500 pictures of COCO val2014 (Li et al., EMNLP 2023, arXiv:2305.10355).
The first sentence of a reply decides, and one with none of No, no, not counts as yes. Answers are joined by
the id of their question and never by position where they have one: the files of 8,910 rows that LLaVA asked
and today's 9,000 differ. In the authors' own format, ``{"question", "answer"}``, they have none and stand for
the questions of a split in turn. An answer that names other words than its question's is noted and left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.eval.benchmark import Benchmark, File, Given, Metrics, OnDisk, Problems, Question, Score, Sums
from tinymodal.eval.files import find_file, need, read_jsonl, text_of
from tinymodal.eval.given import answer_rows, first_of, reply_in
from tinymodal.eval.rules.answers import yes_no
from tinymodal.eval.rules.vqa import SHORT

SOURCE = "https://github.com/AoiDragon/POPE/blob/f3ec604337f1d1c9723ef8d01b4accacf8badb3d/evaluate.py"
ORIGIN = "https://github.com/AoiDragon/POPE/tree/main/output/coco"
SPLITS = ("adversarial", "popular", "random")
LABELS = tuple(
    File((f"coco_pope_{split}.json",), f"questions and labels of the {split} split", ORIGIN)
    for split in SPLITS
)
ASKED = File(
    ("llava_pope_test.jsonl",),
    "the ids that LLaVA gave the questions, to score answers that go by them",
    "eval.zip of https://github.com/haotian-liu/LLaVA/blob/v1.2.2/docs/Evaluation.md",
    optional=True,
)
PICTURES = File(("COCO_val2014_*.jpg",), "pictures of COCO val2014", "https://cocodataset.org", optional=True)


def open_folder(folder: Path, problems: Problems) -> Benchmark:
    """POPE over a folder with the three files of labels, and the pictures in it or below ``val2014``."""
    llava = find_file(folder, *ASKED.patterns)

    def load() -> Iterator[Question]:
        pictures = find_file(folder, *PICTURES.patterns)
        place = pictures.parent if pictures else folder / "val2014"
        sources: dict[str, Path] = {}
        for split, file in zip(SPLITS, LABELS, strict=True):
            for where, row in read_jsonl(need(folder, file, "pope"), problems):
                name = row.get("question_id")
                picture, words = row.get("image"), row.get("text")
                if name is None or row.get("label") not in ("yes", "no"):
                    problems.add("questions without id or label", where)
                    continue
                if not isinstance(picture, str) or not isinstance(words, str):
                    problems.add("questions without picture or words", where)
                    continue
                source = sources.get(picture) or sources.setdefault(picture, place / picture)
                parts = (Image(source), Text(words + SHORT))
                meta = {"kind": split, "image": picture}
                yield Question(Sample((Message("user", parts),), f"{split}/{name}"), row["label"], meta)

    def answers(path: Path) -> Iterator[Given]:
        asked, by_words = _asked(folder)
        ids = _ids(llava, by_words, problems)
        of_file = next((split for split in SPLITS if split in path.name), None)
        in_turn = {split: iter([one for one in asked if one.startswith(f"{split}/")]) for split in SPLITS}
        for where, row in answer_rows(path, problems):
            words, name = first_of(row, ("prompt", "question")), first_of(row, ("question_id", "id"))
            split = next((row[key] for key in ("category", "split") if row.get(key) in SPLITS), of_file)
            if name is not None:
                ours = [at for at in (f"{split}/{name}", ids.get(name), name) if at in asked]
                fit = [at for at in ours if words is None or asked[at] in words]
                name = next(iter((*fit, *ours)), name)
            elif split is not None and words is not None:
                name = next(in_turn[split], None)
            if name is None:
                problems.add("answers that do not tell their question", where)
            elif name in asked and words is not None and asked[name] not in words:
                problems.add("answers to other words than their question's", f"{where}: {words[:80]!r}")
            elif (text := reply_in(row, where, problems)) is not None:
                yield Given(name, text, where)

    return Benchmark(
        name="pope",
        load=load,
        score=score,
        source=SOURCE,
        report=report,
        headline="mean_f1",
        sums=sums,
        answers=answers,
        max_new_tokens=16,
        metric="F1",
    )


def _asked(folder: Path) -> tuple[dict[str, str], dict[tuple[Any, ...], str]]:
    """The words of each question by our id, and the id by split, picture and words."""
    asked, by_words = {}, {}
    for split, file in zip(SPLITS, LABELS, strict=True):
        for _, row in read_jsonl(need(folder, file, "pope"), Problems()):
            name = f"{split}/{row.get('question_id')}"
            asked[name] = text_of(row.get("text"))
            by_words[split, row.get("image"), row.get("text")] = name
    return asked, by_words


def _ids(llava: Path | None, by_words: dict[tuple[Any, ...], str], problems: Problems) -> dict[str, str]:
    """LLaVA's id of a question -> ours."""
    found = {}
    for _, row in read_jsonl(llava, problems) if llava else ():
        words = text_of(row.get("text")).removesuffix(SHORT)
        if (name := by_words.get((row.get("category"), row.get("image"), words))) is not None:
            found[text_of(row.get("question_id"))] = name
    return found


def score(question: Question, reply: str) -> Score:
    said = yes_no(reply)
    return Score(float(said == question.answer), parsed=said)


def _counts(scores: Sequence[Score]) -> Any:
    """[questions, splits * 4]: true and false positives, true and false negatives of each split."""
    place = {split: 4 * i for i, split in enumerate(SPLITS)}
    which = {("yes", 1.0): 0, ("yes", 0.0): 1, ("no", 1.0): 2, ("no", 0.0): 3}
    rows = np.zeros((len(scores), len(SPLITS) * 4))
    columns = [place[one.meta["kind"]] + which[one.parsed, one.value] for one in scores]
    rows[np.arange(len(scores)), columns] = 1
    return rows


def _f1(counts: Any) -> Any:
    """F1 of [..., 4] counts."""
    tp, fp, _, fn = (counts[..., i] for i in range(4))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return 2 * precision * recall / (precision + recall)


def sums(scores: Sequence[Score]) -> Sums:
    """Of the mean F1 over the splits that were asked."""
    rows = _counts(scores)
    asked = [i for i in range(len(SPLITS)) if rows[:, i * 4 : i * 4 + 4].any()]
    return Sums(rows, lambda all_: np.mean([_f1(all_[..., i * 4 : i * 4 + 4]) for i in asked], axis=0))


def report(scores: Sequence[Score]) -> Metrics:
    """Counts, accuracy, precision, recall, F1 and share of yes of each split, and the mean of the F1."""
    found: Metrics = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        for split, counts in zip(SPLITS, _counts(scores).sum(axis=0).reshape(-1, 4), strict=True):
            n = int(counts.sum())
            if not n:
                continue
            tp, fp, tn, fn = (int(count) for count in counts)
            found[split] = {
                "n": n,
                "TP": tp,
                "FP": fp,
                "TN": tn,
                "FN": fn,
                "accuracy": (tp + tn) / n,
                "precision": tp / (tp + fp) if tp + fp else 0.0,
                "recall": tp / (tp + fn) if tp + fn else 0.0,
                "f1": float(np.nan_to_num(_f1(counts))),
                "yes_ratio": (tp + fp) / n,
            }
    means = [found[split]["f1"] for split in found]
    return found | ({"mean_f1": sum(means) / len(means)} if means else {})


TASK = OnDisk(
    name="pope",
    title="yes or no about objects that are not there",
    source=SOURCE,
    files=(*LABELS, ASKED, PICTURES),
    open=open_folder,
    folders=("POPE",),
)
