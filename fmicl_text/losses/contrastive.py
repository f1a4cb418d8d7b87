"""Losses on embeddings: normalize -> gather -> form pairs -> similarity -> objective. They do not depend on the model.

To add an objective, subclass `ContrastiveLoss`; its name and hyperparameters are read from the class.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fmicl_text.losses import objectives
from fmicl_text.losses.balance import AUTO, Balance, auto_gamma, is_auto, require_tail
from fmicl_text.losses.blockwise import (
    NEGATIVE_TERMS,
    BlockwiseConfig,
    OnePass,
    distinct,
    name_views,
    view_pairs,
    warn_without_negatives,
)
from fmicl_text.losses.checks import import_attribute, require_choice, require_positive
from fmicl_text.losses.distributed import (
    GLOBAL_BATCH,
    GatherWithGradient,
    gather_rows,
    row_counts,
    sum_over_ranks,
    world_size,
)
from fmicl_text.losses.divergences import (
    DIVERGENCES,
    FDivergence,
    derivative,
    load_divergence,
    log_ratio_of_score,
    uniformity_holds,
)
from fmicl_text.losses.objectives import PairObjective, Terms
from fmicl_text.losses.similarity import SIMILARITIES, Similarity, unit_rows

IN_BATCH = tuple(NEGATIVE_TERMS)
NEGATIVES = (*IN_BATCH, "queue")
BLOCKWISE_FROM = 512  # from this many rows, one pass in blocks is faster (eval/loss_benchmark.py --sizes 256 512 1024)
CPU_BLOCK, GPU_BLOCK = 512, 4096  # CPU: the buffers of a block fit the L2 cache; GPU: kernels are large enough
UNDERFLOW = -1.0  # stands for a mean of 0 over pairs that exist; without pairs, the negative term is 0
logger = logging.getLogger(__name__)


@contextmanager
def ieee_products() -> Iterator[None]:
    """Compute float32 matrix products in float32, even if the encoder's are in TF32 (or bfloat16 on a CPU), where the
    error of r would be up to 0.04 at gamma = 20."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class LossTerms(NamedTuple):
    """Scalars: the loss, which has a gradient, and its two summands without one, for logging."""

    loss: Tensor
    positive: Tensor
    negative: Tensor


