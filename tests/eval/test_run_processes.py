"""An evaluation that is killed, or shared by several processes, writes the same files as one that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from tinymodal.compose.build import save
from tinymodal.compose.tiny import tiny_model

pytestmark = pytest.mark.slow
NUM = 1_100
"""More than two blocks of ``run.SAVE_EVERY``, so that a kill finds written ones."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    save(tiny_model(), folder / "model")
    Image.new("RGB", (20, 20), "red").save(folder / "red.png")
    rows = []
    for n in range(NUM):
        words = " ".join(["please"] * (n * 7 % 5))
        rows.append({"image": "red.png" if n % 3 else None, "question": f"{words} {n}?", "answer": "one"})
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bench.py").write_text(
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from tinymodal.eval.tasks.rows import from_file\n"
        "BENCHMARK = replace(from_file(Path(__file__).with_name('asked.jsonl')), max_new_tokens=3)\n"
    )
    return folder


def command(place, out, *before):
    asked = ["eval", str(place / "model"), "--on", f"{place / 'bench.py'}:BENCHMARK", "--out", str(out)]
    return [*(before or (sys.executable,)), "-m", "tinymodal", *asked]


@pytest.fixture(scope="module")
def uninterrupted(place):
    out = place / "whole"
    subprocess.run(command(place, out), check=True, capture_output=True)
    return (out / "asked.replies.jsonl").read_bytes()


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_rows(place, uninterrupted):
    out = place / "killed"
    path = out / "asked.replies.jsonl"
    kills, before = 0, 0
    for _ in range(2):
        child = subprocess.Popen(command(place, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Killed as soon as a block more is on the disk.
        while child.poll() is None and (not path.exists() or path.stat().st_size <= before):
            time.sleep(0.005)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.wait()
        before = path.stat().st_size
    assert kills == 2
    done = subprocess.run(command(place, out), check=True, capture_output=True, text=True)
    assert "were already answered; going on" in done.stderr
    assert path.read_bytes() == uninterrupted


def test_two_processes_ask_each_question_once_and_write_the_same_rows(place, uninterrupted):
    out = place / "two"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(place, out, *torchrun), check=False, capture_output=True, text=True, env=env, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "asked.replies.jsonl").read_bytes() == uninterrupted
    assert not list(out.glob("*.rank-*"))
    told = json.loads((out / "results.json").read_text())["asked"]
    assert (told["n"], told["complete"]) == (NUM, True)
    assert done.stdout.count("Every prompt, reply and score") == 1


def test_what_processes_left_when_they_were_killed_is_kept(place, uninterrupted):
    """Two ranks' files lie there; one process takes them up and asks only the rest."""
    out = place / "left"
    out.mkdir()
    lines = uninterrupted.decode().splitlines(keepends=True)
    for rank in (0, 1):
        (out / f"asked.replies.jsonl.rank-{rank:05d}").write_text("".join(lines[rank:600:2]))
    done = subprocess.run(command(place, out), check=True, capture_output=True, text=True)
    assert "600 of 1,100 questions were already answered" in done.stderr
    assert (out / "asked.replies.jsonl").read_bytes() == uninterrupted
    assert not list(out.glob("*.rank-*"))
