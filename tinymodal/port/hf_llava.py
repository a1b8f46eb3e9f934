"""Checkpoints in transformers' own form: ``LlavaForConditionalGeneration`` and ``LlavaNext...``.

The one family with a class to compare with: the report ends with logits and greedy text of both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tinymodal.compose.build import IMAGE_TOKEN
from tinymodal.compose.pretrained import one_line, read_json, refuse_missing
from tinymodal.core.errors import CheckpointError
from tinymodal.model.configuration_tinymodal import language_config
from tinymodal.model.connectors import ACTIVATIONS
from tinymodal.model.encoders import encoder_of, tower_config
from tinymodal.model.image import Preparation
from tinymodal.model.language import causal_class
from tinymodal.port.parity import Case, greedy
from tinymodal.port.source import (
    RESAMPLE,
    Extras,
    Place,
    Source,
    in_tower,
    normalised,
    old_scale,
    pieces_of,
    tokenizer_of,
)
from tinymodal.port.weights import read_folder

NAMES = {"llava": "HF Llava", "llava_next": "HF LlavaNext"}
"""``model_type`` -> what the report calls the family."""

TOWER = re.compile(r"(model\.)?vision_tower\.(?P<rest>.+)")
PROJECTOR = re.compile(r"(model\.)?multi_modal_projector\.linear_(?P<layer>[12])\.(?P<rest>weight|bias)")
NEWLINE = re.compile(r"(model\.)?image_newline")
SCALES_WORDS_ALONE = Version("5.4.0.dev0")
"""From here on Gemma 1 and 2 multiply only words' embeddings by sqrt(width), see ``source.old_scale``."""


