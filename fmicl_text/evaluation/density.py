"""Estimate the density of positive pairs on the unit sphere with a normalizing flow.

All densities are relative to the uniform distribution on the sphere in k dimensions. A chart maps the sphere to R^(k-1)
such that the uniform distribution becomes standard normal, and a flow estimates the density there. p(x) and p(y | x)
give the joint density and the ratio u = p(x, y)/(p(x) p(y)) = p(y | x)/p(y). Pairs are unordered, so flows are fitted
to both orders and log densities are averaged over them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn
from tqdm.auto import tqdm

from fmicl_text.errors import InputError
from fmicl_text.losses.similarity import unit_rows

NUM_FLOWS, BATCH, MAX_EPOCHS, PATIENCE = 4, 256, 150, 10
ROUNDING = 1e-6  # equal rows can have distances up to this in float32


def toward_pole(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """y [N, k] mapped by the isometry that sends the unit row x_i [N, k] to the pole e_1. It is its own inverse.

    This is the negated reflection along x + e_1. It is continuous in x except at -e_1, opposite to the data."""
    v = x + np.eye(x.shape[1])[0]
    squared = (v * v).sum(-1, keepdims=True)
    along = np.divide((v * y).sum(-1, keepdims=True), squared, out=np.zeros_like(squared), where=squared > 0)
    return 2 * v * along - y


def to_chart(w: np.ndarray) -> np.ndarray:
    """Unit rows [N, k] mapped to [N, k-1] such that the uniform distribution becomes standard normal.

    The angle from the pole e_1 becomes the radius of the same quantile: (1 - cos)/2 has a Beta((k-1)/2, (k-1)/2)
    distribution, and the squared radius a chi-square distribution. The direction around the pole is kept; the antipode,
    which has none, is mapped to the first axis. Accurate for k <= 64 and angles above 1e-4: the probability of smaller
    caps underflows in float64."""
    half = (w.shape[1] - 1) / 2
    tangent = w[:, 1:]
    length = np.linalg.norm(tangent, axis=1)
    angle = np.arctan2(length, w[:, 0])
    near = special.gammaincinv(half, special.betainc(half, half, np.sin(angle / 2) ** 2))
    # Beyond 90°, computed from the complement for precision. At 0 the radius would be infinite.
    beyond = np.maximum(special.betainc(half, half, np.cos(angle / 2) ** 2), np.finfo(np.float64).tiny)
    radius = np.sqrt(2 * np.where(angle < math.pi / 2, near, special.gammainccinv(half, beyond)))
    z = tangent * np.divide(radius, length, out=np.zeros_like(length), where=length > 0)[:, None]
    antipode = (length == 0) & (w[:, 0] < 0)
    z[antipode, 0] = radius[antipode]
    return z


def normal_log_density(z: Tensor) -> Tensor:
    """log N(z; 0, I) of rows [N, n]; [N]."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)


