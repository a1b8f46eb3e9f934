"""Towers of transformers that hear: what all families share, and the one adapter for those without their own.

:class:`HFAudioTower` is a backbone cut after the last block that the chosen layers need; families are its
subclasses in ``audio_towers.py``. :class:`AnyAudio` asks no config what its family is like: it runs an empty
copy of the backbone, whose tensors have shapes and no numbers (torch's ``meta`` device), and looks at what
comes out, as ``hf_tower.py`` does for pictures.
"""

# Shapes: N windows, S positions, E width of a hidden state.

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from .audio import Hearing
from .hf_tower import ConfigKey, config_key, first_line, remove_parts, unused_parts
from .media import Features
from .sound_tower import AudioTower, Layers, read_layers, require_bands

Layout = Literal["wave", "bands", "frames"]
"""What a backbone reads: [N, samples], [N, bands, frames] or [N, frames, bands]."""


class HFAudioTower(AudioTower):
    """A backbone of transformers, cut after the last block that the chosen layers need.

    What transformers changes at random in train mode beside dropout is off: blocks that are left out
    (LayerDrop), stretches of the sound that are masked (SpecAugment), which ``data/augment.py`` does where
    a recipe wants it. So are adapters behind the last block: connectors are ours.
    """

    RANDOM: ClassVar[tuple[str, ...]] = (
        "layerdrop",
        "encoder_layerdrop",
        "mask_time_prob",
        "mask_feature_prob",
    )

    def __init__(
        self,
        config: PreTrainedConfig,
        backbone: PreTrainedModel,
        layers: tuple[int, ...],
        weighted: bool,
        width: int,
    ) -> None:
        super().__init__(config, layers, weighted, width)
        self.backbone = backbone

    @property
    def module(self) -> nn.Module:
        return self.backbone

    @classmethod
    def build(
        cls, config: PreTrainedConfig, feature_layer: Layers = -1, attn: str | None = None
    ) -> HFAudioTower:
        layers, weighted = read_layers(config.num_hidden_layers, feature_layer)
        cut = cls.settled(config)
        cut.num_hidden_layers = max(layers)
        if attn is not None:
            cut._attn_implementation = attn
        backbone = cls.new_backbone(cut)
        if max(layers) < config.num_hidden_layers and (name := cls.last_norm(cut)):
            owner, _, own = name.rpartition(".")
            setattr(backbone.get_submodule(owner), own, nn.Identity())
        cls.strip(backbone)
        return cls(cut, backbone, layers, weighted, config.hidden_size)

    @classmethod
    def settled(cls, config: PreTrainedConfig) -> PreTrainedConfig:
        """A copy without what changes features at random, and without adapters."""
        cut = copy.deepcopy(config)
        for name in cls.RANDOM:
            if getattr(cut, name, None):
                setattr(cut, name, 0.0)
        for name in ("use_intermediate_ffn_before_adapter", "add_adapter"):
            if getattr(cut, name, None):
                setattr(cut, name, False)
        return cut

    @classmethod
    def new_backbone(cls, config: PreTrainedConfig) -> Any:
        """A backbone with random weights, in the data type of the whole model."""
        family: Any = audio_class(config)
        backbone = family._from_config(config, dtype=torch.get_default_dtype())
        hold_statistics(backbone)
        return backbone

    @classmethod
    def strip(cls, backbone: Any) -> None:
        """Remove from ``backbone`` what nothing depends on."""

    @classmethod
    def last_norm(cls, config: PreTrainedConfig) -> str | None:
        """Name of the norm behind the last block, if there is one."""
        return None

    def forward(self, values: Tensor) -> Features:
        grid = self.grid(self.config, (values.shape[-1],))
        require_bands(values, self.hearing_of(self.config).bands, self.config)
        if len(set(self.layers)) == 1:
            states = {self.layers[0]: self.run(values).last_hidden_state}
        else:
            out = self.run(values, output_hidden_states=True)
            states = dict(enumerate(out.hidden_states))
            # transformers' own last one is from before the norm in some families and versions.
            states[max(self.layers)] = out.last_hidden_state
        return Features(self.join([states[layer] for layer in self.layers]), grid)

    def run(self, values: Tensor, **flags: Any) -> Any:
        """What the backbone says of the windows."""
        return self.backbone(values.transpose(1, 2), **flags)


