from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.train import loss
from tinymodal.train.loss import head_cross_entropy, linear_cross_entropy, target_log_probs


def draw(num, width, vocabulary, seed=0, bias=True):
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(num, width, generator=rng, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=rng, requires_grad=True)
    vector = torch.randn(vocabulary, generator=rng, requires_grad=True) if bias else None
    return states, weight, torch.randint(vocabulary, (num,), generator=rng), vector


def gradients(total, *tensors):
    total.backward()
    found = [None if t is None else t.grad for t in tensors]
    for t in tensors:
        if t is not None:
            t.grad = None
    return found


@settings(deadline=None, max_examples=40)
@given(
    num=st.integers(0, 23),
    block=st.integers(1, 25),
    vocabulary=st.integers(2, 40),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.01]),
)
def test_any_cut_into_blocks_gives_the_loss_and_the_gradients_of_the_whole(
    num, block, vocabulary, bias, scale
):
    states, weight, targets, vector = draw(num, 6, vocabulary, bias=bias)
    whole = F.cross_entropy(F.linear(states, weight, vector), targets, reduction="sum")
    expected = gradients(whole * scale, states, weight, vector)
    total = linear_cross_entropy(states, weight, targets, vector, block=block)
    # Sums of 23 terms in another order: one or two units in the last place.
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(gradients(total * scale, states, weight, vector), expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


def test_it_equals_torchs_own_where_torch_has_one():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch before 2.13 has no linear_cross_entropy")
    states, weight, targets, _ = draw(50, 8, 30, bias=False)
    torchs = F.linear_cross_entropy(states, weight, targets, reduction="sum")
    expected = gradients(torchs, states, weight)
    ours = linear_cross_entropy(states, weight, targets, block=7)
    torch.testing.assert_close(ours, torchs)
    torch.testing.assert_close(gradients(ours, states, weight), expected)


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    states, weight, targets, vector = draw(10, 6, 12)
    weight.requires_grad_(False)
    vector.requires_grad_(False)
    total = linear_cross_entropy(states, weight, targets, vector, block=3)
    assert [t is None for t in total.grad_fn.saved_tensors] == [False, True, True]
    total.backward()
    assert weight.grad is None
    assert states.grad is not None


def test_logits_of_all_positions_are_never_held(monkeypatch):
    """Peak memory is one block's: 64 positions of a vocabulary of 1,000 are 256 kB, all 640 are 2.6 MB."""
    monkeypatch.setattr(loss, "BLOCK_ELEMENTS", 64_000)
    states, weight, targets, _ = draw(640, 4, 1000, bias=False)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            nonlocal largest
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        linear_cross_entropy(states, weight, targets).backward()
    assert 0 < largest <= 64_000


def test_a_head_that_is_more_than_a_product_gives_the_same_in_blocks(monkeypatch):
    states, weight, targets, _ = draw(200, 4, 20, bias=False)

    def head(x):
        return 3 * torch.tanh(F.linear(x, weight) / 3)

    whole = head_cross_entropy(states, head, targets, 20)
    expected = gradients(whole, states, weight)
    monkeypatch.setattr(loss, "BLOCK_ELEMENTS", 64 * 20)
    blocks = head_cross_entropy(states, head, targets, 20)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(gradients(blocks, states, weight), expected, rtol=1e-4, atol=1e-6)


def test_in_bfloat16_it_is_as_close_as_the_whole_product_is():
    states, weight, targets, _ = draw(300, 16, 50, bias=False)
    exact = F.cross_entropy(F.linear(states, weight), targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        whole = F.cross_entropy(F.linear(states, weight).float(), targets, reduction="sum")
        blocks = linear_cross_entropy(states, weight, targets, block=70)
    assert abs(blocks - exact) <= 2 * abs(whole - exact) + 1e-3
    grads = gradients(blocks, states, weight)
    assert all(g.dtype == torch.float32 for g in grads)
    expected = gradients(exact, states, weight)
    for grad, wanted in zip(grads, expected, strict=True):
        # bfloat16 has 8 bits: 1/128 of the largest.
        assert (grad - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_autocast_is_on_inside_and_changes_nothing_more(monkeypatch):
    """The blocks rely on the caller having narrowed all of its inputs."""
    seen, own = [], loss._Blockwise.forward

    def forward(ctx, *inputs):
        seen.append((torch.is_autocast_enabled("cpu"), {t.dtype for t in inputs if torch.is_tensor(t)}))
        return own(ctx, *inputs)

    monkeypatch.setattr(loss._Blockwise, "forward", staticmethod(forward))
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(torch.randn(8, 4), torch.randn(9, 4), torch.arange(8), block=2)
    assert seen == [(True, {torch.bfloat16, torch.int64})]


@pytest.mark.parametrize("block", [3, 100])
def test_the_losses_of_single_targets_are_written_down_and_add_up(block, monkeypatch):
    states, weight, targets, vector = draw(10, 6, 12)
    expected = F.cross_entropy(F.linear(states, weight, vector), targets, reduction="none")
    each = torch.empty(10)
    total = linear_cross_entropy(states, weight, targets, vector, block=block, per_target=each)
    torch.testing.assert_close(each, expected.detach())
    torch.testing.assert_close(total, expected.sum())
    assert not each.requires_grad
    monkeypatch.setattr(loss, "LEAST_BLOCK", block)
    monkeypatch.setattr(loss, "BLOCK_ELEMENTS", block * 12)
    each.zero_()
    total = head_cross_entropy(states, lambda x: F.linear(x, weight, vector), targets, 12, each)
    torch.testing.assert_close(each, expected.detach())
    torch.testing.assert_close(total, expected.sum())


@settings(deadline=None, max_examples=20)
@given(num=st.integers(0, 9), block=st.integers(1, 10))
def test_log_probabilities_of_targets_are_those_of_all_logits_at_once(num, block):
    states, weight, targets, vector = draw(num, 6, 12)
    slope = torch.linspace(-1, 1, num)
    expected = F.linear(states, weight, vector).log_softmax(1).gather(1, targets[:, None])[:, 0]
    grads = gradients((expected * slope).sum(), states, weight, vector)
    found = target_log_probs(states, lambda x: F.linear(x, weight, vector), targets, 12, block=block)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(gradients((found * slope).sum(), states, weight, vector), grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)
