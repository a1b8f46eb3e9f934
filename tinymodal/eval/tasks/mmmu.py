"""MMMU: college questions over 30 subjects, of the validation set.

900 questions with one to seven pictures, 847 of them with lettered options (Yue et al., CVPR 2024,
arXiv:2311.16502). Asked in the words of MMMU's own run of LLaVA-1.5. A single picture stands before them, as
it does there; several stand where ``<image 1>`` and so on name them. (That run shows only the first, or draws
an option, and TinyLLaVA draws one.) A choice is read by the authors' rules: ``(A)``, else a letter between
spaces, else, in a reply of more than five words, an option's own words; of several the last. Where nothing is
found the authors draw an option at random; here the question's id draws it, the same one each time, and
``parse_and_eval_deterministic_rows`` tells how many were drawn and how the others did.

Read are a folder of the Hub's MMMU/MMMU (``SUBJECT/validation-*.parquet`` with id, question, options, answer,
question_type, image_1 to image_7), TinyLLaVA's ``anns_for_eval.json`` with ``answer_dict_val.json``, or the
latter alone to score answers that are there. Answers may be MMMU's outputs (a folder of
``SUBJECT/output.json``, or one json of all subjects), whose own options are used where the questions are not
there; ``{id: answer}`` as in ``total_val_output.json``, which is taken as it is; or rows of LLaVA or ours.
"""

from __future__ import annotations

import ast
import contextlib
import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymodal.core.types import Image, Message, Part, Sample, Text
from tinymodal.eval.benchmark import Benchmark, File, Given, Metrics, OnDisk, Problems, Question, Score
from tinymodal.eval.files import files_of, find_file, need, read_json, read_rows, text_of
from tinymodal.eval.given import answer_rows, first_of, reply_in
from tinymodal.eval.intervals import mean_sums

REPOSITORY = "https://github.com/MMMU-Benchmark/MMMU/blob/bf380a220592af1021de869a33e21b8c606735ca/eval"
SOURCE = f"{REPOSITORY}/main_eval_only.py"
HUB = "https://huggingface.co/datasets/MMMU/MMMU"
KEY = File(
    ("answer_dict_val.json",),
    "the right answers, enough to score answers",
    f"{REPOSITORY}/answer_dict_val.json",
    optional=True,
)
ASKED = File(
    ("anns_for_eval.json",),
    "the questions as TinyLLaVA asks them",
    "https://github.com/TinyLLaVA/TinyLLaVA_Factory (docs of the evaluation)",
    optional=True,
)
FROM_HUB = File(("validation-*.parquet",), "the questions with their pictures", HUB, optional=True)
CHOOSE = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
"""configs/llava1.5.yaml of MMMU's repository."""
SUBJECTS: Mapping[str, tuple[str, ...]] = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
}  # fmt: skip
MARK = re.compile(r"<image (\d)>")
CHOICE = "multiple-choice"
DRAWN = " (drawn)"
Options = Mapping[str, str]


def open_folder(folder: Path, problems: Problems) -> Benchmark:
    """MMMU over a folder with the Hub's files, TinyLLaVA's, or only the right answers."""
    known: dict[str, Options] = {}
    """Options by question: its own, or those in a row of answers. None: an answer is taken as it is."""

    def load() -> Iterator[Question]:
        path, llava = (find_file(folder, *file.patterns) for file in (KEY, ASKED))
        files = files_of(folder, FROM_HUB.patterns[0], problems)
        key = {} if files and path is None else dict(read_json(path or need(folder, KEY, "mmmu")))
        for file in files or ([llava] if llava else []):
            for where, row in read_rows(file, problems):
                name = text_of(row.get("id"))
                right = key.pop(name, {}).get("ground_truth", row.get("answer"))
                known[name], kind = _options(row), row.get("question_type")
                if kind == CHOICE and not known[name]:
                    problems.add("questions without options", f"{where}: {name!r}")
                parts = _interleaved(row) if files else _pictured(row, file.parent)
                yield from _question(where, name, parts, right, kind, problems)
        # Only the answer is there: enough to score replies. A model is told that there is nothing to see.
        nothing = (Image(folder / FROM_HUB.patterns[0]),)
        for name, row in key.items():
            if files or llava:
                problems.add("questions of which only the answer is there", name)
            yield from _question(
                name, name, nothing, row.get("ground_truth"), row.get("question_type"), problems
            )

    def answers(path: Path) -> Iterator[Given]:
        for file in sorted(path.glob("*/output.json*")) if path.is_dir() else [path]:
            for where, row in _answer_rows(file, problems):
                name = first_of(row, ("id", "question_id"))
                if name is None:
                    problems.add("answers without an id", where)
                    continue
                text = reply_in(row, where, problems, ("response", "text", "reply"))
                if text is None:
                    continue
                if row.keys() == {"id", "text"}:
                    known[name] = {}
                elif not known.get(name):
                    known[name] = _options(row)
                yield Given(name, text, where)

    return Benchmark(
        name="mmmu",
        load=load,
        score=lambda question, reply: score(question, reply, known.get(question.sample.id, {})),
        source=SOURCE,
        report=report,
        headline="eval_only.Overall.acc",
        sums=mean_sums,
        answers=answers,
        max_new_tokens=1024,
    )


