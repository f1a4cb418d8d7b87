"""Training metrics logged with the loss: its two terms, the geometry of the embeddings, the throughput."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fmicl_text.evaluation.geometry import alignment, direction_shares, effective_rank, mean_cosine, uniformity
from fmicl_text.losses.contrastive import ContrastiveLoss
from fmicl_text.losses.pairs import LossTerms

ROWS = 512  # of a batch; enough for the logged metrics


class TrainingMetrics:
    """Sums of the metrics since the last log. They stay on the device until the next, so that no step synchronizes."""

    def __init__(self) -> None:
        self.start: float | None = None
        self.clear()

    def clear(self) -> None:
        """Reset the sums."""
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.rows: tuple[Tensor, Tensor, Tensor | None] | None = None
        self.amounts: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, terms: LossTerms, x: Tensor, y: Tensor, text_ids: Tensor | None = None) -> None:
        """Add one loss: its terms, the embeddings [B, D] of its two views, and the ids [B, V] of its texts."""
        first = x[:ROWS].detach()
        self.rows = first, y[:ROWS].detach(), None if text_ids is None else text_ids[:ROWS, :2]
        values = {
            "loss_positive": terms.positive,
            "loss_negative": terms.negative,
            "alignment": alignment(x, y),
            "uniformity": uniformity(first),
        }
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
        self.count += 1

    def count_inputs(self, unit: str, amount: Tensor) -> None:
        """Add a scalar amount of `unit`, such as tokens, to the throughput."""
        self.start = self.start or time.perf_counter()
        name = f"{unit}_per_second"
        self.amounts[name] = self.amounts.get(name, torch.zeros_like(amount)) + amount

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time spent within this context from the throughput."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self.start is not None:
                self.start += time.perf_counter() - began

    def take(self, loss: ContrastiveLoss) -> dict[str, float]:
        """Means and throughput of this process since the last call; mutual information by the loss, effective rank and
        mean cosine of its last batch."""
        values = {name: (total / self.count).item() for name, total in self.sums.items()}
        if self.rows is not None:
            x, y, text_ids = self.rows
            if (information := of_this_process(loss).mutual_information(x, y, text_ids=text_ids)) is not None:
                values["mutual_information"] = information.item()
            values["effective_rank"] = effective_rank(direction_shares(x)).item()
            values["mean_cosine"] = mean_cosine(x).item()
        now = time.perf_counter()
        seconds = now - (self.start or now)
        values |= {name: round(amount.item() / seconds, 1) for name, amount in self.amounts.items()}
        self.clear()
        self.start = now
        return values


def of_this_process(loss: ContrastiveLoss) -> ContrastiveLoss:
    """A copy of a loss for the rows of this process. In place of a queue, it has the negatives of the batch."""
    own = copy.copy(loss)
    own.global_batch = "none"
    if own.negatives == "queue":
        own.negatives = "cross_view"
    return own
