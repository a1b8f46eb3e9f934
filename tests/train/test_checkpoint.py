from __future__ import annotations

import errno
import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tinymodal.compose import build
from tinymodal.core.errors import CheckpointError, RecipeError
from tinymodal.train import checkpoint
from tinymodal.train.checkpoint import MARKER, Progress, flaw, latest, save


class Killed(BaseException):
    """Not an Exception: nothing catches it on the way."""


class Kill:
    """Raise at the n-th time that Python touches the disk below a folder: opens, renames, deletes, makes.

    ``error`` is what is raised; a killed process by default.
    """

    EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")

    def __init__(self) -> None:
        self.folder, self.count = "", 0
        self.at: int | None = None
        self.error: BaseException = Killed()
        sys.addaudithook(self._hook)  # stays for the life of the process; without a folder it does nothing

    def watch(self, folder: Path, at: int | None, error: BaseException | None = None) -> None:
        self.folder, self.at, self.count, self.error = str(folder), at, 0, error or Killed()

    def _hook(self, event, args) -> None:
        if not self.folder or event not in self.EVENTS or not str(args[0]).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.at:
            self.folder = ""
            raise self.error


@pytest.fixture(scope="module")
def kill():
    hook = Kill()
    yield hook
    hook.folder = ""


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha1(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def state(number: int) -> dict:
    return {
        "optimizer": {"state": {0: {"step": torch.tensor(float(number))}}},
        "heads": None,
        "loader": {"draws": number},
        "random": checkpoint.random_state(),
    }


def test_what_is_saved_comes_back(tiny, tmp_path):
    progress = Progress(stage=1, step=40, seconds=1.5, tokens=99, metrics_bytes=7)
    path = save(tmp_path, "instruct", progress, tiny, state(3))
    assert path == tmp_path / "checkpoints" / "01-instruct-0000040"
    found = latest(tmp_path)
    assert (found.path, found.progress) == (path, progress)
    assert found.state["loader"] == {"draws": 3}
    again = build.load(found.model)
    for name, tensor in tiny.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_the_newest_two_are_kept_in_order_of_stage_and_step(tiny, tmp_path):
    for stage, step in ((0, 90), (0, 100), (1, 5), (1, 20)):
        save(tmp_path, "b" if stage else "a", Progress(stage=stage, step=step), tiny, state(step))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["01-b-0000005", "01-b-0000020"]
    assert latest(tmp_path).progress.step == 20


def test_the_end_of_a_stage_is_its_own_whole_checkpoint(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.build, "save", few_files)
    for stage, step in ((0, 9), (0, 10), (1, 5)):
        save(tmp_path, "a", Progress(stage=stage, step=step), tiny, state(step), keep=3)
    assert checkpoint.end_of(tmp_path, 0).path.name == "00-a-0000010"
    assert checkpoint.end_of(tmp_path, 1).model == tmp_path / "checkpoints" / "01-a-0000005" / "model"
    truncate(tmp_path / "checkpoints" / "00-a-0000010" / "training.pt")
    assert checkpoint.end_of(tmp_path, 0).path.name == "00-a-0000009"


def test_an_empty_run_has_no_checkpoint(tmp_path):
    assert latest(tmp_path) is None


def few_files(composed, folder):
    """In place of the model's thirteen files: what matters is that there are several, and folders."""
    (folder / "deeper").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "deeper/tokenizer.json"):
        (folder / name).write_text(name)


