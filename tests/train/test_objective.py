from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.model.test_hearing import RATE_HZ, build, hearing_config, hearing_tokenizer, sound
from tests.model.test_processing import noise
from tinymodal.chat.encode import Encoder
from tinymodal.chat.turns import Speaking
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import DataError, RecipeError
from tinymodal.core.types import IGNORE, Audio, Image, Message, Sample, Speech, SpeechItem, Text
from tinymodal.data.codes import CodeBook
from tinymodal.data.collate import collate
from tinymodal.model.codec import open_codec
from tinymodal.model.processing_tinymodal import TinyModalProcessor
from tinymodal.model.talker import build_speech_head
from tinymodal.train import packed
from tinymodal.train.objective import CellHeads, Objective
from tinymodal.train.parallel import ALONE, parallelize
from tinymodal.train.recipe import Parallel
from tinymodal.train.step import step

from .ranks import together as on_ranks
from .talk import WORDS, Talk


def encoded(composed, count, **options):
    talk = Talk(**options)
    return [composed.encoder(talk.sample(n)) for n in range(count)]


def together(composed, rows):
    return collate(rows, composed.tokenizer.pad_token_id, composed.model.config.image_token_id)


@pytest.mark.parametrize("language", ["llama", "gemma2", "phi"])
def test_the_text_loss_is_that_of_transformers_summed(language):
    """Ours on packed rows against HF's own loss, document by document: head with bias, soft-capped, plain."""
    composed = tiny_model(language=language, words=WORDS)
    documents = encoded(composed, 5)
    ours = Objective(composed.model)(together(composed, [documents[:3], documents[3:]])).sums["text"]
    theirs = torch.zeros(())
    for document in documents:
        batch = together(composed, [[document]])
        out = composed.model(**batch.inputs(), labels=batch.labels, use_cache=False)
        theirs += out.loss * document.num_targets
    # Sums of about 40 terms of 6; rounding of float32.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_only_supervised_positions_reach_the_head(tiny, monkeypatch):
    batch = together(tiny, [encoded(tiny, 4)])
    seen = []
    monkeypatch.setattr(
        "tinymodal.train.objective.linear_cross_entropy",
        lambda states, weight, targets, bias, per_target: seen.append(states.shape) or states.sum(),
    )
    Objective(tiny.model)(batch)
    assert seen == [(batch.num_targets, 32)]
    assert batch.num_targets < batch.input_ids.numel() / 2


def test_a_batch_without_pictures_trains_words_and_runs_no_tower(tiny, batches):
    batch = batches(tiny, 1, pictures=False)[0]
    tiny.model.model.towers["image"].register_forward_hook(lambda *_: pytest.fail("the tower ran"))
    Objective(tiny.model)(batch).sums["text"].backward()
    assert all(p.grad is None for p in tiny.model.model.connectors.parameters())


