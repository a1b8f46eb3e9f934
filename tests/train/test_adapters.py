"""Adapters: where they go, what they compute, what is left of them when a stage ends."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from tinymodal.compose import build
from tinymodal.compose.quantize import dequantize, quantize
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import CheckpointError, RecipeError
from tinymodal.train import adapters
from tinymodal.train import stage as one_stage
from tinymodal.train.groups import trainable
from tinymodal.train.loop import run
from tinymodal.train.objective import Objective
from tinymodal.train.recipe import Lora

from .talk import WORDS

KINDS = ("lora", "dora", "rslora")
LANGUAGE = r"model\.language_model\.layers\.\d+\."
MLP = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
ATTENTION = ("self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj")


def lora(**changes) -> Lora:
    return Lora.model_validate({"rank": 4, "dropout": 0.0} | changes)


def learned(model) -> None:
    """As if the adapters had trained: B is no longer zero."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if adapters.is_adapter(name):
                p.add_(torch.randn_like(p) * 0.05)


@torch.no_grad()
def states(model, seed=0) -> torch.Tensor:
    """Logits of one sentence, float32 [1, 12, V]."""
    ids = torch.randint(6, 40, (1, 12), generator=torch.Generator().manual_seed(seed))
    return model.eval()(input_ids=ids).logits


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# Where they go


@pytest.mark.parametrize("language", ["llama", "qwen2", "phi", "gpt2", "stablelm"])
def test_only_linear_layers_of_the_language_model_get_an_adapter_whatever_the_family(language):
    model = tiny_model(language=language).model
    found = adapters.targets(model, lora())
    plain = {
        name
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    assert found
    assert {name.removeprefix("model.language_model.") for name in found} == plain
    assert not any("lm_head" in name or "tower" in name for name in found)


def test_an_adapter_of_the_tower_leaves_out_what_attention_reads_without_calling(tiny):
    tower = tiny.model.model.towers["image"]
    tower.add_module("pool", nn.MultiheadAttention(32, 4))
    found = adapters.targets(tiny.model, lora(parts=["vision", "connectors"]))
    assert "model.towers.image.backbone.encoder.layers.1.mlp.fc2" in found
    assert "model.connectors.image.proj.0" in found
    assert not any("pool" in name or "language_model" in name for name in found)


def test_targets_are_the_layers_own_names_in_the_named_parts_only(tiny):
    # The tower has a q_proj and a v_proj as well; LLaVA's adapters went there unasked.
    found = adapters.targets(tiny.model, lora(targets=["q_proj", "self_attn.v_proj"]))
    layers = [f"model.language_model.layers.{i}.self_attn" for i in (0, 1)]
    assert found == [f"{layer}.{name}" for layer in layers for name in ("q_proj", "v_proj")]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"targets": ["q_pro"]}, "no linear layer of language is called 'q_pro'"),
        ({"targets": ["q_pro"]}, "did you mean 'q_proj'?"),
        ({"targets": ["lm_head"]}, "is called 'lm_head'; there are down_proj, gate_proj"),
    ],
)
def test_a_target_that_matches_nothing_is_refused(tiny, changes, told):
    with pytest.raises(RecipeError) as caught:
        adapters.targets(tiny.model, lora(**changes))
    assert told in str(caught.value)


def test_a_part_without_linear_layers_is_refused():
    model = tiny_model(connector="identity").model
    with pytest.raises(RecipeError, match=r"lora\.parts: connectors has no linear layer in this model"):
        adapters.targets(model, lora(parts=["connectors"]))


def test_without_peft_the_recipe_is_refused_with_what_to_install(tiny, monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=re.escape("pip install 'tinymodal[train]'")):
        adapters.targets(tiny.model, lora())


def test_an_adapter_is_not_put_onto_an_adapter(tiny):
    adapters.inject(tiny.model, lora())
    with pytest.raises(RecipeError, match="has an adapter already; merge it first"):
        adapters.inject(tiny.model, lora())


def test_the_pattern_leaves_the_layers_numbers_open_so_that_it_fits_a_deeper_model_too(tiny):
    every = [name for name, _ in tiny.model.named_modules()]
    found = adapters.pattern(adapters.targets(tiny.model, lora()), every)
    assert found == LANGUAGE + "(?:" + "|".join(re.escape(n) for n in (*MLP, *ATTENTION)) + ")"
    deeper = tiny_model(num_hidden_layers=12).model
    fits = {name for name, _ in deeper.named_modules() if re.fullmatch(found, name)}
    assert fits == set(adapters.targets(deeper, lora()))


def test_a_pattern_that_would_fit_too_much_becomes_the_names_themselves():
    every = ["a.0.q", "a.1.q", "a.0.k"]
    assert adapters.pattern(["a.0.q", "a.1.q"], every) == r"a\.\d+\.(?:q)"
    only_one = adapters.pattern(["a.1.q"], every)
    assert [name for name in every if re.fullmatch(only_one, name)] == ["a.1.q"]


