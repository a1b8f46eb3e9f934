"""Train the stages of a recipe, one after the other.

A run is a folder: ``recipe.toml`` (resolved), ``run.json`` (versions, commit, machine), ``metrics.jsonl`` (a
line a step), ``skipped.jsonl`` (rows that were left out, and why), ``trains/<name>.txt`` (what each stage
trains, tensor by tensor), ``checkpoints/``, ``stages/<name>`` (the model after each stage) and ``model`` (the
result; both load with transformers' Auto classes). A stage with ``lora`` leaves its adapter beside its merged
model: ``adapters/<name>``, and ``adapter`` for the last. Started again, a run goes on from its newest
checkpoint, and what it then computes is equal, bit for bit, to a run that was never interrupted.
"""

from __future__ import annotations

import inspect
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinymodal.compose import build
from tinymodal.compose.quantize import quantize, require
from tinymodal.core import config
from tinymodal.core.errors import CheckpointError, DataError, RecipeError
from tinymodal.core.log import Metrics, Progress, clock, say
from tinymodal.core.lookup import find, nearest
from tinymodal.data.loader import Loader
from tinymodal.data.sources import Source, open_source
from tinymodal.data.synthetic import MADE
from tinymodal.model.language import packs_exactly
from tinymodal.train import adapters, checkpoint
from tinymodal.train.checkpoint import Checkpoint
from tinymodal.train.groups import Row, lines, trainable, who_trains
from tinymodal.train.machine import record
from tinymodal.train.objective import Objective
from tinymodal.train.optim import build_optimizer, factor, set_rates
from tinymodal.train.recipe import Recipe, Stage
from tinymodal.train.recipe import Source as SourceSpec
from tinymodal.train.step import StepReport, step
from tinymodal.train.watch import Watch, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tinymodal.compose.build import Composed

HARMLESS = ("name", "save_every", "threads", "device", "parts")
"""Keys of a recipe that may change between two starts of one run; of a stage: ``workers``."""


