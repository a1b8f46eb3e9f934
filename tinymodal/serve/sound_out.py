"""A spoken reply as bytes: a whole file, or one that grows while it is spoken.

wav, flac and mp3 are written by soundfile. Of a stream nothing can be mended afterwards: the header of a wav
says that its length is not known, which players take. A flac without its length is refused by soundfile and
others, so it comes in one piece at the end. ``pcm16`` is bare samples of 16 bits at 24,000 a second, because
that is what clients of OpenAI's play them as.
"""

from __future__ import annotations

import io
import struct
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from tinymodal.serve.errors import ApiError, invalid

if TYPE_CHECKING:
    from torch import Tensor

PCM_HZ = 24_000
MIME = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "pcm16": "audio/pcm",
    "pcm": "audio/pcm",
}
FULL_SCALE = 32_767
MP3_HZ = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
UNKNOWN = 0xFFFF_FFFF
"""Length of a wav whose length is not known."""


def check_format(form: str, rate_hz: int) -> None:
    """Refuse a format that cannot hold this rate.

    Raises:
        ApiError: it cannot.
    """
    if form == "mp3" and rate_hz not in MP3_HZ:
        raise invalid(f"mp3 cannot hold {rate_hz:,} samples a second; take wav or flac", "audio.format")


class SoundOut:
    """One reply's sound on its way out.

    Args:
        form: a key of :data:`MIME`.
        rate_hz: of the samples.
        streamed: its pieces are sent as they come, and its header cannot tell the length.
    """

    def __init__(self, form: str, rate_hz: int, streamed: bool) -> None:
        check_format(form, rate_hz)
        self.form, self.rate_hz, self.streamed = form, rate_hz, streamed and form != "flac"
        self._sink = Sink()
        self._file: Any = None
        self._resample: Any = None
        if form in ("pcm16", "pcm") and rate_hz != PCM_HZ:
            import soxr

            self._resample = soxr.ResampleStream(rate_hz, PCM_HZ, 1, dtype="float32", quality="HQ")
        elif form in ("flac", "mp3") or (form == "wav" and not self.streamed):
            import soundfile

            subtype = "MPEG_LAYER_III" if form == "mp3" else "PCM_16"
            self._file = soundfile.SoundFile(self._sink, "w", rate_hz, 1, subtype, format=form.upper())
        elif form == "wav":
            self._sink.write(wav_head(rate_hz))

    def feed(self, samples: Tensor) -> bytes:
        """More of it, float32 [samples] -> what of the file is new; empty where it is not streamed."""
        values = samples.detach().float().cpu().numpy()
        self._write(values, last=False)
        return self._sink.taken() if self.streamed else b""

    def finish(self) -> bytes:
        """The end of a stream; the whole file where it is not streamed."""
        self._write(np.zeros(0, np.float32), last=True)
        if self._file is not None:
            self._file.close()
        return self._sink.taken() if self.streamed else self._sink.getvalue()

    def close(self) -> None:
        """Let go of what was not finished; after :meth:`finish` there is nothing to let go of."""
        if self._file is not None:
            self._file.close()

    def _write(self, values: np.ndarray[Any, np.dtype[np.float32]], last: bool) -> None:
        if self._resample is not None:
            values = self._resample.resample_chunk(np.ascontiguousarray(values), last=last)
        whole = (np.clip(values, -1.0, 1.0) * FULL_SCALE).round().astype("<i2")
        if not len(whole):
            return
        if self._file is not None:
            self._file.write(whole)
        else:
            self._sink.write(whole.tobytes())


class Sink(io.BytesIO):
    """A file in memory whose beginning has left already: what is mended there is mended for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self._left = 0

    def taken(self) -> bytes:
        """What has come since the last time."""
        with self.getbuffer() as all_of_it:
            new = bytes(all_of_it[self._left :])
        self._left += len(new)
        return new


def wav_head(rate_hz: int) -> bytes:
    """The 44 bytes before the samples of a wav of unknown length: one channel, 16 bits."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate_hz, 2 * rate_hz, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", UNKNOWN, b"WAVE") + form + struct.pack("<4sI", b"data", UNKNOWN)


def written(samples: Tensor, rate_hz: int, form: str) -> bytes:
    """A whole sound as a file, or as bare samples.

    Raises:
        ApiError: the format cannot hold the rate.
    """
    try:
        with closing(SoundOut(form, rate_hz, streamed=False)) as out:
            out.feed(samples)
            return out.finish()
    except (RuntimeError, OSError) as error:
        raise ApiError(500, f"The reply could not be written as {form}.") from error
