"""Activations that are computed again in the backward pass, to hold fewer: of all blocks, of some, of none.

A block that is recomputed keeps its input and nothing else. With every k-th of them about 1 - 1/k of the
activations stay and 1/k of a forward pass is done twice; with all of them the pass costs about a third more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from tinymodal.train.groups import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Recompute = Literal["none", "full"] | int


def set_recompute(model: PreTrainedModel, how: Recompute) -> None:
    """Recompute all blocks of towers and decoder (``full``), the first of every ``how``, or ``none``."""
    _switch(model, how != "none")
    if isinstance(how, str):
        return
    parts: Any = model.model
    for part in (*parts.towers.values(), parts.language_model):
        for number, block in enumerate(blocks(part)):
            if number % how and _recomputes(block):
                setattr(block, "gradient_checkpointing", False)  # noqa: B010 - a Module's plain flag


def _switch(model: PreTrainedModel, wanted: bool) -> None:
    if not wanted and not any(_recomputes(module) for module in model.modules()):
        return
    word = "enable" if wanted else "disable"
    # Its name changed with transformers 5.23.
    change = getattr(model, f"activation_checkpointing_{word}", None) or getattr(
        model, f"gradient_checkpointing_{word}"
    )
    change(*([{"use_reentrant": False}] if wanted else []))


def _recomputes(module: nn.Module) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False))
