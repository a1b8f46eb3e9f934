"""``--to llava``: transformers' own Llava or LlavaNext, which vLLM reads too.

Tensors bear the names that checkpoints had before transformers 5 (``language_model.model.``,
``vision_tower.vision_model.``): transformers reads these as it reads its own, and vLLM reads no others.

Our towers end at the block that is read. Llava counts from the last block, so what is behind is written as
blocks of zeros: a pre-norm block without weights adds nothing and hands its input on.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, LlavaConfig, LlavaNextConfig

from tinymodal.compose.build import IMAGE_TOKEN, RESAMPLE, Composed
from tinymodal.compose.targets import blocks_run, canvases, leading_tokens
from tinymodal.port import fresh
from tinymodal.port.hub import chat_check, conversation, weights_check
from tinymodal.port.parity import judge
from tinymodal.port.proof import Job, Proof

MAX_SHARD = "5GB"


def write(job: Job, folder: Path) -> None:
    """Write config, weights, processor and generation config."""
    from huggingface_hub import save_torch_state_dict

    composed = job.composed
    config = llava_config(composed)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_torch_state_dict(
        tensors(composed, config), folder, max_shard_size=MAX_SHARD, metadata={"format": "pt"}
    )
    made = processor(composed, config)
    made.save_pretrained(folder)
    # Where transformers 4 looks, and programs that were written for it.
    made.image_processor.save_pretrained(folder)
    composed.model.generation_config.save_pretrained(folder)


def prove(job: Job, folder: Path) -> Proof:
    """Compare transformers' own class and processor with ours, in float32."""
    over, left_out = job.prompts()
    there = fresh.answers(
        folder, over, dtype="float32", remote_code=False, chats=[conversation(sees=True, hears=False)]
    )
    ours = by_pillow(job.composed)
    ours.model.float()
    parity = judge(ours, there.recorded, f"transformers' {there.model_class}, without our package")
    parity.left_out = left_out
    return Proof(parity, [weights_check(there), chat_check(job, there)])


def by_pillow(composed: Composed) -> Composed:
    """The same model, its pictures resized as transformers' processors do; ``composed`` is spent."""
    eye = composed.processor.image_processor
    eye.preparation = replace(eye.preparation, resizer="pillow")
    return composed


def llava_config(composed: Composed) -> Any:
    """The config of the native class that is this composition."""
    ours = composed.model.config
    how = composed.processor.image_processor.preparation
    read = blocks_run(ours)
    words, vision = copy.deepcopy(ours.text_config), copy.deepcopy(ours.vision_config)
    # As many blocks as there were, or one more than are run where the layer lies deeper in the tower.
    vision.num_hidden_layers = min(vision.num_hidden_layers, max(read) + 1)
    if hasattr(vision, "vision_use_head"):
        vision.vision_use_head = False
    layers = [layer - vision.num_hidden_layers - 1 for layer in read]
    drops_first = getattr(vision, "drop_first", False)
    whole = ours.keep_class or (not leading_tokens(ours) and not drops_first)
    for option in ("final_norm", "drop_first"):
        if hasattr(vision, option):
            delattr(vision, option)
    tied = bool(ours.tie_word_embeddings)
    words.tie_word_embeddings = tied
    common: dict[str, Any] = {
        "text_config": words,
        "vision_config": vision,
        "image_token_index": ours.image_token_id,
        "image_seq_length": composed.processor.image_processor.typical().tokens,
        "projector_hidden_act": ours.connectors["image"]["options"]["activation"],
        "vision_feature_select_strategy": "full" if whole else "default",
        "vision_feature_layer": layers[0] if isinstance(ours.feature_layer, int) else layers,
        "multimodal_projector_bias": True,
        "tie_word_embeddings": tied,
        "dtype": composed.model.dtype,
    }
    if how.resize == "anyres":
        points = [list(canvas) for canvas in canvases(how)]
        config: Any = LlavaNextConfig(**common, image_grid_pinpoints=points)
        config.architectures = ["LlavaNextForConditionalGeneration"]
    else:
        config = LlavaConfig(**common)
        config.architectures = ["LlavaForConditionalGeneration"]
    return config


def tensors(composed: Composed, config: Any) -> dict[str, Tensor]:
    """Every tensor under the name that readers of Llava know."""
    core: Any = composed.model.model
    found: dict[str, Tensor] = {}
    for name, tensor in whole_tower(composed, config.vision_config).items():
        found[f"vision_tower.vision_model.{name}"] = tensor
    for name, tensor in core.language_model.state_dict().items():
        found[f"language_model.model.{name}"] = tensor
    if not config.tie_word_embeddings:
        found["language_model.lm_head.weight"] = composed.model.head_weight()
    layers = core.connectors["image"].state_dict()
    for ours, theirs in ((0, 1), (2, 2)):
        for kind in ("weight", "bias"):
            found[f"multi_modal_projector.linear_{theirs}.{kind}"] = layers[f"proj.{ours}.{kind}"]
    if "image" in core.marks:
        found["image_newline"] = core.marks["image"].weight[0]
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def whole_tower(composed: Composed, config: Any) -> dict[str, Tensor]:
    """The picture tower with blocks and norms behind the layer that is read: zeros, and ones for norms."""
    own = composed.model.model.towers["image"].module.state_dict()  # type: ignore[union-attr]
    with torch.device("meta"):
        names: Any = AutoModel.from_config(config).state_dict()
    found = {}
    for name, empty in names.items():
        if name in own:
            found[name] = own[name]
            continue
        fill = torch.ones if "norm" in name and name.endswith("weight") else torch.zeros
        found[name] = fill(empty.shape, dtype=composed.model.dtype)
    return found


def processor(composed: Composed, config: Any) -> Any:
    """A processor of transformers' own that shows the same pixels and writes as many placeholders."""
    # Not at the top: where torchvision is missing, each says at once that it will do without.
    from transformers import (
        CLIPImageProcessor,
        LlavaImageProcessor,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        LlavaProcessor,
    )

    how = composed.processor.image_processor.preparation
    edge = how.height_px
    resample = {name: number for number, name in RESAMPLE.items()}[how.resample]
    covers: dict[str, Any] = {"shortest_edge": edge}
    stretches: dict[str, Any] = {"height": edge, "width": edge}
    values: dict[str, Any] = {
        "size": stretches if how.resize == "square" else covers,
        "crop_size": {"height": edge, "width": edge},
        "do_center_crop": True,
        "resample": resample,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
    }
    known: dict[str, Any] = {
        "tokenizer": composed.tokenizer,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "chat_template": composed.tokenizer.chat_template,
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": leading_tokens(composed.model.config),
    }
    if how.resize == "anyres":
        eye: Any = LlavaNextImageProcessor(**values, image_grid_pinpoints=config.image_grid_pinpoints)
        return LlavaNextProcessor(eye, **known)
    if how.resize == "pad":
        return LlavaProcessor(LlavaImageProcessor(**values, do_pad=True), **known)
    return LlavaProcessor(CLIPImageProcessor(**values), **known)
