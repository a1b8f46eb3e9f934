"""Where a run stands, on disk: the model as anyone can load it, and what only the run needs to go on.

A checkpoint is a folder ``checkpoints/01-instruct-0000400`` with ``model/`` (a Hugging Face folder),
``training.pt`` (optimizer, cell heads, place in the data, random state) and ``COMPLETE``, which names every
file with its size and its CRC-32. It is written under another name; files are flushed to the disk, then the
marker, then the folders, and then it is renamed. So whenever the power goes, a folder with its name and its
marker is whole. One without, or whose files are not those that the marker names, is passed over, and said to
be. The newest few are kept, and the best if that is asked.

Of a stage that trains adapters, ``model/`` is merged, ``adapter/`` is the adapter as peft reads it, and
``training.pt`` also holds every tensor that trains: merging rounds, and the run goes on from the parts.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tinymodal.compose import build
from tinymodal.core import config
from tinymodal.core.errors import CheckpointError, RecipeError
from tinymodal.core.log import say
from tinymodal.train import adapters

if TYPE_CHECKING:
    from pydantic import BaseModel

    from tinymodal.compose.build import Composed

KEPT = 2
"""Newest checkpoints that stay: one to go on from, one in case that one cannot be read."""
UNFINISHED = ".unfinished-"
"""Prefix of whatever is being written or deleted; swept away by the next run."""
MARKER = "COMPLETE"
"""Written last into a checkpoint: what it must hold to be one."""
FORMAT = 1
"""Of the marker and of ``training.pt``."""
BEST = "best"
"""Link to the checkpoint of the stage with the lowest score."""
CHUNK_BYTES = 2**22
"""Read at a time for a CRC."""


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
    ended: bool = False
    """Whether it was the stage's last step."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    progress: Progress
    state: dict[str, Any]
    """``optimizer``, ``heads``, ``ranks`` (of each its place in the data and its random state), ``scaler``,
    ``recipe``; with adapters ``trained`` and ``base``, else None."""

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """There only if the stage trains one."""
        return self.path / "adapter"


# Writing


def place_of(folder: Path, stage_name: str, progress: Progress) -> Path:
    """Where the checkpoint of that moment lies. The stage's name is for the eye, its number counts."""
    return folder / "checkpoints" / f"{progress.stage:02}-{stage_name}-{progress.step:07}"


def save(
    folder: Path,
    stage_name: str,
    progress: Progress,
    composed: Composed,
    state: Mapping[str, Any],
    *,
    score: float | None = None,
    keep: int = KEPT,
    keep_best: bool = False,
) -> Path:
    """Write a checkpoint, then forget those before it but for the newest ``keep``.

    Args:
        folder: the run folder.
        stage_name: for the eye; the order is by stage number and step.
        progress: how far the run is.
        composed: model and encoder, written as a folder that loads anywhere.
        state: plain values and tensors, read back with ``weights_only``.
        score: the lower the better; None where there is none.
        keep: newest checkpoints that stay, this one included.
        keep_best: the one of the stage with the lowest score stays too, and ``checkpoints/best`` leads to it.

    Returns:
        The checkpoint's folder; its model is in ``model/``, and an adapter in ``adapter/``.
    """
    path = place_of(folder, stage_name, progress)

    def write(unfinished: Path) -> None:
        with adapters.merged(composed.model):
            build.save(composed, unfinished / "model")
        if adapters.adapted(composed.model):
            adapters.save(composed.model, unfinished / "adapter")
        torch.save({"progress": asdict(progress), **state}, unfinished / "training.pt")

    def seal(unfinished: Path) -> None:
        files = {
            str(file.relative_to(unfinished)): {"bytes": file.stat().st_size, "crc32": _crc(file)}
            for file in sorted(unfinished.rglob("*"))
            if file.is_file()
        }
        told = score if score is not None and math.isfinite(score) else None
        head = {"format": FORMAT, "stage": progress.stage, "step": progress.step, "score": told}
        (unfinished / MARKER).write_text(json.dumps({**head, "files": files}, indent=1) + "\n")

    write_folder(path, write, seal)
    forget(folder, progress, keep, keep_best)
    return path