def run(
    recipe: Recipe,
    folder: Path,
    after_save: Callable[[Path], None] | None = None,
    on_stage_end: Callable[[Stage, Composed], None] | None = None,
    progress: bool = True,
) -> Composed:
    """Train every stage of ``recipe`` in order; go on where ``folder`` holds a checkpoint.

    Args:
        recipe: the parts and the stages.
        folder: the run folder, made if it is not there.
        after_save: called with the model's folder after every checkpoint.
        on_stage_end: called with the stage and the model in eval mode. Called again on resume if the run was
            killed before it returned. Neither call can change the training: random state is put back after
            it.
        progress: show bars and tables.

    Returns:
        Model and encoder as trained, in eval mode, on the device; on the CPU where the last stage had
        ``bits``, since its float32 weights may be more than the device holds.

    Raises:
        RecipeError: the recipe does not fit its parts or its data, or the folder belongs to another recipe;
            after the first step of a stage, other tensors have moved than those that train.
        DataError: a row cannot be used and ``bad_rows`` is ``raise``; a loss is not finite.
        CheckpointError: a checkpoint cannot be read, or what its stage began with has changed.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    device = _device(recipe)
    start = checkpoint.latest(folder)
    _check_folder(recipe, folder, start)
    composed = _where(recipe, folder, start)
    checkpoint.realign(composed.model)
    if start is not None and progress:
        say(f"going on from {start.path}")
    first = 0 if start is None else start.progress.stage
    # Every stage is opened before the first one trains: a file that is missing is told now, not after hours.
    loaders = check(recipe, composed, first)

    _open_folder(recipe, folder, start)
    heads: dict[str, Any] | None = None if start is None else start.state["heads"]
    for index in range(first, len(recipe.stages)):
        begin = start if index == first else None
        if begin is None or begin.progress.step < recipe.stages[index].steps:
            work = _begin(recipe, index, folder, device, composed, begin, heads, loaders[index])
            _train(recipe, folder, composed, work, after_save, progress)
            heads = work.heads
        _finish(recipe, index, folder, device, composed, on_stage_end, progress)
    for part, where in recipe.parts.items():
        build.save_part(composed.model, part, Path(where), composed.encoder.tokenizer)
    return composed


def _where(recipe: Recipe, folder: Path, start: Checkpoint | None) -> Composed:
    """The model to go on with: as ``start`` holds it, but for the middle of a stage with adapters.

    There the checkpoint's model is merged, and merging rounds; what the stage began with does not.
    """
    if start is None:
        return build.build(recipe.model, recipe.seed)
    index = start.progress.stage
    if recipe.stages[index].lora is None or start.progress.step == recipe.stages[index].steps:
        return build.load(start.model)
    if index == 0:
        return build.build(recipe.model, recipe.seed)
    return build.load(folder / "stages" / recipe.stages[index - 1].name)


def check(recipe: Recipe, composed: Composed, first: int = 0) -> dict[int, Loader]:
    """Find what is wrong with the stages from ``first`` on before any of them trains; their loaders.

    Raises:
        RecipeError: the language model cannot be trained so, or a stage names what is not there.
        DataError: a file is missing or cannot be read.
    """
    check_language(recipe, composed)
    loaders = {}
    for index in range(first, len(recipe.stages)):
        stage = recipe.stages[index]
        with torch.random.fork_rng(devices=[]):
            heads = Objective(composed.model, stage.loss, stage.cell_classes).heads
        try:
            names = [] if stage.lora is None else adapters.targets(composed.model, stage.lora)
            if stage.bits is not None:
                require(stage.bits)
            trainable(composed.model, stage.train, stage.weight_decay, heads, stage.only, names)
            loaders[index] = stage_loader(recipe, index, composed)
        except RecipeError as error:
            place = f"stages.{stage.name}"
            raise error if place in str(error) else RecipeError(f"{place}: {error}") from error
    return loaders


def stage_loader(recipe: Recipe, index: int, composed: Composed) -> Loader:
    """The data of a stage, from its beginning; a batch is one micro-batch.

    Raises:
        RecipeError: an unknown source, option, format or template.
        DataError: a file is missing or cannot be read.
    """
    stage = recipe.stages[index]
    sources = [open_data(spec, f"stages.{stage.name}.data[{i}]") for i, spec in enumerate(stage.data)]
    tokenizer = composed.encoder.tokenizer
    return Loader(
        sources,
        composed.encoder.using(template=stage.template, train_on=stage.train_on),
        weights=[spec.weight for spec in stage.data],
        seq_len=stage.seq_len,
        batch_tokens=stage.micro_batch_tokens or stage.batch_tokens,
        patches=stage.patches,
        seed=recipe.stage_seed(index),
        bad_rows=stage.bad_rows,
        workers=stage.workers,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        image_token_id=int(composed.processor.image_token_id),  # type: ignore[arg-type]
    )


def open_data(spec: SourceSpec, place: str) -> Source:
    """The source that a recipe names; ``place`` is its key, for errors."""
    if spec.path is not None and spec.format is not None:
        return open_source(spec.path, spec.format, spec.images)
    make = find(str(spec.made), MADE, "made source")
    known = inspect.signature(make).parameters
    for option in spec.options:
        if option not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise RecipeError(
                f"{place}.options: unknown option '{option}' of '{spec.made}'"
                f"{nearest(option, known) or f'; known: {chr(44).join(known)}'}"
            )
    try:
        source: Source = make(**spec.options)
        return source
    except (TypeError, ValueError, DataError) as error:
        raise RecipeError(f"{place}.options: {error}") from error


@dataclass
class _Work:
    """A stage while it trains."""

    index: int
    stage: Stage
    objective: Objective
    optimizer: torch.optim.Optimizer
    batches: Loader
    begun: int
    """Steps that were done when this process took over."""
    seconds: float
    tokens: int
    carried: dict[str, Any] | None
    """Cell heads of earlier stages, for stages to come; this one's own go before them."""
    base: str | None
    """Fingerprint of the model that the stage began with; None without adapters."""

    @property
    def heads(self) -> dict[str, Any] | None:
        own = self.objective.heads
        return self.carried if own is None else own.state_dict()


