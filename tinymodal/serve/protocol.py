"""The schema of OpenAI's API, as far as a small model can keep it: what is asked, and what is answered.

Strict about what it reads: numbers are numbers, in their ranges, and nothing is guessed. A field that is not
listed here is passed over, because clients send many that change nothing (``user``, ``store``, ``metadata``).
A field that would change the answer and that we do not have is listed and refused with its name.

Fields of our own, which the official client sends as ``extra_body``: ``top_k``, ``min_p``,
``repetition_penalty`` and ``min_tokens``, called as vLLM calls them.

Source: https://platform.openai.com/docs/api-reference/chat and /audio.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SEEDS = 2**63
"""Seeds lie between minus this and this: what torch takes."""


class Asked(BaseModel):
    """What all that is read has in common."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


# Messages


class TextPart(Asked):
    """Words."""

    type: Literal["text"]
    text: str


class ImageUrl(Asked):
    """Where a picture is; ``detail`` and the like are passed over."""

    url: str


class ImagePart(Asked):
    """A picture: ``data:image/png;base64,...``, or an address where the server allows its host."""

    type: Literal["image_url"]
    image_url: ImageUrl


class SoundData(Asked):
    """A sound in base64. Its own first bytes say what it is; ``format`` is passed over."""

    data: str


class AudioPart(Asked):
    """A sound."""

    type: Literal["input_audio"]
    input_audio: SoundData


Part = Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(min_length=1)]
Words = Annotated[list[TextPart], Field(min_length=1)]


class SystemMessage(Asked):
    """How the assistant shall behave; it may only open a conversation."""

    role: Literal["system", "developer"]
    content: str | Words


class UserMessage(Asked):
    """What is asked."""

    role: Literal["user"]
    content: str | Parts


class AssistantMessage(Asked):
    """What was answered before. A spoken reply is sent back as its ``transcript``."""

    role: Literal["assistant"]
    content: str | Words | None = None
    audio: dict[str, Any] | None = None
    tool_calls: list[Any] | None = None

    @model_validator(mode="after")
    def _has_words(self) -> AssistantMessage:
        if self.tool_calls:
            raise ValueError("this server has no tools; take tool_calls out")
        if self.content is None:
            found = "audio is not kept between requests" if self.audio else "an assistant's turn has words"
            raise ValueError(f"{found}; send the reply's text (of a spoken one its transcript) as content")
        return self


AnyMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


# Requests


class StreamOptions(Asked):
    """What a stream tells beside the reply."""

    include_usage: bool = False


class AudioOut(Asked):
    """How a spoken reply sounds, and how it is written."""

    voice: str | None = None
    """Of the model's voices, which ``GET /v1/models`` lists; null: the first."""
    format: Literal["wav", "pcm16", "flac", "mp3"] = "wav"
    """``pcm16``: 24,000 samples a second, as OpenAI's."""


class TextFormat(Asked):
    """Any words."""

    type: Literal["text"]


class ObjectFormat(Asked):
    """A JSON object, any."""

    type: Literal["json_object"]


class JsonSchema(Asked):
    """A JSON schema and its name. It holds to the letter with ``strict`` and without."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    asked: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Asked):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class ChatRequest(Asked):
    """``POST /v1/chat/completions``."""

    model: str
    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=1000)]
    modalities: Annotated[list[Literal["text", "audio"]], Field(min_length=1, max_length=2)] | None = None
    audio: AudioOut | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    # Read to be refused where they would change the answer.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None

    @field_validator("modalities")
    @classmethod
    def _has_text(cls, modalities: list[str] | None) -> list[str] | None:
        if modalities is not None and "text" not in modalities:
            raise ValueError('a reply always has words; expected ["text"] or ["text", "audio"]')
        return modalities

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        for name in ("frequency_penalty", "presence_penalty", "logit_bias", "tools", "functions"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported by this server; take it out")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        given = (self.max_tokens, self.max_completion_tokens)
        if None not in given and given[0] != given[1]:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def speaks(self) -> bool:
        """Whether the reply is to be spoken as well."""
        return "audio" in (self.modalities or ())

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end a reply."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """What the reply is to be JSON of; None: it is text."""
        if isinstance(self.response_format, SchemaFormat):
            return self.response_format.json_schema.asked
        return {"type": "object"} if isinstance(self.response_format, ObjectFormat) else None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with what it cost."""
        return self.stream_options is not None and self.stream_options.include_usage


