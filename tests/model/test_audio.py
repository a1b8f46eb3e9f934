"""What the tower is given equals what transformers' own feature extractors make of the same samples."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    ClapFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from tinymodal.model.audio import Hearing

SECONDS = (0.3, 2.0, 2.87, 29.0, 61.0)

HEARINGS = {
    "log_mel": Hearing("log_mel"),
    "wave": Hearing("wave", normalise=True, window_s=20.0),
    "fbank": Hearing("fbank"),
    "clap_mel": Hearing("clap_mel", window_s=10.0, step_s=10.0),
}


def sound(seconds: float, rate_hz: int = 16_000) -> Tensor:
    """Something like speech: a buzz that comes and goes, and a little noise."""
    t = torch.arange(round(seconds * rate_hz)) / rate_hz
    buzz = sum(torch.sin(2 * math.pi * 120 * k * t) / k for k in range(1, 20))
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(0))
    return 0.1 * buzz * (torch.sin(2 * math.pi * 3 * t) > -0.3) + 0.003 * noise


def filled(wave: Tensor, hearing: Hearing) -> Tensor:
    return torch.nn.functional.pad(wave, (0, sum(hearing.windows(len(wave))) - len(wave)))


def end_to_end(windows: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(windows, dim=1)


# ---- parity


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("num_bands", [80, 128])
def test_log_mel_is_whispers_of_the_filled_sound(seconds, num_bands):
    """HF's with padding=False: 30 s of silence are not waited for."""
    hearing, wave = Hearing("log_mel", num_bands=num_bands), sound(seconds)
    theirs = WhisperFeatureExtractor(feature_size=num_bands)(
        filled(wave, hearing).numpy(), sampling_rate=16_000, padding=False, truncation=False
    )["input_features"][0]
    # Measured: 0.0.
    torch.testing.assert_close(
        end_to_end(hearing.prepare(wave)), torch.tensor(theirs), rtol=0, atol=1e-5, check_dtype=False
    )


@pytest.mark.parametrize("seconds", [0.3, 2.0, 29.0])
def test_log_mel_differs_from_whispers_padded_to_30_s_in_its_last_frame_only(seconds):
    wave = sound(seconds)
    ours = end_to_end(Hearing("log_mel").prepare(wave))
    theirs = torch.tensor(WhisperFeatureExtractor()(wave.numpy(), sampling_rate=16_000)["input_features"][0])
    torch.testing.assert_close(ours[:, :-1], theirs[:, : ours.shape[1] - 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("seconds", SECONDS)
def test_a_normalised_wave_is_wav2vec2s_with_silence_behind_it(seconds):
    wave = sound(seconds) + 0.1
    theirs = Wav2Vec2FeatureExtractor()(wave.numpy(), sampling_rate=16_000)["input_values"][0]
    ours = end_to_end(HEARINGS["wave"].prepare(wave))[0]
    # Measured: 7e-7 of values up to 5.
    torch.testing.assert_close(ours[: len(wave)], torch.tensor(theirs), rtol=0, atol=1e-5)
    assert not ours[len(wave) :].any()
    plain = end_to_end(Hearing("wave").prepare(wave))[0]
    assert torch.equal(plain[: len(wave)], wave)


@pytest.mark.parametrize("seconds", SECONDS)
def test_fbank_is_seamless_m4ts_with_its_mean_behind_it(seconds):
    wave = sound(seconds)
    theirs = SeamlessM4TFeatureExtractor()(wave.numpy(), sampling_rate=16_000)["input_features"][0]
    ours = end_to_end(HEARINGS["fbank"].prepare(wave)).T
    # Measured: 1e-6 of values up to 6.
    torch.testing.assert_close(ours[: len(theirs)], torch.tensor(theirs), rtol=0, atol=1e-5)
    # One frame in two may be real where theirs, which needs a pair, is cut.
    assert not ours[len(theirs) + 1 :].any()


@pytest.mark.parametrize("seconds", [0.3, 2.0, 4.9, 10.0])
@pytest.mark.parametrize("scale", ["slaney", "htk"])
def test_clap_mel_is_claps_of_a_sound_up_to_its_window(seconds, scale):
    """HF's htk scale is that of its fused checkpoints, and gives the one picture four times."""
    wave = sound(seconds, 48_000)
    hearing = Hearing("clap_mel", window_s=10.0, step_s=10.0, scale=scale)
    extractor = ClapFeatureExtractor(
        truncation="fusion" if scale == "htk" else "rand_trunc", frequency_min=50
    )
    theirs = torch.tensor(extractor(wave.numpy(), sampling_rate=48_000)["input_features"][0][0]).T
    (ours,) = hearing.prepare(wave)
    # Decibels from -100 to 30 in single precision: measured 8e-6.
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-5)


# ---- counting


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(sorted(HEARINGS)),
    st.integers(1, 900_000),
    st.floats(0.05, 30.0),
    st.floats(0.02, 2.0),
)
def test_what_is_counted_is_what_is_prepared(kind, num_samples, window_s, step_s):
    usual = HEARINGS[kind]
    try:
        hearing = Hearing(kind, normalise=usual.normalise, window_s=max(window_s, step_s), step_s=step_s)
    except ValueError as error:
        assert "shorter than a step" in str(error)  # noqa: PT017
        return
    num_samples = min(num_samples, 40 * hearing.window)
    sizes = hearing.windows(num_samples)
    assert all(size == hearing.window for size in sizes[:-1])
    assert num_samples <= sum(sizes) < num_samples + hearing.step
    prepared = hearing.prepare(torch.zeros(num_samples))
    assert [tuple(window.shape) for window in prepared] == [
        (hearing.bands, hearing.frames(size)) for size in sizes
    ]
    assert all(window.dtype == torch.float32 and window.is_contiguous() for window in prepared)


