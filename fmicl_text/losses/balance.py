"""alpha="auto" and gamma="auto" of f-MICL: the weight of the negative term and the kernel width that fit an encoder."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from fmicl_text.losses.divergences import FDivergence
from fmicl_text.losses.similarity import Similarity

AUTO = "auto"
# The largest k gamma, where the conjugate's derivative falls like e^(kr). With alpha="auto" and a small BERT, six
# divergences at 20 score at least as well on STS-B dev as with tuned gamma and alpha; 5, 40 and 80 score worse.
AUTO_GAMMA_TIMES_EXPONENT = 20.0
# The smallest, of encoders that hardly tell positive from negative pairs, such as a ResNet with random weights.
LEAST_GAMMA_TIMES_EXPONENT = 5.0
# Encoders that separate positive pairs little score better below 20. A ResNet with random weights on CIFAR-10, whose
# separation is 4: k-NN 44.6 at 5.3, 43.4 at 8, less at 2 and 20. That of dropout masks, and of crops with MiniLM, is
# above 20.
AUTO_GAMMA_TIMES_SEPARATION = 1.25


def is_auto(value: Any) -> bool:
    """Whether a hyperparameter is "auto"."""
    return isinstance(value, str) and value == AUTO


@dataclass(frozen=True)
class Balance:
    """Attraction and repulsion of a loss at embeddings, which give alpha; one entry per batch, of all processes.

    A constant added to every similarity r changes the loss by -mean score'(r) of positive pairs + alpha mean
    conjugate'(r) of negative pairs, to first order. At `alpha` the two are equal in a typical batch. For `kl` and one
    batch it is 1 / mean e^r, the weight of the Donsker-Varadhan bound; for any f, it is the scale at which u is a
    density ratio. Balances add up:

    >>> total = Balance((1.0,), (0.25,)) + Balance((1.0,), (0.5,)) + Balance((1.0,), (1000.0,))
    >>> total.alpha
    2.0

    Attributes:
        positive: Mean of score'(r) over positive pairs.
        negative: Mean of conjugate'(r) over negative pairs. Batches without negative pairs have no entry.
    """

    positive: tuple[float, ...] = ()
    negative: tuple[float, ...] = ()

    def __add__(self, other: Balance) -> Balance:
        return Balance(self.positive + other.positive, self.negative + other.negative)

    @property
    def log_ratios(self) -> list[float]:
        """log of attraction / repulsion of every batch, sorted; infinite where one of them is 0."""
        log = [
            math.inf if not q else math.log(p / q) if p / q > 0 else -math.inf
            for p, q in zip(self.positive, self.negative, strict=True)
        ]
        return sorted(log)

    @property
    def alpha(self) -> float:
        """The median over batches of attraction / repulsion. The ratio of the means would depend on
        near-duplicates among the negatives: with all-MiniLM-L6-v2, one of 32 batches of Wikipedia sentences reduced it
        from 1e13 to 2e6.

        Raises:
            ValueError: It is not a finite number > 0, or there are no batches.
        """
        if not self.positive:
            raise ValueError("alpha=auto: no batch has a negative pair, from which alpha is measured")
        log_alpha = statistics.median(self.log_ratios)
        alpha = math.exp(log_alpha)
        if not (math.isfinite(alpha) and alpha > 0):
            attraction, repulsion = map(statistics.median, (self.positive, self.negative))
            raise ValueError(
                f"alpha=auto: no finite alpha balances the mean score' {attraction:.4g} of positive pairs and the mean "
                f"conjugate' {repulsion:.4g} of negative pairs: pass a number, or another gamma"
            )
        return alpha

    @property
    def relative_error(self) -> float | None:
        """Standard error of `alpha` divided by it: that of a median, from the order statistics around it; None for one
        batch, and if attraction or repulsion is 0 in such a batch."""
        ratios = self.log_ratios
        lower = math.floor((len(ratios) - math.sqrt(len(ratios))) / 2)
        if len(ratios) < 2 or not (math.isfinite(ratios[lower]) and math.isfinite(ratios[-1 - lower])):
            return None
        return (ratios[-1 - lower] - ratios[lower]) / 2


@dataclass(frozen=True)
class Distances:
    """Squared distances d^2 of pairs of unit embeddings, which give gamma; one entry per batch, of all processes. Of
    similarities other than the Gaussian, -r at gamma 1.

    Attributes:
        positive: Mean over positive pairs.
        negative: Mean over negative pairs. Batches without negative pairs have no entry.
        square: Mean square over negative pairs.
    """

    positive: tuple[float, ...] = ()
    negative: tuple[float, ...] = ()
    square: tuple[float, ...] = ()

    def __add__(self, other: Distances) -> Distances:
        return Distances(self.positive + other.positive, self.negative + other.negative, self.square + other.square)

    @property
    def separation(self) -> float:
        """How far positive pairs are closer than negative ones: the difference of the means, divided by the variance of
        negative pairs. nan without batches.

        To second order, it is the gamma at which E_p[r] - log E_q[e^r] is the largest.
        """
        if not self.positive:
            return math.nan
        positive, negative, square = (sum(each) / len(each) for each in (self.positive, self.negative, self.square))
        difference, variance = negative - positive, max(square - negative**2, 0.0)
        return difference / variance if variance else math.copysign(math.inf, difference)


Measured = TypeVar("Measured", Balance, Distances)


def one_entry(total: Measured) -> Measured:
    """The mean of all entries as one entry: of several calls of the loss on the same batch, which are correlated.

    >>> one_entry(Balance((1.0, 3.0), (0.25, 0.75)))
    Balance(positive=(2.0,), negative=(0.5,))
    """
    values: list[tuple[float, ...]] = [getattr(total, item.name) for item in fields(total)]
    return type(total)(*((sum(each) / len(each),) if each else () for each in values))


def require_tail(argument: str, divergence: FDivergence) -> float:
    """The tail exponent of a divergence.

    Raises:
        ValueError: It is not a finite number > 0. The message names the argument.
    """
    k = divergence.tail_exponent
    if not (math.isfinite(k) and k > 0):
        raise ValueError(
            f"{argument}=auto needs a divergence whose repulsion ends with distance (tail exponent > 0), but that of "
            f"{divergence.name} is {k:g}: pass gamma and alpha (the paper's for text: gamma=20, alpha=409600)"
        )
    return k


def auto_gamma(divergence: FDivergence, similarity: Similarity, separation: float = math.inf) -> float:
    """gamma = 1.25 s / k, where k gamma is at least 5 and at most 20, and s is the `separation` of positive pairs.

    Negative pairs of every divergence then repel by the same kernel e^(-k gamma d^2) of their distance d. For k < 1,
    1.25 s and 5 are not divided by k, because attraction grows like e^((1 - k) gamma d^2).

    Args:
        divergence: f and its functions; k is its tail exponent.
        similarity: If it does not use gamma, any value serves.
        separation: See `Distances`.

    Raises:
        ValueError: k is not a finite number > 0, or the similarity is not a log density ratio.
    """
    if not similarity.uses_gamma:
        return AUTO_GAMMA_TIMES_EXPONENT
    if not similarity.is_log_ratio:
        raise ValueError(
            f"gamma=auto needs a similarity that is a log density ratio; {similarity.name} is not: pass a number"
        )
    k = require_tail("gamma", divergence)
    gamma = max(AUTO_GAMMA_TIMES_SEPARATION * separation, LEAST_GAMMA_TIMES_EXPONENT) / max(k, 1.0)
    return min(gamma, AUTO_GAMMA_TIMES_EXPONENT / k)
