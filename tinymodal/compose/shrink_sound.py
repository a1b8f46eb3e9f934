"""``[model.audio]`` and ``[model.speech]`` at toy size; see ``shrink.py``.

A toy tower hears in the steps of the real one, so that a second of sound is as many tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tinymodal.compose.ears import connector_options, hearing_of
from tinymodal.compose.known import config_file, is_known, kept, known, scaled
from tinymodal.compose.mouth import CODEC
from tinymodal.compose.pretrained import SHIPPED, locate
from tinymodal.compose.published import CODECS, EARS
from tinymodal.compose.spec import AudioSpec, SpeechSpec
from tinymodal.compose.tiny import tiny_audio, tiny_codec
from tinymodal.core.errors import RecipeError
from tinymodal.model.audio_processing import TinyModalAudioProcessor
from tinymodal.model.audio_towers import audio_encoder_of, audio_tower_config
from tinymodal.model.connectors import find_connector
from tinymodal.model.sound_tower import read_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BOOKS = 4
"""Codebooks of a toy codec, at most."""
WIDTH, LAYERS = 32, 1
"""Of a toy speech head, at most."""


class ToyEars(NamedTuple):
    """Of ears the stand-in."""

    spec: AudioSpec
    blocks: tuple[int, int]
    """That run, of the real tower and of the toy."""
    lines: tuple[str, ...]
    """What stands for what."""


def toy_ears(
    spec: AudioSpec, out_width: int, small: Callable[[str, dict[str, Any]], dict[str, Any]], made: Any
) -> ToyEars:
    """The stand-in of ``[model.audio]``.

    Args:
        spec: what the recipe says.
        out_width: of the real language model.
        small: (connector, its options) -> the options of a toy.
        made: see ``shrink.shrink``.

    Raises:
        RecipeError: nobody here knows the tower.
        ValueError: the real parts would be refused.
    """
    real = real_tower(spec, made)
    tower, hearing = audio_encoder_of(real), hearing_of(spec, real)
    connector = find_connector(spec.connector)
    options = connector.settle(connector_options(spec, real, hearing))
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        widths = tower.build(real, spec.feature_layer).widths
        connector.build(widths, out_width, **options)
    ear = TinyModalAudioProcessor(hearing, real, spec.connector, dict(options))
    toy = toy_tower(real)
    config = audio_tower_config(toy)
    depths = depth(real), depth(config)
    layer: Any = spec.feature_layer
    if isinstance(layer, int):
        layer = _layer(layer, *depths)
    elif not isinstance(layer, str):
        layer = tuple(_layer(one, *depths) for one in layer)
    changed = {
        "path": None,
        "config": toy,
        "options": small(spec.connector, dict(options)),
        "tokens_per_s": None,
        "connector_path": None,
        "feature_layer": layer,
        # As the real one hears, whatever the toy's family would.
        "window_s": hearing.window_s,
        "step_s": hearing.step_s,
    }
    name = spec.path or "new"
    lines = (
        f"audio: {name}, a {real.model_type} of {depths[0]} blocks, here of {depths[1]}",
        f"a second of sound: {ear.tokens_per_s:.4g} tokens, here as many",
    )
    run = max(read_layers(depths[0], spec.feature_layer)[0]), max(read_layers(depths[1], layer)[0])
    return ToyEars(spec.model_copy(update=changed), run, lines)


def real_tower(spec: AudioSpec, made: Any) -> PreTrainedConfig:
    """Config of the real tower, as far as it is known."""
    if spec.path is None:
        return audio_tower_config(spec.config or {})
    if not is_known(spec.path, EARS) and isinstance(found := made(spec.path), AudioSpec):
        return real_tower(found, made)
    return audio_tower_config(known(spec.path, EARS, "model.audio.path"))


def toy_tower(real: Any) -> dict[str, Any]:
    """Values of a small tower's config, of the same kind and in the same steps."""
    toy = tiny_audio(real.model_type)
    same = kept(real) if real.model_type != "tinymodal_ear" else {}
    if real.model_type == "tinymodal_ear":
        stages = len(real.strides)
        same = {
            "strides": list(real.strides),
            "channels": [16] * (stages - 1) + [32],
            "residual_convs": [0] * stages,
            "window_s": real.window_s,
            "step_s": real.step_s,
        }
    family = type(real)()
    return toy | {key: value for key, value in same.items() if hasattr(family, key)}


def audio_processor(spec: AudioSpec) -> TinyModalAudioProcessor:
    """What prepares sounds for a tower whose config stands in the recipe; or, to count, for a known one."""
    config = real_tower(spec, lambda name: None)
    hearing = hearing_of(spec, config)
    return TinyModalAudioProcessor(hearing, config, spec.connector, connector_options(spec, config, hearing))


def toy_mouth(spec: SpeechSpec, folder: Path) -> SpeechSpec:
    """The stand-in of ``[model.speech]``; its codec, random, is written into ``folder``.

    Raises:
        RecipeError: nobody here knows the codec.
    """
    shipped = spec.codec in SHIPPED and not config_file(spec.codec).is_file()
    told: dict[str, Any] = {} if shipped else known(spec.codec, CODECS, "model.speech.codec")
    there = int(told.get("books") or told.get("num_quantizers") or told.get("n_codebooks") or 2)
    if spec.books is not None and told and told.get("books") and spec.books > there:
        raise RecipeError(f"model.speech.books is {spec.books}, but the codec has {there}; take fewer")
    books = 1 if spec.design == "units" else min(spec.books or there, BOOKS)
    tiny_codec(folder / CODEC, books)
    width = min(spec.width or WIDTH, WIDTH)
    heads = None if spec.heads is None else min(spec.heads, 2)
    changed = {
        "path": None,
        "codec": str(folder / CODEC),
        "books": books,
        "layers": min(spec.layers, LAYERS),
        "width": width,
        "heads": heads,
    }
    return spec.model_copy(update=changed)


def depth(config: Any) -> int:
    """Blocks of a tower that hears; of one that works in stages, these."""
    if stages := getattr(config, "depths", None):
        return len(stages)
    return int(getattr(config, "num_hidden_layers", None) or 2)


def _layer(layer: int, real: int, toy: int) -> int:
    """The same hidden state of a tower with fewer blocks; counted from the end, it stays as near to it."""
    return max(layer, -toy - 1) if layer < 0 else scaled(layer, real, toy)


def own_parts(config: dict[str, Any], ear: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """``audio`` and ``speech`` of a composed model's folder, as a recipe would say them.

    Args:
        config: its ``config.json``.
        ear: what its ``processor_config.json`` says of sounds.
        folder: where it lies.
    """
    found: dict[str, Any] = {}
    if config.get("audio_config") is not None and ear is not None:
        said, how = config["connectors"]["audio"], ear["hearing"]
        layer = config.get("audio_feature_layer", -1)
        found["audio"] = AudioSpec(
            config=config["audio_config"],
            connector=said["name"],
            options=said["options"],
            feature_layer=tuple(layer) if isinstance(layer, list) else layer,
            **{key: how[key] for key in ("window_s", "step_s", "max_s")},
        )
    if speech := config.get("speech"):
        keys = ("design", "books", "layers", "width", "heads", "read", "write", "upsample", "reference")
        kept_keys = {key: speech[key] for key in keys if speech.get(key) is not None}
        place = locate(str(folder / CODEC))
        found["speech"] = SpeechSpec(codec=place, voices=tuple(speech.get("voices", ())), **kept_keys)
    return found
