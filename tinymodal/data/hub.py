"""Data sets of the Hugging Face Hub, or folders laid out as there: ``open_hub("org/name", "train", "vqa")``.

Which files a split has is found by the ``datasets`` library (``pip install 'tinymodal[hub]'``). How they are
read is ours, because a position in training must be one number for every source:

* files on this machine, and what ``save_to_disk`` wrote: row by row in any order, like any other source;
* parquet on the Hub, which most data sets are or have a copy of: any row group by itself. A group is fetched
  when its turn comes, once for all processes of a machine, and kept as long as there is room
  (``data/spool.py``). The number of rows is known from the first moment;
* anything else (csv, folders of pictures, tar files on the Hub) is a stream: ``Stream``. It is fetched in
  its own order, in blocks, by one process of each machine, which reads ahead while the others wait for the
  files that it writes. Where each block begins is kept (``IterableDataset.state_dict``), so any block can be
  fetched again, and a run is resumed in the middle; on another machine the stream is read up to there.

The order is shuffled by us, in windows, as a pure function of seed and position. The library's own shuffle
buffer is not used: after ``load_state_dict`` it has lost its contents, 11 of 64 samples in our test.

Ranks and workers share a source by draws, as they do any other. So each machine fetches the whole stream; one
cache folder for several machines (``TINYMODAL_CACHE``) fetches it once.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO

from tinymodal.core.errors import DataError
from tinymodal.core.lookup import find
from tinymodal.core.types import Sample
from tinymodal.data.convert import CONVERTERS, Convert, Folders
from tinymodal.data.sources import (
    READABLE,
    WINDOW,
    Rows,
    checked,
    converted,
    one_line,
    open_source,
    picture_folder,
    sound_folder,
)
from tinymodal.data.spool import Spool, spool_folder
from tinymodal.data.tar import PICTURES, SOUNDS, with_media
from tinymodal.data.whole import whole

BLOCK_ROWS = 256
"""Rows of a stream that are fetched and kept together."""

AHEAD = 2 * WINDOW
"""Blocks that are fetched before anybody asks for them."""

POLL_S = 0.02


def open_hub(
    name: str,
    split: str,
    format: str,
    images: str | Path | None = None,
    sounds: str | Path | None = None,
    *,
    config: str | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> Rows | Stream:
    """Open a split of a data set.

    Args:
        name: ``org/name`` on the Hub, or a folder.
        split: ``train``, ``validation``, ...
        format: how its rows are written: a name in ``CONVERTERS``, or ``"my_rows.py:convert"``.
        images: folder of the pictures, where rows name files.
        sounds: folder of the sounds, likewise.
        config: which of its configurations, where it has several.
        revision: branch, tag or commit; name a commit to train on the same data next year.
        seed: of the order of a stream whose length is not known; other orders are the mixture's.

    Raises:
        DataError: ``datasets`` is not installed; no such data set, configuration or split; not reachable.
    """
    convert = find(format, CONVERTERS, "row format")
    folders = picture_folder(images, name), sound_folder(sounds, name)
    datasets = _datasets(name)
    if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
        return Rows([_SavedRows(Path(name), split)], convert, *folders)
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        files = _files(builder, name, split)
        if all("://" not in file and Path(file).suffix.lower() in READABLE for file in files):
            return open_source(files, format, images, sounds)
        if all("://" in file and file.endswith(".parquet") for file in files):
            return Rows([RemoteParquet(file) for file in files], convert, *folders)
        lane = _Lane(builder, name, split, files)
    except DataError:
        raise
    except Exception as error:  # the library's own, of many kinds
        raise DataError(
            f"{name}: cannot be opened as a data set ({type(error).__name__}: {one_line(error)}); expected a "
            f"folder of data files, or a name on the Hub that can be reached. Correct it, or fetch the data"
        ) from error
    known = (builder.info.splits or {}).get(split)
    if known is not None and known.num_examples:
        return StreamRows([_BlockRows(lane, known.num_examples)], convert, *folders)
    return Stream(lane, convert, *folders, seed=seed)


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name}: reading a data set of the Hub needs datasets, which is not installed; pip install "
            f"'tinymodal[hub]'"
        ) from error
    return datasets


def _files(builder: Any, name: str, split: str) -> list[str]:
    found = {str(key): list(map(str, files)) for key, files in (builder.config.data_files or {}).items()}
    if split not in found:
        raise DataError(
            f"{name}: no split {split!r}; expected one of {', '.join(found) or 'none at all'}. Correct split"
        )
    return found[split]


# --- files that have been saved -------------------------------------------------------------------


class _SavedRows:
    """What ``Dataset.save_to_disk`` wrote, mapped by the library itself."""

    blocks: tuple[int, ...] | None = None

    def __init__(self, path: Path, split: str) -> None:
        self.path = path / "rows"  # so that pictures are looked up in the folder
        self.folder, self.split = path, split
        self._table: Any = None
        self._pid = 0
        self._size = len(self._open())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    def _open(self) -> Any:
        if self._table is None or self._pid != os.getpid():
            datasets = _datasets(str(self.folder))
            try:
                found = datasets.load_from_disk(str(self.folder))
            except Exception as error:
                raise DataError(
                    f"{self.folder}: not a saved data set ({type(error).__name__}: {one_line(error)}); "
                    f"expected what save_to_disk writes. Save it again"
                ) from error
            if isinstance(found, dict):
                if self.split not in found:
                    raise DataError(
                        f"{self.folder}: no split {self.split!r}; expected one of {', '.join(found)}. "
                        f"Correct split"
                    )
                found = found[self.split]
            self._table, self._pid = found.with_format("arrow"), os.getpid()
        return self._table

    def __len__(self) -> int:
        return self._size

    def label(self, n: int) -> str:
        return str(n + 1)

    def row(self, n: int) -> Any:
        return self._open()[n].to_pylist()[0]

    def members(self, n: int) -> None:
        return None


# --- parquet that is far away ---------------------------------------------------------------------


class RemoteParquet:
    """Rows of a parquet file behind a URL; each row group is fetched once for all processes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.path = Path(url.partition("://")[2].removeprefix("datasets/"))
        with self._opened() as (file, tag):
            self.tag = tag
            metadata = file.metadata
            self.blocks: tuple[int, ...] | None = tuple(
                metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)
            )
        self._ends = list(accumulate(self.blocks))
        self._recent: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent": OrderedDict()}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def label(self, n: int) -> str:
        return str(n + 1)

    def members(self, n: int) -> None:
        return None

    def row(self, n: int) -> Any:
        number = bisect_right(self._ends, n)
        if number not in self._recent:
            self._recent[number] = self._group(number, n)
            if len(self._recent) > WINDOW:
                self._recent.popitem(last=False)
        self._recent.move_to_end(number)
        at = n - (self._ends[number - 1] if number else 0)
        return self._recent[number].slice(at, 1).to_pylist()[0]

    def _group(self, number: int, n: int) -> Any:
        spool = Spool(spool_folder() / "parquet" / self.tag)
        try:
            return spool.fetch(f"{number:06}", lambda: self._fetched(number))
        except DataError:
            raise
        except Exception as error:  # network and file systems have errors of their own
            raise DataError(
                f"{self.path}:{n + 1}: cannot be fetched ({type(error).__name__}: {one_line(error)}); "
                f"expected a file that can be reached, and room in {spool.folder}. Call it again"
            ) from error

    def _fetched(self, number: int) -> Iterator[Any]:
        with self._opened() as (file, tag):
            if tag != self.tag:
                raise DataError(
                    f"{self.path}: has changed since it was opened; name a commit as the revision, and start "
                    f"again"
                )
            yield from file.iter_batches(64, row_groups=[number], use_threads=False)

    def _opened(self) -> _Remote:
        return _Remote(self.url)


