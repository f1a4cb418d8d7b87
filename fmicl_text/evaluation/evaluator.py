"""Evaluation of an encoder during training."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
from datasets import Dataset
from datasets.fingerprint import Hasher
from scipy import stats
from sentence_transformers import SentenceTransformer

from fmicl_text.evaluation.correlation import cosine_levels
from fmicl_text.evaluation.encoding import encode_sentences
from fmicl_text.evaluation.sts import embed_pairs, sts_metrics

LOGGED = ("spearman", "pearson", "alignment", "uniformity")


@dataclass
class STSEvaluator:
    """Evaluates an encoder on sentence pairs with similarity scores.

    Calling it with a SentenceTransformer returns sts_spearman, sts_pearson, sts_alignment and sts_uniformity, which the
    trainer logs as `eval_sts_spearman` and so on.

    Args:
        dataset: Sentence pairs in the format of `load_pairs`: sentence1, sentence2, score.
        batch_size: Sentences per forward pass.
        progress: Show a progress bar while encoding.

    Attributes:
        observations: Of the last call: rank of the cosine (equal ones are equal) and score of every pair, [N, 2].
    """

    dataset: Dataset
    batch_size: int = 64
    progress: bool = True
    observations: np.ndarray | None = field(default=None, init=False, repr=False, compare=False)
    primary_metric, greater_is_better, items = "sts_spearman", True, "pairs"
    smallest_differences: ClassVar[dict[str, float]] = {"sts_spearman": 0.1, "sts_pearson": 0.1}  # for the verdict

    def describe(self) -> dict[str, str]:
        """A hash of the evaluation data, which is compared when a run is resumed."""
        return {"evaluation_data": Hasher.hash(self.dataset.to_dict())}

    def __call__(self, encoder: SentenceTransformer) -> dict[str, float]:
        encode = partial(encode_sentences, encoder, batch_size=self.batch_size, progress=self.progress)
        x, y = (rows.detach().float().cpu() for rows in embed_pairs(encode, self.dataset))
        gold = list(self.dataset["score"])
        scores = sts_metrics(x, y, gold)
        self.observations = np.stack([cosine_levels(x, y), np.asarray(gold, dtype=float)], axis=1)
        return {f"sts_{name}": scores[name] for name in LOGGED if name in scores}

    @staticmethod
    def metric_of(observations: np.ndarray) -> float:
        """`sts_spearman` of some of the pairs; see `bootstrap_difference`."""
        return 100 * float(stats.spearmanr(observations[:, 0], observations[:, 1]).statistic)
