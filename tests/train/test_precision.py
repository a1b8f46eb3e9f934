from __future__ import annotations

import pytest
import torch
from torch import nn

from tinymodal.train.groups import trainable
from tinymodal.train.objective import Objective
from tinymodal.train.precision import Narrow, loss_scale


def frozen_but_connectors(tiny):
    trainable(tiny.model, {"connectors": 1e-3})
    return tiny.model


def total(tiny, batch):
    objective = Objective(tiny.model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(batch).sums["text"]
    loss.backward()
    grads = [p.grad.clone() for p in tiny.model.parameters() if p.grad is not None]
    tiny.model.zero_grad()
    return loss.detach(), grads


def test_frozen_weights_in_16_bits_give_the_same_loss_and_gradient_to_the_last_bit(tiny, batches):
    (batch,) = batches(tiny, 1)
    model = frozen_but_connectors(tiny)
    wide = total(tiny, batch)
    Narrow(model, "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    narrow = total(tiny, batch)
    assert torch.equal(wide[0], narrow[0])
    assert wide[1]
    assert all(torch.equal(a, b) for a, b in zip(wide[1], narrow[1], strict=True))


def test_every_weight_comes_back_as_it_was(tiny):
    model = frozen_but_connectors(tiny)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    narrow = Narrow(model, "bfloat16")
    assert narrow.kept_bytes > 0
    narrow.restore()
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {p.dtype for p in after.values()} == {torch.float32}


def test_weights_that_were_published_in_16_bits_need_no_copy_meanwhile(tiny):
    model = frozen_but_connectors(tiny)
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    narrow = Narrow(model, "bfloat16")
    assert narrow.kept_bytes == 0
    narrow.restore()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_weight_that_two_modules_share_or_that_is_spared_stays_wide():
    words = nn.Embedding(8, 4)
    head, other, spared = nn.Linear(4, 8, bias=False), nn.Linear(4, 4), nn.Linear(4, 4)
    head.weight = words.weight
    model = nn.ModuleList([words, head, other, spared]).requires_grad_(False)
    Narrow(model, "float16", spare=(spared.weight,))
    assert [m.weight.dtype for m in (head, other, spared)] == [torch.float32, torch.float16, torch.float32]
    assert other.bias.dtype == torch.float32


@pytest.mark.parametrize(
    ("precision", "scaled"), [("float32", False), ("bfloat16", False), ("float16", True)]
)
def test_only_float16_scales_its_loss(precision, scaled):
    assert (loss_scale(precision, torch.device("cpu")) is not None) == scaled
