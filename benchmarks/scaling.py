"""One rank and two: samples a second for each core, and how equal the results are.

    python benchmarks/scaling.py                        DDP and FSDP2 over gloo, each against one process
    python benchmarks/scaling.py --quick                fewer rounds: two minutes of two cores
    python benchmarks/scaling.py --device cuda --ranks 8    over NCCL, on the GPUs of this machine

Every rank is a process with one thread. It takes as many rows a step, of the mixed lengths of LLaVA-665k,
whether it is alone or not, so two ranks do twice the work of one. "Ours" is samples a second of all ranks
divided by their number, "plain" those of one process; a ratio of 1 is what no exchange can beat. The modes
take turns, round by round. Beside the seconds on the clock stand those that the processes worked: on two
cores that do other things as well, the clock says more about those.

Equality is asserted and printed: loss and gradients of the ranks against one process that reads all of their
rows. Differences of a gradient are relative to the largest number in its tensor.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.measure import Row, finish, more, words
from benchmarks.ours import TRAIN, Data, stage_of
from benchmarks.shapes import SEVENTH, TOY, Shape
from tinymodal.core.types import Batch
from tinymodal.train.groups import trainable
from tinymodal.train.lean import lean
from tinymodal.train.objective import Objective
from tinymodal.train.optim import build_optimizer
from tinymodal.train.parallel import ALONE, parallelize
from tinymodal.train.recipe import Parallel
from tinymodal.train.step import step
from tinymodal.train.world import World, open_world

MODES = {"ddp": {"kind": "ddp"}, "fsdp": {"kind": "fsdp"}, "fsdp, kept": {"kind": "fsdp", "reshard": False}}
"""How ranks share: whole models; pieces (ZeRO-3); pieces that stay gathered within a step (ZeRO-2)."""
EQUAL = 1e-5
"""Relative difference of loss and gradients at most. Sums in another order; 0.1 where a mean is wrong."""


class Plan(NamedTuple):
    """What is run."""

    shape: Shape
    batches: int
    """Micro-batches of a rank's step."""
    rounds: int
    ranks: int
    device: str


class Stage:
    """A stage that trains in one mode; its rates are 0, so that every round does the same."""

    def __init__(self, plan: Plan, world: World, parallel: Parallel) -> None:
        model = plan.shape.model().to(world.device)  # type: ignore[arg-type]
        stage = stage_of(plan.shape, "sft")
        self.world, self.objective = world, Objective(model)
        trainable(model, TRAIN["sft"])
        lean(self.objective)
        self.forward = parallelize(self.objective, world, parallel)
        self.optimizer = build_optimizer(trainable(model, TRAIN["sft"]), stage)

    def step(self, batches: Sequence[Batch]) -> Any:
        return step(self.objective, self.optimizer, batches, 0.0, world=self.world, forward=self.forward)

    def gradients(self) -> dict[str, torch.Tensor]:
        whole: Any = {n: p.grad for n, p in self.objective.named_parameters() if p.grad is not None}
        return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in whole.items()}


