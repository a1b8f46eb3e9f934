"""What a request says, as the conversation that the model reads: texts, pictures, sounds, turns.

Media come as bytes and are looked at before they are decoded: the first bytes must be those of a format that
was asked for, a picture's header must not promise too many pixels, and only as much of a sound is decoded as
a request may have. They are decoded here, so that what is wrong with them is told with their place in the
request, and so that nothing behind this room ever opens what a stranger sent.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tinymodal.core.types import Audio, Image, Message, Part, Role, Text
from tinymodal.infer.grammar_trial import TrialTimeout, tried
from tinymodal.infer.sampling import Sampling
from tinymodal.serve.errors import ApiError, invalid
from tinymodal.serve.limits import Limits
from tinymodal.serve.protocol import (
    AudioPart,
    ChatRequest,
    ImagePart,
    TextPart,
)

if TYPE_CHECKING:
    import PIL.Image
    from torch import Tensor

PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What Pillow may take a picture for. It knows some forty formats, and every decoder is a way in."""
DATA_URL = re.compile(r"data:[\w.+-]{0,64}(?:/[\w.+-]{1,64})?(?:;[\w.+=-]{1,64}){0,4};base64,", re.ASCII)


def addresses(asked: ChatRequest) -> dict[str, str]:
    """The pictures that lie elsewhere: address -> its place in the request.

    Raises:
        ApiError: an address is neither http, https nor data.
    """
    found: dict[str, str] = {}
    for place, part in _parts(asked):
        if isinstance(part, ImagePart):
            url = part.image_url.url
            if re.match(r"https?:", url, re.IGNORECASE):
                found.setdefault(url, f"{place}.image_url.url")
            elif not url.startswith("data:"):
                raise invalid(
                    f"{place}: a picture is data:image/png;base64,... or an http address; no file is read",
                    f"{place}.image_url.url",
                )
    return found


def _parts(asked: ChatRequest) -> list[tuple[str, TextPart | ImagePart | AudioPart]]:
    """All parts of all messages, each with its place; a text without parts is one."""
    found: list[tuple[str, TextPart | ImagePart | AudioPart]] = []
    for m, message in enumerate(asked.messages):
        place = f"messages.{m}.content"
        if isinstance(message.content, str):
            found.append((place, TextPart(type="text", text=message.content)))
        else:
            found += [(f"{place}.{p}", part) for p, part in enumerate(message.content or ())]
    return found


def check_counts(asked: ChatRequest, limits: Limits) -> None:
    """Refuse what is too much before anything of it is fetched or decoded.

    Raises:
        ApiError: names the limit.
    """
    parts = [part for _, part in _parts(asked)]
    pictures = sum(isinstance(part, ImagePart) for part in parts)
    if pictures > limits.pictures:
        raise invalid(f"{pictures} pictures; a request may have {limits.pictures}", "messages")
    check_text(sum(len(part.text) for part in parts if isinstance(part, TextPart)), limits, "messages")


def check_text(characters: int, limits: Limits, param: str) -> None:
    """Refuse a longer text.

    Raises:
        ApiError: it is.
    """
    if characters > limits.characters:
        raise invalid(f"{characters:,} characters of text; a request may have {limits.characters:,}", param)


def conversation(
    asked: ChatRequest, fetched: Mapping[str, bytes], limits: Limits, rate_hz: int
) -> tuple[Message, ...]:
    """The messages as the encoder takes them, with decoded media.

    Turns of one side that follow each other are joined: some clients send a question in several.

    Args:
        asked: the request.
        fetched: what lies at its :func:`addresses`.
        limits: of one request.
        rate_hz: of the samples that the model hears.

    Raises:
        ApiError: names the part that is wrong.
    """
    media = Media(limits, rate_hz)
    turns: list[tuple[Role, list[Part]]] = []
    for m, message in enumerate(asked.messages):
        role: Role = "system" if message.role == "developer" else message.role
        place = f"messages.{m}.content"
        parts: list[Part] = []
        if isinstance(message.content, str):
            parts.append(Text(message.content))
        else:
            for p, part in enumerate(message.content or ()):
                parts.append(_read(part, f"{place}.{p}", fetched, media))
        if turns and turns[-1][0] == role:
            turns[-1][1].extend([Text("\n"), *parts])
        else:
            turns.append((role, parts))
    return tuple(Message(role, tuple(parts)) for role, parts in turns)


