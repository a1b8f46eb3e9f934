from __future__ import annotations

import errno
import hashlib
import re
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch

from tinymodal.compose.quantize import quantize
from tinymodal.core.errors import CheckpointError
from tinymodal.train import adapters, checkpoint, loop
from tinymodal.train import save as saving
from tinymodal.train.checkpoint import Progress, latest
from tinymodal.train.groups import trainable
from tinymodal.train.recipe import HARMLESS, HARMLESS_IN_STAGES, Lora, Recipe, Stage
from tinymodal.train.save import Saver

from .test_checkpoint import few_files


def bytes_of(folder: Path) -> dict[str, str]:
    """Of each file; of ``training.pt`` what it holds, as pickle also writes who is whose twin in memory."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "training.pt":
            found[name] = bits(torch.load(path, weights_only=True))
        elif path.is_file() and path.name != checkpoint.MARKER:
            found[name] = hashlib.sha1(path.read_bytes()).hexdigest()
    return found


def bits(value) -> str:
    if isinstance(value, torch.Tensor):
        raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha1(raw).hexdigest()}"
    if isinstance(value, dict):
        return str({key: bits(inner) for key, inner in value.items()})
    return str([bits(inner) for inner in value]) if isinstance(value, list | tuple) else repr(value)


def at(step: int, stage: int = 0) -> Progress:
    return Progress(stage=stage, step=step)


def prepared(composed, lora: Lora | None = None, bits: int | None = None, **rates):
    """A model and an optimizer as a stage has them."""
    model = composed.model
    if bits is not None:
        quantize(model.model.language_model, bits, torch.device("cpu"), torch.float32)
    names = [] if lora is None else adapters.inject(model, lora)
    groups = trainable(model, rates or {"language": 1.0, "connectors": 1.0}, 0.0, None, {}, names)
    return torch.optim.AdamW(groups, lr=1e-2)


def go(model, optimizer, seed: int = 0) -> None:
    """As a step: everything that trains moves."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def slow_disk(monkeypatch):
    """``slow_disk.clear()``: whatever is saved waits until ``slow_disk.set()``."""
    gate = threading.Event()
    gate.set()
    real = checkpoint.save

    def waiting(*args, **options):
        assert gate.wait(30)
        return real(*args, **options)

    monkeypatch.setattr(checkpoint, "save", waiting)
    return gate


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(checkpoint.build, "save", few_files)


STAGES = {
    "all": {"vision": 1e-3, "connectors": 1e-3, "language": 1e-3, "embeddings": 1e-3},
    "connector": {"connectors": 1e-3},
    "lora": {"lora": Lora(rank=4, parts=("language", "vision")), "adapters": 1e-3, "connectors": 1e-3},
    "dora": {"lora": Lora(rank=4, kind="dora"), "adapters": 1e-3},
    "4 bits": {"lora": Lora(rank=4), "bits": 4, "adapters": 1e-3},
    "8 bits": {"lora": Lora(rank=4), "bits": 8, "adapters": 1e-3},
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_save_in_the_background_writes_the_bits_of_the_moment_it_was_asked(
    tiny, tmp_path, slow_disk, stage
):
    """Steps that are taken while the disk is slow change no bit of it, and it changes no bit of theirs."""
    optimizer = prepared(tiny, **STAGES[stage])
    plain, behind = Saver(tmp_path / "plain", in_background=False), Saver(tmp_path / "behind")
    plain.follow(tiny)
    behind.follow(tiny)
    for step in (1, 2):
        go(tiny.model, optimizer, step)
        state = {
            "optimizer": optimizer.state_dict(),
            "trained": adapters.trained_state(tiny.model),
            "random": checkpoint.random_state(),
            "loader": {"draws": step},
        }
        plain.save("a", at(step), state)
        slow_disk.clear()
        behind.save("a", at(step), state)
        assert behind.poll() == []
        go(tiny.model, optimizer, 10 + step)
        slow_disk.set()
        behind.wait()
        (model,) = behind.poll()
        assert model == tmp_path / "behind" / "checkpoints" / f"00-a-000000{step}" / "model"
        assert behind.poll() == []
        expected, found = bytes_of(tmp_path / "plain"), bytes_of(tmp_path / "behind")
        assert expected == found, [name for name in expected if expected[name] != found.get(name)]
        assert latest(tmp_path / "behind").state["loader"] == {"draws": step}
    names = {name.split("/")[2] for name in found}
    assert ("adapter" in names) == ("lora" in STAGES[stage])


def test_no_random_number_is_drawn_and_nothing_of_the_model_changes(tiny, tmp_path):
    optimizer = prepared(tiny)
    go(tiny.model, optimizer)
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in tiny.model.named_parameters()}
    modes = {name: module.training for name, module in tiny.model.named_modules()}
    config = tiny.model.config.to_dict()
    random = bits(checkpoint.random_state())
    saver = Saver(tmp_path)
    saver.follow(tiny)
    saver.save("a", at(1), {"optimizer": optimizer.state_dict()}, last=True)
    assert bits(checkpoint.random_state()) == random
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.model.state_dict().items())
    assert flags == {name: p.requires_grad for name, p in tiny.model.named_parameters()}
    assert modes == {name: module.training for name, module in tiny.model.named_modules()}
    assert config == tiny.model.config.to_dict()


