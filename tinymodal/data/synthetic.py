"""Made data with known answers: drawn scenes, and questions that cannot be answered without looking.

What a scene is, and how it is drawn, is in :mod:`tinymodal.data.scenes`; here it is asked about, described,
and made into samples. Everything follows from ``(split, seed, index)``, so a sample can be made again
anywhere, in any order, by any worker.

What keeps the scores honest, besides what ``scenes`` keeps apart: answers are balanced by construction where
a constant would otherwise do well (yes/no, counts, places).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Message, Part, Sample, Text
from tinymodal.data.scenes import (
    PLACES,
    SEEN_PAIRS,
    UNSEEN_PAIRS,
    WIDE_PAIRS,
    Board,
    Pair,
    Random,
    Scene,
    Split,
    Thing,
    World,
    draw,
    random_scene,
    shapes_of,
    targets,
    written,
)

# --- questions ------------------------------------------------------------------------------------
# Each asker gets a scene and the thing to ask about and returns (question, answer), or None where the scene
# gives no clear question of its kind about that thing.

QA = tuple[str, str]


def _unique(scene: Scene, thing: Thing, *keys: str) -> bool:
    return sum(all(getattr(t, k) == getattr(thing, k) for k in keys) for t in shapes_of(scene)) == 1


def ask_colour(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    if not _unique(scene, thing, "shape"):
        return None
    forms = "What colour is the {}?", "Which colour does the {} have?"
    return rng.choice(forms).format(thing.shape), thing.colour


def ask_shape(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    if not _unique(scene, thing, "colour"):
        return None
    forms = "What shape is the {} thing?", "Which shape is {}?"
    return rng.choice(forms).format(thing.colour), thing.shape


def ask_size(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    if not _unique(scene, thing, "shape", "colour"):
        return None
    forms = "Is the {} small or big?", "What size is the {}?"
    return rng.choice(forms).format(thing.name), thing.size


def ask_count(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    key = rng.choice(("shape", "colour"))
    number = sum(getattr(t, key) == getattr(thing, key) for t in shapes_of(scene))
    if number > 4:
        return None
    what = _plural(thing.shape) if key == "shape" else f"{thing.colour} things"
    return rng.choice(("How many {} are there?", "Count the {}.")).format(what), str(number)


def ask_existence(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    if rng.random() < 0.5:
        return _is_there(rng, thing.name), "yes"
    present = {(t.shape, t.colour) for t in shapes_of(scene)}
    absent = [pair for pair in world.pairs if pair not in present]
    # Half of the things asked for in vain share shape or colour with something that is there.
    near = [p for p in absent if any(p[0] == s or p[1] == c for s, c in present)]
    shape, colour = rng.choice(near if near and rng.random() < 0.5 else absent)
    return _is_there(rng, f"{colour} {shape}"), "no"


def ask_where(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    if not _unique(scene, thing, "shape", "colour"):
        return None
    forms = "Where is the {}?", "In which part of the picture is the {}?"
    names = [thing.name]  # half of the time by its shape or colour alone, where that says which
    names += [thing.shape] if _unique(scene, thing, "shape") else []
    names += [f"{thing.colour} thing"] if _unique(scene, thing, "colour") else []
    name = thing.name if rng.random() < 0.5 else rng.choice(names)
    return rng.choice(forms).format(name), thing.place


def ask_relation(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    others = [t for t in shapes_of(scene) if t != thing and _unique(scene, t, "shape", "colour")]
    if not others or not _unique(scene, thing, "shape", "colour"):
        return None
    other = rng.choice(others)
    (row, column), (other_row, other_column) = divmod(thing.cell, 3), divmod(other.cell, 3)
    choices: list[QA] = []
    if column != other_column:
        question = f"Is the {thing.name} left or right of the {other.name}?"
        choices.append((question, "left" if column < other_column else "right"))
    if row != other_row:
        question = f"Is the {thing.name} above or below the {other.name}?"
        choices.append((question, "above" if row < other_row else "below"))
    return rng.choice(choices)


def ask_number(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    numbers = [t for t in scene if t.what == "number"]
    if len(numbers) != 1:
        return None
    return rng.choice(("What number is printed?", "Which number do you read?")), str(numbers[0].number)


def ask_handwritten(rng: Random, world: World, scene: Scene, thing: Thing) -> QA | None:
    scans = [t for t in scene if t.what == "scan"]
    if len(scans) != 1:
        return None
    return rng.choice(("Which digit is handwritten?", "What digit was written by hand?")), str(
        scans[0].number
    )


def _is_there(rng: Random, name: str) -> str:
    return _article(rng.choice(("Is there a {}?", "Do you see a {}?")).format(name))


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def _article(text: str) -> str:
    return text.replace(" a orange", " an orange")


ASKERS: dict[str, Callable[[Random, World, Scene, Thing], QA | None]] = {
    "colour": ask_colour,
    "shape": ask_shape,
    "size": ask_size,
    "count": ask_count,
    "existence": ask_existence,
    "where": ask_where,
    "relation": ask_relation,
    "number": ask_number,
    "handwritten": ask_handwritten,
}
KINDS = (*ASKERS, "compare")
KINDS_WITH_PAIRS = tuple(kind for kind in KINDS if kind not in ("number", "handwritten"))


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, what it is about, and the one right answer."""

    scenes: tuple[Scene, ...]
    kind: str
    question: str
    answer: str


