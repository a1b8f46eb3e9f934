"""Towers that hear give what transformers' own classes give, of sounds of any length and of nothing more."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModel, ClapAudioModel, PreTrainedConfig, WhisperModel

from tinymodal.model.audio_towers import AUDIO_ENCODERS, audio_encoder_of, audio_tower_config
from tinymodal.model.ear import Ear, EarConfig
from tinymodal.model.hf_audio import AnyAudio, listen
from tinymodal.model.modeling_tinymodal import load_exactly
from tinymodal.model.sound_tower import AudioTower

BLOCKS = 3
SMALL = {"hidden_size": 16, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "intermediate_size": 32}
QUIET = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "conformer_conv_dropout": 0.0,
}
"""Dropout, which a tower keeps as its config says, off."""
WAVES = SMALL | {"conv_dim": [4] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
"""What tells the large wav2vec 2.0 from the base one: norms at other places."""
WHISPER = {
    "d_model": 16,
    "encoder_layers": BLOCKS,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "vocab_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

TOWERS: dict[str, dict[str, Any]] = {
    "whisper": WHISPER,
    "voxtral_encoder": SMALL,
    "qwen2_audio_encoder": {key: WHISPER[key] for key in list(WHISPER)[:4]},
    "wav2vec2": WAVES,
    "wav2vec2 large": WAVES | LARGE,
    "hubert": WAVES,
    "hubert large": WAVES | LARGE,
    "wavlm": WAVES,
    "wavlm large": WAVES | LARGE,
    "data2vec-audio": WAVES | {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5},
    "unispeech": WAVES,
    "unispeech-sat": WAVES,
    "wav2vec2-conformer": WAVES,
    "wav2vec2-conformer rotary": WAVES | {"position_embeddings_type": "rotary"},
    "wav2vec2-bert": SMALL,
    "wav2vec2-bert relative": SMALL | {"position_embeddings_type": "relative"},
    "clap_audio_model": {
        "patch_embeds_hidden_size": 4,
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "hidden_size": 32,
        "hidden_dropout_prob": 0.0,
    },
}
"""Families with an adapter of their own; the word behind the ``model_type`` says which kind."""
STRETCHED = ("clap_audio_model",)
"""These hear windows of one length, whatever the sound."""
LONG = [name for name in TOWERS if " " in name or name in ("wavlm", "wav2vec2-conformer", "wav2vec2-bert")]
"""Of these a minute takes seconds of arithmetic: every pair of positions has a number of its own."""
BLOCKWISE = [name for name in TOWERS if name not in STRETCHED]

OTHERS: dict[str, dict[str, Any]] = {
    "moonshine": SMALL
    | {
        "encoder_num_hidden_layers": BLOCKS,
        "encoder_num_attention_heads": 2,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "vocab_size": 8,
    },
    "glmasr_encoder": SMALL,
    "speech_to_text": WHISPER | {"conv_channels": 8},
    "parakeet_encoder": SMALL | {"subsampling_conv_channels": 4},
    "sew": SMALL | {"num_hidden_layers": 1, "num_conv_pos_embeddings": 16, "conv_dim": [4] * 13},
    "audio-spectrogram-transformer": SMALL | {"max_length": 128, "num_mel_bins": 32},
}
"""Families that go to the general adapter."""


def config_of(name: str, **more: Any) -> PreTrainedConfig:
    kind, _, _ = name.partition(" ")
    values = (TOWERS | OTHERS)[name]
    quiet = QUIET if "conv_dim" in values or kind == "wav2vec2-bert" else {}
    return CONFIG_MAPPING[kind](**values | quiet | more)


@functools.cache
def whole_tower(name: str) -> Any:
    """transformers' own class in eval mode, with numbers large enough that a skipped part would show."""
    torch.manual_seed(0)
    config = config_of(name)
    if config.model_type == "whisper":
        tower = WhisperModel(config).encoder
    elif config.model_type == "clap_audio_model":
        tower = ClapAudioModel(config)
    else:
        tower = AutoModel.from_config(config)
        tower = tower.get_encoder() if config.is_encoder_decoder else tower
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for key, buffer in tower.named_buffers():
            if "running" in key:
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return tower.eval()


