"""Made data with known answers: drawn scenes, and questions that cannot be answered without looking.

A scene is a 3 x 3 board of 32 px cells (96 x 96 px in all). A cell is empty or holds one thing, a little off
its centre: a coloured shape, a drawn number of one or two digits, or a real handwritten digit (a scan out of
scikit-learn's ``digits``, UCI "Optical Recognition of Handwritten Digits", 8 x 8 px). Everything follows
from ``(split, seed, index)``, so a sample can be made again anywhere, in any order, by any worker.

What keeps the scores honest:

* six of the 36 pairs of shape and colour (``UNSEEN_PAIRS``) never occur in training, neither drawn nor named;
* the scans of ``train``, ``val`` and ``test`` differ; recipes are chosen on ``val``, ``test`` is opened once;
* answers are balanced by construction where a constant would otherwise do well (yes/no, counts, places).

The same scene can be *written*: a 3 x 3 px picture whose pixels are codes instead of colours. A language
model that has read many written scenes knows how to look things up before it meets a vision tower.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image as Pictures
from PIL import ImageChops, ImageDraw, ImageFont

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Message, Part, Sample, Text

Split = Literal["train", "val", "test"]
Random = random.Random
Picture = Pictures.Image

SIZE_PX = 96
CELL_PX = 32
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 205, 30),
    "purple": (140, 50, 170),
    "orange": (245, 130, 25),
}
COLOUR_NAMES = tuple(COLOURS)
# More of the world than the questions ask about. Parts are pretrained on it: a part that has met ten shapes
# in ten colours takes shape and colour apart, and copes better with a pair it never met.
WIDE_SHAPES = (*SHAPES, "heart", "moon", "arrow", "bar")
WIDE_COLOURS = {
    **COLOURS,
    "pink": (250, 140, 190),
    "brown": (125, 75, 35),
    "grey": (140, 140, 140),
    "cyan": (70, 205, 225),
}
WIDE_COLOUR_NAMES = tuple(WIDE_COLOURS)
SIZES = ("small", "big")
RADIUS_PX = {"small": (5.5, 7.0), "big": (10.5, 12.5)}
JITTER_PX = 3
# One per colour and one per shape, so that every colour and every shape is still learned from the others.
UNSEEN_PAIRS = frozenset((SHAPES[i], COLOUR_NAMES[(2 * i + 1 + i // 3) % 6]) for i in range(6))
PAIRS = tuple((s, c) for s in SHAPES for c in COLOUR_NAMES)
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in UNSEEN_PAIRS)
WIDE_PAIRS = tuple((s, c) for s in WIDE_SHAPES for c in WIDE_COLOURS if (s, c) not in UNSEEN_PAIRS)

TARGET_HEADS = (4, len(WIDE_SHAPES), len(WIDE_COLOURS), len(SIZES), 11, 10, 10, len(PLACES))
"""Classes per target head: what (nothing, shape, number, scan), shape, colour, size, tens (10: none), ones,
handwritten digit, place. A head that does not apply to a cell has the label -100."""


@dataclass(frozen=True, slots=True)
class Thing:
    """What one cell holds. ``number`` is the drawn number or the scan's digit; ``scan`` the scan's index."""

    cell: int
    what: Literal["shape", "number", "scan"]
    shape: str = ""
    colour: str = ""
    size: str = ""
    number: int = -1
    scan: int = -1

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        return PLACES[self.cell]


Scene = tuple[Thing, ...]
Pair = tuple[str, str]
"""Shape and colour."""


# --- pictures -------------------------------------------------------------------------------------


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray, dict[str, tuple[int, ...]]]:
    """Scans uint8 [1797, 8, 8] (0..255), their digits, and the disjoint indices of each split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "made scenes need scikit-learn's scans of digits: pip install 'tinymodal[demo]'"
        ) from error
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target)).tolist()
    splits = {"train": tuple(order[500:]), "val": tuple(order[:200]), "test": tuple(order[200:500])}
    return (digits.images * (255 / 16)).astype(np.uint8), digits.target, splits


@functools.cache
def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)


