"""A whole tiny model, and recipes and batches to train it with."""

from __future__ import annotations

import pytest

from tinymodal.compose import build
from tinymodal.compose.tiny import tiny_model
from tinymodal.data.loader import Loader
from tinymodal.train.recipe import Recipe, Stage

from . import talk
from .talk import WORDS, Talk


@pytest.fixture
def tiny():
    """A new tiny model; a test may train it."""
    return tiny_model(words=WORDS)


@pytest.fixture
def batches():
    """``batches(composed, 3)``: three batches of two rows of 64 positions."""

    def draw(composed, count, rows=2, seq_len=64, **options):
        tokenizer = composed.tokenizer
        loader = Loader(
            [Talk(**options)],
            composed.encoder,
            seq_len=seq_len,
            batch_tokens=rows * seq_len,
            pad_id=tokenizer.pad_token_id,
            image_token_id=composed.model.config.image_token_id,
        )
        return [next(loader) for _ in range(count)]

    return draw


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Folder of a tiny model to begin with."""
    folder = tmp_path_factory.mktemp("start") / "model"
    build.save(tiny_model(words=WORDS), folder)
    return folder


@pytest.fixture
def recipe(start):
    """``recipe(steps=4, ...)``: one stage that trains everything; keys of the stage by name."""

    def make(*stages, **changes):
        of_run = {key: changes.pop(key) for key in Recipe.model_fields if key in changes}
        plain = {
            "name": "only",
            "train": {"vision": 1e-3, "connectors": 1e-3, "language": 1e-3},
            "steps": 4,
            "seq_len": 64,
            "batch_tokens": 128,
            "data": [{"made": f"{talk.__file__}:Talk"}],
        }
        given = [plain | changes | stage for stage in (stages or ({},))]
        return Recipe.model_validate(
            {"name": "test", "model": {"path": str(start)}, "stages": given} | of_run
        )

    return make


@pytest.fixture
def stage(recipe) -> Stage:
    return recipe().stages[0]
