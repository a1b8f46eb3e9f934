"""The demo: one command, every number, nothing done twice. The quick tests train nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinymodal import demo as room
from tinymodal.core.config import load
from tinymodal.core.errors import RecipeError, TinyModalError
from tinymodal.demo import Book, demo, without_align
from tinymodal.train.recipe import Recipe

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"per_kind": 2, "per_kind_unseen": 2, "clips": 3, "per_kind_asked": 1, "per_kind_aloud": 1}
RECIPE = """
name = "demo"
seed = 4
save_every = 3
threads = 1
[model.language]
tokenizer = "{tokenizer}"
[model.language.config]
model_type = "llama"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 512
[model.vision]
connector = "pixel_shuffle"
[model.vision.config]
model_type = "siglip_vision_model"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 3
num_attention_heads = 4
image_size = 24
patch_size = 4
[[stages]]
name = "align"
train = {{ connectors = 1e-3 }}
steps = 6
seq_len = 256
batch_tokens = 512
template = "plain"
data = [{{ made = "scenes", options = {{ form = "captions" }} }}]
[[stages]]
name = "instruct"
train = {{ connectors = 1e-3, language = 1e-3 }}
steps = 6
seq_len = 256
batch_tokens = 512
data = [{{ made = "scenes" }}]
"""

SCRIPT = """
import os
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
from tinymodal.demo import demo
from tinymodal.train import loop
from tinymodal.train import stage as one_stage

if sys.argv[1] == "kill":
    own, steps = one_stage.step, iter(range(100))
    one_stage.step = lambda *given, **named: own(*given, **named) if next(steps) < 8 else os._exit(9)
demo(Path("out"), recipe=Path({recipe!r}), starter={starter!r}, sizes={sizes!r})
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A recipe of random tiny parts, and a tiny finished model in the starter's place."""
    from tinymodal.compose.build import save
    from tinymodal.compose.tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("parts")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    save(tiny_model(), folder / "starter")
    (folder / "demo.toml").write_text(RECIPE.format(tokenizer=folder / "tokenizer"))
    return folder


@pytest.fixture
def recipe(parts):
    return load(parts / "demo.toml", Recipe)


@pytest.fixture
def untrained(monkeypatch):
    """Training that takes no steps: every stage ends at once with a random model. Gives the list of runs."""
    from tinymodal.compose.tiny import tiny_model

    runs = []

    def run(recipe, folder, on_stage_end):
        runs.append((recipe.name, [stage.name for stage in recipe.stages]))
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "metrics.jsonl").open("w") as file:
            for stage in recipe.stages:
                for step in range(20):
                    file.write(json.dumps({"stage": stage.name, "step": step, "loss": 2 / (step + 1)}) + "\n")
                on_stage_end(stage, tiny_model())

    monkeypatch.setattr("tinymodal.train.loop.run", run)
    return runs


def begin(parts, folder, **more):
    return demo(folder, recipe=parts / "demo.toml", starter=str(parts / "starter"), sizes=SIZES, **more)


def check(report: dict, folder: Path) -> None:
    """Every key that the report promises, and the same on disk."""
    assert json.loads((folder / "report.json").read_text()) == report
    assert len(report["kinds"]) >= 10
    for table in (report, report["starter"]):
        for row in table["kinds"].values():
            assert set(row) == {"new", "unseen_pairs", "shuffled", "constant", "n"}
            assert all(row[key] is None or 0 <= row[key] <= 1 for key in row if key != "n")
        assert set(table["mean"]) == {"new", "unseen_pairs", "shuffled", "constant"}
    assert report["kinds"]["number"]["unseen_pairs"] is None
    assert set(report["stages"]) == {"align", "instruct", "instruct_without_align"}
    assert all(0 <= stage["mean_new"] <= 1 for stage in report["stages"].values())
    assert report["stages"]["instruct"]["mean_new"] == report["mean"]["new"]
    for key in ("seconds", "cpu_seconds", "peak_memory_mb"):
        assert report[key] > 0
    assert report["machine"]
    assert report["versions"]["torch"]
    assert "commit" in report
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("<img") > len(report["kinds"])
    assert not re.search(r"https?:", page)


