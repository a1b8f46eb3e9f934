"""One stage: everything that trains put together, its steps, and its checkpoints.

``begin`` makes a :class:`Work` in an order that matters: adapters before what trains is known, the cache and
the copy that is saved before weights become narrower or lie in pieces, swapped forwards before pieces, the
optimizer after them. ``train`` runs the steps; ``Work.close`` takes all of it apart again, so that the model
is an ordinary one between stages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, Any

import torch

from tinymodal.compose.quantize import quantize
from tinymodal.core.errors import CheckpointError, RecipeError, TinyModalError
from tinymodal.core.log import Metrics, Progress, clock, say
from tinymodal.core.types import Batch
from tinymodal.data import seen
from tinymodal.data.cache import FeatureCache
from tinymodal.data.deal import merge_states
from tinymodal.data.loader import Loader
from tinymodal.data.sources import Source
from tinymodal.train import adapters, checkpoint
from tinymodal.train.bad_steps import BadSteps
from tinymodal.train.checkpoint import Checkpoint
from tinymodal.train.feed import Feed
from tinymodal.train.flops import StepFlops, peak_flops
from tinymodal.train.groups import Row, lines, trainable, who_trains
from tinymodal.train.held_out import HeldOut
from tinymodal.train.lean import lean
from tinymodal.train.memory import estimate, free_bytes, largest_micro_batch
from tinymodal.train.meter import Meter
from tinymodal.train.objective import Objective
from tinymodal.train.optim import build_optimizer, factor, set_rates
from tinymodal.train.parallel import (
    full_optimizer_state,
    full_state,
    is_sharded,
    load_optimizer_state,
    make_whole,
    parallelize,
)
from tinymodal.train.precision import DTYPES, Narrow, loss_scale
from tinymodal.train.recipe import Recipe, Stage
from tinymodal.train.recompute import set_recompute
from tinymodal.train.save import Saver
from tinymodal.train.shards import Shards
from tinymodal.train.stage_data import encoder_of, held_out, names_of, open_data, stage_loader
from tinymodal.train.stall import Watchdog
from tinymodal.train.step import StepReport, step
from tinymodal.train.stop import Stop, Stopped
from tinymodal.train.teacher import Shelf, Teacher, reference, see_alike
from tinymodal.train.trackers import Trackers
from tinymodal.train.watch import Watch, fingerprint
from tinymodal.train.world import World

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed

FEATURES = Path("~/.cache/tinymodal/features")
TEACHERS = "teachers"
"""Folder beside the features where the choices of teachers are kept."""
PROBES = 4
"""Samples of each source that a teacher must read as the student does."""

WAITS = 0.05
"""Share of the time that steps wait for their data from which on the bar says so."""

AfterSave = Callable[[Path], None]


@dataclass
class Work:
    """A stage while it trains."""

    recipe: Recipe
    index: int
    world: World
    composed: Composed
    objective: Objective
    forward: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    feed: Feed
    micro_tokens: int
    scaler: torch.amp.GradScaler | None
    held_out: HeldOut | None
    meter: Meter
    carried: dict[str, Any] | None
    """Cell heads of earlier stages, for stages to come; this one's own go before them."""
    base: str | None
    """Fingerprint of the model that the stage began with; None without adapters."""
    trained: list[str]
    """Names of all that a step changes in the model."""
    begun: int
    """Steps that were done when this process took over."""
    rows: list[Row]
    """The table of who trains."""
    said: list[str] = field(default_factory=list)
    """What is done to train it, for the person who waits."""
    taken_apart: ExitStack = field(default_factory=ExitStack)
    score: float | None = None
    """The newest held-out loss."""

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.index]

    @property
    def sharded(self) -> bool:
        return isinstance(self.forward, Shards)

    def heads(self) -> dict[str, Any] | None:
        """The cell heads, for the stages to come."""
        own = self.objective.heads
        return self.carried if own is None else {k: v.detach().cpu() for k, v in own.state_dict().items()}

    def close(self, failed: bool = False) -> None:
        """The model as it was made, with the numbers that it has now, and nothing else of the stage.

        Args:
            failed: an error ended the stage. Pieces stay pieces then: the other ranks wait elsewhere.
        """
        self.feed.close()
        # In the model's own tensors; the next stage may never ask for them again.
        self.optimizer.zero_grad(set_to_none=True)
        if self.sharded and not failed:
            make_whole(self.objective, self.world)
        self.taken_apart.close()
        self.objective.reference = self.objective.teacher = None


