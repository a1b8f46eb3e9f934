"""Phi-2, StableLM-2 and Qwen's base models pad with their end of text. It is still a word that trains."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.chat.conftest import FakeProcessor
from tinymodal.chat.encode import Encoder
from tinymodal.chat.template import template_for
from tinymodal.compose.build import add_tokens
from tinymodal.compose.tiny import tiny_language, tiny_model
from tinymodal.core.types import IGNORE, Image, Message, Sample, Text
from tinymodal.data.collate import collate
from tinymodal.train.objective import Objective

END = "<|endoftext|>"
TEMPLATES = ["phi", "qwen2_base", "vicuna_v1", "plain", "chatml"]


def one_token_for_all(**special: str) -> PreTrainedTokenizerFast:
    """As Phi-2's: beginning, end and unknown are one token, and pad is it too or not there at all."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["a red square what colour is it"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, **special)


@pytest.fixture(params=["as Phi-2", "as StableLM-2"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    if request.param == "as Phi-2":
        return one_token_for_all(bos_token=END, unk_token=END)
    return one_token_for_all(bos_token=END, unk_token=END, pad_token=END)


def conversation(num_turns: int, *first: Image) -> Sample:
    messages = []
    for n in range(num_turns):
        messages.append(Message("user", (*(first if n == 0 else ()), Text("what colour is it"))))
        messages.append(Message("assistant", (Text(f"a red square {n}"),)))
    return Sample(tuple(messages), f"{num_turns} turns")


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_answers_end_trains_and_no_padding_does(tokenizer, template):
    add_tokens(tokenizer, template)
    assert tokenizer.pad_token == tokenizer.eos_token == END
    encoder = Encoder(FakeProcessor(tokenizer), template)
    turns = (1,) if template == "plain" else (1, 2, 5)
    encoded = [encoder(conversation(n, Image(b"2"))) for n in turns]
    stop = tokenizer.convert_tokens_to_ids(template_for(template, tokenizer).stops[0])
    for n, document in zip(turns, encoded, strict=True):
        trained = document.labels[document.labels != IGNORE]
        assert int((trained == stop).sum()) == n
        assert trained[-1] == stop
        assert torch.equal(trained, document.ids[document.labels != IGNORE])

    batch = collate(
        [[d] for d in encoded], tokenizer.pad_token_id, encoder.processor.image_token_id, pad_to=900
    )
    assert int((batch.target_ids == stop).sum()) == sum(turns)
    for row, document in enumerate(encoded):
        tail = slice(len(document), None)
        assert (batch.input_ids[row, tail] == tokenizer.pad_token_id).all()
        assert (batch.labels[row, tail] == IGNORE).all()
        # The end is the document's and not the padding's: positions restart behind it, not before.
        assert batch.position_ids[row, len(document) - 1 : len(document) + 1].tolist() == [
            len(document) - 1,
            0,
        ]


@pytest.mark.parametrize("kind", ["phi", "stablelm", "qwen2"])
def test_padding_changes_neither_the_loss_nor_what_is_learned(kind):
    """The same conversations with and without a tail of end-of-texts, and packed into one row."""
    tokenizer = one_token_for_all(bos_token=END, unk_token=END)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    values = {
        "tokenizer": tokenizer,
        "template": "phi",
        "pad_token_id": 0,
        "eos_token_id": 0,
        "bos_token_id": 0,
    }
    composed = tiny_model(None, language=kind, **values)
    documents = [composed.encoder(conversation(n)) for n in (1, 3)]
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert tiny_language(kind)["pad_token_id"] == 0

    def gradients(rows, **pad) -> dict[str, torch.Tensor]:
        composed.model.zero_grad()
        Objective(composed.model)(collate(rows, 0, image_id, **pad)).sums["text"].backward()
        return {name: p.grad.clone() for name, p in composed.model.named_parameters()}

    alone = gradients([[documents[0]], [documents[1]]])
    for other in (gradients([documents]), gradients([[documents[0]], [documents[1]]], pad_to=400)):
        for name, grad in alone.items():
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-5, msg=name)
    # The end of an answer that is not the last is also read, and learns from it.
    assert (
        alone["model." + next(n for n in composed.model.model.state_dict() if "embed" in n)][0].abs().sum()
        > 0
    )
