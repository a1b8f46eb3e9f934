"""LoRA, DoRA and rank-stabilised LoRA: small matrices that train in place of large ones.

Beside a frozen matrix W [out, in] stand A [rank, in] and B [out, rank]; the layer computes with
``W + s B A``, ``s = alpha / rank`` (LoRA, arXiv:2106.09685) or ``alpha / sqrt(rank)`` (rsLoRA,
arXiv:2312.03732). DoRA (arXiv:2402.09353) gives every row of that sum a learned length. B begins as zeros, so
the first step starts from the model as it was.

peft makes the layers. An adapter lives for one stage: its stage ends by merging it, so the next one, with or
without an adapter, starts from a plain model, and nothing is ever nested. The stage keeps it as well, as a
folder that ``peft.PeftModel.from_pretrained`` puts onto the model that the stage began with.
"""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tinymodal.compose.quantize import dequantize, is_quantized
from tinymodal.core.errors import CheckpointError, RecipeError
from tinymodal.core.lookup import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tinymodal.train.recipe import Lora

NAME = "default"
"""Of the one adapter that a model has."""
PLACES = {
    "vision": "model.towers.image",
    "audio": "model.towers.audio",
    "connectors": "model.connectors",
    "language": "model.language_model",
}
"""Part -> the name that its modules begin with. Language head and speech head lie in none of them."""
AGREES, AGREES_ROUNDED = 1e-4, 5e-2
"""Largest difference of a merged layer, relative to its largest output; the second where products are made in
bfloat16 or int8."""


def targets(model: nn.Module, lora: Lora) -> list[str]:
    """Names of the layers that get an adapter: linear ones in the parts that ``lora`` names, nowhere else.

    Raises:
        RecipeError: peft is missing, a part has no linear layer, a target matches nothing, or the model has
            an adapter already.
    """
    if find_spec("peft") is None:
        raise RecipeError("lora needs peft, which is not installed; pip install 'tinymodal[train]'")
    if adapted(model):
        raise RecipeError("lora: this model has an adapter already; merge it first, adapters are not nested")
    found = []
    for part in lora.parts:
        own = [name for name in _linear_names(model) if name.startswith(f"{PLACES[part]}.")]
        if not own:
            raise RecipeError(f"lora.parts: {part} has no linear layer in this model; take it out")
        found += own
    if lora.targets == "linear":
        return found
    for target in lora.targets:
        if not any(_is_called(name, target) for name in found):
            known = sorted({name.rpartition(".")[2] for name in found} - {str(n) for n in range(100)})
            raise RecipeError(
                f"lora.targets: no linear layer of {' or '.join(lora.parts)} is called '{target}'; there are "
                f"{', '.join(known)}{nearest(target, known)}"
            )
    return [name for name in found if any(_is_called(name, target) for target in lora.targets)]


def count(model: nn.Module, names: Collection[str], lora: Lora) -> int:
    """Parameters that adapters on these layers have."""
    total = 0
    for name in names:
        layer: Any = model.get_submodule(name)
        rows, columns = (
            (layer.nf, layer.nx) if _is_transposed(layer) else (layer.out_features, layer.in_features)
        )
        total += lora.rank * (rows + columns) + (rows if lora.kind == "dora" else 0)
    return total


def inject(model: PreTrainedModel, lora: Lora, base: str | None = None) -> list[str]:
    """Put a new adapter onto ``model``, in place. A is random, by torch's generator.

    Args:
        model: plain; its language model may be quantized.
        lora: which layers, and how large.
        base: what the model was loaded from, for ``adapter_config.json``; nothing reads it here.

    Returns:
        Names of the layers that have it.

    Raises:
        RecipeError: see :func:`targets`.
    """
    names = targets(model, lora)
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha if lora.alpha is not None else 2 * lora.rank,
        lora_dropout=lora.dropout,
        target_modules=pattern(names, [name for name, _ in model.named_modules()]),
        use_dora=lora.kind == "dora",
        use_rslora=lora.kind == "rslora",
        fan_in_fan_out=any(_is_transposed(model.get_submodule(name)) for name in names),
        base_model_name_or_path=base,
    )
    kinds = {type(model.get_submodule(name)).__name__ for name in names}
    # How peft learns that a layer is rounded. Not left there: transformers would refuse to move the model.
    flags = {"Linear4bit": "is_loaded_in_4bit", "Linear8bitLt": "is_loaded_in_8bit"}
    raised = [flag for kind, flag in flags.items() if kind in kinds]
    for flag in raised:
        setattr(model, flag, True)
    try:
        with warnings.catch_warnings():
            # GPT-2 lies the other way than its tower; peft looks at each layer, and says so of each.
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            inject_adapter_in_model(config, model, adapter_name=NAME)
    finally:
        for flag in raised:
            delattr(model, flag)
    got = sorted(adapted(model))
    assert got == sorted(names), "peft chose other layers"
    for name, parameter in model.named_parameters():
        if f".{NAME}" in name and parameter.is_floating_point():
            # Beside 4 bits peft takes the type of the products, in which small updates vanish.
            parameter.data = parameter.data.float()
    return names


