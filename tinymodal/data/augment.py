"""Sounds changed at random, anew each time they are drawn: speed, loudness, noise, masks. Off unless asked.

A change is a pure function of the seed, the number of the draw and the sound's place in the sample. So it
does not depend on workers, ranks or interruptions, a sample that waits in a row is changed the same way when
it is encoded again, and the same row drawn in the next epoch is changed otherwise.

Samples meet speed, loudness and noise in this order; what is prepared of them meets the masks, one over all
windows. Nothing is changed where answers are measured: only training draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinymodal.core.errors import DataError
from tinymodal.core.types import Audio, Message, Part, Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundChange:
    """One drawn change, see :class:`tinymodal.core.types.Change`."""

    speed: float = 1.0
    """Above 1 the sound is shorter and higher."""
    gain_db: float = 0.0
    noise_db: float | None = None
    """How far white noise lies below the sound; None: none is added."""
    noise_seed: int = 0
    time_masks: tuple[tuple[float, float], ...] = ()
    """Length in seconds of each silenced stretch, and where it lies: 0 at the beginning, 1 at the end."""
    band_masks: tuple[tuple[int, float], ...] = ()
    """The same with a number of bands, 0 at the lowest."""

    def wave(self, samples: Tensor, rate_hz: int) -> Tensor:
        """Faster or slower, louder or softer, with noise; float32 [samples], at least one.

        A silent sound stays silent: noise is measured by it.
        """
        if self.speed != 1.0:
            samples = _faster(samples, self.speed)
        if self.gain_db:
            samples = samples * 10 ** (self.gain_db / 20)
        if self.noise_db is not None:
            level = samples.square().mean().sqrt() * 10 ** (-self.noise_db / 20)
            random = torch.Generator().manual_seed(self.noise_seed)
            samples = samples + torch.randn(samples.shape, generator=random) * level
        return samples

    def mel(self, mel: Tensor, frames_per_s: float, silence: float) -> Tensor:
        """The log-mel with stretches and bands silenced (SpecAugment, arXiv:1904.08779).

        Of a wave, which has one band, only stretches.
        """
        if not (self.time_masks or self.band_masks):
            return mel
        masked = mel.clone()
        num_bands, num_frames = mel.shape
        for seconds, place in self.time_masks:
            size = min(round(seconds * frames_per_s), num_frames)
            first = round(place * (num_frames - size))
            masked[:, first : first + size] = silence
        for bands, place in self.band_masks if num_bands > 1 else ():
            size = min(bands, num_bands)
            first = round(place * (num_bands - size))
            masked[first : first + size] = silence
        return masked


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """From which ranges changes are drawn; a recipe's ``augment`` has the same keys."""

    speed: tuple[float, float] | None = None
    gain_db: tuple[float, float] | None = None
    noise_db: tuple[float, float] | None = None
    time_masks: int = 0
    time_mask_s: float = 0.5
    band_masks: int = 0
    band_mask: int = 8

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Augment | None:
        """From a recipe's values; None where nothing is asked for."""
        augment = None if values is None else cls(**values)
        return None if augment == cls() else augment

    def change(self, seed: int, draw: int, place: int) -> SoundChange:
        """What is done to sound number ``place`` of the sample of draw number ``draw``."""
        # numpy promises that this stream of bits stays the same in all versions, and not what its
        # distributions make of them: so only bits are taken.
        # As what they are: of a great and a small number numpy would make floating point.
        key = np.array([seed % 2**64, draw * 4_096 + place], dtype=np.uint64)
        bits = np.random.Philox(key=key)

        def uniform(ends: tuple[float, float] = (0.0, 1.0)) -> float:
            return ends[0] + (ends[1] - ends[0]) * int(bits.random_raw()) / 2.0**64

        # Every value is drawn whether it is asked for or not, so that asking for one more changes no other.
        speed, gain, noise = (
            uniform(ends or (0.0, 0.0)) for ends in (self.speed, self.gain_db, self.noise_db)
        )
        noise_seed = int(bits.random_raw()) >> 1
        times = tuple((uniform((0.0, self.time_mask_s)), uniform()) for _ in range(self.time_masks))
        bands = tuple((int(uniform((0.0, self.band_mask + 1))), uniform()) for _ in range(self.band_masks))
        return SoundChange(
            speed=speed if self.speed else 1.0,
            gain_db=gain if self.gain_db else 0.0,
            noise_db=noise if self.noise_db else None,
            noise_seed=noise_seed if self.noise_db else 0,
            time_masks=times,
            band_masks=bands,
        )

    def __call__(self, sample: Sample, seed: int, draw: int) -> Sample:
        """The sample with a change for each of its sounds; those that have one keep it.

        A worse answer hears the same.
        """
        if not any(isinstance(part, Audio) for part in sample.media()):
            return sample
        messages = self._changed(sample.messages, seed, draw)
        rejected = None if sample.rejected is None else self._changed(sample.rejected, seed, draw)
        return replace(sample, messages=messages, rejected=rejected)

    def _changed(self, messages: tuple[Message, ...], seed: int, draw: int) -> tuple[Message, ...]:
        place = -1

        def changed(part: Part) -> Part:
            nonlocal place
            if not isinstance(part, Audio):
                return part
            place += 1
            return part if part.change is not None else replace(part, change=self.change(seed, draw, place))

        return tuple(
            replace(message, parts=tuple(changed(part) for part in message.parts)) for message in messages
        )


def _faster(samples: Tensor, speed: float) -> Tensor:
    """Played ``speed`` times as fast: as many samples fewer, resampled with the care of ``load_sound``."""
    try:
        import soxr
    except ImportError as error:
        raise DataError("augment.speed needs soxr, which is not installed; pip install soxr") from error

    changed = soxr.resample(samples.numpy(), speed, 1.0, quality="HQ")
    return torch.from_numpy(np.ascontiguousarray(changed)) if len(changed) else samples[:1].clone()
