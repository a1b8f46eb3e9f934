"""The recipes that lie in the repository: they load, what they name is there, and they train."""

import re
from pathlib import Path

import pytest

from tinymodal.core.config import load
from tinymodal.train.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
LARGE = {"asr-align", "audio-instruct", "omni-instruct"}
"""Recipes of parts and data from elsewhere; ``tests/test_hearing_recipes.py`` has them at toy size."""
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.toml") if path.stem not in LARGE)
STARTER = ROOT / "tinymodal" / "starter"
USERS = {"own-data"}
"""Recipes whose data the user brings."""


MADE = {
    "runs/starter-vision/parts/vision": "starter/vision",
    "runs/starter-language/parts/language": "starter/language",
    "runs/starter-audio/parts/audio": "starter/audio",
    "runs/starter-codec/codec": "starter/codec",
    "runs/starter/model": "starter",
}
"""What recipes make for other ones, and the shipped part that takes its place here."""
READS = "runs/starter-language/model"
"""Of what recipes make that which nothing shipped is like: it reads written scenes."""


def stand_in(folder: Path) -> dict[str, str]:
    """Starter parts and a starter model with random weights and the right shapes: name -> folder.

    They show that a recipe runs and a command works, where the trained parts are not in the checkout.
    """
    from tinymodal.compose import build
    from tinymodal.compose.spec import AudioSpec, LanguageSpec, ModelSpec, SpeechSpec, VisionSpec
    from tinymodal.compose.tiny import tiny_codec

    sees = load(ROOT / "recipes" / "starter-vision.toml", Recipe).model.vision
    words = load(ROOT / "recipes" / "starter-language.toml", Recipe).model.language
    demo = load(ROOT / "recipes" / "demo.toml", Recipe).model
    vision = demo.vision.model_copy(update={"path": None, "config": sees.config})
    language = LanguageSpec(
        config=words.config, tokenizer=str(STARTER / "tokenizer"), template=words.template
    )
    tiny_codec(folder / "codec")
    whole = ModelSpec(
        vision=VisionSpec(**vision.model_dump(exclude_none=True)),
        language=language,
        audio=AudioSpec(
            config={"model_type": "tinymodal_ear"},
            connector=demo.audio.connector,
            options=demo.audio.options,
        ),
        speech=SpeechSpec(codec=str(folder / "codec"), width=demo.speech.width),
    )
    composed = build.build(whole)
    build.save(composed, folder / "model")
    reads = load(
        ROOT / "recipes" / "starter-language.toml",
        Recipe,
        [f"model.language.tokenizer={STARTER / 'tokenizer'}"],
    )
    build.save(build.build(reads.model), folder / "reads")
    build.save_part(composed.model, "language", folder / "language", composed.tokenizer)
    model = str(folder / "model")
    return {
        **dict.fromkeys(("starter", "starter/vision", "starter/audio", "starter/speech"), model),
        "starter/codec": str(folder / "codec"),
        "starter/language": str(folder / "language"),
        READS: str(folder / "reads"),
    }


def shipped(name: str) -> bool:
    """Whether the trained part is in this checkout."""
    from tinymodal.compose.pretrained import SHIPPED

    return name in SHIPPED and (STARTER.parent / SHIPPED[name] / "config.json").is_file()


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
    from tinymodal.data.scenes import TARGET_HEADS
    from tinymodal.data.sounds import MADE

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
    parts = (model.vision, model.audio, model.language, model.speech)
    named = [model.path] + [part.path for part in parts if part is not None]
    named.append(model.language.tokenizer if model.language else None)
    named.append(model.speech.codec if model.speech else None)
    for name in filter(None, named):
        assert name in SHIPPED or name in (*MADE, READS), (
            f"{name} does not ship; a recipe here runs without a hub"
        )


def test_every_recipe_has_its_line_in_the_docs():
    page = (ROOT / "docs" / "recipes.md").read_text()
    for path in (ROOT / "recipes").glob("*.toml"):
        assert f"(../recipes/{path.name})" in page


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_trains(path, tmp_path, monkeypatch):
    """Two steps of one row in every stage, from random parts where the trained ones are not here."""
    pytest.importorskip("sklearn")
    from tinymodal.compose import pretrained
    from tinymodal.train.loop import run

    monkeypatch.chdir(ROOT)
    made = stand_in(tmp_path / "stand-in")
    there = {name: place for name, place in made.items() if not shipped(name)}
    for name, place in there.items():
        monkeypatch.setitem(pretrained.SHIPPED, name, place)
    for name, instead in MADE.items():
        monkeypatch.setitem(pretrained.SHIPPED, name, pretrained.SHIPPED[instead])
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


