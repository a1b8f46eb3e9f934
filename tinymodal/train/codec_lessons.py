"""What a codec of ours learns from a batch of clips.

The small codec: encode, decode, compare spectra. Its codebooks follow the vectors they were nearest to by
moving averages, and a code that nobody uses begins again as a vector of the batch (as in Jukebox,
arXiv:2005.00341). The unit codec: speak the units of a frozen tower, and say how long each lasts.

Spectra are compared as log-mel bands and as magnitudes at several resolutions (Parallel WaveGAN,
arXiv:1910.11480). There is no adversary: it would be the larger half of the training, and what it adds,
phases, the small codec has from its source. HiFi-GAN has not: taught so, it is understood, and buzzes.
"""

# Shapes: N clips, n samples, F frames, S steps, Q codebooks, K codes of a book, C channels, V vectors.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinymodal.core.errors import RecipeError
from tinymodal.model.small_codec import SmallCodec
from tinymodal.model.sound_shown import LogMel
from tinymodal.model.unit_vocoder import UnitCodec

RESOLUTIONS = (1024, 512, 128)
"""Windows of the spectral loss in samples, each with a quarter of it as hop."""

MEL_WINDOWS = (1024, 512)

DEAD = 0.1
"""A code that fewer vectors a step are nearest to, on average, begins again."""


class Sounds(Protocol):
    """Waves to train on, float32 [samples] at the codec's rate."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecTraining:
    """How a codec is trained."""

    steps: int = 2000
    fit: int = 300
    """Sounds that principal components and codebooks are begun from."""
    clips: int = 12
    """Clips a step,"""
    clip_s: float = 0.96
    """of so many seconds each, cut out at random; shorter sounds are filled up with silence."""
    rate: float = 1e-3
    """Peak learning rate; it rises over ``warmup`` and falls to a hundredth along a cosine."""
    warmup: int = 100
    seed: int = 0
    commit: float = 0.25
    """What the distance of a vector to its code counts in the loss,"""
    pitch: float = 2.0
    """and that of the pitch said to the pitch found, in octaves."""
    fewer_books: float = 0.3
    """Share of clips that are decoded from fewer codebooks than there are, so that those speak alone."""
    decay: float = 0.99
    """Of the moving averages that the codebooks are."""
    save_every: int = 100
    """Steps from one checkpoint to the next,"""
    note_every: int = 20
    """and from one line of ``metrics.jsonl`` to the next."""

    def __post_init__(self) -> None:
        for name in ("steps", "clips", "clip_s", "rate", "save_every", "note_every"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"codec training: {name} must be above 0, got {getattr(self, name)}")
        if not (0 <= self.fewer_books <= 1 and 0 < self.decay < 1):
            raise RecipeError("codec training: fewer_books lies in [0, 1] and decay between 0 and 1")

    def rate_at(self, step: int) -> float:
        """Learning rate of one step, counted from 0."""
        rise = min((step + 1) / max(self.warmup, 1), 1.0)
        return self.rate * rise * (0.505 + 0.495 * math.cos(math.pi * step / self.steps))


class Losses(NamedTuple):
    """Of one batch."""

    total: Tensor
    noted: dict[str, Any]
    """Its parts, and what else is written down."""


class Lesson(Protocol):
    """A codec, and how it learns."""

    codec: SmallCodec | UnitCodec

    def begin(self) -> None:
        """Before each step: which of its parts train."""

    def losses(self, wave_Nn: Tensor, draw: torch.Generator) -> Losses:
        """Of clips of whole frames."""

    def state(self) -> dict[str, Tensor]:
        """What is not among the codec's weights."""

    def load(self, state: dict[str, Tensor]) -> None: ...

    def score(self, held_out: Sounds) -> dict[str, Any]:
        """Of the codec as it is used."""


