"""Our way: the engine as a recipe's stage runs it, without the files around it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.shapes import IMAGE_TOKEN, PAD, Kind, Made, Shape, as_it_is
from tinymodal.core.types import Batch, Encoded
from tinymodal.data.loader import Loader
from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration
from tinymodal.train import adapters
from tinymodal.train.groups import trainable
from tinymodal.train.lean import lean
from tinymodal.train.objective import Objective
from tinymodal.train.optim import build_optimizer, set_rates
from tinymodal.train.precision import DTYPES, Narrow, Precision
from tinymodal.train.recipe import Stage
from tinymodal.train.recompute import Recompute, set_recompute
from tinymodal.train.step import StepReport, step

ROWS = 2
"""Rows of a micro-batch: together about as long as eight samples."""
TRAIN: dict[Kind, dict[str, float]] = {
    "pretrain": {"connectors": 1e-3},
    "sft": {"connectors": 2e-5, "language": 2e-5},
}
LORA = {"rank": 128, "alpha": 256}
"""TinyLLaVA's, on every linear layer of the language model."""
SETTLE = 2
"""Batches left out at the beginning: the packer closes its fullest rows first, and has not met them all."""


def stage_of(shape: Shape, kind: Kind, **keys: Any) -> Stage:
    """The stage of a recipe that trains as ``kind`` says."""
    values = {
        "name": kind,
        "train": TRAIN[kind],
        "steps": 1,
        "seq_len": shape.seq_len,
        "batch_tokens": ROWS * shape.seq_len,
        "data": [{"made": "benchmarks/shapes.py:Made"}],
    }
    return Stage.model_validate(values | keys)


class Data:
    """The micro-batches of one step, as often as they are wanted, and the samples that are in them."""

    def __init__(
        self, shape: Shape, kind: Kind, num_batches: int, seed: int = 0, num_rows: int = ROWS
    ) -> None:
        self.num_batches = num_batches
        source = Made(shape, kind, seed)
        self.loader = Loader(
            [source],
            as_it_is,
            seq_len=shape.seq_len,
            batch_tokens=num_rows * shape.seq_len,
            pad_id=PAD,
            image_token_id=IMAGE_TOKEN,
        )
        for _ in range(SETTLE):
            next(self.loader)
        self._start = self.loader.state_dict()
        names = sorted({int(n.partition("/")[2]) for batch in self.batches() for n in batch.sample_ids})
        self.samples: list[Encoded] = [source.sample(n) for n in names]
        """In the order they were drawn."""

    def batches(self) -> list[Batch]:
        """Packed and collated anew."""
        self.loader.load_state_dict(self._start)
        return list(islice(self.loader, self.num_batches))


class Ours:
    """A model in training, with all that makes it fast."""

    def __init__(
        self,
        model: TinyModalForConditionalGeneration,
        stage: Stage,
        recompute: Recompute = "none",
        precision: Precision = "float32",
    ) -> None:
        self.model, self.precision = model, precision
        if stage.lora is not None:
            adapters.inject(model, stage.lora)
        self.objective = Objective(model)
        set_recompute(model, recompute)
        groups = trainable(model, stage.train)
        unread = isinstance(next(model.parameters()), FakeTensor)
        with _Agreeable() if unread else contextlib.nullcontext():
            self.lean = lean(self.objective)
            # After the forwards were tried: a module of two data types works under autocast only.
            self.narrow = Narrow(model, precision, spare=(model.head_weight(),))
        self.optimizer = build_optimizer(groups, stage)
        set_rates(self.optimizer, 0.0)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def step(self, batches: Sequence[Batch]) -> StepReport:
        """One optimizer step."""
        return step(self.objective, self.optimizer, batches, precision=self.precision)

    def passes(self, batches: Sequence[Batch]) -> None:
        """Forward and backward pass alone."""
        for batch in batches:
            with autocast("cpu", self.precision):
                loss = self.objective(batch).sums["text"]
            if loss.requires_grad:
                loss.backward()


def autocast(device: str, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """What the passes compute in."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device, DTYPES[precision])


@contextlib.contextmanager
def unreal(*modules: torch.nn.Module) -> Iterator[FakeTensorMode]:
    """Inside, modules that were made on ``meta`` compute with tensors that have shapes and no numbers.

    They believe to be on the CPU, so what they call is what they would call there. What the engine tries out
    before it trusts it cannot be tried without numbers, and is trusted; whoever counts compares
    ``Ours.lean.lines`` with those of a model that has some.
    """
    with FakeTensorMode() as mode:
        made: dict[int, torch.nn.Parameter] = {}
        for part in (part for module in modules for part in module.modules()):
            for name, p in part._parameters.items():
                if p is not None:
                    if id(p) not in made:
                        made[id(p)] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
                    part._parameters[name] = made[id(p)]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        yield mode


class _Agreeable(TorchDispatchMode):
    """Answers what is asked of a tensor without numbers: every condition holds, every difference is 0."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
        return func(*args, **(kwargs or {}))


def without_numbers(mode: FakeTensorMode, batch: Any) -> Any:
    """A batch, ours or a plain one, with tensors that have shapes only."""
    if isinstance(batch, tuple):
        return type(batch)(*(mode.from_tensor(v) if isinstance(v, Tensor) else v for v in batch))
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    changed = {name: mode.from_tensor(value) for name, value in fields.items() if isinstance(value, Tensor)}
    return dataclasses.replace(batch, **changed)
