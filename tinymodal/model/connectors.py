"""From a tower's features to embeddings in the language model's space, one by one or by blocks of the grid.

``shrink`` says how many tokens a grid becomes, in integers alone: the processor counts with it and
``forward`` obeys it. Those that ask with learned queries are in ``resamplers.py``, those that join the
positions of a sound in ``audio_connectors.py``.
"""

# Shapes: N items, h w feature grid, S = h*w positions, T = tokens, E tower width, D language width, r ratio.

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .audio_connectors import ConvFrames, PoolFrames, StackFrames, WindowQFormer
from .geometry import fold
from .joint import ACTIVATIONS, Connector, Option, rows_and_columns, stack
from .media import Features
from .resamplers import Perceiver, QFormer, SinCos


class Identity(Connector):
    """Features as they are; the tower must be as wide as the language model."""

    name = "identity"

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        if in_width != out_width:
            raise ValueError(
                f"connector 'identity' needs a tower as wide as the language model, got {in_width} and "
                f"{out_width}; use 'linear' or 'mlp'"
            )

    @classmethod
    def shrink(cls, grid: tuple[int, ...], **options: Option) -> tuple[int, ...]:
        return grid

    def forward(self, features: Features) -> Tensor:
        return features.values


class Linear(Connector):
    """One matrix and a bias (LLaVA 1.0, arXiv:2304.08485)."""

    name = "linear"

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_width, out_width)

    @classmethod
    def shrink(cls, grid: tuple[int, ...], **options: Option) -> tuple[int, ...]:
        return grid

    def forward(self, features: Features) -> Tensor:
        return self.proj(features.values)


class MLP(Connector):
    """``depth`` linear layers with an activation between them (LLaVA 1.5's mlp2x_gelu, arXiv:2310.03744)."""

    name = "mlp"
    defaults: ClassVar[dict[str, Option]] = {"depth": 2, "activation": "gelu"}
    choices: ClassVar[dict[str, Sequence[str]]] = {"activation": tuple(ACTIVATIONS)}

    def __init__(self, in_width: int, out_width: int, depth: int = 2, activation: str = "gelu") -> None:
        super().__init__()
        self.proj = stack(in_width, out_width, depth, activation)

    @classmethod
    def shrink(cls, grid: tuple[int, ...], **options: Option) -> tuple[int, ...]:
        return grid

    def forward(self, features: Features) -> Tensor:
        return self.proj(features.values)


