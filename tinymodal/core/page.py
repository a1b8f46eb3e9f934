"""How every page of ours is made up: one look in light and dark, wide and narrow, and nothing from elsewhere.

A page is one file that names nothing outside itself; its own policy forbids the browser to load anything, and
any script but one whose hash it states. What people and models wrote goes through :func:`told`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape

MAX_CHARACTERS = 2_000
"""Of a text, shown."""
UNPRINTABLE = re.compile("[\\x00-\\x08\\x0b\\x0e-\\x1f\\x7f-\\x9f]")

STYLE = """
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
audio{display:block;width:100%;height:32px;margin:8px 0 2px}
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
"""Of all pages but those of ``tinymodal compare``."""


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page as text.

    Args:
        title: of the page; any text.
        body: HTML inside ``main``.
        style: behind :data:`STYLE`.
        script: the only one that may run; empty: none may.
    """
    runs = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
        "form-action 'none'" + (f"; script-src 'sha256-{runs}'" if script else "")
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{told(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"</main>\n{f'<script>{script}</script>' if script else ''}\n</body>\n</html>\n"
    )


def told(text: object, limit: int = MAX_CHARACTERS) -> str:
    """Any text as HTML, at most so many characters of it.

    Half characters, which no file can hold, and those that no page may become question marks.
    """
    whole = str(text)
    shown = whole[:limit].encode("utf-8", "replace").decode()
    rest = f" … ({len(whole):,} characters)" if len(whole) > limit else ""
    return escape(UNPRINTABLE.sub("?", shown)) + rest
