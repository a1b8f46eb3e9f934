"""Examples for the web chat, made on the spot: drawn scenes, and a question that is spoken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import soundfile

from tinymodal.data.scenes import Random, Thing, draw
from tinymodal.data.sounds import joined, spoken_words
from tinymodal.data.voices import RATE_HZ, shipped

PARTY = (
    Thing(0, "shape", "circle", "red", "big"),
    Thing(2, "shape", "triangle", "yellow", "small"),
    Thing(4, "shape", "star", "blue", "big"),
    Thing(6, "number", number=42),
    Thing(8, "shape", "ring", "green", "small"),
)
SQUARES = (
    Thing(1, "shape", "square", "orange", "big"),
    Thing(3, "shape", "square", "blue", "small"),
    Thing(5, "shape", "cross", "purple", "big"),
    Thing(7, "shape", "square", "green", "big"),
)
QUESTIONS = (
    ("party", "What colour is the star?", False),
    ("party", "What do you see?", False),
    ("squares", "How many squares are there?", False),
    ("squares", "Where is the purple cross?", True),
)
"""Scene, question, and whether it is spoken where the model hears."""
GAP_S, REST_S = 0.12, 0.3


@dataclass(frozen=True, slots=True)
class Example:
    """Something to try."""

    question: str
    picture: str | None = None
    sound: str | None = None

    @property
    def files(self) -> list[str]:
        """Its picture and its sound."""
        return [file for file in (self.picture, self.sound) if file is not None]


def examples_of(folder: Path, *, sees: bool, hears: bool) -> list[Example]:
    """What a model of these senses can be asked, written into ``folder``; nothing for one of text alone."""
    if not sees:
        return [Example("", None, _spoken(folder, "purple cross"))] if hears else []
    pictures = {"party": str(folder / "party.png"), "squares": str(folder / "squares.png")}
    for (name, path), scene in zip(pictures.items(), (PARTY, SQUARES), strict=True):
        draw(scene, Random(name)).save(path)
    return [
        Example("", pictures[scene], _spoken(folder, question))
        if spoken and hears
        else Example(question, pictures[scene])
        for scene, question, spoken in QUESTIONS
    ]


def _spoken(folder: Path, text: str) -> str:
    """A text as clips of a shipped voice, in a file that is named after it."""
    words = spoken_words(text)
    said = joined(words, shipped().of("test")[0], [GAP_S] * (len(words) - 1), (REST_S, REST_S))
    path = folder / f"{'-'.join(words)}.wav"
    soundfile.write(path, said.wave, RATE_HZ, subtype="PCM_16")
    return str(path)
