"""A picture file as the tower wants it: upright, RGB, 8 bit, then cut and normalised. PIL and torch only.

Reading and preparing are two steps. :func:`load_pixels` absorbs what files do to us (orientation flags,
palettes, transparency, CMYK, 16 bits, animations, bombs, half a file) and refuses what it cannot read
rightly with a sentence; :func:`cut` and :func:`prepare` (``tiles.py``) are arithmetic, and a
:class:`Preparation` is what they need to know. No torchvision: transformers' image processors change backend
with what is installed, and a number may not depend on that.

Pillow reads every header. The pixels of an ordinary JPEG come from simplejpeg where that is installed: the
same library (libjpeg-turbo) and the same numbers, without Pillow's two copies, which of 12 megapixels take
twice as long as decoding. What simplejpeg finds any fault with, Pillow decodes, or refuses.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import PIL.Image
import PIL.ImageFile
import torch
from numpy.typing import NDArray
from torch import Tensor

from .strategies import STRATEGIES
from .tiles import cut, prepare

__all__ = ["MAX_PIXELS", "Preparation", "cut", "load_image", "load_pixels", "prepare"]

Pixels = NDArray[np.uint8]
"""[H, W, 3]"""

Read = TypeVar("Read")

MAX_PIXELS = 89_478_485
"""Largest picture that is decoded unless another limit is given: 1024**3 // 4 // 3, a quarter gigabyte of
RGB. It is the size at which Pillow begins to warn of a decompression bomb; from twice that size on Pillow
always refuses."""

WHITE = (255, 255, 255)

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
    """Read a picture as numbers: those of :func:`load_image`, sooner.

    Args:
        source: a file, the bytes of one, or a decoded picture (which is not changed).
        max_pixels: refuse a larger one, from its header alone.
        name: what errors call it; the file's own name by default.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: as :func:`load_image`.
    """
    return torch.from_numpy(_read(source, max_pixels, name, _to_pixels))


def load_image(
    source: str | Path | bytes | PIL.Image.Image, max_pixels: int = MAX_PIXELS, name: str = ""
) -> PIL.Image.Image:
    """Read a picture to look at.

    Args:
        source: a file, the bytes of one, or a decoded picture (which is not changed).
        max_pixels: refuse a larger one, from its header alone. Pillow's own limit of 178,956,970 stays above
            this.
        name: what errors call it; the file's own name by default.

    Returns:
        An RGB picture of 8 bits, turned upright as its EXIF says. Of an animation or a file of several pages
        the first; transparency shows white; more than 8 bits are scaled (see :func:`_to_8_bits`), CMYK is
        converted.

    Raises:
        ValueError: if there is no such file, or it is empty, not a picture, cut short, broken, or too large.
    """
    return _read(source, max_pixels, name, _to_rgb)


def _read(
    source: str | Path | bytes | PIL.Image.Image,
    max_pixels: int,
    name: str,
    finish: Callable[[PIL.Image.Image], Read],
) -> Read:
    """Open, check what the header says, and decode by ``finish``."""
    if isinstance(source, PIL.Image.Image):
        name = name or "picture"
        _check_size(source, max_pixels, name)
        try:
            return finish(source)
        except Exception as fault:
            # It may still be a file, opened and not yet decoded.
            raise ValueError(f"{name}: broken or cut short ({fault})") from fault

    with ExitStack() as opened, warnings.catch_warnings():
        # Pillow warns of odd EXIF, of bombs, of odd palettes. What is wrong is said in the error, the rest is
        # noise.
        warnings.simplefilter("ignore")
        file: BinaryIO
        if isinstance(source, bytes):
            name, file, size_bytes = (
                name or f"picture of {len(source):,} bytes",
                io.BytesIO(source),
                len(source),
            )
        else:
            path = _existing(source)
            name, size_bytes = name or str(path), path.stat().st_size
        if size_bytes == 0:
            raise ValueError(f"{name}: the file is empty (0 bytes); expected a picture")
        try:
            if not isinstance(source, bytes):
                file = opened.enter_context(path.open("rb"))
            image = opened.enter_context(PIL.Image.open(file))
        except PIL.Image.DecompressionBombError as fault:
            raise ValueError(f"{name}: too large, the limit is {max_pixels:,} pixels ({fault})") from fault
        except PIL.UnidentifiedImageError as fault:
            raise ValueError(f"{name}: not a picture that can be read; expected PNG, JPEG or WebP") from fault
        except Exception as fault:
            # Decoders raise anything on a broken file: OSError, SyntaxError, struct.error, zlib.error.
            raise ValueError(f"{name}: broken in its header ({fault})") from fault
        _check_size(image, max_pixels, name)
        if image.format == "EPS":
            raise ValueError(f"{name}: EPS is a program to run, not a picture; expected PNG, JPEG or WebP")
        try:
            return finish(image)
        except Exception as fault:
            raise ValueError(f"{name}: broken or cut short ({fault})") from fault


def _existing(source: str | Path) -> Path:
    """The path of a file that is there."""
    if not isinstance(source, str | Path):
        raise ValueError(
            f"a picture is a file, the bytes of one or a PIL picture, got {type(source).__name__}; of an "
            f"array PIL.Image.fromarray makes one"
        )
    path = Path(source)
    try:
        exists = path.is_file()
    except OSError as fault:
        raise ValueError(f"{str(source)[:80]}: no name of a file ({fault.strerror})") from fault
    if not exists:
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path}: {found}; expected a picture file")
    return path


def _check_size(image: PIL.Image.Image, max_pixels: int, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name}: {width} x {height} px holds no pixel")
    if width * height > max_pixels:
        raise ValueError(
            f"{name}: {width} x {height} px are {width * height:,} pixels, the limit is {max_pixels:,}; "
            f"make it smaller or raise max_pixels"
        )


def _to_pixels(image: PIL.Image.Image) -> Pixels:
    """What :func:`_to_rgb` gives, as [H, W, 3]."""
    plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and image.tell() == 0
    pixels = _decode_jpeg(image) if plain else None
    # np.array copies: what comes from a file must not need the file any more.
    return np.array(_to_rgb(image)) if pixels is None else pixels


def _decode_jpeg(image: PIL.Image.Image) -> Pixels | None:
    """An opened JPEG by way of simplejpeg; None where that is not installed or finds a fault."""
    decode, file = _jpeg_decoder(), getattr(image, "fp", None)
    if decode is None or file is None:
        return None
    try:
        turn = _orientation(image)
        file.seek(0)
        # numpy asks for large pages, simplejpeg's own memory does not: of 12 megapixels a third of the time.
        room = np.empty(image.height * image.width * 3, dtype=np.uint8)
        # Strict: what libjpeg only warns of (a file cut short is one) is an error, and left to Pillow.
        pixels: Pixels = decode(file.read(), colorspace="RGB", strict=True, buffer=room)
    except Exception:
        return None
    if pixels.shape != (image.height, image.width, 3):
        return None
    return np.ascontiguousarray(TURNS[turn][1](pixels)) if turn in TURNS else pixels


@cache
def _jpeg_decoder() -> Callable[..., Any] | None:
    try:
        # By name: a saved model asks for every module that its files import, and this one is optional.
        found: Callable[..., Any] = importlib.import_module("simplejpeg").decode_jpeg
    except ImportError:
        return None
    return found


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Upright, opaque, 8 bits, RGB; the picture itself if it is all that already."""
    if type(image) is PIL.Image.Image and image.mode == "RGB" and not image.info:
        return image
    image.load()
    turn = _orientation(image)
    upright = image.transpose(TURNS[turn][0]) if turn in TURNS else image
    if upright.mode[0] in "IF":
        return _to_8_bits(upright)
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, (*WHITE, 255)), rgba).convert("RGB")
    if upright.mode != "RGB":
        return upright.convert("RGB")
    # A copy: what comes from a file must not need the file any more.
    return upright.copy() if upright is image else upright


