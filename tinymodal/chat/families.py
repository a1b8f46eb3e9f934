"""Every template that is built in, as data: the strings of the systems whose checkpoints and recipes we read.

Where a system writes one thing in training and another in chat, the value says which it is and why.
``docs/templates.md`` shows each text, what trains in it, and who uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tinymodal.chat.form import ChatTemplate, Turn

SYSTEM_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SYSTEM_HUMAN = SYSTEM_USER.replace("curious user", "curious human").replace("the user's", "the human's")
SYSTEM_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with "
    "a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
SYSTEM_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
    "illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
SYSTEM_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
SYSTEM_MPT = (
    "A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
SYSTEM_OMNILMM = (
    "You are an artificial intelligence assistant, which gives helpful, detailed, and polite answers to the "
    "human's questions."
)
SYSTEM_MINIGPT = (
    "Give the following image: <Img>ImageContent</Img>. "
    "You will be able to see the image once I provide it to you. Please answer my questions."
)
EXAMPLE_V0 = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of "
    "time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other "
    "hand, are finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key "
    "differences between renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy "
    "sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
    "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, and other "
    "negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have "
    "lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote "
    "locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different "
    "situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social instability.\n",
)
"""LLaVA's worked example, its last newline included (``llava/conversation.py``)."""

# LLaVA's pretraining text is picture, caption, newline. The end-of-text token after it is ours: with the
# newline alone a model cannot say where a caption of several lines ends.
PLAIN = ChatTemplate(
    name="plain",
    turns={"system": Turn(), "user": Turn(), "assistant": Turn(tail="\n{eos}")},
    after_pictures="",
    stops=("{eos}",),
    control=("{eos}",),
    captions_only=True,
)

# The strings of LLaVA 1.5 (conv_vicuna_v1) and TinyLLaVA Factory (llama). The space between "ASSISTANT:" and
# the answer trains, because tokenizers join it to the first word; a prompt ends with "ASSISTANT:".
VICUNA_V1 = ChatTemplate(
    name="vicuna_v1",
    turns={
        "system": Turn(tail=" "),
        "user": Turn("USER:", " ", " "),
        "assistant": Turn("ASSISTANT:", " ", "{eos}"),
    },
    system=SYSTEM_USER,
    stops=("{eos}",),
    control=("{eos}",),
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
    stops=("<|im_end|>",),
    control=("<|im_start|>", "<|im_end|>"),
)


def _user_assistant(name: str, stop: str) -> ChatTemplate:
    """TinyLLaVA Factory's one form, with the stop that it spells out for a language model."""
    turns = {**VICUNA_V1.turns, "assistant": Turn("ASSISTANT:", " ", stop)}
    return replace(VICUNA_V1, name=name, turns=turns, stops=(stop,), control=(), required=(stop,))


PHI = _user_assistant("phi", "<|endoftext|>")
GEMMA = _user_assistant("gemma", "<eos>")
QWEN2_BASE = _user_assistant("qwen2_base", "<|endoftext|>")
QWEN2_INSTRUCT = _user_assistant("qwen2_instruct", "<|im_end|>")

# LLaVA's conversation in its first style ("single"). Its trainer wrote the same turns otherwise ("### Human:
# q\n### Assistant: a\n### ", and no example) and trained the heads of the turns; chat wrote this.
LLAVA_V0 = ChatTemplate(
    name="llava_v0",
    turns={
        "system": Turn(tail="###"),
        "user": Turn("Human:", " ", "###"),
        "assistant": Turn("Assistant:", " ", "###"),
    },
    system=SYSTEM_HUMAN,
    stops=("###",),
)
V0 = replace(LLAVA_V0, name="v0", example=EXAMPLE_V0)
LLAVA_V1 = replace(VICUNA_V1, name="llava_v1", system=SYSTEM_HUMAN)

# As LLaVA trained them. Its chat window put the picture into a round of its own, answered with "Received.".
V0_MMTAG = replace(LLAVA_V0, name="v0_mmtag", system=SYSTEM_MMTAG, picture=("<Image>", "</Image>"))
V1_MMTAG = replace(VICUNA_V1, name="v1_mmtag", system=SYSTEM_MMTAG, picture=("<Image>", "</Image>"))

