"""Kill a training run at random moments, go on each time, and compare with the run nobody touched.

    python -m benchmarks.kills --kills 50 --json benchmarks/records/kills.json

A tiny model with dropout is trained in two stages, the second with LoRA, with a data worker and saves in the
background. The same recipe then runs again and is ended with SIGKILL: at random moments of its life, from its
first breath to its last copy, and as often within the milliseconds in which a checkpoint is being written or
an old one deleted. Each time it is started again, until it is done; then it begins anew, until there were as
many kills as asked. Every run that was finished so must have, bit for bit, the weights, the optimizer's
state, the random state, the place in the data and the metrics of the one that was never killed, and every
step that any of its processes took must have seen the same samples.

Processes are forked from one that has imported everything and computed nothing, so that a start costs a part
of a second. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
"""Set before the libraries are imported: a process with threads cannot be forked and go on."""
WORDS = ("red", "green", "blue", "circle", "square", "star", "what", "colour", "is", "it", "one", "two")
SAVE_EVERY = 5
STEPS = 40
"""Of each stage."""
PATIENCE_S = 600.0
"""No process of this size lives so long; one that does hangs."""


class Talk:
    """Endless small conversations; every third is without a picture, every eleventh row is bad."""

    def sample(self, index: int) -> Any:
        from PIL import Image as Pictures

        from tinymodal.core.errors import DataError
        from tinymodal.core.types import Image, Message, Sample, Text

        rng = random.Random(f"talk/{index}")
        if index % 11 == 10:
            raise DataError(f"talk/{index}: made to be bad")
        words = [Text(" ".join(rng.choices(WORDS, k=rng.randint(1, 6)))) for _ in range(2)]
        seen: tuple[Image, ...] = ()
        if index % 3:
            seen = (Image(Pictures.new("RGB", (24, 24), tuple(rng.choices(range(256), k=3)))),)
        turns = (Message("user", (*seen, words[0])), Message("assistant", (words[1],)))
        return Sample(turns, f"talk/{index}")


class Kill(NamedTuple):
    """One end of a process that was not its own."""

    aimed: bool
    """At a save, rather than at any moment."""
    in_save: bool
    """A folder of a checkpoint was half-written, or half-deleted, when it came."""
    stage: str
    step: int
    """The last step that the run had taken by then."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, metavar="N", help="how many (50; with --quick 5)")
    parser.add_argument("--quick", action="store_true", help="5 kills: a minute on one core")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, as far as a clock lets it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.add_argument("--folder", type=Path, help="keep the runs there; else they are deleted")
    given = parser.parse_args(argv)
    wanted = given.kills or (5 if given.quick else 50)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        found = kills(wanted, folder, given.seed, print)
    finally:
        if given.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    brief = ("kills", "resumed", "identical", "in_saves", "runs", "steps_taken", "seconds")
    print(json.dumps({key: found[key] for key in brief}))
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["identical"] else 1


