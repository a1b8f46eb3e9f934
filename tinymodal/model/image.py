"""A picture file as the tower wants it: upright, RGB, 8 bit, then resized and normalised. PIL and torch only.

Reading and preparing are two steps. :func:`load_image` absorbs what files do to us (orientation flags,
palettes, transparency, CMYK, 16 bits, animations, bombs, half a file) and refuses what it cannot read rightly
with a sentence; :func:`prepare` is arithmetic. No torchvision: transformers' image processors change backend
with what is installed, and a number may not depend on that.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import torch
from torch import Tensor
from torch.nn import functional as F

MAX_PIXELS = 89_478_485
"""Largest picture that is decoded unless another limit is given: 1024**3 // 4 // 3, a quarter gigabyte of
RGB. It is the size at which Pillow begins to warn of a decompression bomb; from twice that size on Pillow
always refuses."""

LONGEST_PAD_PX = 4096
"""A longer picture is shrunk to this edge before it is padded to a square, so that a 60,000 x 1 strip does
not become a square of 60,000."""

WHITE = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Preparation:
    """How a picture becomes the tower's input.

    Raises:
        ValueError: for a size below 1 px, mean or std that are not three numbers, an unknown way to resize.
    """

    height_px: int
    width_px: int
    mean: tuple[float, ...]
    """Per channel, of values in [0, 1]."""
    std: tuple[float, ...]
    """Per channel, of values in [0, 1]."""
    resize: Literal["square", "pad"] = "square"
    """``square`` stretches to the size; ``pad`` keeps the aspect ratio and fills up with the mean colour."""
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    max_pixels: int = MAX_PIXELS
    """A larger picture is refused from its header, before a pixel is decoded."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(x) for x in self.mean))
        object.__setattr__(self, "std", tuple(float(x) for x in self.std))
        if self.height_px < 1 or self.width_px < 1:
            raise ValueError(
                f"a picture must be prepared at 1 px or more, got {self.height_px} x {self.width_px}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std need 3 numbers and std above 0, got {self.mean} and {self.std}")
        if self.resize not in ("square", "pad"):
            raise ValueError(f"unknown resize {self.resize!r}; known: square, pad")
        if self.resample not in ("bicubic", "bilinear"):
            raise ValueError(f"unknown resample {self.resample!r}; known: bicubic, bilinear")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be 1 or more, got {self.max_pixels}")

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width."""
        return self.height_px, self.width_px

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; :meth:`from_dict` is the way back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

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


def load_image(source: str | Path | bytes | PIL.Image.Image, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Read a picture.

    Args:
        source: a file, the bytes of one, or a decoded picture (which is not changed).
        max_pixels: refuse a larger one, from its header alone. Pillow's own limit of 178,956,970 stays above
            this.

    Returns:
        An RGB picture of 8 bits, turned upright as its EXIF says. Of an animation or a file of several pages
        the first; transparency shows white; more than 8 bits are scaled (see :func:`_to_8_bits`), CMYK is
        converted.

    Raises:
        ValueError: if there is no such file, or it is empty, not a picture, cut short, broken, or too large.
    """
    if isinstance(source, PIL.Image.Image):
        _check_size(source, max_pixels, "picture")
        try:
            return _to_rgb(source)
        except Exception as fault:
            # It may still be a file, opened and not yet decoded.
            raise ValueError(f"picture: broken or cut short ({fault})") from fault

    opened: Path | io.BytesIO
    if isinstance(source, bytes):
        name, opened = f"picture of {len(source):,} bytes", io.BytesIO(source)
        size_bytes = len(source)
    else:
        path = Path(source)
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "does not exist"
            raise ValueError(f"{path}: {found}; expected a picture file")
        name, opened = str(path), path
        size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise ValueError(f"{name}: the file is empty (0 bytes); expected a picture")

    with warnings.catch_warnings():
        # Pillow warns of odd EXIF, of bombs, of odd palettes. What is wrong is said in the error, the rest is
        # noise.
        warnings.simplefilter("ignore")
        try:
            image = PIL.Image.open(opened)
        except PIL.Image.DecompressionBombError as fault:
            raise ValueError(f"{name}: too large, the limit is {max_pixels:,} pixels ({fault})") from fault
        except PIL.UnidentifiedImageError as fault:
            raise ValueError(f"{name}: not a picture that can be read; expected PNG, JPEG or WebP") from fault
        except Exception as fault:
            # Decoders raise anything on a broken file: OSError, SyntaxError, struct.error, zlib.error.
            raise ValueError(f"{name}: broken in its header ({fault})") from fault
        with image:
            _check_size(image, max_pixels, name)
            if image.format == "EPS":
                raise ValueError(
                    f"{name}: EPS is a program to run, not a picture; expected PNG, JPEG or WebP"
                )
            try:
                return _to_rgb(image)
            except Exception as fault:
                raise ValueError(f"{name}: broken or cut short ({fault})") from fault


