import re
from itertools import repeat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.chat.template import ChatTemplate, TokenizerTemplate, Turn, template_for
from tinymodal.compose.tiny import tiny_tokenizer
from tinymodal.core.errors import RecipeError
from tinymodal.core.types import Image, Message, Text

TOKENIZER = tiny_tokenizer()
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif "
    "%}"
)


def say(*texts: str, image: bool = True, system: str | None = None) -> tuple[Message, ...]:
    """Turns of user and assistant, the first with a picture."""
    opening = (Message("system", (Text(system),)),) if system is not None else ()
    turns = tuple(
        Message(
            "assistant" if i % 2 else "user", ((Image(b"1"),) if image and i == 0 else ()) + (Text(text),)
        )
        for i, text in enumerate(texts)
    )
    return opening + turns


def render(template, messages, reply=False):
    return template.render(messages, repeat("<image>"), reply)


def trained(rendered):
    return [rendered.text[begin:end] for begin, end in rendered.spans]


def test_vicuna_writes_the_strings_of_llava_and_tinyllava():
    template = template_for("vicuna_v1", TOKENIZER)
    rendered = render(template, say("What is it?", "A cat.", "Where?", "On a mat."))
    assert rendered.text == (
        f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Where? ASSISTANT: On a mat.</s>"
    )
    assert trained(rendered) == [" A cat.</s>", " On a mat.</s>"]
    prompt = render(template, say("What is it?"), reply=True)
    assert prompt.text == f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"
    assert render(template, say("Q", "A", image=False, system="Be brief.")).text == (
        "Be brief. USER: Q ASSISTANT: A</s>"
    )


def test_plain_writes_picture_and_caption_and_drops_the_question():
    template = template_for("plain", TOKENIZER)
    rendered = render(template, say("Describe it.", "A cat on a mat."))
    assert rendered.text == "<image>A cat on a mat.\n</s>"
    assert trained(rendered) == ["A cat on a mat.\n</s>"]
    assert render(template, say("Describe it."), reply=True).text == "<image>"
    with pytest.raises(ValueError, match="one picture and its caption, found 4 messages"):
        render(template, say("a", "b", "c", "d"))


def test_chatml_writes_what_qwen_and_smollm_write():
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    messages = say("\nQ", "  A\n", "", "漢字 🙂", image=False, system="S")
    plain = [{"role": m.role, "content": "".join(p.text for p in m.parts)} for m in messages]
    rendered = render(template_for("chatml", tokenizer), messages)
    assert rendered.text == tokenizer.apply_chat_template(plain, tokenize=False)
    assert trained(rendered) == ["  A\n<|im_end|>", "漢字 🙂<|im_end|>"]
    prompt = render(template_for("chatml", tokenizer), messages[:2], reply=True)
    assert prompt.text == tokenizer.apply_chat_template(plain[:2], tokenize=False, add_generation_prompt=True)


def test_pictures_that_open_a_message_get_one_newline_and_others_stay_where_they_are():
    template = template_for("chatml", TOKENIZER)

    def words(*parts):
        text = render(template, (Message("user", parts),), reply=True).text
        return re.fullmatch(r"<\|im_start\|>user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n", text, re.S)[1]

    image = Image(b"1")
    assert words(image, Text("Q")) == "<image>\nQ"
    assert words(image, Text("\nQ")) == "<image>\nQ"
    assert words(image, image, Text("Q")) == "<image><image>\nQ"
    assert words(image, Text(""), Text("Q")) == "<image>\nQ"
    assert words(Text("in "), image, Text(" and "), image) == "in <image> and <image>"
    assert words(image) == "<image>"


def test_a_tokenizer_that_begins_texts_with_bos_gets_it_from_the_template_once():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for name in ("plain", "vicuna_v1", "chatml"):
        text = render(template_for(name, tokenizer), say("Q", "A")).text
        assert text.startswith("<s>")
        assert text.count("<s>") == 1


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def test_the_jinja_we_export_takes_plain_strings_too():
    template = template_for("vicuna_v1", TOKENIZER)
    messages = [{"role": "user", "content": "<image>\nQ"}, {"role": "assistant", "content": "A"}]
    text = TOKENIZER.apply_chat_template(messages, chat_template=template.to_jinja(), tokenize=False)
    assert text == render(template, say("Q", "A")).text


