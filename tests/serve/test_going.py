"""Clients that go, models that fail, servers that end: nobody's place stays taken, nobody waits for ever."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.serve.live import KEY, NAME, answer_of, asked, chat, fault, live, slow, until

CHAT = "/v1/chat/completions"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def endless(starter):
    """A server whose replies never end by themselves: two are written at once, two may wait."""
    with live(starter, rows=2, waiting=2, drain_s=1.0) as running:
        slow(running.engine, 0.01)
        yield running


def begin(server, path=CHAT, body=None, **more) -> socket.socket:
    """Ask, and keep the line open."""
    body = body or chat(asked("What do you see?"), **{"stream": True, "max_tokens": 2000, **more})
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    raw.sendall(server.head("POST", path, len(body)) + body)
    return raw


def rest_of(raw: socket.socket) -> bytes:
    """Whatever still comes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := raw.recv(1 << 16):
            data += piece
    return data


def test_a_client_that_hangs_up_while_its_answer_streams_frees_its_row_at_once(endless):
    with begin(endless) as raw:
        assert b"200 OK" in raw.recv(4096)
        assert endless.stats.rows == 1
    assert until(lambda: endless.stats.rows == 0, 1.0)
    assert endless.stats.cancelled == 1


def test_a_client_that_hangs_up_before_its_whole_answer_frees_its_row_at_once(endless):
    with begin(endless, stream=False):
        assert until(lambda: endless.stats.rows == 1)
    assert until(lambda: endless.stats.rows == 0, 1.0)


def test_all_choices_of_a_client_that_hangs_up_go(endless):
    with begin(endless, n=2, temperature=1):
        assert until(lambda: endless.stats.rows == 2)
    assert until(lambda: endless.stats.rows == 0, 1.0)
    assert endless.stats.cancelled == 2


def test_a_client_that_hangs_up_while_it_waits_leaves_the_queue(endless):
    with begin(endless), begin(endless):
        assert until(lambda: endless.stats.rows == 2)
        with begin(endless):
            assert until(lambda: endless.stats.waiting == 1)
        assert until(lambda: endless.stats.waiting == 0, 1.0)
        assert endless.stats.rows == 2
    assert endless.idle()


def test_a_client_that_hangs_up_while_its_picture_is_read_leaves_nothing(endless, monkeypatch):
    read = threading.Event()
    submit = endless.served.scheduler.submit

    def late(*given, **more):
        assert read.wait(10)
        return submit(*given, **more)

    monkeypatch.setattr(endless.served.scheduler, "submit", late)
    with begin(endless):
        time.sleep(0.2)
    time.sleep(0.2)
    read.set()
    assert until(lambda: endless.stats.cancelled == 1, 2.0)
    assert endless.idle()


def test_what_finds_the_queue_full_is_refused_and_told_to_come_again(endless):
    lines = [begin(endless), begin(endless)]
    try:
        assert until(lambda: endless.stats.rows == 2)
        lines += [begin(endless), begin(endless)]
        assert until(lambda: (endless.stats.rows, endless.stats.waiting) == (2, 2))
        status, headers, body = endless.send("POST", CHAT, chat(asked("Hello!")))
        assert (status, fault(body)["code"], headers["retry-after"]) == (429, "queue_full", "1")
    finally:
        for raw in lines:
            raw.close()
    assert endless.idle()


def test_several_choices_are_taken_all_or_none(endless):
    with begin(endless), begin(endless):
        assert until(lambda: endless.stats.rows == 2)
        with begin(endless):
            assert until(lambda: endless.stats.waiting == 1)
            status, _, _ = endless.send("POST", CHAT, chat(asked("Hello!"), n=2))
            assert status == 429
            assert until(lambda: endless.stats.waiting == 1)
    assert endless.idle()


def test_a_client_that_does_not_read_is_let_go_when_its_time_is_over(starter):
    with live(starter, rows=2, waiting=2, request_s=1.0) as server:
        slow(server.engine, 0.0)
        with begin(server, logprobs=True, top_logprobs=20) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            assert until(lambda: server.stats.rows == 0, 5.0)


def test_an_answer_that_takes_too_long_is_stopped_and_told(starter):
    with live(starter, rows=2, waiting=2, request_s=0.5) as server:
        slow(server.engine, 0.02)
        began = time.monotonic()
        status, headers, body = server.send("POST", CHAT, chat(asked("Hello!"), max_tokens=2000))
        assert (status, fault(body)["code"], headers["x-should-retry"]) == (503, "timeout", "false")
        assert time.monotonic() - began < 3
        with begin(server) as raw:
            status, _, body = answer_of(raw)
        assert status == 200
        events = [line for line in body.decode().split("\n") if line.startswith("data: ")]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert server.idle()


