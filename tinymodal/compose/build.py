"""Parts become a model, and a model becomes a folder.

* :func:`build` composes a :class:`~tinymodal.compose.spec.ModelSpec`, :func:`load` reads a composed folder,
  :func:`grow` gives a composed model ears or a mouth.
* :func:`save` writes one that loads without our package; :func:`save_part` writes one part for another
  recipe.

Pretrained parts are read by ``compose.pretrained``, which knows where they lie and refuses incomplete ones.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from tinymodal.chat.encode import Encoder
from tinymodal.chat.template import TEMPLATES, ChatTemplate, TokenizerTemplate, known_as, template_for
from tinymodal.compose.ears import AUDIO_TOKEN, Ears, read_ears
from tinymodal.compose.mouth import (
    CODEC,
    HEAD,
    load_head,
    open_own,
    read_codec,
    speech_config,
)
from tinymodal.compose.narrow import Bits, is_narrow, narrow
from tinymodal.compose.pretrained import fetch as fetch
from tinymodal.compose.pretrained import locate as locate
from tinymodal.compose.pretrained import (
    one_line,
    read_json,
    read_language,
    read_tokenizer,
    refuse_missing,
    widen,
)
from tinymodal.compose.spec import LanguageSpec, ModelSpec, VisionSpec
from tinymodal.compose.towers import (
    load_connector,
    load_tower,
    normalisation,
    read_pair_config,
    read_tower_config,
)
from tinymodal.compose.whole import KINDS, model_folder, prepared_as
from tinymodal.core.errors import CheckpointError, RecipeError
from tinymodal.core.lookup import nearest
from tinymodal.model.audio import Hearing
from tinymodal.model.audio_processing import TinyModalAudioProcessor
from tinymodal.model.codec import Codec
from tinymodal.model.configuration_tinymodal import TinyModalConfig, language_config
from tinymodal.model.connectors import find_connector
from tinymodal.model.encoders import encoder_of, tower_config
from tinymodal.model.geometry import mark_rows
from tinymodal.model.image import Preparation
from tinymodal.model.language import causal_class
from tinymodal.model.media import OPTIONS
from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration, load_exactly
from tinymodal.model.pair import PairConfig
from tinymodal.model.processing_tinymodal import TinyModalImageProcessor, TinyModalProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"

CONTRADICTIONS = (
    ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, StrictDataclassError,
)  # fmt: skip
"""What values that do not fit together raise, in model code and in transformers; anything else is a bug."""

RESAMPLE: dict[int, Literal["lanczos", "bilinear", "bicubic"]] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers, as ``preprocessor_config.json`` has them."""


@dataclass(frozen=True, slots=True)
class Composed:
    """A model and the encoder that writes for it."""

    model: TinyModalForConditionalGeneration
    encoder: Encoder
    codec: Codec | None = None
    """What makes the frames of its speech head a sound; on the CPU, and frozen. None: it does not speak."""

    @property
    def processor(self) -> TinyModalProcessor:
        return self.encoder.processor

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.encoder.tokenizer


class PartSize(NamedTuple):
    """One row of :func:`parameter_report`."""

    part: str
    """``vision``, ``audio``, ``connectors``, ``language``, ``embeddings``, ``head`` or ``speech``."""
    parameters: int
    bytes: int


def build(spec: ModelSpec, seed: int = 0) -> Composed:
    """Compose a model on the CPU, in float32.

    Args:
        spec: what it is made of, or the folder of a composed model.
        seed: of everything that is random: new parts, and the connector. No other random state moves.

    Raises:
        CheckpointError: a folder does not exist, is incomplete, or holds something else than its key says.
        RecipeError: a config or an option is not one the family has; parts do not fit together.
    """
    if spec.path is not None:
        whole = load(spec.path, key="model.path")
        return whole if spec.audio is None and spec.speech is None else grow(whole, spec, seed)
    assert spec.language is not None
    if spec.language.tokenizer is not None:
        tokenizer = read_tokenizer(spec.language.tokenizer, "model.language.tokenizer")
    else:
        assert spec.language.path is not None
        tokenizer = read_tokenizer(spec.language.path, "model.language.path")
    return compose(spec, tokenizer, seed)