def _question(
    where: str, name: str, parts: tuple[Part, ...], right: Any, kind: Any, problems: Problems
) -> Iterator[Question]:
    """The question, or a note of what is missing from it."""
    if isinstance(right, str) and right.startswith("['"):  # so the Hub writes several right answers
        with contextlib.suppress(ValueError, SyntaxError):
            right = ast.literal_eval(right)
    answer = "\n".join(right) if isinstance(right, list) else text_of(right)
    subject = "_".join(name.split("_")[1:-1])
    if not answer or kind is None or not any(subject in of for of in SUBJECTS.values()):
        problems.add("questions without id, subject, type or answer", f"{where}: {name!r}")
        return
    num_pictures = sum(isinstance(part, Image) for part in parts)
    meta = {"subject": subject, "type": kind, "pictures": str(num_pictures)}
    yield Question(Sample((Message("user", parts),), name), answer, meta)


def _options(row: Mapping[str, Any]) -> Options:
    """By letter, from a question or from MMMU's row of an answer; empty where there are none."""
    options = row.get("index2ans") or row.get("options") or ()
    if isinstance(options, str):  # so the Hub writes the list
        try:
            options = ast.literal_eval(options)
        except (ValueError, SyntaxError):
            options = ()
    named = (
        options.items() if isinstance(options, dict) else zip(string.ascii_uppercase, options, strict=False)
    )
    return {letter: text_of(words) for letter, words in named}


def _interleaved(row: Mapping[str, Any]) -> tuple[Part, ...]:
    """A question of the Hub with its pictures: one before the words, several where they are named."""
    options = "".join(f"({letter}) {words}\n" for letter, words in _options(row).items())
    choose = row.get("question_type") == CHOICE
    words = f"{row.get('question')}\n" + (f"{options}\n{CHOOSE}" if choose else SHORT)
    pictures = {n: row[f"image_{n}"] for n in range(1, 8) if row.get(f"image_{n}")}
    named = [int(n) for n in MARK.findall(words)]
    shown = {n: Image(one.get("bytes") or Path(one["path"])) for n, one in pictures.items()}
    if len(shown) < 2:
        return (*shown.values(), Text(words))
    parts: list[Part] = [image for n, image in shown.items() if n not in named]
    for i, piece in enumerate(MARK.split(words)):
        if i % 2 == 0:
            parts += [Text(piece)] if piece else []
        elif (image := shown.pop(int(piece), None)) is not None:
            parts.append(image)
        else:  # named again
            parts.append(Text(f"<image {piece}>"))
    return tuple(parts)


def _pictured(row: Mapping[str, Any], folder: Path) -> tuple[Part, ...]:
    """A question of TinyLLaVA, which leaves the pictures away where there are several."""
    words = Text(text_of(row.get("prompt")))
    return (Image(folder / "all_images" / row["image"]), words) if row.get("image") else (words,)


def _answer_rows(path: Path, problems: Problems) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of answers; of a json of subject -> rows those of each subject."""
    for where, row in answer_rows(path, problems):
        if not isinstance(row.get("text"), list):
            yield where, row
            continue
        for number, inner in enumerate(row["text"], 1):
            yield f"{where}: row {number}", inner if isinstance(inner, dict) else {}


def score(question: Question, reply: str, options: Options) -> Score:
    """By the authors' rules for choices and for open questions; ``options`` empty: the reply is a letter."""
    right = question.answer.split("\n")
    if question.meta["type"] != CHOICE:
        said = read_open(reply)
        return Score(float(is_right(said, right)), parsed=" | ".join(map(str, said)))
    if not options:
        return Score(float(reply in right), parsed=reply)
    letter = read_choice(reply, options)
    if letter is not None:
        return Score(float(letter in right), parsed=letter)
    drawn = random.Random(f"mmmu/{question.sample.id}").choice(sorted(options))
    return Score(float(drawn in right), parsed=drawn + DRAWN)


