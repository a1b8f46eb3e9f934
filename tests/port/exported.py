"""Small models of real architectures, written to a folder for export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.port.foreign import numbers
from tinymodal.compose.build import Composed, load, save
from tinymodal.compose.tiny import tiny_model
from tinymodal.port.proof import Job, Options

NEXT = {"resize": "anyres", "marks": ["newline"], "merge": "spatial_unpad"}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
]
"""Language models that llama.cpp reads, and what is changed in the config of each."""
SIGLIP: dict[str, Any] = {"vision": "siglip_vision_model", "sight": {"resize": "pad"}}
"""The tower that it computes rightly."""


def a_model(folder: Path, seed: int = 1, **what: Any) -> Path:
    """A model with numbers large enough that a wrong one shows; a Llava of CLIP and llama unless asked."""
    sight = {"resize": "crop", **what.pop("sight", {})}
    made = tiny_model(**{"vision": "clip_vision_model", "connector": "mlp", "sight": sight, **what})
    numbers(made.model, seed)
    save(made, folder)
    return folder


def a_job(folder: Path, **options: Any) -> Job:
    return Job(str(folder), folder, None, load(folder), Options(**options))


def blind(**what: Any) -> Composed:
    return tiny_model(vision=None, **what)
