"""Where a run stands, on disk: the model as anyone can load it, and what only the run needs to go on.

A checkpoint is a folder ``checkpoints/01-instruct-0000400`` with ``model/`` (a Hugging Face folder) and
``training.pt`` (optimizer, cell heads, place in the data, random state). It is written under another name,
flushed to the disk and renamed, so a name that can be read is a checkpoint that is whole, whenever the power
goes. The newest two are kept.

Of a stage that trains adapters, ``model/`` is merged, ``adapter/`` is the adapter as peft reads it, and
``training.pt`` also holds every tensor that trains: merging rounds, and the run goes on from the parts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinymodal.compose import build
from tinymodal.core.errors import CheckpointError
from tinymodal.train import adapters

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed

KEPT = 2
"""Newest checkpoints that stay: one to go on from, one in case that one cannot be read."""
UNFINISHED = ".unfinished-"
"""Prefix of whatever is being written or deleted; swept away by the next run."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is."""

    stage: int
    """Number of the stage, from 0."""
    step: int = 0
    """Steps of the stage that are done."""
    seconds: float = 0.0
    """Time spent in the stage's steps, over all its resumptions."""
    tokens: int = 0
    """Tokens the stage has read, padding left out."""
    metrics_bytes: int = 0
    """Length of ``metrics.jsonl``: what stands behind it will be done again."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    progress: Progress
    state: dict[str, Any]
    """``optimizer``, ``heads``, ``loader``, ``random``; with adapters ``trained`` and ``base``, else None."""

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """There only if the stage trains one."""
        return self.path / "adapter"


def save(
    folder: Path, stage_name: str, progress: Progress, composed: Composed, state: Mapping[str, Any]
) -> Path:
    """Write a checkpoint and forget all but the newest ``KEPT``.

    Args:
        folder: the run folder.
        stage_name: for the eye; the order is by stage number and step.
        progress: how far the run is.
        composed: model and encoder, written as a folder that loads anywhere.
        state: plain values and tensors, read back with ``weights_only``.

    Returns:
        The checkpoint's folder; its model is in ``model/``, and an adapter in ``adapter/``.
    """
    home = folder / "checkpoints"
    path = home / f"{progress.stage:02}-{stage_name}-{progress.step:07}"

    def write(unfinished: Path) -> None:
        with adapters.merged(composed.model):
            build.save(composed, unfinished / "model")
        if adapters.adapted(composed.model):
            adapters.save(composed.model, unfinished / "adapter")
        torch.save({"progress": asdict(progress), **state}, unfinished / "training.pt")

    write_folder(path, write)
    for old in _complete(folder)[:-KEPT]:
        remove_folder(old)
    return path


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, or None; what a killed run left half-written is swept away.

    Raises:
        CheckpointError: its file cannot be read.
    """
    for place in (folder, folder / "checkpoints", folder / "stages"):
        for rest in place.glob(f"{UNFINISHED}*"):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
    whole = _complete(folder)
    if not whole:
        return None
    path = whole[-1]
    try:
        state = torch.load(path / "training.pt", weights_only=True, map_location="cpu")
        progress = Progress(**state.pop("progress"))
    except Exception as error:
        raise CheckpointError(
            f"{path}: training.pt cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}). "
            f"Delete this folder to go on from the checkpoint before it."
        ) from error
    return Checkpoint(path, progress, state)


def random_state() -> dict[str, torch.Tensor]:
    """Torch's generators: dropout and whatever else a step draws."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def realign(model: torch.nn.Module) -> None:
    """Move every tensor that was mapped from a file to memory of torch's own.

    Kernels give other last digits where a tensor does not begin at a multiple of 64 bytes, and a resumed run
    must be equal to the last digit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder, then make it appear at ``path`` all at once, in place of an older one."""
    unfinished = path.parent / f"{UNFINISHED}{path.name}"
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    write(unfinished)
    for file in unfinished.rglob("*"):
        if file.is_file():
            _flush(file)
    if path.exists():
        remove_folder(path)
    unfinished.rename(path)
    _flush(path.parent)


def copy_folder(source: Path, path: Path) -> None:
    """Copy a folder to ``path``, where it appears all at once."""

    def copy(to: Path) -> None:
        shutil.copytree(source, to, dirs_exist_ok=True)

    write_folder(path, copy)


def write_text(path: Path, text: str) -> None:
    """Put ``text`` into the file ``path``, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f"{UNFINISHED}{path.name}"
    unfinished.write_text(text, encoding="utf-8")
    _flush(unfinished)
    unfinished.replace(path)


def remove_folder(path: Path) -> None:
    """Delete a folder; cut off half-way, none of it is left under its name."""
    gone = path.parent / f"{UNFINISHED}gone-{path.name}"
    if gone.exists():
        shutil.rmtree(gone)
    path.rename(gone)
    shutil.rmtree(gone)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file of ours; empty where there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _complete(folder: Path) -> list[Path]:
    """Checkpoints in order of stage and step."""
    found = []
    for path in (folder / "checkpoints").glob("*"):
        if match := re.fullmatch(r"(\d+)-.*-(\d+)", path.name):
            found.append((int(match[1]), int(match[2]), path))
    return [path for *_, path in sorted(found)]


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
