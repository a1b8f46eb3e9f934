"""The benchmark of serving finds out what it looks for."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from benchmarks import serving
from benchmarks.serving import Told, report, streamed, whole

FLAT = [(second / 4, 500.0) for second in range(80)]


def told(**more) -> Told:
    good = Told(seconds=[0.1, 0.2], first_s=[0.05, 0.06])
    good.right["words"] = 2
    for name, value in more.items():
        setattr(good, name, value)
    return good


def code(tmp_path, found: Told, memory=FLAT, left=None, ended: int = 0) -> tuple[int, dict]:
    given = Namespace(json=tmp_path / "serving.json", quick=True, clients=2)
    exit_code = report(given, found, memory, left or {}, ended, 20.0, 10.0)
    return exit_code, json.loads(given.json.read_text())


def test_a_run_without_a_fault_is_good(tmp_path):
    exit_code, record = code(tmp_path, told(busy=3, hung_up=4))
    assert (exit_code, record["good"], record["right"]) == (0, True, {"words": 2})


@pytest.mark.parametrize(
    "fault",
    [
        {"found": told(wrong=[("words", "red", "blue")])},
        {"found": told(failed={"500": 1})},
        {"found": told(), "left": {"rows": 1.0}},
        {"found": told(), "memory": [(second / 4, 500.0 + second) for second in range(80)]},
        {"found": told(), "ended": -15},
    ],
    ids=["a wrong answer", "a failure", "a place still taken", "memory that grows", "a bad end"],
)
def test_every_kind_of_fault_is_told(tmp_path, fault):
    exit_code, record = code(tmp_path, **fault)
    assert (exit_code, record["good"]) == (1, False)
    assert any(record["faults"].values())


def test_memory_may_grow_before_it_has_settled(tmp_path):
    rises = [(second / 4, min(500.0, 100.0 + 20 * second)) for second in range(80)]
    assert code(tmp_path, told(), memory=rises)[0] == 0


def test_answers_are_read_whole_and_in_pieces():
    assert whole(b'{"choices": [{"message": {"content": "a ring"}}]}') == "a ring"
    events = [
        b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n',
        b'data: {"choices": [{"delta": {"content": "a r"}}]}\n\n'
        b'data: {"choices": [{"delta": {"content": "ing"}}]}\n\n',
        b"data: [DONE]\n\n",
    ]
    chunks = [b"%x\r\n%s\r\n" % (len(event), event) for event in events]
    assert streamed(b"".join([*chunks, b"0\r\n\r\n"])) == "a ring"
    assert streamed(b"".join([*chunks[:-1], b"0\r\n\r\n"])).startswith("cut off")


@pytest.mark.slow
def test_a_few_clients_are_all_answered_rightly(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("sklearn")
    record = tmp_path / "serving.json"
    serving.main(["--quick", "--clients", "8", "--seconds", "8", "--json", str(record)])
    found = json.loads(record.read_text())
    # Memory has not settled in so short a time.
    assert {**found["faults"], "growth": 0} == {"wrong": [], "failed": {}, "left": {}, "growth": 0, "exit": 0}
    assert sum(found["right"].values()) > 0
