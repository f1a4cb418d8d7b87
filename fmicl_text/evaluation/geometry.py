"""How close positive pairs lie and how evenly embeddings spread over the sphere (Wang & Isola 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmicl_text.similarity import unit_rows

BLOCK = 256  # rows whose distances to all the others are held at once


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance of positive pairs on the unit sphere: mean_i ||x_i - y_i||^2.

    L_align with exponent 2 of Wang & Isola (2020, arXiv 2005.10242); 0 where every pair coincides.

    Args:
        x: Embeddings of any length other than 0, [N, D], N >= 1.
        y: Embeddings of their partners, [N, D].

    Returns:
        A scalar in [0, 4], float32 (float64 for float64 inputs).
    """
    if x.ndim != 2 or x.shape != y.shape or len(x) == 0:
        raise ValueError(f"x and y must both be [N, D] with N >= 1, got {list(x.shape)} and {list(y.shape)}")
    return (unit_rows(x) - unit_rows(y)).square().sum(dim=-1).mean()


def uniformity(x: Tensor, t: float = 2.0) -> Tensor:
    """Log of the mean Gaussian potential over pairs i < j on the unit sphere: log mean exp(-t ||x_i - x_j||^2).

    L_uniform of Wang & Isola (2020, arXiv 2005.10242); lower is more evenly spread, 0 is total collapse. Memory is
    O(N) times a fixed number of rows.

    Args:
        x: Embeddings of any length other than 0, [N, D], N >= 2.
        t: Inverse width of the Gaussian.

    Returns:
        A scalar in [-4t, 0], float32 (float64 for float64 inputs).
    """
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"uniformity needs embeddings [N, D] with N >= 2, got {list(x.shape)}")
    x = unit_rows(x)
    num_rows = len(x)
    partial = []
    for start in range(0, num_rows - 1, BLOCK):
        # Distances from differences: 2 - 2cos comes out negative for equal rows, and the result above 0.
        distance = torch.cdist(x[start : start + BLOCK], x[start:], compute_mode="donot_use_mm_for_euclid_dist")
        later = torch.ones_like(distance, dtype=torch.bool).triu(diagonal=1)
        partial.append((-t * distance[later].square()).logsumexp(dim=0))
    return torch.stack(partial).logsumexp(dim=0) - math.log(num_rows * (num_rows - 1) / 2)
