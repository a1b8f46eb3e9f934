"""A reply aloud as a wav file that grows while it is spoken.

Written with the standard library: 16 bits, one channel, at the codec's rate. What a stopped reply had said by
then is a whole file too.
"""

from __future__ import annotations

import wave
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from tinymodal.core.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

FULL_SCALE = 32767


class Recording:
    """One file. Close it, or use it in a ``with``.

    Args:
        path: overwritten where it exists.
        rate_hz: of the samples.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, path: Path, rate_hz: int) -> None:
        self.path, self.rate_hz, self.samples = path, rate_hz, 0
        check_place(path)
        try:
            self._file = wave.open(str(path), "wb")  # noqa: SIM115 - it is this object that is closed
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}.") from error
        self._file.setnchannels(1)
        self._file.setsampwidth(2)
        self._file.setframerate(rate_hz)

    @property
    def seconds(self) -> float:
        """Of what was written."""
        return self.samples / self.rate_hz

    def write(self, samples: Tensor) -> None:
        """More of the sound, float [samples]; what is beyond full scale is cut off."""
        whole = (samples.detach().cpu().float().clamp(-1, 1) * FULL_SCALE).round().short()
        self._file.writeframes(whole.numpy().astype("<i2").tobytes())
        self.samples += len(whole)

    def close(self) -> None:
        """The header learns how long it has become."""
        self._file.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_place(path: Path) -> None:
    """Refuse a place for a wav file where none can be.

    Raises:
        DataError: another ending than ``.wav``, or a folder that is not there.
    """
    if path.suffix.lower() != ".wav":
        raise DataError(f"{path}: replies are written as wav; expected a name that ends with .wav")
    if not path.parent.is_dir():
        raise DataError(
            f"{path}: there is no folder {path.parent} to write it into (looked in {Path.cwd()})."
        )
    if path.is_dir():
        raise DataError(f"{path}: is a folder; expected the name of a file.")
