"""MMBench: questions with up to four options, asked with the options in every order.

Liu et al., ECCV 2024, arXiv:2307.06281. A file has each question once and, as row ``index + k * 1,000,000``,
again with its options turned by k places. Circular evaluation counts a question if the replies to all its
rows are right; vanilla evaluation counts its first row. ``mmbench_circular`` turns the options itself where
the file has each question once; ``mmbench_cn`` takes the Chinese file, which the others refuse.

A reply is read as VLMEvalKit matches it: a letter, else an option's text, else a judge has to tell, and
without one it is wrong. Rows come question by question, so that the first N are whole questions.

Files: the tsv of LLaVA's instructions or VLMEvalKit's, whose copies name another row's picture; a table of
results (xlsx), which holds the questions too; or the parquet of https://huggingface.co/datasets/lmms-lab/MMBench.
Columns ``index, question, hint, A, B, C, D, answer, category, l2-category, image``. A file without answers,
as that of the test server, can be asked and handed in (:func:`submission`), and has no score here. Prompt:
https://github.com/haotian-liu/LLaVA/blob/v1.2.2/llava/eval/model_vqa_mmbench.py, ``--single-pred-prompt``; in
Chinese where the name of the file or of its folder says ``cn``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.eval.benchmark import (
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
from tinymodal.eval.files import find_file, id_of, need, parts_of, read_rows, text_of
from tinymodal.eval.given import MISSING
from tinymodal.eval.intervals import mean_sums
from tinymodal.eval.rules import choices
from tinymodal.eval.rules.choices import is_nothing, matched_letter

SOURCE = "https://github.com/open-compass/VLMEvalKit/blob/674affd92d715a81af5811127cbc73b57ec4fafa/vlmeval/evaluate/multiple_choice.py"
ORIGIN = "https://github.com/open-compass/MMBench"
ENGLISH = File(
    (
        *("mmbench_dev_20230712.tsv", "mmbench_dev_en*.tsv", "MMBench_DEV_EN*.tsv", "mmbench*.tsv"),
        *("MMBench*.tsv", "en/dev-*.parquet", "dev-*.parquet", "*.xlsx"),
    ),
    "questions, options, pictures and answers",
    ORIGIN,
)
CHINESE = File(
    (
        *("mmbench_dev_cn*.tsv", "MMBench_DEV_CN*.tsv", "mmbench*cn*.tsv", "MMBench*CN*.tsv"),
        *("cn/dev-*.parquet", "*cn*.xlsx", "*CN*.xlsx"),
    ),
    ENGLISH.what,
    ORIGIN,
)
JUDGE = "gpt-3.5-turbo-0125"
"""``chatgpt-0125`` of https://github.com/open-compass/VLMEvalKit/blob/01424f9929593c12491c19b790ad1be017926552/vlmeval/dataset/image_mcq.py"""
TURN = 1_000_000
SHORTEST_PICTURE = 64
"""Characters; a shorter ``image`` is the index of the row that holds the picture, as VLMEvalKit has it."""
ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
"""Under which the official scorer prints the l2-categories."""
GROUPED_BY = ("l2-category", "category")
COLUMNS = ("index", "question", *"ABCD", "prediction", "answer", "split", "category", "l2-category")
"""Of a table of results; to ``split`` as LLaVA hands it in."""


def open_folder(folder: Path, problems: Problems, *, name: str, file: File, turning: bool) -> Benchmark:
    """MMBench over a folder with its table.

    Args:
        folder: where the table is.
        problems: what is wrong with rows is noted there.
        name: of the benchmark.
        file: the table.
        turning: make copies with turned options where the table has none.
    """
    orders: dict[tuple[str, tuple[str, ...]], str] = {}

    def load() -> Iterator[Question]:
        found = _found(folder, file, name)
        chinese = _is_chinese(folder, found)
        for rows in _groups(folder, found, problems):
            for row in _turned(rows[0]) if turning and len(rows) == 1 else rows:
                orders[str(row["group"]), tuple(choices.options_of(row).values())] = row["index"]
                yield _question(row, choices.DIRECTLY_CHINESE if chinese else choices.DIRECTLY)

    def answers(path: Path) -> Iterator[Given]:
        for said in choices.said_rows(path, problems):
            at: str | None = said.id
            if text_of(said.row.get("round_id")) not in ("", "0"):
                # LLaVA turned the options itself. load() comes before: it knows the orders that were asked.
                at = orders.get((said.id, tuple(map(text_of, said.row.get("options") or ()))))
            if at is None:
                problems.add("answers to an order of options that was not asked", said.where)
            else:
                yield Given(at, said.text, said.where)

    def submit(texts: Mapping[str, str], path: Path, noted: Problems) -> None:
        asked = list(load())
        for question in asked:
            if question.sample.id not in texts:
                noted.add(MISSING, question.sample.id)
        submission(asked, texts, path)

    return Benchmark(
        submit=submit,
        name=name,
        load=load,
        score=score,
        source=SOURCE,
        report=report,
        headline="circular_acc",
        sums=sums,
        answers=answers,
        unanswered="wrong",
        judge=Judging(prompt=asked_of_judge, read=read_verdict, model=JUDGE, max_tokens=64, fallback=True),
        max_new_tokens=64,
    )


