"""Voices of made speech: espeak-ng where it is installed, and clips of words that TinyModal ships everywhere.

A voice is an accent and a variant (``en-us+f3``), spoken at some pitch and speed. Variants are kept apart by
split: none of ``train`` is in ``val`` or ``test``, under whatever accent, and ``speak`` are those that a
model speaks with, which no recogniser is trained on. Names alone do not keep voices apart: espeak-ng 1.51 has
variants that are the same sound (caleb, klatt, klatt6) and some that nearly are (steph to steph3). So none of
``val``, ``test`` and ``speak`` is nearer than 0.8 to one of another split (root mean square difference of
log10 mel energies over one sentence; the same sentence in f2 and f3: 0.98). Effects (whisper, robots) are
left out; the voices of ``speak`` have no echo, which a codec would have to learn.

espeak-ng is a program of its own and may be absent, or lack variants; it also ignores them under some
accents. It then speaks with another voice without a word. So :func:`espeak` listens first. A sentence costs
about 20 ms of one core.

The shipped clips are one file of words for each of some voices, with the places of the words in
``index.json``; made by ``recipes/starter_voices.py``. Reading a voice takes about 0.2 s, once per process.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tinymodal.core.errors import DataError

Wave = NDArray[np.float32]
VoiceSplit = Literal["train", "val", "test", "speak"]

RATE_HZ = 16_000
ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029")
"""``en`` is British; under its other name, ``en-gb``, espeak-ng 1.51 ignores every variant."""
VARIANTS: Mapping[VoiceSplit, tuple[str, ...]] = {
    "train": (
        "f3", "f4", "Annie", "m1", "m2", "m5", "m6", "m7", "m8", "Alex", "Alicia", "Andrea", "Denis", "Diogo",
        "Gene", "Gene2", "Henrique", "Hugo", "Jacky", "Mario", "Michael", "Mike", "Nguyen", "Tweaky", "adam",
        "anika", "antonio", "aunty", "benjamin", "boris", "caleb", "croak", "david", "ed", "edward",
        "edward2",
        "grandma", "grandpa", "gustave", "iven", "iven2", "iven3", "iven4", "john", "klatt", "klatt2",
        "klatt3", "klatt4", "klatt5", "klatt6", "linda", "marcelo", "max", "michel", "miguel", "paul",
        "pedro", "quincy", "rob", "robert", "steph", "steph2", "steph3", "victor", "zac",
    ),
    "val": ("shelby", "sandro", "travis"),
    "test": ("f2", "f5", "m3", "belinda", "pablo", "norbert"),
    "speak": ("f1", "m4"),
}  # fmt: skip
SHIPPED = Path(__file__).resolve().parents[1] / "starter" / "voices"
PEAK = 0.5
"""Greatest sample of a clip; espeak-ng's voices differ by 18 dB among themselves."""
TIMEOUT_S = 20.0
QUIET = 0.01
"""Relative to the peak: what lies below it at the ends of a clip is cut off."""
EDGE_S = 0.015
"""What is left of it."""


@dataclass(frozen=True, slots=True)
class Voice:
    """Who speaks, and how."""

    accent: str
    variant: str
    pitch: int = 50
    """0 to 99, as espeak-ng counts; 50 is the variant's own."""
    speed: int = 160
    """Words a minute."""

    @property
    def name(self) -> str:
        """As espeak-ng and the shipped files name it: ``en-us+f3``."""
        return f"{self.accent}+{self.variant}"


def split_of(variant: str) -> VoiceSplit | None:
    """Where a variant belongs; None for one that is not used."""
    return next((split for split, variants in VARIANTS.items() if variant in variants), None)


# --- espeak-ng ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Espeak:
    """The program, and what of ours it can speak with."""

    program: str
    accents: tuple[str, ...]
    variants: frozenset[str]

    def of(self, split: VoiceSplit) -> tuple[str, ...]:
        """Variants of a split that are installed."""
        return tuple(variant for variant in VARIANTS[split] if variant in self.variants)


@functools.cache
def espeak() -> Espeak | None:
    """espeak-ng, if it is installed and has an accent and a variant of every split; else None."""
    program = shutil.which("espeak-ng")
    if program is None:
        return None
    try:
        accents = {line.split()[1] for line in _run(program, "--voices=en").decode().splitlines()[1:]} | {
            "en"
        }
        # The file is what selects a voice, not what it is called in the column before.
        files = _run(program, "--voices=variant").decode().splitlines()[1:]
        variants = frozenset(name for line in files for name in re.findall(r"!v/(\S+)", line))
        heeded = tuple(accent for accent in ACCENTS if accent in accents and _heeds(program, accent))
    except (DataError, UnicodeDecodeError, IndexError):
        return None
    found = Espeak(program, heeded, variants)
    return found if found.accents and all(found.of(split) for split in VARIANTS) else None


def _heeds(program: str, accent: str) -> bool:
    """Whether two variants of an accent sound different."""
    one, two = (_run(program, "-v", f"{accent}+{variant}", "--stdout", "red") for variant in ("f2", "m3"))
    return one != two


