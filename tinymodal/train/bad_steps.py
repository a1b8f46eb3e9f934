"""Steps without a finite loss or gradient: each is skipped and named, and several in a row end the run.

A single one is a spoilt sample or bad luck, and the weights have not moved. Several in a row are a model that
is lost, or a rate that is too high: to go on would only cost time. A step that only found the scale of a
16-bit loss too large is none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tinymodal.core.errors import DataError
from tinymodal.core.log import append, json_line, say
from tinymodal.train.step import LOSS_SCALE, StepReport

FILE = "bad_steps.jsonl"
SHOWN = 8
"""Samples that a message names; the file has all."""


class BadSteps:
    """Counts the steps of a stage that were skipped, and lists them in ``run/bad_steps.jsonl``."""

    def __init__(self, folder: Path, stage: str, limit: int, begun: int = 0, writes: bool = True) -> None:
        """Go on behind step ``begun``.

        Args:
            folder: of the run.
            stage: its name.
            limit: so many in a row are skipped; one more ends the run.
            begun: steps of the stage that are done. What the file says of later ones is taken back, as they
                are done again, and how many stand in a row at that point is read from it.
            writes: False on all ranks but the first.
        """
        self.path, self.stage, self.limit, self.writes = folder / FILE, stage, limit, writes
        written = self.path.read_bytes() if self.path.exists() else b""
        rows = list(_rows(written))
        kept = rows[: _first_undone(rows, stage, begun)]
        self._row: list[dict[str, Any]] = []
        for row in reversed(kept):
            if row["stage"] != stage or row["step"] != begun - len(self._row):
                break
            self._row.insert(0, row)
        whole = b"".join(map(json_line, kept))
        if writes and written != whole:
            unfinished = self.path.with_name(f".unfinished-{FILE}")
            unfinished.write_bytes(whole)
            unfinished.replace(self.path)

    def see(self, step: int, report: StepReport) -> None:
        """Take note of one step.

        Raises:
            DataError: it was one more in a row than ``limit``; names the steps and samples.
        """
        if not report.skipped or report.why == LOSS_SCALE:
            self._row = []
            return
        bad = {"stage": self.stage, "step": step, "why": report.why, "samples": list(report.bad_ids)}
        self._row.append(bad)
        if self.writes:
            append(self.path, bad)
            say(f"stage {self.stage}: step {step} skipped: {report.why}. It read: {_some(report.bad_ids)}")
        if len(self._row) <= self.limit:
            return
        steps = ", ".join(str(row["step"]) for row in self._row[-SHOWN:])
        ids = dict.fromkeys(name for row in self._row for name in row["samples"])
        raise DataError(
            f"stage {self.stage}: {len(self._row)} steps in a row were skipped ({steps}), the last because "
            f"{report.why}; bad_steps = {self.limit} allows no more, and none of them changed a weight. They "
            f"read: {_some(tuple(ids))}. All are in {self.path}. Lower the stage's rates or its clip; if "
            f"it is always the same sample, look at its picture and text."
        )


def _rows(written: bytes) -> Iterator[dict[str, Any]]:
    """The rows of the file; what a kill left half-written is passed over."""
    for line in written.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _first_undone(rows: Sequence[dict[str, Any]], stage: str, begun: int) -> int:
    """Where the rows begin that stand behind step ``begun`` of ``stage``."""
    for n, row in enumerate(rows):
        if row["stage"] == stage and row["step"] > begun:
            return n
    return len(rows)


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")
