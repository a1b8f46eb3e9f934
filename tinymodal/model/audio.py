"""A sound as the tower wants it: mono, at its rate, cut into windows, as a wave or a log-mel.

Reading and preparing are two steps. :func:`load_sound` (``sound.py``) absorbs what files do to us; a
:class:`Hearing` says how the tower takes a sound, and :meth:`Hearing.prepare` is arithmetic, equal within
1e-5 to transformers' feature extractors of the same samples. Those are not used themselves: they fill every
sound up to 30 s, or mask what they filled.

No masks anywhere. A sound is filled with silence up to a step (``geometry.sound_windows``), windows of one
length go through the tower together, and none depends on another. Loudness and means that a preparation needs
are those of the whole sound, so windows laid end to end are the sound prepared as one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .geometry import sound_windows
from .sound import MAX_S, load_sound

__all__ = ["MAX_S", "Hearing", "load_sound"]

Kind = Literal["log_mel", "wave", "fbank", "clap_mel"]


class Change(Protocol):
    """What augmentation does to a sound, see ``data/augment.py``."""

    def wave(self, samples: Tensor, rate_hz: int) -> Tensor: ...

    def mel(self, mel: Tensor, frames_per_s: float, silence: float) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Hearing:
    """How a sound becomes the tower's input.

    What is left at 0 or empty takes the kind's own default, which is then what the field holds.

    Raises:
        ValueError: for an unknown kind, a number that nothing can be prepared with, or a window shorter than
            a step.
    """

    kind: Kind
    """``log_mel`` is Whisper's, ``wave`` the samples themselves (wav2vec 2.0, HuBERT, WavLM), ``fbank`` the
    Kaldi filter bank of wav2vec2-BERT, ``clap_mel`` the decibels of CLAP."""
    rate_hz: int = 0
    """16,000; ``clap_mel`` 48,000."""
    num_bands: int = 0
    """Mel bands: 80; ``clap_mel`` 64; of a wave 1."""
    hop: int = 0
    """Samples from one frame to the next: 160; ``clap_mel`` 480; of a wave 1."""
    stack: int = 0
    """Frames that stand one above the other as one: ``fbank`` 2, else 1."""
    normalise: bool | None = None
    """Zero mean and unit variance over the sound: of a wave as a whole, of ``fbank`` band by band. On for
    ``fbank``, off for the others unless asked; Whisper and CLAP have none."""
    low_hz: float = -1.0
    """Lower edge of the lowest band; below 0: 0, ``fbank`` 20, ``clap_mel`` 50 as the published CLAPs."""
    high_hz: float = 0.0
    """Upper edge of the highest band: 8,000; ``clap_mel`` 14,000."""
    scale: Literal["", "slaney", "htk", "kaldi"] = ""
    """Of the bands: ``slaney``; ``fbank`` ``kaldi``; the fused CLAP checkpoints have ``htk``."""
    window_s: float = 30.0
    """Longer sounds are cut into windows of so many seconds."""
    step_s: float = 0.5
    """The last window is filled up to a multiple of so many seconds. A tower of one input size has
    ``step_s == window_s``."""
    max_s: float = MAX_S
    """Longer sounds are refused, see :func:`load_sound`."""

    def __post_init__(self) -> None:
        if self.kind not in DEFAULTS:
            raise ValueError(f"unknown kind of hearing {self.kind!r}; known: {', '.join(DEFAULTS)}")
        for left_out in fields(self):
            if left_out.name in DEFAULTS[self.kind] and getattr(self, left_out.name) == left_out.default:
                object.__setattr__(self, left_out.name, DEFAULTS[self.kind][left_out.name])
        if self.scale not in ("slaney", "htk", "kaldi"):
            raise ValueError(f"unknown scale {self.scale!r}; known: slaney, htk, kaldi")
        for name in ("rate_hz", "num_bands", "hop", "stack"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number above 0, got {getattr(self, name)!r}")
        if self.normalise and self.kind not in ("wave", "fbank"):
            raise ValueError(f"normalise is for kinds wave and fbank; this one is {self.kind}")
        if not 0 <= self.low_hz < self.high_hz <= self.rate_hz / 2:
            raise ValueError(
                f"bands from {self.low_hz:g} to {self.high_hz:g} Hz do not lie between 0 and half the rate, "
                f"{self.rate_hz / 2:g} Hz"
            )
        if not (0 < self.step_s <= self.window_s and 0 < self.max_s < math.inf):
            raise ValueError(
                f"step_s must be above 0 and at most window_s, max_s above 0; got step_s {self.step_s:g}, "
                f"window_s {self.window_s:g}, max_s {self.max_s:g}"
            )
        if self.window < self.step:
            raise ValueError(
                f"a window of {self.window_s:g} s is shorter than a step of {self.step / self.rate_hz:g} s, "
                f"which is step_s in whole frames; raise window_s"
            )

    @property
    def bands(self) -> int:
        """Rows of a prepared window: of [bands, frames]; of a wave 1."""
        return self.num_bands * self.stack

    @property
    def frame(self) -> int:
        """Samples from one column of a prepared window to the next; of a wave 1."""
        return self.hop * self.stack

    @property
    def window(self) -> int:
        """Most samples of a window: ``window_s`` in whole frames, a rest left out."""
        return round(self.window_s * self.rate_hz) // self.frame * self.frame

    @property
    def step(self) -> int:
        """Samples of a step: ``step_s`` rounded up to whole frames."""
        return -(-round(self.step_s * self.rate_hz) // self.frame) * self.frame

    def windows(self, num_samples: int) -> list[int]:
        """Samples of each window of a sound, the silence at its end included."""
        return sound_windows(num_samples, self.window, self.step)

    def frames(self, num_samples: int) -> int:
        """Columns of a prepared window of so many samples: frames, or the samples of a wave."""
        return num_samples // self.frame + (self.kind == "clap_mel")

    def prepare(self, wave: Tensor, change: Change | None = None) -> tuple[Tensor, ...]:
        """The windows of a sound, ready for the tower.

        Args:
            wave: float32 [samples] at ``rate_hz``, of :func:`load_sound`.
            change: augmentation: its ``wave`` first, its ``mel`` on what is prepared.

        Returns:
            float32 [bands, frames] each; of a wave [1, samples].

        Raises:
            ValueError: if ``wave`` has no sample or not one dimension.
        """
        if wave.ndim != 1 or not len(wave):
            raise ValueError(f"a sound is samples in one dimension, at least 1; got {list(wave.shape)}")
        if change is not None:
            wave = change.wave(wave, self.rate_hz)
        lengths = self.windows(len(wave))
        if self.kind == "clap_mel":
            pieces = torch.split(wave, self.window)
            values = [self._decibels(piece, size) for piece, size in zip(pieces, lengths, strict=True)]
            return tuple(
                change.mel(mel, self.rate_hz / self.hop, float(mel.min())) if change is not None else mel
                for mel in values
            )
        whole = {"log_mel": self._log_mel, "wave": self._wave, "fbank": self._fbank}[self.kind]
        values_BF, silence = whole(wave, sum(lengths))
        if change is not None:
            values_BF = change.mel(values_BF, self.rate_hz / self.frame, silence)
        cut = values_BF.split([self.frames(length) for length in lengths], dim=1)
        return tuple(piece.contiguous() for piece in cut)

    def _wave(self, wave: Tensor, num_samples: int) -> tuple[Tensor, float]:
        """Normalised over the samples that are there; the silence behind them is 0, as in transformers."""
        if self.normalise:
            # Wav2Vec2FeatureExtractor: the variance of all samples, and 1e-7 against dividing by nothing.
            exact = wave.double()
            wave = ((exact - exact.mean()) / (exact.var(unbiased=False) + 1e-7).sqrt()).float()
        return F.pad(wave, (0, num_samples - len(wave)))[None], 0.0

    def _log_mel(self, wave: Tensor, num_samples: int) -> tuple[Tensor, float]:
        """Whisper's: log10, nothing more than 8 below the loudest of the sound, (x + 4) / 4.

        Source: log_mel_spectrogram of https://github.com/openai/whisper/blob/main/whisper/audio.py, which
        takes the loudest of the whole sound and cuts windows afterwards. There 30 s are filled, here a step:
        the loudest is the same, so frames differ only where the filling ends.
        """
        filled = F.pad(wave, (0, num_samples - len(wave)))
        reach = 400 // 2
        # Reflection needs more samples than it mirrors.
        padded = F.pad(filled[None], (reach, reach), mode="reflect" if len(filled) > reach else "constant")[0]
        spectrum = torch.stft(
            padded, 400, self.hop, window=torch.hann_window(400), center=False, return_complex=True
        )
        power = (spectrum[:, : num_samples // self.hop].abs() ** 2).contiguous()
        mel = (self._filters(201).float().T @ power).clamp(min=1e-10).log10()
        mel = (torch.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0
        return mel, float(mel.min())

    def _fbank(self, wave: Tensor, num_samples: int) -> tuple[Tensor, float]:
        """Kaldi's filter bank as SeamlessM4TFeatureExtractor has it, two frames side by side.

        Mean and variance are of the frames that are there; behind them stands 0, their mean, as in
        transformers. Frames do not reach beyond the sound: the last 240 samples begin none.
        """
        size, room = 400, num_samples // self.hop
        # In doubles, as transformers computes it: sixteen bit integers squared leave single precision.
        wave = F.pad(wave, (0, max(0, size - len(wave)))).double() * 2.0**15
        frames = wave.unfold(0, size, self.hop)
        frames = frames - frames.mean(-1, keepdim=True)
        first = frames[:, :1] * (1 - 0.97)
        frames = torch.cat([first, frames[:, 1:] - 0.97 * frames[:, :-1]], dim=1)
        povey = torch.hann_window(size, periodic=False, dtype=torch.float64) ** 0.85
        power = torch.fft.rfft(frames * povey, n=512).abs() ** 2
        floor = 1.192092955078125e-07  # the smallest step of single precision at 1, as in Kaldi
        mel_FB = (power @ self._filters(257)).clamp(min=floor).log()
        if self.normalise:
            spread = mel_FB.var(0, unbiased=True) if len(mel_FB) > 1 else torch.zeros_like(mel_FB[0])
            mel_FB = (mel_FB - mel_FB.mean(0)) / (spread + 1e-7).sqrt()
        silence = 0.0 if self.normalise else math.log(floor)
        mel_FB = mel_FB[:room]
        mel_FB = F.pad(mel_FB, (0, 0, 0, room - len(mel_FB)), value=silence)
        return mel_FB.reshape(room // self.stack, self.bands).T.float().contiguous(), silence

    def _decibels(self, wave: Tensor, num_samples: int) -> Tensor:
        """CLAP's: a short sound is repeated as often as it fits, then silence follows (``repeatpad``)."""
        wave = wave.repeat(num_samples // len(wave)).double()
        wave = F.pad(wave, (0, num_samples - len(wave)))
        window = torch.hann_window(1024, dtype=torch.float64)
        spectrum = torch.stft(wave, 1024, self.hop, window=window, return_complex=True)
        mel = self._filters(513).T @ spectrum.abs() ** 2
        return (10 * mel.clamp(min=1e-10).log10()).float()

    def _filters(self, num_bins: int) -> Tensor:
        return _mel_filters(
            num_bins, self.num_bands, self.low_hz, self.high_hz, self.rate_hz, self.scale, self.kind
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; :meth:`from_dict` is back."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Hearing:
        """From what :meth:`to_dict` wrote.

        Raises:
            ValueError: for a missing or unknown field.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown or "kind" not in values:
            raise ValueError(f"a hearing has 'kind' and the fields {sorted(known)}; unknown {unknown}")
        return cls(**values)


DEFAULTS: dict[str, dict[str, Any]] = {
    "log_mel": {
        "rate_hz": 16_000, "num_bands": 80, "hop": 160, "stack": 1, "normalise": False, "low_hz": 0.0,
        "high_hz": 8_000.0, "scale": "slaney",
    },
    "wave": {
        "rate_hz": 16_000, "num_bands": 1, "hop": 1, "stack": 1, "normalise": False, "low_hz": 0.0,
        "high_hz": 8_000.0, "scale": "slaney",
    },
    "fbank": {
        "rate_hz": 16_000, "num_bands": 80, "hop": 160, "stack": 2, "normalise": True, "low_hz": 20.0,
        "high_hz": 8_000.0, "scale": "kaldi",
    },
    "clap_mel": {
        "rate_hz": 48_000, "num_bands": 64, "hop": 480, "stack": 1, "normalise": False, "low_hz": 50.0,
        "high_hz": 14_000.0, "scale": "slaney",
    },
}  # fmt: skip


@cache
def _mel_filters(
    num_bins: int, num_bands: int, low_hz: float, high_hz: float, rate_hz: int, scale: str, kind: str
) -> Tensor:
    """Triangles over the bins of a spectrum, float64 [num_bins, num_bands]. Shared: not to be changed.

    Their corners lie evenly on the mel scale. ``slaney`` triangles have one area, and their corners a scale
    that is linear below 1,000 Hz (Slaney 1998, as in librosa); ``htk`` is 2595 log10(1 + f / 700);
    ``kaldi`` is the same scale with triangles that are straight in mel and not in Hz.
    """
    mel = _slaney_mel if scale == "slaney" else _htk_mel
    ends = mel(np.array([low_hz, high_hz]))
    corners = np.linspace(ends[0], ends[1], num_bands + 2)
    bins = np.linspace(0, rate_hz / 2, num_bins)
    if scale == "kaldi":
        bins = mel(bins)
    else:
        corners = _slaney_hz(corners) if scale == "slaney" else 700.0 * (np.exp(corners) - 1.0)
    widths = np.diff(corners)
    slopes = corners[None] - bins[:, None]
    triangles = np.maximum(0.0, np.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]))
    if scale == "slaney":
        triangles *= 2.0 / (corners[2:] - corners[:-2])
    return torch.from_numpy(triangles)


def _htk_mel(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    # In natural units: corners are spaced evenly, and a factor would cancel.
    return np.log(1.0 + hz / 700.0)


def _slaney_mel(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    # 15 mel of 200 / 3 Hz up to 1,000 Hz; from there 27 mel make the factor 6.4.
    return np.where(
        hz < 1000.0, hz * 3 / 200, 15 + np.log(np.maximum(hz, 1000.0) / 1000.0) * 27 / np.log(6.4)
    )


def _slaney_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(mel < 15.0, mel * 200 / 3, 1000.0 * np.exp((mel - 15.0) * np.log(6.4) / 27))
