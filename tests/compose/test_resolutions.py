"""Every way to show a picture, through the whole path: counted, packed, trained, answered."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pictures

from tinymodal.compose.build import load, save
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.types import IGNORE, Image, Message, Sample, Text
from tinymodal.data.collate import collate
from tinymodal.infer.engine import Engine, Sampling
from tinymodal.train.objective import Objective

SIGHTS = {
    "square": {},
    "square-newline": {"marks": ("newline",)},
    "pad-start-end": {"resize": "pad", "marks": ("start", "end")},
    "crop": {"resize": "crop"},
    "anyres": {"resize": "anyres", "merge": "spatial_unpad", "marks": ("newline",)},
    "anyres-flat": {"resize": "anyres"},
    "slices": {
        "resize": "slices",
        "max_tiles": 4,
        "marks": ("start", "end", "tile_start", "tile_end", "tile_newline", "id"),
    },
    "tiles": {"resize": "tiles", "max_tiles": 4},
    "native": {"resize": "native", "fit_pixels": (144, 2304)},
}
SIZES = ((24, 24), (30, 50), (90, 31), (8, 100))
"""Width and height of the pictures."""


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Pictures.fromarray(pixels)


def asked(*sizes, answer=None, name="made"):
    parts = [Image(noise(*size, seed=i)) for i, size in enumerate(sizes)]
    messages = [Message("user", (*parts, Text("what is it")))]
    if answer is not None:
        messages.append(Message("assistant", (Text(answer),)))
    return Sample(tuple(messages), name)


@pytest.fixture(scope="module", params=SIGHTS)
def composed(request):
    return tiny_model(sight=SIGHTS[request.param])


@given(width=st.integers(2, 130), height=st.integers(2, 130), data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_counted_tokens_are_the_embeddings_the_model_makes(width, height, data):
    name = data.draw(st.sampled_from(sorted(SIGHTS)))
    composed = MODELS.setdefault(name, tiny_model(sight=SIGHTS[name]))
    prepared = composed.processor.prepare(noise(width, height))
    assert prepared.tokens == (prepared.tokens if prepared.order is None else len(prepared.order))
    with torch.no_grad():
        for tile, tokens in zip(prepared.tiles, prepared.tile_tokens, strict=True):
            assert composed.model.model.get_image_features(tile[None]).shape[1] == tokens
    inputs = composed.processor(images=noise(width, height), text="<image> what")
    with torch.no_grad():
        composed.model(**inputs)  # refuses any other number of placeholders


MODELS = {}


def test_pictures_of_all_sizes_packed_in_one_row_give_the_logits_they_have_alone(composed):
    samples = [asked(size, answer=f"a {i}", name=str(i)) for i, size in enumerate(SIZES)]
    samples.append(asked(SIZES[1], SIZES[2], answer="two", name="both"))
    documents = [composed.encoder(sample) for sample in samples]
    pad, image = composed.tokenizer.pad_token_id, composed.model.config.image_token_id
    packed = collate([documents], pad, image)
    with torch.no_grad():
        together = composed.model(**packed.inputs(), use_cache=False).logits[0]
        begin = 0
        for document in documents:
            alone = composed.model(**collate([[document]], pad, image).inputs(), use_cache=False).logits[0]
            torch.testing.assert_close(together[begin : begin + len(document)], alone, rtol=0, atol=1e-5)
            begin += len(document)


def test_every_trained_part_gets_a_gradient_marks_included(composed):
    document = composed.encoder(asked(SIZES[2], SIZES[1], answer="yes"))
    batch = collate([[document]], composed.tokenizer.pad_token_id, composed.model.config.image_token_id)
    composed.model.zero_grad()
    Objective(composed.model, ("text",)).train()(batch).sums["text"].backward()
    for part in (composed.model.model.connectors, composed.model.model.marks):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
    for part in composed.model.model.connectors.parameters():
        assert part.grad.abs().sum() > 0


def test_a_batch_of_several_sizes_answers_as_each_alone(composed):
    engine = Engine(composed)
    samples = [asked(size, name=str(size)) for size in SIZES] + [asked(SIZES[3], SIZES[0])]
    sampling = Sampling(max_new_tokens=4)
    together = engine.reply(samples, sampling)
    assert [reply.text for reply in together] == [engine.reply([s], sampling)[0].text for s in samples]


def test_generate_of_transformers_equals_our_engine_also_with_beams_of_one(composed):
    sample = asked(SIZES[2], SIZES[1])
    expected = Engine(composed).reply([sample], Sampling(max_new_tokens=4))[0]
    text, placeholder = composed.tokenizer.decode(composed.encoder(sample, reply=True).ids), "<image>"
    prompt = composed.tokenizer.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what is it"}],
            }
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text.replace(placeholder, "") == prompt.replace(placeholder, "")
    pictures = [part.source for part in sample.messages[0].parts if isinstance(part, Image)]
    inputs = composed.processor(images=pictures, text=prompt)
    made = composed.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = made[0, inputs["input_ids"].shape[1] :]
    assert composed.tokenizer.decode(new, skip_special_tokens=True).strip() == expected.text
    several = composed.model.generate(**inputs, max_new_tokens=4, num_beams=2, num_return_sequences=2)
    assert len(several) == 2


def test_a_saved_model_prepares_and_answers_the_same(composed, tmp_path):
    sample = asked(SIZES[2], answer="yes")
    before = composed.encoder(sample)
    save(composed, tmp_path / "model")
    again = load(tmp_path / "model")
    after = again.encoder(sample)
    assert torch.equal(before.ids, after.ids)
    for a, b in zip(before.media[0].tiles, after.media[0].tiles, strict=True):
        assert torch.equal(a, b)
    for (name, a), b in zip(composed.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_limits_of_one_request_hold_for_that_picture_only():
    composed = tiny_model(sight=SIGHTS["tiles"])
    many = composed.processor.prepare(noise(90, 31))
    few = composed.processor.prepare(noise(90, 31), max_tiles=1)
    assert len(few.tiles) < len(many.tiles)
    assert composed.processor.prepare(noise(90, 31)).tokens == many.tokens
    sample = Sample((Message("user", (Image(noise(90, 31), max_tiles=1), Text("what"))),), "limited")
    encoded = composed.encoder(sample, reply=True)
    assert encoded.media[0].tokens == few.tokens
    assert (encoded.ids == composed.model.config.image_token_id).sum() == few.tokens
    assert (encoded.labels == IGNORE).all()
