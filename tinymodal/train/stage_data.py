"""What a stage reads: its sources, the loader over them, and the samples that are held out."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tinymodal.compose.mouth import speaking_of
from tinymodal.core.errors import DataError, RecipeError
from tinymodal.core.lookup import find, nearest
from tinymodal.core.types import Encoded, Sample
from tinymodal.data.augment import Augment
from tinymodal.data.codes import CodeBook
from tinymodal.data.hub import open_hub
from tinymodal.data.loader import Loader
from tinymodal.data.pack import Row
from tinymodal.data.sounds import MADE
from tinymodal.data.sources import Source, open_source
from tinymodal.train.held_out import HeldOut
from tinymodal.train.meter import source_names
from tinymodal.train.recipe import Recipe
from tinymodal.train.recipe import Source as SourceSpec
from tinymodal.train.world import ALONE, World

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed
    from tinymodal.model.layout import Prepared

FEATURES = Path("~/.cache/tinymodal/features")
CODES = "codes"
"""Folder beside the features where codes of spoken answers are kept."""

Read = Callable[[Sample], Encoded]
Complete = Callable[[list[Row]], list[Row]]


def open_data(spec: SourceSpec, place: str, seed: int = 0) -> Source:
    """The source that a recipe names.

    Args:
        spec: as the recipe has it.
        place: its key, for errors.
        seed: of the order of a stream; of any other source the mixture decides it.

    Raises:
        RecipeError: an unknown format, generator or option.
        DataError: a file is missing or cannot be read.
    """
    if spec.path is not None and spec.format is not None:
        return open_source(spec.path, spec.format, spec.images, spec.sounds)
    if spec.hub is not None and spec.format is not None:
        return open_hub(
            spec.hub,
            spec.split,
            spec.format,
            spec.images,
            spec.sounds,
            config=spec.subset,
            revision=spec.revision,
            seed=seed,
        )
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


def encoder_of(
    recipe: Recipe,
    index: int,
    composed: Composed,
    prepare: Callable[..., Prepared] | None = None,
    prepare_sound: Callable[..., Prepared] | None = None,
) -> Read:
    """What turns a sample of a stage into tokens, labels, media, and the sounds of answers that are learned.

    ``prepare`` and ``prepare_sound`` read the media.
    """
    stage = recipe.stages[index]
    return composed.encoder.using(
        template=stage.template,
        train_on=stage.train_on,
        prepare=prepare,
        prepare_sound=prepare_sound,
        speech=speaking_of(composed.model, composed.codec) if "speech" in stage.loss else None,
    )


def codes_of(
    recipe: Recipe, index: int, composed: Composed, device: torch.device | None = None
) -> CodeBook | None:
    """What makes codes of the answers that a stage learns to speak; None where it learns none.

    Args:
        recipe: the run.
        index: number of the stage.
        composed: model and codec.
        device: where the codec runs; None: where it lies.

    Raises:
        RecipeError: the model has no codec.
    """
    stage, codec = recipe.stages[index], composed.codec
    if "speech" not in stage.loss:
        return None
    if codec is None:
        raise RecipeError(
            f"stages.{stage.name}.loss has 'speech', but the model has no codec to make codes of sounds; add "
            f"[model.speech] with a codec"
        )
    if device is not None and device.type != "cpu":
        codec = copy.deepcopy(codec).to(device)
    return CodeBook(cache_folder(recipe) / CODES, codec)


def cache_folder(recipe: Recipe) -> Path:
    """Where features and codes are kept."""
    return (FEATURES if recipe.cache_folder is None else Path(recipe.cache_folder)).expanduser()


def completed(*each: Complete | None) -> Complete | None:
    """One after the other, before rows are laid in a batch; None where there is nothing to do."""
    steps = [step for step in each if step is not None]
    if not steps:
        return None

    def complete(rows: list[Row]) -> list[Row]:
        for step in steps:
            rows = step(rows)
        return rows

    return complete


def names_of(recipe: Recipe, index: int) -> tuple[str, ...]:
    """What the sources of a stage are called in the metrics."""
    return source_names([spec.label for spec in recipe.stages[index].data])


def stage_loader(
    recipe: Recipe,
    index: int,
    composed: Composed,
    world: World = ALONE,
    micro_tokens: int | None = None,
    encoder: Read | None = None,
    complete: Complete | None = None,
) -> Loader:
    """The data of a stage, from its beginning; a batch is one micro-batch.

    Args:
        recipe: the run.
        index: number of the stage.
        composed: model and encoder.
        world: who reads; each rank takes its share of the draws.
        micro_tokens: positions of a micro-batch; None: as the recipe says.
        encoder: in place of the model's own, e.g. one that knows the feature cache.
        complete: see ``Loader``; None: only codes are made of what is spoken.

    Raises:
        RecipeError: an unknown source, option, format or template.
        DataError: a file is missing or cannot be read.
    """
    stage = recipe.stages[index]
    seed = recipe.stage_seed(index)
    sources = [open_data(spec, f"stages.{stage.name}.data[{i}]", seed) for i, spec in enumerate(stage.data)]
    return Loader(
        sources,
        encoder or encoder_of(recipe, index, composed),
        weights=[spec.weight for spec in stage.data],
        seq_len=stage.seq_len,
        batch_tokens=micro_tokens or stage.split(world.size)[0],
        patches=stage.patches,
        frames=stage.frames,
        seed=recipe.stage_seed(index),
        bad_rows=stage.bad_rows,
        workers=stage.workers,
        pad_id=_pad_id(composed),
        image_token_id=int(composed.processor.image_token_id),  # type: ignore[arg-type]
        audio_token_id=composed.processor.audio_token_id,
        complete=complete or _codes_only(recipe, index, composed),
        changes=[
            None if spec.augment is None else Augment.of(spec.augment.model_dump()) for spec in stage.data
        ],
        batching=stage.batching,
        ends=stage.ends,
        epochs=[spec.epochs for spec in stage.data],
        rank=world.rank,
        world=world.size,
    )


def held_out(
    recipe: Recipe, index: int, composed: Composed, world: World = ALONE, micro_tokens: int | None = None
) -> HeldOut | None:
    """The samples whose loss a stage measures and never trains on; None where it names none.

    Raises:
        RecipeError: an unknown source, option, format or template.
        DataError: a file is missing or cannot be read.
    """
    stage = recipe.stages[index]
    if not stage.held_out:
        return None
    place = f"stages.{stage.name}.held_out"
    # Sharded, the passes themselves are shared work: each rank measures all.
    whole = recipe.parallel.kind != "ddp"
    return HeldOut(
        [open_data(spec, f"{place}[{i}]") for i, spec in enumerate(stage.held_out)],
        encoder_of(recipe, index, composed),
        source_names([spec.label for spec in stage.held_out]),
        weights=[spec.weight for spec in stage.held_out],
        samples=stage.held_out_samples,
        seq_len=stage.seq_len,
        batch_tokens=micro_tokens or stage.split(world.size)[0],
        patches=stage.patches,
        frames=stage.frames,
        complete=_codes_only(recipe, index, composed),
        seed=recipe.stage_seed(index),
        skip_bad=stage.bad_rows != "raise",
        pad_id=_pad_id(composed),
        image_token_id=int(composed.processor.image_token_id),  # type: ignore[arg-type]
        audio_token_id=composed.processor.audio_token_id,
        precision=recipe.precision,
        rank=0 if whole else world.rank,
        world=1 if whole else world.size,
    )


def _codes_only(recipe: Recipe, index: int, composed: Composed) -> Complete | None:
    book = codes_of(recipe, index, composed)
    return None if book is None else book.complete


def _pad_id(composed: Composed) -> int:
    pad_id = composed.encoder.tokenizer.pad_token_id
    return int(pad_id) if pad_id is not None else 0
