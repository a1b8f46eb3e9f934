"""Questions with lettered options: the lines that show them, and the letter that a reply chooses.

Each way to read a letter is one scorer's own, to the last case: what one of them takes for a B, another
counts as wrong.
"""

from __future__ import annotations

import base64
import binascii
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinymodal.core.errors import DataError
from tinymodal.eval.benchmark import Problems
from tinymodal.eval.files import id_of, text_of
from tinymodal.eval.given import answer_rows, reply_in

LETTERS = string.ascii_uppercase
DIRECTLY = "\nAnswer with the option's letter from the given choices directly."
"""LLaVA's, https://github.com/haotian-liu/LLaVA/blob/v1.2.2/docs/Evaluation.md"""
DIRECTLY_CHINESE = "\n请直接回答选项字母。"
"""https://github.com/haotian-liu/LLaVA/blob/v1.2.2/llava/eval/model_vqa_mmbench.py"""
NONE_FITS = "Z"
"""The letter of a reply that chooses none of the options."""
NOTHING = frozenset(
    (
        *("", "nan", "-nan", "none", "null", "na", "n/a", "<na>", "#na", "#n/a", "#n/a n/a"),
        *("1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan"),
    )
)
"""What pandas, with which the official codes read their tables, takes for an empty cell, in lower case.
Source: https://pandas.pydata.org/docs/reference/api/pandas.read_csv.html, ``na_values``."""


class Said(NamedTuple):
    """A row of a file of answers."""

    where: str
    id: str
    text: str
    row: Mapping[str, Any]


def is_nothing(value: object) -> bool:
    """Whether a cell of a table holds nothing."""
    return text_of(value).lower() in NOTHING


