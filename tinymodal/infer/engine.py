"""Samples in, replies out: batched, greedy by default, or as a stream of words.

One decoding loop serves both, so a streamed reply is the batched reply. Prompts go through the encoder that
training used; rows are padded on the left and numbered from their own first token, so a sample's reply does
not depend on its neighbours. A row that has stopped leaves the batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tinymodal.core.errors import DataError
from tinymodal.core.types import Encoded, Sample
from tinymodal.data.collate import gather

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed

# Shapes: B rows, T positions of the longest prompt, V vocabulary.

WINDOW = 8
"""Batches encoded at once and sorted by length: more means less padding and more pictures in memory."""
WINDOW_PIXELS = 1 << 25
"""Pixels of prepared tiles after which a window takes no further batch: 400 MB in float32."""


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

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError(f"temperature {self.temperature} and top_k {self.top_k} must not be negative")
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
    """What the model read, a picture as ``[image: 9 tokens]``."""


class Engine:
    """A composed model that answers.

    Args:
        composed: model and encoder of ``compose.build.load``. The model is put into eval mode for every reply
            and each of its modules back into its own after it, so an engine may also be lent a model that is
            being trained.
    """

    def __init__(self, composed: Composed) -> None:
        self.model: Any = composed.model
        self.encoder = composed.encoder
        self.tokenizer: Any = composed.encoder.tokenizer
        self.image_token: str = composed.encoder.processor.image_token
        self.image_token_id: int | None = composed.model.config.image_token_id
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
    ) -> list[Reply]:
        """A reply to each sample, in their order.

        Args:
            samples: conversations that end with the user's turn.
            sampling: how tokens are chosen.
            batch_size: rows that are decoded together.
            done: called with the number of replies each time some are finished.

        Raises:
            DataError: a sample cannot be encoded, or is longer than the model can read.
        """
        replies: list[Reply] = []
        for encoded in self._windows(samples, batch_size):
            order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
            found: dict[int, Reply] = {}
            for first in range(0, len(order), batch_size):
                rows = order[first : first + batch_size]
                found |= zip(rows, self._reply_batch([encoded[i] for i in rows], sampling), strict=True)
                if done is not None:
                    done(len(rows))
            replies += [found[i] for i in range(len(encoded))]
        return replies

    def stream(self, sample: Sample, sampling: Sampling = GREEDY) -> Iterator[str]:
        """The reply in pieces as it grows; joined, they are :meth:`reply`'s text.

        Raises:
            DataError: as :meth:`reply`, before the first piece.
        """
        encoded = self.encode(sample)
        ids: list[int] = []
        sent = ""
        for new in self._decode([encoded], sampling):
            token = int(new[0])
            if token in self.stop_ids:
                break
            ids.append(token)
            text, stopped = self._text(ids)
            if not stopped:
                text = self._settled(text)
            if len(text) > len(sent) and text.startswith(sent):
                yield text[len(sent) :]
                sent = text
            if stopped:
                return
        text = self._text(ids)[0]
        if len(text) > len(sent):
            yield text[len(sent) :]

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

    # Decoding

    def _windows(self, samples: Sequence[Sample], batch_size: int) -> Iterator[list[Encoded]]:
        """The encoded samples in stretches of whole batches, see ``WINDOW`` and ``WINDOW_PIXELS``."""
        window: list[Encoded] = []
        pixels = 0
        for sample in samples:
            window.append(self.encode(sample))
            pixels += sum(tile[0].numel() for item in window[-1].media for tile in item.tiles)
            full = len(window) == batch_size * WINDOW or pixels >= WINDOW_PIXELS
            if full and len(window) % batch_size == 0:
                yield window
                window, pixels = [], 0
        if window:
            yield window

    def _reply_batch(self, rows: Sequence[Encoded], sampling: Sampling) -> list[Reply]:
        room = self.room
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

        for _ in self._decode(rows, sampling, finished):
            pass
        return [
            Reply(
                text=self._text(ids[i])[0] if (text := texts[i]) is None else text,
                tokens_in=len(row),
                tokens_out=len(ids[i]),
                stopped_by="stop" if stopped[i] else "length",
                prompt=self.prompt(row),
            )
            for i, row in enumerate(rows)
        ]

    def _decode(
        self, rows: Sequence[Encoded], sampling: Sampling, finished: Callable[[int, int], bool] | None = None
    ) -> Iterator[Tensor]:
        """Yield the next token of every row that is still open, int64 [open rows].

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
    ) -> Iterator[Tensor]:
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
                out = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                next_B = self._choose(out.logits[:, -1].float(), sampling, random)
            yield next_B
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
        """Rows padded on the left to the longest, and all their pictures in reading order."""
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
        pictures = [(item, row.sample_id) for row in rows for item in row.media]
        if pictures:
            tiles, take_K = gather(pictures)
            inputs["pixel_values"] = tuple(same_size.to(device, self.model.dtype) for same_size in tiles)
            inputs["image_take"] = take_K.to(device)
        return inputs

    def _choose(self, logits_BV: Tensor, sampling: Sampling, random: torch.Generator) -> Tensor:
        """The next token of each row, int64 [B]."""
        # A placeholder means "look at this picture": as a word of the reply it would have none to look at.
        if self.image_token_id is not None:
            logits_BV[:, self.image_token_id] = -torch.inf
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
        """The prompt as text, each picture's placeholders as ``[image: 9 tokens]``."""
        whole = self.tokenizer.decode(encoded.ids.tolist(), skip_special_tokens=False)
        # Neighbouring pictures are one run of placeholders in the text: their sizes tell them apart.
        sizes = iter([item.tokens for item in encoded.media])

        def name(run: re.Match[str]) -> str:
            left, names = len(run.group()) // len(self.image_token), []
            while left > 0:
                tokens = next(sizes, left)
                names.append(f"[image: {tokens} tokens]")
                left -= tokens
            return "".join(names)

        return re.sub(f"(?:{re.escape(self.image_token)})+", name, whole)
