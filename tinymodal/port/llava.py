"""LLaVA 1, 1.5 and 1.6, and TinyLLaVABench, which kept LLaVA's names.

Three forms: a whole model; a projector trained over a language model that nobody copied; a LoRA adapter and
a projector over such a model. Versions 1 and 1.5 do not keep their tower, and none keeps the tower's config:
the name it gives must be a folder, be given with ``--vision``, or be one whose config is known.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymodal.compose.pretrained import one_line, read_json
from tinymodal.core.errors import CheckpointError
from tinymodal.model.configuration_tinymodal import language_config
from tinymodal.port.source import (
    Extras,
    Piece,
    Place,
    Source,
    flat_language,
    in_tower,
    merged,
    old_scale,
    pieces_of,
    preparation_of,
    required,
    tokenizer_of,
    tower_of,
    tower_pieces,
)
from tinymodal.port.weights import File, has_weights, read_adapter, read_file, read_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LANGUAGES = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Mpt": "mpt",
    "MPT": "mpt",
    "Phi": "phi",
    "Stable": "stablelm",
    "Qwen2": "qwen2",
    "Gemma2": "gemma2",
    "Gemma": "gemma",
}
"""What the name of the class in ``architectures`` says of the language model; the first that it holds."""

STABLELM_KEYS = {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}
"""StableLM's keys before transformers had a class for it -> transformers'."""

TOWER = re.compile(r"(model|transformer)\.vision_tower\.vision_tower\.(?P<rest>.+)")
PROJECTOR = re.compile(r"(model|transformer)\.mm_projector\.(?P<rest>(\d+\.)?(weight|bias))")
NEWLINE = re.compile(r"(model|transformer)\.image_newline")
STRANGE = ("mm_projector", "vision_tower", "vision_resampler", "image_newline")
WORDS = ("model.embed_tokens.weight", "transformer.wte.weight")
START, END = "<im_start>", "<im_end>"


def recognise(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether ``config.json`` has LLaVA's own keys beside the language model's."""
    return bool(config.get("mm_vision_tower")) and config.get("model_type") != "omnilmm"


def where(name: str) -> Place | None:
    """Place of a tensor of LLaVA, or of the language model under it."""
    name = name.removeprefix("base_model.model.")
    if found := TOWER.fullmatch(name):
        return in_tower(found["rest"])
    if found := PROJECTOR.fullmatch(name):
        return "connector", f"proj.{found['rest']}"
    if NEWLINE.fullmatch(name):
        return "marks", "newline"
    return None if any(word in name for word in STRANGE) else ("language", name)


def read(folder: Path, config: Mapping[str, Any], extras: Extras) -> Source:
    """A whole checkpoint, or a projector or an adapter with ``--language``."""
    bench = any(str(name).startswith("TinyLlava") for name in config.get("architectures") or ())
    system = "TinyLLaVABench" if bench else "LLaVA"
    with one_line(f"{folder} ({system})", CheckpointError):
        if (folder / "adapter_config.json").is_file():
            family = f"{system}, LoRA over {_name(extras.language)}"
            words, files = _base(folder, extras)
            files += [File(f, read_file(folder / f)) for f in _beside_adapter(folder)]
        elif has_weights(folder):
            family, words, files = f"{system}, whole", own_language(config), read_folder(folder)
        elif (folder / "mm_projector.bin").is_file():
            family = f"{system}, projector over {_name(extras.language)}"
            words, files = _base(folder, extras)
            files += [File("mm_projector.bin", read_file(folder / "mm_projector.bin"))]
        else:
            raise CheckpointError(
                f"{folder} ({system}): holds no weights, no mm_projector.bin and no adapter_config.json; the "
                f"download is incomplete"
            )
        tower = tower_of(config["mm_vision_tower"], extras.vision, family)
    pieces = pieces_of(files, where, family)
    if config.get("mm_use_im_start_end"):
        pieces = _new_words(pieces)
    if not any(piece.part == "vision" for piece in pieces):
        pieces = tower_pieces(config["mm_vision_tower"], extras.vision, family) + pieces
    if (folder / "adapter_config.json").is_file():
        pieces = merged(pieces, read_adapter(folder), where, family)
    return _source(folder, config, extras, family, words, tower, pieces)


def own_language(config: Mapping[str, Any]) -> PreTrainedConfig:
    """The language model's config out of LLaVA's.

    Raises:
        CheckpointError: ``architectures`` names a class of a language model that is not known.
    """
    name = str((config.get("architectures") or ["LlavaLlamaForCausalLM"])[0])
    model_type = next((kind for word, kind in LANGUAGES.items() if word in name), None)
    if model_type is None:
        raise CheckpointError(
            f"config.json: the class {name} names no known language model; known: "
            f"{', '.join(dict.fromkeys(LANGUAGES.values()))}"
        )
    if model_type == "stablelm":
        config = {STABLELM_KEYS.get(key, key): value for key, value in config.items()}
    return flat_language(config, model_type)


def _base(folder: Path, extras: Extras) -> tuple[PreTrainedConfig, list[File]]:
    """The language model under a projector or an adapter; may itself be a whole LLaVA."""
    base = required(
        extras.language, "--language", f"{folder} holds only what was trained over a language model"
    )
    config = read_json(base / "config.json", f"--language {base}")
    words = own_language(config) if "mm_vision_tower" in config else language_config(config)
    return words, read_folder(base, f"{base.name}/")


