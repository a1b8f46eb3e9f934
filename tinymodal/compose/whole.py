"""Parts out of a composed model: a recipe names its folder, or that of its run, where it names a part.

A tower that was trained in one model goes on in another, with the preparation it was trained with. Language
models are named with ``model.path``, which takes the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from tinymodal.compose.pretrained import fetch, read_json, read_weights
from tinymodal.core.errors import CheckpointError
from tinymodal.model.configuration_tinymodal import TinyModalConfig

Perceives = Literal["vision", "audio"]

KINDS: Mapping[Perceives, str] = {"vision": "image", "audio": "audio"}
"""Media of each part, as ``modeling_tinymodal`` names towers and connectors."""


def model_folder(name: str, key: str) -> Path:
    """The folder of a model for ``name``; that of a run has it inside.

    Raises:
        CheckpointError: see :func:`~tinymodal.compose.pretrained.fetch`.
    """
    folder = fetch(name, key)
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        return folder / "model"
    return folder


def is_composed(document: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a composed model."""
    return document.get("model_type") == TinyModalConfig.model_type


def read_tower(name: str, key: str, part: Perceives) -> tuple[Path, dict[str, Any]]:
    """The folder that holds a tower, and what its config says of it.

    Args:
        name: folder or Hub name of a tower, of a larger model, or of a composed one or its run.
        key: the recipe key that holds it.
        part: which tower of a composed model.

    Raises:
        CheckpointError: there is no such folder, or the composed model in it lacks the part.
    """
    folder = model_folder(name, key)
    where = f"{key}: {folder}"
    document = read_json(folder / "config.json", where)
    if not is_composed(document):
        return folder, document
    found = document.get(f"{part}_config")
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: the composed model in it has no {part} tower; name one that does")
    return folder, found


def tower_weights(folder: Path, where: str, part: Perceives) -> dict[str, Tensor]:
    """Every tensor of one tower of a composed model, by the tower's names.

    Raises:
        CheckpointError: see :func:`~tinymodal.compose.pretrained.read_weights`.
    """
    return without_prefix(read_weights(folder, where), f"model.towers.{KINDS[part]}.")


def without_prefix(weights: Mapping[str, Tensor], begins: str) -> dict[str, Tensor]:
    """Those of ``weights`` whose names begin so, by the rest of their names."""
    return {name.removeprefix(begins): w for name, w in weights.items() if name.startswith(begins)}


def prepared_as(folder: Path, part: Perceives) -> dict[str, Any] | None:
    """How a composed model's pictures or sounds are prepared, as it wrote that down; None of others.

    Raises:
        CheckpointError: it does not say.
    """
    where, file = str(folder), folder / "config.json"
    if not file.is_file() or not is_composed(read_json(file, where)):
        return None
    said = read_json(folder / "processor_config.json", where)
    reader, how = {
        "vision": ("image_processor", "preparation"),
        "audio": ("feature_extractor", "hearing"),
    }[part]
    found = said.get(reader)
    if not isinstance(found, dict) or not isinstance(found.get(how), dict):
        raise CheckpointError(f"{folder}: processor_config.json does not say {reader}.{how}")
    return dict(found[how])
