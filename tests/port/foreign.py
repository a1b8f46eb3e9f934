"""Tiny checkpoints in each system's own names, and each system's forward restated from known parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tinymodal.compose.build import load
from tinymodal.compose.tiny import tiny_tokenizer
from tinymodal.port.parity import Case, Parity, cases, judge, record

WIDTH = 32
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
SIZES = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 4}


def numbers(module: nn.Module, seed: int) -> Any:
    """Random weights, large enough that a wrong one shows; norms stay about 1."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=random)
            is_norm = "norm" in name.lower() and name.endswith("weight")
            p.copy_(1 + 0.1 * noise if is_norm else 0.1 * noise)
    return module.eval()


def a_clip(seed: int = 1, **config: Any) -> CLIPVisionModel:
    values = {**SIZES, "num_hidden_layers": 3, "image_size": 24, "patch_size": 4, "projection_dim": 16}
    return numbers(CLIPVisionModel(CLIPVisionConfig(**{**values, **config})), seed)


def a_siglip(seed: int = 1) -> SiglipVisionModel:
    values = {**SIZES, "num_hidden_layers": 3, "image_size": 24, "patch_size": 4}
    return numbers(SiglipVisionModel(SiglipVisionConfig(**values)), seed)


def a_llama(tokenizer: Any, seed: int = 2, more_rows: int = 0, **config: Any) -> LlamaForCausalLM:
    values = {
        **SIZES,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer) + more_rows,
    }
    return numbers(LlamaForCausalLM(LlamaConfig(**{**values, "pad_token_id": None, **config})), seed)


def a_phi(tokenizer: Any, seed: int = 2) -> PhiForCausalLM:
    values = {**SIZES, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "pad_token_id": None}
    return numbers(PhiForCausalLM(PhiConfig(**values)), seed)


def an_mlp(in_width: int = WIDTH, seed: int = 3, out_width: int = WIDTH) -> nn.Sequential:
    return numbers(
        nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width)), seed
    )


def a_tokenizer(*words: str) -> Any:
    """As these systems' own, it does not know ``<image>``; ``words`` are special tokens besides."""
    written = tiny_tokenizer().backend_tokenizer.to_str().replace("<image>", "<spare>")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(written), **names)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(words)}, replace_extra_special_tokens=False
    )
    return tokenizer


def keyed(prefix: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor.clone() for name, tensor in module.state_dict().items()}


def write(
    folder: Path, config: dict[str, Any], tokenizer: Any = None, **files: dict[str, torch.Tensor]
) -> Path:
    """A checkpoint: ``config.json``, the tokenizer, and ``name`` -> ``name.bin``."""
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name, tensors in files.items():
        torch.save(tensors, folder / f"{name}.bin")
    return folder


# How each system makes pixels of a picture


def pixels(
    picture: PIL.Image.Image,
    how: str,
    edge: int = 24,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> torch.Tensor:
    """[3, H, W], by PIL and numpy alone."""
    width, height = picture.size
    if how == "pad" and width != height:
        square = PIL.Image.new("RGB", (max(width, height),) * 2, tuple(int(m * 255) for m in mean))
        square.paste(picture, ((max(width, height) - width) // 2, (max(width, height) - height) // 2))
        picture = square
    if how == "crop":
        short = min(width, height)
        picture = picture.resize((int(edge * width / short), int(edge * height / short)), PIL.Image.BICUBIC)
        left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
        picture = picture.crop((left, top, left + edge, top + edge))
    if picture.size != (edge, edge):
        picture = picture.resize((edge, edge), PIL.Image.BICUBIC)
    values = (np.asarray(picture, dtype=np.float64) / 255 - np.array(mean)) / np.array(std)
    return torch.from_numpy(values).permute(2, 0, 1).float()


class Restated:
    """A system's forward: pictures' embeddings between words' embeddings, then the language model.

    Args:
        language: transformers' causal model.
        prepare: a picture -> [3, H, W].
        see: [1, 3, H, W] -> [1, T, D], everything that stands where the picture was.
        tokenizer: with ``<image>``, which is written once for each of the T.
    """

    name = "restated"

    def __init__(
        self,
        language: Any,
        prepare: Callable[[PIL.Image.Image], torch.Tensor],
        see: Callable[[torch.Tensor], torch.Tensor],
        tokenizer: Any,
    ) -> None:
        self.language, self.prepare, self.see, self.tokenizer = language, prepare, see, tokenizer

    @torch.no_grad()
    def inputs(self, case: Case, ours: Any) -> dict[str, torch.Tensor]:
        shown = [self.prepare(picture)[None] for picture in case.pictures]
        seen = [self.see(values)[0] for values in shown]
        first, *rest = case.text.split("<image>")
        text = first + "".join("<image>" * len(s) + words for s, words in zip(seen, rest, strict=True))
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        places = ids == self.tokenizer.convert_tokens_to_ids("<image>")
        known = ids.masked_fill(places, 0)
        embeds = self.language.get_input_embeddings()(known)
        if seen:
            embeds[places] = torch.cat(seen)
        return {"input_ids": ids, "embeds": embeds} | ({"pixel_values": torch.cat(shown)} if shown else {})

    @torch.no_grad()
    def logits(self, inputs: Any) -> torch.Tensor:
        return self.language(inputs_embeds=inputs["embeds"]).logits[0]

    @torch.no_grad()
    def greedy(self, inputs: Any, num: int) -> list[int]:
        embeds, ids = inputs["embeds"], []
        for _ in range(num):
            ids.append(int(self.language(inputs_embeds=embeds).logits[0, -1].argmax()))
            embeds = torch.cat((embeds, self.language.get_input_embeddings()(torch.tensor([[ids[-1]]]))), 1)
        return ids


def compared(out: Path, restated: Restated) -> Parity:
    """An adopted folder against its system's forward; every case, no pixel apart."""
    ours = load(out)
    restated.tokenizer = ours.tokenizer
    theirs, left_out = record(restated, cases(), ours)
    assert not left_out
    parity = judge(ours, theirs, restated.name)
    assert max(row.pixels for row in parity.rows) < 1e-5, parity.rows
    return parity


def a_gemma(tokenizer: Any, seed: int = 2, second: bool = False) -> Any:
    values = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}
    config, causal = (Gemma2Config, Gemma2ForCausalLM) if second else (GemmaConfig, GemmaForCausalLM)
    return numbers(causal(config(**values, vocab_size=len(tokenizer))), seed)


class OldGemma:
    """Gemma as transformers had it before 5.4: whatever embeddings come in are multiplied by sqrt(width)."""

    def __init__(self, today: Any) -> None:
        self.today = today
        words = today.get_input_embeddings().weight
        self.words = nn.Embedding.from_pretrained(words.detach())

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def __call__(self, inputs_embeds: torch.Tensor) -> Any:
        return self.today(inputs_embeds=inputs_embeds * WIDTH**0.5)
