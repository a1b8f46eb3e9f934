"""One optimizer step: micro-batches on one rank or many, one mean over all of them, clip, step.

The mean is over the targets of the whole step, so how a step is cut into micro-batches, or dealt to ranks,
does not change the gradient. Ranks exchange a few numbers on the CPU before the first pass, gradients in the
last backward pass, and one row of sums at the end; what the step reports crosses from the device once, with
that row.

A step whose loss or gradient is not finite on any rank changes nothing on all of them, and says so.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from tinymodal.core.types import Batch
from tinymodal.train.feed import each_tensor
from tinymodal.train.precision import DTYPES, Precision
from tinymodal.train.spread import Agreed, Spread, agree, local
from tinymodal.train.world import ALONE, World

if TYPE_CHECKING:
    from tinymodal.train.objective import Objective

LOSS_SCALE = "loss scale"
"""Why a step was skipped that only found the scale of a 16-bit loss too large. No fault: the next has a
smaller one. At the beginning of a run several in a row are usual."""

Groups = Mapping[tuple[int, int], tuple[float, int]]
"""(source, 1 if the document shows a picture plus 2 if it plays a sound) -> sum of the text losses and number
of targets."""


class StepReport(NamedTuple):
    """What one step saw and did, on all ranks where it does not say otherwise."""

    loss: float
    """Sum of the losses below."""
    losses: dict[str, float]
    """Mean over targets, by name."""
    grad_norm: float
    """Before clipping."""
    num_tokens: int
    num_targets: int
    sample_ids: tuple[str, ...]
    """Of this rank."""
    num_positions: int = 0
    """Tokens and padding."""
    num_samples: int = 0
    measures: Mapping[str, float] = {}
    """What is told beside the losses: means over the targets of the loss that their name begins with."""
    groups: Groups = {}  # noqa: RUF012 - never written to
    skipped: bool = False
    """Nothing was changed."""
    why: str = ""
    """What was wrong, for people; :data:`LOSS_SCALE` where nothing was."""
    bad_ids: tuple[str, ...] = ()
    """Samples of the micro-batches without a finite loss; of the whole step where only the gradient has
    none."""
    asked: bool = False
    """Whether any rank was asked to end."""


def step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    clip: float = 1.0,
    precision: Precision = "float32",
    *,
    world: World = ALONE,
    forward: nn.Module | None = None,
    scaler: torch.amp.GradScaler | None = None,
    asked: bool = False,
    mark: Callable[[str, int], None] | None = None,
) -> StepReport:
    """Take one optimizer step on ``batches``; every rank of ``world`` calls it.

    Args:
        objective: model and losses.
        optimizer: rates are set already.
        batches: the micro-batches of this rank, on the CPU or where the model computes; their number may
            differ between ranks, and be 0.
        clip: norm that the gradient is cut to; 0: never cut.
        precision: what the passes compute in.
        world: the ranks.
        forward: what ``parallelize`` made of the objective; None: itself.
        scaler: of the loss, for ``float16``.
        asked: whether this rank was asked to end; the report says whether any was.
        mark: told what is begun, see ``stall.Watchdog.mark``.

    Raises:
        DataError: labels that no class stands for; ranks that cannot work together on what they were given.
    """
    spread = forward if isinstance(forward, Spread) else None
    own = objective.counts(batches)
    mark = mark or _unmarked
    mark("agree", 0)
    agreed = agree(world, own, batches, asked)
    device = objective.device if spread is None else world.device
    optimizer.zero_grad(set_to_none=True)
    passes = list(batches) if spread is None else spread.passes(batches, agreed)
    module = objective if forward is None else forward
    seen = _run(module, passes, agreed, objective.weights, device, precision, scaler, mark)

    mark("sums", 0)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if spread is not None:
        spread.after()
    unscaled = scaler is not None and _unscale(scaler, optimizer, parameters, device)
    extras = _nothing(device) if spread is None else spread.extras(parameters).to(device)
    sums = torch.cat([*seen.sums, extras])
    if world.size > 1:
        dist.all_reduce(sums)
    of_all = sums.split([*map(len, seen.sums), len(extras)])
    norm = gradient_norm(parameters, device) if spread is None else spread.norm(parameters, of_all[-1])
    clip_gradient(parameters, norm, clip)
    # The one place where the CPU waits for the device.
    row = torch.cat([seen.each, sums, norm.to(device).double().view(1)]).tolist()
    each, totals, measures, groups, used, (grad_norm,) = _split(row, [len(seen.each), *map(len, of_all), 1])

    losses = _means(dict(zip(agreed.counts, totals, strict=True)), agreed)
    loss = sum(objective.weights.get(name, 1.0) * value for name, value in losses.items())
    why, bad = "", list(batches)
    if not math.isfinite(loss):
        why = "the loss is not a finite number"
        bad = _without_loss(batches, each, len(own))
    elif not math.isfinite(grad_norm):
        why = f"the gradient is not finite (norm {grad_norm})"
        if scaler is not None and scaler.get_scale() > 1.0:
            why = LOSS_SCALE
    if why or not any(agreed.counts.values()):
        # Without a target anywhere there is no gradient either; momentum alone must not move the weights.
        optimizer.zero_grad(set_to_none=True)
    else:
        if spread is not None:
            spread.settle(parameters, used)
        optimizer.step()
    if scaler is not None:
        # What a loss that is not finite did to the gradient says nothing about the scale.
        scaler.update(None if unscaled and why in ("", LOSS_SCALE) else scaler.get_scale())
    return StepReport(
        loss=loss,
        losses=losses,
        grad_norm=grad_norm,
        num_tokens=agreed.num_tokens,
        num_targets=sum(agreed.counts.values()),
        sample_ids=_ids(batches),
        num_positions=agreed.num_positions,
        num_samples=agreed.num_samples,
        measures=_means(dict(zip(seen.measured, measures, strict=True)), agreed),
        groups=_by_group(groups),
        skipped=bool(why),
        why=why,
        bad_ids=_everyones(world, bad) if why not in ("", LOSS_SCALE) else (),
        asked=agreed.asked,
    )


class _Seen(NamedTuple):
    """What the passes of this rank left on the device, float64."""

    each: Tensor
    """[passes * losses], the sum of every loss in every pass."""
    sums: tuple[Tensor, Tensor, Tensor]
    """[losses]; [measures]; and [2 * num_groups], text losses and then numbers of targets."""
    measured: tuple[str, ...]
    """Names of the measures."""


def _run(
    forward: nn.Module,
    passes: Sequence[Batch],
    agreed: Agreed,
    weights: Mapping[str, float],
    device: torch.device,
    precision: Precision,
    scaler: torch.amp.GradScaler | None,
    mark: Callable[[str, int], None],
) -> _Seen:
    """Forward and backward pass of every micro-batch; nothing waits for the device."""
    spread = forward if isinstance(forward, Spread) else None
    narrow = (
        contextlib.nullcontext() if precision == "float32" else torch.autocast(device.type, DTYPES[precision])
    )
    each: list[Tensor] = []
    measures: dict[str, Tensor] = {}
    groups = torch.zeros(2, agreed.num_groups, dtype=torch.float64, device=device)
    for i, batch in enumerate(passes):
        mark("pass", i)
        if spread is not None:
            spread.before(last=i == len(passes) - 1)
        there = to_device(batch, device)
        with narrow:
            terms = forward(there)
        each += [terms.sums[name].detach() for name in agreed.counts]
        for name, value in terms.measures.items():
            measures[name] = measures.get(name, 0.0) + value.detach().double()
        if terms.per_target is not None and there.target_group is not None and agreed.num_groups:
            values = torch.stack((terms.per_target, torch.ones_like(terms.per_target)))
            groups.index_add_(1, there.target_group, values.double())
        # A factor on a loss, and what brings a mean over ranks back to a sum.
        scales = {name: weights.get(name, 1.0) * (spread.scale if spread else 1.0) for name in agreed.counts}
        means = [terms.sums[name] * scales[name] / max(count, 1) for name, count in agreed.counts.items()]
        loss = means[0] if len(means) == 1 else torch.stack(means).sum()
        # A batch without media has no gradient where only the connectors train.
        if loss.requires_grad:
            (loss if scaler is None else scaler.scale(loss)).backward()
    values = torch.stack(each).double() if each else _nothing(device)
    totals = values.view(-1, len(agreed.counts)).sum(0)
    found = torch.stack(list(measures.values())) if measures else _nothing(device)
    return _Seen(values, (totals, found, groups.flatten()), tuple(measures))


def _split(row: Sequence[float], sizes: Sequence[int]) -> list[Sequence[float]]:
    """``row`` cut into stretches."""
    ends = list(itertools.accumulate(sizes))
    return [row[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _means(sums: Mapping[str, float], agreed: Agreed) -> dict[str, float]:
    """Sums over the targets of the loss that their name is, or begins with."""
    return {name: value / max(agreed.counts[name.partition("_")[0]], 1) for name, value in sums.items()}


def _without_loss(batches: Sequence[Batch], each: Sequence[float], num_losses: int) -> list[Batch]:
    """Those whose loss is not finite."""
    starts = range(0, len(each), num_losses)
    return [
        batch
        for batch, i in zip(batches, starts, strict=False)
        if not all(map(math.isfinite, each[i : i + num_losses]))
    ]


def _unmarked(phase: str, part: int) -> None:
    """Nobody wants to know."""


def _nothing(device: torch.device) -> Tensor:
    return torch.zeros(0, dtype=torch.float64, device=device)


def _unscale(
    scaler: torch.amp.GradScaler,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Parameter],
    device: torch.device,
) -> bool:
    """Take the scale of the loss out of the gradients again; whether there were any."""
    # It begins with the first loss that is scaled: on this rank there may have been none.
    scaler.scale(torch.ones((), device=device))
    if all(p.grad is None for p in parameters):
        return False
    scaler.unscale_(optimizer)
    return True


def gradient_norm(parameters: Sequence[Parameter], device: torch.device) -> Tensor:
    """Norm of all gradients together, float32 []."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros((), device=device)
    return torch.nn.utils.get_total_norm(grads, foreach=True)


def clip_gradient(parameters: Sequence[Parameter], norm: Tensor, clip: float) -> None:
    """Scale the gradients, whose norm is ``norm``, to one of at most ``clip`` (0: leave them)."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    if clip > 0 and grads:
        # No branch on the norm: that would wait for the device.
        torch._foreach_mul_(grads, (clip / (norm + 1e-6)).clamp(max=1.0).to(grads[0].device))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """``batch`` with its tensors on ``device``; itself where they are there already."""
    if batch.input_ids.device == device:
        return batch
    return each_tensor(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _by_group(values: Sequence[float]) -> Groups:
    """The groups that have targets, of their sums and counts side by side."""
    num = len(values) // 2
    return {(i // 4, i % 4): (values[i], int(values[num + i])) for i in range(num) if values[num + i] > 0}


def _ids(batches: Sequence[Batch]) -> tuple[str, ...]:
    return tuple(name for batch in batches for name in batch.sample_ids)


def _everyones(world: World, batches: Sequence[Batch]) -> tuple[str, ...]:
    """Samples of some micro-batches, of every rank."""
    return tuple(name for names in world.gather(_ids(batches)) for name in names)
