from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tinymodal.compose import build
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.config import dump, load
from tinymodal.core.errors import DataError, RecipeError
from tinymodal.train import stage as one_stage
from tinymodal.train.loop import run
from tinymodal.train.meter import TIMED
from tinymodal.train.recipe import Recipe

from . import talk
from .talk import WORDS

TALK = talk.__file__


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.fixture
def steps(monkeypatch):
    """What every step of the loop saw and did; ``steps.until`` ends the process at that one."""

    class Steps(list):
        until: int | None = None

    seen = Steps()
    real = one_stage.step

    def recorded(*args, **options):
        if len(seen) == seen.until:
            raise Killed
        seen.append(real(*args, **options))
        return seen[-1]

    monkeypatch.setattr(one_stage, "step", recorded)
    return seen


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    """A model with dropout: then a resumed run must draw the same random numbers too."""
    folder = tmp_path_factory.mktemp("dropping") / "model"
    build.save(tiny_model(words=WORDS, attention_dropout=0.1), folder)
    return folder


def test_ten_steps_and_a_kill_and_ten_more_are_twenty_steps_bit_for_bit(recipe, dropping, steps, tmp_path):
    plan = recipe(
        {"name": "align", "steps": 8, "train": {"connectors": 1e-2}, "loss": ["text"]},
        {"name": "instruct", "steps": 12, "micro_batch_tokens": 64, "bad_rows": "skip"},
        save_every=10,
        data=[{"made": f"{TALK}:Spoilt", "weight": 2}, {"made": "scenes", "options": {"picture": "written"}}],
        bad_rows="skip",
    )
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"path": str(dropping)})})
    whole = tmp_path / "whole"
    run(plan, whole, progress=False)
    expected = list(steps)
    assert len(expected) == 20

    for until in (3, 10, 19):  # before any save, in a stage without one, behind one
        steps.clear()
        folder = tmp_path / f"killed-{until}"
        steps.until = until
        with pytest.raises(Killed):
            run(plan, folder, progress=False)
        steps.until = None
        run(plan, folder, progress=False)
        done_again = len(steps) - 20
        assert done_again == {3: 3, 10: 2, 19: 1}[until]
        saved = until - done_again
        assert steps[:until] == expected[:until]
        assert steps[until:] == expected[saved:]  # losses, norms and sample ids
        assert metrics(folder) == metrics(whole)
        assert (folder / "skipped.jsonl").read_text() == (whole / "skipped.jsonl").read_text()
        assert_equal(weights(folder / "model"), weights(whole / "model"))
        assert_equal(weights(folder / "stages" / "align"), weights(whole / "stages" / "align"))


def test_a_finished_run_is_not_trained_again(recipe, steps, tmp_path):
    run(recipe(), tmp_path / "run", progress=False)
    before = weights(tmp_path / "run" / "model")
    steps.clear()
    ends = []
    composed = run(recipe(), tmp_path / "run", on_stage_end=lambda *_: ends.append(1), progress=False)
    assert (len(steps), ends) == (0, [])
    assert_equal({name: composed.model.state_dict()[name] for name in before}, before)


def test_random_draws_of_the_callers_do_not_change_the_training(recipe, steps, tmp_path):
    plan = recipe({"name": "a"}, {"name": "b"}, save_every=2)
    run(plan, tmp_path / "quiet", progress=False)
    expected = list(steps)
    steps.clear()
    run(
        plan,
        tmp_path / "noisy",
        after_save=lambda path: torch.rand(3),
        on_stage_end=lambda stage, composed: torch.rand(3),
        progress=False,
    )
    assert steps == expected


def test_callers_see_every_save_and_every_stage_also_after_a_kill_inside_the_call(recipe, tmp_path):
    plan = recipe({"name": "a"}, {"name": "b"}, save_every=3)
    saves, ends = [], []

    def end(stage, composed):
        assert not composed.model.training
        ends.append(stage.name)
        if len(ends) == 1:
            raise Killed

    with pytest.raises(Killed):
        run(plan, tmp_path / "run", after_save=saves.append, on_stage_end=end, progress=False)
    assert not (tmp_path / "run" / "stages").exists()
    run(plan, tmp_path / "run", after_save=saves.append, on_stage_end=end, progress=False)
    assert ends == ["a", "a", "b"]
    assert [path.parent.name for path in saves] == [
        "00-a-0000003",
        "00-a-0000004",
        "01-b-0000003",
        "01-b-0000004",
    ]
    assert (tmp_path / "run" / "stages" / "a" / "config.json").exists()
    assert not (tmp_path / "run" / "stages" / "b").exists()  # the last stage's model is run/model


