"""How the next token is chosen: what can be asked for, and the arithmetic of it.

Filters come in the order that transformers gives them: the penalty for what was said before, the least
length, the temperature, top k, top p, min p. Each row draws from a generator of its own, so what it says does
not depend on its neighbours in the batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tinymodal.infer.grammar import Grammar

# Shapes: B rows, V vocabulary.


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen. ``temperature = 0`` takes the likeliest one."""

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    """The stop token is not chosen before so many others; a stop string ends a reply all the same."""
    temperature: float = 0.0
    top_p: float = 1.0
    """The smallest set of tokens whose probabilities reach this; 1 keeps all."""
    top_k: int = 0
    """The likeliest tokens that stay in play; 0 keeps all."""
    min_p: float = 0.0
    """Tokens at least this share of the likeliest one's probability stay in play (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """What was read or said before counts by so much less: positive logits are divided by it, negative ones
    multiplied (CTRL, arXiv:1909.05858)."""
    num_beams: int = 1
    """Replies that are followed at once; the likeliest is given. Needs temperature 0."""
    length_penalty: float = 1.0
    """Beams are compared by their log-probability over their length to this power."""
    seed: int = 0
    """The same seed and machine give the same reply, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    """The reply ends before the first of these, beside what the model's template ends with."""
    json_schema: str | Mapping[str, Any] | None = None
    """The reply is JSON of this schema, unless ``max_new_tokens`` or ``stop`` cut it; ``{"type": "object"}``
    is any object. Kept as text. Needs the package llguidance."""
    lookup: int = 0
    """So many tokens are guessed ahead, from where the last two came before in what was read and said, and
    checked in one pass. The reply is the same; where it repeats much, it takes fewer passes. Of replies that
    are decoded alone. 0: none."""
    num_logprobs: int | None = None
    """Tell how likely each token was, and so many of the likeliest in its place; 0: of the chosen token only.
    None: do not tell."""
    speech_temperature: float = 0.0
    """As ``temperature``, of a spoken reply's frames; the design ``units`` knows 0 only."""
    speech_top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be from 0 to max_new_tokens ({self.max_new_tokens}), "
                f"got {self.min_new_tokens}"
            )
        for name in ("temperature", "top_k", "lookup", "num_logprobs", "speech_temperature", "speech_top_k"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, got {self.min_p}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {self.num_beams}")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"num_beams {self.num_beams} follows the likeliest replies and temperature "
                f"{self.temperature} draws by chance; set one of the two"
            )
        if isinstance(self.json_schema, Mapping):
            object.__setattr__(self, "json_schema", json.dumps(self.json_schema))
        if self.json_schema is not None and self.num_beams > 1:
            raise ValueError(f"json_schema holds one reply at a time, got num_beams {self.num_beams}; take 1")
        if isinstance(self.stop, str) or not all(isinstance(word, str) and word for word in self.stop):
            raise ValueError(f"stop must be a tuple of strings that are not empty, got {self.stop!r}")

    @property
    def by_chance(self) -> bool:
        return self.temperature > 0


GREEDY = Sampling()


@dataclass(slots=True)
class Choice:
    """What choosing one row's next token depends on, beside its logits."""

    sampling: Sampling
    prompt: Tensor
    """int64 [T]"""
    said: list[int] = field(default_factory=list)
    random: torch.Generator | None = None
    """None until the first token is drawn by chance."""
    grammar: Grammar | None = None
    """What the reply is held to; None: nothing."""


def choose(
    logits_BV: Tensor, rows: Sequence[Choice], never: Sequence[int] = (), stops: Sequence[int] = ()
) -> Tensor:
    """The next token of each row, int64 [B].

    Args:
        logits_BV: float32; changed in place.
        rows: one for each row of logits.
        never: tokens that are not words of a reply.
        stops: tokens that end one.
    """
    restrict(logits_BV, rows, never, stops)
    found_B = logits_BV.argmax(-1)
    alike: dict[tuple[float, int, float, float], list[int]] = {}
    for i, row in enumerate(rows):
        if row.sampling.by_chance:
            s = row.sampling
            alike.setdefault((s.temperature, s.top_k, s.top_p, s.min_p), []).append(i)
    for same in alike.values():
        shares = filtered(logits_BV[same], rows[same[0]].sampling).softmax(-1)
        for i, shares_V in zip(same, shares, strict=True):
            row = rows[i]
            if row.random is None:
                row.random = torch.Generator(shares_V.device).manual_seed(row.sampling.seed)
            found_B[i] = torch.multinomial(shares_V, 1, generator=row.random)[0]
    return found_B


def restrict(
    scores_BV: Tensor, rows: Sequence[Choice], never: Sequence[int] = (), stops: Sequence[int] = ()
) -> None:
    """Take out what a row may not say now, and count less what it said before; in place."""
    for i, row in enumerate(rows):
        if row.sampling.repetition_penalty != 1:
            penalise(scores_BV[i], row)
        if row.grammar is not None:
            allowed_V = row.grammar.allowed(row.said)[: scores_BV.shape[1]]
            scores_BV[i, : len(allowed_V)].masked_fill_(~allowed_V.to(scores_BV.device), -torch.inf)
            scores_BV[i, len(allowed_V) :] = -torch.inf
            if row.grammar.ended:
                continue  # to say more is not in its power
        if stops and len(row.said) < row.sampling.min_new_tokens:
            scores_BV[i, list(stops)] = -torch.inf
    if never:
        scores_BV[:, list(never)] = -torch.inf


def penalise(scores_V: Tensor, row: Choice) -> None:
    """Let what was read and said count less, in place; see ``Sampling.repetition_penalty``."""
    said = torch.tensor(row.said, dtype=torch.int64)
    known = torch.cat([row.prompt.cpu(), said]).to(scores_V.device)
    # A token that came twice is written twice, and the same both times.
    own = scores_V[known]
    by = row.sampling.repetition_penalty
    scores_V[known] = torch.where(own < 0, own * by, own / by)


def filtered(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Logits over the temperature, -inf where a token is out of play."""
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(descending=True)
        shares_BV = sorted_BV.softmax(-1)
        before_BV = shares_BV.cumsum(-1) - shares_BV
        sorted_BV = sorted_BV.masked_fill(before_BV >= sampling.top_p, -torch.inf)
        logits_BV = torch.empty_like(logits_BV).scatter(1, order_BV, sorted_BV)
    if sampling.min_p > 0:
        shares_BV = logits_BV.softmax(-1)
        least_B1 = sampling.min_p * shares_BV.max(-1, keepdim=True).values
        logits_BV = logits_BV.masked_fill(shares_BV < least_B1, -torch.inf)
    return logits_BV
