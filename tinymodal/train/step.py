"""One optimizer step: micro-batches, one mean over all of them, clip, step.

The mean is over the targets of the whole step, so how a step is cut into micro-batches does not change the
gradient. Everything the step reports crosses from the device once, at its end.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from tinymodal.core.errors import DataError
from tinymodal.core.types import Batch

if TYPE_CHECKING:
    from tinymodal.train.objective import Objective

SHOWN_IDS = 8
"""Samples that an error names."""


class StepReport(NamedTuple):
    """What one step saw and did."""

    loss: float
    """Sum of the losses below."""
    losses: dict[str, float]
    """Mean over targets, by name."""
    grad_norm: float
    """Before clipping."""
    num_tokens: int
    num_targets: int
    sample_ids: tuple[str, ...]


def step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    clip: float = 1.0,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> StepReport:
    """Take one optimizer step on ``batches``.

    Args:
        objective: model and losses; its parameters' device is where the batches go.
        optimizer: rates are set already.
        batches: the micro-batches, on the CPU.
        clip: norm that the gradient is cut to; 0: never cut.
        precision: what the passes compute in.

    Raises:
        DataError: a loss or the gradient is not finite; nothing was changed, and the samples are named.
    """
    counts = objective.counts(batches)
    device = objective.device
    narrow = (
        torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
    )
    optimizer.zero_grad(set_to_none=True)

    sums: list[Tensor] = []
    for batch in batches:
        with narrow:
            terms = objective(to_device(batch, device))
        named = [terms[name] for name in counts]
        sums += [term.detach() for term in named]
        means = [term / max(count, 1) for term, count in zip(named, counts.values(), strict=True)]
        loss = means[0] if len(means) == 1 else torch.stack(means).sum()
        # A batch without pictures has no gradient where only the connectors train.
        if loss.requires_grad:
            loss.backward()

    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = clip_gradient(parameters, clip, device)
    *values, grad_norm = torch.stack([*sums, norm]).tolist()

    losses = {
        name: sum(values[i :: len(counts)]) / max(count, 1) for i, (name, count) in enumerate(counts.items())
    }
    loss_value = sum(losses.values())
    if not (_finite(loss_value) and _finite(grad_norm)):
        _refuse(batches, values, len(counts), grad_norm)
    optimizer.step()
    return StepReport(
        loss=loss_value,
        losses=losses,
        grad_norm=grad_norm,
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_targets=sum(counts.values()),
        sample_ids=tuple(name for batch in batches for name in batch.sample_ids),
    )


def clip_gradient(parameters: Sequence[torch.nn.Parameter], clip: float, device: torch.device) -> Tensor:
    """Scale the gradients to a norm of at most ``clip`` (0: leave them); the norm they had, float32 []."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros((), device=device)
    norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    if clip > 0:
        # No branch on the norm: that would wait for the device.
        torch._foreach_mul_(grads, (clip / (norm + 1e-6)).clamp(max=1.0))
    return norm


def to_device(batch: Batch, device: torch.device) -> Batch:
    """``batch`` with its tensors on ``device``; itself where they are there already."""
    if batch.input_ids.device == device:
        return batch
    moved: dict[str, Any] = {
        field.name: value.to(device, non_blocking=True)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    if isinstance(batch.pixel_values, tuple):
        moved["pixel_values"] = tuple(tiles.to(device, non_blocking=True) for tiles in batch.pixel_values)
    return dataclasses.replace(batch, **moved)


def _finite(value: float) -> bool:
    return value - value == 0.0


def _refuse(batches: Sequence[Batch], values: Sequence[float], num_losses: int, grad_norm: float) -> None:
    bad = [
        batch
        for i, batch in enumerate(batches)
        if not all(_finite(v) for v in values[i * num_losses : (i + 1) * num_losses])
    ]
    what = "the loss is not a finite number" if bad else f"the gradient is not finite (norm {grad_norm})"
    ids = [name for batch in (bad or batches) for name in batch.sample_ids]
    shown = ", ".join(ids[:SHOWN_IDS]) + (f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else "")
    raise DataError(
        f"{what}; nothing was changed by this step. It read: {shown}. "
        f"Lower the stage's rates or its clip; if it is always the same sample, look at its picture and text."
    )
