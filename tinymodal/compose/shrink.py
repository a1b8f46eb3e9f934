"""The parts of a recipe at toy size: the same architectures, each under a million parameters and random.

A recipe for large parts can then be tried on a laptop, offline: it composes the same tower, connector and
language model with the same marks, merge, resize and template, only small (``--tiny``). A tile keeps its
shape in patches relative to the tower's own size, which is 6 x 6 here; layers are renumbered in proportion.

What a part is, its own ``config.json`` says where its folder is on this machine. Of the Hub names that the
published recipes use, ``published.py`` knows as much as is needed, so that nothing is downloaded.
``train/shrink.py`` does the same to stages and data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tinymodal.chat.template import ALIASES, TEMPLATES, ChatTemplate, TokenizerTemplate, known_as
from tinymodal.compose.build import CONTRADICTIONS, _preparation, _refuse_unknown, _vision
from tinymodal.compose.known import config_file, is_known, kept, known, scaled
from tinymodal.compose.pretrained import locate, one_line, read_json
from tinymodal.compose.published import LANGUAGES, TOWERS
from tinymodal.compose.shrink_sound import own_parts, toy_ears, toy_mouth
from tinymodal.compose.spec import AudioSpec, LanguageSpec, ModelSpec, SpeechSpec, VisionSpec
from tinymodal.compose.tiny import tiny_language, tiny_tokenizer, tiny_vision
from tinymodal.core.errors import CheckpointError, RecipeError
from tinymodal.core.lookup import find, nearest
from tinymodal.model.configuration_tinymodal import TinyModalConfig, language_config
from tinymodal.model.connectors import find_connector
from tinymodal.model.encoders import encoder_of, tower_config
from tinymodal.model.hf_tower import AnyTower
from tinymodal.model.language import OWN_LANGUAGES, causal_class
from tinymodal.model.media import OPTIONS, hidden_states
from tinymodal.model.processing_tinymodal import TinyModalImageProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tinymodal.model.joint import Option

Made = Callable[[str], LanguageSpec | VisionSpec | AudioSpec | SpeechSpec | ModelSpec | None]
"""Folder that is not there yet -> the part that another recipe will put into it; None: nobody will."""

PATCH_PX = 4
"""Patch of every toy tower."""
PATCHES = 6
"""Patches on an edge of a toy tower's own picture, or a few more where the connector folds blocks of them."""
POSITIONS = 4096
"""Longest text of a toy language model."""

MULTIPLES = (0.25, 1, 2, 3, 4, 5, 6, 8, 12)
"""Edges of the pictures that are counted, in tiles."""
ANY_WIDTH = 161_280
"""Of a part whose width is not known: every usual number of heads, or width of one, divides it."""
ADOPTED = ("runs/minigpt4",)
"""Folders that the published recipes get from ``tinymodal adopt``."""

TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")

SMALL_OPTIONS: Mapping[str, Mapping[str, Option]] = {
    "perceiver": {"num_queries": 16, "num_heads": 4, "head_width": 8, "width": 32},
    "sincos": {"num_queries": 16, "head_width": 8},
    "qformer": {"num_queries": 16, "num_heads": 4, "width": 32, "depth": 4, "middle": 48},
    "window_qformer": {"num_heads": 4, "width": 32, "middle": 48},
}
"""Largest values of a toy connector's options; one that is 0, which is off, stays so. 16 queries fill a
square."""


@dataclass(frozen=True, slots=True)
class Toy:
    """A model's stand-in."""

    spec: ModelSpec
    """Every part new and small; the tokenizer lies in the folder that was given."""
    edge_px: int
    """Of a tile, for pictures of a size that suits it; 0: the model does not see."""
    blocks: Mapping[str, tuple[int, int]]
    """Part -> blocks that run of the real one, and of its stand-in."""
    positions: int | None
    """Longest text of the real language model; None: its config does not say."""
    tokens: tuple[int, int]
    """Of the real model: fewest and most tokens of a picture; zeros: the model does not see."""
    lines: tuple[str, ...]
    """What stands for what."""