def build(name: str, layer: Any = -1, **more: Any) -> AudioTower:
    """Ours with the numbers of :func:`whole_tower`."""
    config, theirs = config_of(name, **more), whole_tower(name).state_dict()
    tower = audio_encoder_of(config).build(config, layer)
    load_exactly(tower.module, {key: theirs[key] for key in tower.module.state_dict()})
    return tower.eval()


def sound(seconds: float, items: int = 1, seed: int = 0) -> Tensor:
    """Noise, [items, samples] at 16 kHz."""
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(items, round(seconds * 16_000), generator=generator)


def windows(name: str, seconds: float, items: int = 1, whole: bool = False) -> Tensor:
    """Prepared sounds, float32 [items, bands, length]: of the length that the tower is given.

    ``whole``: all in one window, if the tower hears so long ones.
    """
    config = config_of(name)
    hearing = audio_encoder_of(config).hearing_of(config)
    length = hearing.frames(hearing.windows(round(seconds * hearing.rate_hz))[0])
    if whole and audio_encoder_of(config).max_window(config) is None:
        length = hearing.frames(round(seconds * hearing.rate_hz))
    generator = torch.Generator().manual_seed(round(10 * seconds) + items)
    return 0.5 * torch.randn(items, hearing.bands, length, generator=generator)


def theirs_of(name: str, values: Tensor) -> Tensor:
    """What transformers' own class says, [N, S, E]."""
    whole = whole_tower(name)
    if name in STRETCHED:
        out = whole(values.transpose(1, 2)[:, None]).last_hidden_state
        # [N, C, rows, S]: the rows of frequency side by side.
        return torch.cat(list(out.transpose(1, 3).unbind(2)), dim=-1)
    kind = name.split()[0]
    if kind in ("whisper", "voxtral_encoder", "qwen2_audio_encoder"):
        return sliced(whole, values.shape[2])(values).last_hidden_state
    if kind == "wav2vec2-bert":
        return whole(values.transpose(1, 2)).last_hidden_state
    return whole(values[:, 0]).last_hidden_state


def sliced(encoder: Any, frames: int) -> Any:
    """Whisper's encoder as it would be for windows of so many frames: its own modules, and of its table of
    positions the first rows. For the full length it is transformers' class, untouched."""
    positions = frames // 2
    if positions == encoder.config.max_source_positions:
        return encoder
    short = copy.deepcopy(encoder)
    short.config.max_source_positions = short.max_source_positions = positions
    short.embed_positions = nn.Embedding.from_pretrained(encoder.embed_positions.weight[:positions])
    return short


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- the same as transformers


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        pytest.param(name, seconds, marks=pytest.mark.slow if name in LONG and seconds > 2 else ())
        for name in TOWERS
        for seconds in (0.3, 2.0, 29.0)
    ],
)
@torch.no_grad()
def test_a_tower_says_of_a_sound_what_transformers_class_says(name, seconds):
    values = windows(name, seconds)
    features = build(name)(values)
    assert features.values.shape[1:] == (*features.grid, build(name).width)
    close(features.values, theirs_of(name, values))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in TOWERS]
)
@torch.no_grad()
def test_a_minute_is_one_window_where_the_tower_reads_it_and_else_several(name):
    tower, config = build(name), config_of(name)
    hearing = tower.hearing_of(config)
    sizes = hearing.windows(61 * hearing.rate_hz)
    if tower.max_window(config) is not None:
        assert all(hearing.frames(size) <= tower.max_window(config) for size in sizes)
        values = windows(name, 61.0)
        close(tower(values).values, theirs_of(name, values))
        with pytest.raises(ValueError, match="hears windows of 1 to"):
            tower(torch.zeros(1, hearing.bands, tower.max_window(config) + 1))
    else:
        values = windows(name, 61.0, whole=True)
        assert values.shape[2] >= hearing.frames(60 * hearing.rate_hz)
        close(tower(values).values, theirs_of(name, values))


