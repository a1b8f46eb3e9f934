"""Augmentation is drawn by seed and draw number, does what it says, and is off unless asked."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.core.types import Audio, Image, Message, Sample, Text
from tinymodal.data.augment import Augment, SoundChange
from tinymodal.model.audio import Hearing

ALL = Augment(
    speed=(0.9, 1.1), gain_db=(-6, 6), noise_db=(10, 30),
    time_masks=2, time_mask_s=0.3, band_masks=2, band_mask=9,
)  # fmt: skip


def tone(seconds=1.0, rate_hz=16_000, pitch_hz=440.0):
    return 0.5 * torch.sin(2 * math.pi * pitch_hz * torch.arange(round(seconds * rate_hz)) / rate_hz)


def pitch_hz(wave, rate_hz=16_000):
    return torch.fft.rfft(wave).abs().argmax().item() * rate_hz / len(wave)


def level_db(wave):
    return 10 * math.log10(wave.square().mean().item())


def sample(sounds=2):
    parts = (Image(b"x"), *(Audio(tone(), 16_000) for _ in range(sounds)), Text("?"))
    return Sample((Message("user", parts), Message("assistant", (Text("y"),))), "rows:1")


def changes(given: Sample):
    return [part.change for part in given.media() if isinstance(part, Audio)]


# ---- drawing


def test_a_change_is_a_function_of_seed_draw_and_place():
    assert ALL.change(3, 10, 0) == ALL.change(3, 10, 0)
    drawn = {ALL.change(seed, draw, place) for seed in (3, 4) for draw in (10, 11) for place in (0, 1)}
    assert len(drawn) == 8
    assert pickle.loads(pickle.dumps(ALL.change(3, 10, 0))) == ALL.change(3, 10, 0)


@pytest.mark.parametrize("seed", [-1, -2, 2**63 + 1, 2**63 + 2, 2**64 - 1024])
def test_seeds_beyond_what_floating_point_holds_are_seeds_of_their_own(seed):
    others = [ALL.change(other, 2**40 + draw, 0) for other in (seed - 1, seed + 1, 0) for draw in (0, 1)]
    mine = [ALL.change(seed, 2**40 + draw, 0) for draw in (0, 1)]
    assert mine[0] != mine[1]
    assert not any(change in others for change in mine)


@settings(max_examples=50)
@given(st.integers(0, 2**63), st.integers(0, 2**40), st.integers(0, 100))
def test_what_is_drawn_lies_in_its_range(seed, draw, place):
    change = ALL.change(seed, draw, place)
    assert 0.9 <= change.speed <= 1.1
    assert -6 <= change.gain_db <= 6
    assert 10 <= change.noise_db <= 30
    assert all(0 <= seconds <= 0.3 and 0 <= at <= 1 for seconds, at in change.time_masks)
    assert all(0 <= bands <= 9 and 0 <= at <= 1 for bands, at in change.band_masks)


def test_the_draws_fill_their_range():
    speeds = [ALL.change(0, draw, 0).speed for draw in range(2_000)]
    assert abs(sum(speeds) / 2_000 - 1.0) < 0.005
    assert min(speeds) < 0.901
    assert max(speeds) > 1.099
    widths = {bands for draw in range(500) for bands, _ in ALL.change(0, draw, 0).band_masks}
    assert widths == set(range(10))


def test_asking_for_noise_as_well_draws_the_same_speed():
    assert Augment(speed=(0.9, 1.1)).change(0, 5, 0).speed == ALL.change(0, 5, 0).speed


def test_every_sound_of_a_sample_gets_its_own_change_and_nothing_else_is_touched():
    given = sample()
    changed = ALL(given, seed=1, draw=7)
    first, second = changes(changed)
    assert first == ALL.change(1, 7, 0)
    assert second == ALL.change(1, 7, 1)
    assert changes(given) == [None, None]
    assert changed.messages[1] == given.messages[1]
    assert [type(part) for part in changed.messages[0].parts] == [Image, Audio, Audio, Text]


def test_a_worse_answer_hears_the_same_and_a_change_that_is_there_stays():
    given = sample()
    pair = Sample(given.messages, "rows:1", rejected=given.messages)
    changed = ALL(pair, 1, 7)
    assert [p.change for p in changed.rejected[0].parts if isinstance(p, Audio)] == changes(changed)
    own = SoundChange(speed=2.0)
    kept = Sample((Message("user", (Audio(b"", change=own),)), given.messages[1]), "rows:2")
    assert changes(ALL(kept, 1, 7)) == [own]


def test_a_sample_without_a_sound_is_the_same_object():
    given = sample(sounds=0)
    assert ALL(given, 0, 0) is given


def test_nothing_asked_for_is_no_augmentation():
    assert Augment.of(None) is None
    assert Augment.of({}) is None
    assert Augment.of({"time_mask_s": 0.5}) is None
    assert Augment.of({"speed": (0.9, 1.1)}) == Augment(speed=(0.9, 1.1))


# ---- doing


@pytest.mark.parametrize("speed", [0.5, 0.9, 1.1, 2.0])
def test_speed_changes_length_and_pitch_alike(speed):
    changed = SoundChange(speed=speed).wave(tone(), 16_000)
    assert len(changed) == pytest.approx(16_000 / speed, abs=1)
    assert pitch_hz(changed) == pytest.approx(440 * speed, rel=0.01)


def test_gain_and_noise_are_as_loud_as_they_say():
    louder = SoundChange(gain_db=6.0).wave(tone(), 16_000)
    assert level_db(louder) - level_db(tone()) == pytest.approx(6.0, abs=0.01)
    noisy = SoundChange(noise_db=20.0, noise_seed=3).wave(tone(), 16_000)
    assert level_db(tone()) - level_db(noisy - tone()) == pytest.approx(20.0, abs=0.2)
    assert torch.equal(noisy, SoundChange(noise_db=20.0, noise_seed=3).wave(tone(), 16_000))
    assert not torch.equal(noisy, SoundChange(noise_db=20.0, noise_seed=4).wave(tone(), 16_000))


def test_masks_silence_stretches_and_bands():
    mel = torch.rand(80, 200) + 1
    change = SoundChange(time_masks=((0.3, 0.0), (0.2, 1.0)), band_masks=((8, 0.0),))
    masked = change.mel(mel, 100.0, -1.0)
    silenced = masked == -1.0
    assert silenced[:, :30].all()
    assert silenced[:, 180:].all()
    assert silenced[:8].all()
    assert not silenced[8:, 30:180].any()
    assert torch.equal(masked[8:, 30:180], mel[8:, 30:180])
    assert (mel >= 1).all()


def test_a_change_of_nothing_changes_nothing():
    wave = tone()
    assert SoundChange().wave(wave, 16_000) is wave
    assert SoundChange().mel(wave[None], 16_000.0, 0.0).data_ptr() == wave.data_ptr()


@pytest.mark.parametrize("kind", ["log_mel", "wave", "fbank", "clap_mel"])
def test_every_way_of_hearing_takes_every_change(kind):
    hearing = Hearing(
        kind, **({"window_s": 10.0, "step_s": 10.0} if kind == "clap_mel" else {"window_s": 2.0})
    )
    for seconds in (0.0001, 0.3, 4.1):
        wave = tone(seconds, hearing.rate_hz) if seconds > 0.001 else torch.ones(1)
        for draw in range(6):
            windows = hearing.prepare(wave, ALL.change(0, draw, 0))
            assert windows
            assert all(torch.isfinite(window).all() for window in windows)


def test_the_samples_and_the_silent_stay_as_they_were():
    wave = tone()
    before = wave.clone()
    change = ALL.change(0, 0, 0)
    Hearing("log_mel").prepare(wave, change)
    assert torch.equal(wave, before)
    assert not change.wave(torch.zeros(16_000), 16_000).any()