def forget(folder: Path, progress: Progress, keep: int = KEPT, keep_best: bool = False) -> None:
    """Delete whole checkpoints of up to ``progress``, all but the newest ``keep`` and the best.

    What lies behind ``progress`` is left alone: such a one was passed over when the run went on from an
    earlier one. So is one that is not whole, or cannot be read just now. A folder that cannot be deleted
    stays; the next save tries again.
    """
    so_far = [path for path in found(folder) if _order(path) <= (progress.stage, progress.step)]
    whole = [path for path in so_far if not flaw(path)]
    kept = set(whole[-keep:])
    best = _best(whole) if keep_best else None
    if best is not None:
        kept.add(best)
        _point(folder / "checkpoints" / BEST, best.name)
    for path in whole:
        if path not in kept:
            try:
                remove_folder(path)
            except OSError:
                continue


def _best(whole: list[Path]) -> Path | None:
    """The checkpoint with the lowest score of the newest stage that has scores; of equals the first."""
    scored = []
    for path in whole:
        score = json.loads((path / MARKER).read_text())["score"]
        if score is not None:
            stage, step = _order(path)
            scored.append((-stage, score, step, path))
    return min(scored)[-1] if scored else None


def _point(link: Path, name: str) -> None:
    """Let ``link`` lead to its neighbour ``name``, at once; nothing happens where a disk knows no links."""
    new = link.with_name(f"{UNFINISHED}{link.name}")
    try:
        if os.path.lexists(link) and os.readlink(link) == name:
            return
        new.unlink(missing_ok=True)
        new.symlink_to(name, target_is_directory=True)
        new.replace(link)
    except OSError:
        return


# Reading


def latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None; what a killed run left half-written is swept away.

    One that is not whole is named and passed over.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    for place in (folder, folder / "checkpoints", folder / "stages"):
        for rest in place.glob(f"{UNFINISHED}*"):
            shutil.rmtree(rest) if rest.is_dir() and not rest.is_symlink() else rest.unlink()
    flaws: list[str] = []
    for path in reversed(found(folder)):
        wrong = flaw(path, thorough=True)
        if not wrong:
            try:
                state = torch.load(path / "training.pt", weights_only=True, map_location="cpu")
                checkpoint = Checkpoint(path, Progress(**state.pop("progress")), state)
            except Exception as error:
                first = str(error).splitlines()[0] if str(error) else ""
                wrong = f"training.pt cannot be read ({type(error).__name__}: {first})"
            else:
                for told in flaws:
                    say(f"passed over {told}")
                return checkpoint
        flaws.append(f"{path}: {wrong}")
    if flaws:
        raise CheckpointError(
            f"{folder / 'checkpoints'}: none of {len(flaws)} checkpoints is whole: {'; '.join(flaws)}. "
            f"Restore one to go on from it, or delete the run folder to begin again."
        )
    return None


def found(folder: Path) -> list[Path]:
    """Folders of ``folder/checkpoints`` that have a checkpoint's name, whole or not, the oldest first."""
    paths = (folder / "checkpoints").glob("*")
    return sorted((path for path in paths if re.fullmatch(r"\d+-.*-\d+", path.name)), key=_order)


def end_of(folder: Path, stage: int) -> Checkpoint:
    """The newest whole checkpoint of a stage that has one; its tensors of ``training.pt`` are not read."""
    whole = [path for path in found(folder) if _order(path)[0] == stage and not flaw(path)]
    return Checkpoint(whole[-1], Progress(stage=stage, step=_order(whole[-1])[1]), {})


def _order(path: Path) -> tuple[int, int]:
    """Stage and step of a checkpoint, from its name."""
    stage, *_, step = path.name.split("-")
    return int(stage), int(step)


def flaw(path: Path, thorough: bool = False) -> str:
    """What is wrong with the checkpoint ``path``; empty if it is whole.

    Args:
        path: its folder.
        thorough: read every byte of it; else only the sizes are looked at.
    """
    try:
        marker = json.loads((path / MARKER).read_text())
        made, files = marker["format"], dict(marker["files"])
    except FileNotFoundError:
        return f"has no {MARKER}; it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MARKER} cannot be read"
    if made != FORMAT:
        return f"is of format {made}, and this version reads {FORMAT}"
    for name, expected in files.items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size:,} bytes, of {expected['bytes']:,} that were written"
            if thorough and _crc(file) != expected["crc32"]:
                return f"{name} has other bytes than were written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""


