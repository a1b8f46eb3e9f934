"""Checkpoints while the training goes on.

``Saver.save`` returns as soon as it has its own copy of everything that the next step changes; a thread
writes that copy. The next save waits for the one before, so there is one copy, however slow the disk is.

The copy of the model lies on the CPU, made once a stage. What is frozen is shared with the model where that
is on the CPU too, and copied once where it is not; only what trains is copied again at a save. The bits
written are those that a save in the foreground writes, but for the merged matrices of an adapter that trains
on a GPU: the copy merges on the CPU, whose sums may differ in the last digit. Whoever goes on from a merged
model must take it from the checkpoint, as a resumed run does (``checkpoint.load_weights``).

A save that fails leaves the checkpoints that are there. It is told, and the training goes on, since the next
one may succeed; only after the last of a stage nothing comes that could, so that one ends the run.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinymodal.compose.build import Composed
from tinymodal.compose.quantize import is_quantized
from tinymodal.core.errors import CheckpointError
from tinymodal.core.log import say
from tinymodal.train import checkpoint
from tinymodal.train.checkpoint import Progress


class Saver:
    """Writes the checkpoints of a run; in a run of many ranks, rank 0 has one and the others none.

    For every stage: :meth:`follow`, then any number of :meth:`save`, the last with ``last``. All methods are
    for one thread, the one that trains.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = checkpoint.KEPT,
        keep_best: bool = False,
        in_background: bool = True,
    ) -> None:
        """Write nothing yet.

        Args:
            folder: the run folder.
            keep: newest checkpoints that stay.
            keep_best: the one of the stage with the lowest score stays too.
            in_background: let a thread write. Otherwise the training waits for the disk, and the model is not
                copied: it takes no memory for a second one.
        """
        self.folder, self.keep, self.keep_best = folder, keep, keep_best
        self.in_background = in_background
        self._followed: Composed | None = None
        self._copy: Composed | None = None
        self._thread: threading.Thread | None = None
        self._finished: list[Path] = []
        self._error: Exception | None = None  # of the save that was written last
        self._failing = ""  # what was told of it: a disk that stays full is told once

    def follow(self, composed: Composed, sharded: bool = False) -> None:
        """Begin a stage: this is the model that is saved from now on.

        Call it when all that trains is known and adapters are in their places, before the model is sharded
        and before anything takes the place of its layers' ``forward``.

        Args:
            composed: model and encoder.
            sharded: the model will lie in pieces on many ranks, so that saves bring their ``weights``.
        """
        self.wait()
        self._followed = composed
        self._copy = _on_cpu(composed) if self.in_background or sharded else None

    def save(
        self,
        stage_name: str,
        progress: Progress,
        state: Mapping[str, Any],
        *,
        weights: Mapping[str, Tensor] | None = None,
        score: float | None = None,
        last: bool = False,
        owned: bool = False,
    ) -> None:
        """Take a copy of everything, and write it.

        Args:
            stage_name: for the name of the folder.
            progress: how far the run is.
            state: plain values and tensors; the optimizer's, the loader's and the rest, see ``Checkpoint``.
            weights: name -> tensor of at least what trains, where the model itself cannot be read (sharded).
            score: the lower the better, for ``keep_best``.
            last: the last save of a stage or of the run: it is on the disk when this returns.
            owned: nobody else changes a tensor of ``state``, so that it need not be copied.

        Raises:
            CheckpointError: it is the last, and it could not be written.
        """
        self.wait()
        composed = self._followed
        assert composed is not None, "follow() comes first"
        if self._copy is not None:
            _refresh(self._copy.model, composed.model, weights)
            composed = self._copy
            state = state if owned else _copied(state)
        work = (stage_name, progress, composed, state, score)
        if self.in_background and not last:
            # No daemon: a process that ends in peace finishes what it is writing.
            self._thread = threading.Thread(target=self._write, args=work, name="checkpoint")
            self._thread.start()
            return
        self._write(*work)
        if last and self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(
                f"{self._told(progress, stage_name, error)} Then start it again."
            ) from error
        self._tell()

    def wait(self) -> None:
        """Return when nothing is being written; tell what could not be."""
        if self._thread is not None:
            self._thread.join()
        self._collect()

    def poll(self) -> list[Path]:
        """Folders of models that are on the disk now and were not when this was last asked.

        Ask before each save too: the one after it may delete them.
        """
        self._collect()
        finished, self._finished = self._finished, []
        return finished

    def _collect(self) -> None:
        """Take note of a thread that has ended."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread.join()
            self._thread = None
            self._tell()

    @torch.no_grad()
    def _write(
        self,
        stage_name: str,
        progress: Progress,
        composed: Composed,
        state: Mapping[str, Any],
        score: float | None,
    ) -> None:
        self._error = None
        try:
            path = checkpoint.save(
                self.folder,
                stage_name,
                progress,
                composed,
                state,
                score=score,
                keep=self.keep,
                keep_best=self.keep_best,
            )
            self._finished.append(path / "model")
        except Exception as error:  # a full disk has many names: OSError, SafetensorError, RuntimeError
            self._error = error
            self._place = (progress, stage_name)

    def _tell(self) -> None:
        """Say once that saves fail and why, and once that they succeed again."""
        if self._error is None:
            if self._failing:
                say("checkpoints are written again")
            self._failing = ""
            return
        progress, stage_name = self._place
        kind = re.sub(r"\d+", "", _reason(self._error))
        if kind != self._failing:
            self._failing = kind
            told = self._told(progress, stage_name, self._error)
            say(f"{told} The training goes on and tries again at the next save.")

    def _told(self, progress: Progress, stage_name: str, error: Exception) -> str:
        path = checkpoint.place_of(self.folder, stage_name, progress)
        whole = [path for path in checkpoint.found(self.folder) if not checkpoint.flaw(path)]
        there = f"the newest that is there is {whole[-1].name}" if whole else "there is none before it"
        return (
            f"{path}: this checkpoint could not be written ({_reason(error)}); {there}. "
            f"Make room on that disk and see that the folder may be written to."
        )


def _reason(error: Exception) -> str:
    """In one line, without the name of a file that is gone by now."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _copied(value: Any) -> Any:
    """``value`` on the CPU, with no tensor that anyone else changes."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return type(value)((key, _copied(inner)) for key, inner in value.items())  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value


def _on_cpu(composed: Composed) -> Composed:
    """A second model, for the CPU: frozen numbers are the same memory where they lie there already."""
    model = composed.model
    memo: dict[int, Any] = {}
    for layer in model.modules():
        if is_quantized(layer):
            # Never written to, and read where they lie: a rounded matrix is no plain tensor to be moved.
            own: Any = layer
            memo[id(own.weight)] = own.weight
            for name in ("quant_state", "state"):
                if (rounded := getattr(own, name, None)) is not None:
                    memo[id(rounded)] = rounded
    for parameter in model.parameters():
        if id(parameter) not in memo:
            # Another Parameter in any case: what is done to the first's ``data`` does not reach the second.
            numbers = parameter.detach().to("cpu", copy=parameter.requires_grad)
            memo[id(parameter)] = nn.Parameter(numbers, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    # The tokenizer too: one that is asked while it is written may refuse.
    return Composed(copy.deepcopy(model, memo), copy.deepcopy(composed.encoder), composed.codec)


@torch.no_grad()
def _refresh(ours: nn.Module, theirs: nn.Module, weights: Mapping[str, Tensor] | None) -> None:
    """Copy what a step may have changed: parameters that train, and buffers."""
    source = weights
    if source is None:
        source = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(source[name])
    for name, buffer in ours.named_buffers():
        if name in source:  # some are not part of a model's state
            buffer.copy_(source[name])
