"""Losses on embeddings: normalize -> gather -> pair up -> similarity -> objective. A loss never sees a model."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fmicl_text.errors import InputError
from fmicl_text.losses import objectives
from fmicl_text.losses.blockwise import NEGATIVE_TERMS, BlockwiseConfig, OnePass, distinct
from fmicl_text.losses.distributed import (
    GLOBAL_BATCH,
    GatherWithGradient,
    gather_rows,
    row_counts,
    sum_over_ranks,
    world_size,
)
from fmicl_text.losses.divergences import DIVERGENCES, FDivergence, convex_conjugate, uniformity_holds
from fmicl_text.losses.objectives import PairObjective, Terms
from fmicl_text.losses.similarity import SIMILARITIES, unit_rows

IN_BATCH = tuple(NEGATIVE_TERMS)
NEGATIVES = (*IN_BATCH, "queue")
BLOCKWISE_FROM = 512  # rows from which one pass in blocks is faster (eval/loss_benchmark.py --sizes 256 512 1024)
CPU_BLOCK, GPU_BLOCK = 512, 4096  # the few buffers of a block fit the L2 cache; a launch has enough to do


@contextmanager
def ieee_products() -> Iterator[None]:
    """Matrix products of float32 in float32, though the encoder's may be in TF32 (or bfloat16 on a CPU): that would put
    r off by up to 0.04 at gamma = 20."""
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
    """Scalars: the loss, which carries the gradient, and the two terms whose sum it is, for the log."""

    loss: Tensor
    positive: Tensor
    negative: Tensor


def require_choice(name: str, value: str, accepted: tuple[str, ...] | list[str]) -> None:
    """ValueError naming the argument, unless value is one of those accepted."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")


