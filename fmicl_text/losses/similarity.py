"""Unit embeddings to similarities: the Gaussian log density ratio r, and cosine for the paper's comparison.

Each comes paired (row i of x with row i of y) and pairwise (every row of x with every row of y, from inner products).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


def unit_rows(x: Tensor) -> Tensor:
    """Rows of x [N, D] scaled to length 1, in float32 (float64 stays): bfloat16 would put r off by up to 0.05 at
    gamma = 10."""
    return normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def gradient_of_rows(rows: Tensor, unit: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in rows [N, D] from that in their unit rows: what is tangent to the sphere, over the length.

    As autograd of `unit_rows`, in a third of its passes over memory."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=unit.dtype).clamp_min(1e-12)
    radial = torch.linalg.vecdot(unit, gradient)[:, None]
    return torch.addcmul(gradient, unit, radial, value=-1).div_(length)


def log_ratio(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """r_i = -gamma ||x_i - y_i||^2 of rows x, y [N, D]; [N], <= 0. From the differences, so that views that almost
    coincide keep their digits."""
    return -gamma * (x - y).square().sum(-1)


def log_ratio_of_product(product: Tensor, gamma: float) -> Tensor:
    """r = -gamma ||x - y||^2 = 2 gamma (x.y - 1) from inner products x.y of unit rows, any shape.

    In [-4 gamma, 0], up to rounding of about 2e-7 gamma at identical rows."""
    return (product - 1).mul_(2 * gamma)


def cosine(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """x_i.y_i of unit rows x, y [N, D]; [N], in [-1, 1]. gamma plays no part."""
    return (x * y).sum(-1)


def cosine_of_product(product: Tensor, gamma: float) -> Tensor:
    """The inner products of unit rows as they are, in [-1, 1]. gamma plays no part."""
    return product


class Similarity(NamedTuple):
    """One similarity of unit rows: of partners (x, y, gamma); of all pairs, from their inner products; and its slope
    in the inner product, a number, for both are linear in it."""

    paired: Callable[[Tensor, Tensor, float], Tensor]
    of_product: Callable[[Tensor, float], Tensor]
    slope: Callable[[float], float]

    def pairwise(self, x: Tensor, y: Tensor, gamma: float) -> Tensor:
        """Every row of x [N, D] with every row of y [M, D]; [N, M]."""
        return self.of_product(x @ y.T, gamma)


SIMILARITIES: dict[str, Similarity] = {
    "gaussian": Similarity(log_ratio, log_ratio_of_product, lambda gamma: 2 * gamma),
    "cosine": Similarity(cosine, cosine_of_product, lambda gamma: 1.0),
}
