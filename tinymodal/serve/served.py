"""A model that is served, and everything that its routes share."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tinymodal.core.threads import on_one_core
from tinymodal.infer.engine import Engine
from tinymodal.infer.scheduler import Scheduler
from tinymodal.serve.asking import Asking
from tinymodal.serve.gate import Doors, Key
from tinymodal.serve.limits import Limits
from tinymodal.serve.metrics import Metrics
from tinymodal.serve.protocol import ModelCard
from tinymodal.serve.remote import Fetcher

PREPARING = 2
"""Threads that decode pictures and sounds, a core each; each may hold a picture of the largest size."""


@dataclass(slots=True)
class Served:
    """The engine, who decodes for it, and how.

    Args:
        engine: the model.
        scheduler: decodes for all requests.
        name: by which requests name the model.
        limits: of requests.
        key: what callers must know; None: nothing.
        hosts: names that the server answers to; None: any.
        asking: what the model is asked where a request only brings a sound or a text.
    """

    engine: Engine
    scheduler: Scheduler
    name: str
    limits: Limits = field(default_factory=Limits)
    key: Key | None = None
    hosts: frozenset[str] | None = None
    asking: Asking = field(default_factory=Asking)
    metrics: Metrics = field(default_factory=Metrics)
    doors: Doors = field(default_factory=Doors)
    started: int = field(default_factory=lambda: int(time.time()))
    preparing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(PREPARING, "serve-prepare", on_one_core)
    )
    speaking: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "serve-speak", on_one_core)
    )
    fetcher: Fetcher = field(init=False)

    def __post_init__(self) -> None:
        limits = self.limits
        self.fetcher = Fetcher(limits.image_hosts, int(limits.image_mb * 1e6), limits.image_s)

    @property
    def rate_hz(self) -> int:
        """Of the sounds that the model hears."""
        ear: Any = self.engine.encoder.processor.feature_extractor
        return 16_000 if ear is None else int(ear.hearing.rate_hz)

    @property
    def spoken_hz(self) -> int:
        """Of the sounds that it speaks.

        Raises:
            CheckpointError: it does not.
        """
        return self.engine.mouth.codec.rate_hz

    @property
    def speaks(self) -> bool:
        """Whether it says its replies aloud where that is asked."""
        return getattr(self.engine.model, "speech_head", None) is not None

    @property
    def voices(self) -> list[str]:
        """Names of its voices; empty where it does not speak or has one without a name."""
        return list(self.engine.model.speech_head.voices) if self.speaks else []

    def card(self) -> ModelCard:
        """The model as ``GET /v1/models`` shows it."""
        return ModelCard(
            id=self.name,
            created=self.started,
            max_model_len=self.engine.room,
            modalities=["text", *self.engine.places, *(["speech"] if self.speaks else [])],
            voices=self.voices,
        )
