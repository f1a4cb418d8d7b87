"""Correlations of similarities with scores."""

import math
import statistics

import pytest
import torch

from fmicl_text.errors import InputError
from fmicl_text.evaluation.correlation import pair_correlations, pair_similarities


def rows(count: int, seed: int, width: int = 6) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 0.3


def loop(x: torch.Tensor, y: torch.Tensor, scores: list[float], digits: int = 20) -> dict[str, float]:
    """From the definitions, in plain Python: Spearman is Pearson of the ranks, ties at their mean rank. Similarities
    are ranked to `digits` decimals."""

    def ranks(values: list[float]) -> list[float]:
        return [sum(v < value for v in values) + (values.count(value) + 1) / 2 for value in values]

    similarities: dict[str, list[float]] = {"cosine": [], "dot": [], "euclidean": []}
    for a, b in zip(x.double().tolist(), y.double().tolist(), strict=True):
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        similarities["dot"].append(dot)
        similarities["cosine"].append(dot / math.hypot(*a) / math.hypot(*b))
        similarities["euclidean"].append(-math.dist(a, b))
    expected = {}
    for name, values in similarities.items():
        rounded = [round(value, digits) for value in values]
        expected[f"spearman_{name}"] = 100 * statistics.correlation(ranks(rounded), ranks(scores))
        expected[f"pearson_{name}"] = 100 * statistics.correlation(values, scores)
    return expected


def test_the_function_is_the_loop():
    x, y = rows(30, 0), rows(30, 1)
    y[3], x[3] = y[4], x[4]  # a tie among the similarities
    scores = [float(i % 6) for i in range(30)]
    assert pair_correlations(x, y, scores) == pytest.approx(loop(x, y, scores), rel=1e-9)
    assert len({round(value, 3) for value in pair_correlations(x, y, scores).values()}) == 6


@pytest.mark.parametrize("noise", [0.0, 1e-7, 5e-7])
@pytest.mark.parametrize("length", [1e-3, 1.0, 300.0])
def test_ties_are_ties_despite_the_rounding_of_float32(noise, length):
    """A third of the pairs are one text twice (cosine 1 up to rounding), whose embeddings may come from two batches. A
    third occur twice, the second time in the other order and at another length, which keeps their cosine."""
    x, y = rows(90, 0).double(), rows(90, 1).double()
    y[:30] = x[:30]
    x[30:60], y[30:60] = 3 * y[60:], 3 * x[60:]
    scores = [float(i % 6) for i in range(90)]
    expected = loop(x, y, scores, digits=9)
    assert abs(expected["spearman_cosine"] - loop(x, y, scores)["spearman_cosine"]) > 1e-3  # the ranks of rounding
    y[:30] += noise * y[:30].norm(dim=1, keepdim=True) * rows(30, 2) / 3
    measured = pair_correlations((length * x).float(), (length * y).float(), scores)
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, abs=1e-9 if name.startswith("spearman") else 1e-3), name


def test_differences_above_rounding_are_ranked():
    """Pairs of a narrow cone: distances of 1e-3, cosines that differ in the seventh decimal."""
    x = torch.tensor([[1.0, 0.0]] * 40, dtype=torch.float64)
    y = torch.tensor([[1.0, 1e-3 + 2e-5 * i] for i in range(40)], dtype=torch.float64)
    measured = pair_correlations(x.float(), y.float(), [float(-i) for i in range(40)])
    assert measured["spearman_cosine"] == pytest.approx(100) and measured["spearman_euclidean"] == pytest.approx(100)


def test_unit_rows_rank_alike():
    x, y = (torch.nn.functional.normalize(rows(40, seed), dim=1) for seed in (0, 1))
    measured = pair_correlations(x, y, [float(i % 7) for i in range(40)])
    assert measured["spearman_dot"] == pytest.approx(measured["spearman_cosine"])
    assert measured["spearman_euclidean"] == pytest.approx(measured["spearman_cosine"])


def test_undefined_correlations_raise_or_are_omitted():
    x, scores = rows(4, 0), [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(InputError, match="the cosines of all 4 pairs are equal"):
        pair_correlations(x, x, scores)
    corner = torch.tensor([[1.0, 0.5], [1.0, 0.0], [0.0, 1.0], [-0.5, 2.0]])
    step = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    measured = pair_correlations(corner, corner + step, scores)
    assert {"spearman_euclidean", "pearson_euclidean"}.isdisjoint(measured)  # every distance is 1
    assert set(measured) == {"spearman_cosine", "pearson_cosine", "spearman_dot", "pearson_dot"}
    with pytest.raises(InputError, match="1 of 4 pairs have no cosine"):
        pair_correlations(x * torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None], rows(4, 1), scores)


def test_closer_pairs_have_higher_similarity():
    measured = pair_similarities(torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[1.0, 0.1], [-1.0, 1.0]]))
    assert len(measured) == 3 and all(near > far for near, far in measured.values())
