"""Where a model answers: a GPU if there is one, Apple's or CUDA's, else the CPU."""

from __future__ import annotations

import torch

from tinymodal.core.errors import RecipeError


def device_of(name: str, key: str = "--device") -> str:
    """What torch calls it.

    Args:
        name: ``auto``, or a device of torch, ``cuda:1`` too.
        key: what named it, for the error.

    Raises:
        RecipeError: there is no such device here.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next((device for device, found in there.items() if found), "cpu")
    if not there.get(name.partition(":")[0], True):
        raise RecipeError(f"{key} {name}: torch sees no such GPU here; leave it out to use what there is.")
    return name
