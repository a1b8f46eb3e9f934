"""How a conversation is written as one text, and which of its characters train.

A template is data: what stands before and after the words of each role. It renders a whole conversation at
once and says where the trained spans lie, so nobody ever tokenizes a prefix and counts. The tokenizer's own
Jinja template is the one exception: there the spans are found by rendering text prefixes, and a template
whose prefixes do not match is refused instead of guessed at.

Three rules hold for every template:

* A trained span is the assistant's words and the stop that ends them, so the model learns to stop.
* Pictures that open a message are followed by one newline before its words, as LLaVA writes them; a picture
  inside a sentence stays where it is.
* Texts are never stripped or otherwise changed (a tokenizer's own Jinja may do so).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tinymodal.core.lookup import find
from tinymodal.core.types import Image, Message, Part, Role

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
    system: str = ""
    """The system's words where the conversation has none of its own; empty: then there is no system turn."""
    start: str = "{bos}"
    """Opens the text. ``{bos}`` is empty for a tokenizer that does not begin its texts with one."""
    control: tuple[str, ...] = ()
    """Words that must be single tokens, and that nobody may write in a message."""
    stops: tuple[str, ...] = ()
    """A reply ends where one of these is generated."""
    captions_only: bool = False
    """Write the pictures and the answer and leave the question out: caption pretraining, one round."""

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """This template with the tokenizer's own words for ``{bos}`` and ``{eos}``.

        Raises:
            ValueError: if it needs an end-of-text token and the tokenizer has none.
        """
        eos = tokenizer.eos_token
        if eos is None and any("{eos}" in stop for stop in self.stops):
            raise ValueError(
                f"template '{self.name}' ends a reply with the tokenizer's end-of-text token, and this "
                f"tokenizer has none; use template 'chatml', or set eos_token in tokenizer_config.json"
            )
        words = {"{bos}": tokenizer.bos_token if writes_bos(tokenizer) else "", "{eos}": eos or ""}

        def put(text: str) -> str:
            for mark, word in words.items():
                text = text.replace(mark, word)
            return text

        turns = {r: Turn(put(t.head), put(t.lead), put(t.tail)) for r, t in self.turns.items()}
        control = tuple(put(word) for word in self.control)
        stops = tuple(put(stop) for stop in self.stops)
        return replace(self, turns=turns, start=put(self.start), control=control, stops=stops)

    def render(
        self, messages: Sequence[Message], placeholders: Iterator[str], reply: bool = False
    ) -> Rendered:
        """The conversation as one text.

        Args:
            messages: the turns, in an order that :class:`~tinymodal.chat.encode.Encoder` has checked.
            placeholders: what is written for each picture, in reading order.
            reply: end with the assistant's head, where a reply begins.

        Raises:
            ValueError: the conversation does not suit this template.
        """
        pieces, spans = [self.start], []
        if self.captions_only:
            messages = self._captions(messages)
        elif self.system and messages[0].role != "system":
            pieces.append(self._system_turn())
        length = sum(map(len, pieces))
        for message in messages:
            turn = self.turns[message.role]
            words = write(message.parts, placeholders, "" if self.captions_only else "\n")
            begin = length + len(turn.head)
            end = begin + len(turn.lead) + len(words) + len(turn.tail)
            pieces += (turn.head, turn.lead, words, turn.tail, self.after)
            length = end + len(self.after)
            if message.trains and end > begin:
                spans.append((begin, end))
        if reply:
            pieces.append(self.turns["assistant"].head)
        return Rendered("".join(pieces), tuple(spans))

    def to_jinja(self, image_token: str = "<image>") -> str:
        """The same template for ``tokenizer.chat_template``, so that an exported model carries it.

        Takes ``content`` as a string or as a list of ``{"type": "text"}`` and ``{"type": "image"}`` parts.
        Equal to :meth:`render` by test.
        """
        quote = functools.partial(json.dumps, ensure_ascii=False)
        lines = [f"{{{{- {quote(self.start)} -}}}}"] if self.start else []
        if self.system and not self.captions_only:
            lines += [
                "{%- if not messages or messages[0]['role'] != 'system' -%}",
                f"{{{{- {quote(self._system_turn())} -}}}}",
                "{%- endif -%}",
            ]
        lines += ["{%- for message in messages -%}"]
        for i, (role, turn) in enumerate(self.turns.items()):
            lines += [
                f"{{%- {'el' if i else ''}if message['role'] == '{role}' -%}}",
                f"{{{{- {quote(turn.head + turn.lead)} -}}}}",
            ]
        lines += [
            "{%- else -%}",
            "{{- raise_exception('unknown role: ' + message['role']) -}}",
            "{%- endif -%}",
            "{%- set told = message['role'] == 'assistant' -%}"
            if self.captions_only
            else "{%- set told = true -%}",
            "{%- if message['content'] is string -%}",
            "{%- if told -%}{{- message['content'] -}}{%- endif -%}",
            "{%- else -%}",
            "{%- set seen = namespace(words=false, image=false) -%}",
            "{%- for part in message['content'] -%}",
            "{%- if part['type'] == 'image' -%}",
            f"{{{{- {quote(image_token)} -}}}}{{%- set seen.image = true -%}}",
            "{%- elif part['text'] and told -%}",
        ]
        if not self.captions_only:
            lines += [
                "{%- if seen.image and not seen.words and part['text'][0] != '\\n' -%}",
                '{{- "\\n" -}}',
                "{%- endif -%}",
            ]
        lines += [
            "{%- set seen.words = true -%}{{- part['text'] -}}",
            "{%- endif -%}",
            "{%- endfor -%}",
            "{%- endif -%}",
        ]
        for i, (role, turn) in enumerate(self.turns.items()):
            lines += [
                f"{{%- {'el' if i else ''}if message['role'] == '{role}' -%}}",
                f"{{{{- {quote(turn.tail + self.after)} -}}}}",
            ]
        lines += ["{%- endif -%}", "{%- endfor -%}"]
        head = self.turns["assistant"].head
        if head:
            lines += ["{%- if add_generation_prompt -%}", f"{{{{- {quote(head)} -}}}}", "{%- endif -%}"]
        return "\n".join(lines)

    def _system_turn(self) -> str:
        turn = self.turns["system"]
        return turn.head + turn.lead + self.system + turn.tail + self.after

    def _captions(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Pictures of the question, then the answer."""
        if sum(message.role == "assistant" for message in messages) > 1 or len(messages) > 3:
            raise ValueError(
                f"template '{self.name}' writes one picture and its caption, found {len(messages)} messages; "
                f"use a chat template for conversations"
            )
        return [
            m
            if m.role == "assistant"
            else replace(m, parts=tuple(p for p in m.parts if isinstance(p, Image)))
            for m in messages
        ]


class TokenizerTemplate:
    """The tokenizer's own Jinja template.

    Where the template marks its answers with ``{% generation %}``, the marks are the spans. Elsewhere an
    answer is what the text of the conversation up to it has more than the text of the prompt before it: text
    prefixes, never token prefixes, and each is checked to be one. What the template writes after the stop
    does not train.
    """

    name = "tokenizer"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the template.

        Raises:
            ValueError: the tokenizer has none, or it cannot write one question and one answer.
        """
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer has no chat template of its own; choose one of {', '.join(TEMPLATES)}"
            )
        self._tokenizer = tokenizer
        self._marked = "{% generation" in self.to_jinja() or "{%- generation" in self.to_jinja()
        added = sorted(
            {t.content for t in tokenizer.added_tokens_decoder.values() if not t.content.isspace()}
        )
        self._added = alternatives(added)
        probe = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        text = self._write(probe)
        written = self._added.findall(text) if self._added else []
        self.control: tuple[str, ...] = tuple(dict.fromkeys(written))
        """Words that the template itself writes, and that nobody may write in a message."""
        answer = text[len(self._write(probe[:1], reply=True)) :]
        stop = self._added.search(answer) if self._added else None
        eos = tokenizer.eos_token
        self.stops: tuple[str, ...] = tuple(
            dict.fromkeys(word for word in (stop and stop.group(), eos) if word)
        )

    def render(
        self, messages: Sequence[Message], placeholders: Iterator[str], reply: bool = False
    ) -> Rendered:
        """The conversation as one text, see :meth:`ChatTemplate.render`.

        Raises:
            ValueError: the template refuses the conversation, or where its answers lie cannot be told.
        """
        turns = [{"role": m.role, "content": write(m.parts, placeholders, "\n")} for m in messages]
        text = self._write(turns, reply)
        trained = [i for i, message in enumerate(messages) if message.trains]
        if reply or not trained:
            return Rendered(text, ())
        if self._marked:
            return Rendered(text, tuple(self._marked_spans(turns, text, trained)))
        return Rendered(text, tuple(self._span(turns, text, i) for i in trained))

    def to_jinja(self, image_token: str = "<image>") -> str:
        """The template's source, unchanged."""
        return self._tokenizer.get_chat_template()

    def _write(self, turns: list[dict[str, str]], reply: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            written: Any = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=reply
            )
            return str(written)
        except TemplateError as error:
            raise ValueError(f"the tokenizer's chat template refuses this conversation: {error}") from error

    def _span(self, turns: list[dict[str, str]], text: str, i: int) -> Span:
        if turns[i]["role"] != "assistant":
            raise ValueError(
                f"message {i + 1}: with template 'tokenizer' only the assistant can train, found "
                f"{turns[i]['role']}"
            )
        before = self._write(turns[:i], reply=True)
        upto = text if i + 1 == len(turns) else self._write(turns[: i + 1])
        if not (upto.startswith(before) and text.startswith(upto)):
            raise ValueError(
                f"message {i + 1}: the tokenizer's chat template writes an answer differently when the "
                f"conversation goes on, so what trains cannot be told; choose one of {', '.join(TEMPLATES)}"
            )
        return len(before), self._after_stop(text, len(before), len(upto), turns[i]["content"])

    def _after_stop(self, text: str, begin: int, end: int, words: str) -> int:
        """End of the stop that follows the words; the whole tail where no token of its own ends the turn."""
        bare = words.strip()
        at = text.find(bare, begin, end)
        if at < 0:
            raise ValueError(
                f"the tokenizer's chat template rewrites the answer {bare[:40]!r}, so what trains cannot be "
                f"told; choose one of {', '.join(TEMPLATES)}"
            )
        stop = self._added.search(text, at + len(bare), end) if self._added else None
        return stop.end() if stop else end

    def _marked_spans(self, turns: list[dict[str, str]], text: str, trained: Sequence[int]) -> Iterator[Span]:
        from transformers.utils.chat_template_utils import render_jinja_template

        words: dict[str, Any] = self._tokenizer.special_tokens_map
        rendered: Any = render_jinja_template(
            [turns], chat_template=self.to_jinja(), return_assistant_tokens_mask=True, **words
        )
        (again,), (marks,) = rendered
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if again != text or len(marks) != len(answers) or not set(trained) <= set(answers):
            raise ValueError(
                f"the tokenizer's chat template marks {len(marks)} answers with generation, but the "
                f"conversation has {len(answers)}; choose one of {', '.join(TEMPLATES)}"
            )
        for i, (begin, end) in zip(answers, marks, strict=True):
            if i in trained:
                # Some templates mark the words only. The stop after them must train, or no reply ever ends.
                stop = self._added.match(text, end) if self._added else None
                yield begin, stop.end() if stop else end


