"""TinyGPT-V's Phi-2 against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.model.by_hand import attend, gelu_tanh, heads, layer_norm, rms, turn
from tests.model.test_language import loud
from tinymodal.compose.tiny import tiny_language
from tinymodal.model.tinygptv_phi import TinyGPTVPhiConfig, TinyGPTVPhiForCausalLM


def config_of(**changed) -> TinyGPTVPhiConfig:
    values = {**tiny_language("tinygptv_phi", vocab_size=96), **changed}
    values.pop("model_type")
    return TinyGPTVPhiConfig(**values)


def by_hand(config: TinyGPTVPhiConfig, weights: dict[str, Tensor], ids: Tensor, turning: int) -> Tensor:
    """Logits [T, V] of token ids [T], from weights under the public repository's names."""
    w = {name.removeprefix("model."): value.double() for name, value in weights.items()}
    width = config.hidden_size // config.num_attention_heads

    def normed(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], config.layer_norm_eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embed_tokens.weight"][ids]
    for n in range(config.num_hidden_layers):
        at = f"layers.{n}"
        y = normed(x, f"{at}.input_layernorm")
        fused = heads(linear(y, f"{at}.self_attn.query_key_value"), width)
        said = []
        for a in range(config.num_attention_heads):
            q, k, v = fused[3 * a : 3 * a + 3]
            q = turn(normed(q, f"{at}.self_attn.q_layernorm"), turning)
            k = turn(normed(k, f"{at}.self_attn.k_layernorm"), turning)
            said.append(attend(q, k, v))
        attended = rms(
            linear(torch.cat(said, dim=1), f"{at}.self_attn.dense"), w[f"{at}.post_layernorm.weight"]
        )
        inner = gelu_tanh(linear(y, f"{at}.mlp.fc1"))
        x = attended + linear(inner, f"{at}.mlp.fc2") + x
    return linear(normed(x, "final_layernorm"), "lm_head")


@pytest.mark.parametrize(("turning", "part"), [(4, 0.5), (6, 0.75), (8, 1.0)])
@torch.no_grad()
def test_logits_are_those_of_the_formula(turning, part):
    config = config_of(partial_rotary_factor=part)
    torch.manual_seed(0)
    model = loud(TinyGPTVPhiForCausalLM(config))
    ids = torch.randint(0, 96, (11,))
    expected = by_hand(config, model.state_dict(), ids, turning)
    logits = model(input_ids=ids[None]).logits[0].double()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.5


def test_the_names_of_weights_are_the_public_repositorys():
    model = TinyGPTVPhiForCausalLM(config_of(num_hidden_layers=1))
    weight_and_bias = {
        "self_attn.query_key_value": (96, 32),
        "self_attn.dense": (32, 32),
        "self_attn.q_layernorm": (8,),
        "self_attn.k_layernorm": (8,),
        "mlp.fc1": (64, 32),
        "mlp.fc2": (32, 64),
        "input_layernorm": (32,),
    }
    expected = {"model.embed_tokens.weight": (96, 32), "model.layers.0.post_layernorm.weight": (32,)}
    for name, shape in weight_and_bias.items():
        expected[f"model.layers.0.{name}.weight"] = shape
        expected[f"model.layers.0.{name}.bias"] = shape[:1]
    for name, shape in {"model.final_layernorm": (32,), "lm_head": (96, 32)}.items():
        expected[f"{name}.weight"], expected[f"{name}.bias"] = shape, shape[:1]
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected


def test_fewer_key_heads_are_refused():
    with pytest.raises(
        ValueError, match="num_key_value_heads is 2, but each of the 4 heads has its own keys"
    ):
        config_of(num_key_value_heads=2)
    assert config_of(num_key_value_heads=4).num_key_value_heads == 4
