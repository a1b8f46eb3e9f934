"""An answer that is sent while it is made, to a client that may go at any moment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tinymodal.core.errors import TinyModalError
from tinymodal.serve.calls import Call, unless_gone
from tinymodal.serve.errors import ApiError, ClientGone, internal, of_user, too_slow

log = logging.getLogger("tinymodal.serve")

EVENTS = "text/event-stream"


class Flow(Response):
    """An answer that is sent while it is made. Its end, however it comes, closes the call.

    Args:
        first: its beginning, which is known to be good.
        rest: what follows.
        media_type: of all of it.
        call: closed at the end.
        limit_s: told where the time is over.
        request_id: told where it fails.
    """

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes],
        media_type: str,
        call: Call,
        limit_s: float,
        request_id: str,
    ) -> None:
        super().__init__(
            media_type=media_type, headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self.first, self.rest, self.call = first, rest, call
        self.limit_s, self.request_id = limit_s, request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(Request(scope, receive), self._send(send), self.call.close)
        finally:
            self.call.close()
            await self.rest.aclose()

    async def _send(self, send: Send) -> None:
        async def body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            async with asyncio.timeout_at(self.call.deadline):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await body(self.first)
                async for piece in self.rest:
                    await body(piece)
                await body(b"", more=False)
        except TimeoutError:
            await self._fail(too_slow(self.limit_s), body)
        except ApiError as error:
            await self._fail(error, body)
        except TinyModalError as error:
            await self._fail(of_user(error, self.call.sample_id), body)
        except Exception:
            log.exception("%s failed", self.request_id)
            await self._fail(internal(self.request_id), body)

    async def _fail(self, error: ApiError, body: Callable[..., Awaitable[None]]) -> None:
        """Say why it ends here. Events can say it; a file is cut off, so that it is not taken for whole."""
        if self.media_type != EVENTS:
            raise ClientGone
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):  # who does not read any more shall not hold us
                text = JSONResponse(error.body(self.request_id)).body
                await body(b"data: " + bytes(text) + b"\n\n", more=False)
