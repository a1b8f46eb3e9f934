"""Ship the starter parts and the starter model, with the record of how they were made and what they score.

    python recipes/starter_record.py --seed 2026

Run once after the recipes ``starter-vision``, ``starter-language`` and ``starter``. Weights are rounded to
16 bits and scored as they are shipped, on a test split whose seed nobody trained or chose on.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tinymodal.compose.build import load
from tinymodal.demo import score_all
from tinymodal.eval.tasks.scenes import benchmarks

OUT = Path("tinymodal/starter")
PER_KIND, PER_KIND_UNSEEN = 300, 200
SHIPPED = {
    "vision": Path("runs/starter-vision/parts/vision"),
    "language": Path("runs/starter-language/parts/language"),
    "model": Path("runs/starter/model"),
}
LIMIT_MB = 8


def ship(source: Path, out: Path) -> int:
    """Copy a folder with its weights rounded to float16; the bytes of its weights.

    Code is left behind: the package that ships the folder also reads it.
    """
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.suffix == ".py":
            continue
        if file.suffix == ".safetensors":
            tensors = {
                name: tensor.to(torch.float16).contiguous() for name, tensor in load_file(file).items()
            }
            save_file(tensors, out / file.name, metadata={"format": "pt"})
        elif file.suffix == ".json":
            document = without(json.loads(file.read_text()), ("auto_map", "_name_or_path"))
            (out / file.name).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        else:
            shutil.copy(file, out / file.name)
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


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


def main(seed: int) -> None:
    sizes = {name: ship(source, OUT / name) for name, source in SHIPPED.items()}
    total_mb = sum(sizes.values()) / 1e6
    if total_mb > LIMIT_MB:
        raise SystemExit(f"the shipped weights are {total_mb:.1f} MB, the limit is {LIMIT_MB} MB")
    tests = benchmarks(seed, PER_KIND, PER_KIND_UNSEEN, split="test")
    scores = score_all(load("starter"), tests, Path("runs/starter/scores") / str(seed), "starter model")
    record = {
        "recipes": {
            name: made(Path("runs") / name) for name in ("starter-vision", "starter-language", "starter")
        },
        "bytes": sizes,
        "seeds": {"test": seed, "per_kind": PER_KIND, "per_kind_unseen": PER_KIND_UNSEEN},
        "scores": {"kinds": scores["kinds"], "mean": scores["mean"]},
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
