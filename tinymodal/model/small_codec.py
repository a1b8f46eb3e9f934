"""``tinymodal_codec``: a codec of a third of a million weights, for the embedded default.

Speech at 16 kHz becomes 25 frames a second of one or two codes. An encoder reads a log-mel spectrogram and a
picture of the pitch (``sound_shown.py``) and is quantized by residual vector quantization (SoundStream,
arXiv:2107.03312). The decoder works at 25 and 100 steps a second and ends, as Vocos does
(arXiv:2306.00814), in an inverse STFT: no layer runs at the rate of samples. Vocos learns phases from an
adversary; here they come from a source (``source_filter.py``), and the network only says how loud it is at
each frequency, which spectral losses alone teach in minutes.

Encoder and decoder each have a straight path beside the network: :meth:`SmallCodec.fit` sets it, and the
codebooks, from some sounds by principal components and k-means. So training begins with a codec that speaks,
and the network learns what is left.

The decoder looks ahead by ``look_ahead`` frames in its first layer and nowhere else, so that it streams
exactly. Phase is a sum over all that was spoken, so what is rounded in the pitch adds up, and the hundredth
harmonic hears it a hundredfold: the decoder runs in float64 when it speaks.

Shapes: N clips, n samples, F frames (25 a second), S = 4 F steps (100 a second), C channels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .codec import Codec, read_config
from .kmeans import kmeans, nearest
from .sound_shown import PITCH_SHARE, Analysis
from .source_filter import Said, Voice, VoicePipe
from .streams import Convolve, Each, Line, Pipe, Sum

DEFAULTS: dict[str, Any] = {
    "model_type": "tinymodal_codec",
    "rate_hz": 16_000,
    "hop": 160,
    "fold": 4,
    "books": 2,
    "book_size": 256,
    "book_width": 32,
    "encoder_stem": 64,
    "encoder_width": 88,
    "encoder_blocks": 2,
    "decoder_width": 112,
    "decoder_blocks": 2,
    "step_width": 64,
    "step_blocks": 2,
    "look_ahead": 1,
    "bands": 80,
    "min_hz": 60.0,
    "max_hz": 500.0,
}
"""``hop`` samples make a step and ``fold`` steps a frame; ``look_ahead`` counts frames; ``min_hz`` and
``max_hz`` bound the pitch."""


LOUDNESS = 0.6
"""What is added to the log of a mel band so that one source alone is as loud as it says."""

VOICED = 2.0
"""How much quieter (log) pulses begin where nothing is voiced, and noise where all is."""


class SmallCodec(Codec):
    """See the module. Every size is a key of the config; what is left out is as in ``DEFAULTS``."""

    def __init__(self, config: Mapping[str, Any] | None = None, books: int | None = None) -> None:
        super().__init__()
        said = {**DEFAULTS, **(config or {})}
        if unknown := sorted(set(said) - set(DEFAULTS)):
            raise ValueError(f"a tinymodal_codec has no {', '.join(unknown)}; known: {', '.join(DEFAULTS)}")
        books = said["books"] if books is None else books
        if not 1 <= books <= said["books"]:
            raise ValueError(f"this codec has {said['books']} codebooks, got books = {books}")
        self.config = said
        self.rate_hz, self.hop = said["rate_hz"], said["hop"] * said["fold"]
        self.frames_per_s = self.rate_hz / self.hop
        self.books, self.book_size = books, said["book_size"]
        self.analysis = Analysis(said)
        self.encoder = Encoder(said, self.analysis.width)
        self.quantizer = Quantizer(said["books"], said["book_size"], said["book_width"])
        self.decoder = Decoder(said)
        self.voice = Voice(said)

    @classmethod
    def of_config(cls, config: Mapping[str, Any], books: int | None = None) -> SmallCodec:
        """A new one; its codebooks are random."""
        return cls(config, books)

    @classmethod
    def of_folder(cls, folder: str | Path, books: int | None = None) -> SmallCodec:
        """A saved one, in float32 however it was saved."""
        codec = cls(read_config(folder), books)
        read_weights(codec, folder)
        return codec

    def save(self, folder: str | Path) -> None:
        write_folder(self, self.config, folder)

    def _encode(self, wave_Nn: Tensor) -> Tensor:
        latents_NCF = self.encoder(self.analysis(self.filled(wave_Nn)))
        return self.quantizer.encode(latents_NCF, self.books)

    def _decode(self, codes_NQF: Tensor) -> Tensor:
        return self.voice(self.precise_decoder()(self.quantizer.decode(codes_NQF).double()))

    def filled(self, wave_Nn: Tensor) -> Tensor:
        """With silence up to whole frames."""
        return F.pad(wave_Nn, (0, -wave_Nn.shape[1] % self.hop))

    def pipe(self) -> Pipe:
        decoder = self.precise_decoder()
        voice = VoicePipe(self.voice, decoder.read, self.device)
        return Line([Each(lambda codes: self.quantizer.decode(codes).double()), decoder.pipe(), voice])

    @torch.no_grad()
    def fit(self, waves: Sequence[Tensor], seed: int = 0, rounds: int = 20) -> None:
        """Set the straight paths and the codebooks from some sounds: a codec that speaks, coarsely.

        Args:
            waves: float32 [samples] each; together they need more frames than a book has codes.
            seed: of k-means,
            rounds: and how long it goes on.

        Raises:
            ValueError: there are too few frames.
        """
        fold, width = self.config["fold"], self.analysis.width
        shown = [self.analysis(self.filled(wave[None]))[0].T.unflatten(0, (-1, fold)) for wave in waves]
        stacks_VD = torch.cat(shown).flatten(1).double()
        mean_D = stacks_VD.mean(0)
        axes_DC = torch.linalg.eigh((stacks_VD - mean_D).T @ (stacks_VD - mean_D)).eigenvectors
        axes_DC = axes_DC[:, -self.config["book_width"] :].flip(1)
        self.encoder.set_straight(axes_DC.T.unflatten(1, (fold, width)), -axes_DC.T @ mean_D)
        self.decoder.set_straight(axes_DC.T.unflatten(1, (fold, width)), mean_D.unflatten(0, (fold, width)))
        left_VC = ((stacks_VD - mean_D) @ axes_DC).float()
        for vectors_KC in self.quantizer.vectors:
            vectors_KC.copy_(kmeans(left_VC, len(vectors_KC), seed, rounds))
            left_VC = left_VC - vectors_KC[nearest(left_VC, vectors_KC)]

    def precise_decoder(self) -> Decoder:
        """A copy in float64; it takes a millisecond."""
        return deepcopy(self.decoder).double()


def read_weights(codec: nn.Module, folder: str | Path) -> None:
    """Fill ``codec`` from ``model.safetensors`` of a folder or of the Hub.

    Raises:
        ValueError: there is no such file, or it does not hold exactly the weights.
    """
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    try:
        weights = load_file(str(cached_file(str(folder), "model.safetensors")))
        codec.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: not the weights of this codec ({reason})") from error


def write_folder(codec: nn.Module, config: Mapping[str, Any], folder: str | Path) -> None:
    """``config.json`` and ``model.safetensors``."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in codec.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")


