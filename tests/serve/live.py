"""A real server in a thread, and what is said to it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import PIL.Image
import soundfile
import torch

from tinymodal.infer.engine import Engine
from tinymodal.infer.scheduler import Scheduler
from tinymodal.serve.app import Served, create_app
from tinymodal.serve.asking import asking_of
from tinymodal.serve.gate import Key, hosts_of
from tinymodal.serve.limits import Limits
from tinymodal.serve.run import listening
from tinymodal.serve.run import server as make_server

NAME = "starter"
KEY = "a-key-of-tests"


@dataclass
class Live:
    """A server that runs."""

    port: int
    served: Served
    engine: Engine
    uvicorn: object
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, **options):
        import openai

        options = {"api_key": KEY, "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=self.url, **options)

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict, bytes]:
        """One request as it is, without a client's good manners."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as raw:
            raw.sendall(self.head(method, path, len(body), **headers) + body)
            return answer_of(raw)

    def head(self, method: str, path: str, length: int | None, **headers: str) -> bytes:
        given = {"host": f"127.0.0.1:{self.port}", "connection": "close", "authorization": f"Bearer {KEY}"}
        if length is not None:
            given["content-length"] = str(length)
        if method == "POST":
            given["content-type"] = "application/json"
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value)]
        return "\r\n".join([*lines, "", ""]).encode()

    def idle(self, within_s: float = 5.0) -> bool:
        """Whether nothing is written and nothing waits, soon."""
        return until(lambda: self.stats.rows == 0 and self.stats.waiting == 0, within_s)

    @property
    def stats(self):
        return self.served.scheduler.stats()


def answer_of(raw: socket.socket) -> tuple[int, dict, bytes]:
    """Status, headers and body of what comes, until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := raw.recv(1 << 16):
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]) if status else 0, headers, body


def until(true, within_s: float = 5.0) -> bool:
    """Whether it becomes so in time."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.01)
    return bool(true())


@contextlib.contextmanager
def live(composed, *, key: str | None = KEY, rows: int = 8, waiting: int = 32, **limits) -> Iterator[Live]:
    """A server over a model; ``limits`` are those of ``Limits``."""
    limits = Limits(rows=rows, waiting=waiting, **limits)
    engine = Engine(composed)
    served = Served(
        engine,
        Scheduler(engine, max_rows=rows, max_waiting=waiting),
        NAME,
        limits=limits,
        key=Key.of(key) if key else None,
        hosts=hosts_of("127.0.0.1"),
        asking=asking_of("starter"),
    )
    bound = listening("127.0.0.1", 0)
    server = make_server(create_app(served), served)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    assert until(lambda: server.started)
    try:
        yield Live(bound.getsockname()[1], served, engine, server, thread)
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()
    assert not thread.is_alive(), "the server does not end"


def slow(engine: Engine, step_s: float) -> None:
    """Let an engine take its time over every step, and never come to an end by itself."""
    word = engine.tokenizer("red", add_special_tokens=False)["input_ids"][0]

    def choose(logits_BV, *_):
        time.sleep(step_s)
        return torch.full((len(logits_BV),), word)

    engine._choose = choose


# What is sent


def png(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def wav(samples, rate_hz: int = 16_000, form: str = "WAV") -> bytes:
    file = io.BytesIO()
    # Floats, so that what is heard is what was there.
    subtype = "FLOAT" if form == "WAV" else None
    soundfile.write(file, np.asarray(samples), rate_hz, format=form, subtype=subtype)
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def seen(data: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def heard(data: bytes, form: str = "wav") -> dict:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": form}}


def asked(*content) -> list[dict]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"role": "user", "content": parts}]


def chat(messages, **more) -> bytes:
    return json.dumps({"model": NAME, "messages": messages, **more}).encode()


def fault(body: bytes) -> dict:
    """The error of an answer, once it is sure that it is one and tells nothing that it should not."""
    told = json.loads(body)["error"]
    assert set(told) == {"message", "type", "param", "code", "request_id"}
    assert told["request_id"].startswith("req_")
    for secret in ("/tinymodal", "site-packages", "Traceback", ".py", "0x7f"):
        assert secret not in told["message"], told
    return told
