"""docs/results.md says what the records say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"machine": {"cores": 2, "processor": "a processor", "threads": 1}, "time": "2026-11-21T22:00:00"}
MADE = {**MACHINE, "versions": {"torch": "2", "transformers": "5"}, "commit": "0123456789abcdef"}


@pytest.fixture(scope="module")
def fill():
    spec = importlib.util.spec_from_file_location("docs_fill_results", ROOT / "docs" / "fill_results.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_says_what_the_records_say(fill):
    assert fill.PAGE.read_text() == fill.page(fill.read()), "stale; run python docs/fill_results.py"


def test_a_row_is_shown_with_its_ratio_and_a_quick_run_is_named(fill):
    row = {"name": "speed", "ratio": 3.0, "ours": 6.0, "plain": 2.0, "unit": "samples/s"}
    alone = {"name": "size", "ratio": None, "ours": 1.68, "plain": None, "unit": "MB"}
    text = fill.page({"train_step": {"rows": [row, alone], "quick": True, **MADE}})
    assert "| speed | 6 | 2 | samples/s | **3.00** |" in text
    assert "| size | 1.68 |  | MB |  |" in text
    assert "quick run" in text
    assert "`0123456789`, 2026-11-21" in text


def test_a_card_is_named_and_records_stand_in_order(fill, tmp_path):
    for name in ("other", "kills", "gpu-h200", "train_step"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": [], **MADE}))
    found = fill.read(tmp_path)
    assert list(found) == ["train_step", "gpu-h200", "kills", "other"]
    found["gpu-h200"]["card"] = "NVIDIA H200"
    assert "## On one GPU: NVIDIA H200" in fill.page(found)


def test_kills_that_left_a_difference_are_told(fill):
    record = {"kills": 50, "resumed": 50, "identical": False, **MADE}
    assert "identical: False" in fill.page({"kills": record})


def test_a_broken_record_is_named(fill, tmp_path):
    (tmp_path / "train_step.json").write_text("{")
    with pytest.raises(fill.RecordError, match=r"train_step\.json: not JSON"):
        fill.read(tmp_path)
    with pytest.raises(fill.RecordError, match=r"train_step\.json lacks the key 'machine'"):
        fill.page({"train_step": {"rows": []}})
