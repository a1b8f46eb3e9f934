"""Parts become a model, and a model becomes a folder.

* :func:`build` composes a :class:`~tinymodal.compose.spec.ModelSpec`, :func:`load` reads a composed folder.
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
from tinymodal.compose.pretrained import fetch as fetch
from tinymodal.compose.pretrained import locate as locate
from tinymodal.compose.pretrained import one_line, read_json, read_language, read_tokenizer, refuse_missing
from tinymodal.compose.spec import LanguageSpec, ModelSpec, VisionSpec
from tinymodal.compose.towers import (
    load_connector,
    load_tower,
    normalisation,
    read_pair_config,
    read_tower_config,
)
from tinymodal.core.errors import CheckpointError, RecipeError
from tinymodal.core.lookup import nearest
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

    @property
    def processor(self) -> TinyModalProcessor:
        return self.encoder.processor

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.encoder.tokenizer


class PartSize(NamedTuple):
    """One row of :func:`parameter_report`."""

    part: str
    """``vision``, ``connectors``, ``language``, ``embeddings`` or ``head``."""
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
        return load(spec.path, key="model.path")
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
    added = add_tokens(tokenizer, spec.language.template)
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
    # A template of your own travels as the tokenizer's Jinja: its file does not travel.
    name = known_as(spec.language.template)
    template = name if name in TEMPLATES else TokenizerTemplate.name

    with one_line("model", RecipeError, CONTRADICTIONS):
        config = TinyModalConfig(
            text_config=text_config,
            image_token_id=_id_of(tokenizer, IMAGE_TOKEN),
            chat_template=template,
            **sight,
        )
    # All that can be refused is refused before a weight is read.
    _check(config, tokenizer, preparation)
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
    return assemble(model, tokenizer, preparation, spec.language.template)


def _check(
    config: TinyModalConfig, tokenizer: PreTrainedTokenizerBase, preparation: Preparation | None
) -> None:
    """Refuse parts that do not fit together, from their configs alone.

    Raises:
        RecipeError: names the two numbers that disagree.
    """
    with one_line("model", RecipeError, CONTRADICTIONS):
        processor = TinyModalProcessor.of(config, tokenizer, preparation)
        if config.vision_config is not None:
            _check_layouts(processor.image_processor, config.connectors["image"])
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            TinyModalForConditionalGeneration(copy.deepcopy(config))
    context = _context(config)
    if config.vision_config is None or context is None:
        return
    found = processor.image_processor.typical()
    if found.tokens >= context:
        raise RecipeError(
            f"model.vision: a picture takes {found.tokens:,} tokens and model.language reads at most "
            f"{context:,}; choose a connector that folds more ('pixel_shuffle', 'perceiver'), fewer tiles, "
            f"or a language model with a longer context"
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
    path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, key: str = ""
) -> Composed:
    """Read a composed model.

    Args:
        path: its folder, a run's folder (its ``model`` is read), a Hub name, or ``starter``.
        device: where the weights go.
        dtype: data type of the weights, whatever they were saved in.
        key: the recipe key that named it, for the error.

    Raises:
        CheckpointError: there is no such folder, it holds another kind of model, or not all of its weights.
    """
    folder = fetch(str(path), key)
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder = folder / "model"
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
    return Composed(model.to(device).eval(), encoder)


def save(composed: Composed, folder: Path | str) -> None:
    """Write weights, config, processor and the code that reads them.

    The folder appears whole or not at all: it is written beside its place and then renamed.
    """
    with _whole(Path(folder)) as partial:
        composed.model.save_pretrained(partial)
        composed.processor.save_pretrained(partial)


def save_part(
    model: TinyModalForConditionalGeneration,
    part: Literal["vision", "language"],
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write one part so that ``model.vision.path`` or ``model.language.path`` can name it.

    A language model is written as transformers writes it. So are the weights of a tower that transformers
    knows; blocks behind the feature layer and the last norm are not ours to write, while ``config.json``
    still counts all blocks: the same ``feature_layer`` means the same block again, and a later one is
    refused.

    Args:
        model: the composed model.
        part: which.
        folder: appears whole or not at all.
        tokenizer: written beside a language model, which needs it.

    Raises:
        RecipeError: the model has no tower.
        ValueError: ``language`` without ``tokenizer``.
    """
    if part == "vision":
        if "image" not in model.model.towers:
            raise RecipeError("parts.vision: this model has no vision tower to save; take the key out")
        tower = model.model.towers["image"]
        config = model.config.vision_config
        assert config is not None
        with _whole(Path(folder)) as partial:
            from safetensors.torch import save_file

            weights = {name: w.detach().cpu().contiguous() for name, w in tower.module.state_dict().items()}
            save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
            document = {**config.to_diff_dict(), "model_type": config.model_type}
            _write_json(partial / "config.json", document)
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


def parameter_report(model: TinyModalForConditionalGeneration) -> list[PartSize]:
    """Parameters by part. Embeddings stand apart from the language model; a tied head counts once."""
    embedding: Any = model.get_input_embeddings().weight
    core = model.model
    groups: dict[str, list[nn.Parameter]] = {
        "vision": list(core.towers.parameters()),
        "connectors": [*core.connectors.parameters(), *core.marks.parameters()],
        "language": [p for p in core.language_model.parameters() if p is not embedding],
        "embeddings": [embedding],
        "head": [p for p in model.lm_head.parameters() if p is not embedding],
    }
    return [
        PartSize(part, sum(p.numel() for p in members), sum(p.numel() * p.element_size() for p in members))
        for part, members in groups.items()
        if members
    ]


def add_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """Make the placeholder and the template's control words single special tokens, and choose a pad token.

    Returns:
        The words that are new.

    Raises:
        RecipeError: the template is unknown or does not suit the tokenizer; names the key.
    """
    with one_line("model.language.template", RecipeError):
        bound = template_for(template, tokenizer)
    from transformers import AddedToken

    words = [IMAGE_TOKEN, *(bound.control if isinstance(bound, ChatTemplate) else ())]
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        words.append("<pad>")
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    new = [word for word in dict.fromkeys(words) if word not in special]
    before = set(tokenizer.get_vocab())
    tokenizer.add_tokens([AddedToken(w, special=True, normalized=False) for w in new], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or "<pad>"
    if isinstance(bound, ChatTemplate):
        tokenizer.chat_template = bound.to_jinja(IMAGE_TOKEN)
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
    if file is not None and file.is_file():
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
) -> Composed:
    """A model that has its weights, with the processor and the encoder that write for it.

    Args:
        model: put into evaluation mode; its generation config gets the template's stops and the tokenizer's
            ids.
        tokenizer: knows the placeholder and the template's control words, see :func:`add_tokens`.
        preparation: how pictures are prepared; None for a model without a tower.
        template: name or file of the chat template.

    Raises:
        RecipeError: the preparation does not fit the tower or the connector.
    """
    with one_line("model", RecipeError, CONTRADICTIONS):
        processor = TinyModalProcessor.of(model.config, tokenizer, preparation)
    encoder = Encoder(processor, template, max_prompt_tokens=_context(model.config))
    # ``generate`` of transformers ends where our own engine does.
    model.generation_config.eos_token_id = list(encoder.stop_ids)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return Composed(model.eval(), encoder)


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