def _read(
    part: TextPart | ImagePart | AudioPart, place: str, fetched: Mapping[str, bytes], media: Media
) -> Part:
    if isinstance(part, TextPart):
        return Text(part.text)
    if isinstance(part, AudioPart):
        place = f"{place}.input_audio.data"
        samples = media.sound(_decoded(part.input_audio.data, place), place)
        return Audio(samples, media.rate_hz)
    place, url = f"{place}.image_url.url", part.image_url.url
    data = fetched.get(url)
    if data is None:
        head = DATA_URL.match(url[:512])
        if head is None:
            raise invalid(f"{place}: expected data:image/png;base64,...", place)
        data = _decoded(url[head.end() :], place)
    return Image(media.picture(data, place))


def _decoded(text: str, place: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"{place}: this is not base64", place) from None
    if not data:
        raise invalid(f"{place}: it is empty", place)
    return data


def sampling_of(asked: ChatRequest, limits: Limits) -> list[Sampling]:
    """How each of the ``n`` replies chooses its words.

    Without ``temperature`` the likeliest word is taken, as everywhere in TinyModal (OpenAI's default is 1).
    Without ``seed`` every request draws another one.

    Raises:
        ApiError: more is asked than the limits allow, or the numbers contradict each other.
    """
    num = asked.n or 1
    if num > limits.choices:
        raise invalid(f"n is {num}; a request may have {limits.choices}", "n")
    most = asked.max_completion_tokens or asked.max_tokens or limits.new_tokens
    if most > limits.new_tokens:
        raise invalid(f"max_tokens is {most:,}; a reply may have {limits.new_tokens:,}", "max_tokens")
    schema = json_schema_of(asked, limits)
    seed = asked.seed if asked.seed is not None else time.time_ns() & 0x7FFF_FFFF_FFFF
    try:
        return [
            Sampling(
                max_new_tokens=most,
                min_new_tokens=min(asked.min_tokens or 0, most),
                temperature=asked.temperature or 0.0,
                top_p=1.0 if asked.top_p is None else asked.top_p,
                top_k=asked.top_k or 0,
                min_p=asked.min_p or 0.0,
                repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
                seed=(seed + i) % 2**63,
                stop=asked.stops,
                json_schema=schema,
                num_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            )
            for i in range(num)
        ]
    except ValueError as error:
        raise invalid(str(error)) from None


def json_schema_of(asked: ChatRequest, limits: Limits) -> str | None:
    """The schema that the reply shall be JSON of, as text; None: of none. Not looked at yet.

    Raises:
        ApiError: it is too long.
    """
    if asked.json_schema is None:
        return None
    try:
        schema = json.dumps(asked.json_schema, ensure_ascii=False)
    except (ValueError, RecursionError):
        raise invalid("a number or a depth that is beyond all schemas", SCHEMA) from None
    if len(schema) > limits.schema_characters:
        raise invalid(
            f"{len(schema):,} characters of JSON schema; a request may have {limits.schema_characters:,}",
            SCHEMA,
        )
    return schema


def check_schema(json_schema: str) -> None:
    """Refuse a schema that replies cannot be held to, or that takes too long to find out about.

    Raises:
        ApiError: it is.
    """
    try:
        fault = tried(json_schema, SCHEMA_S)
    except TrialTimeout:
        raise invalid(
            f"this JSON schema took longer than {SCHEMA_S:g} s to read; fewer or simpler patterns help",
            SCHEMA,
        ) from None
    if fault:
        raise invalid(f"a reply cannot be held to this JSON schema: {fault}", SCHEMA)


