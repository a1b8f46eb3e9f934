"""A sound is read rightly, or refused by name with the reason; only what is asked for is decoded."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.model import sound as reading
from tinymodal.model.sound import load_sound

MEDIA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "media"
FOLDERS = ("audio_formats", "audio_nasty", "speech12")

REFUSED = {
    "derived_trunc_half.wav": r"cut short, 1\.43 of 2\.87 s are there",
    "derived_zero_byte.wav": r"the file is empty \(0 bytes\)",
    "scipy_test-44100Hz-le-1ch-4bytes-early-eof-no-data.wav": "No 'data' chunk",
    "scipy_test-44100Hz-le-1ch-4bytes-incomplete-chunk.wav": "No 'data' chunk",
    "scipy_test-8000Hz-le-3ch-5S-36bit.wav": "unimplemented format",
    "scipy_test-8000Hz-le-3ch-5S-53bit.wav": "unimplemented format",
    "tinytag_106-invalid-streaminfo.flac": "unimplemented format",
    "tinytag_empty_file.flac": r"empty \(0 bytes\)",
    "tinytag_empty_file.ogg": r"empty \(0 bytes\)",
    "tinytag_invalid_file.flac": "Format not recognised",
    "tinytag_invalid_file.wav": "Format not recognised",
    "tinytag_invalid_second_streaminfo.flac": "not a sound that can be read",
    "tinytag_no_audio_data_compressed.wav": "not a sound that can be read",
    "tinytag_test.aiff": "holds no samples",
    "tinytag_test.opus": r"cut short, 0\.99 s are there",
}
"""Of the files in ``FOLDERS``; m4a has tests of its own."""

KINDS = {
    "WAV": "PCM_16",
    "FLAC": "PCM_24",
    "OGG": "VORBIS",
    "OPUS": "OPUS",
    "MP3": "MPEG_LAYER_III",
    "AIFF": "PCM_16",
    "AU": "PCM_16",
    "RF64": "PCM_16",
}


def tone(seconds: float = 1.0, rate_hz: int = 16_000, pitch_hz: float = 440.0) -> torch.Tensor:
    """A tone that grows louder, so that a shift shows."""
    t = torch.arange(round(seconds * rate_hz)) / rate_hz
    return (0.1 + 0.4 * t / seconds) * torch.sin(2 * torch.pi * pitch_hz * t)


def as_file(samples: torch.Tensor, kind: str = "WAV", rate_hz: int = 16_000, subtype: str = "") -> bytes:
    """A file of ``kind``; written in blocks, as libsndfile's Vorbis encoder overflows its stack otherwise."""
    file = io.BytesIO()
    values = samples.numpy().T if samples.ndim == 2 else samples.numpy()[:, None]
    with soundfile.SoundFile(
        file,
        "w",
        rate_hz,
        values.shape[1],
        format="OGG" if kind == "OPUS" else kind,
        subtype=subtype or KINDS[kind],
    ) as sound:
        for start in range(0, len(values), 4_000):
            sound.write(values[start : start + 4_000])
    return file.getvalue()


def given_files() -> Iterator[str]:
    if MEDIA.is_dir():
        for folder in FOLDERS:
            yield from sorted(f"{folder}/{path.name}" for path in (MEDIA / folder).iterdir())


# ---- files of others


