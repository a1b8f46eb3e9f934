"""Right and wrong answers to look at, with their pictures and sounds: a page for all that a model was asked.

The page is a single file that names nothing outside itself. Each benchmark has its numbers, how they were
made, and up to 200 questions to look through: as many wrong as right, of all kinds, drawn by their ids, so
that two models' pages mostly show the same ones. What a model says is anybody's text: all of it is escaped,
and the page's own policy lets no script run but ours, which only hides cards (``style.py``).
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymodal.core.types import Audio, Image, Message, Sample, Text
from tinymodal.eval.pages.report import player
from tinymodal.eval.pages.style import MISSING, Key, browser, table, tile, told, write_document
from tinymodal.eval.results import ROWS, Answered, Result, cell, flat

NUM_CARDS = 200
"""Questions shown of a benchmark, at most."""
MAX_BYTES = 14_000_000
"""Of all cards of a page: what can be mailed, and opens on a phone."""
SIDE_PX = 320
"""Longer side of a picture, at most."""
SMALL_PX = 128
"""Pictures up to here keep their colours at full resolution: they are drawings, and shown larger."""
QUALITY = 80
MAX_PICTURES, MAX_SOUNDS = 8, 2
"""Of a question, shown."""
MANY_ROWS = 12
"""Numbers of a table that is folded away."""
RIGHT = 0.5
"""Replies worth so much count as right, where they are one or the other."""
WRONG_OR_RIGHT = ("wrong", "right")


def write_page(
    path: Path,
    results: Sequence[Result],
    title: str = "TinyModal: evaluation",
    *,
    earlier: Mapping[str, Mapping[str, Any]] | None = None,
    cards: int = NUM_CARDS,
    seed: int = 0,
) -> Path:
    """Write the page about ``results`` to ``path``.

    Args:
        path: the file, e.g. ``eval/page.html``.
        results: what came of each benchmark, in the page's order.
        title: of the page.
        earlier: benchmark -> what ``results.json`` tells of others, whose numbers stand at the end.
        cards: questions shown of each benchmark, at most; fewer where pictures and sounds would come to more
            than ``MAX_BYTES``.
        seed: of the draw.

    Raises:
        DataError: ``path`` is a folder.
    """
    parts = [f"<header><h1>{told(title)}</h1></header>"]
    summaries = [result.summary() for result in results]
    if len(results) > 1:
        parts.append(_overview(results, summaries))
    rooms = Rooms(len(results), MAX_BYTES)
    for place, (result, summary) in enumerate(zip(results, summaries, strict=True)):
        head = _head(result, summary)
        parts.append(f'<section id="b{place}">{head}{_answers(result, cards, seed, rooms)}</section>')
    if earlier:
        parts.append(f"<section>{_earlier(earlier)}</section>")
    return write_document(path, title, "\n".join(parts))


# What is shown


def is_right(value: float) -> bool:
    """Whether a score counts as right, where it has to be one or the other."""
    return value >= RIGHT


class Rooms:
    """Bytes that are left for cards, dealt evenly to the benchmarks that are still to come."""

    def __init__(self, num_parts: int, num_bytes: int) -> None:
        self._left, self._parts = num_bytes, num_parts

    def fill(self, order: Iterable[int], card: Callable[[int], str]) -> dict[int, str]:
        """Of the next benchmark the cards that there is room for, in order."""
        room, found = self._left // max(self._parts, 1), {}
        for place in order:
            made = card(place)
            if (size := len(made.encode())) <= room:
                found[place] = made
                room -= size
                self._left -= size
        self._parts -= 1
        return found


def choose(keys: Sequence[Key], num: int, seed: int = 0) -> list[int]:
    """Places of at most ``num`` questions: of each group in turn, and of each of its kinds in turn.

    Drawn by ids alone: neither the order of the questions nor what else was asked changes which of two comes
    first. Any beginning of the list is as balanced as the whole.
    """
    groups: dict[int, dict[str, list[int]]] = {}
    for place in sorted(range(len(keys)), key=lambda i: (_lot(keys[i].id, seed), i)):
        groups.setdefault(keys[place].group, {}).setdefault(keys[place].kind, []).append(place)
    each = [_in_turn(groups[group].values()) for group in sorted(groups)]
    return list(itertools.islice(_in_turn(each), num))


def _lot(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode("utf-8", "replace")).digest()


def _in_turn(lists: Iterable[Iterable[int]]) -> Iterator[int]:
    """The first of each, then the second of each, and so on until all are used up."""
    for row in itertools.zip_longest(*lists):
        yield from (place for place in row if place is not None)


# A question


def media(sample: Sample) -> str:
    """The pictures and sounds of a question as HTML; a placeholder with a name for what cannot be read."""
    pictures = [part for part in sample.media() if isinstance(part, Image)]
    sounds = [part for part in sample.media() if isinstance(part, Audio)]
    seen = "".join(_picture(part, n, sample.id) for n, part in enumerate(pictures[:MAX_PICTURES], 1))
    heard = "".join(_sound(part, n, sample.id) for n, part in enumerate(sounds[:MAX_SOUNDS], 1))
    more = [
        f"{len(found) - most} more {what}"
        for found, most, what in ((pictures, MAX_PICTURES, "pictures"), (sounds, MAX_SOUNDS, "sounds"))
        if len(found) > most
    ]
    rest = f'<div class="muted">and {" and ".join(more)}</div>' if more else ""
    return (f'<div class="pictures">{seen}</div>' if seen else "") + heard + rest


def question_text(sample: Sample) -> str:
    """What is asked in words; turns that are not the user's say whose they are."""
    turns = []
    for message in sample.messages:
        words = "\n".join(part.text for part in message.parts if isinstance(part, Text))
        turns.append(words if message.role == "user" else f"{message.role}: {words}")
    return "\n".join(turns)


