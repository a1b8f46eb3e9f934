"""A voice of pulses and noise, shaped in the frequency domain: the end of the small codec's decoder.

The neural source-filter model (arXiv:1904.12088) with the head of Vocos (arXiv:2306.00814): what is said of
each step is how loud pulses and noise are in each mel band, and the pitch; an inverse STFT makes it a sound.
Nothing in here trains.

Shapes: N clips, n samples, S steps (one for each ``hop`` samples), W window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

from .streams import Pipe

OVERLAP = 3
"""Windows of the inverse STFT over each sample; of a squared Hann window three add up to a constant."""


class Said(NamedTuple):
    """What is said of each step."""

    pulses: Tensor
    """[N, S, bands], log of how loud the pulses are"""
    noise: Tensor
    """[N, S, bands], log of how loud the noise is"""
    hz: Tensor
    """[N, S], pitch at the end of the step"""


class Voice(nn.Module):
    """Pulses and noise, as loud at each frequency as it is said: an STFT, a product, an inverse STFT.

    The window of a step reaches as far back as forth, one hop beyond it on either side. The bands said are
    the middles of mel bands, and what lies between them is interpolated.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.rate_hz, self.hop = config["rate_hz"], config["hop"]
        self.size = OVERLAP * self.hop
        self.top_hz = 0.475 * self.rate_hz
        bins = self.size // 2 + 1
        # Triangles that overlap by half add up to 1, but below the first band and above the last.
        spread = mel_filter_bank(bins, config["bands"], 0.0, self.rate_hz / 2, self.rate_hz, None, "slaney").T
        tops = spread.argmax(1)
        spread[0, : tops[0]], spread[-1, tops[-1] :] = 1, 1
        spread = (spread / spread.sum(0)).astype(np.float32)
        self.register_buffer("spread", torch.from_numpy(spread), persistent=False)
        # Squared, it is a Hann window to the power of two, of which three add up to 9 / 8.
        window = torch.hann_window(self.size) / math.sqrt(9 / 8)
        self.register_buffer("window", window, persistent=False)
        self.spread: Tensor
        self.window: Tensor

    def forward(self, said: Said, turns_N: Tensor | None = None, first: int = 0) -> Tensor:
        """What is said -> float32 [N, S * hop].

        ``turns_N`` and ``first`` are the phase, in turns, and the number of the sample that it begins with.
        """
        turns_N = torch.zeros_like(said.hz[:, 0]) if turns_N is None else turns_N
        source, _ = self.source(said.hz, said.hz[:, :1], turns_N.double(), first)
        before = self.size - self.hop
        laid_Nn = overlap_add(self.filtered(said, F.pad(source, (before, 0))), self.hop)
        return laid_Nn[:, self.late : self.late + said.hz.shape[1] * self.hop]

    def ends(self, middle_NS: Tensor) -> Tensor:
        """Pitch in the middle of each step as it sounds -> at the end of each step of the source.

        That is heard a step and a half later: half a step on, and the source runs ahead by ``late``.
        """
        later = F.pad(middle_NS[:, None], (0, 2), "replicate")[:, 0]
        return (later[:, 1:-1] * later[:, 2:]).sqrt()

    @property
    def late(self) -> int:
        """Samples between the beginning of the first window and that of the sound."""
        return (self.size - self.hop) // 2

    def source(self, hz_NS: Tensor, before_N1: Tensor, turns_N: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The sound before it is shaped.

        Args:
            hz_NS: pitch at the end of each step.
            before_N1: at the beginning of the first.
            turns_N: float64, the phase there, in turns.
            first: number of the first sample since the sound began.

        Returns:
            Pulses and noise, float32 [2 N, S * hop], pulses first; and the phase at the end.
        """
        rise = torch.arange(1, self.hop + 1, device=hz_NS.device, dtype=torch.float64) / self.hop
        hz_NS, start_NS = hz_NS.double(), torch.cat([before_N1, hz_NS[:, :-1]], 1).double()
        hz_Nn = (start_NS[..., None] + (hz_NS - start_NS)[..., None] * rise).flatten(1)
        turns_Nn = turns_N[:, None] + (hz_Nn / self.rate_hz).cumsum(1)
        pulses = harmonics(turns_Nn.remainder(1), self.top_hz / hz_Nn)
        # Equally loud at any pitch.
        pulses = (pulses * (hz_Nn * (2 / self.top_hz)).sqrt()).float()
        number = torch.arange(first, first + hz_Nn.shape[1], device=hz_NS.device)
        noise = white(number).float().expand_as(pulses)
        return torch.cat([pulses, noise]), turns_Nn[:, -1].remainder(1)

    def filtered(self, said: Said, source: Tensor) -> Tensor:
        """Source [2 N, before + S * hop] -> windows to be laid over each other, [N, S, W]."""
        spectra = torch.fft.rfft(source.unfold(1, self.size, self.hop) * self.window)
        pulses_NSw, noise_NSw = spectra.chunk(2)
        loud_NSw = (said.pulses.float().clamp(-12, 6) @ self.spread).exp()
        hiss_NSw = (said.noise.float().clamp(-12, 6) @ self.spread).exp()
        return torch.fft.irfft(pulses_NSw * loud_NSw + noise_NSw * hiss_NSw, self.size) * self.window


class VoicePipe(Pipe):
    """The voice in pieces: rows [1, C, S] -> [1, 1, n].

    Args:
        voice: makes the sound.
        read: rows -> what is said.
        device: of what comes.
    """

    def __init__(self, voice: Voice, read: Callable[[Tensor], Said], device: torch.device) -> None:
        self.voice, self.read = voice, read
        self.hz: Tensor | None = None
        self.turns = torch.zeros(1, dtype=torch.float64, device=device)
        self.samples = 0
        before = voice.size - voice.hop
        self.source = torch.zeros(2, before, device=device)
        self.tail = torch.zeros(1, before, device=device)
        self.skip = voice.late

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        before = self.voice.size - self.voice.hop
        out = self.tail[:, :0]
        if x.shape[2]:
            said = self.read(x)
            start = said.hz[:, :1] if self.hz is None else self.hz
            new, self.turns = self.voice.source(said.hz, start, self.turns, self.samples)
            self.hz, self.samples = said.hz[:, -1:], self.samples + new.shape[1]
            source = torch.cat([self.source, new], 1)
            self.source = source[:, source.shape[1] - before :]
            laid = overlap_add(self.voice.filtered(said, source), self.voice.hop)
            laid[:, :before] += self.tail
            out, self.tail = laid[:, :-before], laid[:, -before:]
        if last and self.samples:
            out = torch.cat([out, self.tail[:, : self.voice.late]], 1)
        skipped = min(self.skip, out.shape[1])
        self.skip -= skipped
        return out[:, skipped:][:, None]


def overlap_add(frames_NSW: Tensor, hop: int) -> Tensor:
    """[N, S, W] -> [N, W - hop + S * hop], each window a hop behind the one before."""
    parts = frames_NSW.unflatten(2, (-1, hop))
    count = parts.shape[2]
    laid = [F.pad(parts[:, :, k].flatten(1), (k * hop, (count - 1 - k) * hop)) for k in range(count)]
    return torch.stack(laid).sum(0)


def harmonics(turns: Tensor, count: Tensor) -> Tensor:
    """Sum of cos(2 pi k turns) for k from 1 to ``count``, of which the last fades in as ``count`` grows.

    In closed form (a Dirichlet kernel), so that its cost does not grow with the number of harmonics.
    """
    whole = count.floor()
    half = torch.sin(math.pi * turns)
    # At a whole turn every cosine is 1.
    near = half.abs() < 1e-6
    kernel = torch.sin((2 * whole + 1) * math.pi * turns) / torch.where(near, 1.0, 2 * half) - 0.5
    last = (count - whole) * torch.cos(2 * math.pi * (whole + 1) * turns)
    return torch.where(near, whole, kernel) + last


def white(number: Tensor) -> Tensor:
    """Noise of unit variance, float64, a function of the sample's number (splitmix64's mixing, in int64)."""
    x = number * -7046029254386353131  # 2**64 over the golden ratio
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    x = x ^ _shifted(x, 31)
    return (x.double() * 2.0**-63) * math.sqrt(3)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros; that of torch repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
