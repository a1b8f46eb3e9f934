"""Attention of a block as one node of the graph: projections, rotation, and each document to itself.

One gradient of the input, no halves glued together, and what the backward pass needs is kept once. It takes
the place of a family's attention where the whole model then still agrees; layers with an adapter or of few
bits are called as they are, between the parts that are ours.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymodal.train import kernels, packed
from tinymodal.train.feed_forward import is_plain

# Shapes: M positions, D width, A heads, G heads of keys, H width of a head, h part of it that turns.


@dataclasses.dataclass(frozen=True)
class _Heads:
    """What an attention is made of, beside its matrices."""

    out: str
    norms: tuple[str, str] | None
    """Of queries and keys."""
    told: packed.Told


def find_attention(module: Any, told: packed.Told) -> Callable[..., Any] | None:
    """A forward for an attention of a known build; None for others. Whether it agrees is still to be seen."""
    heads = _heads(module, told)
    return None if heads is None else partial(_attention, heads=heads)


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
    loops = kernels.fit(x, cos, sin)
    alike = (*x.shape[:-2], 1) == cos.shape[:-1] and cos.shape == sin.shape and cos.shape[-1] <= x.shape[-1]
    if loops is not None and alike:
        return loops.turn_(x.view(-1, *x.shape[-2:]), cos.flatten(0, -2), sin.flatten(0, -2), back).view_as(x)
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


def _runs(lengths: Sequence[int]) -> list[tuple[slice, int]]:
    """Stretches of documents that are equally long, and how long each of them is."""
    runs, start = [], 0
    for length, same in itertools.groupby(lengths):
        end = start + length * len(list(same))
        runs.append((slice(start, end), length))
        start = end
    return runs


def _each(at: slice, length: int, *whole: Tensor) -> Iterator[Tensor]:
    """Of [M, A, H] a run of documents, as attention wants them: [documents, A, length, H]."""
    return (t[at].unflatten(0, (-1, length)).transpose(1, 2) for t in whole)


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
        outs, sums = [], []
        runs = _runs(lengths)
        for at, length in runs:
            out, log_sum = FLASH(*_each(at, length, q, k, v), 0.0, length > 1, scale=scaling)  # type: ignore[misc]
            outs.append(out.transpose(1, 2).flatten(0, 1))
            sums.append(log_sum)
        out_MAH = outs[0] if len(outs) == 1 else torch.cat(outs)
        trains = any(ctx.needs_input_grad[1:7])
        ctx.save_for_backward(x_MD if trains else None, w_q, w_k, w_v, cos, sin, q, k, v, out_MAH, *sums)
        ctx.runs, ctx.scaling = runs, scaling
        return out_MAH.flatten(1).unsqueeze(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, w_q, w_k, w_v, cos, sin, q, k, v, out_MAH, *sums = ctx.saved_tensors
        wants = ctx.needs_input_grad
        d_MAH = d_out[0].view_as(out_MAH)
        parts: list[Any] = []
        for (at, length), log_sum in zip(ctx.runs, sums, strict=True):
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *_each(at, length, d_MAH, q, k, v, out_MAH), log_sum, 0.0, length > 1, scale=ctx.scaling
            )
            parts.append([part.transpose(1, 2).flatten(0, 1) for part in found])
        grads = parts[0] if len(parts) == 1 else [torch.cat(each) for each in zip(*parts, strict=True)]
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
