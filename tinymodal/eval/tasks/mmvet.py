"""MM-Vet: open questions that need several abilities at once, graded from 0 to 1 by a language model.

218 questions on 200 pictures, each with the capabilities it takes: recognition, knowledge, OCR, spatial
awareness, language generation, math (Yu et al., ICML 2024, arXiv:2308.02490). The prompt is the question
alone, as LLaVA-1.5 asks it. Numbers are means in %, per capability and per set of capabilities, over all
questions and over those of Bard's set; several runs of the judge are averaged.

The judge's prompt has the official structure, instructions and a table of examples to be continued, in words
of our own. Put the official ``mm-vet_evaluator.py`` into the folder, and its very words are used. A verdict
that cannot be read five times counts 0 officially; here it is named and left out. In official files of grades
it counts as it stands there, and is named.

Also read is the Hub's lmms-lab/MMVet (parquet: ``question_id``, ``image``, ``question``, ``answer``,
``capability`` with commas).
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.eval.benchmark import (
    BETWEEN,
    OUR_WORDING,
    Benchmark,
    File,
    Given,
    Judging,
    Metrics,
    OnDisk,
    Problems,
    Question,
    Score,
    Sums,
)
from tinymodal.eval.files import find_file, need, read_json, read_text, rows_by_id, text_of
from tinymodal.eval.given import UNREADABLE, answer_rows, first_of, reply_in

SOURCE = (
    "https://github.com/yuweihao/MM-Vet/blob/c7ff270d86fb79c42346214366f4192c0e08b042/mm-vet_evaluator.py"
)
ORIGIN = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"
LABELS = File(("mm-vet.json", "test-*.parquet"), "questions, right answers, capabilities, by v1_N", ORIGIN)
BARD = File(("bard_set.json",), "the ids that Bard could be asked", ORIGIN, optional=True)
OFFICIAL = File(("mm-vet_evaluator.py",), "the official scorer, for its prompt", SOURCE, optional=True)
PICTURES = File(("images/v1_*",), "pictures", ORIGIN, optional=True)
MAX_NEW_TOKENS = 1024
"""LLaVA's, https://github.com/haotian-liu/LLaVA/blob/v1.2.2/llava/eval/model_vqa.py"""
PROMPT = """\
Grade how correct a prediction is, given the true answer. Where the true answer has parts joined by <AND>, \
only a prediction with all of them is fully right; where it has parts joined by <OR>, any one is enough. \
Grades are 0.0 (all wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 and 1.0 (all right). Complete the \
last row of the table with its grade, and write nothing else.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which numbers solve the equation? | 2 <AND> -7 | x = 5 | 0.0
Which numbers solve the equation? | 2 <AND> -7 | x = 2 | 0.5
Which numbers solve the equation? | 2 <AND> -7 | x = -7 | 0.5
Which numbers solve the equation? | 2 <AND> -7 | x = 7 or x = -7 | 0.5
Which numbers solve the equation? | 2 <AND> -7 | either 2 or -7 | 1.0
Why is this sign funny? | The sign asks for quiet in capital letters with three exclamation marks. Its looks \
shout while its words want silence, which amuses whoever took the picture. | It is a sign about silence, \
written in capital letters. | 0.4
Why is this sign funny? | The sign asks for quiet in capital letters with three exclamation marks. Its looks \
shout while its words want silence, which amuses whoever took the picture. | The joke is in the contrast: \
everybody is asked to be quiet, yet capitals and exclamation marks make the sign itself shout, so that it \
breaks its own rule, which the person with the camera found amusing. | 1.0
"""
AGAIN = "\nThe grade of this prediction, as one number: "


def open_folder(folder: Path, problems: Problems) -> Benchmark:
    """MM-Vet over a folder with ``mm-vet.json``, its pictures in ``images`` beside it."""
    official = find_file(folder, *OFFICIAL.patterns)

    def load() -> Iterator[Question]:
        labels = need(folder, LABELS, "mmvet")
        bard = find_file(folder, *BARD.patterns)
        bard_set = _bard_set(bard) if bard else set()
        for where, name, row in rows_by_id(labels, "question_id", problems):
            asked, answer = text_of(row.get("question")), text_of(row.get("answer"))
            caps = row.get("capability") or ()
            caps = caps.split(",") if isinstance(caps, str) else caps
            image = row.get("image")
            pixels = image.get("bytes") if isinstance(image, Mapping) else None
            file = text_of(row.get("imagename"))
            if not (
                name and asked and answer and isinstance(caps, list | tuple) and caps and (pixels or file)
            ):
                problems.add("questions without id, words, answer, capability or picture", where)
                continue
            picture = Image(pixels or labels.parent / "images" / file)
            meta = {"capability": "+".join(sorted({text_of(cap).strip() for cap in caps}))}
            if bard:
                meta["bard_set"] = "yes" if name in bard_set else "no"
                bard_set.discard(name)
            yield Question(Sample((Message("user", (picture, Text(asked))),), name), answer, meta)
        for name in sorted(bard_set):
            problems.add("ids of Bard's set that no question has", name)

    @functools.cache
    def words() -> str:
        return PROMPT if official is None else _official_prompt(official)

    def prompt(question: Question, reply: str) -> Sequence[Mapping[str, str]]:
        truth = question.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        told = " | ".join((question.words, truth, reply, ""))
        return [{"role": "user", "content": f"{words()}\n{told}"}]

    wording = OUR_WORDING if official is None else f"that of {official.name}"
    return Benchmark(
        name="mmvet",
        load=load,
        score=score,
        source=SOURCE,
        report=report,
        headline="cap.total",
        sums=sums,
        answers=lambda path: answers(path, problems),
        max_new_tokens=MAX_NEW_TOKENS,
        metric="grade in %",
        judge=Judging(
            prompt=prompt, read=read, again=AGAIN, max_tokens=3, model="gpt-4-0613", wording=wording
        ),
    )


