"""What a family's reader hands over: the parts' configs, and every tensor with the place it goes to.

A reader knows one family's names and nothing of ours: it says "language, model.norm.weight" or "connector,
proj.0.bias". ``port.ledger`` knows where our parts lie and checks that all of it fits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from tinymodal.compose.pretrained import TOKENIZER_FILES, one_line, read_json, read_tokenizer
from tinymodal.core.errors import CheckpointError
from tinymodal.model.configuration_tinymodal import language_config
from tinymodal.model.encoders import encoder_of, tower_config
from tinymodal.model.image import Preparation, Resize
from tinymodal.port.weights import Adapter, File, has_weights, merge, read_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from tinymodal.port.parity import Reference

Part = Literal["language", "vision", "connector", "marks"]

RESAMPLE: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers, as ``preprocessor_config.json`` has them."""

CLIP_L: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
SIGLIP_SO400M: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 384,
}
DINOV2_LARGE: dict[str, Any] = {
    "model_type": "dinov2",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 518,
}
TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {**CLIP_L, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**CLIP_L, "image_size": 336},
    "google/siglip-so400m-patch14-384": SIGLIP_SO400M,
    "facebook/dinov2-large": DINOV2_LARGE,
    # Names under which TinyLLaVABench keeps the same tower.
    "bczhou/TinyLLaVA-3.1B-SigLIP": SIGLIP_SO400M,
    "bczhou/TinyLLaVA-2.0B-SigLIP": SIGLIP_SO400M,
    "bczhou/TinyLLaVA-1.5B-SigLIP": SIGLIP_SO400M,
}
"""Configs of the towers that these systems name without keeping their config."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extras:
    """What lies beside a checkpoint that is not whole, and what is to be decided otherwise than guessed."""

    language: Path | None = None
    """Folder of the language model a projector or an adapter was trained on."""
    vision: Path | None = None
    """Folder of the tower (its config, and its weights where the checkpoint has none); for the towers of timm
    also one file."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; else the checkpoint's or the language model's."""
    qformer: Path | None = None
    """BLIP-2's file with Q-Former, queries and ``ln_vision``, for MiniGPT-4 and TinyGPT-V."""
    template: str | None = None
    """Name of the chat template; else guessed from family and language model."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the source and where it goes."""

    file: str
    name: str
    """As the file calls it."""
    tensor: Tensor
    part: Part | None
    """None: not used."""
    to: str = ""
    """Its name within the part: a language model's as in its causal class, a tower's as in its own class."""
    reason: str = ""
    """Why it is not used, or what was added to it."""


@dataclass(kw_only=True)
class Source:
    """A foreign checkpoint, understood."""

    family: str
    """As people call it, e.g. ``LLaVA, LoRA over a base``."""
    language: PreTrainedConfig
    vision: PreTrainedConfig
    connector: str
    preparation: Preparation
    tokenizer: PreTrainedTokenizerBase
    template: str
    pieces: list[Piece]
    options: dict[str, Any] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    merge: str = "flat"
    feature_layer: int | list[int] = -2
    keep_class: bool = False
    drop_first: bool = False
    mark_words: Mapping[str, str] = field(default_factory=dict)
    """Marks that are embeddings of words: ``{"start": "<im_start>"}``."""
    times: float = 1.0
    """What pictures' embeddings, and marks, were multiplied by in front of the decoder and are not now."""
    zeros: tuple[tuple[Part, str], ...] = ()
    """Biases that the source does not have and ours do: filled with zeros."""
    reference: Callable[[], Reference] | None = None
    """Makes the family's own class ready to be compared with, where there is one."""
    notes: list[str] = field(default_factory=list)
    """What a person should know about the guesses made."""


Place = tuple[Part | None, str]
"""(part, name within it), or (None, why it is not used)."""


def pieces_of(files: Iterable[File], where: Callable[[str], Place | None], family: str) -> list[Piece]:
    """Every tensor of ``files`` with its place.

    Args:
        files: what was read.
        where: a tensor's place by its name; None: this family has no such tensor.
        family: for the error.

    Raises:
        CheckpointError: there is a tensor that the family does not have; names it and its shape.
    """
    pieces = []
    for file in files:
        for name, tensor in file.tensors.items():
            place = where(name)
            if place is None:
                raise CheckpointError(
                    f"{file.name}: {name} {tuple(tensor.shape)} is no tensor of {family}; if the checkpoint "
                    "is of another family or was changed, it cannot be adopted as it is"
                )
            part, to = place
            if part is None:
                pieces.append(Piece(file.name, name, tensor, None, reason=to))
            else:
                pieces.append(Piece(file.name, name, tensor, part, to))
    return pieces


