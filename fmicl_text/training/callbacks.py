"""What training is told when numbers go wrong: embeddings that collapse, a loss that is not finite."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fmicl_text.errors import InputError
from fmicl_text.losses.contrastive import ContrastiveLoss
from fmicl_text.losses.similarity import SIMILARITIES, unit_rows

ROWS = 512  # of a batch; a message need not look at all pairs
FEW_ROWS = 32  # in a batch of fewer the effective rank is small, and noise


class NonFiniteError(InputError):
    """The loss, a gradient or a weight is inf or nan; no weight was changed by it and nothing saved."""


@torch.no_grad()
def describe_views(loss: ContrastiveLoss, x: Tensor, y: Tensor) -> str:
    """The range of the similarity over pairs of rows of two views [N, D], or how many rows are not finite."""
    rows = torch.cat([x[:ROWS], y[:ROWS]])
    if num_bad := int((~rows.isfinite()).any(1).sum()):
        return f"{num_bad} of {len(rows)} embeddings not finite"
    rows = unit_rows(rows)
    values = SIMILARITIES[loss.similarity].pairwise(rows, rows, loss.gamma)
    name = "r" if loss.similarity == "gaussian" else "cosine"
    return f"{name} from {values.min().item():.4g} to {values.max().item():.4g}"


class SkippedStepsCallback(TrainerCallback, ExportableState):
    """Counts the steps that were left out, over all parts of a run that was cut short and gone on with.

    Attributes:
        nonfinite_steps: Where the loss or a gradient was not finite; the trainer counts them.
        overflow_steps: Those that the scaler of fp16 left out.
    """

    def __init__(self) -> None:
        self.nonfinite_steps = self.overflow_steps = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.overflow_steps += kwargs["optimizer"].step_was_skipped

    def counts(self) -> dict[str, int]:
        """For the log: those that are not 0."""
        return {name: count for name, count in vars(self).items() if count}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": dict(vars(self))}


class CollapseMonitor(TrainerCallback, ExportableState):
    """Looks at every logged `effective_rank` and `mean_cosine`, and warns when a collapse begins.

    That is an effective rank below a third of the highest so far, or below 2, or a mean cosine above 0.99, as long as
    it does not get better: many an encoder starts there, and leaves at once. Batches below `FEW_ROWS` are
    not looked at.
    """

    def __init__(self) -> None:
        self.highest = 0.0
        self.before: tuple[float, float] | None = None
        self.told = False

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.train_batch_size < FEW_ROWS:
            return
        if (words := self.look(kwargs["logs"], state.global_step)) is not None:
            warnings.warn(words, stacklevel=2)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": dict(vars(self))}

    def look(self, logs: Mapping[str, float], step: int) -> str | None:
        """What to tell at the step of these logs; None where all is well, or told already."""
        if not {"effective_rank", "mean_cosine"} <= logs.keys():
            return None
        rank, cosine = logs["effective_rank"], logs["mean_cosine"]
        self.highest = max(self.highest, rank)
        low = rank < max(2.0, self.highest / 3) and (self.before is not None and rank <= self.before[0])
        close = cosine > 0.99 and (self.before is not None and cosine >= self.before[1])
        self.before = rank, cosine
        news = (low or close) and not self.told
        self.told = low or close
        if not news:
            return None
        return (
            f"step {step}: embeddings are collapsing, effective rank {rank:.1f} (highest so far {self.highest:.1f}), "
            f"mean cosine {cosine:.3f}. What usually helps: a divergence that passes the uniformity condition (kl, js, "
            "pearson, vlc), a lower --learning_rate, a larger --alpha"
        )
