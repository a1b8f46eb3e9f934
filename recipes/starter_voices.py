"""Make the clips of words that TinyModal ships for machines without espeak-ng.

    python recipes/starter_voices.py tinymodal/starter/voices

Every word of made scenes in each of some voices, one OGG file (Opus) a voice, and ``index.json`` with the
places of the words. Needs espeak-ng and soundfile.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile

from tinymodal.data.sounds import SPEAKS, made_words
from tinymodal.data.voices import RATE_HZ, Voice, espeak, heard, split_of, trimmed

VOICES = (
    Voice("en-us", "f3", 50), Voice("en", "anika", 45), Voice("en-us", "Andrea", 45),
    Voice("en-gb-x-rp", "Annie"), Voice("en", "grandma", 50), Voice("en-029", "aunty", 50),
    Voice("en-us", "steph", 55), Voice("en-us", "m1", 50), Voice("en-gb-scotland", "john", 50),
    Voice("en", "m6", 60), Voice("en-us", "adam", 40), Voice("en-gb-x-rp", "michel", 50),
    Voice("en-us", "Nguyen", 50), Voice("en", "quincy", 55),
    Voice("en", "sandro"),
    Voice("en-us", "f2"), Voice("en", "belinda"), Voice("en-gb-scotland", "m3"), Voice("en-us", "pablo"),
    *(Voice(*name.split("+")) for name in SPEAKS),
)  # fmt: skip
LIMIT_BYTES = 3_000_000
QUALITY = {True: 0.925, False: 0.953}
"""libsndfile's level of compression for voices that are learned to speak with, and for others: about 19 and
15 kbit/s."""
BLOCK = 4_000
"""Samples written at a time: libsndfile 1.2.2 crashes on long OGG files written at once."""

SPELT = {
    # Alone these are read as names of letters, or in the past tense.
    "a": "[[@]]",
    "read": "reed",
    "i": "I",
    "tinymodal's": "tiny modal's",
}
SHORT = frozenset(
    ("a", "am", "an", "and", "are", "at", "by", "can", "do", "does", "have", "i", "in", "is", "it", "me",
     "of", "on", "or", "the", "there", "was", "you")
)  # fmt: skip
SPEED, SPEED_SHORT = 180, 225
"""Words a minute. Little words are never said slowly in a sentence."""


def word_clip(word: str, voice: Voice, program: str) -> np.ndarray:
    """One word, float32 [samples] at 16 kHz."""
    speed = SPEED_SHORT if word in SHORT else SPEED
    return trimmed(
        heard(SPELT.get(word, word), Voice(voice.accent, voice.variant, voice.pitch, speed), program)
    )


def main(out: Path) -> None:
    found = espeak()
    if found is None:
        raise SystemExit("espeak-ng is not installed, or lacks voices")
    words = made_words()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.ogg"):
        old.unlink()
    voices: dict[str, list[int]] = {}
    total = 0
    for voice in VOICES:
        if voice.accent not in found.accents or voice.variant not in found.variants:
            raise SystemExit(f"espeak-ng has no voice {voice.name} here")
        clips = [word_clip(word, voice, found.program) for word in words]
        wave = np.concatenate(clips)
        path = out / f"{voice.name}.ogg"
        level = QUALITY[split_of(voice.variant) == "speak"]
        with soundfile.SoundFile(
            path, "w", RATE_HZ, 1, format="OGG", subtype="OPUS", compression_level=level
        ) as file:
            for start in range(0, len(wave), BLOCK):
                file.write(wave[start : start + BLOCK])
        back = soundfile.read(path, dtype="float32")[0]
        if len(back) != len(wave):
            raise SystemExit(f"{path}: {len(back)} samples read back of {len(wave)} written")
        voices[voice.name] = np.cumsum([0, *map(len, clips)]).tolist()
        total += path.stat().st_size
        size = path.stat().st_size
        print(f"{voice.name:24} {split_of(voice.variant)!s:6} {len(wave) / RATE_HZ:6.1f} s {size:8,} B")
    index = {"rate_hz": RATE_HZ, "made_with": "espeak-ng", "words": list(words), "voices": voices}
    (out / "index.json").write_text(json.dumps(index, separators=(",", ":")) + "\n")
    total += (out / "index.json").stat().st_size
    print(f"{len(words)} words, {len(voices)} voices, {total / 1e6:.2f} MB in {out}")
    if total > LIMIT_BYTES:
        raise SystemExit(f"the limit is {LIMIT_BYTES / 1e6} MB")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("out", type=Path)
    main(arguments.parse_args().out)
