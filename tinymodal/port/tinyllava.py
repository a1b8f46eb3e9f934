"""TinyLLaVA Factory: a Hugging Face folder, the three folders of a stage, or those with a LoRA adapter.

All keep every part with its config. Which form a run wrote depended on a word in the path of its output; here
the files decide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymodal.compose.pretrained import one_line, read_json
from tinymodal.core.errors import CheckpointError
from tinymodal.model.configuration_tinymodal import language_config
from tinymodal.model.encoders import encoder_of, tower_config
from tinymodal.port.llava import projector, resize
from tinymodal.port.source import (
    Extras,
    Piece,
    Place,
    Source,
    in_qformer,
    in_tower,
    merged,
    old_scale,
    pieces_of,
    preparation_of,
    qformer_sizes,
    tokenizer_of,
    tower_of,
)
from tinymodal.port.weights import has_weights, read_adapter, read_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

FAMILY = "TinyLLaVA Factory"
FOLDERS = {
    "language_model": "language_model.",
    "vision_tower": "vision_tower._vision_tower.",
    "connector": "connector.",
}
"""Folders of a stage -> what a whole model puts before the names of their tensors."""

TOWER = re.compile(r"vision_tower\._vision_tower\.((?P<which>clip|dinov2)\.)?(?P<rest>.+)")
TWO = {"clip": "first.backbone.", "dinov2": "second.backbone."}
PROJECTORS = {"clip": 0, "dinov2": 1}
"""Of a mixture of features: its two towers, and its two projectors, which alternate in the tokens."""

TEMPLATES = {
    "llama": "vicuna_v1",
    "openelm": "vicuna_v1",
    "phi": "phi",
    "stablelm": "phi",
    "gemma": "gemma",
}
"""Language model -> template, as TinyLLaVA's scripts pair them. Qwen 2 has two, see :func:`template`."""


def recognise(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether ``config.json`` is TinyLLaVA Factory's."""
    return config.get("model_type") == "tinyllava"


def read(folder: Path, config: Mapping[str, Any], extras: Extras) -> Source:
    """Any of the three forms."""
    staged = all((folder / part).is_dir() for part in FOLDERS)
    adapted = (folder / "adapter_config.json").is_file()
    family = f"{FAMILY}, {'LoRA' if adapted else 'three folders' if staged else 'whole'}"
    if adapted and not staged:
        raise CheckpointError(
            f"{folder} ({family}): has an adapter but not the folders {', '.join(FOLDERS)} beside it; the "
            "download is incomplete"
        )
    if not staged and not has_weights(folder):
        raise CheckpointError(
            f"{folder} ({family}): holds neither weights nor the folders {', '.join(FOLDERS)}; the download "
            "is incomplete"
        )
    with one_line(f"{folder} ({family})", CheckpointError):
        words = language_config(_part(config, "text_config", folder / "language_model"))
        vision, two = _towers(config, folder, family)
        connector, options = _connector(config, family)
    where = _places(connector)
    pieces = _staged(folder, where, family) if staged else pieces_of(read_folder(folder), where, family)
    if connector == "qformer":
        options |= qformer_sizes(pieces, family)
    if adapted:
        pieces = merged(pieces, read_adapter(folder), where, family)
    first_is_class = encoder_of(vision).leading_tokens(vision) > 0 or two
    patches_only = config.get("vision_feature_select_strategy", "patch") == "patch"
    tokenizer = tokenizer_of(extras, [folder, folder / "language_model"])
    strategy = resize(config, vision.model_type.startswith("siglip"), family)
    source = Source(
        family=family,
        language=words,
        vision=vision,
        connector=connector,
        options=options,
        feature_layer=int(config.get("vision_feature_layer", -2)),
        keep_class=not patches_only and first_is_class,
        # TinyLLaVA drops the first token of every tower; SigLIP has no class token, and loses a patch.
        drop_first=patches_only and not first_is_class,
        preparation=preparation_of(vision, [extras.vision], **strategy),
        tokenizer=tokenizer,
        template=extras.template or template(words, tokenizer),
        pieces=pieces,
        # It ran with transformers 4 alone.
        times=old_scale(words),
    )
    if source.drop_first:
        source.notes.append("the first patch of each picture is left out, as TinyLLaVA did (drop_first)")
    return source


def _staged(folder: Path, where: Callable[[str], Place | None], family: str) -> list[Piece]:
    """The tensors of the three folders, whose names lack the part's; peft put ``.base_layer`` into some."""
    pieces = []
    for part, prefix in FOLDERS.items():

        def in_part(name: str, prefix: str = prefix) -> Place | None:
            return where(prefix + name.replace(".base_layer.", "."))

        pieces += pieces_of(read_folder(folder / part, f"{part}/"), in_part, family)
    return pieces


def _part(config: Mapping[str, Any], key: str, folder: Path) -> dict[str, Any]:
    """Config of a part: its own folder's, or the one inside the whole config."""
    found = config.get(key)
    if (folder / "config.json").is_file():
        found = read_json(folder / "config.json", str(folder))
    if not isinstance(found, dict) or "model_type" not in found:
        raise CheckpointError(f"config.json has no '{key}' with a model_type")
    return {name: value for name, value in found.items() if name != "auto_map"}


def _towers(config: Mapping[str, Any], folder: Path, family: str) -> tuple[PreTrainedConfig, bool]:
    """The tower's config, of a mixture of features that of both; and whether there are two."""
    first = tower_config(_part(config, "vision_config", folder / "vision_tower"))
    if not str(config.get("vision_model_name_or_path", "")).startswith("mof:"):
        return first, False
    second = tower_of(str(config.get("vision_model_name_or_path2", "")).split(":")[-1], None, family)
    # TinyLLaVA shows both towers the picture that CLIP's mean and std normalised.
    towers = [tower.to_dict() | {"model_type": tower.model_type} for tower in (first, second)]
    return tower_config({"model_type": "tinymodal_pair", "towers": towers, "normalise": "first"}), True


def _connector(config: Mapping[str, Any], family: str) -> tuple[str, dict[str, Any]]:
    """Our connector and its options."""
    name = str(config.get("connector_type") or "linear")
    if name == "mof_mlp":
        return "interleave", {"depth": 2}
    if name == "resampler":
        return "perceiver", {"num_queries": config["num_queries"], "depth": config["num_resampler_layers"]}
    if name == "qformer":
        return "qformer", {"norm": False, "affine": False}
    return projector(name, family)


def _places(connector: str) -> Callable[[str], Place | None]:
    """Where a whole model's tensors go."""

    def where(name: str) -> Place | None:
        if name.startswith("language_model."):
            return "language", name.removeprefix("language_model.")
        if found := TOWER.fullmatch(name):
            part, to = in_tower(found["rest"])
            return part, f"{TWO[found['which']]}{to}" if found["which"] and part else to
        if not name.startswith("connector._connector."):
            return None
        rest = name.removeprefix("connector._connector.")
        if connector == "qformer":
            return in_qformer(rest.replace("projector.", "proj.0."))
        if connector == "interleave":
            which, _, rest = rest.partition(".")
            return ("connector", f"proj.{PROJECTORS[which]}.{rest}") if which in PROJECTORS else None
        return "connector", rest if connector == "perceiver" else f"proj.{rest}"

    return where


def template(words: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that TinyLLaVA's scripts pair with a language model."""
    if words.model_type == "qwen2":
        return "qwen2_instruct" if tokenizer.eos_token == "<|im_end|>" else "qwen2_base"
    return TEMPLATES.get(words.model_type, "vicuna_v1")
