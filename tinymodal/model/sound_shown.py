"""What the small codec's encoder is shown of a sound: log-mel bands, and how periodic it is at each pitch.

Shapes: N clips, n samples, S steps (one for each ``hop`` samples), W window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

PITCH_WINDOW = 1024
"""Samples the pitch is looked for in: four periods of 60 Hz."""

PITCH_HZ = 1000.0
"""Up to where the pitch is looked for; what is higher fades out over as much again."""

PITCH_SHARE = 3.0
"""What an octave counts beside the bands, of which 40 dB count 1; quantizing spends its bits accordingly."""

FLOOR = 1e-3
"""Least loudness of a band, about 60 dB below full scale: what is quieter is silence."""


class Analysis(nn.Module):
    """What the encoder is shown of each step: log-mel bands, how voiced it is, and the pitch where it is.

    The pitch is where the autocorrelation of a windowed stretch, divided by that of the window, is greatest
    (Boersma 1993); how great it is there, 1 for a perfect period, is how voiced. Nothing in here trains.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.hop, self.rate_hz, bands = config["hop"], config["rate_hz"], config["bands"]
        self.width = bands + 2
        self.mel = LogMel(bands, self.rate_hz, 4 * self.hop, self.hop)
        self.min_hz, self.max_hz = config["min_hz"], config["max_hz"]
        self.middle_hz = math.sqrt(self.min_hz * self.max_hz)
        window = torch.hann_window(PITCH_WINDOW)
        spectrum = torch.fft.rfft(window, 2 * PITCH_WINDOW).abs().square()
        own = torch.fft.irfft(spectrum)[: PITCH_WINDOW // 2]
        hz = torch.linspace(0, self.rate_hz / 2, PITCH_WINDOW + 1)
        low = (0.5 * math.pi * (hz / PITCH_HZ - 1).clamp(0, 1)).cos().square()
        self.window: Tensor
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("own", own / own[0], persistent=False)
        self.register_buffer("low", low, persistent=False)

    def forward(self, wave_Nn: Tensor) -> Tensor:
        """[N, n], n in whole steps -> [N, bands + 2, S]."""
        return self.taught(wave_Nn)[0]

    def taught(self, wave_Nn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`forward` and :meth:`pitch` give, in one go."""
        hz_NS, sure_NS = self.pitch(wave_Nn)
        octaves_NS = (hz_NS / self.middle_hz).log2() * sure_NS
        shown = torch.cat([self.mel(wave_Nn), torch.stack([sure_NS, PITCH_SHARE * octaves_NS], 1)], 1)
        return shown, hz_NS, sure_NS

    def periodicity(self, wave_Nn: Tensor) -> Tensor:
        """[N, n] -> [N, S, lags in samples], 1 at lag 0; 0 in silence."""
        x_NSW = centred(wave_Nn, PITCH_WINDOW, self.hop)
        x_NSW = (x_NSW - x_NSW.mean(-1, keepdim=True)) * self.window
        # Only what is low: sharp pulses whose period is no whole number of samples fit thrice it better.
        spectrum = torch.fft.rfft(x_NSW, 2 * PITCH_WINDOW).abs().square() * self.low
        found = torch.fft.irfft(spectrum)[..., : PITCH_WINDOW // 2] / self.own
        return found / (found[..., :1] + 1e-4)

    def pitch(self, wave_Nn: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder is taught to say of the pitch.

        Returns:
            Hz [N, S], between ``min_hz`` and ``max_hz`` also where nothing is voiced, and in [0, 1] how
            periodic the sound is there.
        """
        found_NSl = self.periodicity(wave_Nn)
        first, end = int(self.rate_hz / self.max_hz), math.ceil(self.rate_hz / self.min_hz)
        lags = torch.arange(first, end + 1, device=found_NSl.device)
        # Twice the period fits as well as the period; a little is taken off for each octave down.
        worth = found_NSl[..., first : end + 1] - 0.03 * torch.log2(lags / first)
        best = worth.argmax(-1).add(first)
        left, middle, right = (found_NSl.gather(2, (best + k)[..., None])[..., 0] for k in (-1, 0, 1))
        # The top of the parabola through the greatest and its neighbours.
        off = (left - right) / (2 * (left - 2 * middle + right)).clamp_max(-1e-6)
        hz = self.rate_hz / (best + off.clamp(-0.5, 0.5))
        hz = middle_of_five(hz).clamp(self.min_hz, self.max_hz)
        return hz, middle.clamp(0, 1)


def middle_of_five(x_NS: Tensor) -> Tensor:
    """The median of each step and two on either side: single octave errors vanish."""
    return F.pad(x_NS[:, None], (2, 2), "replicate")[:, 0].unfold(1, 5, 1).median(-1).values


def centred(wave_Nn: Tensor, window: int, hop: int) -> Tensor:
    """[N, n] -> [N, n / hop, window]: stretches around the middle of each step, zeros beyond the ends."""
    left = (window - hop) // 2
    return F.pad(wave_Nn, (left, window - hop - left)).unfold(1, window, hop)


class LogMel(nn.Module):
    """log10 of mel bands, -0.5 in silence and about 0.9 at its loudest."""

    def __init__(self, bands: int, rate_hz: int, window: int, hop: int) -> None:
        super().__init__()
        self.size, self.hop = window, hop
        mels = mel_filter_bank(window // 2 + 1, bands, 0.0, rate_hz / 2, rate_hz, "slaney", "slaney")
        self.window: Tensor
        self.mels: Tensor
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        self.register_buffer("mels", torch.from_numpy(mels.astype(np.float32)), persistent=False)

    def forward(self, wave_Nn: Tensor) -> Tensor:
        """[N, n], n in whole steps -> [N, bands, S]."""
        spectrum = torch.fft.rfft(centred(wave_Nn, self.size, self.hop) * self.window).abs()
        return ((spectrum @ self.mels).clamp_min(FLOOR).log10() + 2).div(2).transpose(1, 2)
