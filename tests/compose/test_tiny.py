import time

import pytest
import torch

from tinymodal.compose.tiny import SPECIAL, tiny_language, tiny_model, tiny_tokenizer, tiny_vision
from tinymodal.model.language import OWN_LANGUAGES


def test_the_tokenizer_writes_any_text_and_keeps_it():
    tokenizer = tiny_tokenizer()
    text = "a red 漢字 🙂\n\n  yes <|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.convert_tokens_to_ids(word) for word in SPECIAL] == list(range(6))
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")


def test_words_given_to_the_tokenizer_are_one_token_each():
    tokenizer = tiny_tokenizer(["turquoise hexagon"])
    assert len(tokenizer(" turquoise hexagon")["input_ids"]) == 2
    assert len(tiny_tokenizer()(" turquoise hexagon")["input_ids"]) > 2
    assert tokenizer.get_vocab() == tiny_tokenizer(["turquoise hexagon"]).get_vocab()


@pytest.mark.parametrize(
    "vision", ["clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "dinov2", None]
)
def test_a_tiny_model_is_made_in_a_second_of_under_a_million_parameters(vision):
    tiny_model(vision)  # the first imports the family
    begin = time.process_time()
    composed = tiny_model(vision)
    # 0.03 to 0.08 s on one core.
    assert time.process_time() - begin < 1
    assert sum(p.numel() for p in composed.model.parameters()) < 1_000_000


@pytest.mark.parametrize(
    "language",
    [
        "llama",
        "qwen2",
        "qwen3",
        "phi",
        "phi3",
        "gemma2",
        "gpt2",
        "stablelm",
        "smollm3",
        "opt",
        *OWN_LANGUAGES,
    ],
)
def test_any_family_of_language_models_can_be_tiny(language):
    model = tiny_model(None, language=language).model
    assert model.config.text_config.model_type == language
    assert sum(p.numel() for p in model.parameters()) < 100_000


def test_the_seed_decides_the_weights_and_nothing_outside_moves():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = tiny_model(seed=1), tiny_model(seed=1), tiny_model(seed=2)
    assert torch.equal(torch.rand(3), expected)
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, same.model.state_dict()[name]), name
    assert any(not torch.equal(w, other.model.state_dict()[n]) for n, w in one.model.state_dict().items())


def test_configs_name_their_family():
    assert tiny_language("qwen2")["model_type"] == "qwen2"
    assert tiny_language()["vocab_size"] == len(tiny_tokenizer())
    assert tiny_vision("dinov2", image_px=32)["image_size"] == 32
