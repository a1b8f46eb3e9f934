"""A run's report as one page: numbers by kind, stages, curves, and questions with their pictures.

The page is a single file without scripts, fonts or links to anywhere, so it can be mailed, kept, and opened
in ten years. It follows the reader's dark or light mode. Right and wrong are told apart by a mark and a word
as well as by colour. Everything that comes from data is escaped.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from tinymodal.eval.curves import Curve, panels

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {
    "new": "new scenes",
    "unseen_pairs": "unseen pairs",
    "shuffled": "shuffled pictures",
    "constant": "best constant",
}
STAGES = {
    "align": ("after align alone", "only the connector has trained"),
    "instruct_without_align": ("instruct without align", "the connector starts from random weights"),
    "instruct": ("align, then instruct", "this model"),
}


@dataclass(frozen=True, slots=True)
class Card:
    """One question of the gallery."""

    pictures: tuple[bytes, ...]
    """PNG files."""
    question: str
    reply: str
    answer: str
    kind: str
    right: bool
    note: str = ""
    """E.g. ``unseen pair``."""


def margin(accuracy: float, n: int) -> float:
    """Half the 95 % interval of an accuracy over n questions (Wilson), 0..1."""
    z = 1.96
    return z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n)) if n else 1.0


def terminal_table(scores: Mapping[str, Any], title: str) -> Table:
    """``{kinds, mean}`` of a report as a table for the terminal."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("kind")
    for column in COLUMNS.values():
        table.add_column(column, justify="right")
    table.add_column("n", justify="right", style="dim")
    for kind, row in scores["kinds"].items():
        table.add_row(kind, *(_per_cent(row[column]) for column in COLUMNS), str(row["n"]))
    table.add_section()
    total = sum(row["n"] for row in scores["kinds"].values())
    table.add_row(
        "mean", *(_per_cent(scores["mean"][column]) for column in COLUMNS), str(total), style="bold"
    )
    return table


def page(
    report: Mapping[str, Any], lines: Sequence[Curve] = (), gallery: Sequence[Card] = (), command: str = ""
) -> str:
    """The whole page as HTML.

    Args:
        report: as ``tinymodal demo`` writes it to ``report.json``; parts that are missing are left out.
        lines: the curves, see :func:`tinymodal.eval.curves.curves`.
        gallery: questions with pictures.
        command: what to type next.
    """
    parts = [
        _header(report),
        _section("By kind of question", _SCORES_NOTE + _sureness(report), _scores(report)),
        _section("Does aligning first matter?", _STAGES_NOTE, _stages(report))
        if report.get("stages")
        else "",
        _section("Loss", "Each step's loss, faint, and its running mean.", panels(lines)) if lines else "",
        _section("Questions and answers", _GALLERY_NOTE, _gallery(gallery)) if gallery else "",
        _starter(report),
        _section("Talk to it", "", f"<pre>{escape(command)}</pre>") if command else "",
        _footer(report),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(_title(report))}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


_STAGES_NOTE = (
    "The same questions about new scenes after the first stage alone, after both, and after the second stage "
    "of a model that skipped the first. The line marks the best constant answer."
)
_LEAD = (
    "A vision tower, a connector and a language model, trained in two stages, "
    "asked about pictures it had never seen."
)
_SCORES_NOTE = (
    "Accuracy on pictures made after training. Unseen pairs: combinations of shape and colour that training "
    "never showed. Shuffled pictures: the same questions about other pictures of the same kind. Best "
    "constant: what always giving the commonest answer (of those the question offers) scores."
)
_STARTER_NOTE = "The model that ships with TinyModal, trained longer, on the same questions."
_GALLERY_NOTE = "The first of each kind as they were drawn, right or wrong; nothing is picked by hand."


def _title(report: Mapping[str, Any]) -> str:
    return f"TinyModal: {report.get('name', 'demo')}"


def _header(report: Mapping[str, Any]) -> str:
    mean, tiles = report["mean"], []
    questions = sum(row["n"] for row in report["kinds"].values())
    tiles.append(
        ("new scenes", _per_cent(mean["new"]), f"{questions:,} questions, {len(report['kinds'])} kinds")
    )
    if mean.get("unseen_pairs") is not None:
        tiles.append(("unseen pairs", _per_cent(mean["unseen_pairs"]), "of shape and colour"))
    tiles.append(
        ("pictures shuffled", _per_cent(mean["shuffled"]), f"best constant {_per_cent(mean['constant'])}")
    )
    if report.get("seconds") is not None:
        memory = report.get("peak_memory_mb")
        tiles.append(("time", _clock(report["seconds"]), f"{memory:,.0f} MB at most" if memory else ""))
    cells = "".join(
        f'<div class="tile"><div class="tile-name">{escape(name)}</div>'
        f'<div class="tile-value">{escape(value)}</div>'
        f'<div class="muted">{escape(note)}</div></div>'
        for name, value, note in tiles
    )
    return (
        f'<header><h1>{escape(_title(report))}</h1><p class="lead">{_LEAD}</p></header>\n'
        f'<div class="tiles">{cells}</div>'
    )


