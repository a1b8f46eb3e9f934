"""A recipe at toy size, to see that it runs: ``--tiny``.

Parts are shrunk by ``compose/shrink.py``. Stages keep what they train, their rates and schedules, adapters,
bits, templates and mixtures; they take two steps on made pictures and sounds with conversations. Nothing is
learned.
What the real run would refuse before its first step (parts that do not fit, a group without parameters, rows
longer than the language model's context, a template that does not suit) is refused here as well.
"""

from __future__ import annotations

import json
import math
import struct
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinymodal.chat.encode import Encoder
from tinymodal.compose import build
from tinymodal.compose.build import add_tokens
from tinymodal.compose.known import scaled
from tinymodal.compose.pretrained import read_tokenizer
from tinymodal.compose.shrink import Toy, image_processor, shrink, template_of
from tinymodal.compose.shrink_sound import audio_processor
from tinymodal.compose.spec import AudioSpec, LanguageSpec, ModelSpec, SpeechSpec, VisionSpec
from tinymodal.core.config import load
from tinymodal.core.errors import RecipeError
from tinymodal.data.sounds import MADE
from tinymodal.data.sources import open_source
from tinymodal.data.synthetic import MADE as SEEN
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
SOUND_S, RATE_HZ = 0.6, 16_000
"""Of the made sounds."""
HEARD = ("asr", "audio_qa", "audio_caption", "spoken", "tts")
"""Formats of rows that are heard or spoken."""


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
    _write_data(folder, toy)
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


def _made(
    name: str, beside: Path | None, own: str
) -> LanguageSpec | VisionSpec | AudioSpec | SpeechSpec | ModelSpec | None:
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
                made: LanguageSpec | VisionSpec | AudioSpec | SpeechSpec | None = getattr(recipe.model, part)
                return made
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
        rows = [open_data(data[0], f"stages.{stage.name}.data[0]")]
    else:

        def made(source: Source) -> Source:
            file, form = _toys(source, stage, toy, captions)
            return Source(
                name=source.label,
                path=str(folder / file),
                format=form,
                weight=source.weight,
                augment=source.augment,
            )

        data, held_out = tuple(map(made, stage.data)), tuple(map(made, stage.held_out))
        files = {(source.path, source.format): None for source in (*data, *held_out)}
        rows = [open_source(str(path), str(form)) for path, form in files]
    own = encoder.using(template=stage.template, train_on=stage.train_on)
    encoded = [own(source.sample(i)) for source in rows for i in range(len(SHAPES))]
    seq_len = -(-max(len(sample.ids) for sample in encoded) // 8) * 8
    changes: dict[str, Any] = {
        "steps": STEPS,
        "ends": "repeat",
        "seq_len": seq_len,
        "batch_tokens": ROWS * seq_len,
        "micro_batch_tokens": seq_len if isinstance(stage.micro_batch_tokens, int) else None,
        "patches": stage.patches and max(ROWS * max(sample.num_patches for sample in encoded), 1),
        # Sounds that are changed at random may be up to four times as long.
        "frames": stage.frames and max(4 * ROWS * max(sample.num_frames for sample in encoded), 1),
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


def _toys(source: Source, stage: Stage, toy: Toy, captions: bool) -> tuple[str, str]:
    """The file of made rows that stands for a source, and its format."""
    if "dpo" in stage.loss:
        return "pairs.jsonl", "preference"
    heard = source.format in HEARD or source.sounds is not None
    heard |= source.made in MADE and source.made not in SEEN
    heard |= not toy.edge_px or "speech" in stage.loss
    if heard and (toy.spec.audio is not None or toy.spec.speech is not None):
        return ("sounds.jsonl", "audio_caption") if captions else ("heard.jsonl", "messages")
    return ("captions.jsonl", "caption") if captions else ("chats.jsonl", "messages")


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
    add_tokens(tokenizer, language.template, hears=toy.spec.audio is not None)
    eye = TinyModalImageProcessor() if toy.spec.vision is None else image_processor(toy.spec.vision)
    ear = None if toy.spec.audio is None else audio_processor(toy.spec.audio)
    return Encoder(TinyModalProcessor(eye, tokenizer, feature_extractor=ear), language.template)


# Data


def _write_data(folder: Path, toy: Toy) -> None:
    """Pictures of one colour each in several shapes, tones, captions of them, and talks about them."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    edge_px, hears, mouth = toy.edge_px, toy.spec.audio is not None, toy.spec.speech
    captions, chats, pairs, sounds, heard = [], [], [], [], []
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
        if not hears and mouth is None:
            continue
        tone = f"{colour}.wav"
        _write_tone(folder / tone, 200.0 * (i + 1), SOUND_S * (1 + i % 2))
        sounds.append({"audio": tone, "caption": f"a {colour} sound"})
        plays = [{"type": "audio", "path": tone}] if hears and i else []
        said: list[Mapping[str, str]] = [{"type": "text", "text": colour}]
        if mouth is not None:
            voice = {"voice": mouth.voices[i % len(mouth.voices)]} if mouth.voices else {}
            said.append({"type": "speech", "path": tone, **voice})
        # A picture and a sound together, one of them, and neither.
        asked = [*(looks if i % 2 else []), *plays, {"type": "text", "text": "What is it?"}]
        heard.append(
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        )
    for name, lines in (
        ("captions.jsonl", captions),
        ("chats.jsonl", chats),
        ("pairs.jsonl", pairs),
        ("sounds.jsonl", sounds),
        ("heard.jsonl", heard),
    ):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _write_tone(file: Path, pitch_hz: float, seconds: float) -> None:
    samples = [
        round(8_000 * math.sin(2 * math.pi * pitch_hz * n / RATE_HZ)) for n in range(round(seconds * RATE_HZ))
    ]
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE_HZ)
        sound.writeframes(struct.pack(f"<{len(samples)}h", *samples))
