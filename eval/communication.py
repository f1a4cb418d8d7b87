"""Exchange of rows between many processes: bytes that each sends and holds, simulated in one process.

    python eval/communication.py                                 # 2 to 64 processes
    python eval/communication.py --processes 8 --rows 256 --width 1024 --output communication.json

Every process is a thread here, and torch.distributed is replaced by functions that exchange tensors between threads and
count them. Each process has its rows of a batch and computes its part of the loss and of the gradient, which is
compared with that of one process that has all rows. An all-gather is counted as sending one's own rows to each other
process, an all-reduce as sending everything twice, as with rings. Embeddings are float32; the comparison is made in
float64.
"""

from __future__ import annotations

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split

import argparse
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from fmicl_text.cli.checks import check_output, whole_number
from fmicl_text.cli.parser import ArgumentParser, cli_errors
from fmicl_text.evaluation.report import library_versions, markdown_table, write_json
from fmicl_text.losses import FMICLLoss, InfoNCELoss
from fmicl_text.losses.contrastive import ContrastiveLoss

MIB = 2**20
LOSSES: dict[str, Callable[[], ContrastiveLoss]] = {
    "f-MICL, gather": lambda: FMICLLoss("kl", gamma=2.0, alpha=40.0, global_batch="gather"),
    "f-MICL, ring": lambda: FMICLLoss("kl", gamma=2.0, alpha=40.0, global_batch="ring"),
    "InfoNCE, gather": lambda: InfoNCELoss(0.05, global_batch="gather"),
}


class World:
    """Processes that are threads. Within `patched`, functions of torch.distributed exchange tensors between them.

    Attributes:
        sent: Bytes that each process has sent.
        held, peak: Bytes of received tensors that each process holds now, and held at most.
    """

    def __init__(self, size: int) -> None:
        self.size, self.own = size, threading.local()
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size
        self.mail: dict[tuple[int, int], Queue[Tensor]] = defaultdict(Queue)
        self.lock = threading.Lock()
        self.sent, self.held, self.peak = [0] * size, [0] * size, [0] * size

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """The results of function(rank) of all processes.

        Raises:
            Exception: That of the first process that failed.
        """
        results: list[Any] = [None] * self.size

        def process(rank: int) -> None:
            self.own.rank = rank
            try:
                results[rank] = function(rank)
            except Exception as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(self.size)]
        with self.patched():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        failures = [one for one in results if isinstance(one, Exception)]
        for error in sorted(failures, key=lambda one: isinstance(one, threading.BrokenBarrierError)):
            raise error
        return results

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Replace the functions of torch.distributed that the losses use."""
        with mock.patch.multiple(
            dist,
            is_initialized=lambda: True,
            get_rank=lambda: self.own.rank,
            get_world_size=lambda: self.size,
            all_gather=self.all_gather,
            all_reduce=self.all_reduce,
            P2POp=lambda op, tensor, peer: SimpleNamespace(op=op, tensor=tensor, peer=peer),
            isend="send",
            irecv="receive",
            batch_isend_irecv=self.send_and_receive,
        ):
            yield

    def exchange(self, value: Any) -> list[Any]:
        """The values of all processes."""
        self.slots[self.own.rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    def receive(self, place: Tensor) -> None:
        """Count a tensor of received rows until it is freed."""
        rank, size = self.own.rank, place.nbytes
        self.add(rank, size)
        weakref.finalize(place.untyped_storage(), self.add, rank, -size)

    def add(self, rank: int, size: int) -> None:
        with self.lock:
            self.held[rank] += size
            self.peak[rank] = max(self.peak[rank], self.held[rank])

    def all_gather(self, places: list[Tensor], value: Tensor) -> None:
        rank = self.own.rank
        self.sent[rank] += value.nbytes * (self.size - 1)
        for k, (place, received) in enumerate(zip(places, self.exchange(value), strict=True)):
            place.copy_(received)
            if k != rank:
                self.receive(place)
        self.barrier.wait()  # nobody changes its value before all have copied it

    def all_reduce(self, value: Tensor) -> None:
        self.sent[self.own.rank] += 2 * value.nbytes * (self.size - 1) // self.size
        total = sum(one.clone() for one in self.exchange(value))
        self.barrier.wait()
        value.copy_(total)

    def send_and_receive(self, operations: list[Any]) -> list[Any]:
        rank, pending = self.own.rank, []
        for one in operations:
            if one.op == "send":
                self.sent[rank] += one.tensor.nbytes
                self.mail[rank, one.peer].put(one.tensor.detach().clone())
            else:
                self.receive(one.tensor)
                wait = partial(self.wait_for, one.tensor, (one.peer, rank))
                pending.append(SimpleNamespace(wait=wait))
        return pending

    def wait_for(self, place: Tensor, way: tuple[int, int]) -> None:
        place.copy_(self.mail[way].get())


def measure(name: str, size: int, rows: int, width: int) -> dict[str, Any]:
    """One row of the table: a loss with so many processes and rows of each."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, size * rows, width, generator=generator, dtype=torch.float64)
    loss = LOSSES[name]()
    whole = [view.clone().requires_grad_() for view in (x, y)]
    loss(*whole).backward()

    def step(world: World, dtype: torch.dtype) -> Callable[[int], Any]:
        def function(rank: int) -> Any:
            own = slice(rank * rows, (rank + 1) * rows)
            views = [view[own].to(dtype).requires_grad_() for view in (x, y)]
            value = LOSSES[name]()(*views)
            forward = world.sent[rank]
            value.backward()
            return [view.grad for view in views], forward, world.sent[rank] - forward

        return function

    exact = World(size)
    answers = exact.run(step(exact, torch.float64))
    apart = 0.0
    for view, joined in zip(whole, zip(*(gradients for gradients, *_ in answers), strict=True), strict=True):
        assert view.grad is not None
        apart = max(apart, float((torch.cat(joined) / size - view.grad).norm() / view.grad.norm()))
    world = World(size)
    answers = world.run(step(world, torch.float32))
    return {
        "loss": name,
        "processes": size,
        "sent, forward (MiB)": max(forward for _, forward, _ in answers) / MIB,
        "sent, backward (MiB)": max(backward for *_, backward in answers) / MIB,
        "held (MiB)": max(world.peak) / MIB,
        "difference to one process": f"{apart:.0e}",
    }


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser("communication.py", __doc__)
    parser.add_argument(
        "--processes",
        nargs="+",
        type=partial(whole_number, lowest=2),
        default=[2, 8, 16, 64],
        help="numbers of processes (default: 2 8 16 64)",
    )
    parser.add_argument("--rows", type=whole_number, default=64, help="rows of each process (default: 64)")
    parser.add_argument("--width", type=whole_number, default=768, help="width of the embeddings (default: 768)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    check_output("--output", args.output)
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # the processes are threads
    cases = [(name, size) for size in args.processes for name in LOSSES]
    table = [measure(name, size, args.rows, args.width) for name, size in tqdm(cases, desc="losses", leave=False)]
    print(markdown_table(table))
    if args.output:
        write_json(args.output, {"settings": vars(args), "table": table, "versions": library_versions()})


if __name__ == "__main__":
    with cli_errors("communication.py"):
        main()
