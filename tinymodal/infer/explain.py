"""Why these words? What else could have come, what was attended to, and where in the picture or the sound.

For every word of an answer: the probabilities of its tokens and of those beside them; how much of the
attention went to the picture, the sound, the question, the words said before; and a field over each picture
(whatever its tiles) or along each sound. Beside it, as a check, how much less likely the word becomes when a
piece of the picture is hidden: attention tells where a model looks, not what decides.

What is called attention here is the mean over all heads and the layers asked for, of the position that
predicts the word, as in LLaVA's visualizers (github.com/zjysteven/VLM-Visualizer, which TinyLLaVA's follows).
The first position is left out: models park there the attention that goes nowhere (Xiao et al. 2023,
arXiv:2309.17453).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import PIL.Image
import torch
from torch import Tensor

from tinymodal.core.errors import DataError
from tinymodal.core.types import IGNORE, Encoded, Image, Medium, Message, Sample, Text
from tinymodal.infer.explain_attention import Step, answer_steps, asked_by_queries
from tinymodal.infer.explain_occlusion import Hidden, hide
from tinymodal.infer.explain_places import Places, places_of_picture, places_of_sound, spread
from tinymodal.model.picture_file import load_image

if TYPE_CHECKING:
    from tinymodal.infer.engine import Engine

# Shapes: T positions of the prompt, n tokens of the answer, L layers, K tokens of a medium, H W field.

FIELD_PX = 192
"""Longer side of a field over a picture; a sound's has as many columns and one row."""


@dataclass(frozen=True, slots=True)
class Guess:
    """A token that could come next."""

    token: int
    text: str
    probability: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the answer."""

    token: int
    text: str
    probability: float
    top: tuple[Guess, ...]
    """The likeliest tokens at its place, and itself behind them where it is not among them."""


@dataclass(frozen=True, slots=True)
class Word:
    """Tokens of the answer that make a word."""

    text: str
    first: int
    """Of its tokens in the answer."""
    last: int
    """One past the last."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the prompt: text, or one of the media."""

    text: str
    first: int
    last: int
    """Its positions; one past the last."""
    medium: int | None = None
    """Number in :attr:`Explanation.media`."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture or a sound of the conversation, and where its tokens stand and lie."""

    kind: Literal["image", "audio"]
    name: str
    picture: PIL.Image.Image | None
    """Upright, in RGB; None: a sound."""
    wave: Tensor | None
    """float32 [samples] as the tower hears it; None: a picture."""
    rate_hz: int | None
    first: int
    """Its tokens' positions in the prompt."""
    last: int
    places: Places
    by_queries: bool
    """Its places come from the connector's own attention."""
    hidden: Hidden | None
    """What hiding its pieces does; None where that was not asked."""

    @property
    def field_size(self) -> tuple[int, int]:
        """Rows and columns of its fields."""
        if self.picture is None:
            return 1, FIELD_PX
        longest = max(self.picture.size)
        height, width = (max(1, round(FIELD_PX * edge / longest)) for edge in self.picture.size[::-1])
        return height, width


@dataclass(frozen=True, slots=True)
class Explanation:
    """What :func:`explain` found."""

    answer: str
    complete: bool
    """Whether the model had ended, or was cut off."""
    prompt: tuple[Piece, ...]
    tokens: tuple[Token, ...]
    words: tuple[Word, ...]
    media: tuple[Shown, ...]
    attention_nT: Tensor
    """float32 [n, T + n]: of each token over the positions before it, the first left out; rows sum to 1, or
    to 0 where nothing but the first was attended to."""
    first_n: Tensor
    """float32 [n]: what was left out of each row."""
    layers: tuple[int, ...]
    """Those with attention that the mean is over, from 0."""
    num_layers: int
    notes: tuple[str, ...] = field(default=())

    def attention(self, word: Word) -> Tensor:
        """float32 [T + n], mean over the word's tokens."""
        return self.attention_nT[word.first : word.last].mean(0)

    def share(self, word: Word, shown: Shown) -> float:
        """How much of the attention went to a medium, 0 to 1."""
        return float(self.attention(word)[shown.first : shown.last].sum())

    def field(self, word: Word, shown: Shown) -> Tensor:
        """Attention over a medium, float32 [H, W]; its sum is the share that fell inside of it."""
        weights_K = self.attention(word)[shown.first : shown.last]
        places = shown.places
        return spread(places.at_boxes(weights_K), places.boxes_C4, shown.field_size)

    def harm(self, word: Word, shown: Shown) -> Tensor | None:
        """By how much hiding a place lowers the word's log-probability, float32 [H, W], 0 and above.

        The mean over the pieces that hide it.
        """
        if shown.hidden is None:
            return None
        drop_P = shown.hidden.drop_Pn[:, word.first : word.last].sum(1).clamp(min=0)
        boxes = shown.hidden.boxes_P4
        # A value at each place, not spread over the piece's area.
        areas_P = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).float()
        size = shown.field_size
        return spread(drop_P * areas_P, boxes, size) / spread(areas_P, boxes, size)

    def least(self, word: Word, shown: Shown) -> tuple[float, float] | None:
        """The word's probability as it was, and with that piece hidden that it needs most."""
        if shown.hidden is None:
            return None
        left_P = shown.hidden.logprobs_Pn[:, word.first : word.last].sum(1)
        was = left_P + shown.hidden.drop_Pn[:, word.first : word.last].sum(1)
        worst = int((was - left_P).argmax())
        return float(was[worst].exp()), float(left_P[worst].exp())