def test_another_recipe_may_not_go_on_with_a_run(recipe, tmp_path):
    run(recipe(), tmp_path / "run", progress=False)
    with pytest.raises(RecipeError) as caught:
        run(recipe(steps=9, seq_len=128), tmp_path / "run", progress=False)
    assert "holds a run of another recipe; 2 keys differ" in str(caught.value)
    assert "stages.0.steps: 4 and 9; stages.0.seq_len: 64 and 128" in str(caught.value)
    run(recipe(workers=1, save_every=1, threads=1), tmp_path / "run", progress=False)  # these change nothing


def test_the_run_folder_holds_the_resolved_recipe_and_what_it_was_made_on(recipe, tmp_path):
    plan = recipe(steps=2)
    run(plan, tmp_path / "run", progress=False)
    assert load(tmp_path / "run" / "recipe.toml", Recipe) == plan
    record = json.loads((tmp_path / "run" / "run.json").read_text())["starts"][0]
    assert record["versions"]["torch"] == torch.__version__
    assert {"commit", "machine", "time"} <= record.keys()
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row.keys() >= {
        "stage",
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "targets",
        "tokens_per_s",
        "seconds",
    }


def test_bad_rows_end_the_run_by_default_and_are_named(recipe, tmp_path):
    with pytest.raises(DataError, match="talk-0/4: no picture there"):
        run(recipe(data=[{"made": f"{TALK}:Spoilt"}], steps=20), tmp_path / "run", progress=False)