def _bard_set(path: Path) -> set[str]:
    found = read_json(path)
    if not isinstance(found, list):
        raise DataError(f"{path}: expected a list of ids, found {type(found).__name__}.")
    return set(map(text_of, found))


def _official_prompt(path: Path) -> str:
    """The text that the official scorer's source calls ``prompt``; the source is read, not run."""
    try:
        tree = ast.parse(read_text(path))
    except (SyntaxError, ValueError) as error:
        raise DataError(f"{path}: expected the official scorer, found no Python: {error}") from error
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "prompt" in names and isinstance(node.value.value, str):
                return node.value.value
    raise DataError(f"{path}: expected the official scorer, found no text called prompt in it.")


def answers(path: Path, problems: Problems) -> Iterator[Given]:
    """LLaVA's jsonl (``question_id`` N), ``{v1_N: text}``, our replies, official files of grades."""
    rows = list(answer_rows(path, problems))
    grades = {where: _grades(row["text"]) for where, row in rows if isinstance(row.get("text"), Mapping)}
    num_runs = max(map(len, grades.values()), default=0)
    for where, row in rows:
        name = first_of(row, ("question_id", "id"))
        name = f"v1_{name}" if name and name.isdecimal() else name
        if name is None:
            problems.add("answers without an id", where)
        elif where in grades and not grades[where]:
            problems.add(UNREADABLE, where)
        elif where in grades:
            told = row["text"].get("content")
            if len(grades[where]) < num_runs:
                problems.add("answers graded in fewer runs than others", where)
            if isinstance(told, list) and any(_number(text_of(one).split(" ")[0]) is None for one in told):
                problems.add("answers whose verdicts cannot be read, graded as the file has it", where)
            yield Given(name, "", where, grades[where])
        elif (text := reply_in(row, where, problems)) is not None:
            yield Given(name, text, where)


def _grades(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The grade of each run; none where they are no numbers."""
    found = row.get("score")
    if not isinstance(found, list) or not all(isinstance(one, int | float) for one in found):
        return ()
    return tuple(repr(float(one)) for one in found)


def _number(word: str) -> float | None:
    try:
        return float(word.strip())
    except ValueError:
        return None


def read(question: Question, reply: str, verdict: str) -> Score:
    """The number before the first space."""
    found = _number(verdict.split(" ")[0])
    if found is None or not 0 <= found <= 1:
        raise ValueError(f"expected a grade from 0.0 to 1.0, found {verdict[:40]!r}")
    return Score(found, parsed=repr(found))


def score(question: Question, reply: str) -> Score:
    """Without a judge nothing can be said: ``parsed`` is empty, and the report leaves it out."""
    return Score(0.0)


def report(scores: Sequence[Score]) -> Metrics:
    """``cap`` and ``cap_int``: per capability and per set of them; those of Bard's set in ``bardset``."""
    graded = [score for score in scores if score.parsed]
    bard = [score for score in graded if score.meta.get("bard_set") == "yes"]
    return _tables(graded) | ({"bardset": _tables(bard)} if bard else {})


def _tables(graded: Sequence[Score]) -> Metrics:
    if not graded:
        return {}
    runs = [[float(one) for one in score.parsed.split(BETWEEN)] for score in graded]
    caps = [score.meta["capability"] for score in graded]
    singly = _means([((*each.split("+"), "total"), of) for each, of in zip(caps, runs, strict=True)])
    return {"cap": singly, "cap_int": _means([((c, "total"), of) for c, of in zip(caps, runs, strict=True)])}


def _means(graded: Sequence[tuple[tuple[str, ...], list[float]]]) -> Metrics:
    """Name -> mean over questions, then over runs, in % with one decimal; the most frequent name first."""
    num_runs = max(len(runs) for _, runs in graded)
    sums: dict[str, Any] = {}
    nums: dict[str, Any] = {}
    for names, runs in graded:
        for name in names:
            # One after another, as officially: in another order a sum may end in another last digit.
            sums.setdefault(name, np.zeros(num_runs))[: len(runs)] += runs
            nums.setdefault(name, np.zeros(num_runs))[: len(runs)] += 1
    asked = {name: num > 0 for name, num in nums.items()}
    means = {name: sums[name][some] / nums[name][some] * 100 for name, some in asked.items()}
    total = means.pop("total")
    # numpy's rounding, as officially: Python's differs where the second decimal is a five.
    found = {
        name: float(np.round(means[name].mean(), 1)) for name in sorted(means, key=lambda n: -nums[n][0])
    }
    return found | {
        "total": float(np.round(total.mean(), 1)),
        "std": float(np.round(total.std(), 1)),
        "runs": str(np.round(total, 1).tolist()),
    }


def sums(scores: Sequence[Score]) -> Sums:
    """Of the total."""
    rows = np.array([(score.value, 1.0) for score in scores if score.parsed]).reshape(-1, 2)
    return Sums(rows, lambda all_: all_[..., 0] / all_[..., 1] * 100)


TASK = OnDisk(
    name="mmvet",
    title="open questions that need several abilities at once; wants a judge",
    source=SOURCE,
    files=(LABELS, BARD, OFFICIAL, PICTURES),
    open=open_folder,
    folders=("mm-vet", "MMVet"),
)
