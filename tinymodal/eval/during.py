"""Benchmarks while a run trains: at each save a process of its own scores what was saved.

``RUN/evals/STAGE-STEP/`` holds replies and results of one save, ``RUN/evals.jsonl`` a row for each with the
number that each benchmark is known by; ``tinymodal compare RUN`` draws them as curves. The training never
waits but at its end, and a failed evaluation costs no step: it is told, with the file that says why. What was
waiting when a run was killed is scored when it goes on.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymodal.core.log import say
from tinymodal.eval.folder import RESULTS, read_summaries
from tinymodal.eval.results import flat

if TYPE_CHECKING:
    from tinymodal.train.recipe import EvalEvery

EVALS = "evals.jsonl"
FOLDER = "evals"
MODEL, LOG = "model", "log.txt"
NICENESS = 10
"""What a child is put behind the training by, where they share cores."""
TORCHRUN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Of the training's processes; the child is alone."""


class Evaluations:
    """Scores saved models one after the other, in a process of their own."""

    def __init__(self, run: Path, spec: EvalEvery) -> None:
        """Take up what an earlier start left waiting.

        Args:
            run: the run folder.
            spec: what is asked, and how often.
        """
        self.run, self.spec = run, spec
        self._saves = 0
        self._waiting: queue.Queue[Path | None] = queue.Queue()
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="evaluations", daemon=True)
        self._thread.start()
        for left in sorted((run / FOLDER).glob(f"*/{MODEL}")):
            self._waiting.put(left.parent)

    def saved(self, model: Path) -> None:
        """A model was saved as ``RUN/checkpoints/NN-STAGE-STEP/model``; it is scored when its turn comes.

        It is linked to (copied, where the disk has no links): the checkpoint may be gone by then.
        """
        self._saves += 1
        if self._saves % self.spec.saves:
            return
        folder = self.run / FOLDER / model.parent.name
        if (folder / RESULTS).exists():
            return
        draft = folder / f"{MODEL}.part"
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(model, draft, copy_function=_link)
        draft.rename(folder / MODEL)
        self._waiting.put(folder)

    def finish(self) -> None:
        """Wait until all are scored."""
        if (count := self._waiting.qsize() + (self._child is not None)) > 0:
            say(f"evaluating {count} saved model{'s' if count > 1 else ''} still; Ctrl-C leaves the rest")
        self._waiting.put(None)
        self._thread.join()

    def stop(self) -> None:
        """End the child now; what waits is taken up by the next start."""
        self._stopped = True
        self._waiting.put(None)
        if (child := self._child) is not None:
            child.terminate()
        self._thread.join()

    def _work(self) -> None:
        while (folder := self._waiting.get()) is not None and not self._stopped:
            try:
                self._evaluate(folder)
            except OSError as error:
                say(f"{folder}: was not evaluated: {error}")

    def _evaluate(self, folder: Path) -> None:
        words = [
            sys.executable,
            "-m",
            "tinymodal",
            "eval",
            str(folder / MODEL),
            "--on",
            ",".join(self.spec.on),
        ]
        words += ["--limit", str(self.spec.questions)]
        words += ["--out", str(folder), "--device", self.spec.device]
        if self.spec.data is not None:
            words += ["--data", self.spec.data]
        env = {key: value for key, value in os.environ.items() if key not in TORCHRUN}
        with (folder / LOG).open("wb") as log:
            self._child = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)
        os.setpriority(os.PRIO_PROCESS, self._child.pid, NICENESS)
        code = self._child.wait()
        self._child = None
        if self._stopped:
            return
        # Also where it failed: it would fail again at every start.
        shutil.rmtree(folder / MODEL, ignore_errors=True)
        if code:
            last = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            say(f"{folder.name} was not evaluated (exit code {code}): {''.join(last)} See {folder / LOG}.")
            return
        row = row_of(folder)
        with (self.run / EVALS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        told = ", ".join(
            f"{key.removeprefix('eval/')} {value:.4g}" for key, value in row.items() if "/" in key
        )
        say(f"evaluated {row['stage']} at step {row['step']:,}: {told}")


def row_of(folder: Path) -> dict[str, Any]:
    """``{"stage", "step", "eval/NAME": headline, ...}`` of one evaluated save, ``NN-STAGE-STEP``."""
    _, _, rest = folder.name.partition("-")
    stage, _, step = rest.rpartition("-")
    row: dict[str, Any] = {"stage": stage, "step": int(step)}
    for name, told in read_summaries(folder / RESULTS).items():
        if (value := headline(told)) is not None:
            row[f"eval/{name}"] = value
    return row


def headline(told: Mapping[str, Any]) -> float | None:
    """The number that a benchmark is known by, of its part of ``results.json``; None where it has none."""
    return flat(told["metrics"]).get(told["headline"])


def _link(source: str, to: str) -> None:
    try:
        os.link(source, to)
    except OSError:
        shutil.copy2(source, to)
