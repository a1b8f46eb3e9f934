"""The harness counts what it says."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import count, figure, finish, interleave, less, more, table

ROWS, WIDTH = 64, 32
SIZE = 4 * ROWS * WIDTH


def test_works_take_turns_and_every_other_round_goes_backwards():
    seen = []
    found = interleave({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=3, warmup=1)
    assert "".join(seen) == "ba" + "ab" + "ba" + "ab"
    assert found["a"].rounds == 3


def test_seconds_are_those_of_the_processor_and_of_the_wall():
    import time

    def busy():
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass

    found = interleave({"busy": busy, "asleep": lambda: time.sleep(0.05)}, rounds=1, warmup=0)
    assert found["busy"].cpu > 0.04
    assert found["asleep"].cpu < 0.03 < 0.04 < found["asleep"].wall


def test_products_are_counted_forward_and_backward():
    layer, x = nn.Linear(WIDTH, WIDTH), torch.randn(ROWS, WIDTH, requires_grad=True)
    found = count(lambda: layer(x).sum().backward(), layer.parameters())
    assert found.gflop * 1e9 == 3 * 2 * ROWS * WIDTH**2


def test_products_in_place_are_counted_which_torch_leaves_out():
    total, x = torch.zeros(WIDTH, WIDTH), torch.randn(ROWS, WIDTH)
    assert count(lambda: total.addmm_(x.T, x)).gflop * 1e9 == 2 * ROWS * WIDTH**2


def test_attention_on_a_processor_is_counted_which_torch_takes_for_nothing():
    q = torch.randn(2, 4, ROWS, 8, requires_grad=True)
    forward = 4 * 2 * 4 * ROWS**2 * 8
    attend = F.scaled_dot_product_attention
    assert count(lambda: attend(q, q, q, is_causal=True)).gflop * 1e9 == forward
    # The kernel computes the scores again, as flash attention does everywhere.
    found = count(lambda: attend(q, q, q, is_causal=True).sum().backward())
    assert found.gflop * 1e9 == 3.5 * forward


def test_what_a_function_of_our_own_does_inside_is_counted():
    from tinymodal.train.loss import linear_cross_entropy

    states = torch.randn(ROWS, WIDTH, requires_grad=True)
    weight = torch.randn(100, WIDTH, requires_grad=True)
    targets = torch.zeros(ROWS, dtype=torch.int64)
    found = count(lambda: linear_cross_entropy(states, weight, targets, block=16).backward())
    assert found.gflop * 1e9 == 3 * 2 * ROWS * WIDTH * 100


def test_bytes_alive_are_those_that_the_work_made_and_still_holds():
    x = torch.randn(ROWS, WIDTH)

    def work():
        y = x + 1  # 1
        z = y * 2  # 2
        del y  # 1
        return z + z.exp()  # 3: z, its exponential and their sum

    assert count(work).activations_mb * 1e6 == 3 * SIZE


def test_a_tensor_that_only_the_graph_holds_is_alive():
    x = torch.randn(ROWS, WIDTH, requires_grad=True)

    def work():
        y = x
        for _ in range(5):
            y = y.exp()  # kept for the backward pass
        return y

    assert count(work).activations_mb * 1e6 == 5 * SIZE


def test_gradients_of_parameters_are_told_apart():
    layer = nn.Linear(512, 512, bias=False)
    x = torch.randn(1, 512)
    found = count(lambda: layer(x).sum().backward(), layer.parameters())
    assert found.live_mb > 1
    # It is an activation until it is the gradient.
    assert found.activations_mb <= found.live_mb


def test_views_touch_nothing_and_a_table_only_the_rows_that_are_looked_up():
    weight, ids = torch.randn(1000, WIDTH), torch.arange(4)
    assert count(lambda: weight.view(-1).view(1000, WIDTH).t()).calls == 0
    assert count(lambda: F.embedding(ids, weight)).touched_gb * 1e9 == 2 * 4 * 4 * WIDTH
    found = count(lambda: weight + weight)
    assert (found.calls, found.touched_gb * 1e9) == (1, 2 * 4 * 1000 * WIDTH)


def test_ratios_above_one_are_in_our_favour():
    assert more("speed", 6, 2, "samples/s").ratio == 3
    assert less("memory", 2, 6, "MB").ratio == 3
    assert less("alone", 2, None, "MB").ratio is None


def test_a_record_holds_rows_machine_versions_and_commit(tmp_path, capsys):
    finish([more("speed", 6, 2, "samples/s")], tmp_path / "new" / "record.json", quick=True, card="a card")
    record = json.loads((tmp_path / "new" / "record.json").read_text())
    speed = {"name": "speed", "ratio": 3, "ours": 6, "plain": 2, "unit": "samples/s"}
    assert record["rows"] == [speed]
    assert {"machine", "versions", "commit", "time"} <= set(record)
    assert record["quick"] is True
    assert record["card"] == "a card"
    assert "3.00x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "told"), [(12345.6, "12,346"), (1.23456, "1.235"), (0.0, "0"), (999.9, "999.9")]
)
def test_four_digits_are_shown(value, told):
    assert figure(value) == told


def test_columns_are_aligned():
    lines = table([more("a", 6, 2, "s"), less("longer", 1234567, None, "MB")]).splitlines()
    assert len({len(line) for line in lines}) == 1
