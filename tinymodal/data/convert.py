"""Turn one row of a data file into a ``Sample``: one function per row format, all of them in ``CONVERTERS``.

A converter is ``convert(row, *, row_id, images) -> Sample``. Yours is named in a recipe as ``format =
"my_rows.py:convert"`` and finds its pictures with ``images.picture(value, row_id)``, its sounds with
``images.sound(value, row_id)``. Rows that are mainly heard or spoken are in ``data/sound_rows.py``.

Words are kept letter by letter, also the newline that LLaVA writes after ``<image>``: a converter that tidies
changes what the model learns. Nothing is guessed and nothing is repaired: a row that contradicts itself is a
``DataError`` of one line that names the file and the row. No picture and no sound is decoded here; that it
exists is checked.

Rows are conversations to learn from, so each must end with the assistant's turn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from tinymodal.core.errors import DataError
from tinymodal.core.types import ROLES, Audio, Image, Medium, Message, Part, Role, Sample, Text
from tinymodal.data.folders import Folders, Members, in_base64, stretch_of
from tinymodal.data.row import (
    PLACE,
    SOUND_PLACE,
    Row,
    as_sample,
    kind_of,
    listed,
    many,
    named,
    refuse_place,
    turns_of,
    words_of,
)
from tinymodal.data.sound_rows import asr, audio_caption, audio_qa, spoken, tts

__all__ = [
    "CONVERTERS",
    "Convert",
    "Folders",
    "Members",
    "caption",
    "llava",
    "messages",
    "preference",
    "vqa",
]


class Convert(Protocol):
    """What every row format is: a function from a row to a sample."""

    def __call__(self, row: Row, *, row_id: str, images: Folders) -> Sample: ...


def llava(row: Row, *, row_id: str, images: Folders) -> Sample:
    """LLaVA's rows: ``image``, a path or a list, and ``conversations``, turns of ``from`` and ``value``.

    ``from`` is human, gpt or system. Each ``<image>`` in the words is the place of the next picture; a row
    without ``image`` is words only. With ``audio``, a path or a list, each ``<audio>`` is the place of the
    next sound; in a row without, it is words.
    """
    turns = turns_of(row, "conversations", row_id, instead="messages")
    values = [named(turn, "value", str, f"{row_id}: turn {n}") for n, turn in enumerate(turns, 1)]
    given: dict[str, list[Any]] = {PLACE: listed(row.get("image"))}
    if row.get("audio") is not None:
        given[SOUND_PLACE] = listed(row["audio"])
    for place, media in given.items():
        noun, key = ("picture", "image") if place == PLACE else ("sound", "audio")
        places = sum(value.count(place) for value in values)
        if places != len(media):
            raise DataError(
                f"{row_id}: {many(len(media), noun)} but {many(places, place + ' place')} in the words; "
                f"expected one place for each {noun}, in order. Add or remove {place} in a value, or a path "
                f"in {key}"
            )
    found: dict[str, Iterator[Medium]] = {PLACE: iter([images.picture(v, row_id) for v in given[PLACE]])}
    if SOUND_PLACE in given:
        found[SOUND_PLACE] = iter([images.sound(value, row_id) for value in given[SOUND_PLACE]])
    messages = []
    for number, (turn, value) in enumerate(zip(turns, values, strict=True), 1):
        speaker = named(turn, "from", str, f"{row_id}: turn {number}")
        if speaker not in _LLAVA_ROLES:
            known = ", ".join(_LLAVA_ROLES)
            raise DataError(
                f"{row_id}: turn {number} is from {speaker!r}; expected one of {known}. Rename it"
            )
        messages.append(Message(_LLAVA_ROLES[speaker], tuple(_cut(value, found))))
    return as_sample(messages, row, row_id)


def messages(row: Row, *, row_id: str, images: Folders) -> Sample:
    """OpenAI style: ``{"messages": [{"role", "content": words or parts}]}``.

    A part is ``{"type": "text", "text"}``, ``{"type": "image", "image" | "path" | "bytes"}``, or ``{"type":
    "image_url", "image_url": {"url": path or data: URL}}``. ``{"type": "image"}`` alone takes the next of the
    row's ``images`` list. ``"train": false`` on a message keeps a reply out of the loss. An image part may
    have ``max_tiles``, ``fit_pixels`` and ``targets``, see ``Image``; ``meta`` of the row may hold words.

    Sounds are ``{"type": "audio", "audio" | "path" | "bytes"}``, alone the next of the row's ``audios`` list,
    or ``{"type": "input_audio", "input_audio": {"data": base64}}``; ``start_s`` and ``end_s`` say which
    stretch. ``{"type": "speech", "speech" | "path" | "bytes", "voice"}`` is how the assistant's turn sounds.
    """
    shown: list[Medium] = [images.picture(value, row_id) for value in listed(row.get("images"))]
    heard: list[Medium] = [images.sound(value, row_id) for value in listed(row.get("audios"))]
    bare = _Bare(iter(shown), iter(heard))
    turns = []
    for number, turn in enumerate(turns_of(row, "messages", row_id, instead="conversations"), 1):
        where = f"{row_id}: turn {number}"
        role = named(turn, "role", str, where)
        if role not in ROLES:
            raise DataError(f"{where} has the role {role!r}; expected one of {', '.join(ROLES)}. Rename it")
        train = turn.get("train")
        if train is not None and not isinstance(train, bool):
            raise DataError(f"{where}: train is {train!r}; expected true, false, or no such key")
        content = turn.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence) or isinstance(content, bytes):
            raise DataError(
                f"{where}: content is {kind_of(content)}; expected words or a list of parts. Write it so"
            )
        parts = tuple(_part(part, bare, images, row_id, number) for part in content)
        turns.append(Message(role, tuple(part for part in parts if part != Text("")), train))
    for noun, kind, given, rest in (
        ("picture", "image", shown, bare.images),
        ("sound", "audio", heard, bare.audios),
    ):
        if left := len(list(rest)):
            raise DataError(
                f"{row_id}: {many(len(given), noun)} in {kind}s but "
                f"{many(len(given) - left, kind + ' part')} without "
                f'its own; expected as many. Add a part {{"type": "{kind}"}} where each belongs'
            )
    sample = as_sample(turns, row, row_id)
    noted = row.get("meta")
    if not isinstance(noted, Mapping):
        return sample
    words = {str(key): value for key, value in noted.items() if isinstance(value, str)}
    return replace(sample, meta={**words, **sample.meta})


def caption(row: Row, *, row_id: str, images: Folders) -> Sample:
    """``{"image", "caption" or "text"}``: the picture is the user's turn, the words are the reply."""
    key = "text" if row.get("caption") is None and "text" in row else "caption"
    words = words_of(row, key, row_id)
    pictures = tuple(_pictures(row, row_id, images))
    if not pictures:
        raise DataError(
            f"{row_id}: a caption without a picture; expected a path in image. Add it, or remove the row"
        )
    return as_sample([Message("user", pictures), Message("assistant", (Text(words),))], row, row_id)


