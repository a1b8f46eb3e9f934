"""Connectors for sounds: positions that follow one another become fewer, ``factor`` of them one token.

Where a window's positions are no multiple of ``factor``, the last token stands for what is left: no sound is
cut and none is filled here. ``linear``, ``mlp`` and the resamplers read sounds as well as pictures.
"""

# Shapes: N windows, S positions, k factor, G = ceil(S / k) groups, E tower width, D language width,
# Q queries.

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .geometry import stack as groups_of
from .joint import ACTIVATIONS, Connector, Option, frames_in_line, stack
from .media import Features
from .resamplers import QFormer


class _Folding(Connector):
    """Each ``factor`` positions become one token, and the last one stands for what is left."""

    defaults: ClassVar[dict[str, Option]] = {"factor": 4, "depth": 2, "activation": "gelu"}
    choices: ClassVar[dict[str, Sequence[str]]] = {"activation": tuple(ACTIVATIONS)}

    def __init__(
        self, in_width: int, out_width: int, factor: int = 4, depth: int = 2, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.factor = factor
        self.prepare(in_width, ACTIVATIONS[activation])
        self.proj = stack(self.folded(in_width), out_width, depth, activation)

    def prepare(self, in_width: int, activation: type[nn.Module]) -> None:
        """Make what stands before the projection."""

    def folded(self, in_width: int) -> int:
        """Width of what is projected."""
        return in_width

    @classmethod
    def shrink(  # type: ignore[override]
        cls, grid: tuple[int, ...], factor: int = 4, **others: Option
    ) -> tuple[int, ...]:
        return (groups_of(frames_in_line(grid, cls.name), factor),)


class StackFrames(_Folding):
    """Lay ``factor`` positions side by side, then project (SLAM-ASR, arXiv:2402.08846; Ultravox).

    The last position is repeated where some are missing at the end.
    """

    name = "stack_frames"

    def prepare(self, in_width: int, activation: type[nn.Module]) -> None:
        # Hidden states before a tower's last norm differ in size by orders; the projection should not care.
        self.norm = nn.LayerNorm(self.folded(in_width))

    def folded(self, in_width: int) -> int:
        return in_width * self.factor

    def forward(self, features: Features) -> Tensor:
        (groups,) = self.shrink(features.grid, self.factor)
        x_NSE = features.values
        if missing := groups * self.factor - x_NSE.shape[1]:
            x_NSE = torch.cat([x_NSE, x_NSE[:, -1:].expand(-1, missing, -1)], dim=1)
        return self.proj(self.norm(x_NSE.reshape(len(x_NSE), groups, -1)))


class PoolFrames(_Folding):
    """The mean of each ``factor`` positions, then project. The last mean is of what is left."""

    name = "pool_frames"

    def forward(self, features: Features) -> Tensor:
        self.shrink(features.grid, self.factor)
        x_NES = features.values.transpose(1, 2)
        x_NEG = F.avg_pool1d(x_NES, self.factor, ceil_mode=True, count_include_pad=False)
        return self.proj(x_NEG.transpose(1, 2))


class ConvFrames(_Folding):
    """Strided convolutions, then project: one for each prime factor of ``factor``, the greatest last.

    A convolution of stride p spans 2 p - 1 positions, as the one of stride 2 and width 3 in Whisper's stem.
    """

    name = "conv_frames"

    def prepare(self, in_width: int, activation: type[nn.Module]) -> None:
        self.norm = nn.LayerNorm(in_width)
        self.convs = nn.ModuleList(
            nn.Conv1d(in_width, in_width, 2 * step - 1, step, padding=step - 1)
            for step in primes(self.factor)
        )
        self.activation = activation()

    def forward(self, features: Features) -> Tensor:
        self.shrink(features.grid, self.factor)
        x_NES = self.norm(features.values).transpose(1, 2)
        for conv in self.convs:
            x_NES = self.activation(conv(x_NES))
        return self.proj(x_NES.transpose(1, 2))


class WindowQFormer(QFormer):
    """A Q-Former that asks ``num_queries`` times for every ``factor`` positions (SALMONN, arXiv:2310.13289).

    There 17 positions of 50 a second are a window and the last incomplete one is left out; here it is asked
    as well. Every block sees the features, and there are two, as there.
    """

    name = "window_qformer"
    defaults: ClassVar[dict[str, Option]] = {
        **QFormer.defaults,
        "factor": 17,
        "num_queries": 1,
        "depth": 2,
        "cross_every": 1,
    }

    def __init__(
        self,
        in_width: int,
        out_width: int,
        num_queries: int = 1,
        depth: int = 2,
        width: int = 768,
        num_heads: int = 12,
        cross_every: int = 1,
        middle: int = 0,
        norm: bool = True,
        affine: bool = True,
        dropout: float = 0.0,
        factor: int = 17,
    ) -> None:
        super().__init__(
            in_width,
            out_width,
            num_queries,
            depth,
            width,
            num_heads,
            cross_every,
            middle,
            norm,
            affine,
            dropout,
        )
        self.factor = factor
        self.num_queries = num_queries

    @classmethod
    def shrink(  # type: ignore[override]
        cls, grid: tuple[int, ...], num_queries: int = 1, factor: int = 17, **others: Option
    ) -> tuple[int, ...]:
        return (groups_of(frames_in_line(grid, cls.name), factor) * num_queries,)

    def forward(self, features: Features) -> Tensor:
        (tokens,) = self.shrink(features.grid, self.num_queries, self.factor)
        x_NSE, k = features.values, self.factor
        whole = x_NSE.shape[1] // k
        asked = []
        if whole:
            x_MkE = x_NSE[:, : whole * k].reshape(len(x_NSE) * whole, k, -1)
            asked.append(self.ask(x_MkE).reshape(len(x_NSE), whole * self.num_queries, -1))
        if whole * self.num_queries < tokens:
            asked.append(self.ask(x_NSE[:, whole * k :]))
        return asked[0] if len(asked) == 1 else torch.cat(asked, dim=1)

    def ask(self, x_MSE: Tensor) -> Tensor:
        """Windows [M, S, E] -> [M, Q, D]."""
        return super().forward(Features(x_MSE, (x_MSE.shape[1],)))


def primes(number: int) -> list[int]:
    """Prime factors, the least first."""
    found, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found
