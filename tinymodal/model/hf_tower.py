"""Towers that transformers knows: what all families share, and the one adapter for those without their own.

:class:`HFTower` is a backbone cut after the last block that the chosen layers need. Families with a quirk
are its subclasses in ``encoders.py``. :class:`AnyTower` asks no config what its family is like: it runs an
empty copy of the backbone, whose tensors have shapes and no numbers (torch's ``meta`` device), and looks at
what comes out. So vit, beit, data2vec, ijepa, deit, convnext, swin, resnet and many others work by the same
code, and what does not fit is refused before a weight is read.
"""

# Shapes: N items, h w patch grid, S = h*w positions, L = leading tokens + S, E width, K chosen layers.

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from .geometry import num_tokens, patch_grid
from .image import Preparation
from .media import Features, hidden_states
from .picture_tower import PictureTower, edge_px

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of pixels in [0, 1], per channel."""

IMAGENET: Normalisation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF: Normalisation = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
OPENAI_CLIP: Normalisation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

MOST_LEADING = 16
"""Class tokens and registers that are still believed to be such; the models known have up to 10."""


class HFTower(PictureTower):
    """A backbone of transformers, cut after the last block that the chosen layers need."""

    normalisation: ClassVar[Normalisation] = IMAGENET
    norm_name: ClassVar[str]
    """Where the backbone keeps the norm behind its last block."""

    def __init__(
        self,
        config: PreTrainedConfig,
        backbone: PreTrainedModel,
        layers: tuple[int, ...],
        width: int,
        keep_class: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        self.layers, self.width, self.keep_class = layers, width, keep_class

    @property
    def module(self) -> nn.Module:
        return self.backbone

    @classmethod
    def build(
        cls,
        config: PreTrainedConfig,
        feature_layer: int | Sequence[int] = -2,
        attn: str | None = None,
        keep_class: bool = False,
    ) -> HFTower:
        cls.check_class(config, keep_class)
        layers = hidden_states(config.num_hidden_layers, feature_layer)
        cut = copy.deepcopy(config)
        cut.num_hidden_layers = max(layers)
        cls.leave_out(cut)
        if attn is not None:
            cut._attn_implementation = attn
        backbone = new_backbone(cut)
        cls.strip(backbone)
        if not getattr(cut, "final_norm", False):
            setattr(backbone, cls.norm_name, nn.Identity())
        elif not max(layers):
            raise ValueError("final_norm needs a hidden state behind a block, feature_layer is the embedding")
        return cls(cut, backbone, layers, config.hidden_size * len(layers), keep_class)

    @classmethod
    def leave_out(cls, config: PreTrainedConfig) -> None:
        """Switch off in ``config`` what comes after the last block, and what changes features in training."""

    @classmethod
    def strip(cls, backbone: Any) -> None:
        """Remove from ``backbone`` what comes after the last block and cannot be switched off."""

    @classmethod
    def patches(cls, config: PreTrainedConfig, size_px: tuple[int, int]) -> tuple[int, int]:
        return patch_grid(*size_px, cls.patch_px(config))

    @classmethod
    def patch_px(cls, config: PreTrainedConfig) -> int:
        return edge_px(config.patch_size, "patch_size")

    @classmethod
    def preparation_of(cls, config: PreTrainedConfig) -> Preparation:
        edge = edge_px(config.image_size, "image_size")
        return Preparation(edge, edge, *cls.normalisation)

    def forward(self, values: Tensor) -> Features:
        return self.features(self.read(values), (values.shape[2], values.shape[3]))

    def read(self, values: Tensor) -> Tensor:
        """[N, 3, H, W] -> the chosen hidden states side by side, [N, L, K*E]."""
        norm = getattr(self.backbone, self.norm_name) if getattr(self.config, "final_norm", False) else None
        if norm is None and len(set(self.layers)) == 1:
            last_NLE = self.run(values).last_hidden_state
            return torch.cat([last_NLE] * len(self.layers), dim=-1) if len(self.layers) > 1 else last_NLE
        # These come from before the last norm in every family that is a subclass.
        states = self.run(values, output_hidden_states=True).hidden_states
        chosen_NLE = [states[layer] for layer in self.layers]
        return torch.cat(chosen_NLE if norm is None else [norm(state) for state in chosen_NLE], dim=-1)

    def run(self, values: Tensor, **flags: Any) -> Any:
        """What the backbone says of the pictures."""
        default = self.preparation_of(self.config).size_px
        # Another size than the one of pretraining: the learned positions are interpolated.
        resized = (values.shape[2], values.shape[3]) != default
        return self.backbone(pixel_values=values, interpolate_pos_encoding=resized, **flags)


class Sight(NamedTuple):
    """What an empty copy of a backbone showed of itself, see :func:`look`."""

    shapes: tuple[tuple[int, ...], ...]
    """Of each hidden state, the first of them the embedding."""
    grid: tuple[int, int]
    """Rows and columns of the last one."""
    leading: int
    """Positions before the patches, in a family of one sequence of positions."""
    channels_last: bool
    """Whether states with rows and columns are [N, h, w, E] and not [N, E, h, w]."""


class AnyTower(HFTower):
    """Any other vision encoder of transformers: ``pixel_values`` in, hidden states out.

    A hidden state is [N, leading + S, E], or has rows and columns (convolutions, windows). Of a family that
    works in stages of falling resolution only the last one's output can be read: ``feature_layer`` -1.
    """

    channels_last: bool = False

    @classmethod
    def build(
        cls,
        config: PreTrainedConfig,
        feature_layer: int | Sequence[int] = -2,
        attn: str | None = None,
        keep_class: bool = False,
    ) -> AnyTower:
        if getattr(config, "final_norm", False):
            raise ValueError(f"final_norm is not known for {config.model_type!r}; leave it out")
        cls.check_class(config, keep_class)
        sight = look(config, default_size(config))
        layers = hidden_states(len(sight.shapes) - 1, feature_layer)
        if len(set(sight.shapes)) > 1 and set(layers) != {len(sight.shapes) - 1}:
            raise ValueError(
                f"a {config.model_type!r} works in stages, of which only the last one's output can be read; "
                f"got feature_layer {feature_layer}, take -1"
            )
        cut = _cut(config, sight, max(layers))
        if attn is not None:
            cut._attn_implementation = attn
        backbone = without_last_norm(new_backbone(cut))
        # What is unused outside of the blocks one block shows as well.
        remove_parts(backbone, _unused(config_key(_cut(config, sight, 1)), max(layers)))
        shape = sight.shapes[-1]
        width = shape[-1] if len(shape) == 3 or sight.channels_last else shape[1]
        tower = cls(cut, backbone, layers, width * len(layers), keep_class)
        tower.channels_last = sight.channels_last
        return tower

    @classmethod
    def leading_tokens(cls, config: PreTrainedConfig) -> int:
        return look(config, default_size(config)).leading

    @classmethod
    def patches(cls, config: PreTrainedConfig, size_px: tuple[int, int]) -> tuple[int, int]:
        return _grid(config_key(config), tuple(size_px))

    @classmethod
    def patch_px(cls, config: PreTrainedConfig) -> int:
        return step_of(default_size(config), lambda size_px: cls.patches(config, size_px))

    @classmethod
    def preparation_of(cls, config: PreTrainedConfig) -> Preparation:
        how = HALF if config.model_type in OF_HALF else IMAGENET
        return Preparation(*default_size(config), *how)

    def read(self, values: Tensor) -> Tensor:
        self.patches(self.config, (values.shape[2], values.shape[3]))  # refuses a size that it cannot read
        states = _states(self.backbone, values)[0]
        return torch.cat([_sequence(states[layer], self.channels_last) for layer in self.layers], dim=-1)


OF_HALF = ("vit", "beit", "data2vec-vision")
"""Families whose pictures were brought to [-1, 1]; the others' have ImageNet's mean. A checkpoint's own
``preprocessor_config.json`` counts more than this."""


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers for a config, if it begins with pictures; else None."""
    found: Any = MODEL_MAPPING.get(type(config), None)
    if found is None:
        # Halves of larger models have classes that AutoModel does not list: Blip2VisionConfig, ...Model.
        found = getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", None)
    if (
        isinstance(found, type)
        and issubclass(found, PreTrainedModel)
        and found.main_input_name == "pixel_values"
    ):
        return found
    return None


