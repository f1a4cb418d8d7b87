"""Contrastive objectives: functions of similarities that return two terms, whose sum is the loss to minimize. `infonce`
is such a function; the others return one, a `PairObjective`, for given hyperparameters.

    positive [N]       similarity of example i to its positive
    negative [N, M]    similarity of example i to each of M candidates
    keep     [N, M]    bool, which candidates are negatives of i; there may be none at all

Similarities are log density ratios r = -gamma ||x - y||^2; with `fmicl`, any values that `score` and `conjugate`
accept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_ALPHA = 1e30  # with the conjugate in float32


class Terms(NamedTuple):
    """The attractive term, of positive pairs, and the repulsive term, of negative pairs; scalars."""

    positive: Tensor
    negative: Tensor


Objective = Callable[[Tensor, Tensor, Tensor], Terms]  # of positive, negative and keep


@dataclass(frozen=True)
class PairObjective:
    """-mean score(positive) + outer(mean pair(negative)).

    Pairs interact through one mean only, so the sum can be split over blocks, micro-batches and processes
    (`blockwise`). InfoNCE, with a log-sum-exp per row, has no such form. Without negative pairs, the negative term
    is 0.

    Attributes:
        score: Elementwise function of the similarities of positive pairs.
        pair: Elementwise function of the similarities of negative pairs.
        outer: Function of the mean of `pair`, a scalar.
    """

    score: Callable[[Tensor], Tensor]
    pair: Callable[[Tensor], Tensor]
    outer: Callable[[Tensor], Tensor]

    def __call__(self, positive: Tensor, negative: Tensor, keep: Tensor) -> Terms:
        # Neither indexing by the mask nor a condition, which would synchronize the GPU.
        count = keep.sum()
        mean = torch.where(keep, self.pair(negative), 0).sum() / count.clamp_min(1)
        outer = self.outer(torch.where(count > 0, mean, 1))
        return Terms(-self.score(positive).mean(), torch.where(count > 0, outer, 0))


def fmicl(*, score: Callable[[Tensor], Tensor], conjugate: Callable[[Tensor], Tensor], alpha: float) -> PairObjective:
    """-mean score(positive) + alpha mean conjugate(negative): arXiv 2402.10150, the f-MICL objective.

    With f = KL (score r, conjugate e^r), and for each of two examples positive r = -1 and one negative r = -2:

    >>> r = torch.tensor([-1.0, -1.0]), torch.tensor([[0.0, -2.0], [-2.0, 0.0]])
    >>> keep = torch.tensor([[False, True], [True, False]])
    >>> fmicl(score=lambda r: r, conjugate=torch.exp, alpha=10.0)(*r, keep)
    Terms(positive=tensor(1.), negative=tensor(1.3534))
    """
    if alpha <= LARGEST_ALPHA:
        return PairObjective(score, conjugate, lambda mean: alpha * mean)
    # Conjugates that such an alpha brings to a size that counts are below float32's 1e-38.
    return PairObjective(score, lambda r: (alpha * conjugate(r.double())).to(r.dtype), lambda mean: mean)


def align_uniform(*, gamma: float, alpha: float) -> PairObjective:
    """mean ||x - y||^2 + alpha log mean e^{-gamma ||x_i - x_j||^2}, Wang & Isola (arXiv 2005.10242).

    With alpha = 1/gamma it equals the negated Donsker-Varadhan bound of KL, divided by gamma.
    The exponent is shifted to 2 gamma x_i.x_j, which is near 0 for well-spread embeddings: for gamma > 22, r alone may
    be below -87, where e^r underflows in float32. The shift is at most 60, because otherwise the sum over 10^9
    coinciding pairs would overflow.
    """
    shift = min(2 * gamma, 60.0)
    return PairObjective(lambda r: r / gamma, lambda r: torch.exp(r + shift), lambda mean: alpha * (mean.log() - shift))


def spectral(*, alpha: float) -> PairObjective:
    """-2 mean x.y + alpha mean (x_i.x_j)^2, the spectral contrastive loss (arXiv 2106.04156) on the unit sphere.

    Expects r at gamma = 1/2, where x.y = 1 + r."""
    return PairObjective(lambda r: 2 * (1 + r), lambda r: (1 + r).square(), lambda mean: alpha * mean)


def infonce_bound(positive: Tensor, negative: Tensor, keep: Tensor) -> Terms:
    """InfoNCE minus the log of the number of candidates of a row: the negated lower bound of the mutual information."""
    terms = infonce(positive, negative, keep)
    return Terms(terms.positive, terms.negative - (1 + keep.sum(1)).to(negative.dtype).log().mean())


def infonce(positive: Tensor, negative: Tensor, keep: Tensor) -> Terms:
    """-mean_i r_i + mean_i log(e^{r_i} + sum_j e^{r_ij}), InfoNCE / NT-Xent (arXiv 1807.03748, 2002.05709).

    On the sphere r = 2 gamma (cos - 1), so this is the usual loss of cosines with temperature 1/(2 gamma)."""
    logits = torch.cat([positive[:, None], negative.masked_fill(~keep, -torch.inf)], dim=1)
    return Terms(-positive.mean(), logits.logsumexp(1).mean())
