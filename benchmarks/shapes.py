"""Models whose shares of work are those of two real ones, and the data they read.

"0.9B" is SigLIP-so400m with Qwen2.5-0.5B, "3.1B" the same tower with Phi-2 (TinyLLaVA's best). For times on
a CPU every width is a seventh, and so is the vocabulary; a picture is 100 patches for 729, a text that much
shorter. The number of blocks stays (27 in the tower, 24 and 32 in the decoders), as does the size of a head
of attention. So tower, decoder, attention and language head keep their shares, and what is saved once (the
tower's last block, most of the decoder's last) counts for one block in as many as the real model has.

The mix of the second stage follows LLaVA-665k: rows of each source from LLaVA-1.5 (arXiv:2310.03744, table
7). Tokens a row are estimates of ours, from how many turns a source has and how long they are; over all rows
they come to 280, and the file has 1.03 GB for 665,298 rows, JSON included. ShareGPT's rows have no picture.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch

from tinymodal.core.types import IGNORE, Encoded, MediaItem
from tinymodal.model.configuration_tinymodal import TinyModalConfig
from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration

Kind = Literal["pretrain", "sft"]

IMAGE_TOKEN, PAD = 1, 0
"""Ids; words begin at 2."""
CAPTION = 20
"""Words of a caption in the first stage, at every scale: all train, as TinyLLaVA's do."""
SYSTEM = 35
"""Tokens before the picture in the second stage: the sentence that every TinyLLaVA template begins with."""
LONGEST = 2048
"""Tokens of text at most; TinyLLaVA cuts there."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. ``scale``: real tokens of text for one here."""

    name: str
    vision: dict[str, Any]
    language: dict[str, Any]
    scale: float
    seq_len: int
    """Positions of a packed row: 4,096 of the real model."""

    @property
    def image_px(self) -> int:
        return int(self.vision["image_size"])

    @property
    def tokens(self) -> int:
        """Of a picture."""
        return (self.image_px // int(self.vision["patch_size"])) ** 2

    def model(self, device: str = "cpu", seed: int = 0) -> TinyModalForConditionalGeneration:
        """Random weights; an mlp connects, as in TinyLLaVA."""
        config = TinyModalConfig(
            text_config=dict(self.language),
            vision_config=dict(self.vision),
            connectors={"image": {"name": "mlp"}},
            feature_layer=-2,
            image_token_id=IMAGE_TOKEN,
        )
        with torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return TinyModalForConditionalGeneration(config)


def _siglip(width: int, inner: int, blocks: int, heads: int, px: int, patch: int = 14) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "image_size": px,
        "patch_size": patch,
    }


def _qwen(width: int, inner: int, blocks: int, heads: int, shared: int, words: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "vocab_size": words,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }


def _phi(width: int, inner: int, blocks: int, heads: int, words: int) -> dict[str, Any]:
    return {
        "model_type": "phi",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": words,
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
        "partial_rotary_factor": 0.4,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }


SO400M = _siglip(1152, 4304, 27, 16, 384)
"""google/siglip-so400m-patch14-384: config.json."""
SO400M_SEVENTH = _siglip(160, 600, 27, 2, 140)

REAL = {
    # Qwen/Qwen2.5-0.5B and microsoft/phi-2: config.json.
    "0.9B": Shape("0.9B", SO400M, _qwen(896, 4864, 24, 14, 2, 151_936), 1.0, 4096),
    "3.1B": Shape("3.1B", SO400M, _phi(2560, 10240, 32, 32, 51_200), 1.0, 4096),
}
SEVENTH = {
    "0.9B": Shape("0.9B", SO400M_SEVENTH, _qwen(128, 696, 24, 2, 1, 21_704), 7.29, 562),
    "3.1B": Shape("3.1B", SO400M_SEVENTH, _phi(360, 1440, 32, 4, 7_200), 7.29, 562),
}
_TOY_EYE = _siglip(32, 64, 3, 2, 56)
TOY = {
    "0.9B": Shape("0.9B", _TOY_EYE, _qwen(32, 64, 2, 2, 1, 160), 32.0, 128),
    "3.1B": Shape("3.1B", _TOY_EYE, _phi(40, 80, 2, 2, 160), 32.0, 128),
}
"""For tests of the benchmarks: their times say nothing."""


