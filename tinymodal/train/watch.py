"""See that a stage changes what it says it trains, and nothing else.

After the first step every tensor is compared with what it was before, by a checksum of its bits:

* **Frozen**: it must not have moved, not by one bit. Again when the stage ends.
* **It trains and has a gradient that is not zero**: it must have moved, unless the step is smaller than
  float32 can add to it (a norm's weight of 1.0 takes no step below 6e-8).
* **It trains and its gradient is zero**: it waits. LoRA's A does, while B is still zero; so does what the
  first pictures happen not to use.
* **It trains and has no gradient at all**: an error, if the step could have reached it. A step without
  pictures cannot reach what sees, one without sounds what hears, one without a spoken answer what speaks, and
  marks may stand in no picture of a step: they wait as well.

What waits is looked at again after 2, 4, 8, ... steps; what never moved is told when the stage ends. Rows of
a table of embeddings that no text has used do not move; the table as a whole does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinymodal.core.errors import RecipeError

SMALL = 65_536
"""Numbers of a tensor in which changes could cancel; of a larger one they are too various."""
SHOWN = 3
"""Tensors that an error names of each kind."""


class Watch:
    """What a model was before a stage began to change it."""

    def __init__(self, model: nn.Module, heads: nn.Module | None, optimizer: torch.optim.Optimizer) -> None:
        """Read every tensor once. ``optimizer``: its groups are what trains."""
        rates = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        parameters = dict(model.named_parameters())
        if heads is not None:
            parameters |= {f"heads.{name}": p for name, p in heads.named_parameters()}
        self._trains = {name: (p, rates[id(p)]) for name, p in parameters.items() if id(p) in rates}
        self._frozen: dict[str, Tensor] = {n: p for n, p in parameters.items() if id(p) not in rates}
        self._frozen |= still_buffers(model)
        self._before = checksums(self._frozen)
        self._waiting = checksums({name: p for name, (p, _) in self._trains.items()})
        self._met: set[str] = set()

    @property
    def waiting(self) -> tuple[str, ...]:
        """Tensors that train and have not moved yet."""
        return tuple(self._waiting)

    def after(self, step: int, pictures: bool, sounds: bool = False, speech: bool = False) -> str:
        """Look again after step ``step`` (1 is the first of the stage), before gradients are cleared.

        Args:
            step: of the stage.
            pictures: whether the step read any.
            sounds: the same of sounds.
            speech: whether it read a spoken answer.

        Returns:
            What was seen, in one line, if it was looked; else nothing.

        Raises:
            RecipeError: without its place: tensors moved that are frozen, or did not move that train.
        """
        kinds = {"image": pictures, "audio": sounds, "speech": speech}
        met = {kind for kind, is_there in kinds.items() if is_there}
        is_new = bool(met - self._met)
        self._met |= met
        if step > 1 and not is_new and (step & (step - 1) or not self._waiting):
            return ""
        moved = self.moved() if step == 1 else []
        now = checksums({name: self._trains[name][0] for name in self._waiting})
        self._waiting = {name: old for name, old in self._waiting.items() if now[name] == old}
        without = [name for name in self._waiting if self._must_have_gradient(name, met)]
        stuck = [n for n in self._waiting if step == 1 and _would_move(*self._trains[n])]
        faults = [
            _told("moved that are frozen", moved),
            _told("train but no gradient reaches them", without),
            _told("train and have a gradient but did not move", stuck),
        ]
        if any(faults):
            raise RecipeError(
                f"after step {step}, of {len(self._frozen) + len(self._trains)} tensors "
                f"{'; '.join(f for f in faults if f)}. Choose with 'train', 'only' and 'lora.targets' what "
                f"shall train, or mend the part that holds them."
            )
        done = len(self._trains) - len(self._waiting)
        return (
            f"after step {step}: {done} of {len(self._trains)} tensors that train have moved, "
            f"{len(self._waiting)} wait for a gradient, none of the {len(self._frozen)} frozen ones moved"
        )

    def moved(self) -> list[str]:
        """Frozen tensors that are not what they were."""
        now = checksums(self._frozen)
        return [name for name, old in self._before.items() if now[name] != old]

    def end(self) -> None:
        """Raise RecipeError, without its place, if a frozen tensor moved since the beginning."""
        told = _told("moved that are frozen", self.moved())
        if told:
            raise RecipeError(
                f"at the end, of {len(self._frozen)} tensors {told}; mend the part that holds them"
            )

    def _must_have_gradient(self, name: str, met: set[str]) -> bool:
        parameter, _ = self._trains[name]
        if parameter.grad is not None or ".marks." in name:
            return False
        if name.startswith("speech_head."):
            return "speech" in met
        if name.startswith("heads."):
            return "image" in met
        kinds = [kind for kind in ("image", "audio") if f".{kind}." in name]
        if kinds and (".towers." in name or ".connectors." in name):
            return kinds[0] in met
        return True


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> sum over the bits of a tensor, read as whole numbers; exact, and one wait for the device.

    Any change of one number changes it. Changes of several could cancel, which those of a training step or of
    another file do not.
    """
    if not tensors:
        return {}
    sums = [_sum(tensor) for tensor in tensors.values()]
    return dict(zip(tensors, torch.stack([s.to(sums[0].device) for s in sums]).tolist(), strict=True))


def fingerprint(model: nn.Module) -> str:
    """One word for all that a model would be saved with."""
    each = sorted(checksums(model.state_dict()).items())
    return hashlib.sha256("".join(f"{name}={value}\n" for name, value in each).encode()).hexdigest()


def still_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are saved and that no module in train mode may change."""
    kept = model.state_dict(keep_vars=True)
    found = {}
    for place, module in model.named_modules():
        for own, buffer in module.named_buffers(recurse=False):
            name = f"{place}.{own}" if place else own
            if not module.training and name in kept:
                found[name] = buffer
    return found


def _sum(tensor: Tensor) -> Tensor:
    plain = tensor.detach().as_subclass(Tensor).contiguous().flatten()
    size = plain.element_size()
    if plain.numel() <= SMALL:
        # Each in its place: AdamW's first steps are all of one size, and of a norm half may be upwards.
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        bits = plain.view(whole).to(torch.int64)
        return (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()
    if plain.numel() * size % 8 == 0:
        # Several at a time, without a conversion: 0.3 s for a billion float32 on one core, else 12 s.
        aligned = plain if plain.storage_offset() * size % 8 == 0 else plain.clone()
        return aligned.view(torch.int64).sum()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return plain.view(whole).sum(dtype=torch.int64)


@torch.no_grad()
def _would_move(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether half of AdamW's first step would change some number: g / (|g| + eps) times the rate."""
    if parameter.grad is None:
        return False
    grad = parameter.grad
    step = group["lr"] * grad / (grad.abs() + group["eps"])
    return bool((parameter - step / 2 != parameter).any())


def _told(what: str, names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return ""
    more = f" (and {len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}"
