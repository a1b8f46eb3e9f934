"""The page of ``tinymodal compare``: one file without references to anywhere, which works from a folder.

Each panel is drawn twice: here as a plain SVG, which any reader shows, and again by the script at the end of
the page once it runs, which then smooths, changes axes, hides runs and reads values off. Colours are those of
Okabe and Ito, which people with any kind of colour vision tell apart; from the seventh run on they come again
with dashes. Everything that comes from a run is escaped.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from tinymodal.eval.pages.runs_script import SCRIPT, STYLE

COLOURS = 6
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 220, 52, 10, 18, 24
WINDOW = 0.02
"""Share of a curve that smoothing forgets over, before anyone moves the control."""

Tables = Sequence[tuple[str, Sequence[str]]]
"""Name of a row, and one cell for each run."""


class Panel(NamedTuple):
    """How a curve is shown."""

    title: str
    unit: str = ""
    """``share``: in per cent; ``bytes``: in GB; else words behind the title."""
    from_zero: bool = False
    exact: bool = False
    """Never smoothed: there is nothing to smooth."""


KNOWN = {
    "loss": Panel("Loss"),
    "held_out": Panel("Held-out loss", exact=True),
    "lr": Panel("Learning rate", "the highest", exact=True),
    "grad_norm": Panel("Gradient norm", "before clipping"),
    "tokens_per_s": Panel("Tokens per second", from_zero=True),
    "samples_per_s": Panel("Samples per second", from_zero=True),
    "step_s": Panel("Seconds per step", from_zero=True),
    "mfu": Panel("Share of the device's peak (MFU)", "share", from_zero=True),
    "wait_share": Panel("Waiting for data", "share", from_zero=True),
    "padding": Panel("Padding", "share", from_zero=True),
    "peak_memory_bytes": Panel("Peak memory", "bytes", from_zero=True, exact=True),
    "tokens": Panel("Tokens per step"),
    "targets": Panel("Targets per step"),
    "samples": Panel("Samples per step"),
}
SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Loss", ("loss", "held_out")),
    ("Loss by source and modality", ("loss/", "loss_")),
    ("Held-out loss by source and modality", ("held_out/",)),
    ("Benchmarks", ("eval/",)),
    ("Optimizer", ("lr", "lr/", "grad_norm")),
    (
        "Speed and memory",
        ("tokens_per_s", "samples_per_s", "step_s", "mfu", "wait_share", "peak_memory_bytes"),
    ),
    ("Data", ("padding", "tokens", "targets", "samples")),
)
"""Heading, and its keys in order; one that ends in ``/`` or ``_`` stands for all that begin so."""


@dataclass(frozen=True)
class Grid:
    """Curves that share their places on the axis."""

    stages: tuple[int, ...]
    """Of each point, the number of its stage."""
    at: tuple[tuple[float, float, float], ...]
    """Of each point: steps, tokens and hours."""
    series: dict[str, tuple[float | None, ...]]
    together: int = 1
    """Steps that one point is the mean of."""


@dataclass(frozen=True)
class Line:
    """A run's curves."""

    name: str
    stages: tuple[tuple[str, tuple[float, float, float]], ...]
    """Name, and where it begins."""
    grids: tuple[Grid, ...]