def reply_line(reply: str, value: float, parsed: str = "") -> str:
    """A reply with what it is worth, by mark, word, colour and number."""
    mark, style = ("✓", "right") if is_right(value) else ("✗", "wrong")
    word = style if value in (0, 1) else f"mostly {style}"
    said = f'<bdi dir="auto">{told(reply)}</bdi>' if reply.strip() else "(nothing)"
    line = (
        f'<p class="answer {style}"><span class="mark" aria-hidden="true">{mark}</span> '
        f'<span class="sr">reply: </span>{said}<span class="word">{word}, score {value:.3g}</span></p>'
    )
    return line + (labelled("understood as", parsed) if parsed.strip() not in ("", reply.strip()) else "")


def labelled(label: str, text: str) -> str:
    return f'<p class="truth">{label}: <strong dir="auto">{told(text) or "–"}</strong></p>'


def asked(name: str, kind: str, text: str) -> str:
    """Kind, id and words of a question, the first lines of its card."""
    chip = f'<span class="chip">{told(kind, 80)}</span>' if kind else ""
    return (
        f'<div>{chip}<span class="id"><span class="sr">question </span>{told(name, 200)}</span></div>'
        f'<p class="question" dir="auto">{told(text)}</p>'
    )


def _picture(part: Image, place: int, of: str) -> str:
    from tinymodal.model.picture_file import load_image

    try:
        image = load_image(part.source).copy()  # it may be the question's own
    except (ValueError, OSError):
        return _missing(part, "picture", place, of)
    image.thumbnail((SIDE_PX, SIDE_PX))
    out = io.BytesIO()
    full = max(image.size) <= SMALL_PX
    image.save(out, "JPEG", quality=QUALITY, optimize=True, subsampling=0 if full else 2)
    width, height = image.size
    return (
        f'<img alt="picture {place} of question {told(of, 200)}" width="{width}" height="{height}" '
        f'loading="lazy" src="data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}">'
    )


