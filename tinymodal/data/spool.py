"""Stretches of rows on the disk of this machine, mapped into the memory of every process that reads them.

For what cannot be read row by row where it lies: a heavy row group of parquet, or files that are far away. A
stretch is fetched by one process while the others wait, written whole as an Arrow file, and mapped: workers
share its pages, and a row costs what it weighs. The stretches that were used longest ago go when all together
are more than ``LIMIT_BYTES``; they can be fetched again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinymodal.core.errors import DataError
from tinymodal.data.index import cache_folder, locked
from tinymodal.data.whole import PART, whole

LIMIT_BYTES = 20_000_000_000
"""Of all stretches of a machine; ``$TINYMODAL_SPOOL_GB`` sets another."""

BATCH_ROWS = 16
"""Rows that are written side by side: little is touched to read one."""


class Spool:
    """One folder of stretches by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.arrow"

    def get(self, name: str) -> Any | None:
        """A stretch as a table that is mapped, not read; None if it is not there."""
        import pyarrow as pa

        path = self.path(name)
        try:
            with pa.memory_map(str(path)) as file:
                table = pa.ipc.open_file(file).read_all()
            os.utime(path)  # used now: the last one to go
        except (OSError, pa.ArrowInvalid):
            return None
        return table

    def fetch(self, name: str, batches: Callable[[], Iterable[Any]]) -> Any:
        """The stretch ``name``; where it is not there, made of the record batches that ``batches`` gives.

        Raises:
            OSError: it cannot be written; or whatever ``batches`` raises.
        """
        table = self.get(name)
        if table is not None:
            return table
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / f"{name}.lock"
        with lock.open("wb") as file, locked(file):
            table = self.get(name)
            if table is None:
                self.put(name, batches())
                table = self.get(name)
        lock.unlink(missing_ok=True)
        if table is None:
            raise OSError(f"{self.path(name)} is gone as soon as it was written")
        return table

    def put(self, name: str, batches: Iterable[Any]) -> None:
        """Write a stretch, and let others go for it."""
        import pyarrow as pa

        self.folder.mkdir(parents=True, exist_ok=True)
        with whole(self.path(name)) as file:
            writer = None
            for batch in batches:
                writer = writer or pa.ipc.new_file(file, batch.schema)
                writer.write_table(pa.Table.from_batches([batch]), max_chunksize=BATCH_ROWS)
            if writer is None:
                raise DataError(f"{name}: a stretch without rows; expected some")
            writer.close()
        trim(self.path(name))


def spool_folder() -> Path:
    return cache_folder() / "spool"


def trim(newest: Path) -> None:
    """Remove the stretches that were used longest ago, ``newest`` never, until all are within the limit."""
    limit = float(os.environ.get("TINYMODAL_SPOOL_GB") or LIMIT_BYTES / 1e9) * 1e9
    found = []
    for path in spool_folder().rglob("*.arrow"):
        with suppress(OSError):
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            break
        if path != newest and path.suffix != PART:
            with suppress(OSError):
                path.unlink()
            total -= size
