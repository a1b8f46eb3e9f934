"""RefCOCO, RefCOCO+ and RefCOCOg: find what a phrase means in a picture, and give its box.

Scored as MiniGPT-v2 does, the only one of the families we follow whose code has these: ``acc``, of each split
and in per cent, is how many boxes overlap the true one by at least one half (intersection over union in
pixels, the last row and column included; MiniGPT-v2 asks for more than one half, which differs for exact ties
only). A reply without a box is wrong, and so is none. Beside it stand ``acc_plain``, without those last
pixels, as other scorers have it, and ``acc_padded``, where boxes are parts of the square that LLaVA-1.5 pads
a picture to: its training data has them so (https://github.com/haotian-liu/LLaVA/issues/606). The headline is
the mean of ``acc`` over the splits.

Asked in the words of LLaVA-1.5's training data; MiniGPT-v2's are "[refer] give me the location of ...". How
boxes are read from replies is told in ``eval/rules/boxes.py``.

Questions come in MiniGPT-v2's layout, ``refcoco_testA.json`` with rows of img_id, sents, bbox (x, y, width,
height in pixels), height and width; or from the Hub's lmms-lab/RefCOCO, RefCOCOplus and RefCOCOg
(``testA-*.parquet`` with question_id, image, answer, bbox). Answers may be MiniGPT-v2's
``{img_id: [reply, ...]}``, a file whose name ends in ``_testA.json`` or a folder of them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.eval.benchmark import Benchmark, File, Given, Metrics, OnDisk, Problems, Question, Score, Sums
from tinymodal.eval.files import find_file, need, parts_of, read_rows, text_of
from tinymodal.eval.given import UNANSWERED, answer_rows, first_of, reply_in
from tinymodal.eval.rules.boxes import Box, iou, read_box

REPOSITORY = "https://github.com/Vision-CAIR/MiniGPT-4/blob/45c07e56034412d4d26fcdd382e51434a7ae4ad3"
SOURCE = f"{REPOSITORY}/eval_scripts/eval_ref.py"
SPLITS: Mapping[str, tuple[str, ...]] = {
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
}
PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: {}."
"""As in llava_v1_5_mix665k.json, see https://github.com/haotian-liu/LLaVA/issues/623."""
PICTURES = File(
    ("COCO_train2014_*.jpg",), "pictures of COCO train2014", "https://cocodataset.org", optional=True
)
LONGEST_NAME = 27
"""Of ``COCO_train2014_000000581857_16`` so many characters name the picture, all of it the thing in it."""
HALF = 0.5
NO_BOX = "no box"


def files(name: str) -> tuple[File, ...]:
    """Of each split; one is enough."""
    origin = f"{REPOSITORY}/eval_scripts/EVAL_README.md"
    return tuple(
        File(
            (f"{name}_{split}.json", f"{split}-*.parquet"),
            f"phrases and boxes of {split}; one split is enough",
            origin,
            optional=True,
        )
        for split in SPLITS[name]
    )


def open_folder(name: str, folder: Path, problems: Problems) -> Benchmark:
    """One of the three over a folder with files of its splits, and pictures in it or below ``train2014``."""
    ids: dict[str, list[str]] = {}
    """Of the questions about a thing, by ``split/img_id``: everything that is said of it has the same box."""

    def load() -> Iterator[Question]:
        ids.clear()
        found = [find_file(folder, *file.patterns) for file in files(name)]
        if not any(found):
            need(folder, files(name)[0], name)
        picture = find_file(folder, *PICTURES.patterns)
        place = picture.parent if picture else folder / "train2014"
        for split, path in zip(SPLITS[name], found, strict=True):
            for where, row in _rows(path, problems):
                thing, box = text_of(row.get("img_id") or row.get("question_id")), row.get("bbox")
                said = row.get("sents") or row.get("answer")
                image, size = _image(row, place / f"{thing[:LONGEST_NAME]}.jpg")
                if not (thing and said and len(size) == 2 and _is_box(box)):
                    problems.add("questions without id, phrase, box or size", where)
                    continue
                meta = {"split": split, "box": _joined((*box, *size))}
                right = _true(box).scaled(1 / size[0], 1 / size[1])
                answer = f"[{right.left:.2f}, {right.top:.2f}, {right.right:.2f}, {right.bottom:.2f}]"
                of = ids.setdefault(f"{split}/{thing}", [])
                for phrase in [said] if isinstance(said, str) else said:
                    of.append(f"{split}/{thing}/{len(of)}")
                    parts = (image, Text(PROMPT.format(text_of(phrase).rstrip("."))))
                    yield Question(Sample((Message("user", parts),), of[-1]), answer, meta)

    def answers(path: Path) -> Iterator[Given]:
        for file in sorted(path.glob("*.json*")) if path.is_dir() else [path]:
            named = [split for split in SPLITS[name] if file.name.partition(".")[0].endswith(f"_{split}")]
            for where, row in answer_rows(file, problems):
                thing = first_of(row, ("id", "question_id"))
                if thing is None:
                    problems.add("answers without an id", where)
                    continue
                keys = (f"{split}/{thing}" for split in named or SPLITS[name])
                of = next((ids[key] for key in keys if key in ids), [thing])
                # A reply to each phrase of a thing may be told in a list.
                each = [{"text": one} for one in row["text"]] if isinstance(row.get("text"), list) else [row]
                for number, one in enumerate(each):
                    which = of[number] if number < len(of) else f"{thing}/{number}"
                    if (text := reply_in(one, where, problems, ("text", "reply"))) is not None:
                        yield Given(which, text, where)

    return Benchmark(
        name=name,
        load=load,
        score=score,
        source=SOURCE,
        report=report,
        headline="mean",
        sums=sums,
        answers=answers,
        unanswered="wrong",
        max_new_tokens=64,
    )


