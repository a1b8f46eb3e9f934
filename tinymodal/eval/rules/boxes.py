"""Boxes in replies: where a model says that something is, and how well that agrees with where it is.

Three forms are read, each as that model's authors write it:

``{<10><20><30><40>}``
    MiniGPT-v2 and TinyGPT-V: hundredths of the picture. The reply has to begin with it and hold no further
    digit.
``<box>(100,200),(300,400)</box>``
    also ``[[100, 200, 300, 400]]`` or ``100 200 300 400`` inside: thousandths, as of Qwen-VL, InternVL and
    MiniCPM-V. (Some of them divide by 999, which moves no edge by more than 0.1 % of the picture.)
``[0.1, 0.2, 0.3, 0.4]``
    LLaVA: parts of the picture. Where a number is above 2 they are thousandths as well.

Pixels cannot be told from thousandths and are not read.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np

MINIGPT = re.compile(r"\{" + r"<(\d{1,3})>" * 4 + r"\}(\D*$)?")
NUMBER = r"(-?\d+(?:\.\d+)?|-?\.\d+)"
TAGGED = re.compile(r"<box>(.*?)(?:</box>|$)", re.DOTALL)
LISTED = re.compile(r"\[\s*" + r"\s*,\s*".join([NUMBER] * 4) + r"\s*\]")
OVERSHOT = 2.0
"""A part of the picture may come out above 1; above this it is thousandths."""


class Box(NamedTuple):
    """Left, top, right, bottom: parts of the picture's width and height, or pixels; arrays of many boxes."""

    left: Any
    top: Any
    right: Any
    bottom: Any

    def scaled(self, width: Any, height: Any) -> Box:
        return Box(self.left * width, self.top * height, self.right * width, self.bottom * height)


def read_box(reply: str) -> Box | None:
    """The box that a reply gives, in parts of the picture's width and height; None where there is none.

    Source of the first form: eval_scripts/eval_ref.py of https://github.com/Vision-CAIR/MiniGPT-4 at commit
    45c07e56034412d4d26fcdd382e51434a7ae4ad3, with its trap: it collects every digit of the reply, and of more
    than four numbers it makes no box. (It asks again up to 20 times where nothing is read; we do not.)
    """
    if found := MINIGPT.match(reply.replace("<unk>", "").replace(" ", "").strip()):
        *numbers, no_more = found.groups()
        return None if no_more is None else Box(*(int(number) / 100 for number in numbers))
    if tagged := TAGGED.search(reply):
        numbers = re.findall(NUMBER, tagged.group(1))[:4]
        return Box(*(float(number) / 1000 for number in numbers)) if len(numbers) == 4 else None
    if listed := LISTED.search(reply):
        edges = [float(number) for number in listed.groups()]
        return Box(*(edge / 1000 if max(edges) > OVERSHOT else edge for edge in edges))
    return None


def iou(one: Box, other: Box, pixel: float = 0.0) -> Any:
    """Intersection over union, 0 to 1, of two boxes or of many pairs; 0 where it cannot be told.

    ``pixel=1`` counts the last row and column of pixels as part of a box, as MiniGPT-v2's scorer does
    (minigpt4/common/eval_utils.py of the same commit); both boxes are then in pixels.
    """
    # Python's own are ten times as fast on single numbers.
    many = isinstance(one.left, np.ndarray)
    low, high = (np.minimum, np.maximum) if many else (min, max)
    across = high(0.0, low(one.right, other.right) - high(one.left, other.left) + pixel)
    down = high(0.0, low(one.bottom, other.bottom) - high(one.top, other.top) + pixel)
    both = _area(one, pixel) + _area(other, pixel) - across * down
    nothing = np.where(both == 0, np.inf, both) if many else both or math.inf
    return across * down / nothing


def _area(box: Box, pixel: float) -> Any:
    return (box.right - box.left + pixel) * (box.bottom - box.top + pixel)
