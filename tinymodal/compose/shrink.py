"""The parts of a recipe at toy size: the same architectures, each under a million parameters and random.

A recipe for large parts can then be tried on a laptop, offline: it composes the same tower, connector and
language model with the same marks, merge, resize and template, only small (``--tiny``). A tile keeps its
shape in patches relative to the tower's own size, which is 6 x 6 here; layers are renumbered in proportion.

What a part is, its own ``config.json`` says where its folder is on this machine. Of the Hub names that the
published recipes use, ``published.py`` knows as much as is needed, so that nothing is downloaded.
``train/shrink.py`` does the same to stages and data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymodal.chat.template import ALIASES, TEMPLATES, ChatTemplate, TokenizerTemplate, known_as
from tinymodal.compose.build import CONTRADICTIONS, _preparation
from tinymodal.compose.pretrained import locate, one_line, read_json
from tinymodal.compose.published import LANGUAGES, TOWERS
from tinymodal.compose.spec import LanguageSpec, ModelSpec, VisionSpec
from tinymodal.compose.tiny import tiny_language, tiny_tokenizer, tiny_vision
from tinymodal.core.errors import CheckpointError, RecipeError
from tinymodal.core.lookup import find, nearest
from tinymodal.model.configuration_tinymodal import TinyModalConfig
from tinymodal.model.connectors import find_connector
from tinymodal.model.encoders import encoder_of, tower_config
from tinymodal.model.media import OPTIONS
from tinymodal.model.processing_tinymodal import TinyModalImageProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tinymodal.model.joint import Option

Made = Callable[[str], LanguageSpec | VisionSpec | ModelSpec | None]
"""Folder that is not there yet -> the part that another recipe will put into it; None: nobody will."""

PATCH_PX = 4
"""Patch of every toy tower."""
PATCHES = 6
"""Patches on an edge of a toy tower's own picture, or a few more where the connector folds blocks of them."""
POSITIONS = 4096
"""Longest text of a toy language model."""

KEPT = ("num_register_tokens", "hidden_act", "tie_word_embeddings", "qk_layernorm")
"""Keys of a part's config that its stand-in has as well; the others are sizes, or the family's defaults."""

TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")

