"""The feed's order, place and endings, with a carrier in place of a GPU's."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.data.loader import Loader
from tinymodal.train.feed import AHEAD, Feed, each_tensor

from .talk import Talk

CPU = torch.device("cpu")


class Numbers:
    """A loader of whole numbers, which end at ``end`` and fail at ``bad``."""

    def __init__(self, end=10**9, bad=None):
        self.at, self.end, self.bad = 0, end, bad
        self.closed = 0
        self.threads = set()

    @property
    def progress(self):
        return self.at / self.end

    def __next__(self):
        self.threads.add(threading.current_thread().name)
        if self.at == self.end:
            raise StopIteration
        if self.at == self.bad:
            raise DataError(f"row {self.at}")
        self.at += 1
        return self.at - 1

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]

    def close(self):
        self.closed += 1


class Carried(Exception):
    pass


class Fake:
    """Carries numbers: what was sent and not yet received is under way."""

    def __init__(self):
        self.sent, self.most = 0, 0
        self.received_in = set()

    def send(self, batches):
        self.sent += 1
        self.most = max(self.most, self.sent)
        return tuple(batches)

    def receive(self, sent):
        self.sent -= 1
        self.received_in.add(threading.current_thread().name)
        return list(sent)


@pytest.fixture(params=["here", "ahead"])
def carrier(request):
    """None computes where it reads; the other reads ahead in a thread."""
    return None if request.param == "here" else Fake()


def feeding():
    return [thread for thread in threading.enumerate() if thread.name == "feed"]


def test_steps_come_in_order_and_the_last_of_a_loader_that_ends_may_be_short(carrier):
    feed = Feed(Numbers(end=8), CPU, 3, carrier=carrier)
    assert list(feed) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert list(feed) == []
    feed.close()
    assert not feeding()


def test_the_place_is_that_of_the_step_taken_and_not_of_what_lies_ready(carrier):
    loader = Numbers()
    feed = Feed(loader, CPU, 2, carrier=carrier)
    assert feed.state_dict() == {"at": 0}
    for step in range(1, 5):
        next(feed)
        deadline = time.monotonic() + 5
        while carrier and loader.at < 2 * (step + AHEAD) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert loader.at == 2 * (step + (AHEAD if carrier else 0))
        assert feed.state_dict() == {"at": 2 * step}
        assert feed.progress == 2 * step / loader.end
    feed.close()


def test_no_more_than_one_step_lies_ready():
    carrier = Fake()
    feed = Feed(Numbers(), CPU, 1, carrier=carrier)
    for _ in range(50):
        next(feed)
        time.sleep(0.001)
    feed.close()
    assert carrier.most <= AHEAD + 1  # beside the one that is being taken
    assert carrier.received_in == {"MainThread"}


def test_the_first_step_is_read_here_so_that_workers_are_started_here():
    loader = Numbers()
    feed = Feed(loader, CPU, 1, carrier=Fake())
    next(feed)
    assert "MainThread" in loader.threads
    next(feed)
    feed.close()
    assert loader.threads == {"MainThread", "feed"}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(["take", "close", "back"]), max_size=12),
    st.integers(1, 3),
    st.booleans(),
)
def test_closing_and_going_back_lose_and_repeat_nothing(does, micro_batches, ahead):
    feed = Feed(Numbers(), CPU, micro_batches, carrier=Fake() if ahead else None)
    expected, places = 0, [feed.state_dict()]
    for what in does:
        if what == "take":
            assert next(feed) == list(range(expected, expected + micro_batches))
            expected += micro_batches
            places.append(feed.state_dict())
        elif what == "close":
            feed.close()
            assert not feeding()
        else:
            feed.load_state_dict(places[len(places) // 2])
            expected = feed.state_dict()["at"]
    feed.close()


def test_an_error_comes_in_its_turn_and_again_when_asked_again(carrier):
    loader = Numbers(bad=5)
    feed = Feed(loader, CPU, 2, carrier=carrier)
    assert [next(feed), next(feed)] == [[0, 1], [2, 3]]
    for _ in range(2):
        with pytest.raises(DataError, match="row 5"):
            next(feed)
        assert feed.state_dict() == {"at": 4}
    loader.bad = None
    assert next(feed) == [4, 5]  # what was read before the error is not lost
    feed.close()
    assert not feeding()


def test_a_carrier_that_fails_is_told_in_the_callers_thread():
    class Full(Fake):
        def send(self, batches):
            if batches[0] == 1:
                raise Carried("out of memory")
            return super().send(batches)

    feed = Feed(Numbers(), CPU, 1, carrier=Full())
    assert next(feed) == [0]
    with pytest.raises(Carried, match="out of memory"):
        next(feed)
    feed.close()


def test_nothing_is_read_behind_the_last_step_that_is_wanted(carrier):
    loader = Numbers(bad=4)
    feed = Feed(loader, CPU, 2, steps=2, carrier=carrier)
    assert list(feed) == [[0, 1], [2, 3]]
    assert loader.at == 4
    feed.close()


def test_closing_closes_the_loader_too(carrier):
    loader = Numbers()
    feed = Feed(loader, CPU, carrier=carrier)
    next(feed)
    feed.close()
    assert loader.closed == 1


def test_waiting_is_measured(carrier):
    class Slow(Numbers):
        def __next__(self):
            time.sleep(0.02)
            return super().__next__()

    feed = Feed(Slow(), CPU, carrier=carrier)
    next(feed)
    assert feed.wait_s >= 0.02
    if carrier:
        time.sleep(0.2)  # a step that computes: the next one lies ready
        next(feed)
        assert feed.wait_s < 0.02
    feed.close()


def real(tiny, **options):
    return Loader(
        [Talk()],
        tiny.encoder,
        seq_len=64,
        batch_tokens=128,
        pad_id=tiny.tokenizer.pad_token_id,
        image_token_id=tiny.model.config.image_token_id,
        **options,
    )


def same(one, other):
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            return False
    return True


def test_a_real_loader_read_ahead_gives_the_batches_that_it_gives_alone(tiny):
    plain = real(tiny)
    expected = [next(plain) for _ in range(12)]

    class Copies(Fake):
        def send(self, batches):
            return super().send([each_tensor(batch, torch.Tensor.clone) for batch in batches])

    feed = Feed(real(tiny), CPU, 2, carrier=Copies())
    got = [batch for _ in range(3) for batch in next(feed)]
    state = feed.state_dict()
    next(feed)
    feed.close()
    again = Feed(real(tiny), CPU, 2, carrier=Copies())
    again.load_state_dict(state)
    got += [batch for _ in range(3) for batch in next(again)]
    again.close()
    assert all(map(same, got, expected))
    assert not same(expected[0], expected[1])


def test_every_tensor_of_a_batch_is_reached(tiny):
    batch = next(real(tiny))
    assert isinstance(batch.pixel_values, torch.Tensor)
    batch = dataclasses.replace(batch, pixel_values=(batch.pixel_values, batch.pixel_values))
    moved = each_tensor(batch, lambda tensor: tensor.to("meta"))
    for field in dataclasses.fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        several = isinstance(before, tuple) and before and isinstance(before[0], torch.Tensor)
        for a, b in zip(before, after, strict=True) if several else [(before, after)]:
            assert b.is_meta if isinstance(a, torch.Tensor) else a == b


@pytest.mark.gpu
def test_on_a_gpu_batches_arrive_whole_while_the_step_computes(tiny):
    device = torch.device("cuda", torch.cuda.current_device())
    plain = real(tiny)
    feed = Feed(real(tiny), device, 2)
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        got = next(feed)
        for batch in got:
            assert batch.input_ids.device == device
        sums = [batch.input_ids.double().sum() for batch in got]  # queued behind the copies
        for _ in range(5):
            busy = busy @ busy / 64
        expected = [next(plain) for _ in got]
        assert [int(s) for s in sums] == [int(b.input_ids.sum()) for b in expected]
        assert all(same(each_tensor(a, torch.Tensor.cpu), b) for a, b in zip(got, expected, strict=True))
    feed.close()
