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

from tinymodal.core.types import Audio, Message, Sample, Text
from tinymodal.eval.benchmark import Benchmark, File, Given, OnDisk, Problems, Question
from tinymodal.eval.files import read_text
from tinymodal.eval.given import plain_answers
from tinymodal.eval.rules.transcripts import error_rates, transcript

ORIGIN = "https://www.openslr.org/12"
PROMPT = "Transcribe the speech."
SOUNDS = (".flac", ".wav", ".ogg", ".opus", ".mp3")
MAX_NEW_TOKENS = 256
"""The longest utterance of LibriSpeech, 35 s, has some 110 words."""


def is_librispeech(folder: Path) -> bool:
    """Whether the folder, or one below it, holds transcripts as LibriSpeech names them."""
    return folder.is_dir() and next(folder.rglob("*.trans.txt"), None) is not None


def from_folder(
    folder: Path, prompt: str = PROMPT, name: str = "", problems: Problems | None = None
) -> Benchmark:
    """The benchmark over one folder, such as ``LibriSpeech/test-clean``, named after it."""
    problems = Problems() if problems is None else problems
    return Benchmark(
        name=name or folder.name,
        load=lambda: _questions(folder, prompt, problems),
        score=transcript,
        reduce=error_rates,
        max_new_tokens=MAX_NEW_TOKENS,
        metric="word error rate",
        headline="wer",
        lower_is_better=True,
        answers=lambda path: _answers(path, problems),
        problems=problems,
        source=f"{folder}; Whisper's normaliser and jiwer, https://github.com/openai/whisper",
    )


def _questions(folder: Path, prompt: str, problems: Problems) -> Iterator[Question]:
    for file in sorted(folder.rglob("*.trans.txt")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            name, _, words = line.strip().partition(" ")
            if not name:
                continue
            if not words.strip():
                problems.add("utterances without a transcript", f"{file.name}: line {number}: {name}")
                continue
            # Where none is there, the run says so; transcripts that were made elsewhere need none.
            ends = (file.with_name(name + end) for end in SOUNDS)
            sound = next((at for at in ends if at.is_file()), file.with_name(name + SOUNDS[0]))
            asked = Message("user", (Audio(sound), Text(prompt)))
            yield Question(Sample((asked,), name), words, {"reference": words})


def _answers(path: Path, problems: Problems) -> Iterator[Given]:
    """Transcripts of utterances: ``ID WORDS`` a line, as those of the right ones, or rows with an id."""
    if not path.name.removesuffix(".gz").endswith(".txt"):
        yield from plain_answers(path, problems)
        return
    for number, line in enumerate(read_text(path).splitlines(), 1):
        name, _, words = line.strip().partition(" ")
        if name:
            yield Given(name, words, f"{path.name}: line {number}")


TASK = OnDisk(
    name="librispeech",
    title="transcripts of read speech, by their word error rate",
    source="https://github.com/openai/whisper/blob/v20231117/notebooks/LibriSpeech.ipynb",
    files=(
        File(("*.trans.txt",), "an utterance's id and its words, a line each", ORIGIN),
        File(
            tuple(f"*{end}" for end in SOUNDS),
            "the utterances, beside the transcripts",
            ORIGIN,
            optional=True,
        ),
    ),
    open=lambda folder, problems: from_folder(folder, name="librispeech", problems=problems),
    folders=("LibriSpeech",),
)
