"""Vision towers that transformers knows, each behind the one shape of :class:`MediaEncoder`.

An adapter absorbs its family's quirks: whether there is a class token to drop (CLIP and DINOv2 have one,
SigLIP has none), whether pictures come as pixels or as patches (SigLIP 2), which norms and heads come after
the chosen layer and are therefore not kept. ``ENCODERS`` at the end is the table; its key is the
``model_type`` in the tower's own ``config.json``.
"""

# Shapes: N items, h w patch grid, S = h*w positions, E width, p patch edge in px.

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig

from .geometry import patch_grid
from .image import Preparation
from .media import Features, MediaEncoder
from .tower import OWN_CONFIGS, ConvTower, WrittenTower


class HFEncoder(MediaEncoder):
    """A backbone of transformers, cut after the last block that the chosen layer needs."""

    leading_tokens: ClassVar[int] = 0
    """Class token and registers: they come first and are not places in the picture."""
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def __init__(self, config: PreTrainedConfig, backbone: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.width = config.hidden_size
        self.backbone = backbone

    @property
    def module(self) -> nn.Module:
        return self.backbone

    @classmethod
    def build(cls, config: PreTrainedConfig, feature_layer: int = -2, attn: str | None = None) -> HFEncoder:
        cut = copy.deepcopy(config)
        cut.num_hidden_layers = num_blocks(config.num_hidden_layers, feature_layer)
        cls.leave_out(cut)
        if attn is not None:
            cut._attn_implementation = attn
        # The data type of the whole model, not the one this tower was once saved in.
        backbone = AutoModel.from_config(cut, dtype=torch.get_default_dtype())
        cls.strip(backbone)
        return cls(cut, backbone)

    @classmethod
    def leave_out(cls, config: PreTrainedConfig) -> None:
        """Switch off in ``config`` what comes after the last block."""

    @classmethod
    def strip(cls, backbone: Any) -> None:
        """Remove from ``backbone`` what comes after the last block and cannot be switched off."""
        getattr(backbone, "vision_model", backbone).post_layernorm = nn.Identity()

    @classmethod
    def grid(cls, config: PreTrainedConfig, size_px: tuple[int, int]) -> tuple[int, ...]:
        return patch_grid(*size_px, edge_px(config.patch_size, "patch_size"))

    @classmethod
    def preparation_of(cls, config: PreTrainedConfig) -> Preparation:
        edge = edge_px(config.image_size, "image_size")
        return Preparation(edge, edge, mean=cls.mean, std=cls.std)

    def forward(self, values: Tensor) -> Features:
        grid = self.grid(self.config, (values.shape[2], values.shape[3]))
        x_NSE = self.run(values, grid)
        return Features(x_NSE[:, self.leading_tokens :], grid)

    def run(self, values: Tensor, grid: tuple[int, ...]) -> Tensor:
        """[N, 3, H, W] -> [N, leading + S, E]."""
        default = self.preparation_of(self.config).size_px
        # Another size than the one of pretraining: the learned positions are interpolated.
        resized = (values.shape[2], values.shape[3]) != default
        return self.backbone(pixel_values=values, interpolate_pos_encoding=resized).last_hidden_state


class CLIP(HFEncoder):
    """CLIP (arXiv:2103.00020): one class token first."""

    leading_tokens = 1
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)


class SigLIP(HFEncoder):
    """SigLIP (arXiv:2303.15343) and SigLIP 2 of fixed resolution: no class token, all are patches."""

    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    @classmethod
    def leave_out(cls, config: PreTrainedConfig) -> None:
        config.vision_use_head = False


class SigLIP2(HFEncoder):
    """SigLIP 2 in its flexible form (arXiv:2502.14786), at one size: it takes patches, not pixels."""

    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    @classmethod
    def leave_out(cls, config: PreTrainedConfig) -> None:
        config.vision_use_head = False

    @classmethod
    def preparation_of(cls, config: PreTrainedConfig) -> Preparation:
        edge = round(config.num_patches**0.5) * edge_px(config.patch_size, "patch_size")
        return Preparation(edge, edge, mean=cls.mean, std=cls.std, resample="bilinear")

    def run(self, values: Tensor, grid: tuple[int, ...]) -> Tensor:
        h, w = grid
        p = edge_px(self.config.patch_size, "patch_size")
        x_N3hpwp = values[:, :, : h * p, : w * p].unflatten(3, (w, p)).unflatten(2, (h, p))
        # Within a patch: row, column, channel, as transformers' own image processor flattens it.
        x_NSP = x_N3hpwp.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        shapes = torch.tensor([[h, w]]).expand(len(values), 2)
        out = self.backbone(pixel_values=x_NSP, pixel_attention_mask=None, spatial_shapes=shapes)
        return out.last_hidden_state


