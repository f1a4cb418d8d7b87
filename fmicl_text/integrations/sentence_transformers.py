"""f-MICL as losses of sentence-transformers: `SentenceTransformerTrainer(model, loss=FMICLLoss(model), ...)`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.base.losses.merged_forward import embed_columns
from torch import Tensor, nn

from fmicl_text.hub.model_card import CITATION
from fmicl_text.losses import contrastive as core
from fmicl_text.losses.divergences import FDivergence


class FMICLLoss(nn.Module):
    """f-MICL (arXiv 2402.10150) on the columns of a dataset: one of texts (their two views differ by dropout), two of
    pairs, or three of triplets (anchor, positive, hard negative). Labels are not used.

    Examples that share a text are no negatives of each other; texts are told apart by their tokens.

    Args:
        model: What is trained.
        divergence, gamma, alpha, negatives, similarity: As for `fmicl_text.FMICLLoss`.
        gather_across_devices: Under torch.distributed, take the loss of all processes' rows.

    Raises:
        ValueError: A hyperparameter outside its range.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        divergence: str | FDivergence = "kl",
        gamma: float = 20.0,
        alpha: float = 409600.0,
        negatives: str = "same_view",
        similarity: str = "gaussian",
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.gather_across_devices = gather_across_devices
        global_batch = "gather" if gather_across_devices else "none"
        self.objective = core.FMICLLoss(divergence, gamma, alpha, negatives, similarity, global_batch=global_batch)
        self.views_checked = False

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            sentence_features: Of each column, {input_ids: [N, T], ...}.
            labels: Not used.

        Raises:
            ValueError: Not one to three columns.
        """
        columns = columns_of(sentence_features)
        text_ids = token_ids(columns)
        return self.loss_from_views(embed_columns(self.model, columns), text_ids)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of two or three columns of embeddings [N, D]."""
        return self.loss_from_views(embeddings, None)

    def loss_from_views(self, embeddings: list[Tensor], text_ids: Tensor | None) -> Tensor:
        """The loss of views x, y and, where there are any, hard negatives."""
        x, y, *hard = embeddings
        if not self.views_checked and torch.equal(x, y):
            warnings.warn(
                "the two views of every text are identical: the model has no dropout (ModernBERT's default, for one). "
                "Set it in the model's config, or train on pairs of texts.",
                stacklevel=2,
            )
        self.views_checked = True
        if text_ids is not None:
            text_ids = text_ids[:, : len(embeddings)]
        return self.objective(x, y, hard[0] if hard else None, text_ids)

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card prints."""
        kwargs = {name: value for name, value in self.objective.hyperparameters.items() if name != "global_batch"}
        return kwargs | {"gather_across_devices": self.gather_across_devices}

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return CITATION


class CachedFMICLLoss(CachedLossMixin, FMICLLoss):
    """`FMICLLoss` in the memory of a mini-batch, with the same gradient (GradCache, arXiv 2101.06983).

    Args:
        model, divergence, gamma, alpha, negatives, similarity, gather_across_devices: As for `FMICLLoss`.
        mini_batch_size: Texts of a column that are embedded at once.
        mini_batch_num_tokens: Or so many tokens at most.
        show_progress_bar: Over the mini-batches.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        divergence: str | FDivergence = "kl",
        gamma: float = 20.0,
        alpha: float = 409600.0,
        negatives: str = "same_view",
        similarity: str = "gaussian",
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__(model, divergence, gamma, alpha, negatives, similarity, gather_across_devices)
        if mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must be at least 1, got {mini_batch_size}")
        if mini_batch_num_tokens is not None and mini_batch_num_tokens < 1:
            raise ValueError(f"mini_batch_num_tokens must be at least 1, got {mini_batch_num_tokens}")
        self.mini_batch_size, self.mini_batch_num_tokens = mini_batch_size, mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar
        self.text_ids: Tensor | None = None

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """As that of `FMICLLoss`."""
        columns = columns_of(sentence_features)
        self.text_ids = token_ids(columns)
        return self.forward_cached(columns, labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of mini-batches of embeddings, of each column a list."""
        loss = self.loss_from_views([torch.cat(mini_batches) for mini_batches in reps], self.text_ids)
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()


def columns_of(sentence_features: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Features of two or three columns; one alone is taken twice."""
    columns = list(sentence_features)
    if len(columns) == 1:
        return [columns[0], dict(columns[0])]  # a copy, for modules write into the features
    if len(columns) > 3:
        raise ValueError(f"f-MICL takes one to three columns (text; pairs; triplets), got {len(columns)}")
    return columns


def token_ids(columns: list[dict[str, Tensor]]) -> Tensor | None:
    """Integers [N, columns], equal where texts have equal tokens, in every process; None where there are no padded
    tokens [N, T] to compare."""
    hashes = []
    for features in columns:
        tokens, mask = features.get("input_ids"), features.get("attention_mask")
        if tokens is None or mask is None or tokens.ndim != 2 or tokens.shape != mask.shape:
            return None
        place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        hashes.append((scramble(tokens * 0x10001 + place) * mask).sum(1))
    return torch.stack(hashes, dim=1)


def scramble(numbers: Tensor) -> Tensor:
    """A bijection of int64 that spreads its input over all bits (splitmix64's finaliser, with arithmetic shifts)."""
    for factor, shift in ((-4658895280553007687, 31), (-7723592293110705685, 27)):
        numbers = (numbers ^ (numbers >> shift)) * factor
    return numbers ^ (numbers >> 33)
