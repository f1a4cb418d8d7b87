"""The epoch in DataLoader workers that live on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset


class EpochRows(Dataset):
    """A map-style dataset with the method `set_epoch`. Persistent workers have copies of it, on which only this class
    can call the method: before it reads a row.

    Args:
        dataset: The dataset.
        epoch: The current epoch, an integer in shared memory.
    """

    def __init__(self, dataset: Any, epoch: Tensor) -> None:
        self.dataset, self.epoch, self.seen = dataset, epoch, int(epoch)
        self.column_names = getattr(dataset, "column_names", None)

    def set_epoch(self, epoch: int) -> None:
        """Called in the main process; see also `SetEpochCallback`."""
        self.dataset.set_epoch(epoch)
        self.epoch.fill_(epoch)
        self.seen = epoch

    def current(self) -> Any:
        """The dataset, in the current epoch."""
        if (epoch := int(self.epoch)) != self.seen:
            self.dataset.set_epoch(epoch)
            self.seen = epoch
        return self.dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        return self.current()[i]

    def __getitems__(self, rows: list[int]) -> Any:
        """Rows of a batch, with the dataset's own method for this if it has one."""
        dataset = self.current()
        return dataset.__getitems__(rows) if hasattr(dataset, "__getitems__") else [dataset[i] for i in rows]


class EpochStream(EpochRows, IterableDataset):
    """Like `EpochRows`, for an iterable dataset."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.current())


def for_live_workers(dataset: Any, epoch: Tensor) -> Any:
    """A dataset for workers that live for several epochs. Streams of `datasets` keep their epoch in shared memory."""
    if not hasattr(dataset, "set_epoch") or isinstance(dataset, datasets.IterableDataset):
        return dataset
    return (EpochStream if isinstance(dataset, IterableDataset) else EpochRows)(dataset, epoch)
