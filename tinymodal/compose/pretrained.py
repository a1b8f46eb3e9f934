"""Names become folders, and folders a tokenizer, a language model or plain tensors; towers: ``towers.py``.

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
from torch import Tensor
from transformers.utils import logging

from tinymodal.core.errors import CheckpointError, TinyModalError
from tinymodal.model.configuration_tinymodal import TinyModalConfig
from tinymodal.model.language import OWN_LANGUAGES, causal_class, language_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


SHIPPED = {
    "starter": "starter/model",
    "starter/vision": "starter/model",
    "starter/audio": "starter/model",
    "starter/speech": "starter/model",
    "starter/codec": "starter/model/codec",
    "starter/language": "starter/language",
    "starter/tokenizer": "starter/tokenizer",
}
"""Name -> folder inside the package. Towers, codec and speech head are read out of the starter model, so that
they ship once. ``starter/language`` is another one than its own: it has never met a drawn picture."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Any of these makes a folder a tokenizer's. Of a folder with none, transformers makes an empty tokenizer."""

BORROWED_TOKENIZERS = {"openelm": "meta-llama/Llama-2-7b-hf"}
"""Families published without a tokenizer of their own, by ``model_type``: whose they were trained with."""


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
        if _speaks(Path(local)):
            local = snapshot_download(name, allow_patterns=["codec/*"])
    except Exception as error:  # the client's errors have no common ancestor besides this
        raise CheckpointError(
            f"{where}no folder '{name}' here (looked in {Path.cwd()}), and the Hub does not give it: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return Path(local)


def _speaks(folder: Path) -> bool:
    """Whether a composed model in ``folder`` has a codec in a folder of its own."""
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return said.get("model_type") == TinyModalConfig.model_type and bool(said.get("speech"))
    except (OSError, ValueError, AttributeError):
        return False


def read_tokenizer(name: str, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a Hub name.

    Raises:
        CheckpointError: the folder has none, or one that cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedConfig

    folder = fetch(name, key)
    has_config = (folder / "config.json").is_file()
    kind = read_json(folder / "config.json", f"{key}: {folder}").get("model_type") if has_config else None
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        whose = f"; {kind} uses that of {BORROWED_TOKENIZERS[kind]}" if kind in BORROWED_TOKENIZERS else ""
        raise CheckpointError(
            f"{key}: {folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the model's into "
            f"it, or name another folder with model.language.tokenizer{whose}"
        )
    # A tokenizer's own files say what it is; a folder that is nothing else has no config to ask, and a model
    # of our own has one that transformers cannot read.
    alone = {} if has_config and kind not in OWN_LANGUAGES else {"config": PreTrainedConfig()}
    with one_line(f"{key}: {folder}: the tokenizer", CheckpointError):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, **alone
        )
    return tokenizer


def read_language(name: str, key: str, num_words: int, added: list[int]) -> PreTrainedModel:
    """A causal language model in float32, with an embedding for every token.

    Of a model that sees as well (gemma3, llava, ...) it is the language part.

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
    folder = fetch(name, key)
    where = f"{key}: {folder}"
    with one_line(where, CheckpointError):
        language = _load_language(folder, where)
    rows = _rows(language.get_input_embeddings())
    if num_words - len(added) > len(rows):
        raise CheckpointError(
            f"{where}: the tokenizer has {num_words - len(added)} tokens and the model {len(rows)} "
            f"embeddings; they are not of one model"
        )
    widen(language, num_words, added)
    return language


def widen(language: PreTrainedModel, num_words: int, added: list[int]) -> None:
    """Give ``language`` rows for ``num_words`` tokens; those of ``added`` begin as the mean of the others."""
    if num_words > len(_rows(language.get_input_embeddings())):
        language.resize_token_embeddings(num_words, mean_resizing=False)
    if added:
        # Tied tables are one tensor; its mean is of the old rows both times.
        with torch.no_grad():
            for table in (_rows(language.get_input_embeddings()), _rows(language.get_output_embeddings())):
                old = torch.ones(len(table), dtype=torch.bool)
                old[added] = False
                table[added] = table[old].mean(0)


def _load_language(folder: Path, where: str) -> PreTrainedModel:
    """All weights of a folder's causal language model, which may be a part of a larger one."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

    document = read_json(folder / "config.json", where)
    kind = document.get("model_type")
    if kind == TinyModalConfig.model_type:
        raise CheckpointError(f"{where}: holds a composed model; name it with model.path")
    # Code that a checkpoint brings along is never run; where to find it is not worth keeping either.
    said = {key: value for key, value in document.items() if key != "auto_map"}
    if kind in OWN_LANGUAGES:
        config = language_config(said)
    elif kind is None or kind in CONFIG_MAPPING:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    else:
        raise CheckpointError(
            f"{where}: holds a model of type {kind!r}, for which neither transformers nor tinymodal has a "
            f"class; code that a checkpoint brings along is not run"
        )
    text = getattr(config, "text_config", None)
    if text is None:
        language, info = _from_folder(causal_class(config), folder, config)
        if kind == "phi" and any("query_key_value" in name for name in info["unexpected_keys"]):
            # TinyGPT-V's Phi-2 calls itself phi.
            config = language_config({**said, "model_type": "tinygptv_phi"})
            language, info = _from_folder(causal_class(config), folder, config)
        refuse_missing(info, where)
        return language
    expected = causal_class(text)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise CheckpointError(
            f"{where}: {kind!r} is more than a language model, and its language part cannot be taken out; "
            f"name a folder with the language model alone"
        )
    whole, info = _from_folder(AutoModelForImageTextToText, folder, config)
    refuse_missing(info, where)
    return _language_part(whole, expected, where)


def _from_folder(family: Any, folder: Path, config: PreTrainedConfig) -> tuple[Any, dict[str, Any]]:
    """A model in float32, and what transformers says of the checkpoint."""
    loaded: tuple[Any, dict[str, Any]] = family.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True
    )
    return loaded


