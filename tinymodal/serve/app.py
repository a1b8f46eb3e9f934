"""The routes: what each request asks of the model, and what becomes of a client that does not wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, closing
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from tinymodal.core.errors import TinyModalError
from tinymodal.core.types import Audio, Message, Sample, Text
from tinymodal.infer.sampling import Sampling
from tinymodal.infer.scheduler import QueueFull
from tinymodal.serve.aloud import from_thread, say
from tinymodal.serve.calls import Call, unless_gone
from tinymodal.serve.errors import ApiError, busy, invalid, leaving, of_user, of_validation, too_slow
from tinymodal.serve.flow import EVENTS, Flow
from tinymodal.serve.gate import Gate
from tinymodal.serve.metrics import CONTENT_TYPE
from tinymodal.serve.protocol import (
    ChatRequest,
    ModelCard,
    ModelList,
    Segment,
    SpeechRequest,
    Transcript,
    TranscriptionRequest,
    VerboseTranscript,
)
from tinymodal.serve.replies import Telling
from tinymodal.serve.requests import (
    Media,
    addresses,
    check_counts,
    check_schema,
    check_text,
    conversation,
    sampling_of,
)
from tinymodal.serve.schema import JSON, describe
from tinymodal.serve.served import Served
from tinymodal.serve.sound_out import MIME, SoundOut, check_format

__all__ = ["Served", "create_app"]

T = TypeVar("T")
Read = TypeVar("Read", bound=BaseModel)


def create_app(served: Served) -> FastAPI:
    """The server as an ASGI application. Its end closes the scheduler."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        served.doors.closing = True
        await asyncio.to_thread(served.scheduler.close, True, served.limits.drain_s)
        served.preparing.shutdown(wait=False, cancel_futures=True)
        served.speaking.shutdown(wait=False, cancel_futures=True)

    # The pages of documentation fetch scripts from elsewhere; the schema itself is at /openapi.json.
    app = FastAPI(title="TinyModal", docs_url=None, redoc_url=None, lifespan=lifespan)
    routes = Routes(served)
    app.get("/health")(routes.health)
    app.get("/metrics")(routes.metrics)
    app.get("/v1/models")(routes.models)
    app.get("/v1/models/{model:path}")(routes.model)
    app.post("/v1/chat/completions")(routes.chat)
    app.post("/v1/audio/transcriptions")(routes.transcribe)
    app.post("/v1/audio/speech")(routes.speech)
    app.add_exception_handler(HTTPException, no_route)
    app.add_middleware(
        Gate,
        limits=served.limits,
        metrics=served.metrics,
        doors=served.doors,
        key=served.key,
        hosts=served.hosts,
    )
    describe(app)
    return app


async def no_route(request: Request, error: Exception) -> Response:
    """Errors of the framework in OpenAI's shape: no such path, another method, a form that is none."""
    assert isinstance(error, HTTPException)
    words = {404: "There is no such path.", 405: "This path takes another method."}
    fault = ApiError(error.status_code, words.get(error.status_code, str(error.detail)))
    return JSONResponse(
        fault.body(request.state.request_id), fault.status, {**fault.headers, **(error.headers or {})}
    )


