from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kills

HERE = Path(__file__).parents[2]


def run(folder: Path, *words: str) -> tuple[int, dict]:
    record = folder / "kills.json"
    done = subprocess.run(
        [sys.executable, *words, "--json", str(record), "--folder", str(folder / "runs")],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert record.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(record.read_text())


@pytest.mark.slow
def test_killed_five_times_a_run_is_the_one_that_was_never_killed(tmp_path):
    code, found = run(tmp_path, "-m", "benchmarks.kills", "--quick")
    assert found["differences"] == []
    assert (code, found["kills"], found["resumed"], found["identical"]) == (0, 5, 5, True)
    assert found["compared"] == sorted(
        [
            "weights",
            "optimizer",
            "random state",
            "place in the data",
            "rest of the checkpoint",
            "progress",
            "checkpoints",
            "metrics",
            "samples of every step",
            "skipped rows",
        ]
    )


FORGETFUL = """
import sys
from tinymodal.train import checkpoint
checkpoint.set_random_state = lambda state: None
from benchmarks.kills import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_goes_on_with_other_random_numbers_is_found_out(tmp_path):
    """Dropout alone is enough to tell: the comparison can fail."""
    code, found = run(tmp_path, "-c", FORGETFUL, "--kills", "6", "--seed", "2")
    assert (code, found["identical"]) == (1, False)
    assert any("weights" in what for what in found["differences"])


def test_the_first_place_where_two_outcomes_differ_is_named():
    one = {"metrics": [{"loss": 1.0}, {"loss": 2.0}], "progress": {"step": 3}}
    other = {"metrics": [{"loss": 1.0}, {"loss": 2.5}], "progress": {"step": 3}}
    assert kills._compare(one, one) == []
    assert kills._compare(one, other) == ["metrics[1][loss]: 2.0 and 2.5"]
    assert kills._compare(one, one | {"metrics": []}) == [f"metrics: {one['metrics']} and []"]


def test_a_line_that_a_kill_cut_off_is_no_step(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"stage": "a", "step": 1, "ids": []}\n{"stage": "a", "st')
    assert [row["step"] for row in kills._samples(tmp_path)] == [1]
