from itertools import islice

import pytest
import torch

from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import DataError
from tinymodal.data.collate import collate
from tinymodal.data.loader import LISTED, Loader
from tinymodal.data.synthetic import MADE
from tinymodal.train.objective import Objective
from tinymodal.train.step import step

from .test_deal import Numbered, Training, names, usable
from .test_loader import make, write_rows

BATCHINGS = pytest.mark.parametrize("batching", ["pack", "grouped"])


@BATCHINGS
def test_data_that_end_are_given_out_to_the_last_sample(batching):
    loader = make([Numbered(0, 60)], ends="drop", epochs=[2], bad_rows="skip", batching=batching)
    assert loader.total_draws == 120
    seen, shares = [], []
    assert not loader.ended
    for batch in loader:
        seen.append(batch)
        shares.append(sum(b.num_draws for b in seen) / loader.total_draws)
        assert shares[-1] == loader.progress
    assert names(seen) == usable([(0, row) for row in range(60)] * 2, seq_len=64)
    assert (shares[-1], loader.ended, loader.done) == (1.0, True, 120)
    assert shares == sorted(shares)
    assert shares[0] < 0.7
    with pytest.raises(StopIteration):
        next(loader)
    if batching == "pack":
        assert {len(batch.input_ids) for batch in seen[:-1]} == {2}
        assert len(seen[-1].input_ids) <= 2

    again = make([Numbered(0, 60)], ends="drop", epochs=[2], bad_rows="skip", batching=batching)
    again.load_state_dict(loader.state_dict())
    assert again.ended
    assert list(again) == []


@BATCHINGS
def test_a_rank_that_has_run_out_gives_batches_without_targets_until_all_have(batching):
    """So all make as many steps: those in which any of them has targets."""
    options = {"ends": "drop", "batching": batching, "seq_len": 24, "batch_tokens": 24}
    run = Training([Numbered(0, 50)], world=4, **options)
    steps = [run.step() for _ in range(60)]
    busy = [sum(batch.num_targets for batch in batches) > 0 for batches in steps]
    last = busy.index(False)
    assert not any(busy[last:])
    assert names(batch for batches in steps for batch in batches) == usable((0, row) for row in range(50))
    alone = [sum(batch.num_targets > 0 for batch in batches) for batches in zip(*steps, strict=True)]
    assert len(set(alone)) > 1  # or there was nothing to wait for
    assert max(alone) == last
    for batches in steps[last:]:
        assert all(batch.lengths == (1,) and not batch.sample_ids for batch in batches)
    assert run.sum("done") == 50
    assert run.sum("progress") == pytest.approx(1.0)


def test_a_rank_for_which_there_is_no_draw_has_nothing_from_the_start():
    run = Training([Numbered(0, 2)], world=4, ends="drop")
    assert [loader.ended for loader in run.ranks] == [False, False, True, True]
    assert names(run.step()) == {"0 0": 1, "0 1": 1}
    assert all(loader.ended for loader in run.ranks)


def test_data_that_repeat_have_no_end():
    loader = make([Numbered(0, 2)])
    assert len(list(islice(loader, 50))) == 50
    assert (loader.total_draws, loader.progress, loader.ended) == (None, None, False)


def test_data_that_end_with_nothing_used_are_an_error(tmp_path):
    loader = make([write_rows(tmp_path, ["bad", "x" * 99])], bad_rows="skip", ends="drop")
    with pytest.raises(DataError, match=r"jsonl:1: one of 2 samples, of which none can be used \(1 bad, 1 "):
        next(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_end_with_the_data(workers):
    loader = make([Numbered(0, 90)], ends="drop", bad_rows="skip", workers=workers)
    assert names(loader) == usable([(0, row) for row in range(90)], seq_len=64)


def test_so_many_bad_rows_may_be_skipped_and_no_more(tmp_path):
    words = [f"bad {n}" if n in (3, 8, 21) else f"fine {n}" for n in range(30)]
    rows = write_rows(tmp_path, words)
    size = {"seq_len": 20, "batch_tokens": 20, "open_rows": 1}
    enough = make([rows], bad_rows=3, **size)
    list(islice(enough, 60))
    assert len(enough.skipped) == 3  # each once, however often it was drawn
    assert enough.num_skipped > 6

    loader, states = make([rows], bad_rows=2, ends="drop", **size), []
    told = r"rows.jsonl:\d+: bad \d+; expected better - this is bad row 3, and bad_rows lets 2 be skipped; "

    def read(one):
        for _ in one:
            states.append(one.state_dict())

    with pytest.raises(DataError, match=told) as error:
        read(loader)
    for row in loader.skipped:
        assert row.sample_id in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=told):  # and again: it is not passed over
        next(loader)
    assert len(states) > 3
    for state in [states[0], states[-1], loader.state_dict()]:
        resumed = make([rows], bad_rows=2, ends="drop", **size)
        resumed.load_state_dict(state)
        with pytest.raises(DataError, match="this is bad row 3"):
            read(resumed)
    with pytest.raises(DataError, match=r"bad \d+; expected better$"):
        list(make([rows], bad_rows=0, ends="drop"))


def test_names_of_what_is_left_out_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("tinymodal.data.loader.LISTED", 5)
    assert LISTED == 10_000
    loader = make([Numbered(0, 200)], bad_rows="skip", ends="drop", seq_len=24, batch_tokens=24)
    list(loader)
    assert len(loader.skipped) == len(loader.dropped) == 5
    assert loader.num_skipped == len([n for n in range(200) if n % 11 == 3])
    assert loader.num_dropped > 10
    allowed = make([Numbered(0, 200)], bad_rows=20, ends="drop", seq_len=24, batch_tokens=24)
    list(allowed)
    assert len(allowed.skipped) == allowed.num_skipped == loader.num_skipped


@pytest.fixture(scope="module")
def taught():
    """A tiny model and two batches of made pictures with targets for the cells loss."""
    composed = tiny_model()
    loader = Loader(
        [MADE["scenes"]()],
        composed.encoder,
        seq_len=128,
        batch_tokens=256,
        pad_id=composed.tokenizer.pad_token_id,
        image_token_id=composed.model.config.image_token_id,
    )
    return composed.model, [next(loader), next(loader)]


def test_a_batch_of_nothing_adds_nothing_to_a_step(taught):
    model, batches = taught
    empty = collate([], 0, model.config.image_token_id)
    objective = Objective(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    assert objective.counts([empty]) == {"text": 0}
    assert objective(empty).sums["text"].item() == 0.0
    first = step(objective, optimizer, batches)
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    second = step(objective, optimizer, [*batches, empty])
    assert second.losses == first.losses
    assert second.num_targets == first.num_targets
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        if gradient is not None:
            # Adding zeros does not round.
            assert torch.equal(parameter.grad, gradient)

    alone = step(objective, optimizer, [empty])
    assert (alone.loss, alone.num_targets, alone.sample_ids) == (0.0, 0, ())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
