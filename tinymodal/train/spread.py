"""What ranks agree on before a step, and what a step asks of an objective that is spread over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
FIELDS = {"image": ("pixel_values", "image_features"), "audio": ("audio_values", "audio_features")}
"""Kind of media -> where a batch has them: as a tower takes them, and as it gives them."""
RAW = {"image": "pixels", "audio": "samples"}


class Calls(NamedTuple):
    """What the ranks bring of one kind of media in one micro-batch."""

    most: int
    """How many shapes of tiles a rank brings at most."""
    smallest: Shape
    """The smallest tile of all; empty where there is none."""


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
    """Four times the sources of the stage; 0 where no batch says which are its targets'."""
    calls: tuple[Mapping[str, Calls], ...]
    """Of each micro-batch, for every kind of media."""
    features: frozenset[str]
    """Kinds of media that come as a tower's features."""
    asked: bool
    """Whether any rank was asked to end."""


class _Said(NamedTuple):
    """What a rank tells the others."""

    counts: tuple[int, ...]
    num_samples: int
    num_tokens: int
    num_positions: int
    num_groups: int
    tiles: tuple[dict[str, tuple[Shape, ...]], ...]
    features: frozenset[str]
    raw: frozenset[str]
    asked: bool


def agree(world: World, counts: dict[str, int], batches: Sequence[Batch], asked: bool = False) -> Agreed:
    """Tell the other ranks what this one's step holds, and learn of theirs; on the CPU, no device waits.

    Args:
        world: the ranks.
        counts: targets of each loss in ``batches``.
        batches: the micro-batches of this rank.
        asked: whether this rank was asked to end.

    Raises:
        DataError: of one kind of media, one rank has what a tower takes and another what it gives.
    """
    said = _Said(
        counts=tuple(counts.values()),
        num_samples=sum(len(batch.sample_ids) for batch in batches),
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_positions=sum(batch.input_ids.numel() for batch in batches),
        num_groups=max((4 * b.num_sources for b in batches if b.target_group is not None), default=0),
        tiles=tuple(
            {kind: tuple(tuple(same.shape[1:]) for same in tiles_of(batch, kind)) for kind in FIELDS}
            for batch in batches
        ),
        features=_has(batches, 1),
        raw=_has(batches, 0),
        asked=asked,
    )
    everyone: list[_Said] = world.gather(said)
    for kind in FIELDS:
        seen = [i for i, s in enumerate(everyone) if kind in s.features]
        raw = [i for i, s in enumerate(everyone) if kind in s.raw]
        if seen and raw:
            raise DataError(
                f"rank {seen[0]} has a tower's features in this step and rank {raw[0]} {RAW[kind]}; expected "
                f"one or the other on all. Give every rank the cache, or none."
            )
    num_passes = max(len(s.tiles) for s in everyone)
    calls = []
    for i in range(num_passes):
        of_each = [s.tiles[i] for s in everyone if i < len(s.tiles)]
        calls.append({kind: _calls([tiles[kind] for tiles in of_each]) for kind in FIELDS})
    columns = zip(*(s.counts for s in everyone), strict=True)
    return Agreed(
        counts=dict(zip(counts, map(sum, columns), strict=True)),
        num_samples=sum(s.num_samples for s in everyone),
        num_tokens=sum(s.num_tokens for s in everyone),
        num_positions=sum(s.num_positions for s in everyone),
        num_passes=num_passes,
        num_groups=max(s.num_groups for s in everyone),
        calls=tuple(calls),
        features=frozenset[str]().union(*(s.features for s in everyone)),
        asked=any(s.asked for s in everyone),
    )


def _has(batches: Sequence[Batch], field: int) -> frozenset[str]:
    return frozenset(
        kind
        for kind, fields in FIELDS.items()
        if any(getattr(batch, fields[field]) is not None for batch in batches)
    )


def _calls(of_each: Sequence[tuple[Shape, ...]]) -> Calls:
    shapes = [shape for tiles in of_each for shape in tiles]
    smallest = min(shapes, key=lambda s: (torch.Size(s).numel(), s), default=())
    return Calls(max(map(len, of_each)), smallest)


def tiles_of(batch: Batch, kind: str = "image") -> tuple[Tensor, ...]:
    """What a batch has of a kind of media, one tensor for each shape of tile: raw or as features."""
    raw, features = (getattr(batch, field) for field in FIELDS[kind])
    values: Tensor | tuple[Tensor, ...] | None = raw if features is None else features
    if values is None:
        return ()
    return (values,) if isinstance(values, Tensor) else values


def idle() -> Batch:
    """A batch of one token, without targets or media: for a rank that has nothing left to do."""
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
        """Running statistics of norms are the mean over the ranks: each has perceived other media."""
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