def test_two_seconds_cost_two_seconds():
    assert [w.shape for w in Hearing("log_mel").prepare(sound(2.0))] == [(80, 200)]
    assert [w.shape for w in Hearing("log_mel").prepare(sound(61.0))] == [(80, 3000), (80, 3000), (80, 100)]


# ---- behaviour


@pytest.mark.parametrize("kind", ["log_mel", "wave", "fbank"])
def test_windows_end_to_end_are_the_sound_prepared_as_one(kind):
    """Means and the loudest place are those of the whole sound, and frames reach over a cut."""
    wave = sound(7.3)
    whole = end_to_end(Hearing(kind).prepare(wave))
    cut = Hearing(kind, window_s=2.0).prepare(wave)
    assert len(cut) == 4
    assert torch.equal(end_to_end(cut), whole)


@pytest.mark.parametrize("kind", HEARINGS)
def test_silence_noise_one_sample_and_loudness_give_finite_numbers(kind):
    noise = torch.randn(32_000, generator=torch.Generator().manual_seed(2))
    for wave in (
        torch.zeros(32_000),
        noise,
        noise * 1e-6,
        torch.ones(1),
        torch.ones(399),
        torch.full((9_000,), 1e3),
    ):
        for window in HEARINGS[kind].prepare(wave):
            assert torch.isfinite(window).all()


def test_the_given_samples_are_not_changed():
    for hearing in HEARINGS.values():
        wave = sound(1.0)
        before = wave.clone()
        hearing.prepare(wave)
        assert torch.equal(wave, before)


@dataclass(frozen=True)
class Louder:
    """A change that can be recognised."""

    def wave(self, samples: Tensor, rate_hz: int) -> Tensor:
        return torch.cat([samples, samples])[: rate_hz * 3]

    def mel(self, mel: Tensor, frames_per_s: float, silence: float) -> Tensor:
        changed = mel.clone()
        changed[:, : round(frames_per_s)] = silence
        return changed


@pytest.mark.parametrize("kind", HEARINGS)
def test_a_change_meets_the_samples_first_and_then_what_is_prepared_of_them(kind):
    hearing = HEARINGS[kind]
    wave = sound(2.0, hearing.rate_hz)
    changed = hearing.prepare(wave, Louder())
    unmasked = hearing.prepare(Louder().wave(wave, hearing.rate_hz))
    assert [w.shape for w in changed] == [w.shape for w in unmasked]
    second = round(hearing.rate_hz / hearing.frame)
    assert len(changed[0][:, :second].unique()) == 1
    assert changed[0][0, 0] <= unmasked[0].max()
    assert torch.equal(changed[0][:, second:], unmasked[0][:, second:])


# ---- the value


def values(**changes: Any) -> dict[str, Any]:
    return {"kind": "log_mel", **changes}


@pytest.mark.parametrize("hearing", HEARINGS.values(), ids=list(HEARINGS))
def test_a_hearing_goes_through_json_and_back(hearing):
    assert Hearing.from_dict(json.loads(json.dumps(hearing.to_dict()))) == hearing


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (values(kind="mel"), "unknown kind of hearing 'mel'; known: log_mel, wave, fbank, clap_mel"),
        (values(scale="bark"), "unknown scale 'bark'"),
        (values(num_bands=-1), "num_bands must be a whole number above 0"),
        (values(hop=1.5), "hop must be a whole number above 0"),
        (values(normalise=True), "normalise is for kinds wave and fbank"),
        (values(high_hz=9_000.0), "do not lie between 0 and half the rate"),
        (values(step_s=40.0), "step_s must be above 0 and at most window_s"),
        (values(max_s=math.inf), "step_s must be above 0 and at most window_s"),
        (values(window_s=0.009, step_s=0.004), "shorter than a step of 0.01 s"),
        (values(pitch=3), r"unknown \['pitch'\]"),
    ],
)
def test_a_hearing_nobody_can_prepare_with_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        Hearing.from_dict(wrong)


def test_samples_of_another_shape_are_refused():
    for wrong in (torch.zeros(2, 100), torch.zeros(0)):
        with pytest.raises(ValueError, match="samples in one dimension"):
            Hearing("log_mel").prepare(wrong)