def new_backbone(config: PreTrainedConfig) -> Any:
    """A backbone with random weights, in the data type of the whole model and not what it was saved in."""
    family: Any = model_class(config)
    return family._from_config(config, dtype=torch.get_default_dtype())


def default_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width a tower was trained on; 224 x 224 where its config does not say."""
    said = getattr(config, "image_size", None) or 224
    height, width = (said, said) if isinstance(said, int) else said
    return int(height), int(width)


@dataclass(frozen=True)
class ConfigKey:
    """A config as a key: equal where its values are."""

    family: type[PreTrainedConfig]
    values: str
    config: PreTrainedConfig = field(compare=False)


def config_key(config: PreTrainedConfig) -> ConfigKey:
    return ConfigKey(type(config), config.to_json_string(use_diff=False), config)


def look(config: PreTrainedConfig, size_px: tuple[int, int]) -> Sight:
    """Run an empty copy on a picture of (H, W) pixels and see what shapes come out. Costs no arithmetic.

    Raises:
        ValueError: if the model cannot read such a picture, or gives nothing that has a place in it.
    """
    return _look(config_key(config), tuple(size_px))


@functools.lru_cache(maxsize=4096)
def _grid(kind: ConfigKey, size_px: tuple[int, int]) -> tuple[int, int]:
    sight = look(kind.config, default_size(kind.config))
    # Where all blocks are alike, one of them shows the grid: a fraction of the time.
    return look(_cut(kind.config, sight, 1), size_px).grid


@functools.lru_cache(maxsize=4096)
def _look(kind: ConfigKey, size_px: tuple[int, int]) -> Sight:
    config, (height, width) = kind.config, size_px
    name = config.model_type
    try:
        # A copy: Swin for one remembers the size that it was last shown.
        backbone = copy.deepcopy(_empty(kind))
    except Exception as error:
        raise ValueError(f"a {name!r} cannot be made of its config ({first_line(error)})") from error
    try:
        with torch.no_grad():
            states, out = _states(backbone, _blank(size_px))
    except Exception as error:
        # Model code raises anything; what it says of the size is the best there is to say.
        raise ValueError(
            f"a {name!r} cannot read a picture of {height} x {width} px ({first_line(error)}); it was made "
            f"for {' x '.join(map(str, default_size(config)))}"
        ) from error
    if not states:
        raise ValueError(f"a {name!r} gives no hidden states, so it cannot be used as a tower")
    last = states[-1]
    if len(last) != 2:
        raise ValueError(
            f"a {name!r} joins the pictures of a batch into one sequence; it cannot be used as a tower"
        )
    shapes = tuple(tuple(state.shape) for state in states)
    if last.dim() == 4:
        channels_last = _is_channels_last(last, out.last_hidden_state)
        grid = (last.shape[1], last.shape[2]) if channels_last else (last.shape[2], last.shape[3])
        return Sight(shapes, grid, 0, channels_last)
    if getattr(config, "num_detection_tokens", 0) or getattr(config, "patch_size", None) is None:
        raise ValueError(
            f"a {name!r} does not say which of its {last.shape[1]} positions are patches; it cannot be used "
            f"as a tower"
        )
    grid = patch_grid(height, width, edge_px(config.patch_size, "patch_size"))
    leading = last.shape[1] - num_tokens(grid)
    if not 0 <= leading <= MOST_LEADING:
        raise ValueError(
            f"a {name!r} makes {last.shape[1]} positions of {height} x {width} px, which hold "
            f"{grid[0]} x {grid[1]} patches of {config.patch_size} px; it cannot be used as a tower"
        )
    return Sight(shapes, grid, leading, False)


@functools.lru_cache(maxsize=16)
def _empty(kind: ConfigKey) -> Any:
    with torch.device("meta"):
        return new_backbone(copy.deepcopy(kind.config)).eval()


@functools.lru_cache(maxsize=64)
def _unused(kind: ConfigKey, layer: int) -> frozenset[str]:
    """Parameters that the hidden state ``layer``, or the last if there are fewer, does not depend on."""

    def last(trial: nn.Module) -> Tensor:
        states = _states(trial, _blank(default_size(kind.config)))[0]
        return states[min(layer, len(states) - 1)]

    return unused_parts(lambda: without_last_norm(new_backbone(copy.deepcopy(kind.config))), last)


def _blank(size_px: tuple[int, int]) -> Tensor:
    # Two: a family that lays pictures end to end would not show it with one.
    return torch.empty(2, 3, *size_px, device="meta")


def _states(backbone: Any, values: Tensor) -> tuple[tuple[Tensor, ...], Any]:
    """All hidden states, with rows and columns where the family can give them, and the whole output."""
    flags: dict[str, Any] = {"output_hidden_states": True}
    if "interpolate_pos_encoding" in inspect.signature(type(backbone).forward).parameters:
        flags["interpolate_pos_encoding"] = True
    out = backbone(pixel_values=values, **flags)
    states = getattr(out, "reshaped_hidden_states", None) or getattr(out, "hidden_states", None)
    return tuple(states or ()), out


def _sequence(state: Tensor, channels_last: bool) -> Tensor:
    """A hidden state as [N, L, E], in reading order."""
    if state.dim() == 3:
        return state
    return state.flatten(1, 2) if channels_last else state.flatten(2).transpose(1, 2)


def _is_channels_last(state: Tensor, last: Tensor) -> bool:
    """Whether a state with rows and columns is [N, h, w, E], judged by the model's last output."""
    if last.dim() == 3:
        return state.shape[-1] == last.shape[-1] and state.shape[1] != last.shape[-1]
    return tuple(state.shape[2:]) != tuple(last.shape[2:]) and tuple(state.shape[1:3]) == tuple(
        last.shape[2:]
    )


