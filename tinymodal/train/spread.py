"""What ranks agree on before a step, and what a step asks of an objective that is spread over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from tinymodal.core.errors import DataError
from tinymodal.core.types import IGNORE, Batch
from tinymodal.train.world import World

if TYPE_CHECKING:
    from tinymodal.train.objective import Objective, Terms

Shape = tuple[int, ...]


class Agreed(NamedTuple):
    """What all ranks know about a step before it begins."""

    counts: dict[str, int]
    """Targets of each loss, of all ranks and micro-batches."""
    num_samples: int
    num_tokens: int
    num_positions: int
    num_passes: int
    """Micro-batches of the rank that has most."""
    num_groups: int
    """Twice the sources of the stage; 0 where no batch says which are its targets'."""
    calls: tuple[tuple[int, Shape], ...]
    """Of each micro-batch: how many shapes of tiles a rank brings at most, and the smallest tile of all."""
    features: bool
    """Whether tiles come as a tower's features."""
    asked: bool
    """Whether any rank was asked to end."""


class _Said(NamedTuple):
    """What a rank tells the others."""

    counts: tuple[int, ...]
    num_samples: int
    num_tokens: int
    num_positions: int
    num_groups: int
    tiles: tuple[tuple[Shape, ...], ...]
    features: bool
    pixels: bool
    asked: bool


def agree(world: World, counts: dict[str, int], batches: Sequence[Batch], asked: bool = False) -> Agreed:
    """Tell the other ranks what this one's step holds, and learn of theirs; on the CPU, no device waits.

    Args:
        world: the ranks.
        counts: targets of each loss in ``batches``.
        batches: the micro-batches of this rank.
        asked: whether this rank was asked to end.

    Raises:
        DataError: one rank has pixels and another features.
    """
    said = _Said(
        counts=tuple(counts.values()),
        num_samples=sum(len(batch.sample_ids) for batch in batches),
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_positions=sum(batch.input_ids.numel() for batch in batches),
        num_groups=max((2 * b.num_sources for b in batches if b.target_group is not None), default=0),
        tiles=tuple(tuple(tuple(same.shape[1:]) for same in tiles_of(batch)) for batch in batches),
        features=any(batch.image_features is not None for batch in batches),
        pixels=any(batch.pixel_values is not None for batch in batches),
        asked=asked,
    )
    everyone: list[_Said] = world.gather(said)
    seen, raw = ([i for i, s in enumerate(everyone) if getattr(s, w)] for w in ("features", "pixels"))
    if seen and raw:
        raise DataError(
            f"rank {seen[0]} has a tower's features in this step and rank {raw[0]} pixels; expected one or "
            f"the other on all. Give every rank the cache, or none."
        )
    num_passes = max(len(s.tiles) for s in everyone)
    calls = []
    for i in range(num_passes):
        of_each = [s.tiles[i] for s in everyone if i < len(s.tiles)]
        shapes = [shape for tiles in of_each for shape in tiles]
        smallest = min(shapes, key=lambda s: (torch.Size(s).numel(), s), default=())
        calls.append((max(map(len, of_each)), smallest))
    columns = zip(*(s.counts for s in everyone), strict=True)
    return Agreed(
        counts=dict(zip(counts, map(sum, columns), strict=True)),
        num_samples=sum(s.num_samples for s in everyone),
        num_tokens=sum(s.num_tokens for s in everyone),
        num_positions=sum(s.num_positions for s in everyone),
        num_passes=num_passes,
        num_groups=max(s.num_groups for s in everyone),
        calls=tuple(calls),
        features=bool(seen),
        asked=any(s.asked for s in everyone),
    )


def tiles_of(batch: Batch) -> tuple[Tensor, ...]:
    """What a batch shows, one tensor for each shape of tile: pixels or features."""
    values = batch.pixel_values if batch.image_features is None else batch.image_features
    if values is None:
        return ()
    return (values,) if isinstance(values, Tensor) else values


def idle() -> Batch:
    """A batch of one token, without targets or pictures: for a rank that has nothing left to do."""
    none = torch.empty(0, dtype=torch.int64)
    return Batch(
        input_ids=torch.zeros(1, 1, dtype=torch.int64),
        labels=torch.full((1, 1), IGNORE),
        position_ids=torch.zeros(1, 1, dtype=torch.int64),
        pixel_values=None,
        image_take=None,
        image_put=None,
        target_index=none,
        target_ids=none,
        image_targets=None,
        sample_ids=(),
        num_tokens=0,
        lengths=(1,),
        target_document=none,
        target_group=none,
    )


class Spread(nn.Module):
    """An objective on several ranks: what ``step`` asks of it beside the forward pass."""

    def __init__(self, objective: Objective, world: World) -> None:
        super().__init__()
        self.objective, self.world = objective, world

    def forward(self, batch: Batch) -> Terms:
        terms: Terms = self.objective(batch)
        return terms

    def passes(self, batches: Sequence[Batch], agreed: Agreed) -> list[Batch]:
        """What this rank runs so that no other one waits for it."""
        return list(batches)

    @property
    def scale(self) -> float:
        """What the loss is multiplied by, so that gradients are sums over the ranks."""
        return 1.0

    def before(self, last: bool) -> None:
        """A micro-batch begins; ``last``: its backward pass ends with gradients that are summed."""

    def after(self) -> None:
        """The last backward pass is over: see that every gradient is the sum over the ranks."""

    def extras(self, parameters: Sequence[Parameter]) -> Tensor:
        """What this rank adds to the sums at the end of a step, float64 [X], beside its losses."""
        raise AssertionError("a subclass says")

    def norm(self, parameters: Sequence[Parameter], extras: Tensor) -> Tensor:
        """Norm of the whole gradient, float32 []; ``extras`` are summed over the ranks."""
        raise AssertionError("a subclass says")

    def settle(self, parameters: Sequence[Parameter], extras: Sequence[float]) -> None:
        """The sums have arrived on the CPU; the optimizer is next."""

    @torch.no_grad()
    def _mean_statistics(self) -> None:
        """Running statistics of norms are the mean over the ranks: each has seen other pictures."""
        moving = [
            buffer
            for module in self.objective.modules()
            if module.training and getattr(module, "running_mean", None) is not None
            for buffer in module.buffers(recurse=False)
            if buffer.is_floating_point()
        ]
        for buffer in moving:
            dist.all_reduce(buffer)
            buffer /= self.world.size


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a sharded tensor; another tensor itself."""
    piece: Any = tensor
    found: Tensor = piece.to_local() if hasattr(tensor, "to_local") else tensor
    return found
