"""Both ways on one GPU, in bfloat16: samples, tokens, share of the card's peak, memory.

    PYTHONPATH=. python benchmarks/gpu.py --json gpu.json       under eight minutes
    PYTHONPATH=. python benchmarks/gpu.py --device cpu --quick  whether it runs; the times say nothing

Random models of the real sizes (:mod:`benchmarks.shapes`), nothing is downloaded. Stages: *pretrain*
(connector alone), *sft* (connector and language model) and *lora* (rank 128 on every linear layer instead,
where peft is installed). One model at a time is on the card, so ours and the plain way follow one another;
each is run until it is warm, then timed. Where a micro-batch does not fit, half of it is tried; what was
taken is told.

The share of the peak counts what the step needs (``tinymodal/train/flops.py``: towers and frozen parts
included; recomputation, padding and logits without a label not) for both ways, against the maker's number.
Without a GPU nothing is measured, and that is no error.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import ours as engine
from benchmarks.measure import Row, begin, finish, less, more, words
from benchmarks.plain import Plain, pad, plain_step
from benchmarks.shapes import IMAGE_TOKEN, PAD, REAL, TOY, Kind, Shape
from tinymodal.core.types import Batch, Encoded
from tinymodal.train import adapters
from tinymodal.train.flops import StepFlops, peak_flops
from tinymodal.train.groups import trainable
from tinymodal.train.recipe import Stage

STAGES = ("pretrain", "sft", "lora")
ROWS_OF: dict[str, int] = {"pretrain": 8, "sft": 2, "lora": 4}
"""Rows of a micro-batch of ours, 4,096 positions each."""
SAMPLES_OF: dict[str, int] = {"pretrain": 32, "sft": 8, "lora": 8}
"""Samples of a micro-batch of the plain way: TinyLLaVA's on each GPU."""
STEP_TOKENS = 32_768
"""Positions of a step of ours, about."""


class Speed(NamedTuple):
    """What one way reached."""

    samples: float
    """A second, as the next."""
    tokens: float
    """Of documents; pictures' tokens are tokens, padding is not."""
    mfu: float | None
    """Share of the peak; None where nobody knows the peak."""
    peak_gb: float
    micro_batch: str


class Job(NamedTuple):
    """A shape in a stage, and how long it is measured."""

    shape: Shape
    stage: str
    device: torch.device
    steps: int
    step_tokens: int

    @property
    def kind(self) -> Kind:
        return "pretrain" if self.stage == "pretrain" else "sft"


