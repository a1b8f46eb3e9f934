"""Made sounds: clips of words to repeat, and the questions of ``scenes`` asked aloud.

``heard`` plays one to four words in voices that training never had; ``heard-seen-voices`` does in those of
training, and ``heard-shuffled`` gives each of the first one's questions the clip of another: a model that
listens must fall there to what strangers' words have in common, and that is next to nothing. The score is
the word error rate over all clips, numbers counted as they are spoken.

``scenes-asked`` are the questions of ``scenes``, the same pictures included, heard instead of read.

Clips follow from a seed. They are joined of the words that ship with TinyModal, so they are the same on every
machine; ``speaker = "espeak"`` asks for whole sentences of espeak-ng in their place.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tinymodal.core.types import Audio, Message, Part, Sample
from tinymodal.eval.benchmark import Benchmark, Question, Score, by_category
from tinymodal.eval.rules.answers import exact
from tinymodal.eval.rules.transcripts import rates, understood
from tinymodal.eval.tasks import scenes

if TYPE_CHECKING:
    from tinymodal.data.sounds import How
    from tinymodal.data.voices import VoiceSplit

SOURCE = "tinymodal/data/sounds.py; words as they are spoken, counted by jiwer"
CLIPS = 300
"""Some 750 words: +-1.3 points at a word error rate of 3 % (95 % interval)."""
PER_KIND_ASKED = 60
"""Questions asked aloud of each kind: +-6 points a kind at 95 % right, +-2 in the mean of ten."""
MAX_NEW_TOKENS = 32
"""Four numbers of two words and their spaces are 12 tokens; what goes on after that is counted as wrong."""


def benchmarks(
    seed: int = scenes.DEFAULT_SEED,
    clips: int = CLIPS,
    per_kind: int = PER_KIND_ASKED,
    split: scenes.Split = "test",
    speaker: How = "shipped",
) -> dict[str, Benchmark]:
    """The four benchmarks over one seed: ``seen_voices``, ``unseen_voices``, ``shuffled``, ``asked``.

    Args:
        seed: another seed, other clips; that of ``scenes.benchmarks`` asks its very questions.
        clips: of each of the first three.
        per_kind: questions of each kind in the last one.
        split: ``val`` while choosing a recipe, ``test`` once at the end; also of the unseen voices.
        speaker: what speaks, see :class:`tinymodal.data.sounds.Speakers`.
    """

    def unseen() -> list[Question]:
        return heard(split, seed, clips, split, speaker)

    load = {
        "seen_voices": ("heard-seen-voices", lambda: heard(split, seed, clips, "train", speaker)),
        "unseen_voices": ("heard", unseen),
        "shuffled": ("heard-shuffled", lambda: shuffled(unseen(), seed)),
    }
    found = {
        key: Benchmark(
            name=name,
            load=make,
            score=_score,
            reduce=_rates,
            max_new_tokens=MAX_NEW_TOKENS,
            source=SOURCE,
            metric="word error rate",
            headline="wer",
            lower_is_better=True,
        )
        for key, (name, make) in load.items()
    }
    found["asked"] = Benchmark(
        name="scenes-asked",
        load=lambda: asked(split, seed, per_kind, speaker),
        score=exact,
        reduce=by_category("kind"),
        max_new_tokens=scenes.MAX_NEW_TOKENS,
        source=f"{scenes.SOURCE}; asked aloud by tinymodal/data/sounds.py",
        family="scenes",
    )
    return found


@functools.lru_cache(maxsize=4)
def heard(
    split: scenes.Split, seed: int, num: int, voices: VoiceSplit, speaker: How = "shipped"
) -> list[Question]:
    """Clips of one to four words in the voices of a split, and what is said."""
    from tinymodal.data.sounds import heard_questions

    made = heard_questions(split, seed, num, voices, speaker)
    return [
        Question(
            replace(each.sample, id=f"{each.sample.id}/{voices}"),
            each.answer,
            {"kind": each.kind, "reference": each.answer},
        )
        for each in made
    ]


def asked(split: scenes.Split, seed: int, per_kind: int, speaker: How = "shipped") -> list[Question]:
    """The first questions of each kind of ``scenes.questions``, asked aloud by voices of the split."""
    from tinymodal.data.sounds import ask_aloud

    return [
        replace(question, sample=ask_aloud(question.sample, seed, split, speaker))
        for question in scenes.questions(split, seed, per_kind, False)
    ]


def shuffled(clips: Sequence[Question], seed: int = 0) -> list[Question]:
    """The same questions and answers, each with the clip of another: the clips move around a random ring."""
    ring = list(range(len(clips)))
    random.Random(f"{seed}/shuffled").shuffle(ring)
    donor = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    return [
        replace(question, sample=_with_sounds(question.sample, clips[donor[i]].sample))
        for i, question in enumerate(clips)
    ]


def _with_sounds(sample: Sample, donor: Sample) -> Sample:
    sounds = iter([part for part in donor.media() if isinstance(part, Audio)])

    def swap(part: Part) -> Part:
        return next(sounds) if isinstance(part, Audio) else part

    messages = tuple(Message(m.role, tuple(swap(p) for p in m.parts), m.train) for m in sample.messages)
    return replace(sample, messages=messages, id=f"{sample.id}/shuffled")


def _written(text: str) -> str:
    from tinymodal.data.sounds import spoken_words

    return " ".join(spoken_words(text))


def _score(question: Question, reply: str) -> Score:
    return understood(_written(question.answer), _written(reply))


def _rates(scores: Sequence[Score]) -> dict[str, float]:
    return rates([_written(score.meta["reference"]) for score in scores], scores)


BENCHMARKS = benchmarks()
