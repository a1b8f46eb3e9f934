"""``tinymodal_units``: units of an audio tower's features as the one codebook, and a vocoder to speak them.

A unit is the nearest of K centres, found by k-means, to a tower's feature (HuBERT's sixth layer, say); what
it keeps is mostly which sound is spoken, not by whom. That makes units easy to write for a small head (design
``units``, LLaMA-Omni, arXiv:2409.06666), and the vocoder's voice the only one.

Equal neighbours are written once (``merge``); how long each unit lasts is then said by the vocoder's duration
predictor (arXiv:2104.00355). The vocoder is HiFi-GAN's generator (arXiv:2010.05646). It looks ahead, and so
does the predictor, by two units; both stream exactly.

Shapes: N sounds, F units, S steps (one for each feature of the tower), E width of a feature, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .audio import Hearing
from .audio_towers import audio_encoder_of, audio_tower_config
from .codec import Codec, read_config
from .kmeans import kmeans, nearest
from .small_codec import read_weights, write_folder
from .sound_tower import AudioTower
from .streams import Convolve, Each, Line, Pipe, Spread, Sum

DEFAULTS: dict[str, Any] = {
    "model_type": "tinymodal_units",
    "rate_hz": 16_000,
    "tower": None,
    "hearing": None,
    "feature_layer": -1,
    "units": 1000,
    "merge": True,
    "width": 128,
    "channels": 512,
    "strides": [5, 4, 4, 2, 2],
    "kernels": [11, 8, 8, 4, 4],
    "block_kernels": [3, 7, 11],
    "dilations": [1, 3, 5],
    "slope": 0.1,
}
"""``tower`` is an audio tower's config; without one the codec only speaks. ``hearing`` is how sounds are
prepared for it (``Hearing.to_dict``); None: as for its family. ``strides`` multiply to the
samples from one feature of the tower to the next. Sizes of the vocoder are those of arXiv:2104.00355."""


class UnitCodec(Codec):
    """See the module. Every size is a key of the config; what is left out is as in ``DEFAULTS``.

    ``frames_per_s`` counts units before equal neighbours are merged.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, books: int | None = None) -> None:
        """Raises ValueError for an unknown key, several books, or strides that are not the tower's."""
        super().__init__()
        said = {**DEFAULTS, **(config or {})}
        if unknown := sorted(set(said) - set(DEFAULTS)):
            raise ValueError(f"a tinymodal_units has no {', '.join(unknown)}; known: {', '.join(DEFAULTS)}")
        if books not in (None, 1):
            raise ValueError(f"units are one codebook, got books = {books}")
        self.hop, self.rate_hz = prod(said["strides"]), said["rate_hz"]
        self.tower: AudioTower | None = None
        width = 1
        if said["tower"] is not None:
            tower_config = audio_tower_config(said["tower"])
            said["tower"] = tower_config.to_dict()
            kind = audio_encoder_of(tower_config)
            own = said["hearing"]
            self.hearing = kind.hearing_of(tower_config) if own is None else Hearing.from_dict(own)
            said["hearing"] = self.hearing.to_dict()
            if (self.hearing.rate_hz, kind.stride(tower_config)) != (self.rate_hz, self.hop):
                raise ValueError(
                    f"the tower hears at {self.hearing.rate_hz} Hz with a feature every "
                    f"{kind.stride(tower_config)} samples, the vocoder speaks {self.hop} samples for each at "
                    f"{self.rate_hz} Hz; set rate_hz and strides"
                )
            self.tower = kind.build(tower_config, said["feature_layer"])
            width = self.tower.width
        self.config = said
        self.frames_per_s, self.merge = self.rate_hz / self.hop, said["merge"]
        self.books, self.book_size = 1, said["units"]
        self.register_buffer("centres", torch.randn(self.book_size, width))
        self.centres: Tensor
        self.embed = nn.Embedding(self.book_size, said["width"])
        self.durations = Durations(said["width"])
        self.vocoder = Generator(
            said["width"],
            said["channels"],
            said["strides"],
            said["kernels"],
            said["block_kernels"],
            said["dilations"],
            said["slope"],
        )

    @classmethod
    def of_config(cls, config: Mapping[str, Any], books: int | None = None) -> UnitCodec:
        """A new one; its centres are random, see :meth:`fit`."""
        return cls(config, books)

    @classmethod
    def of_folder(cls, folder: str | Path, books: int | None = None) -> UnitCodec:
        """A saved one, in float32 however it was saved."""
        codec = cls(read_config(folder), books)
        read_weights(codec, folder)
        return codec

    def save(self, folder: str | Path) -> None:
        write_folder(self, self.config, folder)

    @torch.no_grad()
    def features(self, wave: Tensor) -> Tensor:
        """A sound [samples] as the tower hears it: [S, E]. The silence its windows end with is left out.

        Raises:
            ValueError: there is no tower.
        """
        if self.tower is None:
            raise ValueError("this unit vocoder was saved without its tower: it speaks, and hears nothing")
        windows = self.hearing.prepare(wave.cpu())
        heard = [self.tower(window[None].to(self.device)).values[0] for window in windows]
        return torch.cat(heard)[: max(-(-len(wave) // self.hop), 1)]

    def fit(self, waves: Sequence[Tensor], seed: int = 0, rounds: int = 30) -> None:
        """Find the centres: k-means over the features of some sounds, which together need K of them."""
        self.centres.copy_(
            kmeans(torch.cat([self.features(wave) for wave in waves]), self.book_size, seed, rounds)
        )

    def units(self, wave: Tensor) -> Tensor:
        """The unit of every step, int64 [S], neighbours not merged."""
        return nearest(self.features(wave), self.centres)

    def _encode(self, wave_Nn: Tensor) -> Tensor:
        each = [self.units(wave) for wave in wave_Nn]
        if self.merge:
            each = [units.unique_consecutive() for units in each]
        if len({len(units) for units in each}) > 1:
            raise ValueError("merged units of several sounds differ in number; encode one sound at a time")
        return torch.stack(each)[:, None]

    def _decode(self, codes_NQF: Tensor) -> Tensor:
        units_NF = codes_NQF[:, 0]
        x_NCF = self.embed(units_NF).transpose(1, 2)
        if not self.merge:
            return self.vocoder(x_NCF)
        if len(units_NF) > 1:
            raise ValueError("merged units last differently long; decode one sound at a time")
        steps = self.precise_durations().steps(x_NCF.double())
        return self.vocoder(x_NCF.repeat_interleave(steps[0], 2))

    def precise_durations(self) -> Durations:
        """A copy in float64: what is rounded to whole steps must not depend on the pieces it came in."""
        return deepcopy(self.durations).double()

    def pipe(self) -> Pipe:
        pipes: list[Pipe] = [Each(lambda codes: self.embed(codes[:, 0]).transpose(1, 2))]
        if self.merge:
            pipes.append(Last(self.precise_durations()))
        return Line([*pipes, self.vocoder.pipe()])


class Durations(nn.Module):
    """How many steps each unit lasts, from two units on either side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, 3, padding=1)
        self.norm1 = nn.LayerNorm(width)
        self.conv2 = nn.Conv1d(width, width, 3, padding=1)
        self.norm2 = nn.LayerNorm(width)
        self.out = nn.Linear(width, 1)

    def forward(self, x_NCF: Tensor) -> Tensor:
        """[N, C, F] -> log of one more than the steps, [N, F]."""
        return self.said(self.second(self.conv2(self.first(self.conv1(x_NCF)))))

    def first(self, x_NCF: Tensor) -> Tensor:
        return self.norm1(x_NCF.relu().transpose(1, 2)).transpose(1, 2)

    def second(self, x_NCF: Tensor) -> Tensor:
        return self.norm2(x_NCF.relu().transpose(1, 2)).transpose(1, 2)

    def said(self, x_NCF: Tensor) -> Tensor:
        return self.out(x_NCF.transpose(1, 2))[..., 0]

    def steps(self, x_NCF: Tensor) -> Tensor:
        """[N, C, F] -> int64 [N, F], at least 1."""
        return whole_steps(self(x_NCF))

    def pipe(self) -> Pipe:
        """[1, C, f] -> [1, 1, f], what :meth:`forward` says."""
        first = [Convolve(self.conv1), Each(self.first)]
        return Line([*first, Convolve(self.conv2), Each(self.second), Each(lambda x: self.said(x)[:, None])])


def whole_steps(said: Tensor) -> Tensor:
    """Log of one more than the steps -> steps, at least 1; 30 s of one unit at most."""
    return said.exp().sub(1).round().clamp(1, 1500).long()


class Last(Pipe):
    """Each unit for as many steps as it lasts; units wait until that is known."""

    def __init__(self, durations: Durations) -> None:
        self.durations = durations.pipe()
        self.waiting: Tensor | None = None

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        steps = whole_steps(self.durations(x.double(), last))[0, 0]
        x = x if self.waiting is None else torch.cat([self.waiting, x], 2)
        self.waiting = x[..., len(steps) :]
        return x[..., : len(steps)].repeat_interleave(steps, 2)


class Generator(nn.Module):
    """HiFi-GAN: transposed convolutions, each followed by the mean of residual blocks of several kernels.

    Names and order of its weights are those of ``SpeechT5HifiGan`` of transformers; equal to it by test.
    """

    def __init__(
        self,
        width: int,
        channels: int,
        strides: Sequence[int],
        kernels: Sequence[int],
        block_kernels: Sequence[int],
        dilations: Sequence[int],
        slope: float,
    ) -> None:
        super().__init__()
        self.slope = slope
        self.conv_pre = nn.Conv1d(width, channels, 7, padding=3)
        self.upsampler = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        self.num_kernels = len(block_kernels)
        for stride, kernel in zip(strides, kernels, strict=True):
            if kernel < stride or (kernel - stride) % 2:
                raise ValueError(f"a stride of {stride} needs a kernel 0, 2, 4, ... longer, got {kernel}")
            half = channels // 2
            self.upsampler.append(
                nn.ConvTranspose1d(channels, half, kernel, stride, padding=(kernel - stride) // 2)
            )
            self.resblocks.extend(ResidualBlock(half, size, dilations, slope) for size in block_kernels)
            channels = half
        self.conv_post = nn.Conv1d(channels, 1, 7, padding=3)

    def forward(self, x_NCS: Tensor) -> Tensor:
        """[N, C, S] -> float32 [N, S * product of the strides], within 1."""
        x = self.conv_pre(x_NCS)
        for n, up in enumerate(self.upsampler):
            x = up(F.leaky_relu(x, self.slope))
            blocks = self.resblocks[n * self.num_kernels : (n + 1) * self.num_kernels]
            x = torch.stack([block(x) for block in blocks]).sum(0) / self.num_kernels
        # The last slope is torch's own default, as in the published code.
        return self.conv_post(F.leaky_relu(x)).tanh()[:, 0]

    def pipe(self) -> Pipe:
        """[1, C, n] -> [1, 1, samples]."""
        pipes: list[Pipe] = [Convolve(self.conv_pre)]
        for n, up in enumerate(self.upsampler):
            assert isinstance(up, nn.ConvTranspose1d)
            blocks = self.resblocks[n * self.num_kernels : (n + 1) * self.num_kernels]
            pipes += [
                Each(lambda x: F.leaky_relu(x, self.slope)),
                Spread(up),
                Sum(*(block.pipe() for block in blocks if isinstance(block, ResidualBlock))),
                Each(lambda x: x / self.num_kernels),
            ]
        return Line([*pipes, Each(F.leaky_relu), Convolve(self.conv_post), Each(torch.tanh)])


class ResidualBlock(nn.Module):
    """Dilated convolutions, each with a plain one behind it and its input added."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int], slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel - 1) // 2)
            for d in dilations
        )
        self.convs2 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2) for _ in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        for one, two in zip(self.convs1, self.convs2, strict=True):
            x = x + two(self.leak(one(self.leak(x))))
        return x

    def leak(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope)

    def pipe(self) -> Pipe:
        pipes: list[Pipe] = []
        for one, two in zip(self.convs1, self.convs2, strict=True):
            assert isinstance(one, nn.Conv1d)
            assert isinstance(two, nn.Conv1d)
            inner = [Each(self.leak), Convolve(one), Each(self.leak), Convolve(two)]
            pipes.append(Sum(Each(nn.Identity()), Line(inner)))
        return Line(pipes)
