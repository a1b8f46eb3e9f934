"""Where the pictures and sounds of a data file lie, and what a row may say to mean one.

Nothing is decoded here; that it exists is checked.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal, Protocol

import PIL.Image

from tinymodal.core.errors import DataError
from tinymodal.core.types import Audio, Image, Speech

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["picture", "sound"]


class Members(Protocol):
    """The files that travel with one row, as in a shard."""

    def find(self, written: str) -> bytes | None:
        """The bytes of the one that a row means by ``written``; None if there is none."""
        ...

    def names(self) -> str:
        """All of them, for an error."""
        ...


@dataclass(frozen=True, slots=True)
class Folders:
    """Where the pictures and sounds of one data file may lie."""

    beside: Path
    """The folder of the data file: written paths are tried from here first."""
    images: Path | None = None
    """The source's ``images`` folder: written paths are tried from here, then by file name alone."""
    members: Members | None = None
    """What lies beside the row in its shard: it comes before any folder."""
    sounds: Path | None = None
    """The source's ``sounds`` folder, as ``images``."""

    def picture(self, value: object, row_id: str) -> Image:
        """The picture that a row's value stands for.

        Args:
            value: a path; a ``data:`` URL; a file's bytes; ``{"bytes": ..., "path": ...}`` as parquet holds
                pictures (bytes win); or a decoded PIL picture.
            row_id: named in the error.

        Raises:
            DataError: no such file, a web address, broken base64, or a value of another kind.
        """
        inner = _inner(value, row_id, "picture")
        if isinstance(inner, PIL.Image.Image):
            return Image(inner)
        return Image(self._file(inner, row_id, "picture"))

    def sound(self, value: object, row_id: str, part: Mapping[str, Any] | None = None) -> Audio:
        """The sound that a row's value stands for.

        Args:
            value: as of a picture; or samples, ``{"array": ..., "sampling_rate": ...}`` as ``datasets``
                decodes them.
            row_id: named in the error.
            part: may say ``start_s`` and ``end_s``, which stretch of it is meant.

        Raises:
            DataError: as of a picture; samples without a rate; a stretch that is none.
        """
        source, rate_hz = self._sound(value, row_id)
        return Audio(source, rate_hz, *stretch_of(part or {}, row_id))

    def speech(self, value: object, row_id: str, part: Mapping[str, Any] | None = None) -> Speech:
        """The same as the sound of an answer; ``part`` may name its ``voice`` as well."""
        source, rate_hz = self._sound(value, row_id)
        voice = (part or {}).get("voice")
        if voice is not None and not (isinstance(voice, str) and voice):
            raise DataError(f"{row_id}: voice is {str(voice)[:40]!r}; expected a name, or no such key")
        return Speech(source, rate_hz, *stretch_of(part or {}, row_id), voice)

    def find(self, written: str, row_id: str, kind: Kind = "picture") -> Path:
        """The file that ``written`` means; beside the data file, under the kind's folder, by name there."""
        if not written.strip():
            raise DataError(
                f"{row_id}: the {kind}'s path is empty; write a path, or leave the key out (null)"
            )
        key = "images" if kind == "picture" else "sounds"
        folder = self.images if kind == "picture" else self.sounds
        tried = [self.beside / written]
        if folder is not None:
            # Data sets travel without their folders: the last try finds "./elsewhere/0001.jpg" as
            # images/0001.jpg.
            tried += [folder / written, folder / PureWindowsPath(written).name]
        for path in tried:
            if _is_file(path):
                return path
        where = ", ".join(dict.fromkeys(_short(str(path)) for path in tried))
        if self.members is not None:
            where = f"the members of the sample ({_short(self.members.names())}), {where}"
        advice = f"name the {kind}s' folder in the source's {key} key" if folder is None else "put it there"
        raise DataError(
            f"{row_id}: {kind} {_short(written)!r} not found; tried {where}. Correct the path, or {advice}"
        )

    def _sound(self, value: object, row_id: str) -> tuple[Path | bytes | Tensor, int | None]:
        if isinstance(value, Mapping) and value.get("array") is not None:
            return _samples(value, row_id)
        return self._file(_inner(value, row_id, "sound"), row_id, "sound"), None

    def _file(self, value: object, row_id: str, kind: Kind) -> Path | bytes:
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        if not isinstance(value, str | Path):
            hint = "" if kind == "picture" else ', or {"array": samples, "sampling_rate": Hz}'
            raise DataError(
                f"{row_id}: a {kind} given as {type(value).__name__}; expected a path, a data: URL, or "
                f"bytes{hint}"
            )
        written = str(value)
        if written.startswith("data:"):
            return _decoded(written, row_id, kind)
        if written.startswith(("http://", "https://")):
            raise DataError(
                f"{row_id}: the {kind} is a web address ({_short(written)}); nothing is downloaded while "
                f"training. Download it and write its path"
            )
        written = written.removeprefix("file://")
        if self.members is not None and (raw := self.members.find(written)) is not None:
            return raw
        return self.find(written, row_id, kind)


