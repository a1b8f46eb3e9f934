"""Replies in OpenAI's shape: a whole completion, or the events of a stream.

A stream tells the same as the whole answer: its words joined are the reply, its sounds joined are the file.
"""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tinymodal.serve.protocol import (
    Alternative,
    ChatRequest,
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    Delta,
    Finish,
    Logprobs,
    ReplyMessage,
    SpokenAudio,
    TokenLogprob,
    Usage,
)
from tinymodal.serve.sound_out import SoundOut, written

if TYPE_CHECKING:
    from tinymodal.infer import logprobs as engine_logprobs
    from tinymodal.infer.engine import AudioDelta, Reply, TextDelta
    from tinymodal.serve.calls import Call

    TokenLogprobs = Sequence[engine_logprobs.TokenLogprob]

LEAST = -9999.0
"""Stands for the logarithm of 0, as OpenAI has it: JSON knows no infinity."""
KEPT_S = 0
"""How long a spoken reply can be asked for by its id: it cannot, its transcript is sent back instead."""


@dataclass(slots=True)
class Telling:
    """One answer, told in OpenAI's words.

    Args:
        id: of the completion.
        model: its name, as it is served.
        asked: the request.
        rate_hz: of spoken replies; None where none is spoken.
    """

    id: str
    model: str
    asked: ChatRequest
    rate_hz: int | None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def form(self) -> str:
        """How sounds are written."""
        return self.asked.audio.format if self.asked.audio is not None else "wav"

    # Whole

    def completion(self, replies: Sequence[Reply]) -> bytes:
        """All replies at once, as JSON."""
        whole = Completion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[self._choice(i, reply) for i, reply in enumerate(replies)],
            usage=usage(replies),
        )
        return whole.model_dump_json().encode()

    def _choice(self, index: int, reply: Reply) -> Choice:
        message = ReplyMessage(content=reply.text)
        if self.asked.speaks:
            assert reply.audio is not None
            assert self.rate_hz is not None
            data = written(reply.audio, self.rate_hz, self.form)
            spoken = SpokenAudio(
                id=self.spoken_id(index),
                data=base64.b64encode(data).decode(),
                transcript=reply.text,
                expires_at=self.created + KEPT_S,
            )
            message = ReplyMessage(content=None, audio=spoken)
        told = logprobs(reply.logprobs or ()) if self.asked.logprobs else None
        return Choice(index=index, message=message, logprobs=told, finish_reason=reply.stopped_by)

    def spoken_id(self, index: int) -> str:
        """Name of a reply's sound."""
        return f"audio_{self.id.removeprefix('chatcmpl-')}_{index}"

    # In pieces

    async def events(self, call: Call) -> AsyncGenerator[bytes]:
        """The same as server-sent events, up to ``[DONE]``.

        Raises:
            Exception: what the decoding raised.
        """
        from tinymodal.infer.engine import TextDelta

        streams = [Stream(self, index) for index in range(len(call.tickets))]
        try:
            async for index, piece in call.pieces():
                stream = streams[index]
                event = stream.words(piece) if isinstance(piece, TextDelta) else stream.sound(piece)
                if event:
                    yield event
            for stream, ticket in zip(streams, call.tickets, strict=True):
                yield stream.end(ticket.reply)
        finally:
            for stream in streams:
                stream.close()
        if self.asked.includes_usage:
            costs = usage([ticket.reply for ticket in call.tickets])
            yield self.event([], costs)
        yield b"data: [DONE]\n\n"

    def event(self, choices: list[ChunkChoice], costs: Usage | None = None) -> bytes:
        """One server-sent event."""
        chunk = Chunk(id=self.id, created=self.created, model=self.model, choices=choices, usage=costs)
        left_out = None if self.asked.includes_usage else {"usage"}
        return b"data: " + chunk.model_dump_json(exclude=left_out).encode() + b"\n\n"


class Stream:
    """One of ``n`` replies while it is told."""

    def __init__(self, telling: Telling, index: int) -> None:
        self.telling, self.index = telling, index
        self._begun, self._told = False, 0
        self._out: SoundOut | None = None

    def words(self, piece: TextDelta) -> bytes:
        """More text."""
        said: TokenLogprobs = piece.logprobs if self.telling.asked.logprobs else ()
        self._told += len(said)
        if self.telling.asked.speaks:
            delta = Delta(audio=SpokenAudio(id=self._id, transcript=piece.text))
        else:
            delta = Delta(content=piece.text)
        return self._event(delta, said=said)

    def sound(self, piece: AudioDelta) -> bytes:
        """More sound; empty where nothing of the file is complete yet."""
        if self._out is None:
            self._out = SoundOut(self.telling.form, piece.rate_hz, streamed=True)
        return self._data(self._out.feed(piece.samples))

    def end(self, reply: Reply) -> bytes:
        """What is left once the reply is complete, and why it ended."""
        last = b""
        if self.telling.asked.speaks:
            assert self.telling.rate_hz is not None
            if self._out is None:
                self._out = SoundOut(self.telling.form, self.telling.rate_hz, streamed=True)
            last = self._data(self._out.finish())
            last += self._event(
                Delta(audio=SpokenAudio(id=self._id, expires_at=self.telling.created + KEPT_S))
            )
        said = (reply.logprobs or ())[self._told :] if self.telling.asked.logprobs else ()
        return last + self._event(Delta(), said, reply.stopped_by)

    def close(self) -> None:
        """Whether it was told to its end or not."""
        if self._out is not None:
            self._out.close()

    @property
    def _id(self) -> str:
        return self.telling.spoken_id(self.index)

    def _data(self, data: bytes) -> bytes:
        if not data:
            return b""
        return self._event(Delta(audio=SpokenAudio(id=self._id, data=base64.b64encode(data).decode())))

    def _event(self, delta: Delta, said: TokenLogprobs = (), ended: Finish | None = None) -> bytes:
        told = logprobs(said) if said else None
        more = self._choice(delta, told, ended)
        if self._begun:
            return self.telling.event([more])
        self._begun = True
        first = self._choice(Delta(role="assistant", content=""), None, None)
        return self.telling.event([first]) + self.telling.event([more])

    def _choice(self, delta: Delta, told: Logprobs | None, ended: Finish | None) -> ChunkChoice:
        return ChunkChoice(index=self.index, delta=delta, logprobs=told, finish_reason=ended)


def usage(replies: Sequence[Reply]) -> Usage:
    """What all replies cost: the prompt once, as OpenAI counts it."""
    return Usage.of(
        max((reply.tokens_in for reply in replies), default=0), sum(r.tokens_out for r in replies)
    )


def logprobs(said: TokenLogprobs) -> Logprobs:
    """How likely tokens were."""
    return Logprobs(
        content=[
            TokenLogprob(
                token=each.token,
                logprob=max(each.logprob, LEAST),
                bytes=list(each.raw),
                top_logprobs=[
                    Alternative(token=token, logprob=max(value, LEAST), bytes=list(token.encode()))
                    for token, value in each.top
                ],
            )
            for each in said
        ]
    )