WORDS_OF_NAMES = st.lists(st.sampled_from(["a", "b.c", "q", "0", "1", "12"]), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(st.sets(WORDS_OF_NAMES.map(".".join), min_size=1, max_size=8), st.data())
def test_a_pattern_fits_the_names_it_was_made_of_and_no_other(every, data):
    chosen = data.draw(st.sets(st.sampled_from(sorted(every)), min_size=1))
    found = adapters.pattern(chosen, every)
    assert {name for name in every if re.fullmatch(found, name)} == chosen


def test_parameters_are_counted_before_they_are_there():
    for kind in KINDS:
        model = tiny_model().model
        wanted = lora(kind=kind, targets=["down_proj", "q_proj"])
        told = adapters.count(model, adapters.targets(model, wanted), wanted)
        adapters.inject(model, wanted)
        assert told == sum(p.numel() for n, p in model.named_parameters() if adapters.is_adapter(n))


# What they compute


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("language", ["llama", "phi", "gpt2"])
def test_merged_equals_unmerged_and_both_equal_the_papers_formula(kind, language):
    model = tiny_model(language=language).model
    names = adapters.inject(model, lora(kind=kind, alpha=6))
    before = {name: model.get_submodule(name).get_base_layer().weight.clone() for name in names}
    learned(model)
    live = {name: p.detach().clone() for name, p in model.named_parameters()}
    unmerged = states(model)

    worst = adapters.merge(model)

    # Measured 1.0e-7 to 2.1e-7; the adapters themselves change the logits by 0.16 to 0.52.
    torch.testing.assert_close(states(model), unmerged, rtol=0, atol=1e-5)
    assert worst < 1e-5
    scale = 6 / 2 if kind == "rslora" else 6 / 4
    for name in names:
        down, up = live[f"{name}.lora_A.default.weight"], live[f"{name}.lora_B.default.weight"]
        turned = language == "gpt2"  # its matrices are [in, out]
        expected = (before[name].T if turned else before[name]) + scale * up @ down
        if kind == "dora":
            length = live[f"{name}.lora_magnitude_vector.default.weight"]
            expected = expected / expected.pow(2).sum(1, keepdim=True).sqrt() * length[:, None]
        merged = model.get_submodule(name).weight
        torch.testing.assert_close(merged.T if turned else merged, expected, rtol=0, atol=1e-6)
    assert not hasattr(model, "peft_config")


def test_a_new_adapter_changes_nothing_before_it_has_trained(tiny):
    before = states(tiny.model)
    adapters.inject(tiny.model, lora())
    torch.testing.assert_close(states(tiny.model), before, rtol=0, atol=0)


def test_inside_merged_the_model_is_plain_and_afterwards_untouched_to_the_last_bit(tiny):
    plain = [name for name, _ in tiny.model.named_parameters()]
    adapters.inject(tiny.model, lora(kind="dora"))
    learned(tiny.model)
    before = {name: t.clone() for name, t in tiny.model.state_dict().items()}
    unmerged = states(tiny.model)
    with adapters.merged(tiny.model):
        assert [name for name, _ in tiny.model.named_parameters()] == plain
        torch.testing.assert_close(states(tiny.model), unmerged, rtol=0, atol=1e-5)
    assert_equal(dict(tiny.model.state_dict()), before)
    assert torch.equal(states(tiny.model), unmerged)


def test_an_adapter_with_broken_numbers_is_not_merged_in_silence(tiny):
    names = adapters.inject(tiny.model, lora())
    with torch.no_grad():
        tiny.model.get_submodule(names[3]).lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError) as caught:
        adapters.merge(tiny.model)
    assert names[3] in str(caught.value)


# peft reads them


@pytest.mark.parametrize("kind", KINDS)
def test_peft_itself_puts_the_saved_adapter_onto_the_start_and_computes_the_same(kind, start, tmp_path):
    model = build.load(start).model
    adapters.inject(model, lora(kind=kind), base="somewhere/start")
    trainable(model, {"adapters": 1e-3}, adapted=list(adapters.adapted(model)))
    learned(model)
    adapters.save(model, tmp_path / "adapter")

    again = PeftModel.from_pretrained(build.load(start).model, str(tmp_path / "adapter"))

    torch.testing.assert_close(states(again), states(model), rtol=0, atol=1e-6)
    assert (states(again) - states(build.load(start).model)).abs().max() > 1e-2
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "somewhere/start"
    assert told["target_modules"].startswith(LANGUAGE)  # ours, not one machine's


