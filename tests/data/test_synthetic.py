"""Made questions: the answers are right, and a sample can be made again."""

import random
from collections import Counter

import pytest

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Text
from tinymodal.data.scenes import (
    COLOURS,
    SHAPES,
    UNSEEN_PAIRS,
    WIDE_COLOUR_NAMES,
    WIDE_SHAPES,
    Thing,
    World,
    scans,
)
from tinymodal.data.synthetic import KINDS, KINDS_WITH_PAIRS, Scenes, ask, caption, questions


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
    forms = [word for word in forms if word in (*SHAPES, "cros")]
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
                            pair = (WIDE_SHAPES[shape], WIDE_COLOUR_NAMES[colour])
                            assert pair not in UNSEEN_PAIRS


def test_questions_about_unseen_pairs_are_about_unseen_pairs():
    made = questions("val", seed=1, per_kind=20, unseen_pairs=True)
    assert {q.kind for q in made} == set(KINDS_WITH_PAIRS)
    assert all(q.unseen_pair for q in made)
    for index in range(50):
        scene = ask("colour", random.Random(index), World("val"), unseen_pair=True).scenes[0]
        assert any((thing.shape, thing.colour) in UNSEEN_PAIRS for thing in scene)


def test_questions_about_handwriting_show_the_scans_of_their_split_only():
    for split, allowed in scans()[2].items():
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


def test_an_unseen_pair_is_asked_for_in_the_same_words_whether_it_is_there_or_not():
    """Otherwise the form of the question would tell the answer."""
    asked = [ask("existence", random.Random(i), World("val"), unseen_pair=True) for i in range(600)]
    forms = Counter((one.answer, " ".join(one.question.split()[:2])) for one in asked)
    assert set(forms) == {(answer, form) for answer in ("yes", "no") for form in ("Is there", "Do you")}
    assert min(forms.values()) > 100


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
        ({"turns": 0}, "turns 0"),
        ({"turns": 1.5}, "turns 1.5"),
    ],
)
def test_an_option_nobody_knows_is_refused_with_those_that_exist(options, words):
    with pytest.raises(DataError, match=words):
        Scenes(**options)


def test_two_pictures_are_compared_in_one_message():
    sample = next(s for s in map(Scenes(kinds=["compare"], form="questions").sample, range(5)))
    assert [type(part) for part in sample.messages[0].parts] == [Text, Image, Text, Image, Text]
