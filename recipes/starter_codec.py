"""Train the codec of the starter parts: 25 frames a second of two codes, for voices of espeak-ng.

    python recipes/starter_codec.py runs/starter-codec
    python recipes/starter_codec.py runs/my-codec --sounds my/recordings

About eight minutes of one core; run again, it goes on where it was stopped. The codec is then in the run's
folder ``codec``. Made speech is that of the two voices that the starter model speaks with, as much of those
of ``train``, and of none that anything is measured with; English beside the words of made scenes keeps the
codec from knowing only those. Without espeak-ng it is joined from the clips that TinyModal ships, and sounds
so.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from tinymodal.core.types import Text
from tinymodal.data.scenes import Random
from tinymodal.data.sounds import SPEAKS, Speakers
from tinymodal.data.synthetic import Scenes
from tinymodal.data.voices import espeak
from tinymodal.model.small_codec import DEFAULTS
from tinymodal.train.codec_lessons import CodecTraining, Sounds
from tinymodal.train.codec_training import SoundFolder, train_codec


class MadeSpeech:
    """Sentences that are spoken when they are asked for, and kept: 16-bit samples, 2 minutes to the 4 MB."""

    def __init__(self, num: int, seed: int, split: str) -> None:
        self.num, self.seed, self.split = num, seed, split
        self.others = Speakers(split, "auto")  # type: ignore[arg-type]
        self.own = Speakers("speak", "auto", SPEAKS)
        forms = ("mixed", "captions")
        self.scenes = [Scenes(split="train", seed=seed, form=form, picture="written") for form in forms]  # type: ignore[arg-type]
        self.english = english() if espeak() is not None else []
        self.kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Tensor:
        if index not in self.kept:
            rng = Random(f"codec/{self.split}/{self.seed}/{index}")
            speakers = self.own if index % 2 else self.others
            wave = torch.from_numpy(speakers.say(self.text(index, rng), rng).wave.copy())
            # Recordings differ in loudness; those of espeak-ng do not.
            wave *= 10 ** (rng.uniform(-6, 3) / 20)
            self.kept[index] = (wave * 32767).round().short()
        return self.kept[index].float() / 32767

    def text(self, index: int, rng: Random) -> str:
        """What is said: of three texts one is English, two are of scenes."""
        if self.english and index % 3 == 0:
            return self.english[rng.randint(0, len(self.english) - 1)][:110]
        parts = [part for m in self.scenes[index % 2].sample(index).messages for part in m.parts]
        texts = [part.text.strip() for part in parts if isinstance(part, Text) and part.text.strip()]
        return texts[rng.randint(0, len(texts) - 1)][:160]


def english() -> list[str]:
    """Sentences of the Python documentation, without its code."""
    import re
    from pydoc_data.topics import topics

    lines = (line.strip() for text in topics.values() for line in text.splitlines())
    return sorted({line for line in lines if re.fullmatch(r"[A-Za-z][A-Za-z ,.;'’-]{30,}", line)})


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("out", type=Path, help="folder of the run")
    arguments.add_argument(
        "--sounds", type=Path, help="folder of recordings to learn from, in place of made speech"
    )
    arguments.add_argument("--held-out", type=Path, help="folder of recordings that are only measured")
    arguments.add_argument("--clips", type=int, default=1600, help="made clips")
    for name, default in (("steps", 2000), ("seed", 0)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    asked = arguments.parse_args()
    training = CodecTraining(steps=asked.steps, seed=asked.seed)
    rate_hz = DEFAULTS["rate_hz"]
    held_out: Sounds | None
    if asked.sounds is not None:
        held_out = SoundFolder(asked.held_out, rate_hz) if asked.held_out else None
        train_codec({}, SoundFolder(asked.sounds, rate_hz), asked.out, training, held_out)
    else:
        held_out = MadeSpeech(60, asked.seed + 1, "val")
        train_codec({}, MadeSpeech(asked.clips, asked.seed, "train"), asked.out, training, held_out)


if __name__ == "__main__":
    main()
