"""A picture as the tower wants it: read, cut and normalised. PIL and torch only.

Reading and preparing are two steps: ``picture_file.py`` reads; :func:`cut` and :func:`prepare`
(``tiles.py``) are arithmetic, and a :class:`Preparation` is what they need to know. No torchvision:
transformers' image processors change backend with what is installed, and a number may not depend on that.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import torch
from torch import Tensor

from .picture_file import MAX_PIXELS, read_pixels
from .strategies import STRATEGIES
from .tiles import cut, prepare

__all__ = ["Preparation", "cut", "load_pixels", "prepare"]

Resize = Literal["square", "crop", "pad", "anyres", "slices", "tiles", "native"]

RESAMPLES = ("bicubic", "bilinear", "lanczos")

LLAVA_NEXT = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
"""Rows and columns of the canvases of LLaVA-1.6's checkpoints, in their order."""

READ_BY = {
    "pinpoints": ("anyres",),
    "max_tiles": ("anyres", "slices", "tiles"),
    "longest_px": ("tiles",),
    "fit_pixels": ("native",),
}
"""Which strategies read a field; for the others it must be left at its default."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """How a picture becomes the tower's input: the strategy and its numbers.

    What is left at 0 or empty takes the strategy's own default, which is then what the field holds.

    Raises:
        ValueError: for a size below 1 px, mean or std that are not three numbers, an unknown way to resize, a
            field that the strategy does not read, or numbers it cannot work with.
    """

    height_px: int
    width_px: int
    mean: tuple[float, ...]
    """Per channel, of values in [0, 1]."""
    std: tuple[float, ...]
    """Per channel, of values in [0, 1]."""
    resize: Resize = "square"
    """``square`` stretches to the size. ``crop`` covers it and cuts the middle out. ``pad`` fills up with
    the mean colour first. ``anyres``, ``slices`` and ``tiles`` add a closer look in several tiles.
    ``native`` keeps the shape. ``docs/resolutions.md`` has the table."""
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    resizer: Literal["torch", "pillow"] = "torch"
    """Whose kernel resizes. ``torch``: several times as fast, at most two levels of 255 from Pillow's, one
    value in 500 not equal; see ``tiles.py``. ``pillow``: to the bit what a published processor gives without
    torchvision; adopted checkpoints have it."""
    max_pixels: int = MAX_PIXELS
    """A larger picture is refused from its header, before a pixel is decoded."""
    pinpoints: tuple[tuple[int, int], ...] = ()
    """``anyres``: heights and widths of canvases, multiples of the tile; of equally good ones the first is
    taken. :data:`LLAVA_NEXT` times the tile if left out."""
    max_tiles: int = 0
    """Most tiles besides the overview: ``slices`` 9, ``tiles`` 12 or with ``longest_px`` as many as that
    holds; ``anyres``: canvases with more are left out, none without it."""
    fit_pixels: tuple[int, ...] = ()
    """``native``: least and most pixels after resizing. Both the tower's own area: every picture gets as many
    patches as fit (NaFlex)."""
    step_px: int = 14
    """``native`` and ``slices``: sides are multiples of it; the tower's patch, times the connector's
    block."""
    longest_px: int = 0
    """``tiles``: resize the longest edge to it and round up to whole tiles (SmolVLM); 0: nearest aspect ratio
    (InternVL)."""
    thumbnail: bool = True
    """``tiles``: show the whole picture too, after several tiles."""

    def __post_init__(self) -> None:
        self._hold(mean=tuple(float(x) for x in self.mean), std=tuple(float(x) for x in self.std))
        self._hold(fit_pixels=tuple(self.fit_pixels))
        self._hold(pinpoints=tuple((int(height), int(width)) for height, width in self.pinpoints))
        if self.height_px < 1 or self.width_px < 1:
            raise ValueError(
                f"a picture must be prepared at 1 px or more, got {self.height_px} x {self.width_px}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std need 3 numbers and std above 0, got {self.mean} and {self.std}")
        if self.resize not in STRATEGIES:
            raise ValueError(f"unknown resize {self.resize!r}; known: {', '.join(STRATEGIES)}")
        if self.resample not in RESAMPLES:
            raise ValueError(f"unknown resample {self.resample!r}; known: {', '.join(RESAMPLES)}")
        if self.resizer not in ("torch", "pillow"):
            raise ValueError(f"unknown resizer {self.resizer!r}; known: torch, pillow")
        for name, least in (("max_pixels", 1), ("step_px", 1), ("max_tiles", 0), ("longest_px", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        for name, readers in READ_BY.items():
            if getattr(self, name) and self.resize not in readers:
                raise ValueError(
                    f"{name} is read by {', '.join(readers)}, but resize is {self.resize!r}; leave it out"
                )
        self._settle()

    def _hold(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _settle(self) -> None:
        """Put the strategy's defaults where nothing is given, and refuse what it cannot work with."""
        tall, wide = self.size_px
        if tall != wide and (self.resize == "slices" or self.longest_px):
            raise ValueError(f"{self.resize} needs tiles as high as wide, got {tall} x {wide} px")
        if self.resize == "anyres":
            canvases = tuple((rows * tall, columns * wide) for rows, columns in LLAVA_NEXT)
            self._hold(pinpoints=self.pinpoints or canvases)
            for height, width in self.pinpoints:
                if min(height, width) < 1 or height % tall or width % wide:
                    raise ValueError(
                        f"pinpoint {height} x {width} px is not made of tiles of {tall} x {wide} px; give "
                        f"heights and widths that are multiples"
                    )
        elif self.resize == "slices":
            self._hold(max_tiles=self.max_tiles or 9)
        elif self.resize == "tiles":
            self._hold(max_tiles=self.max_tiles or (-(-self.longest_px // tall)) ** 2 or 12)
        elif self.resize == "native":
            self._hold(fit_pixels=self.fit_pixels or (tall * wide, tall * wide))
            if len(self.fit_pixels) != 2 or not 1 <= self.fit_pixels[0] <= self.fit_pixels[1]:
                raise ValueError(f"fit_pixels is the least, then the most pixels, got {self.fit_pixels}")
            if self.fit_pixels[1] < self.step_px**2:
                raise ValueError(
                    f"at most {self.fit_pixels[1]:,} pixels hold no patch of {self.step_px} x "
                    f"{self.step_px} px; raise the second number of fit_pixels"
                )

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width."""
        return self.height_px, self.width_px

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without what only other strategies read; :meth:`from_dict` is back."""
        always = ("resize", "resample", "max_pixels")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {f.name for f in fields(self) if f.name in always or values[f.name] != f.default}
        return {name: _plain(value) for name, value in values.items() if name in kept}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preparation:
        """From what :meth:`to_dict` wrote.

        Raises:
            ValueError: for a missing or unknown field.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        missing = sorted({"height_px", "width_px", "mean", "std"} - set(values))
        if unknown or missing:
            raise ValueError(
                f"a preparation has the fields {sorted(known)}; unknown {unknown}, missing {missing}"
            )
        return cls(**values)


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def load_pixels(
    source: str | Path | bytes | PIL.Image.Image, max_pixels: int = MAX_PIXELS, name: str = ""
) -> Tensor:
    """Read a picture as numbers: those of :func:`.picture_file.load_image`, sooner.

    Args:
        source: a file, the bytes of one, or a decoded picture (which is not changed).
        max_pixels: refuse a larger one, from its header alone.
        name: what errors call it; the file's own name by default.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: as there.
    """
    return torch.from_numpy(read_pixels(source, max_pixels, name))
