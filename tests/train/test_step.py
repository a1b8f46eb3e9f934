from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from tinymodal.data.collate import collate
from tinymodal.train.groups import trainable
from tinymodal.train.objective import Objective, Terms
from tinymodal.train.optim import build_optimizer, set_rates
from tinymodal.train.step import LOSS_SCALE, clip_gradient, gradient_norm, step

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
def test_the_gradient_is_cut_to_the_norm_asked_for(clip):
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = gradient_norm([parameter], torch.device("cpu"))
    assert norm == 5
    clip_gradient([parameter], norm, clip)
    expected = clip if 0 < clip < 5 else 5
    assert parameter.grad.norm() == pytest.approx(expected, rel=1e-5)


def test_the_norm_is_reported_as_it_was_before_the_cut(tiny, batches, stage):
    objective, optimizer = prepared(tiny, stage)
    assert step(objective, optimizer, batches(tiny, 1), clip=1e-3).grad_norm > 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_samples_and_changes_nothing(tiny, batches, stage, bad):
    objective, optimizer = prepared(tiny, stage)
    good, poisoned = batches(tiny, 2)
    poisoned.pixel_values[0, 0, 0, 0] = bad
    step(objective, optimizer, [good])
    before, state = copy.deepcopy(tiny.model.state_dict()), copy.deepcopy(optimizer.state_dict())
    report = step(objective, optimizer, [good, poisoned])
    assert report.skipped
    assert report.why == "the loss is not a finite number"
    assert report.bad_ids == poisoned.sample_ids
    assert report.sample_ids == good.sample_ids + poisoned.sample_ids
    assert all(map(torch.equal, before.values(), tiny.model.state_dict().values()))
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    assert not step(objective, optimizer, [good]).skipped


def test_a_gradient_that_is_not_finite_changes_nothing_and_names_the_whole_step(tiny, batches, stage):
    objective, optimizer = prepared(tiny, stage)
    given = batches(tiny, 2)
    before = copy.deepcopy(tiny.model.state_dict())
    weight = next(tiny.model.model.language_model.parameters())
    hook = weight.register_hook(lambda grad: grad * float("inf"))
    report = step(objective, optimizer, given)
    hook.remove()
    assert report.skipped
    assert report.why.startswith("the gradient is not finite")
    assert report.bad_ids == report.sample_ids
    assert math.isfinite(report.loss)
    assert all(map(torch.equal, before.values(), tiny.model.state_dict().values()))


def test_losses_are_told_by_source_and_by_whether_there_was_a_picture(tiny, stage):
    """The groups' sums add up to the whole, and each is what its documents have alone."""
    documents = [
        dataclasses.replace(tiny.encoder(Talk(seed=n).sample(n)), source=n % 2) for n in range(6)
    ]  # 0 and 3 show nothing

    def batch(chosen):
        rows = [[document] for document in chosen]
        ids = tiny.tokenizer.pad_token_id, tiny.model.config.image_token_id
        return collate(rows, *ids, num_sources=2)

    report, _ = gradients_of(tiny, stage, [batch(documents[:2]), batch(documents[2:])])
    assert set(report.groups) == {(0, False), (0, True), (1, False), (1, True)}
    for (source, image), (total, count) in report.groups.items():
        own = [d for d in documents if d.source == source and bool(d.media) == image]
        alone, _ = gradients_of(tiny, stage, [batch(own)])
        assert count == sum(d.num_targets for d in own)
        assert total == pytest.approx(alone.loss * count, rel=1e-5)
    assert sum(total for total, _ in report.groups.values()) == pytest.approx(
        report.loss * report.num_targets
    )
    assert report.num_samples == 6
    assert report.num_tokens == sum(map(len, documents))
    assert report.num_positions > report.num_tokens