def kills(wanted: int, folder: Path, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Kill and compare; the record."""
    _warm()
    from tinymodal.train import machine
    from tinymodal.train.meter import TIMED

    began = time.perf_counter()
    _must_end_well(_fork(partial(_make, folder / "start"), folder / "start.log"))
    whole = folder / "whole"
    at = time.perf_counter()
    _must_end_well(_fork(partial(_run, folder / "start", whole), folder / "whole.log"))
    life_s = time.perf_counter() - at
    expected = _outcome(whole)
    say(f"never killed: {len(expected['metrics'])} steps in {life_s:.1f} s")

    rng = random.Random(seed)
    done: list[Kill] = []
    resumed = runs = taken = 0
    differ: list[str] = []
    while len(done) < wanted:
        run = folder / f"run-{runs:02}"
        before = len(done)
        while True:
            going_on = len(done) > before
            killed = None
            process = _fork(partial(_run, folder / "start", run), folder / f"{run.name}.log")
            if len(done) < wanted:
                killed = _kill(process, run, rng, life_s)
            else:
                _must_end_well(process)
            resumed += going_on
            if killed is None:
                break
            done.append(killed)
        runs += 1
        taken += len(list(_samples(run)))
        odd = _compare(expected, _outcome(run))
        differ += [f"{run.name}: {what}" for what in odd]
        say(f"{run.name}: {len(done) - before} kills, {'DIFFERS: ' + '; '.join(odd) if odd else 'identical'}")
        if not odd:
            shutil.rmtree(run)
    return {
        "kills": len(done),
        "resumed": resumed,
        "identical": not differ,
        "in_saves": sum(kill.in_save for kill in done),
        "runs": runs,
        "steps_of_a_run": len(expected["metrics"]),
        "steps_taken": taken,
        "compared": sorted(expected),
        "left_out": sorted(TIMED),
        "differences": differ,
        "moments": [kill._asdict() for kill in done],
        "seconds": round(time.perf_counter() - began, 1),
        **machine.record(),
    }


# Processes


def _warm() -> None:
    """Import what a run needs, without starting a thread."""
    for name in ONE_THREAD:
        os.environ[name] = "1"
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    import torch

    torch.set_num_threads(1)
    for name in ("peft", "tinymodal.compose.tiny", "tinymodal.train.loop"):
        import_module(name)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise SystemExit(
            f"this process has {threads} threads after importing, and could not be forked; start it alone, "
            f"not inside another program"
        )


def _fork(work: Callable[[], None], log: Path) -> int:
    """Let a process do ``work``; its id. What it says goes to the end of ``log``."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()  # its data workers belong to it, and end with it
        log.parent.mkdir(parents=True, exist_ok=True)
        to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(to, 1)
        os.dup2(to, 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _must_end_well(process: int) -> None:
    ended = _wait(process, time.monotonic() + PATIENCE_S)
    if ended != 0:
        raise SystemExit(f"a run ended by itself with {ended}; its log lies in the folder, see --folder")


def _wait(process: int, until: float, seen: Callable[[], bool] = lambda: False) -> int | None:
    """Wait for the end of a process: its exit code; None when it is time or ``seen`` says so."""
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until or seen():
            return None
        time.sleep(0.0005)


def _kill(process: int, run: Path, rng: random.Random, life_s: float) -> Kill | None:
    """End a process at a moment of chance; None where it was done before."""
    aimed = rng.random() < 0.5
    if aimed:
        # At the n-th save from now, anywhere within it: writing takes some 60 ms, deleting a few.
        saves = rng.randint(1, 4)
        were = False

        def writing() -> bool:
            nonlocal saves, were
            now = _half_written(run)
            saves -= now and not were
            were = now
            return saves == 0

        ended = _wait(process, time.monotonic() + PATIENCE_S, writing)
        if ended is None:
            ended = _wait(process, time.monotonic() + rng.uniform(0, 0.08))
    else:
        ended = _wait(process, time.monotonic() + rng.uniform(0, 0.7 * life_s))
    if ended is not None:
        if ended != 0:
            raise SystemExit(
                f"{run}: a run ended by itself with {ended}; its log lies beside it, see --folder"
            )
        return None
    os.kill(process, signal.SIGKILL)
    with suppress(ProcessLookupError):  # it had not come as far as to have a group
        os.killpg(process, signal.SIGKILL)  # its workers, while its own number is still taken
    os.waitpid(process, 0)
    last: dict[str, Any] = max(_samples(run), key=lambda row: (row["stage"], row["step"]), default={})
    return Kill(aimed, _half_written(run), last.get("stage", ""), last.get("step", 0))


def _half_written(run: Path) -> bool:
    try:
        return any(name.startswith(".unfinished-") for name in os.listdir(run / "checkpoints"))
    except OSError:
        return False


# What is run


def _make(start: Path) -> None:
    """A model to begin with; dropout makes every step draw random numbers."""
    from tinymodal.compose import build
    from tinymodal.compose.tiny import tiny_model

    build.save(tiny_model(words=WORDS, attention_dropout=0.1), start)


def _run(start: Path, folder: Path) -> None:
    """Train, or go on; and write down what every step saw."""
    from tinymodal.train import loop
    from tinymodal.train import stage as one_stage
    from tinymodal.train.recipe import Recipe

    stage = {
        "steps": STEPS,
        "seq_len": 64,
        "batch_tokens": 128,
        "micro_batch_tokens": 64,
        "bad_rows": "skip",
        "workers": 1,
        "data": [{"made": f"{__file__}:Talk"}],
    }
    rates = {"vision": 1e-3, "connectors": 1e-3, "language": 1e-3}
    recipe = Recipe.model_validate(
        {
            "name": "kills",
            "model": {"path": str(start)},
            "threads": 1,
            "device": "cpu",
            "save_every": SAVE_EVERY,
            "stages": [
                {**stage, "name": "a-whole", "train": rates},
                {
                    **stage,
                    "name": "b-adapter",
                    "train": {"adapters": 1e-2, "connectors": 1e-3},
                    "lora": {"rank": 4, "dropout": 0.1},
                },
            ],
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    notes = os.open(folder / "samples.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    seen: list[str] = []
    step, log = one_stage.step, one_stage.Metrics.log

    def noted(*args: Any, **options: Any) -> Any:
        report = step(*args, **options)
        seen[:] = report.sample_ids
        return report

    def logged(self: Any, row: dict[str, Any]) -> None:
        log(self, row)
        line = json.dumps({"stage": row["stage"], "step": row["step"], "ids": seen})
        os.write(notes, f"{line}\n".encode())

    one_stage.step, one_stage.Metrics.log = noted, logged  # type: ignore[assignment,method-assign]
    loop.run(recipe, folder, progress=False)


# What came of it


def _samples(run: Path) -> Iterator[dict[str, Any]]:
    """What every step saw, of all processes of the run, in the order they were taken."""
    file = run / "samples.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:  # cut off by a kill, and the next process wrote on behind it
            continue


def _outcome(run: Path) -> dict[str, Any]:
    """All that must be the same, as plain values."""
    from tinymodal.train import checkpoint
    from tinymodal.train.meter import TIMED

    newest = checkpoint.latest(run)
    assert newest is not None, f"{run} has no checkpoint"
    # How long the lines of metrics.jsonl are depends on the times in them.
    timed = ("seconds", "metrics_bytes")
    progress = {key: value for key, value in vars(newest.progress).items() if key not in timed}
    rows = checkpoint.read_lines(run / "metrics.jsonl")
    samples: dict[str, list[Any]] = {}
    for row in _samples(run):
        key = f"{row['stage']} {row['step']}"
        samples.setdefault(key, [])
        if row["ids"] not in samples[key]:
            samples[key].append(row["ids"])
    return {
        "weights": _hashes(run, "model", "adapter", "stages", "adapters"),
        "optimizer": _bits(newest.state["optimizer"]),
        "random state": [_bits(rank["random"]) for rank in newest.state["ranks"]],
        "place in the data": [_bits(rank["loader"]) for rank in newest.state["ranks"]],
        "rest of the checkpoint": _bits(
            {k: v for k, v in newest.state.items() if k not in ("optimizer", "ranks", "recipe")}
        ),
        "progress": progress,
        "checkpoints": [path.name for path in checkpoint.found(run)],
        "metrics": [{key: value for key, value in row.items() if key not in TIMED} for row in rows],
        "samples of every step": samples,
        "skipped rows": checkpoint.read_lines(run / "skipped.jsonl"),
    }


def _hashes(run: Path, *folders: str) -> dict[str, str]:
    files = (path for folder in folders for path in sorted((run / folder).rglob("*.safetensors")))
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _bits(value: Any) -> Any:
    """Tensors as type, shape and hash, all else as it is."""
    import torch

    if isinstance(value, torch.Tensor):
        raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(raw).hexdigest()}"
    if isinstance(value, dict):
        return {str(key): _bits(inner) for key, inner in value.items()}
    return [_bits(inner) for inner in value] if isinstance(value, list | tuple) else value


def _compare(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs, with the first place where it does."""
    odd = []
    for key, value in expected.items():
        if json.dumps(value) != json.dumps(found[key]):
            odd.append(f"{key}{_first(value, found[key])}")
    return odd


def _first(one: Any, other: Any) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        return f"[{keys[0]}]{_first(one.get(keys[0]), other.get(keys[0]))}" if keys else " in order"
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        return "" if at is None else f"[{at}]{_first(one[at], other[at])}"
    return f": {str(one)[:80]} and {str(other)[:80]}"


if __name__ == "__main__":
    sys.exit(main())