def require_positive(name: str, value: float) -> None:
    """ValueError naming the argument, unless value is a finite number > 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value}")


class ContrastiveLoss(nn.Module):
    """Base of the losses: holds the hyperparameters that all share.

    Args:
        gamma: 1/(2 sigma^2) of the Gaussian log ratio r = -gamma ||x - y||^2; finite, > 0.
        negatives: `same_view` pairs (x_i, x_j), `cross_view` pairs (x_i, y_j), or `both`; i != j. `queue` pairs
            (x_i, k), k of a queue that each call is given.
        similarity: `gaussian` or `cosine`.
        block_size: Rows of a block of pairs, >= 1; memory is then linear in N. None takes the whole matrix for small
            N and chooses blocks from N = 512 on. The gradient of a loss in blocks can be taken once, and has none.
        global_batch: Under torch.distributed, `none` is a loss of this process's rows alone. `gather` and `ring` are
            the loss of all processes' rows (which may differ in number), the same value in each, with gradients times
            the number of processes because DDP and FSDP average them; every process must call it. `ring` holds the
            rows of two processes at a time instead of all.

    Raises:
        ValueError: A hyperparameter outside its range; names it, the value received and what is accepted.
    """

    def __init__(
        self,
        gamma: float,
        negatives: str,
        similarity: str = "gaussian",
        block_size: int | None = None,
        global_batch: str = "none",
    ) -> None:
        super().__init__()
        require_positive("gamma", gamma)
        require_choice("negatives", negatives, NEGATIVES)
        require_choice("similarity", similarity, list(SIMILARITIES))
        require_choice("global_batch", global_batch, GLOBAL_BATCH)
        if block_size is not None and block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.gamma, self.negatives, self.similarity = gamma, negatives, similarity
        self.block_size, self.global_batch = block_size, global_batch

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Constructor arguments that say what is minimized, the divergence by name; what settings files and model cards
        record."""
        values = {
            name: getattr(self, name) for name in inspect.signature(type(self)).parameters if name != "block_size"
        }
        if self.similarity == "cosine":
            del values["gamma"]
        return {name: value.name if isinstance(value, FDivergence) else value for name, value in values.items()}

    @property
    def objective(self) -> Callable[[Tensor, Tensor, Tensor], Terms]:
        """From similarities [N], [N, M] and the mask [N, M] to the two terms; see `objectives`."""
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
            x: First views [N, D], N >= 2, any scale (normalized here), differentiable.
            y: Second views [N, D].
            hard_negatives: One negative more per example [N, D]; row j is a negative of every x_i, j = i included.
            text_ids: Integers [N, V], equal where texts are equal: column 0 for x, 1 for y (absent: as x), 2 for
                hard_negatives. Pairs of examples that share a text are no negatives of each other.
            queue: With negatives `queue`, and only then, those of every x_i (MoCo, arXiv 1911.05722), [K, D], K >= 1,
                the same in all processes; gets no gradient, and goes with neither hard_negatives nor text_ids.

        Raises:
            ValueError: Shapes that do not fit, fewer than 2 examples, or no negative left because all texts are
                equal.
        """
        if x.ndim != 2 or x.shape != y.shape or (hard_negatives is not None and hard_negatives.shape != x.shape):
            shapes = [tuple(t.shape) for t in (x, y, hard_negatives) if t is not None]
            raise ValueError(f"x, y and hard_negatives must all be [N, D], got {shapes}")
        if text_ids is not None:
            widths = (1, 2, 3) if hard_negatives is None else (3,)
            if text_ids.ndim != 2 or len(text_ids) != len(x) or text_ids.shape[1] not in widths:
                expected = "[N, 1 to 3]" if hard_negatives is None else "[N, 3] with hard_negatives"
                raise ValueError(f"text_ids must be {expected}, N = {len(x)}, got {list(text_ids.shape)}")
        if (queue is None) == (self.negatives == "queue"):
            raise ValueError(
                f"a queue goes with negatives queue, got negatives {self.negatives}, queue {queue is not None}"
            )
        if queue is not None:
            if queue.ndim != 2 or queue.shape[1:] != x.shape[1:] or not len(queue):
                raise ValueError(f"queue must be [K, {x.shape[1]}], K >= 1, got {list(queue.shape)}")
            if hard_negatives is not None or text_ids is not None:
                raise ValueError("a queue replaces all other negatives: no hard_negatives or text_ids beside it")
        distributed = self.global_batch != "none" and world_size() > 1
        if len(x) < 2 and not distributed:
            raise ValueError(f"a batch needs at least 2 examples to have a negative, got {len(x)}")
        with torch.autocast(x.device.type, enabled=False), ieee_products():
            objective = self.objective
            if queue is not None:
                return self.against_queue(x, y, queue, distributed)
            small = self.block_size is None and len(x) < BLOCKWISE_FROM
            if not isinstance(objective, PairObjective) or (small and not distributed):
                return self.whole_matrix(x, y, hard_negatives, text_ids, distributed)
            block_size = self.block_size or (CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK)
            similarity = SIMILARITIES[self.similarity]
            plan = BlockwiseConfig(objective, similarity, self.gamma, self.negatives, block_size, self.global_batch)
            return LossTerms(*OnePass.apply(plan, *ids_of_rows(x, text_ids, distributed), x, y, hard_negatives))

    def whole_matrix(
        self, x: Tensor, y: Tensor, hard: Tensor | None, text_ids: Tensor | None, distributed: bool
    ) -> LossTerms:
        """As `terms`, by autograd through the similarities of this process's rows with all columns [N, M]."""
        own, hard_ids = ids_of_rows(x, text_ids, distributed)
        x, y = unit_rows(x), unit_rows(y)
        views = [{"x": x, "y": y}[view] for _, view in NEGATIVE_TERMS[self.negatives]]
        columns = torch.stack(views + ([] if hard is None else [unit_rows(hard)]), dim=1)
        counts = row_counts(x) if distributed else [len(x)]
        own_columns, hard_columns = (torch.cat(gather_rows(ids, counts)) for ids in (own, hard_ids))
        if distributed:
            columns = GatherWithGradient.apply(columns, counts)
        masks = [distinct(own, own_columns)] * len(views) + ([] if hard is None else [distinct(own, hard_columns)])
        keep = torch.cat(masks, dim=1)
        if text_ids is not None and not sum_over_ranks(keep.sum(), counts):
            raise InputError(f"no negative pair in the batch: all {sum(counts)} texts are equal")
        paired, pairwise = SIMILARITIES[self.similarity].paired, SIMILARITIES[self.similarity].pairwise
        terms = self.objective(
            paired(x, y, self.gamma), pairwise(x, columns.transpose(0, 1).flatten(0, 1), self.gamma), keep
        )
        return mean_over_rows(terms, counts)

    def against_queue(self, x: Tensor, y: Tensor, queue: Tensor, distributed: bool) -> LossTerms:
        """As `terms`, with the rows of a queue as the only negatives: nothing of a pair is another process's."""
        x, y, queue = unit_rows(x), unit_rows(y), unit_rows(queue.detach())
        paired, pairwise = SIMILARITIES[self.similarity].paired, SIMILARITIES[self.similarity].pairwise
        positive, negative = paired(x, y, self.gamma), pairwise(x, queue, self.gamma)
        counts = row_counts(x) if distributed else [len(x)]
        objective = self.objective
        if not isinstance(objective, PairObjective):
            return mean_over_rows(objective(positive, negative, torch.ones_like(negative, dtype=torch.bool)), counts)
        mean = objective.pair(negative).mean()
        if distributed:  # its value over all processes' rows, its gradient in this process's
            everyone = sum_over_ranks(mean.detach() * len(x) / sum(counts), counts)
            mean = everyone + mean - mean.detach()
        return mean_over_rows(Terms(-objective.score(positive).mean(), objective.outer(mean)), counts)


