"""Agreement of embedding similarities with graded pairs: a function, and the same as a metric of `evaluate`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import torch
from scipy import stats
from torch import Tensor

from fmicl_text.errors import InputError

RESOLUTION = 1e-10  # similarities of equal float32 embeddings differ by less than this times their size


def pair_similarities(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Similarities of row i of x with row i of y, [N] in float64: cosine, dot, and minus the Euclidean distance.

    Args:
        x: Embeddings [N, D], any length.
        y: Their partners [N, D].
    """
    x, y = x.double(), y.double()
    dot = (x * y).sum(dim=-1)
    return {
        "cosine": dot / (x.norm(dim=-1) * y.norm(dim=-1)),
        "dot": dot,
        "euclidean": -(x - y).norm(dim=-1),
    }


def pair_correlations(x: Tensor, y: Tensor, scores: Tensor | list[float]) -> dict[str, float]:
    """Spearman's and Pearson's correlation, times 100, of similarities with scores, over all pairs.

    Args:
        x: Embeddings [N, D], N >= 2.
        y: Their partners [N, D].
        scores: What people gave the pairs, [N].

    Returns:
        spearman_cosine, pearson_cosine, spearman_dot, ..., pearson_euclidean, in [-100, 100]. Where all dot products
        or all distances are equal (those of unit rows that coincide) theirs are left out.

    Raises:
        InputError: A correlation with the cosine is undefined: non-finite or zero embeddings, equal cosines or scores.
    """
    gold = torch.as_tensor(scores, dtype=torch.float64)
    if not (x.ndim == 2 and x.shape == y.shape and gold.shape == x.shape[:1]):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (x, y, gold))
        raise ValueError(f"embeddings must be [N, D] twice and scores [N], got {shapes}")
    similarities = pair_similarities(x, y)
    if num_bad := int((~similarities["cosine"].isfinite()).sum()):
        raise InputError(f"{num_bad} of {len(x)} pairs have no cosine: their embeddings hold NaN, infinity or only 0")
    for what, values in (("cosines", similarities["cosine"]), ("scores", gold)):
        if is_constant(values):
            raise InputError(f"the {what} of all {len(values)} pairs are equal: Spearman and Pearson are undefined")
    return {
        f"{statistic}_{name}": 100 * float(correlate(values.numpy(), gold.numpy()).statistic)
        for name, values in similarities.items()
        if not is_constant(values)
        for statistic, correlate in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr))
    }


def is_constant(values: Tensor) -> bool:
    """Whether numbers [N] are all the same, to the rounding of float32 embeddings."""
    return len(values) < 2 or bool(values.max() - values.min() <= RESOLUTION * values.abs().max().clamp_min(1e-300))


class EmbeddingSimilarity(evaluate.Metric):
    """`pair_correlations` as a metric of the `evaluate` library: compute, add_batch, combine; nothing is downloaded.

    >>> metric = EmbeddingSimilarity(keep_in_memory=True)
    >>> x, y = [[1.0, 0.0]] * 3, [[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    >>> round(metric.compute(embeddings1=x, embeddings2=y, references=[5.0, 0.0, 3.0])["spearman_cosine"], 2)
    100.0
    """

    def _info(self) -> evaluate.MetricInfo:
        rows = datasets.List(datasets.Value("float64"))
        features = {"embeddings1": rows, "embeddings2": rows, "references": datasets.Value("float64")}
        return evaluate.MetricInfo(
            description="Spearman and Pearson correlation of cosine, dot product and Euclidean distance of embeddings "
            "with graded pairs, times 100.",
            citation="",
            inputs_description="embeddings1, embeddings2: N rows of D numbers; references: N grades.",
            features=datasets.Features(features),
        )

    def _compute(self, embeddings1: Any, embeddings2: Any, references: list[float]) -> dict[str, float]:
        x, y = (torch.tensor(rows, dtype=torch.float64) for rows in (embeddings1, embeddings2))
        return pair_correlations(x, y, references)
