"""Short answers to questions about pictures: what VQA, TextVQA, VizWiz, DocVQA and ChartQA count as right.

The field uses two normalisers: :func:`vqa_words` of VQA's own scorer, and :func:`m4c_words`, by which TextVQA
is scored and with which LLaVA prepares files for test servers. They differ on ``'s``, ``?`` and commas.
Published numbers depend on their slips to the last digit, so the slips are kept; each is named where it is
made. The sources are in ``*_SOURCE``.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.eval.benchmark import Given, Problems, Question, Score, Sums
from tinymodal.eval.files import find_file, rows_of
from tinymodal.eval.given import MISSING, answer_rows, reply_in
from tinymodal.eval.intervals import percent_sums
from tinymodal.eval.rules.answers import NUMBER_WORDS

VQA_SOURCE = (
    "https://github.com/mlej8/VQA/blob/8056e52359873f5e324968473bb2630f911d33aa/"
    "PythonEvaluationTools/vqaEvaluation/vqaEval.py"
)
"""A copy of https://github.com/GT-Vision-Lab/VQA, later than its c4e6a0e, which normalises otherwise."""
M4C_SOURCE = "https://github.com/haotian-liu/LLaVA/blob/v1.2.2/llava/eval/m4c_evaluator.py"
ANLS_SOURCE = (
    "https://github.com/QwenLM/Qwen-VL/blob/e6bbb9dd9e9fc44a4498d372e83b3b172dc1d808/"
    "eval_mm/infographicsvqa_eval.py"
)
"""A copy of the script of https://rrc.cvc.uab.es/?ch=17."""
RELAXED_SOURCE = (
    "https://github.com/google-research/pix2struct/blob/5b086ef5269a80d89fbdd37bdba263e492e83149/"
    "pix2struct/metrics.py"
)
SHORT = "\nAnswer the question using a single word or phrase."
"""LLaVA's prompt, https://github.com/haotian-liu/LLaVA/blob/v1.2.2/docs/Evaluation.md"""
MAX_NEW_TOKENS = 128
"""https://github.com/haotian-liu/LLaVA/blob/v1.2.2/llava/eval/model_vqa_loader.py"""
UNSCORED = "questions without answers to score by"

NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = frozenset(';/[]"{}()=+\\_-><@`,?!')
NUM_PERIODS = 32
"""Periods behind the 32nd stay: both scorers hand ``re.UNICODE``, which is 32, to ``sub`` as its count."""
PERIOD = re.compile(r"\.(?!\d)")
"""Both scorers mean to keep the period behind a digit too, but their look-behind is written ``(?!<=``."""
WORDS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've
"""
"""What both scorers put an apostrophe into. Theirs with a capital I are left out: words are lower-cased."""
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in WORDS.split()
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""A word that lacks one of its apostrophes -> the word; and one slip."""


class _Remembered(dict[str, str]):
    """A rule's results for 65,536 short texts, some 20 MB: people's answers repeat."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        super().__init__()
        self.rule = rule

    def __missing__(self, text: str) -> str:
        found = self.rule(text)
        if len(text) < 64 and len(self) < 1 << 16:
            self[text] = found
        return found


def remembered(rule: Callable[[str], str]) -> Callable[[str], str]:
    """The rule as a look-up in its results: millions of calls, none of which is a frame of Python's own."""
    return _Remembered(rule).__getitem__


@remembered
def tidy(text: str) -> str:
    """One line, without space around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@remembered
def vqa_words(text: str) -> str:
    """A tidied answer as VQA's scorer compares it."""
    return _words(_unpunctuated(text))


@remembered
def m4c_words(text: str) -> str:
    """Any answer as TextVQA's scorer compares it: ``'s`` is a word of its own."""
    plain = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(_unpunctuated(tidy(plain)))


def _unpunctuated(text: str) -> str:
    """A mark becomes a space; nothing if anywhere it has a space beside it, or if digits surround a comma."""
    marks = PUNCTUATION.intersection(text)
    if marks:
        thousands = re.search(r"\d,\d", text) is not None
        text = text.translate(
            {
                ord(mark): "" if thousands or f"{mark} " in text or f" {mark}" in text else " "
                for mark in marks
            }
        )
    return PERIOD.sub("", text, count=NUM_PERIODS) if "." in text else text


