"""Correlation of the similarities of embeddings with similarity scores."""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

from fmicl_text.errors import InputError

RESOLUTION = 1e-10  # relative; similarities of equal float32 embeddings differ by less


def pair_similarities(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Similarities of x_i and y_i, [N] each in float64: cosine, dot product and negated Euclidean distance.

    Args:
        x: Embeddings [N, D], not necessarily normalized.
        y: Embeddings [N, D].
    """
    x, y = x.double(), y.double()
    dot = (x * y).sum(dim=-1)
    return {
        "cosine": dot / (x.norm(dim=-1) * y.norm(dim=-1)),
        "dot": dot,
        "euclidean": -(x - y).norm(dim=-1),
    }


def pair_correlations(x: Tensor, y: Tensor, scores: Tensor | list[float]) -> dict[str, float]:
    """Spearman and Pearson correlation, times 100, of the similarities of pairs with their scores.

    Args:
        x: Embeddings [N, D], N >= 2.
        y: Embeddings [N, D].
        scores: Similarity scores given by annotators, [N].

    Returns:
        spearman_cosine, pearson_cosine, spearman_dot, ..., pearson_euclidean, in [-100, 100]. Correlations of the dot
        product or the distance are omitted if it is the same for all pairs.

    Raises:
        InputError: A correlation with the cosine is undefined: non-finite or zero embeddings, equal cosines or scores.
    """
    gold = torch.as_tensor(scores, dtype=torch.float64)
    if not (x.ndim == 2 and x.shape == y.shape and gold.shape == x.shape[:1]):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (x, y, gold))
        raise ValueError(f"embeddings must be [N, D] twice and scores [N], got {shapes}")
    similarities = pair_similarities(x, y)
    if num_bad := int((~similarities["cosine"].isfinite()).sum()):
        raise InputError(f"{num_bad} of {len(x)} pairs have no cosine: embeddings contain NaN, infinity or only zeros")
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
    """Whether all values [N] are equal up to the rounding of float32 embeddings."""
    return len(values) < 2 or bool(values.max() - values.min() <= RESOLUTION * values.abs().max().clamp_min(1e-300))
