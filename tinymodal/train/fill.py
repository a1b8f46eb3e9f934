"""Fill the feature cache of a recipe's stages ahead of training: ``tinymodal cache RECIPE``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tinymodal.compose import build
from tinymodal.core.errors import RecipeError
from tinymodal.core.log import say
from tinymodal.data.seen import Warmed, warm
from tinymodal.train.groups import trainable
from tinymodal.train.lean import lean
from tinymodal.train.objective import Objective
from tinymodal.train.precision import Narrow
from tinymodal.train.stage_data import cache_folder, names_of, open_data
from tinymodal.train.work import feature_cache

if TYPE_CHECKING:
    from tinymodal.train.recipe import Recipe


def fill(recipe: Recipe, workers: int = 0, shown: bool = True) -> dict[str, Warmed]:
    """Run the towers over every picture and sound of the stages with ``cache``, but for those that are kept.

    May be started in several processes, on several machines; each takes what the others have not done.

    Args:
        recipe: as it will be trained.
        workers: processes that read and decode; 0: this one.
        shown: show how far it is.

    Returns:
        What was done for each stage, by its name.

    Raises:
        RecipeError: no stage has ``cache``, a tower of it trains in an earlier stage, or its media are more
            than the cache may hold.
        DataError: a file of a source is missing, or the cache cannot be written.
    """
    chosen = [index for index, stage in enumerate(recipe.stages) if stage.cache]
    if not chosen:
        raise RecipeError(f"{recipe.name}: no stage has 'cache'; add cache = true to one with a frozen tower")
    for index in chosen:
        _refuse_trained(recipe, index)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    composed = build.build(recipe.model, recipe.seed)
    device = "cuda" if recipe.device != "cpu" and torch.cuda.is_available() else "cpu"
    composed.model.to(device)  # type: ignore[arg-type]
    done = {}
    for index in chosen:
        stage = recipe.stages[index]
        if shown:
            say(f"stage {stage.name}: features in {cache_folder(recipe)}")
        objective = Objective(composed.model, stage.loss, stage.cell_classes)
        train = {group: rate for group, rate in stage.train.items() if group != "adapters"}
        trainable(composed.model, train, stage.weight_decay, objective.heads, stage.only)
        kept = feature_cache(recipe, index, composed)
        assert kept is not None
        sources = {
            name: open_data(spec, f"stages.{stage.name}.data[{i}]")
            for i, (name, spec) in enumerate(zip(names_of(recipe, index), stage.data, strict=True))
        }
        # As training runs it, so that features are the same to the last bit.
        with lean(objective):
            narrow = Narrow(composed.model, recipe.precision, spare=(composed.model.head_weight(),))
            try:
                done[stage.name] = warm(sources, kept, workers, shown)
            finally:
                narrow.restore()
    return done


def _refuse_trained(recipe: Recipe, index: int) -> None:
    """Refuse a stage whose towers are others by the time it begins."""
    for stage in recipe.stages[:index]:
        if any(
            stage.train.get(part) or (stage.lora is not None and part in stage.lora.parts)
            for part in ("vision", "audio")
        ):
            raise RecipeError(
                f"stages.{recipe.stages[index].name}.cache: the tower trains before it, in stage "
                f"{stage.name}, so its features cannot be had ahead; they are kept while the stage trains"
            )