def _section(title: str, note: str, body: str) -> str:
    said = f'<p class="muted">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def _sureness(report: Mapping[str, Any]) -> str:
    """How far a number may be off, in words."""
    least = min(row["n"] for row in report["kinds"].values())
    return f" With {least} questions a kind, 90 % is known to about ±{100 * margin(0.9, least):.0f} points."


def _scores(scores: Mapping[str, Any]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in COLUMNS.values())
    rows = [_score_row(kind, row, row["n"]) for kind, row in scores["kinds"].items()]
    total = sum(row["n"] for row in scores["kinds"].values())
    rows.append(_score_row("mean", scores["mean"], total, "total"))
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">kind</th>{head}'
        f'<th scope="col" class="n">n</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _score_row(kind: str, row: Mapping[str, Any], n: int, style: str = "") -> str:
    cells = "".join(_bar_cell(column, row.get(column)) for column in COLUMNS)
    hint = ""
    if not style and row.get("new") is not None:
        hint = f' title="new scenes: 95 % interval about ±{100 * margin(row["new"], n):.0f} points"'
    return (
        f'<tr class="{style}"{hint}><th scope="row">{escape(kind)}</th>{cells}<td class="n">{n:,}</td></tr>'
    )


def _bar_cell(column: str, value: float | None) -> str:
    if value is None:
        return '<td><span class="muted">–</span></td>'
    return f'<td><span class="value">{_per_cent(value)}</span>{_bar(column, value)}</td>'


def _bar(column: str, value: float, mark: float | None = None) -> str:
    tick = f'<b style="left:{100 * mark:.1f}%"></b>' if mark is not None else ""
    return (
        f'<span class="bar {column.replace("_", "-")}"><i style="width:{100 * value:.1f}%"></i>{tick}</span>'
    )


def _stages(report: Mapping[str, Any]) -> str:
    rows, constant = [], report["mean"].get("constant")
    found = [(key, *STAGES.get(key, (key.replace("_", " "), ""))) for key in report["stages"]]
    order = list(STAGES)
    found.sort(key=lambda row: order.index(row[0]) if row[0] in order else len(order))
    for key, name, note in found:
        rows.append(
            (name, note, report["stages"][key]["mean_new"], "new" if key == "instruct" else "constant")
        )
    starter = report.get("starter")
    if starter:
        rows.append(("starter model", "trained longer, shipped", starter["mean"]["new"], "constant"))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}<span class="muted">{escape(note)}</span></th>'
        f'<td class="wide"><span class="value">{_per_cent(value)}</span>'
        f"{_bar(column, value, constant)}</td></tr>"
        for name, note, value, column in rows
        if value is not None
    )
    return f'<table class="stages"><tbody>{body}</tbody></table>'


def _starter(report: Mapping[str, Any]) -> str:
    if not report.get("starter"):
        return ""
    return _section("The starter model", _STARTER_NOTE, _scores(report["starter"]))


def _gallery(cards: Sequence[Card]) -> str:
    return f'<div class="gallery">{"".join(map(_card, cards))}</div>'


def _card(card: Card) -> str:
    pictures = "".join(
        f'<img alt="picture {i + 1} of the question" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for i, png in enumerate(card.pictures)
    )
    mark, word, style = ("✓", "right", "right") if card.right else ("✗", "wrong", "wrong")
    truth = f'<div class="truth">truth: <strong>{escape(card.answer)}</strong></div>'
    note = f'<span class="chip">{escape(card.note)}</span>' if card.note else ""
    return (
        f'<figure class="card"><div class="pictures">{pictures}</div><figcaption>'
        f'<div><span class="chip">{escape(card.kind)}</span>{note}</div>'
        f'<div class="question">{escape(card.question)}</div><div class="answer {style}">'
        f'<span class="mark" aria-hidden="true">{mark}</span> {escape(card.reply) or "(nothing)"}'
        f'<span class="word">{word}</span></div>{truth}</figcaption></figure>'
    )


