"""The smaller values of a recipe: sources, what of a part trains, adapters, processes. No torch."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from tinymodal.core.lookup import nearest

Group = Literal["vision", "audio", "connectors", "language", "embeddings", "speech", "adapters", "heads"]
GROUPS: tuple[Group, ...] = (
    "vision", "audio", "connectors", "language", "embeddings", "speech", "adapters", "heads",
)  # fmt: skip
PARTS = ("vision", "audio", "connectors", "language")
"""Groups that are rooms of the model: of these a stage may train less than all, or adapters instead."""
Loss = Literal["text", "cells", "dpo", "distill", "speech"]

# Strict scalars: "10" is not 10 and true is not 1. Whole numbers are welcome where a float is asked for.
Count = Annotated[int, Strict(), Field(gt=0)]
Natural = Annotated[int, Strict(), Field(ge=0)]
Rate = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Strict(), Field(ge=0, le=1)]
Flag = Annotated[bool, Strict()]
Factor = Annotated[float, Strict(), Field(ge=0.25, le=4)]
Decibel = Annotated[float, Strict(), Field(ge=-60, le=100)]


class Value(BaseModel):
    """Frozen, and no key that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Augment(Value):
    """How sounds are changed at random, anew each time they are drawn. What is left out is not changed."""

    speed: tuple[Factor, Factor] | None = None
    """Least and greatest factor on the speed; the pitch goes with it."""
    gain_db: tuple[Decibel, Decibel] | None = None
    """Least and greatest change of loudness."""
    noise_db: tuple[Decibel, Decibel] | None = None
    """Least and greatest ratio of the sound to white noise that is added."""
    time_masks: Natural = 0
    """SpecAugment (arXiv:1904.08779): so many stretches of the log-mel are silenced, see ``time_mask_s``."""
    time_mask_s: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] = 0.5
    """Longest of them."""
    band_masks: Natural = 0
    """So many runs of mel bands are silenced."""
    band_mask: Count = 8
    """Bands in the widest of them."""

    @model_validator(mode="after")
    def _ordered(self) -> Augment:
        for key in ("speed", "gain_db", "noise_db"):
            ends = getattr(self, key)
            if ends is not None and ends[0] > ends[1]:
                raise ValueError(f"{key} is [least, greatest], got {list(ends)}")
        return self


class Source(Value):
    """Where rows come from: files (``path``), a data set of the Hub (``hub``), or made ones (``made``)."""

    name: str | None = None
    """What its loss is called in the metrics; None: the file's, the data set's or the generator's name."""
    path: str | None = None
    """A file or a glob of .json, .jsonl, .parquet, or .tar shards."""
    hub: str | None = None
    """A data set of the Hugging Face Hub, streamed; a folder of such files works too."""
    split: str = "train"
    """Of the ``hub`` data set."""
    subset: str | None = None
    """Of the ``hub`` data set, where it has several."""
    revision: str | None = None
    """Of the ``hub`` data set: a commit, so that the rows are the same next year."""
    format: str | None = None
    """``llava``, ``messages``, ``caption``, ``vqa``, ``preference``; of sounds ``asr``, ``audio_qa``,
    ``audio_caption``, ``spoken``, ``tts``; or your own ``my_rows.py:convert``."""
    images: str | None = None
    """Folder that relative picture paths are looked up in, after the data file's own folder: first
    by the whole path, then by the file name alone."""
    sounds: str | None = None
    """The same for sounds."""
    augment: Augment | None = None
    """How its sounds are changed at random; None: never. ``{ speed = [0.9, 1.1] }``"""
    made: str | None = None
    """Name of a generator in ``tinymodal.data.sounds.MADE``, or your own ``my_data.py:Make``."""
    options: dict[str, Any] = {}
    """Keyword arguments of the generator."""
    weight: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of samples relative to the other sources of the stage."""
    epochs: Count = 1
    """Times it is read where the stage ends with its data, see ``ends``."""

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        given = [key for key in ("path", "hub", "made") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(f"'{key}'" for key in given) or "none of them"
            raise ValueError(f"a source has either 'path', 'hub' or 'made', found {found}")
        if self.made is None and self.format is None:
            raise ValueError(
                f"'{given[0]}' needs 'format': llava, messages, caption, vqa, asr (docs/data-formats.md has "
                f"all) or my_rows.py:convert"
            )
        for key in ("subset", "revision"):
            if getattr(self, key) is not None and self.hub is None:
                raise ValueError(f"'{key}' is for 'hub' sources; this one has '{given[0]}'")
        if self.made is None and self.options:
            raise ValueError(f"'options' are for 'made' sources; this one has '{given[0]}'")
        if self.made is not None:
            for key in ("format", "images", "sounds"):
                if getattr(self, key) is not None:
                    raise ValueError(f"'{key}' is for 'path' and 'hub' sources; this one is 'made'")
        return self

    @property
    def label(self) -> str:
        """What the source is called where numbers are told."""
        if self.name is not None:
            return self.name
        whole = str(self.made or self.hub or self.path)
        return whole.rpartition(":")[2] if self.made else PurePath(whole).stem


class Choice(NamedTuple):
    """Which of a group's parameters train."""

    layer: int | None = None
    """This block and all behind it, counted from 0."""
    norms: bool = False
    """The weights of its norms."""
    biases: bool = False
    """The biases of its norms as well."""
    names: tuple[str, ...] = ()
    """Its modules, or single parameters, of these names."""


