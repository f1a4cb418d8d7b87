"""Similarities of unit embeddings: the Gaussian log density ratio r, and cosine similarity, the paper's baseline.

To add a similarity, add a `Similarity` to `SIMILARITIES`, or pass one to a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fmicl_text.losses.checks import require_choice
from fmicl_text.losses.divergences import FDivergence, convex_conjugate


def unit_rows(x: Tensor) -> Tensor:
    """Rows of x [N, D] scaled to length 1, in float32 (float64 is kept): in bfloat16 the error of r would be up to
    0.05 at gamma = 10."""
    return normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def gradient_of_rows(rows: Tensor, unit: Tensor, gradient: Tensor) -> Tensor:
    """Gradient with respect to rows [N, D], given that with respect to their unit rows: its part tangent to the sphere,
    divided by the length.

    Equals autograd of `unit_rows`, with a third of the passes over memory."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=unit.dtype).clamp_min(1e-12)
    radial = torch.linalg.vecdot(unit, gradient)[:, None]
    return torch.addcmul(gradient, unit, radial, value=-1).div_(length)


@dataclass(frozen=True, eq=False)
class Similarity:
    """A similarity of unit embeddings as a function of their inner product x.y.

    >>> laplace = Similarity("laplace", lambda product, gamma: -gamma * (2 - 2 * product).clamp_min(0).sqrt())
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> laplace.pairwise(x, x, 2.0)                              # r = -gamma ||x - y||
    tensor([[-0.0000, -2.8284],
            [-2.8284, -0.0000]])

    Attributes:
        name: Name in arguments and records.
        of_product: (inner products x.y, any shape; gamma) -> similarities of the same shape, differentiable for x.y in
            (-1, 1), finite at both ends.
        of_rows: (x, y, gamma) -> similarities of x_i and y_i [N] from rows [N, D], where that is more accurate. By
            default, `of_product` of x_i.y_i.
        slope: gamma -> derivative of `of_product`, if it is constant; this saves passes over memory. By default,
            autograd differentiates `of_product`.
        is_log_ratio: Whether values are log density ratios r. f-MICL then uses the divergence's score(r) = f'(e^r) and
            conjugate(r) = (f* o f')(e^r). Otherwise values t take the place of f'(u): score(t) = t, conjugate(t) =
            f*(t).
        uses_gamma: Whether values depend on gamma.
        uniformity_condition: Whether the values are r = -gamma ||x - y||^2, to which `uniformity_holds` applies.
        symbol: Symbol in messages and formulas.
        definition: Formula, for model cards.
    """

    name: str
    of_product: Callable[[Tensor, float], Tensor]
    of_rows: Callable[[Tensor, Tensor, float], Tensor] | None = None
    slope: Callable[[float], float] | None = None
    is_log_ratio: bool = True
    uses_gamma: bool = True
    uniformity_condition: bool = False
    symbol: str = "r"
    definition: str | None = None

    def paired(self, x: Tensor, y: Tensor, gamma: float) -> Tensor:
        """Similarity of x_i and y_i, rows of x and y [N, D]; [N]."""
        if self.of_rows is not None:
            return self.of_rows(x, y, gamma)
        return self.of_product((x * y).sum(-1), gamma)

    def pairwise(self, x: Tensor, y: Tensor, gamma: float, keep: Tensor | None = None) -> Tensor:
        """Similarity of every row of x [N, D] and every row of y [M, D]; [N, M].

        Args:
            keep: Pairs that the loss uses, bool [N, M]. The others may have any value, and a zero gradient."""
        return self.of_product(self.masked(x @ y.T, keep), gamma)

    def masked(self, product: Tensor, keep: Tensor | None) -> Tensor:
        """Inner products with 0 where `keep` is False: a row with itself, x.y = 1, may have an infinite derivative,
        which times the zero gradient of a masked pair would be nan. Not needed if the derivative is constant."""
        return product if keep is None or self.slope is not None else product.masked_fill(~keep, 0)

    def score_and_conjugate(
        self, divergence: FDivergence
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The functions that f-MICL applies to similarities of positive and of negative pairs."""
        if self.is_log_ratio:
            return divergence.score, divergence.conjugate
        return (lambda t: t), (lambda t: convex_conjugate(divergence, t))


def log_ratio(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """r_i = -gamma ||x_i - y_i||^2 of rows x, y [N, D]; [N], <= 0. Computed from the differences, which is accurate
    for views that almost coincide."""
    return -gamma * (x - y).square().sum(-1)


def log_ratio_of_product(product: Tensor, gamma: float) -> Tensor:
    """r = -gamma ||x - y||^2 = 2 gamma (x.y - 1) from inner products x.y of unit rows, any shape.

    In [-4 gamma, 0], up to rounding of about 2e-7 gamma at identical rows."""
    return (product - 1).mul_(2 * gamma)


def log_ratio_slope(gamma: float) -> float:
    """Derivative of r with respect to the inner product."""
    return 2 * gamma


def cosine_of_product(product: Tensor, gamma: float) -> Tensor:
    """The inner products of unit rows themselves, in [-1, 1]."""
    return product


def cosine_slope(gamma: float) -> float:
    """Derivative of the cosine with respect to the inner product."""
    return 1.0


SIMILARITIES: dict[str, Similarity] = {
    similarity.name: similarity
    for similarity in (
        Similarity(
            "gaussian",
            log_ratio_of_product,
            of_rows=log_ratio,
            slope=log_ratio_slope,
            uniformity_condition=True,
            definition="r = -gamma ||x - y||^2 of unit embeddings",
        ),
        Similarity(
            "cosine",
            cosine_of_product,
            slope=cosine_slope,
            is_log_ratio=False,
            uses_gamma=False,
            symbol="cosine",
            definition="cosine = x.y of unit embeddings",
        ),
    )
}


def load_similarity(similarity: str | Similarity) -> Similarity:
    """A similarity by its name in `SIMILARITIES`."""
    if isinstance(similarity, Similarity):
        return similarity
    require_choice("similarity", similarity, SIMILARITIES)
    return SIMILARITIES[similarity]