def test_the_report_has_every_number_and_the_page_every_part(parts, untrained, tmp_path, capsys):
    from PIL import Image

    folder = tmp_path / "runs" / "demo"
    report = begin(parts, folder)
    check(report, folder)
    assert untrained == [("demo", ["align", "instruct"]), ("demo-without-align", ["instruct"])]
    assert Image.open(folder / "sample.png").size == (96, 96)
    out = capsys.readouterr().out
    for told in ("unseen pairs", "handwritten", "truth", "instruct without align", "report.html"):
        assert told in out
    assert out.rstrip().endswith(f"tinymodal chat {folder / 'model'} --image {folder / 'sample.png'}")


def test_a_model_that_hears_and_speaks_is_scored_on_that_too(parts, tmp_path, monkeypatch, capsys):
    from tinymodal.compose.build import save
    from tinymodal.compose.tiny import tiny_codec, tiny_model

    tiny_codec(tmp_path / "codec")
    speech = {"codec": str(tmp_path / "codec"), "width": 16, "layers": 1}
    own = tiny_model(audio="tinymodal_ear", speech=speech)
    # What never learned to end goes on to the limit.
    own.model.speech_head.longest = own.model.config.speech["longest"] = 4
    save(own, tmp_path / "starter")
    ears = '[model.audio]\nconfig = { model_type = "tinymodal_ear" }\n'
    mouth = f'[model.speech]\ncodec = "{tmp_path / "codec"}"\nwidth = 16\n'
    speak = """[[stages]]
name = "speak"
train = { speech = 1e-3 }
loss = ["speech"]
steps = 1
data = [{ made = "spoken_answers" }]
"""
    head, stages = (parts / "demo.toml").read_text().split("[[stages]]", 1)
    (tmp_path / "demo.toml").write_text(f"{head}{ears}{mouth}[[stages]]{stages}{speak}")
    trained = []

    def run(recipe, folder, on_stage_end):
        folder.mkdir(parents=True, exist_ok=True)
        trained.append((recipe.model.speech is not None, [stage.name for stage in recipe.stages]))
        for stage in recipe.stages:
            on_stage_end(stage, own)

    monkeypatch.setattr("tinymodal.train.loop.run", run)
    folder = tmp_path / "run"
    report = demo(folder, recipe=tmp_path / "demo.toml", starter=str(tmp_path / "starter"), sizes=SIZES)
    assert trained == [(True, ["align", "instruct", "speak"]), (False, ["instruct"])]
    assert json.loads((folder / "report.json").read_text()) == report
    for table in (report, report["starter"]):
        assert set(table["hear"]) == {"wer_seen_voices", "wer_unseen_voices", "shuffled"}
        assert set(table["spoken_questions"]) == {"mean_new", "mean_written"}
        assert set(table["speak"]) == {"wer", "cer", "first_sound_ms", "real_time_factor"}
    page = (folder / "report.html").read_text()
    # Questions, clips and answers, each with its sound.
    assert page.count("<audio") >= 3 * room.NUM_PLAYED
    assert "Hearing and speaking" in page
    assert "Hearing and speaking" in capsys.readouterr().out
    assert (folder / "sample.ogg").read_bytes().startswith(b"OggS")


def test_the_same_command_does_nothing_twice(parts, untrained, tmp_path, monkeypatch):
    first = begin(parts, tmp_path)
    monkeypatch.setattr(room, "score_all", None)
    monkeypatch.setattr(room, "score_new", None)
    untrained.clear()
    second = begin(parts, tmp_path)
    assert untrained == []
    assert {key: second[key] for key in ("kinds", "mean", "stages", "starter", "test_seed")} == {
        key: first[key] for key in ("kinds", "mean", "stages", "starter", "test_seed")
    }
    assert second["seconds"] >= first["seconds"]


@pytest.mark.parametrize("killed_at", ["align", "instruct", "instruct_without_align", "starter"])
def test_an_interrupted_demo_goes_on_with_the_same_questions(
    parts, untrained, tmp_path, monkeypatch, killed_at
):
    own = Book.keep

    def keep(self, piece, make):
        if piece == killed_at:
            raise KeyboardInterrupt
        own(self, piece, make)

    monkeypatch.setattr(Book, "keep", keep)
    with pytest.raises(KeyboardInterrupt):
        begin(parts, tmp_path, seed=11)
    assert not (tmp_path / "report.json").exists()
    before = {path.name: path.read_bytes() for path in (tmp_path / "scores").glob("*.json")}
    spent = json.loads((tmp_path / "demo.json").read_text())["seconds"]
    monkeypatch.setattr(Book, "keep", own)
    report = begin(parts, tmp_path)
    assert report["test_seed"] == 11
    assert report["seconds"] > spent > 0
    for name, content in before.items():
        assert (tmp_path / "scores" / name).read_bytes() == content


