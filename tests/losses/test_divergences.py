"""Every divergence against autograd on its own f, at both ends of the range of r, and the erratum."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch

from fmicl_text.losses.divergences import (
    DIVERGENCES,
    FDivergence,
    convex_conjugate,
    exp,
    expm1,
    load_divergence,
    pearson,
    tsallis,
    uniformity_holds,
)
from tests import reference

FAITHFUL = [name for name in DIVERGENCES if name != "vlc_as_printed"]  # their conjugate follows from their f
UNIFORM = ["kl", "js", "pearson", "sh", "tsallis", "vlc", "jeffrey", "vlc_as_printed"]
RANGE = torch.linspace(-8, 2, 1001, dtype=torch.float64)


def by_autograd(record, r):
    """f'(u) and u f'(u) - f(u) + f(0) at u = e^r."""
    u = r.exp().requires_grad_()
    value = record.f(u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    return slope, (u * slope - value).detach() + at_zero(record)


def at_zero(record):
    """f(0) if it is finite, else 0."""
    return torch.nan_to_num(record.f(torch.zeros((), dtype=torch.float64)), posinf=0.0)


def slope_of(function, r):
    r = r.clone().requires_grad_()
    return torch.autograd.grad(function(r).sum(), r)[0]


def test_names():
    names = ["kl", "js", "pearson", "sh", "tsallis", "vlc", "jeffrey", "rkl", "neyman", "vlc_as_printed"]
    assert list(DIVERGENCES) == names
    assert all(record.name == name for name, record in DIVERGENCES.items())


@pytest.mark.parametrize("name", FAITHFUL)
def test_score_and_conjugate_are_those_of_f(name):
    record = DIVERGENCES[name]
    slope, conjugate = by_autograd(record, RANGE)
    torch.testing.assert_close(record.score(RANGE), slope, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(record.conjugate(RANGE), conjugate, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAITHFUL)
def test_f_is_the_textbook_one_up_to_a_multiple_of_u_minus_1(name):
    f, slope = reference.GENERATORS[name]
    for r in (-3.0, -0.5, 0.0, 0.7):
        u = torch.tensor(r, dtype=torch.float64).exp()
        expected = f(float(u)) - slope(1.0) * (float(u) - 1)
        assert DIVERGENCES[name].f(u).item() == pytest.approx(expected, abs=1e-12)


def test_the_printed_vlc_conjugate_is_not_that_of_its_f():
    r = torch.linspace(-20, 0, 401, dtype=torch.float64)
    _, conjugate = by_autograd(DIVERGENCES["vlc"], r)
    error = (DIVERGENCES["vlc_as_printed"].conjugate(r) - conjugate).abs()
    assert error.max().item() == pytest.approx(1.0, abs=1e-6)
    u = r.exp()
    torch.testing.assert_close(DIVERGENCES["vlc"].conjugate(r), (u - 1) * (3 * u + 1) / (u + 1) ** 2 + 1)
    torch.testing.assert_close(DIVERGENCES["vlc_as_printed"].conjugate(r), 3 - 4 / (u + 1) + 1)


@pytest.mark.parametrize("name", FAITHFUL)
def test_normalized_to_zero_at_one_and_the_conjugate_at_minus_infinity(name):
    record, one, zero = DIVERGENCES[name], torch.ones(3), torch.zeros(3)
    for value in (record.f(one), record.score(zero), record.conjugate(zero) - at_zero(record).float()):
        torch.testing.assert_close(value, zero, rtol=0, atol=1e-7)
    assert record.conjugate(torch.tensor(-1000.0)) == 0 or name in NO_TAIL


TAILS = {"kl": 1, "js": 1, "pearson": 2, "sh": 0.5, "tsallis": 3, "vlc": 2, "vlc_as_printed": 1}
NO_TAIL = {"jeffrey": 0, "rkl": 0, "neyman": -1}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_tail_exponent(name):
    assert DIVERGENCES[name].tail_exponent == (TAILS | NO_TAIL)[name]
    if name in FAITHFUL:
        assert FDivergence.from_convex(DIVERGENCES[name].f, name).tail_exponent == (TAILS | NO_TAIL)[name]


@pytest.mark.parametrize("order", [0.01, 0.3, 1.0, 1.7, 10.0, 30.0, 80.0])
def test_tail_exponent_of_tsallis_is_its_order(order):
    assert tsallis(order).tail_exponent == pytest.approx(order, rel=1e-6)
    assert FDivergence.from_convex(tsallis(order).f if order != 1 else chi_square).tail_exponent == pytest.approx(
        order if order != 1 else 2, rel=1e-6
    )


@pytest.mark.parametrize(
    ("f", "k"),
    [
        (lambda u: u**1.5 + u**1.1, 1.1),  # the smaller one
        (lambda u: u * u.log(), 1),
        (lambda u: (u - 1) ** 2, 2),
        (lambda u: u**3 - u.sqrt(), 0.5),
        (lambda u: (1 + u) * u.log1p(), 2),
        (lambda u: (u - 0.5).clamp_min(0).square(), math.nan),  # its conjugate is constant below u = 1/2
        (lambda u: 1 / u, -1),
    ],
    ids=["sum", "u log u", "chi square", "difference", "log", "hinge", "inverse"],
)  # fmt: skip
def test_tail_exponent_of_any_f(f, k):
    record = FDivergence.from_convex(f)
    assert record.tail_exponent == pytest.approx(k, rel=1e-6, nan_ok=True)
    u = torch.tensor([1e-40, 1e-10, 0.5, 1.0], dtype=torch.float64)
    if k > 0:  # zero at -infinity, and increasing
        value = record.conjugate(u.log())
        assert value[0].abs() <= 1e-15 and (value.diff() > 0).all()
    else:
        assert record.conjugate(u.log())[-1] == pytest.approx(0, abs=1e-12)


def test_tail_exponent_of_closed_forms_that_round():
    """torch.expm1's gradient (e^r - 1) + 1 is 0 below r = -37."""
    assert FDivergence("mine", DIVERGENCES["kl"].f, lambda r: r, torch.expm1).tail_exponent == 1


