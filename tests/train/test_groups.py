from __future__ import annotations

import pytest
import torch
from torch import nn

from tinymodal.compose.quantize import quantize
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import RecipeError
from tinymodal.train import adapters
from tinymodal.train.groups import blocks, grouped, is_norm, lines, rates_of, table, trainable
from tinymodal.train.objective import Objective
from tinymodal.train.optim import build_optimizer, set_rates
from tinymodal.train.recipe import Lora
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
    Objective(tiny.model)(batch).sums["text"].backward()
    without = [name for name, p in tiny.model.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("adapted", [(), ("language",), ("vision", "connectors", "language")])
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"tie_word_embeddings": True},
        {"vision": "clip_vision_model", "connector": "mlp", "language": "phi"},
        {"vision": "dinov2", "connector": "linear", "language": "gpt2"},
        {"vision": None},
    ],
)
def test_every_parameter_is_in_exactly_one_group(parts, adapted, bits):
    model = tiny_model(**parts).model
    if parts.get("vision", "") is None:
        adapted = adapted and ("language",)
    else:
        learned_marks(model)
    if bits and parts.get("language") != "gpt2":
        quantize(model.model.language_model, bits)
    if adapted:
        adapters.inject(model, Lora(rank=2, parts=adapted))
    heads = nn.Linear(3, 4)
    members = grouped(model, heads)
    found = [id(p) for params in members.values() for p in params]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in (*model.parameters(), *heads.parameters())}
    # No more than two adapted groups of names, and marks with the connectors.
    assert bool(members["adapters"]) == bool(adapted)
    if "vision" not in parts:
        assert any(p is model.model.marks["image"].weight for p in members["connectors"])


def learned_marks(model) -> None:
    """Picture marks as the model names them: ``model.marks.image.weight``."""
    model.model.marks = nn.ModuleDict({"image": nn.Embedding(3, 32)})


def test_a_frozen_tower_leaves_no_graph_and_no_gradient(tiny, batches):
    trainable(tiny.model, {"connectors": 1e-3})
    seen = []
    tiny.model.model.towers["image"].register_forward_hook(lambda module, args, out: seen.append(out.values))
    Objective(tiny.model)(batches(tiny, 1)[0]).sums["text"].backward()
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


# Less than a whole part


def moved(composed, batches, stage, train, only, lora=None) -> set[str]:
    """Names of the tensors that one step changes."""
    names = [] if lora is None else adapters.inject(composed.model, lora)
    before = fingerprint(composed.model)
    groups = trainable(composed.model, train, only=only, adapted=names)
    optimizer = build_optimizer(groups, stage)
    set_rates(optimizer, 1.0)
    step(Objective(composed.model), optimizer, batches(composed, 1))
    after = composed.model.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


TOWER = "model.towers.image.backbone"
LAYERS = "model.language_model.layers"


def test_from_layer_k_of_the_tower_moves_these_blocks_and_nothing_before_or_beside_them(tiny, batches, stage):
    found = moved(tiny, batches, stage, {"vision": 1e-2}, {"vision": "from layer 1"})
    block = tiny.model.model.towers["image"].backbone.encoder.layers[1]
    assert found == {f"{TOWER}.encoder.layers.1.{name}" for name, _ in block.named_parameters()}


def test_from_layer_k_of_the_decoder_leaves_embeddings_last_norm_and_head_frozen(tiny, batches, stage):
    found = moved(tiny, batches, stage, {"language": 1e-2}, {"language": "from layer 1"})
    block = tiny.model.model.language_model.layers[1]
    assert found == {f"{LAYERS}.1.{name}" for name, _ in block.named_parameters()}


def test_norms_only_are_the_weights_of_every_norm_as_tinygptv_trains_them(batches, stage):
    composed = tiny_model(language="phi", qk_layernorm=True)
    found = moved(composed, batches, stage, {"language": 1e-2}, {"language": "norms"})
    names = ("input_layernorm", "self_attn.q_layernorm", "self_attn.k_layernorm")
    expected = {f"{LAYERS}.{i}.{name}.weight" for i in (0, 1) for name in names}
    assert found == expected | {"model.language_model.final_layernorm.weight"}

    composed = tiny_model(language="phi", qk_layernorm=True)
    with_biases = moved(composed, batches, stage, {"language": 1e-2}, {"language": "norms with biases"})
    # Keys are compared with queries by their differences: a shift of all keys changes nothing.
    shifts = {f"{LAYERS}.{i}.self_attn.k_layernorm.bias" for i in (0, 1)}
    assert with_biases - shifts == found | {name.replace(".weight", ".bias") for name in found} - shifts


