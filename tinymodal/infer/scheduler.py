"""Requests that come and go while one thread decodes them: continuous batching.

Between two steps rows that are over leave, those that wait join as far as there is room, first come first
served, and what was cancelled is let go. Newcomers are read together, their pictures and sounds in one pass
of the tower, and then move to the rows that are decoded already. A language model whose state cannot be
joined (linear attention, convolutions; :attr:`Scheduler.joins` tells) has its newcomers in groups of their
own, which take turns.

What one request does wrong is its own: pictures and words are read where it is submitted, and what fails in
a step that others share is tried again one by one. Greedy replies in float32 are those of ``Engine.reply``
alone.

transformers' own continuous batching (``generate_batch``) takes token ids only, no embeddings, so it cannot
serve a model that sees.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from tinymodal.core.errors import TinyModalError
from tinymodal.core.types import Sample
from tinymodal.infer.answer import Answer
from tinymodal.infer.beams import Beams
from tinymodal.infer.decoding import Group
from tinymodal.infer.engine import GREEDY, Engine, Sampling, Voice
from tinymodal.infer.speaking import Utterance
from tinymodal.infer.ticket import Ticket

__all__ = ["QueueFull", "Scheduler", "Stats", "Ticket"]

T = TypeVar("T")

AT_ONCE = 4096
"""Tokens of prompts that are read between two steps, at least one prompt: what the others wait for."""


class QueueFull(TinyModalError):
    """So many requests wait already, or none are taken any more; try again later."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What a scheduler does and did."""

    rows: int
    """Requests being decoded or spoken."""
    waiting: int
    finished: int
    cancelled: int
    failed: int
    refused: int
    """Requests for which the queue was full."""
    tokens_in: int
    """Of prompts that were begun."""
    tokens_known: int
    """Of these, tokens that were not read again."""
    tokens_out: int
    steps: int
    media: int
    """Pictures and sounds of requests that were begun."""
    media_perceived: int
    """Of these, those that went through a tower."""
    kept_mb: float
    """What is kept of what was read, in 10^6 bytes."""


@dataclass(slots=True, eq=False)
class Request:
    """One request, from its place in the queue to its last piece."""

    ticket: Ticket
    answer: Answer
    say: Callable[[], Utterance] | None
    aloud: Utterance | None = None
    rest: Iterator[Tensor] | None = None
    """What is still to be said when the text is over."""
    sound: list[Tensor] = field(default_factory=list)

    @property
    def beams(self) -> int:
        return self.answer.sampling.num_beams