CHOICES = "'from layer K', 'norms', 'norms with biases' or 'named X, Y'"


def read_choice(text: str) -> Choice:
    """What a value of ``only`` means.

    Raises:
        ValueError: it means nothing.
    """
    if match := re.fullmatch(r"from layer (\d+)", text):
        return Choice(layer=int(match[1]))
    if text in ("norms", "norms with biases"):
        return Choice(norms=True, biases=text != "norms")
    if match := re.fullmatch(r"named ([\w.]+(?:, *[\w.]+)*)", text):
        return Choice(names=tuple(re.split(r", *", match[1])))
    raise ValueError(f"'{text}' chooses nothing; take {CHOICES}")


class Lora(Value):
    """Small matrices that train in place of the large ones beside which they stand."""

    rank: Count
    """Columns of one small matrix and rows of the other."""
    alpha: Count | None = None
    """The adapter counts alpha / rank (``rslora``: alpha / root of rank); None: twice the rank."""
    dropout: Fraction = 0.05
    """Fraction of an adapter's inputs that is left out at random while it trains."""
    parts: tuple[str, ...] = ("language",)
    """Where they stand: any of ``vision``, ``connectors``, ``language``. Never on the language head."""
    targets: str | tuple[str, ...] = "linear"
    """``linear``: every linear layer of the parts; or the layers' own names: ``["q_proj", "v_proj"]``."""
    kind: Literal["lora", "dora", "rslora"] = "lora"
    """``dora`` learns the length of every row as well; ``rslora`` keeps large ranks from counting less."""

    @field_validator("parts")
    @classmethod
    def _parts(cls, parts: tuple[str, ...]) -> tuple[str, ...]:
        if not parts:
            raise ValueError("is empty; give at least one, e.g. ['language']")
        for part in parts:
            if part not in PARTS:
                raise ValueError(f"unknown part '{part}'; parts: {', '.join(PARTS)}{nearest(part, PARTS)}")
        return parts

    @field_validator("targets")
    @classmethod
    def _targets(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets:
            raise ValueError("is empty; take 'linear' for every linear layer")
        if isinstance(targets, str) and targets != "linear":
            raise ValueError(f"'{targets}' is not 'linear'; names stand in a list: ['{targets}']")
        return targets

    @field_validator("dropout")
    @classmethod
    def _dropout(cls, dropout: float) -> float:
        if dropout == 1:
            raise ValueError("1 leaves every input out; take less")
        return dropout


class Parallel(Value):
    """How several processes share a stage; ``torchrun`` starts them."""

    kind: Literal["ddp", "fsdp", "hybrid"] = "ddp"
    """``ddp``: each holds the whole model. ``fsdp``: each holds a piece of every tensor. ``hybrid``: pieces
    within a node, copies between nodes."""
    reshard: Flag = True
    """``fsdp``: forget the gathered tensors between forward and backward (ZeRO-3); false: keep them
    (ZeRO-2)."""
    offload: Flag = False
    """``fsdp``: weights, gradients and optimizer stay in the host's memory."""
    timeout_s: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] = 600.0
    """Time after which a process that does not come is named and the run ends."""

    @model_validator(mode="after")
    def _agree(self) -> Parallel:
        for key in ("reshard", "offload"):
            if self.kind == "ddp" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"'{key}' is for kind = 'fsdp' or 'hybrid'; this one is 'ddp'")
        return self


class Teacher(Value):
    """A larger model of the same tokens, whose choice among next tokens is learned from."""

    path: str
    """Its folder or Hub name; it must write a picture as equally many tokens."""
    temperature: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] = 1.0
    """Both models' logits are divided by it: above 1 the less likely tokens count more."""
    top_k: Count | None = None
    """Its likeliest tokens, and all others as one; None: the whole vocabulary."""
    cached: Flag = False
    """Keep its ``top_k`` on disk and ask it about no sample twice."""

    @model_validator(mode="after")
    def _agree(self) -> Teacher:
        if self.cached and self.top_k is None:
            raise ValueError("'cached' keeps the likeliest tokens only; give top_k, e.g. 64")
        return self