@torch.no_grad()
def test_whisper_at_its_full_length_is_transformers_encoder_to_the_bit():
    values = windows("whisper", 30.0)
    assert values.shape == (1, 80, 3000)
    assert torch.equal(build("whisper")(values).values, whole_tower("whisper")(values).last_hidden_state)


@torch.no_grad()
def test_audio_flamingos_encoder_is_transformers_without_its_mask():
    torch.manual_seed(0)
    config = CONFIG_MAPPING["audioflamingo3_encoder"](**SMALL)
    theirs = AutoModel.from_config(config).eval()
    tower = audio_encoder_of(config).build(config).eval()
    load_exactly(tower.module, theirs.state_dict())
    values = torch.randn(1, config.num_mel_bins, 3000)
    everywhere = torch.ones(1, 3000, dtype=torch.long)
    close(tower(values).values, theirs(values, input_features_mask=everywhere).last_hidden_state)


@pytest.mark.parametrize("name", BLOCKWISE)
@pytest.mark.parametrize("layer", [0, -2, [1, 0, -1, 1]])
@torch.no_grad()
def test_an_earlier_hidden_state_is_what_goes_into_the_next_block(name, layer):
    values, tower = windows(name, 0.8), build(name, layer)
    states = hidden_states(name, values)
    wanted = [layer] if isinstance(layer, int) else layer
    close(tower(values).values, torch.cat([states[index] for index in wanted], dim=-1))
    assert tower.width == 16 * len(wanted)


@pytest.mark.parametrize("name", BLOCKWISE)
@torch.no_grad()
def test_weighted_is_the_mean_of_all_hidden_states_at_first_and_then_what_is_learned(name):
    values, tower = windows(name, 0.8), build(name, "weighted")
    states = torch.stack(hidden_states(name, values))
    close(tower(values).values, states.mean(0))
    tower.layer_weights.copy_(torch.tensor([2.0, -1.0, 0.5, 1.0]))
    shares = tower.layer_weights.exp() / tower.layer_weights.exp().sum()
    close(tower(values).values, torch.einsum("k,knse->nse", shares, states))


def hidden_states(name: str, values: Tensor) -> list[Tensor]:
    """transformers' hidden states by what its blocks are given, and what it ends with."""
    whole = sliced(whole_tower(name), values.shape[2]) if hasattr(whole_tower(name), "conv2") else None
    whole = copy.deepcopy(whole or whole_tower(name))
    seen: list[Tensor] = []
    blocks = whole.layers if hasattr(whole, "layers") else whole.encoder.layers
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    kind = name.split()[0]
    if kind in ("whisper", "voxtral_encoder", "qwen2_audio_encoder"):
        last = whole(values).last_hidden_state
    else:
        given = values.transpose(1, 2) if kind == "wav2vec2-bert" else values[:, 0]
        last = whole(given).last_hidden_state
    if kind == "qwen2_audio_encoder":
        seen = [whole.avg_pooler(state.transpose(1, 2)).transpose(1, 2) for state in seen]
    return [*seen, last]


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_any_other_encoder_says_what_transformers_class_says(name):
    tower, config = build(name), config_of(name)
    assert isinstance(tower, AnyAudio)
    layout = listen(config).layout
    bands = 1 if layout == "wave" else 32 if "spectrogram" in name else 128 if "glm" in name else 80
    for length in (128,) if "spectrogram" in name else (4800, 32_000) if layout == "wave" else (200, 302):
        values = torch.randn(2, bands, length)
        given = {"wave": values[:, 0], "bands": values, "frames": values.transpose(1, 2)}[layout]
        theirs = whole_tower(name)(given).last_hidden_state
        close(tower(values).values, theirs)
        assert tower.grid(config, (length,)) == (theirs.shape[1],)