class SmallLesson:
    """``tinymodal_codec``."""

    def __init__(self, codec: SmallCodec, training: CodecTraining) -> None:
        self.codec, self.training = codec, training
        self.loss = SpectralLoss(codec.rate_hz, codec.config["bands"])
        self.books = MovingBooks(codec.quantizer.vectors, training.decay)

    def begin(self) -> None:
        self.codec.train()

    def losses(self, wave_Nn: Tensor, draw: torch.Generator) -> Losses:
        """Notes how many codes of each book the batch used, too."""
        codec = self.codec
        with torch.no_grad():
            shown, hz_NS, voiced_NS = codec.analysis.taught(wave_Nn)
            hz_NS, voiced_NS = codec.voice.ends(hz_NS), codec.voice.ends(voiced_NS)
        latents_NCF = codec.encoder(shown)
        quantized, used = self._quantized(latents_NCF, draw)
        commit = F.mse_loss(latents_NCF, quantized)
        # The gradient passes the codebooks as if they were not there.
        said = codec.decoder(latents_NCF + (quantized - latents_NCF).detach())
        turns_N = torch.rand(len(wave_Nn), generator=draw)
        first = int(torch.randint(0, 2**30, (), generator=draw))
        made_Nn = codec.voice(said._replace(hz=hz_NS), turns_N, first)
        spectra, mel = self.loss(made_Nn, wave_Nn)
        octaves = (said.hz / hz_NS).log2().abs()
        sure = (voiced_NS - 0.5).clamp_min(0) * 2
        pitch = (octaves * sure).sum() / sure.sum().clamp_min(1)
        total = spectra + 5 * mel + self.training.pitch * pitch + self.training.commit * commit
        parts = {"spectra": spectra, "mel": mel, "pitch": pitch, "commit": commit}
        return Losses(total, {**{key: value.item() for key, value in parts.items()}, "codes_used": used})

    def _quantized(self, latents_NCF: Tensor, draw: torch.Generator) -> tuple[Tensor, list[int]]:
        """Sums of codebook vectors, of some clips from fewer books; how many codes of each book are used."""
        num_books = self.codec.config["books"]
        codes_NQF = self.books.update(latents_NCF.detach(), draw)
        books_N = torch.full((len(latents_NCF),), num_books)
        if num_books > 1:
            fewer = torch.rand(len(books_N), generator=draw) < self.training.fewer_books
            books_N = torch.where(fewer, torch.randint(1, num_books, books_N.shape, generator=draw), books_N)
        quantized = torch.zeros_like(latents_NCF)
        for q, vectors_KC in enumerate(self.codec.quantizer.vectors):
            quantized = quantized + vectors_KC[codes_NQF[:, q]].transpose(1, 2) * (books_N > q)[:, None, None]
        return quantized, [int(codes_NQF[:, q].unique().numel()) for q in range(num_books)]

    def state(self) -> dict[str, Tensor]:
        return {"counts": self.books.counts, "sums": self.books.sums}

    def load(self, state: dict[str, Tensor]) -> None:
        self.books.counts, self.books.sums = state["counts"], state["sums"]

    def score(self, held_out: Sounds) -> dict[str, Any]:
        """By the number of codebooks."""
        scores = {}
        for books in range(1, self.codec.config["books"] + 1):
            self.codec.books = books
            scores[str(books)] = measure(self.codec, held_out)._asdict()
        return scores


class UnitLesson:
    """``tinymodal_units``: the vocoder and its durations; tower and centres are as they are."""

    def __init__(self, codec: UnitCodec, training: CodecTraining) -> None:
        """Raises ValueError if there is no tower to say what the units of a clip are."""
        self.codec, self.training = codec, training
        if codec.tower is None:
            raise ValueError("a unit vocoder learns from its tower's units, and this one has no tower")
        codec.tower.requires_grad_(False)
        self.loss = SpectralLoss(codec.rate_hz, 80)

    def begin(self) -> None:
        self.codec.train()
        assert self.codec.tower is not None
        self.codec.tower.eval()

    def losses(self, wave_Nn: Tensor, draw: torch.Generator) -> Losses:
        codec = self.codec
        units_NS = torch.stack([codec.units(wave) for wave in wave_Nn])
        made_Nn = codec.vocoder(codec.embed(units_NS).transpose(1, 2))
        spectra, mel = self.loss(made_Nn, wave_Nn[:, : made_Nn.shape[1]])
        total, noted = spectra + 5 * mel, {"spectra": spectra, "mel": mel}
        if codec.merge:
            noted["duration"] = torch.stack([self._duration(units) for units in units_NS]).mean()
            total = total + noted["duration"]
        used = int(units_NS.unique().numel())
        return Losses(total, {**{key: value.item() for key, value in noted.items()}, "codes_used": [used]})

    def _duration(self, units_S: Tensor) -> Tensor:
        """How wrong the steps of merged units are; the first and the last are cut off by the clip's ends."""
        units_F, steps_F = units_S.unique_consecutive(return_counts=True)
        said_F = self.codec.durations(self.codec.embed(units_F)[None].transpose(1, 2))[0]
        if len(units_F) < 3:
            return said_F.sum() * 0
        return F.mse_loss(said_F[1:-1], steps_F[1:-1].float().log1p())

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        pass

    @torch.no_grad()
    def score(self, held_out: Sounds) -> dict[str, Any]:
        """Of units spoken as long as they lasted, so that what is compared is at the same place."""
        codec, mel = self.codec, LogMel(80, self.codec.rate_hz, 512, 128)
        distances = []
        for index in range(len(held_out)):
            wave = held_out[index]
            made = codec.vocoder(codec.embed(codec.units(wave))[None].transpose(1, 2))
            length = min(made.shape[1], len(wave)) // 128 * 128
            distances.append(float((mel(made[:, :length]) - mel(wave[None, :length])).abs().mean()) * 40)
        return {"mel_db": round(sum(distances) / len(distances), 3)}


