from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.model.test_language import PACKED, both
from tinymodal.compose.quantize import quantize
from tinymodal.train import adapters, attention, feed_forward, kernels, lean
from tinymodal.train.groups import blocks, trainable
from tinymodal.train.objective import Objective
from tinymodal.train.optim import build_optimizer, set_rates
from tinymodal.train.recipe import Lora
from tinymodal.train.recompute import set_recompute
from tinymodal.train.step import step

from .test_packed import assert_equal, batch_of, outcome

EVERYTHING = {"vision": 1e-3, "connectors": 1e-3, "language": 1e-3}
# How many feed-forwards, norms and attentions are ours in a decoder of two blocks; 0: the family's own.
FOUND = {"gpt2": (0, 0, 0), "phi": (2, 0, 2), "tinygptv_phi": (2, 2, 0), "phi3": (2, 5, 0)}
FOUND |= {"llama": (2, 5, 2), "qwen3": (2, 9, 2), "gemma2": (2, 9, 2), "gemma3_text": (2, 13, 2)}
FOUND |= {"stablelm": (2, 0, 2), "openelm": (2, 9, 0), "olmo2": (2, 9, 2), "minicpm": (2, 5, 2)}


@pytest.mark.parametrize("kind", PACKED)
def test_every_family_gives_the_losses_and_gradients_of_its_own_forwards(kind):
    objective = Objective(both(kind)[0])
    expected = outcome(objective, batch_of())
    with lean.lean(objective) as made:
        assert_equal(outcome(objective, batch_of()), expected)
        counts = tuple(made.counts.get(name, 0) for name in ("feed-forwards", "norms", "attentions"))
        assert counts == FOUND.get(kind, counts)
    again = outcome(objective, batch_of())
    assert torch.equal(again[0], expected[0])
    assert all(torch.equal(grad, expected[1][name]) for name, grad in again[1].items())


@pytest.mark.parametrize("vision", ["siglip_vision_model", "clip_vision_model", "dinov2", "tinymodal_tower"])
def test_towers_and_connectors_that_train_get_the_same_gradients(vision, batches):
    from tinymodal.compose.tiny import tiny_model

    from .talk import WORDS

    composed = tiny_model(vision, words=WORDS)
    (batch,) = batches(composed, 1)
    objective = Objective(composed.model)
    expected = outcome(objective, batch)
    with lean.lean(objective):
        assert_equal(outcome(objective, batch), expected)


@pytest.mark.parametrize(
    "train", [{"connectors": 1e-3}, {"language": 1e-3}, {"embeddings": 1e-3}, EVERYTHING]
)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(tiny, batches, train):
    (batch,) = batches(tiny, 1)
    trainable(tiny.model, train)
    objective = Objective(tiny.model)
    expected = outcome(objective, batch)
    with lean.lean(objective):
        assert_equal(outcome(objective, batch), expected)
        objective(batch).sums["text"].backward()
        assert all((p.grad is None) >= (not p.requires_grad) for p in tiny.model.parameters())


def test_with_adapters_the_losses_and_gradients_are_the_same(tiny, batches):
    (batch,) = batches(tiny, 1)
    lora = Lora(rank=2, dropout=0.0, parts=("vision", "language"))
    names = adapters.inject(tiny.model, lora)
    trainable(tiny.model, {"adapters": 1e-3, "connectors": 1e-3}, adapted=names)
    for name, p in tiny.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)  # they begin at zero, and would do nothing
    objective = Objective(tiny.model)
    expected = outcome(objective, batch)
    with lean.lean(objective) as made:
        assert made.counts["attentions"] == 2
        assert_equal(outcome(objective, batch), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_of_few_bits_are_called_as_they_are(tiny, batches, bits):
    pytest.importorskip("bitsandbytes")
    (batch,) = batches(tiny, 1)
    quantize(tiny.model.model.language_model, bits, torch.device("cpu"), torch.float32)
    trainable(tiny.model, {"connectors": 1e-3})
    objective = Objective(tiny.model)
    with torch.no_grad():
        expected = objective(batch).per_target
        with lean.lean(objective):
            found = objective(batch).per_target
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3 if bits == 8 else 1e-4)


@pytest.mark.parametrize("every", ["full", 2, 1])
def test_recomputing_gives_the_same_and_keeps_less(every):
    objective = Objective(both("qwen2")[0].train())
    with lean.lean(objective):
        plain, kept = counted(objective)
        set_recompute(objective.model, every)
        again, kept_less = counted(objective)
        set_recompute(objective.model, "none")
        assert counted(objective)[1] == kept
    assert torch.equal(again[0], plain[0])
    assert all(torch.equal(grad, plain[1][name]) for name, grad in again[1].items())
    assert kept_less < (0.9 if every == 2 else 0.6) * kept


