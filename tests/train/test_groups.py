from __future__ import annotations

import pytest
import torch
from torch import nn

from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import RecipeError
from tinymodal.train.groups import grouped, table, trainable
from tinymodal.train.objective import Objective
from tinymodal.train.optim import build_optimizer, set_rates
from tinymodal.train.step import step

EVERYTHING = {"vision": 1e-3, "connectors": 1e-3, "language": 1e-3}


def fingerprint(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def group_of(name: str) -> str:
    if ".towers." in name:
        return "vision"
    if ".connectors." in name:
        return "connectors"
    return "embeddings" if "embed_tokens" in name or "lm_head" in name else "language"


@pytest.mark.parametrize(
    ("train", "moves"),
    [
        ({"connectors": 1e-2}, {"connectors"}),
        ({"vision": 1e-2}, {"vision"}),
        ({"language": 1e-2}, {"language", "embeddings"}),
        ({"language": 1e-2, "embeddings": 0}, {"language"}),
        ({"embeddings": 1e-2}, {"embeddings"}),
        ({"connectors": 1e-2, "vision": 0}, {"connectors"}),
        (EVERYTHING, {"vision", "connectors", "language", "embeddings"}),
    ],
)
def test_after_one_step_exactly_the_listed_groups_have_changed(tiny, batches, stage, train, moves):
    before = fingerprint(tiny.model)
    groups = trainable(tiny.model, train)
    optimizer = build_optimizer(groups, stage)
    set_rates(optimizer, 1.0)
    step(Objective(tiny.model), optimizer, batches(tiny, 1))
    after = tiny.model.state_dict()
    changed = {group_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == moves
    assert {group["group"] for group in groups} == moves


def test_every_parameter_of_a_trained_group_gets_a_gradient(tiny, batches):
    trainable(tiny.model, EVERYTHING)
    batch = batches(tiny, 1)[0]
    Objective(tiny.model)(batch)["text"].backward()
    without = [name for name, p in tiny.model.named_parameters() if p.grad is None]
    assert without == []


def test_every_parameter_is_in_exactly_one_group(tiny):
    heads = nn.Linear(3, 4)
    members = grouped(tiny.model, heads)
    found = [id(p) for params in members.values() for p in params]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in (*tiny.model.parameters(), *heads.parameters())}


def test_a_frozen_tower_leaves_no_graph_and_no_gradient(tiny, batches):
    trainable(tiny.model, {"connectors": 1e-3})
    seen = []
    tiny.model.model.towers["image"].register_forward_hook(lambda module, args, out: seen.append(out.values))
    Objective(tiny.model)(batches(tiny, 1)[0])["text"].backward()
    assert [values.requires_grad for values in seen] == [False]
    assert all(p.grad is None for p in tiny.model.model.towers.parameters())
    assert all(p.grad is None for p in tiny.model.model.language_model.parameters())


def test_frozen_parts_behave_as_in_inference_and_trained_ones_do_not(tiny):
    model = tiny.model.model
    for part in (model.towers["image"], model.language_model):
        part.add_module("probe", nn.Dropout(0.5))
    trainable(tiny.model, {"connectors": 1e-3, "embeddings": 1e-3})
    assert not model.towers["image"].probe.training
    assert not model.language_model.probe.training
    assert model.connectors["image"].training
    trainable(tiny.model, EVERYTHING)
    assert model.towers["image"].probe.training
    assert model.language_model.probe.training


def test_only_matrices_decay(tiny):
    groups = trainable(tiny.model, EVERYTHING, weight_decay=0.1)
    decaying = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    for name, parameter in tiny.model.named_parameters():
        vector = parameter.ndim < 2 or "embed_tokens" in name or "position_embedding" in name
        assert (id(parameter) in decaying) != vector, name


def test_a_tied_head_trains_once_and_with_the_embeddings():
    model = tiny_model(tie_word_embeddings=True).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    groups = trainable(model, {"language": 1e-3, "embeddings": 5e-4}, weight_decay=0.1)
    tables = [g for g in groups if g["group"] == "embeddings"]
    assert [len(g["params"]) for g in tables] == [1]
    assert (tables[0]["peak"], tables[0]["weight_decay"]) == (5e-4, 0.0)


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"visoin": 1e-3}, "did you mean 'vision'?"),
        ({"heads": 1e-3}, "train.heads has a rate, but this model has no parameters there"),
    ],
)
def test_a_group_that_is_not_there_is_refused(tiny, train, told):
    with pytest.raises(RecipeError) as caught:
        trainable(tiny.model, train)
    assert told in str(caught.value)


def test_the_table_says_who_trains_and_adds_up(tiny):
    rows = table(tiny.model, {"connectors": 1e-3})
    assert [(r.group, r.rate) for r in rows] == [
        ("vision", 0),
        ("connectors", 1e-3),
        ("language", 0),
        ("embeddings", 0),
    ]
    assert sum(r.parameters for r in rows) == sum(p.numel() for p in tiny.model.parameters())
