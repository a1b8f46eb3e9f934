"""Turn one row of a data file into a ``Sample``: one function per row format, all of them in ``CONVERTERS``.

A converter is ``convert(row, *, row_id, images) -> Sample``. Yours is named in a recipe as ``format =
"my_rows.py:convert"`` and finds its pictures with ``images.picture(value, row_id)``.

Words are kept letter by letter, also the newline that LLaVA writes after ``<image>``: a converter that tidies
changes what the model learns. Nothing is guessed and nothing is repaired: a row that contradicts itself is a
``DataError`` of one line that names the file and the row. No picture is decoded here; that it exists is
checked.

Rows are conversations to learn from, so each must end with the assistant's turn.
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol

import PIL.Image

from tinymodal.core.errors import DataError
from tinymodal.core.types import ROLES, Image, Message, Part, Role, Sample, Text

PLACE = "<image>"
"""How LLaVA rows write the place of a picture inside the words."""

Row = Mapping[str, Any]


class Convert(Protocol):
    """What every row format is: a function from a row to a sample."""

    def __call__(self, row: Row, *, row_id: str, images: Folders) -> Sample: ...


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
    """Where the pictures of one data file may lie."""

    beside: Path
    """The folder of the data file: written paths are tried from here first."""
    images: Path | None = None
    """The source's ``images`` folder: written paths are tried from here, then by file name alone."""
    members: Members | None = None
    """What lies beside the row in its shard: it comes before any folder."""

    def picture(self, value: object, row_id: str) -> Image:
        """The picture that a row's value stands for.

        Args:
            value: a path; a ``data:`` URL; a file's bytes; ``{"bytes": ..., "path": ...}`` as parquet holds
                pictures (bytes win); or a decoded PIL picture.
            row_id: named in the error.

        Raises:
            DataError: no such file, a web address, broken base64, or a value of another kind.
        """
        if isinstance(value, Mapping):
            inner = next((value[key] for key in ("bytes", "path") if value.get(key) is not None), None)
            if inner is None:
                found = ", ".join(sorted(map(str, value))) or "nothing"
                raise DataError(
                    f"{row_id}: a picture with neither bytes nor path (it has {found}); give it one of them"
                )
            value = inner
        if isinstance(value, bytes | bytearray | memoryview):
            return Image(bytes(value))
        if isinstance(value, PIL.Image.Image):
            return Image(value)
        if not isinstance(value, str | Path):
            raise DataError(
                f"{row_id}: a picture given as {type(value).__name__}; expected a path, a data: URL, or bytes"
            )
        written = str(value)
        if written.startswith("data:"):
            return Image(_decoded(written, row_id))
        if written.startswith(("http://", "https://")):
            raise DataError(
                f"{row_id}: the picture is a web address ({_short(written)}); nothing is downloaded while "
                f"training. Download it and write its path"
            )
        written = written.removeprefix("file://")
        if self.members is not None and (raw := self.members.find(written)) is not None:
            return Image(raw)
        return Image(self.find(written, row_id))

    def find(self, written: str, row_id: str) -> Path:
        """The file that ``written`` means; beside the data file, under ``images``, by name in ``images``."""
        if not written.strip():
            raise DataError(
                f"{row_id}: the picture's path is empty; write a path, or leave the key out (null)"
            )
        tried = [self.beside / written]
        if self.images is not None:
            # Data sets travel without their folders: the last try finds "./elsewhere/0001.jpg" as
            # images/0001.jpg.
            tried += [self.images / written, self.images / PureWindowsPath(written).name]
        for path in tried:
            if _is_file(path):
                return path
        where = ", ".join(dict.fromkeys(_short(str(path)) for path in tried))
        if self.members is not None:
            where = f"the members of the sample ({_short(self.members.names())}), {where}"
        advice = (
            "name the pictures' folder in the source's images key" if self.images is None else "put it there"
        )
        raise DataError(
            f"{row_id}: picture {_short(written)!r} not found; tried {where}. Correct the path, or {advice}"
        )