class ContrastiveLoss(nn.Module):
    """Base class of the losses: applies `objective` to the similarities of all positive and negative pairs of a batch.

    A subclass implements `objective`. It stores its constructor's arguments as attributes of the same name, from which
    records and model cards read them, and may define `formula`.

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
    def objective(self) -> Callable[[Tensor, Tensor, Tensor], Terms]:
        """Function of similarities [N], [N, M] and the mask [N, M] that returns the two terms; see `objectives`."""
        raise NotImplementedError

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
        check_shapes(x, y, hard_negatives, text_ids)
        if (queue is None) == (self.negatives == "queue"):
            given = "None" if queue is None else list(queue.shape)
            raise ValueError(
                f"queue must be given if and only if negatives=queue; got negatives={self.negatives}, queue {given}"
            )
        if queue is not None:
            if queue.ndim != 2 or queue.shape[1:] != x.shape[1:] or not len(queue):
                raise ValueError(f"queue must be [K, {x.shape[1]}], K >= 1, got {list(queue.shape)}")
            if hard_negatives is not None or text_ids is not None:
                raise ValueError("queue replaces all other negatives: hard_negatives and text_ids must be None")
        distributed = self.global_batch != "none" and world_size() > 1
        if not len(x) and not distributed:  # otherwise, all processes raise an error together
            raise ValueError("x has no rows; a batch needs at least 1 example")
        hard = () if hard_negatives is None else hard_negatives.reshape(len(x), -1, x.shape[1]).unbind(1)
        with torch.autocast(x.device.type, enabled=False), ieee_products():
            objective = self.objective
            if queue is not None:
                return self.against_queue(x, y, queue, distributed)
            small = self.block_size is None and len(x) < BLOCKWISE_FROM
            if not isinstance(objective, PairObjective) or (small and not distributed):
                return self.whole_matrix(x, y, hard, text_ids, distributed)
            block_size = self.block_size or (CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK)
            shared = self.similarity, self.gamma, self.negatives, block_size, self.global_batch
            config = BlockwiseConfig(objective, *shared)
            ids = ids_of_rows(x, len(hard), text_ids, distributed)
            return LossTerms(*OnePass.apply(config, *ids, x, y, *hard))

    def mutual_information(
        self,
        x: Tensor,
        y: Tensor,
        hard_negatives: Tensor | None = None,
        text_ids: Tensor | None = None,
        queue: Tensor | None = None,
    ) -> Tensor | None:
        """A lower bound of the mutual information of the two views in nats, estimated from a batch.

        Returns:
            A scalar in float64, without gradient. nan in a batch without negative pairs. None if the objective does not
            estimate a density ratio.

        Args:
            x, y, hard_negatives, text_ids, queue: As in `terms`. Negatives that are not drawn independently of x, such
                as hard negatives, make it an estimate of another quantity.
        """
        return None

    def whole_matrix(
        self, x: Tensor, y: Tensor, hard: Sequence[Tensor], text_ids: Tensor | None, distributed: bool
    ) -> LossTerms:
        """`terms` by autograd through the similarities of this process's rows with all columns [N, M]."""
        own, hard_ids = ids_of_rows(x, len(hard), text_ids, distributed)
        units = {name: unit_rows(rows) for name, rows in name_views(x, y, hard).items()}
        pairs = view_pairs(self.negatives, len(hard))
        counts = row_counts(x) if distributed else [len(x)]
        own_columns, hard_columns = (torch.cat(gather_rows(ids, counts)) for ids in (own, hard_ids))
        ids_of_views = name_views(own_columns, own_columns, [ids[:, None] for ids in hard_columns.unbind(1)])
        masks = {view: distinct(own, ids) for view, ids in ids_of_views.items()}
        similarities, kept = [], []
        for row_view in dict.fromkeys(view for view, _ in pairs):  # one matrix product per view of the rows
            views = [view for first, view in pairs if first == row_view]
            columns = torch.stack([units[view] for view in views], dim=1)
            if distributed:
                columns = GatherWithGradient.apply(columns, counts)
            keep = torch.cat([masks[view] for view in views], dim=1)
            columns = columns.transpose(0, 1).flatten(0, 1)
            similarities.append(self.similarity.pairwise(units[row_view], columns, self.gamma, keep))
            kept.append(keep)
        keep = torch.cat(kept, dim=1)
        if text_ids is not None and not sum_over_ranks(keep.sum(), counts):
            warn_without_negatives(sum(counts))
        positive = self.similarity.paired(units["x"], units["y"], self.gamma)
        return mean_over_rows(self.objective(positive, torch.cat(similarities, dim=1), keep), counts)

    def against_queue(self, x: Tensor, y: Tensor, queue: Tensor, distributed: bool) -> LossTerms:
        """`terms` with the rows of a queue as the only negatives. No pair contains a row of another process."""
        x, y, queue = unit_rows(x), unit_rows(y), unit_rows(queue.detach())
        positive = self.similarity.paired(x, y, self.gamma)
        negative = self.similarity.pairwise(x, queue, self.gamma)
        counts = row_counts(x) if distributed else [len(x)]
        objective = self.objective
        if not isinstance(objective, PairObjective):
            return mean_over_rows(objective(positive, negative, torch.ones_like(negative, dtype=torch.bool)), counts)
        mean = objective.pair(negative).mean()
        if distributed:  # value of all processes' rows, gradient of this process's
            everyone = sum_over_ranks(mean.detach() * len(x) / sum(counts), counts)
            mean = everyone + mean - mean.detach()
        return mean_over_rows(Terms(-objective.score(positive).mean(), objective.outer(mean)), counts)


class ReadOut(ContrastiveLoss):
    """Another objective on the pairs of a loss."""

    def __init__(self, loss: ContrastiveLoss, objective: Callable[[Tensor, Tensor, Tensor], Terms]) -> None:
        super().__init__(loss.gamma, loss.negatives, loss.similarity, loss.block_size, loss.global_batch)
        self.given_objective = objective

    @property
    def objective(self) -> Callable[[Tensor, Tensor, Tensor], Terms]:
        return self.given_objective

    @torch.no_grad()
    def measure(
        self, x: Tensor, y: Tensor, hard_negatives: Tensor | None, text_ids: Tensor | None, queue: Tensor | None
    ) -> LossTerms:
        """`terms` in float64, without gradient."""
        device = torch.device("cpu") if x.device.type == "mps" else x.device  # which has no float64
        rows: Any = (None if t is None else t.detach().to(device, torch.float64) for t in (x, y, hard_negatives, queue))
        x, y, hard_negatives, queue = rows
        return self.terms(x, y, hard_negatives, None if text_ids is None else text_ids.to(device), queue)


def load_similarity(similarity: str | Similarity) -> Similarity:
    """A similarity by its name in `SIMILARITIES`."""
    if isinstance(similarity, Similarity):
        return similarity
    require_choice("similarity", similarity, SIMILARITIES)
    return SIMILARITIES[similarity]


def mean_over_rows(terms: Terms, counts: list[int]) -> LossTerms:
    """Means of the terms over all processes, weighted by their numbers of rows; with the gradient of this process's
    rows, times the number of processes because DDP averages."""
    if len(counts) == 1:
        return LossTerms(terms.positive + terms.negative, *(term.detach() for term in terms))
    weight = counts[dist.get_rank()] / sum(counts)
    share = (terms.positive + terms.negative) * weight
    positive, negative = sum_over_ranks(torch.stack(terms).detach() * weight, counts)
    return LossTerms(len(counts) * (share - share.detach()) + positive + negative, positive, negative)


