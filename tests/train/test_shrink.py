"""A recipe at toy size: what it keeps, what it makes, what it refuses, and what the command says."""

import json
from pathlib import Path

import pytest

from tinymodal.cli import main
from tinymodal.core.config import dump, load
from tinymodal.core.errors import RecipeError
from tinymodal.data.sources import open_source
from tinymodal.train.loop import run
from tinymodal.train.recipe import Recipe
from tinymodal.train.shrink import ROWS, SHAPES, STEPS, shrink_recipe

RECIPE = """
name = "mine"
save_every = 100
parts = { language = "runs/mine/parts/language" }
[model.vision]
path = "openai/clip-vit-large-patch14-336"
resize = "pad"
[model.language]
path = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
template = "vicuna_v1"
[[stages]]
name = "align"
train = { connectors = 1e-3 }
template = "plain"
steps = 2_181
seq_len = 2048
batch_tokens = 16_384
schedule = "constant"
workers = 8
data = [
  { path = "data/laion/*.parquet", format = "caption", weight = 115 },
  { path = "data/cc/*.parquet", format = "caption", weight = 14 },
]
[[stages]]
name = "instruct"
train = { vision = 2e-6, connectors = 2e-5, adapters = 2e-4 }
only = { vision = "from layer 12" }
lora = { rank = 128, alpha = 256 }
steps = 5_198
seq_len = 2048
batch_tokens = 16_384
micro_batch_tokens = 4096
patches = 3000
floor = 0.0
recompute = true
bad_rows = "skip"
data = [{ path = "data/mix.json", format = "llava", images = "data" }]
"""


@pytest.fixture
def written(tmp_path):
    (tmp_path / "mine.toml").write_text(RECIPE)
    return tmp_path / "mine.toml"


def test_a_stage_keeps_what_it_trains_and_is_short(written, tmp_path):
    small, _ = shrink_recipe(load(written, Recipe), tmp_path / "toy")
    real = load(written, Recipe)
    for stage, was in zip(small.stages, real.stages, strict=True):
        assert stage.steps == STEPS
        for key in ("name", "train", "template", "schedule", "warmup", "floor", "betas", "recompute", "bits"):
            assert getattr(stage, key) == getattr(was, key), key
        assert [source.weight for source in stage.data] == [source.weight for source in was.data]
        assert (stage.seq_len < 200, stage.workers) == (True, 0)
    align, instruct = small.stages
    assert align.micro_batch_tokens is None
    assert instruct.batch_tokens == ROWS * instruct.micro_batch_tokens == ROWS * instruct.seq_len
    assert instruct.only == {"vision": "from layer 1"}, "of 23 blocks the last half, of 2 the last"
    assert instruct.lora.alpha / instruct.lora.rank == 2
    assert small.parts == {"language": str(tmp_path / "toy" / "parts" / "language")}
    assert small.name == "mine-tiny"


def test_a_toy_recipe_is_one_that_can_be_written_and_read(written, tmp_path):
    small, _ = shrink_recipe(load(written, Recipe), tmp_path / "toy")
    (tmp_path / "small.toml").write_text(dump(small))
    assert load(tmp_path / "small.toml", Recipe) == small


def test_made_data_has_pictures_of_many_shapes_and_a_row_without(tmp_path, written):
    shrink_recipe(load(written, Recipe), tmp_path / "toy")
    chats = open_source(str(tmp_path / "toy" / "chats.jsonl"), "messages")
    samples = [chats.sample(i) for i in range(len(SHAPES))]
    assert [len(list(sample.media())) for sample in samples] == [0, 1, 1, 1, 1, 1]
    assert {len(sample.messages) for sample in samples} == {2, 4}
    captions = open_source(str(tmp_path / "toy" / "captions.jsonl"), "caption")
    sizes = set()
    for i in range(len(SHAPES)):
        (picture,) = captions.sample(i).media()
        from PIL import Image

        sizes.add(Image.open(picture.source).size)
    assert sizes == {(columns * 24, rows * 24) for rows, columns in SHAPES}


