"""An explanation as a page, a sheet and numbers: explain.html, explain.png, explain.json.

The page is one file without a script: which word is shown is a radio button, so it can be mailed, kept, shown
inside another page, and used with the keyboard alone. Printed, it shows every word.
"""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path

import PIL.Image
from torch import Tensor

from tinymodal.core.errors import DataError
from tinymodal.core.page import document, told
from tinymodal.infer.explain import Explanation, Piece, Shown, Word
from tinymodal.infer.explain_draw import cover, ground, png, sheet, softness

PAGE, SHEET, NUMBERS = "explain.html", "explain.png", "explain.json"
MAX_S = 30.0
"""Of a sound, played on the page: a minute would be megabytes."""
QUALITY = 75
"""Of a map on the page: 6 KB, where a PNG would be 20."""
FAINTEST = 0.002
"""Attention below this is not marked in the text."""

STYLE = """
.sr{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
h1,h2,.lead,.words,.read{overflow-wrap:anywhere}
.words{display:flex;flex-wrap:wrap;gap:8px;margin:6px 0 18px}
.words label{cursor:pointer;border:1px solid var(--rule);border-bottom:4px solid var(--track);
border-radius:8px;padding:5px 12px 3px;background:var(--card);font-size:18px;unicode-bidi:isolate;
position:relative;min-height:40px}
.words label i{position:absolute;left:-1px;bottom:-4px;height:4px;border-radius:0 0 0 8px;
background:var(--new)}
.why>article{display:none;margin-bottom:30px}
.why>article h2{margin:10px 0 10px}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(280px,100%),1fr));gap:14px}
.maps.heard{grid-template-columns:1fr}
.map{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;overflow:hidden}
.map figcaption{padding:8px 12px 10px;font-size:15px}
.map strong{font-weight:650}
.under{position:relative;background-size:100% 100%;width:100%}
.under img{position:absolute;inset:0;width:100%;height:100%}
.under img.squares{image-rendering:pixelated}
#plain:checked~article .under img{opacity:0}
.switch{display:inline-flex;gap:8px;align-items:center;min-height:34px;cursor:pointer;font-size:15px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(320px,100%),1fr));gap:6px 30px;
margin-top:10px}
.two h3{font-size:16px;margin:12px 0 4px}
.two td{min-width:0}.two td.bars{min-width:110px;width:44%}.two .bar{width:100%}
.two tr.taken th,.two tr.taken td{font-weight:650}
.two tr.next th,.two tr.next td{border-top:2px solid var(--muted)}
.read{line-height:2;white-space:pre-wrap;font-size:15px}
.read span{border-radius:4px;padding:2px 0}
.read .chip{white-space:nowrap;padding:2px 8px}
audio{max-width:420px}
@media(max-width:560px){main{padding:20px 14px 40px}}
@media print{.why>article{display:block!important;break-inside:avoid}.switch{display:none}}
"""


