"""Pictures to tiles: cut as :func:`.strategies.plan` says, and normalised. Arithmetic on pixels, PIL's own.

Resizing is PIL's to the bit, as in the image processors that the published towers and models were trained
with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from .strategies import ONE_TILE, Plan, plan, room

if TYPE_CHECKING:
    from .image import Preparation

BLACK = (0, 0, 0)

Picture = PIL.Image.Image


def prepare(image: Picture, how: Preparation) -> Tensor:
    """Resize and normalise, for strategies that make one tile.

    Args:
        image: RGB, as ``load_image`` returns it.
        how: strategy, size and normalisation.

    Returns:
        float32 [3, H, W].

    Raises:
        ValueError: if the picture is not RGB, or the strategy makes several tiles.
    """
    if how.resize not in ONE_TILE:
        raise ValueError(f"{how.resize!r} cuts a picture into several tiles; use plan and cut")
    return cut(image, how, plan((image.height, image.width), how))[0]


def cut(image: Picture, how: Preparation, plan: Plan) -> list[Tensor]:
    """The tiles of a picture.

    Args:
        image: RGB, as ``load_image`` returns it.
        how: strategy, size and normalisation.
        plan: of ``strategies.plan`` for a picture of this size.

    Returns:
        float32 [3, H, W] each, of the sizes and in the order of ``plan.tiles_px``. What has its size already
        is not resampled, bit for bit.

    Raises:
        ValueError: if the picture is not RGB, or not of the plan's size.

    Source: equal to transformers' PIL image processors of CLIP, SigLIP, SigLIP 2, LLaVA, LLaVA-NeXT, GOT-OCR
    2 (which InternVL uses), Idefics3 and MiniCPM-V within 1e-5 by test.
    """
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB picture, got mode {image.mode}; read it with load_image")
    if (image.height, image.width) != plan.source_px:
        raise ValueError(
            f"the plan is for a picture of {plan.source_px[0]} x {plan.source_px[1]} px, got "
            f"{image.height} x {image.width}; make one plan for each size"
        )
    for size_px in plan.first_px:
        image = _resize(image, size_px, how)
    views = [_whole(image, how, plan)] if plan.overview else []
    if plan.rows:
        tall, wide = plan.tiles_px[-1]
        sheet = _resize(image, plan.resized_px, how)
        if plan.canvas_px is not None:
            sheet = _frame(sheet, plan.canvas_px, BLACK)
        for top in range(0, plan.rows * tall, tall):
            for left in range(0, plan.columns * wide, wide):
                views.append(sheet.crop((left, top, left + wide, top + tall)))
    return [_normalise(view, how) for view in views]


def _whole(image: Picture, how: Preparation, plan: Plan) -> Picture:
    """The tile that shows the whole picture, or as much of it as the strategy leaves."""
    size_px = plan.tiles_px[0]
    if how.resize == "crop":
        return _middle(image, size_px, plan.resized_px, how)
    if how.resize == "pad":
        red, green, blue = (int(mean * 255) for mean in how.mean)
        assert plan.canvas_px is not None
        image = _frame(_resize(image, plan.resized_px, how), plan.canvas_px, (red, green, blue))
    return _resize(image, size_px, how)


def _middle(
    image: Picture, size_px: tuple[int, int], resized_px: tuple[int, int], how: Preparation
) -> Picture:
    """Resize, then cut the middle out."""
    (height, width), (tall, wide) = size_px, resized_px
    top, left = (tall - height) // 2, (wide - width) // 2
    if tall * wide <= room((image.height, image.width), how):
        return _resize(image, resized_px, how).crop((left, top, left + width, top + height))
    # Of a strip only the part that is kept is resized; PIL takes the part's edges in single precision.
    x, y = image.width / wide, image.height / tall
    right, bottom = min((left + width) * x, image.width), min((top + height) * y, image.height)
    return image.resize((width, height), _filter(how), box=(left * x, top * y, right, bottom))


def _frame(image: Picture, canvas_px: tuple[int, int], colour: tuple[int, int, int]) -> Picture:
    """In the middle of a canvas; an odd rest goes to the right and below."""
    height, width = canvas_px
    if (image.height, image.width) == canvas_px:
        return image
    canvas = PIL.Image.new("RGB", (width, height), colour)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def _resize(image: Picture, size_px: tuple[int, int], how: Preparation) -> Picture:
    """Antialiased, as PIL resamples; the picture itself if it has the size."""
    height, width = size_px
    if (image.height, image.width) == size_px:
        return image
    if width * image.height > room((image.height, image.width), how):
        # PIL goes across before it goes down: 336 columns for each row of a strip.
        image = image.resize((image.width, height), _filter(how))
    return image.resize((width, height), _filter(how))


def _filter(how: Preparation) -> PIL.Image.Resampling:
    return PIL.Image.Resampling[how.resample.upper()]


def _normalise(image: Picture, how: Preparation) -> Tensor:
    """float32 [3, H, W]: (value / 255 - mean) / std."""
    x_HWC = torch.from_numpy(np.array(image))
    scale = torch.tensor([1 / (255 * std) for std in how.std]).view(3, 1, 1)
    shift = torch.tensor([-mean / std for mean, std in zip(how.mean, how.std, strict=True)]).view(3, 1, 1)
    # Channels first while it is still bytes: four times fewer of them to move.
    return x_HWC.permute(2, 0, 1).contiguous().float().mul_(scale).add_(shift)
