"""Replies in JSON: which tokens may come next, so that the whole is of a schema.

llguidance (Microsoft, MIT) reads the schema and walks the vocabulary; what is ours is which bytes each token
stands for, and who asks when. A grammar only ever takes tokens away, so it changes nothing for the rows
beside it, and the stop is possible exactly where the text is complete.

Source: https://github.com/guidance-ai/llguidance, JSON Schema of draft 2020-12 as far as its
``docs/json_schema.md`` says; what it does not keep (``uniqueItems``, ``not``) it refuses.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinymodal.core.errors import DataError
from tinymodal.infer.grammar_trial import LIMITS, grammar_of, in_a_line
from tinymodal.infer.logprobs import TokenBytes

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Shapes: V vocabulary.

PROBE = '{"a b": ["é, c .", -1.5e3, {"d": null}],\n "e": "\\n\\u00e9"}'
"""Written and read by a tokenizer to see whether its tokens are pieces of the text."""
MARK = "\x02"
"""Stands before a text that is tokenized, where the tokenizer puts a blank before the first word."""


class GrammarError(DataError, RuntimeError):
    """A schema that replies cannot be held to; says why. Of rows decoded together its own fails alone."""


class Grammars:
    """What a tokenizer knows of JSON.

    Args:
        tokenizer: the model's.
        stop_ids: tokens that end a reply.

    Raises:
        DataError: llguidance is not installed, or what the tokenizer writes is not its tokens in turn.
    """

    def __init__(self, tokenizer: Any, stop_ids: Collection[int]) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ModuleNotFoundError:
            raise DataError(
                "a reply in JSON needs llguidance, which is not installed; pip install 'tinymodal[serve]'"
            ) from None
        if not stop_ids:
            raise DataError("a reply in JSON ends with a stop token, and this model has none")
        words = _Words(tokenizer, sorted(stop_ids)[0])
        if tokenizer.decode(words(PROBE)).strip() != PROBE:
            raise DataError(
                f"{type(tokenizer).__name__}: what it writes is not its tokens in turn, so no reply of this "
                f"model can be held to a JSON schema"
            )
        self._tokenizer = LLTokenizer(TokenizerWrapper(words), eos_token=sorted(stop_ids))

    def begin(self, json_schema: str) -> Grammar:
        """A reply of a schema, before its first token. Takes milliseconds, of a huge schema half a second.

        Raises:
            GrammarError: it is no schema, asks for what is not known, allows nothing, or too much.
        """
        from llguidance import LLMatcher, LLParserLimits

        try:
            grammar = grammar_of(json_schema)
        except ValueError as error:
            raise GrammarError(f"json_schema: {in_a_line(str(error))}") from None
        limits = LLParserLimits(**LIMITS)
        found = Grammar(LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits))
        # Some faults show at the first token only; they belong to who asks, not to the decoding.
        found.allowed(())
        return found


class Grammar:
    """One reply's place in its schema. Made by :meth:`Grammars.begin`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._taken = 0

    def allowed(self, said: Sequence[int]) -> Tensor:
        """Which tokens may come next, bool [V]; V as the tokenizer counts.

        Args:
            said: all tokens of the reply so far; those that came since the last time are followed.

        Raises:
            GrammarError: it is too complex at this place.
        """
        if len(said) > self._taken:
            self._matcher.consume_tokens(list(said[self._taken :]))
            self._taken = len(said)
        if not self._matcher.is_error():
            found_V = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) > 0
            if not self._matcher.is_error():
                return found_V
        raise GrammarError(f"json_schema: {self._told()}")

    @property
    def ended(self) -> bool:
        """Whether nothing but the stop may come."""
        return bool(self._matcher.is_stopped())

    def _told(self) -> str:
        message = in_a_line(self._matcher.get_error())
        return NOTHING if message.startswith("NoExtension") else message


NOTHING = "no text can be of this schema"


class _Words:
    """A tokenizer as llguidance wants one: its tokens as bytes."""

    def __init__(self, tokenizer: Any, eos_id: int) -> None:
        bytes_of = TokenBytes(tokenizer)
        self._tokenizer = tokenizer
        self.tokens = [bytes_of(i) for i in range(len(tokenizer))]
        self.eos_token_id, self.bos_token_id = eos_id, None
        added = tokenizer.added_tokens_decoder
        self.special_token_ids = sorted({eos_id, *(i for i, token in added.items() if token.special)})
        plain = set(range(len(self.tokens))).difference(self.special_token_ids)
        self._id_of = {self.tokens[i]: i for i in sorted(plain) if self.tokens[i]}
        self._most = max(map(len, self._id_of), default=0)

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text in the middle of a reply: their bytes are its bytes."""
        wanted = text.encode()
        for before in (b"", MARK.encode()):
            ids: list[int] = self._tokenizer(before.decode() + text, add_special_tokens=False)["input_ids"]
            pieces = [self.tokens[i] for i in ids]
            for n in range(len(ids) if before else 1):
                if b"".join(pieces[:n]).strip(b" ") == before and b"".join(pieces[n:]) == wanted:
                    return ids[n:]
        return self._longest(wanted)

    def _longest(self, wanted: bytes) -> list[int]:
        """The longest token each time, for what the tokenizer itself would write otherwise."""
        found: list[int] = []
        at = 0
        while at < len(wanted):
            ends = range(min(len(wanted), at + self._most), at, -1)
            token = next((self._id_of[wanted[at:end]] for end in ends if wanted[at:end] in self._id_of), None)
            if token is None:
                break  # it has no word for this
            found.append(token)
            at += len(self.tokens[token])
        return found
