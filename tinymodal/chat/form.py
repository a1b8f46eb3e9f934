"""A conversation written as one text: a template as data, and which of the characters it writes train.

A template says what stands before and after the words of each role. It renders a whole conversation at once
and says where the trained spans lie, so nobody ever tokenizes a prefix and counts, and an answer that spells
a role's name cannot be taken for one.

Five rules hold for every template:

* A trained span is the assistant's words and the stop that ends them, so the model learns to stop.
* Pictures and sounds that open a message are parted from its words by one newline, as LLaVA writes pictures
  (or by what the template says); one inside a sentence stays where it is.
* How an answer sounds is not written at all.
* Texts are never stripped or otherwise changed (a tokenizer's own Jinja may do so).
* A stop that is plain text, such as ``###``, may not begin inside an answer that trains.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tinymodal.core.types import Audio, Image, Message, Part, Role, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as one text. ``spans`` are the (start, end) characters that train: in order, apart."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """What stands around the words of one role."""

    head: str = ""
    """Announces the role. The assistant's head is where a reply begins."""
    lead: str = ""
    """Before the words, but part of what trains: the space that a tokenizer joins to the first word."""
    tail: str = ""
    """Ends the words, and trains with them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """How one family of models writes a conversation.

    ``{bos}`` and ``{eos}`` stand for the tokenizer's own words until :meth:`bind` puts them in.
    """

    name: str
    turns: Mapping[Role, Turn]
    after: str = ""
    """Follows every turn and never trains."""
    start: str = "{bos}"
    """Opens the text. ``{bos}`` is empty for a tokenizer that does not begin its texts with one."""
    between: str = ""
    """Opens every round but the first: what stands before the head of a later user's turn."""
    system: str | None = None
    """The system's words where the conversation has none of its own; None: then there is no system turn."""
    system_inside: bool = False
    """The system's turn stands inside the first user's, between its head and its words."""
    example: tuple[str, str] | None = None
    """A question and its answer that open every conversation and never train."""
    picture: tuple[str, str] = ("", "")
    """Before and after each picture."""
    after_pictures: str = "\n"
    """Between the pictures and sounds that open a message and its words."""
    reply: str | None = None
    """What a prompt ends with, where that is not the assistant's head."""
    stops: tuple[str, ...] = ()
    """A reply ends where one of these is generated. One that is neither in ``control`` nor in ``required`` is
    plain text, which may be several tokens."""
    control: tuple[str, ...] = ()
    """Words that must be single tokens, and that nobody may write in a message; a tokenizer that lacks one
    gets it as a new special token."""
    required: tuple[str, ...] = ()
    """Control words that the tokenizer must have already: made anew, they would mean nothing to the language
    model whose words they are."""
    captions_only: bool = False
    """Write the pictures (or sounds) and the answer and leave the question out: caption pretraining, one
    round."""

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """This template with the tokenizer's own words for ``{bos}`` and ``{eos}``.

        Raises:
            ValueError: it needs an end-of-text token and the tokenizer has none, or it lacks a required one.
        """
        eos = tokenizer.eos_token
        if eos is None and any("{eos}" in stop for stop in self.stops):
            raise ValueError(
                f"template '{self.name}' ends a reply with the tokenizer's end-of-text token, and this "
                f"tokenizer has none; use template 'chatml', or set eos_token in tokenizer_config.json"
            )
        for word in self.required:
            if not has_token(tokenizer, word):
                does = "ends a reply with" if word in self.stops else "writes"
                special = ", ".join(map(repr, tokenizer.all_special_tokens[:8])) or "no special token"
                raise ValueError(
                    f"template '{self.name}' {does} {word!r}, and this tokenizer has no such token; it has "
                    f"{special}, and its end of text is {eos!r}. Template 'vicuna_v1' ends with the "
                    f"tokenizer's own end of text"
                )
        words = {"{bos}": tokenizer.bos_token if writes_bos(tokenizer) else "", "{eos}": eos or ""}

        def put(text: str) -> str:
            for mark, word in words.items():
                text = text.replace(mark, word)
            return text

        return replace(
            self,
            turns={r: Turn(put(t.head), put(t.lead), put(t.tail)) for r, t in self.turns.items()},
            start=put(self.start),
            between=put(self.between),
            stops=tuple(map(put, self.stops)),
            control=tuple(dict.fromkeys(map(put, (*self.control, *self.required)))),
        )

    @property
    def stop_words(self) -> tuple[str, ...]:
        """Stops that are plain text: to be looked for in what was generated, whatever its tokens are."""
        return tuple(stop for stop in self.stops if stop not in (*self.control, *self.required))

    def render(
        self, messages: Sequence[Message], placeholders: Iterator[str], reply: bool = False
    ) -> Rendered:
        """The conversation as one text.

        Args:
            messages: the turns, in an order that :class:`~tinymodal.chat.encode.Encoder` has checked.
            placeholders: what is written for each picture and sound, in reading order.
            reply: end with the assistant's head, where a reply begins.

        Raises:
            ValueError: the conversation does not suit this template.
        """
        whole = self._captions(messages) if self.captions_only else self._opened(messages)
        pieces, spans = [self.start], []
        length = len(self.start)
        inside: Message | None = None
        rounds = 0

        def add(message: Message) -> None:
            nonlocal length
            turn = self.turns[message.role]
            words = write(message.parts, placeholders, self.after_pictures, self.picture)
            pieces.extend((turn.lead, words, turn.tail))
            begin, length = length, length + len(turn.lead) + len(words) + len(turn.tail)
            if message.trains and length > begin:
                self._check_stop("".join(pieces[-3:]), len(turn.lead) + len(words), message, messages)
                spans.append((begin, length))

        for message in whole:
            if message.role == "system" and self.system_inside:
                inside = message
                continue
            heads = [self.turns[message.role].head]
            if message.role == "user":
                if rounds:
                    heads.insert(0, self.between)
                rounds += 1
                if inside is not None:
                    heads.append(self.turns["system"].head)
            pieces.extend(heads)
            length += sum(map(len, heads))
            if message.role == "user" and inside is not None:
                add(inside)
                inside = None
            add(message)
            pieces.append(self.after)
            length += len(self.after)
        if reply:
            pieces.append(self.turns["assistant"].head if self.reply is None else self.reply)
        return Rendered("".join(pieces), tuple(spans))

    def to_jinja(self, image_token: str = "<image>", audio_token: str | None = None) -> str:
        """The same template for ``tokenizer.chat_template``, so that an exported model carries it.

        Takes ``content`` as a string or as a list of ``{"type": "text"}``, ``{"type": "image"}`` and, where
        there is an ``audio_token``, ``{"type": "audio"}`` parts. Equal to :meth:`render` by test.
        """
        quote = functools.partial(json.dumps, ensure_ascii=False)

        def say(text: str) -> list[str]:
            return [f"{{{{- {quote(text)} -}}}}"] if text else []

        def turn(role: Role, message: str, head: str = "", after: str = "") -> list[str]:
            form = self.turns[role]
            told = "true" if role == "assistant" or not self.captions_only else "false"
            return [
                *say(head + form.lead),
                f"{{{{- words({message}, {told}) -}}}}",
                *say(form.tail + after),
            ]

        sound = None if audio_token is None else quote(audio_token)
        lines = self._words_macro(quote(self.picture[0] + image_token + self.picture[1]), sound, quote)
        lines += say(self.start)
        whole = ["messages"]
        if not self.captions_only and (self.system is not None or self.example is not None):
            default = [] if self.system is None else [{"role": "system", "content": self.system}]
            lines += [
                "{%- if messages and messages[0]['role'] == 'system' -%}",
                "{%- set opening, rest = [messages[0]], messages[1:] -%}",
                "{%- else -%}",
                f"{{%- set opening, rest = {quote(default)}, messages -%}}",
                "{%- endif -%}",
            ]
            whole = ["opening", "rest"]
            if self.example is not None:
                question, answer = self.example
                told = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                whole.insert(1, quote(told))
        system = self.turns["system"]
        if self.system_inside:
            on_system = ["{%- set seen.system = message -%}"]
            inside = [
                "{%- if seen.system -%}",
                *turn("system", "seen.system", system.head),
                "{%- set seen.system = none -%}",
                "{%- endif -%}",
            ]
        else:
            on_system, inside = turn("system", "message", system.head, self.after), []
        later = ["{%- if seen.rounds -%}", *say(self.between), "{%- endif -%}"] if self.between else []
        head = self.turns["user"].head
        lines += [
            "{%- set seen = namespace(system=none, rounds=false) -%}",
            f"{{%- for message in {' + '.join(whole)} -%}}",
            "{%- if message['role'] == 'system' -%}",
            *on_system,
            "{%- elif message['role'] == 'user' -%}",
            *later,
            "{%- set seen.rounds = true -%}",
            *(say(head) + inside if inside else []),
            *turn("user", "message", "" if inside else head, self.after),
            "{%- elif message['role'] == 'assistant' -%}",
            *turn("assistant", "message", self.turns["assistant"].head, self.after),
            "{%- else -%}",
            "{{- raise_exception('unknown role: ' + message['role']) -}}",
            "{%- endif -%}",
            "{%- endfor -%}",
        ]
        reply = say(self.turns["assistant"].head if self.reply is None else self.reply)
        if reply:
            lines += ["{%- if add_generation_prompt -%}", *reply, "{%- endif -%}"]
        return "\n".join(lines)

    def _words_macro(self, picture: str, sound: str | None, quote: functools.partial[str]) -> list[str]:
        """What :func:`write` does, in Jinja; ``told`` is false where only the pictures are written."""
        heard = [
            "{%- elif part['type'] == 'audio' -%}",
            f"{{{{- {sound} -}}}}{{%- set seen.image = true -%}}",
        ]
        parted = [
            f"{{%- if seen.image and not seen.words and part['text'][0] != {quote(self.after_pictures)} -%}}",
            f"{{{{- {quote(self.after_pictures)} -}}}}",
            "{%- endif -%}",
        ]
        return [
            "{%- macro words(message, told) -%}",
            "{%- if message['content'] is string -%}",
            "{%- if told -%}{{- message['content'] -}}{%- endif -%}",
            "{%- else -%}",
            "{%- set seen = namespace(words=false, image=false) -%}",
            "{%- for part in message['content'] -%}",
            "{%- if part['type'] == 'image' -%}",
            f"{{{{- {picture} -}}}}{{%- set seen.image = true -%}}",
            *(heard if sound is not None else []),
            "{%- elif part['text'] and told -%}",
            *(parted if self.after_pictures else []),
            "{%- set seen.words = true -%}{{- part['text'] -}}",
            "{%- endif -%}",
            "{%- endfor -%}",
            "{%- endif -%}",
            "{%- endmacro -%}",
        ]

    def _opened(self, messages: Sequence[Message]) -> list[Message]:
        """The system's turn, the example, and the rest of the conversation."""
        own = 1 if messages and messages[0].role == "system" else 0
        opening = list(messages[:own])
        if not own and self.system is not None:
            opening.append(Message("system", (Text(self.system),)))
        if self.example is not None:
            question, answer = self.example
            opening.append(Message("user", (Text(question),)))
            opening.append(Message("assistant", (Text(answer),), train=False))
        return [*opening, *messages[own:]]

    def _captions(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Pictures and sounds of the question, then the answer."""
        if sum(message.role == "assistant" for message in messages) > 1 or len(messages) > 3:
            raise ValueError(
                f"template '{self.name}' writes one picture and its caption, found {len(messages)} messages; "
                f"use a chat template for conversations"
            )
        return [
            m
            if m.role == "assistant"
            else replace(m, parts=tuple(p for p in m.parts if isinstance(p, Image | Audio)))
            for m in messages
        ]

    def _check_stop(self, text: str, end: int, message: Message, messages: Sequence[Message]) -> None:
        """Refuse an answer that would end early: whoever reads the reply cuts it at the first stop.

        Args:
            text: lead, words and tail.
            end: where the words end in it.
            message: the turn.
            messages: the conversation, for the turn's number.
        """
        for stop in self.stop_words:
            at = text.find(stop)
            if 0 <= at < end:
                number = next((n for n, m in enumerate(messages, 1) if m is message), len(messages))
                raise ValueError(
                    f"message {number}: template '{self.name}' ends a reply with {stop!r}, and that begins "
                    f"inside the answer ({text[max(0, at - 20) : end][:60]!r}); take it out, or choose a "
                    f"template whose stop is a token of its own, such as 'chatml'"
                )


def write(
    parts: Sequence[Part],
    placeholders: Iterator[str],
    after_media: str,
    around: tuple[str, str] = ("", ""),
) -> str:
    """The words of one message, a placeholder for each picture and sound.

    Args:
        parts: texts, pictures and sounds in reading order; empty texts do not count, nor does speech.
        placeholders: what is written for each picture and sound.
        after_media: written once between the pictures and sounds that open the message and its words, unless
            these begin with it already.
        around: before and after each picture's placeholder.
    """
    pieces: list[str] = []
    words = media = False
    for part in parts:
        if isinstance(part, Image):
            pieces += (around[0], next(placeholders), around[1])
            media = True
        elif isinstance(part, Audio):
            pieces.append(next(placeholders))
            media = True
        elif isinstance(part, Text) and part.text:
            if media and not words and part.text[0] != after_media:
                pieces.append(after_media)
            pieces.append(part.text)
            words = True
    return "".join(pieces)


def alternatives(words: Sequence[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of ``words``, the longest first; None for no words."""
    return re.compile("|".join(re.escape(w) for w in sorted(words, key=len, reverse=True))) if words else None


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins its texts with its BOS (Llama does; Phi, Qwen and SmolLM do not)."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def has_token(tokenizer: PreTrainedTokenizerBase, word: str) -> bool:
    """Whether ``word`` is one of the tokenizer's tokens."""
    # An unknown word is given the id of <unk>, or none: only the way back tells.
    found = tokenizer.convert_tokens_to_ids(word)
    return isinstance(found, int) and tokenizer.convert_ids_to_tokens(found) == word
