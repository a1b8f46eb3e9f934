"""Heat over a picture or a spectrogram, and all words of an explanation on one sheet.

What was looked at keeps its own colours and what was not is covered, so a red thing stays red where it
matters: a colour scale laid over the whole would repaint it. Each map is scaled to its own greatest value;
how much of the attention it holds stands beside it as a number.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter
import PIL.ImageFont
import torch
from torch import Tensor

from tinymodal.infer.explain import Explanation, Shown, Word
from tinymodal.model.audio import Hearing
from tinymodal.model.sound import load_sound

COVER = np.array([(14, 16, 38), (96, 22, 92), (206, 66, 62), (250, 164, 60), (255, 226, 150)], np.float64)
"""From what was not looked at to what was, evenly spaced; RGB."""
OPACITY = 0.84
"""Of the cover where nothing was looked at; none where most was."""
LONGEST_PX, LEAST_PX = 480, 288
"""Longer side of a picture that is shown: larger ones are made smaller, smaller ones larger."""
SPECTROGRAM_PX = (160, 720)
"""Height and width."""
MEL = Hearing("log_mel")
"""Sounds are drawn as Whisper hears them, whatever tower they are heard with."""
LONGEST_S = 36_000.0

# The sheet
PANEL_PX = 300
MARGIN_PX = 20
PER_ROW = 4
MAX_PANELS = 24
INK, FAINT, PAPER, RULE, BAR = (28, 29, 32), (98, 101, 109), (251, 251, 249), (225, 226, 222), (47, 95, 208)


def ground(shown: Shown) -> PIL.Image.Image:
    """What heat is laid over: the picture, or the sound's spectrogram; RGB."""
    if shown.picture is None:
        assert shown.wave is not None
        assert shown.rate_hz is not None
        return spectrogram(shown.wave, shown.rate_hz)
    longest = max(shown.picture.size)
    scale = min(1.0, LONGEST_PX / longest) if longest >= LEAST_PX else LEAST_PX / longest
    size = tuple(max(1, round(edge * scale)) for edge in shown.picture.size)
    return shown.picture.resize((size[0], size[1]), PIL.Image.Resampling.BICUBIC)


