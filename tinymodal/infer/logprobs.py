"""How likely each token of a reply was, and what else could have stood in its place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Shapes: V vocabulary.


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of a reply."""

    token: str
    """Its text; half a character is shown as U+FFFD."""
    token_id: int
    logprob: float
    """Natural logarithm of its probability, before temperature, filters and penalties."""
    top: tuple[tuple[str, float], ...]
    """The likeliest tokens in its place, likeliest first, as text and logarithm."""
    raw: bytes
    """Its bytes: those of all tokens, joined, are the reply's."""


def logprob_of(
    logits_V: Tensor, token: int, num: int, name: Callable[[int], str], raw: bytes
) -> TokenLogprob:
    """How likely ``token`` was, and the ``num`` likeliest.

    Args:
        logits_V: float32, as the head gave them.
        token: which was chosen.
        num: of the likeliest.
        name: the text of a token.
        raw: the token's bytes.
    """
    found_V = logits_V.log_softmax(-1)
    best = found_V.topk(min(num, len(found_V)))
    top = tuple(
        (name(i), value) for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )
    return TokenLogprob(name(token), token, float(found_V[token]), top, raw)


class TokenBytes:
    """The bytes of a tokenizer's tokens, one by one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        decoder = tokenizer.backend_tokenizer.decoder
        written = "" if decoder is None else json.dumps(json.loads(decoder.__getstate__()))
        self.byte_of = _byte_of_character() if "ByteLevel" in written else None
        self.added = set(tokenizer.added_tokens_decoder)

    def __call__(self, token: int) -> bytes:
        word: str = self.tokenizer.convert_ids_to_tokens(token)
        if token not in self.added:
            if self.byte_of is not None and all(c in self.byte_of for c in word):
                return bytes(self.byte_of[c] for c in word)
            if found := re.fullmatch("<0x([0-9A-Fa-f]{2})>", word):
                return bytes([int(found[1], 16)])
            if "\u2581" in word:  # how sentencepiece writes a space
                return word.replace("\u2581", " ").encode()
        return str(self.tokenizer.decode([token], skip_special_tokens=False)).encode()


def _byte_of_character() -> dict[str, int]:
    """GPT-2's characters for bytes: those that can be printed stand for themselves, the others for 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}
