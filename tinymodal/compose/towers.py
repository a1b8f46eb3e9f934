"""Towers and connectors out of folders: their configs, how their pictures are prepared, and their weights.

A tower is filled whole or refused: a weight that is missing or has another shape is named. Of a larger model
the part that sees is read.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tinymodal.compose.pretrained import one_line, read_json, read_weights
from tinymodal.compose.whole import (
    Perceives,
    is_composed,
    model_folder,
    prepared_as,
    read_tower,
    tower_weights,
    without_prefix,
)
from tinymodal.core.errors import CheckpointError
from tinymodal.model.configuration_tinymodal import settled_connectors
from tinymodal.model.encoders import encoder_of, tower_config
from tinymodal.model.hf_audio import HFAudioTower
from tinymodal.model.hf_tower import HFTower
from tinymodal.model.modeling_tinymodal import load_exactly
from tinymodal.model.pair import PairConfig, PairTower
from tinymodal.model.timm_tower import TimmTower

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tinymodal.model.media import MediaEncoder


def read_tower_config(name: str, key: str) -> tuple[Path, PreTrainedConfig]:
    """The folder of a tower, and its config; of a whole CLIP, SigLIP or BLIP-2, that of the half that sees.

    Raises:
        CheckpointError: there is no such folder, or nobody knows such a tower.
    """
    folder, document = read_tower(name, key, "vision")
    with one_line(f"{key}: {folder}", CheckpointError):
        return folder, tower_config(document)


def read_pair_config(
    names: Sequence[str], key: str, normalise: Literal["own", "first"] = "own"
) -> tuple[tuple[Path, ...], PairConfig]:
    """The folders of two towers, and the config of both at once.

    Args:
        names: two folders or Hub names; pictures are prepared for the first.
        key: the recipe key that holds them.
        normalise: see :class:`~tinymodal.model.pair.PairConfig`.

    Raises:
        CheckpointError: as :func:`read_tower_config`, or there are not two.
    """
    if len(names) != 2:
        raise CheckpointError(f"{key}: {len(names)} towers, expected two for a pair")
    folders, configs = zip(
        *(read_tower_config(name, f"{key}[{i}]") for i, name in enumerate(names)), strict=True
    )
    with one_line(key, CheckpointError):
        means, stds = zip(*map(normalisation, folders, configs), strict=True)
        return folders, PairConfig(configs, normalise, means, stds)


def normalisation(
    folder: Path | None, config: PreTrainedConfig
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a tower's pictures: the family's, or what its folder says of itself.

    Raises:
        CheckpointError: the folder says something that is not three numbers.
    """
    how = encoder_of(config).preparation_of(config)
    if folder is not None and (own := prepared_as(folder, "vision")) is not None:
        return tuple(own["mean"]), tuple(own["std"])
    file = folder / "preprocessor_config.json" if folder is not None else None
    if file is None or not file.is_file():
        return how.mean, how.std
    said = read_json(file, str(folder))
    if not said.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    found = []
    for key, family in (("image_mean", how.mean), ("image_std", how.std)):
        value = said.get(key)
        numbers = isinstance(value, list) and all(isinstance(number, int | float) for number in value)
        if value is not None and not (numbers and len(value) == 3):
            raise CheckpointError(f"{file}: {key} is {value!r}, expected three numbers")
        found.append(family if value is None else tuple(value))
    return found[0], found[1]


def load_tower(
    tower: MediaEncoder, folder: Path | tuple[Path, ...], key: str, part: Perceives = "vision"
) -> None:
    """Fill a tower with the weights of a checkpoint. What the tower does not have is left where it is.

    Args:
        tower: changed in place.
        folder: as :func:`read_tower_config` gave it; of a pair both, as :func:`read_pair_config` did.
        key: the recipe key that named it.
        part: which tower of a composed model.

    Raises:
        CheckpointError: a weight of the tower is missing or has another shape.
    """
    if not isinstance(folder, Path):
        assert isinstance(tower, PairTower)
        for i, each in enumerate((tower.first, tower.second)):
            load_tower(each, folder[i], f"{key}[{i}]")
        return
    where = f"{key}: {folder}"
    with one_line(where, CheckpointError):
        if is_composed(read_json(folder / "config.json", where)):
            _fill_from(tower, tower_weights(folder, where, part), where)
        elif isinstance(tower, HFTower | HFAudioTower):
            _fill(tower, _hf_weights(tower, folder, where), where)
        else:
            weights = read_weights(folder, where)
            _fill(tower, _timm_weights(tower, weights) if isinstance(tower, TimmTower) else weights, where)


def _fill_from(tower: MediaEncoder, weights: Mapping[str, Tensor], where: str) -> None:
    """Fill a tower with what a composed model holds of it, by the names that it has there."""
    if isinstance(tower, PairTower):
        for name in ("first", "second"):
            _fill_from(getattr(tower, name), without_prefix(weights, f"{name}."), where)
    elif isinstance(tower, HFTower | HFAudioTower):
        # transformers also writes what is inside of another model by the names of its published checkpoints.
        found = without_prefix(weights, "backbone.")
        _fill(tower, _hf_weights(tower, None, where, found), where)
    else:
        _fill(tower, without_prefix(weights, "backbone.") if tower.module is not tower else weights, where)


def _fill(tower: MediaEncoder, weights: Mapping[str, Tensor], where: str) -> None:
    """Fill a tower with the weights of its names, all of them."""
    # A learned mean of layers is the model's, not the checkpoint's.
    wanted = {name: w for name, w in tower.module.state_dict().items() if name != "layer_weights"}
    found = {name: weights[name] for name in wanted if name in weights}
    shapes = [name for name in found if found[name].shape != wanted[name].shape]
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} weights are not in the checkpoint and would be random, first "
            f"{missing[0]}; the folder is incomplete or holds another model"
        )
    if shapes:
        raise _other_shapes(where, {n: (found[n].shape, wanted[n].shape) for n in shapes})
    if isinstance(mean := getattr(tower.module, "layer_weights", None), Tensor):
        found["layer_weights"] = mean.detach()
    load_exactly(tower.module, found)