class OneWeight(torch.nn.Module):
    """Stands in for an objective: whatever waits for the device in a step on it is the step itself."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.weights = {}
        self.weight = torch.nn.Parameter(torch.ones(4))

    def counts(self, batches):
        return {"text": sum(batch.num_targets for batch in batches)}

    def forward(self, batch):
        losses = self.weight.sum() * torch.ones(batch.num_targets)
        return Terms({"text": losses.sum()}, losses.detach())


def test_the_step_waits_for_the_device_once(tiny, batches, monkeypatch):
    """One transfer to the CPU, however many micro-batches: everything that is told comes with it."""
    objective = OneWeight()
    optimizer = torch.optim.AdamW(objective.parameters(), fused=True)
    given, reads = batches(tiny, 3), []
    step(objective, optimizer, given)  # the optimizer makes its state in the first step
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or plain(self))
    for name in ("item", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_: pytest.fail("waited for the device"))
    report = step(objective, optimizer, given)
    assert len(reads) == 1
    assert report.loss == pytest.approx(4, abs=0.1)


def test_a_loss_counts_as_much_as_its_weight_says(tiny, batches, stage):
    found = {}
    for weight in (1.0, 0.25):
        composed = dataclasses.replace(tiny, model=copy.deepcopy(tiny.model))
        torch.manual_seed(0)  # of the heads
        objective, optimizer = prepared(
            composed, stage, EVERYTHING | {"heads": 1e-2}, ("text", "cells"), (3, 5)
        )
        objective.weights = {"text": weight, "cells": 2 * weight}
        report = step(objective, optimizer, batches(tiny, 1, targets=True), clip=0)
        assert report.loss == pytest.approx(weight * (report.losses["text"] + 2 * report.losses["cells"]))
        found[weight] = report.grad_norm
    assert found[0.25] == pytest.approx(found[1.0] / 4, rel=1e-5)


def test_float16_lowers_its_scale_until_gradients_fit_and_then_trains(tiny, batches, stage):
    """Steps that only find the scale too large are no faults; nothing has moved in them."""
    objective, optimizer = prepared(tiny, stage)
    batch = batches(tiny, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(tiny.model.state_dict())
    reports = []
    while not reports or reports[-1].skipped:
        if reports:
            assert all(map(torch.equal, before.values(), tiny.model.state_dict().values()))
        scale = scaler.get_scale()
        reports.append(step(objective, optimizer, batch, precision="float16", scaler=scaler))
        assert len(reports) < 40
    assert len(reports) > 2
    assert {report.why for report in reports[:-1]} == {LOSS_SCALE}
    assert all(report.bad_ids == () for report in reports)
    assert scaler.get_scale() == scale
    exact, _ = gradients_of(dataclasses.replace(tiny, model=tiny.model), stage, batch)
    assert reports[-1].loss == pytest.approx(math.log(len(tiny.tokenizer)), rel=0.1)
    assert reports[-1].grad_norm == pytest.approx(exact.grad_norm, rel=0.3)


def test_a_bad_loss_says_nothing_about_the_scale(tiny, batches, stage):
    objective, optimizer = prepared(tiny, stage)
    good, poisoned = batches(tiny, 2)
    poisoned.pixel_values[0, 0, 0, 0] = float("nan")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    options = {"precision": "float16", "scaler": scaler}
    assert not step(objective, optimizer, [good], **options).skipped
    report = step(objective, optimizer, [poisoned], **options)
    assert report.skipped
    assert report.why == "the loss is not a finite number"
    assert scaler.get_scale() == 256.0
    assert not step(objective, optimizer, [good], **options).skipped


def test_a_step_in_float16_without_a_gradient_leaves_the_scale_alone(tiny, batches, stage):
    objective, optimizer = prepared(tiny, stage, {"connectors": 1e-3})
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(2):
        report = step(objective, optimizer, batches(tiny, 1, pictures=False), scaler=scaler)
        assert not report.skipped
    assert scaler.get_scale() == 256.0


def test_bfloat16_keeps_weights_in_float32_and_comes_close(tiny, batches, stage):
    batch = batches(tiny, 1)
    exact, _ = gradients_of(tiny, stage, batch)
    objective, optimizer = prepared(tiny, stage)
    report = step(objective, optimizer, batch, precision="bfloat16")
    assert report.loss == pytest.approx(exact.loss, rel=0.01)
    assert {p.dtype for p in tiny.model.parameters()} == {torch.float32}


def test_recomputing_activations_gives_the_same_gradient_also_through_a_frozen_decoder(tiny, batches, stage):
    from tinymodal.train.recompute import set_recompute

    batch = batches(tiny, 1)
    for train in (EVERYTHING, {"connectors": 1e-3}):
        found = []
        for wanted in (False, True):
            set_recompute(tiny.model, "full" if wanted else "none")
            objective, optimizer = prepared(tiny, stage, train)
            optimizer.zero_grad()
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, s=saved: s.append(t.numel()) or t, lambda t: t
            ):
                loss = objective(batch[0]).sums["text"]
            loss.backward()
            grads = [p.grad.clone() for p in tiny.model.parameters() if p.grad is not None]
            found.append((grads, sum(saved)))
        (plain, much), (again, little) = found
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)
        assert little < 0.6 * much
