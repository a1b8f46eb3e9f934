from __future__ import annotations

import resource

import pytest
import torch

from tinymodal.train import adapters
from tinymodal.train.groups import trainable
from tinymodal.train.memory import Live, estimate, free_bytes, largest_micro_batch, measured
from tinymodal.train.objective import Objective
from tinymodal.train.optim import build_optimizer, set_rates
from tinymodal.train.recipe import Stage
from tinymodal.train.recompute import set_recompute
from tinymodal.train.step import step

EVERYTHING = {"vision": 1e-3, "connectors": 1e-3, "language": 1e-3}
TOLERANCE = 0.15
"""Of the estimate, relative to what a real step holds: what the issue's users can plan with."""


def prepared(tiny, **changes):
    given = {"name": "a", "train": EVERYTHING, "steps": 9, "data": [{"made": "scenes"}]} | changes
    stage = Stage.model_validate(given)
    set_recompute(tiny.model, stage.recompute)
    names = [] if stage.lora is None else adapters.inject(tiny.model, stage.lora, None)
    objective = Objective(tiny.model)
    groups = trainable(tiny.model, stage.train, stage.weight_decay, None, stage.only, names)
    return stage, objective, groups


@pytest.mark.parametrize(
    ("changes", "precision", "num_micro_batches"),
    [
        ({}, "float32", 1),
        ({}, "float32", 3),
        ({}, "bfloat16", 1),
        ({"recompute": "full"}, "float32", 1),
        ({"train": {"connectors": 1e-3}}, "float32", 1),
        ({"train": {"connectors": 1e-3}, "recompute": "full"}, "bfloat16", 1),
        ({"train": {"adapters": 1e-3}, "lora": {"rank": 8}}, "float32", 1),
        ({"optimizer": "adafactor"}, "float32", 1),
        ({"optimizer": "adamw8bit"}, "float32", 1),
    ],
)
def test_the_estimate_is_near_what_a_real_step_holds(tiny, batches, changes, precision, num_micro_batches):
    if changes.get("optimizer") == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    stage, objective, groups = prepared(tiny, **changes)
    few = batches(tiny, 1, rows=3, seq_len=256)[0]
    told = estimate(objective, groups, stage, precision, few, 12, num_micro_batches)

    optimizer = build_optimizer(groups, stage)
    set_rates(optimizer, 1.0)
    real = batches(tiny, num_micro_batches, rows=12, seq_len=256)
    step(objective, optimizer, real, 1.0, precision)
    optimizer.zero_grad(set_to_none=True)
    inputs = sum(t.numel() * t.element_size() for t in vars_of(real[0]))
    working = inputs + measured(lambda: step(objective, optimizer, real, 1.0, precision))
    assert told.working == pytest.approx(working, rel=TOLERANCE)

    held = [
        (name, v) for state in optimizer.state.values() for name, v in state.items() if torch.is_tensor(v)
    ]
    # qmap: the 256 values of 8 bits, one table for all tensors.
    state = sum(v.numel() * v.element_size() for name, v in held if not name.startswith("qmap"))
    assert told.optimizer == pytest.approx(state, rel=0.05)


def vars_of(batch):
    return [value for name in batch.__slots__ if torch.is_tensor(value := getattr(batch, name))]


def test_estimating_changes_nothing_and_computes_nothing(tiny, batches):
    stage, objective, groups = prepared(tiny)
    before = {name: p.clone() for name, p in tiny.model.named_parameters()}
    random = torch.get_rng_state()
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = estimate(objective, groups, stage, "float32", batches(tiny, 1)[0], rows=30_000)
    assert told.working > 3e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 500_000, (
        "kilobytes: nothing of that is held"
    )
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in tiny.model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_counter_forgets_what_is_freed_and_counts_views_once():
    with Live() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:]
        assert live.now == 4000
        c = b + 1
        assert live.now == 4000 + 3200
        del a, b
        assert live.now == 3200
        del c
    assert (live.now, live.most) == (0, 7200)


def test_the_largest_micro_batch_that_leaves_room_is_taken():
    assert largest_micro_batch([8, 4, 2, 1], lambda rows: rows * 100, 1000) == 8
    assert largest_micro_batch([8, 4, 2, 1], lambda rows: rows * 100, 500) == 4
    assert largest_micro_batch([8, 4, 2, 1], lambda rows: rows * 100, 100) is None
    assert free_bytes(torch.device("cpu")) > 1e6