def test_what_trains_beside_the_adapters_travels_with_them(start, tmp_path, batches):
    """Connectors, norms and embeddings: without them the folder would give a model that nobody trained."""
    composed = build.load(start)
    model = composed.model
    names = adapters.inject(model, lora())
    train = {"adapters": 1e-2, "connectors": 1e-2, "language": 1e-2, "embeddings": 1e-2, "vision": 1e-2}
    only = {"language": "norms", "vision": "from layer 1"}
    trainable(model, train, only=only, adapted=names)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    adapters.save(model, tmp_path / "adapter")

    again = PeftModel.from_pretrained(build.load(start).model, str(tmp_path / "adapter"))

    batch = batches(composed, 1)[0]
    ours, theirs = (Objective(m.eval())(batch).sums["text"] for m in (model, again.base_model.model))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(states(again), states(model), rtol=0, atol=1e-5)
    whole = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"]
    assert "model.connectors.image" in whole
    assert "model.towers.image.backbone.encoder.layers.1" in whole
    assert "model.language_model.norm" in whole


# In a run


@pytest.fixture
def plan(recipe):
    """``plan(stage, stage, ...)``: stages that train adapters and the connector."""

    def make(*stages, **changes):
        plain = {
            "train": {"adapters": 1e-2, "connectors": 1e-2},
            "lora": {"rank": 4, "dropout": 0.1},
            "steps": 3,
        }
        return recipe(*stages, **plain | changes)

    return make


def test_a_run_leaves_a_merged_model_that_needs_no_peft_and_the_adapter_beside_it(plan, start, tmp_path):
    trained = run(plan(), tmp_path / "run", progress=False)
    loaded = build.load(tmp_path / "run")
    assert_equal(dict(loaded.model.state_dict()), dict(trained.model.state_dict()))
    assert weights(tmp_path / "run" / "model").keys() == weights(start).keys()
    again = PeftModel.from_pretrained(build.load(start).model, str(tmp_path / "run" / "adapter"))
    torch.testing.assert_close(states(again), states(loaded.model), rtol=0, atol=1e-5)
    assert (states(again) - states(build.load(start).model)).abs().max() > 1e-3
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(start)


def test_a_stage_goes_on_from_an_adapter_by_merging_it_first_and_nothing_is_nested(plan, tmp_path):
    plans = plan(
        {"name": "a"},
        {"name": "b", "lora": {"rank": 2, "kind": "dora"}},
        {"name": "c", "train": {"language": 1e-3, "vision": 1e-3}, "lora": None},
    )
    run(plans, tmp_path / "run", progress=False)
    folder = tmp_path / "run"
    for place in (folder / "stages" / "a", folder / "stages" / "b", folder / "model"):
        assert not any("lora" in name or "base_layer" in name for name in weights(place))
    # Each adapter stands on the model of the stage before it.
    onto = PeftModel.from_pretrained(
        build.load(folder / "stages" / "a").model, str(folder / "adapters" / "b")
    )
    expected = states(build.load(folder / "stages" / "b").model)
    torch.testing.assert_close(states(onto), expected, rtol=0, atol=1e-5)
    told = json.loads((folder / "adapters" / "b" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(folder / "stages" / "a")
    assert not (folder / "adapter").exists()  # the last stage had none


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.fixture
def steps(monkeypatch):
    class Steps(list):
        until: int | None = None

    seen = Steps()
    real = one_stage.step

    def recorded(*args, **options):
        if len(seen) == seen.until:
            raise Killed
        seen.append(real(*args, **options))
        return seen[-1]

    monkeypatch.setattr(one_stage, "step", recorded)
    return seen


DORA = {"rank": 2, "kind": "dora"}
CUT = {
    "first stage": ([{"name": "a", "steps": 20}], 14),
    "later stage": ([{"name": "a", "steps": 5}, {"name": "b", "steps": 15, "lora": DORA}], 17),
    "4 bits": ([{"name": "a", "steps": 20, "bits": 4}], 14),
    "8 bits": ([{"name": "a", "steps": 20, "bits": 8}], 14),
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        "later stage",
        "4 bits",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("first stage", "8 bits")),
    ],
)
def test_with_adapters_too_a_run_that_was_killed_ends_as_if_never_interrupted(case, plan, steps, tmp_path):
    stages, until = CUT[case]
    recipe = plan(*stages, save_every=10)
    run(recipe, tmp_path / "whole", progress=False)
    expected = list(steps)
    assert len(expected) == 20

    steps.clear()
    steps.until = until
    with pytest.raises(Killed):
        run(recipe, tmp_path / "killed", progress=False)
    steps.until = None
    run(recipe, tmp_path / "killed", progress=False)
    again = len(steps) - 20
    assert 0 < again < 10
    assert steps[until:] == expected[until - again :]  # losses, norms and sample ids
    for place in ("model", *(f"stages/{stage['name']}" for stage in stages[:-1])):
        assert_equal(weights(tmp_path / "killed" / place), weights(tmp_path / "whole" / place))
    ours, theirs = (
        load_file(tmp_path / which / "adapter" / "adapter_model.safetensors") for which in ("killed", "whole")
    )
    assert_equal(ours, theirs)


