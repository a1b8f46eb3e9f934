"""The benchmark of ranks asserts that they compute the same, and writes its record."""

from __future__ import annotations

import json

import pytest

from benchmarks import scaling
from benchmarks.scaling import MODES, Plan, rows_of
from benchmarks.shapes import TOY

PLAN = Plan(TOY["0.9B"], 1, 1, 2, "cpu")
FOUND = {
    "apart": {name: {"loss": 0.0, "gradient": 1e-7} for name in MODES},
    "seconds": {"one process": (2.0, 2.0)} | {name: (2.5, 5.0) for name in MODES},
    "samples": 20,
    "samples alone": 10,
}


def test_a_ratio_of_one_would_be_twice_the_work_in_the_same_time():
    clock, worked, *_ = rows_of(FOUND, PLAN)
    assert (clock.plain, clock.ours) == (5.0, 4.0)
    assert clock.ratio == pytest.approx(0.8)
    assert worked.ratio == pytest.approx(20 / 5.0 / (10 / 2.0))


def test_ranks_that_compute_something_else_are_no_result():
    wrong = FOUND | {"apart": FOUND["apart"] | {"fsdp": {"loss": 0.0, "gradient": 0.1}}}
    with pytest.raises(AssertionError, match="fsdp differs from one process"):
        rows_of(wrong, PLAN)


@pytest.mark.slow
def test_it_prints_a_table_and_writes_its_record(tmp_path, capsys):
    assert scaling.main(["--toy", "--quick", "--json", str(tmp_path / "record.json")]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["rows"][0]["name"] == "ddp, 2 ranks, on the clock"
    assert {"machine", "versions", "commit"} <= set(record)
    assert all(max(apart.values()) < 1e-5 for apart in record["equal"].values())
    assert "those of one process to" in capsys.readouterr().out
