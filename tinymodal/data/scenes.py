"""The made world: boards of coloured shapes, drawn numbers and handwritten digits, as pictures and as labels.

A scene is a 3 x 3 board of 32 px cells (96 x 96 px in all). A cell is empty or holds one thing, a little off
its centre: a coloured shape, a drawn number of one or two digits, or a real handwritten digit (a scan out of
scikit-learn's ``digits``, UCI "Optical Recognition of Handwritten Digits", 8 x 8 px). What is asked and said
about a scene is in :mod:`tinymodal.data.synthetic`.

Two borders keep what is learned apart from what is scored:

* six of the 36 pairs of shape and colour (``UNSEEN_PAIRS``) never occur in training, neither drawn nor named;
* the scans of ``train``, ``val`` and ``test`` differ; recipes are chosen on ``val``, ``test`` is opened once.

The same scene can be *written*: a 3 x 3 px picture whose pixels are codes instead of colours. A language
model that has read many written scenes knows how to look things up before it meets a vision tower.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image as Pictures
from PIL import ImageChops, ImageDraw, ImageFont

from tinymodal.core.errors import DataError

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
def scans() -> tuple[np.ndarray, np.ndarray, dict[str, tuple[int, ...]]]:
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
                scan = Pictures.fromarray(scans()[0][thing.scan]).resize(
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


# --- boards ---------------------------------------------------------------------------------------


class Board:
    """A scene being laid out: each thing takes a free cell at random, ``scene()`` is what lies there."""

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
        _, digits, splits = scans()
        index = self.rng.choice(splits[self.world.split])
        self.things.append(Thing(self.free.pop(), "scan", number=int(digits[index]), scan=index))
        return self.things[-1]

    def scene(self) -> Scene:
        return tuple(sorted(self.things, key=lambda thing: thing.cell))


def shapes_of(scene: Scene) -> list[Thing]:
    """The scene without its numbers and scans, in reading order."""
    return [thing for thing in scene if thing.what == "shape"]


def random_scene(
    rng: Random, world: World, subject: Pair | None, crowd: tuple[int, int]
) -> tuple[Scene, Thing]:
    """A scene of some shapes, now and then a number or a scan; and its subject, one of the shapes."""
    board = Board(rng, world)
    chosen = board.shape(subject)
    for _ in range(rng.randint(*crowd) - 1):
        board.shape()
    if rng.random() < 0.3:
        board.number()
    if rng.random() < 0.3:
        board.scan()
    return board.scene(), chosen
