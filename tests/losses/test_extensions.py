"""New similarities and objectives, each defined in one place, against float64 loops."""

import math

import pytest
import torch

from fmicl_text.losses import (
    OBJECTIVES,
    SIMILARITIES,
    ContrastiveLoss,
    FDivergence,
    FMICLLoss,
    InfoNCELoss,
    PairObjective,
    Similarity,
    Terms,
    load_divergence,
    load_objective,
)
from tests import reference

LAPLACE = Similarity(
    "laplace",
    lambda product, gamma: -gamma * (2 - 2 * product).clamp_min(0).sqrt(),
    definition="r = -gamma ||x - y|| of unit embeddings",
)
ANGULAR = Similarity(
    "angular",
    lambda product, gamma: 1 - 2 * product.clamp(-1, 1).acos() / math.pi,
    is_log_ratio=False,
    uses_gamma=False,
    symbol="angular",
)


def batch(n, d=3):
    """x, y, hard negatives [n, d] of different lengths; y near x."""
    generator = torch.Generator().manual_seed(0)
    x, noise, hard = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(3))
    return 3 * x, x + 0.4 * noise, hard


class PowerLoss(ContrastiveLoss):
    """Positive distance + alpha log mean over negatives of (1 + e^r)^power."""

    def __init__(self, power=2, alpha=0.5, unused="x", **kwargs):
        super().__init__(**({"gamma": 1.5, "negatives": "same_view"} | kwargs))
        self.power, self.alpha = power, alpha

    @property
    def objective(self):
        return PairObjective(
            score=lambda r: r / self.gamma,
            pair=lambda r: (1 + r.exp()) ** self.power,
            outer=lambda mean: self.alpha * mean.log(),
        )


class RowwiseLoss(ContrastiveLoss):
    """Largest cosine of a negative minus cosine of the positive, per row: not a sum over pairs."""

    def __init__(self, negatives="cross_view"):
        super().__init__(1.0, negatives, "cosine")

    @property
    def objective(self):
        return lambda positive, negative, keep: Terms(-positive.mean(), negative.masked_fill(~keep, -2).amax(1).mean())


def pairs_of(x, y, hard, negatives, ids):
    """Inner products of positive pairs, and (i, inner product) of negative pairs; plain Python numbers."""
    x, y = reference.unit(x), reference.unit(y)
    candidates = reference.negative_pairs(x, y, None if hard is None else reference.unit(hard), negatives, ids)
    positive = [reference.inner(a, b) for a, b in zip(x, y, strict=True)]
    return positive, [(i, reference.inner(x[i], candidate)) for i, candidate in candidates]


def laplace_kl(x, y, hard, negatives, ids):
    """f-MICL with f = KL: score r, conjugate e^r."""
    positive, negative = pairs_of(x, y, hard, negatives, ids)
    r = [-0.8 * math.sqrt(2 - 2 * p) for _, p in negative]
    attraction = sum(-0.8 * math.sqrt(2 - 2 * p) for p in positive) / len(positive)
    return -attraction + 7.0 * sum(math.exp(v) for v in r) / len(r)


def angular_pearson(x, y, hard, negatives, ids):
    """f-MICL on values t in place of f'(u), with f = (u - 1)^2: f*(t) = t^2/4 + t."""
    positive, negative = pairs_of(x, y, hard, negatives, ids)
    t = [1 - 2 * math.acos(p) / math.pi for _, p in negative]
    attraction = sum(1 - 2 * math.acos(p) / math.pi for p in positive) / len(positive)
    return -attraction + 7.0 * sum(v**2 / 4 + v for v in t) / len(t)


def power_loss(x, y, hard, negatives, ids):
    positive, negative = pairs_of(x, y, hard, negatives, ids)
    mean = sum((1 + math.exp(3.0 * (p - 1))) ** 3 for _, p in negative) / len(negative)
    return sum(2 - 2 * p for p in positive) / len(positive) + 0.5 * math.log(mean)


CASES = {
    "laplace": (
        lambda negatives, size: FMICLLoss("kl", 0.8, 7.0, negatives, LAPLACE, size),
        laplace_kl,
    ),
    "angular": (
        lambda negatives, size: FMICLLoss("pearson", 0.8, 7.0, negatives, ANGULAR, size),
        angular_pearson,
    ),
    "objective": (lambda negatives, size: PowerLoss(power=3, negatives=negatives, block_size=size), power_loss),
}


def loop_gradient(oracle, tensors, step=1e-6):
    """Central differences of a loop with respect to every row [3 or 2, N, D], in float64."""
    gradients = []
    for k, rows in enumerate(tensors):
        gradient = torch.zeros_like(rows)
        for index in torch.cartesian_prod(*map(torch.arange, rows.shape)).tolist():
            values = []
            for sign in (1, -1):
                changed = rows.clone()
                changed[tuple(index)] += sign * step
                values.append(oracle(*[changed.tolist() if j == k else t.tolist() for j, t in enumerate(tensors)]))
            gradient[tuple(index)] = (values[0] - values[1]) / (2 * step)
        gradients.append(gradient)
    return gradients