def _begin(
    recipe: Recipe,
    index: int,
    folder: Path,
    device: torch.device,
    composed: Composed,
    begin: Checkpoint | None,
    heads: dict[str, Any] | None,
    batches: Loader,
) -> _Work:
    """Stage ``index`` before its first step, or where ``begin`` left it."""
    stage, model = recipe.stages[index], composed.model
    torch.manual_seed(recipe.stage_seed(index))
    set_recompute(model, stage.recompute)
    base = None if stage.lora is None else fingerprint(model)
    if begin is not None and begin.state["base"] != base:
        raise CheckpointError(
            f"{begin.path}: stage {stage.name} began with another model than {_base(recipe, index, folder)} "
            f"holds now, and its adapter fits that one only. Put it back, or train into another folder."
        )
    if stage.bits is not None:
        # Before the model moves: what is rounded may fit on a device that the whole does not.
        compute = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
        quantize(model.model.language_model, stage.bits, device, compute)
    model.to(device)  # type: ignore[arg-type]
    names: list[str] = []
    if stage.lora is not None:
        names = adapters.inject(model, stage.lora, _base(recipe, index, folder))
    objective = Objective(model, stage.loss, stage.cell_classes)
    _load_heads(objective, heads)
    groups = trainable(model, stage.train, stage.weight_decay, objective.heads, stage.only, names)
    optimizer = build_optimizer(groups, stage)
    at = checkpoint.Progress(stage=index)
    if begin is not None:
        at = begin.progress
        if begin.state["trained"] is not None:
            adapters.load_trained(model, begin.state["trained"])
        optimizer.load_state_dict(begin.state["optimizer"])
        batches.load_state_dict(begin.state["loader"])
        checkpoint.set_random_state(begin.state["random"])
    return _Work(index, stage, objective, optimizer, batches, at.step, at.seconds, at.tokens, heads, base)


def _base(recipe: Recipe, index: int, folder: Path) -> str | None:
    """The folder or name of the model that a stage begins with; None where parts are composed for it."""
    return recipe.model.path if index == 0 else str(folder / "stages" / recipe.stages[index - 1].name)


def _train(
    recipe: Recipe,
    folder: Path,
    composed: Composed,
    work: _Work,
    after_save: Callable[[Path], None] | None,
    shown: bool,
) -> None:
    """The steps of one stage."""
    stage, objective, optimizer, batches = work.stage, work.objective, work.optimizer, work.batches
    rows = who_trains(composed.model, stage, objective.heads)
    if shown:
        _announce(stage, rows, work.begun)
    watch = Watch(composed.model, objective.heads, optimizer)
    if not work.begun:
        _write_trains(folder, work, rows, "")
    metrics = Metrics(folder / "metrics.jsonl")
    before = [row for row in checkpoint.read_lines(folder / "skipped.jsonl") if row["stage"] != stage.name]
    mean: float | None = None
    try:
        with Progress(stage.name, stage.steps, start=work.begun, shown=shown) as bar:
            for done in range(work.begun + 1, stage.steps + 1):
                began = time.perf_counter()
                set_rates(optimizer, factor(stage, done - 1))
                taken = list(itertools.islice(batches, stage.micro_batches))
                report = step(objective, optimizer, taken, stage.clip, recipe.precision)
                spent = time.perf_counter() - began
                if not work.begun:
                    seen = _look(watch, stage, done, any(b.pixel_values is not None for b in taken))
                    if seen and done == 1:
                        _write_trains(folder, work, rows, seen)
                work.seconds, work.tokens = work.seconds + spent, work.tokens + report.num_tokens
                metrics.log(_line(stage, done, report, optimizer, spent, work.seconds))
                mean = report.loss if mean is None else 0.9 * mean + 0.1 * report.loss
                bar.advance(note=f"loss {mean:.3f}")
                if done == stage.steps or (recipe.save_every and done % recipe.save_every == 0):
                    if done == stage.steps:
                        _look(watch, stage, None)
                    _write_skipped(folder, stage, batches, before)
                    _save(folder, composed, work, done, metrics.flush(), after_save)
    finally:
        # Whatever ended the stage: rows that were left out are told, and no worker stays behind.
        _write_skipped(folder, stage, batches, before)
        batches.close()
        metrics.close()
    if shown:
        _conclude(work, folder)
        if not work.begun and watch.waiting:
            told = ", ".join(watch.waiting[:3]) + (", ..." if len(watch.waiting) > 3 else "")
            say(
                f"  {len(watch.waiting)} tensors that train have not moved yet, as nothing they do was asked "
                f"for so far (no pictures, or an adapter's first steps): {told}"
            )


