"""Towers of our own: the small one that the starter model sees with, and the one that reads written scenes.

``ConvTower`` is a convolutional stem under a few transformer blocks. Such a stem learns in minutes of two CPU
cores what a plain ViT of the same size needs far longer for (Xiao et al., "Early Convolutions Help
Transformers See Better", arXiv:2106.14881).

``WrittenTower`` has no eyes: its pictures are a few pixels whose channels are codes, and a feature is the sum
of three learned vectors. It stands in for a tower while a language model learns to look things up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .geometry import patch_grid
from .image import Preparation
from .media import Features, hidden_states
from .picture_tower import PictureTower

# Shapes: N items, h w grid, S = h*w positions, E width, A heads, C channels.


class ConvTowerConfig(PreTrainedConfig):
    """Sizes of a :class:`ConvTower`. ``channels`` are the stem's stages, each of which halves the picture."""

    model_type = "tinymodal_tower"

    def __init__(
        self,
        image_size: int = 96,
        channels: tuple[int, ...] = (24, 48, 96, 128),
        residual_convs: tuple[int, ...] = (0, 0, 1, 1),
        num_hidden_layers: int = 1,
        num_attention_heads: int = 4,
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.channels = list(channels)
        self.residual_convs = list(residual_convs)
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_size = self.channels[-1]
        kwargs.pop("hidden_size", None)
        super().__init__(**kwargs)

    @property
    def patch_size(self) -> int:
        """Pixels a position stands for: every stage of the stem halves the picture."""
        return 2 ** len(self.channels)


class _ConvNorm(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
            # Not batch norm: a picture's features may not depend on the other pictures of the batch.
            nn.GroupNorm(8, out_channels),
        )


class _ResidualConv(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _ConvNorm(channels, channels, 3, 1)

    def forward(self, x_NChw: Tensor) -> Tensor:
        return x_NChw + F.relu(self.first(x_NChw))


class Block(GradientCheckpointingLayer):
    """Pre-norm transformer block; its activations are computed again where checkpointing is on."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_NSE: Tensor) -> Tensor:
        q_NASe, k_NASe, v_NASe = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x_NSE)).chunk(3, dim=-1)
        )
        a_NASe = F.scaled_dot_product_attention(q_NASe, k_NASe, v_NASe)
        x_NSE = x_NSE + self.out(a_NASe.transpose(1, 2).flatten(2))
        return x_NSE + self.down(F.gelu(self.up(self.norm2(x_NSE))))


class ConvTower(PictureTower):
    """Convolutional stem, learned positions, transformer blocks; hidden state 0 is the stem's output."""

    kind: ClassVar[str] = "image"

    def __init__(self, config: ConvTowerConfig, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.layers = config, layers
        self.width = config.hidden_size * len(layers)
        stages: list[nn.Module] = []
        before = 3
        for i, (channels, extra) in enumerate(zip(config.channels, config.residual_convs, strict=True)):
            stages += [_ConvNorm(before, channels, 5 if i == 0 else 3, 2), nn.ReLU()]
            stages += [_ResidualConv(channels) for _ in range(extra)]
            before = channels
        self.stem = nn.Sequential(*stages)
        h, w = self.patches(config, (config.image_size, config.image_size))
        self.positions = nn.Parameter(torch.randn(1, h * w, config.hidden_size) * 0.02)
        self.blocks = nn.ModuleList(
            Block(config.hidden_size, config.num_attention_heads) for _ in range(max(layers))
        )

    @classmethod
    def build(
        cls,
        config: ConvTowerConfig,
        feature_layer: int | Sequence[int] = -1,
        attn: str | None = None,
        keep_class: bool = False,
    ) -> ConvTower:
        cls.check_class(config, keep_class)
        return cls(config, hidden_states(config.num_hidden_layers, feature_layer))

    @classmethod
    def patches(cls, config: ConvTowerConfig, size_px: tuple[int, int]) -> tuple[int, int]:
        if tuple(size_px) != (config.image_size, config.image_size):
            edge = config.image_size
            raise ValueError(f"this tower reads {edge} x {edge} px, got {size_px[0]} x {size_px[1]}")
        if over := config.image_size % config.patch_size:
            near = f"{config.image_size - over} or {config.image_size - over + config.patch_size}"
            raise ValueError(
                f"image_size {config.image_size} is not a multiple of {config.patch_size}, what "
                f"{len(config.channels)} stages make one position of; take {near}"
            )
        return patch_grid(*size_px, config.patch_size)

    @classmethod
    def patch_px(cls, config: ConvTowerConfig) -> int:
        return config.patch_size

    @classmethod
    def preparation_of(cls, config: ConvTowerConfig) -> Preparation:
        return Preparation(config.image_size, config.image_size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))

    def forward(self, values: Tensor) -> Features:
        states_NSE = [self.stem(values).flatten(2).transpose(1, 2) + self.positions]
        for block in self.blocks:
            states_NSE.append(block(states_NSE[-1]))
        x_NSE = torch.cat([states_NSE[layer] for layer in self.layers], dim=-1)
        return self.features(x_NSE, (values.shape[2], values.shape[3]))


class WrittenTowerConfig(PreTrainedConfig):
    """Sizes of a :class:`WrittenTower`: ``image_size`` squared pixels, codes below ``num_codes``."""

    model_type = "tinymodal_written"

    def __init__(
        self,
        image_size: int = 3,
        num_codes: int = 64,
        hidden_size: int = 128,
        noise: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.image_size, self.num_codes, self.hidden_size, self.noise = (
            image_size,
            num_codes,
            hidden_size,
            noise,
        )
        self.num_hidden_layers, self.patch_size = 0, 1
        for derived in ("num_hidden_layers", "patch_size"):
            kwargs.pop(derived, None)
        super().__init__(**kwargs)


class WrittenTower(PictureTower):
    """One position a pixel: the sum of a learned vector for each channel's code and one for the place.

    ``noise`` is the standard deviation of what is added in training, relative to a feature of unit size: a
    language model that will see through a real tower should not rely on exact codes.
    """

    kind: ClassVar[str] = "image"

    def __init__(self, config: WrittenTowerConfig) -> None:
        super().__init__()
        self.config, self.width = config, config.hidden_size
        self.codes = nn.Embedding(3 * config.num_codes, self.width)
        self.positions = nn.Parameter(torch.randn(1, config.image_size**2, self.width))

    @classmethod
    def build(
        cls,
        config: WrittenTowerConfig,
        feature_layer: int | Sequence[int] = -1,
        attn: str | None = None,
        keep_class: bool = False,
    ) -> WrittenTower:
        cls.check_class(config, keep_class)
        if feature_layer not in (-1, 0, [-1], [0], (-1,), (0,)):
            raise ValueError(
                f"feature layer {feature_layer}, but a tower of written scenes has one hidden state; use -1"
            )
        return cls(config)

    @classmethod
    def patches(cls, config: WrittenTowerConfig, size_px: tuple[int, int]) -> tuple[int, int]:
        if tuple(size_px) != (config.image_size, config.image_size):
            edge = config.image_size
            raise ValueError(f"written scenes are {edge} x {edge} px, got {size_px[0]} x {size_px[1]}")
        return patch_grid(*size_px, 1)

    @classmethod
    def patch_px(cls, config: WrittenTowerConfig) -> int:
        return 1

    @classmethod
    def preparation_of(cls, config: WrittenTowerConfig) -> Preparation:
        return Preparation(config.image_size, config.image_size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def forward(self, values: Tensor) -> Features:
        codes_N3hw = (values * 255).round().long().clamp(0, self.config.num_codes - 1)
        offsets = torch.arange(3, device=values.device).view(1, 3, 1, 1) * self.config.num_codes
        x_NSE = self.codes((codes_N3hw + offsets).flatten(2)).sum(1) + self.positions
        if self.training and self.config.noise:
            x_NSE = x_NSE + self.config.noise * torch.randn_like(x_NSE)
        return self.features(x_NSE, (values.shape[2], values.shape[3]))


OWN_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    c.model_type: c for c in (ConvTowerConfig, WrittenTowerConfig)
}
"""Configs that transformers' ``AutoConfig`` does not know, by the ``model_type`` in their ``config.json``."""
