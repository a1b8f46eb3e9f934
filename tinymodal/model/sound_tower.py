"""What is asked of towers that hear, beside what is asked of all (``media.py``)."""

# Shapes: N windows, S positions, E width of a hidden state, K states that are read.

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from .media import MediaEncoder, TowerConfig, hidden_states

if TYPE_CHECKING:
    from .audio import Hearing

Layers = int | Sequence[int] | Literal["weighted"]
"""Which hidden states are read: one, several side by side, or a learned mean of all."""


class AudioTower(MediaEncoder):
    """A tower that hears: positions follow one another in time, so a grid is one number.

    Hidden states are counted as in transformers: 0 is the embedding, -1 what the model itself ends with, its
    last norm included; those between are what a block gives.
    """

    kind: ClassVar[str] = "audio"

    layers: tuple[int, ...]
    """Hidden states that are read, counted from 0."""
    layer_weights: nn.Parameter | None
    """float [K]: shares of ``weighted`` before their softmax, zeros at first, so that all count alike
    (SUPERB, arXiv:2105.01051). They are new to a pretrained tower, and worth training while the tower
    itself is frozen."""

    def __init__(self, config: TowerConfig, layers: tuple[int, ...], weighted: bool, width: int) -> None:
        """Keep what all towers have; ``width`` is that of one hidden state."""
        super().__init__()
        self.config, self.layers = config, layers
        self.width = width if weighted else width * len(layers)
        self.layer_weights = nn.Parameter(torch.zeros(len(layers))) if weighted else None

    @classmethod
    @abstractmethod
    def build(cls, config: TowerConfig, feature_layer: Layers = -1, attn: str | None = None) -> AudioTower:
        """See :meth:`MediaEncoder.build`; ``feature_layer`` may be ``weighted`` as well."""

    @classmethod
    @abstractmethod
    def hearing_of(cls, config: TowerConfig) -> Hearing:
        """How this family's sounds were prepared in pretraining.

        Raises:
            ValueError: if that is not known.
        """

    @classmethod
    @abstractmethod
    def stride(cls, config: TowerConfig) -> int:
        """Samples of sound from one position to the next."""

    @classmethod
    def max_window(cls, config: TowerConfig) -> int | None:
        """Most frames, or samples of a wave, of a window; None: as many as memory holds."""
        return None

    def join(self, states: Sequence[Tensor]) -> Tensor:
        """The K hidden states that are read, [N, S, E] each, as one feature a position."""
        if self.layer_weights is None:
            return states[0] if len(states) == 1 else torch.cat(list(states), dim=-1)
        share_K = self.layer_weights.softmax(0)
        return torch.stack([share * state for share, state in zip(share_K, states, strict=True)]).sum(0)


def read_layers(num_blocks: int, feature_layer: Layers) -> tuple[tuple[int, ...], bool]:
    """Hidden states to read, counted from 0, and whether their learned mean is wanted.

    Raises:
        ValueError: if there is no such hidden state.
    """
    if feature_layer == "weighted":
        return tuple(range(num_blocks + 1)), True
    if isinstance(feature_layer, str):
        raise ValueError(f"feature_layer is a number, a list of them or 'weighted', got {feature_layer!r}")
    return hidden_states(num_blocks, feature_layer), False


def require_bands(values: Tensor, num_bands: int, config: TowerConfig) -> None:
    """Raise ValueError if windows [N, bands, length] were not prepared for this tower."""
    if values.dim() != 3 or values.shape[1] != num_bands:
        raise ValueError(
            f"a {config.model_type!r} hears windows of [{num_bands}, length], got {list(values.shape[1:])}"
        )
