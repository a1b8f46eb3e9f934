"""A request to end: the step in hand is finished and saved, and the process leaves with a word of it.

SIGTERM is what a scheduler sends before it takes the machine away; SIGINT is Ctrl-C. The first of either
asks, a second one leaves at once, as a kill does: the newest checkpoint stands.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tinymodal.core.log import say

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """Ends the process when nobody catches it: exit code 0 after SIGTERM, 130 after SIGINT."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum if signum == signal.SIGINT else 0)
        self.signum = signum


class Stop:
    """Whether the run was asked to end."""

    def __init__(self) -> None:
        self.signum: int | None = None
        """Of the signal that asked."""

    @property
    def asked(self) -> bool:
        return self.signum is not None

    def leave(self, where: str) -> None:
        """End the process; call it when all is saved.

        Args:
            where: how far the run is and how it goes on, for the sentence that is said.

        Raises:
            Stopped: always.
        """
        assert self.signum is not None
        say(f"stopped by {signal.Signals(self.signum).name}: {where}")
        raise Stopped(self.signum)


@contextmanager
def on_signals() -> Iterator[Stop]:
    """Inside, SIGTERM and SIGINT ask the run to end instead of ending it; afterwards all is as before.

    Only the main thread of a process can do so; in another one nothing is changed and nothing ever asks.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    owner = os.getpid()

    def ask(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a data worker, which was forked with this handler: its parent decides
            return
        name = signal.Signals(signum).name
        if stop.asked:
            _write(f"{name} again: leaving at once; the newest checkpoint stands")
            os._exit(128 + signum)
        stop.signum = signum
        _write(f"{name}: this step is finished and saved, then the run ends; once more leaves at once")

    before: dict[signal.Signals, Any] = {signum: signal.getsignal(signum) for signum in SIGNALS}
    for signum in SIGNALS:
        signal.signal(signum, ask)
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            # None: it was set by something that is not Python, and Python cannot set it again.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def _write(line: str) -> None:
    """To stderr past its buffer, in the middle of which the signal may have come."""
    try:
        os.write(2, f"{line}\n".encode())
    except OSError:
        return
