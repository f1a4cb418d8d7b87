"""The Gaussian-kernel assumption is confirmed on data that satisfy it, and rejected on others."""

import math
import sys

import pytest
import torch

from fmicl_text.errors import InputError
from fmicl_text.evaluation import density
from fmicl_text.evaluation.kernel import check_kernel, linear_fit, project, similarity_distance
from fmicl_text.evaluation.synthetic import SYNTHETIC
from fmicl_text.losses.divergences import DIVERGENCES


def test_a_line_by_hand():
    """Points (0, 3), (1, 1), (2, 2): slope -1/2, mean 2, squares 0.5^2 + 1^2 + 0.5^2 = 1.5 left of 2."""
    fit = linear_fit(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, 2.0]), bins=3)
    assert (fit.gamma, fit.intercept) == pytest.approx((0.5, 2.5))
    assert fit.r2_pairs == fit.r2_bins == pytest.approx(1 - 1.5 / 2)
    assert fit.distance == [0, 1, 2] and fit.mean == [3, 1, 2]


def test_bins_hide_what_pairs_show():
    d = torch.linspace(0, 1, 1000)
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    fit = linear_fit(d, 5 - 3 * d + noise)
    assert fit.gamma == pytest.approx(3, abs=0.3) and fit.r2_pairs < 0.6 and fit.r2_bins > 0.9
    assert len(fit.mean) == 20 and fit.deviation == pytest.approx([1.0] * 20, abs=0.35)


@pytest.mark.parametrize("name", ["kl", "js", "pearson", "sh", "vlc"])
def test_similarity_is_optimal_on_the_kernel_alone(name):
    distances = {}
    for data, draw in SYNTHETIC.items():
        pairs = draw(2000)
        squared = (pairs.x - pairs.y).square().sum(1)
        distances[data] = similarity_distance(DIVERGENCES[name], squared, pairs.log_ratio)
    assert distances["kernel"] < 1e-6
    assert distances["two scales"] > 0.4 and distances["clusters"] > 0.9


def test_for_kl_it_is_the_unexplained_variance():
    pairs = SYNTHETIC["two scales"](2000)
    squared = (pairs.x - pairs.y).square().sum(1)
    left = 1 - linear_fit(squared, pairs.log_ratio).r2_pairs
    assert similarity_distance(DIVERGENCES["kl"], squared, pairs.log_ratio) == pytest.approx(math.sqrt(left))


@pytest.mark.slow
@pytest.mark.parametrize("data, low, high", [("kernel", 0.93, 1.0), ("two scales", 0.5, 0.85), ("clusters", 0.0, 0.65)])
def test_the_flow_tells_the_kernel_from_mixtures(monkeypatch, data, low, high):
    monkeypatch.setattr(density, "NUM_FLOWS", 1)
    monkeypatch.setattr(density, "MAX_EPOCHS", 25)
    pairs = SYNTHETIC[data](2500, dims=5)
    found = check_kernel(pairs.x, pairs.y, [DIVERGENCES["kl"]], dims=8)
    squared = (pairs.x - pairs.y).square().sum(1)
    known = linear_fit(squared, pairs.log_joint)
    assert low < found["joint"]["r2_pairs"] <= high
    assert found["joint"]["r2_pairs"] == pytest.approx(known.r2_pairs, abs=0.15)
    assert found["num_pairs"] == 2500 and found["dims"] == 5 and found["kept"] == 1
    if data == "kernel":
        assert found["joint"]["r2_bins"] > 0.99 and found["ratio"]["r2_bins"] > 0.99
        assert found["joint"]["gamma"] == pytest.approx(10, rel=0.1)
        assert found["distances"]["kl"] < 0.3
    else:
        assert found["distances"]["kl"] > 0.4


def test_coinciding_pairs_are_skipped(monkeypatch):
    monkeypatch.setattr(density, "NUM_FLOWS", 1)
    monkeypatch.setattr(density, "MAX_EPOCHS", 2)
    pairs = SYNTHETIC["kernel"](400, dims=4)
    y = torch.cat([3 * pairs.x[:50], pairs.y[50:]])
    assert check_kernel(pairs.x, y, [])["num_pairs"] == 350


def test_projection_keeps_the_directions_that_matter():
    generator = torch.Generator().manual_seed(0)
    core = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))
    wide = torch.cat([core, torch.zeros(200, 26).double()], dim=1) @ turn
    x, y, kept = project(wide, wide.roll(1, 0) * 3, dims=4)
    assert x.shape == (200, 4) and kept == pytest.approx(1)
    unit = torch.nn.functional.normalize(core, dim=1)
    assert torch.allclose(x @ y.T, unit @ unit.roll(1, 0).T, atol=1e-9)
    assert project(wide, wide, dims=2)[2] < 0.9
    assert torch.allclose(project(core, core, dims=8)[0], unit)


def test_errors(monkeypatch):
    x = torch.randn(300, 5)
    for wrong in ((x[0], x[0]), (x, x[:299]), (x[:, :2], x[:, :2])):
        with pytest.raises(ValueError, match=r"\[N, D\] with D >= 3, and dims >= 3, got \["):
            check_kernel(*wrong, [])
    with pytest.raises(InputError, match=r"199 pairs .* 200"):
        check_kernel(x[:199], x[:199].roll(1, 0), [])
    with pytest.raises(ValueError, match="dims 2"):
        check_kernel(x, x, [], dims=2)
    with pytest.raises(InputError, match="0 pairs "):
        check_kernel(x, 2 * x, [])
    broken = x.clone()
    broken[3, 1], broken[5] = math.nan, 0
    with pytest.raises(InputError, match=r"2 of 600 embeddings .* NaN"):
        check_kernel(broken, x, [])
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(InputError, match=r"zuko: pip install 'fmicl_text\[geometry\]'"):
        check_kernel(x, x.roll(1, 0), [])
