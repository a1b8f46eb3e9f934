"""How the web chat looks: the house's colours in light and dark, the reader's own fonts, a phone's width."""

from __future__ import annotations

from typing import Any

FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]
BLUE = {
    "c50": "#eef3ff", "c100": "#dde7ff", "c200": "#bccfff", "c300": "#9bb6ff", "c400": "#7ea2ff",
    "c500": "#4f7be4", "c600": "#2f5fd0", "c700": "#254daa", "c800": "#1d3c85", "c900": "#152c62",
    "c950": "#0e1e44",
}  # fmt: skip
"""Shades of ``--new`` of :mod:`tinymodal.core.page`."""

CSS = """
footer{display:none!important}
.gradio-container{width:100%!important;max-width:1020px!important;margin:0 auto!important}
#head h1{font-size:24px;margin:10px 0 0;overflow-wrap:anywhere}
iframe.explained{width:100%;height:min(1100px,86vh);border:1px solid var(--border-color-primary);
border-radius:10px;background:var(--body-background-fill)}
.refused{color:#b3261e;overflow-wrap:anywhere}
@media(prefers-color-scheme:dark){.refused{color:#ff8a80}}
#talk img{max-width:min(320px,100%);height:auto}
#talk button[aria-label="Share"]{display:none!important}
#talk .minimal-audio-player{min-width:min(280px,60vw);height:56px!important;aspect-ratio:auto!important}
@media(max-width:560px){.gradio-container{padding:8px!important}#head h1{font-size:20px}}
"""


def theme(gr: Any) -> Any:
    """Gradio's plain theme in our colours. Fonts are the system's: none is fetched."""
    themes = gr.themes
    blue = themes.Color(**BLUE, name="house")
    return themes.Base(
        primary_hue=blue,
        secondary_hue=blue,
        neutral_hue="zinc",
        font=list(FONT),
        font_mono=list(MONO),
        radius_size="lg",
    ).set(
        body_background_fill="#fbfbf9",
        body_background_fill_dark="#15171b",
        body_text_color="#1c1d20",
        body_text_color_dark="#e9eaec",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1d2025",
        border_color_primary="#e1e2de",
        border_color_primary_dark="#31353d",
        button_primary_background_fill="#2f5fd0",
        button_primary_background_fill_dark="#2f5fd0",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
    )