def llava(row: Row, *, row_id: str, images: Folders) -> Sample:
    """LLaVA's rows: ``image``, a path or a list, and ``conversations``, turns of ``from`` and ``value``.

    ``from`` is human, gpt or system. Each ``<image>`` in the words is the place of the next picture; a row
    without ``image`` is words only.
    """
    turns = _turns(row, "conversations", row_id, instead="messages")
    given = _listed(row.get("image"))
    values = [_named(turn, "value", str, f"{row_id}: turn {n}") for n, turn in enumerate(turns, 1)]
    places = sum(value.count(PLACE) for value in values)
    if places != len(given):
        raise DataError(
            f"{row_id}: {_many(len(given), 'picture')} but {_many(places, PLACE + ' place')} in the words; "
            f"expected one place for each picture, in order. Add or remove {PLACE} in a value, or a path in "
            f"image"
        )
    pictures = iter([images.picture(value, row_id) for value in given])
    messages = []
    for number, (turn, value) in enumerate(zip(turns, values, strict=True), 1):
        speaker = _named(turn, "from", str, f"{row_id}: turn {number}")
        if speaker not in _LLAVA_ROLES:
            known = ", ".join(_LLAVA_ROLES)
            raise DataError(
                f"{row_id}: turn {number} is from {speaker!r}; expected one of {known}. Rename it"
            )
        messages.append(Message(_LLAVA_ROLES[speaker], tuple(_cut(value, pictures))))
    return _sample(messages, row, row_id)


def messages(row: Row, *, row_id: str, images: Folders) -> Sample:
    """OpenAI style: ``{"messages": [{"role", "content": words or parts}]}``.

    A part is ``{"type": "text", "text"}``, ``{"type": "image", "image" | "path" | "bytes"}``, or ``{"type":
    "image_url", "image_url": {"url": path or data: URL}}``. ``{"type": "image"}`` alone takes the next of the
    row's ``images`` list. ``"train": false`` on a message keeps a reply out of the loss. An image part may
    have ``max_tiles``, ``fit_pixels`` and ``targets``, see ``Image``; ``meta`` of the row may hold words.
    """
    given = [images.picture(value, row_id) for value in _listed(row.get("images"))]
    bare = iter(given)
    turns = []
    for number, turn in enumerate(_turns(row, "messages", row_id, instead="conversations"), 1):
        where = f"{row_id}: turn {number}"
        role = _named(turn, "role", str, where)
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
                f"{where}: content is {_kind(content)}; expected words or a list of parts. Write it so"
            )
        parts = tuple(_part(part, bare, images, row_id, number) for part in content)
        turns.append(Message(role, tuple(part for part in parts if part != Text("")), train))
    left = len(list(bare))
    if left:
        raise DataError(
            f"{row_id}: {_many(len(given), 'picture')} in images but "
            f"{_many(len(given) - left, 'image part')} without "
            f'its own; expected as many. Add a part {{"type": "image"}} where each belongs'
        )
    sample = _sample(turns, row, row_id)
    noted = row.get("meta")
    if not isinstance(noted, Mapping):
        return sample
    words = {str(key): value for key, value in noted.items() if isinstance(value, str)}
    return replace(sample, meta={**words, **sample.meta})


def caption(row: Row, *, row_id: str, images: Folders) -> Sample:
    """``{"image", "caption" or "text"}``: the picture is the user's turn, the words are the reply."""
    key = "text" if row.get("caption") is None and "text" in row else "caption"
    words = _words(row, key, row_id)
    pictures = tuple(_pictures(row, row_id, images))
    if not pictures:
        raise DataError(
            f"{row_id}: a caption without a picture; expected a path in image. Add it, or remove the row"
        )
    return _sample([Message("user", pictures), Message("assistant", (Text(words),))], row, row_id)


