"""How close positive pairs lie, how evenly embeddings spread over the sphere, and whether they have collapsed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fmicl_text.losses.similarity import unit_rows

BLOCK = 256  # rows whose distances to all the others are held at once
POINT, LINE = 0.99, 0.5  # a mean cosine, a share of the variance in one direction: above either, collapsed


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
        # 2 - 2cos of equal rows may be rounded to less than 0, and the result to more.
        squared_distance = (2 - 2 * x[start : start + BLOCK] @ x[start:].T).clamp_min(0)
        later = torch.ones_like(squared_distance, dtype=torch.bool).triu(diagonal=1)
        partial.append((-t * squared_distance[later]).logsumexp(dim=0))
    return torch.stack(partial).logsumexp(dim=0) - math.log(num_rows * (num_rows - 1) / 2)


def direction_shares(x: Tensor, centred: bool = False) -> Tensor:
    """Share of each orthogonal direction in the mean squared length of the unit rows, in falling order.

    The eigenvalues of X^T X / N, whose sum is 1: (1, 0, ...) where all rows are one direction, 1/D each on an even
    sphere. A common mean counts as the direction it is; centred, it is subtracted first, and the shares are those of
    the variance.

    Args:
        x: Embeddings of any length other than 0, [N, D], N >= 1 (centred: 2 rows that differ).
        centred: Subtract the mean of the unit rows.

    Returns:
        [min(N, D)], float64.
    """
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"direction_shares needs embeddings [N, D] with N >= 1, got {list(x.shape)}")
    x = unit_rows(x.double())
    if centred:
        x = x - x.mean(0)
    moment = x.T @ x if len(x) > x.shape[1] else x @ x.T  # they have the same eigenvalues other than 0
    shares = torch.linalg.eigvalsh(moment).flip(0).clamp_min(0)
    return shares / shares.sum()


def effective_rank(shares: Tensor) -> Tensor:
    """Number of directions that embeddings fill: e to the entropy of `direction_shares`, a scalar in [1, D].

    Roy & Vetterli (2007) on the second moment; the Vendi score (arXiv 2210.02410) with cosine as kernel."""
    return torch.special.entr(shares).sum().exp()


def mean_cosine(x: Tensor) -> Tensor:
    """Mean cosine of pairs i != j, a scalar in [-1/(N-1), 1]; 0 where embeddings spread around the origin.

    Args:
        x: Embeddings of any length other than 0, [N, D], N >= 2.
    """
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"mean_cosine needs embeddings [N, D] with N >= 2, got {list(x.shape)}")
    x = unit_rows(x)
    return (x.sum(0).square().sum() - x.square().sum()) / (len(x) * (len(x) - 1))


class PairDistances(NamedTuple):
    """Sorted distances, each [M] in [0, 2]: of partners, and of rows that are none (arXiv 2402.10150, Figure 2)."""

    similar: Tensor
    dissimilar: Tensor


def pair_distances(x: Tensor, y: Tensor) -> PairDistances:
    """Distances on the unit sphere of partners (x_i, y_i), and of (x_i, x_(i+1)) in the order of the rows.

    Args:
        x: Embeddings of any length other than 0, in random order, [N, D], N >= 2.
        y: Their partners, [N, D].
    """
    x, y = unit_rows(x), unit_rows(y)
    return PairDistances((x - y).norm(dim=-1).sort().values, (x - x.roll(1, 0)).norm(dim=-1).sort().values)


def describe_geometry(x: Tensor, y: Tensor) -> dict[str, float]:
    """alignment of the pairs; uniformity, mean_cosine, effective_rank and top_direction (the largest share of the
    variance) of the rows of x; and similar_distance, dissimilar_distance, the medians of `pair_distances`.

    Args:
        x: Embeddings of any length other than 0, in random order, [N, D], N >= 2.
        y: Their partners, [N, D].
    """
    distances = pair_distances(x, y)
    values = {
        "alignment": alignment(x, y),
        "uniformity": uniformity(x),
        "mean_cosine": mean_cosine(x),
        "effective_rank": effective_rank(direction_shares(x)),
        "top_direction": direction_shares(x, centred=True)[0],
        "similar_distance": distances.similar.median(),
        "dissimilar_distance": distances.dissimilar.median(),
    }
    return {name: float(value) for name, value in values.items()}


def is_collapsed(metrics: dict[str, float], width: int) -> bool:
    """Whether embeddings have collapsed to about a point (mean cosine above 0.99; before contrastive training many a
    language model is no better) or to a line, such as two opposite poles (half of the variance in one direction).

    Args:
        metrics: What `describe_geometry` gave.
        width: Number of directions D.
    """
    return metrics["mean_cosine"] > POINT or metrics["top_direction"] > max(LINE, 2 / width)
