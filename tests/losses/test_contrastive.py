"""The losses against float64 loops, the relations between them, masks, precision and the uniformity theorem."""

import doctest
import importlib
import math

import pytest
import torch

from fmicl_text.losses.contrastive import OBJECTIVES, AlignUniformLoss, FMICLLoss, InfoNCELoss, SpectralLoss
from fmicl_text.losses.divergences import DIVERGENCES, FDivergence, tsallis
from fmicl_text.losses.similarity import SIMILARITIES, log_ratio, unit_rows
from tests import reference

pairwise_log_ratio, pairwise_cosine = SIMILARITIES["gaussian"].pairwise, SIMILARITIES["cosine"].pairwise
IN_BATCH = ["same_view", "cross_view", "both"]
pytestmark = pytest.mark.filterwarnings("ignore:divergence .* fails the uniformity condition")


def batch(seed=0, n=7, d=5, dtype=torch.float64):
    """x, y, hard negatives [n, d] of different lengths; y near x."""
    generator = torch.Generator().manual_seed(seed)
    x, noise, hard = (torch.randn(n, d, generator=generator, dtype=dtype) for _ in range(3))
    return 3 * x, x + 0.4 * noise, hard


def as_lists(*tensors):
    return [None if tensor is None else tensor.tolist() for tensor in tensors]


CASES = {
    "infonce": (lambda n: InfoNCELoss(0.3, n), lambda *a, **k: reference.infonce(*a[:2], 0.3, *a[2:], **k)),
    "align_uniform": (
        lambda n: AlignUniformLoss(2.0, 1.5, n),
        lambda *a, **k: reference.align_uniform(*a[:2], 2.0, 1.5, *a[2:], **k),
    ),
    "spectral": (lambda n: SpectralLoss(1.3, n), lambda *a, **k: reference.spectral(*a[:2], 1.3, *a[2:], **k)),
} | {
    name: (
        lambda n, name=name: FMICLLoss(name, 0.8, 7.0, n),
        lambda *a, name=name, **k: reference.fmicl(*a[:2], name, 0.8, 7.0, *a[2:], **k),
    )
    for name in reference.GENERATORS
}


@pytest.mark.parametrize("with_hard", [False, True], ids=["pairs", "triplets"])
@pytest.mark.parametrize("negatives", IN_BATCH)
@pytest.mark.parametrize("name", CASES)
def test_every_objective_against_the_loops(name, negatives, with_hard):
    build, oracle = CASES[name]
    x, y, hard = batch()
    hard = hard if with_hard else None
    loss = build(negatives)(x, y, hard)
    lists = as_lists(x, y, hard)
    assert loss.item() == pytest.approx(oracle(*lists[:2], negatives, lists[2]), rel=1e-12)


@pytest.mark.parametrize("with_hard", [False, True], ids=["pairs", "triplets"])
@pytest.mark.parametrize("negatives", IN_BATCH)
@pytest.mark.parametrize("name", ["kl", "infonce", "align_uniform", "spectral"])
def test_equal_texts_are_no_negatives(name, negatives, with_hard):
    """Texts 0 and 3 equal, the positive of 1 is text 4, the hard negative of 2 is its own text, that of 5 is text 6."""
    build, oracle = CASES[name]
    x, y, hard = batch()
    ids = torch.arange(7)[:, None] * 10 + torch.arange(3)
    ids[3, 0] = ids[0, 0]
    ids[1, 1] = ids[4, 0]
    ids[2, 2] = ids[2, 0]
    ids[5, 2] = ids[6, 0]
    ids = ids if with_hard else ids[:, :2]
    hard = hard if with_hard else None
    lists = as_lists(x, y, hard, ids)
    expected = oracle(*lists[:2], negatives, lists[2], ids=lists[3])
    loss = build(negatives)(x, y, hard, ids)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert loss.item() != pytest.approx(build(negatives)(x, y, hard).item(), rel=1e-6)


