"""Samples in, replies out: batched, greedy by default, or as a stream of words and sound.

One decoding loop serves both, so a streamed reply is the batched reply. Prompts go through the encoder that
training used; rows are padded on the left and numbered from their own first token, so a sample's reply does
not depend on its neighbours. A row that has stopped leaves the batch.

A model with a speech head says its replies aloud where that is asked. The head listens to the decoding and
has no say in it: the text is the same. In a stream its sound comes between the words, as soon as it can be
heard and before the text is over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from tinymodal.core.errors import DataError
from tinymodal.core.types import Encoded, Sample
from tinymodal.data.collate import gather
from tinymodal.infer.speaking import Mouth, Utterance, Voice
from tinymodal.model.layout import VALUES

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed

# Shapes: B rows, T positions of the longest prompt, D width, V vocabulary.

WINDOW = 8
"""Batches encoded at once and sorted by length: more means less padding and more media in memory."""
WINDOW_PIXELS = 1 << 25
"""Pixels of prepared tiles after which a window takes no further batch: 400 MB in float32. Three numbers of a
prepared sound are as much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen. ``temperature = 0`` takes the likeliest one."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    """The smallest set of tokens whose probabilities reach this; 1 keeps all."""
    top_k: int = 0
    """The likeliest tokens that stay in play; 0 keeps all."""
    seed: int = 0
    """The same seed, batch and machine give the same reply."""
    speech_temperature: float = 0.0
    """As ``temperature``, of a spoken reply's frames; the design ``units`` knows 0 only."""
    speech_top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        for name in ("temperature", "top_k", "speech_temperature", "speech_top_k"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said to one sample."""

    text: str
    tokens_in: int
    tokens_out: int
    """The stop token counts; it is not in ``text``."""
    stopped_by: Literal["stop", "length"]
    prompt: str
    """What the model read, a picture as ``[image: 9 tokens]``, a sound as ``[audio: 25 tokens]``."""
    audio: Tensor | None = field(default=None, compare=False)
    """How it sounds, float32 [samples]; None where that was not asked, empty where there is no text."""
    rate_hz: int | None = None
    """Samples of ``audio`` a second."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of a reply's text."""

    text: str


@dataclass(frozen=True, slots=True)
class AudioDelta:
    """More of a reply's sound."""

    samples: Tensor = field(compare=False)
    """float32 [samples], on the CPU"""
    rate_hz: int


class Step(NamedTuple):
    """The next token of every row that is still open."""

    rows: list[int]
    """Their numbers."""
    tokens_B: Tensor
    """int64"""
    states_BD: Tensor
    """The last states that predicted them."""


class Engine:
    """A composed model that answers.

    Args:
        composed: model and encoder of ``compose.build.load``. The model is put into eval mode for every reply
            and each of its modules back into its own after it, so an engine may also be lent a model that is
            being trained.
    """

    def __init__(self, composed: Composed) -> None:
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
        say = self._saying(sampling, voice) if speak else None
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
            sampling: how tokens are chosen.
            speak: say it aloud as well: sound comes between the words, from before the text is over.
            voice: in which.

        Raises:
            DataError: as :meth:`reply`, before the first piece.
            CheckpointError: the model does not speak.
        """
        aloud = self._saying(sampling, voice)() if speak else None
        encoded = self.encode(sample)
        ids: list[int] = []
        sent = ""
        stopped = False
        for step in self._decode([encoded], sampling):
            token = int(step.tokens_B[0])
            ended = token in self.stop_ids
            if not ended:
                ids.append(token)
            text, stopped = self._text(ids)
            text = text if ended or stopped else self._settled(text)
            if len(text) > len(sent) and text.startswith(sent):
                yield TextDelta(text[len(sent) :])
                sent = text
            if aloud is not None and ids:
                # The stop is heard too: with it the head knows that nothing follows.
                yield from self._audible(aloud.feed(step.states_BD, step.tokens_B))
            if ended or stopped:
                break
        text = self._text(ids)[0]
        if not stopped and len(text) > len(sent):
            yield TextDelta(text[len(sent) :])
        if aloud is not None and ids:
            for samples in aloud.rest():
                yield from self._audible(samples)

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

    def _saying(self, sampling: Sampling, voice: Voice) -> Callable[[], Utterance]:
        """What begins an answer aloud."""
        mouth = self.mouth
        known = mouth.known(voice)

        def say() -> Utterance:
            return mouth.begin(known, sampling.speech_temperature, sampling.speech_top_k, sampling.seed)

        say()  # what is wrong with the choice is told before the first reply
        return say

    def _audible(self, samples: Tensor) -> Iterator[AudioDelta]:
        if len(samples):
            yield AudioDelta(samples, self.mouth.codec.rate_hz)

    # Decoding

    def _windows(self, samples: Sequence[Sample], batch_size: int) -> Iterator[list[Encoded]]:
        """The encoded samples in stretches of whole batches, see ``WINDOW`` and ``WINDOW_PIXELS``."""
        window: list[Encoded] = []
        pixels = 0
        for sample in samples:
            window.append(self.encode(sample))
            pixels += sum(tile.numel() // 3 for item in window[-1].media for tile in item.tiles)
            full = len(window) == batch_size * WINDOW or pixels >= WINDOW_PIXELS
            if full and len(window) % batch_size == 0:
                yield window
                window, pixels = [], 0
        if window:
            yield window

    def _reply_batch(
        self, rows: Sequence[Encoded], sampling: Sampling, say: Callable[[], Utterance] | None = None
    ) -> list[Reply]:
        room = self.room
        states: list[list[Tensor]] = [[] for _ in rows]
        ids: list[list[int]] = [[] for _ in rows]
        texts: list[str | None] = [None] * len(rows)
        stopped = [False] * len(rows)

        def finished(row: int, token: int) -> bool:
            ids[row].append(token)
            if token in self.stop_ids:
                texts[row] = self._text(ids[row][:-1])[0]
            elif self.stop_words:
                text, met = self._text(ids[row])
                texts[row] = text if met else None
            stopped[row] = texts[row] is not None
            return stopped[row] or (room is not None and len(rows[row]) + len(ids[row]) >= room)

        for step in self._decode(rows, sampling, finished):
            if say is not None:
                for row, state_1D in zip(step.rows, step.states_BD.split(1), strict=True):
                    states[row].append(state_1D)
        return [
            Reply(
                text=self._text(ids[i])[0] if (text := texts[i]) is None else text,
                tokens_in=len(row),
                tokens_out=len(ids[i]),
                stopped_by="stop" if stopped[i] else "length",
                prompt=self.prompt(row),
                audio=None if say is None else self._aloud(say, states[i], ids[i]),
                rate_hz=None if say is None else self.mouth.codec.rate_hz,
            )
            for i, row in enumerate(rows)
        ]

    def _aloud(self, say: Callable[[], Utterance], states: Sequence[Tensor], ids: Sequence[int]) -> Tensor:
        """A whole reply as a sound, float32 [samples]."""
        if not ids or ids[0] in self.stop_ids:
            return torch.zeros(0)
        aloud, states_nD = say(), torch.cat(list(states))
        begun = aloud.feed(states_nD, torch.tensor(ids, device=states_nD.device))
        return torch.cat([begun, *aloud.rest()])

    def _decode(
        self, rows: Sequence[Encoded], sampling: Sampling, finished: Callable[[int, int], bool] | None = None
    ) -> Iterator[Step]:
        """Yield the next token of every row that is still open.

        Args:
            rows: the prompts.
            sampling: how tokens are chosen.
            finished: asked with (row, token) after each step; True closes the row. None: the caller stops.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield from self._steps(rows, sampling, finished)
        finally:
            for module, training in modes:
                module.training = training

    def _steps(
        self, rows: Sequence[Encoded], sampling: Sampling, finished: Callable[[int, int], bool] | None
    ) -> Iterator[Step]:
        device = next(self.model.parameters()).device
        random = torch.Generator(device).manual_seed(sampling.seed)
        inputs = self._prompts(rows, device)
        mask_BT = inputs["attention_mask"]
        position_B = mask_BT.sum(1)
        open_rows = list(range(len(rows)))
        room = self.room
        shortest = min(len(row) for row in rows)
        num_steps = sampling.max_new_tokens if room is None else min(sampling.max_new_tokens, room - shortest)
        cache = None
        for step in range(num_steps):
            with torch.inference_mode():
                out = self.model.model(**inputs, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                states_B1D = out.last_hidden_state[:, -1:]
                next_B = self._choose(self.model.head(states_B1D)[:, -1].float(), sampling, random)
            yield Step(list(open_rows), next_B, states_B1D[:, 0])
            if finished is not None:
                keep = [
                    i
                    for i, (row, token) in enumerate(zip(open_rows, next_B.tolist(), strict=True))
                    if not finished(row, token)
                ]
                if len(keep) < len(open_rows):
                    if not keep:
                        return
                    open_rows = [open_rows[i] for i in keep]
                    index = torch.tensor(keep, device=device)
                    next_B, mask_BT, position_B = next_B[index], mask_BT[index], position_B[index]
                    if step + 1 < num_steps:
                        # The one selection that every kind of cache layer knows, linear attention included.
                        cache.reorder_cache(index)
            mask_BT = torch.cat((mask_BT, mask_BT.new_ones(len(mask_BT), 1)), 1)
            inputs = {
                "input_ids": next_B[:, None],
                "attention_mask": mask_BT,
                "position_ids": position_B[:, None],
            }
            position_B = position_B + 1

    def _prompts(self, rows: Sequence[Encoded], device: torch.device) -> dict[str, Any]:
        """Rows padded on the left to the longest, and all their pictures and sounds in reading order."""
        longest = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else next(iter(self.stop_ids))
        ids_BT = torch.full((len(rows), longest), pad)
        mask_BT = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            ids_BT[i, longest - len(row) :] = row.ids
            mask_BT[i, longest - len(row) :] = 1
        inputs: dict[str, Any] = {
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0),
        }
        inputs = {name: value.to(device) for name, value in inputs.items()}
        for kind in self.places:
            media = [(item, row.sample_id) for row in rows for item in row.media if item.kind == kind]
            if media:
                tiles, take_K = gather(media)
                inputs[VALUES[kind]] = tuple(same_size.to(device, self.model.dtype) for same_size in tiles)
                inputs[f"{kind}_take"] = take_K.to(device)
        return inputs

    def _choose(self, logits_BV: Tensor, sampling: Sampling, random: torch.Generator) -> Tensor:
        """The next token of each row, int64 [B]."""
        # A placeholder means "look at this picture": as a word of the reply it would have none to look at.
        for _, place_id in self.places.values():
            logits_BV[:, place_id] = -torch.inf
        if sampling.temperature == 0:
            return logits_BV.argmax(-1)
        logits_BV = logits_BV / sampling.temperature
        if 0 < sampling.top_k < logits_BV.shape[-1]:
            least_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
        if sampling.top_p < 1:
            sorted_BV, order_BV = logits_BV.sort(descending=True)
            before_BV = sorted_BV.softmax(-1).cumsum(-1) - sorted_BV.softmax(-1)
            sorted_BV = sorted_BV.masked_fill(before_BV >= sampling.top_p, -torch.inf)
            logits_BV = torch.empty_like(logits_BV).scatter(1, order_BV, sorted_BV)
        return torch.multinomial(logits_BV.softmax(-1), 1, generator=random)[:, 0]

    # Text

    def _text(self, ids: Sequence[int]) -> tuple[str, bool]:
        """A reply's text without white space around it, cut before a stop word; and whether it met one."""
        whole = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        found = [place for word in self.stop_words if (place := whole.find(word)) >= 0]
        return (whole[: min(found)] if found else whole).strip(), bool(found)

    def _settled(self, text: str) -> str:
        """As much of a growing text as cannot change any more.

        Half a character, half a stop word and white space at the end are held back.
        """
        text = text.rstrip("\ufffd").rstrip()
        for word in self.stop_words:
            for length in range(min(len(word), len(text)), 0, -1):
                if text.endswith(word[:length]):
                    text = text[:-length].rstrip()
                    break
        return text

    def prompt(self, encoded: Encoded) -> str:
        """The prompt as text, placeholders as ``[image: 9 tokens]`` or ``[audio: 25 tokens]``."""
        whole = self.tokenizer.decode(encoded.ids.tolist(), skip_special_tokens=False)
        for kind, (token, _) in self.places.items():
            # Neighbouring media are one run of placeholders in the text: their sizes tell them apart.
            sizes = iter([item.tokens for item in encoded.media if item.kind == kind])

            def name(run: re.Match[str], kind: str = kind, token: str = token, sizes: Any = sizes) -> str:
                left, names = len(run.group()) // len(token), []
                while left > 0:
                    tokens = next(sizes, left)
                    names.append(f"[{kind}: {tokens} tokens]")
                    left -= tokens
                return "".join(names)

            whole = re.sub(f"(?:{re.escape(token)})+", name, whole)
        return whole


def _places(composed: Composed) -> dict[str, tuple[str, int]]:
    """Kind of media -> its placeholder, as text and as token; of the kinds that the model knows."""
    processor: Any = composed.encoder.processor
    config: Any = composed.model.config
    found = {
        "image": (processor.image_token, config.image_token_id),
        "audio": (processor.audio_token, config.audio_token_id),
    }
    return {kind: (token, number) for kind, (token, number) in found.items() if number is not None}
