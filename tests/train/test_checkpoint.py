from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tinymodal.compose import build
from tinymodal.core.errors import CheckpointError
from tinymodal.train import checkpoint
from tinymodal.train.checkpoint import Progress, latest, save


class Killed(BaseException):
    """Not an Exception: nothing catches it on the way."""


class Kill:
    """Raise at the n-th time that Python touches the disk below a folder: opens, renames, deletes, makes."""

    EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")

    def __init__(self) -> None:
        self.folder, self.at, self.count = "", None, 0
        sys.addaudithook(self._hook)  # stays for the life of the process; without a folder it does nothing

    def watch(self, folder: Path, at: int | None) -> None:
        self.folder, self.at, self.count = str(folder), at, 0

    def _hook(self, event, args) -> None:
        if not self.folder or event not in self.EVENTS or not str(args[0]).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.at:
            self.folder = ""
            raise Killed


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


def test_a_damaged_file_says_which_folder_to_delete(tiny, tmp_path):
    path = save(tmp_path, "a", Progress(stage=0, step=1), tiny, state(1))
    (path / "training.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="Delete this folder") as caught:
        latest(tmp_path)
    assert str(path) in str(caught.value)


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
