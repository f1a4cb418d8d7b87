"""Geometry of embeddings on the unit sphere: alignment, uniformity, effective rank and collapse."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fmicl_text.losses.similarity import unit_rows

BLOCK = 256  # rows per block of pairwise distances
COLLAPSED_COSINE, COLLAPSED_VARIANCE = 0.99, 0.5  # mean cosine; share of the variance in one direction


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance of positive pairs on the unit sphere: mean_i ||x_i - y_i||^2.

    L_align with exponent 2 of Wang & Isola (2020, arXiv 2005.10242). Lower is closer; 0 if all pairs coincide.

    Args:
        x: Embeddings of nonzero norm, [N, D], N >= 1.
        y: Their positives, [N, D].

    Returns:
        A scalar in [0, 4], float32 (float64 for float64 inputs).
    """
    if x.ndim != 2 or x.shape != y.shape or len(x) == 0:
        raise ValueError(f"x and y must both be [N, D] with N >= 1, got {list(x.shape)} and {list(y.shape)}")
    return (unit_rows(x) - unit_rows(y)).square().sum(dim=-1).mean()


def uniformity(x: Tensor, t: float = 2.0) -> Tensor:
    """Log of the mean Gaussian potential over pairs i < j on the unit sphere: log mean exp(-t ||x_i - x_j||^2).

    L_uniform of Wang & Isola (2020, arXiv 2005.10242). Lower is more evenly spread; 0 is complete collapse. Memory
    grows linearly with N.

    Args:
        x: Embeddings of nonzero norm, [N, D], N >= 2.
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
        # Rounding can make 2 - 2 cos of equal rows negative, and the result positive.
        squared_distance = (2 - 2 * x[start : start + BLOCK] @ x[start:].T).clamp_min(0)
        later = torch.ones_like(squared_distance, dtype=torch.bool).triu(diagonal=1)
        partial.append((-t * squared_distance[later]).logsumexp(dim=0))
    return torch.stack(partial).logsumexp(dim=0) - math.log(num_rows * (num_rows - 1) / 2)


def direction_shares(x: Tensor, centered: bool = False) -> Tensor:
    """Share of the second moment of the unit rows along each principal direction, in descending order.

    These are the eigenvalues of X^T X / N, which sum to 1: (1, 0, ...) if all rows have the same direction, 1/D
    each if they are uniform on the sphere. The mean is not subtracted first, unless `centered`; then these are shares
    of the variance.

    Args:
        x: Embeddings of nonzero norm, [N, D], N >= 1. With `centered`, at least two directions must differ.
        centered: Subtract the mean of the unit rows.

    Returns:
        Shares [min(N, D)], float64.
    """
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"direction_shares needs embeddings [N, D] with N >= 1, got {list(x.shape)}")
    x = unit_rows(x.double())
    if centered:
        x = x - x.mean(0)
    moment = x.T @ x if len(x) > x.shape[1] else x @ x.T  # both have the same nonzero eigenvalues
    shares = torch.linalg.eigvalsh(moment).flip(0).clamp_min(0)
    return shares / shares.sum()


def effective_rank(shares: Tensor) -> Tensor:
    """Effective number of dimensions that embeddings use: exp of the entropy of `direction_shares`, a scalar in [1, D].

    Roy & Vetterli (2007), applied to the second moment; equals the Vendi score (arXiv 2210.02410) with a cosine kernel.
    """
    return torch.special.entr(shares).sum().exp()


def mean_cosine(x: Tensor) -> Tensor:
    """Mean cosine of pairs i != j, a scalar in [-1/(N-1), 1]; about 0 if the mean of the unit rows is the origin.

    Args:
        x: Embeddings of nonzero norm, [N, D], N >= 2.
    """
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"mean_cosine needs embeddings [N, D] with N >= 2, got {list(x.shape)}")
    x = unit_rows(x)
    return (x.sum(0).square().sum() - x.square().sum()) / (len(x) * (len(x) - 1))


class PairDistances(NamedTuple):
    """Sorted distances [N] in [0, 2] of positive pairs and of other pairs (arXiv 2402.10150, Figure 2)."""

    similar: Tensor
    dissimilar: Tensor


def pair_distances(x: Tensor, y: Tensor) -> PairDistances:
    """Distances on the unit sphere of similar pairs (x_i, y_i) and of dissimilar pairs (x_i, x_(i-1)).

    Args:
        x: Embeddings of nonzero norm in random order, [N, D], N >= 2.
        y: Their positives, [N, D].
    """
    x, y = unit_rows(x), unit_rows(y)
    return PairDistances((x - y).norm(dim=-1).sort().values, (x - x.roll(1, 0)).norm(dim=-1).sort().values)


def describe_geometry(x: Tensor, y: Tensor) -> dict[str, float]:
    """All metrics of this module.

    Args:
        x: Embeddings of nonzero norm in random order, [N, D], N >= 2.
        y: Their positives, [N, D].

    Returns:
        alignment of the pairs; uniformity, mean_cosine, effective_rank and top_direction (variance explained by the
        first principal component) of x; similar_distance and dissimilar_distance (medians of `pair_distances`).
    """
    distances = pair_distances(x, y)
    values = {
        "alignment": alignment(x, y),
        "uniformity": uniformity(x),
        "mean_cosine": mean_cosine(x),
        "effective_rank": effective_rank(direction_shares(x)),
        "top_direction": direction_shares(x, centered=True)[0],
        "similar_distance": distances.similar.median(),
        "dissimilar_distance": distances.dissimilar.median(),
    }
    return {name: float(value) for name, value in values.items()}


def is_collapsed(metrics: dict[str, float], width: int) -> bool:
    """Whether embeddings have collapsed to a point (mean cosine above 0.99, as in many language models before
    contrastive training) or to a line, for example to two opposite points (over half of the variance in one direction).

    Args:
        metrics: Metrics of `describe_geometry`.
        width: Embedding dimension D.
    """
    return metrics["mean_cosine"] > COLLAPSED_COSINE or metrics["top_direction"] > max(COLLAPSED_VARIANCE, 2 / width)