def check_shapes(x: Tensor, y: Tensor, hard_negatives: Tensor | None, text_ids: Tensor | None) -> None:
    """Raise a ValueError if these arguments of `ContrastiveLoss.terms` do not match."""
    matches = hard_negatives is None or (
        hard_negatives.ndim in (2, 3) and (*hard_negatives.shape[:1], *hard_negatives.shape[-1:]) == x.shape
    )
    if x.ndim != 2 or x.shape != y.shape or not matches:
        shapes = [tuple(t.shape) for t in (x, y, hard_negatives) if t is not None]
        raise ValueError(f"x and y must be [N, D] and hard_negatives [N, D] or [N, K, D], got {shapes}")
    if text_ids is not None:
        num_hard = 0 if hard_negatives is None else hard_negatives[0].numel() // x.shape[1]
        widths = (2 + num_hard,) if num_hard else (1, 2)
        if text_ids.ndim != 2 or len(text_ids) != len(x) or text_ids.shape[1] not in widths:
            expected = f"[N, {' or '.join(map(str, widths))}] for {num_hard} hard negatives per example"
            raise ValueError(f"text_ids must be {expected}, N = {len(x)}, got {list(text_ids.shape)}")


def ids_of_rows(x: Tensor, num_hard: int, text_ids: Tensor | None, distributed: bool) -> tuple[Tensor, Tensor]:
    """Text ids [N, V] of the examples and [N, K] of their hard negatives. Without text_ids, all differ, across
    processes too if the batch is distributed."""
    if text_ids is not None:
        return text_ids[:, :2], text_ids[:, 2:]
    first = dist.get_rank() << 32 if distributed else 0
    own = torch.arange(first, first + len(x), device=x.device)[:, None]
    return own, -1 - (own * max(num_hard, 1) + torch.arange(num_hard, device=x.device))


