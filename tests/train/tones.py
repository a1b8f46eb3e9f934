"""Sounds of one tone, and rows about them. Recipes of the tests name this file: ``tones.py:Tones``."""

from __future__ import annotations

import json
import math
import random
import struct
import wave
from pathlib import Path

import torch

from tests.train.talk import Talk
from tinymodal.core.types import Audio, Image, Message, Sample, Speech, Text

RATE_HZ = 16_000
PITCHES = {"low": 300.0, "high": 1200.0}


def tone(name: str, seconds: float = 0.5, seed: int = 0) -> torch.Tensor:
    """A tone of about that pitch, with a little noise: no two alike."""
    rng = random.Random(f"{name}/{seed}")
    pitch = PITCHES[name] * rng.uniform(0.9, 1.1)
    t = torch.arange(round(seconds * RATE_HZ)) / RATE_HZ
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    return rng.uniform(0.1, 0.5) * torch.sin(2 * math.pi * pitch * t + rng.uniform(0, 6)) + 0.01 * noise


def write(file: Path, samples: torch.Tensor) -> Path:
    """A wav file of 16 bits."""
    numbers = (samples * 32_000).round().int().tolist()
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE_HZ)
        sound.writeframes(struct.pack(f"<{len(numbers)}h", *numbers))
    return file


def asr_rows(folder: Path, count: int = 8) -> Path:
    """A jsonl of transcripts, and the sounds beside it."""
    names = list(PITCHES)
    rows = []
    for n in range(count):
        name = names[n % 2]
        write(folder / f"{n}.wav", tone(name, 0.3 + 0.2 * (n % 3), n))
        rows.append({"audio": f"{n}.wav", "text": name})
    file = folder / "tones.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class Tones(Talk):
    """Endless conversations: a sound, a picture, both, or neither. ``spoken``: answers that sound."""

    def __init__(
        self, seed: int = 0, spoken: bool = False, pictures: bool = True, sounds: bool = True
    ) -> None:
        super().__init__(seed, pictures)
        self.spoken, self.sounds = spoken, sounds

    def sample(self, index: int) -> Sample:
        question, answer = super().sample(index).messages
        asked = (
            question.parts if self.pictures else tuple(p for p in question.parts if not isinstance(p, Image))
        )
        rng = random.Random(f"{self.seed}/tones/{index}")
        if self.sounds and index % 2:
            heard = tone(rng.choice(list(PITCHES)), rng.choice([0.3, 0.7, 1.2]), index)
            asked = (
                (asked[0], Audio(heard, RATE_HZ), *asked[1:])
                if index % 4 == 1
                else (Audio(heard, RATE_HZ), *asked)
            )
        said = answer.parts
        if self.spoken:
            said = (*said, Speech(tone("high", rng.choice([0.3, 0.6]), index), RATE_HZ))
        return Sample((Message("user", asked), Message("assistant", said)), f"tones-{self.seed}/{index}")


class Named:
    """``What is it`` about a tone, answered with its name. ``shuffled``: the sound is another's."""

    def __init__(self, seed: int = 0, shuffled: bool = False, size: int | None = None) -> None:
        self.seed, self.shuffled = seed, shuffled

    def sample(self, index: int) -> Sample:
        rng = random.Random(f"{self.seed}/{index}")
        name = rng.choice(list(PITCHES))
        played = rng.choice(list(PITCHES)) if self.shuffled else name
        sound = Audio(tone(played, rng.choice([0.3, 0.5]), rng.randrange(10**6)), RATE_HZ)
        asked = Message("user", (sound, Text("what is it")))
        return Sample((asked, Message("assistant", (Text(name),))), f"named-{self.seed}/{index}")
