"""Exchange of rows between processes, for losses on the global batch. No-op in one process.

Only `GatherWithGradient`, which InfoNCE needs and f-MICL does not, communicates in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

GLOBAL_BATCH = ("none", "gather", "ring")


def world_size() -> int:
    """Number of processes; 1 if torch.distributed is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank(counts: Sequence[int]) -> int:
    """Index of this process in the result of `row_counts`; 0 if it has only one entry."""
    return dist.get_rank() if len(counts) > 1 else 0


def row_counts(rows: Tensor) -> list[int]:
    """len(rows) of every process, in rank order. The numbers may differ, e.g. in a last batch.

    Raises:
        ValueError: A process has no rows.
    """
    if world_size() == 1:
        return [len(rows)]
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(counts, own)
    numbers = torch.cat(counts).tolist()
    if not all(numbers):
        raise ValueError(f"every process needs at least one row, got {numbers}")
    return numbers


def gather_rows(rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The rows [N_k, ...] of every process k, without gradient, in rank order."""
    if len(counts) == 1:
        return [rows]
    longest = max(counts)  # gloo aborts on tensors of different shapes
    padded = pad(rows, (0, 0) * (rows.ndim - 1) + (0, longest - len(rows))).contiguous()
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    return [received[:count] for received, count in zip(everyone, counts, strict=True)]


def rows_of_others(rows: Tensor, counts: Sequence[int], strategy: str) -> Iterator[tuple[int, Tensor]]:
    """(k, rows of process k) for every other process k, without gradient.

    Args:
        rows: Rows of this process [N, D].
        counts: Result of `row_counts`.
        strategy: `gather` keeps the rows of all processes in memory; `ring` those of three, as each process forwards
            the rows it received while the caller works on them. Memory then does not grow with their number.
    """
    own, size = own_rank(counts), len(counts)
    if strategy == "gather":
        everyone = gather_rows(rows, counts)
        yield from ((k, received) for k, received in enumerate(everyone) if k != own)
        return

    def pass_on(outgoing: Tensor, owner: int) -> tuple[Tensor, list[Any]]:
        incoming = outgoing.new_empty(counts[owner], outgoing.shape[1])
        send = dist.P2POp(dist.isend, outgoing, (own + 1) % size)
        receive = dist.P2POp(dist.irecv, incoming, (own - 1) % size)
        return incoming, dist.batch_isend_irecv([send, receive])

    incoming, pending = pass_on(rows.contiguous(), (own - 1) % size)
    for step in range(1, size):
        for work in pending:
            work.wait()
        visitor = incoming
        if step + 1 < size:
            incoming, pending = pass_on(visitor, (own - step - 1) % size)
        yield (own - step) % size, visitor


def sum_over_ranks(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Elementwise sum over the processes of `row_counts`, in place, without gradient."""
    if len(counts) > 1:
        dist.all_reduce(values)
    return values


class GatherWithGradient(torch.autograd.Function):
    """Rows [N_k, ...] of every process, joined in rank order [N, ...]. The gradient of this process's rows is summed
    over the losses of all processes: one all-reduce in the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return torch.cat(gather_rows(rows, counts))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed = sum_over_ranks(gradient.clone(memory_format=torch.contiguous_format), ctx.counts)
        return summed.split(ctx.counts)[own_rank(ctx.counts)], None
