"""The one shape every tower has: prepared media in, features with their grid out.

A tower's own file (``encoders.py``, ``tower.py``) hides the family's quirks behind this, so that connectors,
processor and model never ask which family they are dealing with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .geometry import num_tokens

if TYPE_CHECKING:
    from .image import Preparation


TowerConfig = Any
"""A transformers config; each tower's own class."""


@dataclass(frozen=True, slots=True)
class Features:
    """What a tower computed for N items, all of the same size.

    Raises:
        ValueError: if ``values`` is not [N, S, E], or the grid does not have S positions.
    """

    values: Tensor
    """[N, S, E]"""
    grid: tuple[int, ...]
    """Rows and columns of the S positions, in reading order; ``prod(grid) == S``."""

    def __post_init__(self) -> None:
        if self.values.dim() != 3 or self.values.shape[1] != num_tokens(self.grid):
            shape = tuple(self.values.shape)
            raise ValueError(
                f"features of a {self.grid} grid must be [items, {num_tokens(self.grid)}, width], got {shape}"
            )


class MediaEncoder(nn.Module, ABC):
    """A tower: everything a composer has to know about one, and no more."""

    kind: ClassVar[str] = "image"
    """Which medium it reads."""

    config: TowerConfig
    """What the tower was built from, cut to the blocks it runs."""
    width: int
    """E, the size of one feature."""

    @classmethod
    @abstractmethod
    def build(cls, config: TowerConfig, feature_layer: int = -2, attn: str | None = None) -> MediaEncoder:
        """A tower with random weights that ends at ``feature_layer``.

        Args:
            config: the family's own config. Not changed: the tower keeps a copy.
            feature_layer: index into the N + 1 hidden states of N blocks, counted as in LLaVA: 0 is the
                embedding, -1 the last block, -2 the one before it; always before the tower's last norm.
            attn: attention implementation, e.g. ``"sdpa"``; None leaves the choice to transformers.

        Raises:
            ValueError: if the tower has no such layer.
        """

    @classmethod
    @abstractmethod
    def grid(cls, config: TowerConfig, size_px: tuple[int, int]) -> tuple[int, ...]:
        """Feature grid (h, w) for a picture of (H, W) pixels. Pure integers: needs no weights.

        Raises:
            ValueError: if the tower cannot read a picture of that size.
        """

    @classmethod
    @abstractmethod
    def preparation_of(cls, config: TowerConfig) -> Preparation:
        """How this family's pictures were prepared in pretraining: size, mean, std."""

    @property
    def module(self) -> nn.Module:
        """The part whose parameters a pretrained checkpoint names; the tower itself unless it wraps one."""
        return self

    @abstractmethod
    def forward(self, values: Tensor) -> Features:
        """Read prepared media: float [N, 3, H, W] -> Features [N, S, E]."""
