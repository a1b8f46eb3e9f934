"""Train the stages of a recipe, one after the other, in one process or in many.

A run is a folder: ``recipe.toml`` (resolved), ``run.json`` (versions, commit, machine), ``metrics.jsonl`` (a
line a step), ``skipped.jsonl`` (rows that were left out, and why), ``trains/<name>.txt`` (what each stage
trains, tensor by tensor), ``checkpoints/``, ``stages/<name>`` (the model after each stage) and ``model`` (the
result; both load with transformers' Auto classes). A stage with ``lora`` leaves its adapter beside its merged
model: ``adapters/<name>``, and ``adapter`` for the last. Started again, a run goes on from its newest
checkpoint, and what it then computes is equal, bit for bit, to a run that was never interrupted.

Of several processes (``torchrun``) rank 0 prints and writes; all of them read the run folder, which must lie
on a disk that they share.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from tinymodal.compose import build
from tinymodal.compose.pretrained import fetch
from tinymodal.compose.quantize import require
from tinymodal.core import config
from tinymodal.core.errors import CheckpointError, RecipeError
from tinymodal.core.log import Metrics, say
from tinymodal.core.memory import hold_memory
from tinymodal.model.language import packs_exactly
from tinymodal.train import adapters, checkpoint, trackers
from tinymodal.train.checkpoint import Checkpoint
from tinymodal.train.groups import trainable
from tinymodal.train.machine import record
from tinymodal.train.objective import Objective
from tinymodal.train.optim import require_optimizer
from tinymodal.train.recipe import Recipe, Stage
from tinymodal.train.save import Saver
from tinymodal.train.stage import AfterSave, Steps
from tinymodal.train.stage_data import held_out, stage_loader
from tinymodal.train.stop import on_signals
from tinymodal.train.trackers import Trackers
from tinymodal.train.work import begin
from tinymodal.train.world import ALONE, World, open_world

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed

OnStageEnd = Callable[[Stage, "Composed"], None]


def run(
    recipe: Recipe,
    folder: Path,
    after_save: AfterSave | None = None,
    on_stage_end: OnStageEnd | None = None,
    progress: bool = True,
) -> Composed:
    """Train every stage of ``recipe`` in order; go on where ``folder`` holds a checkpoint.

    Args:
        recipe: the parts and the stages.
        folder: the run folder, made if it is not there.
        after_save: called with the model's folder after every checkpoint, on rank 0.
        on_stage_end: called with the stage and the model in eval mode, on rank 0. Called again on resume if
            the run was killed before it returned. Neither call can change the training: random state is put
            back after it.
        progress: show bars and tables.

    Returns:
        Model and encoder as trained, in eval mode, on the device; on the CPU where the last stage had
        ``bits``, since its float32 weights may be more than the device holds.

    Raises:
        RecipeError: the recipe does not fit its parts, its data or its processes, or the folder belongs to
            another recipe; after the first step of a stage, other tensors have moved than those that train.
        DataError: a row cannot be used and ``bad_rows`` is ``raise``; too many steps without a finite loss.
        CheckpointError: no checkpoint is whole, what its stage began with has changed, or the last one of a
            stage could not be written.
        Stopped: SIGTERM or SIGINT came; the step in hand is saved, and the same call goes on from there.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    trackers.require(recipe.trackers)
    device = _device(recipe)
    if device == "cpu":
        hold_memory()
    with open_world(recipe.parallel, device) as world:
        return _run(recipe, folder, world, after_save, on_stage_end, progress and world.main)


