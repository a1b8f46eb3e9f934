"""The steps of one stage: data, step, metrics, held-out loss, checkpoints, and an end at any of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch

from tinymodal.core.errors import RecipeError
from tinymodal.core.log import Metrics, Progress, clock, say
from tinymodal.core.types import Batch
from tinymodal.train import adapters, checkpoint
from tinymodal.train.bad_steps import BadSteps
from tinymodal.train.groups import lines
from tinymodal.train.optim import factor, set_rates
from tinymodal.train.parallel import (
    full_optimizer_state,
    full_state,
)
from tinymodal.train.recipe import Stage
from tinymodal.train.save import Saver
from tinymodal.train.spread import tiles_of
from tinymodal.train.stall import Watchdog
from tinymodal.train.step import StepReport, step
from tinymodal.train.stop import Stop, Stopped
from tinymodal.train.trackers import Trackers
from tinymodal.train.watch import Watch
from tinymodal.train.work import Work

WAITS = 0.05
"""Share of the time that steps wait for their data from which on the bar says so."""
AfterSave = Callable[[Path], None]


class Steps:
    """The steps of one stage on one rank; see :meth:`train`."""

    def __init__(
        self,
        work: Work,
        folder: Path,
        saver: Saver | None,
        stop: Stop,
        after_save: AfterSave | None,
        trackers: Trackers,
        shown: bool,
    ) -> None:
        self.work, self.folder, self.saver, self.stop = work, folder, saver, stop
        self.after_save, self.trackers = after_save, trackers
        self.stage, self.world = work.stage, work.world
        self.main = work.world.main
        self.shown = shown and work.world.main
        if self.shown:
            _announce(work)
        # Pieces of tensors tell little of themselves: what trains is looked at where models are whole.
        self.watch = (
            None if work.sharded else Watch(work.composed.model, work.objective.heads, work.optimizer)
        )
        self.moved = 0  # steps of this process that changed something
        if self.main and not work.begun:
            _write_trains(folder, work, "")
        self.metrics = Metrics(folder / "metrics.jsonl") if self.main else None
        self.bad = BadSteps(folder, self.stage.name, self.stage.bad_steps, work.begun, writes=self.main)
        self.skipped_before = [
            row for row in checkpoint.read_lines(folder / "skipped.jsonl") if row["stage"] != self.stage.name
        ]
        self.skipped_by_others: list[list[dict[str, Any]]] = []
        """Of each other rank, at the last save."""
        self.done = work.begun
        self.measured: int | None = None
        """The step of the newest held-out loss."""
        # Of its data, over all ranks; the same number on each of them, so that their rates are. Whole draws:
        # a sum of shares is another, in its last digit, where a run was interrupted.
        self.draws = round(self.world.sum([work.feed.progress or 0.0])[0] * (work.loader.total_draws or 1))
        self.recent = (0.0, 0.0)  # the newest losses, and how much they weigh
        self.waits = 0.0

    def train(self) -> None:
        """Take all of them, whatever comes in between.

        Raises:
            RecipeError: after the first step, other tensors have moved than those that train.
            DataError: a row cannot be used and ``bad_rows`` is ``raise``; too many steps without a finite
                loss.
            CheckpointError: the last checkpoint could not be written.
            Stopped: the run was asked to end; the step in hand is saved.
        """
        try:
            with Watchdog(self.folder, self.world, self.work.recipe.parallel.timeout_s) as dog:
                self._run(dog)
        finally:
            self.close()

    def _run(self, dog: Watchdog) -> None:
        """All of them."""
        asked = False
        with Progress(
            self.stage.name, self.stage.steps, start=self.done, shown=self.shown, share=self.share
        ) as bar:
            while self.stage.steps is None or self.done < self.stage.steps:
                dog.beat(self.done + 1, "data")
                report = self._step(dog)
                if report is None:
                    break
                shown = f"loss {self.recent[0] / self.recent[1]:.3f}" if self.recent[1] else ""
                shown += f"  waits {self.waits:.0%}" if self.waits > WAITS else ""
                bar.advance(note=shown, share=self.share)
                # Ranks learn of it together, in the next step; one alone need not wait for that.
                asked = report.asked or (self.world.size == 1 and self.stop.asked)
                if self._last:
                    break
                if self.stage.held_out and self.done % self.stage.held_out_every == 0:
                    self._measure(dog)
                every = self.work.recipe.save_every
                if asked or (every and self.done % every == 0):
                    self._save(dog, last=asked)
                if asked:
                    self._leave()
        if self.shown and self.stage.steps is not None and self.done < self.stage.steps:
            say(
                f"  stage {self.stage.name} ended with its data after {self.done:,} of {self.stage.steps:,} "
                f"steps, so its rate did not come to its end; leave steps out, and it follows the data"
            )
        if self.watch is not None:
            self._see(self.watch.end)
        if self.stage.held_out:
            self._measure(dog)
        self._save(dog, last=True, ended=True)
        if asked:
            self._leave()

    @property
    def share(self) -> float:
        """Of the stage's draws, those that are done with."""
        return min(self.draws / (self.work.loader.total_draws or 1), 1.0)

    @property
    def _last(self) -> bool:
        return self.stage.steps is not None and self.done >= self.stage.steps

    def _step(self, dog: Watchdog) -> StepReport | None:
        """One step; None where the data are at their end."""
        work, stage = self.work, self.stage
        work.meter.begin()
        taken: list[Batch] = next(work.feed, [])
        if not taken and self.world.size == 1:
            return None
        dog.beat(self.done + 1, "agree", [name for batch in taken for name in batch.sample_ids])
        if stage.steps is None:
            self.draws += round(self.world.sum([sum(batch.num_draws for batch in taken)])[0])
        set_rates(work.optimizer, factor(stage, self.done, self.share))
        report = step(
            work.objective,
            work.optimizer,
            taken,
            stage.clip,
            work.recipe.precision,
            world=self.world,
            forward=work.forward,
            scaler=work.scaler,
            asked=self.stop.asked,
            mark=dog.mark,
        )
        at_end = not (report.num_targets or report.num_samples)
        if stage.ends != "repeat" and self.world.size > 1 and at_end:
            # The step in which nobody has a target left; see data/loader.py.
            return None
        self.done += 1
        row = work.meter.end(self.done, report, work.optimizer.param_groups, work.feed.wait_s, taken)
        self.waits = 0.9 * self.waits + 0.1 * row["wait_share"]
        self._log(row)
        self.bad.see(self.done, report)
        if not report.skipped:
            self.moved += 1
            # Corrected for its short past, as Adam's means are: the first losses do not weigh longer.
            self.recent = (0.9 * self.recent[0] + 0.1 * report.loss, 0.9 * self.recent[1] + 0.1)
            self._look(taken)
        return report

    def _look(self, taken: list[Batch]) -> None:
        """See that what trains moves, and nothing else."""
        watch = self.watch
        if self.work.begun or watch is None:
            return
        pictures, sounds = (any(tiles_of(batch, kind) for batch in taken) for kind in ("image", "audio"))
        speech = "speech" in self.stage.loss and any(batch.speech_frames for batch in taken)
        told = self._see(lambda: watch.after(self.moved, pictures, sounds, speech))
        if told and self.moved == 1 and self.main:
            _write_trains(self.folder, self.work, told)

    def _see(self, look: Callable[[], str | None]) -> str | None:
        try:
            return look()
        except RecipeError as error:
            raise RecipeError(f"stages.{self.stage.name}: {error}") from error

    def _measure(self, dog: Watchdog) -> None:
        """The loss of the samples that are held out."""
        held = self.work.held_out
        assert held is not None
        if self.measured == self.done:
            return
        self.measured = self.done
        dog.mark("evaluate")
        found = held.measure(self.work.objective, self.world.device)
        if not self.work.sharded:
            found = self.world.sum(found)
        row = held.row(self.stage.name, self.done, found)
        self.work.score = row["held_out"]
        if self.shown:
            say(f"  step {self.done:,}: held-out loss {row['held_out']:.4f}")
        self._log(row)

    def _log(self, row: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.log(row)
            self.trackers.log(row)

    def _save(self, dog: Watchdog, last: bool, ended: bool = False) -> None:
        """Have a checkpoint written; every rank brings what it alone knows."""
        work, world = self.work, self.world
        dog.mark("save")
        optimizer = full_optimizer_state(work.optimizer, work.objective, world)
        weights = full_state(work.objective, world, trained_only=True) if work.sharded else None
        place = work.feed.state_dict()
        ranks = world.gather({"loader": place, "random": checkpoint.random_state()})
        skipped = world.gather(left_out(self.stage, place))
        if self.saver is not None and self.metrics is not None:
            self.skipped_by_others = skipped[1:]
            write_skipped(self.folder, self.skipped_before, skipped)
            state: dict[str, Any] = {
                "optimizer": optimizer,
                "heads": _heads(work, weights),
                "ranks": ranks,
                "scaler": None if work.scaler is None else work.scaler.state_dict(),
                "trained": _trained(work, weights),
                "base": work.base,
                "recipe": work.recipe.essence().model_dump_json(),
            }
            now = checkpoint.Progress(
                stage=work.index,
                step=self.done,
                seconds=work.meter.seconds,
                tokens=work.meter.tokens,
                metrics_bytes=self.metrics.flush(),
                ended=ended,
            )
            self._show()
            self.saver.save(self.stage.name, now, state, weights=weights, score=work.score, last=last)
            self._show()
        # Whoever evaluates what was saved does so while the others wait.
        world.barrier()

    def _show(self) -> None:
        """Show models that are on the disk by now to the caller."""
        if self.saver is None:
            return
        models = self.saver.poll()
        if models and self.after_save is not None:
            state = checkpoint.random_state()
            for model in models:
                self.after_save(model)
            checkpoint.set_random_state(state)

    def _leave(self) -> None:
        """End the process; all is saved."""
        signum = next(n for n in self.world.gather(self.stop.signum) if n is not None)
        of = f" of {self.stage.steps:,}" if self.stage.steps is not None else ""
        if self.main:
            self.stop.signum = signum
            self.stop.leave(
                f"{self.folder} holds stage {self.stage.name} up to step {self.done:,}{of}; the same command "
                f"goes on from there"
            )
        raise Stopped(signum if signum is not None else SIGTERM)

    def close(self) -> None:
        """Whatever ended the stage: rows that were left out are told, and nothing stays behind."""
        if self.saver is not None:
            self.saver.wait()
        if self.main:
            # The loader's own lists: they hold the row that ended the stage, too.
            loader = self.work.loader
            own = left_out(self.stage, {"skipped": loader.skipped, "dropped": loader.dropped})
            write_skipped(self.folder, self.skipped_before, [own, *self.skipped_by_others])
        self.work.feed.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.shown and self.done > self.work.begun:
            _conclude(self.work, self.folder, self.watch)


def _heads(work: Work, weights: dict[str, torch.Tensor] | None) -> dict[str, Any] | None:
    if weights is None or work.objective.heads is None:
        return work.heads()
    return {name.removeprefix("heads."): w for name, w in weights.items() if name.startswith("heads.")}


def _trained(work: Work, weights: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    """What a stage with adapters changes; without them the model's own folder says it."""
    if work.base is None:
        return None
    if weights is None:
        return adapters.trained_state(work.composed.model)
    return {name: weights[name] for name in work.trained}


def left_out(stage: Stage, place: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows that one rank has left out so far: ``bad`` ones, and ``long`` ones that no row can hold.

    Args:
        stage: it trains.
        place: of the rank in its data; the loader itself may be further.
    """
    return [
        {"stage": stage.name, "why": why, "sample": sample_id, "reason": reason}
        for why, key in (("bad", "skipped"), ("long", "dropped"))
        for sample_id, reason in place[key]
    ]


def write_skipped(folder: Path, before: list[dict[str, Any]], ranks: list[list[dict[str, Any]]]) -> None:
    """List the rows that were left out so far, each once."""
    found = {(row["stage"], row["sample"]): row for rows in ranks for row in rows}
    if found or before:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*before, *found.values()])
        checkpoint.write_text(folder / "skipped.jsonl", text)


def _announce(work: Work) -> None:
    stage = work.stage
    resumed = f", {work.begun:,} done" if work.begun else ""
    steps = f"{stage.steps:,} steps" if stage.steps is not None else "to the end of its data, in steps"
    ranks = f" on {work.world.size} processes" if work.world.size > 1 else ""
    say(f"stage {stage.name}: {steps} of {stage.batch_tokens:,} tokens{ranks}{resumed}")
    if stage.micro_batch_tokens == "auto":
        say(f"  {work.micro_tokens:,} positions at once fit")
    for line in lines(work.rows):
        say(f"  {line}")
    if work.said:
        say(f"  computed with: {', '.join(work.said)}")


def _write_trains(folder: Path, work: Work, looked: str) -> None:
    """The table of a stage, what was seen of it, and every tensor that trains."""
    names = {id(p): name for name, p in work.objective.model.named_parameters()}
    if work.objective.heads is not None:
        names |= {id(p): f"heads.{name}" for name, p in work.objective.heads.named_parameters()}
    tensors = [
        f"{group['peak']:<8g} {group['weight_decay']:<8g} {'x'.join(map(str, p.shape)):<16} {names[id(p)]}"
        for group in work.optimizer.param_groups
        for p in group["params"]
    ]
    text = [f"stage {work.stage.name}", *lines(work.rows)]
    text += [looked] if looked else []
    text += [f"computed with: {', '.join(work.said)}"] if work.said else []
    checkpoint.write_text(
        folder / "trains" / f"{work.stage.name}.txt",
        "\n".join([*text, "", "rate     decay    shape", *tensors, ""]),
    )


def _conclude(work: Work, folder: Path, watch: Watch | None) -> None:
    batches = work.loader
    say(f"stage {work.stage.name}: {work.meter.tokens:,} tokens in {clock(work.meter.seconds)}")
    if batches.num_skipped or batches.num_dropped:
        bad, long = len(batches.skipped), len(batches.dropped)
        say(
            f"  left out: {bad} bad rows (met {batches.num_skipped} times), {long} longer than a row (met "
            f"{batches.num_dropped} times); listed in {folder / 'skipped.jsonl'}"
        )
    if watch is not None and not work.begun and watch.waiting:
        told = ", ".join(watch.waiting[:3]) + (", ..." if len(watch.waiting) > 3 else "")
        say(
            f"  {len(watch.waiting)} tensors that train have not moved yet, as nothing they do was asked "
            f"for so far (no pictures or sounds, or an adapter's first steps): {told}"
        )