def test_norms_of_the_connector_and_full_embeddings_beside_norms(tiny, batches, stage):
    train = {"connectors": 1e-2, "language": 1e-2, "embeddings": 1e-2}
    found = moved(tiny, batches, stage, train, {"connectors": "norms", "language": "norms"})
    norms = {n for n in fingerprint(tiny.model) if n.startswith("model.language_model") and "norm" in n}
    others = {
        "model.connectors.image.norm.weight",
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert found == norms | others


def test_named_modules_and_parameters_train_and_the_rest_of_their_part_does_not(tiny, batches, stage):
    """As TinyGPT-V trains the projections behind a frozen Q-Former."""
    train = {"connectors": 1e-2, "vision": 1e-2}
    only = {"connectors": "named proj", "vision": "named position_embedding, layers.1.layer_norm2"}
    found = moved(tiny, batches, stage, train, only)
    ends = [f"layers.1.layer_norm2.{end}" for end in ("weight", "bias")]
    tower = {f"{TOWER}.encoder.{end}" for end in ends} | {f"{TOWER}.embeddings.position_embedding.weight"}
    proj = {f"model.connectors.image.proj.{i}.{end}" for i in (0, 2) for end in ("weight", "bias")}
    assert found == tower | proj


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_of_an_adapter_b_moves_first_and_the_matrix_below_it_never(tiny, batches, stage, kind):
    found = moved(tiny, batches, stage, {"adapters": 1e-2}, {}, Lora(rank=2, kind=kind, dropout=0.0))
    ends = {"lora_B.default.weight"} | ({"lora_magnitude_vector.default.weight"} if kind == "dora" else set())
    assert {name.split("_proj.")[1] for name in found} == ends
    assert len(found) == 14 * len(ends)
    assert all(name.startswith(LAYERS) for name in found)


def test_adapters_norms_and_connectors_train_together_each_at_its_rate(tiny):
    names = adapters.inject(tiny.model, Lora(rank=2))
    train = {"adapters": 2e-4, "connectors": 2e-5, "language": 1e-5}
    groups = trainable(tiny.model, train, 0.1, None, {"language": "norms"}, names)
    assert {(g["group"], g["peak"]) for g in groups} == {(name, rate) for name, rate in train.items()}
    decay = {g["group"]: g["weight_decay"] for g in groups if g["group"] != "connectors"}
    assert decay == {"adapters": 0.1, "language": 0.0}


@pytest.mark.parametrize(
    ("parts", "part", "count"),
    [
        ({"vision": "siglip_vision_model"}, "vision", 2),
        ({"vision": "clip_vision_model"}, "vision", 2),
        ({"vision": "siglip2_vision_model"}, "vision", 2),
        ({"vision": "dinov2", "feature_layer": -1}, "vision", 3),
        ({"vision": "tinymodal_tower", "feature_layer": -1}, "vision", 2),
        ({"language": "llama"}, "language", 2),
        ({"language": "gpt2", "num_hidden_layers": 3}, "language", 3),
        ({"language": "phi", "num_hidden_layers": 5}, "language", 5),
        ({"language": "gemma2"}, "language", 2),
        ({"language": "opt"}, "language", 2),
        ({"language": "llama", "num_hidden_layers": 1}, "language", 1),
        ({"connector": "mlp"}, "connectors", 0),
    ],
)
def test_blocks_are_found_by_structure_whatever_a_family_calls_them(parts, part, count):
    model = tiny_model(**parts).model.model
    rooms = {
        "vision": model.towers["image"],
        "connectors": model.connectors["image"],
        "language": model.language_model,
    }
    found = blocks(rooms[part])
    assert len(found) == count
    assert len({type(block) for block in found}) <= 1


def test_a_sequential_is_a_stack_too_and_the_largest_one_counts():
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
    layers = nn.Sequential(*(nn.ModuleDict({"norm": nn.LayerNorm(4), "experts": experts}) for _ in range(2)))
    model = nn.ModuleDict({"stem": nn.Sequential(nn.Linear(4, 4), nn.GELU()), "layers": layers})
    assert blocks(model) == list(layers)
    assert blocks(nn.Sequential(nn.Linear(4, 4), nn.GELU())) == []


def test_norms_are_known_by_what_they_are():
    class OurRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    for module in (nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.RMSNorm(4), OurRMSNorm()):
        assert is_norm(module)
    for module in (nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 4), nn.Embedding(4, 4)):
        assert not is_norm(module)


