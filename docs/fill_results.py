"""Write docs/results.md from the records of the benchmarks. Nobody types a number.

    python docs/fill_results.py            write it
    python docs/fill_results.py --check    exit code 1 if the page says something else

A record is what a benchmark writes with ``--json``. Those in ``benchmarks/records/`` are shown: first those
of :data:`TOLD` in their order, then any other, by name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
RECORDS = ROOT / "benchmarks" / "records"
TOLD = {
    "train_step": (
        "A training step",
        "Samples a second on a CPU, with small models whose shares of work are those of SigLIP-so400m with "
        "Qwen2.5-0.5B (0.9B) and with Phi-2 (3.1B): every width a seventh, all blocks. Both ways read the "
        "same samples with the same weights, and their losses agree to five digits. What is called *real "
        "sizes* is counted for the real models, operator by operator, on tensors without numbers. The plain "
        "way recomputes its activations, as it is shipped; ours does not need to.",
    ),
    "memory": (
        "What a step holds",
        "At its worst moment, counted likewise in the real sizes, with the activations of eight samples.",
    ),
    "gpu": (
        "On one GPU",
        "Random models of the real sizes in bfloat16; ours and the plain way one after another.",
    ),
    "data_pipeline": (
        "Reading pictures",
        "On one core: decoded, resized to 384 x 384 and normalised, against Pillow and numpy.",
    ),
    "scaling": ("Several processes", "Gradient and speed of two processes against one, with gloo on a CPU."),
    "evaluation": (
        "Asking and scoring",
        "The starter model asked about made scenes in batches by length, and one by one with the same "
        "replies; and 100,000 answers scored by the whole command in a process with one thread, for which "
        "there is no plain way.",
    ),
    "inference": (
        "Answering",
        "Sixteen questions together against one by one, the first token of a second turn against that of the "
        "first, and the language model in 8 bits; the starter model, and a random one of the 0.9B shape at a "
        "seventh of its widths.",
    ),
    "serving": (
        "Serving",
        "64 clients ask a server for a minute, one in ten hangs up in the middle of an answer; every answer "
        "is compared with the one given alone.",
    ),
    "kills": (
        "Killed and gone on",
        "A training run is ended with SIGKILL at random moments and while it saves, and started again each "
        "time. In the end its weights, its optimizer's state, its metrics and its samples are compared with "
        "those of the run that nobody touched.",
    ),
}
"""Record -> heading and what was measured."""
INTRODUCTION = """# Results

<!-- made by docs/fill_results.py from benchmarks/records; change neither by hand -->

What was measured, on which machine, at which commit. *Ours* is the engine of this repository; *plain* is the
way of the systems before it, built from the same modules: right padding to the longest, logits everywhere,
every tower block, a zero picture for each row without one, rows merged one by one, activations recomputed
([benchmarks/plain.py](../benchmarks/plain.py)). Both run in one process, on a CPU by turns. A ratio above 1
is in our favour, whichever way its unit counts.

Each benchmark is one command, with `--quick` for a look and `--json FILE` for a record:
`python benchmarks/train_step.py --quick`.
"""


class RecordError(Exception):
    """A record does not hold what the page tells."""


def read(folder: Path = RECORDS) -> dict[str, dict[str, Any]]:
    """The records by name, in the order of the page.

    Raises:
        RecordError: a file is no JSON.
    """
    found = {}
    for path in sorted(folder.glob("*.json"), key=lambda p: _rank(p.stem)):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordError(f"{path}: not JSON ({error}); run the benchmark again") from None
    return found


def page(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page.

    Raises:
        RecordError: a key is missing.
    """
    parts = [INTRODUCTION]
    for name, record in records.items():
        try:
            parts.append(_section(name, record))
        except (KeyError, TypeError) as error:
            raise RecordError(f"benchmarks/records/{name}.json lacks the key {error}; run it again") from None
    return "\n".join(parts)


def _rank(name: str) -> tuple[int, str]:
    # gpu-h200 stands where gpu does.
    first = name.partition("-")[0]
    return (list(TOLD).index(first) if first in TOLD else len(TOLD), name)


def _section(name: str, record: Mapping[str, Any]) -> str:
    heading, what = TOLD.get(name.partition("-")[0], (name.replace("_", " "), ""))
    card = record.get("card") or record["machine"].get("gpu")
    lines = [f"## {heading}{f': {card}' if card and card != 'none' else ''}", ""]
    if what:
        lines += [what, ""]
    if record.get("quick"):
        lines += ["*A quick run: fewer samples and rounds than the numbers deserve.*", ""]
    if "kills" in record:
        lines += [_kills(record), ""]
    if record.get("rows"):
        lines += [table(record["rows"]), ""]
    lines.append(_made(record))
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a record in Markdown."""
    lines = ["| | ours | plain | | ratio |", "|---|--:|--:|---|--:|"]
    for row in rows:
        plain = "" if row["plain"] is None else figure(row["plain"])
        ratio = "" if row["ratio"] is None else f"**{row['ratio']:.2f}**"
        lines.append(f"| {row['name']} | {figure(row['ours'])} | {plain} | {row['unit']} | {ratio} |")
    return "\n".join(lines)


def figure(value: float) -> str:
    """``12345.6`` -> ``12,346``, ``1.2345`` -> ``1.234``: four digits are read."""
    return f"{value:,.0f}" if value == 0 or abs(value) >= 1000 else f"{value:.4g}"


def _kills(record: Mapping[str, Any]) -> str:
    same = "all of them, bit for bit" if record["identical"] is True else str(record["identical"])
    return f"Killed {record['kills']} times, gone on {record['resumed']} times; identical: {same}."


def _made(record: Mapping[str, Any]) -> str:
    versions, made = record["versions"], record["machine"]
    on = f"{made['cores']} cores of {made['processor']}, {made['threads']} threads"
    commit = str(record["commit"])
    changed = " with changes" if commit.endswith("+") else ""
    return (
        f"{on}; torch {versions['torch']}, transformers {versions['transformers']}; commit "
        f"`{commit[:10]}`{changed}, {record['time'][:10]}."
    )


def main() -> int:
    words = argparse.ArgumentParser(description="Write docs/results.md from the records of the benchmarks.")
    words.add_argument("--check", action="store_true", help="only tell whether the page says so already")
    check = words.parse_args().check
    try:
        text = page(read())
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if check and (not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text):
        print(
            "error: docs/results.md differs from the records; run python docs/fill_results.py",
            file=sys.stderr,
        )
        return 1
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
