"""Names become folders, and folders become weights: the only file that reads pretrained parts.

A checkpoint that does not hold every weight of the part it is read for is refused: transformers itself fills
what is missing with random numbers and goes on. Whatever is wrong with a folder is one line that names the
recipe's key, the folder, and what is the matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from tinymodal.core.errors import CheckpointError, TinyModalError
from tinymodal.model.encoders import HFEncoder, tower_config
from tinymodal.model.modeling_tinymodal import load_exactly

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from tinymodal.model.media import MediaEncoder

SHIPPED = {
    "starter": "starter/model",
    "starter/vision": "starter/vision",
    "starter/language": "starter/language",
    "starter/tokenizer": "starter/tokenizer",
}
"""Name -> folder inside the package."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Any of these makes a folder a tokenizer's. Of a folder with none, transformers makes an empty tokenizer."""


def locate(name: str) -> str:
    """Where a part lies: a shipped one by its short name, else the folder or Hub name as given.

    Raises:
        CheckpointError: a short name whose files this installation does not have.
    """
    if name not in SHIPPED:
        return name
    folder = files("tinymodal").joinpath(SHIPPED[name])
    if not folder.is_dir():
        raise CheckpointError(
            f"'{name}' is not in this installation ({folder} does not exist); install tinymodal again, or "
            f"train it with recipes/starter-*.toml"
        )
    return str(folder)


def fetch(name: str, key: str = "") -> Path:
    """A folder on this machine for ``name``: a shipped part, a folder, or a Hub name (downloaded once).

    Args:
        name: see :func:`locate`.
        key: the recipe key that holds it, for the error.

    Raises:
        CheckpointError: there is no such folder, and it is no Hub name or the Hub does not give it.
    """
    where = f"{key}: " if key else ""
    folder = Path(locate(name)).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{where}{folder} is a file; expected a folder with config.json")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise CheckpointError(f"{where}the folder {folder} does not exist (looked in {Path.cwd()})")
    from huggingface_hub import snapshot_download

    ours = ["*.json", "*.txt", "*.model", "*.jinja"]
    try:
        # Not the folders inside: they hold the same weights in other formats.
        local = snapshot_download(name, allow_patterns=[*ours, "*.safetensors"], ignore_patterns=["*/*"])
        if not list(Path(local).glob("*.safetensors")):
            local = snapshot_download(name, allow_patterns=[*ours, "*.bin"], ignore_patterns=["*/*"])
    except Exception as error:  # the client's errors have no common ancestor besides this
        raise CheckpointError(
            f"{where}no folder '{name}' here (looked in {Path.cwd()}), and the Hub does not give it: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return Path(local)


def read_tokenizer(name: str, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a Hub name.

    Raises:
        CheckpointError: the folder has none, or one that cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedConfig

    folder = fetch(name, key)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise CheckpointError(
            f"{key}: {folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the model's into "
            f"it, or name another folder with model.language.tokenizer"
        )
    # A tokenizer's own files say what it is; a folder that is nothing else has no config to ask.
    alone = {} if (folder / "config.json").is_file() else {"config": PreTrainedConfig()}
    with one_line(f"{key}: {folder}: the tokenizer", CheckpointError):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **alone)
    return tokenizer


def read_language(name: str, key: str, num_words: int, added: list[int]) -> PreTrainedModel:
    """A causal language model in float32, with an embedding for every token.

    Args:
        name: folder or Hub name.
        key: the recipe key that holds it.
        num_words: tokens of its tokenizer, the new ones included.
        added: ids of the tokens that are new to it. Their rows begin as the mean of the others: a typical
            word, neither likely nor unlikely.

    Raises:
        CheckpointError: the folder holds no such model, not all of its weights, or too few embeddings for the
            tokenizer.
    """
    from transformers import AutoModelForCausalLM

    folder = fetch(name, key)
    where = f"{key}: {folder}"
    read_json(folder / "config.json", where)
    with one_line(where, CheckpointError):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    language: PreTrainedModel
    language, info = loaded
    refuse_missing(info, where)
    rows = _rows(language.get_input_embeddings())
    if num_words - len(added) > len(rows):
        raise CheckpointError(
            f"{where}: the tokenizer has {num_words - len(added)} tokens and the model {len(rows)} "
            f"embeddings; they are not of one model"
        )
    if num_words > len(rows):
        language.resize_token_embeddings(num_words, mean_resizing=False)
    if added:
        # Tied tables are one tensor; its mean is of the old rows both times.
        with torch.no_grad():
            for table in (_rows(language.get_input_embeddings()), _rows(language.get_output_embeddings())):
                old = torch.ones(len(table), dtype=torch.bool)
                old[added] = False
                table[added] = table[old].mean(0)
    return language


def read_tower_config(name: str, key: str) -> tuple[Path, PreTrainedConfig]:
    """The folder of a tower, and its config; of a whole CLIP or SigLIP, the config of the half that sees.

    Raises:
        CheckpointError: there is no such folder, or nobody knows such a tower.
    """
    folder = fetch(name, key)
    where = f"{key}: {folder}"
    with one_line(where, CheckpointError):
        return folder, tower_config(read_json(folder / "config.json", where))


def load_tower(tower: MediaEncoder, folder: Path, key: str) -> None:
    """Fill a tower with the weights of a checkpoint. What the tower does not have is left where it is.

    Raises:
        CheckpointError: a weight of the tower is missing or has another shape.
    """
    where = f"{key}: {folder}"
    wanted = tower.module.state_dict()
    with one_line(where, CheckpointError):
        if isinstance(tower, HFEncoder):
            # transformers' own reader: it knows the names that older versions and whole CLIP models use.
            family: Any = type(tower.module)
            backbone, info = family.from_pretrained(
                folder, config=tower.config, dtype=torch.float32, output_loading_info=True
            )
            refuse_missing(info, where, wanted)
            weights = backbone.state_dict()
        else:
            from safetensors.torch import load_file

            file = folder / "model.safetensors"
            if not file.is_file():
                raise CheckpointError(f"{where}: has no model.safetensors")
            weights = load_file(file)
        load_exactly(tower.module, {name: weights[name] for name in weights if name in wanted})


def refuse_missing(info: Mapping[str, Any], where: str, wanted: Mapping[str, Any] | None = None) -> None:
    """Raise CheckpointError if weights were not in the checkpoint and are random now.

    Args:
        info: what ``from_pretrained(..., output_loading_info=True)`` says.
        where: key and folder.
        wanted: the weights that matter; None: all.
    """
    missing = sorted(name for name in info["missing_keys"] if wanted is None or name in wanted)
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} weights are not in the checkpoint and would be random, first "
            f"{missing[0]}; the folder is incomplete or holds another model"
        )


def read_json(file: Path, where: str) -> dict[str, Any]:
    """A table from a JSON file of a model's folder.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise CheckpointError(f"{where}: has no {file.name}; expected the folder of a model")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{where}: {file.name} is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{where}: {file.name} holds a {type(document).__name__}, expected a table")
    return document


@contextmanager
def one_line(
    where: str, kind: type[TinyModalError], errors: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Turn the errors of model code and of transformers into one line that names the key or the folder.

    By default all of them, for where files are read: a bad file makes transformers, tokenizers and
    safetensors raise anything. transformers' report of what a checkpoint has and lacks is not printed
    meanwhile: what matters of it is checked here.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except TinyModalError:
        raise
    except errors as error:
        raise kind(f"{where}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; of a heading that ends with a colon, the next as well."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _rows(table: Any) -> torch.Tensor:
    weight: torch.Tensor = table.weight
    return weight
