"""The losses: f-MICL and baselines. Each is an objective on the pairs of a batch of embeddings (`pairs`).

To add an objective, subclass `ContrastiveLoss`; its name and hyperparameters are read from the class.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fmicl_text.losses import objectives
from fmicl_text.losses.balance import AUTO, Balance, Distances, auto_gamma, is_auto, require_tail
from fmicl_text.losses.blockwise import NEGATIVE_TERMS
from fmicl_text.losses.checks import import_attribute, require_choice, require_positive
from fmicl_text.losses.description import constructor_arguments, fmicl_formula, to_json
from fmicl_text.losses.distributed import GLOBAL_BATCH, world_size
from fmicl_text.losses.divergences import DIVERGENCES, FDivergence, as_divergence, uniformity_holds
from fmicl_text.losses.measurements import balance_at, distances_at, information_at, terms_in_float64
from fmicl_text.losses.objectives import Objective, PairObjective
from fmicl_text.losses.pairs import Batch, LossTerms, PairSettings, terms_of
from fmicl_text.losses.similarity import Similarity, load_similarity

IN_BATCH = tuple(NEGATIVE_TERMS)
NEGATIVES = (*IN_BATCH, "queue")
logger = logging.getLogger(__name__)


class ContrastiveLoss(nn.Module):
    """Base class of the losses: applies `objective` to the similarities of all positive and negative pairs of a batch.

    A subclass implements `objective`, or overrides `terms` if its loss is not one of pairs. It stores its constructor's
    arguments as attributes of the same name, from which records and model cards read them, and may define `formula`.

    Args:
        gamma: 1/(2 sigma^2) of the Gaussian log ratio r = -gamma ||x - y||^2; finite, > 0.
        negatives: `same_view` pairs (x_i, x_j), `cross_view` pairs (x_i, y_j), or `both`; i != j. `queue` pairs
            (x_i, k), where k is a row of a queue that each call receives.
        similarity: `gaussian`, `cosine`, or a `Similarity`.
        block_size: Rows per block of pairs, >= 1; memory is then linear in N. None uses the full matrix for N < 512 in
            a single process, and chooses a block size otherwise. The gradient of a blockwise loss can be computed only
            once, and cannot be differentiated.
        global_batch: Under torch.distributed, `none` is the loss of this process's rows alone. `gather` and `ring` are
            the loss of all processes' rows (whose numbers may differ), the same value in each process, with gradients
            times the number of processes because DDP and FSDP average them; every process must call it. `ring` keeps
            the rows of two processes in memory at a time instead of all.

    Raises:
        ValueError: A hyperparameter is out of range. The message names it, the value received and the accepted values.
    """

    must_be_positive: tuple[str, ...] = ("gamma",)  # names of hyperparameters that must be finite and > 0
    may_be_auto: tuple[str, ...] = ()  # those that accept "auto"

    def __init__(
        self,
        gamma: float,
        negatives: str,
        similarity: str | Similarity = "gaussian",
        block_size: int | None = None,
        global_batch: str = "none",
    ) -> None:
        super().__init__()
        if block_size is not None and block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.gamma, self.negatives, self.similarity = gamma, negatives, load_similarity(similarity)
        self.block_size, self.global_batch = block_size, global_batch

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Hyperparameters may change during training, e.g. `loss.alpha = 4000.0`; they are checked as
        in the constructor, and take effect at the next call."""
        if name in self.must_be_positive:
            require_positive(name, value, or_auto=name in self.may_be_auto)
        elif name == "negatives":
            require_choice(name, value, [*NEGATIVE_TERMS, "queue"])
        elif name == "global_batch":
            require_choice(name, value, GLOBAL_BATCH)
        elif name == "similarity":
            value = load_similarity(value)
        super().__setattr__(name, value)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Constructor arguments that define the objective, as JSON-serializable values, for records and model cards.

        A similarity is given by its name, a divergence by its name, or the `package.module:attribute` that it was
        loaded from, and its parameters. Arguments that are not plain attributes, and
        `block_size`, which does not change the value, are skipped."""
        values = {name: vars(self)[name] for name in constructor_arguments(type(self)) if name in vars(self)}
        values.pop("block_size", None)
        if not self.similarity.uses_gamma:
            values.pop("gamma", None)
        found = {name: to_json(value) for name, value in values.items()}
        for value in values.values():
            found |= value.parameters if isinstance(value, FDivergence) else {}
        return found

    @property
    def formula(self) -> str:
        """The loss as Markdown, for model cards: by default, the first line of the class's docstring."""
        lines = (type(self).__doc__ or "").strip().splitlines()
        return lines[0] if lines else f"`{type(self).__name__}`"

    @property
    def objective_name(self) -> str:
        """Name in records and model cards: the key in `OBJECTIVES`, or the class's own name in snake case."""
        for name, loss_class in OBJECTIVES.items():
            if type(self) is loss_class:
                return name
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()

    @property
    def objective(self) -> Objective:
        """Function of similarities [N], [N, M] and the mask [N, M] that returns the two terms; see `objectives`."""
        raise NotImplementedError(f"{type(self).__name__} must implement `objective`, or override `terms`")

    @property
    def pair_settings(self) -> PairSettings:
        """The pairs that this loss compares, by which similarity."""
        return PairSettings(self.similarity, self.gamma, self.negatives, self.block_size, self.global_batch)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        hard_negatives: Tensor | None = None,
        text_ids: Tensor | None = None,
        queue: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar; see `terms`."""
        return self.terms(x, y, hard_negatives, text_ids, queue).loss

    def terms(
        self,
        x: Tensor,
        y: Tensor,
        hard_negatives: Tensor | None = None,
        text_ids: Tensor | None = None,
        queue: Tensor | None = None,
    ) -> LossTerms:
        """The loss and its two terms, in float32, outside autocast.

        Args:
            x: First views [N, D], N >= 1, any scale (normalized here), differentiable.
            y: Second views [N, D].
            hard_negatives: One additional negative per example [N, D], or K of them [N, K, D]. Those of example j are
                negatives of every x_i, also of x_j.
            text_ids: Integers [N, V], equal where texts are equal: column 0 for x, 1 for y (the same as x if absent), 2
                to K + 1 for hard_negatives. Examples that share a text are not negatives of each other. In a batch
                without any negative pair, the negative term is 0.
            queue: Negatives of every x_i (MoCo, arXiv 1911.05722), [K, D], K >= 1, the same in all processes, without
                gradient. Required with negatives `queue` and not accepted otherwise; excludes hard_negatives and
                text_ids.

        Raises:
            ValueError: Shapes do not match, or there are no examples.

        Warns:
            UserWarning: There is no negative pair in a batch of several examples, because they share a text.
        """
        batch = Batch(x, y, hard_negatives, text_ids, queue)
        self.measure_auto(batch)
        return terms_of(self.objective, self.pair_settings, batch)

    def measure_auto(self, batch: Batch) -> None:
        """Set hyperparameters that are "auto" by a batch."""

    def mutual_information(
        self,
        x: Tensor,
        y: Tensor,
        hard_negatives: Tensor | None = None,
        text_ids: Tensor | None = None,
        queue: Tensor | None = None,
    ) -> Tensor | None:
        """A lower bound of the mutual information of the two views in nats, estimated from a batch.

        f-MICL: see `measurements.information_at`. InfoNCE: log N - loss.

        Returns:
            A scalar in float64, without gradient. nan in a batch without negative pairs. None if the objective does not
            estimate a density ratio.

        Args:
            x, y, hard_negatives, text_ids, queue: As in `terms`. Negatives that are not drawn independently of x, such
                as hard negatives, make it an estimate of another quantity.
        """
        return self.information_at(Batch(x, y, hard_negatives, text_ids, queue))

    def information_at(self, batch: Batch) -> Tensor | None:
        """`mutual_information`, in subclasses that estimate a density ratio."""
        return None


class FMICLLoss(ContrastiveLoss):
    """f-MICL (arXiv 2402.10150): -mean f'(u(x_i, y_i)) + alpha mean_{i != j} (f* o f')(u(x_i, x_j)), u = e^r.

    Up to a constant, it is the negated lower bound of an f-mutual information. The constant is chosen such that
    distinct texts that are far apart add 0 (see `divergences`). `mutual_information` is a bound in nats for every f.

    >>> import torch
    >>> loss = FMICLLoss(divergence="js", gamma=1.0, alpha=40.0)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> round(loss(x, x).item(), 4)                        # 40 log(1 + e^-2)
    5.0771

    By default, the first call measures gamma and alpha on its own batch, of all processes, each of which must make that
    call. gamma follows how far positive pairs are closer than negative ones (see `auto_gamma`). At this alpha, a
    constant added to every r does not change the loss (see `Balance`). `loss.gamma` and `loss.alpha` are then numbers.
    `FMICLTrainer` measures them before the first step, alpha on several batches.

    >>> loss = FMICLLoss(divergence="js")
    >>> loss.gamma, loss.alpha, loss(x, x).item() > 0, round(math.log(loss.alpha), 4)      # log(e^40/2)
    (20.0, 'auto', True, 39.3069)

    Args:
        divergence: A name, see `load_divergence`; or an `FDivergence`, e.g. `FDivergence.from_convex(f)` for any f.
        gamma: 1/(2 sigma^2), finite, > 0. `auto` is measured at the first call, see `balance.auto_gamma`; until then,
            the attribute is the largest, 20 / k, where k is the divergence's `tail_exponent`. The paper uses 20 for
            text, 1 for vision. Unused by `cosine`.
        alpha: Weight of the negative term, finite, > 0. `auto` is measured at the first call; the paper uses 409600 for
            text, 40 for vision.
        negatives: `same_view` as in the paper, `cross_view`, `both` or `queue`; see `ContrastiveLoss`.
        similarity: `gaussian`, the f-Gaussian similarity f'(e^r); `cosine`, the paper's baseline, which replaces
            f'(u) with x.y and the conjugate with f*(x.y), inf where x.y is above the range of f'; or a `Similarity`.
        block_size: See `ContrastiveLoss`.
        global_batch: See `ContrastiveLoss`.

    Raises:
        ValueError: See `ContrastiveLoss`; or `auto` with a divergence without positive tail exponent.

    Warns:
        UserWarning: The uniformity condition does not hold, so embeddings may collapse.
    """

    must_be_positive = ("gamma", "alpha")
    may_be_auto = ("gamma", "alpha")

    def __init__(
        self,
        divergence: str | FDivergence = "kl",
        gamma: float | str = "auto",
        alpha: float | str = "auto",
        negatives: str = "same_view",
        similarity: str | Similarity = "gaussian",
        block_size: int | None = None,
        global_batch: str = "none",
    ) -> None:
        divergence, similarity = as_divergence(divergence), load_similarity(similarity)
        width: Any = auto_gamma(divergence, similarity) if is_auto(gamma) else gamma
        super().__init__(width, negatives, similarity, block_size, global_batch)
        self.divergence = divergence
        self.gamma: Any = gamma
        self.alpha: Any = alpha
        if self.similarity.uniformity_condition and not uniformity_holds(divergence, width):
            holds = [name for name, record in DIVERGENCES.items() if uniformity_holds(record, width)]
            warnings.warn(
                f"divergence {self.divergence.name!r} with gamma {width:g} fails the uniformity condition (the "
                "negative term is not strictly convex in the squared distance): nothing forces embeddings to spread "
                f"evenly, and they may collapse. Divergences that satisfy it: {', '.join(holds)}.",
                stacklevel=2,
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "divergence":
            value = as_divergence(value)
        elif name == "gamma":
            self.gamma_is_auto = is_auto(value) and self.similarity.uses_gamma
            value = auto_gamma(self.divergence, self.similarity) if is_auto(value) else value
        elif name == "alpha" and is_auto(value):
            self.require_finite_alpha()
        super().__setattr__(name, value)

    @property
    def objective(self) -> PairObjective:
        """While alpha is "auto", that of alpha = 1: of batches without negative pairs, whose negative term is 0."""
        score, conjugate = self.similarity.score_and_conjugate(self.divergence)
        return objectives.fmicl(score=score, conjugate=conjugate, alpha=1.0 if is_auto(self.alpha) else self.alpha)

    def measure_auto(self, batch: Batch) -> None:
        self.measure_gamma(batch)
        if not is_auto(self.alpha):
            return
        balance = self.balance(*batch)
        if balance.positive and not math.isnan(balance.positive[0] + balance.negative[0]):  # else the loss is nan
            self.alpha = balance.alpha
            if world_size() == 1 or dist.get_rank() == 0:
                logger.info("alpha=auto: alpha is %.6g, measured on the first batch", self.alpha)

    def measure_gamma(self, batch: Batch) -> None:
        """If gamma is "auto", set it by the `distances` of a batch. Without negative pairs, and with rows that are not
        finite, it is left to the next batch."""
        if not self.gamma_is_auto:
            return
        separation = self.distances(*batch).separation
        if not math.isnan(separation):
            self.gamma = auto_gamma(self.divergence, self.similarity, separation)
            if world_size() == 1 or dist.get_rank() == 0:
                logger.info("gamma=auto: gamma is %.6g, measured on the first batch", self.gamma)

    def balance(
        self,
        x: Tensor,
        y: Tensor,
        hard_negatives: Tensor | None = None,
        text_ids: Tensor | None = None,
        queue: Tensor | None = None,
    ) -> Balance:
        """The `Balance` of this loss at a batch, in float64 and without gradient. alpha is not used and not changed;
        gamma is measured first if it is "auto".

        Args:
            x, y, hard_negatives, text_ids, queue: As in `terms`. Under torch.distributed, every process must call this,
                also with global_batch `none`: then it is the mean of the processes' own batches.

        Raises:
            ValueError: See `terms`; or no alpha can balance this divergence.
        """
        self.require_finite_alpha()
        batch = Batch(x, y, hard_negatives, text_ids, queue)
        self.measure_gamma(batch)
        return balance_at(self.divergence, self.pair_settings, batch)

    def distances(
        self,
        x: Tensor,
        y: Tensor,
        hard_negatives: Tensor | None = None,
        text_ids: Tensor | None = None,
        queue: Tensor | None = None,
    ) -> Distances:
        """The `Distances` of the pairs of this loss in a batch, in float64 and without gradient; see `balance`."""
        return distances_at(self.pair_settings, Batch(x, y, hard_negatives, text_ids, queue))

    def information_at(self, batch: Batch) -> Tensor:
        return information_at(self.divergence, self.pair_settings, batch)

    def require_finite_alpha(self) -> None:
        """Raise a ValueError if the divergence has no tail for which alpha can be measured."""
        if self.similarity.is_log_ratio:
            require_tail("alpha", self.divergence)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        found = super().hyperparameters
        return found | {"gamma": AUTO} if self.gamma_is_auto else found

    hyperparameters.__doc__ = ContrastiveLoss.hyperparameters.__doc__

    @property
    def objective_name(self) -> str:
        return f"{super().objective_name}-{self.divergence.name}"

    @property
    def formula(self) -> str:
        return fmicl_formula(self.divergence, self.similarity)


class InfoNCELoss(ContrastiveLoss):
    """InfoNCE on cosines; the defaults are those of SimCSE.

    Args:
        temperature: Temperature of the softmax, finite, > 0 (= 1/(2 gamma)).
        negatives: See `FMICLLoss`; `cross_view` by default.
        global_batch: `none` or `gather`: the log-sum-exp of a row needs all columns, so their gradient is summed over
            the processes in the backward pass.
    """

    must_be_positive = ("gamma", "temperature")
    formula = (
        "    loss = -mean log( p_i / (p_i + sum over negatives e^(x_i.n/temperature)) ), p_i = e^(x_i.y_i/temperature)"
    )

    def __init__(self, temperature: float = 0.05, negatives: str = "cross_view", global_batch: str = "none") -> None:
        require_positive("temperature", temperature)
        super().__init__(gamma=1 / (2 * temperature), negatives=negatives, global_batch=global_batch)
        self.temperature = temperature

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "global_batch":
            require_choice(name, value, ["none", "gather"])
        super().__setattr__(name, value)
        if name == "temperature":
            self.gamma = 1 / (2 * value)

    @property
    def objective(self) -> Objective:
        return objectives.infonce

    def information_at(self, batch: Batch) -> Tensor:
        return -terms_in_float64(objectives.infonce_bound, self.pair_settings, batch).loss


class AlignUniformLoss(ContrastiveLoss):
    """Alignment + uniformity (Wang & Isola, arXiv 2005.10242): mean ||x - y||^2 + alpha log mean e^{-gamma d^2}.

    Args:
        gamma: The paper's t (2 there); > 0, at most 36, beyond which the exponential of opposite rows
            underflows in float32, even shifted as in `objectives.align_uniform`.
        alpha: Weight of the uniformity term, finite, > 0.
        negatives, block_size, global_batch: See `FMICLLoss`.
    """

    must_be_positive = ("gamma", "alpha")
    formula = "    loss = mean ||x_i - y_i||^2 + alpha log mean over negatives e^(-gamma ||x_i - n||^2)"

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float = 1.0,
        negatives: str = "same_view",
        block_size: int | None = None,
        global_batch: str = "none",
    ) -> None:
        super().__init__(gamma, negatives, block_size=block_size, global_batch=global_batch)
        self.alpha = alpha

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "gamma":
            require_positive(name, value)
        if name == "gamma" and value > 36:
            raise ValueError(f"gamma must be at most 36 for alignment + uniformity, got {value}")
        super().__setattr__(name, value)

    @property
    def objective(self) -> PairObjective:
        return objectives.align_uniform(gamma=self.gamma, alpha=self.alpha)


class SpectralLoss(ContrastiveLoss):
    """Spectral contrastive loss (HaoChen et al., arXiv 2106.04156): -2 mean x.y + alpha mean (x_i.y_j)^2.

    Args:
        alpha: Weight of the negative term, finite, > 0.
        negatives: See `FMICLLoss`; `cross_view` by default.
        block_size, global_batch: See `FMICLLoss`.
    """

    must_be_positive = ("gamma", "alpha")
    formula = "    loss = -2 mean x_i.y_i + alpha mean over negatives (x_i.n)^2"

    def __init__(
        self,
        alpha: float = 1.0,
        negatives: str = "cross_view",
        block_size: int | None = None,
        global_batch: str = "none",
    ) -> None:
        super().__init__(gamma=0.5, negatives=negatives, block_size=block_size, global_batch=global_batch)
        self.alpha = alpha

    @property
    def objective(self) -> PairObjective:
        return objectives.spectral(alpha=self.alpha)


OBJECTIVES: dict[str, type[ContrastiveLoss]] = {
    "fmicl": FMICLLoss,
    "infonce": InfoNCELoss,
    "align_uniform": AlignUniformLoss,
    "spectral": SpectralLoss,
}


def load_objective(name: str) -> type[ContrastiveLoss]:
    """Load a loss class by name.

    Args:
        name: A key of `OBJECTIVES`, or `package.module:Class`, a subclass of `ContrastiveLoss`.

    Raises:
        ValueError: There is no such objective, module or attribute, or the attribute is not such a class.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    expected = f"one of {', '.join(OBJECTIVES)}, or package.module:Class, a subclass of ContrastiveLoss"
    found = import_attribute("objective", name, expected)
    if not (isinstance(found, type) and issubclass(found, ContrastiveLoss)):
        raise ValueError(f"objective={name}: not a subclass of ContrastiveLoss, expected {expected}")
    return found