def vqa(row: Row, *, row_id: str, images: Folders) -> Sample:
    """``{"image", "question", "answer"}``, or ``"answers"``: the most frequent one, the first of equals.

    Answers may be words or ``{"answer": words}`` as in VQAv2. ``"image": null`` asks without a picture.
    """
    question = words_of(row, "question", row_id)
    if row.get("answer") is None and row.get("answers") is not None:
        values = [v.get("answer") if isinstance(v, Mapping) else v for v in listed(row["answers"])]
        if not values:
            raise DataError(f"{row_id}: answers is empty; expected at least one. Add one, or remove the row")
        given = [words_of({"answers": value}, "answers", row_id) for value in values]
        # Counter keeps the order of arrival among equals, so the choice does not depend on a hash.
        answer = Counter(given).most_common(1)[0][0]
    else:
        answer = words_of(row, "answer", row_id)
    asked: tuple[Part, ...] = (*_pictures(row, row_id, images), Text(question))
    return as_sample([Message("user", asked), Message("assistant", (Text(answer),))], row, row_id)


def preference(row: Row, *, row_id: str, images: Folders) -> Sample:
    """Two answers to one question, ``chosen`` and ``rejected``: words, or turns.

    The question is ``question`` (or ``prompt``) in words with the row's ``image``, as in RLHF-V; or turns in
    ``prompt`` (or ``messages``), as :func:`messages` reads them. Turns of an answer are what follows these,
    or the whole conversation where there is no question beside it.
    """
    asked = next((row[key] for key in ("prompt", "messages", "question") if row.get(key) is not None), None)
    shown = listed(row.get("images") if row.get("images") is not None else row.get("image"))
    heard = listed(row.get("audios") if row.get("audios") is not None else row.get("audio"))
    if isinstance(asked, str):
        places = [*({"type": "image"} for _ in shown), *({"type": "audio"} for _ in heard)]
        asked = [{"role": "user", "content": [*places, {"type": "text", "text": asked}]}]
    if asked is not None and not isinstance(asked, list | tuple):
        raise DataError(f"{row_id}: the question is {kind_of(asked)}; expected words or a list of turns")
    samples = []
    for key in ("chosen", "rejected"):
        answer = row.get(key)
        if answer is None:
            found = ", ".join(map(str, row)) or "nothing"
            raise DataError(f"{row_id}: no {key} answer in the row (it has {found}); add it")
        if isinstance(answer, str):
            if asked is None:
                raise DataError(f"{row_id}: {key} is words, but nothing was asked; add question or prompt")
            answer = [{"role": "assistant", "content": answer}]
        if isinstance(answer, Mapping):
            answer = [answer]
        turns = [*(asked or ()), *turns_of({**row, key: answer}, key, row_id, "messages")]
        try:
            whole = {**row, "messages": turns, "images": shown, "audios": heard}
            samples.append(messages(whole, row_id=row_id, images=images))
        except DataError as error:
            raise DataError(str(error).replace(f"{row_id}:", f"{row_id}: {key}:", 1)) from error
    chosen, rejected = samples
    if not alike(list(chosen.media()), list(rejected.media())):
        raise DataError(
            f"{row_id}: the chosen and the rejected answer show different pictures or play different sounds; "
            f"expected the same ones"
        )
    if _words(chosen) == _words(rejected):
        raise DataError(f"{row_id}: the chosen and the rejected answer are the same; remove the row")
    return replace(chosen, rejected=rejected.messages)