class _Remote:
    """A remote parquet file while it is open, and a tag that another content would not have."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> tuple[Any, str]:
        try:
            import fsspec
            import pyarrow.parquet as pq
        except ImportError as error:
            raise DataError(
                f"{self.url}: reading it needs pyarrow and fsspec; pip install 'tinymodal[hub]'"
            ) from error
        system, path = fsspec.core.url_to_fs(self.url)
        content = f"{self.url} {system.ukey(path)}"
        # A group is read in one piece, so reading ahead would only add to it.
        self.raw: BinaryIO = system.open(path, "rb", cache_type="none", block_size=1 << 22)
        self.file = pq.ParquetFile(self.raw, pre_buffer=True)
        return self.file, hashlib.sha1(content.encode()).hexdigest()[:20]

    def __exit__(self, *error: object) -> None:
        self.file.close()
        self.raw.close()


# --- streams --------------------------------------------------------------------------------------


class _Lane:
    """Blocks of a stream by number, fetched in order by one process of the machine.

    The folder holds ``00000007.arrow``, a block; ``00000007.json``, the state of the stream where it begins;
    ``end.json``, how many rows there are, once that is known; ``want``, the block that somebody waits for.
    """

    def __init__(self, builder: Any, name: str, split: str, files: list[str]) -> None:
        self.builder, self.name, self.split = builder, name, split
        listed = (builder.config.data_files or {}).get(split)
        content = [
            name,
            split,
            builder.config_id,
            builder.hash,
            files,
            getattr(listed, "origin_metadata", None),
        ]
        key = hashlib.sha1(json.dumps([BLOCK_ROWS, *map(str, content)]).encode()).hexdigest()[:20]
        self.folder = spool_folder() / "streams" / key
        self.spool = Spool(self.folder)
        self._recent: OrderedDict[int, Any] = OrderedDict()
        self._reader: _Reader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent": OrderedDict(), "_reader": None}

    @property
    def num_rows(self) -> int | None:
        """None until the end has been seen."""
        with suppress(OSError, ValueError):
            return int(json.loads((self.folder / "end.json").read_text())["rows"])
        return None

    def reach(self, block: int) -> None:
        """Wait until ``block`` is there, or the end is known."""
        self._block(block)

    def row(self, row: int) -> dict[str, Any]:
        """A row as the data set has it; IndexError behind the end."""
        table = self._block(row // BLOCK_ROWS)
        if table is None or row % BLOCK_ROWS >= table.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        return _flat(table.slice(row % BLOCK_ROWS, 1).to_pylist()[0])

    def close(self) -> None:
        """End the fetching, if it is this process that does it."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _block(self, number: int) -> Any | None:
        if number in self._recent:
            self._recent.move_to_end(number)
            return self._recent[number]
        table = self._awaited(number)
        if table is not None:
            self._recent[number] = table
            if len(self._recent) > 2 * WINDOW:
                self._recent.popitem(last=False)
        return table

    def _awaited(self, number: int) -> Any | None:
        """The block, waited for; None behind the end."""
        name = f"{number:08}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._want(number)
            while (table := self.spool.get(name)) is None:
                rows = self.num_rows
                if rows is not None and number * BLOCK_ROWS >= rows:
                    return None
                if self._reader is None or self._reader.pid != os.getpid():
                    self._reader = _Reader.become(self)
                elif self._reader.error is not None:
                    error, self._reader = self._reader.error, None
                    raise error
                time.sleep(POLL_S)
                self._want(number)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{self.name}, split {self.split}: row {number * BLOCK_ROWS + 1} and on cannot be fetched "
                f"({type(error).__name__}: {one_line(error)}); expected a data set that can be reached, and "
                f"room in {self.folder}. Call it again: it goes on there"
            ) from error
        return table

    def _want(self, number: int) -> None:
        (self.folder / "want").write_text(str(number))