@torch.no_grad()
def test_any_other_encoder_gives_earlier_hidden_states_too():
    values = torch.randn(2, 1, 8000)
    states: list[Tensor] = []
    whole = copy.deepcopy(whole_tower("moonshine"))
    for block in whole.layers:
        block.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    states.append(whole(values[:, 0]).last_hidden_state)
    for layer in (0, 1, -2, [0, -1]):
        wanted = [layer] if isinstance(layer, int) else layer
        close(build("moonshine", layer)(values).values, torch.cat([states[i] for i in wanted], dim=-1))
    close(build("moonshine", "weighted")(values).values, torch.stack(states).mean(0))


@torch.no_grad()
def test_a_family_whose_states_differ_in_length_gives_its_last():
    with pytest.raises(ValueError, match="'sew' differ in shape, so only the last can be read; got feature"):
        build("sew", 0)


# ---- what it costs, and who it depends on


@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "wavlm", "wav2vec2-conformer", "wav2vec2-bert"])
@torch.no_grad()
def test_two_seconds_cost_two_seconds_of_the_tower(name):
    """Products of matrices and convolutions, counted by torch. 30 s would be 15 times 2 s and more."""
    tower = build(name)
    costs = []
    for seconds in (2.0, 14.0):
        values = windows(name, seconds).to("meta")
        with FlopCounterMode(display=False) as counter:
            copy.deepcopy(tower).to("meta")(values)
        costs.append(counter.get_total_flops())
    assert costs[0] <= costs[1] * 2.1 / 14


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", [*TOWERS, "ear"])
@torch.no_grad()
def test_a_window_does_not_depend_on_its_batch(name, train):
    """Neither in train mode: batch norms keep to the statistics of pretraining."""
    tower = small_ear() if name == "ear" else build(name)
    values = torch.randn(3, 32, 70) if name == "ear" else windows(name, 0.9, items=3)
    tower.train(train)
    together = tower(values).values
    for i in range(3):
        torch.testing.assert_close(tower(values[i : i + 1]).values[0], together[i], rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.01


RANDOM = {"mask_time_prob": 0.5, "mask_feature_prob": 0.5, "layerdrop": 0.5, "mask_time_length": 2}


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_train_mode_masks_nothing_and_leaves_no_block_out(name):
    more = {key: value for key, value in RANDOM.items() if hasattr(config_of(name), key)}
    more |= {"encoder_layerdrop": 0.5} if hasattr(config_of(name), "encoder_layerdrop") else {}
    tower, values = build(name, **more), windows(name, 2.0)
    still = tower(values).values
    close(tower.train()(values).values, still)
    statistics = {key: value for key, value in tower.state_dict().items() if "running" in key}
    theirs = whole_tower(name).state_dict()
    for key, value in statistics.items():
        assert torch.equal(value, theirs[key.removeprefix("backbone.")]), "they stay"


@pytest.mark.parametrize("layer", [-1, 1, "weighted"])
@pytest.mark.parametrize("name", [*TOWERS, "ear"])
def test_every_weight_that_is_kept_gets_a_gradient(name, layer):
    if name in STRETCHED and layer != -1:
        pytest.skip("works in stages")
    tower = small_ear(layer) if name == "ear" else build(name, layer)
    values = torch.randn(2, 32, 70) if name == "ear" else windows(name, 0.9, items=2)
    tower.train()(values).values.square().sum().backward()
    lacking = [key for key, p in tower.named_parameters() if p.grad is None or not p.grad.any()]
    # Whisper's sines are not trained, by transformers' choice; a key's bias moves no attention, and
    # some of CLAP's numbers of one window are all alike.
    allowed = ("embed_positions.weight", "k_proj.bias", "linear_k.bias", "key.bias")
    assert not [key for key in lacking if not key.endswith(allowed)]


@pytest.mark.parametrize("name", ["whisper", "wav2vec2 large", "wavlm", "wav2vec2-bert"])
def test_recomputed_blocks_give_the_same_features_and_gradients(name):
    found = []
    for recompute in (False, True):
        tower = build(name, "weighted").train()
        if recompute:
            tower.module.gradient_checkpointing_enable({"use_reentrant": False})
        features = tower(windows(name, 0.8)).values
        features.square().sum().backward()
        found.append([features, *(p.grad for p in tower.parameters() if p.grad is not None)])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize(
    "name", ["wav2vec2-conformer", "wav2vec2-bert relative", "wav2vec2-conformer rotary"]
)
def test_tables_of_positions_do_not_remember_a_coarser_pass(name):
    """transformers keeps the last table: rounded after bfloat16, untrainable after inference mode."""
    values, tower = windows(name, 0.9), build(name)
    before = tower(values).values
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        tower(values)
    after = tower(values).values
    assert torch.equal(before, after)
    after.sum().backward()


def test_a_tower_is_cut_behind_the_block_that_is_read():
    for name in BLOCKWISE:
        one, all_of_them = build(name, 1), build(name)
        assert one.config.num_hidden_layers == 1
        assert all_of_them.config.num_hidden_layers == BLOCKS
        assert config_of(name).num_hidden_layers == BLOCKS
        kept = {key for key, _ in one.named_parameters()}
        assert not [
            key for key in kept if key.startswith(("backbone.layers.1.", "backbone.encoder.layers.1."))
        ]
        assert not [key for key, _ in all_of_them.named_parameters() if "masked_spec_embed" in key]
    last_norms = ("whisper", "wav2vec2 large", "wavlm large", "wav2vec2-conformer")
    for name in last_norms:
        norm = "layer_norm.weight" if name == "whisper" else "encoder.layer_norm.weight"
        assert norm not in build(name, 1).module.state_dict()
        assert norm in build(name).module.state_dict()
    assert "encoder.layer_norm.weight" in build("wav2vec2", 1).module.state_dict(), "it stands before all"


def test_adapters_of_transformers_are_left_out():
    more = {"add_adapter": True, "num_adapter_layers": 2}
    config = config_of("wav2vec2", **more)
    theirs = AutoModel.from_config(config).eval()
    tower = audio_encoder_of(config).build(config).eval()
    load_exactly(tower.module, {key: theirs.state_dict()[key] for key in tower.module.state_dict()})
    theirs.adapter = None
    values = windows("wav2vec2", 0.5)
    close(tower(values).values, theirs(values[:, 0]).last_hidden_state)


# ---- how many positions


@st.composite
def lengths(draw):
    name = draw(st.sampled_from([*TOWERS, "ear"]))
    config = EarConfig(**EAR) if name == "ear" else config_of(name)
    waves = "conv_stride" in config.to_dict()
    return name, draw(st.integers(400, 6000) if waves else st.integers(3, 200))


@settings(deadline=None, max_examples=100)
@given(case=lengths())
@torch.no_grad()
def test_the_grid_is_as_long_as_what_comes_out(case):
    name, length = case
    tower = _kept(name)
    bands = tower.hearing_of(tower.config).bands
    features = tower(torch.zeros(1, bands, length))
    assert features.grid == tower.grid(tower.config, (length,)) == (features.values.shape[1],)


@functools.cache
def _kept(name: str) -> AudioTower:
    return small_ear() if name == "ear" else build(name)


@pytest.mark.parametrize("name", [*TOWERS, "moonshine", "glmasr_encoder", "ear"])
@torch.no_grad()
def test_what_a_hearing_prepares_the_tower_reads(name):
    config = EarConfig(**EAR) if name == "ear" else config_of(name)
    adapter = audio_encoder_of(config)
    hearing = adapter.hearing_of(config)
    tower = adapter.build(config).eval()
    for seconds in (0.02, 2.0):
        (values,) = hearing.prepare(sound(seconds * hearing.rate_hz / 16_000)[0])
        assert values.shape == (
            hearing.bands,
            hearing.frames(hearing.windows(round(seconds * hearing.rate_hz))[0]),
        )
        features = tower(values[None])
        positions = hearing.windows(round(seconds * hearing.rate_hz))[0] / adapter.stride(config)
        assert positions - 2 < features.grid[0] < positions + 1
        assert features.values.isfinite().all()


def test_wavs_are_normalised_as_each_family_was_trained():
    normal = {
        name: audio_encoder_of(config_of(name)).hearing_of(config_of(name)).normalise for name in TOWERS
    }
    assert {name for name in normal if normal[name]} == {
        *(name for name in TOWERS if "conv_dim" in TOWERS[name] and name != "wavlm"),
        "wav2vec2-bert",
        "wav2vec2-bert relative",
    }


# ---- what is refused, and what is found


def test_what_a_tower_cannot_hear_is_refused_by_name():
    whisper, wave = build("whisper"), build("wav2vec2")
    with pytest.raises(
        ValueError, match=r"hears windows of 1 to 3000 frames \(30 s\), got 3001; cut the sound"
    ):
        whisper.grid(whisper.config, (3001,))
    with pytest.raises(ValueError, match="'wav2vec2' needs 400 samples for a position, got 399; fill the"):
        wave.grid(wave.config, (399,))
    assert wave.grid(wave.config, (400,)) == (1,)
    with pytest.raises(ValueError, match=r"'whisper' hears windows of \[80, length\], got \[128, 200\]"):
        whisper(torch.zeros(1, 128, 200))
    with pytest.raises(ValueError, match=r"'wav2vec2' hears windows of \[1, length\], got \[80, 2000\]"):
        wave(torch.zeros(1, 80, 2000))
    with pytest.raises(ValueError, match="needs 3 frames for a position, got 2"):
        build("qwen2_audio_encoder").grid(config_of("qwen2_audio_encoder"), (2,))


def test_layers_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="a tower of 3 blocks has 4 hidden states"):
        build("whisper", 4)
    with pytest.raises(ValueError, match="a number, a list of them or 'weighted', got 'all'"):
        build("whisper", "all")
    for layer in (0, "weighted", [1, -1]):
        with pytest.raises(ValueError, match="'clap_audio_model' works in stages, of which only the last"):
            build("clap_audio_model", layer)


