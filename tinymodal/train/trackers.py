"""Rows of ``metrics.jsonl`` shown by others as well: TensorBoard, wandb and trackio, whichever is asked for.

``metrics.jsonl`` is the record; trackers follow it. Each is handed every row once, in order, with the number
of training steps of the whole run as its step. A run that was stopped goes on in the same tracker run:

* ``run/trackers/<name>.json`` says which tracker run it is and how many rows it has been handed.
* wandb and trackio keep what they have. Steps that are done again are not handed over a second time; they are
  the same steps, number for number. What was on its way when a run was killed is missing there.
* TensorBoard forgets the steps from the last saved one on, and is handed them again.
* A tracker that is added to a run later is handed all rows from the first on.

A tracker that fails on the way (no network, a full disk) is left out from there on, and the training goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tinymodal.core.errors import RecipeError
from tinymodal.core.log import say

PROJECT = "tinymodal"
"""What runs are filed under in wandb and trackio; of wandb WANDB_PROJECT goes before."""
FLUSH_S = 10
"""TensorBoard shows what is at most so old."""


class Tracker(Protocol):
    """One other place that shows a run."""

    def log(self, row: Mapping[str, Any], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in ``run/tensorboard``; every number of a row under its own name."""

    def __init__(self, folder: Path, title: str, run_id: str, config: Mapping[str, Any], begin: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers forget what an earlier start wrote of these steps.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=begin, flush_secs=FLUSH_S)
        self._stage = ""
        if begin == 0:
            text = json.dumps(config, indent=2, ensure_ascii=False, default=str)
            self._writer.add_text("recipe", "    " + text.replace("\n", "\n    "), 0)

    def log(self, row: Mapping[str, Any], step: int) -> None:
        if row["stage"] != self._stage:
            self._stage = row["stage"]
            self._writer.add_text("stage", self._stage, step)
        for key, value in numbers(row).items():
            self._writer.add_scalar(key, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in ``run/wandb`` for ``wandb sync``."""

    def __init__(self, folder: Path, title: str, run_id: str, config: Mapping[str, Any], begin: int) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id,
            name=title,
            dir=str(folder),
            config=dict(config),
            resume="allow",
            # Our lines and the bar are left alone.
            settings=wandb.Settings(console="off"),
        )

    def log(self, row: Mapping[str, Any], step: int) -> None:
        self._run.log({"stage": row["stage"], **numbers(row)}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio, in its own folder (TRACKIO_DIR); ``trackio show`` draws it."""

    def __init__(self, folder: Path, title: str, run_id: str, config: Mapping[str, Any], begin: int) -> None:
        import trackio

        self._run = trackio.init(
            project=PROJECT,
            name=f"{title}-{run_id}",
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, row: Mapping[str, Any], step: int) -> None:
        self._run.log({"stage": row["stage"], **numbers(row)}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


TRACKERS: dict[str, type[TensorBoard | Wandb | Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


HINTS = {
    "tensorboard": "Events go to the run's folder; see that it can be written, or take it out of trackers.",
    "wandb": "Log in with 'wandb login', or set WANDB_MODE=offline, or take it out of trackers.",
    "trackio": "Its data go to TRACKIO_DIR; see that it can be written, or take it out of trackers.",
}


class Trackers:
    """Those that a recipe asks for, opened; none at all is fine."""

    def __init__(
        self, wanted: Sequence[str], folder: Path, title: str, config: Mapping[str, Any] | None = None
    ) -> None:
        """Open each and hand it the rows that it does not have.

        Args:
            wanted: names of ``TRACKERS``.
            folder: of the run; its ``metrics.jsonl`` ends where the run goes on.
            title: what the run is called.
            config: shown beside the curves: the recipe.

        Raises:
            RecipeError: a package is missing, or the tracker cannot be opened.
        """
        require(wanted)
        self._open: dict[str, tuple[Tracker, _Place]] = {}
        self._number = self._steps = 0
        known = _rows(folder / "metrics.jsonl") if wanted else []
        for name in wanted:
            place = _Place(folder / "trackers" / f"{name}.json")
            if name == "tensorboard":
                place.rows = _last_step(known[: place.rows])
            # The first step that is new to it, from 1; 0 where all is.
            begin = sum(map(is_step, known[: place.rows])) + 1 if place.rows else 0
            try:
                with _stdout_is_for_results():
                    tracker = TRACKERS[name](folder, title, place.run_id, config or {}, begin)
            except Exception as error:
                place.close()
                self.close(failed=True)
                raise RecipeError(
                    f"trackers: {name} could not be opened: {_brief(error)}. {HINTS[name]}"
                ) from error
            self._open[name] = (tracker, place)
        for row in known:
            self.log(row)

    def log(self, row: Mapping[str, Any]) -> None:
        """Hand over the row that was just written to ``metrics.jsonl``."""
        self._steps += is_step(row)
        self._number += 1
        for name, (tracker, place) in list(self._open.items()):
            if self._number <= place.rows:
                continue
            try:
                with _stdout_is_for_results():
                    tracker.log(row, self._steps)
            except Exception as error:
                say(f"tracker {name}: left out from step {self._steps:,} on: {_brief(error)}")
                place.close()
                del self._open[name]
            else:
                place.move(self._number)

    def close(self, failed: bool = False) -> None:
        """Everything is handed on; ``failed``: the run ended by an error."""
        for name, (tracker, place) in self._open.items():
            try:
                with _stdout_is_for_results():
                    tracker.close(failed)
            except Exception as error:
                say(f"tracker {name}: its end could not be told: {_brief(error)}")
            place.close()
        self._open = {}


def require(wanted: Sequence[str]) -> None:
    """Raise RecipeError if the package of a tracker is not installed; loads none."""
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(
                f"trackers: '{name}' needs the package {name}; pip install 'tinymodal[{name}]', or take it "
                f"out of trackers (metrics.jsonl and 'tinymodal compare' need none)."
            )


def _last_step(rows: Sequence[Mapping[str, Any]]) -> int:
    """Where the last step begins: TensorBoard forgets whole steps, held-out rows of them included."""
    return max((n for n, row in enumerate(rows) if is_step(row)), default=0)


def is_step(row: Mapping[str, Any]) -> bool:
    """Whether a row is of a training step, and not of held-out samples."""
    return "loss" in row


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The row's numbers but its step; what is not finite or not known is left out."""
    return {
        key: value
        for key, value in row.items()
        if key != "step"
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and value - value == 0
    }


class _Place:
    """Which run of a tracker is this one's, and how many rows it has; in one line of a file."""

    def __init__(self, path: Path) -> None:
        self.run_id, self.rows = uuid.uuid4().hex[:8], 0
        if path.exists():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                known = json.loads(path.read_text())
                self.run_id, self.rows = str(known["run"]), int(known["rows"])
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self.move(self.rows)

    def move(self, rows: int) -> None:
        """``rows`` have been handed over; written at once, but not forced to the disk (4 µs)."""
        self.rows = rows
        os.pwrite(self._handle, f'{{"run": "{self.run_id}", "rows": {rows:<12}}}\n'.encode(), 0)

    def close(self) -> None:
        os.close(self._handle)


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@contextlib.contextmanager
def _stdout_is_for_results() -> Iterator[None]:
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no more is known'}"
