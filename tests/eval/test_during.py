"""Saved models are scored while the run goes on, and nothing that fails there costs the run anything."""

from __future__ import annotations

import json
import shutil

import pytest

from tinymodal.compose.build import save
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import RecipeError
from tinymodal.eval import during
from tinymodal.eval.compare import line, read
from tinymodal.eval.during import EVALS, FOLDER, LOG, Evaluations
from tinymodal.train.recipe import EvalEvery


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(tiny_model(), folder)
    return folder


@pytest.fixture(autouse=True)
def as_important_as_the_rest(monkeypatch):
    """Beside a training it stands back; where all cores test, it would wait for minutes."""
    monkeypatch.setattr(during, "NICENESS", 0)


@pytest.fixture
def run(tmp_path, saved):
    """A run folder with two checkpoints, and questions to ask."""
    for step in (10, 20):
        shutil.copytree(saved, tmp_path / "checkpoints" / f"01-instruct-{step:07d}" / "model")
    rows = [{"question": f"Which is {n}?", "answer": "one", "image": None} for n in range(4)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [{"stage": "instruct", "step": step, "loss": 1.0} for step in range(1, 31)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return tmp_path


def spec(run, **more):
    return EvalEvery(on=(str(run / "asked.jsonl"),), questions=3, device="cpu", **more)


def models(run):
    return sorted((run / "checkpoints").glob("*/model"))


def evals(run):
    path = run / EVALS
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def test_each_save_is_scored_and_its_checkpoint_may_be_gone_by_then(run):
    evaluations = Evaluations(run, spec(run))
    for model in models(run):
        evaluations.saved(model)
    shutil.rmtree(run / "checkpoints")
    evaluations.finish()
    rows = evals(run)
    assert [(row["stage"], row["step"], set(row) - {"stage", "step"}) for row in rows] == [
        ("instruct", 10, {"eval/asked"}),
        ("instruct", 20, {"eval/asked"}),
    ]
    told = json.loads((run / FOLDER / "01-instruct-0000010" / "results.json").read_text())
    assert (told["asked"]["n"], told["asked"]["limit"]) == (3, 3)
    # The linked weights are given back.
    assert not list((run / FOLDER).glob("*/model"))
    # They are curves of the page that compares runs.
    held = line(read(run, "a")).grids[1]
    assert list(held.series["eval/asked"]) == [row["eval/asked"] for row in rows]


@pytest.mark.slow
def test_only_every_second_save_where_the_recipe_says_so(run):
    evaluations = Evaluations(run, spec(run, saves=2))
    for model in models(run):
        evaluations.saved(model)
    evaluations.finish()
    assert [row["step"] for row in evals(run)] == [20]


@pytest.mark.slow
def test_a_failed_evaluation_is_told_and_the_next_one_runs(run, capsys):
    first, second = models(run)
    (first / "config.json").write_text("{}")
    evaluations = Evaluations(run, spec(run))
    evaluations.saved(first)
    evaluations.saved(second)
    evaluations.finish()
    told = capsys.readouterr().err
    assert "01-instruct-0000010 was not evaluated (exit code 1): error:" in told
    assert str(run / FOLDER / "01-instruct-0000010" / LOG) in told
    assert [row["step"] for row in evals(run)] == [20]


@pytest.mark.slow
def test_what_waited_when_the_run_was_killed_is_scored_when_it_goes_on(run):
    first, second = models(run)
    for model in (first, second):
        shutil.copytree(model, run / FOLDER / model.parent.name / "model")
    Evaluations(run, spec(run)).finish()
    assert [row["step"] for row in evals(run)] == [10, 20]
    # What is scored is not scored again.
    again = Evaluations(run, spec(run))
    again.saved(first)
    again.finish()
    assert len(evals(run)) == 2


def test_a_stopped_run_leaves_the_rest_for_the_next_start(run):
    evaluations = Evaluations(run, spec(run))
    for model in models(run):
        evaluations.saved(model)
    evaluations.stop()
    assert evals(run) == []
    assert len(list((run / FOLDER).glob("*/model"))) == 2


def test_a_recipe_names_what_is_asked(tmp_path):
    from tinymodal.core.config import load
    from tinymodal.train.recipe import Recipe

    path = tmp_path / "r.toml"
    whole = 'name = "r"\n[model]\npath = "starter"\n[[stages]]\nname = "a"\ntrain = { language = 1e-3 }\n'
    whole += "steps = 2\n"
    whole += 'data = [{ made = "scenes" }]\n[eval_every]\n'
    path.write_text(whole + 'on = ["scenes"]\n')
    assert load(path, Recipe).eval_every == EvalEvery(on=("scenes",))
    path.write_text(whole)
    with pytest.raises(RecipeError, match="eval_every: missing key 'on'"):
        load(path, Recipe)
