"""Norms and feed-forwards that keep less and read memory less often: the family's own sums.

What a module is, is seen by what it is made of and then tried, see :func:`agree`; its parameters are its own.

==========================  ==========================================================================
feed-forward                keeps what went into the activation and nothing else that is wide; what is
                            wide beside it is made for some positions at a time
RMS norm                    keeps its input and one number a position
activation                  gelu's tanh form by a sigmoid, which it is equal to; in one loop, see
                            :mod:`kernels`
==========================  ==========================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymodal.compose.quantize import is_quantized
from tinymodal.train import kernels
from tinymodal.train.groups import is_norm

# Shapes: M positions, D width, W width inside a feed-forward.

AGREES, AGREES_ROUNDED = 3e-5, 3e-2
"""Largest difference of a module's output or gradient, relative to the largest; the second where products are
rounded to 16 bits or fewer. Rounding of float32 makes 1e-6 at most: a run that goes on decides as it did."""


# Agreement


def agree(module: nn.Module, forward: Callable[..., Any], width: int, tolerance: float | None = None) -> bool:
    """Whether ``forward(module, x)`` is the module's own, output and gradients, on five random rows."""
    parameter = next(module.parameters())
    if parameter.is_meta:
        return True  # nothing to compare; shapes are all that is asked for there
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, width, generator=rng)
    floating = parameter.dtype if parameter.is_floating_point() else torch.float32
    x = x.to(parameter.device, floating).requires_grad_()
    if tolerance is None:
        rounds = floating != torch.float32 or any(is_quantized(m) for m in module.modules())
        tolerance = AGREES_ROUNDED if rounds else AGREES
    trained = [p for p in module.parameters() if p.requires_grad]
    modes = [(part, part.training) for part in module.modules()]
    module.eval()  # no dropout
    try:
        found = []
        for call in (module.forward, partial(forward, module)):
            with torch.enable_grad():
                out = call(x)
                scale = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
                grads = torch.autograd.grad((out * scale).sum(), [x, *trained], allow_unused=True)
            found.append([out.detach(), *grads])
        return all(map(partial(_close, tolerance=tolerance), *found))
    except Exception:  # of any kind, from model code: then it is not what it looked like
        return False
    finally:
        for part, mode in modes:
            part.training = mode


def _close(one: Tensor | None, two: Tensor | None, tolerance: float) -> bool:
    if one is None or two is None:
        return one is two
    if one.shape != two.shape:
        return False
    apart = (one.float() - two.float()).abs().max()
    return bool(apart <= tolerance * one.float().abs().max().clamp(min=1e-30))


# Norms


def find_norm(module: Any) -> Callable[..., Any] | None:
    """A forward for an RMS norm; None for what is none."""
    if not is_norm(module) or isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return None
    eps = next((getattr(module, n) for n in ("variance_epsilon", "eps") if hasattr(module, n)), None)
    if not isinstance(eps, float) or getattr(module, "bias", None) is not None:
        return None
    for offset in (0.0, 1.0):
        forward = partial(_rms_norm, eps=eps, offset=offset)
        if agree(module, forward, len(module.weight)):
            return forward
    return None


