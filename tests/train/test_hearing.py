"""Models that hear and speak are trained as models that see are: same packing, same ranks, same way back."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from rich.console import Console

from tinymodal.compose import build
from tinymodal.compose.mouth import speaking_of
from tinymodal.compose.tiny import tiny_codec, tiny_model
from tinymodal.core.config import load
from tinymodal.core.errors import CheckpointError, DataError, RecipeError
from tinymodal.core.types import Audio, Encoded, MediaItem, Message, Sample, Text
from tinymodal.data.cache import FeatureCache
from tinymodal.data.codes import CodeBook
from tinymodal.data.collate import collate
from tinymodal.data.pack import Packer
from tinymodal.data.seen import keep, warm
from tinymodal.data.sources import open_source
from tinymodal.infer.engine import Engine, Sampling
from tinymodal.train.flops import StepFlops
from tinymodal.train.groups import grouped, rates_of, table, trainable
from tinymodal.train.held_out import HeldOut
from tinymodal.train.loop import run
from tinymodal.train.memory import estimate, measured
from tinymodal.train.meter import by_group
from tinymodal.train.objective import Objective
from tinymodal.train.optim import build_optimizer, set_rates
from tinymodal.train.preview import preview
from tinymodal.train.recipe import Recipe, Stage
from tinymodal.train.shrink import shrink_recipe
from tinymodal.train.stage_data import stage_loader
from tinymodal.train.step import step
from tinymodal.train.stop import Stopped

from . import tones
from .ranks import together
from .test_parallel import KINDS, Run, compare
from .tones import RATE_HZ, Named, Tones, asr_rows, tone

WORDS = (
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "star",
    "what",
    "colour",
    "is",
    "it",
    "one",
    "two",
    "low",
    "high",
)
EVERYTHING = {"vision": 1e-3, "audio": 1e-3, "connectors": 1e-3, "language": 1e-3}


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    tiny_codec(folder)
    return folder


@pytest.fixture(scope="module")
def omni(codec):
    """Sees, hears and speaks; nobody trains it itself."""
    speech = {"codec": str(codec), "layers": 1, "width": 32, "read": 1, "write": 4}
    return tiny_model(audio="tinymodal_ear", words=WORDS, speech=speech)


def batch_of(composed, ids, made=None, spoken=False):
    encoder = composed.encoder
    if spoken:
        encoder = encoder.using(speech=speaking_of(composed.model, composed.codec))
    rows = []
    for n in ids:
        packer = Packer(10_000)
        packer.add(encoder((made or Tones()).sample(n)))
        rows += packer.flush()
    if spoken:
        rows = CodeBook(None, composed.codec).complete(rows)
    config = composed.model.config
    return collate(
        rows, composed.tokenizer.pad_token_id, config.image_token_id, audio_token_id=config.audio_token_id
    )


SOUNDS, PICTURES, WORDS_ONLY, BOTH = (3, 9), (2, 4), (0, 6), (1, 5)
"""Samples of ``Tones`` that play a sound, show a picture, do neither, and do both."""


def test_samples_have_the_media_that_the_tests_say(omni):
    for ids, kinds in (
        (SOUNDS, {"audio"}),
        (PICTURES, {"image"}),
        (WORDS_ONLY, set()),
        (BOTH, {"image", "audio"}),
    ):
        for n in ids:
            assert {item.kind for item in omni.encoder(Tones().sample(n)).media} == kinds


# Training


@pytest.fixture
def recipe(tmp_path, omni, codec):
    """``recipe(steps=2, ...)``: a model that hears, from transcripts of tones."""
    asr_rows(tmp_path)

    def make(*stages, model=None, **changes):
        of_run = {key: changes.pop(key) for key in Recipe.model_fields if key in changes}
        if model is None:
            if not (tmp_path / "omni").exists():
                build.save(omni, tmp_path / "omni")
            model = {"path": str(tmp_path / "omni")}
        plain = {
            "name": "only",
            "train": {"audio": 1e-3, "connectors": 1e-3, "language": 1e-3},
            "steps": 2,
            "seq_len": 64,
            "batch_tokens": 128,
            "data": [{"path": str(tmp_path / "tones.jsonl"), "format": "asr"}],
        }
        given = [plain | changes | stage for stage in (stages or ({},))]
        base = {"name": "test", "model": model, "stages": given, "cache_folder": str(tmp_path / "kept")}
        return Recipe.model_validate(base | of_run)

    return make


def weights(composed):
    return {name: p.clone() for name, p in composed.model.state_dict().items()}


def test_two_steps_on_transcripts_of_tones_move_what_hears(recipe, omni, tmp_path):
    out = run(recipe(), tmp_path / "run", progress=False)
    before, after = weights(omni), weights(out)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".towers.audio." in name for name in moved)
    assert any(".connectors.audio." in name for name in moved)
    assert not any(".image." in name or name.startswith("speech_head.") for name in moved)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss/audio", "loss/tones", "lr/audio"} <= rows[-1].keys()
    assert "loss/text" not in rows[-1]
    again = build.load(tmp_path / "run" / "model")
    assert all(torch.equal(after[name], weight) for name, weight in weights(again).items())
    assert again.codec is not None


def test_a_run_with_sounds_goes_on_bit_for_bit(recipe, tmp_path):
    made = [
        {"made": f"{tones.__file__}:Tones", "options": {"spoken": True}},
        {
            "path": str(tmp_path / "tones.jsonl"),
            "format": "asr",
            "augment": {"speed": [0.8, 1.2], "noise_db": [5, 20]},
        },
    ]
    options = {"train": EVERYTHING | {"speech": 1e-3}, "loss": ["text", "speech"], "data": made, "steps": 4}
    options |= {"batch_tokens": 256, "micro_batch_tokens": 128, "seq_len": 128, "frames": 100}
    whole = run(recipe(**options, save_every=2), tmp_path / "whole", progress=False)

    def stop(folder):
        raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Stopped)):
        run(
            recipe(**options, save_every=2, save_async=False),
            tmp_path / "cut",
            after_save=stop,
            progress=False,
        )
    again = run(recipe(**options, save_every=2), tmp_path / "cut", progress=False)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(again)[name]), name


def test_what_is_spoken_is_learned_and_only_asked_for_where_the_loss_says(recipe, omni, tmp_path):
    made = [{"made": f"{tones.__file__}:Tones", "options": {"spoken": True}}]
    options = {
        "train": {"speech": 1e-3},
        "loss": ["speech"],
        "data": made,
        "seq_len": 128,
        "batch_tokens": 256,
    }
    held = {"held_out": made, "held_out_every": 1, "held_out_samples": 4}
    out = run(recipe(**options, **held), tmp_path / "run", progress=False)
    before, after = weights(omni), weights(out)
    for name in before:
        moved = not torch.equal(before[name], after[name])
        assert moved == name.startswith("speech_head."), name
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"held_out", "speech_right"} <= {key for row in rows for key in row}
    assert list((tmp_path / "kept" / "codes").rglob("*"))
    with pytest.raises(RecipeError, match="the loss 'speech' needs a model that speaks"):
        run(recipe(**options, model=deaf(tmp_path)), tmp_path / "none", progress=False)


def deaf(tmp_path):
    build.save(tiny_model(words=WORDS), tmp_path / "deaf")
    return {"path": str(tmp_path / "deaf")}


def test_a_sound_for_a_model_without_ears_is_told_by_the_part_that_is_missing(recipe, tmp_path):
    with pytest.raises(DataError, match=r"\[model\.audio\]"):
        run(recipe(model=deaf(tmp_path), train={"language": 1e-3}), tmp_path / "none", progress=False)


def test_a_rate_for_what_is_not_there_or_not_asked_is_refused(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"train\.audio has a rate, but this model has no parameters there"):
        run(recipe(model=deaf(tmp_path)), tmp_path / "none", progress=False)
    with pytest.raises(ValueError, match=r"'train\.speech' has a rate, but only the speech loss trains it"):
        recipe(train={"speech": 1e-3})
    with pytest.raises(ValueError, match="the audio tower trains in this stage"):
        recipe(cache=True)


# Groups


def test_every_parameter_is_in_the_group_of_its_part(omni):
    found = grouped(omni.model)
    core = omni.model.model
    parts = {
        "vision": core.towers["image"], "audio": core.towers["audio"], "speech": omni.model.speech_head,
        "connectors": core.connectors,
    }  # fmt: skip
    for group, part in parts.items():
        assert {id(p) for p in found[group]} == {id(p) for p in part.parameters()}, group
    rows = {row.group: row.parameters for row in table(omni.model, {"speech": 1.0})}
    assert sum(rows.values()) == sum(p.numel() for p in omni.model.parameters())


def test_a_learned_mean_of_layers_trains_with_the_connectors_above_a_tower_that_rests():
    composed = tiny_model(audio="wav2vec2", hearing={"feature_layer": "weighted"})
    tower = composed.model.model.towers["audio"]
    groups = trainable(composed.model, {"connectors": 1e-3})
    assert any(p is tower.layer_weights for group in groups for p in group["params"])
    assert not tower.backbone.training
    assert not any(p.requires_grad for p in tower.backbone.parameters())


def test_a_frozen_tower_that_hears_leaves_no_graph(omni):
    composed = dataclasses.replace(omni, model=copy.deepcopy(omni.model))
    trainable(composed.model, {"connectors": 1e-3})
    batch = batch_of(composed, SOUNDS)
    values = batch.audio_values if isinstance(batch.audio_values, torch.Tensor) else batch.audio_values[0]
    assert not composed.model.model.towers["audio"](values).values.requires_grad


# Packing


def item(kind, patches):
    return MediaItem(kind, (), (), 0, patches)


def sample(tokens, *media):
    ids = torch.ones(tokens, dtype=torch.int64)
    return Encoded(ids, ids, tuple(item(*each) for each in media), "x")


def test_frames_are_a_budget_of_their_own():
    packer = Packer(100, patches=10, open_rows=4, frames=10)
    for n in range(4):
        packer.add(sample(5, ("audio", 6), ("image", 2)), n)
    assert [row.indices for row in packer.flush()] == [[0], [1], [2], [3]], "six frames and six are too many"
    for n in range(4):
        packer.add(sample(5, ("audio", 5), ("image", 2)), n)
    rows = packer.flush()
    assert [(row.frames, row.patches) for row in rows] == [(10, 4), (10, 4)]
    assert not packer.add(sample(5, ("audio", 11)))
    (dropped,) = packer.dropped
    assert dropped.reason.startswith("11 frames of sound; a row holds 10 (frames)")


def test_a_recipes_frames_reach_the_rows_and_are_part_of_the_place_in_the_data(recipe, omni, tmp_path):
    made = [{"made": f"{tones.__file__}:Tones", "options": {"pictures": False}}]
    loader, other = (
        stage_loader(recipe(data=made, seq_len=256, batch_tokens=512, frames=frames), 0, omni)
        for frames in (60, 70)
    )
    for _ in range(3):
        batch = next(loader)
        heard = batch.audio_values if isinstance(batch.audio_values, tuple) else (batch.audio_values,)
        # Two rows; 25 positions for each half second.
        assert sum(len(same) * same.shape[2] // 4 for same in heard) <= 2 * 60
    place = loader.state_dict()
    with pytest.raises(CheckpointError, match="frames was 60"):
        other.load_state_dict(place)


# Ranks


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_with_sounds_and_one_with_pictures_have_the_gradient_of_one_process(omni, kind):
    dealt = [[batch_of(omni, SOUNDS)], [batch_of(omni, PICTURES)]]
    compare(omni, dealt, kind, train=EVERYTHING)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_any_mix_of_media_may_be_dealt_to_ranks(omni, kind):
    sounds, pictures, words, both = (batch_of(omni, ids) for ids in (SOUNDS, PICTURES, WORDS_ONLY, BOTH))
    for dealt in (
        [[sounds, words], [words, pictures]],
        [[both, words], [words, words]],
        [[sounds], [pictures, both]],
        [[words], [sounds, sounds]],
    ):
        compare(omni, dealt, kind, train=EVERYTHING)
    compare(omni, [[sounds], [pictures]], kind, train={"connectors": 1e-3})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_spoken_answers_on_one_rank_only_train_as_in_one_process(omni, kind):
    spoken, silent = batch_of(omni, BOTH, Tones(spoken=True), spoken=True), batch_of(omni, PICTURES)
    train = EVERYTHING | {"speech": 1e-3}
    compare(omni, [[spoken], [silent]], kind, train=train, losses=("text", "speech"))
    compare(omni, [[silent, silent], [spoken, silent]], kind, train=train, losses=("text", "speech"))
    compare(omni, [[spoken], [silent]], kind, train={"speech": 1e-3}, losses=("speech",))


def test_ranks_of_which_one_has_features_of_sounds_are_refused(omni):
    batch = batch_of(omni, (3,))
    features = dataclasses.replace(batch, audio_values=None, audio_features=torch.zeros(1, 25, 32))

    def body(world):
        trial = Run(omni, world)
        try:
            trial.step([features if world.rank else batch])
        except DataError as error:
            return str(error)

    for told in together(2, body):
        assert told.startswith("rank 1 has a tower's features in this step and rank 0 samples")


# The cache


@pytest.fixture
def rows(tmp_path):
    asr_rows(tmp_path)
    return open_source(str(tmp_path / "tones.jsonl"), "asr")


def kept_of(composed, folder):
    composed.model.requires_grad_(False)
    processor = composed.processor
    return keep(
        composed.model, processor.image_processor, FeatureCache(folder), sounds=processor.feature_extractor
    )


def test_a_sound_is_encoded_once_and_comes_back_the_same(omni, rows, tmp_path):
    composed = dataclasses.replace(omni, model=copy.deepcopy(omni.model))
    kept = kept_of(composed, tmp_path / "kept")
    encoder = composed.encoder.using(prepare=kept.prepare, prepare_sound=kept.prepare_sound)

    def read(n):
        packer = Packer(1000)
        packer.add(encoder(rows.sample(n)))
        (row,) = kept.complete(packer.flush())
        return row

    first = [read(n) for n in range(4)]
    assert (kept.complete.num_new, kept.complete.num_hits) == (4, 0)
    again = [read(n) for n in range(4)]
    assert (kept.complete.num_new, kept.complete.num_hits) == (4, 4)
    for one, other in zip(first, again, strict=True):
        (a,), (b,) = one[0].media, other[0].media
        assert (a.kind, a.seen, a.tokens, a.tile_tokens) == ("audio", True, b.tokens, b.tile_tokens)
        assert all(torch.equal(x, y) for x, y in zip(a.tiles, b.tiles, strict=True))
    whole = omni.encoder(rows.sample(1)).media[0]
    seen = composed.model.model.towers["audio"](torch.stack(whole.tiles)).values[0]
    torch.testing.assert_close(first[1][0].media[0].tiles[0].float(), seen, rtol=0.01, atol=0.02)


def test_another_stretch_or_way_to_hear_is_another_key_and_a_changed_sound_has_none(omni, tmp_path):
    kept = kept_of(dataclasses.replace(omni, model=copy.deepcopy(omni.model)), tmp_path)
    hear = kept.prepare_sound
    sound = tone("low", 1.0)
    keys = {hear.find(sound, RATE_HZ).key, hear.find(sound, 8_000).key, hear.find(sound, RATE_HZ, 0.1).key}
    assert len(keys) == 3

    class Louder:
        def wave(self, samples, rate_hz):
            return samples * 2

        def mel(self, mel, frames_per_s, silence):
            return mel

    assert hear(sound, RATE_HZ, change=Louder()).key == ""
    assert hear(sound, RATE_HZ).key


def test_the_cache_is_filled_ahead_with_sounds(omni, rows, tmp_path):
    kept = kept_of(dataclasses.replace(omni, model=copy.deepcopy(omni.model)), tmp_path / "kept")
    done = warm({"tones": rows}, kept, shown=False)
    assert (done.num_rows, done.num_pictures, done.num_new, done.bad) == (8, 8, 8, ())
    assert warm({"tones": rows}, kept, shown=False).num_new == 0


def test_a_stage_with_a_cache_trains_the_same_weights_the_second_time(recipe, tmp_path):
    options = {"train": {"connectors": 1e-3}, "cache": True}
    one = run(recipe(**options), tmp_path / "one", progress=False)
    two = run(recipe(**options), tmp_path / "two", progress=False)
    assert all(torch.equal(w, weights(two)[name]) for name, w in weights(one).items())


# What is told


def test_the_loss_of_documents_is_told_by_their_media(omni):
    trial = Run(omni, train=EVERYTHING)
    report = trial.step([batch_of(omni, (*SOUNDS, *PICTURES, *WORDS_ONLY, *BOTH))])
    assert report.groups.keys() == {(0, 0), (0, 1), (0, 2), (0, 3)}
    told = by_group("loss", report.groups, ("mix",))
    assert list(told) == ["loss/mix", "loss/text", "loss/image", "loss/audio"]
    total = {key: report.groups[(0, key)] for key in range(4)}
    assert told["loss/audio"] == pytest.approx((total[2][0] + total[3][0]) / (total[2][1] + total[3][1]))


def test_what_is_held_out_is_measured_as_it_is_trained(omni):
    held = HeldOut(
        [Tones()], omni.encoder, ["tones"], samples=8, seq_len=128, batch_tokens=256,
        pad_id=omni.tokenizer.pad_token_id, image_token_id=omni.model.config.image_token_id,
        audio_token_id=omni.model.config.audio_token_id,
    )  # fmt: skip
    objective = Objective(omni.model)
    row = held.row("s", 1, held.measure(objective))
    assert {"held_out", "held_out/tones", "held_out/audio", "held_out/image", "held_out/text"} <= row.keys()


def test_a_preview_says_what_a_second_of_sound_costs(recipe, tmp_path):
    out = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    made = [{"made": f"{tones.__file__}:Tones", "options": {"spoken": True}}]
    stage = {"loss": ["text", "speech"], "train": EVERYTHING | {"speech": 1e-3}, "data": made, "seq_len": 128}
    preview(recipe(**stage, batch_tokens=256), out)
    text = out.export_text()
    assert "a sound: 6.267 tokens a second of 25 positions, heard in windows of at most 30 s" in text
    assert "a sound of 2 s: 50 positions -> 13 tokens" in text
    assert "an answer aloud: 25 frames a second of 2 codes of 16, at 16,000 Hz" in text
    assert "[audio: 0.7 s, 25 positions -> 7 tokens]" in text
    assert " spoken in " in text


def test_operations_of_ears_are_counted_where_there_are_sounds(omni):
    composed = dataclasses.replace(omni, model=copy.deepcopy(omni.model))
    trainable(composed.model, {"connectors": 1e-3})
    sounds, words = batch_of(composed, SOUNDS), batch_of(composed, WORDS_ONLY)
    count = StepFlops(composed.model)
    assert count._media(words) == 0
    assert count._media(sounds) > 0
    twice = StepFlops(composed.model)
    assert twice([sounds, sounds]) == 2 * count([sounds])
    trainable(composed.model, {"audio": 1e-3, "connectors": 1e-3})
    assert StepFlops(composed.model)._media(sounds) > 2 * count._media(sounds)
    spoken = batch_of(composed, BOTH, Tones(spoken=True), spoken=True)
    trainable(composed.model, {"speech": 1e-3})
    speaks = StepFlops(composed.model, losses=("speech",))
    assert speaks._speech(spoken) > 0
    assert speaks([spoken]) < StepFlops(composed.model, losses=("text", "speech"))([spoken])


@pytest.mark.parametrize("design", ["talker", "units"])
def test_the_memory_of_a_step_with_sounds_and_speech_is_estimated(omni, codec, design):
    speech = {"codec": str(codec), "design": design, "layers": 1, "width": 32}
    composed = tiny_model(audio="tinymodal_ear", words=WORDS, speech=speech)
    train = EVERYTHING | {"speech": 1e-3}
    stage = Stage(
        name="s", train=train, loss=("text", "speech"), steps=1, seq_len=64, batch_tokens=128,
        data=[{"made": "scenes"}],
    )  # fmt: skip
    objective = Objective(composed.model, stage.loss)
    groups = trainable(composed.model, stage.train)
    batch = batch_of(composed, (*SOUNDS, *BOTH), Tones(spoken=True), spoken=True)
    found = estimate(objective, groups, stage, "float32", batch)
    optimizer = build_optimizer(groups, stage)
    set_rates(optimizer, 0.0)
    real = measured(lambda: step(objective, optimizer, [batch]))
    assert found.working == pytest.approx(real, rel=0.25)
    assert estimate(objective, groups, stage, "float32", batch, rows=8).working > 1.5 * found.working


# Learning


def test_a_model_that_hears_learns_the_name_of_a_tone_and_is_lost_with_shuffled_clips(tmp_path):
    torch.manual_seed(0)
    composed = tiny_model(None, audio="tinymodal_ear", words=WORDS)
    build.save(composed, tmp_path / "start")
    recipe = Recipe.model_validate(
        {
            "name": "tones", "model": {"path": str(tmp_path / "start")}, "save_every": 0,
            "stages": [{
                "name": "learn", "train": {"audio": 3e-3, "connectors": 3e-3, "language": 3e-3}, "steps": 25,
                "seq_len": 64, "batch_tokens": 384, "data": [{"made": f"{tones.__file__}:Named"}],
            }],
        }
    )  # fmt: skip
    trained = run(recipe, tmp_path / "run", progress=False)
    engine = Engine(trained)

    def right(shuffled):
        asked = [Named(seed=7, shuffled=shuffled).sample(n) for n in range(60)]
        replies = engine.reply(
            [dataclasses.replace(s, messages=s.messages[:1]) for s in asked], Sampling(max_new_tokens=3)
        )
        said = [s.messages[1].parts[0].text for s in asked]
        return sum(reply.text == name for reply, name in zip(replies, said, strict=True)) / len(asked)

    # 1.0 and 0.52 after 25 steps.
    assert right(shuffled=False) > 0.95
    assert 0.3 < right(shuffled=True) < 0.7

    def said(*sounds):
        asked = [Message("user", (Audio(sound, RATE_HZ), Text("what is it"))) for sound in sounds]
        return [
            reply.text
            for reply in engine.reply([Sample((a,), "x") for a in asked], Sampling(max_new_tokens=3))
        ]

    low, high = tone("low", seed=99), tone("high", seed=99)
    assert said(low, high) == ["low", "high"]
    assert said(high, low) == ["high", "low"]
    assert len(said(torch.zeros(1), torch.zeros(8000), torch.randn(8000), torch.ones(800))) == 4


TOY = """
name = "mine"
[model.audio]
path = "openai/whisper-small"
tokens_per_s = 12.5
feature_layer = "weighted"
[model.speech]
codec = "kyutai/mimi"
books = 8
voices = ["ann", "bob"]
[model.language]
path = "Qwen/Qwen2.5-0.5B-Instruct"
[[stages]]
name = "align"
train = { connectors = 1e-3 }
template = "plain"
steps = 100
seq_len = 2048
batch_tokens = 16_384
frames = 4096
data = [{ path = "data/*.jsonl", format = "asr", augment = { speed = [0.9, 1.1] } }]
[[stages]]
name = "adapt"
train = { audio = 1e-5, connectors = 1e-4, adapters = 1e-4 }
only = { audio = "from layer 6" }
lora = { rank = 16, parts = ["language"] }
steps = 100
seq_len = 2048
batch_tokens = 16_384
data = [{ path = "data/*.jsonl", format = "audio_qa" }]
[[stages]]
name = "ears"
train = { adapters = 1e-4 }
lora = { rank = 4, parts = ["audio"] }
steps = 100
seq_len = 2048
batch_tokens = 16_384
data = [{ path = "data/*.jsonl", format = "asr" }]
[[stages]]
name = "speak"
train = { speech = 1e-3 }
loss = ["speech"]
steps = 100
seq_len = 2048
batch_tokens = 16_384
data = [{ path = "data/*.jsonl", format = "tts" }]
held_out = [{ path = "data/*.jsonl", format = "tts" }]
"""


@pytest.mark.slow
def test_a_recipe_for_large_ears_and_a_large_mouth_runs_at_toy_size(tmp_path):
    (tmp_path / "mine.toml").write_text(TOY)
    small, toy = shrink_recipe(load(tmp_path / "mine.toml", Recipe), tmp_path / "toy")
    align, adapt, _, speak = small.stages
    assert align.data[0].format == "audio_caption"
    assert align.data[0].augment is not None
    assert adapt.only == {"audio": "from layer 1"}
    assert speak.held_out[0].format == "messages"
    assert "a second of sound: 12.5 tokens, here as many" in toy.lines
    out = run(small, tmp_path / "run", progress=False)
    assert out.codec.books == 4
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"align", "adapt", "ears", "speak"}
    assert all(row["loss"] > 0 for row in rows if "loss" in row)


def test_adapters_on_a_tower_that_hears_train_and_merge(recipe, omni, tmp_path):
    options = {"train": {"adapters": 1e-2}, "lora": {"rank": 2, "parts": ["audio"]}}
    out = run(recipe(**options), tmp_path / "run", progress=False)
    before, after = weights(omni), weights(out)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".towers.audio." in name for name in moved)


def test_rates_of_language_do_not_reach_ears_or_mouth():
    assert rates_of({"language": 1.0})["audio"] == rates_of({"language": 1.0})["speech"] == 0.0
