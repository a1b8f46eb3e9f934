"""Who may come in, how much may be brought, and what is told to those who may not."""

import json
import socket
import time

import PIL.Image
import pytest

from tests.serve.live import KEY, NAME, answer_of, asked, chat, fault, live, png, seen, until
from tinymodal.serve.gate import Key, hosts_of

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"]
)
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/metrics", "/openapi.json", "/v1/nothing"])
def test_without_the_key_nothing_is_answered(server, path, given):
    method = "POST" if path == CHAT else "GET"
    status, headers, body = server.send(method, path, chat(asked("Hello!")), authorization=given)
    assert (status, fault(body)["code"]) == (401, "invalid_api_key")
    assert headers["www-authenticate"] == "bearer"


def test_with_the_key_however_the_word_before_it_is_written(server):
    assert server.send("GET", "/v1/models", authorization=f"bearer  {KEY}")[0] == 200


def test_a_key_is_kept_as_a_digest_and_compared_as_a_whole():
    key = Key.of("secret")
    assert b"secret" not in key.digest
    assert key.opens(b"Bearer secret")
    assert not any(key.opens(given) for given in (None, b"", b"Bearer ", b"Bearer secre", b"Bearer \xff"))


def test_whether_it_lives_may_be_asked_by_everybody(server):
    assert json.loads(server.send("GET", "/health", authorization="")[2]) == {"status": "ok"}


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[", "\xff"]
)
def test_a_name_that_was_turned_to_this_computer_is_not_answered(server, host):
    status, _, body = server.send("GET", "/v1/models", host=host)
    assert status in (400, 403)
    assert status == 400 or fault(body)["code"] == "host"


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000"])
def test_the_names_of_this_computer_are(server, host):
    assert server.send("GET", "/v1/models", host=host)[0] == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example"])
def test_a_page_of_another_site_is_not_answered(server, origin):
    status, _, body = server.send("POST", CHAT, chat(asked("Hello!")), origin=origin)
    assert (status, fault(body)["code"]) == (403, "origin")
    assert server.send("POST", CHAT, chat(asked("Hello!")), origin="http://localhost:3000")[0] == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_what_a_page_may_send_without_asking_is_not_read(server, kind):
    status, _, body = server.send("POST", CHAT, chat(asked("Hello!")), content_type=kind)
    assert status == 415
    assert "application/json" in fault(body)["message"]


def test_a_server_that_others_can_reach_answers_to_any_name():
    assert hosts_of("0.0.0.0") is None
    assert hosts_of("127.0.0.1") == hosts_of("localhost") == {"127.0.0.1", "localhost", "::1"}


@pytest.mark.parametrize(("path", "status"), [("/", 404), ("/v1", 404), ("/docs", 404), (CHAT, 405)])
def test_a_path_or_a_method_that_is_not_there_is_told_in_the_same_shape(server, path, status):
    found, headers, body = server.send("GET", path)
    assert found == status
    assert fault(body)["request_id"] == headers["x-request-id"]


def test_a_callers_own_request_id_is_not_taken_over(server):
    _, headers, _ = server.send("GET", "/v1/models", x_request_id="mine")
    assert headers["x-request-id"].startswith("req_")


# How much


@pytest.fixture(scope="module")
def narrow(starter):
    """A server with little patience and little room."""
    with live(
        starter, body_mb=0.1, body_s=0.5, pictures=2, pixels=10_000, audio_s=1.0, characters=100,
        new_tokens=64, choices=2, bodies_mb=0.1,
    ) as running:  # fmt: skip
        yield running


def test_a_body_that_says_it_is_too_long_is_refused_unread(narrow):
    status, headers, body = narrow.send("POST", CHAT, b" " * 100_001)
    assert (status, fault(body)["code"]) == (413, "too_large")
    assert headers["connection"] == "close"


