"""Spoken answers of packed rows -> what a speech head learns from.

A spoken answer is a stretch of a sample's tokens and the codec's frames of its sound. The head reads the
language model's states where those tokens were predicted, and such states exist at targets only; so every
token of a spoken answer must be a target. That, and that the sound has become codes, is checked here, where
an error can still name the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinymodal.core.errors import DataError
from tinymodal.core.types import Encoded, SpeechItem

# Shapes: F = B*T positions, Q codebooks, G frames of all answers, P tokens of them, Z answers.


def lay_speech(rows: Sequence[Sequence[Encoded]], length: int, trains_F: Tensor) -> dict[str, Any]:
    """The fields ``speech_*`` of a :class:`~tinymodal.core.types.Batch`.

    Args:
        rows: of samples, as ``collate`` lays them: row r begins at position r * ``length``, and its samples
            follow each other from there.
        length: T.
        trains_F: bool [B*T], which positions hold a target.

    Returns:
        ``speech_codes``, ``speech_frames``, ``speech_take``, ``speech_tokens`` and ``speech_voices``; nothing
        where nothing is spoken.

    Raises:
        DataError: an answer without codes or without frames, with another number of codebooks than its
            neighbours, or with a token that does not train; names the sample.
    """
    spoken: list[tuple[SpeechItem, Encoded]] = []
    places: list[Tensor] = []
    for number, row in enumerate(rows):
        start = number * length
        for sample in row:
            for item in sample.speech:
                _check_span(item, sample)
                spoken.append((item, sample))
                places.append(torch.arange(start + item.first, start + item.last))
            start += sample.ids.numel()
    if not spoken:
        return {}
    codes = [_codes(item, sample, *spoken[0]) for item, sample in spoken]
    place_P, tokens = torch.cat(places), tuple(map(len, places))
    _check_trains(spoken, tokens, trains_F[place_P])
    return {
        "speech_codes": torch.cat(codes, dim=1),
        "speech_frames": tuple(each.shape[1] for each in codes),
        # Targets are numbered in the order of their places.
        "speech_take": (trains_F.cumsum(0) - 1)[place_P],
        "speech_tokens": tokens,
        "speech_voices": torch.tensor([item.voice for item, _ in spoken]),
    }


def _check_span(item: SpeechItem, sample: Encoded) -> None:
    if not 0 < item.first < item.last <= sample.ids.numel():
        raise DataError(
            f"{sample.sample_id}: a spoken answer at tokens {item.first} to {item.last} of "
            f"{sample.ids.numel()}; expected at least one token, after the first. Encode the sample again"
        )


def _codes(item: SpeechItem, sample: Encoded, first: SpeechItem, first_sample: Encoded) -> Tensor:
    """The codes of an answer, int64 [Q, F], with as many codebooks as the batch's first."""
    codes = item.codes
    if codes is None:
        raise DataError(
            f"{sample.sample_id}: a spoken answer whose sound has not become codes; expected int64 [books, "
            f"frames]. Complete the rows with the codec before they are laid in a batch"
        )
    if codes.dim() != 2 or not codes.numel():
        raise DataError(
            f"{sample.sample_id}: codes of shape {list(codes.shape)} for a spoken answer; expected [books, "
            f"frames], at least one of each. Is its sound empty?"
        )
    assert first.codes is not None, "the first is asked first"
    if len(codes) != len(first.codes):
        raise DataError(
            f"{sample.sample_id}: {len(codes)} codebooks in a batch with {len(first.codes)} "
            f"({first_sample.sample_id}); expected one number. Encode all sounds with one codec"
        )
    return codes.long()


def _check_trains(
    spoken: Sequence[tuple[SpeechItem, Encoded]], tokens: Sequence[int], trains_P: Tensor
) -> None:
    if bool(trains_P.all()):
        return
    for (item, sample), trains in zip(spoken, trains_P.split(list(tokens)), strict=True):
        if not bool(trains.all()):
            raise DataError(
                f"{sample.sample_id}: token {item.first + int((~trains).nonzero()[0])} belongs to a spoken "
                f"answer and does not train; a speech head reads the states that predicted the answer. Let "
                f"the turn train, or leave its speech out"
            )
