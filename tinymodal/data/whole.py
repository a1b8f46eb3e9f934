"""A file that is there whole or not at all, whoever is killed while it is written."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PART = ".part"
"""Ending of a file that is being written; one that is left over belongs to nobody."""


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets the name ``path`` once the block has ended and its bytes are on the disk.

    Until then it has a hidden name of its own beside it, so two processes may write the same ``path``: the
    last one stays. An exception removes it, and leaves what was called ``path`` before.

    Raises:
        OSError: the folder cannot be written, the disk is full.
    """
    temporary = path.with_name(f".{path.name.removeprefix('.')}.{os.getpid()}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # some file systems cannot sync a folder; the name is then safe a little later
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sweep(path: Path) -> None:
    """Remove what killed processes left while they wrote ``path``. Call it where nobody else writes it."""
    for left in path.parent.glob(f".{path.name.removeprefix('.')}.*{PART}"):
        with suppress(OSError):
            left.unlink()