def test_frozen_blocks_and_frozen_running_means_stay_in_eval_beside_blocks_that_train(tiny):
    tower = tiny.model.model.towers["image"]
    for block in tower.backbone.encoder.layers:
        block.add_module("drop", nn.Dropout(0.5))
    tower.add_module("stem", nn.BatchNorm2d(3))
    trainable(tiny.model, {"vision": 1e-3}, only={"vision": "from layer 1"})
    first, second = tower.backbone.encoder.layers
    assert (first.drop.training, second.drop.training) == (False, True)
    assert not tower.stem.training
    trainable(tiny.model, {"vision": 1e-3})
    assert first.drop.training
    assert tower.stem.training


def test_embeddings_follow_the_language_model_only_if_all_of_it_trains():
    assert rates_of({"language": 1e-3})["embeddings"] == 1e-3
    assert rates_of({"language": 1e-3}, {"language": "norms"})["embeddings"] == 0
    assert rates_of({"language": 1e-3, "embeddings": 1e-4}, {"language": "norms"})["embeddings"] == 1e-4


@pytest.mark.parametrize(
    ("train", "only", "told"),
    [
        ({"vision": 1e-3}, {"vision": "from layer 2"}, "'from layer 2', but SigLIP runs 2 blocks, 0 to 1"),
        ({"language": 1e-3}, {"language": "from layer 9"}, "LlamaModel runs 2 blocks, 0 to 1"),
        ({"connectors": 1e-3}, {"connectors": "from layer 0"}, "PixelShuffle has no blocks to count"),
        ({"connectors": 1e-3}, {"connectors": "named prog"}, "there are norm, proj; did you mean 'proj'?"),
        ({"adapters": 1e-3}, {}, "train.adapters has a rate, but this model has no parameters there"),
    ],
)
def test_a_choice_that_finds_nothing_is_refused_with_what_is_there(tiny, train, only, told):
    with pytest.raises(RecipeError) as caught:
        trainable(tiny.model, train, only=only)
    assert told in str(caught.value)


def test_norms_of_a_part_without_any_are_refused():
    model = tiny_model(connector="linear").model
    with pytest.raises(RecipeError, match=r"only\.connectors is 'norms', but nothing there is"):
        trainable(model, {"connectors": 1e-3}, only={"connectors": "norms"})


def test_a_matrix_may_not_train_below_its_adapter(tiny):
    names = adapters.targets(tiny.model, Lora(rank=2, targets=["q_proj"]))
    with pytest.raises(
        RecipeError, match="trains 2 matrices that lora keeps frozen below its adapters, first"
    ):
        trainable(tiny.model, {"adapters": 1e-3, "language": 1e-3}, adapted=names)
    adapters.inject(tiny.model, Lora(rank=2, targets=["q_proj"]))
    with pytest.raises(RecipeError, match=r"q_proj\.base_layer\.weight; take one of the two out"):
        trainable(tiny.model, {"adapters": 1e-3, "language": 1e-3}, adapted=names)


def test_the_table_tells_the_choice_and_is_the_same_before_and_after_the_adapters_are_there(tiny):
    train = {"vision": 2e-6, "connectors": 1e-3, "adapters": 2e-4}
    lora, only = Lora(rank=4), {"vision": "from layer 1"}
    size = sum(p.numel() for p in tiny.model.parameters())
    before = table(tiny.model, train, None, only, lora)
    adapters.inject(tiny.model, lora)
    after = table(tiny.model, train, None, only, lora)
    assert before == after
    rows = {row.group: row for row in after}
    layer = sum(p.numel() for p in tiny.model.model.towers["image"].backbone.encoder.layers[1].parameters())
    assert rows["vision"].trained == layer < rows["vision"].parameters
    assert rows["vision"].what == f"trains at 2e-06, from layer 1: {layer:,} of them"
    assert rows["adapters"].what == "trains at 0.0002, lora of rank 4 on 14 layers of language"
    assert (rows["language"].what, rows["language"].trained) == ("frozen", 0)
    assert sum(row.parameters for row in after) == size + rows["adapters"].parameters
    assert lines(after)[0].split()[0] == "vision"


def test_the_table_counts_weights_and_not_bytes_where_they_are_rounded(tiny):
    size = sum(p.numel() for p in tiny.model.parameters())
    quantize(tiny.model.model.language_model, 4)
    rows = table(tiny.model, {"connectors": 1e-3}, bits=4)
    assert sum(row.parameters for row in rows) == size
    assert {row.group: row.what for row in rows}["language"] == "frozen, its linear layers in 4 bits"
