"""Answering: sixteen questions together and one by one, a second turn on the same picture, and int8 weights.

    python benchmarks/inference.py             five rounds; ten minutes on two cores
    python benchmarks/inference.py --quick     three rounds of less

The starter model, and a random one whose shares of work are those of a model of 0.9 billion weights at a
seventh of its widths (benchmarks/shapes.py). Greedy and in float32, on all cores.

*Together* is one batch of the engine, *through the queue* the scheduler with all asked at once; their replies
are compared with those given alone and must be the same. The starter's questions are once scenes asked in
writing, of all ten kinds, and once scenes asked in writing, scenes asked aloud, clips of words, and words
alone; those of the random model, which says eight tokens to each, have a picture or not and are of different
lengths. Only the thread that answers computes on all cores (tinymodal/core/threads.py).

A *turn's first token* is all from the question to the first token: reading and preparing the picture, the
tower, the prompt. Pictures are files of 12 megapixels, as phones take them, and of 256 pixels; in the second
turn the conversation is the first one's, its answer, and a new question.

*8 bits* is ``load(bits=8)``: bytes of the language model with embeddings and head, and how many answers stay
the same; of the random model the first word's.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import PIL.Image
import torch

from benchmarks.measure import Row, finish, interleave, less, more, words
from benchmarks.shapes import SEVENTH, TOY, Shape
from tinymodal.cli import usable_cores
from tinymodal.compose.build import Composed, compose, load, parameter_report
from tinymodal.compose.narrow import narrow
from tinymodal.compose.spec import LanguageSpec, ModelSpec, VisionSpec
from tinymodal.compose.tiny import tiny_tokenizer
from tinymodal.core.threads import apart, on_one_core
from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.infer.engine import Engine, Sampling
from tinymodal.infer.scheduler import Scheduler

TOGETHER = 16
PHOTO_PX, SMALL_PX = (4000, 3000), (256, 256)
SEED = 21
"""Of the questions: no recipe was chosen by them."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = words(__doc__)
    parser.add_argument("--toy", action="store_true", help="a toy for the random model: for tests")
    parser.set_defaults(threads=usable_cores())
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    on_one_core()  # this thread asks and keeps time
    rounds = 3 if given.quick else 5
    shape = TOY["0.9B"] if given.toy else SEVENTH["0.9B"]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        for name, make, asked in (
            ("starter", lambda: load("starter"), {"on pictures": pictures, "mixed": mixed}),
            ("0.9B", lambda: random_model(shape), {"mixed": random_questions}),
        ):
            long = 16 if name == "starter" else 8
            composed = apart(make)
            for what, questions in asked.items():
                sampling = Sampling(max_new_tokens=long)
                rows += together(f"{name}: 16 questions {what}", composed, apart(questions), sampling, rounds)
            for what, size in (("photo", PHOTO_PX), ("small picture", SMALL_PX)):
                how = (name, composed, what, size, Path(place), rounds, long)
                rows.append(apart(partial(turns, *how)))
            rows += apart(partial(in_eight_bits, name, make, composed, 120 if given.quick else 600))
    apart(partial(finish, rows, given.json, given.quick))  # it tells how many threads answered
    return 0


def together(
    name: str, composed: Composed, samples: Sequence[Sample], sampling: Sampling, rounds: int
) -> list[Row]:
    """Questions a second, over wall time: all cores belong to the model."""
    engine = Engine(composed)
    said: dict[str, list[str]] = {}

    def one_by_one() -> None:
        said["one by one"] = [engine.reply([sample], sampling)[0].text for sample in samples]

    def batch() -> None:
        said["batch"] = [reply.text for reply in engine.reply(samples, sampling, TOGETHER)]

    def queue() -> None:
        # Made by a thread that has all cores, it has them all.
        with apart(lambda: Scheduler(Engine(composed), max_rows=TOGETHER, prefix_mb=0)) as scheduler:
            tickets = [scheduler.submit(sample, sampling) for sample in samples]
            said["queue"] = [ticket.reply.text for ticket in tickets]

    ways = {"one by one": partial(apart, one_by_one), "batch": partial(apart, batch), "queue": queue}
    took = interleave(ways, rounds)
    assert said["one by one"] == said["batch"] == said["queue"], "the replies differ"
    alone, batched, queued = (len(samples) / took[way].wall for way in ways)
    return [
        more(f"{name} together, against one by one", batched, alone, "1/s"),
        more(f"{name} through the queue, against one by one", queued, alone, "1/s"),
    ]


def turns(
    name: str, composed: Composed, what: str, size: tuple[int, int], place: Path, rounds: int, long: int
) -> Row:
    """Median seconds to the first token of the second turn, and of the first."""
    took: list[tuple[float, float]] = []
    for turn in range(-1, rounds):
        path = picture(place / f"{name}-{turn}-{size[0]}.jpg", size, turn)
        both = two_turns(Engine(composed, prefix_mb=256), path, long)
        if turn >= 0:  # the first meets cold code
            took.append(both)
    firsts, again = (median(times) for times in zip(*took, strict=True))
    return less(f"{name}: second turn's first token on one {what}, against the first's", again, firsts, "s")


