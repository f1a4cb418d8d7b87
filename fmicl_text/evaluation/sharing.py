"""Rows that are shared over the processes of a run: each process computes its part, and receives all. One process has
them all and exchanges nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fmicl_text.losses.distributed import gather_rows, world_size


def assign_rows(count: int, block: int = 1) -> Tensor:
    """The process [count] of each row. Blocks of rows are assigned one after the other."""
    return torch.arange(count) // block % world_size()


def own_rows(processes: Tensor) -> Tensor:
    """The rows of this process, ascending, given the process of each row."""
    rank = dist.get_rank() if world_size() > 1 else 0
    return (processes == rank).nonzero()[:, 0]


def gather_shared(part: Tensor, processes: Tensor, device: torch.device) -> Tensor:
    """Rows [N, D], on the CPU, of which this process has computed those of `own_rows`. Every process must call this.

    Args:
        part: The rows of this process, [n, D]. Its width is ignored if it has none.
        processes: The process of each row, [N].
        device: A device that the process group can communicate on.
    """
    counts = processes.bincount(minlength=world_size()).tolist()
    widths = gather_rows(torch.tensor([part.shape[1] if len(part) else 0], device=device), [1] * len(counts))
    width = int(torch.cat(widths).max())
    part = (part if len(part) else part.new_zeros(0, width)).to(device)
    rows = torch.empty(len(processes), width, dtype=part.dtype)
    for rank, received in enumerate(gather_rows(part, counts)):
        rows[processes == rank] = received.cpu()
    return rows
