"""MiniGPT-4 and TinyGPT-V: a ``.pth`` with what was trained, over parts that lie elsewhere.

The parts are EVA-CLIP-g (``eva_vit_g.pth``), BLIP-2's Q-Former with queries and ``ln_vision``
(``blip2_pretrained_flant5xxl.pth``), and a language model: Vicuna or Llama 2 for MiniGPT-4, for TinyGPT-V the
Phi whose norms its authors added. What the ``.pth`` holds replaces what the parts hold.
"""

# Shapes: E width of the tower, S positions of its patches.

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinymodal.compose.pretrained import one_line, read_json
from tinymodal.core.errors import CheckpointError
from tinymodal.model.configuration_tinymodal import language_config
from tinymodal.model.encoders import tower_config
from tinymodal.port.source import (
    Extras,
    Piece,
    Place,
    Source,
    in_qformer,
    merged,
    pieces_of,
    preparation_of,
    qformer_sizes,
    required,
    tokenizer_of,
)
from tinymodal.port.weights import Adapter, File, paired, read_document, read_file, read_folder, tensors_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HEAD_WIDTH = 88
"""Width of one of EVA-CLIP-g's 16 heads; its file does not say how many there are."""

WHOLE_EVA_BLOCKS = 40
"""Blocks of the published EVA-CLIP-g; BLIP-2 and all after it leave the last one out."""

LORA_ALPHA = 16
"""What every recipe of TinyGPT-V sets; used where the file does not say."""

LANGUAGE = re.compile(r"llama_model\.(base_model\.model\.)?(?P<rest>.+)")
BLOCK = re.compile(r"blocks\.(?P<number>\d+)\.(?P<rest>.+)")
EVA_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}
BLOCK_NAMES = {
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "mlp.": "mlp.",
}
"""Names of EVA's parts in LAVIS -> in transformers' BLIP-2, which is the tower here."""

OTHER_PARTS = ("t5_proj.", "opt_proj.", "llm_proj.", "vision_proj.", "text_proj.", "itm_head.")
"""What BLIP-2's files hold for other language models and other losses."""


def recognise(checkpoint: Path, config: Mapping[str, Any]) -> bool:
    """Whether a file holds the projection that both systems train."""
    if checkpoint.is_dir() or checkpoint.suffix not in (".pth", ".pt", ".bin"):
        return False
    return "llama_proj.weight" in read_file(checkpoint)


def read(checkpoint: Path, config: Mapping[str, Any], extras: Extras) -> Source:
    """What was trained, over ``--language``, ``--qformer`` and ``--vision``."""
    document = read_document(checkpoint)
    trained = tensors_of(document, checkpoint)
    tiny = "llama_proj2.weight" in trained
    family = "TinyGPT-V" if tiny else "MiniGPT-4"
    settings = _settings(document)
    why = f"{checkpoint} ({family}) holds only what was trained"
    base = required(extras.language, "--language", why)
    blip = required(extras.qformer, "--qformer", f"{why}, not BLIP-2's Q-Former").resolve()
    with one_line(f"--language {base}", CheckpointError):
        base_files = read_folder(base, f"{base.name}/")
        words = _language(read_json(base / "config.json", f"--language {base}"), base_files)

    blip_file = File(blip.name, read_file(blip))
    eva = _eva(blip_file, extras.vision, why)
    image_px = int(settings.get("image_size") or 224)
    tower = _tower(eva.tensors, image_px)
    adapters, own = paired(checkpoint, {_plain(name): (name, t) for name, t in trained.items()})
    pieces = [
        *pieces_of(base_files, lambda name: ("language", name), family),
        *_eva_pieces(eva, tower),
        *pieces_of([blip_file], _in_parts, family),
        *pieces_of([File(checkpoint.name, own)], _in_parts, family),
    ]
    alpha = {"lora_alpha": settings.get("lora_alpha", LORA_ALPHA)}
    adapter = Adapter(checkpoint.name, adapters, {}, alpha)
    pieces = merged(pieces, adapter, _in_parts, family)
    return Source(
        family=family,
        language=words,
        vision=tower,
        connector="qformer",
        options=qformer_sizes(pieces, family),
        feature_layer=-1,
        keep_class=True,
        preparation=preparation_of(tower, [], "square"),
        tokenizer=tokenizer_of(extras, [base]),
        template=extras.template or _template(tiny, settings),
        pieces=pieces,
    )


def _settings(document: Any) -> Mapping[str, Any]:
    """The table ``model`` of the recipe that a training state keeps; empty where there is none."""
    said = document.get("config") if isinstance(document, dict) else None
    found = said.get("model") if isinstance(said, dict) else None
    return found if isinstance(found, dict) else {}


def _template(tiny: bool, settings: Mapping[str, Any]) -> str:
    if not tiny:
        return "minigpt_4"
    return "tinygptv_stage4" if settings.get("chat_template") else "tinygptv"


def _language(config: Mapping[str, Any], files: Sequence[File]) -> PreTrainedConfig:
    """The base's config; a Phi with one matrix for queries, keys and values is TinyGPT-V's."""
    values = {key: value for key, value in config.items() if key != "auto_map"}
    if (
        any(".query_key_value." in name for file in files for name in file.tensors)
        and values["model_type"] == "phi"
    ):
        values["model_type"] = "tinygptv_phi"
    return language_config(values)