@functools.cache
def _grain() -> tuple[Picture, ...]:
    """A few fields of paper grain, mean 128: drawn once, as noise per picture costs more than the picture."""
    rng = np.random.default_rng(1)
    return tuple(
        Pictures.fromarray(rng.normal(128, 5, (SIZE_PX, SIZE_PX, 3)).clip(0, 255).astype(np.uint8))
        for _ in range(32)
    )


def _outline(shape: str, turn: float) -> list[tuple[float, float]]:
    """Corners of a shape of radius 1 around (0, 0), turned by ``turn`` radians."""
    if shape == "square":
        points = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    elif shape == "triangle":
        points = [(0.0, -1.05), (0.98, 0.75), (-0.98, 0.75)]
    elif shape == "star":
        points = [
            (r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5))
            for i, r in enumerate((1.12, 0.45) * 5)
        ]
    elif shape == "heart":
        points = [(0, 0.95), (-0.95, -0.05), (-0.98, -0.5), (-0.7, -0.85), (-0.3, -0.82), (0, -0.45)]
        points += [(-x, y) for x, y in points[:0:-1]]
    elif shape == "moon":
        angles = [math.pi * (0.3 + 1.4 * i / 10) for i in range(11)]
        points = [(math.cos(a), math.sin(a)) for a in angles] + [
            (0.4 + 0.8 * math.cos(a), 0.8 * math.sin(a)) for a in angles[::-1]
        ]
    elif shape == "arrow":
        points = [(-1, -0.3), (0.1, -0.3), (0.1, -0.85), (1.05, 0), (0.1, 0.85), (0.1, 0.3), (-1, 0.3)]
    elif shape == "bar":
        points = [(-1.1, -0.32), (1.1, -0.32), (1.1, 0.32), (-1.1, 0.32)]
    else:  # cross
        a, b = 1.0, 0.34
        points = [
            (-b, -a),
            (b, -a),
            (b, -b),
            (a, -b),
            (a, b),
            (b, b),
            (b, a),
            (-b, a),
            (-b, b),
            (-a, b),
            (-a, -b),
            (-b, -b),
        ]
    sin, cos = math.sin(turn), math.cos(turn)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


def draw(scene: Scene, rng: Random) -> Picture:
    """The scene as an RGB picture of 96 x 96 px; ``rng`` decides tints, grain, turns and offsets."""
    scale = 2  # drawn at twice the size and halved: soft edges
    paper = tuple(rng.randint(215, 255) for _ in range(3))
    canvas = Pictures.new("RGB", (SIZE_PX * scale, SIZE_PX * scale), paper)
    pen = ImageDraw.Draw(canvas)
    for thing in scene:
        row, column = divmod(thing.cell, 3)
        x = scale * (CELL_PX * (column + 0.5) + rng.uniform(-JITTER_PX, JITTER_PX))
        y = scale * (CELL_PX * (row + 0.5) + rng.uniform(-JITTER_PX, JITTER_PX))
        if thing.what == "shape":
            r = scale * rng.uniform(*RADIUS_PX[thing.size])
            ink = tuple(min(255, max(0, v + rng.randint(-18, 18))) for v in WIDE_COLOURS[thing.colour])
            if thing.shape == "circle":
                pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
            elif thing.shape == "ring":
                pen.ellipse((x - r, y - r, x + r, y + r), outline=ink, width=max(3, round(r * 0.36)))
            else:
                turn = rng.uniform(-0.25, 0.25)
                pen.polygon([(x + r * px, y + r * py) for px, py in _outline(thing.shape, turn)], fill=ink)
        else:
            shade = rng.randint(0, 90)
            if thing.what == "number":
                font = _font(scale * rng.randint(17, 21))
                pen.text((x, y), str(thing.number), fill=(shade, shade, shade), font=font, anchor="mm")
            else:
                side = scale * rng.randint(21, 26)
                scan = Pictures.fromarray(_scans()[0][thing.scan]).resize(
                    (side, side), Pictures.Resampling.BICUBIC
                )
                inked = Pictures.new("RGB", (side, side), (shade, shade, shade))
                canvas.paste(inked, (round(x - side / 2), round(y - side / 2)), scan)
    small = canvas.reduce(scale)
    return ImageChops.add(small, rng.choice(_grain()), 1, -128)


