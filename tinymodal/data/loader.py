"""Batches from any position: draw, encode, pack or group, collate.

Worker processes only turn a draw into an ``Encoded``, a pure function of its number. The order of draws,
packing and collating stay in this process. So the batches are the same for any number of workers, and the
whole position is a few integers: how many draws were made, and which of them wait in open rows. Those are
encoded again on resume, bit for bit.

**Ranks.** Each process has a loader, which takes every ``world``-th draw and packs by itself; nothing is
asked of the others. ``merge_states`` joins the positions of all; ``load_state_dict`` goes on from there with
as many ranks, bit for bit, or with another number, without repeating or leaving out a sample
(``data/deal.py``).

**Ends.** ``ends`` says whether the draws end (``data/mixture.py``). At the end open rows are given out as
they are, and the last batch may have fewer. One process alone then gets ``StopIteration``. Of several, each
has another number of batches, and none knows the others': one that has run out gives batches without targets
for ever, and the step in which the targets of *all* ranks, which a step adds up anyway, are none tells every
rank at once that the step before was the last. It costs no message, and one pass over a padding position.

**Progress.** ``done`` and ``progress`` of all ranks, added up, are the draws that are done with and their
share of all; ``Batch.num_draws`` is what one batch adds to ``done``. A step adds up small numbers over ranks
anyway; rates that follow this sum are the same on every rank, which those that follow one rank's own part are
not.

A bad row (``DataError``) ends the training when its turn comes, or is skipped and named in
``Loader.skipped``, as the recipe says. A sample longer than a row is always left out and named in
``Loader.dropped``. Data of which nothing can be used ends with an error after ``HOPELESS`` draws in a row
instead of spinning for ever.

What this process spends on a sample beside encoding it, measured on one core of a busy machine: 20 µs for 30
tokens of text, 60 µs with a picture of 48 px, 1.7 ms with one of 384 px (1.8 MB that are copied into the
batch). Handing samples over from a worker adds 0.12 ms, for 384 px 1.3 ms: workers pay once encoding takes
longer.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from tinymodal.core.errors import CheckpointError, DataError, RecipeError
from tinymodal.core.types import Batch, Encoded, Sample
from tinymodal.data.augment import Augment
from tinymodal.data.bundle import Bad, bundle, unbundle
from tinymodal.data.collate import collate
from tinymodal.data.deal import Deal, redeal, states_of
from tinymodal.data.group import GroupedBatches
from tinymodal.data.mixture import Draw, Ends, Mixture
from tinymodal.data.pack import Dropped, PackedBatches, Packer, Row
from tinymodal.data.sources import Source

HOPELESS = 1000
"""Unusable draws in a row that end the training. Where 1 row in 50 is usable, the odds of it are 10^-8."""

CHUNK = 32
"""Draws that a worker encodes at a time; one message for all keeps the cost of sending low."""

LISTED = 10_000
"""Bad rows and long samples that are listed by name; more are only counted."""


class Skipped(NamedTuple):
    """A bad row and what is wrong with it, in the error's own words."""

    sample_id: str
    reason: str


