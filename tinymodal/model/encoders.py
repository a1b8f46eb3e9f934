"""Vision towers by the ``model_type`` in their ``config.json``, each behind the shape of ``PictureTower``.

An adapter absorbs its family's quirks: whether there is a class token to drop (CLIP and DINOv2 have one,
SigLIP has none), whether pictures come as pixels or as patches (SigLIP 2), which norms and heads come after
the chosen layer and are therefore not kept. ``ENCODERS`` at the end is the table; what is not in it and
begins with pictures goes to the general adapter of ``hf_tower.py``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .hf_tower import HALF, IMAGENET, OPENAI_CLIP, AnyTower, HFTower, model_class
from .image import Preparation
from .pair import PairConfig, PairTower
from .picture_tower import PictureTower
from .timm_tower import TimmConfig, TimmTower, from_hub, is_timm, settled
from .tower import OWN_CONFIGS, ConvTower, WrittenTower

# Shapes: N items, h w patch grid, S = h*w positions, E width, p patch edge in px.


class CLIP(HFTower):
    """CLIP (arXiv:2103.00020): one class token first."""

    normalisation = OPENAI_CLIP
    norm_name = "post_layernorm"

    @classmethod
    def leading_tokens(cls, config: PreTrainedConfig) -> int:
        return 1


class BLIP2(CLIP):
    """The tower of BLIP-2 (arXiv:2301.12597): EVA-CLIP-g (arXiv:2211.07636) without its last block.

    Its config counts the 39 blocks that are left, so what MiniGPT-4 and TinyGPT-V read is ``feature_layer``
    -1 with the class token. ``final_norm`` is BLIP-2's ``ln_vision``, which belongs to the Q-Former.
    """


class SigLIP(HFTower):
    """SigLIP (arXiv:2303.15343) and SigLIP 2 of fixed resolution: no class token, all are patches."""

    normalisation = HALF
    norm_name = "post_layernorm"

    @classmethod
    def leave_out(cls, config: PreTrainedConfig) -> None:
        config.vision_use_head = False


class SigLIP2(SigLIP):
    """SigLIP 2 in its flexible form, NaFlex (arXiv:2502.14786): any rows and columns, given as patches."""

    @classmethod
    def preparation_of(cls, config: PreTrainedConfig) -> Preparation:
        side = isqrt(config.num_patches)
        if side**2 != config.num_patches:
            raise ValueError(f"num_patches must be a square number, as 256, got {config.num_patches}")
        edge = side * cls.patch_px(config)
        return Preparation(edge, edge, *cls.normalisation, resample="bilinear")

    def run(self, values: Tensor, **flags: Any) -> Any:
        h, w = self.patches(self.config, (values.shape[2], values.shape[3]))
        p = self.patch_px(self.config)
        x_N3hpwp = values[:, :, : h * p, : w * p].unflatten(3, (w, p)).unflatten(2, (h, p))
        # Within a patch: row, column, channel, as transformers' own image processor flattens it.
        x_NSP = x_N3hpwp.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        # On the CPU wherever the model is: transformers asks for the numbers one by one.
        shapes = torch.tensor([[h, w]], device="cpu").expand(len(values), 2)
        return self.backbone(pixel_values=x_NSP, pixel_attention_mask=None, spatial_shapes=shapes, **flags)


class DINOv2(HFTower):
    """DINOv2 (arXiv:2304.07193), also with registers (arXiv:2309.16588), which follow the class token."""

    norm_name = "layernorm"

    @classmethod
    def leading_tokens(cls, config: PreTrainedConfig) -> int:
        return 1 + getattr(config, "num_register_tokens", 0)

    @classmethod
    def strip(cls, backbone: Any) -> None:
        backbone.embeddings.mask_token = None

    def run(self, values: Tensor, **flags: Any) -> Any:
        return self.backbone(pixel_values=values, **flags)


class DINOv3(DINOv2):
    """DINOv3 (arXiv:2508.10104): rotary positions, so any size; registers after the class token."""

    norm_name = "norm"
    shifts: ClassVar[tuple[str, ...]] = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
    """In train mode transformers moves and scales the positions at random, as pretraining did; a tower that
    is trained along with a language model shall say the same of the same picture."""

    @classmethod
    def leave_out(cls, config: PreTrainedConfig) -> None:
        for shift in cls.shifts:
            setattr(config, shift, None)

    @classmethod
    def preparation_of(cls, config: PreTrainedConfig) -> Preparation:
        edge = super().preparation_of(config).height_px
        return Preparation(edge, edge, *IMAGENET, resample="bilinear")


def encoder_of(config: PreTrainedConfig) -> type[PictureTower]:
    """The adapter for a tower's config.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    if config.model_type in ENCODERS:
        return ENCODERS[config.model_type]
    if model_class(config) is not None:
        return AnyTower
    raise _unknown(config.model_type)


def _unknown(model_type: str) -> ValueError:
    close = difflib.get_close_matches(model_type, ENCODERS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ValueError(
        f"no tower for model_type {model_type!r}; known: {', '.join(ENCODERS)}, and whatever of transformers "
        f"begins with pictures{hint}"
    )


def tower_config(config: PreTrainedConfig | Mapping[str, Any]) -> PreTrainedConfig:
    """A tower's config from what its ``config.json`` holds.

    Of a whole CLIP, SigLIP or BLIP-2, which also reads text, the part that sees. A folder of timm, or
    transformers' wrapper of one, becomes a :class:`~.timm_tower.TimmConfig`.

    Raises:
        ValueError: if there is no adapter for it.
    """
    if isinstance(config, PreTrainedConfig):
        found = config
    elif is_timm(config):
        found = from_hub(config)
    else:
        values = dict(config)
        model_type = values.pop("model_type", None)
        if model_type in OF_OURS:
            found = OF_OURS[model_type](**values)
        elif model_type in CONFIG_MAPPING:
            found = CONFIG_MAPPING[model_type](**values)
        else:
            raise _unknown(str(model_type))
    if isinstance(found, TimmConfig):
        return settled(found)
    part = getattr(found, "vision_config", None)
    if found.model_type not in ENCODERS and isinstance(part, PreTrainedConfig):
        found = part
    encoder_of(found)
    channels = getattr(found, "num_channels", 3)
    if channels != 3:
        raise ValueError(f"pictures have 3 channels, this tower's num_channels is {channels}")
    return found


OF_OURS: dict[str, type[PreTrainedConfig]] = {
    **OWN_CONFIGS,
    TimmConfig.model_type: TimmConfig,
    PairConfig.model_type: PairConfig,
}
"""Configs that transformers' ``AutoConfig`` does not know."""

ENCODERS: dict[str, type[PictureTower]] = {
    "clip_vision_model": CLIP,
    "siglip_vision_model": SigLIP,
    "siglip2_vision_model": SigLIP2,
    "dinov2": DINOv2,
    "dinov2_with_registers": DINOv2,
    "dinov3_vit": DINOv3,
    "blip_2_vision_model": BLIP2,
    "tinymodal_timm": TimmTower,
    "tinymodal_pair": PairTower,
    "tinymodal_tower": ConvTower,
    "tinymodal_written": WrittenTower,
}