def page(
    lines: Sequence[Line], recipes: Tables, finals: Sequence[tuple[str, Tables]], machines: Tables
) -> str:
    """The whole page as HTML."""
    names = [line.name for line in lines]
    title = "TinyModal: " + (" and ".join(names) if len(names) < 4 else f"{len(names)} runs")
    same = "<p class='muted'>The recipes are the same, key for key.</p>" if len(lines) > 1 else ""
    ends = "".join(_table(rows, names, heading) for heading, rows in finals)
    parts = [
        f"<header><h1>{escape(title)}</h1></header>",
        _controls(lines),
        *_sections(lines),
        f"<section><h2>Numbers</h2><div class='scroll'><table>{_head(names)}{ends}</table></div></section>",
        "<section><h2>Where the recipes differ</h2>"
        + (
            f"<div class='scroll'><table>{_head(names)}{_table(recipes, names)}</table></div>"
            if recipes
            else same
        )
        + "</section>",
        "<section><h2>Made on</h2>"
        f"<div class='scroll'><table>{_head(names)}{_table(machines, names)}</table></div></section>",
    ]
    data = json.dumps(
        {
            "runs": [
                {
                    "stages": [{"name": name, "at": at} for name, at in line.stages],
                    "grids": [
                        {
                            "stage": grid.stages,
                            "at": [[_short(at[axis]) for at in grid.at] for axis in range(3)],
                            "series": {k: [_short(v) for v in values] for k, values in grid.series.items()},
                        }
                        for grid in line.grids
                    ],
                }
                for line in lines
            ],
            "panels": {
                key: {"unit": panel.unit, "zero": panel.from_zero, "exact": panel.exact}
                for key in _keys(lines)
                if (panel := _panel_of(key))
            },
            "box": [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM],
            "colours": COLOURS,
        },
        separators=(",", ":"),
        allow_nan=False,
    )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f'<script type="application/json" id="data">{data.replace("<", chr(92) + "u003c")}</script>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _controls(lines: Sequence[Line]) -> str:
    runs = "".join(
        f"<label class='run'><input type='checkbox' checked data-run='{n}'>"
        f"{_swatch(n)}<span>{escape(line.name)}</span></label>"
        for n, line in enumerate(lines)
    )
    together = max(grid.together for line in lines for grid in line.grids)
    note = f"<span class='muted'>a point is the mean of {together:,} steps</span>" if together > 1 else ""
    return (
        f"<div class='controls' role='group' aria-label='What the curves show'>{runs}<span class='tools'>"
        "<label>over <select id='axis'><option value='0'>steps</option><option value='1'>tokens</option>"
        "<option value='2'>hours</option></select></label>"
        f"<label>smooth <input id='smooth' type='range' min='0' max='20' step='0.5' value='{100 * WINDOW:g}'>"
        "</label><label><input id='log' type='checkbox'> logarithmic</label></span>"
        f"{note}</div><noscript><p class='muted'>Without scripts the curves are shown as they stand.</p>"
        "</noscript>"
    )


def _sections(lines: Sequence[Line]) -> list[str]:
    found, left = [], _keys(lines)
    for heading, patterns in SECTIONS:
        keys = [
            key
            for pattern in patterns
            for key in left
            if key == pattern or (pattern[-1] in "/_" and key.startswith(pattern))
        ]
        left = [key for key in left if key not in keys]
        if keys:
            found.append(_section(heading, keys, lines))
    if left:
        found.append(_section("More", left, lines))
    return found


def _section(heading: str, keys: Sequence[str], lines: Sequence[Line]) -> str:
    panels = "".join(_panel(key, lines) for key in keys)
    return f"<section><h2>{escape(heading)}</h2><div class='panels'>{panels}</div></section>"


def _panel(key: str, lines: Sequence[Line]) -> str:
    shown = _panel_of(key)
    curves = [_curve(line, key) for line in lines]
    values = "".join(
        f"<span class='key' data-run='{n}' title='{escape(line.name, quote=True)}'>{_swatch(n)}"
        f"<b>{_say(points[-1][2], shown.unit)}</b></span>"
        for n, (line, points) in enumerate(zip(lines, curves, strict=True))
        if points
    )
    words = shown.unit if shown.unit not in ("share", "bytes") else ""
    unit = f"<span class='muted'>{escape(words)}</span>" if words else ""
    told = escape(f"{shown.title}, {shown.unit}" if words else shown.title)
    return (
        f"<figure class='panel' data-key='{escape(key, quote=True)}'><figcaption>"
        f"<strong>{escape(shown.title)}</strong>{unit}<span class='at muted'></span>{values}</figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img'><title>{told} over steps</title>"
        f"<g>{_drawn(curves, shown)}</g></svg></figure>"
    )