def in_base64(body: str, row_id: str, kind: Kind) -> bytes:
    """The bytes that stand there in base64."""
    try:
        if not body:
            raise binascii.Error("it is empty")
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"{row_id}: the {kind}'s base64 cannot be read ({error}); expected a whole file. Write it so, or "
            f"write a path"
        ) from error


def _inner(value: object, row_id: str, kind: Kind) -> object:
    """Of a struct of parquet what it holds; any other value itself."""
    if not isinstance(value, Mapping):
        return value
    inner = next((value[key] for key in ("bytes", "path") if value.get(key) is not None), None)
    if inner is None:
        found = ", ".join(sorted(map(str, value))) or "nothing"
        raise DataError(
            f"{row_id}: a {kind} with neither bytes nor path (it has {found}); give it one of them"
        )
    return inner


def _samples(value: Mapping[str, Any], row_id: str) -> tuple[Tensor, int]:
    import numpy as np
    import torch

    rate_hz = value.get("sampling_rate")
    if not isinstance(rate_hz, int) or isinstance(rate_hz, bool):
        raise DataError(
            f"{row_id}: samples with the sampling_rate {rate_hz!r}; expected a whole number of Hz. Add it"
        )
    try:
        samples = np.asarray(value["array"], dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"{row_id}: array holds no samples ({error}); expected a list of numbers") from error
    return torch.from_numpy(np.ascontiguousarray(samples)), rate_hz


def stretch_of(part: Mapping[str, Any], row_id: str) -> tuple[float | None, float | None]:
    """``start_s`` and ``end_s`` of a part.

    Raises:
        DataError: they are no seconds, or in the wrong order.
    """
    found = [part.get("start_s"), part.get("end_s")]
    for key, value in zip(("start_s", "end_s"), found, strict=True):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise DataError(
                f"{row_id}: {key} is {str(value)[:40]}; expected seconds, 0 or more, or no such key"
            )
    start, end = (None if value is None else float(value) for value in found)
    if end is not None and end <= (start or 0.0):
        raise DataError(
            f"{row_id}: end_s {end:g} is not behind start_s {start or 0.0:g}; correct one of them"
        )
    return start, end


def _decoded(url: str, row_id: str, kind: Kind) -> bytes:
    head, comma, body = url.partition(",")
    try:
        if not (comma and head.endswith(";base64") and body):
            raise binascii.Error("no ';base64,' part")
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        example = "image/png" if kind == "picture" else "audio/wav"
        raise DataError(
            f"{row_id}: the {kind}'s data: URL cannot be read ({error}); expected data:{example};base64,... "
            f"Write it so, or write a path"
        ) from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for the file system: somebody's base64 without "data:"
        return False


def _short(words: str) -> str:
    return words if len(words) <= 120 else f"{words[:117]}..."