def _language_part(whole: Any, expected: Any, where: str) -> PreTrainedModel:
    """Decoder and head of a model that sees as well, as the causal language model they once were."""
    text = whole.config.text_config
    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    text.tie_word_embeddings = head.weight is whole.get_input_embeddings().weight
    with torch.device("meta"):
        language = expected._from_config(text, dtype=torch.float32)
    if type(decoder) is not type(language.base_model):
        raise CheckpointError(
            f"{where}: the language part of a {whole.config.model_type!r} is a {type(decoder).__name__}, "
            f"expected a {type(language.base_model).__name__}; name a folder with the language model alone"
        )
    setattr(language, language.base_model_prefix, decoder)
    language.set_output_embeddings(head)
    language.generation_config = whole.generation_config
    part: PreTrainedModel = language
    return part


def read_weights(folder: Path, where: str) -> dict[str, Tensor]:
    """Every tensor of a folder: ``model.safetensors``, in pieces or whole, or ``pytorch_model.bin``.

    Raises:
        CheckpointError: it holds neither, or a piece is missing.
    """
    from safetensors.torch import load_file

    for name in ("model.safetensors", "pytorch_model.bin"):
        files = [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            files = [folder / piece for piece in sorted(set(read_json(index, where)["weight_map"].values()))]
        elif not files[0].is_file():
            continue
        weights: dict[str, Tensor] = {}
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{where}: has no {file.name}, which {index.name} names")
            # Without pickle, or of pickle only tensors: nothing in a checkpoint is run.
            safe = name.endswith(".safetensors")
            weights |= load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        return weights
    raise CheckpointError(f"{where}: has neither model.safetensors nor pytorch_model.bin")


@torch.no_grad()
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
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    # What these say alone ("0", "division by zero") says nothing.
    return f"{type(error).__name__}: {said}" if isinstance(error, LookupError | ArithmeticError) else said


def _rows(table: Any) -> torch.Tensor:
    weight: torch.Tensor = table.weight
    return weight
