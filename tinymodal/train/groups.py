"""Which parameters train, and at which rate; everything else is frozen and behaves as in inference.

A group is a room of the model: each tower, the connectors, the language model, the speech head; token
embeddings and adapters have their own. Of a room all may train, or its blocks from one on, or its norms,
which are found by what the modules are and not by how a family names them. What is frozen is in ``eval`` (no
dropout, no drifting statistics) and has no gradients; a frozen tower, which nothing trainable stands before,
therefore leaves no graph behind at all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from torch.nn import Parameter

from tinymodal.compose.quantize import num_weights
from tinymodal.core.errors import RecipeError
from tinymodal.core.lookup import nearest
from tinymodal.model.media import MediaEncoder
from tinymodal.model.sound_tower import AudioTower
from tinymodal.train import adapters
from tinymodal.train.recipe import GROUPS, Choice, Lora, read_choice

if TYPE_CHECKING:
    from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration
    from tinymodal.train.recipe import Stage

Named = list[tuple[str, Parameter]]


class Row(NamedTuple):
    """One line of the table that is printed before the first step."""

    group: str
    rate: float
    """Peak learning rate; 0: frozen."""
    parameters: int
    trained: int = 0
    """Of these, how many train."""
    what: str = ""
    """The choice in words: ``trains at 2e-06, from layer 12: 1,024 of them``."""


def trainable(
    model: TinyModalForConditionalGeneration,
    train: Mapping[str, float],
    weight_decay: float = 0.0,
    heads: nn.Module | None = None,
    only: Mapping[str, str] | None = None,
    adapted: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Freeze ``model`` but for what the stage trains, and give that as groups for the optimizer.

    Args:
        model: changed in place: ``requires_grad`` and train/eval mode of every part.
        train: group -> peak learning rate; missing or 0 is frozen.
        weight_decay: for matrices; norms, biases, embeddings and learned positions have none.
        heads: the objective's own modules, group ``heads``.
        only: group -> what of it trains, as in :attr:`Stage.only`.
        adapted: names of the layers that have an adapter, or will have one before the first step.

    Returns:
        Dicts for ``torch.optim``: ``params``, ``peak``, ``weight_decay``, ``group``. In a fixed order.

    Raises:
        RecipeError: an unknown group, a rate for a group that the model has no parameters in, a choice that
            finds nothing, or a matrix that would train below its adapter.
    """
    rates = rates_of(train, only)
    members = _named(model, heads)
    for group, rate in train.items():
        if group not in GROUPS:
            raise RecipeError(
                f"train: unknown group '{group}'; groups: {', '.join(GROUPS)}{nearest(group, GROUPS)}"
            )
        if rate > 0 and not members[group] and not (group == "adapters" and adapted):
            raise RecipeError(
                f"train.{group} has a rate, but this model has no parameters there; groups that have: "
                f"{', '.join(g for g in GROUPS if members[g])}"
            )
    chosen = _chosen(model, members, rates, only or {})
    _refuse_both(chosen, adapted)
    decaying = set(_matrices(model)) | (set(_matrices(heads)) if heads is not None else set())

    groups = []
    for group in GROUPS:
        trained = {id(p) for _, p in chosen[group]}
        for _, parameter in members[group]:
            if parameter.requires_grad != (id(parameter) in trained):
                parameter.requires_grad_(id(parameter) in trained)
        for decays in (True, False):
            params = [p for _, p in chosen[group] if (p in decaying) == decays]
            if params:
                decay = weight_decay if decays else 0.0
                groups.append({"params": params, "peak": rates[group], "weight_decay": decay, "group": group})
    set_modes(model, heads)
    return groups


def rates_of(train: Mapping[str, float], only: Mapping[str, str] | None = None) -> dict[str, float]:
    """The rate of every group.

    Embeddings are trained with the language model unless they have their own rate, or it trains in part.
    """
    rates: dict[str, float] = {group: train.get(group, 0.0) for group in GROUPS}
    whole = "language" not in (only or {})
    rates["embeddings"] = train.get("embeddings", rates["language"] if whole else 0.0)
    return rates


def grouped(
    model: TinyModalForConditionalGeneration, heads: nn.Module | None = None
) -> dict[str, list[Parameter]]:
    """Every parameter once, in its group."""
    return {group: [p for _, p in members] for group, members in _named(model, heads).items()}


