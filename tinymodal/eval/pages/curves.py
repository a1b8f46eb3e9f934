"""Losses over steps as small charts, drawn as SVG by hand: no plotting library, no script, no font.

Colours come from the page's style, ``.line-0`` and on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a panel: a loss over steps."""

    panel: str
    """Curves of one panel share their axes, e.g. a stage's name."""
    name: str
    points: tuple[tuple[float, float], ...]
    """(step, value)"""


def curves(rows: Iterable[Mapping[str, Any]], name: str, value: str = "loss") -> list[Curve]:
    """One curve per stage from the rows of a run's ``metrics.jsonl``; rows without the value do not count."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if isinstance(row.get(value), int | float) and math.isfinite(row[value]) and "step" in row:
            points.setdefault(str(row.get("stage", "train")), []).append(
                (float(row["step"]), float(row[value]))
            )
    return [Curve(stage, name, tuple(sorted(found))) for stage, found in points.items()]


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 230, 44, 12, 12, 28
_MAX_POINTS = 240
"""Points drawn per line: more than a screen shows at this width only makes the file larger."""


def panels(lines: Sequence[Curve]) -> str:
    panels: dict[str, list[Curve]] = {}
    for line in lines:
        if line.points:
            panels.setdefault(line.panel, []).append(line)
    return f'<div class="panels">{"".join(_panel(name, found) for name, found in panels.items())}</div>'


def _panel(title: str, lines: Sequence[Curve]) -> str:
    """One small chart; x is the step, y the loss from 0."""
    right = max(x for line in lines for x, _ in line.points) or 1.0
    # A first step far above the rest would press the curve to the floor: the axis ends at the 98th per cent.
    values = sorted(y for line in lines for _, y in line.points)
    top = max(values[int(0.98 * (len(values) - 1))], 1e-9) * 1.08

    def at(x: float, y: float) -> str:
        px = _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT)
        py = _TOP + (1 - min(max(y / top, 0.0), 1.0)) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{px:.1f},{py:.1f}"

    grid = []
    for y in _ticks(top):
        _, py = at(0, y).split(",")
        grid.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py}" y2="{py}"/>')
        grid.append(f'<text x="{_LEFT - 6}" y="{float(py) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in _ticks(right):
        px, _ = at(x, 0).split(",")
        grid.append(f'<text x="{px}" y="{_HEIGHT - 10}" text-anchor="middle">{x:,.0f}</text>')
    drawn, legend = [], []
    for i, line in enumerate(lines):
        smooth = _smoothed(line.points)
        drawn.append(
            f'<polyline class="raw line-{i}" points="{" ".join(at(*p) for p in _thinned(line.points))}"/>'
        )
        drawn.append(f'<polyline class="line-{i}" points="{" ".join(at(*p) for p in _thinned(smooth))}"/>')
        legend.append(
            f'<span class="key"><i class="swatch line-{i}"></i>{escape(line.name)} '
            f"<strong>{smooth[-1][1]:.3f}</strong></span>"
        )
    label = escape(f"Loss over steps of {title}", quote=True)
    return (
        f'<figure class="panel"><figcaption><strong>{escape(title)}</strong>{"".join(legend)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(grid)}{''.join(drawn)}</svg></figure>"
    )


def _ticks(top: float) -> list[float]:
    """Four to eight round numbers from 0 to ``top``."""
    step = 10.0 ** math.floor(math.log10(top / 4)) if top > 0 else 1.0
    while top / step > 8:
        step *= 2.5 if math.isclose(step / 10 ** math.floor(math.log10(step) + 1e-9), 2) else 2
    return [i * step for i in range(int(top / step) + 1)]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A running mean that forgets over about a fiftieth of the curve, without the usual bias at its start."""
    keep = 1 - 1 / max(1.0, len(points) / 50)
    total = weight = 0.0
    out = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        out.append((x, total / weight))
    return out


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    stride = max(1, len(points) // _MAX_POINTS)
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
