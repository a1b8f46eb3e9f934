"""Train a codec of ours: sounds in, a folder that ``open_codec`` reads out.

A codec is trained once and then frozen, by a loop of its own: there are no tokens, stages or packed rows.
Each step draws clips of one length; what is learned from them is in ``codec_lessons.py``.

What a step draws depends on the seed and its number alone, so that a run that was killed goes on from its
last checkpoint as if nothing had happened, bit for bit on the same machine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinymodal.core.errors import CheckpointError, DataError
from tinymodal.core.log import say
from tinymodal.model.small_codec import SmallCodec
from tinymodal.model.unit_vocoder import UnitCodec
from tinymodal.train.codec_lessons import CodecTraining, SmallLesson, Sounds, UnitLesson
from tinymodal.train.machine import record


class SoundFolder:
    """Every sound in a folder, in the order of their names, read when it is asked for."""

    def __init__(self, folder: str | Path, rate_hz: int) -> None:
        """Raises DataError if there is none."""
        self.folder, self.rate_hz = Path(folder), rate_hz
        suffixes = {".wav", ".flac", ".ogg", ".opus", ".mp3"}
        self.files = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in suffixes)
        if not self.files:
            raise DataError(f"{folder}: no sound is in there; known: {', '.join(sorted(suffixes))}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        from tinymodal.model.audio import load_sound

        path = self.files[index]
        try:
            return load_sound(path, to_hz=self.rate_hz, name=str(path))
        except ValueError as error:
            raise DataError(str(error)) from error


def train_codec(
    codec: SmallCodec | UnitCodec | Mapping[str, Any],
    sounds: Sounds,
    out: str | Path,
    training: CodecTraining | None = None,
    held_out: Sounds | None = None,
) -> SmallCodec | UnitCodec:
    """Train a codec of ours, or go on with the run in ``out``.

    Args:
        codec: a ``tinymodal_codec``, by sizes that differ from ``small_codec.DEFAULTS``; or a codec whose
            weights are those to begin with: a ``tinymodal_units`` whose tower is loaded. It is trained in
            place.
        sounds: what it learns from.
        out: folder of the run: ``metrics.jsonl``, ``run.json``, ``checkpoint.pt``, and when it is done the
            codec's own folder, ``codec``, and what held-out sounds score, ``held_out.json``.
        training: how; None: as :class:`CodecTraining` has it.
        held_out: measured at the end.

    Raises:
        CheckpointError: the run in ``out`` was begun with other settings.
        DataError: a sound cannot be read, or the loss is not finite.
    """
    training = training or CodecTraining()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(training.seed)
    codec = SmallCodec(codec) if isinstance(codec, Mapping) else codec
    codec.requires_grad_(True)
    if not (out / "checkpoint.pt").exists():
        draw = torch.Generator().manual_seed(training.seed)
        order = torch.randperm(len(sounds), generator=draw)[: training.fit]
        codec.fit([sounds[index] for index in order.tolist()], training.seed)
    run = _Run(UnitLesson(codec, training) if isinstance(codec, UnitCodec) else SmallLesson(codec, training))
    begun = {"config": codec.config, "training": asdict(training)}
    step = run.load(out / "checkpoint.pt", begun)
    _begin(out, begun, step)
    notes = out / "metrics.jsonl"
    keep_notes(notes, step)
    started = time.monotonic()
    while step < training.steps:
        measures = run.step(step, sounds)
        step += 1
        if step % training.note_every == 0 or step == training.steps:
            measures["seconds"] = round(time.monotonic() - started, 1)
            with notes.open("a") as file:
                file.write(json.dumps({"step": step, **measures}) + "\n")
        if step % training.save_every == 0 or step == training.steps:
            run.save(out / "checkpoint.pt", begun, step)
            say(f"codec: step {step} of {training.steps}, loss {measures['loss']:.3f}")
    codec.eval().requires_grad_(False)
    codec.save(out / "codec")
    if held_out is not None:
        scores = run.lesson.score(held_out)
        (out / "held_out.json").write_text(json.dumps(scores, indent=2) + "\n")
        say(f"codec: held-out sounds {scores}")
    return codec


class _Run:
    """What changes from step to step."""

    def __init__(self, lesson: SmallLesson | UnitLesson) -> None:
        self.lesson, self.codec, self.training = lesson, lesson.codec, lesson.training
        trained = [parameter for parameter in self.codec.parameters() if parameter.requires_grad]
        # Norms, biases and scales are not pulled to zero.
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.01},
                {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=self.training.rate,
            betas=(0.9, 0.98),
        )

    def step(self, step: int, sounds: Sounds) -> dict[str, Any]:
        """One update -> what is noted of it."""
        training, codec = self.training, self.codec
        draw = torch.Generator().manual_seed(training.seed * 1_000_003 + step)
        length = round(training.clip_s * codec.frames_per_s) * codec.hop
        wave_Nn = draw_clips(sounds, training.clips, length, draw)
        self.lesson.begin()
        total, noted = self.lesson.losses(wave_Nn, draw)
        if not bool(total.isfinite()):
            raise DataError(f"codec training: the loss of step {step} is {total.item()}; take a smaller rate")
        for group in self.optimizer.param_groups:
            group["lr"] = training.rate_at(step)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        self.optimizer.step()
        loss = {"loss": total.item(), **noted}
        return {name: round(x, 5) if isinstance(x, float) else x for name, x in loss.items()}

    def save(self, path: Path, begun: dict[str, Any], step: int) -> None:
        """Write a checkpoint, whole or not at all."""
        part = path.with_name(f"{path.name}.part")
        state = {
            "begun": json.dumps(begun, sort_keys=True, default=str),
            "step": step,
            "codec": self.codec.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lesson": self.lesson.state(),
        }
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    def load(self, path: Path, begun: dict[str, Any]) -> int:
        """The step to go on with; 0 if there is no checkpoint."""
        if not path.exists():
            return 0
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); remove it to begin again") from error
        if state["begun"] != json.dumps(begun, sort_keys=True, default=str):
            raise CheckpointError(
                f"{path.parent}: this run was begun with other settings ({state['begun']}); give them again, "
                f"or another folder"
            )
        self.codec.load_state_dict(state["codec"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lesson.load(state["lesson"])
        return int(state["step"])


def _begin(out: Path, begun: dict[str, Any], step: int) -> None:
    """Note in ``run.json`` where and when the run began or went on."""
    path = out / "run.json"
    starts = json.loads(path.read_text())["starts"] if step and path.exists() else []
    starts.append({"step": step, **record()})
    path.write_text(json.dumps({**begun, "starts": starts}, indent=2, default=str) + "\n")


def keep_notes(path: Path, step: int) -> None:
    """Drop lines of steps behind ``step``, which will be taken again, and half a line at the end."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    path.write_text("".join(line + "\n" for line in kept))


def draw_clips(sounds: Sounds, count: int, length: int, draw: torch.Generator) -> Tensor:
    """Stretches of ``length`` samples out of sounds drawn at random: float32 [count, length]."""
    clips = []
    for index in torch.randint(0, len(sounds), (count,), generator=draw).tolist():
        wave = sounds[index]
        spare = len(wave) - length
        # A short sound lies anywhere in its silence.
        at = int(torch.randint(0, abs(spare) + 1, (), generator=draw))
        clips.append(wave[at : at + length] if spare >= 0 else F.pad(wave, (at, -spare - at)))
    return torch.stack(clips)
