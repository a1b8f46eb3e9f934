"""One stage on several processes: every rank holds the model, or a piece of it.

``ddp``: :class:`Replicas`. Each rank holds the whole model; gradients are added while the backward pass still
runs. It is the exchange of torch's DistributedDataParallel, without its demand that every rank uses the same
parameters: a rank without pictures runs no tower, and nobody waits for it.

``fsdp`` and ``hybrid``: :class:`~tinymodal.train.shards.Shards`. Each rank holds a piece of every tensor.

Either way the loss is the sum over all ranks and micro-batches divided by the targets of all of them, and
gradients are those that one process would compute, up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from tinymodal.core.types import Batch
from tinymodal.train.precision import Precision
from tinymodal.train.shards import Shards
from tinymodal.train.spread import Agreed, Spread, idle
from tinymodal.train.whole import full_optimizer_state, full_state, load_optimizer_state, make_whole
from tinymodal.train.world import ALONE, World, open_world

if TYPE_CHECKING:
    from tinymodal.train.objective import Objective
    from tinymodal.train.recipe import Parallel

__all__ = [
    "ALONE", "Replicas", "Shards", "World", "full_optimizer_state", "full_state", "is_sharded",
    "load_optimizer_state", "make_whole", "open_world", "parallelize",
]  # fmt: skip

BUCKET_BYTES = 25 * 2**20
"""Gradients that travel together, as in torch's DDP: few messages, and the first leaves early."""


def parallelize(
    objective: Objective, world: World, parallel: Parallel, precision: Precision = "float32"
) -> nn.Module:
    """Spread a stage's objective over the ranks. Call it when it is known what trains.

    Args:
        objective: changed in place: all ranks begin with the numbers of rank 0; with ``fsdp`` and ``hybrid``
            its parameters are others afterwards, so groups for the optimizer must be made anew.
        world: the ranks.
        parallel: how.
        precision: of the passes. Sharded weights stay float32 and are gathered in this.

    Returns:
        What ``step`` takes as ``forward``; ``objective`` itself where there is nothing to spread.
    """
    same_numbers(objective, world)
    if is_sharded(parallel, world):
        return Shards(objective, world, parallel, precision)
    return objective if world.size == 1 else Replicas(objective, world)


def is_sharded(parallel: Parallel, world: World) -> bool:
    """Whether the model lies in pieces; on one GPU it does where they are kept in the host's memory."""
    offload = parallel.offload and world.device.type == "cuda"
    return parallel.kind != "ddp" and (world.size > 1 or offload)


@torch.no_grad()
def same_numbers(objective: Objective, world: World) -> None:
    """Give every rank the tensors of rank 0 where its own differ: other machines draw other numbers."""
    if world.size == 1:
        return
    tensors = [*objective.parameters(), *objective.buffers()]
    sums = world.gather([_checksum(tensor) for tensor in tensors])
    for i, tensor in enumerate(tensors):
        if any(own[i] != sums[0][i] for own in sums):
            there = tensor.detach().contiguous().cpu()
            dist.broadcast(there.view(-1).view(torch.uint8), 0, group=world.small)
            tensor.copy_(there)


def _checksum(tensor: Tensor) -> int:
    """Sum over the bits of a tensor."""
    bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = bits[: len(bits) // 8 * 8].view(torch.int64)
    return int(whole.sum()) + int(bits[len(whole) * 8 :].sum())


class Replicas(Spread):
    """The whole model on every rank; gradients are added in buckets while the backward pass runs.

    Buckets leave in one order on all ranks: the language model's from its end, then connectors, then towers.
    A parameter that a rank did not use adds zero; one that no rank used has no gradient afterwards, as in one
    process, so the optimizer leaves it alone.
    """

    def __init__(self, objective: Objective, world: World, bucket_bytes: int = BUCKET_BYTES) -> None:
        super().__init__(objective, world)
        self._buckets = _buckets(objective, bucket_bytes)
        self._place = {id(p): i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._used: set[int] = set()
        self._open: list[int] = []
        self._left = 0
        self._work: list[Any] = []
        self._last = False
        for bucket in self._buckets:
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    def passes(self, batches: Sequence[Batch], agreed: Agreed) -> list[Batch]:
        # Something in any case: what is told of it has one form on all ranks.
        return list(batches) or [idle()]

    def before(self, last: bool) -> None:
        self._last = last
        if last:
            self._open = [len(bucket) for bucket in self._buckets]
            self._left, self._used, self._work = 0, set(), []

    def _arrived(self, parameter: Tensor) -> None:
        """The last gradient of a parameter is there."""
        if not self._last:
            return
        i = self._place[id(parameter)]
        assert i >= self._left, "a gradient came twice in one backward pass; use_reentrant=False is needed"
        self._open[i] -= 1
        while self._left < len(self._buckets) and not self._open[self._left]:
            self._send()

    def _send(self) -> None:
        """Put the next bucket on its way; its parameters' gradients are views of it from now on."""
        bucket = self._buckets[self._left]
        self._left += 1
        self._used |= {id(p) for p in bucket if p.grad is not None}
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([part.reshape(-1) for part in parts])
        for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = part.view_as(p)
        self._work.append(dist.all_reduce(flat, async_op=True))

    def after(self) -> None:
        self._last = False
        while self._left < len(self._buckets):
            self._send()
        for work in self._work:
            work.wait()
        self._work = []
        self._mean_statistics()

    def extras(self, parameters: Sequence[Parameter]) -> Tensor:
        """For each parameter whether this rank used it."""
        return torch.tensor([float(id(p) in self._used) for p in parameters], dtype=torch.float64)

    def norm(self, parameters: Sequence[Parameter], extras: Tensor) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)

    def settle(self, parameters: Sequence[Parameter], extras: Sequence[float]) -> None:
        for parameter, used in zip(parameters, extras, strict=True):
            if not used:
                parameter.grad = None


def _buckets(objective: nn.Module, bucket_bytes: int) -> list[list[Parameter]]:
    """Trained parameters in about the order in which a backward pass reaches them."""
    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    # Towers and connectors are registered behind the decoder, whose head is registered last of all.
    named = sorted(reversed(named), key=lambda item: ".towers." in item[0] or ".connectors." in item[0])
    found: list[list[Parameter]] = []
    size = 0
    for _, p in named:
        bytes_ = p.numel() * p.element_size()
        if not found or size + bytes_ > bucket_bytes or found[-1][0].dtype != p.dtype:
            found.append([])
            size = 0
        found[-1].append(p)
        size += bytes_
    return found
