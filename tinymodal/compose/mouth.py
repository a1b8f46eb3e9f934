"""``[model.speech]`` as the parts that it names: the codec, and the speech head with its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinymodal.chat.encode import Speaking
from tinymodal.compose.pretrained import fetch, one_line, read_json, read_weights
from tinymodal.compose.spec import SpeechSpec
from tinymodal.compose.whole import model_folder, without_prefix
from tinymodal.core.errors import CheckpointError, RecipeError
from tinymodal.model.codec import Codec, open_codec
from tinymodal.model.configuration_tinymodal import TinyModalConfig

if TYPE_CHECKING:
    from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration

CODEC = "codec"
"""Folder in that of a model, where its codec lies."""
HEAD = "tinymodal_speech"
"""``model_type`` of a speech head that is saved alone."""
OF_DESIGN = {"talker": ("read", "write"), "units": ("upsample",)}
"""Keys of a recipe that only one design has."""


def read_codec(spec: SpeechSpec) -> Codec:
    """The codec that a recipe names.

    Raises:
        CheckpointError: there is no such folder, or it holds no codec.
        RecipeError: it has fewer codebooks than are asked for.
    """
    key = "model.speech.codec"
    folder = fetch(spec.codec, key)
    where = f"{key}: {folder}"
    read_json(folder / "config.json", where)
    books = 1 if spec.design == "units" else spec.books
    # Its first numbers are random, and replaced: nobody else's random state may move for them.
    with one_line(where, CheckpointError), torch.random.fork_rng(devices=[]):
        codec = open_codec(folder, books)
    if books is not None and codec.books != books:
        raise RecipeError(f"model.speech.books is {books}, but the codec has {codec.books}; take fewer")
    return codec


def speech_config(spec: SpeechSpec, codec: Codec) -> dict[str, Any]:
    """What ``TinyModalConfig.speech`` holds."""
    shared = ("design", "layers", "width", "heads", "reference", *OF_DESIGN[spec.design])
    said = {key: getattr(spec, key) for key in shared}
    sizes = {"books": codec.books, "book_size": codec.book_size}
    kept = {key: value for key, value in (said | sizes).items() if value is not None}
    return {**kept, "voices": list(spec.voices), "codec": CODEC}


def open_own(folder: Path, config: TinyModalConfig) -> Codec | None:
    """The codec in the folder of a model that speaks; None where there is none.

    Raises:
        CheckpointError: there is one, and it cannot be read.
    """
    if config.speech is None:
        return None
    said = config.speech.get("codec")
    place = folder / said if isinstance(said, str) else None
    if place is None or not (place / "config.json").is_file():
        return None
    with one_line(str(place), CheckpointError), torch.random.fork_rng(devices=[]):
        return open_codec(place, int(config.speech["books"]))


def speaking_of(model: TinyModalForConditionalGeneration, codec: Codec | None) -> Speaking | None:
    """What an encoder must know to write spoken answers; None where the model does not speak."""
    head: Any = model.speech_head
    if head is None or codec is None:
        return None
    return Speaking(rate_hz=codec.rate_hz, voices=tuple(head.voices))


@torch.no_grad()
def load_head(model: TinyModalForConditionalGeneration, name: str, key: str) -> None:
    """Let the speech head begin with that of a composed model, or with one that was saved alone.

    Args:
        model: it speaks; changed in place.
        name: folder or Hub name, or the folder of a run.
        key: the recipe key that holds it, for the error.

    Raises:
        CheckpointError: there is no speech head, or one that does not fit.
    """
    folder = model_folder(name, key)
    where = f"{key}: {folder}"
    kind = read_json(folder / "config.json", where).get("model_type")
    if kind not in (HEAD, TinyModalConfig.model_type):
        raise CheckpointError(f"{where}: holds a model of type {kind!r}, neither a composed one nor a head")
    with one_line(where, CheckpointError):
        weights = read_weights(folder, where)
    found: dict[str, Tensor] = weights if kind == HEAD else without_prefix(weights, "speech_head.")
    if not found:
        raise CheckpointError(f"{where}: has no speech head")
    head: Any = model.speech_head
    assert isinstance(head, nn.Module)
    own = head.state_dict()
    if odd := sorted(own.keys() ^ found.keys()):
        raise CheckpointError(
            f"{where}: its speech head is another, {odd[0]} is in one of the two only; name one of the same "
            f"design and layers"
        )
    for weight, tensor in found.items():
        if own[weight].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {weight} is {tuple(tensor.shape)}, expected {tuple(own[weight].shape)}; name a "
                f"head of the same width, codec and voices, beside a language model of the same width"
            )
        own[weight].copy_(tensor)
