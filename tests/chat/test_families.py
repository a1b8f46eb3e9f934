"""Every built-in template against the strings of the system it comes from, written out in full."""

import functools
import re
from itertools import repeat
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.chat.conftest import FakeProcessor
from tinymodal.chat.encode import Encoder
from tinymodal.chat.families import ALIASES, PUBLISHED, TEMPLATES
from tinymodal.chat.template import alternatives, known_as, suggest, template_for
from tinymodal.compose.tiny import tiny_tokenizer
from tinymodal.core.errors import CheckpointError, DataError, RecipeError
from tinymodal.core.types import IGNORE, Image, Message, Sample, Text

USER = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able "
    "to understand the visual content that the user provides, and assist the user with a variety of "
    "tasks using natural language.The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)
SAFETY = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n"
    "\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't share "
    "false information."
)
VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content "
    "that the user provides, and assist the user with a variety of tasks using natural language."
)
MPT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers."
)
OMNILMM = (
    "You are an artificial intelligence assistant, which gives helpful, detailed, and polite answers "
    "to the human's questions."
)
MINIGPT = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I "
    "provide it to you. Please answer my questions."
)
ENERGY = (
    "###Human: What are the key differences between renewable and non-renewable energy "
    "sources?###Assistant: Renewable energy sources are those that can be replenished naturally in a "
    "relatively short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
    "Non-renewable energy sources, on the other hand, are finite and will eventually be depleted, "
    "such as coal, oil, and natural gas. Here are some key differences between renewable and "
    "non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
    "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, and "
    "other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically "
    "have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote "
    "locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
    "different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social instability.\n"
)

