"""The loss on samples that do not train, the same ones from the first step of a stage to its last.

They are drawn once, each at most once, as a stage's own samples are drawn: by weight, and shuffled by a seed.
The model is in eval mode and keeps no gradients; random state, the place in the training data and the mode of
every module are afterwards what they were before, so a run with held-out samples trains the weights that it
would train without.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tinymodal.core.errors import DataError
from tinymodal.core.types import Batch, Encoded, Sample
from tinymodal.data.collate import collate
from tinymodal.data.mixture import Draw, Mixture
from tinymodal.data.pack import Packer, Row
from tinymodal.data.sources import Source
from tinymodal.train.feed import each_tensor
from tinymodal.train.meter import by_group
from tinymodal.train.precision import DTYPES, Precision
from tinymodal.train.world import ALONE, World

if TYPE_CHECKING:
    from tinymodal.train.objective import Objective

KEPT_BYTES = 256 * 2**20
"""Batches up to this size stay in memory; larger ones are read and encoded again each time."""


class HeldOut:
    """Samples to measure a stage's loss on."""

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Callable[[Sample], Encoded],
        names: Sequence[str],
        *,
        samples: int,
        seq_len: int,
        batch_tokens: int,
        pad_id: int,
        image_token_id: int,
        audio_token_id: int | None = None,
        weights: Sequence[float] | None = None,
        patches: int | None = None,
        frames: int | None = None,
        complete: Callable[[list[Row]], list[Row]] | None = None,
        seed: int = 0,
        skip_bad: bool = False,
        precision: Precision = "float32",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Choose the samples; none is read yet.

        Args:
            sources: as for ``Loader``.
            encoder: as for ``Loader``.
            names: of the sources, see ``meter.source_names``.
            samples: how many at most; a source gives none of its rows twice.
            seq_len: positions of a row.
            batch_tokens: positions of a batch.
            pad_id: token that fills rows.
            image_token_id: the placeholder's token.
            audio_token_id: the same for sounds; None: the model does not hear.
            weights: of the sources.
            patches: image patches that a row may hold.
            frames: frames of sound that a row may hold.
            complete: as for ``Loader``.
            seed: fixes the choice.
            skip_bad: leave out rows that cannot be read, in place of an error; they stand in ``left_out``.
            precision: what the passes compute in.
            rank: measures every ``world``-th sample, from this one on.
            world: number of ranks that share the samples. Where weights are sharded, let every rank measure
                all (0 of 1): ranks must call each part of the model equally often.
        """
        self.names = tuple(names)
        self.encoder, self.sources = encoder, tuple(sources)
        self.draws = choose(Mixture(sources, weights, seed), samples)[rank::world]
        self.left_out: list[tuple[str, str]] = []
        """Samples that could not be read or are longer than a row, and why."""
        self.skip_bad, self.precision = skip_bad, precision
        self._seq_len, self._patches, self._frames, self._complete = seq_len, patches, frames, complete
        self._rows = max(batch_tokens // seq_len, 1)
        self._pad_id, self._image_token_id, self._audio_token_id = pad_id, image_token_id, audio_token_id
        self._kept: list[Batch] | None = None

    def look(self, objective: Objective, stage: str, world: World = ALONE) -> None:
        """See before the first step that there is something to measure; every rank calls it.

        Raises:
            DataError: nothing, a sample that is no target of ``objective``, or one that cannot be read where
                bad ones are not skipped.
        """
        try:
            found = sum(sum(objective.counts([batch]).values()) for batch in self.batches())
        except DataError as error:
            raise DataError(f"stages.{stage}.held_out: {error}") from error
        if not world.sum([found])[0]:
            raise DataError(self._nothing(stage))

    def measure(self, objective: Objective, device: torch.device | None = None) -> list[float]:
        """Sums and counts over the samples of this rank, which may be added up over ranks.

        Args:
            objective: model and losses.
            device: where it computes; None: where its weights are.

        Returns:
            Plain numbers, always equally many: sum and count of each loss of ``objective``, and then of the
            text loss of each source without media, with a picture, with a sound, and with both. See
            :meth:`row`.

        Raises:
            DataError: a sample cannot be read, and bad ones are not skipped.
        """
        device = device or objective.device
        names = list(objective.counts([]))
        first, pairs = len(names), len(names) + 4 * len(self.sources)
        sums = torch.zeros(pairs, dtype=torch.float64, device=device)
        counts = torch.zeros(pairs, dtype=torch.float64)
        with unchanged(objective), torch.no_grad():
            for batch in self.batches():
                counted = objective.counts([batch])
                with self._narrow(device):  # around the model alone: pictures are prepared in float32
                    terms = objective(each_tensor(batch, lambda tensor: tensor.to(device)))
                for n, name in enumerate(names):
                    counts[n] += counted[name]
                    sums[n] += terms.sums[name].double()
                if terms.per_target is None or batch.target_group is None:
                    continue
                group_N = batch.target_group
                counts[first:] += torch.bincount(group_N, minlength=pairs - first)
                # Not index_add_: on a GPU its order, and with it the last digit, changes from call to call.
                loss_N, group_N = terms.per_target.double(), group_N.to(device)
                sums[first:] += torch.stack([loss_N[group_N == g].sum() for g in range(pairs - first)])
        return torch.stack([sums.cpu(), counts], dim=1).flatten().tolist()

    def row(self, stage: str, step: int, measured: Sequence[float]) -> dict[str, Any]:
        """A row of ``metrics.jsonl``: ``held_out``, and the loss of each source and modality.

        Args:
            stage: its name.
            step: steps of the stage that are done.
            measured: what :meth:`measure` gave, added up over ranks.
        """
        pairs = list(zip(measured[::2], measured[1::2], strict=True))
        first = len(pairs) - 4 * len(self.sources)
        if not any(count for _, count in pairs[:first]):
            raise DataError(self._nothing(stage))
        groups = {(n // 4, n % 4): (total, int(count)) for n, (total, count) in enumerate(pairs[first:])}
        return {
            "stage": stage,
            "step": step,
            "held_out": sum(total / max(count, 1) for total, count in pairs[:first]),
            **by_group("held_out", groups, self.names),
        }

    def batches(self) -> Iterator[Batch]:
        """The samples of this rank, packed; the same whenever it is asked."""
        if self._kept is not None:
            yield from self._kept
            return
        self.left_out.clear()
        kept: list[Batch] | None = []
        size = 0
        for rows in self._packed():
            batch = collate(
                rows if self._complete is None else self._complete(rows),
                self._pad_id,
                self._image_token_id,
                num_sources=len(self.sources),
                audio_token_id=self._audio_token_id,
            )
            if kept is not None:
                size += _bytes(batch)
                kept = [*kept, batch] if size <= KEPT_BYTES else None
            yield batch
        self._kept = kept

    def _narrow(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, DTYPES[self.precision])

    def _packed(self) -> Iterator[list[Row]]:
        packer = Packer(self._seq_len, self._patches, frames=self._frames)
        ready: list[Row] = []
        for number, draw in enumerate(self.draws):
            if (encoded := self._encode(draw)) is None:
                continue
            ready += packer.add(encoded, number)
            while len(ready) >= self._rows:
                yield ready[: self._rows]
                ready = ready[self._rows :]
        self.left_out += [(row.sample_id, row.reason) for row in packer.dropped]
        ready += packer.flush()
        for at in range(0, len(ready), self._rows):
            yield ready[at : at + self._rows]

    def _encode(self, draw: Draw) -> Encoded | None:
        try:
            encoded = self.encoder(self.sources[draw.source].sample(draw.row))
        except DataError as error:
            if not self.skip_bad:
                raise
            self.left_out.append((f"{self.names[draw.source]}: row {draw.row}", str(error)))
            return None
        return replace(encoded, source=draw.source)

    def _nothing(self, stage: str) -> str:
        why = "There was none to read."
        if self.left_out:
            name, reason = self.left_out[0]
            why = f"The first of {len(self.left_out)} left out: {name}: {reason}"
        return (
            f"stages.{stage}.held_out: none of the samples has anything to measure; expected some that can "
            f"be read and are no longer than a row. {why}"
        )


def choose(mixture: Mixture, samples: int) -> list[Draw]:
    """The first ``samples`` different draws; fewer where all sources together have fewer rows."""
    found: list[Draw] = []
    left = list(mixture.sizes)
    n = 0
    while len(found) < samples and any(size is None or size > 0 for size in left):
        draw = mixture(n)
        n += 1
        size = left[draw.source]
        if size is None:
            found.append(draw)
        elif size > 0:  # the first draws of a source are all of its rows, each once
            left[draw.source] = size - 1
            found.append(draw)
    return found


@contextlib.contextmanager
def unchanged(objective: nn.Module) -> Iterator[None]:
    """``objective`` in eval mode; afterwards the mode of each module and all random state are as before."""
    modes = [(module, module.training) for module in objective.modules()]
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 that very state
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(gpus):
        objective.eval()
        try:
            yield
        finally:
            for module, was in modes:
                module.training = was
            random.setstate(python)
            np.random.set_state(numbers)  # noqa: NPY002


def _bytes(batch: Batch) -> int:
    sizes = []

    def add(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    each_tensor(batch, add)
    return sum(sizes)
