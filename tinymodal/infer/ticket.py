"""What who asks gets at once: the pieces of a reply as they come, from another thread."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tinymodal.infer.answer import AudioDelta, Reply, TextDelta

if TYPE_CHECKING:
    from tinymodal.infer.scheduler import Scheduler


class Ticket:
    """One request. Made by ``Scheduler.submit``; for one reader."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler: Scheduler | None = scheduler
        self._changed = threading.Condition()
        self._pieces: deque[TextDelta | AudioDelta] = deque()
        self._call: Callable[[], None] | None = None
        self._reply: Reply | None = None
        self._error: BaseException | None = None
        self._over = False
        self.cancelled = False
        """Whether it was given up before it was over."""

    def __iter__(self) -> Iterator[TextDelta | AudioDelta]:
        while (piece := self.get(None)) is not None:
            yield piece

    def get(self, timeout_s: float | None) -> TextDelta | AudioDelta | None:
        """The next piece; None: it is over.

        Args:
            timeout_s: how long to wait for it; None: until it comes.

        Raises:
            TimeoutError: none came in time.
            Exception: what decoding this request raised, after its last piece.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._pieces or self._over, timeout_s):
                raise TimeoutError(f"no piece of the reply came within {timeout_s} s")
            if self._pieces:
                return self._pieces.popleft()
            if self._error is not None:
                raise self._error
            return None

    def on_piece(self, call: Callable[[], None]) -> None:
        """Have ``call`` called from the decoding thread whenever there is something new, and once now.

        It must return at once; ``loop.call_soon_threadsafe`` does.
        """
        with self._changed:
            self._call = call
        call()

    def cancel(self) -> None:
        """Give it up: before the next step it leaves, and frees its row or its place in the queue."""
        scheduler = self._scheduler
        if not self._over and scheduler is not None:
            self.cancelled = True
            scheduler.wake()

    @property
    def done(self) -> bool:
        """Whether no further piece comes: it was said, was given up, or failed."""
        return self._over

    @property
    def reply(self) -> Reply:
        """All of it. Waits until it is over.

        Raises:
            RuntimeError: it was cancelled.
            Exception: what decoding this request raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._over)
        if self._error is not None:
            raise self._error
        if self._reply is None:
            raise RuntimeError("this request was cancelled; it has no reply")
        return self._reply

    # The other end

    def put(self, piece: TextDelta | AudioDelta) -> None:
        """One more piece."""
        self._tell(lambda: self._pieces.append(piece))

    def finish(self, reply: Reply | None = None, error: BaseException | None = None) -> None:
        """Nothing comes any more."""

        def over() -> None:
            self._reply, self._error, self._over = reply, error, True
            self._scheduler = None

        self._tell(over)

    def _tell(self, change: Callable[[], None]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()
            call = self._call
        if call is not None:
            # Whoever listens may have gone, and its event loop with it; nobody else is to suffer for that.
            with contextlib.suppress(Exception):
                call()
