import errno
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import time

import PIL.Image
import pytest

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.data import whole
from tinymodal.data.shard import _held, check_shards, shard
from tinymodal.data.sources import open_source
from tinymodal.data.synthetic import Scenes


def jpeg(n, kind="JPEG"):
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (n, 0, 0)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def rows(tmp_path):
    """30 chats: with one picture, with two, with the same one twice, without; the words of any script."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for n in range(30):
        (folder / f"{n}.jpeg").write_bytes(jpeg(n, "PNG" if n % 5 else "JPEG"))
        images = [[], [f"{n}.jpeg"], [f"{n}.jpeg", "0.jpeg"], [f"{n}.jpeg"] * 2][n % 4]
        asked = "".join("<image>\n" for _ in images) + f"Was ist das, {n}? 名 "
        turns = [("system", "Brief."), ("human", asked), ("gpt", f" A{n}\n"), ("human", "x"), ("gpt", "y")]
        row = {"image": images, "conversations": [{"from": f, "value": v} for f, v in turns[n % 2 :]]}
        lines.append(json.dumps(row | ({"id": n} if n % 3 else {})))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return open_source(folder / "rows.jsonl", "llava")


def told(sample):
    """A sample without its name, and with its pictures' bytes."""
    turns = []
    for message in sample.messages:
        parts = []
        for part in message.parts:
            if isinstance(part, Image):
                raw = part.source if isinstance(part.source, bytes) else part.source.read_bytes()
                parts.append((raw, part.targets, part.max_tiles, part.fit_pixels))
            else:
                parts.append(part.text)
        turns.append((message.role, parts, message.train))
    return turns, dict(sample.meta)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write(source, out, **settings):
    return shard(source, out, name="rows", shown=False, **settings)


def test_shards_read_as_the_samples_they_were_written_from(rows, tmp_path):
    done = write(rows, tmp_path / "out", max_mb=0.02)
    back = open_source(tmp_path / "out" / "*.tar", "messages")

    assert done.num_samples == len(back) == 30
    assert len(done.shards) == len(back.files) > 3
    assert [told(back.sample(n)) for n in range(30)] == [told(rows.sample(n)) for n in range(30)]
    assert back.row(7)["origin"] == rows.row_id(7)
    assert max(one.bytes for one in done.shards) <= 20_000
    assert done.num_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert check_shards(tmp_path / "out", shown=False) == []


