"""The same sums with less work: forwards that training swaps in for a stage, and puts back after it.

Nothing here changes what is computed, and a module is replaced only after it was seen to agree: recognised by
what it is made of, tried on a few random rows, output and gradients both. Parameters, their names and what is
saved stay as they are: only ``forward`` of single modules is another, until :meth:`Lean.restore`.

==========================  ==========================================================================
attention                   documents one by one, the last block at targets only: :mod:`packed`
projections and rotation    one node: one gradient of the input, no halves glued together
feed-forward                keeps what went into the activation and nothing else that is wide
RMS norm                    keeps its input and one number a position
activation                  gelu's tanh form by a sigmoid, which it is equal to
==========================  ==========================================================================

Layers with an adapter or of few bits are called as they are, between the parts that are ours.

CPU seconds of a step without one of them, measured as in :mod:`packed` (Phi-2 and captions; Qwen2.5-0.5B and
mixed lengths): feed-forward 1.12; 0.99, where it saves memory alone. Attention 1.01; 1.05. Norms 1.03 in the
second. What is left is products at the speed of the core: two thirds of a step and more.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymodal.compose.quantize import is_quantized
from tinymodal.train import packed
from tinymodal.train.groups import is_norm

if TYPE_CHECKING:
    from tinymodal.train.objective import Objective

# Shapes: M positions, D width, W width inside a feed-forward, A heads, G heads of keys, H width of a head, h
# part of it that turns.

AGREES, AGREES_ROUNDED = 3e-5, 3e-2
"""Largest difference of a module's output or gradient, relative to the largest; the second where products are
rounded to 16 bits or fewer. Rounding of float32 makes 1e-6 at most: a run that goes on decides as it did."""


class Lean:
    """What was replaced in a model, until :meth:`restore`. Use it as a context, or call that."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.counts: dict[str, int] = {}
        """How many modules of each kind have another forward."""
        self._replaced: list[nn.Module] = []
        self._packing: packed.Packing | None = None

    @property
    def lines(self) -> list[str]:
        """What is on and what is not, in words."""
        on = self.objective.packing
        said = []
        if on is not None:
            said.append("documents one by one" if on.by_document else "documents by a mask")
            if on.why:
                said[-1] += f" ({on.why})"
            if on.pruned:
                said.append("last block at targets")
        return said + [f"{number} {kind}" for kind, number in self.counts.items()]

    def replace(self, module: nn.Module, kind: str, forward: Callable[..., Any]) -> None:
        """Let ``forward(module, ...)`` stand for the module's own."""
        module.forward = MethodType(forward, module)  # type: ignore[assignment]
        self._replaced.append(module)
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def take_back(self, module: nn.Module, kind: str) -> None:
        """The module's own forward again."""
        module.__dict__.pop("forward", None)
        self._replaced.remove(module)
        self.counts[kind] -= 1
        if not self.counts[kind]:
            del self.counts[kind]

    def restore(self) -> None:
        """The model as it was. May be called twice."""
        for module in self._replaced:
            module.__dict__.pop("forward", None)
        self._replaced, self.counts = [], {}
        if self._packing is not None:
            self._packing.undo()
            self._packing = self.objective.packing = None

    def __enter__(self) -> Lean:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def lean(objective: Objective, enabled: bool = True) -> Lean:
    """Swap in what is faster and equal, all over ``objective``'s model.

    Call it when the model is on its device, adapters and few bits in place, before it is cut up among
    processes. Random states do not move, and nothing depends on what was trained before.

    Args:
        objective: changed in place until :meth:`Lean.restore`.
        enabled: False: change nothing; for comparisons. Nor is anything changed a second time.
    """
    made = Lean(objective)
    if not enabled or objective.packing is not None:
        return made
    model: Any = objective.model
    seen: dict[Any, Callable[..., Any] | None] = {}
    for module in list(model.modules()):
        if "forward" in module.__dict__:
            continue
        for kind, find in (("norms", _norm), ("feed-forwards", _feed_forward)):
            key = kind, type(module), _make(module)
            if key not in seen:
                seen[key] = find(module)
            forward = seen[key]
            if forward is not None:
                made.replace(module, kind, forward)
                break
    language_model = model.model.language_model
    made._packing = objective.packing = packed.packing(language_model)
    if objective.packing.by_document:
        _lean_attention(made, objective.packing)
    return made


