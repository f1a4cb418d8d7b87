"""f-divergences as functions of r = log u, the log density ratio.

Training never computes u. It uses two functions of r for each convex f:

    score(r)     = f'(e^r)                            the f-Gaussian similarity, for positive pairs
    conjugate(r) = (f* o f')(e^r) = u f'(u) - f(u)    for negative pairs

Every f here is normalized to f(1) = f'(1) = 0; adding c(u - 1) to f adds c to both functions. Where f(0) is finite, it
is added to the conjugate, which is then 0 at r = -inf: distant negative pairs add 0 to the loss instead of -alpha f(0),
and the loss keeps its digits in float32 at any alpha. Both change the paper's objective by a constant only. A collapsed
batch (all r = 0) has loss alpha f(0), which is alpha log 2 for `js`, 2 alpha for `vlc_as_printed`, and alpha for the
others; and loss 0 for `jeffrey`, `rkl` and `neyman`, whose f(0) is infinite.

On the unit sphere r lies in [-4 gamma, 0]. The conjugate is bounded for all gamma, except for `jeffrey`, `rkl`
(linear in r) and `neyman` (exponential); the score of `sh`, `jeffrey`, `rkl` and `neyman` is exponential in -r.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fmicl_text.losses.checks import import_attribute, require_positive

CURVATURE_TOLERANCE = 1e-9
TAIL_DEPTHS = (
    200,
    100,
    50,
    25,
    12,
    6,
    3,
)  # -r at which the tail exponent is measured: deep, unless e^(kr) underflows there


class Exp(torch.autograd.Function):
    """See `exp`."""

    @staticmethod
    def forward(r: Tensor) -> Tensor:
        return (r * 0.5).exp_().square_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


def exp(r: Tensor) -> Tensor:
    """e^r, computed as a square: on a CPU, torch.exp is 100 times slower where its result is below float32's normal
    range."""
    return Exp.apply(r)


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
        half = r * 0.5  # e^r as a square, see `exp`
        if torch.is_grad_enabled():  # for a second derivative
            return gradient * half.exp().square()
        return half.exp_().square_().mul_(gradient)


def expm1(r: Tensor) -> Tensor:
    """e^r - 1, with value and gradient accurate to rounding for all r.

    torch.expm1 computes its gradient as (e^r - 1) + 1, which float32 rounds to multiples of 6e-8: its error is 1.6%
    near r = -13, where the paper's alpha = 409600 balances attraction and repulsion, and it is 0 below r = -17.
    """
    return ExpM1.apply(r)


@dataclass(frozen=True)
class FDivergence:
    """A convex f with f(1) = f'(1) = 0, and its functions in f-MICL (arXiv 2402.10150, Table 1).

    Attributes:
        name: Name in arguments and records.
        f: u -> f(u), u > 0. Used by tests and plots, not by training.
        score: r -> f'(e^r), increasing in r.
        conjugate: r -> (f* o f')(e^r) + f(0), increasing in r, 0 at r = -inf. Without f(0) where f(0) is infinite.
        formulas: f(u), up to c(u - 1), score and conjugate as text, for model cards.
        parameters: Parameters of f by name, for records and model cards.
        source: `package.module:attribute`, if it was loaded from there.
        made_by: See `pickled_as`.

    Each function takes a tensor and returns one of the same shape and dtype.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    score: Callable[[Tensor], Tensor]
    conjugate: Callable[[Tensor], Tensor]
    formulas: tuple[str, str, str] | None = field(default=None, compare=False)
    parameters: dict[str, float] = field(default_factory=dict, compare=False)
    source: str | None = field(default=None, compare=False)
    made_by: tuple[Callable[..., FDivergence], tuple[Any, ...]] | None = field(
        default=None, init=False, compare=False, repr=False
    )

    def __reduce_ex__(self, protocol: Any) -> Any:
        if DIVERGENCES.get(self.name) is self:
            return load_divergence, (self.name,)
        return self.made_by or super().__reduce_ex__(protocol)

    def pickled_as(self, function: Callable[..., FDivergence], *arguments: Any) -> FDivergence:
        """This divergence, pickled as a call of a function: pickle does not accept local functions, such as `score`."""
        object.__setattr__(self, "made_by", (function, arguments))
        return self

    @cached_property
    def tail_exponent(self) -> float:
        """k, where the derivative of the conjugate falls like e^(kr) for r -> -inf: 1 for `kl` and `js`, 2 for
        `pearson` and `vlc`, 1/2 for `sh`, the order of `tsallis`.

        With a Gaussian similarity, negative pairs repel by a kernel e^(-k gamma d^2) of their distance d. If k is 0 or
        less (`jeffrey`, `rkl`, `neyman`), repulsion does not end with distance; nan if there is no such k. Computed in
        float64 from `conjugate`, to 6 digits.
        """
        return tail_exponent_of(derivative(self.conjugate))

    @classmethod
    @torch.inference_mode(False)
    def from_convex(cls, f: Callable[[Tensor], Tensor], name: str = "custom") -> FDivergence:
        """The divergence of any convex, differentiable f: (0, inf) -> R, by autograd in float64.

        >>> chi2 = FDivergence.from_convex(lambda u: u**2, name="chi2")   # Pearson's, up to normalization
        >>> chi2.score(torch.tensor([0.0])), chi2.conjugate(torch.tensor([0.0])), chi2.tail_exponent
        (tensor([0.]), tensor([1.]), 2.0)

        Args:
            f: Elementwise function of a tensor u > 0, written with torch operations. It does not have to be normalized.
            name: Name in messages, records and model cards.

        Raises:
            ValueError: f' decreases or is not finite somewhere on u in [e^-8, e^2].
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

        slopes = score(torch.linspace(-8, 2, 1001, dtype=torch.float64))
        steps = slopes.diff()
        if not slopes.isfinite().all() or (steps < -CURVATURE_TOLERANCE * slopes[1:].abs()).any():
            raise ValueError(
                f"divergence={name}: f must be convex and differentiable, with f' increasing and finite on [e^-8, e^2]"
            )
        conjugate = conjugate_of(f, slope, value_at_one - slope_at_one)
        return cls(name, normalized, score, conjugate).pickled_as(cls.from_convex, f, name)


def derivative(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The derivative of an elementwise function, as a function whose own gradient is 0."""

    def slope(r: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = r.detach().clone().requires_grad_()
            value = function(leaf).sum()
        return torch.autograd.grad(value, leaf)[0] + 0 * r

    return slope


class WithSlope(torch.autograd.Function):
    """An elementwise function whose derivative is given as another one: value(r, slope(r)); and slope(r), which has no
    gradient."""

    @staticmethod
    def forward(
        r: Tensor, value: Callable[[Tensor, Tensor], Tensor], slope: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        slopes = slope(r)
        return value(r, slopes), slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        r, _, ctx.slope = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(r, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        r, slopes = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            slopes = ctx.slope(r)
        return gradient * slopes, None, None


@torch.inference_mode(False)
def tail_exponent_of(slope: Callable[[Tensor], Tensor]) -> float:
    """k, where a function of r falls like e^(kr) for r -> -inf, to 6 digits; nan if there is no such k."""
    for depth in TAIL_DEPTHS:
        values = slope(-depth - torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
        first, second = (values[:-1] / values[1:]).log().tolist()
        # nan or inf where values underflow, unequal where rounding or another term counts
        if math.isfinite(first) and abs(first - second) <= 1e-6 * max(1, abs(first)):
            return float(f"{second:.6g}") if abs(second) > 1e-6 else 0.0
    return math.nan


def conjugate_of(
    f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], otherwise: Tensor
) -> Callable[[Tensor], Tensor]:
    """The conjugate of a convex f, computed in float64: u f'(u) - f(u) + f(0) at u = e^r.

    Its derivative is computed as u^2 f''(u), in which nothing cancels. The value has a rounding error of 1e-16 if f(0)
    is not 0, which alpha multiplies. Where this is above 1e-5 of the value, the value is derivative / k of the tail.

    Args:
        f: Elementwise function of u > 0.
        slope: f'.
        otherwise: Replaces f(0) if the conjugate has no positive tail exponent k.
    """

    def derivative_in_r(r: Tensor) -> Tensor:
        u = r.double().exp()
        return (u * (u * torch.func.grad(lambda v: slope(v).sum())(u))).to(r.dtype)

    k = tail_exponent_of(derivative_in_r)
    far = torch.tensor(-float(TAIL_DEPTHS[0]), dtype=torch.float64)
    constant = f(far.exp()) - far.exp() * slope(far.exp()) + derivative_in_r(far) / k
    has_limit = k > 0 and bool(constant.isfinite())
    constant = constant if has_limit else otherwise
    scale = torch.maximum(constant.abs(), otherwise.abs())  # of the terms of which f(u) may be the small difference

    def value(r: Tensor, slopes: Tensor) -> Tensor:
        u = r.double().exp()
        first, second = u * slope(u), f(u)
        direct = first - second + constant.to(u)
        if has_limit:
            rounding = torch.finfo(torch.float64).eps * (first.abs() + second.abs() + scale.to(u))
            direct = torch.where(rounding <= 1e-5 * direct, direct, slopes / k)
        return direct.to(r.dtype)

    return lambda r: WithSlope.apply(r, value, derivative_in_r)[0]


def kl() -> FDivergence:
    """Kullback-Leibler divergence."""
    return FDivergence(
        "kl",
        lambda u: torch.xlogy(u, u) - u + 1,
        lambda r: r,
        exp,
        ("u log u", "r", "e^r"),
    )


def js() -> FDivergence:
    """Jensen-Shannon divergence, times 2. log((1 + u)/2) of the score is computed as log1p(expm1(r)/2), which, unlike
    softplus(r) - log 2, is accurate near r = 0, the value of well-aligned positive pairs."""
    return FDivergence(
        "js",
        lambda u: torch.xlogy(u, u) - (1 + u) * torch.log1p((u - 1) / 2),
        lambda r: r - torch.log1p(expm1(r) / 2),
        lambda r: torch.log1p(exp(r)),
        ("u log u - (1+u) log((1+u)/2)", "r - log((1+e^r)/2)", "log(1+e^r)"),
    )


def pearson() -> FDivergence:
    """Pearson chi-square divergence. Uses expm1(r), because u - 1 in float32 has an error of 1% at r = -1e-6."""
    return FDivergence(
        "pearson",
        lambda u: (u - 1) ** 2,
        lambda r: 2 * expm1(r),
        lambda r: exp(2 * r),
        ("(u-1)^2", "2(e^r - 1)", "e^2r"),
    )


def sh() -> FDivergence:
    """Squared Hellinger distance."""
    return FDivergence(
        "sh",
        lambda u: (u.sqrt() - 1) ** 2,
        lambda r: -expm1(-r / 2),
        lambda r: exp(r / 2),
        ("(sqrt u - 1)^2", "1 - e^(-r/2)", "e^(r/2)"),
    )


def tsallis(order: float = 3.0) -> FDivergence:
    """Tsallis divergence of the given order > 0: order 2 is `pearson`, 1/2 is `sh`, 1 is `kl` (its limit).

    Raises:
        ValueError: The order is not a finite number > 0.
    """
    require_positive("tsallis_order", order)
    formulas = ("(u^a - 1)/(a-1)", "a/(a-1) (e^((a-1)r) - 1)", "e^(ar)")
    parameters = {"tsallis_order": order}
    if order == 1.0:
        return replace(kl(), name="tsallis", formulas=formulas, parameters=parameters).pickled_as(tsallis, order)
    return FDivergence(
        "tsallis",
        lambda u: (u**order - 1 - order * (u - 1)) / (order - 1),
        lambda r: order / (order - 1) * expm1((order - 1) * r),
        lambda r: exp(order * r),
        formulas,
        parameters,
    ).pickled_as(tsallis, order)


def vlc() -> FDivergence:
    """Vincze-Le Cam divergence. The conjugate (u-1)(3u+1)/(u+1)^2, here plus f(0) = 1, follows from f; the paper prints
    another form.

    Uses sigmoid(r) = u/(1+u), because the gradient of sigmoid(-r) is 0 in float32 below r = -17."""
    return FDivergence(
        "vlc",
        lambda u: (u - 1) ** 2 / (u + 1),
        lambda r: 4 * torch.sigmoid(r) * (2 - torch.sigmoid(r)) - 3,
        lambda r: 4 * torch.sigmoid(r) ** 2,
        ("(u-1)^2/(u+1)", "1 - 4/(1+u)^2, u = e^r", "4u^2/(u+1)^2, u = e^r"),
    )


def vlc_as_printed() -> FDivergence:
    """Vincze-Le Cam divergence with the conjugate 3 - 4/(u + 1) as printed in the paper, here plus 1, which does not
    follow from its f. Kept for comparison with the paper's VLC results."""
    return FDivergence(
        "vlc_as_printed",
        vlc().f,
        vlc().score,
        lambda r: 4 * torch.sigmoid(r),
        ("(u-1)^2/(u+1)", "1 - 4/(1+u)^2, u = e^r", "4u/(u+1), u = e^r"),
    )


def jeffrey() -> FDivergence:
    """Jeffrey divergence: KL plus reverse KL."""
    return FDivergence(
        "jeffrey",
        lambda u: (u - 1) * u.log(),
        lambda r: r - expm1(-r),
        lambda r: expm1(r) + r,
        ("(u-1) log u", "r + 1 - e^-r", "e^r - 1 + r"),
    )


def rkl() -> FDivergence:
    """Reverse KL divergence. Fails the uniformity condition: its conjugate is linear in r."""
    return FDivergence(
        "rkl",
        lambda u: u - 1 - u.log(),
        lambda r: -expm1(-r),
        lambda r: r,
        ("-log u", "1 - e^-r", "r"),
    )


def neyman() -> FDivergence:
    """Neyman chi-square divergence. Fails the uniformity condition: its conjugate is concave in r."""
    return FDivergence(
        "neyman",
        lambda u: (1 - u) ** 2 / u,
        lambda r: -expm1(-2 * r),
        lambda r: -2 * expm1(-r),
        ("(1-u)^2/u", "1 - e^-2r", "2(1 - e^-r)"),
    )


def convex_conjugate(divergence: FDivergence, t: Tensor) -> Tensor:
    """f*(t) = sup_u (u t - f(u)), for similarities t that are not f'(u) of a density ratio u, such as cosine.

    Finds the maximizer by bisection of score(r) = t over |r| <= 60 in float64. The gradient is the maximizer u = e^r
    itself (envelope theorem).

    Args:
        divergence: f and its functions.
        t: Any shape.

    Returns:
        f*(t), same shape and dtype; inf where t is above the range of f' (log 2 for js, 1 for sh and vlc).
    """
    r, beyond = log_ratio_of_score(divergence, t)
    with torch.no_grad():  # f*(0) = 0, because f(1) = f'(1) = 0; the conjugate of r = 0 is f(0)
        value = divergence.conjugate(r) - divergence.conjugate(torch.zeros_like(r))
        value, maximizer = value.masked_fill(beyond, torch.inf).to(t.dtype), r.exp().to(t.dtype)
    return value + maximizer * (t - t.detach())


@torch.no_grad()
def log_ratio_of_score(divergence: FDivergence, t: Tensor) -> tuple[Tensor, Tensor]:
    """r in [-60, 60] with score(r) = t, in float64 and without gradient; and whether t is above the range of f'."""
    low, high = (torch.full_like(t, bound, dtype=torch.float64) for bound in (-60.0, 60.0))
    beyond = t > divergence.score(high)
    for _ in range(60):
        middle = (low + high) / 2
        below = divergence.score(middle) < t
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low, beyond


@torch.inference_mode(False)
def uniformity_holds(divergence: FDivergence, gamma: float, points: int = 2001) -> bool:
    """Whether h(t) = conjugate(-gamma t) is strictly convex on [0, 4], the condition of the uniformity theorem.

    If it is and 2 <= N <= d + 1, every minimizer of the negative term is a centered regular simplex (arXiv 2402.10150,
    Theorem on uniformity). If not, minimizers may be spread unevenly, and the paper reports collapse.
    Evaluated on a grid of squared distances in float64: h'' is nowhere negative, up to rounding, and not zero
    everywhere.

    Args:
        divergence: f and its functions.
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
    divergence.name: divergence
    for divergence in (
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


def load_divergence(name: str) -> FDivergence:
    """Load a divergence by name.

    Args:
        name: A name in `DIVERGENCES`; or `package.module:attribute`, an `FDivergence` or a convex function f, from
            which `FDivergence.from_convex` makes a divergence named after the attribute.

    Raises:
        ValueError: There is no such divergence, module or attribute, or the attribute is neither of the two.
    """
    if name in DIVERGENCES:
        return DIVERGENCES[name]
    expected = f"one of {', '.join(DIVERGENCES)}, or package.module:attribute, an FDivergence or a convex function f"
    found = import_attribute("divergence", name, expected)
    if isinstance(found, FDivergence):
        return replace(found, source=name)
    if isinstance(found, type) or not callable(found):
        raise ValueError(f"divergence={name}: is of type {type(found).__name__}, expected {expected}")
    try:
        divergence = FDivergence.from_convex(found, name)
    except ValueError:  # not convex
        raise
    except Exception as error:  # any type, by the code of f
        reason = f"elementwise function of a tensor u > 0 ({' '.join(str(error).split())})"
        raise ValueError(f"divergence={name}: f must be an {reason}") from error
    return replace(divergence, name=name.partition(":")[2], source=name).pickled_as(load_divergence, name)


def as_divergence(value: Any) -> FDivergence:
    """A divergence, given itself or its name; see `load_divergence`."""
    value = load_divergence(value) if isinstance(value, str) else value
    if not isinstance(value, FDivergence):
        got = type(value).__name__
        raise ValueError(f"divergence must be a name or an FDivergence, such as from_convex makes, got {got}")
    return value