def vqa(row: Row, *, row_id: str, images: Folders) -> Sample:
    """``{"image", "question", "answer"}``, or ``"answers"``: the most frequent one, the first of equals.

    Answers may be words or ``{"answer": words}`` as in VQAv2. ``"image": null`` asks without a picture.
    """
    question = _words(row, "question", row_id)
    if row.get("answer") is None and row.get("answers") is not None:
        values = [v.get("answer") if isinstance(v, Mapping) else v for v in _listed(row["answers"])]
        if not values:
            raise DataError(f"{row_id}: answers is empty; expected at least one. Add one, or remove the row")
        given = [_words({"answers": value}, "answers", row_id) for value in values]
        # Counter keeps the order of arrival among equals, so the choice does not depend on a hash.
        answer = Counter(given).most_common(1)[0][0]
    else:
        answer = _words(row, "answer", row_id)
    asked: tuple[Part, ...] = (*_pictures(row, row_id, images), Text(question))
    return _sample([Message("user", asked), Message("assistant", (Text(answer),))], row, row_id)


def preference(row: Row, *, row_id: str, images: Folders) -> Sample:
    """Two answers to one question, ``chosen`` and ``rejected``: words, or turns.

    The question is ``question`` (or ``prompt``) in words with the row's ``image``, as in RLHF-V; or turns in
    ``prompt`` (or ``messages``), as :func:`messages` reads them. Turns of an answer are what follows these,
    or the whole conversation where there is no question beside it.
    """
    asked = next((row[key] for key in ("prompt", "messages", "question") if row.get(key) is not None), None)
    shown = _listed(row.get("images") if row.get("images") is not None else row.get("image"))
    if isinstance(asked, str):
        words = [{"type": "text", "text": asked}]
        asked = [{"role": "user", "content": [*({"type": "image"} for _ in shown), *words]}]
    if asked is not None and not isinstance(asked, list | tuple):
        raise DataError(f"{row_id}: the question is {_kind(asked)}; expected words or a list of turns")
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
        turns = [*(asked or ()), *_turns({**row, key: answer}, key, row_id, "messages")]
        try:
            whole = {**row, "messages": turns, "images": shown}
            samples.append(messages(whole, row_id=row_id, images=images))
        except DataError as error:
            raise DataError(str(error).replace(f"{row_id}:", f"{row_id}: {key}:", 1)) from error
    chosen, rejected = samples
    if list(chosen.media()) != list(rejected.media()):
        raise DataError(
            f"{row_id}: the chosen and the rejected answer show different pictures; expected the same ones"
        )
    if chosen.messages == rejected.messages:
        raise DataError(f"{row_id}: the chosen and the rejected answer are the same; remove the row")
    return replace(chosen, rejected=rejected.messages)


CONVERTERS: dict[str, Convert] = {
    "llava": llava,
    "messages": messages,
    "caption": caption,
    "vqa": vqa,
    "preference": preference,
}

_LLAVA_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}


def _sample(turns: Sequence[Message], row: Row, row_id: str) -> Sample:
    """The conversation, once it is one that a model can learn from."""
    for number, message in enumerate(turns, 1):
        empty = not any(isinstance(part, Image) or part.text.strip() for part in message.parts)
        if empty and message.role != "system":
            raise DataError(
                f"{row_id}: turn {number} ({message.role}) is empty; give it words, or remove the row"
            )
        if message.role == "system" and number > 1:
            raise DataError(
                f"{row_id}: turn {number} is the system's; expected it first. Move it to the front"
            )
        if number > 1 and message.role == "assistant" == turns[number - 2].role:
            raise DataError(
                f"{row_id}: turns {number - 1} and {number} are both the assistant's; expected the user's "
                f"between them. Join them, or add what the user said"
            )
    if turns[-1].role != "assistant":
        raise DataError(
            f"{row_id}: the conversation ends with the {turns[-1].role}'s turn; expected the assistant's, "
            f"which is what is learned. Add the reply, or remove the turn"
        )
    # An empty system turn is how many exports write "none".
    kept = tuple(message for message in turns if message.parts)
    return Sample(kept, id=row_id, meta={"id": str(row["id"])} if row.get("id") is not None else {})