@functools.lru_cache(maxsize=1024)
def speak(text: str, voice: Voice) -> Wave:
    """A text as espeak-ng speaks it, float32 [samples] at 16 kHz, cut to where it is heard; read-only.

    The last 1,024 are kept (about 100 MB if all of them are sentences of two seconds).

    Raises:
        DataError: espeak-ng is not installed or does not have the voice, or the text has no word.
    """
    found = espeak()
    if found is None:
        raise DataError(
            "espeak-ng is not installed (or has too few voices); install it, or take speaker = 'shipped', "
            "which joins the clips of words that come with TinyModal"
        )
    if voice.accent not in found.accents or voice.variant not in found.variants:
        raise DataError(f"espeak-ng has no voice {voice.name!r} here; see espeak-ng --voices=variant")
    # Only what is read as words: espeak-ng takes [[...]] for phonemes.
    said = re.sub(r"[^A-Za-z0-9 .,!?'-]+", " ", text).strip()
    if not re.search(r"[A-Za-z0-9]", said):
        raise DataError(f"there is nothing to speak in {text!r}; expected words")
    return trimmed(heard(said, voice, found.program))


def heard(said: str, voice: Voice, program: str) -> Wave:
    """What espeak-ng makes of ``said``, markup of phonemes included, at 16 kHz and not cut."""
    options = ("-v", voice.name, "-p", str(voice.pitch), "-s", str(voice.speed), "--stdin", "--stdout")
    sound = _run(program, *options, said=said.encode())
    at = sound.find(b"data")
    if sound[:4] != b"RIFF" or at < 0 or len(sound) < at + 10:
        raise DataError(f"espeak-ng said nothing for {said!r} as {voice.name!r}; is it installed whole?")
    rate_hz = int.from_bytes(sound[24:28], "little")
    # The sizes in its header are made up, as it writes to a pipe: all that follows is sound.
    even = (len(sound) - at - 8) // 2 * 2
    samples = np.frombuffer(sound, "<i2", even // 2, at + 8).astype(np.float32) / 32768
    import soxr

    return np.asarray(soxr.resample(samples, rate_hz, RATE_HZ), np.float32)


def trimmed(wave: Wave) -> Wave:
    """A clip without the quiet at its ends, and as loud as every other; read-only."""
    level = np.abs(wave)
    peak = float(level.max(initial=0))
    if peak == 0:
        raise DataError("espeak-ng made a clip of silence; is it installed whole?")
    loud = np.flatnonzero(level > QUIET * peak)
    edge = round(EDGE_S * RATE_HZ)
    kept = wave[max(0, loud[0] - edge) : loud[-1] + 1 + edge] * np.float32(PEAK / peak)
    kept.setflags(write=False)
    return kept


def _run(program: str, *options: str, said: bytes = b"") -> bytes:
    """What the program writes; no shell, no file, and an end to waiting."""
    try:
        done = subprocess.run(
            [program, *options], input=said, capture_output=True, timeout=TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise DataError(f"{program} failed ({error}); is it installed whole?") from error
    return done.stdout


# --- shipped clips --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shipped:
    """The voices that come with TinyModal, and where each word lies in their files."""

    folder: Path
    words: tuple[str, ...]
    voices: Mapping[str, tuple[int, ...]]
    """Name of a voice -> samples where each word begins, and where the last one ends; word by word."""

    def of(self, split: VoiceSplit) -> tuple[str, ...]:
        """Names of the voices of a split."""
        return tuple(name for name in self.voices if name.partition("+")[2] in VARIANTS[split])


@functools.cache
def shipped(folder: Path = SHIPPED) -> Shipped:
    """The index of the shipped clips.

    Raises:
        DataError: it is not there, or is not one.
    """
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        words, voices = tuple(index["words"]), {name: tuple(ends) for name, ends in index["voices"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no index of voices ({error}); install TinyModal again") from error
    for name, ends in voices.items():
        if len(ends) != len(words) + 1:
            raise DataError(
                f"{path}: voice {name!r} has {len(ends)} places for {len(words)} words; expected one more "
                f"than words. Make it again with recipes/starter_voices.py"
            )
    return Shipped(folder, words, voices)


@functools.cache
def clips(name: str, folder: Path = SHIPPED) -> Mapping[str, Wave]:
    """Every word of a shipped voice, float32 [samples] at 16 kHz, read-only; kept for good, 4 MB a voice.

    Raises:
        DataError: there is no such voice, or its file cannot be read.
    """
    import soundfile

    index = shipped(folder)
    if name not in index.voices:
        raise DataError(f"no voice {name!r} is shipped; there are {', '.join(index.voices)}")
    path, ends = folder / f"{name}.ogg", index.voices[name]
    try:
        wave, rate_hz = soundfile.read(path, dtype="float32")
    except (OSError, soundfile.LibsndfileError) as error:
        raise DataError(f"{path}: cannot be read ({error}); install TinyModal again") from error
    if rate_hz != RATE_HZ or wave.ndim != 1 or len(wave) < ends[-1]:
        raise DataError(
            f"{path}: {wave.shape} samples at {rate_hz} Hz; expected [{ends[-1]}] or more at {RATE_HZ} Hz"
        )
    wave.setflags(write=False)
    return {word: wave[start:end] for word, start, end in zip(index.words, ends, ends[1:], strict=False)}
