"""Sounds as frames of codes, and back: the one face that every codec has.

The speech head of a model writes codes; a codec makes them a sound. It does so frame by frame while they are
being written (:meth:`Codec.stream`), and what it gives piece by piece equals what it gives of the whole: no
click marks a border.

Known codecs, by the ``model_type`` in their folder's ``config.json``: Mimi, EnCodec and DAC of transformers
(``hf_codec.py``), and two of our own: ``tinymodal_codec`` (``small_codec.py``) and ``tinymodal_units``
(``unit_vocoder.py``).

Shapes: Q codebooks, F frames, f frames of a piece.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .streams import Pipe

CODECS = {
    "mimi": ("hf_codec", "MimiCodec"),
    "encodec": ("hf_codec", "EncodecCodec"),
    "dac": ("hf_codec", "DacCodec"),
    "tinymodal_codec": ("small_codec", "SmallCodec"),
    "tinymodal_units": ("unit_vocoder", "UnitCodec"),
}
"""``model_type`` -> the file and the class in it. Only the file of the codec that is asked for is read."""


class Codec(nn.Module, ABC):
    """Makes codes of a sound, and a sound of codes. Nothing in it trains while a language model does."""

    rate_hz: int
    """Samples a second, of what it reads and of what it gives."""
    frames_per_s: float
    books: int
    """Q, the codebooks it writes and reads: one code of each makes a frame."""
    book_size: int
    """Codes are 0 to ``book_size - 1``."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """A sound as codes.

        Args:
            wave: float [samples] or [N, samples], mono, at ``rate_hz``, full scale 1.

        Returns:
            int64 [Q, F] or [N, Q, F], on the codec's device. Convolutions may round otherwise beside other
            sounds; where the same codes must come each time, encode one at a time.

        Raises:
            ValueError: there are no samples, or they are not finite numbers.
        """
        if wave.dim() not in (1, 2) or not wave.shape[-1] or not wave.shape[0]:
            raise ValueError(f"a codec reads [samples] or [N, samples], got {tuple(wave.shape)}")
        if not bool(wave.isfinite().all()):
            raise ValueError("a codec reads finite samples, got NaN or infinity")
        codes_NQF = self._encode(wave.reshape(-1, wave.shape[-1]).to(self.device, torch.float32))
        return codes_NQF[0] if wave.dim() == 1 else codes_NQF

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes as a sound.

        Args:
            codes: int64 [Q, F].

        Returns:
            float32 [samples], on the codec's device; of no frames, no samples.

        Raises:
            ValueError: another number of codebooks, or a code that is none.
        """
        codes = self.checked(codes)
        return self._decode(codes[None])[0] if codes.shape[1] else torch.zeros(0, device=self.device)

    def stream(self) -> CodecStream:
        """Begin a sound whose frames come piece by piece."""
        return CodecStream(self)

    def checked(self, codes: Tensor) -> Tensor:
        """``codes`` on the codec's device.

        Raises:
            ValueError: they are not int64 [Q, F] in [0, book_size).
        """
        if codes.dim() != 2 or len(codes) != self.books or codes.dtype != torch.int64:
            raise ValueError(
                f"codes of this codec are int64 [{self.books}, frames], got {codes.dtype} "
                f"{tuple(codes.shape)}"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.book_size:
            raise ValueError(
                f"codes are 0 to {self.book_size - 1}, got {int(codes.min())} to {int(codes.max())}"
            )
        return codes.to(self.device)

    @abstractmethod
    def _encode(self, wave_Nn: Tensor) -> Tensor:
        """float32 [N, samples] -> int64 [N, Q, F]."""

    @abstractmethod
    def _decode(self, codes_NQF: Tensor) -> Tensor:
        """int64 [N, Q, F], F > 0 -> float32 [N, samples]."""

    @abstractmethod
    def pipe(self) -> Pipe:
        """A new decoder in pieces: codes int64 [1, Q, f] -> float32 [1, 1, samples]."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``; :func:`open_codec` reads them."""


class CodecStream:
    """One sound on its way out. Use it once."""

    def __init__(self, codec: Codec) -> None:
        self.codec, self._pipe = codec, codec.pipe()
        self.finished = False

    def feed(self, codes: Tensor) -> Tensor:
        """The next frames, int64 [Q, f], f from 0 -> what of the sound they finish, float32 [samples].

        Raises:
            ValueError: as :meth:`Codec.decode`, or the sound is finished.
        """
        return self._next(self.codec.checked(codes), last=False)

    def finish(self) -> Tensor:
        """No more frames -> the rest of the sound, float32 [samples]."""
        nothing = torch.zeros(self.codec.books, 0, dtype=torch.int64, device=self.codec.device)
        return self._next(nothing, last=True)

    @torch.no_grad()
    def _next(self, codes: Tensor, last: bool) -> Tensor:
        if self.finished:
            raise ValueError("this sound is finished; begin another with Codec.stream()")
        self.finished = last
        return self._pipe(codes[None], last)[0, 0]


def open_codec(source: str | Path | Mapping[str, Any], books: int | None = None) -> Codec:
    """A codec of a folder or of the Hub, or a new one of a config. On the CPU, in float32, in eval mode.

    Args:
        source: folder or Hub name; or what its ``config.json`` would say, with ``model_type``: then its
            weights are random.
        books: codebooks to write and read, of those that it has; None: as the folder says, else all of them.

    Raises:
        ValueError: there is no such codec, its weights are not all there, it has fewer codebooks, or it
            cannot be decoded from codes alone.
    """
    config = dict(source) if isinstance(source, Mapping) else read_config(source)
    kind = config.get("model_type")
    if kind not in CODECS:
        raise ValueError(
            f"{source if isinstance(source, str | Path) else 'codec'}: no codec is called {kind!r}; known: "
            f"{', '.join(CODECS)}"
        )
    module, name = CODECS[kind]
    made: type[Codec] = getattr(importlib.import_module(f".{module}", __package__), name)
    codec = (
        made.of_config(config, books)  # type: ignore[attr-defined]
        if isinstance(source, Mapping)
        else made.of_folder(source, books)  # type: ignore[attr-defined]
    )
    return codec.eval().requires_grad_(False)


def read_config(source: str | Path) -> dict[str, Any]:
    """``config.json`` of a folder or of the Hub.

    Raises:
        ValueError: there is none.
    """
    from transformers.utils import cached_file

    try:
        file = cached_file(str(source), "config.json")
        return dict(json.loads(Path(str(file)).read_text()))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{source}: no codec can be read there ({reason})") from error
