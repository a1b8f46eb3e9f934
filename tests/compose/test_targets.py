"""Where a composition will run is told before anything is trained, with the part that does not fit."""

from __future__ import annotations

import re

import pytest

from tests.port.exported import NEXT
from tinymodal.compose.build import load
from tinymodal.compose.targets import TARGETS, judge, lines, not_in_vllm, verdicts
from tinymodal.compose.tiny import tiny_model


def refused(target, without=(), **what):
    made = tiny_model(**{"vision": "siglip_vision_model", "connector": "mlp", **what})
    return judge(target, made).refused(without)


def test_a_composition_that_is_a_llava_fits_everywhere():
    found = verdicts(tiny_model("siglip_vision_model", "mlp"))
    assert [verdict.target for verdict in found] == list(TARGETS)
    assert [verdict.refused() for verdict in found] == [None] * 4


def test_the_starter_fits_hub_and_without_its_mouth_onnx():
    starter = load("starter")
    assert judge("hub", starter).refused() is None
    assert judge("onnx", starter).refused() == (
        "speech: the graphs hold towers, connectors and the language model; no talker"
    )
    assert judge("onnx", starter).refused(("speech",)) is None
    assert judge("llava", starter).refused(("audio", "speech")).startswith("vision: a tower of kind")
    assert judge("gguf", starter).refused(("vision", "audio", "speech")) is None
    told = lines(verdicts(starter))
    assert told[0].startswith(
        "  hub   transformers with remote code; not in vLLM's Transformers backend (audio"
    )
    assert told[1].startswith("  llava no (vision: a tower of kind 'tinymodal_tower'")
    assert told[2].startswith("  gguf  llama.cpp, --without vision,audio,speech (vision: ")
    assert told[3].startswith("  onnx  onnxruntime, --without speech (speech: ")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"vision": "dinov2"}, "vision: a tower of kind 'dinov2'; vLLM reads Llava with"),
        ({"vision": None}, r"vision \(missing\): this model has no tower"),
        ({"connector": "pixel_shuffle"}, "vision.connector: 'pixel_shuffle'; Llava's is 'mlp' of two layers"),
        ({"options": {"depth": 3}}, "vision.connector: 'mlp' of depth 3"),
        ({"sight": {"marks": ["newline"]}}, "vision.marks: newline; Llava has no learned marks"),
        ({"sight": {"resize": "tiles"}}, "vision.resize: 'tiles'; Llava has one tile"),
        ({"sight": {"resize": "anyres"}}, r"vision.merge: marks \[\] and merge 'flat'; LlavaNext has"),
        ({"sight": {"size_px": 48}}, "vision.size_px: pictures of 48 x 48 px for a tower of 24 x 24 px"),
        ({"sight": {"final_norm": True}}, "vision: final_norm"),
        ({"language": "gpt2"}, "language: a 'gpt2' keeps its decoder under 'transformer'"),
        ({"language": "phi"}, "language: the language head has a bias"),
        ({"language": "gemma2"}, "language: the logits of a 'gemma2' are capped"),
        ({"language": "openelm"}, "language: transformers has no class for 'openelm'"),
        ({"audio": "tinymodal_ear"}, "audio: this model hears; Llava cannot"),
    ],
)
def test_what_llava_has_no_place_for_is_named(what, said):
    assert re.match(said, refused("llava", **what))


def test_llava_next_is_one_with_its_newline():
    assert refused("llava", vision="clip_vision_model", sight=NEXT) is None


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"vision": "clip_vision_model"}, "vision: a CLIP tower; llama.cpp puts the class token last"),
        ({"vision": "dinov2"}, "vision: a tower of kind 'dinov2'; of those that llama.cpp knows"),
        ({"feature_layer": (-2, -1)}, "vision.feature_layer: [-2, -1]; llama.cpp's projector reads one"),
        ({"options": {"activation": "relu"}}, "vision.connector: 'mlp' with relu; llama.cpp's 'mlp' has"),
        ({"sight": {"drop_first": True}}, "vision: drop_first; llama.cpp's graph for LLaVA has no such step"),
        ({"sight": {"resize": "tiles"}}, "vision.resize: 'tiles'; written is the projector of one tile"),
        ({"language": "phi"}, "language: 'phi' is none of llama, mistral, qwen2, qwen3"),
        ({"attention_bias": True}, "language: attention_bias of a 'llama'"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "language: rotary positions of type 'linear'",
        ),
        (
            {"language": "mistral", "sliding_window": 64},
            "language: sliding windows; llama.cpp would attend over everything",
        ),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_named(what, said):
    found = refused("gguf", **what)
    assert found is not None
    assert found.startswith(said)


def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused_by_gguf():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "<pad>", "<s>", "</s>", "a", "<image>"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made = tiny_model("siglip_vision_model", "mlp", tokenizer=tokenizer, template="plain", vocab_size=16)
    assert judge("gguf", made).refused() == (
        "language.tokenizer: the tokenizer is WordLevel over Whitespace; only byte-level BPE is written "
        "(those of Llama 3, Qwen, SmolLM, GPT-2)"
    )


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"language": "gemma2"}, "language: a 'gemma2' whose layers are not all full attention"),
        ({"sight": {"resize": "native"}}, "vision.resize: 'native': tiles of many sizes"),
    ],
)
def test_what_the_graphs_have_no_place_for_is_named(what, said):
    assert refused("onnx", **what).startswith(said)


def test_vllms_backend_takes_one_tile_and_no_sound():
    assert not_in_vllm(tiny_model("siglip_vision_model", "pixel_shuffle")) is None
    assert not_in_vllm(tiny_model("clip_vision_model", "mlp", sight=NEXT)).startswith(
        "vision: the backend takes one"
    )
    assert not_in_vllm(tiny_model(audio="tinymodal_ear")).startswith("audio: ")
    assert not_in_vllm(tiny_model(vision=None)).startswith("vision: ")


def test_parts_that_are_left_out_are_not_judged():
    assert refused("llava", audio="tinymodal_ear", without=("audio",)) is None
    assert refused("gguf", vision="clip_vision_model", without=("vision",)) is None
