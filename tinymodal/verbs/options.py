"""What several verbs take: a model, a device, numbers. Imports nothing heavy: ``--help`` is instant."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinymodal.core.errors import DataError
from tinymodal.core.types import Audio, Image, Medium

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed

STARTER = "starter"
"""The model that ships with the package."""


def add_device(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: a GPU if there is one"
    )


def add_bits(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--bits",
        type=int,
        choices=(8, 4),
        help="store the language model in so many bits: a quarter of its memory, or less; 4 needs the extra "
        "'quant'",
    )


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def picture(text: str) -> Image:
    return Image(Path(text))


def sound(text: str) -> Audio:
    return Audio(Path(text))


def check_media(media: Sequence[Medium]) -> None:
    """See that the files of ``--image`` and ``--audio`` are there, before a model is loaded for them.

    Raises:
        DataError: one is not.
    """
    for part in media:
        path, kind = Path(str(part.source)), "picture" if isinstance(part, Image) else "sound"
        if not path.is_file():
            raise DataError(f"{path}: there is no such {kind} (looked in {Path.cwd()}).")


def load_model(args: argparse.Namespace) -> Composed:
    """The model of ``MODEL`` on ``--device``, in ``--bits``."""
    from tinymodal.compose.build import load
    from tinymodal.compose.device import device_of

    return load(args.model, device=device_of(args.device), bits=getattr(args, "bits", None))


def results_folder(name: str) -> Path:
    """``MODEL/eval``; models that do not lie in a folder of the user's get one under ``runs``."""
    folder = Path(name)
    return folder / "eval" if folder.is_dir() else Path("runs") / name.replace("/", "--") / "eval"


def first_process() -> bool:
    """Whether this is the first of the processes that ``torchrun`` started, or the only one."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