class Block(nn.Module):
    """ConvNeXt in one dimension (as in Vocos): a depthwise convolution over time, then a wide layer per step.

    Causal where ``causal``: then it sees ``kernel - 1`` steps back and none ahead.
    """

    def __init__(self, width: int, causal: bool, kernel: int = 7) -> None:
        super().__init__()
        self.ends = (kernel - 1, 0) if causal else (kernel // 2, kernel // 2)
        self.depthwise = nn.Conv1d(width, width, kernel, groups=width)
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x_NCn: Tensor) -> Tensor:
        return x_NCn + self.step(self.depthwise(F.pad(x_NCn, self.ends)))

    def step(self, x_NCn: Tensor) -> Tensor:
        """What is done with each step alone."""
        y = self.narrow(F.gelu(self.widen(self.norm(x_NCn.transpose(1, 2)))))
        return (y * self.scale).transpose(1, 2)

    def pipe(self) -> Pipe:
        return Sum(Line([Convolve(self.depthwise, *self.ends), Each(self.step)]), Each(nn.Identity()))


class Encoder(nn.Module):
    """What is shown of a sound -> one vector a frame. It may look both ways: nobody waits for it."""

    def __init__(self, config: Mapping[str, Any], width: int) -> None:
        super().__init__()
        stem, wide, fold = config["encoder_stem"], config["encoder_width"], config["fold"]
        self.straight = nn.Conv1d(width, config["book_width"], fold, stride=fold)
        self.stem = nn.Conv1d(width, stem, 3, padding=1)
        self.fold = nn.Conv1d(stem, wide, fold, stride=fold)
        self.blocks = nn.Sequential(*(Block(wide, causal=False) for _ in range(config["encoder_blocks"])))
        self.norm = nn.LayerNorm(wide)
        self.out = nn.Linear(wide, config["book_width"])

    def forward(self, shown_NCS: Tensor) -> Tensor:
        """[N, width, S] -> [N, book width, F]."""
        x_NCF = self.blocks(self.fold(F.gelu(self.stem(shown_NCS))))
        return self.straight(shown_NCS) + self.out(self.norm(x_NCF.transpose(1, 2))).transpose(1, 2)

    def set_straight(self, axes_Ckw: Tensor, offset_C: Tensor) -> None:
        """The straight path: axes [book width, steps of a frame, width]. The network begins as nothing."""
        self.straight.weight.copy_(axes_Ckw.transpose(1, 2))
        self.straight.bias.data.copy_(offset_C)  # type: ignore[union-attr]
        self.out.weight.zero_()
        self.out.bias.zero_()


