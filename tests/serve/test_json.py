"""``response_format``: replies are JSON of the schema that is asked for, or the schema is refused."""

import base64
import json
import re
from pathlib import Path
from typing import Literal

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")
jsonschema_rs = pytest.importorskip("jsonschema_rs")

import PIL.Image  # noqa: E402
from pydantic import BaseModel, Field  # noqa: E402

from tests.serve.live import NAME, asked, chat, fault, live, png, seen  # noqa: E402
from tinymodal.infer.engine import Engine, Sampling  # noqa: E402
from tinymodal.serve import requests  # noqa: E402

CHAT = "/v1/chat/completions"
DOCS = Path(__file__).resolve().parents[2] / "docs"
PLACE = "response_format.json_schema.schema"


class Shape(BaseModel, extra="forbid"):
    """One shape of a picture."""

    colour: Literal["red", "green", "blue", "yellow"]
    kind: Literal["ring", "square", "star"]
    size: int = Field(ge=0, le=20)


class Seen(BaseModel, extra="forbid"):
    shapes: list[Shape] = Field(max_length=3)
    sure: bool
    word: str = Field(max_length=12)


def of(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "seen", "strict": True, "schema": schema}}


PICTURE = seen(png(PIL.Image.new("RGB", (64, 64), "red")))
ASK = {"model": NAME, "messages": asked(PICTURE, "What do you see?"), "max_tokens": 300}


def test_the_official_client_parses_a_reply_into_a_model(client):
    said = client.chat.completions.parse(**ASK, response_format=Seen)
    (choice,) = said.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Seen)
    assert Seen.model_validate_json(choice.message.content) == choice.message.parsed


def test_a_stream_of_json_is_the_whole_reply(client):
    whole = client.chat.completions.parse(**ASK, response_format=Seen).choices[0].message.parsed
    with client.chat.completions.stream(**ASK, response_format=Seen) as stream:
        pieces = [event for event in stream if event.type == "content.delta"]
        assert stream.get_final_completion().choices[0].message.parsed == whole
    assert len(pieces) > 3


def test_several_replies_with_logprobs_are_each_of_the_schema_and_that_of_the_engine(client, starter):
    schema = Seen.model_json_schema()
    how = {"temperature": 1.3, "seed": 11}
    said = client.chat.completions.create(
        model=NAME, messages=asked("Hello!"), max_tokens=300, n=3, logprobs=True, **how,
        response_format=of(schema),
    )  # fmt: skip
    texts = [choice.message.content for choice in said.choices]
    assert len(set(texts)) == 3
    for choice in said.choices:
        jsonschema_rs.validate(schema, json.loads(choice.message.content))
        told = bytes(byte for each in choice.logprobs.content for byte in each.bytes)
        assert told.decode() == choice.message.content
    engine = Engine(starter)
    from tinymodal.infer.model import as_sample

    alone = Sampling(max_new_tokens=300, json_schema=json.dumps(schema, ensure_ascii=False), **how)
    assert engine.reply([as_sample("Hello!")], alone)[0].text == texts[0]


def test_any_object_is_an_object(client):
    ask = {"model": NAME, "messages": asked("Hello!"), "response_format": {"type": "json_object"}}
    for seed in range(3):
        (choice,) = client.chat.completions.create(**ask, temperature=1.8, seed=seed, max_tokens=50).choices
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.message.content.startswith('{"')


def test_a_reply_that_is_cut_is_told_as_such(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**{**ASK, "max_tokens": 3}, response_format=Seen)


