"""Codes of spoken answers: those of the codec, kept once, whatever happens to the files."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.core.types import Encoded, SpeechItem
from tinymodal.data.codes import CodeBook, codec_name, pack, unpack
from tinymodal.data.pack import Row
from tinymodal.model.codec import Codec, open_codec

CONFIG = {
    "model_type": "tinymodal_codec", "encoder_stem": 8, "encoder_width": 8, "decoder_width": 8,
    "step_width": 8,
}  # fmt: skip


def tiny(seed: int = 0, **changes: object) -> Codec:
    torch.manual_seed(seed)
    return open_codec({**CONFIG, **changes})


@pytest.fixture(scope="module")
def codec() -> Codec:
    return tiny()


def wave(seed: int, samples: int = 4000) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def spoken(*waves: torch.Tensor | None, name: str = "row 1") -> Encoded:
    ids = torch.arange(4 * len(waves) + 1)
    speech = tuple(SpeechItem(1 + 4 * n, 5 + 4 * n, each) for n, each in enumerate(waves))
    return Encoded(ids, ids, (), name, speech=speech)


def rows(*samples: Encoded) -> list[Row]:
    """One sample a row."""
    made = []
    for n, sample in enumerate(samples):
        row = Row()
        row.append(sample, n)
        made.append(row)
    return made


def test_a_wave_goes_in_and_its_codes_come_out(codec, tmp_path):
    book = CodeBook(tmp_path, codec)
    silent = spoken()
    given_codes = replace(
        spoken(None), speech=(SpeechItem(1, 5, None, torch.zeros(2, 3, dtype=torch.int64)),)
    )
    done = book.complete(rows(spoken(wave(0), wave(1)), silent, given_codes))
    first = done[0].samples[0].speech
    assert [item.wave for item in first] == [None, None]
    for n, item in enumerate(first):
        assert torch.equal(item.codes, codec.encode(wave(n)))
        assert (item.first, item.last, item.key) == (1 + 4 * n, 5 + 4 * n, book.key(wave(n)))
    assert done[1].samples[0] is silent
    assert done[2].samples[0] is given_codes
    assert [row.indices for row in done] == [[0], [1], [2]]
    assert done[0].tokens == 9


def test_codes_are_made_once(codec, tmp_path):
    book = CodeBook(tmp_path, codec)
    first = book.complete(rows(spoken(wave(0)), spoken(wave(1)), spoken(wave(0))))
    assert (book.num_new, book.num_hits) == (2, 1)
    again = CodeBook(tmp_path, tiny())  # another process with the same weights
    second = again.complete(rows(spoken(wave(0)), spoken(wave(1)), spoken(wave(0))))
    assert (again.num_new, again.num_hits) == (0, 3)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.samples[0].speech[0].codes, other.samples[0].speech[0].codes)


def test_without_a_folder_nothing_is_kept_and_the_codes_are_the_same(codec, tmp_path):
    book = CodeBook(None, codec)
    assert torch.equal(book.codes(wave(0)), CodeBook(tmp_path, codec).codes(wave(0)))
    assert book.num_new == 1
    with pytest.raises(ValueError, match="kept nowhere"):
        book.path("00")


def test_codes_do_not_depend_on_the_neighbours(codec, tmp_path):
    alone = CodeBook(tmp_path / "one", codec).codes(wave(3))
    beside = CodeBook(tmp_path / "two", codec).complete(rows(spoken(wave(1, 9000), wave(3), wave(2, 100))))
    assert torch.equal(beside[0].samples[0].speech[1].codes, alone)


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"look_ahead": 2}, {"min_hz": 70.0}, {"books": 1}],
    ids=lambda each: next(iter(each)),
)
def test_no_codes_of_another_codec_are_found(codec, tmp_path, other):
    CodeBook(tmp_path, codec).codes(wave(0))
    changed = tiny(**other)
    book = CodeBook(tmp_path, changed)
    assert torch.equal(book.codes(wave(0)), changed.encode(wave(0)))
    assert book.num_new == 1


def test_one_book_of_the_same_codec_has_keys_of_its_own(codec):
    one = tiny()
    one.books = 1
    assert codec_name(one) != codec_name(codec) == codec_name(tiny())


def test_one_changed_sample_is_another_sound(codec, tmp_path):
    book = CodeBook(tmp_path, codec)
    changed = wave(0).clone()
    changed[7] += 1e-7
    assert book.key(changed) != book.key(wave(0))
    assert book.key(torch.zeros(5)) != book.key(torch.zeros(6))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "longer", "foreign"])
def test_a_broken_file_is_made_anew(codec, tmp_path, damage):
    book = CodeBook(tmp_path, codec)
    wanted = book.codes(wave(0))
    path = book.path(book.key(wave(0)))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    book.codes(wave(1))
    foreign = book.path(book.key(wave(1))).read_bytes()
    path.write_bytes(
        {
            "cut": whole[:-2],
            "flip": bytes(flipped),
            "empty": b"",
            "longer": whole + b"00",
            "foreign": foreign,
        }[damage]
    )
    again = CodeBook(tmp_path, codec)
    assert torch.equal(again.codes(wave(0)), wanted)
    assert (again.num_broken, again.num_new) == (1, 1)
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_time_only(codec, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    book = CodeBook(tmp_path / "file" / "codes", codec)
    assert torch.equal(book.codes(wave(0)), codec.encode(wave(0)))
    book.codes(wave(1))
    said = "".join(capsys.readouterr())
    assert said.count("cannot be written") == 1
    assert not book.writing


def test_a_sound_that_cannot_become_codes_is_named(codec, tmp_path):
    book = CodeBook(tmp_path, codec)
    with pytest.raises(DataError, match=r"row 7: a spoken answer cannot become codes: .*finite"):
        book.complete(rows(spoken(torch.tensor([0.0, float("nan")]), name="row 7")))
    with pytest.raises(DataError, match="row 8: a spoken answer without a sound"):
        book.complete(rows(spoken(None, name="row 8")))


def test_a_codec_that_trains_is_refused(codec):
    trains = tiny().requires_grad_(True)
    with pytest.raises(ValueError, match="frozen and in eval mode"):
        CodeBook(None, trains)
    with pytest.raises(ValueError, match="frozen and in eval mode"):
        CodeBook(None, tiny().train())


@settings(deadline=None)
@given(
    books=st.integers(0, 9),
    frames=st.integers(0, 20),
    most=st.sampled_from([1, 255, 2**16 - 1, 2**16, 2**31]),
)
def test_what_was_packed_is_unpacked(books, frames, most):
    draw = torch.Generator().manual_seed(frames)
    codes = torch.randint(0, most + 1, (books, frames), generator=draw)
    key = "0f" * 32
    assert torch.equal(unpack(pack(key, codes), key), codes)
    with pytest.raises(ValueError, match="not the codes of this key"):
        unpack(pack(key, codes), "1f" * 32)


def fill(folder: str, seed: int) -> None:
    """Code forty sounds in an order of its own; for a process that may be killed at it."""
    torch.set_num_threads(1)
    book = CodeBook(folder, tiny())
    for n in torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist():
        assert torch.equal(book.codes(wave(n, 700)), book.codec.encode(wave(n, 700)))


def test_several_processes_share_a_folder_and_may_be_killed(codec, tmp_path):
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=fill, args=(str(tmp_path), seed)) for seed in range(3)]
    for process in others:
        process.start()
    until = time.monotonic() + 30
    while len(list(tmp_path.glob("*/*"))) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    assert others[0].pid is not None
    os.kill(others[0].pid, signal.SIGKILL)
    for process in others:
        process.join(60)
    assert [process.exitcode for process in others[1:]] == [0, 0]
    book = CodeBook(tmp_path, codec)
    for n in range(40):
        assert torch.equal(book.codes(wave(n, 700)), codec.encode(wave(n, 700)))
    assert (book.num_hits, book.num_new, book.num_broken) == (40, 0, 0)


def test_a_write_that_dies_half_way_leaves_no_file(codec, tmp_path, monkeypatch):
    book = CodeBook(tmp_path, codec)

    def dies(one: object, other: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tinymodal.data.codes.os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        book.codes(wave(0))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