def _words(text: str) -> str:
    """Lower case, digits for the words of numbers, no articles, apostrophes."""
    said = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join([CONTRACTIONS.get(word, word) for word in said if word not in ARTICLES])


def total(values: Iterable[float]) -> float:
    """The sum from left to right; from Python 3.12 on ``sum`` is more exact than the scorers' figures."""
    return reduce(operator.add, values, 0.0)


def agreement(said: str, truth: Sequence[str]) -> float:
    """How far people agree: a third for each who said the same, at most 1; mean over leaving each one out."""
    return _agreement(tuple([one == said for one in truth]))


@lru_cache(1 << 12)
def _agreement(same: tuple[bool, ...]) -> float:
    """:func:`agreement` by who said the same; added up in their order, as the scorers do."""
    count = sum(same)
    if not count:
        return 0.0
    return total(min(1.0, (count - one) / 3) for one in same) / len(same)


def vqa_accuracy(reply: str, answers: Sequence[str]) -> float:
    """Of VQA's scorer: it normalises only where answers differ. Where all are ``yes``, ``Yes`` is wrong."""
    said, truth = tidy(reply), list(map(tidy, answers))
    if len(set(truth)) > 1:
        said, truth = vqa_words(said), list(map(vqa_words, truth))
    return agreement(said, truth)


def m4c_accuracy(reply: str, answers: Sequence[str]) -> float:
    """Of TextVQA's scorer: it normalises always."""
    return agreement(m4c_words(reply), list(map(m4c_words, answers)))


def anls(reply: str, answers: Sequence[str]) -> float:
    """Likeness to the nearest answer, 0 to 1: 1 - edits per character, and 0 below a half.

    Case and runs of space do not count as edits, but the characters are those of the texts as they were
    written: the official script has it so. An empty reply to an empty answer is right.
    """
    said = " ".join(reply.lower().split())
    least = 1.0
    for answer in answers:
        truth = " ".join(answer.lower().split())
        # In capitals, as there: "ß" counts two.
        length = max(len(answer.upper()), len(reply.upper()))
        if not length:
            return 1.0
        if abs(len(said) - len(truth)) <= length / 2:  # or it is below a half in any case
            least = min(least, edits(truth, said) / length)
    return 0.0 if 1 - least < 0.5 else 1 - least


def edits(first: str, second: str) -> int:
    """Characters to insert, delete or replace; a step for each of the longer text, however long the other.

    Source: H. Hyyrö, "A bit-vector algorithm for computing Levenshtein and Damerau edit distances", 2003.
    """
    if len(first) > len(second):
        first, second = second, first
    if not first:
        return len(second)
    places: dict[str, int] = {}
    for i, letter in enumerate(first):
        places[letter] = places.get(letter, 0) | 1 << i
    every, last, found = (1 << len(first)) - 1, 1 << len(first) - 1, len(first)
    more, less = every, 0  # rows in which the distance is one more or less than in the row above
    for letter in second:
        match = places.get(letter, 0)
        equal = (((match & more) + more) ^ more) | match | less
        right, left = less | ~(equal | more) & every, equal & more
        found += bool(right & last) - bool(left & last)
        right = right << 1 | 1
        more, less = (left << 1 | ~(equal | right)) & every, right & equal & every
    return found


def relaxed(reply: str, answer: str) -> bool:
    """Within 5 % of an answer that is a number other than 0; else the same but for case.

    ``5%`` is 0.05, so it is not within 5 % of ``5``. Spaces around words count.
    """
    said, truth = _number(reply), _number(answer)
    if said is None or not truth:
        return reply.lower() == answer.lower()
    return abs(said - truth) / abs(truth) <= 0.05


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def percent(values: Sequence[float]) -> float:
    """The mean in %, to two digits, as VQA's scorer prints it."""
    return round(100 * total(values) / len(values), 2)


def percent_by(key: str, scores: Sequence[Score]) -> dict[str, float]:
    """:func:`percent` of each value of ``meta[key]``, in order of appearance."""
    return {name: percent(values) for name, values in groups(key, scores).items()}


def groups(key: str, scores: Sequence[Score]) -> dict[str, list[float]]:
    """The scores' values by ``meta[key]``; those without it are left out."""
    found: dict[str, list[float]] = {}
    for score in scores:
        if key in score.meta:
            found.setdefault(score.meta[key], []).append(score.value)
    return found


