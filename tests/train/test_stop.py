from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from tinymodal.core.config import dump
from tinymodal.train import checkpoint, loop
from tinymodal.train import stage as one_stage
from tinymodal.train.stop import Stopped, on_signals

BOTH = pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)


@BOTH
def test_a_signal_asks_and_the_run_leaves_when_it_is_ready(signum, code, capfd):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with on_signals() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signum)
        assert stop.asked
        assert stop.signum == signum
        with pytest.raises(Stopped) as left:
            stop.leave("step 4 of 9 is saved")
    assert left.value.code == code
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    told = capfd.readouterr().err
    name = signal.Signals(signum).name
    assert f"{name}: this step is finished and saved, then the run ends" in told
    assert f"stopped by {name}: step 4 of 9 is saved" in told


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), on_signals():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_changes_nothing():
    seen = []

    def inside():
        before = signal.getsignal(signal.SIGTERM)
        with on_signals() as stop:
            seen.append(signal.getsignal(signal.SIGTERM) is before and not stop.asked)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [True]


def test_a_forked_worker_does_not_take_the_signal_for_its_own(capfd):
    with on_signals() as stop:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7 if stop.asked else 0)
        assert os.waitpid(child, 0)[1] == 0
    assert "SIGINT" not in capfd.readouterr().err


CODE = """
import os, signal, sys, time
from tinymodal.train.stop import on_signals
with on_signals() as stop:
    os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    if sys.argv[2] == "again":
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])
        time.sleep(30)
    stop.leave("step 1 of 2 is saved")
"""


@BOTH
@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_the_exit_code_says_how_it_ended(signum, code, again):
    name = signal.Signals(signum).name
    done = subprocess.run(
        [sys.executable, "-c", CODE, name, "again" if again else "once"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == (128 + signum if again else code)
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    last = "leaving at once; the newest checkpoint stands" if again else "step 1 of 2 is saved"
    assert lines[1].endswith(last)
    assert "Traceback" not in done.stderr


GROUP = """
import os, signal, sys
from pathlib import Path
os.setsid()
from tinymodal.core.config import load
from tinymodal.train import loop
from tinymodal.train import stage as one_stage
from tinymodal.train.recipe import Recipe

real, taken = one_stage.step, []

def step(*args, **options):
    taken.append(1)
    if len(taken) == 2:
        os.killpg(0, signal.SIGTERM)
    return real(*args, **options)

one_stage.step = step
loop.run(load(sys.argv[1], Recipe), Path(sys.argv[2]), progress=False)
"""


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_run_does_not_take_its_workers_away(recipe, tmp_path):
    """As a scheduler ends a job: the step in hand still needs what they read."""
    (tmp_path / "plan.toml").write_text(dump(recipe(workers=2, steps=40)))
    words = [sys.executable, "-c", GROUP, str(tmp_path / "plan.toml"), str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint.latest(tmp_path / "run").progress.step == 2


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["stage"], row["step"], row["loss"], row["grad_norm"]) for row in rows]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("signum", "code", "stops"),
    [
        # Within a stage, at the last step of one, within the other: of the run so far, stage and its step.
        (signal.SIGTERM, 0, {2: (0, 2), 4: (0, 4), 7: (1, 3)}),
        (signal.SIGINT, 130, {5: (1, 1)}),
    ],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_run_that_is_asked_saves_its_step_and_goes_on_as_if_never_stopped(
    recipe, tmp_path, monkeypatch, capfd, signum, code, stops
):
    plan = recipe({"name": "a"}, {"name": "b"}, save_every=3)
    loop.run(plan, tmp_path / "whole", progress=False)
    real, taken = one_stage.step, []

    def step(*args, **options):
        taken.append(1)
        if len(taken) in stops:
            os.kill(os.getpid(), signum)
        return real(*args, **options)

    monkeypatch.setattr(one_stage, "step", step)
    folder, before = tmp_path / "run", signal.getsignal(signum)
    for stage, done in stops.values():
        with pytest.raises(Stopped) as left:
            loop.run(plan, folder, progress=False)
        assert left.value.code == code
        assert signal.getsignal(signum) is before
        at = checkpoint.latest(folder).progress
        assert (at.stage, at.step) == (stage, done)
        told = " ".join(capfd.readouterr().err.split())
        assert f"holds stage {'ab'[stage]} up to step {done} of 4; the same command goes on" in told
    loop.run(plan, folder, progress=False)
    assert len(taken) == 8
    assert metrics(folder) == metrics(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder).items())