def pattern(names: Collection[str], every: Collection[str]) -> str:
    """A regular expression that fits whole ``names`` and no other of ``every``; layers' numbers stay open."""
    split = [[_open(word) for word in name.split(".")] for name in names]
    # How many words all begin with; at least one is left.
    columns = zip(*(words[:-1] for words in split), strict=False)
    shared = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))
    head = r"\.".join(split[0][:shared])
    tails = sorted({r"\.".join(words[shared:]) for words in split})
    short = rf"{head}\.(?:{'|'.join(tails)})" if head else "|".join(tails)
    if {name for name in every if re.fullmatch(short, name)} == set(names):
        return short
    return "|".join(re.escape(name) for name in sorted(names))


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer, of the layers that have an adapter."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return re.search(r"\.lora_(A|B|magnitude_vector)\.", name) is not None


# Saving and going on


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter as peft does, with what else the stage trains, as peft's ``modules_to_save``.

    ``PeftModel.from_pretrained(start, folder)`` then computes as ``model`` does, ``start`` being what the
    stage began with; where the language model was quantized, up to the rounding of its matrices.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config: Any = copy.copy(model.peft_config[NAME])  # type: ignore[index]
    config.inference_mode = True
    whole = _trained_modules(model)
    config.modules_to_save = whole or None
    own = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    # Asked of the embeddings it would look for the base model, on the Hub if need be.
    weights = get_peft_model_state_dict(model, own, NAME, save_embedding_layers=False)
    for name in whole:
        weights |= model.get_submodule(name).state_dict(prefix=f"{name}.")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}": w.detach().cpu().contiguous().clone() for name, w in weights.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What a stage changes, by name: parameters that train, and what moves along with them."""
    return {name: tensor.detach() for name, tensor in _moving(model)}


@torch.no_grad()
def load_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`trained_state` gave, into a model with the same parts training.

    Raises:
        CheckpointError: the names differ.
    """
    own = dict(_moving(model))
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise CheckpointError(
            f"training.pt does not hold what this stage trains: {len(odd)} tensors differ, first {odd[0]}"
        )
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _moving(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    kept = model.state_dict(keep_vars=True)
    for place, module in model.named_modules():
        for own, buffer in module.named_buffers(recurse=False):
            name = f"{place}.{own}" if place else own
            if module.training and name in kept:
                yield name, buffer


def _trained_modules(model: nn.Module) -> list[str]:
    """The fewest modules that hold all that trains beside adapters."""

    def walk(name: str, module: nn.Module) -> Iterator[str]:
        trains = [p.requires_grad for own, p in module.named_parameters() if not is_adapter(f".{own}")]
        if not any(trains):
            return
        free = not adapted(module)
        direct = any(p.requires_grad for p in module.parameters(recurse=False))
        container = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
        if name and free and (direct or all(trains)) and not container:
            yield name
            return
        assert not direct, f"{name} trains itself and holds an adapter"
        for child, part in module.named_children():
            yield from walk(f"{name}.{child}" if name else child, part)

    return list(walk("", model))


# Merging


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is plain: adapters are part of their matrices and nothing is rounded to few bits.

    The layers themselves are not touched, and are back afterwards: merging and taking apart again would not
    give the last digits back. What was quantized lies on the CPU meanwhile, in float32.
    """
    swapped = _swap(model)
    try:
        yield
    finally:
        for place in swapped:
            place.parent._modules[place.name] = place.layer


