"""Train the nets that hear the made world: the starter model's ear, and the recogniser that judges speech.

    python recipes/starter_audio.py clips runs/starter-audio/clips.npz
    python recipes/starter_audio.py ear runs/starter-audio/clips.npz runs/starter-audio/parts/audio
    python recipes/starter_audio.py recogniser runs/starter-audio/clips.npz tinymodal/starter/recogniser

Both learn which word is heard at each position. Joined clips say where their words are, and of a sentence
that is spoken whole espeak-ng's library tells it (the program does not). The two nets share clips and loss,
and nothing else: the ear has the tower and the log-mel that the starter model has, the recogniser its own.

Voices: ``train`` only. What is printed while training is on ``val``; at the end on ``test`` and ``speak``.
Needs espeak-ng and its library for ``clips``.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymodal.data.sounds import PITCHES, SPEEDS, Heard, Said, Speakers, spoken_words
from tinymodal.data.synthetic import NO_PICTURE, SMALL_TALK, Scenes
from tinymodal.data.voices import PEAK, RATE_HZ, Voice, espeak, shipped
from tinymodal.data.voices import clips as speaker
from tinymodal.eval.recogniser import (
    OTHER,
    POSITIONS_PER_S,
    Recogniser,
    decode,
    place_classes,
)

WHOLE, OTHERS, EACH_TEST = 4000, 1500, 250
ALONE = {"a": "uh", "read": "reed"}
"""What is written for a word that is said otherwise when it stands alone."""
BATCH = 8
"""Joined clips in a step, and as many whole ones."""
RATE, DECAY, BETAS, FLOOR = 3e-3, 0.02, (0.9, 0.98), 0.01
STEPS = {"ear": 6000, "recogniser": 6000}


# --- clips ----------------------------------------------------------------------------------------


def texts(split: str, seed: int, num: int) -> list[str]:
    """Words, questions, answers, short descriptions and talk, in turn."""
    rng = random.Random(f"{split}/{seed}/texts")
    heard = Heard(split, seed, words=(1, 5), speaker="shipped")
    asked, told = (Scenes(split, seed, form, "written") for form in ("mixed", "captions"))
    found = []
    for index in range(num):
        message = (told if index % 5 == 4 else asked).sample(index).messages
        question = message[0].parts[-1].text.strip()
        if index % 5 in (0, 1):
            text = heard.text(index)
        elif index % 5 in (2, 3):
            text = question
        else:
            text = ", ".join(message[1].parts[0].text.rstrip(".").split(", ")[: rng.randint(1, 2)])
        found.append(
            text if index % 40 else rng.choice([NO_PICTURE, *(said for qa in SMALL_TALK for said in qa)])
        )
    return found


def other_words(num: int) -> list[str]:
    """Words that made scenes do not have, from the documentation that Python carries."""
    from pydoc_data.topics import topics

    known = set(shipped().words)
    words = {word for text in topics.values() for word in re.findall(r"\b[a-z]{4,9}\b", text)}
    return random.Random(0).sample(sorted(words - known), num)


class _Event(ctypes.Structure):
    """What espeak-ng's library tells while it speaks (``espeak_EVENT`` of its ``speak_lib.h``)."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("number", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("time_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class Library:
    """espeak-ng's library, which tells where each word begins. It runs in this process: for recipes only."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libespeak-ng.so.1")
        self.rate_hz = self.library.espeak_Initialize(2, 20_000, None, 0)  # no sound card; pieces of 20 s
        self.pieces: list[np.ndarray] = []
        self.begins: list[tuple[int, int]] = []
        self._callback = _Callback(self._take)  # the library keeps only its address
        self.library.espeak_SetSynthCallback(self._callback)

    def _take(self, samples: object, num: int, events: object) -> int:
        if samples and num > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (num,)).copy())
        at = 0
        while events[at].type:
            position = events[at].text_position - 1
            # A word; one that stands before the last one is no word, it marks the end.
            if events[at].type == 1 and position > (self.begins[-1][0] if self.begins else -1):
                self.begins.append((position, events[at].sample))
            at += 1
        return 0

    def say(self, text: str, voice: Voice) -> Said:
        """A text with the places of its words; numbers in it must be words already."""
        self.pieces.clear()
        self.begins.clear()
        written = text.encode() + b"\0"
        self.library.espeak_SetVoiceByName(voice.name.encode())
        self.library.espeak_SetParameter(1, voice.speed, 0)
        self.library.espeak_SetParameter(3, voice.pitch, 0)
        self.library.espeak_Synth(written, len(written), 0, 1, 0, 1, None, None)
        self.library.espeak_Synchronize()
        wave = np.concatenate(self.pieces).astype(np.float32) / 32768
        wave = soxr.resample(wave, self.rate_hz, RATE_HZ)
        wave *= PEAK / np.abs(wave).max()
        starts = [sample * RATE_HZ // self.rate_hz for _, sample in self.begins]
        # Words that are said as one ("of the") have one event, and share its stretch by their letters.
        tokens = [(match.start(), match.group()) for match in re.finditer(r"[A-Za-z]+(?:'[A-Za-z]+)*", text)]
        words, places = [], []
        for k, (position, _) in enumerate(self.begins):
            nearest = self.begins[k + 1][0] if k + 1 < len(self.begins) else len(text)
            shared = [word.lower() for at, word in tokens if position <= at < nearest]
            if not shared:  # the second half of a word that is said as two, or the end
                if places and position < len(text):
                    places[-1] = (places[-1][0], starts[k + 1] if k + 1 < len(starts) else len(wave))
                continue
            begin, end = starts[k], starts[k + 1] if k + 1 < len(starts) else len(wave)
            loud = np.flatnonzero(np.abs(wave[begin:end]) > 0.01)
            end = min(end, begin + int(loud[-1]) + 160) if len(loud) else end
            edges = begin + np.cumsum([0, *map(len, shared)]) / sum(map(len, shared)) * (end - begin)
            words += shared
            places += [(int(a), int(b)) for a, b in itertools.pairwise(edges)]
        if tuple(words) != spoken_words(text):
            raise SystemExit(f"espeak-ng said {words} for {text!r}")
        return Said(wave[: places[-1][1] + 800], tuple(words), voice.name, tuple(places))


def in_words(text: str) -> str:
    """A text with its numbers in words."""
    return re.sub(r"\d+", lambda number: " ".join(spoken_words(number.group())), text)


def make_clips(out: Path) -> None:
    """Clips for training and testing with the places of their words, as one file."""
    library, found = Library(), espeak()
    if found is None:
        raise SystemExit("espeak-ng is not installed, or lacks voices")
    waves: list[np.ndarray] = []
    rows: list[dict[str, object]] = []

    def keep(name: str, said: Said, words: Sequence[str] | None = None) -> None:
        waves.append((said.wave * 32767).astype(np.int16))
        places = said.places if words is None else [(0, len(said.wave))]
        rows.append({"set": name, "voice": said.voice, "words": words or said.words, "places": places})

    def whole(split: str, name: str, number: int, text: str) -> Said:
        rng = random.Random(f"{name}/{number}")
        voice = Voice(
            rng.choice(found.accents), rng.choice(found.of(split)), rng.choice(PITCHES), rng.choice(SPEEDS)
        )
        return library.say(in_words(text), voice)

    started = time.process_time()
    for number, text in enumerate(texts("train", 1, WHOLE)):
        keep("train", whole("train", "train", number, text))
    others = other_words(OTHERS + 100)
    for number, word in enumerate(others):
        name = "others" if number < OTHERS else "test others"
        keep(name, whole("train" if number < OTHERS else "test", name, number, word), [OTHER])
    for number, variant in enumerate(found.of("train")):  # every word alone, in every voice
        rng = random.Random(f"alone/{variant}")
        accent = rng.choice(found.accents)
        for word in shipped().words:
            voice = Voice(accent, variant, rng.choice(PITCHES), rng.choice(SPEEDS))
            keep(f"alone {number}", library.say(ALONE.get(word, word), voice), [word])
    for split in ("val", "test", "speak"):
        joined_by = Speakers(split, "shipped")
        for number, text in enumerate(texts("val" if split == "val" else "test", 7, EACH_TEST)):
            keep(f"{split} whole", whole(split, f"{split} whole", number, text))
            keep(f"{split} joined", joined_by.say(text, random.Random(f"{split} joined/{number}")))
    out.parent.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum([0, *map(len, waves)])
    np.savez(out, waves=np.concatenate(waves), ends=ends, rows=json.dumps(rows))
    spent = time.process_time() - started
    print(f"{len(rows)} clips, {ends[-1] / RATE_HZ / 60:.0f} min, made in {spent:.0f} s of one core")


class Clips:
    """The clips of a file, by set."""

    def __init__(self, path: Path) -> None:
        file = np.load(path)
        self.waves, self.ends, self.rows = file["waves"], file["ends"], json.loads(str(file["rows"]))
        self.sets: dict[str, list[int]] = {}
        for index, row in enumerate(self.rows):
            self.sets.setdefault(row["set"], []).append(index)
        for members in self.sets.values():
            members.sort(key=lambda i: int(self.ends[i + 1] - self.ends[i]))

    def alone(self, number: int) -> dict[str, np.ndarray]:
        """Every word by itself, of one of the voices that are not shipped."""
        return {self.words(index)[0]: self.wave(index) for index in self.sets[f"alone {number}"]}

    def wave(self, index: int) -> np.ndarray:
        return self.waves[self.ends[index] : self.ends[index + 1]].astype(np.float32) / 32767

    def words(self, index: int) -> list[str]:
        return self.rows[index]["words"]

    def said(self, index: int) -> Said:
        row = self.rows[index]
        return Said(self.wave(index), tuple(row["words"]), row["voice"], tuple(map(tuple, row["places"])))


# --- training -------------------------------------------------------------------------------------


class Net:
    """A net that gives classes at positions, and how it takes sound."""

    def __init__(
        self, module: nn.Module, mel: Callable[[Tensor], Tensor], per_s: float, step_s: float
    ) -> None:
        self.module, self.mel, self.per_s, self.step = module, mel, per_s, round(step_s * RATE_HZ)

    def log_probs(
        self, waves: Sequence[np.ndarray], change: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """float32 [N, S, C] of clips, filled with silence to one length."""
        longest = -(-max(map(len, waves)) // self.step) * self.step
        mel_NMF = self.mel(
            torch.from_numpy(np.stack([np.pad(wave, (0, longest - len(wave))) for wave in waves]))
        )
        return self.module(mel_NMF if change is None else change(mel_NMF)).log_softmax(-1)


def joined_with_others(rng: random.Random, voices: Voices, num_words: int) -> Said:
    """Random words in one of the voices, a strange one among them now and then; once in forty only noise."""
    if rng.random() < 0.025:
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(num_words * RATE_HZ // 2)
        return Said((0.1 * noise).astype(np.float32), (), "", ())
    of_word = rng.choice(voices.of_word)
    words = [rng.choice(tuple(of_word)) for _ in range(num_words)]
    gaps = [rng.uniform(0, 0.1) if rng.random() < 0.8 else rng.uniform(0.1, 0.3) for _ in words[1:]]
    sounds = [of_word[word] for word in words]
    if rng.random() < 0.3:
        words, sounds, gaps = (
            [*words, OTHER],
            [*sounds, rng.choice(voices.others)],
            [*gaps, rng.uniform(0, 0.2)],
        )
    pieces, places, at = [], [], 0
    for gap, sound in zip((rng.uniform(0, 0.3), *gaps), sounds, strict=True):
        begin = at + round(gap * RATE_HZ)
        places.append((begin, begin + len(sound)))
        pieces += [np.zeros(begin - at, np.float32), sound]
        at = places[-1][1]
    pieces.append(np.zeros(round(rng.uniform(0, 0.3) * RATE_HZ), np.float32))
    return Said(np.concatenate(pieces), tuple(words), "", tuple(places))


class Voices:
    """Words alone: of the shipped voices, which count twice as everybody hears them, and of all others."""

    def __init__(self, clips: Clips) -> None:
        ours = [speaker(name) for name in shipped().of("train")]
        num = sum(name.startswith("alone ") for name in clips.sets)
        self.of_word = (*ours, *ours, *(clips.alone(number) for number in range(num)))
        self.others = [clips.wave(index) for index in clips.sets["others"]]
        # Words backwards are none, however much they sound like some.
        self.others += [
            one[::-1] for of_word in self.of_word[::4] for one in of_word.values() if len(one) > 6000
        ]


def faster(wave: np.ndarray, factor: float) -> np.ndarray:
    """The clip at another speed; the pitch goes with it."""
    at = np.arange(0, len(wave) - 1, factor, dtype=np.float32)
    return np.interp(at, np.arange(len(wave), dtype=np.float32), wave).astype(np.float32)


def noisy(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of the time with white noise, 12 to 50 dB below the clip."""
    if rng.random() < 0.5:
        return wave
    level = float(np.sqrt(np.mean(wave**2))) * 10 ** (-rng.uniform(12, 50) / 20)
    return wave + rng.standard_normal(len(wave)).astype(np.float32) * np.float32(level)


