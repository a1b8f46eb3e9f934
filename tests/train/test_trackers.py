"""Trackers follow ``metrics.jsonl``. A stand-in shows the order; the real packages run where they are."""

from __future__ import annotations

import json
import sqlite3
import sys
import types

import pytest

from tinymodal.core.errors import RecipeError
from tinymodal.core.log import Metrics
from tinymodal.train import trackers
from tinymodal.train.trackers import Trackers, numbers, require


def train(n, stage="align"):
    return {"stage": stage, "step": n, "loss": 10.0 - n, "lr": 0.1, "samples": 3}


PLAN = [
    train(1),
    train(2),
    {"stage": "align", "step": 2, "held_out": 5.0},
    {"stage": "chat", "step": 1, "loss": None, "skipped": "no loss", "lr": 0.1},
    train(2, "chat"),
    {"stage": "chat", "step": 2, "held_out": 4.0},
]


class Remembers:
    """Keeps what it is handed, over all its openings."""

    seen: list
    opened: list
    fails_at: int | None

    def __init__(self, folder, title, run_id, config, begin):
        type(self).opened.append((run_id, begin))

    def log(self, row, step):
        if step == type(self).fails_at:
            raise OSError("no network")
        type(self).seen.append((step, numbers(row)))

    def close(self, failed):
        type(self).opened.append(failed)


@pytest.fixture
def remembers(monkeypatch):
    class Fresh(Remembers):
        seen, opened, fails_at = [], [], None

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Fresh)
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    monkeypatch.setattr(trackers, "require", lambda wanted: None)
    return Fresh


def run(folder, wanted, rows, begin=0, until=None, kill=False):
    """Write and hand over rows ``begin`` to ``until``, as a run that goes on from a checkpoint there."""
    metrics = Metrics(folder / "metrics.jsonl")
    metrics.flush()
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    metrics.rewind(sum(map(len, lines[:begin])))
    following = Trackers(wanted, folder, "tiny")
    for row in rows[begin:until]:
        metrics.log(row)
        metrics.flush()
        following.log(row)
    metrics.close()
    if not kill:
        following.close()
    return following


EXPECTED = [
    (1, {"loss": 9.0, "lr": 0.1, "samples": 3}),
    (2, {"loss": 8.0, "lr": 0.1, "samples": 3}),
    (2, {"held_out": 5.0}),
    (3, {"lr": 0.1}),
    (4, {"loss": 8.0, "lr": 0.1, "samples": 3}),
    (4, {"held_out": 4.0}),
]


def test_rows_come_once_each_with_the_step_of_the_whole_run(tmp_path, remembers):
    run(tmp_path, ["wandb"], PLAN)
    assert remembers.seen == EXPECTED


@pytest.mark.parametrize(
    ("saved", "killed"), [(saved, killed) for killed in range(7) for saved in range(killed + 1)]
)
def test_a_run_that_goes_on_doubles_and_misses_no_point(tmp_path, remembers, saved, killed):
    run(tmp_path, ["wandb"], PLAN, until=killed, kill=True)
    run(tmp_path, ["wandb"], PLAN, begin=saved)
    assert remembers.seen == EXPECTED
    (first, _), (second, _), _ = remembers.opened
    assert first == second


def test_a_tracker_that_is_added_later_is_handed_all_that_came_before(tmp_path, remembers):
    run(tmp_path, [], PLAN, until=3)
    run(tmp_path, ["wandb"], PLAN, begin=3)
    assert remembers.seen == EXPECTED


def test_one_that_fails_is_left_out_and_the_training_goes_on(tmp_path, remembers, capsys):
    remembers.fails_at = 3
    run(tmp_path, ["wandb"], PLAN)
    assert remembers.seen == EXPECTED[:3]
    assert "tracker wandb: left out from step 3 on: OSError: no network" in capsys.readouterr().err
    remembers.fails_at = None  # started again, it is handed what it missed
    run(tmp_path, ["wandb"], PLAN, begin=6)
    assert remembers.seen == EXPECTED