def test_any_tar_tool_reads_them_and_a_picture_keeps_its_bytes_and_gets_its_ending(rows, tmp_path):
    write(rows, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        names = tar.getnames()
        assert names[:3] == ["000000000.json", "000000001.json", "000000001.png"]
        assert "000000002.0.png" in names  # of two
        assert "000000002.1.jpg" in names
        assert "000000003.png" in names  # one, shown twice
        assert tar.extractfile("000000001.png").read() == jpeg(1, "PNG")


def test_pairs_of_answers_are_kept_as_pairs(tmp_path):
    (tmp_path / "p.jpg").write_bytes(jpeg(1))
    row = {"image": "p.jpg", "question": "Q", "chosen": "good", "rejected": "bad"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    pairs = open_source(tmp_path / "rows.jsonl", "preference")
    write(pairs, tmp_path / "out")
    back = open_source(tmp_path / "out" / "*.tar", "preference").sample(0)
    (image,) = back.media()
    assert image.source == jpeg(1)
    assert [m.parts[-1].text for m in back.rejected] == ["Q", "bad"]
    assert told(back) == told(pairs.sample(0))


def test_made_samples_keep_pixels_targets_and_notes(tmp_path):
    made = Scenes(form="crowded", with_targets=True)
    write(made, tmp_path / "out", samples=5)
    back = open_source(tmp_path / "out" / "*.tar", "messages")
    assert len(back) == 5
    for n in range(5):
        there, here = back.sample(n), made.sample(n)
        assert there.meta == here.meta
        for one, other in zip(there.media(), here.media(), strict=True):
            assert one.targets == other.targets is not None
            assert PIL.Image.open(io.BytesIO(one.source)).tobytes() == other.source.tobytes()
    with pytest.raises(DataError, match="has no end; say how many"):
        write(made, tmp_path / "other")


@pytest.mark.parametrize("steps", [2**15, 2**20])
def test_sounds_keep_their_bytes_and_samples_in_memory_every_number(tmp_path, steps):
    """What fits into 16 bits becomes flac, the rest wav of single precision."""
    import torch

    from tinymodal.core.types import Audio, Speech
    from tinymodal.model.audio import load_sound

    random = torch.Generator().manual_seed(0)
    samples = torch.randint(-steps + 1, steps, (4_000,), generator=random) / steps
    (tmp_path / "clip.mp3").write_bytes(b"ID3 of somebody")
    heard = (
        Audio(tmp_path / "clip.mp3", start_s=0.5, end_s=2.0),
        Audio(samples, rate_hz=8_000),
        Audio(samples.reshape(2, 2_000), rate_hz=8_000),
        Audio(b"OggS"),
    )
    answer = (Text("Rain."), Speech(samples, 8_000, voice="anna"))
    given = Sample((Message("user", (*heard, Text("?"))), Message("assistant", answer)), "made/0")

    class One:
        def sample(self, index):
            return given

        def __len__(self):
            return 1

    write(One(), tmp_path / "shards")
    (back,) = (open_source(tmp_path / "shards" / "*.tar", "messages").sample(n) for n in range(1))
    sounds = [part for message in back.messages for part in message.parts if not isinstance(part, Text)]
    assert sounds[0] == Audio(b"ID3 of somebody", start_s=0.5, end_s=2.0)
    assert sounds[3] == Audio(b"OggS")
    assert sounds[4].voice == "anna"
    assert isinstance(sounds[4], Speech)
    for part in (sounds[1], sounds[4]):
        assert torch.equal(load_sound(part.source, to_hz=8_000), samples)
        assert part.source[:4] == (b"fLaC" if steps == 2**15 else b"RIFF")
    assert torch.equal(load_sound(sounds[2].source, to_hz=8_000), samples.reshape(2, 2_000).mean(0))
    with tarfile.open(tmp_path / "shards" / "00000.tar") as tar:
        names = tar.getnames()
    ending = "flac" if steps == 2**15 else "wav"
    # One sound, played and spoken, is kept once.
    assert [name.rpartition(".")[2] for name in names] == ["json", "mp3", ending, ending, "ogg"]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "I;16", "CMYK", "F"])
def test_a_decoded_picture_of_any_mode_comes_back_pixel_by_pixel(tmp_path, mode):
    picture = PIL.Image.new(mode, (3, 2), 1 if mode in "1PLI;16F" else tuple(range(len(mode))))

    class One:
        def sample(self, index):
            parts = (Image(picture, max_tiles=3, fit_pixels=(4, 900)),)
            return Sample((Message("user", parts), Message("assistant", (Text("A"),))), "one")

    write(One(), tmp_path / "out", samples=1)
    (image,) = open_source(tmp_path / "out" / "*.tar", "messages").sample(0).media()
    back = PIL.Image.open(io.BytesIO(image.source))
    assert (back.mode, back.tobytes()) == (mode, picture.tobytes())
    assert (image.max_tiles, image.fit_pixels) == (3, (4, 900))


@pytest.mark.parametrize(
    "turns",
    [
        (Message("user", (Text("Q"), Text(""))), Message("assistant", (Text("A"),))),
        (Message("user", (Text("Q"),)),),
        (Message("user", (Text("see <image>"),)), Message("assistant", (Text("A"),))),
    ],
)
def test_a_sample_that_would_come_back_as_another_is_a_bad_row(tmp_path, turns):
    class One:
        def sample(self, index):
            return Sample(turns, "one")

    with pytest.raises(DataError, match=r"one: .*a shard cannot hold"):
        write(One(), tmp_path / "out", samples=1)