def merge(model: nn.Module) -> float | None:
    """Make ``model`` plain for good, and see that every merged layer computes as it did.

    Returns:
        The largest difference of any layer, relative to its largest output; None where nothing was to merge.
        Layers that were quantized are float32 on the CPU now.

    Raises:
        CheckpointError: a merged layer computes something else.
    """
    swapped = _swap(model)
    if not swapped:
        return None
    worst = 0.0
    for place in swapped:
        found = _difference(place.layer, place.plain)
        rounds = is_quantized(_base(place.layer)) and not _is_exact(_base(place.layer))
        if not found <= (AGREES_ROUNDED if rounds else AGREES):
            raise CheckpointError(
                f"{place.where}: merged, this layer differs by {found:.1e} of its largest output; its "
                f"adapter holds numbers that are not finite or too large to add. Lower the stage's rates."
            )
        worst = max(worst, found)
    if hasattr(model, "peft_config"):
        del model.peft_config
    return worst


class _Place(NamedTuple):
    """A layer and the plain one that may stand for it."""

    where: str
    parent: nn.Module
    name: str
    layer: nn.Module
    plain: nn.Module


def _swap(model: nn.Module) -> list[_Place]:
    """Replace every layer that is adapted or quantized by a plain one; what was where."""
    places: list[_Place] = []
    found = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A") or is_quantized(m)}
    for where, layer in found.items():
        above, _, name = where.rpartition(".")
        if name == "base_layer":
            continue
        places.append(_Place(where, model.get_submodule(above), name, layer, _plain(layer)))
    for place in places:
        place.parent._modules[place.name] = place.plain
    return places


@torch.no_grad()
def _plain(layer: Any) -> nn.Module:
    """A layer of the ordinary kind that computes the same."""
    base = _base(layer)
    rounded = is_quantized(base)
    weight = dequantize(base) if rounded else base.weight.detach()
    if layer is not base:
        weight = weight + layer.get_delta_weight(NAME).to(weight.dtype)
        if NAME in layer.lora_magnitude_vector:
            rows = weight.T if _is_transposed(base) else weight
            rows = rows * (layer.lora_magnitude_vector[NAME].weight / rows.norm(dim=1))[:, None]
            weight = rows.T.contiguous() if _is_transposed(base) else rows
    if not rounded:
        plain = copy.copy(base)
        plain._parameters = {**base._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
        return plain
    plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.cpu(), requires_grad=False)
    if base.bias is not None:
        plain.bias = nn.Parameter(base.bias.detach().cpu(), requires_grad=False)
    return plain.train(base.training)


@torch.no_grad()
def _difference(layer: Any, plain: Any) -> float:
    """Largest difference of two layers on eight inputs, relative to the largest output."""
    base = _base(layer)
    width = base.nx if _is_transposed(base) else base.in_features
    # A generator of its own: the run's random numbers do not move.
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    was = layer.training
    apart = layer.eval()(x.to(base.weight.device)).cpu().float()
    layer.train(was)
    together = plain(x.to(plain.weight.device)).cpu().float()
    return float((apart - together).abs().max() / together.abs().max().clamp(min=1e-30))


def _base(layer: Any) -> Any:
    """The layer below an adapter; the layer itself where it has none."""
    return layer.get_base_layer() if hasattr(layer, "lora_A") else layer


def _is_exact(layer: Any) -> bool:
    """Whether a quantized layer multiplies in float32."""
    return getattr(layer, "compute_dtype", None) is torch.float32


def _linear_names(model: nn.Module) -> Iterator[str]:
    for above, parent in model.named_modules():
        # It reads its output matrix without calling the layer: an adapter there would do nothing.
        if isinstance(parent, nn.MultiheadAttention):
            continue
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) or _is_transposed(child):
                yield f"{above}.{name}" if above else name


def _is_transposed(layer: nn.Module) -> bool:
    """Whether a layer is GPT-2's, whose matrix is [in, out]."""
    return type(layer).__name__ == "Conv1D"


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _open(word: str) -> str:
    return r"\d+" if word.isdigit() else re.escape(word)