def _drawn(curves: Sequence[Sequence[tuple[int, float, float]]], shown: Panel) -> str:
    """The plain drawing: smoothed curves over steps, and the ends of both axes."""
    xs = [x for points in curves for _, x, _ in points]
    ys = [y for points in curves for *_, y in points]
    right = max(xs, default=1.0) or 1.0
    low, high = (0.0 if shown.from_zero else min(ys)), max(ys)
    high = high if high > low else low + (abs(low) or 1.0)

    def place(x: float, y: float) -> str:
        px = LEFT + x / right * (WIDTH - LEFT - RIGHT)
        return f"{px:.1f},{TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [
        f"<text x='{LEFT - 6}' y='{TOP + 4}' text-anchor='end'>{_say(high, shown.unit)}</text>",
        f"<text x='{LEFT - 6}' y='{HEIGHT - BOTTOM + 4}' text-anchor='end'>{_say(low, shown.unit)}</text>",
        f"<text x='{WIDTH - RIGHT}' y='{HEIGHT - 8}' text-anchor='end'>{right:,.0f}</text>",
        f"<path class='grid' d='M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}'/>",
    ]
    for n, points in enumerate(curves):
        stages = dict.fromkeys(stage for stage, *_ in points)
        for stage in stages:
            each = " ".join(place(x, y) for s, x, y in points if s == stage)
            parts.append(f"<polyline class='c{n % COLOURS} d{n // COLOURS % 3}' points='{each}'/>")
    return "".join(parts)


def _curve(line: Line, key: str) -> list[tuple[int, float, float]]:
    """Stage, step and smoothed value of each point that a run has of ``key``."""
    for grid in line.grids:
        if key not in grid.series:
            continue
        known = [
            (stage, at[0], value)
            for stage, at, value in zip(grid.stages, grid.at, grid.series[key], strict=True)
            if value is not None
        ]
        wide = 0 if _panel_of(key).exact else round(len(known) * WINDOW / 2)
        return [
            point for _, stage in itertools.groupby(known, lambda p: p[0]) for point in _smooth(stage, wide)
        ]
    return []


def _smooth(stage: Iterable[tuple[int, float, float]], wide: int) -> Iterator[tuple[int, float, float]]:
    """Each point's mean with at most ``wide`` to either side; fewer near the beginning."""
    points = list(stage)
    sums = [0.0, *itertools.accumulate(y for *_, y in points)]
    for i, (number, x, _) in enumerate(points):
        side = min(wide, i)
        last = min(i + side, len(points) - 1)
        yield number, x, (sums[last + 1] - sums[i - side]) / (last + 1 - i + side)


def _keys(lines: Sequence[Line]) -> list[str]:
    """Every curve of any run, but those of one source or modality that repeat the whole."""
    keys = dict.fromkeys(key for line in lines for grid in line.grids for key in grid.series)
    return [key for key in keys if not all(_repeats(line, key) for line in lines)]


def _repeats(line: Line, key: str) -> bool:
    whole, slash, _ = key.partition("/")
    for grid in line.grids:
        if slash and key in grid.series and whole in grid.series:
            pairs = zip(grid.series[key], grid.series[whole], strict=True)
            return all(a is None or (b is not None and math.isclose(a, b, rel_tol=1e-6)) for a, b in pairs)
    return bool(slash) and not any(key in grid.series for grid in line.grids)


def _panel_of(key: str) -> Panel:
    if key in KNOWN:
        return KNOWN[key]
    whole, _, part = key.partition("/")
    if part and whole in KNOWN:
        return KNOWN[whole]._replace(title=f"{KNOWN[whole].title}: {part}", unit="")
    if whole == "eval":
        return Panel(part, "of the first questions", exact=True)
    if key.startswith("loss_"):
        return Panel(f"Loss: {key.removeprefix('loss_')}", "part of the sum")
    return Panel(key)


def _head(names: Sequence[str]) -> str:
    cells = "".join(f"<th scope='col'>{_swatch(n)}{escape(name)}</th>" for n, name in enumerate(names))
    return f"<thead><tr><th></th>{cells}</tr></thead>"


def _table(rows: Tables, names: Sequence[str], heading: str = "") -> str:
    top = f"<tr class='part'><th colspan='{len(names) + 1}' scope='rowgroup'>{escape(heading)}</th></tr>"
    body = "".join(
        f"<tr><th scope='row'>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return f"<tbody>{top if heading else ''}{body}</tbody>"


def _swatch(n: int) -> str:
    return f"<i class='swatch c{n % COLOURS} d{n // COLOURS % 3}'></i>"


def _say(value: float, unit: str) -> str:
    """A number as people read it: about four digits, thousands apart."""
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "bytes":
        return f"{value / 1e9:.2f} GB"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def _short(value: float | None) -> float | int | None:
    """Six digits: more are not seen, and the file stays small."""
    if value is None or value == 0 or not math.isfinite(value):
        return value if value is None or math.isfinite(value) else None
    short = float(f"{value:.6g}") if abs(value) < 1e6 else round(value)
    return int(short) if short == int(short) else short