class Routes:
    """What is done for each path."""

    def __init__(self, served: Served) -> None:
        self.served = served

    # About the server

    async def health(self) -> Response:
        """200 as long as new requests are taken."""
        closing = self.served.doors.closing
        return JSONResponse({"status": "shutting down" if closing else "ok"}, 503 if closing else 200)

    async def metrics(self) -> Response:
        """Counts for Prometheus."""
        text = self.served.metrics.text(self.served.scheduler.stats())
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    async def models(self) -> ModelList:
        """The model that is served."""
        return ModelList(data=[self.served.card()])

    async def model(self, model: str) -> ModelCard:
        """The same, by its name."""
        self._check_model(model)
        return self.served.card()

    # Chat

    async def chat(self, request: Request) -> Response:
        """A reply to a conversation."""
        asked = await self._json(request, ChatRequest)
        self._check_model(asked.model)
        check_counts(asked, self.served.limits)
        samplings = sampling_of(asked, self.served.limits)
        rate_hz = self._out_rate(asked.audio.format if asked.audio else "wav") if asked.speaks else None
        call = self._call(request)
        telling = Telling(f"chatcmpl-{call.sample_id[4:]}", self.served.name, asked, rate_hz)

        async def submitted() -> None:
            fetched = {}
            for url, place in addresses(asked).items():
                try:
                    fetched[url] = await self.served.fetcher.fetch(url)
                except ApiError as error:
                    error.param = place
                    raise
            await self._in_thread(self._submit, call, asked, fetched, samplings)

        async def whole() -> bytes:
            await submitted()
            return await self._in_thread(telling.completion, await call.replies())

        async def begun() -> tuple[bytes, AsyncGenerator[bytes]]:
            await submitted()
            events = telling.events(call)
            first = await anext(events)
            self._first_piece(request)
            return first, events

        if asked.stream:
            first, events = await self._answer(request, call, begun())
            return Flow(first, events, EVENTS, call, self.served.limits.request_s, request.state.request_id)
        answer = await self._answer(request, call, whole())
        return Response(answer, media_type=JSON)

    def _submit(
        self, call: Call, asked: ChatRequest, fetched: dict[str, bytes], samplings: Sequence[Sampling]
    ) -> None:
        """In a thread: look at the schema, decode the media, and queue up."""
        if (schema := samplings[0].json_schema) is not None:
            _ = self.served.engine.grammars  # a model whose replies cannot be held says so first
            check_schema(str(schema))
        messages = conversation(asked, fetched, self.served.limits, self.served.rate_hz)
        voice = asked.audio.voice if asked.audio is not None else None
        call.submit(Sample(messages, call.sample_id), samplings, asked.speaks, voice)

    # Transcriptions

    async def transcribe(self, request: Request) -> Response:
        """What is said in a sound."""
        asked, data = await self._form(request)
        self._check_model(asked.model)
        call = self._call(request)
        sampling = Sampling(max_new_tokens=self.served.limits.new_tokens, temperature=asked.temperature)

        def submit() -> float:
            rate_hz = self.served.rate_hz
            sound = Media(self.served.limits, rate_hz).sound(data, "file")
            parts = (Audio(sound, rate_hz), Text(self.served.asking.transcribe))
            call.submit(Sample((Message("user", parts),), call.sample_id), [sampling])
            return len(sound) / rate_hz

        async def heard() -> tuple[float, str]:
            seconds = await self._in_thread(submit)
            (reply,) = await call.replies()
            return seconds, reply.text

        seconds, text = await self._answer(request, call, heard())
        if asked.response_format == "text":
            return PlainTextResponse(text + "\n")
        if asked.response_format == "json":
            return JSONResponse(Transcript(text=text).model_dump())
        segment = Segment(id=0, start=0.0, end=seconds, text=text)
        told = VerboseTranscript(
            text=text, language=asked.language or "unknown", duration=seconds, segments=[segment]
        )
        return JSONResponse(told.model_dump())

    async def _form(self, request: Request) -> tuple[TranscriptionRequest, bytes]:
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ApiError(415, "Expected multipart/form-data with a field 'file'.")
        async with request.form(max_files=1, max_fields=32) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise invalid("the form has no file called 'file'", "file")
            data = await file.read()
            given = {key: value for key, value in form.items() if isinstance(value, str) and value}
        if not data:
            raise invalid("file: it is empty", "file")
        try:
            return TranscriptionRequest.model_validate(given), data
        except ValidationError as error:
            raise of_validation(error) from None

    # Speech

    async def speech(self, request: Request) -> Response:
        """A text aloud."""
        asked = await self._json(request, SpeechRequest)
        self._check_model(asked.model)
        check_text(len(asked.input), self.served.limits, "input")
        form = asked.response_format or "mp3"
        rate_hz = self._out_rate(form)
        call = self._call(request)
        read = self.served.asking.read
        make = partial(say, self.served.engine, asked.input, read, asked.voice, call.sample_id)

        async def sounds() -> AsyncGenerator[bytes]:
            with closing(SoundOut(form, rate_hz, streamed=True)) as out:
                async with aclosing(from_thread(self.served.speaking, make)) as spoken:
                    async for samples in spoken:
                        if data := out.feed(samples):
                            yield data
                if data := out.finish():
                    yield data

        async def begun() -> tuple[bytes, AsyncGenerator[bytes]]:
            pieces = sounds()
            first = await anext(pieces)
            self._first_piece(request)
            return first, pieces

        first, pieces = await self._answer(request, call, begun())
        return Flow(first, pieces, MIME[form], call, self.served.limits.request_s, request.state.request_id)

    # What they share

    async def _json(self, request: Request, schema: type[Read]) -> Read:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON:
            # A form of another site's page may be sent without asking, JSON may not.
            raise ApiError(415, "Expected content-type: application/json.")
        body = await request.body()
        try:
            return await self._in_thread(schema.model_validate_json, body)
        except ValidationError as error:
            raise of_validation(error) from None

    def _check_model(self, name: str) -> None:
        if name != self.served.name:
            raise ApiError(
                404, f"There is no such model here; this server has '{self.served.name}'.",
                param="model", code="model_not_found",
            )  # fmt: skip

    def _out_rate(self, form: str) -> int:
        """Samples a second of what the model speaks, once it is sure that it can be written."""
        try:
            rate_hz = self.served.spoken_hz
        except TinyModalError as error:
            raise invalid(str(error), "modalities") from None
        check_format(form, rate_hz)
        return rate_hz

    def _call(self, request: Request) -> Call:
        if self.served.doors.closing:
            raise leaving()
        spent = time.perf_counter() - request.state.began
        deadline = asyncio.get_running_loop().time() + self.served.limits.request_s - spent
        return Call(self.served.scheduler, request.state.request_id, deadline)

    def _first_piece(self, request: Request) -> None:
        self.served.metrics.first_piece.add(time.perf_counter() - request.state.began)

    async def _in_thread(self, work: Callable[..., T], *given: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.served.preparing, partial(work, *given))

    async def _answer(self, request: Request, call: Call, work: Any) -> Any:
        """Await ``work``; close the call unless it ends well, and tell why in words of the API."""
        try:
            async with asyncio.timeout_at(call.deadline):
                return await unless_gone(request, work, call.close)
        except TimeoutError:
            call.close()
            raise too_slow(self.served.limits.request_s) from None
        except QueueFull:
            raise busy() from None
        except TinyModalError as error:
            raise of_user(error, call.sample_id) from None