@pytest.mark.parametrize("block_size", [None, 3], ids=["matrix", "blocks"])
@pytest.mark.parametrize("with_hard", [False, True], ids=["pairs", "triplets"])
@pytest.mark.parametrize("negatives", ["same_view", "cross_view", "both"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_against_the_loops(name, negatives, with_hard, block_size):
    """With texts that occur twice; the pairs of a row with itself, whose derivative may be infinite, are masked."""
    build, oracle = CASES[name]
    leaves = [tensor.requires_grad_() for tensor in batch(5)[: 2 + with_hard]]
    ids = torch.arange(5)[:, None] * 10 + torch.arange(2 + with_hard)
    ids[3, 0] = ids[0, 0]

    def loop(x, y, hard=None):
        return oracle(x, y, hard, negatives, ids.tolist())

    loss = build(negatives, block_size)(*leaves[:2], leaves[2] if with_hard else None, ids)
    assert loss.item() == pytest.approx(loop(*[t.tolist() for t in leaves]), rel=1e-12)
    found = torch.autograd.grad(loss, leaves)
    for gradient, expected in zip(found, loop_gradient(loop, [t.detach() for t in leaves]), strict=True):
        assert gradient.norm() > 1e-3
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_negatives_of_a_queue(name):
    build, oracle = CASES[name]
    x, y, queue = batch(4)
    found = build("queue", None)(x, y, queue=queue)
    # as hard negatives of every row, with all other pairs masked by a text that all share
    ids = [[0, 0, 10 + i] for i in range(4)]
    expected = oracle(x.tolist(), y.tolist(), queue.tolist(), "same_view", ids)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_an_objective_that_is_not_a_sum_over_pairs():
    x, y, hard = batch(4)
    positive, negative = pairs_of(x.tolist(), y.tolist(), hard.tolist(), "cross_view", None)
    largest = [max(p for i, p in negative if i == row) for row in range(4)]
    expected = (sum(largest) - sum(positive)) / 4
    assert RowwiseLoss()(x, y, hard).item() == pytest.approx(expected, rel=1e-12)


def test_what_records_read_of_a_custom_loss():
    loss = PowerLoss(power=3, global_batch="gather", block_size=4)
    assert loss.hyperparameters == {
        "power": 3, "alpha": 0.5, "gamma": 1.5, "negatives": "same_view", "similarity": "gaussian",
        "global_batch": "gather",
    }  # fmt: skip
    assert loss.objective_name == "power_loss"
    assert loss.formula == "Positive distance + alpha log mean over negatives of (1 + e^r)^power."
    assert RowwiseLoss().hyperparameters == {"negatives": "cross_view"}


def test_hyperparameters_are_json():
    class Everything(InfoNCELoss):
        def __init__(self, shape, weights, divergence, similarity, function, kind, thing, *rest, **more):
            super().__init__()
            self.shape, self.weights, self.divergence, self.function = shape, weights, divergence, function
            self.similarity, self.kind, self.thing, self.rest, self.more = similarity, kind, thing, rest, more

    loss = Everything((1, 2), torch.ones(2), FDivergence.from_convex(lambda u: u**2, "mine"), ANGULAR, batch, dict, {1})
    assert loss.hyperparameters == {
        "shape": [1, 2], "weights": [1.0, 1.0], "divergence": "mine", "similarity": "angular", "function": "batch",
        "kind": "dict", "thing": "set", "temperature": 0.05, "negatives": "cross_view", "global_batch": "none",
    }  # fmt: skip
    assert loss.objective_name == "everything" and loss.formula == InfoNCELoss.formula


def test_a_class_without_docstring():
    class Bare(ContrastiveLoss):
        pass

    assert Bare(1.0, "same_view").formula == "`Bare`"


def test_formula_of_a_custom_divergence_and_similarity():
    mine = FDivergence.from_convex(lambda u: u**2, "mine")
    assert (
        "f(u) = mine," in FMICLLoss(mine).formula and LAPLACE.definition in FMICLLoss(mine, similarity=LAPLACE).formula
    )
    assert "angular = angular similarity" in FMICLLoss(mine, similarity=ANGULAR).formula


def test_the_uniformity_condition_applies_to_the_gaussian_only(recwarn):
    FMICLLoss("rkl", 1.0, 2.0, similarity=LAPLACE)
    FMICLLoss("rkl", 1.0, 2.0, similarity="cosine")
    assert not recwarn.list


def test_an_entry_in_the_table_is_all_it_takes(monkeypatch):
    monkeypatch.setitem(SIMILARITIES, "laplace", LAPLACE)
    monkeypatch.setitem(OBJECTIVES, "power", PowerLoss)
    x, y, _ = batch(4)
    loss = load_objective("power")(similarity="laplace")
    assert loss(x, y).item() == PowerLoss(similarity=LAPLACE)(x, y).item() != PowerLoss()(x, y).item()
    assert (loss.objective_name, loss.hyperparameters["similarity"]) == ("power", "laplace")


def test_load_objective():
    assert load_objective("infonce") is InfoNCELoss
    assert load_objective(f"{__name__}:PowerLoss") is PowerLoss


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("simclr", "expected one of fmicl, infonce"),
        ("no.such.module:Loss", "cannot import no.such.module .* expected one of fmicl, infonce"),
        (f"{__name__}:Missing", "Missing; expected one of fmicl, infonce"),
        (f"{__name__}:PairObjective", "ContrastiveLoss, expected one of fmicl, infonce"),
        (f"{__name__}:LAPLACE", "ContrastiveLoss, expected one of fmicl, infonce"),
    ],
)
def test_names_that_load_no_objective(name, message):
    with pytest.raises(ValueError, match=f"^objective={name}: .*{message}") as error:
        load_objective(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["1 / 0", "def f(:", "raise SystemError('no license')"])
def test_a_module_that_fails_while_it_is_imported_is_named(tmp_path, monkeypatch, content):
    (tmp_path / "fails_on_import.py").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    kind = {"1": "ZeroDivisionError", "d": "SyntaxError", "r": "SystemError"}[content[0]]
    for load in (load_objective, load_divergence):
        with pytest.raises(
            ValueError, match=rf"=fails_on_import:f: cannot import fails_on_import \({kind}: .*expected one"
        ):
            load("fails_on_import:f")