def recognise(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder's ``config.json`` is one of transformers' two."""
    return config.get("model_type") in NAMES and "text_config" in config and "vision_config" in config


def read(folder: Path, config: Mapping[str, Any], extras: Extras) -> Source:
    """A checkpoint as transformers writes it, with names of any version since 4.36."""
    family = NAMES[config["model_type"]]
    with one_line(f"{folder} ({family})", CheckpointError):
        whole: Any = AutoConfig.from_pretrained(folder)
        words, vision = language_config(whole.text_config), tower_config(whole.vision_config)
    if whole.projector_hidden_act not in ACTIVATIONS:
        raise CheckpointError(
            f"{folder} ({family}): the projector's activation is '{whole.projector_hidden_act}'; known: "
            f"{', '.join(ACTIVATIONS)}"
        )
    next_ = config["model_type"] == "llava_next"
    decoder = f"{causal_class(words).base_model_prefix}."

    def where(name: str) -> Place | None:
        if found := TOWER.fullmatch(name):
            return in_tower(found["rest"])
        if found := PROJECTOR.fullmatch(name):
            return "connector", f"proj.{(int(found['layer']) - 1) * 2}.{found['rest']}"
        if NEWLINE.fullmatch(name):
            return ("marks", "newline") if next_ else (None, "of LlavaNext, unused in Llava")
        if name.startswith("model.language_model."):
            return "language", decoder + name.removeprefix("model.language_model.")
        if name.startswith(("language_model.", "lm_head.")):
            return "language", name.removeprefix("language_model.")
        return None

    # A checkpoint computes what it was trained to with the version that wrote it.
    old = Version(str(config.get("transformers_version") or "4")) < SCALES_WORDS_ALONE
    times = old_scale(words) if old else 1.0
    pieces = pieces_of(read_folder(folder), where, family)
    if not whole.tie_word_embeddings and any(piece.to.startswith("lm_head.") for piece in pieces):
        # LlavaNext asks its own config alone, and has a head of its own over a Gemma that ties it.
        words.tie_word_embeddings = False
    layer = whole.vision_feature_layer
    full = whole.vision_feature_select_strategy == "full"
    leading = encoder_of(vision).leading_tokens(vision)
    tokenizer = tokenizer_of(extras, [folder])
    source = Source(
        family=family,
        language=words,
        vision=vision,
        connector="mlp",
        options={"depth": 2, "activation": whole.projector_hidden_act},
        marks=("newline",) if next_ else (),
        merge="spatial_unpad" if next_ else "flat",
        feature_layer=layer if isinstance(layer, int) else list(layer),
        keep_class=full and leading > 0,
        drop_first=not full and leading == 0,
        preparation=_preparation(folder, vision, whole, family),
        tokenizer=tokenizer,
        template=extras.template or _template(words.model_type, tokenizer),
        pieces=pieces,
        zeros=()
        if whole.multimodal_projector_bias
        else (("connector", "proj.0.bias"), ("connector", "proj.2.bias")),
        times=times,
        reference=lambda: HFReference(folder, times),
    )
    return source


def _template(model_type: str, tokenizer: Any) -> str:
    """The processor's own Jinja is not used: it writes a picture as a part of its own, not as tokens."""
    known = {"llama": "vicuna_v1", "mistral": "mistral_instruct", "qwen2": "chatml"}
    return known.get(model_type, "tokenizer" if tokenizer.chat_template else "vicuna_v1")


def _said(folder: Path) -> dict[str, Any]:
    """What the folder says of its pictures: an old file of its own, or a part of the processor's."""
    for name, inside in (("processor_config.json", "image_processor"), ("preprocessor_config.json", "")):
        if (folder / name).is_file():
            document = read_json(folder / name, str(folder))
            found = document.get(inside) if inside else document
            if isinstance(found, dict):
                return found
    return {}


def _preparation(folder: Path, vision: Any, whole: Any, family: str) -> Preparation:
    said = _said(folder)
    how = encoder_of(vision).preparation_of(vision)
    how = normalised(how, said)
    how = replace(how, resample=RESAMPLE.get(said.get("resample", 0), how.resample))
    size, crop = said.get("size") or {}, said.get("crop_size") or {}
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    edge = size.get("shortest_edge") or size.get("height") or how.height_px
    cropped = crop.get("height", edge) if said.get("do_center_crop", bool(said)) else edge
    if cropped != edge:
        raise CheckpointError(
            f"{folder} ({family}): pictures are resized to {edge} px and cropped to {cropped} px; only equal "
            "numbers are supported"
        )
    how = replace(how, height_px=edge, width_px=size.get("width") or edge)
    if whole.model_type == "llava_next":
        points = tuple((int(h), int(w)) for h, w in whole.image_grid_pinpoints)
        return replace(how, resize="anyres", pinpoints=points)
    if said.get("do_pad"):
        return replace(how, resize="pad")
    return replace(how, resize="crop" if "shortest_edge" in size or not said else "square")


class HFReference:
    """transformers' own class and processor of a folder, in float32; see ``port.parity.Reference``.

    Args:
        folder: the checkpoint.
        times: what older versions multiplied pictures' embeddings by; done here as they did.
    """

    name = "transformers"

    def __init__(self, folder: Path, times: float = 1.0) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        self.model, info = loaded
        refuse_missing(info, str(folder))
        self.model.eval()
        if times != 1:
            self.name = f"transformers (pictures' embeddings times {times:.6g}, as before 5.4)"
            inside = self.model.model
            inside.multi_modal_projector.register_forward_hook(lambda module, given, out: out * times)
            if hasattr(inside, "image_newline"):
                inside.image_newline.data.mul_(times)
        self.processor: Any = None
        if _said(folder):
            self.processor = AutoProcessor.from_pretrained(folder)
            # Resizing must not depend on whether torchvision is installed.
            self.processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            config = self.model.config
            # Older processors do not say what they need to count tokens; the model's config does.
            self.processor.patch_size = config.vision_config.patch_size
            self.processor.vision_feature_select_strategy = config.vision_feature_select_strategy

    def inputs(self, case: Case, ours: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """By the folder's own processor; in a folder without one, our tiles in transformers' layout."""
        if self.processor is not None:
            text = case.text.replace(IMAGE_TOKEN, self.processor.image_token)
            return dict(self.processor(images=list(case.pictures) or None, text=text, return_tensors="pt"))
        inputs = {"input_ids": ours["input_ids"], "attention_mask": ours["attention_mask"]}
        if "pixel_values" in ours:
            inputs["pixel_values"] = ours["pixel_values"]
            if self.model.config.model_type == "llava_next":
                inputs |= self._in_tiles(case, ours["pixel_values"])
        return inputs

    def _in_tiles(self, case: Case, tiles_I3HW: Tensor) -> dict[str, Tensor]:
        """LlavaNext's own layout: as many tiles for every picture, and the pictures' sizes."""
        points, edge = self.model.config.image_grid_pinpoints, tiles_I3HW.shape[-1]
        sizes = [(picture.height, picture.width) for picture in case.pictures]
        each = tiles_I3HW.split([image_size_to_num_patches(size, points, edge) for size in sizes])
        return {"pixel_values": pad_sequence(each, batch_first=True), "image_sizes": torch.tensor(sizes)}

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """See ``port.parity.Reference``."""
        with torch.no_grad():
            return self.model(**inputs).logits[0].float()

    def greedy(self, inputs: Mapping[str, Tensor], num: int) -> list[int]:
        """See ``port.parity.Reference``."""
        return greedy(self.model, inputs, num)
