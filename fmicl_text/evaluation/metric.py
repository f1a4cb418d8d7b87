"""`pair_correlations` as a metric of the `evaluate` library."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import torch

from fmicl_text.evaluation.correlation import pair_correlations


class EmbeddingSimilarity(evaluate.Metric):
    """`pair_correlations` with the interface of `evaluate`: `compute`, `add_batch`, `combine`. Works offline.

    >>> metric = EmbeddingSimilarity(keep_in_memory=True)
    >>> x, y = [[1.0, 0.0]] * 3, [[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    >>> round(metric.compute(embeddings1=x, embeddings2=y, references=[5.0, 0.0, 3.0])["spearman_cosine"], 2)
    100.0
    """

    def _info(self) -> evaluate.MetricInfo:
        rows = datasets.List(datasets.Value("float64"))
        features = {"embeddings1": rows, "embeddings2": rows, "references": datasets.Value("float64")}
        return evaluate.MetricInfo(
            description="Spearman and Pearson correlation, times 100, of cosine, dot product and Euclidean distance of "
            "pairs of embeddings with their scores.",
            citation="",
            inputs_description="embeddings1, embeddings2: N rows of D numbers; references: N similarity scores.",
            features=datasets.Features(features),
        )

    def _compute(self, embeddings1: Any, embeddings2: Any, references: list[float]) -> dict[str, float]:
        x, y = (torch.tensor(rows, dtype=torch.float64) for rows in (embeddings1, embeddings2))
        return pair_correlations(x, y, references)
