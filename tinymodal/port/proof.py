"""What is asked of an export before it counts: prompts of the model's own kind, answered alike on both sides.

A target's module writes a folder and then proves it: :class:`Proof` holds the comparison of logits and greedy
text (``port.parity``), and whatever else had to be equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from tinymodal.core.errors import ExportError
from tinymodal.core.types import Audio, Image, Message, Text
from tinymodal.port.parity import NUM_NEW_TOKENS, RATE_HZ, Case, Parity, cases, picture, prepared

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed

NUM_PROMPTS = 8
"""Compared, unless asked for otherwise."""

QUESTIONS = (
    "What is shown?",
    "How many things are there?",
    "What colour is the largest one?",
    "Is there a circle?",
    "Describe it in one sentence.",
    "What is left of the square?",
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a model is exported."""

    dtype: str | None = None
    """Of the weights, ``hub`` and ``llava``: a key of :data:`DTYPES`; None: as they were saved."""
    lora: Literal["merged", "apart"] = "merged"
    """``hub``: the last stage's adapter inside its matrices, or beside the model that it was trained on."""
    weights: str = "f32"
    """``gguf``: the type of its matrices."""
    without: tuple[str, ...] = ()
    """Parts that are left out, of ``compose.targets.PARTS``."""
    num_prompts: int = NUM_PROMPTS


@dataclass(frozen=True, slots=True)
class Job:
    """One export."""

    model: str
    """As the user named it."""
    folder: Path
    """Of the model."""
    run: Path | None
    """Its run's, with the record of the training; None where there is none."""
    composed: Composed
    options: Options

    @property
    def name(self) -> str:
        """What the model is called: its folder's name, or its run's."""
        own = self.folder.resolve()
        return own.parent.name if own.name == "model" else own.name

    @property
    def sees(self) -> bool:
        return self.composed.model.config.vision_config is not None and "vision" not in self.options.without

    @property
    def hears(self) -> bool:
        return self.composed.model.config.audio_config is not None and "audio" not in self.options.without

    def prompts(self) -> tuple[list[Case], list[str]]:
        """What both sides are asked, and what is left out because the model cannot read as much."""
        return prompts(self.composed, self.options.num_prompts, self.sees, self.hears)


class Check(NamedTuple):
    """Something besides logits that had to be so."""

    name: str
    passed: bool
    found: str


@dataclass(slots=True)
class Proof:
    """What came of comparing."""

    parity: Parity | None
    """None: there is nothing to compare with."""
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return (self.parity is None or self.parity.passed) and all(check.passed for check in self.checks)


def prompts(
    composed: Composed, num: int, sees: bool = True, hears: bool = True
) -> tuple[list[Case], list[str]]:
    """Prompts with every kind of media the model has, the same each time.

    Texts as they come, and then questions in the model's own chat template.

    Args:
        composed: the model.
        num: how many.
        sees: whether pictures are shown.
        hears: whether sounds are played.

    Returns:
        The prompts, and the names of those that are longer than the model can read.
    """
    plain = cases(with_pictures=sees)
    if hears:
        token = composed.processor.audio_token
        plain.append(Case("a sound", (), f"USER: {token}\nWhat was said? ASSISTANT:", (sound(1.3, 1),)))
    found: list[Case] = []
    left_out: list[str] = []
    room = composed.encoder.max_prompt_tokens
    asked = 0
    while len(found) < num and asked < 4 * num:
        # One of each kind is asked as a user would.
        as_it_comes = plain and len(found) < max(1, num - 1 - sees - hears)
        case = plain.pop(0) if as_it_comes else _asked(composed, asked, sees, hears)
        asked += 1
        length = prepared(composed, case)["input_ids"].shape[1] + NUM_NEW_TOKENS
        if length == NUM_NEW_TOKENS:
            continue  # a template for captions writes no words
        if room is not None and length > room:
            left_out.append(f"{case.name}: {length} tokens, the language model reads {room}")
            continue
        found.append(case)
    if not found:
        raise ExportError(f"no prompt fits the language model's {room} positions: {'; '.join(left_out[:2])}")
    return found, left_out


def _asked(composed: Composed, number: int, sees: bool, hears: bool) -> Case:
    """One question as a user of the model would ask it, with what it is about."""
    question = QUESTIONS[number % len(QUESTIONS)]
    kind = ("words", *(["picture"] if sees else []), *(["sound"] if hears else []))[
        -1 - number % (1 + sees + hears)
    ]
    size = ((320, 240), (200, 360), (256, 256))[number % 3]
    pictures = (picture(*size, seed=10 + number),) if kind == "picture" else ()
    sounds = (sound(0.4 + 0.7 * (number % 4), seed=number),) if kind == "sound" else ()
    text = chat_text(composed, question, len(pictures), len(sounds))
    return Case(f"question {number + 1} over {kind}", pictures, text, sounds)


def chat_text(composed: Composed, question: str, num_pictures: int, num_sounds: int) -> str:
    """A question in the model's chat template, one placeholder for each picture and sound before it."""
    media: list[Any] = [Image(b"")] * num_pictures + [Audio(b"")] * num_sounds
    message = Message("user", (*media, Text(question)))
    processor = composed.processor
    places = [processor.image_token] * num_pictures + [processor.audio_token] * num_sounds
    return composed.encoder.template.render((message,), iter(places), reply=True).text


def sound(seconds: float, seed: int) -> Tensor:
    """A made sound: gliding tones and a little noise, float32 [samples]."""
    random = torch.Generator().manual_seed(seed)
    t = torch.arange(round(seconds * RATE_HZ)) / RATE_HZ
    tones = [
        torch.sin(2 * torch.pi * (110 * (seed % 5 + n) * t + 40 * n * t**2)) / (n + 1) for n in range(1, 4)
    ]
    return 0.2 * torch.stack(tones).sum(0) + 0.01 * torch.randn(len(t), generator=random)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}
