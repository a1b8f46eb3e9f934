"""The one shape every tower has: prepared media in, features with their grid out.

A tower's own file (``encoders.py``, ``hf_tower.py``, ``timm_tower.py``, ``pair.py``, ``tower.py``) hides the
family's quirks behind this, so that connectors, processor and model never ask which family they are dealing
with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .geometry import num_tokens

if TYPE_CHECKING:
    from .image import Preparation


TowerConfig = Any
"""A transformers config; each tower's own class."""

OPTIONS = ("final_norm", "drop_first")
"""Keys of ours that the config of any family may hold. Both are off where they are left out.

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
    are no rectangle: a class token stands before the patches, or one of them is left out."""

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
    keep_class: bool = False
    """Whether class token and registers stand before the patches in what comes out."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the features side by side in E: one for each tower."""
        return (self.width,)

    @classmethod
    @abstractmethod
    def build(
        cls,
        config: TowerConfig,
        feature_layer: int | Sequence[int] = -2,
        attn: str | None = None,
        keep_class: bool = False,
    ) -> MediaEncoder:
        """A tower with random weights that ends at the deepest ``feature_layer``.

        Args:
            config: the family's own config. Not changed: the tower keeps a copy.
            feature_layer: index into the N + 1 hidden states of N blocks, counted as in LLaVA: 0 is the
                embedding, -1 the last block, -2 the one before it; always before the tower's last norm,
                unless the config has ``final_norm``. Of several, the features are joined in that order.
            attn: attention implementation, e.g. ``"sdpa"``; None leaves the choice to transformers.
            keep_class: see :attr:`keep_class`.

        Raises:
            ValueError: if the tower has no such layer, or no class token to keep.
        """

    @classmethod
    @abstractmethod
    def patches(cls, config: TowerConfig, size_px: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in a picture of (H, W) pixels. Needs no weights.

        Raises:
            ValueError: if the tower cannot read a picture of that size.
        """

    @classmethod
    def leading_tokens(cls, config: TowerConfig) -> int:
        """Class token and registers: they come before the patches and are not places in the picture."""
        return 0

    @classmethod
    def grid(cls, config: TowerConfig, size_px: tuple[int, int], keep_class: bool = False) -> tuple[int, ...]:
        """Feature grid for a picture of (H, W) pixels: (h, w), or (S,) where it is no rectangle.

        Raises:
            ValueError: if the tower cannot read a picture of that size, or has no class token to keep.
        """
        rows_columns = cls.patches(config, size_px)
        leading = cls.leading_tokens(config)
        if getattr(config, "drop_first", False):
            if leading:
                raise ValueError(
                    f"drop_first is for towers without class token, but {config.model_type!r} has {leading} "
                    f"leading tokens, which are dropped anyway; take it out"
                )
            return (num_tokens(rows_columns) - 1,)
        if keep_class:
            cls.check_class(config, keep_class)
            return (leading + num_tokens(rows_columns),)
        return rows_columns

    @classmethod
    def check_class(cls, config: TowerConfig, keep_class: bool) -> None:
        """Raise ValueError if a class token is to be kept that the tower does not have."""
        if keep_class and not cls.leading_tokens(config):
            raise ValueError(f"{config.model_type!r} has no class token to keep; leave keep_class out")

    @classmethod
    @abstractmethod
    def patch_px(cls, config: TowerConfig) -> int:
        """Pixels from one position to the next: sides that are multiples of it are read to the edge."""

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

    def features(self, x_NLE: Tensor, size_px: tuple[int, int]) -> Features:
        """All L positions, leading tokens first -> those that are wanted, with their grid."""
        grid = self.grid(self.config, size_px, self.keep_class)
        return Features(x_NLE[:, x_NLE.shape[1] - num_tokens(grid) :], grid)


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


def edge_px(size: int | Sequence[int], name: str) -> int:
    """Edge of a square that a config gives as one number or as two equal ones."""
    edges = {size} if isinstance(size, int) else set(size)
    if len(edges) != 1:
        raise ValueError(f"expected a square {name}, got {size}")
    return edges.pop()
