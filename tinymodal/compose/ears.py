"""``[model.audio]`` as the parts that it names: the tower's config, how it hears, and its connector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tinymodal.compose.pretrained import one_line, read_json
from tinymodal.compose.spec import AudioSpec
from tinymodal.compose.whole import prepared_as, read_tower
from tinymodal.core.errors import CheckpointError, RecipeError
from tinymodal.model.audio import Hearing
from tinymodal.model.audio_towers import audio_encoder_of, audio_tower_config
from tinymodal.model.connectors import find_connector

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

AUDIO_TOKEN = "<audio>"

CLOSE = 1e-6
"""A factor is whole if it is so within this share: positions a second are a ratio of whole numbers."""


class Ears(NamedTuple):
    """What a model needs to hear, before a weight is read."""

    folder: Path | None
    """Of the tower; None: a new one."""
    config: PreTrainedConfig
    hearing: Hearing
    connector: dict[str, Any]
    """Its ``name`` and ``options``, as ``TinyModalConfig.connectors`` has them."""


def read_ears(spec: AudioSpec) -> Ears:
    """The tower's config, how sounds are prepared for it, and the connector with its factor.

    Raises:
        CheckpointError: there is no such folder, or nobody knows such a tower.
        RecipeError: numbers of the recipe that do not suit the tower; names the key.
    """
    if spec.path is not None:
        folder, config = read_audio_config(spec.path, "model.audio.path")
    else:
        assert spec.config is not None
        folder = None
        with one_line("model.audio.config", RecipeError, (ValueError, TypeError)):
            config = audio_tower_config(spec.config)
    with one_line("model.audio", RecipeError, (ValueError, TypeError)):
        hearing = hearing_of(spec, config, folder)
        options = connector_options(spec, config, hearing)
    return Ears(folder, config, hearing, {"name": spec.connector, "options": options})


def read_audio_config(name: str, key: str) -> tuple[Path, PreTrainedConfig]:
    """The folder of a tower that hears, and its config; of a whole Whisper or CLAP the half that does.

    Raises:
        CheckpointError: there is no such folder, or nobody knows such a tower.
    """
    folder, document = read_tower(name, key, "audio")
    with one_line(f"{key}: {folder}", CheckpointError):
        return folder, audio_tower_config(document)


def hearing_of(spec: AudioSpec, config: PreTrainedConfig, folder: Path | None = None) -> Hearing:
    """The family's way, then what the checkpoint says of itself, then what the recipe says.

    Raises:
        ValueError: a window that the tower cannot read, or numbers that contradict each other.
        CheckpointError: the folder asks for a rate that its family does not have.
    """
    tower = audio_encoder_of(config)
    how = tower.hearing_of(config)
    if folder is not None and (own := prepared_as(folder, "audio")) is not None:
        how = Hearing.from_dict(own)
    file = folder / "preprocessor_config.json" if folder is not None else None
    if file is not None and file.is_file():
        how = _as_said(how, read_json(file, str(folder)), file)
    window_s = spec.window_s or how.window_s
    # A tower of one input size is given whole windows, whatever the sound.
    whole = how.step_s == how.window_s
    step_s = spec.step_s or (window_s if whole else min(how.step_s, window_s))
    how = replace(how, window_s=window_s, step_s=step_s, max_s=spec.max_s)
    tower.grid(config, (how.frames(how.window),))
    return how


def _as_said(how: Hearing, said: dict[str, Any], file: Path) -> Hearing:
    normalise, rate_hz = said.get("do_normalize"), said.get("sampling_rate")
    if how.kind == "wave" and isinstance(normalise, bool):
        how = replace(how, normalise=normalise)
    if not isinstance(rate_hz, int) or rate_hz == how.rate_hz:
        return how
    if how.kind != "wave":
        raise CheckpointError(
            f"{file}: sampling_rate is {rate_hz:,}, and its family hears {how.rate_hz:,} samples a second"
        )
    return replace(how, rate_hz=rate_hz, high_hz=min(how.high_hz, rate_hz / 2))


def connector_options(spec: AudioSpec, config: PreTrainedConfig, hearing: Hearing) -> dict[str, Any]:
    """The connector's options, with the factor that gives as many tokens a second as are asked for.

    Raises:
        ValueError: the factor would not be whole, or the connector has none.
    """
    connector = find_connector(spec.connector)
    options: dict[str, Any] = dict(spec.options)
    if spec.tokens_per_s is None:
        return options
    positions_per_s = hearing.rate_hz / audio_encoder_of(config).stride(config)
    if "factor" not in connector.defaults:
        if abs(positions_per_s / spec.tokens_per_s - 1) <= CLOSE:
            return options
        raise ValueError(
            f"tokens_per_s is {spec.tokens_per_s:g}, but connector '{spec.connector}' has no factor and the "
            f"tower gives {positions_per_s:g} positions a second; take a connector that has one, such as "
            f"stack_frames, or leave the key out"
        )
    queries = int(options.get("num_queries", connector.defaults.get("num_queries", 1)))
    most = positions_per_s * queries
    factor = most / spec.tokens_per_s
    whole = max(round(factor), 1)
    if abs(factor / whole - 1) > CLOSE:
        near = max(int(factor), 1)
        could = " or ".join(f"{most / each:g} (factor {each})" for each in (near, near + 1))
        raise ValueError(
            f"tokens_per_s is {spec.tokens_per_s:g} of {positions_per_s:g} positions a second, which is no "
            f"whole factor ({factor:.3g}); take {could}"
        )
    if options.setdefault("factor", whole) != whole:
        raise ValueError(
            f"tokens_per_s {spec.tokens_per_s:g} asks for factor {whole} and options say "
            f"{options['factor']}; take one of the two out"
        )
    return options