def _cut(config: PreTrainedConfig, sight: Sight, num_blocks: int) -> PreTrainedConfig:
    """The config without the blocks behind the last one needed; one is left, or all if none are counted."""
    cut = copy.deepcopy(config)
    total, num_blocks = len(sight.shapes) - 1, max(1, num_blocks)
    if len(set(sight.shapes)) == 1 and getattr(cut, "num_hidden_layers", None) == total:
        cut.num_hidden_layers = num_blocks
        if len(look(cut, default_size(cut)).shapes) != num_blocks + 1:
            return copy.deepcopy(config)
    return cut


def without_last_norm(backbone: Any) -> Any:
    """Replace the norm behind the last block: the hidden states are those from before it."""
    for name, child in list(backbone.named_children()):
        if "norm" in type(child).__name__.lower() and "pre" not in name:
            setattr(backbone, name, nn.Identity())
    return backbone


def step_of(size_px: tuple[int, int], grid_of: Callable[[tuple[int, int]], Any]) -> int:
    """Pixels from one position to the next, in both directions.

    Args:
        size_px: height and width that a tower surely reads.
        grid_of: rows and columns for a size; raises for one that it does not read.

    Raises:
        ValueError: positions are not as far apart across as down.
    """
    height, width = size_px
    # Strides that round up make 6 rows of 176 px, 32 px each; in a large picture the rest does not matter.
    for times in (16, 4, 1):
        try:
            rows, columns = grid_of((height * times, width * times))
        except Exception:  # of any kind, from model code
            if times > 1:
                continue
            raise
        if (step := round(height * times / rows)) == round(width * times / columns):
            return step
        break
    raise ValueError(f"{rows} x {columns} positions of {height * times} x {width * times} px are not squares")


