"""Fewer bits where they cost nothing: frozen weights as the passes read them, and the scale of a 16-bit loss.

Under autocast a product casts its weight to 16 bits each time. A frozen one can as well be held so: half the
memory, no cast, and the same numbers to the last bit. What trains stays in float32: an update of a thousandth
would vanish in the 8 bits of a bfloat16. Norms, biases and embeddings stay too: nothing casts them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

Precision = Literal["float32", "bfloat16", "float16"]

DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""Modules whose weight autocast casts and nothing else reads."""


class Narrow:
    """Frozen weights in 16 bits, until :meth:`restore`."""

    def __init__(self, model: nn.Module, precision: Precision, spare: tuple[Tensor, ...] = ()) -> None:
        """Narrow the frozen products of ``model``.

        Args:
            model: with ``requires_grad`` as the stage wants it.
            precision: of the passes; ``float32`` leaves everything.
            spare: weights that stay as they are, e.g. the language head's, which the loss reads itself.
        """
        self._kept: list[tuple[nn.Parameter, Tensor | None]] = []
        if precision == "float32":
            return
        dtype = DTYPES[precision]
        shared = _shared(model) | {id(weight) for weight in spare}
        for module in model.modules():
            if not isinstance(module, PRODUCTS):
                continue
            weight: Any = module.weight
            # Subclasses with weights of their own kind (4 and 8 bits) hold no float32.
            if weight.requires_grad or weight.dtype != torch.float32 or id(weight) in shared:
                continue
            narrow = weight.data.to(dtype)
            # Weights that were published in 16 bits come back without a copy.
            exact = torch.equal(narrow.float(), weight.data)
            self._kept.append((weight, None if exact else weight.data.cpu()))
            weight.data = narrow

    @property
    def kept_bytes(self) -> int:
        """Bytes of host memory that the float32 weights take meanwhile."""
        return sum(wide.numel() * 4 for _, wide in self._kept if wide is not None)

    def restore(self) -> None:
        """Every weight in float32 again, as it was."""
        for weight, wide in self._kept:
            weight.data = weight.data.float() if wide is None else wide.to(weight.device)
        self._kept = []


def loss_scale(precision: Precision, device: torch.device) -> Any:
    """A ``torch.amp.GradScaler`` where gradients of 16 bits could vanish, else None."""
    return torch.amp.GradScaler(device.type) if precision == "float16" else None


def _shared(model: nn.Module) -> set[int]:
    """Parameters that more than one module holds: a head that is an embedding, too."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice
