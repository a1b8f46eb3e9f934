"""Several runs side by side: their curves, where their recipes differ, what they reached, and on what.

Reads what every run folder holds (``metrics.jsonl``, ``recipe.toml``, ``run.json``) and nothing else, so runs
on other machines are compared by copying three small files. Stages are laid end to end.
"""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinymodal.core.errors import CheckpointError, DataError, RecipeError
from tinymodal.eval.during import EVALS
from tinymodal.eval.pages.runs import Grid, Line, page

MAX_POINTS = 800
"""Of a curve: more than a screen shows. Beyond it, each point is the mean of as many steps as need be."""
ABOUT = frozenset({"stage", "step", "seconds", "skipped"})
"""Keys of a row that are no curve."""
NONE, UNKNOWN = "–", "not known"
"""What a table says where there is nothing, and where nobody wrote it down."""
END = 0.05
"""Share of a stage's steps, its last ones, over which its final loss is the mean."""


@dataclass(frozen=True)
class Run:
    """What a run folder tells."""

    name: str
    rows: tuple[dict[str, Any], ...]
    """Of ``metrics.jsonl``."""
    recipe: dict[str, Any] | None
    starts: tuple[dict[str, Any], ...]
    """Of ``run.json``: time, commit, versions and machine, each time the run was begun or went on."""


def compare(folders: Sequence[Path], out: Path) -> Path:
    """Write the page that compares the runs in ``folders`` to ``out``.

    Raises:
        CheckpointError: a folder is not there, or holds no run.
        DataError: a line of its metrics cannot be read; names file and line.
        RecipeError: its recipe cannot be read.
    """
    runs = [read(folder, name) for folder, name in zip(folders, names(folders), strict=True)]
    lines = [line(run) for run in runs]
    text = page(
        lines,
        recipes=differences([run.recipe for run in runs]),
        finals=finals(runs),
        machines=machines(runs),
    )
    if out.is_dir():
        raise DataError(f"{out}: is a folder; give --out the name of a file, e.g. compare.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".unfinished-{out.name}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return out


def read(folder: Path, name: str) -> Run:
    """The run in ``folder``; of one that is being written, as far as it is.

    Raises:
        CheckpointError: the folder is not there, or holds no run.
        DataError: a line of its metrics, or run.json, cannot be read.
        RecipeError: its recipe cannot be read.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        what = "holds no metrics.jsonl" if folder.is_dir() else "is no folder"
        raise CheckpointError(f"{folder}: {what}; expected the folder of a run, e.g. runs/demo")
    rows = tuple(_with_evals(list(_rows(metrics)), folder / EVALS))
    if not rows:
        raise DataError(f"{metrics}: holds no step yet; expected one line for each. Wait, or leave it out")
    recipe, record = None, folder / "run.json"
    if (folder / "recipe.toml").exists():
        try:
            recipe = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{folder / 'recipe.toml'}: not valid TOML: {error}") from None
    starts: tuple[dict[str, Any], ...] = ()
    if record.exists():
        try:
            starts = tuple(dict(start) for start in json.loads(record.read_text(encoding="utf-8"))["starts"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{record}: not what a run writes ({type(error).__name__}: {error}); delete it to compare "
                f"without it"
            ) from None
    return Run(name, rows, recipe, starts)


def names(folders: Sequence[Path]) -> list[str]:
    """What to call each run: its folder's name, and as much of the path before it as tells them apart."""
    whole = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, whole)) + 1):
        short = ["/".join(parts[-length:]) for parts in whole]
        if len(set(short)) == len(set(whole)):
            break
    # One folder given twice is still two columns.
    return [name if name not in short[:n] else f"{name} ({n + 1})" for n, name in enumerate(short)]


def line(run: Run) -> Line:
    """The curves of a run, over steps, tokens and hours since its beginning."""
    steps, held_out = _Builder(), _Builder()
    stages: list[tuple[str, tuple[float, float, float]]] = []
    begin = at = (0.0, 0.0, 0.0)
    for row in run.rows:
        if not stages or stages[-1][0] != row["stage"]:
            begin = at
            stages.append((row["stage"], begin))
        if "loss" in row:
            hours = _number(row.get("seconds")) / 3600
            at = (begin[0] + row["step"], at[1] + _number(row.get("tokens")), begin[2] + hours)
        else:
            at = (begin[0] + row["step"], *at[1:])
        numbers = {key: value for key, value in row.items() if key not in ABOUT and _is_number(value)}
        (steps if "loss" in row else held_out).add(len(stages) - 1, at, numbers)
    return Line(run.name, tuple(stages), (steps.grid(), held_out.grid()))