# Shapes of real templates: what follows a stop, what is stripped, what is marked.
JINJA = {
    "chatml": (CHATML, "<|im_end|>"),
    "chatml, default system": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    "llama 2": (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
        "message['content'] | trim + ' [/INST]' }}{% else %}{{ ' ' + message['content'] | trim + ' ' + "
        "eos_token }}{% endif %}{% endfor %}",
        " </s>",
    ),
    "zephyr, marked": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{% if message['role'] == "
        "'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}{% "
        "else %}{{ message['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "</s>",
    ),
    "marked without its stop": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{%- generation -%}{{ message['content'] }}{%- endgeneration "
        "-%}{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", JINJA)
@given(answers=st.lists(texts, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_spans_of_a_tokenizers_own_template_are_the_answers_and_their_stops(name, answers):
    jinja, stop = JINJA[name]
    template = TokenizerTemplate(tiny_tokenizer(chat_template=jinja))
    messages = say(*[text for answer in answers for text in ("Q", answer)], image=False)
    rendered = render(template, messages)
    assert rendered.text == template._tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.parts[0].text} for m in messages], tokenize=False
    )
    # Only llama 2's template strips, and it writes one space before the answer.
    expected = [f" {a.strip()}{stop}" if name == "llama 2" else a + stop for a in answers]
    assert trained(rendered) == expected


@pytest.mark.parametrize("name", JINJA)
def test_stops_and_control_words_are_read_off_the_template(name):
    jinja, stop = JINJA[name]
    template = TokenizerTemplate(tiny_tokenizer(chat_template=jinja))
    assert template.stops[0] == stop.strip()
    assert set(template.stops) <= {"<|im_end|>", "</s>"}
    assert stop.strip() in template.control


def test_only_turns_that_train_have_spans_in_a_tokenizers_template():
    for jinja, stop in JINJA.values():
        template = TokenizerTemplate(tiny_tokenizer(chat_template=jinja))
        q = Message("user", (Text("Q"),))
        messages = (
            q,
            Message("assistant", (Text("no"),), train=False),
            q,
            Message("assistant", (Text("yes"),)),
        )
        assert [t.strip() for t in trained(render(template, messages))] == [f"yes{stop}"]


def test_a_template_that_writes_early_answers_differently_is_refused():
    jinja = (
        "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}{% elif loop.last %}"
        "A:<think></think>{{ m.content }}</s>{% else %}A:{{ m.content }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    template = TokenizerTemplate(tiny_tokenizer(chat_template=jinja))
    assert trained(render(template, say("Q", "A", image=False))) == ["<think></think>A</s>"]
    with pytest.raises(
        ValueError, match="message 2: the tokenizer's chat template writes an answer differently"
    ):
        render(template, say("Q", "A", "Q", "B", image=False))


def test_a_template_that_rewrites_answers_or_refuses_is_named():
    upper = "{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}"
    with pytest.raises(ValueError, match="rewrites the answer 'yes'"):
        render(TokenizerTemplate(tiny_tokenizer(chat_template=upper)), say("Q", "yes", image=False))
    no_system = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    )
    template = TokenizerTemplate(tiny_tokenizer(chat_template=no_system))
    with pytest.raises(ValueError, match="refuses this conversation: no system here"):
        render(template, say("Q", "A", image=False, system="S"))


def test_a_tokenizer_without_template_or_end_is_refused_with_the_choices():
    with pytest.raises(
        ValueError, match="no chat template of its own; choose one of plain, vicuna_v1, chatml"
    ):
        template_for("tokenizer", tiny_tokenizer())
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="this tokenizer has none"):
        template_for("vicuna_v1", tokenizer)


def test_unknown_templates_name_the_nearest():
    with pytest.raises(RecipeError, match=r"unknown template 'chatlm'.*did you mean 'chatml'"):
        template_for("chatlm", TOKENIZER)


def test_your_own_template_is_one_value_in_a_file(tmp_path: Path):
    (tmp_path / "my_llm.py").write_text(
        "from tinymodal.chat.template import ChatTemplate, Turn\n"
        "TEMPLATE = ChatTemplate(name='mine', turns={'system': Turn(), 'user': Turn('Q: ', '', ' '), "
        "'assistant': Turn('A:', ' ', '{eos}')}, stops=('{eos}',))\n"
        "OTHER = 3\n"
    )
    template = template_for(f"{tmp_path}/my_llm.py:TEMPLATE", TOKENIZER)
    assert render(template, say("x", "y", image=False)).text == "Q: x A: y</s>"
    with pytest.raises(ValueError, match="must be a ChatTemplate"):
        template_for(f"{tmp_path}/my_llm.py:OTHER", TOKENIZER)


def test_a_user_turn_can_be_made_to_train():
    template = ChatTemplate(
        name="t",
        turns={"system": Turn(), "user": Turn("U:", "", "|"), "assistant": Turn("A:", "", "|")},
        start="",
    )
    messages = (Message("user", (Text("q"),), train=True), Message("assistant", (Text("a"),)))
    assert trained(render(template, messages)) == ["q|", "a|"]
