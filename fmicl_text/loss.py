"""Losses on embeddings: normalise -> pair up -> similarity -> objective. A loss never sees a model."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fmicl_text import objectives
from fmicl_text.divergences import DIVERGENCES, FDivergence, convex_conjugate, uniformity_holds
from fmicl_text.errors import InputError
from fmicl_text.objectives import Terms
from fmicl_text.similarity import SIMILARITIES, unit_rows

NEGATIVES = ("same_view", "cross_view", "both")


def require_choice(name: str, value: str, accepted: tuple[str, ...] | list[str]) -> None:
    """ValueError naming the argument, unless value is one of those accepted."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")


def require_positive(name: str, value: float) -> None:
    """ValueError naming the argument, unless value is a finite number > 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value}")


class ContrastiveLoss(nn.Module):
    """Base of the losses: holds the knobs that all share.

    Args:
        gamma: 1/(2 sigma^2) of the Gaussian log ratio r = -gamma ||x - y||^2; finite, > 0.
        negatives: `same_view` pairs (x_i, x_j), `cross_view` pairs (x_i, y_j), or `both`; i != j.
        similarity: `gaussian` or `cosine`.

    Raises:
        ValueError: A knob outside its range; names it, the value received and what is accepted.
    """

    def __init__(self, gamma: float, negatives: str, similarity: str = "gaussian") -> None:
        super().__init__()
        require_positive("gamma", gamma)
        require_choice("negatives", negatives, NEGATIVES)
        require_choice("similarity", similarity, list(SIMILARITIES))
        self.gamma, self.negatives, self.similarity = gamma, negatives, similarity

    @property
    def knobs(self) -> dict[str, Any]:
        """Constructor arguments, the divergence by name; what settings files and model cards record."""
        values = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        if self.similarity == "cosine":
            del values["gamma"]
        return {name: value.name if isinstance(value, FDivergence) else value for name, value in values.items()}

    def objective(self, positive: Tensor, negative: Tensor, keep: Tensor) -> Terms:
        """The two terms from similarities [N], [N, M] and the mask [N, M]; see `objectives`."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, y: Tensor, hard_negatives: Tensor | None = None, text_ids: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar; see `terms`."""
        terms = self.terms(x, y, hard_negatives, text_ids)
        return terms.positive + terms.negative

    def terms(
        self, x: Tensor, y: Tensor, hard_negatives: Tensor | None = None, text_ids: Tensor | None = None
    ) -> Terms:
        """The positive and the negative term, scalars in float32, outside autocast.

        Args:
            x: First views [N, D], N >= 2, any scale (normalised here), differentiable.
            y: Second views [N, D].
            hard_negatives: One negative more per example [N, D]; row j is a negative of every x_i, j = i included.
            text_ids: Integers [N, V], equal where texts are equal: column 0 for x, 1 for y (absent: as x), 2 for
                hard_negatives. Pairs of examples that share a text are no negatives of each other.

        Raises:
            ValueError: Shapes that do not fit, fewer than 2 examples, or no negative left because all texts are
                equal.
        """
        if x.ndim != 2 or x.shape != y.shape or (hard_negatives is not None and hard_negatives.shape != x.shape):
            shapes = [tuple(t.shape) for t in (x, y, hard_negatives) if t is not None]
            raise ValueError(f"x, y and hard_negatives must all be [N, D], got {shapes}")
        if hard_negatives is not None and text_ids is not None and text_ids.shape[1] != 3:
            raise ValueError(f"with hard_negatives text_ids must be [N, 3], got {list(text_ids.shape)}")
        if len(x) < 2:
            raise ValueError(f"a batch needs at least 2 examples to have a negative, got {len(x)}")
        with torch.autocast(x.device.type, enabled=False):
            x, y = unit_rows(x), unit_rows(y)
            columns = {"same_view": [x], "cross_view": [y], "both": [x, y]}[self.negatives]
            if hard_negatives is not None:
                columns = [*columns, unit_rows(hard_negatives)]
            keep = self.negative_mask(x, hard_negatives is not None, text_ids)
            paired, pairwise = SIMILARITIES[self.similarity]
            return self.objective(paired(x, y, self.gamma), pairwise(x, torch.cat(columns), self.gamma), keep)

    def negative_mask(self, x: Tensor, with_hard: bool, text_ids: Tensor | None) -> Tensor:
        """Which candidates are negatives of x_i: [N, N] for each of the columns that `terms` joins."""
        if text_ids is None:
            distinct = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
            hard = torch.ones_like(distinct)
        else:
            own = text_ids[:, :2]
            distinct = (own[:, None, :, None] != own[None, :, None, :]).all(-1).all(-1)
            hard = (text_ids[None, :, -1:] != own[:, None]).all(-1)
        masks = [distinct] * (2 if self.negatives == "both" else 1) + [hard] * with_hard
        keep = torch.cat(masks, dim=1)
        if text_ids is not None and not keep.any():
            raise InputError(f"no negative pair in the batch: all {len(x)} texts are equal")
        return keep


