import io
import json
import multiprocessing
import os
import pickle
import tarfile
import threading

import PIL.Image
import pytest

from tinymodal.core.errors import DataError
from tinymodal.data import hub
from tinymodal.data.hub import RemoteParquet, Stream, StreamRows, open_hub
from tinymodal.data.sources import Rows, open_source

datasets = pytest.importorskip("datasets", reason="reading data sets of the Hub needs datasets")
pa = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYMODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(hub, "BLOCK_ROWS", 4)
    monkeypatch.setattr(hub, "WINDOW", 2)
    monkeypatch.setattr(hub, "AHEAD", 3)


def rows(count, start=0):
    return [{"question": f"Q{n}", "answer": "A", "image": None} for n in range(start, start + count)]


@pytest.fixture
def tables(tmp_path):
    """Two csv files of 13 and 10 rows, which have no readers of their own here, so they are streamed."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for name, part in {"train-0": rows(13), "train-1": rows(10, 13)}.items():
        lines = ["question,answer,image", *(f"{r['question']},{r['answer']}," for r in part)]
        (folder / f"{name}.csv").write_text("\n".join(lines))
    return folder


def questions(source, numbers):
    return [source.sample(n).messages[0].parts[-1].text for n in numbers]


# --- files on this machine ------------------------------------------------------------------------


def test_data_files_on_this_machine_are_read_in_any_order_by_our_own_readers(tmp_path):
    import pyarrow.parquet as pq

    folder = tmp_path / "files"
    folder.mkdir()
    for n in range(2):
        table = pa.Table.from_pylist(rows(5, 5 * n))
        pq.write_table(table, folder / f"train-{n:05}-of-00002.parquet", row_group_size=2)
    source = open_hub(str(folder), "train", "vqa")
    assert isinstance(source, Rows)
    assert questions(source, [9, 0, 4]) == ["Q9", "Q0", "Q4"]
    assert source.row_id(9) == f"{folder}/train-00001-of-00002.parquet:5"
    with pytest.raises(DataError, match=r"no split 'valid'; expected one of train"):
        open_hub(str(folder), "valid", "vqa")


def test_a_saved_data_set_is_read_in_any_order_and_keeps_what_was_selected(tmp_path):
    made = datasets.Dataset.from_list(rows(20)).select([7, 3, 11])
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(tmp_path / "two")
    for folder in ("one", "two"):
        source = open_hub(str(tmp_path / folder), "train", "vqa")
        assert questions(source, [2, 0, 1]) == ["Q11", "Q7", "Q3"]
        assert questions(pickle.loads(pickle.dumps(source)), [1]) == ["Q3"]
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.map(source.row_id, [0]) == [f"{tmp_path / folder}/rows:1"]
    with pytest.raises(DataError, match=r"no split 'valid'; expected one of train, test"):
        open_hub(str(tmp_path / "two"), "valid", "vqa")


def test_what_is_no_data_set_is_told_in_one_line(tmp_path):
    for name in ("nobody/nothing", str(tmp_path / "none")):
        with pytest.raises(DataError, match="cannot be opened as a data set") as error:
            open_hub(name, "train", "vqa")
        assert "\n" not in str(error.value)


def test_without_datasets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'tinymodal\[hub\]'"):
        open_hub("org/name", "train", "vqa")


# --- parquet behind a URL -------------------------------------------------------------------------


@pytest.fixture
def far(tmp_path):
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows(25)), tmp_path / "far.parquet", row_group_size=4)
    return RemoteParquet(f"file://{tmp_path / 'far.parquet'}")


def test_parquet_behind_a_url_is_read_by_group_in_any_order(far, monkeypatch):
    assert far.blocks == (4,) * 6 + (1,)
    assert [far.row(n) for n in (24, 0, 7, 7, 23)] == [rows(25)[n] for n in (24, 0, 7, 7, 23)]
    there = pickle.loads(pickle.dumps(far))
    monkeypatch.setattr(RemoteParquet, "_fetched", lambda *_: pytest.fail("fetched again"))
    assert far.row(6) == rows(25)[6]
    assert there.row(1) == rows(25)[1]


def test_a_group_is_fetched_once_for_all_processes(far, tmp_path, monkeypatch):
    fetched = RemoteParquet._fetched

    def counted(self, number):
        with (tmp_path / "fetched").open("a") as file:
            file.write(f"{number} ")
        return fetched(self, number)

    monkeypatch.setattr(RemoteParquet, "_fetched", counted)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(far.row, range(25), chunksize=1) == rows(25)
    assert sorted((tmp_path / "fetched").read_text().split()) == [str(n) for n in range(7)]
    assert not list(tmp_path.rglob("*.part"))
    assert not list((tmp_path / "cache").rglob("*.lock"))


def test_what_cannot_be_fetched_is_told_by_row(far, tmp_path, monkeypatch):
    (tmp_path / "far.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(DataError, match=r"far.parquet:6: cannot be fetched") as error:
        far.row(5)
    assert "\n" not in str(error.value)


def test_a_file_that_changes_behind_its_url_is_told(far, tmp_path):
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows(26)), tmp_path / "far.parquet", row_group_size=4)
    with pytest.raises(DataError, match=r"far.parquet: has changed since it was opened"):
        far.row(5)


def test_stretches_that_were_used_longest_ago_go_when_there_is_no_room(far, tmp_path, monkeypatch):
    far.row(0)
    (first,) = (tmp_path / "cache").rglob("*.arrow")
    monkeypatch.setenv("TINYMODAL_SPOOL_GB", str(2.5 * first.stat().st_size / 1e9))
    for n in range(0, 25, 4):
        far.row(n)
    kept = sorted(path.name for path in (tmp_path / "cache").rglob("*.arrow"))
    assert kept == ["000005.arrow", "000006.arrow"]
    assert far.row(0) == rows(1)[0]


def test_a_heavy_group_of_a_local_file_is_mapped_and_not_kept_in_memory(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    from tinymodal.data import sources

    pq.write_table(pa.Table.from_pylist(rows(300)), tmp_path / "rows.parquet", row_group_size=150)
    plain = open_source(tmp_path / "rows.parquet", "vqa")
    expected = [plain.row(n) for n in range(300)]
    monkeypatch.setattr(sources, "HEAVY_BYTES", 0)
    heavy = open_source(tmp_path / "rows.parquet", "vqa")
    before = pa.total_allocated_bytes()
    assert [heavy.row(n) for n in range(300)] == expected
    assert pa.total_allocated_bytes() - before < 1000  # mapped pages are no allocation
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 2

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setenv("TINYMODAL_CACHE", str(tmp_path / "full"))
    assert open_source(tmp_path / "rows.parquet", "vqa").row(299) == expected[299]
    assert not list((tmp_path / "full").rglob("*.arrow"))


# --- streams --------------------------------------------------------------------------------------


def test_a_stream_of_unknown_length_shuffles_in_windows_and_begins_again(tables):
    source = open_hub(str(tables), "train", "vqa", seed=3)
    assert isinstance(source, Stream)
    order = questions(source, range(46))
    source.close()
    for turn in (order[:23], order[23:]):
        assert sorted(turn) == sorted(r["question"] for r in rows(23))
        for start in range(0, 23, 8):  # two blocks of 4
            window = {f"Q{n}" for n in range(start, min(start + 8, 23))}
            assert set(turn[start : start + 8]) == window
    assert order[:23] != order[23:]
    assert order[:8] != [f"Q{n}" for n in range(8)]


def test_the_order_is_a_function_of_the_position_alone(tables, tmp_path, monkeypatch):
    """Whoever asks first, and whatever is already there."""
    first = open_hub(str(tables), "train", "vqa", seed=3)
    order = questions(first, range(46))
    first.close()
    for n in (45, 22, 7, 8, 30):
        monkeypatch.setenv("TINYMODAL_CACHE", str(tmp_path / f"cache{n}"))
        source = open_hub(str(tables), "train", "vqa", seed=3)
        assert questions(source, [n, 0, 45, n - 1]) == [order[m] for m in (n, 0, 45, n - 1)]
        source.close()
    other = open_hub(str(tables), "train", "vqa", seed=4)
    assert questions(other, range(8)) != order[:8]
    other.close()


def test_blocks_that_went_are_fetched_again_from_where_they_begin(tables, tmp_path, monkeypatch):
    source = open_hub(str(tables), "train", "vqa")
    order = questions(source, range(23))
    source.close()
    for path in (tmp_path / "cache").rglob("*.arrow"):
        path.unlink()
    opened = []
    really = datasets.IterableDataset.load_state_dict
    monkeypatch.setattr(
        datasets.IterableDataset,
        "load_state_dict",
        lambda self, state: (opened.append(state), really(self, state))[1],
    )
    again = open_hub(str(tables), "train", "vqa")
    assert questions(again, [20, 3]) == [order[20], order[3]]
    assert opened  # in the middle, not from the front
    again.close()


def _ask(source, numbers, results):
    results.put([source.sample(n).messages[0].parts[-1].text for n in numbers])
    results.close()
    results.join_thread()
    os._exit(0)


def test_of_several_processes_one_fetches_and_all_read_the_same(tables, tmp_path):
    source = open_hub(str(tables), "train", "vqa")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    shares = [range(n, 46, 3) for n in range(3)]
    workers = [context.Process(target=_ask, args=(source, share, results)) for share in shares]
    for worker in workers:
        worker.start()
    got = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    expected = questions(source, range(46))
    source.close()
    assert sorted(map(sorted, got)) == sorted(sorted(expected[n] for n in share) for share in shares)


def _lead(source, ready):
    source.sample(0)
    ready.set()
    threading.Event().wait(60)


def test_when_the_one_that_fetches_is_killed_another_goes_on(tables):
    source = open_hub(str(tables), "train", "vqa")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    leader = context.Process(target=_lead, args=(source, ready))
    leader.start()
    assert ready.wait(60)
    leader.kill()
    leader.join()
    assert sorted(questions(source, range(23))) == sorted(r["question"] for r in rows(23))
    source.close()


def test_what_goes_wrong_while_fetching_is_told_and_the_next_call_goes_on(tables, monkeypatch):
    source = open_hub(str(tables), "train", "vqa")
    with monkeypatch.context() as patch:
        patch.setattr(hub, "_gathered", lambda rows: (_ for _ in ()).throw(OSError("the line is dead")))
        with pytest.raises(
            DataError, match=r"tables, split train: row 5 and on cannot be fetched \(OSError: the"
        ):
            source.sample(0)
    assert sorted(questions(source, range(23))) == sorted(r["question"] for r in rows(23))
    source.close()


def with_card(folder, count):
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n"
        + "".join(f"  - name: {name}\n    dtype: string\n" for name in ("question", "answer", "image"))
        + f"  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: {count}\n---\n"
    )


def test_a_stream_whose_card_states_its_length_is_numbered_in_blocks_and_read_in_order(tables):
    with_card(tables, 23)
    source = open_hub(str(tables), "train", "vqa")
    assert isinstance(source, StreamRows)
    assert source.in_order
    assert len(source) == 23
    assert source.blocks == (4,) * 5 + (3,)
    assert questions(source, range(23)) == [r["question"] for r in rows(23)]
    assert source.row_id(22) == f"{tables}/train:23"
    assert questions(pickle.loads(pickle.dumps(source)), [3]) == ["Q3"]
    source.files[0].lane.close()


def test_a_stream_that_ends_before_its_card_says_is_told(tables):
    with_card(tables, 30)
    source = open_hub(str(tables), "train", "vqa")
    with pytest.raises(DataError, match=r"train:26: the data ended after 23 rows, and its card says 30"):
        source.row(25)
    source.files[0].lane.close()


def test_a_folder_of_pictures_is_streamed_with_their_bytes(tmp_path):
    folder = tmp_path / "photos" / "train"
    folder.mkdir(parents=True)
    for n in range(5):
        PIL.Image.new("RGB", (4, 4), (n, 0, 0)).save(folder / f"{n}.png")
    lines = [{"file_name": f"{n}.png", "caption": f"photo {n}"} for n in range(5)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_hub(str(tmp_path / "photos"), "train", "caption")
    for n in range(5):
        sample = source.sample(n)
        number = int(sample.messages[1].parts[0].text.removeprefix("photo "))
        assert next(sample.media()).source == (folder / f"{number}.png").read_bytes()
    source.close()


def test_tar_files_that_are_streamed_give_the_rows_that_our_own_reader_gives(tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for n in range(6):
            file = io.BytesIO()
            PIL.Image.new("RGB", (4, 4), (n, 0, 0)).save(file, "PNG")
            row = json.dumps({"caption": f"photo {n}"}).encode()
            for ending, raw in {"png": file.getvalue(), "json": row}.items():
                info = tarfile.TarInfo(f"{n}.{ending}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    ours = open_hub(str(folder), "train", "caption")
    assert isinstance(ours, Rows)  # on this machine
    monkeypatch.setattr(hub, "READABLE", {})  # as if it were far away
    theirs = open_hub(str(folder), "train", "caption")
    assert isinstance(theirs, Stream)
    expected = {s.messages for s in map(ours.sample, range(6))}
    assert {s.messages for s in map(theirs.sample, range(6))} == expected
    theirs.close()