def _beside_adapter(folder: Path) -> list[str]:
    """What a LoRA run saved besides the adapter.

    Raises:
        CheckpointError: nothing: then the projector is missing.
    """
    found = [name for name in ("non_lora_trainables.bin", "mm_projector.bin") if (folder / name).is_file()]
    if not found:
        raise CheckpointError(
            f"{folder}: has an adapter but no non_lora_trainables.bin, which holds the projector; copy it "
            "there"
        )
    return found[:1]


def _name(language: Path | None) -> str:
    return "a base" if language is None else language.name


def _new_words(pieces: list[Piece]) -> list[Piece]:
    """A projector's file may hold the two new rows of the embedding alone: those are the marks."""
    result: list[Piece] = []
    for piece in pieces:
        if piece.part == "language" and piece.to in WORDS and len(piece.tensor) == 2:
            for i, mark in enumerate(("start", "end")):
                row = piece.tensor[i : i + 1]
                result.append(Piece(piece.file, f"{piece.name} row {i}", row, "marks", mark))
        else:
            result.append(piece)
    return result


def _source(
    folder: Path,
    config: Mapping[str, Any],
    extras: Extras,
    family: str,
    words: PreTrainedConfig,
    tower: PreTrainedConfig,
    pieces: list[Piece],
) -> Source:
    siglip = tower.model_type.startswith("siglip")
    strategy = resize(config, siglip, family)
    # LLaVA merges tiles, and writes a newline, only where there are tiles.
    merge = str(config.get("mm_patch_merge_type") or "flat") if strategy["resize"] == "anyres" else "flat"
    marks = ("start", "end") if config.get("mm_use_im_start_end") else ()
    connector, options = projector(str(config.get("mm_projector_type") or "linear"), family)
    known = [folder, *([extras.language] if extras.language else [])]
    source = Source(
        family=family,
        language=words,
        vision=tower,
        connector=connector,
        options=options,
        marks=(*marks, *(("newline",) if "unpad" in merge else ())),
        merge=merge,
        mark_words={"start": START, "end": END} if marks else {},
        # TinyLLaVABench cuts SigLIP's last block off and reads the end of what is left; nothing is dropped.
        feature_layer=-2 if siglip else config.get("mm_vision_select_layer", -2),
        keep_class=config.get("mm_vision_select_feature", "patch") == "cls_patch" and not siglip,
        preparation=preparation_of(tower, [extras.vision or Path(config["mm_vision_tower"])], **strategy),
        tokenizer=tokenizer_of(extras, known),
        template=extras.template or template(config, words, folder),
        pieces=pieces,
        # It ran with transformers 4 alone.
        times=old_scale(words),
    )
    if family.endswith("whole") and (folder / "mm_projector.bin").is_file():
        source.notes.append("mm_projector.bin lies in the folder too; the model's own projector was read")
    if "unpad" not in merge:
        source.pieces = [unused_newline(piece, merge) for piece in source.pieces]
    return source


def unused_newline(piece: Piece, merge: str) -> Piece:
    """A piece as it is, or LLaVA's newline where its way to merge tiles writes none."""
    if piece.part != "marks" or piece.to != "newline":
        return piece
    return Piece(
        piece.file, piece.name, piece.tensor, None, reason=f"tiles are merged '{merge}', without newline"
    )


def projector(name: str, family: str) -> tuple[str, dict[str, Any]]:
    """Our connector and its options for a name of LLaVA's and TinyLLaVA's.

    Raises:
        CheckpointError: it is of another architecture than any of ours.
    """
    if name in ("linear", "identity"):
        return name, {}
    if found := re.fullmatch(r"mlp(\d+)x_gelu", name):
        return "mlp", {"depth": int(found[1])}
    raise CheckpointError(
        f"{family}: the projector '{name}' is not known; known: identity, linear, mlpNx_gelu"
    )


def resize(config: Mapping[str, Any], siglip: bool, family: str) -> dict[str, Any]:
    """What a :class:`Preparation` says for LLaVA's ``image_aspect_ratio``: ``resize`` and its numbers.

    Raises:
        CheckpointError: nobody knows the ratio, or it needs pinpoints and has none.
    """
    ratio, points = str(config.get("image_aspect_ratio") or "square"), config.get("image_grid_pinpoints")
    if ratio == "anyres" and points:
        points = ast.literal_eval(points) if isinstance(points, str) else points
        # LLaVA's are (width, height).
        return {"resize": "anyres", "pinpoints": tuple((int(h), int(w)) for w, h in points)}
    if ratio == "pad":
        return {"resize": "pad"}
    if ratio == "square":  # what the tower's own processor does: CLIP's crops, SigLIP's stretches
        return {"resize": "square" if siglip else "crop"}
    raise CheckpointError(
        f"{family}: image_aspect_ratio '{ratio}' with image_grid_pinpoints {points} is not known; known: "
        "square, pad, and anyres with pinpoints"
    )


def template(config: Mapping[str, Any], words: PreTrainedConfig, folder: Path) -> str:
    """Name of the conversation a checkpoint was trained on, which LLaVA keeps nowhere: guessed."""
    names = f"{config.get('_name_or_path', '')} {folder.name}".lower()
    if words.model_type == "llama":
        if "34b" in names:
            return "chatml_direct"
        if "llama-2" in names and "chat" in names:
            return "llava_llama_2"
        return "v0" if re.search(r"[-_]v0\b", names) else "vicuna_v1"
    return {
        "mistral": "mistral_instruct",
        "mpt": "mpt",
        "phi": "phi",
        "stablelm": "phi",
        "gemma": "gemma",
    }.get(words.model_type, "vicuna_v1")
