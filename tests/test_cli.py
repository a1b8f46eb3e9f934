"""The command line: quick to answer, one line for a user's mistake, the right exit code."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tinymodal import cli
from tinymodal.core.errors import DataError
from tinymodal.verbs import evaluate, options

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
name = "mini"
[model]
language = { path = "nowhere" }
[[stages]]
name = "align"
train = { language = 1e-3 }
steps = 5
data = [{ made = "scenes" }]
"""


def tinymodal(*words: str, where: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "tinymodal", *words],
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )


def cpu_of_children() -> float:
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def least_cpu_seconds(*words: str, where: Path | None = None, times: int = 3) -> float:
    """CPU time and not wall time: the tests run beside each other."""
    spent = []
    for _ in range(times):
        before = cpu_of_children()
        tinymodal(*words, where=where)
        spent.append(cpu_of_children() - before)
    return min(spent)


def test_help_answers_at_once():
    """0.08 s measured; torch alone would take 1.5 s."""
    assert least_cpu_seconds("--help") < 0.3


def test_asking_for_help_loads_no_heavy_library():
    code = (
        "import sys; from tinymodal.cli import parser; parser().format_help(); "
        "print(sorted({'torch', 'transformers', 'pydantic', 'rich', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_wrong_key_is_answered_at_once_with_file_place_and_nearest_key(tmp_path):
    (tmp_path / "mini.toml").write_text(RECIPE.replace("steps = 5", "stepps = 5"))
    for verb in ("train", "preview"):
        done = tinymodal(verb, "mini.toml", where=tmp_path)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        for told in ("error: mini.toml: stages[0]", "'stepps'", "did you mean 'steps'"):
            assert told in done.stderr
    # 0.32 s measured on an idle core; one that tests beside it takes up to twice as long.
    assert least_cpu_seconds("train", "mini.toml", where=tmp_path) < 0.8
    assert [path.name for path in tmp_path.iterdir()] == ["mini.toml"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("evl",), "'evl'"),
        (("train",), "recipe"),
        (("eval", "--limit", "0"), "--limit"),
        (("eval", "--limit", "many"), "--limit"),
        (("chat", "--image", "nowhere.png"), "nowhere.png"),
        (("chat", "--audio", "nowhere.wav"), "no such sound"),
        (("chat", "--speak", "said.mp3"), "ends with .wav"),
        (("chat", "--speak", "no/said.wav"), "no folder no"),
        (("eval", "--listener", "nowhere"), "--aloud"),
        (("eval", "--voice", "ann"), "--aloud"),
        (("chat", "--top-p", "2"), "--top-p 2"),
        (("eval", "--on", "scenesss"), "did you mean 'scenes'"),
        (("eval", "--on", "nowhere.jsonl"), "nowhere.jsonl"),
        (("train", "nowhere.toml"), "nowhere.toml"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_one(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(words)
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err
    assert not list(tmp_path.iterdir())


def test_help_of_every_verb_is_shown_and_exits_with_zero(capsys):
    for verb in ("demo", "train", "preview", "eval", "chat"):
        with pytest.raises(SystemExit) as left:
            cli.main([verb, "--help"])
        assert left.value.code == 0
        assert verb in capsys.readouterr().out


def test_no_verb_shows_the_help_and_version_the_version(capsys):
    assert cli.main([]) == 0
    assert "demo" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tinymodal ")


@pytest.fixture
def verb(monkeypatch):
    """``tinymodal preview x`` raises what the test wants."""

    def failing(error: BaseException, name: str = "preview") -> int:
        def run(_):
            raise error

        monkeypatch.setattr(cli, f"run_{name}", run)
        return cli.main([name, "x"])

    return failing


def test_a_users_fault_shows_no_traceback_unless_asked_for(verb, capsys, monkeypatch):
    assert verb(DataError("row 3:\n broken")) == 1
    assert capsys.readouterr().err == "error: row 3: broken\n"
    monkeypatch.setenv("TINYMODAL_DEBUG", "1")
    assert verb(DataError("broken")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_exit_code_two_with_its_traceback(verb, capsys):
    assert verb(KeyError("x")) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "KeyError" in err
    assert verb(OSError(errno.EBADF, "odd")) == 2


def test_a_full_disk_is_the_users_and_one_line(verb, capsys):
    assert verb(OSError(errno.ENOSPC, "No space left on device", "runs/x")) == 1
    assert capsys.readouterr().err == "error: runs/x: No space left on device\n"


def test_ctrl_c_says_how_to_go_on_where_something_was_saved(verb, capsys):
    assert verb(KeyboardInterrupt(), "train") == 130
    assert "goes on" in capsys.readouterr().err
    assert verb(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_the_environment_is_set_once_and_never_over_the_users(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    cli.set_environment()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert 1 <= cli.usable_cores() <= (os.cpu_count() or 1)


def test_importing_the_command_line_changes_nothing():
    code = "import os; before = dict(os.environ); import tinymodal.cli; print(before == dict(os.environ))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_results_go_beside_the_model_or_under_runs(tmp_path):
    assert options.results_folder(str(tmp_path)) == tmp_path / "eval"
    assert options.results_folder("starter") == Path("runs/starter/eval")
    assert options.results_folder("org/model") == Path("runs/org--model/eval")


def test_the_names_that_eval_runs_by_default_are_built_in():
    from tinymodal.eval.tasks import scenes
    from tinymodal.eval.tasks.table import TASKS

    assert evaluate.SCENES.split(",") == [benchmark.name for benchmark in scenes.BENCHMARKS.values()]
    assert set(evaluate.SCENES.split(",")) <= set(TASKS)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from tinymodal.compose.build import save
    from tinymodal.compose.tiny import tiny_model

    folder = tmp_path_factory.mktemp("model")
    save(tiny_model(), folder / "model")
    return folder


def test_a_saved_model_is_scored_from_the_command_line(model_folder, tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert cli.main(["eval", str(model_folder), "--limit", "10", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for told in ("scenes-shuffled", "colour", "mean", "first 10 questions only", str(tmp_path)):
        assert told in out
    tests = ("scenes", "scenes-unseen", "scenes-shuffled")
    names = {"results.json", ".eval.lock", "eval.html", *(f"{name}.replies.jsonl" for name in tests)}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_piped_question_is_answered_on_stdout_alone(model_folder, tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    command = [sys.executable, "-m", "tinymodal", "chat", str(model_folder), "--image", "red.png"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "3"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input="what is it\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") >= 1


def test_an_error_in_a_pipe_is_exit_code_one(model_folder, monkeypatch, capsys):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("/image nowhere.png\n"))
    assert cli.main(["chat", str(model_folder)]) == 1
    assert "nowhere.png" in capsys.readouterr().err


def test_overrides_may_stand_after_options(tmp_path, capsys):
    """``train r.toml --out x stages.0.steps=1``: argparse alone calls the last word unrecognized."""
    recipe = tmp_path / "r.toml"
    recipe.write_text('name = "r"\n')
    assert cli.main(["train", str(recipe), "--out", str(tmp_path / "x"), "nmae=q"]) == 1
    err = capsys.readouterr().err
    assert "nmae" in err
    assert "unrecognized" not in err


def test_an_option_nobody_knows_is_named(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["train", "r.toml", "--steps", "3"])
    assert leaving.value.code == 1
    assert "--steps" in capsys.readouterr().err


@pytest.fixture(scope="module")
def omni_folder(tmp_path_factory):
    """A saved model that sees, hears and speaks, whatever it says."""
    from tinymodal.compose.build import save
    from tinymodal.compose.tiny import tiny_codec, tiny_model

    folder = tmp_path_factory.mktemp("omni")
    tiny_codec(folder / "codec")
    speech = {"codec": str(folder / "codec"), "width": 16, "layers": 1, "voices": ("ann", "bob")}
    save(tiny_model(audio="tinymodal_ear", speech=speech), folder / "model")
    return folder / "model"


def chatting(model, words, typed, monkeypatch, capsys):
    """Exit code, answer and errors. In this process, where transformers does not yet know to be quiet."""
    import io

    from transformers.utils import logging

    logging.disable_progress_bar()
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    code = cli.main(["chat", str(model), "--max-new-tokens", "2", *map(str, words)])
    return code, *capsys.readouterr()


def test_a_spoken_question_is_answered_aloud_and_the_answer_is_printed_alone(
    omni_folder, tmp_path, monkeypatch, capsys
):
    import numpy as np
    import soundfile
    from PIL import Image

    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    asked, said = tmp_path / "asked.wav", tmp_path / "said.wav"
    soundfile.write(asked, np.sin(np.arange(8_000) / 9).astype(np.float32), 16_000)
    heard = ("--image", tmp_path / "red.png", "--audio", asked)
    code, out, err = chatting(
        omni_folder, (*heard, "--speak", said, "--voice", "bob"), "", monkeypatch, capsys
    )
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert soundfile.info(said).frames > 0
    assert chatting(omni_folder, heard, "\n", monkeypatch, capsys) == (0, out, "")


def test_ears_and_mouth_that_are_missing_are_told_in_one_line(model_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "said").mkdir()
    (tmp_path / "a.wav").write_bytes(b"")
    for words, missing in (
        (("--speak", tmp_path / "said.wav"), "[model.speech]"),
        (("--audio", tmp_path / "a.wav"), "[model.audio]"),
    ):
        code, out, err = chatting(model_folder, words, "what is it\n", monkeypatch, capsys)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert missing in err
    assert not (tmp_path / "said.wav").exists()


def test_a_voice_without_speech_is_refused(model_folder, monkeypatch, capsys):
    code, _, err = chatting(model_folder, ("--voice", "ann"), "what\n", monkeypatch, capsys)
    assert code == 1
    assert "--speak" in err
