"""The recipes of models that hear load, say what they are, and run at toy size; the page says what is so."""

from __future__ import annotations

import json
import re

import pytest

from tinymodal.core.config import load
from tinymodal.train.recipe import Recipe

from .test_recipes import LARGE, PUBLISHED, ROOT

FOLDER = ROOT / "recipes"
PATHS = sorted(
    [FOLDER / f"{name}.toml" for name in LARGE]
    + [path for path in (FOLDER / "published").glob("*.toml") if path not in PUBLISHED]
)
PAGE = ROOT / "docs" / "hearing.md"
each_recipe = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def test_there_are_the_six():
    assert {path.stem for path in PATHS} == LARGE | {
        "siglip-whisper-smollm",
        "tinyllava-wav2vec2",
        "whisper-qwen",
    }


@each_recipe
def test_a_recipe_of_ears_loads_strictly_and_says_how_to_run_it(path):
    recipe, text = load(path, Recipe), path.read_text()
    where = path.relative_to(ROOT)
    assert recipe.name == path.stem
    assert f"#   tinymodal train {where}\n" in text
    assert re.search(rf"#   tinymodal train {where} --tiny\b", text)
    assert re.search(r"^# Data: ", text, re.M)
    if path.parent.name == "published":
        assert re.search(r"^# Published: ", text, re.M)
    lines = text.splitlines()
    assert len(lines) <= 90, "it is read on one screen"
    assert max(map(len, lines)) <= 132
    assert recipe.precision == "bfloat16"
    assert f"](../{where})" in PAGE.read_text()


@each_recipe
def test_a_row_holds_a_full_window_and_every_stage_that_plays_sounds_has_a_budget_of_frames(path):
    for stage in load(path, Recipe).stages:
        plays = any(source.format in ("asr", "audio_qa", "audio_caption", "spoken") for source in stage.data)
        assert not plays or stage.frames >= 1_500
        assert stage.seq_len > 375 + 100


@each_recipe
def test_steps_follow_from_the_samples_that_a_comment_counts(path):
    """As in the published recipes: ``281,241 utterances / 128 a step``."""
    text = path.read_text()
    found = re.findall(r"^steps = ([\d_]+) +# ([\d,]+) [\w ]+ / (\d+) a step", text, re.M)
    batches = re.findall(
        r"^batch_tokens = ([\d_]+) +# (\d+) x ([\d,]+) tokens.*, rows (\d+) % full$", text, re.M
    )
    for steps, samples, per_step in found:
        assert int(steps) == -(-int(samples.replace(",", "")) // int(per_step))
    for tokens, batch, mean, full in batches:
        held = int(tokens) * int(full) / 100 / int(mean.replace(",", ""))
        assert held == pytest.approx(int(batch), rel=0.05), "samples that a step holds"


@each_recipe
def test_a_recipe_of_ears_composes_and_takes_two_steps_a_stage_at_toy_size(path, tmp_path):
    from tinymodal.compose.build import parameter_report
    from tinymodal.train.loop import run
    from tinymodal.train.shrink import shrink_recipe

    recipe = load(path, Recipe)
    if any(stage.lora for stage in recipe.stages):
        pytest.importorskip("peft", reason="adapters need it")
    small, _ = shrink_recipe(recipe, tmp_path / "toy", path.parent)
    composed = run(small, tmp_path / "run", progress=False)
    report = parameter_report(composed.model)
    assert all(part.parameters < 1_000_000 for part in report)
    assert "audio" in composed.model.model.towers
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2 * len(recipe.stages)
    assert any("loss/audio" in line for line in steps), "sounds were heard"
    assert not (tmp_path / "run" / "skipped.jsonl").exists(), "every made sample fits into a row"


def test_the_page_counts_positions_and_tokens_as_the_processor_does():
    from transformers import WhisperConfig

    from tinymodal.model.audio_processing import TinyModalAudioProcessor

    ear = TinyModalAudioProcessor(None, WhisperConfig(), "stack_frames", {"factor": 4})
    rows = re.findall(r"^\| ([\d.]+) s \| ([\d,+ ]+) \| ([\d,+ ]+) \|$", PAGE.read_text(), re.M)
    assert len(rows) == 4

    def numbers(cell: str) -> list[int]:
        return [int(number.replace(",", "")) for number in cell.split(" + ")]

    for seconds, positions, tokens in rows:
        layout = ear.layout(round(float(seconds) * 16_000))
        assert [grid[0] for grid in layout.feature_grids] == numbers(positions)
        assert list(layout.tile_tokens) == numbers(tokens)
    assert ear.tokens_per_s == 12.5


def test_the_page_says_what_the_reader_believes():
    from tinymodal.model import sound

    page = PAGE.read_text()
    assert f"{sound.MIN_RATE_HZ // 1000} kHz to {sound.MAX_RATE_HZ // 1000} kHz" in page
    assert f"1 to {sound.MAX_CHANNELS} channels" in page
