"""Two towers that look at the same picture, their features side by side.

A mixture of features (MoF, "Eyes Wide Shut", arXiv:2401.06209): CLIP knows what things are, DINOv2 where
their parts lie. Pictures arrive normalised for the first tower. ``normalise = "own"`` brings them to the
second's mean and standard deviation, which is what it was trained on; ``"first"`` leaves them as they are,
which is what TinyLLaVA's checkpoints were trained on.
"""

# Shapes: N items, S positions, E and F the widths of the two.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .image import Preparation
from .media import OPTIONS, Features
from .picture_tower import PictureTower

NORMALISE = ("own", "first")


class PairConfig(PreTrainedConfig):
    """Two towers' configs, and what the second's pictures are normalised by.

    Args:
        towers: both configs, or their values with ``model_type``; kept as values.
        normalise: see above.
        means: of each tower's pictures, per channel, of values in [0, 1]; None: as the families were
            pretrained.
        stds: as ``means``.
        **kwargs: what every transformers config takes.

    Raises:
        ValueError: not two towers, one that nobody knows or a pair itself, an unknown ``normalise``.
    """

    model_type = "tinymodal_pair"

    def __init__(
        self,
        towers: Sequence[PreTrainedConfig | dict[str, Any]] = (),
        normalise: Literal["own", "first"] = "own",
        means: Sequence[Sequence[float]] | None = None,
        stds: Sequence[Sequence[float]] | None = None,
        **kwargs: Any,
    ) -> None:
        # transformers makes every config once without arguments, to see its defaults.
        if len(towers) not in (0, 2):
            raise ValueError(f"a pair has two towers, got {len(towers)}")
        if normalise not in NORMALISE:
            raise ValueError(f"unknown normalise {normalise!r}; known: {', '.join(NORMALISE)}")
        for tower in towers:
            if not isinstance(tower, dict | PreTrainedConfig):
                raise ValueError(f"a tower of a pair is a config, a table with model_type, got {tower!r}")
        found = [_config(tower) for tower in towers]
        if any(tower.model_type == self.model_type for tower in found):
            raise ValueError("a tower of a pair is a pair itself; give two single towers")
        self.towers = [{**tower.to_diff_dict(), "model_type": tower.model_type} for tower in found]
        hows = [_adapter(tower).preparation_of(tower) for tower in found]
        self.normalise = normalise
        self.means = [list(mean) for mean in means or (how.mean for how in hows)]
        self.stds = [list(std) for std in stds or (how.std for how in hows)]
        for name, values in (("means", self.means), ("stds", self.stds)):
            if [len(each) for each in values] != [3] * len(found):
                raise ValueError(f"{name} must be three numbers for each of two towers, got {values}")
        super().__init__(**kwargs)

    def parts(self) -> tuple[PreTrainedConfig, PreTrainedConfig]:
        """Both configs, with the options of the pair.

        Raises:
            ValueError: if they were not given.
        """
        if not self.towers:
            raise ValueError(
                f"{self.model_type!r} needs 'towers', a list of two configs with their model_type"
            )
        first, second = (_config(tower) for tower in self.towers)
        for option in OPTIONS:
            if getattr(self, option, False):
                setattr(first, option, True)
                setattr(second, option, True)
        return first, second


class PairTower(PictureTower):
    """Two towers; [N, S, E + F]. Their grids must be equal."""

    def __init__(self, config: PairConfig, first: PictureTower, second: PictureTower) -> None:
        super().__init__()
        self.config, self.first, self.second = config, first, second
        self.keep_class = first.keep_class
        self.width = first.width + second.width

    @property
    def widths(self) -> tuple[int, ...]:
        return (*self.first.widths, *self.second.widths)

    @classmethod
    def build(
        cls,
        config: PairConfig,
        feature_layer: int | Sequence[int] = -2,
        attn: str | None = None,
        keep_class: bool = False,
    ) -> PairTower:
        # transformers sets the attention of a whole model on the config that it knows, this one.
        attn = attn or getattr(config, "_attn_implementation_internal", None)
        first, second = (
            _adapter(part).build(part, feature_layer, attn, keep_class) for part in config.parts()
        )
        return cls(config, first, second)

    @classmethod
    def patches(cls, config: PairConfig, size_px: tuple[int, int]) -> tuple[int, int]:
        return _equal(config, [_adapter(part).patches(part, size_px) for part in config.parts()], size_px)

    @classmethod
    def leading_tokens(cls, config: PairConfig) -> int:
        return min(_adapter(part).leading_tokens(part) for part in config.parts())

    @classmethod
    def grid(cls, config: PairConfig, size_px: tuple[int, ...], keep_class: bool = False) -> tuple[int, ...]:
        return _equal(
            config, [_adapter(part).grid(part, size_px, keep_class) for part in config.parts()], size_px
        )

    @classmethod
    def patch_px(cls, config: PairConfig) -> int:
        return math.lcm(*(_adapter(part).patch_px(part) for part in config.parts()))

    @classmethod
    def preparation_of(cls, config: PairConfig) -> Preparation:
        first = config.parts()[0]
        how = _adapter(first).preparation_of(first)
        return Preparation(
            how.height_px, how.width_px, tuple(config.means[0]), tuple(config.stds[0]), resample=how.resample
        )

    def forward(self, values: Tensor) -> Features:
        a, b = self.first(values), self.second(self.for_second(values))
        size_px = (values.shape[2], values.shape[3])
        grid = _equal(self.config, [a.grid, b.grid], size_px)
        return Features(torch.cat([a.values, b.values.to(a.values.dtype)], dim=-1), grid)

    def for_second(self, values: Tensor) -> Tensor:
        """[N, 3, H, W] normalised for the first tower -> for the second."""
        (mean, its_mean), (std, its_std) = self.config.means, self.config.stds
        if self.config.normalise == "first" or (mean == its_mean and std == its_std):
            return values
        # Python's numbers, not a tensor: nothing has to be moved to the device.
        return torch.stack(
            [
                values[:, c] * (std[c] / its_std[c]) + (mean[c] - its_mean[c]) / its_std[c]
                for c in range(values.shape[1])
            ],
            dim=1,
        )


def _equal(config: PairConfig, grids: Sequence[tuple[int, ...]], size_px: tuple[int, ...]) -> Any:
    """The grid that both have."""
    if grids[0] != grids[1]:
        one, other = (" x ".join(map(str, grid)) for grid in grids)
        kinds = " and ".join(repr(tower["model_type"]) for tower in config.towers)
        raise ValueError(
            f"two towers need equal grids, but {kinds} make {one} and {other} positions of "
            f"{size_px[0]} x {size_px[1]} px; choose towers with patches of one size"
        )
    return grids[0]


def _adapter(config: PreTrainedConfig) -> type[PictureTower]:
    # Not above: the table of towers, which knows pairs, is made there.
    from .encoders import encoder_of

    return encoder_of(config)


def _config(config: PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    from .encoders import tower_config

    return tower_config(config)
