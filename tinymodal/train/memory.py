"""Bytes that a step holds: counted on tensors without numbers, before anything real is computed.

A step is run on fake tensors (``torch._subclasses``): they have shapes and no memory, so every operator of
the model, of its loss and of its backward pass is seen with its true sizes in a few seconds, whatever the
model weighs. What is alive at the worst moment is the answer. Weights and the optimizer's state are counted
from the parameters. The same counter on a real step gives what the estimate is tested against.

Not in it: what an allocator rounds up, the libraries' own workspaces (some 100 MB on a GPU), this process
without tensors, a teacher's weights, and the copy of the model that saving in the background keeps in the
host's memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinymodal.compose.quantize import is_quantized
from tinymodal.core.types import Batch
from tinymodal.train.precision import DTYPES, PRODUCTS, Precision
from tinymodal.train.teacher import Itself

if TYPE_CHECKING:
    from tinymodal.train.objective import Objective
    from tinymodal.train.recipe import Stage

LEAST_8BIT = 4096
"""Weights of a tensor from which on ``adamw8bit`` uses 8 bits (``min_8bit_size`` of bitsandbytes)."""
SAFE = 0.85
"""Share of the free memory that ``micro_batch_tokens = "auto"`` plans with."""


class Memory(NamedTuple):
    """Bytes that one process holds in the course of a step."""

    weights: int
    """For ``dpo`` twice: the model that the stage began with stays beside the one that trains."""
    optimizer: int
    """What it keeps between steps."""
    working: int
    """Activations, gradients and the batch at the worst moment of forward and backward pass."""

    @property
    def total(self) -> int:
        return sum(self)


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are alive; ``most`` is the largest number so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for result in tree_leaves(out):
            if not isinstance(result, Tensor):
                continue
            storage = result.untyped_storage()
            key = storage._cdata
            if key in self._alive:
                continue
            if given is None:
                given = {
                    t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
                }
            if key not in given:
                self.add(storage)
        return out

    def add(self, storage: Any) -> None:
        """Count a storage until it is freed."""
        self._alive[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


def estimate(
    objective: Objective,
    groups: Sequence[Mapping[str, Any]],
    stage: Stage,
    precision: Precision,
    batch: Batch,
    rows: int | None = None,
    num_micro_batches: int = 1,
) -> Memory:
    """What one step of a stage holds on its device.

    Args:
        objective: as it trains: adapters in place, frozen parts frozen, forwards swapped. Not changed.
        groups: of ``groups.trainable``: what the optimizer holds.
        stage: its optimizer and bits.
        precision: of the passes.
        batch: some rows of the stage; the micro-batch is taken to be made of rows like these.
        rows: rows of a micro-batch; None: those of ``batch``.
        num_micro_batches: of a step; from the second on gradients lie beside the activations.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    narrow = contextlib.nullcontext() if precision == "float32" else torch.autocast("cpu", DTYPES[precision])
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    held = _held(objective, precision)
    with mode, _alone(objective, stage):
        tensors = {
            name: _fake(tensor, held.get(id(tensor), tensor.dtype))
            for name, tensor in (*objective.named_parameters(), *objective.named_buffers())
        }
        seen = _repeated(batch, rows or len(batch.input_ids))
        with Live() as live:
            for value in tree_leaves([getattr(seen, field.name) for field in dataclasses.fields(seen)]):
                if isinstance(value, Tensor):
                    live.add(value.untyped_storage())
            for _ in range(min(num_micro_batches, 2)):
                with narrow:
                    terms = torch.func.functional_call(objective, tensors, (seen,), tie_weights=True)
                    loss = torch.stack(list(terms.sums.values())).sum()
                del terms
                if loss.requires_grad:
                    loss.backward()
                del loss
    weights = _weights(objective, stage, held)
    if "dpo" in stage.loss:
        wide = {id(module.weight) for module in objective.modules() if isinstance(module, PRODUCTS)}
        frozen = held if precision == "float32" else held | dict.fromkeys(wide, DTYPES[precision])
        weights += _weights(objective, stage, frozen)
    return Memory(weights, _state(groups, stage), live.most)


@contextlib.contextmanager
def _alone(objective: Objective, stage: Stage) -> Iterator[None]:
    """``objective`` with nothing beside its own tensors: rounded layers and other models have stand-ins.

    What stands in for the model before ``dpo`` and for a teacher is the objective's own, read without
    gradients: of a larger teacher's pass a little is missing.
    """
    reference, teacher = objective.reference, objective.teacher
    rounded: list[Any] = [layer for layer in objective.modules() if is_quantized(layer)]
    if "dpo" in stage.loss:
        objective.reference = lambda batch: _before(objective, batch)
    if stage.teacher is not None:
        objective.teacher = Itself(objective, stage.teacher.temperature, stage.teacher.top_k)
    for layer in rounded:
        layer.forward = partial(_as_whole, layer)
    mouth: Any = getattr(objective.model, "speech_head", None)
    aligns = hasattr(mouth, "align")
    if aligns:
        # Its sizes depend on what tensors hold, which here is nothing.
        mouth.align = _aligned
    try:
        yield
    finally:
        objective.reference, objective.teacher = reference, teacher
        for layer in rounded:
            del layer.forward
        if aligns:
            del mouth.align


@torch.no_grad()
def _before(objective: Objective, batch: Batch) -> Tensor:
    return objective.log_probs(objective.states(batch), batch)


def _as_whole(layer: Any, x: Tensor) -> Tensor:
    found: Tensor = _Whole.apply(x, layer.out_features)
    return found if layer.bias is None else found + layer.bias


