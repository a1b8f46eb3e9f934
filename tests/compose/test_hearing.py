"""Ears and a mouth are parts like any other: composed, counted, saved alone, given to a model without."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from tinymodal.compose import build
from tinymodal.compose.ears import connector_options, hearing_of, read_ears
from tinymodal.compose.published import CODECS, EARS
from tinymodal.compose.shrink import shrink
from tinymodal.compose.shrink_sound import audio_processor
from tinymodal.compose.spec import AudioSpec, LanguageSpec, ModelSpec, SpeechSpec
from tinymodal.compose.tiny import AudioKind, tiny_audio, tiny_codec, tiny_model
from tinymodal.core.errors import CheckpointError, RecipeError
from tinymodal.core.types import Audio, Image, Message, Sample, Speech, Text
from tinymodal.model.audio_towers import audio_tower_config
from tinymodal.model.codec import open_codec

KINDS = AudioKind.__args__
PHI = LanguageSpec(path="microsoft/phi-2", template="phi")


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    tiny_codec(folder)
    return str(folder)


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """Folder of a model that only sees."""
    folder = tmp_path_factory.mktemp("blind") / "model"
    build.save(tiny_model(), folder)
    return folder


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(6, 300, (1, 20), generator=torch.Generator().manual_seed(seed))


def logits(composed, rows: int | None = None) -> torch.Tensor:
    with torch.no_grad():
        return composed.model(input_ids=ids()).logits[..., :rows]


def asked(seconds: float = 1.0) -> Sample:
    sound = Audio(
        0.1 * torch.randn(round(16_000 * seconds), generator=torch.Generator().manual_seed(1)), 16_000
    )
    return Sample(
        (Message("user", (sound, Text("what is it"))), Message("assistant", (Text("a star"),))), "x"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_tower_of_every_family_hears(kind):
    composed = tiny_model(None, audio=kind)
    (item,) = composed.encoder(asked()).media
    assert item.kind == "audio"
    with torch.no_grad():
        heard = composed.model.get_audio_features(torch.stack(item.tiles))
    assert heard.shape == (1, item.tokens, 32)
    rows = {row.part: row.parameters for row in build.parameter_report(composed.model)}
    assert rows["audio"] < 1_000_000
    assert "vision" not in rows


# Tokens a second


@pytest.mark.parametrize(
    ("kind", "connector", "per_s", "factor"),
    [
        ("whisper", "stack_frames", 12.5, 4),
        ("whisper", "conv_frames", 10, 5),
        ("whisper", "pool_frames", 50, 1),
        ("wav2vec2", "stack_frames", 5, 10),
        ("tinymodal_ear", "stack_frames", 6.25, 4),
        ("clap_audio_model", "pool_frames", 0.1, 32),
        ("whisper", "window_qformer", 10, 10),
    ],
)
def test_tokens_a_second_become_the_connectors_factor(kind, connector, per_s, factor):
    options = {"num_queries": 2, "width": 32, "num_heads": 4} if connector == "window_qformer" else {}
    spec = AudioSpec(config=tiny_audio(kind), connector=connector, tokens_per_s=per_s, options=options)
    ears = read_ears(spec)
    assert ears.connector["options"]["factor"] == factor
    composed = tiny_model(
        None, audio=kind, hearing={"connector": connector, "tokens_per_s": per_s, "options": options}
    )
    assert composed.processor.feature_extractor.tokens_per_s == pytest.approx(per_s, rel=0.05)
    assert composed.model.config.connectors["audio"]["options"]["factor"] == factor


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"tokens_per_s": 12}, r"12 of 50 positions a second, .* take 12.5 \(factor 4\) or 10 \(factor 5\)"),
        ({"tokens_per_s": 60}, r"take 50 \(factor 1\) or 25 \(factor 2\)"),
        (
            {"tokens_per_s": 12.5, "connector": "linear"},
            "connector 'linear' has no factor and the tower gives 50",
        ),
        ({"tokens_per_s": 12.5, "options": {"factor": 5}}, "asks for factor 4 and options say 5"),
        ({"connector": "stack_frame"}, "did you mean"),
        ({"options": {"ratio": 2}}, "ratio"),
        ({"window_s": 40}, "cut the sound with window_s"),
        ({"window_s": 2, "step_s": 3}, "step_s must be above 0 and at most window_s"),
        ({"feature_layer": 7}, "a tower of 2 blocks"),
        ({"config": tiny_audio("whisper") | {"num_mels": 3}}, "unknown key 'num_mels'"),
        ({"config": {"model_type": "whsiper"}}, "did you mean 'whisper'"),
    ],
)
def test_what_does_not_suit_the_tower_is_told_in_one_line(keys, told):
    spec = {"config": tiny_audio("whisper")} | keys
    language = LanguageSpec(config={"model_type": "llama"}, tokenizer="memory")
    model, tokenizer = ModelSpec(language=language, audio=AudioSpec(**spec)), tiny_model(None).tokenizer
    with pytest.raises(RecipeError, match=told) as caught:
        build.compose(model, tokenizer)
    assert str(caught.value).startswith("model")
    assert "\n" not in str(caught.value)


def test_a_linear_connector_may_be_asked_for_what_the_tower_gives():
    spec = AudioSpec(config=tiny_audio("whisper"), connector="linear", tokens_per_s=50)
    assert read_ears(spec).connector == {"name": "linear", "options": {}}


def test_window_step_and_limit_are_the_recipes():
    composed = tiny_model(None, audio="wav2vec2", hearing={"window_s": 2.0, "step_s": 0.1, "max_s": 5.0})
    hearing = composed.processor.feature_extractor.hearing
    assert (hearing.window_s, hearing.step_s, hearing.max_s) == (2.0, 0.1, 5.0)
    (item,) = composed.encoder(asked(4.5)).media
    assert len(item.tiles) == 3
    with pytest.raises(Exception, match="the limit is 5 s"):
        composed.encoder(asked(5.5))


def test_a_language_model_too_short_for_a_moment_of_sound_is_refused():
    with pytest.raises(
        RecipeError, match=r"model\.audio: the shortest sound \(0.5 s\) takes 13 tokens and .* 12"
    ):
        tiny_model(None, audio="tinymodal_ear", hearing={"tokens_per_s": 25}, max_position_embeddings=12)


# Folders


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A whole Whisper, as it is published."""
    folder = tmp_path_factory.mktemp("whisper")
    config = WhisperConfig(
        **tiny_audio("whisper"), vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    config.decoder_start_token_id = 1
    torch.manual_seed(0)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layer", [-1, 1, (-1, 1), "weighted"])
def test_of_a_whole_whisper_the_half_that_hears_is_read(whisper, layer):
    language = {
        "config": {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4},
        "tokenizer": "memory",
    }
    spec = ModelSpec(
        language=LanguageSpec(**language), audio=AudioSpec(path=str(whisper), feature_layer=layer)
    )
    composed = build.compose(spec, tiny_model(None).tokenizer)
    tower = composed.model.model.towers["audio"]
    theirs = WhisperForConditionalGeneration.from_pretrained(whisper).model.encoder.state_dict()
    own = tower.backbone.state_dict()
    assert own
    assert all(torch.equal(theirs[name], weight) for name, weight in own.items())


def test_a_tower_that_lacks_weights_or_is_none_is_refused(whisper, blind, tmp_path):
    (tmp_path / "config.json").write_text((whisper / "config.json").read_text())
    for place, told in (
        (tmp_path, "neither model.safetensors|no file|does not appear"),
        (blind, "has no audio tower"),
    ):
        spec = ModelSpec(path=str(blind), audio=AudioSpec(path=str(place)))
        with pytest.raises(CheckpointError, match=told) as caught:
            build.build(spec)
        assert str(caught.value).startswith("model.audio.path: ")


def test_what_a_folder_says_of_its_waves_counts(tmp_path):
    config = audio_tower_config(tiny_audio("wav2vec2"))
    spec = AudioSpec(path="anything")
    assert hearing_of(spec, config).normalise
    said = {"do_normalize": False, "sampling_rate": 8000}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    how = hearing_of(spec, config, tmp_path)
    assert (how.normalise, how.rate_hz) == (False, 8000)
    with pytest.raises(CheckpointError, match="sampling_rate is 8,000, and its family hears 16,000"):
        hearing_of(spec, audio_tower_config(tiny_audio("whisper")), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_saved_alone_comes_back_the_same(kind, blind, tmp_path):
    grown = build.build(ModelSpec(path=str(blind), audio=AudioSpec(config=tiny_audio(kind))), seed=1)
    build.save_part(grown.model, "audio", tmp_path / "ear")
    again = build.build(ModelSpec(path=str(blind), audio=AudioSpec(path=str(tmp_path / "ear"))), seed=2)
    ours, theirs = (c.model.model.towers["audio"].state_dict() for c in (grown, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())
    assert again.processor.feature_extractor.hearing == grown.processor.feature_extractor.hearing


# A model that hears and speaks


def test_a_saved_model_comes_back_with_its_codec(codec, tmp_path):
    speech = {"codec": codec, "layers": 1, "width": 32, "voices": ("ann", "bob"), "reference": 4}
    composed = tiny_model(audio="tinymodal_ear", speech=speech)
    build.save(composed, tmp_path / "model")
    again = build.load(tmp_path / "model")
    for name, weight in composed.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name
    assert again.model.config.speech == composed.model.config.speech
    wave = 0.1 * torch.randn(4000)
    assert torch.equal(again.codec.encode(wave), open_codec(codec).encode(wave))
    assert again.processor.feature_extractor.to_dict() == composed.processor.feature_extractor.to_dict()
    assert again.tokenizer.chat_template == composed.tokenizer.chat_template


def test_units_speak_one_book_and_a_codec_that_has_fewer_is_told(codec):
    composed = tiny_model(None, speech={"codec": codec, "design": "units"})
    assert (composed.codec.books, composed.model.config.speech["books"]) == (1, 1)
    assert "read" not in composed.model.config.speech
    with pytest.raises((RecipeError, CheckpointError), match="2 codebooks"):
        tiny_model(None, speech={"codec": codec, "books": 5})
    with pytest.raises(CheckpointError, match=r"model\.speech\.codec: .* does not exist"):
        tiny_model(None, speech={"codec": "nowhere"})


@pytest.mark.parametrize("language", ["llama", "qwen2", "gpt2", "gemma2", "openelm"])
def test_ears_and_a_mouth_change_no_word_of_a_model_that_had_none(language, codec, tmp_path):
    before = tiny_model(language=language)
    build.save(before, tmp_path / "before")
    expected, rows = logits(before), len(before.tokenizer)
    ears, mouth = AudioSpec(config=tiny_audio()), SpeechSpec(codec=codec, layers=1)
    grown = build.build(ModelSpec(path=str(tmp_path / "before"), audio=ears, speech=mouth), seed=3)
    # One more row of the head may be summed in another order.
    torch.testing.assert_close(logits(grown, rows), expected, rtol=0, atol=1e-6)
    assert len(grown.tokenizer) == rows + 1
    assert grown.model.config.audio_token_id == rows
    tied = before.model.lm_head.weight is before.model.get_input_embeddings().weight
    assert (grown.model.lm_head.weight is grown.model.get_input_embeddings().weight) == tied
    own, old = grown.model.state_dict(), before.model.state_dict()
    assert all(torch.equal(own[name][: len(w)] if w.dim() else own[name], w) for name, w in old.items())
    build.save(grown, tmp_path / "grown")
    again = build.load(tmp_path / "grown")
    assert torch.equal(logits(again), logits(grown))
    assert again.encoder(asked()).media[0].kind == "audio"


def test_the_word_for_sounds_begins_as_a_mean_of_all_words(blind):
    grown = build.build(ModelSpec(path=str(blind), audio=AudioSpec(config=tiny_audio())))
    table = grown.model.get_input_embeddings().weight
    torch.testing.assert_close(table[-1], table[:-1].mean(0))


def test_what_has_ears_gets_new_ones_and_keeps_all_else(codec, tmp_path):
    before = tiny_model(audio="tinymodal_ear", speech={"codec": codec, "layers": 1})
    build.save(before, tmp_path / "before")
    spec = ModelSpec(path=str(tmp_path / "before"), audio=AudioSpec(config=tiny_audio("whisper")))
    grown = build.build(spec, seed=9)
    assert grown.model.config.audio_config.model_type == "whisper"
    assert len(grown.tokenizer) == len(before.tokenizer)
    for name, weight in before.model.state_dict().items():
        if ".audio." not in name:
            assert torch.equal(grown.model.state_dict()[name], weight), name
    assert grown.codec is not None
    assert grown.encoder.template.name == before.encoder.template.name


def test_new_parts_of_one_seed_are_the_same_and_no_other_random_state_moves(blind, codec):
    spec = ModelSpec(
        path=str(blind), audio=AudioSpec(config=tiny_audio()), speech=SpeechSpec(codec=codec, layers=1)
    )
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = build.build(spec, 1), build.build(spec, 1), build.build(spec, 2)
    assert torch.equal(torch.rand(3), expected)
    states = [c.model.state_dict() for c in (one, same, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    differ = {name for name in states[0] if not torch.equal(states[0][name], states[2][name])}
    assert all(".audio." in name or name.startswith("speech_head.") for name in differ)
    assert differ


def test_connector_and_head_begin_with_those_of_another_model(codec, blind, tmp_path):
    keys = {"config": tiny_audio(), "feature_layer": "weighted"}
    mouth = {"codec": codec, "layers": 1, "width": 32}
    spec = ModelSpec(path=str(blind), audio=AudioSpec(**keys), speech=SpeechSpec(**mouth))
    one = build.build(spec, seed=1)
    with torch.no_grad():
        one.model.model.towers["audio"].layer_weights.add_(0.5)
    build.save(one, tmp_path / "one")
    build.save_part(one.model, "speech", tmp_path / "mouth")
    build.save_part(one.model, "audio", tmp_path / "ear")
    for head in ("one", "mouth"):
        again = ModelSpec(
            path=str(blind),
            audio=AudioSpec(
                path=str(tmp_path / "ear"), feature_layer="weighted", connector_path=str(tmp_path / "one")
            ),
            speech=SpeechSpec(**mouth, path=str(tmp_path / head)),
        )
        two = build.build(again, seed=2)
        for name, weight in one.model.state_dict().items():
            assert torch.equal(two.model.state_dict()[name], weight), name
    wide = SpeechSpec(**mouth | {"width": 64}, path=str(tmp_path / "mouth"))
    with pytest.raises(CheckpointError, match=r"model\.speech\.path: .* expected"):
        build.build(ModelSpec(path=str(blind), speech=wide))
    with pytest.raises(CheckpointError, match="has no speech head"):
        build.build(ModelSpec(path=str(blind), speech=SpeechSpec(**mouth, path=str(blind))))
    deaf = AudioSpec(config=tiny_audio(), connector_path=str(blind))
    with pytest.raises(CheckpointError, match="has no connector"):
        build.build(ModelSpec(path=str(blind), audio=deaf))


def test_a_part_that_is_not_there_cannot_be_saved(blind, tmp_path):
    model = build.load(blind).model
    with pytest.raises(RecipeError, match=r"parts\.audio: this model has no audio tower"):
        build.save_part(model, "audio", tmp_path / "x")
    with pytest.raises(RecipeError, match=r"parts\.speech: this model has no speech head"):
        build.save_part(model, "speech", tmp_path / "x")


def test_a_model_hears_and_sees_in_one_conversation_and_what_is_spoken_is_passed_over(codec):
    import PIL.Image

    composed = tiny_model(audio="tinymodal_ear", speech={"codec": codec, "layers": 1})
    user, answer = asked().messages
    picture = Image(PIL.Image.new("RGB", (24, 24)))
    spoken = Message("assistant", (*answer.parts, Speech(torch.zeros(100), 16_000)))
    encoded = composed.encoder(Sample((Message("user", (picture, *user.parts)), spoken), "x"))
    assert [item.kind for item in encoded.media] == ["image", "audio"]
    assert encoded.speech == ()


# At toy size


@pytest.mark.parametrize("name", EARS)
def test_every_known_tower_that_hears_is_played_by_one_of_its_kind(name, tmp_path):
    spec = AudioSpec(path=name)
    small = shrink(ModelSpec(language=PHI, audio=spec), tmp_path).spec.audio
    assert small.path is None
    assert small.config["model_type"] == EARS[name]["model_type"]
    real, toy = audio_processor(spec), audio_processor(small)
    assert toy.typical().tile_tokens == real.typical().tile_tokens
    assert toy.layout(40_000).tokens == real.layout(40_000).tokens


@pytest.mark.parametrize("name", CODECS)
def test_every_known_codec_is_played_by_a_small_one(name, tmp_path):
    small = shrink(ModelSpec(language=PHI, speech=SpeechSpec(codec=name, books=3)), tmp_path).spec
    assert open_codec(small.speech.codec).books == 3
    composed = build.build(small)
    assert all(part.parameters < 1_000_000 for part in build.parameter_report(composed.model))


def test_a_toy_keeps_the_layer_and_the_choices(tmp_path):
    spec = AudioSpec(path="openai/whisper-small", feature_layer=(-1, 6), tokens_per_s=10, window_s=20)
    small = shrink(ModelSpec(language=PHI, audio=spec), tmp_path)
    assert small.spec.audio.feature_layer == (-1, 1)
    assert (small.spec.audio.window_s, small.spec.audio.options["factor"]) == (20, 5)
    assert small.blocks["audio"] == (12, 2)
    assert "a second of sound: 10 tokens, here as many" in small.lines
    composed = build.build(small.spec)
    assert composed.model.model.towers["audio"].width == 64


def test_a_composed_model_that_hears_and_speaks_is_taken_apart(codec, tmp_path):
    hearing = {"window_s": 4.0, "feature_layer": "weighted"}
    build.save(tiny_model(audio="wav2vec2", hearing=hearing, speech={"codec": codec}), tmp_path / "m")
    small = shrink(ModelSpec(path=str(tmp_path / "m")), tmp_path / "toy").spec
    assert (small.audio.config["model_type"], small.audio.window_s) == ("wav2vec2", 4.0)
    assert small.audio.feature_layer == "weighted"
    assert small.speech.design == "talker"
    new = AudioSpec(path="openai/whisper-tiny")
    small = shrink(ModelSpec(path=str(tmp_path / "m"), audio=new), tmp_path / "toy").spec
    assert small.audio.config["model_type"] == "whisper"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"path": "openai/whisper-smal"}, "did you mean 'openai/whisper-small'"),
        ({"path": "openai/clip-vit-large-patch14"}, "is a tower; name a tower that hears"),
        ({"path": "openai/whisper-small", "tokens_per_s": 12}, "no whole factor"),
        ({"path": "openai/whisper-small", "feature_layer": 13}, "a tower of 12 blocks"),
        ({"path": "openai/whisper-small", "window_s": 31}, "cut the sound with window_s"),
    ],
)
def test_what_the_real_tower_would_refuse_is_refused_at_toy_size(keys, told, tmp_path):
    with pytest.raises(RecipeError, match=told):
        shrink(ModelSpec(language=PHI, audio=AudioSpec(**keys)), tmp_path)
    with pytest.raises(RecipeError, match="does not know what 'kyutai/mimy' is"):
        shrink(ModelSpec(language=PHI, speech=SpeechSpec(codec="kyutai/mimy")), tmp_path)


def test_options_are_left_alone_where_no_tokens_a_second_are_asked():
    config = audio_tower_config(tiny_audio("whisper"))
    spec = AudioSpec(config=tiny_audio("whisper"), options={"factor": 3})
    assert connector_options(spec, config, hearing_of(spec, config)) == {"factor": 3}