def ask(kind: str, rng: Random, world: World, unseen_pair: bool = False) -> Asked:
    """A fresh scene and a question of ``kind`` about it; about a thing of an unseen pair if asked for."""
    while True:
        subject = rng.choice(sorted(UNSEEN_PAIRS)) if unseen_pair else None
        if kind == "compare":
            return _ask_compare(rng, world, subject)
        asked: tuple[Scene, QA | None]
        if kind == "count":
            asked = _ask_balanced_count(rng, world, subject)
        elif kind in ("number", "handwritten"):
            board = Board(rng, world)
            for _ in range(rng.randint(1, 4)):
                board.shape()
            board.number() if kind == "number" or rng.random() < 0.3 else None
            board.scan() if kind == "handwritten" or rng.random() < 0.3 else None
            scene = board.scene()
            asked = (scene, ASKERS[kind](rng, world, scene, scene[0]))
        else:
            scene, thing = random_scene(rng, world, subject, (2 if kind == "relation" else 1, 5))
            asked = (scene, ASKERS[kind](rng, world, scene, thing))
            if unseen_pair and kind == "existence" and asked[1] and asked[1][1] == "no":
                # Half of the answers stay "no": the unseen pair is then asked for where it is absent.
                scene, _ = random_scene(rng, world, None, (1, 5))
                asked = (scene, (_is_there(rng, thing.name), "no"))
        if asked[1] is not None:
            return Asked((asked[0],), kind, *asked[1])


def _ask_balanced_count(rng: Random, world: World, subject: Pair | None) -> tuple[Scene, QA]:
    """One to four things that share a shape or a colour, each number as likely, among others that do not."""
    number, by_shape = rng.randint(1, 4), rng.random() < 0.5
    board = Board(rng, world)
    first = board.shape(subject)
    same = [p for p in world.pairs if (p[0] == first.shape if by_shape else p[1] == first.colour)]
    rest = [p for p in world.pairs if p not in same]
    for _ in range(number - 1):
        board.shape(rng.choice(same))
    for _ in range(rng.randint(0, 3)):
        board.shape(rng.choice(rest))
    if rng.random() < 0.3:
        board.number()
    what = _plural(first.shape) if by_shape else f"{first.colour} things"
    question = rng.choice(("How many {} are there?", "Count the {}.")).format(what)
    return board.scene(), (question, str(number))


def _ask_compare(rng: Random, world: World, subject: Pair | None) -> Asked:
    """Two pictures: which one shows something, or which one shows more."""
    answer = rng.choice(("first", "second"))
    if subject or rng.random() < 0.5:
        pair = subject or rng.choice(world.pairs)
        with_it, _ = random_scene(rng, world, pair, (1, 4))
        while True:
            without, _ = random_scene(rng, world, None, (1, 4))
            if all((t.shape, t.colour) != pair for t in without):
                break
        question = _article(f"Which picture shows a {pair[1]} {pair[0]}, the first or the second?")
        scenes = (with_it, without)
    else:
        few, more = sorted(rng.sample(range(1, 6), 2))
        boards = Board(rng, world), Board(rng, world)
        for board, number in zip(boards, (more, few), strict=True):
            for _ in range(number):
                board.shape()
        question = "Which picture shows more things, the first or the second?"
        scenes = (boards[0].scene(), boards[1].scene())
    return Asked(scenes if answer == "first" else scenes[::-1], "compare", question, answer)


