"""Made data that is heard and spoken: words, questions about drawn scenes, and answers, said by many voices.

What is asked and answered is that of :mod:`tinymodal.data.synthetic`; here it gets a sound. Two ways to make
one, see :mod:`tinymodal.data.voices`: ``whole``, the text as espeak-ng speaks it, and ``joined``, clips of
its words one behind the other. A machine without espeak-ng has the second only, and the same tasks.

Everything follows from ``(split, seed, index)`` and from what speaks: the joined sounds are the same
everywhere, the whole ones with each version of espeak-ng. Pictures, questions and answers are exactly those
of a ``Scenes`` of the same options, so that spoken and written questions can be compared one by one.

A joined sentence costs 0.1 ms, a whole one about 20 ms unless it was among the last 1,024.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from tinymodal.core.errors import DataError
from tinymodal.core.types import Audio, Message, Part, Sample, Speech, Text
from tinymodal.data import synthetic
from tinymodal.data.scenes import Random, Split
from tinymodal.data.sources import Source
from tinymodal.data.synthetic import MadeQuestion, Scenes
from tinymodal.data.voices import (
    RATE_HZ,
    VARIANTS,
    Voice,
    VoiceSplit,
    Wave,
    clips,
    espeak,
    shipped,
    speak,
    split_of,
)

# --- words ----------------------------------------------------------------------------------------

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBER_WORDS = frozenset((*ONES, *TENS))


def spoken_words(text: str) -> tuple[str, ...]:
    """What is heard of a text: its words in small letters, numbers below 100 in words, others digit by digit.

    ``"The number 42."`` -> ``("the", "number", "forty", "two")``
    """
    words: list[str] = []
    for token in re.findall(r"[a-z]+(?:'[a-z]+)*|\d+", text.lower()):
        if not token.isdigit():
            words.append(token)
        elif len(token) > 2 or (len(token) == 2 and token[0] == "0"):
            words += [ONES[int(digit)] for digit in token]
        elif int(token) < 20:
            words.append(ONES[int(token)])
        else:
            words.append(TENS[int(token[0]) - 2])
            words += [ONES[int(token[1])]] if token[1] != "0" else []
    return tuple(words)


def made_words(num_samples: int = 2000) -> tuple[str, ...]:
    """Every word of made scenes, in questions, answers and descriptions, and those of numbers; sorted."""
    words = set(NUMBER_WORDS)
    for form in ("mixed", "captions"):
        for wide in (False, True):
            source = Scenes(form=form, wide=wide, picture="written", turns=4)  # type: ignore[arg-type]
            for index in range(num_samples):
                for message in source.sample(index).messages:
                    for part in message.parts:
                        if isinstance(part, Text):
                            words.update(spoken_words(part.text))
    for question, answer in synthetic.SMALL_TALK:
        words.update(spoken_words(question), spoken_words(answer))
    words.update(spoken_words(synthetic.NO_PICTURE))
    return tuple(sorted(words))


# --- saying ---------------------------------------------------------------------------------------

How = Literal["mixed", "auto", "espeak", "shipped"]
HOWS: tuple[How, ...] = ("mixed", "auto", "espeak", "shipped")
PITCHES = (38, 50, 62)
SPEEDS = (130, 150, 170, 190)
GAP_S = (0.0, 0.08)
"""Least and greatest silence between two joined words; each clip brings about 0.03 s of its own."""
REST_S = (0.05, 0.25)
"""The same before and after all of them."""


@dataclass(frozen=True, slots=True)
class Said:
    """A text as it sounds."""

    wave: Wave
    """float32 [samples] at 16 kHz."""
    words: tuple[str, ...]
    voice: str
    """``en-us+f3``"""
    places: tuple[tuple[int, int], ...] | None = None
    """First and last sample of each word, where it is joined of clips."""

    @property
    def seconds(self) -> float:
        return len(self.wave) / RATE_HZ


def whole(text: str, voice: Voice, rest_s: tuple[float, float] = (0.0, 0.0)) -> Said:
    """A text as espeak-ng speaks it, with silence before and after.

    Raises:
        DataError: see :func:`tinymodal.data.voices.speak`.
    """
    before, after = (np.zeros(round(rest * RATE_HZ), np.float32) for rest in rest_s)
    return Said(np.concatenate([before, speak(text, voice), after]), spoken_words(text), voice.name)


def joined(
    words: Sequence[str], voice: str, gaps_s: Sequence[float], rest_s: tuple[float, float] = (0.0, 0.0)
) -> Said:
    """Words as clips of a shipped voice, one behind the other.

    Args:
        words: of :func:`spoken_words`.
        voice: name of a shipped voice.
        gaps_s: silence before each word but the first.
        rest_s: silence before the first and after the last.

    Raises:
        DataError: a word or the voice is not shipped, or there is no word.
    """
    of_word = clips(voice)
    if not words:
        raise DataError("there is nothing to speak: no words")
    if unknown := sorted(set(words) - set(of_word)):
        raise DataError(
            f"there is no clip of {', '.join(map(repr, unknown))}; shipped are the {len(of_word)} words of "
            f"made scenes. Install espeak-ng, which speaks any"
        )
    silences = [round(gap * RATE_HZ) for gap in (rest_s[0], *gaps_s, rest_s[1])]
    places, at = [], 0
    for silence, word in zip(silences, words, strict=False):
        places.append((at + silence, at + silence + len(of_word[word])))
        at = places[-1][1]
    wave = np.zeros(at + silences[-1], np.float32)
    for (start, end), word in zip(places, words, strict=True):
        wave[start:end] = of_word[word]
    return Said(wave, tuple(words), voice, tuple(places))


class Speakers:
    """The voices of a split, and how they speak.

    Args:
        split: whose voices.
        how: ``shipped``: joined of clips. ``espeak``: whole. ``auto``: whole where espeak-ng is installed,
            else joined. ``mixed``: as likely one as the other where it is, else joined.
        only: names of voices (``en-us+f1``), where not all of them.

    Raises:
        DataError: no such split, no such way, espeak-ng is asked for and absent, or a voice is not in the
            split.
    """

    def __init__(self, split: VoiceSplit, how: How = "mixed", only: Sequence[str] = ()) -> None:
        for key, value, known in (("voices", split, tuple(VARIANTS)), ("speaker", how, HOWS)):
            if value not in known:
                raise DataError(f"made sounds: {key} {value!r} is not known; take one of {', '.join(known)}")
        self.split, self.how, self.only = split, how, tuple(only)
        for name in self.only:
            if split_of(name.partition("+")[2]) != split:
                raise DataError(
                    f"made sounds: voice {name!r} is not of {split!r}, whose variants are "
                    f"{', '.join(VARIANTS[split])}; write accent+variant"
                )
        self._espeak = None if how == "shipped" else espeak()
        if how == "espeak" and self._espeak is None:
            raise DataError(
                "made sounds: speaker 'espeak' needs espeak-ng, which is not installed (or has too few "
                "voices); take 'auto'"
            )

    def say(self, text: str, rng: Random, rest_s: tuple[float, float] = REST_S) -> Said:
        """A text in a voice that ``rng`` draws, with ``rest_s`` of silence (from, to) before and after it."""
        rests = rng.uniform(*rest_s), rng.uniform(*rest_s)
        whole_dice, voice_dice = rng.random(), rng.random()
        if self._espeak is not None and (self.how != "mixed" or whole_dice < 0.5):
            return whole(text, self._voice(rng, voice_dice), rests)
        names = self.only or shipped().of(self.split)
        words = spoken_words(text)
        gaps = [rng.uniform(*GAP_S) for _ in words[1:]]
        return joined(words, names[int(voice_dice * len(names))], gaps, rests)

    def _voice(self, rng: Random, dice: float) -> Voice:
        assert self._espeak is not None
        if self.only:  # voices by name are one person: they do not vary
            accent, _, variant = self.only[int(dice * len(self.only))].partition("+")
            return Voice(accent, variant)
        variants = self._espeak.of(self.split)
        accent = rng.choice(self._espeak.accents)
        return Voice(accent, variants[int(dice * len(variants))], rng.choice(PITCHES), rng.choice(SPEEDS))


def _tensor(said: Said) -> torch.Tensor:
    return torch.from_numpy(said.wave)


def _audio(said: Said) -> Audio:
    return Audio(_tensor(said), RATE_HZ)


# --- samples --------------------------------------------------------------------------------------

ASK_HEARD = ("What do you hear?", "Repeat what you hear.", "Which words do you hear?")
ANSWER_REST_S = (0.05, 0.05)
"""Silence around a spoken answer: always the same, as it is learned."""


class Heard:
    """Clips of one to four words, numbers among them; the answer repeats them, numbers in digits.

    Args:
        split: ``train``, ``val`` or ``test``: whose voices, unless ``voices`` says otherwise.
        seed: another seed, other words.
        words: least and greatest number of words; a number counts as one.
        sentences: share of clips that are a question about a scene instead.
        speaker: see :class:`Speakers`.
        voices: whose voices; None: the split's.
    """

    def __init__(
        self,
        split: Split = "train",
        seed: int = 0,
        words: tuple[int, int] = (1, 4),
        sentences: float = 0.0,
        speaker: How = "mixed",
        voices: VoiceSplit | None = None,
    ) -> None:
        low, high = words
        if not 1 <= low <= high:
            raise DataError(f"made sounds: words {list(words)} is not [least, greatest]; expected 1 or more")
        if not 0 <= sentences <= 1:
            raise DataError(f"made sounds: sentences {sentences} is no share; expected 0 to 1")
        self.split, self.seed, self.words, self.sentences = split, seed, (low, high), sentences
        self.speakers = Speakers(voices or split, speaker)
        self.scenes = Scenes(split, seed, "questions", "written", turns=1)
        self.vocabulary = tuple(
            word for word in shipped().words if word not in NUMBER_WORDS and "'" not in word
        )

    def text(self, index: int) -> str:
        """What is said in sample ``index``."""
        rng = Random(f"heard/{self.split}/{self.seed}/{index}")
        if rng.random() < self.sentences:
            question = self.scenes.sample(index).messages[0].parts[-1]
            assert isinstance(question, Text)
            return question.text.strip()
        items: list[str] = []
        for _ in range(rng.randint(*self.words)):
            # Never two numbers in a row: forty two could be 42 or 40 2.
            is_number = rng.random() < 0.2 and not (items and items[-1].isdigit())
            items.append(str(rng.randint(0, 99)) if is_number else rng.choice(self.vocabulary))
        return " ".join(items)

    def said(self, index: int) -> Said:
        """The clip of sample ``index``, with the places of its words where they are known."""
        return self.speakers.say(self.text(index), Random(f"heard/{self.split}/{self.seed}/{index}/voice"))

    def sample(self, index: int) -> Sample:
        ask = Random(f"heard/{self.split}/{self.seed}/{index}/ask").choice(ASK_HEARD)
        user = Message("user", (_audio(self.said(index)), Text(ask)))
        answer = Message("assistant", (Text(self.text(index)),))
        return Sample((user, answer), f"heard/{self.split}-{self.seed}/{index}", {"kind": "heard"})


class SpokenQuestions:
    """Samples of :class:`Scenes` whose questions are heard instead of read.

    Args:
        split: of pictures, and of voices unless ``voices`` says otherwise.
        seed: of pictures and questions; the same as that of a ``Scenes`` gives the same ones.
        spoken: share of the questions that are heard; the others stay written.
        speaker: see :class:`Speakers`.
        voices: whose voices; None: the split's.
        scenes: further options of ``Scenes``: ``form``, ``kinds``, ``turns``, ``wide``, ``picture``.
    """

    name = "spoken"

    def __init__(
        self,
        split: Split = "train",
        seed: int = 0,
        spoken: float = 1.0,
        speaker: How = "mixed",
        voices: VoiceSplit | None = None,
        **scenes: Any,
    ) -> None:
        if not 0 <= spoken <= 1:
            raise DataError(f"made sounds: spoken {spoken} is no share; expected 0 to 1")
        self.scenes = _scenes(split, seed, scenes)
        self.spoken = spoken
        self.speakers = Speakers(voices or split, speaker)

    def sample(self, index: int) -> Sample:
        sample = self.scenes.sample(index)
        return replace(
            sample, messages=_heard(sample, self._rng(index), self.speakers, self.spoken), id=self._id(sample)
        )

    def _rng(self, index: int) -> Random:
        return Random(f"{self.name}/{self.scenes.world.split}/{self.scenes.seed}/{self.scenes.form}/{index}")

    def _id(self, sample: Sample) -> str:
        return f"{self.name}/{sample.id}"


class SpokenAnswers(SpokenQuestions):
    """Samples of :class:`Scenes` whose answers are spoken as well as written.

    Args:
        split: as in :class:`SpokenQuestions`.
        seed: as there.
        spoken: as there; 0.5 by default.
        answers: how answers are spoken, see :class:`Speakers`.
        speak: names of the voices that answer, one to a sample; empty: ``en-us+f1`` in all of them, and the
            speech part names no voice.
        asked: who asks (``speaker``, ``voices``), and further options of ``Scenes``.
    """

    name = "aloud"

    def __init__(
        self,
        split: Split = "train",
        seed: int = 0,
        spoken: float = 0.5,
        answers: How = "auto",
        speak: Sequence[str] = (),
        **asked: Any,
    ) -> None:
        super().__init__(split, seed, spoken, **asked)
        self.speak = tuple(speak)
        self.answerers = {name: Speakers("speak", answers, (name,)) for name in self.speak or (SPEAKS[0],)}

    def sample(self, index: int) -> Sample:
        sample = super().sample(index)
        rng = Random(f"{self.name}/voice/{self.scenes.seed}/{index}")
        voice = rng.choice(tuple(self.answerers))
        messages = []
        for message in sample.messages:
            parts = message.parts
            if message.role == "assistant":
                text = " ".join(part.text for part in parts if isinstance(part, Text))
                said = self.answerers[voice].say(text, rng, ANSWER_REST_S)
                parts = (*parts, Speech(_tensor(said), RATE_HZ, voice=voice if self.speak else None))
            messages.append(replace(message, parts=parts))
        return replace(sample, messages=tuple(messages))


SPEAKS = ("en-us+f1", "en+m4")
"""Names of the voices that a model may speak with: a woman's and a man's, shipped as clips too."""


class Omni:
    """All of it: questions written and spoken, answers written and aloud, clips to repeat.

    Args:
        split: of pictures and voices.
        seed: another seed, other samples.
        shares: of ``written``, ``spoken``, ``aloud`` and ``heard``, relative to each other.
        speaker: see :class:`Speakers`.
        voices: whose voices ask; None: the split's.
        speak: as in :class:`SpokenAnswers`.
        scenes: further options of ``Scenes``.
    """

    def __init__(
        self,
        split: Split = "train",
        seed: int = 0,
        shares: Mapping[str, float] | None = None,
        speaker: How = "mixed",
        voices: VoiceSplit | None = None,
        speak: Sequence[str] = (),
        **scenes: Any,
    ) -> None:
        shares = {"written": 0.35, "spoken": 0.3, "aloud": 0.25, "heard": 0.1} if shares is None else shares
        known: dict[str, Callable[[], Source]] = {
            "written": lambda: _scenes(split, seed, scenes),
            "spoken": lambda: SpokenQuestions(split, seed, 1.0, speaker, voices, **scenes),
            "aloud": lambda: SpokenAnswers(
                split, seed, speak=speak, speaker=speaker, voices=voices, **scenes
            ),
            "heard": lambda: Heard(split, seed, sentences=0.3, speaker=speaker, voices=voices),
        }
        if unknown := sorted(set(shares) - set(known)):
            raise DataError(f"made sounds: unknown shares {', '.join(unknown)}; known: {', '.join(known)}")
        if not shares or min(shares.values()) < 0 or not sum(shares.values()):
            raise DataError(
                f"made sounds: shares {dict(shares)}; expected at least one above 0, and none below"
            )
        self.split, self.seed = split, seed
        self.weights = tuple(shares.values())
        self.sources: tuple[Source, ...] = tuple(known[name]() for name in shares)

    def sample(self, index: int) -> Sample:
        rng = Random(f"omni/{self.split}/{self.seed}/{index}")
        (source,) = rng.choices(self.sources, self.weights)
        return source.sample(index)


def _scenes(split: Split, seed: int, options: Mapping[str, Any]) -> Scenes:
    try:
        return Scenes(split, seed, **options)
    except TypeError as error:
        raise DataError(
            f"made sounds: {error}; options of the scenes are form, picture, kinds, turns, wide"
        ) from error


def _heard(sample: Sample, rng: Random, speakers: Speakers, share: float) -> tuple[Message, ...]:
    """The sample's messages with a share of the user's questions as sounds."""
    messages = []
    for message in sample.messages:
        if message.role == "user" and rng.random() < share:
            message = replace(message, parts=_ask_aloud(message.parts, rng, speakers))
        messages.append(message)
    return tuple(messages)


def _ask_aloud(parts: tuple[Part, ...], rng: Random, speakers: Speakers) -> tuple[Part, ...]:
    """A user's turn with its last words, the question, as a sound."""
    question = parts[-1]
    if not isinstance(question, Text):
        return parts
    said = _audio(speakers.say(question.text.strip(), rng))
    # Before the question about two pictures stands the end of a line, which stays.
    return (*parts[:-1], Text("\n"), said) if question.text.startswith("\n") else (*parts[:-1], said)


