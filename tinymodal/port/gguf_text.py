"""The language model as one GGUF file: tensors under llama.cpp's names, the tokenizer and the chat template.

Source: ``gguf`` 0.19.0 for names and types; its reader and transformers' (``gguf_file=``) for the proof.
llama.cpp rotates neighbouring numbers where transformers rotates halves, so the rows of a llama's queries and
keys are reordered; qwen2 and qwen3 have an architecture of their own there that rotates halves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinymodal.chat.template import writes_bos
from tinymodal.compose.build import Composed
from tinymodal.compose.targets import LLAMA_CPP, split_steps
from tinymodal.core.errors import ExportError
from tinymodal.port.gguf_types import FILE_TYPES, stored

SPLITS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": ("GPT-2", "bytes"),
    "smollm": ("Digits", "GPT-2", "bytes"),
}
"""llama.cpp's name of a pre-tokenizer -> its steps."""

RULES: Mapping[str, tuple[str, ...]] = {
    "llama-bpe": ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\p{N}{1,3}|"),
    "qwen2": ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"|\p{N}|"),
}
"""llama.cpp's name -> what the one regular expression holds that splits a text."""

ONE_DIGIT = (r"Split:\d", r"Split:\p{N}")
"""Other ways to write the step ``Digits``."""


class Placed(NamedTuple):
    """One tensor of the file."""

    name: str
    """llama.cpp's."""
    source: str
    """transformers' own."""
    values: Tensor
    """float32, as transformers has it."""
    heads: int
    """Heads whose rows are reordered; 0: none."""


def placed(composed: Composed) -> Iterator[Placed]:
    """Every tensor of the language model with its place.

    Raises:
        ExportError: a tensor has none.
    """
    import gguf

    model: Any = composed.model
    words = model.config.text_config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == LLAMA_CPP[words.model_type])
    names = gguf.get_tensor_name_map(arch, words.num_hidden_layers)
    sources = {f"model.{name}": tensor for name, tensor in model.model.language_model.state_dict().items()}
    if not model.config.tie_word_embeddings:
        sources["lm_head.weight"] = model.head_weight().detach()
    for source, tensor in sources.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(
                f"language: {source} has no name in llama.cpp's {LLAMA_CPP[words.model_type]!r}"
            )
        heads = 0
        if LLAMA_CPP[words.model_type] == "llama" and source.endswith(("q_proj.weight", "k_proj.weight")):
            heads = words.num_attention_heads if "q_proj" in source else words.num_key_value_heads
        yield Placed(name, source, tensor.detach().float().cpu(), heads)


def reordered(values: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys, [heads * d, D]: halves of each head interleaved, as llama.cpp rotates them."""
    if not heads:
        return values
    return values.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(values.shape)


def restored(values: Tensor, heads: int) -> Tensor:
    """The way back from :func:`reordered`."""
    if not heads:
        return values
    return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(values.shape)


def write_text(composed: Composed, file: Path, weights: str, name: str) -> None:
    """Write the file.

    Args:
        composed: the model.
        file: to write.
        weights: type of the matrices, a key of :data:`~tinymodal.port.gguf_types.TYPES`.
        name: what the file calls the model.
    """
    import gguf

    words = composed.model.config.text_config
    writer = gguf.GGUFWriter(file, LLAMA_CPP[words.model_type])
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[weights])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in sizes_of(words).items():
        kind = gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.UINT32
        writer.add_key_value(f"{LLAMA_CPP[words.model_type]}.{key}", value, kind)
    _add_tokenizer(writer, composed)
    for tensor in placed(composed):
        array, kind = stored(tensor.name, reordered(tensor.values, tensor.heads), weights)
        writer.add_tensor(tensor.name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sizes_of(words: Any) -> dict[str, int | float]:
    """The architecture's numbers, by their keys in the file."""
    width = getattr(words, "head_dim", None) or words.hidden_size // words.num_attention_heads
    rope = getattr(words, "rope_parameters", None) or {}
    return {
        "context_length": words.max_position_embeddings,
        "embedding_length": words.hidden_size,
        "block_count": words.num_hidden_layers,
        "feed_forward_length": words.intermediate_size,
        "attention.head_count": words.num_attention_heads,
        "attention.head_count_kv": words.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(words.rms_norm_eps),
        "rope.dimension_count": width,
        "rope.freq_base": float(rope.get("rope_theta", 10_000.0)),
        "vocab_size": words.vocab_size,
    }


def pre_tokenizer(tokenizer: Any) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits a text before BPE.

    Raises:
        ExportError: it has none that is known.
    """
    steps = tuple("Digits" if step in ONE_DIGIT else step for step in split_steps(tokenizer))
    for name, own in SPLITS.items():
        if steps == own:
            return name
    if len(steps) == 2 and steps[1] == "bytes":
        for name, parts in RULES.items():
            if all(part in steps[0] for part in parts):
                return name
    raise ExportError(
        f"language.tokenizer: splits texts by {' and '.join(steps)}, for which no name in llama.cpp is "
        f"known; known: {', '.join((*SPLITS, *RULES))}"
    )


def _add_tokenizer(writer: Any, composed: Composed) -> None:
    import gguf

    tokenizer: Any = composed.tokenizer
    rows = composed.model.config.text_config.vocab_size
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {index: token for index, token in tokenizer.added_tokens_decoder.items()}
    tokens, types = [], []
    for index in range(rows):
        if index not in known:
            tokens.append(f"[PAD{index}]")
            types.append(gguf.TokenType.UNUSED)
            continue
        tokens.append(known[index])
        kind = gguf.TokenType.NORMAL
        if index in added:
            kind = gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED
        types.append(kind)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in said["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    stop = composed.encoder.stop_ids[0] if composed.encoder.stop_ids else tokenizer.eos_token_id
    ends: dict[str, Any] = {"bos": tokenizer.bos_token_id, "eos": stop, "pad": tokenizer.pad_token_id}
    for end, number in ends.items():
        if number is not None:
            getattr(writer, f"add_{end}_token_id")(number)
    writer.add_add_bos_token(writes_bos(tokenizer))
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file in float32, by its name there."""
    import gguf

    reader = gguf.GGUFReader(file)
    return {
        tensor.name: torch.from_numpy(
            np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        )
        for tensor in reader.tensors
    }


def read_sizes(file: Path, keys: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """What a file says of its sizes, for ``keys``."""
    import gguf

    reader = gguf.GGUFReader(file)
    found = {key: reader.get_field(f"{arch}.{key}") for key in keys}
    return {key: None if field is None else field.contents() for key, field in found.items()}