class PixelShuffle(Connector):
    """Fold each r x r block of features into one token, then project (SmolVLM, arXiv:2504.05299)."""

    name = "pixel_shuffle"
    defaults: ClassVar[dict[str, Option]] = {"ratio": 2, "depth": 2, "activation": "gelu"}
    choices: ClassVar[dict[str, Sequence[str]]] = {"activation": tuple(ACTIVATIONS)}

    def __init__(
        self, in_width: int, out_width: int, ratio: int = 2, depth: int = 2, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.ratio = ratio
        # Before a tower's last norm, features differ in size by orders; the projection should not care.
        self.norm = nn.LayerNorm(in_width * ratio**2)
        self.proj = stack(in_width * ratio**2, out_width, depth, activation)

    @classmethod
    def shrink(  # type: ignore[override]
        cls, grid: tuple[int, ...], ratio: int = 2, **others: Option
    ) -> tuple[int, ...]:
        return fold(rows_and_columns(grid, cls.name), ratio)

    @classmethod
    def multiple(cls, ratio: int = 2, **others: Option) -> int:  # type: ignore[override]
        return ratio

    def forward(self, features: Features) -> Tensor:
        x_NSE, r = features.values, self.ratio
        h, w = self.shrink(features.grid, r)
        x_NhrwrE = x_NSE.unflatten(1, (h, r, w, r))
        x_NTE = x_NhrwrE.transpose(2, 3).reshape(len(x_NSE), h * w, -1)
        return self.proj(self.norm(x_NTE))


class AvgPool(Connector):
    """The mean of each r x r block of features, then project (DeCo, arXiv:2405.20985).

    ``side`` gives ``side`` x ``side`` tokens of any grid instead, over blocks that may overlap by one row or
    column (adaptive pooling, as DeCo has it).
    """

    name = "avg_pool"
    defaults: ClassVar[dict[str, Option]] = {"ratio": 2, "side": 0, "depth": 2, "activation": "gelu"}
    choices: ClassVar[dict[str, Sequence[str]]] = {"activation": tuple(ACTIVATIONS)}
    may_be_zero: ClassVar[frozenset[str]] = frozenset({"side"})

    def __init__(
        self,
        in_width: int,
        out_width: int,
        ratio: int = 2,
        side: int = 0,
        depth: int = 2,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.ratio, self.side = ratio, side
        self.proj = stack(in_width, out_width, depth, activation)

    @classmethod
    def shrink(  # type: ignore[override]
        cls, grid: tuple[int, ...], ratio: int = 2, side: int = 0, **others: Option
    ) -> tuple[int, int]:
        h, w = rows_and_columns(grid, cls.name)
        if not side:
            return fold(grid, ratio)
        if side > min(h, w):
            raise ValueError(
                f"connector {cls.name!r} with side {side} needs a grid of {side} x {side} features or more, "
                f"got {h} x {w}; give it larger pictures or a smaller side"
            )
        return side, side

    @classmethod
    def multiple(cls, ratio: int = 2, side: int = 0, **others: Option) -> int:  # type: ignore[override]
        return 1 if side else ratio

    def forward(self, features: Features) -> Tensor:
        x_NEhw = to_picture(features.values, rows_and_columns(features.grid, self.name))
        x_NEhw = F.adaptive_avg_pool2d(x_NEhw, self.shrink(features.grid, self.ratio, self.side))
        return self.proj(to_sequence(x_NEhw))


class LDP(Connector):
    """MobileVLM's lightweight downsample projector: MLP, then two convolution blocks, the second of stride 2.

    ``LDPBlock`` in mobilevlm/model/vision_projector.py of Meituan-AutoML/MobileVLM (arXiv:2312.16886). A
    side of h features becomes ceil(h / 2) tokens. Weights have the names of ``mm_projector.model`` there.
    """

    name = "ldp"

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        # Both begin with an Identity there; ours keep its place so that the layers' numbers agree.
        self.mlp = nn.Sequential(nn.Identity(), *stack(in_width, out_width, 2, "gelu"))
        self.mb_block = nn.Sequential(
            nn.Identity(), InvertedResidual(out_width, 1), InvertedResidual(out_width, 2)
        )

    @classmethod
    def shrink(cls, grid: tuple[int, ...], **options: Option) -> tuple[int, ...]:
        h, w = rows_and_columns(grid, cls.name)
        return (h + 1) // 2, (w + 1) // 2

    def forward(self, features: Features) -> Tensor:
        x_NSD = self.mlp(features.values)
        return to_sequence(self.mb_block(to_picture(x_NSD, rows_and_columns(features.grid, self.name))))


class LDPv2(AvgPool):
    """MobileVLM V2's projector: MLP, average pooling, and a depthwise convolution added to its input.

    ``LDPNetV2Projector`` in mobilevlm/model/vision_projector.py of Meituan-AutoML/MobileVLM
    (arXiv:2402.03766). There, pooling is to 12 x 12 of 24 x 24, which is ratio 2; ``side = 12`` pools any
    other grid so. Weights: ``mlp.mlp`` there is ``proj`` here, ``peg.peg.0`` is ``peg``.
    """

    name = "ldpv2"
    defaults: ClassVar[dict[str, Option]] = {"ratio": 2, "side": 0}

    def __init__(self, in_width: int, out_width: int, ratio: int = 2, side: int = 0) -> None:
        super().__init__(in_width, out_width, ratio, side)
        self.peg = nn.Conv2d(out_width, out_width, 3, padding=1, groups=out_width)

    def forward(self, features: Features) -> Tensor:
        x_NDhw = to_picture(self.proj(features.values), rows_and_columns(features.grid, self.name))
        x_NDhw = F.adaptive_avg_pool2d(x_NDhw, self.shrink(features.grid, self.ratio, self.side))
        return to_sequence(x_NDhw + self.peg(x_NDhw))


class Interleave(Connector):
    """Two towers, an MLP each, and their tokens in turn: first, second, first, second, ...

    Interleaved mixture of features (arXiv:2401.06209), TinyLLaVA's ``mof_mlp``: ``clip`` there is ``proj.0``,
    ``dinov2`` is ``proj.1``.
    """

    name = "interleave"
    defaults: ClassVar[dict[str, Option]] = {"depth": 2, "activation": "gelu"}
    choices: ClassVar[dict[str, Sequence[str]]] = {"activation": tuple(ACTIVATIONS)}

    def __init__(
        self, widths: Sequence[int], out_width: int, depth: int = 2, activation: str = "gelu"
    ) -> None:
        super().__init__()
        if len(widths) != 2:
            raise ValueError(
                f"connector 'interleave' needs the features of 2 towers, got {len(widths)}; give it two "
                f"towers or use 'mlp'"
            )
        self.widths = tuple(widths)
        self.proj = nn.ModuleList(stack(width, out_width, depth, activation) for width in widths)

    @classmethod
    def build(cls, widths: Sequence[int], out_width: int, **options: Option) -> Connector:
        return cls(widths, out_width, **options)  # type: ignore[arg-type]

    @classmethod
    def shrink(cls, grid: tuple[int, ...], **options: Option) -> tuple[int, ...]:
        return (*grid[:-1], 2 * grid[-1])

    def forward(self, features: Features) -> Tensor:
        parts = features.values.split(self.widths, dim=2)
        x_NS2D = torch.stack([proj(part) for proj, part in zip(self.proj, parts, strict=True)], dim=2)
        return x_NS2D.flatten(1, 2)


class InvertedResidual(nn.Module):
    """MobileNetV3's block as MobileVLM uses it: depthwise, squeeze and excite, pointwise; [N, D, h, w].

    No widening, LayerNorm over channels, hard swish; input added where the stride is 1. Layers are named and
    numbered as in torchvision's ``InvertedResidual`` without expansion.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.block = nn.Sequential(
            nn.Sequential(depthwise, ChannelNorm(width), nn.Hardswish()),
            SqueezeExcite(width),
            nn.Sequential(pointwise, ChannelNorm(width)),
        )
        self.adds_input = stride == 1

    def forward(self, x_NDhw: Tensor) -> Tensor:
        out_NDhw = self.block(x_NDhw)
        return x_NDhw + out_NDhw if self.adds_input else out_NDhw


class SqueezeExcite(nn.Module):
    """Each channel times a factor in [0, 1] that two layers read off the means of all (arXiv:1709.01507)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        quarter = width // 4
        # torchvision's _make_divisible: to the nearest multiple of 8, but not below 9/10 of the quarter.
        squeezed = max(8, (quarter + 4) // 8 * 8)
        squeezed += 8 * (10 * squeezed < 9 * quarter)
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x_NDhw: Tensor) -> Tensor:
        mean_ND11 = x_NDhw.mean((2, 3), keepdim=True)
        return x_NDhw * F.hardsigmoid(self.fc2(F.relu(self.fc1(mean_ND11))))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [N, D, h, w], each position by itself."""

    def forward(self, x_NDhw: Tensor) -> Tensor:
        return super().forward(x_NDhw.movedim(1, 3)).movedim(3, 1)


def to_picture(x_NSE: Tensor, grid: tuple[int, int]) -> Tensor:
    """[N, S, E] -> [N, E, h, w]."""
    return x_NSE.transpose(1, 2).unflatten(2, grid)


def to_sequence(x_NEhw: Tensor) -> Tensor:
    """[N, E, h, w] -> [N, h*w, E]."""
    return x_NEhw.flatten(2).transpose(1, 2)


def find_connector(name: str) -> type[Connector]:
    """The connector of that name; ``mlp2x_gelu`` and its like are ``mlp`` with that depth.

    Raises:
        ValueError: if there is none; names the nearest, or ours for another system's name.
    """
    if name in CONNECTORS:
        return CONNECTORS[name]
    if numbered := re.fullmatch(r"mlp(\d+)x_gelu", name):
        return _mlp_of_depth(int(numbered[1]))
    close = difflib.get_close_matches(name, CONNECTORS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if name in ELSEWHERE:
        hint = f"; here it is {ELSEWHERE[name]}"
    raise ValueError(f"unknown connector {name!r}; known: {', '.join(CONNECTORS)} and mlpNx_gelu{hint}")


@functools.cache
def _mlp_of_depth(depth: int) -> type[Connector]:
    """``mlpNx_gelu``: an MLP without options."""
    if depth < 1:
        raise ValueError(f"mlp{depth}x_gelu has no layer; mlp1x_gelu has one")

    class Numbered(MLP):
        name = f"mlp{depth}x_gelu"
        defaults: ClassVar[dict[str, Option]] = {}

        @classmethod
        def build(cls, widths: Sequence[int], out_width: int, **options: Option) -> Connector:
            # A plain MLP: a class made inside a function cannot be pickled.
            return MLP(sum(widths), out_width, depth, "gelu")

    return Numbered


CONNECTORS: dict[str, type[Connector]] = {
    connector.name: connector
    for connector in (
        Identity,
        Linear,
        MLP,
        PixelShuffle,
        AvgPool,
        LDP,
        LDPv2,
        Perceiver,
        SinCos,
        QFormer,
        Interleave,
        StackFrames,
        ConvFrames,
        PoolFrames,
        WindowQFormer,
    )
}

ELSEWHERE: dict[str, str] = {
    "ldpnet": "'ldp'",
    "ldpnetv2": "'ldpv2'",
    "mof_mlp": "'interleave'",
    "resampler": "'perceiver' (TinyLLaVA's) or 'sincos' (OmniLMM's and MiniCPM-V's)",
}
"""What other systems call a connector of ours, where the nearest name would mislead."""
