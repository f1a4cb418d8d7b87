"""Objectives of the studies that are not f-divergences, with the hyperparameters of their papers where nothing else is
said. Each is a subclass of `ContrastiveLoss`."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fmicl_text.losses import ContrastiveLoss, InfoNCELoss, Similarity
from fmicl_text.losses.objectives import Objective, PairObjective, Terms
from fmicl_text.losses.pairs import LossTerms


def log_mean(values: Tensor, keep: Tensor | None = None) -> Tensor:
    """log mean e^values, over the entries that are kept."""
    if keep is None:
        return values.flatten().logsumexp(0) - torch.tensor(values.numel()).log()
    return values.masked_fill(~keep, -torch.inf).flatten().logsumexp(0) - keep.sum().log()


class SkewRenyi(ContrastiveLoss):
    """Skew Renyi divergence (RenyiCL, arXiv 2208.06270): minus its variational lower bound.

    For the order g and the skewness a, with x.y / temperature = s for positive pairs and t for negative ones:

        loss = -1/(g - 1) log mean e^((g - 1) s) + 1/g log(a mean e^(g s) + (1 - a) mean e^(g t))

    Args:
        temperature: 0.05 as in SimCSE; the paper uses 0.5 for images.
        order: Order g > 1 of the divergence.
        skewness: a, in (0, 1).
        negatives: See `ContrastiveLoss`.
    """

    def __init__(
        self, temperature: float = 0.05, order: float = 2.0, skewness: float = 1 / 64, negatives: str = "cross_view"
    ) -> None:
        super().__init__(gamma=1 / (2 * temperature), negatives=negatives)
        self.temperature, self.order, self.skewness = temperature, order, skewness

    @property
    def objective(self) -> Objective:
        return self.terms_of_pairs

    def terms_of_pairs(self, positive: Tensor, negative: Tensor, keep: Tensor) -> Terms:
        order, skewness = self.order, torch.tensor(self.skewness, device=positive.device)
        both = torch.stack(
            [
                skewness.log() + log_mean(order * positive),
                (1 - skewness).log() + log_mean(order * negative, keep),
            ]
        )
        return Terms(-log_mean((order - 1) * positive) / (order - 1), both.logsumexp(0) / order)


class KernelContrastive(ContrastiveLoss):
    """Kernel contrastive learning (KCL, arXiv 2405.18045): -mean K(x, y) + alpha mean K(x_i, x_j), K = e^(-gamma d^2).

    Args:
        gamma: Width of the kernel.
        alpha: Weight of the negative term.
        negatives: See `ContrastiveLoss`.
    """

    def __init__(self, gamma: float = 2.0, alpha: float = 16.0, negatives: str = "same_view") -> None:
        super().__init__(gamma=gamma, negatives=negatives)
        self.alpha = alpha

    @property
    def objective(self) -> PairObjective:
        return PairObjective(torch.exp, torch.exp, lambda mean: self.alpha * mean)


def arctanh_of_product(product: Tensor, gamma: float) -> Tensor:
    """2 artanh(x.y), the log odds of (1 + x.y) / 2; x.y is limited to the largest float32 below 1."""
    limit = 1 - torch.finfo(product.dtype).eps
    return 2 * torch.atanh(product.clamp(-limit, limit))


class TemperatureFree(InfoNCELoss):
    """InfoNCE with 2 artanh(x.y) in place of x.y / temperature (arXiv 2501.17683)."""

    def __init__(self, negatives: str = "cross_view") -> None:
        super().__init__(negatives=negatives)
        self.similarity = Similarity("artanh", arctanh_of_product, uses_gamma=False)


class SIGReg(ContrastiveLoss):
    """Squared distance of the two views, and SIGReg (LeJEPA, arXiv 2511.08544): the Epps-Pulley statistic of random
    one-dimensional projections of the embeddings, which is 0 for an isotropic normal distribution. Without negatives.

    Rows are normalized, as all encoders here are compared by cosine, and scaled by sqrt(D), at which a uniform
    distribution on the sphere has nearly normal projections.

    Args:
        weight: Weight of SIGReg; that of the distance is 1 - weight.
        projections: Number of random directions per step.
    """

    def __init__(self, weight: float = 0.05, projections: int = 1024) -> None:
        super().__init__(gamma=1.0, negatives="same_view")
        self.weight, self.projections = weight, projections

    def terms(self, x: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> LossTerms:
        views = [normalize(view.float(), dim=-1) * view.shape[1] ** 0.5 for view in (x, y)]
        distance = (1 - self.weight) * ((views[0] - views[1]) / 2).square().mean()
        regularization = self.weight * torch.stack([self.statistic(view) for view in views]).mean()
        return LossTerms(distance + regularization, distance.detach(), regularization.detach())

    def statistic(self, rows: Tensor) -> Tensor:
        """N times the weighted squared distance of characteristic functions, mean over random directions."""
        directions = normalize(torch.randn(rows.shape[1], self.projections, device=rows.device), dim=0)
        points = torch.linspace(0, 5, 17, device=rows.device)  # the integrand is even
        angles = (rows @ directions)[..., None] * points
        normal = torch.exp(-points.square() / 2)
        squares = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()
        return len(rows) * torch.trapezoid(squares * normal, points).mean() * 2
