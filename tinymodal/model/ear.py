"""The small tower of our own that hears: convolutions over a log-mel under a transformer block or two.

As with pictures, a convolutional stem learns in minutes of two CPU cores what plain attention needs far
longer for. Where a position stands is told by a convolution over its neighbours, as in wav2vec 2.0, so that a
tower trained on short clips reads long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .audio import Hearing
from .media import Features
from .sound_tower import AudioTower, Layers, read_layers, require_bands
from .tower import Block

# Shapes: N windows, B mel bands, S positions, E width, C channels.


class EarConfig(PreTrainedConfig):
    """Sizes of an :class:`Ear`: 0.32 million parameters and 25 positions a second.

    ``channels`` are the stem's stages, each with its entry of ``strides`` and of ``residual_convs``;
    ``reach`` is how many positions the convolution spans that tells them apart.
    """

    model_type = "tinymodal_ear"

    def __init__(
        self,
        num_mel_bins: int = 64,
        channels: Sequence[int] = (96, 128),
        strides: Sequence[int] = (2, 2),
        residual_convs: Sequence[int] = (0, 1),
        num_hidden_layers: int = 1,
        num_attention_heads: int = 4,
        reach: int = 15,
        window_s: float = 30.0,
        step_s: float = 0.5,
        **kwargs: Any,
    ) -> None:
        self.num_mel_bins = num_mel_bins
        self.channels, self.strides, self.residual_convs = list(channels), list(strides), list(residual_convs)
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.reach = reach
        self.window_s, self.step_s = window_s, step_s
        self.hidden_size = self.channels[-1]
        kwargs.pop("hidden_size", None)
        super().__init__(**kwargs)


class _ConvNorm(nn.Module):
    """A convolution whose output is as long as the input divided by ``stride``, rounded up; and a norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        # Over the channels of one position: neither the length of a clip nor its silence matters.
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x_NCS: Tensor) -> Tensor:
        return self.norm(self.conv(x_NCS).transpose(1, 2)).transpose(1, 2)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _ConvNorm(channels, channels, 3, 1)

    def forward(self, x_NCS: Tensor) -> Tensor:
        return x_NCS + F.gelu(self.first(x_NCS))


class Ear(AudioTower):
    """Convolutional stem, positions by convolution, transformer blocks; hidden state 0 is the stem's."""

    def __init__(self, config: EarConfig, layers: tuple[int, ...], weighted: bool) -> None:
        super().__init__(config, layers, weighted, config.hidden_size)
        stages: list[nn.Module] = []
        before = config.num_mel_bins
        for i, (channels, stride, extra) in enumerate(
            zip(config.channels, config.strides, config.residual_convs, strict=True)
        ):
            stages += [_ConvNorm(before, channels, 5 if i == 0 else 3, stride), nn.GELU()]
            stages += [_Residual(channels) for _ in range(extra)]
            before = channels
        self.stem = nn.Sequential(*stages)
        self.positions = nn.Conv1d(before, before, config.reach, padding=config.reach // 2, groups=before)
        self.blocks = nn.ModuleList(Block(before, config.num_attention_heads) for _ in range(max(layers)))

    @classmethod
    def build(cls, config: EarConfig, feature_layer: Layers = -1, attn: str | None = None) -> Ear:
        if config.reach % 2 == 0:
            raise ValueError(f"reach must be odd, as many positions before as behind; got {config.reach}")
        if not len(config.channels) == len(config.strides) == len(config.residual_convs):
            raise ValueError(
                f"channels, strides and residual_convs have one number for each stage, got "
                f"{config.channels}, {config.strides}, {config.residual_convs}"
            )
        if over := [stride for stride in config.strides if not 1 <= stride <= 3]:
            raise ValueError(f"strides are 1, 2 or 3, got {over[0]}: a convolution of 3 would skip frames")
        return cls(config, *read_layers(config.num_hidden_layers, feature_layer))

    @classmethod
    def hearing_of(cls, config: EarConfig) -> Hearing:
        return Hearing(
            "log_mel", num_bands=config.num_mel_bins, window_s=config.window_s, step_s=config.step_s
        )

    @classmethod
    def stride(cls, config: EarConfig) -> int:
        return 160 * prod(config.strides)

    @classmethod
    def grid(cls, config: EarConfig, size: tuple[int, ...]) -> tuple[int, ...]:
        length = size[-1]
        if length < 1:
            raise ValueError(f"a {config.model_type!r} needs a frame, got {length}")
        for stride in config.strides:
            length = -(-length // stride)
        return (length,)

    def forward(self, values: Tensor) -> Features:
        require_bands(values, self.config.num_mel_bins, self.config)
        x_NCS = self.stem(values)
        states = [(x_NCS + F.gelu(self.positions(x_NCS))).transpose(1, 2)]
        for block in self.blocks:
            states.append(block(states[-1]))
        grid = self.grid(self.config, (values.shape[-1],))
        return Features(self.join([states[layer] for layer in self.layers]), grid)
