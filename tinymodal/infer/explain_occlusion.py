"""Hide a piece of a picture or a sound, and see which words become less likely.

Attention tells where a model looks, and that need not be what decides (Jain and Wallace 2019,
arXiv:1902.10186). Hiding does: one square after the other is painted over with the picture's mean colour, one
stretch of a sound after the other silenced, and the same answer is read again (Zeiler and Fergus 2014,
arXiv:1311.2901). It asks nothing of the model but its probabilities, so it works for every tower and
connector, and costs one pass a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageStat
import torch
from torch import Tensor

from tinymodal.core.types import Audio, Image, Medium, Sample
from tinymodal.infer.explain_attention import embedded, without_places

BATCH = 8
"""Readings in one pass."""
STRETCHES = 2
"""Of a sound, for each square of a picture's longer side: a stretch of time is less than a square."""

# Shapes: n tokens of the answer, P pieces that are hidden, B readings at once, T positions of the prompt.


@dataclass(frozen=True, slots=True)
class Hidden:
    """What hiding the pieces of one picture or sound does to the answer."""

    boxes_P4: Tensor
    """float64 [P, 4]: top, left, bottom, right as fractions of the picture."""
    drop_Pn: Tensor
    """float32 [P, n]: by how much the log-probability of each token falls; below 0 where it rises."""
    logprobs_Pn: Tensor
    """float32 [P, n]: what is left of it."""


def hide(
    engine: Any, sample: Sample, shown: Sequence[PIL.Image.Image | Tensor], ids: Sequence[int], squares: int
) -> list[Hidden]:
    """Hide each piece of each picture and sound in turn.

    Args:
        engine: who answered.
        sample: the conversation up to the answer.
        shown: its media in reading order: pictures upright in RGB, sounds as float32 [samples] at the rate
            that the tower hears.
        ids: the answer's tokens.
        squares: along a picture's longer side; a sound has ``STRETCHES`` times as many.
    """
    media = list(sample.media())
    plain: list[Medium] = [_plain(engine, part, seen) for part, seen in zip(media, shown, strict=True)]
    whole_n = next(_read(engine, [_with(sample, plain)], ids))[0]
    found = []
    for number, (part, seen) in enumerate(zip(plain, shown, strict=True)):
        boxes = _pieces(seen, squares)
        readings = (
            _with(sample, [*plain[:number], _without(part, seen, box), *plain[number + 1 :]]) for box in boxes
        )
        left_Pn = torch.cat(list(_read(engine, readings, ids)))
        found.append(Hidden(torch.tensor(boxes, dtype=torch.float64), whole_n - left_Pn, left_Pn))
    return found


def _plain(engine: Any, part: Medium, seen: PIL.Image.Image | Tensor) -> Medium:
    """The medium as what was read of it, so that a changed one goes the same way."""
    if isinstance(seen, Tensor):
        return Audio(seen, engine.encoder.processor.feature_extractor.sampling_rate)
    assert isinstance(part, Image)
    return replace(part, source=seen)


def _pieces(seen: PIL.Image.Image | Tensor, squares: int) -> list[tuple[float, float, float, float]]:
    """Two squares wide and high, a square from one to the next, half of the first and last at the edges.

    One square alone seldom hides enough: of a made scene's side a sixth was decisive in 7 of 8 questions
    about size and 6 of 8 about place.
    """
    if isinstance(seen, Tensor):
        return [(0.0, left, 1.0, right) for left, right in _slid(squares * STRETCHES)]
    longest = max(seen.size)
    rows, columns = (max(1, round(squares * edge / longest)) for edge in (seen.height, seen.width))
    return [(top, left, bottom, right) for top, bottom in _slid(rows) for left, right in _slid(columns)]


def _slid(num: int) -> list[tuple[float, float]]:
    return [(max(0, i - 1) / num, min(num, i + 1) / num) for i in range(num + 1)]


def _without(part: Medium, seen: PIL.Image.Image | Tensor, box: tuple[float, float, float, float]) -> Medium:
    """The medium with one piece hidden."""
    top, left, bottom, right = box
    if isinstance(seen, Tensor):
        assert isinstance(part, Audio)
        silenced = seen.clone()
        silenced[int(left * len(seen)) : ceil(right * len(seen))] = 0
        return replace(part, source=silenced)
    assert isinstance(part, Image)
    painted = seen.copy()
    mean = tuple(round(value) for value in PIL.ImageStat.Stat(seen).mean)
    # PIL counts the last row and column in.
    corners = (left * seen.width, top * seen.height, right * seen.width - 1, bottom * seen.height - 1)
    PIL.ImageDraw.Draw(painted).rectangle([round(corner) for corner in corners], fill=mean)
    return replace(part, source=painted)


def _with(sample: Sample, media: Sequence[Medium]) -> Sample:
    """The conversation with other media in the places of its own."""
    others = iter(media)
    messages = tuple(
        replace(
            message,
            parts=tuple(next(others) if isinstance(part, Image | Audio) else part for part in message.parts),
        )
        for message in sample.messages
    )
    return replace(sample, messages=messages)


def _read(engine: Any, samples: Iterator[Sample] | Sequence[Sample], ids: Sequence[int]) -> Iterator[Tensor]:
    """Log-probabilities of the answer after each sample, float32 [B, n] a batch."""
    batch: list[Any] = []
    for sample in samples:
        batch.append(engine.encode(sample))
        if len(batch) == BATCH:
            yield _logprobs(engine, batch, ids)
            batch = []
    if batch:
        yield _logprobs(engine, batch, ids)


def _logprobs(engine: Any, batch: Sequence[Any], ids: Sequence[int]) -> Tensor:
    # A piece that is hidden changes no size, so all prompts are equally long and nothing is padded.
    model = engine.model.model
    with torch.inference_mode():
        x_BTD = embedded(engine, batch)
        answer_n = torch.tensor(list(ids), device=x_BTD.device)
        said_nD = model.get_input_embeddings()(answer_n[:-1])
        x_BTD = torch.cat((x_BTD, said_nD.to(x_BTD.dtype).expand(len(batch), -1, -1)), dim=1)
        states_BTD = model.language_model(inputs_embeds=x_BTD, use_cache=False).last_hidden_state
        logits = engine.model.head(states_BTD[:, -len(ids) :]).float()
        logprobs_BnV = without_places(engine, logits).log_softmax(-1)
        return logprobs_BnV.gather(2, answer_n.expand(len(batch), -1)[..., None])[..., 0].cpu()
