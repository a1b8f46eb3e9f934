"""Mimi, EnCodec and DAC of transformers behind the face of a codec.

Encoding and decoding are transformers' own. Streaming is ours: transformers decodes whole sounds (Mimi keeps
the keys of its transformer, but not the inputs of its convolutions), so each layer of a decoder is given its
pipe (``streams.py``): EnCodec's LSTM keeps its state, Mimi's transformer its keys, DAC's convolutions wait
for the steps they look ahead.

Fewer codebooks than there are: all three quantize residuals, so the first Q codes are the same and decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .codec import Codec
from .streams import Attend, Convolve, Each, Line, Pipe, Recur, Spread, Sum


class HfCodec(Codec):
    """A codec of transformers. ``model`` is transformers' own."""

    loader: ClassVar[str]
    """Its class in transformers."""
    fewest = 1
    """Codebooks it cannot do without."""

    def __init__(self, model: Any, books: int | None = None) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.check(config)
        most = self.most_books()
        books = getattr(config, "books", None) or most if books is None else books
        if not self.fewest <= books <= most:
            raise ValueError(
                f"a {config.model_type} of {most} codebooks speaks {self.fewest} to {most} of them, got "
                f"books = {books}"
            )
        self.books, self.book_size = books, int(config.codebook_size)
        self.rate_hz = int(config.sampling_rate)

    @classmethod
    def of_config(cls, config: Mapping[str, Any], books: int | None = None) -> HfCodec:
        """One with random weights, codebooks included."""
        from transformers import AutoConfig, AutoModel

        values = {key: value for key, value in config.items() if key != "model_type"}
        model = AutoModel.from_config(AutoConfig.for_model(config["model_type"], **values))
        # Trained codebooks are buffers, which begin as zeros: every code would be the first.
        for name, buffer in model.named_buffers():
            if name.endswith((".embed", ".embed_sum")):
                buffer.normal_()
        return cls(model, books)

    @classmethod
    def of_folder(cls, folder: str | Path, books: int | None = None) -> HfCodec:
        """A pretrained one, in float32 however it was saved.

        Raises:
            ValueError: weights are missing.
        """
        import transformers

        kind = getattr(transformers, cls.loader)
        try:
            model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        except OSError as error:
            raise ValueError(f"{folder}: {str(error).strip().splitlines()[0]}") from error
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{folder}: {len(missing)} weights are missing, {missing[0]} first")
        return cls(model, books)

    def save(self, folder: str | Path) -> None:
        self.model.config.books = self.books
        self.model.save_pretrained(folder)

    def check(self, config: Any) -> None:
        """Raise ValueError if it cannot be decoded from codes alone."""

    def most_books(self) -> int:
        return int(self.model.config.num_quantizers)


class MimiCodec(HfCodec):
    """Mimi (Moshi, arXiv:2410.00037): 24 kHz, 12.5 frames a second, causal."""

    loader = "MimiModel"

    def __init__(self, model: Any, books: int | None = None) -> None:
        # The first codebooks carry the words and are quantized apart.
        self.fewest = int(model.config.num_semantic_quantizers)
        super().__init__(model, books)
        self.frames_per_s = float(model.config.frame_rate)

    def check(self, config: Any) -> None:
        if config.audio_channels != 1 or not config.use_causal_conv:
            raise ValueError("of Mimi only the causal one with one channel is known here")

    def _encode(self, wave_Nn: Tensor) -> Tensor:
        return self.model.encode(wave_Nn[:, None], num_quantizers=self.books).audio_codes

    def _decode(self, codes_NQF: Tensor) -> Tensor:
        return self.model.decode(codes_NQF).audio_values[:, 0]

    def pipe(self) -> Pipe:
        from transformers import DynamicCache

        # Newer versions of transformers gather the decoder's halves in one module.
        whole = self.model.decoder
        split = hasattr(whole, "decoder_seanet")
        holder, layers = (whole, whole.decoder_seanet.layers) if split else (self.model, whole.layers)
        transformer = holder.decoder_transformer
        return Line(
            [
                Each(self._vectors),
                spread_of(holder.upsample),
                Attend(transformer, DynamicCache(config=transformer.config)),
                *(pipe_of(layer) for layer in layers),
            ]
        )

    def _vectors(self, codes_NQF: Tensor) -> Tensor:
        return self.model.quantizer.decode(codes_NQF)


