"""What a model is asked where a request only brings a sound or a text: its own training says how.

A small model answers the question it has learned. Rows of format ``asr`` and ``tts`` ask as
``data/sound_rows.py`` has it; made sounds, which the starter and the demo learned from, ask otherwise.
Measured on the starter, words of a hundred made answers that were not understood when it was given them
to say: 23 % after "Read aloud: ...", 5 % after "What do you hear?".
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinymodal.data.sound_rows import READ, TRANSCRIBE
from tinymodal.data.sounds import ASK_HEARD, MADE
from tinymodal.data.synthetic import MADE as SEEN

STARTER = "starter"


@dataclass(frozen=True, slots=True)
class Asking:
    """The words beside a sound, and before a text."""

    transcribe: str = TRANSCRIBE
    """Asked beside a sound that the model shall write down."""
    read: str = READ
    """Asked before a text that it shall say; ``{text}`` is the text."""


OF_MADE = Asking(transcribe=ASK_HEARD[1], read=ASK_HEARD[0])


def asking_of(model: str) -> Asking:
    """How a model was asked in training, as far as the recipe beside it tells.

    Args:
        model: as for ``tinymodal serve``: the starter's name, a run's or a model's folder, a Hub name.
    """
    if model == STARTER:
        return OF_MADE
    for recipe in (Path(model) / "recipe.toml", Path(model).parent / "recipe.toml"):
        try:
            told = tomllib.loads(recipe.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return OF_MADE if _hears_made(told) else Asking()
    return Asking()


def _hears_made(recipe: dict[str, Any]) -> bool:
    made = {source.get("made") for stage in recipe.get("stages", ()) for source in stage.get("data", ())}
    return bool(made & (set(MADE) - set(SEEN)))
