"""Boxes are read from replies in the forms of the field, and compared as their scorers do."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.eval.rules.boxes import Box, iou, read_box

PART = st.integers(0, 100)
SIDES = st.tuples(st.integers(0, 500), st.integers(0, 500), st.integers(1, 500), st.integers(1, 500))
BOXES = SIDES.map(lambda s: Box(s[0], s[1], s[0] + s[2], s[1] + s[3]))


@pytest.mark.parametrize(
    ("reply", "box"),
    [
        ("{<10><20><30><40>}", (0.1, 0.2, 0.3, 0.4)),
        (" {<10> <20><30><40>}</s>", (0.1, 0.2, 0.3, 0.4)),
        ("<unk>{<0><0><100><99>}", (0, 0, 1, 0.99)),
        ("{<10><20><30><400>}", (0.1, 0.2, 0.3, 4.0)),
        # MiniGPT-v2's scorer reads every digit of a reply, and has to find its form at the beginning.
        ("{<10><20><30><40>} 2 dogs", None),
        ("{<10><20><30><40>}{<50><60><70><80>}", None),
        ("the dog {<10><20><30><40>}", None),
        ("{<10><20><30>}", None),
        ("{<10><20><30><4000>}", None),
        ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("It is at [0.1,.2, 0.3 ,0.4]. Or [0.5, 0.5, 1, 1].", (0.1, 0.2, 0.3, 0.4)),
        ("[0, 0, 1, 1]", (0, 0, 1, 1)),
        ("[-0.01, 0.0, 1.02, 1.0]", (-0.01, 0, 1.02, 1)),
        ("[100, 200, 300, 400]", (0.1, 0.2, 0.3, 0.4)),
        ("[0.1, 0.2, 0.3]", None),
        ("0.1, 0.2, 0.3, 0.4", None),
        ("<ref>dog</ref><box>(100,200),(300,400)</box>", (0.1, 0.2, 0.3, 0.4)),
        ("<box>[[100, 200, 300, 400]]</box>", (0.1, 0.2, 0.3, 0.4)),
        ("<box>100 200 300 400</box>", (0.1, 0.2, 0.3, 0.4)),
        ("<box>100 200 300 400", (0.1, 0.2, 0.3, 0.4)),
        ("<box>100 200 300</box> 400", None),
        ("", None),
        ("no such thing", None),
    ],
)
def test_a_box_is_read_in_each_models_form(reply, box):
    assert read_box(reply) == (None if box is None else pytest.approx(box))


@given(PART, PART, PART, PART)
def test_minigpts_and_llavas_way_to_write_a_box_mean_the_same(a, b, c, d):
    llava = f"[{a / 100}, {b / 100}, {c / 100}, {d / 100}]"
    assert read_box(f"{{<{a}><{b}><{c}><{d}>}}") == pytest.approx(read_box(llava))


@given(st.text(alphabet="{<>}[]box/0123456789.,- ()"))
def test_whatever_a_reply_holds_there_is_a_box_of_finite_numbers_or_none(reply):
    box = read_box(reply)
    assert box is None or all(math.isfinite(edge) for edge in box)


def test_the_last_pixel_counts_with_minigpt_and_not_without():
    whole, half = Box(0, 0, 9, 9), Box(0, 0, 9, 4)
    assert iou(whole, half, pixel=1) == 0.5  # 50 of 100 pixels
    assert iou(whole, half) == pytest.approx(4 / 9)


@pytest.mark.parametrize(
    ("other", "value"),
    [
        (Box(0, 0, 10, 10), 1.0),
        (Box(5, 0, 15, 10), 50 / 150),
        (Box(10, 0, 20, 10), 0.0),
        (Box(8, 8, 2, 2), 0.0),  # inside out
    ],
)
def test_intersection_over_union_of_plain_boxes(other, value):
    assert iou(Box(0, 0, 10, 10), other) == pytest.approx(value)


def test_two_boxes_without_area_do_not_divide_by_zero():
    assert iou(Box(1, 1, 1, 1), Box(1, 1, 1, 1)) == 0.0


@given(BOXES, BOXES, st.sampled_from([0.0, 1.0]))
def test_overlap_is_symmetric_within_0_and_1_and_1_for_the_same_box(one, other, pixel):
    assert iou(one, other, pixel) == iou(other, one, pixel)
    assert 0 <= iou(one, other, pixel) <= 1
    assert iou(one, one, pixel) == 1