def test_an_adapter_does_not_go_on_where_its_stage_began_with_another_model(plan, steps, start, tmp_path):
    other = tmp_path / "start"
    build.save(build.load(start), other)
    recipe = plan(steps=8, save_every=4)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(other)})})
    steps.until = 6
    with pytest.raises(Killed):
        run(recipe, tmp_path / "run", progress=False)
    steps.until = None
    build.save(tiny_model(words=WORDS, seed=5), other)
    with pytest.raises(CheckpointError) as caught:
        run(recipe, tmp_path / "run", progress=False)
    assert f"began with another model than {other} holds now" in str(caught.value)


def test_frozen_parts_are_bit_identical_after_a_run_of_adapters(plan, start, tmp_path):
    run(plan(lora={"rank": 4, "targets": ["q_proj"]}), tmp_path / "run", progress=False)
    before, after = weights(start), weights(tmp_path / "run" / "model")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = {f"model.language_model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    assert moved == wanted | {name for name in before if ".connectors." in name}


def test_of_4_bits_the_rounded_matrices_are_saved_because_the_adapter_was_trained_on_them(
    plan, start, tmp_path
):
    trained = run(plan(bits=4), tmp_path / "run", progress=False)
    base = build.load(start).model
    quantize(base.model.language_model, 4)
    rounded = PeftModel.from_pretrained(base_as_computed(base), str(tmp_path / "run" / "adapter"))
    torch.testing.assert_close(states(rounded), states(trained.model), rtol=0, atol=1e-5)
    unrounded = PeftModel.from_pretrained(build.load(start).model, str(tmp_path / "run" / "adapter"))
    off = (states(unrounded) - states(trained.model)).abs().max()
    assert 1e-4 < off < 0.5  # what NF4 does to these weights
    before, after = weights(start), weights(tmp_path / "run" / "model")
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert "lm_head.weight" in still
    assert all("norm" in n or "embed" in n or "tower" in n or n == "lm_head.weight" for n in still)


def base_as_computed(model):
    """``model`` in float32, with the numbers that its quantized layers compute with."""
    with adapters.merged(model):
        state = {name: t.clone() for name, t in model.state_dict().items()}
    plain = tiny_model(words=WORDS).model
    plain.load_state_dict(state)
    return plain


# 8 bits round the inputs too, which merged float32 layers do not: 2.7e-3 of the logits here, and 4 bits 2e-7.
@pytest.mark.parametrize(
    ("kind", "bits", "off"), [("lora", 4, 1e-5), ("dora", 4, 1e-5), ("rslora", 4, 1e-5), ("lora", 8, 1e-2)]
)
def test_on_a_quantized_language_model_merged_equals_unmerged(kind, bits, off):
    model = tiny_model().model
    quantize(model.model.language_model, bits)
    names = adapters.inject(model, lora(kind=kind))
    learned(model)
    rounded = dequantize(model.get_submodule(names[0]).get_base_layer())
    unmerged = states(model)
    assert adapters.merge(model) < off
    torch.testing.assert_close(states(model), unmerged, rtol=0, atol=off)
    assert type(model.get_submodule(names[0])) is nn.Linear
    assert not torch.equal(model.get_submodule(names[0]).weight, rounded)


def test_the_table_of_a_stage_is_kept_with_every_tensor_that_trains_and_what_the_first_step_did(
    plan, tmp_path
):
    run(plan(), tmp_path / "run", progress=False)
    text = (tmp_path / "run" / "trains" / "only.txt").read_text()
    assert "language           18,592  frozen" in text
    assert "adapters" in text
    assert "trains at 0.01, lora of rank 4 on 14 layers of language" in text
    # 6 of the connector and every B; every A waits, because its B was still zero.
    assert "after step 1: 20 of 34 tensors that train have moved, 14 wait for a gradient, none of the" in text
    assert re.search(
        r"0.01 +0 +4x32 +model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight", text
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"lora": {"rank": 4, "targets": ["q_pro"]}},
            "stages.only: lora.targets: no linear layer of language",
        ),
        (
            {"train": {"adapters": 1e-3, "language": 1e-3}, "only": {"language": "from layer 1"}},
            "trains 7 matrices that lora keeps frozen below its adapters",
        ),
    ],
)
def test_what_an_adapter_cannot_do_is_told_before_the_first_step(plan, steps, tmp_path, changes, told):
    with pytest.raises(RecipeError) as caught:
        run(plan(**changes), tmp_path / "run", progress=False)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not steps
    assert not (tmp_path / "run").exists()
