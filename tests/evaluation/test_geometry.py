import math

import pytest
import torch

from fmicl_text.evaluation import geometry
from fmicl_text.evaluation.geometry import (
    alignment,
    describe_geometry,
    direction_shares,
    effective_rank,
    is_collapsed,
    mean_cosine,
    pair_distances,
    uniformity,
)


def points(num_rows: int, seed: int = 0) -> torch.Tensor:
    """Rows of unequal length, so that a missing normalization shows."""
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


def test_shares_of_directions_by_hand():
    """Unit rows (1,0), (1,0), (0,1), (0.6,0.8): the second moment is [[2.36, .48], [.48, 1.64]] / 4, its eigenvalues
    0.5 +- 0.15."""
    x = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [6.0, 8.0]])
    assert direction_shares(x).tolist() == pytest.approx([0.65, 0.35])
    assert effective_rank(direction_shares(x)).item() == pytest.approx(0.65**-0.65 * 0.35**-0.35)
    assert mean_cosine(x).item() == pytest.approx((1 + 0 + 0.6 + 0 + 0.6 + 0.8) / 6)


@pytest.mark.parametrize("num_rows", [3, 5, 40])
def test_shares_are_squared_singular_values(num_rows):
    x = points(num_rows).double()
    unit = torch.nn.functional.normalize(x, dim=1)
    expected = torch.linalg.svdvals(unit).square() / num_rows
    assert direction_shares(x).tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert direction_shares(x).sum().item() == pytest.approx(1)


def test_rank_from_one_direction_to_an_even_sphere():
    one = points(1).repeat(50, 1) * torch.linspace(0.1, 9, 50)[:, None]
    assert effective_rank(direction_shares(one)).item() == pytest.approx(1, abs=1e-6)
    assert mean_cosine(one).item() == pytest.approx(1, abs=1e-6)
    axes = torch.cat([torch.eye(7), -torch.eye(7)])
    assert effective_rank(direction_shares(axes)).item() == pytest.approx(7)
    assert mean_cosine(axes).item() == pytest.approx(-1 / 13)
    assert effective_rank(direction_shares(axes[:3])).item() == pytest.approx(3)  # fewer rows than directions


def test_distances_of_similar_and_dissimilar_pairs_are_sorted():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
    y = torch.tensor([[-1.0, 0.0], [0.0, 5.0], [0.0, 1.0]])
    distances = pair_distances(x, y)
    assert distances.similar.tolist() == pytest.approx([0, math.sqrt(2), 2])
    assert distances.dissimilar.tolist() == pytest.approx([math.sqrt(2), math.sqrt(2), 2])


def test_collapse_is_flagged():
    point, noise = points(1).repeat(1, 8), torch.randn(100, 40, generator=torch.Generator().manual_seed(1))
    sign = torch.tensor([1.0, -1.0]).repeat(50)[:, None]
    for collapsed in (point + 0.03 * noise, sign * point + 0.1 * noise):  # to a point, to two opposite ones
        assert is_collapsed(describe_geometry(collapsed, collapsed), 40)
    narrow = 0.8 * point + noise  # a cone, but one in which directions differ
    assert describe_geometry(narrow, narrow)["mean_cosine"] > 0.9 and not is_collapsed(
        describe_geometry(narrow, narrow), 40
    )
    metrics = describe_geometry(noise, noise)
    assert not is_collapsed(metrics, 40) and metrics["effective_rank"] > 20 and metrics["alignment"] == 0
    assert set(metrics) == {
        "alignment", "uniformity", "mean_cosine", "effective_rank", "top_direction", "similar_distance",
        "dissimilar_distance",
    }  # fmt: skip
    in_the_plane = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    assert not is_collapsed(describe_geometry(in_the_plane, in_the_plane), 2)


def test_centered_shares_are_those_of_the_variance():
    """Unit rows (1, 0) and (0.6, 0.8), each twice: they vary along (-0.4, 0.8) only."""
    x = torch.tensor([[2.0, 0.0], [3.0, 4.0], [1.0, 0.0], [0.6, 0.8]])
    assert direction_shares(x, centered=True).tolist() == pytest.approx([1.0, 0.0], abs=1e-12)
    assert direction_shares(x).tolist() == pytest.approx([0.8, 0.2])
