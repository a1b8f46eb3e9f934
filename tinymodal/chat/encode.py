r"""A conversation becomes token ids, labels and pictures. The one path of training, evaluation and chat.

The template writes the whole conversation as one text and says which characters train; the text is tokenized
once, with character offsets; a token trains when all of its characters lie in a trained span. Nothing is
counted and no prefix is tokenized, so labels cannot slip against ids.

A token that straddles the border of a span does not train: where a tokenizer joins the newline of
``assistant\n`` with one that begins the answer, the joint token is neither prompt nor answer. Position 0
never trains (nothing precedes it), nor does a picture's placeholder.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby, pairwise, repeat
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from tinymodal.chat.template import AnyTemplate, Rendered, alternatives, template_for
from tinymodal.core.errors import CheckpointError, DataError
from tinymodal.core.types import IGNORE, ROLES, Encoded, Image, MediaItem, Sample, Text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tinymodal.model.processing_tinymodal import PreparedImage, TinyModalProcessor

TrainOn = Literal["answers", "all"]


class Piece(NamedTuple):
    """A stretch of a conversation as the model reads it, see :meth:`Encoder.explain`."""

    text: str
    """One token's characters, or ``[image: 27x27 -> 729 tokens]``."""
    trains: bool


class Encoder:
    """Sample -> Encoded, for one processor and one template.

    Safe to hand to worker processes. Make a new one after adding tokens to the tokenizer.
    """

    def __init__(
        self,
        processor: TinyModalProcessor,
        template: AnyTemplate | str,
        *,
        train_on: TrainOn = "answers",
        max_prompt_tokens: int | None = None,
        prepare: Callable[..., PreparedImage] | None = None,
    ) -> None:
        """Join them.

        Args:
            processor: has the tokenizer and prepares pictures.
            template: a bound template, or the name of one.
            train_on: ``answers``: the trained spans of the template. ``all``: every token but the first and
                the pictures, for teaching a new language model its language.
            max_prompt_tokens: longest conversation to reply to, the language model's context; None: any.
            prepare: reads a picture in place of ``processor.prepare``, with its arguments; a cache that knows
                what the tower made of it (``data/cache.py``).

        Raises:
            CheckpointError: the tokenizer has no offsets, or lacks a token that the template writes.
            RecipeError: nobody knows the template.
        """
        self.processor, self.train_on, self.max_prompt_tokens = processor, train_on, max_prompt_tokens
        self.prepare = prepare
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        try:
            self.template = template_for(template, self.tokenizer) if isinstance(template, str) else template
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        self._image_token: str = processor.image_token
        image_id: Any = processor.image_token_id
        self._image_id: int = image_id
        self._words = bare_tokenizer(self.tokenizer)

        added = self.tokenizer.added_tokens_decoder
        control = {self._image_token, *self.template.control}
        for word in sorted(control):
            if self._words.encode(word, add_special_tokens=False).ids != [self._words.token_to_id(word)]:
                raise CheckpointError(
                    f"template '{self.template.name}' needs {word!r} to be one token, and this tokenizer "
                    f"splits it; add it as a special token, or choose another template"
                )
        control |= {token.content for token in added.values() if token.special}
        self._forbidden = alternatives(sorted(control))
        self._control_ids = {self._words.token_to_id(word) for word in control}
        # A token with ``normalized=True`` is matched after normalization, where other spellings may have
        # become its own ("＜image＞" under NFKC); those are found by counting.
        self._counts_control = any(token.special and token.normalized for token in added.values())
        # A token with ``rstrip=True`` swallows the whitespace after it (Phi-3's <|end|>), which would make a
        # stop straddle the end of its span: only its own spelling decides.
        self._greedy = {i: token.content for i, token in added.items() if token.lstrip or token.rstrip}

    def using(
        self,
        template: AnyTemplate | str | None = None,
        train_on: TrainOn | None = None,
        prepare: Callable[..., PreparedImage] | None = None,
    ) -> Encoder:
        """The same processor with another template, other tokens that train, or another way to pictures."""
        return Encoder(
            self.processor,
            self.template if template is None else template,
            train_on=train_on or self.train_on,
            max_prompt_tokens=self.max_prompt_tokens,
            prepare=prepare or self.prepare,
        )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply: the template's stops, and the tokenizer's end of text."""
        ids = [self._words.token_to_id(stop) for stop in self.template.stops] + [self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def __call__(self, sample: Sample, *, reply: bool = False) -> Encoded:
        """What the model reads.

        Args:
            sample: a conversation. To train, its last turn is the assistant's; to reply, the user's.
            reply: end where the assistant's words begin; nothing trains.

        Raises:
            DataError: names the sample, and the turn or the picture that is wrong with it.
        """
        prepared = self._prepare(sample, reply)
        ids, labels = self._numbers(sample, reply, prepared)
        parts: tuple[int, ...] = ()
        if sample.rejected is not None and not reply:
            worse = replace(sample, messages=sample.rejected, rejected=None)
            check_turns(worse, reply, self.template)
            self._check_words(worse)
            worse_ids, worse_labels = self._numbers(worse, reply, prepared)
            parts = len(ids), len(worse_ids)
            ids, labels = ids + worse_ids, labels + worse_labels
        if reply and self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            raise DataError(
                f"{sample.id}: the conversation takes {len(ids):,} tokens and the model reads at most "
                f"{self.max_prompt_tokens:,}; start a new one, or use fewer pictures."
            )
        media = tuple(
            self._item(sample, n, image, part)
            for n, (image, part) in enumerate(zip(prepared, sample.media(), strict=True), 1)
        )
        return Encoded(tensor(ids), tensor(labels), media, sample.id, parts)

    def _numbers(
        self, sample: Sample, reply: bool, prepared: Sequence[PreparedImage]
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of one conversation whose pictures are prepared."""
        _, ids, labels, _ = self._tokenize(sample, reply, len(prepared))
        if prepared:
            ids, labels = self._expand(ids, labels, [image.tokens for image in prepared])
        if ids:
            labels[0] = IGNORE
        if not reply and all(label == IGNORE for label in labels):
            raise DataError(f"{sample.id}: nothing trains; at least one assistant turn must have train on.")
        return ids, labels

    def explain(self, sample: Sample, *, reply: bool = False) -> list[Piece]:
        """The same conversation for the eye: every character in order, and whether it trains.

        Tokens that share a character (the bytes of an emoji) are one piece. Raises as :meth:`__call__` does.
        """
        prepared = self._prepare(sample, reply)
        text, ids, labels, offsets = self._tokenize(sample, reply, len(prepared))
        if ids and not prepared:
            labels[0] = IGNORE
        images = iter(prepared)
        pieces: list[Piece] = []
        # A token's characters reach to where the next token with characters of its own begins.
        starts = [
            i
            for i, (begin, end) in enumerate(offsets)
            if end > begin and (i == 0 or begin >= offsets[i - 1][1])
        ]
        for i, following in pairwise([*starts, len(ids)]):
            upto = offsets[following][0] if following < len(ids) else len(text)
            begin = offsets[i][0] if pieces else 0
            if ids[i] == self._image_id:
                pieces.append(Piece(picture(next(images)), False))
            else:
                pieces.append(Piece(text[begin:upto], labels[i] != IGNORE))
        return pieces

    def _prepare(self, sample: Sample, reply: bool) -> list[PreparedImage]:
        """Check the turns and read the pictures."""
        check_turns(sample, reply, self.template)
        self._check_words(sample)
        prepare = self.prepare or self.processor.prepare
        prepared = []
        for n, part in enumerate(sample.media(), 1):
            try:
                prepared.append(
                    prepare(part.source, number=n - 1, max_tiles=part.max_tiles, fit_pixels=part.fit_pixels)
                )
            except (ValueError, OSError) as error:
                raise DataError(f"{sample.id}: picture {n}: {error}") from error
        return prepared

    def _check_words(self, sample: Sample) -> None:
        """Refuse texts that a tokenizer would read as more than text."""
        if self._forbidden is None:
            return
        for n, message in enumerate(sample.messages, 1):
            # Joined, because two texts may spell one word together; a picture keeps its neighbours apart.
            words = "".join(part.text if isinstance(part, Text) else "\0" for part in message.parts)
            found = self._forbidden.search(words)
            if found:
                advice = (
                    "Pictures are Image(...) parts, in their place among the texts."
                    if found.group() == self._image_token
                    else "It is a control token of this model and may not be written as text; take it out."
                )
                raise DataError(
                    f"{sample.id}: message {n} ({message.role}) contains {found.group()!r}. {advice}"
                )

    def _tokenize(
        self, sample: Sample, reply: bool, num_images: int
    ) -> tuple[str, list[int], list[int], list[tuple[int, int]]]:
        """Text, ids, labels and offsets; each picture is still one token."""
        try:
            rendered = self.template.render(sample.messages, repeat(self._image_token), reply)
        except ValueError as error:
            raise DataError(f"{sample.id}: {error}.") from error
        text = rendered.text
        try:
            encoding = self._words.encode(text, add_special_tokens=False)
        except TypeError as error:
            broken = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
            if broken is None:
                raise
            raise DataError(
                f"{sample.id}: the text holds half a character (U+{ord(broken):04X}), which no encoding can "
                f"write; it was cut inside an emoji or decoded wrongly. Mend the row."
            ) from error
        ids, offsets = encoding.ids, encoding.offsets
        if self._greedy:
            offsets = [self._own_span(text, i, span) for i, span in zip(ids, offsets, strict=True)]
        if ids.count(self._image_id) != num_images:
            raise DataError(
                f"{sample.id}: {num_images} pictures but {ids.count(self._image_id)} places for them in the "
                f"text that template '{self.template.name}' wrote."
            )
        if self._counts_control and self._forbidden is not None:
            written = len(self._forbidden.findall(text))
            found = sum(i in self._control_ids for i in ids)
            if found > written:
                raise DataError(
                    f"{sample.id}: a text becomes a control token when the tokenizer normalizes it "
                    f"(full-width letters, for instance); take it out."
                )
            if found < written:
                raise CheckpointError(
                    f"{sample.id}: the tokenizer reads {found} control tokens where template "
                    f"'{self.template.name}' wrote {written}: it looks for them in normalized text. Set "
                    f"'normalized' to false for them in its tokenizer.json."
                )
        return text, ids, self._labels(rendered, ids, offsets, reply), offsets

    def _labels(
        self, rendered: Rendered, ids: list[int], offsets: Sequence[tuple[int, int]], reply: bool
    ) -> list[int]:
        """Label i is id i if its characters lie inside a span."""
        labels = [IGNORE] * len(ids)
        if reply:
            return labels
        spans = rendered.spans if self.train_on == "answers" else ((0, len(rendered.text)),)
        for begin, end in spans:
            first = bisect_left(offsets, begin, key=lambda span: span[0])
            last = bisect_right(offsets, end, key=lambda span: span[1])
            # A token without characters of its own (a space the tokenizer put in) belongs to what follows it.
            while first > 0 and offsets[first - 1] == (begin, begin):
                first -= 1
            while last > first and offsets[last - 1] == (end, end):
                last -= 1
            labels[first:last] = ids[first:last]
        if self._image_id in ids:
            labels = [IGNORE if label == self._image_id else label for label in labels]
        return labels

    def _own_span(self, text: str, token_id: int, span: tuple[int, int]) -> tuple[int, int]:
        content = self._greedy.get(token_id)
        at = text.find(content, *span) if content else -1
        return (at, at + len(content)) if content and at >= 0 else span

    def _expand(
        self, ids: list[int], labels: list[int], counts: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Each picture's one token becomes as many as the picture takes. Equal to writing it so, by test."""
        full_ids: list[int] = []
        full_labels: list[int] = []
        begin = 0
        for count in counts:
            at = ids.index(self._image_id, begin)
            full_ids += ids[begin:at]
            full_ids += [self._image_id] * count
            full_labels += labels[begin:at]
            full_labels += [IGNORE] * count
            begin = at + 1
        return full_ids + ids[begin:], full_labels + labels[begin:]

    def _item(self, sample: Sample, n: int, image: PreparedImage, part: Image) -> MediaItem:
        targets = None
        if part.targets is not None:
            if len(part.targets) != image.tokens:
                raise DataError(
                    f"{sample.id}: picture {n} has targets for {len(part.targets)} tokens but takes "
                    f"{image.tokens} ({'x'.join(map(str, image.grid))}); make them for this tower and "
                    f"connector."
                )
            targets = torch.tensor(part.targets)
        return MediaItem(
            "image",
            image.tiles,
            image.grid,
            image.tokens,
            image.patches,
            targets,
            image.tile_tokens,
            None if image.order is None else tensor(image.order),
            image.seen,
            image.key,
        )


def tensor(numbers: list[int]) -> Tensor:
    """int64 [T]."""
    # By way of numpy: a third of torch.tensor's time, which shows at 1,000 samples a second.
    return torch.from_numpy(np.array(numbers, dtype=np.int64))


def check_turns(sample: Sample, reply: bool, template: AnyTemplate) -> None:
    """Refuse conversations nobody can learn from or reply to.

    Raises:
        DataError: no messages; an unknown role; a system turn that is not the first; two turns of one side
            in a row; the wrong side at the end; an answer without words.
    """
    if not sample.messages:
        raise DataError(f"{sample.id}: the conversation is empty; it needs a user's and an assistant's turn.")
    # A caption needs no question.
    expected = "user" if not getattr(template, "captions_only", False) else None
    for n, message in enumerate(sample.messages, 1):
        role = message.role
        if role not in ROLES:
            raise DataError(f"{sample.id}: message {n} has the role {role!r}; known: {', '.join(ROLES)}.")
        if role == "system":
            if n > 1:
                raise DataError(
                    f"{sample.id}: message {n} is from the system, which may only open a conversation."
                )
            continue
        if expected is not None and role != expected:
            found = (
                "the conversation begins with the assistant"
                if expected == "user" and n == first_turn(sample)
                else f"two {role} turns in a row"
            )
            raise DataError(
                f"{sample.id}: message {n}: {found}; turns alternate, the user begins. Join the two, or put "
                f"the missing turn between them."
            )
        expected = "assistant" if role == "user" else "user"
        if (
            role == "assistant"
            and message.trains
            and not reply
            and not any(isinstance(part, Text) and part.text for part in message.parts)
        ):
            raise DataError(f"{sample.id}: message {n}: the answer has no words; take the row out.")
    last = sample.messages[-1].role
    if reply and last != "user":
        raise DataError(f"{sample.id}: to reply, the conversation must end with the user, found {last}.")
    if not reply and last != "assistant":
        raise DataError(
            f"{sample.id}: the conversation ends with the {last}, so its last turn has no answer to learn; "
            f"add the assistant's turn or take the last one out."
        )


def first_turn(sample: Sample) -> int:
    """Number of the first message that is not the system's, from 1."""
    return 2 if sample.messages[0].role == "system" else 1


def picture(image: PreparedImage) -> str:
    """``[image: 6x6 -> 9 tokens]``: the tower's grid, and what the connector makes of it.

    A picture of several tiles is ``[image: 5 of 24x24 -> 2,340 tokens]``.
    """
    return f"[image: {seen_by_tower(image.feature_grids)} -> {image.tokens:,} tokens]"


def seen_by_tower(feature_grids: Sequence[tuple[int, ...]]) -> str:
    """The grids of a picture's tiles in words, equal neighbours together: ``5 of 24x24``."""
    runs = [("x".join(map(str, grid)), len(list(same))) for grid, same in groupby(feature_grids)]
    return " + ".join(grid if same == 1 else f"{same} of {grid}" for grid, same in runs)


def bare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer's own words without what surrounds them: no template, no truncation, no padding.

    Shares the vocabulary. A post-processor is left out because ByteLevel's trims spaces off the offsets;
    setting truncation or padding on the original, which others may do at any time, does not reach it.

    Raises:
        CheckpointError: the tokenizer is a slow one, without offsets.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise CheckpointError(
            f"{type(tokenizer).__name__} cannot tell which characters a token stands for; a model needs a "
            f"fast tokenizer (a folder with tokenizer.json)"
        )
    bare = Tokenizer(backend.model)
    if backend.normalizer is not None:
        bare.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        bare.pre_tokenizer = backend.pre_tokenizer
    added = backend.get_added_tokens_decoder()
    bare.add_tokens([added[i] for i in sorted(added)])
    if bare.get_added_tokens_decoder().keys() != added.keys():
        # Ids with gaps cannot be given again in order; a full copy keeps them.
        bare = Tokenizer.from_str(backend.to_str())
        bare.no_truncation()
        bare.no_padding()
    return bare