def _look(watch: Watch, stage: Stage, done: int | None, pictures: bool = False) -> str:
    """Let ``watch`` look after a step, or (None) at the stage's end; what it says."""
    try:
        if done is not None:
            return watch.after(done, pictures)
        watch.end()
        return ""
    except RecipeError as error:
        raise RecipeError(f"stages.{stage.name}: {error}") from error


def _save(
    folder: Path,
    composed: Composed,
    work: _Work,
    done: int,
    metrics_bytes: int,
    after_save: Callable[[Path], None] | None,
) -> None:
    """Write a checkpoint and show its model to the caller."""
    now = checkpoint.Progress(
        stage=work.index, step=done, seconds=work.seconds, tokens=work.tokens, metrics_bytes=metrics_bytes
    )
    state: dict[str, Any] = {
        "optimizer": work.optimizer.state_dict(),
        "heads": work.heads,
        "loader": work.batches.state_dict(),
        "random": checkpoint.random_state(),
        "trained": None if work.base is None else adapters.trained_state(composed.model),
        "base": work.base,
    }
    path = checkpoint.save(folder, work.stage.name, now, composed, state)
    if after_save is not None:
        after_save(path / "model")
        checkpoint.set_random_state(state["random"])


def set_recompute(model: PreTrainedModel, wanted: bool) -> None:
    """Turn activation checkpointing on or off."""
    if wanted == any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return
    word = "enable" if wanted else "disable"
    # Its name changed with transformers 5.23.
    change = getattr(model, f"activation_checkpointing_{word}", None) or getattr(
        model, f"gradient_checkpointing_{word}"
    )
    change(*([{"use_reentrant": False}] if wanted else []))


def _finish(
    recipe: Recipe,
    index: int,
    folder: Path,
    device: torch.device,
    composed: Composed,
    on_stage_end: Callable[[Stage, Composed], None] | None,
    shown: bool,
) -> None:
    """Show the stage's model to the caller, then put it where it stays: a folder that says both were done."""
    stage = recipe.stages[index]
    with_adapter = adapters.merge(composed.model)
    if with_adapter is not None and shown:
        say(f"  adapter merged: layers differ by at most {with_adapter:.0e} of their largest output")
    if stage.bits is None:
        composed.model.to(device)  # type: ignore[arg-type]
    else:
        composed.model.to("cpu")  # type: ignore[arg-type]
    composed.model.train(False)
    last = index == len(recipe.stages) - 1
    place = folder / "model" if last else folder / "stages" / stage.name
    beside = folder / "adapter" if last else folder / "adapters" / stage.name
    if place.exists():
        return
    if on_stage_end is not None:
        state = checkpoint.random_state()
        on_stage_end(stage, composed)
        checkpoint.set_random_state(state)
    newest = checkpoint.latest(folder)
    assert newest is not None

    # The adapter first: a model in its place says that all is done.
    if newest.adapter.exists():
        checkpoint.copy_folder(newest.adapter, beside)
    checkpoint.copy_folder(newest.model, place)


def _device(recipe: Recipe) -> torch.device:
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device is 'cuda', but torch sees no GPU; take 'auto' or 'cpu'")
    wanted = recipe.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted, torch.cuda.current_device()) if wanted == "cuda" else torch.device(wanted)


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