AnyTemplate = ChatTemplate | TokenizerTemplate


def write(parts: Sequence[Part], placeholders: Iterator[str], after_images: str) -> str:
    """The words of one message, a placeholder for each picture.

    Args:
        parts: texts and pictures in reading order; empty texts do not count.
        placeholders: what is written for each picture.
        after_images: written once between the pictures that open the message and its words, unless these
            begin with it already.
    """
    pieces: list[str] = []
    words = image = False
    for part in parts:
        if isinstance(part, Image):
            pieces.append(next(placeholders))
            image = True
        elif part.text:
            if image and not words and part.text[0] != after_images:
                pieces.append(after_images)
            pieces.append(part.text)
            words = True
    return "".join(pieces)


def alternatives(words: Sequence[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of ``words``, the longest first; None for no words."""
    return re.compile("|".join(re.escape(w) for w in sorted(words, key=len, reverse=True))) if words else None


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins its texts with its BOS (Llama does; Phi, Qwen and SmolLM do not)."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def template_for(name: str, tokenizer: PreTrainedTokenizerBase) -> AnyTemplate:
    """The template called ``name``, bound to ``tokenizer``.

    Args:
        name: a key of :data:`TEMPLATES`, ``tokenizer``, or ``my_llm.py:TEMPLATE``.
        tokenizer: whose BOS and EOS are written.

    Raises:
        RecipeError: nobody knows the name.
        ValueError: the template does not suit the tokenizer.
    """
    if name == TokenizerTemplate.name:
        return TokenizerTemplate(tokenizer)
    template = find(name, {**TEMPLATES, TokenizerTemplate.name: None}, "template")
    if not isinstance(template, ChatTemplate):
        raise ValueError(f"template '{name}' must be a ChatTemplate(...), found {type(template).__name__}")
    return template.bind(tokenizer)


# The strings of LLaVA 1.5 (conv_vicuna_v1) and TinyLLaVA Factory (llama, phi, qwen2). The space between
# "ASSISTANT:" and the answer trains, because tokenizers join it to the first word; a prompt ends with
# "ASSISTANT:".
VICUNA_V1 = ChatTemplate(
    name="vicuna_v1",
    turns={
        "system": Turn(tail=" "),
        "user": Turn(head="USER:", lead=" ", tail=" "),
        "assistant": Turn(head="ASSISTANT:", lead=" ", tail="{eos}"),
    },
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    control=("{eos}",),
    stops=("{eos}",),
)

# As Qwen 2.5 and SmolLM 2 write it, without their default system words. The newline after
# a turn never trains.
CHATML = ChatTemplate(
    name="chatml",
    turns={
        "system": Turn("<|im_start|>system\n", "", "<|im_end|>"),
        "user": Turn("<|im_start|>user\n", "", "<|im_end|>"),
        "assistant": Turn("<|im_start|>assistant\n", "", "<|im_end|>"),
    },
    after="\n",
    control=("<|im_start|>", "<|im_end|>"),
    stops=("<|im_end|>",),
)

# LLaVA's pretraining text is picture, caption, newline. The end-of-text token after it is ours: with the
# newline alone a model cannot say where a caption of several lines ends.
PLAIN = ChatTemplate(
    name="plain",
    turns={"system": Turn(), "user": Turn(), "assistant": Turn(tail="\n{eos}")},
    control=("{eos}",),
    stops=("{eos}",),
    captions_only=True,
)

TEMPLATES: dict[str, ChatTemplate] = {t.name: t for t in (PLAIN, VICUNA_V1, CHATML)}
