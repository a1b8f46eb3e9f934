"""Name the rank that holds the others up, and end the run; never a silent wait.

In a collective every rank waits for the slowest, and if that one never comes, none of them can say why. So
each rank has a thread that tells the others, through the store they met at, where it stands: step, phase,
samples, and for how long. A rank that waits reads what the others told. The one that is furthest behind and
has not moved for the time allowed is named, with what it was doing; every rank writes down where its code
stands (``run/stalled/rank-N.txt``), and the run ends with exit code 1.

A process that was killed is named as well: its thread has fallen silent. One that ended with an error leaves
its last words, and the others end with them.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

from tinymodal.core.errors import TinyModalError
from tinymodal.train.world import World

PHASES = {
    "data": "taking its data",
    "agree": "agreeing on the step",
    "pass": "in a forward or backward pass",
    "sums": "adding up gradients and losses",
    "evaluate": "evaluating",
    "save": "saving",
}
"""What a rank may be doing, in the order of a step."""
PATIENT = ("evaluate", "save")
"""Phases that may take as long as they need while the process lives: others wait for one rank's work."""
SHOWN = 8
"""Samples that a sentence names."""
SILENT = 4
"""Intervals without a word after which a rank is gone, if something else has failed already."""


SPOKEN = "spoken"
"""In the store: somebody has said why the run ends."""
LOST = "the process that holds the run's meeting place (rank 0, or torchrun on its node) is gone"


class Stalled(TinyModalError):
    """Another rank stands still, is gone, or has ended with an error."""


class _Word(NamedTuple):
    """What a rank tells of itself."""

    lap: int = 0
    """Steps it has begun; the same number means the same step on all ranks."""
    phase: str = "data"
    part: int = 0
    """Of the phase: the number of the pass."""
    step: int = 0
    ids: tuple[str, ...] = ()
    """Samples of its newest step."""
    stood_s: float = 0.0
    pulse: int = 0
    host: str = ""
    ended: str = ""
    """Its last words."""

    @property
    def place(self) -> tuple[int, int, int]:
        """Larger is further."""
        return self.lap, list(PHASES).index(self.phase), self.part