# Published systems

PUBLISHED = sorted((ROOT / "recipes" / "published").glob("tinymodal-*.toml"))
FAST = {
    "base-siglip-phi2",
    "base-siglip-openelm",
    "base-mof-tinyllama",
    "share-siglip-gemma",
    "lora-siglip-stablelm2",
    "qlora-siglip-qwen2.5-0.5b",
    "llava1.6-clip-vicuna-7b",
    "omnilmm-eva02-zephyr-7b",
    "minicpmvlora-siglip-qwen2-7b",
    "tinygptv-blip2-phi2",
    "tinygptv448-blip2-phi2",
}
"""One of each kind; the others run in the slow ring."""
RATES = {
    "base": [{"connectors": 1e-3}, {"connectors": 2e-5, "language": 2e-5}],
    "share": [
        {"connectors": 1e-3},
        {"vision": 2e-5, "connectors": 2e-5, "language": 2e-5},
        {"connectors": 2e-5, "language": 2e-5},
    ],
    "lora": [{"connectors": 1e-3}, {"connectors": 2e-4, "adapters": 2e-4}],
    "qlora": [{"connectors": 1e-3}, {"connectors": 2e-4, "adapters": 2e-4}],
    "llava1.5": [{"connectors": 1e-3}, {"connectors": 2e-5, "language": 2e-5}],
    "llava1.5lora": [{"connectors": 1e-3}, {"connectors": 2e-5, "adapters": 2e-4}],
    "llava1.6": [{"connectors": 1e-3}, {"vision": 2e-6, "connectors": 2e-5, "language": 2e-5}],
    "omnilmm": [{"connectors": 1e-3}, {"connectors": 2e-5, "language": 2e-5}],
    "minicpmv": [{"connectors": 1e-3}, {"vision": 1e-6, "connectors": 1e-6}],
    "minicpmvlora": [
        {"connectors": 1e-3},
        {"vision": 1e-6, "connectors": 1e-6, "embeddings": 1e-6, "adapters": 1e-6},
    ],
    "tinygptv": [
        {"connectors": 1e-4, "language": 1e-4},
        {"connectors": 1e-4, "language": 1e-4, "adapters": 1e-4},
        {"connectors": 3e-5, "language": 3e-5, "adapters": 3e-5},
    ],
    "tinygptv448": [{"connectors": 1e-5, "language": 1e-5, "adapters": 1e-5}],
}
"""Published peak rates, stage by stage."""
RANKS = {
    "lora": (128, 256),
    "qlora": (128, 256),
    "llava1.5lora": (128, 256),
    "minicpmvlora": (64, 64),
    "tinygptv": (64, 16),
    "tinygptv448": (64, 16),
}
"""Published rank and alpha."""


def named(path: Path) -> list[str]:
    """Recipe, vision and language of ``tinymodal-{recipe}-{vision}-{language}``."""
    return path.stem.split("-", 3)[1:]