def compose(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Composed:
    """As :func:`build`, with the tokenizer in hand instead of in a folder. The tokenizer gets new tokens."""
    assert spec.language is not None
    added = add_tokens(tokenizer, spec.language.template, hears=spec.audio is not None)
    text_config = _language_config(spec.language, tokenizer)
    tower_folder, preparation = None, None
    sight: dict[str, Any] = {}
    if spec.vision is not None:
        vision = spec.vision
        tower_folder, vision_config = _vision(vision)
        for option in OPTIONS:
            if (value := getattr(vision, option)) is not None:
                setattr(vision_config, option, value)
        chosen = {
            "name": vision.connector,
            "options": vision.options,
            "marks": vision.marks,
            "merge": vision.merge,
        }
        sight = {
            "vision_config": vision_config,
            "connectors": {"image": chosen},
            "feature_layer": vision.feature_layer,
            "keep_class": vision.keep_class,
        }
        with one_line("model.vision", RecipeError, CONTRADICTIONS):
            preparation = _preparation(vision, vision_config, tower_folder)
    ears = _ears(spec)
    codec = None if spec.speech is None else read_codec(spec.speech)
    # A template of your own travels as the tokenizer's Jinja: its file does not travel.
    name = known_as(spec.language.template)
    template = name if name in TEMPLATES else TokenizerTemplate.name

    with one_line("model", RecipeError, CONTRADICTIONS):
        config = TinyModalConfig(
            text_config=text_config,
            image_token_id=_id_of(tokenizer, IMAGE_TOKEN),
            chat_template=template,
            **_perceiving(sight, spec, ears, codec, tokenizer),
        )
    # All that can be refused is refused before a weight is read.
    hearing = None if ears is None else ears.hearing
    _check(config, tokenizer, preparation, hearing)
    language = None
    if spec.language.path is not None:
        new_ids = [_id_of(tokenizer, word) for word in added]
        language = read_language(spec.language.path, "model.language.path", len(tokenizer), new_ids)
        config.text_config = language.config
    with one_line("model", RecipeError, CONTRADICTIONS), torch.random.fork_rng(devices=[]):
        # No cuda: everything is made on the CPU, and asking for its state would start it.
        torch.manual_seed(seed)
        model = TinyModalForConditionalGeneration(config, language)
    if language is not None:
        model.generation_config = language.generation_config
    if tower_folder is not None:
        load_tower(model.model.towers["image"], tower_folder, "model.vision.path")
    if spec.vision is not None and spec.vision.connector_path is not None:
        load_connector(model, spec.vision.connector_path, "model.vision.connector_path")
    _load_new(model, spec, ears)
    return assemble(model, tokenizer, preparation, spec.language.template, hearing, codec)


def grow(whole: Composed, spec: ModelSpec, seed: int = 0) -> Composed:
    """A composed model with the ears or the mouth of ``spec``, in place of its own if it has them.

    All else is taken over as it is, without a copy: ``whole`` is spent. A model that did not hear gets the
    token ``<audio>``.

    Args:
        whole: what :func:`load` gave.
        spec: its ``audio`` and ``speech``.
        seed: of what is new and random.

    Raises:
        CheckpointError: as :func:`build`.
        RecipeError: as :func:`build`.
    """
    before, tokenizer = whole.model.config, whole.tokenizer
    ears = _ears(spec)
    codec = whole.codec if spec.speech is None else read_codec(spec.speech)
    eye, ear = whole.processor.image_processor, whole.processor.feature_extractor
    hears = ears is not None or ear is not None
    added = add_tokens(tokenizer, before.chat_template, hears=hears)
    kept: dict[str, Any] = {
        "vision_config": before.vision_config,
        "connectors": copy.deepcopy(before.connectors),
        "feature_layer": before.feature_layer,
        "keep_class": before.keep_class,
        "audio_config": before.audio_config,
        "audio_feature_layer": before.audio_feature_layer,
        "audio_token_id": before.audio_token_id,
        "speech": before.speech,
    }
    words = copy.deepcopy(before.text_config)
    with one_line("model", RecipeError, CONTRADICTIONS):
        config = TinyModalConfig(
            text_config=words,
            image_token_id=before.image_token_id,
            chat_template=before.chat_template,
            **_perceiving(kept, spec, ears, codec, tokenizer),
        )
    hearing = ears.hearing if ears is not None else None if ear is None else ear.hearing
    _check(config, tokenizer, eye.preparation, hearing)
    language = _language_of(whole.model)
    with one_line("model", RecipeError, CONTRADICTIONS), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widen(language, len(tokenizer), [_id_of(tokenizer, word) for word in added])
        config.text_config = language.config
        model = TinyModalForConditionalGeneration(config, language)
    model.generation_config = whole.model.generation_config
    _take_over(model, whole.model, spec)
    _load_new(model, spec, ears)
    return assemble(model, tokenizer, eye.preparation, before.chat_template, hearing, codec)


def _perceiving(
    kept: Mapping[str, Any],
    spec: ModelSpec,
    ears: Ears | None,
    codec: Codec | None,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """What ``TinyModalConfig`` takes besides its words: ``kept``, and the ears and the mouth of ``spec``."""
    found = dict(kept)
    if ears is not None:
        assert spec.audio is not None
        found["audio_config"] = ears.config
        found["connectors"] = {**found.get("connectors", {}), "audio": ears.connector}
        found["audio_feature_layer"] = spec.audio.feature_layer
        found["audio_token_id"] = _id_of(tokenizer, AUDIO_TOKEN)
    if spec.speech is not None:
        assert codec is not None
        found["speech"] = speech_config(spec.speech, codec)
    return found


def _load_new(model: TinyModalForConditionalGeneration, spec: ModelSpec, ears: Ears | None) -> None:
    """Weights of the ears and the mouth that ``spec`` names."""
    if ears is not None and ears.folder is not None:
        load_tower(model.model.towers["audio"], ears.folder, "model.audio.path", "audio")
    if spec.audio is not None and spec.audio.connector_path is not None:
        load_connector(model, spec.audio.connector_path, "model.audio.connector_path", "audio")
    if spec.speech is not None and spec.speech.path is not None:
        load_head(model, spec.speech.path, "model.speech.path")


def _language_of(model: TinyModalForConditionalGeneration) -> Any:
    """Decoder and head of a composed model as the causal language model that they are; no copy."""
    words = copy.deepcopy(model.config.text_config)
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    words.tie_word_embeddings = head.weight is embedding.weight
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        language: Any = causal_class(words)._from_config(words, dtype=model.dtype)
    setattr(language, language.base_model_prefix, model.model.language_model)
    language.set_output_embeddings(head)
    return language


def _take_over(
    model: TinyModalForConditionalGeneration, before: TinyModalForConditionalGeneration, spec: ModelSpec
) -> None:
    """Let all parts of ``before`` that ``spec`` does not name be those of ``model``."""
    new = {"audio"} if spec.audio is not None else set()
    for kind in before.model.towers:
        if kind in new:
            continue
        for name in ("towers", "connectors", "marks"):
            theirs: nn.ModuleDict = getattr(before.model, name)
            if kind in theirs:
                getattr(model.model, name)[kind] = theirs[kind]
    if spec.speech is None:
        model.speech_head = before.speech_head


def _check(
    config: TinyModalConfig,
    tokenizer: PreTrainedTokenizerBase,
    preparation: Preparation | None,
    hearing: Hearing | None = None,
) -> None:
    """Refuse parts that do not fit together, from their configs alone.

    Raises:
        RecipeError: names the two numbers that disagree.
    """
    with one_line("model", RecipeError, CONTRADICTIONS):
        processor = TinyModalProcessor.of(config, tokenizer, preparation, hearing)
        if config.vision_config is not None:
            _check_layouts(processor.image_processor, config.connectors["image"])
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            TinyModalForConditionalGeneration(copy.deepcopy(config))
    context = _context(config)
    if context is None:
        return
    if processor.feature_extractor is not None:
        _check_sounds(processor.feature_extractor, context)
    if config.vision_config is None:
        return
    found = processor.image_processor.typical()
    if found.tokens >= context:
        raise RecipeError(
            f"model.vision: a picture takes {found.tokens:,} tokens and model.language reads at most "
            f"{context:,}; choose a connector that folds more ('pixel_shuffle', 'perceiver'), fewer tiles, "
            f"or a language model with a longer context"
        )


def _check_sounds(ear: TinyModalAudioProcessor, context: int) -> None:
    """Refuse ears of which a moment is more than the language model can read.

    Raises:
        RecipeError: names the two numbers.
    """
    least = ear.layout(1).tokens
    if least >= context:
        raise RecipeError(
            f"model.audio: the shortest sound ({ear.hearing.step / ear.hearing.rate_hz:g} s) takes {least:,} "
            f"tokens and model.language reads at most {context:,}; take fewer tokens_per_s, or a smaller "
            f"step_s"
        )


def _check_layouts(eye: TinyModalImageProcessor, chosen: Mapping[str, Any]) -> None:
    """Refuse what a picture of another shape than the tower's would meet, and marks that it never would.

    Raises:
        ValueError: names the mark or the merge, or what the tower or the connector says.
    """
    tall, wide = eye.typical().plan.tiles_px[0]
    sizes = ((tall, wide), (2 * tall, 3 * wide), (3 * tall, 2 * wide))
    found = [eye.layout(size) for size in sizes]
    assert eye.preparation is not None
    placed = f"resize {eye.preparation.resize!r} and connector {chosen['name']!r}"
    used = {place for layout in found for place in layout.order or ()}
    for mark, row in mark_rows(chosen["marks"]).items():
        if -1 - row not in used:
            raise ValueError(f"mark {mark!r} is never written with {placed}; take it out")
    if chosen["merge"] != "flat" and not any(layout.plan.rows for layout in found):
        raise ValueError(
            f"merge {chosen['merge']!r} puts tiles together, and {placed} make none; take it out"
        )


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    key: str = "",
    bits: Bits | None = None,
) -> Composed:
    """Read a composed model.

    Args:
        path: its folder, a run's folder (its ``model`` is read), a Hub name, or ``starter``.
        device: where the weights go.
        dtype: data type of the weights, whatever they were saved in.
        key: the recipe key that named it, for the error.
        bits: 8 or 4: store the language model in so many, to answer with; see ``compose/narrow.py``. None: as
            ``dtype`` says.

    Raises:
        CheckpointError: there is no such folder, it holds another kind of model, or not all of its weights.
        RecipeError: other ``bits``, or 4 without bitsandbytes.
    """
    folder = model_folder(str(path), key)
    where = f"{key}: {folder}" if key else str(folder)
    found = read_json(folder / "config.json", where).get("model_type")
    if found != TinyModalConfig.model_type:
        raise CheckpointError(
            f"{where}: holds a model of type {found!r}, not a composed one; "
            + (
                "name a language model with model.language.path and a tower with model.vision.path"
                if key
                else f"compose it in a recipe, or bring another system's along: tinymodal adopt {path} OUT"
            )
        )
    with one_line(where, CheckpointError):
        loaded: Any = TinyModalForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
        model, info = loaded
        refuse_missing(info, where)
        processor = TinyModalProcessor.from_pretrained(folder)
    encoder = Encoder(processor, model.config.chat_template, max_prompt_tokens=_context(model.config))
    if bits is not None:
        narrow(model, bits, device)  # before it goes there: a GPU never holds what is not rounded yet
    return Composed(model.to(device).eval(), encoder, open_own(folder, model.config))


def save(composed: Composed, folder: Path | str) -> None:
    """Write weights, config, processor and the code that reads them.

    The folder appears whole or not at all: it is written beside its place and then renamed.

    Raises:
        CheckpointError: the model was read with ``bits``; what it was made from cannot be written any more.
    """
    if is_narrow(composed.model):
        raise CheckpointError(
            f"{folder}: this model was read with 'bits', which rounded its weights; read it without, "
            f"and write that"
        )
    with _whole(Path(folder)) as partial:
        composed.model.save_pretrained(partial)
        composed.processor.save_pretrained(partial)
        if composed.codec is not None:
            composed.codec.save(partial / CODEC)


def save_part(
    model: TinyModalForConditionalGeneration,
    part: Literal["vision", "audio", "language", "speech"],
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write one part so that ``model.vision.path``, ``model.language.path`` and so on can name it.

    A language model is written as transformers writes it, a speech head without its codec. So are the weights
    of a tower that transformers knows; blocks behind the feature layer and the last norm are not ours to
    write, while ``config.json`` still counts all blocks: the same ``feature_layer`` means the same block
    again, and a later one is refused.

    Args:
        model: the composed model.
        part: which.
        folder: appears whole or not at all.
        tokenizer: written beside a language model, which needs it.

    Raises:
        RecipeError: the model does not have it.
        ValueError: ``language`` without ``tokenizer``.
    """
    if part in ("vision", "audio"):
        kind = KINDS[part]
        if kind not in model.model.towers:
            raise RecipeError(f"parts.{part}: this model has no {part} tower to save; take the key out")
        config: Any = getattr(model.config, f"{part}_config")
        document = {**config.to_diff_dict(), "model_type": config.model_type}
        weights = model.model.towers[kind].module.state_dict()
        # Which layers count how much goes with the connector.
        weights.pop("layer_weights", None)
        _write_part(Path(folder), weights, document)
        return
    if part == "speech":
        if model.speech_head is None:
            raise RecipeError("parts.speech: this model has no speech head to save; take the key out")
        _write_part(
            Path(folder), model.speech_head.state_dict(), {**(model.config.speech or {}), "model_type": HEAD}
        )
        return
    if tokenizer is None:
        raise ValueError("a language model is saved with its tokenizer")
    words = model.config.text_config
    # Its first numbers are random, and replaced: nobody else's random state may move for them.
    with torch.random.fork_rng(devices=[]):
        language = causal_class(words)._from_config(copy.deepcopy(words), dtype=model.dtype)
    load_exactly(language.base_model, model.model.language_model.state_dict())
    load_exactly(language.get_output_embeddings(), model.lm_head.state_dict())
    with _whole(Path(folder)) as partial:
        language.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _write_part(folder: Path, weights: Mapping[str, torch.Tensor], document: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    with _whole(folder) as partial:
        tensors = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        _write_json(partial / "config.json", document)


def parameter_report(model: TinyModalForConditionalGeneration) -> list[PartSize]:
    """Parameters by part. Embeddings stand apart from the language model; a tied head counts once."""
    embedding: Any = model.get_input_embeddings().weight
    core = model.model
    groups: dict[str, list[nn.Parameter]] = {
        "vision": [p for kind, tower in core.towers.items() if kind == "image" for p in tower.parameters()],
        "audio": [p for kind, tower in core.towers.items() if kind == "audio" for p in tower.parameters()],
        "connectors": [*core.connectors.parameters(), *core.marks.parameters()],
        "language": [p for p in core.language_model.parameters() if p is not embedding],
        "embeddings": [embedding],
        "head": [p for p in model.lm_head.parameters() if p is not embedding],
        "speech": [] if model.speech_head is None else list(model.speech_head.parameters()),
    }
    return [
        PartSize(part, sum(p.numel() for p in members), sum(p.numel() * p.element_size() for p in members))
        for part, members in groups.items()
        if members
    ]


def add_tokens(tokenizer: PreTrainedTokenizerBase, template: str, hears: bool = False) -> list[str]:
    """Make placeholders and the template's control words single special tokens, and choose a pad token.

    Args:
        tokenizer: changed in place.
        template: name or file of the chat template.
        hears: whether sounds have a placeholder, too.

    Returns:
        The words that are new.

    Raises:
        RecipeError: the template is unknown or does not suit the tokenizer; names the key.
    """
    with one_line("model.language.template", RecipeError):
        bound = template_for(template, tokenizer)
    from transformers import AddedToken

    heard = [AUDIO_TOKEN] if hears else []
    words = [IMAGE_TOKEN, *heard, *(bound.control if isinstance(bound, ChatTemplate) else ())]
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        words.append("<pad>")
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    new = [word for word in dict.fromkeys(words) if word not in special]
    before = set(tokenizer.get_vocab())
    tokenizer.add_tokens([AddedToken(w, special=True, normalized=False) for w in new], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or "<pad>"
    if isinstance(bound, ChatTemplate):
        tokenizer.chat_template = bound.to_jinja(IMAGE_TOKEN, AUDIO_TOKEN if hears else None)
    return [word for word in new if word not in before]


def _language_config(spec: LanguageSpec, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The language model's config, from its folder or from the recipe; no weight is read."""
    if spec.path is not None:
        folder = fetch(spec.path, "model.language.path")
        where = f"model.language.path: {folder}"
        with one_line(where, CheckpointError, CONTRADICTIONS):
            config = language_config(read_json(folder / "config.json", where))
            causal_class(config)
        return config
    assert spec.config is not None
    with one_line("model.language.config", RecipeError, CONTRADICTIONS):
        # No pad_token_id: transformers would never train that row, and pad may be the end of text.
        words = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = language_config({"vocab_size": len(tokenizer), **words, **spec.config})
        causal_class(config)
    _refuse_unknown(spec.config, config, "model.language.config")
    if config.vocab_size < len(tokenizer):
        raise RecipeError(
            f"model.language.config.vocab_size is {config.vocab_size}, but the tokenizer has "
            f"{len(tokenizer)} tokens with {IMAGE_TOKEN}; leave the key out"
        )
    return config


def _vision(spec: VisionSpec) -> tuple[Path | tuple[Path, ...] | None, PreTrainedConfig]:
    """The tower's folder (None for a new one, two for two) and its config."""
    if spec.path is None:
        assert spec.config is not None
        with one_line("model.vision.config", RecipeError, CONTRADICTIONS):
            config = tower_config(spec.config)
        _refuse_unknown(spec.config, config, "model.vision.config")
        for i, values in enumerate(spec.config["towers"] if isinstance(config, PairConfig) else ()):
            _refuse_unknown(values, tower_config(values), f"model.vision.config.towers[{i}]")
        return None, config
    if isinstance(spec.path, tuple):
        return read_pair_config(spec.path, "model.vision.path", spec.normalise)
    return read_tower_config(spec.path, "model.vision.path")


def _ears(spec: ModelSpec) -> Ears | None:
    """What the model needs to hear; None: it does not, or as it did."""
    if spec.audio is None:
        return None
    ears = read_ears(spec.audio)
    if spec.audio.config is not None:
        _refuse_unknown(spec.audio.config, ears.config, "model.audio.config")
    return ears


def _preparation(
    spec: VisionSpec, config: PreTrainedConfig, folder: Path | tuple[Path, ...] | None
) -> Preparation:
    """The family's way, then what the checkpoint says of itself, then what the recipe says."""
    how = encoder_of(config).preparation_of(config)
    if isinstance(folder, tuple):  # two towers: pictures come as the first one wants them
        folder = folder[0]
    else:
        mean, std = normalisation(folder, config)
        how = replace(how, mean=mean, std=std)
    file = folder / "preprocessor_config.json" if folder else None
    if folder is not None and (own := prepared_as(folder, "vision")) is not None:
        how = replace(how, resample=own["resample"])
    elif file is not None and file.is_file():
        number = read_json(file, f"model.vision.path: {folder}").get("resample")
        if number in RESAMPLE:
            how = replace(how, resample=RESAMPLE[number])
    if spec.size_px is not None:
        how = replace(how, height_px=spec.size_px, width_px=spec.size_px)
    # What a recipe leaves out is the strategy's own default.
    keys = ("max_pixels", "pinpoints", "max_tiles", "longest_px", "thumbnail", "fit_pixels", "resizer")
    given = {key: getattr(spec, key) for key in keys}
    given = {key: value for key, value in given.items() if value is not None}
    if spec.resize in ("native", "slices"):  # sides that the tower and then the connector divide evenly
        tower, connector = encoder_of(config), find_connector(spec.connector)
        given["step_px"] = tower.patch_px(config) * connector.multiple(**connector.settle(spec.options))
    return replace(how, resize=spec.resize, **given)


def assemble(
    model: TinyModalForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    preparation: Preparation | None,
    template: str,
    hearing: Hearing | None = None,
    codec: Codec | None = None,
) -> Composed:
    """A model that has its weights, with the processor and the encoder that write for it.

    Args:
        model: put into evaluation mode; its generation config gets the template's stops and the tokenizer's
            ids.
        tokenizer: knows the placeholder and the template's control words, see :func:`add_tokens`.
        preparation: how pictures are prepared; None for a model without a tower.
        template: name or file of the chat template.
        hearing: how sounds are prepared; None for a model that does not hear.
        codec: of a model that speaks.

    Raises:
        RecipeError: the preparation does not fit the tower or the connector.
    """
    with one_line("model", RecipeError, CONTRADICTIONS):
        processor = TinyModalProcessor.of(model.config, tokenizer, preparation, hearing)
    encoder = Encoder(processor, template, max_prompt_tokens=_context(model.config))
    # ``generate`` of transformers ends where our own engine does.
    model.generation_config.eos_token_id = list(encoder.stop_ids)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return Composed(model.eval(), encoder, codec)


def _id_of(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    found = tokenizer.convert_tokens_to_ids(word)
    assert isinstance(found, int)
    return found


def _context(config: TinyModalConfig) -> int | None:
    """Longest text the language model has positions for; None where its config does not say."""
    return getattr(config.text_config, "max_position_embeddings", None)


def _refuse_unknown(given: Mapping[str, Any], config: PreTrainedConfig, where: str) -> None:
    """Raise RecipeError for a key the family's config does not have: transformers would ignore it."""
    default = type(config)()
    unknown = [key for key in given if key != "model_type" and not hasattr(default, key)]
    if unknown:
        known = [key for key in default.to_dict() if not key.startswith("_")]
        raise RecipeError(
            f"{where}: unknown key '{unknown[0]}' in the config of "
            f"{config.model_type!r}{nearest(unknown[0], known)}"
        )


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``folder`` when everything was written."""
    partial = folder.with_name(f".{folder.name}.partial")
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
