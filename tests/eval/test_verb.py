"""``tinymodal eval``: what would be ignored, lost or overwritten is refused before a model is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinymodal import cli
from tinymodal.core.errors import DataError
from tinymodal.verbs import evaluate as verb

ROOT = Path(__file__).resolve().parents[2]
POPE = {"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "yes"}
VQA = {"question_id": 1, "image": "1.jpg", "text": "What?"}
KEY = "sk-secret-0123456789"
OWN = """
from dataclasses import replace
from tinymodal.eval.tasks.pope import TASK
TASK = replace(TASK, name="mine")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder: files of two benchmarks, answers to them, and no model that could be loaded."""

    def never(*_, **__):
        raise AssertionError("a model is loaded")

    def lines(name, row):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row) + "\n")

    for split in ("adversarial", "popular", "random"):
        lines(f"data/coco_pope_{split}.json", POPE)
    lines("data/llava_vqav2_mscoco_test2015.jsonl", VQA)
    lines("data/llava_vqav2_mscoco_test-dev2015.jsonl", VQA)
    lines("pope.jsonl", {"id": "random/1", "reply": "yes"})
    lines("vqa.jsonl", {"question_id": 1, "text": "two dogs"})
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setattr(verb, "load_model", never)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files() -> list[Path]:
    """All that lies here, but for what Python keeps of a module that it imports."""
    return sorted(path for path in Path().rglob("*") if "__pycache__" not in path.parts)


def refused(capsys, *words):
    """The one line that the command ends with, before anything was written."""
    before = files()
    assert cli.main(["eval", *words]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert files() == before
    return err


ANSWERS = ("--on", "pope", "--data", "data", "--answers", "pope.jsonl")
JUDGE = ("--judge", "http://localhost:1/v1")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((*ANSWERS, "--limit", "5"), "leave --limit out"),
        ((*ANSWERS, "--batch", "5"), "leave --batch out"),
        ((*ANSWERS, "--aloud"), "leave --aloud out"),
        ((*ANSWERS, "--device", "cpu"), "leave --device out"),
        (("a", "b", *ANSWERS), "leave a out"),
        ((*ANSWERS, *JUDGE), "no language model grades pope"),
        (("--on", "scenes", *JUDGE), "no language model grades scenes"),
        (("--aloud", *JUDGE), "leave --judge out"),
        (("--aloud", "--submission", "x.json"), "leave --submission out"),
        (("--judge-model", "x"), "leave --judge-model out"),
        (("--judge-key", "OPENAI_API_KEY"), "leave --judge-key out"),
        (("--judge-price", "1,2"), "leave --judge-price out"),
        (("runs/a", "--where"), "leave runs/a out"),
        (("--where", "--answers", "pope.jsonl"), "leave --answers out"),
        (("--where", "--submission", "x.json"), "leave --submission out"),
        (("--where", "--limit", "5"), "leave --limit out"),
        (("--on", ","), "names no benchmark"),
        (("--on", " , "), "names no benchmark"),
        (("--where", "--on", ","), "names no benchmark"),
        (("--where", "--data", "typo"), "typo: no such folder"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(here, capsys, words, told):
    assert told in refused(capsys, *words)


def test_names_may_have_spaces_between(here, capsys):
    assert cli.main(["eval", "--where", "--on", " pope, mme "]) == 0
    told = capsys.readouterr().out
    assert "pope: " in told
    assert "mme: " in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--on", "scenes", "--out", "pope.jsonl"), "pope.jsonl: is a file"),
        (("--on", "scenes", "--out", "pope.jsonl/below"), "pope.jsonl: is a file"),
        ((*ANSWERS, "--out", "pope.jsonl"), "pope.jsonl: is a file"),
    ],
)
def test_a_file_in_the_place_of_the_folder_is_refused(here, capsys, words, told):
    assert told in refused(capsys, *words)


@pytest.mark.parametrize(
    ("asked", "file", "told"),
    [
        (("--on", "vqav2"), "data", "is a folder"),
        (("--on", "vqav2", "--answers", "vqa.jsonl"), "data", "is a folder"),
        (("--on", "vqav2", "--answers", "vqa.jsonl"), "vqa.jsonl", "is there already"),
        (("--on", "vqav2"), "vqa.jsonl/x.json", "vqa.jsonl is a file"),
        (("--on", "pope"), "x.json", "pope has no test server"),
        (("--on", "pope", "--answers", "pope.jsonl"), "x.json", "pope has no test server"),
        (("--on", "vqav2,pope"), "x.json", "--on names 2"),
        (("--on", "vqav2", "--out", "out"), "out/results.json", "eval writes this file itself"),
        (("--on", "vqav2", "--out", "out"), "out/vqav2.replies.jsonl", "eval writes this file itself"),
    ],
)
def test_a_submission_that_cannot_be_written_is_refused_before_anything_is_asked(
    here, capsys, asked, file, told
):
    assert told in refused(capsys, *asked, "--data", "data", "--submission", file)
    assert json.loads(Path("vqa.jsonl").read_text())["text"] == "two dogs"


def test_a_submission_is_written_where_nothing_is(here, capsys):
    words = ["--on", "vqav2", "--data", "data", "--answers", "vqa.jsonl", "--submission", "new/vqa.json"]
    assert cli.main(["eval", *words]) == 0
    assert json.loads(Path("new/vqa.json").read_text()) == [{"question_id": 1, "answer": "2 dogs"}]


def test_a_key_in_the_place_of_its_variables_name_is_refused_without_showing_it(here, capsys):
    Path("data/own.py").write_text(
        "from tinymodal.eval.benchmark import Benchmark, Judging\n"
        "GRADED = Judging(prompt=list, read=list)\n"
        "BENCHMARK = Benchmark(name='graded', load=list, score=list, source='', judge=GRADED)"
    )
    told = refused(capsys, "--on", "data/own.py:BENCHMARK", *JUDGE, "--judge-key", KEY)
    assert "expected the name of the environment variable" in told
    assert KEY not in told


def test_answers_to_files_of_a_benchmark_of_your_own_are_scored(here, capsys):
    words = ["--on", "own.py:TASK", "--data", "data", "--answers", "pope.jsonl"]
    assert cli.main(["eval", *words]) == 0
    assert (here / "runs/answers/pope/results.json").exists()


def test_a_scorer_of_your_own_that_fails_on_answers_is_one_line(here, capsys):
    Path("bench.py").write_text(
        "from tinymodal.core.types import Message, Sample, Text\n"
        "from tinymodal.eval.benchmark import Benchmark, Question\n"
        "asked = Question(Sample((Message('user', (Text('?'),)),), 'random/1'), 'yes')\n"
        "BENCHMARK = Benchmark(name='mine', load=lambda: [asked], score=lambda q, r: {}[r], source='')\n"
    )
    assert cli.main(["eval", "--on", "bench.py:BENCHMARK", "--answers", "pope.jsonl", "--out", "out"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: mine: its scorer fails at question 'random/1': KeyError: 'yes'")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("llava-v1.5-13b.answers.jsonl.gz", "llava-v1.5-13b.answers"),
        ("llava-v1.5-7b.jsonl", "llava-v1.5-7b"),
        ("MMBench_v1.1.xlsx", "MMBench_v1.1"),
        ("results.tar.gz", "results"),
        ("llava-v1.5-7b", "llava-v1.5-7b"),
        (".jsonl", ".jsonl"),
    ],
)
def test_answers_of_two_models_go_into_two_folders(name, plain):
    assert verb.plain_name(Path("somewhere") / name) == plain


def scored(*words):
    assert cli.main(["eval", "--data", "data", *words]) == 0
    return json.loads(Path("runs/answers/x/results.json").read_text())


def test_files_of_one_name_do_not_overwrite_each_other_and_answers_of_one_model_share_a_folder(here, capsys):
    for place, reply in (("a", "yes"), ("b", "no")):
        Path(place).mkdir()
        Path(place, "x.jsonl").write_text(json.dumps({"id": "random/1", "reply": reply}) + "\n")
    Path("vqa").mkdir()
    Path("vqa.jsonl").rename("vqa/x.jsonl")
    first = scored("--on", "pope", "--answers", "a/x.jsonl")
    assert scored("--on", "pope", "--answers", "b/x.jsonl") == first
    told = "runs/answers/x: holds the scores of a/x.jsonl on pope; those of b/x.jsonl go to runs/answers/x-2"
    assert told in capsys.readouterr().err
    other = json.loads(Path("runs/answers/x-2/results.json").read_text())
    assert other["pope"]["protocol"]["answers"] == "b/x.jsonl"
    assert other["pope"]["metrics"] != first["pope"]["metrics"]
    # Each file is scored again where it was, however it is named; what another benchmark asks is no other's.
    again = scored("--on", "pope", "--answers", str(here / "a" / "x.jsonl"))
    assert again["pope"]["metrics"] == first["pope"]["metrics"]
    assert scored("--on", "vqav2", "--answers", "vqa/x.jsonl").keys() == {"pope", "vqav2"}
    scored("--on", "pope", "--answers", "b/x.jsonl")
    assert sorted(path.name for path in Path("runs/answers").iterdir()) == ["x", "x-2"]


def test_a_second_scoring_that_fails_leaves_no_number_of_the_first(here, capsys):
    words = ["--data", "data", "--out", "out"]
    for name, answers in (("pope", "pope.jsonl"), ("vqav2", "vqa.jsonl")):
        assert cli.main(["eval", "--on", name, "--answers", answers, *words]) == 0
    results = Path("out/results.json")
    assert cli.main(["eval", "--on", "pope", "--answers", "typo.jsonl", *words]) == 1
    assert json.loads(results.read_text()).keys() == {"pope", "vqav2"}  # nothing was given to score
    assert cli.main(["eval", "--on", "pope", "--answers", "vqa.jsonl", *words]) == 1
    assert json.loads(results.read_text()).keys() == {"vqav2"}
    assert cli.main(["eval", "--on", "vqav2", "--answers", "pope.jsonl", *words]) == 1
    assert not results.exists()
    assert cli.main(["eval", "--on", "pope", "--answers", "pope.jsonl", *words]) == 0
    assert json.loads(results.read_text()).keys() == {"pope"}


def test_of_several_processes_one_scores_answers_and_the_others_leave(here, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for words in (ANSWERS, (*ANSWERS, "--limit", "5")):  # what is wrong is told once
        assert cli.main(["eval", *words]) == 0
    assert capsys.readouterr() == ("", "")
    assert not Path("runs").exists()
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["eval", *ANSWERS]) == 0
    assert Path("runs/answers/pope/results.json").exists()


def test_the_page_of_a_folder_tells_the_numbers_of_what_was_scored_there_before(here, capsys):
    for name, answers in (("pope", "pope.jsonl"), ("vqav2", "vqa.jsonl")):
        words = ["--on", name, "--data", "data", "--answers", answers, "--out", "out"]
        assert cli.main(["eval", *words]) == 0
    _, _, earlier = Path("out/eval.html").read_text().partition("Scored in this folder before")
    for shown in ("pope", "F1: mean_f1", "1.0000", "incomplete"):
        assert shown in earlier
    assert "vqav2" not in earlier


@pytest.mark.slow
def test_two_processes_compare_two_models_and_tell_it_once(tmp_path):
    from tinymodal.compose.build import save
    from tinymodal.compose.tiny import tiny_model

    for seed in (0, 1):
        save(tiny_model(seed=seed), tmp_path / str(seed))
    (tmp_path / "asked.jsonl").write_text('{"image": null, "question": "1?", "answer": "one"}\n' * 3)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tinymodal", "eval")
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "0", "1", "--on", "asked.jsonl", "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Where they differ") == 1
    assert (tmp_path / "out/b/difference.html").exists()


def test_the_model_is_read_in_the_bits_that_are_asked_for(monkeypatch, tmp_path):
    asked = {}

    def load(path, **how):
        asked.update(how)
        raise DataError("enough")

    monkeypatch.setattr("tinymodal.compose.build.load", load)
    assert cli.main(["eval", "starter", "--on", "scenes", "--bits", "8", "--out", str(tmp_path)]) == 1
    assert asked["bits"] == 8
