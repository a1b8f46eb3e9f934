"""Threads of Python that compute with torch: one on all cores, the others on one each.

GNU's OpenMP keeps workers for every thread that has computed on several cores, until that thread ends. While
there are more of them in all than the machine has cores, they go to sleep between two operations, where they
would wait awake for the next; to wake them takes longer than a small operation does. On two cores the starter
gave 21 answers a second beside an idle thread that had once computed on both, and 46 without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def on_one_core() -> None:
    """Let the thread that calls this compute on one core; say so before it computes, e.g. as ``initializer``.

    Other threads, and those that begin later, compute on as many as before.
    """
    many = torch.get_num_threads()
    torch.set_num_threads(1)
    # torch takes that for the wish of threads to come as well, until another says otherwise.
    told = threading.Thread(target=torch.set_num_threads, args=(many,))
    told.start()
    told.join()


def apart(do: Callable[[], T]) -> T:
    """What ``do`` gives, done in a thread that ends with it, and its workers with that."""
    with ThreadPoolExecutor(1, "apart") as thread:
        return thread.submit(do).result()