def _check_size(image: PIL.Image.Image, max_pixels: int, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name}: {width} x {height} px holds no pixel")
    if width * height > max_pixels:
        raise ValueError(
            f"{name}: {width} x {height} px are {width * height:,} pixels, the limit is {max_pixels:,}; "
            f"make it smaller or raise max_pixels"
        )


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Upright, opaque, 8 bits, RGB; the picture itself if it is all that already."""
    if type(image) is PIL.Image.Image and image.mode == "RGB" and not image.info:
        return image
    image.load()
    upright = _upright(image)
    if upright.mode[0] in "IF":
        return _to_8_bits(upright)
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, (*WHITE, 255)), rgba).convert("RGB")
    # A copy even of an RGB picture: what comes from a file must not need the file any more.
    return upright.copy() if upright.mode == "RGB" else upright.convert("RGB")


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        return PIL.ImageOps.exif_transpose(image)
    except Exception:
        # EXIF is often garbage and seldom matters; the pixels are fine.
        return image


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


def prepare(image: PIL.Image.Image, how: Preparation) -> Tensor:
    """Resize and normalise.

    Args:
        image: RGB, as :func:`load_image` returns it.
        how: size and normalisation.

    Returns:
        float32 [3, H, W]. A picture that has the size already is not resampled, bit for bit.

    Raises:
        ValueError: if the picture is not RGB.

    Source: antialiased as PIL resamples, within 2 of 255 on noise by test; ``pad`` is ``expand2square`` of
    llava/mm_utils.py in https://github.com/haotian-liu/LLaVA.
    """
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB picture, got mode {image.mode}; read it with load_image")
    x_HWC = torch.from_numpy(np.array(image))
    if tuple(x_HWC.shape[:2]) != how.size_px:
        if how.resize == "pad":
            x_HWC = _pad_to_aspect(x_HWC, how)
        x_HWC = _resize(x_HWC, how.size_px, how.resample)
    scale = torch.tensor([1 / (255 * std) for std in how.std]).view(3, 1, 1)
    shift = torch.tensor([-mean / std for mean, std in zip(how.mean, how.std, strict=True)]).view(3, 1, 1)
    # Channels first while it is still bytes: four times fewer of them to move.
    return x_HWC.permute(2, 0, 1).contiguous().float().mul_(scale).add_(shift)


def _resize(x_HWC: Tensor, size_px: tuple[int, int], resample: str) -> Tensor:
    """uint8 [h, w, 3] -> uint8 [H, W, 3]."""
    x_1CHW = x_HWC.permute(2, 0, 1)[None]
    return F.interpolate(x_1CHW, size=size_px, mode=resample, antialias=True)[0].permute(1, 2, 0)


def _pad_to_aspect(x_HWC: Tensor, how: Preparation) -> Tensor:
    """Centre the picture on the mean colour, in the target's aspect ratio."""
    longest = max(x_HWC.shape[:2])
    if longest > LONGEST_PAD_PX:
        height, width = (max(1, round(edge * LONGEST_PAD_PX / longest)) for edge in x_HWC.shape[:2])
        x_HWC = _resize(x_HWC, (height, width), how.resample)
    height, width = x_HWC.shape[:2]
    # The smallest frame of the target's shape that holds the picture; for a square target max(height, width)
    # squared.
    frame_height = max(height, -(-width * how.height_px // how.width_px))
    frame_width = max(width, -(-height * how.width_px // how.height_px))
    framed = torch.empty(frame_height, frame_width, 3, dtype=torch.uint8)
    framed[:] = torch.tensor([int(mean * 255) for mean in how.mean], dtype=torch.uint8)
    top, left = (frame_height - height) // 2, (frame_width - width) // 2
    framed[top : top + height, left : left + width] = x_HWC
    return framed
