"""Test whether positive pairs follow the Gaussian kernel that f-MICL assumes.

The optimal similarity is f'(u) of the unknown ratio u = p(x, y)/(p(x) p(y)). f-MICL (arXiv 2402.10150) assumes
u = mu e^(-gamma ||x - y||^2). Like the paper, this module tests it by regression: under the assumption, log p(x, y) of
positive pairs is linear in the squared distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmicl_text.errors import InputError
from fmicl_text.evaluation.density import ROUNDING, fit_density
from fmicl_text.losses.divergences import FDivergence
from fmicl_text.losses.similarity import unit_rows

MIN_PAIRS = 200


class LinearFit(NamedTuple):
    """Least-squares line of a log density against the squared distance.

    gamma is the negated slope. r2_pairs and r2_bins are the explained variance over pairs and over means of bins.
    distance, mean and deviation describe the bins, [bins] each: mean squared distance, and mean and standard deviation
    of the log density."""

    gamma: float
    intercept: float
    r2_pairs: float
    r2_bins: float
    distance: list[float]
    mean: list[float]
    deviation: list[float]


def linear_fit(squared_distance: Tensor, log_density: Tensor, bins: int = 20) -> LinearFit:
    """Fit log_density [N] linearly to squared_distance [N], N >= 2 * bins. For an exact Gaussian kernel R^2 is 1.

    Bins have equal counts; with equal widths, the outer bins would contain only a few pairs."""
    d, v = squared_distance.double(), log_density.double()
    slope = ((d - d.mean()) * (v - v.mean())).sum() / (d - d.mean()).square().sum()
    intercept = v.mean() - slope * d.mean()
    parts = d.argsort().tensor_split(bins)
    distance, mean, deviation = (
        torch.stack([statistic(values[part]) for part in parts])
        for values, statistic in ((d, torch.mean), (v, torch.mean), (v, partial(torch.std, correction=0)))
    )

    def explained(d: Tensor, v: Tensor) -> float:
        return (1 - (v - intercept - slope * d).square().sum() / (v - v.mean()).square().sum()).item()

    return LinearFit(
        (-slope).item(),
        intercept.item(),
        explained(d, v),
        explained(distance, mean),
        distance.tolist(),
        mean.tolist(),
        deviation.tolist(),
    )


def similarity_distance(divergence: FDivergence, squared_distance: Tensor, log_ratio: Tensor) -> float:
    """Distance of the f-Gaussian similarity f'(mu e^(-gamma d^2)) of positive pairs from the optimal one, f'(u).

    It is the root mean square of the difference, in standard deviations of f'(u), and 0 for an exact Gaussian kernel.
    mu and gamma are fitted to log u. For `kl`, whose score is log u itself, the distance is therefore sqrt(1 - R^2).

    Args:
        divergence: The divergence with generator f.
        squared_distance: d^2 of positive pairs, [N].
        log_ratio: log u of these pairs, [N].
    """
    line = linear_fit(squared_distance, log_ratio)
    optimal = divergence.score(log_ratio)
    gaussian = divergence.score(line.intercept - line.gamma * squared_distance)
    return ((gaussian - optimal).square().mean().sqrt() / optimal.std(correction=0)).item()


def project(x: Tensor, y: Tensor, dims: int) -> tuple[Tensor, Tensor, float]:
    """Project x and y [N, D] onto their first `dims` principal directions.

    Returns:
        Unit rows of both [N, dims], and the share of the second moment in these directions; if D <= dims, the unit rows
        of x and y, and 1.
    """
    x, y = unit_rows(x.double()), unit_rows(y.double())
    if x.shape[1] <= dims:
        return x, y, 1.0
    both = torch.cat([x, y])
    shares, directions = torch.linalg.eigh(both.T @ both / len(both))
    kept = directions[:, -dims:].flip(1)
    return unit_rows(x @ kept), unit_rows(y @ kept), shares[-dims:].sum().item()


def check_kernel(
    x: Tensor, y: Tensor, divergences: Sequence[FDivergence], dims: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Measure how well positive pairs follow the Gaussian kernel (arXiv 2402.10150, Figures 1 and 7).

    The flow is trained on 60% of the pairs and stopped early on 20%. All results are for the remaining 20%.

    Args:
        x: Embeddings of nonzero norm, [N, D], N >= 200.
        y: Their positives, [N, D]. No row should occur in several pairs, which could fall into different parts.
        divergences: Divergences whose similarity is compared with the optimal one.
        dims: Principal directions kept, at least 3. A density in hundreds of dimensions cannot be estimated from
            thousands of pairs.
        seed: Seed of the split and the flow.

    Returns:
        num_pairs (that do not coincide), dims, kept (share of the second moment), joint and ratio (`LinearFit` of
        log p(x, y) and of log u, as dicts), distances (`similarity_distance` by divergence).

    Raises:
        ValueError: Wrong shapes.
        InputError: Too few pairs, embeddings that are zero or not finite, or zuko is not installed.
    """
    if x.ndim != 2 or x.shape != y.shape or x.shape[1] < 3 or dims < 3:
        shapes = f"{list(x.shape)} and {list(y.shape)}, dims {dims}"
        raise ValueError(f"x and y must both be [N, D] with D >= 3, and dims >= 3, got {shapes}")
    lengths = torch.cat([x, y]).norm(dim=-1)
    if num_bad := int((~((lengths > 0) & lengths.isfinite())).sum()):
        raise InputError(f"{num_bad} of {2 * len(x)} embeddings contain NaN, infinity or only zeros")
    apart = (unit_rows(x) - unit_rows(y)).norm(dim=-1) > ROUNDING  # coinciding pairs have no density
    x, y = x[apart], y[apart]
    if len(x) < MIN_PAIRS:
        needed = f"at least {MIN_PAIRS} that do not coincide are needed"
        raise InputError(f"{len(x)} pairs are too few for density estimation; {needed}")
    x, y, kept = project(x, y, dims)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    (fit_x, stop_x, test_x), (fit_y, stop_y, test_y) = (
        side[order].tensor_split([int(0.6 * len(x)), int(0.8 * len(x))]) for side in (x, y)
    )
    density = fit_density(fit_x, fit_y, stop_x, stop_y, seed)
    squared_distance = (test_x - test_y).square().sum(-1)
    log_ratio = density.log_ratio(test_x, test_y)
    return {
        "num_pairs": len(x),
        "dims": x.shape[1],
        "kept": kept,
        "joint": linear_fit(squared_distance, density.log_joint(test_x, test_y))._asdict(),
        "ratio": linear_fit(squared_distance, log_ratio)._asdict(),
        "distances": {
            divergence.name: similarity_distance(divergence, squared_distance, log_ratio) for divergence in divergences
        },
    }