def caption(scene: Scene) -> str:
    """All of the scene, in reading order: ``a big red ring at the top left, the number 4 on the right``."""
    words = []
    for thing in scene:
        if thing.what == "shape":
            what = _article(f" a {thing.size} {thing.name}").strip()
        else:
            what = f"the number {thing.number}" if thing.what == "number" else f"a handwritten {thing.number}"
        words.append(f"{what} {_PREPOSITION[thing.place]} {thing.place}")
    return ", ".join(words) + "."


_PREPOSITION = {
    place: "on the" if place in ("left", "right") else "in the" if place == "middle" else "at the"
    for place in PLACES
}
DESCRIBE = ("Describe the picture.", "What do you see?", "What is in the picture?")
NO_PICTURE = "I see no picture. Please show me one."
SMALL_TALK: tuple[QA, ...] = (
    ("Hello!", "Hello! Show me a picture and ask me about it."),
    ("Hi", "Hello! Show me a picture and ask me about it."),
    ("Who are you?", "I am TinyModal's starter model. I know drawn shapes, numbers and handwritten digits."),
    (
        "What can you do?",
        "I answer questions about drawn scenes: colours, shapes, sizes, counts, places and digits.",
    ),
    ("Thank you!", "You are welcome."),
)


Made = tuple[str, tuple[Scene, ...], list[QA]]
"""Kind, scenes, and the turns about them."""


# --- samples --------------------------------------------------------------------------------------


class Scenes:
    """An endless source of made samples; ``sample(n)`` depends on nothing but the options and ``n``.

    Args:
        split: whose scans of digits are used; ``train`` has no unseen pairs.
        seed: another seed, other scenes.
        form: ``questions``: one to ``turns`` of them about a picture, or one about two pictures.
            ``mixed``: the same, with descriptions among the questions, and now and then talk without a
            picture. ``captions``: a picture and its description. ``crowded``: a full board and no words worth
            reading, for the ``cells`` loss.
        picture: ``drawn``, or ``written`` (see :func:`written`).
        kinds: which kinds of question; all if None.
        turns: at most so many questions about one picture.
        wide: ten shapes in ten colours instead of the six in six that are asked about, to pretrain parts.
        with_targets: pictures carry what each cell shows, for the ``cells`` loss.
    """

    def __init__(
        self,
        split: Split = "train",
        seed: int = 0,
        form: Literal["questions", "mixed", "captions", "crowded"] = "mixed",
        picture: Literal["drawn", "written"] = "drawn",
        kinds: Sequence[str] | None = None,
        turns: int = 3,
        wide: bool = False,
        with_targets: bool = False,
    ) -> None:
        forms = {
            "questions": self._questions,
            "mixed": self._mixed,
            "captions": self._captions,
            "crowded": self._crowded,
        }
        for key, value, known in (("form", form, tuple(forms)), ("picture", picture, ("drawn", "written"))):
            if value not in known:
                raise DataError(f"made scenes: {key} {value!r} is not known; take one of {', '.join(known)}")
        if not isinstance(turns, int) or turns < 1:
            raise DataError(f"made scenes: turns {turns!r} is no number of questions; expected 1 or more")
        if unknown := sorted(set(kinds or ()) - set(KINDS)):
            raise DataError(f"made scenes: unknown kinds {', '.join(unknown)}; known: {', '.join(KINDS)}")
        self.world = World(split, WIDE_PAIRS if wide else SEEN_PAIRS)
        self.seed, self.form, self.turns, self.kinds = seed, form, turns, tuple(kinds or KINDS)
        self.written, self.with_targets = picture == "written", with_targets
        self._turns = forms[form]

    def sample(self, index: int) -> Sample:
        rng = Random(f"{self.world.split}/{self.seed}/{self.form}/{index}")
        kind, scenes, turns = self._turns(rng)
        images = tuple(self._image(scene, rng) for scene in scenes)
        return _sample(f"made/{self.world.split}-{self.seed}/{index}", images, turns, kind)

    def _captions(self, rng: Random) -> Made:
        scene, _ = random_scene(rng, self.world, None, (1, 5))
        return "caption", (scene,), [(rng.choice(DESCRIBE), caption(scene))]

    def _crowded(self, rng: Random) -> Made:
        board = Board(rng, self.world)
        for _ in range(rng.randint(3, 9)):
            rng.choice((board.shape, board.shape, board.number, board.scan))()
        return "crowded", (board.scene(),), [("", ".")]

    def _mixed(self, rng: Random) -> Made:
        dice = rng.random()
        if dice < 0.01:
            return "talk", (), [rng.choice(SMALL_TALK)]
        if dice > 0.99:  # the same beside a picture
            return "talk", (random_scene(rng, self.world, None, (1, 5))[0],), [rng.choice(SMALL_TALK)]
        if dice < 0.03:
            return "talk", (), [(ask(rng.choice(self.kinds), rng, self.world).question, NO_PICTURE)]
        kind, scenes, turns = self._questions(rng)
        if len(scenes) == 1 and dice < 0.13:
            turns.insert(rng.randint(0, len(turns)), (rng.choice(DESCRIBE), caption(scenes[0])))
        return kind, scenes, turns

    def _questions(self, rng: Random) -> Made:
        asked = ask(rng.choice(self.kinds), rng, self.world)
        turns = [(asked.question, asked.answer)]
        if len(asked.scenes) == 1:  # further questions about the same scene, each of another kind
            scene = asked.scenes[0]
            kinds = [kind for kind in self.kinds if kind not in (asked.kind, "compare")]
            for kind in rng.sample(kinds, min(len(kinds), rng.randint(1, self.turns) - 1)):
                if qa := ASKERS[kind](rng, self.world, scene, rng.choice(shapes_of(scene))):
                    turns.append(qa)
        return asked.kind, asked.scenes, turns

    def _image(self, scene: Scene, rng: Random) -> Image:
        picture = written(scene) if self.written else draw(scene, rng)
        return Image(picture, targets(scene) if self.with_targets else None)


