from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tinymodal.compose import build
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import DataError
from tinymodal.data.loader import Loader
from tinymodal.train.groups import trainable
from tinymodal.train.objective import Objective
from tinymodal.train.preference import of_documents, preferred
from tinymodal.train.teacher import reference

from .talk import WORDS, Pairs


def drawn(composed, source, rows=2, seq_len=128):
    tokenizer = composed.tokenizer
    return next(
        Loader(
            [source],
            composed.encoder,
            seq_len=seq_len,
            batch_tokens=rows * seq_len,
            pad_id=tokenizer.pad_token_id,
            image_token_id=composed.model.config.image_token_id,
        )
    )


def by_hand(model, batch, document):
    """Log-probability of one document's answer, from its own forward pass and all its logits."""
    ends = torch.tensor(batch.lengths).cumsum(0).tolist()
    begin, end = ends[document] - batch.lengths[document], ends[document]
    ids = batch.input_ids.flatten()[begin:end]
    labels = batch.labels.flatten()[begin:end]
    media = {}
    if bool((ids == model.config.image_token_id).any()):
        put = batch.image_put
        own = (put >= begin) & (put < end)
        media = {"pixel_values": batch.pixel_values, "image_take": batch.image_take[own]}
        media["image_put"] = put[own] - begin
    logits = model(input_ids=ids[None], **media).logits[0]
    log_probs = F.log_softmax(logits[:-1].float(), -1)
    at = (labels[1:] != -100).nonzero()[:, 0]
    return log_probs[at, labels[1:][at]].sum()


def test_the_loss_is_the_papers_over_answers_read_alone():
    composed = tiny_model(words=WORDS)
    before = tiny_model(words=WORDS, seed=5)
    batch = drawn(composed, Pairs())
    assert len(batch.pairs) > 3
    objective = Objective(composed.model.eval(), ("dpo",))
    objective.beta, objective.reference = 0.3, reference(before)
    terms = objective(batch)
    expected, right, margins = 0.0, 0, 0.0
    with torch.no_grad():
        for chosen, rejected in batch.pairs.tolist():
            ours = by_hand(composed.model, batch, chosen) - by_hand(composed.model, batch, rejected)
            was = by_hand(before.model, batch, chosen) - by_hand(before.model, batch, rejected)
            margin = 0.3 * float(ours - was)
            expected += math.log1p(math.exp(-margin))
            right, margins = right + (margin > 0), margins + margin
    assert terms.sums["dpo"].item() == pytest.approx(expected, rel=1e-5)
    assert terms.measures["dpo_right"].item() == right
    assert terms.measures["dpo_margin"].item() == pytest.approx(margins, abs=1e-4)
    assert objective.counts([batch]) == {"dpo": len(batch.pairs)}


def test_a_model_that_has_not_moved_begins_at_log_2_and_learns_to_prefer():
    composed = tiny_model(words=WORDS)
    batch = drawn(composed, Pairs(), rows=4)
    objective = Objective(composed.model, ("dpo",))
    objective.beta, objective.reference = 0.5, reference(tiny_model(words=WORDS))
    groups = trainable(composed.model, {"language": 1e-3})
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    found = []
    for _ in range(30):
        terms = objective(batch)
        found.append(terms.sums["dpo"].item() / len(batch.pairs))
        optimizer.zero_grad()
        (terms.sums["dpo"] / len(batch.pairs)).backward()
        optimizer.step()
    assert found[0] == pytest.approx(math.log(2), abs=1e-5)
    assert found[-1] < 0.1
    assert objective(batch).measures["dpo_right"].item() == len(batch.pairs)


def test_the_gradient_points_from_the_rejected_to_the_chosen_answer():
    policy = torch.tensor([-3.0, -2.0, -9.0], requires_grad=True)
    found = preferred(policy, torch.tensor([-3.0, -2.0, 0.0]), torch.tensor([[0, 1]]), beta=0.2)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(math.log(2))
    assert policy.grad.tolist() == pytest.approx([-0.1, 0.1, 0.0])


def test_log_probs_are_added_up_by_document():
    sums = of_documents(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]), 3)
    assert sums.tolist() == [1.0, 0.0, 6.0]


def test_samples_without_a_second_answer_are_refused_by_name(tiny, batches):
    objective = Objective(tiny.model, ("dpo",))
    with pytest.raises(DataError, match=r"^talk-0/.*format = 'preference'"):
        objective.counts(batches(tiny, 1))


def test_a_reference_is_frozen_and_what_it_says_has_no_graph(tiny, tmp_path):
    build.save(tiny, tmp_path / "m")
    frozen = build.load(tmp_path / "m")
    batch = drawn(tiny, Pairs())
    said = reference(frozen)(batch)
    assert not said.requires_grad
    assert not any(p.requires_grad for p in frozen.model.parameters())
    assert len(said) == batch.num_targets