def differences(recipes: Sequence[Mapping[str, Any] | None]) -> list[tuple[str, list[str]]]:
    """Dotted key and each run's value, for keys that are not the same in all; ``–`` where there is none.

    Stages are told apart by name, and one that not all have is one line.
    """
    flat = [None if recipe is None else dict(_flatten(recipe)) for recipe in recipes]
    lacking = _lacking(recipes)
    found = []
    for key in dict.fromkeys(key for recipe in flat for key in recipe or ()):
        stage = next((name for name in lacking if key.startswith(f"stages.{name}.")), None)
        if stage is None:
            values = [UNKNOWN if recipe is None else recipe.get(key, NONE) for recipe in flat]
            if len(set(values) - {UNKNOWN}) > 1:
                found.append((key, values))
        elif lacking[stage]:
            found.append((f"stages.{stage}", lacking[stage]))
            lacking[stage] = []
    return found


def finals(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """What the runs reached: a heading and its rows of numbers, for each stage and for the whole."""
    tables = []
    for stage in dict.fromkeys(row["stage"] for run in runs for row in run.rows):
        each = [[row for row in run.rows if row["stage"] == stage] for run in runs]
        rows = [
            ("steps", [_count(sum("loss" in row for row in rows)) if rows else NONE for rows in each]),
            (f"loss, mean of the last {END:.0%}", [_final(rows) for rows in each]),
            ("held-out loss, last", [_last(rows, "held_out") for rows in each]),
            ("held-out loss, best", [_best(rows) for rows in each]),
        ]
        tables.append((f"Stage {stage}", _told(rows)))
    whole = [
        ("tokens", [_count(sum(_values(run.rows, "tokens"))) for run in runs]),
        ("time in steps", [_clock(_seconds(run)) for run in runs]),
        ("tokens per second", [_speed(run) for run in runs]),
        ("padding", [_share(run, "padding") for run in runs]),
        ("waiting for data", [_share(run, "wait_share") for run in runs]),
        ("share of the device's peak (MFU)", [_share(run, "mfu") for run in runs]),
        ("peak memory", [_memory(run) for run in runs]),
        ("skipped steps", [_count(sum("skipped" in row for row in run.rows)) for run in runs]),
    ]
    return [*tables, ("The whole run", _told(whole))]


def machines(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """On what each run was made, as of its last start."""
    last = [run.starts[-1] if run.starts else {} for run in runs]
    rows = [
        ("commit", [str(start.get("commit") or NONE)[:12] for start in last]),
        ("begun", [str(run.starts[0].get("time", NONE)) if run.starts else NONE for run in runs]),
        ("starts", [_count(len(run.starts)) for run in runs]),
    ]
    for part in ("machine", "versions"):
        parts: list[dict[str, Any]] = [
            known if isinstance(known := start.get(part), dict) else {} for start in last
        ]
        for key in dict.fromkeys(key for found in parts for key in found):
            rows.append((key.replace("_", " "), [str(found.get(key) or NONE) for found in parts]))
    return rows


class _Builder:
    """Rows that share their place on the axis, brought to at most ``MAX_POINTS`` points."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, tuple[float, float, float], dict[str, float]]] = []

    def add(self, stage: int, at: tuple[float, float, float], numbers: dict[str, float]) -> None:
        self._rows.append((stage, at, numbers))

    def grid(self) -> Grid:
        together = math.ceil(len(self._rows) / MAX_POINTS) or 1
        points: list[list[tuple[int, tuple[float, float, float], dict[str, float]]]] = []
        for row in self._rows:
            if not points or len(points[-1]) == together or points[-1][0][0] != row[0]:
                points.append([])
            points[-1].append(row)
        keys = dict.fromkeys(key for *_, numbers in self._rows for key in numbers)
        series = {
            key: tuple(_mean(numbers[key] for *_, numbers in point if key in numbers) for point in points)
            for key in keys
        }
        return Grid(
            stages=tuple(point[-1][0] for point in points),
            at=tuple(point[-1][1] for point in points),
            series=series,
            together=together,
        )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; the half line at the end of a run that writes is passed over."""
    *whole, _ = path.read_bytes().split(b"\n")
    for number, text in enumerate(whole, 1):
        try:
            row = json.loads(text)
            stage, step = row["stage"], row["step"]
        except (ValueError, KeyError, TypeError) as error:
            what = f"lacks the key {error}" if isinstance(error, KeyError) else "is no JSON object"
            raise DataError(
                f"{path}:{number}: the line {what}: {text[:60].decode(errors='replace')!r}; expected an "
                f"object with 'stage' and 'step'. Take the line out, or copy the file again"
            ) from None
        if not isinstance(stage, str) or not _is_number(step):
            raise DataError(
                f"{path}:{number}: stage is {stage!r} and step {step!r}; expected a text and a number. Take "
                f"the line out, or copy the file again"
            )
        yield row


def _with_evals(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The rows with those of evaluations behind the step whose model was evaluated."""
    evals: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in _rows(path) if path.is_file() else ():
        evals.setdefault((row["stage"], row["step"]), []).append(row)
    found = []
    for n, row in enumerate(rows):
        found.append(row)
        at = row["stage"], row["step"]
        # A step may have a second row, with the held-out loss; and be done twice, after a kill.
        if n + 1 == len(rows) or (rows[n + 1]["stage"], rows[n + 1]["step"]) != at:
            found += evals.pop(at, ())
    return found


def _flatten(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values as text; members of a list go by their ``name``, or else by number."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        labels = [item.get("name") for item in value]
        named = all(isinstance(label, str) for label in labels) and len(set(labels)) == len(labels)
        for n, item in enumerate(value):
            yield from _flatten(item, f"{place}.{labels[n] if named else n}")
    else:
        yield place, json.dumps(value, ensure_ascii=False, default=str)


def _lacking(recipes: Sequence[Mapping[str, Any] | None]) -> dict[str, list[str]]:
    """Stages that not all recipes have -> for each whether it has it."""
    found = [
        None if recipe is None else [stage.get("name") for stage in recipe.get("stages", [])]
        for recipe in recipes
    ]
    return {
        name: [UNKNOWN if stages is None else "there" if name in stages else NONE for stages in found]
        for name in dict.fromkeys(name for stages in found for name in stages or ())
        if any(stages is not None and name not in stages for stages in found)
    }


def _told(rows: Iterable[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Rows of which at least one run knows the number."""
    return [(name, cells) for name, cells in rows if any(cell != NONE for cell in cells)]


def _values(rows: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if _is_number(row.get(key))]


def _final(rows: Sequence[Mapping[str, Any]]) -> str:
    losses = _values(rows, "loss")
    return f"{statistics.fmean(losses[-max(1, round(END * len(losses))) :]):.4f}" if losses else NONE


def _last(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    values = _values(rows, key)
    return f"{values[-1]:.4f}" if values else NONE


def _best(rows: Sequence[Mapping[str, Any]]) -> str:
    found = [(row["held_out"], row["step"]) for row in rows if _is_number(row.get("held_out"))]
    return f"{min(found)[0]:.4f} at step {min(found)[1]:,}" if found else NONE


def _seconds(run: Run) -> float:
    """Of each stage the clock of its last step."""
    return sum({row["stage"]: _number(row.get("seconds")) for row in run.rows if "loss" in row}.values())


def _speed(run: Run) -> str:
    seconds = _seconds(run)
    return _count(round(sum(_values(run.rows, "tokens")) / seconds)) if seconds else NONE


def _share(run: Run, key: str) -> str:
    values = _values(run.rows, key)
    return f"{100 * statistics.fmean(values):.1f} %" if values else NONE


def _memory(run: Run) -> str:
    values = _values(run.rows, "peak_memory_bytes")
    return f"{max(values) / 1e9:.2f} GB" if values else NONE


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02} min" if hours else f"{m} min {s:02} s" if m else f"{s} s"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else 0.0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