class FlowEnsemble(nn.Module):
    """Mean density of RealNVP flows (arXiv 1605.08803) with different initial weights.

    Args:
        features: Dimension n of the rows whose density is estimated.
        context: Dimension of the rows that the density is conditioned on; 0 for an unconditional density.
        scale: Rows are divided by it first.
    """

    def __init__(self, features: int, context: int, scale: float) -> None:
        super().__init__()
        try:
            from zuko.flows import RealNVP
        except ImportError as error:
            raise InputError("density estimation requires zuko: pip install 'fmicl_text[geometry]'") from error
        self.features, self.scale = features, scale
        self.flows = nn.ModuleList(
            RealNVP(features, context, transforms=8, hidden_features=(64, 64)) for _ in range(NUM_FLOWS)
        )

    def log_densities(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Log density [flows, N] of each flow at rows z [N, n] given context [N, c]."""
        rows = z / self.scale
        each = torch.stack([flow(context).log_prob(rows) for flow in self.flows])
        return each - self.features * math.log(self.scale)

    @torch.no_grad()
    def log_ratio_to_normal(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log ratio of the mean density to N(z; 0, I), [N] in float64: the density relative to the uniform one."""
        mean = self.log_densities(z, context).double().logsumexp(0) - math.log(len(self.flows))
        return mean - normal_log_density(z.double())

    def fit(self, z: Tensor, context: Tensor | None, held_out: Tensor, held_out_context: Tensor | None) -> FlowEnsemble:
        """Fit by maximum likelihood to rows z [N, n]; each flow keeps its best weights on the held-out rows."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=1e-2)
        best = [math.inf] * len(self.flows)
        kept = [flow.state_dict() for flow in self.flows]
        waited = 0
        for _ in tqdm(range(MAX_EPOCHS), desc="fit flow", leave=False):
            for rows in torch.randperm(len(z)).split(BATCH):
                loss = -self.log_densities(z[rows], None if context is None else context[rows]).mean(1).sum()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters(), 5.0)
                optimizer.step()
            with torch.no_grad():
                losses = -self.log_densities(held_out, held_out_context).mean(1)
            waited += 1
            for i, (flow, value) in enumerate(zip(self.flows, losses.tolist(), strict=True)):
                if value < best[i]:
                    best[i], waited = value, 0
                    kept[i] = {name: weight.clone() for name, weight in flow.state_dict().items()}
            if waited >= PATIENCE:
                break
        for flow, weights in zip(self.flows, kept, strict=True):
            flow.load_state_dict(weights)
        return self


@dataclass
class PairDensity:
    """Densities of positive pairs on the sphere, estimated by `fit_density`.

    Args:
        pole: Mean direction [k] of the data, the center of the chart of p(x).
        marginal: Density of x in that chart.
        conditional: Density of y given x, in the chart centered at x.
    """

    pole: np.ndarray
    marginal: FlowEnsemble
    conditional: FlowEnsemble

    def log_marginal(self, x: Tensor) -> Tensor:
        """log p(x) of unit rows [N, k]; [N]."""
        return self.marginal.log_ratio_to_normal(chart_about(self.pole, x))

    def log_conditional(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(y | x) of unit rows [N, k]; [N]."""
        return self.conditional.log_ratio_to_normal(*conditional_inputs(self.pole, x, y))

    def log_joint(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(x, y) of unit rows [N, k]; [N]."""
        return self.log_ratio(x, y) + self.log_marginal(x) + self.log_marginal(y)

    def log_ratio(self, x: Tensor, y: Tensor) -> Tensor:
        """log u = log p(x, y)/(p(x) p(y)) of unit rows [N, k]; [N]."""
        first = self.log_conditional(x, y) - self.log_marginal(y)
        second = self.log_conditional(y, x) - self.log_marginal(x)
        return (first + second) / 2


def chart_about(pole: np.ndarray, x: Tensor) -> Tensor:
    """Unit rows [N, k] in the chart centered at a pole [k]; [N, k-1], float32."""
    rows = x.double().numpy()
    return torch.from_numpy(to_chart(toward_pole(np.broadcast_to(pole, rows.shape), rows))).float()


def conditional_inputs(pole: np.ndarray, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """y in the chart centered at x, [N, k-1], and x [N, k], both after the isometry that sends the pole to e_1."""
    sides = (side.double().numpy() for side in (x, y))
    x_turned, y_turned = (toward_pole(np.broadcast_to(pole, side.shape), side) for side in sides)
    return torch.from_numpy(to_chart(toward_pole(x_turned, y_turned))).float(), torch.from_numpy(x_turned).float()


def fit_density(x: Tensor, y: Tensor, held_out_x: Tensor, held_out_y: Tensor, seed: int = 0) -> PairDensity:
    """Estimate the densities of positive pairs. The global random state does not change.

    Args:
        x: Unit rows [N, k], k >= 3.
        y: Their positives [N, k]. Remove coinciding pairs first: they have no density.
        held_out_x, held_out_y: Pairs for early stopping.
        seed: Seed of the initial weights and the order of the rows.

    Raises:
        InputError: All pairs coincide, or zuko is not installed.
    """
    if (x - y).abs().max() < ROUNDING:
        raise InputError(f"all {len(x)} positive pairs coincide: density estimation requires views that differ")
    x, y, held_out_x, held_out_y = (
        torch.cat(sides) for sides in ((x, y), (y, x), (held_out_x, held_out_y), (held_out_y, held_out_x))
    )
    pole = unit_rows(x.double().mean(0, keepdim=True))[0].numpy()
    rows, held_out = chart_about(pole, x), chart_about(pole, held_out_x)
    offsets, context = conditional_inputs(pole, x, y)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        marginal = FlowEnsemble(x.shape[1] - 1, 0, rows.std().item()).fit(rows, None, held_out, None)
        conditional = FlowEnsemble(x.shape[1] - 1, x.shape[1], offsets.std().item())
        conditional.fit(offsets, context, *conditional_inputs(pole, held_out_x, held_out_y))
    return PairDensity(pole, marginal, conditional)