def refuse_another(where: Path, then: BaseModel, now: BaseModel) -> None:
    """See that a run goes on with the recipe it was begun with.

    Args:
        where: the run or the checkpoint, for the error.
        then: the recipe it was begun with, without what may change.
        now: the recipe it is to go on with, without that.

    Raises:
        RecipeError: names every key that differs, with both values.
    """
    changed = config.differences(then, now)
    if changed:
        keys = "1 key differs" if len(changed) == 1 else f"{len(changed)} keys differ"
        raise RecipeError(
            f"{where}: holds a run of another recipe; {keys} (then and now): {'; '.join(changed)}. "
            f"Restore what was there to go on with that run, or give another folder."
        )


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Put the numbers of a model's folder into ``model``, which has the same shapes and no adapters.

    Raises:
        CheckpointError: the folder holds a tensor that the model does not have.
    """
    from safetensors.torch import load_file

    own = model.state_dict()
    with torch.no_grad():
        for file in sorted(folder.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                if name not in own or own[name].shape != tensor.shape:
                    raise CheckpointError(f"{file}: {name} does not fit the model in memory")
                own[name].copy_(tensor)


# Random numbers


def seed_random(seed: int, rank: int = 0) -> None:
    """Begin every generator anew; other ranks draw other numbers than rank 0, and than each other."""
    number = seed if not rank else random.Random(f"{seed}/{rank}").getrandbits(32)
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002  (the stream that others draw from)


def set_random_state_of(states: Sequence[Mapping[str, Any]], rank: int, world: int, seed: int) -> None:
    """Go on drawing as rank ``rank`` of ``world``, from the states of all ranks of then.

    As many ranks as then: exactly as they would have. Other ranks draw from ``seed``, which should say at
    which step it is.
    """
    if len(states) == world:
        set_random_state(states[rank])
    else:
        seed_random(seed, rank + 1)


def random_state() -> dict[str, Any]:
    """Every generator that a step may draw from: torch's, of each GPU in use too, numpy's and Python's.

    Plain values and tensors; :func:`set_random_state` takes them back.
    """
    version, numbers, spare = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002  (the stream that others draw from)
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        # Tensors: a thousand numbers each, which plain values make slow to read.
        "python": [version, torch.tensor(numbers), spare],
        "numpy": [
            torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            numpy["state"]["pos"],
            numpy["has_gauss"],
            numpy["gauss"],
        ],
    }
    # Asked of a GPU that nothing uses, this would start it.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go back to what :func:`random_state` gave. GPUs that it knew and this machine lacks are left out."""
    torch.set_rng_state(state["cpu"])
    version, numbers, spare = state["python"]
    random.setstate((version, tuple(numbers.tolist()), spare))
    key, at, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), at, has_gauss, gauss))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        for device, numbers in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(numbers, device)


def realign(model: torch.nn.Module) -> None:
    """Move every tensor that was mapped from a file to memory of torch's own.

    Kernels give other last digits where a tensor does not begin at a multiple of 64 bytes, and a resumed run
    must be equal to the last digit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


# Files


def write_folder(
    path: Path, write: Callable[[Path], None], seal: Callable[[Path], None] | None = None
) -> None:
    """Let ``write`` fill a folder, then make it appear at ``path`` all at once, in place of an older one.

    ``seal`` adds to it when all that ``write`` wrote is on the disk. What fails leaves ``path`` as it was,
    and takes away what was written.
    """
    unfinished = path.parent / f"{UNFINISHED}{path.name}"
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        files = [file for file in unfinished.rglob("*") if file.is_file()]
        for file in files:
            _flush(file)
        if seal is not None:
            seal(unfinished)
            for file in set(unfinished.iterdir()).difference(files):
                _flush(file)
        for inner in unfinished.rglob("*"):
            if inner.is_dir():
                _flush(inner)
        _flush(unfinished)
        if path.exists():
            remove_folder(path)
        unfinished.rename(path)
    except Exception:
        # Not after an interruption, which may want to leave at once: the next run sweeps.
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
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


def _crc(file: Path) -> str:
    """CRC-32 of a file, as eight hexadecimal digits."""
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