def score(question: Question, reply: str) -> Score:
    said = read_box(reply)
    if said is None:
        return Score(0.0, parsed=NO_BOX)
    overlap = _overlap(said, _numbers(question.meta["box"]), pixel=1.0)
    return Score(float(overlap >= HALF), parsed=_joined(said))


def _rows(path: Path | None, problems: Problems) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a split; none where it has no file."""
    if path is not None:
        for file in parts_of(path, problems):
            yield from read_rows(file, problems)


def _image(row: Mapping[str, Any], otherwise: Path) -> tuple[Image, tuple[float, ...]]:
    """The picture, and its width and height in pixels; none where they are not told."""
    content = row["image"].get("bytes") if isinstance(row.get("image"), dict) else None
    if content is None:
        return Image(otherwise), tuple(row[key] for key in ("width", "height") if row.get(key))
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(content)) as opened:  # reads the head only
            return Image(content), opened.size
    except OSError:
        return Image(content), ()


def _is_box(box: object) -> TypeGuard[list[float]]:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(edge, int | float) for edge in box)


def _joined(numbers: Sequence[float]) -> str:
    return ",".join(map(str, numbers))


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _true(box: Sequence[Any]) -> Box:
    left, top, width, height = box
    return Box(left, top, left + width, top + height)


def _overlap(said: Box, true: Sequence[Any], *, pixel: float, padded: bool = False) -> Any:
    """Of a box in parts of the picture, or many, with the true: left, top, width, height, picture's size."""
    *box, width, height = true
    if padded:
        side = np.maximum(width, height)
        # LLaVA's expand2square puts the picture in the middle, at a whole pixel.
        across, down = (side - width) // 2, (side - height) // 2
        left, top, right, bottom = said.scaled(side, side)
        return iou(Box(left - across, top - down, right - across, bottom - down), _true(box), pixel)
    return iou(said.scaled(width, height), _true(box), pixel)


def _by_split(scores: Sequence[Score]) -> dict[str, list[Score]]:
    """Those with any answer."""
    groups: dict[str, list[Score]] = {}
    for one in scores:
        groups.setdefault(one.meta["split"], []).append(one)
    return {split: of for split, of in groups.items() if any(one.parsed != UNANSWERED for one in of)}


def sums(scores: Sequence[Score]) -> Sums:
    """Of the mean over the splits."""
    splits = [*_by_split(scores)]
    rows = np.zeros((len(scores), 2 * len(splits)))
    for row, one in zip(rows, scores, strict=True):
        if one.meta["split"] in splits:
            column = 2 * splits.index(one.meta["split"])
            row[column : column + 2] = one.value, 1
    return Sums(rows, lambda all_: 100 * (all_[..., ::2] / all_[..., 1::2]).mean(axis=-1))


def report(scores: Sequence[Score]) -> Metrics:
    """In per cent: of each split with answers, by three ways to overlap, and the mean of the first."""
    found: Metrics = {}
    for split, of in _by_split(scores).items():
        read = [one for one in of if one.parsed not in (NO_BOX, UNANSWERED)]
        said = Box(*np.array([_numbers(one.parsed) for one in read]).reshape(-1, 4).T)
        true = np.array([_numbers(one.meta["box"]) for one in read]).reshape(-1, 6).T
        plain = int((_overlap(said, [*true], pixel=0.0) >= HALF).sum())
        padded = int((_overlap(said, [*true], pixel=1.0, padded=True) >= HALF).sum())
        right = int(sum(one.value for one in of))
        shares = {"acc": right, "acc_plain": plain, "acc_padded": padded}
        found[split] = {"n": len(of)} | {name: count / len(of) * 100 for name, count in shares.items()}
    means = [found[split]["acc"] for split in found]
    return found | ({"mean": sum(means) / len(means)} if means else {})


TASKS = tuple(
    OnDisk(
        name=name,
        title=f"boxes of what a phrase means, {name}",
        source=SOURCE,
        files=(*files(name), PICTURES),
        open=partial(open_folder, name),
        folders=folders,
    )
    for name, folders in (
        ("refcoco", ("RefCOCO",)),
        ("refcoco+", ("RefCOCOplus", "RefCOCO+", "refcoco_plus")),
        ("refcocog", ("RefCOCOg",)),
    )
)