class FMICLLoss(ContrastiveLoss):
    """f-MICL (arXiv 2402.10150): -mean f'(u(x_i, y_i)) + alpha mean_{i != j} (f* o f')(u(x_i, x_j)), u = e^r.

    Up to a constant, it is the negated lower bound of an f-mutual information. The constant is chosen such that
    distinct texts that are far apart add 0 (see `divergences`). `mutual_information` is a bound in nats for every f.

    >>> loss = FMICLLoss(divergence="js", gamma=1.0, alpha=40.0)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> round(loss(x, x).item(), 4)                        # 40 log(1 + e^-2)
    5.0771

    By default, the first call measures gamma and alpha on its own batch, of all processes, each of which must make that
    call. gamma is then at most 6 / (k d^2), where d^2 is the mean squared distance of positive pairs. At this alpha, a
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

    def terms(
        self,
        x: Tensor,
        y: Tensor,
        hard_negatives: Tensor | None = None,
        text_ids: Tensor | None = None,
        queue: Tensor | None = None,
    ) -> LossTerms:
        self.measure_gamma(x, y)
        if is_auto(self.alpha):
            balance = self.balance(x, y, hard_negatives, text_ids, queue)
            if balance.positive and not math.isnan(balance.positive[0] + balance.negative[0]):  # else the loss is nan
                self.alpha = balance.alpha
                if world_size() == 1 or dist.get_rank() == 0:
                    logger.info("alpha=auto: alpha is %.6g, measured on the first batch", self.alpha)
        return super().terms(x, y, hard_negatives, text_ids, queue)

    terms.__doc__ = ContrastiveLoss.terms.__doc__

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
        self.measure_gamma(x, y)
        score, conjugate = self.similarity.score_and_conjugate(self.divergence)
        slope = derivative(conjugate)
        objective = PairObjective(
            derivative(score),
            lambda r: slope(r).masked_fill(conjugate(r).isinf(), torch.inf),
            lambda mean: mean.where(mean != 0, UNDERFLOW),
        )
        found = ReadOut(self, objective).measure(x, y, hard_negatives, text_ids, queue)
        has_pairs, negative = found.negative != 0, found.negative.clamp_min(0)
        sums = torch.stack([-found.positive, negative, torch.ones_like(negative)]).where(has_pairs, 0)
        if self.global_batch == "none" and world_size() > 1:
            dist.all_reduce(sums)
        attraction, repulsion, count = sums.tolist()
        return Balance((attraction / count,), (repulsion / count,)) if count else Balance()

    @torch.no_grad()
    def measure_gamma(self, x: Tensor, y: Tensor) -> None:
        """If gamma is "auto", set it by the positive pairs of a batch [N, D] of all processes, each of which must call
        this; see `auto_gamma`. Rows that are not finite leave it to the next batch."""
        if not self.gamma_is_auto or x.shape != y.shape:
            return
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        distances = -self.similarity.paired(unit_rows(x.detach().to(exact)), unit_rows(y.detach().to(exact)), 1.0)
        sums = torch.stack([distances.sum(), distances.new_tensor(len(x))])
        if world_size() > 1:
            dist.all_reduce(sums)
        total, count = sums.tolist()
        if count and math.isfinite(total):
            self.gamma = auto_gamma(self.divergence, self.similarity, total / count)
            if world_size() == 1 or dist.get_rank() == 0:
                logger.info("gamma=auto: gamma is %.6g, measured on the first batch", self.gamma)

    def require_finite_alpha(self) -> None:
        """Raise a ValueError if the divergence has no tail for which alpha can be measured."""
        if self.similarity.is_log_ratio:
            require_tail("alpha", self.divergence)

    def mutual_information(
        self,
        x: Tensor,
        y: Tensor,
        hard_negatives: Tensor | None = None,
        text_ids: Tensor | None = None,
        queue: Tensor | None = None,
    ) -> Tensor:
        """A lower bound of the mutual information of the two views in nats: E_p[r] - log E_q[e^r] (Donsker and
        Varadhan), over positive and over negative pairs.

        At the optimum of f-MICL, alpha e^r is the density ratio for every f, and this is the mutual information. It is
        the largest over c of the bounds E_p[r + log c] - c E_q[e^r] + 1 of Nguyen, Wainwright and Jordan (arXiv
        0809.0853). That of c = alpha is far below if the tail exponent k is above 1: alpha is the weight of e^(kr).
        A scalar in float64; see `ContrastiveLoss.mutual_information`.
        """

        def log_density_ratio(similarities: Tensor) -> Tensor:
            if self.similarity.is_log_ratio:
                return similarities
            return log_ratio_of_score(self.divergence, similarities)[0] + 0 * similarities

        tiny = torch.finfo(torch.float64).tiny  # 0 is left for batches without negative pairs
        objective = PairObjective(
            log_density_ratio, lambda r: log_density_ratio(r).exp(), lambda mean: mean.clamp_min(tiny)
        )
        found = ReadOut(self, objective).measure(x, y, hard_negatives, text_ids, queue)
        return (-found.positive - found.negative.log()).where(found.negative != 0, torch.nan)

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
        own = f"{self.divergence.name}, a user-defined convex function", "f'(e^r)", "(f* o f')(e^r)"
        f, score, conjugate = self.divergence.formulas or own
        symbol = self.similarity.symbol
        if not self.similarity.is_log_ratio:
            score, conjugate = symbol, f"f*({symbol})"
        definition = self.similarity.definition or f"{symbol} = {self.similarity.name} similarity of unit embeddings"
        return (
            f"    loss = -mean score({symbol} of positives) + alpha mean conjugate({symbol} of negatives)\n"
            f"    score({symbol}) = {score}\n    conjugate({symbol}) = {conjugate}\n\n"
            f"for f(u) = {f}, and {definition}."
        )


def as_divergence(value: Any) -> FDivergence:
    """A divergence, given itself or its name; see `load_divergence`."""
    value = load_divergence(value) if isinstance(value, str) else value
    if not isinstance(value, FDivergence):
        got = type(value).__name__
        raise ValueError(f"divergence must be a name or an FDivergence, such as from_convex makes, got {got}")
    return value


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
    def objective(self) -> Callable[[Tensor, Tensor, Tensor], Terms]:
        return objectives.infonce

    def mutual_information(
        self,
        x: Tensor,
        y: Tensor,
        hard_negatives: Tensor | None = None,
        text_ids: Tensor | None = None,
        queue: Tensor | None = None,
    ) -> Tensor:
        """log N - loss, where N is the number of candidates of a row, including its positive (arXiv 1807.03748); see
        `ContrastiveLoss.mutual_information`."""
        return -ReadOut(self, objectives.infonce_bound).measure(x, y, hard_negatives, text_ids, queue).loss


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


def constructor_arguments(loss_class: type[ContrastiveLoss]) -> list[str]:
    """Names of the arguments of a class's constructor, including those that it passes to its base as **kwargs."""
    names: dict[str, None] = {}
    for base in loss_class.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base).parameters.values()
            variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            names |= dict.fromkeys(parameter.name for parameter in parameters if parameter.kind not in variadic)
            if all(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in parameters):
                break
    return list(names)


def to_json(value: Any) -> Any:
    """A hyperparameter as a JSON-serializable value: divergences, similarities, functions and classes by name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Tensor | np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, FDivergence):
        return value.source or value.name
    if isinstance(value, Similarity):
        return value.name
    return value.__name__ if inspect.isroutine(value) or isinstance(value, type) else type(value).__name__


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