def spectrogram(wave: Tensor, rate_hz: int) -> PIL.Image.Image:
    """A sound's log-mel bands over its length, high ones above, loud ones bright; RGB.

    Args:
        wave: float32 [samples].
        rate_hz: of the samples.
    """
    # A window that is one hop long at least; a very short sound is still a picture.
    heard = load_sound(wave, rate_hz, None, None, LONGEST_S, MEL.rate_hz)
    bands = torch.cat(MEL.prepare(heard), dim=1)[:, : max(1, -(-len(heard) // MEL.hop))].numpy()
    low, high = float(bands.min()), float(bands.max())
    grey = (bands[::-1] - low) / max(high - low, 1e-6)
    image = PIL.Image.fromarray((255 * grey**0.9).astype(np.uint8))
    height, width = SPECTROGRAM_PX
    return image.resize((width, height), PIL.Image.Resampling.BILINEAR).convert("RGB")


def cover(field_HW: Tensor, size: tuple[int, int], softness: float = 0.0) -> PIL.Image.Image:
    """What is laid over the ground, RGBA: opaque where nothing was looked at, clear where most was.

    Args:
        field_HW: 0 and above, at any scale.
        size: width and height of what it covers.
        softness: radius of the blur as a fraction of the longer side; about half a cell hides its edges.
    """
    field = field_HW.numpy().astype(np.float64)
    heat = field / field.max() if field.max() > 0 else field
    small = PIL.Image.fromarray((255 * heat).round().astype(np.uint8))
    wide = small.resize(size, PIL.Image.Resampling.BILINEAR)
    if softness:
        wide = wide.filter(PIL.ImageFilter.GaussianBlur(softness * max(size)))
    value = np.asarray(wide, np.float64)
    value = value / value.max() if value.max() > 0 else value
    place = value * (len(COVER) - 1)
    below = np.clip(place.astype(int), 0, len(COVER) - 2)
    rest = (place - below)[..., None]
    colour = COVER[below] * (1 - rest) + COVER[below + 1] * rest
    alpha = 255 * OPACITY * (1 - value) ** 0.8
    return PIL.Image.fromarray(np.dstack([colour, alpha]).round().astype(np.uint8), "RGBA")


def softness(shown: Shown) -> float:
    """Half an average cell, as a fraction of the longer side."""
    boxes = shown.places.boxes_C4
    if shown.picture is None:
        return 0.004
    height, width = shown.picture.height, shown.picture.width
    tall = float((boxes[:, 2] - boxes[:, 0]).min()) * height
    wide = float((boxes[:, 3] - boxes[:, 1]).min()) * width
    return 0.35 * min(tall, wide) / max(height, width)


def heated(explanation: Explanation, word: Word, shown: Shown, under: PIL.Image.Image) -> PIL.Image.Image:
    """The ground with a word's attention over it, RGB."""
    over = cover(explanation.field(word, shown), under.size, softness(shown))
    return PIL.Image.alpha_composite(under.convert("RGBA"), over).convert("RGB")


def png(image: PIL.Image.Image) -> bytes:
    """As a PNG file."""
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def sheet(explanation: Explanation, title: str) -> PIL.Image.Image:
    """The words of an answer side by side, each with what it looked at and what else could have come.

    Words beyond ``MAX_PANELS`` are only counted. Letters are those of Pillow's own font (Latin, Greek);
    others are squares here and themselves on the page.
    """
    words = explanation.words[:MAX_PANELS]
    grounds = [ground(shown) for shown in explanation.media]
    panels = [_panel(explanation, word, grounds) for word in words]
    columns = max(1, min(PER_ROW, len(panels)))
    width = max(columns * (PANEL_PX + MARGIN_PX) + MARGIN_PX, 2 * PANEL_PX + 3 * MARGIN_PX)
    head = [
        *[(line, 22, INK) for line in _lines(title, width, 22)],
        *[(line, 16, FAINT) for line in _lines(f"Answer: {explanation.answer}", width, 16)],
    ]
    if len(words) < len(explanation.words):
        head.append(
            (f"the first {len(words)} of {len(explanation.words)} words; all are on the page", 14, FAINT)
        )
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    top = MARGIN_PX + sum(round(size * 1.4) for _, size, _ in head) + MARGIN_PX
    height = top + sum(max(panel.height for panel in row) + MARGIN_PX for row in rows)
    page = PIL.Image.new("RGB", (width, height), PAPER)
    pen = PIL.ImageDraw.Draw(page)
    y = MARGIN_PX
    for line, size, colour in head:
        pen.text((MARGIN_PX, y), line, fill=colour, font=PIL.ImageFont.load_default(size))
        y += round(size * 1.4)
    y = top
    for row in rows:
        for number, panel in enumerate(row):
            page.paste(panel, (MARGIN_PX + number * (PANEL_PX + MARGIN_PX), y))
        y += max(panel.height for panel in row) + MARGIN_PX
    return page


def _panel(explanation: Explanation, word: Word, grounds: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    pictures = []
    for shown, under in zip(explanation.media, grounds, strict=True):
        seen = heated(explanation, word, shown, under)
        height = max(1, round(seen.height * PANEL_PX / seen.width))
        pictures.append(
            (
                seen.resize((PANEL_PX, height), PIL.Image.Resampling.LANCZOS),
                f"{shown.name}: {explanation.share(word, shown):.0%} of the attention",
            )
        )
    tokens = explanation.tokens[word.first : word.last][:4]
    lines = sum(len(token.top) for token in tokens) + len(tokens)
    height = 34 + sum(seen.height + 26 for seen, _ in pictures) + 22 * lines + 8
    panel = PIL.Image.new("RGB", (PANEL_PX, height), PAPER)
    pen = PIL.ImageDraw.Draw(panel)
    large, small = PIL.ImageFont.load_default(22), PIL.ImageFont.load_default(14)
    pen.text((0, 2), _printable(word.text.strip() or "(nothing)"), fill=INK, font=large)
    y = 34
    for seen, told in pictures:
        panel.paste(seen, (0, y))
        pen.text((0, y + seen.height + 3), told, fill=FAINT, font=small)
        y += seen.height + 26
    for token in tokens:
        pen.line((0, y + 3, PANEL_PX, y + 3), fill=RULE)
        y += 8
        for guess in token.top:
            taken = guess.token == token.token
            pen.rectangle(
                (0, y + 3, max(1, round(90 * guess.probability)), y + 15), fill=BAR if taken else RULE
            )
            pen.text((98, y), f"{guess.probability:6.1%}", fill=INK if taken else FAINT, font=small)
            pen.text(
                (160, y),
                _printable(guess.text.strip() or "(space)"),
                fill=INK if taken else FAINT,
                font=small,
            )
            y += 22
        y += 14
    return panel


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "·" for c in text)[:28]


def _lines(text: str, width: int, size: int) -> list[str]:
    """At most three lines of about the sheet's width."""
    lines = textwrap.wrap(_printable_all(text), max(20, int((width - 2 * MARGIN_PX) / (size * 0.52)))) or [""]
    return [*lines[:2], lines[2][:-1] + "…"] if len(lines) > 3 else lines


def _printable_all(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
