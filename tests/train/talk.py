"""Made conversations that need no drawing. Recipes of the tests name this file: ``talk.py:Talk``."""

from __future__ import annotations

import random

from PIL import Image as Pictures

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Message, Sample, Text

WORDS = ("red", "green", "blue", "circle", "square", "star", "what", "colour", "is", "it", "one", "two")


class Talk:
    """Endless conversations, every third without a picture. ``targets``: of 9 tokens, below 3 and 5."""

    def __init__(self, seed: int = 0, pictures: bool = True, targets: bool = False, length: int = 6) -> None:
        self.seed, self.pictures, self.targets, self.length = seed, pictures, targets, length

    def sample(self, index: int) -> Sample:
        rng = random.Random(f"{self.seed}/{index}")
        words = [Text(" ".join(rng.choices(WORDS, k=rng.randint(1, self.length)))) for _ in range(2)]
        seen: tuple[Image, ...] = ()
        if self.pictures and (index % 3 or self.targets):
            pixels = Pictures.new("RGB", (24, 24), tuple(rng.choices(range(256), k=3)))
            cells = tuple((rng.randrange(3), rng.choice([-100, 0, 4])) for _ in range(9))
            seen = (Image(pixels, cells if self.targets else None),)
        turns = (Message("user", (*seen, words[0])), Message("assistant", (words[1],)))
        return Sample(turns, f"talk-{self.seed}/{index}")


class Spoilt(Talk):
    """Every fifth row is bad, and one of seven is longer than any row."""

    def sample(self, index: int) -> Sample:
        sample = super().sample(index)
        if index % 5 == 4:
            raise DataError(f"{sample.id}: no picture there")
        if index % 7 == 6:
            turns = (Message("user", (Text("red " * 100),)), Message("assistant", (Text("one"),)))
            return Sample(turns, sample.id)
        return sample


class Pairs(Talk):
    """The right answer repeats the question's first word; the wrong one is another."""

    def sample(self, index: int) -> Sample:
        sample = super().sample(index)
        question = sample.messages[0]
        right = question.parts[-1].text.split()[0]
        wrong = WORDS[(WORDS.index(right) + 1) % len(WORDS)]
        answers = [(question, Message("assistant", (Text(word),))) for word in (right, wrong)]
        return Sample(answers[0], sample.id, rejected=answers[1])
