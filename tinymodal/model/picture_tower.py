"""What is asked of towers that see, beside what is asked of all (``media.py``)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .geometry import num_tokens
from .media import Features, MediaEncoder, TowerConfig

if TYPE_CHECKING:
    from .image import Preparation


class PictureTower(MediaEncoder):
    """A tower that sees: patches in rows and columns, with or without a class token before them."""

    kind: ClassVar[str] = "image"

    keep_class: bool = False
    """Whether class token and registers stand before the patches in what comes out."""

    @classmethod
    @abstractmethod
    def build(
        cls,
        config: TowerConfig,
        feature_layer: int | Sequence[int] = -2,
        attn: str | None = None,
        keep_class: bool = False,
    ) -> PictureTower:
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
    def grid(cls, config: TowerConfig, size_px: tuple[int, ...], keep_class: bool = False) -> tuple[int, ...]:
        """Feature grid for a picture of (H, W) pixels: (h, w), or (S,) where it is no rectangle.

        Raises:
            ValueError: if the tower cannot read a picture of that size, or has no class token to keep.
        """
        height, width = size_px
        rows_columns = cls.patches(config, (height, width))
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

    def features(self, x_NLE: Tensor, size_px: tuple[int, int]) -> Features:
        """All L positions, leading tokens first -> those that are wanted, with their grid."""
        grid = self.grid(self.config, size_px, self.keep_class)
        return Features(x_NLE[:, x_NLE.shape[1] - num_tokens(grid) :], grid)


def edge_px(size: int | Sequence[int], name: str) -> int:
    """Edge of a square that a config gives as one number or as two equal ones."""
    edges = {size} if isinstance(size, int) else set(size)
    if len(edges) != 1:
        raise ValueError(f"expected a square {name}, got {size}")
    return edges.pop()
