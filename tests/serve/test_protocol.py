"""Nonsense is refused with its place, harmless fields are passed over, what cannot be done is named."""

import json

import pytest

from tests.serve.live import NAME, asked, chat, data_url, fault, heard, seen, wav

CHAT = "/v1/chat/completions"
PART = "messages.0.content.0"
HELLO = {"model": NAME, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}


def ask(server, body) -> tuple[int, dict]:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, _, answer = server.send("POST", CHAT, body)
    return status, json.loads(answer)


@pytest.mark.parametrize(
    "more",
    [
        {
            "user": "me",
            "store": False,
            "metadata": {"a": "b"},
            "service_tier": "auto",
            "parallel_tool_calls": True,
        },
        {
            "temperature": None,
            "top_p": None,
            "n": None,
            "stop": None,
            "stream": None,
            "logprobs": None,
            "seed": None,
        },
        {
            "frequency_penalty": 0,
            "presence_penalty": 0.0,
            "logit_bias": {},
            "tools": [],
            "response_format": {"type": "text"},
        },
        {"temperature": 1, "top_p": 1, "stop": [], "modalities": ["text"], "reasoning_effort": "low"},
        {"max_completion_tokens": 4, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2},
    ],
)
def test_what_clients_send_and_changes_nothing_is_passed_over(server, more):
    status, said = ask(server, {**HELLO, **more})
    assert status == 200, said


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello!"}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": asked({"type": "video_url"})}, PART),
        ({"messages": asked({"type": "image_url", "image_url": {}})}, f"{PART}.image_url.image_url.url"),
        ({"audio": {"format": "opus"}}, "audio.format"),
        ({"model": None}, "model"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value)[:40],
)  # fmt: skip
def test_nonsense_is_refused_with_its_place(server, more, param):
    status, said = ask(server, {**HELLO, **more})
    assert status == 400
    assert said["error"]["param"] == param


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        ({"max_completion_tokens": 9}, "differ"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "begins with the assistant"),
        ({"messages": [*HELLO["messages"], {"role": "assistant", "audio": {"id": "audio_1"}}]}, "transcript"),
        ({"messages": [*HELLO["messages"], {"role": "system", "content": "a"}]}, "only open"),
        ({"messages": asked("a <image> b")}, "'<image>'"),
        ({"messages": asked("<|im_start|>system")}, "control token"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "alloy"}}, "en-us+f1"),
        ({"messages": asked("word " * 3000)}, "reads at most"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_done_is_named(server, more, words):
    status, said = ask(server, {**HELLO, **more})
    assert status == 400
    assert words in fault(json.dumps(said).encode())["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"a"', b"\xff\xfe", b'{"model": "\\ud800"}', b'{"model": NaN}', b"1e999",
        b"[" * 100_000, b'{"a":' * 50_000, json.dumps(HELLO).encode() + b"x",
        b'{"messages": [{"role": "user", "content": "\\ud83d"}], "model": "starter"}',
        b'{"model": "starter", "messages": [' + b"null," * 1000 + b"null]}",
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(server, body):
    status, said = ask(server, body)
    assert (status, said["error"]["type"]) == (400, "invalid_request_error")


def test_a_value_that_is_wrong_is_not_repeated(server):
    status, said = ask(server, {**HELLO, "temperature": "my-secret" * 1000})
    assert status == 400
    assert "my-secret" not in json.dumps(said)


NASTY = {
    "empty": b"",
    "no picture": b"hello" * 100,
    "half a png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x08\0\0\0\x08\x08\x02\0\0\0Km)\xdc",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "a sound": wav([0.0] * 160),
    "a size of nothing": b"BM" + b"\0" * 60,
    "a size of everything": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    + b"\x7f\xff\xff\xff" * 2
    + b"\x08\x02"
    + b"\0" * 7,
    "gif of no frames": b"GIF89a\x08\0\x08\0\0\0\0;",
}


@pytest.mark.parametrize("name", NASTY)
def test_a_picture_that_is_none_is_refused_with_its_place(server, name):
    status, said = ask(server, {**HELLO, "messages": asked("?", seen(NASTY[name]))})
    assert (status, said["error"]["param"]) == (400, "messages.0.content.1.image_url.url"), said
    fault(json.dumps(said).encode())


HEAD = b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0"
SOUNDS = {
    "empty": b"",
    "no sound": b"hello" * 100,
    "a picture": b"\x89PNG\r\n\x1a\n",
    "a head alone": HEAD + b"\x01\0\x01\0\x80\x3e\0\0\0\x7d\0\0\x02\0\x10\0data\0\0\0\0",
    "no channel": HEAD + b"\x01\0\0\0\x80\x3e\0\0\0\x7d\0\0\x02\0\x10\0data\x10\0\0\0" + b"\0" * 16,
    "many channels": HEAD + b"\x01\0\xff\xff\x80\x3e\0\0\0\x7d\0\0\x02\0\x10\0data\x10\0\0\0" + b"\0" * 16,
    "no rate": HEAD + b"\x01\0\x01\0\0\0\0\0\0\0\0\0\x02\0\x10\0data\x10\0\0\0" + b"\0" * 16,
    "not a number": wav([float("nan")] * 1600),
    "too loud": wav([1e30] * 1600),
    "cut short": wav([0.1] * 16000)[:-30000],
    "flac cut short": wav([0.1] * 16000, form="FLAC")[:60],
    "mp3 of noise": b"\xff\xfb\x90\x00" + b"\x55" * 40,
    "ogg of nothing": b"OggS" + b"\0" * 60,
    "m4a": b"\0\0\0\x18ftypM4A " + b"\0" * 60,
    "too long": wav([0.0] * (16_000 * 121), form="FLAC"),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUNDS)
def test_a_sound_that_is_none_is_refused_with_its_place(server, name):
    status, said = ask(server, {**HELLO, "messages": asked(heard(SOUNDS[name]), "?")})
    assert (status, said["error"]["param"]) == (400, "messages.0.content.0.input_audio.data"), said
    fault(json.dumps(said).encode())


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,abc", "data:image/png;base64,!!!!", "data:;base64,", "data:image/png;base64,YQ",
        "data:image/png;base64,\u00e4", "data:image/png;base64,YQ==YQ==", "data:",
        "data:" + "a" * 600 + ";base64,YQ==",
    ],
    ids=lambda url: url[:24],
)  # fmt: skip
def test_a_data_url_that_is_none_is_refused(server, url):
    part = {"type": "image_url", "image_url": {"url": url}}
    status, said = ask(server, {**HELLO, "messages": asked(part, "?")})
    assert (status, said["error"]["param"]) == (400, "messages.0.content.0.image_url.url")


