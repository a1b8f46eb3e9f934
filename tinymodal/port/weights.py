"""Tensors of a foreign checkpoint by name: files of any of the usual layouts, and LoRA adapters.

Nothing in a file is ever run. A ``.bin`` or ``.pth`` is a pickle, which may call any function when it is
opened; it is read with ``weights_only=True``, and one that holds more than tensors and plain values is
refused. Large files are mapped, not read: only what is used takes memory.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinymodal.compose.pretrained import first_line, read_json
from tinymodal.core.errors import CheckpointError

LAYOUTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""Where a folder's weights may be, the first that is there counts."""


class File(NamedTuple):
    """The tensors of one file."""

    name: str
    """As the report calls it: the file's name, behind its folder's where there are several."""
    tensors: Mapping[str, Tensor]


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a model in one of :data:`LAYOUTS`."""
    return any((folder / name).is_file() for name in LAYOUTS)


def read_folder(folder: Path, label: str = "") -> list[File]:
    """All weights of a model's folder, one entry for each file.

    Args:
        folder: holds one of :data:`LAYOUTS`.
        label: what stands before the files' names in the report.

    Raises:
        CheckpointError: there are no weights, a shard that the index names is missing, or a file is broken.
    """
    found = next((folder / name for name in LAYOUTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder}: holds no weights; expected one of {', '.join(LAYOUTS)}")
    if found.suffix != ".json":
        return [File(f"{label}{found.name}", read_file(found))]
    named = read_json(found, str(folder)).get("weight_map")
    if not isinstance(named, dict):
        raise CheckpointError(f"{found}: has no 'weight_map' that names the shards")
    files = []
    for shard in sorted(set(named.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder}: {found.name} names {shard}, which is not there; the download is incomplete"
            )
        files.append(File(f"{label}{shard}", read_file(folder / shard)))
    held = {name for file in files for name in file.tensors}
    if lost := sorted(set(named) - held):
        raise CheckpointError(
            f"{folder}: {found.name} promises {lost[0]} in {named[lost[0]]}, which does not hold it "
            f"({len(lost)} such tensors)"
        )
    return files


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file.

    Of a training state that keeps them under ``model`` or ``state_dict``, those.

    Raises:
        CheckpointError: there is no such file, it is broken, or it is a pickle with more than data in it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as fault:
            raise CheckpointError(f"{path}: cannot be read ({first_line(fault)})") from fault
    return tensors_of(read_document(path), path)


def tensors_of(document: Any, path: Path) -> dict[str, Tensor]:
    """The tensors in what :func:`read_document` gave; of a training state those under ``model``.

    Raises:
        CheckpointError: there is no table of tensors in it.
    """
    for key in ("model", "state_dict"):
        if isinstance(document, dict) and isinstance(document.get(key), dict):
            document = document[key]
    if not isinstance(document, dict) or not all(isinstance(v, Tensor) for v in document.values()):
        raise CheckpointError(f"{path}: holds no table of tensors by name")
    return {str(name): tensor for name, tensor in document.items()}


def read_document(path: Path) -> Any:
    """What a ``.bin``, ``.pt`` or ``.pth`` file holds: tensors and plain values.

    Raises:
        CheckpointError: see :func:`read_file`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as fault:
            if "mmap" not in str(fault):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6
    except pickle.UnpicklingError as fault:
        named = re.search(
            r"GLOBAL ([\w.]+)|(?:function|class) ([\w.]+)|Unsupported operand (\d+)", str(fault)
        )
        what = next((word for word in named.groups() if word), "") if named else ""
        raise CheckpointError(
            f"{path}: is a pickle that holds more than tensors{f' ({what})' if what else ''}; opening it "
            "could run code, so it was not opened. If you trust it, save its tensors again as safetensors"
        ) from fault
    except Exception as fault:
        raise CheckpointError(f"{path}: cannot be read ({first_line(fault)})") from fault


# LoRA (arXiv:2106.09685), as peft writes it. Shapes: O outputs, I inputs, R rank.