@pytest.mark.parametrize("block_size", [None, 1, 3, 100])
@pytest.mark.parametrize("negatives", IN_BATCH)
@pytest.mark.parametrize("name", ["js", "infonce", "align_uniform", "spectral"])
def test_several_hard_negatives(name, negatives, block_size):
    """Three per example. Those of 2 and 5 contain their own text and text 6; that of 1 recurs as hard negative of 4."""
    build, oracle = CASES[name]
    x, y, _ = batch()
    hard = torch.stack([batch(seed)[2] for seed in (1, 2, 3)], dim=1)
    ids = torch.arange(7)[:, None] * 10 + torch.arange(5)
    ids[3, 0], ids[2, 3], ids[5, 4], ids[1, 2] = ids[0, 0], ids[2, 0], ids[6, 1], ids[4, 4]
    loss = build(negatives)
    if block_size is not None and name != "infonce":
        loss.block_size = block_size
    for text_ids in (ids, None):
        lists = as_lists(x, y, hard, text_ids)
        leaves = [t.clone().requires_grad_() for t in (x, y, hard)]
        value = loss(*leaves, text_ids)
        assert value.item() == pytest.approx(oracle(*lists[:2], negatives, lists[2], ids=lists[3]), rel=1e-12)
        whole = build(negatives)
        expected = torch.autograd.grad(whole(*leaves, text_ids), leaves)
        torch.testing.assert_close(torch.autograd.grad(value, leaves), expected)
        one = torch.autograd.grad(
            loss(*leaves[:2], leaves[2][:, 0], None if text_ids is None else ids[:, :3]), leaves[2]
        )
        assert one[0][:, 0].norm() > 0 and not one[0][:, 1:].any()


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("name", CASES)
def test_without_negatives_the_positive_term_is_left(name, block_size, recwarn):
    """One row, or rows that share a text: the value and the gradient of the attraction alone; InfoNCE's is 0."""
    build, _ = CASES[name]
    loss = build("both")
    if block_size is not None and name != "infonce":
        loss.block_size = block_size
    for rows, ids in ((1, None), (1, torch.zeros(1, 1)), (3, torch.tensor([[0, 1], [2, 0], [0, 3]]))):
        x, y = (t[:rows].requires_grad_() for t in batch()[:2])
        recwarn.clear()
        terms = loss.terms(x, y, text_ids=ids)
        assert [("no negative pair" in str(one.message)) for one in recwarn] == [True] * (rows > 1)
        if name == "infonce":
            assert terms.loss.item() == pytest.approx(0, abs=1e-12)
            continue
        score = loss.objective.score(loss.similarity.paired(unit_rows(x), unit_rows(y), loss.gamma))
        assert terms.loss.item() == pytest.approx(-score.mean().item(), rel=1e-12) and terms.negative.item() == 0
        torch.testing.assert_close(torch.autograd.grad(terms.loss, (x, y)), torch.autograd.grad(-score.mean(), (x, y)))


def test_one_column_of_ids_serves_dropout_positives():
    x, y, _ = batch()
    ids = torch.tensor([0, 1, 2, 0, 4, 5, 6])
    one, two = (FMICLLoss("js", 1.0, 2.0)(x, y, text_ids=i) for i in (ids[:, None], ids[:, None].expand(-1, 2)))
    assert one.item() == two.item()


def test_masked_pairs_get_no_gradient():
    x, _, _ = batch(n=3)
    x.requires_grad_()  # positives that coincide have no gradient
    only_2 = torch.autograd.grad(FMICLLoss("kl", 1.0, 5.0)(x, x.detach(), text_ids=torch.tensor([[0], [0], [2]])), x)[0]
    x2 = x.detach().requires_grad_()
    u = unit_rows(x2)
    expected = torch.autograd.grad(5.0 * (torch.exp(-(u[[0, 1]] - u[2]).square().sum(-1))).mean(), x2)[0]
    torch.testing.assert_close(only_2, expected)