def _sample(name: str, images: tuple[Image, ...], turns: Sequence[QA], kind: str) -> Sample:
    """A conversation about ``images``, which open it."""
    messages = []
    for i, (question, answer) in enumerate(turns):
        messages.append(Message("user", _user_parts(images if i == 0 else (), question)))
        messages.append(Message("assistant", (Text(answer),)))
    return Sample(tuple(messages), name, {"kind": kind})


def _user_parts(images: tuple[Image, ...], question: str) -> tuple[Part, ...]:
    """The pictures, then the question; two pictures are named, as the question speaks of them by name."""
    if len(images) == 2:
        first, second = images
        return Text("first: "), first, Text("\nsecond: "), second, Text(f"\n{question}")
    return (*images, Text(question)) if question else images


@dataclass(frozen=True, slots=True)
class MadeQuestion:
    """A question for scoring: ``sample`` ends with the user's turn."""

    sample: Sample
    answer: str
    kind: str
    unseen_pair: bool
    choices: str = ""
    """The answers that a question of relation names, ``left or right`` or ``above or below``."""


def questions(split: Split, seed: int, per_kind: int, unseen_pairs: bool) -> list[MadeQuestion]:
    """``per_kind`` questions of every kind, one to a picture; about things of unseen pairs where asked for.

    Kinds that no pair of shape and colour enters (numbers, handwritten digits) are left out of the latter.
    """
    made = []
    world = World(split)
    for kind in KINDS_WITH_PAIRS if unseen_pairs else KINDS:
        for index in range(per_kind):
            name = f"scenes/{split}-{seed}/{'unseen' if unseen_pairs else 'new'}/{kind}/{index}"
            rng = Random(name)
            asked = ask(kind, rng, world, unseen_pairs)
            images = tuple(Image(draw(scene, rng)) for scene in asked.scenes)
            sample = Sample((Message("user", _user_parts(images, asked.question)),), name, {"kind": kind})
            choices = next((c for c in ("left or right", "above or below") if c in asked.question), "")
            made.append(MadeQuestion(sample, asked.answer, kind, unseen_pairs, choices))
    return made


MADE: Mapping[str, type[Scenes]] = {"scenes": Scenes}
"""Made sources by the name a recipe gives: ``{ made = "scenes", options = { form = "captions" } }``."""