def test_there_is_a_recipe_for_each_published_run():
    kinds = {tuple(named(path)[::2]) for path in PUBLISHED}
    languages = {named(path)[2] for path in PUBLISHED if named(path)[0] == "base"}
    assert len(languages) == 9
    assert {
        (kind, language) for kind in ("base", "share", "lora", "qlora") for language in languages
    } <= kinds
    assert {kind for kind, _ in kinds} == set(RATES)
    assert {path.stem.removeprefix("tinymodal-") for path in PUBLISHED} >= FAST
    assert ("llava1.5", "vicuna-13b") in kinds
    assert ("llava1.5lora", "vicuna-7b") in kinds


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_a_published_recipe_is_called_by_the_rule_and_says_what_it_is(path):
    recipe, text = load(path, Recipe), path.read_text()
    _, vision, language = named(path)
    assert recipe.name == path.stem
    assert f"#   tinymodal train recipes/published/{path.name}\n" in text
    assert re.search(r"^# Data: ", text, re.M)
    assert re.search(r"^# .*Published: ", text, re.M)
    lines = text.splitlines()
    assert len(lines) <= 90, "it is read on one screen"
    assert max(map(len, lines)) <= 132

    def plain(words: str) -> str:
        return re.sub(r"[^a-z0-9]", "", words.lower())

    assert plain(language) in plain(recipe.model.language.path)
    tower = recipe.model.vision.path
    assert (len(tower) == 2) if vision == "mof" else vision in tower
    assert recipe.precision == "bfloat16"


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_steps_and_batch_follow_from_the_published_samples(path):
    """As their comments have it: ``558,128 captions / 256 a step``; ``256 x 749 tokens, rows 73 % full``."""
    from tinymodal.compose.shrink import picture_tokens

    recipe, text = load(path, Recipe), path.read_text()
    steps = re.findall(r"^steps = \S+ +# ([\d,]+) \w+ / (\d+) a step", text, re.M)
    batches = re.findall(r"^batch_tokens = \S+ +# (\d+) x ([\d,]+) tokens, rows (\d+) % full$", text, re.M)
    assert len(steps) == len(batches) == len(recipe.stages)
    picture = picture_tokens(recipe.model.vision)
    for stage, (samples, per_step), (batch, mean, full) in zip(recipe.stages, steps, batches, strict=True):
        assert stage.steps == -(-int(samples.replace(",", "")) // int(per_step))
        assert batch == per_step
        mean_tokens = int(mean.replace(",", ""))
        assert picture < mean_tokens < stage.seq_len
        held = stage.batch_tokens * int(full) / 100 / mean_tokens
        assert held == pytest.approx(int(batch), rel=0.05), "samples that a step holds"


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_a_published_recipe_has_the_published_rates(path):
    recipe, kind = load(path, Recipe), named(path)[0]
    assert [stage.train for stage in recipe.stages] == RATES[kind]
    adapted = [(s.lora.rank, s.lora.alpha) for s in recipe.stages if s.lora is not None]
    assert set(adapted) == ({RANKS[kind]} if kind in RANKS else set())
    assert {stage.bits for stage in recipe.stages if stage.lora} <= {8 if kind == "qlora" else None}
    for stage in recipe.stages:
        assert stage.floor < 1, "no rate rises to its end"
        if "vision" in stage.train and kind == "share":
            assert stage.only == {"vision": "from layer 12"}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_a_published_recipe_resolves_at_toy_size(path, tmp_path):
    """Names, template, context and sizes fit together; nothing is composed yet."""
    from tinymodal.train.shrink import shrink_recipe

    small, toy = shrink_recipe(load(path, Recipe), tmp_path, path.parent)
    assert small.model.vision.connector == load(path, Recipe).model.vision.connector
    assert toy.edge_px


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            p, id=p.stem, marks=[] if p.stem.removeprefix("tinymodal-") in FAST else pytest.mark.slow
        )
        for p in PUBLISHED
    ],
)
def test_a_published_recipe_composes_and_takes_two_steps_a_stage(path, tmp_path):
    from tinymodal.compose.build import parameter_report
    from tinymodal.train.loop import run
    from tinymodal.train.shrink import shrink_recipe

    recipe = load(path, Recipe)
    if any(stage.bits for stage in recipe.stages):
        pytest.importorskip("bitsandbytes", reason="bits need it")
    if any(stage.lora for stage in recipe.stages):
        pytest.importorskip("peft", reason="adapters need it")
    if named(path)[1] == "eva02":
        pytest.importorskip("timm", reason="the tower is timm's")
    small, _ = shrink_recipe(recipe, tmp_path / "toy", path.parent)
    # 0.9 to 2 s of one core, of which the steps take a third.
    composed = run(small, tmp_path / "run", progress=False)
    assert all(part.parameters < 1_000_000 for part in parameter_report(composed.model))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len(recipe.stages)
    assert not (tmp_path / "run" / "skipped.jsonl").exists(), "every made sample fits into a row"


def test_the_page_of_published_recipes_says_what_they_say():
    """``python docs/fill_published.py`` writes it."""
    from .test_readme import script

    pages = script("fill_published")
    text = pages.page()
    assert pages.PAGE.read_text() == text, "stale; run python docs/fill_published.py"
    for path in PUBLISHED:
        assert f"(../recipes/published/{path.name})" in text
