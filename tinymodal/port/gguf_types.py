"""In which type a tensor of a GGUF file is stored, and what is left of its numbers then."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinymodal.core.errors import RecipeError

Array = NDArray[Any]

TYPES = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""Types of matrices -> the package's names."""

FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}
"""``general.file_type``."""

NOT_WRITTEN = ("q4_k", "q5_k", "q6_k", "q2_k", "q3_k")
"""Types that the ``gguf`` package reads but cannot write."""


def check_type(weights: str) -> None:
    """Refuse a type of matrices that is not written.

    Raises:
        RecipeError: says which are, and why this one is not.
    """
    if weights in TYPES:
        return
    known = f"written are {', '.join(TYPES)}"
    if weights.removesuffix("_m").removesuffix("_s") in NOT_WRITTEN:
        raise RecipeError(
            f"--type {weights}: the gguf package cannot write it (NotImplementedError); {known}. llama.cpp "
            f"makes it of an f16 file: llama-quantize model.gguf out.gguf {weights.upper()}"
        )
    raise RecipeError(f"--type {weights} is not known; {known}")


def stored(name: str, values: Tensor, weights: str) -> tuple[Array, Any]:
    """A tensor as the file holds it: the bytes, and their type.

    Vectors and the picture positions stay float32, as llama.cpp has them; a row that is no multiple of 32
    numbers long is float16 in place of blocks. In a ``q4_0`` file the embeddings and the head are ``q8_0``.
    """
    import gguf

    array = values.contiguous().numpy()
    kind = kind_of(name, tuple(array.shape), weights)
    return gguf.quantize(array, kind), kind


def kind_of(name: str, shape: tuple[int, ...], weights: str) -> Any:
    """The type that a tensor is stored in."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if len(shape) < 2 or weights == "f32" or name == "v.position_embd.weight":
        return kinds.F32
    if weights == "f16" or shape[-1] % 32 or len(shape) > 2:
        return kinds.F16
    if name in ("token_embd.weight", "output.weight"):
        return kinds.Q8_0
    return kinds[TYPES[weights]]


def as_stored(name: str, values: Tensor, weights: str) -> Tensor:
    """What is left of a tensor once it was stored, float32."""
    import gguf

    array, kind = stored(name, values, weights)
    return torch.from_numpy(np.array(gguf.dequantize(array, kind), dtype=np.float32)).view(values.shape)
