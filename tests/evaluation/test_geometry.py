import math

import pytest
import torch

from fmicl_text.evaluation import geometry
from fmicl_text.evaluation.geometry import alignment, uniformity


def points(num_rows: int, seed: int = 0) -> torch.Tensor:
    """Rows of unequal length, so that a missing normalisation shows."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(num_rows, 5, generator=generator) + 1


def squared_distance(x: list[float], y: list[float]) -> float:
    x_norm, y_norm = math.hypot(*x), math.hypot(*y)
    return sum((a / x_norm - b / y_norm) ** 2 for a, b in zip(x, y, strict=True))


def test_alignment_by_hand():
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    y = torch.tensor([[5.0, 0.0], [3.0, 0.0], [-1.0, 0.0]])  # squared distances 0, 2, 4
    assert alignment(x, y).item() == pytest.approx(2)
    assert alignment(x[:1], y[:1]).item() == 0


def test_uniformity_by_hand():
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # squared distances 2, 4, 2
    assert uniformity(x).item() == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))
    assert uniformity(x, t=0.5).item() == pytest.approx(math.log((2 * math.exp(-1) + math.exp(-2)) / 3))


def test_alignment_is_the_loop():
    x, y = points(37), points(37, seed=1)
    distances = [squared_distance(a, b) for a, b in zip(x.double().tolist(), y.double().tolist(), strict=True)]
    expected = sum(distances) / 37
    assert alignment(x, y).item() == pytest.approx(expected, rel=1e-6)
    assert alignment(x.double(), y.double()).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("block", [1, 7, 36, 37, 1000])
@pytest.mark.parametrize("t", [0.5, 2.0])
def test_uniformity_is_the_double_loop(monkeypatch, block, t):
    monkeypatch.setattr(geometry, "BLOCK", block)
    x = points(37)
    rows = x.double().tolist()
    potentials = [math.exp(-t * squared_distance(rows[i], rows[j])) for i in range(37) for j in range(i + 1, 37)]
    expected = math.log(sum(potentials) / len(potentials))
    assert uniformity(x, t).item() == pytest.approx(expected, rel=1e-5)
    assert uniformity(x.double(), t).item() == pytest.approx(expected, rel=1e-12)


def test_ends_of_the_range():
    x = points(1).repeat(300, 1)
    assert uniformity(x).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(x).item() <= 1e-6
    assert alignment(x, x).item() == 0
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(opposite).item() == pytest.approx(-8)
    assert uniformity(opposite, t=100.0).item() == pytest.approx(-400)  # exp(-400) is 0 in float32
    assert alignment(opposite, -opposite).item() == pytest.approx(4)


def test_neither_order_nor_length_matters():
    x, y = points(20), points(20, seed=1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert uniformity(x[order] * 7).item() == pytest.approx(uniformity(x).item(), rel=1e-5)
    assert alignment(y[order], x[order] * 7).item() == pytest.approx(alignment(x, y).item(), rel=1e-5)


def test_half_precision_is_computed_in_float32():
    x = points(20).bfloat16()
    assert uniformity(x).dtype == alignment(x, x).dtype == torch.float32
    assert uniformity(x).item() == uniformity(x.float()).item()


def test_too_few_or_misshapen():
    with pytest.raises(ValueError, match=r"N >= 2, got \[1, 5\]"):
        uniformity(points(1))
    with pytest.raises(ValueError, match=r"N >= 1, got \[0, 5\]"):
        alignment(points(0), points(0))
    with pytest.raises(ValueError, match=r"N >= 1, got \[3, 5\] and \[4, 5\]"):
        alignment(points(3), points(4))
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        uniformity(torch.ones(4))
