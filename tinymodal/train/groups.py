"""Which parameters train, and at which rate; everything else is frozen and behaves as in inference.

A group is a room of the model: the tower, the connectors, the language model. A frozen part is put in
``eval`` (no dropout, no drifting statistics) and has no gradients; a frozen tower, which nothing trainable
stands before, therefore leaves no graph behind at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from torch.nn import Parameter

from tinymodal.core.errors import RecipeError
from tinymodal.core.lookup import nearest
from tinymodal.train.recipe import GROUPS

if TYPE_CHECKING:
    from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration


class Row(NamedTuple):
    """One line of the table that is printed before the first step."""

    group: str
    rate: float
    """Peak learning rate; 0: frozen."""
    parameters: int


def trainable(
    model: TinyModalForConditionalGeneration,
    train: Mapping[str, float],
    weight_decay: float = 0.0,
    heads: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Freeze ``model`` but for the groups of ``train``, and give those as groups for the optimizer.

    Args:
        model: changed in place: ``requires_grad`` and train/eval mode of every part.
        train: group -> peak learning rate; missing or 0 is frozen.
        weight_decay: for matrices; norms, biases, embeddings and learned positions have none.
        heads: the objective's own modules, group ``heads``.

    Returns:
        Dicts for ``torch.optim``: ``params``, ``peak``, ``weight_decay``, ``group``. In a fixed order.

    Raises:
        RecipeError: an unknown group, or a rate for a group that the model has no parameters in.
    """
    members = grouped(model, heads)
    for group, rate in train.items():
        if group not in GROUPS:
            raise RecipeError(
                f"train: unknown group '{group}'; groups: {', '.join(GROUPS)}{nearest(group, GROUPS)}"
            )
        if rate > 0 and not members[group]:
            raise RecipeError(
                f"train.{group} has a rate, but this model has no parameters there; groups that have: "
                f"{', '.join(g for g in GROUPS if members[g])}"
            )
    rates = rates_of(train)
    decaying = set(_matrices(model)) | (set(_matrices(heads)) if heads is not None else set())

    groups = []
    for group in GROUPS:
        for parameter in members[group]:
            parameter.requires_grad_(rates[group] > 0)
        for decays in (True, False):
            params = [p for p in members[group] if (p in decaying) == decays]
            if rates[group] > 0 and params:
                decay = weight_decay if decays else 0.0
                groups.append({"params": params, "peak": rates[group], "weight_decay": decay, "group": group})
    set_modes(model, heads)
    return groups


def rates_of(train: Mapping[str, float]) -> dict[str, float]:
    """The rate of every group. Embeddings are trained with the language model unless they have their own."""
    rates: dict[str, float] = {group: train.get(group, 0.0) for group in GROUPS}
    rates["embeddings"] = train.get("embeddings", rates["language"])
    return rates


def grouped(
    model: TinyModalForConditionalGeneration, heads: nn.Module | None = None
) -> dict[str, list[Parameter]]:
    """Every parameter once, in its group."""
    words = {id(p) for p in _embeddings(model)}
    members: dict[str, list[Parameter]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        if id(parameter) in words:
            group = "embeddings"
        elif ".towers." in f".{name}":
            group = "vision"
        elif ".connectors." in f".{name}":
            group = "connectors"
        else:
            group = "language"
        members[group].append(parameter)
    if heads is not None:
        members["heads"] = list(heads.parameters())
    return members


def table(
    model: TinyModalForConditionalGeneration, train: Mapping[str, float], heads: nn.Module | None = None
) -> list[Row]:
    """Who trains, at which rate, how many parameters; groups without parameters are left out."""
    rates = rates_of(train)
    return [
        Row(group, rates[group], sum(p.numel() for p in params))
        for group, params in grouped(model, heads).items()
        if params
    ]


def set_modes(model: TinyModalForConditionalGeneration, heads: nn.Module | None = None) -> None:
    """Train mode for the parts that train, eval mode elsewhere."""
    words = {id(p) for p in _embeddings(model)}
    model.train(False)
    for room in _rooms(model):
        # Trained embeddings alone do not switch the dropout of a frozen decoder on.
        if any(p.requires_grad for p in room.parameters() if id(p) not in words):
            room.train()
    if heads is not None:
        heads.train()
    _keep_recompute(model)


def _rooms(model: TinyModalForConditionalGeneration) -> Iterator[nn.Module]:
    """The parts that freeze as a whole."""
    yield from model.model.towers.values()
    yield from model.model.connectors.values()
    yield model.model.language_model


def _keep_recompute(model: nn.Module) -> None:
    """Let a frozen decoder recompute its activations: transformers does so in train mode only.

    Only the layer's own flag is set, its members (dropout!) stay in eval mode.
    """
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def _embeddings(model: TinyModalForConditionalGeneration) -> Iterator[Parameter]:
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            yield from module.parameters()


def _matrices(model: nn.Module) -> Iterator[Parameter]:
    """Parameters that weight decay is meant for."""
    # A tied head is a table of embeddings first.
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        # Learned positions are [1, S, E]: vectors, whatever their number of axes says.
        if parameter.ndim >= 2 and parameter.shape[0] > 1 and id(parameter) not in tables:
            yield parameter
