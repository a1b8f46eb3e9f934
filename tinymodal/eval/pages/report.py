"""A run's report as one page: numbers by kind, stages, curves, and questions with their pictures and sounds.

The page is a single file without scripts, fonts or links to anywhere, so it can be mailed, kept, and opened
in ten years; its sounds are in it. It follows the reader's dark or light mode. Right and wrong are told apart
by a mark and a word as well as by colour. Everything that comes from data is escaped.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from tinymodal.core.page import STYLE
from tinymodal.eval.pages.curves import Curve, panels

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {
    "new": "new scenes",
    "unseen_pairs": "unseen pairs",
    "shuffled": "shuffled pictures",
    "constant": "best constant",
}
SOUND = {
    "hear": (
        ("words heard wrongly, voices of training", "wer_seen_voices"),
        ("words heard wrongly, other voices", "wer_unseen_voices"),
        ("words heard wrongly, sounds shuffled", "shuffled"),
    ),
    "spoken_questions": (
        ("questions answered, asked aloud", "mean_new"),
        ("the same questions, written", "mean_written"),
    ),
    "speak": (
        ("words of its answers not understood", "wer"),
        ("characters of its answers not understood", "cer"),
        ("first sound after the first word", "first_sound_ms"),
        ("seconds it takes to say a second", "real_time_factor"),
    ),
}
"""What a report tells of sound: part, and what its numbers are called. Rates but the last two."""
STAGES = {
    "align": ("after align alone", "only the connector has trained"),
    "instruct_without_align": ("instruct without align", "the connector starts from random weights"),
    "instruct": ("align, then instruct", "this model"),
}
"""Stages in the order of the page; the last that a report has is the model that it is about."""


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
    sounds: tuple[bytes, ...] = ()
    """What is played beside the question, or is it: Ogg or wav files, see ``playable.py``."""
    spoken: bytes = b""
    """The reply aloud, such a file; empty: it was not spoken."""
    heard: str = ""
    """What a recogniser heard of it."""


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


def sound_numbers(scores: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and number, in words, of all that a report tells of hearing and speaking."""
    for part, named in SOUND.items():
        for name, key in named:
            if (value := (scores.get(part) or {}).get(key)) is not None:
                yield name, _told(key, value)


def terminal_sounds(report: Mapping[str, Any], title: str = "Hearing and speaking") -> Table | None:
    """``hear``, ``spoken_questions`` and ``speak`` of a report as a table for the terminal.

    The starter model stands beside where the report has it; None where nothing is told of sound.
    """
    from rich.table import Table

    columns = _sound_columns(report)
    if not columns:
        return None
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for row in _sound_rows(columns):
        table.add_row(*row)
    return table


def _sound_columns(report: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Model -> its numbers by name; models of which nothing is told are left out."""
    models = {"this model": report, "starter model": report.get("starter") or {}}
    found = {name: dict(sound_numbers(scores)) for name, scores in models.items()}
    return {name: numbers for name, numbers in found.items() if numbers}


def _sound_rows(columns: Mapping[str, Mapping[str, str]]) -> Iterator[list[str]]:
    for name in dict.fromkeys(name for numbers in columns.values() for name in numbers):
        yield [name, *(numbers.get(name, "–") for numbers in columns.values())]


def _told(key: str, value: float) -> str:
    if key == "first_sound_ms":
        return f"{value:,.0f} ms"
    return f"{value:.2f}" if key == "real_time_factor" else _per_cent(value)


def page(
    report: Mapping[str, Any], lines: Sequence[Curve] = (), gallery: Sequence[Card] = (), command: str = ""
) -> str:
    """The whole page as HTML.

    Args:
        report: as ``tinymodal demo`` writes it to ``report.json``; parts that are missing are left out.
        lines: the curves, see :func:`tinymodal.eval.pages.curves.curves`.
        gallery: questions with pictures.
        command: what to type next.
    """
    parts = [
        _header(report),
        _section("By kind of question", _SCORES_NOTE + _sureness(report), _scores(report)),
        _section("Hearing and speaking", _SOUND_NOTE, _sounds(report)) if _sound_columns(report) else "",
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
        f"<title>{escape(_title(report))}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
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
_SOUND_NOTE = (
    "Clips of words and questions, spoken by voices that training had and by others; shuffled: other clips "
    "beside the same questions. What the model says aloud is written down by a recogniser that never heard "
    "it in training, and compared with what it wrote. Times are those of the machine below."
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


def _sounds(report: Mapping[str, Any]) -> str:
    columns = _sound_columns(report)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in _sound_rows(columns)
    )
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col"></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def stage_rows(report: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Name, remark and mean on new scenes of each stage, this model's last."""
    order = list(STAGES)
    found = sorted(report["stages"], key=lambda key: order.index(key) if key in order else len(order))
    rows = []
    for key in found:
        name, note = STAGES.get(key, (key.replace("_", " "), ""))
        rows.append((name, "this model" if key == found[-1] else note, report["stages"][key]["mean_new"]))
    return rows


def _stages(report: Mapping[str, Any]) -> str:
    constant = report["mean"].get("constant")
    *others, own = stage_rows(report)
    rows = [(*row, "constant") for row in others] + [(*own, "new")]
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
    shown = f'<div class="pictures">{pictures}</div>' if pictures else ""
    played = "".join(player(file, f"sound {i + 1} of the question") for i, file in enumerate(card.sounds))
    aloud = player(card.spoken, "the answer aloud") if card.spoken else ""
    if card.heard:
        aloud += f'<div class="truth">heard: <strong>{escape(card.heard)}</strong></div>'
    mark, word, style = ("✓", "right", "right") if card.right else ("✗", "wrong", "wrong")
    truth = f'<div class="truth">truth: <strong>{escape(card.answer)}</strong></div>'
    note = f'<span class="chip">{escape(card.note)}</span>' if card.note else ""
    return (
        f'<figure class="card">{shown}<figcaption>'
        f'<div><span class="chip">{escape(card.kind)}</span>{note}</div>'
        f'{played}<div class="question">{escape(card.question)}</div><div class="answer {style}">'
        f'<span class="mark" aria-hidden="true">{mark}</span> {escape(card.reply) or "(nothing)"}'
        f'<span class="word">{word}</span></div>{aloud}{truth}</figcaption></figure>'
    )


def player(file: bytes, label: str) -> str:
    """A sound with its buttons."""
    kind = "wav" if file.startswith(b"RIFF") else "ogg"
    return (
        f'<audio controls preload="metadata" aria-label="{escape(label)}" '
        f'src="data:audio/{kind};base64,{base64.b64encode(file).decode()}"></audio>'
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
