from __future__ import annotations

import subprocess

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tinymodal.train import kernels
from tinymodal.train.feed_forward import Act, RMSNorm

LOOPS, WHY = kernels.load()
needs_loops = pytest.mark.skipif(LOOPS is None, reason=f"the loops are not compiled here: {WHY}")


@pytest.fixture
def fresh():
    """What is loaded in the test is forgotten after it."""
    kernels.load.cache_clear()
    yield
    kernels.load.cache_clear()


@needs_loops
@pytest.mark.parametrize("name", list(kernels.SIGMOIDS))
@pytest.mark.parametrize("shape", [(1,), (3, 7), (5, 4096), (2, 4097)])
def test_activations_and_their_gradients_are_exact(name, shape):
    a, b = kernels.SIGMOIDS[name]
    h, up, d = (torch.randn(shape, dtype=torch.float64) * 4 for _ in range(3))
    h.requires_grad_()
    up.requires_grad_()
    acted = h * torch.sigmoid(h * (a + b * h * h))
    d_alone = torch.autograd.grad((acted * d).sum(), h, retain_graph=True)[0]
    d_h, d_up = torch.autograd.grad((acted * up * d).sum(), (h, up))
    given = [t.detach().float() for t in (h, up, d)]

    def close(found, expected):
        torch.testing.assert_close(found.double(), expected.detach(), rtol=2e-5, atol=2e-6)

    close(LOOPS.act(given[0], a, b), acted)
    close(LOOPS.act_back(given[2], given[0], a, b), d_alone)
    close(LOOPS.gated(*given[:2], a, b), acted * up)
    over = given[2].clone()
    found = LOOPS.gated_back_(over, *given[:2], a, b)
    assert found[0] is over
    close(found[0], d_h)
    close(found[1], d_up)


@needs_loops
@pytest.mark.parametrize("name", list(kernels.SIGMOIDS))
def test_far_from_zero_and_without_a_number_it_is_as_torchs(name):
    h = torch.tensor([-1e4, -80.0, -30.0, -1e-30, 0.0, 30.0, 1e4, float("nan"), float("inf")])
    a, b = kernels.SIGMOIDS[name]
    expected = h * torch.sigmoid(h * (a + b * h * h))
    torch.testing.assert_close(LOOPS.act(h, a, b), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    slopes = LOOPS.act_back(torch.ones(9), h, a, b)
    torch.testing.assert_close(slopes[:7], torch.tensor([0, 0, 0, 0.5, 0.5, 1, 1]), rtol=1e-5, atol=1e-6)
    # A step whose loss is not finite must be seen to be one.
    assert slopes[7].isnan()


@needs_loops
def test_bits_depend_neither_on_the_threads_nor_on_the_neighbours():
    h, up, d = torch.randn(3, 40, 1203)
    weight = torch.randn(1203)

    def all_of(h, up, d):
        out, scale = LOOPS.rms_norm(h, weight, 1e-6)
        both = LOOPS.gated_back_(d.clone(), h, up, 1.0, 0.0)
        return [out, LOOPS.rms_norm_back(d, h, weight, scale), LOOPS.gated(h, up, 1.0, 0.0), *both]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = all_of(h, up, d)
        torch.set_num_threads(2)
        two = all_of(h, up, d)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, two))
    for whole, part in zip(one, all_of(*(t[8:24].clone() for t in (h, up, d))), strict=True):
        torch.testing.assert_close(whole[8:24], part, rtol=1e-6, atol=1e-7)


def test_only_numbers_that_lie_there_in_one_piece_are_taken():
    rows = torch.randn(4, 6)
    assert kernels.fit(rows, torch.nn.Parameter(rows)) is LOOPS
    for other in (rows.T, rows.double(), rows.bfloat16(), rows.to("meta"), rows[:, ::2]):
        assert kernels.fit(rows, other) is None


@pytest.mark.parametrize(
    ("compiler", "why"),
    [("", "no C compiler"), ("false", "false cannot make them"), ("/nowhere/cc", "FileNotFoundError")],
)
def test_without_a_compiler_that_works_torch_does_it(fresh, monkeypatch, compiler, why):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    loops, told = kernels.load()
    assert loops is None
    assert told.startswith(why)
    h, weight = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(Act("silu")(h), torch.nn.functional.silu(h))
    expected = torch.nn.functional.rms_norm(h, (8,), weight, 1e-6)
    torch.testing.assert_close(RMSNorm.apply(h, weight, 1e-6), expected)


@needs_loops
def test_loops_that_compute_something_else_are_not_used(fresh, monkeypatch):
    monkeypatch.setattr(kernels, "SOURCE", kernels.SOURCE.replace("1.0f - s", "1.0f + s"))
    loops, told = kernels.load()
    assert loops is None
    assert told == "gelu_tanh, quick_gelu, silu differ from torch's"


@needs_loops
@pytest.mark.parametrize("mode", [FakeTensorMode, torch.inference_mode, lambda: torch.device("meta")])
def test_it_does_not_matter_where_they_are_first_asked_for(fresh, mode):
    with mode():
        loops, told = kernels.load()
    assert loops is not None, told


def test_a_compiler_that_never_ends_is_not_waited_for(fresh, monkeypatch):
    def hang(*args, **kwargs):
        raise subprocess.TimeoutExpired("cc", 60)

    monkeypatch.setattr(kernels.subprocess, "run", hang)
    monkeypatch.setenv("CC", "cc")
    assert kernels.load()[1].startswith("TimeoutExpired")
