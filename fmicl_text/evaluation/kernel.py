"""Whether positive pairs follow the Gaussian kernel that f-MICL assumes, and what it costs where they do not.

f-MICL (arXiv 2402.10150) replaces the unknown ratio u = p(x, y)/(p(x) p(y)) of the optimal similarity f'(u) by
mu e^(-gamma ||x - y||^2). The paper looks at log p(x, y) of positive pairs against the squared distance: linear, if so.
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
    """A least-squares line of a log density on the squared distance, and the bins of equal count it is shown by.

    gamma is minus its slope; r2_pairs and r2_bins the share of variance it explains of the pairs and of the bins'
    means; distance, mean, deviation [bins] describe each bin."""

    gamma: float
    intercept: float
    r2_pairs: float
    r2_bins: float
    distance: list[float]
    mean: list[float]
    deviation: list[float]


def linear_fit(squared_distance: Tensor, log_density: Tensor, bins: int = 20) -> LinearFit:
    """The line through pairs (squared_distance, log_density), [N] each, N >= 2 * bins; on the Gaussian kernel R^2 is 1.

    Bins hold equally many pairs: of equal width, the outer ones would hold a handful."""
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
    """How far the f-Gaussian similarity f'(mu e^(-gamma d^2)) of positive pairs is from the optimal one, f'(u): the
    root mean square of their difference, in standard deviations of the optimal one; 0 on the Gaussian kernel.

    mu and gamma are those of the line of log u on d^2, so for `kl`, whose score is log u itself, it is sqrt(1 - R^2).

    Args:
        divergence: Whose f.
        squared_distance: d^2 of positive pairs, [N].
        log_ratio: Their log u, [N].
    """
    line = linear_fit(squared_distance, log_ratio)
    optimal = divergence.score(log_ratio)
    gaussian = divergence.score(line.intercept - line.gamma * squared_distance)
    return ((gaussian - optimal).square().mean().sqrt() / optimal.std(correction=0)).item()


def project(x: Tensor, y: Tensor, dims: int) -> tuple[Tensor, Tensor, float]:
    """Unit rows of both sides on their first `dims` directions, unit rows again, and the share of the second moment
    that those directions hold; unchanged (share 1) where D <= dims."""
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
    """How nearly positive pairs follow the Gaussian kernel: arXiv 2402.10150, Figures 1 and 7, in numbers.

    The flow is fitted on 60 % of the pairs, stopped on 20 %; all that is returned is of the remaining 20 %.

    Args:
        x: Embeddings of any length other than 0, [N, D], N >= 200.
        y: Their partners [N, D]; a row should not occur in two pairs, one of which is held out.
        divergences: Those whose similarity is compared with the optimal one.
        dims: Directions kept, at least 3: a density in hundreds of dimensions cannot be had from thousands of pairs.
        seed: Of the split and the flow.

    Returns:
        num_pairs (that differ), dims, kept (share of the second moment), joint and ratio (`LinearFit` of
        log p(x, y) and of log u, as dicts), distances ({divergence: `similarity_distance`}).

    Raises:
        ValueError: Shapes. InputError: Too few pairs, embeddings that are not finite, or zuko is not installed.
    """
    if x.ndim != 2 or x.shape != y.shape or x.shape[1] < 3 or dims < 3:
        shapes = f"{list(x.shape)} and {list(y.shape)}, dims {dims}"
        raise ValueError(f"x and y must both be [N, D] with D >= 3, and dims at least 3, got {shapes}")
    lengths = torch.cat([x, y]).norm(dim=-1)
    if num_bad := int((~((lengths > 0) & lengths.isfinite())).sum()):
        raise InputError(f"{num_bad} of {2 * len(x)} embeddings hold NaN, infinity or only 0")
    apart = (unit_rows(x) - unit_rows(y)).norm(dim=-1) > ROUNDING  # sentences of the same tokens have no density
    x, y = x[apart], y[apart]
    if len(x) < MIN_PAIRS:
        raise InputError(f"{len(x)} pairs that differ are too few to estimate a density, {MIN_PAIRS} are needed")
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