def write_explanation(explanation: Explanation, folder: Path, question: str, model: str) -> list[Path]:
    """Write page, sheet and numbers; what was written.

    Args:
        explanation: of :func:`tinymodal.infer.explain.explain`.
        folder: made where it is not there.
        question: for the head.
        model: its name, for the head.

    Raises:
        DataError: ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file; expected a folder to write {PAGE}, {SHEET} and {NUMBERS} into")
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        PAGE: page(explanation, question, model).encode(),
        SHEET: png(sheet(explanation, f"{question}   ({model})").quantize(256)),
        NUMBERS: (json.dumps(numbers(explanation), ensure_ascii=False, indent=1) + "\n").encode(
            "utf-8", "replace"
        ),
    }
    for name, content in written.items():
        draft = folder / f"{name}.part"
        draft.write_bytes(content)
        os.replace(draft, folder / name)
    return [folder / name for name in written]


def page(explanation: Explanation, question: str, model: str) -> str:
    """The page as text."""
    grounds = [ground(shown) for shown in explanation.media]
    style = [STYLE]
    for number, under in enumerate(grounds):
        style.append(
            f".m{number}{{background-image:url({_data(_compact(under))});"
            f"aspect-ratio:{under.width}/{under.height}}}"
        )
    buttons, labels, articles = [], [], []
    for number, word in enumerate(explanation.words):
        checked = " checked" if number == 0 else ""
        probability = _probability(explanation, word)
        buttons.append(f'<input class="sr" type="radio" name="word" id="w{number}"{checked}>')
        labels.append(
            f'<label for="w{number}">{_shown_text(word.text)}<i style="width:{probability:.0%}"></i>'
            f'<span class="sr">, {probability:.0%} likely</span></label>'
        )
        articles.append(f'<article class="p{number}">{_article(explanation, word, grounds)}</article>')
        style.append(
            f"#w{number}:checked~.p{number}{{display:block}}"
            f"#w{number}:checked~.words label[for=w{number}]{{background:var(--ink);color:var(--paper)}}"
            f"#w{number}:focus-visible~.words label[for=w{number}]"
            f"{{outline:2px solid var(--new);outline-offset:2px}}"
        )
    plain = '<input class="sr" type="checkbox" id="plain">' if explanation.media else ""
    switch = '<label class="switch" for="plain">show without heat</label>' if plain else ""
    if plain:
        style.append(
            "#plain:focus-visible~.switch{outline:2px solid var(--new);outline-offset:2px}"
            ".switch::before{content:'☐'}#plain:checked~.switch::before{content:'☑'}"
        )
    cut = "" if explanation.complete else " (cut off: more tokens were not asked for)"
    notes = "".join(f"<p>{told(note)}</p>" for note in explanation.notes)
    body = (
        f'<header><h1>Why these words?</h1><p class="lead">{told(question)}</p></header>'
        f'<p class="muted">The answer of {told(model, 200)}{cut}. Choose a word; the line below each shows '
        f"how likely it was.</p>{_players(explanation)}"
        f'<div class="why">{"".join(buttons)}{plain}<div class="words">{"".join(labels)}</div>{switch}'
        f"{''.join(articles)}</div><footer>{notes}{_how(explanation)}</footer>"
    )
    return document(f"{question}: why these words?", body, "".join(style))


def numbers(explanation: Explanation) -> dict[str, object]:
    """What a program can go on with."""
    return {
        "answer": explanation.answer,
        "complete": explanation.complete,
        "layers": list(explanation.layers),
        "num_layers": explanation.num_layers,
        "prompt": [
            {"text": piece.text, "first": piece.first, "last": piece.last, "medium": piece.medium}
            for piece in explanation.prompt
        ],
        "media": [
            {"name": shown.name, "first": shown.first, "last": shown.last, "by_queries": shown.by_queries}
            for shown in explanation.media
        ],
        "words": [
            {
                "text": word.text,
                "tokens": [
                    {
                        "text": token.text,
                        "probability": token.probability,
                        "top": [[guess.text, guess.probability] for guess in token.top],
                    }
                    for token in explanation.tokens[word.first : word.last]
                ],
                "attention": _rounded(explanation.attention(word)),
                "media": [_of_medium(explanation, word, shown) for shown in explanation.media],
            }
            for word in explanation.words
        ],
        "notes": list(explanation.notes),
    }


def _of_medium(explanation: Explanation, word: Word, shown: Shown) -> dict[str, object]:
    weights = explanation.attention(word)[shown.first : shown.last]
    hidden = shown.hidden
    return {
        "share": explanation.share(word, shown),
        "boxes": [[round(edge, 5) for edge in box] for box in shown.places.boxes_C4.tolist()],
        "attention": _rounded(shown.places.at_boxes(weights)),
        "hidden_boxes": None
        if hidden is None
        else [list(map(float, box)) for box in hidden.boxes_P4.tolist()],
        "drop": None if hidden is None else _rounded(hidden.drop_Pn[:, word.first : word.last].sum(1)),
    }


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def _article(explanation: Explanation, word: Word, grounds: list[PIL.Image.Image]) -> str:
    heard = all(shown.picture is None for shown in explanation.media)
    maps = "".join(
        _maps(explanation, word, number, shown, grounds[number])
        for number, shown in enumerate(explanation.media)
    )
    maps = f'<div class="maps{" heard" if heard else ""}">{maps}</div>' if maps else ""
    return (
        f"<h2>“{_shown_text(word.text)}”</h2>{maps}"
        f'<div class="two"><div><h3>What could have come</h3>{_guesses(explanation, word)}</div>'
        f"<div><h3>Where the attention went</h3>{_shares(explanation, word)}</div></div>"
        f'<h3 class="sr">What was read</h3><p class="read">{_read(explanation, word)}</p>'
    )


def _maps(explanation: Explanation, word: Word, number: int, shown: Shown, under: PIL.Image.Image) -> str:
    """A medium's attention, and beside it what hiding its pieces does."""
    size = shown.field_size
    figures = []
    if not shown.places.note:
        over = cover(explanation.field(word, shown), _wide(size, under), softness(shown))
        share = explanation.share(word, shown)
        figures.append(
            _figure(
                number,
                over,
                "",
                f"<strong>looked at</strong>: {share:.0%} of the attention went to {told(shown.name)}",
            )
        )
    harm = explanation.harm(word, shown)
    least = explanation.least(word, shown)
    if harm is not None and least is not None:
        was, left = least
        say = (
            f"<strong>needed</strong>: with the worst piece of {told(shown.name)} hidden, "
            f"{was:.1%} become {left:.1%}"
            if left < was
            else f"<strong>needed</strong>: no piece of {told(shown.name)} alone"
        )
        figures.append(_figure(number, cover(harm, _wide(size, under)), " class=squares", say))
    return "".join(figures)


