"""f-divergences as functions of r = log u, the log density ratio.

Training never forms u. What it needs of a convex f are two functions of r:

    score(r)     = f'(e^r)                            the f-Gaussian similarity, seen by positive pairs
    conjugate(r) = (f* o f')(e^r) = u f'(u) - f(u)    seen by negative pairs

Every f here is normalized to f(1) = f'(1) = 0. Adding c(u - 1) to f adds c to both functions, so normalizing changes
the objective of the paper by a constant only; with it a collapsed batch (all r = 0) has loss 0, but for
`vlc_as_printed`.

On the unit sphere r lies in [-4 gamma, 0]. The conjugate stays bounded there for all but `jeffrey`, `rkl` (linear in
r) and `neyman` (exponential); the score of `sh`, `jeffrey`, `rkl` and `neyman` grows exponentially in -r.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CURVATURE_TOLERANCE = 1e-9


class ExpM1(torch.autograd.Function):
    """See `expm1`."""

    @staticmethod
    def forward(r: Tensor) -> Tensor:
        return torch.expm1(r)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        # e^r as a square: torch.exp takes 100 times as long on a CPU where its result is below float32's normal range
        half = r * 0.5
        if torch.is_grad_enabled():  # to be differentiated again
            return gradient * half.exp().square()
        return half.exp_().square_().mul_(gradient)


def expm1(r: Tensor) -> Tensor:
    """e^r - 1, with value and gradient right to rounding over all r.

    torch.expm1 alone has the gradient (e^r - 1) + 1, which float32 rounds to multiples of 6e-8: off by 1.6 %
    near r = -13, where the paper's alpha = 409600 balances attraction and repulsion, and 0 below r = -17.
    """
    return ExpM1.apply(r)


@dataclass(frozen=True)
class FDivergence:
    """A convex f with f(1) = f'(1) = 0, and what f-MICL (arXiv 2402.10150, Table 1) needs of it.

    Attributes:
        name: What users type.
        f: u -> f(u), u > 0. Tests and plots call it, training does not.
        score: r -> f'(e^r), increasing in r.
        conjugate: r -> (f* o f')(e^r), increasing in r.

    Each function takes a tensor and returns one of the same shape and dtype.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    score: Callable[[Tensor], Tensor]
    conjugate: Callable[[Tensor], Tensor]

    @classmethod
    def from_convex(cls, f: Callable[[Tensor], Tensor], name: str = "custom") -> FDivergence:
        """The record of any convex, differentiable f: (0, inf) -> R, by autograd in float64.

        >>> chi2 = FDivergence.from_convex(lambda u: u**2, name="chi2")   # Pearson's, up to normalization
        >>> chi2.score(torch.tensor([0.0])), chi2.conjugate(torch.tensor([0.0]))
        (tensor([0.]), tensor([0.]))

        Args:
            f: Elementwise function of a tensor u > 0, written with torch operations. It need not be normalized.
            name: Used in messages and model cards.

        Raises:
            ValueError: f' decreases, or is not finite, somewhere on u in [e^-8, e^2].
        """

        def slope(u: Tensor) -> Tensor:
            return torch.func.grad(lambda v: f(v).sum())(u)

        one = torch.ones((), dtype=torch.float64)
        value_at_one, slope_at_one = f(one), slope(one)

        def normalized(u: Tensor) -> Tensor:
            return f(u) - value_at_one.to(u) - slope_at_one.to(u) * (u - 1)

        def score(r: Tensor) -> Tensor:
            u = r.double().exp()
            return (slope(u) - slope_at_one.to(u)).to(r.dtype)

        def conjugate(r: Tensor) -> Tensor:
            u = r.double().exp()
            return (u * (slope(u) - slope_at_one.to(u)) - normalized(u)).to(r.dtype)

        slopes = score(torch.linspace(-8, 2, 1001, dtype=torch.float64))
        steps = slopes.diff()
        if not slopes.isfinite().all() or (steps < -CURVATURE_TOLERANCE * slopes[1:].abs()).any():
            raise ValueError(f"divergence {name!r}: f must be convex and differentiable, f' increasing and finite")
        return cls(name, normalized, score, conjugate)


def kl() -> FDivergence:
    """Kullback-Leibler."""
    return FDivergence("kl", lambda u: torch.xlogy(u, u) - u + 1, lambda r: r, expm1)


def js() -> FDivergence:
    """Jensen-Shannon (times 2). log((1 + u)/2) as log1p(expm1(r)/2) keeps its digits near r = 0, where every
    well-aligned positive lies and softplus(r) - log 2 cancels."""
    return FDivergence(
        "js",
        lambda u: torch.xlogy(u, u) - (1 + u) * torch.log1p((u - 1) / 2),
        lambda r: r - torch.log1p(expm1(r) / 2),
        lambda r: torch.log1p(expm1(r) / 2),
    )


def pearson() -> FDivergence:
    """Pearson chi-square. expm1(2r), since u^2 - 1 in float32 is off by 1 % at r = -1e-6."""
    return FDivergence("pearson", lambda u: (u - 1) ** 2, lambda r: 2 * expm1(r), lambda r: expm1(2 * r))


def sh() -> FDivergence:
    """Squared Hellinger."""
    return FDivergence("sh", lambda u: (u.sqrt() - 1) ** 2, lambda r: -expm1(-r / 2), lambda r: expm1(r / 2))


def tsallis(order: float = 3.0) -> FDivergence:
    """Tsallis of the given order > 0: order 2 is `pearson`, 1/2 is `sh`, 1 is `kl` (its limit).

    Raises:
        ValueError: The order is not a finite number > 0.
    """
    if not (math.isfinite(order) and order > 0):
        raise ValueError(f"tsallis order must be a finite number > 0, got {order}")
    if order == 1.0:
        return FDivergence("tsallis", kl().f, kl().score, kl().conjugate)
    return FDivergence(
        "tsallis",
        lambda u: (u**order - 1 - order * (u - 1)) / (order - 1),
        lambda r: order / (order - 1) * expm1((order - 1) * r),
        lambda r: expm1(order * r),
    )


def vlc() -> FDivergence:
    """Vincze-Le Cam. The conjugate follows from f, (u-1)(3u+1)/(u+1)^2; the paper's tables print another form.

    In sigmoid(r) = u/(1+u), since the gradient of sigmoid(-r) is 0 in float32 below r = -17."""
    return FDivergence(
        "vlc",
        lambda u: (u - 1) ** 2 / (u + 1),
        lambda r: 4 * torch.sigmoid(r) * (2 - torch.sigmoid(r)) - 3,
        lambda r: 4 * torch.sigmoid(r) ** 2 - 1,
    )


def vlc_as_printed() -> FDivergence:
    """Vincze-Le Cam with the conjugate 3 - 4/(u + 1) as printed in the paper, which is not that of its own f (and
    is 1, not 0, at u = 1). Kept so that the paper's VLC figures can be compared."""
    return FDivergence("vlc_as_printed", vlc().f, vlc().score, lambda r: 4 * torch.sigmoid(r) - 1)


def jeffrey() -> FDivergence:
    """Jeffrey: KL plus reverse KL."""
    return FDivergence("jeffrey", lambda u: (u - 1) * u.log(), lambda r: r - expm1(-r), lambda r: expm1(r) + r)


def rkl() -> FDivergence:
    """Reverse KL. Fails the uniformity condition: its conjugate is linear in r."""
    return FDivergence("rkl", lambda u: u - 1 - u.log(), lambda r: -expm1(-r), lambda r: r)


def neyman() -> FDivergence:
    """Neyman chi-square. Fails the uniformity condition: its conjugate is concave in r."""
    return FDivergence("neyman", lambda u: (1 - u) ** 2 / u, lambda r: -expm1(-2 * r), lambda r: -2 * expm1(-r))


def convex_conjugate(divergence: FDivergence, t: Tensor) -> Tensor:
    """f*(t) = sup_u (u t - f(u)), for similarities t that are not f'(u) of some density ratio, such as cosine.

    The maximizer is found by bisection of score(r) = t over |r| <= 60 in float64; the gradient is the maximizer
    u = e^r itself (envelope theorem).

    Args:
        divergence: The record.
        t: Any shape.

    Returns:
        f*(t), same shape and dtype; inf where t is beyond the range of f' (log 2 for js, 1 for sh and vlc).
    """
    with torch.no_grad():
        low, high = (
            torch.full_like(t, -60.0, dtype=torch.float64),
            torch.full_like(t, 60.0, dtype=torch.float64),
        )
        beyond = t > divergence.score(high)
        for _ in range(60):
            middle = (low + high) / 2
            below = divergence.score(middle) < t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        value = divergence.conjugate(low).masked_fill(beyond, torch.inf).to(t.dtype)
        maximizer = low.exp().to(t.dtype)
    return value + maximizer * (t - t.detach())


def uniformity_holds(divergence: FDivergence, gamma: float, points: int = 2001) -> bool:
    """Whether h(t) = conjugate(-gamma t) is strictly convex on [0, 4], the condition of the uniformity theorem.

    Where it holds and 2 <= N <= d + 1, every minimizer of the negative term is a centred regular simplex
    (arXiv 2402.10150, Theorem on uniformity); where it fails, minimizers need not spread evenly, and the
    paper reports collapse.
    Decided on a grid of squared distances, in float64: h'' nowhere negative beyond rounding, and not zero
    throughout.

    Args:
        divergence: The record.
        gamma: 1/(2 sigma^2) > 0.
        points: Grid size.
    """
    r = -gamma * torch.linspace(0, 4, points, dtype=torch.float64)[1:-1]

    def slope(r: Tensor) -> Tensor:
        return torch.func.grad(lambda v: divergence.conjugate(v).sum())(r)

    curvature = torch.func.grad(lambda v: slope(v).sum())(r)
    rounding = CURVATURE_TOLERANCE * slope(r).abs()
    return bool((curvature >= -rounding).all() and (curvature > rounding).any())


DIVERGENCES: dict[str, FDivergence] = {
    record.name: record
    for record in (
        kl(),
        js(),
        pearson(),
        sh(),
        tsallis(),
        vlc(),
        jeffrey(),
        rkl(),
        neyman(),
        vlc_as_printed(),
    )
}
