"""A piece of the model on every rank, gathered block by block: torch's FSDP2 (``fully_shard``).

There the passes themselves are shared work: a block that one rank runs alone waits for the others for ever.
So a rank that has no picture or no sound where another has one runs a blank tile, which no word looks at; its
gradient is zero, and how often is agreed before the step. Where only some ranks have spoken answers, the
others give the speech head a gradient of zero as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from tinymodal.compose.quantize import is_quantized
from tinymodal.core.types import IGNORE, Batch
from tinymodal.model.connectors import find_connector
from tinymodal.model.geometry import num_tokens
from tinymodal.model.media import MediaEncoder
from tinymodal.train.groups import blocks
from tinymodal.train.precision import DTYPES, Precision
from tinymodal.train.spread import FIELDS, Agreed, Calls, Shape, Spread, idle, local, tiles_of
from tinymodal.train.world import World

if TYPE_CHECKING:
    from tinymodal.train.objective import Objective
    from tinymodal.train.recipe import Parallel

LOCAL_SHARE = 0.1
"""Of a GPU's memory: what gradients of a whole model may take there, so that sharded ones need to be reduced
only once a step. Larger ones are reduced with every micro-batch, and each rank keeps its piece."""


class Shards(Spread):
    """A piece of the model on every rank, gathered block by block (FSDP2).

    Blocks of the decoder and of a tower that trains are gathered one by one; embeddings, head, connectors and
    all that is left once a pass, since the objective reads the head's matrix itself. A frozen tower and
    rounded layers stay whole on every rank: they need no exchange, and a tower can run outside of a step, to
    fill a cache.
    """

    def __init__(
        self, objective: Objective, world: World, parallel: Parallel, precision: Precision = "float32"
    ) -> None:
        # Here: it takes two seconds to import, which runs without shards need not wait for.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        super().__init__(objective, world)
        on_gpu = world.device.type == "cuda"
        self.copies = world.size // world.local_size if parallel.kind == "hybrid" else 1
        kind = world.device.type
        if self.copies > 1:
            mesh = init_device_mesh(kind, (self.copies, world.local_size), mesh_dim_names=("copy", "shard"))
        else:
            mesh = init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))

        model = objective.model.model
        towers = [t for t in model.towers.values() if isinstance(t, MediaEncoder)]
        trained = [tower for tower in towers if any(p.requires_grad for p in tower.parameters())]
        kinds = {id(tower): kind for kind, tower in model.towers.items()}
        self._shared = {kinds[id(tower)] for tower in trained}
        """Kinds of media whose tower lies in pieces."""
        heads = [objective.heads] if objective.heads is not None else []
        self._perceiving = {
            kind
            for kind in model.towers
            if any(p.requires_grad for part in _senses(objective, kind, heads) for p in part.parameters())
        }
        """Kinds of media of which something trains before the words."""
        whole = {p for tower in towers if tower not in trained for p in tower.parameters()}
        whole |= {p for m in objective.modules() if is_quantized(m) for p in m.parameters(recurse=False)}
        for parameter in whole:
            if parameter.device != world.device:
                parameter.data = parameter.data.to(world.device)

        dtype = DTYPES.get(precision)
        options: dict[str, Any] = {
            "mesh": mesh,
            # Inputs keep their type: what the residual stream adds up in is autocast's choice, as without.
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
            ),
            "offload_policy": CPUOffloadPolicy() if parallel.offload and on_gpu else OffloadPolicy(),
            "ignored_params": whole,
        }
        for part in (model.language_model, *(single for tower in trained for single in _single(tower))):
            for block in blocks(part):
                fully_shard(block, reshard_after_forward=parallel.reshard, **options)
        # The head's matrix is the last thing a forward pass reads and the first of the backward pass.
        fully_shard(objective, reshard_after_forward=False, **options)
        for buffer_owner in objective.modules():
            for name, buffer in buffer_owner.named_buffers(recurse=False):
                if buffer.device != world.device:
                    buffer_owner._buffers[name] = buffer.to(world.device)

        gradient_bytes = sum(4 * p.numel() for p in objective.parameters() if p.requires_grad)
        room = torch.cuda.mem_get_info(world.device)[1] * LOCAL_SHARE if on_gpu else float("inf")
        self._reduces_once = gradient_bytes <= room and not parallel.offload
        self._fsdp: Any = objective

    @property
    def scale(self) -> float:
        """FSDP takes the mean over the ranks."""
        return float(self.world.size)

    def passes(self, batches: Sequence[Batch], agreed: Agreed) -> list[Batch]:
        padded = [*batches, *(idle() for _ in range(agreed.num_passes - len(batches)))]
        self.objective.always_speaks = agreed.counts.get("speech", 0) > 0
        for kind in sorted(self._perceiving):
            calls = [each[kind] for each in agreed.calls]
            shown = [call for call in calls if call.most]
            if not shown:
                continue
            if not calls[-1].most:
                # Gradients are summed in the last pass, so what an earlier one used must take part in it.
                calls[-1] = Calls(1, shown[0].smallest)
            padded = [
                self._with_blanks(batch, kind, call, kind in agreed.features)
                for batch, call in zip(padded, calls, strict=True)
            ]
        return padded

    def _with_blanks(self, batch: Batch, kind: str, call: Calls, features: bool) -> Batch:
        """``batch`` with so many blank tiles that tower and connector run as often as on other ranks."""
        own, tile = tiles_of(batch, kind), call.smallest
        wanted = call.most if kind in self._shared and not features else min(call.most, 1)
        missing = wanted - len(own)
        if missing <= 0:
            return batch
        device, heads = batch.input_ids.device, self.objective.heads
        blank = torch.zeros(1, *tile, device=device)
        tokens = self._tokens(kind, tile, features)
        take, put = getattr(batch, f"{kind}_take"), getattr(batch, f"{kind}_put")
        targets = batch.image_targets
        if not own:
            take = put = torch.empty(0, dtype=torch.int64, device=device)
            if heads is not None and kind == "image":
                # Labels that say nothing: heads, connectors and tower get a gradient, and it is zero.
                targets = torch.full((missing, tokens, len(heads.classes)), IGNORE, device=device)
        elif take is not None:
            # Blanks stand before the others, so everything behind them, marks included, moves by as much.
            take = take + missing * tokens
        tiles = (*[blank] * missing, *own)
        values = tiles[0] if len(tiles) == 1 else tiles
        name = FIELDS[kind][features]
        changed: dict[str, Any] = {name: values, f"{kind}_take": take, f"{kind}_put": put}
        return dataclasses.replace(batch, **changed, image_targets=targets)

    def _tokens(self, kind: str, tile: Shape, features: bool) -> int:
        """Embeddings that a tile gives."""
        model = self.objective.model.model
        if not features:
            return model.tokens_of(kind, tile[1:])
        chosen = model.config.connectors[kind]
        return num_tokens(find_connector(chosen["name"]).shrink(tile[:-1], **chosen["options"]))

    def before(self, last: bool) -> None:
        if self._reduces_once:
            self._fsdp.set_requires_gradient_sync(last)
        else:
            # Between nodes, where it is slow, still only once.
            self._fsdp.set_requires_all_reduce(last)

    def after(self) -> None:
        self._mean_statistics()

    def extras(self, parameters: Sequence[Parameter]) -> Tensor:
        """The square of the norm of this rank's pieces."""
        pieces = [local(p.grad) for p in parameters if p.grad is not None]
        if not pieces:
            return torch.zeros(1, dtype=torch.float64)
        square = torch.nn.utils.get_total_norm(pieces, foreach=True).double() ** 2
        return (square / self.copies).view(1)

    def norm(self, parameters: Sequence[Parameter], extras: Tensor) -> Tensor:
        return extras[0].sqrt().float()


def _senses(objective: Objective, kind: str, heads: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The parts that media of a kind go through before they are words."""
    body: Any = objective.model.model
    for parts in (body.towers, body.connectors, body.marks):
        if kind in parts:
            yield parts[kind]
    if kind == "image":
        yield from heads


def _single(tower: nn.Module) -> Iterator[nn.Module]:
    """The towers that stand side by side in one; else itself."""
    inner: list[nn.Module] = [m for m in tower.modules() if isinstance(m, MediaEncoder) and m is not tower]
    yield from inner or [tower]
