"""A page with the questions on which two models differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinymodal.core.types import Sample
from tinymodal.eval.pages import answers as page
from tinymodal.eval.pages.style import Key, browser, table, tile, told, write_document
from tinymodal.eval.pair import (
    Gap,
    Pair,
    cells_of,
    headlines_of,
    in_points,
    notes,
    p_value,
    sentence,
    span_of,
)
from tinymodal.eval.results import Result

if TYPE_CHECKING:
    pass


def samples_of(results: Iterable[Result]) -> dict[str, dict[str, Sample]]:
    """Benchmark -> id -> question, for the pictures of :func:`write_pair_page`."""
    return {
        result.benchmark.name: {row.question.sample.id: row.question.sample for row in result.answered}
        for result in results
    }


def write_pair_page(
    path: Path,
    pairs: Sequence[Pair],
    samples: Mapping[str, Mapping[str, Sample]] | None = None,
    *,
    cards: int = page.NUM_CARDS,
    seed: int = 0,
) -> Path:
    """Write a page with the numbers of ``pairs`` and the questions on which the two differ.

    Args:
        path: the file.
        pairs: as :func:`compare_folders` gives them.
        samples: benchmark -> id -> question, to show its pictures; without, only its words are shown.
        cards: questions shown of each benchmark, at most.
        seed: of the draw.

    Raises:
        DataError: ``path`` is a folder.
    """
    title = " and ".join(pairs[0].models) if pairs else "nothing compared"
    parts = [f"<header><h1>{told(f'TinyModal: {title}')}</h1></header>"]
    rooms = page.Rooms(len(pairs), page.MAX_BYTES)
    for pair in pairs:
        shown = _cards(pair, (samples or {}).get(pair.name, {}), cards, seed, rooms)
        parts.append(f"<section>{_head(pair)}{shown}</section>")
    return write_document(path, f"TinyModal: {title}", "\n".join(parts))


def _head(pair: Pair) -> str:
    gap, (first, second) = pair.whole, pair.models
    tiles = [
        tile(first, f"{100 * gap.first:.1f} %", "mean score"),
        tile(second, f"{100 * gap.second:.1f} %", "mean score"),
        tile("difference, in points", in_points(gap.difference), f"95 % interval {span_of(gap.interval_95)}"),
        tile("questions", f"{gap.n:,}", f"answered by both; sign test {p_value(gap.p_value)}"),
    ]
    groups = [*pair.kinds.items(), ("all questions", gap)]
    reach = max((abs(end) for _, each in groups for end in each.interval_95 or ()), default=0) or 1
    rows = [_row_of(kind or "other", each, reach, each is gap) for kind, each in groups]
    if official := headlines_of(pair):
        name, *values = map(told, official)
        cells = "".join(f"<td>{value}</td>" for value in values)
        rows.append(f'<tr class="muted"><th scope="row">{name}</th>{cells}<td colspan="4"></td></tr>')
    heads = ("", first, second, "difference", "around zero", "p", "questions")
    lines = "".join(f"<li>{told(line)}</li>" for line in notes(pair))
    said = f'<p class="verdict">{told(sentence(pair))}</p><ul class="notes">{lines}</ul>'
    return f'<h2>{told(pair.name)}</h2>{said}<div class="tiles">{"".join(tiles)}</div>{table(heads, rows)}'


def _row_of(name: str, gap: Gap, reach: float, whole: bool) -> str:
    """A line of numbers, with the difference and its interval drawn around zero."""
    a, b, points, span, p, n = cells_of(gap)
    drawn = ""
    if gap.interval_95:
        low, at, high = (
            50 + 48 * value / reach for value in (gap.interval_95[0], gap.difference, gap.interval_95[1])
        )
        drawn = (
            f'<span class="span" role="img" aria-label="95 % interval {span}"><u></u>'
            f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i><b style="left:{at:.1f}%"></b></span>'
        )
    cells = "".join(
        f"<td>{cell}</td>" for cell in (f"{a} %", f"{b} %", f'{points}<div class="muted">{span}</div>')
    )
    return (
        f'<tr class="{"total" if whole else ""}"><th scope="row">{told(name, 200)}</th>{cells}'
        f'<td class="bars">{drawn}</td><td>{p}</td><td>{n}</td></tr>'
    )


def _cards(pair: Pair, samples: Mapping[str, Sample], num: int, seed: int, rooms: page.Rooms) -> str:
    differ = [(x, y) for x, y in pair.rows if x.score != y.score]
    keys = [Key(x.id, int(x.score < y.score), x.kind) for x, y in differ]

    def card(place: int) -> str:
        first = differ[place][0]
        sample = samples.get(first.id)
        seen = page.media(sample) if sample else ""
        words = page.question_text(sample) if sample else first.prompt
        lines = "".join(
            f'<p class="by">{told(name, 200)}</p>{page.reply_line(row.reply, row.score, row.parsed)}'
            for name, row in zip(pair.models, differ[place], strict=True)
        )
        truth = page.labelled("right answer", first.answer)
        return f'{seen}<div class="told">{page.asked(first.id, first.kind, words)}{lines}{truth}</div>'

    if not differ:
        return ""
    names = [f"{name} better" for name in pair.models]
    shown = rooms.fill(page.choose(keys, num, seed), card)
    return browser(keys, names, shown, pair.name, "questions with different scores")
