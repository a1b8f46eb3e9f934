"""The same sums with less work: forwards that training swaps in for a stage, and puts back after it.

Nothing here changes what is computed, and a module is replaced only after it was seen to agree: recognised by
what it is made of, tried on a few random rows, output and gradients both. Parameters, their names and what is
saved stay as they are: only ``forward`` of single modules is another, until :meth:`Lean.restore`.

==========================  ==========================================================================
:mod:`packed`               documents one by one, the last block at targets only
:mod:`attention`            projections, rotation and attention of a block as one node
:mod:`feed_forward`         feed-forwards and norms that keep less
:mod:`kernels`              the loops in them, where a C compiler is
==========================  ==========================================================================

Layers with an adapter or of few bits are called as they are, between the parts that are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinymodal.train import kernels, packed
from tinymodal.train.attention import find_attention
from tinymodal.train.feed_forward import find_feed_forward, find_norm

if TYPE_CHECKING:
    from tinymodal.train.objective import Objective


class Lean:
    """What was replaced in a model, until :meth:`restore`. Use it as a context, or call that."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.counts: dict[str, int] = {}
        """How many modules of each kind have another forward."""
        self._replaced: list[nn.Module] = []
        self._packing: packed.Packing | None = None

    @property
    def lines(self) -> list[str]:
        """What is on and what is not, in words."""
        on = self.objective.packing
        said = []
        if on is not None:
            said.append("documents one by one" if on.by_document else "documents by a mask")
            if on.why:
                said[-1] += f" ({on.why})"
            if on.pruned:
                said.append("last block at targets")
        said += [f"{number} {kind}" for kind, number in self.counts.items()]
        if self.counts and self.objective.device.type in ("cpu", "meta"):
            loops, why = kernels.load()
            said.append("their loops compiled" if loops else f"their loops not compiled ({why})")
        return said

    def replace(self, module: nn.Module, kind: str, forward: Callable[..., Any]) -> None:
        """Let ``forward(module, ...)`` stand for the module's own."""
        module.forward = MethodType(forward, module)  # type: ignore[assignment]
        self._replaced.append(module)
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def take_back(self, module: nn.Module, kind: str) -> None:
        """The module's own forward again."""
        module.__dict__.pop("forward", None)
        self._replaced.remove(module)
        self.counts[kind] -= 1
        if not self.counts[kind]:
            del self.counts[kind]

    def restore(self) -> None:
        """The model as it was. May be called twice."""
        for module in self._replaced:
            module.__dict__.pop("forward", None)
        self._replaced, self.counts = [], {}
        if self._packing is not None:
            self._packing.undo()
            self._packing = self.objective.packing = None

    def __enter__(self) -> Lean:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def lean(objective: Objective, enabled: bool = True) -> Lean:
    """Swap in what is faster and equal, all over ``objective``'s model.

    Call it when the model is on its device, adapters and few bits in place, before it is cut up among
    processes. Random states do not move, and nothing depends on what was trained before.

    Args:
        objective: changed in place until :meth:`Lean.restore`.
        enabled: False: change nothing; for comparisons. Nor is anything changed a second time.
    """
    made = Lean(objective)
    if not enabled or objective.packing is not None:
        return made
    model: Any = objective.model
    seen: dict[Any, Callable[..., Any] | None] = {}
    for module in list(model.modules()):
        if "forward" in module.__dict__:
            continue
        for kind, find in (("norms", find_norm), ("feed-forwards", find_feed_forward)):
            key = kind, type(module), _make(module)
            if key not in seen:
                seen[key] = find(module)
            forward = seen[key]
            if forward is not None:
                made.replace(module, kind, forward)
                break
    for tower in model.model.towers.values():
        if "forward" not in tower.__dict__:
            made.replace(tower, "towers", _without_graph)
    language_model = model.model.language_model
    made._packing = objective.packing = packed.packing(language_model)
    if objective.packing.by_document:
        _swap_attention(made, objective.packing)
    return made


def _without_graph(self: Any, values: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward of a tower: nothing is kept of one that is frozen, not even by blocks that recompute."""
    trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
    with torch.set_grad_enabled(trains):
        return type(self).forward(self, values, *args, **kwargs)


def _swap_attention(made: Lean, packing: packed.Packing) -> None:
    """Replace every attention of a known build, where the whole model then still agrees."""
    replaced = []
    for module, told in packing.noted:
        forward = find_attention(module, told)
        if forward is not None and "forward" not in module.__dict__:
            made.replace(module, "attentions", forward)
            replaced.append(module)
    if replaced and not packed.agrees(packing):
        for module in replaced:
            made.take_back(module, "attentions")


def _make(module: nn.Module) -> tuple[Any, ...]:
    """What must be equal in two modules of a class for one to speak for the other."""
    parts = tuple((name, type(child), _sizes(child)) for name, child in module.named_children())
    plain = tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, (int, float, str, bool))))
    return parts, plain, _sizes(module), next((p.dtype for p in module.parameters()), None)


def _sizes(module: nn.Module) -> tuple[Any, ...]:
    return tuple((name, p.shape, p.requires_grad) for name, p in module.named_parameters(recurse=False))