def _check_folder(recipe: Recipe, folder: Path, start: Checkpoint | None) -> None:
    """See that a run folder is empty or belongs to this recipe."""
    kept = folder / "recipe.toml"
    if start is not None and kept.exists():
        changed = config.differences(_essence(config.load(kept, Recipe)), _essence(recipe))
        if changed:
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise RecipeError(
                f"{folder}: holds a run of another recipe: {changed[0]}{more}. "
                f"Restore the recipe to go on with that run, or give another folder."
            )
    elif start is None and (folder / "model").exists():
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


def _essence(recipe: Recipe) -> Recipe:
    """``recipe`` without what may change while it runs."""
    plain = Recipe.model_fields
    same = {key: plain[key].default for key in HARMLESS if key != "name"}
    stages = tuple(stage.model_copy(update={"workers": 0}) for stage in recipe.stages)
    return recipe.model_copy(update={**same, "name": "", "stages": stages})


def _load_heads(objective: Objective, weights: dict[str, Any] | None) -> None:
    """Go on with the heads of the stage before, where they ask the same questions."""
    if objective.heads is None or weights is None:
        return
    own = objective.heads.state_dict()
    if all(own[key].shape == weights[key].shape for key in own):
        objective.heads.load_state_dict(weights)


def _line(
    stage: Stage, number: int, report: StepReport, optimizer: Any, spent: float, seconds: float
) -> dict[str, Any]:
    """One line of ``metrics.jsonl``."""
    parts = {f"loss_{name}": value for name, value in report.losses.items()} if len(report.losses) > 1 else {}
    return {
        "stage": stage.name,
        "step": number,
        "loss": report.loss,
        **parts,
        "lr": max(group["lr"] for group in optimizer.param_groups),
        "grad_norm": report.grad_norm,
        "tokens": report.num_tokens,
        "targets": report.num_targets,
        "tokens_per_s": round(report.num_tokens / spent, 1),
        "seconds": round(seconds, 4),
    }


def _write_skipped(folder: Path, stage: Stage, batches: Loader, before: list[dict[str, Any]]) -> None:
    """Rows that were left out, by stage: ``bad`` ones, and ``long`` ones that no row can hold."""
    rows = [
        {"stage": stage.name, "why": why, "sample": row.sample_id, "reason": row.reason}
        for why, left_out in (("bad", batches.skipped), ("long", batches.dropped))
        for row in left_out
    ]
    if rows or before:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*before, *rows])
        checkpoint.write_text(folder / "skipped.jsonl", text)


def _announce(stage: Stage, rows: list[Row], done: int) -> None:
    resumed = f", {done:,} done" if done else ""
    say(f"stage {stage.name}: {stage.steps:,} steps of {stage.batch_tokens:,} tokens{resumed}")
    for line in lines(rows):
        say(f"  {line}")


def _write_trains(folder: Path, work: _Work, rows: list[Row], seen: str) -> None:
    """The table of a stage, what was seen of it, and every tensor that trains."""
    names = {id(p): name for name, p in work.objective.model.named_parameters()}
    if work.objective.heads is not None:
        names |= {id(p): f"heads.{name}" for name, p in work.objective.heads.named_parameters()}
    tensors = [
        f"{group['peak']:<8g} {group['weight_decay']:<8g} {'x'.join(map(str, p.shape)):<16} {names[id(p)]}"
        for group in work.optimizer.param_groups
        for p in group["params"]
    ]
    text = [
        f"stage {work.stage.name}",
        *lines(rows),
        *([seen] if seen else []),
        "",
        "rate     decay    shape",
    ]
    checkpoint.write_text(folder / "trains" / f"{work.stage.name}.txt", "\n".join([*text, *tensors, ""]))


def _conclude(work: _Work, folder: Path) -> None:
    batches = work.batches
    say(f"stage {work.stage.name}: {work.tokens:,} tokens in {clock(work.seconds)}")
    if batches.num_skipped or batches.num_dropped:
        say(
            f"  left out: {batches.num_skipped} bad rows, {batches.num_dropped} longer than a row; "
            f"listed in {folder / 'skipped.jsonl'}"
        )
