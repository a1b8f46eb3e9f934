"""The demo: train a small model from the starter parts, score it, and say how to talk to it.

Two stages on made pictures and sounds (align, instruct), and a second run without the first of them, which
shows what aligning gives; then one that gives it a voice (speak). Then questions about
pictures that were made after training, with a fresh seed: new scenes, pairs of shape and colour that training
never showed, and the first ones again with the pictures shuffled. Some are asked aloud by voices it never
heard, and some are answered aloud. The model that ships with TinyModal answers the same questions.

A recipe whose model is deaf or mute is scored on what it can do.

Everything finished is kept in the run folder, and the same command goes on from there.
"""

from __future__ import annotations

import base64
import io
import json
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymodal.core.config import differences
from tinymodal.core.config import load as load_recipe
from tinymodal.core.errors import RecipeError
from tinymodal.core.log import program, say
from tinymodal.core.types import Image, Sample, Text
from tinymodal.eval.folder import write_atomically
from tinymodal.eval.pages import report as pages
from tinymodal.eval.pages.curves import curves
from tinymodal.eval.pages.playable import playable, sounds_of
from tinymodal.eval.results import Answered, Result
from tinymodal.eval.rules.answers import exact
from tinymodal.eval.run import run
from tinymodal.eval.speaking import aloud
from tinymodal.eval.tasks import scenes, sounds
from tinymodal.eval.tasks.table import PER_KIND_ALOUD
from tinymodal.train.recipe import Recipe, Stage

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed
    from tinymodal.infer.engine import Engine

STAGES = ("align", "instruct")
"""What the recipe begins with; more may follow."""
SPEAK = "speak"
"""The last stage, where the model speaks: it leaves the text as it is."""
WITHOUT = "without-align"
STARTER = "starter model"
NUM_PLAYED = 3
"""Cards with sounds of each sort."""
SIZES = {
    "per_kind": scenes.PER_KIND,
    "per_kind_unseen": scenes.PER_KIND_UNSEEN,
    "clips": sounds.CLIPS,
    "per_kind_asked": sounds.PER_KIND_ASKED,
    "per_kind_aloud": PER_KIND_ALOUD,
}
"""Questions of each kind about new scenes, and as many with the pictures shuffled; about unseen pairs; clips
to repeat; questions of each kind that are asked aloud; and that are answered aloud."""


