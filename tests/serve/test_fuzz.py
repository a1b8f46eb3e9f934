"""Whatever is sent, there is an answer, in time, and it is never that the server failed."""

import io
import json
import random
import time

import PIL.Image
import pytest

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402

from tests.serve.live import KEY, NAME, asked, chat, data_url, fault, heard, live, png, seen, wav  # noqa: E402
from tests.serve.test_protocol import NASTY, SOUNDS  # noqa: E402

PATIENCE_S = 60.0
"""Of an answer of a few tokens on a machine that does other things as well."""
URLS = [*map(data_url, NASTY.values()), "http://127.0.0.1/", "file:///etc/passwd", "data:", ""]


@pytest.fixture(scope="module")
def fuzzed(starter):
    with live(starter, new_tokens=4, choices=2, request_s=50.0, audio_s=5.0) as running:
        yield running


def check(answer: int, body: bytes, took_s: float) -> None:
    assert answer != 0, "the server hung up without a word"
    assert answer < 500, body
    assert took_s < PATIENCE_S
    if answer >= 400:
        fault(body)


def altered(case, data) -> None:
    """Lead a request further in than chance does: to the right model, and to media that are nasty."""
    if not isinstance(case.body, dict):
        return
    if data.draw(st.booleans()):
        case.body["model"] = NAME
    messages = case.body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("image_url"), dict):
                part["image_url"]["url"] = data.draw(st.sampled_from(URLS))


def fuzz(server, examples: int) -> int:
    """Requests that the schema allows, and requests that it forbids; how many were sent."""
    schema = schemathesis.openapi.from_dict(json.loads(server.send("GET", "/openapi.json")[2]))
    base = f"http://127.0.0.1:{server.port}"
    sent = 0

    def answered(case, data) -> None:
        nonlocal sent
        altered(case, data)
        sent += 1
        began = time.monotonic()
        told = case.call(base_url=base, headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE_S)
        check(told.status_code, told.content, time.monotonic() - began)

    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.method.upper() != "POST" and "{" not in operation.path:
            continue  # nothing can be said to it
        # Of a path any text is allowed: there is none that the schema forbids.
        for mode in GenerationMode if operation.method.upper() == "POST" else (GenerationMode.POSITIVE,):
            test = given(case=operation.as_strategy(generation_mode=mode), data=st.data())(answered)
            quiet = settings(
                max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
            )  # fmt: skip
            seed(7)(quiet(test))()
    return sent


def media(server, number: int) -> int:
    """Pictures and sounds of every format with some of their bytes changed; how many were sent."""
    rng = random.Random(7)
    picture = PIL.Image.linear_gradient("L").resize((24, 24)).convert("RGB")
    wholes = [seen(png(picture))]
    for form in ("JPEG", "WEBP", "GIF", "BMP"):
        file = io.BytesIO()
        picture.save(file, form)
        wholes.append(seen(file.getvalue()))
    wave = [0.3 * (i % 40 < 20) for i in range(8000)]
    wholes += [heard(wav(wave, form=form)) for form in ("WAV", "FLAC", "MP3", "OGG")]
    wholes += [heard(sound) for sound in SOUNDS.values()]
    for _ in range(number):
        part = broken(rng.choice(wholes), rng)
        body = chat(asked(part, "?"), max_tokens=2)
        began = time.monotonic()
        status, _, answer = server.send("POST", "/v1/chat/completions", body)
        check(status, answer, time.monotonic() - began)
    return number


def broken(part: dict, rng: random.Random) -> dict:
    """The same medium with a few bytes changed, cut out or put in."""
    import base64

    told = part[part["type"]]
    key = "url" if "url" in told else "data"
    data = bytearray(base64.b64decode(told[key].rpartition(",")[2]))
    for _ in range(rng.randint(1, 8)):
        # Headers are the interesting part.
        at = rng.randrange(min(len(data), rng.choice((16, 64, 100_000))) + 1)
        how = rng.random()
        if how < 0.7 and at < len(data):
            data[at] = rng.randrange(256)
        elif how < 0.85:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        else:
            del data[at : at + rng.randint(1, 200)]
    changed = base64.b64encode(bytes(data)).decode()
    return {**part, part["type"]: {**told, key: data_url(bytes(data)) if key == "url" else changed}}


def test_a_hundred_requests_of_all_kinds_are_answered(fuzzed):
    assert fuzz(fuzzed, 10) + media(fuzzed, 40) >= 100
    assert fuzzed.idle(PATIENCE_S)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_thousand_requests_of_all_kinds_are_answered(fuzzed):
    sent = fuzz(fuzzed, 240) + media(fuzzed, 400)
    assert sent >= 2000
    assert fuzzed.idle(PATIENCE_S)
    assert fuzzed.send("POST", "/v1/chat/completions", chat(asked("Hello!")))[0] == 200