class EncodecCodec(HfCodec):
    """EnCodec (arXiv:2210.13438) at 24 kHz: 75 frames a second.

    The one at 48 kHz is refused: it scales each second by a loudness that is not among its codes.
    """

    loader = "EncodecModel"

    def __init__(self, model: Any, books: int | None = None) -> None:
        super().__init__(model, books)
        self.frames_per_s = self.rate_hz / model.config.hop_length
        self.bandwidth = next(
            width
            for width in sorted(model.config.target_bandwidths)
            if model.quantizer.get_num_quantizers_for_bandwidth(width) >= self.books
        )
        """The least that has so many codebooks."""

    def check(self, config: Any) -> None:
        found = {
            "normalize": config.normalize,
            "chunk_length_s": config.chunk_length_s is not None,
            "audio_channels": config.audio_channels != 1,
            "norm_type": config.norm_type != "weight_norm",
        }
        if wrong := [f"{name} = {getattr(config, name)!r}" for name, is_wrong in found.items() if is_wrong]:
            raise ValueError(
                f"this EnCodec cannot be decoded from codes as they come ({', '.join(wrong)}); take the one "
                f"at 24 kHz, facebook/encodec_24khz"
            )

    def most_books(self) -> int:
        quantizer = self.model.quantizer
        return max(
            quantizer.get_num_quantizers_for_bandwidth(width) for width in self.model.config.target_bandwidths
        )

    def _encode(self, wave_Nn: Tensor) -> Tensor:
        found = self.model.encode(wave_Nn[:, None], bandwidth=self.bandwidth, return_dict=True)
        return found.audio_codes[0][:, : self.books]

    def _decode(self, codes_NQF: Tensor) -> Tensor:
        return self.model.decode(codes_NQF[None], [None], return_dict=True).audio_values[:, 0]

    def pipe(self) -> Pipe:
        return Line([Each(self._vectors), *(pipe_of(layer) for layer in self.model.decoder.layers)])

    def _vectors(self, codes_NQF: Tensor) -> Tensor:
        return self.model.quantizer.decode(codes_NQF.transpose(0, 1))


class DacCodec(HfCodec):
    """DAC (arXiv:2306.06546) at 16, 24 or 44.1 kHz. A sound is filled with silence up to whole frames."""

    loader = "DacModel"

    def __init__(self, model: Any, books: int | None = None) -> None:
        super().__init__(model, books)
        self.frames_per_s = self.rate_hz / model.config.hop_length

    def most_books(self) -> int:
        return int(self.model.config.n_codebooks)

    def _encode(self, wave_Nn: Tensor) -> Tensor:
        filled = F.pad(wave_Nn, (0, -wave_Nn.shape[1] % self.model.config.hop_length))
        return self.model.encode(filled[:, None], n_quantizers=self.books, return_dict=True).audio_codes

    def _decode(self, codes_NQF: Tensor) -> Tensor:
        return self.model.decode(audio_codes=codes_NQF, return_dict=True).audio_values

    def pipe(self) -> Pipe:
        decoder = self.model.decoder
        pipes: list[Pipe] = [Each(self._vectors), Convolve(decoder.conv1)]
        for block in decoder.block:
            pipes += [Each(block.snake1), Spread(block.conv_t1)]
            for unit in (block.res_unit1, block.res_unit2, block.res_unit3):
                inner = [Each(unit.snake1), Convolve(unit.conv1), Each(unit.snake2), Convolve(unit.conv2)]
                pipes.append(Sum(Line(inner), Each(nn.Identity())))
        return Line([*pipes, Each(decoder.snake1), Convolve(decoder.conv2), Each(torch.tanh)])

    def _vectors(self, codes_NQF: Tensor) -> Tensor:
        return self.model.quantizer.from_codes(codes_NQF)[0]


def pipe_of(layer: Any) -> Pipe:
    """A layer of the decoder that Mimi and EnCodec share (SEANet, arXiv:2009.02095).

    Raises:
        ValueError: a layer that was not there when this was written.
    """
    name = type(layer).__name__.removeprefix("Mimi").removeprefix("Encodec")
    if name == "Conv1d":
        return convolve_of(layer)
    if name == "ConvTranspose1d":
        return spread_of(layer)
    if name == "ResnetBlock":
        return Sum(Line([pipe_of(inner) for inner in layer.block]), pipe_of(layer.shortcut))
    if name == "LSTM":
        return Recur(layer.lstm)
    if isinstance(layer, nn.ELU | nn.Identity):
        return Each(layer)
    raise ValueError(f"cannot stream a {type(layer).__name__}; decode the whole sound instead")


def convolve_of(layer: Any) -> Convolve:
    """Filled before the first step only where causal, else at both ends, the odd step before."""
    total = (layer.conv.kernel_size[0] - 1) * layer.conv.dilation[0]
    right = 0 if layer.causal else total // 2
    return Convolve(layer.conv, total - right, right, layer.pad_mode)


def spread_of(layer: Any) -> Spread:
    """As ``layer`` cuts it: at the end only where causal (unless ``trim_right_ratio``), else at both ends."""
    total = layer.conv.kernel_size[0] - layer.conv.stride[0]
    right = -int(-total * layer.trim_right_ratio // 1) if layer.causal else total // 2
    return Spread(layer.conv, total - right, right)
