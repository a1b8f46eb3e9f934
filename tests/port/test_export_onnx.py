"""Graphs compute what the model does: any number of rows, positions and tiles, and steps over a cache."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.port.exported import NEXT, a_job, a_model
from tinymodal.core.errors import ExportError
from tinymodal.port import onnx_graphs
from tinymodal.port.export import export
from tinymodal.port.onnx_graphs import bias_of
from tinymodal.port.onnx_run import Graphs
from tinymodal.port.proof import Options

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_a_model_of_tiles_and_marks_computes_the_same_in_onnxruntime(tmp_path):
    """LLaVA-NeXT: several tiles a picture, a learned newline, grouped keys; prompts and cached steps."""
    a_model(tmp_path / "ours", language="qwen3", sight=NEXT)
    done = export(str(tmp_path / "ours"), "onnx", tmp_path / "out", Options(num_prompts=6))
    assert done.passed
    assert done.proof.parity.largest <= 1e-4
    assert [check.passed for check in done.proof.checks] == [True]
    assert len({row.texts[0] for row in done.proof.parity.rows}) > 1
    assert {"image.onnx", "embed.onnx", "decoder.onnx", "graphs.json", "tokenizer.json"} <= set(done.files)

    # A batch of two, stepped together, against each alone: what a program that serves would do.
    graphs, job = Graphs(tmp_path / "out"), a_job(tmp_path / "ours")
    both = dict(job.composed.processor(text=["one two", "what is it there?"]))
    mask = both["attention_mask"].numpy()
    logits, past = graphs.step(graphs.embedded(both), mask, np.maximum(mask.cumsum(1) - 1, 0))
    for _ in range(3):
        ids = logits[:, -1].argmax(-1)[:, None]
        mask = np.concatenate((mask, np.ones((2, 1), np.int64)), 1)
        (x,) = graphs.words.run(None, {"input_ids": ids})
        logits, past = graphs.step(x, mask, mask.sum(1, keepdims=True) - 1, past)
        both["input_ids"] = torch.cat((both["input_ids"], torch.from_numpy(ids)), 1)
    at = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
    with torch.no_grad():
        ours = job.composed.model(
            input_ids=both["input_ids"], attention_mask=torch.from_numpy(mask), position_ids=at
        ).logits[:, -1]
    assert float((torch.from_numpy(logits[:, -1]) - ours).abs().max()) <= 1e-4


def test_what_a_position_may_look_at_is_what_is_before_it_and_no_padding():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    seen = bias_of(mask, torch.zeros(2, 2, 8)) == 0
    assert seen.shape == (2, 1, 2, 4)
    assert seen[0, 0].tolist() == [[False, True, True, False], [False, True, True, True]]
    assert seen[1, 0].tolist() == [[True, True, True, False], [True, True, True, True]]
    whole = bias_of(mask, torch.zeros(2, 4, 8)) == 0
    assert whole[0, 0, 0].tolist() == [True, False, False, False]  # itself, though it is padding


def test_a_part_that_cannot_be_traced_is_named(tmp_path, monkeypatch):
    job = a_job(a_model(tmp_path / "ours"))

    def no(*args, **kwargs):
        raise RuntimeError("no lowering for aten.frobnicate\nmore")

    monkeypatch.setattr(torch.onnx, "export", no)
    with pytest.raises(
        ExportError, match="vision: torch cannot write it as a graph: RuntimeError: no lowering"
    ) as e:
        onnx_graphs.write(job, tmp_path / "out")
    assert "\n" not in str(e.value)


def test_attention_is_put_back_as_it_was(tmp_path):
    job = a_job(a_model(tmp_path / "ours"))
    model = job.composed.model
    before = [
        getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")
    ]
    with onnx_graphs.written_out(model):
        assert model.model.language_model.config._attn_implementation == "eager"
    assert before == [
        getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")
    ]


@pytest.mark.slow
def test_the_starter_sees_and_hears_in_onnxruntime(tmp_path):
    done = export("starter", "onnx", tmp_path / "out", Options(without=("speech",)))
    assert done.passed
    assert {row.case.split()[-1] for row in done.proof.parity.rows} >= {"picture", "words", "sound"}
    about = json.loads((tmp_path / "out" / "graphs.json").read_text())
    assert set(about["media"]) == {"image", "audio"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [
        {"vision": "siglip_vision_model", "connector": "perceiver", "language": "llama", "audio": "whisper"},
        {"vision": "dinov2", "connector": "avg_pool", "language": "gemma", "sight": {"resize": "tiles"}},
        {"vision": None, "language": "phi", "audio": "wav2vec2", "hearing": {"connector": "pool_frames"}},
    ],
    ids=["siglip-perceiver-whisper", "dinov2-tiles-gemma", "wav2vec2-phi"],
)
def test_other_compositions_compute_the_same(tmp_path, what):
    if what["vision"] is None:
        what = {**what, "connector": "mlp", "sight": {}}
    else:
        what = {"sight": {"resize": "square"}, **what}
    a_model(tmp_path / "ours", **what)
    assert export(str(tmp_path / "ours"), "onnx", tmp_path / "out", Options(num_prompts=6)).passed
