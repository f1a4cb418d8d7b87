"""Densities on the sphere: the chart against closed forms, the flow against known densities."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fmicl_text.errors import InputError
from fmicl_text.evaluation import density
from fmicl_text.evaluation.density import fit_density, to_chart, toward_pole
from fmicl_text.evaluation.synthetic import SYNTHETIC, cluster_pairs, kernel_pairs


def directions(num_rows: int, dims: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((num_rows, dims))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def at_angle(angle: float, dims: int) -> np.ndarray:
    """The unit row at an angle from the pole, in the direction of the second axis."""
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


@pytest.mark.parametrize("dims", [3, 5, 8])
@pytest.mark.parametrize("angle", [0.02, 0.9, 2.0, 3.0])
def test_volume_is_that_of_the_densities(dims, angle):
    """How the chart stretches volume, along all tangents at once: uniform density on the sphere over normal density."""
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((dims - 1, dims - 1)))[0]
    w = at_angle(angle, dims)
    w[:, 1:] = w[:, 1:] @ turn  # toward no axis in particular
    tangents = np.linalg.svd(w)[2][1:]
    step = 1e-5 * math.sin(angle)
    moved = [to_chart(w * math.cos(step) + sign * math.sin(step) * tangents) for sign in (1, -1)]
    log_volume = np.linalg.slogdet((moved[0] - moved[1]) / (2 * step))[1]
    area = 2 * math.pi ** (dims / 2) / math.gamma(dims / 2)
    assert log_volume == pytest.approx(-math.log(area) - stats.norm.logpdf(to_chart(w)).sum(), abs=1e-4)


def test_both_ends_of_the_angle():
    assert np.array_equal(to_chart(at_angle(0.0, 8)), np.zeros((1, 7)))
    near, far = to_chart(at_angle(1e-6, 8)), to_chart(at_angle(math.pi - 1e-4, 8))
    # Near the pole the radius is the angle times a constant: the mass of a cap against that of a small ball.
    assert near[0, 0] / to_chart(at_angle(2e-6, 8))[0, 0] == pytest.approx(0.5, rel=1e-6)
    assert np.isfinite(far).all() and far[0, 0] > 8
    assert far[0, 0] > to_chart(at_angle(math.pi - 1e-3, 8))[0, 0]
    antipode = to_chart(-at_angle(0.0, 8))
    assert np.isfinite(antipode).all() and np.linalg.norm(antipode) > far[0, 0]


@pytest.mark.parametrize("dims", [3, 8, 64, 256])
def test_finite_and_in_the_order_of_the_angle(dims):
    angles = np.concatenate([[0.0], np.geomspace(1e-9, math.pi / 2, 50), math.pi - np.geomspace(1.5, 1e-9, 50)])
    z = to_chart(np.concatenate([*(at_angle(angle, dims) for angle in angles), -np.eye(dims)[:1]]))
    assert np.isfinite(z).all()
    steps = np.diff(np.linalg.norm(z, axis=1))
    assert (steps >= -1e-9).all() and (dims > 64 or (steps[(angles > 1e-4) & (angles < 3)] > 0).all())


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


@pytest.mark.slow
def test_the_flow_finds_a_known_density(monkeypatch):
    monkeypatch.setattr(density, "NUM_FLOWS", 2)
    pairs = kernel_pairs(3000, dims=4, gamma=5.0)
    (fit_x, stop_x, x), (fit_y, stop_y, y) = (side.tensor_split([2000, 2500]) for side in (pairs.x, pairs.y))
    estimate = fit_density(fit_x, fit_y, stop_x, stop_y, seed=1)
    for found, known in ((estimate.log_joint(x, y), pairs.log_joint), (estimate.log_ratio(x, y), pairs.log_ratio)):
        error = found - known[2500:]
        assert error.square().mean().sqrt() < 0.3 * known.std() and error.mean().abs() < 0.1
    assert torch.allclose(estimate.log_ratio(x, y), estimate.log_ratio(y, x))  # the order of the views is random
    assert estimate.log_marginal(x).mean().abs() < 0.1  # x is uniform


def test_numbers_depend_on_the_seed_alone(monkeypatch):
    monkeypatch.setattr(density, "NUM_FLOWS", 1)
    monkeypatch.setattr(density, "MAX_EPOCHS", 2)
    pairs = kernel_pairs(300, dims=4)
    (fit_x, stop_x), (fit_y, stop_y) = (side.tensor_split([200]) for side in (pairs.x, pairs.y))
    found = []
    with torch.random.fork_rng(devices=[]):
        for global_seed, seed in ((1, 7), (2, 7), (2, 8)):
            torch.manual_seed(global_seed)
            state = torch.get_rng_state()
            found.append(fit_density(fit_x, fit_y, stop_x, stop_y, seed=seed).log_joint(stop_x, stop_y))
            assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


@pytest.mark.slow
def test_the_flow_finds_uneven_marginals(monkeypatch):
    """Where p(x) is not uniform, log p(x, y) and log u differ by it; on clusters u hardly varies over the pairs."""
    monkeypatch.setattr(density, "NUM_FLOWS", 1)
    monkeypatch.setattr(density, "MAX_EPOCHS", 40)
    pairs = cluster_pairs(3000, dims=4, num_clusters=4, concentration=10.0)
    (fit_x, stop_x, x), (fit_y, stop_y, y) = (side.tensor_split([2000, 2500]) for side in (pairs.x, pairs.y))
    estimate = fit_density(fit_x, fit_y, stop_x, stop_y)
    joint, ratio = pairs.log_joint[2500:], pairs.log_ratio[2500:]
    marginals = estimate.log_marginal(x) + estimate.log_marginal(y)
    assert (marginals - (joint - ratio)).square().mean().sqrt() < 0.5 * (joint - ratio).std()
    assert (estimate.log_joint(x, y) - joint).square().mean().sqrt() < 0.55 * joint.std()
    assert (estimate.log_ratio(x, y) - ratio).abs().mean() < 0.5


@pytest.mark.slow
def test_each_flow_keeps_its_best_weights(monkeypatch):
    """Long fits on few rows overfit, but the weights that are kept must not."""
    monkeypatch.setattr(density, "PATIENCE", 60)
    z, held_out = (torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows)) for rows in (60, 2000))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flows = density.FlowEnsemble(3, 0, 1.0).fit(z, None, held_out, None)
    assert flows.log_ratio_to_normal(held_out).mean().abs() < 0.3
    assert (flows.log_densities(held_out, None).mean(1) > -5).all()  # log N is -4.26 in the mean


def test_coinciding_pairs_have_no_density():
    x = torch.nn.functional.normalize(torch.randn(300, 5, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(InputError, match="all 200 positive pairs coincide"):
        fit_density(x[:200], x[:200] + 1e-8, x[200:], x[200:])
