"""What several verbs take: a model, a device, numbers. Imports nothing heavy: ``--help`` is instant."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tinymodal.core.errors import RecipeError

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed

STARTER = "starter"
"""The model that ships with the package."""


def add_device(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one"
    )


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def load_model(args: argparse.Namespace) -> Composed:
    """The model of ``MODEL`` on ``--device``."""
    from tinymodal.compose.build import load

    return load(args.model, device=device_of(args))


def device_of(args: argparse.Namespace) -> str:
    """``cpu`` or ``cuda``, as ``--device`` says."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda: torch sees no GPU here; leave the option out to use the CPU.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else str(args.device)


def results_folder(name: str) -> Path:
    """``MODEL/eval``; models that do not lie in a folder of the user's get one under ``runs``."""
    folder = Path(name)
    return folder / "eval" if folder.is_dir() else Path("runs") / name.replace("/", "--") / "eval"
