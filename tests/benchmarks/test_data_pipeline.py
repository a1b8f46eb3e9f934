"""The benchmark of the data pipeline compares like with like, and writes its record."""

from __future__ import annotations

import json

import torch

from benchmarks import data_pipeline
from benchmarks.data_pipeline import apart, made, ours, pillow, transformers_way


def test_all_three_ways_make_the_same_picture_within_two_levels():
    data = made(100, 140, seed=3)
    level = 1 / 127.5
    for plain in (pillow, transformers_way()):
        torch.testing.assert_close(ours(data), plain(data), rtol=0, atol=2.01 * level)
    found = apart([data])
    assert found["largest"] <= 2
    assert found["differ"] < 0.02
    assert found["decoded_equal"] == 1


def test_a_picture_that_is_read_wrongly_would_be_seen(monkeypatch):
    data = made(100, 140, seed=3)
    right = data_pipeline.ours
    monkeypatch.setattr(data_pipeline, "ours", lambda data: right(data).flip(2))
    assert apart([data])["largest"] > 20


def test_it_prints_a_table_and_writes_its_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data_pipeline, "SIZES", {"small": (48, 64)})
    monkeypatch.setattr(data_pipeline, "WIDTH", 16)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(made(40, 50, seed=0))
    photos = ["--photos", str(tmp_path / "photos")]
    assert data_pipeline.main(["--quick", "--json", str(tmp_path / "record.json"), *photos]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    names = [row["name"] for row in record["rows"]]
    assert names[:2] == ["small, against Pillow", "small, against transformers"]
    assert "photographs, against Pillow" in names
    assert set(record["rows"][0]) == {"name", "ratio", "ours", "plain", "unit"}
    assert {"machine", "versions", "commit"} <= set(record)
    assert record["quick"] is True
    assert record["pixels"]["small"]["largest"] <= 2
    assert "pictures/s" in capsys.readouterr().out
