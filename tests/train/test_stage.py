"""What a recipe asks of a stage beside steps: ends, caches, held-out samples, other losses, other memory."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tinymodal.compose import build
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import CheckpointError, DataError, RecipeError
from tinymodal.train import stage as one_stage
from tinymodal.train import work
from tinymodal.train.loop import run

from .talk import WORDS
from .test_loop import TALK, Killed, assert_equal, metrics, weights

SEEING = {"connectors": 1e-2}


def data(tmp_path, rows, name="chats.jsonl", start=0):
    from PIL import Image

    lines = []
    for n in range(start, start + rows):
        turns = [
            {"role": "user", "content": f"what colour is {WORDS[n % 4]}"},
            {"role": "assistant", "content": WORDS[n % 4]},
        ]
        if n % 2:
            Image.new("RGB", (24, 24), (n % 256, 99, 3)).save(tmp_path / f"{n}.png")
            turns[0]["content"] = [
                {"type": "image", "path": f"{n}.png"},
                {"type": "text", "text": "what is it"},
            ]
        lines.append(json.dumps({"messages": turns}))
    (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    return {"path": str(tmp_path / name), "format": "messages"}


@pytest.fixture
def ids(monkeypatch):
    """Sample ids of every step."""
    seen, real = [], one_stage.step

    def recorded(*args, **options):
        report = real(*args, **options)
        seen.append(report.sample_ids)
        return report

    monkeypatch.setattr(one_stage, "step", recorded)
    return seen


def run_cut(plan, folder, at):
    """Run ``plan``, killed in its ``at``-th step and gone on with."""
    real, taken = one_stage.step, []

    def cut(*args, **options):
        taken.append(1)
        if len(taken) == at:
            raise Killed
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_stage, "step", cut)
        with pytest.raises(Killed):
            run(plan, folder, progress=False)
    run(plan, folder, progress=False)


def of_step(folder):
    return [row for row in metrics(folder) if "loss" in row]


def test_a_stage_without_steps_reads_its_data_once_and_ends(recipe, tmp_path, ids):
    source = data(tmp_path, 11)
    plan = recipe(data=[source], steps=None, ends="drop", batch_tokens=64, floor=0.0, warmup=0.0)
    run(plan, tmp_path / "run", progress=False)
    read = [name.rpartition(":")[2] for step in ids for name in step]
    assert sorted(map(int, read)) == list(range(1, 12))
    rates = [row["lr"] for row in of_step(tmp_path / "run")]
    assert len(rates) == len(ids) > 2
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-8)


def test_it_goes_on_where_it_was_killed_and_ends_at_the_same_step(recipe, tmp_path):
    source = data(tmp_path, 23)
    plan = recipe(data=[source | {"epochs": 2}], steps=None, ends="drop", save_every=2)
    run(plan, tmp_path / "whole", progress=False)
    run_cut(plan, tmp_path / "run", 6)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert_equal(weights(tmp_path / "run" / "model"), weights(tmp_path / "whole" / "model"))


def test_a_stage_that_never_ends_is_refused(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"stages\.only"):
        run(recipe(steps=None, ends="stop"), tmp_path / "run", progress=False)


def test_held_out_samples_are_measured_and_the_training_is_what_it_was(recipe, tmp_path):
    held = data(tmp_path, 6, "held.jsonl", start=100)
    plain = recipe(steps=4, save_every=2)
    asked = recipe(steps=4, save_every=2, held_out=[held], held_out_every=2)
    run(plain, tmp_path / "plain", progress=False)
    run(asked, tmp_path / "asked", progress=False)
    rows = metrics(tmp_path / "asked")
    told = [row for row in rows if "held_out" in row]
    assert [row["step"] for row in told] == [2, 4]
    assert set(told[0]) >= {"held_out", "held_out/held", "held_out/text", "held_out/image"}
    assert told[1]["held_out"] < told[0]["held_out"]
    assert [row for row in rows if "loss" in row] == metrics(tmp_path / "plain")
    assert_equal(weights(tmp_path / "asked" / "model"), weights(tmp_path / "plain" / "model"))


def test_with_a_cache_the_tower_runs_once_a_picture_and_nothing_else_changes(recipe, tmp_path, monkeypatch):
    source = data(tmp_path, 8)
    plan = recipe(
        data=[source],
        train=SEEING,
        steps=6,
        cache=True,
        cache_folder=str(tmp_path / "features"),
        save_every=3,
    )
    calls = []
    model = tiny_model(words=WORDS)
    tower = type(model.model.model.towers["image"])
    real = tower.forward
    monkeypatch.setattr(tower, "forward", lambda self, x: calls.append(len(x)) or real(self, x))
    run(plan, tmp_path / "first", progress=False)
    assert sum(calls) == 4, "four pictures in eight rows"
    run(plan, tmp_path / "second", progress=False)
    assert sum(calls) == 4
    assert metrics(tmp_path / "first") == metrics(tmp_path / "second")
    assert_equal(weights(tmp_path / "first" / "model"), weights(tmp_path / "second" / "model"))

    without = plan.model_copy(
        update={"stages": (plan.stages[0].model_copy(update={"cache": False}),), "name": "plain"}
    )
    run(without, tmp_path / "plain", progress=False)
    losses = [[row["loss"] for row in of_step(tmp_path / name)] for name in ("first", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2), "features are rounded to bfloat16"


def test_a_micro_batch_that_fits_is_found_and_the_gradient_is_the_same(recipe, tmp_path, monkeypatch):
    sizes = []

    def fits(options, needed, free):
        sizes.append((list(options), needed(options[0]), needed(options[-1])))
        return options[-1]

    monkeypatch.setattr(work, "largest_micro_batch", fits)
    run(recipe(seq_len=64, batch_tokens=256, micro_batch_tokens="auto"), tmp_path / "auto", progress=False)
    run(recipe(seq_len=64, batch_tokens=256), tmp_path / "whole", progress=False)
    assert sizes[0][0] == [4, 2, 1]
    assert sizes[0][1] > 1.5 * sizes[0][2]
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("auto", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_machine_too_small_for_one_row_says_so(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "free_bytes", lambda device: 1000)
    with pytest.raises(RecipeError, match=r"one row of 64 positions needs .* MB and 0 MB are free"):
        run(recipe(seq_len=64, micro_batch_tokens="auto"), tmp_path / "run", progress=False)


def test_a_step_without_a_finite_loss_is_skipped_named_and_too_many_end_the_run(
    recipe, tmp_path, monkeypatch
):
    real, taken = one_stage.step, []

    def spoil(objective, *args, **options):
        taken.append(1)
        norm = objective.model.model.language_model.norm.weight
        whole = norm.detach().clone()
        if len(taken) in bad:
            norm.data.fill_(math.nan)
        report = real(objective, *args, **options)
        norm.data.copy_(whole)
        return report

    monkeypatch.setattr(one_stage, "step", spoil)
    plan = recipe(steps=5, bad_steps=2, train={"connectors": 1e-3})
    bad = {2, 3}
    run(plan, tmp_path / "run", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]
    assert rows[0]["samples"][0].startswith("talk-0/")
    assert [("skipped" in row) for row in metrics(tmp_path / "run")] == [False, True, True, False, False]
    taken.clear()
    bad = {2, 3, 4}
    with pytest.raises(DataError, match=r"steps in a row were skipped \(2, 3, 4\)"):
        run(plan, tmp_path / "again", progress=False)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw8bit"])
def test_every_optimizer_resumes_bit_for_bit(recipe, tmp_path, optimizer):
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    plan = recipe(steps=6, optimizer=optimizer, save_every=2)
    run(plan, tmp_path / "whole", progress=False)
    run_cut(plan, tmp_path / "run", 4)
    assert_equal(weights(tmp_path / "run" / "model"), weights(tmp_path / "whole" / "model"))


def test_pairs_and_a_teacher_train_through_a_recipe_and_resume(recipe, start, tmp_path, monkeypatch):
    larger = tmp_path / "larger"
    build.save(tiny_model(words=WORDS, seed=3), larger)
    teacher = {"path": str(larger), "top_k": 16, "cached": True}
    stages = [
        {"name": "prefer", "loss": ["dpo"], "data": [{"made": f"{TALK}:Pairs"}]},
        {
            "name": "imitate",
            "loss": ["text", "distill"],
            "teacher": teacher,
            "loss_weights": {"distill": 0.5},
        },
    ]
    common = {"steps": 4, "seq_len": 128, "batch_tokens": 128, "save_every": 2}
    plan = recipe(*stages, **common, cache_folder=str(tmp_path / "kept"))
    run(plan, tmp_path / "whole", progress=False)
    rows = metrics(tmp_path / "whole")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[3]["loss"] < rows[0]["loss"]
    assert {"dpo_right", "dpo_margin"} <= rows[3].keys()
    later = rows[-1]
    assert later["loss"] == pytest.approx(later["loss_text"] + 0.5 * later["loss_distill"])
    for cut_at in (3, 7):
        run_cut(plan, tmp_path / f"run-{cut_at}", cut_at)
        assert metrics(tmp_path / f"run-{cut_at}") == rows
        assert_equal(weights(tmp_path / f"run-{cut_at}" / "model"), weights(tmp_path / "whole" / "model"))


def test_bfloat16_saves_frozen_weights_as_they_were(recipe, start, tmp_path):
    run(recipe(train=SEEING, precision="bfloat16", steps=2), tmp_path / "run", progress=False)
    before, after = weights(start), weights(tmp_path / "run" / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".connectors." in name for name in changed)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


def test_several_samples_to_a_row_or_one_it_trains_either_way(recipe, tmp_path):
    run(recipe(batching="grouped", batch_tokens=128, steps=3), tmp_path / "run", progress=False)
    assert all(math.isfinite(row["loss"]) for row in metrics(tmp_path / "run"))
    assert TALK.endswith("talk.py")


@pytest.mark.parametrize("loss", ["dpo", "distill"])
def test_a_micro_batch_is_found_beside_another_model(recipe, tmp_path, loss):
    larger = tmp_path / "larger"
    build.save(tiny_model(words=WORDS, seed=3), larger)
    own = {"data": [{"made": f"{TALK}:Pairs"}]} if loss == "dpo" else {"teacher": {"path": str(larger)}}
    run(recipe(loss=[loss], micro_batch_tokens="auto", steps=1, **own), tmp_path / "run", progress=False)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_micro_batch_is_found_with_rounded_weights_and_adapters_train_in_float32(recipe, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    plan = recipe(
        train={"adapters": 1e-3},
        lora={"rank": 4},
        bits=bits,
        micro_batch_tokens="auto",
        precision="float16",
        steps=1,
    )
    run(plan, tmp_path / "run", progress=False)


def test_a_teacher_looks_at_few_rows(recipe, tmp_path):
    larger = tmp_path / "larger"
    build.save(tiny_model(words=WORDS, seed=3), larger)
    plan = recipe(loss=["distill"], teacher={"path": str(larger)}, data=[data(tmp_path, 3)], steps=1)
    run(plan, tmp_path / "run", progress=False)


def test_a_stage_leaves_no_gradients_behind(recipe, tmp_path):
    composed = run(recipe({"name": "a"}, {"name": "b", "train": SEEING}, steps=1), tmp_path, progress=False)
    assert all(p.grad is None for p in composed.model.parameters())


def test_a_teacher_that_is_not_there_is_told_before_the_first_stage(recipe, tmp_path):
    later = {"name": "b", "loss": ["distill"], "teacher": {"path": str(tmp_path / "no")}}
    with pytest.raises(CheckpointError, match=r"stages\.b\.teacher\.path"):
        run(recipe({"name": "a"}, later, steps=1), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_held_out_data_without_a_target_are_told_before_the_first_step(recipe, tmp_path):
    turns = [{"role": "user", "content": "red " * 100}, {"role": "assistant", "content": "one"}]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    held = {"path": str(tmp_path / "long.jsonl"), "format": "messages"}
    with pytest.raises(DataError, match="none of the samples has anything"):
        run(recipe(held_out=[held], save_every=0), tmp_path / "run", progress=False)
    assert not metrics(tmp_path / "run")


@pytest.mark.parametrize(
    "changes",
    [
        {"cache": True, "loss": ["distill"], "teacher": {"path": "a"}, "train": SEEING},
        {"data": [{"made": "scenes", "epochs": 2}]},
        {"keep_best": True},
    ],
)
def test_keys_that_would_do_nothing_or_harm_are_refused(recipe, changes):
    with pytest.raises(ValueError, match=r"'cache' keeps|'epochs' is for|'keep_best' needs"):
        recipe(**changes)
