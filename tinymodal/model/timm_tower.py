"""Towers of timm: EVA02-CLIP and EVA-CLIP-g, and any other of its models that has ``forward_intermediates``.

timm is an extra, and only these towers touch it. What must be known without it (size, patch, width, depth,
leading tokens, how odd sizes are rounded) is looked up once on an empty copy of the model and kept in the
tower's config, so that pictures are counted where timm is not installed.

Hidden state k is the output of block k, or of stage k where a model has stages; 0, the embedding, cannot be
had. OmniLMM's tower is ``eva02_enormous_patch14_clip_224`` with ``feature_layer`` -2 and ``final_norm``;
TinyGPT-V's is ``eva_giant_patch14_clip_224`` with ``feature_layer`` -2 and the class token.
"""

# Shapes: N items, h w grid, S = h*w positions, P leading tokens, E width.

from __future__ import annotations

import copy
import difflib
import enum
import functools
import importlib
import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .geometry import patch_grid
from .hf_tower import IMAGENET, first_line, step_of
from .image import RESAMPLES, Preparation
from .media import Features, hidden_states
from .picture_tower import PictureTower

MISSING = "install it with: pip install 'tinymodal[timm]'"

ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
"""Arguments by which timm's families read other sizes than their own; the first that a model takes is
used."""