def test_one_that_cannot_be_opened_is_told_before_the_training(tmp_path, remembers, monkeypatch):
    def refuse(*_):
        raise RuntimeError("api_key not configured\nand more")

    monkeypatch.setattr(remembers, "__init__", refuse)
    with pytest.raises(
        RecipeError, match=r"trackers: wandb could not be opened.*api_key not configured and more\. Log"
    ):
        Trackers(["wandb"], tmp_path, "tiny")


def test_a_package_that_is_missing_names_the_extra():
    with pytest.raises(
        RecipeError, match=r"'nowhere' needs the package nowhere; pip install 'tinymodal\[nowhere\]'"
    ):
        require(["nowhere"])


def test_what_a_tracker_prints_does_not_reach_the_results(tmp_path, remembers, monkeypatch, capsys):
    monkeypatch.setattr(remembers, "log", lambda self, row, step: print("hello"))
    run(tmp_path, ["wandb"], PLAN[:1])
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "hello\n")


def test_a_broken_place_begins_a_new_tracker_run(tmp_path, remembers):
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / "wandb.json").write_text('{"run": "ab')
    run(tmp_path, ["wandb"], PLAN)
    assert remembers.seen == EXPECTED
    place = json.loads((tmp_path / "trackers" / "wandb.json").read_text())
    assert place == {"run": remembers.opened[0][0], "rows": 6}


@pytest.mark.parametrize(("first", "second"), [(1, 3), (2, 2), (0, 0), (5, 5)])
def test_tensorboard_shows_every_point_once_after_kills(tmp_path, monkeypatch, first, second):
    """The real one: what was written of steps that are done again is forgotten by its reader."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Files of one second are read by their number as text: 10 before 9. Starts of a run are seconds apart.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))

    run(tmp_path, ["tensorboard"], PLAN, until=5, kill=True)
    run(tmp_path, ["tensorboard"], PLAN, begin=first, until=max(second, 4), kill=True)
    run(tmp_path, ["tensorboard"], PLAN, begin=second)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 9.0), (2, 8.0), (4, 8.0)]
    assert [(e.step, e.value) for e in events.Scalars("held_out")] == [(2, 5.0), (4, 4.0)]
    assert [e.step for e in events.Scalars("lr")] == [1, 2, 3, 4]


def records(kept):
    """Of wandb's file: 7 bytes, then records of a checksum, a length and a kind, as in LevelDB's log."""
    at = 7
    assert len(kept) < 32_768  # behind that a record may be cut in two
    while at < len(kept):
        length = int.from_bytes(kept[at + 4 : at + 6], "little")
        yield kept[at + 7 : at + 7 + length]
        at += 7 + length


def test_wandb_offline_keeps_the_run_in_its_folder(tmp_path, monkeypatch):
    """The real one, without a network."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, ["wandb"], PLAN, until=5)
    run(tmp_path, ["wandb"], PLAN, begin=1)
    kept, ids = [], set()
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = {
                    "/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
                }
                kept.append((items["_step"], items.get("loss"), items.get("held_out")))
    assert len(ids) == 1
    assert kept == [(1, 9.0, None), (2, 8.0, 5.0), (3, None, None), (4, 8.0, None), (4, None, 4.0)]


def test_trackio_keeps_every_point_once(tmp_path, monkeypatch):
    """The real one, in a folder of its own."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.utils import TRACKIO_DIR

    if str(tmp_path) not in str(TRACKIO_DIR):
        pytest.skip("trackio was loaded before this test")
    run(tmp_path, ["trackio"], PLAN, until=5)
    run(tmp_path, ["trackio"], PLAN, begin=1)
    with sqlite3.connect(tmp_path / "trackio" / "tinymodal.db") as base:
        found = base.execute("select step, metrics, run_name from metrics order by id").fetchall()
    told = [(step, json.loads(text)) for step, text, _ in found]
    assert [(step, {k: v for k, v in row.items() if k != "stage"}) for step, row in told] == EXPECTED
    assert len({name for *_, name in found}) == 1
