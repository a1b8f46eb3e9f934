"""What a model is made of: which language model, which tower, joined how. A plain value, no torch.

A part is either pretrained (``path``: a local folder, a shipped part such as ``starter/vision``, or a Hub
name) or new (``config``: the family's own Hugging Face config as a table, weights random). ``compose.build``
makes it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

Number = Annotated[int, Strict()]
Count = Annotated[int, Strict(), Field(gt=0)]


class Value(BaseModel):
    """Frozen, and no key that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LanguageSpec(Value):
    """The language model: any causal one that transformers knows."""

    path: str | None = None
    """Folder or Hub name of a pretrained model; its tokenizer lies in the same folder."""
    config: dict[str, Any] | None = None
    """A new model instead: ``{ model_type = "llama", ... }``; ``vocab_size`` may be left out."""
    tokenizer: str | None = None
    """Its folder or Hub name. Needed with ``config``; with ``path`` it replaces the folder's own."""
    template: str = "chatml"
    """How a conversation is written: ``chatml``, ``vicuna_v1``, ``phi`` and others (docs/templates.md),
    ``tokenizer`` (the tokenizer's own chat template), or your own ``my_llm.py:TEMPLATE``."""

    @model_validator(mode="after")
    def _one_origin(self) -> LanguageSpec:
        one_origin(self.path, self.config, "language")
        if self.config is not None and self.tokenizer is None:
            raise ValueError(
                "'config' makes a new language model, which has no tokenizer; name one with 'tokenizer'"
            )
        return self


class VisionSpec(Value):
    """The vision tower, what is taken from it, and the connector that joins it to the language model."""

    path: str | tuple[str, ...] | None = None
    """Folder or Hub name of a pretrained tower; a full CLIP or SigLIP folder is read for its vision half. Two
    names: both towers look, and their features stand side by side."""
    config: dict[str, Any] | None = None
    """A new tower instead: ``{ model_type = "siglip_vision_model", hidden_size = 64, ... }``."""
    connector: str = "mlp"
    """Its name: ``linear``, ``mlp``, ``pixel_shuffle``, ``perceiver`` and others, see docs/connectors.md."""
    options: dict[str, bool | int | float | str] = {}
    """The connector's own options, e.g. ``{ ratio = 2 }``."""
    connector_path: str | None = None
    """Folder of a composed model: connector and marks begin with its own; what it lacks begins new."""
    marks: tuple[str, ...] = ()
    """Learned embeddings around and between a picture's tokens: ``start``, ``end``, ``newline`` (closes a
    row), ``tile_start``, ``tile_end``, ``tile_newline`` and ``id``. They train with the connectors."""
    merge: Literal["flat", "spatial", "spatial_unpad"] = "flat"
    """How the tokens of tiles follow one another: tile by tile, or row by row over the whole picture,
    without or with the rows and columns of padding taken out (LLaVA-NeXT)."""
    feature_layer: Number | tuple[Number, ...] = -2
    """Hidden state that is read, counted as in LLaVA: -1 is the last block's output, -2 the one before. A
    list: their features side by side."""
    keep_class: Annotated[bool, Strict()] = False
    """Keep the class token (and registers) of a tower that has one."""
    final_norm: Annotated[bool, Strict()] | None = None
    """Apply the tower's last norm to what is read (OmniLMM); left out, as the tower's own config says, which
    is seldom."""
    drop_first: Annotated[bool, Strict()] | None = None
    """Leave out the first patch of a tower without a class token: what TinyLLaVA's SigLIP models were trained
    with. Not for new models; left out, as the tower's own config says."""
    resize: Literal["square", "crop", "pad", "anyres", "slices", "tiles", "native"] = "square"
    """``square`` stretches a picture to the tower's size; ``crop`` cuts its middle out; ``pad`` first fills
    its short side with the mean colour. ``anyres``, ``slices`` and ``tiles`` show it whole and in pieces;
    ``native`` keeps its shape. See docs/resolutions.md."""
    size_px: Count | None = None
    """Edge of the prepared picture or tile; left out, what the tower was trained on."""
    pinpoints: tuple[tuple[Count, Count], ...] | None = None
    """``anyres``: heights and widths that pieces may cover together; left out, LLaVA-NeXT's, scaled to the
    tower."""
    max_tiles: Count | None = None
    """At most so many pieces besides the whole picture; left out, 9 for ``slices``, 12 for ``tiles``, and as
    many as the pinpoints have for ``anyres``."""
    longest_px: Count | None = None
    """``tiles``: stretch the longer edge to so many pixels, in whole tiles (SmolVLM); left out, the grid of
    tiles is the one nearest to the picture's shape (InternVL)."""
    thumbnail: Annotated[bool, Strict()] | None = None
    """``tiles``: show the whole picture too; left out, yes."""
    fit_pixels: tuple[Count, Count] | None = None
    """``native``: least and most pixels after resizing."""
    max_pixels: Count | None = None
    """Pictures with more pixels are refused before they are decoded; left out, 89,478,485."""
    resizer: Literal["torch", "pillow"] | None = None
    """``torch`` is faster, ``pillow`` gives the very pixels that published models were trained on; they
    differ by two levels of 255 at most. Left out, ``torch``."""

    normalise: Literal["own", "first"] = "own"
    """Two towers: each sees the picture normalised as it was pretrained, or both as the first was
    (TinyLLaVA's MoF)."""

    @model_validator(mode="after")
    def _one_origin(self) -> VisionSpec:
        one_origin(self.path, self.config, "vision")
        if isinstance(self.path, tuple) and len(self.path) != 2:
            raise ValueError(f"vision.path names {len(self.path)} towers; give one name, or a list of two")
        if self.normalise != "own" and not isinstance(self.path, tuple):
            raise ValueError("'normalise' is for two towers: path = ['FIRST', 'SECOND']")
        return self


