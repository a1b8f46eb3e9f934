"""A training step, ours against the plain way: samples a second, and counts that no machine changes.

    python benchmarks/train_step.py                     both shapes, both stages; half an hour of two cores
    python benchmarks/train_step.py --quick             fewer samples and rounds: under five minutes
    python benchmarks/train_step.py --shapes 0.9B --stages sft

Stages: *pretrain* trains the connector alone, on a picture and 20 words; *sft* trains connector and language
model on the mixed lengths of LLaVA-665k, of which 6 % have no picture. Both ways read the same samples with
the same weights, and their losses are asserted to agree to five digits. A rate of 0 keeps the weights, and so
the work of every round, the same; the optimizer's own work is done.

Ours is the engine as a recipe runs it: loader, packing, objective, step; no recomputation, which it does not
need. The plain way is :mod:`benchmarks.plain` with recomputation, as it is shipped, and without. Operations
are counted for the real sizes too, on tensors without numbers, so that small models flatter nobody. There the
plain way has its mask in both stages, as it has wherever two captions differ in length.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import ours as engine
from benchmarks.measure import Counts, Row, begin, count, finish, interleave, less, more, words
from benchmarks.plain import Padded, Plain, pad, plain_step
from benchmarks.shapes import IMAGE_TOKEN, PAD, REAL, SEVENTH, TOY, Kind, Shape
from tinymodal.core.types import Batch, Encoded
from tinymodal.train.recompute import Recompute

MICRO_BATCH = 8
"""Samples of a micro-batch of the plain way: TinyLLaVA's, in the second stage, on each GPU."""
RECOMPUTE: tuple[Recompute, ...] = ("none", "full")
DIGITS = 2e-5
"""Relative difference of the losses at most."""


class Size(NamedTuple):
    """How much is measured."""

    small: dict[str, Shape]
    real: dict[str, Shape]
    batches: int
    """Micro-batches of ours in a step."""
    count_batches: int
    """The same for the counts."""
    rounds: int
    brief: bool
    """Leave out what is not asked of us."""

    @property
    def counts(self) -> list[tuple[dict[str, Shape], str]]:
        """What is counted, and what its rows are called."""
        real = [(self.real, ", real sizes")]
        return real if self.brief else [(self.small, ""), *real]


FULL = Size(SEVENTH, REAL, 4, 2, 5, False)
QUICK = Size(SEVENTH, REAL, 1, 1, 2, True)
SMOKE = Size(TOY, TOY, 2, 1, 1, False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = words(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SEVENTH), default=list(SEVENTH))
    parser.add_argument("--stages", nargs="+", choices=["pretrain", "sft"], default=["pretrain", "sft"])
    parser.add_argument(
        "--smoke", action="store_true", help="toy sizes: whether it runs; the times say nothing"
    )
    args = begin(parser, argv)
    size = SMOKE if args.smoke else QUICK if args.quick else FULL
    cells = [(name, kind) for name in args.shapes for kind in args.stages]
    with ProcessPoolExecutor(1, get_context("spawn")) as aside:
        # Counting needs no clock: it goes on beside the timing, on another core.
        run = _at_once if args.smoke else aside.submit
        asked = [
            (cell, run(counted, shapes[cell[0]], cell[1], size.count_batches, told, size.brief))
            for cell in cells
            for shapes, told in size.counts
        ]
        rows: list[Row] = []
        for cell in cells:
            found, lines = measured(size.small[cell[0]], cell[1], size)
            rows += found
            for counts, there in (future.result() for owner, future in asked if owner == cell):
                assert there == lines, f"{cell}: counted with {there}, timed with {lines}"
                rows += counts
    finish(
        rows,
        args.json,
        quick=args.quick or args.smoke,
        shapes={name: {"vision": s.vision, "language": s.language} for name, s in size.small.items()},
    )
    return 0


