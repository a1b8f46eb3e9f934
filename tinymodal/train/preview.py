"""What a recipe will do, before it does it: who trains, what a picture costs, what one row says.

The row is the first that training will see, as the language model reads it: every character of every
document, and which of them train. Looking at it once finds what no number shows: a template that does not
fit, a prompt that trains, an answer that does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tinymodal.chat.encode import seen_by_tower
from tinymodal.compose import build
from tinymodal.core.errors import DataError
from tinymodal.core.types import IGNORE, Batch, Sample
from tinymodal.model.encoders import encoder_of
from tinymodal.model.geometry import num_tokens
from tinymodal.train.groups import lines, who_trains
from tinymodal.train.loop import check, open_data, stage_loader
from tinymodal.train.objective import Objective
from tinymodal.train.recipe import Recipe, Stage

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from tinymodal.chat.encode import Piece
    from tinymodal.compose.build import Composed

MARKS = ("«", "»")
"""Around what trains, where there are no colours."""
TRAINED = "bold green"
MANY_SIZES = ("anyres", "slices", "tiles", "native")
"""Ways to prepare a picture in which its own size decides how many tokens it takes."""
TYPICAL_PX = ((480, 640), (1080, 1920), (2200, 1700))
"""Height and width of a small photograph, a screen, and a scanned page."""
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
    for index, stage in enumerate(recipe.stages):
        out.print()
        _print_stage(recipe, index, composed, out)
        loader = stage_loader(_one_row(recipe, index), index, composed)
        batch = next(loader)
        _print_memory(memory(recipe, index, composed, batch), out)
        _print_row(stage, composed, _samples(stage, loader, batch), batch, out)


class Memory(NamedTuple):
    """Bytes that a step holds, roughly."""

    weights: int
    training: int
    """Gradients and the optimizer's two moments, of what trains."""
    activations: int


def memory(recipe: Recipe, index: int, composed: Composed, row: Batch) -> Memory:
    """A rough estimate for one stage.

    Activations are counted as 10 widths and 4 hidden widths of the MLP for each token and layer, as measured
    on llama and siglip with sdpa; with ``recompute``, one width for each and one layer whole. The allocator,
    the data and the fragments between them come on top.

    Args:
        recipe: the run.
        index: number of the stage.
        composed: its model.
        row: one row of the stage; its number of pictures is taken as typical.
    """
    stage = recipe.stages[index]
    heads = Objective(composed.model, stage.loss, stage.cell_classes).heads
    rows = who_trains(composed.model, stage, heads)
    # Norms are counted as rounded too; they are a thousandth.
    sizes = {"language": stage.bits / 8} if stage.bits is not None else {}
    weights = round(sum(row.parameters * sizes.get(row.group, 4) for row in rows))
    trained = sum(row.trained for row in rows) * 4
    tokens = stage.micro_batch_tokens or stage.batch_tokens
    config = composed.model.config
    size = 2 if recipe.precision == "bfloat16" else 4
    activations = 0
    if "text" in stage.loss:
        activations += _activations(config.text_config, tokens, stage.recompute)
    sees = stage.train.get("vision") or (stage.lora is not None and "vision" in stage.lora.parts)
    if sees and row.pixel_values is not None:
        patches = _patches(composed, row.pixel_values) * (tokens // stage.seq_len)
        activations += _activations(config.vision_config, patches, stage.recompute)
    return Memory(weights, 3 * trained, activations * size)


def _patches(composed: Composed, pixel_values: Tensor | tuple[Tensor, ...]) -> int:
    """Positions that the tower computes for some tiles."""
    config = composed.model.config.vision_config
    same_size = pixel_values if isinstance(pixel_values, tuple) else (pixel_values,)
    return sum(
        len(tiles) * num_tokens(encoder_of(config).grid(config, (tiles.shape[2], tiles.shape[3])))
        for tiles in same_size
    )


def _activations(config: Any, positions: int, recompute: bool) -> int:
    width, layers = int(config.hidden_size), int(config.num_hidden_layers)
    one_layer = 10 * width + 4 * int(getattr(config, "intermediate_size", None) or 4 * width)
    per_position = layers * width + one_layer if recompute else layers * one_layer
    return positions * per_position


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


def _print_memory(found: Memory, out: Console) -> None:
    mb = [f"{part / 1e6:,.{0 if part >= 1e7 else 1}f} MB" for part in (sum(found), *found)]
    out.print(
        f"  memory, roughly: {mb[0]} = {mb[1]} weights + {mb[2]} optimizer + {mb[3]} activations",
        markup=False,
    )


def _print_stage(recipe: Recipe, index: int, composed: Composed, out: Console) -> None:
    stage = recipe.stages[index]
    template = stage.template or composed.encoder.template.name
    out.print(
        f"[bold]stage {stage.name}[/]: {stage.steps:,} steps of {stage.batch_tokens:,} tokens "
        f"({stage.steps * stage.batch_tokens:,} in all), rows of {stage.seq_len:,}, template {template}, "
        f"schedule {stage.schedule}",
        soft_wrap=True,
    )
    heads = Objective(composed.model, stage.loss, stage.cell_classes).heads
    for line in lines(who_trains(composed.model, stage, heads)):
        out.print(f"  {line}", markup=False)


def _one_row(recipe: Recipe, index: int) -> Recipe:
    """``recipe`` with batches of one row, read in this process."""
    stage = recipe.stages[index]
    single = {"batch_tokens": stage.seq_len, "micro_batch_tokens": None, "workers": 0}
    stages = list(recipe.stages)
    stages[index] = stage.model_copy(update=single)
    return recipe.model_copy(update={"stages": tuple(stages)})


def _samples(stage: Stage, loader: Any, batch: Batch) -> list[Sample]:
    """The samples of a batch, in its order: drawn again, since a batch holds only their ids."""
    sources = [open_data(spec, f"stages.{stage.name}.data[{i}]") for i, spec in enumerate(stage.data)]
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
        f"{trained:,} train ({'green' if out.color_system else 'between « and »'})",
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


def _runs(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours that train alike, joined."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].trains == piece.trains:
            joined[-1] = joined[-1]._replace(text=joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return joined