def test_the_losses_of_single_targets_add_up_to_the_sum(tiny, batches):
    batch = batches(tiny, 1)[0]
    terms = Objective(tiny.model)(batch)
    assert terms.per_target.shape == batch.target_ids.shape
    assert not terms.per_target.requires_grad
    torch.testing.assert_close(terms.per_target.sum(), terms.sums["text"].detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_from_before_stand_in_for_pixels_and_run_no_tower(tiny, batches, dtype):
    batch = batches(tiny, 1)[0]
    objective = Objective(tiny.model)
    expected = objective(batch).per_target
    with torch.no_grad():
        features = tiny.model.model.towers["image"](batch.pixel_values)
    kept = features.values.unflatten(1, features.grid).to(dtype)
    tiny.model.model.towers["image"].register_forward_hook(lambda *_: pytest.fail("the tower ran"))
    for given in (kept, (kept,)):
        found = objective(dataclasses.replace(batch, pixel_values=None, image_features=given)).per_target
        # bfloat16 has 8 bits; the losses are near 6.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_features_for_a_model_without_tower_are_refused():
    blind = tiny_model(None, words=WORDS).model.model
    with pytest.raises(ValueError, match="image features given, but this model has no image connector"):
        blind.connect("image", torch.zeros(1, 2, 2, 4))


def test_the_cells_loss_is_the_mean_over_labels_that_are_known():
    heads = CellHeads(4, (3, 5))
    tokens = torch.randn(2, 9, 4)
    targets = torch.stack([torch.randint(3, (2, 9)), torch.randint(5, (2, 9))], dim=2)
    targets[0, :, 1] = IGNORE
    logits = heads.project(tokens)
    expected = F.cross_entropy(logits[..., :3].flatten(0, 1), targets[..., 0].flatten(), reduction="sum")
    expected = expected + F.cross_entropy(logits[1, :, 3:], targets[1, :, 1], reduction="sum")
    torch.testing.assert_close(heads(tokens, targets), expected)


def test_cells_alone_run_no_language_model(tiny, batches):
    batch = batches(tiny, 1, targets=True)[0]
    objective = Objective(tiny.model, ("cells",), (3, 5))
    tiny.model.model.language_model.register_forward_hook(lambda *_: pytest.fail("the language model ran"))
    terms = objective(batch)
    assert set(terms.sums) == {"cells"}
    assert objective.counts([batch, batch]) == {"cells": 2 * int((batch.image_targets != IGNORE).sum())}
    terms.sums["cells"].backward()
    assert all(p.grad is not None for p in tiny.model.model.towers.parameters())


def test_both_losses_share_one_pass_of_the_tower(tiny, batches):
    batch = batches(tiny, 1, targets=True)[0]
    runs = []
    tiny.model.model.towers["image"].register_forward_hook(lambda *_: runs.append(1))
    terms = Objective(tiny.model, ("text", "cells"), (3, 5))(batch)
    assert set(terms.sums) == {"text", "cells"}
    assert runs == [1]


def test_cells_of_a_batch_without_pictures_count_nothing(tiny, batches):
    batch = batches(tiny, 1, pictures=False)[0]
    objective = Objective(tiny.model, ("cells",), (3, 5))
    assert objective.counts([batch]) == {"cells": 0}
    assert objective(batch).sums["cells"] == 0


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        ((3,), "2 labels a token, but cell_classes names 1"),
        ((3, 4), "label 4 of head 1, but cell_classes[1] is 4"),
    ],
)
def test_labels_that_do_not_fit_the_classes_are_refused_with_the_sample(tiny, batches, classes, told):
    batch = batches(tiny, 1, targets=True)[0]
    with pytest.raises(DataError) as caught:
        Objective(tiny.model, ("cells",), classes).counts([batch])
    assert told in str(caught.value)
    assert str(caught.value).startswith("talk-0/")


@pytest.mark.parametrize("label", [-1, -99, -101])
def test_a_label_below_zero_is_refused_unless_it_says_unknown(tiny, batches, label):
    batch = batches(tiny, 1, targets=True)[0]
    batch.image_targets[0, 2, 1] = label
    with pytest.raises(DataError, match=rf"label {label} of head 1.*-100"):
        Objective(tiny.model, ("cells",), (3, 5)).counts([batch])


class Shown(Talk):
    """Every sample shows a picture whose two labels are known for as many tokens as it takes."""

    def __init__(self, tokens: int, size_px: tuple[int, int]) -> None:
        super().__init__(targets=True)
        self.tokens, self.size_px = tokens, size_px

    def sample(self, index):
        sample = super().sample(index)
        (user, answer), (picture,) = sample.messages, sample.media()
        width, height = self.size_px
        picture = Image(picture.source.resize((width, height)), ((0, 0),) * self.tokens)
        turns = (dataclasses.replace(user, parts=(picture, *user.parts[1:])), answer)
        return dataclasses.replace(sample, messages=turns)


