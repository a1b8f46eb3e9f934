"""A chat in the page and a conversation for the model: one becomes the other, question by question."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tinymodal.core.errors import TinyModalError
from tinymodal.core.types import Audio, Image, Message, Part, Sample, Text
from tinymodal.infer.answer import AudioDelta, TextDelta
from tinymodal.infer.sampling import Sampling
from tinymodal.infer.scheduler import QueueFull
from tinymodal.serve.calls import Call
from tinymodal.serve.errors import ApiError, busy, leaving, of_user, too_slow
from tinymodal.serve.requests import Media, format_of

if TYPE_CHECKING:
    from tinymodal.serve.app import Served

NAME = "chat"
"""Of a conversation, in errors; taken out before they are shown."""
REFUSED = "Not answered"
"""Head of a reply that says why there is none. It and its question are no part of the conversation."""

Shown = list[Any]
"""What stands in the page as the reply: texts, and at its end perhaps (rate, int16 [samples])."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What was chosen beside the chat."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    aloud: bool = False
    voice: str | None = None

    @classmethod
    def of(cls, chosen: Sequence[Any]) -> Settings:
        """From the values of the page's controls, in their order; what is left empty is 0."""
        aloud, voice, *numbers = chosen
        longest, temperature, top_p, top_k, min_p, penalty, seed = (value or 0 for value in numbers)
        return cls(
            int(longest), float(temperature), float(top_p), int(top_k), float(min_p), float(penalty),
            int(seed), bool(aloud), voice or None,
        )  # fmt: skip

    def sampling(self, most: int) -> Sampling:
        """As the model takes it.

        Raises:
            ValueError: where a value makes no sense.
        """
        return Sampling(
            max_new_tokens=min(self.max_new_tokens, most),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


async def answer(
    served: Served,
    message: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    settings: Settings,
    root: Path | None = None,
) -> AsyncIterator[Shown]:
    """What stands in the page as the reply, each time more of it is there.

    Whoever stops listening, because somebody pressed stop or closed the page, frees the reply's place.

    Args:
        served: the model.
        message: ``text`` and ``files`` of the question.
        history: what was said before, as the page has it.
        settings: chosen beside it.
        root: the folder that its files must lie in; None: any.
    """
    loop = asyncio.get_running_loop()
    call = Call(served.scheduler, NAME, loop.time() + served.limits.request_s)
    text, waves, rate_hz = "", [], 0
    try:
        await loop.run_in_executor(served.preparing, _submit, call, served, message, history, settings, root)
        async with aclosing(call.pieces()) as pieces:
            while (piece := await _next(pieces, call)) is not None:
                if isinstance(piece, TextDelta):
                    text += piece.text
                    yield [text]
                elif isinstance(piece, AudioDelta):
                    waves.append(piece.samples)
                    rate_hz = piece.rate_hz
    except TimeoutError:
        yield [*([text] if text else []), _refusal(too_slow(served.limits.request_s))]
        return
    except ApiError as error:
        yield [*([text] if text else []), _refusal(error)]
        return
    except TinyModalError as error:
        yield [_refusal(of_user(error, NAME))]
        return
    finally:
        call.close()
    shown: Shown = [text or "(nothing)"]
    if waves:
        samples = torch.cat(waves).clamp(-1, 1).numpy()
        shown.append((rate_hz, (samples * 32767).astype(np.int16)))
    yield shown


async def _next(
    pieces: AsyncIterator[tuple[int, TextDelta | AudioDelta]], call: Call
) -> TextDelta | AudioDelta | None:
    """The next piece; None: it is over. Each is waited for by itself: between them the page has its turn.

    Raises:
        TimeoutError: the time for the whole answer is over.
    """
    async with asyncio.timeout_at(call.deadline):
        found = await anext(pieces, None)
    return None if found is None else found[1]


def _refusal(error: ApiError) -> dict[str, Any]:
    return {"role": "assistant", "content": error.message, "metadata": {"title": REFUSED}}


def _submit(
    call: Call,
    served: Served,
    message: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    settings: Settings,
    root: Path | None,
) -> None:
    """In a thread: decode the media, and queue up.

    Raises:
        ApiError: something about it cannot be answered.
    """
    if served.doors.closing:
        raise leaving()
    try:
        sample = conversation(served, message, history, root)
        sampling = settings.sampling(served.limits.new_tokens)
        call.submit(sample, [sampling], settings.aloud, settings.voice)
    except QueueFull:
        raise busy() from None
    except TinyModalError as error:
        raise of_user(error, NAME) from None
    except ValueError as error:
        raise ApiError(400, str(error)) from None


def conversation(
    served: Served,
    message: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    root: Path | None = None,
) -> Sample:
    """The conversation that the page shows, up to and with the question.

    The page comes back from the browser, and somebody may have written another one: only files below ``root``
    are read.

    Raises:
        ApiError: it has more than the limits allow, or a file that cannot be read.
    """
    text = str(message.get("text") or "").strip()
    # Asked anew, gradio gives the file's record for its path.
    files = [file["path"] if isinstance(file, Mapping) else file for file in message.get("files") or ()]
    turns = kept(history)
    earlier, reply = turns.pop() if turns and turns[-1][1] is None else (([], []), None)
    # A question that was stopped before its first word is asked together with the next.
    turns.append((([*earlier[0], *([text] if text else [])], [*earlier[1], *map(str, files)]), reply))
    limits = served.limits
    if sum(len(files) for (_, files), _ in turns) > limits.pictures:
        raise ApiError(400, f"A conversation may have {limits.pictures} files; begin a new one.")
    if sum(len("".join(texts)) + len(said or "") for (texts, _), said in turns) > limits.characters:
        raise ApiError(400, f"The conversation is longer than {limits.characters:,} characters.")
    media = Media(limits, served.rate_hz)
    messages: list[Message] = []
    for (texts, paths), said in turns:
        parts: list[Part] = [part_of(Path(path), media, root) for path in paths]
        messages.append(Message("user", (*parts, *map(Text, texts))))
        if said is not None:
            messages.append(Message("assistant", (Text(said),)))
    asked = messages[-1].parts
    if not any(isinstance(part, Audio | Text) for part in asked):
        raise ApiError(400, "There is no question: write one, or speak it.")
    return Sample(tuple(messages), NAME)


Asked = tuple[list[str], list[str]]
"""Texts and files of a question."""


def kept(history: Sequence[Mapping[str, Any]]) -> list[tuple[Asked, str | None]]:
    """Questions and replies that are part of the conversation; the last may have no reply."""
    turns: list[tuple[Asked, str | None]] = []
    texts: list[str] = []
    files: list[str] = []
    for said in history:
        more, shown = contents(said)
        if said["role"] == "user":
            texts, files = [*texts, *more], [*files, *shown]
            continue
        refused = (said.get("metadata") or {}).get("title") == REFUSED
        if more and not refused and (texts or files):
            turns.append(((texts, files), "".join(more)))
        if more:
            texts, files = [], []
    return [*turns, *([((texts, files), None)] if texts or files else [])]


def contents(said: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Texts and files of one message of the page."""
    content = said["content"]
    texts: list[str] = []
    files: list[str] = []
    for part in [content] if isinstance(content, str | Mapping) else content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            # A file, or the component that the page shows it in.
            places = (part.get("file"), part.get("value"), part)
            found = (place["path"] for place in places if isinstance(place, Mapping) and place.get("path"))
            files += [str(path) for path in found][:1]
    return texts, files


def part_of(path: Path, media: Media, root: Path | None = None) -> Part:
    """A file as a part of a message: what its first bytes say that it is.

    Raises:
        ApiError: it cannot be read, or is larger than may be.
    """
    try:
        if root is not None and not path.resolve().is_relative_to(root):
            raise OSError
        data = path.read_bytes()
    except (OSError, ValueError):
        raise ApiError(400, "A file of this conversation is gone; show or play it again.") from None
    name = path.name[:80]
    if format_of(data) is not None:
        return Audio(media.sound(data, name), media.rate_hz)
    return Image(media.picture(data, name))
