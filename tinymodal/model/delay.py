"""Frames of several codebooks as columns, each book one column later than the one before.

So the first book's code of a frame is known when the second's is chosen, and a column is written at once
(the delay pattern of MusicGen, arXiv:2306.05284). Column c holds frame c of the first book, frame c - 1 of
the second, and so on; F frames of Q books are F + Q - 1 columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Shapes: Z answers, Q codebooks, F frames, G frames of all answers, C columns.


def delay(codes_QF: Tensor, fill: int) -> Tensor:
    """The columns of one answer, [Q, F + Q - 1]; ``fill`` where a book has not begun or has ended."""
    books, frames = codes_QF.shape
    return pick(codes_QF, delayed((frames,), (frames + books - 1,), books), fill)


def undelay(columns_QC: Tensor) -> Tensor:
    """The frames of one answer's columns, [Q, C - Q + 1]: what :func:`delay` was given."""
    frames = columns_QC.shape[1] - len(columns_QC) + 1
    return torch.stack([row_C[q : q + frames] for q, row_C in enumerate(columns_QC)])


def delayed(frames: Sequence[int], columns: Sequence[int], books: int) -> Tensor:
    """Which frame each column has of each book.

    Args:
        frames: of each answer.
        columns: of each answer.
        books: Q.

    Returns:
        int64 [Q, C], answer by answer; frames are counted over all answers, and -1 is none.
    """
    frames_Z, columns_Z = torch.tensor(frames), torch.tensor(columns)
    of_C = torch.arange(len(frames)).repeat_interleave(columns_Z, output_size=sum(columns))
    place_C = torch.arange(len(of_C)) - (columns_Z.cumsum(0) - columns_Z)[of_C]
    frame_QC = place_C - torch.arange(books)[:, None]
    known_QC = (frame_QC >= 0) & (frame_QC < frames_Z[of_C])
    return torch.where(known_QC, frame_QC + (frames_Z.cumsum(0) - frames_Z)[of_C], -1)


def pick(codes_QG: Tensor, index_QC: Tensor, fill: int) -> Tensor:
    """Codes of the frames that :func:`delayed` names, and ``fill`` for none; [Q, C]."""
    index_QC = index_QC.to(codes_QG.device)
    return codes_QG.gather(1, index_QC.clamp(min=0)).masked_fill(index_QC < 0, fill)
