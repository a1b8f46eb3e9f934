"""MiniCPM against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.model.by_hand import attend, heads, rms, silu, turn
from tests.model.test_language import loud
from tinymodal.compose.tiny import tiny_language
from tinymodal.model.minicpm import MiniCPMConfig, MiniCPMForCausalLM


def config_of(**changed) -> MiniCPMConfig:
    values = {**tiny_language("minicpm", vocab_size=96), **changed}
    values.pop("model_type")
    return MiniCPMConfig(**values)


def by_hand(config: MiniCPMConfig, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits [T, V] of token ids [T], from weights under OpenBMB's names."""
    w = {name.removeprefix("model."): value.double() for name, value in weights.items()}
    eps, width = config.rms_norm_eps, config.head_dim
    added = config.scale_depth / math.sqrt(config.num_hidden_layers)
    shared = config.num_attention_heads // config.num_key_value_heads
    x = w["embed_tokens.weight"][ids] * config.scale_emb
    for n in range(config.num_hidden_layers):
        at = {
            name.removeprefix(f"layers.{n}."): v for name, v in w.items() if name.startswith(f"layers.{n}.")
        }
        y = rms(x, at["input_layernorm.weight"], eps)
        q, k, v = (heads(y @ at[f"self_attn.{p}_proj.weight"].T, width) for p in "qkv")
        said = [
            attend(turn(q[a], width), turn(k[a // shared], width), v[a // shared])
            for a in range(config.num_attention_heads)
        ]
        x = x + added * (torch.cat(said, dim=1) @ at["self_attn.o_proj.weight"].T)
        y = rms(x, at["post_attention_layernorm.weight"], eps)
        inner = silu(y @ at["mlp.gate_proj.weight"].T) * (y @ at["mlp.up_proj.weight"].T)
        x = x + added * (inner @ at["mlp.down_proj.weight"].T)
    x = rms(x, w["norm.weight"], eps) / (config.hidden_size / config.dim_model_base)
    return x @ w["lm_head.weight"].T


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"scale_emb": 3.5, "scale_depth": 0.7, "dim_model_base": 32},
        {"tie_word_embeddings": False, "num_key_value_heads": 4},
    ],
    ids=["as published", "other scales", "own head"],
)
@torch.no_grad()
def test_logits_are_those_of_the_formula(changed):
    config = config_of(**changed)
    torch.manual_seed(0)
    model = loud(MiniCPMForCausalLM(config))
    ids = torch.randint(0, 96, (11,))
    expected = by_hand(config, model.state_dict(), ids)
    logits = model(input_ids=ids[None]).logits[0].double()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.5


@torch.no_grad()
def test_words_are_scaled_and_a_tied_head_is_not():
    model = MiniCPMForCausalLM(config_of())
    rows = model.lm_head.weight
    assert rows is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings()(torch.tensor([7])), rows[7:8] * 12)
    # More words keep the scale.
    model.resize_token_embeddings(100, mean_resizing=False)
    assert torch.equal(model.get_input_embeddings()(torch.tensor([99])), model.lm_head.weight[99:] * 12)


def test_the_published_size_comes_out():
    """MiniCPM-2B: 2.4 billion parameters without the embedding."""
    config = MiniCPMConfig(
        vocab_size=122753,
        hidden_size=2304,
        intermediate_size=5760,
        num_hidden_layers=40,
        num_attention_heads=36,
        num_key_value_heads=36,
        scale_emb=12,
        scale_depth=1.4,
        dim_model_base=256,
    )
    with torch.device("meta"):
        model = MiniCPMForCausalLM(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert "lm_head.weight" not in sizes  # tied, which is the default here
    assert round((sum(sizes.values()) - sizes["model.embed_tokens.weight"]) / 1e9, 1) == 2.4


def test_later_models_that_compute_something_else_are_refused():
    with pytest.raises(ValueError, match=r"MiniCPM with sparse attention \(sparse_config\) is not supported"):
        config_of(sparse_config={"topk": 64})
    with pytest.raises(ValueError, match=r"MiniCPM with experts \(num_experts\) is not supported"):
        config_of(num_experts=8)
    assert config_of(sparse_config=None).scale_emb == 12