def _hf_weights(
    tower: HFTower | HFAudioTower,
    folder: Path | None,
    where: str,
    weights_there: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """What a folder, or ``weights_there``, holds for a tower of transformers, by the tower's names."""
    # transformers' own reader: it knows the names that older versions and whole CLIP models use.
    family: Any = type(tower.backbone)
    whole, info = family.from_pretrained(
        folder,
        config=copy.deepcopy(tower.config),
        state_dict=None if weights_there is None else dict(weights_there),
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    weights: dict[str, Tensor] = whole.state_dict()
    wanted = set(tower.backbone.state_dict())
    misshapen = {name: shapes for name, *shapes in info["mismatched_keys"] if name in wanted}
    if misshapen:
        raise _other_shapes(where, misshapen)
    # What is missing it has filled with random numbers.
    held = {name: weights[name] for name in weights if name not in info["missing_keys"]}
    # A larger model keeps its tower under a name of its own, such as vision_model. Not if only some are
    # missing: the text half of a CLIP has weights of the same names.
    if folder is not None and not wanted & set(held):
        held |= _inside(read_weights(folder, where), wanted)
    return held


def _other_shapes(where: str, shapes: Mapping[str, Sequence[Sequence[int]]]) -> CheckpointError:
    """The error for weights of another shape: by name the one found, the one expected."""
    first = min(shapes)
    found, expected = (tuple(shape) for shape in shapes[first])
    return CheckpointError(
        f"{where}: {len(shapes)} weights have another shape than config.json says, first {first}: {found} "
        f"for {expected}"
    )


def _inside(weights: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Those of ``weights`` that are called as ``wanted`` behind one common prefix, if there is one."""
    name = min(wanted)
    prefixes = {full[: -len(name)] for full in weights if full.endswith(name)}
    fitting = [prefix for prefix in prefixes if all(prefix + each in weights for each in wanted)]
    return {each: weights[fitting[0] + each] for each in wanted} if len(fitting) == 1 else {}


def _timm_weights(tower: TimmTower, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a folder holds for a tower of timm, by the tower's names."""
    found = {name.removeprefix("timm_model."): tensor for name, tensor in weights.items()}
    wanted = tower.backbone.state_dict()
    if all(name in found and found[name].shape == wanted[name].shape for name in wanted):
        return found
    # Older layouts, and learned positions of another size: timm translates them when it reads a checkpoint.
    translate = getattr(sys.modules[type(tower.backbone).__module__], "checkpoint_filter_fn", None)
    return found if translate is None else dict(translate(found, tower.backbone))


def load_connector(model: Any, name: str, key: str, kind: str = "image") -> None:
    """Let connector and marks begin with those of another composed model.

    What the other one lacks stays new, as the second projection of TinyGPT-V does over MiniGPT-4's Q-Former.

    Args:
        model: a composed one; changed in place.
        name: folder or Hub name of the other one, or the folder of its run.
        key: the recipe key that holds it, for the error.
        kind: of media; of sounds a learned mean of the tower's layers goes with it.

    Raises:
        CheckpointError: it is no composed model, has no connector, or one with a weight that ours does not
            have, or has in another shape.
    """
    folder = model_folder(name, key)
    where = f"{key}: {folder}"
    config = read_json(folder / "config.json", where)
    if not is_composed(config):
        raise CheckpointError(
            f"{where}: holds a model of type {config.get('model_type')!r}, not a composed one with a "
            f"connector"
        )
    _refuse_other_connector(config, model.config, where, kind)
    with one_line(where, CheckpointError):
        weights = read_weights(folder, where)
    own = model.state_dict()
    begins = (f"model.connectors.{kind}.", f"model.marks.{kind}.")
    found = {n: w for n, w in weights.items() if n.startswith(begins)}
    if (mean := f"model.towers.{kind}.layer_weights") in weights and mean in own:
        found[mean] = weights[mean]
    if not found:
        raise CheckpointError(f"{where}: has no connector")
    for weight, tensor in found.items():
        if weight not in own:
            raise CheckpointError(f"{where}: {weight} is not in this model's connector; name the same one")
        if own[weight].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {weight} is {tuple(tensor.shape)}, expected {tuple(own[weight].shape)}; name a "
                f"model with the same connector, options, tower and width"
            )
        own[weight].copy_(tensor)


def _refuse_other_connector(theirs: Mapping[str, Any], ours: Any, where: str, kind: str) -> None:
    """Refuse weights that would mean something else here, which shapes do not tell."""
    given = theirs.get("connectors") or {}
    if kind not in given:
        raise CheckpointError(f"{where}: has no connector")
    said = settled_connectors({kind: given[kind]}, kind == "image", kind == "audio")[kind]
    here = ours.connectors[kind]
    for name in sorted(set(said["options"]) & set(here["options"])):
        # A projection more or less shows in the weights; how many there are of it may differ.
        if name not in ("middle", "depth") and said["options"][name] != here["options"][name]:
            raise CheckpointError(
                f"{where}: its connector has {name} = {said['options'][name]!r}, here it is "
                f"{here['options'][name]!r}; make them equal"
            )
    if said.get("marks") and said["marks"] != here["marks"]:
        raise CheckpointError(
            f"{where}: its marks are {said['marks']}, here they are {here['marks']}; make them equal"
        )