@pytest.mark.parametrize("whole_model", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_any_touch_of_the_disk_the_newest_checkpoint_is_whole(
    tiny, tmp_path, kill, monkeypatch, whole_model
):
    """Every open, rename, delete and mkdir of a save: of the third, which also deletes the first."""
    if not whole_model:
        monkeypatch.setattr(checkpoint.build, "save", few_files)
    begin = tmp_path / "begin"
    for step in (1, 2):
        save(begin, "a", Progress(stage=0, step=step), tiny, state(step))
    run = tmp_path / "run"
    shutil.copytree(begin, run)
    kill.watch(run, None)
    save(run, "a", Progress(stage=0, step=3), tiny, state(3))
    touches = kill.count
    assert touches > 15  # files of the model, training.pt, flushes, renames, deletes
    whole = {path.name: contents(path) for path in (begin / "checkpoints").iterdir()}
    whole |= {path.name: contents(path) for path in (run / "checkpoints").iterdir()}

    ends = set()
    for at in range(1, touches + 1):
        shutil.rmtree(run)
        shutil.copytree(begin, run)
        kill.watch(run, at)
        with pytest.raises(Killed):
            save(run, "a", Progress(stage=0, step=3), tiny, state(3))
        found = latest(run)
        assert found.state["loader"]["draws"] == found.progress.step
        assert contents(found.path) == whole[found.path.name], f"killed at touch {at}"
        assert not list(run.rglob(f"{checkpoint.UNFINISHED}*")), "swept by latest()"
        ends.add(found.progress.step)
    assert ends == {2, 3}  # killed before the rename, and while the oldest is deleted


def test_a_text_is_replaced_as_a_whole(tmp_path, kill):
    path = tmp_path / "recipe.toml"
    checkpoint.write_text(path, "old")
    kill.watch(tmp_path, None)
    checkpoint.write_text(path, "new")
    for at in range(1, kill.count + 1):
        checkpoint.write_text(path, "old")
        kill.watch(tmp_path, at)
        with pytest.raises(Killed):
            checkpoint.write_text(path, "new")
        assert path.read_text() == "old"
    kill.watch(Path(), None)
    kill.folder = ""


def remark(path: Path) -> None:
    """Let the marker name the files as they are."""
    marker = json.loads((path / MARKER).read_text())
    for name in marker["files"]:
        marker["files"][name] = {
            "bytes": (path / name).stat().st_size,
            "crc32": checkpoint._crc(path / name),
        }
    (path / MARKER).write_text(json.dumps(marker))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def turn_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def unreadable(path: Path) -> None:
    (path / "training.pt").write_bytes(b"no tensors")
    remark(path)


def unknown(path: Path) -> None:
    (path / MARKER).write_text((path / MARKER).read_text().replace('"format": 1', '"format": 2'))


DAMAGE = {
    "no marker": (lambda p: (p / MARKER).unlink(), "has no COMPLETE; it was not written to its end"),
    "empty marker": (lambda p: (p / MARKER).write_text(""), "COMPLETE cannot be read"),
    "odd marker": (lambda p: (p / MARKER).write_text("[1]"), "COMPLETE cannot be read"),
    "later format": (unknown, "is of format 2, and this version reads 1"),
    "short training.pt": (lambda p: truncate(p / "training.pt"), "training.pt has .* bytes, of .* that were"),
    "short weights": (
        lambda p: truncate(p / "model" / "model.safetensors"),
        "model/model.safetensors has .* bytes, of .* that were written",
    ),
    "other weights": (
        lambda p: turn_a_bit(p / "model" / "model.safetensors"),
        "model/model.safetensors has other bytes than were written",
    ),
    "no config": (lambda p: (p / "model" / "config.json").unlink(), "model/config.json is missing"),
    "no model": (lambda p: shutil.rmtree(p / "model"), "is missing"),
    "no tensors": (unreadable, r"training.pt cannot be read \(UnpicklingError"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tiny, tmp_path, capsys, damage):
    before = save(tmp_path, "a", Progress(stage=0, step=1), tiny, state(1))
    path = save(tmp_path, "a", Progress(stage=0, step=2), tiny, state(2))
    spoil, told = DAMAGE[damage]
    spoil(path)
    found = latest(tmp_path)
    assert (found.path, found.state["loader"]) == (before, {"draws": 1})
    build.load(found.model)
    line = " ".join(capsys.readouterr().err.split())
    assert f"passed over {path}: " in line
    shutil.rmtree(before)
    with pytest.raises(CheckpointError, match=f"none of 1 checkpoints is whole: .*{told}") as caught:
        latest(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_damaged_checkpoint_takes_no_other_with_it(tiny, tmp_path, monkeypatch):
    """It does not count as one of those kept, and one behind the place a run went on from is no newer one."""
    monkeypatch.setattr(checkpoint.build, "save", few_files)
    for step in (1, 2, 3):
        save(tmp_path, "a", Progress(stage=0, step=step), tiny, state(step))
    turn_a_bit(tmp_path / "checkpoints" / "00-a-0000003" / "training.pt")
    assert latest(tmp_path).progress.step == 2
    for step in (2, 3):  # 2: other steps between saves now
        save(tmp_path, "a", Progress(stage=0, step=step), tiny, state(step), keep=1)
        assert latest(tmp_path).progress.step == step
    truncate(tmp_path / "checkpoints" / "00-a-0000003" / "training.pt")
    save(tmp_path, "a", Progress(stage=0, step=4), tiny, state(4))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00-a-0000003", "00-a-0000004"]


def test_the_best_of_a_stage_stays_and_a_link_leads_to_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.build, "save", few_files)

    def there():
        return sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if not p.is_symlink())

    link = tmp_path / "checkpoints" / "best"
    for step, score in ((1, 2.0), (2, 1.0), (3, float("nan")), (4, 1.0), (5, None), (6, 3.0)):
        place = Progress(stage=0, step=step)
        save(tmp_path, "a", place, tiny, state(step), score=score, keep=2, keep_best=True)
    assert there() == ["00-a-0000002", "00-a-0000005", "00-a-0000006"]
    assert (link / "training.pt").samefile(tmp_path / "checkpoints" / "00-a-0000002" / "training.pt")
    assert latest(tmp_path).progress.step == 6

    save(tmp_path, "b", Progress(stage=1, step=1), tiny, state(1), score=9.0, keep=1, keep_best=True)
    save(tmp_path, "b", Progress(stage=1, step=2), tiny, state(2), keep=1, keep_best=True)
    assert there() == ["01-b-0000001", "01-b-0000002"]  # scores of two stages are not of one kind
    assert link.resolve().name == "01-b-0000001"


def test_what_fails_leaves_nothing_behind_and_the_old_as_it_was(tiny, tmp_path, kill, monkeypatch):
    """A disk that is full at any touch, of a save that replaces one of the same step."""
    monkeypatch.setattr(checkpoint.build, "save", few_files)
    begin, run = tmp_path / "begin", tmp_path / "run"
    for step in (1, 2):
        save(begin, "a", Progress(stage=0, step=step), tiny, state(step))
    shutil.copytree(begin, run)
    kill.watch(run, None)
    save(run, "a", Progress(stage=0, step=3), tiny, state(3))
    for at in range(1, kill.count + 1):
        shutil.rmtree(run)
        shutil.copytree(begin, run)
        kill.watch(run, at, OSError(errno.ENOSPC, "No space left on device"))
        try:
            save(run, "a", Progress(stage=0, step=3), tiny, state(3))
            done = 3  # what failed was the deletion of an older one
        except OSError:
            done = 2
        kill.folder = ""
        assert not [p for p in run.rglob(f"{checkpoint.UNFINISHED}*") if "gone" not in p.name], at
        found = latest(run)
        assert found.progress.step in {done, 3}, at  # 3: on the disk, and only the last flush failed
        assert not flaw(found.path, thorough=True)
        assert len(checkpoint.found(run)) >= 2


NURSERY = """
import os, pathlib, shutil, signal, sys
import torch
torch.set_num_threads(1)
from tinymodal.compose.tiny import tiny_model
from tinymodal.train import checkpoint
from tinymodal.train.checkpoint import Progress, latest, save

begin, run = pathlib.Path(sys.argv[1]) / "begin", pathlib.Path(sys.argv[1]) / "run"
tiny = tiny_model(words=("red", "green"))
touches, at, flush, nth = 0, 0, os.fsync, 0

def touch(event, args):
    global touches
    touched = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
    touched |= event == "open" and bool(args[1]) and args[1][0] != "r"
    if touched and str(args[0]).startswith(str(run)):
        touches += 1
        if touches == at:
            os.kill(os.getpid(), signal.SIGKILL)

def flushed(handle):
    touch("open", [str(run), "w"])
    flush(handle)
    touch("open", [str(run), "w"])

def write(folder, step):
    save(folder, "a", Progress(stage=0, step=step), tiny, {"loader": step})

write(begin, 1), write(begin, 2)
sys.addaudithook(touch)
os.fsync = flushed
while True:
    nth += 1
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(begin, run)
    child = os.fork()
    if not child:
        touches, at = 0, nth
        write(run, 3)
        os._exit(0)
    ended = os.waitpid(child, 0)[1]
    found = latest(run)
    signalled = os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else 0
    # At once: what waits to be written is a child's as well, and a progress bar there writes it again.
    print(signalled, found.progress.step, found.state["loader"], flush=True)
    if not ended:
        break
"""


@pytest.mark.slow
def test_a_process_killed_between_any_two_writes_leaves_a_whole_checkpoint(tmp_path):
    """SIGKILL at every open, rename, delete, mkdir and on both sides of every flush of a real save."""
    done = subprocess.run(
        [sys.executable, "-c", NURSERY, str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(rows) > 60
    assert all(step == loader for _, step, loader in rows)
    assert {ended for ended, *_ in rows[:-1]} == {9}
    assert rows[-1] == (0, 3, 3)
    steps = [step for _, step, _ in rows]
    assert steps == sorted(steps)  # before the rename the second, behind it the third
    assert set(steps) == {2, 3}


def drawn():
    numpy = np.random.random_sample(3), np.random.standard_normal()  # noqa: NPY002  (the state to be kept)
    return *torch.rand(3).tolist(), *numpy[0], numpy[1], random.random(), random.gauss(0, 1)


def test_every_generator_goes_back_to_where_it_was():
    drawn()  # of a pair of normal numbers one is kept for the next call
    before = checkpoint.random_state()
    expected = drawn()
    drawn()
    checkpoint.set_random_state(before)
    assert drawn() == expected


def test_ranks_draw_other_numbers_and_the_same_again():
    found = []
    for rank in (0, 1, 2, 0, 1, 2):
        checkpoint.seed_random(7, rank)
        found.append(drawn())
    assert found[:3] == found[3:]
    assert all(len({row[i] for row in found[:3]}) == 3 for i in range(len(found[0])))
    checkpoint.seed_random(7)
    torch.manual_seed(7)
    assert (*torch.rand(3).tolist(),) == found[0][:3]


def test_as_many_ranks_as_then_go_on_exactly_and_others_from_a_seed():
    states, expected = [], []
    for rank in range(2):
        checkpoint.seed_random(7, rank)
        drawn()
        states.append(checkpoint.random_state())
        expected.append(drawn())
    for rank in range(2):
        checkpoint.set_random_state_of(states, rank, 2, seed=9)
        assert drawn() == expected[rank]
    others = []
    for world in (3, 3, 1):
        for rank in range(world):
            checkpoint.set_random_state_of(states, rank, world, seed=9)
            others.append(drawn())
    assert others[:3] == others[3:6]
    assert others[6] == others[0]
    assert not {*others} & {*expected}
    assert len({*others}) == 3


def test_random_state_is_read_back_as_plain_values(tmp_path):
    torch.save(checkpoint.random_state(), tmp_path / "state.pt")
    expected = drawn()
    checkpoint.set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert drawn() == expected


def test_another_recipe_is_refused_with_every_key_that_differs(recipe):
    then = recipe()
    checkpoint.refuse_another(Path("runs/x"), then, then)
    with pytest.raises(RecipeError) as caught:
        checkpoint.refuse_another(Path("runs/x"), then, recipe(steps=9, seq_len=128, seed=3))
    told = str(caught.value)
    assert told.startswith("runs/x: holds a run of another recipe; 3 keys differ (then and now): ")
    for key in ("seed: 0 and 3", "stages.0.steps: 4 and 9", "stages.0.seq_len: 64 and 128"):
        assert key in told
    with pytest.raises(RecipeError, match="1 key differs"):
        checkpoint.refuse_another(Path("runs/x"), then, recipe(steps=9))


def test_weights_of_a_folder_take_the_place_of_a_models_own(tiny, tmp_path):
    build.save(tiny, tmp_path / "model")
    expected = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    for parameter in tiny.model.parameters():
        parameter.data.add_(1)
    checkpoint.load_weights(tiny.model, tmp_path / "model")
    for name, tensor in tiny.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    with pytest.raises(CheckpointError, match="does not fit the model in memory"):
        checkpoint.load_weights(torch.nn.Linear(2, 2), tmp_path / "model")


def test_realigned_tensors_are_equal_and_still_tied():
    base = torch.arange(9, dtype=torch.float32)
    model = torch.nn.Linear(2, 4, bias=False)
    model.weight.data = base[1:].view(4, 2)  # begins 4 bytes into its memory, as one mapped from a file may
    twin = torch.nn.Linear(2, 4, bias=False)
    twin.weight = model.weight
    pair = torch.nn.ModuleList([model, twin])
    assert model.weight.data_ptr() % 64
    checkpoint.realign(pair)
    assert model.weight.data_ptr() % 64 == 0
    assert twin.weight is model.weight
    assert torch.equal(model.weight.flatten(), base[1:])
