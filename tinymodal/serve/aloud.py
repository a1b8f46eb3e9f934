"""A given text, said by a model's speech head.

The head reads the language model's states of an answer, and here the answer is given: the model is shown the
question it was trained on (``asking.py``) with the text as its own reply, all of it in one pass, and the head
hears that. The text is not changed, and a word that the model would never say is spoken all the same.

Sentence by sentence: the first one sounds while the others wait, and none is longer than an answer that the
head has learned from.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tinymodal.core.errors import DataError
from tinymodal.core.types import IGNORE, Encoded, Message, Sample, Text

if TYPE_CHECKING:
    from torch import Tensor

    from tinymodal.infer.engine import Engine

# Shapes: T positions, n tokens of the text and its stop, D language width.

T = TypeVar("T")
SENTENCE = re.compile(r"(?<=[.!?\u3002\uff01\uff1f])\s+|\n+")


def sentences(text: str) -> list[str]:
    """The sentences of a text, without white space around them; none is empty."""
    return [sentence for part in SENTENCE.split(text) if (sentence := part.strip())]


def say(engine: Engine, text: str, read: str, voice: str | None, sample_id: str) -> Iterator[Tensor]:
    """A text aloud, in pieces, float32 [samples] at the codec's rate.

    Args:
        engine: of a model that speaks.
        text: what is said.
        read: what the model is asked before it, see ``Asking.read``.
        voice: in which; None: the model's first.
        sample_id: what errors call it.

    Raises:
        CheckpointError: the model does not speak.
        DataError: there is no such voice, or no word; the text cannot be encoded, or a sentence is longer
            than the model reads.
    """
    known = engine.mouth.known(voice)
    said = sentences(text)
    if not said:
        raise DataError(f"{sample_id}: there is no word to say")
    # All are read before the first is heard: what is wrong with the last one is told in time.
    for encoded in [prompt(engine, sentence, read, sample_id) for sentence in said]:
        states_nD, ids_n = heard(engine, encoded)
        utterance = engine.mouth.begin(known, 0.0, 0, 0)
        for state_1D, id_1 in zip(states_nD.split(1), ids_n.split(1), strict=True):
            yield utterance.feed(state_1D, id_1)
        yield from utterance.rest()


def prompt(engine: Engine, sentence: str, read: str, sample_id: str) -> Encoded:
    """A sentence as the model's own reply; what trains of it is what the speech head hears.

    Raises:
        DataError: it cannot be encoded, or is longer than the model reads.
    """
    asked = read.replace("{text}", sentence)
    turns = (Message("user", (Text(asked),)), Message("assistant", (Text(sentence),)))
    encoded = engine.encoder(Sample(turns, sample_id))
    if engine.room is not None and len(encoded) > engine.room:
        raise DataError(
            f"{sample_id}: a sentence takes {len(encoded)} tokens with its question, the model reads at most "
            f"{engine.room}; make it shorter"
        )
    return encoded


def heard(engine: Engine, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """What the speech head is given of a sentence: states [n, D] and tokens, int64 [n]."""
    places = (encoded.labels != IGNORE).nonzero()[:, 0]
    first, last = int(places[0]), int(places[-1]) + 1
    device = next(engine.model.parameters()).device
    ids_1T = encoded.ids[None].to(device)
    with torch.inference_mode():
        out: Any = engine.model.model(
            input_ids=ids_1T, position_ids=torch.arange(len(encoded), device=device)[None], use_cache=False
        )
    # A token's state is the one that predicted it: that of the position before.
    return out.last_hidden_state[0, first - 1 : last - 1], ids_1T[0, first:last]


async def from_thread(executor: Executor, make: Callable[[], Iterator[T]]) -> AsyncGenerator[T]:
    """What an iterator gives that runs in a thread; it is left after the piece in hand when nobody listens.

    Raises:
        Exception: what the iterator raises.
    """
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[bool, Any]]()
    left = threading.Event()

    def tell(over: bool, value: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server was stopped
            loop.call_soon_threadsafe(pieces.put_nowait, (over, value))

    def work() -> None:
        try:
            if not left.is_set():
                for piece in make():
                    if left.is_set():
                        return
                    tell(False, piece)
            tell(True, None)
        except BaseException as error:
            tell(True, error)

    executor.submit(work)
    try:
        while True:
            over, value = await pieces.get()
            if over and value is not None:
                raise value
            if over:
                return
            yield value
    finally:
        left.set()
