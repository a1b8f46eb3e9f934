"""Sounds -> what the tower takes; and how many tokens a sound costs, without any weights.

The counterpart of the image processor: it holds the tower's config and the connector's options, and calls
the functions that the model itself calls, so the two cannot disagree. A sound's tiles are its windows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import BatchFeature, FeatureExtractionMixin, PreTrainedConfig

from .audio import Hearing, load_sound
from .audio_towers import audio_encoder_of, audio_tower_config
from .connectors import find_connector
from .geometry import num_tokens
from .layout import Layout, Prepared, as_inputs, as_list

Sound = str | Path | bytes | Tensor | np.ndarray

NUM_LAYOUTS = 4_096
"""Layouts that are kept: sounds are filled up to steps, so a data set has few lengths of windows."""


class TinyModalAudioProcessor(FeatureExtractionMixin):
    """Reads and prepares sounds for one tower, and counts their tokens.

    Raises:
        ValueError: if the tower cannot take a window of the length or the bands it is prepared with, or the
            connector cannot shorten it.
    """

    model_input_names = ["audio_values", "audio_take"]  # noqa: RUF012 - transformers' own class attribute
    _auto_class: Any = "AutoFeatureExtractor"

    def __init__(
        self,
        hearing: Hearing | Mapping[str, Any] | None = None,
        audio_config: PreTrainedConfig | dict[str, Any] | None = None,
        connector: str = "stack_frames",
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Join them.

        Args:
            hearing: how a sound is prepared; None: the way of the tower's family.
            audio_config: of the tower.
            connector: its name.
            options: its options; what is left out has its default.
            **kwargs: what transformers keeps beside them.
        """
        kwargs.pop("feature_extractor_type", None)
        super().__init__(**kwargs)
        if audio_config is None:
            raise ValueError("what prepares sounds must know the tower: give audio_config")
        self.audio_config = audio_tower_config(audio_config)
        if isinstance(hearing, Mapping):
            hearing = Hearing.from_dict(dict(hearing))
        self.hearing = hearing or audio_encoder_of(self.audio_config).hearing_of(self.audio_config)
        _require_bands(self.hearing, self.audio_config)
        self.connector = connector
        self.options = find_connector(connector).settle(options or {})
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self.typical()

    @property
    def sampling_rate(self) -> int:
        """Samples a second that the tower is given; transformers asks by this name."""
        return self.hearing.rate_hz

    @property
    def tokens_per_s(self) -> float:
        """Embeddings a second of a full window."""
        return self.typical().tokens * self.hearing.rate_hz / self.hearing.window

    def typical(self) -> Layout:
        """The layout of a sound of one full window.

        Raises:
            ValueError: if the tower cannot take it, or the connector cannot shorten it.
        """
        return self.layout(self.hearing.window)

    def layout(self, num_samples: int) -> Layout:
        """How a sound of so many samples (at ``sampling_rate``) is cut and what it costs. Pure integers."""
        how = self.hearing
        return self.layout_of(tuple(how.frames(size) for size in how.windows(num_samples)))

    def layout_of(self, windows: tuple[int, ...]) -> Layout:
        """The layout of prepared windows of so many columns each."""
        if windows not in self._layouts:
            if len(self._layouts) >= NUM_LAYOUTS:
                self._layouts.clear()
            tower, connector = audio_encoder_of(self.audio_config), find_connector(self.connector)
            before = tuple(tower.grid(self.audio_config, (size,)) for size in windows)
            tokens = tuple(num_tokens(connector.shrink(grid, **self.options)) for grid in before)
            total = sum(tokens)
            # Windows follow one another in time.
            order = None if len(windows) == 1 else tuple(range(total))
            self._layouts[windows] = Layout(before, tokens, (total,), order)
        return self._layouts[windows]

    def load(
        self,
        source: Sound,
        rate_hz: int | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        name: str = "",
    ) -> Tensor:
        """The samples of a sound as the tower's family wants them, float32 [samples].

        See :func:`load_sound`.
        """
        how = self.hearing
        return load_sound(source, rate_hz, start_s, end_s, how.max_s, how.rate_hz, name)

    def prepare(
        self,
        source: Sound,
        rate_hz: int | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        change: Any = None,
        name: str = "",
    ) -> Prepared:
        """Read one sound.

        Args:
            source: the sound; :func:`load_sound` says what is accepted.
            rate_hz: of samples; a file says its own.
            start_s: where to begin; None: at the beginning.
            end_s: where to end; None: at the end.
            change: what augmentation does to it; None: nothing.
            name: what errors call it; the file's own name by default.

        Raises:
            ValueError: if it cannot be read, or is longer than ``hearing.max_s``.
        """
        wave = self.load(source, rate_hz, start_s, end_s, name)
        tiles = self.hearing.prepare(wave, change)
        # A change may make it longer or shorter, so the windows that there are decide.
        found = self.layout_of(tuple(tile.shape[-1] for tile in tiles))
        return Prepared(tuple(tiles), found, len(wave) / self.hearing.rate_hz)

    def __call__(self, audio: Any, sampling_rate: int | None = None, **kwargs: Any) -> BatchFeature:
        """Sounds -> ``audio_values``, and ``audio_take`` where needed; see :func:`as_inputs`.

        Args:
            audio: one sound, several, or lists of them.
            sampling_rate: of sounds that are samples; files say their own.
            **kwargs: what others pass to every feature extractor; not used.
        """
        prepared = [self.prepare(source, sampling_rate) for source in as_list(audio)]
        return BatchFeature(as_inputs(prepared, "audio"))

    @classmethod
    def from_dict(cls, feature_extractor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From what :meth:`to_dict` gave. What loaders pass besides (``trust_remote_code``) is not ours."""
        made = cls(**feature_extractor_dict)
        return (made, kwargs) if kwargs.pop("return_unused_kwargs", False) else made

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, from which :meth:`from_dict` makes an equal one."""
        config = {**self.audio_config.to_diff_dict(), "model_type": self.audio_config.model_type}
        return {
            "feature_extractor_type": type(self).__name__,
            "hearing": self.hearing.to_dict(),
            "audio_config": copy.deepcopy(config),
            "connector": self.connector,
            "options": dict(self.options),
            "auto_map": {
                "AutoFeatureExtractor": "audio_processing.TinyModalAudioProcessor",
                "AutoProcessor": "processing_tinymodal.TinyModalProcessor",
            },
        }


def _require_bands(hearing: Hearing, config: PreTrainedConfig) -> None:
    """Raise ValueError if sounds prepared so have other bands than the tower reads."""
    try:
        own = audio_encoder_of(config).hearing_of(config)
    except ValueError:
        return  # a family of which only its checkpoint says how it hears
    if hearing.bands != own.bands:
        raise ValueError(
            f"sounds are prepared as {hearing.kind} of {hearing.bands} bands, but this {config.model_type!r} "
            f"hears {own.kind} of {own.bands}; set num_bands to its own, or leave the hearing out"
        )