def work(rank: int, plan: Plan, port: int, answer: Any) -> None:
    """What a rank does; rank 0 answers."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(plan.ranks),
        LOCAL_WORLD_SIZE=str(plan.ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    parallel = {name: Parallel(**keys) for name, keys in MODES.items()}  # type: ignore[arg-type]
    with open_world(parallel["ddp"], plan.device) as world:
        dealt = [Data(plan.shape, "sft", plan.batches, seed=r).batches() for r in range(plan.ranks)]
        alone = World(device=world.device) if plan.device == "cuda" else ALONE
        stages = {"one process": Stage(plan, alone, parallel["ddp"])} if world.main else {}
        stages |= {name: Stage(plan, world, given) for name, given in parallel.items()}
        found = {"apart": differences(stages, dealt, world)}
        found["seconds"] = seconds(stages, dealt[rank], plan, world)
        found["samples"] = sum(len(batch.sample_ids) for batches in dealt for batch in batches)
        if world.main:
            found["samples alone"] = sum(len(batch.sample_ids) for batch in dealt[0])
            answer.send(found)
        world.barrier()


def differences(
    stages: dict[str, Stage], dealt: Sequence[Sequence[Batch]], world: World
) -> dict[str, dict[str, float]]:
    """How far loss and gradients of every mode are from those of one process; on rank 0."""
    found = {}
    if world.main:
        whole = stages["one process"].step([batch for batches in dealt for batch in batches])
        expected = stages["one process"].gradients()
    for name in MODES:
        report = stages[name].step(dealt[world.rank])
        own = stages[name].gradients()
        if world.main:
            assert own.keys() == expected.keys()
            apart = [
                float((own[n] - g).abs().max() / g.abs().max().clamp(min=1e-30)) for n, g in expected.items()
            ]
            found[name] = {"loss": abs(report.loss - whole.loss) / whole.loss, "gradient": max(apart)}
    return found


def seconds(
    stages: dict[str, Stage], batches: Sequence[Batch], plan: Plan, world: World
) -> dict[str, tuple[float, float]]:
    """Medians of a step by mode: on the clock, and worked, the latter of all ranks together."""
    times: dict[str, list[tuple[float, float]]] = {}
    names = ["one process", *MODES]
    for turn in range(plan.rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            world.barrier()
            began, worked = time.perf_counter(), time.process_time()
            if name in stages:
                stages[name].step(batches)
                if plan.device == "cuda":
                    torch.cuda.synchronize()
            cpu = time.process_time() - worked
            world.barrier()
            clock = time.perf_counter() - began
            times.setdefault(name, []).append((clock, world.sum([cpu])[0]))
    return {
        name: (statistics.median(c for c, _ in each), statistics.median(w for _, w in each))
        for name, each in times.items()
    }


def run(plan: Plan) -> dict[str, Any]:
    """All modes, in processes of their own."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port = own.getsockname()[1]
    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    ranks = [context.Process(target=work, args=(rank, plan, port, there)) for rank in range(plan.ranks)]
    for process in ranks:
        process.start()
    there.close()
    try:
        answer: dict[str, Any] = here.recv()
    finally:
        for process in ranks:
            process.join()
    return answer


def rows_of(found: dict[str, Any], plan: Plan) -> list[Row]:
    """The table; asserts that all modes compute the same."""
    (clock, worked), alone = found["seconds"]["one process"], found["samples alone"]
    rows = []
    for name in MODES:
        apart = found["apart"][name]
        assert max(apart.values()) <= EQUAL, f"{name} differs from one process by {apart}"
        ours_clock, ours_worked = found["seconds"][name]
        each = found["samples"] / plan.ranks
        title = f"{name}, {plan.ranks} ranks"
        rows.append(more(f"{title}, on the clock", each / ours_clock, alone / clock, "samples/s a core"))
        if plan.device == "cpu":
            rows.append(
                more(f"{title}, worked", found["samples"] / ours_worked, alone / worked, "samples/CPU s")
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = words(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--toy", action="store_true", help="models whose times say nothing, for tests")
    given = parser.parse_args(argv)
    shape = TOY["0.9B"] if given.toy else SEVENTH["0.9B"]
    batches, rounds = (1, 3) if given.quick else (2, 7)
    plan = Plan(shape, batches, 1 if given.toy else rounds, given.ranks, given.device)
    found = run(plan)
    rows = rows_of(found, plan)
    for name, apart in found["apart"].items():
        print(f"{name}: loss and gradients of {plan.ranks} ranks are those of one process to "
              f"{apart['loss']:.1e} and {apart['gradient']:.1e}")  # fmt: skip
    finish(rows, given.json, given.quick, equal=found["apart"], ranks=plan.ranks, device=plan.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