def test_what_does_not_hear_is_refused():
    with pytest.raises(ValueError, match=r"no audio tower for model_type 'whispr'.*did you mean 'whisper'"):
        audio_tower_config({"model_type": "whispr"})
    with pytest.raises(ValueError, match="no audio tower for model_type 'clip_vision_model'"):
        audio_tower_config({"model_type": "clip_vision_model"})
    config = audio_tower_config({"model_type": "mimi", "hidden_size": 16, "num_filters": 4})
    with pytest.raises(ValueError, match="'mimi'"):
        audio_encoder_of(config).build(config)
    config = config_of("audio-spectrogram-transformer")
    with pytest.raises(
        ValueError, match="how sounds are prepared for a 'audio-spectrogram-transformer' is not"
    ):
        audio_encoder_of(config).hearing_of(config)
    with pytest.raises(ValueError, match="cannot hear a window of 100 frames"):
        audio_encoder_of(config).grid(config, (100,))


def test_of_a_larger_model_the_part_that_hears_is_found():
    clap = CONFIG_MAPPING["clap"](audio_config=TOWERS["clap_audio_model"])
    found = audio_tower_config(clap)
    assert (found.model_type, found.depths) == ("clap_audio_model", [1, 1, 1, 1])
    assert audio_tower_config(clap.to_dict()).to_dict() == found.to_dict()
    whole = CONFIG_MAPPING["qwen2_audio"](audio_config=TOWERS["qwen2_audio_encoder"])
    assert audio_tower_config(whole.to_dict()).model_type == "qwen2_audio_encoder"
    assert audio_tower_config({"model_type": "whisper", **WHISPER}).encoder_layers == BLOCKS
    ear = audio_tower_config({"model_type": "tinymodal_ear", "num_mel_bins": 40})
    assert audio_encoder_of(ear) is Ear
    assert ear.num_mel_bins == 40


