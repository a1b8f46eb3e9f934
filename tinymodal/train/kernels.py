"""Chains of operators over numbers as one loop each: C, compiled on the spot where there is a compiler.

A chain of torch's operators over a wide tensor reads and writes it once for each of them; in one loop it is
read and written once, and the exponential in it is as exact and costs half. For float32 on a CPU. ``cc``
takes less than a second for this page; without it everything is done as torch does it, see :func:`load`.

Nanoseconds a number, one core, torch and here: gelu's tanh form 3.9 and 0.9, its gradient 3.9 and 1.2; gate
times up 1.5 and 1.1; an RMS norm 0.9 and 0.3; rotation 1.1 and 0.2.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Numbers are cut into blocks of this many, so that their sums of rounding do not depend on the threads. */
enum { BLOCK = 4096 };
#define BLOCKS(n) (((n) + BLOCK - 1) / BLOCK)
#define EACH_BLOCK _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")
#define EACH_LANE _Pragma("omp simd")

/* e^x = 2^n e^r with |r| <= ln(2) / 2, e^r by its series: 2e-7 apart at most. NaN stays NaN. */
static inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504089f);
    float r = x - n * 0.693359375f; /* ln(2) in two parts, the first of few bits */
    r = r + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float two_n;
    memcpy(&two_n, &bits, sizeof two_n);
    return p * two_n;
}

/* Sigmoid of x (a + b x^2). */
static inline float gate_of(float x, float a, float b) {
    return 1.0f / (1.0f + exponential(-x * (a + b * x * x)));
}

static inline float slope_of(float x, float s, float a, float b) {
    return s + x * s * (1.0f - s) * (a + 3.0f * b * x * x);
}

void act(const float *h, float *out, int64_t n, float a, float b, int threads) {
    EACH_BLOCK
    for (int64_t block = 0; block < BLOCKS(n); block++) {
        int64_t end = (block + 1) * BLOCK < n ? (block + 1) * BLOCK : n;
        EACH_LANE
        for (int64_t i = block * BLOCK; i < end; i++) out[i] = h[i] * gate_of(h[i], a, b);
    }
}

void act_back(const float *d_out, const float *h, float *out, int64_t n, float a, float b, int threads) {
    EACH_BLOCK
    for (int64_t block = 0; block < BLOCKS(n); block++) {
        int64_t end = (block + 1) * BLOCK < n ? (block + 1) * BLOCK : n;
        EACH_LANE
        for (int64_t i = block * BLOCK; i < end; i++)
            out[i] = d_out[i] * slope_of(h[i], gate_of(h[i], a, b), a, b);
    }
}

void gated(const float *g, const float *u, float *out, int64_t n, float a, float b, int threads) {
    EACH_BLOCK
    for (int64_t block = 0; block < BLOCKS(n); block++) {
        int64_t end = (block + 1) * BLOCK < n ? (block + 1) * BLOCK : n;
        EACH_LANE
        for (int64_t i = block * BLOCK; i < end; i++) out[i] = g[i] * gate_of(g[i], a, b) * u[i];
    }
}

/* d_gate may be d_out. */
void gated_back(const float *d_out, const float *g, const float *u, float *d_gate, float *d_up, int64_t n,
                float a, float b, int threads) {
    EACH_BLOCK
    for (int64_t block = 0; block < BLOCKS(n); block++) {
        int64_t end = (block + 1) * BLOCK < n ? (block + 1) * BLOCK : n;
        EACH_LANE
        for (int64_t i = block * BLOCK; i < end; i++) {
            float d = d_out[i], s = gate_of(g[i], a, b);
            d_up[i] = d * (g[i] * s);
            d_gate[i] = d * u[i] * slope_of(g[i], s, a, b);
        }
    }
}

void rms_norm(const float *x, const float *weight, float *out, float *scale, int64_t rows, int64_t width,
              float eps, int threads) {
    EACH_BLOCK
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * width;
        float *to = out + row * width, sum = 0.0f;
        _Pragma("omp simd reduction(+ : sum)")
        for (int64_t i = 0; i < width; i++) sum += from[i] * from[i];
        float s = scale[row] = 1.0f / sqrtf(sum / width + eps);
        EACH_LANE
        for (int64_t i = 0; i < width; i++) to[i] = from[i] * s * weight[i];
    }
}

void rms_norm_back(const float *d_out, const float *x, const float *weight, const float *scale, float *d_x,
                   int64_t rows, int64_t width, int threads) {
    EACH_BLOCK
    for (int64_t row = 0; row < rows; row++) {
        const float *d = d_out + row * width, *from = x + row * width;
        float *to = d_x + row * width, along = 0.0f, s = scale[row];
        _Pragma("omp simd reduction(+ : along)")
        for (int64_t i = 0; i < width; i++) along += d[i] * weight[i] * from[i];
        along = along * s * s * s / width;
        EACH_LANE
        for (int64_t i = 0; i < width; i++) to[i] = d[i] * weight[i] * s - from[i] * along;
    }
}

/* Heads of `width` numbers, of which the first 2 `half` turn, half against half; in place. */
void turn(float *x, const float *cosine, const float *sine, int64_t positions, int64_t heads, int64_t width,
          int64_t half, int back, int threads) {
    EACH_BLOCK
    for (int64_t at = 0; at < positions; at++) {
        const float *c = cosine + at * 2 * half, *s = sine + at * 2 * half;
        for (int64_t head = 0; head < heads; head++) {
            float *one = x + (at * heads + head) * width, *two = one + half;
            if (back) {
                EACH_LANE
                for (int64_t i = 0; i < half; i++) {
                    float p = one[i], q = two[i];
                    one[i] = p * c[i] + q * s[i + half];
                    two[i] = q * c[i + half] - p * s[i];
                }
            } else {
                EACH_LANE
                for (int64_t i = 0; i < half; i++) {
                    float p = one[i], q = two[i];
                    one[i] = p * c[i] - q * s[i];
                    two[i] = q * c[i + half] + p * s[i + half];
                }
            }
        }
    }
}
"""
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
AGREES = 1e-5
"""Largest difference from torch's own, relative to the largest, that is rounding."""
FEW = 1 << 14
"""Numbers for which a second thread is not worth waking."""


