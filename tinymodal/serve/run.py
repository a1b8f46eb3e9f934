"""A server from its first line to its last: bound where it was told, drained when it is stopped."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinymodal.core.errors import RecipeError
from tinymodal.core.log import say
from tinymodal.serve.gate import is_loopback
from tinymodal.serve.served import Served

MAX_HEAD_BYTES = 64 * 1024
BACKLOG = 128
CONNECTIONS = 512
"""Open at once; more are answered 503 by the server itself."""
KEEP_ALIVE_S = 15


class Impatient(H11Protocol):
    """A connection that is closed if the head of a request does not arrive in time.

    uvicorn waits for ever: a few hundred silent connections would take all the places there are.
    """

    head_s = 30.0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forgive()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Let the time run while a head is awaited, from its first byte on, and not while one is answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forgive()
        elif self._late is None:
            self._late = self.loop.call_later(self.head_s, self._give_up)

    def _forgive(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Draining(uvicorn.Server):
    """A server that tells its routes when it is asked to end: nothing new, and what was begun."""

    def __init__(self, config: uvicorn.Config, served: Served) -> None:
        super().__init__(config)
        self.served = served

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """A signal is a wish to end and no failure: uvicorn would raise it once more when all is done."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.served.doors.closing = True
        super().handle_exit(sig, frame)


def check_address(host: str, key: str | None, open_to_all: bool) -> None:
    """Refuse to let the network in without a key, unless that is what was asked for.

    Raises:
        RecipeError: it is not.
    """
    if key is None and not open_to_all and not is_loopback(host):
        raise RecipeError(
            f"--host {host} lets other computers in; give --api-key VARIABLE, or --without-key if everybody "
            f"who reaches this address may use the model"
        )


def key_of(text: str | None) -> str | None:
    """The key that ``--api-key`` means: of the environment variable of this name, or the text itself.

    Raises:
        RecipeError: it is empty, or cannot be sent in a header.
    """
    if text is None:
        return None
    key = os.environ.get(text, text).strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise RecipeError("--api-key: expected printable ASCII without spaces, at least one character")
    return key


def name_of(model: str) -> str:
    """What clients call a model: a run's name for its folder, a Hub name as it is."""
    path = Path(model)
    if not path.is_dir():
        return model.rstrip("/")
    names = [part for part in path.resolve().parts if part not in ("/", "model")]
    return names[-1] if names else "model"


def listening(host: str, port: int) -> socket.socket:
    """A bound socket, so that an address that is taken is told before a model is loaded.

    Raises:
        RecipeError: it cannot be bound.
    """
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        family = socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"{host} port {port}: cannot be listened at ({reason}); choose another --port"
        ) from error
    return bound


def server(app: Any, served: Served) -> Draining:
    """A uvicorn server with our limits, not started."""
    patience = type("Impatient", (Impatient,), {"head_s": served.limits.body_s})
    config = uvicorn.Config(
        app,
        http=patience,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(served.limits.drain_s) or 1,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    return Draining(config, served)


def run(app: Any, served: Served, bound: socket.socket, page: bool = False) -> None:
    """Serve until a signal ends it. ``page``: whether there is one to chat with."""
    # It warns of every odd byte of a form; what is wrong with one is told to its sender.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    host, port = bound.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    here = f"http://{address}:{port}"
    beside = f", and chats at {here}" if page else ""
    say(f"{served.name} answers OpenAI clients at {here}/v1{beside} (Ctrl-C ends it)")
    try:
        server(app, served).run(sockets=[bound])
    finally:
        bound.close()
    say("stopped; every answer that was begun in time is out")
