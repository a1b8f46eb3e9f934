from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from tinymodal.core.errors import DataError
from tinymodal.data.mixture import Mixture
from tinymodal.train import held_out
from tinymodal.train.held_out import HeldOut, choose
from tinymodal.train.objective import Objective

from .talk import Spoilt, Talk


class Few(Talk):
    """A source with a length."""

    def __init__(self, length, seed=0):
        super().__init__(seed)
        self.rows = length

    def __len__(self):
        return self.rows


def held(tiny, sources=None, **options):
    sources = [Few(50)] if sources is None else sources
    plain = {
        "names": [f"source {n}" for n in range(len(sources))],
        "samples": 12,
        "seq_len": 64,
        "batch_tokens": 128,
        "pad_id": tiny.tokenizer.pad_token_id,
        "image_token_id": tiny.model.config.image_token_id,
    }
    return HeldOut(sources, tiny.encoder, **plain | options)


def one_by_one(tiny, sources, draws, pictures=None, source=None):
    """The mean over targets, each sample alone in its row: the slow way."""
    total = count = 0
    objective = Objective(tiny.model)
    tiny.model.eval()
    for draw in draws:
        sample = sources[draw.source].sample(draw.row)
        shows = bool(list(sample.media()))
        if (pictures is not None and shows != pictures) or (source is not None and source != draw.source):
            continue
        row = held(tiny, [Only(sample)], samples=1)
        (batch,) = row.batches()
        with torch.no_grad():
            total += float(objective(batch).sums["text"])
        count += batch.num_targets
    return total / count


class Only:
    """One sample."""

    def __init__(self, sample):
        self.only = sample

    def sample(self, index):
        return self.only

    def __len__(self):
        return 1


def test_the_loss_is_the_mean_over_all_targets_packed_or_not(tiny):
    sources = [Few(50), Few(50, seed=1)]
    samples = held(tiny, sources, weights=[3, 1])
    row = samples.row("align", 40, samples.measure(Objective(tiny.model)))
    assert (row["stage"], row["step"]) == ("align", 40)
    draws = samples.draws
    assert len(draws) == 12
    assert sum(draw.source == 0 for draw in draws) == 9
    # float32 sums in another order: 1e-7 of the loss.
    assert row["held_out"] == pytest.approx(one_by_one(tiny, sources, draws), rel=1e-5)
    for n in (0, 1):
        expected = one_by_one(tiny, sources, draws, source=n)
        assert row[f"held_out/source {n}"] == pytest.approx(expected, rel=1e-5)
    for name, shows in (("text", False), ("image", True)):
        expected = one_by_one(tiny, sources, draws, pictures=shows)
        assert row[f"held_out/{name}"] == pytest.approx(expected, rel=1e-5)


def test_it_is_the_same_each_time_kept_in_memory_or_read_again(tiny, monkeypatch):
    samples = held(tiny)
    objective = Objective(tiny.model)
    first = samples.measure(objective)
    assert samples._kept
    monkeypatch.setattr(held_out, "KEPT_BYTES", 1000)
    again = held(tiny)
    assert [again.measure(objective) for _ in range(2)] == [first, first] == [samples.measure(objective)] * 2
    assert again._kept is None


