"""f-MICL losses for sentence-transformers: `SentenceTransformerTrainer(model, loss=FMICLLoss(model), ...)`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.base.losses.merged_forward import embed_columns
from torch import Tensor

from fmicl_text import losses
from fmicl_text.hub.model_card import CITATION
from fmicl_text.losses import FDivergence, Similarity


class FMICLLoss(losses.FMICLLoss):
    """f-MICL (arXiv 2402.10150) on the columns of a dataset: one column of texts (two dropout views of each), two for
    pairs, or three for triplets (anchor, positive, hard negative). Labels are not used.

    Examples that share a text are not negatives of each other; texts are compared by their tokens.

    Args:
        model: The model to train.
        divergence, gamma, alpha, negatives, similarity: See `fmicl_text.FMICLLoss`.
        gather_across_devices: Under torch.distributed, compute the loss on the rows of all processes.

    Raises:
        ValueError: A hyperparameter is out of range.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        divergence: str | FDivergence = "kl",
        gamma: float = 20.0,
        alpha: float = 409600.0,
        negatives: str = "same_view",
        similarity: str | Similarity = "gaussian",
        gather_across_devices: bool = False,
    ) -> None:
        global_batch = "gather" if gather_across_devices else "none"
        super().__init__(divergence, gamma, alpha, negatives, similarity, global_batch=global_batch)
        self.model = model
        self.gather_across_devices = gather_across_devices
        self.views_checked = False

    def forward(  # type: ignore[override]  # sentence-transformers calls a loss with features
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            sentence_features: {input_ids: [N, T], ...} for each column.
            labels: Not used.

        Raises:
            ValueError: There are not one to three columns.
        """
        columns = view_columns(sentence_features)
        text_ids = token_ids(columns)
        return self.masked_loss(embed_columns(self.model, columns), text_ids)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of two or three columns of embeddings [N, D]."""
        return self.masked_loss(embeddings, None)

    def masked_loss(self, embeddings: list[Tensor], text_ids: Tensor | None) -> Tensor:
        """The loss of two or three columns of embeddings [N, D]. Pairs of equal texts are not negatives."""
        x, y, *hard = embeddings
        if not self.views_checked and torch.equal(x, y):
            warnings.warn(
                "both views of every text are identical because the model has no dropout (the default of ModernBERT, "
                "for example). Set dropout in the model's config, or train on pairs of texts.",
                stacklevel=2,
            )
        self.views_checked = True
        if text_ids is not None:
            text_ids = text_ids[:, : len(embeddings)]
        return self.terms(x, y, hard[0] if hard else None, text_ids).loss

    def get_config_dict(self) -> dict[str, Any]:
        """Hyperparameters, for the model card."""
        return self.hyperparameters

    @property
    def citation(self) -> str:
        """BibTeX entry of the paper."""
        return CITATION


class CachedFMICLLoss(CachedLossMixin, FMICLLoss):
    """`FMICLLoss` with the memory use of a mini-batch and the same gradient (GradCache, arXiv 2101.06983).

    Args:
        model, divergence, gamma, alpha, negatives, similarity, gather_across_devices: See `FMICLLoss`.
        mini_batch_size: Number of texts of a column to embed at once.
        mini_batch_num_tokens: Maximum number of tokens to embed at once, in place of `mini_batch_size`.
        show_progress_bar: Whether to show a progress bar over the mini-batches.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        divergence: str | FDivergence = "kl",
        gamma: float = 20.0,
        alpha: float = 409600.0,
        negatives: str = "same_view",
        similarity: str | Similarity = "gaussian",
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

    def forward(  # type: ignore[override]
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar; see `FMICLLoss`."""
        columns = view_columns(sentence_features)
        self.text_ids = token_ids(columns)
        return self.forward_cached(columns, labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of a list of mini-batches of embeddings for each column."""
        loss = self.masked_loss([torch.cat(mini_batches) for mini_batches in reps], self.text_ids)
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()

    def get_config_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().get_config_dict().items() if name != "show_progress_bar"}


def view_columns(sentence_features: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Features of two or three columns; a single column is used twice."""
    columns = list(sentence_features)
    if len(columns) == 1:
        return [columns[0], dict(columns[0])]  # a copy, because modules write into the features
    if len(columns) > 3:
        raise ValueError(f"expected one to three columns (text; pairs; triplets), got {len(columns)}")
    return columns


def token_ids(columns: list[dict[str, Tensor]]) -> Tensor | None:
    """Text ids [N, columns]: integers that are equal where texts have equal tokens, in every process. None if the
    features are not padded tokens [N, T]."""
    hashes = []
    for features in columns:
        tokens, mask = features.get("input_ids"), features.get("attention_mask")
        if tokens is None or mask is None or tokens.ndim != 2 or tokens.shape != mask.shape:
            return None
        place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        hashes.append((scramble(tokens * 0x10001 + place) * mask).sum(1))
    return torch.stack(hashes, dim=1)


def scramble(numbers: Tensor) -> Tensor:
    """A bijection of int64 that mixes all bits (splitmix64's finalizer, with arithmetic shifts)."""
    for factor, shift in ((-4658895280553007687, 31), (-7723592293110705685, 27)):
        numbers = (numbers ^ (numbers >> shift)) * factor
    return numbers ^ (numbers >> 33)