class Pair(NamedTuple):
    """The adapter of one matrix."""

    down: Tensor
    """[R, I]"""
    up: Tensor
    """[O, R]"""
    magnitude: Tensor | None
    """[O], DoRA's (arXiv:2402.09353); None for LoRA."""
    names: tuple[str, ...]
    """What its tensors are called in the file."""


class Adapter(NamedTuple):
    """A LoRA adapter and what else its file holds."""

    file: str
    pairs: Mapping[str, Pair]
    """By the module's name without peft's prefix, e.g. ``model.layers.0.self_attn.q_proj``."""
    rest: Mapping[str, Tensor]
    """Other tensors (trained biases), by name without prefix."""
    config: Mapping[str, Any]


PEFT_PREFIX = "base_model.model."
LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<kind>A|B|magnitude_vector)(?:\.default)?(?:\.weight)?")


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a folder with ``adapter_config.json``.

    Raises:
        CheckpointError: half of an adapter is missing, or it is of a kind that is not LoRA or DoRA.
    """
    config = read_json(folder / "adapter_config.json", str(folder))
    kind = str(config.get("peft_type", "LORA"))
    if kind != "LORA":
        raise CheckpointError(f"{folder}: the adapter is of type {kind}; expected LORA")
    path = next(
        (p for n in ("safetensors", "bin") if (p := folder / f"adapter_model.{n}").is_file()),
        folder / "adapter_model.safetensors",
    )
    named = {name.removeprefix(PEFT_PREFIX): (name, t) for name, t in read_file(path).items()}
    pairs, rest = paired(path, named)
    return Adapter(path.name, pairs, rest, config)


def paired(path: Path, named: Mapping[str, tuple[str, Tensor]]) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """The adapters among tensors, by module, and what is none.

    Args:
        path: for the error.
        named: name without peft's prefix -> name in the file, and the tensor.

    Raises:
        CheckpointError: half of an adapter is missing.
    """
    halves: dict[str, dict[str, tuple[str, Tensor]]] = {}
    rest: dict[str, Tensor] = {}
    for plain, (name, tensor) in named.items():
        if found := LORA_KEY.fullmatch(plain):
            halves.setdefault(found["module"], {})[found["kind"]] = (name, tensor)
        else:
            rest[plain] = tensor
    pairs = {}
    for module, parts in halves.items():
        if lost := {"A", "B"} - set(parts):
            raise CheckpointError(f"{path}: {module} has no lora_{lost.pop()}; the adapter is incomplete")
        magnitude = parts["magnitude_vector"][1] if "magnitude_vector" in parts else None
        names = tuple(parts[kind][0] for kind in ("A", "B", "magnitude_vector") if kind in parts)
        pairs[module] = Pair(parts["A"][1], parts["B"][1], magnitude, names)
    return pairs, rest


def merge(weight: Tensor, module: str, pair: Pair, config: Mapping[str, Any]) -> Tensor:
    """A matrix with its adapter added, in the matrix' own data type; computed in float32.

    Args:
        weight: [O, I], or [I, O] where ``fan_in_fan_out``.
        module: its name, for settings that differ by module.
        pair: the adapter.
        config: ``adapter_config.json``.

    Raises:
        ValueError: the shapes do not fit together; names both.
    """
    turned = bool(config.get("fan_in_fan_out"))
    matrix = weight.float().T if turned else weight.float()
    if pair.up.shape[0] != matrix.shape[0] or pair.down.shape[1] != matrix.shape[1]:
        raise ValueError(
            f"lora_B {tuple(pair.up.shape)} x lora_A {tuple(pair.down.shape)} does not fit the matrix "
            f"{tuple(weight.shape)}"
        )
    rank = pair.down.shape[0]
    alpha = float(_for_module(config.get("alpha_pattern"), module, config.get("lora_alpha", rank)))
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    merged = matrix + scale * (pair.up.float() @ pair.down.float())
    if pair.magnitude is not None:
        merged = merged * (pair.magnitude.float().flatten() / merged.norm(dim=1))[:, None]
    return (merged.T if turned else merged).contiguous().to(weight.dtype)


def _for_module(pattern: Any, module: str, default: Any) -> Any:
    """A setting that ``pattern`` gives for a module (the end of its name, or an expression for it)."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default