LLAMA_2 = ChatTemplate(
    name="llama_2",
    turns={
        "system": Turn("<<SYS>>\n", "", "\n<</SYS>>\n\n"),
        "user": Turn("[INST] ", "", " "),
        "assistant": Turn("[/INST]", " ", " {eos}"),
    },
    between="{bos}",
    system=SYSTEM_LLAMA_2,
    system_inside=True,
    stops=("{eos}",),
    control=("{eos}",),
)
LLAVA_LLAMA_2 = replace(LLAMA_2, name="llava_llama_2", system=SYSTEM_LLAVA_LLAMA_2)
MISTRAL_INSTRUCT = replace(LLAMA_2, name="mistral_instruct", between="", system=None)

# LLaVA's "mpt" style is ChatML without the newlines between the turns.
MPT = replace(CHATML, name="mpt", after="", system=SYSTEM_MPT)
CHATML_DIRECT = replace(CHATML, name="chatml_direct", after="", system="Answer the questions.")

# "<|user|>" and its like are plain text to Zephyr's tokenizer: only the end of text is a token.
ZEPHYR = ChatTemplate(
    name="zephyr",
    turns={
        "system": Turn("<|system|>\n", "", "{eos}"),
        "user": Turn("<|user|>\n", "", "{eos}"),
        "assistant": Turn("<|assistant|>\n", "", "{eos}"),
    },
    after="\n",
    system=SYSTEM_OMNILMM,
    stops=("{eos}",),
    control=("{eos}",),
)

# "<用户>" and "<AI>" are plain text to MiniCPM's tokenizer. Its trainer ends only the last
# answer with the end of text; here every answer has it.
MINICPM = ChatTemplate(
    name="minicpm",
    turns={"system": Turn(tail="\n"), "user": Turn("<用户>"), "assistant": Turn("<AI>", "", "{eos}")},
    stops=("{eos}",),
    control=("{eos}",),
)
MINICPM_V_2_6 = replace(CHATML, name="minicpm_v_2_6", system="You are a helpful assistant.")

# Stage 3 of MiniGPT-4 and TinyGPT-V: '###Human: {} ###Assistant: '. The "###" that opens a later round is the
# stop of the answer before it. An empty system turn writes the first one.
MINIGPT = ChatTemplate(
    name="minigpt",
    turns={
        "system": Turn(tail="###"),
        "user": Turn("Human:", " ", " "),
        "assistant": Turn("###Assistant:", " ", "###"),
    },
    system="",
    picture=("<Img>", "</Img>"),
    after_pictures=" ",
    stops=("###",),
)
# For published checkpoints: they were trained on answers that were tokenized alone, after a prompt that ends
# with the space. Train new models with 'minigpt', where the space belongs to the first word.
TINYGPTV = replace(MINIGPT, name="tinygptv", reply="###Assistant: ")
# How both demos ask (CONV_VISION_Vicuna0 and CONV_VISION_LLama2).
MINIGPT_4 = replace(
    MINIGPT,
    name="minigpt_4",
    turns={**MINIGPT.turns, "user": Turn("Human:", " ", "###"), "assistant": Turn("Assistant:", " ", "###")},
    system=SYSTEM_MINIGPT,
    reply="Assistant: ",
)
# How TinyGPT-V's evaluations ask a stage 4 model (CONV_VISION_minigptv2, prepare_texts in eval_utils.py).
TINYGPTV_VQA = replace(MINIGPT_4, name="tinygptv_vqa", system="")
# What that stage 4 was trained on: its recipe names no prompt_template, so '[INST] {} [/INST]' of
# minigpt_v2.py holds.
TINYGPTV_STAGE4 = replace(
    MINIGPT,
    name="tinygptv_stage4",
    turns={
        "system": Turn(tail="\n"),
        "user": Turn("[INST] ", "", " "),
        "assistant": Turn("[/INST]", "", "###"),
    },
    system=None,
    between="{bos}",
)
# Of tinygptv_stage4_eval.yaml; the "/n" stands there so.
TINYGPTV_STAGE4_EVAL = replace(
    MINIGPT,
    name="tinygptv_stage4_eval",
    turns={
        "system": Turn(tail="\n"),
        "user": Turn("Instruct:", " ", " "),
        "assistant": Turn("/n Output:", " ", "###"),
    },
    system=None,
    reply="/n Output: ",
)

