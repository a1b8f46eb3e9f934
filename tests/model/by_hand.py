"""A decoder's arithmetic in float64, one head and one position at a time.

Our own language models are measured against it.
Nothing here is shared with the models: positions turn complex numbers, attention is two loops.
"""

import math

import torch
from torch import Tensor


def rms(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def turn(x_TH: Tensor, first: int, base: float = 10000.0) -> Tensor:
    """The first numbers of a head turned by their position: i with i + first/2 as one complex number."""
    half = first // 2
    pairs = torch.complex(x_TH[:, :half], x_TH[:, half:first])
    speed = base ** (-torch.arange(half, dtype=torch.float64) * 2 / first)
    angle = torch.arange(len(x_TH), dtype=torch.float64)[:, None] * speed
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag, x_TH[:, first:]), dim=1)


def attend(q_TH: Tensor, k_TH: Tensor, v_TH: Tensor) -> Tensor:
    """One head; each position looks at itself and those before."""
    out = torch.empty_like(v_TH)
    for t in range(len(q_TH)):
        scores = k_TH[: t + 1] @ q_TH[t] / math.sqrt(q_TH.shape[1])
        out[t] = scores.softmax(0) @ v_TH[: t + 1]
    return out


def heads(x_TE: Tensor, width: int) -> list[Tensor]:
    return list(x_TE.split(width, dim=1))