def _turns(row: Row, key: str, row_id: str, instead: str) -> Sequence[Row]:
    if row.get(key) is None:
        found = ", ".join(map(str, row)) or "nothing"
        other = {"messages": "messages", "conversations": "llava"}
        hint = (
            f'set format = "{other[instead]}"'
            if row.get(instead) is not None
            else "set the format these rows have"
        )
        raise DataError(
            f"{row_id}: no {key} in the row (it has {found}); expected a list of turns. Add it, or {hint}"
        )
    turns = row[key]
    if not isinstance(turns, list | tuple):
        raise DataError(f"{row_id}: {key} is {_kind(turns)}; expected a list of turns. Write it so")
    if not turns:
        raise DataError(
            f"{row_id}: the conversation is empty; expected at least a question and a reply. Remove the row"
        )
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise DataError(f"{row_id}: turn {number} is {_kind(turn)}; expected an object with named values")
    return turns


def _part(part: object, bare: Iterator[Image], images: Folders, row_id: str, number: int) -> Part:
    where = f"{row_id}: turn {number}"
    if not isinstance(part, Mapping):
        raise DataError(
            f'{where}: a part is {_kind(part)}; expected an object such as {{"type": "text", "text": ...}}'
        )
    match part.get("type"):
        case "text":
            words = _named(part, "text", str, where)
            _refuse_place(words, where)
            return Text(words)
        case "image":
            own = next(
                (part[key] for key in ("image", "bytes", "path", "url") if part.get(key) is not None), None
            )
            picture = next(bare, None) if own is None else images.picture(own, row_id)
            if picture is None:
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
        case other:
            raise DataError(
                f"{where}: a part of type {other!r}; expected text, image or image_url. Rename it, or leave "
                f"it out"
            )


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


def _cut(words: str, pictures: Iterator[Image]) -> Iterator[Part]:
    for n, piece in enumerate(words.split(PLACE)):
        if n:
            yield next(pictures)
        if piece:
            yield Text(piece)


def _pictures(row: Row, row_id: str, images: Folders) -> Iterator[Image]:
    if "image" not in row:
        found = ", ".join(map(str, row)) or "nothing"
        raise DataError(
            f"{row_id}: no image in the row (it has {found}); expected a path. Add it, or rename the key"
        )
    for value in _listed(row["image"]):
        yield images.picture(value, row_id)


def _words(row: Row, key: str, row_id: str) -> str:
    words: str = _named(row, key, str, row_id)
    if not words.strip():
        raise DataError(f"{row_id}: {key} is empty; expected words. Write them, or remove the row")
    _refuse_place(words, row_id)
    return words


def _refuse_place(words: str, where: str) -> None:
    if PLACE in words:
        raise DataError(
            f"{where}: the words contain {PLACE}, which stands for a picture; expected plain words. Give the "
            f"picture a part of its own, or write the word differently"
        )


def _named(row: Row, key: str, kind: type[str], where: str) -> str:
    if row.get(key) is None:
        found = ", ".join(map(str, row)) or "nothing"
        raise DataError(f"{where}: no {key} (found {found}); expected words. Add it, or rename the key")
    value = row[key]
    if not isinstance(value, kind):
        raise DataError(f"{where}: {key} is {_kind(value)}; expected words. Write it in quotes")
    return value


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _decoded(url: str, row_id: str) -> bytes:
    head, comma, body = url.partition(",")
    try:
        if not (comma and head.endswith(";base64") and body):
            raise binascii.Error("no ';base64,' part")
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"{row_id}: the picture's data: URL cannot be read ({error}); expected data:image/png;base64,... "
            f"Write it so, or write a path"
        ) from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system: somebody's base64 without "data:"
        return False


def _kind(value: object) -> str:
    names = {
        "NoneType": "nothing",
        "list": "a list",
        "dict": "an object",
        "str": "words",
        "bool": "true or false",
    }
    return names.get(
        type(value).__name__, f"a number ({value})" if isinstance(value, int | float) else repr(value)[:40]
    )


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _short(words: str) -> str:
    return words if len(words) <= 120 else f"{words[:117]}..."