# name -> two rounds with a picture in the first, [what trains] in brackets (no template writes one there).
# <s> and </s> stand for the tokenizer's own; the tokenizer begins its texts with <s>.
TEXTS = {
    "plain": "<s><image>⟦A cat.\n</s>⟧",
    "vicuna_v1": (
        f"<s>{USER} USER: <image>\nWhat is it? ASSISTANT:⟦ A cat.</s>⟧USER: Where? ASSISTANT:⟦ A mat.</s>⟧"
    ),
    "chatml": (
        "<s><|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n⟦A cat.<|im_end|>⟧\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n⟦A mat.<|im_end|>⟧\n"
    ),
    "phi": (
        f"<s>{USER} USER: <image>\nWhat is it? ASSISTANT:⟦ A cat.<|endoftext|>⟧"
        "USER: Where? ASSISTANT:⟦ A mat.<|endoftext|>⟧"
    ),
    "gemma": (
        f"<s>{USER} USER: <image>\nWhat is it? ASSISTANT:⟦ A cat.<eos>⟧USER: Where? ASSISTANT:⟦ A mat.<eos>⟧"
    ),
    "qwen2_base": (
        f"<s>{USER} USER: <image>\nWhat is it? ASSISTANT:⟦ A cat.<|endoftext|>⟧"
        "USER: Where? ASSISTANT:⟦ A mat.<|endoftext|>⟧"
    ),
    "qwen2_instruct": (
        f"<s>{USER} USER: <image>\nWhat is it? ASSISTANT:⟦ A cat.<|im_end|>⟧"
        "USER: Where? ASSISTANT:⟦ A mat.<|im_end|>⟧"
    ),
    "v0": (
        f"<s>{HUMAN}{ENERGY}###Human: <image>\nWhat is it?###Assistant:⟦ A cat.###⟧"
        "Human: Where?###Assistant:⟦ A mat.###⟧"
    ),
    "llava_v0": (
        f"<s>{HUMAN}###Human: <image>\nWhat is it?###Assistant:⟦ A cat.###⟧"
        "Human: Where?###Assistant:⟦ A mat.###⟧"
    ),
    "llava_v1": (
        f"<s>{HUMAN} USER: <image>\nWhat is it? ASSISTANT:⟦ A cat.</s>⟧USER: Where? ASSISTANT:⟦ A mat.</s>⟧"
    ),
    "v0_mmtag": (
        f"<s>{MMTAG}###Human: <Image><image></Image>\nWhat is it?###Assistant:⟦ A cat.###⟧"
        "Human: Where?###Assistant:⟦ A mat.###⟧"
    ),
    "v1_mmtag": (
        f"<s>{MMTAG} USER: <Image><image></Image>\nWhat is it? ASSISTANT:⟦ A cat.</s>⟧"
        "USER: Where? ASSISTANT:⟦ A mat.</s>⟧"
    ),
    "llama_2": (
        f"<s>[INST] <<SYS>>\n{SAFETY}\n<</SYS>>\n\n<image>\nWhat is it? [/INST]⟦ A cat. </s>⟧"
        "<s>[INST] Where? [/INST]⟦ A mat. </s>⟧"
    ),
    "llava_llama_2": (
        f"<s>[INST] <<SYS>>\n{VISION}\n<</SYS>>\n\n<image>\nWhat is it? [/INST]⟦ A cat. </s>⟧"
        "<s>[INST] Where? [/INST]⟦ A mat. </s>⟧"
    ),
    "mistral_instruct": (
        "<s>[INST] <image>\nWhat is it? [/INST]⟦ A cat. </s>⟧[INST] Where? [/INST]⟦ A mat. </s>⟧"
    ),
    "mpt": (
        f"<s><|im_start|>system\n{MPT}<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>"
        "<|im_start|>assistant\n⟦A cat.<|im_end|>⟧<|im_start|>user\nWhere?<|im_end|>"
        "<|im_start|>assistant\n⟦A mat.<|im_end|>⟧"
    ),
    "chatml_direct": (
        "<s><|im_start|>system\nAnswer the questions.<|im_end|>"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>"
        "<|im_start|>assistant\n⟦A cat.<|im_end|>⟧<|im_start|>user\nWhere?<|im_end|>"
        "<|im_start|>assistant\n⟦A mat.<|im_end|>⟧"
    ),
    "zephyr": (
        f"<s><|system|>\n{OMNILMM}</s>\n<|user|>\n<image>\nWhat is it?</s>\n<|assistant|>\n⟦A cat.</s>⟧\n"
        "<|user|>\nWhere?</s>\n<|assistant|>\n⟦A mat.</s>⟧\n"
    ),
    "minicpm": "<s><用户><image>\nWhat is it?<AI>⟦A cat.</s>⟧<用户>Where?<AI>⟦A mat.</s>⟧",
    "minicpm_v_2_6": (
        "<s><|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n⟦A cat.<|im_end|>⟧\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n⟦A mat.<|im_end|>⟧\n"
    ),
    "minigpt": (
        "<s>###Human: <Img><image></Img> What is it? ###Assistant:⟦ A cat.###⟧"
        "Human: Where? ###Assistant:⟦ A mat.###⟧"
    ),
    "tinygptv": (
        "<s>###Human: <Img><image></Img> What is it? ###Assistant:⟦ A cat.###⟧"
        "Human: Where? ###Assistant:⟦ A mat.###⟧"
    ),
    "minigpt_4": (
        f"<s>{MINIGPT}###Human: <Img><image></Img> What is it?###Assistant:⟦ A cat.###⟧"
        "Human: Where?###Assistant:⟦ A mat.###⟧"
    ),
    "tinygptv_vqa": (
        "<s>###Human: <Img><image></Img> What is it?###Assistant:⟦ A cat.###⟧"
        "Human: Where?###Assistant:⟦ A mat.###⟧"
    ),
    "tinygptv_stage4": (
        "<s>[INST] <Img><image></Img> What is it? [/INST]⟦A cat.###⟧<s>[INST] Where? [/INST]⟦A mat.###⟧"
    ),
    "tinygptv_stage4_eval": (
        "<s>Instruct: <Img><image></Img> What is it? /n Output:⟦ A cat.###⟧"
        "Instruct: Where? /n Output:⟦ A mat.###⟧"
    ),
    "llama_3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A cat.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nWhere?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A mat.<|eot_id|>⟧"
    ),
    "phi_3": (
        "<s><|user|>\n<image>\nWhat is it?<|end|>\n<|assistant|>\n⟦A cat.<|end|>⟧\n"
        "<|user|>\nWhere?<|end|>\n<|assistant|>\n⟦A mat.<|end|>⟧\n"
    ),
    "gemma_it": (
        "<s><start_of_turn>user\n<image>\nWhat is it?<end_of_turn>\n"
        "<start_of_turn>model\n⟦A cat.<end_of_turn>⟧\n"
        "<start_of_turn>user\nWhere?<end_of_turn>\n<start_of_turn>model\n⟦A mat.<end_of_turn>⟧\n"
    ),
}
# Where a prompt ends with more than the assistant's head.
REPLIES = {
    "tinygptv": "###Assistant: ",
    "minigpt_4": "Assistant: ",
    "tinygptv_vqa": "Assistant: ",
    "tinygptv_stage4_eval": "/n Output: ",
}
# "Be brief." from the system, "Q" from the user, and the reply's place.
WITH_SYSTEM = {
    "plain": "",
    "vicuna_v1": "Be brief. USER: Q ASSISTANT:",
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    ),
    "phi": "Be brief. USER: Q ASSISTANT:",
    "v0": f"Be brief.{ENERGY}###Human: Q###Assistant:",
    "llava_v0": "Be brief.###Human: Q###Assistant:",
    "llama_2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nQ [/INST]",
    "mistral_instruct": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nQ [/INST]",
    "mpt": "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nQ<|im_end|><|im_start|>assistant\n",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nQ</s>\n<|assistant|>\n",
    "minigpt": "Be brief.###Human: Q ###Assistant:",
    "minigpt_4": "Be brief.###Human: Q###Assistant: ",
    "llama_3": (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "phi_3": "<|system|>\nBe brief.<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\n",
    "gemma_it": "<start_of_turn>user\nBe brief.\n\nQ<end_of_turn>\n<start_of_turn>model\n",
}

