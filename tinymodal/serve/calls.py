"""One request on its way through the scheduler: its replies, their pieces, and an end for whatever reason.

The scheduler decodes in a thread of its own and requests live in an event loop. A :class:`Call` joins them:
it submits from a worker thread, wakes the loop when there is something new, and when it is closed, because
the answer is complete, the client has hung up or the time is over, every reply that is still being written
is cancelled, also one that was being submitted at that moment.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request

from tinymodal.serve.errors import ClientGone, leaving

if TYPE_CHECKING:
    from tinymodal.core.types import Sample
    from tinymodal.infer.engine import AudioDelta, Reply, Sampling, TextDelta
    from tinymodal.infer.scheduler import Scheduler, Ticket

T = TypeVar("T")


class Call:
    """The replies to one request. Made in the event loop.

    Args:
        scheduler: who decodes.
        sample_id: how the request is called in errors and logs.
        deadline: of the loop's clock: when the whole answer has to be out.
    """

    def __init__(self, scheduler: Scheduler, sample_id: str, deadline: float) -> None:
        self.scheduler, self.sample_id, self.deadline = scheduler, sample_id, deadline
        self.tickets: list[Ticket] = []
        self._closed, self._lock = False, threading.Lock()
        self._news, self._loop = asyncio.Event(), asyncio.get_running_loop()

    def submit(
        self, sample: Sample, samplings: Sequence[Sampling], speak: bool = False, voice: str | None = None
    ) -> None:
        """Put a reply for each of ``samplings`` into the queue. From any thread; all of them or none.

        Raises:
            ClientGone: the call was closed meanwhile.
            QueueFull: as ``Scheduler.submit``, and whatever else that raises.
        """
        try:
            for sampling in samplings:
                ticket = self.scheduler.submit(sample, sampling, speak=speak, voice=voice)
                with self._lock:
                    self.tickets.append(ticket)
                    closed = self._closed
                if closed:
                    raise ClientGone
                ticket.on_piece(self._wake)
        except BaseException:
            self.close()
            raise

    def _wake(self) -> None:
        # The loop is closed where a server was stopped without waiting for its requests.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._news.set)

    async def pieces(self) -> AsyncGenerator[tuple[int, TextDelta | AudioDelta]]:
        """(number of the reply, piece) as they come, until all replies are complete.

        Raises:
            Exception: what the decoding of one of them raised.
        """
        left = dict(enumerate(self.tickets))
        while left:
            self._news.clear()
            for number, ticket in list(left.items()):
                for _ in range(PIECES_AT_ONCE):
                    try:
                        piece = ticket.get(0)
                    except TimeoutError:
                        break
                    if piece is None:
                        if ticket.cancelled:
                            raise leaving()  # we did not: the scheduler was closed
                        del left[number]
                        break
                    yield number, piece
                else:
                    self._news.set()
            if left:
                await self._news.wait()

    async def replies(self) -> list[Reply]:
        """All replies, once they are complete.

        Raises:
            Exception: what the decoding of one of them raised.
        """
        async for _ in self.pieces():
            pass
        return [ticket.reply for ticket in self.tickets]

    def close(self) -> None:
        """Nobody waits any more: whatever is still being written leaves, and frees its place."""
        with self._lock:
            self._closed = True
            tickets = list(self.tickets)
        for ticket in tickets:
            if not ticket.done:
                ticket.cancel()


PIECES_AT_ONCE = 64
"""Pieces of one reply after which the others have their turn."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T], drop: Callable[[], None]) -> T:
    """Do ``work``, unless the client hangs up first.

    Args:
        request: whose body has been read.
        work: what is awaited; cancelled if the client goes.
        drop: called then, or if ``work`` fails.

    Raises:
        ClientGone: it did.
    """
    done = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(hung_up(request))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ClientGone
        return done.result()
    except BaseException:
        drop()
        raise
    finally:
        for task in (done, gone):
            task.cancel()
        # Both have seen their end before the request is left, so that none is destroyed while it is pending.
        await asyncio.gather(done, gone, return_exceptions=True)


async def hung_up(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
