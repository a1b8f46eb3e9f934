"""GGUF files hold what they say: tensors, sizes, token ids, and a tower that can be rebuilt from its file."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, pre_tokenizers

from tests.port.exported import FAMILIES, SIGLIP, a_job, a_model
from tinymodal.compose.tiny import tiny_tokenizer
from tinymodal.core.errors import ExportError
from tinymodal.port import gguf_files, gguf_mmproj
from tinymodal.port.export import export
from tinymodal.port.gguf_text import placed, pre_tokenizer, read_tensors, reordered, restored
from tinymodal.port.proof import Options

pytest.importorskip("gguf")


@pytest.mark.parametrize(("language", "what"), FAMILIES)
def test_a_language_model_is_read_back_equal(tmp_path, language, what):
    a_model(tmp_path / "ours", language=language, **{**SIGLIP, **what})
    done = export(str(tmp_path / "ours"), "gguf", tmp_path / "out", Options(num_prompts=3))
    assert done.passed
    assert done.proof.parity.largest <= 1e-5
    assert len(done.proof.parity.rows) == 3
    assert [check.passed for check in done.proof.checks] == [True] * 5
    assert set(done.files) == {"model.gguf", "mmproj.gguf"}
    assert "llama.cpp was not run" in done.proof.notes


@pytest.mark.parametrize("weights", ["f16", "q8_0", "q4_0"])
def test_rounded_weights_are_those_of_the_type_and_nothing_else_changes(tmp_path, weights):
    a_model(tmp_path / "ours", **SIGLIP)
    options = Options(weights=weights, num_prompts=3)
    done = export(str(tmp_path / "ours"), "gguf", tmp_path / "out", options)
    assert done.passed
    assert any(f"rounding to {weights} moves logits by at most" in note for note in done.proof.notes)
    import gguf

    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == weights.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == ("Q8_0" if weights == "q4_0" else weights.upper())


def test_the_starters_words_are_a_llama(tmp_path):
    done = export(
        "starter", "gguf", tmp_path / "out", Options(without=("vision", "audio", "speech"), num_prompts=4)
    )
    assert done.passed
    assert done.proof.parity.largest <= 1e-4
    assert set(done.files) == {"model.gguf"}


def test_rows_are_reordered_as_llama_cpp_rotates_them():
    """Neighbours turn together there, halves here; each head on its own."""
    rows = torch.arange(2 * 4.0)[:, None].expand(8, 3)
    assert reordered(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(restored(reordered(rows, 2), 2), rows)
    assert reordered(rows, 0) is rows


def test_a_wrong_tensor_fails_the_proof(tmp_path, monkeypatch):
    """Without the reordering everything else still fits; the tensors and the logits do not."""
    from tinymodal.port import gguf_text

    monkeypatch.setattr(gguf_text, "reordered", lambda values, heads: values)
    a_model(tmp_path / "ours", **SIGLIP)
    done = export(str(tmp_path / "ours"), "gguf", tmp_path / "out", Options(num_prompts=2))
    assert not done.passed
    assert done.out.name == "out.failed"
    assert not done.proof.checks[0].passed
    assert "first not blk.0.attn_q.weight" in done.proof.checks[0].found
    assert done.proof.parity.largest > 1e-3


def test_another_tokenizer_is_noticed(tmp_path):
    job = a_job(a_model(tmp_path / "ours", **SIGLIP), num_prompts=2)
    gguf_files.write(job, tmp_path / "out")
    assert gguf_files._tokens_check(job, tmp_path / "out").passed
    other = a_job(a_model(tmp_path / "other", words=("brown fox jumps",), **SIGLIP), num_prompts=2)
    found = gguf_files._tokens_check(other, tmp_path / "out")
    assert not found.passed
    assert found.found.startswith("'The quick brown fox jumps over")


def test_the_mmproj_file_alone_sees_the_same(tmp_path):
    for layer in (-2, -1, 1):
        job = a_job(a_model(tmp_path / str(layer), feature_layer=layer, **SIGLIP))
        gguf_mmproj.write_mmproj(job.composed, tmp_path / "mm.gguf", "f32", "it")
        found = gguf_mmproj.checks(job.composed, tmp_path / "mm.gguf", "f32")
        assert [check.passed for check in found] == [True, True]
        names = set(read_tensors(tmp_path / "mm.gguf"))
        assert {"v.patch_embd.weight", "v.position_embd.weight", "mm.0.weight", "mm.2.bias"} <= names
        assert not any(name.startswith("v.post_ln") for name in names)


def test_a_patch_in_another_place_is_noticed(tmp_path):
    job = a_job(a_model(tmp_path / "m", **SIGLIP))
    gguf_mmproj.write_mmproj(job.composed, tmp_path / "mm.gguf", "f32", "it")
    tower = job.composed.model.model.towers["image"].module
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.copy_(
            tower.embeddings.position_embedding.weight.roll(1, 0)
        )
    assert not gguf_mmproj.checks(job.composed, tmp_path / "mm.gguf", "f32")[0].passed


def split_by(*steps):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return tokenizer


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def test_how_a_tokenizer_splits_has_a_name_or_is_refused():
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert pre_tokenizer(tiny_tokenizer()) == "gpt-2"
    assert pre_tokenizer(split_by(pre_tokenizers.Split(Regex(LLAMA3), "isolated"), whole)) == "llama-bpe"
    assert pre_tokenizer(split_by(pre_tokenizers.Split(Regex(QWEN2), "isolated"), whole)) == "qwen2"
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for digits in (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Split(Regex(r"\d"), "isolated"),
    ):
        assert pre_tokenizer(split_by(digits, gpt2)) == "smollm"
    with pytest.raises(
        ExportError, match=r"splits texts by Split:\\w\+ and bytes, for which no name in llama"
    ):
        pre_tokenizer(split_by(pre_tokenizers.Split(Regex(r"\w+"), "isolated"), whole))


@pytest.mark.parametrize("rule", [LLAMA3, QWEN2])
def test_a_tokenizer_with_a_rule_of_its_own_gives_the_same_ids(tmp_path, rule):
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = split_by(pre_tokenizers.Split(Regex(rule), "isolated"), whole)
    a_model(tmp_path / "ours", tokenizer=tokenizer, **SIGLIP)
    job = a_job(tmp_path / "ours", num_prompts=2)
    gguf_files.write(job, tmp_path / "out")
    assert gguf_files._tokens_check(job, tmp_path / "out").passed


def test_every_tensor_has_a_place(tmp_path):
    job = a_job(a_model(tmp_path / "m", language="qwen3", **SIGLIP))
    names = [tensor.name for tensor in placed(job.composed)]
    assert len(names) == len(set(names))
    assert {"token_embd.weight", "output.weight", "output_norm.weight", "blk.1.attn_q_norm.weight"} <= set(
        names
    )
