"""Voices: nobody is in two splits, also not by another name; clips are whole; espeak-ng is asked safely."""

import json
import shutil
import stat

import numpy as np
import pytest

from tinymodal.core.errors import DataError
from tinymodal.data import voices
from tinymodal.data.voices import (
    RATE_HZ,
    SHIPPED,
    VARIANTS,
    Voice,
    clips,
    espeak,
    shipped,
    speak,
    split_of,
    trimmed,
)

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Puts a program of our own in espeak-ng's place: ``pretended("script")``."""

    def put(script):
        program = tmp_path / "espeak-ng"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(voices.shutil, "which", lambda name: str(program))
        voices.espeak.cache_clear()
        speak.cache_clear()
        return str(program)

    yield put
    voices.espeak.cache_clear()
    speak.cache_clear()


def test_no_variant_is_in_two_splits():
    everyone = [variant.lower() for variants in VARIANTS.values() for variant in variants]
    assert len(everyone) == len(set(everyone))
    assert split_of("f2") == "test"
    assert split_of("whisper") is None


def test_every_split_has_shipped_voices_and_no_variant_is_shipped_twice():
    index = shipped()
    assert len(index.of("train")) >= 10
    assert len(index.of("test")) >= 3
    assert len(index.of("val")) >= 1
    assert len(index.of("speak")) == len(VARIANTS["speak"])
    variants = [name.partition("+")[2] for name in index.voices]
    assert len(variants) == len(set(variants))
    assert sum(len(index.of(split)) for split in VARIANTS) == len(index.voices)


def test_the_shipped_clips_stay_within_three_megabytes():
    files = list(SHIPPED.iterdir())
    assert {file.stem for file in files if file.suffix == ".ogg"} == set(shipped().voices)
    assert sum(file.stat().st_size for file in files) <= 3_000_000


@pytest.mark.parametrize("split", VARIANTS)
def test_every_shipped_word_is_a_clip_of_sane_length_and_loudness(split):
    for name in shipped().of(split)[:2]:
        for word, wave in clips(name).items():
            assert 0.08 < len(wave) / RATE_HZ < 1.4, (name, word)
            assert 0.2 < np.abs(wave).max() < 1.0, (name, word)
            assert not wave.flags.writeable


def test_two_voices_say_the_same_words_differently():
    """Under one of its accents espeak-ng ignores variants: voices that were one would be in two splits."""
    said = [clips(name)["triangle"] for name in shipped().voices]
    for i, one in enumerate(said):
        for other in said[:i]:
            assert len(one) != len(other) or np.abs(one - other).max() > 0.05


def test_a_clip_is_cut_to_where_it_is_heard_and_made_as_loud_as_others():
    wave = np.zeros(8000, np.float32)
    wave[3000:5000] = 0.03
    cut = trimmed(wave)
    assert len(cut) == 2000 + 2 * 240
    assert cut.max() == pytest.approx(0.5)
    with pytest.raises(DataError, match="silence"):
        trimmed(np.zeros(100, np.float32))


@needs_espeak
def test_espeak_says_the_same_thing_again_and_another_voice_something_else():
    voice = Voice("en-us", "f2")
    once = speak("a red ring", voice)
    speak.cache_clear()
    assert np.array_equal(once, speak("a red ring", voice))
    assert 0.4 < len(once) / RATE_HZ < 2.0
    other = speak("a red ring", Voice("en-us", "m3"))
    assert len(other) != len(once) or not np.allclose(other, once)


@needs_espeak
def test_accents_under_which_variants_are_ignored_are_left_out():
    found = espeak()
    assert found is not None
    assert "en-gb" not in found.accents
    for accent in found.accents:
        heard = {speak("red", Voice(accent, variant)).tobytes() for variant in ("f2", "m3", "belinda")}
        assert len(heard) == 3, accent


@needs_espeak
def test_markup_is_never_handed_to_espeak():
    """[[...]] are phonemes to espeak-ng, <...> may be tags, and a dash first would be an option."""
    voice = Voice("en-us", "f2")
    assert np.array_equal(speak("[[red]] <ring>", voice), speak("red ring", voice))
    assert np.array_equal(speak("--version", voice), speak("version", voice)) or len(
        speak("--version", voice)
    )