class Quantizer(nn.Module):
    """Codebooks of vectors; each says what the ones before it left over."""

    def __init__(self, books: int, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.randn(books, size, width))
        self.vectors: Tensor

    def encode(self, latents_NCF: Tensor, books: int) -> Tensor:
        """[N, C, F] -> int64 [N, Q, F]: the nearest vector of each book in turn."""
        left = latents_NCF.transpose(1, 2)
        codes = []
        for vectors_KC in self.vectors[:books]:
            # The square of the latent itself is the same for all vectors.
            far_NFK = vectors_KC.square().sum(1) - 2 * left @ vectors_KC.T
            codes.append(far_NFK.argmin(-1))
            left = left - vectors_KC[codes[-1]]
        return torch.stack(codes, 1)

    def decode(self, codes_NQF: Tensor) -> Tensor:
        """int64 [N, Q, F], Q at most the books there are -> [N, C, F]."""
        vectors = (book[codes] for book, codes in zip(self.vectors, codes_NQF.unbind(1), strict=False))
        return torch.stack(list(vectors)).sum(0).transpose(1, 2)


class Decoder(nn.Module):
    """Vectors of frames -> what is said of each step.

    A row for each band of pulses, one for each of noise, and one for the pitch.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        wide, step, self.fold = config["decoder_width"], config["step_width"], config["fold"]
        ahead, self.bands = config["look_ahead"], config["bands"]
        rows = 2 * self.bands + 1
        self.ends = (1, ahead)
        self.straight = nn.Linear(config["book_width"], self.fold * rows)
        self.stem = nn.Conv1d(config["book_width"], wide, ahead + 2)
        self.blocks = nn.Sequential(*(Block(wide, causal=True) for _ in range(config["decoder_blocks"])))
        self.unfold = nn.Linear(wide, step * self.fold)
        self.steps = nn.Sequential(*(Block(step, causal=True) for _ in range(config["step_blocks"])))
        self.norm = nn.LayerNorm(step)
        self.out = nn.Linear(step, rows)
        self.min_hz, self.max_hz = config["min_hz"], config["max_hz"]

    def forward(self, vectors_NCF: Tensor) -> Said:
        x = self.finer(self.unfold, self.blocks(self.stem(F.pad(vectors_NCF, self.ends))))
        return self.read(self.last(self.steps(x)) + self.finer(self.straight, vectors_NCF))

    def finer(self, layer: nn.Linear, x_NCF: Tensor) -> Tensor:
        """[N, C, F] -> [N, C', S]: a layer that says all steps of a frame side by side."""
        return layer(x_NCF.transpose(1, 2)).unflatten(2, (self.fold, -1)).flatten(1, 2).transpose(1, 2)

    def last(self, x_NCS: Tensor) -> Tensor:
        """[N, step width, S] -> [N, rows, S]."""
        return self.out(self.norm(x_NCS.transpose(1, 2))).transpose(1, 2)

    def read(self, rows_NCS: Tensor) -> Said:
        """[N, rows, S] -> what they mean."""
        rows = rows_NCS.transpose(1, 2)
        height = rows[..., -1].sigmoid()
        hz = self.min_hz * (self.max_hz / self.min_hz) ** height
        return Said(rows[..., : self.bands], rows[..., self.bands : 2 * self.bands], hz)

    def pipe(self) -> Pipe:
        """Vectors of frames in pieces -> rows of steps."""
        blocks = [block.pipe() for block in self.blocks if isinstance(block, Block)]
        steps = [block.pipe() for block in self.steps if isinstance(block, Block)]
        finer = Each(lambda x: self.finer(self.unfold, x))
        network = Line([Convolve(self.stem, *self.ends), *blocks, finer, *steps, Each(self.last)])
        return Sum(network, Each(lambda x: self.finer(self.straight, x)))

    def set_straight(self, axes_Ckw: Tensor, mean_kw: Tensor) -> None:
        """The straight path: what is shown of a sound read back from its components, for both sources.

        The network begins as nothing.
        """
        weight, bias = self.straight.weight, self.straight.bias
        weight_krC = weight.view(self.fold, -1, weight.shape[1]).zero_()
        bias_kr = bias.view(self.fold, -1).zero_()
        axes_kwC, bands = axes_Ckw.permute(1, 2, 0), self.bands
        for first, voiced, none in ((0, VOICED, 1.0), (bands, -VOICED, 0.0)):
            rows = slice(first, first + bands)
            # A band is shown as (log10 of loudness + 2) / 2, see LogMel; how voiced it is comes behind them.
            weight_krC[:, rows] = 2 * math.log(10) * axes_kwC[:, :bands] + voiced * axes_kwC[:, bands, None]
            bias_kr[:, rows] = 2 * math.log(10) * (mean_kw[:, :bands] - 1) + LOUDNESS
            bias_kr[:, rows] += voiced * (mean_kw[:, bands, None] - none)
        # The slope of a sigmoid is a quarter in its middle.
        octave = 4 / math.log2(self.max_hz / self.min_hz) / PITCH_SHARE
        weight_krC[:, -1], bias_kr[:, -1] = octave * axes_kwC[:, -1], octave * mean_kw[:, -1]
        self.out.weight.zero_()
        self.out.bias.zero_()