WRITTEN_CODES = 64
"""Codes a channel of a written scene can hold, see :func:`written`."""


def written(scene: Scene) -> Picture:
    """The scene as an RGB picture of 3 x 3 px whose channels are codes below ``WRITTEN_CODES``; 0 is nothing.

    Red: 1 + shape, 20 a number, 21 a scan. Green: 1 + colour, 20 + tens (10: none), 40 + handwritten digit.
    Blue: 1 + size, 10 + ones.
    """
    codes = np.zeros((3, 3, 3), np.uint8)
    for thing in scene:
        row, column = divmod(thing.cell, 3)
        if thing.what == "shape":
            shape, colour = WIDE_SHAPES.index(thing.shape), WIDE_COLOUR_NAMES.index(thing.colour)
            code = (1 + shape, 1 + colour, 1 + SIZES.index(thing.size))
        elif thing.what == "number":
            code = (20, 20 + _tens(thing.number), 10 + thing.number % 10)
        else:
            code = (21, 40 + thing.number, 0)
        codes[row, column] = code
    return Pictures.fromarray(codes)


def _tens(number: int) -> int:
    return number // 10 if number > 9 else 10


def targets(scene: Scene) -> tuple[tuple[int, ...], ...]:
    """What each of the nine cells shows, a class per head of ``TARGET_HEADS`` (-100: does not apply)."""
    rows = [[0, -100, -100, -100, -100, -100, -100, place] for place in range(9)]
    for thing in scene:
        row = rows[thing.cell]
        if thing.what == "shape":
            row[:2] = 1, WIDE_SHAPES.index(thing.shape)
            row[2:4] = WIDE_COLOUR_NAMES.index(thing.colour), SIZES.index(thing.size)
        elif thing.what == "number":
            row[0], row[4], row[5] = 2, _tens(thing.number), thing.number % 10
        else:
            row[0], row[6] = 3, thing.number
    return tuple(tuple(row) for row in rows)


@dataclass(frozen=True, slots=True)
class World:
    """What a scene may be made of: the scans of one split, and the pairs of shape and colour that occur."""

    split: Split = "train"
    pairs: Sequence[Pair] = SEEN_PAIRS

    def __post_init__(self) -> None:
        if self.split not in ("train", "val", "test"):
            raise DataError(f"made scenes: found split {self.split!r}, expected train, val or test")


# --- scenes ---------------------------------------------------------------------------------------


class _Board:
    """Cells of a scene being laid out."""

    def __init__(self, rng: Random, world: World) -> None:
        self.rng, self.world = rng, world
        self.free = rng.sample(range(9), 9)
        self.things: list[Thing] = []

    def shape(self, pair: Pair | None = None, size: str | None = None) -> Thing:
        shape, colour = pair or self.rng.choice(self.world.pairs)
        thing = Thing(self.free.pop(), "shape", shape, colour, size or self.rng.choice(SIZES))
        self.things.append(thing)
        return thing

    def number(self) -> Thing:
        number = self.rng.randint(0, 9) if self.rng.random() < 0.4 else self.rng.randint(10, 99)
        self.things.append(Thing(self.free.pop(), "number", number=number))
        return self.things[-1]

    def scan(self) -> Thing:
        _, digits, splits = _scans()
        index = self.rng.choice(splits[self.world.split])
        self.things.append(Thing(self.free.pop(), "scan", number=int(digits[index]), scan=index))
        return self.things[-1]

    def scene(self) -> Scene:
        return tuple(sorted(self.things, key=lambda thing: thing.cell))


def _shapes(scene: Scene) -> list[Thing]:
    return [thing for thing in scene if thing.what == "shape"]


