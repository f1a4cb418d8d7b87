"""f-MICL losses for sentence-transformers: `SentenceTransformerTrainer(model, loss=FMICLLoss(model), ...)`."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, has_static_embedding_input
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.base.modules import Router
from torch import Tensor

from fmicl_text import losses
from fmicl_text.errors import InputError
from fmicl_text.hub.model_card import CITATION
from fmicl_text.losses import FDivergence, Similarity
from fmicl_text.losses.balance import AUTO, is_auto
from fmicl_text.losses.blockwise import NEGATIVE_TERMS
from fmicl_text.losses.checks import require_choice
from fmicl_text.losses.distributed import world_size

OTHER_MODALITIES = ("pixel_values", "pixel_values_videos", "input_features", "input_values")


class FMICLLoss(losses.FMICLLoss):
    """f-MICL (arXiv 2402.10150) as a loss of sentence-transformers."""

    def __init__(
        self,
        model: SentenceTransformer,
        divergence: str | FDivergence = "kl",
        gamma: float | str = "auto",
        alpha: float | str = "auto",
        negatives: str | None = None,
        similarity: str | Similarity = "gaussian",
        gather_across_devices: bool = False,
    ) -> None:
        """
        Given a dataset of texts, (anchor, positive) pairs, (anchor, positive, negative) triplets, or (anchor, positive,
        negative_1, ..., negative_n) n-tuples, this loss maximizes a lower bound of an f-mutual information between
        anchors and positives. InfoNCE is the case of the KL divergence with another estimate of the bound.

        In plain terms, the loss works as follows:

        1. The embeddings of an anchor and its positive are pulled together. Their similarity is the f-Gaussian
           similarity, ``f'(exp(-gamma * ||x - y||^2))`` of the normalized embeddings.
        2. The embeddings of different examples are pushed apart, by the mean over all negative pairs of
           ``f*(f'(exp(-gamma * ||x_i - x_j||^2)))``, times ``alpha``. Hard negatives are pushed away from all anchors.

        If there is only one column, its texts are embedded twice. The two embeddings differ by dropout, as in SimCSE.

        Examples that share a text are not negatives of each other. Texts are compared by the tokens that the model
        receives, after truncation. A batch without negative pairs has the loss of its positive pairs alone.

        Args:
            model: SentenceTransformer model
            divergence: Name of the f-divergence: "kl", "js", "pearson", "sh", "tsallis", "vlc", "jeffrey", or another
                name that :func:`fmicl_text.load_divergence` accepts; or an :class:`fmicl_text.FDivergence`, e.g.
                ``FDivergence.from_convex(lambda u: u**1.5)``.
            gamma: Scale of the squared distance, greater than 0. A higher gamma puts more emphasis on close pairs. On
                normalized embeddings, ``scale = 2 * gamma`` in :class:`MultipleNegativesRankingLoss`. "auto" is
                measured on the first training batch: at most 20 for "kl" and "js", 10 for "pearson" and "vlc", 40 for
                "sh" and 20 / order for "tsallis", and less, down to a quarter, for models that separate positive from
                negative pairs little. The paper uses 20 for text.
            alpha: Weight of the negative pairs, greater than 0. "auto" is measured on the first training batch, as the
                weight at which the attraction of positives and the repulsion of negatives balance. The paper uses
                409600 for text with gamma 20. The best alpha depends on the model and on gamma: from 1e5 to 1e13 for
                gamma 20. Checkpoints do not contain measured numbers: to resume a training, pass ``loss.gamma`` and
                ``loss.alpha`` of the first part.
            negatives: Which pairs of different examples are negatives. By default "same_view" for one column of texts
                and "cross_view" for pairs, triplets and n-tuples. Options:

                - "same_view": anchor -> all other anchors, as in the paper.
                - "cross_view": anchor -> the positives of all other examples, as in
                  :class:`MultipleNegativesRankingLoss`.
                - "both": the pairs of "same_view" and of "cross_view".

            similarity: "gaussian", the f-Gaussian similarity; "cosine", the cosine similarity in its place; or a
                :class:`fmicl_text.losses.Similarity`.
            gather_across_devices: If True, compute the loss on the embeddings of all devices. Recommended when training
                on multiple GPUs, because every example then has the negatives of all of them.

        Raises:
            ValueError: A hyperparameter is out of range. Hyperparameters are attributes that can be changed during
                training, e.g. ``loss.alpha = 4000``, and are checked then, too.

        References:
            - $f$-MICL: Understanding and Generalizing InfoNCE-based Contrastive Learning: https://huggingface.co/papers/2402.10150

        Requirements:
            1. texts, (anchor, positive) pairs, (anchor, positive, negative) triplets, or (anchor, positive, negative_1,
               ..., negative_n) n-tuples
            2. A model with dropout if there is only one column

        Inputs:
            +-------------------------------------------------+--------+
            | Inputs                                          | Labels |
            +=================================================+========+
            | texts                                           | none   |
            +-------------------------------------------------+--------+
            | (anchor, positive) pairs                        | none   |
            +-------------------------------------------------+--------+
            | (anchor, positive, negative) triplets           | none   |
            +-------------------------------------------------+--------+
            | (anchor, positive, negative_1, ..., negative_n) | none   |
            +-------------------------------------------------+--------+

        Recommendations:
            - Use ``BatchSamplers.NO_DUPLICATES`` (:class:`docs <sentence_transformers.base.sampler.BatchSamplers>`) to
              fill batches with different texts. Duplicates are no negatives of each other, so they are harmless, but a
              batch has fewer negative pairs.

        Relations:
            - :class:`CachedFMICLLoss` is equivalent to this loss, but it uses caching that allows for much higher batch
              sizes without extra memory usage. However, it is slightly slower.
            - :class:`MultipleNegativesRankingLoss` optimizes the InfoNCE bound: a log-sum-exp over the negatives of an
              anchor in place of the mean over all negative pairs.

        Example:
            ::

                from datasets import Dataset
                from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

                from fmicl_text.integrations.sentence_transformers import FMICLLoss

                model = SentenceTransformer("microsoft/mpnet-base")
                train_dataset = Dataset.from_dict({
                    "anchor": ["It's nice weather outside today.", "He drove to work."],
                    "positive": ["It's so sunny.", "He took the car to the office."],
                })
                loss = FMICLLoss(model, divergence="js")

                trainer = SentenceTransformerTrainer(
                    model=model,
                    train_dataset=train_dataset,
                    loss=loss,
                )
                trainer.train()
        """
        super().__init__(divergence, gamma, alpha, negatives or "same_view", similarity)
        self.negatives_by_columns = negatives is None
        self.model = model
        self.gather_across_devices = gather_across_devices
        self.views_checked = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "negatives":  # there is no queue
            require_choice(name, value, NEGATIVE_TERMS)
            self.negatives_by_columns = False
        if name == "gather_across_devices":
            value = bool(value)
            self.global_batch = "gather" if value else "none"
        super().__setattr__(name, value)

    def forward(  # type: ignore[override]  # sentence-transformers calls a loss with features
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            sentence_features: {input_ids: [N, T], ...} for each column.
            labels: Not used.

        Raises:
            ValueError: There are no columns.
        """
        columns = self.views_of_columns(sentence_features)
        ids = self.ids_of_columns(columns)
        return self.masked_loss(embed_columns(self.model, columns), ids)

    def views_of_columns(self, sentence_features: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Features of two or more columns: a single column is used twice. Chooses the negatives, if none were given."""
        columns = list(sentence_features)
        self.choose_negatives(len(columns))
        return view_columns(columns)

    def choose_negatives(self, num_columns: int) -> None:
        """Use `cross_view` for pairs and `same_view` for single texts, unless negatives were given."""
        if self.negatives_by_columns:
            vars(self)["negatives"] = "cross_view" if num_columns > 1 else "same_view"

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of two or more columns of embeddings [N, D]. Without tokens, all texts are taken to differ."""
        self.choose_negatives(len(embeddings))
        return self.masked_loss(embeddings, [])

    def ids_of_columns(self, columns: list[dict[str, Any]]) -> list[Tensor | None]:
        """`token_ids` of every column. Those of columns with different tasks differ if the model embeds and tokenizes
        each task with other modules."""
        ids = [token_ids(features) for features in columns]
        tasks = [features.get("task") for features in columns]
        if len(set(tasks)) > 1 and any(isinstance(module, Router) for module in self.model.modules()):
            salts = [zlib.crc32(str(task).encode()) for task in tasks]
            ids = [None if own is None else scramble(own ^ salt) for own, salt in zip(ids, salts, strict=True)]
        return ids

    def masked_loss(self, embeddings: list[Tensor], ids: list[Tensor | None]) -> Tensor:
        """The loss of two or more columns of embeddings [N, D], given their text ids; [] if no texts are equal."""
        if len(embeddings) < 2:
            raise InputError(f"expected at least two columns of embeddings, got {len(embeddings)}")
        x, y, *hard = embeddings
        training = self.model.training and torch.is_grad_enabled()  # otherwise, dropout is off
        if training and not self.views_checked:
            self.views_checked = True
            if torch.equal(x, y):
                warnings.warn(
                    "both views of every text are identical because the model has no dropout (the default of "
                    "ModernBERT, for example). Set dropout in the model's config, or train on pairs of texts.",
                    stacklevel=2,
                )
        text_ids = None
        if any(column is not None for column in ids):
            others = [distinct_ids(len(x), column, x.device) for column in range(len(ids))]
            pairs = zip(ids, others, strict=True)
            text_ids = torch.stack([other if column is None else column for column, other in pairs], dim=1)
        automatic = {"gamma": self.gamma_is_auto, "alpha": is_auto(self.alpha)}
        try:
            return self.terms(x, y, torch.stack(hard, dim=1) if hard else None, text_ids).loss
        finally:
            for name, was_auto in automatic.items():
                if was_auto and not training:  # of an evaluation before the first step
                    setattr(self, name, AUTO)

    def get_config_dict(self) -> dict[str, Any]:
        """Hyperparameters, for the model card; negatives are None if they depend on the number of columns."""
        return self.hyperparameters | ({"negatives": None} if self.negatives_by_columns else {})

    @property
    def citation(self) -> str:
        """BibTeX entry of the paper."""
        return CITATION


class CachedFMICLLoss(CachedLossMixin, FMICLLoss):
    """`FMICLLoss` with the memory use of a mini-batch and the same gradient (GradCache, arXiv 2101.06983)."""

    def __init__(
        self,
        model: SentenceTransformer,
        divergence: str | FDivergence = "kl",
        gamma: float | str = "auto",
        alpha: float | str = "auto",
        negatives: str | None = None,
        similarity: str | Similarity = "gaussian",
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
    ) -> None:
        """
        Boosted version of :class:`FMICLLoss` that caches the gradients of the loss with respect to the embeddings
        (GradCache). The batch size is then not limited by the memory of the encoder:

        (1) Embed all texts in mini-batches, without gradients.
        (2) Compute the loss and its gradient with respect to the embeddings, in blocks of pairs for large batches.
        (3) Embed all texts again, with gradients and the same dropout, and chain the gradients of (2) to them.

        Args:
            model: SentenceTransformer model
            divergence: See :class:`FMICLLoss`.
            gamma: See :class:`FMICLLoss`.
            alpha: See :class:`FMICLLoss`.
            negatives: See :class:`FMICLLoss`.
            similarity: See :class:`FMICLLoss`.
            mini_batch_size: Number of texts of a column to embed at once. It changes memory use and speed, not the
                loss. Defaults to 32.
            mini_batch_num_tokens: Maximum number of tokens (without padding) to embed at once, in place of
                ``mini_batch_size``. Useful with texts of different lengths.
            gather_across_devices: See :class:`FMICLLoss`.
            show_progress_bar: If True, show a progress bar over the mini-batches.

        Raises:
            ValueError: A hyperparameter is out of range, or the model is based on a StaticEmbedding, whose inputs
                cannot be split into mini-batches.

        References:
            - $f$-MICL: Understanding and Generalizing InfoNCE-based Contrastive Learning: https://huggingface.co/papers/2402.10150
            - Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup: https://huggingface.co/papers/2101.06983

        Requirements:
            1. texts, (anchor, positive) pairs, (anchor, positive, negative) triplets, or (anchor, positive, negative_1,
               ..., negative_n) n-tuples
            2. Should be used with large `per_device_train_batch_size` and low `mini_batch_size` for superior
               performance, but slower training time than :class:`FMICLLoss`.

        Inputs:
            +-------------------------------------------------+--------+
            | Inputs                                          | Labels |
            +=================================================+========+
            | texts                                           | none   |
            +-------------------------------------------------+--------+
            | (anchor, positive) pairs                        | none   |
            +-------------------------------------------------+--------+
            | (anchor, positive, negative) triplets           | none   |
            +-------------------------------------------------+--------+
            | (anchor, positive, negative_1, ..., negative_n) | none   |
            +-------------------------------------------------+--------+

        Recommendations:
            - Use ``BatchSamplers.NO_DUPLICATES`` (:class:`docs <sentence_transformers.base.sampler.BatchSamplers>`) to
              fill batches with different texts.

        Relations:
            - Equivalent to :class:`FMICLLoss`, but with caching that allows for much higher batch sizes without extra
              memory usage. It embeds every text twice, so it is slower than :class:`FMICLLoss`.

        Example:
            ::

                from datasets import Dataset
                from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

                from fmicl_text.integrations.sentence_transformers import CachedFMICLLoss

                model = SentenceTransformer("microsoft/mpnet-base")
                train_dataset = Dataset.from_dict({
                    "anchor": ["It's nice weather outside today.", "He drove to work."],
                    "positive": ["It's so sunny.", "He took the car to the office."],
                })
                loss = CachedFMICLLoss(model, divergence="js", mini_batch_size=64)

                trainer = SentenceTransformerTrainer(
                    model=model,
                    train_dataset=train_dataset,
                    loss=loss,
                )
                trainer.train()
        """
        super().__init__(model, divergence, gamma, alpha, negatives, similarity, gather_across_devices)
        if has_static_embedding_input(model):
            raise InputError(
                "CachedFMICLLoss cannot split the inputs of a StaticEmbedding into mini-batches. Use FMICLLoss instead"
            )
        self.mini_batch_size, self.mini_batch_num_tokens = mini_batch_size, mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar
        self.ids: list[Tensor | None] = []

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mini_batch_size" or (name == "mini_batch_num_tokens" and value is not None):
            require_at_least_1(name, value)
        super().__setattr__(name, value)

    def forward(  # type: ignore[override]
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar; see `FMICLLoss`."""
        columns = self.views_of_columns(sentence_features)
        self.ids = self.ids_of_columns(columns)
        try:
            return self.forward_cached(columns, labels)
        finally:
            self.ids = []

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of a list of mini-batches of embeddings for each column."""
        loss = self.masked_loss([torch.cat(mini_batches) for mini_batches in reps], self.ids)
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()

    def get_config_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().get_config_dict().items() if name != "show_progress_bar"}


def require_at_least_1(name: str, value: int) -> None:
    """Raise a ValueError that names the argument, unless the value is an integer of at least 1."""
    if not isinstance(value, Integral) or value < 1:
        raise InputError(f"{name} must be an integer of at least 1, got {value!r}")


def view_columns(sentence_features: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Features of two or more columns; a single column is used twice."""
    columns = list(sentence_features)
    if not columns:
        raise InputError("expected one or more columns (texts; pairs; triplets; n-tuples), got 0")
    if len(columns) == 1:  # modules write into the features, and AdaptiveLayerLoss reads that at its next call
        return [columns[0], columns[0].setdefault("second_view", dict(columns[0]))]
    return columns


def token_ids(features: dict[str, Any]) -> Tensor | None:
    """Text ids [N] of a column: integers that are equal where the model receives the same tokens in the same order, in
    every process. Padding does not count. None if the column does not consist of tokens alone.

    Args:
        features: Padded (input_ids and attention_mask [N, T]), concatenated for flash attention (input_ids [1, T] and
            cu_seq_lens_q [N + 1]), or concatenated for an embedding bag (input_ids [T] and offsets [N]).
    """
    tokens, mask = features.get("input_ids"), features.get("attention_mask")
    if tokens is None or any(name in features for name in OTHER_MODALITIES):
        return None
    starts = features.get("offsets")
    if "cu_seq_lens_q" in features:
        starts = features["cu_seq_lens_q"][:-1]
    if starts is None:
        mask = torch.ones_like(tokens) if mask is None else mask.bool()
        return (token_hashes(tokens, mask.cumsum(1)) * mask).sum(1)
    tokens = tokens.flatten()
    place = torch.arange(len(tokens), device=tokens.device)
    row = torch.searchsorted(starts.contiguous(), place, right=True) - 1
    hashes = token_hashes(tokens, place - starts[row] + 1)
    return hashes.new_zeros(len(starts)).index_add_(0, row, hashes)


def token_hashes(tokens: Tensor, place: Tensor) -> Tensor:
    """Hashes of tokens at their places, both < 2^31 and of the same shape."""
    return scramble((tokens.long() << 32) + place)


def distinct_ids(num_rows: int, column: int, device: torch.device) -> Tensor:
    """Ids [N] of inputs that are not texts, different in every row, column and process."""
    rank = dist.get_rank() if world_size() > 1 else 0
    return scramble(-1 - (torch.arange(num_rows, device=device) + (((column << 12) + rank) << 32)))


def scramble(numbers: Tensor) -> Tensor:
    """A bijection of int64 that mixes all bits (splitmix64's finalizer, with arithmetic shifts)."""
    for factor, shift in ((-4658895280553007687, 31), (-7723592293110705685, 27)):
        numbers = (numbers ^ (numbers >> shift)) * factor
    return numbers ^ (numbers >> 33)
