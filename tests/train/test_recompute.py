from __future__ import annotations

import pytest
import torch

from tinymodal.compose.tiny import tiny_model
from tinymodal.train.groups import blocks, trainable
from tinymodal.train.memory import measured
from tinymodal.train.objective import Objective
from tinymodal.train.recompute import set_recompute

from .talk import WORDS

EVERYTHING = {"vision": 1e-3, "connectors": 1e-3, "language": 1e-3}


def recomputed(model):
    language = [bool(b.gradient_checkpointing) for b in blocks(model.model.language_model)]
    tower = [bool(b.gradient_checkpointing) for b in blocks(model.model.towers["image"])]
    return language, tower


@pytest.mark.parametrize("train", [EVERYTHING, {"connectors": 1e-3}])
def test_the_gradient_is_the_same_and_fewer_numbers_are_held(tiny, batches, train):
    (batch,) = batches(tiny, 1, rows=8, seq_len=128)
    found = []
    for how in ("none", 2, "full"):
        set_recompute(tiny.model, how)
        trainable(tiny.model, train)
        objective = Objective(tiny.model)
        loss = None

        def forward(objective=objective):
            nonlocal loss
            loss = objective(batch).sums["text"]

        held = measured(forward)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in tiny.model.named_parameters() if p.grad is not None}
        tiny.model.zero_grad()
        found.append((loss.item(), grads, held))
    (loss, plain, most), (_, some, less), (_, every, least) = found
    assert plain.keys() == some.keys() == every.keys()
    for name in plain:
        assert torch.allclose(plain[name], some[name], atol=1e-5)
        assert torch.allclose(plain[name], every[name], atol=1e-5)
    assert found[0][0] == pytest.approx(found[1][0]) == pytest.approx(found[2][0])
    assert least <= less <= most
    assert least < most


def test_every_kth_block_is_recomputed_and_none_again_afterwards():
    model = tiny_model(words=WORDS).model
    set_recompute(model, 2)
    language, tower = recomputed(model)
    assert language == [n % 2 == 0 for n in range(len(language))]
    assert tower == [n % 2 == 0 for n in range(len(tower))]
    set_recompute(model, "full")
    assert all(map(all, recomputed(model)))
    set_recompute(model, "none")
    assert not any(map(any, recomputed(model)))