class _Reader:
    """The thread of the one process that fetches a stream; the lock ends with the process."""

    def __init__(self, lane: _Lane, lock: BinaryIO) -> None:
        self.lane, self.lock = lane, lock
        self.pid = os.getpid()
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._rows: Iterator[Any] | None = None
        self._stream: Any = None
        self._next = -1  # the block that the stream gives next
        self._thread = threading.Thread(target=self._run, daemon=True, name="stream")

    @classmethod
    def become(cls, lane: _Lane) -> _Reader | None:
        """This process fetches from now on; None if another one does."""
        lock = (lane.folder / "lock").open("ab")
        try:
            import fcntl

            # Of the process, not of the open file: a worker that is forked later does not hold it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except (ImportError, OSError):  # no locks here: each process fetches, and writes the same
            pass
        reader = cls(lane, lock)
        reader._thread.start()
        return reader

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                number = self._missing()
                if number is None:
                    self._stop.wait(POLL_S)
                else:
                    self._fetch(number)
        except Exception as error:
            self.error = error
        finally:
            self.lock.close()

    def _missing(self) -> int | None:
        """The block that somebody waits for, or the first of the ``AHEAD`` behind it that is not there."""
        try:
            wanted = int((self.lane.folder / "want").read_text())
        except (OSError, ValueError):
            return None
        rows = self.lane.num_rows
        behind = wanted + AHEAD if rows is None else min(wanted + AHEAD, -(-rows // BLOCK_ROWS))
        there = (number for number in range(wanted, behind) if not self._path(number, "arrow").is_file())
        return next(there, None)

    def _path(self, number: int, ending: str) -> Path:
        return self.lane.folder / f"{number:08}.{ending}"

    def _fetch(self, number: int) -> None:
        """Read on to block ``number``, and keep it and what lies before it."""
        if not 0 <= self._next <= number or self._rows is None:
            self._go_to(number)
        while self._rows is not None and self._next <= number and not self._stop.is_set():
            table = _gathered(islice(self._rows, BLOCK_ROWS))
            size = 0 if table is None else table.num_rows
            at = self._next
            if size < BLOCK_ROWS:  # said before anybody can see that this block is short
                self._rows, self._next = None, -1
                self._end(at * BLOCK_ROWS + size)
            else:
                with whole(self._path(at + 1, "json")) as file:
                    file.write(json.dumps(self._stream.state_dict()).encode())
                self._next += 1
            if table is not None and not self._path(at, "arrow").is_file():
                self.lane.spool.put(f"{at:08}", table.to_batches())

    def _go_to(self, number: int) -> None:
        """Open the stream at the last known beginning of a block that is not behind ``number``."""
        known = (n for n in range(number, 0, -1) if self._path(n, "json").is_file())
        self._next = next(known, 0)
        stream = self.lane.builder.as_streaming_dataset(split=self.lane.split).with_format("arrow")
        if self._next:
            stream.load_state_dict(json.loads(self._path(self._next, "json").read_bytes()))
        self._stream, self._rows = stream, iter(stream)

    def _end(self, rows: int) -> None:
        if not rows:
            raise DataError(f"{self.lane.name}, split {self.lane.split}: no rows; expected at least one")
        with whole(self.lane.folder / "end.json") as file:
            file.write(json.dumps({"rows": rows}).encode())


def _gathered(rows: Iterable[Any]) -> Any | None:
    """Tables of one row as one, with the bytes of pictures that they only name; None for no row."""
    import pyarrow as pa
    from datasets.table import embed_table_storage

    # Not in the library's own batches: it fails where the columns of two rows stand in another order.
    tables = [embed_table_storage(row) for row in rows]
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks() if tables else None


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row; where it comes from a tar shard, its json member is the row, as in ``data/tar.py``."""
    if "__key__" not in row:
        return row
    inner = row.get("json")
    inner = json.loads(inner) if isinstance(inner, str | bytes) else dict(inner or {})
    if row.get("txt") is not None and inner.get("text") is None:
        inner["text"] = row["txt"]
    pictures, sounds = (
        [row[key] for key in row if key.lower().endswith(endings) and row[key] is not None]
        for endings in (PICTURES, SOUNDS)
    )
    return with_media(inner, pictures, sounds)


class _BlockRows:
    """A stream whose length the data set's card states, as a file of rows."""

    def __init__(self, lane: _Lane, size: int) -> None:
        self.lane, self.size = lane, size
        self.path = Path(lane.name) / lane.split
        self.blocks: tuple[int, ...] | None = tuple(
            min(BLOCK_ROWS, size - at) for at in range(0, size, BLOCK_ROWS)
        )

    def __len__(self) -> int:
        return self.size

    def label(self, n: int) -> str:
        return str(n + 1)

    def members(self, n: int) -> None:
        return None

    def row(self, n: int) -> Any:
        try:
            return self.lane.row(n)
        except IndexError as error:
            raise DataError(
                f"{self.path}:{n + 1}: the data ended after {self.lane.num_rows:,} rows, and its card says "
                f"{self.size:,}; expected all of them. Name another revision"
            ) from error


class StreamRows(Rows):
    """Rows that come in order: the mixture shuffles blocks that are near each other only."""

    in_order = True


class Stream:
    """A source that ends nobody knows where; sample n counts up, and begins again behind the end.

    Rows are shuffled in windows of ``WINDOW`` blocks, each window in another order in each pass.
    """

    def __init__(
        self,
        lane: _Lane,
        convert: Convert,
        images: Path | None,
        sounds: Path | None = None,
        seed: int = 0,
    ) -> None:
        self.lane = lane
        self.convert = convert
        self.images, self.sounds = images, sounds
        self.seed = seed
        self._window: tuple[tuple[int, int], list[int]] | None = None

    def row_id(self, index: int) -> str:
        return f"{self.lane.name}/{self.lane.split}:{self._place(index) + 1}"

    def row(self, index: int) -> dict[str, Any]:
        return checked(self.lane.row(self._place(index)), self.row_id(index))

    def sample(self, index: int) -> Sample:
        folders = Folders(Path(self.lane.name), self.images, sounds=self.sounds)
        return converted(self.convert, self.row(index), self.row_id(index), folders)

    def close(self) -> None:
        self.lane.close()

    def _place(self, index: int) -> int:
        """The row of the stream that is the ``index``-th of our order."""
        window_rows = WINDOW * BLOCK_ROWS
        rows = self.lane.num_rows
        if rows is None:
            # How many rows are shuffled is known once the last block of the window is there, or none is.
            self.lane.reach((index // window_rows + 1) * WINDOW - 1)
            rows = self.lane.num_rows
        turn, at = (0, index) if rows is None else divmod(index, rows)
        number = at // window_rows
        size = window_rows if rows is None else min(window_rows, rows - number * window_rows)
        if self._window is None or self._window[0] != (turn, number):
            # Not a library's generator, whose order another version may change.
            key = f"{self.seed} {turn} {number}"
            order = sorted(range(size), key=lambda n: hashlib.sha1(f"{key} {n}".encode()).digest())
            self._window = (turn, number), order
        return number * window_rows + self._window[1][at % window_rows]
