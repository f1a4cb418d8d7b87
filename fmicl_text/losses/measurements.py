"""Measurements at a batch, in float64 and without gradient: the `Balance` of f-MICL, the `Distances` of the pairs, the
mutual information of the two views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from fmicl_text.losses.balance import Balance, Distances
from fmicl_text.losses.distributed import world_size
from fmicl_text.losses.divergences import FDivergence, derivative, log_ratio_of_score
from fmicl_text.losses.objectives import Objective, PairObjective
from fmicl_text.losses.pairs import Batch, LossTerms, PairSettings, terms_of

UNDERFLOW = -1.0  # stands for a mean of 0 over pairs that exist; without pairs, the negative term is 0


@torch.no_grad()
def terms_in_float64(objective: Objective, settings: PairSettings, batch: Batch) -> LossTerms:
    """The terms of an objective on the pairs of a batch, in float64."""
    device = torch.device("cpu") if batch.x.device.type == "mps" else batch.x.device  # which has no float64
    x, y = (rows.detach().to(device, torch.float64) for rows in (batch.x, batch.y))
    hard_negatives, queue = (
        None if rows is None else rows.detach().to(device, torch.float64)
        for rows in (batch.hard_negatives, batch.queue)
    )
    text_ids = None if batch.text_ids is None else batch.text_ids.to(device)
    return terms_of(objective, settings, Batch(x, y, hard_negatives, text_ids, queue))


def means_of_pairs(
    positive: Callable[[Tensor], Tensor], negative: Callable[[Tensor], Tensor], settings: PairSettings, batch: Batch
) -> tuple[float, float] | None:
    """Means of two functions of the similarities of positive and of negative pairs, the latter >= 0, over the batches
    of all processes; None without negative pairs."""
    objective = PairObjective(positive, negative, lambda mean: mean.where(mean != 0, UNDERFLOW))
    found = terms_in_float64(objective, settings, batch)
    has_pairs, second = found.negative != 0, found.negative.clamp_min(0)
    sums = torch.stack([-found.positive, second, torch.ones_like(second)]).where(has_pairs, 0)
    if settings.global_batch == "none" and world_size() > 1:
        dist.all_reduce(sums)
    first_sum, second_sum, count = sums.tolist()
    return (first_sum / count, second_sum / count) if count else None


def balance_at(divergence: FDivergence, settings: PairSettings, batch: Batch) -> Balance:
    """The `Balance` of f-MICL."""
    score, conjugate = settings.similarity.score_and_conjugate(divergence)
    slope = derivative(conjugate)
    means = means_of_pairs(
        derivative(score), lambda r: slope(r).masked_fill(conjugate(r).isinf(), torch.inf), settings, batch
    )
    return Balance((means[0],), (means[1],)) if means else Balance()


def distances_at(settings: PairSettings, batch: Batch) -> Distances:
    """The `Distances` of the pairs."""
    settings = replace(settings, gamma=1.0)
    means = means_of_pairs(torch.neg, torch.neg, settings, batch)
    squares = means_of_pairs(torch.neg, torch.square, settings, batch)
    return Distances((means[0],), (means[1],), (squares[1],)) if means and squares else Distances()


def information_at(divergence: FDivergence, settings: PairSettings, batch: Batch) -> Tensor:
    """A lower bound of the mutual information of the two views in nats: E_p[r] - log E_q[e^r] (Donsker and Varadhan),
    over positive and over negative pairs; nan without negative pairs.

    At the optimum of f-MICL, alpha e^r is the density ratio for every f, and this is the mutual information. It is the
    largest over c of the bounds E_p[r + log c] - c E_q[e^r] + 1 of Nguyen, Wainwright and Jordan (arXiv 0809.0853).
    That of c = alpha is far below if the tail exponent k is above 1: alpha is the weight of e^(kr).
    """

    def log_density_ratio(similarities: Tensor) -> Tensor:
        if settings.similarity.is_log_ratio:
            return similarities
        return log_ratio_of_score(divergence, similarities)[0] + 0 * similarities

    tiny = torch.finfo(torch.float64).tiny  # 0 is left for batches without negative pairs
    objective = PairObjective(
        log_density_ratio, lambda r: log_density_ratio(r).exp(), lambda mean: mean.clamp_min(tiny)
    )
    found = terms_in_float64(objective, settings, batch)
    return (-found.positive - found.negative.log()).where(found.negative != 0, torch.nan)
