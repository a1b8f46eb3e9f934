"""How much one request may ask of the server, and all of them together. Each is refused by name.

What is measured before anything is decoded: the length of a body while it is read, the size of a picture in
its header. So memory is bounded by the limits and not by the callers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any

MB = 10**6

SOUNDS = ("wav", "flac", "mp3", "ogg")
"""Formats of sounds that are read unless others are named."""
KNOWN_SOUNDS = (*SOUNDS, "m4a", "webm")
"""All that can be; the last two need PyAV."""
HOST = re.compile(r"(\*\.)?[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*(:\d{1,5})?")
"""A host that may be fetched from; with ``*.`` all below it, with a port that one only."""


def limit(default: Any, sentence: str) -> Any:
    """A field with the sentence that ``tinymodal serve --help`` shows."""
    return field(default=default, metadata={"help": sentence})


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits of a server.

    Raises:
        ValueError: one is not above 0, or names what there is not.
    """

    body_mb: float = limit(32.0, "largest request, pictures and sounds in base64 included")
    bodies_mb: float = limit(256.0, "all requests that are being answered together")
    body_s: float = limit(30.0, "longest time for a request to arrive")
    request_s: float = limit(120.0, "longest time for an answer, waiting included")
    characters: int = limit(200_000, "of the texts of a request")
    schema_characters: int = limit(65_536, "of the JSON schema that a reply shall be of")
    pictures: int = limit(8, "of a request")
    pixels: int = limit(40_000_000, "of all pictures of a request together")
    audio_s: float = limit(120.0, "of all sounds of a request together")
    sound_formats: tuple[str, ...] = limit(SOUNDS, "formats of sounds that are read")
    new_tokens: int = limit(2048, "longest reply; also where a request does not say")
    choices: int = limit(4, "replies to one request (n)")
    rows: int = limit(16, "replies that are written at once")
    waiting: int = limit(64, "replies that may wait for their turn; more are refused with 429")
    image_hosts: tuple[str, ...] = limit((), "hosts whose pictures are fetched; none: no picture is")
    image_mb: float = limit(10.0, "largest picture that is fetched")
    image_s: float = limit(10.0, "longest time to fetch one")
    drain_s: float = limit(30.0, "time that begun answers have when the server is stopped")

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, tuple) and not 0 < value < math.inf:
                raise ValueError(f"{each.name} must be above 0 and finite, got {value}")
        for name in self.sound_formats:
            if name not in KNOWN_SOUNDS:
                raise ValueError(f"sound_formats: {name!r} is not one of {', '.join(KNOWN_SOUNDS)}")
        for host in self.image_hosts:
            if not HOST.fullmatch(host):
                raise ValueError(
                    f"image_hosts: {host!r} is no host; expected images.example.org, *.example.org or "
                    f"example.org:8080"
                )

    @property
    def body_bytes(self) -> int:
        """``body_mb`` in bytes."""
        return int(self.body_mb * MB)

    @property
    def bodies_bytes(self) -> int:
        """``bodies_mb`` in bytes; at least one whole request."""
        return max(int(self.bodies_mb * MB), self.body_bytes)

    @property
    def requests(self) -> int:
        """Requests that are let in at once: those that can be written and wait, and a few that are read."""
        return self.rows + self.waiting + 8
