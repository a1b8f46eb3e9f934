"""Find a template by its name, and read the one that a tokenizer carries.

The tokenizer's own Jinja template is the one that is not data (see ``form.py``): there the trained spans are
found by rendering text prefixes, and a template whose prefixes do not match is refused instead of guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tinymodal.chat.families import ALIASES, PUBLISHED, TEMPLATES
from tinymodal.chat.form import ChatTemplate, Rendered, Span, Turn, alternatives, has_token, write, writes_bos
from tinymodal.core.lookup import find
from tinymodal.core.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ALIASES",
    "TEMPLATES",
    "AnyTemplate",
    "ChatTemplate",
    "Rendered",
    "TokenizerTemplate",
    "Turn",
    "alternatives",
    "known_as",
    "suggest",
    "template_for",
    "write",
    "writes_bos",
]


class TokenizerTemplate:
    """The tokenizer's own Jinja template.

    Where the template marks its answers with ``{% generation %}``, the marks are the spans. Elsewhere an
    answer is what the text of the conversation up to it has more than the text of the prompt before it: text
    prefixes, never token prefixes, and each is checked to be one. What the template writes after the stop
    does not train.
    """

    name = "tokenizer"
    stop_words: tuple[str, ...] = ()
    """Its stops are tokens."""

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

    def to_jinja(self, image_token: str = "<image>", audio_token: str | None = None) -> str:
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


def known_as(name: str) -> str:
    """The name in :data:`TEMPLATES` for what another system calls ``name``; any other name as it is."""
    return ALIASES.get(name, name)


def template_for(name: str, tokenizer: PreTrainedTokenizerBase) -> AnyTemplate:
    """The template called ``name``, bound to ``tokenizer``.

    Args:
        name: a key of :data:`TEMPLATES` or :data:`ALIASES`, ``tokenizer``, or ``my_llm.py:TEMPLATE``.
        tokenizer: whose BOS and EOS are written.

    Raises:
        RecipeError: nobody knows the name.
        ValueError: the template does not suit the tokenizer.
    """
    name = known_as(name)
    if name == TokenizerTemplate.name:
        return TokenizerTemplate(tokenizer)
    template = find(name, {**TEMPLATES, **ALIASES, TokenizerTemplate.name: None}, "template")
    if not isinstance(template, ChatTemplate):
        raise ValueError(f"template '{name}' must be a ChatTemplate(...), found {type(template).__name__}")
    return template.bind(tokenizer)


def suggest(model_type: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that published models of this family use with such a tokenizer, for a message to name.

    Args:
        model_type: of the language model's config, such as ``qwen2``.
        tokenizer: decides between several: the one that ends with its end-of-text token goes first.

    Returns:
        A key of :data:`TEMPLATES` that this tokenizer can write without new tokens, or None.
    """
    fitting = []
    for name in PUBLISHED.get(model_type, ()):
        try:
            bound = TEMPLATES[name].bind(tokenizer)
        except ValueError:
            continue
        if all(has_token(tokenizer, word) for word in bound.control):
            fitting.append(bound)
    ending = [template for template in fitting if tokenizer.eos_token in template.stops]
    return next((template.name for template in (*ending, *fitting)), None)
