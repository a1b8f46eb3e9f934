"""How replies were made, in words beside every score: without them no two scores can be compared."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from tinymodal.train.machine import PACKAGES, commit, version

if TYPE_CHECKING:
    from tinymodal.infer.engine import Engine


def protocol_of(engine: Engine, prompt: str, mark: str) -> dict[str, Any]:
    """What ``results.json`` says of a run over a model.

    Args:
        engine: who answered.
        prompt: the first question as the language model read it.
        mark: of the model, ``folder.fingerprint``.
    """
    encoder = engine.encoder
    seen = encoder.processor.image_processor
    image = {} if seen is None else {k: v for k, v in seen.to_dict().items() if k in PREPARATION}
    weights = next(engine.model.parameters())
    return {
        "prompt": prompt,
        "template": encoder.template.name,
        "decoding": "greedy",
        "image": image,
        "precision": str(weights.dtype).removeprefix("torch."),
        "checkpoint": mark,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit(),
    }


PREPARATION = ("preparation", "connector", "options", "merge")
"""What of the picture processor's settings decides what a model sees."""