def demo(
    folder: Path,
    *,
    recipe: Path | None = None,
    seed: int | None = None,
    starter: str = "starter",
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Run the demo, or go on with it; the report, which also lies in ``folder/report.json``.

    Args:
        folder: gets the model, the scores, ``report.json`` and ``report.html``.
        recipe: with stages named align and instruct; ``recipes/demo.toml`` if None.
        seed: of the test questions; None draws one that nobody has seen.
        starter: the model that answers beside the trained one.
        sizes: numbers of questions that differ from ``SIZES``.

    Raises:
        RecipeError: the recipe is not there, lacks a stage, or is not the one ``folder`` was begun with.
    """
    value = load_recipe(recipe or find_recipe(), Recipe)
    skipping = without_align(value)
    book = Book(folder, value, seed, {**SIZES, **(sizes or {})})
    tests = Tests(book.seed, book.sizes)

    last = last_of_text(value)
    pieces = {name: name for name in dict.fromkeys((*STAGES, last, value.stages[-1].name))}

    def score_stage(composed: Composed, piece: str) -> None:
        at = folder / "scores" / piece
        if piece == last:
            book.keep(piece, lambda: score_all(composed, tests, at, "this model", gallery=True))
        elif piece == SPEAK:
            book.keep(piece, lambda: score_speech(composed, tests, at, "this model", gallery=True))
        else:
            book.keep(piece, lambda: score_new(composed, tests, at))

    def score_starter() -> dict[str, Any]:
        composed, at = _load(starter), folder / "scores" / "starter"
        return score_all(composed, tests, at, STARTER) | score_speech(composed, tests, at, STARTER)

    with book.measured():
        if not book.has("starter"):
            _load(starter)  # missing files are told now, not after the training
        train(value, folder, book, pieces, score_stage)
        train(skipping, folder / WITHOUT, book, {"instruct": "instruct_without_align"}, score_stage)
        book.keep("starter", score_starter)
    report = write_report(folder, value, book)
    tell(folder, value, report, book)
    return report


def find_recipe() -> Path:
    """``recipes/demo.toml`` of the working directory, or of the checkout this package runs from.

    Raises:
        RecipeError: it is in neither.
    """
    name = Path("recipes") / "demo.toml"
    for root in (Path(), Path(__file__).resolve().parents[1]):
        if (root / name).is_file():
            return root / name
    raise RecipeError(f"{name}: there is no such file here; run the demo in a checkout, or name a --recipe.")


def without_align(recipe: Recipe) -> Recipe:
    """The second stage alone, of a model that is mute; it sees the same samples in the same order.

    Raises:
        RecipeError: the stages do not begin with align and instruct, or something comes after speak.
    """
    names = [stage.name for stage in recipe.stages]
    if tuple(names[:2]) != STAGES or SPEAK in names[:-1]:
        raise RecipeError(
            f"recipe '{recipe.name}': the demo needs the stages {' and '.join(STAGES)} first, and {SPEAK} "
            f"last if there is one; found {', '.join(names)}."
        )
    kept = recipe.stages[1].model_copy(update={"seed": recipe.stage_seed(1)})
    mute = recipe.model.model_copy(update={"speech": None})
    return recipe.model_copy(update={"name": f"{recipe.name}-{WITHOUT}", "model": mute, "stages": (kept,)})


def last_of_text(recipe: Recipe) -> str:
    """The stage that decides what the model answers."""
    return [stage.name for stage in recipe.stages if stage.name != SPEAK][-1]


def train(
    recipe: Recipe,
    folder: Path,
    book: Book,
    pieces: Mapping[str, str],
    score: Callable[[Composed, str], None],
) -> None:
    """Train what is missing and score each stage when it ends; nothing is done twice.

    Args:
        recipe: what to run.
        folder: its run folder.
        book: knows which pieces are done.
        pieces: stage name -> name of its score in the book.
        score: scores one stage's model into the book.
    """
    if all(book.has(piece) for piece in pieces.values()):
        return
    from tinymodal.train.loop import run as run_recipe

    scoring_s = 0.0

    def at_end(stage: Stage, composed: Composed) -> None:
        nonlocal scoring_s
        started = time.monotonic()
        if stage.name in pieces and not book.has(pieces[stage.name]):
            score(composed, pieces[stage.name])
        scoring_s += time.monotonic() - started

    started = time.monotonic()
    try:
        run_recipe(recipe, folder, on_stage_end=at_end)
    finally:
        book.note_training(recipe.name, time.monotonic() - started - scoring_s)
    # A score that somebody removed from a finished run: the stage does not end again, but its model is there.
    for stage, piece in pieces.items():
        if not book.has(piece):
            score(_load(str(stage_model(folder, stage))), piece)


def stage_model(folder: Path, stage: str) -> Path:
    """Where a run keeps the model that a stage ended with."""
    own = folder / "stages" / stage
    return own if own.is_dir() else folder / "model"


class Tests:
    """What models are asked, by the name that scores have in the report.

    Args:
        seed: of all questions.
        sizes: see ``SIZES``.
        split: of pictures and voices.
    """

    def __init__(self, seed: int, sizes: Mapping[str, int] = SIZES, split: scenes.Split = "test") -> None:
        self.scenes = scenes.benchmarks(seed, sizes["per_kind"], sizes["per_kind_unseen"], split)
        self.sounds = sounds.benchmarks(seed, sizes["clips"], sizes["per_kind_asked"], split)
        few = scenes.benchmarks(seed, sizes["per_kind_aloud"], 1, split)
        self.aloud = aloud(few["new"], name="speech-roundtrip")


def score_new(composed: Composed, tests: Tests, folder: Path) -> dict[str, Any]:
    """Accuracy on new scenes only: ``{kinds, mean_new}``."""
    from tinymodal.infer.engine import Engine

    numbers = run(
        tests.scenes["new"], Engine(composed), folder, title=f"score {folder.name.replace('_', ' ')}"
    ).numbers
    return {"mean_new": numbers.pop("mean"), "kinds": numbers}


def score_all(
    composed: Composed, tests: Tests, folder: Path, title: str, gallery: bool = False
) -> dict[str, Any]:
    """What is seen, and what is heard if it hears: ``{kinds, mean, hear, spoken_questions}`` of the report.

    With ``gallery`` the cards of its questions as well.
    """
    from tinymodal.infer.engine import Engine

    engine = Engine(composed)
    names = {"new": "new scenes", "unseen_pairs": "unseen pairs", "shuffled": "shuffled pictures"}
    results = {
        key: run(test, engine, folder, title=f"score {title}: {names[key]}")
        for key, test in tests.scenes.items()
    }
    asked = [row.question for row in results["new"].answered]
    numbers = {key: result.numbers for key, result in results.items()}
    scores = scenes.by_kind(numbers["new"], numbers["unseen_pairs"], numbers["shuffled"], asked)
    cards = [*_cards(results["new"]), *_cards(results["unseen_pairs"], "unseen pair")]
    if composed.model.config.audio_config is not None:
        heard, played = _score_hearing(engine, tests, folder, title, results["new"])
        scores, cards = {**scores, **heard}, [*cards, *played]
    return {**scores, "gallery": cards} if gallery else scores


def _score_hearing(
    engine: Engine, tests: Tests, folder: Path, title: str, written: Result
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """``{hear, spoken_questions}`` of the report, and cards."""
    names = {
        "seen_voices": "voices of training",
        "unseen_voices": "other voices",
        "shuffled": "shuffled sounds",
        "asked": "questions asked aloud",
    }
    results = {
        key: run(test, engine, folder, title=f"score {title}: {names[key]}")
        for key, test in tests.sounds.items()
    }
    spoken = results["asked"]
    # The same questions, and no others, of those that were asked in writing.
    same = {row.question.sample.id.removeprefix("spoken/") for row in spoken.answered}
    read = [row.score for row in written.answered if row.question.sample.id in same]
    scores = {
        "hear": {
            "wer_seen_voices": results["seen_voices"].numbers["wer"],
            "wer_unseen_voices": results["unseen_voices"].numbers["wer"],
            "shuffled": results["shuffled"].numbers["wer"],
        },
        "spoken_questions": {
            "mean_new": spoken.numbers["mean"],
            "mean_written": written.benchmark.reduce(read)["mean"],
        },
    }
    said = {f"spoken/{row.question.sample.id}": _last_words(row.question.sample) for row in written.answered}
    clips = [_card(row, "a new voice") for row in results["unseen_voices"].answered[:NUM_PLAYED]]
    return scores, [*_cards(spoken, "asked aloud", said)[:NUM_PLAYED], *clips]


def score_speech(
    composed: Composed, tests: Tests, folder: Path, title: str, gallery: bool = False
) -> dict[str, Any]:
    """``{speak}`` of the report, and the cards of some answers; nothing of a model that does not speak."""
    if composed.codec is None:
        return {}
    from tinymodal.infer.engine import Engine

    engine = Engine(composed)
    result = run(tests.aloud, engine, folder, title=f"score {title}: answers aloud")
    scores: dict[str, Any] = {"speak": result.speech}
    return {**scores, "gallery": _spoken_cards(engine, result)} if gallery else scores


def write_report(folder: Path, recipe: Recipe, book: Book) -> dict[str, Any]:
    """``report.json`` and ``report.html`` from what the book holds."""
    from tinymodal.train.machine import record

    last = last_of_text(recipe)
    trained, starter, made_on = book.read(last), book.read("starter"), record()
    spoken = book.read(SPEAK) if book.has(SPEAK) else {}
    own = {
        "mean_new": trained["mean"]["new"],
        "kinds": {kind: row["new"] for kind, row in trained["kinds"].items()},
    }
    report = {
        "name": recipe.name,
        "kinds": trained["kinds"],
        "mean": trained["mean"],
        "stages": {
            **{name: book.read(name) for name in (*STAGES, "instruct_without_align") if name != last},
            last: own,
        },
        **_told({**trained, **spoken}),
        "starter": {"kinds": starter["kinds"], "mean": starter["mean"], **_told(starter)},
        **book.spent(),
        "training_seconds": book.training(),
        "test_seed": book.seed,
        **{key: made_on[key] for key in ("machine", "versions", "commit")},
    }
    write_atomically(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    lines = []
    for name, at in (("with align", folder), ("without align", folder / WITHOUT)):
        lines += curves(_rows(at / "metrics.jsonl"), name)
    gallery = [*trained["gallery"], *spoken.get("gallery", [])]
    cards = [pages.Card(**{**card, **_files(card)}) for card in gallery]
    write_sample(folder, trained["gallery"])
    write_atomically(folder / "report.html", pages.page(report, lines, cards, chat_command(folder)))
    return report


def _told(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The part of some scores that is about sound."""
    return {key: scores[key] for key in pages.SOUND if key in scores}


def _files(card: Mapping[str, Any]) -> dict[str, Any]:
    """Pictures and sounds of a card as the files that they are."""
    pictures, played = (tuple(map(base64.b64decode, card[key])) for key in ("pictures", "sounds"))
    return {"pictures": pictures, "sounds": played, "spoken": base64.b64decode(card.get("spoken", ""))}


def write_sample(folder: Path, gallery: Sequence[Mapping[str, Any]]) -> None:
    """A picture to talk about, the first of the gallery that stands alone, and a question about it aloud."""
    alone = [card for card in gallery if len(card["pictures"]) == 1]
    card = next((card for card in alone if card["sounds"]), alone[0])
    (folder / "sample.png").write_bytes(base64.b64decode(card["pictures"][0]))
    if card["sounds"]:
        (folder / "sample.ogg").write_bytes(base64.b64decode(card["sounds"][0]))


def chat_command(folder: Path) -> str:
    return f"{program()} chat {folder / 'model'} --image {folder / 'sample.png'}"


def aloud_command(folder: Path) -> str:
    """As :func:`chat_command`, for a question asked aloud and an answer that is spoken."""
    said = f"--audio {folder / 'sample.ogg'} --speak {folder / 'answer.wav'}"
    return f"{chat_command(folder)} {said}"


def tell(folder: Path, recipe: Recipe, report: Mapping[str, Any], book: Book) -> None:
    """The report for the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print()
    console.print(pages.terminal_table(report, "This model (accuracy in %)"))
    console.print(
        pages.terminal_table(report["starter"], "The starter model, trained longer, on the same questions")
    )
    if (table := pages.terminal_sounds(report)) is not None:
        console.print(table)
    stages = Table(
        title="New scenes, mean of the kinds", title_justify="left", title_style="bold", show_header=False
    )
    for name, note, mean in pages.stage_rows(report):
        stages.add_row(name, f"{100 * mean:.1f} %", f"[dim]{note}[/]")
    console.print(stages)
    few = Table(title="Some questions, the first of each kind", title_justify="left", title_style="bold")
    for column in ("question", "answer", "truth", ""):
        few.add_column(column)
    for card in book.read(last_of_text(recipe))["gallery"]:
        mark = "[green]right[/]" if card["right"] else "[red]wrong[/]"
        few.add_row(*(escape(card[key]) for key in ("question", "reply", "answer")), mark)
    console.print(few)
    minutes = report["seconds"] / 60
    print(f"\n{minutes:.1f} minutes, {report['peak_memory_mb']:,.0f} MB at most.")
    print(f"With pictures and curves: {folder / 'report.html'}")
    if SPEAK in {stage.name for stage in recipe.stages}:
        print(f"Ask it aloud, about the same picture:\n\n  {aloud_command(folder)}\n")
    print(f"Talk to it:\n\n  {chat_command(folder)}\n")


class Book:
    """What a demo folder knows: its seed, the pieces that are done, and what they cost.

    Args:
        folder: the demo's run folder; ``demo.json`` and ``scores/`` in it are the book's.
        recipe: what is run; must be the one the folder was begun with.
        seed: of the test questions, for a new folder; None draws one.
        sizes: numbers of questions; must be those the folder was begun with.

    Raises:
        RecipeError: the folder holds a demo of another recipe, seed or size.
    """

    def __init__(self, folder: Path, recipe: Recipe, seed: int | None, sizes: Mapping[str, int]) -> None:
        self.folder, self._path = folder, folder / "demo.json"
        self._workers = max(stage.workers for stage in recipe.stages)
        new: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
            "seed": secrets.randbelow(2**31) if seed is None else seed,
            "sizes": dict(sizes),
            "seconds": 0.0,
            "cpu_seconds": 0.0,
            "peak_memory_mb": 0.0,
            "training_seconds": {},
        }
        if self._path.exists():
            self._data: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            changed = differences(recipe, Recipe.model_validate(self._data["recipe"]))
            if self._data["sizes"] != new["sizes"]:
                changed.append(f"questions: {new['sizes']} and {self._data['sizes']}")
            if seed is not None and self._data["seed"] != seed:
                changed.append(f"seed: {seed} and {self._data['seed']}")
            if changed:
                raise RecipeError(
                    f"{folder}: holds a demo begun otherwise ({changed[0]}); remove the folder, "
                    f"or give another with --out."
                )
            say(f"{folder}: going on with what is there")
        else:
            self._data = new
            self._save()
        self.seed: int = self._data["seed"]
        self.sizes: dict[str, int] = self._data["sizes"]

    def has(self, piece: str) -> bool:
        return self._piece(piece).exists()

    def read(self, piece: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._piece(piece).read_text(encoding="utf-8"))
        return found

    def keep(self, piece: str, make: Callable[[], dict[str, Any]]) -> None:
        """Make a piece and write it down, unless it is there."""
        if not self.has(piece):
            write_atomically(self._piece(piece), json.dumps(make(), ensure_ascii=False) + "\n")
            self._account()

    def note_training(self, name: str, seconds: float) -> None:
        """Add to the seconds that a recipe's training took, scoring left out."""
        before = self._data["training_seconds"].get(name, 0.0)
        self._data["training_seconds"][name] = round(before + seconds, 1)
        self._account()

    def training(self) -> dict[str, float]:
        return dict(self._data["training_seconds"])

    def spent(self) -> dict[str, float]:
        """Seconds, CPU seconds (children too) and peak memory over all the times the command ran."""
        return {key: round(self._data[key], 1) for key in ("seconds", "cpu_seconds", "peak_memory_mb")}

    @contextmanager
    def measured(self) -> Iterator[None]:
        """What happens inside goes to the account, also if it is interrupted.

        A kill -9 loses what came after the last piece.
        """
        self._wall, self._cpu = time.monotonic(), cpu_seconds()
        try:
            yield
        finally:
            self._account()

    def _account(self) -> None:
        wall, cpu = time.monotonic(), cpu_seconds()
        self._data["seconds"] += wall - self._wall
        self._data["cpu_seconds"] += cpu - self._cpu
        self._data["peak_memory_mb"] = max(self._data["peak_memory_mb"], peak_memory_mb(self._workers))
        self._wall, self._cpu = wall, cpu
        self._save()

    def _piece(self, piece: str) -> Path:
        return self.folder / "scores" / f"{piece}.json"

    def _save(self) -> None:
        write_atomically(self._path, json.dumps(self._data, indent=1) + "\n")


# What it was measured on


def cpu_seconds() -> float:
    """Seconds of CPU that this process and its finished children have used."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def peak_memory_mb(workers: int) -> float:
    """Largest resident memory of this process, and of its worker processes where it has some.

    With workers an upper bound: each is counted as the largest child, pages shared with the parent included.
    Without workers children do not count: Linux books a parent's pages to any child that it starts.
    """
    unit = 2**20 if sys.platform == "darwin" else 2**10
    own, child = (
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return (own + workers * child) / unit


def _load(name: str) -> Composed:
    from tinymodal.compose.build import load

    return load(name)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file; the half line of a kill is passed over."""
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _cards(result: Result, note: str = "", said: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The first question of each kind, as :class:`tinymodal.eval.pages.report.Card` with its files in base64.

    Args:
        result: what was answered.
        note: on all of the cards.
        said: question id -> its words, where they are heard instead of read.
    """
    return [_card(row, note, (said or {}).get(row.question.sample.id)) for row in _first_of_kinds(result)]


def _first_of_kinds(result: Result) -> list[Answered]:
    first: dict[str, Answered] = {}
    for row in result.answered:
        first.setdefault(row.question.meta["kind"], row)
    return list(first.values())


def _card(row: Answered, note: str, said: str | None = None) -> dict[str, Any]:
    sample = row.question.sample
    pictures = [part for part in sample.media() if isinstance(part, Image)]
    return {
        "pictures": [_base64(_png(picture.source)) for picture in pictures],
        "sounds": [_base64(file) for file in sounds_of(sample)],
        "question": _last_words(sample) if said is None else said,
        "reply": row.reply,
        "answer": row.question.answer,
        "kind": row.question.meta["kind"],
        "right": row.score.value == 1,
        "note": note,
    }


def _spoken_cards(engine: Engine, result: Result) -> list[dict[str, Any]]:
    """The first answers aloud, one of each kind, and what was heard of them."""
    from tinymodal.infer.engine import Sampling

    kept = _first_of_kinds(result)[:NUM_PLAYED]
    sampling = Sampling(max_new_tokens=result.benchmark.max_new_tokens)
    said = engine.reply([row.question.sample for row in kept], sampling, speak=True)
    cards = []
    for row, reply in zip(kept, said, strict=True):
        assert reply.audio is not None
        assert reply.rate_hz is not None
        card = _card(row, "answered aloud")
        right = exact(row.question, row.reply).value == 1  # of the text, not of what was heard
        cards.append(
            {
                **card,
                "right": right,
                "spoken": _base64(playable(reply.audio, reply.rate_hz)),
                "heard": row.heard or "",
            }
        )
    return cards


def _last_words(sample: Sample) -> str:
    """The question; words before it name the pictures of a comparison."""
    return [part.text for part in sample.messages[-1].parts if isinstance(part, Text)][-1].strip()


def _base64(file: bytes) -> str:
    return base64.b64encode(file).decode()


def _png(picture: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, format="PNG", optimize=True)
    return out.getvalue()