class Loader:
    """An iterator of ``Batch``; see the module for what it promises."""

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Callable[[Sample], Encoded],
        *,
        seq_len: int,
        batch_tokens: int,
        pad_id: int,
        image_token_id: int,
        audio_token_id: int | None = None,
        weights: Sequence[float] | None = None,
        patches: int | None = None,
        frames: int | None = None,
        open_rows: int = 16,
        seed: int = 0,
        bad_rows: Literal["raise", "skip"] | int = "raise",
        workers: int = 0,
        complete: Callable[[list[Row]], list[Row]] | None = None,
        changes: Sequence[Augment | None] | None = None,
        batching: Literal["pack", "grouped"] = "pack",
        ends: Ends = "repeat",
        epochs: Sequence[int | None] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Open at draw 0.

        Args:
            sources: objects with ``sample(index)``; those with a length are drawn in epochs.
            encoder: a pure function of the sample.
            seq_len: positions of a row.
            batch_tokens: positions of a batch, padding included. Packed: ``batch_tokens // seq_len`` rows.
            pad_id: token that fills rows.
            image_token_id: the placeholder's token.
            audio_token_id: the same for sounds; None: the model does not hear.
            weights: draws of each source relative to the others, see ``Mixture``.
            patches: image patches that a row may hold; None for any number.
            frames: frames of sound that a row may hold; None for any number.
            open_rows: rows that are filled at the same time, see ``Packer``.
            seed: fixes the order of draws.
            bad_rows: what a ``DataError`` of a row does. A number: so many rows may be skipped by this
                process, each counted once however often it is drawn; one more ends the training.
            workers: processes that encode; 0 encodes in this one. Changes nothing but the speed.
            complete: called with a batch's rows right before they are collated, in this process; gives rows
                of the same samples, whose pictures and sounds may have become a tower's features
                (``MediaItem.seen``), and what is spoken codes (``SpeechItem.codes``).
            changes: how the sounds of each source are changed at random, by ``seed`` and the draw's number.
            batching: ``pack``: rows of many samples. ``grouped``: of one, see ``data/group.py``.
            ends: whether the draws end, see ``Mixture``.
            epochs: times that each source is read where they do.
            rank: this process among
            world: as many.
        """
        if batch_tokens < seq_len:
            raise RecipeError(
                f"batch_tokens {batch_tokens} is less than one row of seq_len {seq_len}; raise it, or "
                f"shorten the rows"
            )
        if isinstance(bad_rows, bool) or (isinstance(bad_rows, str) and bad_rows not in ("raise", "skip")):
            raise RecipeError(f"bad_rows: {bad_rows!r}; expected raise, skip, or how many may be skipped")
        if isinstance(bad_rows, int) and bad_rows < 0:
            raise RecipeError(f"bad_rows: {bad_rows}; expected 0 or more, raise or skip")
        if batching not in ("pack", "grouped"):
            raise RecipeError(f"batching: {batching!r}; expected pack or grouped")
        if workers < 0:
            raise RecipeError(f"workers: {workers}; expected 0 or more")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        self.mixture = Mixture(sources, weights, seed, ends, epochs)
        self.deal = Deal(rank, world, total=self.mixture.total)
        packer = Packer(seq_len, patches, open_rows, frames)
        self.batches: PackedBatches | GroupedBatches = (
            PackedBatches(packer, batch_tokens // seq_len)
            if batching == "pack"
            else GroupedBatches(seq_len, batch_tokens, patches, frames=frames)
        )
        self.pad_id, self.image_token_id, self.audio_token_id = pad_id, image_token_id, audio_token_id
        self.max_skipped: int | None = (
            {"raise": 0, "skip": None}[bad_rows] if isinstance(bad_rows, str) else bad_rows
        )
        self.workers = workers
        self.complete = complete
        self.num_sources = len(sources)
        self.encode = _Encode(sources, encoder, changes or [None] * len(sources), seed)
        self.draws = 0
        """Samples that this rank has drawn so far in this deal, unusable ones included."""
        self.skipped: list[Skipped] = []
        """Bad rows, each once, in order of first sight; at most ``LISTED``, or as many as may be skipped."""
        self.dropped: list[Dropped] = []
        """Samples that no row can hold, each once, in order of first sight; at most ``LISTED``."""
        self.num_skipped = 0
        self.num_dropped = 0
        self._unusable = 0  # draws in a row that gave nothing
        self._named: set[tuple[type, str]] = set()
        self._stream: Iterator[Encoded | Bad] | None = None
        self._settings: dict[str, Any] = {
            "seed": seed,
            "rows of each source": list(self.mixture.sizes),
            "share of each source": self.mixture.shares,
            "ends": ends,
            "draws in all": self.mixture.total,
            "batching": batching,
            "seq_len": seq_len,
            "patches": patches,
            "frames": frames,
            "open_rows": open_rows,
        }
        self._position = self._here()

    @property
    def total_draws(self) -> int | None:
        """Draws of the stage, over all ranks; None: it does not end with its data."""
        return self.mixture.total

    @property
    def done(self) -> int:
        """This rank's part of the draws that are done with, given out or found unusable.

        Added up over ranks they are those of the stage, also after the number of ranks has changed.
        """
        here = self._position
        waiting = sum(map(len, (*here["open"], *here["ready"])))
        return here["draws"] - waiting + (self.deal.done if self.deal.rank == 0 else 0)

    @property
    def ended(self) -> bool:
        """Whether this rank has given out all its samples; never before its draws are at an end."""
        here = self._position
        waits = here["open"] or here["ready"]
        return not waits and self.deal.number(here["draws"]) is None

    @property
    def progress(self) -> float | None:
        """``done`` as a share of the stage's draws; None where it does not end with its data.

        Of several ranks each has its part: only their sum is the share, and the same for all.
        """
        return None if self.total_draws is None else self.done / self.total_draws

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        before = self.done
        while (rows := self.batches.take()) is None:
            if (number := self.deal.number(self.draws)) is not None:
                self._draw(number)
                continue
            self.close()
            self.batches.end()
            rows = self.batches.take() or []
            break
        if not rows and self.deal.world == 1:
            self._position = self._here()
            self._see_that_something_was_used()
            raise StopIteration
        if rows and self.complete is not None:
            rows = self.complete(rows)
        batch = collate(
            rows,
            self.pad_id,
            self.image_token_id,
            num_sources=self.num_sources,
            audio_token_id=self.audio_token_id,
        )
        self._position = self._here()
        return replace(batch, num_draws=self.done - before)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch, in plain values: a few integers for each waiting sample.

        Also after a batch that failed or was interrupted half-way: its draws are then made again. Of several
        ranks each has its own; ``merge_states`` joins them.
        """
        here = self._position
        return {
            **here,
            "rank": self.deal.rank,
            "world": self.deal.world,
            "backlog": list(self.deal.backlog),
            "start": self.deal.start,
            "skipped": [list(row) for row in self.skipped[: here["skipped"]]],
            "dropped": [list(row) for row in self.dropped[: here["dropped"]]],
            "settings": dict(self._settings),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to an earlier position.

        Args:
            state: of all ranks (``merge_states``), or this rank's own. Of as many ranks as there are now: the
                next batch is the one that came next then, bit for bit. Of another number: what they had not
                trained on is dealt anew.

        Raises:
            CheckpointError: the data or the row length are others than then.
            DataError: a sample that waited in a row can no longer be read.
        """
        rank, world = self.deal.rank, self.deal.world
        states = states_of(state, world)
        for key, now in self._settings.items():
            # A budget that was not known when it was saved was none.
            then = states[0]["settings"].get(key)
            if then != now:
                raise CheckpointError(
                    f"data: {key} was {then} when this checkpoint was saved and is {now} now; the place in "
                    f"the data means nothing any more. Restore it, or start the run in a new folder"
                )
        self.close()
        mine = [own for own in states if (own["rank"], own["world"]) == (rank, world)]
        told = mine or states
        self.skipped = list(dict.fromkeys(Skipped(*row) for own in told for row in own["skipped"]))
        self.dropped = list(dict.fromkeys(Dropped(*row) for own in told for row in own["dropped"]))
        self._named = {(Skipped, row.sample_id) for row in self.skipped}
        self._named |= {(Dropped, row.sample_id) for row in self.dropped}
        if mine:
            (own,) = mine
            self.deal = Deal(rank, world, tuple(own["backlog"]), own["start"], self.mixture.total)
            self.draws, self._unusable = own["draws"], own["unusable"]
            self.num_skipped, self.num_dropped = own["num_skipped"], own["num_dropped"]
            waits = [n for row in (*own["open"], *own["ready"]) for n in row]
            again: dict[int, Encoded] = dict(zip(waits, self._again(waits), strict=True))
            self.batches.restore({"open": own["open"], "ready": own["ready"]}, again.__getitem__)
        else:
            self.deal = redeal(states, rank, world, self.mixture.total)
            self.draws = self._unusable = 0
            # What was counted goes to one rank, so that sums over ranks stay right.
            self.num_skipped = sum(own["num_skipped"] for own in states) if rank == 0 else 0
            self.num_dropped = sum(own["num_dropped"] for own in states) if rank == 0 else 0
            again = {}
            self.batches.restore({"open": [], "ready": []}, again.__getitem__)
        self._position = self._here()

    def close(self) -> None:
        """End the worker processes; the next batch starts them anew."""
        self._stream = None

    def _draw(self, number: int) -> None:
        """Take draw ``number`` further: into a row, or into the list of what cannot be used."""
        if self._stream is None:
            self._stream = self._open_stream(self.deal.numbers(self.draws))
        try:
            item = next(self._stream)
        except BaseException:
            self._stream = None  # a generator that has raised is at its end; the same draw must raise again
            raise
        if isinstance(item, Bad):
            self._allow(item)
            self.num_skipped += 1
            self._note(self.skipped, Skipped(item.sample_id, str(item.error)))
        else:
            self.batches.add(item, number)
            if not self.batches.dropped:
                self._unusable = 0
            else:
                self.num_dropped += 1
                self._note(self.dropped, self.batches.dropped.pop())
        self.draws += 1

    def _allow(self, bad: Bad) -> None:
        """Raise where this row is one bad row too many."""
        if self.max_skipped is None or (Skipped, bad.sample_id) in self._named:
            return
        if len(self.skipped) < self.max_skipped:
            return
        self._stream = None
        if self.max_skipped == 0:
            raise bad.error
        last = ", ".join(row.sample_id for row in self.skipped[-3:])
        raise DataError(
            f"{bad.error} - this is bad row {self.max_skipped + 1}, and bad_rows lets {self.max_skipped} be "
            f"skipped; before it came {last}. Correct the rows, or raise bad_rows"
        ) from bad.error

    def _note(self, known: list[Any], new: Skipped | Dropped) -> None:
        """List it the first time; give up where nothing else comes."""
        self._unusable += 1
        if len(known) < max(LISTED, self.max_skipped or 0) and (type(new), new.sample_id) not in self._named:
            self._named.add((type(new), new.sample_id))
            known.append(new)
        if self._unusable >= HOPELESS:
            raise DataError(
                f"{new.sample_id}: the last of {HOPELESS} samples in a row that cannot be used "
                f"({self.num_skipped} bad, {self.num_dropped} longer than a row, in all); expected some that "
                f"can. Its reason: {new.reason}"
            )

    def _see_that_something_was_used(self) -> None:
        if self.num_skipped + self.num_dropped == self.total_draws:
            last = (self.skipped or self.dropped)[-1]
            raise DataError(
                f"{last.sample_id}: one of {self.total_draws} samples, of which none can be used "
                f"({self.num_skipped} bad, {self.num_dropped} longer than a row); expected some that can. "
                f"Its reason: {last.reason}"
            )

    def _here(self) -> dict[str, Any]:
        return {
            "draws": self.draws,
            **self.batches.state(),
            "unusable": self._unusable,
            "num_skipped": self.num_skipped,
            "num_dropped": self.num_dropped,
            "skipped": len(self.skipped),
            "dropped": len(self.dropped),
        }

    def _again(self, numbers: Sequence[int]) -> Iterator[Encoded]:
        """The samples of some draws, which were usable when the position was saved."""
        for item in self._open_stream(numbers):
            if isinstance(item, Bad):
                raise item.error
            yield item

    def _open_stream(self, numbers: Iterable[int]) -> Iterator[Encoded | Bad]:
        """The samples of these draws, in order."""
        draws = ((number, self.mixture(number)) for number in numbers)
        if not self.workers:
            return map(self.encode, draws)
        # A generator of its own: without one the workers' seed is taken from torch's global stream, and a
        # resumed run would see other random numbers than one that was never stopped.
        chunks = DataLoader(
            self.encode,
            batch_sampler=_chunks(draws),
            num_workers=self.workers,
            collate_fn=bundle,
            generator=torch.Generator(),
            worker_init_fn=_leave_the_end_to_us,
        )
        return chain.from_iterable(map(unbundle, chunks))


class _Encode(Dataset[Encoded | Bad]):
    """Numbered draw -> encoded sample: all that workers do."""

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Callable[[Sample], Encoded],
        changes: Sequence[Augment | None],
        seed: int,
    ) -> None:
        self.sources, self.changes = tuple(sources), tuple(changes)
        self.encoder = encoder
        self.seed = seed

    def __getitem__(self, numbered: tuple[int, Draw]) -> Encoded | Bad:
        return self(numbered)

    def __call__(self, numbered: tuple[int, Draw]) -> Encoded | Bad:
        number, draw = numbered
        source, change = self.sources[draw.source], self.changes[draw.source]
        try:
            sample = source.sample(draw.row)
            encoded = self.encoder(sample if change is None else change(sample, self.seed, number))
            return encoded if encoded.source == draw.source else replace(encoded, source=draw.source)
        except DataError as error:
            made = f"source {draw.source}, sample {draw.row}"
            row_id = getattr(source, "row_id", None)
            return Bad(made if row_id is None else row_id(draw.row), error)


def _leave_the_end_to_us(worker: int) -> None:
    """A signal to all processes of a run asks it to end, and until it has it needs its workers."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def _chunks(draws: Iterator[tuple[int, Draw]]) -> Iterator[list[tuple[int, Draw]]]:
    while chunk := list(islice(draws, CHUNK)):
        yield chunk
