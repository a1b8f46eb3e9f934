"""What the routes take and give, as OpenAPI tells it at ``/openapi.json``.

Bodies are read by the routes themselves, in a thread and within limits, so the framework does not know them:
they are written down here from the same classes that read them.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tinymodal.serve.protocol import (
    ChatRequest,
    Chunk,
    Completion,
    ErrorReply,
    ModelCard,
    ModelList,
    SpeechRequest,
    Transcript,
    TranscriptionRequest,
    VerboseTranscript,
)

JSON = "application/json"
PLACE = "#/components/schemas/{model}"
READ: tuple[type[BaseModel], ...] = (ChatRequest, SpeechRequest, TranscriptionRequest)
TOLD: tuple[type[BaseModel], ...] = (
    Completion, Chunk, Transcript, VerboseTranscript, ModelCard, ModelList, ErrorReply,
)  # fmt: skip
SOUND = {"schema": {"type": "string", "format": "binary"}}


def describe(app: FastAPI) -> None:
    """Let the app tell its schema, with the bodies of its routes."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _described(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version="1", routes=app.routes)
    _, found = models_json_schema(
        [*((model, "validation") for model in READ), *((model, "serialization") for model in TOLD)],
        ref_template=PLACE,
    )
    schema.setdefault("components", {})["schemas"] = found["$defs"]
    chat = {JSON: {"schema": _at(Completion)}, "text/event-stream": {"schema": _at(Chunk)}}
    _add(schema, "/v1/chat/completions", {JSON: {"schema": _at(ChatRequest)}}, chat)
    sounds = {kind: SOUND for kind in ("audio/mpeg", "audio/wav", "audio/flac", "audio/pcm")}
    _add(schema, "/v1/audio/speech", {JSON: {"schema": _at(SpeechRequest)}}, sounds)
    form = {"allOf": [_at(TranscriptionRequest), _file()]}
    text = {"text/plain": {"schema": {"type": "string"}}}
    words = {JSON: {"schema": {"anyOf": [_at(VerboseTranscript), _at(Transcript)]}}, **text}
    _add(schema, "/v1/audio/transcriptions", {"multipart/form-data": {"schema": form}}, words)
    for path in schema["paths"].values():
        for route in path.values():
            # Whatever the framework would say of its own validation is said in OpenAI's shape.
            route["responses"].pop("422", None)
            route["responses"]["default"] = {
                "description": "An error.",
                "content": {JSON: {"schema": _at(ErrorReply)}},
            }
    schema["paths"]["/metrics"]["get"]["responses"]["200"]["content"] = text
    return schema


def _add(schema: dict[str, Any], path: str, body: dict[str, Any], answer: dict[str, Any]) -> None:
    route = schema["paths"][path]["post"]
    route["requestBody"] = {"required": True, "content": body}
    route["responses"]["200"] = {"description": "The answer.", "content": answer}


def _file() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["file"],
        "properties": {"file": {"type": "string", "format": "binary"}},
    }


def _at(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": PLACE.format(model=model.__name__)}