def test_each_new_demo_draws_a_seed_that_nobody_has_seen(recipe, tmp_path):
    seeds = {Book(tmp_path / str(i), recipe, None, SIZES).seed for i in range(5)}
    assert len(seeds) == 5
    assert Book(tmp_path / "0", recipe, None, SIZES).seed in seeds


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: (r.model_copy(update={"seed": 5}), None, SIZES), "seed"),
        (lambda r: (r, 99, SIZES), "99"),
        (lambda r: (r, None, {**SIZES, "per_kind": 3}), "questions"),
    ],
)
def test_a_folder_of_another_demo_is_refused(recipe, tmp_path, change, told):
    Book(tmp_path, recipe, 1, SIZES)
    with pytest.raises(RecipeError, match=f"{tmp_path.name}.*{told}.*--out"):
        Book(tmp_path, *change(recipe))


def test_without_align_only_the_first_stage_is_gone(recipe):
    skipping = without_align(recipe)
    (stage,) = skipping.stages
    assert stage.model_copy(update={"seed": None}) == recipe.stages[1]
    # The same samples in the same order, from the same random weights.
    assert skipping.stage_seed(0) == recipe.stage_seed(1)
    assert skipping.seed == recipe.seed
    assert skipping.model == recipe.model
    with pytest.raises(RecipeError, match="found instruct"):
        without_align(skipping)


def test_a_missing_starter_model_is_told_before_anything_trains(parts, untrained, tmp_path):
    with pytest.raises(TinyModalError, match="nowhere"):
        demo(tmp_path, recipe=parts / "demo.toml", starter="./nowhere", sizes=SIZES)
    assert untrained == []


def test_a_missing_recipe_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(room, "__file__", str(tmp_path / "a" / "b.py"))
    with pytest.raises(RecipeError, match=r"recipes/demo\.toml"):
        demo(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_seconds_of_training_leave_scoring_out(recipe, tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: clock[0])

    def run(recipe, folder, on_stage_end):
        for stage in recipe.stages:
            clock[0] += 30
            on_stage_end(stage, None)

    monkeypatch.setattr("tinymodal.train.loop.run", run)
    book = Book(tmp_path, recipe, 1, SIZES)

    def score(_, piece):
        clock[0] += 7
        book.keep(piece, dict)

    with book.measured():
        room.train(recipe, tmp_path, book, {"align": "align", "instruct": "instruct"}, score)
    assert book.training() == {"demo": 60.0}
    assert book.spent()["seconds"] == 74.0


@pytest.mark.slow
def test_a_real_demo_survives_a_kill_and_its_model_answers(parts, tmp_path):
    """Trains for real, is killed in the middle of the second stage, goes on; the model it leaves talks."""
    script = tmp_path / "script.py"
    names = {"root": ROOT, "recipe": parts / "demo.toml", "starter": parts / "starter"}
    script.write_text(SCRIPT.format(**{name: str(path) for name, path in names.items()}, sizes=SIZES))

    def start(how: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(script), how]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)

    assert start("kill").returncode == 9
    folder = tmp_path / "out"
    assert (folder / "scores" / "align.json").exists()
    assert not (folder / "report.json").exists()
    align = (folder / "scores" / "align.json").read_bytes()
    done = start("go on")
    assert done.returncode == 0, done.stderr
    assert (folder / "scores" / "align.json").read_bytes() == align
    check(json.loads((folder / "report.json").read_text()), folder)

    from tinymodal.compose.build import load as load_model
    from tinymodal.core.types import Image, Message, Sample, Text
    from tinymodal.infer.engine import Engine

    question = Sample((Message("user", (Image(folder / "sample.png"), Text("what"))),), "test")
    assert Engine(load_model(folder / "model")).reply([question])[0].tokens_in > 9
