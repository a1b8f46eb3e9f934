"""Several ranks on this machine, for tests: forked, so that nothing is imported or built again."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import time
import traceback

import torch

from tinymodal.train.recipe import Parallel
from tinymodal.train.step import StepReport
from tinymodal.train.world import open_world

TOLD = [StepReport]
"""Classes of ours that ranks answer with, besides plain values and tensors."""
FORK = multiprocessing.get_context("fork")


def environment(rank: int, size: int, port: int, local_size: int | None = None) -> dict[str, str]:
    """What ``torchrun`` tells a process."""
    local_size = local_size or size
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank % local_size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def start(size, body, local_size=None, **parallel):
    """``body(world)`` in ``size`` processes; each with the pipe that its answer comes by."""
    port = free_port()
    started = []
    for rank in range(size):
        here, there = FORK.Pipe(duplex=False)

        def enter(rank=rank, there=there):
            os.environ.update(environment(rank, size, port, local_size))
            torch.set_num_threads(1)
            try:
                with open_world(Parallel(**{"timeout_s": 60.0, **parallel}), "cpu") as world:
                    answer = io.BytesIO()
                    torch.save(body(world), answer)
                    world.barrier()
                there.send_bytes(answer.getvalue())
            except BaseException:
                there.send_bytes(b"failed " + traceback.format_exc().encode())
                raise

        process = FORK.Process(target=enter)
        process.start()
        there.close()
        started.append((process, here))
    return started


def together(size, body, local_size=None, seconds=100.0, **parallel):
    """What ``body(world)`` returns on each of ``size`` ranks.

    Raises:
        AssertionError: a rank failed or did not end in time.
    """
    until = time.monotonic() + seconds
    started = start(size, body, local_size, **parallel)
    answers, faults = [], []
    try:
        for rank, (_, pipe) in enumerate(started):
            if not pipe.poll(max(until - time.monotonic(), 0)):
                faults.append(f"rank {rank} has not ended")
                continue
            try:
                told = pipe.recv_bytes()
            except EOFError:
                faults.append(f"rank {rank} is gone")
                continue
            if told.startswith(b"failed "):
                faults.append(f"rank {rank}: {told.decode()}")
            else:
                with torch.serialization.safe_globals(TOLD):
                    answers.append(torch.load(io.BytesIO(told), weights_only=True))
    finally:
        for process, _ in started:
            if len(answers) < size:  # a rank that failed, or this very process
                process.kill()
            process.join()
    assert not faults, "\n".join(faults)
    return answers