def _found(folder: Path, file: File, name: str) -> Path:
    """The table, in the language of the benchmark; the patterns of the English one fit the Chinese as well.

    Raises:
        DataError: none is there, or only the Chinese one where the English one is asked.
    """
    found = need(folder, file, name)
    if file is CHINESE or not _is_chinese(folder, found):
        return found
    others = (find_file(folder, pattern) for pattern in file.patterns)
    english = next((at for at in others if at is not None and not _is_chinese(folder, at)), None)
    if english is None:
        raise DataError(
            f"{name}: {found} is the Chinese table; expected the English one, such as "
            f"{file.patterns[0]}. Put it there, or give --on {IN_CHINESE.name}."
        )
    return english


def _is_chinese(folder: Path, table: Path) -> bool:
    """Whether its name says so, else the folder that it is in."""
    named = f"{folder.name}/{table.relative_to(folder).as_posix()}".lower()
    said = re.findall(r"(?<![a-z])(cn|en)(?![a-z])", named)
    return bool(said) and said[-1] == "cn"


def _groups(folder: Path, found: Path, problems: Problems) -> Iterable[list[dict[str, Any]]]:
    """The rows of each question, the first one first; those without id or answer are noted and left out."""
    groups: dict[int, list[dict[str, Any]]] = {}
    pictures: dict[str, bytes | Path] = {}
    for path in parts_of(found, problems):
        for where, cells in read_rows(path, problems):
            row = {key if key in choices.LETTERS else key.lower(): value for key, value in cells.items()}
            index = id_of(row.get("index"))
            if not index.isdecimal():
                problems.add("questions without id or answer", f"{where}: index {index!r}")
                continue
            group = int(index) % TURN
            image = row.get("image")
            if isinstance(image, str) and len(image) <= SHORTEST_PICTURE and not is_nothing(image):
                source: Any = image  # the index of another row
            else:
                source = choices.picture(image, folder / "images" / f"{group}.jpg", where, problems)
                pictures[index] = source
            row |= {"index": index, "group": group, "image": source, "where": where}
            groups.setdefault(group, []).append(row)
    # Of the test split only the server knows the answers.
    hidden = all(is_nothing(row.get("answer")) for rows in groups.values() for row in rows)
    if hidden and groups:
        problems.add("files without answers", f"{found.name}: hand in the replies, see mmbench.submission")
    for group, rows in groups.items():
        kept = []
        copies = len({row["index"] for row in rows})
        for row in sorted(rows, key=lambda row: int(row["index"])):
            row["copies"] = copies
            row["answer"] = "" if hidden else text_of(row.get("answer"))
            if not hidden and (len(row["answer"]) != 1 or row["answer"] not in choices.LETTERS):
                problems.add("questions without id or answer", f"{row['where']}: answer {row['answer']!r}")
                continue
            if isinstance(row["image"], str):
                row["image"] = pictures.get(row["image"], folder / "images" / f"{group}.jpg")
            kept.append(row)
        yield kept