class MovingBooks:
    """Codebooks as moving averages of the vectors nearest to them."""

    def __init__(self, vectors_QKC: Tensor, decay: float) -> None:
        """``vectors_QKC`` are changed in place."""
        self.vectors, self.decay = vectors_QKC, decay
        # As if each vector had been what one vector a step was nearest to so far.
        self.counts = torch.ones(vectors_QKC.shape[:2])
        self.sums = vectors_QKC.clone()

    @torch.no_grad()
    def update(self, latents_NCF: Tensor, draw: torch.Generator) -> Tensor:
        """Codes of a batch, int64 [N, Q, F]; the books have moved afterwards."""
        left_VC = latents_NCF.transpose(1, 2).flatten(0, 1)
        codes = []
        for q, vectors_KC in enumerate(self.vectors):
            codes_V = (vectors_KC.square().sum(1) - 2 * left_VC @ vectors_KC.T).argmin(1)
            codes.append(codes_V)
            after_VC = left_VC - vectors_KC[codes_V]
            new = 1 - self.decay
            counts = torch.bincount(codes_V, minlength=len(vectors_KC)).float()
            self.counts[q].lerp_(counts, new)
            self.sums[q].lerp_(torch.zeros_like(vectors_KC).index_add_(0, codes_V, left_VC), new)
            dead = self.counts[q] < DEAD
            vectors_KC[~dead] = self.sums[q][~dead] / self.counts[q][~dead, None]
            if bool(dead.any()):
                self._begin_again(q, dead, left_VC, draw)
            left_VC = after_VC
        shape = (len(latents_NCF), -1)
        return torch.stack([codes_V.view(shape) for codes_V in codes], 1)

    def _begin_again(self, q: int, which_K: Tensor, left_VC: Tensor, draw: torch.Generator) -> None:
        picked = torch.randint(0, len(left_VC), (int(which_K.sum()),), generator=draw)
        self.vectors[q][which_K] = left_VC[picked]
        self.counts[q][which_K] = 1.0
        self.sums[q][which_K] = left_VC[picked]


class SpectralLoss(nn.Module):
    """How far two sounds are apart to the ear, phases left aside."""

    def __init__(self, rate_hz: int, bands: int) -> None:
        super().__init__()
        for size in RESOLUTIONS:
            self.register_buffer(f"window_{size}", torch.hann_window(size), persistent=False)
        for size in MEL_WINDOWS:
            mels = LogMel(bands, rate_hz, size, size // 4).mels
            self.register_buffer(f"mels_{size}", mels, persistent=False)

    def forward(self, made_Nn: Tensor, true_Nn: Tensor) -> tuple[Tensor, Tensor]:
        """Float [N, n] twice -> distance of spectra over all resolutions, and of log-mel bands."""
        spectra, mels = [], []
        for size in RESOLUTIONS:
            made, true = self._magnitudes(made_Nn, size), self._magnitudes(true_Nn, size)
            converged = (made - true).norm() / true.norm()
            spectra.append((made.log() - true.log()).abs().mean() + converged)
            if size in MEL_WINDOWS:
                filters = self.get_buffer(f"mels_{size}").T
                mels.append(((filters @ made).log10() - (filters @ true).log10()).abs().mean() / 2)
        return torch.stack(spectra).mean(), torch.stack(mels).mean()

    def _magnitudes(self, wave_Nn: Tensor, size: int) -> Tensor:
        """[N, bins, frames], above 0."""
        window = self.get_buffer(f"window_{size}")
        found = torch.stft(wave_Nn, size, size // 4, window=window, return_complex=True)
        # The floor, 60 dB below a full-scale tone, keeps the slopes of root and logarithm finite.
        floor = (1e-3 * size / 4) ** 2
        return (found.real.square() + found.imag.square() + floor).sqrt()


class Measured(NamedTuple):
    """How far a codec's sounds are from those it was given."""

    mel_db: float
    """Mean distance of mel bands in dB, quiet ones raised to 60 dB below full scale."""
    pitch_cents: float
    """Median distance of the pitch where the sound is voiced, hundredths of a semitone."""


@torch.no_grad()
def measure(codec: SmallCodec, sounds: Sounds | Sequence[Tensor]) -> Measured:
    """Encode and decode whole sounds, and compare."""
    mel = LogMel(80, codec.rate_hz, 512, 128)
    distances, cents = [], []
    for index in range(len(sounds)):
        wave = codec.filled(sounds[index][None])
        made = codec.decode(codec.encode(wave[0]))[None]
        # LogMel is log10 of amplitude over 2: 40 dB for each 1.
        distances.append(float((mel(made) - mel(wave)).abs().mean()) * 40)
        (true_hz, sure), (made_hz, _) = codec.analysis.pitch(wave), codec.analysis.pitch(made)
        cents.append((1200 * (made_hz / true_hz).log2().abs())[sure > 0.7])
    return Measured(
        round(sum(distances) / len(distances), 3),
        round(float(torch.cat(cents).median()) if torch.cat(cents).numel() else 0.0, 1),
    )
