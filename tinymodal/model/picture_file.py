"""A picture, a file or decoded, to look at: upright, RGB, 8 bit. PIL and numpy only.

What files do to us is absorbed (orientation flags, palettes, transparency, CMYK, 16 bits, animations, bombs,
half a file), and what cannot be read rightly is refused with a sentence.

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
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import PIL.Image
import PIL.ImageFile
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""[H, W, 3]"""

Read = TypeVar("Read")

MAX_PIXELS = 89_478_485
"""Largest picture that is decoded unless another limit is given: 1024**3 // 4 // 3, a quarter gigabyte of
RGB. It is the size at which Pillow begins to warn of a decompression bomb; from twice that size on Pillow
always refuses."""

WHITE = (255, 255, 255)


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


def read_pixels(
    source: str | Path | bytes | PIL.Image.Image, max_pixels: int = MAX_PIXELS, name: str = ""
) -> Pixels:
    """Read a picture as numbers: those of :func:`load_image`, sooner.

    Args:
        source: a file, the bytes of one, or a decoded picture (which is not changed).
        max_pixels: refuse a larger one, from its header alone.
        name: what errors call it; the file's own name by default.

    Raises:
        ValueError: as :func:`load_image`.
    """
    return _read(source, max_pixels, name, _to_pixels)


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
