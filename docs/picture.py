"""Draw docs/answer.png: one question of every kind, with the starter model's own answers.

    python docs/picture.py             ask the starter, and draw
    python docs/picture.py --scene     only docs/scene.png, a made scene to chat about

Nothing is chosen: it is the first question of each kind for ``SEED``, right or wrong. ``SEED`` is of the
``val`` split, so the questions that are scored are not looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tinymodal.core.types import Text
from tinymodal.data.synthetic import MadeQuestion, Scenes, questions

DOCS = Path(__file__).resolve().parent
SEED = 7
SCENE = 1
"""Which sample of the made captions is docs/scene.png."""
COLUMNS = 5
CARD_PX = (220, 268)
PICTURE_PX = 184
GAP_PX = 12
INK, PALE, RIGHT, WRONG = (32, 33, 36), (225, 227, 230), (22, 120, 60), (190, 40, 40)


@dataclass(frozen=True, slots=True)
class Card:
    """A question with its pictures, the reply and the truth."""

    pictures: tuple[Image.Image, ...]
    question: str
    reply: str
    truth: str


def scene() -> Image.Image:
    """The scene of docs/scene.png, 96 x 96 px."""
    (picture,) = Scenes(split="val", seed=SEED, form="captions").sample(SCENE).media()
    assert isinstance(picture.source, Image.Image)
    return picture.source


def ask(model: str) -> list[Card]:
    """The first question of each kind, answered by ``model``."""
    import tinymodal

    made = questions("val", SEED, per_kind=1, unseen_pairs=False)
    replies = tinymodal.Engine(tinymodal.load(model)).reply([one.sample for one in made])
    return [card(one, reply.text) for one, reply in zip(made, replies, strict=True)]


def card(made: MadeQuestion, reply: str) -> Card:
    """What is drawn of one question."""
    pictures = tuple(part.source for part in made.sample.media())
    said = [part.text for part in made.sample.messages[-1].parts if isinstance(part, Text)]
    return Card(pictures, said[-1].strip(), reply, made.answer)


def draw(cards: Sequence[Card]) -> Image.Image:
    """All cards, ``COLUMNS`` in a line."""
    lines = -(-len(cards) // COLUMNS)
    width, height = (n * size + (n + 1) * GAP_PX for n, size in zip((COLUMNS, lines), CARD_PX, strict=True))
    sheet = Image.new("RGB", (width, height), "white")
    for i, one in enumerate(cards):
        line, column = divmod(i, COLUMNS)
        at = GAP_PX + column * (CARD_PX[0] + GAP_PX), GAP_PX + line * (CARD_PX[1] + GAP_PX)
        _draw_card(sheet, at, one)
    return sheet


def _draw_card(sheet: Image.Image, at: tuple[int, int], one: Card) -> None:
    pen, (x, y) = ImageDraw.Draw(sheet), at
    small, big = ImageFont.load_default(13), ImageFont.load_default(16)
    pen.rounded_rectangle((x, y, x + CARD_PX[0], y + CARD_PX[1]), 10, outline=PALE, width=2)
    edge = (PICTURE_PX - 6 * (len(one.pictures) - 1)) // len(one.pictures)
    left, top = x + (CARD_PX[0] - PICTURE_PX) // 2, y + 12 + (PICTURE_PX - edge) // 2
    for n, picture in enumerate(one.pictures):
        sheet.paste(picture.resize((edge, edge), Image.Resampling.LANCZOS), (left + n * (edge + 6), top))
    text = "\n".join(_wrapped(one.question, small, CARD_PX[0] - 20))
    pen.multiline_text(
        (x + CARD_PX[0] / 2, y + 202), text, INK, small, anchor="ma", align="center", spacing=2
    )
    right = one.reply.strip().lower() == one.truth.lower()
    reply = one.reply if right else f"{one.reply or '(nothing)'}  (it is {one.truth})"
    pen.text((x + CARD_PX[0] / 2, y + 256), reply, RIGHT if right else WRONG, big, anchor="ms")


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def main() -> None:
    words = argparse.ArgumentParser(description="Draw docs/answer.png and docs/scene.png.")
    words.add_argument("--scene", action="store_true", help="only docs/scene.png")
    words.add_argument("--model", default="starter", help="who answers (%(default)s)")
    given = words.parse_args()
    scene().save(DOCS / "scene.png", optimize=True)
    if not given.scene:
        draw(ask(given.model)).save(DOCS / "answer.png", optimize=True)


if __name__ == "__main__":
    main()