def merged(
    pieces: Sequence[Piece], adapter: Adapter, where: Callable[[str], Place | None], family: str
) -> list[Piece]:
    """``pieces`` with a LoRA adapter added to the matrices it was trained for.

    Raises:
        CheckpointError: the adapter is for a matrix that is not among ``pieces``, or of another shape.
    """
    result = list(pieces)
    at = {(piece.part, piece.to): i for i, piece in enumerate(pieces) if piece.part is not None}
    for module, pair in adapter.pairs.items():
        place = where(f"{module}.weight")
        if place is None or place not in at:
            raise CheckpointError(
                f"{adapter.file}: {module} was adapted, but {family} has no matrix of that name in what was "
                f"given; --language must name the folder that the adapter was trained on"
            )
        i = at[place]
        base = pieces[i]
        try:
            tensor = merge(base.tensor, module, pair, adapter.config)
        except ValueError as fault:
            raise CheckpointError(f"{adapter.file}: {module}: {fault} of {base.file} ({family})") from fault
        result[i] = replace(base, tensor=tensor, reason=f"with the adapter of {adapter.file}")
        halves = zip(pair.names, (pair.down, pair.up, pair.magnitude), strict=False)
        result += [
            Piece(adapter.file, name, half, None, reason="merged into the matrix it was trained for")
            for name, half in halves
            if half is not None
        ]
    rest = File(adapter.file, adapter.rest)
    return result + pieces_of([rest], where, family)


# Parts that lie in folders of their own


def required(folder: Path | None, option: str, why: str) -> Path:
    """The folder or file that an option names.

    Raises:
        CheckpointError: it was not given, or does not exist.
    """
    if folder is None:
        raise CheckpointError(f"{why}; give it with {option}")
    if not folder.exists():
        raise CheckpointError(f"{option} {folder}: there is no such folder or file")
    return folder


def tower_of(named: str, given: Path | None, family: str) -> PreTrainedConfig:
    """Config of the tower that a checkpoint names, from ``--vision`` or from what is known of the name.

    Raises:
        CheckpointError: nobody knows the name, or ``--vision`` holds no tower.
    """
    folder = given if given is not None else Path(named)
    if (folder / "config.json").is_file():
        with one_line(f"--vision {folder}", CheckpointError):
            return tower_config(read_json(folder / "config.json", f"--vision {folder}"))
    if given is not None:
        raise CheckpointError(f"--vision {given}: has no config.json; expected the folder of a tower")
    known = next((config for name, config in TOWERS.items() if name.lower() == named.lower()), None)
    if known is None:
        raise CheckpointError(
            f"{family}: the tower '{named}' is not among those whose config is known ({', '.join(TOWERS)}); "
            "name its folder with --vision FOLDER"
        )
    return tower_config(known)


def tower_pieces(named: str, given: Path | None, family: str) -> list[Piece]:
    """Weights of the tower, from ``--vision`` or from the folder that the checkpoint names.

    Raises:
        CheckpointError: there is no such folder.
    """
    folder = given if given is not None else Path(named)
    if not folder.is_dir() or not has_weights(folder):
        raise CheckpointError(
            f"{family}: the checkpoint does not hold its tower '{named}'; name the tower's folder with "
            "--vision FOLDER"
        )
    return pieces_of(read_folder(folder, f"{folder.name}/"), in_tower, family)


def in_tower(name: str) -> Place:
    """Place of a tensor of a CLIP, SigLIP or DINOv2 folder, whole or only the half that sees."""
    if name.startswith(("text_model.", "text_projection.", "visual_projection.")):
        return None, "of the half that reads text"
    if name in ("logit_scale", "logit_bias"):
        return None, "of the half that reads text"
    return "vision", name.removeprefix("vision_model.")


