from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.train.optim import build_optimizer, factor, set_rates
from tinymodal.train.recipe import Stage


def stage(**changes):
    given = {"name": "a", "train": {"language": 1e-3}, "steps": 100, "data": [{"made": "scenes"}]}
    return Stage.model_validate(given | changes)


def curve(of: Stage) -> list[float]:
    return [factor(of, step) for step in range(of.steps)]


fractions = st.floats(0, 1)


@given(
    steps=st.integers(1, 60),
    warmup=fractions,
    decay=fractions,
    floor=fractions,
    shape=st.sampled_from(["cosine", "wsd", "constant"]),
)
def test_every_schedule_rises_once_falls_once_and_stays_between_0_and_1(steps, warmup, decay, floor, shape):
    if shape == "wsd" and warmup + decay > 1:
        decay = 1 - warmup
    rates = curve(stage(steps=steps, warmup=warmup, decay=decay, floor=floor, schedule=shape))
    assert all(0 <= rate <= 1 for rate in rates)
    assert max(rates) == 1
    top = rates.index(1.0)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[0] > 0


def test_cosine_rises_over_the_warmup_and_ends_at_the_floor():
    rates = curve(stage(warmup=0.1, floor=0.05))
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert rates[-1] == pytest.approx(0.05)
    middle = rates[9 + 45]
    assert middle == pytest.approx(0.05 + 0.95 / 2)


def test_wsd_holds_and_falls_in_a_line():
    rates = curve(stage(schedule="wsd", warmup=0.1, decay=0.2, floor=0.0))
    assert rates[9:80] == [1.0] * 71
    assert rates[-20:] == pytest.approx([n / 20 for n in range(19, -1, -1)])


def test_constant_holds_to_the_end():
    assert curve(stage(schedule="constant", warmup=0.02))[1:] == [1.0] * 99


def test_rates_are_the_peaks_of_their_groups_times_the_factor():
    one, two = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    groups = [
        {"params": [one], "peak": 1e-3, "weight_decay": 0.1, "group": "vision"},
        {"params": [two], "peak": 1e-4, "weight_decay": 0.0, "group": "language"},
    ]
    optimizer = build_optimizer(groups, stage(betas=(0.8, 0.99)))
    set_rates(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [5e-4, 5e-5]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert {g["betas"] for g in optimizer.param_groups} == {(0.8, 0.99)}
