"""Divergences of the studies: mixtures of those of the paper, and user-defined ones."""

from collections.abc import Callable

import torch
from torch import Tensor

from fmicl_text import DIVERGENCES, FDivergence


def mixture(name: str, **weights: float) -> FDivergence:
    """The divergence with f = sum of w_k f_k, which is convex for weights w_k >= 0: f, score and conjugate are linear
    in f.

    Args:
        name: Its name.
        weights: w_k by the name of the divergence.
    """
    parts = [(weight, DIVERGENCES[part]) for part, weight in weights.items()]

    def weighted(function: str) -> Callable[[Tensor], Tensor]:
        return lambda values: torch.stack([weight * getattr(part, function)(values) for weight, part in parts]).sum(0)

    return FDivergence(name, weighted("f"), weighted("score"), weighted("conjugate"))


kl_pearson = mixture("kl_pearson", kl=0.5, pearson=0.5)
js_sh = mixture("js_sh", js=0.5, sh=0.5)


def power(u: Tensor) -> Tensor:
    """f(u) = u^1.5, as a user would define it."""
    return u**1.5
