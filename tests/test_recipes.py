"""The recipes that lie in the repository: they load, what they name is there, and they train."""

import re
from pathlib import Path

import pytest

from tinymodal.core.config import load
from tinymodal.train.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
STARTER = ROOT / "tinymodal" / "starter"
USERS = {"own-data"}
"""Recipes whose data the user brings."""


def stand_in(folder: Path) -> dict[str, str]:
    """Starter parts and a starter model with random weights and the right shapes: name -> folder.

    They show that a recipe runs and a command works, where the trained parts are not in the checkout.
    """
    from tinymodal.compose import build
    from tinymodal.compose.spec import LanguageSpec, ModelSpec, VisionSpec

    sees = load(ROOT / "recipes" / "starter-vision.toml", Recipe).model.vision
    speaks = load(ROOT / "recipes" / "starter-language.toml", Recipe).model.language
    demo = load(ROOT / "recipes" / "demo.toml", Recipe).model.vision
    vision = VisionSpec(
        config=sees.config,
        connector=demo.connector,
        options=demo.options,
        feature_layer=demo.feature_layer,
    )
    language = LanguageSpec(
        config=speaks.config, tokenizer=str(STARTER / "tokenizer"), template=speaks.template
    )
    composed = build.build(ModelSpec(vision=vision, language=language))
    places = {
        "starter": folder / "model",
        "starter/vision": folder / "vision",
        "starter/language": folder / "language",
    }
    build.save(composed, places["starter"])
    build.save_part(composed.model, "vision", places["starter/vision"])
    build.save_part(composed.model, "language", places["starter/language"], composed.tokenizer)
    return {name: str(place) for name, place in places.items()}


def shipped(name: str) -> bool:
    """Whether the trained part is in this checkout."""
    return (STARTER / (name.partition("/")[2] or "model") / "config.json").is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_loads_strictly_and_is_called_as_its_file(path):
    recipe = load(path, Recipe)
    assert recipe.name == path.stem
    told = re.findall(r"recipes/[\w-]+\.toml|make demo", path.read_text())
    assert f"recipes/{path.name}" in told or "make demo" in told, "the head of a recipe says how to run it"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_what_a_recipe_trains_on_is_there_or_can_be_made(path):
    pytest.importorskip("sklearn")
    from tinymodal.core.types import Sample
    from tinymodal.data.synthetic import MADE, TARGET_HEADS

    for stage in load(path, Recipe).stages:
        for source in stage.data:
            if source.made is not None:
                assert isinstance(MADE[source.made](**source.options).sample(0), Sample)
            elif path.stem in USERS:
                assert source.path.startswith("my-data/")
            else:
                assert list(ROOT.glob(source.path)), source.path
        if "cells" in stage.loss:
            assert stage.cell_classes == TARGET_HEADS


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_parts_a_recipe_names_are_shipped_or_made_by_another(path):
    from tinymodal.compose.pretrained import SHIPPED

    model = load(path, Recipe).model
    named = [model.path] + [p.path for p in (model.vision, model.language) if p is not None]
    named.append(model.language.tokenizer if model.language else None)
    for name in filter(None, named):
        assert name in SHIPPED, f"{name} is nothing that ships; a recipe here runs without a hub"


def test_every_recipe_has_its_line_in_the_docs():
    page = (ROOT / "docs" / "recipes.md").read_text()
    for path in RECIPES:
        assert f"(../recipes/{path.name})" in page


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_trains(path, tmp_path, monkeypatch):
    """Two steps of one row in every stage, from random parts where the trained ones are not here."""
    pytest.importorskip("sklearn")
    from tinymodal.compose import pretrained
    from tinymodal.train.loop import run

    monkeypatch.chdir(ROOT)
    for name, place in stand_in(tmp_path / "stand-in").items():
        if not shipped(name):
            monkeypatch.setitem(pretrained.SHIPPED, name, place)
    recipe = load(path, Recipe)
    changes = ["threads=1"]
    for i, stage in enumerate(recipe.stages):
        changes += [f"stages.{i}.steps=2", f"stages.{i}.batch_tokens={stage.seq_len}"]
    changes += [f"parts.{part}={tmp_path / part}" for part in recipe.parts]
    if path.stem in USERS:
        write_my_data(tmp_path)
        changes += [
            f"stages.0.data.0.path={tmp_path}/my-data/chats.json",
            f"stages.0.data.0.images={tmp_path}/my-data/images",
        ]
    out = tmp_path / "run"
    run(load(path, Recipe, changes), out, progress=False)
    assert (out / "model" / "model.safetensors").is_file()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2 * len(recipe.stages)
    assert all((tmp_path / part / "model.safetensors").is_file() for part in recipe.parts)


def write_my_data(folder: Path) -> None:
    """The rows that README.md shows, with pictures for them."""
    from PIL import Image

    from .test_readme import README, files

    for name, text in files(README).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "my-data" / "images").mkdir()
    for name, colour in (("cat", "grey"), ("bus", "red")):
        Image.new("RGB", (120, 90), colour).save(folder / "my-data" / "images" / f"{name}.jpg")
