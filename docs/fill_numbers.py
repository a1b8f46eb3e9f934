"""Write the measured numbers into README.md, from the records of the runs. Nobody types a score.

    python docs/fill_numbers.py            write them
    python docs/fill_numbers.py --check    exit code 1 if README.md says something else

Two records: ``tinymodal/starter/record.json`` lies beside the shipped model,
``docs/records/demo-report.json`` is a copy of a demo's ``runs/demo/report.json``. What stands between
``<!-- numbers -->`` and ``<!-- end of numbers -->`` is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinymodal.eval.pages.report import SOUND, sound_numbers

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
STARTER = ROOT / "tinymodal" / "starter" / "record.json"
DEMO = ROOT / "docs" / "records" / "demo-report.json"
BEGIN, END = "<!-- numbers -->", "<!-- end of numbers -->"
COLUMNS = {
    "new": "new scenes",
    "unseen_pairs": "unseen pairs",
    "shuffled": "pictures shuffled",
    "constant": "best constant",
}
STAGES = {
    "align": "after align alone",
    "instruct": "after align and instruct",
    "instruct_without_align": "instruct without align",
}
NUM_SOUND_NUMBERS = sum(map(len, SOUND.values()))
MADE_BY = {
    STARTER: "training the starter (recipes/starter*.toml)",
    DEMO: "copying runs/demo/report.json there",
}


class RecordError(Exception):
    """A record is missing, or does not hold what README.md tells."""


def read(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        RecordError: it is not there, or no JSON.
    """
    if not path.is_file():
        raise RecordError(f"{path}: no such record; it is made by {MADE_BY.get(path, 'a run')}")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path}: not JSON ({error}); copy the record again") from None
    return found


def numbers(starter: Mapping[str, Any], demo: Mapping[str, Any]) -> str:
    """What README.md says, as Markdown.

    Args:
        starter: ``record.json``: ``recipes``, ``scores``, ``seeds``.
        demo: ``report.json`` of a demo.

    Raises:
        RecordError: a key is missing.
    """
    try:
        return "\n\n".join((*_starter(starter), *_demo(demo)))
    except (KeyError, TypeError) as error:
        raise RecordError(f"a record lacks the key {error}; make it again with this version") from None


def filled(page: str, block: str) -> str:
    """``page`` with ``block`` between the marks.

    Raises:
        RecordError: the marks are not there, once each and in order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise RecordError(f"README.md: expected '{BEGIN}' and '{END}' once each, in this order")
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def _starter(record: Mapping[str, Any]) -> list[str]:
    seeds = record["seeds"]
    seeds = ", ".join(f"{k} {v}" for k, v in seeds.items()) if isinstance(seeds, Mapping) else seeds
    rows = ["| recipe | steps | time | machine | torch | commit |", "|---|--:|--:|---|---|---|"]
    for name, run in record["recipes"].items():
        cells = (
            f"[{name}](recipes/{name}.toml)",
            f"{run['steps']:,}",
            clock(run["seconds"]),
            machine(run["machine"]),
            str(run["versions"]["torch"]),
            f"`{str(run['commit'])[:10]}`",
        )
        rows.append(f"| {' | '.join(cells)} |")
    parts = record["parts"]
    codec, ear, judge = parts["codec"], parts["ear"], parts["recogniser"]
    return [
        f"**The starter model**, accuracy in %, seeds: {seeds}.",
        scores(record["scores"]),
        "Clips joined of words, by voices that it learned from and by others:",
        sounds(record["scores"]),
        f"Of what espeak-ng speaks whole, by voices that are new, it hears "
        f"{percent(record['whole']['wer_unseen_voices'])} % of the words wrongly, and answers "
        f"{percent(record['whole']['mean_new'])} % of the questions.",
        f"Its answers were judged by the built-in recogniser ({judge['parameters']:,} parameters, trained on "
        f"clips and never on a model), which by itself mishears "
        f"{percent(judge['wer']['speak whole'])} % of the words of the two voices that it never had either.",
        "How it was trained:",
        "\n".join(rows),
        f"Besides, by scripts: its ear ([starter_audio.py](recipes/starter_audio.py), {ear['steps']:,} "
        f"steps, {clock(ear['cpu_seconds'])} of one core), its codec "
        f"([starter_codec.py](recipes/starter_codec.py), {codec['steps']:,} steps; mel distance "
        f"{codec['held_out']['2']['mel_db']:.1f} dB on voices that it never had). All weights that ship: "
        f"{sum(record['bytes'].values()) / 1e6:.2f} MB.",
    ]


def _demo(report: Mapping[str, Any]) -> list[str]:
    stages = [f"{name} {percent(report['stages'][key]['mean_new'])} %" for key, name in STAGES.items()]
    return [
        "**The demo's model**, made by `make demo`, accuracy in %.",
        scores(report),
        sounds(report),
        f"Mean on new scenes by stage: {'; '.join(stages)}.",
        f"The whole demo took {clock(report['seconds'])} ({report['cpu_seconds']:,.0f} s of CPU), scoring "
        f"included, and at most {report['peak_memory_mb']:,.0f} MB, on {machine(report['machine'])} with "
        f"torch {report['versions']['torch']} and transformers {report['versions']['transformers']}, at "
        f"commit `{str(report['commit'])[:10]}`.",
    ]


def scores(found: Mapping[str, Any]) -> str:
    """The table of ``{kinds: {name: {new, unseen_pairs, shuffled, constant, n}}, mean: {...}}``."""
    rows = [f"| kind | {' | '.join(COLUMNS.values())} | questions |", "|---|" + "--:|" * (len(COLUMNS) + 1)]
    for kind, row in found["kinds"].items():
        rows.append(f"| {kind} | {' | '.join(percent(row[key]) for key in COLUMNS)} | {row['n']:,} |")
    means = " | ".join(f"**{percent(found['mean'][key])}**" for key in COLUMNS)
    total = sum(row["n"] for row in found["kinds"].values())
    rows.append(f"| **mean** | {means} | {total:,} |")
    return "\n".join(rows)


def sounds(found: Mapping[str, Any]) -> str:
    """The table of ``{hear, spoken_questions, speak}``."""
    rows = [f"| {name} | {number} |" for name, number in sound_numbers(found)]
    if len(rows) < NUM_SOUND_NUMBERS:
        raise KeyError("hear, spoken_questions or speak")
    return "\n".join(("| hearing and speaking | |", "|---|--:|", *rows))


def percent(share: float | None) -> str:
    """``0.953`` -> ``95.3``; None, where a kind has no such questions -> ``–``."""
    return "–" if share is None else f"{100 * share:.1f}"


def clock(seconds: float) -> str:
    """``3725`` -> ``62 min``; below ten minutes with a decimal."""
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 10 else f"{minutes:,.0f} min"


def machine(found: Mapping[str, Any] | str) -> str:
    """One line of a machine's record."""
    if isinstance(found, str):
        return found
    told = f"{found['cores']} cores of {found['processor']}"
    return f"{told}, {found['gpu']}" if found.get("gpu") else told


def main() -> int:
    words = argparse.ArgumentParser(description="Write the measured numbers into README.md.")
    words.add_argument("--check", action="store_true", help="only tell whether README.md says them already")
    check = words.parse_args().check
    try:
        before = README.read_text(encoding="utf-8")
        after = filled(before, numbers(read(STARTER), read(DEMO)))
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if check and before != after:
        print("error: README.md differs from the records; run python docs/fill_numbers.py", file=sys.stderr)
        return 1
    if not check:
        README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
