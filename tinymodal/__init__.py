"""TinyModal: a factory for small multimodal models. Compose, train by a recipe, measure, talk, ship.

The names below are the public face; each is loaded when first used, so ``import tinymodal`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Audio": "tinymodal.core.types",
    "Benchmark": "tinymodal.eval.benchmark",
    "Engine": "tinymodal.infer.engine",
    "Image": "tinymodal.core.types",
    "Message": "tinymodal.core.types",
    "Model": "tinymodal.infer.model",
    "Recipe": "tinymodal.train.recipe",
    "Sample": "tinymodal.core.types",
    "Sampling": "tinymodal.infer.sampling",
    "Scheduler": "tinymodal.infer.scheduler",
    "Text": "tinymodal.core.types",
    "load": "tinymodal.infer.model",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'tinymodal' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
