"""The one shape every connector has: a tower's features in, embeddings for the language model out.

The connectors themselves are in ``connectors.py`` (token by token, and by blocks of the grid),
``resamplers.py`` (learned queries) and ``audio_connectors.py`` (positions of a sound); the table of all is in
``connectors.py``.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from .media import Features

Option = int | float | str | bool

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class Connector(nn.Module, ABC):
    """Features of one tower, or of two side by side -> embeddings in the language model's space."""

    name: ClassVar[str]
    """What a recipe calls it."""
    defaults: ClassVar[dict[str, Option]] = {}
    """Every option and its value when not given: keywords of ``shrink``, ``multiple`` and the class."""
    choices: ClassVar[dict[str, Sequence[str]]] = {}
    """The values that an option of text can have."""
    may_be_zero: ClassVar[frozenset[str]] = frozenset()
    """Whole numbers for which 0 means "off"; all others are 1 or more."""

    @classmethod
    def build(cls, widths: Sequence[int], out_width: int, **options: Option) -> Connector:
        """A connector with initial weights.

        Args:
            widths: of the features that lie side by side in E, one for each tower.
            out_width: D, of the language model.
            **options: see ``defaults``.

        Raises:
            ValueError: if the widths do not suit the connector or its options.
        """
        return cls(sum(widths), out_width, **options)

    @classmethod
    def settle(cls, options: Mapping[str, Option]) -> dict[str, Option]:
        """All options, defaults filled in.

        Raises:
            ValueError: for an option it does not have, a value of another type than its default's (a whole
                number may stand for a fraction), or a value it cannot have.
        """
        return {**cls.defaults, **{name: cls._checked(name, value) for name, value in options.items()}}

    @classmethod
    def _checked(cls, name: str, value: Option) -> Option:
        if name not in cls.defaults:
            close = difflib.get_close_matches(name, cls.defaults, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            allowed = f"it takes {', '.join(cls.defaults)}" if cls.defaults else "it takes none"
            raise ValueError(f"unknown option {name!r} of connector {cls.name!r}: {allowed}{hint}")
        must = f"option {name!r} of connector {cls.name!r} must be"
        expected = type(cls.defaults[name])
        if expected is float and type(value) is int:
            value = float(value)
        if type(value) is not expected:
            raise ValueError(f"{must} {expected.__name__}, got {value!r}")
        if name in cls.choices and value not in cls.choices[name]:
            close = difflib.get_close_matches(str(value), cls.choices[name], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{must} one of {', '.join(cls.choices[name])}, got {value!r}{hint}")
        if type(value) is int and value < (least := 0 if name in cls.may_be_zero else 1):
            raise ValueError(f"{must} {least} or more, got {value}")
        if type(value) is float and not 0 <= value < 1:
            raise ValueError(f"{must} a fraction, 0 or more and below 1, got {value}")
        return value

    @classmethod
    @abstractmethod
    def shrink(cls, grid: tuple[int, ...], **options: Option) -> tuple[int, ...]:
        """Grid after this connector, e.g. (32, 32) -> (8, 8) for ratio 4. Tokens = product. Pure integers.

        A connector that makes a fixed number of tokens, in no order of rows and columns, answers
        ``(num_queries,)``.

        Raises:
            ValueError: if the grid does not suit the options.
        """

    @classmethod
    def multiple(cls, **options: Option) -> int:
        """By what rows and columns of the grid must be divisible."""
        return 1

    @abstractmethod
    def forward(self, features: Features) -> Tensor:
        """[N, S, E] -> [N, T, D] with T == prod(shrink(grid))."""


def rows_and_columns(grid: tuple[int, ...], name: str) -> tuple[int, int]:
    """The two sides of a grid, for a connector that must know which feature lies beside which.

    Raises:
        ValueError: if the features have no rows and columns, as when a tower keeps its class token.
    """
    if len(grid) != 2:
        raise ValueError(
            f"connector {name!r} needs features in rows and columns, got a grid of {grid}; take keep_class "
            f"or drop_first out, or use a connector that needs no rows: 'mlp', 'perceiver'"
        )
    return grid[0], grid[1]


def frames_in_line(grid: tuple[int, ...], name: str) -> int:
    """Positions of a sound, for a connector that joins those that follow one another.

    Raises:
        ValueError: if the features have rows and columns: they are a picture's.
    """
    if len(grid) != 1:
        raise ValueError(
            f"connector {name!r} is for sounds, whose features follow one another in time, got a grid of "
            f"{grid}; for pictures take 'pixel_shuffle', 'avg_pool', 'mlp'"
        )
    return grid[0]


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
