"""TextCaps: a caption of a picture with words in it, against five that people wrote.

3,166 pictures of the validation set (Sidorov et al., ECCV 2020, arXiv:2003.12462). CIDEr and BLEU-1 to BLEU-4
have the names and units of the official scorer, pycocoevalcap; papers print them times 100. As there, only
pictures with a caption count, and CIDEr weighs words by how many of these pictures' references have them. How
captions become words, and how far that is from the official Java, is told in ``eval/rules/captions.py``. The
value of a single caption is a tenth of its CIDEr among all pictures of the folder.

Asked in the words of LLaVA-1.5's training data. Questions come from ``TextCaps_0.1_val.json``, which has a
row for each reference and all of a picture's in each row, or from the Hub's lmms-lab/TextCaps
(``val-*.parquet`` with image_id, image, caption_str). Answers may be rows of image_id and caption, as test
servers take them, or LLaVA's and ours with image ids as question ids.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.eval.benchmark import Benchmark, File, Given, Metrics, OnDisk, Problems, Question, Score, Sums
from tinymodal.eval.files import need, rows_of, text_of
from tinymodal.eval.given import answer_rows, first_of, reply_in
from tinymodal.eval.intervals import mean_of
from tinymodal.eval.rules.captions import TOP, Cider, bleu, words

SOURCE = "https://pypi.org/project/pycocoevalcap/1.2/"
ORIGIN = "https://textvqa.org/textcaps/dataset"
CAPTIONS = File(("TextCaps_0.1_val.json", "val-*.parquet"), "the references", ORIGIN)
PICTURES = File(("train_images/*.jpg",), "pictures of OpenImages, as TextVQA's", ORIGIN, optional=True)
PROMPT = "Provide a one-sentence caption for the provided image."
"""In the table of LLaVA-1.5's training data, https://arxiv.org/abs/2310.03744; lmms-eval asks it too."""


def open_folder(folder: Path, problems: Problems) -> Benchmark:
    """TextCaps over a folder with its references, and the pictures in ``train_images``."""

    def load() -> Iterator[Question]:
        for name, captions, image in _pictures(folder, problems):
            parts = (image, Text(PROMPT))
            yield Question(Sample((Message("user", parts),), name), "\n".join(captions), {"image": name})

    @functools.cache
    def whole() -> Cider:
        seen = _pictures(folder, Problems())
        return Cider({name: [words(caption) for caption in captions] for name, captions, _ in seen})

    @functools.lru_cache(maxsize=1)
    def measured(captions: tuple[tuple[str, str], ...]) -> tuple[list[float], list[float]]:
        """Of (picture, words of its caption): the CIDEr of each, and BLEU of all."""
        made = {name: tuple(text.split()) for name, text in captions}
        written = {name: whole().references[name] for name in made}
        among = whole() if len(written) == len(whole().references) else Cider(written)
        return [among.score(name, made[name]) for name in made], bleu([*made.values()], [*written.values()])

    def said(scores: Sequence[Score]) -> tuple[tuple[str, str], ...]:
        return tuple((score.meta["image"], score.parsed) for score in scores)

    def answers(path: Path) -> Iterator[Given]:
        seen = set()
        for where, row in answer_rows(path, problems):
            name = first_of(row, ("image_id", "question_id", "id", "image"))
            if name is None:
                problems.add("answers without an id", where)
                continue
            text = reply_in(row, where, problems, ("caption", "text", "reply", "prediction", "answer"))
            # Predictions for each reference of a picture, as M4C-Captioner writes them, are one.
            if text is not None and (name, text) not in seen:
                seen.add((name, text))
                yield Given(name.removesuffix(".jpg"), text, where)

    def score(question: Question, reply: str) -> Score:
        caption = words(reply)
        return Score(whole().score(question.sample.id, caption) / TOP, parsed=" ".join(caption))

    def report(scores: Sequence[Score]) -> Metrics:
        if not scores:
            return {}
        ciders, bleus = measured(said(scores))
        return {f"Bleu_{n}": value for n, value in enumerate(bleus, 1)} | {"CIDEr": sum(ciders) / len(ciders)}

    def sums(scores: Sequence[Score]) -> Sums:
        """Of CIDEr; how much a word weighs stays as it is in a draw of pictures."""
        return mean_of(measured(said(scores))[0])

    return Benchmark(
        name="textcaps",
        load=load,
        score=score,
        source=SOURCE,
        report=report,
        headline="CIDEr",
        sums=sums,
        answers=answers,
        max_new_tokens=64,
        metric="CIDEr",
    )


class Picture(NamedTuple):
    """What a folder tells of one."""

    name: str
    captions: Sequence[str]
    image: Image


def _pictures(folder: Path, problems: Problems) -> Iterator[Picture]:
    """Each picture once, with all its references."""
    path = need(folder, CAPTIONS, "textcaps")
    captions: dict[str, list[str]] = {}
    images: dict[str, Image] = {}
    for where, row in rows_of(path, "data", problems):
        name, own, every = text_of(row.get("image_id")), row.get("caption_str"), row.get("reference_strs")
        own = [own] if isinstance(own, str) else own or []
        if not name or not (own or every):
            problems.add("questions without id or references", where)
            continue
        content = row["image"].get("bytes") if isinstance(row.get("image"), dict) else None
        images.setdefault(name, Image(content or folder / "train_images" / f"{name}.jpg"))
        captions[name] = [*every] if every else [*captions.get(name, ()), *own]
    for name, written in captions.items():
        yield Picture(name, written, images[name])


TASK = OnDisk(
    name="textcaps",
    title="captions of pictures with words in them",
    source=SOURCE,
    files=(CAPTIONS, PICTURES),
    open=open_folder,
    folders=("TextCaps",),
)
