"""A language model in a quarter of its memory says nearly what it said."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.infer.test_engine import QUESTIONS
from tinymodal.compose.build import load, parameter_report, save
from tinymodal.compose.narrow import NarrowEmbedding, NarrowLinear, narrow, rounded
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import CheckpointError, RecipeError
from tinymodal.eval.tasks.scenes import questions
from tinymodal.infer.engine import Engine, Sampling


def language_bytes(model) -> int:
    found = {part.part: part.bytes for part in parameter_report(model)}
    return sum(found.get(part, 0) for part in ("language", "embeddings", "head"))


def test_rows_are_rounded_to_the_nearest_of_255_steps():
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    matrix[3] = 0
    matrix[4] *= 1e4
    weight, scale = rounded(matrix)
    error = (weight.float() * scale[:, None] - matrix).abs()
    assert weight.dtype == torch.int8
    assert bool((error <= scale[:, None] / 2 + 1e-7).all())
    assert torch.equal(error[3], torch.zeros(30))
    assert torch.allclose(scale, matrix.abs().amax(1) / 127)


@pytest.mark.parametrize("bias", [True, False])
def test_a_narrow_layer_is_the_layer_of_its_rounded_matrix(bias, monkeypatch):
    layer, x = nn.Linear(30, 40, bias=bias), torch.randn(2, 5, 30)
    weight, scale = rounded(layer.weight)
    expected = nn.functional.linear(x, weight.float() * scale[:, None], layer.bias)
    made = NarrowLinear(weight, scale, layer.bias)
    torch.testing.assert_close(made(x), expected)
    # A matrix that is widened in several stretches gives the same.
    monkeypatch.setattr("tinymodal.compose.narrow.STRETCH", 100)
    torch.testing.assert_close(made(x), expected)
    table = NarrowEmbedding(weight, scale, torch.float32)
    torch.testing.assert_close(table(torch.tensor([[3, 1]])), (weight.float() * scale[:, None])[None, [3, 1]])


@pytest.mark.parametrize("language", ["llama", "gpt2", "phi", "gemma2", "opt", "openelm", "minicpm"])
def test_any_family_gets_smaller_and_still_answers(language):
    composed = tiny_model(language=language)
    before = language_bytes(composed.model)
    towers = [p.clone() for p in composed.model.model.towers.parameters()]
    how = Sampling(max_new_tokens=1, num_logprobs=0)
    told = [reply.logprobs for reply in Engine(composed).reply(QUESTIONS, how)]
    narrow(composed.model, 8)
    # Learned positions stay, and are half of a toy of these two.
    assert language_bytes(composed.model) <= (0.7 if language in ("gpt2", "opt") else 0.4) * before
    assert not [m for m in composed.model.model.language_model.modules() if type(m) in (nn.Linear, Conv1D)]
    assert all(
        torch.equal(a, b) for a, b in zip(towers, composed.model.model.towers.parameters(), strict=True)
    )
    for reply, expected in zip(Engine(composed).reply(QUESTIONS, how), told, strict=True):
        # The stop has no logprob; of words, a hundredth of theirs may go.
        for one, other in zip(reply.logprobs, expected, strict=False):
            assert one.logprob == pytest.approx(other.logprob, abs=0.15)


def test_the_starter_model_answers_the_same_in_a_quarter_of_the_memory():
    """All of 120 made questions, at 25.9 % of the language model's bytes."""
    samples = [question.sample for question in questions("test", 11, 4, False)]
    whole, small = load("starter"), load("starter", bits=8)
    assert language_bytes(small.model) < 0.3 * language_bytes(whole.model)
    how = Sampling(max_new_tokens=16)
    said, expected = ([r.text for r in Engine(c).reply(samples, how)] for c in (small, whole))
    same = sum(one == other for one, other in zip(said, expected, strict=True))
    assert same >= 0.95 * len(samples)


def test_four_bits_are_smaller_still():
    pytest.importorskip("bitsandbytes")
    eight, four = load("starter", bits=8), load("starter", bits=4)
    assert language_bytes(four.model) < 0.75 * language_bytes(eight.model)
    samples = [question.sample for question in questions("test", 11, 1, False)]
    said, expected = (
        [r.text for r in Engine(c).reply(samples, Sampling(max_new_tokens=8))] for c in (four, eight)
    )
    assert sum(one == other for one, other in zip(said, expected, strict=True)) >= len(samples) // 2


def test_what_cannot_be_is_refused(tmp_path):
    composed = tiny_model()
    with pytest.raises(RecipeError, match="bits 5"):
        narrow(composed.model, 5)
    narrow(composed.model, 8)
    with pytest.raises(RecipeError, match="rounded already"):
        narrow(composed.model, 8)
    with pytest.raises(CheckpointError, match="read it without"):
        save(composed, tmp_path / "model")
    assert not (tmp_path / "model").exists()