def begin(
    recipe: Recipe,
    index: int,
    world: World,
    composed: Composed,
    saver: Saver | None,
    resumed: Checkpoint | None,
    heads: dict[str, Any] | None,
    base_folder: str | None,
    other: Callable[[], Composed],
) -> Work:
    """Stage ``index`` before its first step, or where ``resumed`` left it.

    Args:
        recipe: the run.
        index: of the stage.
        world: the processes.
        composed: the model; changed in place until :meth:`Work.close`.
        saver: told what it will save; None where another rank writes.
        resumed: a checkpoint of this stage.
        heads: cell heads of the stages before.
        base_folder: where the model that the stage begins with lies; None where it was composed of parts.
        other: makes a second model like the one that the stage begins with, for ``dpo``.

    Raises:
        RecipeError: the stage does not fit the model, the machine or the processes.
        CheckpointError: the stage was begun with another model.
    """
    stage, model = recipe.stages[index], composed.model
    device = world.device
    # Every rank draws its own dropout.
    checkpoint.seed_random(recipe.stage_seed(index), world.rank)
    before_stage = other() if "dpo" in stage.loss else None
    base = None if stage.lora is None else fingerprint(model)
    if resumed is not None and resumed.state["base"] != base:
        raise CheckpointError(
            f"{resumed.path}: stage {stage.name} began with another model than {base_folder} holds now, and "
            f"its adapter fits that one only. Put it back, or train into another folder."
        )
    if stage.bits is not None:
        # Before the model moves: what is rounded may fit on a device that the whole does not.
        compute = DTYPES.get(recipe.precision, torch.float32)
        for each in (composed, before_stage):
            if each is not None:
                quantize(each.model.model.language_model, stage.bits, device, compute)
    model.to(device)  # type: ignore[arg-type]
    names = [] if stage.lora is None else adapters.inject(model, stage.lora, base_folder)
    objective = Objective(model, stage.loss, stage.cell_classes)
    objective.weights = {str(loss): weight for loss, weight in stage.loss_weights.items()}
    objective.beta = stage.beta
    load_heads(objective, heads)

    def grouped() -> list[dict[str, Any]]:
        return trainable(model, stage.train, stage.weight_decay, objective.heads, stage.only, names)

    apart = ExitStack()
    # Before it is known what trains: frozen blocks are recomputed too, and that is part of their mode.
    set_recompute(model, stage.recompute)
    apart.callback(set_recompute, model, "none")
    groups = grouped()
    if resumed is not None and resumed.state["trained"] is not None:
        adapters.load_trained(model, resumed.state["trained"])
    trained = list(adapters.trained_state(model))
    rows = who_trains(model, stage, objective.heads)
    flops = StepFlops(model)
    kept = feature_cache(recipe, index, composed)
    sharded = is_sharded(recipe.parallel, world)
    if saver is not None:
        saver.follow(composed, sharded=sharded)
    swapped = lean(objective)
    apart.callback(swapped.restore)
    if not sharded:
        # Pieces are gathered in 16 bits anyway.
        narrow = Narrow(model, recipe.precision, spare=(model.head_weight(),))
        apart.callback(narrow.restore)
    # Before it is asked what memory is left.
    if before_stage is not None:
        before_stage.model.to(device)  # type: ignore[arg-type]
        Narrow(before_stage.model.requires_grad_(False), recipe.precision)
        objective.reference = reference(before_stage)
    if stage.teacher is not None:
        objective.teacher = teacher_of(recipe, index, world, composed)
    micro_tokens = settle(recipe, index, world, composed, objective, groups)
    forward = parallelize(objective, world, recipe.parallel, recipe.precision)
    if isinstance(forward, Shards):
        groups = grouped()
    optimizer = build_optimizer(groups, stage)

    read = encoder_of(recipe, index, composed, None if kept is None else kept.prepare)
    loader = stage_loader(
        recipe, index, composed, world, micro_tokens, read, None if kept is None else kept.complete
    )
    at = checkpoint.Progress(stage=index)
    scaler = loss_scale(recipe.precision, device)
    if resumed is not None:
        at = resumed.progress
        load_optimizer_state(optimizer, objective, resumed.state["optimizer"], world)
        ranks = resumed.state["ranks"]
        loader.load_state_dict(merge_states([rank["loader"] for rank in ranks]))
        states, seed = [rank["random"] for rank in ranks], recipe.stage_seed(index) + at.step
        checkpoint.set_random_state_of(states, world.rank, world.size, seed)
        if scaler is not None and resumed.state["scaler"] is not None:
            scaler.load_state_dict(resumed.state["scaler"])
    left = None if stage.steps is None else stage.steps - at.step
    held = held_out(recipe, index, composed, world, micro_tokens)
    if held is not None:
        held.look(objective, stage.name, world)
    return Work(
        recipe=recipe,
        index=index,
        world=world,
        composed=composed,
        objective=objective,
        forward=forward,
        optimizer=optimizer,
        loader=loader,
        feed=Feed(loader, device, stage.split(world.size, micro_tokens)[1], steps=left),
        micro_tokens=micro_tokens,
        scaler=scaler,
        held_out=held,
        meter=Meter(
            stage.name,
            names_of(recipe, index),
            device,
            seconds=at.seconds,
            tokens=at.tokens,
            flops=flops,
            peak_flops=peak_flops(device, DTYPES.get(recipe.precision, torch.float32)),
        ),
        carried=heads,
        base=base,
        trained=trained,
        begun=at.step,
        rows=rows,
        said=swapped.lines,
        taken_apart=apart,
    )


