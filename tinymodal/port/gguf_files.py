"""``--to gguf``: the language model as one file, tower and connector as another (``mmproj``), for llama.cpp.

Proved without llama.cpp: every tensor is read back and compared with what was to be stored, transformers
reads the file as a model and as a tokenizer of its own, and tower and connector are rebuilt from the mmproj
file alone. What llama.cpp itself computes is not claimed by any of this.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tinymodal.compose.targets import LLAMA_CPP
from tinymodal.port import gguf_mmproj
from tinymodal.port.gguf_text import placed, read_sizes, read_tensors, restored, sizes_of, write_text
from tinymodal.port.gguf_types import as_stored
from tinymodal.port.parity import Case, greedy, judge, record
from tinymodal.port.proof import Check, Job, Proof, prompts

if TYPE_CHECKING:
    from collections.abc import Mapping

TEXT, MMPROJ = "model.gguf", "mmproj.gguf"

SAMPLES = (
    "The quick brown fox jumps over 13 lazy dogs; 3.14159, 2026-11-22!",
    "  two  spaces,\ttabs\nand\n\nnewlines  ",
    "don't I'LL we've O'Neill's",
    "naïve façade, Übergröße, ¿qué?, Привет, 你好世界, こんにちは, 안녕, שלום, नमस्ते",
    "👍🏽 🇩🇪 and a zero-width‍joiner",
    "def f(x): return x**2 if x != 0 else None  # 100%",
    "½ ² ٣ Ⅷ 1234567890 1,000.5",
    "",
)
"""Texts over which token ids are compared, besides the prompts."""


def write(job: Job, folder: Path) -> None:
    """Write the files; the mmproj file only for a model that sees."""
    folder.mkdir(parents=True)
    write_text(job.composed, folder / TEXT, job.options.weights, job.name)
    if job.sees:
        gguf_mmproj.write_mmproj(job.composed, folder / MMPROJ, job.options.weights, job.name)


def prove(job: Job, folder: Path) -> Proof:
    """Tensors, sizes, token ids, logits and text of what was written."""
    weights, composed = job.options.weights, job.composed
    checks = [_tensors_check(job, folder), _sizes_check(job, folder), _tokens_check(job, folder)]
    notes = ["llama.cpp was not run"]
    if job.sees:
        checks += gguf_mmproj.checks(composed, folder / MMPROJ, weights)
    over, left_out = prompts(composed, job.options.num_prompts, sees=False, hears=False)
    reference = GGUFReference(folder / TEXT, composed.model.config.text_config)
    theirs, longer = record(reference, over, composed)
    del reference
    if weights != "f32":
        notes.append(_rounded(job, theirs))
    parity = judge(composed, theirs, "transformers' reader of GGUF")
    parity.left_out = left_out + longer
    return Proof(parity, checks, notes)


class GGUFReference:
    """transformers' own reading of the file: a causal language model; see ``port.parity.Reference``."""

    name = "transformers' reader of GGUF"

    def __init__(self, file: Path, words: Any) -> None:
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        # Its config is ours: the reader takes the sizes that it knows of from the file, and not the width of
        # a head; what the file says is compared on its own. To llama.cpp a mistral is a llama.
        values = {**words.to_dict(), "model_type": LLAMA_CPP[words.model_type]}
        config = CONFIG_MAPPING[values.pop("model_type")](**values)
        # Its bar over the tensors is switched off by nothing.
        with redirect_stderr(io.StringIO()):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, config=config, dtype=torch.float32
            )
        self.model = loaded.eval()

    def inputs(self, case: Case, ours: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See ``port.parity.Reference``."""
        return {name: ours[name] for name in ("input_ids", "attention_mask")}

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """See ``port.parity.Reference``."""
        with torch.no_grad():
            return self.model(**inputs).logits[0].float()

    def greedy(self, inputs: Mapping[str, Tensor], num: int) -> list[int]:
        """See ``port.parity.Reference``."""
        return greedy(self.model, inputs, num)


def _tensors_check(job: Job, folder: Path) -> Check:
    """Every tensor, read back and put into transformers' order, is what was to be stored, bit for bit."""
    read = read_tensors(folder / TEXT)
    odd: list[str] = []
    total = 0
    for tensor in placed(job.composed):
        total += 1
        found = read.pop(tensor.name, None)
        wanted = as_stored(tensor.name, tensor.values, job.options.weights)
        if found is None or not torch.equal(restored(found.view(wanted.shape), tensor.heads), wanted):
            odd.append(tensor.name)
    odd += [f"{name} (not expected)" for name in read]
    told = f"{total - len(odd)} of {total} in {TEXT}" + (f", first not {odd[0]}" if odd else "")
    exact = "" if job.options.weights == "f32" else f" rounded to {job.options.weights}"
    return Check(f"dequantised tensors equal the model's{exact}", not odd, told)


def _sizes_check(job: Job, folder: Path) -> Check:
    words = job.composed.model.config.text_config
    wanted = sizes_of(words)
    read = read_sizes(folder / TEXT, wanted, LLAMA_CPP[words.model_type])
    odd = [
        f"{key} {read[key]} for {value}"
        for key, value in wanted.items()
        if np.float32(read[key]) != np.float32(value)
    ]
    return Check("the file states the model's sizes", not odd, "; ".join(odd) or f"{len(wanted)} keys")


def _tokens_check(job: Job, folder: Path) -> Check:
    """A tokenizer that transformers makes of the file alone gives the same ids."""
    from transformers import AutoTokenizer, PreTrainedConfig

    theirs: Any = AutoTokenizer.from_pretrained(folder, gguf_file=TEXT, config=PreTrainedConfig())
    ours = job.composed.tokenizer
    texts = [*SAMPLES, *(case.text for case in job.prompts()[0])]
    for text in texts:
        wanted = ours(text, add_special_tokens=False)["input_ids"]
        found = theirs(text, add_special_tokens=False)["input_ids"]
        if wanted != found:
            return Check("token ids are equal", False, f"{text[:40]!r}: {found[:12]} for {wanted[:12]}")
    return Check("token ids are equal", True, f"{len(texts)} texts")


def _rounded(job: Job, theirs: list[Any]) -> str:
    """Round our matrices as the file has them, in place; how far that moves the logits."""
    before = judge(job.composed, theirs, "", float("inf"))
    model: Any = job.composed.model
    own: dict[str, Tensor] = {f"model.{n}": t for n, t in model.model.language_model.state_dict().items()}
    own["lm_head.weight"] = model.head_weight()
    with torch.no_grad():
        for tensor in placed(job.composed):
            own[tensor.source].copy_(as_stored(tensor.name, tensor.values, job.options.weights))
    same = sum(row.greedy for row in before.rows)
    return (
        f"rounding to {job.options.weights} moves logits by at most {before.largest:.2g} and keeps the "
        f"greedy text of {same} of {len(before.rows)} prompts; the comparison is with the model rounded alike"
    )
