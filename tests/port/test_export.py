"""A model leaves with proof, or is refused before anything is written, or stays under a name that says so."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch

from tests.port.exported import a_model
from tinymodal.cli import main
from tinymodal.compose.build import load
from tinymodal.core.errors import CheckpointError, ExportError, RecipeError
from tinymodal.port import export as room
from tinymodal.port import hub
from tinymodal.port.export import REPORT, WRITERS, export
from tinymodal.port.parity import Parity
from tinymodal.port.proof import Options, Proof, prompts

OWN = """
import torch
from tinymodal.port.parity import greedy

class Same:
    name = "a copy of the weights"

    def __init__(self, composed):
        self.composed = composed

    def inputs(self, case, ours):
        return ours

    def logits(self, inputs):
        with torch.no_grad():
            return self.composed.model(**inputs).logits[0].float() + {more}

    def greedy(self, inputs, num):
        return greedy(self.composed.model, inputs, num)

def run(composed, folder):
    torch.save(composed.model.state_dict(), folder / "weights.pt")
    return Same(composed)

def silent(composed, folder):
    (folder / "nothing.txt").write_text("written")
"""


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("model", "target", "options", "said"),
    [
        (
            "starter",
            "llava",
            {},
            "starter cannot become llava: vision: a tower of kind 'tinymodal_tower'; vLLM reads Llava "
            "with clip_vision_model or siglip_vision_model. It fits hub",
        ),
        (
            "starter",
            "onnx",
            {},
            "starter cannot become onnx: speech: the graphs hold towers, connectors and the language model; "
            "no talker. Leave it out: --without speech",
        ),
        ("starter", "gguf", {"without": ("speech",)}, r"Leave it out: --without vision,audio,speech"),
    ],
)
def test_a_composition_that_a_target_cannot_hold_is_refused_before_anything_is_written(
    tmp_path, model, target, options, said
):
    with pytest.raises(ExportError, match=re.escape(said)):
        export(model, target, tmp_path / "out", Options(**options))
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("target", "options", "error", "said"),
    [
        ("hug", {}, RecipeError, "unknown target 'hug'; known: gguf, hub, llava, onnx; .*did you mean 'hub'"),
        ("hub", {"weights": "q8_0"}, RecipeError, "--type belongs to --to gguf; leave it out for hub"),
        ("gguf", {"lora": "apart"}, RecipeError, "--lora belongs to --to hub"),
        ("hub", {"without": ("speech",)}, RecipeError, "--without belongs to --to llava or gguf or onnx"),
        (
            "llava",
            {"without": ("vision",)},
            RecipeError,
            "--without vision: of llava may be left out: audio, sp",
        ),
        (
            "gguf",
            {"weights": "q4_k"},
            RecipeError,
            r"cannot write it \(NotImplementedError\); written are f32",
        ),
        ("gguf", {"weights": "x"}, RecipeError, "--type x is not known; written are f32, f16, q8_0, q4_0"),
        ("hub", {"dtype": "int8"}, RecipeError, "--dtype int8: known: float32, bfloat16, float16"),
        (
            "hub",
            {"lora": "apart"},
            ExportError,
            "no adapter lies in .*; --lora apart is for a run whose last",
        ),
    ],
)
def test_what_cannot_be_asked_is_told_in_one_line(tmp_path, target, options, error, said):
    with pytest.raises(error, match=said) as fault:
        export("starter", target, tmp_path / "out", Options(**options))
    assert "\n" not in str(fault.value)
    assert left(tmp_path) == []


def test_an_existing_folder_is_not_written_into(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="exists already; name a new folder"):
        export("starter", "hub", tmp_path / "out")
    assert left(tmp_path / "out") == ["mine.txt"]


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=r"needs gguf and accelerate, not installed; pip install 'tinymodal\[exp"
    ):
        export("starter", "gguf", tmp_path / "out")


def test_the_starter_leaves_for_the_hub_and_answers_the_same_to_the_bit(tmp_path, capsys):
    """From the command line; a fresh process without our package is asked pictures, sounds and words."""
    out = tmp_path / "out"
    assert main(["export", "starter", str(out), "--to", "hub"]) == 0
    told = capsys.readouterr().out
    assert "max |logit difference| 0 (at most 0 allowed), equal greedy text on 8 of 8 prompts" in told
    report = json.loads((out / REPORT).read_text())
    assert report["passed"]
    assert report["max_logit_difference"] == 0.0
    assert report["prompts_with_equal_greedy_text"] == report["prompts"] == 8
    assert {row["case"].split()[-1] for row in report["parity"]["cases"]} >= {"picture", "words", "sound"}
    assert {"model.safetensors", "processor_config.json", "codec/model.safetensors"} <= set(report["files"])
    assert all((out / name).stat().st_size == size for name, size in report["files"].items())
    card = (out / "README.md").read_text()
    assert card.startswith(
        "---\nlibrary_name: transformers\npipeline_tag: any-to-any\n# license: state it here"
    )
    assert "| starter-vision | 1600 |" in card
    # The class that vLLM's Transformers backend asks for.
    assert "AutoModel" in json.loads((out / "config.json").read_text())["auto_map"]
    assert left(tmp_path) == ["out"]


def test_an_export_that_differs_is_kept_under_another_name_and_exits_with_1(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(OWN.replace("{more}", "1e-3"))
    out = tmp_path / "out"
    argv = ["export", "starter", str(out), "--to", f"{tmp_path}/mine.py:run", "--prompts", "2"]
    assert main(argv) == 1
    told = capsys.readouterr().out
    assert "It does not compute the same. What was written lies in" in told
    assert not out.exists()
    report = json.loads((tmp_path / "out.failed" / REPORT).read_text())
    assert not report["passed"]
    assert report["max_logit_difference"] == pytest.approx(1e-3, rel=0.01)
    assert (tmp_path / "out.failed" / "weights.pt").is_file()


def test_a_function_of_your_own_is_a_target_and_is_compared_with_what_it_returns(tmp_path):
    (tmp_path / "own.py").write_text(OWN.replace("{more}", "0"))
    done = export("starter", f"{tmp_path}/own.py:run", tmp_path / "out", Options(num_prompts=3))
    assert done.passed
    assert done.proof.parity.reference == "a copy of the weights"
    assert len(done.proof.parity.rows) == 3
    assert list(done.files) == ["weights.pt"]
    quiet = export("starter", f"{tmp_path}/own.py:silent", tmp_path / "quiet", Options(num_prompts=3))
    assert quiet.passed
    assert quiet.proof.parity is None
    assert room.lines(quiet)[-1] == "not compared with anything"


def test_an_error_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def broken(job, folder):
        folder.mkdir()
        (folder / "half").write_text("x")
        raise ExportError("vision: torch cannot write it as a graph")

    monkeypatch.setitem(WRITERS, "hub", WRITERS["hub"]._replace(write=broken))
    with pytest.raises(ExportError, match="cannot write it"):
        export("starter", "hub", tmp_path / "out")
    assert left(tmp_path) == []


def test_a_proof_without_a_row_does_not_pass():
    assert not Proof(Parity("nobody")).passed
    assert Proof(None).passed


def test_prompts_cover_every_medium_and_leave_out_what_is_too_long():
    starter = load("starter")
    found, left_out = prompts(starter, 8)
    assert len(found) == 8
    assert left_out == []
    assert {(bool(case.pictures), bool(case.sounds)) for case in found} == {(0, 0), (1, 0), (0, 1)}
    assert sum("<|im_start|>user" in case.text for case in found) == 3
    assert len({len(case.sounds[0]) // 8_000 for case in found if case.sounds}) == 2  # of several lengths
    starter.encoder.max_prompt_tokens = 30
    fewer, left_out = prompts(starter, 4)
    assert [case.name for case in fewer[:1]] == ["words alone"] or left_out
    assert all("the language model reads 30" in line for line in left_out)
    starter.encoder.max_prompt_tokens = 2
    with pytest.raises(ExportError, match="no prompt fits the language model's 2 positions"):
        prompts(starter, 4)


def test_the_model_card_tells_the_run_and_no_folder_of_the_machine(tmp_path):
    run = tmp_path / "runs" / "mine"
    a_model(run / "model")
    (run / "recipe.toml").write_text(
        'name = "mine"\n[model.vision]\npath = "google/siglip-base-patch16-224"\n[model.language]\n'
        'path = "/home/me/secret/qwen"\n[[stages]]\nname = "align"\ntrain = { connectors = 1e-3 }\n'
        'data = [{ path = "/home/me/secret/rows.jsonl", format = "llava" }, { hub = "org/pictures", '
        'format = "vqa" }]\n'
    )
    rows = [{"stage": "align", "step": n, "loss": 2.0 / n, "tokens": 100} for n in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    starts = [{"time": "2026-11-22T10:00:00", "versions": {"torch": "2.13.0"}, "machine": {"gpu": "One GPU"}}]
    (run / "run.json").write_text(json.dumps({"starts": starts}))
    scores = {"metric": "accuracy", "metrics": {"mean": 0.75}, "n": 40, "complete": True, "interval_95": None}
    (run / "model" / "eval").mkdir()
    (run / "model" / "eval" / "results.json").write_text(json.dumps({"scenes-new": scores}))
    job = room._job(str(run), Options())
    card = hub.model_card(job)
    assert "# mine\n" in card
    assert "base_model:\n  - google/siglip-base-patch16-224\ndatasets:\n  - org/pictures\n" in card
    assert "| align | 3 | 300 | connectors | 0.6667 |" in card
    assert "* `rows.jsonl` (a file, rows of format `llava`)" in card
    assert "Trained on One GPU with torch 2.13.0; last started 2026-11-22." in card
    assert "| scenes-new (accuracy) | 0.75 | 40 | yes |" in card
    assert 'path = "qwen"' in card
    assert "/home/me" not in card
    assert "## Licence\n\nNot stated." in card


def test_a_folder_meets_the_contract_of_vllms_backend(tmp_path):
    """What OffsetsMultiModalProcessor and MultiModalMixin of vLLM's Transformers backend do, step by step."""
    from tinymodal.port.parity import picture

    composed = load(a_model(tmp_path / "m", connector="pixel_shuffle"))
    assert composed.model._supports_attention_backend
    processor, core = composed.processor, composed.model.model
    shown = [picture(300, 200, 1), picture(120, 240, 2)]
    text = f"a {processor.image_token} b {processor.image_token} c"
    out = processor(
        images=shown, text=text, return_tensors="pt", return_text_replacement_offsets=True, truncation=False
    )
    (changes,) = out["text_replacement_offsets"]
    tokenizer = processor.tokenizer
    ids = [tokenizer(c["replacement"], add_special_tokens=False)["input_ids"] for c in changes]
    assert [c["type"] for c in changes] == ["image", "image"]
    assert all(set(each) == {processor.image_token_id} for each in ids)
    wide = text
    for change in reversed(changes):
        begin, end = change["span"]
        assert wide[begin:end] == change["text"] == processor.image_token
        wide = wide[:begin] + change["replacement"] + wide[end:]
    for change in changes:
        assert wide[slice(*change["new_span"])] == change["replacement"]
    assert torch.equal(tokenizer(wide, return_tensors="pt")["input_ids"], out["input_ids"])

    counted = processor._get_num_multimodal_tokens(image_sizes=[(p.height, p.width) for p in shown])
    assert counted["num_image_tokens"] == [len(each) for each in ids]
    assert len(out["pixel_values"]) == sum(counted["num_image_patches"])
    assert set(out) == {"input_ids", "attention_mask", "pixel_values", "text_replacement_offsets"}
    with torch.no_grad():
        seen = core.get_image_features(out["pixel_values"])
        split = seen.flatten(0, 1).split([len(each) for each in ids])
        embeds = core.get_input_embeddings()(out["input_ids"])
        embeds[out["input_ids"] == processor.image_token_id] = torch.cat(split)
        there = core(inputs_embeds=embeds, attention_mask=out["attention_mask"]).last_hidden_state
        inputs = {k: out[k] for k in ("input_ids", "attention_mask", "pixel_values")}
        assert torch.equal(there, core(**inputs).last_hidden_state)
        assert core(**inputs, output_hidden_states=True).hidden_states is not None  # keywords go down
    assert core.language_model is not None
    assert processor.image_processor is not None
    assert processor.feature_extractor is None


