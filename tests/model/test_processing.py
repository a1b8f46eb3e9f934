"""The processor writes as many placeholders as the model has embeddings, and survives its folder."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.model.test_modeling import TEXT, VISION
from tinymodal.compose.tiny import tiny_tokenizer
from tinymodal.model.configuration_tinymodal import TinyModalConfig
from tinymodal.model.image import Preparation
from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration
from tinymodal.model.processing_tinymodal import TinyModalImageProcessor, TinyModalProcessor

JINJA = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(chat_template=JINJA)
    tokenizer.padding_side = "left"
    return tokenizer


def config_for(
    tokenizer: PreTrainedTokenizerFast, name: str = "pixel_shuffle", **options: int
) -> TinyModalConfig:
    return TinyModalConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer)},
        vision_config=VISION,
        connectors={"image": {"name": name, "options": options}},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )


@pytest.fixture(scope="module")
def processor(tokenizer) -> TinyModalProcessor:
    return TinyModalProcessor.of(config_for(tokenizer), tokenizer)


def noise(height: int = 30, width: int = 50, seed: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def test_a_picture_says_what_it_costs(processor):
    prepared = processor.prepare(noise())
    assert prepared.tiles[0].shape == (3, 24, 24)
    assert (prepared.feature_grids, prepared.patches) == (((6, 6),), 36)
    assert (prepared.grid, prepared.tokens) == ((3, 3), 9)


@settings(max_examples=12, deadline=None)
@given(
    patches=st.integers(1, 4),
    ratio=st.sampled_from([None, 1, 2, 3]),
    aspect=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    resize=st.sampled_from(["square", "pad"]),
)
def test_the_count_without_weights_is_what_tower_and_connector_make(patches, ratio, aspect, resize):
    tokenizer = tiny_tokenizer()
    size = 4 * patches * (ratio or 1)
    config = config_for(
        tokenizer, *(["mlp"] if ratio is None else ["pixel_shuffle"]), **({"ratio": ratio} if ratio else {})
    )
    how = Preparation(size, size, mean=(0.5,) * 3, std=(0.5,) * 3, resize=resize)
    prepared = TinyModalProcessor.of(config, tokenizer, how).prepare(noise(*aspect))
    model = TinyModalForConditionalGeneration(config)
    with torch.no_grad():
        made = model.model.get_image_features(prepared.tiles[0][None])
        features = model.model.towers["image"](prepared.tiles[0][None])
    assert made.shape[1] == prepared.tokens == int(np.prod(prepared.grid))
    assert features.values.shape[1] == prepared.patches
    assert (features.grid,) == prepared.feature_grids
    assert model.model.tokens_of("image", (size, size)) == prepared.tokens


def test_a_call_gives_what_forward_and_generate_take(processor, tokenizer):
    model = TinyModalForConditionalGeneration(config_for(tokenizer)).eval()
    texts = ["<image> what is it?", "compare <image> with <image>", "no picture"]
    inputs = processor(images=[noise(seed=i) for i in range(3)], text=texts)
    assert inputs["pixel_values"].shape == (3, 3, 24, 24)
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [9, 18, 0]
    assert inputs["attention_mask"][2, 0] == 0
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
    assert model.generate(**inputs, max_new_tokens=2).shape[1] <= inputs["input_ids"].shape[1] + 2


def test_nested_lists_bytes_and_paths_are_pictures_too(processor, tmp_path):
    path = tmp_path / "one.png"
    noise().save(path)
    texts = ["<image>", "<image><image>"]
    inputs = processor(images=[[path], [str(path), path.read_bytes()]], text=texts)
    assert torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][2])
    assert torch.equal(inputs["pixel_values"][0], processor.image_processor(noise())["pixel_values"][0])


@pytest.mark.parametrize(("text", "count"), [("<image><image>", 1), ("none", 1), ("<image>", 0)])
def test_another_number_of_pictures_than_places_is_refused(processor, text, count):
    places = text.count("<image>")
    with pytest.raises(ValueError, match=rf"{places} places \(<image>\) in the text but {count} pictures"):
        processor(images=[noise()] * count or None, text=text)


def test_a_picture_for_a_model_that_sees_nothing_is_refused(tokenizer):
    blind = TinyModalProcessor.of(TinyModalConfig(text_config=TEXT), tokenizer)
    assert blind(text="words")["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match="this model has no vision tower"):
        blind.prepare(noise())


def test_a_picture_too_large_for_the_preparation_is_refused(tokenizer):
    how = Preparation(24, 24, mean=(0.5,) * 3, std=(0.5,) * 3, max_pixels=1000)
    with pytest.raises(ValueError, match="are 1,500 pixels, the limit is 1,000"):
        TinyModalProcessor.of(config_for(tokenizer), tokenizer, how).prepare(noise())


def test_a_connector_that_cannot_fold_the_grid_is_refused_at_once(tokenizer):
    with pytest.raises(
        ValueError, match="ratio 4 needs a grid divisible by 4, got 6 x 6 patches; ratios that fit: 2, 3, 6"
    ):
        TinyModalProcessor.of(config_for(tokenizer, ratio=4), tokenizer)


def test_a_tokenizer_without_the_placeholder_or_with_another_is_refused(tokenizer):
    config = config_for(tokenizer)
    config.image_token_id = 7
    with pytest.raises(ValueError, match="token '<image>' is 5 in the tokenizer but 7 in the config"):
        TinyModalProcessor.of(config, tokenizer)
    bare = json.loads(tokenizer.backend_tokenizer.to_str().replace("<image>", "<picture>"))
    from tokenizers import Tokenizer

    without = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(bare)))
    with pytest.raises(ValueError, match="the tokenizer has no token '<image>'"):
        TinyModalProcessor.of(config_for(tokenizer), without)


def test_a_saved_processor_is_the_same_processor(tokenizer, tmp_path):
    how = Preparation(48, 24, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), resize="pad", max_pixels=10_000)
    processor = TinyModalProcessor.of(config_for(tokenizer), tokenizer, how)
    processor.save_pretrained(tmp_path)
    again = TinyModalProcessor.from_pretrained(tmp_path)
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again.image_processor.preparation == how
    assert again.chat_template == JINJA
    one, two = (p(images=noise(), text="see <image>.") for p in (processor, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_saving_does_not_mark_the_tokenizer_that_was_handed_in(tokenizer, tmp_path):
    before = dict(tokenizer.init_kwargs)
    TinyModalProcessor.of(config_for(tokenizer), tokenizer).save_pretrained(tmp_path)
    assert "auto_map" not in tokenizer.init_kwargs
    assert set(before) <= set(tokenizer.init_kwargs)


def test_the_image_processor_needs_nothing_but_its_own_dict(processor):
    values = json.loads(json.dumps(processor.image_processor.to_dict()))
    again = TinyModalImageProcessor.from_dict(values)
    assert again.to_dict() == processor.image_processor.to_dict()
    assert again.typical().tokens == 9


def test_vllm_is_told_the_tokens_of_pictures_of_any_size(processor):
    sizes = [(10, 20), (3000, 1)]
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert counts.num_image_tokens == [processor.prepare(noise(*size)).tokens for size in sizes]
    assert counts.num_image_patches == [1, 1]
    inputs = processor(images=noise(), text="a <image>", return_mm_token_type_ids=True)
    assert inputs["mm_token_type_ids"].sum() == 9


def test_the_chat_template_is_the_tokenizers(processor):
    messages = [{"role": "user", "content": "<image> what?"}]
    expected = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    assert processor.apply_chat_template(messages, tokenize=False) == expected


def test_several_texts_are_padded_on_the_left_so_that_replies_follow_their_last_word():
    right = tiny_tokenizer()
    right.padding_side = "right"
    processor = TinyModalProcessor.of(config_for(right), right)
    inputs = processor(images=[noise(), noise()], text=["<image> what is the colour of it", "<image>"])
    assert inputs["attention_mask"][1].tolist()[0] == 0
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]


def test_what_is_no_picture_is_refused_in_words(processor):
    with pytest.raises(ValueError, match=r"got ndarray; of an array PIL\.Image\.fromarray makes one"):
        processor(images=[np.zeros((5, 5, 3), np.uint8)], text="<image>")
    with pytest.raises(ValueError, match="no name of a file"):
        processor.prepare("x" * 5000)
    with pytest.raises(ValueError, match="max_tiles must be 1 or more"):
        processor.prepare(noise(), max_tiles=0)  # which would lift the limit