def test_a_picture_on_which_something_else_hangs_is_seen_all_the_same(server):
    """Bytes behind a picture's end are common, and are not read."""
    import PIL.Image

    from tests.serve.live import png

    good = png(PIL.Image.new("RGB", (16, 16), "red"))
    part = {"type": "image_url", "image_url": {"url": data_url(good + b"\0" * 5000, "image/anything")}}
    assert server.send("POST", CHAT, chat(asked(part, "?"), max_tokens=2))[0] == 200


FORM = b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\nstarter\r\n--x'
BROKEN_FORMS = {
    "no boundary": (b"", "multipart/form-data"),
    "no form": (b"{}", "application/json"),
    "nothing": (b"", "multipart/form-data; boundary=x"),
    "not begun": (b"hello", "multipart/form-data; boundary=x"),
    "not ended": (FORM, "multipart/form-data; boundary=x"),
    "no file": (FORM + b"--\r\n", "multipart/form-data; boundary=x"),
    "a part without a name": (
        b"--x\r\ncontent-type: a/b\r\n\r\nabc\r\n--x--\r\n",
        "multipart/form-data; boundary=x",
    ),
    "a file that is a text": (
        FORM + b'\r\ncontent-disposition: form-data; name="file"\r\n\r\nabc\r\n--x--\r\n',
        "multipart/form-data; boundary=x",
    ),
    "many fields": (
        b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n' * 100 + b"--x--\r\n",
        "multipart/form-data; boundary=x",
    ),
    "a long field": (FORM + b"\r\ncontent-disposition: " + b"a" * 100_000, "multipart/form-data; boundary=x"),
    "a boundary of bytes": (
        b"--\xff",
        "multipart/form-data; boundary=\xff".encode("latin-1").decode("latin-1"),
    ),
}


@pytest.mark.parametrize("name", BROKEN_FORMS)
def test_a_form_that_is_none_is_refused(server, name):
    body, kind = BROKEN_FORMS[name]
    status, _, answer = server.send("POST", "/v1/audio/transcriptions", body, content_type=kind)
    assert status == (415 if name == "no form" else 400), answer
    fault(answer)
