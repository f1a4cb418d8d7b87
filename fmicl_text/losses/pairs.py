"""The terms of an objective on a batch: normalize -> gather -> form pairs -> similarity -> objective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fmicl_text.losses.blockwise import (
    BlockwiseConfig,
    OnePass,
    distinct,
    name_views,
    view_pairs,
    warn_without_negatives,
)
from fmicl_text.losses.distributed import GatherWithGradient, gather_rows, row_counts, sum_over_ranks, world_size
from fmicl_text.losses.objectives import Objective, PairObjective, Terms
from fmicl_text.losses.similarity import Similarity, unit_rows

BLOCKWISE_FROM = 512  # from this many rows, one pass in blocks is faster (eval/loss_benchmark.py --sizes 256 512 1024)
CPU_BLOCK, GPU_BLOCK = 512, 4096  # CPU: the buffers of a block fit the L2 cache; GPU: kernels are large enough


class LossTerms(NamedTuple):
    """Scalars: the loss, which has a gradient, and its two summands without one, for logging."""

    loss: Tensor
    positive: Tensor
    negative: Tensor


class Batch(NamedTuple):
    """The arguments of a loss; see `ContrastiveLoss.terms`."""

    x: Tensor
    y: Tensor
    hard_negatives: Tensor | None = None
    text_ids: Tensor | None = None
    queue: Tensor | None = None

    @property
    def hard(self) -> tuple[Tensor, ...]:
        """K hard negatives [N, D]."""
        if self.hard_negatives is None:
            return ()
        return self.hard_negatives.reshape(len(self.x), -1, self.x.shape[1]).unbind(1)


@dataclass(frozen=True)
class PairSettings:
    """Which pairs of a batch a loss compares, and how; see `ContrastiveLoss`."""

    similarity: Similarity
    gamma: float
    negatives: str
    block_size: int | None
    global_batch: str

    @property
    def is_distributed(self) -> bool:
        """Whether the batch has rows of other processes."""
        return self.global_batch != "none" and world_size() > 1

    def row_counts(self, x: Tensor) -> list[int]:
        """Numbers of rows of the processes of the batch."""
        return row_counts(x) if self.is_distributed else [len(x)]


def terms_of(objective: Objective, settings: PairSettings, batch: Batch) -> LossTerms:
    """The terms of an objective on the pairs of a batch, in float32 (float64 is kept), outside autocast; see
    `ContrastiveLoss.terms`."""
    x = batch.x
    check_shapes(batch)
    check_queue(batch, settings.negatives)
    if not len(x) and not settings.is_distributed:  # otherwise, all processes raise an error together
        raise ValueError("x has no rows; a batch needs at least 1 example")
    with torch.autocast(x.device.type, enabled=False), ieee_products():
        if batch.queue is not None:
            return against_queue(objective, settings, batch, batch.queue)
        small = settings.block_size is None and len(x) < BLOCKWISE_FROM
        if not isinstance(objective, PairObjective) or (small and not settings.is_distributed):
            return whole_matrix(objective, settings, batch)
        block_size = settings.block_size or (CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK)
        shared = settings.similarity, settings.gamma, settings.negatives, block_size, settings.global_batch
        ids = ids_of_rows(batch, settings.is_distributed)
        return LossTerms(*OnePass.apply(BlockwiseConfig(objective, *shared), *ids, x, batch.y, *batch.hard))


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


def whole_matrix(objective: Objective, settings: PairSettings, batch: Batch) -> LossTerms:
    """The terms by autograd through the similarities of this process's rows with all columns [N, M]."""
    x, y, hard = batch.x, batch.y, batch.hard
    own, hard_ids = ids_of_rows(batch, settings.is_distributed)
    units = {name: unit_rows(rows) for name, rows in name_views(x, y, hard).items()}
    pairs = view_pairs(settings.negatives, len(hard))
    counts = settings.row_counts(x)
    own_columns, hard_columns = (torch.cat(gather_rows(ids, counts)) for ids in (own, hard_ids))
    ids_of_views = name_views(own_columns, own_columns, [ids[:, None] for ids in hard_columns.unbind(1)])
    masks = {view: distinct(own, ids) for view, ids in ids_of_views.items()}
    similarities, kept = [], []
    for row_view in dict.fromkeys(view for view, _ in pairs):  # one matrix product per view of the rows
        views = [view for first, view in pairs if first == row_view]
        columns = torch.stack([units[view] for view in views], dim=1)
        if settings.is_distributed:
            columns = GatherWithGradient.apply(columns, counts)
        keep = torch.cat([masks[view] for view in views], dim=1)
        columns = columns.transpose(0, 1).flatten(0, 1)
        similarities.append(settings.similarity.pairwise(units[row_view], columns, settings.gamma, keep))
        kept.append(keep)
    keep = torch.cat(kept, dim=1)
    if batch.text_ids is not None and not sum_over_ranks(keep.sum(), counts):
        warn_without_negatives(sum(counts))
    positive = settings.similarity.paired(units["x"], units["y"], settings.gamma)
    return mean_over_rows(objective(positive, torch.cat(similarities, dim=1), keep), counts)