class _Whole(torch.autograd.Function):
    """A product with a rounded matrix: made whole in either pass, and kept for neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_out: int) -> Tensor:
        ctx.dtype, ctx.shape = x.dtype, (num_out, x.shape[-1])
        narrow = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if narrow else x.dtype
        return x.to(dtype) @ torch.empty(ctx.shape, dtype=dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        return (gradient @ gradient.new_empty(ctx.shape)).to(ctx.dtype), None


def _aligned(said_LZV: Tensor, units_G: Tensor, places: Sequence[int], frames: Sequence[int]) -> Tensor:
    found: Tensor = _Aligned.apply(said_LZV, max(frames))
    return found


class _Aligned(torch.autograd.Function):
    """CTC: either pass holds a number for each place, answer, and unit or gap between units."""

    @staticmethod
    def forward(ctx: Any, said_LZV: Tensor, longest: int) -> Tensor:
        length, answers, _ = said_LZV.shape
        ctx.save_for_backward(said_LZV, said_LZV.new_empty(answers, length, 2 * longest + 1))
        return said_LZV.new_empty(answers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        said_LZV, ways = ctx.saved_tensors
        torch.empty_like(ways)
        return torch.empty_like(said_LZV), None


def measured(step: Callable[[], object]) -> int:
    """Most bytes of the tensors that ``step`` made on a CPU, at once; the estimate's ``working``."""
    with Live() as live:
        step()
    return live.most


def free_bytes(device: torch.device) -> int:
    """Memory that a process may still take on ``device``: the card's free bytes, or the host's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def largest_micro_batch(sizes: Sequence[int], needed: Callable[[int], int], free: int) -> int | None:
    """The first of ``sizes`` (largest first) whose ``needed`` bytes fit ``SAFE`` of ``free``; else None."""
    return next((size for size in sizes if needed(size) <= SAFE * free), None)


def _held(objective: nn.Module, precision: Precision) -> dict[int, torch.dtype]:
    """Frozen weights that ``precision.Narrow`` holds in 16 bits, by identity."""
    if precision == "float32":
        return {}
    return {
        id(module.weight): DTYPES[precision]
        for module in objective.modules()
        if isinstance(module, PRODUCTS)
        and not module.weight.requires_grad
        and module.weight.dtype == torch.float32
    }


def _fake(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=dtype)
    return fake.requires_grad_(tensor.requires_grad) if dtype.is_floating_point else fake


def _repeated(batch: Batch, rows: int) -> Batch:
    """``batch`` with so many rows, one after the other again, as tensors without numbers."""
    times = rows / len(batch.input_ids)

    per_row = _documents_of_rows(batch)
    chosen = [n for row in range(rows if per_row else 0) for n in per_row[row % len(per_row)]]
    lengths = tuple(batch.lengths[n] for n in chosen)
    reach = tuple(batch.reach[n] for n in chosen) if batch.reach else ()

    # Answers as they are, over and over: how long each is decides what is computed.
    answers = max(round(len(batch.speech_tokens) * times), 1) if batch.speech_tokens else 0
    own = range(len(batch.speech_tokens))
    tokens = tuple(batch.speech_tokens[own[n % len(own)]] for n in range(answers))
    frames = tuple(batch.speech_frames[own[n % len(own)]] for n in range(answers))

    def longer(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(longer(name, one) for one in value)
        if not isinstance(value, Tensor):
            return value
        first = max(round(value.shape[0] * times), 1 if value.shape[0] else 0)
        if reach and name.startswith("target_"):
            first = sum(count for _, count in reach)
        if name == "speech_codes":
            return torch.zeros(len(value), sum(frames), dtype=value.dtype)
        if name in ("speech_take", "speech_voices"):
            first = sum(tokens) if name == "speech_take" else len(tokens)
        return torch.empty((first, *value.shape[1:]), dtype=value.dtype)

    found = {
        field.name: longer(field.name, value)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor | tuple)
        and field.name not in ("sample_ids", "lengths", "reach", "speech_tokens", "speech_frames")
    }
    found |= {"speech_tokens": tokens, "speech_frames": frames, "lengths": lengths, "reach": reach}
    return dataclasses.replace(batch, **found)


def _documents_of_rows(batch: Batch) -> list[list[int]]:
    """The numbers of the documents in each row."""
    rows: list[list[int]] = []
    room = 0
    for number, length in enumerate(batch.lengths):
        if room <= 0:
            rows.append([])
            room = batch.input_ids.shape[1]
        rows[-1].append(number)
        room -= length
    return rows


def _weights(objective: Objective, stage: Stage, held: Mapping[int, torch.dtype]) -> int:
    language: Any = objective.model.model.language_model
    rounded: set[int] = set()
    if stage.bits is not None:
        linear = (m for m in language.modules() if isinstance(m, nn.Linear))
        rounded = {id(m.weight) for m in linear if m.weight.is_floating_point()}
    total = 0.0
    for parameter in objective.parameters():  # a shared one once
        size: float = held.get(id(parameter), parameter.dtype).itemsize
        if id(parameter) in rounded and stage.bits is not None:
            size = stage.bits / 8
        total += parameter.numel() * size
    return round(total)


def _state(groups: Sequence[Mapping[str, Any]], stage: Stage) -> int:
    total = 0
    for parameter in (p for group in groups for p in group["params"]):
        count = parameter.numel()
        if stage.optimizer == "adafactor":
            vector = parameter.ndim < 2
            total += 4 * (count if vector else count // parameter.shape[-1] + count // parameter.shape[-2])
        elif stage.optimizer == "adamw8bit" and count >= LEAST_8BIT:
            total += 2 * count
        else:
            total += 8 * count
    return total
