"""Each benchmark runs, and writes the record that the page is made of."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu, memory, train_step

ROW = {"name", "ratio", "ours", "plain", "unit"}


def rows_of(path):
    record = json.loads(path.read_text())
    assert {"rows", "machine", "versions", "commit"} <= set(record)
    assert record["quick"] is True
    assert all(set(row) == ROW for row in record["rows"])
    return {row["name"]: row for row in record["rows"]}


@pytest.mark.slow
def test_train_step(tmp_path, capsys):
    file = tmp_path / "record.json"
    assert train_step.main(["--smoke", "--json", str(file), "--shapes", "0.9B"]) == 0
    rows = rows_of(file)
    for kind in ("pretrain", "sft"):
        assert rows[f"0.9B {kind}: samples a CPU second"]["ratio"] > 0
        assert rows[f"0.9B {kind}, real sizes: GFLOP a sample"]["ratio"] > 1
        loss = rows[f"0.9B {kind}: loss"]
        assert loss["ours"] == pytest.approx(loss["plain"], rel=2e-5)
    assert "second epoch" in capsys.readouterr().out


@pytest.mark.slow
def test_memory(tmp_path):
    file = tmp_path / "record.json"
    assert memory.main(["--smoke", "--quick", "--json", str(file), "--shapes", "0.9B"]) == 0
    rows = rows_of(file)
    assert rows["0.9B sft, bfloat16, no recomputation: activations"]["ratio"] > 1


@pytest.mark.slow
def test_gpu_on_a_processor(tmp_path):
    file = tmp_path / "record.json"
    asked = ["--device", "cpu", "--quick", "--shapes", "0.9B", "--stages", "sft", "--json", str(file)]
    assert gpu.main(asked) == 0
    assert rows_of(file)["0.9B sft: tokens a second"]["ours"] > 0
    assert json.loads(file.read_text())["card"] == "none"


def test_without_a_gpu_nothing_is_measured_and_that_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 0
    assert "no GPU" in capsys.readouterr().out
