"""The metric of `evaluate`."""

import doctest

import pytest
import torch

from fmicl_text.evaluation import metric
from fmicl_text.evaluation.correlation import pair_correlations
from fmicl_text.evaluation.metric import EmbeddingSimilarity


def rows(count: int, seed: int, width: int = 6) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 0.3


def test_the_metric_is_the_function():
    x, y, scores = rows(30, 0), rows(30, 1), [float(i % 6) for i in range(30)]
    inputs = {"embeddings1": x.numpy(), "embeddings2": y.tolist(), "references": scores}
    measured = EmbeddingSimilarity(keep_in_memory=True).compute(**inputs)
    assert measured == pytest.approx(pair_correlations(x, y, scores), rel=1e-9)
    in_batches = EmbeddingSimilarity(keep_in_memory=True)
    for part in (slice(0, 11), slice(11, 30)):
        in_batches.add_batch(embeddings1=x[part].numpy(), embeddings2=y[part].numpy(), references=scores[part])
    assert in_batches.compute() == pytest.approx(measured, rel=1e-9)
    with pytest.raises(ValueError, match="Mismatch in the number of embeddings1"):
        EmbeddingSimilarity(keep_in_memory=True).compute(embeddings1=x, embeddings2=x[:3], references=scores)


def test_docstring_examples():
    assert doctest.testmod(metric).attempted == 3
    assert doctest.testmod(metric).failed == 0