def table(
    model: TinyModalForConditionalGeneration,
    train: Mapping[str, float],
    heads: nn.Module | None = None,
    only: Mapping[str, str] | None = None,
    lora: Lora | None = None,
    bits: int | None = None,
) -> list[Row]:
    """Who trains, at which rate, how many parameters; groups without parameters are left out.

    Adapters are counted whether they are there already or not.
    """
    rates, only = rates_of(train, only), only or {}
    members = _named(model, heads)
    chosen = _chosen(model, members, rates, only)
    names = list(adapters.adapted(model))
    num_adapters = sum(p.numel() for _, p in members["adapters"])
    if lora is not None and not names:
        names = adapters.targets(model, lora)
        num_adapters = adapters.count(model, names, lora)
    rows = []
    for group in GROUPS:
        rate = rates[group]
        total = trained = 0
        if group == "adapters":
            total = trained = num_adapters
        else:
            total = sum(num_weights(p) for _, p in members[group])
            trained = sum(num_weights(p) for _, p in chosen[group])
        if not total:
            continue
        what = f"trains at {rate:g}" if rate else "frozen"
        if group == "adapters" and lora is not None:
            what += f", {lora.kind} of rank {lora.rank} on {len(names)} layers of {' and '.join(lora.parts)}"
        elif rate and group in only:
            what += f", {only[group]}: {trained:,} of them"
        if group == "language" and bits is not None:
            what += f", its linear layers in {bits} bits"
        rows.append(Row(group, rate, total, trained, what))
    return rows


def who_trains(
    model: TinyModalForConditionalGeneration, stage: Stage, heads: nn.Module | None = None
) -> list[Row]:
    """The table of a stage; see :func:`table`."""
    return table(model, stage.train, heads, stage.only, stage.lora, stage.bits)


def lines(rows: list[Row]) -> list[str]:
    """The table as text."""
    return [f"{row.group:<11}{row.parameters:>14,}  {row.what}" for row in rows]


def set_modes(model: TinyModalForConditionalGeneration, heads: nn.Module | None = None) -> None:
    """Train mode for the parts that train, eval mode elsewhere, down to single blocks and norms."""
    words = {id(p) for p in _embeddings(model)}

    def trains(module: nn.Module) -> bool:
        # Trained embeddings alone do not switch the dropout of a frozen decoder on.
        return any(p.requires_grad for p in module.parameters() if id(p) not in words)

    model.train(False)
    for room in _rooms(model):
        if not trains(room):
            continue
        room.train()
        for part in _parts(room):
            if isinstance(part, AudioTower):
                # A learned mean of its layers trains with the connectors, above a tower that is frozen.
                for child in part.children():
                    child.train(trains(child))
            for block in blocks(part):
                if not trains(block):
                    block.eval()
        for module in room.modules():
            # Running statistics move in train mode, whether the norm itself trains or not.
            if getattr(module, "running_mean", None) is not None and not trains(module):
                module.eval()
    if heads is not None:
        heads.train()
    _keep_recompute(model)


