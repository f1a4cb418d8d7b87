"""Where training stands: the order of batches and the epoch, that processes share and a resumed run finds again."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler


class LengthSampler(LengthGroupedSampler):
    """Batches of like length in an order that (seed, epoch) determine: the same in every process and after a resume.

    The base class draws it from the global random state. accelerate would set the epoch, but not after a resume on
    several processes, where it wraps the sampler more deeply: `SetEpochCallback` does."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.generator.manual_seed(self.seed + epoch)


class SetEpochCallback(TrainerCallback):
    """Tells a trainer where it stands: the epoch for its length sampler and its dataset (accelerate tells neither on
    several processes), the first micro-step of a step for dropout."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.length_sampler is not None:
            self.trainer.length_sampler.set_epoch(int(state.epoch or 0))
        dataset: Any = self.trainer.train_dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.micro_step = 0
        self.trainer.losses = []