def refusal(composed, *sources) -> str:
    """What the cells loss says about one sample of each source."""
    batch = together(composed, [[composed.encoder(source.sample(1)) for source in sources]])
    with pytest.raises(DataError) as caught:
        Objective(composed.model, ("cells",), (3, 5)).counts([batch])
    return str(caught.value)


def test_the_cells_loss_says_why_pictures_have_no_targets():
    sight = {"resize": "native", "fit_pixels": (256, 1024)}
    native = tiny_model(words=WORDS, sight=sight)
    wide, tall = Shown(8, (32, 16)), Shown(8, (16, 32))
    assert "tiles of 2 sizes (16x32 and 32x16 px)" in refusal(native, wide, tall)
    marked = tiny_model(words=WORDS, sight={"marks": ("start", "end")})
    assert "learned marks" in refusal(marked, Shown(11, (24, 24)))
    assert "not every picture here says so" in refusal(tiny_model(words=WORDS), Talk(), Talk())


def test_pictures_nobody_labelled_are_refused(tiny, batches):
    batch = dataclasses.replace(batches(tiny, 1, targets=True)[0], image_targets=None)
    with pytest.raises(DataError, match="talk-0/"):
        Objective(tiny.model, ("cells",), (3, 5)).counts([batch])


# Speech


CODEC = {
    "model_type": "tinymodal_codec",
    "encoder_stem": 16,
    "encoder_width": 16,
    "decoder_width": 16,
    "step_width": 16,
}


def talking(composed, design="talker", books=2, **options):
    """``composed`` with a mouth."""
    torch.manual_seed(1)
    width = composed.model.get_input_embeddings().embedding_dim
    config = {"design": design, "books": books, "book_size": 11, "width": 16, "heads": 2}
    composed.model.speech_head = build_speech_head(config | options, width)
    return composed


def spoken(composed, numbers, books=2, voice=0, **options):
    """Samples of ``Talk``; every second answer is spoken."""
    talk, found = Talk(**options), []
    for n in numbers:
        sample = composed.encoder(talk.sample(n))
        if n % 2 == 0:
            (places,) = (sample.labels != IGNORE).nonzero(as_tuple=True)
            codes = torch.randint(11, (books, 5 + n), generator=torch.Generator().manual_seed(n))
            item = SpeechItem(int(places[0]), int(places[-1]) + 1, None, codes, voice)
            sample = dataclasses.replace(sample, speech=(item,))
        found.append(sample)
    return found


@pytest.mark.parametrize("design", ["talker", "units"])
def test_the_speech_loss_of_micro_batches_adds_up_to_that_of_all(tiny, design):
    """Sums and counts: how answers are dealt to rows and batches changes nothing."""
    books = 2 if design == "talker" else 1
    objective = Objective(talking(tiny, design, books).model, ("speech",))
    samples = spoken(tiny, range(6), books)
    whole = together(tiny, [samples[:3], samples[3:]])
    parts = [together(tiny, [[sample]]) for sample in samples]
    assert objective.counts([whole]) == objective.counts(parts)
    assert objective.counts([whole])["speech"] == objective.model.speech_head.count((5, 7, 9))
    of_all, each = objective(whole), [objective(part) for part in parts]
    for name in ("loss", *of_all.measures):
        values = [t.sums["speech"] if name == "loss" else t.measures[name] for t in (of_all, *each)]
        torch.testing.assert_close(values[0], torch.stack(values[1:]).sum(), rtol=1e-5, atol=1e-4)
    assert [t.measures.keys() for t in each] == [of_all.measures.keys()] * 6
    assert float(each[1].sums["speech"].detach()) == 0.0