class Watchdog:
    """Watches over the ranks of a run while it is entered; does nothing where there is one rank."""

    def __init__(self, folder: Path, world: World, timeout_s: float) -> None:
        """Watch nothing yet.

        Args:
            folder: of the run; where code stood is written to ``folder/stalled``.
            world: the ranks.
            timeout_s: what a rank may take from one :meth:`beat` or :meth:`mark` to the next.
        """
        self.folder, self.world, self.timeout_s = folder, world, timeout_s
        self.interval_s = min(max(timeout_s / 20, 0.05), 2.0)
        self._own = _Word(host=platform.node())
        self._moved = time.monotonic()
        self._pulse = 0
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> its newest pulse, and when it came
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._leaving = False

    def beat(self, step: int, phase: str, sample_ids: Sequence[str] = ()) -> None:
        """This rank has come to ``phase`` of ``step``.

        Args:
            step: of the stage; all ranks beat in the same steps.
            phase: of :data:`PHASES`.
            sample_ids: what it reads; empty: as before.
        """
        if phase not in PHASES:
            raise ValueError(f"unknown phase '{phase}'; phases: {', '.join(PHASES)}")
        own = self._own
        lap = own.lap + (step != own.step)
        ids = tuple(sample_ids) or own.ids
        self._own = own._replace(lap=lap, step=step, phase=phase, part=0, ids=ids)
        self._moved = time.monotonic()

    def mark(self, phase: str, part: int = 0) -> None:
        """This rank has come to ``phase`` of the step it is in."""
        self._own = self._own._replace(phase=phase, part=part)
        self._moved = time.monotonic()

    def __enter__(self) -> Self:
        if self.world.size > 1:
            # A connection of its own: the main one may be waiting for an answer.
            self._store: Any = self.world.store.clone()
            self._store.set_timeout(timedelta(seconds=max(self.timeout_s, 5.0)))
            self._tell()
            self.world.barrier()
            self._moved = time.monotonic()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if error is None or isinstance(error, SystemExit):
            # Still watched: a rank that never gets here is named like any other.
            self.world.barrier()
            self._end_watch()
            return
        if self._leaving:
            self._thread.join()  # which ends this process
        # A rank whose neighbour dies in a collective learns of it as an error of the network.
        known = isinstance(error, TinyModalError) or not isinstance(error, Exception)
        other = None if known else self._fault()
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        words = other or f"{type(error).__name__}: {first}"
        self._own = self._own._replace(ended=words)
        self._end_watch()
        if other is not None:
            raise Stalled(other) from error

    def _end_watch(self) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        try:
            self._tell()
        except RuntimeError:
            return  # the store is gone with the rank that held it

    def _watch(self) -> None:
        """The thread: tell, and while this rank waits, listen."""
        while not self._stop.wait(self.interval_s):
            try:
                self._tell()
                working = self._own.phase in PATIENT
                if working or time.monotonic() - self._moved < 2 * self.interval_s:
                    self._heard = {}
                    continue
                words = self._listen()
            except RuntimeError:
                # Time for the main thread to meet the same fate, and to end in the ordinary way.
                if self._stop.wait(SILENT * self.interval_s):
                    return
                self._leave(LOST)
            self._judge(words)

    def _tell(self) -> None:
        with self._lock:
            self._pulse += 1
            stood_s = time.monotonic() - self._moved
            word = self._own._replace(stood_s=stood_s, pulse=self._pulse)
            self._store.set(f"word/{self.world.rank}", json.dumps(word))

    def _listen(self) -> list[_Word]:
        """What every rank told last; ``stood_s`` grows here for one that has fallen silent."""
        told = self._store.multi_get([f"word/{rank}" for rank in range(self.world.size)])
        now, words = time.monotonic(), []
        for rank, row in enumerate(told):
            values = json.loads(row)
            word = _Word(*values)._replace(ids=tuple(values[4]))
            pulse, when = self._heard.get(rank, (-1, now))
            if pulse != word.pulse:
                when = now
            self._heard[rank] = (word.pulse, when)
            words.append(word._replace(stood_s=word.stood_s + now - when))
        return words

    def _silent_s(self, rank: int) -> float:
        """How long nothing was heard of a rank."""
        return time.monotonic() - self._heard[rank][1]

    def _judge(self, words: Sequence[_Word]) -> None:
        """End the run if a rank that others wait for does not move."""
        ended = [rank for rank, word in enumerate(words) if word.ended]
        if ended:
            # The main thread sees it too, in most collectives; then it ends in the ordinary way.
            if not self._stop.wait(SILENT * self.interval_s):
                self._leave(self._ended(ended[0], words[ended[0]]))
            return
        behind = min(word.place for word in words)
        stood = {
            rank: self._silent_s(rank) if word.phase in PATIENT else word.stood_s
            for rank, word in enumerate(words)
            if word.place == behind
        }
        if max(stood.values()) >= self.timeout_s:
            # What was told is up to two intervals old.
            late = [rank for rank, s in stood.items() if s >= self.timeout_s - 2 * self.interval_s]
            # In a collective all stand at one place; one that has fallen silent there is why.
            silent = [rank for rank in late if self._silent_s(rank) >= SILENT * self.interval_s]
            late = silent or late
            self._leave(self._told(words, late))

    def _told(self, words: Sequence[_Word], late: Sequence[int]) -> str:
        """The sentence."""
        size = len(words)
        waiting = [rank for rank in range(size) if rank not in late]
        if not waiting:
            where = "; ".join(f"rank {rank} {_doing(words[rank])}" for rank in late[:SHOWN])
            return (
                f"none of {size} ranks has moved for {self.timeout_s:g} s: {where}. Look at {self._place()} "
                f"for where each stands; raise parallel.timeout_s if a step may take longer."
            )
        each = []
        for rank in late[:SHOWN]:
            word = words[rank]
            silent = self._silent_s(rank) >= SILENT * self.interval_s
            state = "gives no sign of life and" if silent else "lives but"
            each.append(
                f"rank {rank} on {word.host} {state} has not moved for {word.stood_s:.0f} s: {_doing(word)}"
            )
        ahead = words[waiting[0]]
        others = f"rank {waiting[0]}" + (f" and {len(waiting) - 1} more" if len(waiting) > 1 else "")
        verb = "wait" if len(waiting) > 1 else "waits"
        return (
            f"{'; '.join(each)}. {others} {verb} in step {ahead.step}, {PHASES[ahead.phase]}. Look at that "
            f"rank's machine and samples, and at {self._place()} for where each stands; raise "
            f"parallel.timeout_s if a step may take longer."
        )

    def _place(self) -> Path:
        return self.folder / "stalled"

    @staticmethod
    def _ended(rank: int, word: _Word) -> str:
        return f"rank {rank} on {word.host} has ended in step {word.step}: {word.ended}"

    def _fault(self) -> str | None:
        """Which other rank is the cause of an error here; None where it is this one's own."""
        for rank in range(self.world.size):
            self._heard.pop(rank, None)
        until = time.monotonic() + (SILENT + 1) * self.interval_s
        while time.monotonic() < until:
            try:
                if self._store.check([SPOKEN]):
                    os._exit(1)  # the run ends, and it has been said why
                words = self._listen()
            except RuntimeError:
                return LOST
            for rank, word in enumerate(words):
                if word.ended and rank != self.world.rank:
                    return self._ended(rank, word)
            time.sleep(self.interval_s / 2)
        for rank, word in enumerate(words):
            if rank != self.world.rank and self._silent_s(rank) >= SILENT * self.interval_s:
                return (
                    f"rank {rank} on {word.host} is gone: no sign of life since {_doing(word)}. Look at that "
                    f"machine's log: it was killed, or out of memory."
                )
        return None

    def _leave(self, sentence: str) -> NoReturn:
        """End this process from here: the main thread waits for what will never come."""
        self._leaving = True
        try:
            place = self._place()
            place.mkdir(parents=True, exist_ok=True)
            with (place / f"rank-{self.world.rank}.txt").open("w", encoding="utf-8") as file:
                file.write(f"{sentence}\n\nThis is rank {self.world.rank}, {_doing(self._own)}.\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError:
            pass  # a full disk must not keep the run from ending
        try:
            first = self._store.add(SPOKEN, 1) == 1
        except RuntimeError:
            first = True
        if first:
            sys.stderr.write(f"error: {sentence}\n")
            sys.stderr.flush()
        # The one that has spoken goes last: whoever loses it before could only say that it is gone.
        time.sleep((SILENT if first else 1) * self.interval_s)
        os._exit(1)


def _doing(word: _Word) -> str:
    more = f" and {len(word.ids) - SHOWN} more" if len(word.ids) > SHOWN else ""
    phase = PHASES[word.phase] + (f" ({word.part + 1})" if word.phase == "pass" else "")
    samples = f"samples {', '.join(word.ids[:SHOWN])}{more}" if word.ids else "no samples yet"
    last = "last " if word.phase == "data" and word.ids else ""
    return f"step {word.step}, {phase}, {last}{samples}"