def _sound(part: Audio, place: int, of: str) -> str:
    from tinymodal.eval.pages.playable import sounds_of

    try:
        (file,) = sounds_of(Sample((Message("user", (part,)),), of))
    except (ValueError, OSError):
        return _missing(part, "sound", place, of)
    name = f"sound {place} of question {of}"
    return player(file, name.encode("utf-8", "replace").decode()) if file else ""


def _missing(part: Image | Audio, what: str, place: int, of: str) -> str:
    name, fault = f"{what} {place}", "cannot be read"
    if isinstance(part.source, Path):
        name = part.source.name
        fault = fault if os.path.exists(part.source) else "is not there"
    label = told(f"{what} {place} of question {of} {fault}")
    return f'{MISSING} role="img" aria-label="{label}">{told(name, 120)} {fault}</div>'


def _card(row: Answered, key: Key) -> str:
    sample, score = row.question.sample, row.score
    # Of a reply that is spoken, what counts is whether it is heard as it was written.
    truth = labelled("right answer", row.question.answer) if row.heard is None else ""
    heard = labelled("heard", row.heard) if row.heard is not None else ""
    return (
        f'{media(sample)}<div class="told">{asked(key.id, key.kind, question_text(sample))}'
        f"{reply_line(row.reply, score.value, '' if heard else score.parsed)}{heard}{truth}</div>"
    )


# A benchmark


def _answers(result: Result, num: int, seed: int, rooms: Rooms) -> str:
    rows = result.answered
    keys = [
        Key(row.question.sample.id, int(is_right(row.score.value)), row.question.meta.get("kind", ""))
        for row in rows
    ]
    cards = rooms.fill(choose(keys, num, seed), lambda place: _card(rows[place], keys[place]))
    return browser(keys, WRONG_OR_RIGHT, cards, result.benchmark.name) if keys else ""


def number(value: float | None, official: bool) -> str:
    """A number in the unit of its scorer; ours are in per cent."""
    return cell(value, official) + ("" if official or value is None else " %")


def between(span: Sequence[float] | None, official: bool) -> str:
    return f"{number(span[0], official)} to {number(span[1], official)}" if span else "–"


def _headline(result: Result, summary: Mapping[str, Any]) -> tuple[str, str, str]:
    """Its name, the number and its interval."""
    numbers = flat(summary["metrics"])
    path = summary["headline"]
    # A benchmark of error rates has no mean: the first number is the one.
    key = path if path in numbers else next(iter(numbers), path)
    official = result.benchmark.report is not None
    return ROWS.get(key, key), number(numbers.get(key), official), between(summary["interval_95"], official)


def _state(summary: Mapping[str, Any]) -> str:
    if summary["complete"]:
        return "complete"
    return "incomplete" if summary["problems"] else f"first {summary['limit']:,} only"