def _rms_norm(self: Any, x: Tensor, *, eps: float, offset: float) -> Tensor:
    weight = self.weight
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or weight.shape != x.shape[-1:]:
        # Where the family rounds to 16 bits is its own choice; and one weight may stand for all.
        return type(self).forward(self, x)
    if offset:
        weight = weight + offset
    if x.device.type == "cuda":
        return F.rms_norm(x, weight.shape, weight, eps)
    out: Tensor = RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class RMSNorm(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis; 2 to 3 times as fast as its parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        loops = kernels.fit(x, weight)
        if loops is not None:
            out, scale = loops.rms_norm(x, weight, eps)
        else:
            scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            out = (x * scale).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (d_out * x).mul_(scale).flatten(0, -2).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        loops = kernels.fit(d_out, x, weight, scale)
        if loops is not None:
            return loops.rms_norm_back(d_out, x, weight, scale), d_weight, None
        d_x = d_out * weight
        along = torch.linalg.vecdot(d_x, x).unsqueeze(-1).mul_(scale * scale * scale).div_(-x.shape[-1])
        return d_x.mul_(scale).addcmul_(x, along), d_weight, None


# Activations

ROOT, CUBE = kernels.SIGMOIDS["gelu_tanh"]


class Act:
    """An activation with its derivative, by name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, h: Tensor) -> Tensor:
        """A new tensor."""
        loops = self._loops(h)
        if loops is not None:
            return loops.act(h, *kernels.SIGMOIDS[self.name])
        if self.name == "gelu_tanh":
            if h.device.type != "cpu" or h.dtype != torch.float32:
                return F.gelu(h, approximate="tanh")
            # 0.5 (1 + tanh(z)) is sigmoid(2 z), and a sigmoid costs the CPU a third of a tanh.
            return (h * h).mul_(CUBE).add_(ROOT).mul_(h).sigmoid_().mul_(h)
        if self.name == "quick_gelu":
            return (h * 1.702).sigmoid_().mul_(h)
        plain: dict[str, Callable[..., Tensor]] = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
        return plain[self.name](h)

    def back(self, d_out: Tensor, h: Tensor) -> Tensor:
        """The gradient of ``h``, a new tensor."""
        loops = self._loops(d_out, h)
        if loops is not None:
            return loops.act_back(d_out, h, *kernels.SIGMOIDS[self.name])
        aten = torch.ops.aten
        if self.name == "gelu_tanh":
            return aten.gelu_backward(d_out, h, approximate="tanh")
        if self.name == "quick_gelu":
            return aten.silu_backward(d_out, h * 1.702)
        if self.name == "gelu":
            return aten.gelu_backward(d_out, h)
        if self.name == "silu":
            return aten.silu_backward(d_out, h)
        return aten.threshold_backward(d_out, h, 0)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """``act(gate) * up``, a new tensor."""
        loops = self._loops(gate, up)
        if loops is not None:
            return loops.gated(gate, up, *kernels.SIGMOIDS[self.name])
        return self(gate).mul_(up)

    def gated_back_(self, d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of ``gate`` and ``up``; ``d_out`` is written over."""
        loops = self._loops(d_out, gate, up)
        if loops is not None:
            return loops.gated_back_(d_out, gate, up, *kernels.SIGMOIDS[self.name])
        d_up = self(gate).mul_(d_out)
        return self.back(d_out.mul_(up), gate), d_up

    def _loops(self, *tensors: Tensor) -> kernels.Kernels | None:
        # The loops go by the first one's size; what torch would widen is torch's.
        alike = all(t.shape == tensors[0].shape for t in tensors)
        return kernels.fit(*tensors) if alike and self.name in kernels.SIGMOIDS else None


ACTS = {
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "ReLU": "relu",
    "QuickGELUActivation": "quick_gelu",
}
"""Class of an activation -> what it is believed to be until it is tried."""


class _Activate(torch.autograd.Function):
    """An activation that keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, act: Act) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(h)
        return act(h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        (h,) = ctx.saved_tensors
        return ctx.act.back(d_out, h), None


class _Gate(torch.autograd.Function):
    """``act(gate) * up``; keeps these two alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Act) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return act.gated(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *ctx.act.gated_back_(d_out.clone(), gate, up), None


# Feed-forwards


@dataclasses.dataclass(frozen=True)
class _Inner:
    """Which children of a feed-forward are what."""

    into: tuple[str, ...]
    """One layer; or gate and up; or one that is both, side by side."""
    out: str
    act: Act
    halves: bool = False
    """Whether the one layer is gate and up."""


def find_feed_forward(module: nn.Module) -> Callable[..., Any] | None:
    """A forward for a feed-forward of two or three matrices; None for what is none."""
    children = {
        name: child
        for name, child in module.named_children()
        if not isinstance(child, (nn.Identity, nn.Dropout)) or bool(getattr(child, "p", False))
    }
    layers = [name for name, child in children.items() if hasattr(child, "in_features")]
    acts = [name for name in children if name not in layers]
    if len(acts) != 1 or len(layers) not in (2, 3) or any(True for _ in children[acts[0]].parameters()):
        return None
    known = ACTS.get(type(children[acts[0]]).__name__)
    if known is None:
        return None
    act = Act(known)
    first: Any = children[layers[0]]
    if len(layers) == 3:
        orders = [(0, 1, 2), (1, 0, 2)]
        tries = [_Inner((layers[a], layers[b]), layers[c], act) for a, b, c in orders]
    else:
        last: Any = children[layers[1]]
        halves = first.out_features == 2 * last.in_features
        tries = [_Inner((layers[0],), layers[1], act, halves)]
    for inner in tries:
        forward = partial(_gated if len(inner.into) == 2 or inner.halves else _plain, inner=inner)
        if agree(module, forward, first.in_features):
            return forward
    return None


def is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer is multiplying by its matrix, and nothing watches."""
    return type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)


def _cast(*tensors: Tensor | None) -> list[Any]:
    """As autocast would have them for a product."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if t is None else t.to(dtype) for t in tensors]


def _plain(self: nn.Module, x: Tensor, *, inner: _Inner) -> Tensor:
    first: Any = self.get_submodule(inner.into[0])
    last: Any = self.get_submodule(inner.out)
    if not (is_plain(first) and is_plain(last)):
        return last(_Activate.apply(first(x), inner.act))  # type: ignore[no-untyped-call,no-any-return]
    given = _cast(x, first.weight, first.bias, last.weight, last.bias)
    out: Tensor = _PlainFeedForward.apply(*given, inner.act)  # type: ignore[no-untyped-call]
    return out


def _gated(self: nn.Module, x: Tensor, *, inner: _Inner) -> Tensor:
    layers: list[Any] = [self.get_submodule(name) for name in inner.into]
    last: Any = self.get_submodule(inner.out)
    if inner.halves or not all(map(is_plain, (*layers, last))):
        gate, up = layers[0](x).chunk(2, -1) if inner.halves else (layer(x) for layer in layers)
        return last(_Gate.apply(gate, up, inner.act))  # type: ignore[no-untyped-call,no-any-return]
    (first, second) = layers
    given = _cast(x, first.weight, first.bias, second.weight, second.bias, last.weight, last.bias)
    out: Tensor = _GatedFeedForward.apply(*given, inner.act)  # type: ignore[no-untyped-call]
    return out


WIDE_ELEMENTS, WIDE_ELEMENTS_GPU = 1 << 22, 1 << 26
"""Numbers of a wide tensor made at once, beside the one that is kept: 16 MB in float32; 128 in 16 bits."""
LEAST = 1024
"""Positions: below this a product reads its matrix more often than it uses it."""


def _stretches(h: Tensor) -> Iterator[slice]:
    """The positions of ``h`` [M, W], as many at a time as its width allows."""
    elements = WIDE_ELEMENTS if h.device.type in ("cpu", "meta") else WIDE_ELEMENTS_GPU
    most = max(LEAST, elements // h.shape[1])
    # All alike: a short one at the end would cost more than it is worth.
    number = max(-(-len(h) // most), 1)
    size = max(-(-len(h) // number), 1)
    # One even of no position: a gradient of zero is not none.
    return (slice(at, min(at + size, len(h))) for at in range(0, max(len(h), 1), size))


def _product(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> None:
    """``x @ w.T + b``."""
    if b is None:
        torch.mm(x, w.T, out=out)
    else:
        torch.addmm(b, x, w.T, out=out)


def _sum_into(total: Tensor | None, one: Tensor, other: Tensor) -> Tensor:
    """``total + one.T @ other``."""
    return one.T @ other if total is None else total.addmm_(one.T, other)


class _PlainFeedForward(torch.autograd.Function):
    """``act(x @ V.T + a) @ W.T + b``; of what is wide it keeps the activation's input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, a: Tensor | None, w: Tensor, b: Tensor | None, act: Act
    ) -> Tensor:
        h = F.linear(x, v, a).flatten(0, -2)
        out = h.new_empty(len(h), len(w))
        for part in _stretches(h):
            _product(act(h[part]), w, b, out[part])
        ctx.act, ctx.shape = act, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, v, h, w)
        return out.view(*x.shape[:-1], len(w))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, v, h, w = ctx.saved_tensors  # once: recomputed activations are given out one time
        wants = ctx.needs_input_grad
        d_out = d_out.reshape(-1, d_out.shape[-1])
        flat = None if x is None else x.reshape(-1, x.shape[-1])
        d_x = h.new_empty(len(h), v.shape[1]) if wants[0] else None
        d_v = d_a = d_w = None
        for part in _stretches(h):
            if wants[3]:
                d_w = _sum_into(d_w, d_out[part], ctx.act(h[part]))
            d_h = ctx.act.back(d_out[part] @ w, h[part])
            if flat is not None:
                d_v = _sum_into(d_v, d_h, flat[part])
            if wants[2]:
                d_a = d_h.sum(0) if d_a is None else d_a + d_h.sum(0)
            if d_x is not None:
                torch.mm(d_h, v, out=d_x[part])
        d_b = d_out.sum(0) if wants[4] else None
        return None if d_x is None else d_x.view(ctx.shape), d_v, d_a, d_w, d_b, None


class _GatedFeedForward(torch.autograd.Function):
    """``(act(x @ G.T + g) * (x @ U.T + u)) @ W.T + b``; of what is wide it keeps the two factors' inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_w: Tensor,
        gate_b: Tensor | None,
        up_w: Tensor,
        up_b: Tensor | None,
        w: Tensor,
        b: Tensor | None,
        act: Act,
    ) -> Tensor:
        gate, up = F.linear(x, gate_w, gate_b).flatten(0, -2), F.linear(x, up_w, up_b).flatten(0, -2)
        out = gate.new_empty(len(gate), len(w))
        for part in _stretches(gate):
            _product(act.gated(gate[part], up[part]), w, b, out[part])
        trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.act, ctx.shape = act, x.shape
        ctx.save_for_backward(x if trains else None, gate_w, up_w, w, gate, up)
        return out.view(*x.shape[:-1], len(w))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_w, up_w, w, gate, up = ctx.saved_tensors
        wants = ctx.needs_input_grad
        d_out = d_out.reshape(-1, d_out.shape[-1])
        flat = None if x is None else x.reshape(-1, x.shape[-1])
        d_x = gate.new_empty(len(gate), up_w.shape[1]) if wants[0] else None
        grads: list[Tensor | None] = [
            None
        ] * 5  # of the two matrices and their biases, and of the last matrix
        for part in _stretches(gate):
            if wants[5]:
                grads[4] = _sum_into(grads[4], d_out[part], ctx.act.gated(gate[part], up[part]))
            both = ctx.act.gated_back_(d_out[part] @ w, gate[part], up[part])
            for n, d_inner in enumerate(both):
                if flat is not None and wants[1 + 2 * n]:
                    grads[2 * n] = _sum_into(grads[2 * n], d_inner, flat[part])
                if wants[2 + 2 * n]:
                    before, here = grads[2 * n + 1], d_inner.sum(0)
                    grads[2 * n + 1] = here if before is None else before + here
            if d_x is not None:
                torch.mm(both[0], gate_w, out=d_x[part]).addmm_(both[1], up_w)
        d_b = d_out.sum(0) if wants[6] else None
        return None if d_x is None else d_x.view(ctx.shape), *grads, d_b, None
