"""OmniLMM-12B: a Mistral with EVA02-CLIP and a resampler, pictures between ``<im_start>`` and ``<im_end>``.

The tower lies in the folder if it was trained, else it is given with ``--vision`` (timm's file or folder).
The embeddings of the two words around a picture become our marks, so that a picture reads the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from tinymodal.compose.pretrained import one_line, read_json
from tinymodal.core.errors import CheckpointError
from tinymodal.model.encoders import tower_config
from tinymodal.model.hf_tower import OPENAI_CLIP
from tinymodal.model.resamplers import sincos_table
from tinymodal.port.source import (
    Extras,
    Piece,
    Place,
    Source,
    flat_language,
    pieces_of,
    preparation_of,
    required,
    tokenizer_of,
)
from tinymodal.port.weights import File, read_file, read_folder

FAMILY = "OmniLMM"
ARCHITECTURE = "eva02_enormous_patch14_clip_224"
"""timm's name of the tower; the config says it with the tag of its weights."""

TABLE = "pos_embed"


def recognise(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether ``config.json`` is OmniLMM's."""
    return config.get("model_type") == "omnilmm"


def where(name: str) -> Place | None:
    """Place of a tensor of OmniLMM."""
    if name.startswith("model.vision_tower."):
        return "vision", name.removeprefix("model.vision_tower.")
    if name.startswith("model.resampler."):
        return "connector", name.removeprefix("model.resampler.")
    return ("language", name) if name.startswith(("model.", "lm_head.")) else None


def read(folder: Path, config: Mapping[str, Any], extras: Extras) -> Source:
    """The folder, and the tower from ``--vision`` where the folder has none."""
    with one_line(f"{folder} ({FAMILY})", CheckpointError):
        words = flat_language(config, "mistral")
        tower = tower_config(_tower(config, extras.vision))
    pieces = pieces_of(read_folder(folder), where, FAMILY)
    if not any(piece.part == "vision" for piece in pieces):
        pieces = _tower_pieces(folder, extras.vision) + pieces
    # Queries lie in a square, whatever number the config says.
    num_queries = isqrt(int(config["num_query"])) ** 2
    pieces, learned = _positions(pieces, num_queries)
    image_px = int(config.get("image_size", 224))
    return Source(
        family=FAMILY,
        language=words,
        vision=tower,
        connector="sincos",
        options={
            "num_queries": num_queries,
            "key_positions": "interpolated",
            "query_positions": True,
            "learned_positions": learned,
        },
        marks=("start", "end"),
        mark_words={"start": "<im_start>", "end": "<im_end>"},
        feature_layer=-2,
        preparation=preparation_of(
            tower,
            [],
            "square",
            height_px=image_px,
            width_px=image_px,
            mean=OPENAI_CLIP[0],
            std=OPENAI_CLIP[1],
        ),
        tokenizer=tokenizer_of(extras, [folder]),
        template=extras.template or "zephyr",
        pieces=pieces,
    )


def _tower(config: Mapping[str, Any], given: Path | None) -> dict[str, Any]:
    """Config of the tower. The output of the last block but one goes through the last norm."""
    if given is not None and (given / "config.json").is_file():
        said = read_json(given / "config.json", f"--vision {given}")
    else:
        named = str(config.get("mm_vision_tower", ""))
        said = {"architecture": named.split(".")[0] if named.startswith("eva02") else ARCHITECTURE}
    found = tower_config(said)
    return {**found.to_dict(), "model_type": found.model_type, "final_norm": True}


def _tower_pieces(folder: Path, given: Path | None) -> list[Piece]:
    """The tower's weights by timm's own names, from a folder or a file."""
    path = required(given, "--vision", f"{folder} ({FAMILY}): does not hold its tower, EVA02-CLIP of timm")
    files = read_folder(path, f"{path.name}/") if path.is_dir() else [File(path.name, read_file(path))]
    return pieces_of(files, lambda name: ("vision", name), FAMILY)


def _positions(pieces: list[Piece], num_queries: int) -> tuple[list[Piece], bool]:
    """The table of the queries' positions: ours is computed, so it is kept only if it was trained."""
    found = next((p for p in pieces if p.part == "connector" and p.to == TABLE), None)
    if found is None:
        return pieces, False
    side = isqrt(num_queries)
    table = sincos_table((side, side), found.tensor.shape[-1])
    room = 2 * torch.finfo(found.tensor.dtype).eps
    if table.shape != found.tensor.shape or (table - found.tensor.float()).abs().max() > room:
        return pieces, True
    unused = replace(found, part=None, reason="the fixed table of sines and cosines, computed")
    return [unused if piece is found else piece for piece in pieces], False