def test_what_is_frozen_is_not_held_twice(tiny, tmp_path):
    prepared(tiny, connectors=1.0)
    saver = Saver(tmp_path)
    saver.follow(tiny)
    copies = dict(saver._copy.model.named_parameters())
    for name, parameter in tiny.model.named_parameters():
        shared = copies[name].data_ptr() == parameter.data_ptr()
        assert shared != parameter.requires_grad, name
    assert copies["lm_head.weight"] is saver._copy.model.get_output_embeddings().weight
    plain = Saver(tmp_path, in_background=False)
    plain.follow(tiny)
    assert plain._copy is None


def test_a_sharded_model_is_saved_from_the_weights_that_are_brought(tiny, tmp_path):
    optimizer = prepared(tiny, **STAGES["lora"])
    for in_background in (False, True):
        folder = tmp_path / str(in_background)
        saver = Saver(folder, in_background=in_background)
        saver.follow(tiny, sharded=True)
        go(tiny.model, optimizer)
        weights = {name: p.detach().clone() for name, p in tiny.model.named_parameters()}
        checkpoint.save(tmp_path / "expected", "a", at(1), tiny, {"x": 1})
        was = {name: p.detach().clone() for name, p in tiny.model.named_parameters()}
        for p in tiny.model.parameters():
            p.data = torch.zeros(0) if p.requires_grad else p.data  # in pieces elsewhere
        saver.save("a", at(1), {"x": 1}, weights=weights)
        saver.wait()
        assert bytes_of(folder) == bytes_of(tmp_path / "expected")
        for name, p in tiny.model.named_parameters():
            p.data = was[name]


def test_the_next_save_waits_for_the_one_before(tiny, tmp_path, few, slow_disk):
    prepared(tiny)
    saver = Saver(tmp_path, keep=3)
    saver.follow(tiny)
    slow_disk.clear()
    saver.save("a", at(1), {"loader": 1})
    threading.Timer(0.2, slow_disk.set).start()
    saver.save("a", at(2), {"loader": 2})
    assert [path.parent.name for path in saver.poll()][:1] == ["00-a-0000001"]
    saver.save("a", at(3), {"loader": 3}, last=True)
    assert [p.name for p in checkpoint.found(tmp_path)] == ["00-a-0000001", "00-a-0000002", "00-a-0000003"]


def test_another_stage_is_followed_as_it_is_then(tiny, tmp_path):
    saver = Saver(tmp_path)
    optimizer = prepared(tiny, **STAGES["lora"])
    saver.follow(tiny)
    go(tiny.model, optimizer)
    saver.save("a", at(1), {}, last=True)
    adapters.merge(tiny.model)
    optimizer = prepared(tiny)
    saver.follow(tiny)
    go(tiny.model, optimizer)
    saver.save("b", at(1, stage=1), {}, last=True)
    checkpoint.save(tmp_path / "expected", "b", at(1, stage=1), tiny, {})
    name = "checkpoints/01-b-0000001/model/model.safetensors"
    assert bytes_of(tmp_path)[name] == bytes_of(tmp_path / "expected")[name]