def _make(module: nn.Module) -> tuple[Any, ...]:
    """What must be equal in two modules of a class for one to speak for the other."""
    parts = tuple((name, type(child), _sizes(child)) for name, child in module.named_children())
    plain = tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, (int, float, str, bool))))
    return parts, plain, _sizes(module), next((p.dtype for p in module.parameters()), None)


def _sizes(module: nn.Module) -> tuple[Any, ...]:
    return tuple((name, p.shape, p.requires_grad) for name, p in module.named_parameters(recurse=False))


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


def _norm(module: Any) -> Callable[..., Any] | None:
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
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        # Where the family rounds to 16 bits is its own choice.
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
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (d_out * x).mul_(scale).flatten(0, -2).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        d_x = d_out * weight
        along = torch.linalg.vecdot(d_x, x).unsqueeze(-1).mul_(scale * scale * scale).div_(-x.shape[-1])
        return d_x.mul_(scale).addcmul_(x, along), d_weight, None


# Activations

ROOT = 1.5957691216057308  # 2 * sqrt(2 / pi)
CUBE = ROOT * 0.044715


class Act:
    """An activation with its derivative, by name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, h: Tensor) -> Tensor:
        """A new tensor."""
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
        return act(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        d_up = ctx.act(gate).mul_(d_out)
        return ctx.act.back(d_out * up, gate), d_up, None


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


def _feed_forward(module: nn.Module) -> Callable[..., Any] | None:
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


class _PlainFeedForward(torch.autograd.Function):
    """``act(x @ V.T + a) @ W.T + b``; of what is wide it keeps the activation's input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, a: Tensor | None, w: Tensor, b: Tensor | None, act: Act
    ) -> Tensor:
        h = F.linear(x, v, a)
        ctx.act, ctx.mixed = act, torch.is_autocast_enabled(x.device.type)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, v, h, w)
        return F.linear(act(h), w, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, v, h, w = ctx.saved_tensors  # once: recomputed activations are given out one time
        wants, shape = ctx.needs_input_grad, h.shape[:-1]
        d_out, h = d_out.reshape(-1, d_out.shape[-1]), h.view(-1, h.shape[-1])
        d_w = d_out.T @ ctx.act(h) if wants[3] else None
        d_b = d_out.sum(0) if wants[4] else None
        d_h = ctx.act.back(d_out @ w, h)
        d_v = d_h.T @ x.reshape(-1, x.shape[-1]) if wants[1] else None
        d_a = d_h.sum(0) if wants[2] else None
        d_x = (d_h @ v).view(*shape, v.shape[1]) if wants[0] else None
        return d_x, d_v, d_a, d_w, d_b, None


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
        gate, up = F.linear(x, gate_w, gate_b), F.linear(x, up_w, up_b)
        trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.act = act
        ctx.save_for_backward(x if trains else None, gate_w, up_w, w, gate, up)
        return F.linear(act(gate).mul_(up), w, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_w, up_w, w, gate, up = ctx.saved_tensors
        wants, shape = ctx.needs_input_grad, gate.shape[:-1]
        d_out, gate, up = d_out.reshape(-1, d_out.shape[-1]), gate.flatten(0, -2), up.flatten(0, -2)
        acted = ctx.act(gate)
        d_w = d_out.T @ (acted * up) if wants[5] else None
        d_b = d_out.sum(0) if wants[6] else None
        d_inner = d_out @ w
        d_up = acted.mul_(d_inner)
        d_gate = ctx.act.back(d_inner.mul_(up), gate)
        flat = None if x is None else x.reshape(-1, x.shape[-1])
        d_x = None
        if wants[0]:
            d_x = torch.addmm(d_gate @ gate_w, d_up, up_w).view(*shape, up_w.shape[1])
        return (
            d_x,
            d_gate.T @ flat if wants[1] else None,
            d_gate.sum(0) if wants[2] else None,
            d_up.T @ flat if wants[3] else None,
            d_up.sum(0) if wants[4] else None,
            d_w,
            d_b,
            None,
        )


# Attention


@dataclasses.dataclass(frozen=True)
class _Heads:
    """What an attention is made of, beside its matrices."""

    out: str
    norms: tuple[str, str] | None
    """Of queries and keys."""
    told: packed.Told


def _lean_attention(made: Lean, packing: packed.Packing) -> None:
    """Replace every attention of a known build, where the whole model then still agrees."""
    replaced = []
    for module, told in packing.noted:
        heads = _heads(module, told)
        if heads is not None and "forward" not in module.__dict__:
            made.replace(module, "attentions", partial(_attention, heads=heads))
            replaced.append(module)
    if replaced and not packed.agrees(packing):
        for module in replaced:
            made.take_back(module, "attentions")


def _heads(module: Any, told: packed.Told) -> _Heads | None:
    names = dict(module.named_children())
    out = next((name for name in ("o_proj", "dense", "out_proj") if name in names), None)
    if out is None or not {"q_proj", "k_proj", "v_proj"} <= names.keys():
        return None
    norms = [pair for pair in (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm")) if pair[0] in names]
    rest = names.keys() - {"q_proj", "k_proj", "v_proj", out, *(name for pair in norms for name in pair)}
    dropout = getattr(module, "attention_dropout", 0.0)
    if isinstance(dropout, nn.Dropout):
        dropout = dropout.p
    idle = all(isinstance(names[name], (nn.Dropout, nn.Identity)) for name in rest)
    if not idle or dropout or not isinstance(getattr(module, "head_dim", None), int):
        return None
    return _Heads(out, norms[0] if norms else None, told)


def _attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    *,
    heads: _Heads,
    **kwargs: Any,
) -> Any:
    documents: packed.Documents | None = kwargs.get("documents") or packed.current()
    if documents is None:
        return type(self).forward(
            self,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
    turn = position_embeddings if getattr(self, "use_rope", True) else None
    width, layers, told = self.head_dim, (self.q_proj, self.k_proj, self.v_proj), heads.told
    if heads.norms is None and _whole_on_cpu(hidden_states, layers, documents, told):
        given = [p for layer in layers for p in (layer.weight, layer.bias)]
        cos, sin = (None, None) if turn is None else turn
        out: Tensor = _SelfAttention.apply(  # type: ignore[no-untyped-call]
            hidden_states, *given, cos, sin, documents.lengths, width, told.scaling
        )
        return self.get_submodule(heads.out)(out), None

    def ready(layer: nn.Module, norm: int | None) -> Tensor:
        x: Tensor = layer(hidden_states)
        module: Any = None if norm is None or heads.norms is None else getattr(self, heads.norms[norm])
        weights = 0 if module is None else next(module.parameters()).numel()
        if module is not None and weights == x.shape[-1] != width:
            x = module(x)
        x = x.unflatten(-1, (-1, width))
        if module is not None and (weights == width or weights != x.shape[-2] * width):
            x = module(x)
        if norm is not None and turn is not None:
            x = _turned(x, *turn)
        return x.transpose(1, 2)

    keys = values = hidden_states
    if documents.known is None:
        keys, values = ready(layers[1], 1), ready(layers[2], None)
        if documents.only_keys:
            raise packed.Found(keys, values)
    attended, _ = packed.attend(
        self,
        ready(layers[0], 0),
        keys,
        values,
        None,
        scaling=told.scaling,
        sliding_window=told.window,
        softcap=told.softcap,
        documents=documents,
    )
    return self.get_submodule(heads.out)(attended.flatten(2)), None


def _whole_on_cpu(x: Tensor, layers: Sequence[Any], documents: packed.Documents, told: packed.Told) -> bool:
    """Whether projections and attention of a block can be one node."""
    return (
        x.device.type in ("cpu", "meta")
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and documents.known is None
        and not documents.only_keys
        and told.softcap is None
        and (told.window is None or told.window >= max(documents.lengths))
        and all(is_plain(layer) and layer.weight.dtype == torch.float32 for layer in layers)
        and FLASH is not None
    )


def _turned(x_1MAH: Tensor, cos_1Mh: Tensor, sin_1Mh: Tensor) -> Tensor:
    """Queries or keys, turned by their position; h of the H numbers of a head, half against half."""
    cos, sin = cos_1Mh.unsqueeze(2), sin_1Mh.unsqueeze(2)
    if x_1MAH.dtype == torch.float32 and cos.dtype == torch.float32:
        out: Tensor = _Turn.apply(x_1MAH, cos, sin)  # type: ignore[no-untyped-call]
        return out
    h = cos.shape[-1]
    turning = x_1MAH[..., :h]
    one, two = turning.chunk(2, -1)
    turned = turning * cos + torch.cat((-two, one), -1) * sin
    return turned if h == x_1MAH.shape[-1] else torch.cat((turned, x_1MAH[..., h:].to(turned.dtype)), -1)


def _turn_(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """The same in place; ``back``: the gradient."""
    h = cos.shape[-1] // 2
    one, two = x[..., :h], x[..., h : 2 * h]
    cos1, cos2, sin1, sin2 = cos[..., :h], cos[..., h:], sin[..., :h], sin[..., h:]
    if back:
        kept = one * sin1
        one.mul_(cos1).addcmul_(two, sin2)
        two.mul_(cos2).sub_(kept)
    else:
        kept = one * sin2
        one.mul_(cos1).addcmul_(two, sin1, value=-1)
        two.mul_(cos2).add_(kept)
    return x


class _Turn(torch.autograd.Function):
    """:func:`_turned` as one node that keeps nothing of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn_(x.clone(), cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn_(d_out.clone(), cos, sin, back=True), None, None


FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""What ``scaled_dot_product_attention`` calls on a CPU; called by itself it does not ask for parts to be
glued together. None where torch has no such operator."""


class _SelfAttention(torch.autograd.Function):
    """Projections, rotation and attention of each document to itself; the last matrix is not in it.

    Keeps its input (if the matrices train), queries, keys, values and what comes out, each once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_1MD: Tensor,
        w_q: Tensor,
        b_q: Tensor | None,
        w_k: Tensor,
        b_k: Tensor | None,
        w_v: Tensor,
        b_v: Tensor | None,
        cos_1Mh: Tensor | None,
        sin_1Mh: Tensor | None,
        lengths: tuple[int, ...],
        width: int,
        scaling: float | None,
    ) -> Tensor:
        x_MD = x_1MD[0]
        q, k, v = (
            F.linear(x_MD, w, b).unflatten(-1, (-1, width)) for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v))
        )
        cos = sin = None
        if cos_1Mh is not None and sin_1Mh is not None:
            cos, sin = cos_1Mh[0].unsqueeze(1), sin_1Mh[0].unsqueeze(1)
            _turn_(q, cos, sin)
            _turn_(k, cos, sin)
        out_MAH, sums, start = torch.empty_like(q), [], 0
        for length in lengths:
            at = slice(start, start + length)
            start += length
            parts = [t[at].transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
            out, log_sum = FLASH(*parts, 0.0, length > 1, scale=scaling)  # type: ignore[misc]
            out_MAH[at] = out[0].transpose(0, 1)
            sums.append(log_sum)
        trains = any(ctx.needs_input_grad[1:7])
        ctx.save_for_backward(x_MD if trains else None, w_q, w_k, w_v, cos, sin, q, k, v, out_MAH, *sums)
        ctx.lengths, ctx.scaling = lengths, scaling
        return out_MAH.flatten(1).unsqueeze(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, w_q, w_k, w_v, cos, sin, q, k, v, out_MAH, *sums = ctx.saved_tensors
        wants = ctx.needs_input_grad
        d_MAH = d_out[0].view_as(out_MAH)
        grads = [torch.empty_like(t) for t in (q, k, v)]
        start = 0
        for length, log_sum in zip(ctx.lengths, sums, strict=True):
            at = slice(start, start + length)
            start += length
            parts = [t[at].transpose(0, 1).unsqueeze(0) for t in (d_MAH, q, k, v, out_MAH)]
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *parts, log_sum, 0.0, length > 1, scale=ctx.scaling
            )
            for whole, part in zip(grads, found, strict=True):
                whole[at] = part[0].transpose(0, 1)
        if cos is not None:
            _turn_(grads[0], cos, sin, back=True)
            _turn_(grads[1], cos, sin, back=True)
        flat = [grad.flatten(1) for grad in grads]
        d_x = None
        if wants[0]:
            d_x = flat[0] @ w_q
            d_x.addmm_(flat[1], w_k).addmm_(flat[2], w_v)
            d_x = d_x.unsqueeze(0)
        given: list[Tensor | None] = []
        for n, grad in enumerate(flat):
            given.append(grad.T @ x_MD if wants[1 + 2 * n] else None)
            given.append(grad.sum(0) if wants[2 + 2 * n] else None)
        return (d_x, *given, None, None, None, None, None)


# Memory of the process


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's ``malloc.h``."""


def hold_memory() -> bool:
    """Let this process keep the memory it frees, instead of asking the system for the same pages each step.

    For processes that train on the CPU: no page faults after the first steps (1,500 to 4,500 a step before),
    6 to 13 % of the time of small models. Costs nothing in peak memory.

    Returns:
        Whether the C library could be told.
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False  # not glibc
    most = 1 << 30
    return bool(tell(M_MMAP_THRESHOLD, most)) and bool(tell(M_TRIM_THRESHOLD, most))