# --- scoring --------------------------------------------------------------------------------------


def heard_questions(
    split: Split, seed: int, num: int, voices: VoiceSplit | None = None, speaker: How = "mixed"
) -> list[MadeQuestion]:
    """``num`` clips of one to four words by voices of ``voices`` (None: the split's); the answer is those."""
    source = Heard(split, seed, speaker=speaker, voices=voices)
    made = []
    for index in range(num):
        sample = source.sample(index)
        asked = replace(sample, messages=sample.messages[:1])
        made.append(MadeQuestion(asked, source.text(index), "heard", False))
    return made


def ask_aloud(sample: Sample, seed: int, voices: VoiceSplit, speaker: How = "mixed") -> Sample:
    """A sample of :class:`Scenes` whose questions are heard, asked by voices of ``voices``.

    The voice follows from ``seed`` and the sample's id.
    """
    rng = Random(f"{seed}/{sample.id}")
    messages = _heard(sample, rng, _speakers(voices, speaker), 1.0)
    return replace(sample, messages=messages, id=f"spoken/{sample.id}")


_speakers = functools.lru_cache(maxsize=8)(Speakers)


MADE: Mapping[str, type[Source]] = {
    **synthetic.MADE,
    "heard": Heard,
    "spoken_questions": SpokenQuestions,
    "spoken_answers": SpokenAnswers,
    "omni": Omni,
}
"""All made sources by the name a recipe gives."""
