"""What a recipe will do, before it does it: who trains, what pictures and sounds cost, what one row says.

The row is the first that training will see, as the language model reads it: every character of every
document, and which of them train. Looking at it once finds what no number shows: a template that does not
fit, a prompt that trains, an answer that does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tinymodal.chat.encode import seen_by_tower
from tinymodal.compose import build, targets
from tinymodal.core.errors import DataError
from tinymodal.core.types import IGNORE, Batch, Sample
from tinymodal.train import adapters
from tinymodal.train.groups import lines, trainable, who_trains
from tinymodal.train.loop import check
from tinymodal.train.memory import Memory, estimate, free_bytes
from tinymodal.train.objective import Objective
from tinymodal.train.recipe import Recipe, Stage
from tinymodal.train.recompute import set_recompute
from tinymodal.train.stage_data import stage_loader

if TYPE_CHECKING:
    from rich.console import Console

    from tinymodal.chat.encode import Piece
    from tinymodal.compose.build import Composed

MARKS = ("«", "»")
"""Around what trains, where there are no colours."""
TRAINED = "bold green"
MANY_SIZES = ("anyres", "slices", "tiles", "native")
"""Ways to prepare a picture in which its own size decides how many tokens it takes."""
TYPICAL_PX = ((480, 640), (1080, 1920), (2200, 1700))
"""Height and width of a small photograph, a screen, and a scanned page."""
TYPICAL_S = (2.0, 10.0)
"""Seconds of a question and of a few sentences."""
TYPICAL_ROWS = 4
"""From which the memory of a step is told: pictures lie unevenly in rows."""
SHOWN_CHARACTERS = 6_000
"""Of one row; the rest is left out and counted."""


def preview(recipe: Recipe, out: Console | None = None) -> None:
    """Print what ``recipe`` will do. Builds the model and reads one row of each stage; trains nothing.

    Args:
        recipe: the parts and the stages.
        out: where to; None: stdout.

    Raises:
        TinyModalError: what training would raise before its first step.
    """
    from rich.console import Console

    out = out or Console(highlight=False, soft_wrap=True)
    composed = build.build(recipe.model, recipe.seed)
    check(recipe, composed)
    _print_parts(composed, out)
    out.print("\nwhere it will run, with tinymodal export --to:", markup=False)
    for line in targets.lines(targets.verdicts(composed)):
        out.print(line, markup=False)
    for index, stage in enumerate(recipe.stages):
        out.print()
        _print_stage(recipe, index, composed, out)
        loader = stage_loader(_few_rows(recipe, index, 1), index, composed)
        batch = next(loader)
        rows = next(stage_loader(_few_rows(recipe, index, TYPICAL_ROWS), index, composed))
        _print_memory(memory(recipe, index, composed, rows), out)
        _print_row(stage, composed, _samples(loader, batch), batch, out)


def memory(recipe: Recipe, index: int, composed: Composed, rows: Batch) -> Memory:
    """What a step of a stage holds on its device, in one process.

    Args:
        recipe: the run.
        index: number of the stage.
        composed: its model; adapters stand in it for the moment.
        rows: some of the stage; its micro-batches are taken to be made of rows like these.
    """
    stage = recipe.stages[index]
    names = [] if stage.lora is None else adapters.inject(composed.model, stage.lora, None)
    try:
        set_recompute(composed.model, stage.recompute)
        with torch.random.fork_rng(devices=[]):
            objective = Objective(composed.model, stage.loss, stage.cell_classes)
        groups = trainable(
            composed.model, stage.train, stage.weight_decay, objective.heads, stage.only, names
        )
        num_rows = stage.batch_tokens // stage.micro_batches // stage.seq_len
        return estimate(objective, groups, stage, recipe.precision, rows, num_rows, stage.micro_batches)
    finally:
        adapters.merge(composed.model)


def _print_parts(composed: Composed, out: Console) -> None:
    from rich.table import Table

    parts = Table("part", "parameters", "MB", box=None, pad_edge=False)
    for column in parts.columns[1:]:
        column.justify = "right"
    rows = build.parameter_report(composed.model)
    for row in rows:
        parts.add_row(row.part, f"{row.parameters:,}", f"{row.bytes / 1e6:,.1f}")
    parts.add_row("all", f"{sum(r.parameters for r in rows):,}", f"{sum(r.bytes for r in rows) / 1e6:,.1f}")
    out.print(parts)
    if composed.model.config.vision_config is not None:
        eye = composed.processor.image_processor
        sizes = [eye.preparation.size_px]
        if eye.preparation.resize in MANY_SIZES:
            sizes += TYPICAL_PX
        for height, width in sizes:
            found = eye.layout((height, width))
            grid = "x".join(map(str, found.grid)) if len(found.grid) > 1 else ""
            seen = seen_by_tower(found.feature_grids)
            counted = f"{grid} = {found.tokens:,}" if grid else f"{found.tokens:,}"
            out.print(f"a picture of {height}x{width} px: {seen} -> {counted} tokens", markup=False)
    ear = composed.processor.feature_extractor
    if ear is not None:
        hz, window_s = ear.hearing.rate_hz, ear.hearing.window / ear.hearing.rate_hz
        out.print(
            f"a sound: {ear.tokens_per_s:.4g} tokens a second of {ear.typical().patches / window_s:.4g} "
            f"positions, heard in windows of at most {window_s:g} s",
            markup=False,
        )
        for seconds in TYPICAL_S:
            found = ear.layout(round(seconds * hz))
            several = f" in {len(found.tile_tokens)} windows" if len(found.tile_tokens) > 1 else ""
            out.print(
                f"a sound of {seconds:g} s: {found.patches:,} positions{several} -> {found.tokens:,} tokens",
                markup=False,
            )
    if composed.codec is not None and composed.model.speech_head is not None:
        codec, head = composed.codec, composed.model.speech_head
        out.print(
            f"an answer aloud: {codec.frames_per_s:g} frames a second of {head.books} codes of "
            f"{head.book_size:,}, at {codec.rate_hz:,} Hz",
            markup=False,
        )


def _print_memory(found: Memory, out: Console) -> None:
    mb = [f"{part / 1e6:,.{0 if part >= 1e7 else 1}f} MB" for part in (found.total, *found)]
    out.print(
        f"  memory: {mb[0]} = {mb[1]} weights + {mb[2]} optimizer + {mb[3]} for the pass",
        markup=False,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = free_bytes(device)
    if found.total > free:
        where = "the GPU has" if device.type == "cuda" else "this machine has"
        out.print(
            f"  this does not fit: {where} {free / 1e6:,.0f} MB free. Less is held with a smaller "
            f"micro_batch_tokens, recompute = 'full', optimizer = 'adamw8bit', lora or bits",
            style="bold red",
            markup=False,
        )


def _print_stage(recipe: Recipe, index: int, composed: Composed, out: Console) -> None:
    stage = recipe.stages[index]
    template = stage.template or composed.encoder.template.name
    in_all = f" ({stage.steps * stage.batch_tokens:,} in all)" if stage.steps else ""
    steps = f"{stage.steps:,} steps" if stage.steps else "to the end of its data, steps"
    out.print(
        f"[bold]stage {stage.name}[/]: {steps} of {stage.batch_tokens:,} tokens{in_all}, "
        f"rows of {stage.seq_len:,}, template {template}, schedule {stage.schedule}",
        soft_wrap=True,
    )
    heads = Objective(composed.model, stage.loss, stage.cell_classes).heads
    for line in lines(who_trains(composed.model, stage, heads)):
        out.print(f"  {line}", markup=False)


def _few_rows(recipe: Recipe, index: int, rows: int) -> Recipe:
    """``recipe`` with batches of so many rows, no more than a micro-batch has, read in this process."""
    stage = recipe.stages[index]
    tokens = min(rows * stage.seq_len, stage.batch_tokens // stage.micro_batches)
    single = {"batch_tokens": tokens, "micro_batch_tokens": None, "workers": 0, "cache": False}
    stages = list(recipe.stages)
    stages[index] = stage.model_copy(update=single)
    return recipe.model_copy(update={"stages": tuple(stages)})


def _samples(loader: Any, batch: Batch) -> list[Sample]:
    """The samples of a batch, in its order: drawn again, since a batch holds only their ids."""
    sources = loader.encode.sources
    found: dict[str, Sample] = {}
    for draw in range(loader.draws):
        where = loader.mixture(draw)
        try:
            sample = sources[where.source].sample(where.row)
        except DataError:
            continue  # skipped in training as well, or it would not have come this far
        found.setdefault(sample.id, sample)
    return [found[name] for name in batch.sample_ids]


def _print_row(stage: Stage, composed: Composed, row: Sequence[Sample], batch: Batch, out: Console) -> None:
    from rich.text import Text

    encoder = composed.encoder.using(template=stage.template, train_on=stage.train_on)
    documents = [encoder.explain(sample) for sample in row]
    trained = int((batch.labels != IGNORE).sum())
    out.print(
        f"  first row: {len(row)} documents, {batch.num_tokens:,} of {stage.seq_len:,} positions, "
        f"{trained:,} train{_spoken(batch)} ({'green' if out.color_system else 'between « and »'})",
        markup=False,
    )
    left = SHOWN_CHARACTERS
    for sample, pieces in zip(row, documents, strict=True):
        if left <= 0:
            break
        text = Text()
        text.append(f"  {sample.id}: ", style="dim")
        for piece in _runs(pieces):
            shown = piece.text[:left]
            left -= len(shown)
            if not piece.trains:
                text.append(shown)
            elif out.color_system:
                text.append(shown, style=TRAINED)
            else:
                text.append(f"{MARKS[0]}{shown}{MARKS[1]}")
        out.print(text, soft_wrap=True)
    rest = sum(len(piece.text) for pieces in documents for piece in pieces) - SHOWN_CHARACTERS
    if rest > 0:
        out.print(f"  ... and {rest:,} characters more", markup=False)


def _spoken(batch: Batch) -> str:
    """What is spoken of a row, in words."""
    if not batch.speech_frames:
        return ""
    return f", {len(batch.speech_frames)} spoken in {sum(batch.speech_frames):,} frames"


def _runs(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours that train alike, joined."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].trains == piece.trains:
            joined[-1] = joined[-1]._replace(text=joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return joined