def test_workers_and_interruptions_change_no_byte(rows, tmp_path, monkeypatch):
    write(rows, tmp_path / "plain", max_mb=0.02)
    write(rows, tmp_path / "workers", max_mb=0.02, workers=2)

    for n in (0, 9, 17, 29):  # stopped at this row, then again
        sample = type(rows).sample

        def stop(self, index, n=n, sample=sample):
            if index == n:
                raise KeyboardInterrupt
            return sample(self, index)

        with monkeypatch.context() as patch:
            patch.setattr(type(rows), "sample", stop)
            with pytest.raises(KeyboardInterrupt):
                write(rows, tmp_path / "stopped", max_mb=0.02)
        assert not [name for name in contents(tmp_path / "stopped") if name.endswith(whole.PART)]
    done = write(rows, tmp_path / "stopped", max_mb=0.02)

    assert 0 < done.num_kept < len(done.shards)
    assert contents(tmp_path / "plain") == contents(tmp_path / "workers") == contents(tmp_path / "stopped")
    again = write(rows, tmp_path / "stopped", max_mb=0.02)
    assert again.num_kept == len(again.shards)


def test_a_killed_run_leaves_whole_shards_only_and_is_gone_on_with(rows, tmp_path):
    write(rows, tmp_path / "plain", max_mb=0.02)
    out = tmp_path / "killed"
    for syncs in (1, 3, 4, 5, 6):  # index, folder; then shard, folder, index, folder for each
        code = (
            "import os, tinymodal.data.whole as w\n"
            "from tinymodal.data.shard import shard\n"
            "from tinymodal.data.sources import open_source\n"
            f"left = [{syncs}]\n"
            "def die(fd):\n"
            "    left[0] -= 1\n"
            "    if not left[0]: os._exit(9)\n"
            "w.os.fsync = die\n"
            f"rows = open_source({str(rows.files[0].path)!r}, 'llava')\n"
            f"shard(rows, {str(out)!r}, name='rows', max_mb=0.02)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 9, done.stderr
        for path in out.glob("*.tar"):
            assert path.read_bytes() == (tmp_path / "plain" / path.name).read_bytes()
    write(rows, out, max_mb=0.02)
    assert contents(out) == contents(tmp_path / "plain")


def test_a_full_disk_is_told_in_one_line_and_the_whole_shards_stay(rows, tmp_path, monkeypatch):
    write(rows, tmp_path / "plain", max_mb=0.02)
    real, left = os.fsync, [7]

    def full(fd):
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"No space left on device\); \d whole shards are there") as error:
            write(rows, tmp_path / "out", max_mb=0.02)
    assert "\n" not in str(error.value)
    there, plain = contents(tmp_path / "out"), contents(tmp_path / "plain")
    assert "00000.tar" in there
    assert all(plain[name] == raw for name, raw in there.items() if name != "index.json")
    write(rows, tmp_path / "out", max_mb=0.02)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_bad_rows_are_refused_or_left_out_and_listed(rows, tmp_path):
    for n in (0, 5, 6, 29):
        (rows.files[0].path.parent / f"{n}.jpeg").unlink()
    bad = []
    for n in range(30):
        try:
            rows.sample(n)
        except DataError as error:
            bad.append((rows.row_id(n), str(error)))
    with pytest.raises(DataError, match=r"rows.jsonl:3: picture"):  # shows 0.jpeg
        write(rows, tmp_path / "out")
    with pytest.raises(DataError, match=r"bad_rows allows 2"):
        write(rows, tmp_path / "out", bad_rows=2)
    done = write(rows, tmp_path / "out", bad_rows="skip", max_mb=0.02)

    assert list(done.skipped) == bad
    assert done.num_samples == 30 - len(bad)
    assert done.shards[-1].rows[1] == 30
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [tuple(one) for one in index["skipped"]] == bad
    assert write(rows, tmp_path / "out", bad_rows=len(bad), max_mb=0.02).skipped == done.skipped
    # The last shard is lost: what was skipped in it is skipped again, and listed once.
    (tmp_path / "out" / done.shards[-1].file).unlink()
    assert write(rows, tmp_path / "out", bad_rows="skip", max_mb=0.02) == done.__class__(
        done.folder, done.shards, done.skipped, len(done.shards) - 1
    )