class AudioSpec(Value):
    """The audio tower and its connector."""

    path: str | None = None
    """Folder or Hub name of a pretrained tower; a whole Whisper or CLAP folder is read for the half that
    hears."""
    config: dict[str, Any] | None = None
    """A new tower instead: ``{ model_type = "whisper", d_model = 64, ... }``."""
    connector: str = "stack_frames"
    """Its name: ``stack_frames``, ``conv_frames``, ``pool_frames``, ``window_qformer``, ``linear``, ``mlp``;
    see docs/hearing.md."""
    options: dict[str, bool | int | float | str] = {}
    """The connector's own options, e.g. ``{ depth = 2 }``."""
    tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    """Embeddings a second of sound: sets the connector's factor, which must come out whole; left out, what
    ``options`` say."""
    connector_path: str | None = None
    """Folder of a composed model: the connector begins with its own."""
    feature_layer: Number | tuple[Number, ...] | Literal["weighted"] = -1
    """Hidden state that is read; a list: their features side by side; ``weighted``: a learned mean of all."""
    window_s: Annotated[float, Field(gt=0)] | None = None
    """Longer sounds are cut into windows of so many seconds, which the tower hears one by one; left out, what
    it was made for, 30 s for most."""
    step_s: Annotated[float, Field(gt=0)] | None = None
    """Sounds are filled up with silence to a multiple of so many seconds, so that many have one length; left
    out, 0.5 s, rounded up to whole frames of the tower."""
    max_s: Annotated[float, Field(gt=0)] = 600.0
    """Longer sounds are refused."""

    @model_validator(mode="after")
    def _one_origin(self) -> AudioSpec:
        one_origin(self.path, self.config, "audio")
        return self


class SpeechSpec(Value):
    """The speech head, and the codec that makes its frames a sound."""

    path: str | None = None
    """Folder of a composed model or a saved head to begin with; left out, a new head."""
    codec: str
    """Folder or Hub name: Mimi, EnCodec, DAC, a unit vocoder of ours, or ``starter/codec``."""
    design: Literal["talker", "units"] = "talker"
    """``talker``: frame after frame, several codebooks with a delay. ``units``: all frames of a token at
    once, aligned by CTC (LLaMA-Omni). See docs/speaking.md."""
    books: Count | None = None
    """Codebooks that are spoken; left out, all of the codec. ``units`` has one."""
    layers: Count = 2
    """Blocks of the head."""
    width: Count | None = None
    """Of its hidden states; left out, the language model's."""
    heads: Count | None = None
    """Left out, one for 64 of ``width``, at least four where it can be cut so."""
    read: Count = 2
    """``talker``: tokens that are read before each stretch of frames,"""
    write: Count = 10
    """and frames that are written after them."""
    upsample: Count = 25
    """``units``: places for frames a token."""
    voices: tuple[str, ...] = ()
    """Names of the voices in the training data; empty: one voice."""
    reference: Annotated[int, Strict(), Field(ge=0)] = 0
    """Numbers by which a voice without a name is told, from a clip of it; 0: voices by name only."""

    @model_validator(mode="after")
    def _voices(self) -> SpeechSpec:
        if len(set(self.voices)) < len(self.voices):
            raise ValueError(f"voices are named once each, got {list(self.voices)}")
        if self.design == "units" and (self.books or 1) != 1:
            raise ValueError(f"design 'units' speaks one codebook, got books = {self.books}")
        return self


class ModelSpec(Value):
    """A model to compose from parts, or a composed one to go on with."""

    path: str | None = None
    """Folder of a composed model, or ``starter``; excludes ``language`` and ``vision``."""
    language: LanguageSpec | None = None
    """The language model: ``[model.language]``."""
    vision: VisionSpec | None = None
    """Left out, the model does not see."""
    audio: AudioSpec | None = None
    """Left out, the model does not hear. Beside ``path`` it gives that model ears, or new ones."""
    speech: SpeechSpec | None = None
    """Left out, the model does not speak. Beside ``path`` it gives that model a mouth, or a new one."""

    @model_validator(mode="after")
    def _parts_or_whole(self) -> ModelSpec:
        named = [key for key in ("language", "vision") if getattr(self, key) is not None]
        if self.path is not None and named:
            raise ValueError(
                f"'path' names a whole composed model, so {' and '.join(repr(key) for key in named)} must "
                f"go; to compose from parts, leave 'path' out"
            )
        if self.path is None and self.language is None:
            raise ValueError(
                "a model needs 'language' (and 'vision', if it shall see, and 'audio', if it shall hear), or "
                "'path' of a composed model"
            )
        return self


def one_origin(path: str | tuple[str, ...] | None, config: dict[str, Any] | None, part: str) -> None:
    """Refuse a part that is both pretrained and new, or neither, or new of no family."""
    if (path is None) == (config is None):
        found = "both" if path is not None else "neither"
        raise ValueError(
            f"{part} has either 'path' (pretrained) or 'config' (new, random weights), found {found}"
        )
    if config is not None and not isinstance(config.get("model_type"), str):
        raise ValueError(
            f"{part}.config needs 'model_type', the family's name in transformers, "
            f"e.g. {'llama' if part == 'language' else 'siglip_vision_model'}"
        )
