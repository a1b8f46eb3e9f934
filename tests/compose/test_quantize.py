"""Few bits: what is rounded, by how much, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tinymodal.compose import quantize as room
from tinymodal.compose.quantize import dequantize, is_quantized, num_weights, quantize
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import RecipeError


@pytest.fixture
def decoder():
    return tiny_model().model.model.language_model


@pytest.mark.parametrize(("bits", "off"), [(4, 0.2), (8, 0.005)])
def test_every_linear_layer_is_rounded_and_nothing_else(decoder, bits, off):
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    count = sum(p.numel() for p in decoder.parameters())
    assert quantize(decoder, bits) == 14
    linear = {f"{name}.weight" for name, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    for name, p in decoder.named_parameters():
        assert not p.requires_grad or name not in linear
        if name in linear:
            layer = decoder.get_submodule(name.removesuffix(".weight"))
            assert is_quantized(layer)
            # Of the largest weight: 16 levels that lie densest at zero, or 255 at equal distances.
            worst = (dequantize(layer) - before[name]).abs().max() / before[name].abs().max()
            assert 0 < worst < off
        else:
            assert torch.equal(p, before[name])
    assert sum(num_weights(p) for p in decoder.parameters()) == count


def test_four_bits_take_an_eighth_of_the_memory():
    layer = nn.Sequential(nn.Linear(512, 512, bias=False))
    quantize(layer, 4)
    state = layer.state_dict()
    stored = sum(t.numel() * t.element_size() for name, t in state.items() if "quant_" not in name)
    scales = 512 * 512 // 64 + 512 * 512 // 64 // 256 * 4  # one byte a block, rounded in groups of 256
    assert stored - 512 * 512 // 2 == pytest.approx(
        scales, abs=1100
    )  # and the table of 256 they are rounded to


@pytest.mark.parametrize(("bits", "off"), [(4, 1e-6), (8, 2e-2)])
@pytest.mark.parametrize("training", [True, False])
def test_a_rounded_layer_computes_with_the_matrix_it_says_it_has(bits, off, training):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 48)).train(training)
    bias = layers[0].bias.detach().clone()
    quantize(layers, bits)
    x = torch.randn(5, 64, requires_grad=True)
    y = layers(x)
    expected = x @ dequantize(layers[0]).T + bias
    assert ((y - expected).abs().max() / expected.abs().max()).item() < off
    y.sum().backward()
    torch.testing.assert_close(x.grad, dequantize(layers[0]).sum(0).expand(5, 64), rtol=1e-3, atol=1e-3)
    # And again afterwards: bitsandbytes moves the scales of 8 bits with the first product.
    assert dequantize(layers[0]).shape == (48, 64)


def test_rounding_twice_is_not_rounding_once():
    """So a run never goes on from dequantized weights; it goes on from what it rounded."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(256, 256, bias=False))
    quantize(layers, 4)
    once = dequantize(layers[0])
    again = nn.Sequential(nn.Linear(256, 256, bias=False))
    again[0].weight.data = once.clone()
    quantize(again, 4)
    assert not torch.equal(dequantize(again[0]), once)


def test_without_bitsandbytes_the_recipe_is_refused_with_what_to_install(decoder, monkeypatch):
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=re.escape("pip install 'tinymodal[quant]'")):
        quantize(decoder, 4)


def test_a_model_without_linear_layers_is_refused():
    gpt2 = tiny_model(language="gpt2").model.model.language_model
    with pytest.raises(RecipeError, match="bits = 8: GPT2Model has no linear layer to store so"):
        quantize(gpt2, 8)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bias_keeps_its_float32_under_autocast(bits):
    """bitsandbytes rounds it to the inputs' type and leaves it so; a merged model would be saved so."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 48))
    bias = layers[0].bias.detach().clone()
    quantize(layers, bits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layers(torch.randn(5, 64, dtype=torch.bfloat16))
    assert layers[0].bias.dtype == torch.float32
    assert torch.equal(layers[0].bias, bias)