class DINOv2(HFEncoder):
    """DINOv2 (arXiv:2304.07193): one class token first; reads any size."""

    leading_tokens = 1
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    @classmethod
    def strip(cls, backbone: Any) -> None:
        backbone.layernorm = nn.Identity()
        backbone.embeddings.mask_token = None

    def run(self, values: Tensor, grid: tuple[int, ...]) -> Tensor:
        return self.backbone(pixel_values=values).last_hidden_state


class DINOv2WithRegisters(DINOv2):
    """DINOv2 with registers (arXiv:2309.16588): they follow the class token."""

    def forward(self, values: Tensor) -> Features:
        grid = self.grid(self.config, (values.shape[2], values.shape[3]))
        x_NSE = self.run(values, grid)
        return Features(x_NSE[:, 1 + self.config.num_register_tokens :], grid)


def num_blocks(layers: int, feature_layer: int) -> int:
    """Blocks that must run so that hidden state ``feature_layer`` of ``layers + 1`` exists.

    Raises:
        ValueError: if there is no such hidden state.
    """
    if not -layers - 1 <= feature_layer <= layers:
        raise ValueError(
            f"feature_layer {feature_layer}, but a tower of {layers} blocks has hidden states {-layers - 1} "
            f"to {layers}"
        )
    return feature_layer % (layers + 1)


def edge_px(size: int | list[int] | tuple[int, ...], name: str) -> int:
    """Edge of a square that a config gives as one number or as two equal ones."""
    edges = {size} if isinstance(size, int) else set(size)
    if len(edges) != 1:
        raise ValueError(f"expected a square {name}, got {size}")
    return edges.pop()


def encoder_of(config: PreTrainedConfig) -> type[MediaEncoder]:
    """The adapter for a tower's config.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    return find_encoder(config.model_type)


def find_encoder(model_type: str) -> type[MediaEncoder]:
    """The adapter for a ``model_type``; see :func:`encoder_of`."""
    if model_type not in ENCODERS:
        close = difflib.get_close_matches(model_type, ENCODERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no tower for model_type {model_type!r}; known: {', '.join(ENCODERS)}{hint}")
    return ENCODERS[model_type]


def tower_config(config: PreTrainedConfig | Mapping[str, Any]) -> PreTrainedConfig:
    """A tower's config from what its ``config.json`` holds.

    Of a whole CLIP or SigLIP, which also reads text, the part that sees.

    Raises:
        ValueError: if there is no adapter for it.
    """
    if isinstance(config, PreTrainedConfig):
        found = config
    else:
        values = dict(config)
        model_type = values.pop("model_type", None)
        if model_type in OWN_CONFIGS:
            found = OWN_CONFIGS[model_type](**values)
        elif model_type in CONFIG_MAPPING:
            found = CONFIG_MAPPING[model_type](**values)
        else:
            find_encoder(str(model_type))
            raise ValueError(f"transformers knows no config for model_type {model_type!r}")
    if found.model_type in WHOLE_MODELS:
        found = found.vision_config
    encoder_of(found)
    return found


WHOLE_MODELS = ("clip", "siglip", "siglip2")
"""Models of a tower and a text encoder, whose ``vision_config`` is the tower's."""

ENCODERS: dict[str, type[MediaEncoder]] = {
    "clip_vision_model": CLIP,
    "siglip_vision_model": SigLIP,
    "siglip2_vision_model": SigLIP2,
    "dinov2": DINOv2,
    "dinov2_with_registers": DINOv2WithRegisters,
    "tinymodal_tower": ConvTower,
    "tinymodal_written": WrittenTower,
}