class Heard(NamedTuple):
    """What an empty copy of a backbone showed of itself, see :func:`listen`."""

    layout: Layout
    """What it reads."""
    length: int
    """Of the windows that it was shown: frames, or samples of a wave."""
    shapes: tuple[tuple[int, ...], ...]
    """Of each hidden state, the first of them the embedding; the last one what the model ends with."""


class AnyAudio(HFAudioTower):
    """Any other encoder of transformers that hears: unispeech-sat, sew, moonshine, parakeet ...

    Of a model that also writes, its encoder. A hidden state is [N, S, E]; all S positions are read, in the
    model's order. Of a family whose states differ in length only the last can be read. A tower that reads an
    earlier one runs one block more than that.
    """

    layout: Layout

    @classmethod
    def build(
        cls, config: PreTrainedConfig, feature_layer: Layers = -1, attn: str | None = None
    ) -> HFAudioTower:
        config = cls.settled(config)
        heard = listen(config)
        last = len(heard.shapes) - 1
        layers, weighted = read_layers(last, feature_layer)
        if len(set(heard.shapes)) > 1 and set(layers) != {last}:
            raise ValueError(
                f"the hidden states of a {config.model_type!r} differ in shape, so only the last can be "
                f"read; got feature_layer {feature_layer!r}, take -1"
            )
        cut = _cut(config, heard, min(max(layers) + 1, last))
        if attn is not None:
            cut._attn_implementation = attn
        backbone = cls.new_backbone(cut)
        # What is unused outside of the blocks one block shows as well.
        remove_parts(backbone, _unused(config_key(_cut(config, heard, 1))))
        tower = cls(cut, backbone, layers, weighted, heard.shapes[-1][-1])
        tower.layout = heard.layout
        return tower

    @classmethod
    def hearing_of(cls, config: PreTrainedConfig) -> Hearing:
        if listen(config).layout == "wave":
            return Hearing("wave", normalise=config.model_type not in AS_IT_IS)
        if config.model_type not in LIKE_WHISPER:
            raise ValueError(
                f"how sounds are prepared for a {config.model_type!r} is not known here; known are families "
                f"that hear waves, those with an adapter of their own, and {', '.join(LIKE_WHISPER)}"
            )
        return Hearing("log_mel", num_bands=_bands(config))

    @classmethod
    def stride(cls, config: PreTrainedConfig) -> int:
        # Between two lengths, so that what a position spans more than its step does not count.
        hearing = cls.hearing_of(config)
        whole, half = hearing.window, hearing.window // 2
        more = cls.grid(config, (hearing.frames(whole),))[0] - cls.grid(config, (hearing.frames(half),))[0]
        return round((whole - half) / more)

    @classmethod
    def grid(cls, config: PreTrainedConfig, size: tuple[int, ...]) -> tuple[int, ...]:
        return (_positions(config_key(config), size[-1]),)

    def forward(self, values: Tensor) -> Features:
        grid = self.grid(self.config, (values.shape[-1],))  # refuses a length that it cannot read
        require_bands(values, 1 if self.layout == "wave" else _bands(self.config), self.config)
        states = _states(self.backbone, values, self.layout)
        return Features(self.join([states[layer] for layer in self.layers]), grid)


AS_IT_IS = ("moonshine",)
"""Families that hear waves as they are; all others have them normalised to zero mean and unit variance. A
checkpoint's own ``preprocessor_config.json`` counts more than this."""

LIKE_WHISPER = ("glmasr_encoder",)
"""Families without an adapter of their own that hear Whisper's log-mel."""