class Kernels:
    """The compiled loops. All tensors are float32, on the CPU and in one piece, see :func:`fit`."""

    def __init__(self, library: Any) -> None:
        self._library = library
        place, count, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
        takes: dict[str, list[Any]] = {
            "act": [place] * 2 + [count] + [number] * 2,
            "act_back": [place] * 3 + [count] + [number] * 2,
            "gated": [place] * 3 + [count] + [number] * 2,
            "gated_back": [place] * 5 + [count] + [number] * 2,
            "rms_norm": [place] * 4 + [count] * 2 + [number],
            "rms_norm_back": [place] * 5 + [count] * 2,
            "turn": [place] * 3 + [count] * 4 + [threads],
        }
        for name, kinds in takes.items():
            function = getattr(library, name)
            function.argtypes, function.restype = [*kinds, threads], None

    def act(self, h: Tensor, a: float, b: float) -> Tensor:
        """``h * sigmoid(h * (a + b * h^2))``, a new tensor."""
        out = torch.empty_like(h)
        n = h.numel()
        self._library.act(h.data_ptr(), out.data_ptr(), n, a, b, _threads(n))
        return out

    def act_back(self, d_out: Tensor, h: Tensor, a: float, b: float) -> Tensor:
        """Its gradient in ``h``, a new tensor."""
        n, out = h.numel(), torch.empty_like(h)
        self._library.act_back(d_out.data_ptr(), h.data_ptr(), out.data_ptr(), n, a, b, _threads(n))
        return out

    def gated(self, gate: Tensor, up: Tensor, a: float, b: float) -> Tensor:
        """``act(gate) * up``, a new tensor."""
        out = torch.empty_like(gate)
        n = gate.numel()
        self._library.gated(gate.data_ptr(), up.data_ptr(), out.data_ptr(), n, a, b, _threads(n))
        return out

    def gated_back_(
        self, d_out: Tensor, gate: Tensor, up: Tensor, a: float, b: float
    ) -> tuple[Tensor, Tensor]:
        """Gradients of gate, written over ``d_out``, and of up, a new tensor."""
        d_up = torch.empty_like(d_out)
        n, to = gate.numel(), d_out.data_ptr()
        self._library.gated_back(
            to, gate.data_ptr(), up.data_ptr(), to, d_up.data_ptr(), n, a, b, _threads(n)
        )
        return d_out, d_up

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """``x / sqrt(mean(x^2) + eps) * weight``, and what each row was multiplied by, [..., 1]."""
        out, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
        places = (t.data_ptr() for t in (x, weight, out, scale))
        self._library.rms_norm(*places, scale.numel(), x.shape[-1], eps, _threads(x.numel()))
        return out, scale

    def rms_norm_back(self, d_out: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Its gradient in ``x``, a new tensor."""
        d_x = torch.empty_like(x)
        places = (t.data_ptr() for t in (d_out, x, weight, scale, d_x))
        self._library.rms_norm_back(*places, scale.numel(), x.shape[-1], _threads(x.numel()))
        return d_x

    def turn_(self, x_MAH: Tensor, cos_Mh: Tensor, sin_Mh: Tensor, back: bool) -> Tensor:
        """Rotate the first h of each head's H numbers, half against half, in place; or a gradient back."""
        positions, heads, width = x_MAH.shape
        places = (t.data_ptr() for t in (x_MAH, cos_Mh, sin_Mh))
        half = cos_Mh.shape[-1] // 2
        self._library.turn(*places, positions, heads, width, half, back, _threads(x_MAH.numel()))
        return x_MAH


def fit(*tensors: Tensor) -> Kernels | None:
    """The loops, if they are there and made for such tensors."""
    for t in tensors:
        # A class of its own has no numbers at its place: made up ones, those of other ranks.
        if (
            t.dtype != torch.float32
            or t.device.type != "cpu"
            or type(t) not in KINDS
            or not t.is_contiguous()
        ):
            return None
    return load()[0]


KINDS = (Tensor, torch.nn.Parameter)


def _threads(n: int) -> int:
    return torch.get_num_threads() if n >= FEW else 1


@lru_cache(maxsize=1)
def load() -> tuple[Kernels | None, str]:
    """Compile the loops and try them; once a process.

    Returns:
        The loops, or None and why not, in a few words.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        return None, "no C compiler"
    try:
        with tempfile.TemporaryDirectory() as folder:
            source, made = Path(folder) / "kernels.c", Path(folder) / "kernels.so"
            source.write_text(SOURCE, encoding="utf-8")
            command = [*compiler.split(), *FLAGS, "-o", str(made), str(source), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            kernels = Kernels(ctypes.CDLL(str(made)))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no word of it"]
        return None, f"{compiler} cannot make them: {lines[0]}"
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return None, f"{type(error).__name__}: {error}"
    # Whoever asks first may stand in a mode whose tensors have no numbers, or no gradients.
    with _disable_current_modes(), torch.inference_mode(False):
        wrong = [name for name, agrees in _tried(kernels).items() if not agrees]
    return (None, f"{', '.join(wrong)} differ from torch's") if wrong else (kernels, "")


def _tried(kernels: Kernels) -> dict[str, bool]:
    """Whether each gives what torch gives, on random numbers of several sizes."""
    rng = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device="cpu", dtype=torch.float32)

    h, up, d = (3 * random(7, 1203) for _ in range(3))
    weight, cos, sin = random(1203), random(7, 32), random(7, 32)
    agrees = {}
    with torch.enable_grad():
        for name, (a, b) in SIGMOIDS.items():
            x, y = h.clone().requires_grad_(), up.clone().requires_grad_()
            acted = x * torch.sigmoid(x * (a + b * x * x))
            grads = torch.autograd.grad((acted * y * d).sum(), (x, y))
            (alone,) = torch.autograd.grad((x * torch.sigmoid(x * (a + b * x * x)) * d).sum(), x)
            agrees[name] = (
                _near(kernels.act(h, a, b), acted)
                and _near(kernels.act_back(d, h, a, b), alone)
                and _near(kernels.gated(h, up, a, b), acted * y)
                and all(map(_near, kernels.gated_back_(d.clone(), h, up, a, b), grads))
            )
        x = h.clone().requires_grad_()
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
        (slope,) = torch.autograd.grad((normed * d).sum(), x)
    out, scale = kernels.rms_norm(h, weight, 1e-6)
    agrees["norm"] = _near(out, normed) and _near(kernels.rms_norm_back(d, h, weight, scale), slope)
    heads = random(7, 3, 40).requires_grad_()
    with torch.enable_grad():
        one, two = heads[..., :16], heads[..., 16:32]
        halves = torch.cat((-two, one), -1)
        turned = torch.cat((heads[..., :32] * cos[:, None] + halves * sin[:, None], heads[..., 32:]), -1)
        d_out = random(7, 3, 40)
        (slope,) = torch.autograd.grad((turned * d_out).sum(), heads)
    own: Callable[..., Tensor] = kernels.turn_
    agrees["turn"] = _near(own(heads.detach().clone(), cos, sin, False), turned) and _near(
        own(d_out.clone(), cos, sin, True), slope
    )
    return agrees


ROOT = 1.5957691216057308  # 2 * sqrt(2 / pi)
SIGMOIDS = {"gelu_tanh": (ROOT, ROOT * 0.044715), "quick_gelu": (1.702, 0.0), "silu": (1.0, 0.0)}
"""Activations that are ``h * sigmoid(h * (a + b * h^2))``: a and b."""


def _near(one: Tensor, two: Tensor) -> bool:
    return bool((one - two).abs().max() <= AGREES * two.abs().max())
