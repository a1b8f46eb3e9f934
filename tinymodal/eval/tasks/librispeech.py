"""Transcripts of read speech, from a folder that lies as LibriSpeech does.

``84-121123.trans.txt`` holds a line an utterance, its id and its words in capitals; the sound is beside it
as ``84-121123-0000.flac`` (or .wav). The score is the word error rate over the whole folder, of texts
normalised as Whisper's paper has them.

Source: LibriSpeech (Panayotov et al., ICASSP 2015, https://www.openslr.org/12); protocol of
https://github.com/openai/whisper (notebook LibriSpeech.ipynb): English normaliser, then one rate over all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tinymodal.core.errors import DataError
from tinymodal.core.types import Audio, Message, Sample, Text
from tinymodal.eval.benchmark import Benchmark, Question
from tinymodal.eval.transcripts import error_rates, transcript

PROMPT = "Transcribe the speech."
SOUNDS = (".flac", ".wav", ".ogg", ".opus", ".mp3")
MAX_NEW_TOKENS = 256
"""The longest utterance of LibriSpeech, 35 s, has some 110 words."""


def is_librispeech(folder: Path) -> bool:
    """Whether the folder, or one below it, holds transcripts as LibriSpeech names them."""
    return folder.is_dir() and next(folder.rglob("*.trans.txt"), None) is not None


def from_folder(folder: Path, prompt: str = PROMPT) -> Benchmark:
    """The benchmark over one folder, such as ``LibriSpeech/test-clean``, named after it."""
    return Benchmark(
        name=folder.name,
        load=lambda: _questions(folder, prompt),
        score=transcript,
        reduce=error_rates,
        max_new_tokens=MAX_NEW_TOKENS,
        metric="word error rate",
        headline="wer",
        lower_is_better=True,
        source=f"{folder}; Whisper's normaliser and jiwer, https://github.com/openai/whisper",
    )


def _questions(folder: Path, prompt: str) -> Iterator[Question]:
    for file in sorted(folder.rglob("*.trans.txt")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            name, _, words = line.strip().partition(" ")
            if not name:
                continue
            if not words.strip():
                raise DataError(f"{file}: line {number}: {name} has no words; expected its transcript")
            sound = next((at for end in SOUNDS if (at := file.with_name(name + end)).is_file()), None)
            if sound is None:
                raise DataError(
                    f"{file}: line {number}: no sound {name}{SOUNDS[0]} beside it; expected one of "
                    f"{', '.join(SOUNDS)}"
                )
            asked = Message("user", (Audio(sound), Text(prompt)))
            yield Question(Sample((asked,), f"{file.name}: {name}"), words, {"reference": words})