def _overview(results: Sequence[Result], summaries: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for place, (result, summary) in enumerate(zip(results, summaries, strict=True)):
        name, value, span = _headline(result, summary)
        style = "" if summary["complete"] else ' class="bad-text"'
        rows.append(
            f'<tr><th scope="row"><a href="#b{place}">{told(result.benchmark.name, 200)}</a></th>'
            f"<td>{told(summary['metric'], 80)}: {told(name, 80)}</td><td><strong>{value}</strong></td>"
            f"<td>{span}</td><td>{summary['n']:,}</td><td{style}>{_state(summary)}</td></tr>"
        )
    return table(("", "number", "value", "95 % interval", "questions", "state"), rows)


def _earlier(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The numbers of benchmarks without their questions, as ``results.json`` has them."""
    rows = []
    for name, summary in summaries.items():
        numbers, path = flat(summary["metrics"]), str(summary.get("headline", ""))
        key = path if path in numbers else next(iter(numbers), path)
        span = between(summary.get("interval_95"), True)
        rows.append(
            f'<tr><th scope="row">{told(name, 200)}</th>'
            f"<td>{told(str(summary['metric']), 80)}: {told(key, 80)}</td>"
            f"<td><strong>{number(numbers.get(key), True)}</strong></td><td>{span}</td>"
            f"<td>{summary['n']:,}</td><td>{'complete' if summary['complete'] else 'incomplete'}</td></tr>"
        )
    heads = ("", "number", "value", "95 % interval", "questions", "state")
    note = "As results.json has them; questions and replies are in the files beside it."
    return f'<h2>Scored in this folder before</h2><p class="muted">{note}</p>{table(heads, rows)}'


def _head(result: Result, summary: Mapping[str, Any]) -> str:
    name, value, span = _headline(result, summary)
    rights = sum(is_right(row.score.value) for row in result.answered)
    partly = any(row.score.value not in (0, 1) for row in result.answered)
    lower = ", lower is better" if result.benchmark.lower_is_better else ""
    num_problems = sum(one["count"] for one in summary["problems"].values())
    tiles = [
        tile(
            f"{summary['metric']}: {name}{lower}",
            value,
            f"95 % interval {span}" if summary["interval_95"] else "its interval cannot be told",
        ),
        tile("right answers", f"{rights:,}", "worth at least half" if partly else f"of {summary['n']:,}"),
        tile(
            "questions",
            f"{summary['n']:,}",
            f"the first {summary['limit']:,} only" if summary["limit"] is not None else "all that were given",
        ),
        tile(
            "state",
            ("✓ " if summary["complete"] else "✗ ") + _state(summary),
            f"{num_problems:,} problems" if num_problems else "nothing is missing or unreadable",
            "good" if summary["complete"] else "bad",
        ),
    ]
    return (
        f"<h2>{told(result.benchmark.name, 200)}</h2>"
        f'<p class="muted">{told(summary["protocol"]["source"])}</p>'
        f'<div class="tiles">{"".join(tiles)}</div>{_problems(summary)}{_metrics(result, summary)}'
        f"{_protocol(summary)}"
    )


def _problems(summary: Mapping[str, Any]) -> str:
    lines = []
    for kind, one in summary["problems"].items():
        names = "; ".join(one["named"]) + ("; ..." if one["count"] > len(one["named"]) else "")
        lines.append(f"<li><strong>{one['count']:,} {told(kind, 200)}</strong>: {told(names)}</li>")
    return f'<ul class="problems">{"".join(lines)}</ul>' if lines else ""


def _metrics(result: Result, summary: Mapping[str, Any]) -> str:
    official, constants = result.benchmark.report is not None, summary["best_constant"]
    numbers = flat(summary["metrics"])
    rows = []
    for key, value in numbers.items():
        style = "total" if key == summary["headline"] else ""
        bar = ""
        if not official and 0 <= value <= 1:
            bar = f'<span class="bar new"><i style="width:{100 * value:.1f}%"></i></span>'
        cells = f'<td class="bars"><span class="value">{number(value, official)}</span>{bar}</td>'
        if constants:
            best = constants.get(key)
            shown = f"{number(best['accuracy'], False)} ({told(best['answer'], 60)})" if best else ""
            cells += f'<td class="muted">{shown}</td>'
        rows.append(f'<tr class="{style}"><th scope="row">{told(ROWS.get(key, key), 200)}</th>{cells}</tr>')
    if not rows:
        return ""
    heads = ["", summary["metric"], *(["best constant answer"] if constants else [])]
    folded = "" if len(rows) > MANY_ROWS else " open"
    return f"<details{folded}><summary>Numbers ({len(rows):,})</summary>{table(heads, rows)}</details>"


def _protocol(summary: Mapping[str, Any]) -> str:
    facts = dict(summary["protocol"]) | {
        key: summary[key] for key in ("run", "listener", "timing") if key in summary
    }
    rows = "".join(
        f"<dt>{told(key.replace('_', ' '), 80)}</dt><dd>{told(_fact(value))}</dd>"
        for key, value in facts.items()
    )
    return f"<details><summary>How it was made</summary><dl>{rows}</dl></details>"


def _fact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