@pytest.mark.parametrize("language", ["llama", "gemma2"])
def test_the_head_reads_the_states_that_predict_the_answer_and_the_words_of_it(language):
    composed = talking(tiny_model(language=language, words=WORDS))
    (sample,) = spoken(composed, [4])
    (item,) = sample.speech
    out = composed.model.model(
        input_ids=sample.ids[None], pixel_values=sample.media[0].tiles[0][None], use_cache=False
    )
    states = out.last_hidden_state[0, item.first - 1 : item.last - 1]
    words = composed.model.get_input_embeddings()(sample.ids[item.first : item.last])
    frames = (item.codes.shape[1],)
    head = composed.model.speech_head
    expected, count, _ = head.loss(states, words, (len(words),), item.codes, frames, torch.tensor([0]))
    objective = Objective(composed.model, ("speech",))
    other = spoken(composed, [1, 2])
    batch = together(composed, [[*other[:1], sample]])
    torch.testing.assert_close(objective(batch).sums["speech"], expected, rtol=1e-5, atol=1e-4)
    assert objective.counts([batch]) == {"speech": count}


def test_the_text_and_its_gradient_are_bit_identical_with_and_without_a_mouth(tiny):
    """Where the states are not trained by speech, and without the loss, a mouth is nothing to the text."""
    batch = together(tiny, [spoken(tiny, range(4))])
    plain = Objective(tiny.model)(batch)
    plain.sums["text"].backward()
    gradients = {name: p.grad.clone() for name, p in tiny.model.named_parameters() if p.grad is not None}
    tiny.model.zero_grad()
    talking(tiny)
    for losses in (("text",), ("text", "speech")):
        terms = Objective(tiny.model, losses)(batch)
        assert torch.equal(terms.sums["text"], plain.sums["text"])
        assert torch.equal(terms.per_target, plain.per_target)
    Objective(tiny.model)(batch).sums["text"].backward()
    found = {name: p.grad for name, p in tiny.model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradients[name]) for name in found)


def test_speech_alone_asks_no_gradient_of_a_frozen_language_model(tiny):
    model = talking(tiny).model.requires_grad_(False)
    model.speech_head.requires_grad_(True)
    asked = []
    model.model.language_model.register_forward_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    batch = together(tiny, [spoken(tiny, range(4))])
    terms = Objective(model, ("speech",))(batch)
    terms.sums["speech"].backward()
    assert asked == [False]
    assert terms.per_target is None
    silent = {name for name, p in model.speech_head.named_parameters() if p.grad is None}
    assert silent == set()
    # Where the language model trains, it learns from speech too, and its embeddings through states alone.
    model.requires_grad_(True)
    Objective(model, ("speech",))(batch).sums["speech"].backward()
    assert asked[-1]
    assert all(p.grad is not None for p in model.model.language_model.layers.parameters())


def test_speech_is_the_same_of_documents_that_are_computed_apart(tiny):
    objective = Objective(talking(tiny).model, ("text", "speech"))
    batch = together(tiny, [spoken(tiny, range(3)), spoken(tiny, range(3, 6))])
    expected = objective(batch).sums
    objective.packing = packed.packing(tiny.model.model.language_model)
    assert objective.packing.by_document
    found = objective(batch).sums
    objective.packing.undo()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-4)