def against_queue(objective: Objective, settings: PairSettings, batch: Batch, queue: Tensor) -> LossTerms:
    """The terms with the rows of a queue as the only negatives. No pair contains a row of another process."""
    x, y, queue = unit_rows(batch.x), unit_rows(batch.y), unit_rows(queue.detach())
    positive = settings.similarity.paired(x, y, settings.gamma)
    negative = settings.similarity.pairwise(x, queue, settings.gamma)
    counts = settings.row_counts(x)
    if not isinstance(objective, PairObjective):
        return mean_over_rows(objective(positive, negative, torch.ones_like(negative, dtype=torch.bool)), counts)
    mean = objective.pair(negative).mean()
    if settings.is_distributed:  # value of all processes' rows, gradient of this process's
        everyone = sum_over_ranks(mean.detach() * len(x) / sum(counts), counts)
        mean = everyone + mean - mean.detach()
    return mean_over_rows(Terms(-objective.score(positive).mean(), objective.outer(mean)), counts)


def mean_over_rows(terms: Terms, counts: list[int]) -> LossTerms:
    """Means of the terms over all processes, weighted by their numbers of rows; with the gradient of this process's
    rows, times the number of processes because DDP averages."""
    if len(counts) == 1:
        return LossTerms(terms.positive + terms.negative, *(term.detach() for term in terms))
    weight = counts[dist.get_rank()] / sum(counts)
    share = (terms.positive + terms.negative) * weight
    positive, negative = sum_over_ranks(torch.stack(terms).detach() * weight, counts)
    return LossTerms(len(counts) * (share - share.detach()) + positive + negative, positive, negative)


def check_shapes(batch: Batch) -> None:
    """Raise a ValueError if x, y, hard_negatives and text_ids do not match."""
    x, y, hard_negatives, text_ids, _ = batch
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


def check_queue(batch: Batch, negatives: str) -> None:
    """Raise a ValueError unless there is a queue if negatives are those of a queue, and no others with it."""
    x, queue = batch.x, batch.queue
    if (queue is None) == (negatives == "queue"):
        given = "None" if queue is None else list(queue.shape)
        raise ValueError(
            f"queue must be given if and only if negatives=queue; got negatives={negatives}, queue {given}"
        )
    if queue is None:
        return
    if queue.ndim != 2 or queue.shape[1:] != x.shape[1:] or not len(queue):
        raise ValueError(f"queue must be [K, {x.shape[1]}], K >= 1, got {list(queue.shape)}")
    if batch.hard_negatives is not None or batch.text_ids is not None:
        raise ValueError("queue replaces all other negatives: hard_negatives and text_ids must be None")


def ids_of_rows(batch: Batch, distributed: bool) -> tuple[Tensor, Tensor]:
    """Text ids [N, V] of the examples and [N, K] of their hard negatives. Without text_ids, all differ, across
    processes too if the batch is distributed."""
    if batch.text_ids is not None:
        return batch.text_ids[:, :2], batch.text_ids[:, 2:]
    x, num_hard = batch.x, len(batch.hard)
    first = dist.get_rank() << 32 if distributed else 0
    own = torch.arange(first, first + len(x), device=x.device)[:, None]
    return own, -1 - (own * max(num_hard, 1) + torch.arange(num_hard, device=x.device))
