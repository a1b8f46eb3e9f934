"""Ship the starter model and its language part, with the record of how they were made and what they score.

    python recipes/starter_record.py --seed 2026

Run once after the recipes ``starter-vision``, ``starter-language``, ``starter``, ``starter-omni`` and
``starter-listening``. Weights are rounded to 16 bits and scored as they are shipped, on a test split whose
seed nobody trained or chose on. The recogniser that judges the speech lies beside them: it measures, and no
model is made of it.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tinymodal.compose.build import Composed, load
from tinymodal.data.voices import espeak
from tinymodal.demo import Tests, score_all, score_speech
from tinymodal.eval.run import run
from tinymodal.eval.tasks import sounds
from tinymodal.infer.engine import Engine

OUT = Path("tinymodal/starter")
SIZES = {"per_kind": 300, "per_kind_unseen": 200, "clips": 600, "per_kind_asked": 100, "per_kind_aloud": 50}
SHIPPED = {
    "language": Path("runs/starter-listening/parts/language"),
    "model": Path("runs/starter-omni/model"),
}
RECIPES = ("starter-vision", "starter-language", "starter-listening", "starter", "starter-omni")
LIMIT_MB = 8


def ship(source: Path, out: Path) -> int:
    """Copy a folder with its weights rounded to float16, those in folders of its own too; their bytes.

    Code is left behind: the package that ships the folder also reads it.
    """
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.suffix == ".py":
            continue
        if file.is_dir():
            ship(file, out / file.name)
        elif file.suffix == ".safetensors":
            tensors = {
                name: tensor.to(torch.float16).contiguous() for name, tensor in load_file(file).items()
            }
            save_file(tensors, out / file.name, metadata={"format": "pt"})
        elif file.suffix == ".json":
            document = without(json.loads(file.read_text()), ("auto_map", "_name_or_path"))
            (out / file.name).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        else:
            shutil.copy(file, out / file.name)
    return sum(file.stat().st_size for file in out.rglob("*.safetensors"))


def without(document: object, keys: tuple[str, ...]) -> object:
    """A JSON document without ``keys``, at any depth: code that is not shipped, folders of one machine."""
    if isinstance(document, dict):
        return {key: without(value, keys) for key, value in document.items() if key not in keys}
    return [without(value, keys) for value in document] if isinstance(document, list) else document


def made(run: Path) -> dict[str, object]:
    """How a run was made: its starts (time, commit, versions, machine), steps and seconds by stage."""
    stages: dict[str, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        stages[row["stage"]] = {
            "steps": row["step"],
            "seconds": round(row["seconds"]),
            "loss": round(row["loss"], 4),
        }
    starts = json.loads((run / "run.json").read_text())["starts"]
    return {
        "steps": sum(int(stage["steps"]) for stage in stages.values()),
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "commit": starts[-1]["commit"],
        "machine": starts[-1]["machine"],
        "versions": starts[-1]["versions"],
        "stages": stages,
        "starts": [{"time": start["time"], "commit": start["commit"]} for start in starts],
    }


def speech_parts() -> dict[str, object]:
    """How the nets were made that no recipe in TOML makes: steps, size, and what they score alone."""
    codec = Path("runs/starter-codec")
    return {
        "ear": json.loads(Path("runs/starter-audio/parts/audio/record.json").read_text()),
        "codec": {
            "steps": json.loads((codec / "run.json").read_text())["training"]["steps"],
            "held_out": json.loads((codec / "held_out.json").read_text()),
        },
        "recogniser": json.loads((OUT / "recogniser" / "record.json").read_text()),
    }


def whole(composed: Composed, seed: int) -> dict[str, float]:
    """What is heard of sentences that espeak-ng speaks whole, by voices of ``test``."""
    if espeak() is None:
        raise SystemExit("espeak-ng is not installed, or lacks voices")
    tests = sounds.benchmarks(seed, SIZES["clips"], SIZES["per_kind_asked"], speaker="espeak")
    at, engine = Path("runs/starter-omni/scores") / f"{seed}-whole", Engine(composed)
    heard, asked = (run(tests[key], engine, at).numbers for key in ("unseen_voices", "asked"))
    return {"wer_unseen_voices": heard["wer"], "mean_new": asked["mean"]}


def main(seed: int) -> None:
    sizes = {name: ship(source, OUT / name) for name, source in SHIPPED.items()}
    total_mb = sum(sizes.values()) / 1e6
    if total_mb > LIMIT_MB:
        raise SystemExit(f"the shipped weights are {total_mb:.1f} MB, the limit is {LIMIT_MB} MB")
    composed, tests = load("starter"), Tests(seed, SIZES)
    at = Path("runs/starter-omni/scores") / str(seed)
    scores = score_all(composed, tests, at, "starter model")
    scores |= score_speech(composed, tests, at, "starter model")
    record = {
        "recipes": {name: made(Path("runs") / name) for name in RECIPES},
        "parts": speech_parts(),
        "bytes": sizes,
        "seeds": {"test": seed, **SIZES},
        "scores": scores,
        "whole": whole(composed, seed),
    }
    (OUT / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["scores"], indent=2))
    print(f"{total_mb:.2f} MB of weights in {OUT}")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument(
        "--seed", type=int, required=True, help="of the test split; take one that is fresh"
    )
    main(arguments.parse_args().seed)
