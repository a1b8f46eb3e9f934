"""A model that hears: sounds find their places beside pictures and words."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor
from transformers import AddedToken, PreTrainedTokenizerFast

from tests.model.test_modeling import TEXT, VISION
from tests.model.test_processing import noise
from tests.model.test_remote_code import HIDE, elsewhere, installed
from tinymodal.compose.tiny import tiny_tokenizer
from tinymodal.model.audio import Hearing
from tinymodal.model.audio_processing import TinyModalAudioProcessor
from tinymodal.model.configuration_tinymodal import TinyModalConfig
from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration, TinyModalModel
from tinymodal.model.processing_tinymodal import TinyModalProcessor

RATE_HZ = 16_000
EAR = {
    "model_type": "tinymodal_ear",
    "num_mel_bins": 16,
    "channels": [16, 32],
    "num_attention_heads": 4,
    "reach": 3,
}
WAVE = {
    "model_type": "wav2vec2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 8],
    "conv_stride": [5, 64],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
WHISPER = {
    "model_type": "whisper",
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 400,
}
SPEECH = {"design": "talker", "books": 2, "book_size": 16, "layers": 1, "width": 32, "heads": 2}


def hearing_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """The tiny one with a word for sounds."""
    tokenizer = tiny_tokenizer(chat_template=chat_template)
    tokenizer.add_tokens([AddedToken("<audio>", special=True, normalized=False)], special_tokens=True)
    return tokenizer


def hearing_config(
    audio: dict | None = EAR, vision: dict | None = VISION, speech: dict | None = None, **options: int
) -> TinyModalConfig:
    tokenizer = hearing_tokenizer()
    connectors = {}
    if vision is not None:
        connectors["image"] = {"name": "pixel_shuffle"}
    if audio is not None:
        connectors["audio"] = {"name": "stack_frames", "options": {"factor": 4, **options}}
    return TinyModalConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer)},
        vision_config=vision,
        audio_config=audio,
        connectors=connectors,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        audio_token_id=tokenizer.convert_tokens_to_ids("<audio>") if audio else None,
        speech=speech,
    )


def build(config: TinyModalConfig, seed: int = 0) -> TinyModalForConditionalGeneration:
    """A random model whose media matter."""
    torch.manual_seed(seed)
    model = TinyModalForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def sound(seconds: float = 1.0, seed: int = 0) -> Tensor:
    """Noise whose loudness comes and goes."""
    n = round(seconds * RATE_HZ)
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return 0.3 * x * torch.sin(torch.arange(n) * (3.0 + seed) / RATE_HZ).square()


@pytest.fixture(scope="module")
def model() -> TinyModalForConditionalGeneration:
    return build(hearing_config())


@pytest.fixture(scope="module")
def processor(model) -> TinyModalProcessor:
    return TinyModalProcessor.of(model.config, hearing_tokenizer())


def logits(model: TinyModalForConditionalGeneration, inputs: dict) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def call(processor: TinyModalProcessor, text: str | list[str], **media: object) -> dict:
    return dict(processor(text=text, sampling_rate=RATE_HZ, **media))


# ---- sounds find their places


def test_swapping_two_clips_swaps_what_is_said_about_them(model, processor):
    texts, clips = ["what is <audio> ?"] * 2, [sound(seed=1), sound(seed=2)]
    straight = logits(model, call(processor, texts, audio=clips))
    swapped = logits(model, call(processor, texts, audio=clips[::-1]))
    torch.testing.assert_close(straight.flip(0), swapped, rtol=0, atol=1e-5)
    assert (straight - swapped).abs().max() > 0.05


def test_each_place_holds_its_own_embedding_among_pictures_and_words(model, processor):
    """A picture, two sounds of unlike length around it, in one text."""
    clips = [sound(0.7, seed=1), sound(2.2, seed=2)]
    inputs = call(processor, "a <audio> b <image> c <audio> d", images=noise(), audio=clips)
    ids = inputs["input_ids"]
    core = model.model
    with torch.no_grad():
        media = {
            "image": core.media_input("image", inputs["pixel_values"], None, None, ids),
            "audio": core.media_input("audio", inputs["audio_values"], inputs["audio_take"], None, ids),
        }
        embedded = core.embed(ids, media)
        expected = model.get_input_embeddings()(ids).clone()
        expected[ids == model.config.image_token_id] = core.get_image_features(inputs["pixel_values"])[0]
        alone = [
            core.get_audio_features(processor.prepare_sound(clip, RATE_HZ).tiles[0][None])[0]
            for clip in clips
        ]
        expected[ids == model.config.audio_token_id] = torch.cat(alone)
    torch.testing.assert_close(embedded, expected, rtol=0, atol=1e-5)


def test_a_batch_of_pictures_sounds_both_and_neither_equals_its_members(model, processor):
    texts = ["<image> and <audio>", "only <audio> <audio>", "no media here", "<image> what?"]
    clips = [sound(0.5, 1), sound(1.7, 2), sound(0.5, 3)]
    pictures = [noise(seed=1), noise(seed=2)]
    own = [(pictures[:1], clips[:1]), ([], clips[1:]), ([], []), (pictures[1:], [])]
    together = call(processor, texts, images=pictures, audio=clips)
    packed = logits(model, together)
    for row, (text, (seen, heard)) in enumerate(zip(texts, own, strict=True)):
        alone = logits(model, call(processor, text, images=seen or None, audio=heard or None))[0]
        torch.testing.assert_close(packed[row, -len(alone) :], alone, rtol=0, atol=1e-5)


def test_a_long_sound_is_windows_that_are_joined_in_order(processor, model):
    """Window by window through the tower, one behind the other in the text."""
    how = Hearing("log_mel", num_bands=16, window_s=1.0, step_s=0.5)
    cutter = TinyModalProcessor.of(model.config, hearing_tokenizer(), hearing=how)
    found = cutter.prepare_sound(sound(2.3, seed=4), RATE_HZ)
    assert [tuple(tile.shape) for tile in found.tiles] == [(16, 100), (16, 100), (16, 50)]
    assert found.tokens == sum(found.tile_tokens)
    assert found.order == tuple(range(found.tokens))
    inputs = call(cutter, "<audio> said?", audio=sound(2.3, seed=4))
    assert [tuple(values.shape) for values in inputs["audio_values"]] == [(2, 16, 100), (1, 16, 50)]
    ids = inputs["input_ids"]
    with torch.no_grad():
        media = model.model.media_input("audio", inputs["audio_values"], inputs["audio_take"], None, ids)
        embedded = model.model.embed(ids, {"audio": media})[ids == model.config.audio_token_id]
        pieces = [model.model.get_audio_features(tile[None])[0] for tile in found.tiles]
    torch.testing.assert_close(embedded, torch.cat(pieces), rtol=0, atol=1e-5)


def test_a_tower_that_reads_waves_has_a_place_too():
    model = build(hearing_config(WAVE, vision=None))
    processor = TinyModalProcessor.of(model.config, hearing_tokenizer())
    inputs = call(processor, "<audio> said?", audio=sound(1.0, seed=4))
    assert inputs["audio_values"].shape == (1, 1, 16_000)
    places = int((inputs["input_ids"] == model.config.audio_token_id).sum())
    assert (
        places
        == model.model.tokens_of("audio", (16_000,))
        == processor.feature_extractor.layout(16_000).tokens
    )
    other = logits(model, call(processor, "<audio> said?", audio=sound(1.0, seed=5)))
    assert (logits(model, inputs) - other).abs().max() > 0.01


@pytest.mark.parametrize("audio", [EAR, WAVE, WHISPER], ids=["ear", "wav2vec2", "whisper"])
@pytest.mark.parametrize("seconds", [0.01, 0.3, 0.5, 1.26, 31.0])
def test_the_count_without_weights_is_what_tower_and_connector_make(audio, seconds):
    config = hearing_config(audio, vision=None)
    processor = TinyModalProcessor.of(config, hearing_tokenizer())
    prepared = processor.prepare_sound(sound(seconds), RATE_HZ)
    counted = processor.feature_extractor.layout(round(seconds * RATE_HZ))
    assert (prepared.tokens, prepared.patches) == (counted.tokens, counted.patches)
    assert (prepared.tile_tokens, prepared.order) == (counted.tile_tokens, counted.order)
    torch.manual_seed(0)
    core = TinyModalModel(config).eval()
    with torch.no_grad():
        for tile, grid, tokens in zip(
            prepared.tiles, prepared.feature_grids, prepared.tile_tokens, strict=True
        ):
            assert core.towers["audio"](tile[None]).grid == grid
            assert core.get_audio_features(tile[None]).shape == (1, tokens, 32)
    assert prepared.seconds == pytest.approx(seconds, abs=1e-4)


def test_attention_is_chosen_for_all_parts_or_one_by_name():
    model = build(hearing_config(WAVE, vision=None))
    processor = TinyModalProcessor.of(model.config, hearing_tokenizer())
    inputs = call(processor, "<audio> said?", audio=sound())
    before = logits(model, inputs)
    model.set_attn_implementation({"audio_config": "eager"})
    assert model.model.towers["audio"].module.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=1e-5)
    model.set_attn_implementation("eager")
    assert model.model.language_model.config._attn_implementation == "eager"


# ---- generating


GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}


def test_beams_and_padded_batches_hear_their_own_sounds(model, processor):
    texts = ["<audio> or <image> or <audio> ?", "<audio>"]
    clips, picture = [sound(0.5, 1), sound(1.5, 2), sound(1.0, 3)], noise()
    inputs = call(processor, texts, images=picture, audio=clips)
    length = inputs["input_ids"].shape[1]
    for options in ({}, {"num_beams": 2}):
        made = model.generate(**inputs, **GREEDY, **options)[:, length:]
        one = call(processor, texts[0], images=picture, audio=clips[:2])
        two = call(processor, texts[1], audio=clips[2])
        alone = [model.generate(**x, **GREEDY, **options)[0, x["input_ids"].shape[1] :] for x in (one, two)]
        assert made.tolist() == [row.tolist() for row in alone]


def test_a_cached_reply_equals_reading_everything_again(model, processor):
    inputs = call(processor, "<audio> is it <image>", images=noise(), audio=sound())
    made = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
    ids = inputs.pop("input_ids")
    inputs.pop("attention_mask")
    bare = copy.deepcopy(model.generation_config.eos_token_id)
    for token in made:
        step = logits(model, {**inputs, "input_ids": ids})[:, -1]
        step[:, bare] = -torch.inf
        assert int(step.argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


# ---- refusals


def test_a_model_without_ears_says_which_part_is_missing_and_where_a_recipe_adds_it():
    deaf = hearing_config(audio=None)
    processor = TinyModalProcessor.of(deaf, hearing_tokenizer())
    assert processor.feature_extractor is None
    with pytest.raises(ValueError, match=r"this model has no audio tower; \[model.audio\] in a recipe gives"):
        processor.prepare_sound(sound(), RATE_HZ)
    with pytest.raises(ValueError, match="has no audio tower"):
        call(processor, "<audio>", audio=sound())
    with pytest.raises(ValueError, match=r"audio given, but this model has no audio tower.* \[model.audio\]"):
        build(deaf)(input_ids=torch.tensor([[7]]), audio_values=torch.zeros(1, 16, 100))


def test_a_model_that_only_hears_reads_no_pictures():
    config = hearing_config(vision=None)
    processor = TinyModalProcessor.of(config, hearing_tokenizer())
    with pytest.raises(ValueError, match=r"this model has no vision tower; \[model.vision\]"):
        call(processor, "<image>", images=noise())
    assert list(build(config).model.towers) == ["audio"]


@pytest.mark.parametrize(("text", "count"), [("<audio><audio>", 1), ("none", 1), ("<audio>", 0)])
def test_another_number_of_sounds_than_places_is_refused(processor, text, count):
    places = text.count("<audio>")
    with pytest.raises(ValueError, match=rf"{places} places \(<audio>\) in the text but {count} sounds"):
        call(processor, text, audio=[sound()] * count or None)


def test_places_without_sounds_and_sounds_without_places_are_refused(model, processor):
    inputs = call(processor, "<audio>", audio=sound())
    values = inputs.pop("audio_values")
    with pytest.raises(ValueError, match=r"7 placeholders \(token \d+\) but no audio_values"):
        logits(model, inputs)
    with pytest.raises(ValueError, match=r"0 placeholders .* but 1 audios of 7 embeddings"):
        logits(model, {"input_ids": torch.tensor([[7, 8]]), "audio_values": values})
    with pytest.raises(ValueError, match="audio_values need input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32), audio_values=values)
    with pytest.raises(ValueError, match="audio_put needs audio_take"):
        model(**inputs, audio_values=values, audio_put=torch.arange(7))


def test_what_no_tower_could_hear_is_refused_at_once():
    config = hearing_config(vision=None)
    config.audio_token_id = 7
    with pytest.raises(ValueError, match=r"token '<audio>' is .* in the tokenizer but 7 in the config"):
        TinyModalProcessor.of(config, hearing_tokenizer())
    with pytest.raises(ValueError, match="the tokenizer has no token '<audio>'"):
        TinyModalProcessor.of(hearing_config(), tiny_tokenizer())
    with pytest.raises(ValueError, match="named by medium, here 'image'; got"):
        TinyModalConfig(vision_config=VISION, connectors={"audio": {"name": "stack_frames"}})
    with pytest.raises(ValueError, match="has name, options; got \\['marks'\\] besides"):
        TinyModalConfig(audio_config=EAR, connectors={"audio": {"name": "mlp", "marks": ["start"]}})
    for hearing, found in ((Hearing("log_mel"), "log_mel of 80"), (Hearing("wave"), "wave of 1")):
        with pytest.raises(
            ValueError, match=f"as {found} bands, but this 'tinymodal_ear' hears log_mel of 16"
        ):
            TinyModalAudioProcessor(hearing, EAR)


def test_samples_without_their_rate_are_refused_and_files_need_none(processor, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    file = tmp_path / "said.wav"
    soundfile.write(file, sound().numpy(), RATE_HZ, subtype="FLOAT")
    with pytest.raises(ValueError, match="samples do not say their rate"):
        processor(text="<audio>", audio=sound())
    read = processor(text="<audio>", audio=file)["audio_values"]
    assert torch.equal(read, call(processor, "<audio>", audio=sound().numpy())["audio_values"])


# ---- a mouth


def test_words_are_bit_identical_with_and_without_a_speech_head(tmp_path):
    torch.manual_seed(0)
    mute = TinyModalForConditionalGeneration(hearing_config()).eval()
    torch.manual_seed(0)
    speaks = TinyModalForConditionalGeneration(hearing_config(speech=SPEECH)).eval()
    assert mute.speech_head is None
    own = {name for name in speaks.state_dict() if name.startswith("speech_head.")}
    assert own
    assert set(speaks.state_dict()) - own == set(mute.state_dict())
    ids = torch.tensor([[7, 8, 9, 10]])
    assert torch.equal(logits(mute, {"input_ids": ids}), logits(speaks, {"input_ids": ids}))

    speaks.save_pretrained(tmp_path)
    again, info = TinyModalForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, weight in speaks.speech_head.state_dict().items():
        assert torch.equal(weight, again.speech_head.state_dict()[name])
    assert again.config.speech == SPEECH
    core, info = TinyModalModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not [key for key in info["unexpected_keys"] if key.startswith("speech_head")]
    assert torch.equal(
        core.eval()(input_ids=ids).last_hidden_state, speaks.model(input_ids=ids).last_hidden_state
    )


# ---- folders


def test_a_config_survives_json_with_all_options_spelled_out(tmp_path):
    config = hearing_config(speech=SPEECH)
    config.audio_feature_layer = [0, 1]
    config.save_pretrained(tmp_path)
    again = TinyModalConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.connectors["audio"]["options"]["factor"] == 4
    assert (again.audio_feature_layer, again.speech) == ([0, 1], SPEECH)


def test_several_or_weighted_layers_are_read_and_travel(tmp_path):
    for layers in ([0, -1], "weighted"):
        config = hearing_config(vision=None)
        config.audio_feature_layer = layers
        model = build(config)
        processor = TinyModalProcessor.of(config, hearing_tokenizer())
        inputs = call(processor, "<audio>", audio=sound())
        model.save_pretrained(tmp_path / str(layers))
        again = TinyModalForConditionalGeneration.from_pretrained(tmp_path / str(layers)).eval()
        assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_a_saved_processor_is_the_same_processor(tmp_path):
    how = Hearing("log_mel", num_bands=16, window_s=2.0, step_s=0.25, max_s=7.0)
    processor = TinyModalProcessor.of(hearing_config(), hearing_tokenizer(), hearing=how)
    processor.save_pretrained(tmp_path)
    again = TinyModalProcessor.from_pretrained(tmp_path)
    assert again.feature_extractor.hearing == how
    assert again.feature_extractor.to_dict() == processor.feature_extractor.to_dict()
    values = json.loads(json.dumps(processor.feature_extractor.to_dict()))
    assert TinyModalAudioProcessor.from_dict(values).typical() == processor.feature_extractor.typical()
    one, two = (call(p, "<audio> <image>", images=noise(), audio=sound(3.1)) for p in (processor, again))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)
    with pytest.raises(ValueError, match="the limit is 7 s"):
        call(again, "<audio>", audio=sound(7.5))


def test_a_processor_without_ears_is_saved_without_them(tmp_path):
    TinyModalProcessor.of(hearing_config(audio=None), hearing_tokenizer()).save_pretrained(tmp_path)
    assert "feature_extractor" not in json.loads((tmp_path / "processor_config.json").read_text())
    assert TinyModalProcessor.from_pretrained(tmp_path).feature_extractor is None


def test_others_are_told_tokens_and_kinds(processor):
    lengths = [8_000, 16_000, 500_001]
    counts = processor._get_num_multimodal_tokens(image_sizes=[(9, 9)], audio_lengths=lengths)
    expected = [processor.prepare_sound(torch.zeros(n), RATE_HZ).tokens for n in lengths]
    assert counts.num_audio_tokens == expected
    assert counts.num_image_tokens == [9]
    inputs = call(processor, "<audio> <image>", images=noise(), audio=sound(), return_mm_token_type_ids=True)
    kinds = inputs["mm_token_type_ids"]
    assert int((kinds == 3).sum()) == processor.prepare_sound(sound(), RATE_HZ).tokens
    assert int((kinds == 1).sum()) == 9
    assert processor.feature_extractor.tokens_per_s == pytest.approx(6.25, abs=0.05)


def test_a_conversation_of_transformers_plays_its_files(tmp_path):
    """``apply_chat_template`` reads the file itself and hands samples over."""
    soundfile = pytest.importorskip("soundfile")
    from tinymodal.chat.template import template_for

    tokenizer = hearing_tokenizer()
    tokenizer.chat_template = template_for("chatml", tokenizer).to_jinja("<image>", "<audio>")
    processor = TinyModalProcessor.of(hearing_config(), tokenizer)
    file = tmp_path / "said.wav"
    soundfile.write(file, sound().numpy(), RATE_HZ, subtype="FLOAT")
    content = [{"type": "audio", "path": str(file)}, {"type": "text", "text": "what is said?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert "<audio>\nwhat is said?" in text
    expected = call(processor, text, audio=sound())
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    torch.testing.assert_close(inputs["audio_values"], expected["audio_values"], rtol=0, atol=1e-4)


SCRIPT = """
import sys
import torch
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers import AutoModelForMultimodalLM

