"""Made sounds: what is said is what is asked, the same anywhere, and the same tasks without espeak-ng."""

import itertools
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.core.types import Audio, Image, Sample, Speech, Text
from tinymodal.data import sounds
from tinymodal.data.sounds import (
    MADE,
    NUMBER_WORDS,
    SPEAKS,
    Heard,
    Omni,
    Speakers,
    SpokenAnswers,
    SpokenQuestions,
    ask_aloud,
    heard_questions,
    joined,
    made_words,
    spoken_words,
)
from tinymodal.data.synthetic import NO_PICTURE, SMALL_TALK, Scenes, questions
from tinymodal.data.voices import RATE_HZ, VARIANTS, clips, shipped, split_of

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
JOINED = {"speaker": "shipped"}


def parts_of(sample, kind):
    return [part for message in sample.messages for part in message.parts if isinstance(part, kind)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What colour is the ring?", "what colour is the ring"),
        ("42", "forty two"),
        ("the number 70 on the right.", "the number seventy on the right"),
        ("13, 0 and 07", "thirteen zero and zero seven"),
        ("123", "one two three"),
        ("I am TinyModal's starter model.", "i am tinymodal's starter model"),
        ("...", ""),
    ],
)
def test_text_is_spoken_in_small_letters_and_numbers_in_words(text, words):
    assert " ".join(spoken_words(text)) == words


@given(st.integers(0, 99))
def test_every_number_below_a_hundred_has_words_of_its_own(number):
    words = spoken_words(str(number))
    assert 1 <= len(words) <= 2
    assert set(words) <= NUMBER_WORDS
    assert [n for n in range(100) if spoken_words(str(n)) == words] == [number]


@given(st.text())
def test_any_text_has_words_or_none(text):
    assert all(word.isascii() and " " not in word for word in spoken_words(text))


def test_everything_that_made_scenes_say_can_be_said_with_the_shipped_clips():
    known = set(shipped().words)
    assert set(made_words(400)) <= known
    for split in ("val", "test"):
        for made in questions(split, seed=5, per_kind=20, unseen_pairs=False):
            for part in made.sample.messages[0].parts:
                assert not isinstance(part, Text) or set(spoken_words(part.text)) <= known
    for text in (NO_PICTURE, *(said for qa in SMALL_TALK for said in qa)):
        assert set(spoken_words(text)) <= known


def test_joined_words_lie_where_their_places_say_with_silence_between():
    said = joined(("red", "ring"), "en-us+f2", [0.1], (0.2, 0.3))
    (red, ring), of_word = said.places, clips("en-us+f2")
    assert np.array_equal(said.wave[slice(*red)], of_word["red"])
    assert np.array_equal(said.wave[slice(*ring)], of_word["ring"])
    assert red[0] == 3200
    assert ring[0] - red[1] == 1600
    assert len(said.wave) - ring[1] == 4800
    assert not said.wave[: red[0]].any()
    assert not said.wave[red[1] : ring[0]].any()
    assert said.seconds == pytest.approx(0.6 + (len(of_word["red"]) + len(of_word["ring"])) / RATE_HZ)


def test_a_word_without_a_clip_is_named():
    with pytest.raises(DataError, match="no clip of 'zebra'"):
        joined(("red", "zebra"), "en-us+f2", [0.1])
    with pytest.raises(DataError, match="nothing to speak"):
        joined((), "en-us+f2", [])


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("how", ["shipped", pytest.param("espeak", marks=needs_espeak)])
def test_only_voices_of_the_split_speak(split, how):
    speakers = Speakers(split, how)
    variants = {speakers.say("red", random.Random(i)).voice.partition("+")[2] for i in range(40)}
    assert variants <= set(VARIANTS[split])
    assert len(variants) > 1 or split == "val"


def test_voices_of_a_split_are_drawn_about_equally():
    speakers = Speakers("test", "shipped")
    voices = [speakers.say("red", random.Random(i)).voice for i in range(400)]
    for name in shipped().of("test"):
        assert 60 < voices.count(name) < 140


