r"""A conversation becomes token ids, labels, pictures and sounds. The one path of training, evaluation, chat.

The template writes the whole conversation as one text and says which characters train; the text is tokenized
once, with character offsets; a token trains when all of its characters lie in a trained span. Nothing is
counted and no prefix is tokenized, so labels cannot slip against ids.

A token that straddles the border of a span does not train: where a tokenizer joins the newline of
``assistant\n`` with one that begins the answer, the joint token is neither prompt nor answer. Position 0
never trains (nothing precedes it), nor does the placeholder of a picture or a sound.

How an answer sounds (``Speech``) is not among the tokens. Where it is wanted, it is listed beside them, with
the stretch of tokens that it speaks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from tinymodal.chat.template import AnyTemplate, Rendered, alternatives, template_for
from tinymodal.chat.turns import WORDS, Speaking, check_turns, kind_of, numbered, turn_number
from tinymodal.core.errors import CheckpointError, DataError
from tinymodal.core.types import (
    IGNORE,
    Encoded,
    Image,
    MediaItem,
    Medium,
    Sample,
    Speech,
    SpeechItem,
    Text,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tinymodal.model.layout import Prepared
    from tinymodal.model.processing_tinymodal import TinyModalProcessor

TrainOn = Literal["answers", "all"]


class Piece(NamedTuple):
    """A stretch of a conversation as the model reads it, see :meth:`Encoder.explain`."""

    text: str
    """One token's characters, ``[image: 27x27 -> 729 tokens]`` or ``[audio: 2.0 s, 100 positions -> 25
    tokens]``."""
    trains: bool


class Written(NamedTuple):
    """A conversation after template and tokenizer; each picture or sound is still one token."""

    text: str
    ids: list[int]
    labels: list[int]
    offsets: list[tuple[int, int]]
    """Characters of each token."""
    spans: tuple[tuple[int, int], ...]
    """Tokens of each turn that trains, first and one past the last."""


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
        prepare: Callable[..., Prepared] | None = None,
        prepare_sound: Callable[..., Prepared] | None = None,
        speech: Speaking | None = None,
    ) -> None:
        """Join them.

        Args:
            processor: has the tokenizer and prepares pictures and sounds.
            template: a bound template, or the name of one.
            train_on: ``answers``: the trained spans of the template. ``all``: every token but the first and
                the placeholders, for teaching a new language model its language.
            max_prompt_tokens: longest conversation to reply to, the language model's context; None: any.
            prepare: reads a picture in place of ``processor.prepare``, with its arguments; a cache that knows
                what the tower made of it (``data/cache.py``).
            prepare_sound: the same for sounds, in place of ``processor.prepare_sound``.
            speech: how answers sound is to be learned: each turn that trains and has a ``Speech`` part is
                listed with its sound. None: these parts are passed over and their sounds never read.

        Raises:
            CheckpointError: the tokenizer has no offsets, or lacks a token that the template writes.
            RecipeError: nobody knows the template.
        """
        self.processor, self.train_on, self.max_prompt_tokens = processor, train_on, max_prompt_tokens
        self.prepare, self.prepare_sound, self.speech = prepare, prepare_sound, speech
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        try:
            self.template = template_for(template, self.tokenizer) if isinstance(template, str) else template
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        image_id: Any = processor.image_token_id
        audio_id: Any = processor.audio_token_id
        self._tokens = {"image": processor.image_token}
        self._ids: dict[str, int] = {"image": image_id}
        if audio_id is not None:
            self._tokens["audio"], self._ids["audio"] = processor.audio_token, audio_id
        self._words = bare_tokenizer(self.tokenizer)

        added = self.tokenizer.added_tokens_decoder
        control = {*self._tokens.values(), *self.template.control}
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
        prepare: Callable[..., Prepared] | None = None,
        prepare_sound: Callable[..., Prepared] | None = None,
        speech: Speaking | None = None,
    ) -> Encoder:
        """The same processor, and something else of what :meth:`__init__` takes; None: as it is."""
        return Encoder(
            self.processor,
            self.template if template is None else template,
            train_on=train_on or self.train_on,
            max_prompt_tokens=self.max_prompt_tokens,
            prepare=prepare or self.prepare,
            prepare_sound=prepare_sound or self.prepare_sound,
            speech=speech or self.speech,
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
            DataError: names the sample, and the turn, the picture or the sound that is wrong with it.
        """
        prepared = self._prepare(sample, reply)
        written = self._tokenize(sample, reply, prepared)
        ids, labels = self._numbers(sample, reply, prepared, written)
        speech = () if reply or self.speech is None else self._speech(sample, prepared, written)
        parts: tuple[int, ...] = ()
        if sample.rejected is not None and not reply:
            worse = replace(sample, messages=sample.rejected, rejected=None)
            check_turns(worse, reply, self.template)
            self._check_words(worse)
            worse_ids, worse_labels = self._numbers(
                worse, reply, prepared, self._tokenize(worse, reply, prepared)
            )
            parts = len(ids), len(worse_ids)
            ids, labels = ids + worse_ids, labels + worse_labels
        if reply and self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            raise DataError(
                f"{sample.id}: the conversation takes {len(ids):,} tokens and the model reads at most "
                f"{self.max_prompt_tokens:,}; start a new one, or use fewer pictures and sounds."
            )
        media = tuple(
            self._item(sample, name, found, part)
            for (name, part), found in zip(numbered(sample), prepared, strict=True)
        )
        return Encoded(tensor(ids), tensor(labels), media, sample.id, parts, speech=speech)

    def _numbers(
        self, sample: Sample, reply: bool, prepared: Sequence[Prepared], written: Written
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of one conversation whose media are prepared."""
        ids, labels = written.ids, written.labels
        if prepared:
            ids, labels = self._expand(ids, labels, sample, [found.tokens for found in prepared])
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
        text, ids, labels, offsets, _ = self._tokenize(sample, reply, prepared)
        if ids:
            labels[0] = IGNORE
        media = (
            f"[{kind_of(part)}: {costs(found)} tokens]"
            for part, found in zip(sample.media(), prepared, strict=True)
        )
        places = set(self._ids.values())
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
            if ids[i] in places:
                pieces.append(Piece(next(media), False))
            else:
                pieces.append(Piece(text[begin:upto], labels[i] != IGNORE))
        return pieces

    def _prepare(self, sample: Sample, reply: bool) -> list[Prepared]:
        """Check the turns, and read the pictures and sounds."""
        check_turns(sample, reply, self.template)
        self._check_words(sample)
        see, hear = self.prepare or self.processor.prepare, self.prepare_sound or self.processor.prepare_sound
        prepared: list[Prepared] = []
        pictures = 0
        for name, part in numbered(sample):
            try:
                if isinstance(part, Image):
                    limits = {"max_tiles": part.max_tiles, "fit_pixels": part.fit_pixels}
                    prepared.append(see(part.source, number=pictures, **limits))
                    pictures += 1
                else:
                    stretch = {"start_s": part.start_s, "end_s": part.end_s, "change": part.change}
                    prepared.append(hear(part.source, part.rate_hz, **stretch))
            except (ValueError, OSError) as error:
                raise DataError(f"{sample.id}: {name}: {error}") from error
        return prepared

    def _check_words(self, sample: Sample) -> None:
        """Refuse texts that a tokenizer would read as more than text."""
        if self._forbidden is None:
            return
        for n, message in enumerate(sample.messages, 1):
            # Joined, because two texts may spell one word together; a picture keeps its neighbours apart,
            # and speech, which is not written, does not.
            words = "".join(
                part.text if isinstance(part, Text) else "\0"
                for part in message.parts
                if not isinstance(part, Speech)
            )
            found = self._forbidden.search(words)
            if found:
                advice = {
                    self._tokens["image"]: "Pictures are Image(...) parts, in their place among the texts.",
                    self._tokens.get("audio"): "Sounds are Audio(...) parts, in their place among the texts.",
                }.get(
                    found.group(),
                    "It is a control token of this model and may not be written as text; take it out.",
                )
                raise DataError(
                    f"{sample.id}: message {n} ({message.role}) contains {found.group()!r}. {advice}"
                )

    def _tokenize(self, sample: Sample, reply: bool, prepared: Sequence[Prepared]) -> Written:
        """What template and tokenizer make of a conversation that shows and plays what is prepared."""
        kinds: list[str] = [kind_of(part) for part in sample.media()]
        try:
            rendered = self.template.render(
                sample.messages, iter([self._tokens[kind] for kind in kinds]), reply
            )
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
        for kind, place in self._ids.items():
            expected = kinds.count(kind)
            if ids.count(place) != expected:
                raise DataError(
                    f"{sample.id}: {expected} {WORDS[kind]}s but {ids.count(place)} places for them in the "
                    f"text that template '{self.template.name}' wrote."
                )
        if len(kinds) != len(prepared):
            raise DataError(
                f"{sample.id}: the answers to choose between show {len(prepared)} and {len(kinds)} pictures "
                f"and sounds; expected the same ones. Mend the row"
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
        spans = () if reply else tuple(tokens_within(span, offsets) for span in rendered.spans)
        return Written(text, ids, self._labels(rendered, ids, offsets, reply, spans), offsets, spans)

    def _labels(
        self,
        rendered: Rendered,
        ids: list[int],
        offsets: Sequence[tuple[int, int]],
        reply: bool,
        spans: Sequence[tuple[int, int]],
    ) -> list[int]:
        """Label i is id i if its characters lie inside a span."""
        labels = [IGNORE] * len(ids)
        if reply:
            return labels
        if self.train_on == "all":
            spans = [tokens_within((0, len(rendered.text)), offsets)]
        for first, last in spans:
            labels[first:last] = ids[first:last]
        for place in self._ids.values():
            if place in ids:
                labels = [IGNORE if label == place else label for label in labels]
        return labels

    def _own_span(self, text: str, token_id: int, span: tuple[int, int]) -> tuple[int, int]:
        content = self._greedy.get(token_id)
        at = text.find(content, *span) if content else -1
        return (at, at + len(content)) if content and at >= 0 else span

    def _expand(
        self, ids: list[int], labels: list[int], sample: Sample, counts: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Each medium's one token becomes as many as it takes. Equal to writing it so, by test."""
        full_ids: list[int] = []
        full_labels: list[int] = []
        begin = 0
        for part, count in zip(sample.media(), counts, strict=True):
            place = self._ids[kind_of(part)]
            at = ids.index(place, begin)
            full_ids += ids[begin:at]
            full_ids += [place] * count
            full_labels += labels[begin:at]
            full_labels += [IGNORE] * count
            begin = at + 1
        return full_ids + ids[begin:], full_labels + labels[begin:]

    def _speech(
        self, sample: Sample, prepared: Sequence[Prepared], written: Written
    ) -> tuple[SpeechItem, ...]:
        """The sounds of the answers that train, each with its stretch of the sample's tokens."""
        assert self.speech is not None
        # A turn that trains and writes nothing has no span; an answer always has words.
        trained = [m for m in sample.messages if m.trains]
        if not any(isinstance(part, Speech) for m in trained for part in m.parts):
            return ()
        if len(trained) != len(written.spans):
            raise DataError(
                f"{sample.id}: {len(trained)} turns train and template '{self.template.name}' writes "
                f"{len(written.spans)}, so which of them is spoken cannot be told; take the empty turns out."
            )
        places = set(self._ids.values())
        at = [i for i, token in enumerate(written.ids) if token in places]
        spoken = []
        for message, (first, last) in zip(trained, written.spans, strict=True):
            part = next((part for part in message.parts if isinstance(part, Speech)), None)
            if part is None:
                continue
            number = turn_number(sample, message)
            if any(first <= i < last for i in at):
                raise DataError(
                    f"{sample.id}: message {number}: a spoken answer shows or plays something itself; take "
                    f"the picture or the sound out of it, or its Speech part."
                )
            before = sum(found.tokens - 1 for i, found in zip(at, prepared, strict=True) if i < first)
            # Nothing precedes position 0, so nothing predicts it.
            first, last = max(first + before, 1), last + before
            if first >= last:
                raise DataError(f"{sample.id}: message {number}: the spoken answer has no token of its own.")
            spoken.append(self._spoken(sample, number, part, first, last))
        return tuple(spoken)

    def _spoken(self, sample: Sample, number: int, part: Speech, first: int, last: int) -> SpeechItem:
        from tinymodal.model.audio import load_sound

        assert self.speech is not None
        try:
            voice = self.speech.number(part.voice)
            wave = load_sound(
                part.source,
                part.rate_hz,
                part.start_s,
                part.end_s,
                max_s=self.speech.max_s,
                to_hz=self.speech.rate_hz,
            )
        except (ValueError, OSError) as error:
            raise DataError(f"{sample.id}: speech of message {number}: {error}") from error
        return SpeechItem(first, last, wave, voice=voice)

    def _item(self, sample: Sample, name: str, found: Prepared, part: Medium) -> MediaItem:
        targets = None
        if isinstance(part, Image) and part.targets is not None:
            if len(part.targets) != found.tokens:
                raise DataError(
                    f"{sample.id}: {name} has targets for {len(part.targets)} tokens but takes "
                    f"{found.tokens} ({'x'.join(map(str, found.grid))}); make them for this tower and "
                    f"connector."
                )
            targets = torch.tensor(part.targets)
        return MediaItem(
            kind_of(part),
            found.tiles,
            found.grid,
            found.tokens,
            found.patches,
            targets,
            found.tile_tokens,
            None if found.order is None else tensor(found.order),
            found.seen,
            found.key,
        )


def tokens_within(span: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The tokens whose characters lie inside a span: the first, and one past the last."""
    begin, end = span
    first = bisect_left(offsets, begin, key=lambda token: token[0])
    last = bisect_right(offsets, end, key=lambda token: token[1])
    # A token without characters of its own (a space the tokenizer put in) belongs to what follows it.
    while first > 0 and offsets[first - 1] == (begin, begin):
        first -= 1
    while last > first and offsets[last - 1] == (end, end):
        last -= 1
    return first, last


def tensor(numbers: Sequence[int]) -> Tensor:
    """int64 [T]."""
    # By way of numpy: a third of torch.tensor's time, which shows at 1,000 samples a second.
    return torch.from_numpy(np.array(numbers, dtype=np.int64))


def costs(found: Prepared) -> str:
    """``6x6 -> 9``: the tower's grid, and what the connector makes of it.

    A picture of several tiles is ``5 of 24x24 -> 2,340``, a sound ``2.0 s, 100 positions -> 25``.
    """
    if found.seconds is None:
        return f"{seen_by_tower(found.feature_grids)} -> {found.tokens:,}"
    return f"{found.seconds:.1f} s, {found.patches:,} positions -> {found.tokens:,}"


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