def alike(some: Sequence[Medium], others: Sequence[Medium]) -> bool:
    """Whether two lists of pictures and sounds are the same, samples in memory number by number."""
    import torch

    if len(some) != len(others):
        return False
    for one, other in zip(some, others, strict=True):
        if isinstance(one.source, torch.Tensor) and isinstance(other.source, torch.Tensor):
            if not torch.equal(one.source, other.source):
                return False
            one, other = replace(one, source=b""), replace(other, source=b"")
        if one != other:
            return False
    return True


def _words(sample: Sample) -> list[tuple[Role, bool | None, list[Part | None]]]:
    """What two answers to one question may differ in: all but pictures and sounds, which are alike."""
    return [
        (turn.role, turn.train, [part if isinstance(part, Text) else None for part in turn.parts])
        for turn in sample.messages
    ]


CONVERTERS: dict[str, Convert] = {
    "llava": llava,
    "messages": messages,
    "caption": caption,
    "vqa": vqa,
    "preference": preference,
    "asr": asr,
    "audio_qa": audio_qa,
    "audio_caption": audio_caption,
    "spoken": spoken,
    "tts": tts,
}

_LLAVA_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}


class _Bare(NamedTuple):
    """What parts without a file of their own take the next of."""

    images: Iterator[Medium]
    audios: Iterator[Medium]