@needs_espeak
def test_mixed_speakers_speak_whole_sentences_half_of_the_time():
    speakers = Speakers("val", "mixed")
    whole = sum(speakers.say("red", random.Random(i)).places is None for i in range(200))
    assert 60 < whole < 140


def test_without_espeak_the_same_questions_are_asked(monkeypatch):
    """The tasks are the same: ids, words and answers; only the sounds differ."""
    before = [SpokenQuestions(speaker="mixed", seed=3).sample(i) for i in range(12)]
    monkeypatch.setattr(sounds, "espeak", lambda: None)
    without = [SpokenQuestions(speaker="mixed", seed=3).sample(i) for i in range(12)]
    for one, other in zip(before, without, strict=True):
        assert one.id == other.id
        assert [part.text for part in parts_of(one, Text)] == [part.text for part in parts_of(other, Text)]
        assert len(parts_of(one, Audio)) == len(parts_of(other, Audio))
    with pytest.raises(DataError, match="'espeak' needs espeak-ng"):
        Speakers("train", "espeak")


@pytest.mark.parametrize("name", sorted(set(MADE) - {"scenes"}))
def test_a_sample_can_be_made_again_in_any_order(name):
    make = MADE[name]
    one, two = make(seed=3, **JOINED), make(seed=3, **JOINED)
    forward = [one.sample(i) for i in range(12)]
    backward = [two.sample(i) for i in reversed(range(12))][::-1]
    assert len({sample.id for sample in forward}) == 12
    for a, b in zip(forward, backward, strict=True):
        assert isinstance(a, Sample)
        assert a.id == b.id
        for x, y in zip(parts_of(a, Audio | Speech), parts_of(b, Audio | Speech), strict=True):
            assert x.source.dtype == torch.float32
            assert x.rate_hz == RATE_HZ
            assert torch.equal(x.source, y.source)
    other = make(seed=4, **JOINED)
    assert any(parts_of(a, Text) != parts_of(other.sample(i), Text) for i, a in enumerate(forward))


def test_spoken_questions_are_the_questions_of_the_same_scenes():
    options = {"form": "questions", "kinds": ["colour", "compare"], "turns": 3}
    written, spoken = Scenes(seed=2, **options), SpokenQuestions(seed=2, **JOINED, **options)
    for index in range(20):
        a, b = written.sample(index), spoken.sample(index)
        assert [x.source.tobytes() for x in parts_of(a, Image)] == [
            x.source.tobytes() for x in parts_of(b, Image)
        ]
        for one, other in zip(a.messages, b.messages, strict=True):
            if one.role == "assistant":
                assert one == other
                continue
            question, sound = one.parts[-1], other.parts[-1]
            assert isinstance(sound, Audio)
            assert not any(
                question.text.strip() in part.text for part in other.parts if isinstance(part, Text)
            )
            words = spoken_words(question.text)
            least = sum(0.08 for _ in words)
            assert least < len(sound.source) / RATE_HZ < 1.2 * len(words) + 0.6


def test_half_of_the_questions_stay_written_if_asked_for():
    source = SpokenQuestions(
        spoken=0.5, form="questions", kinds=["colour"], turns=1, picture="written", **JOINED
    )
    spoken = sum(bool(parts_of(source.sample(i), Audio)) for i in range(200))
    assert 60 < spoken < 140


def test_what_is_heard_is_repeated_in_words_and_digits():
    source = Heard(seed=1, **JOINED)
    lengths, digits = set(), 0
    for index in range(60):
        sample = source.sample(index)
        assert [type(part) for part in sample.messages[0].parts] == [Audio, Text]
        (answer,) = sample.messages[1].parts
        assert answer.text == source.text(index)
        assert source.said(index).words == spoken_words(answer.text)
        items = answer.text.split()
        lengths.add(len(items))
        digits += any(item.isdigit() for item in items)
        assert not any(a.isdigit() and b.isdigit() for a, b in itertools.pairwise(items))
    assert lengths == {1, 2, 3, 4}
    assert digits > 5


def test_sentences_are_heard_as_often_as_asked_for():
    source = Heard(sentences=0.5, **JOINED)
    assert 60 < sum(source.text(i)[0].isupper() for i in range(200)) < 140


