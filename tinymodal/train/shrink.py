"""A recipe at toy size, to see that it runs: ``--tiny``.

Parts are shrunk by ``compose/shrink.py``. Stages keep what they train, their rates and schedules, adapters,
bits, templates and mixtures; they take two steps on made pictures with conversations. Nothing is learned.
What the real run would refuse before its first step (parts that do not fit, a group without parameters, rows
longer than the language model's context, a template that does not suit) is refused here as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinymodal.chat.encode import Encoder
from tinymodal.compose import build
from tinymodal.compose.build import add_tokens
from tinymodal.compose.pretrained import read_tokenizer
from tinymodal.compose.shrink import Toy, image_processor, scaled, shrink, template_of
from tinymodal.compose.spec import LanguageSpec, ModelSpec, VisionSpec
from tinymodal.core.config import load
from tinymodal.core.errors import RecipeError
from tinymodal.data.sources import open_source
from tinymodal.model.processing_tinymodal import TinyModalImageProcessor, TinyModalProcessor
from tinymodal.train.recipe import Lora, Recipe, Source, Stage, read_choice
from tinymodal.train.stage_data import open_data

STEPS = 2
"""Of each stage."""
RANK = 8
"""Of adapters, at most."""
ROWS = 2
"""Of a batch."""
SHAPES = ((1, 1), (1, 2), (2, 1), (3, 3), (1, 3), (2, 2))
"""Heights and widths of the made pictures, in tiles: with these every strategy cuts some of them."""
COLOURS = ("red", "green", "blue", "yellow", "white", "black")


def shrink_recipe(recipe: Recipe, folder: Path, beside: Path | None = None) -> tuple[Recipe, Toy]:
    """The same recipe at toy size.

    Args:
        recipe: of any size.
        folder: where its toy tokenizer and data are written; parts that it saves go there, too.
        beside: the recipe's own folder. A part that another recipe in it makes is made as that one says.

    Returns:
        A recipe that trains in seconds, and what stands for what.

    Raises:
        RecipeError: nobody here knows a part, or the real run would be refused.
        CheckpointError: a folder holds something else than its key says.
    """
    templates = [stage.template for stage in recipe.stages if stage.template is not None]
    toy = shrink(recipe.model, folder, templates, lambda name: _made(name, beside, recipe.name))
    _write_data(folder, toy.edge_px)
    encoder = _encoder(toy)
    if any(stage.teacher for stage in recipe.stages):
        # Another one of the toy's kind: it reads what the student reads.
        build.save(build.build(toy.spec, seed=1), folder / "teacher")
    stages = tuple(_stage(stage, toy, folder, encoder) for stage in recipe.stages)
    changes: dict[str, Any] = {
        "name": f"{recipe.name}-tiny",
        "model": toy.spec,
        "stages": stages,
        "save_every": 0,
        "parts": {part: str(folder / "parts" / part) for part in recipe.parts},
        "trackers": (),
        "cache_folder": str(folder / "features"),
    }
    return Recipe.model_validate(recipe.model_copy(update=changes).model_dump()), toy


def _made(name: str, beside: Path | None, own: str) -> LanguageSpec | VisionSpec | ModelSpec | None:
    """The part or model that a recipe of a folder will put into ``name``."""
    for file in [] if beside is None else sorted(beside.glob("*.toml")):
        try:
            recipe = load(file, Recipe)
        except RecipeError:
            continue
        if recipe.name == own:
            continue
        if name in (f"runs/{recipe.name}", f"runs/{recipe.name}/model"):
            return recipe.model
        for part, where in recipe.parts.items():
            if where == name:
                return recipe.model.vision if part == "vision" else recipe.model.language
    return None


def _stage(stage: Stage, toy: Toy, folder: Path, encoder: Encoder) -> Stage:
    if toy.positions is not None and stage.seq_len > toy.positions:
        raise RecipeError(
            f"stages.{stage.name}.seq_len is {stage.seq_len}, but the language model reads at most "
            f"{toy.positions} positions; take {toy.positions} or less."
        )
    least, most = toy.tokens
    if least > stage.seq_len:
        counts = f"{least:,} tokens" if least == most else f"{least:,} to {most:,} tokens"
        raise RecipeError(
            f"stages.{stage.name}.seq_len is {stage.seq_len}, but a picture takes {counts} and never fits "
            f"a row; take more than {least}, or a connector that folds more"
        )
    template = template_of(stage.template) if stage.template else encoder.template
    captions = bool(getattr(template, "captions_only", False))
    if "cells" in stage.loss:
        # Made already, with what each cell shows.
        data = tuple(source.model_copy(update={"epochs": 1}) for source in stage.data)
        held_out = stage.held_out
        rows = open_data(data[0], f"stages.{stage.name}.data[0]")
    else:
        toys = ("captions.jsonl", "caption") if captions else ("chats.jsonl", "messages")
        if "dpo" in stage.loss:
            toys = ("pairs.jsonl", "preference")
        file, form = folder / toys[0], toys[1]
        rows = open_source(str(file), form)

        def made(source: Source) -> Source:
            return Source(name=source.label, path=str(file), format=form, weight=source.weight)

        data, held_out = tuple(map(made, stage.data)), tuple(map(made, stage.held_out))
    own = encoder.using(template=stage.template, train_on=stage.train_on)
    encoded = [own(rows.sample(i)) for i in range(len(SHAPES))]
    seq_len = -(-max(len(sample.ids) for sample in encoded) // 8) * 8
    changes: dict[str, Any] = {
        "steps": STEPS,
        "ends": "repeat",
        "seq_len": seq_len,
        "batch_tokens": ROWS * seq_len,
        "micro_batch_tokens": seq_len if isinstance(stage.micro_batch_tokens, int) else None,
        "patches": stage.patches and ROWS * max(sample.num_patches for sample in encoded),
        "workers": 0,
        "lora": _lora(stage.lora),
        "teacher": stage.teacher
        and stage.teacher.model_copy(
            update={"path": str(folder / "teacher"), "top_k": stage.teacher.top_k and RANK}
        ),
        "only": {
            group: _choice(text, toy.blocks[group], f"stages.{stage.name}: only.{group}")
            for group, text in stage.only.items()
        },
        "data": data,
        "held_out": held_out,
        "held_out_samples": min(stage.held_out_samples, len(SHAPES)),
    }
    return stage.model_copy(update=changes)


def _lora(lora: Lora | None) -> Lora | None:
    """Adapters that count as much as the real ones, with a smaller rank."""
    if lora is None or lora.rank <= RANK:
        return lora
    alpha = None if lora.alpha is None else max(1, round(lora.alpha * RANK / lora.rank))
    return lora.model_copy(update={"rank": RANK, "alpha": alpha})


def _choice(text: str, blocks: tuple[int, int], where: str) -> str:
    """``from layer K`` with K in proportion."""
    layer = read_choice(text).layer
    real, toy = blocks
    if layer is None:
        return text
    if layer >= real:
        raise RecipeError(f"{where}: '{text}', but the part runs {real} blocks, 0 to {real - 1}")
    return f"from layer {min(scaled(layer, real, toy), toy - 1)}"


def _encoder(toy: Toy) -> Encoder:
    """What reads the made samples, without the model."""
    language = toy.spec.language
    assert language is not None
    tokenizer = read_tokenizer(str(language.tokenizer), "model.language.tokenizer")
    add_tokens(tokenizer, language.template)
    eye = TinyModalImageProcessor() if toy.spec.vision is None else image_processor(toy.spec.vision)
    return Encoder(TinyModalProcessor(eye, tokenizer), language.template)


# Data


def _write_data(folder: Path, edge_px: int) -> None:
    """Pictures of one colour each in several shapes, captions of them, and conversations about them."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    captions, chats, pairs = [], [], []
    for i, ((rows, columns), colour) in enumerate(zip(SHAPES, COLOURS, strict=True)):
        name = f"{colour}.png"
        if edge_px:
            Image.new("RGB", (columns * edge_px, rows * edge_px), colour).save(folder / name)
        captions.append({"image": name, "caption": f"a {colour} picture"})
        pair = {"question": "What colour is it?", "chosen": colour, "rejected": COLOURS[i - 1]}
        pairs.append({"image": name, **pair} if edge_px else pair)
        looks: list[Mapping[str, str]] = [{"type": "image", "path": name}] if edge_px and i else []
        asked = [*looks, {"type": "text", "text": "What colour is it?" if looks else "Is white a colour?"}]
        turns = [("user", asked), ("assistant", colour if looks else "yes")]
        turns += [("user", "Is it large?"), ("assistant", "no")] if i % 2 else []
        chats.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    for name, lines in (("captions.jsonl", captions), ("chats.jsonl", chats), ("pairs.jsonl", pairs)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
