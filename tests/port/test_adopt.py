"""What bad checkpoints get, and what adopting leaves on disk."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.port.foreign import a_clip, a_llama, a_tokenizer, an_mlp, keyed, write
from tests.port.test_llava import flat, projector
from tinymodal.cli import main
from tinymodal.compose.build import load
from tinymodal.core.errors import CheckpointError
from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.infer.engine import Engine, Sampling
from tinymodal.port import adopt as room
from tinymodal.port.adopt import REPORT, adopt
from tinymodal.port.parity import picture
from tinymodal.port.source import Extras
from tinymodal.port.weights import read_file, read_folder


@pytest.fixture
def llava(tmp_path):
    """A good LLaVA and what lies beside it; the tensors may be spoilt before :func:`write`."""
    tokenizer = a_tokenizer()
    language = a_llama(tokenizer)
    a_clip().save_pretrained(tmp_path / "clip")
    tensors = {**keyed("", language), **projector(an_mlp())}

    def on_disk(**more):
        return write(tmp_path / "llava", flat(language), tokenizer, pytorch_model={**tensors, **more})

    return tensors, on_disk, Extras(vision=tmp_path / "clip"), tmp_path / "out"


def refused(source, out, extras, words):
    """Adopting ends with one line that says ``words``, and leaves nothing."""
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(CheckpointError, match=words) as fault:
        adopt(source, out, extras)
    assert "\n" not in str(fault.value)
    assert sorted(path.name for path in out.parent.iterdir()) == before


def test_a_missing_tensor_is_named(llava):
    tensors, on_disk, extras, out = llava
    del tensors["model.layers.1.mlp.up_proj.weight"]
    first = r"model.layers.1.mlp.up_proj.weight of the language model \(64, 32\)"
    refused(on_disk(), out, extras, f"LLaVA, whole: 1 tensors are missing, first {first}")


def test_a_missing_tensor_of_the_tower_and_of_the_connector_is_named(llava, tmp_path):
    tensors, on_disk, extras, out = llava
    file = tmp_path / "clip" / "model.safetensors"
    tower = load_file(file)
    lost = next(name for name in tower if name.endswith("layers.0.mlp.fc1.bias"))
    save_file({k: v for k, v in tower.items() if k != lost}, file, metadata={"format": "pt"})
    refused(on_disk(), out, extras, r"first encoder.layers.0.mlp.fc1.bias of the vision part \(64,\)")
    save_file(tower, file, metadata={"format": "pt"})
    del tensors["model.mm_projector.2.bias"]
    refused(on_disk(), out, extras, r"first proj.2.bias of the connector part \(32,\)")


def test_a_missing_embedding_is_named(llava):
    tensors, on_disk, extras, out = llava
    del tensors["model.embed_tokens.weight"]
    refused(on_disk(), out, extras, "the token embedding model.embed_tokens.weight is missing")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.mlp.extra.weight", r"model.layers.0.mlp.extra.weight \(3,\) is not expected"),
        ("model.layers.2.mlp.up_proj.weight", r"model.layers.2.mlp.up_proj.weight \(3,\) is not expected"),
        (
            "model.vision_resampler.weight",
            r"model.vision_resampler.weight \(3,\) is no tensor of LLaVA, whole",
        ),
        ("model.mm_projector.4.bias", r"model.mm_projector.4.bias \(3,\) is not expected"),
    ],
)
def test_a_tensor_too_many_is_named(llava, name, words):
    _, on_disk, extras, out = llava
    refused(on_disk(**{name: torch.ones(3)}), out, extras, words)


@pytest.mark.parametrize(
    "name", ["model.mm_projector.0.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_a_misshapen_tensor_is_named_with_both_shapes(llava, name):
    tensors, on_disk, extras, out = llava
    shape = tuple(tensors[name].shape)
    wrong = (*shape[:-1], shape[-1] + 1)
    words = f"LLaVA, whole: pytorch_model.bin: {name} is {wrong}, but its place ~ is {shape} by the configs"
    refused(
        on_disk(**{name: torch.ones(wrong)}),
        out,
        extras,
        re.escape(words).replace("\\~", ".*").replace("~", ".*"),
    )


def test_a_pickle_with_code_in_it_is_not_opened(llava, tmp_path):
    tensors, on_disk, extras, out = llava
    source = on_disk()

    class Harmful:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harmed'}",)

    torch.save({**tensors, "model.more": Harmful()}, source / "pytorch_model.bin")
    refused(
        source,
        out,
        extras,
        r"is a pickle that holds more than tensors \(posix.system\); opening it could run code",
    )
    torch.save({"model": {"llama_proj.weight": torch.ones(2, 2)}, "config": Harmful()}, tmp_path / "tiny.pth")
    refused(tmp_path / "tiny.pth", out, extras, "tiny.pth: is a pickle that holds more than tensors")
    assert not (tmp_path / "harmed").exists()


def test_an_unknown_folder_is_told_what_was_looked_for(tmp_path):
    source = write(tmp_path / "other", {"model_type": "chameleon"}, pytorch_model={})
    words = (
        "is of no family that is known. Looked for .*TinyLLaVA.*: .*OmniLMM: .*LLaVA: .*llama_proj.* Found "
    )
    refused(
        source,
        tmp_path / "out",
        None,
        f"{words}model_type 'chameleon' and the files config.json, pytorch_model.bin",
    )
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", None, "Found no config.json, no file")
    torch.save({"weight": torch.ones(2)}, tmp_path / "some.pth")
    refused(tmp_path / "some.pth", tmp_path / "out", None, "Found the file some.pth")
    refused(tmp_path / "nowhere", tmp_path / "out", None, "nowhere: there is no such folder or file")


def test_a_model_of_ours_needs_no_adopting(llava):
    _, on_disk, extras, out = llava
    adopt(on_disk(), out, extras)
    refused(out, out.with_name("again"), extras, "is a model of ours already")


def test_out_appears_whole_or_not_at_all(llava, monkeypatch, tmp_path):
    _, on_disk, extras, out = llava
    source = on_disk()
    before = sorted(path.name for path in tmp_path.iterdir())

    def half(composed, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(room, "save", half)
        with pytest.raises(OSError, match="No space"):
            adopt(source, out, extras)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    # What a run that was killed left does not matter to the next one.
    (tmp_path / ".out.adopting").mkdir()
    (tmp_path / ".out.adopting" / "config.json").write_text("{")
    adopt(source, out, extras)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "out"])
    assert (out / REPORT).is_file()


def test_what_is_in_the_way_is_not_overwritten(llava):
    _, on_disk, extras, out = llava
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    refused(on_disk(), out, extras, "out: exists already; name a new folder")
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_weight_that_is_written_wrong_is_noticed(llava, monkeypatch):
    _, on_disk, extras, out = llava

    def spoiling(composed, folder, save=room.save):
        save(composed, folder)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.language_model.norm.weight"][0] += 1e-7
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(room, "save", spoiling)
    refused(
        on_disk(),
        out,
        extras,
        "1 weights were not written as they were read, first model.language_model.norm",
    )


def test_a_tokenizer_of_another_model_is_refused(llava, tmp_path):
    _, on_disk, extras, out = llava
    larger = a_tokenizer(*(f"<{i}>" for i in range(9)))
    larger.save_pretrained(tmp_path / "larger")
    other = Extras(vision=extras.vision, tokenizer=tmp_path / "larger")
    refused(
        on_disk(),
        out,
        other,
        r"the tokenizer has \d+ tokens and the model \d+ embeddings; they are not of one model",
    )


def test_a_template_that_the_tokenizer_cannot_write_is_refused(llava):
    _, on_disk, extras, out = llava
    wrong = Extras(vision=extras.vision, template="phi")
    refused(
        on_disk(),
        out,
        wrong,
        "template 'phi' .*; choose another with --template NAME",
    )
    misspelt = Extras(vision=extras.vision, template="vicuna_v2")
    refused(on_disk(), out, misspelt, "unknown template 'vicuna_v2'.*did you mean 'vicuna_v1'")


def test_new_words_get_rows_and_the_rest_of_the_table_stays(llava):
    """A full table has no room for ``<image>``: a row is added, the mean of the others."""
    tensors, on_disk, extras, out = llava
    adopt(on_disk(), out, extras)
    saved, before = load_file(out / "model.safetensors")["lm_head.weight"], tensors["lm_head.weight"]
    assert len(saved) == len(before) + 1
    assert torch.equal(saved[:-1], before)
    torch.testing.assert_close(saved[-1], before.mean(0))


def test_an_adapter_for_another_model_is_refused(llava, tmp_path):
    _, on_disk, extras, out = llava
    source = on_disk()
    source.rename(tmp_path / "base")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    config = json.loads((tmp_path / "base" / "config.json").read_text())

    def adapter(**halves):
        folder = write(tmp_path / "lora", config, non_lora_trainables=projector(an_mlp()))
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        named = {f"base_model.model.{k}": v for k, v in halves.items()}
        torch.save(named, folder / "adapter_model.bin")
        return folder

    with_base = Extras(vision=extras.vision, language=tmp_path / "base")
    module = "model.layers.7.self_attn.q_proj"
    pair = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
    refused(adapter(**pair), out, with_base, f"{module} was adapted, but LLaVA, LoRA over base has no matrix")
    module = "model.layers.1.self_attn.q_proj"
    pair = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(40, 2)}
    refused(
        adapter(**pair),
        out,
        with_base,
        r"lora_B \(40, 2\) x lora_A \(2, 32\) does not fit the matrix \(32, 32\)",
    )
    refused(adapter(**dict([pair.popitem()])), out, with_base, "has no lora_A; the adapter is incomplete")
    (tmp_path / "lora" / "non_lora_trainables.bin").unlink()
    refused(tmp_path / "lora", out, with_base, "has an adapter but no non_lora_trainables.bin")


def test_broken_files_are_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read"):
        read_folder(tmp_path)
    (tmp_path / "half.bin").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(CheckpointError, match=r"half.bin: cannot be read"):
        read_file(tmp_path / "half.bin")
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(CheckpointError, match=r"list.bin: holds no table of tensors by name"):
        read_file(tmp_path / "list.bin")
    torch.save({"w": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read_file(tmp_path / "old.bin")["w"], torch.ones(2))


def test_every_tensor_of_the_source_is_in_the_report(llava):
    tensors, on_disk, extras, out = llava
    adopt(on_disk(), out, extras)
    report = json.loads((out / REPORT).read_text())
    told = {(t["file"], t["name"]): t for t in report["tensors"]}
    assert len(told) == len(report["tensors"])
    assert {name for file, name in told if file == "pytorch_model.bin"} == set(tensors)
    assert {name for file, name in told if file == "clip/model.safetensors"} == set(
        load_file(extras.vision / "model.safetensors")
    )
    assert all(bool(t["to"]) != bool(t["reason"]) for t in report["tensors"])
    assert load(out).model.config.model_type == "tinymodal"


def test_an_adopted_model_answers_as_every_other(llava):
    _, on_disk, extras, out = llava
    adopt(on_disk(), out, extras)
    question = Message("user", (Image(picture(60, 40, 1)), Text("What is shown?")))
    reply = Engine(load(out)).reply([Sample((question,), id="q")], Sampling(max_new_tokens=4))[0]
    assert "USER: [image: 36 tokens]\nWhat is shown? ASSISTANT:" in reply.prompt
    assert reply.tokens_out in range(1, 5)


def test_the_command_prints_the_report(llava, capsys):
    _, on_disk, extras, out = llava
    assert main(["adopt", str(on_disk()), str(out), "--vision", str(extras.vision)]) == 0
    said = capsys.readouterr().out
    assert "LLaVA, whole" in said
    assert "not used: behind feature layer -2: never reached" in said
    assert f"chat {out}" in said


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    assert main(["adopt", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'nothing'}: there is no such folder or file\n"