def blocks(part: nn.Module) -> list[nn.Module]:
    """The blocks of a tower, a connector or a decoder, first to last; empty where it is not a stack.

    Found by structure: of all lists of two or more modules of one class, the one with the most parameters (of
    one block, where there is no longer list).
    """
    best: list[nn.Module] = []
    size = (False, 0)
    for module in part.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
            continue
        members = list(module)
        if len({type(member) for member in members}) > 1 or isinstance(members[0], MediaEncoder):
            continue
        found = (len(members) > 1, sum(p.numel() for p in module.parameters()))
        if found[1] and found > size:
            best, size = members, found
    return best


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with weights of its own, of whatever family."""
    weight = getattr(module, "weight", None)
    single = isinstance(weight, Parameter) and weight.ndim == 1
    return single and "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _chosen(
    model: TinyModalForConditionalGeneration,
    members: Mapping[str, Named],
    rates: Mapping[str, float],
    only: Mapping[str, str],
) -> dict[str, Named]:
    """What trains, by group."""
    chosen: dict[str, Named] = {}
    for group in GROUPS:
        found = list(members[group]) if rates[group] > 0 else []
        if found and group in only:
            wanted = {id(p) for p in _picked(model, group, only[group], read_choice(only[group]))}
            found = [(name, p) for name, p in found if id(p) in wanted]
            if not found:
                raise RecipeError(f"only.{group} is '{only[group]}', but nothing there is; take it out")
        chosen[group] = found
    return chosen


def _picked(
    model: TinyModalForConditionalGeneration, group: str, text: str, choice: Choice
) -> Iterator[Parameter]:
    """The parameters that a choice means."""
    parts = [part for room in _rooms(model, group) for part in _parts(room)]
    if choice.names:
        yield from _called(group, parts, choice.names)
    for part in parts:
        if choice.layer is not None:
            stack = blocks(part)
            kind = type(part).__name__
            if not stack:
                raise RecipeError(
                    f"only.{group} is '{text}', but {kind} has no blocks to count; take 'norms', or all of it"
                )
            if choice.layer >= len(stack):
                raise RecipeError(
                    f"only.{group} is '{text}', but {kind} runs {len(stack)} blocks, 0 to {len(stack) - 1}"
                )
            for block in stack[choice.layer :]:
                yield from block.parameters()
        if choice.norms:
            for module in part.modules():
                if is_norm(module):
                    yield module.weight  # type: ignore[misc]
                    if choice.biases and getattr(module, "bias", None) is not None:
                        yield module.bias  # type: ignore[misc]


def _called(group: str, parts: list[nn.Module], names: tuple[str, ...]) -> list[Parameter]:
    """The parameters in modules of these names, and those that bear such a name themselves."""
    members = [(f".{name}.", p) for part in parts for name, p in part.named_parameters()]
    for name in names:
        if not any(f".{name}." in path for path, _ in members):
            # The outermost names: what a reader would look for first.
            known = sorted({path.split(".")[1] for path, _ in members})
            raise RecipeError(
                f"only.{group} is 'named {name}', but nothing there is called so; there are "
                f"{', '.join(known)}{nearest(name, known)}"
            )
    return [p for path, p in members if any(f".{name}." in path for name in names)]


def _refuse_both(chosen: Mapping[str, Named], adapted: Collection[str]) -> None:
    """Refuse to train a matrix and the adapter beside it."""
    below = {f"{name}{way}.weight" for name in adapted for way in ("", ".base_layer")}
    for group, members in chosen.items():
        both = [name for name, _ in members if name in below]
        if both:
            raise RecipeError(
                f"train.{group} trains {len(both)} matrices that lora keeps frozen below its adapters, first "
                f"{both[0]}; take one of the two out"
            )


def _named(model: TinyModalForConditionalGeneration, heads: nn.Module | None) -> dict[str, Named]:
    """Every parameter once, with its name, in its group."""
    words = {id(p) for p in _embeddings(model)}
    members: dict[str, Named] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        if adapters.is_adapter(name):
            group = "adapters"
        elif id(parameter) in words:
            group = "embeddings"
        elif name.endswith(".towers.audio.layer_weights"):
            # New, as a connector is, and worth training while the tower is frozen.
            group = "connectors"
        elif ".towers.audio." in f".{name}":
            group = "audio"
        elif ".towers." in f".{name}":
            group = "vision"
        elif name.startswith("speech_head."):
            group = "speech"
        elif ".connectors." in f".{name}" or ".marks." in f".{name}":
            group = "connectors"
        else:
            group = "language"
        members[group].append((name, parameter))
    if heads is not None:
        members["heads"] = [(f"heads.{name}", p) for name, p in heads.named_parameters()]
    return members


def _rooms(model: TinyModalForConditionalGeneration, group: str | None = None) -> Iterator[nn.Module]:
    """The parts that freeze as a whole, of one group or of all."""
    for kind, tower in model.model.towers.items():
        if group in (None, "audio" if kind == "audio" else "vision"):
            yield tower
    if group in (None, "connectors"):
        yield from model.model.connectors.values()
    if group in (None, "language"):
        yield model.model.language_model
    if group in (None, "speech") and model.speech_head is not None:
        yield model.speech_head


def _parts(room: nn.Module) -> list[nn.Module]:
    """The towers that stand side by side in one; of any other room, itself."""
    towers = [m for m in room.modules() if isinstance(m, MediaEncoder)]
    single = [t for t in towers if not any(isinstance(m, MediaEncoder) for m in t.modules() if m is not t)]
    return [*single] or [room]


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