QUESTION, AGAIN = Message("user", (Image(b"2"), Text("What is it?"))), Message("user", (Text("Where?"),))
TALK = (
    QUESTION,
    Message("assistant", (Text("A cat."),)),
    AGAIN,
    Message("assistant", (Text("A mat."),)),
)
REQUIRED = ("<|endoftext|>", "<eos>")
ADDED = (
    *REQUIRED,
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|system|>", "<|user|>", "<|assistant|>"),
    *("<|end|>", "<start_of_turn>", "<end_of_turn>"),
)
ZEPHYRS = ("<|system|>", "<|user|>", "<|assistant|>")
"""Tokens of Phi-3 that are plain text elsewhere."""


def byte_level(words: str = "") -> PreTrainedTokenizerFast:
    """As Qwen: no BOS before a text."""
    return tiny_tokenizer(words.split())


def with_bos() -> PreTrainedTokenizerFast:
    """As Llama 3."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def pad_is_eos() -> PreTrainedTokenizerFast:
    """As Phi-2, StableLM 2 and Qwen 2's base: one token begins, ends and fills."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """As Llama 2: spaces are ▁, unknown characters are bytes; where ▁ is put differs by ``kind``."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": i + 3 for i in range(256)}}
    for word in ("▁", *"ASERUITNHumanstcd.:#", "▁A", "at", "cat", "▁cat", "re", "red", "▁red", "##", "###"):
        vocab.setdefault(word, len(vocab))
    merges = [("▁", "A"), ("a", "t"), ("c", "at"), ("▁", "cat"), ("r", "e"), ("re", "d"), ("▁", "red")]
    merges += [("#", "#"), ("##", "#")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
        vocab.setdefault(left, len(vocab))
        vocab.setdefault(right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


EXACT = {"byte level": byte_level, "with BOS": with_bos, "pad is eos": pad_is_eos}
PIECES = {kind: functools.partial(sentencepiece, kind) for kind in ("legacy", "first", "always")}


def fit(tokenizer: PreTrainedTokenizerFast, name: str) -> PreTrainedTokenizerFast:
    """With the tokens of the template's family: those it has, and those that composing adds."""
    words = [*TEMPLATES[name].required, *TEMPLATES[name].control]
    tokenizer.add_tokens(
        [AddedToken(w, special=True, normalized=False) for w in words if "{" not in w], special_tokens=True
    )
    return tokenizer


@functools.cache
def bound(name: str, kind: str = "with BOS"):
    make = {**EXACT, **PIECES}[kind]
    tokenizer = fit(make(), name)
    return template_for(name, tokenizer), tokenizer


@functools.cache
def encoder(name: str, kind: str) -> Encoder:
    template, tokenizer = bound(name, kind)
    return Encoder(FakeProcessor(tokenizer), template)


def render(template, messages, reply=False):
    return template.render(messages, repeat("<image>"), reply)


def talk(name: str) -> tuple[Message, ...]:
    return TALK[:2] if name == "plain" else TALK


def marked(rendered) -> str:
    """The text, and ⟦what trains⟧."""
    pieces, at = [], 0
    for begin, end in rendered.spans:
        pieces += [rendered.text[at:begin], "⟦", rendered.text[begin:end], "⟧"]
        at = end
    return "".join([*pieces, rendered.text[at:]])


def as_jinja_input(messages):
    return [
        {
            "role": m.role,
            "content": [
                {"type": "text", "text": p.text} if isinstance(p, Text) else {"type": "image"}
                for p in m.parts
            ],
        }
        for m in messages
    ]


def test_every_template_is_tested_here():
    assert TEXTS.keys() == TEMPLATES.keys()
    assert all(template.name == name for name, template in TEMPLATES.items())


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_its_systems_strings_and_trains_the_answers_and_their_stops(name):
    template, _ = bound(name)
    assert marked(render(template, talk(name))) == TEXTS[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_text_up_to_the_reply(name):
    template, _ = bound(name)
    text, head = render(template, talk(name)[:-1], reply=True).text, TEMPLATES[name].turns["assistant"].head
    whole = TEXTS[name].rpartition("⟦")[0].replace("⟦", "").replace("⟧", "")
    assert text == whole.removesuffix(head) + REPLIES.get(name, head)
    assert (TEMPLATES[name].reply is not None) == (name in REPLIES)


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_words_of_the_system_take_the_place_of_the_templates_own(name):
    template, _ = bound(name, "byte level")
    messages = (Message("system", (Text("Be brief."),)), Message("user", (Text("Q"),)))
    assert render(template, messages, reply=True).text == WITH_SYSTEM[name]


# Real templates of the families, as their tokenizers carry them (the strips left out).
OWN = {
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "llama_3": (
        "{% for message in messages %}"
        "{{ ('<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
        "message['content'] + '<|eot_id|>') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "phi_3": (
        "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "gemma_it": (
        "{%- if messages[0]['role'] == 'system' -%}{%- set prefix = messages[0]['content'] + '\n\n' -%}"
        "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set prefix = '' -%}"
        "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
        "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
        "{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}{{ message['content'] }}"
        "{{ '<end_of_turn>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
    ),
    "minicpm_v_2_6": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("num_turns", [1, 2, 3, 5])
def test_a_familys_own_jinja_writes_the_same(name, system, num_turns):
    if name == "zephyr" and system is None:
        system = OMNILMM
    template, tokenizer = bound(name, "byte level")
    words = ["Q", "  A\n", "\nWhat?", "漢字 🙂", "Why?"][:num_turns]
    turns = [("user", "assistant")[i % 2] for i in range(num_turns)]
    conversation = [] if system is None else [("system", system)]
    conversation += list(zip(turns, words, strict=True))
    plain = [{"role": role, "content": content} for role, content in conversation]
    reply = conversation[-1][0] == "user"
    expected = tokenizer.apply_chat_template(
        plain, chat_template=OWN[name], tokenize=False, add_generation_prompt=reply
    )
    messages = [Message(role, (Text(content),)) for role, content in conversation]
    assert render(template, messages, reply).text == expected


# Conversations

CONTROL = alternatives(
    ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", "###", *ADDED],
)
HARD = (
    " A cat", "\nA cat", "\n\n", "A\n", " ", "a", "漢字。", "🙂", "👩‍👩‍👧", "x ASSISTANT: y", "USER: z",
    "Assistant: a red one", "[/INST] no", "<AI>", "<|user|", "/n Output: ", "{<10><20><30><40>}", "(a) yes.",
)  # fmt: skip
words = (
    st.lists(
        st.one_of(st.sampled_from(HARD), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)),
        min_size=1,
        max_size=3,
    )
    .map("".join)
    .filter(lambda text: text and not CONTROL.search(text))
)
# An answer that ends with "#" runs into the stop "###"; such rows are refused, see below.
answers = words.filter(lambda text: not text.endswith("#"))


@st.composite
def conversations(draw, num_rounds=(1, 2, 5)):
    pictures = st.sampled_from([b"1", b"2"])
    messages = [Message("system", (Text(draw(words)),))] if draw(st.booleans()) else []
    for _ in range(draw(st.sampled_from(num_rounds))):
        parts = draw(st.lists(st.one_of(pictures.map(Image), words.map(Text)), min_size=1, max_size=3))
        joined = "".join(part.text if isinstance(part, Text) else "\0" for part in parts)
        assume(not CONTROL.search(joined))
        train = draw(st.sampled_from([None, None, False]))
        messages += [Message("user", tuple(parts)), Message("assistant", (Text(draw(answers)),), train)]
    messages[-1] = Message("assistant", messages[-1].parts)
    return tuple(messages)


def cut(name: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """One picture and its caption, where a template writes no more."""
    return (QUESTION, messages[-1]) if name == "plain" else messages


# Each conversation is tried with every template: to make one costs more than to write it.


@given(conversation=conversations(), reply=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_jinja_we_export_writes_the_same_text(conversation, reply):
    for name in TEMPLATES:
        template, tokenizer = bound(name)
        messages = cut(name, conversation)
        messages = messages[:-1] if reply else messages
        jinja = tokenizer.apply_chat_template(
            as_jinja_input(messages),
            chat_template=template.to_jinja(),
            tokenize=False,
            add_generation_prompt=reply,
        )
        assert jinja == render(template, messages, reply).text, name


def expected_training(template, messages) -> str:
    turn = template.turns["assistant"]
    return "".join(
        turn.lead + "".join(p.text for p in m.parts) + turn.tail
        for m in messages
        if m.role == "assistant" and m.trains
    )


@pytest.mark.parametrize("kind", EXACT)
@given(conversation=conversations())
@settings(max_examples=25, deadline=None)
def test_what_trains_is_exactly_the_answers_and_their_stops(kind, conversation):
    for name in TEMPLATES:
        learn, messages = encoder(name, kind), cut(name, conversation)
        encoded = learn(Sample(messages, "made:1"))
        ids = encoded.ids[encoded.labels != IGNORE].tolist()
        assert learn.tokenizer.decode(ids) == expected_training(learn.template, messages), name


@pytest.mark.parametrize("name", TEMPLATES)
def test_hard_answers_train_whole_in_every_round(name):
    """A blank or newline in front, Chinese, emoji, one letter, and the words that open an answer."""
    template, _ = bound(name)
    turn = template.turns["assistant"]
    for num_rounds in (1,) if name == "plain" else (1, 2, 5):
        for answer in HARD:
            rendered = render(template, (QUESTION, Message("assistant", (Text(answer),))) * num_rounds)
            trained = [rendered.text[begin:end] for begin, end in rendered.spans]
            assert trained == [turn.lead + answer + turn.tail] * num_rounds


def letters(text: str) -> str:
    """▁ and every blank left out: what a sentencepiece tokenizer may join over the border of a span."""
    return "".join(text.replace("▁", " ").split())


@pytest.mark.parametrize("kind", PIECES)
@given(conversation=conversations(num_rounds=(1, 2)))
@settings(max_examples=15, deadline=None)
def test_a_sentencepiece_tokenizer_trains_the_same_words(kind, conversation):
    """It may join blanks over the border of a span; never a letter, and never the stop."""
    for name in TEMPLATES:
        learn, messages = encoder(name, kind), cut(name, conversation)
        encoded = learn(Sample(messages, "made:1"))
        backend = learn.tokenizer.backend_tokenizer
        pieces = [backend.id_to_token(i) for i in encoded.ids[encoded.labels != IGNORE].tolist()]
        raw = b"".join(bytes.fromhex(p[3:5]) if re.fullmatch("<0x..>", p) else p.encode() for p in pieces)
        assert letters(raw.decode()) == letters(expected_training(learn.template, messages)), name


@pytest.mark.parametrize("name", ["phi", "qwen2_base", "vicuna_v1", "llama_2", "zephyr", "minicpm", "plain"])
def test_where_padding_is_the_end_of_text_the_end_of_text_trains(name):
    learn = encoder(name, "pad is eos")
    assert learn.tokenizer.pad_token_id == learn.tokenizer.eos_token_id
    encoded = learn(Sample(talk(name), "made:1"))
    eos = learn.tokenizer.eos_token_id
    num_rounds = len(talk(name)) // 2
    assert encoded.labels[encoded.labels == eos].tolist() == [eos] * num_rounds
    assert eos in learn.stop_ids


def test_tinyllavas_golden_span_of_phi():
    """Its " A cat on a mat." trains as words that begin with their space, and the end of text."""
    learn = Encoder(FakeProcessor(fit(byte_level("A cat on a mat"), "phi")), "phi")
    caption = (QUESTION, Message("assistant", (Text("A cat on a mat."),)))
    encoded = learn(Sample(caption, "made:1"))
    kept = encoded.ids[encoded.labels != IGNORE].tolist()
    assert [learn.tokenizer.decode([i]) for i in kept] == [
        *(" A", " cat", " on", " a", " mat", "."),
        "<|endoftext|>",
    ]


# Stops

TEXT_STOPS = [name for name in TEMPLATES if TEMPLATES[name].stop_words]


def test_only_the_single_separator_styles_end_with_plain_text():
    expected = "v0 llava_v0 v0_mmtag minigpt tinygptv minigpt_4 tinygptv_vqa tinygptv_stage4"
    assert [*expected.split(), "tinygptv_stage4_eval"] == TEXT_STOPS
    for name, template in TEMPLATES.items():
        assert len(template.stops) == 1
        assert template.turns["assistant"].tail.endswith(template.stops[0])
        assert template.stop_words == (("###",) if name in TEXT_STOPS else ())


@pytest.mark.parametrize("name", TEXT_STOPS)
@pytest.mark.parametrize("answer", ["# Title\n### Part", "###", "C#", "a##"])
def test_an_answer_that_a_plain_text_stop_would_cut_is_refused(name, answer):
    bad = (*TALK, AGAIN, Message("assistant", (Text(answer),)))
    with pytest.raises(
        DataError, match=f"^row:1: message 6: template '{name}' ends a reply with '###'"
    ) as raised:
        encoder(name, "byte level")(Sample(bad, "row:1"))
    assert "\n" not in str(raised.value)
    assert "choose a template whose stop is a token of its own, such as 'chatml'" in str(raised.value)
    # What does not train is only read: a question may hold it, and an answer of the past.
    past = (Message("user", (Text("### Q"),)), Message("assistant", (Text(answer),), train=False), *TALK)
    assert encoder(name, "byte level")(Sample(past, "row:1")).num_targets > 0


def test_a_plain_text_stop_trains_also_where_the_tokenizer_joins_it_to_the_answer():
    """GPT-2 may write ".###" as one token, or "###" as one, or neither: the span holds them all."""
    for merged in ("", "### ###", ".### .###", ".# .#"):
        tokenizer = byte_level(merged)
        learn = Encoder(FakeProcessor(tokenizer), "minigpt")
        encoded = learn(Sample(TALK, "made:1"))
        assert tokenizer.decode(encoded.ids[encoded.labels != IGNORE]) == " A cat.### A mat.###"
        assert learn.template.stop_words == ("###",)


@pytest.mark.parametrize(
    ("name", "stop"),
    [("phi", "<|endoftext|>"), ("gemma", "<eos>"), ("qwen2_base", "<|endoftext|>")],
)
def test_a_tokenizer_that_lacks_the_stop_is_refused_with_what_it_has(name, stop):
    words = (
        f"template '{name}' ends a reply with '{stop}', and this tokenizer has no such token; it has '<s>', "
        f"'</s>', '<pad>', '<image>', and its end of text is '</s>'. Template 'vicuna_v1' ends with"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        template_for(name, tiny_tokenizer())
    with pytest.raises(CheckpointError, match="ends a reply with"):
        Encoder(FakeProcessor(), name)


def test_control_words_are_not_asked_of_the_tokenizer_but_of_whoever_composes():
    for name in ("llama_3", "phi_3", "gemma_it"):
        template = template_for(name, tiny_tokenizer())
        assert set(template.control) == set(TEMPLATES[name].control)
        with pytest.raises(CheckpointError, match=f"template '{name}' needs .* to be one token"):
            Encoder(FakeProcessor(), template)


def test_nobody_may_write_a_required_stop():
    learn = encoder("qwen2_instruct", "byte level")
    with pytest.raises(
        DataError, match=r"message 2 \(assistant\) contains '<\|im_end\|>'. It is a control token"
    ):
        learn(Sample((AGAIN, Message("assistant", (Text("a<|im_end|>"),))), "row:1"))


# Names


def test_what_others_call_a_template_is_found():
    expected = {
        **{"pretrain": "plain", "v0_plain": "plain"},
        **{"llama": "vicuna_v1", "v1": "vicuna_v1", "vicuna_v1_1": "vicuna_v1"},
        **{"mistral_direct": "chatml_direct", "omnilmm": "zephyr"},
        **{"minicpm_v_2": "minicpm", "minicpm_llama3_v_2_5": "llama_3"},
        **{"CONV_VISION_Vicuna0": "minigpt_4", "CONV_VISION_LLama2": "minigpt_4"},
        **{"CONV_VISION_minigptv2": "tinygptv_vqa"},
    }
    assert expected == ALIASES
    assert not ALIASES.keys() & TEMPLATES.keys()
    tokenizer = tiny_tokenizer()
    for alias, name in ALIASES.items():
        assert known_as(alias) == name
        assert template_for(alias, tokenizer) == template_for(name, tokenizer)
    assert (known_as("chatml"), known_as("mine.py:T")) == ("chatml", "mine.py:T")


def test_a_misspelt_name_names_the_nearest_of_all():
    with pytest.raises(RecipeError, match=r"unknown template 'qwen2_instuct'.*did you mean 'qwen2_instruct'"):
        template_for("qwen2_instuct", tiny_tokenizer())


def ends_with(eos: str, *tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(word, special=True) for word in (eos, *tokens)])
    tokenizer.eos_token = eos
    return tokenizer


SUGGESTED = {
    "TinyLlama, Vicuna": ("llama", lambda: ends_with("</s>"), "vicuna_v1"),
    "Llama 3": ("llama", lambda: ends_with("<|eot_id|>", *ADDED), "llama_3"),
    "Llama 3, base": ("llama", lambda: ends_with("<|end_of_text|>", *ADDED), "vicuna_v1"),
    "SmolLM 2": ("llama", lambda: ends_with("<|im_end|>"), "chatml"),
    "Phi-2": ("phi", pad_is_eos, "phi"),
    "StableLM 2": ("stablelm", pad_is_eos, "phi"),
    "Phi-3": ("phi3", lambda: ends_with("<|endoftext|>", *ADDED), "phi_3"),
    "Qwen 2, base": ("qwen2", pad_is_eos, "qwen2_base"),
    "Qwen 2, instruct": ("qwen2", lambda: ends_with("<|im_end|>", "<|endoftext|>"), "qwen2_instruct"),
    "Qwen 3": ("qwen3", lambda: ends_with("<|im_end|>"), "chatml"),
    "Gemma": ("gemma", lambda: ends_with("<eos>", "<start_of_turn>", "<end_of_turn>"), "gemma"),
    "Gemma 2": ("gemma2", lambda: ends_with("<eos>", "<start_of_turn>", "<end_of_turn>"), "gemma_it"),
    "Mistral": ("mistral", lambda: ends_with("</s>"), "mistral_instruct"),
    "MiniCPM": ("minicpm", lambda: ends_with("</s>"), "minicpm"),
    "OmniLMM": ("omnilmm", lambda: ends_with("</s>"), "zephyr"),
    "OpenELM": ("openelm", lambda: ends_with("</s>"), "vicuna_v1"),
    "of a tokenizer that has none of the tokens": ("phi3", tiny_tokenizer, None),
    "unknown": ("mamba", tiny_tokenizer, None),
}


@pytest.mark.parametrize("case", SUGGESTED)
def test_a_familys_published_template_is_suggested(case):
    model_type, make, name = SUGGESTED[case]
    assert suggest(model_type, make()) == name


def test_only_known_templates_are_suggested():
    assert {name for names in PUBLISHED.values() for name in names} <= TEMPLATES.keys()


# The page

PAGE = Path(__file__).parents[2] / "docs" / "templates.md"
LONG = {USER: "USER", HUMAN: "HUMAN", MMTAG: "MMTAG", SAFETY: "SAFETY", VISION: "VISION", MPT: "MPT"} | {
    OMNILMM: "OMNILMM",
    MINIGPT: "MINIGPT",
    ENERGY: "###Human: {ENERGY Q}###Assistant: {ENERGY A}",
}


def shown(name: str) -> str:
    """A template's text as the page has it: newlines as ↵, «what trains», long system words by their name."""
    text = TEXTS[name]
    for words, label in LONG.items():
        text = text.replace(words, label if words is ENERGY else f"{{{label}}}")
    return text.replace("\n", "↵").replace("⟦", "«").replace("⟧", "»")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_page_shows_what_is_written(name):
    page = PAGE.read_text()
    assert f"## `{name}`" in page, f"docs/templates.md lacks {name}"
    section = page.split(f"## `{name}`\n")[1].split("\n## ")[0]
    assert f"```text\n{shown(name)}\n```" in section, f"expected:\n{shown(name)}"
    reply = f"A prompt ends with `{REPLIES.get(name)}`"
    assert (reply in section) == (name in REPLIES)
    for alias in (alias for alias, own in ALIASES.items() if own == name):
        assert f"`{alias}`" in section, f"docs/templates.md does not say that {name} is also {alias}"


def test_the_page_quotes_the_systems_words():
    page = PAGE.read_text()
    for words, label in LONG.items():
        if words is not ENERGY:
            assert f"| `{{{label}}}` | `{words.replace(chr(10), '↵')}` |" in page