def shrink(
    spec: ModelSpec,
    folder: Path,
    templates: Iterable[str] = (),
    made: Made = lambda name: None,
) -> Toy:
    """The same model at toy size.

    Args:
        spec: what the recipe says.
        folder: where the toy tokenizer is written, in ``tokenizer``, and a toy codec, in ``codec``.
        templates: those of the stages; the tokenizer gets their control words.
        made: what other recipes will make.

    Raises:
        RecipeError: nobody here knows what a name stands for, or the parts cannot be composed.
        CheckpointError: a folder holds something else than its key says.
    """
    if spec.path is not None:
        new = {part: own for part in ("audio", "speech") if (own := getattr(spec, part)) is not None}
        spec = _whole(spec.path, made).model_copy(update=new)
    else:
        _check_configs(spec)
    assert spec.language is not None
    told = _words(spec.language, made)
    language, stops = _toy_language(spec.language, told, folder, templates)
    blocks = {"language": (_layers(told), _layers(language.config or {}))}
    positions = told.get("max_position_embeddings") or told.get("max_context_length")
    lines = [_line("language", spec.language, told["model_type"], *blocks["language"])]
    if stops:
        words = " and ".join(f"'{stop}'" for stop in stops)
        lines.append(f"tokenizer: a new one, given {words} for the template; the real one must have it")
    toy = ModelSpec(language=language)
    if spec.audio is not None:
        with one_line("model.audio", RecipeError, CONTRADICTIONS):
            width = _language_width(spec.language, told) or ANY_WIDTH
            ears = toy_ears(spec.audio, width, _small, made)
        blocks["audio"] = ears.blocks
        lines += ears.lines
        toy = toy.model_copy(update={"audio": ears.spec})
    if spec.speech is not None:
        toy = toy.model_copy(update={"speech": toy_mouth(spec.speech, folder)})
        lines.append(f"speech: {spec.speech.codec}, here a random codec of our own kind")
    if spec.vision is None:
        return Toy(toy, 0, blocks, positions, (0, 0), tuple(lines))
    real = _tower(spec.vision, made)
    _check_sight(spec.vision, spec.language, real, told, made)
    with one_line("model.vision", RecipeError, CONTRADICTIONS):
        vision, edge_px = _toy_vision(spec.vision, real)
        one, other = _single(real), _single(tower_config(vision.config or {}))
        blocks["vision"] = _run(one, spec.vision.feature_layer), _run(other, vision.feature_layer)
        depths = [
            find_connector(v.connector).settle(v.options).get("depth", 1) for v in (spec.vision, vision)
        ]
        blocks["connectors"] = int(depths[0]), int(depths[1])
        counts = _tokens(spec.vision, real), picture_tokens(vision)
        least, most = _extremes(spec.vision, real)
    lines.insert(0, _line("vision", spec.vision, real.model_type, _depth(one), _depth(other)))
    others = f"; of any size: {least:,} to {most:,} tokens" if least < most else ""
    lines.append(f"a picture of the tower's size: {counts[0]:,} tokens, here {counts[1]:,}{others}")
    toy = toy.model_copy(update={"vision": vision})
    return Toy(toy, edge_px, blocks, positions, (least, most), tuple(lines))


def picture_tokens(spec: VisionSpec) -> int:
    """Tokens of a picture that has the tower's own size, in the model at its real size. Reads no weights.

    Raises:
        RecipeError: nobody here knows the tower, or the connector cannot fold its grid.
    """
    with one_line("model.vision", RecipeError, CONTRADICTIONS):
        return _tokens(spec, _tower(spec, lambda name: None))


def image_processor(spec: VisionSpec) -> TinyModalImageProcessor:
    """The image processor of a new tower, whose config stands in the recipe; or, to count, of a known one."""
    with one_line("model.vision", RecipeError, CONTRADICTIONS):
        return _processor(spec, _tower(spec, lambda name: None))


