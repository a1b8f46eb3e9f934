"""One thread computes on all cores and the others on one."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tinymodal.core.threads import apart, on_one_core


@pytest.fixture
def three():
    """Three threads of torch, however many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_thread_is_put_on_one_core_and_no_other(three):
    with ThreadPoolExecutor(1) as begun_before, ThreadPoolExecutor(1, initializer=on_one_core) as small:
        assert begun_before.submit(torch.get_num_threads).result() == 3
        assert small.submit(torch.get_num_threads).result() == 1
        assert begun_before.submit(torch.get_num_threads).result() == 3
        with ThreadPoolExecutor(1) as begun_later:
            assert begun_later.submit(torch.get_num_threads).result() == 3
    assert torch.get_num_threads() == 3


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_what_is_done_apart_leaves_no_workers(three):
    def work():
        values = torch.rand(1 << 20)
        assert torch.get_num_threads() == 3
        return values.exp().sum(), os.listdir("/proc/self/task")

    def ids():
        return {entry.name for entry in Path("/proc/self/task").iterdir()}

    before = ids()
    total, then = apart(work)
    assert total > 1 << 20
    assert len(set(then) - before) >= 3, "the thread and its workers"
    ends = time.monotonic() + 10  # the system takes a moment to clear away what has ended
    while not (now := ids()) <= before and time.monotonic() < ends:
        time.sleep(0.01)
    assert now <= before


def test_what_fails_apart_fails_here():
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0)
