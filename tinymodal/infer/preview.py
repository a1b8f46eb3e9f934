"""A picture in the terminal: as pixels where it can show them, else as blocks of colour, two pixels each.

Which way is read off the environment, as terminals announce themselves: kitty's protocol (kitty, Ghostty),
iTerm2's (iTerm2, WezTerm), else half blocks in 24-bit colour or in the 256 colours that nearly every terminal
has. Nothing is shown in a terminal that has neither, nor where ``NO_COLOR`` is set (no-color.org).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import PIL.Image
import PIL.ImageOps

Way = Literal["kitty", "iterm2", "24 bit", "256 colours"]

COLUMNS, ROWS = 40, 20
"""Of characters, at most; a character is about twice as high as wide."""
PIXELS = 480
"""Longest side of what is sent as pixels."""
CHUNK = 4096
"""Bytes that kitty's protocol takes at once: sw.kovidgoyal.net/kitty/graphics-protocol."""
LEVELS = (0, 95, 135, 175, 215, 255)
"""Of each colour in the cube of xterm's 256."""


def way_of(environment: Mapping[str, str]) -> Way | None:
    """How a terminal with this environment shows a picture; None: it does not."""
    if "NO_COLOR" in environment:
        return None
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    # Inside of a multiplexer pixels do not come through, colours do.
    inner = "TMUX" in environment or term.startswith(("screen", "tmux"))
    if not inner and ("kitty" in term or "KITTY_WINDOW_ID" in environment or program == "ghostty"):
        return "kitty"
    if not inner and program in ("iTerm.app", "WezTerm"):
        return "iterm2"
    if environment.get("COLORTERM") in ("truecolor", "24bit"):
        return "24 bit"
    return "256 colours" if "256color" in term else None


def preview(path: Path, way: Way, columns: int = COLUMNS) -> str:
    """What shows a picture when it is printed, with the end of its last line.

    Args:
        path: of the picture; one that cannot be read shows nothing.
        way: of :func:`way_of`.
        columns: that the terminal has.
    """
    try:
        with PIL.Image.open(path) as file:
            file.draft("RGB", (PIXELS, PIXELS))
            picture = PIL.ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, ValueError, SyntaxError):
        return ""
    if way in ("24 bit", "256 colours"):
        return _blocks(picture, way, min(columns, COLUMNS))
    picture.thumbnail((PIXELS, PIXELS))
    held = io.BytesIO()
    picture.save(held, "PNG")
    data = base64.standard_b64encode(held.getvalue()).decode()
    if way == "iterm2":
        return f"\033]1337;File=inline=1;size={len(held.getvalue())};preserveAspectRatio=1:{data}\a\n"
    parts = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    sent = []
    for n, part in enumerate(parts):
        keys = "a=T,f=100," if n == 0 else ""
        sent.append(f"\033_G{keys}m={int(n < len(parts) - 1)};{part}\033\\")
    return "".join(sent) + "\n"


def _blocks(picture: PIL.Image.Image, way: Way, columns: int) -> str:
    """Two pixels a character: the upper half in its colour, the lower one in that of the background."""
    scale = min(columns / picture.width, 2 * ROWS / picture.height, 1.0)
    wide = max(1, round(picture.width * scale))
    high = max(1, round(picture.height * scale / 2)) * 2
    small = picture.resize((wide, high))
    pixels = small.tobytes()
    colour = _true if way == "24 bit" else _of_256

    def at(x: int, y: int) -> tuple[int, int, int]:
        first = 3 * (y * wide + x)
        return pixels[first], pixels[first + 1], pixels[first + 2]

    lines = []
    for y in range(0, high, 2):
        cells = (f"\033[38;{colour(at(x, y))};48;{colour(at(x, y + 1))}m\u2580" for x in range(wide))
        lines.append("".join(cells) + "\033[0m\n")
    return "".join(lines)


def _true(rgb: tuple[int, int, int]) -> str:
    return "2;" + ";".join(map(str, rgb))


def _of_256(rgb: tuple[int, int, int]) -> str:
    red, green, blue = (min(range(6), key=[abs(level - v) for level in LEVELS].__getitem__) for v in rgb)
    return f"5;{16 + 36 * red + 6 * green + blue}"
