"""Made scenes: the answers are right, the splits are apart, and a sample can be made again."""

import random
from collections import Counter

import numpy as np
import pytest

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Text
from tinymodal.data import synthetic
from tinymodal.data.synthetic import (
    CELL_PX,
    COLOURS,
    KINDS,
    KINDS_WITH_PAIRS,
    SEEN_PAIRS,
    UNSEEN_PAIRS,
    Scenes,
    Thing,
    World,
    ask,
    caption,
    draw,
    questions,
    targets,
    written,
)


def words_of(sample):
    return " ".join(part.text for m in sample.messages for part in m.parts if isinstance(part, Text))


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_answers_its_question(kind):
    """The answer is found again from the scene alone, by other code than the one that asked."""
    for index in range(60):
        asked = ask(kind, random.Random(index), World("val"))
        assert asked.answer in answers_by_reading(asked), (asked.question, asked.scenes, asked.answer)


def answers_by_reading(asked):
    scene, words = asked.scenes[0], asked.question.rstrip("?.").replace(",", "").split()
    shapes = [thing for thing in scene if thing.what == "shape"]
    colours = [word for word in words if word in COLOURS]
    forms = [word.removesuffix("es") if word == "crosses" else word.removesuffix("s") for word in words]
    forms = [word for word in forms if word in (*synthetic.SHAPES, "cros")]
    forms = ["cross" if word == "cros" else word for word in forms]

    def fits(thing, i=0):
        return (not forms or thing.shape == forms[i]) and (not colours or thing.colour == colours[i])

    def only(i=0):
        (thing,) = [thing for thing in shapes if fits(thing, i)]
        return thing

    match asked.kind:
        case "colour" | "shape" | "size":
            return {getattr(only(), asked.kind)}
        case "where":
            return {only().place}
        case "count":
            return {str(sum(map(fits, shapes)))}
        case "existence":
            return {"yes" if any(map(fits, shapes)) else "no"}
        case "relation":
            a, b = only(0).cell, only(1).cell
            if "left" in words:
                return {"left" if a % 3 < b % 3 else "right"}
            return {"above" if a // 3 < b // 3 else "below"}
        case "number":
            return {str(thing.number) for thing in scene if thing.what == "number"}
        case "handwritten":
            return {str(thing.number) for thing in scene if thing.what == "scan"}
        case "compare" if "more" in words:
            return {"first" if len(asked.scenes[0]) > len(asked.scenes[1]) else "second"}
        case "compare":
            shown = [any(fits(thing) for thing in scene) for scene in asked.scenes]
            assert sum(shown) == 1
            return {"first" if shown[0] else "second"}


def test_training_never_shows_or_names_an_unseen_pair():
    names = [f"{colour} {shape}" for shape, colour in UNSEEN_PAIRS]
    for form in ("mixed", "captions"):
        for wide in (False, True):
            source = Scenes(form=form, wide=wide, with_targets=True, picture="written")
            for index in range(400):
                sample = source.sample(index)
                assert not any(name in words_of(sample) for name in names), sample
                for image in sample.media():
                    for _, shape, colour, *_ in image.targets:
                        if shape >= 0:
                            pair = (synthetic.WIDE_SHAPES[shape], synthetic.WIDE_COLOUR_NAMES[colour])
                            assert pair not in UNSEEN_PAIRS


def test_unseen_pairs_use_every_shape_and_colour_once():
    assert sorted(shape for shape, _ in UNSEEN_PAIRS) == sorted(synthetic.SHAPES)
    assert sorted(colour for _, colour in UNSEEN_PAIRS) == sorted(COLOURS)
    assert len(SEEN_PAIRS) == 30


def test_questions_about_unseen_pairs_are_about_unseen_pairs():
    made = questions("val", seed=1, per_kind=20, unseen_pairs=True)
    assert {q.kind for q in made} == set(KINDS_WITH_PAIRS)
    assert all(q.unseen_pair for q in made)
    for index in range(50):
        scene = ask("colour", random.Random(index), World("val"), unseen_pair=True).scenes[0]
        assert any((thing.shape, thing.colour) in UNSEEN_PAIRS for thing in scene)


def test_scans_of_the_splits_do_not_overlap():
    splits = synthetic._scans()[2]
    train, val, test = (set(splits[name]) for name in ("train", "val", "test"))
    assert not (train & val)
    assert not (train & test)
    assert not (val & test)
    assert len(train) + len(val) + len(test) == 1797
    for split, allowed in (("train", train), ("test", test)):
        for index in range(200):
            for scene in ask("handwritten", random.Random(index), World(split)).scenes:
                assert all(thing.scan in allowed for thing in scene if thing.what == "scan")


def test_half_of_the_existence_answers_are_no_and_counts_are_even():
    answers = Counter(ask("existence", random.Random(i), World()).answer for i in range(1000))
    assert 430 < answers["no"] < 570
    unseen = Counter(
        ask("existence", random.Random(i), World("val"), unseen_pair=True).answer for i in range(1000)
    )
    assert 430 < unseen["no"] < 570
    counts = Counter(ask("count", random.Random(i), World()).answer for i in range(1000))
    assert set(counts) == {"1", "2", "3", "4"}
    assert min(counts.values()) > 190


def test_a_sample_can_be_made_again_in_any_order():
    one, two = Scenes(seed=3), Scenes(seed=3)
    forward = [one.sample(i) for i in range(30)]
    backward = [two.sample(i) for i in reversed(range(30))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a.id == b.id
        assert words_of(a) == words_of(b)
        for x, y in zip(a.media(), b.media(), strict=True):
            assert x.source.tobytes() == y.source.tobytes()
    assert words_of(Scenes(seed=4).sample(0)) + words_of(Scenes(seed=4).sample(1)) != words_of(
        forward[0]
    ) + words_of(forward[1])


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
    assert pixels.max() < synthetic.WRITTEN_CODES
    assert pixels[0, 1].tolist() == [0, 0, 0]


def test_targets_name_what_each_cell_shows():
    rows = targets((Thing(5, "number", number=9), Thing(7, "shape", "ring", "blue", "small")))
    assert rows[5] == (2, -100, -100, -100, 10, 9, -100, 5)
    assert rows[7] == (1, 5, 2, 0, -100, -100, -100, 7)
    assert rows[0] == (0, -100, -100, -100, -100, -100, -100, 0)
    for row in rows:
        assert all(value < classes for value, classes in zip(row, synthetic.TARGET_HEADS, strict=True))


def test_a_caption_reads_in_order():
    scene = (
        Thing(0, "shape", "star", "orange", "small"),
        Thing(4, "scan", number=3, scan=0),
        Thing(5, "number", number=12),
    )
    assert (
        caption(scene)
        == "a small orange star at the top left, a handwritten 3 in the middle, the number 12 on the right."
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "poems"}, "form 'poems'"),
        ({"picture": "oil"}, "picture 'oil'"),
        ({"kinds": ["taste"]}, "taste"),
        ({"split": "dev"}, "dev"),
    ],
)
def test_an_option_nobody_knows_is_refused_with_those_that_exist(options, words):
    with pytest.raises(DataError, match=words):
        Scenes(**options)


def test_two_pictures_are_compared_in_one_message():
    sample = next(s for s in map(Scenes(kinds=["compare"], form="questions").sample, range(5)))
    assert [type(part) for part in sample.messages[0].parts] == [Text, Image, Text, Image, Text]