@needs_espeak
def test_a_voice_that_espeak_does_not_have_is_refused_and_not_replaced():
    with pytest.raises(DataError, match=r"no voice 'en-us\+nobody'"):
        speak("red", Voice("en-us", "nobody"))
    with pytest.raises(DataError, match="no voice 'xx"):
        speak("red", Voice("xx", "f2"))


@needs_espeak
@pytest.mark.parametrize("text", ["", " ... ", "<>"])
def test_nothing_to_speak_is_told(text):
    with pytest.raises(DataError, match="nothing to speak"):
        speak(text, Voice("en-us", "f2"))


@pytest.mark.parametrize("script", ["exit 1", "echo nonsense", "printf '\\377\\376'", ""])
def test_a_broken_espeak_counts_as_none(pretended, script):
    pretended(script)
    assert espeak() is None
    with pytest.raises(DataError, match="espeak-ng is not installed"):
        speak("red", Voice("en-us", "f2"))


def test_an_espeak_that_stops_to_answer_is_told_by_name(pretended, monkeypatch):
    program = pretended("sleep 5")
    monkeypatch.setattr(voices, "TIMEOUT_S", 0.1)
    with pytest.raises(DataError, match="failed"):
        voices.heard("red", Voice("en-us", "f2"), program)


def test_an_espeak_that_says_nothing_is_told(pretended):
    program = pretended("printf RIFF")
    with pytest.raises(DataError, match="said nothing"):
        voices.heard("red", Voice("en-us", "f2"), program)


def test_without_espeak_there_is_none(monkeypatch):
    monkeypatch.setattr(voices.shutil, "which", lambda name: None)
    voices.espeak.cache_clear()
    assert espeak() is None
    voices.espeak.cache_clear()


def test_an_index_that_is_not_there_or_does_not_fit_is_refused(tmp_path):
    with pytest.raises(DataError, match="no index of voices"):
        shipped(tmp_path / "nowhere")
    (tmp_path / "index.json").write_text(json.dumps({"words": ["red", "ring"], "voices": {"en+f1": [0, 10]}}))
    with pytest.raises(DataError, match="2 places for 2 words"):
        shipped(tmp_path)


def test_a_voice_that_is_not_shipped_or_damaged_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no voice 'en-us\+nobody' is shipped"):
        clips("en-us+nobody")
    (tmp_path / "index.json").write_text(json.dumps({"words": ["red"], "voices": {"en+f1": [0, 10]}}))
    with pytest.raises(DataError, match="cannot be read"):
        clips("en+f1", tmp_path)
    (tmp_path / "en+f1.ogg").write_bytes(b"OggS nothing")
    with pytest.raises(DataError, match="cannot be read"):
        clips("en+f1", tmp_path)


@needs_espeak
@pytest.mark.slow
def test_voices_of_different_splits_are_far_apart():
    """Root mean square difference of log10 mel energies over a sentence; in ``train`` it goes down to 0."""
    import torch

    from tinymodal.eval.recogniser import HOP, WINDOW, mel_bands

    found = espeak()
    assert found is not None
    bands = mel_bands(40, WINDOW, RATE_HZ)
    features, members = [], []
    for split in VARIANTS:
        for variant in found.of(split):
            wave = speak(
                "yellow triangle, purple square, where is the digit?", Voice("en-us", variant, 50, 150)
            )
            spectrum = torch.stft(
                torch.tensor(wave), WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True
            )
            mel = (bands @ spectrum.abs() ** 2).clamp_min(1e-8).log10()
            mel = torch.nn.functional.interpolate((mel - mel.mean())[None], size=300, mode="linear")
            features.append(mel.flatten())
            members.append(split)
    far = torch.cdist(torch.stack(features), torch.stack(features)) / len(features[0]) ** 0.5
    for i, one in enumerate(members):
        for j, other in enumerate(members[:i]):
            if one != other:
                assert far[i, j] > 0.7