def _random_scene(
    rng: Random, world: World, subject: Pair | None, crowd: tuple[int, int]
) -> tuple[Scene, Thing]:
    """A scene of some shapes, now and then a number or a scan; and its subject, one of the shapes."""
    board = _Board(rng, world)
    chosen = board.shape(subject)
    for _ in range(rng.randint(*crowd) - 1):
        board.shape()
    if rng.random() < 0.3:
        board.number()
    if rng.random() < 0.3:
        board.scan()
    return board.scene(), chosen


# --- questions ------------------------------------------------------------------------------------
# Each asker gets a scene and the thing to ask about and returns (question, answer), or None where the scene
# gives no clear question of its kind about that thing.

QA = tuple[str, str]


def _unique(scene: Scene, thing: Thing, *keys: str) -> bool:
    return sum(all(getattr(t, k) == getattr(thing, k) for k in keys) for t in _shapes(scene)) == 1


def ask_colour(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    if not _unique(scene, thing, "shape"):
        return None
    forms = "What colour is the {}?", "Which colour does the {} have?"
    return rng.choice(forms).format(thing.shape), thing.colour


def ask_shape(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    if not _unique(scene, thing, "colour"):
        return None
    forms = "What shape is the {} thing?", "Which shape is {}?"
    return rng.choice(forms).format(thing.colour), thing.shape


def ask_size(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    if not _unique(scene, thing, "shape", "colour"):
        return None
    forms = "Is the {} small or big?", "What size is the {}?"
    return rng.choice(forms).format(thing.name), thing.size


def ask_count(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    key = rng.choice(("shape", "colour"))
    number = sum(getattr(t, key) == getattr(thing, key) for t in _shapes(scene))
    if number > 4:
        return None
    what = _plural(thing.shape) if key == "shape" else f"{thing.colour} things"
    return rng.choice(("How many {} are there?", "Count the {}.")).format(what), str(number)


def ask_existence(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    forms = "Is there a {}?", "Do you see a {}?"
    if rng.random() < 0.5:
        return _article(rng.choice(forms).format(thing.name)), "yes"
    present = {(t.shape, t.colour) for t in _shapes(scene)}
    absent = [pair for pair in world.pairs if pair not in present]
    # Half of the things asked for in vain share shape or colour with something that is there.
    near = [p for p in absent if any(p[0] == s or p[1] == c for s, c in present)]
    shape, colour = rng.choice(near if near and rng.random() < 0.5 else absent)
    return _article(rng.choice(forms).format(f"{colour} {shape}")), "no"


def ask_where(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    if not _unique(scene, thing, "shape", "colour"):
        return None
    forms = "Where is the {}?", "In which part of the picture is the {}?"
    names = [thing.name]  # half of the time by its shape or colour alone, where that says which
    names += [thing.shape] if _unique(scene, thing, "shape") else []
    names += [f"{thing.colour} thing"] if _unique(scene, thing, "colour") else []
    name = thing.name if rng.random() < 0.5 else rng.choice(names)
    return rng.choice(forms).format(name), thing.place


def ask_relation(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    others = [t for t in _shapes(scene) if t != thing and _unique(scene, t, "shape", "colour")]
    if not others or not _unique(scene, thing, "shape", "colour"):
        return None
    other = rng.choice(others)
    (row, column), (other_row, other_column) = divmod(thing.cell, 3), divmod(other.cell, 3)
    choices: list[QA] = []
    if column != other_column:
        question = f"Is the {thing.name} left or right of the {other.name}?"
        choices.append((question, "left" if column < other_column else "right"))
    if row != other_row:
        question = f"Is the {thing.name} above or below the {other.name}?"
        choices.append((question, "above" if row < other_row else "below"))
    return rng.choice(choices)


def ask_number(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    numbers = [t for t in scene if t.what == "number"]
    if len(numbers) != 1:
        return None
    return rng.choice(("What number is printed?", "Which number do you read?")), str(numbers[0].number)


def ask_handwritten(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    scans = [t for t in scene if t.what == "scan"]
    if len(scans) != 1:
        return None
    return rng.choice(("Which digit is handwritten?", "What digit was written by hand?")), str(
        scans[0].number
    )


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def _article(text: str) -> str:
    return text.replace(" a orange", " an orange")


ASKERS: dict[str, Callable[[Random, World, Scene, Thing], QA | None]] = {
    "colour": ask_colour,
    "shape": ask_shape,
    "size": ask_size,
    "count": ask_count,
    "existence": ask_existence,
    "where": ask_where,
    "relation": ask_relation,
    "number": ask_number,
    "handwritten": ask_handwritten,
}
KINDS = (*ASKERS, "compare")
KINDS_WITH_PAIRS = tuple(kind for kind in KINDS if kind not in ("number", "handwritten"))


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, what it is about, and the one right answer."""

    scenes: tuple[Scene, ...]
    kind: str
    question: str
    answer: str


def ask(kind: str, rng: Random, world: World, unseen_pair: bool = False) -> Asked:
    """A fresh scene and a question of ``kind`` about it; about a thing of an unseen pair if asked for."""
    while True:
        subject = rng.choice(sorted(UNSEEN_PAIRS)) if unseen_pair else None
        if kind == "compare":
            return _ask_compare(rng, world, subject)
        asked: tuple[Scene, QA | None]
        if kind == "count":
            asked = _ask_balanced_count(rng, world, subject)
        elif kind in ("number", "handwritten"):
            board = _Board(rng, world)
            for _ in range(rng.randint(1, 4)):
                board.shape()
            board.number() if kind == "number" or rng.random() < 0.3 else None
            board.scan() if kind == "handwritten" or rng.random() < 0.3 else None
            scene = board.scene()
            asked = (scene, ASKERS[kind](rng, world, scene, scene[0]))
        else:
            scene, thing = _random_scene(rng, world, subject, (2 if kind == "relation" else 1, 5))
            asked = (scene, ASKERS[kind](rng, world, scene, thing))
            if unseen_pair and kind == "existence" and asked[1] and asked[1][1] == "no":
                # Half of the answers stay "no": the unseen pair is then asked for where it is absent.
                scene, _ = _random_scene(rng, world, None, (1, 5))
                asked = (scene, (_article(f"Is there a {thing.name}?"), "no"))
        if asked[1] is not None:
            return Asked((asked[0],), kind, *asked[1])


def _ask_balanced_count(rng: Random, world: World, subject: Pair | None) -> tuple[Scene, QA]:
    """One to four things that share a shape or a colour, each number as likely, among others that do not."""
    number, by_shape = rng.randint(1, 4), rng.random() < 0.5
    board = _Board(rng, world)
    first = board.shape(subject)
    same = [p for p in world.pairs if (p[0] == first.shape if by_shape else p[1] == first.colour)]
    rest = [p for p in world.pairs if p not in same]
    for _ in range(number - 1):
        board.shape(rng.choice(same))
    for _ in range(rng.randint(0, 3)):
        board.shape(rng.choice(rest))
    if rng.random() < 0.3:
        board.number()
    what = _plural(first.shape) if by_shape else f"{first.colour} things"
    question = rng.choice(("How many {} are there?", "Count the {}.")).format(what)
    return board.scene(), (question, str(number))


def _ask_compare(rng: Random, world: World, subject: Pair | None) -> Asked:
    """Two pictures: which one shows something, or which one shows more."""
    answer = rng.choice(("first", "second"))
    if subject or rng.random() < 0.5:
        pair = subject or rng.choice(world.pairs)
        with_it, _ = _random_scene(rng, world, pair, (1, 4))
        while True:
            without, _ = _random_scene(rng, world, None, (1, 4))
            if all((t.shape, t.colour) != pair for t in without):
                break
        question = _article(f"Which picture shows a {pair[1]} {pair[0]}, the first or the second?")
        scenes = (with_it, without)
    else:
        few, more = sorted(rng.sample(range(1, 6), 2))
        boards = _Board(rng, world), _Board(rng, world)
        for board, number in zip(boards, (more, few), strict=True):
            for _ in range(number):
                board.shape()
        question = "Which picture shows more things, the first or the second?"
        scenes = (boards[0].scene(), boards[1].scene())
    return Asked(scenes if answer == "first" else scenes[::-1], "compare", question, answer)


def caption(scene: Scene) -> str:
    """All of the scene, in reading order: ``a big red ring at the top left, the number 4 on the right``."""
    words = []
    for thing in scene:
        if thing.what == "shape":
            what = _article(f" a {thing.size} {thing.name}").strip()
        else:
            what = f"the number {thing.number}" if thing.what == "number" else f"a handwritten {thing.number}"
        words.append(f"{what} {_PREPOSITION[thing.place]} {thing.place}")
    return ", ".join(words) + "."


_PREPOSITION = {
    place: "on the" if place in ("left", "right") else "in the" if place == "middle" else "at the"
    for place in PLACES
}
DESCRIBE = ("Describe the picture.", "What do you see?", "What is in the picture?")
NO_PICTURE = "I see no picture. Please show me one."
SMALL_TALK: tuple[QA, ...] = (
    ("Hello!", "Hello! Show me a picture and ask me about it."),
    ("Hi", "Hello! Show me a picture and ask me about it."),
    ("Who are you?", "I am TinyModal's starter model. I know drawn shapes, numbers and handwritten digits."),
    (
        "What can you do?",
        "I answer questions about drawn scenes: colours, shapes, sizes, counts, places and digits.",
    ),
    ("Thank you!", "You are welcome."),
)


Made = tuple[str, tuple[Scene, ...], list[QA]]
"""Kind, scenes, and the turns about them."""


# --- samples --------------------------------------------------------------------------------------


class Scenes:
    """An endless source of made samples; ``sample(n)`` depends on nothing but the options and ``n``.

    Args:
        split: whose scans of digits are used; ``train`` has no unseen pairs.
        seed: another seed, other scenes.
        form: ``questions``: one to ``turns`` of them about a picture, or one about two pictures.
            ``mixed``: the same, with descriptions among the questions, and now and then talk without a
            picture. ``captions``: a picture and its description. ``crowded``: a full board and no words worth
            reading, for the ``cells`` loss.
        picture: ``drawn``, or ``written`` (see :func:`written`).
        kinds: which kinds of question; all if None.
        turns: at most so many questions about one picture.
        wide: ten shapes in ten colours instead of the six in six that are asked about, to pretrain parts.
        with_targets: pictures carry what each cell shows, for the ``cells`` loss.
    """

    def __init__(
        self,
        split: Split = "train",
        seed: int = 0,
        form: Literal["questions", "mixed", "captions", "crowded"] = "mixed",
        picture: Literal["drawn", "written"] = "drawn",
        kinds: Sequence[str] | None = None,
        turns: int = 3,
        wide: bool = False,
        with_targets: bool = False,
    ) -> None:
        forms = {
            "questions": self._questions,
            "mixed": self._mixed,
            "captions": self._captions,
            "crowded": self._crowded,
        }
        for key, value, known in (("form", form, tuple(forms)), ("picture", picture, ("drawn", "written"))):
            if value not in known:
                raise DataError(f"made scenes: {key} {value!r} is not known; take one of {', '.join(known)}")
        if unknown := sorted(set(kinds or ()) - set(KINDS)):
            raise DataError(f"made scenes: unknown kinds {', '.join(unknown)}; known: {', '.join(KINDS)}")
        self.world = World(split, WIDE_PAIRS if wide else SEEN_PAIRS)
        self.seed, self.form, self.turns, self.kinds = seed, form, turns, tuple(kinds or KINDS)
        self.written, self.with_targets = picture == "written", with_targets
        self._turns = forms[form]

    def sample(self, index: int) -> Sample:
        rng = Random(f"{self.world.split}/{self.seed}/{self.form}/{index}")
        kind, scenes, turns = self._turns(rng)
        images = tuple(self._image(scene, rng) for scene in scenes)
        return _sample(f"made/{self.world.split}-{self.seed}/{index}", images, turns, kind)

    def _captions(self, rng: Random) -> Made:
        scene, _ = _random_scene(rng, self.world, None, (1, 5))
        return "caption", (scene,), [(rng.choice(DESCRIBE), caption(scene))]

    def _crowded(self, rng: Random) -> Made:
        board = _Board(rng, self.world)
        for _ in range(rng.randint(3, 9)):
            rng.choice((board.shape, board.shape, board.number, board.scan))()
        return "crowded", (board.scene(),), [("", ".")]

    def _mixed(self, rng: Random) -> Made:
        dice = rng.random()
        if dice < 0.01:
            return "talk", (), [rng.choice(SMALL_TALK)]
        if dice > 0.99:  # the same beside a picture
            return "talk", (_random_scene(rng, self.world, None, (1, 5))[0],), [rng.choice(SMALL_TALK)]
        if dice < 0.03:
            return "talk", (), [(ask(rng.choice(self.kinds), rng, self.world).question, NO_PICTURE)]
        kind, scenes, turns = self._questions(rng)
        if len(scenes) == 1 and dice < 0.13:
            turns.insert(rng.randint(0, len(turns)), (rng.choice(DESCRIBE), caption(scenes[0])))
        return kind, scenes, turns

    def _questions(self, rng: Random) -> Made:
        asked = ask(rng.choice(self.kinds), rng, self.world)
        turns = [(asked.question, asked.answer)]
        if len(asked.scenes) == 1:  # further questions about the same scene, each of another kind
            scene = asked.scenes[0]
            kinds = [kind for kind in self.kinds if kind not in (asked.kind, "compare")]
            for kind in rng.sample(kinds, min(len(kinds), rng.randint(1, self.turns) - 1)):
                if qa := ASKERS[kind](rng, self.world, scene, rng.choice(_shapes(scene))):
                    turns.append(qa)
        return asked.kind, asked.scenes, turns

    def _image(self, scene: Scene, rng: Random) -> Image:
        picture = written(scene) if self.written else draw(scene, rng)
        return Image(picture, targets(scene) if self.with_targets else None)


def _sample(name: str, images: tuple[Image, ...], turns: Sequence[QA], kind: str) -> Sample:
    """A conversation about ``images``, which open it."""
    messages = []
    for i, (question, answer) in enumerate(turns):
        messages.append(Message("user", _user_parts(images if i == 0 else (), question)))
        messages.append(Message("assistant", (Text(answer),)))
    return Sample(tuple(messages), name, {"kind": kind})


def _user_parts(images: tuple[Image, ...], question: str) -> tuple[Part, ...]:
    """The pictures, then the question; two pictures are named, as the question speaks of them by name."""
    if len(images) == 2:
        first, second = images
        return Text("first: "), first, Text("\nsecond: "), second, Text(f"\n{question}")
    return (*images, Text(question)) if question else images


@dataclass(frozen=True, slots=True)
class MadeQuestion:
    """A question for scoring: ``sample`` ends with the user's turn."""

    sample: Sample
    answer: str
    kind: str
    unseen_pair: bool
    choices: str = ""
    """The answers that a question of relation names, ``left or right`` or ``above or below``."""


def questions(split: Split, seed: int, per_kind: int, unseen_pairs: bool) -> list[MadeQuestion]:
    """``per_kind`` questions of every kind, one to a picture; about things of unseen pairs where asked for.

    Kinds that no pair of shape and colour enters (numbers, handwritten digits) are left out of the latter.
    """
    made = []
    world = World(split)
    for kind in KINDS_WITH_PAIRS if unseen_pairs else KINDS:
        for index in range(per_kind):
            name = f"scenes/{split}-{seed}/{'unseen' if unseen_pairs else 'new'}/{kind}/{index}"
            rng = Random(name)
            asked = ask(kind, rng, world, unseen_pairs)
            images = tuple(Image(draw(scene, rng)) for scene in asked.scenes)
            sample = Sample((Message("user", _user_parts(images, asked.question)),), name, {"kind": kind})
            choices = next((c for c in ("left or right", "above or below") if c in asked.question), "")
            made.append(MadeQuestion(sample, asked.answer, kind, unseen_pairs, choices))
    return made


MADE: Mapping[str, type[Scenes]] = {"scenes": Scenes}
"""Made sources by the name a recipe gives: ``{ made = "scenes", options = { form = "captions" } }``."""