def _at_once(work: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """As ``Executor.submit``, here and now."""
    done: Future[Any] = Future()
    done.set_result(work(*arguments))
    return done


def measured(shape: Shape, kind: Kind, size: Size) -> tuple[list[Row], list[str]]:
    """Times and losses of a small shape, and what the engine has switched on."""
    title = f"{shape.name} {kind}"
    data = engine.Data(shape, kind, size.batches)
    model = shape.model()
    ours = engine.Ours(model, engine.stage_of(shape, kind))
    plain, optimizer = plain_way(model, kind)

    def plain_work(recompute: bool) -> float:
        plain.recompute(recompute)
        return plain_step(plain, optimizer, micro_batches(data.samples, shape))

    loss, expected = ours.step(data.batches()).loss, plain_work(True)
    assert abs(loss - expected) <= DIGITS * abs(expected), f"{title}: loss {loss}, the plain way's {expected}"

    works: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours.step(data.batches()),
        "plain": lambda: plain_work(True),
    }
    if not size.brief:
        works["no recomputation"] = lambda: plain_work(False)
    # Both have run once: they are warm.
    times = interleave(works, size.rounds, warmup=0)
    num = len(data.samples)
    speed = {name: num / seconds.cpu for name, seconds in times.items()}
    rows = [
        Row(f"{title}: loss", None, loss, expected, "nats"),
        more(f"{title}: samples a CPU second", speed["ours"], speed["plain"], "samples/s"),
        more(f"{title}: samples a second", num / times["ours"].wall, num / times["plain"].wall, "samples/s"),
    ]
    if not size.brief:
        told = f"{title}: samples a CPU second, plain without recomputation"
        rows.append(more(told, speed["ours"], speed["no recomputation"], "samples/s"))
    if kind == "pretrain":
        rows.append(remembered(ours, data, size.rounds, title))
    return rows, ours.lean.lines


def plain_way(model: torch.nn.Module, kind: Kind) -> tuple[Plain, torch.optim.Optimizer]:
    """The plain way with its optimizer, ready to train."""
    plain = Plain(model)  # type: ignore[arg-type]
    plain.freeze(language=kind == "pretrain")
    plain.train()
    plain.recompute(True)
    trained = [p for p in plain.parameters() if p.requires_grad]
    return plain, torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)


def micro_batches(samples: Sequence[Encoded], shape: Shape) -> list[Padded]:
    """As many samples each as TinyLLaVA has on a GPU, in the order they were drawn: at random."""
    return [
        pad(samples[first : first + MICRO_BATCH], IMAGE_TOKEN, PAD, shape.image_px)
        for first in range(0, len(samples), MICRO_BATCH)
    ]


def positions(samples: Sequence[Encoded]) -> int:
    """Rows times the longest, over the plain way's micro-batches."""
    cut = [samples[first : first + MICRO_BATCH] for first in range(0, len(samples), MICRO_BATCH)]
    return sum(len(part) * max(len(sample) for sample in part) for part in cut)


def remembered(ours: engine.Ours, data: engine.Data, rounds: int, title: str) -> Row:
    """The same step where the tower's features are on disk already, against the step that computes them."""
    tower: Any = ours.model.model.towers["image"]
    seen: dict[str, Tensor] = {}
    for sample in data.samples:
        for tile in (tile for item in sample.media for tile in item.tiles):
            with torch.no_grad():
                features = tower(tile[None])
            seen[sample.sample_id] = features.values.unflatten(1, features.grid)[0].bfloat16()

    def replaced() -> list[Batch]:
        found = []
        for batch in data.batches():
            features = torch.stack([seen[name] for name in batch.sample_ids if name in seen])
            found.append(dataclasses.replace(batch, pixel_values=None, image_features=features.float()))
        return found

    times = interleave(
        {"first": lambda: ours.step(data.batches()), "second": lambda: ours.step(replaced())}, rounds
    )
    num = len(data.samples)
    return more(
        f"{title}: samples a CPU second, second epoch from the feature cache against the first",
        num / times["second"].cpu,
        num / times["first"].cpu,
        "samples/s",
    )


