"""K-means, for codebooks."""

# Shapes: S vectors of E numbers, K centres.

from __future__ import annotations

import torch
from torch import Tensor


def nearest(features_SE: Tensor, centres_KE: Tensor) -> Tensor:
    """The nearest centre of each feature, int64 [S]."""
    # The square of the feature itself is the same for all centres.
    return (centres_KE.square().sum(1) - 2 * features_SE @ centres_KE.T).argmin(1)


def kmeans(features_SE: Tensor, num: int, seed: int = 0, rounds: int = 30) -> Tensor:
    """Centres [num, E] by Lloyd's algorithm, begun with features drawn at random.

    A centre that nothing is nearest to moves to the feature that is farthest from its own.

    Raises:
        ValueError: there are fewer features than centres.
    """
    if len(features_SE) < num:
        raise ValueError(f"{num} centres need at least as many vectors, got {len(features_SE)}; take more")
    order = torch.randperm(len(features_SE), generator=torch.Generator().manual_seed(seed))
    centres = features_SE[order[:num].to(features_SE.device)].clone()
    for _ in range(rounds):
        own = nearest(features_SE, centres)
        counts = torch.bincount(own, minlength=num)
        sums = torch.zeros_like(centres).index_add_(0, own, features_SE)
        far = (features_SE - centres[own]).square().sum(1)
        centres = sums / counts.clamp_min(1)[:, None]
        empty = counts == 0
        if bool(empty.any()):
            centres[empty] = features_SE[far.topk(int(empty.sum())).indices]
    return centres