def ask(name: object, picture: Path | bytes, prompt: str, answers: Sequence[str], **meta: str) -> Question:
    """A picture and words; the right answer is what most people said.

    All of their answers are lines of ``meta["answers"]``, see :func:`people`.
    """
    sample = Sample((Message("user", (Image(picture), Text(prompt))),), str(name))
    if not answers:
        return Question(sample, "", meta)
    lines = "\n".join(answers)
    if lines.count("\n") >= len(answers):
        lines = "\n".join(answer.replace("\n", " ") for answer in answers)
    first = answers[0]
    most = (
        first if 2 * answers.count(first) > len(answers) else max(dict.fromkeys(answers), key=answers.count)
    )
    return Question(sample, most, meta | {"answers": lines})


def people(meta: Mapping[str, str]) -> list[str]:
    """What people answered, from a question's or a score's ``meta``; none where that is not public."""
    return meta["answers"].split("\n") if "answers" in meta else []


def scored(scores: Sequence[Score]) -> list[Score]:
    """Those to questions whose answers are public."""
    return [score for score in scores if "answers" in score.meta]


def scored_sums(scores: Sequence[Score]) -> Sums:
    """Of the mean in % over those to questions whose answers are public."""
    return percent_sums(scored(scores))


def score_vqa(question: Question, reply: str) -> Score:
    """Score by :func:`vqa_accuracy`. Parsed is only tidied, for numbers by other rules are computed of it."""
    return Score(vqa_accuracy(reply, people(question.meta)), parsed=tidy(reply))


def told_answers(value: object) -> list[str]:
    """Answers of a row: texts, or objects with ``answer``; none where any of them is something else."""
    texts: list[Any]
    try:
        texts = [row["answer"] for row in value]  # type: ignore[attr-defined]
    except (KeyError, TypeError):
        rows = value if isinstance(value, list) else []
        texts = [row.get("answer") if isinstance(row, dict) else row for row in rows]
    return texts if set(map(type, texts)) == {str} else []


def vqa_rows(questions: Path, annotations: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(where, row)`` of each annotation together with its question, in VQA's format."""
    asked = {str(row.get("question_id")): row for _, row in rows_of(questions, "questions", problems)}
    left = dict(asked)
    for where, row in rows_of(annotations, "annotations", problems):
        name = str(row.get("question_id"))
        if name in asked:
            left.pop(name, None)
            yield where, asked[name] | row
        else:
            problems.add("annotations of no question", f"{where}: {name}")
    for name in left:
        problems.add(UNSCORED, f"{questions.name}: {name}")


class Pictures:
    """Where pictures are: files below a folder, or in a row itself, one copy of each."""

    def __init__(self, folder: Path, pattern: str, usual: str) -> None:
        found = find_file(folder, pattern)
        self.folder = found.parent if found else folder / usual
        self.kept: dict[str | bytes, Path | bytes] = {}

    def __call__(self, told: object) -> Path | bytes:
        """The picture of a row: by its name, or as parquet holds it, ``{"bytes", "path"}``."""
        if isinstance(told, Mapping):
            content = told.get("bytes")
            if isinstance(content, bytes):
                return self.kept.setdefault(content, content)
            told = told.get("path")
        name = str(told)
        if name not in self.kept:
            self.kept[name] = self.folder / name
        return self.kept[name]


def read_answers(
    path: Path, problems: Problems, name: Callable[[Mapping[str, Any]], str | None]
) -> Iterator[Given]:
    """Answers whose question ``name`` finds; rows without question or reply are noted and left out."""
    for where, row in answer_rows(path, problems):
        found = name(row)
        if found is None:
            problems.add("answers that do not tell their question", where)
        elif (text := reply_in(row, where, problems)) is not None:
            yield Given(found, text, where)


def server_rows(
    key: str, names: Iterable[tuple[str, Any]], texts: Mapping[str, str], problems: Problems
) -> str:
    """A test server's json: ``[{key, "answer"}]`` for all names, normalised as LLaVA does.

    Args:
        key: what the server calls a question.
        names: of each question its ``sample.id``, and its name for the server.
        texts: replies by ``sample.id``; where there is none the answer is empty, and that is noted.
        problems: where it is noted.
    """
    rows = []
    for name, told in names:
        if name not in texts:
            problems.add(MISSING, name)
        rows.append({key: told, "answer": m4c_words(texts.get(name, ""))})
    return json.dumps(rows)