def _wide(size: tuple[int, int], under: PIL.Image.Image) -> tuple[int, int]:
    """Width and height of a map: the field's, a sound's a little higher than its one row."""
    return size[1], max(size[0], round(size[1] * under.height / under.width) if size[0] == 1 else size[0])


def _figure(number: int, over: PIL.Image.Image, kind: str, caption: str) -> str:
    out = io.BytesIO()
    over.save(out, "WEBP", quality=QUALITY)
    source = _data(out.getvalue())
    return (
        f'<figure class="map"><div class="under m{number}"><img{kind} alt="" src="{source}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _guesses(explanation: Explanation, word: Word) -> str:
    rows = []
    for place, token in enumerate(explanation.tokens[word.first : word.last]):
        for rank, guess in enumerate(token.top):
            taken = "taken" if guess.token == token.token else ""
            begins = "next" if rank == 0 and place else ""
            rows.append(_bar(_spaced(guess.text), guess.probability, 1, f"{taken} {begins}".strip()))
    return f'<div class="scroll"><table><tbody>{"".join(rows)}</tbody></table></div>'


def _bar(name: str, share: float, digits: int = 0, kind: str = "") -> str:
    """A row of a table: a name (HTML), a bar and a percentage."""
    return (
        f'<tr class="{kind}"><th scope="row">{name}</th><td class="bars"><span class="bar">'
        f'<i style="width:{share:.1%}"></i></span></td><td class="n">{share:.{digits}%}</td></tr>'
    )


def _shares(explanation: Explanation, word: Word) -> str:
    attention = explanation.attention(word)
    prompt = explanation.prompt[-1].last if explanation.prompt else 0
    parts = [(shown.name, float(attention[shown.first : shown.last].sum())) for shown in explanation.media]
    said = float(attention[prompt:].sum())
    parts.append(
        ("words of the prompt", max(0.0, float(attention[:prompt].sum()) - sum(s for _, s in parts)))
    )
    if word.first:
        parts.append(("words of the answer before", said))
    rows = "".join(_bar(told(name), share) for name, share in parts)
    first = float(explanation.first_n[word.first : word.last].mean())
    return (
        f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
        f'<p class="muted">Left out: {first:.0%} that went to the first position.</p>'
    )


def _read(explanation: Explanation, word: Word) -> str:
    """The prompt and the words before, marked by how much each was attended to."""
    attention = explanation.attention(word)
    prompt = explanation.prompt[-1].last if explanation.prompt else 0
    answer = [
        Piece(token.text, prompt + place, prompt + place + 1)
        for place, token in enumerate(explanation.tokens[: word.first])
    ]
    pieces = [*explanation.prompt, *answer]
    words = [float(attention[piece.first : piece.last].sum()) for piece in pieces if piece.medium is None]
    most = max(words, default=0.0) or 1.0
    out = []
    for piece in pieces:
        weight = float(attention[piece.first : piece.last].sum())
        if piece.medium is not None:
            out.append(f'<span class="chip">{told(piece.text)} · {weight:.0%}</span>')
        elif weight < FAINTEST:
            out.append(told(piece.text))
        else:
            strength = round(100 * 0.75 * weight / most)
            out.append(
                f'<span style="background:color-mix(in srgb,var(--shuffled) {strength}%,transparent)" '
                f'title="{weight:.1%}">{told(piece.text)}</span>'
            )
    return "".join(out)


def _players(explanation: Explanation) -> str:
    sounds = [shown for shown in explanation.media if shown.wave is not None]
    return "".join(
        f'<p class="muted">{told(shown.name)}<audio controls preload="none" '
        f'src="{_data(wav(shown.wave, shown.rate_hz))}"></audio></p>'
        for shown in sounds
        if shown.wave is not None and shown.rate_hz is not None
    )


def wav(wave: Tensor, rate_hz: int, max_s: float = MAX_S) -> bytes:
    """A sound as a file that every browser plays: 16 bits, mono.

    Args:
        wave: float32 [samples]; what is beyond full scale is cut off.
        rate_hz: of the samples.
        max_s: what is longer is cut here.
    """
    import soundfile

    out = io.BytesIO()
    samples = wave[: round(max_s * rate_hz)].clamp(-1, 1).numpy()
    soundfile.write(out, samples, rate_hz, format="WAV", subtype="PCM_16")
    return out.getvalue()


def _how(explanation: Explanation) -> str:
    num, layers = explanation.num_layers, explanation.layers
    which = f"all {num} layers" if len(layers) == num else f"layers {', '.join(map(str, layers))} of {num}"
    parts = [
        f"Attention is the mean over all heads of {which} of the language model, at the position that "
        "predicts the word, without the first position, where models park attention that goes nowhere. It "
        "tells where the model looked, which need not be what decided."
    ]
    if any(shown.by_queries for shown in explanation.media):
        parts.append(
            "The connector asks the tower with learned queries; their own attention says where each looked."
        )
    if any(shown.hidden is not None for shown in explanation.media):
        parts.append(
            "What is needed was found by hiding: each piece in turn is painted over with the picture's mean "
            "colour, or silenced, and the same answer read again."
        )
    if any(shown.picture is None for shown in explanation.media):
        parts.append("A sound's tokens have a time and no pitch, so its maps are columns.")
    if explanation.media:
        parts.append("Each map is scaled to its own greatest value.")
    return f"<p>{told(' '.join(parts))}</p>"


def _probability(explanation: Explanation, word: Word) -> float:
    probability = 1.0
    for token in explanation.tokens[word.first : word.last]:
        probability *= token.probability
    return probability


def _shown_text(text: str) -> str:
    return told(text.strip() or ("␣" if text else "(nothing)"), 80)


def _spaced(text: str) -> str:
    """A token, with a sign for the white space that it begins with: ``red`` and `` red`` are two."""
    begins = text[:1].isspace() and text.strip()
    return ('<span class="muted">␣</span>' if begins else "") + _shown_text(text)


def _compact(under: PIL.Image.Image) -> bytes:
    """Drawings as PNG, photographs as JPEG, whichever is smaller."""
    out = io.BytesIO()
    under.save(out, "JPEG", quality=88)
    return min(png(under), out.getvalue(), key=len)


def _data(content: bytes) -> str:
    kinds = {b"\x89PNG": "image/png", b"\xff\xd8\xff\xe0": "image/jpeg", b"RIFF": "audio/wav"}
    kind = "image/webp" if content[8:12] == b"WEBP" else kinds[content[:4]]
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