def template_of(name: str) -> ChatTemplate | None:
    """The template of that name, not bound to a tokenizer; None: the tokenizer's own."""
    if name == TokenizerTemplate.name:
        return None
    found = find(known_as(name), {**TEMPLATES, **ALIASES}, "template")
    return found if isinstance(found, ChatTemplate) else None


# What the real parts refuse, and small ones would not


def _check_configs(spec: ModelSpec) -> None:
    """Refuse keys of new parts that their families do not have, as composing them does."""
    assert spec.language is not None
    if spec.language.config is not None:
        where = "model.language.config"
        _kind(spec.language.config, where)
        with one_line(where, RecipeError, CONTRADICTIONS):
            config = language_config(spec.language.config)
            causal_class(config)
        _refuse_unknown(spec.language.config, config, where)
    if spec.vision is not None and spec.vision.config is not None:
        _vision(spec.vision)


def _check_sight(
    spec: VisionSpec, language: LanguageSpec, real: Any, told: Mapping[str, Any], made: Made
) -> None:
    """Refuse a layer that the real tower does not have, and a connector that the real widths do not suit."""
    if spec.connector_path is not None:
        _check_connector_path(spec.connector_path, made)
    with one_line("model.vision", RecipeError, CONTRADICTIONS), torch.random.fork_rng(devices=[]):
        connector = find_connector(spec.connector)
        options = connector.settle(spec.options)
        with torch.device("meta"):
            widths = _tower_widths(spec, real)
            out_width = _language_width(language, told)
            if connector.name == "identity" and None in (widths, out_width):
                return
            # One that is not known is such that it fits.
            num_towers = len(real.parts()) if real.model_type == "tinymodal_pair" else 1
            widths = widths or (ANY_WIDTH,) * num_towers
            out_width = out_width or ANY_WIDTH
            connector.build(widths, out_width, **options)


def _check_connector_path(path: str, made: Made) -> None:
    folder = Path(locate(path)).expanduser()
    found = any((place / "config.json").is_file() for place in (folder, folder / "model"))
    if not found and path not in ADOPTED and not isinstance(made(path), ModelSpec):
        raise RecipeError(
            f"model.vision.connector_path: {folder}: there is no composed model here, and no recipe beside "
            f"this one makes it; name the folder of a run, or take the key out to begin with a new connector"
        )


def _tower_widths(spec: VisionSpec, real: Any) -> tuple[int, ...] | None:
    """Widths of the features that the real tower gives; None: not known.

    Raises:
        ValueError: it has no such layer.
    """
    parts = real.parts() if real.model_type == "tinymodal_pair" else (real,)
    names = [spec.path] if isinstance(spec.path, str) else list(spec.path or ())
    is_timm = any(part.model_type == "tinymodal_timm" for part in parts)
    if all(config_file(name).is_file() for name in names) and not is_timm:
        # All of its config is known: a tower without numbers says the rest.
        config = copy.deepcopy(real)
        return encoder_of(real).build(config, spec.feature_layer, keep_class=spec.keep_class).widths
    widths: list[int] = []
    for part in parts:
        layers = hidden_states(_depth(part), spec.feature_layer)
        if part.model_type == "tinymodal_timm":
            if 0 in layers:
                raise ValueError(
                    f"feature_layer {spec.feature_layer} asks for the embedding, which timm's models do not "
                    f"give; take 1 or more, or count from the end"
                )
            widths.append(part.hidden_size * len(layers))
    return tuple(widths) if len(widths) == len(parts) else None


def _language_width(spec: LanguageSpec, told: Mapping[str, Any]) -> int | None:
    """Width of the real language model's embeddings; None: not known."""
    if spec.path is not None and not config_file(spec.path).is_file():
        return None
    config = language_config(dict(told))
    names = ("word_embed_proj_dim", "hidden_size", "model_dim")
    return next((int(width) for name in names if (width := getattr(config, name, None))), None)


