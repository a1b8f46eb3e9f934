"""Drawn scenes: colours, shapes, sizes, counts, places, digits; made here, with known answers.

Three benchmarks that share a table. ``scenes`` asks about new pictures, ``scenes-unseen`` about pairs of
shape and colour that training never showed or named, and ``scenes-shuffled`` asks the first one's questions
about the pictures of other questions of the same kind: a model that looks must fall to what the best
constant answer scores, and one that guesses from the words does not fall at all.

The pictures follow from a seed, so nothing is downloaded; ``tinymodal demo`` draws a fresh seed for every
run.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from tinymodal.core.types import Image, Message, Part, Sample
from tinymodal.eval.benchmark import Benchmark, Question, best_constants, by_category
from tinymodal.eval.rules.answers import exact

SOURCE = "tinymodal/data/synthetic.py; exact match of the normalised answer, mean of the kinds"
PER_KIND = 120
"""Questions of each kind about new pictures: +-4 points at 95 % right, +-9 at 50 % (95 % interval)."""
PER_KIND_UNSEEN = 60
MAX_NEW_TOKENS = 16
"""The longest answer, ``bottom right``, is two words."""
DEFAULT_SEED = 2

Split = Literal["val", "test"]


def benchmarks(
    seed: int = DEFAULT_SEED,
    per_kind: int = PER_KIND,
    per_kind_unseen: int = PER_KIND_UNSEEN,
    split: Split = "test",
) -> dict[str, Benchmark]:
    """The three benchmarks over one seed: ``new``, ``unseen_pairs`` and ``shuffled``.

    Args:
        seed: another seed, other pictures and questions.
        per_kind: questions of each kind; the shuffled ones are as many.
        per_kind_unseen: questions of each kind that unseen pairs can enter.
        split: ``val`` while choosing a recipe, ``test`` once at the end.
    """

    def new() -> list[Question]:
        return questions(split, seed, per_kind, False)

    load = {
        "new": ("scenes", new),
        "unseen_pairs": ("scenes-unseen", lambda: questions(split, seed, per_kind_unseen, True)),
        "shuffled": ("scenes-shuffled", lambda: shuffled(new(), seed)),
    }
    return {
        key: Benchmark(
            name=name,
            load=make,
            score=exact,
            reduce=by_category("kind"),
            max_new_tokens=MAX_NEW_TOKENS,
            source=SOURCE,
            family="scenes",
        )
        for key, (name, make) in load.items()
    }


@functools.lru_cache(maxsize=4)
def questions(split: Split, seed: int, per_kind: int, unseen_pairs: bool) -> list[Question]:
    """Made questions, one of each kind in turn, so that the first N are a fair sample of all."""
    from tinymodal.data.synthetic import questions as make

    by_kind: dict[str, list[Question]] = {}
    for made in make(split=split, seed=seed, per_kind=per_kind, unseen_pairs=unseen_pairs):
        pair = "unseen" if made.unseen_pair else "seen"
        meta = {"kind": made.kind, "pair": pair, "choices": made.choices}
        by_kind.setdefault(made.kind, []).append(Question(made.sample, made.answer, meta))
    return [question for turn in zip(*by_kind.values(), strict=True) for question in turn]


def shuffled(asked: Sequence[Question], seed: int = 0) -> list[Question]:
    """The same questions, each with the pictures of another one of its kind.

    Nobody keeps their own: the pictures move one place around a random ring. A question that is the only one
    of its kind and number of pictures has nobody to swap with and is left out.
    """
    rings: dict[tuple[str, int], list[int]] = {}
    for i, question in enumerate(asked):
        rings.setdefault((question.meta["kind"], len(_pictures(question.sample))), []).append(i)
    donor: dict[int, Question] = {}
    for ring in rings.values():
        random.Random(f"{seed}/shuffled").shuffle(ring)
        if len(ring) > 1:
            donor |= {i: asked[j] for i, j in zip(ring, ring[1:] + ring[:1], strict=True)}
    return [
        replace(question, sample=_with_pictures(question.sample, _pictures(donor[i].sample)))
        for i, question in enumerate(asked)
        if i in donor
    ]


def _pictures(sample: Sample) -> list[Image]:
    return [part for part in sample.media() if isinstance(part, Image)]


def _with_pictures(sample: Sample, pictures: Iterable[Image]) -> Sample:
    """``sample`` with its pictures replaced, in reading order."""
    others = iter(pictures)

    def swap(part: Part) -> Part:
        return next(others) if isinstance(part, Image) else part

    messages = tuple(Message(m.role, tuple(swap(p) for p in m.parts), m.train) for m in sample.messages)
    return replace(sample, messages=messages, id=f"{sample.id}/shuffled")


def by_kind(
    new: Mapping[str, float],
    unseen_pairs: Mapping[str, float],
    mixed_up: Mapping[str, float],
    asked: Sequence[Question],
) -> dict[str, Any]:
    """``{kinds: {name: {new, unseen_pairs, shuffled, constant, n}}, mean: {...}}``, the report's table.

    Args:
        new: accuracy by kind on new pictures, as :attr:`Benchmark.reduce` gives it.
        unseen_pairs: the same on unseen pairs; kinds it does not name get None.
        mixed_up: the same as new, with shuffled pictures.
        asked: the questions about new pictures, for the best constant answers and their number.
    """
    constants = best_constants(asked)
    numbers = {kind: sum(q.meta["kind"] == kind for q in asked) for kind in constants}
    kinds = {
        kind: {
            "new": new[kind],
            "unseen_pairs": unseen_pairs.get(kind),
            "shuffled": mixed_up[kind],
            "constant": constants[kind].accuracy,
            "n": numbers[kind],
        }
        for kind in constants
    }
    mean: dict[str, float | None] = {}
    for column in ("new", "unseen_pairs", "shuffled", "constant"):
        values = [float(value) for row in kinds.values() if (value := row[column]) is not None]
        mean[column] = sum(values) / len(values) if values else None
    return {"kinds": kinds, "mean": mean}


BENCHMARKS = benchmarks()
