"""Any causal language model gives, behind our embeddings, its own logits to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from tinymodal.compose.tiny import tiny_language
from tinymodal.model.configuration_tinymodal import TinyModalConfig
from tinymodal.model.language import (
    OWN_LANGUAGES,
    LanguageHead,
    build_decoder,
    causal_class,
    language_config,
    packs_exactly,
)
from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration, load_exactly

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "hidden_size": 32,
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},
    "falcon": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2},
    "opt": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "lfm2": {**SIZES, "num_hidden_layers": 4, "full_attn_idxs": [1, 3], "block_ff_dim": 64},
    "qwen3_5_text": {**SIZES, "num_hidden_layers": 4, "head_dim": 8},
    "granite": {**SIZES, "logits_scaling": 7.0},
    "gemma2": {**SIZES, "head_dim": 8, "final_logit_softcapping": 3.0},
    "qwen3": {**SIZES, "head_dim": 8},
    "gemma3_text": {**SIZES, "head_dim": 8, "sliding_window": 4},
}


# As published, where the config says more than its sizes. The rest of a family's names: TinyLlama, Vicuna and
# Llama 2 are llama; StableLM-2 stablelm; Phi-1.5 and 2 phi; Zephyr mistral; Qwen 2 and 2.5 qwen2.
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 16, **LLAMA_3}},
    ),
    "SmolLM2": ("llama", {"tie_word_embeddings": True}),
    "Qwen2.5-0.5B": ("qwen2", {"tie_word_embeddings": True}),
    "Phi-3 128k": ("phi3", {"rope_parameters": {**LONG, "original_max_position_embeddings": 16}}),
    "StableLM-2": ("stablelm", {"use_qkv_bias": True, "rope_parameters": None}),
    "Mistral 0.1": ("mistral", {"sliding_window": 4}),
}


def config_of(name: str, **values: Any) -> PreTrainedConfig:
    kind, published = VARIANTS.get(name, (name, {}))
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind in OWN_LANGUAGES:
        return language_config({**tiny_language(kind), **ids, **values})
    return CONFIG_MAPPING[kind](**{**ids, **SPECIAL.get(kind, SIZES), **published, **values})


def loud(model: torch.nn.Module) -> torch.nn.Module:
    """Weights so large that a forgotten bias, cap or scale is plain to see."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.5 if p.dim() == 1 or "embed" in name else 0.1))
    return model.eval()


def both(kind: str, **values: Any) -> tuple[TinyModalForConditionalGeneration, torch.nn.Module]:
    config, same = config_of(kind, **values), config_of(kind, **values)
    torch.manual_seed(0)
    own = OWN_LANGUAGES.get(kind)
    theirs = loud(own.causal._from_config(same) if own else AutoModelForCausalLM.from_config(same))
    ours = TinyModalForConditionalGeneration(TinyModalConfig(text_config=config, image_token_id=5)).eval()
    # A copy: with ``language=theirs`` both would run the same modules.
    load_exactly(ours.model.language_model, theirs.base_model.state_dict())
    load_exactly(ours.lm_head, theirs.get_output_embeddings().state_dict())
    return ours, theirs


def test_a_language_model_in_hand_is_taken_as_it_is_and_not_copied():
    _, theirs = both("llama")
    config = TinyModalConfig(text_config=theirs.config, image_token_id=5)
    before = {name: p.clone() for name, p in theirs.named_parameters()}
    ours = TinyModalForConditionalGeneration(config, theirs)
    assert ours.model.language_model is theirs.base_model
    assert ours.lm_head is theirs.get_output_embeddings()
    for name, p in theirs.named_parameters():
        assert torch.equal(p, before[name]), name


FAMILIES = ["llama", "qwen2", "qwen3", "phi", "gemma", "gemma2", "gemma3_text", "stablelm", "smollm3", "gpt2"]
FAMILIES += ["granite", "cohere", "gpt_neo", "opt", "mistral", "phi3", "olmo2", *OWN_LANGUAGES, *VARIANTS]
PACKED = [kind for kind in FAMILIES if kind not in ("cohere", "opt")]