def main(argv: Sequence[str] | None = None) -> int:
    parser = words(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=list(REAL), default=list(REAL))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = begin(parser, argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured. With --device cpu --quick it shows whether it runs.")
        return 0
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    shapes = REAL if device.type == "cuda" else TOY
    rows: list[Row] = []
    told: dict[str, Any] = {}
    for name in args.shapes:
        for stage in args.stages:
            if stage == "lora" and find_spec("peft") is None:
                print("lora: peft is not installed; left out")
                continue
            shape = shapes[name]
            steps = (2 if args.quick else 6) if device.type == "cuda" else 1
            tokens = STEP_TOKENS if device.type == "cuda" else 4 * shape.seq_len
            job = Job(shape, stage, device, steps, tokens // 2 if args.quick else tokens)
            found = {"ours": measured(job, ours), "plain": measured(job, plain)}
            print(f"{name} {stage}: {found}", flush=True)
            rows += table_of(f"{name} {stage}", found["ours"], found["plain"])
            told[f"{name} {stage}"] = {way: speed._asdict() for way, speed in found.items() if speed}
    card = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    finish(rows, args.json, args.quick or device.type == "cpu", card=card, details=told, asked=_asked(args))
    return 0


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(args).items() if key != "json"}


def table_of(title: str, one: Speed | None, other: Speed | None) -> list[Row]:
    """The rows of a job; none where ours found no room."""
    if one is None:
        return []
    rows = [
        more(f"{title}: samples a second", one.samples, other and other.samples, "samples/s"),
        more(f"{title}: tokens a second", one.tokens, other and other.tokens, "tokens/s"),
        less(f"{title}: peak memory", one.peak_gb, other and other.peak_gb, "GB"),
    ]
    if one.mfu is not None:
        there = other and other.mfu
        rows.append(
            more(f"{title}: share of the peak (MFU)", 100 * one.mfu, 100 * there if there else None, "%")
        )
    return [row for row in rows if row.ours or row.plain]


Way = Callable[[Job, int], Speed]


def measured(job: Job, way: Way) -> Speed | None:
    """With the largest micro-batch that fits: the usual one, half of it, and so on; None: not even one."""
    size = ROWS_OF[job.stage] if way is ours else SAMPLES_OF[job.stage]
    while size:
        try:
            return way(job, size)
        except torch.OutOfMemoryError:
            size //= 2
        finally:
            gc.collect()
            if job.device.type == "cuda":
                torch.cuda.empty_cache()
    return None


def ours(job: Job, num_rows: int) -> Speed:
    """The engine, with micro-batches of so many rows."""
    num = max(1, job.step_tokens // (num_rows * job.shape.seq_len))
    # Two steps by turns: one batch over and over would be a cache's best case.
    steps = [engine.Data(job.shape, job.kind, num, seed, num_rows).batches() for seed in (0, 1)]
    model = rounded(job)
    made = engine.Ours(model, stage_of(job), precision="bfloat16")
    needed = StepFlops(twin(job))
    turns = cycle(steps)
    return timed(
        job,
        lambda: made.step(next(turns)),
        [sum(len(batch.sample_ids) for batch in step) for step in steps],
        [sum(batch.num_tokens for batch in step) for step in steps],
        [needed(step) for step in steps],
        f"{num} x {num_rows} rows of {job.shape.seq_len}",
    )


def plain(job: Job, num_samples: int) -> Speed:
    """The plain way on the same samples, with micro-batches of so many."""
    num_rows = ROWS_OF[job.stage]
    num = max(1, job.step_tokens // (num_rows * job.shape.seq_len))
    data = [engine.Data(job.shape, job.kind, num, seed, num_rows) for seed in (0, 1)]
    batches: list[list[Batch]] = [each.batches() for each in data]
    needed = StepFlops(twin(job))
    flops = [needed(step) for step in batches]
    made = Plain(rounded(job))
    if job.stage == "lora":
        made.adapt(**engine.LORA)
    else:
        made.freeze(language=job.stage == "pretrain")
    made.train()
    made.recompute(True)
    for p in made.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.0, fused=True)
    steps = [cut(each.samples, num_samples, job.shape) for each in data]
    turns = cycle(steps)
    return timed(
        job,
        lambda: plain_step(made, optimizer, next(turns), autocast=torch.bfloat16),
        [len(each.samples) for each in data],
        [sum(map(len, each.samples)) for each in data],
        flops,
        f"{len(steps[0])} x {num_samples} samples",
    )


def cut(samples: Sequence[Encoded], size: int, shape: Shape) -> list[Any]:
    """Micro-batches of the plain way."""
    starts = range(0, len(samples), size)
    return [pad(samples[n : n + size], IMAGE_TOKEN, PAD, shape.image_px) for n in starts]


def rounded(job: Job) -> Any:
    """A random model on the device whose weights fit 16 bits, as published ones do."""
    model = job.shape.model(str(job.device))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model


def twin(job: Job) -> Any:
    """A model without numbers that knows what trains: for counting what a step needs."""
    model, stage = job.shape.model("meta"), stage_of(job)
    if stage.lora is not None:
        adapters.inject(model, stage.lora)
    trainable(model, stage.train)
    return model


def stage_of(job: Job) -> Stage:
    """The stage of a recipe that does it."""
    if job.stage != "lora":
        return engine.stage_of(job.shape, job.kind)
    train = {"connectors": 2e-5, "adapters": 2e-4}
    return engine.stage_of(job.shape, job.kind, lora=engine.LORA, train=train)


def timed(
    job: Job, step: Callable[[], Any], samples: list[int], tokens: list[int], flops: list[float], told: str
) -> Speed:
    """Run ``step``, which takes two loads by turns, until it is warm, then ``job.steps`` pairs of times."""
    on_card = job.device.type == "cuda"

    def wait() -> None:
        if on_card:
            torch.cuda.synchronize()

    if on_card:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2 if on_card else 0):
        step()
    wait()
    pairs = []
    for _ in range(max(1, job.steps // 2)):
        begun = time.perf_counter()
        step(), step()
        wait()
        pairs.append(time.perf_counter() - begun)
    seconds = statistics.median(pairs)
    peak = peak_flops(job.device, torch.bfloat16)
    return Speed(
        sum(samples) / seconds,
        sum(tokens) / seconds,
        None if peak is None else sum(flops) / seconds / peak,
        torch.cuda.max_memory_allocated() / 1e9 if on_card else 0.0,
        told,
    )


if __name__ == "__main__":
    sys.exit(main())
