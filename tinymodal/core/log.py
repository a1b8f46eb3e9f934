"""What a run says: lines and a progress bar on stderr, numbers to a jsonl file.

stdout is left to results, so that it can be piped. The bar draws itself twice a second from the caller's
thread; where stderr is no terminal it becomes a plain line now and then.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console

DRAW_EVERY_S = 0.5
"""A refresh costs about 3 ms of Python: twice a second is under 1 % of one core."""
LINE_EVERY_S = 15.0
"""Time between two lines where there is no terminal."""


@functools.cache
def console() -> Console:
    """The one console of this process, on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line for the person who waits; a bar that is shown stays below it."""
    console().print(text, markup=False)


def program() -> str:
    """How the person at the terminal can call us again: by name where it is on the path, else as now."""
    called = Path(sys.argv[0])
    if shutil.which("tinymodal"):
        return "tinymodal"
    if called.name == "tinymodal" and called.is_file():
        return os.path.relpath(called)
    return f"{os.path.basename(sys.executable)} -m tinymodal"


class Progress:
    """How far, how fast and how long still.

    Use as a context; call :meth:`advance` after each step.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        unit: str = "steps",
        start: int = 0,
        shown: bool = True,
        share: float = 0.0,
    ) -> None:
        """Nothing is drawn before the context is entered.

        Args:
            title: stands before all else.
            total: steps in all; None where nobody knows, and :meth:`advance` is told the share that is done.
            unit: of what is counted.
            start: where a resumed run goes on.
            shown: False: say nothing.
            share: that was done at ``start``; read where ``total`` is None.
        """
        self.title, self.total, self.unit, self.done = title, total, unit, start
        self.shown, self.share = shown, share
        self._start, self._start_share, self._since = start, share, time.monotonic()
        self._drawn = self._since
        self._note = ""
        self._bar: Any = None

    def __enter__(self) -> Self:
        self._since = self._drawn = time.monotonic()
        if self.shown and console().is_terminal:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[count]}"),
                TextColumn("{task.fields[rate]}"),
            )
            # Drawn by us: a refresh thread would take the interpreter from the step ten times a second.
            self._bar = Bar(*columns, console=console(), auto_refresh=False, transient=False)
            self._task = self._bar.add_task(
                self.title, total=1.0, completed=self._share(), count=self._count(), rate=""
            )
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._draw()
            self._bar.stop()
        elif self.shown and kind is None:
            say(self.line())

    def advance(self, steps: int = 1, note: str = "", share: float | None = None) -> None:
        """``steps`` more are done; ``note`` (e.g. the loss) stands behind the rate.

        ``share`` of the whole, 0 to 1, is what a bar without a total goes by.
        """
        self.done += steps
        self._note = note or self._note
        self.share = self.share if share is None else share
        now = time.monotonic()
        wait_s = DRAW_EVERY_S if self._bar is not None else LINE_EVERY_S
        if not self.shown or now - self._drawn < wait_s:
            return
        self._drawn = now
        if self._bar is not None:
            self._draw()
        else:
            say(self.line())

    def _draw(self) -> None:
        self._bar.update(self._task, completed=self._share(), count=self._count(), rate=self._rate())
        self._bar.refresh()

    def _share(self) -> float:
        if self.total is None:
            return self.share
        return self.done / self.total if self.total else 1.0

    def _count(self) -> str:
        if self.total is None:
            return f"{self.done:,} ({100 * self.share:.0f} %)"
        return f"{self.done:,}/{self.total:,}"

    def _rate(self) -> str:
        spent_s = time.monotonic() - self._since
        made = self.done - self._start
        if made <= 0 or spent_s <= 0:
            return self._note
        return "  ".join(filter(None, (self._speed(made / spent_s), self._left(spent_s), self._note)))

    def _speed(self, rate: float) -> str:
        """``8.1 steps/s``, and ``7.4 s/step`` where that reads better."""
        if rate >= 1 or not self.unit.endswith("s"):
            return f"{rate:,.1f} {self.unit}/s"
        return f"{1 / rate:,.1f} s/{self.unit[:-1]}"

    def _left(self, spent_s: float) -> str:
        if self._share() >= 1:
            return clock(spent_s)
        if self.total is None:
            made, rest = self.share - self._start_share, 1 - self.share
        else:
            made, rest = self.done - self._start, self.total - self.done
        return f"{clock(spent_s * rest / made)} left" if made > 0 else ""

    def line(self) -> str:
        """The state as one line, e.g. ``align  120/400  8.1 steps/s  0:34 left  loss 1.234``."""
        return f"{self.title}  {self._count()}  {self._rate()}".rstrip()


def clock(seconds: float) -> str:
    """``75.2`` -> ``1:15``, ``3700`` -> ``1:01:40``."""
    whole = round(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class Metrics:
    """One JSON object a line, appended. Lines reach the file within two seconds, or at :meth:`flush`."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._flushed = time.monotonic()

    def log(self, row: dict[str, Any]) -> None:
        """Append ``row``, see :func:`json_line`."""
        self._file.write(json_line(row))
        if (now := time.monotonic()) - self._flushed > 2.0:
            self._file.flush()
            self._flushed = now

    def flush(self) -> int:
        """Everything is on disk; the length of the file in bytes, for :meth:`rewind`."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def rewind(self, length: int) -> None:
        """Forget what was written after ``length`` bytes: steps that a resumed run does again."""
        self._file.flush()
        self._file.truncate(min(length, self._file.seek(0, os.SEEK_END)))
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()


def json_line(row: dict[str, Any]) -> bytes:
    """``row`` as one line of a jsonl file, strict JSON: a number that is not finite becomes null."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    # Half a character, as in the name of a file that is not UTF-8, is written as its escape.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def append(path: Path, row: dict[str, Any]) -> None:
    """Put one line behind a jsonl file, on disk when this returns.

    One call of the system writes it whole, so other processes that append cannot come between.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, json_line(row))
        os.fsync(handle)
    finally:
        os.close(handle)
