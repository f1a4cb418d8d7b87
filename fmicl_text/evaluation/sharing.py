"""Work that is shared over the processes of a run: each computes its part of the rows or jobs, and receives all. One
process has all of them and exchanges nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fmicl_text.losses.distributed import gather_rows, world_size

POLL = 10.0  # seconds between the messages of processes that wait for a job
T = TypeVar("T")


SHARED = ContextVar("SHARED", default=False)


@contextmanager
def all_processes(shared: bool = True) -> Iterator[None]:
    """Within this context, all processes make the same calls, so `encode_sentences` may share its work over them."""
    token = SHARED.set(shared)
    try:
        yield
    finally:
        SHARED.reset(token)


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


def run_jobs(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """The results of all jobs. Every process must call this, and runs every `world_size`-th job.

    The processes that have finished exchange messages with the others until all have. A single operation that waits for
    them would fail after the timeout of the process group.

    Raises:
        RuntimeError: A job failed in another process. In its own process its exception is raised.
    """
    if world_size() == 1:
        return [job() for job in jobs]
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append([job() for job in jobs[dist.get_rank() :: world_size()]])
        except Exception as error:
            outcome.append(error)

    thread = Thread(target=run, daemon=True)  # the program can be interrupted
    thread.start()
    while any(exchange(thread.is_alive())):
        thread.join(POLL)
    if isinstance(outcome[0], Exception):
        exchange(str(outcome[0]))
        raise outcome[0]
    parts = exchange(outcome[0])
    if failures := [part for part in parts if isinstance(part, str)]:
        raise RuntimeError(f"another process failed: {failures[0]}")
    return [parts[i % len(parts)][i // len(parts)] for i in range(len(jobs))]


def exchange(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks."""
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_of_processes(*numbers: int) -> list[int]:
    """The sum of each number over the processes."""
    return [sum(values) for values in zip(*exchange(numbers), strict=True)] if world_size() > 1 else list(numbers)
