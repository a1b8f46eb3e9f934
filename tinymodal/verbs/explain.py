"""tinymodal explain: why a model says what it says, word by word, as a page, a sheet and numbers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tinymodal.core.errors import DataError
from tinymodal.core.types import Audio, Medium, Message, Part, Sample, Text
from tinymodal.verbs.options import add_device, check_media, load_model, natural, picture, positive, sound


def add_explain(verbs: Any) -> None:
    p = verbs.add_parser(
        "explain",
        help='why these words: tinymodal explain runs/demo/model --image cat.png "What is this?"',
    )
    p.add_argument("model", help="run folder, model folder, Hub name or starter")
    p.add_argument("question", help='what to ask; "" where a sound is the question')
    p.add_argument(
        "--image", type=picture, action="append", dest="media", default=[], metavar="FILE",
        help="a picture; may be repeated",
    )  # fmt: skip
    p.add_argument(
        "--audio", type=sound, action="append", dest="media", metavar="FILE", help="a sound; may be repeated"
    )
    p.add_argument(
        "--out", type=Path, default=Path("explained"), metavar="FOLDER",
        help="explain.html, explain.png and explain.json go there (%(default)s)",
    )  # fmt: skip
    p.add_argument("--answer", metavar="TEXT", help="explain this answer instead of the model's own")
    p.add_argument("--top", type=positive, default=5, metavar="K", help="tokens at each place (%(default)s)")
    p.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="longest answer (%(default)s)"
    )
    p.add_argument(
        "--layers",
        type=_layers,
        metavar="A,B",
        help="whose attention is meant, from 0 or from the last, -1 (all)",
    )
    p.add_argument(
        "--squares", type=natural, default=6, metavar="N",
        help="along a picture's longer side that are hidden one by one, a pass each; 0: none (%(default)s)",
    )  # fmt: skip
    add_device(p)
    p.set_defaults(run=run_explain)


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers, e.g. 2,3 or -1") from None


def run_explain(args: argparse.Namespace) -> None:
    media: list[Medium] = args.media
    check_media(media)
    if not args.question and not any(isinstance(part, Audio) for part in media):
        raise DataError("explain: the question is empty; ask one, or give a sound that is it with --audio")
    composed = load_model(args)

    from tinymodal.infer.engine import Engine
    from tinymodal.infer.explain import explain
    from tinymodal.infer.explain_page import write_explanation

    parts: tuple[Part, ...] = (*media, *([Text(args.question)] if args.question else []))
    found = explain(
        Engine(composed),
        Sample((Message("user", parts),), "question"),
        answer=args.answer,
        max_new_tokens=args.max_new_tokens,
        top=args.top,
        layers=args.layers,
        squares=args.squares,
    )
    print(found.answer)
    title = args.question or " and ".join(Path(str(part.source)).name for part in media)
    page, *_ = write_explanation(found, args.out, title, str(args.model))
    print(f"Why: {page}; open it in a browser. The same as one picture and as numbers lies beside it.")
