from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tinymodal.compose.tiny import tiny_model
from tinymodal.data.collate import collate
from tinymodal.train.flops import StepFlops, peak_flops, peak_of, step_flops
from tinymodal.train.groups import trainable
from tinymodal.train.lean import lean
from tinymodal.train.objective import Objective
from tinymodal.train.recipe import Lora

from .talk import WORDS, Talk

ALL = {"vision": 1e-3, "connectors": 1e-3, "language": 1e-3}
STAGES = {
    "connector": {"connectors": 1e-3},
    "language": {"connectors": 1e-3, "language": 1e-3},
    "all": ALL,
    "embeddings apart": {"connectors": 1e-3, "embeddings": 1e-3},
}


def batch_of(composed, rows, far=True):
    """Rows of so many documents each; with ``far`` the last word of each trains, so that none ends early."""
    documents = [composed.encoder(Talk(length=30).sample(n)) for n in range(1, 1 + sum(rows))]
    if far:
        last = [d.labels.index_copy(0, torch.tensor([len(d) - 1]), d.ids[-1:]) for d in documents]
        documents = [dataclasses.replace(d, labels=x) for d, x in zip(documents, last, strict=True)]
    laid, at = [], 0
    for count in rows:
        laid.append(documents[at : at + count])
        at += count
    return collate(laid, composed.tokenizer.pad_token_id, composed.model.config.image_token_id)


def attention(query, key, *_, **__):
    """Two products of each query with each key."""
    return 4 * math.prod(query[:-1]) * key[-2] * query[-1]


def attention_back(_, query, key, *__, **___):
    """Four. The kernel's fifth computes the scores again, which nobody needs."""
    return 2 * attention(query, key)


def product_in_place(_, one, two, *__, **___):
    return 2 * one[0] * one[1] * two[1]


aten = torch.ops.aten
LEFT_OUT = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_back,
    aten.addmm_: product_in_place,
}
"""What torch's counter takes for nothing."""


def counted(objective, batch):
    """What torch counts, and what it leaves out."""
    with FlopCounterMode(display=False, custom_mapping=LEFT_OUT) as counter:
        loss = objective(batch).sums["text"]
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("language", ["llama", "qwen2", "phi", "gpt2", "gemma2", "openelm", "stablelm"])
def test_a_whole_pass_is_counted_as_torch_counts_it(language, stage):
    """One document a row, as long as the row: then an engine that prunes nothing does nothing in vain."""
    tiny = tiny_model(language=language, words=WORDS)
    one = batch_of(tiny, [1])
    trainable(tiny.model, STAGES[stage])
    expected = counted(Objective(tiny.model), one)
    assert StepFlops(tiny.model, pruned=False, whole_squares=True)([one]) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("language", ["llama", "qwen2", "phi"])
def test_what_is_needed_is_what_the_lean_engine_does(language, stage):
    tiny = tiny_model(language=language, words=WORDS)
    batch = batch_of(tiny, [3, 2, 4], far=False)
    trainable(tiny.model, STAGES[stage])
    flops = StepFlops(tiny.model, whole_squares=True)
    objective = Objective(tiny.model)
    with lean(objective):
        expected = counted(objective, batch)
        assert StepFlops(tiny.model, whole_squares=True)([batch]) == flops([batch])  # late is not too late
    assert flops([batch]) == pytest.approx(expected, rel=0.02)


TOWERS = {
    "clip_vision_model": {},
    "siglip2_vision_model": {},
    "dinov2_with_registers": {},
    "dinov3_vit": {},
    "tinymodal_tower": {},
    "tinymodal_pair": {},
    "convnext": {"image_px": 32, "feature_layer": -1},
}


@pytest.mark.parametrize("vision", TOWERS)
def test_any_tower_is_counted_by_what_it_runs(vision):
    tiny = tiny_model(vision=vision, connector="mlp", words=WORDS, **TOWERS[vision])
    one = batch_of(tiny, [1])
    trainable(tiny.model, ALL)
    objective = Objective(tiny.model)
    objective(one)  # some towers first look at themselves
    expected = counted(objective, one)
    assert StepFlops(tiny.model, pruned=False, whole_squares=True)([one]) == pytest.approx(expected, rel=0.02)