class SpeechRequest(Asked):
    """``POST /v1/audio/speech``."""

    model: str
    input: Annotated[str, Field(min_length=1, max_length=4096)]
    voice: str | None = None
    response_format: Literal["mp3", "wav", "flac", "pcm"] | None = None
    """``mp3`` if none is given; ``pcm``: 16 bits, 24,000 samples a second, as OpenAI's."""
    speed: float | None = None
    stream_format: str | None = None

    @model_validator(mode="after")
    def _agrees(self) -> SpeechRequest:
        if self.speed not in (None, 1.0):
            raise ValueError("speed is not supported by this server except 1.0")
        if self.stream_format not in (None, "audio"):
            raise ValueError('stream_format is not supported by this server except "audio"')
        return self


class TranscriptionRequest(BaseModel):
    """``POST /v1/audio/transcriptions``: the fields of a form, which are texts, beside its ``file``.

    ``prompt`` and ``language`` are hints to Whisper and are passed over; ``language`` comes back in
    ``verbose_json``.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    model: Annotated[str, Field(max_length=256)]
    response_format: Literal["json", "text", "verbose_json"] = "json"
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    language: Annotated[str, Field(max_length=64)] = ""
    stream: bool = False

    @field_validator("stream")
    @classmethod
    def _whole(cls, stream: bool) -> bool:
        if stream:
            raise ValueError("transcripts are not streamed by this server; leave it out")
        return stream


# Replies


def unless_none() -> Any:
    """A field that is not sent where there is nothing to send."""
    return Field(default=None, exclude_if=lambda value: value is None)


class Usage(BaseModel):
    """What a request cost, in tokens. Pictures and sounds are among those of the prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, read: int, written: int) -> Usage:
        return cls(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


class Alternative(BaseModel):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Alternative):
    """The token that was chosen, and the likeliest ones at its place."""

    top_logprobs: list[Alternative]


class Logprobs(BaseModel):
    """Of every token of a reply."""

    content: list[TokenLogprob]
    refusal: None = None


class SpokenAudio(BaseModel):
    """A reply aloud, whole or a piece of it: ``data`` is base64."""

    id: str
    data: str | None = unless_none()
    transcript: str | None = unless_none()
    expires_at: int | None = unless_none()


class ReplyMessage(BaseModel):
    """What the assistant said. Where it is spoken its words are the ``transcript``, as OpenAI has it."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    audio: SpokenAudio | None = unless_none()


class Delta(BaseModel):
    """More of what the assistant says."""

    role: Literal["assistant"] | None = unless_none()
    content: str | None = unless_none()
    audio: SpokenAudio | None = unless_none()


Finish = Literal["stop", "length"]


class Choice(BaseModel):
    """One of ``n`` replies."""

    index: int
    message: ReplyMessage
    logprobs: Logprobs | None
    finish_reason: Finish


class ChunkChoice(BaseModel):
    """More of one of ``n`` replies."""

    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Finish | None


class Completion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Chunk(BaseModel):
    """A piece of a streamed answer. ``usage`` is there where it was asked for: null up to the last."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Segment(BaseModel):
    """A stretch of a transcript. The model gives no times of words, so it is the whole sound."""

    id: int
    start: float
    end: float
    text: str


class Transcript(BaseModel):
    """What was heard."""

    text: str


class VerboseTranscript(Transcript):
    """With how long it lasts."""

    task: Literal["transcribe"] = "transcribe"
    language: str
    duration: float
    segments: list[Segment]


class ModelCard(BaseModel):
    """The model that is served; what it perceives, and the voices it speaks with, are fields of ours."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tinymodal"
    max_model_len: int | None
    modalities: list[str]
    voices: list[str]


class ModelList(BaseModel):
    """There is one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Fault(BaseModel):
    """See ``errors.py``."""

    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str


class ErrorReply(BaseModel):
    """Any answer that is an error."""

    error: Fault
