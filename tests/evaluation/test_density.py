"""The density of pairs on the sphere: charts against closed forms, the flow against densities that are known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fmicl_text.evaluation import density
from fmicl_text.evaluation.density import fit_density, to_chart, toward_pole
from fmicl_text.evaluation.synthetic import SYNTHETIC, kernel_pairs


def directions(num_rows: int, dims: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((num_rows, dims))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def at_angle(angle: float, dims: int) -> np.ndarray:
    """The unit row at an angle from the pole, toward the second axis."""
    row = np.zeros((1, dims))
    row[0, :2] = math.cos(angle), math.sin(angle)
    return row


@pytest.mark.parametrize("dims", [3, 8, 20])
def test_the_uniform_distribution_becomes_standard_normal(dims):
    z = to_chart(directions(20_000, dims))
    assert z.shape == (20_000, dims - 1)
    for column in (z[:, 0], z[:, -1], z @ np.full(dims - 1, (dims - 1) ** -0.5)):
        assert stats.kstest(column, "norm").pvalue > 1e-3
    assert stats.kstest((z * z).sum(1), "chi2", args=(dims - 1,)).pvalue > 1e-3


@pytest.mark.parametrize("dims", [3, 4, 8])
@pytest.mark.parametrize("angle", [0.05, 0.7, math.pi / 2, 2.5, 3.1])
def test_radius_by_its_differential_equation(dims, angle):
    """Equal mass in equal rings: density of the angle sin^(k-2)(angle)/B, density of the radius chi_(k-1)."""
    step = 1e-5
    radius, further = (np.linalg.norm(to_chart(at_angle(a, dims))) for a in (angle - step, angle + step))
    slope = (further - radius) / (2 * step)
    middle = np.linalg.norm(to_chart(at_angle(angle, dims)))
    area = math.sqrt(math.pi) * math.gamma((dims - 1) / 2) / math.gamma(dims / 2)
    expected = math.sin(angle) ** (dims - 2) / area / stats.chi.pdf(middle, dims - 1)
    assert slope == pytest.approx(expected, rel=1e-4)


def test_both_ends_of_the_angle():
    assert np.array_equal(to_chart(at_angle(0.0, 8)), np.zeros((1, 7)))
    near, far = to_chart(at_angle(1e-6, 8)), to_chart(at_angle(math.pi - 1e-4, 8))
    # Near the pole the radius is the angle times a constant: the mass of a cap against that of a small ball.
    assert near[0, 0] / to_chart(at_angle(2e-6, 8))[0, 0] == pytest.approx(0.5, rel=1e-6)
    assert np.isfinite(far).all() and far[0, 0] > 8
    assert far[0, 0] > to_chart(at_angle(math.pi - 1e-3, 8))[0, 0]
    assert np.isfinite(to_chart(-at_angle(1e-9, 8))).all()


def test_the_isometry_sends_x_to_the_pole():
    x, y, z = (directions(50, 5, seed) for seed in range(3))
    pole = np.eye(5)[:1]
    x[:3] = np.concatenate([pole, -pole, pole + 1e-9 * y[:1]])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(toward_pole(x, x), np.broadcast_to(pole, x.shape), atol=1e-12)
    np.testing.assert_allclose((toward_pole(x, y) * toward_pole(x, z)).sum(1), (y * z).sum(1), atol=1e-12)
    np.testing.assert_allclose(toward_pole(x, toward_pole(x, y)), y, atol=1e-12)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_known_densities_integrate_to_one(name):
    """The mean of p(x, y) over uniform pairs is 1, and so is that of p(x, y)/(p(x) p(y)) over product pairs."""
    broad = {
        "kernel": {"gamma": 1.0},
        "two scales": {"gammas": (1.5, 0.5)},
        "clusters": {"concentration": 2.0, "num_clusters": 4},
    }
    pairs = SYNTHETIC[name](40_000, dims=4, seed=1, **broad[name])
    assert torch.allclose(pairs.x.norm(dim=1), torch.ones(40_000).double())
    # By importance: under p the mean of 1/p is the measure of where p > 0, of both spheres, which is 1.
    assert (-pairs.log_joint).exp().mean().item() == pytest.approx(1, abs=0.04)
    assert (-pairs.log_ratio).exp().mean().item() == pytest.approx(1, abs=0.04)


def test_the_kernel_is_linear_in_the_squared_distance():
    pairs = kernel_pairs(100, gamma=10.0)
    squared = (pairs.x - pairs.y).square().sum(1)
    slopes = (pairs.log_joint - pairs.log_joint[0])[1:] / (squared - squared[0])[1:]
    assert torch.allclose(slopes, torch.full((99,), -10.0).double(), rtol=1e-6)
    assert squared.mean().item() == pytest.approx(0.32, abs=0.05)


def test_the_flow_finds_a_known_density(monkeypatch):
    monkeypatch.setattr(density, "NUM_FLOWS", 2)
    pairs = kernel_pairs(3000, dims=4, gamma=5.0)
    (fit_x, stop_x, x), (fit_y, stop_y, y) = (side.tensor_split([2000, 2500]) for side in (pairs.x, pairs.y))
    state = torch.get_rng_state()
    estimate = fit_density(fit_x, fit_y, stop_x, stop_y, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for found, known in ((estimate.log_joint(x, y), pairs.log_joint), (estimate.log_ratio(x, y), pairs.log_ratio)):
        error = found - known[2500:]
        assert error.square().mean().sqrt() < 0.3 * known.std() and error.mean().abs() < 0.1
    assert torch.allclose(estimate.log_ratio(x, y), estimate.log_ratio(y, x))  # which view comes first is chance
    assert estimate.log_marginal(x).mean().abs() < 0.1  # x is uniform
    again = fit_density(fit_x, fit_y, stop_x, stop_y, seed=1)
    assert torch.equal(again.log_joint(x, y), estimate.log_joint(x, y))