def _kind(told: Mapping[str, Any], where: str) -> str:
    """A language model's ``model_type``.

    Raises:
        RecipeError: it has none, or one that nobody knows.
    """
    kind = told.get("model_type")
    if not kind:
        raise RecipeError(
            f"{where}: there is no model_type, which says what kind of language model it is; add it, e.g. "
            f"model_type = 'llama'"
        )
    if kind not in OWN_LANGUAGES and kind not in CONFIG_MAPPING:
        known = [*OWN_LANGUAGES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
        raise RecipeError(f"{where}: no language model has model_type '{kind}'{nearest(str(kind), known)}")
    return str(kind)


# Towers


def _toy_vision(spec: VisionSpec, real: PreTrainedConfig) -> tuple[VisionSpec, int]:
    """The toy, and the edge of its tiles."""
    own_px = encoder_of(real).preparation_of(real).height_px
    tile_px = spec.size_px or own_px
    options = _options(spec)
    multiple = find_connector(spec.connector).multiple(**options)
    step_px = multiple * PATCH_PX
    toy_own_px = ceil(PATCHES / multiple) * step_px
    toy_px = max(step_px, round(toy_own_px * tile_px / own_px / step_px) * step_px)
    toy = _toy_tower(real, toy_own_px)
    # Towers that work in stages have a stride of their own.
    if (
        encoder_of(config := tower_config(toy)) is AnyTower
        and (stride_px := AnyTower.patch_px(config)) != PATCH_PX
    ):
        step_px = multiple * stride_px
        toy_own_px = ceil(max(multiple, int(options.get("side") or 1)) / multiple) * step_px
        toy = _toy_tower(real, toy_own_px)
        toy_px = max(toy_own_px, round(toy_own_px * tile_px / own_px / step_px) * step_px)
    changes: dict[str, Any] = {
        "path": None,
        "config": toy,
        "normalise": "own",  # what the recipe says of it stands in the config
        "options": options,
        "connector_path": None,
        "feature_layer": _layer(spec.feature_layer, _depth(_single(real)), _single(tower_config(toy))),
        "size_px": toy_px if spec.size_px is not None or toy_px != toy_own_px else None,
    }
    if spec.pinpoints is not None:
        sizes = [(h // tile_px * toy_px, w // tile_px * toy_px) for h, w in spec.pinpoints]
        changes["pinpoints"] = tuple(sizes)
    if spec.longest_px is not None:
        changes["longest_px"] = max(1, round(spec.longest_px / tile_px)) * toy_px
    if spec.fit_pixels is not None:
        area = [max(step_px**2, round(pixels * (toy_px / tile_px) ** 2)) for pixels in spec.fit_pixels]
        changes["fit_pixels"] = tuple(area)
    return spec.model_copy(update=changes), toy_px


def _tower(spec: VisionSpec, made: Made) -> PreTrainedConfig:
    """Config of the real tower, as far as it is known."""
    if isinstance(spec.path, str) and not is_known(spec.path, TOWERS):
        found = made(spec.path)
        if isinstance(found, VisionSpec):
            return _tower(found, made)
    with one_line("model.vision", RecipeError, CONTRADICTIONS):
        if spec.path is None:
            config = tower_config(spec.config or {})
        elif isinstance(spec.path, str):
            config = tower_config(known(spec.path, TOWERS, "model.vision.path"))
        else:
            towers = [dict(known(name, TOWERS, "model.vision.path")) for name in spec.path]
            pair = {"model_type": "tinymodal_pair", "towers": towers, "normalise": spec.normalise}
            config = tower_config(pair)
    for option in OPTIONS:
        if getattr(spec, option):
            setattr(config, option, True)
    return config


def _toy_tower(config: Any, edge_px: int) -> dict[str, Any]:
    """Values of a small tower's config, of the same kind."""
    kind = config.model_type
    if kind == "tinymodal_pair":
        towers = [_toy_tower(part, edge_px) for part in config.parts()]
        return {"model_type": kind, "towers": towers, "normalise": config.normalise}
    if kind == "tinymodal_timm":
        sizes = {"embed_dim": 32, "depth": 3, "num_heads": 4, "img_size": edge_px, "patch_size": PATCH_PX}
        toy = {"model_type": kind, "architecture": config.architecture.split(".")[0], "model_args": sizes}
    else:
        toy = tiny_vision(kind, edge_px)
    return toy | kept(config)


def _single(config: Any) -> Any:
    """The first tower of two; any other as it is."""
    return config.parts()[0] if config.model_type == "tinymodal_pair" else config


def _depth(config: Any) -> int:
    return int(getattr(config, "num_hidden_layers", None) or 3)


def _run(config: Any, feature_layer: int | Sequence[int]) -> int:
    """Blocks that run: those behind the deepest layer that is read do not."""
    layers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    return max(layer % (_depth(config) + 1) for layer in layers)


def _layer(layer: int | tuple[int, ...], real: int, toy: Any) -> int | tuple[int, ...]:
    """The same hidden state of a tower with fewer blocks; counted from the end, it stays as near to it."""
    if not isinstance(layer, int):
        return tuple(int(_layer(one, real, toy)) for one in layer)  # type: ignore[arg-type]
    least = 1 if toy.model_type == "tinymodal_timm" else 0  # timm gives no embedding
    if layer < 0:
        return max(layer, -_depth(toy) - 1 + least)
    return max(least, scaled(layer, real, _depth(toy)))


# Connectors


def _options(spec: VisionSpec) -> dict[str, Any]:
    return _small(spec.connector, dict(find_connector(spec.connector).settle(spec.options)))


def _small(called: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a toy connector, of a real one's."""
    connector = find_connector(called)
    for name, most in SMALL_OPTIONS.get(connector.name, {}).items():
        value = options[name]
        if isinstance(value, int) and isinstance(most, int) and value > most:
            options[name] = most
    if options.get("side"):
        options["side"] = min(int(options["side"]), PATCHES // 2)
    return options


def _processor(spec: VisionSpec, config: PreTrainedConfig) -> TinyModalImageProcessor:
    how = _preparation(spec, config, None)
    return TinyModalImageProcessor(
        how, config, spec.connector, spec.options, spec.marks, spec.merge, spec.keep_class
    )


def _tokens(spec: VisionSpec, config: PreTrainedConfig) -> int:
    return _processor(spec, config).typical().tokens


def _extremes(spec: VisionSpec, config: PreTrainedConfig) -> tuple[int, int]:
    """Fewest and most tokens of a picture, over many shapes."""
    eye = _processor(spec, config)
    found = [eye.typical().tokens]
    assert eye.preparation is not None
    if spec.resize in ("anyres", "slices", "tiles", "native"):
        tall, wide = eye.preparation.size_px
        for rows in MULTIPLES:
            for columns in MULTIPLES:
                with suppress(ValueError):  # a shape that the connector cannot fold is a row's own fault
                    found.append(eye.layout((ceil(rows * tall), ceil(columns * wide))).tokens)
    return min(found), max(found)


# Language models


def _words(spec: LanguageSpec, made: Made) -> dict[str, Any]:
    """Config of the real language model, as far as it is known."""
    if spec.path is None:
        told = dict(spec.config or {})
    elif not is_known(spec.path, LANGUAGES) and isinstance(found := made(spec.path), LanguageSpec):
        return _words(found, made)
    else:
        told = known(spec.path, LANGUAGES, "model.language.path")
    return dict(told.get("text_config") or told)


def _toy_language(
    spec: LanguageSpec, told: Mapping[str, Any], folder: Path, templates: Iterable[str]
) -> tuple[LanguageSpec, list[str]]:
    """A small language model of the same kind with its tokenizer, and the stops that this was given."""
    where = "model.language.config" if spec.path is None else f"model.language.path: {spec.path}"
    kind = _kind(told, where)
    with one_line("model.language", RecipeError, CONTRADICTIONS):
        toy = tiny_language(kind)
        # Its words and its special tokens are the tokenizer's.
        toy = {key: value for key, value in toy.items() if key not in ("vocab_size", *TOKEN_IDS)}
        toy |= kept(told)
        positions = next(
            (key for key in ("max_context_length", "max_position_embeddings") if key in toy), None
        )
        if positions:
            toy[positions] = POSITIONS
    tokenizer, stops = _write_tokenizer(spec, folder, templates)
    return spec.model_copy(update={"path": None, "config": toy, "tokenizer": tokenizer}), stops


def _layers(config: Mapping[str, Any]) -> int:
    return int(config.get("num_hidden_layers") or config.get("num_transformer_layers") or 2)


def _write_tokenizer(spec: LanguageSpec, folder: Path, templates: Iterable[str]) -> tuple[str, list[str]]:
    """A small tokenizer with the words that the templates need, and those it lacked.

    The real one where a template is its own.
    """
    names = dict.fromkeys((spec.template, *templates))
    if TokenizerTemplate.name in names:
        real = spec.tokenizer or spec.path or ""
        if not Path(locate(real)).is_dir():
            raise RecipeError(
                f"model.language: template 'tokenizer' is the tokenizer's own, and there is no folder "
                f"'{real}' here to read it from; for --tiny choose another, e.g. "
                f"model.language.template=chatml"
            )
        return real, []
    known = [template for name in names if (template := template_of(name)) is not None]
    told = [text for t in known for text in (t.system, *(t.example or ())) if text]
    tokenizer = tiny_tokenizer(told)
    required = [word for template in known for word in template.required]
    before = tokenizer.get_vocab()
    if required:
        from transformers import AddedToken

        new = [AddedToken(word, special=True, normalized=False) for word in dict.fromkeys(required)]
        tokenizer.add_tokens(new, special_tokens=True)
        tokenizer.eos_token = required[0]
        if required[0] == "<|endoftext|>":
            tokenizer.pad_token = required[0]  # as Phi-2, StableLM 2 and Qwen 2 have it
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    return str(folder / "tokenizer"), [word for word in dict.fromkeys(required) if word not in before]


# Composed models


def _whole(path: str, made: Made) -> ModelSpec:
    """The parts of a composed model, each new: as its config says, or the recipe that will make it."""
    folder = Path(locate(path)).expanduser()
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    where = f"model.path: {folder}"
    if not (folder / "config.json").is_file():
        found = made(path)
        if isinstance(found, ModelSpec):
            return found if found.path is None else _whole(found.path, made)
        raise RecipeError(
            f"{where}: there is no such folder here, and no recipe beside this one makes it; --tiny needs "
            f"its config.json"
        )
    config = read_json(folder / "config.json", where)
    if config.get("model_type") != TinyModalConfig.model_type:
        raise CheckpointError(
            f"{where}: holds a model of type {config.get('model_type')!r}, not a composed one"
        )
    words, template = config["text_config"], str(config.get("chat_template", "chatml"))
    language = LanguageSpec(config=words, tokenizer=str(folder), template=template)
    prepared = read_json(folder / "processor_config.json", where)
    rest = own_parts(config, prepared.get("feature_extractor"), folder)
    if config.get("vision_config") is None:
        return ModelSpec(language=language, **rest)
    eye, said = config["vision_config"], config["connectors"]["image"]
    how = prepared["image_processor"]["preparation"]
    own = (
        "resize",
        "resizer",
        "pinpoints",
        "max_tiles",
        "longest_px",
        "thumbnail",
        "fit_pixels",
        "max_pixels",
    )
    also: dict[str, Any] = {key: how[key] for key in own if key in how}
    also |= {key: bool(eye.get(key)) for key in OPTIONS}
    vision = VisionSpec(
        config={key: value for key, value in eye.items() if key not in OPTIONS},
        connector=said["name"],
        options=said["options"],
        marks=tuple(said.get("marks", ())),
        merge=said.get("merge", "flat"),
        feature_layer=config["feature_layer"],
        keep_class=config.get("keep_class", False),
        size_px=how["height_px"],
        **also,
    )
    return ModelSpec(language=language, vision=vision, **rest)


def _line(part: str, spec: LanguageSpec | VisionSpec, kind: str, real: int, toy: int) -> str:
    name = spec.path if isinstance(spec.path, str) else " and ".join(spec.path) if spec.path else "new"
    return f"{part}: {name}, a {kind} of {real} blocks, here of {toy}"
