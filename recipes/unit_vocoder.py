"""Train a unit vocoder: the codec of a speech head of design ``units``.

    python recipes/unit_vocoder.py runs/units --tower facebook/hubert-base-ls960 --layer 6 --sounds my/voice

One voice speaks best; the vocoder has no other. Centres are found first, by k-means over the tower's features
of 300 sounds; then vocoder and durations are trained. Run again, it goes on where it was stopped. The codec
is then in the run's folder ``codec``. The sizes are those of the published vocoders; on a small machine take
``--channels 64``.
"""

import argparse
from pathlib import Path

import torch

from tinymodal.compose.ears import hearing_of, read_audio_config
from tinymodal.compose.spec import AudioSpec
from tinymodal.compose.towers import load_tower
from tinymodal.model.unit_vocoder import DEFAULTS, UnitCodec
from tinymodal.train.codec_lessons import CodecTraining
from tinymodal.train.codec_training import SoundFolder, train_codec


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("out", type=Path, help="folder of the run")
    arguments.add_argument("--tower", required=True, help="folder or Hub name of an audio tower at 16 kHz")
    arguments.add_argument("--layer", type=int, default=6, help="its hidden state that becomes units")
    arguments.add_argument("--units", type=int, default=DEFAULTS["units"])
    arguments.add_argument("--channels", type=int, default=DEFAULTS["channels"], help="of the vocoder")
    arguments.add_argument("--sounds", type=Path, required=True, help="folder of recordings of one voice")
    arguments.add_argument("--held-out", type=Path, help="folder of recordings that are only measured")
    arguments.add_argument("--steps", type=int, default=100_000)
    arguments.add_argument("--rate", type=float, default=2e-4)
    arguments.add_argument("--seed", type=int, default=0)
    asked = arguments.parse_args()
    torch.manual_seed(asked.seed)
    folder, config = read_audio_config(asked.tower, "--tower")
    hearing = hearing_of(AudioSpec(path=asked.tower), config, folder).to_dict()
    sizes = {"units": asked.units, "channels": asked.channels, "feature_layer": asked.layer}
    codec = UnitCodec({**sizes, "tower": config.to_dict(), "hearing": hearing})
    assert codec.tower is not None
    load_tower(codec.tower, folder, "--tower")
    held_out = SoundFolder(asked.held_out, codec.rate_hz) if asked.held_out else None
    training = CodecTraining(steps=asked.steps, rate=asked.rate, seed=asked.seed, save_every=500)
    train_codec(codec, SoundFolder(asked.sounds, codec.rate_hz), asked.out, training, held_out)


if __name__ == "__main__":
    main()
