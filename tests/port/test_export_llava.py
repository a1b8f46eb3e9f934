"""Our model as transformers' own Llava: its class and processor give the same, and it comes back whole."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from tests.port.exported import NEXT, a_job, a_model
from tinymodal.compose.build import load
from tinymodal.port import to_llava
from tinymodal.port.adopt import adopt
from tinymodal.port.export import export
from tinymodal.port.hf_llava import HFReference
from tinymodal.port.parity import cases, judge, record
from tinymodal.port.proof import Options
from tinymodal.port.source import Extras

VARIANTS = {
    "clip-crop": {"template": "vicuna_v1"},
    "clip-with-class-token": {"sight": {"resize": "square", "keep_class": True}},
    "clip-two-layers": {"feature_layer": (-1, 1), "sight": {"resize": "square"}},
    "siglip-square": {"vision": "siglip_vision_model", "sight": {"resize": "square"}},
    "siglip-last-layer-padded": {
        "vision": "siglip_vision_model",
        "feature_layer": -1,
        "sight": {"resize": "pad"},
    },
    "siglip-without-first-patch": {
        "vision": "siglip_vision_model",
        "sight": {"resize": "square", "drop_first": True},
    },
    "deep-layer-relu-tied-qwen2": {
        "feature_layer": 1,
        "options": {"activation": "relu"},
        "language": "qwen2",
        "tie_word_embeddings": True,
    },
    "next-clip-qwen3": {"language": "qwen3", "sight": NEXT},
    "next-siglip-tied": {"vision": "siglip_vision_model", "tie_word_embeddings": True, "sight": NEXT},
}


QUICK = (
    "clip-crop",
    "siglip-last-layer-padded",
    "siglip-without-first-patch",
    "deep-layer-relu-tied-qwen2",
    "next-clip-qwen3",
)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_transformers_own_class_computes_the_same(tmp_path, name):
    job = a_job(a_model(tmp_path / "ours", **VARIANTS[name]))
    out = tmp_path / "out"
    to_llava.write(job, out)
    theirs, left_out = record(HFReference(out), cases(), job.composed)
    assert left_out == []
    parity = judge(to_llava.by_pillow(job.composed), theirs, "transformers")
    assert parity.passed
    assert parity.largest <= 1e-5
    assert max(row.pixels for row in parity.rows) < 1e-5
    assert len({row.texts[0] for row in parity.rows}) > 1  # the model does look


@pytest.mark.parametrize("name", ["clip-crop", "next-siglip-tied"])
def test_what_left_can_be_adopted_again_bit_for_bit(tmp_path, name):
    job = a_job(a_model(tmp_path / "ours", **VARIANTS[name]))
    to_llava.write(job, tmp_path / "out")
    adopt(
        tmp_path / "out",
        tmp_path / "back",
        Extras(template=job.composed.encoder.template.name),
        forward=False,
    )
    ours, back = job.composed.model.state_dict(), load(tmp_path / "back").model.state_dict()
    assert set(ours) == set(back)
    assert all(torch.equal(ours[key], back[key]) for key in ours)


def test_names_are_those_that_vllm_reads(tmp_path):
    to_llava.write(a_job(a_model(tmp_path / "ours", sight=NEXT)), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.mlp.down_proj.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "image_newline",
    } <= names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlavaNextForConditionalGeneration"]
    assert config["vision_config"]["model_type"] == "clip_vision_model"
    assert config["vision_feature_layer"] == -2
    assert not list((tmp_path / "out").glob("*.py"))


def test_blocks_behind_the_layer_hand_their_input_on(tmp_path):
    """All but one of those that are not read are left out, and that one is zeros."""
    job = a_job(a_model(tmp_path / "ours", feature_layer=1))
    config = to_llava.llava_config(job.composed)
    assert (config.vision_config.num_hidden_layers, config.vision_feature_layer) == (2, -2)
    made = to_llava.whole_tower(job.composed, config.vision_config)
    behind = {name: w for name, w in made.items() if ".layers.1." in name}
    assert behind
    assert all(float(w.abs().max()) == 0 for name, w in behind.items() if "layer_norm" not in name)


def test_a_fresh_process_without_our_package_loads_it_and_answers_the_same(tmp_path):
    a_model(
        tmp_path / "ours", vision="siglip_vision_model", sight={"resize": "square"}, audio="tinymodal_ear"
    )
    done = export(
        str(tmp_path / "ours"), "llava", tmp_path / "out", Options(without=("audio",), num_prompts=5)
    )
    assert done.passed
    assert done.proof.parity.reference == ("transformers' LlavaForConditionalGeneration, without our package")
    assert done.proof.parity.largest <= 1e-5
    assert [check.passed for check in done.proof.checks] == [True, True]
    assert any("resized by the reader" in note for note in done.notes)


@pytest.mark.slow
def test_weights_in_16_bits_are_compared_in_32(tmp_path):
    a_model(tmp_path / "ours", sight=NEXT)
    done = export(str(tmp_path / "ours"), "llava", tmp_path / "out", Options(dtype="bfloat16", num_prompts=4))
    assert done.passed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor("image_newline").dtype == torch.bfloat16