def _plain(name: str) -> str:
    """A name without what the language model's prefixes and peft put before it."""
    found = LANGUAGE.fullmatch(name)
    return f"llama_model.{found['rest']}" if found else name


def _in_parts(name: str) -> Place | None:
    """Place of a tensor of MiniGPT-4's model, or of BLIP-2's file."""
    if found := LANGUAGE.fullmatch(name):
        return "language", found["rest"]
    if found := re.fullmatch(r"llama_proj(?P<second>2?)\.(?P<rest>weight|bias)", name):
        return "connector", f"proj.{1 if found['second'] else 0}.{found['rest']}"
    if name.startswith("ln_vision."):
        return "connector", name.replace("ln_vision.", "norm.")
    if name.startswith(OTHER_PARTS) or name == "temp":
        return None, "of BLIP-2, for another language model or another loss"
    if name.startswith("visual_encoder."):
        return None, "the tower, which is read by itself"
    return in_qformer(name.removeprefix("Qformer."))


# The tower


def _eva(blip: File, given: Path | None, why: str) -> File:
    """EVA's tensors by LAVIS' own names, from ``--vision`` or from BLIP-2's file.

    Raises:
        CheckpointError: neither holds them.
    """
    inside = {
        name.removeprefix("visual_encoder."): t
        for name, t in blip.tensors.items()
        if name.startswith("visual_encoder.")
    }
    if given is None and inside:
        return File(blip.name, inside)
    path = required(given, "--vision", f"{why}, not EVA-CLIP-g (eva_vit_g.pth)")
    if path.is_dir():
        raise CheckpointError(f"--vision {path}: is a folder; expected the file eva_vit_g.pth")
    return File(path.name, {n.removeprefix("visual_encoder."): t for n, t in read_file(path).items()})


def _tower(tensors: Mapping[str, Tensor], image_px: int) -> PreTrainedConfig:
    """The config that EVA's tensors have."""
    try:
        width, patch_px = tensors["cls_token"].shape[-1], tensors["patch_embed.proj.weight"].shape[-1]
        inside = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as fault:
        raise CheckpointError(f"--vision: {fault.args[0]} of EVA-CLIP-g is missing") from fault
    blocks = 1 + max(int(found["number"]) for name in tensors if (found := BLOCK.fullmatch(name)))
    return tower_config(
        {
            "model_type": "blip_2_vision_model",
            "hidden_size": width,
            "intermediate_size": inside,
            "num_hidden_layers": blocks - 1 if blocks == WHOLE_EVA_BLOCKS else blocks,
            "num_attention_heads": max(1, width // HEAD_WIDTH),
            "patch_size": patch_px,
            "image_size": image_px,
        }
    )


def _eva_pieces(eva: File, tower: Any) -> list[Piece]:
    """EVA's tensors as transformers names and shapes them."""
    pieces = []
    for name, tensor in eva.tensors.items():
        block = BLOCK.fullmatch(name)
        if block and int(block["number"]) >= tower.num_hidden_layers:
            pieces.append(Piece(eva.name, name, tensor, None, reason="the block that BLIP-2 leaves out"))
        elif name.startswith(("norm.", "fc_norm.", "head.")):
            pieces.append(Piece(eva.name, name, tensor, None, reason="behind the last block: never reached"))
        elif block and block["rest"] == "attn.v_bias":
            pieces.append(Piece(eva.name, name, tensor, None, reason="joined with q_bias into one"))
        elif block and block["rest"] == "attn.q_bias":
            v_bias = eva.tensors[name.replace("q_bias", "v_bias")]
            joined = torch.cat((tensor, torch.zeros_like(tensor), v_bias))
            to = f"encoder.layers.{block['number']}.self_attn.qkv.bias"
            pieces.append(Piece(eva.name, name, joined, "vision", to, "with zeros for the keys, and v_bias"))
        elif name == "pos_embed":
            pieces.append(_positions(eva.name, tensor, tower))
        else:
            pieces.append(Piece(eva.name, name, tensor, "vision", _in_blip2(name, block)))
    return pieces


def _in_blip2(name: str, block: re.Match[str] | None) -> str:
    if block is None:
        return EVA_NAMES.get(name, name)
    rest = block["rest"]
    start = next((old for old in BLOCK_NAMES if rest.startswith(old)), None)
    if start is not None:
        rest = BLOCK_NAMES[start] + rest.removeprefix(start)
    return f"encoder.layers.{block['number']}.{rest}"


def _positions(file: str, table_1SE: Tensor, tower: Any) -> Piece:
    """The learned positions, the class token's first, stretched to the pictures of the checkpoint.

    Bicubic as ``interpolate_pos_embed`` of minigpt4/models/eva_vit.py.
    """
    to, side = EVA_NAMES["pos_embed"], tower.image_size // tower.patch_size
    old = isqrt(table_1SE.shape[1] - 1)
    if old == side:
        return Piece(file, "pos_embed", table_1SE, "vision", to)
    grid_1Ehw = table_1SE[:, 1:].float().transpose(1, 2).unflatten(2, (old, old))
    grid_1Ehw = F.interpolate(grid_1Ehw, size=(side, side), mode="bicubic", align_corners=False)
    stretched = torch.cat((table_1SE[:, :1], grid_1Ehw.flatten(2).transpose(1, 2).to(table_1SE.dtype)), 1)
    return Piece(
        file, "pos_embed", stretched, "vision", to, f"stretched from {old} x {old} to {side} x {side}"
    )
