"""From a tower's features to embeddings in the language model's space.

``shrink`` says how many tokens a grid becomes, in integers alone: the processor counts with it and
``forward`` obeys it.
"""

# Shapes: N items, h w feature grid, S = h*w positions, T = tokens, E tower width, D language width, r ratio.

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from .geometry import fold
from .media import Features

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class Connector(nn.Module, ABC):
    """Features of one tower -> embeddings in the language model's space."""

    defaults: ClassVar[dict[str, int | float | str]] = {}
    """Every option and its value when not given: the keywords of ``shrink`` and of the class."""

    @classmethod
    def settle(cls, options: dict[str, int | float | str]) -> dict[str, int | float | str]:
        """All options, defaults filled in.

        Raises:
            ValueError: for an option it does not have, or a value of another type than its default's.
        """
        for name, value in options.items():
            if name not in cls.defaults:
                close = difflib.get_close_matches(name, cls.defaults, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                allowed = f"it takes {', '.join(cls.defaults)}" if cls.defaults else "it takes none"
                raise ValueError(
                    f"unknown option {name!r} of connector {connector_name(cls)!r}: {allowed}{hint}"
                )
            expected = type(cls.defaults[name])
            if type(value) is not expected:
                raise ValueError(
                    f"option {name!r} of connector {connector_name(cls)!r} must be {expected.__name__}, "
                    f"got {value!r}"
                )
        return {**cls.defaults, **options}

    @staticmethod
    @abstractmethod
    def shrink(grid: tuple[int, ...], **options: int | float | str) -> tuple[int, ...]:
        """Grid after this connector, e.g. (32, 32) -> (8, 8) for ratio 4. Tokens = product. Pure integers.

        Raises:
            ValueError: if the grid does not suit the options.
        """

    @abstractmethod
    def forward(self, features: Features) -> Tensor:
        """[N, S, E] -> [N, T, D] with T == prod(shrink(grid))."""


class Identity(Connector):
    """Features as they are; the tower must be as wide as the language model."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        if in_width != out_width:
            raise ValueError(
                f"connector 'identity' needs a tower as wide as the language model, got {in_width} and "
                f"{out_width}; use 'linear' or 'mlp'"
            )

    @staticmethod
    def shrink(grid: tuple[int, ...]) -> tuple[int, ...]:  # type: ignore[override]
        return grid

    def forward(self, features: Features) -> Tensor:
        return features.values


class Linear(Connector):
    """One matrix and a bias (LLaVA 1.0, arXiv:2304.08485)."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_width, out_width)

    @staticmethod
    def shrink(grid: tuple[int, ...]) -> tuple[int, ...]:  # type: ignore[override]
        return grid

    def forward(self, features: Features) -> Tensor:
        return self.proj(features.values)


class MLP(Connector):
    """``depth`` linear layers with an activation between them (LLaVA 1.5's mlp2x_gelu, arXiv:2310.03744)."""

    defaults: ClassVar[dict[str, int | float | str]] = {"depth": 2, "activation": "gelu"}

    def __init__(self, in_width: int, out_width: int, depth: int = 2, activation: str = "gelu") -> None:
        super().__init__()
        self.proj = stack(in_width, out_width, depth, activation)

    @staticmethod
    def shrink(  # type: ignore[override]
        grid: tuple[int, ...], depth: int = 2, activation: str = "gelu"
    ) -> tuple[int, ...]:
        return grid

    def forward(self, features: Features) -> Tensor:
        return self.proj(features.values)


class PixelShuffle(Connector):
    """Fold each r x r block of features into one token, then project (SmolVLM, arXiv:2504.05299)."""

    defaults: ClassVar[dict[str, int | float | str]] = {"ratio": 2, "depth": 2, "activation": "gelu"}

    def __init__(
        self, in_width: int, out_width: int, ratio: int = 2, depth: int = 2, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.ratio = ratio
        # Before a tower's last norm, features differ in size by orders; the projection should not care.
        self.norm = nn.LayerNorm(in_width * ratio**2)
        self.proj = stack(in_width * ratio**2, out_width, depth, activation)

    @staticmethod
    def shrink(  # type: ignore[override]
        grid: tuple[int, ...], ratio: int = 2, depth: int = 2, activation: str = "gelu"
    ) -> tuple[int, ...]:
        return fold(grid, ratio)

    def forward(self, features: Features) -> Tensor:
        x_NSE, r = features.values, self.ratio
        h, w = fold(features.grid, r)
        x_NhrwrE = x_NSE.unflatten(1, (h, r, w, r))
        x_NTE = x_NhrwrE.transpose(2, 3).reshape(len(x_NSE), h * w, -1)
        return self.proj(self.norm(x_NTE))


def stack(in_width: int, out_width: int, depth: int, activation: str) -> nn.Sequential:
    """``depth`` linear layers, ``out_width`` wide, with ``activation`` between them."""
    if depth < 1:
        raise ValueError(f"depth must be 1 or more linear layers, got {depth}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    layers: list[nn.Module] = [nn.Linear(in_width, out_width)]
    for _ in range(depth - 1):
        layers += [ACTIVATIONS[activation](), nn.Linear(out_width, out_width)]
    return nn.Sequential(*layers)


def find_connector(name: str) -> type[Connector]:
    """The connector of that name.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    if name not in CONNECTORS:
        close = difflib.get_close_matches(name, CONNECTORS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown connector {name!r}; known: {', '.join(CONNECTORS)}{hint}")
    return CONNECTORS[name]


def connector_name(cls: type[Connector]) -> str:
    """The name a recipe uses for a connector class."""
    return next((name for name, known in CONNECTORS.items() if known is cls), cls.__name__)


CONNECTORS: dict[str, type[Connector]] = {
    "identity": Identity,
    "linear": Linear,
    "mlp": MLP,
    "pixel_shuffle": PixelShuffle,
}