def test_skipped_and_too_long_rows_are_counted_and_listed(recipe, tmp_path, capsys):
    plan = recipe(data=[{"made": f"{TALK}:Spoilt"}], bad_rows="skip", steps=10)
    run(plan, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    bad = [row["reason"] for row in rows if row["why"] == "bad"]
    long = [row["sample"] for row in rows if row["why"] == "long"]
    assert bad[:2] == ["talk-0/4: no picture there", "talk-0/9: no picture there"]
    assert long[:2] == ["talk-0/6", "talk-0/13"]
    assert {row["stage"] for row in rows} == {"only"}
    assert all(row["reason"] for row in rows)
    told = " ".join(capsys.readouterr().err.split())
    assert f"left out: {len(bad)} bad rows (met {len(bad)} times), {len(long)} longer than a row" in told


def test_a_stage_may_write_its_own_template_and_train_every_word(recipe, steps, tmp_path):
    run(recipe({"name": "a", "template": "plain"}, {"name": "b"}, {"name": "c", "train_on": "all"}, steps=1),
        tmp_path / "run", progress=False)  # fmt: skip
    targets = [report.num_targets / report.num_tokens for report in steps]
    assert targets[1] < 0.4 < targets[2]
    assert build.load(tmp_path / "run" / "model").encoder.template.name == "chatml"


def test_cell_heads_go_on_into_the_next_stage_and_through_a_kill(recipe, steps, tmp_path):
    plan = recipe(
        {"name": "a"},
        {"name": "b"},
        loss=["cells"],
        cell_classes=[3, 5],
        train={"vision": 1e-2, "connectors": 1e-2, "heads": 1e-1},
        data=[{"made": f"{TALK}:Talk", "options": {"targets": True}}],
        schedule="constant",
        steps=10,
    )
    run(plan, tmp_path / "run", progress=False)
    losses = [report.loss for report in steps]
    assert sum(losses[10:15]) < 0.9 * sum(losses[:5])

    steps.clear()
    steps.until = 12
    with pytest.raises(Killed):
        run(plan, tmp_path / "killed", progress=False)
    steps.until = None
    run(plan, tmp_path / "killed", progress=False)
    assert [report.loss for report in steps[12:]] == losses[10:]


def test_parts_are_saved_at_the_end_and_can_be_composed_again(recipe, tmp_path):
    parts = {"vision": str(tmp_path / "tower"), "language": str(tmp_path / "words")}
    trained = run(recipe(parts=parts, steps=1), tmp_path / "run", progress=False)
    spec = {
        "language": {"path": parts["language"]},
        "vision": {"path": parts["vision"], "connector": "linear"},
    }
    again = build.build(Recipe.model_validate(recipe().model_dump() | {"model": spec}).model)
    assert_equal(dict(again.model.model.towers.state_dict()), dict(trained.model.model.towers.state_dict()))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": [{"made": "scenez"}]}, "unknown made source 'scenez'"),
        ({"data": [{"made": "scenes", "options": {"splot": 1}}]}, "data[0].options: unknown option 'splot'"),
        ({"data": [{"made": "scenes", "options": {"split": "x"}}]}, "stages.only.data[0].options"),
        ({"data": [{"path": "nowhere.json", "format": "llava"}]}, "nowhere.json"),
        ({"template": "chatmll"}, "did you mean 'chatml'?"),
        ({"seq_len": 4096, "batch_tokens": 4096}, "stages.only.seq_len is 4096, but the language model"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_key(recipe, tmp_path, changes, told):
    with pytest.raises((RecipeError, DataError)) as caught:
        run(recipe(**changes), tmp_path / "run", progress=False)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_is_not_there_is_refused(recipe, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RecipeError, match="torch sees no GPU"):
        run(recipe().model_copy(update={"device": "cuda"}), tmp_path / "run")


QLORA = {"train": {"adapters": 1e-2, "connectors": 1e-3}, "lora": {"rank": 4}, "bits": 4}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, QLORA], ids=["full", "qlora"])
def test_killed_for_real_at_any_moment_a_run_ends_as_if_never_interrupted(recipe, tmp_path, changes):
    """SIGKILL, a fresh process each time: nothing is left to memory, caches or the alignment of a buffer."""
    plan = recipe({"name": "a", "steps": 20}, {"name": "b", "steps": 20}, save_every=4, **changes)
    path = tmp_path / "plan.toml"
    path.write_text(dump(plan))
    code = (
        "import sys\nfrom pathlib import Path\nfrom tinymodal.core.config import load\n"
        "from tinymodal.train.recipe import Recipe\nfrom tinymodal.train.loop import run\n"
        "run(load(sys.argv[1], Recipe), Path(sys.argv[2]), progress=False)\n"
    )

    def begin(folder):
        return subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(folder)], stderr=subprocess.DEVNULL
        )

    def saved():
        return {path.name for path in (tmp_path / "killed" / "checkpoints").glob("[0-9]*")}

    assert begin(tmp_path / "whole").wait() == 0
    kills = 0
    for after_s in (0.05, 0.4, 0.2):
        process = begin(tmp_path / "killed")
        before = saved()
        # Start-up takes seconds; the moment is counted from the first checkpoint this process writes.
        while process.poll() is None and saved() == before:
            time.sleep(0.01)
        time.sleep(after_s)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert begin(tmp_path / "killed").wait() == 0
    assert kills >= 1
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert_equal(weights(tmp_path / "killed" / "model"), weights(tmp_path / "whole" / "model"))


def test_what_is_wrong_with_the_last_stage_is_told_before_the_first_step_and_nothing_is_written(
    recipe, steps, tmp_path
):
    for wrong, told in (
        ({"data": [{"path": "nowhere.jsonl", "format": "messages"}]}, "nowhere.jsonl"),
        ({"template": "chatmll"}, "stages.b: unknown template"),
    ):
        with pytest.raises((RecipeError, DataError), match=told):
            run(recipe({"name": "a"}, {"name": "b"} | wrong), tmp_path / "run", progress=False)
        assert len(steps) == 0
        assert not (tmp_path / "run").exists()


def test_cell_heads_outlive_a_stage_without_them(recipe, steps, tmp_path):
    cells = {
        "loss": ["cells"],
        "cell_classes": [3, 5],
        "train": {"heads": 1e-2},
        "data": [{"made": f"{TALK}:Talk", "options": {"targets": True}}],
        "seed": 5,
        "schedule": "constant",
        "warmup": 0.0,
    }
    one, other = cells | {"name": "a", "steps": 30}, cells | {"name": "c", "steps": 5}
    run(recipe(one, {"name": "b", "steps": 1}, other), tmp_path / "run", progress=False)
    first, last = steps[:5], steps[-5:]
    assert [report.sample_ids for report in first] == [report.sample_ids for report in last]
    assert all(now.loss < then.loss for now, then in zip(last, first, strict=True))
