"""One reply in the making: its tokens, how much of its text can be shown, and why it ends."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from tinymodal.core.types import Encoded
from tinymodal.infer.logprobs import TokenBytes, TokenLogprob, logprob_of
from tinymodal.infer.sampling import Choice, Sampling

if TYPE_CHECKING:
    from tinymodal.infer.grammar import Grammar


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
    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, compare=False)
    """Of the tokens of ``text``, without the stop; None where that was not asked."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of a reply's text."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = field(default=(), compare=False)
    """Of the tokens that came since the last piece, where that was asked."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class AudioDelta:
    """More of a reply's sound."""

    samples: Tensor = field(compare=False)
    """float32 [samples], on the CPU"""
    rate_hz: int


class Writer:
    """How tokens become a reply's text: a tokenizer, the stops of a template, and the places of media.

    Args:
        tokenizer: the model's.
        stop_ids: tokens that end a reply.
        stop_words: texts that end one; they may come in any tokens, and are looked for in the text.
        places: kind of media -> its placeholder, as text and as token.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: frozenset[int],
        stop_words: Sequence[str],
        places: Mapping[str, tuple[str, int]],
    ) -> None:
        self.tokenizer, self.stop_ids, self.places = tokenizer, stop_ids, places
        self.stop_words = tuple(stop_words)
        self._bytes: TokenBytes | None = None

    def text(self, ids: Sequence[int], stops: Sequence[str]) -> tuple[str, bool]:
        """A reply's text without white space around it, cut before a stop; and whether it met one."""
        whole = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        found = [place for word in stops if (place := whole.find(word)) >= 0]
        return (whole[: min(found)] if found else whole).strip(), bool(found)

    @staticmethod
    def settled(text: str, stops: Sequence[str]) -> str:
        """As much of a growing text as cannot change any more.

        Half a character, half a stop and white space at the end are held back.
        """
        text = text.rstrip("\ufffd").rstrip()
        for word in stops:
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

    def logprob(self, logits_V: Tensor, token: int, num: int) -> TokenLogprob:
        """How likely a token was; see :func:`logprob_of`."""
        if self._bytes is None:
            self._bytes = TokenBytes(self.tokenizer)
        return logprob_of(logits_V, token, num, self._word, self._bytes(token))

    def _word(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special_tokens=False))


class Answer:
    """One reply in the making.

    Args:
        writer: of the model.
        encoded: the prompt.
        sampling: how tokens are chosen.
        room: positions the model reads, prompt and reply together; None: any number.
        grammar: what the reply is held to; None: nothing.
    """

    def __init__(
        self,
        writer: Writer,
        encoded: Encoded,
        sampling: Sampling,
        room: int | None,
        grammar: Grammar | None = None,
    ) -> None:
        self.writer, self.encoded, self.sampling = writer, encoded, sampling
        self.choice = Choice(sampling, encoded.ids, grammar=grammar)
        # A text in JSON may well hold what ends the turns of a template; its grammar knows where it ends.
        self.stops = (*(writer.stop_words if grammar is None else ()), *sampling.stop)
        most = sampling.max_new_tokens
        self.most = most if room is None else min(most, room - len(encoded))
        self.over: Literal["stop", "length"] | None = None
        """Why no further token comes; None: one does."""
        self.error: Exception | None = None
        """Why its tokens could not be chosen."""
        self.num_kept = 0
        """Tokens of the prompt that were known and not read again."""
        self.logprobs: list[TokenLogprob] = []
        self._sent = ""
        self._told = 0
        self._final: str | None = None
        self._cut = False

    @property
    def ids(self) -> list[int]:
        """Tokens so far, the stop among them."""
        return self.choice.said

    def take(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """The next token."""
        self.ids.append(token)
        if logprob is not None and token not in self.writer.stop_ids:
            self.logprobs.append(logprob)
        if token in self.writer.stop_ids:
            self.over = "stop"
        elif self.stops:
            text, met = self.writer.text(self.ids, self.stops)
            if met:
                self.over, self._final, self._cut = "stop", text, True
        if self.over is None and len(self.ids) >= self.most:
            self.over = "length"

    def settle(
        self, ids: Sequence[int], over: Literal["stop", "length"], logprobs: Sequence[TokenLogprob] = ()
    ) -> None:
        """All tokens at once, for who chose them at the end."""
        self.choice.said, self.over = list(ids), over
        self.logprobs = [
            told for told, i in zip(logprobs, ids, strict=False) if i not in self.writer.stop_ids
        ]
        self._cut = self.writer.text(self.words, self.stops)[1]

    @property
    def words(self) -> list[int]:
        """Tokens without the stop token."""
        return self.ids[:-1] if self.ids and self.ids[-1] in self.writer.stop_ids else self.ids

    def text(self) -> str:
        """All of it so far; for good, once it is over."""
        if self._final is None:
            text = self.writer.text(self.words, self.stops)[0]
            if self.over is None:
                return text
            self._final = text
        return self._final

    def fresh(self) -> TextDelta | None:
        """What can be shown and was not yet."""
        text = self.text()
        if self.over is None:
            text = self.writer.settled(text, self.stops)
        if len(text) <= len(self._sent) or not text.startswith(self._sent):
            return None
        new, self._sent = text[len(self._sent) :], text
        ready = self.said() if self.over else tuple(self.logprobs)
        told, self._told = ready[self._told :], len(ready)
        return TextDelta(new, told)

    def said(self) -> tuple[TokenLogprob, ...]:
        """Logprobs of the tokens of the text: without those of a stop that came in several."""
        last = len(self.logprobs)
        if self._cut:
            while last and len(self.writer.text(self.ids[: last - 1], ())[0]) >= len(self.text()):
                last -= 1
        return tuple(self.logprobs[:last])

    def reply(self, audio: Tensor | None = None, rate_hz: int | None = None) -> Reply:
        """What was said, once it is over."""
        return Reply(
            text=self.text(),
            tokens_in=len(self.encoded),
            tokens_out=len(self.ids),
            stopped_by=self.over or "length",
            prompt=self.writer.prompt(self.encoded),
            audio=audio,
            rate_hz=rate_hz,
            logprobs=None if self.sampling.num_logprobs is None else self.said(),
        )
