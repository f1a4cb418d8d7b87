"""Contrastive objectives as functions of similarities. All have one signature and return two terms; the loss to
minimise is their sum.

    positive [N]       similarity of example i to its positive
    negative [N, M]    similarity of example i to each of M candidates
    keep     [N, M]    bool, which candidates are negatives of i (at least one)

Similarities are log density ratios r = -gamma ||x - y||^2; with `fmicl` they may be anything its `score` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """What pulls positives together and what pushes negatives apart; scalars."""

    positive: Tensor
    negative: Tensor


def kept_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean of values where keep is True; both [N, M]. No indexing by the mask, which would wait for the GPU."""
    return torch.where(keep, values, 0).sum() / keep.sum()


def fmicl(
    positive: Tensor,
    negative: Tensor,
    keep: Tensor,
    *,
    score: Callable[[Tensor], Tensor],
    conjugate: Callable[[Tensor], Tensor],
    alpha: float,
) -> Terms:
    """-mean score(positive) + alpha mean conjugate(negative): arXiv 2402.10150, the f-MICL objective.

    With f = KL (score r, conjugate e^r - 1), positive r = -1 and one negative r = -2 for either of two examples:

    >>> r = torch.tensor([-1.0, -1.0]), torch.tensor([[0.0, -2.0], [-2.0, 0.0]])
    >>> keep = torch.tensor([[False, True], [True, False]])
    >>> fmicl(*r, keep, score=lambda r: r, conjugate=torch.expm1, alpha=10.0)
    Terms(positive=tensor(1.), negative=tensor(-8.6466))
    """
    return Terms(-score(positive).mean(), alpha * kept_mean(conjugate(negative), keep))


def infonce(positive: Tensor, negative: Tensor, keep: Tensor) -> Terms:
    """-mean_i r_i + mean_i log(e^{r_i} + sum_j e^{r_ij}), InfoNCE / NT-Xent (arXiv 1807.03748, 2002.05709).

    On the sphere r = 2 gamma (cos - 1), so this is the usual loss on cosines with temperature 1/(2 gamma)."""
    logits = torch.cat([positive[:, None], negative.masked_fill(~keep, -torch.inf)], dim=1)
    return Terms(-positive.mean(), logits.logsumexp(1).mean())


def align_uniform(positive: Tensor, negative: Tensor, keep: Tensor, *, gamma: float, alpha: float) -> Terms:
    """mean ||x - y||^2 + alpha log mean e^{-gamma ||x_i - x_j||^2}, Wang & Isola (arXiv 2005.10242).

    With alpha = 1/gamma it is gamma times smaller than KL's Donsker-Varadhan bound, sign reversed."""
    log_mean = negative.masked_fill(~keep, -torch.inf).flatten().logsumexp(0) - keep.sum().to(negative.dtype).log()
    return Terms(-positive.mean() / gamma, alpha * log_mean)


def spectral(positive: Tensor, negative: Tensor, keep: Tensor, *, alpha: float) -> Terms:
    """-2 mean x.y + alpha mean (x_i.x_j)^2, the spectral contrastive loss (arXiv 2106.04156) on the unit sphere.

    Takes r at gamma = 1/2, where x.y = 1 + r."""
    return Terms(-2 * (1 + positive).mean(), alpha * kept_mean((1 + negative).square(), keep))
