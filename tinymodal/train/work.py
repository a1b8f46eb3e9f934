"""A stage put together before its first step, and taken apart behind its last.

``begin`` makes a :class:`Work` in an order that matters: adapters before what trains is known, the cache and
the copy that is saved before weights become narrower or lie in pieces, swapped forwards before pieces, the
optimizer after them. ``Work.close`` takes all of it apart again, so that the model is an ordinary one between
stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tinymodal.compose.quantize import quantize
from tinymodal.core.errors import CheckpointError, RecipeError, TinyModalError
from tinymodal.data import seen
from tinymodal.data.cache import FeatureCache
from tinymodal.data.deal import merge_states
from tinymodal.data.loader import Loader
from tinymodal.data.sources import Source
from tinymodal.train import adapters, checkpoint
from tinymodal.train.checkpoint import Checkpoint
from tinymodal.train.feed import Feed
from tinymodal.train.flops import StepFlops, peak_flops
from tinymodal.train.groups import Row, trainable, who_trains
from tinymodal.train.held_out import HeldOut
from tinymodal.train.lean import lean
from tinymodal.train.memory import estimate, free_bytes, largest_micro_batch
from tinymodal.train.meter import Meter
from tinymodal.train.objective import Objective
from tinymodal.train.optim import build_optimizer
from tinymodal.train.parallel import (
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
from tinymodal.train.stage_data import (
    cache_folder,
    codes_of,
    completed,
    encoder_of,
    held_out,
    names_of,
    open_data,
    stage_loader,
)
from tinymodal.train.teacher import Shelf, Teacher, reference, see_alike
from tinymodal.train.watch import fingerprint
from tinymodal.train.world import World

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed

TEACHERS = "teachers"
"""Folder beside the features where the choices of teachers are kept."""
PROBES = 4
"""Samples of each source that a teacher must read as the student does."""


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
    flops = StepFlops(model, losses=stage.loss)
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

    book = codes_of(recipe, index, composed, device)
    seen_, heard = (None, None) if kept is None else (kept.prepare, kept.prepare_sound)
    read = encoder_of(recipe, index, composed, seen_, heard)
    complete = completed(None if kept is None else kept.complete, None if book is None else book.complete)
    loader = stage_loader(recipe, index, composed, world, micro_tokens, read, complete)
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
    """The cache of a stage's frozen towers; None where it has none. Call it when it is known what trains.

    Raises:
        RecipeError: there is no tower, or one trains.
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
        composed.processor.feature_extractor,
    )


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


def load_heads(objective: Objective, weights: dict[str, Any] | None) -> None:
    """Go on with the cell heads of the stage before, where they ask the same questions."""
    if objective.heads is None or weights is None:
        return
    own = objective.heads.state_dict()
    if all(own[key].shape == weights[key].shape for key in own):
        objective.heads.load_state_dict(weights)