@pytest.mark.skipif(not MEDIA.is_dir(), reason="no ../shared/data/media beside the repository")
@pytest.mark.parametrize("file", list(given_files()) or ["absent"])
def test_a_sound_from_the_wild_is_read_as_libsndfile_sees_it_or_refused_by_name(file):
    path = MEDIA / file
    if path.suffix == ".m4a":
        pytest.skip("read by PyAV, see below")
    if path.name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[path.name]) as caught:
            load_sound(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    seen = json.loads((MEDIA / "index.json").read_text())["files"][file]["soundfile"]
    read = load_sound(path, to_hz=seen["samplerate"])
    assert read.dtype == torch.float32
    assert read.shape == (seen["frames"],)
    assert torch.isfinite(read).all()
    if seen["channels"] == 1:
        # The index rounds to 7 places.
        assert torch.allclose(read[:8], torch.tensor(seen["first8"]), atol=1e-7)
        assert abs(read.square().mean().sqrt().item() - seen["rms"]) < 1e-6
    heard = load_sound(path)
    assert abs(len(heard) / 16_000 - seen["frames"] / seen["samplerate"]) < 0.0005


@pytest.mark.skipif(not MEDIA.is_dir(), reason="no ../shared/data/media beside the repository")
def test_junk_behind_the_samples_and_an_unknown_length_change_nothing():
    clean = load_sound(MEDIA / "speech12" / "spk1_snt1.wav")
    for nasty in ("derived_junk_tail.wav", "derived_data_size_ffffffff.wav"):
        assert torch.equal(load_sound(MEDIA / "audio_nasty" / nasty), clean)


@pytest.mark.skipif(not MEDIA.is_dir(), reason="no ../shared/data/media beside the repository")
def test_an_m4a_is_read_where_pyav_is_installed_and_named_where_it_is_not():
    path = MEDIA / "audio_nasty" / "pydub_format_test.m4a"
    if importlib.util.find_spec("av") is None:
        with pytest.raises(ValueError, match="read by PyAV, which is not installed; pip install av"):
            load_sound(path)
        return
    whole = load_sound(path)
    assert whole.abs().max() > 0.01
    part = load_sound(path, start_s=2.0, end_s=3.0)
    assert len(part) == 16_000
    # Apart from the resampler's edges it is the same second.
    assert torch.allclose(part[200:-200], whole[32_200:47_800], atol=1e-3)
    with pytest.raises(ValueError, match="broken or cut short"):
        load_sound(path.read_bytes()[:40_000])
    with pytest.raises(ValueError, match=r"start_s 100 is behind its end"):
        load_sound(path, start_s=100.0)


class Resampler:
    """PyAV's, which here has nothing to change."""

    def __init__(self, format):
        pass

    def resample(self, frame):
        return [frame]


@pytest.mark.parametrize("step", [0, 500, 1_000, -1_000])
def test_times_that_do_not_go_on_do_not_fill_the_memory(step):
    """A frame of a megabyte of silence takes ten bytes: a file may claim the same second for all of them."""

    class Frame:
        def __init__(self, number):
            self.pts, self.time_base = 3_000 + step * number, 1 / 16_000

        def to_ndarray(self):
            return np.full((1, 1_000), self.pts, np.float32)

    opened = SimpleNamespace(decode=lambda stream: map(Frame, range(400)))
    stream, av = SimpleNamespace(rate=16_000), SimpleNamespace(AudioResampler=Resampler)
    read = np.concatenate(list(reading._av_blocks(av, opened, stream, 2_000, 9_000)))[:, 0]
    assert len(read) == {0: 1_000, 500: 6_000, 1_000: 6_000, -1_000: 1_000}[step]
    assert set(read) <= set(range(3_000, 9_000, 500))


# ---- what is read


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "AIFF", "AU", "RF64"])
def test_a_lossless_file_gives_its_samples_from_path_bytes_and_under_any_name(kind, tmp_path):
    data = as_file(tone(), kind)
    for name in ("sound.raw", "sound.mp3", "sound"):
        (tmp_path / name).write_bytes(data)
        read = load_sound(tmp_path / name)
        # 16 bits hold steps of 2**-15.
        assert torch.allclose(read, tone(), atol=2**-15)
        assert torch.equal(load_sound(data), read)
        assert torch.equal(load_sound(str(tmp_path / name)), read)


@pytest.mark.parametrize("kind", ["OGG", "OPUS", "MP3"])
def test_a_lossy_file_gives_what_was_put_in_at_its_place(kind):
    read = load_sound(as_file(tone(), kind))
    assert len(read) == 16_000
    # A shift of one sample differs by 0.08.
    assert (read[2000:14_000] - tone()[2000:14_000]).abs().mean() < 0.02


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 44_100, 48_000, 96_000, 192_000])
def test_every_rate_becomes_the_asked_one(rate_hz):
    read = load_sound(as_file(tone(1.0, rate_hz), "WAV", rate_hz, "FLOAT"))
    assert len(read) == 16_000
    # The resampler rings where the tone breaks off.
    assert (read - tone())[400:-400].abs().max() < 1e-3


