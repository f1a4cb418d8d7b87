"""Unit embeddings to similarities: the Gaussian log density ratio r, and cosine for the paper's comparison.

Each comes paired (row i of x with row i of y) and pairwise (every row of x with every row of y).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


def unit_rows(x: Tensor) -> Tensor:
    """Rows of x [N, D] scaled to length 1, in float32 (float64 stays): bfloat16 would put r off by up to 0.05 at
    gamma = 10."""
    return normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def log_ratio(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """r_i = -gamma ||x_i - y_i||^2 of rows x, y [N, D]; [N], <= 0. From the differences, so that views that almost
    coincide keep their digits."""
    return -gamma * (x - y).square().sum(-1)


def pairwise_log_ratio(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """r_ij = -gamma ||x_i - y_j||^2 = 2 gamma (x_i.y_j - 1) of unit rows x [N, D], y [M, D]; [N, M].

    In [-4 gamma, 0], up to rounding of about 2e-7 gamma at identical rows."""
    return 2 * gamma * (x @ y.T - 1)


def cosine(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """x_i.y_i of unit rows x, y [N, D]; [N], in [-1, 1]. gamma plays no part."""
    return (x * y).sum(-1)


def pairwise_cosine(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """x_i.y_j of unit rows x [N, D], y [M, D]; [N, M], in [-1, 1]. gamma plays no part."""
    return x @ y.T


class Similarity(NamedTuple):
    """The two forms of one similarity, each a function of (x, y, gamma)."""

    paired: Callable[[Tensor, Tensor, float], Tensor]
    pairwise: Callable[[Tensor, Tensor, float], Tensor]


SIMILARITIES: dict[str, Similarity] = {
    "gaussian": Similarity(log_ratio, pairwise_log_ratio),
    "cosine": Similarity(cosine, pairwise_cosine),
}