def test_another_attention_can_be_put_under_the_decoder(tmp_path):
    """As vLLM puts its own: by name, when the class is made of the config."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from tinymodal.model.modeling_tinymodal import TinyModalModel

    calls = []

    def counted(module, *args, **kwargs):
        calls.append(type(module).__name__)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("counted", counted)
    ALL_MASK_ATTENTION_FUNCTIONS.register("counted", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    composed = load(a_model(tmp_path / "m"))
    config = copy.deepcopy(composed.model.config)
    made = TinyModalModel._from_config(config, attn_implementation="counted").eval()
    made.load_state_dict(composed.model.model.state_dict())
    inputs = composed.processor(text="one two three")
    with torch.no_grad():
        here = composed.model.model(**inputs).last_hidden_state
        assert not calls
        assert torch.equal(made(**inputs).last_hidden_state, here)
    assert calls == ["LlamaAttention"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["merged", "apart"])
def test_an_adapter_leaves_inside_its_matrices_or_beside_them(tmp_path, lora):
    from tinymodal.compose.build import save
    from tinymodal.train import adapters
    from tinymodal.train.recipe import Lora

    run = tmp_path / "runs" / "fine"
    composed = load(a_model(run / "stages" / "first"))
    adapters.inject(composed.model, Lora(rank=4, parts=("language",)))
    with torch.no_grad():
        for name, p in composed.model.named_parameters():
            if ".lora_B." in name:
                p.add_(0.3)
    adapters.save(composed.model, run / "adapter")
    adapters.merge(composed.model)
    save(composed, run / "model")
    (run / "recipe.toml").write_text(
        'name = "fine"\n[model]\npath = "x"\n[[stages]]\nname = "first"\n[[stages]]\nname = "second"\n'
    )
    done = export(str(run), "hub", tmp_path / "out", Options(lora=lora, num_prompts=4))
    assert done.passed
    assert done.proof.parity.tolerance == (0.0 if lora == "merged" else 1e-4)
    adapter = tmp_path / "out" / "adapter" / "adapter_config.json"
    assert adapter.is_file() == (lora == "apart")
    if lora == "apart":
        assert json.loads(adapter.read_text())["base_model_name_or_path"] is None
        first, out = run / "stages" / "first", tmp_path / "out"
        assert (first / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