class Part(NamedTuple):
    """A source of LLaVA-665k."""

    rows: int
    """Thousands."""
    tokens: int
    """Of text, mean."""
    turns: int
    share: float
    """Of the tokens, those that train."""
    picture: bool = True


MIX = {
    "llava conversation": Part(58, 330, 4, 0.7),
    "llava detail": Part(23, 140, 1, 0.8),
    "llava reasoning": Part(77, 200, 1, 0.8),
    "sharegpt": Part(40, 1500, 4, 0.8, picture=False),
    "vqav2": Part(83, 90, 5, 0.2),
    "gqa": Part(72, 190, 13, 0.15),
    "okvqa": Part(9, 60, 2, 0.1),
    "ocrvqa": Part(80, 140, 5, 0.3),
    "a-okvqa": Part(66, 80, 1, 0.05),
    "textcaps": Part(22, 60, 1, 0.3),
    "refcoco": Part(48, 280, 7, 0.5),
    "visual genome": Part(86, 380, 10, 0.5),
}
SPREAD = 0.5
"""Standard deviation of a length's logarithm within a source: an estimate too."""


class Made:
    """Endless encoded samples of a stage, for a ``Loader`` whose encoder is :func:`as_it_is`."""

    def __init__(self, shape: Shape, kind: Kind, seed: int = 0) -> None:
        self.shape, self.kind, self.seed = shape, kind, seed
        # A benchmark draws its samples again each round; making them is no part of what it measures.
        self._made = lru_cache(maxsize=4096)(self._make)

    def sample(self, index: int) -> Any:
        """Sample ``index``, encoded already."""
        return self._made(index)

    def _make(self, index: int) -> Encoded:
        rng = random.Random(f"{self.seed}/{index}")
        pieces, picture = _caption() if self.kind == "pretrain" else _conversation(rng, self.shape.scale)
        noise = torch.Generator().manual_seed(rng.randrange(2**31))
        shape = self.shape
        ids, labels, media = [], [], []
        for n, (length, trains) in enumerate(pieces):
            if n == picture:
                ids.append(torch.full((shape.tokens,), IMAGE_TOKEN))
                labels.append(torch.full((shape.tokens,), IGNORE))
                tile = torch.randn(3, shape.image_px, shape.image_px, generator=noise).clamp(-1, 1)
                side = shape.image_px // int(shape.vision["patch_size"])
                media.append(MediaItem("image", (tile,), (side, side), shape.tokens, shape.tokens))
            words = torch.randint(2, int(shape.language["vocab_size"]), (length,), generator=noise)
            ids.append(words)
            labels.append(words if trains else torch.full_like(words, IGNORE))
        label = torch.cat(labels)
        label[0] = IGNORE
        return Encoded(torch.cat(ids), label, tuple(media), f"{self.kind}/{index}")


def as_it_is(encoded: Any) -> Encoded:
    """The encoder for what is encoded already."""
    return encoded  # type: ignore[no-any-return]


def _caption() -> tuple[list[tuple[int, bool]], int]:
    return [(CAPTION, True)], 0


def _conversation(rng: random.Random, scale: float) -> tuple[list[tuple[int, bool]], int]:
    """(length, trains) of each stretch of text, and before which of them the picture stands (-1: none)."""
    part = MIX[rng.choices(list(MIX), [source.rows for source in MIX.values()])[0]]
    # The mean of a log-normal variable is exp(mu + sigma^2 / 2).
    total = min(part.tokens * rng.lognormvariate(-(SPREAD**2) / 2, SPREAD), LONGEST) / scale
    answer = max(1, round(total * part.share / part.turns))
    question = max(1, round(total * (1 - part.share) / part.turns))
    pieces = [(max(1, round(SYSTEM / scale)), False)]
    pieces += [
        (length, trains) for _ in range(part.turns) for length, trains in ((question, False), (answer, True))
    ]
    return pieces, 1 if part.picture else -1
