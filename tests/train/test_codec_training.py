"""A codec learns, goes on where it was stopped, and is read again as it was."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tinymodal.core.errors import CheckpointError, DataError, RecipeError
from tinymodal.model.codec import open_codec
from tinymodal.model.small_codec import SmallCodec
from tinymodal.model.sound_shown import LogMel
from tinymodal.model.unit_vocoder import UnitCodec
from tinymodal.train.codec_lessons import CodecTraining, MovingBooks, SpectralLoss, UnitLesson, measure
from tinymodal.train.codec_training import SoundFolder, draw_clips, keep_notes, train_codec

CONFIG = {
    "encoder_stem": 16, "encoder_width": 16, "encoder_blocks": 1, "decoder_width": 16, "decoder_blocks": 1,
    "step_width": 16, "step_blocks": 1, "book_size": 16, "book_width": 8,
}  # fmt: skip


class Tones:
    """Harmonic tones that glide, each from a pitch of its own, loud and quiet in turn."""

    def __init__(self, num: int = 12) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Tensor:
        time = torch.arange(12_000) / 16_000
        hz = 90 + 17 * index + 40 * time
        turns = (hz / 16_000).double().cumsum(0)
        tone = sum(torch.cos(2 * torch.pi * k * turns) / (1 + abs(k - 3 - index % 4)) for k in range(1, 9))
        return (0.05 * tone * (1 + torch.sin(2 * torch.pi * 3 * time))).float()


def training(**changes: object) -> CodecTraining:
    given = {"steps": 6, "clips": 4, "clip_s": 0.48, "warmup": 2, "save_every": 3, "note_every": 1, "fit": 12}
    return CodecTraining(**{**given, **changes})  # type: ignore[arg-type]


def notes(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_some_steps_lower_the_loss_and_the_folder_is_a_codec(tmp_path):
    codec = train_codec(CONFIG, Tones(), tmp_path, training(steps=40, rate=4e-3, fit=1), Tones(3))
    losses = [line["loss"] for line in notes(tmp_path)]
    assert len(losses) == 40
    # Begun from one of the twelve sounds: 2.2 at first, 1.7 at the end.
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    again = open_codec(tmp_path / "codec")
    wave = Tones()[2]
    codes = again.encode(wave)
    assert torch.equal(codes, codec.encode(wave))
    assert torch.equal(again.decode(codes), codec.decode(codes))
    assert set(json.loads((tmp_path / "held_out.json").read_text())) == {"1", "2"}
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["training"]["steps"] == 40
    assert run["starts"][0]["step"] == 0


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    wanted = train_codec(CONFIG, Tones(), tmp_path / "whole", training())

    class Stops(Tones):
        """Reads so many sounds and no more."""

        def __init__(self, left: int) -> None:
            super().__init__()
            self.left = left

        def __getitem__(self, index: int) -> Tensor:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        train_codec(CONFIG, Stops(12 + 4 * 5), tmp_path / "parts", training())
    assert [line["step"] for line in notes(tmp_path / "parts")] == [1, 2, 3, 4, 5]
    assert not (tmp_path / "parts" / "codec").exists()
    found = train_codec(CONFIG, Tones(), tmp_path / "parts", training())
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert notes(tmp_path / "parts") == notes(tmp_path / "whole")
    starts = json.loads((tmp_path / "parts" / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 3]


def tiny_units(**changes: object) -> UnitCodec:
    torch.manual_seed(0)
    tower = {
        "model_type": "hubert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "conv_dim": [8] * 7, "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
    }  # fmt: skip
    config = {"units": 12, "width": 16, "channels": 32, "block_kernels": [3], "tower": tower}
    return UnitCodec({**config, **changes})


@pytest.mark.parametrize("merge", [True, False])
def test_a_unit_vocoder_learns_to_speak_its_towers_units(tmp_path, merge):
    codec = tiny_units(merge=merge)
    tower = {name: tensor.clone() for name, tensor in codec.tower.state_dict().items()}
    train_codec(codec, Tones(), tmp_path, training(steps=16, clips=3, rate=8e-3), Tones(2))
    losses = [line["loss"] for line in notes(tmp_path)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert ("duration" in notes(tmp_path)[0]) == merge
    again = open_codec(tmp_path / "codec")
    assert all(torch.equal(again.tower.state_dict()[name], tensor) for name, tensor in tower.items())
    codes = codec.encode(Tones()[1])
    assert torch.equal(again.encode(Tones()[1]), codes)
    assert torch.equal(again.decode(codes), codec.decode(codes))
    assert json.loads((tmp_path / "held_out.json").read_text())["mel_db"] > 0


def test_a_unit_vocoder_that_was_stopped_goes_on(tmp_path):
    wanted = train_codec(tiny_units(), Tones(), tmp_path / "whole", training(steps=4, save_every=2))
    (tmp_path / "parts").mkdir()
    short = training(steps=4, save_every=2)

    class Stops(Tones):
        num_read = 0

        def __getitem__(self, index: int) -> Tensor:
            Stops.num_read += 1
            if Stops.num_read == 12 + 4 * 3 + 1:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        train_codec(tiny_units(), Stops(), tmp_path / "parts", short)
    found = train_codec(tiny_units(), Tones(), tmp_path / "parts", short)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_durations_are_taught_without_the_units_that_the_clip_cuts():
    codec = tiny_units()
    lesson = UnitLesson(codec, training())
    units = torch.tensor([3, 3, 5, 5, 5, 5, 2, 2, 2])
    said = codec.durations(codec.embed(torch.tensor([3, 5, 2]))[None].transpose(1, 2))[0, 1]
    wanted = (said - torch.tensor(5.0).log()) ** 2
    torch.testing.assert_close(lesson._duration(units), wanted)
    assert lesson._duration(units[:5]).item() == 0


def test_a_vocoder_without_a_tower_cannot_learn():
    with pytest.raises(ValueError, match="has no tower"):
        UnitLesson(UnitCodec({"width": 8, "channels": 32}), training())


def test_a_finished_run_is_only_saved_again(tmp_path):
    once = train_codec(CONFIG, Tones(), tmp_path, training(steps=2, save_every=1))
    again = train_codec(CONFIG, Tones(), tmp_path, training(steps=2, save_every=1))
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters(), strict=True))


def test_another_seed_learns_otherwise(tmp_path):
    one, two = (train_codec(CONFIG, Tones(), tmp_path / str(n), training(steps=2, seed=n)) for n in range(2))
    assert not torch.equal(one.encoder.stem.weight, two.encoder.stem.weight)


def test_a_run_of_other_settings_is_refused(tmp_path):
    train_codec(CONFIG, Tones(), tmp_path, training(steps=1, save_every=1))
    with pytest.raises(CheckpointError, match="begun with other settings"):
        train_codec(CONFIG, Tones(), tmp_path, training(steps=2, save_every=1))
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="remove it to begin again"):
        train_codec(CONFIG, Tones(), tmp_path, training(steps=1, save_every=1))


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(RecipeError, match="steps must be above 0"):
        training(steps=0)
    with pytest.raises(RecipeError, match="fewer_books"):
        training(fewer_books=1.5)


def test_a_fitted_codec_speaks_before_it_is_trained():
    """Principal components and k-means alone: half the distance of a codec of random weights, and less."""
    torch.manual_seed(0)
    codec = SmallCodec(CONFIG).eval().requires_grad_(False)
    sounds = Tones()
    before = measure(codec, sounds).mel_db
    codec.fit([sounds[n] for n in range(12)])
    fitted = measure(codec, sounds).mel_db
    assert fitted < 0.5 * before
    codec.books = 1
    assert fitted < measure(codec, sounds).mel_db < before


def test_one_frame_more_than_a_book_has_codes_is_asked_for():
    with pytest.raises(ValueError, match="at least as many vectors"):
        SmallCodec(CONFIG).fit([torch.zeros(640)])


def test_codes_that_nobody_uses_begin_again_as_vectors_of_the_batch():
    vectors = torch.zeros(1, 4, 2)
    vectors[0, 1:] = 1000.0
    books = MovingBooks(vectors, decay=0.5)
    batch = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]])
    for step in range(12):
        codes = books.update(batch, torch.Generator().manual_seed(step))
    assert codes.shape == (1, 1, 4)
    assert float(vectors.abs().max()) < 5
    assert codes.unique().numel() > 1


def test_moving_books_go_to_the_middle_of_what_is_nearest():
    vectors = torch.tensor([[[-1.0], [1.0]]])
    books = MovingBooks(vectors, decay=0.9)
    batch = torch.tensor([[[-3.0, -5.0, 2.0, 4.0, 6.0]]])
    for step in range(200):
        codes = books.update(batch, torch.Generator().manual_seed(step))
    torch.testing.assert_close(vectors, torch.tensor([[[-4.0], [4.0]]]), rtol=0, atol=1e-3)
    assert codes.tolist() == [[[0, 0, 1, 1, 1]]]


def test_the_loss_is_zero_for_the_sound_itself_and_deaf_to_phase():
    loss = SpectralLoss(16_000, 20)
    wave = torch.stack([Tones()[n] for n in range(2)])
    spectra, mel = loss(wave, wave)
    assert float(spectra) == 0
    assert float(mel) == 0
    turned = loss(-wave, wave)
    other = loss(wave.roll(1, 0), wave)
    assert float(turned[0]) < 1e-3 < 0.3 < float(other[0])
    assert float(turned[1]) < 1e-4 < 0.03 < float(other[1])
    silent = torch.zeros(1, 4000, requires_grad=True)
    sum(loss(silent, torch.zeros(1, 4000) + 1e-3)).backward()
    assert silent.grad is not None
    assert bool(silent.grad.isfinite().all())


def test_the_mel_of_the_loss_is_that_of_the_measure():
    """10 dB more is 0.25 more in a log-mel: what ``mel_db`` reckons with."""
    mel = LogMel(80, 16_000, 512, 128)
    tone = torch.randn(1, 12_800, generator=torch.Generator().manual_seed(0))
    louder = mel(10**0.5 * tone) - mel(tone)
    torch.testing.assert_close(louder, torch.full_like(louder, 0.25), rtol=0, atol=1e-4)


def test_clips_are_cut_and_short_sounds_filled():
    class Ramps:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Tensor:
            return torch.arange(1.0, 101.0 if index else 11.0)

    clips = draw_clips(Ramps(), 40, 20, torch.Generator().manual_seed(0))
    assert clips.shape == (40, 20)
    cut = [clip for clip in clips if bool((clip > 0).all())]
    filled = [clip for clip in clips if not bool((clip > 0).all())]
    assert cut
    assert filled
    assert all(torch.equal(clip - clip[0], torch.arange(20.0)) for clip in cut)
    assert all(clip[clip > 0].tolist() == list(range(1, 11)) for clip in filled)
    assert len({float(clip[0]) for clip in cut}) > 3
    assert len({int((clip > 0).int().argmax()) for clip in filled}) > 3


def test_a_folder_of_sounds_is_read_in_the_order_of_names(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    for n, name in enumerate(("b.wav", "a.flac", "c.txt")):
        if name.endswith("txt"):
            (tmp_path / name).write_text("no sound")
        else:
            soundfile.write(tmp_path / name, torch.full((800,), 0.1 + 0.1 * n).numpy(), 8000)
    sounds = SoundFolder(tmp_path, 16_000)
    assert [path.name for path in sounds.files] == ["a.flac", "b.wav"]
    assert sounds[0].shape == (1600,)
    assert abs(float(sounds[0][800]) - 0.2) < 0.01
    (tmp_path / "a.flac").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.flac"):
        sounds[0]
    with pytest.raises(DataError, match="no sound is in there"):
        SoundFolder(tmp_path / "none", 16_000)


def test_notes_behind_the_checkpoint_and_half_a_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_notes(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    keep_notes(tmp_path / "none", 2)