def explain(
    engine: Engine,
    sample: Sample,
    *,
    answer: str | None = None,
    max_new_tokens: int = 64,
    top: int = 5,
    layers: Sequence[int] | None = None,
    squares: int = 6,
) -> Explanation:
    """Answer a question and tell why.

    Args:
        engine: who answers.
        sample: a conversation that ends with the user's turn.
        answer: why this one? None: the likeliest, token by token, which is what the engine replies.
        max_new_tokens: at most so many.
        top: how many tokens are told at each place.
        layers: whose attention is meant, from 0, or from the last below 0; None: all.
        squares: along the longer side of a picture that are hidden one after the other; 0: none is. A pass of
            the model each.

    Raises:
        DataError: the sample cannot be encoded, the answer is empty, or the model has no such layer.
        CheckpointError: the language model gives no attention back.
    """
    encoded = engine.encode(sample)
    ids = None if answer is None else _ids_of(engine, sample, answer)
    steps = answer_steps(engine, encoded, ids, max_new_tokens)
    stopped = ids is not None or steps[-1].token in engine.stop_ids
    while len(steps) > 1 and steps[-1].token in engine.stop_ids:
        steps.pop()
    ids = [step.token for step in steps]
    texts = texts_of(engine, ids)
    num_layers = len(steps[0].attention_Lt)
    chosen = _layers(layers, num_layers)
    attention_nT, first_n = _attention(steps, chosen, len(encoded) + len(steps))
    seen = [_seen(engine, part) for part in sample.media()]
    hidden = hide(engine, sample, seen, ids, squares) if squares and seen else [None] * len(seen)
    media = _media(engine, sample, encoded, seen, hidden)
    return Explanation(
        answer="".join(texts).strip(),
        complete=stopped,
        prompt=_prompt(engine, encoded, media),
        tokens=tuple(_token(engine, step, text, top) for step, text in zip(steps, texts, strict=True)),
        words=_words(texts),
        media=media,
        attention_nT=attention_nT,
        first_n=first_n,
        layers=chosen,
        num_layers=num_layers,
        notes=tuple(f"{shown.name}: {shown.places.note}" for shown in media if shown.places.note),
    )


def _layers(layers: Sequence[int] | None, num: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(num))
    for layer in layers:
        if not -num <= layer < num:
            raise DataError(
                f"layer {layer}: this language model has {num} layers with attention, 0 to {num - 1} or "
                f"counted from the last -{num} to -1; leave layers out for all"
            )
    if not layers:
        raise DataError("layers: none is named; leave it out for all")
    return tuple(sorted({layer % num for layer in layers}))


