"""Whatever works with the language models of transformers works with those it has no class for."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from tests.model.test_language import loud
from tinymodal.compose.tiny import tiny_language
from tinymodal.model.language import OWN_LANGUAGES, causal_class, language_config

IDS = torch.arange(6, 15)[None]


@pytest.fixture(params=OWN_LANGUAGES)
def causal(request) -> torch.nn.Module:
    torch.manual_seed(0)
    config = language_config(tiny_language(request.param, vocab_size=96))
    return loud(causal_class(config)._from_config(config))


@torch.no_grad()
def test_a_position_at_a_time_with_a_cache_is_the_same_as_all_at_once(causal):
    whole = causal(input_ids=IDS, use_cache=False)
    assert whole.past_key_values is None
    cache = DynamicCache(config=causal.config)
    steps = [
        causal(input_ids=IDS[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(9)
    ]
    # 5e-7 or less of logits near 10, as for llama.
    torch.testing.assert_close(torch.cat(steps, 1), whole.logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_repeated_choice_of_the_best(causal, cache):
    ids = IDS
    for _ in range(5):
        ids = torch.cat([ids, causal(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    causal.generation_config.eos_token_id = None
    made = causal.generate(IDS, max_new_tokens=5, do_sample=False, cache_implementation=cache)
    assert torch.equal(made, ids)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(causal):
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), IDS], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = causal(input_ids=padded, attention_mask=mask, position_ids=places).logits[:, 4:]
    torch.testing.assert_close(logits, causal(input_ids=IDS).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_embeddings_in_the_place_of_words_say_the_same(causal):
    logits = causal(inputs_embeds=causal.get_input_embeddings()(IDS)).logits
    assert torch.equal(logits, causal(input_ids=IDS).logits)
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
        causal.base_model()


@torch.no_grad()
def test_every_kind_of_attention_gives_the_same(causal):
    sdpa = causal(input_ids=IDS).logits
    causal.set_attn_implementation("eager")
    out = causal(input_ids=IDS, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(out.logits, sdpa, rtol=0, atol=1e-5)
    layers = causal.config.num_hidden_layers
    assert [a.shape[-2:] for a in out.attentions] == [(9, 9)] * layers
    assert all(torch.allclose(a.sum(-1), torch.ones(())) for a in out.attentions)
    # Of the last layer's output the norm, as in every decoder of transformers.
    assert len(out.hidden_states) == layers + 1
    assert torch.equal(out.hidden_states[-1], causal.base_model(input_ids=IDS).last_hidden_state)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradients_are_the_same_where_activations_are_computed_again(causal):
    def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    again = copy.deepcopy(causal)
    again.gradient_checkpointing_enable()
    once, twice = gradients(causal), gradients(again)
    assert all(grad is not None for grad in once.values())
    for name, grad in once.items():
        torch.testing.assert_close(twice[name], grad, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_saved_one_is_read_again_and_a_tied_head_stays_tied(causal, tmp_path):
    causal.save_pretrained(tmp_path)
    again, info = type(causal).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.config.to_diff_dict() == causal.config.to_diff_dict()
    assert torch.equal(again(input_ids=IDS).logits, causal(input_ids=IDS).logits)
    tied = again.lm_head.weight is again.get_input_embeddings().weight
    assert tied is bool(causal.config.tie_word_embeddings)


@torch.no_grad()
def test_only_the_asked_logits_are_computed(causal):
    whole = causal(input_ids=IDS).logits
    torch.testing.assert_close(
        causal(input_ids=IDS, logits_to_keep=2).logits, whole[:, -2:], rtol=0, atol=1e-5
    )
    assert isinstance(causal(input_ids=IDS, return_dict=False), tuple)


def test_an_unknown_activation_is_named():
    for kind, key in (("openelm", "activation_fn_name"), ("minicpm", "hidden_act")):
        config = language_config({**tiny_language(kind), key: "fatrelu"})
        with pytest.raises(ValueError, match="unknown activation 'fatrelu'; transformers knows"):
            causal_class(config)(config)