DEPTHS = ("num_hidden_layers", "encoder_layers", "encoder_num_hidden_layers", "num_encoder_layers")
"""What configs call the number of blocks."""

BANDS = ("num_mel_bins", "input_feat_per_channel", "n_mels")
"""What configs call the number of mel bands."""


def audio_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers for a config, if it begins with sounds; else None.

    Of a whole Whisper, or any other model that also writes, the class of its encoder.
    """
    if config.model_type == "whisper":
        # Not above: whoever only sees need not wait for it.
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperEncoder
    found: Any = MODEL_MAPPING.get(type(config), None)
    if found is None:
        # Halves of larger models have classes that AutoModel does not list: ClapAudioConfig, ...Model.
        found = getattr(transformers, f"{type(config).__name__.removesuffix('Config')}Model", None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        return None
    if found.main_input_name not in ("input_values", "input_features"):
        return None
    family: Any = found
    return _encoder(config_key(config), family) if getattr(config, "is_encoder_decoder", False) else found


@functools.lru_cache(maxsize=16)
def _encoder(key: ConfigKey, family: Any) -> type[PreTrainedModel]:
    try:
        with torch.device("meta"):
            return type(family._from_config(copy.deepcopy(key.config)).get_encoder())
    except Exception as error:  # of any kind, from model code
        raise _unmade(key.config, error) from error


def listen(config: PreTrainedConfig) -> Heard:
    """Run an empty copy on some windows and see what comes out of the first that it reads.

    Costs no arithmetic.

    Raises:
        ValueError: if it reads none, or gives nothing that has a place in time.
    """
    return _tried(config_key(config))


@functools.lru_cache(maxsize=256)
def _tried(key: ConfigKey) -> Heard:
    config: Any = key.config
    family = audio_class(config)
    waves = family is not None and family.main_input_name == "input_values"
    trials: list[tuple[tuple[Layout, ...], int]] = []
    if bands := _bands(config):
        # Some read one length and no other, which their config tells.
        exact = [
            2 * (getattr(config, "max_source_positions", None) or 0),
            getattr(config, "max_length", None) or 0,
        ]
        # By the other name come frames as rows, as in the audio spectrogram transformer.
        layouts: tuple[Layout, ...] = ("frames",) if waves else ("bands", "frames")
        trials = [(layouts, length) for length in (*exact, 1000, 250) if length > bands]
    elif waves:
        trials = [(("wave",), 16_000), (("wave",), 96_000)]
    said = []
    for layouts, length in trials:
        found = []
        for layout in layouts:
            try:
                found.append(_listen(key, layout, length))
            except ValueError as error:
                said.append(str(error))
        if len(found) == 1:
            return found[0]
    raise ValueError(
        said[0]
        if said
        else f"a {config.model_type!r} does not say how its sounds are prepared: as bands or "
        f"as frames, and how many mel bands; it cannot be used as a tower"
    )


@functools.lru_cache(maxsize=4096)
def _listen(key: ConfigKey, layout: Layout, length: int) -> Heard:
    name = key.config.model_type
    try:
        # A copy: some remember the length that they were last shown.
        backbone = copy.deepcopy(_empty(key))
    except Exception as error:
        raise _unmade(key.config, error) from error
    try:
        with torch.no_grad():
            states = _states(backbone, _blank(key.config, layout, length), layout)
    except Exception as error:
        # Model code raises anything; what it says of the length is the best there is to say.
        unit = "samples" if layout == "wave" else "frames"
        raise ValueError(
            f"a {name!r} cannot hear a window of {length} {unit} ({first_line(error)})"
        ) from error
    shapes = tuple(tuple(state.shape) for state in states)
    if len(shapes[-1]) != 3 or shapes[-1][0] != 2 or not shapes[-1][1]:
        raise ValueError(
            f"a {name!r} gives {list(shapes[-1])} for 2 windows of {length}, expected [2, positions, width]; "
            f"it cannot be used as a tower"
        )
    return Heard(layout, length, shapes)


def _unmade(config: PreTrainedConfig, error: Exception) -> ValueError:
    return ValueError(f"a {config.model_type!r} cannot be made of its config ({first_line(error)})")


@functools.lru_cache(maxsize=16)
def _empty(key: ConfigKey) -> Any:
    with torch.device("meta"):
        return AnyAudio.new_backbone(copy.deepcopy(key.config)).eval()


@functools.lru_cache(maxsize=4096)
def _positions(key: ConfigKey, length: int) -> int:
    heard = listen(key.config)
    # Where all blocks are alike, one of them shows it: a fraction of the time.
    one = config_key(_cut(key.config, heard, 1))
    return _listen(one, heard.layout, length).shapes[-1][1]


def _cut(config: PreTrainedConfig, heard: Heard, num_blocks: int) -> PreTrainedConfig:
    """A copy with so many blocks, or with all where they are not alike or not counted."""
    total = len(heard.shapes) - 1
    name = next((name for name in DEPTHS if getattr(config, name, None) == total), None)
    cut = copy.deepcopy(config)
    if num_blocks < total and name is not None and len(set(heard.shapes)) == 1:
        setattr(cut, name, num_blocks)
        if len(listen(cut).shapes) != num_blocks + 1:
            return copy.deepcopy(config)
    return cut


@functools.lru_cache(maxsize=64)
def _unused(key: ConfigKey) -> frozenset[str]:
    """Parameters that what the model ends with does not depend on: mask tokens, heads."""
    heard = _tried(key)

    def last(trial: nn.Module) -> Tensor:
        return _states(trial, _blank(key.config, heard.layout, heard.length), heard.layout)[-1]

    return unused_parts(lambda: AnyAudio.new_backbone(copy.deepcopy(key.config)), last)


def _blank(config: PreTrainedConfig, layout: Layout, length: int) -> Tensor:
    # Two: a family that lays windows end to end would not show it with one.
    return torch.empty(2, 1 if layout == "wave" else _bands(config) or 1, length, device="meta")


def _bands(config: PreTrainedConfig) -> int:
    """Mel bands of a window; 0: its config does not say."""
    return next((said for name in BANDS if isinstance(said := getattr(config, name, None), int)), 0)


def _states(backbone: Any, values: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """All hidden states of prepared windows, the last as the model ends with it."""
    given = {"wave": lambda: values[:, 0], "bands": lambda: values, "frames": lambda: values.transpose(1, 2)}
    out = backbone(given[layout](), output_hidden_states=True)
    states = tuple(getattr(out, "hidden_states", None) or ())
    return (*states[:-1], out.last_hidden_state)


class _Steady1d(nn.BatchNorm1d):
    """Batch norm by the statistics of pretraining, in train mode as well."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class _Steady2d(nn.BatchNorm2d):
    """The same for two dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def hold_statistics(backbone: nn.Module) -> None:
    """Let batch norms keep to their stored statistics: no clip may depend on the others of its batch."""
    for module in backbone.modules():
        for batch, steady in ((nn.BatchNorm1d, _Steady1d), (nn.BatchNorm2d, _Steady2d)):
            if type(module) is batch:
                # In place: names of weights stay, and what points to the module.
                module.__class__ = steady


@contextmanager
def keep_positions(backbone: nn.Module) -> Iterator[None]:
    """Let a table of positions be after a pass what it was before it.

    transformers keeps the table of the longest window and of the last data type: after one pass in bfloat16
    those of float32 would be rounded, and one made in inference mode could not be trained through.
    """
    tables = [
        (part, name, getattr(part, name))
        for part in backbone.modules()
        for name in ("pe", "cached_sequence_length", "cached_rotary_positional_embedding")
        if hasattr(part, name)
    ]
    for part, name, _ in tables:
        if name != "pe":
            setattr(part, name, None)
    try:
        yield
    finally:
        for part, name, value in tables:
            setattr(part, name, value if name == "pe" else None)