def _turned(first: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The row, and its copies with the last k options first, as the official copies have them."""
    options = list(choices.options_of(first).values())
    copies = max(1, len(options))
    found = []
    for k in range(copies):
        turned = choices.lettered(options[copies - k :] + options[: copies - k])
        right = (choices.LETTERS.find(first["answer"] or "?") + k) % copies
        answer = choices.LETTERS[right] if first["answer"] in choices.options_of(first) else first["answer"]
        index = str(int(first["index"]) + k * TURN)
        found.append({**first, **turned, "index": index, "answer": answer, "copies": copies})
    return found


def _question(row: Mapping[str, Any], ending: str) -> Question:
    hint = "" if is_nothing(row.get("hint")) else text_of(row["hint"]) + "\n"
    asked = hint + text_of(row.get("question")) + choices.option_lines(choices.options_of(row)) + ending
    meta = {"group": str(row["group"]), "copy": str(int(row["index"]) // TURN), "copies": str(row["copies"])}
    kept = ("split", *GROUPED_BY, "question", *"ABCD")
    meta |= {key: text_of(row[key]) for key in kept if not is_nothing(row.get(key))}
    if not row["answer"]:
        meta["hidden"] = "yes"
    sample = Sample((Message("user", (Image(row["image"]), Text(asked))),), row["index"])
    return Question(sample, row["answer"], meta)


def _options(meta: Mapping[str, str]) -> dict[str, str]:
    return {letter: meta[letter] for letter in "ABCD" if letter in meta}


def _scored(question: Question, said: str | None) -> Score:
    return Score(float(said is not None and said == question.answer), parsed=said or "")


def score(question: Question, reply: str) -> Score:
    return _scored(question, matched_letter(reply, _options(question.meta)))


def asked_of_judge(question: Question, reply: str) -> Sequence[Mapping[str, str]]:
    """Nothing where the reply can be read without a judge, or is empty."""
    options = _options(question.meta)
    if not reply.strip() or matched_letter(reply, options) is not None:
        return ()
    return choices.judge_prompt(question.meta.get("question", ""), options, reply)


def read_verdict(question: Question, reply: str, verdict: str) -> Score:
    said = matched_letter(verdict, _options(question.meta))
    if said is None:
        raise ValueError(
            f"{verdict!r} names no option; expected one letter of {', '.join(_options(question.meta))} or Z"
        )
    return _scored(question, said)


def _known(scores: Sequence[Score]) -> list[Score]:
    return [one for one in scores if "hidden" not in one.meta]


def _firsts(scores: Sequence[Score]) -> list[Score]:
    """The first row of each question."""
    return [one for one in scores if one.meta["copy"] == "0"]


def _circular(scores: Sequence[Score]) -> list[Score]:
    """A score of each question whose rows were all scored: 1 if all are right; empty where none has copies.

    A question of which rows are missing, as at a limit, is left out: it would be right too easily.
    """
    groups: dict[str, list[Score]] = {}
    for one in scores:
        groups.setdefault(one.meta["group"], []).append(one)
    whole = [
        Score(min(one.value for one in rows), meta=rows[0].meta)
        for rows in groups.values()
        if len(rows) == int(rows[0].meta["copies"]) and any(one.meta["copy"] == "0" for one in rows)
    ]
    return whole if any(one.meta["copies"] != "1" for one in scores) else []


def sums(scores: Sequence[Score]) -> Sums:
    """Of the circular accuracy, a unit per question; of the vanilla one where there are no copies."""
    known = _known(scores)
    return mean_sums(_circular(known) or _firsts(known))


def report(scores: Sequence[Score]) -> Metrics:
    """Circular and vanilla accuracy, 0 to 1; both also by l2-category and category where a file has them."""
    found: Metrics = {}
    known = _known(scores)
    if circular := _circular(known):
        found |= {"groups": len(circular), "circular_acc": _mean(circular)} | _by_category(circular)
    if firsts := _firsts(known):
        found["vanilla_acc_first_pass"] = _mean(firsts)
        if by_category := _by_category(firsts):
            found["vanilla"] = by_category
    return found | {"n_rows": len(scores)}


def _by_category(scores: Sequence[Score]) -> Metrics:
    found: Metrics = {}
    for key in GROUPED_BY:
        groups: dict[str, list[Score]] = {}
        for one in scores:
            if key in one.meta:
                groups.setdefault(one.meta[key], []).append(one)
        if groups:
            found[key] = {ABBREVIATIONS.get(name, name): _mean(groups[name]) for name in sorted(groups)}
    return found


def _mean(scores: Sequence[Score]) -> float:
    return sum(one.value for one in scores) / len(scores)


def submission(questions: Iterable[Question], texts: Mapping[str, str], path: Path) -> None:
    """Write replies as the test server and VLMEvalKit read them: an xlsx with a row per question.

    Args:
        questions: of this benchmark, as its ``load`` gives them.
        texts: sample id -> reply; a question without one gets an empty cell.
        path: of the xlsx; an older one is replaced.

    Source: https://github.com/haotian-liu/LLaVA/blob/524a75b74254717057ee196b507668ebd314a280/scripts/convert_mmbench_for_submission.py
    """
    in_order = sorted(questions, key=lambda question: int(question.sample.id))
    rows = (
        {
            **question.meta,
            "index": int(question.sample.id),
            "prediction": texts.get(question.sample.id),
            "answer": question.answer,
        }
        for question in in_order
    )
    choices.write_xlsx(path, COLUMNS, rows)


def _task(name: str, title: str, file: File, folders: tuple[str, ...], *, turning: bool = False) -> OnDisk:
    return OnDisk(
        name=name,
        title=title,
        source=SOURCE,
        files=(file,),
        open=partial(open_folder, name=name, file=file, turning=turning),
        folders=folders,
    )


FOLDERS = ("mmbench", "MMBench")
TASK = _task("mmbench", "questions with options in every order", ENGLISH, FOLDERS)
CIRCULAR = _task("mmbench_circular", "MMBench; orders are made where missing", ENGLISH, FOLDERS, turning=True)
IN_CHINESE = _task("mmbench_cn", "MMBench in Chinese", CHINESE, FOLDERS)
TASKS = (TASK, CIRCULAR, IN_CHINESE)
