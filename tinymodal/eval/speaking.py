"""Is what a model says aloud what it wrote, and does it come in time?

The way there and back (:func:`aloud`): the model speaks its replies, a listener that is not the model writes
down what it hears, and the word error rate is that of the transcripts against the text of the replies. It
tells nothing about whether the replies are right. Listeners are the recogniser of made speech that ships with
TinyModal, which knows the words of made scenes, and any model that hears and was trained to transcribe.

:func:`time_speech` listens to streams with a clock: how long after its first word a reply is first heard, and
how much faster than it is played it is made.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tinymodal.core.errors import DataError
from tinymodal.core.types import Audio, Message, Sample, Text
from tinymodal.eval.benchmark import Aloud, Benchmark, Listener, Question, Score
from tinymodal.eval.rules.transcripts import normaliser, rates, understood

if TYPE_CHECKING:
    from torch import Tensor

    from tinymodal.compose.build import Composed
    from tinymodal.infer.engine import Engine, Sampling

METRIC = "word error rate of speech"
TIMED = 20
"""Replies of a benchmark that are streamed with a clock."""
PROMPT = "Transcribe the speech."
MAX_NEW_TOKENS = 256


# Listeners


def built_in() -> Listener:
    """The recogniser that ships with TinyModal: made voices, the words of made scenes; see ``recogniser.py``.

    Raises:
        DataError: it is not there.
    """
    from tinymodal.data.sounds import spoken_words
    from tinymodal.eval import recogniser

    net = recogniser.recogniser()

    def hear(sounds: Sequence[Tensor], rate_hz: int) -> list[str]:
        return [net.transcribe(sound, rate_hz) for sound in sounds]

    weights = (recogniser.FOLDER / "model.safetensors").read_bytes()
    return Listener(
        name="the built-in recogniser",
        mark=hashlib.sha256(weights).hexdigest()[:16],
        hear=hear,
        written=lambda text: " ".join(spoken_words(text)),
    )


def of_model(composed: Composed, name: str, prompt: str = PROMPT, batch_size: int = 16) -> Listener:
    """A model that hears, asked to transcribe; its transcripts are normalised as Whisper's paper has it.

    Args:
        composed: the model.
        name: what it is called in the results.
        prompt: what it is asked beside each sound; ask as it was trained.
        batch_size: sounds that it hears together.
    """
    from tinymodal.eval.folder import fingerprint
    from tinymodal.infer.engine import Engine, Sampling

    engine = Engine(composed)
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)

    def hear(sounds: Sequence[Tensor], rate_hz: int) -> list[str]:
        heard = {i: sound for i, sound in enumerate(sounds) if len(sound)}
        asked = [
            Sample((Message("user", (Audio(sound, rate_hz), Text(prompt))),), f"reply {i} aloud")
            for i, sound in heard.items()
        ]
        said = engine.reply(asked, sampling, batch_size)
        told = {i: normaliser()(reply.text) for i, reply in zip(heard, said, strict=True)}
        return [told.get(i, "") for i in range(len(sounds))]

    return Listener(name=name, mark=fingerprint(engine), hear=hear, written=lambda text: normaliser()(text))


# There and back


def aloud(
    benchmark: Benchmark,
    listener: Callable[[], Listener] = built_in,
    *,
    voice: str | None = None,
    name: str = "",
) -> Benchmark:
    """The same questions; what counts is how the replies are understood when they are spoken.

    Args:
        benchmark: whose questions are asked; its own score, numbers and judge do not count.
        listener: opened when the first reply is to be heard, once.
        voice: in which the model speaks; None: its first.
        name: of the new benchmark; empty: the old one's with ``-aloud`` behind it.
    """
    opened = functools.cache(listener)

    def score(question: Question, heard: str) -> Score:
        # The answer is what was said, see ``Benchmark.aloud``.
        return understood(opened().written(question.answer), heard)

    def reduce(scores: Sequence[Score]) -> dict[str, float]:
        return rates([opened().written(score.meta["reference"]) for score in scores], scores)

    return replace(
        benchmark,
        name=name or f"{benchmark.name}-aloud",
        score=score,
        reduce=reduce,
        report=None,
        sums=None,
        judge=None,
        unanswered="left out",
        submit=None,
        metric=METRIC,
        headline="wer",
        family="",
        lower_is_better=True,
        aloud=Aloud(opened, voice),
        source=f"questions of {benchmark.name}; transcripts against the replies' text, counted by jiwer",
    )


def check_apart(listener: Listener, mark: str, name: str) -> None:
    """Refuse a model as its own judge.

    Raises:
        DataError: the listener's weights are the speaker's.
    """
    if listener.mark == mark:
        raise DataError(
            f"{name}: {listener.name} is the model that speaks; expected another one to listen. Leave the "
            f"listener out for the built-in recogniser, or name a model of its own."
        )


# In time


@dataclass(frozen=True, slots=True)
class Timing:
    """How soon and how fast replies are heard, on the machine that they were timed on."""

    first_sound_ms: float
    """From the first text to the first sound of a reply, median."""
    slowest_first_sound_ms: float
    real_time_factor: float
    """Seconds that all replies took, from their questions to their last sound, over the seconds they last."""
    replies: int
    """That said something."""
    seconds: float
    """That they last."""


def time_speech(
    engine: Engine,
    samples: Iterable[Sample],
    sampling: Sampling | None = None,
    voice: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing | None:
    """Stream replies to ``samples`` aloud, one after another, by the clock; None if nothing was said.

    The first sample is streamed once before, untimed: whatever is loaded or made at first use.

    Raises:
        CheckpointError: the model does not speak.
        DataError: a sample cannot be asked.
    """
    from tinymodal.infer.engine import GREEDY, AudioDelta

    sampling = sampling or GREEDY
    waits_s: list[float] = []
    took_s = lasts_s = 0.0
    for number, sample in enumerate(_first_twice(samples)):
        asked = clock()
        text_at = sound_at = None
        seconds = 0.0
        for delta in engine.stream(sample, sampling, speak=True, voice=voice):
            if isinstance(delta, AudioDelta):
                sound_at = clock() if sound_at is None else sound_at
                seconds += len(delta.samples) / delta.rate_hz
            elif text_at is None:
                text_at = clock()
        if number and text_at is not None and sound_at is not None:
            took_s += clock() - asked
            lasts_s += seconds
            waits_s.append(max(0.0, sound_at - text_at))
    if not waits_s:
        return None
    return Timing(
        first_sound_ms=1000 * statistics.median(waits_s),
        slowest_first_sound_ms=1000 * max(waits_s),
        real_time_factor=took_s / lasts_s,
        replies=len(waits_s),
        seconds=lasts_s,
    )


def _first_twice(samples: Iterable[Sample]) -> Iterable[Sample]:
    for number, sample in enumerate(samples):
        if number == 0:
            yield sample
        yield sample
