from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.core.errors import RecipeError
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


def test_a_stage_that_ends_with_its_data_goes_the_same_way_by_the_share_that_was_read():
    by_step = curve(stage(warmup=0.1, floor=0.05))
    ending = stage(steps=None, ends="stop", warmup=0.1, floor=0.05)
    by_share = [factor(ending, 0, (n + 1) / 100) for n in range(100)]
    assert by_share == pytest.approx(by_step, abs=0.02)
    assert by_share[-1] == pytest.approx(0.05)
    assert 0 < factor(ending, 0, 1e-9) < 1e-4


SHAPES = {"matrix": (128, 64), "vector": (64,), "small": (8, 8)}


def optimized(kind, steps, stop=None, folder=None):
    """Weights after so many steps on drawn gradients; saved, read back and gone on with at ``stop``."""
    draw = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES.values()]

    def opened():
        found = build_optimizer(
            [{"params": params, "peak": 1e-2, "weight_decay": 0.1}], stage(optimizer=kind)
        )
        set_rates(found, 1.0)
        return found

    optimizer = opened()
    for n in range(steps):
        if n == stop:
            torch.save(optimizer.state_dict(), folder / "state.pt")
            params = [torch.nn.Parameter(p.detach().clone()) for p in params]
            optimizer = opened()
            optimizer.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * n + i))
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "adafactor"])
def test_an_optimizer_moves_every_weight_and_goes_on_bit_for_bit_from_its_saved_state(kind, tmp_path):
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    start, _ = optimized(kind, 0)
    whole, _ = optimized(kind, 7)
    resumed, _ = optimized(kind, 7, stop=4, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert all((a != b).all() for a, b in zip(whole, start, strict=True))


def test_eight_bits_and_rows_and_columns_take_the_room_that_the_page_says():
    pytest.importorskip("bitsandbytes")

    def bytes_per_weight(kind, which):
        params, optimizer = optimized(kind, 1)
        p = params[list(SHAPES).index(which)]
        held = [v for k, v in optimizer.state[p].items() if torch.is_tensor(v) and not k.startswith("qmap")]
        return sum(v.numel() * v.element_size() for v in held if v.numel() > 1) / p.numel()

    assert bytes_per_weight("adamw", "matrix") == 8
    assert bytes_per_weight("adamw8bit", "matrix") == pytest.approx(2, abs=0.1)
    assert bytes_per_weight("adamw8bit", "vector") == 8
    assert bytes_per_weight("adafactor", "matrix") < 0.2
    assert bytes_per_weight("adafactor", "vector") == 4


def test_eight_bits_without_bitsandbytes_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RecipeError, match=r"stages\.a\.optimizer is 'adamw8bit'.*tinymodal\[quant\]"):
        build_optimizer([], stage(optimizer="adamw8bit"))
