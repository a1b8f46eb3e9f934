from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import DataError
from tinymodal.core.types import IGNORE, Image
from tinymodal.data.collate import collate
from tinymodal.train.objective import CellHeads, Objective

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
