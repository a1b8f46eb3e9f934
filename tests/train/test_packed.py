from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.test_language import PACKED, VOCABULARY, both
from tinymodal.core.types import Batch
from tinymodal.train import packed
from tinymodal.train.groups import blocks
from tinymodal.train.objective import Objective

LENGTHS = (6, 9, 5, 11, 7, 2)
"""Two rows of 20. Nothing trains in the third and the last: a tail, or a document without an answer."""
TARGETS = (2, 3, 9, 10, 13, 21, 25, 30, 31, 36)


def batch_of(lengths=LENGTHS, targets=TARGETS, rows=2, seed=0):
    ids = torch.randint(6, VOCABULARY, (rows, sum(lengths) // rows), generator=torch.manual_seed(seed))
    places = torch.cat([torch.arange(length) for length in lengths]).view_as(ids)
    index = torch.tensor(targets, dtype=torch.int64)
    return Batch(
        input_ids=ids,
        labels=ids,
        position_ids=places,
        pixel_values=None,
        image_take=None,
        image_put=None,
        target_index=index,
        target_ids=ids.flatten().roll(-1)[index],
        image_targets=None,
        sample_ids=("a",),
        num_tokens=ids.numel(),
        lengths=tuple(lengths),
    )


def outcome(objective, batch):
    """Losses of the targets, and the gradient of every parameter."""
    objective.zero_grad()
    terms = objective(batch)
    terms.sums["text"].backward()
    grads = {
        name: torch.zeros(()) if p.grad is None else p.grad.clone()
        for name, p in objective.named_parameters()
    }
    objective.zero_grad()
    return terms.per_target, grads


def assert_equal(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    largest = max(float(grad.abs().max()) for grad in expected[1].values())
    for name, grad in expected[1].items():
        # 1e-6 of the largest with transformers 5.23; a document that sees another moves it by 0.05.
        torch.testing.assert_close(
            found[1][name].expand_as(grad), grad, rtol=0, atol=1e-5 * largest, msg=name
        )


def switched(kind):
    """A model, what its own way gives, and the objective with documents one by one."""
    objective = Objective(both(kind)[0])
    expected = outcome(objective, batch_of())
    objective.packing = packed.packing(objective.model.model.language_model)
    return objective, expected


@pytest.mark.parametrize("kind", [kind for kind in PACKED if kind != "gpt_neo"])
def test_documents_one_by_one_give_the_losses_and_gradients_of_a_mask(kind):
    """Windows of 4 among them, soft caps, blocks side by side, norms of queries and keys, no rotation."""
    objective, expected = switched(kind)
    assert objective.packing.by_document
    assert objective.packing.pruned is (kind != "gpt2")
    assert_equal(outcome(objective, batch_of()), expected)
    # As on a GPU, where nobody knows how many targets a document has.
    blind = [(far, 0) for far, _ in packed.reach(batch_of())]
    documents, take = packed.needed(dataclasses.replace(batch_of(), reach=tuple(blind)))
    assert sum(documents.counts) == 0
    x = objective.model.get_input_embeddings()(batch_of().input_ids).flatten(0, 1)[take]
    places = batch_of().position_ids.flatten()[take]
    known = packed.needed(batch_of())[0]
    lm = objective.model.model.language_model
    with torch.no_grad():
        one, two = (
            packed.run(lm, x[None], places[None], told)
            for told in (known, dataclasses.replace(known, counts=()))
        )
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize(
    ("kind", "why"), [("gpt_neo", "does not hand documents on"), ("opt", "differ by"), ("lfm2", "layers of")]
)
def test_what_is_not_equal_stays_as_it_was_and_says_why(kind, why):
    objective, expected = switched(kind)
    assert not objective.packing.by_document
    assert why in objective.packing.why
    assert not any("forward" in block.__dict__ for block in objective.modules())
    assert_equal(outcome(objective, batch_of()), expected)


def test_a_family_whose_shapes_are_fixed_beforehand_keeps_its_last_block_whole():
    objective, _ = switched("gpt2")
    assert objective.packing.why.startswith("the last block is computed whole: GPT2Model")


def test_a_window_that_attention_is_not_told_is_noticed(monkeypatch):
    """The trial's documents are shorter than any window: what config and blocks say must agree."""
    language_model = both("Mistral 0.1", sliding_window=64)[0].model.language_model
    own = packed.attend
    monkeypatch.setattr(packed, "attend", lambda *args, sliding_window=None, **kw: own(*args, **kw))
    packing = packed.packing(language_model)
    assert packing.why == "a block does not say how far it sees"
    assert language_model.config._attn_implementation == "sdpa"


def test_nothing_is_computed_that_no_target_depends_on():
    objective, _ = switched("llama")
    seen = []
    first, last = blocks(objective.model.model.language_model)
    for module in (first.mlp, last.self_attn.k_proj, last.mlp):
        module.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    queries = []
    last.self_attn.q_proj.register_forward_hook(lambda *given: queries.append(given[2]))
    objective(batch_of())
    reached = 4 + 8 + 11 + 6  # up to the last target of each document that has one
    # Keys of all, and once more of the targets, where nobody reads them.
    assert seen == [reached, reached, len(TARGETS), len(TARGETS)]
    assert [q.shape[1] for q in queries if q.stride(1)] == [len(TARGETS)]  # the others are one zero


def test_no_mask_of_whole_rows_is_made():
    objective, _ = switched("qwen2")
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bool:
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        outcome(objective, batch_of())
    assert largest <= 4 * 11  # the targets of one document, in its last block


def test_other_documents_do_not_move_a_loss_by_one_bit():
    objective, _ = switched("llama")
    batch = batch_of()
    before = objective(batch).per_target
    ids = batch.input_ids.clone()
    ids[0, :6] = 7
    ids[1, 0:11] = 8
    after = objective(dataclasses.replace(batch, input_ids=ids)).per_target
    assert torch.equal(before[2:5], after[2:5])
    assert torch.equal(before[-1:], after[-1:])
    assert not torch.equal(before[:2], after[:2])


def test_a_batch_in_which_nothing_trains_runs_and_gives_nothing():
    objective, _ = switched("phi")
    batch = batch_of(targets=())
    terms = objective(batch)
    assert terms.sums["text"] == 0
    assert terms.per_target.shape == (0,)
    terms.sums["text"].backward()


@pytest.mark.parametrize("kind", ["llama", "phi", "Mistral 0.1"])
def test_a_kernel_for_all_documents_at_once_is_asked_for_the_same(kind, monkeypatch):
    """What it is told, with a stand-in that does what torch says of it."""

    def varlen_attn(q, k, v, q_ends, k_ends, longest_q, longest_k, *, scale, window_size, enable_gqa):
        assert torch.equal(q_ends, k_ends)
        assert q_ends.dtype == torch.int32
        assert (longest_q, longest_k) == (int(q_ends.diff().max()),) * 2
        left, right = window_size
        assert right == 0
        outs = []
        for start, end in itertools.pairwise(q_ends.tolist()):
            one, two, three = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            places = torch.arange(end - start)
            seen = places <= places[:, None]
            if left >= 0:
                seen &= places >= places[:, None] - left
            out = F.scaled_dot_product_attention(one, two, three, seen, scale=scale, enable_gqa=enable_gqa)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    objective, expected = switched(kind)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(packed, "_fits_varlen", lambda query, told: True)
    objective.packing.varlen = True
    assert_equal(outcome(objective, batch_of()), expected)


def test_ordinary_calls_are_as_they_were_while_it_is_on():
    """Generation, evaluation in the middle of a stage, padded batches: their masks count."""
    for kind in ("llama", "gemma2", "stablelm"):
        model = both(kind)[0]
        ids = torch.randint(6, VOCABULARY, (2, 7))
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
        with torch.no_grad():
            expected = [model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits]
            packing = packed.packing(model.model.language_model)
            assert packing.by_document
            found = [model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits]
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(found[1][mask.bool()], expected[1][mask.bool()], rtol=0, atol=1e-4)


def test_undone_it_leaves_no_trace_and_moves_no_random_state():
    language_model = both("stablelm")[0].model.language_model
    language_model.train()
    before = torch.get_rng_state(), language_model.config.to_dict()
    packing = packed.packing(language_model)
    assert all(module.training for module in language_model.modules())
    assert language_model.config.to_dict() == before[1]  # what a folder would say
    packing.undo()
    packing.undo()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert language_model.config._attn_implementation == "sdpa"
    assert not any("forward" in module.__dict__ for module in language_model.modules())


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_is_needed_is_every_position_up_to_a_documents_last_target(data):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    total = sum(lengths)
    targets = sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1)))
    batch = batch_of(lengths, targets, rows=1)
    documents, take = packed.needed(batch)
    wanted, counts, start = [], [], 0
    for length in lengths:
        inside = [t - start for t in batch.target_index.tolist() if start <= t < start + length]
        if inside:
            counts.append(len(inside))
            wanted.append(list(range(start, start + max(inside) + 1)))
        start += length
    assert documents.lengths == tuple(map(len, wanted))
    assert documents.counts == tuple(counts)
    whole = torch.arange(total) if take is None else take
    assert whole.tolist() == [place for span in wanted for place in span]
    assert whole[documents.rows].tolist() == batch.target_index.tolist()
    assert packed.needed(batch, prune=False)[0].rows is None
