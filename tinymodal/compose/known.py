"""What the name of a part stands for where only its config is read, and what a stand-in keeps of it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinymodal.compose.pretrained import locate, read_json
from tinymodal.compose.published import CODECS, EARS, LANGUAGES, TOWERS
from tinymodal.compose.whole import Perceives, read_tower
from tinymodal.core.errors import RecipeError

KEPT = (
    "num_register_tokens", "hidden_act", "tie_word_embeddings", "qk_layernorm", "do_stable_layer_norm",
    "feat_extract_norm", "position_embeddings_type", "enable_fusion", "max_source_positions",
)  # fmt: skip
"""Keys of a part's config that its stand-in has as well; the others are sizes, or the family's defaults."""

TABLES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("a tower", TOWERS),
    ("a language model", LANGUAGES),
    ("a tower that hears", EARS),
    ("a codec", CODECS),
)
"""What the parts of each table are."""

SCRIPTS: Mapping[str, Mapping[str, Any]] = {
    "runs/starter-audio/parts/audio": {"model_type": "tinymodal_ear"},
    "runs/starter-codec/codec": {"model_type": "tinymodal_codec", "books": 2},
}
"""What scripts among the recipes make, and where; what recipes make, they say themselves."""


def is_known(name: str, table: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a name says what it is: by its folder here, or by the table."""
    return name in table or name in SCRIPTS or config_file(name).is_file()


def config_file(name: str) -> Path:
    """Where the config of a part lies, if it is on this machine."""
    return Path(locate(name)).expanduser() / "config.json"


def known(name: str, table: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
    """A part's config, from its folder or from the table.

    Raises:
        RecipeError: nobody here knows it.
        CheckpointError: its folder holds something else.
    """
    file = config_file(name)
    if file.is_file():
        part: Perceives | None = "vision" if table is TOWERS else "audio" if table is EARS else None
        return read_json(file, f"{key}: {file.parent}") if part is None else read_tower(name, key, part)[1]
    if name in table or name in SCRIPTS:
        return dict(table.get(name) or SCRIPTS[name])
    what = next(noun for noun, own in TABLES if own is table)
    for other, others in TABLES:
        if name in others:
            raise RecipeError(f"{key}: '{name}' is {other}; name {what}, docs/published-recipes.md has some")
    close = difflib.get_close_matches(name, table, n=1, cutoff=0.8)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise RecipeError(
        f"{key}: --tiny does not know what '{name}' is: there is no such folder with a config.json here, and "
        f"docs/published-recipes.md does not list it; name a part of that list, or a folder with the part's "
        f"config.json{hint}"
    )


def kept(config: Any) -> dict[str, Any]:
    """What a stand-in takes over from a real part's config."""
    told = config if isinstance(config, Mapping) else {key: getattr(config, key, None) for key in KEPT}
    return {key: told[key] for key in KEPT if told.get(key) is not None}


def scaled(layer: int, real: int, toy: int) -> int:
    """Block ``layer`` of ``real``, counted from 0, where there are ``toy``: in proportion."""
    if not 0 < layer < real:
        return 0 if layer <= 0 else toy
    return max(1, min(toy - 1, round(layer * toy / real)))
