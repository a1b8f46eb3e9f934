"""The one shape every tower has: prepared media in, features with their grid out.

A tower's own file (``hf_tower.py``, ``audio_towers.py``, ``timm_tower.py``, ``pair.py``, ``tower.py``,
``ear.py``) hides the family's quirks behind this, so that connectors, processor and model never ask which
family they are dealing with. What is asked of towers that see alone is in ``picture_tower.py``, of those that
hear in ``sound_tower.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .geometry import num_tokens

TowerConfig = Any
"""A transformers config; each tower's own class."""

OPTIONS = ("final_norm", "drop_first")
"""Keys of ours that the config of any family that sees may hold. Both are off where they are left out.

``final_norm``: the tower's last norm is applied to every hidden state that is read, also to one of an earlier
block (OmniLMM). ``drop_first``: of a tower without class token the first patch is left out; that was an
oversight of TinyLLaVA and LLaVA, which checkpoints trained on it need.
"""


@dataclass(frozen=True, slots=True)
class Features:
    """What a tower computed for N items, all of the same size.

    Raises:
        ValueError: if ``values`` is not [N, S, E], or the grid does not have S positions.
    """

    values: Tensor
    """[N, S, E]"""
    grid: tuple[int, ...]
    """Rows and columns of the S positions, in reading order; ``prod(grid) == S``. One number, S, where they
    are no rectangle: they follow one another in time, a class token stands before the patches, or a patch is
    left out."""

    def __post_init__(self) -> None:
        if self.values.dim() != 3 or self.values.shape[1] != num_tokens(self.grid):
            shape = tuple(self.values.shape)
            raise ValueError(
                f"features of a {self.grid} grid must be [items, {num_tokens(self.grid)}, width], got {shape}"
            )


class MediaEncoder(nn.Module, ABC):
    """A tower: what the model and its connectors have to know about one, and no more."""

    kind: ClassVar[str]
    """Which medium it reads: ``image`` or ``audio``."""

    config: TowerConfig
    """What the tower was built from, cut to the blocks it runs."""
    width: int
    """E, the size of one feature."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the features side by side in E: one for each tower."""
        return (self.width,)

    @classmethod
    @abstractmethod
    def build(
        cls, config: TowerConfig, feature_layer: int | Sequence[int], attn: str | None = None
    ) -> MediaEncoder:
        """A tower with random weights that ends at the deepest ``feature_layer``.

        Args:
            config: the family's own config. Not changed: the tower keeps a copy.
            feature_layer: index into the N + 1 hidden states of N blocks: 0 is the embedding, -1 the last
                block, -2 the one before it. Of several, the features are joined in that order.
            attn: attention implementation, e.g. ``"sdpa"``; None leaves the choice to transformers.

        Raises:
            ValueError: if the tower has no such layer.
        """

    @classmethod
    @abstractmethod
    def grid(cls, config: TowerConfig, size: tuple[int, ...]) -> tuple[int, ...]:
        """Grid of the features of one prepared item. Needs no weights.

        Args:
            config: the family's own config.
            size: of the item: height and width in pixels; the frames, or of a wave the samples, of a window.

        Raises:
            ValueError: if the tower cannot read an item of that size.
        """

    @property
    def module(self) -> nn.Module:
        """The part whose parameters a pretrained checkpoint names; the tower itself unless it wraps one."""
        return self

    @abstractmethod
    def forward(self, values: Tensor) -> Features:
        """Read prepared media: float [N, 3, H, W] or [N, bands, frames] -> Features [N, S, E]."""


def hidden_states(num_blocks: int, feature_layer: int | Sequence[int]) -> tuple[int, ...]:
    """Which hidden states of so many blocks are read, counted from 0; the greatest is the blocks to run.

    Raises:
        ValueError: if there is no such hidden state, or none is wanted.
    """
    wanted = (feature_layer,) if isinstance(feature_layer, int) else tuple(feature_layer)
    if not wanted:
        raise ValueError("feature_layer is an empty list; name at least one hidden state, e.g. -2")
    for layer in wanted:
        if not -num_blocks - 1 <= layer <= num_blocks:
            raise ValueError(
                f"feature_layer {layer}, but a tower of {num_blocks} blocks has {num_blocks + 1} hidden "
                f"states, 0 to {num_blocks} or counted from the last {-num_blocks - 1} to -1"
            )
    return tuple(layer % (num_blocks + 1) for layer in wanted)
