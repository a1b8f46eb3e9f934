"""MME: two yes/no questions about each picture, one for each answer.

2,374 questions in 14 subtasks (Fu et al., 2023, arXiv:2306.13394). A reply says yes if its first four
characters hold ``yes``, else no if they hold ``no``. A subtask scores its accuracy and its ``acc+`` in
percent, added up: the share of questions, and of pictures with both questions right. A picture of which only
one question was asked counts for the first only.

LLaVA's ``question_id`` is the picture's name, shared by both questions, and some questions hold two spaces
where LLaVA's prompt holds none. So answers are joined by picture and words.

Files: the folder ``MME_Benchmark_release_version``; a ``gt.jsonl`` with ``category, image, question,
answer``; or the parquet of https://huggingface.co/datasets/lmms-lab/MME (``question_id, image, question,
answer, category``). Answers: LLaVA's jsonl, or the folder of results with a txt for each subtask (picture,
question, label, reply, between them tabs). Prompt: LLaVA's, ``llava_mme.jsonl`` of
https://github.com/haotian-liu/LLaVA/tree/32cebc3809441cc40d8ac7b2855d148308741f2a/playground/data/eval/MME
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.eval.benchmark import Benchmark, File, Given, Metrics, OnDisk, Problems, Question, Score, Sums
from tinymodal.eval.files import need, parts_of, read_rows, read_text, text_of
from tinymodal.eval.given import answer_rows, first_of, reply_in
from tinymodal.eval.rules.choices import picture

SOURCE = (
    "calculation.py in tools/eval_tool.zip of https://github.com/BradyFU/Awesome-Multimodal-Large-Language-"
    "Models/tree/1c1d69e138b57cf8b0400427927bfb8ed4285458"
)
PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION
DEEPER = ("posters", "celebrity", "scene", "landmark", "artwork")
"""Subtasks whose pictures and questions lie in folders of their own."""
ASKS = "Please answer yes or no."
SHORT = "Answer the question using a single word or phrase."
ENDINGS = (".jpg", ".png", ".jpeg", ".txt")
LABELS = File(
    ("gt.jsonl", "existence/*.txt", "existence/questions_answers_YN/*.txt", "*.parquet"),
    "questions and labels of the subtasks",
    "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
)


class _Row(NamedTuple):
    where: str
    subtask: str
    image: str
    source: bytes | Path
    question: str
    label: str


def open_folder(folder: Path, problems: Problems) -> Benchmark:
    """MME over a folder with the labels, and the pictures in ``MME_Benchmark_release_version``."""
    labels: dict[str, str] = {}

    def load() -> Iterator[Question]:
        found = need(folder, LABELS, "mme")
        is_folder = found.suffix == ".txt"
        for row in _of_folder(found, problems) if is_folder else _of_table(folder, found, problems):
            label = row.label.strip().lower()
            if not row.image or label not in ("yes", "no") or row.subtask not in SUBTASKS:
                problems.add("questions without picture, subtask or label", row.where)
                continue
            name = _id(row.subtask, row.image, row.question)
            labels[name] = label
            asked = row.question.replace(ASKS, "").strip() + "\n" + SHORT
            meta = {"subtask": row.subtask, "image": row.image}
            sample = Sample((Message("user", (Image(row.source), Text(asked))),), name)
            yield Question(sample, label, meta)

    def answers(path: Path) -> Iterator[Given]:
        return _of_results(path, labels, problems) if _is_results(path) else _of_jsonl(path, problems)

    return Benchmark(
        name="mme",
        load=load,
        score=score,
        source=SOURCE,
        report=report,
        headline="perception",
        sums=sums,
        answers=answers,
        max_new_tokens=16,
        metric="score",
    )


def _id(subtask: str, image: str, question: str) -> str:
    """``OCR/0001: Is the word ...?``: no ending, no prompt of anyone's, one space between words."""
    stem = next((image.removesuffix(end) for end in ENDINGS if image.endswith(end)), image)
    return f"{subtask}/{stem}: {' '.join(question.replace(SHORT, '').replace(ASKS, '').split())}"


def _of_table(folder: Path, found: Path, problems: Problems) -> Iterator[_Row]:
    root = folder / "MME_Benchmark_release_version"
    for path in parts_of(found, problems):
        for where, row in read_rows(path, problems):
            subtask = text_of(row.get("category"))
            named = row.get("image") if isinstance(row.get("image"), str) else row.get("question_id")
            image = text_of(named).rpartition("/")[2]
            place = root / subtask / "images" if subtask in DEEPER else root / subtask
            inside = None if isinstance(row.get("image"), str) else row.get("image")
            source = picture(inside, place / image, where, problems)
            asked, label = text_of(row.get("question")), text_of(row.get("answer"))
            yield _Row(where, subtask, image, source, asked, label)


def _of_folder(found: Path, problems: Problems) -> Iterator[_Row]:
    """The official layout, from a file of the first subtask in it."""
    root = found.parent.parent if found.parent.name == SUBTASKS[0] else found.parent.parent.parent
    for subtask in SUBTASKS:
        inside = [root / subtask / name for name in ("images", "questions_answers_YN")]
        pictures, texts = inside if inside[1].is_dir() else [root / subtask] * 2
        there = {at.stem: at for at in sorted(pictures.glob("*")) if at.suffix != ".txt"}
        files = sorted(texts.glob("*.txt"))
        if not files:
            problems.add("subtasks without questions", subtask)
        for path in files:
            at = there.get(path.stem, pictures / f"{path.stem}.jpg")
            for number, line in _lines(path, problems):
                question, _, label = line.strip().partition("\t")
                if question:
                    where = f"{subtask}/{path.name}: line {number}"
                    yield _Row(where, subtask, at.name, at, question, label)