def test_scores_choose_the_best(tiny, tmp_path, few):
    saver = Saver(tmp_path, keep=1, keep_best=True)
    saver.follow(tiny)
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        saver.save("a", at(step), {}, score=score)
    saver.wait()
    assert [path.name for path in checkpoint.found(tmp_path)] == ["00-a-0000002", "00-a-0000004"]
    assert (tmp_path / "checkpoints" / "best").resolve().name == "00-a-0000002"


# What goes wrong with the disk


class Full:
    """The n-th file that is opened or flushed meets a full disk."""

    def __init__(self, monkeypatch) -> None:
        self.count, self.at = 0, None
        real = checkpoint._flush

        def flush(path):
            self.count += 1
            if self.count == self.at:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            real(path)

        monkeypatch.setattr(checkpoint, "_flush", flush)

    def fail(self, at: int | None) -> None:
        self.count, self.at = 0, at


@pytest.mark.parametrize("in_background", [True, False])
def test_a_full_disk_is_told_once_and_the_training_goes_on(
    tiny, tmp_path, few, monkeypatch, capsys, in_background
):
    full = Full(monkeypatch)
    saver = Saver(tmp_path, in_background=in_background)
    saver.follow(tiny)
    saver.save("a", at(1), {"loader": 1})
    saver.wait()
    flushes = full.count
    said = ""
    for step in range(2, 4):
        full.fail(2)
        saver.save("a", at(step), {"loader": step})
        saver.wait()
        said += capsys.readouterr().err
    assert saver.poll() == [tmp_path / "checkpoints" / "00-a-0000001" / "model"]
    said = " ".join(said.split())
    assert said.count("could not be written") == 1, said
    for part in ("00-a-0000002", "No space left on device", "newest that is there is 00-a-0000001"):
        assert part in said
    assert "Make room on that disk" in said
    assert "goes on and tries again at the next save" in said
    full.fail(None)
    saver.save("a", at(4), {"loader": 4})
    saver.wait()
    assert "checkpoints are written again" in capsys.readouterr().err
    assert latest(tmp_path).state == {"loader": 4}

    for fails in range(1, flushes + 1):  # a disk that is full at any of them
        full.fail(fails)
        saver.save("a", at(4 + fails), {"loader": 4 + fails})
        saver.wait()
        step = latest(tmp_path).progress.step
        # The last flush is that of the folder around it, after the rename: it is there all the same.
        assert step == (4 + fails if fails == flushes else 4)


def test_the_last_save_of_a_stage_ends_the_run_if_it_fails(tiny, tmp_path, few, monkeypatch):
    full = Full(monkeypatch)
    saver = Saver(tmp_path)
    saver.follow(tiny)
    saver.save("a", at(1), {})
    saver.wait()
    full.fail(1)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        saver.save("a", at(2), {}, last=True)
    assert "the newest that is there is 00-a-0000001" in str(caught.value)
    assert "Then start it again." in str(caught.value)
    assert "\n" not in str(caught.value)
    assert latest(tmp_path).progress.step == 1


def test_the_very_first_save_may_fail_too(tiny, tmp_path, few, monkeypatch, capsys):
    Full(monkeypatch).fail(1)
    saver = Saver(tmp_path)
    saver.follow(tiny)
    saver.save("a", at(1), {})
    saver.wait()
    assert "there is none before it" in " ".join(capsys.readouterr().err.split())
    assert latest(tmp_path) is None


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_file_that_the_system_cuts_short_leaves_the_checkpoint_before(tiny, tmp_path, capsys, share):
    """Real failures inside safetensors' and torch's own writers: no file may grow beyond a limit."""
    optimizer = prepared(tiny)
    go(tiny.model, optimizer)
    saver = Saver(tmp_path)
    saver.follow(tiny)
    saver.save("a", at(1), {"optimizer": optimizer.state_dict()})
    saver.wait()
    path = checkpoint.found(tmp_path)[0]
    largest = max(file.stat().st_size for file in path.rglob("*") if file.is_file())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * largest), hard))
    try:
        saver.save("a", at(2), {"optimizer": optimizer.state_dict()})
        saver._thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    saver.wait()
    assert "could not be written" in " ".join(capsys.readouterr().err.split())
    assert latest(tmp_path).progress.step == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00-a-0000001"]
    saver.save("a", at(3), {}, last=True)
    assert latest(tmp_path).progress.step == 3


