"""A file of features is whole or not there, whoever dies, writes, reads or removes at the same time."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.data import cache as files
from tinymodal.data.cache import ABANDONED_S, SHARE, TOUCH_S, FeatureCache, pack, unpack

KEY = "ab" + "0" * 62


def features(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (3, 4, 5), generator=torch.Generator().manual_seed(seed))


def key(n: int) -> str:
    return f"{n:064x}"[::-1]


def same(one, other) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    return FeatureCache(tmp_path / "features")


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(files, "say", lines.append)
    return lines


# ---- what is kept


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_what_is_read_is_what_writing_gave_back(dtype, tmp_path):
    tiles = [features(0), features(1, 2, 7), features(2, 9, 6) * 1e-6, torch.zeros(2, 3)]
    put = FeatureCache(tmp_path, dtype).put(KEY, (480, 640), tiles)
    got = FeatureCache(tmp_path).get(KEY)  # the file says itself what type it is
    assert got.size == (480, 640)
    assert same(got.tiles, put.tiles)
    assert [tile.dtype for tile in got.tiles] == [torch.bfloat16] * 4
    for tile, kept in zip(tiles, got.tiles, strict=True):
        # Half of the last of 8 bits, and of 4.
        bound = 2**-8 if dtype == "bfloat16" else 2**-4 + 2**-8
        least = 0 if dtype == "bfloat16" else float(tile.abs().max()) * 2**-16
        assert ((kept.float() - tile).abs() <= tile.abs() * bound + least).all()


def test_bfloat16_is_torchs_own_rounding(cache):
    x = features()
    assert torch.equal(cache.put(KEY, (1, 1), [x]).tiles[0], x.to(torch.bfloat16))
    assert same(cache.rounded([x]), cache.get(KEY).tiles)


def test_float8_reads_each_byte_as_torch_converts_it():
    x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = x[x.isfinite()] * 0.37
    (kept,) = unpack(pack(KEY, (1, 1), [x], "float8"), KEY).tiles
    scale = x.abs().max() / 448
    assert torch.equal(kept, ((x / scale).to(torch.float8_e4m3fn).float() * scale).to(torch.bfloat16))


def test_a_picture_of_729_positions_takes_its_numbers_and_a_line():
    sizes = {d: len(pack(KEY, (480, 640), [torch.zeros(27, 27, 1152)], d)) for d in ("bfloat16", "float8")}
    assert sizes == {"bfloat16": 729 * 1152 * 2 + 192, "float8": 729 * 1152 + 192}


def test_features_that_are_not_finite_are_given_back_but_not_kept(cache):
    for wrong in (float("nan"), float("inf"), float("-inf")):
        x = features()
        x[1, 2, 3] = wrong
        assert not cache.put(KEY, (1, 1), [features(1), x]).tiles[1].isfinite().all()
        assert cache.get(KEY) is None
    assert cache.num_broken == 0


def test_has_says_how_long_a_file_is_without_reading_it(cache):
    assert cache.has(KEY) == 0
    entry = cache.put(KEY, (1, 1), [features()])
    assert cache.has(KEY) == entry.num_bytes == cache.path(KEY).stat().st_size
    assert cache.has(key(5)) == 0
    data = cache.path(KEY).read_bytes()
    for wrong in (data[:-1], data + b"\0", data[:40], data[:5], b""):
        cache.path(KEY).write_bytes(wrong)
        assert cache.has(KEY) == 0


def test_a_cache_can_be_pickled_and_goes_on_reading(cache):
    put = cache.put(KEY, (1, 1), [features()])
    assert same(pickle.loads(pickle.dumps(cache)).get(KEY).tiles, put.tiles)


# ---- what goes wrong


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_file_with_any_wrong_byte_or_length_is_refused(data):
    whole = pack(KEY, (48, 64), [features(0, 2, 2)], data.draw(st.sampled_from(["bfloat16", "float8"])))
    broken = bytearray(whole)
    how = data.draw(st.sampled_from(["flip", "cut", "grow"]))
    if how == "flip":
        broken[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del broken[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        broken += bytes(data.draw(st.integers(1, 99)))
    with pytest.raises(ValueError):
        unpack(broken, KEY)


@settings(max_examples=100, deadline=None)
@given(outline=st.binary(max_size=80))
def test_a_file_with_a_right_checksum_but_nonsense_in_it_is_refused(outline):
    data = bytearray(files.HEAD.pack(files.MAGIC, files.zlib.crc32(outline), len(outline))) + outline
    with pytest.raises(ValueError):
        unpack(data, KEY)


def test_a_broken_file_is_a_miss_that_is_counted_and_written_anew(cache):
    put = cache.put(KEY, (1, 1), [features()])
    whole = cache.path(KEY).read_bytes()
    holes = bytearray(whole)
    holes[-20:] = bytes(20)  # what a crash of the machine leaves of a file that was written
    for n, wrong in enumerate((whole[:-3], bytes(holes), b""), 1):
        cache.path(KEY).write_bytes(wrong)
        assert cache.peek(KEY) is None
        assert cache.get(KEY) is None
        assert cache.num_broken == n
        cache.put(KEY, (1, 1), [features()])
        assert same(cache.get(KEY).tiles, put.tiles)


def test_the_file_of_another_picture_in_its_place_is_a_miss(cache):
    cache.put(key(1), (1, 1), [features()])
    cache.path(key(2)).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(cache.path(key(1)), cache.path(key(2)))
    assert cache.get(key(2)) is None
    assert cache.has(key(2)) == 0


@pytest.mark.parametrize("moment", ["open", "write", "replace"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), MemoryError()])
def test_a_write_that_is_interrupted_leaves_nothing_behind(moment, fault, cache, monkeypatch):
    cache.put(KEY, (1, 1), [features()])
    before = cache.path(KEY).read_bytes()
    fail(monkeypatch, moment, fault)
    with pytest.raises(type(fault)):
        cache.put(KEY, (1, 1), [features(1)])
    monkeypatch.undo()
    assert cache.path(KEY).read_bytes() == before
    assert os.listdir(cache.path(KEY).parent) == [KEY]


def fail(monkeypatch, moment, fault, times=10**9):
    """Let opening, writing (after half) or moving a file fail so often."""
    opening, replacing = Path.open, os.replace

    def faulty():
        nonlocal times
        times -= 1
        if times >= 0:
            raise fault

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, view):
            self.file.write(view[: len(view) // 2])
            faulty()
            return self.file.write(view[len(view) // 2 :]) + len(view) // 2

    def watched_open(self, mode="r", *rest, **named):
        if "w" not in mode:
            return opening(self, mode, *rest, **named)
        if moment == "open":
            faulty()
        file = opening(self, mode, *rest, **named)
        return Half(file) if moment == "write" else file

    def watched_replace(*paths):
        if moment == "replace":
            faulty()
        replacing(*paths)

    monkeypatch.setattr(Path, "open", watched_open)
    monkeypatch.setattr(os, "replace", watched_replace)


@pytest.mark.parametrize("moment", ["open", "write", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_full_disk_ends_the_writing_is_told_once_and_nothing_else(moment, number, cache, monkeypatch, said):
    old = cache.put(key(1), (1, 1), [features()])
    fail(monkeypatch, moment, OSError(number, os.strerror(number)))
    for n in (2, 3):
        put = cache.put(key(n), (1, 1), [features(n)])
        assert torch.equal(put.tiles[0], features(n).to(torch.bfloat16))
    monkeypatch.undo()
    assert not cache.writing
    assert len(said) == 1
    assert os.strerror(number) in said[0]
    assert str(cache.folder) in said[0]
    assert same(cache.get(key(1)).tiles, old.tiles)
    assert cache.get(key(2)) is None
    assert (
        len([path for path in cache.folder.rglob("*") if path.is_file() and path.name != "sweep.lock"]) == 1
    )


def test_a_folder_that_cannot_be_made_is_told_and_nothing_else(tmp_path, said):
    (tmp_path / "taken").write_text("a file")
    cache = FeatureCache(tmp_path / "taken")
    assert cache.get(KEY) is None
    assert cache.put(KEY, (1, 1), [features()]).tiles[0].shape == (3, 4, 5)
    assert len(said) == 1
    assert "Not a directory" in said[0]


def test_a_folder_that_vanishes_is_made_again(cache, monkeypatch, said):
    cache.put(key(1), (1, 1), [features()])
    shutil.rmtree(cache.folder)
    assert cache.get(key(1)) is None
    cache.put(key(1), (1, 1), [features()])
    # And once between making it and writing into it.
    fail(monkeypatch, "open", FileNotFoundError(errno.ENOENT, "gone"), times=1)
    cache.put(key(2), (1, 1), [features()])
    assert cache.get(key(1)) is not None
    assert cache.get(key(2)) is not None
    assert not said


# ---- how much is kept


def held(cache: FeatureCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.glob("??/*"))


def test_the_folder_stays_below_its_bound_and_keeps_what_was_used_last(tmp_path):
    one = len(pack(KEY, (1, 1), [features()], "bfloat16"))
    cache = FeatureCache(tmp_path, max_bytes=40 * one)
    start = time.time() - 10_000
    for n in range(40):
        cache.put(key(n), (1, 1), [features(n)])
        os.utime(cache.path(key(n)), (start + n, start + n))
    assert cache.num_removed == 0
    assert cache.get(key(3)) is not None  # used now, though it was the fourth to come
    for n in range(40, 60):
        cache.put(key(n), (1, 1), [features(n)])
        assert held(cache) <= cache.max_bytes * (1 + 1 / SHARE) + one
    assert cache.get(key(3)) is not None
    assert cache.get(key(59)) is not None
    assert [n for n in (0, 1, 2, 4) if cache.get(key(n)) is not None] == []
    assert cache.num_removed >= 20


def test_reading_marks_a_file_as_used_but_not_each_time(cache):
    cache.put(KEY, (1, 1), [features()])
    now = time.time()
    for old, renewed in ((now - TOUCH_S / 2, False), (now - 3 * TOUCH_S, True)):
        os.utime(cache.path(KEY), (old, old))
        assert cache.peek(KEY) is not None
        assert (cache.path(KEY).stat().st_mtime > now - 1) is renewed


def test_what_a_killed_process_was_writing_is_removed_after_an_hour(cache):
    cache.put(KEY, (1, 1), [features()])
    left = cache.path(KEY).with_name(f"{key(7)}.123-abcd.part")
    left.write_bytes(b"half of it")
    cache.sweep()
    assert left.exists()
    long_ago = time.time() - ABANDONED_S - 1
    os.utime(left, (long_ago, long_ago))
    cache.sweep()
    assert not left.exists()
    assert cache.get(KEY) is not None


def test_two_do_not_clean_up_at_the_same_time(cache):
    cache.put(KEY, (1, 1), [features()])
    with (cache.folder / "sweep.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cache.sweep() is None
    assert cache.sweep() == held(cache)


def test_a_picture_larger_than_the_bound_is_not_written(tmp_path):
    cache = FeatureCache(tmp_path, max_bytes=100)
    cache.put(KEY, (1, 1), [features()])
    assert cache.get(KEY) is None
    assert cache.writing


def test_cleaning_up_goes_on_past_files_that_others_take(cache, monkeypatch):
    for n in range(30):
        cache.put(key(n), (1, 1), [features(n)])
    cache.max_bytes = held(cache) // 2
    unlink = os.unlink

    def taken(path):
        unlink(path)
        unlink(path)  # another was quicker

    monkeypatch.setattr(os, "unlink", taken)
    assert cache.sweep() <= cache.max_bytes
    monkeypatch.undo()
    assert held(cache) <= cache.max_bytes


def _hammer(folder: str, seed: int, wrong) -> None:
    """Read and write at random; every answer is none or the right one."""
    torch.set_num_threads(1)
    cache = FeatureCache(folder, max_bytes=12 * len(pack(KEY, (1, 1), [features()], "bfloat16")))
    order = torch.randint(0, 30, (400,), generator=torch.Generator().manual_seed(seed)).tolist()
    hits = 0
    for n in order:
        entry = cache.get(key(n))
        if entry is None:
            entry = cache.put(key(n), (n, n), [features(n)])
        else:
            hits += 1
        if entry.size != (n, n) or not torch.equal(entry.tiles[0], features(n).to(torch.bfloat16)):
            wrong.put(f"{n} is another's")
    if cache.num_broken or not cache.writing or not hits or not cache.num_removed:
        wrong.put((cache.num_broken, cache.writing, hits, cache.num_removed))


def test_processes_that_write_read_and_remove_at_once_never_see_half_a_file(tmp_path):
    context = multiprocessing.get_context("fork")
    wrong = context.Queue()
    processes = [context.Process(target=_hammer, args=(str(tmp_path), seed, wrong)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert wrong.empty()


def _write_for_ever(folder: str) -> None:
    cache, n = FeatureCache(folder), 0
    while True:
        cache.put(key(n % 50), (1, 1), [features(n % 50, 40, 40, 64)])
        n += 1


def test_a_process_that_is_killed_while_it_writes_leaves_whole_files_only(tmp_path):
    context = multiprocessing.get_context("fork")
    reader = FeatureCache(tmp_path)
    for _ in range(5):
        process = context.Process(target=_write_for_ever, args=(str(tmp_path),))
        process.start()
        time.sleep(0.15)
        process.kill()
        process.join()
    found = [reader.get(key(n)) for n in range(50)]
    assert any(found)
    assert reader.num_broken == 0
    for n, entry in enumerate(found):
        assert entry is None or torch.equal(entry.tiles[0], features(n, 40, 40, 64).to(torch.bfloat16))