def unused_parts(make: Callable[[], nn.Module], last: Callable[[nn.Module], Tensor]) -> frozenset[str]:
    """Parameters that a backbone's hidden states do not depend on: of poolers, heads, mask tokens.

    What never gets a gradient would be stored for nothing, and missed by a check of what moved in training.

    Args:
        make: makes a backbone, to be tried without numbers.
        last: the deepest hidden state that is read, of a backbone without numbers.

    Returns:
        Their names; none if the backbone cannot run without them, or not without numbers.
    """
    with torch.device("meta"):
        trial = make().eval()
    try:
        with torch.enable_grad():
            state = last(trial)
            state.sum().backward()
            unused = frozenset(name for name, p in trial.named_parameters() if p.grad is None)
            remove_parts(trial, unused)
            same = last(trial).shape == state.shape
    except Exception:  # of any kind, from model code
        return frozenset()
    return unused if same else frozenset()


def remove_parts(module: nn.Module, unused: Set[str], prefix: str = "") -> None:
    """Take parameters out of a backbone, and the modules that hold no others."""
    for name, child in list(module.named_children()):
        inside = {f"{prefix}{name}.{key}" for key, _ in child.named_parameters()}
        if inside and inside <= unused and not isinstance(child, nn.ModuleList):
            setattr(module, name, nn.Identity())
        else:
            remove_parts(child, unused, f"{prefix}{name}.")
    for name in [name for name, _ in module.named_parameters(recurse=False)]:
        if f"{prefix}{name}" in unused:
            module.register_parameter(name, None)


def first_line(error: BaseException) -> str:
    """The first line of what model code raised."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