def _part(part: object, bare: _Bare, images: Folders, row_id: str, number: int) -> Part:
    where = f"{row_id}: turn {number}"
    if not isinstance(part, Mapping):
        raise DataError(
            f'{where}: a part is {kind_of(part)}; expected an object such as {{"type": "text", "text": ...}}'
        )
    match part.get("type"):
        case "text":
            words = named(part, "text", str, where)
            refuse_place(words, where)
            return Text(words)
        case "image":
            own = _own(part, "image")
            picture = next(bare.images, None) if own is None else images.picture(own, row_id)
            if not isinstance(picture, Image):
                raise DataError(
                    f"{where}: more image parts than pictures; expected a path in the part (image) or one "
                    f"more in the row's images list. Add it, or remove the part"
                )
            return _as_asked(picture, part, where)
        case "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, Mapping) else url
            if url is None:
                raise DataError(
                    f'{where}: an image_url part without url; expected {{"image_url": {{"url": ...}}}}'
                )
            return images.picture(url, row_id)
        case "audio":
            own = _own(part, "audio")
            if own is not None:
                return images.sound(own, row_id, part)
            sound = next(bare.audios, None)
            if not isinstance(sound, Audio):
                raise DataError(
                    f"{where}: more audio parts than sounds; expected a path in the part (audio) or one more "
                    f"in the row's audios list. Add it, or remove the part"
                )
            start_s, end_s = stretch_of(part, row_id)
            return replace(sound, start_s=start_s, end_s=end_s)
        case "input_audio":
            inner = part.get("input_audio")
            body = inner.get("data") if isinstance(inner, Mapping) else None
            if not isinstance(body, str):
                raise DataError(
                    f'{where}: an input_audio part without data; expected {{"input_audio": {{"data": base64, '
                    f'"format": "wav"}}}}'
                )
            # Its format is not needed: a sound is known by its first bytes.
            return images.sound(in_base64(body, row_id, "sound"), row_id, part)
        case "speech":
            own = _own(part, "speech")
            if own is None:
                raise DataError(f"{where}: a speech part without a sound; expected a path in it (speech)")
            return images.speech(own, row_id, part)
        case other:
            raise DataError(
                f"{where}: a part of type {other!r}; expected text, image, image_url, audio, input_audio or "
                f"speech. Rename it, or leave it out"
            )


def _own(part: Row, kind: str) -> Any:
    """The file of its own that a part has; None if it has none."""
    keys = (kind, "bytes", "path", "url")
    return next((part[key] for key in keys if part.get(key) is not None), None)


def _as_asked(picture: Image, part: Row, where: str) -> Image:
    """The picture with what its part says about its size and, for made data, its contents."""
    tiles, pixels, targets = (part.get(key) for key in ("max_tiles", "fit_pixels", "targets"))
    if tiles is not None and not (_whole(tiles) and tiles > 0):
        raise DataError(f"{where}: max_tiles is {tiles!r}; expected a whole number above 0, or no such key")
    if pixels is not None and not (_wholes(pixels) and len(pixels) == 2):
        raise DataError(
            f"{where}: fit_pixels is {str(pixels)[:40]}; expected two whole numbers, the least and the most, "
            f"or no such key"
        )
    if targets is not None and not (isinstance(targets, list) and all(map(_wholes, targets))):
        raise DataError(
            f"{where}: targets is {str(targets)[:40]}; expected a list of whole numbers for each token, or "
            f"no such key"
        )
    if tiles is None and pixels is None and targets is None:
        return picture
    cells = None if targets is None else tuple(tuple(cell) for cell in targets)
    return Image(picture.source, cells, tiles, None if pixels is None else (pixels[0], pixels[1]))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wholes(value: object) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


def _cut(words: str, found: Mapping[str, Iterator[Medium]]) -> Iterator[Part]:
    """The words with the next picture or sound at each place."""
    for piece in re.split(f"({'|'.join(found)})", words):
        if piece in found:
            yield next(found[piece])
        elif piece:
            yield Text(piece)


def _pictures(row: Row, row_id: str, images: Folders) -> Iterator[Image]:
    if "image" not in row:
        found = ", ".join(map(str, row)) or "nothing"
        raise DataError(
            f"{row_id}: no image in the row (it has {found}); expected a path. Add it, or rename the key"
        )
    for value in listed(row["image"]):
        yield images.picture(value, row_id)