def test_every_answer_is_spoken_and_in_the_voice_it_names():
    one = SpokenAnswers(form="questions", **JOINED, answers="shipped")
    for index in range(10):
        for message in one.sample(index).messages:
            spoken = [part for part in message.parts if isinstance(part, Speech)]
            assert len(spoken) == (message.role == "assistant")
            assert all(part.voice is None for part in spoken)
    both = SpokenAnswers(form="questions", **JOINED, answers="shipped", speak=SPEAKS)
    voices = [{part.voice for part in parts_of(both.sample(i), Speech)} for i in range(30)]
    assert all(len(names) == 1 for names in voices)
    assert set.union(*voices) == set(SPEAKS)


def test_an_answer_sounds_as_its_words():
    sample = SpokenAnswers(form="captions", answers="shipped", **JOINED).sample(0)
    answer = sample.messages[1]
    text, speech = answer.parts
    of_word = clips(SPEAKS[0])
    words = spoken_words(text.text)
    clips_only = sum(len(of_word[word]) for word in words)
    assert clips_only + 1600 <= len(speech.source) <= clips_only + 1600 + 0.08 * RATE_HZ * len(words)


def test_who_speaks_for_a_model_is_heard_in_no_other_split():
    assert {split_of(name.partition("+")[2]) for name in SPEAKS} == {"speak"}
    with pytest.raises(DataError, match="not of 'speak'"):
        SpokenAnswers(speak=["en-us+f4"])


def test_omni_has_all_of_it_in_its_shares():
    source = Omni(picture="written", **JOINED)
    kinds = {"made/": 0, "spoken/": 0, "aloud/": 0, "heard/": 0}
    for index in range(300):
        (name,) = [kind for kind in kinds if source.sample(index).id.startswith(kind)]
        kinds[name] += 1
    assert 75 < kinds["made/"] < 135
    assert 60 < kinds["spoken/"] < 120
    assert 50 < kinds["aloud/"] < 100
    assert 15 < kinds["heard/"] < 50
    only = Omni(shares={"heard": 1.0}, **JOINED)
    assert all(only.sample(i).id.startswith("heard/") for i in range(5))


def test_questions_for_scoring_are_the_written_ones_with_a_sound():
    written = questions("test", seed=4, per_kind=2, unseen_pairs=False)
    spoken = [ask_aloud(made.sample, 4, "test", "shipped") for made in written]
    for one, other in zip(written, spoken, strict=True):
        assert isinstance(other.messages[-1].parts[-1], Audio)
        assert parts_of(one.sample, Image) == parts_of(other, Image)
    assert len({sample.id for sample in (*(made.sample for made in written), *spoken)}) == 2 * len(written)


def test_clips_for_scoring_end_with_the_users_turn_and_ask_the_same_of_any_voices():
    unseen = heard_questions("test", seed=1, num=6, speaker="shipped")
    seen = heard_questions("test", seed=1, num=6, voices="train", speaker="shipped")
    assert [made.answer for made in seen] == [made.answer for made in unseen]
    for one, other in zip(seen, unseen, strict=True):
        assert [message.role for message in one.sample.messages] == ["user"]
        a, b = parts_of(one.sample, Audio)[0], parts_of(other.sample, Audio)[0]
        assert a.source.shape != b.source.shape


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (Heard, {"words": [0, 4]}, "words"),
        (Heard, {"sentences": 2}, "sentences 2"),
        (Heard, {"speaker": "parrot"}, "speaker 'parrot'"),
        (Heard, {"voices": "everyone"}, "voices 'everyone'"),
        (SpokenQuestions, {"spoken": 1.5}, "spoken 1.5"),
        (SpokenQuestions, {"colour": "red"}, "colour"),
        (SpokenQuestions, {"form": "poems"}, "form 'poems'"),
        (SpokenAnswers, {"answers": "sung"}, "'sung'"),
        (Omni, {"shares": {"smelt": 1}}, "smelt"),
        (Omni, {"shares": {"heard": 0}}, "shares"),
        (Omni, {"split": "dev"}, "dev"),
    ],
)
def test_an_option_nobody_knows_is_refused_with_those_that_exist(make, options, words):
    with pytest.raises(DataError, match=words):
        make(**options)
