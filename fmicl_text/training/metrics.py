"""Training metrics logged with the loss: its two terms, the geometry of the embeddings, the throughput."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fmicl_text.evaluation.geometry import alignment, direction_shares, effective_rank, mean_cosine, uniformity
from fmicl_text.losses.contrastive import LossTerms

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
        self.rows: Tensor | None = None
        self.amounts: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, terms: LossTerms, x: Tensor, y: Tensor) -> None:
        """Add one loss: its terms and the embeddings [B, D] of its two views."""
        self.rows = x[:ROWS].detach()
        values = {
            "loss_positive": terms.positive,
            "loss_negative": terms.negative,
            "alignment": alignment(x, y),
            "uniformity": uniformity(self.rows),
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

    def take(self) -> dict[str, float]:
        """Means and throughput of this process since the last call, and effective rank and mean cosine of its last
        batch."""
        values = {name: (total / self.count).item() for name, total in self.sums.items()}
        if self.rows is not None:
            values["effective_rank"] = effective_rank(direction_shares(self.rows)).item()
            values["mean_cosine"] = mean_cosine(self.rows).item()
        now = time.perf_counter()
        seconds = now - (self.start or now)
        values |= {name: round(amount.item() / seconds, 1) for name, amount in self.amounts.items()}
        self.clear()
        self.start = now
        return values
