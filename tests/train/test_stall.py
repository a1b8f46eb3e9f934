"""Real processes of which one sleeps, dies or fails: the others name it and end."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tinymodal.core.errors import DataError, TinyModalError
from tinymodal.train.recipe import Parallel
from tinymodal.train.stall import PHASES, Watchdog
from tinymodal.train.world import ALONE, open_world

from .ranks import FORK, environment, free_port

TIMEOUT_S = 1.0
BEAT_S = TIMEOUT_S / 20


def enter(rank, size, port, folder, body):
    """What a process does: its errors go to a file, as the command line writes them."""
    os.environ.update(environment(rank, size, port))
    file = (folder / f"{rank}.err").open("w")
    os.dup2(file.fileno(), 2)
    sys.stderr = file
    try:
        with open_world(Parallel(timeout_s=20.0), "cpu") as world, Watchdog(folder, world, TIMEOUT_S) as dog:
            body(world, dog)
    except TinyModalError as error:
        file.write(f"error: {error}\n")
        file.close()
        os._exit(1)


def run(folder, body, size=2, killed=()):
    """``body(world, dog)`` on every rank: exit codes, what was written to stderr, seconds."""
    port = free_port()
    processes = [FORK.Process(target=enter, args=(rank, size, port, folder, body)) for rank in range(size)]
    for process in processes:
        process.start()
    began = time.monotonic()
    for rank, process in enumerate(processes):
        if rank in killed:
            process.kill()
        process.join(30)
        if process.is_alive():
            process.kill()
            pytest.fail("a rank has not ended")
    texts = [(folder / f"{rank}.err").read_text() for rank in range(size)]
    return [process.exitcode for process in processes], texts, time.monotonic() - began


def told(*texts):
    """The one sentence of an error; gloo may have complained beside it."""
    (line,) = [line for text in texts for line in text.splitlines() if line.startswith("error: ")]
    return line


def test_a_rank_that_sleeps_is_named_with_its_step_and_samples_and_the_run_ends(tmp_path):
    def body(world, dog):
        for number in range(1, 4):
            dog.beat(number, "data")
            dog.beat(number, "agree", [f"caption-{number}-{world.rank}"])
            if (world.rank, number) == (1, 3):
                time.sleep(60)
            dog.mark("pass")
            world.barrier()

    codes, texts, seconds = run(tmp_path, body)
    assert codes == [1, 1]
    line = told(*texts)
    assert re.match(
        r"error: rank 1 on \S+ lives but has not moved for 1 s: step 3, agreeing on the step, samples", line
    )
    assert "caption-3-1. rank 0 waits in step 3" in line
    assert seconds < 8 * TIMEOUT_S
    # Where each stood: the sleeper's own code is in its file.
    assert "test_stall.py" in (tmp_path / "stalled" / "rank-1.txt").read_text()
    assert "barrier" in (tmp_path / "stalled" / "rank-0.txt").read_text()


def test_a_rank_that_still_reads_its_data_is_named_with_the_samples_it_had_last(tmp_path):
    def body(world, dog):
        dog.beat(1, "agree", [f"row-{world.rank}"])
        world.barrier()
        dog.beat(2, "data")
        if world.rank == 2:
            time.sleep(60)
        dog.beat(2, "agree", [f"next-{world.rank}"])
        world.barrier()

    codes, texts, _ = run(tmp_path, body, size=3)
    assert codes == [1, 1, 1]
    assert "step 2, taking its data, last samples row-2. rank 0 and 1 more wait in step 2" in told(*texts)


def test_ranks_that_stand_at_the_same_place_are_all_named(tmp_path):
    def body(world, dog):
        dog.beat(7, "pass", [f"row-{world.rank}"])
        time.sleep(60)

    codes, texts, _ = run(tmp_path, body)
    assert codes == [1, 1]
    line = told(*texts)
    assert "none of 2 ranks has moved for 1 s: rank 0 step 7" in line
    assert "row-0" in line
    assert "row-1" in line


def test_a_rank_that_is_killed_is_named_by_the_one_that_waits(tmp_path):
    def body(world, dog):
        dog.beat(5, "agree", [f"row-{world.rank}"])
        if world.rank == 1:
            time.sleep(4 * BEAT_S)
            os.kill(os.getpid(), signal.SIGKILL)
        world.barrier()

    codes, texts, seconds = run(tmp_path, body)
    assert codes == [1, -signal.SIGKILL]
    assert "rank 1 on " in told(texts[0])
    assert "is gone: no sign of life since step 5, agreeing on the step, samples row-1" in told(texts[0])
    assert seconds < 8 * TIMEOUT_S


def test_a_rank_that_is_stopped_gives_no_sign_of_life(tmp_path):
    """As one whose machine has vanished: no connection breaks, nothing answers."""

    def body(world, dog):
        dog.beat(5, "agree", [f"row-{world.rank}"])
        pids = world.gather(os.getpid())
        dog.mark("pass")
        if world.rank == 1:
            time.sleep(60)
        time.sleep(4 * BEAT_S)
        os.kill(pids[1], signal.SIGSTOP)
        world.barrier()

    codes, texts, _ = run(tmp_path, body, killed=[1])
    assert codes == [1, -signal.SIGKILL]
    assert "rank 1 on " in told(*texts)
    assert "gives no sign of life and has not moved for 1 s: step 5" in told(*texts)


def test_the_last_words_of_a_rank_that_failed_reach_those_that_wait(tmp_path):
    def body(world, dog):
        dog.beat(5, "data")
        if world.rank == 1:
            raise DataError("chat.jsonl:12: no picture there")
        dog.beat(5, "agree", ["row-0"])
        world.barrier()

    codes, texts, _ = run(tmp_path, body)
    assert codes == [1, 1]
    assert "rank 1 on " in told(texts[0])
    assert "has ended in step 5: DataError: chat.jsonl:12: no picture there" in told(texts[0])
    assert told(texts[1]) == "error: chat.jsonl:12: no picture there"


def test_a_rank_may_save_for_longer_than_the_time_and_nobody_is_named(tmp_path):
    def body(world, dog):
        for number in (1, 2):
            dog.beat(number, "pass", ["row"])
            world.barrier()
            dog.beat(number, "save")
            if world.main:
                time.sleep(1.5 * TIMEOUT_S)
            world.barrier()

    codes, texts, _ = run(tmp_path, body)
    assert codes == [0, 0]
    assert texts == ["", ""]
    assert not (tmp_path / "stalled").exists()


def test_steps_that_take_their_time_are_no_stall(tmp_path):
    def body(world, dog):
        for number in range(1, 7):
            dog.beat(number, "pass", ["row"])
            time.sleep(0.25 * TIMEOUT_S * (1 + world.rank))
            world.barrier()

    codes, _, _ = run(tmp_path, body)
    assert codes == [0, 0]


def test_alone_nothing_is_watched(tmp_path):
    with Watchdog(tmp_path, ALONE, 0.01) as dog:
        dog.beat(1, "data")
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def test_phases_are_known_by_name():
    dog = Watchdog(Path("nowhere"), ALONE, 1.0)
    for phase in PHASES:
        dog.beat(1, phase)
    with pytest.raises(ValueError, match="lunch"):
        dog.beat(1, "lunch")


def test_a_rank_that_never_comes_is_named(tmp_path):
    """Rank 0 of 2 was started alone."""
    here, there = FORK.Pipe(duplex=False)

    def come():
        os.environ.update(environment(0, 2, free_port()))
        try:
            with open_world(Parallel(timeout_s=1.0), "cpu"):
                pass
        except TinyModalError as error:
            there.send(str(error))

    process = FORK.Process(target=come)
    process.start()
    assert here.poll(30)
    line = here.recv()
    process.join()
    assert re.match(r"rank 0 of 2 on \S+: the processes did not meet at 127.0.0.1:\d+ within 1 s", line)
    assert "See that all of them were started" in line