def test_nothing_of_the_training_is_touched(tiny):
    model = tiny.model
    model.train()
    model.model.language_model.eval()
    objective = Objective(model)
    modes = {name: module.training for name, module in objective.named_modules()}
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    weights = {name: p.clone() for name, p in model.named_parameters()}

    class Draws(Few):
        def sample(self, index):
            torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
            return super().sample(index)

    held(tiny, [Draws(9)]).measure(objective)
    assert {name: module.training for name, module in objective.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_modes_and_random_state_come_back_also_after_an_error(tiny):
    objective = Objective(tiny.model).train()
    before = torch.get_rng_state()
    with pytest.raises(DataError, match="no picture there"):
        held(tiny, [Spoilt()]).measure(objective)
    assert objective.training
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_off(tiny):
    objective = Objective(tiny.model).train()

    class Noisy(torch.nn.Module):
        def forward(self, x):
            return x * 0 if self.training else x

    tiny.model.model.language_model.norm = torch.nn.Sequential(
        tiny.model.model.language_model.norm, Noisy()
    ).train()
    samples = held(tiny)
    loud = samples.measure(objective)
    assert samples.measure(objective.eval()) == loud


def test_sums_of_several_ranks_add_up_to_those_of_one(tiny):
    objective = Objective(tiny.model)
    sources = [Few(50), Few(50, seed=1)]
    alone = held(tiny, sources)
    whole = alone.row("all", 1, alone.measure(objective))
    parts = [held(tiny, sources, rank=rank, world=3) for rank in range(3)]
    measured = [part.measure(objective) for part in parts]
    added = [sum(values) for values in zip(*measured, strict=True)]
    assert sorted(draw for part in parts for draw in part.draws) == sorted(alone.draws)
    row = alone.row("all", 1, added)
    assert (row.pop("stage"), whole.pop("stage")) == ("all", "all")
    assert row == pytest.approx(whole, rel=1e-5)


def test_a_rank_without_samples_adds_nothing(tiny):
    objective = Objective(tiny.model)
    some, none = (held(tiny, [Few(1)], rank=rank, world=2) for rank in range(2))
    assert none.measure(objective) == [0.0] * len(some.measure(objective))


def test_both_losses_are_added_as_a_step_adds_them(tiny):
    objective = Objective(tiny.model, ("text", "cells"), (3, 5))
    samples = held(tiny, [Talk(targets=True)])
    measured = samples.measure(objective)
    row = samples.row("a", 1, measured)
    assert row["held_out"] == pytest.approx(measured[0] / measured[1] + measured[2] / measured[3])
    assert measured[3] > 0


def test_samples_are_different_ones_and_no_more_than_there_are():
    draws = choose(Mixture([Few(5), Few(30)], [1, 1]), 100)
    assert len(draws) == len(set(draws)) == 35
    assert draws[:20] == choose(Mixture([Few(5), Few(30)], [1, 1]), 20)
    assert draws != choose(Mixture([Few(5), Few(30)], [1, 1], seed=1), 100)
    endless = choose(Mixture([Few(5), Talk()], [1, 1]), 100)
    assert len(endless) == len(set(endless)) == 100
    assert sum(draw.source == 0 for draw in endless) == 5


def test_bad_and_long_samples_are_left_out_and_named_where_that_is_allowed(tiny):
    samples = held(tiny, [Spoilt()], skip_bad=True)
    for _ in range(2):
        assert math.isfinite(samples.row("a", 1, samples.measure(Objective(tiny.model)))["held_out"])
        told = dict(samples.left_out)
        assert told["source 0: row 4"] == "talk-0/4: no picture there"
        assert "a row holds 64" in told["talk-0/6"]
        assert len(samples.left_out) == len(told) == 3


def test_samples_of_which_none_is_usable_are_an_error(tiny):
    samples = held(tiny, seq_len=8, batch_tokens=8)
    measured = samples.measure(Objective(tiny.model))
    with pytest.raises(DataError, match=r"stages\.a\.held_out: none of the samples.*12 left out: talk"):
        samples.row("a", 1, measured)


def test_pictures_are_prepared_in_full_precision_where_the_model_is_not(tiny):
    seen = []

    def encode(sample):
        seen.append(torch.is_autocast_enabled("cpu"))
        return tiny.encoder(sample)

    samples = held(tiny, precision="bfloat16")
    samples.encoder = encode
    narrow = samples.row("a", 1, samples.measure(Objective(tiny.model)))["held_out"]
    plain = held(tiny)
    exact = plain.row("a", 1, plain.measure(Objective(tiny.model)))["held_out"]
    assert not any(seen)
    assert narrow != exact
    assert narrow == pytest.approx(exact, rel=0.01)
