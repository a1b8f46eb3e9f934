"""States of a stage that do not depend on how many ranks it is spread over.

Weights and optimizer states are gathered tensor by tensor and kept, by the parameter's name, on the CPU of
rank 0; put back, every rank takes its own piece. Nothing is rounded on the way: what was saved by two ranks
and loaded by three is the same to the last bit. All functions here are for all ranks to call together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from tinymodal.core.errors import CheckpointError
from tinymodal.train.world import World

if TYPE_CHECKING:
    from tinymodal.train.objective import Objective


def named(objective: Objective) -> Iterator[tuple[str, Parameter]]:
    """Parameters with the model's own names, and ``heads.`` before those of the objective."""
    yield from objective.model.named_parameters()
    if objective.heads is not None:
        yield from ((f"heads.{name}", p) for name, p in objective.heads.named_parameters())


@torch.no_grad()
def full_state(objective: Objective, world: World, trained_only: bool = False) -> dict[str, Tensor]:
    """Name -> tensor of the model and the heads, copies on the CPU; on other ranks than 0 nothing.

    Args:
        objective: sharded or not.
        world: the ranks.
        trained_only: parameters that train, and buffers.
    """
    found: dict[str, Tensor] = {n: p for n, p in named(objective) if p.requires_grad or not trained_only}
    kept = objective.model.state_dict(keep_vars=True)
    found |= {name: buffer for name, buffer in objective.model.named_buffers() if name in kept}
    return _gathered(found, world)


@torch.no_grad()
def full_optimizer_state(
    optimizer: torch.optim.Optimizer, objective: Objective, world: World
) -> dict[str, Any]:
    """The optimizer's state by the names of parameters, copies on the CPU; on other ranks than 0 nothing.

    Returns:
        ``state``: name -> what the optimizer holds for it. ``groups``: their options, with ``names`` in place
        of parameters. Plain values and tensors.
    """
    names = {id(p): name for name, p in named(objective)}
    state = {
        names[id(p)]: _gathered(optimizer.state[p], world)
        for group in optimizer.param_groups
        for p in group["params"]
        if p in optimizer.state
    }
    if not world.main:
        return {}
    groups = [
        {**{key: value for key, value in group.items() if key != "params"}, "names": _names(group, names)}
        for group in optimizer.param_groups
    ]
    return {"state": state, "groups": groups}


@torch.no_grad()
def load_optimizer_state(
    optimizer: torch.optim.Optimizer, objective: Objective, state: Mapping[str, Any] | None, world: World
) -> None:
    """Put back what :func:`full_optimizer_state` gave, on any number of ranks.

    Args:
        optimizer: over the same parameters, in the same groups.
        objective: sharded or not.
        state: on every rank, or on rank 0 with None on the others: then it is sent to them, one parameter
            after the other.
        world: the ranks.

    Raises:
        CheckpointError: the optimizer has other parameters or groups; names the first.
    """
    names = {id(p): name for name, p in named(objective)}
    sent = any(world.gather(state is None))
    groups = state["groups"] if state is not None else None
    if sent:
        groups = _from_main(groups, world)
    assert groups is not None, "rank 0 has the state"
    own = [_names(group, names) for group in optimizer.param_groups]
    there = [list(group["names"]) for group in groups]
    if own != there:
        odd = sorted({n for g in own for n in g} ^ {n for g in there for n in g})
        told = f"{len(odd)} parameters differ, first {odd[0]}" if odd else "they are grouped in another way"
        raise CheckpointError(
            f"the optimizer's state is of another stage: {told}. Go on with the recipe that it was saved by."
        )
    number = 0
    states: dict[int, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            held = None if state is None else state["state"].get(names[id(parameter)])
            if sent:
                held = _from_main(held, world)
            if held is not None:
                states[number] = {key: _like(value, parameter) for key, value in held.items()}
            number += 1
    numbers = iter(range(number))
    options = [
        {
            **{key: value for key, value in group.items() if key != "names"},
            "params": [next(numbers) for _ in group["names"]],
        }
        for group in groups
    ]
    optimizer.load_state_dict({"state": states, "param_groups": options})


@torch.no_grad()
def make_whole(objective: Objective, world: World) -> None:
    """Undo the sharding: every rank holds the whole model again, on the CPU, made of ordinary modules.

    For the end of a stage. ``objective`` itself is spent; ``objective.model`` and ``objective.heads`` go on.
    """
    if not any(map(_is_piece, objective.parameters())):
        return
    plain: dict[int, Parameter] = {}
    for module in objective.modules():
        for name, p in module._parameters.items():
            if p is not None and _is_piece(p):
                # Tied ones are tied again.
                if id(p) not in plain:
                    whole = _whole(p).to("cpu", copy=True)
                    plain[id(p)] = Parameter(whole, requires_grad=p.requires_grad)
                module._parameters[name] = plain[id(p)]
    for module in list(objective.model.modules()):
        for name, child in module._modules.items():
            if child is not None and _is_sharded(child):
                module._modules[name] = _unsharded(child)


def _is_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _unsharded(module: nn.Module) -> nn.Module:
    """A module of the class that ``fully_shard`` replaced, with the same parts and without its hooks."""
    kind: Any = type(module).__mro__[2]
    plain: nn.Module = kind.__new__(kind)
    for key, value in module.__dict__.items():
        # A forward of its own is bound to the old one, and was swapped in for the stage that ends.
        if key == "forward" or key.startswith(("__composable_api", "_is_fsdp", "_fsdp_")):
            continue
        plain.__dict__[key] = value.copy() if key.startswith("_") and isinstance(value, dict) else value
    for kind_of_hooks in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = plain.__dict__[kind_of_hooks]
        for number, hook in list(hooks.items()):
            if "fsdp" in type(getattr(hook, "__self__", None)).__name__.lower():
                del hooks[number]
                plain.__dict__[f"{kind_of_hooks}_with_kwargs"].pop(number, None)
    return plain


def _whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank; another tensor itself."""
    piece: Any = tensor
    found: Tensor = piece.full_tensor() if _is_piece(tensor) else tensor
    return found


def _is_piece(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``; not asked by its class, which takes two seconds to import."""
    return hasattr(tensor, "full_tensor")


def _gathered(values: Mapping[str, Any], world: World) -> dict[str, Any]:
    """``values`` with whole tensors, copied to the CPU, on rank 0; elsewhere nothing is kept."""
    found = {}
    for key, value in values.items():
        whole = _whole(value.detach()) if isinstance(value, Tensor) else value
        if world.main:
            found[key] = whole.to("cpu", copy=True) if isinstance(whole, Tensor) else whole
    return found


def _like(value: Any, parameter: Parameter) -> Any:
    """This rank's piece of ``value``, if it lies in pieces as the parameter does."""
    if isinstance(value, Tensor) and _is_piece(parameter) and value.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        piece: Any = parameter
        there = value.to(piece.to_local().device)
        # Every rank has all of it: none needs to be sent.
        return distribute_tensor(there, piece.device_mesh, piece.placements, src_data_rank=None)
    return value.clone() if isinstance(value, Tensor) else value


def _from_main(value: Any, world: World) -> Any:
    """What rank 0 has."""
    carried = [value]
    if world.size > 1:
        dist.broadcast_object_list(carried, 0, group=world.small)
    return carried[0]


def _names(group: Mapping[str, Any], names: Mapping[int, str]) -> list[str]:
    return [names[id(p)] for p in group["params"]]