@pytest.mark.parametrize("name", [n for n in DIVERGENCES if n != "vlc_as_printed"])
def test_a_collapsed_batch_has_loss_alpha_f_of_0(name):
    x = torch.ones(4, 3, dtype=torch.float64)
    at_zero = {"js": math.log(2), "jeffrey": 0, "rkl": 0, "neyman": 0}.get(name, 1)
    assert FMICLLoss(name, 20.0, 30.0)(x, 2 * x).item() == pytest.approx(30 * at_zero, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_order_of_the_batch_does_not_matter(name):
    x, y, hard = batch()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    loss = OBJECTIVES[name]()
    assert loss(x, y, hard).item() == pytest.approx(loss(x[order], y[order], hard[order]).item(), rel=1e-10)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_reaches_both_views_and_is_that_of_finite_differences(name):
    x, y, hard = (t.requires_grad_() for t in batch(n=4, d=3))
    loss = OBJECTIVES[name](**{"fmicl": {"gamma": 1.0, "alpha": 4.0}}.get(name, {}))
    assert torch.autograd.gradcheck(loss, (x, y, hard))
    gradients = torch.autograd.grad(loss(x, y), (x, y))
    assert all(gradient.norm() > 1e-3 for gradient in gradients)


# ---- relations of the family, exact


def off_diagonal(matrix):
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def test_kl_with_the_best_donsker_varadhan_shift_is_alignment_uniformity():
    """E+[s] - log E[e^s], s = r, is -gamma (alignment + uniformity / gamma)."""
    gamma = 1.7
    x, y, _ = batch()
    u, v = unit_rows(x), unit_rows(y)
    positive, negative = log_ratio(u, v, gamma), off_diagonal(pairwise_log_ratio(u, u, gamma))
    bound = positive.mean() - (negative.logsumexp(0) - math.log(len(negative)))
    au = AlignUniformLoss(gamma=gamma, alpha=1 / gamma)(x, y)
    torch.testing.assert_close(bound, -gamma * au, rtol=1e-12, atol=1e-12)
    # v* = log E exp(s) - 1 maximizes E+[s - v] - E[f*(s - v)], f*(t) = e^(t - 1) of the textbook f = u log u
    shift = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    value = (positive - shift).mean() - (negative - shift - 1).exp().mean()
    best = negative.logsumexp(0) - math.log(len(negative)) - 1
    at_best = (positive - best).mean() - (negative - best - 1).exp().mean()
    torch.testing.assert_close(at_best, bound, rtol=1e-12, atol=1e-12)
    assert value < at_best


def test_jensen_alignment_uniformity_bounds_infonce():
    """The loss with the log outside the mean over anchors is larger; InfoNCE without the positive in its sum."""
    for seed in range(5):
        x, y, _ = batch(seed)
        r = pairwise_log_ratio(unit_rows(x), unit_rows(x), 3.0)
        r = r.masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
        per_row = r.logsumexp(1) - math.log(len(x) - 1)
        joint = r.flatten().logsumexp(0) - math.log(len(x) * (len(x) - 1))
        assert per_row.mean() < joint
        positive = log_ratio(unit_rows(x), unit_rows(y), 3.0).mean()
        infonce_bound, kl_bound = positive - per_row.mean(), positive - joint
        assert kl_bound <= infonce_bound


def test_kl_with_the_f_gaussian_similarity_is_cosine_with_temperature_sigma_squared():
    gamma = 4.0
    sigma_squared = 1 / (2 * gamma)
    u, v = (unit_rows(t) for t in batch()[:2])
    expected = pairwise_cosine(u, v, gamma) / sigma_squared - 1 / sigma_squared
    torch.testing.assert_close(pairwise_log_ratio(u, v, gamma), expected, rtol=1e-12, atol=1e-12)
    assert InfoNCELoss(temperature=0.05).gamma == pytest.approx(10.0)


def test_pearson_is_the_spectral_loss_with_u_for_the_inner_product():
    """Loss = -(2 E+[u] - E[u^2] - 2) for alpha = 1: the constant is 2, 1 of it f(0); the paper prints 3."""
    x, y, _ = batch()
    u, v = unit_rows(x), unit_rows(y)
    positive = log_ratio(u, v, 0.8).exp()
    negative = off_diagonal(pairwise_log_ratio(u, u, 0.8)).exp()
    loss = FMICLLoss("pearson", gamma=0.8, alpha=1.0)(x, y)
    expected = -(2 * positive.mean() - negative.square().mean() - 2)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    inner = off_diagonal(u @ u.T)
    spectral = SpectralLoss(negatives="same_view")(x, y)
    torch.testing.assert_close(spectral, -2 * (u * v).sum(-1).mean() + inner.square().mean())


def test_weighting_proposition():
    """A weight alpha of the negative term corresponds to f_alpha(x) = alpha f(x/alpha) - alpha f(1/alpha): at alpha u,
    its score is f'(u) and its conjugate alpha (f* o f')(u) + alpha f(1/alpha); `conjugate` has f(0) added."""
    alpha = 3.0
    for name in ("kl", "js", "pearson", "sh", "vlc"):
        f = DIVERGENCES[name].f
        u = torch.linspace(0.1, 2, 30, dtype=torch.float64, requires_grad=True)
        weighted = alpha * f(u / alpha) - alpha * f(torch.tensor(1 / alpha, dtype=torch.float64))
        (slope,) = torch.autograd.grad(weighted.sum(), u)
        r = (u.detach() / alpha).log()
        torch.testing.assert_close(slope, DIVERGENCES[name].score(r))
        conjugate = (u * slope - weighted).detach()
        one, zero = torch.tensor([1 / alpha, 0.0], dtype=torch.float64)
        constant = alpha * f(one) - alpha * f(zero)
        torch.testing.assert_close(conjugate, alpha * DIVERGENCES[name].conjugate(r) + constant)


def test_cosine_similarity_replaces_the_score_by_the_inner_product():
    x, y, _ = batch()
    u, v = unit_rows(x), unit_rows(y)
    t = off_diagonal(u @ u.T)
    loss = FMICLLoss("pearson", alpha=2.0, similarity="cosine")(x, y)
    torch.testing.assert_close(loss, -(u * v).sum(-1).mean() + 2.0 * (t**2 / 4 + t).mean(), rtol=1e-9, atol=1e-9)


# ---- the theorem


@pytest.mark.parametrize("name", [n for n in DIVERGENCES if n not in ("rkl", "neyman")])
def test_minimizers_of_the_negative_term_are_the_regular_simplex(name):
    """N = 5 free vectors in d = 6: pairwise cosine -1/(N - 1), squared distance 2N/(N - 1), centre 0."""
    n, d = 5, 6
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    loss = FMICLLoss(name, gamma=1.0, alpha=1.0)
    optimizer = torch.optim.LBFGS(
        [x], lr=1, max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(x, x.detach())  # positives that coincide: the negative term alone
        value.backward()
        return value

    optimizer.step(closure)
    u = unit_rows(x.detach())
    torch.testing.assert_close(
        off_diagonal(u @ u.T), torch.full((n * (n - 1),), -1 / (n - 1)).double(), rtol=0, atol=1e-4
    )
    distances = off_diagonal(torch.cdist(u, u).square())
    torch.testing.assert_close(distances, torch.full_like(distances, 2 * n / (n - 1)), rtol=0, atol=3e-4)
    assert u.sum(0).norm() < 1e-3


@pytest.mark.parametrize("name", ["rkl", "neyman"])
def test_without_the_condition_two_clusters_beat_the_simplex(name):
    """For a concave or linear h, two antipodal pairs of coinciding points are at least as good as the simplex."""
    clusters = torch.tensor([[1.0, 0, 0], [1, 0, 0], [-1, 0, 0], [-1, 0, 0]], dtype=torch.float64)
    simplex = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    loss = FMICLLoss(name, gamma=1.0, alpha=1.0)
    worse, best = loss.terms(simplex, simplex).negative, loss.terms(clusters, clusters).negative
    assert best <= worse + 1e-12


# ---- precision


@pytest.mark.parametrize("name", ["fmicl", "infonce", "align_uniform", "spectral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast(name, dtype):
    """Half-precision embeddings under autocast: value and gradient equal those of the same numbers in float32."""
    x, y, _ = (t.to(dtype) for t in batch(dtype=torch.float32, n=32, d=64))
    loss = OBJECTIVES[name]()
    expected_x = x.float().requires_grad_()
    expected = loss(expected_x, y.float())
    expected.backward()
    half_x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(half_x, y)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == expected.item()
    torch.testing.assert_close(half_x.grad, expected_x.grad.to(dtype))


def test_float32_gradient_at_the_papers_setting():
    """KL, gamma 20, alpha 409600, embeddings with cosine about 0.65, where attraction and repulsion balance."""
    x, y, _ = batch(n=64, d=256)
    x, y = (x / 3 + 1.36).requires_grad_(), y + 1.36
    assert 0.4 < off_diagonal(unit_rows(x) @ unit_rows(x).T).mean() < 0.8
    exact = torch.autograd.grad(FMICLLoss()(x, y), x)[0]
    x32 = x.detach().float().requires_grad_()
    single = torch.autograd.grad(FMICLLoss()(x32, y.float()), x32)[0]
    assert exact.norm() > 1e-2
    assert (single - exact).norm() / exact.norm() < 1e-5


def test_zero_vectors_and_identical_views_stay_finite():
    x = torch.zeros(3, 4, requires_grad=True)
    loss = FMICLLoss()(x, x)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


# ---- arguments


def test_custom_divergence():
    x, y, _ = batch()
    mine = FMICLLoss(FDivergence.from_convex(lambda u: (u - 1) ** 2, "mine"), gamma=1.0, alpha=3.0)
    torch.testing.assert_close(mine(x, y), FMICLLoss("pearson", gamma=1.0, alpha=3.0)(x, y))
    assert mine.hyperparameters["divergence"] == "mine"


@pytest.mark.parametrize("name", ["rkl", "neyman"])
@pytest.mark.filterwarnings("default")
def test_warning_if_the_uniformity_condition_fails(name):
    with pytest.warns(UserWarning, match=f"divergence '{name}' with gamma 20 .* kl, js, pearson"):
        FMICLLoss(name, 20.0, 409600.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FMICLLoss("kld"), "divergence=kld: .* kl, js, "),
        (lambda: FMICLLoss(alpha=0.0), "alpha .* > 0, got 0.0"),
        (lambda: FMICLLoss(alpha=-1.0), "alpha .* > 0, got -1.0"),
        (lambda: FMICLLoss(gamma=0.0), "gamma .* > 0, got 0.0"),
        (lambda: FMICLLoss(gamma=math.inf), "gamma .* > 0, got inf"),
        (lambda: FMICLLoss(gamma=math.nan), "gamma .* > 0, got nan"),
        (lambda: FMICLLoss(negatives="all"), "negatives .* same_view, cross_view, both, queue.* 'all'"),
        (lambda: FMICLLoss(similarity="dot"), "similarity .* gaussian, cosine.* 'dot'"),
        (lambda: InfoNCELoss(temperature=0.0), "temperature .* > 0, got 0.0"),
        (lambda: FMICLLoss()(torch.ones(0, 3), torch.ones(0, 3)), "x has no rows"),
        (lambda: FMICLLoss()(torch.ones(2, 3), torch.ones(3, 3)), r"\[N, D\] .*got .*2, 3.*3, 3"),
        (lambda: FMICLLoss()(*[torch.ones(2, 3)] * 2, torch.ones(2, 4, 2)), r"\[N, K, D\], got .*2, 4, 2"),
        (
            lambda: FMICLLoss()(*[torch.ones(2, 3)] * 3, text_ids=torch.zeros(2, 1)),
            r"text_ids must be \[N, 3\] for 1 hard negatives per example, N = 2, got \[2, 1\]",
        ),
        (lambda: FMICLLoss()(*[torch.ones(2, 3)] * 2, queue=torch.ones(4, 3)), r"queue .*same_view.* \[4, 3\]"),
        (lambda: FMICLLoss(negatives="queue")(*[torch.ones(2, 3)] * 2), "queue .*None"),
        (
            lambda: FMICLLoss(negatives="queue")(*[torch.ones(2, 3)] * 2, queue=torch.ones(0, 3)),
            r"queue .* \[0, 3\]",
        ),
        (
            lambda: FMICLLoss(negatives="queue")(*[torch.ones(2, 3)] * 3, queue=torch.ones(4, 3)),
            "queue .* hard_negatives",
        ),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_hyperparameters_rebuild_the_loss():
    for name, loss_class in OBJECTIVES.items():
        loss = loss_class()
        assert loss_class(**loss.hyperparameters).hyperparameters == loss.hyperparameters, name
    assert FMICLLoss(tsallis(1.5)).hyperparameters["divergence"] == "tsallis"
    assert "gamma" not in FMICLLoss(similarity="cosine").hyperparameters


def test_names():
    names = {name: loss_class().objective_name for name, loss_class in OBJECTIVES.items()}
    assert names == {name: "fmicl-kl" if name == "fmicl" else name for name in OBJECTIVES}
    assert FMICLLoss(FDivergence.from_convex(lambda u: u**2, "mine")).objective_name == "fmicl-mine"


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_formula_of_fmicl(name, similarity):
    formula = FMICLLoss(name, 20.0, 409600.0, similarity=similarity).formula
    f, score, conjugate = DIVERGENCES[name].formulas
    if similarity == "cosine":
        score, conjugate = "cosine", "f*(cosine)"
    symbol, definition = SIMILARITIES[similarity].symbol, SIMILARITIES[similarity].definition
    for text in (f"score({symbol}) = {score}", f"conjugate({symbol}) = {conjugate}", f"f(u) = {f},", definition):
        assert text in formula, text


@pytest.mark.parametrize("module", ["contrastive", "divergences", "objectives", "similarity"])
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"fmicl_text.losses.{module}"))
    assert result.attempted and not result.failed


CHANGES = [
    (FMICLLoss, {"alpha": 3.0, "gamma": 0.5, "negatives": "both", "divergence": "js", "similarity": "cosine"}),
    (InfoNCELoss, {"temperature": 0.5, "negatives": "both"}),
    (AlignUniformLoss, {"alpha": 3.0, "gamma": 0.5, "negatives": "both"}),
    (SpectralLoss, {"alpha": 3.0, "negatives": "both"}),
]


@pytest.mark.parametrize(("make", "name", "value"), [(make, *item) for make, new in CHANGES for item in new.items()])
def test_a_changed_hyperparameter_acts_at_the_next_call(make, name, value):
    x, y, _ = batch()
    given = {"negatives": "same_view"} | ({"alpha": 2.0, "gamma": 1.0} if make is FMICLLoss else {})
    loss = make(**given)
    before = loss(x, y).item()
    setattr(loss, name, value)
    expected = make(**(given | {name: value}))
    assert loss(x, y).item() == expected(x, y).item() != before
    assert loss.hyperparameters == expected.hyperparameters


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (FMICLLoss, "alpha", 0.0), (FMICLLoss, "gamma", math.inf), (FMICLLoss, "negatives", "all"),
        (FMICLLoss, "global_batch", "all"), (FMICLLoss, "divergence", "chi"), (FMICLLoss, "similarity", "dot"),
        (InfoNCELoss, "temperature", 0.0), (InfoNCELoss, "global_batch", "ring"), (AlignUniformLoss, "gamma", 40.0),
        (AlignUniformLoss, "alpha", -1.0), (SpectralLoss, "alpha", math.nan),
    ],
)  # fmt: skip
def test_a_changed_hyperparameter_is_checked(make, name, value):
    loss = make()
    before = getattr(loss, name)
    with pytest.raises(ValueError, match=name):
        setattr(loss, name, value)
    assert getattr(loss, name) is before
    with pytest.raises(ValueError, match=name):
        make(**{name: value})
