"""A sound file, or a stretch of one, as samples: mono, at one rate, decoded in blocks.

:func:`load_sound` absorbs what files do to us (rates, channels, bit depths, streamed headers, wrong names)
and refuses what it cannot read rightly with a sentence. soundfile (libsndfile) reads wav, flac, mp3, ogg,
opus and aiff; PyAV, where installed, what libsndfile cannot (m4a). Both and soxr, which resamples, are asked
for by name when the first sound is read: a model that only sees loads without them.

Each block is mixed down and resampled at once, so memory follows the stretch that is asked for and never
what a header claims. Mp3, which cannot be read in blocks (:func:`_blocks`), has two channels at the most.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["MAX_S", "load_sound"]

Samples = NDArray[np.float32]

MAX_S = 600.0
"""Longest sound that is read unless another limit is given."""

MAX_RATE_HZ = 768_000
"""Highest rate that is believed: four times the usual highest, 192 kHz."""

MAX_CHANNELS = 64
"""Most channels that are believed; third-order ambisonics have 16."""

LOUDEST = 64.0
"""Greatest sample of a sound whose full scale is 1, 36 dB above it. Beyond that it is another scale."""

BLOCK = 1 << 16
"""Samples, of all channels together, that are decoded at once."""

PREROLL = 1 << 14
"""Samples before a stretch that are decoded and dropped: an mp3 frame takes bits from those before it, 28
frames of 576 samples at the most here."""

SLACK_S = 0.1
"""So far behind the end of the file may ``end_s`` lie, as lists of stretches are rounded; and so much less
may be there than the header says, as headers are."""

MIN_RATE_HZ = 1_000
"""Lowest rate that is believed: below it nothing of speech is left."""

ENDLESS = 1 << 48
"""A header with more samples does not know: a stream whose length was never written back."""

STREAMED_BYTES = 0x7FFFF000
"""A wav that says so many bytes or more was piped: its length was not known when the header was written."""

MAX_CHUNKS = 4_096
"""Chunks of a wav or aiff that are looked at for its sound. Zeros read as chunks of no length, gigabytes of
them where a recorder died."""

OGG_PAGE_BYTES = 65_307
"""The longest page of an Ogg file."""


def load_sound(
    source: str | Path | bytes | Tensor | NDArray[Any],
    rate_hz: int | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    max_s: float = MAX_S,
    to_hz: int = 16_000,
    name: str = "",
) -> Tensor:
    """Read a sound, or a stretch of one: mono, at one rate.

    Args:
        source: a file, the bytes of one, or samples: floating point [samples] or [channels, samples], full
            scale 1 (a numpy array will do).
        rate_hz: of samples; a file says its own.
        start_s: where to begin; None: at the beginning. What lies before is not decoded.
        end_s: where to end; None: at the end. What lies behind is not decoded. Up to 0.1 s too late is
            forgiven.
        max_s: refuse a longer stretch, from the header where that says it.
        to_hz: rate of what is returned.
        name: what errors call it; the file's own name by default.

    Returns:
        float32 [samples], at least one: the mean of the channels, resampled by soxr's ``HQ``. Clipped and
        silent sounds are read as they are.

    Raises:
        ValueError: if there is no such file, or it is empty, not a sound, cut short, broken, too long, of an
            unbelievable rate or number of channels; if a sample is not a number; if the stretch does not lie
            in it; if soundfile, soxr or (for m4a) PyAV is needed and not installed.
    """
    if isinstance(source, Tensor | np.ndarray):
        samples = _as_tensor(source)
        asked = _Asked(name or f"sound of {samples.numel():,} samples", start_s, end_s, max_s, to_hz)
        return _from_samples(samples, rate_hz, asked)
    if isinstance(source, bytes):
        asked = _Asked(name or f"sound of {len(source):,} bytes", start_s, end_s, max_s, to_hz)
        return _from_file(io.BytesIO(source), len(source), asked)
    path = _existing(source)
    asked = _Asked(name or str(path), start_s, end_s, max_s, to_hz)
    try:
        # Through a number and not the name: soundfile believes a name that ends in .raw, and nobody else's.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb") as file:
            return _from_file(file, path.stat().st_size, asked)
    except OSError as fault:
        raise ValueError(f"{asked.name}: cannot be read ({fault.strerror or fault})") from fault


@dataclass(frozen=True, slots=True)
class _Asked:
    """Which stretch of a sound is read, and at which rate."""

    name: str
    start_s: float | None
    end_s: float | None
    max_s: float
    to_hz: int

    def __post_init__(self) -> None:
        for key in ("start_s", "end_s"):
            value = getattr(self, key)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{self.name}: {key} is {value}; expected seconds, 0 or more")
        if self.end_s is not None and self.end_s <= (self.start_s or 0.0):
            raise ValueError(
                f"{self.name}: end_s {self.end_s:g} is not behind start_s {self.start_s or 0.0:g}; correct "
                f"one of them"
            )

    def frames(self, rate_hz: int, there: int | None, promised: float = 1.0) -> tuple[int, int]:
        """First sample that is read and the one behind the last.

        Args:
            rate_hz: of the file.
            there: samples it holds; None where only reading shows it.
            promised: how many times as much there should be; infinity where nobody knows how much more.
        """
        first = round((self.start_s or 0.0) * rate_hz)
        last = None if self.end_s is None else round(self.end_s * rate_hz)
        if there is not None:
            slack = SLACK_S * rate_hz
            missing = math.inf if math.isinf(promised) else there * (promised - 1)
            if missing > slack and (last is None or last > there + slack):
                whole = "" if math.isinf(missing) else f" of {(there + missing) / rate_hz:.2f}"
                raise ValueError(
                    f"{self.name}: cut short, {there / rate_hz:.2f}{whole} s are there; get it again, or set "
                    f"end_s"
                )
            if there < 1:
                raise ValueError(f"{self.name}: holds no samples; expected a sound. Remove it")
            if first >= there:
                raise ValueError(
                    f"{self.name}: start_s {self.start_s:g} is behind its end, {there / rate_hz:.3f} s; "
                    f"correct it"
                )
            if last is not None and last > there + slack:
                raise ValueError(
                    f"{self.name}: end_s {self.end_s:g} is behind its end, {there / rate_hz:.3f} s; correct "
                    f"it"
                )
            last = there if last is None else min(last, there)
        most = math.floor(self.max_s * rate_hz)
        if last is None:
            # One more than is allowed, so that too long shows.
            return first, first + most + 1
        if last - first > most:
            raise self.too_long(f"{(last - first) / rate_hz:,.1f} s long")
        if last <= first:
            raise ValueError(f"{self.name}: from start_s to end_s there is no sample; set them further apart")
        return first, last

    def too_long(self, found: str) -> ValueError:
        return ValueError(
            f"{self.name}: {found}, the limit is {self.max_s:g} s; cut it with start_s and end_s, or raise "
            f"max_s"
        )


class _Mono:
    """Mixes blocks of channels down, brings them to the asked rate and keeps them."""

    def __init__(self, asked: _Asked, rate_hz: int, num_channels: int) -> None:
        if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
            raise ValueError(
                f"{asked.name}: {rate_hz:,} Hz; expected a rate from {MIN_RATE_HZ:,} to {MAX_RATE_HZ:,} Hz"
            )
        if not 1 <= num_channels <= MAX_CHANNELS:
            raise ValueError(
                f"{asked.name}: {num_channels:,} channels; expected 1 to {MAX_CHANNELS}, as [channels, "
                f"samples]"
            )
        self.asked, self.rate_hz, self.num_read = asked, rate_hz, 0
        self.pieces: list[Samples] = []
        self.last = np.zeros(0, np.float32)
        self.stream = None
        if rate_hz != asked.to_hz:
            soxr = _module("soxr", asked.name)
            self.stream = soxr.ResampleStream(rate_hz, asked.to_hz, 1, dtype="float32", quality="HQ")

    def feed(self, block_SC: Samples) -> None:
        """One block, [samples, channels]."""
        mono = block_SC.mean(axis=1, dtype=np.float32) if block_SC.shape[1] > 1 else block_SC[:, 0]
        # One sum finds every NaN and every infinity; a second look is taken only then.
        if not math.isfinite(float(np.abs(mono).sum(dtype=np.float64))):
            where = (self.num_read + int(np.flatnonzero(~np.isfinite(mono))[0])) / self.rate_hz
            raise ValueError(
                f"{self.asked.name}: a sample is not a number ({where + (self.asked.start_s or 0.0):.3f} s "
                f"after its beginning); mend or remove it"
            )
        if len(mono) and (loudest := float(np.abs(mono).max())) > LOUDEST:
            raise ValueError(
                f"{self.asked.name}: a sample is {loudest:,.0f}, full scale is 1; of whole numbers divide 16 "
                f"bits by 32,768 first"
            )
        self.num_read += len(mono)
        if self.stream is None:
            self.pieces.append(np.array(mono, dtype=np.float32))
        elif len(mono):
            self.pieces.append(self.stream.resample_chunk(np.ascontiguousarray(mono), last=False))
            self.last = mono[-1:]

    def whole(self) -> Tensor:
        if self.stream is not None:
            self.pieces.append(self.stream.resample_chunk(np.zeros(0, np.float32), last=True))
        samples = np.concatenate(self.pieces) if self.pieces else np.zeros(0, np.float32)
        if not len(samples):
            # Less than one sample at the new rate: it is one.
            samples = self.last
        return torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))


def _as_tensor(samples: Tensor | NDArray[Any]) -> Tensor:
    if isinstance(samples, Tensor):
        return samples
    if samples.dtype.kind not in "fiu":
        raise ValueError(f"a sound of {samples.dtype} samples; expected floating point of full scale 1")
    # A copy: torch shares what it is given, and may not share what cannot be written.
    return torch.from_numpy(np.array(samples))


def _from_samples(samples: Tensor, rate_hz: int | None, asked: _Asked) -> Tensor:
    if rate_hz is None:
        raise ValueError(
            f"{asked.name}: samples do not say their rate; give rate_hz (of a processor, sampling_rate)"
        )
    if samples.ndim not in (1, 2):
        raise ValueError(f"{asked.name}: {list(samples.shape)}; expected [samples] or [channels, samples]")
    if not samples.dtype.is_floating_point:
        raise ValueError(
            f"{asked.name}: samples are {str(samples.dtype).removeprefix('torch.')}; expected floating point "
            f"of full scale 1. Divide 16 bits by 32,768"
        )
    channels = samples.detach() if samples.ndim == 2 else samples.detach()[None]
    mono = _Mono(asked, rate_hz, len(channels))
    first, last = asked.frames(rate_hz, channels.shape[1])
    mono.feed(channels[:, first:last].float().cpu().numpy().T)
    return mono.whole()


def _from_file(file: BinaryIO, size_bytes: int, asked: _Asked) -> Tensor:
    if size_bytes == 0:
        raise ValueError(f"{asked.name}: the file is empty (0 bytes); expected a sound")
    head = file.read(16)
    file.seek(0)
    if (container := _container(head)) is not None:
        return _by_av(file, container, asked)
    promised = _promised(file, size_bytes)
    file.seek(0)
    soundfile = _module("soundfile", asked.name)
    with ExitStack() as opened:
        try:
            sound = opened.enter_context(soundfile.SoundFile(file))
        except Exception as fault:
            # LibsndfileError, and TypeError of headers that say nothing.
            reason = str(getattr(fault, "error_string", fault)).rstrip(".")
            if promised > 1:
                reason = f"cut short: {reason}"
            raise ValueError(
                f"{asked.name}: not a sound that can be read ({reason}); expected wav, flac, mp3, ogg or opus"
            ) from fault
        rate_hz = int(sound.samplerate)
        mono = _Mono(asked, rate_hz, int(sound.channels))
        there = int(sound.frames) if sound.frames < ENDLESS else None
        first, last = asked.frames(rate_hz, there, promised)
        try:
            for block in _blocks(sound, first, last):
                mono.feed(block)
        except ValueError:
            raise
        except Exception as fault:
            raise ValueError(f"{asked.name}: broken or cut short ({fault})") from fault
    _check_read(mono, first, last, there)
    return mono.whole()


def _check_read(mono: _Mono, first: int, last: int, there: int | None) -> None:
    """What was read, against what was to be read; ``there`` is None where no header said."""
    asked, rate_hz = mono.asked, mono.rate_hz
    if there is None and mono.num_read == last - first and asked.end_s is None:
        raise asked.too_long(f"more than {asked.max_s:g} s long")
    if mono.num_read == 0:
        raise ValueError(f"{asked.name}: no samples where it should be heard; it is broken or cut short")
    missing = last - first - mono.num_read
    if missing > SLACK_S * rate_hz and (there is not None or asked.end_s is not None):
        raise ValueError(
            f"{asked.name}: broken or cut short, it ends {(first + mono.num_read) / rate_hz:.3g} s after its "
            f"beginning and not after {last / rate_hz:.3g} s; get it again, or set end_s"
        )


def _blocks(sound: Any, first: int, last: int) -> Iterator[Samples]:
    """Samples from ``first`` to ``last``, a block at a time, [samples, channels]."""
    size = max(1, BLOCK // sound.channels)
    if first > PREROLL and sound.seekable():
        sound.seek(first - PREROLL)
        first, last = PREROLL, last - first + PREROLL
    if sound.format == "MP3":
        # In one piece: soundfile seeks after every read, and behind a seek libmpg123 decodes wrong samples
        # until its bit reservoir has filled. PREROLL samples are enough for that.
        size = last
    left = last
    while left > 0:
        block = sound.read(min(size, left), dtype="float32", always_2d=True)
        if not len(block):
            return
        if last - left + len(block) > first:
            yield block[max(0, first - (last - left)) :]
        left -= len(block)


def _promised(file: BinaryIO, size_bytes: int) -> float:
    """How many times as much as there is, the header promises; 1 where it keeps its promise or makes none.

    libsndfile reads what is there and is silent about the rest, of wav, aiff and au, and of an Ogg file
    without its last page. Of flac and mp3 it says how much there should be.
    """
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"OggS":
        file.seek(max(0, size_bytes - OGG_PAGE_BYTES))
        tail = file.read()
        page = tail[max(0, tail.rfind(b"OggS")) :]
        # RFC 3533: byte 5 says with its third bit that the stream ends here; the lengths of what follows
        # stand from byte 27 on, byte 26 says how many.
        lengths = page[27 : 27 + page[26]] if len(page) > 27 else b""
        ends = lengths and page[5] & 4 and len(page) >= 27 + len(lengths) + sum(lengths)
        return 1.0 if ends else math.inf
    if head[:4] == b".snd":
        begins, size = struct.unpack(">II", head[4:])
        return _ratio(size, size_bytes - begins)
    if head[:4] not in (b"RIFF", b"RIFX", b"RF64", b"FORM"):
        return 1.0
    order = "<" if head[:4] in (b"RIFF", b"RF64") else ">"
    large = 0
    for _ in range(MAX_CHUNKS):
        if len(chunk := file.read(8)) < 8:
            break
        size = struct.unpack(f"{order}I", chunk[4:])[0]
        if chunk[:4] in (b"data", b"SSND"):
            return _ratio(large or size, size_bytes - file.tell())
        if chunk[:4] == b"ds64" and len(sizes := file.read(16)) == 16:
            # RF64 keeps what does not fit into 32 bits here; the second number is the sound's.
            large, size = struct.unpack("<Q", sizes[8:])[0], size - 16
        # Chunks begin at even places.
        file.seek(size + size % 2, io.SEEK_CUR)
    return 1.0


def _ratio(said_bytes: int, there_bytes: int) -> float:
    streamed = STREAMED_BYTES <= said_bytes < 1 << 32
    return 1.0 if streamed or not 0 < there_bytes < said_bytes else said_bytes / there_bytes


# ---- m4a and its kin, by PyAV


def _container(head: bytes) -> str | None:
    """What kind of file it is, if it is one that libsndfile never reads."""
    if head[4:8] == b"ftyp":
        return "MPEG-4 (m4a)"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "Matroska (webm)"
    if head[:4] == b"0&\xb2u":
        return "ASF (wma)"
    if head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xF6 == 0xF0:
        return "AAC"
    return None


def _by_av(file: BinaryIO, container: str, asked: _Asked) -> Tensor:
    """Decode with PyAV. What was there is known at the end; less than the container says is refused."""
    try:
        av = importlib.import_module("av")
    except ImportError as fault:
        raise ValueError(
            f"{asked.name}: {container} is read by PyAV, which is not installed; pip install av, or convert "
            f"it to flac"
        ) from fault
    try:
        with av.open(file) as opened:
            streams = opened.streams.audio
            if not streams:
                raise ValueError(f"{asked.name}: {container} without a sound")
            stream = streams[0]
            rate_hz = int(stream.rate)
            mono = _Mono(asked, rate_hz, int(stream.channels))
            seconds = float(stream.duration * stream.time_base) if stream.duration else None
            there = None if seconds is None else math.floor(seconds * rate_hz)
            first, last = asked.frames(rate_hz, there)
            for block in _av_blocks(av, opened, stream, first, last):
                mono.feed(block)
    except ValueError as fault:
        # PyAV's errors of broken data are ValueErrors as well; ours begin with the name.
        if str(fault).startswith(asked.name):
            raise
        raise ValueError(f"{asked.name}: broken or cut short ({fault})") from fault
    except Exception as fault:
        raise ValueError(f"{asked.name}: broken or cut short ({fault})") from fault
    _check_read(mono, first, last, there)
    return mono.whole()


def _av_blocks(av: Any, opened: Any, stream: Any, first: int, last: int) -> Iterator[Samples]:
    if first > stream.rate:
        # A second before: AAC needs the frame before the one that is wanted.
        opened.seek(int((first / stream.rate - 1.0) / stream.time_base), stream=stream)
    planar = av.AudioResampler(format="fltp")
    done = first
    for frame in opened.decode(stream):
        if frame.pts is None:
            continue
        at = round(float(frame.pts * frame.time_base) * stream.rate)
        for piece in planar.resample(frame):
            values_SC = piece.to_ndarray().T
            # A place is read once, so that a file whose times do not go on cannot fill the memory.
            begin, end = max(done - at, 0), min(last - at, len(values_SC))
            if end > begin:
                yield np.ascontiguousarray(values_SC[begin:end])
                done = at + end
            at += len(values_SC)
        if at >= last:
            return


def _module(name: str, asked: str) -> Any:
    try:
        # By name: a saved model asks for every module that its files import, and one that only sees needs
        # none.
        return importlib.import_module(name)
    except (ImportError, OSError) as fault:
        raise ValueError(
            f"{asked}: reading a sound needs {name}, which is not installed; pip install soundfile soxr"
        ) from fault


def _existing(source: str | Path) -> Path:
    """The path of a file that is there."""
    if not isinstance(source, str | Path):
        raise ValueError(
            f"a sound is a file, the bytes of one, or samples with their rate, got {type(source).__name__}"
        )
    path = Path(source)
    try:
        exists = path.is_file()
    except (OSError, ValueError) as fault:
        raise ValueError(f"{str(source)[:80]}: no name of a file ({fault})") from fault
    if not exists:
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path}: {found}; expected a sound file")
    return path