def test_what_the_real_run_would_refuse_is_refused(written, tmp_path):
    for change, says in {
        "stages.align.seq_len=4096": "stages.align.seq_len is 4096, but .* at most 2048 positions",
        'stages.instruct.only={ vision = "from layer 23" }': (
            "stages.instruct: only.vision: 'from layer 23', but the part runs 23 blocks, 0 to 22"
        ),
        "stages.align.seq_len=512": "stages.align.seq_len is 512, but a picture takes 576 tokens",
        "stages.align.template=chatm": "did you mean 'chatml'",
        "model.vision.connector=pixel_shufle": "did you mean 'pixel_shuffle'",
        "model.vision.options={ rato = 2 }": "unknown option 'rato'",
    }.items():
        with pytest.raises(RecipeError, match=says):
            shrink_recipe(load(written, Recipe, [change]), tmp_path / "toy")


def test_a_stage_with_the_cells_loss_keeps_its_made_data_and_trains(tmp_path):
    pytest.importorskip("sklearn")
    recipe = load(Path(__file__).resolve().parents[2] / "recipes" / "starter-vision.toml", Recipe)
    small, _ = shrink_recipe(recipe, tmp_path / "toy")
    assert small.stages[0].data == recipe.stages[0].data
    run(small, tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_part_that_another_recipe_of_the_folder_makes_is_as_that_one_says(written, tmp_path):
    second = RECIPE.replace('name = "mine"', 'name = "second"').replace(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "X"
    )
    (tmp_path / "second.toml").write_text(second.replace('"X"', '"runs/mine/parts/language"'))
    small, toy = shrink_recipe(load(tmp_path / "second.toml", Recipe), tmp_path / "toy", tmp_path)
    assert small.model.language.config["model_type"] == "llama"
    assert toy.blocks["language"] == (22, 2)
    with pytest.raises(RecipeError, match="does not know what 'runs/mine/parts/language' is"):
        shrink_recipe(load(tmp_path / "second.toml", Recipe), tmp_path / "toy")


def test_train_tiny_says_what_it_did_and_keeps_nothing(written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "mine.toml", "--tiny"]) == 0
    out, err = capsys.readouterr()
    assert "All 2 stages run. Nothing real was trained. Nothing is kept." in out
    assert "nothing real is trained" in err
    assert "vision: openai/clip-vit-large-patch14-336, a clip_vision_model of 24 blocks, here of 3" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.toml"]

    assert main(["train", "mine.toml", "stages.align.train.connectors=1e-4", "--tiny", "--out", "kept"]) == 0
    assert "The toy model is in kept/model" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "kept" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("align", 1), ("align", 2), ("instruct", 1), ("instruct", 2)
    ]  # fmt: skip
    assert lines[0]["lr"] == 1e-4
    assert all(line["targets"] > 0 for line in lines)


def test_preview_tiny_shows_a_row_of_each_stage(written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["preview", "mine.toml", "--tiny"]) == 0
    out, _ = capsys.readouterr()
    assert out.count("[image: 6x6 -> 36 tokens]") >= 2
    assert "What colour is it? ASSISTANT:« " in out


NEW = """
name = "new"

[model]
language = { path = "Qwen/Qwen2.5-0.5B", template = "chatml" }
vision = { path = "google/siglip-base-patch16-224", connector = "linear" }

[[stages]]
name = "prefer"
train = { connectors = 1e-4 }
loss = ["dpo"]
steps = 100
cache = true
data = [{ path = "pairs.jsonl", format = "preference" }]

[[stages]]
name = "imitate"
train = { connectors = 1e-4 }
loss = ["text", "distill"]
teacher = { path = "some/teacher", top_k = 64, cached = true }
ends = "drop"
data = [{ hub = "org/set", format = "messages", epochs = 2 }]
held_out = [{ path = "held.jsonl", format = "messages" }]
"""


def test_preferences_teachers_ends_and_held_out_samples_run_at_toy_size_too(tmp_path):
    from tinymodal.train.loop import run

    (tmp_path / "new.toml").write_text(NEW)
    small, _ = shrink_recipe(load(tmp_path / "new.toml", Recipe), tmp_path / "toy")
    run(small, tmp_path / "run", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows if "loss" in row] == ["prefer"] * STEPS + ["imitate"] * STEPS
    assert "held_out" in rows[-1]