def two_turns(engine: Engine, path: Path, long: int) -> tuple[float, float]:
    """Seconds to the first token of the first turn and of the second."""
    first_token = Sampling(max_new_tokens=1)
    asked = Message("user", (Image(path), Text("What colour is the ring?")))
    question = Sample((asked,), "first")
    first = seconds(lambda: engine.reply([question], first_token))
    (said,) = engine.reply([question], Sampling(max_new_tokens=long))
    answer = Message("assistant", (Text(said.text or "It is red."),))
    follows = Sample((asked, answer, Message("user", (Text("Where is the star?"),))), "second")
    return first, seconds(lambda: engine.reply([follows], first_token))


def in_eight_bits(name: str, make: Callable[[], Composed], whole: Composed, num: int) -> list[Row]:
    """Bytes, and the share of answers that stay as they are."""
    before = language_mb(whole)
    small = make()
    narrow(small.model, 8)
    gc.collect()
    if name == "starter":
        from tinymodal.eval.tasks.scenes import questions

        samples = [question.sample for question in questions("test", SEED, num // 10, False)][:num]
        how = Sampling(max_new_tokens=16)
    else:
        samples, how = random_questions(), Sampling(max_new_tokens=1)
    said, expected = ([reply.text for reply in Engine(c).reply(samples, how)] for c in (small, whole))
    same = sum(one == other for one, other in zip(said, expected, strict=True)) / len(samples)
    return [
        less(f"{name}: language model in 8 bits, against float32", language_mb(small), before, "MB"),
        more(f"{name}: answers of {len(samples)} that are the same in 8 bits", 100 * same, None, "%"),
    ]


def language_mb(composed: Composed) -> float:
    """Bytes of the language model, its embeddings and its head, in 10^6."""
    parts = {part.part: part.bytes for part in parameter_report(composed.model)}
    return sum(parts.get(part, 0) for part in ("language", "embeddings", "head")) / 1e6


def pictures() -> list[Sample]:
    """Sixteen scenes asked in writing: the first of each of ten kinds, and the second of six."""
    from tinymodal.eval.tasks import scenes

    return [question.sample for question in scenes.questions("test", SEED, 2, False)][:TOGETHER]


def mixed() -> list[Sample]:
    """Six scenes asked in writing, five asked aloud, three clips, and two questions of words alone."""
    from tinymodal.eval.tasks import scenes, sounds

    written = [question.sample for question in scenes.questions("test", SEED, 1, False)][:6]
    aloud = [question.sample for question in sounds.asked("test", SEED, 1)][:5]
    clips = [question.sample for question in sounds.heard("test", SEED, 3, "test")][:3]
    plain = [
        Sample((Message("user", (Text(text),)),), text) for text in ("What is two and two?", "Is it red?")
    ]
    return [*written, *aloud, *clips, *plain]


def random_questions() -> list[Sample]:
    """Sixteen of different lengths; three in four have a picture."""
    noise = np.random.default_rng(SEED)
    found = []
    for n in range(TOGETHER):
        shown = PIL.Image.fromarray(noise.integers(0, 256, (300, 400, 3), dtype=np.uint8))
        text = Text(" ".join(["what is it"] * (1 + n % 5)))
        parts: tuple[Any, ...] = (text,) if n % 4 == 3 else (Image(shown), text)
        found.append(Sample((Message("user", parts),), f"{n}"))
    return found


def random_model(shape: Shape) -> Composed:
    """Of this shape, with a tokenizer of few words: the rest of its vocabulary has no text."""
    language = {key: value for key, value in shape.language.items() if key != "rope_theta"}
    # A toy's is smaller than the tokenizer's few words.
    language["vocab_size"] = max(language["vocab_size"], 512)
    spec = ModelSpec(
        language=LanguageSpec(config=language, template="chatml", tokenizer="none"),
        vision=VisionSpec(config=shape.vision, connector="mlp", feature_layer=-2),
    )
    return compose(spec, tiny_tokenizer())


def picture(path: Path, size: tuple[int, int], seed: int) -> Path:
    """A made picture as a JPEG: slopes with some noise, so that it has the bytes of a real one."""
    noise = np.random.default_rng(seed + 100)
    coarse = noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    slopes = PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC)
    smooth = np.asarray(slopes, dtype=np.int16)
    grain = noise.integers(-8, 9, (size[1], size[0], 1), dtype=np.int16)
    PIL.Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return path


def seconds(do: Callable[[], object]) -> float:
    begin = time.perf_counter()
    do()
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
