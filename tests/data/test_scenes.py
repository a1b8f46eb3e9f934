"""The made world: what is drawn, written and labelled is the scene, and the splits are apart."""

import random

import numpy as np
import pytest

from tinymodal.core.errors import DataError
from tinymodal.data.scenes import (
    CELL_PX,
    COLOURS,
    SEEN_PAIRS,
    SHAPES,
    TARGET_HEADS,
    UNSEEN_PAIRS,
    WRITTEN_CODES,
    Board,
    Thing,
    World,
    draw,
    random_scene,
    scans,
    shapes_of,
    targets,
    written,
)


def test_unseen_pairs_use_every_shape_and_colour_once():
    assert sorted(shape for shape, _ in UNSEEN_PAIRS) == sorted(SHAPES)
    assert sorted(colour for _, colour in UNSEEN_PAIRS) == sorted(COLOURS)
    assert len(SEEN_PAIRS) == 30


def test_scans_of_the_splits_do_not_overlap():
    splits = scans()[2]
    train, val, test = (set(splits[name]) for name in ("train", "val", "test"))
    assert not (train & val)
    assert not (train & test)
    assert not (val & test)
    assert len(train) + len(val) + len(test) == 1797
    for split, allowed in (("train", train), ("val", val), ("test", test)):
        for index in range(200):
            assert Board(random.Random(index), World(split)).scan().scan in allowed


def test_a_board_never_lays_two_things_into_one_cell():
    for index in range(100):
        board = Board(random.Random(index), World())
        for lay in (board.shape, board.number, board.scan) * 3:
            lay()
        assert [thing.cell for thing in board.scene()] == list(range(9))
        assert len(shapes_of(board.scene())) == 3


def test_the_subject_of_a_random_scene_is_one_of_its_shapes():
    for index in range(100):
        scene, subject = random_scene(random.Random(index), World(), ("ring", "blue"), (1, 5))
        assert (subject.shape, subject.colour) == ("ring", "blue")
        assert subject in shapes_of(scene)
        assert 1 <= len(shapes_of(scene)) <= 5


def test_a_split_nobody_knows_is_refused():
    with pytest.raises(DataError, match="'dev', expected train, val or test"):
        World("dev")


def test_a_drawn_thing_has_its_colour_in_its_cell_and_nowhere_else():
    for cell in range(9):
        for colour, rgb in COLOURS.items():
            scene = (Thing(cell, "shape", "square", colour, "big"),)
            pixels = np.asarray(draw(scene, random.Random(cell))).astype(int)
            row, column = divmod(cell, 3)
            near = (np.abs(pixels - rgb).max(-1) < 60).nonzero()
            assert len(near[0]) > 150
            assert {(y // CELL_PX, x // CELL_PX) for y, x in zip(*near, strict=True)} == {(row, column)}


def test_written_scenes_hold_codes_that_name_every_attribute():
    scene = (
        Thing(0, "shape", "circle", "red", "big"),
        Thing(4, "number", number=47),
        Thing(8, "scan", number=7, scan=0),
    )
    pixels = np.asarray(written(scene))
    assert pixels.shape == (3, 3, 3)
    assert pixels[0, 0].tolist() == [1, 1, 2]
    assert pixels[1, 1].tolist() == [20, 24, 17]
    assert pixels[2, 2].tolist() == [21, 47, 0]
    assert pixels.max() < WRITTEN_CODES
    assert pixels[0, 1].tolist() == [0, 0, 0]


def test_targets_name_what_each_cell_shows():
    rows = targets((Thing(5, "number", number=9), Thing(7, "shape", "ring", "blue", "small")))
    assert rows[5] == (2, -100, -100, -100, 10, 9, -100, 5)
    assert rows[7] == (1, 5, 2, 0, -100, -100, -100, 7)
    assert rows[0] == (0, -100, -100, -100, -100, -100, -100, 0)
    for row in rows:
        assert all(value < classes for value, classes in zip(row, TARGET_HEADS, strict=True))
