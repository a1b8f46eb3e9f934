"""Of two answers to one question the chosen one becomes likelier than the rejected one: DPO.

Rafailov et al. 2023, arXiv:2305.18290, equation 7: with the log-probability of a whole answer under the model
(pi) and under what it was when the stage began (ref), the loss of a pair is

    -log sigmoid(beta * ((pi(chosen) - ref(chosen)) - (pi(rejected) - ref(rejected))))

Both answers are documents of one row and share their pictures; see ``Encoded.parts``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinymodal.core.types import Batch

# Shapes: N positions that train, D documents, P pairs.

Reference = Callable[[Batch], Tensor]
"""Batch -> float32 [N], the log-probability of each target before the stage; without gradients."""


class Preferred(NamedTuple):
    """What a model makes of some pairs, summed over them."""

    loss: Tensor
    """float32 [], with its graph"""
    right: Tensor
    """float32 []: pairs whose chosen answer has gained more than the rejected one."""
    margin: Tensor
    """float32 []: by how much, times beta."""


def of_documents(log_probs_N: Tensor, document_N: Tensor, num_documents: int) -> Tensor:
    """Log-probability of the answers of each document, float32 [D]."""
    sums_D = log_probs_N.new_zeros(num_documents)
    return sums_D.index_add(0, document_N, log_probs_N)


def preferred(policy_D: Tensor, reference_D: Tensor, pairs_P2: Tensor, beta: float) -> Preferred:
    """The loss of some pairs.

    Args:
        policy_D: log-probabilities of documents under the model.
        reference_D: the same before the stage.
        pairs_P2: int64 [P, 2], the documents of the chosen and of the rejected answer.
        beta: the smaller, the further the model may go.
    """
    gained_P2 = (policy_D - reference_D)[pairs_P2]
    margin_P = beta * (gained_P2[:, 0] - gained_P2[:, 1])
    with torch.no_grad():
        right = (margin_P > 0).float().sum()
        margin = margin_P.sum()
    return Preferred(-F.logsigmoid(margin_P).sum(), right, margin)