class FMICLLoss(ContrastiveLoss):
    """f-MICL (arXiv 2402.10150): -mean f'(u(x_i, y_i)) + alpha mean_{i != j} (f* o f')(u(x_i, x_j)), u = e^r.

    Up to a constant that grows with alpha it is minus a lower bound of an f-mutual information: expect it near alpha
    times the conjugate's lowest value (-alpha for kl, -0.69 alpha for js) once distinct texts are far apart.

    >>> loss = FMICLLoss(divergence="js", gamma=1.0, alpha=40.0)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> round(loss(x, x).item(), 4)                        # 40 log((1 + e^-2)/2)
    -22.6488

    Args:
        divergence: A name in `DIVERGENCES`, or a record (`FDivergence.from_convex(f)` makes one of your own).
        gamma: 1/(2 sigma^2), finite, > 0; the paper's 20 for text, 1 for vision. Unused by `cosine`.
        alpha: Weight of the negative term, finite, > 0; the paper's 409600 for text, 40 for vision.
        negatives: `same_view` as in the paper, `cross_view` or `both`.
        similarity: `gaussian`, the f-Gaussian similarity f'(e^r); or `cosine`, the paper's comparison, which puts
            x.y in place of f'(u) and f*(x.y) in place of the conjugate, inf where x.y is beyond the range of f'.

    Warns:
        UserWarning: The uniformity condition fails, so that embeddings may collapse.
    """

    def __init__(
        self,
        divergence: str | FDivergence = "kl",
        gamma: float = 20.0,
        alpha: float = 409600.0,
        negatives: str = "same_view",
        similarity: str = "gaussian",
    ) -> None:
        super().__init__(gamma, negatives, similarity)
        require_positive("alpha", alpha)
        if isinstance(divergence, str):
            require_choice("divergence", divergence, list(DIVERGENCES))
            divergence = DIVERGENCES[divergence]
        self.divergence, self.alpha = divergence, alpha
        if similarity == "gaussian" and not uniformity_holds(divergence, gamma):
            warnings.warn(
                f"divergence {divergence.name!r} with gamma {gamma:g} fails the uniformity condition (its negative "
                "term is not strictly convex in the squared distance): embeddings are at risk of collapse, for they "
                f"need not spread evenly. Divergences that pass: {', '.join(passing(gamma))}.",
                stacklevel=2,
            )

    def objective(self, positive: Tensor, negative: Tensor, keep: Tensor) -> Terms:
        score, conjugate = self.divergence.score, self.divergence.conjugate
        if self.similarity == "cosine":
            score, conjugate = (lambda t: t), (lambda t: convex_conjugate(self.divergence, t))
        return objectives.fmicl(positive, negative, keep, score=score, conjugate=conjugate, alpha=self.alpha)


class InfoNCELoss(ContrastiveLoss):
    """InfoNCE on cosines, SimCSE's loss with its defaults.

    Args:
        temperature: Of the softmax, finite, > 0 (= 1/(2 gamma)).
        negatives: As for `FMICLLoss`, `cross_view` by default.
    """

    def __init__(self, temperature: float = 0.05, negatives: str = "cross_view") -> None:
        require_positive("temperature", temperature)
        super().__init__(gamma=1 / (2 * temperature), negatives=negatives)
        self.temperature = temperature

    def objective(self, positive: Tensor, negative: Tensor, keep: Tensor) -> Terms:
        return objectives.infonce(positive, negative, keep)


class AlignUniformLoss(ContrastiveLoss):
    """Alignment + uniformity (Wang & Isola, arXiv 2005.10242): mean ||x - y||^2 + alpha log mean e^{-gamma d^2}.

    Args:
        gamma: Theirs is t = 2; finite, > 0.
        alpha: Weight of uniformity, finite, > 0.
        negatives: As for `FMICLLoss`.
    """

    def __init__(self, gamma: float = 2.0, alpha: float = 1.0, negatives: str = "same_view") -> None:
        super().__init__(gamma, negatives)
        require_positive("alpha", alpha)
        self.alpha = alpha

    def objective(self, positive: Tensor, negative: Tensor, keep: Tensor) -> Terms:
        return objectives.align_uniform(positive, negative, keep, gamma=self.gamma, alpha=self.alpha)


class SpectralLoss(ContrastiveLoss):
    """Spectral contrastive loss (HaoChen et al., arXiv 2106.04156): -2 mean x.y + alpha mean (x_i.y_j)^2.

    Args:
        alpha: Weight of the negative term, finite, > 0.
        negatives: As for `FMICLLoss`, `cross_view` by default.
    """

    def __init__(self, alpha: float = 1.0, negatives: str = "cross_view") -> None:
        super().__init__(gamma=0.5, negatives=negatives)
        require_positive("alpha", alpha)
        self.alpha = alpha

    def objective(self, positive: Tensor, negative: Tensor, keep: Tensor) -> Terms:
        return objectives.spectral(positive, negative, keep, alpha=self.alpha)


def passing(gamma: float) -> list[str]:
    """Names of the divergences for which the uniformity condition holds."""
    return [name for name, record in DIVERGENCES.items() if uniformity_holds(record, gamma)]


OBJECTIVES: dict[str, type[ContrastiveLoss]] = {
    "fmicl": FMICLLoss,
    "infonce": InfoNCELoss,
    "align_uniform": AlignUniformLoss,
    "spectral": SpectralLoss,
}