@torch.no_grad()
def test_a_fused_clap_is_read_as_one_that_joins_nothing():
    """Its windows are never longer than 10 s, so the layers that join longer ones have no part in it."""
    torch.manual_seed(0)
    config = config_of("clap_audio_model", enable_fusion=True, fusion_type="aff_2d")
    theirs = ClapAudioModel(config).eval()
    tower = audio_encoder_of(config).build(config).eval()
    load_exactly(tower.module, {key: theirs.state_dict()[key] for key in tower.module.state_dict()})
    assert len(tower.module.state_dict()) < len(theirs.state_dict())
    assert tower.hearing_of(config).scale == "htk"
    values = windows("clap_audio_model", 10.0, items=2)
    # transformers wants four pictures of a sound and says of this one that it is short.
    four = values.transpose(1, 2)[:, None].expand(-1, 4, -1, -1)
    out = theirs(four, is_longer=torch.zeros(2, 1, dtype=torch.bool)).last_hidden_state
    close(tower(values).values, torch.cat(list(out.transpose(1, 3).unbind(2)), dim=-1))


# ---- the tower of our own

EAR: dict[str, Any] = {"num_mel_bins": 32, "channels": [16, 16], "num_hidden_layers": 2, "reach": 5}


def small_ear(layer: Any = -1) -> Ear:
    torch.manual_seed(0)
    return Ear.build(EarConfig(**EAR), layer).eval()