def _attention(steps: Sequence[Step], layers: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
    """Rows over all positions without the first, and what was left out."""
    rows = torch.zeros(len(steps), length)
    for row, step in zip(rows, steps, strict=True):
        mean_t = step.attention_Lt[list(layers)].mean(0)
        row[: len(mean_t)] = mean_t
    first_n = rows[:, 0].clone()
    rows[:, 0] = 0
    return rows / rows.sum(1, keepdim=True).clamp(min=1e-9), first_n


def _ids_of(engine: Engine, sample: Sample, answer: str) -> list[int]:
    """An answer's tokens as they follow the prompt, its stop left out."""
    if not answer.strip():
        raise DataError("the answer to explain is empty; give its words, or leave it out")
    whole = engine.encoder(
        Sample((*sample.messages, Message("assistant", (Text(answer.strip()),))), sample.id)
    )
    ids: list[int] = [label for label in whole.labels.tolist() if label != IGNORE]
    # Earlier answers of the conversation train as well: only the last run is this one.
    trained = (whole.labels != IGNORE).nonzero().flatten().tolist()
    begins = max(
        (i for i, (a, b) in enumerate(pairwise([-2, *trained])) if b > a + 1),
        default=0,
    )
    ids = ids[begins:]
    while ids and ids[-1] in engine.stop_ids:
        ids.pop()
    return ids


def _seen(engine: Engine, part: Medium) -> PIL.Image.Image | Tensor:
    """A picture upright in RGB, a sound as the samples that the tower hears."""
    processor = engine.encoder.processor
    if isinstance(part, Image):
        return load_image(part.source, processor.image_processor.preparation.max_pixels)
    wave: Tensor = processor.feature_extractor.load(part.source, part.rate_hz, part.start_s, part.end_s)
    return wave


def _media(
    engine: Engine,
    sample: Sample,
    encoded: Encoded,
    seen: Sequence[PIL.Image.Image | Tensor],
    hidden: Sequence[Hidden | None],
) -> tuple[Shown, ...]:
    processor = engine.encoder.processor
    placed = engine.language.placed(encoded, 0)
    positions = {kind: iter([at for item, at in placed if item.kind == kind]) for kind in engine.places}
    asked = {kind: asked_by_queries(engine, kind, encoded) for kind in engine.places}
    counts = dict.fromkeys(engine.places, 0)
    found = []
    for part, item, what, harm in zip(sample.media(), encoded.media, seen, hidden, strict=True):
        kind = item.kind
        own = asked[kind]
        by_queries = None if own is None else own[counts[kind]]
        counts[kind] += 1
        at_K = next(positions[kind])
        if isinstance(what, Tensor):
            places = places_of_sound(processor, len(what), by_queries)
        else:
            assert isinstance(part, Image)
            places = places_of_picture(processor, part, (what.height, what.width), by_queries)
        word = "picture" if kind == "image" else "sound"
        found.append(
            Shown(
                kind=kind,
                name=f"{word} {counts[kind]}",
                picture=None if isinstance(what, Tensor) else what,
                wave=what if isinstance(what, Tensor) else None,
                rate_hz=processor.feature_extractor.sampling_rate if isinstance(what, Tensor) else None,
                first=int(at_K[0]),
                last=int(at_K[-1]) + 1,
                places=places,
                by_queries=own is not None,
                hidden=harm,
            )
        )
    return tuple(found)


def _prompt(engine: Engine, encoded: Encoded, media: Sequence[Shown]) -> tuple[Piece, ...]:
    """The prompt in stretches: each medium is one, each token of text another."""
    pieces: list[Piece] = []
    ids = encoded.ids.tolist()
    begin = 0
    ordered = sorted(range(len(media)), key=lambda number: media[number].first)
    for number in [*ordered, None]:
        end = len(ids) if number is None else media[number].first
        texts = texts_of(engine, ids[begin:end], special=True)
        at = begin
        for text, length in _whole(texts):
            pieces.append(Piece(text, at, at + length))
            at += length
        if number is not None:
            shown = media[number]
            pieces.append(Piece(shown.name, shown.first, shown.last, number))
            begin = shown.last
    return tuple(pieces)


def texts_of(engine: Engine, ids: Sequence[int], special: bool = False) -> list[str]:
    """The text that each token adds; joined, they are the text of all.

    A token that is a part of a character adds nothing, and the one that completes it the whole.

    Args:
        engine: whose tokenizer.
        ids: of the tokens.
        special: whether control words are written out.
    """
    texts: list[str] = []
    begin, before = 0, ""
    for end in range(1, len(ids) + 1):
        now = engine.tokenizer.decode(list(ids[begin:end]), skip_special_tokens=not special)
        if now.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        before = now
        if end - begin > 32:
            # Decoded afresh from a few tokens back: linear time, and what glues tokens has its neighbours.
            begin = end - 8
            before = engine.tokenizer.decode(list(ids[begin:end]), skip_special_tokens=not special)
    return texts


def _whole(texts: Sequence[str]) -> list[tuple[str, int]]:
    """Texts with how many tokens each is made of: those that add nothing belong to the next."""
    found, waiting = [], 0
    for number, text in enumerate(texts):
        waiting += 1
        if text or number + 1 == len(texts):
            found.append((text, waiting))
            waiting = 0
    return found


def _words(texts: Sequence[str]) -> tuple[Word, ...]:
    """Tokens up to the next one that begins with white space, or with a character of a script without it."""
    starts, at, before = [0], 0, ""
    for text, length in _whole(texts):
        begins = text and (text[0].isspace() or before[-1:].isspace() or _is_dense(text[0]))
        if begins and before.strip():
            starts.append(at)
            before = ""
        at, before = at + length, before + text
    return tuple(
        Word("".join(texts[first:last]), first, last) for first, last in pairwise([*starts, len(texts)])
    )


def _is_dense(character: str) -> bool:
    """Whether words of its script follow one another without white space: Chinese, Japanese, Thai."""
    return 0x0E00 <= ord(character) <= 0x0E7F or 0x3040 <= ord(character) <= 0x9FFF


def _token(engine: Engine, step: Step, text: str, top: int) -> Token:
    numbers: list[int] = step.logprobs_V.topk(min(top, len(step.logprobs_V))).indices.tolist()
    if step.token not in numbers:
        numbers.append(step.token)
    probability_V = step.logprobs_V.exp()
    guesses = tuple(
        Guess(number, engine.tokenizer.decode([number]), float(probability_V[number])) for number in numbers
    )
    return Token(step.token, text, float(probability_V[step.token]), guesses)
