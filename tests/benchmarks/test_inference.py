"""The benchmark of answering asserts that replies are the same, and writes its record."""

from __future__ import annotations

import json

import PIL.Image
import pytest

from benchmarks import inference


def test_a_made_photo_has_the_bytes_of_a_real_one(tmp_path):
    path = inference.picture(tmp_path / "a.jpg", (800, 600), 1)
    with PIL.Image.open(path) as shown:
        assert shown.size == (800, 600)
    # 12 megapixels of a phone are 2 to 6 MB.
    assert 2e6 < path.stat().st_size * 25 < 12e6
    assert path.read_bytes() != inference.picture(tmp_path / "b.jpg", (800, 600), 2).read_bytes()


def test_replies_that_differ_are_no_result(monkeypatch):
    from tests.infer.test_engine import QUESTIONS
    from tinymodal.compose.tiny import tiny_model
    from tinymodal.infer.engine import Engine, Sampling

    own = Engine.reply

    def wrong(self, samples, *given):
        return own(self, samples if len(samples) == 1 else samples[::-1], *given)

    monkeypatch.setattr(Engine, "reply", wrong)
    with pytest.raises(AssertionError, match="the replies differ"):
        inference.together("tiny", tiny_model(), QUESTIONS, Sampling(max_new_tokens=4), 1)


@pytest.mark.slow
def test_it_prints_a_table_and_writes_its_record(tmp_path, capsys):
    assert inference.main(["--quick", "--toy", "--json", str(tmp_path / "record.json")]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert rows["starter: language model in 8 bits, against float32"]["ratio"] > 3
    assert rows["starter: answers of 120 that are the same in 8 bits"]["ours"] >= 95
    assert len(rows) == 14
    assert {"machine", "versions", "commit"} <= set(record)
    assert "against one by one" in capsys.readouterr().out