def options_of(row: Mapping[str, Any], letters: str = "ABCD") -> dict[str, str]:
    """Letter -> option, up to the first empty one, as LLaVA reads a row of MMBench."""
    found = {}
    for letter in letters:
        if is_nothing(row.get(letter)):
            break
        found[letter] = text_of(row[letter])
    return found


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Letter -> option, from A on."""
    return dict(zip(LETTERS, options, strict=False))


def option_lines(options: Mapping[str, str]) -> str:
    """A line for each option, with a line end before it: ``A. a dog``."""
    return "".join(f"\n{letter}. {option}" for letter, option in options.items())


def leading_letter(reply: str) -> str | None:
    """The letter a reply begins with, as MMStar's scorer looks for it; None where it begins otherwise.

    Also behind ``(``, ``option `` and ``the answer is ``. Case does not count, nor what follows: ``dog`` is
    a D.

    Source: https://github.com/MMStar-Benchmark/MMStar/blob/79e6d1cbab00576162fc8c878a4ad584f98b4868/eval/vlmeval/evaluate/mmstar.py
    """
    said = reply.lower().strip().replace("\n", " ")
    before = next((start for start in ("(", "option ", "the answer is ") if said.startswith(start)), "")
    letter = said[len(before) : len(before) + 1].upper()
    return letter if letter in "ABCD" and letter else None


REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
FAILED = "Failed to obtain answer via API"
BETWEEN_WORDS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def matched_letter(reply: str, options: Mapping[str, str]) -> str | None:
    """The option that a reply names by letter or by text, as VLMEvalKit matches MMBench's.

    First the one letter that stands as a word of its own, then the one option whose text is in the reply,
    whatever its case. :data:`NONE_FITS` for a refusal; None where nothing or more than one fits: a judge has
    to tell.

    Source: https://github.com/open-compass/VLMEvalKit/blob/18fc37a5337e31eec9c104887728ad14e82a6a85/vlmeval/utils/matching_util.py
    """
    if FAILED not in reply:
        if any(words in reply for words in REFUSALS):
            return NONE_FITS
        words = set(reply.translate(BETWEEN_WORDS).split())
        letters = [letter for letter in options if letter in words]
        if len(letters) == 1:
            return letters[0]
        if not letters and NONE_FITS in words:
            return NONE_FITS
    low = reply.lower()
    named = [letter for letter, option in options.items() if option.lower() in low]
    return named[0] if len(named) == 1 else None


JUDGE = """\
You match a reply to the options of a single-choice question. You are given the question, its options and \
the reply. Find the option that is closest in meaning to the reply. If every option means something quite \
different, the letter is Z. Write one capital letter, that of an option or Z, and nothing else.

Example 1:
Question: Which animal is in the picture?
Options: A. horse B. sparrow C. trout D. bee
Reply: a small brown bird
Letter: B

Example 2:
Question: Which animal is in the picture?
Options: A. horse B. sparrow C. trout D. bee
Reply: a castle
Letter: Z

Example 3:
Question: {question}
Options: {options}
Reply: {reply}
Letter: """
JUDGE_CHINESE = """\
请把一个回答与单选题的选项对应起来。下面给出问题、选项和回答，请找出含义与回答最接近的选项。\
如果每个选项的含义都与回答明显不同，则输出 Z。只输出一个大写字母：某个选项的字母，或者 Z。

例 1：
问题：图中是什么动物？
选项：A. 马 B. 麻雀 C. 鳟鱼 D. 蜜蜂
回答：一只棕色的小鸟
字母：B

例 2：
问题：图中是什么动物？
选项：A. 马 B. 麻雀 C. 鳟鱼 D. 蜜蜂
回答：一座城堡
字母：Z

例 3：
问题：{question}
选项：{options}
回答：{reply}
字母："""


def judge_prompt(question: str, options: Mapping[str, str], reply: str) -> list[dict[str, str]]:
    """What a judge is asked about a reply that :func:`matched_letter` cannot read.

    The structure is VLMEvalKit's: the task, two examples, then the question; in Chinese where the question
    holds a Chinese character. The words are ours.

    Source: https://github.com/open-compass/VLMEvalKit/blob/674affd92d715a81af5811127cbc73b57ec4fafa/vlmeval/evaluate/multiple_choice.py
    """
    chinese = re.search("[\u4e00-\u9fff]", question) is not None
    shown = " ".join(f"{letter}. {option}" for letter, option in options.items())
    text = (JUDGE_CHINESE if chinese else JUDGE).format(question=question, options=shown, reply=reply)
    return [{"role": "user", "content": text}]


def said_rows(
    path: Path,
    problems: Problems,
    ids: Sequence[str] = ("question_id", "index", "id"),
    texts: Sequence[str] = ("prediction", "text", "reply"),
) -> Iterator[Said]:
    """The rows of a file of answers; those without id or answer are noted and left out.

    A column that is not among ``texts`` is never taken for one: tables of
    results hold the right answer as ``answer``.
    """
    for where, row in answer_rows(path, problems):
        name = next((id_of(row[key]) for key in ids if not is_nothing(row.get(key))), None)
        if name is None:
            problems.add("answers without an id", f"{where}: none of {', '.join(ids)}")
        elif (text := reply_in(row, where, problems, texts)) is not None:
            yield Said(where, name, text, row)


def picture(value: object, otherwise: Path, where: str, problems: Problems) -> bytes | Path:
    """The source of a picture in a table: base64, or ``{"bytes", "path"}``; else the file ``otherwise``.

    What is no base64 is noted.
    """
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and not is_nothing(value):
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error as error:
            problems.add("unreadable pictures", f"{where}: {error}; expected base64")
    return otherwise


def write_xlsx(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table of results as test servers and VLMEvalKit read them; an older file is replaced.

    Whole numbers stay numbers, all else is text: a reply that begins with ``=`` is no formula. Characters
    that no xlsx can hold are left out.

    Raises:
        DataError: openpyxl is not there.
    """
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError as error:
        raise DataError(f"{path}: xlsx needs openpyxl: pip install 'tinymodal[eval]'") from error
    # Not write_only: such a file does not say how wide it is, and rows lose their empty last cells.
    book = Workbook()
    sheet = book.worksheets[0]
    sheet.append(columns)
    for number, row in enumerate(rows, 2):
        for column, key in enumerate(columns, 1):
            value = row.get(key)
            if isinstance(value, int):
                sheet.cell(number, column, value)
            elif value is not None:
                sheet.cell(number, column, ILLEGAL_CHARACTERS_RE.sub("", str(value))).data_type = "s"
    book.save(path)