def test_speech_on_one_of_two_ranks_has_the_gradient_of_one_process(tiny):
    model = talking(tiny).model.requires_grad_(False)
    model.speech_head.requires_grad_(True)
    dealt = [
        [together(tiny, [spoken(tiny, [2, 4])]), together(tiny, [spoken(tiny, [6])])],
        [together(tiny, [spoken(tiny, [1, 3])])],
    ]

    def gradient(world, batches):
        objective = Objective(model, ("speech",))
        model.zero_grad()
        optimizer = torch.optim.SGD(model.speech_head.parameters(), lr=0.0)
        forward = None if world is ALONE else parallelize(objective, world, Parallel(kind="ddp"))
        report = step(objective, optimizer, batches, 0.0, world=world, forward=forward)
        return report.losses, dict(report.measures), [p.grad for p in model.speech_head.parameters()]

    losses, measures, expected = gradient(ALONE, [batch for batches in dealt for batch in batches])
    assert 0 < losses["speech"] < 10
    assert 0 <= measures["speech_right"] <= 1
    for found in on_ranks(2, lambda world: gradient(world, dealt[world.rank])):
        assert found[0] == pytest.approx(losses, rel=1e-5)
        assert found[1] == pytest.approx(measures, rel=1e-5)
        for one, other in zip(found[2], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_speech_of_a_model_without_a_mouth_is_refused(tiny):
    with pytest.raises(RecipeError, match=r"no speech head; add \[model\.speech\]"):
        Objective(tiny.model, ("text", "speech"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"books": 1}, "1 codebooks, but the speech head speaks 2"),
        ({"voice": 1}, r"voices \[1\], but the speech head has 1"),
    ],
)
def test_speech_that_the_head_cannot_say_is_refused_with_a_sample(tiny, change, told):
    objective = Objective(talking(tiny).model, ("speech",))
    with pytest.raises(DataError, match=rf"^talk-0/2: .*{told}"):
        objective.counts([together(tiny, [spoken(tiny, [2], **change)])])


def test_a_code_that_the_codec_does_not_have_is_refused_with_a_sample(tiny):
    objective = Objective(talking(tiny).model, ("speech",))
    batch = together(tiny, [spoken(tiny, [2])])
    batch.speech_codes[1, 3] = 11
    with pytest.raises(DataError, match=r"talk-0/2: spoken answers with code 11, .* 0 to 10"):
        objective.counts([batch])


def test_a_spoken_question_and_a_spoken_answer_pass_through_the_whole_house():
    """Sounds and pictures of rows that have either, both or none, against the model's own forward pass."""
    codec = open_codec(CODEC)
    mouth = {"design": "talker", "books": codec.books, "book_size": codec.book_size, "width": 16}
    model = build(hearing_config(speech=mouth))
    processor = TinyModalProcessor.of(model.config, hearing_tokenizer())
    encoder = Encoder(processor, "chatml", speech=Speaking(rate_hz=codec.rate_hz))

    def sample(n, *parts, said=None):
        answer = (Text("it is a circle"),) if said is None else (Text("yes"), Speech(sound(said, n), RATE_HZ))
        return Sample((Message("user", (*parts, Text("what"))), Message("assistant", answer)), f"s/{n}")

    heard = Audio(sound(1.0, 1), RATE_HZ)
    asked = [
        sample(0, heard, said=0.5),
        sample(1, Image(noise(24, 24)), heard),
        sample(2, said=0.7),
        sample(3, Image(noise(24, 24)), said=0.4),
    ]
    codes = CodeBook(None, codec)

    def encode(sample):
        document = encoder(sample)
        known = [dataclasses.replace(i, wave=None, codes=codes.codes(i.wave)) for i in document.speech]
        return dataclasses.replace(document, speech=tuple(known))

    rows = [[encode(s) for s in asked[:3]], [encode(asked[3])]]
    batch = collate(rows, 0, model.config.image_token_id, audio_token_id=model.config.audio_token_id)
    objective = Objective(model, ("text", "speech"))
    terms = objective(batch)
    own = model(**batch.inputs(), labels=batch.labels, use_cache=False)
    torch.testing.assert_close(terms.sums["text"], own.loss * batch.num_targets, rtol=1e-5, atol=1e-4)
    assert [len(codes) for codes in (batch.speech_frames, batch.speech_tokens)] == [3, 3]
    assert objective.counts([batch])["speech"] == codec.books * sum(batch.speech_frames) + 3
    # "yes" and the stop: every token of a spoken answer, and of no other.
    words = processor.tokenizer.convert_ids_to_tokens(batch.target_ids[batch.speech_take].tolist())
    assert words == ["yes", "<|im_end|>"] * 3
    terms.sums["speech"].backward()
    assert all(p.grad is not None for p in model.model.connectors["audio"].parameters())
