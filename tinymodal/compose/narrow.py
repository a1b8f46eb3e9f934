"""A language model's weights in 8 or 4 bits, for a model that answers and does not train.

8 bits are ours: every row of a matrix as int8 with one scale, its largest number 127. Linear layers, the
token embeddings and the head are stored so; what is computed stays in the model's data type, and inputs are
not rounded. Where the head is the embedding, it stays so. A matrix is widened a stretch at a time while it is
used, never whole. 4 bits are NF4 by bitsandbytes (see ``compose/quantize.py``) for the linear layers, and
ours in 8 bits for embeddings and head, which bitsandbytes does not store.

Towers, connectors, speech head, norms and biases stay as they are.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tinymodal.compose.quantize import quantize
from tinymodal.core.errors import RecipeError

Bits = Literal[4, 8]

STRETCH = 1 << 19
"""Numbers of a matrix that are widened at once: 2 MB in float32, which a core's cache holds."""


class NarrowLinear(nn.Module):
    """A linear layer whose matrix is int8 with a scale for each row."""

    def __init__(self, weight: nn.Parameter, scale: nn.Parameter, bias: Tensor | None) -> None:
        """Take what :func:`rounded` gave; two layers may share it."""
        super().__init__()
        self.weight, self.scale = weight, scale
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = max(1, STRETCH // self.in_features)
        if self.out_features <= rows or x.is_cuda:
            y = F.linear(x, self.weight.to(x.dtype))
        else:
            y = torch.cat([F.linear(x, part.to(x.dtype)) for part in self.weight.split(rows)], -1)
        y = y * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """What printing the model shows."""
        return f"{self.in_features}, {self.out_features}, int8"


class NarrowEmbedding(nn.Module):
    """Embeddings whose rows are int8 with a scale each."""

    def __init__(
        self, weight: nn.Parameter, scale: nn.Parameter, dtype: torch.dtype, factor: float = 1.0
    ) -> None:
        """Take what :func:`rounded` gave.

        Args:
            weight: int8.
            scale: of its rows.
            dtype: of the embeddings.
            factor: by which they are longer than the matrix's rows, as Gemma's are.
        """
        super().__init__()
        self.weight, self.scale, self.dtype, self.factor = weight, scale, dtype, factor
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., D]."""
        rows = F.embedding(ids, self.weight).to(self.dtype)
        return rows * (F.embedding(ids, self.scale[:, None]) * self.factor).to(self.dtype)

    def extra_repr(self) -> str:
        """What printing the model shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, int8"


@torch.no_grad()
def rounded(matrix: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """A matrix [out, in] as int8, and float32 [out] by which each row is to be multiplied."""
    wide = matrix.detach().float()
    scale = wide.abs().amax(1) / 127
    # A row of zeros stays one.
    narrow = (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
    return nn.Parameter(narrow, requires_grad=False), nn.Parameter(scale, requires_grad=False)


def narrow(model: Any, bits: Bits, device: str = "cpu", key: str = "bits") -> None:
    """Store a composed model's language model in fewer bits, in place.

    Args:
        model: composed; on the CPU it may be larger than the memory of ``device``.
        bits: 8 or 4.
        device: where it will answer; layers of 4 bits go there at once, the rest stays where it is.
        key: what named the number, for the error.

    Raises:
        RecipeError: another number of bits; 4 without bitsandbytes; embeddings that do more than look up.
    """
    if bits not in (4, 8):
        raise RecipeError(f"{key} {bits}: a language model is stored in 8 or in 4 bits, or as it is without")
    decoder, embedding, head = model.model.language_model, model.get_input_embeddings(), model.lm_head
    if isinstance(embedding, NarrowEmbedding):
        raise RecipeError(f"{key} {bits}: this model's weights are rounded already; load it anew")
    tied = head.weight is embedding.weight
    if bits == 4:
        quantize(decoder, 4, device, compute=model.dtype)
    else:
        for parent in list(decoder.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear or isinstance(child, Conv1D):
                    parent._modules[name] = _linear(child)
    shared = rounded(embedding.weight)
    model.set_input_embeddings(
        NarrowEmbedding(*shared, embedding.weight.dtype, _factor(embedding, bits, key))
    )
    model.lm_head = NarrowLinear(*shared, head.bias) if tied else _linear(head)


def is_narrow(model: Any) -> bool:
    """Whether :func:`narrow` has changed a model: what it was made from cannot be written any more."""
    return any(isinstance(module, NarrowEmbedding | NarrowLinear) for module in model.modules())


@torch.no_grad()
def _factor(embedding: Any, bits: int, key: str) -> float:
    """By what families multiply the rows they look up."""
    longest = embedding.weight.detach().float().norm(dim=1).argmax()  # rows of padding may be zero
    row = embedding.weight[longest].detach().float()
    found = embedding(longest[None])[0].float()
    factor = float(found @ row / (row @ row).clamp(min=1e-30))
    if not torch.allclose(found, factor * row, rtol=1e-2, atol=1e-6):
        raise RecipeError(
            f"{key} {bits}: {type(embedding).__name__} does more than look a row up; take the option out"
        )
    return 1.0 if type(embedding) is nn.Embedding else factor


def _linear(layer: nn.Module) -> NarrowLinear:
    weight: Any = layer.weight
    bias: Any = layer.bias
    return NarrowLinear(*rounded(weight.T if isinstance(layer, Conv1D) else weight), bias)
