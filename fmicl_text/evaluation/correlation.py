"""Correlation of the similarities of embeddings with similarity scores."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fmicl_text.errors import InputError

# Relative to the length of an embedding:
RESOLUTION = 2e-7  # similarities that differ by less are ties; float32 rounds by 6e-8
SAME_TEXT = (
    2e-6  # distances below are 0; embeddings of one text differ by up to 1e-6 between batches (all-MiniLM-L6-v2)
)


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
        spearman_cosine, pearson_cosine, spearman_dot, ..., pearson_euclidean, in [-100, 100]. Equal similarities have
        equal ranks, such as those of all pairs of equal sentences; see `RESOLUTION`, `SAME_TEXT`. Correlations of the
        dot product or the distance are omitted if it is the same for all pairs.

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
    levels = {name: tied(values) for name, values in ranked_values(x.double(), y.double()).items()}
    if not levels["cosine"].any():
        raise InputError(f"the cosines of all {len(gold)} pairs are equal: Spearman and Pearson are undefined")
    if gold.min() == gold.max():
        raise InputError(f"the scores of all {len(gold)} pairs are equal: Spearman and Pearson are undefined")
    correlations = {}
    for name, values in similarities.items():
        if levels[name].any():
            correlations[f"spearman_{name}"] = 100 * float(stats.spearmanr(levels[name], gold.numpy()).statistic)
            correlations[f"pearson_{name}"] = 100 * float(stats.pearsonr(values.numpy(), gold.numpy()).statistic)
    return correlations


def ranked_values(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Values [N] with the order of `pair_similarities`, relative to the length of an embedding. The distance of the
    unit embeddings takes the place of the cosine, which resolves distances near 0 badly (1 - d^2/2)."""
    length = torch.cat([x, y]).norm(dim=-1).median()
    unit_x, unit_y = (rows / rows.norm(dim=-1, keepdim=True) for rows in (x, y))
    distances = (unit_x - unit_y).norm(dim=-1), (x - y).norm(dim=-1) / length
    cosine, euclidean = (-distance.where(distance > SAME_TEXT, 0.0) for distance in distances)
    return {"cosine": cosine, "dot": (x * y).sum(dim=-1) / length**2, "euclidean": euclidean}


def cosine_levels(x: Tensor, y: Tensor) -> np.ndarray:
    """Integers [N] in the order of the cosines of x_i and y_i, [N, D] each: what `spearman_cosine` ranks."""
    return tied(ranked_values(x.double(), y.double())["cosine"])


def tied(values: Tensor) -> np.ndarray:
    """Integers [N] in the order of the values, 0 for the lowest. Each covers a range of at most `RESOLUTION`, which
    begins at a value, so that values are separated only where they are dense."""
    order = values.argsort()
    level, start, levels = -1, -math.inf, []
    for value in values[order].tolist():
        if value - start > RESOLUTION:
            level, start = level + 1, value
        levels.append(level)
    return np.array(levels)[order.argsort().numpy()]
