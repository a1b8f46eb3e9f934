"""What a reply says: yes or no, a number, an option's letter, a short answer.

Each rule names where it is from. Published numbers depend on these rules to the last digit, so they follow
the official scorers also where a better rule is easy to think of.
"""

from __future__ import annotations

import re
from typing import Literal

from tinymodal.eval.benchmark import Question, Score

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LETTERS = "ABCDE"


def normalise(text: str) -> str:
    """A short answer as it is compared: lower case, one space between words, no full stops at the end.

    Source: lower case and full stop as LLaVA prepares answers for GQA,
    https://github.com/haotian-liu/LLaVA/blob/a689fd8c73e7d3cdaf5cb8f5a0686f1dbe2c4afc/scripts/convert_gqa_for_eval.py
    """
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def exact(question: Question, reply: str) -> Score:
    """1 where reply and answer are the same once both are normalised."""
    said = normalise(reply)
    return Score(float(said == normalise(question.answer)), parsed=said)


def yes_no(text: str) -> Literal["yes", "no"]:
    """What the first sentence says: ``no`` if it holds the word No, no or not, else ``yes``.

    The case of the word counts, and a reply with neither word counts as yes.

    Source: https://github.com/AoiDragon/POPE/blob/f3ec604337f1d1c9723ef8d01b4accacf8badb3d/evaluate.py
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def number(text: str) -> float | None:
    """The first number in the reply, in digits or as a word from zero to ten; None where there is none.

    Commas between thousands are read over; at any other comma a number ends (``1,2345`` is 1). A hyphen
    behind a letter or a digit is no minus (``step-3`` is 3). Source: the words are those of the VQA scorers'
    table of numbers (https://visualqa.org/evaluation.html); taking the first is ours.
    """
    digits = r"(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?"
    found = re.search(rf"{digits}|\b(?:{'|'.join(NUMBER_WORDS)})\b", text.lower())
    if found is None:
        return None
    said = found.group()
    return float(NUMBER_WORDS.index(said)) if said in NUMBER_WORDS else float(said.replace(",", ""))


def option_letter(text: str, num_options: int) -> str | None:
    """The letter a reply chooses: ``B``, ``B. ...`` or one ``The answer is B.``; None if it chooses none.

    ``B.`` alone, a final ``The answer is B`` with nothing behind it, and a letter beyond the options choose
    none: the official scorer has it so.

    Source: LLaVA's scorer for ScienceQA, llava/eval/eval_science_qa.py of https://github.com/haotian-liu/LLaVA
    (v1.2.2). Where nothing is found it counts the answer as wrong, as we do.
    """
    if text in LETTERS and len(text) == 1:
        letter = text
    elif text[:1] in LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        found = re.findall(r"The answer is ([A-Z]).", text)
        if len(found) != 1:
            return None
        letter = found[0]
    return letter if letter in LETTERS[:num_options] else None
