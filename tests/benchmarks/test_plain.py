"""What we compare with does the same work: the same loss, the same gradients, from the same samples."""

from __future__ import annotations

import pytest
import torch

from benchmarks import ours as engine
from benchmarks.measure import count
from benchmarks.plain import HERE, pad, plain_step
from benchmarks.shapes import IMAGE_TOKEN, MIX, PAD, REAL, SEVENTH, TOY, Made
from benchmarks.train_step import micro_batches, ours_counts, plain_counts, plain_way
from tinymodal.train import kernels

NAMES = pytest.mark.parametrize("name", list(TOY))
KINDS = pytest.mark.parametrize("kind", ["pretrain", "sft"])


def larger(model):
    """Weights that make attention and pictures matter: random ones of 0.02 hardly do."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return model


@NAMES
@KINDS
def test_loss_and_gradient_are_ours(name, kind):
    shape = TOY[name]
    data = engine.Data(shape, kind, 2)
    model = larger(shape.model())
    plain, optimizer = plain_way(model, kind)
    ours = engine.Ours(model, engine.stage_of(shape, kind))
    optimizer.zero_grad = lambda: None  # its gradients are looked at
    expected = plain_step(plain, optimizer, micro_batches(data.samples, shape), clip=0)
    report = engine.step(ours.objective, ours.optimizer, data.batches(), clip=0)
    assert report.loss == pytest.approx(expected, rel=1e-5)
    ours_of = {n: p.grad for n, p in model.model.connectors["image"].named_parameters()}
    for n, p in plain.connector.named_parameters():
        torch.testing.assert_close(p.grad, ours_of[n], rtol=1e-3, atol=2e-6, msg=n)
    if kind == "sft":
        language = dict(plain.language.base_model.named_parameters())
        for n, p in model.model.language_model.named_parameters():
            torch.testing.assert_close(p.grad, language[n].grad, rtol=1e-3, atol=2e-6, msg=n)


def test_every_block_of_the_tower_runs_a_zero_picture_stands_in_and_rows_are_padded():
    shape = TOY["0.9B"]
    samples = engine.Data(shape, "sft", 4).samples
    text = next(s for s in samples if not s.media)
    seen = next(s for s in samples if s.media)
    batch = pad([text, seen], IMAGE_TOKEN, PAD, shape.image_px)
    assert batch.places[0] is None
    assert not batch.pixels[0].any()
    assert batch.pixels[1].any()
    assert (batch.ids == HERE).sum() == 1
    assert batch.lengths == (len(text), len(seen) - shape.tokens + 1)
    plain, _ = plain_way(shape.model(), "sft")
    ran = []
    for module in plain.tower.modules():
        if type(module).__name__ == "SiglipEncoderLayer":
            module.register_forward_hook(lambda *_: ran.append(1))
    plain.recompute(False)
    plain(batch)
    assert len(ran) == shape.vision["num_hidden_layers"]


def test_recomputation_is_on_as_shipped_and_changes_no_loss():
    shape = TOY["0.9B"]
    data = engine.Data(shape, "sft", 1)
    plain, optimizer = plain_way(shape.model(), "sft")
    (first, *_) = padded = micro_batches(data.samples, shape)
    shipped = count(lambda: plain(first).backward(), plain.parameters())
    one = plain_step(plain, optimizer, padded)
    plain.recompute(False)
    assert plain_step(plain, optimizer, padded) == one
    kept = count(lambda: plain(first).backward(), plain.parameters())
    assert shipped.gflop > 1.1 * kept.gflop
    assert shipped.activations_mb < kept.activations_mb


@pytest.mark.slow
@KINDS
def test_counts_without_numbers_are_those_with_numbers(kind, monkeypatch):
    """What the real sizes are counted with agrees with a run, both ways, with recomputation and without."""
    # Counts see torch's operators, and tensors without numbers never reach the compiled loops.
    monkeypatch.setattr(kernels, "fit", lambda *tensors: None)
    shape = TOY["0.9B"]
    data = engine.Data(shape, kind, 2)
    padded, batches = micro_batches(data.samples, shape), data.batches()
    for recompute in ("none", "full"):
        model = shape.model()
        ours = engine.Ours(model, engine.stage_of(shape, kind), recompute)
        real = count(lambda ours=ours: ours.passes(batches), ours.parameters())
        unread, lines = ours_counts(shape, kind, batches, recompute)
        assert lines == ours.lean.lines
        assert unread.gflop == pytest.approx(real.gflop, rel=1e-6)
        assert unread.touched_gb == pytest.approx(real.touched_gb, rel=0.02)
        assert unread.activations_mb == pytest.approx(real.activations_mb, rel=0.05)
        plain, _ = plain_way(shape.model(), kind)
        plain.recompute(recompute == "full")
        real = count(lambda plain=plain: [plain(b, 1).backward() for b in padded], plain.parameters())
        unread = plain_counts(shape, kind, padded, recompute == "full")
        assert unread.gflop == pytest.approx(real.gflop, rel=1e-6)
        if kind == "sft":
            # Captions of one length need no padding, and transformers drops the mask where it sees that.
            assert unread.touched_gb == pytest.approx(real.touched_gb, rel=0.02)
            assert unread.activations_mb == pytest.approx(real.activations_mb, rel=0.05)


@NAMES
def test_small_shapes_have_the_shares_of_work_of_the_real_ones(name):
    """Of a picture with 20 words: tower, decoder, attention and head, in operations forward."""
    found = []
    for shapes in (REAL, SEVENTH):
        shape = shapes[name]
        vision, text, tokens = shape.vision, shape.language, shape.tokens
        width, eye = text["hidden_size"], vision["hidden_size"]
        heads = text["num_attention_heads"]
        own = width * (2 * width + 2 * width * text["num_key_value_heads"] / heads)
        matrices = 3 if text["model_type"] == "qwen2" else 2
        block = own + matrices * width * text["intermediate_size"]
        decoder = 2 * tokens * block * text["num_hidden_layers"]
        tower = (
            2 * tokens * (4 * eye**2 + 2 * eye * vision["intermediate_size"]) * vision["num_hidden_layers"]
        )
        attention = 4 * tokens**2 * width * text["num_hidden_layers"]
        head = 2 * tokens * width * text["vocab_size"]
        found.append([tower / decoder, attention / decoder, head / decoder])
    for real, small in zip(*found, strict=True):
        assert small == pytest.approx(real, rel=0.12)
    for key in ("num_hidden_layers",):
        assert REAL[name].language[key] == SEVENTH[name].language[key]
        assert REAL[name].vision[key] == SEVENTH[name].vision[key]


def test_the_mix_has_the_rows_of_llava_665k():
    assert sum(part.rows for part in MIX.values()) == pytest.approx(665, abs=1)
    made = Made(REAL["0.9B"], "sft")
    lengths = [len(made.sample(n)) - (729 if made.sample(n).media else 0) for n in range(300)]
    assert sum(lengths) / 300 == pytest.approx(280 + 35, rel=0.2)
    text_only = sum(not made.sample(n).media for n in range(300))
    assert 8 <= text_only <= 30  # 6 %


def test_samples_are_the_same_each_time():
    one, two = (engine.Data(TOY["0.9B"], "sft", 2) for _ in range(2))
    assert [s.sample_id for s in one.samples] == [s.sample_id for s in two.samples]
    assert all(map(torch.equal, [s.ids for s in one.samples], [s.ids for s in two.samples]))
    first, again = one.batches(), one.batches()
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, again, strict=True))
    assert sorted(n for b in first for n in b.sample_ids) == sorted(s.sample_id for s in one.samples)