def _footer(report: Mapping[str, Any]) -> str:
    machine = report.get("machine") or {}
    facts = [
        ("commit", report.get("commit")),
        (
            "machine",
            ", ".join(f"{key} {value}" for key, value in machine.items() if value)
            if isinstance(machine, Mapping)
            else machine,
        ),
        (
            "versions",
            ", ".join(f"{name} {version}" for name, version in (report.get("versions") or {}).items()),
        ),
        (
            "seconds of CPU",
            f"{report['cpu_seconds']:,.0f}" if report.get("cpu_seconds") is not None else None,
        ),
        ("seed of the test questions", report.get("test_seed")),
    ]
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in facts
        if value not in (None, "")
    )
    return f"<footer><dl>{rows}</dl></footer>"


def _per_cent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


_STYLE = """
:root{--paper:#fbfbf9;--card:#fff;--ink:#1c1d20;--muted:#62656d;--rule:#e1e2de;--track:#ecede9;
--new:#2f5fd0;--unseen:#0d8a7b;--shuffled:#c9681a;--constant:#8b8f99;--good:#1b7a3d;--bad:#b3261e;
color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#15171b;--card:#1d2025;--ink:#e9eaec;--muted:#9ea3ad;
--rule:#31353d;--track:#2a2e35;
--new:#7ea2ff;--unseen:#46c7b4;--shuffled:#f0a35e;--constant:#8b919d;--good:#63cf8a;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1020px;margin:0 auto;padding:40px 20px 60px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:20px;margin:44px 0 4px}
.lead{margin:0 0 24px;font-size:17px;color:var(--muted);max-width:62ch}
section>.muted{margin:0 0 14px;max-width:78ch}
.muted{color:var(--muted);font-size:14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px}
.tile,.card,.panel{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.tile{padding:14px 16px}
.tile-name{font-size:14px;color:var(--muted)}
.tile-value{font-size:28px;font-weight:650;letter-spacing:-.01em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 10px 7px 0;text-align:left;border-bottom:1px solid var(--rule);font-weight:400;
vertical-align:middle}
thead th{font-size:14px;color:var(--muted);white-space:nowrap}
tbody th{white-space:nowrap}
td{min-width:132px}
.n{text-align:right;color:var(--muted);min-width:0;padding-right:0}
.total th,.total td{font-weight:650;border-bottom:0}
.value{white-space:nowrap;display:inline-block;width:64px}
.bar{display:inline-block;position:relative;vertical-align:middle;width:calc(100% - 68px);min-width:48px;
height:10px;border-radius:3px;background:var(--track)}
.bar i{position:absolute;inset:0 auto 0 0;border-radius:3px;background:var(--new)}
.bar b{position:absolute;top:-4px;bottom:-4px;width:2px;background:var(--ink);opacity:.55}
.bar.unseen-pairs i{background:var(--unseen)}.bar.shuffled i{background:var(--shuffled)}
.bar.constant i{background:var(--constant)}
.stages th .muted{display:block}.stages .wide{width:66%}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:12px}
.panel{margin:0;padding:14px 14px 6px}
.panel figcaption{font-size:14px;display:flex;flex-wrap:wrap;gap:4px 16px}
.key{color:var(--muted)}.key strong{color:var(--ink)}
.swatch{display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle}
svg{display:block;width:100%;height:auto}
svg text{font-size:11px;fill:var(--muted)}
.grid{stroke:var(--rule)}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}
polyline.raw{stroke-width:1;opacity:.28}
.line-0{stroke:var(--new);background:var(--new)}.line-1{stroke:var(--shuffled);background:var(--shuffled)}
.line-2{stroke:var(--unseen);background:var(--unseen)}.line-3{stroke:var(--constant);
background:var(--constant)}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:12px}
.card{margin:0;overflow:hidden;display:flex;flex-direction:column}
.pictures{display:flex;gap:2px;background:var(--track);justify-content:center}
.pictures img{width:100%;min-width:0;max-width:192px;aspect-ratio:1;object-fit:contain}
.pictures:has(img+img) img{width:50%}
.card figcaption{padding:10px 12px 12px;font-size:15px}
.chip{font-size:12px;color:var(--muted);border:1px solid var(--rule);border-radius:99px;padding:1px 8px;
margin-right:4px}
.question{margin:8px 0 6px}
.answer{font-weight:650}.answer.right{color:var(--good)}.answer.wrong{color:var(--bad)}
.word{font-weight:400;font-size:13px;margin-left:8px}
.truth{font-size:14px;color:var(--muted)}.truth strong{color:var(--ink);font-weight:500}
pre{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px 16px;
overflow-x:auto;font:14px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace}
footer{margin-top:44px;border-top:1px solid var(--rule);padding-top:14px;font-size:14px;color:var(--muted)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:0}dd{margin:0;
overflow-wrap:anywhere}
@media(max-width:560px){dl{grid-template-columns:1fr}dt{font-weight:650}}
"""