@pytest.mark.parametrize("kind", FAMILIES)
def test_text_only_logits_equal_the_language_models_own(kind):
    ours, theirs = both(kind)
    ids = torch.randint(6, VOCABULARY, (2, 9))
    with torch.no_grad():
        expected = theirs(input_ids=ids, use_cache=False).logits
        states = ours.model(input_ids=ids).last_hidden_state
        # 0.0 with transformers 5.23; logits are near 10.
        torch.testing.assert_close(ours(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.head(states), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.head(states[0, 3]), expected[0, 3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_generation_with_a_cache_is_repeated_choice_of_the_best(kind):
    ours, _ = both(kind)
    prompt = torch.randint(6, VOCABULARY, (2, 7))
    ids = prompt
    for _ in range(4):
        ids = torch.cat([ids, ours(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    ours.generation_config.eos_token_id = None
    made = ours.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False
    )
    assert torch.equal(made, ids)


@pytest.mark.parametrize(
    ("kind", "plain"),
    [(k, True) for k in ("llama", "phi", "qwen2", "gpt2", "gemma", "stablelm", "openelm", "tinygptv_phi")],
)
def test_a_plain_head_is_one_matrix_and_perhaps_a_bias(kind, plain):
    ours, _ = both(kind)
    assert ours.head_is_plain is plain
    states = torch.randn(3, 32)
    expected = states @ ours.head_weight().T
    if ours.head_bias() is not None:
        expected = expected + ours.head_bias()
    torch.testing.assert_close(ours.head(states), expected, rtol=0, atol=1e-5)
    assert (ours.head_bias() is not None) is (kind in ("phi", "tinygptv_phi"))


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere", "minicpm"])
def test_a_head_that_caps_or_scales_says_that_it_is_not_plain(kind):
    """Its cap or scale is not lost either: the bare product is far from the logits."""
    ours, theirs = both(kind)
    assert not ours.head_is_plain
    ids = torch.randint(6, VOCABULARY, (1, 5))
    with torch.no_grad():
        bare = ours.lm_head(ours.model(input_ids=ids).last_hidden_state)
        assert (bare - theirs(input_ids=ids).logits).abs().max() > 0.5


@pytest.mark.parametrize("kind", ["llama", "phi", "stablelm", "qwen2", "gemma", "gpt2", *OWN_LANGUAGES])
def test_the_end_of_text_trains_as_a_word_also_where_it_pads(kind):
    """transformers keeps the pad token's embedding as it is, which there is the word after every answer."""
    config = config_of(kind, pad_token_id=2)
    ours = TinyModalForConditionalGeneration(TinyModalConfig(text_config=config))
    logits = ours(input_ids=torch.tensor([[7, 2, 8, 9]])).logits
    # Not the loss of the head, which moves every row: what the words that were read get.
    words = ours.get_input_embeddings().weight
    if ours.lm_head.weight is words:
        ours.lm_head.weight = torch.nn.Parameter(words.detach().clone())
        logits = ours(input_ids=torch.tensor([[7, 2, 8, 9]])).logits
    moved = torch.autograd.grad(logits.square().sum(), words)[0].abs().sum(1) > 0
    assert moved.nonzero().squeeze(1).tolist() == [2, 7, 8, 9]


def test_asking_a_head_moves_no_random_state():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    LanguageHead(config_of("phi"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["gpt2", "gemma", "gpt_neo", "opt", "llama", "minicpm", "openelm"])
def test_a_tied_head_stays_tied_whatever_the_family_calls_its_embedding(kind, tmp_path):
    name = "share_input_output_layers" if kind == "openelm" else "tie_word_embeddings"
    ours, _ = both(kind, **{name: True})
    assert ours.config.tie_word_embeddings
    assert ours.lm_head.weight is ours.get_input_embeddings().weight
    ours.save_pretrained(tmp_path)
    again = TinyModalForConditionalGeneration.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    ids = torch.randint(6, VOCABULARY, (1, 5))
    assert torch.equal(again(input_ids=ids).logits, ours(input_ids=ids).logits)


def leak(kind: str) -> float:
    """Largest difference between two documents packed in a row and each alone."""
    ours, _ = both(kind)
    one, two = torch.randint(6, VOCABULARY, (1, 6)), torch.randint(6, VOCABULARY, (1, 7))
    places = torch.cat([torch.arange(6), torch.arange(7)])[None]
    with torch.no_grad():
        packed = ours(input_ids=torch.cat([one, two], 1), position_ids=places).logits
        alone = torch.cat([ours(input_ids=one).logits, ours(input_ids=two).logits], 1)
    return float((packed - alone).abs().max())


@pytest.mark.parametrize("kind", PACKED)
def test_families_said_to_pack_exactly_do(kind):
    assert packs_exactly(config_of(kind))
    # 1e-5 of logits near 10; the families below are 0.05 apart or more.
    assert leak(kind) < 1e-4


@pytest.mark.parametrize("kind", ["opt", "falcon", "lfm2", "qwen3_5_text"])
def test_families_said_to_leak_do(kind):
    """If one stops to leak the list may be shortened."""
    assert not packs_exactly(config_of(kind))
    assert leak(kind) > 1e-3


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_families_without_position_ids_are_not_packed(kind):
    assert not packs_exactly(config_of(kind))


def test_more_than_a_language_model_is_refused_and_its_part_named():
    whole = CONFIG_MAPPING["gemma3"]()
    message = "'gemma3' is more than a language model; take the config of its language part, 'gemma3_text'"
    for given in (whole, {"model_type": "gemma3"}):
        with pytest.raises(ValueError, match=message):
            language_config(given)
    assert language_config(whole.text_config) is whole.text_config
    with pytest.raises(
        ValueError, match=r"no language model of model_type 'lama', nor is it one .*\(openelm, "
    ):
        language_config({"model_type": "lama"})


def test_every_own_language_is_found_by_its_type(tmp_path):
    for kind, own in OWN_LANGUAGES.items():
        config = config_of(kind)
        assert type(config) is own.config
        assert config.model_type == kind
        assert causal_class(config) is own.causal
        assert type(build_decoder(config)) is own.decoder
        # Inside a composed model's config, which is what a saved folder holds.
        again = TinyModalConfig(**TinyModalConfig(text_config=config).to_dict())
        assert type(again.text_config) is own.config
        assert again.text_config.to_diff_dict() == config.to_diff_dict()
        assert again.get_text_config().num_hidden_layers == 2


def test_language_models_that_embeddings_cannot_drive_are_refused():
    with pytest.raises(ValueError, match="'mamba': its decoder takes no past_key_values"):
        build_decoder(CONFIG_MAPPING["mamba"](vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2))
    per_layer = config_of("llama")
    per_layer.hidden_size_per_layer_input = 8
    with pytest.raises(ValueError, match="looks up token ids in every layer"):
        build_decoder(per_layer)
    with pytest.raises(ValueError, match="head has weights besides one matrix"):
        LanguageHead(config_of("modernbert-decoder"))
    with pytest.raises(ValueError, match="no causal language model for model_type 'clip_vision_model'"):
        causal_class(CONFIG_MAPPING["clip_vision_model"]())


def test_weights_that_do_not_fit_are_refused_by_name():
    module = torch.nn.Linear(2, 3)
    with pytest.raises(
        ValueError, match=r"1 missing \['bias'\], 1 not expected \['scale'\], 1 of another shape"
    ):
        load_exactly(module, {"weight": torch.zeros(3, 4), "scale": torch.zeros(1)})
    ours, theirs = both("llama")
    del theirs.model.layers[1]
    with pytest.raises(ValueError, match="missing"):
        load_exactly(ours.model.language_model, theirs.base_model.state_dict())