def test_a_folder_that_vanishes_while_it_is_written_costs_that_save_only(
    tiny, tmp_path, few, monkeypatch, capsys
):
    saver = Saver(tmp_path)
    saver.follow(tiny)
    saver.save("a", at(1), {"loader": 1})
    saver.wait()

    def vanish(*args):
        shutil.rmtree(tmp_path / "checkpoints")

    with monkeypatch.context() as patch:
        patch.setattr(saving.checkpoint.adapters, "adapted", vanish)
        saver.save("a", at(2), {"loader": 2})
        saver.wait()
    assert "could not be written" in " ".join(capsys.readouterr().err.split())
    saver.save("a", at(3), {"loader": 3}, last=True)
    assert latest(tmp_path).state == {"loader": 3}


def test_a_place_that_cannot_be_written_to_is_told(tiny, tmp_path, few, capsys):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    saver = Saver(tmp_path)
    saver.follow(tiny)
    saver.save("a", at(1), {})
    saver.wait()
    assert "could not be written" in " ".join(capsys.readouterr().err.split())


def test_a_run_on_a_disk_that_fills_up_and_is_cleared_loses_nothing(recipe, tmp_path, monkeypatch, capsys):
    plan = recipe(save_every=1, steps=5)
    loop.run(plan, tmp_path / "whole", progress=False)
    real, saves = checkpoint.write_folder, []

    def full(path, write, seal=None):
        saves.append(path.name)
        if len(saves) in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, write, seal)

    monkeypatch.setattr(checkpoint, "write_folder", full)
    loop.run(plan, tmp_path / "run", progress=False)
    assert saves[:5] == [f"00-only-000000{step}" for step in range(1, 6)]
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("could not be written (No space left on device)") == 1
    assert told.count("checkpoints are written again") == 1
    assert bytes_of(tmp_path / "run" / "model") == bytes_of(tmp_path / "whole" / "model")


def test_a_run_whose_last_save_fails_ends_with_an_error_and_goes_on_when_there_is_room(
    recipe, tmp_path, monkeypatch
):
    plan = recipe(save_every=2, steps=5)
    loop.run(plan, tmp_path / "whole", progress=False)
    real = checkpoint.write_folder

    def full(path, write, seal=None):
        if path.name == "00-only-0000005":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, write, seal)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_folder", full)
        with pytest.raises(CheckpointError, match="the newest that is there is 00-only-0000004"):
            loop.run(plan, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "model").exists()
    loop.run(plan, tmp_path / "run", progress=False)
    assert bytes_of(tmp_path / "run" / "model") == bytes_of(tmp_path / "whole" / "model")


def test_the_page_names_every_key_that_may_change_and_no_other():
    page = (Path(saving.__file__).parents[2] / "docs" / "resume.md").read_text()
    told = page[page.index("## What is saved") : page.index("## What is exact")]
    keys = {*HARMLESS, *HARMLESS_IN_STAGES}
    named = set(re.findall(r"`([a-z_]+)`", told)) & {*Recipe.model_fields, *Stage.model_fields}
    assert keys - {key for key in keys if key.startswith("held_out")} == named - {"lora"}


def test_what_the_page_quotes_is_what_is_said():
    root = Path(saving.__file__).parents[2]
    page = (root / "docs" / "resume.md").read_text()
    files = (root / "tinymodal" / "train").glob("*.py")
    said = "".join(file.read_text() for file in files).replace("{MARKER}", checkpoint.MARKER)
    table = page[page.index("## What it says") :].splitlines()[4:]
    quoted = [words for line in table for words in re.findall(r"`([^`]+)`", line.split("|")[1])]
    assert len(quoted) > 10
    for words in quoted:
        assert words in said, words