@pytest.mark.parametrize("name", DIVERGENCES)
def test_score_and_conjugate_increase(name):
    for function in (DIVERGENCES[name].score, DIVERGENCES[name].conjugate):
        assert (function(RANGE).diff() > 0).all()


@pytest.mark.parametrize("name", FAITHFUL)
def test_fenchel_young(name):
    """f(u) + f*(t) >= u t, with equality at t = f'(u)."""
    record = DIVERGENCES[name]
    u = torch.linspace(0.05, 3, 60, dtype=torch.float64)
    r = torch.linspace(-3, 1, 50, dtype=torch.float64)
    conjugate = record.conjugate(r) - at_zero(record)
    gap = record.f(u)[:, None] + conjugate - u[:, None] * record.score(r)
    assert gap.min() > -1e-12
    equal = record.f(r.exp()) + conjugate - r.exp() * record.score(r)
    torch.testing.assert_close(equal, torch.zeros_like(r), rtol=0, atol=1e-11)


@pytest.mark.parametrize("function", ["score", "conjugate"])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("gamma", [1.0, 20.0])
def test_float32_value_and_gradient_over_the_whole_range(name, gamma, function):
    """r in [-4 gamma, 0]: both ends, the region around the paper's balance (r = -13), and close to 0."""
    r = torch.cat([torch.linspace(-4 * gamma, 0, 801), -torch.logspace(-6, -1, 11)])
    evaluate = getattr(DIVERGENCES[name], function)
    exact, exact_slope = evaluate(r.double()), slope_of(evaluate, r.double())
    representable = (exact.abs() < 3e38) & (exact_slope.abs() < 3e38)
    assert representable.all() or (name, function) == ("neyman", "score")  # e^{160} is beyond float32
    value, slope = evaluate(r)[representable], slope_of(evaluate, r)[representable]
    # relative, however small: alpha = 1e12 multiplies it; below 1e-37 float32 has no digits left
    absolute = 1e-37 if function == "conjugate" and name in TAILS else 3e-7
    torch.testing.assert_close(value.double(), exact[representable], rtol=1e-4, atol=absolute)
    torch.testing.assert_close(slope.double(), exact_slope[representable], rtol=1e-4, atol=1e-37)


