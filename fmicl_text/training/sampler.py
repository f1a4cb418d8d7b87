"""The order of length-grouped batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class SeededLengthSampler(LengthGroupedSampler):
    """Batches of similar length in random order, determined by (seed, epoch): the same in every process and after a
    resume.

    The base class draws from the global random state, and sorts 50 batches at a time from long to short: the first
    batches, on which gamma and alpha are measured, would have the longest texts. Here only the first batch has: if
    memory is too small, it runs out at once. `SetEpochCallback` sets the epoch, because accelerate does not after a
    resume with several processes, where it wraps the sampler more deeply.

    Args:
        batch_size: Examples of a step, of all processes and accumulated batches.
        lengths: Length of every example in tokens.
        seed: Random seed.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, which determines the order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        order = list(super().__iter__())
        whole = len(order) // self.batch_size
        shuffled = 1 + torch.randperm(max(whole - 1, 0), generator=self.generator)
        for batch in (*range(min(whole, 1)), *shuffled.tolist(), whole):  # an incomplete batch stays the last
            yield from order[batch * self.batch_size : (batch + 1) * self.batch_size]
