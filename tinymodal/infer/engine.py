"""Samples in, replies out: batched, greedy by default, or as a stream of words and sound.

One decoding loop serves both, so a streamed reply is the batched reply. Prompts go through the encoder that
training used; rows are padded on the left and numbered from their own first token, so a sample's reply does
not depend on its neighbours. A row that has stopped leaves the batch.

A model with a speech head says its replies aloud where that is asked. The head listens to the decoding and
has no say in it: the text is the same. In a stream its sound comes between the words, as soon as it can be
heard and before the text is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinymodal.core.errors import DataError
from tinymodal.core.memory import hold_memory
from tinymodal.core.threads import on_one_core
from tinymodal.core.types import Audio, Encoded, Image, Sample
from tinymodal.infer.answer import Answer, AudioDelta, Reply, TextDelta, Writer
from tinymodal.infer.beams import Beams
from tinymodal.infer.decoding import Group, Language, Step
from tinymodal.infer.grammar import Grammars
from tinymodal.infer.kept import Kept, Reading
from tinymodal.infer.logprobs import TokenLogprob
from tinymodal.infer.sampling import GREEDY, Sampling, choose
from tinymodal.infer.speaking import Mouth, Utterance, Voice

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed

__all__ = [
    "GREEDY", "AudioDelta", "Engine", "Reply", "Sampling", "TextDelta", "TokenLogprob", "Voice",
]  # fmt: skip

# Shapes: B rows, D width, V vocabulary.

WINDOW = 8
"""Batches encoded at once and sorted by length: more means less padding and more media in memory."""
WINDOW_PIXELS = 1 << 25
"""Pixels of prepared tiles after which a window takes no further batch: 400 MB in float32. Three numbers of a
prepared sound are as much."""


class Engine:
    """A composed model that answers.

    Args:
        composed: model and encoder of ``compose.build.load``. The model is put into eval mode for every reply
            and each of its modules back into its own after it, so an engine may also be lent a model that is
            being trained.
        prefix_mb: so much of what was read is kept for the next question, see :meth:`keep`. 0 is right for a
            model that is being trained: what was read before a step is wrong after it.
    """

    def __init__(self, composed: Composed, prefix_mb: int = 0) -> None:
        self.composed = composed
        self.model: Any = composed.model
        self.encoder = composed.encoder
        self.tokenizer: Any = composed.encoder.tokenizer
        self.places: dict[str, tuple[str, int]] = _places(composed)
        """Kind of media -> its placeholder, as text and as token."""
        self.stop_ids = frozenset(composed.encoder.stop_ids)
        self.room: int | None = composed.encoder.max_prompt_tokens
        """Positions the language model was made for, prompt and reply together; None: any number."""
        # A stop that is plain text, such as "###", may come in any tokens and is looked for in the text.
        self.stop_words = tuple(composed.encoder.template.stop_words)
        self.kept = Kept(0)
        if prefix_mb:
            self.keep(prefix_mb)
        if self.model.device.type == "cpu":
            hold_memory()

    def keep(self, mb: int) -> None:
        """Remember up to so many megabytes of what is read: prepared media, embeddings, keys and values.

        The next turn of a conversation then costs its new words only. Call :meth:`forget` when weights
        change.
        """
        self.kept = Kept(mb)
        encoder, processor = self.composed.encoder, self.composed.encoder.processor
        self.encoder = encoder.using(
            prepare=Reading(self.kept, encoder.prepare or processor.prepare, "image"),
            prepare_sound=Reading(self.kept, encoder.prepare_sound or processor.prepare_sound, "audio"),
        )

    def forget(self) -> None:
        """Let go of all that :meth:`keep` remembered."""
        self.kept.clear()

    def reply(
        self,
        samples: Sequence[Sample],
        sampling: Sampling = GREEDY,
        batch_size: int = 32,
        done: Callable[[int], None] | None = None,
        speak: bool = False,
        voice: Voice = None,
    ) -> list[Reply]:
        """A reply to each sample, in their order.

        Args:
            samples: conversations that end with the user's turn.
            sampling: how tokens are chosen.
            batch_size: rows that are decoded together.
            done: called with the number of replies each time some are finished.
            speak: say them aloud as well.
            voice: in which.

        Raises:
            DataError: a sample cannot be encoded, or is longer than the model can read; or no such voice.
            CheckpointError: the model does not speak.
        """
        say = self.saying(sampling, voice) if speak else None
        replies: list[Reply] = []
        for encoded in self._windows(samples, batch_size):
            order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
            found: dict[int, Reply] = {}
            for first in range(0, len(order), batch_size):
                rows = order[first : first + batch_size]
                batch = [encoded[i] for i in rows]
                found |= zip(rows, self._reply_batch(batch, sampling, say), strict=True)
                if done is not None:
                    done(len(rows))
            replies += [found[i] for i in range(len(encoded))]
        return replies

    def stream(
        self, sample: Sample, sampling: Sampling = GREEDY, speak: bool = False, voice: Voice = None
    ) -> Iterator[TextDelta | AudioDelta]:
        """The reply in pieces as it grows; joined, they are :meth:`reply`'s text, and its sound.

        Args:
            sample: a conversation that ends with the user's turn.
            sampling: how tokens are chosen. Beams give their text in one piece.
            speak: say it aloud as well: sound comes between the words, from before the text is over.
            voice: in which.

        Raises:
            DataError: as :meth:`reply`, before the first piece.
            CheckpointError: the model does not speak.
        """
        aloud = self.saying(sampling, voice)() if speak else None
        answer = self.answer(self.encode(sample), sampling)
        for step in self._decode([answer], self.kept):
            if (delta := answer.fresh()) is not None:
                yield delta
            if aloud is not None and answer.words:
                # The stop is heard too: with it the head knows that nothing follows.
                yield from self.audible(aloud.feed(step.states_BD, step.tokens_B))
        if aloud is not None and answer.words:
            for samples in aloud.rest():
                yield from self.audible(samples)

    def encode(self, sample: Sample) -> Encoded:
        """The sample as a prompt: up to where the reply begins.

        Raises:
            DataError: it cannot be encoded, or leaves the model no room for a reply.
        """
        encoded: Encoded = self.encoder(sample, reply=True)
        if (room := self.room) is not None and len(encoded) >= room:
            raise DataError(
                f"{sample.id}: the conversation takes {len(encoded)} tokens, the model reads at most {room} "
                f"with its reply; shorten it or begin a new one."
            )
        return encoded

    # Speech

    @cached_property
    def mouth(self) -> Mouth:
        """The speech head and its codec.

        Raises:
            CheckpointError: the model does not speak.
        """
        return Mouth(self.composed)

    def saying(self, sampling: Sampling, voice: Voice) -> Callable[[], Utterance]:
        """What begins an answer aloud.

        Raises:
            CheckpointError: the model does not speak.
            DataError: no such voice, or a way to choose that cannot be spoken.
        """
        mouth = self.mouth
        known = mouth.known(voice)
        if sampling.num_beams > 1:
            raise DataError("a reply that is spoken is chosen word by word; take num_beams = 1")

        def say() -> Utterance:
            return mouth.begin(known, sampling.speech_temperature, sampling.speech_top_k, sampling.seed)

        say()  # what is wrong with the choice is told before the first reply
        return say

    def audible(self, samples: Tensor) -> Iterator[AudioDelta]:
        """A piece of sound, if it is one."""
        if len(samples):
            yield AudioDelta(samples, self.mouth.codec.rate_hz)

    # Decoding

    @cached_property
    def language(self) -> Language:
        """The model as decoding needs it."""
        pad = self.tokenizer.pad_token_id
        ids = {kind: number for kind, (_, number) in self.places.items()}
        return Language(self.model, ids, self.stop_ids, pad if pad is not None else next(iter(self.stop_ids)))

    def answer(self, encoded: Encoded, sampling: Sampling) -> Answer:
        """A reply to a prompt, before its first token."""
        writer = Writer(self.tokenizer, self.stop_ids, self.stop_words, self.places)
        asked = sampling.json_schema
        return Answer(
            writer, encoded, sampling, self.room, self.grammars.begin(str(asked)) if asked else None
        )

    @cached_property
    def grammars(self) -> Grammars:
        """What holds replies to JSON schemas.

        Raises:
            DataError: this model's cannot be.
        """
        return Grammars(self.tokenizer, self.stop_ids)

    def open(self, answers: Sequence[Answer], kept: Kept | None = None) -> Group:
        """Begin to decode some answers together: their first tokens. An answer with beams comes alone."""
        kind = Beams if answers[0].sampling.num_beams > 1 else Group
        # Looked up with each step, so that it can be replaced.
        return kind.open(self.language, answers, lambda *given: self._choose(*given), kept)

    def prompt(self, encoded: Encoded) -> str:
        """The prompt as text, placeholders as ``[image: 9 tokens]`` or ``[audio: 25 tokens]``."""
        return Writer(self.tokenizer, self.stop_ids, self.stop_words, self.places).prompt(encoded)

    def _windows(self, samples: Sequence[Sample], batch_size: int) -> Iterator[list[Encoded]]:
        """The encoded samples in stretches of whole batches, see ``WINDOW`` and ``WINDOW_PIXELS``."""
        window: list[Encoded] = []
        pixels = 0
        # Pictures and sounds are decoded side by side, where torch computes side by side.
        num = max(1, min(torch.get_num_threads(), batch_size))
        with ThreadPoolExecutor(num, initializer=on_one_core) as readers:
            waiting = iter(samples)
            while batch := list(islice(waiting, batch_size)):
                # What is decoded already takes threads longer than it takes one: they wait for each other.
                many = len(batch) > 1 and any(_is_read(sample) for sample in batch)
                read = list((readers.map if many else map)(self.encode, batch))
                window += read
                pixels += sum(tile.numel() // 3 for row in read for item in row.media for tile in item.tiles)
                if len(window) >= batch_size * WINDOW or pixels >= WINDOW_PIXELS:
                    yield window
                    window, pixels = [], 0
        if window:
            yield window

    def _reply_batch(
        self, rows: Sequence[Encoded], sampling: Sampling, say: Callable[[], Utterance] | None = None
    ) -> list[Reply]:
        answers = [self.answer(row, sampling) for row in rows]
        states: dict[int, list[Tensor]] = {id(answer): [] for answer in answers}
        together = [[answer] for answer in answers] if sampling.num_beams > 1 else [answers]
        for group in together:
            for step in self._decode(group, self.kept):
                if say is not None:
                    for answer, state_1D in zip(step.answers, step.states_BD.split(1), strict=True):
                        states[id(answer)].append(state_1D)
        if say is None:
            return [answer.reply() for answer in answers]
        rate_hz = self.mouth.codec.rate_hz
        return [answer.reply(self._aloud(say, states[id(answer)], answer), rate_hz) for answer in answers]

    def _aloud(self, say: Callable[[], Utterance], states: Sequence[Tensor], answer: Answer) -> Tensor:
        """A whole reply as a sound, float32 [samples]."""
        if not answer.words:
            return torch.zeros(0)
        aloud, states_nD = say(), torch.cat(list(states))
        begun = aloud.feed(states_nD, torch.tensor(answer.ids, device=states_nD.device))
        return torch.cat([begun, *aloud.rest()])

    def _decode(self, answers: Sequence[Answer], kept: Kept | None = None) -> Iterator[Step]:
        """Yield the next token of every answer that is not over, until all are."""
        training = [module for module in _modules(self.model) if module.training]
        for module in training:
            module.training = False
        try:
            group = self.open(answers, kept)
            yield group.step
            while (group := Group.regroup([group])).answers:
                yield group.advance()
            if failed := [answer.error for answer in answers if answer.error is not None]:
                raise failed[0]
        finally:
            for module in training:
                module.training = True

    def _choose(self, logits_BV: Tensor, answers: Sequence[Answer]) -> Tensor:
        """The next token of each row, int64 [B]."""
        # A placeholder means "look at this picture": as a word of the reply it would have none to look at.
        never = list(self.language.places.values())
        return choose(logits_BV, [answer.choice for answer in answers], never, sorted(self.stop_ids))


def _is_read(sample: Sample) -> bool:
    """Whether a picture or a sound of it has to be decoded."""
    parts = (part for message in sample.messages for part in message.parts)
    return any(isinstance(p, Image | Audio) and isinstance(p.source, Path | bytes) for p in parts)


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """Every module in it, shared ones twice. A tenth of the time of ``modules()``, which shows in a reply."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _modules(child)


def _places(composed: Composed) -> dict[str, tuple[str, int]]:
    """Kind of media -> its placeholder, as text and as token; of the kinds that the model knows."""
    processor: Any = composed.encoder.processor
    config: Any = composed.model.config
    found = {
        "image": (processor.image_token, config.image_token_id),
        "audio": (processor.audio_token, config.audio_token_id),
    }
    return {kind: (token, number) for kind, (token, number) in found.items() if number is not None}
