"""Parts of a batch with random numbers of their own, so that a run can go on with another number of processes.

In a run of 2 processes with 8 examples each, a process draws the dropout masks and views of its 8 examples from seeds
of its own. If 1 process with 16 examples continues this run, its batch has two parts of 8, with the seeds, the padding
and the batch statistics of the processes that they replace. Each takes a forward pass of its own; the loss is that of
the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fmicl_text.model import ContrastiveModel, num_rows


class Parts:
    """The parts of the batches of one process.

    Args:
        size: Examples per part; the last part may have fewer. A batch of at most this many is one part.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.states: dict[int, list[Tensor]] = {}

    def number(self, examples: int) -> int:
        """The number of parts of a batch of so many examples."""
        return -(-examples // self.size)

    def split(self, model: ContrastiveModel, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """The parts of a batch of tensors [B, ...]."""
        return [inputs] if num_rows(inputs) <= self.size else model.split(inputs, self.size)

    def clear(self) -> None:
        """Forget the random states, before the next micro-batch."""
        self.states = {}

    @contextmanager
    def random_state(self, k: int, seed: Callable[[], None], device: torch.device) -> Iterator[None]:
        """The random state of part k: set by `seed` for its first forward pass, continued in the next, such as that
        of a momentum encoder."""
        if k in self.states:
            set_random_states(self.states[k], device)
        else:
            seed()
        yield
        self.states[k] = random_states(device)


def random_states(device: torch.device) -> list[Tensor]:
    """The global random state of the CPU, and of a CUDA device."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_states(states: list[Tensor], device: torch.device) -> None:
    """Set what `random_states` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def without_ddp(model: nn.Module) -> nn.Module:
    """The module inside DDP. DDP takes one forward pass per step; the gradients of others are exchanged as well, if
    they bypass it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def keep_statistics(model: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch normalization as they are. Of several processes, DDP keeps those of the
    first."""
    layers = [one for one in model.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, before, strict=True):
        buffer.data.copy_(value)  # not an in-place change for autograd, which the statistics do not affect


def part_size(batch: int, processes: int, saved: dict[str, Any]) -> int | None:
    """Examples per part with which a run goes on from a checkpoint.

    Args:
        batch, processes: Examples per process, and the number of processes.
        saved: The resume signature of the checkpoint.

    Returns:
        That of the checkpoint if every process has whole parts. If not, the examples per process: the random numbers
        then differ. None if the batch of all processes differs.
    """
    saved_batch = saved["per_device_train_batch_size"]
    if batch * processes != saved_batch * saved["processes"]:
        return None
    size = int(saved.get("examples_per_seed", saved_batch))
    return size if batch % size == 0 else batch