def test_expm1_of_torch_alone_would_lose_the_gradient():
    r = torch.tensor([-13.0, -18.0])
    assert slope_of(torch.expm1, r)[1] == 0
    torch.testing.assert_close(slope_of(expm1, r), r.exp())


def test_tsallis_contains_its_neighbours():
    r = torch.linspace(-8, 1, 91, dtype=torch.float64)
    for record, other in [(tsallis(2.0), "pearson"), (tsallis(0.5), "sh"), (tsallis(1.0), "kl")]:
        torch.testing.assert_close(record.score(r), DIVERGENCES[other].score(r), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(record.conjugate(r), DIVERGENCES[other].conjugate(r), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(record.f(r.exp()), DIVERGENCES[other].f(r.exp()), rtol=1e-12, atol=1e-12)
    near = tsallis(1 + 1e-7)
    torch.testing.assert_close(near.score(r), r, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [0.0, -1.0, float("nan"), float("inf")])
def test_tsallis_order_must_be_positive(order):
    with pytest.raises(ValueError, match=f"tsallis_order .* > 0, got {order}"):
        tsallis(order)


@pytest.mark.parametrize("name", FAITHFUL)
def test_from_convex(name):
    record = FDivergence.from_convex(DIVERGENCES[name].f, name)
    r = torch.linspace(-6, 1, 71, dtype=torch.float64)
    torch.testing.assert_close(record.score(r), DIVERGENCES[name].score(r), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(record.conjugate(r), DIVERGENCES[name].conjugate(r), rtol=1e-9, atol=1e-9)
    for function in ("score", "conjugate"):
        expected = slope_of(getattr(DIVERGENCES[name], function), r)
        torch.testing.assert_close(slope_of(getattr(record, function), r), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", sorted(TAILS.keys() - {"vlc_as_printed"}))
@pytest.mark.parametrize("written", ["as textbooks do", "without constant"])
def test_from_convex_is_accurate_far_out(name, written):
    """Relative to the closed forms, where (u - 1)^2 - 1 has no digit left."""
    record, f = DIVERGENCES[name], DIVERGENCES[name].f
    zero = f(torch.zeros((), dtype=torch.float64))
    mine = FDivergence.from_convex(f if written == "as textbooks do" else lambda u: f(u) - zero.to(u), name)
    r = torch.cat([torch.linspace(-80 / TAILS[name], 0, 201), torch.tensor([1.0])])
    torch.testing.assert_close(mine.conjugate(r), record.conjugate(r), rtol=2e-5, atol=1e-37)
    torch.testing.assert_close(slope_of(mine.conjugate, r), slope_of(record.conjugate, r), rtol=2e-5, atol=1e-37)


def test_from_convex_normalizes_and_keeps_the_dtype():
    record = FDivergence.from_convex(lambda u: u**2 + 3)
    torch.testing.assert_close(record.conjugate(torch.tensor([-0.5])), pearson().conjugate(torch.tensor([-0.5])))
    assert record.score(torch.zeros(2)).dtype == torch.float32


@pytest.mark.parametrize("f", [lambda u: -(u**2), torch.sin, lambda u: (u - 3).log()], ids=["concave", "sine", "nan"])
def test_a_function_that_is_not_convex(f):
    with pytest.raises(ValueError, match=r"divergence=mine: .*convex"):
        FDivergence.from_convex(f, "mine")


@pytest.mark.parametrize("gamma", [0.5, 1.0, 20.0, 100.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_uniformity_condition(name, gamma):
    assert uniformity_holds(DIVERGENCES[name], gamma) == (name in UNIFORM)


@pytest.mark.parametrize("name", ["kl", "js", "pearson", "sh", "vlc", "rkl", "neyman"])
def test_uniformity_condition_of_from_convex(name):
    record = FDivergence.from_convex(DIVERGENCES[name].f, name)
    assert uniformity_holds(record, 1.0) == (name in UNIFORM)


CLOSED_CONJUGATES = {
    "kl": lambda t: t.exp() - 1,
    "js": lambda t: -(2 - t.exp()).log(),
    "pearson": lambda t: t**2 / 4 + t,
    "sh": lambda t: t / (1 - t),
    "vlc": lambda t: 4 - t - 4 * (1 - t).sqrt(),
    "rkl": lambda t: -(1 - t).log(),
    "neyman": lambda t: 2 - 2 * (1 - t).sqrt(),
}


@pytest.mark.parametrize("name", CLOSED_CONJUGATES)
def test_convex_conjugate_against_closed_forms(name):
    t = torch.linspace(-0.99, 0.65, 83, dtype=torch.float64)
    torch.testing.assert_close(convex_conjugate(DIVERGENCES[name], t), CLOSED_CONJUGATES[name](t), rtol=1e-9, atol=1e-9)
    mine = slope_of(lambda s: convex_conjugate(DIVERGENCES[name], s), t)
    torch.testing.assert_close(mine, slope_of(CLOSED_CONJUGATES[name], t), rtol=1e-9, atol=1e-9)


def test_convex_conjugate_is_infinite_beyond_the_range_of_the_slope():
    assert convex_conjugate(DIVERGENCES["js"], torch.tensor([0.7])).item() == float("inf")
    assert convex_conjugate(DIVERGENCES["sh"], torch.tensor([1.0])).item() == float("inf")


@pytest.mark.parametrize("function", [exp, expm1, FDivergence.from_convex(DIVERGENCES["kl"].f).conjugate])
def test_exponentials_can_be_differentiated_twice(function):
    r = torch.linspace(-60, 2, 50, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(function(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(first, r.exp())
    torch.testing.assert_close(second, r.exp())


# ---- names of divergences

SQUARE = FDivergence.from_convex(lambda u: u**2, "square")
NUMBER, CONCAVE, BROKEN = 3, torch.sqrt, len


def chi_square(u):
    return (u - 1) ** 2


def test_load_divergence():
    r = torch.linspace(-2, 0, 5)
    assert load_divergence("js") is DIVERGENCES["js"]
    loaded = load_divergence(f"{__name__}:SQUARE")
    assert loaded == SQUARE and loaded.source == f"{__name__}:SQUARE"
    loaded = load_divergence(f"{__name__}:chi_square")
    assert loaded.name == "chi_square"
    torch.testing.assert_close(loaded.conjugate(r), pearson().conjugate(r))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kld", "expected one of kl, js, "),
        ("", "expected one of kl, js, "),
        (":kl", "expected one of kl, js, "),
        (".relative:f", "expected one of kl, js, "),
        ("a file.py:f", "expected one of kl, js, "),
        ("no.such.module:f", "cannot import no.such.module .*No module named 'no'.* expected one of kl, js, "),
        (f"{__name__}:missing", "missing; expected one of kl, js, "),
        (f"{__name__}:NUMBER", "int, expected one of kl, js, "),
        (f"{__name__}:FDivergence", "type, expected one of kl, js, "),
        (f"{__name__}:CONCAVE", "convex"),
        (f"{__name__}:BROKEN", "function of a tensor"),
        (f"{__name__}:missing_key", "function of a tensor u > 0 .*'power'"),
    ],
)
def test_names_that_load_no_divergence(name, message):
    with pytest.raises(ValueError, match=f"^divergence={name}: .*{message}") as error:
        load_divergence(name)
    assert "\n" not in str(error.value)


def missing_key(u):
    return u ** {}["power"]


def quartic(u):
    return u**4


@pytest.mark.parametrize(
    "divergence",
    [*DIVERGENCES.values(), tsallis(1.0), tsallis(2.5), FDivergence.from_convex(quartic, "quartic"),
     load_divergence(f"{__name__}:quartic")],
    ids=lambda divergence: divergence.name,
)  # fmt: skip
def test_pickled_and_copied(divergence):
    r = torch.linspace(-5, 0, 11)
    for copied in (pickle.loads(pickle.dumps(divergence)), copy.deepcopy(divergence)):
        assert copied.name == divergence.name and copied.formulas == divergence.formulas
        assert torch.equal(copied.score(r), divergence.score(r))
        assert torch.equal(copied.conjugate(r), divergence.conjugate(r))


def test_a_changed_divergence_is_not_pickled_as_what_it_was_made_from():
    """Its new function is local, which pickle reports."""
    changed = replace(tsallis(2.5), score=lambda r: 3 * r)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(changed)
    assert copy.deepcopy(changed).score(torch.tensor(1.0)) == 3