def _run(
    recipe: Recipe,
    folder: Path,
    world: World,
    after_save: AfterSave | None,
    on_stage_end: OnStageEnd | None,
    shown: bool,
) -> Composed:
    """All stages, on one rank."""
    start = _newest(folder, world)
    _check_folder(recipe, folder, start)
    composed = _where(recipe, folder, start)
    checkpoint.realign(composed.model)
    if start is not None and shown:
        say(f"going on from {start.path}")
    first = 0 if start is None else start.progress.stage
    # Every stage is opened before the first one trains: a file that is missing is told now, not after hours.
    check(recipe, composed, first, world)

    if world.main:
        _open_folder(recipe, folder, start)
    world.barrier()
    heads: dict[str, Any] | None = None if start is None else start.state["heads"]
    saver = Saver(folder, recipe.keep, recipe.keep_best, recipe.save_async) if world.main else None
    told = Trackers(
        recipe.trackers if world.main else (), folder, recipe.name, recipe.model_dump(mode="json")
    )
    failed = True
    try:
        with on_signals() as stop:
            for index in range(first, len(recipe.stages)):
                resumed = start if index == first else None
                if resumed is None or not resumed.progress.ended:
                    work = begin(
                        recipe,
                        index,
                        world,
                        composed,
                        saver,
                        resumed,
                        heads,
                        _base(recipe, index, folder),
                        lambda index=index: _beginning(recipe, index, folder),  # type: ignore[misc]
                    )
                    try:
                        Steps(work, folder, saver, stop, after_save, told, shown).train()
                    except BaseException:
                        work.close(failed=True)
                        raise
                    work.close()
                    heads = work.heads()
                    # Its optimizer and its teacher are gone before the next stage asks for memory.
                    del work
                _finish(recipe, index, folder, world, composed, on_stage_end, shown)
        failed = False
    finally:
        told.close(failed)
    if world.main:
        for part, where in recipe.parts.items():
            build.save_part(composed.model, part, Path(where), composed.encoder.tokenizer)
    world.barrier()
    return composed


def _newest(folder: Path, world: World) -> Checkpoint | None:
    """The checkpoint to go on from; the same on all ranks.

    Raises:
        CheckpointError: the ranks see different ones.
    """
    # Rank 0 first: it sweeps away what a killed run left half-written.
    start = checkpoint.latest(folder) if world.main else None
    world.barrier()
    if not world.main:
        start = checkpoint.latest(folder)
    names = world.gather(None if start is None else start.path.name)
    if len(set(names)) > 1:
        raise CheckpointError(
            f"{folder}: rank {world.rank} goes on from {names[world.rank]} and rank 0 from {names[0]}; the "
            f"run folder must lie on a disk that all processes share"
        )
    return start


def _where(recipe: Recipe, folder: Path, start: Checkpoint | None) -> Composed:
    """The model to go on with: as ``start`` holds it, but for the middle of a stage with adapters.

    There the checkpoint's model is merged, and merging rounds; what the stage began with does not.
    """
    if start is None:
        return build.build(recipe.model, recipe.seed)
    index = start.progress.stage
    if recipe.stages[index].lora is None or start.progress.ended:
        return build.load(start.model)
    return _beginning(recipe, index, folder)


def _beginning(recipe: Recipe, index: int, folder: Path) -> Composed:
    """The model that a stage begins with."""
    if index == 0:
        return build.build(recipe.model, recipe.seed)
    return build.load(folder / "stages" / recipe.stages[index - 1].name)


def _base(recipe: Recipe, index: int, folder: Path) -> str | None:
    """The folder or name of the model that a stage begins with; None where parts are composed for it."""
    return recipe.model.path if index == 0 else str(folder / "stages" / recipe.stages[index - 1].name)


def check(recipe: Recipe, composed: Composed, first: int = 0, world: World = ALONE) -> None:
    """Find what is wrong with the stages from ``first`` on before any of them trains.

    Raises:
        RecipeError: the language model cannot be trained so, or a stage names what is not there.
        CheckpointError: there is no such teacher.
        DataError: a file is missing or cannot be read.
    """
    check_language(recipe, composed)
    for index in range(first, len(recipe.stages)):
        stage = recipe.stages[index]
        with torch.random.fork_rng(devices=[]):
            heads = Objective(composed.model, stage.loss, stage.cell_classes).heads
        try:
            names = [] if stage.lora is None else adapters.targets(composed.model, stage.lora)
            if stage.bits is not None:
                require(stage.bits)
            require_optimizer(stage)
            if stage.teacher is not None:
                fetch(stage.teacher.path, f"stages.{stage.name}.teacher.path")
            _check_sharding(recipe, stage)
            trainable(composed.model, stage.train, stage.weight_decay, heads, stage.only, names)
            if stage.cache and not composed.model.model.towers:
                raise RecipeError("'cache' keeps what towers say, and this model has none")
            loader = stage_loader(recipe, index, composed, world)
            if stage.steps is None and loader.total_draws is None:
                raise RecipeError(
                    f"ends = '{stage.ends}', but a source of its data has no end; give steps, or a source of "
                    f"which the rows are known"
                )
            held_out(recipe, index, composed, world)
        except RecipeError as error:
            place = f"stages.{stage.name}"
            raise error if place in str(error) else RecipeError(f"{place}: {error}") from error