def feature_cache(recipe: Recipe, index: int, composed: Composed) -> seen.Kept | None:
    """The cache of a stage's frozen tower; None where it has none. Call it when it is known what trains.

    Raises:
        RecipeError: there is no tower, or it trains.
    """
    stage = recipe.stages[index]
    if not stage.cache:
        return None
    folder = cache_folder(recipe)
    cache = FeatureCache(folder, stage.cache_dtype, round(recipe.cache_gb * 1e9))
    return seen.keep(
        composed.model,
        composed.processor.image_processor,
        cache,
        recipe.precision,
        f"stages.{stage.name}",
    )


def cache_folder(recipe: Recipe) -> Path:
    """Where features are kept."""
    return (FEATURES if recipe.cache_folder is None else Path(recipe.cache_folder)).expanduser()


def teacher_of(recipe: Recipe, index: int, world: World, composed: Composed) -> Teacher:
    """The teacher of a stage, seen to read what the student reads."""
    from tinymodal.compose import build

    stage = recipe.stages[index]
    spec = stage.teacher
    assert spec is not None
    larger = build.load(spec.path, device=str(world.device), key=f"stages.{stage.name}.teacher.path")
    place, seed = f"stages.{stage.name}.data", recipe.stage_seed(index)
    sources = [open_data(source, f"{place}[{i}]", seed) for i, source in enumerate(stage.data)]
    try:
        see_alike(
            composed.encoder.using(template=stage.template, train_on=stage.train_on),
            larger.encoder.using(template=stage.template, train_on=stage.train_on),
            (partial(source.sample, n) for source in sources for n in range(_few(source))),
        )
    except TinyModalError as error:
        raise RecipeError(f"stages.{stage.name}.{error}") from error
    shelf, vocabulary = None, len(composed.model.head_weight())
    if spec.cached and spec.top_k is not None:
        folder = cache_folder(recipe) / TEACHERS
        weights = fingerprint(larger.model)
        shelf = Shelf(folder, weights, spec.temperature, spec.top_k, vocabulary, recipe.precision)
    larger.model.requires_grad_(False)
    Narrow(larger.model, recipe.precision)
    return Teacher(larger, vocabulary, spec.temperature, spec.top_k, shelf)