def test_a_spoken_reply_may_be_json(client):
    said = client.chat.completions.create(
        **ASK, modalities=["text", "audio"], audio={"voice": "en-us+f1", "format": "wav"},
        response_format=of({"enum": ["a red ring"]}),
    )  # fmt: skip
    assert said.choices[0].message.audio.transcript == '"a red ring"'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strin"}, "strin"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "https://example.org/schema"}, "retriev"),
        ({"$ref": "#"}, "no text"),
        ({"enum": []}, "empty"),
        ({"type": "string", "pattern": "(?<=a)b"}, "look-around"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"enum": ["x" * 70_000]}, "65,536"),
        ({"minimum": 10**4400}, "number"),
    ],
    ids=lambda value: json.dumps(value)[:30] if isinstance(value, dict) and "minimum" not in value else None,
)
def test_a_schema_that_cannot_be_kept_is_refused(server, schema, words, stream):
    status, _, body = server.send("POST", CHAT, _chat(schema, stream))
    told = fault(body)
    assert status == 400
    assert words in told["message"]
    assert "\n" not in told["message"]
    assert len(told["message"]) < 400


def _chat(schema: dict, stream: bool = False) -> bytes:
    import sys

    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return chat(asked("Hello!"), response_format=of(schema), stream=stream)
    finally:
        sys.set_int_max_str_digits(before)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"type": "xml"}, "response_format"),
        ({"type": "json_schema"}, "response_format.json_schema.json_schema"),
        ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.json_schema.name"),
        (
            {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
            "response_format.json_schema.json_schema.name",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": True}},
            "response_format.json_schema.json_schema.schema",
        ),
    ],
)
def test_a_format_that_is_none_is_refused_with_its_place(server, form, param):
    status, _, body = server.send("POST", CHAT, chat(asked("Hello!"), response_format=form))
    assert (status, fault(body)["param"]) == (400, param)


def test_a_schema_that_takes_too_long_is_refused_and_holds_nobody_up(server, monkeypatch):
    monkeypatch.setattr(requests, "SCHEMA_S", 1.5)
    patterns = {f"^a{i}.*b{i}(c|d){{1,50}}$": {} for i in range(800)}
    status, _, body = server.send("POST", CHAT, _chat({"type": "object", "patternProperties": patterns}))
    told = fault(body)
    assert (status, told["param"]) == (400, PLACE)
    assert "longer than 1.5 s" in told["message"]
    assert server.send("POST", CHAT, chat(asked("Hello!"), max_tokens=2))[0] == 200
    assert server.idle()


def test_deep_and_odd_schemas_are_answered(server):
    deep = b'{"type": "array", "items": ' * 4000 + b"{}" + b"}" * 4000
    whole = chat(asked("Hello!"), response_format=of({})).replace(b'"schema": {}', b'"schema": ' + deep)
    status, _, body = server.send("POST", CHAT, whole)
    assert status == 400
    fault(body)


def test_the_page_shows_what_the_starter_says(starter, capsys):
    page = (DOCS / "serving.md").read_text()
    block, printed = re.search(
        r"```python response_format\n(.*?)```\n\n```text\n(.*?)```", page, re.S
    ).groups()
    picture = base64.b64encode((DOCS / "scene.png").read_bytes()).decode()
    with live(starter, key=None) as running:
        exec(block.replace(":8000/", f":{running.port}/"), {"picture": picture, "__name__": "page"})
    assert capsys.readouterr().out == printed


def test_a_server_without_the_library_says_which_is_missing(starter, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with live(starter) as running:
        status, _, body = running.send("POST", CHAT, chat(asked("?"), response_format=of({"enum": [1]})))
        assert (status, "tinymodal[serve]" in fault(body)["message"]) == (400, True)
        assert running.send("POST", CHAT, chat(asked("?"), max_tokens=2))[0] == 200


def test_the_schema_of_the_server_tells_of_it(server):
    told = json.loads(server.send("GET", "/openapi.json")[2])["components"]["schemas"]
    assert set(told["JsonSchema"]["required"]) == {"name", "schema"}
    kinds = told["ChatRequest"]["properties"]["response_format"]["anyOf"][0]["discriminator"]["mapping"]
    assert set(kinds) == {"text", "json_object", "json_schema"}