folder, out = sys.argv[1:]
known = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(folder, **known)
given = torch.load(folder + "/clips.pt", weights_only=True)
texts = ["<audio> what <image>?", "<audio>"]
inputs = processor(text=texts, images=folder + "/picture.png", audio=given, sampling_rate=16000)
for cls in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model, info = cls.from_pretrained(folder, output_loading_info=True, **known)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
with torch.no_grad():
    logits = model.eval()(**inputs).logits
assert AutoModel.from_pretrained(folder, **known) is not None
ear = AutoFeatureExtractor.from_pretrained(folder, **known)
model.save_pretrained(out + "/again")
processor.save_pretrained(out + "/again")
mouth = {name: weight for name, weight in model.speech_head.state_dict().items()}
seen = {"logits": logits, "inputs": dict(inputs), "ear": type(ear).__name__, "mouth": mouth}
torch.save(seen, out + "/seen.pt")
"""


def test_a_fresh_process_without_our_package_hears_the_same(tmp_path):
    folder = tmp_path / "a-model.that-hears"
    model = build(hearing_config(speech=SPEECH))
    processor = TinyModalProcessor.of(model.config, hearing_tokenizer())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    noise().save(folder / "picture.png")
    clips = [sound(0.6, 1), sound(1.4, 2)]
    torch.save(clips, folder / "clips.pt")

    elsewhere((HIDE if installed() else "") + SCRIPT, folder, tmp_path, home=tmp_path)
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    texts = ["<audio> what <image>?", "<audio>"]
    inputs = call(processor, texts, images=folder / "picture.png", audio=clips)
    assert seen["inputs"].keys() == inputs.keys()
    for key, value in inputs.items():
        torch.testing.assert_close(seen["inputs"][key], value, rtol=0, atol=0)
    # Mostly equal to the bit; where memory lies differently, a convolution may round differently.
    torch.testing.assert_close(seen["logits"], logits(model, inputs), rtol=0, atol=1e-5)
    assert seen["ear"] == "TinyModalAudioProcessor"
    assert all(torch.equal(seen["mouth"][k], v) for k, v in model.speech_head.state_dict().items())
    again = tmp_path / "again"
    given = {"picture.png", "clips.pt"}
    assert {f.name for f in folder.iterdir()} - given == {f.name for f in again.iterdir()}
    for file in folder.glob("*.py"):
        assert file.read_bytes() == (again / file.name).read_bytes()