def _check_sharding(recipe: Recipe, stage: Stage) -> None:
    """Refuse what cannot lie in pieces on several processes."""
    if recipe.parallel.kind == "ddp":
        return
    kind = f"parallel.kind = '{recipe.parallel.kind}'"
    if stage.bits is not None:
        raise RecipeError(
            f"bits = {stage.bits} does not go with {kind}: rounded matrices cannot be cut; take 'ddp'"
        )
    if stage.optimizer != "adamw":
        raise RecipeError(
            f"optimizer = '{stage.optimizer}' does not go with {kind}; take 'adamw', or kind = 'ddp'"
        )
    if stage.cache:
        raise RecipeError(
            f"cache = true does not go with {kind}: every process must run the whole tower; take 'ddp'"
        )
    if "dpo" in stage.loss or "distill" in stage.loss:
        raise RecipeError(f"the losses dpo and distill do not go with {kind}; take 'ddp'")


def check_language(recipe: Recipe, composed: Composed) -> None:
    """Refuse what the language model cannot do: keep packed documents apart, or read rows that long."""
    text = composed.model.config.text_config
    if not packs_exactly(text):
        raise RecipeError(
            f"model.language: a {text.model_type} carries its state over the borders of packed documents, "
            f"so it cannot be trained on packed rows; choose one with attention in every layer."
        )
    context = getattr(text, "max_position_embeddings", None)
    for stage in recipe.stages:
        if context is not None and stage.seq_len > context:
            raise RecipeError(
                f"stages.{stage.name}.seq_len is {stage.seq_len}, but the language model reads at most "
                f"{context} positions; take {context} or less."
            )


def _finish(
    recipe: Recipe,
    index: int,
    folder: Path,
    world: World,
    composed: Composed,
    on_stage_end: OnStageEnd | None,
    shown: bool,
) -> None:
    """Show the stage's model to the caller, then put it where it stays: a folder that says both were done."""
    stage = recipe.stages[index]
    with_adapter = adapters.merge(composed.model)
    if with_adapter is not None:
        # As a resumed run has it: the checkpoint's was merged on the CPU.
        checkpoint.load_weights(composed.model, checkpoint.end_of(folder, index).model)
        if shown:
            say(f"  adapter merged: layers differ by at most {with_adapter:.0e} of their largest output")
    composed.model.to(world.device if stage.bits is None else "cpu")  # type: ignore[arg-type]
    composed.model.train(False)
    last = index == len(recipe.stages) - 1
    place = folder / "model" if last else folder / "stages" / stage.name
    beside = folder / "adapter" if last else folder / "adapters" / stage.name
    if world.main and not place.exists():
        if on_stage_end is not None:
            state = checkpoint.random_state()
            on_stage_end(stage, composed)
            checkpoint.set_random_state(state)
        newest = checkpoint.end_of(folder, index)
        # The adapter first: a model in its place says that all is done.
        if newest.adapter.exists():
            checkpoint.copy_folder(newest.adapter, beside)
        checkpoint.copy_folder(newest.model, place)
    world.barrier()


def _device(recipe: Recipe) -> str:
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device is 'cuda', but torch sees no GPU; take 'auto' or 'cpu'")
    if recipe.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return recipe.device


def _check_folder(recipe: Recipe, folder: Path, start: Checkpoint | None) -> None:
    """See that a run folder is empty or belongs to this recipe."""
    if start is not None:
        try:
            then = Recipe.model_validate_json(start.state["recipe"])
        except ValidationError as error:
            raise CheckpointError(
                f"{start.path}: its recipe is one of another version of this program "
                f"({error.errors()[0]['msg']}); go on with that version, or give another folder."
            ) from error
        checkpoint.refuse_another(folder, then, recipe.essence())
    elif (folder / "model").exists():
        raise CheckpointError(
            f"{folder}: holds a finished model but no checkpoint to go on from; give another folder."
        )


def _open_folder(recipe: Recipe, folder: Path, start: Checkpoint | None) -> None:
    """Write down what is run and on what; forget the lines of steps that will be done again."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(folder / "recipe.toml", config.dump(recipe))
    runs = folder / "run.json"
    known = json.loads(runs.read_text()) if runs.exists() and start is not None else {"starts": []}
    known["starts"].append(record())
    checkpoint.write_text(runs, json.dumps(known, indent=2) + "\n")
    metrics = Metrics(folder / "metrics.jsonl")
    metrics.rewind(0 if start is None else start.progress.metrics_bytes)
    metrics.close()
