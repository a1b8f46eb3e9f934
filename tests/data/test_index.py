import errno
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest

from tinymodal.core.errors import DataError
from tinymodal.data import index, whole
from tinymodal.data.index import cache_folder, open_index
from tinymodal.data.sources import open_source

ROWS = [{"image": None, "question": f"Q{n}", "answer": "A"} for n in range(100)]


@pytest.fixture(autouse=True)
def everything_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(index, "KEEP_FROM_BYTES", 0)
    monkeypatch.setenv("TINYMODAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "data" / "rows.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def count(path):
    """A scan that tells how often it was made."""
    with (path.parent / "scans").open("a") as file:
        file.write("x")
    return {"lines": np.arange(len(path.read_bytes().splitlines())), "none": np.empty((0, 2), np.int64)}


def scans(path):
    return len((path.parent / "scans").read_text())


def hidden(path):
    return sorted(p.name for p in path.parent.iterdir() if p.name.startswith("."))


def test_an_index_is_made_once_and_mapped_from_then_on(path):
    first, second = open_index(path, count), open_index(path, count)

    assert scans(path) == 1
    assert isinstance(second.arrays["lines"].base, np.memmap)
    for one in (first, second):
        assert one.arrays["lines"].tolist() == list(range(100))
        assert one.arrays["none"].shape == (0, 2)
    assert hidden(path) == [".rows.jsonl.index"]  # which no pattern finds


def test_a_kept_index_is_sent_by_name_and_mapped_by_whom_it_reaches(path):
    source = open_source(path, "vqa")
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    there = pickle.loads(sent)
    assert isinstance(there.files[0].index.arrays["spans"].base, np.memmap)
    assert [there.row(n) for n in range(100)] == ROWS
    path.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl: written to since it was opened"):
        pickle.loads(sent)


@pytest.mark.parametrize("change", ["longer", "time", "same size and time"])
def test_an_index_of_other_bytes_is_not_used(path, change):
    open_index(path, count)
    stat = path.stat()
    if change == "longer":
        path.write_text(path.read_text() + "{}\n")
    elif change == "time":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    else:
        path.write_text(path.read_text().replace("Q7", "R7"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(open_index(path, count).arrays["lines"]) == (101 if change == "longer" else 100)
    assert scans(path) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "words"])
def test_a_damaged_index_is_made_anew(path, damage):
    open_index(path, count)
    kept = path.with_name(".rows.jsonl.index")
    raw = bytearray(kept.read_bytes())
    if damage == "cut":
        del raw[-100:]
    elif damage == "flipped":
        raw[-70] ^= 1
    kept.write_bytes({"empty": b"", "words": b"no index"}.get(damage, bytes(raw)))

    assert open_index(path, count).arrays["lines"].tolist() == list(range(100))
    assert open_index(path, count).place == kept
    assert scans(path) == 2


def test_a_file_that_changes_while_it_is_open_is_told_when_a_row_is_read(path):
    source = open_source(path, "vqa")
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(ROWS)))
    with pytest.raises(DataError, match=r"rows.jsonl: written to since it was opened"):
        source.row(0)


def test_where_the_folder_cannot_be_written_it_is_kept_in_the_cache_folder(path, monkeypatch):
    really = whole.whole

    def refuse(place):
        if place.parent == path.parent:
            raise OSError(errno.EROFS, "Read-only file system")
        return really(place)

    monkeypatch.setattr(index, "whole", refuse)
    made = open_index(path, count)
    assert made.place.parent == cache_folder() / "index"
    assert open_index(path, count).place == made.place
    assert scans(path) == 1
    assert hidden(path) == []


def test_on_a_full_disk_it_stays_in_memory_and_a_line_says_so(path, monkeypatch, capsys):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    source = open_source(path, "vqa")

    assert source.files[0].index.place is None
    assert [source.row(n) for n in range(100)] == ROWS
    assert [pickle.loads(pickle.dumps(source)).row(n) for n in (0, 99)] == [ROWS[0], ROWS[99]]
    assert "could not be kept" in capsys.readouterr().err
    assert hidden(path) == []  # nothing half is left
    assert not list((cache_folder() / "index").iterdir())


def test_who_is_killed_while_writing_leaves_no_index_and_the_next_one_tidies_up(path):
    """The process ends inside the write, as with SIGKILL or a lost power line."""
    code = (
        "import os, pathlib, tinymodal.data.index as i, tinymodal.data.whole as w\n"
        "from tinymodal.data.sources import open_source\n"
        "i.KEEP_FROM_BYTES = 0\n"
        "w.os.fsync = lambda fd: os._exit(9)\n"
        f"open_source({str(path)!r}, 'vqa')\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    (left,) = hidden(path)
    assert left.startswith(".rows.jsonl.index.")
    assert left.endswith(whole.PART)

    source = open_source(path, "vqa")
    assert [source.row(n) for n in range(100)] == ROWS
    assert hidden(path) == [".rows.jsonl.index"]


def slow(path):
    time.sleep(0.3)
    return count(path)


def _open(path, results):
    index.KEEP_FROM_BYTES = 0
    results.put(len(open_index(path, slow).arrays["lines"]))


def test_of_several_processes_one_makes_the_index_and_the_others_wait_for_it(path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_open, args=(path, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=30) for _ in workers] == [100] * 4
    for worker in workers:
        worker.join()
    assert scans(path) == 1
    assert hidden(path) == [".rows.jsonl.index"]


def test_a_forked_worker_reads_with_what_was_mapped_before(path):
    source = open_source(path, "vqa")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(source.row, range(100)) == ROWS
