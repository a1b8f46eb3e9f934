"""What every request passes before anything of it is read, and what every answer carries when it leaves.

* its id, ours and never the caller's;
* the name it was sent to: a server on this computer answers to this computer's names only, and no page of
  another site, so that a page in a browser cannot use it through a name that it has turned to point here;
* the key, compared in constant time;
* a place among those that are answered at once;
* a length and a time for its body, both counted while it arrives.

Plain ASGI: nothing is buffered on the way out, and a client that goes is seen at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
import uuid
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinymodal.serve.errors import REQUEST_ID, ApiError, ClientGone, busy, internal, leaving
from tinymodal.serve.limits import Limits
from tinymodal.serve.metrics import GONE, Metrics

log = logging.getLogger("tinymodal.serve")

API = ("/v1/", "/metrics", "/openapi.json")
"""What needs the key; ``/health`` does not, and a web page asks in its own way."""
LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
TOO_LATE = 408
DISCARDED_S = 2.0
"""So long is the rest of a refused body read: who is still sending does not listen for the reason."""


@dataclass(slots=True)
class Doors:
    """Whether new requests are let in."""

    closing: bool = False


@dataclass(frozen=True, slots=True)
class Key:
    """The key that callers must have; kept as a digest, which is compared in constant time."""

    digest: bytes

    @classmethod
    def of(cls, key: str) -> Key:
        return cls(hashlib.sha256(key.encode()).digest())

    def opens(self, header: bytes | None) -> bool:
        """Whether an ``Authorization`` header holds it."""
        scheme, _, given = (header or b"").partition(b" ")
        same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self.digest)
        return same and scheme.lower() == b"bearer"


class Gate:
    """See the head of this file.

    Args:
        app: what is behind it.
        limits: of bodies and requests.
        metrics: counts them.
        doors: whether new requests are let in.
        key: None: none is asked for.
        hosts: names that requests may be sent to; None: any.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        metrics: Metrics,
        doors: Doors,
        key: Key | None = None,
        hosts: frozenset[str] | None = None,
    ) -> None:
        self.app, self.limits, self.metrics, self.doors = app, limits, metrics, doors
        self.key, self.hosts = key, hosts
        self.bytes_held = 0
        self.requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = Visit(self, scope, receive, send)
        self.metrics.in_flight += 1
        try:
            await self._let_in(visit)
        finally:
            self.metrics.in_flight -= 1
            self.bytes_held -= visit.bytes_read
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests[path, visit.status or GONE] += 1
            self.metrics.seconds.add(time.perf_counter() - visit.began)

    async def _let_in(self, visit: Visit) -> None:
        counted = visit.scope["method"] == "POST" and visit.scope["path"].startswith(API)
        try:
            self._check(visit, counted)
        except ApiError as error:
            await visit.refuse(error)
            return
        self.requests += counted
        try:
            await self.app(visit.scope, visit.receive, visit.send)
        except ClientGone:
            pass
        except ApiError as error:
            await visit.refuse(error)
        except Exception:
            log.exception("%s failed", visit.id)
            await visit.refuse(internal(visit.id))
        finally:
            self.requests -= counted

    def _check(self, visit: Visit, counted: bool) -> None:
        headers = dict(visit.scope["headers"])
        path = visit.scope["path"]
        if self.hosts is not None:
            host = _name(b"//" + headers.get(b"host", b""))
            if host not in self.hosts:
                raise ApiError(403, "This server answers to the names of its own computer only.", code="host")
            origin = headers.get(b"origin")
            if origin is not None and _name(origin) not in self.hosts:
                raise ApiError(403, "This server does not answer pages of other sites.", code="origin")
        if (
            self.key is not None
            and path.startswith(API)
            and not self.key.opens(headers.get(b"authorization"))
        ):
            raise ApiError(401, "A valid key is needed: Authorization: Bearer KEY.", code="invalid_api_key")
        if counted:
            if self.doors.closing:
                raise leaving()
            if self.requests >= self.limits.requests:
                raise busy()
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.body_bytes:
            raise too_large(self.limits)


class Visit:
    """One request at the gate: its body counted on the way in, its status on the way out."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self.gate, self.scope = gate, scope
        self._receive, self._send = receive, send
        self.id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = self.id
        self.began = time.perf_counter()
        scope["state"]["began"] = self.began
        self.status = 0
        self.bytes_read = 0
        self.whole = False
        """The body has been read to its end."""

    async def receive(self) -> Message:
        """More of the body; once that is complete, the client's going.

        Raises:
            ApiError: the body is longer than one may be, or takes longer, or is one too many.
        """
        if self.whole:
            return await self._receive()
        limits = self.gate.limits
        try:
            async with asyncio.timeout(self.began + limits.body_s - time.perf_counter()):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                TOO_LATE, f"The request took longer than {limits.body_s:g} s to arrive.", retry=False
            ) from None
        if message["type"] != "http.request":
            self.whole = True
            return message
        self.whole = not message.get("more_body", False)
        size = len(message.get("body", b""))
        self.bytes_read += size
        self.gate.bytes_held += size
        if self.bytes_read > limits.body_bytes:
            raise too_large(limits)
        if self.gate.bytes_held > limits.bodies_bytes:
            raise busy()
        return message

    async def send(self, message: Message) -> None:
        """On the way out."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (REQUEST_ID.encode(), self.id.encode())]
            headers.append((b"x-content-type-options", b"nosniff"))
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error, if nothing was answered yet."""
        if self.status:
            return
        headers = dict(error.headers)
        if not self.whole:
            if error.status != TOO_LATE:
                await self._discard()
            headers["connection"] = "close"
        response = JSONResponse(error.body(self.id), error.status, headers)
        await response(self.scope, self._receive, self.send)

    async def _discard(self) -> None:
        """Read the rest of the body and keep none of it, for a while."""
        left = self.gate.limits.body_bytes
        try:
            async with asyncio.timeout(DISCARDED_S):
                while left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return
        except TimeoutError:
            return


def too_large(limits: Limits) -> ApiError:
    """The body is longer than one may be."""
    return ApiError(413, f"The request is larger than {limits.body_mb:g} MB.", code="too_large")


def _name(address: bytes) -> str | None:
    """The host that an address or an origin names, without its port."""
    try:
        return urlsplit(address.decode("ascii")).hostname
    except ValueError:
        return None


def hosts_of(host: str) -> frozenset[str] | None:
    """The names that a server bound to ``host`` answers to; None: any."""
    return LOOPBACK | {host} if is_loopback(host) else None


def is_loopback(host: str) -> bool:
    """Whether only this computer can reach it."""
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