def test_resampling_in_blocks_is_resampling_at_once():
    noise = torch.randn(400_000, generator=torch.Generator().manual_seed(0)) * 0.1
    assert len(noise) > 3 * reading.BLOCK
    read = load_sound(as_file(noise, "WAV", 44_100, "FLOAT"), to_hz=16_000)
    assert torch.equal(read, torch.from_numpy(soxr.resample(noise.numpy(), 44_100, 16_000)))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_every_depth_has_full_scale_1(subtype):
    read = load_sound(as_file(tone(), "WAV", 16_000, subtype))
    assert (read - tone()).abs().max() < 0.02
    assert (read - tone()).abs().mean() < 0.01


def test_channels_are_mixed_to_their_mean():
    left, right = tone(pitch_hz=440), tone(pitch_hz=660)
    for channels in ([left], [left, right], [left, right, left * 0, right * 0, left, right]):
        samples = torch.stack(channels)
        expected = samples.mean(0)
        assert torch.allclose(load_sound(as_file(samples, "WAV", 16_000, "FLOAT")), expected, atol=1e-6)
        assert torch.allclose(load_sound(samples, rate_hz=16_000), expected, atol=1e-6)


def test_samples_in_memory_are_taken_as_they_are():
    assert torch.equal(load_sound(tone(), rate_hz=16_000), tone())
    assert torch.equal(load_sound(tone().numpy(), rate_hz=16_000), tone())
    assert torch.equal(load_sound(tone().double(), rate_hz=16_000), tone())
    given = tone()
    load_sound(given, rate_hz=16_000)[0] = 9.0
    assert given[0] == 0.0


def test_clipped_and_silent_sounds_and_those_above_full_scale_are_read():
    clipped = (tone() * 10).clamp(-1, 1)
    assert torch.allclose(load_sound(as_file(clipped)), clipped, atol=2**-14)
    assert load_sound(as_file(tone() * 0)).abs().max() == 0
    assert load_sound(as_file(tone() * 3, "WAV", 16_000, "FLOAT")).max() > 1.4


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 44_100, 192_000])
def test_one_sample_is_a_sound_at_every_rate(rate_hz):
    read = load_sound(as_file(torch.full((1,), 0.5), "WAV", rate_hz))
    assert 1 <= len(read) <= 2
    assert torch.isfinite(read).all()


# ---- what is refused


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"\0", "not a sound that can be read"),
        (b"RIFF\0\0\0\0WAVE", "not a sound that can be read"),
        (b"<html><body>404 Not Found</body></html>", "not a sound that can be read"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a sound that can be read"),
    ],
)
def test_what_is_no_sound_is_refused_in_one_line(data, told, tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"clip\.wav: .*{told}") as caught:
        load_sound(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.3, 0.5, 0.8])
def test_a_file_cut_short_is_refused(kind, part):
    data = as_file(tone(4.0), kind)
    with pytest.raises(ValueError, match="cut short"):
        load_sound(data[: round(part * len(data))])


