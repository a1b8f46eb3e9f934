"""The batches of the next step, there when they are asked for.

On a CPU they are taken when they are needed: the processor that would prepare them is the one that computes.
For a GPU a thread takes the next step's batches while this one computes, puts them into pinned memory and
copies them on a stream of their own. The order of batches is the loader's either way.

A place in the data belongs to what was *taken*: batches that lie ready are not part of
:meth:`Feed.state_dict`, and a run that goes on from it reads them again.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from tinymodal.core.types import Batch

AHEAD = 1
"""Steps that lie ready. One hides the copy; a second would only hold memory."""


class Loads(Protocol):
    """What a feed needs of a loader; it may also have ``progress``, the share of its draws that are done."""

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Carrier(Protocol):
    """Brings batches to where they are computed on."""

    def send(self, batches: Sequence[Batch]) -> Any:
        """Begin, from the feed's thread; what :meth:`receive` needs to end it."""

    def receive(self, sent: Any) -> list[Batch]:
        """The batches, ready for what the caller computes next."""


class SideStream:
    """Copies to a GPU beside what it computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def send(self, batches: Sequence[Batch]) -> tuple[list[Batch], torch.cuda.Event]:
        # The context names the device as well: in a new thread it is the first GPU, which is another rank's.
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            pinned = [each_tensor(batch, Tensor.pin_memory) for batch in batches]
            there = [
                each_tensor(batch, lambda tensor: tensor.to(self.device, non_blocking=True))
                for batch in pinned
            ]
            # Pinned memory that is let go here is not given out again before its copy is done: torch's
            # allocator keeps an event for each stream that read it.
            done = torch.cuda.Event()
            done.record(self.stream)
        return there, done

    def receive(self, sent: tuple[list[Batch], torch.cuda.Event]) -> list[Batch]:
        batches, done = sent
        computes = torch.cuda.current_stream(self.device)
        computes.wait_event(done)  # the GPU waits, not this process

        def keep(tensor: Tensor) -> Tensor:
            # Allocated on the side stream: without this its memory could take the next copy while the step
            # that reads it is still queued.
            tensor.record_stream(computes)
            return tensor

        return [each_tensor(batch, keep) for batch in batches]


class _Step(NamedTuple):
    """A step's batches and the loader's place behind them."""

    sent: Any
    state: dict[str, Any]
    progress: float | None


class Feed:
    """An iterator over steps: of each the list of its micro-batches. Ends where the loader does."""

    def __init__(
        self,
        loader: Loads,
        device: torch.device,
        micro_batches: int = 1,
        *,
        steps: int | None = None,
        carrier: Carrier | None = None,
    ) -> None:
        """Nothing is read before the first step is asked for.

        Args:
            loader: where batches come from; it is the feed's alone from here on. On a GPU it is called from
                another thread, but for the first step: there its workers are started.
            device: where the step computes.
            micro_batches: batches of a step; the last step of a loader that ends may have fewer.
            steps: to give, no more are read; None: as many as come.
            carrier: in place of the one that the device needs.
        """
        self.loader, self.micro_batches, self.steps = loader, micro_batches, steps
        if carrier is None and device.type == "cuda":
            carrier = SideStream(device)
        self.carrier = carrier
        self.wait_s = 0.0
        """How long the last step was waited for."""
        self._began()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Batch]:
        """The batches of the next step, on the device.

        Raises:
            StopIteration: the loader has ended, or all ``steps`` were given.
            Exception: what the loader raised, when its turn comes.
        """
        began = time.perf_counter()
        try:
            step = self._next()
            self._state, self._progress = step.state, step.progress
            if self.steps is not None:
                self.steps -= 1
            return step.sent if self.carrier is None else self.carrier.receive(step.sent)
        finally:
            self.wait_s = time.perf_counter() - began

    @property
    def progress(self) -> float | None:
        """Share of the loader's draws that the steps taken so far have used; None: it does not tell."""
        return self._progress

    def state_dict(self) -> dict[str, Any]:
        """The loader's place behind the last step that was taken."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to an earlier place; what lies ready is forgotten."""
        self._stop()
        self.loader.load_state_dict(state)
        self._began()

    def close(self) -> None:
        """End the thread and the loader's workers. Asked again, it goes on behind the last step taken."""
        self._stop()
        self.loader.close()

    def _began(self) -> None:
        self._state, self._progress = self.loader.state_dict(), getattr(self.loader, "progress", None)
        self._part: list[Batch] = []
        self._thread: threading.Thread | None = None
        self._behind = False  # the loader is further than what was taken

    def _next(self) -> _Step:
        if self.steps == 0:
            raise StopIteration
        if self._behind:
            self.loader.load_state_dict(self._state)
            self._part, self._behind = [], False
        if self.carrier is None:
            return self._read()
        if self._thread is None:
            # In the caller's thread, so that the loader's workers are forked while nothing else runs.
            step = self._read()
            self._start(None if self.steps is None else self.steps - 1)
            return step
        found = self._ready.get()
        self._slots.release()
        if isinstance(found, BaseException):
            self._thread.join()
            self._thread = None
            raise found
        return found

    def _read(self) -> _Step:
        """One step from the loader. Cut off half-way, it is gone on with."""
        while len(self._part) < self.micro_batches:
            try:
                self._part.append(next(self.loader))
            except StopIteration:
                if not self._part:
                    raise
                break
        state, progress = self.loader.state_dict(), getattr(self.loader, "progress", None)
        sent = self._part if self.carrier is None else self.carrier.send(self._part)
        self._part = []
        return _Step(sent, state, progress)

    def _start(self, steps: int | None) -> None:
        self._ready: queue.SimpleQueue[_Step | BaseException] = queue.SimpleQueue()
        self._slots = threading.Semaphore(AHEAD)
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(steps, self._ready, self._slots, self._over), name="feed", daemon=True
        )
        self._thread.start()

    def _run(
        self,
        steps: int | None,
        ready: queue.SimpleQueue[_Step | BaseException],
        slots: threading.Semaphore,
        over: threading.Event,
    ) -> None:
        while steps is None or steps > 0:
            slots.acquire()
            if over.is_set():
                return
            try:
                ready.put(self._read())
            except BaseException as error:
                ready.put(error)
                return
            steps = None if steps is None else steps - 1

    def _stop(self) -> None:
        """End the thread; the loader may be ahead then."""
        if self._thread is None:
            return
        self._over.set()
        self._slots.release()
        self._thread.join()
        self._thread = None
        self._behind = True


def each_tensor(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """``batch`` with ``change`` done to all of its tensors."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = change(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            changed[field.name] = tuple(map(change, value))
    return dataclasses.replace(batch, **changed)
