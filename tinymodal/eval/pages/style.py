"""How pages to look at answers are made up: style, script, policy, and the plain pieces of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tinymodal.core.errors import DataError
from tinymodal.core.page import document, told
from tinymodal.eval.folder import write_atomically

MISSING = '<div class="missing"'
"""Begins what stands for a picture or a sound that cannot be read."""

SCRIPT = """
(() => {
for (const box of document.querySelectorAll(".browse")) {
  const controls = box.querySelector(".controls"), cards = [...box.querySelectorAll("li.card")];
  const buttons = [...controls.querySelectorAll("button")], told = controls.querySelector("output");
  const kinds = controls.querySelector("select"), search = controls.querySelector("input");
  const plain = text => text.normalize("NFKC").toLowerCase().replace(/\\s+/g, " ").trim();
  const words = cards.map(card => plain(card.textContent));
  let group = "";
  const show = () => {
    const kind = kinds ? kinds.value : "", sought = plain(search.value);
    let shown = 0;
    cards.forEach((card, i) => {
      const fits = (group === "" || card.dataset.group === group)
        && (kind === "" || card.dataset.kind === kind) && words[i].includes(sought);
      card.hidden = !fits;
      shown += fits;
    });
    told.textContent = shown + " of " + cards.length;
    buttons.forEach(button => button.setAttribute("aria-pressed", button.dataset.group === group));
  };
  buttons.forEach(button => button.addEventListener("click", () => {
    group = button.dataset.group;
    show();
  }));
  controls.addEventListener("input", show);
  controls.hidden = false;
  show();
}
})();
"""

ADDED = """
.sr{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
:focus-visible{outline:2px solid var(--new);outline-offset:2px}
a{color:var(--new)}
h1,h2,.tile,.lead,.problems,.chip,.id,.notes{overflow-wrap:anywhere}
h2{scroll-margin-top:12px}
.scroll{margin:14px 0}
td{min-width:0;white-space:nowrap}td.bars{min-width:132px}
tbody th,td.muted{white-space:normal;min-width:11ch;max-width:44ch;overflow-wrap:break-word}
.notes{margin:0 0 14px;padding-left:20px;color:var(--muted);font-size:15px}
.verdict{margin:4px 0 8px;font-weight:650}
.tiles{grid-template-columns:repeat(auto-fit,minmax(min(190px,46%),1fr))}
.tile-value{overflow-wrap:anywhere}
.tile.bad .tile-value,.bad-text{color:var(--bad)}.tile.good .tile-value{color:var(--good)}
.problems{margin:14px 0 0;padding:12px 16px 12px 34px;border:1px solid var(--bad);border-radius:10px}
details{margin:14px 0 0}summary{cursor:pointer;padding:4px 0}
details>dl,details>.scroll{margin:8px 0 0}details+.muted{margin-top:14px}dd{white-space:pre-wrap}
.controls{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:8px 18px;align-items:center;
margin:22px 0 12px;padding:10px 0;background:var(--paper);border-bottom:1px solid var(--rule);font-size:15px}
.controls[hidden],.card[hidden]{display:none}
.buttons{display:inline-flex;flex-wrap:wrap;gap:6px}
.controls label{display:inline-flex;align-items:center;gap:6px;min-width:0}
button,select,input{font:inherit;color:var(--ink);background:var(--card);border:1px solid var(--muted);
border-radius:8px;padding:4px 12px;min-height:34px;max-width:100%}
button{cursor:pointer}button[aria-pressed=true]{background:var(--ink);color:var(--paper);border-color:var(--ink)}
select{max-width:min(220px,70vw)}input{width:min(160px,56vw)}
output{margin-left:auto;font-variant-numeric:tabular-nums}
ul.gallery{list-style:none;margin:0;padding:0;
grid-template-columns:repeat(auto-fill,minmax(min(250px,100%),1fr))}
li.card{content-visibility:auto;contain-intrinsic-size:auto 340px}
.gallery .pictures{flex-wrap:wrap;gap:2px}
.gallery .pictures img{width:100%;max-width:none;height:200px;aspect-ratio:auto;object-fit:contain}
.gallery .pictures:has(img+img) img,.gallery .pictures:has(.missing+.missing) .missing{width:calc(50% - 1px);
height:130px}
.missing{width:100%;display:grid;place-items:center;min-height:64px;padding:10px 12px;color:var(--muted);
font-size:13px;text-align:center;overflow-wrap:anywhere;border:1px dashed var(--muted)}
.told{padding:10px 12px 12px;font-size:15px;min-width:0}
.told p{margin:6px 0;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.told .question{margin:8px 0}
.told .by{margin:8px 0 0;font-size:13px;color:var(--muted);overflow-wrap:anywhere}
.told .by+p{margin-top:0}
.id{font-size:12px;color:var(--muted)}
.answer .word{unicode-bidi:isolate}
.span{position:relative;display:inline-block;vertical-align:middle;width:100%;min-width:120px;height:14px}
.span i{position:absolute;top:6px;height:2px;background:var(--ink)}
.span b{position:absolute;top:2px;width:10px;height:10px;margin-left:-5px;border-radius:5px;
background:var(--new)}
.span u{position:absolute;top:0;bottom:0;left:50%;width:1px;background:var(--muted)}
@media(max-width:560px){main{padding:24px 14px 40px}.controls{position:static}output{margin-left:0}}
@media print{.controls{display:none}}
"""
"""Behind :data:`tinymodal.core.page.STYLE`."""


class Key(NamedTuple):
    """What a question is chosen and filtered by."""

    id: str
    group: int
    """Place in the names of the groups, such as ``WRONG_OR_RIGHT``."""
    kind: str


def write_document(path: Path, title: str, body: str) -> Path:
    """Write a page with :data:`SCRIPT`, which alone may run, and the style of reports.

    Raises:
        DataError: ``path`` is a folder.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; expected the name of a page. Give a file, e.g. page.html")
    write_atomically(path, document(title, body, ADDED, SCRIPT))
    return path


def table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls by itself where it is too wide; ``rows`` are HTML."""
    cells = "".join(f'<th scope="col">{told(head, 200)}</th>' for head in heads)
    body = "".join(rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def tile(name: str, value: str, note: str, style: str = "") -> str:
    return (
        f'<div class="tile {style}"><div class="tile-name">{told(name, 200)}</div>'
        f'<div class="tile-value">{told(value, 200)}</div><div class="muted">{told(note, 400)}</div></div>'
    )


def browser(
    keys: Sequence[Key], names: Sequence[str], cards: Mapping[int, str], what: str, of: str = "questions"
) -> str:
    """Cards with what filters them: buttons for groups, a list of kinds, a search.

    Args:
        keys: of all questions there are.
        names: of the groups.
        cards: those that are shown: place in ``keys`` -> HTML.
        what: names the benchmark.
        of: what ``keys`` are, for the sentence on how many of how many are shown.
    """
    shown = [keys[place] for place in cards]
    kinds = Counter(key.kind for key in shown)
    places = {kind: number for number, kind in enumerate(kinds)}
    counts, all_of = (Counter(key.group for key in some) for some in (shown, keys))
    parts = [f"{counts[group]:,} of {all_of[group]:,} {name}" for group, name in enumerate(names)]
    missing = sum(card.count(MISSING) for card in cards.values())
    lacking = f" {missing:,} of their pictures and sounds could not be read." if missing else ""
    note = f"{len(cards):,} of {len(keys):,} {of} are shown: {', '.join(parts)}. They are drawn by their ids."
    buttons = "".join(
        f'<button type="button" aria-pressed="{str(group == "").lower()}" data-group="{group}">{told(name)}'
        f" ({count:,})</button>"
        for group, name, count in [
            ("", "all", len(cards)),
            *((n, name, counts[n]) for n, name in enumerate(names)),
        ]
    )
    options = "".join(
        f'<option value="{number}">{told(kind or "other", 80)} ({num:,})</option>'
        for number, (kind, num) in enumerate(kinds.items())
    )
    choice = f'<label>kind <select><option value="">all</option>{options}</select></label>'
    items = "".join(
        f'<li class="card" data-group="{keys[place].group}" data-kind="{places[keys[place].kind]}">'
        f"{card}</li>"
        for place, card in cards.items()
    )
    return (
        f'<p class="muted">{told(note + lacking)}</p><div class="browse"><div class="controls" role="group" '
        f'aria-label="Which answers of {told(what, 80)} are shown" hidden><span class="buttons">{buttons}'
        f"</span>{choice if len(kinds) > 1 else ''}"
        f'<label>search <input type="search" autocomplete="off"></label>'
        f'<output class="muted" aria-live="polite"></output></div>'
        f'<ul class="gallery" role="list">{items}</ul></div>'
    )