def counted(objective):
    """The outcome, and how many numbers the backward pass was left."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = outcome(objective, batch_of())
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    return found, sum(number for place, number in kept.items() if place not in own)


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_much_less_is_kept_for_the_backward_pass(kind):
    objective = Objective(both(kind)[0])
    _, much = counted(objective)
    with lean.lean(objective):
        _, little = counted(objective)
    assert little < 0.5 * much


def test_in_bfloat16_it_comes_as_close_as_the_familys_own():
    for kind in ("llama", "phi", "qwen3"):
        objective = Objective(both(kind)[0])
        exact = float(objective(batch_of()).sums["text"].detach())
        apart = []
        for enabled in (False, True):
            with lean.lean(objective, enabled), torch.autocast("cpu", torch.bfloat16):
                terms = objective(batch_of())
            terms.sums["text"].backward()
            apart.append(abs(float(terms.sums["text"].detach()) - exact))
            assert {p.grad.dtype for p in objective.parameters() if p.grad is not None} == {torch.float32}
        assert apart[1] <= 2 * apart[0] + 0.02 * exact


def test_steps_resumed_in_the_middle_are_those_that_never_stopped(tiny, batches, stage):
    """Nothing depends on how long it has been on: bit for bit, as a run that is started again must be."""
    drawn = batches(tiny, 4)
    ends = []
    for stop in (None, 2):
        model = copy.deepcopy(tiny.model)
        objective = Objective(model)
        made = lean.lean(objective)
        optimizer = build_optimizer(trainable(model, EVERYTHING), stage)
        set_rates(optimizer, 1.0)
        for number, batch in enumerate(drawn):
            if number == stop:
                made.restore()
                made = lean.lean(objective)
            step(objective, optimizer, [batch])
        made.restore()
        ends.append(list(model.parameters()))
    assert all(map(torch.equal, *ends))


def test_a_copy_made_meanwhile_computes_with_its_own_weights():
    objective = Objective(both("llama")[0])
    with lean.lean(objective):
        copied = copy.deepcopy(objective)
        expected = outcome(objective, batch_of())
        with torch.no_grad():
            for p in objective.parameters():
                p.zero_()
        assert_equal(outcome(copied, batch_of()), expected)


def test_names_weights_and_random_states_stay_as_they_were(tiny, tmp_path):
    from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration

    before = {name: p.clone() for name, p in tiny.model.state_dict().items()}
    random, modes = torch.get_rng_state(), [m.training for m in tiny.model.modules()]
    objective = Objective(tiny.model)
    made = lean.lean(objective)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in tiny.model.modules()] == modes
    assert all(p.grad is None for p in tiny.model.parameters())
    now = tiny.model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[name], p) for name, p in before.items())
    tiny.model.save_pretrained(tmp_path)
    again = TinyModalForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.text_config._attn_implementation == "sdpa"
    made.restore()
    made.restore()
    assert not any("forward" in module.__dict__ for module in tiny.model.modules())


def test_a_second_time_changes_nothing_and_ends_nothing():
    objective = Objective(both("llama")[0])
    first = lean.lean(objective)
    with lean.lean(objective) as second:
        assert not second.counts
    assert objective.packing is not None
    assert objective.packing.by_document
    first.restore()
    assert objective.packing is None


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_positions_in_stretches_give_what_all_at_once_give(kind, compiled, monkeypatch):
    objective = Objective(both(kind)[0])
    expected = outcome(objective, batch_of())
    monkeypatch.setattr(feed_forward, "WIDE_ELEMENTS", 1)
    monkeypatch.setattr(feed_forward, "LEAST", 3)
    if not compiled:
        monkeypatch.setattr(kernels, "fit", lambda *tensors: None)
    with lean.lean(objective) as made:
        assert made.counts["feed-forwards"] == 2
        assert_equal(outcome(objective, batch_of()), expected)


def test_stretches_are_alike_and_none_at_all_is_one():
    h = torch.empty(1300, 1 << 14)
    found = list(feed_forward._stretches(h))
    assert [len(h[part]) for part in found] == [650, 650]
    assert list(feed_forward._stretches(h[:0])) == [slice(0, 0)]


def test_where_no_position_is_left_the_gradient_is_zero_and_not_none():
    both_kinds = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
    forward = feed_forward.find_feed_forward(both_kinds)
    forward(both_kinds, torch.randn(1, 0, 6)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in both_kinds.parameters())


def test_documents_of_one_length_attend_together_bit_for_bit_as_alone():
    objective = Objective(both("llama")[0])
    lengths = (6, 6, 6, 9, 6)
    assert attention._runs(lengths) == [(slice(0, 18), 6), (slice(18, 27), 9), (slice(27, 33), 6)]
    batch = batch_of(lengths, (2, 5, 11, 17, 20, 26, 32), rows=1)
    with lean.lean(objective):
        expected = outcome(objective, batch)
        with pytest.MonkeyPatch.context() as patched:
            together = attention._runs
            patched.setattr(attention, "_runs", lambda lengths: apart(together(lengths)))
            found = outcome(objective, batch)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(grad, expected[1][name]) for name, grad in found[1].items())


def apart(runs):
    return [
        (slice(at, at + length), length) for run, length in runs for at in range(run.start, run.stop, length)
    ]


@pytest.mark.parametrize("trains", [False, True])
def test_a_tower_that_is_frozen_runs_once_and_leaves_nothing(tiny, batches, trains):
    (batch,) = batches(tiny, 1)
    trainable(tiny.model, EVERYTHING if trains else {"connectors": 1e-3})
    set_recompute(tiny.model, "full")
    tower, runs = tiny.model.model.towers["image"], []
    hook = blocks(tower)[0].register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    objective = Objective(tiny.model)
    expected = outcome(objective, batch)
    runs.clear()
    with lean.lean(objective):
        assert_equal(outcome(objective, batch), expected)
    hook.remove()
    assert set(runs) == {trains}
    assert trains or len(runs) == 1


class Looks(nn.Module):
    """A feed-forward by its parts, but not by what it does with them."""

    def __init__(self, twist):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)
        self.twist = twist

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) * self.twist


class ScaleNorm(nn.Module):
    """A norm with one weight for all numbers of a row."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.tensor([weight])), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def test_one_weight_that_stands_for_a_whole_row_is_read_once_and_nothing_behind_it():
    norm, x = ScaleNorm(1.5), torch.randn(3, 8)
    expected = norm(x)
    # Of one number it is an RMS norm, and may be taken for one.
    forward = feed_forward.find_norm(norm)
    assert forward is None or torch.equal(forward(norm, x), expected)
    assert feed_forward._rms_norm(norm, x, eps=1e-6, offset=0.0).equal(expected)


