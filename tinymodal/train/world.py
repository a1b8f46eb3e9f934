"""The processes of a run: which one this is, and the small words that they exchange.

``torchrun`` starts them and says in the environment who each is. Tensors on a GPU travel by NCCL. What the
processes must agree on are a few whole numbers a step, on the CPU: they have a group of their own (gloo), so
that nobody waits for a device to learn them.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tinymodal.core.errors import RecipeError, TinyModalError

if TYPE_CHECKING:
    from tinymodal.train.recipe import Parallel

FOREVER = timedelta(days=7)
"""What a collective may take. Not what ends a run that stands still: that is ``stall.Watchdog``, which can
say why, while this would end one whose rank 0 evaluates for an hour."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this node."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_size: int = 1
    """Processes on this node."""
    store: Any = None
    """Where the processes met; None where nobody else was to come."""
    small: Any = None
    """The group for words on the CPU."""

    @property
    def main(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each of ``values`` added over the ranks, in float64: whole numbers are exact up to 2**53."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Each of ``values``, the largest over the ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in their order. Small things: it is pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.small)
        return found

    def barrier(self) -> None:
        """Return when every rank is here."""
        if self.size > 1:
            self.sum([0.0])

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        if self.size == 1:
            return [float(value) for value in values]
        row = torch.tensor([float(value) for value in values], dtype=torch.float64)
        dist.all_reduce(row, how, group=self.small)
        found: list[float] = row.tolist()
        return found


ALONE = World()
"""One process on a CPU."""


@contextmanager
def open_world(parallel: Parallel, device: str) -> Iterator[World]:
    """Meet the other processes that ``torchrun`` started; alone where it did not.

    Args:
        parallel: how long to wait for them, and whether the model will be sharded.
        device: ``cpu`` or ``cuda``; of several GPUs this process takes the one of its local rank.

    Raises:
        RecipeError: more processes on a node than it has GPUs.
        TinyModalError: processes that did not come in time; names them.
    """
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        with _alone(parallel, device) as world:
            yield world
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    own = _own_device(device, local_rank, local_size)
    store = _meet(rank, size, parallel.timeout_s)
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    groups = dist.PrefixStore("groups", store)
    dist.init_process_group(backend, store=groups, rank=rank, world_size=size, timeout=FOREVER)
    small = dist.new_group(backend="gloo", timeout=FOREVER)
    yield World(rank, size, local_rank, own, local_size, store, small)
    # Not on the way out of an error: it could wait for ranks that wait for this one.
    dist.destroy_process_group()


@contextmanager
def _alone(parallel: Parallel, device: str) -> Iterator[World]:
    """One process. Offloading shards over a group, be it of one."""
    own = _own_device(device, 0, 1)
    if not (parallel.offload and own.type == "cuda"):
        yield World(device=own)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(device=own)
    finally:
        dist.destroy_process_group()


def _own_device(device: str, local_rank: int, local_size: int) -> torch.device:
    if device != "cuda":
        return torch.device(device)
    count = torch.cuda.device_count()
    if local_size > count:
        raise RecipeError(
            f"{local_size} processes on {platform.node()}, but torch sees {count} GPUs there; start it with "
            f"torchrun --nproc-per-node {max(count, 1)}"
        )
    # Alone it stays on the GPU that is current: whoever calls may have chosen one.
    chosen = local_rank if local_size > 1 or local_rank else torch.cuda.current_device()
    torch.cuda.set_device(chosen)
    return torch.device("cuda", chosen)


def _meet(rank: int, size: int, timeout_s: float) -> Any:
    """The store of the run, when all have written their names into it."""
    wait = timedelta(seconds=timeout_s)
    try:
        store, *_ = next(dist.rendezvous("env://", rank, size, timeout=wait))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        first = str(error).splitlines()[0]
        raise TinyModalError(
            f"rank {rank} of {size} on {platform.node()}: the processes did not meet at {where} within "
            f"{timeout_s:g} s ({first}). See that all of them were started and can reach that address."
        ) from error
    store.set_timeout(wait)
    store.set(f"here/{rank}", platform.node())
    every = [f"here/{other}" for other in range(size)]
    try:
        store.wait(every, wait)
    except RuntimeError as error:
        missing = [other for other in range(size) if not store.check([every[other]])]
        raise TinyModalError(
            f"rank {rank} of {size} on {platform.node()}: no sign of rank "
            f"{', '.join(map(str, missing[:8]))} within {timeout_s:g} s. See why it did not start; raise "
            f"parallel.timeout_s if it needs longer."
        ) from error
    return store
