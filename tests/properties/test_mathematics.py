"""Properties of every divergence at random r."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmicl_text.losses.divergences import DIVERGENCES, convex_conjugate, tsallis, uniformity_holds

ORDERS = st.floats(0.1, 0.95) | st.floats(1.05, 5)  # f itself divides by order - 1, which costs digits close to 1
ANY_ORDER = "tsallis of any order"
every = pytest.mark.parametrize("name", [*DIVERGENCES, ANY_ORDER])
# for these, the conjugate is that of f
faithful = pytest.mark.parametrize("name", [*(name for name in DIVERGENCES if name != "vlc_as_printed"), ANY_ORDER])
RATIOS = st.lists(st.floats(-8, 2), min_size=3, max_size=3).map(lambda r: torch.tensor(r, dtype=torch.float64))
EXAMPLES = settings(max_examples=20)
LARGEST = torch.finfo(torch.float32).max / 10


def record_of(name, order):
    return tsallis(order) if name == ANY_ORDER else DIVERGENCES[name]


def slope_of(function, r):
    r = r.clone().requires_grad_()
    return torch.autograd.grad(function(r).sum(), r)[0]


@every
@EXAMPLES
@given(order=ORDERS, r=RATIOS, share=st.floats(0, 1))
def test_f_is_convex_and_touches_zero_at_one(name, order, r, share):
    record = record_of(name, order)
    u, v, _ = r.exp()
    chord = share * record.f(u) + (1 - share) * record.f(v)
    assert record.f(share * u + (1 - share) * v) <= chord + 1e-10 * (1 + chord.abs())
    assert (record.f(r.exp()) >= -1e-12).all()
    one = torch.ones((), dtype=torch.float64)
    assert abs(record.f(one)) < 1e-12 and abs(slope_of(record.f, one)) < 1e-12


@faithful
@EXAMPLES
@given(order=ORDERS, r=RATIOS)
def test_fenchel_equality_at_the_slope_and_inequality_elsewhere(name, order, r):
    record = record_of(name, order)
    u = r.exp()
    conjugate = record.conjugate(r) - record.conjugate(torch.zeros(()).double())
    gap = record.f(u)[:, None] + conjugate - u[:, None] * record.score(r)
    rounding = 1e-12 * (1 + record.f(u).max() + u.max() * record.score(r).abs().max())
    assert (gap > -rounding).all() and (gap.diagonal().abs() < rounding).all()


@faithful
@EXAMPLES
@given(order=ORDERS, r=RATIOS)
def test_the_conjugate_found_by_bisection_is_the_closed_one(name, order, r):
    record = record_of(name, order)
    found = convex_conjugate(record, record.score(r))
    closed = record.conjugate(r) - record.conjugate(torch.zeros(()).double())
    torch.testing.assert_close(found, closed, rtol=1e-7, atol=1e-7)


@every
@EXAMPLES
@given(order=ORDERS, r=RATIOS)
def test_score_and_conjugate_never_fall(name, order, r):
    record = record_of(name, order)
    ordered = r.sort().values
    for function in (record.score, record.conjugate):
        values = function(ordered)
        assert (values.diff() >= -1e-13 * values.abs().max()).all()
        assert (slope_of(function, ordered) > 0).all()


@every
@EXAMPLES
@given(order=ORDERS, exponent=st.floats(-3, 3), shares=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_float32_equals_float64_wherever_it_has_numbers(name, order, exponent, shares):
    """r in [-4 gamma, 0], gamma from 0.001 to 1000: value and slope, NaN and inf included."""
    record = record_of(name, order)
    r = -4 * 10**exponent * torch.tensor([0, *shares, 1])
    for function in (record.score, record.conjugate):
        exact, exact_slope = function(r.double()), slope_of(function, r.double())
        fits = (exact.abs() < LARGEST) & (exact_slope.abs() < LARGEST)
        value, slope = function(r)[fits], slope_of(function, r)[fits]
        torch.testing.assert_close(value.double(), exact[fits], rtol=1e-4, atol=3e-7 * (1 + exact[fits].abs().min()))
        torch.testing.assert_close(slope.double(), exact_slope[fits], rtol=1e-4, atol=1e-37)


@every
@EXAMPLES
@given(order=ORDERS, exponent=st.floats(-3, 3))
def test_the_uniformity_condition_is_one_of_f_alone(name, order, exponent):
    record = record_of(name, order)
    assert uniformity_holds(record, 10**exponent) == (record.name not in ("rkl", "neyman"))
