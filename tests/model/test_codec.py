"""Codecs: transformers' own numbers, and a stream that is the whole sound."""

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from tinymodal.model.codec import Codec, open_codec
from tinymodal.model.hf_codec import EncodecCodec, pipe_of
from tinymodal.model.kmeans import kmeans, nearest
from tinymodal.model.small_codec import DEFAULTS, SmallCodec
from tinymodal.model.source_filter import Said, Voice, harmonics, white
from tinymodal.model.streams import Convolve, Line, Spread
from tinymodal.model.unit_vocoder import Generator, UnitCodec

TINY = {
    "encodec": {
        "target_bandwidths": [1.5, 3.0], "num_filters": 4, "hidden_size": 16, "codebook_size": 32,
        "codebook_dim": 16, "num_lstm_layers": 1,
    },
    "dac": {
        "encoder_hidden_size": 4, "decoder_hidden_size": 32, "n_codebooks": 4, "codebook_size": 32,
        "codebook_dim": 4, "hidden_size": 16,
    },
    # The window of its transformer is shorter than the sounds below, so that keys fall out of it.
    "mimi": {
        "num_filters": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "codebook_size": 32,
        "codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "num_quantizers": 4,
        "upsample_groups": 32, "sliding_window": 6,
    },
    "tinymodal_codec": {"encoder_stem": 16, "encoder_width": 16, "decoder_width": 16, "step_width": 16},
    "tinymodal_units": {
        "units": 20, "width": 16, "channels": 32,
        "tower": {
            "model_type": "hubert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "conv_dim": [8] * 7, "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        },
    },
}  # fmt: skip
BOTH = [*TINY, "unmerged units"]


@pytest.fixture(scope="module")
def codecs() -> dict[str, Codec]:
    torch.manual_seed(0)
    made = {name: open_codec({"model_type": name, **config}) for name, config in TINY.items()}
    made["unmerged units"] = open_codec(
        {"model_type": "tinymodal_units", **TINY["tinymodal_units"], "merge": False}
    )
    return made