def test_a_gate_narrower_than_what_it_gates_is_widened_as_torch_does():
    gate, up, d = torch.randn(4, 1), torch.randn(4, 6), torch.randn(4, 6)
    act = feed_forward.Act("silu")
    torch.testing.assert_close(act.gated(up, gate), F.silu(up) * gate)
    torch.testing.assert_close(act.back(d, gate), torch.ops.aten.silu_backward(d, gate))


@pytest.mark.parametrize(("twist", "taken"), [(1.0, True), (1.001, False)])
def test_a_module_that_only_looks_like_one_is_left_alone(twist, taken):
    assert (feed_forward.find_feed_forward(Looks(twist)) is not None) is taken


def test_a_wrong_gradient_is_seen_where_the_output_is_right(monkeypatch):
    own = feed_forward.Act.back
    monkeypatch.setattr(feed_forward.Act, "back", lambda self, d, h: own(self, d, h) * 1.001)
    assert feed_forward.find_feed_forward(Looks(1.0)) is None


@pytest.mark.parametrize("name", ["gelu_tanh", "quick_gelu", "gelu", "silu", "relu"])
def test_an_activation_and_its_derivative_are_torchs(name):
    plain = {
        "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
        "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
        "gelu": F.gelu,
        "silu": F.silu,
        "relu": F.relu,
    }[name]
    h = torch.linspace(-12, 12, 4001, dtype=torch.float32).requires_grad_()
    slope = torch.linspace(-1, 1, 4001)
    (expected,) = torch.autograd.grad((plain(h) * slope).sum(), h)
    act = feed_forward.Act(name)
    torch.testing.assert_close(act(h.detach()), plain(h).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(act.back(slope, h.detach()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("far", [1e-30, 1.0, 1e4])
def test_an_rms_norm_holds_over_all_sizes(far):
    x = (far * torch.randn(3, 5, 16, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(16, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(3, 5, 16, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad((norm(x) * slope).sum(), (x, weight))
        for norm in (
            lambda x: feed_forward.RMSNorm.apply(x, weight, 1e-6),
            lambda x: weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
        )
    )
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9 * float(two.abs().max()))


def test_documents_of_one_position_and_long_ones_attend_as_a_mask_says():
    objective = Objective(both("phi")[0])
    batch = batch_of((1, 30, 1, 8), (0, 5, 30, 38), rows=1)
    expected = outcome(objective, batch)
    with lean.lean(objective):
        assert_equal(outcome(objective, batch), expected)
        # Whatever torch's CPU kernel is called in another version.
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(attention, "FLASH", None)
            assert_equal(outcome(objective, batch), expected)


def test_a_batch_that_does_not_say_where_its_documents_end_is_read_by_positions():
    objective = Objective(both("llama")[0])
    expected = outcome(objective, batch_of())
    with lean.lean(objective):
        assert_equal(outcome(objective, dataclasses.replace(batch_of(), lengths=())), expected)


def test_lines_say_what_is_on_and_why_not_more():
    with lean.lean(Objective(both("llama")[0])) as made:
        assert made.lines[:2] == ["documents one by one", "last block at targets"]
        assert made.lines[-1] == "their loops compiled" or "not compiled (" in made.lines[-1]
    with lean.lean(Objective(both("opt")[0])) as made:
        assert made.lines[0].startswith("documents by a mask (states of OPTModel differ by")
