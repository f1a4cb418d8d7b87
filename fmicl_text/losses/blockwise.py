"""A `PairObjective` on the global batch: value and gradient in one pass over blocks of pairs.

Memory is linear in the number of rows: the similarities of a block are freed once its gradient is computed, and there
is no graph over all pairs. On a CPU, threads compute several blocks at a time. Same-view pairs are symmetric, so half
of the blocks suffice. Each process computes the gradient of its own rows only, from all their pairs with rows of any
process, so the backward pass needs no communication.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fmicl_text.losses.distributed import gather_rows, own_rank, row_counts, rows_of_others, sum_over_ranks
from fmicl_text.losses.objectives import PairObjective, Terms
from fmicl_text.losses.similarity import Similarity, gradient_of_rows, unit_rows
from fmicl_text.losses.triton_kernel import fused_pair_block

Result = TypeVar("Result")
MOST_WORKERS = 16  # threads that compute blocks; they run Python, one at a time
HARD = "hard"  # prefix of the names of the views of hard negatives
NEGATIVE_TERMS = {"same_view": [("x", "x")], "cross_view": [("x", "y")], "both": [("x", "x"), ("x", "y")]}


@dataclass(frozen=True)
class BlockwiseConfig:
    """Objective, similarity, negative pairs and block size of a loss."""

    objective: PairObjective
    similarity: Similarity
    gamma: float
    negatives: str
    block_size: int
    global_batch: str


class RowIds(NamedTuple):
    """Text ids of the rows of one process.

    own [N, V] and hard [N, K], equal where texts are equal. `own_recurs` [N] and `hard_recurs` [N, K], on the CPU:
    whether one of the texts also occurs elsewhere in the batch, so that pairs with it need a mask."""

    own: Tensor
    hard: Tensor
    own_recurs: Tensor
    hard_recurs: Tensor

    def of(self, view: str) -> tuple[Tensor, Tensor]:
        """Ids of the rows of a view, and whether they recur."""
        if not view.startswith(HARD):
            return self.own, self.own_recurs
        k = int(view.removeprefix(HARD))
        return self.hard[:, k : k + 1], self.hard_recurs[:, k]


def name_views(x: Tensor, y: Tensor, hard: Sequence[Tensor]) -> dict[str, Tensor]:
    """Rows of x, y and K hard negatives, or their ids, by the names of the views: x, y, hard0, hard1, ..."""
    return {"x": x, "y": y} | {f"{HARD}{k}": rows for k, rows in enumerate(hard)}


def view_pairs(negatives: str, num_hard: int) -> list[tuple[str, str]]:
    """The views (of row, of column) whose pairs are negatives."""
    return NEGATIVE_TERMS[negatives] + [("x", f"{HARD}{k}") for k in range(num_hard)]


def warn_without_negatives(num_rows: int) -> None:
    """Warn that a batch of several examples has no negative pair."""
    if num_rows > 1:
        warnings.warn(
            f"no negative pair in a batch of {num_rows} examples: each two of them share a text. The loss of such a "
            "batch is its positive term",
            stacklevel=2,
        )


def distinct(first: Tensor, second: Tensor) -> Tensor:
    """Mask [N, M]: True where row i of first [N, V] and row j of second [M, W] share no text."""
    return (first[:, None, :, None] != second[None, :, None, :]).flatten(2).all(-1)


def ids_of_ranks(own: Tensor, hard: Tensor, counts: list[int]) -> list[RowIds]:
    """The `RowIds` of every process."""
    owns, hards = gather_rows(own, counts), gather_rows(hard, counts)
    table = torch.cat([torch.cat(owns), torch.cat(hards)], dim=1)
    _, inverse, occurrences = table.unique(return_inverse=True, return_counts=True)
    own_recurs, hard_recurs = (occurrences[inverse] > 1).cpu().tensor_split([own.shape[1]], dim=1)
    recurs = own_recurs.any(1).split(counts), hard_recurs.split(counts)
    return [RowIds(*parts) for parts in zip(owns, hards, *recurs, strict=True)]


def blocks(num_rows: int, block_size: int, start: int = 0) -> Iterator[slice]:
    """Slices that cover start ... num_rows."""
    return (slice(at, min(at + block_size, num_rows)) for at in range(start, num_rows, block_size))


def pairs_of_blocks(num_rows: int, num_columns: int, half: bool) -> Iterator[tuple[int, int]]:
    """All pairs of blocks (row, column), in an order in which neighbors have no block in common, so that their
    gradients can be added at the same time.

    Args:
        num_rows, num_columns: Numbers of blocks.
        half: Rows and columns are the same blocks, and of (i, j) and (j, i) one is visited.
    """
    if not half:
        size = max(num_rows, num_columns)
        pairs = ((i, (i + shift) % size) for shift in range(size) for i in range(num_rows))
        yield from ((i, j) for i, j in pairs if j < num_columns)
        return
    yield from ((i, i) for i in range(num_rows))
    last = num_rows - 1 + num_rows % 2  # the circle method of tournaments; if the number is odd, one block rests
    for k in range(last):
        both = [(k, last), *(((k + step) % last, (k - step) % last) for step in range(1, (last + 1) // 2))]
        yield from ((min(pair), max(pair)) for pair in both if max(pair) < num_rows)


@contextmanager
def threads_of_blocks(rows: Tensor, block_size: int) -> Iterator[int]:
    """Number of threads that compute blocks of rows [N, D]; they share PyTorch's threads.

    If all of PyTorch's threads compute one block instead, each operation waits for the slowest of them. Beside another
    busy process, this is one that the system has interrupted, and the loss takes 24 times as long."""
    num_threads = torch.get_num_threads()
    workers = min(num_threads, -(-len(rows) // block_size) // 2, MOST_WORKERS)
    if rows.device.type != "cpu" or workers < 2:
        yield 1
        return
    torch.set_num_threads(num_threads // workers)
    try:
        yield workers
    finally:
        torch.set_num_threads(num_threads)


def map_in_threads(
    function: Callable[[tuple[int, int]], Result], pairs: Iterable[tuple[int, int]], half: bool, workers: int
) -> Iterator[Result]:
    """Results of a function of pairs of blocks, in their order. The pairs of one block are computed one after another,
    so that sums do not depend on the order in which threads end.

    Args:
        function: Maps a pair to its result.
        pairs, half: See `pairs_of_blocks`.
        workers: Number of threads.
    """
    if workers == 1:
        yield from map(function, pairs)
        return

    def call(pair: tuple[int, int], before: list[Future[Result]]) -> Result:
        wait(before)
        with torch.no_grad():
            return function(pair)

    last: dict[int, Future[Result]] = {}  # of each block
    pending: deque[Future[Result]] = deque()
    share = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool:
        for i, j in pairs:
            used = (i, j if half else ~j)
            pending.append(pool.submit(call, (i, j), [last[block] for block in used if block in last]))
            last.update(dict.fromkeys(used, pending[-1]))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


def pair_block(rows: Tensor, columns: Tensor, keep: Tensor | None, config: BlockwiseConfig) -> tuple[Tensor, Tensor]:
    """Sum of `pair` over a block of unit rows [b, D], [c, D]; and its derivative [b, c] with respect to their
    similarities if these have a constant `slope`, else to their inner products."""
    similarity, leaf = config.similarity, rows @ columns.T
    if similarity.slope is not None:
        leaf = similarity.of_product(leaf, config.gamma)
    leaf.requires_grad_()
    with torch.enable_grad():
        similarities = leaf
        if similarity.slope is None:
            similarities = similarity.of_product(similarity.masked(leaf, keep), config.gamma)
        values = config.objective.pair(similarities)
        total = (values if keep is None else torch.where(keep, values, 0)).sum()
    return total.detach(), torch.autograd.grad(total, leaf)[0]


def positive_block(x: Tensor, y: Tensor, config: BlockwiseConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of `score` over positive pairs, unit rows [b, D], and its gradients with respect to them."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    with torch.enable_grad():
        total = config.objective.score(config.similarity.paired(x, y, config.gamma)).sum()
    return total.detach(), dict(zip(("x", "y"), torch.autograd.grad(total, (x, y)), strict=True))


class PairSumAccumulator:
    """Accumulates the sum of all pairs, their number and the gradients of this process's rows, block by block.

    Args:
        config: Objective, similarity and block size.
        rows: Unit rows, for their dtype and device.
        workers: Number of threads; see `map_in_threads`.
    """

    def __init__(self, config: BlockwiseConfig, rows: Tensor, workers: int) -> None:
        self.config, self.workers = config, workers
        self.pair_block = fused_pair_block(config, rows) or pair_block
        # Over the pairs that this process counts. Updated in place: a small tensor kept for each block would fragment
        # the heap, and memory would grow with the number of blocks. In float64 if available, for millions of blocks.
        dtype = torch.float32 if rows.device.type == "mps" else torch.float64
        self.sum_and_count = torch.zeros(2, dtype=dtype, device=rows.device)

    def add(
        self,
        views: tuple[str, str],
        rows: Tensor,
        columns: Tensor,
        row_ids: RowIds,
        column_ids: RowIds,
        row_gradient: Tensor | None = None,
        column_gradient: Tensor | None = None,
    ) -> None:
        """Add all pairs of unit rows [N, D] and columns [M, D] that share no text.

        Args:
            views: Views of rows and columns. If they are the same, (i, j) and (j, i) are two pairs with one gradient.
            row_ids, column_ids: Text ids of rows and columns.
            row_gradient: [N, D], accumulated in place. If None, another process counts these pairs.
            column_gradient: [M, D], accumulated in place.
        """
        (ids_i, recurs_i), (ids_j, recurs_j) = row_ids.of(views[0]), column_ids.of(views[1])
        own, symmetric = row_ids is column_ids, views[0] == views[1]
        slope = self.config.similarity.slope
        weight = (1.0 if slope is None else slope(self.config.gamma)) * (1 + symmetric)
        slices_i, slices_j = (list(blocks(len(one), self.config.block_size)) for one in (rows, columns))

        def add_block(pair: tuple[int, int]) -> tuple[Tensor, Tensor | int]:
            """Add a block to the gradients; its sum and count."""
            i, j = slices_i[pair[0]], slices_j[pair[1]]
            diagonal = own and i == j
            masked = diagonal or bool(recurs_i[i].any() and recurs_j[j].any())
            keep = distinct(ids_i[i], ids_j[j]) if masked else None
            total, derivative = self.pair_block(rows[i], columns[j], keep, self.config)
            mirrored = own and symmetric and not diagonal  # block (j, i) is not visited
            if row_gradient is not None:
                row_gradient[i].addmm_(derivative, columns[j], alpha=weight)
            if column_gradient is not None and (mirrored or not symmetric):
                column_gradient[j].addmm_(derivative.T, rows[i], alpha=weight)
            count = derivative.numel() if keep is None else keep.sum()
            return total * (1 + mirrored), count * (1 + mirrored)

        half = own and symmetric
        pairs = pairs_of_blocks(len(slices_i), len(slices_j), half)
        for total, count in map_in_threads(add_block, pairs, half, self.workers):
            if row_gradient is not None:
                self.sum_and_count[0] += total
                self.sum_and_count[1] += count


def add_all_pairs(
    sums: PairSumAccumulator,
    units: dict[str, Tensor],
    gradients: dict[str, Tensor],
    everyone: list[RowIds],
    counts: list[int],
) -> None:
    """Add every part of the negative term: pairs within this process, then with the rows of each other process."""
    config, here = sums.config, everyone[own_rank(counts)]
    pairs = view_pairs(config.negatives, here.hard.shape[1])
    for a, b in pairs:
        sums.add((a, b), units[a], units[b], here, here, gradients[a], gradients[b])
    if len(counts) == 1:
        return
    for k, visiting in rows_of_others(torch.cat(list(units.values()), dim=1), counts, config.global_batch):
        theirs = dict(zip(units, visiting.chunk(len(units), dim=1), strict=True))
        for a, b in pairs:
            sums.add((a, b), units[a], theirs[b], here, everyone[k], row_gradient=gradients[a])
            if a != b:  # the other process counts these pairs
                mine = gradients[b]
                sums.add((a, b), theirs[a], units[b], everyone[k], here, column_gradient=mine)


def value_and_gradients(
    config: BlockwiseConfig, raw: dict[str, Tensor], own: Tensor, hard: Tensor, workers: int
) -> tuple[Terms, dict[str, Tensor]]:
    """The terms of the loss on the global batch, and its gradient with respect to this process's rows, times the number
    of processes (by which DDP and FSDP divide).

    Args:
        config: Objective, similarity and block size.
        raw: x, y and K hard negatives, by the names of `name_views`: rows [N, D] of any scale.
        own: Text ids [N, V] of x and y.
        hard: Text ids [N, K] of the hard negatives.
        workers: Number of threads; see `map_in_threads`.
    """
    counts = row_counts(raw["x"]) if config.global_batch != "none" else [len(raw["x"])]
    total_rows, factor = sum(counts), len(counts)
    units = {name: unit_rows(rows) for name, rows in raw.items()}
    everyone, sums = ids_of_ranks(own, hard, counts), PairSumAccumulator(config, units["x"], workers)
    paired = {name: unit for name, unit in units.items() if name != "y" or config.negatives != "same_view"}
    gradients = {name: torch.zeros_like(unit) for name, unit in paired.items()}
    add_all_pairs(sums, paired, gradients, everyone, counts)

    pair_sum, count = sum_over_ranks(sums.sum_and_count, counts)
    may_be_empty = total_rows == 1 or any(ids.own_recurs.any() for ids in everyone)
    if may_be_empty and not count:
        warn_without_negatives(total_rows)
        negative, slope = torch.zeros_like(pair_sum), torch.zeros_like(units["x"][0, 0])
    else:
        with torch.enable_grad():
            mean = (pair_sum / count).requires_grad_()
            negative = config.objective.outer(mean)
        slope = (torch.autograd.grad(negative, mean)[0] / count * factor).to(units["x"].dtype)

    gradients.setdefault("y", units["y"])  # with same_view, no pair adds to it; its rows are overwritten below
    score = torch.zeros_like(pair_sum)
    for i in blocks(len(raw["x"]), config.block_size):
        total, attraction = positive_block(units["x"][i], units["y"][i], config)
        score += total
        for name, gradient in gradients.items():
            part = gradient[i].mul(slope) if name in paired else torch.zeros_like(gradient[i])
            if name in attraction:
                part.sub_(attraction[name], alpha=factor / total_rows)
            gradient[i] = gradient_of_rows(raw[name][i], units[name][i], part)
    terms = Terms(-sum_over_ranks(score, counts) / total_rows, negative.detach())
    return Terms(*(term.to(units["x"].dtype) for term in terms)), gradients


class OnePass(torch.autograd.Function):
    """Loss and its two terms from rows x, y and K hard negatives of any scale, all [N, D]; only the loss has a
    gradient."""

    @staticmethod
    def forward(
        ctx: Any, config: BlockwiseConfig, own: Tensor, hard_ids: Tensor, x: Tensor, y: Tensor, *hard: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        raw = name_views(x, y, hard)
        threads = threads_of_blocks(x, config.block_size)
        with torch.inference_mode(False), torch.no_grad(), threads as workers:  # in any grad mode of the caller
            terms, gradients = value_and_gradients(config, raw, own, hard_ids, workers)
        ctx.gradients = [gradients[name].to(tensor.dtype) for name, tensor in raw.items()]
        ctx.mark_non_differentiable(*terms)
        return terms.positive + terms.negative, *terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of a blockwise loss can be computed only once")
        gradients, ctx.gradients = [part.mul_(gradient) for part in ctx.gradients], None
        return None, None, None, *gradients