def sound(codec: Codec, seconds: float = 0.5, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(round(seconds * codec.rate_hz), generator=draw)


def random_codes(codec: Codec, frames: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, codec.book_size, (codec.books, frames), generator=draw)


def streamed(codec: Codec, codes: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    stream = codec.stream()
    made = [stream.feed(piece) for piece in codes.split(pieces, 1)]
    return torch.cat([*made, stream.finish()])


def assert_same_sound(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    # Random weights are louder than full scale; 1e-5 of what they reach.
    loudest = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(found / loudest, wanted / loudest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_the_face_tells_rates_books_and_sizes(codecs, name):
    codec = codecs[name]
    wave = sound(codec, 1.0)
    codes = codec.encode(wave)
    assert codes.dtype == torch.int64
    assert codes.shape[0] == codec.books
    assert int(codes.min()) >= 0
    assert int(codes.max()) < codec.book_size
    if name != "tinymodal_units":  # whose equal neighbours are one
        # wav2vec's convolutions are not filled at the end: 400 samples for the first of its positions.
        assert math.ceil(codec.frames_per_s) - 2 <= codes.shape[1] <= math.ceil(codec.frames_per_s) + 1
    made = codec.decode(codes)
    assert made.dtype == torch.float32
    assert made.dim() == 1
    assert bool(made.isfinite().all())
    assert not codec.training
    assert not any(p.requires_grad for p in codec.parameters())


@pytest.mark.parametrize("books", [1, 3, 4])
def test_mimi_is_transformers_own_with_so_many_books(codecs, books):
    model = codecs["mimi"].model
    codec = type(codecs["mimi"])(model, books)
    wave = sound(codec, 0.7)
    with torch.no_grad():
        wanted = model.encode(wave[None, None], num_quantizers=books).audio_codes
        assert torch.equal(codec.encode(wave), wanted[0])
        torch.testing.assert_close(
            codec.decode(wanted[0]), model.decode(wanted).audio_values[0, 0], rtol=0, atol=0
        )


@pytest.mark.parametrize(("books", "bandwidth"), [(2, 1.5), (4, 1.5), (5, 3.0), (8, 3.0)])
def test_encodec_is_transformers_own_with_so_many_books(codecs, books, bandwidth):
    model = codecs["encodec"].model
    codec = EncodecCodec(model, books)
    assert codec.bandwidth == bandwidth
    wave = sound(codec, 0.7)
    with torch.no_grad():
        wanted = model.encode(wave[None, None], bandwidth=3.0, return_dict=True).audio_codes[:, :, :books]
        assert torch.equal(codec.encode(wave), wanted[0, 0])
        made = model.decode(wanted, [None], return_dict=True).audio_values[0, 0]
    torch.testing.assert_close(codec.decode(wanted[0, 0]), made, rtol=0, atol=0)


@pytest.mark.parametrize("books", [1, 4])
def test_dac_is_transformers_own_with_so_many_books(codecs, books):
    from transformers import DacFeatureExtractor

    model = codecs["dac"].model
    codec = type(codecs["dac"])(model, books)
    wave = sound(codec, 0.7)[:-17]
    prepare = DacFeatureExtractor(sampling_rate=codec.rate_hz, hop_length=model.config.hop_length)
    values = prepare(wave.numpy(), sampling_rate=codec.rate_hz, return_tensors="pt")["input_values"]
    with torch.no_grad():
        wanted = model.encode(values, n_quantizers=books, return_dict=True).audio_codes
        assert torch.equal(codec.encode(wave), wanted[0])
        made = model.decode(audio_codes=wanted, return_dict=True).audio_values[0]
    torch.testing.assert_close(codec.decode(wanted[0]), made, rtol=0, atol=0)


@pytest.mark.parametrize("name", BOTH)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_pieces_of_a_stream_joined_are_the_whole_sound(codecs, name, data):
    codec = codecs[name]
    frames = data.draw(st.integers(0, 24), label="frames")
    cuts = sorted(data.draw(st.lists(st.integers(0, frames), max_size=8), label="cuts"))
    codes = random_codes(codec, frames, data.draw(st.integers(0, 99), label="seed"))
    pieces = [b - a for a, b in zip([0, *cuts], [*cuts, frames], strict=True)]
    assert_same_sound(streamed(codec, codes, pieces), codec.decode(codes))


def test_a_long_sound_streams_as_exactly_as_a_short_one(codecs):
    """Phase is a sum over all that was spoken: rounding it would be heard after a while."""
    codec = codecs["tinymodal_codec"]
    codes = random_codes(codec, 1500)  # a minute
    assert_same_sound(streamed(codec, codes, [7] * 214 + [2]), codec.decode(codes))


@pytest.mark.parametrize("name", ["encodec", "dac", "mimi", "tinymodal_codec"])
def test_a_stream_does_not_wait_for_the_end(codecs, name):
    codec = codecs[name]
    stream, codes = codec.stream(), random_codes(codec, 40)
    heard = stream.feed(codes[:, :30])
    # DAC looks 10 frames ahead at these sizes, EnCodec needs a few to mirror, ours one and 20 ms.
    assert len(heard) >= 18 * codec.rate_hz / codec.frames_per_s
    assert torch.equal(heard, codec.decode(codes)[: len(heard)]) or torch.allclose(
        heard, codec.decode(codes)[: len(heard)], atol=1e-4
    )


def test_decoding_each_piece_alone_would_click(codecs):
    """What streams are for: the border is wrong by as much as the sound is loud."""
    codec = codecs["tinymodal_codec"]
    codes = random_codes(codec, 20)
    apart = torch.cat([codec.decode(piece) for piece in codes.split(10, 1)])
    assert float((apart - codec.decode(codes)).abs().max()) > 0.1


def test_a_finished_stream_takes_no_more(codecs):
    stream = codecs["tinymodal_codec"].stream()
    stream.finish()
    with pytest.raises(ValueError, match="is finished"):
        stream.feed(random_codes(codecs["tinymodal_codec"], 1))


@pytest.mark.parametrize("name", BOTH)
def test_of_no_frames_there_is_no_sound(codecs, name):
    codec = codecs[name]
    assert codec.decode(random_codes(codec, 0)).shape == (0,)
    assert codec.stream().finish().shape == (0,)


@pytest.mark.parametrize("name", BOTH)
def test_a_batch_is_its_sounds(codecs, name):
    codec = codecs[name]
    waves = torch.stack([sound(codec, 0.3, seed) for seed in range(2)])
    alone = [codec.encode(wave) for wave in waves]
    if len({codes.shape for codes in alone}) > 1:
        with pytest.raises(ValueError, match="one sound at a time"):
            codec.encode(waves)
    else:
        assert torch.equal(codec.encode(waves), torch.stack(alone))


@pytest.mark.parametrize("name", BOTH)
def test_a_saved_codec_is_the_same(codecs, name, tmp_path):
    codec = codecs[name]
    codec.save(tmp_path)
    again = open_codec(tmp_path)
    assert (again.rate_hz, again.frames_per_s, again.books, again.book_size) == (
        codec.rate_hz, codec.frames_per_s, codec.books, codec.book_size,
    )  # fmt: skip
    wave, codes = sound(codec, 0.3), random_codes(codec, 5)
    assert torch.equal(again.encode(wave), codec.encode(wave))
    assert torch.equal(again.decode(codes), codec.decode(codes))


def test_the_number_of_books_is_saved_with_a_codec_and_chosen_when_it_is_opened(codecs, tmp_path):
    type(codecs["mimi"])(codecs["mimi"].model, 2).save(tmp_path)
    assert open_codec(tmp_path).books == 2
    assert open_codec(tmp_path, books=3).books == 3
    codecs["tinymodal_codec"].save(tmp_path / "small")
    one = open_codec(tmp_path / "small", books=1)
    wave = sound(one)
    assert one.books == 1
    assert torch.equal(one.encode(wave), codecs["tinymodal_codec"].encode(wave)[:1])


def test_half_precision_weights_are_read_as_float32(codecs, tmp_path):
    from safetensors.torch import load_file, save_file

    codec = codecs["tinymodal_codec"]
    codec.save(tmp_path)
    half = {name: tensor.half() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(half, tmp_path / "model.safetensors")
    again = open_codec(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again.decode(random_codes(again, 4)).isfinite().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "sirup"}, "no codec is called 'sirup'"),
        ({"model_type": "tinymodal_codec", "book": 3}, "has no book"),
        ({"model_type": "encodec", "normalize": True, "chunk_length_s": 1.0}, "24 kHz"),
        ({"model_type": "tinymodal_units", "strides": [4], "kernels": [5]}, "kernel 0, 2, 4"),
        (
            {"model_type": "tinymodal_units", **TINY["tinymodal_units"], "strides": [5], "kernels": [11]},
            "a feature every 320",
        ),
    ],
)
def test_a_codec_that_cannot_be_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        open_codec(config)


@pytest.mark.parametrize("name", TINY)
def test_more_books_than_there_are_is_refused(name):
    with pytest.raises(ValueError, match="books = 99"):
        open_codec({"model_type": name, **TINY[name]}, books=99)


def test_a_folder_without_a_codec_or_without_its_weights_is_refused(codecs, tmp_path):
    with pytest.raises(ValueError, match="no codec can be read there"):
        open_codec(tmp_path)
    for name in ("tinymodal_codec", "mimi"):
        codecs[name].save(tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=name):
            open_codec(tmp_path / name)
    codecs["tinymodal_codec"].save(tmp_path / "other")
    config = {**DEFAULTS, **TINY["tinymodal_codec"], "step_width": 24}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not the weights of this codec"):
        open_codec(tmp_path / "other")


def test_sounds_and_codes_that_are_none_are_refused(codecs):
    codec = codecs["tinymodal_codec"]
    for wave in (torch.zeros(0), torch.zeros(1, 1, 5), torch.zeros(0, 5)):
        with pytest.raises(ValueError, match="reads \\[samples\\]"):
            codec.encode(wave)
    with pytest.raises(ValueError, match="finite"):
        codec.encode(torch.tensor([0.0, math.nan]))
    for codes in (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="int64 \\[2, frames\\]"):
            codec.decode(codes)
    for wrong in (-1, 256):
        with pytest.raises(ValueError, match="0 to 255"):
            codec.stream().feed(torch.full((2, 1), wrong))


@pytest.mark.parametrize("samples", [1, 639, 640, 641])
def test_the_small_codec_fills_a_sound_up_to_whole_frames(codecs, samples):
    codec = codecs["tinymodal_codec"]
    wave = sound(codec, 1.0)[:samples]
    codes = codec.encode(wave)
    assert codes.shape == (2, -(-samples // 640))
    assert torch.equal(codes, codec.encode(torch.cat([wave, torch.zeros(-samples % 640)])))
    assert codec.decode(codes).shape == (640 * codes.shape[1],)


def test_the_small_codec_ships_in_a_megabyte_and_a_half():
    assert sum(tensor.numel() for tensor in SmallCodec().state_dict().values()) <= 350_000


def test_pulses_are_the_sum_of_their_cosines():
    draw = torch.Generator().manual_seed(0)
    turns = torch.rand(500, generator=draw, dtype=torch.float64)
    turns[:3] = torch.tensor([0.0, 1e-9, 1 - 1e-9])
    count = 1 + 60 * torch.rand(500, generator=draw, dtype=torch.float64)
    k = torch.arange(1, 63, dtype=torch.float64)
    share = (count[:, None] - k + 1).clamp(0, 1)
    wanted = (share * torch.cos(2 * math.pi * k * turns[:, None])).sum(1)
    torch.testing.assert_close(harmonics(turns, count), wanted, rtol=0, atol=1e-8)


def test_noise_is_white_and_the_same_everywhere():
    noise = white(torch.arange(200_000))
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    for lag in (1, 2, 3, 160, 640):
        assert abs(float((noise[lag:] * noise[:-lag]).mean())) < 0.01

    def mixed(x: int) -> float:
        """splitmix64's finalizer in whole numbers of Python, of x times 2**64 over the golden ratio."""
        mask = 2**64 - 1
        x = x * 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        x ^= x >> 31
        return math.sqrt(3) * (x - 2**64 if x >= 2**63 else x) / 2**63

    assert white(torch.arange(5, 9)).tolist() == pytest.approx([mixed(n) for n in range(5, 9)], abs=1e-12)


def test_the_voice_gives_back_a_flat_spectrum_as_it_was():
    """Windows and their overlap add up to one: noise said to be equally loud everywhere is that noise."""
    voice = Voice(DEFAULTS)
    shape = (1, 50, DEFAULTS["bands"])
    made = voice(Said(torch.full(shape, -99.0), torch.zeros(shape), torch.full((1, 50), 100.0)))[0]
    # The source begins when the first step does, which is heard a hop later.
    wanted = white(torch.arange(50 * 160)).float()
    torch.testing.assert_close(made[480:-320], wanted[320:-480], rtol=0, atol=1e-3)


def test_the_pitch_of_a_tone_is_found_and_spoken():
    codec = SmallCodec()
    time = torch.arange(16_000) / 16_000
    for hz in (70.0, 110.0, 233.0, 460.0):
        wave = sum(torch.cos(2 * math.pi * k * hz * time) / k for k in range(1, 12))
        found, sure = codec.analysis.pitch(0.1 * wave[None])
        middle = found[0, 10:-10]
        assert float((middle / hz - 1).abs().max()) < 0.01
        assert float(sure[0, 10:-10].min()) > 0.8
        spoken = codec.voice.source(torch.full((1, 100), hz), torch.tensor([[hz]]), torch.zeros(1), 0)[0][:1]
        again, _ = codec.analysis.pitch(0.1 * spoken)
        assert float((again[0, 10:-10] / hz - 1).abs().max()) < 0.01


def test_a_glide_of_the_pitch_is_spoken_when_it_is_said():
    """The source runs a step ahead of what it is shaped by, so the pitch is taught that much earlier."""
    codec = SmallCodec()
    hz = 100 * 2 ** (torch.arange(100) / 100)[None]  # of the middle of each step
    shape = (1, 100, DEFAULTS["bands"])
    said = Said(torch.zeros(shape), torch.full(shape, -99.0), codec.voice.ends(hz))
    found, _ = codec.analysis.pitch(0.1 * codec.voice(said))
    cents = 1200 * (found / hz).log2()[0, 10:-10]
    # A step late would be 12 cents.
    assert abs(float(cents.mean())) < 2


def test_silence_noise_and_clipping_make_codes(codecs):
    for codec in codecs.values():
        for wave in (torch.zeros(8000), torch.ones(8000), 3 * torch.randn(8000).sign()):
            assert codec.decode(codec.encode(wave)).isfinite().all()


def test_hifi_gan_is_that_of_transformers():
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=12, upsample_initial_channel=16, upsample_rates=[5, 4], upsample_kernel_sizes=[11, 8],
        normalize_before=False,
    )  # fmt: skip
    wanted = SpeechT5HifiGan(config).eval()
    ours = Generator(
        12, 16, [5, 4], [11, 8], config.resblock_kernel_sizes, config.resblock_dilation_sizes[0],
        config.leaky_relu_slope,
    )  # fmt: skip
    weights = {name: tensor for name, tensor in wanted.state_dict().items() if name not in ("mean", "scale")}
    ours.load_state_dict(weights)
    x = torch.randn(2, 12, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), wanted(x.transpose(1, 2)), rtol=0, atol=1e-6)


def test_units_are_the_nearest_centres_of_the_towers_features(codecs):
    codec = codecs["tinymodal_units"]
    wave = sound(codec, 0.6)
    features = codec.features(wave)
    far = (features[:, None] - codec.centres[None]).square().sum(-1)
    units = codec.units(wave)
    assert torch.equal(units, far.argmin(1))
    merged = [int(units[0])] + [int(b) for a, b in pairwise(units.tolist()) if a != b]
    assert codec.encode(wave)[0].tolist() == merged


def test_how_the_tower_hears_may_be_said_and_is_saved(codecs, tmp_path):
    plain = codecs["tinymodal_units"]
    said = {**plain.hearing.to_dict(), "normalise": not plain.hearing.normalise}
    other = open_codec({"model_type": "tinymodal_units", **TINY["tinymodal_units"], "hearing": said})
    other.load_state_dict(plain.state_dict())
    other.save(tmp_path)
    assert open_codec(tmp_path).hearing == other.hearing != plain.hearing
    wave = sound(plain)
    assert not torch.equal(other.features(wave), plain.features(wave))


def test_centres_are_found_where_features_gather():
    draw = torch.Generator().manual_seed(3)
    true = 10 * torch.randn(6, 4, generator=draw)
    features = true.repeat_interleave(40, 0) + 0.1 * torch.randn(240, 4, generator=draw)
    found = kmeans(features, 6, seed=1)
    assert sorted(nearest(true, found).tolist()) == list(range(6))
    assert torch.equal(found, kmeans(features, 6, seed=1))
    with pytest.raises(ValueError, match="at least as many"):
        kmeans(features[:5], 6)


def test_fitted_units_say_more_of_a_sound_than_random_ones():
    torch.manual_seed(0)
    codec = open_codec({"model_type": "tinymodal_units", **TINY["tinymodal_units"]})
    assert isinstance(codec, UnitCodec)
    waves = [sound(codec, 1.0, seed) * (1 + seed) for seed in range(3)]
    features = torch.cat([codec.features(wave) for wave in waves])

    def left_over() -> float:
        return float((features - codec.centres[nearest(features, codec.centres)]).square().mean())

    before = left_over()
    codec.fit(waves, rounds=5)
    assert left_over() < before / 4


def test_a_vocoder_without_its_tower_speaks_and_says_what_it_cannot():
    config = {**TINY["tinymodal_units"], "tower": None}
    codec = open_codec({"model_type": "tinymodal_units", **config})
    assert codec.decode(random_codes(codec, 4)).numel()
    with pytest.raises(ValueError, match="without its tower"):
        codec.encode(torch.zeros(1600))


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.integers(1, 7),
    dilation=st.integers(1, 4),
    right=st.integers(0, 30),
    mode=st.sampled_from(["constant", "replicate", "reflect"]),
    length=st.integers(0, 40),
    cuts=st.lists(st.integers(0, 40), max_size=5),
)
@example(kernel=1, dilation=1, right=0, mode="replicate", length=1, cuts=[])
def test_a_convolution_in_pieces_is_the_convolution(kernel, dilation, right, mode, length, cuts):
    reach = (kernel - 1) * dilation
    right = right % (reach // 2 + 1)
    conv = nn.Conv1d(2, 3, kernel, dilation=dilation).requires_grad_(False)
    x = torch.randn(1, 2, length)
    pipe = Convolve(conv, reach - right, right, mode)
    cuts = sorted(min(cut, length) for cut in cuts)
    pieces = [pipe(x[..., a:b], False) for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
    made = torch.cat([*pieces, pipe(x[..., :0], True)], 2)
    assert made.shape[2] == length
    if length:
        from transformers.models.encodec.modeling_encodec import EncodecConv1d

        pad = "constant" if mode == "constant" else mode
        filled = EncodecConv1d._pad1d(x, (reach - right, right), pad)
        torch.testing.assert_close(made, conv(filled), rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    stride=st.integers(1, 5), longer=st.integers(0, 6), cut=st.integers(0, 3), length=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)  # fmt: skip
def test_a_transposed_convolution_in_pieces_is_the_whole(stride, longer, cut, length, cuts):
    cut = min(cut, longer)
    conv = nn.ConvTranspose1d(2, 3, stride + longer, stride, padding=cut).requires_grad_(False)
    x = torch.randn(1, 2, length)
    if (length - 1) * stride + stride + longer - 2 * cut < 1:
        return
    pipe = Spread(conv)
    cuts = sorted(min(at, length) for at in cuts)
    pieces = [pipe(x[..., a:b], False) for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
    made = torch.cat([*pieces, pipe(x[..., :0], True)], 2)
    torch.testing.assert_close(made, conv(x), rtol=0, atol=1e-6)


def test_a_layer_that_cannot_be_streamed_is_refused_by_name():
    with pytest.raises(ValueError, match="cannot stream a Dropout"):
        pipe_of(nn.Dropout())
    with pytest.raises(ValueError, match="cannot stream Conv1d"):
        Convolve(nn.Conv1d(1, 1, 3, stride=2), 2)
    with pytest.raises(ValueError, match="cannot stream ConvTranspose1d"):
        Spread(nn.ConvTranspose1d(1, 1, 4, 2, dilation=2))
    assert isinstance(Line([]), Line)
