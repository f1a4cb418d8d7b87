"""Synthetic positive pairs with known density, to validate density estimates."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import logsumexp
from scipy.stats import uniform_direction, vonmises_fisher
from torch import Tensor

from fmicl_text.evaluation.density import toward_pole


class KnownPairs(NamedTuple):
    """Pairs x, y [N, k] of unit rows, and log p(x, y) and log p(x, y)/(p(x) p(y)), [N] each, in float64. Densities are
    relative to the uniform distribution."""

    x: Tensor
    y: Tensor
    log_joint: Tensor
    log_ratio: Tensor


def kernel_pairs(num_pairs: int, dims: int = 8, gamma: float = 10.0, seed: int = 0) -> KnownPairs:
    """Pairs that satisfy f-MICL's assumption: x uniform, p(x, y) ~ exp(-gamma ||x - y||^2) (arXiv 2402.10150,
    Assumption 1), so y given x is von Mises-Fisher with concentration 2 gamma."""
    return mixture_pairs(num_pairs, dims, (gamma,), seed)


def two_scale_pairs(
    num_pairs: int, dims: int = 8, gammas: tuple[float, float] = (100.0, 1.0), seed: int = 0
) -> KnownPairs:
    """Half of the pairs close, half distant: the log density depends only on the distance, but is not linear in its
    square."""
    return mixture_pairs(num_pairs, dims, gammas, seed)


def mixture_pairs(num_pairs: int, dims: int, gammas: tuple[float, ...], seed: int) -> KnownPairs:
    """x uniform, y given x an equal mixture of von Mises-Fisher distributions around x with concentrations 2 gamma."""
    random = np.random.default_rng(seed)
    x = uniform_direction(dims, seed=random).rvs(num_pairs)
    pole = np.eye(dims)[0]
    drawn = np.stack([vonmises_fisher(pole, 2 * gamma, seed=random).rvs(num_pairs) for gamma in gammas])
    offset = drawn[random.integers(len(gammas), size=num_pairs), np.arange(num_pairs)]
    y = toward_pole(x, offset)  # the isometry is its own inverse
    cosine = (x * y).sum(-1)
    log_ratio = logsumexp([log_cap(cosine, 2 * gamma, dims) for gamma in gammas], axis=0) - np.log(len(gammas))
    return KnownPairs(*map(torch.from_numpy, (x, y, log_ratio, log_ratio)))


def cluster_pairs(
    num_pairs: int, dims: int = 8, num_clusters: int = 10, concentration: float = 30.0, seed: int = 0
) -> KnownPairs:
    """Pairs are any two points of the same von Mises-Fisher cluster: u is not a function of the distance."""
    random = np.random.default_rng(seed)
    centers = uniform_direction(dims, seed=random).rvs(num_clusters)
    cluster = random.integers(num_clusters, size=num_pairs)
    offsets = vonmises_fisher(np.eye(dims)[0], concentration, seed=random).rvs(2 * num_pairs)
    x, y = toward_pole(np.tile(centers[cluster], (2, 1)), offsets).reshape(2, num_pairs, dims)
    of_x, of_y = (log_cap(side @ centers.T, concentration, dims) for side in (x, y))
    log_joint = logsumexp(of_x + of_y, axis=1) - np.log(num_clusters)
    log_marginals = [logsumexp(side, axis=1) - np.log(num_clusters) for side in (of_x, of_y)]
    return KnownPairs(*map(torch.from_numpy, (x, y, log_joint, log_joint - sum(log_marginals))))


def log_cap(cosine: np.ndarray, concentration: float, dims: int) -> np.ndarray:
    """Log density of von Mises-Fisher relative to the uniform distribution, at given cosines to the mean direction."""
    pole = np.eye(dims)[0]
    at_pole = vonmises_fisher(pole, concentration).logpdf(pole) - uniform_direction_logpdf(dims)
    return at_pole + concentration * (cosine - 1)


def uniform_direction_logpdf(dims: int) -> float:
    """Log density of the uniform distribution on the unit sphere in `dims` dimensions."""
    half = dims / 2
    return float(torch.special.gammaln(torch.tensor(half, dtype=torch.float64)) - np.log(2) - half * np.log(np.pi))


SYNTHETIC: dict[str, Callable[..., KnownPairs]] = {
    "kernel": kernel_pairs,
    "two scales": two_scale_pairs,
    "clusters": cluster_pairs,
}
