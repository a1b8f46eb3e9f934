from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from tinymodal.core.errors import DataError
from tinymodal.data.collate import collate
from tinymodal.train.groups import trainable
from tinymodal.train.objective import Objective
from tinymodal.train.optim import build_optimizer, set_rates
from tinymodal.train.step import clip_gradient, step

from .talk import Talk

EVERYTHING = {"vision": 1e-3, "connectors": 1e-3, "language": 1e-3}


def prepared(composed, stage, train=EVERYTHING, losses=("text",), classes=()):
    objective = Objective(composed.model, losses, classes)
    optimizer = build_optimizer(trainable(composed.model, train, heads=objective.heads), stage)
    set_rates(optimizer, 1.0)
    return objective, optimizer


def gradients_of(composed, stage, batches):
    model = copy.deepcopy(composed.model)
    objective, optimizer = prepared(dataclasses.replace(composed, model=model), stage)
    report = step(objective, optimizer, batches, clip=0)
    return report, {name: p.grad for name, p in model.named_parameters()}


def test_one_batch_of_eight_rows_and_eight_of_one_give_the_same_gradient(tiny, stage):
    """The mean is over the targets of the step: rows of few targets weigh less than rows of many."""
    talk = Talk(length=30)
    documents = [tiny.encoder(talk.sample(n)) for n in range(8)]
    assert len({document.num_targets for document in documents}) > 4

    def batch(rows):
        return collate(rows, tiny.tokenizer.pad_token_id, tiny.model.config.image_token_id)

    whole, expected = gradients_of(tiny, stage, [batch([[d] for d in documents])])
    for cut in (1, 2, 4):
        parts = [batch([[d] for d in documents[i : i + cut]]) for i in range(0, 8, cut)]
        report, found = gradients_of(tiny, stage, parts)
        assert report.loss == pytest.approx(whole.loss, rel=1e-6)
        assert report.num_targets == whole.num_targets
        for name, grad in found.items():
            # Another order of summation in float32. A mean of means differs by 0.1 of the gradient.
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=2e-6, msg=name)


def test_steps_on_one_batch_bring_its_loss_down(tiny, batches, stage):
    objective, optimizer = prepared(tiny, stage)
    batch = batches(tiny, 1)
    losses = [step(objective, optimizer, batch).loss for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(len(tiny.tokenizer)), rel=0.1)  # knows nothing yet
    assert losses[-1] < 0.85 * losses[0]


def test_both_losses_are_reported_and_added(tiny, batches, stage):
    objective, optimizer = prepared(tiny, stage, EVERYTHING | {"heads": 1e-2}, ("text", "cells"), (3, 5))
    report = step(objective, optimizer, batches(tiny, 2, targets=True))
    assert report.loss == pytest.approx(report.losses["text"] + report.losses["cells"])
    assert report.losses["cells"] == pytest.approx((math.log(3) + math.log(5)) / 2, rel=0.3)


def test_a_step_without_anything_that_trains_changes_nothing_and_does_not_fail(tiny, batches, stage):
    """Only connectors train and no document has a picture: loss, but no gradient."""
    objective, optimizer = prepared(tiny, stage, {"connectors": 1e-3})
    before = [p.clone() for p in tiny.model.parameters()]
    report = step(objective, optimizer, batches(tiny, 1, pictures=False))
    assert report.loss > 0
    assert report.grad_norm == 0
    assert all(map(torch.equal, before, tiny.model.parameters()))


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e6])
def test_the_gradient_is_cut_to_the_norm_asked_for_and_reported_uncut(clip):
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = clip_gradient([parameter], clip, torch.device("cpu"))
    assert norm == 5
    expected = clip if 0 < clip < 5 else 5
    assert parameter.grad.norm() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_samples_and_changes_nothing(tiny, batches, stage, bad):
    objective, optimizer = prepared(tiny, stage)
    good, poisoned = batches(tiny, 2)
    poisoned.pixel_values[0, 0, 0, 0] = bad
    before = [p.clone() for p in tiny.model.parameters()]
    with pytest.raises(DataError) as caught:
        step(objective, optimizer, [good, poisoned])
    told = str(caught.value)
    assert poisoned.sample_ids[0] in told
    assert good.sample_ids[0] + "," not in told
    assert all(map(torch.equal, before, tiny.model.parameters()))


def test_bfloat16_keeps_weights_in_float32_and_comes_close(tiny, batches, stage):
    batch = batches(tiny, 1)
    exact, _ = gradients_of(tiny, stage, batch)
    objective, optimizer = prepared(tiny, stage)
    report = step(objective, optimizer, batch, precision="bfloat16")
    assert report.loss == pytest.approx(exact.loss, rel=0.01)
    assert {p.dtype for p in tiny.model.parameters()} == {torch.float32}


def test_recomputing_activations_gives_the_same_gradient_also_through_a_frozen_decoder(tiny, batches, stage):
    from tinymodal.train.loop import set_recompute

    batch = batches(tiny, 1)
    for train in (EVERYTHING, {"connectors": 1e-3}):
        found = []
        for wanted in (False, True):
            set_recompute(tiny.model, wanted)
            objective, optimizer = prepared(tiny, stage, train)
            optimizer.zero_grad()
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, s=saved: s.append(t.numel()) or t, lambda t: t
            ):
                loss = objective(batch[0])["text"]
            loss.backward()
            grads = [p.grad.clone() for p in tiny.model.parameters() if p.grad is not None]
            found.append((grads, sum(saved)))
        (plain, much), (again, little) = found
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)
        assert little < 0.6 * much