def read_choice(reply: str, options: Options) -> str | None:
    """The letter of the option that a reply names last, in the clearest of three ways; None if in none.

    Source: parse_multi_choice_response of eval/eval_utils.py in MMMU's repository.
    """
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "
    places = {letter: reply.rfind(f"({letter})") for letter in options}
    if max(places.values()) < 0:
        places = {letter: reply.rfind(f" {letter} ") for letter in options}
    if max(places.values()) < 0 and len(reply.split()) > 5:
        places = {letter: reply.lower().rfind(words.lower()) for letter, words in options.items()}
    last = max(places, key=places.__getitem__)
    return last if places[last] >= 0 else None


LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""What comes behind one of these is the answer, of each line the shortest."""
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
"""Theirs but for ``(?<!\\d)``, which finds the same: what does not fit from the first digit of a run on fits
from none, and to try each took minutes of 20,000 digits."""


def read_open(reply: str) -> list[str | float]:
    """What an open reply may be saying: ends of its lines, and the numbers in them.

    Source: parse_open_response of eval/eval_utils.py in MMMU's repository. (It means to cut at sentences too,
    but looks for capitals in what is in lower case by then.)
    """
    reply = reply.strip().strip(".").lower()
    lines = reply.split("\n")
    ends = []
    for number, line in enumerate(lines, 1):
        end = ""
        for lead in (*LEADS, "=") if number == len(lines) else LEADS:
            if lead in line and (not end or len(line.split(lead)[-1].strip()) < len(end)):
                end = line.split(lead)[-1].strip()
        if end and end not in set(":,.!?;'"):
            ends.append(end)
    ends = ends or [reply]
    numbers = [number for end in ends for form in NUMBERS for number in re.findall(form, end)]
    return list(dict.fromkeys(said for text in (*ends, *numbers) for said in _comparable(text)))


def _comparable(text: str) -> list[str | float]:
    """A number to two places; or lower case, of a single letter with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def is_right(said: Sequence[str | float], right: Sequence[str]) -> bool:
    """Whether a number that is said is right, or a right text stands in one that is said."""
    wanted = [one for text in right for one in _comparable(text)]
    texts = [one for one in wanted if isinstance(one, str)]
    return any(any(t in one for t in texts) if isinstance(one, str) else one in wanted for one in said)


def report(scores: Sequence[Score]) -> Metrics:
    """Of each discipline, subject and all, as main_eval_only.py prints them; without answers: left out."""
    accuracies: dict[str, dict[str, float]] = {}
    for of in SUBJECTS.values():
        for subject in of:
            if values := [score.value for score in scores if score.meta["subject"] == subject]:
                accuracies[subject] = {"num": len(values), "acc": sum(values) / len(values)}
    printed: dict[str, Metrics] = {}
    for name, of in {**SUBJECTS, "": tuple(accuracies)}.items():
        if asked := {subject: accuracies[subject] for subject in of if subject in accuracies}:
            num = int(sum(one["num"] for one in asked.values()))
            # Summed in this order, which decides the last digit where a half is rounded.
            acc = sum(one["acc"] * one["num"] for one in asked.values()) / num
            printed[f"Overall-{name}".rstrip("-")] = {"num": num, "acc": round(acc, 3)}
            if name:
                printed |= {s: {"num": int(o["num"]), "acc": round(o["acc"], 3)} for s, o in asked.items()}
    found: Metrics = {"eval_only": printed}
    read = [score.value for score in scores if not score.parsed.endswith(DRAWN)]
    drawn = len(scores) - len(read)
    counts = {"n": len(read), "correct": int(sum(read)), "random_fallback_rows": drawn}
    found["parse_and_eval_deterministic_rows"] = counts
    several = [score.value for score in scores if int(score.meta["pictures"]) > 1]
    if several:
        one = [score.value for score in scores if int(score.meta["pictures"]) <= 1]
        by = {"one": one, "several": several}
        found["pictures"] = {k: {"num": len(v), "acc": round(sum(v) / len(v), 3)} for k, v in by.items() if v}
    return found


TASK = OnDisk(
    name="mmmu",
    title="college questions over 30 subjects",
    source=SOURCE,
    files=(KEY, FROM_HUB, ASKED),
    open=open_folder,
    folders=("MMMU",),
)