def test_a_folder_of_something_else_is_not_written_over(rows, tmp_path):
    write(rows, tmp_path / "out", samples=4)
    with pytest.raises(DataError, match=r"shards of another call \(rows was 4, now 30\)"):
        write(rows, tmp_path / "out")
    rows.files[0].path.write_bytes(rows.files[0].path.read_bytes() + b"\n")
    with pytest.raises(DataError, match=r"shards of another call \(content was"):
        write(open_source(rows.files[0].path, "llava"), tmp_path / "out", samples=4)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds a.tar and no index.json"):
        write(rows, tmp_path / "foreign")
    (tmp_path / "foreign" / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"not an index of shards"):
        write(rows, tmp_path / "foreign")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: cannot be written"):
        write(rows, tmp_path / "file")


def _hold(out, held):
    with _held(out):
        held.set()
        time.sleep(60)


def test_two_runs_do_not_write_one_folder(rows, tmp_path):
    out, context = tmp_path / "out", multiprocessing.get_context("fork")
    out.mkdir()
    held = context.Event()
    other = context.Process(target=_hold, args=(out, held))
    other.start()
    assert held.wait(30)
    with pytest.raises(DataError, match="another process writes shards there"):
        write(rows, out, samples=1)
    other.kill()
    other.join()
    assert write(rows, out, samples=1).num_samples == 1  # the lock ended with the process


def test_a_flipped_bit_anywhere_is_told_and_no_other_sample_is_lost(rows, tmp_path):
    write(rows, tmp_path / "out")
    path = tmp_path / "out" / "00000.tar"
    raw, whole_rows = path.read_bytes(), [told(rows.sample(n)) for n in range(30)]
    for at in range(300, len(raw) - 1024, 4111):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        back, bad = open_source(path, "messages"), []
        for n in range(len(back)):
            try:
                assert told(back.sample(n)) in whole_rows
            except DataError as error:
                bad.append(str(error))
        assert all(line.startswith((f"{path}:0000", f"{path}:byte 0")) and "byte" in line for line in bad)
        padding = not raw[at] and len(back) == 30
        assert len(bad) <= 2
        assert bad or padding, at
        assert len(check_shards(tmp_path / "out", shown=False)) == 1


def test_checking_a_folder_names_what_is_missing_cut_or_other(rows, tmp_path):
    done = write(rows, tmp_path / "out", max_mb=0.02)
    first, second, third = (tmp_path / "out" / one.file for one in done.shards[:3])
    first.unlink()
    second.write_bytes(second.read_bytes()[:-512])
    third.write_bytes(b"x" + third.read_bytes()[1:])
    wrong = check_shards(tmp_path / "out", shown=False)
    assert [line.split(": ")[0] for line in wrong] == [str(first), str(second), str(third)]
    assert "cannot be read" in wrong[0]
    assert "written with" in wrong[1]
    assert "other bytes" in wrong[2]
    with pytest.raises(DataError, match=r"is .* a folder of shards"):
        check_shards(tmp_path)


def test_a_sample_larger_than_a_shard_has_one_of_its_own(rows, tmp_path):
    done = write(rows, tmp_path / "out", max_mb=0.0001, samples=4)
    assert [one.samples for one in done.shards] == [1, 1, 1, 1]
    for settings in ({"max_mb": 0}, {"samples": 0}):
        with pytest.raises(DataError, match=next(iter(settings))):
            write(rows, tmp_path / "out", **settings)
