"""What a step holds at its worst moment: ours against the plain way, in the real sizes.

    python benchmarks/memory.py             both shapes and stages
    python benchmarks/memory.py --quick     the second stage in bfloat16 alone

Counted on tensors that have shapes and no numbers, operator by operator: what is alive, and for how long.
Nothing is allocated: a laptop tells what a large card would hold, but for what its allocator rounds up and
its libraries' own workspaces. A micro-batch is two rows of 4,096 positions for ours, and the eight samples of
TinyLLaVA's second stage for the plain way; our activations are told for eight samples too. Weights that train
and their gradients are float32 in both; frozen ones lie in 16 bits where the passes do.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import ours as engine
from benchmarks.measure import Counts, Row, begin, count, finish, less, words
from benchmarks.shapes import REAL, TOY, Kind, Shape
from benchmarks.train_step import MICRO_BATCH, micro_batches, plain_way
from tinymodal.train.precision import Precision
from tinymodal.train.recompute import Recompute

OPTIMIZERS: dict[str, Callable[[Tensor], float]] = {
    "adamw": lambda p: 8 * p.numel(),
    "adamw8bit": lambda p: (2 if p.numel() >= 4096 else 8) * p.numel(),
    "adafactor": lambda p: (
        4 * (p.numel() if p.ndim < 2 else p.numel() / p.shape[-1] + p.numel() / p.shape[-2])
    ),
}
"""Bytes that an optimizer keeps for a tensor, see ``tinymodal/train/optim.py``."""

HOW: dict[Recompute, str] = {
    "none": "no recomputation",
    4: "every 4th block recomputed, plain all",
    "full": "full recomputation",
}


class Held(NamedTuple):
    """Megabytes."""

    weights: float
    gradients: float
    activations: float
    parameters: list[Tensor]

    def whole(self, optimizer: str) -> float:
        """All of it, with what the optimizer keeps."""
        kept = sum(map(OPTIMIZERS[optimizer], self.parameters)) / 1e6
        return self.weights + self.gradients + self.activations + kept


def main(argv: Sequence[str] | None = None) -> int:
    parser = words(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(REAL), default=list(REAL))
    parser.add_argument("--smoke", action="store_true", help="toy sizes: whether it runs")
    args = begin(parser, argv)
    shapes = TOY if args.smoke else REAL
    kinds: tuple[Kind, ...] = ("sft",) if args.quick else ("pretrain", "sft")
    precisions: tuple[Precision, ...] = ("bfloat16",) if args.quick else ("float32", "bfloat16")
    rows: list[Row] = []
    for name, kind in itertools.product(args.shapes, kinds):
        rows += compared(shapes[name], kind, precisions)
    finish(rows, args.json, args.quick or args.smoke)
    return 0


def compared(shape: Shape, kind: Kind, precisions: Sequence[Precision]) -> list[Row]:
    """The rows of a shape in a stage."""
    data = engine.Data(shape, kind, 1)
    rows = []
    for precision in precisions:
        plain: dict[Recompute, Held] = {
            how: plain_holds(shape, kind, data, how == "full", precision) for how in ("none", "full")
        }
        for how, told in HOW.items():
            title = f"{shape.name} {kind}, {precision}, {told}"
            # The plain way recomputes everything or nothing, and has AdamW in 32 bits.
            mine, theirs = ours_holds(shape, kind, data, how, precision), plain.get(how, plain["full"])
            rows.append(less(f"{title}: activations", mine.activations, theirs.activations, "MB"))
            smallest = precision == "bfloat16" and how == "full"
            for optimizer in OPTIMIZERS if smallest else ("adamw",):
                whole = mine.whole(optimizer) / 1000, theirs.whole("adamw") / 1000
                rows.append(less(f"{title}, {optimizer}: whole step", *whole, "GB"))
    return rows


def ours_holds(
    shape: Shape, kind: Kind, data: engine.Data, recompute: Recompute, precision: Precision
) -> Held:
    """One micro-batch of ours."""
    model = shape.model("meta")
    batches = data.batches()
    with engine.unreal(model) as mode:
        ours = engine.Ours(model, engine.stage_of(shape, kind), recompute, precision)
        unread = [engine.without_numbers(mode, batch) for batch in batches]
        found = count(lambda: ours.passes(unread), ours.parameters())
        return held(model, found, ours.parameters(), MICRO_BATCH / len(data.samples))


def plain_holds(shape: Shape, kind: Kind, data: engine.Data, recompute: bool, precision: Precision) -> Held:
    """One micro-batch of the plain way."""
    plain, _ = plain_way(shape.model("meta"), kind)
    plain.recompute(recompute)
    padded = micro_batches(data.samples, shape)[:1]
    with engine.unreal(plain) as mode:
        if precision != "float32":
            for p in plain.parameters():
                if not p.requires_grad:
                    p.data = p.data.bfloat16()
        unread = [engine.without_numbers(mode, batch) for batch in padded]

        def work() -> None:
            for batch in unread:
                with engine.autocast("cpu", precision):
                    loss = plain(batch, 1)
                loss.backward()

        trained = [p for p in plain.parameters() if p.requires_grad]
        return held(plain, count(work, trained), trained)


def held(model: torch.nn.Module, found: Counts, trained: list[Any], share: float = 1.0) -> Held:
    """Together; of the activations a ``share``."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    gradients = sum(p.numel() * p.element_size() for p in trained) / 1e6
    return Held(weights, gradients, share * found.activations_mb, trained)


if __name__ == "__main__":
    sys.exit(main())
