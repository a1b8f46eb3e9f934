"""OpenELM against its formula, and its config against the published sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.model.by_hand import attend, heads, rms, silu, turn
from tests.model.test_language import loud
from tinymodal.compose.tiny import tiny_language
from tinymodal.model.openelm import OpenELMConfig, OpenELMForCausalLM, rounded

PUBLISHED = {"head_dim": 64, "num_gqa_groups": 4, "normalize_qk_projections": True}
PUBLISHED |= {"share_input_output_layers": True, "ffn_multipliers": (0.5, 4.0), "qkv_multipliers": (0.5, 1.0)}


def by_hand(config: OpenELMConfig, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits [T, V] of token ids [T], from weights under Apple's names."""
    w = {name: value.double() for name, value in weights.items()}
    x = w["transformer.token_embeddings.weight"][ids]
    for n in range(config.num_transformer_layers):
        at = {name.split(f"layers.{n}.")[1]: v for name, v in w.items() if f"layers.{n}." in name}
        queries, keys = config.num_query_heads[n], config.num_kv_heads[n]
        fused = heads(rms(x, at["attn_norm.weight"]) @ at["attn.qkv_proj.weight"].T, config.head_dim)
        said = []
        for a in range(queries):
            group = queries + a // (queries // keys)
            q, k, v = fused[a], fused[group], fused[group + keys]
            if config.normalize_qk_projections:
                q, k = rms(q, at["attn.q_norm.weight"]), rms(k, at["attn.k_norm.weight"])
            base = config.rope_freq_constant
            said.append(attend(turn(q, config.head_dim, base), turn(k, config.head_dim, base), v))
        x = x + torch.cat(said, dim=1) @ at["attn.out_proj.weight"].T
        inner = rms(x, at["ffn_norm.weight"]) @ at["ffn.proj_1.weight"].T
        if config.ffn_with_glu:
            gate, up = inner.chunk(2, dim=1)
            inner = silu(gate) * up
        else:
            inner = silu(inner)
        x = x + inner @ at["ffn.proj_2.weight"].T
    head = w.get("lm_head.weight", w["transformer.token_embeddings.weight"])
    return rms(x, w["transformer.norm.weight"]) @ head.T


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"normalize_qk_projections": False, "rope_freq_constant": 500},
        {"ffn_with_glu": False, "share_input_output_layers": False},
        {"num_transformer_layers": 3, "num_query_heads": [2, 6, 4], "num_kv_heads": [1, 2, 4]},
    ],
    ids=["as published", "no norms of queries", "no gate, own head", "heads layer by layer"],
)
@torch.no_grad()
def test_logits_are_those_of_the_formula(changed):
    values = {**tiny_language("openelm", vocab_size=96), **changed}
    values.pop("model_type")
    config = OpenELMConfig(**values)
    torch.manual_seed(0)
    model = loud(OpenELMForCausalLM(config))
    ids = torch.randint(0, 96, (11,))
    expected = by_hand(config, model.state_dict(), ids)
    logits = model(input_ids=ids[None]).logits[0].double()
    # 4e-6 of logits near 10.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.5


def test_layers_have_the_published_numbers_of_heads():
    """As in the config.json of apple/OpenELM-270M."""
    config = OpenELMConfig(num_transformer_layers=16, model_dim=1280, **PUBLISHED)
    assert config.num_query_heads == [12] * 5 + [16] * 7 + [20] * 4
    assert config.num_kv_heads == [3] * 5 + [4] * 7 + [5] * 4
    assert config.ffn_multipliers[:4] == [0.5, 0.73, 0.97, 1.2]
    assert config.ffn_multipliers[-2:] == [3.77, 4.0]


@pytest.mark.parametrize(
    ("layers", "width", "head", "billions"),
    [(16, 1280, 64, 0.27), (20, 1536, 64, 0.46), (28, 2048, 64, 1.08), (36, 3072, 128, 3.04)],
)
def test_the_four_published_sizes_come_out(layers, width, head, billions):
    """0.27, 0.45, 1.08 and 3.04 billion parameters in arXiv:2404.14619, table 9 and text."""
    config = OpenELMConfig(num_transformer_layers=layers, model_dim=width, **{**PUBLISHED, "head_dim": head})
    with torch.device("meta"):
        model = OpenELMForCausalLM(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions


def test_the_names_of_weights_are_apples():
    config = OpenELMConfig(num_transformer_layers=16, model_dim=1280, **PUBLISHED)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in OpenELMForCausalLM(config).named_parameters()}
    first = {name: shape for name, shape in shapes.items() if ".layers.0." in name}
    assert first == {
        "transformer.layers.0.attn.qkv_proj.weight": (1152, 1280),
        "transformer.layers.0.attn.q_norm.weight": (64,),
        "transformer.layers.0.attn.k_norm.weight": (64,),
        "transformer.layers.0.attn.out_proj.weight": (1280, 768),
        "transformer.layers.0.ffn.proj_1.weight": (1536, 1280),
        "transformer.layers.0.ffn.proj_2.weight": (1280, 768),
        "transformer.layers.0.ffn_norm.weight": (1280,),
        "transformer.layers.0.attn_norm.weight": (1280,),
    }
    outside = {name for name in shapes if ".layers." not in name}
    assert outside == {"transformer.token_embeddings.weight", "transformer.norm.weight"}


def test_a_config_is_the_same_after_it_was_written():
    config = OpenELMConfig(num_transformer_layers=16, model_dim=1280, **PUBLISHED)
    again = OpenELMConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert (again.hidden_size, again.num_hidden_layers, again.max_position_embeddings) == (1280, 16, 2048)
    assert again.tie_word_embeddings is True
    # What older versions of transformers wrote beside it does not untie or tie anything.
    assert (
        OpenELMConfig(share_input_output_layers=False, tie_word_embeddings=True).tie_word_embeddings is False
    )
    assert OpenELMConfig(tie_word_embeddings=True).share_input_output_layers is True


@pytest.mark.parametrize("width", [1, 63, 100, 1280 * 0.73, 5000.5])
def test_widths_are_rounded_to_multiples_but_not_down_by_a_tenth(width):
    for divisor in (8, 64, 256):
        found = rounded(width, divisor)
        assert found % divisor == 0
        assert found >= 0.9 * width
        assert found - width < divisor


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 64}, "OpenELM calls hidden_size model_dim; give that instead"),
        ({"head_dim": 7}, "head_dim is 7; .* must be even"),
        ({"normalization_layer_name": "layer_norm"}, "OpenELM's norm is 'rms_norm', got 'layer_norm'"),
        ({"ffn_multipliers": [1.0, 2.0, 3.0]}, "ffn_multipliers: 3 numbers for 12 layers; give 1, 2 or 12"),
        ({"num_query_heads": [4, 4]}, "num_query_heads are of 2 layers, but there are 12"),
        (
            {"num_query_heads": [4] * 12, "num_kv_heads": [4] * 11 + [3]},
            "layer 11: 4 query heads cannot share 3 key heads evenly",
        ),
        (
            {"num_query_heads": [4] * 12, "num_gqa_groups": 8},
            "layer 0: 4 query heads cannot share 0 key heads",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_numbers(values, message):
    with pytest.raises(ValueError, match=message):
        OpenELMConfig(**values)