def mean_over_rows(terms: Terms, counts: list[int]) -> LossTerms:
    """Means of terms over the rows of all processes, weighed by their numbers; the gradient is that of this process's
    rows, times the number of processes because DDP averages."""
    if len(counts) == 1:
        return LossTerms(terms.positive + terms.negative, *(term.detach() for term in terms))
    weight = counts[dist.get_rank()] / sum(counts)
    share = (terms.positive + terms.negative) * weight
    positive, negative = sum_over_ranks(torch.stack(terms).detach() * weight, counts)
    return LossTerms(len(counts) * (share - share.detach()) + positive + negative, positive, negative)


def ids_of_rows(x: Tensor, text_ids: Tensor | None, distributed: bool) -> tuple[Tensor, Tensor]:
    """Text ids [N, V] of the examples and [N, 0 or 1] of their hard negatives. Without text_ids no two are equal, in
    all processes if the batch is spread over them."""
    if text_ids is not None:
        return text_ids[:, :2], text_ids[:, 2:]
    first = dist.get_rank() << 32 if distributed else 0
    own = torch.arange(first, first + len(x), device=x.device)[:, None]
    return own, -1 - own


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
        negatives: `same_view` as in the paper, `cross_view`, `both` or `queue`; see `ContrastiveLoss`.
        similarity: `gaussian`, the f-Gaussian similarity f'(e^r); or `cosine`, the paper's comparison, which puts
            x.y in place of f'(u) and f*(x.y) in place of the conjugate, inf where x.y is beyond the range of f'.
        block_size: See `ContrastiveLoss`.
        global_batch: See `ContrastiveLoss`.

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
        block_size: int | None = None,
        global_batch: str = "none",
    ) -> None:
        super().__init__(gamma, negatives, similarity, block_size, global_batch)
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

    @property
    def objective(self) -> PairObjective:
        score, conjugate = self.divergence.score, self.divergence.conjugate
        if self.similarity == "cosine":
            score, conjugate = (lambda t: t), (lambda t: convex_conjugate(self.divergence, t))
        return objectives.fmicl(score=score, conjugate=conjugate, alpha=self.alpha)


class InfoNCELoss(ContrastiveLoss):
    """InfoNCE on cosines, SimCSE's loss with its defaults.

    Args:
        temperature: Of the softmax, finite, > 0 (= 1/(2 gamma)).
        negatives: As for `FMICLLoss`, `cross_view` by default.
        global_batch: `none` or `gather`: every row's log-sum-exp needs all columns, so their gradient is summed over
            the processes in the backward pass.
    """

    def __init__(self, temperature: float = 0.05, negatives: str = "cross_view", global_batch: str = "none") -> None:
        require_positive("temperature", temperature)
        require_choice("global_batch", global_batch, ["none", "gather"])
        super().__init__(gamma=1 / (2 * temperature), negatives=negatives, global_batch=global_batch)
        self.temperature = temperature

    @property
    def objective(self) -> Callable[[Tensor, Tensor, Tensor], Terms]:
        return objectives.infonce


class AlignUniformLoss(ContrastiveLoss):
    """Alignment + uniformity (Wang & Isola, arXiv 2005.10242): mean ||x - y||^2 + alpha log mean e^{-gamma d^2}.

    Args:
        gamma: Theirs is t = 2; > 0, at most 36: beyond it, e^r of opposite rows would be 0 in float32.
        alpha: Weight of uniformity, finite, > 0.
        negatives, block_size, global_batch: As for `FMICLLoss`.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float = 1.0,
        negatives: str = "same_view",
        block_size: int | None = None,
        global_batch: str = "none",
    ) -> None:
        super().__init__(gamma, negatives, block_size=block_size, global_batch=global_batch)
        require_positive("alpha", alpha)
        if gamma > 36:
            raise ValueError(f"gamma of alignment + uniformity must be at most 36, got {gamma}")
        self.alpha = alpha

    @property
    def objective(self) -> PairObjective:
        return objectives.align_uniform(gamma=self.gamma, alpha=self.alpha)


class SpectralLoss(ContrastiveLoss):
    """Spectral contrastive loss (HaoChen et al., arXiv 2106.04156): -2 mean x.y + alpha mean (x_i.y_j)^2.

    Args:
        alpha: Weight of the negative term, finite, > 0.
        negatives: As for `FMICLLoss`, `cross_view` by default.
        block_size, global_batch: As for `FMICLLoss`.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        negatives: str = "cross_view",
        block_size: int | None = None,
        global_batch: str = "none",
    ) -> None:
        super().__init__(gamma=0.5, negatives=negatives, block_size=block_size, global_batch=global_batch)
        require_positive("alpha", alpha)
        self.alpha = alpha

    @property
    def objective(self) -> PairObjective:
        return objectives.spectral(alpha=self.alpha)


def passing(gamma: float) -> list[str]:
    """Names of the divergences for which the uniformity condition holds."""
    return [name for name, record in DIVERGENCES.items() if uniformity_holds(record, gamma)]


OBJECTIVES: dict[str, type[ContrastiveLoss]] = {
    "fmicl": FMICLLoss,
    "infonce": InfoNCELoss,
    "align_uniform": AlignUniformLoss,
    "spectral": SpectralLoss,
}