LLAMA_3 = ChatTemplate(
    name="llama_3",
    turns={
        "system": Turn("<|start_header_id|>system<|end_header_id|>\n\n", "", "<|eot_id|>"),
        "user": Turn("<|start_header_id|>user<|end_header_id|>\n\n", "", "<|eot_id|>"),
        "assistant": Turn("<|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>"),
    },
    stops=("<|eot_id|>",),
    control=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
PHI_3 = ChatTemplate(
    name="phi_3",
    turns={
        "system": Turn("<|system|>\n", "", "<|end|>"),
        "user": Turn("<|user|>\n", "", "<|end|>"),
        "assistant": Turn("<|assistant|>\n", "", "<|end|>"),
    },
    after="\n",
    stops=("<|end|>",),
    control=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
)
# Gemma's own. Gemma 1 and 2 know no system turn; Gemma 3 puts it in front of the first question, as here.
GEMMA_IT = ChatTemplate(
    name="gemma_it",
    turns={
        "system": Turn(tail="\n\n"),
        "user": Turn("<start_of_turn>user\n", "", "<end_of_turn>"),
        "assistant": Turn("<start_of_turn>model\n", "", "<end_of_turn>"),
    },
    after="\n",
    system_inside=True,
    stops=("<end_of_turn>",),
    control=("<start_of_turn>", "<end_of_turn>"),
)

TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        PLAIN,
        VICUNA_V1,
        CHATML,
        PHI,
        GEMMA,
        QWEN2_BASE,
        QWEN2_INSTRUCT,
        V0,
        LLAVA_V0,
        LLAVA_V1,
        V0_MMTAG,
        V1_MMTAG,
        LLAMA_2,
        LLAVA_LLAMA_2,
        MISTRAL_INSTRUCT,
        MPT,
        CHATML_DIRECT,
        ZEPHYR,
        MINICPM,
        MINICPM_V_2_6,
        MINIGPT,
        TINYGPTV,
        MINIGPT_4,
        TINYGPTV_VQA,
        TINYGPTV_STAGE4,
        TINYGPTV_STAGE4_EVAL,
        LLAMA_3,
        PHI_3,
        GEMMA_IT,
    )
}

ALIASES: dict[str, str] = {
    "pretrain": "plain",
    "v0_plain": "plain",
    "llama": "vicuna_v1",
    "v1": "vicuna_v1",
    "vicuna_v1_1": "vicuna_v1",
    "mistral_direct": "chatml_direct",
    "omnilmm": "zephyr",
    "minicpm_v_2": "minicpm",
    "minicpm_llama3_v_2_5": "llama_3",
    "CONV_VISION_Vicuna0": "minigpt_4",
    "CONV_VISION_LLama2": "minigpt_4",
    "CONV_VISION_minigptv2": "tinygptv_vqa",
}
"""What other systems call a template -> its name here."""

PUBLISHED: Mapping[str, tuple[str, ...]] = {
    "gemma": ("gemma", "gemma_it"),
    "gemma2": ("gemma_it",),
    "gemma3_text": ("gemma_it",),
    "llama": ("llama_3", "chatml", "vicuna_v1"),
    "minicpm": ("minicpm",),
    "mistral": ("mistral_instruct",),
    "mpt": ("mpt",),
    "omnilmm": ("zephyr",),
    "openelm": ("vicuna_v1",),
    "phi": ("phi",),
    "phi3": ("phi_3",),
    "qwen2": ("qwen2_instruct", "qwen2_base"),
    "qwen3": ("chatml",),
    "smollm3": ("chatml",),
    "stablelm": ("phi",),
}
"""A language model's ``model_type`` -> templates of published models built on it."""