def test_the_ear_has_a_third_of_a_million_numbers_and_25_positions_a_second():
    ear = Ear.build(EarConfig())
    assert 0.28e6 < sum(p.numel() for p in ear.parameters()) < 0.36e6
    assert 16_000 / ear.stride(ear.config) == 25
    assert ear.grid(ear.config, (200,)) == (50,)


@torch.no_grad()
def test_the_ear_hears_a_word_alike_wherever_it_stands():
    """Positions are told by their neighbours alone: without blocks, features shift with the sound."""
    ear = small_ear(0)
    values = torch.randn(1, 32, 160)
    whole, later = ear(values).values, ear(values[:, :, 40:]).values
    close(whole[:, 20:30], later[:, 10:20])


def test_ears_that_cannot_be_are_refused():
    for said, values in {
        "reach must be odd": {"reach": 4},
        "one number for each stage": {"strides": [2]},
        "strides are 1, 2 or 3, got 4": {"strides": [4, 1]},
    }.items():
        with pytest.raises(ValueError, match=said):
            Ear.build(EarConfig(**EAR | values))


@pytest.mark.parametrize("name", ["whisper", "wavlm", "wav2vec2-conformer", "clap_audio_model"])
@torch.no_grad()
def test_towers_can_be_copied_and_sent(name):
    tower, values = build(name), windows(name, 0.6)
    close(copy.deepcopy(tower)(values).values, tower(values).values)
    if name != "wavlm":  # torch does not pickle weights in two factors
        close(pickle.loads(pickle.dumps(tower))(values).values, tower(values).values)


def test_the_table_names_families_that_this_transformers_has():
    assert set(AUDIO_ENCODERS) - {"tinymodal_ear"} <= set(CONFIG_MAPPING)


def test_the_page_on_towers_lists_those_that_hear():
    page = (
        (Path(__file__).parents[2] / "docs/towers.md")
        .read_text()
        .split("## Towers that hear")[1]
        .split("\n## ")[0]
    )
    rows = [line.split("|") for line in page.splitlines() if line.startswith("|") and "`" in line][1:]
    listed = {row[2].strip().strip("`"): row for row in rows}
    assert list(listed) == list(AUDIO_ENCODERS)
    for name, row in listed.items():
        config = EarConfig() if name == "tinymodal_ear" else CONFIG_MAPPING[name]()
        adapter = audio_encoder_of(config)
        hearing = adapter.hearing_of(config)
        assert float(row[4]) == hearing.rate_hz / adapter.stride(config)
        kinds = {"log-mel": "log_mel", "wave": "wave", "filter bank": "fbank", "decibels": "clap_mel"}
        assert kinds[row[3].strip()] == hearing.kind
        limited = adapter.max_window(config) is not None
        assert (row[5].strip() != "any") == limited
