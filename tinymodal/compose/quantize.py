"""Linear layers in 4 or 8 bits: what a language model is stored in while adapters train (QLoRA).

4 bits are NF4 in blocks of 64 with the blocks' scales rounded as well (QLoRA, arXiv:2305.14314): 4.13 bits a
weight. 8 bits are rows of int8 with one scale (LLM.int8(), arXiv:2208.07339): inputs are rounded too, but for
columns with values above 6. Only ``nn.Linear`` is stored so; embeddings, norms and the language head keep
their float32.

Rounding is not undone: :func:`dequantize` gives what the layer computes with, not what it was made from, and
rounding that once more may give other numbers. Needs bitsandbytes, which runs on CPUs as well.
"""

from __future__ import annotations

import logging
import math
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tinymodal.core.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

OUTLIER = 6.0
"""Input columns with a larger value are computed in half precision instead of int8, as LLM.int8() does."""
CLASSES = ("Linear4bit", "Linear8bitLt")
"""What bitsandbytes calls its layers; by name, so that asking does not load it."""


def require(bits: int) -> None:
    """Raise RecipeError where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"bits = {bits} needs bitsandbytes, which is not installed; pip install 'tinymodal[quant]'"
        )


def quantize(
    module: nn.Module,
    bits: Literal[4, 8],
    device: torch.device | str = "cpu",
    compute: torch.dtype = torch.float32,
) -> int:
    """Store every linear layer in ``module`` in fewer bits, in place, one after the other.

    Args:
        module: in float32; on the CPU it may be larger than the memory of ``device``.
        bits: 4 or 8.
        device: where the rounded layers go; the rest of ``module`` stays where it is.
        compute: data type of the products, 4 bits only.

    Returns:
        How many layers were rounded.

    Raises:
        RecipeError: bitsandbytes is missing, or there is no linear layer.
    """
    require(bits)
    # It says with every product that float32 is rounded to float16 on the way to int8.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    layers = list(_linear_layers(module))
    if not layers:
        raise RecipeError(f"bits = {bits}: {type(module).__name__} has no linear layer to store so")
    for parent, name, layer in layers:
        parent._modules[name] = _rounded(layer, bits, torch.device(device), compute)
    return len(layers)


def is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is a layer that :func:`quantize` made."""
    return type(module).__name__ in CLASSES


@torch.no_grad()
def dequantize(layer: nn.Module) -> Tensor:
    """The matrix that a rounded layer computes with: float32 [out, in], on the layer's device."""
    bnb: Any = import_module("bitsandbytes.functional")
    given: Any = layer
    if type(layer).__name__ == "Linear4bit":
        matrix: Tensor = bnb.dequantize_4bit(given.weight.data, given.weight.quant_state)
    else:
        # The scales move from the weight to the layer's state with the first product.
        scales = given.weight.SCB if given.weight.SCB is not None else given.state.SCB
        matrix = bnb.int8_vectorwise_dequant(given.weight.data, scales)
    return matrix.float()


def num_weights(parameter: Tensor) -> int:
    """Numbers that a parameter stands for; two of 4 bits share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _lend_bias(layer: Any, inputs: Any) -> None:
    """Keep a bias from bitsandbytes, which rounds it to the inputs' data type and leaves it so."""
    layer.__dict__["own_bias"] = layer.bias.data


def _take_back_bias(layer: Any, inputs: Any, output: Any) -> None:
    layer.bias.data = layer.__dict__.pop("own_bias")


def _linear_layers(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in module.modules():
        for name, child in parent.named_children():
            # Its subclasses compute something else, or are rounded already.
            if type(child) is nn.Linear:
                yield parent, name, child


def _rounded(layer: nn.Linear, bits: int, device: torch.device, compute: torch.dtype) -> nn.Module:
    # Untyped: its annotations name methods that only some of its builds have.
    bnb: Any = import_module("bitsandbytes.nn")
    sizes = {"bias": layer.bias is not None, "device": "meta"}
    # A copy: bitsandbytes puts the rounded numbers into the tensor that it is given.
    weight = layer.weight.detach().clone()
    made: Any
    if bits == 4:
        how = {"compress_statistics": True, "quant_type": "nf4"}
        made = bnb.Linear4bit(layer.in_features, layer.out_features, compute_dtype=compute, **how, **sizes)
        made.weight = bnb.Params4bit(weight, requires_grad=False, module=made, **how).to(device)
        # Another layout and bfloat16 products outside training: replies would differ from what was trained.
        made.support_avx512bf16_for_cpu = False
    else:
        how = {"has_fp16_weights": False}
        made = bnb.Linear8bitLt(layer.in_features, layer.out_features, threshold=OUTLIER, **how, **sizes)
        made.weight = bnb.Int8Params(weight, requires_grad=False, **how).to(device)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
        made.register_forward_pre_hook(_lend_bias)
        made.register_forward_hook(_take_back_bias, always_call=True)  # recomputing stops halfway
    quantized: nn.Module = made.train(layer.training)
    return quantized
