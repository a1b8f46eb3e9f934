from __future__ import annotations

import io

import pytest
from rich.console import Console

from tinymodal.core.errors import DataError, RecipeError
from tinymodal.data.synthetic import Scenes
from tinymodal.train import preview as room
from tinymodal.train.preview import memory, preview
from tinymodal.train.stage_data import stage_loader

from . import talk
from .talk import Spoilt, Talk


def shown(recipe, **console) -> str:
    out = io.StringIO()
    preview(recipe, Console(file=out, width=500, highlight=False, **console))
    return out.getvalue()


def test_it_tells_who_trains_what_a_picture_costs_and_how_much_memory(recipe):
    text = shown(recipe(train={"connectors": 1e-3}, steps=7))
    assert "a picture of 24x24 px: 6x6 -> 3x3 = 9 tokens" in text
    assert "stage only: 7 steps of 128 tokens (896 in all)" in text
    assert "connectors          5,440  trains at 0.001" in text
    assert "vision             19,808  frozen" in text
    assert "MB weights + " in text


def test_it_tells_where_the_model_will_run(recipe):
    lines = shown(recipe()).splitlines()
    at = lines.index("where it will run, with tinymodal export --to:")
    told = [line.split()[:2] for line in lines[at + 1 : at + 5]]
    assert told == [["hub", "transformers"], ["llava", "no"], ["gguf", "llama.cpp,"], ["onnx", "onnxruntime"]]
    assert "vision.connector: 'pixel_shuffle'; Llava's is 'mlp' of two layers" in lines[at + 2]


def test_one_row_is_shown_whole_and_exactly_what_trains_is_marked(recipe):
    text = shown(recipe(seq_len=256, batch_tokens=256))
    row = text[text.index("first row:") :]
    shown_ids = [line.split(":")[0].strip() for line in row.splitlines() if line.startswith("  talk-0/")]
    assert len(shown_ids) >= 3
    for name in shown_ids:
        sample = Talk().sample(int(name.split("/")[1]))
        question, answer = (message.parts[-1].text for message in sample.messages)
        picture = "[image: 6x6 -> 9 tokens]\n" if len(sample.messages[0].parts) == 2 else ""
        assert (
            f"  {name}: <|im_start|>user\n{picture}{question}<|im_end|>\n"
            f"<|im_start|>assistant\n«{answer}<|im_end|>»\n" in row
        )
    assert row.count("«") == len(shown_ids) + 1  # and the legend


def test_where_there_are_colours_the_trained_words_are_green(recipe):
    text = shown(recipe(), force_terminal=True, color_system="standard")
    answer = Talk().sample(int(text.split("talk-0/")[1].split(":")[0])).messages[1].parts[0].text
    assert f"\x1b[1;32m{answer}<|im_end|>" in text
    assert "«" not in text


def test_each_stage_has_its_own_template_and_rows(recipe):
    text = shown(recipe({"name": "a", "template": "plain"}, {"name": "b", "train_on": "all"}))
    first, second = text.split("stage b")
    assert "template plain" in first
    assert "<|im_start|>" not in first
    assert "«" in first
    assert second.count("«") > 1
    assert "user" in second[second.index("«", second.index("talk-")) :]


def test_a_long_row_is_cut_and_the_rest_counted(recipe, monkeypatch):
    monkeypatch.setattr(room, "SHOWN_CHARACTERS", 50)
    text = shown(recipe())
    assert "characters more" in text


def test_bad_rows_are_left_out_only_where_training_leaves_them_out(recipe):
    data = [{"made": f"{talk.__file__}:{Spoilt.__name__}"}]
    assert "first row" in shown(recipe(data=data, bad_rows="skip", seq_len=256, batch_tokens=256))
    with pytest.raises(DataError, match="talk-0/4"):
        shown(recipe(data=data, seq_len=256, batch_tokens=256))


def test_what_training_would_refuse_is_refused(recipe):
    with pytest.raises(RecipeError, match="reads at most 1024 positions"):
        shown(recipe(seq_len=4096, batch_tokens=4096))


def test_memory_counts_what_trains_and_falls_with_micro_batches_and_recompute(recipe, tiny):
    def told(**changes):
        plan = recipe(data=[{"made": "scenes", "options": {"form": "captions"}}], **changes)
        row = next(stage_loader(plan, 0, tiny))
        return memory(plan, 0, tiny, row)

    assert Scenes().sample(0)
    full = told(batch_tokens=512)
    assert full.weights == 4 * sum(p.numel() for p in tiny.model.parameters())
    assert full.optimizer == 2 * full.weights
    assert told(batch_tokens=512, train={"connectors": 1.0}).optimizer < full.optimizer / 10
    assert told(batch_tokens=512, micro_batch_tokens=64).working < full.working / 3
    assert told(batch_tokens=512, recompute="full").working < full.working
    before = {name: p.clone() for name, p in tiny.model.named_parameters()}
    adapted = told(batch_tokens=512, train={"adapters": 1e-3}, lora={"rank": 4})
    assert full.weights < adapted.weights < full.weights * 1.5
    assert {name: p.shape for name, p in tiny.model.named_parameters()} == {
        n: p.shape for n, p in before.items()
    }


def test_a_step_that_cannot_fit_is_told_with_what_would_help(recipe, monkeypatch):
    monkeypatch.setattr("tinymodal.train.preview.free_bytes", lambda device: 1000)
    told = shown(recipe(seq_len=256, batch_tokens=256))
    assert "this does not fit: this machine has 0 MB free" in told
    assert "micro_batch_tokens" in told
    monkeypatch.setattr("tinymodal.train.preview.free_bytes", lambda device: 10**12)
    assert "does not fit" not in shown(recipe(seq_len=256, batch_tokens=256))
