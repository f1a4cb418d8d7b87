"""The order of length-grouped batches."""

from __future__ import annotations

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class SeededLengthSampler(LengthGroupedSampler):
    """Batches of similar length, in an order determined by (seed, epoch): the same in every process and after a resume.

    The base class draws the order from the global random state. `SetEpochCallback` sets the epoch, because accelerate
    does not after a resume with several processes, where it wraps the sampler more deeply.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, which determines the order."""
        self.generator.manual_seed(self.seed + epoch)