class Scheduler:
    """Decodes the requests of many. While it is open, the engine and its model are its own.

    Args:
        engine: who answers.
        max_rows: requests decoded at once; a request of several beams counts for as many.
        max_waiting: requests that wait; one more is refused.
        prefix_mb: limit of what is kept of what was read, see ``infer/kept.py``; 0 keeps nothing.
    """

    def __init__(
        self, engine: Engine, *, max_rows: int = 16, max_waiting: int = 64, prefix_mb: int = 256
    ) -> None:
        if max_rows < 1 or max_waiting < 1 or prefix_mb < 0:
            raise ValueError(
                f"max_rows {max_rows} and max_waiting {max_waiting} must be at least 1, prefix_mb "
                f"{prefix_mb} at least 0"
            )
        self.engine, self.max_rows, self.max_waiting = engine, max_rows, max_waiting
        engine.keep(prefix_mb)
        engine.model.eval()
        self.joins = engine.language.joins
        """Whether newcomers are decoded together with those that came before."""
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        """By the identity of their answers."""
        self._groups: list[Group] = []
        self._closing = False
        self._counts = dict.fromkeys(("finished", "cancelled", "failed", "refused"), 0)
        self._tokens = dict.fromkeys(("in", "known", "out"), 0)
        self._steps = self._media = 0
        self._perceived = engine.language.num_perceived
        self._num_cores = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="tinymodal-decoding", daemon=True)
        self._thread.start()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    def submit(
        self, sample: Sample, sampling: Sampling = GREEDY, *, speak: bool = False, voice: Voice = None
    ) -> Ticket:
        """Ask. Pictures and words are read here, in the thread that asks.

        Args:
            sample: a conversation that ends with the user's turn.
            sampling: how tokens are chosen.
            speak: say it aloud as well; pieces of sound come between those of the text.
            voice: in which.

        Raises:
            QueueFull: too many wait, or the scheduler is closing.
            DataError: it cannot be encoded, is too long, or there is no such voice.
            CheckpointError: the model does not speak.
        """
        self._refuse()  # before any work is done for it
        if sampling.num_beams > self.max_rows:
            raise ValueError(
                f"num_beams {sampling.num_beams} is more than the {self.max_rows} rows there are"
            )
        say = self.engine.saying(sampling, voice) if speak else None
        answer = self.engine.answer(self.engine.encode(sample), sampling)
        request = Request(Ticket(self), answer, say)
        with self._changed:
            self._refuse()
            self._waiting.append(request)
            self._changed.notify_all()
        return request.ticket

    def close(self, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take no more requests, and end.

        Args:
            drain: answer those that were taken first; otherwise they are cancelled.
            timeout_s: cancel what is not answered by then.
        """
        with self._changed:
            self._closing = True
            if not drain:
                self._cancel_all()
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            with self._changed:
                self._cancel_all()
                self._changed.notify_all()
            self._thread.join()

    def stats(self) -> Stats:
        """What it does and did."""
        with self._changed:
            return Stats(
                rows=len(self._running),
                waiting=len(self._waiting),
                **self._counts,
                tokens_in=self._tokens["in"],
                tokens_known=self._tokens["known"],
                tokens_out=self._tokens["out"],
                steps=self._steps,
                media=self._media,
                media_perceived=self.engine.language.num_perceived - self._perceived,
                kept_mb=self.engine.kept.bytes / 1e6,
            )

    def wake(self) -> None:
        """Something changed that the decoding thread should see."""
        with self._changed:
            self._changed.notify_all()

    def _refuse(self) -> None:
        if self._closing:
            raise QueueFull("the model takes no further requests: it is being shut down")
        if len(self._waiting) >= self.max_waiting:
            with self._changed:
                self._counts["refused"] += 1
            raise QueueFull(f"{len(self._waiting)} requests wait already; try again later")

    def _cancel_all(self) -> None:
        for request in (*self._waiting, *self._running.values()):
            request.ticket.cancelled = True

    # The decoding thread

    def _run(self) -> None:
        torch.set_num_threads(self._num_cores)  # of the thread that made it, whatever others are told
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closing)
                self._let_go()
                if self._closing and not self._waiting and not self._running:
                    return
                new = self._next()
            try:
                self._decode(new)
            except Exception as error:  # a bug of ours: those who wait for it are told, and the rest goes on
                self._groups = []
                for request in list(self._running.values()):
                    self._end(request, "failed", error)
            # Or the last request, its pictures included, would stay until the next one comes.
            del new

    def _let_go(self) -> None:
        """Take what was cancelled out of the queue and the rows."""
        for request in [r for r in self._waiting if r.ticket.cancelled]:
            self._waiting.remove(request)
            self._end(request, "cancelled")
        for request in [r for r in self._running.values() if r.ticket.cancelled]:
            # Over for its group, which it leaves before the next step.
            request.answer.over = request.answer.over or "length"
            self._end(request, "cancelled")

    def _next(self) -> list[Request]:
        """Those whose turn it is, in the order in which they came."""
        free = self.max_rows - sum(request.beams for request in self._running.values())
        found: list[Request] = []
        tokens = 0
        while self._waiting and self._waiting[0].beams <= free:
            tokens += len(self._waiting[0].answer.encoded)
            if found and tokens > AT_ONCE:
                break
            request = self._waiting.popleft()
            free -= request.beams
            found.append(request)
            self._running[id(request.answer)] = request
        return found

    def _decode(self, new: Sequence[Request]) -> None:
        """One step for all: rows that run go on by a token, newcomers are begun, sounds come nearer."""
        going = []
        for group in self._regrouped(self._groups):
            if self._tried(group.advance, [group]) is not None:
                self._heard(group)
                going.append(group)
        apart = [[request] for request in new if request.beams > 1]
        plain = [request for request in new if request.beams == 1]
        for together in [plain, *apart] if plain else apart:
            going += self._begun(together)
        # What is over leaves now: while nothing is asked, nothing is held.
        self._groups = self._regrouped(going)
        self._speak()
        self._steps += 1

    def _regrouped(self, groups: Sequence[Group]) -> list[Group]:
        """Groups without the rows that are over, as few as can be."""
        mixed = [group for group in groups if self.joins and not isinstance(group, Beams)]
        parts = [[group] for group in groups if group not in mixed]
        found = []
        for part in [mixed, *parts] if mixed else parts:
            group = self._tried(partial(Group.regroup, part), part)
            if group is not None and group.answers:
                found.append(group)
        return found

    def _tried(self, do: Callable[[], T], groups: Sequence[Group]) -> T | None:
        """What ``do`` gives; None: it failed, and so have all requests of the groups."""
        try:
            return do()
        except Exception as error:
            for answer in [answer for group in groups for answer in group.answers]:
                if (request := self._running.get(id(answer))) is not None:
                    self._end(request, "failed", error)
            return None

    def _begun(self, new: Sequence[Request]) -> list[Group]:
        """Read the prompts of newcomers: together, and where that fails one by one."""
        try:
            group = self.engine.open([request.answer for request in new], self.engine.kept)
        except Exception as error:
            if len(new) == 1:
                self._end(new[0], "failed", error)
                return []
            found = []
            for request in new:
                # What was chosen before it failed is chosen again.
                request.answer = self.engine.answer(request.answer.encoded, request.answer.sampling)
            with self._changed:
                self._running = {
                    id(request.answer): request
                    for request in (*(r for r in self._running.values() if r not in new), *new)
                }
            for request in new:
                found += self._begun([request])
            return found
        for request in new:
            self._tokens["in"] += len(request.answer.encoded)
            self._tokens["known"] += request.answer.num_kept
            self._media += len(request.answer.encoded.media)
        self._heard(group)
        return [group]

    def _heard(self, group: Group) -> None:
        """Hand the last step's words over, and let those that speak hear them."""
        step = group.step
        for answer in dict.fromkeys(step.answers):
            i = [n for n, other in enumerate(step.answers) if other is answer]
            request = self._running.get(id(answer))
            if request is None or request.ticket.cancelled:
                continue
            try:
                if answer.error is not None:
                    raise answer.error
                self._piece(request, step.states_BD, step.tokens_B, i)
            except Exception as error:
                answer.over = answer.over or "length"
                self._end(request, "failed", error)

    def _piece(self, request: Request, states_BD: Tensor, tokens_B: Tensor, rows: list[int]) -> None:
        answer = request.answer
        if (delta := answer.fresh()) is not None:
            request.ticket.put(delta)
        self._tokens["out"] += len(rows)
        if request.say is not None and answer.words:
            if request.aloud is None:
                request.aloud = request.say()
            self._sound(request, request.aloud.feed(states_BD[rows], tokens_B[rows]))
        if answer.over is not None:
            if request.aloud is not None:
                request.rest = request.aloud.rest()
            else:
                self._end(request, "finished")

    def _speak(self) -> None:
        """A piece of sound for each whose text is over; nobody waits for all of it."""
        for request in [r for r in self._running.values() if r.rest is not None]:
            assert request.rest is not None
            try:
                samples = next(request.rest, None)
                if samples is None:
                    self._end(request, "finished")
                else:
                    self._sound(request, samples)
            except Exception as error:
                self._end(request, "failed", error)

    def _sound(self, request: Request, samples: Tensor) -> None:
        for piece in self.engine.audible(samples):
            request.sound.append(piece.samples)
            request.ticket.put(piece)

    def _end(self, request: Request, how: str, error: BaseException | None = None) -> None:
        """Let a request go; nothing of it stays here."""
        with self._changed:
            self._counts[how] += 1
            self._running.pop(id(request.answer), None)
        reply = None
        if how == "finished":
            audio = rate_hz = None
            if request.say is not None:
                audio = torch.cat([torch.zeros(0), *request.sound])
                rate_hz = self.engine.mouth.codec.rate_hz
            reply = request.answer.reply(audio, rate_hz)
        request.ticket.finish(reply, error)