def in_qformer(name: str) -> Place | None:
    """Place of a tensor of LAVIS' Q-Former (``bert....``, ``query_tokens``, ``proj....``); None: unknown."""
    if name == "query_tokens" or name.startswith("proj."):
        return "connector", name
    if name.startswith("cls.") or re.fullmatch(r"bert\.embeddings\.(word|position)_embeddings\.weight", name):
        return None, "reads and writes text, which the queries do not"
    if name.startswith("bert.embeddings.LayerNorm."):
        return "connector", name.replace("bert.embeddings.LayerNorm.", "layernorm.")
    if name == "bert.embeddings.position_ids":
        return None, "computed, not learned"
    if found := re.fullmatch(r"bert\.encoder\.(?P<block>layer\.\d+\.)(?P<rest>.+)", name):
        if found["rest"].startswith(("output.", "intermediate.")):
            return None, "the feed-forward part for text"
        rest = re.sub(r"^(attention|crossattention)\.self\.", r"\1.attention.", found["rest"])
        return "connector", found["block"] + rest
    return None


def qformer_sizes(pieces: Sequence[Piece], family: str) -> dict[str, Any]:
    """Sizes of the Q-Former, which no file says, from its tensors.

    Raises:
        CheckpointError: a tensor that they are read from is missing.
    """
    found = {p.to: p.tensor for p in pieces if p.part == "connector"}
    for name in ("query_tokens", "proj.0.weight"):
        if name not in found:
            raise CheckpointError(f"{family}: {name} of the Q-Former is missing")
    queries = found["query_tokens"]
    blocks = [int(m[1]) for name in found if (m := re.match(r"layer\.(\d+)\.", name))]
    crossed = sorted(
        {int(m[1]) for name in found if (m := re.match(r"layer\.(\d+)\.crossattention\.", name))}
    )
    return {
        "num_queries": queries.shape[1],
        "width": queries.shape[2],
        "depth": max(blocks, default=0) + 1,
        "num_heads": max(1, queries.shape[2] // 64),
        "cross_every": crossed[1] - crossed[0] if len(crossed) > 1 else 2,
        "middle": found["proj.0.weight"].shape[0] if "proj.1.weight" in found else 0,
    }


def tokenizer_of(extras: Extras, folders: Sequence[Path]) -> PreTrainedTokenizerBase:
    """The tokenizer: ``--tokenizer``, or that of the first folder which has one.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if extras.tokenizer is not None:
        return read_tokenizer(str(extras.tokenizer), "--tokenizer")
    for folder in folders:
        if any((folder / file).is_file() for file in TOKENIZER_FILES):
            return read_tokenizer(str(folder), "the tokenizer")
    raise CheckpointError(
        f"no tokenizer in {' or '.join(map(str, folders))} (none of {', '.join(TOKENIZER_FILES)}); name its "
        "folder with --tokenizer FOLDER"
    )


SCALED_ALL = ("gemma", "gemma2")
"""Language models whose decoder multiplied all embeddings it was given by sqrt(width), pictures' among them,
before transformers 5.4; since then only words are (``models/gemma/modeling_gemma.py``)."""


def old_scale(words: PreTrainedConfig) -> float:
    """What transformers before 5.4 multiplied a picture's embeddings by and later versions do not."""
    return math.sqrt(words.hidden_size) if words.model_type in SCALED_ALL else 1.0


def flat_language(config: Mapping[str, Any], model_type: str) -> PreTrainedConfig:
    """A language model's config out of one that holds keys of a whole system beside its own."""
    default = language_config({"model_type": model_type})
    own = {key for key in default.to_dict() if not key.startswith("_")}
    # Older files spell some values otherwise; transformers itself translates those.
    own |= {"rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype"}
    strangers = {"architectures", "auto_map", "model_type", "transformers_version"}
    return language_config(
        {"model_type": model_type} | {k: v for k, v in config.items() if k in own - strangers}
    )


def preparation_of(
    config: PreTrainedConfig, folders: Sequence[Path | None], resize: Resize, **given: Any
) -> Preparation:
    """How pictures are prepared: the tower's own way, then what a folder's processor says, then ``given``."""
    how = encoder_of(config).preparation_of(config)
    for folder in folders:
        if folder is None or not (folder / "preprocessor_config.json").is_file():
            continue
        said = read_json(folder / "preprocessor_config.json", str(folder))
        how = normalised(how, said)
        how = replace(how, resample=RESAMPLE.get(said.get("resample", 0), how.resample))
        break
    return replace(how, resize=resize, **given)


def normalised(how: Preparation, said: Mapping[str, Any]) -> Preparation:
    """``how`` with the mean and the standard deviation that a ``preprocessor_config.json`` says."""
    if not said.get("do_normalize", True):
        return replace(how, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    if "image_mean" in said and "image_std" in said:
        return replace(how, mean=tuple(said["image_mean"]), std=tuple(said["image_std"]))
    return how