def test_the_official_client_raises_what_a_stream_ends_with(starter):
    openai = pytest.importorskip("openai")
    with live(starter, request_s=0.5) as server:
        slow(server.engine, 0.02)
        stream = server.client().chat.completions.create(model=NAME, messages=asked("Hello!"), stream=True)
        with pytest.raises(openai.APIError, match="longer than"):
            list(stream)


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_told_by_its_number_alone_and_the_next_request_is_answered(starter, stream, caplog):
    with live(starter) as server:
        choose = server.engine._choose
        server.engine._choose = lambda *_: 1 / 0
        status, headers, body = server.send("POST", CHAT, chat(asked("a secret of mine"), stream=stream))
        told = fault(body)
        assert status == 500
        assert told["request_id"] == headers["x-request-id"]
        assert told["request_id"] in told["message"]
        assert "division" not in body.decode()
        assert "secret" not in body.decode()
        assert f"{told['request_id']} failed" in caplog.text
        server.engine._choose = choose
        assert server.send("POST", CHAT, chat(asked("Hello!")))[0] == 200


def test_a_bug_in_the_middle_of_a_stream_ends_it_with_an_error(starter):
    with live(starter) as server:
        slow(server.engine, 0.0)
        choose, left = server.engine._choose, iter(range(5))

        def breaks(*given):
            return choose(*given) if next(left, None) is not None else 1 / 0

        server.engine._choose = breaks
        status, _, body = server.send("POST", CHAT, chat(asked("Hello!"), stream=True))
        assert status == 200
        assert b"[DONE]" not in body
        assert b'"type":"server_error"' in body
        assert b"division" not in body


def test_what_one_asks_is_told_to_nobody_else(endless):
    """Answers beside each other, one of them refused: nothing of the one is in the other."""
    with begin(endless, body=chat(asked("the red secret"), stream=True, max_tokens=50)) as raw:
        assert raw.recv(4096)
        _, _, body = endless.send("POST", CHAT, chat(asked("<|im_end|>")))
        assert "secret" not in body.decode()
        assert "control token" in fault(body)["message"]


def test_speech_that_nobody_waits_for_is_not_made(starter, monkeypatch):
    from tinymodal.serve import aloud

    said = []
    heard = aloud.heard
    monkeypatch.setattr(aloud, "heard", lambda *given: (said.append(1), heard(*given))[1])
    with live(starter) as server:
        body = json.dumps({"model": NAME, "input": "red. " * 400, "voice": "en+m4", "response_format": "pcm"})
        with begin(server, "/v1/audio/speech", body.encode()) as raw:
            assert raw.recv(4096)
        time.sleep(0.3)
        at = len(said)
        time.sleep(0.5)
        assert len(said) == at < 400


def test_a_server_that_ends_finishes_what_it_has_begun_and_takes_nothing_new(starter):
    with live(starter, drain_s=10.0) as server:
        slow(server.engine, 0.02)
        with begin(server, max_tokens=40) as raw:
            assert raw.recv(1)
            server.uvicorn.handle_exit(signal.SIGTERM, None)
            assert b"[DONE]" in rest_of(raw)
        assert until(lambda: not server.thread.is_alive())


def test_a_server_that_ends_does_not_wait_for_ever(endless):
    with begin(endless) as raw:
        assert raw.recv(4096)
        began = time.monotonic()
        endless.uvicorn.handle_exit(signal.SIGTERM, None)
        assert b"[DONE]" not in rest_of(raw)
        assert until(lambda: not endless.thread.is_alive(), 10)
        assert time.monotonic() - began < 6


def test_while_it_ends_it_says_so(starter):
    with live(starter) as server:
        server.served.doors.closing = True
        assert server.send("GET", "/health")[0] == 503
        status, _, body = server.send("POST", CHAT, chat(asked("Hello!")))
        assert (status, fault(body)["code"]) == (503, "shutting_down")


@pytest.mark.slow
def test_the_command_serves_and_ends_with_what_was_asked(tmp_path):
    """The whole way: a process, a key from the environment, an answer, a signal."""
    openai = pytest.importorskip("openai")
    with subprocess.Popen(
        [sys.executable, "-m", "tinymodal", "serve", "--port", "0", "--api-key", "MY_KEY", "--name", "mine"],
        env={**os.environ, "MY_KEY": KEY, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        try:
            line = next(line for line in process.stderr if "http://" in line)
            url = next(word for word in line.split() if word.startswith("http://"))
            client = openai.OpenAI(base_url=url, api_key=KEY)
            said = client.chat.completions.create(model="mine", messages=asked("Hello!"), max_tokens=8)
            assert said.choices[0].message.content
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
        finally:
            process.kill()