def test_adapters_count_their_own_gradients_and_not_those_of_the_layers_below_them(tiny):
    from tinymodal.train import adapters

    one = batch_of(tiny, [1])
    full = StepFlops(_trained(tiny, {"language": 1e-3}))([one])
    adapters.inject(tiny.model, Lora(rank=4))
    trainable(tiny.model, {"connectors": 1e-3, "adapters": 1e-3})
    assert StepFlops(tiny.model)([one]) < full
    expected = counted(Objective(tiny.model), one)
    assert StepFlops(tiny.model, pruned=False, whole_squares=True)([one]) == pytest.approx(expected, rel=0.02)


def _trained(composed, train):
    model = copy.deepcopy(composed.model)
    trainable(model, train)
    return model


def test_recomputing_changes_nothing_of_what_is_needed(tiny, batches):
    (batch,) = batches(tiny, 1)
    trainable(tiny.model, ALL)
    before = step_flops(tiny.model, [batch])
    tiny.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert step_flops(tiny.model, [batch]) == before


def test_padding_costs_nothing_and_neither_does_a_row_without_a_picture(tiny):
    rows = [[tiny.encoder(Talk(pictures=False).sample(n))] for n in range(2)]
    pad, image = tiny.tokenizer.pad_token_id, tiny.model.config.image_token_id
    trainable(tiny.model, ALL)
    flops = StepFlops(tiny.model)
    tight = flops([collate([row], pad, image) for row in rows])
    assert flops([collate(rows, pad, image, pad_to=128)]) == pytest.approx(tight)
    trainable(tiny.model, {"connectors": 1e-3})
    forward = StepFlops(tiny.model)([collate(rows, pad, image)])
    assert forward < 0.4 * tight  # a third: nothing has a gradient


def test_causal_attention_counts_half_a_square_and_a_window_less(tiny):
    long = batch_of(tiny, [1])
    trainable(tiny.model, ALL)
    half = StepFlops(tiny.model)([long])
    whole = StepFlops(tiny.model, whole_squares=True)([long])
    assert half < whole
    config = tiny.model.config.text_config
    config.sliding_window, config.use_sliding_window = 8, True
    assert StepFlops(tiny.model)([long]) < half


def test_features_from_the_cache_cost_no_tower(tiny, batches):
    (batch,) = batches(tiny, 1)
    trainable(tiny.model, {"connectors": 1e-3})
    flops = StepFlops(tiny.model)
    features = tiny.model.model.towers["image"](batch.pixel_values)
    seen = features.values.unflatten(1, features.grid).detach()
    cached = dataclasses.replace(batch, pixel_values=None, image_features=seen)
    with FlopCounterMode(display=False, custom_mapping=LEFT_OUT) as counter:
        tiny.model.model.towers["image"](batch.pixel_values)
    assert flops([batch]) - flops([cached]) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_counting_runs_nothing_and_moves_no_random_state(tiny, batches):
    (batch,) = batches(tiny, 1)
    state = torch.random.get_rng_state()
    flops = StepFlops(tiny.model)
    assert flops([batch]) > 0
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None for p in tiny.model.parameters())
    assert not any(p.is_meta for p in tiny.model.parameters())


def test_two_batches_count_as_both_and_none_as_nothing(tiny, batches):
    one, two = batches(tiny, 2)
    flops = StepFlops(tiny.model)
    assert flops([one, two]) == pytest.approx(flops([one]) + flops([two]))
    assert flops([]) == 0


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.float16, 362),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("Tesla T4", torch.float16, 65),
        ("Tesla T4", torch.bfloat16, None),
        ("NVIDIA A4000", torch.bfloat16, None),
        ("Something Else", torch.bfloat16, None),
    ],
)
def test_cards_are_known_by_whole_words_of_their_names(name, dtype, tera):
    assert peak_of(name, dtype) == (None if tera is None else pytest.approx(tera * 1e12))


def test_nobody_knows_what_a_processor_promises():
    assert peak_flops("cpu") is None