def counted(
    shape: Shape, kind: Kind, num_batches: int, told: str, brief: bool = False
) -> tuple[list[Row], list[str]]:
    """What the passes do, on tensors that have shapes and no numbers: large sizes cost no more time.

    And what the engine has switched on: it must be the same where there are numbers.
    """
    title = f"{shape.name} {kind}{told}"
    data = engine.Data(shape, kind, num_batches)
    num = len(data.samples)
    batches = data.batches()
    (kept, lines), (spare, _) = (ours_counts(shape, kind, batches, how) for how in RECOMPUTE)
    as_drawn = micro_batches(data.samples, shape)
    shipped = plain_counts(shape, kind, as_drawn, recompute=True)
    gflop = kept.gflop / num
    # A micro-batch of ours holds as many samples as fit, the plain way's eight: both are told for eight.
    eight = MICRO_BATCH * len(batches) / num
    rows = [
        less(f"{title}: GFLOP a sample", gflop, shipped.gflop / num, "GFLOP"),
        less(f"{title}: GB touched a sample", kept.touched_gb / num, shipped.touched_gb / num, "GB"),
        less(f"{title}: operator calls a sample", kept.calls / num, shipped.calls / num, "calls"),
        less(
            f"{title}: positions computed a sample",
            sum(far for batch in batches for far, _ in batch.reach) / num,
            positions(data.samples) / num,
            "positions",
        ),
        less(
            f"{title}: activations of eight samples, recomputation in both",
            eight * spare.activations_mb,
            shipped.activations_mb,
            "MB",
        ),
    ]
    if kind == "pretrain":
        # What the second epoch can save at most, whatever the time of a product is.
        again = remembered_gflop(shape, kind, batches) / num
        rows.append(less(f"{title}: GFLOP a sample, second epoch against the first", again, gflop, "GFLOP"))
    if brief:
        return rows, lines
    plain_kept = plain_counts(shape, kind, as_drawn, recompute=False)
    by_length = micro_batches(sorted(data.samples, key=len), shape)
    grouped = plain_counts(shape, kind, by_length, recompute=True)
    rows += [
        less(
            f"{title}: activations of eight samples, recomputation in neither",
            eight * kept.activations_mb,
            plain_kept.activations_mb,
            "MB",
        ),
        less(f"{title}: GFLOP a sample, plain without recomputation", gflop, plain_kept.gflop / num, "GFLOP"),
        less(f"{title}: GFLOP a sample, plain grouped by length", gflop, grouped.gflop / num, "GFLOP"),
    ]
    return rows, lines


def ours_counts(
    shape: Shape, kind: Kind, batches: Sequence[Batch], recompute: Recompute
) -> tuple[Counts, list[str]]:
    """Our passes over the micro-batches, and what the engine has switched on."""
    model = shape.model("meta")
    with engine.unreal(model) as mode:
        ours = engine.Ours(model, engine.stage_of(shape, kind), recompute)
        unread = [engine.without_numbers(mode, batch) for batch in batches]
        return count(lambda: ours.passes(unread), ours.parameters()), ours.lean.lines


def remembered_gflop(shape: Shape, kind: Kind, batches: Sequence[Batch]) -> float:
    """What our passes multiply where the tower's features are on disk already."""
    model = shape.model("meta")
    side = int(shape.tokens**0.5)
    width = model.model.towers["image"].width
    with engine.unreal(model) as mode:
        ours = engine.Ours(model, engine.stage_of(shape, kind))
        unread = []
        for batch in batches:
            assert isinstance(batch.pixel_values, Tensor)
            features = torch.empty(len(batch.pixel_values), side, side, width, device="cpu")
            batch = dataclasses.replace(batch, pixel_values=None, image_features=features)
            unread.append(engine.without_numbers(mode, batch))
        return count(lambda: ours.passes(unread), ours.parameters()).gflop


def plain_counts(shape: Shape, kind: Kind, padded: Sequence[Padded], recompute: bool) -> Counts:
    """The plain way's."""
    plain, _ = plain_way(shape.model("meta"), kind)
    plain.recompute(recompute)
    with engine.unreal(plain) as mode:
        unread = [engine.without_numbers(mode, batch) for batch in padded]
        return count(lambda: [plain(batch, 1).backward() for batch in unread], plain.parameters())


if __name__ == "__main__":
    sys.exit(main())