def _few(source: Source) -> int:
    """``PROBES``, or all that the source has."""
    return min(PROBES, len(source)) if isinstance(source, Sized) else PROBES


def settle(
    recipe: Recipe,
    index: int,
    world: World,
    composed: Composed,
    objective: Objective,
    groups: Sequence[dict[str, Any]],
) -> int:
    """Positions of a micro-batch; for ``auto`` the most that fit, on every rank.

    Raises:
        RecipeError: the step cannot be shared evenly, or not even one row fits.
    """
    stage = recipe.stages[index]
    if stage.micro_batch_tokens != "auto":
        return stage.split(world.size)[0]
    own = stage.split(world.size)[0]
    rows = own // stage.seq_len
    loader = stage_loader(recipe, index, composed, world, stage.seq_len * min(rows, 4))
    few = next(loader)
    loader.close()
    sizes = [rows // n for n in range(1, rows + 1) if rows % n == 0]

    def needed(size: int) -> int:
        found = estimate(objective, groups, stage, recipe.precision, few, size, rows // size)
        # The weights lie there already.
        return found.total - found.weights

    best = largest_micro_batch(sizes, needed, free_bytes(world.device))
    fits = min(world.gather(best or 0))
    if not fits:
        raise RecipeError(
            f"stages.{stage.name}.micro_batch_tokens is 'auto', but one row of {stage.seq_len} positions "
            f"needs {needed(1) / 1e6:,.0f} MB and {free_bytes(world.device) / 1e6:,.0f} MB are free; shorten "
            f"seq_len, or take recompute = 'full', another optimizer, lora or bits"
        )
    return fits * stage.seq_len


def train(
    work: Work,
    folder: Path,
    saver: Saver | None,
    stop: Stop,
    after_save: AfterSave | None,
    trackers: Trackers,
    shown: bool,
) -> None:
    """The steps of one stage.

    Raises:
        RecipeError: after the first step, other tensors have moved than those that train.
        DataError: a row cannot be used and ``bad_rows`` is ``raise``; too many steps without a finite loss.
        CheckpointError: the last checkpoint could not be written.
        Stopped: the run was asked to end; the step in hand is saved.
    """
    steps = _Steps(work, folder, saver, stop, after_save, trackers, shown and work.world.main)
    try:
        with Watchdog(folder, work.world, work.recipe.parallel.timeout_s) as dog:
            steps.run(dog)
    finally:
        steps.close()


class _Steps:
    """The steps of one stage on one rank."""

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
        self.after_save, self.trackers, self.shown = after_save, trackers, shown
        self.stage, self.world = work.stage, work.world
        self.main = work.world.main
        if shown:
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

    def run(self, dog: Watchdog) -> None:
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
            self._look(any(_shows(batch) for batch in taken))
        return report

    def _look(self, pictures: bool) -> None:
        """See that what trains moves, and nothing else."""
        watch = self.watch
        if self.work.begun or watch is None:
            return
        told = self._see(lambda: watch.after(self.moved, pictures))
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


def load_heads(objective: Objective, weights: dict[str, Any] | None) -> None:
    """Go on with the cell heads of the stage before, where they ask the same questions."""
    if objective.heads is None or weights is None:
        return
    own = objective.heads.state_dict()
    if all(own[key].shape == weights[key].shape for key in own):
        objective.heads.load_state_dict(weights)


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


def _shows(batch: Batch) -> bool:
    return batch.pixel_values is not None or batch.image_features is not None


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
            f"for so far (no pictures, or an adapter's first steps): {told}"
        )
