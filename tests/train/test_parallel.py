from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import CheckpointError, DataError
from tinymodal.core.types import MediaItem
from tinymodal.data.collate import collate
from tinymodal.train import adapters
from tinymodal.train.groups import trainable
from tinymodal.train.lean import lean
from tinymodal.train.objective import Objective
from tinymodal.train.optim import set_rates
from tinymodal.train.parallel import (
    ALONE,
    full_optimizer_state,
    full_state,
    load_optimizer_state,
    make_whole,
    parallelize,
)
from tinymodal.train.recipe import Lora, Parallel
from tinymodal.train.step import step

from .ranks import together
from .talk import WORDS, Talk

EVERYTHING = {"vision": 1e-3, "connectors": 1e-3, "language": 1e-3}
PICTURES, WORDS_ONLY, MIXED = (1, 2), (0, 3), (4, 6)
"""Samples of ``Talk`` that show a picture, that show none, and one of each."""
KINDS = ("ddp", pytest.param("fsdp", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def start():
    """A tiny model to begin with; nobody trains it itself."""
    return tiny_model(words=WORDS)


def batch_of(composed, ids, talk=None):
    rows = [[composed.encoder((talk or Talk()).sample(n))] for n in ids]
    return collate(rows, composed.tokenizer.pad_token_id, composed.model.config.image_token_id)


class Run:
    """A stage on this rank, begun with a copy of ``composed``."""

    def __init__(self, composed, world=ALONE, train=EVERYTHING, kind="ddp", **options):
        lora = options.pop("lora", None)
        losses, classes = options.pop("losses", ("text",)), options.pop("classes", ())
        self.precision = options.pop("precision", "float32")
        torch.manual_seed(0)
        model = copy.deepcopy(composed.model)
        names = adapters.inject(model, lora) if lora else []
        self.world, self.objective = world, Objective(model, losses, classes)

        def groups():
            return trainable(model, train, 0.0, self.objective.heads, adapted=names)

        groups()
        if options.pop("recompute", False):
            # Its name changed with transformers 5.23.
            names_ = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            next(getattr(model, n) for n in names_ if hasattr(model, n))({"use_reentrant": False})
        self.lean = lean(self.objective, options.pop("lean", True))
        self.forward = parallelize(self.objective, world, Parallel(kind=kind, **options), self.precision)
        self.optimizer = torch.optim.AdamW(groups(), lr=0.0, fused=True)
        set_rates(self.optimizer, 1.0)

    def step(self, batches, clip=0.0, **options):
        return step(
            self.objective,
            self.optimizer,
            batches,
            clip,
            self.precision,
            world=self.world,
            forward=self.forward,
            **options,
        )

    def tensors(self, of):
        """Name -> whole tensor of every parameter, or of what ``of`` makes of it."""
        found = {}
        for name, p in self.objective.named_parameters():
            value = of(p)
            found[name] = value.full_tensor() if isinstance(value, DTensor) else value
        return {name: None if v is None else v.detach().clone() for name, v in found.items()}

    def gradients(self):
        return self.tensors(lambda p: p.grad)

    def weights(self):
        return self.tensors(lambda p: p)


def same(one, other):
    """Whether two states are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys()
    assert any(grad is not None for grad in expected.values())
    for name, grad in expected.items():
        assert (found[name] is None) == (grad is None), name
        if grad is not None:
            # Another order of summation in float32; a gradient of a mean of means differs by 0.1.
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6, msg=name)


def compare(composed, dealt, kind, size=2, local_size=None, **options):
    """One step of one process on all batches, and of ``size`` ranks on what is dealt to each."""
    alone = Run(composed, **{k: v for k, v in options.items() if k != "reshard"})
    whole = alone.step([batch for batches in dealt for batch in batches])
    expected = alone.gradients()

    def body(world):
        run = Run(composed, world, kind=kind, **options)
        report = run.step(dealt[world.rank])
        return report, run.gradients()

    for report, found in together(size, body, local_size):
        assert report.loss == pytest.approx(whole.loss, rel=1e-6)
        assert report.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
        assert (report.num_tokens, report.num_targets) == (whole.num_tokens, whole.num_targets)
        assert (report.num_positions, report.num_samples) == (whole.num_positions, whole.num_samples)
        assert report.groups.keys() == whole.groups.keys()
        for key, (total, count) in whole.groups.items():
            assert report.groups[key] == (pytest.approx(total, rel=1e-6), count)
        assert_equal_gradients(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "train", [EVERYTHING, {"connectors": 1e-3}, {"language": 1e-3}], ids=["all", "connectors", "language"]
)
def test_every_mix_of_media_on_two_ranks_has_the_gradient_of_one_process(start, kind, train):
    """Image-only, text-only and mixed ranks, with unequal targets: nobody hangs, nothing differs."""
    mixes = list(itertools.product((PICTURES, WORDS_ONLY, MIXED), repeat=2))
    if train == {"connectors": 1e-3}:
        mixes.remove((WORDS_ONLY, WORDS_ONLY))  # no gradient at all; see below
    batches = {ids: batch_of(start, ids) for ids in (PICTURES, WORDS_ONLY, MIXED)}
    expected = {}
    for mix in mixes:
        alone = Run(start, train=train)
        report = alone.step([batches[ids] for ids in mix])
        expected[mix] = report.loss, alone.gradients()

    def body(world):
        answers = {}
        for mix in mixes:
            run = Run(start, world, train, kind)
            report = run.step([batches[mix[world.rank]]])
            answers[mix] = report.loss, run.gradients()
        return answers

    for answers in together(2, body):
        for mix, (loss, gradients) in answers.items():
            assert loss == pytest.approx(expected[mix][0], rel=1e-6)
            assert_equal_gradients(gradients, expected[mix][1])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_with_other_media_have_the_gradient_of_one_process(start, kind):
    compare(start, [[batch_of(start, PICTURES)], [batch_of(start, WORDS_ONLY)]], kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_micro_batches_may_be_dealt_in_any_way(start, kind):
    """Pictures first or last or nowhere on a rank, more micro-batches here than there, and none at all."""
    pictures, words, mixed = (batch_of(start, ids) for ids in (PICTURES, WORDS_ONLY, MIXED))
    for dealt in (
        [[pictures, words], [words, mixed]],
        [[words, pictures, words], [words]],
        [[mixed, words], []],
    ):
        compare(start, dealt, kind)


@pytest.mark.slow
def test_keeping_gathered_weights_changes_nothing(start):
    dealt = [[batch_of(start, PICTURES)], [batch_of(start, WORDS_ONLY)]]
    compare(start, dealt, "fsdp", reshard=False)


@pytest.mark.slow
def test_hybrid_shards_within_a_node_and_copies_between_nodes(start):
    pictures, words, mixed = (batch_of(start, ids) for ids in (PICTURES, WORDS_ONLY, MIXED))
    dealt = [[pictures, mixed], [words, words], [mixed, words], [words, pictures]]
    compare(start, dealt, "hybrid", size=4, local_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("lora", ["lora", "dora"])
def test_adapters_train_on_ranks_as_in_one_process(start, kind, lora):
    dealt = [[batch_of(start, PICTURES)], [batch_of(start, WORDS_ONLY)]]
    adapter = Lora(rank=2, dropout=0.0, kind=lora)
    compare(start, dealt, kind, train={"adapters": 1e-3, "connectors": 1e-3}, lora=adapter)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_tiles_of_many_sizes_and_learned_marks_need_not_be_the_same_on_all_ranks(kind):
    """A tower that trains runs once for each size: twice here, once there, and not at all."""
    sight = {"resize": "native", "fit_pixels": (256, 1024), "marks": ("start", "end")}
    composed = tiny_model(words=WORDS, sight=sight)

    talk = Talk()

    def shown(index, size):
        sample = talk.sample(index)
        user, answer = sample.messages
        parts = tuple(
            dataclasses.replace(p, source=p.source.resize(size)) if hasattr(p, "source") else p
            for p in user.parts
        )
        return composed.encoder(
            dataclasses.replace(sample, messages=(dataclasses.replace(user, parts=parts), answer))
        )

    def batch(*documents):
        return collate(
            [[d] for d in documents], composed.tokenizer.pad_token_id, composed.model.config.image_token_id
        )

    two = batch(shown(1, (32, 16)), shown(2, (16, 32)))
    one = batch(shown(4, (16, 32)), shown(0, (16, 16)))
    none = batch(shown(3, (16, 16)))
    assert len(two.pixel_values) == 2
    assert isinstance(one.pixel_values, torch.Tensor)
    compare(composed, [[two, one], [one, none]], kind)
    compare(composed, [[none], [two]], kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_features_from_a_cache_run_no_tower_and_give_the_same_gradient(start, kind):
    tower = start.model.model.towers["image"]

    def seen(index):
        document = start.encoder(Talk().sample(index))
        with torch.no_grad():
            media = tuple(
                dataclasses.replace(item, seen=True, tiles=tuple(features(tile) for tile in item.tiles))
                for item in document.media
            )
        return dataclasses.replace(document, media=media)

    def features(tile):
        found = tower(tile[None])
        return found.values.unflatten(1, found.grid)[0]

    def batch(ids):
        return collate(
            [[seen(n)] for n in ids], start.tokenizer.pad_token_id, start.model.config.image_token_id
        )

    assert isinstance(seen(1).media[0], MediaItem)
    dealt = [[batch(WORDS_ONLY), batch(PICTURES)], [batch(WORDS_ONLY), batch(WORDS_ONLY)]]
    for train in ({"connectors": 1e-3}, {"connectors": 1e-3, "language": 1e-3}):
        compare(start, dealt, kind, train=train)


def test_ranks_of_which_one_has_features_and_one_pixels_are_refused(start):
    batch = batch_of(start, PICTURES)
    features = dataclasses.replace(batch, pixel_values=None, image_features=torch.zeros(2, 3, 3, 32))

    def body(world):
        run = Run(start, world)
        try:
            run.step([features if world.rank else batch])
        except DataError as error:
            return str(error)

    for told in together(2, body):
        assert told.startswith("rank 1 has a tower's features in this step and rank 0 pixels")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("losses", [("cells",), ("text", "cells")])
def test_heads_that_only_one_rank_uses_train(start, kind, losses):
    talk = Talk(targets=True)
    dealt = [[batch_of(start, PICTURES, talk)], [batch_of(start, WORDS_ONLY)]]
    train = {"vision": 1e-3, "connectors": 1e-3, "heads": 1e-3}
    compare(start, dealt, kind, train=train, losses=losses, classes=(3, 5))


@pytest.mark.slow
def test_recomputing_activations_works_on_shards(start):
    dealt = [[batch_of(start, PICTURES)] * 2, [batch_of(start, WORDS_ONLY)] * 2]
    compare(start, dealt, "fsdp", recompute=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_added_up_once_a_step_however_many_micro_batches_it_has(start, kind):
    batches = [batch_of(start, PICTURES) for _ in range(3)]

    def body(world):
        calls = []
        for name in ("all_reduce", "reduce_scatter_single", "reduce_scatter_tensor"):
            plain = getattr(dist, name, None)
            # The one exchange of sums at the end of a step is there either way.
            setattr(dist, name, lambda *args, plain=plain, **kw: calls.append(plain) or plain(*args, **kw))
        found = []
        for count in (1, 3):
            run = Run(start, world, kind=kind)
            calls.clear()
            run.step(batches[:count])
            found.append(len(calls))
        return found

    for once, thrice in together(2, body):
        assert once > 1
        assert thrice == once


@pytest.mark.slow
def test_gradients_too_large_to_keep_whole_are_added_up_with_every_micro_batch_and_are_equal(start):
    dealt = [[batch_of(start, PICTURES), batch_of(start, MIXED)], [batch_of(start, WORDS_ONLY)] * 2]
    alone = Run(start)
    alone.step([batch for batches in dealt for batch in batches])

    def body(world):
        run = Run(start, world, kind="fsdp")
        run.forward._reduces_once = False
        run.step(dealt[world.rank])
        return run.gradients()

    for found in together(2, body):
        assert_equal_gradients(found, alone.gradients())


@pytest.mark.parametrize("kind", KINDS)
def test_clipped_steps_move_the_weights_as_in_one_process(start, kind):
    dealt = [[batch_of(start, PICTURES)], [batch_of(start, WORDS_ONLY)]]
    alone = Run(start)
    for _ in range(3):
        report = alone.step([batch for batches in dealt for batch in batches], clip=0.1)
        assert report.grad_norm > 0.2

    def body(world):
        run = Run(start, world, kind=kind)
        for _ in range(3):
            run.step(dealt[world.rank], clip=0.1)
        return run.weights()

    for weights in together(2, body):
        for name, weight in alone.weights().items():
            # Adam divides by a root: a gradient near 0 may turn the last digits of it into a whole step.
            assert (weights[name] - weight).abs().mean() < 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_rank_used_is_left_alone(start, kind):
    """Only connectors train and nobody shows a picture: no gradient, and AdamW does not move them."""
    batch = batch_of(start, WORDS_ONLY)

    def body(world):
        run = Run(start, world, {"connectors": 1e-3}, kind)
        before = run.weights()
        run.step([batch_of(start, PICTURES)])
        moved = run.weights()
        report = run.step([batch])
        return before, moved, run.weights(), report, run.gradients()

    for before, moved, after, report, gradients in together(2, body):
        name = next(name for name in before if ".connectors." in name)
        assert not torch.equal(before[name], moved[name])
        assert all(torch.equal(moved[name], weight) for name, weight in after.items())
        assert all(grad is None for grad in gradients.values())
        assert report.loss > 0
        assert report.grad_norm == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all_and_named(start, kind):
    good, poisoned = batch_of(start, MIXED), batch_of(start, PICTURES)
    poisoned.pixel_values[0, 0, 0, 0] = float("nan")

    def body(world):
        run = Run(start, world, kind=kind)
        run.step([good])
        before, state = run.weights(), full_optimizer_state(run.optimizer, run.objective, world)
        report = run.step([good, poisoned] if world.rank else [good, good])
        after, then = run.weights(), full_optimizer_state(run.optimizer, run.objective, world)
        going_on = run.step([good])
        return before, state, report, after, then, going_on

    for before, state, report, after, then, going_on in together(2, body):
        assert report.skipped
        assert report.why == "the loss is not a finite number"
        assert report.bad_ids == poisoned.sample_ids
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert same(then, state)
        assert not going_on.skipped


@pytest.mark.slow
def test_bfloat16_on_shards_keeps_weights_in_float32_and_comes_close(start):
    dealt = [[batch_of(start, PICTURES)], [batch_of(start, WORDS_ONLY)]]
    exact = Run(start).step([batch for batches in dealt for batch in batches])

    def body(world):
        run = Run(start, world, kind="fsdp", precision="bfloat16")
        report = run.step(dealt[world.rank])
        return report.loss, {p.dtype for p in run.objective.parameters()}

    for loss, dtypes in together(2, body):
        assert loss == pytest.approx(exact.loss, rel=0.01)
        assert dtypes == {torch.float32}


def test_ranks_that_begin_with_other_numbers_get_those_of_rank_0(start):
    def body(world):
        composed = dataclasses.replace(start, model=copy.deepcopy(start.model))
        with torch.no_grad():
            for p in composed.model.parameters():
                p.add_(float(world.rank))
        return Run(composed, world).weights()

    for weights in together(2, body):
        for name, p in Objective(start.model).named_parameters():
            assert torch.equal(weights[name], p)


@pytest.mark.parametrize(
    "kinds",
    [
        ("ddp", "ddp", "ddp"),
        pytest.param(("fsdp", "fsdp", "fsdp"), marks=pytest.mark.slow),
        pytest.param(("fsdp", "ddp", "fsdp"), marks=pytest.mark.slow),
    ],
)
def test_weights_and_optimizer_go_from_two_ranks_to_one_to_two_to_three_without_a_rounding(start, kinds):
    batches = [batch_of(start, ids) for ids in (PICTURES, MIXED, WORDS_ONLY)]

    def go_on(world, kind, weights, state, alone_has_it):
        run = Run(start, ALONE)
        if weights is not None:
            run.objective.model.load_state_dict(weights)
        run = Run(dataclasses.replace(start, model=run.objective.model), world, kind=kind)
        if weights is not None:
            given = state if world.main or not alone_has_it else None
            load_optimizer_state(run.optimizer, run.objective, given, world)
            loaded = full_optimizer_state(run.optimizer, run.objective, world)
            if world.main:
                assert same(loaded, state)
        run.step([batches[world.rank]])
        return full_state(run.objective, world), full_optimizer_state(run.optimizer, run.objective, world)

    def on(size, kind, weights, state, alone_has_it=False):
        return together(size, lambda world: go_on(world, kind, weights, state, alone_has_it))

    (weights, state), nothing = on(2, kinds[0], None, None)
    assert nothing == ({}, {})
    assert all(t.device.type == "cpu" and not isinstance(t, DTensor) for t in weights.values())
    assert {"exp_avg", "exp_avg_sq", "step"} <= next(iter(state["state"].values())).keys()
    weights, state = go_on(ALONE, "ddp", weights, state, False)
    (weights, state), _ = on(2, kinds[1], weights, state, alone_has_it=True)
    (weights, state), *_ = on(3, kinds[2], weights, state)
    assert int(next(iter(state["state"].values()))["step"]) == 4
    fresh = copy.deepcopy(start.model)
    fresh.load_state_dict(weights)


def test_an_optimizer_of_another_stage_is_refused(start):
    run, other = Run(start), Run(start, train={"connectors": 1e-3})
    other.step([batch_of(start, PICTURES)])
    state = full_optimizer_state(other.optimizer, other.objective, ALONE)
    with pytest.raises(CheckpointError, match="parameters differ, first"):
        load_optimizer_state(run.optimizer, run.objective, state, ALONE)


def test_what_trains_can_be_asked_for_alone(start):
    run = Run(start, train={"connectors": 1e-3})
    names = full_state(run.objective, ALONE, trained_only=True)
    parameters = {name for name, _ in run.objective.model.named_parameters()}
    assert {name for name in names if name in parameters} == {
        name for name in parameters if ".connectors." in name
    }


@pytest.mark.slow
def test_a_model_made_whole_is_made_of_ordinary_modules_and_can_be_sharded_again(start):
    dealt = [[batch_of(start, PICTURES)], [batch_of(start, WORDS_ONLY)]]

    def body(world):
        run = Run(start, world, kind="fsdp")
        run.step(dealt[world.rank])
        expected = run.weights()
        make_whole(run.objective, world)
        run.lean.restore()
        model = run.objective.model
        kinds = {type(module).__name__ for module in model.modules()}
        with torch.no_grad():
            loss = Objective(model)(dealt[0][0]).sums["text"] if world.main else None
        again = Run(dataclasses.replace(start, model=model), world, kind="fsdp")
        return expected, dict(model.state_dict()), kinds, loss, again.step(dealt[world.rank]).loss

    for expected, weights, kinds, loss, again in together(2, body):
        assert not any("FSDP" in kind for kind in kinds)
        assert all(torch.equal(weights[n.removeprefix("model.")], w) for n, w in expected.items())
        fresh = copy.deepcopy(start.model)
        fresh.load_state_dict(weights)
        composed = dataclasses.replace(start, model=fresh)
        if loss is not None:
            torch.testing.assert_close(loss, Objective(fresh)(dealt[0][0]).sums["text"].detach())
        assert again == pytest.approx(Run(composed).step([b for bs in dealt for b in bs]).loss, rel=1e-6)


def test_a_wish_to_end_reaches_every_rank_with_the_step(start):
    batch = batch_of(start, WORDS_ONLY)

    def body(world):
        run = Run(start, world)
        return [run.step([batch], asked=asked and world.rank == 1).asked for asked in (False, True)]

    assert together(2, body) == [[False, True], [False, True]]


def test_ranks_add_compare_and_tell(start):
    def body(world):
        assert dist.get_world_size() == world.size == 3
        world.barrier()
        number = 2**50 + world.rank
        return world.sum([number, 1]), world.max([world.rank]), world.gather({"rank": world.rank}), world.main

    for rank, (total, largest, told, main) in enumerate(together(3, body)):
        assert total == [3 * 2**50 + 3, 3]
        assert largest == [2]
        assert told == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert main == (rank == 0)
    assert ALONE.sum([2]) == [2]
    assert ALONE.gather("it") == ["it"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_targets_takes_part(start, kind):
    """What a loader gives when its share of the data is at its end."""
    nothing = collate([], start.tokenizer.pad_token_id, start.model.config.image_token_id)
    assert nothing.num_targets == 0
    compare(start, [[batch_of(start, PICTURES)], [nothing]], kind)
