from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.train import meter as measuring
from tinymodal.train.meter import MODALITIES, TIMED, Meter, by_group, peak_memory_bytes, source_names
from tinymodal.train.step import StepReport

CPU = torch.device("cpu")


REPORT = StepReport(
    loss=2.0,
    losses={"text": 2.0},
    grad_norm=0.5,
    num_tokens=90,
    num_targets=40,
    sample_ids=("a", "b"),
    num_positions=120,
    num_samples=3,
    groups={(0, False): (30.0, 10), (0, True): (20.0, 20), (1, True): (30.0, 10)},
)
RATES = [
    {"lr": 1e-3, "group": "connectors"},
    {"lr": 2e-5, "group": "language"},
    {"lr": 2e-5, "group": "language"},
]


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when told."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_a_row_tells_all_of_a_step(clock):
    meter = Meter(
        "align",
        ("captions", "chat"),
        CPU,
        seconds=10.0,
        tokens=1000,
        flops=lambda b: 3e6 * len(b),
        peak_flops=1e7,
    )
    meter.begin()
    clock.now += 2.0
    row = meter.end(7, REPORT, RATES, wait_s=0.5, batches=[None, None])
    assert row.pop("peak_memory_bytes") > 10**7
    assert row == {
        "stage": "align",
        "step": 7,
        "loss": 2.0,
        "loss/captions": 50 / 30,
        "loss/chat": 3.0,
        "loss/text": 3.0,
        "loss/image": 50 / 30,
        "lr": 1e-3,
        "lr/connectors": 1e-3,
        "lr/language": 2e-5,
        "grad_norm": 0.5,
        "tokens": 90,
        "targets": 40,
        "samples": 3,
        "padding": 0.25,
        "tokens_per_s": 45.0,
        "samples_per_s": 1.5,
        "wait_share": 0.25,
        "mfu": 0.3,
        "step_s": 2.0,
        "seconds": 12.0,
    }
    assert (meter.seconds, meter.tokens) == (12.0, 1090)


def test_what_depends_on_the_machine_is_in_one_list_and_the_rest_does_not(clock):
    rows = []
    for spent in (1.0, 3.0):
        meter = Meter("a", ("x", "y"), CPU, flops=lambda b: 1e6, peak_flops=1e7)
        meter.begin()
        clock.now += spent
        rows.append(meter.end(1, REPORT, RATES, wait_s=spent / 7 + spent**2 / 50))
    different = {key for key in rows[0] if rows[0][key] != rows[1][key]}
    assert different <= TIMED
    assert different | {"peak_memory_bytes"} == TIMED


def test_several_losses_are_told_one_by_one_and_one_alone_is_not_repeated():
    both = Meter("a", ("x",), CPU).end(
        1, REPORT._replace(losses={"text": 1.5, "cells": 0.5}, groups={}), RATES, 0.0
    )
    assert (both["loss_text"], both["loss_cells"]) == (1.5, 0.5)
    assert not any(key.startswith("loss/") for key in both)
    assert "loss_text" not in Meter("a", ("x",), CPU).end(1, REPORT._replace(groups={}), RATES, 0.0)


def test_a_skipped_step_says_why(clock):
    row = Meter("a", ("x", "y"), CPU).end(
        1, REPORT._replace(loss=math.nan, skipped=True, why="no loss"), RATES, 0.0
    )
    assert row["skipped"] == "no loss"
    assert "skipped" not in Meter("a", ("x", "y"), CPU).end(1, REPORT, RATES, 0.0)


def test_without_a_known_card_there_is_no_share_of_it():
    meter = Meter("a", ("x", "y"), CPU, flops=lambda b: 1e6, peak_flops=None)
    assert "mfu" not in meter.end(1, REPORT, RATES, 0.0)


def test_one_rate_for_all_is_told_once():
    row = Meter("a", ("x", "y"), CPU).end(1, REPORT, [{"lr": 1e-3, "group": "language"}] * 2, 0.0)
    assert [key for key in row if key.startswith("lr")] == ["lr"]


def test_sources_and_modalities_without_targets_are_left_out():
    assert by_group("loss", {(0, True): (0.0, 0), (1, False): (6.0, 3)}, ("a", "b")) == {
        "loss/b": 2.0,
        "loss/text": 2.0,
    }


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("a", "b"), ("a", "b")),
        (("chat", "chat", "chat"), ("chat", "chat-2", "chat-3")),
        (("text", "image"), ("text-source", "image-source")),
        (("chat", "chat", "chat-2"), ("chat", "chat-3", "chat-2")),
    ],
)
def test_no_two_sources_share_a_name_nor_one_with_a_modality(labels, names):
    assert source_names(labels) == names


@given(st.lists(st.sampled_from(["a", "a-2", "a-2-2", "text", "text-source", "image"]), max_size=7))
def test_names_are_always_different(labels):
    names = source_names(labels)
    assert len(set(names)) == len(labels)
    assert not set(names) & set(MODALITIES)
    unique = [label for label in labels if labels.count(label) == 1 and label not in MODALITIES]
    assert set(unique) <= set(names)


def test_peak_memory_of_a_process_only_grows():
    before = peak_memory_bytes(CPU)
    block = torch.ones(before // 4 + 2**24)  # four bytes each: more than all there was
    assert peak_memory_bytes(CPU) >= before + 2**25
    del block