SCHEMA = "response_format.json_schema.schema"
SCHEMA_S = 5.0
"""Reading a schema of 65,000 characters took 0.6 s at most of those that can be read at all."""


class Media:
    """Decodes the pictures and sounds of one request, as long as it may have more."""

    def __init__(self, limits: Limits, rate_hz: int) -> None:
        self.limits, self.rate_hz = limits, rate_hz
        self.pixels, self.audio_s = limits.pixels, limits.audio_s
        """What is left."""

    def picture(self, data: bytes, place: str) -> PIL.Image.Image:
        """A decoded picture: RGB, upright.

        Raises:
            ApiError: it is none, broken, or has more pixels than are left.
        """
        import PIL
        import PIL.Image

        from tinymodal.model.picture_file import load_image

        try:
            opened = PIL.Image.open(io.BytesIO(data), formats=PICTURES)
        except PIL.Image.DecompressionBombError:
            raise self._too_many_pixels(place) from None
        except PIL.UnidentifiedImageError:
            raise invalid(
                f"{place}: not a picture that can be read; expected {', '.join(PICTURES)}", place
            ) from None
        except Exception:
            # Decoders raise anything on a broken file: OSError, SyntaxError, struct.error, zlib.error.
            raise invalid(f"{place}: the picture is broken in its header", place) from None
        with opened:
            if opened.width * opened.height > self.pixels:
                raise self._too_many_pixels(place)
            self.pixels -= opened.width * opened.height
            try:
                return load_image(opened, self.limits.pixels, place)
            except ValueError as error:
                raise invalid(str(error), place) from None

    def _too_many_pixels(self, place: str) -> ApiError:
        return invalid(
            f"{place}: too large; the pictures of a request may have {self.limits.pixels:,} pixels together",
            place,
        )

    def sound(self, data: bytes, place: str) -> Tensor:
        """Decoded samples at ``rate_hz``, float32 [samples].

        Raises:
            ApiError: it is none, broken, of a format that is not read, or longer than what is left.
        """
        from tinymodal.model.audio import load_sound

        found, allowed = format_of(data), self.limits.sound_formats
        if found not in allowed:
            what = "not a sound that can be read" if found is None else f"{found} is not read here"
            raise invalid(f"{place}: {what}; expected {', '.join(allowed)}", place)
        if self.audio_s <= 0:
            raise self._too_long(place)
        try:
            samples = load_sound(data, max_s=self.audio_s, to_hz=self.rate_hz, name=place)
        except ValueError as error:
            if "the limit is" in str(error):
                raise self._too_long(place) from None
            # What follows the semicolon is advice on files of one's own.
            raise invalid(str(error).partition(";")[0], place) from None
        self.audio_s -= len(samples) / self.rate_hz
        return samples

    def _too_long(self, place: str) -> ApiError:
        return invalid(
            f"{place}: too long; the sounds of a request may last {self.limits.audio_s:g} s together", place
        )


def format_of(data: bytes) -> str | None:
    """What a sound is by its first bytes: ``wav``, ``flac``, ``mp3``, ``ogg``, ``m4a``, ``webm``, or None."""
    if data[:4] in (b"RIFF", b"RIFX", b"RF64") and data[8:12] == b"WAVE":
        return "wav"
    if data[:4] == b"fLaC":
        return "flac"
    if data[:4] == b"OggS":
        return "ogg"
    if data[4:8] == b"ftyp":
        return "m4a"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "webm"
    # An mp3 begins with its tag, or with eleven set bits and a layer that is not 0 (that would be AAC).
    if data[:3] == b"ID3" or (
        len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0 and data[1] & 0x06
    ):
        return "mp3"
    return None