def test_what_is_left_of_a_cut_file_is_read_if_asked_for():
    data = as_file(tone(4.0))[:80_000]
    assert torch.allclose(load_sound(data, end_s=2.0), tone(4.0)[:32_000], atol=2**-15)
    with pytest.raises(ValueError, match=r"cut short, 2\.50 of 4\.00 s are there"):
        load_sound(data, start_s=1.0, end_s=3.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_sample_that_is_no_number_is_refused_with_its_place(value):
    samples = tone()
    samples[8_000] = value
    for source in (samples, as_file(samples, "WAV", 16_000, "FLOAT")):
        with pytest.raises(ValueError, match=r"a sample is not a number \(0\.500 s after its beginning\)"):
            load_sound(source, rate_hz=16_000)
        assert len(load_sound(source, rate_hz=16_000, end_s=0.4)) == 6_400


def test_whole_numbers_are_refused_as_samples():
    sixteen = (tone() * 32_767).to(torch.int16)
    with pytest.raises(ValueError, match="samples are int16; expected floating point"):
        load_sound(sixteen, rate_hz=16_000)
    with pytest.raises(ValueError, match="full scale is 1; of whole numbers divide"):
        load_sound(sixteen.float(), rate_hz=16_000)


def test_samples_need_their_rate_and_one_or_two_dimensions():
    with pytest.raises(ValueError, match="do not say their rate; give rate_hz"):
        load_sound(tone())
    with pytest.raises(ValueError, match=r"\[1, 1, 16000\]; expected \[samples\]"):
        load_sound(tone()[None, None], rate_hz=16_000)
    with pytest.raises(ValueError, match="16,000 channels; expected 1 to 64"):
        load_sound(tone()[:, None], rate_hz=16_000)
    with pytest.raises(ValueError, match="holds no samples"):
        load_sound(torch.zeros(0), rate_hz=16_000)
    with pytest.raises(ValueError, match="500 Hz; expected a rate from 1,000 to 768,000 Hz"):
        load_sound(tone(), rate_hz=500)


def test_a_path_that_is_no_file_is_refused(tmp_path):
    for path, told in ((tmp_path / "no.wav", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(ValueError, match=told):
            load_sound(path)
    with pytest.raises(ValueError, match=r"no name of a file|does not exist"):
        load_sound("x" * 5_000)
    with pytest.raises(ValueError, match="got list"):
        load_sound([0.0, 1.0])


def test_a_sound_over_the_limit_is_refused_and_says_how_to_cut_it():
    data = as_file(tone(4.0))
    with pytest.raises(ValueError, match=r"4\.0 s long, the limit is 3 s; cut it with start_s and end_s"):
        load_sound(data, max_s=3.0)
    assert len(load_sound(data, max_s=3.0, end_s=3.0)) == 48_000
    assert len(load_sound(data, max_s=4.0)) == 64_000


# ---- stretches


@pytest.mark.parametrize("kind", KINDS)
def test_a_stretch_is_that_part_of_the_whole(kind):
    data = as_file(tone(4.0), kind)
    whole = load_sound(data)
    # The longest difference is MP3's: 1.5e-8.
    for start, end in ((0.0, 1.0), (1.3, 2.05), (3.5, 4.0)):
        part = load_sound(data, start_s=start, end_s=end)
        assert torch.allclose(part, whole[round(start * 16_000) : round(end * 16_000)], atol=1e-6)
    assert torch.allclose(load_sound(data, start_s=2.5), whole[40_000:], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_of_many_blocks_is_that_of_one_read(kind, monkeypatch):
    """Soundfile seeks after every read, and behind a seek libmpg123 is wrong by up to 0.2 for a while."""
    data = as_file(tone(4.0), kind)
    whole, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    monkeypatch.setattr(reading, "BLOCK", 5_000)
    assert torch.allclose(load_sound(data), torch.from_numpy(whole), atol=1e-6)
    assert torch.allclose(load_sound(data, start_s=2.2), torch.from_numpy(whole[35_200:]), atol=1e-6)


def test_what_lies_outside_the_stretch_is_not_decoded():
    """The flac is broken in its last quarter: whoever decodes that fails."""
    noise = torch.randn(160_000, generator=torch.Generator().manual_seed(1)) * 0.1
    data = bytearray(as_file(noise, "FLAC"))
    data[-len(data) // 4 :] = bytes(len(data) // 4)
    assert torch.allclose(load_sound(bytes(data), end_s=5.0), noise[:80_000], atol=1e-6)
    with pytest.raises(ValueError, match="broken or cut short"):
        load_sound(bytes(data))


@pytest.mark.parametrize(
    ("stretch", "told"),
    [
        ({"start_s": 1.5}, r"start_s 1\.5 is behind its end, 1\.000 s"),
        ({"end_s": 1.5}, r"end_s 1\.5 is behind its end, 1\.000 s"),
        ({"start_s": 0.5, "end_s": 0.5}, "not behind start_s"),
        ({"start_s": -1.0}, "expected seconds, 0 or more"),
        ({"end_s": float("nan")}, "expected seconds, 0 or more"),
        ({"start_s": 0.5, "end_s": 0.500001}, "there is no sample"),
    ],
)
def test_a_stretch_that_is_not_there_is_refused(stretch, told):
    with pytest.raises(ValueError, match=told):
        load_sound(as_file(tone()), **stretch)


def test_an_end_that_was_rounded_up_is_forgiven():
    assert len(load_sound(as_file(tone()), end_s=1.05)) == 16_000


# ---- headers that lie


def wav(data_bytes: int, rate_hz: int = 16_000, channels: int = 1, there: int = 3_200) -> bytes:
    """A wav of 16 bits whose header says what it likes."""
    width = 2 * channels
    form = struct.pack("<HHIIHH", 1, channels, rate_hz, (rate_hz * width) & 0xFFFFFFFF, width & 0xFFFF, 16)
    size = (data_bytes + 36) & 0xFFFFFFFF
    head = b"RIFF" + struct.pack("<I", size) + b"WAVEfmt " + struct.pack("<I", 16)
    return head + form + b"data" + struct.pack("<I", data_bytes) + bytes(there)


@pytest.mark.parametrize("size", [0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_wav_that_was_piped_does_not_know_its_length_and_is_read(size):
    assert len(load_sound(wav(size))) == 1_600


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"rate_hz": 2_000_000_000}, "2,000,000,000 Hz; expected a rate"),
        ({"rate_hz": 1}, "expected a rate"),
        ({"rate_hz": 0}, "not a sound|expected a rate"),
        ({"channels": 1_000}, "1,000 channels"),
        ({"channels": 0}, "not a sound"),
        ({"data_bytes": 0x70000000}, "cut short"),
    ],
)
def test_a_header_nobody_believes_is_refused_before_anything_is_decoded(header, told):
    with pytest.raises(ValueError, match=told):
        load_sound(wav(**{"data_bytes": 3_200, **header}))


def test_chunks_of_no_length_are_not_all_looked_at():
    class Counted(io.BytesIO):
        reads = 0

        def read(self, *size):
            self.reads += 1
            return super().read(*size)

    zeros = Counted(b"RIFF\xff\xff\xff\x7fWAVE" + bytes(400_000))
    assert reading._promised(zeros, 400_012) == 1.0
    assert zeros.reads < 10_000
    with pytest.raises(ValueError, match="not a sound that can be read"):
        load_sound(zeros.getvalue())


def test_a_flac_that_claims_a_month_is_refused_from_its_header():
    data = bytearray(as_file(tone(), "FLAC"))
    # Byte 21 of STREAMINFO's 34, which follow 8 bytes: the samples, 36 bits.
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4
    with pytest.raises(ValueError, match=r"s long, the limit is 600 s"):
        load_sound(bytes(data))
    with pytest.raises(ValueError, match="broken or cut short"):
        load_sound(bytes(data), end_s=30.0)
    assert torch.allclose(load_sound(bytes(data), end_s=0.5), tone()[:8_000], atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damage_anywhere_is_read_or_refused_and_never_anything_else(data):
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    file = bytearray(DAMAGED.setdefault(kind, as_file(tone(0.5), kind)))
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(0, min(len(file), 300) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = load_sound(bytes(file), max_s=30.0)
    except ValueError:
        return
    assert torch.isfinite(read).all()
    assert 1 <= len(read) <= 30 * 16_000 + 16


DAMAGED: dict[str, bytes] = {}


def test_reading_says_what_to_install_where_soundfile_is_missing(monkeypatch):
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(reading.importlib, "import_module", absent)
    with pytest.raises(
        ValueError, match="needs soundfile, which is not installed; pip install soundfile soxr"
    ):
        load_sound(as_file(tone()))
    with pytest.raises(ValueError, match="needs soxr"):
        load_sound(tone(), rate_hz=8_000)
    assert torch.equal(load_sound(tone(), rate_hz=16_000), tone())


def test_a_piece_of_numpy_that_cannot_be_written_is_read_without_a_warning():
    samples = tone().numpy()
    samples.flags.writeable = False
    with np.errstate(all="raise"):
        assert torch.equal(load_sound(samples, rate_hz=16_000), tone())