def _lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """The lines with anything in them, and their numbers."""
    try:
        text = read_text(path)
    except DataError as error:
        problems.add("unreadable files", str(error))
        return
    # Not splitlines(): a reply may hold one of the rarer line ends that it cuts at.
    lines = ((number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1))
    yield from ((number, line) for number, line in lines if line.strip())


def _is_results(path: Path) -> bool:
    return path.is_dir() or path.name.removesuffix(".gz").endswith(".txt")


def _of_results(path: Path, labels: dict[str, str], problems: Problems) -> Iterator[Given]:
    """Answers of the official folder of results, or of one file in it."""
    files = sorted(path.rglob("*.txt*")) if path.is_dir() else [path]
    named = [(file, file.name.removesuffix(".gz").removesuffix(".txt")) for file in files]
    if not any(subtask in SUBTASKS for _, subtask in named):
        raise DataError(f"{path}: holds no results of MME; expected {SUBTASKS[0]}.txt and so on in it.")
    for file, subtask in named:
        if subtask not in SUBTASKS:
            continue
        for number, line in _lines(file, problems):
            where = f"{file.name}: line {number}"
            cells = line.split("\t", 3)
            if len(cells) < 4:
                problems.add("unreadable answers", f"{where}: {len(cells)} columns; expected 4")
                continue
            name = _id(subtask, cells[0], cells[1])
            if labels.get(name, cells[2].lower()) != cells[2].lower():
                problems.add("answers beside another label than the question's", where)
            yield Given(name, cells[3], where)


def _of_jsonl(path: Path, problems: Problems) -> Iterator[Given]:
    """LLaVA's answers, whose id is ``subtask/.../picture``, or our own replies."""
    for where, row in answer_rows(path, problems):
        official, prompt = first_of(row, ("question_id",)), first_of(row, ("prompt", "question"))
        if official is not None and prompt is not None:
            name: str | None = _id(official.partition("/")[0], official.rpartition("/")[2], prompt)
        else:
            name = first_of(row, ("id",))
        if name is None:
            problems.add("answers that do not tell their question", where)
        elif (text := reply_in(row, where, problems, ("text", "reply", "prediction"))) is not None:
            yield Given(name, text, where)


def score(question: Question, reply: str) -> Score:
    start = reply.lower()[:4]
    said = "yes" if "yes" in start else "no" if "no" in start else "other"
    return Score(float(said == question.answer), parsed=said)


def sums(scores: Sequence[Score]) -> Sums:
    """Of the perception score, a unit per picture."""
    rows, asked = _counts(scores)
    of = [i for i, subtask in enumerate(asked) if subtask in PERCEPTION]
    # Without any there is no such score. A draw without a picture of one of them has none either.
    return Sums(rows if of else rows[:0], lambda all_: np.sum([_scores(all_, i)[2] for i in of], axis=0))


def report(scores: Sequence[Score]) -> Metrics:
    """``perception`` and ``cognition``, the subtasks they are the sums of, and ``acc`` and ``acc_plus``."""
    rows, asked = _counts(scores)
    with np.errstate(invalid="ignore", divide="ignore"):
        each = {name: [float(n) for n in _scores(rows.sum(axis=0), i)] for i, name in enumerate(asked)}
    of = {name: each[name] for name in SUBTASKS if name in each and not np.isnan(each[name][2])}
    tasks = {name: score for name, (_, _, score) in of.items()}
    found: Metrics = {}
    for title, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if any(name in tasks for name in names):
            found[title] = sum(tasks[name] for name in names if name in tasks)
    accuracies = {"acc": {name: of[name][0] for name in of}, "acc_plus": {name: of[name][1] for name in of}}
    return found | ({"tasks": tasks} | accuracies if tasks else {})


def _counts(scores: Sequence[Score]) -> tuple[Any, list[str]]:
    """[pictures, subtasks * 4]: questions, right ones, pictures with both questions, with both right."""
    values: dict[tuple[str, str], list[float]] = {}
    for one in scores:
        values.setdefault((one.meta["subtask"], one.meta["image"]), []).append(one.value)
    asked = list(dict.fromkeys(subtask for subtask, _ in values))
    rows = np.zeros((len(values), len(asked) * 4))
    for row, ((subtask, _), right) in zip(rows, values.items(), strict=True):
        at = asked.index(subtask) * 4
        row[at : at + 4] = len(right), sum(right), len(right) == 2, len(right) == 2 and sum(right) == 2
    return rows, asked


def _scores(all_: Any, i: int) -> tuple[Any, Any, Any]:
    """Accuracy, acc+ and score of the subtask in columns i * 4 on, in percent."""
    questions, right, pairs, both = (all_[..., i * 4 + k] for k in range(4))
    acc, plus = right / questions * 100, both / pairs * 100
    return acc, plus, acc + plus


TASK = OnDisk(
    name="mme",
    title="pairs of yes/no questions in 14 subtasks",
    source=SOURCE,
    files=(LABELS,),
    open=open_folder,
    folders=("MME",),
)
