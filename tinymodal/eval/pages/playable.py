"""Sounds small enough to lie inside a page: mono, Ogg Vorbis, about 6 KB a second."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from tinymodal.core.types import Audio, Sample
from tinymodal.model.audio import load_sound

if TYPE_CHECKING:
    from torch import Tensor

MAX_S = 30.0
"""What is longer is played up to here: a page of minutes would be megabytes."""
RATE_HZ = 24_000
"""Sounds of more samples a second are played at so many: speech has little above 12 kHz."""
BLOCK = 4_000
"""Samples written at once: libsndfile 1.2 crashes on minutes of Vorbis in one piece."""
HEARD_HZ = 16_000
"""What is heard is played at what most towers hear."""
LONGEST_S = 36_000.0
"""Read at most, to be cut to ``MAX_S``."""


def playable(samples: Tensor, rate_hz: int) -> bytes:
    """A sound as a file that browsers play.

    Args:
        samples: float [samples]; what is beyond full scale is cut off.
        rate_hz: of the samples.

    Returns:
        An Ogg Vorbis file; of no samples, no bytes.
    """
    import soundfile
    import soxr

    wave = samples.detach().cpu().float().clamp(-1, 1)[: round(MAX_S * rate_hz)].numpy()
    if not len(wave):
        return b""
    if rate_hz > RATE_HZ:
        wave, rate_hz = soxr.resample(wave, rate_hz, RATE_HZ), RATE_HZ
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", rate_hz, 1, format="OGG", subtype="VORBIS") as file:
        for first in range(0, len(wave), BLOCK):
            file.write(wave[first : first + BLOCK])
    return out.getvalue()


def sounds_of(sample: Sample) -> tuple[bytes, ...]:
    """What is played in a conversation, in reading order, see :func:`playable`.

    Raises:
        ValueError: a sound that cannot be read.
    """
    return tuple(_heard(part) for part in sample.media() if isinstance(part, Audio))


def _heard(part: Audio) -> bytes:
    return playable(
        load_sound(part.source, part.rate_hz, part.start_s, part.end_s, LONGEST_S, HEARD_HZ), HEARD_HZ
    )