def coloured(mel_NMF: Tensor) -> Tensor:
    """Each clip in a room of its own: a slope and a wave over the bands; some bands and moments silent."""
    num, bands, frames = mel_NMF.shape
    at_M = torch.linspace(-1, 1, bands)
    slope_N1, swing_N1, phase_N1 = (
        torch.randn(num, 1) * 0.12,
        torch.randn(num, 1) * 0.08,
        torch.rand(num, 1) * 6.3,
    )
    curve_NM = slope_N1 * at_M + swing_N1 * torch.sin(4 * at_M + phase_N1)
    mel_NMF = mel_NMF + curve_NM[:, :, None]
    silence = float(mel_NMF.amin())
    for clip in range(num):
        if random.random() < 0.3:
            low, wide = random.randrange(bands), random.randint(1, bands // 8)
            mel_NMF[clip, low : low + wide] = silence
        if random.random() < 0.15:
            mel_NMF[clip, random.randint(bands * 2 // 3, bands) :] = silence
        if random.random() < 0.3:
            start = random.randrange(frames)
            mel_NMF[clip, :, start : start + random.randint(1, 6)] = silence
    return mel_NMF


def train(net: Net, words: Sequence[str], clips: Clips, steps: int, seed: int = 0) -> None:
    """Train in place."""
    number = {word: i for i, word in enumerate(words)}
    random.seed(seed)
    torch.manual_seed(seed)
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    voices = Voices(clips)
    module = net.module
    optimizer = torch.optim.AdamW(module.parameters(), RATE, betas=BETAS, weight_decay=DECAY)
    warm = max(1, steps // 30)
    pool = clips.sets["train"]
    started, told, seen = time.process_time(), 0.0, 0
    for step in range(steps):
        factor = min(1.0, (step + 1) / warm) * (
            FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor
        # Whole clips of about one length, and joined ones of about as many words as fit into it.
        at = rng.randrange(len(pool) - BATCH)
        seconds = (clips.ends[pool[at] + 1] - clips.ends[pool[at]]) / RATE_HZ
        said = [clips.said(index) for index in pool[at : at + BATCH]]
        said += [
            joined_with_others(rng, voices, max(1, round(seconds / 0.5) - rng.randint(0, 1)))
            for _ in range(BATCH)
        ]
        speeds = [rng.uniform(0.88, 1.14) for _ in said]
        waves = [noisy(faster(one.wave, speed), noise) for one, speed in zip(said, speeds, strict=True)]
        log_probs_NSC = net.log_probs(waves, coloured)
        targets = [
            place_classes(
                [number[word] for word in one.words],
                [(start / RATE_HZ / speed, end / RATE_HZ / speed) for start, end in one.places or ()],
                log_probs_NSC.shape[1],
                net.per_s,
            )
            for one, speed in zip(said, speeds, strict=True)
        ]
        loss = F.nll_loss(
            log_probs_NSC.flatten(0, 1), torch.from_numpy(np.concatenate(targets)), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        told, seen = told + loss.item(), seen + 1
        if (step + 1) % 200 == 0:
            wers = [score(net, words, clips, f"val {kind}", 30) for kind in ("whole", "joined")]
            spent = time.process_time() - started
            whole, joint = (round(wer, 3) for wer in wers)
            means = f"loss {told / seen:.3f}, WER on val {whole} whole, {joint} joined"
            print(f"step {step + 1}: {means}, {spent:.0f} s", flush=True)
            told, seen = 0.0, 0


# --- scoring --------------------------------------------------------------------------------------


def edits(said: Sequence[str], heard: Sequence[str]) -> int:
    """Words to put in, take out or change."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        before, row = row, [i]
        for j, other in enumerate(heard, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (word != other)))
    return row[-1]


@torch.inference_mode()
def score(
    net: Net, words: Sequence[str], clips: Clips, name: str, num: int = 10**6, cost: float | None = None
) -> float:
    """Word error rate over a set, each clip by itself."""
    wrong = total = 0
    options = {} if cost is None else {"word_cost": cost}
    members = clips.sets[name]
    net.module.eval()
    for index in members[:: max(1, len(members) // num)]:
        found = decode(net.log_probs([clips.wave(index)])[0].numpy(), **options)
        wrong += edits(clips.words(index), [words[i] for i in found])
        total += len(clips.words(index))
    net.module.train()
    return wrong / total


def the_recogniser(words: Sequence[str]) -> Net:
    module = Recogniser(words)
    return Net(module, module.mel, POSITIONS_PER_S, 0.06)


class EarWithClasses(nn.Module):
    """The tower and a linear layer, which is thrown away."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        from tinymodal.model.audio_towers import audio_encoder_of, audio_tower_config

        self.config = audio_tower_config({"model_type": "tinymodal_ear"})
        kind = audio_encoder_of(self.config)
        self.hearing = kind.hearing_of(self.config)
        self.tower = kind.build(self.config)
        self.classes = nn.Linear(self.tower.width, num_classes)

    def mel(self, wave_NT: Tensor) -> Tensor:
        return torch.stack([self.hearing.prepare(wave)[0] for wave in wave_NT])

    def forward(self, mel_NMF: Tensor) -> Tensor:
        return self.classes(self.tower(mel_NMF).values)


def save_ear(module: EarWithClasses, out: Path) -> None:
    """The tower as a part that a recipe names by its folder."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in module.tower.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    module.config.save_pretrained(out)


def main(what: str, path: Path, out: Path | None, steps: int | None) -> None:
    if what == "clips":
        make_clips(path)
        return
    if out is None:
        raise SystemExit(f"{what}: name a folder for the weights as well")
    clips, steps = Clips(path), steps or STEPS[what]
    words = (*shipped().words, OTHER)
    net: Net
    if what == "recogniser":
        net = the_recogniser(words)
    else:
        module = EarWithClasses(1 + 2 * len(words))
        net = Net(module, module.mel, 25.0, module.hearing.step_s)
    num = sum(p.numel() for p in net.module.parameters())
    print(f"{what}: {num:,} parameters, {steps} steps of {BATCH} joined and {BATCH} whole clips")
    started = time.process_time()
    train(net, words, clips, steps)
    record = {"steps": steps, "cpu_seconds": round(time.process_time() - started), "parameters": num}
    costs = {
        cost: score(net, words, clips, "val whole", cost=cost) for cost in (0.0, 1.0, 2.0, 3.0, 4.0, 6.0)
    }
    print("WER on val by cost of a word:", {cost: round(wer, 4) for cost, wer in costs.items()})
    wers = {
        name: score(net, words, clips, name)
        for name in clips.sets
        if name.split()[0] in ("val", "test", "speak")
    }
    record["wer"] = {name: round(wer, 4) for name, wer in wers.items()}
    print(json.dumps(record, indent=1))
    if isinstance(net.module, Recogniser):
        net.module.save(out)
    else:
        save_ear(net.module, out)
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("what", choices=["clips", "ear", "recogniser"])
    arguments.add_argument("clips", type=Path)
    arguments.add_argument("out", type=Path, nargs="?")
    arguments.add_argument("--steps", type=int, help=f"of training; {STEPS} if left out")
    given = arguments.parse_args()
    main(given.what, given.clips, given.out, given.steps)