TURNS: dict[int, tuple[PIL.Image.Transpose, Callable[[Pixels], Pixels]]] = {
    2: (PIL.Image.Transpose.FLIP_LEFT_RIGHT, lambda x_HWC: x_HWC[:, ::-1]),
    3: (PIL.Image.Transpose.ROTATE_180, lambda x_HWC: x_HWC[::-1, ::-1]),
    4: (PIL.Image.Transpose.FLIP_TOP_BOTTOM, lambda x_HWC: x_HWC[::-1]),
    5: (PIL.Image.Transpose.TRANSPOSE, lambda x_HWC: x_HWC.swapaxes(0, 1)),
    6: (PIL.Image.Transpose.ROTATE_270, lambda x_HWC: np.rot90(x_HWC, -1)),
    7: (PIL.Image.Transpose.TRANSVERSE, lambda x_HWC: x_HWC.swapaxes(0, 1)[::-1, ::-1]),
    8: (PIL.Image.Transpose.ROTATE_90, lambda x_HWC: np.rot90(x_HWC)),
}
"""What EXIF's orientation asks for, of a Pillow picture and of its numbers; any other value: nothing."""


def _orientation(image: PIL.Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:
        # EXIF is often garbage and seldom matters; the pixels are fine.
        return 1


def _to_8_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """One channel of 16 or 32 bits, integer or float, as RGB of 8 bits. Pillow itself would clip at 255.

    Integers are scaled by the range that the file declares (16 bits where it says nothing), floats by 1 or
    255, whichever holds them. A picture that uses less than 1/16 of its range would come out black: it holds
    8 to 12 bits or a sensor's counts, and is stretched from its least to its greatest value. So is one that
    leaves its range.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"the picture (mode {image.mode}) holds values that are not numbers")
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        scale = 1.0 if high <= 1 else 255.0
    else:
        declared = getattr(image, "tag_v2", {}).get(258, (16,))  # TIFF's BitsPerSample
        bits = declared[0] if isinstance(declared, tuple) else declared
        scale = float(2 ** min(int(bits), 16) - 1)
    fits = low >= 0 and high <= scale
    dark = image.mode != "F" and high * 16 < scale
    if (not fits or dark) and high > low:
        values, scale = values - low, high - low
    grey = np.clip(values * (255 / scale), 0, 255).round().astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[np.asarray(image) == transparent] = 255
    return PIL.Image.fromarray(grey).convert("RGB")