def test_a_body_that_does_not_say_is_counted_while_it_comes(narrow):
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=10) as raw:
        raw.sendall(narrow.head("POST", CHAT, None, transfer_encoding="chunked"))
        piece = b"2710\r\n" + b" " * 10_000 + b"\r\n"
        for _ in range(11):
            raw.sendall(piece)
        raw.sendall(b"0\r\n\r\n")
        status, _, body = answer_of(raw)
    assert (status, fault(body)["code"]) == (413, "too_large")


def test_a_body_that_drips_is_given_up(narrow):
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=10) as raw:
        raw.sendall(narrow.head("POST", CHAT, 1000) + b"{")
        status, _, body = answer_of(raw)
    assert status == 408, body
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/chat", b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\nGET /"]
)
def test_a_connection_on_which_nothing_is_asked_is_closed(narrow, sent):
    """uvicorn itself would wait for ever for the rest of a head, the first or the second one."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=30) as raw:
        raw.sendall(sent)
        while raw.recv(1 << 16):
            pass
    # Sooner than uvicorn's 15 s for a connection that is kept.
    assert 0.4 < time.monotonic() - began < 12


def test_bodies_together_have_a_limit_too_and_it_is_free_again(narrow):
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=10) as raw:
        raw.sendall(narrow.head("POST", CHAT, 90_000) + b" " * 80_000)
        time.sleep(0.1)
        status, _, body = narrow.send("POST", CHAT, b" " * 50_000)
        assert (status, fault(body)["code"]) == (429, "queue_full")
    assert until(lambda: narrow.send("POST", CHAT, chat(asked("Hello!")) + b" " * 50_000)[0] == 200)


BLACK = PIL.Image.new("RGB", (90, 90))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"messages": asked(*[seen(png(BLACK.resize((8, 8))))] * 3, "?")},
            "3 pictures; a request may have 2",
        ),
        ({"messages": asked(seen(png(BLACK)), seen(png(BLACK)), "?")}, "10,000 pixels together"),
        ({"messages": asked(seen(png(BLACK.resize((5000, 5000)))), "?")}, "10,000 pixels together"),
        ({"messages": asked("x" * 60, "y" * 60)}, "120 characters of text; a request may have 100"),
        ({"messages": asked("?"), "max_tokens": 65}, "a reply may have 64"),
        ({"messages": asked("?"), "n": 3}, "a request may have 2"),
    ],
    ids=["pictures", "pixels", "one huge", "characters", "tokens", "choices"],
)
def test_what_is_too_much_is_told_with_its_limit(narrow, given, words):
    status, _, body = narrow.send("POST", CHAT, json.dumps({"model": NAME, **given}).encode())
    assert status == 400
    assert words in fault(body)["message"]


def test_sounds_have_a_length_together(narrow):
    from tests.serve.live import heard, wav

    sound = heard(wav([0.0] * 9600, form="FLAC"))
    status, _, body = narrow.send("POST", CHAT, chat(asked(sound, "?")))
    assert status == 200
    status, _, body = narrow.send("POST", CHAT, chat(asked(sound, sound, "?")))
    assert status == 400
    assert "1 s together" in fault(body)["message"]


def test_numbers_that_are_counted_are_told_to_prometheus(server):
    before = counted(server)
    server.send("POST", CHAT, chat(asked("Hello!")))
    server.send("POST", CHAT, b"{")
    server.send("GET", "/nowhere/at/all")
    after = counted(server)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more(f'tinymodal_requests_total{{route="{CHAT}",status="200"}}') == 1
    assert more(f'tinymodal_requests_total{{route="{CHAT}",status="400"}}') == 1
    assert more('tinymodal_requests_total{route="other",status="404"}') == 1
    assert more("tinymodal_finished_total") == 1
    assert more("tinymodal_tokens_out_total") > 0
    assert more("tinymodal_request_seconds_count") == 4  # with the metrics themselves
    assert after['tinymodal_request_seconds_bucket{le="+Inf"}'] == after["tinymodal_request_seconds_count"]
    assert after["tinymodal_requests_in_flight"] == 1


def counted(server) -> dict[str, float]:
    _, headers, body = server.send("GET", "/metrics")
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = [line for line in body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