class TimmConfig(PreTrainedConfig):
    """A model of timm, and what must be known of it without timm.

    Args:
        architecture: timm's name, with or without the tag of its weights.
        model_args: further arguments of ``timm.create_model``; ``dynamic_img_size`` is added where the model
            takes it, so that it reads other sizes than its own.
        final_norm: apply the model's last norm to every hidden state that is read.
        image_size: edge of the pictures in pretraining, or (H, W). This and all below are looked up if left
            out.
        patch_size: pixels from one position to the next.
        hidden_size: width of the last hidden state.
        num_hidden_layers: blocks, or stages.
        num_prefix_tokens: class token and registers.
        sizes: what other sizes it reads: ``fixed`` none, ``multiple`` those that the patch divides, ``floor``
            any (a rest is not seen), ``ceil`` any (a rest is filled up).
        mean: per channel, of values in [0, 1].
        std: as ``mean``.
        resample: how pictures were resized.
        **kwargs: what every transformers config takes.
    """

    model_type = "tinymodal_timm"

    def __init__(
        self,
        architecture: str | None = None,
        model_args: Mapping[str, Any] | None = None,
        final_norm: bool = False,
        image_size: int | Sequence[int] | None = None,
        patch_size: int | None = None,
        hidden_size: int | None = None,
        num_hidden_layers: int | None = None,
        num_prefix_tokens: int | None = None,
        sizes: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        resample: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.architecture, self.model_args, self.final_norm = architecture, dict(model_args or {}), final_norm
        self.image_size = (
            image_size if image_size is None or isinstance(image_size, int) else list(image_size)
        )
        self.patch_size, self.hidden_size = patch_size, hidden_size
        self.num_hidden_layers, self.num_prefix_tokens = num_hidden_layers, num_prefix_tokens
        self.sizes, self.resample = sizes, resample
        self.mean = None if mean is None else list(mean)
        self.std = None if std is None else list(std)
        super().__init__(**kwargs)


class TimmTower(PictureTower):
    """A model of timm, cut after the last block that the chosen layers need."""

    def __init__(
        self, config: TimmConfig, backbone: Any, layers: tuple[int, ...], width: int, keep_class: bool
    ) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        self.layers, self.width, self.keep_class = layers, width, keep_class
        for part in backbone.modules():
            # transformers would call reset_parameters of parts with computed buffers, and lose their weights.
            part._is_hf_initialized = True
        # With a buffer of its own this module is asked instead; see reset_parameters.
        self.register_buffer("unsaved", torch.zeros(()), persistent=False)

    @property
    def module(self) -> nn.Module:
        return self.backbone

    @classmethod
    def build(
        cls,
        config: TimmConfig,
        feature_layer: int | Sequence[int] = -2,
        attn: str | None = None,
        keep_class: bool = False,
    ) -> TimmTower:
        """See :meth:`PictureTower.build`; ``attn`` has no effect, timm chooses its attention itself."""
        config = copy.deepcopy(settled(config))
        cls.check_class(config, keep_class)
        num_blocks = int(config.num_hidden_layers or 0)
        layers = hidden_states(num_blocks, feature_layer)
        if not min(layers):
            raise ValueError(
                f"feature_layer {feature_layer} asks for the embedding, which timm's models do not give; "
                f"take 1 to {num_blocks}, or -1 to {-num_blocks}"
            )
        args_json = json.dumps(config.model_args, sort_keys=True)
        shapes = _shapes(str(config.architecture), args_json)
        for layer in layers:
            (_, *grid), (_, *last) = shapes[layer - 1], shapes[-1]
            if grid != last:
                raise ValueError(
                    f"feature_layer {layer - len(shapes) - 1} of {config.architecture} is a grid of "
                    f"{' x '.join(map(str, grid))}, the tower's last is {' x '.join(map(str, last))}; take "
                    f"feature_layer -1"
                )
        backbone = _create(str(config.architecture), config.model_args)
        indices = sorted({layer - 1 for layer in layers})
        backbone.prune_intermediate_layers(indices, prune_norm=not config.final_norm, prune_head=True)
        if config.final_norm and isinstance(getattr(backbone, "norm", None), nn.Identity | None):
            raise ValueError(f"{config.architecture} has no norm behind its last block; take final_norm out")
        for module in backbone.modules():
            if hasattr(module, "qkv_bias_separate"):
                # EVA reads the weights of its qkv layer without calling it, past any adapter. Called, it
                # gives the same: x W + b.
                module.qkv_bias_separate = True
        _check_buffers(backbone, config)
        return cls(config, backbone, layers, sum(shapes[layer - 1][0] for layer in layers), keep_class)

    @classmethod
    def patches(cls, config: TimmConfig, size_px: tuple[int, int]) -> tuple[int, int]:
        config = settled(config)
        height, width = size_px
        step = cls.patch_px(config)
        own = size_of(config)
        if config.sizes == "fixed" and (height, width) != own:
            raise ValueError(f"{config.architecture} reads {own[0]} x {own[1]} px, got {height} x {width}")
        if config.sizes == "multiple" and (height % step or width % step):
            raise ValueError(
                f"{config.architecture} reads sizes that are multiples of {step} px, got {height} x {width}; "
                f"nearest {max(1, round(height / step)) * step} x {max(1, round(width / step)) * step}"
            )
        if config.sizes == "ceil":
            height, width = -(-height // step) * step, -(-width // step) * step
        return patch_grid(height, width, step)

    @classmethod
    def leading_tokens(cls, config: TimmConfig) -> int:
        return int(settled(config).num_prefix_tokens or 0)

    @classmethod
    def patch_px(cls, config: TimmConfig) -> int:
        step = settled(config).patch_size
        assert step is not None
        return step

    @classmethod
    def preparation_of(cls, config: TimmConfig) -> Preparation:
        config = settled(config)
        resample: Any = config.resample if config.resample in RESAMPLES else "bicubic"
        mean, std = tuple(config.mean or ()), tuple(config.std or ())
        return Preparation(*size_of(config), mean, std, resample=resample)

    def forward(self, values: Tensor) -> Features:
        size_px = (values.shape[2], values.shape[3])
        self.patches(self.config, size_px)  # what timm says of a wrong size is less than this
        maps = _intermediates(self.backbone, values, self.layers, self.config.final_norm, self.keep_class)
        # In the order of the blocks, each once, whatever was asked for.
        found = dict(zip(sorted(set(self.layers)), maps, strict=True))
        chosen_NLE = []
        for layer in self.layers:
            x_NEhw, p_NPE = found[layer] if self.keep_class else (found[layer], None)
            x_NSE = x_NEhw.flatten(2).transpose(1, 2)
            chosen_NLE.append(x_NSE if p_NPE is None else torch.cat([p_NPE, x_NSE], dim=1))
        return self.features(torch.cat(chosen_NLE, dim=-1), size_px)

    def reset_parameters(self) -> None:
        """Compute the buffers that are not stored; transformers calls this after it filled the weights."""
        for part in self.backbone.modules():
            if _unstored(part):
                reset: Any = part
                reset.init_non_persistent_buffers()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks compute their activations again; set by transformers, done by timm."""
        return bool(getattr(self.backbone, "grad_checkpointing", False))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, wanted: bool) -> None:
        self.backbone.set_grad_checkpointing(wanted)


def is_timm(values: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is one of timm's own folders, or of transformers' wrapper of timm."""
    model_type = values.get("model_type")
    return model_type == "timm_wrapper" or (model_type is None and "architecture" in values)


def from_hub(values: Mapping[str, Any]) -> TimmConfig:
    """The config for what a folder of timm's holds: ``architecture``, ``model_args``, ``pretrained_cfg``."""
    said = values.get("pretrained_cfg") or {}
    model_args = dict(values.get("model_args") or {})
    size = said.get("input_size")
    if size is not None and said.get("fixed_input_size"):
        # As timm itself does: the learned positions of the weights are those of this size.
        model_args.setdefault("img_size", list(size[1:]))
    return TimmConfig(
        architecture=values.get("architecture"),
        model_args=model_args,
        image_size=None if size is None else (size[1] if size[1] == size[2] else size[1:]),
        mean=said.get("mean"),
        std=said.get("std"),
        resample=said.get("interpolation"),
    )


def settled(config: TimmConfig) -> TimmConfig:
    """The config with everything that it leaves open looked up; the same one if nothing is.

    Raises:
        ValueError: timm is needed and missing; it has no such model, or one that cannot be a tower.
    """
    if all(getattr(config, name) is not None for name in LOOKED_UP):
        return config
    if not config.architecture:
        raise ValueError(
            "'tinymodal_timm' needs 'architecture', timm's name of a model, e.g. eva02_base_patch16_clip_224"
        )
    config = copy.deepcopy(config)
    known = json.loads(_known(config.architecture, json.dumps(config.model_args, sort_keys=True)))
    config.model_args = known["model_args"]
    for name in LOOKED_UP:
        if getattr(config, name) is None:
            setattr(config, name, known[name])
    return config


LOOKED_UP = (
    "image_size",
    "patch_size",
    "hidden_size",
    "num_hidden_layers",
    "num_prefix_tokens",
    "sizes",
    "mean",
    "std",
    "resample",
)


def size_of(config: TimmConfig) -> tuple[int, int]:
    """Height and width of the pictures in pretraining."""
    size = config.image_size
    assert size is not None
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@functools.lru_cache(maxsize=32)
def _known(architecture: str, args_json: str) -> str:
    """What a :class:`TimmConfig` leaves open, seen on an empty copy; as JSON."""
    given, refusals = json.loads(args_json), []
    for more in ANY_SIZE:
        args_json = json.dumps({**more, **given}, sort_keys=True)
        try:
            shapes, model = _shapes(architecture, args_json), _empty(architecture, args_json)
            break
        except TypeError as error:  # no such argument
            refusals.append(
                ValueError(f"timm's {architecture} does not take model_args {given} ({first_line(error)})")
            )
        except ValueError as error:  # its own size is none that it reads so: 384 px in patches of 14
            refusals.append(error)
    else:
        raise refusals[-1]
    size = _own_size(model)
    width = shapes[-1][0]
    # Where all blocks are alike, the first shows the grid.
    blocks = [0] if len(set(shapes)) == 1 else None
    step = step_of(size, lambda size_px: tuple(_look(model, size_px, blocks)[-1].shape[2:]))
    said = model.pretrained_cfg
    known = {
        "model_args": json.loads(args_json),
        "image_size": size[0] if size[0] == size[1] else size,
        "patch_size": step,
        "hidden_size": width,
        "num_hidden_layers": len(shapes),
        "num_prefix_tokens": getattr(model, "num_prefix_tokens", 0),
        "sizes": _sizes(model, size, step, blocks),
        "mean": said.get("mean", IMAGENET[0]),
        "std": said.get("std", IMAGENET[1]),
        "resample": said.get("interpolation", "bicubic"),
    }
    config = TimmConfig(architecture, **known)
    if step > min(size) or TimmTower.patches(config, size) != tuple(shapes[-1][1:]):
        raise ValueError(
            f"timm's {architecture} cannot be used as a tower: its {shapes[-1][1]} x {shapes[-1][2]} "
            f"positions of {size[0]} x {size[1]} px are not squares of {step} px"
        )
    return json.dumps(known)


def _sizes(model: Any, size: tuple[int, int], step: int, blocks: list[int] | None) -> str:
    """Which other sizes a model reads, see :class:`TimmConfig`."""
    rows, columns = (-(-edge // step) for edge in size)

    def added(more_rows: int, more_columns: int) -> tuple[int, int] | None:
        """How many positions so many more pixels add to whole patches."""
        try:
            x_NEhw = _look(model, (rows * step + more_rows, columns * step + more_columns), blocks)[-1]
        except Exception:  # of any kind, from model code
            return None
        return x_NEhw.shape[2] - rows, x_NEhw.shape[3] - columns

    if added(step, 2 * step) != (1, 2):
        return "fixed"
    found = {added(rest, rest) for rest in (1, step // 2, step - 1) if rest}
    return "floor" if found == {(0, 0)} else "ceil" if found == {(1, 1)} else "multiple"


@functools.lru_cache(maxsize=32)
def _shapes(architecture: str, args_json: str) -> tuple[tuple[int, int, int], ...]:
    """Width, rows and columns of what each block or stage gives, for a picture of the model's own size."""
    model = _empty(architecture, args_json)
    try:
        return tuple((x.shape[1], x.shape[2], x.shape[3]) for x in _look(model, _own_size(model)))
    except Exception as error:
        raise ValueError(f"timm's {architecture} cannot be used as a tower ({first_line(error)})") from error


def _look(model: Any, size_px: tuple[int, int], blocks: list[int] | None = None) -> list[Tensor]:
    """What an empty copy's blocks give, all of them or some."""
    blank = torch.empty(2, 3, *size_px, device="meta")
    with torch.no_grad():
        return model.forward_intermediates(
            blank, indices=blocks, stop_early=blocks is not None, intermediates_only=True
        )


@functools.lru_cache(maxsize=4)
def _empty(architecture: str, args_json: str) -> Any:
    """A model whose tensors have shapes and no numbers."""
    with torch.device("meta"):
        model = _create(architecture, json.loads(args_json)).eval()
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"timm's {architecture} does not give its blocks' outputs, so it cannot be used as a tower"
        )
    return model


def _own_size(model: Any) -> tuple[int, int]:
    """Height and width that its learned positions are for."""
    embed = getattr(model, "patch_embed", None)
    height, width = getattr(embed, "img_size", None) or model.pretrained_cfg["input_size"][1:]
    return int(height), int(width)


def _create(architecture: str, model_args: Mapping[str, Any]) -> Any:
    timm = load_timm()
    try:
        return timm.create_model(architecture, pretrained=False, num_classes=0, **model_args)
    except RuntimeError as error:
        if "unknown model" not in str(error).lower():
            raise ValueError(f"timm's {architecture}: {first_line(error)}") from error
        close = difflib.get_close_matches(architecture.split(".")[0], timm.list_models(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"timm {timm.__version__} has no model {architecture!r}{hint}") from error


def _intermediates(
    backbone: Any, values: Tensor, layers: Sequence[int], norm: bool, leading: bool = False
) -> list[Any]:
    """Outputs [N, E, h, w] of the blocks of ``layers`` in their order; with leading tokens if asked."""
    flags = {"return_prefix_tokens": True} if leading else {}
    indices = sorted({layer - 1 for layer in layers})
    return backbone.forward_intermediates(
        values, indices=indices, norm=norm, stop_early=True, intermediates_only=True, **flags
    )


def _unstored(part: nn.Module) -> bool:
    """Whether a module has buffers that are computed and not stored."""
    return any(part._buffers.get(name) is not None for name in part._non_persistent_buffers_set)


def _check_buffers(backbone: nn.Module, config: TimmConfig) -> None:
    for name, part in backbone.named_modules():
        if _unstored(part) and not hasattr(part, "init_non_persistent_buffers"):
            raise ValueError(
                f"{config.architecture}: {name} ({type(part).__name__}) holds numbers that are not stored "
                f"and cannot be computed again, so a saved model would differ; install the newest timm"
            )


def load_timm() -> Any:
    """The package, imported now if it was not before.

    timm imports torchvision at once, for transforms and data sets that no tower uses, and torchvision has no
    build for every machine. Where it is missing, modules with the few names that are asked for stand in for
    it while timm is imported.

    Raises:
        ValueError: timm is missing or cannot be imported.
    """
    loaded = sys.modules.get("timm")
    if loaded is not None and hasattr(loaded, "create_model"):
        return loaded
    if importlib.util.find_spec("timm") is None:
        raise ValueError(f"this tower is a model of timm, which is not installed; {MISSING}")
    try:
        # By name: a saved folder's code is searched for import statements, and all must be installed.
        if importlib.util.find_spec("torchvision") is not None:
            return importlib.import_module("timm")
        with _stand_ins(_torchvision()):
            return importlib.import_module("timm")
    except ImportError as error:
        for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
            del sys.modules[name]
        raise ValueError(
            f"this tower is a model of timm, which cannot be imported ({first_line(error)}); {MISSING}, or "
            f"install torchvision"
        ) from error


@contextmanager
def _stand_ins(modules: Mapping[str, types.ModuleType]) -> Iterator[None]:
    """Have ``modules`` among the imported ones for a while."""
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


def _torchvision() -> dict[str, types.ModuleType]:
    """What timm 1.0 asks torchvision for when it is imported. None of it is ever called by a tower."""
    modes = enum.Enum("InterpolationMode", "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS")  # type: ignore[misc]
    data = ("CIFAR10", "CIFAR100", "MNIST", "KMNIST", "FashionMNIST", "ImageFolder")
    names: dict[str, dict[str, Any]] = {
        "torchvision.transforms.functional": {"InterpolationMode": modes},
        "torchvision.transforms": {"ToTensor": type("ToTensor", (), {})},
        "torchvision.datasets": {name: type(name, (), {}) for name in data},
        # timm asks of layers whether they are this one.
        "torchvision.ops.misc": {"FrozenBatchNorm2d": type("FrozenBatchNorm2d", (nn.Module,), {})},
        "torchvision.ops": {},
        "torchvision": {},
    }
    modules = {}
    for name, content in names.items():
        module = modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(modules[parent], last, module)
    return modules