SMALL_OPTIONS: Mapping[str, Mapping[str, Option]] = {
    "perceiver": {"num_queries": 16, "num_heads": 4, "head_width": 8, "width": 32},
    "sincos": {"num_queries": 16, "head_width": 8},
    "qformer": {"num_queries": 16, "num_heads": 4, "width": 32, "depth": 4, "middle": 48},
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
        folder: where the toy tokenizer is written, in ``tokenizer``.
        templates: those of the stages; the tokenizer gets their control words.
        made: what other recipes will make.

    Raises:
        RecipeError: nobody here knows what a name stands for, or the parts cannot be composed.
        CheckpointError: a folder holds something else than its key says.
    """
    if spec.path is not None:
        spec = _whole(spec.path, made)
    assert spec.language is not None
    told = _words(spec.language, made)
    language = _toy_language(spec.language, told, folder, templates)
    blocks = {"language": (_layers(told), _layers(language.config or {}))}
    positions = told.get("max_position_embeddings") or told.get("max_context_length")
    lines = [_line("language", spec.language, told["model_type"], *blocks["language"])]
    if spec.vision is None:
        return Toy(ModelSpec(language=language), 0, blocks, positions, tuple(lines))
    real = _tower(spec.vision, made)
    with one_line("model.vision", RecipeError, CONTRADICTIONS):
        vision, edge_px = _toy_vision(spec.vision, real)
        one, other = _single(real), _single(tower_config(vision.config or {}))
        blocks["vision"] = _run(one, spec.vision.feature_layer), _run(other, vision.feature_layer)
        depths = [
            find_connector(v.connector).settle(v.options).get("depth", 1) for v in (spec.vision, vision)
        ]
        blocks["connectors"] = int(depths[0]), int(depths[1])
        counts = _tokens(spec.vision, real), picture_tokens(vision)
    lines.insert(0, _line("vision", spec.vision, real.model_type, _depth(one), _depth(other)))
    lines.append(f"a picture of the tower's size: {counts[0]:,} tokens, here {counts[1]:,}")
    return Toy(ModelSpec(language=language, vision=vision), edge_px, blocks, positions, tuple(lines))


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
    changes: dict[str, Any] = {
        "path": None,
        "config": toy,
        "normalise": "own",  # what the recipe says of it stands in the config
        "options": options,
        "connector_path": None,
        "feature_layer": _layer(spec.feature_layer, _depth(_single(real)), _single(tower_config(toy))),
        "size_px": None if spec.size_px is None else toy_px,
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
    if isinstance(spec.path, str) and not _is_known(spec.path, TOWERS):
        found = made(spec.path)
        if isinstance(found, VisionSpec):
            return _tower(found, made)
    with one_line("model.vision", RecipeError, CONTRADICTIONS):
        if spec.path is None:
            config = tower_config(spec.config or {})
        elif isinstance(spec.path, str):
            config = tower_config(_known(spec.path, TOWERS, "model.vision.path"))
        else:
            towers = [dict(_known(name, TOWERS, "model.vision.path")) for name in spec.path]
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
    return toy | _kept(config)


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
    connector = find_connector(spec.connector)
    options: dict[str, Any] = dict(connector.settle(spec.options))
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


# Language models


def _words(spec: LanguageSpec, made: Made) -> dict[str, Any]:
    """Config of the real language model, as far as it is known."""
    if spec.path is None:
        told = dict(spec.config or {})
    elif not _is_known(spec.path, LANGUAGES) and isinstance(found := made(spec.path), LanguageSpec):
        return _words(found, made)
    else:
        told = _known(spec.path, LANGUAGES, "model.language.path")
    return dict(told.get("text_config") or told)


def _toy_language(
    spec: LanguageSpec, told: Mapping[str, Any], folder: Path, templates: Iterable[str]
) -> LanguageSpec:
    """A small language model of the same kind, and its tokenizer."""
    with one_line("model.language", RecipeError, CONTRADICTIONS):
        toy = tiny_language(str(told.get("model_type")))
        # Its words and its special tokens are the tokenizer's.
        toy = {key: value for key, value in toy.items() if key not in ("vocab_size", *TOKEN_IDS)}
        toy |= _kept(told)
        positions = next(
            (key for key in ("max_context_length", "max_position_embeddings") if key in toy), None
        )
        if positions:
            toy[positions] = POSITIONS
    tokenizer = _write_tokenizer(spec, folder, templates)
    return spec.model_copy(update={"path": None, "config": toy, "tokenizer": tokenizer})


def _layers(config: Mapping[str, Any]) -> int:
    return int(config.get("num_hidden_layers") or config.get("num_transformer_layers") or 2)


def _write_tokenizer(spec: LanguageSpec, folder: Path, templates: Iterable[str]) -> str:
    """A small tokenizer with the words that the templates need; the real one where a template is its own."""
    names = dict.fromkeys((spec.template, *templates))
    if TokenizerTemplate.name in names:
        real = spec.tokenizer or spec.path or ""
        if not Path(locate(real)).is_dir():
            raise RecipeError(
                f"model.language: template 'tokenizer' is the tokenizer's own, and there is no folder "
                f"'{real}' here to read it from; for --tiny choose another, e.g. "
                f"model.language.template=chatml"
            )
        return real
    known = [template for name in names if (template := template_of(name)) is not None]
    told = [text for t in known for text in (t.system, *(t.example or ())) if text]
    tokenizer = tiny_tokenizer(told)
    required = [word for template in known for word in template.required]
    if required:
        from transformers import AddedToken

        new = [AddedToken(word, special=True, normalized=False) for word in dict.fromkeys(required)]
        tokenizer.add_tokens(new, special_tokens=True)
        tokenizer.eos_token = required[0]
        if required[0] == "<|endoftext|>":
            tokenizer.pad_token = required[0]  # as Phi-2, StableLM 2 and Qwen 2 have it
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    return str(folder / "tokenizer")


# What a name stands for


def _is_known(name: str, table: Mapping[str, Mapping[str, Any]]) -> bool:
    return name in table or (Path(locate(name)).expanduser() / "config.json").is_file()


def _known(name: str, table: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
    """A part's config, from its folder or from the table."""
    folder = Path(locate(name)).expanduser()
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json", f"{key}: {folder}")
    if name in table:
        return dict(table[name])
    raise RecipeError(
        f"{key}: --tiny does not know what '{name}' is: there is no such folder with a config.json here, and "
        f"it is none of the {len(table)} Hub names it knows{nearest(name, table)}. Download the part's "
        f"config.json into a folder and name that, or name one of {', '.join(sorted(table))}"
    )


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
    if config.get("vision_config") is None:
        return ModelSpec(language=language)
    eye, said = config["vision_config"], config["connectors"]["image"]
    how = read_json(folder / "processor_config.json", where)["image_processor"]["preparation"]
    own = ("resize", "pinpoints", "max_tiles", "longest_px", "thumbnail", "fit_pixels", "max_pixels")
    kept: dict[str, Any] = {key: how[key] for key in own if key in how}
    kept |= {key: bool(eye.get(key)) for key in OPTIONS}
    vision = VisionSpec(
        config={key: value for key, value in eye.items() if key not in OPTIONS},
        connector=said["name"],
        options=said["options"],
        marks=tuple(said.get("marks", ())),
        merge=said.get("merge", "flat"),
        feature_layer=config["feature_layer"],
        keep_class=config.get("keep_class", False),
        size_px=how["height_px"],
        **kept,
    )
    return ModelSpec(language=language, vision=vision)


def _kept(config: Any) -> dict[str, Any]:
    """What a stand-in takes over from a real part's config."""
    told = config if isinstance(config, Mapping) else {key: getattr(config, key, None) for key in KEPT}
    return {key: told[key] for key in KEPT if told.get(key) is not None}


def scaled(layer: int, real: int, toy: int) -> int:
    """Block ``layer`` of ``real``, counted from 0, where there are ``toy``: in proportion."""
    if not 0 < layer < real:
        return 0 if layer <= 0 else toy
    return max(1, min(toy - 1, round(layer * toy / real)))


def _line(part: str, spec: LanguageSpec | VisionSpec, kind: str, real: int, toy: int) -> str:
    name = spec.path if isinstance(spec.path, str) else " and ".join(spec.path) if spec.path else "new"
    return f"{part}: {name}, a {kind} of {real} blocks, here of {toy}"
