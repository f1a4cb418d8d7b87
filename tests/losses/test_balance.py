"""alpha and gamma "auto", large alphas in float32, and the mutual information, against float64 loops."""

import copy
import logging
import math
import pickle

import numpy as np
import pytest
import torch

from fmicl_text.losses import (
    AlignUniformLoss,
    Balance,
    FDivergence,
    FMICLLoss,
    InfoNCELoss,
    Similarity,
    SpectralLoss,
    tsallis,
)
from fmicl_text.losses.balance import Distances
from fmicl_text.losses.contrastive import IN_BATCH
from tests import reference

# f'' of the textbook f
CURVATURES = {
    "kl": lambda u: 1 / u,
    "js": lambda u: 1 / u - 1 / (1 + u),
    "pearson": lambda u: 2.0,
    "sh": lambda u: 0.5 * u**-1.5,
    "tsallis": lambda u: 3 * u,
    "vlc": lambda u: 8 / (1 + u) ** 3,
}
TAILS = {"kl": 1, "js": 1, "pearson": 2, "sh": 0.5, "tsallis": 3, "vlc": 2, "vlc_as_printed": 1}
pytestmark = pytest.mark.filterwarnings("ignore:divergence .* fails the uniformity condition")
CHI_SQUARE = FDivergence.from_convex(lambda u: (u - 1) ** 2, "mine")


def named(divergence):
    """Id of a test."""
    return getattr(divergence, "name", str(divergence))


def batch(n=7, d=5, dtype=torch.float64):
    """x, y, hard negatives [n, d] of different lengths; y near x."""
    generator = torch.Generator().manual_seed(0)
    x, noise, hard = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(3))
    return [rows.to(dtype) for rows in (3 * x, x + 0.4 * noise, hard)]


def ratios(x, y, hard, negatives, ids, gamma):
    """u = e^r of positive and of negative pairs; plain Python numbers."""
    x, y = reference.unit(x), reference.unit(y)
    pairs = reference.negative_pairs(x, y, None if hard is None else reference.unit(hard), negatives, ids)
    positive = [math.exp(-gamma * reference.squared_distance(a, b)) for a, b in zip(x, y, strict=True)]
    return positive, [math.exp(-gamma * reference.squared_distance(x[i], other)) for i, other in pairs]


def lists(*tensors):
    return [None if tensor is None else tensor.tolist() for tensor in tensors]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.fixture
def repeated():
    """Text ids with texts that recur within a view and between positives and hard negatives."""
    ids = torch.arange(7)[:, None] * 10 + torch.arange(3)
    ids[3, 0], ids[1, 1], ids[2, 2], ids[5, 2] = ids[0, 0], ids[4, 0], ids[2, 0], ids[6, 0]
    return ids


# ---- alpha


@pytest.mark.parametrize("block_size", [None, 3], ids=["matrix", "blocks"])
@pytest.mark.parametrize("with_hard", [False, True], ids=["pairs", "triplets"])
@pytest.mark.parametrize("negatives", IN_BATCH)
@pytest.mark.parametrize("name", CURVATURES)
def test_balance_against_the_loops(name, negatives, with_hard, block_size, repeated):
    """score'(r) = u f''(u), conjugate'(r) = u^2 f''(u), from float32 rows too."""
    x, y, hard = batch()
    hard, ids = (hard, repeated) if with_hard else (None, repeated[:, :2])
    positive, negative = ratios(*lists(x, y, hard), negatives, ids.tolist(), 0.8)
    curvature = CURVATURES[name]
    attraction, repulsion = mean(u * curvature(u) for u in positive), mean(u * u * curvature(u) for u in negative)
    loss = FMICLLoss(name, 0.8, "auto", negatives, block_size=block_size)
    found = loss.balance(x, y, hard, ids)
    assert found.positive == pytest.approx((attraction,), rel=1e-12)
    assert found.negative == pytest.approx((repulsion,), rel=1e-12)
    assert found.alpha == pytest.approx(attraction / repulsion, rel=1e-12)
    assert loss.alpha == "auto" and found.relative_error is None
    single = loss.balance(x.float(), y.float(), None if hard is None else hard.float(), ids)
    assert single.alpha == pytest.approx(found.alpha, rel=1e-5)


def shifted(constant):
    return Similarity("shifted", lambda product, gamma: 2 * gamma * (product - 1) + constant)


@pytest.mark.parametrize("name", TAILS)
def test_a_constant_added_to_every_r_leaves_the_loss_at_alpha(name):
    x, y, _ = batch()
    alpha = FMICLLoss(name, 0.8).balance(x, y).alpha
    constant = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for factor in (1, 2):
        loss = FMICLLoss(name, 0.8, factor * alpha, similarity=shifted(constant))(x, y)
        (slope,) = torch.autograd.grad(loss, constant)
        assert (abs(slope) < 1e-12) == (factor == 1)


@pytest.mark.parametrize("divergence", [*CURVATURES, tsallis(1.3), CHI_SQUARE], ids=named)
@pytest.mark.parametrize("similarity", ["gaussian", "cosine", "laplace"])
def test_custom_divergences_similarities_and_a_queue(divergence, similarity):
    """alpha is that at which the derivative by a shift vanishes, by finite differences of the two terms."""
    laplace = Similarity("laplace", lambda product, gamma: -gamma * (2 - 2 * product).clamp_min(0).sqrt())
    of_product = {"gaussian": lambda p, g: 2 * g * (p - 1), "cosine": lambda p, g: p - 1.5}.get(
        similarity, laplace.of_product
    )
    kind = {"is_log_ratio": similarity != "cosine"}
    x, y, queue = batch()
    given = {"gaussian": "gaussian", "laplace": laplace}.get(similarity, Similarity("c", of_product, **kind))
    found = FMICLLoss(divergence, 0.8, 1.0, "queue", given).balance(x, y, queue=queue)
    step, values = 1e-5, []
    for sign in (1, -1):
        moved = Similarity("moved", lambda p, g, sign=sign: of_product(p, g) + sign * step, **kind)
        values.append(FMICLLoss(divergence, 0.8, 1.0, "queue", moved).terms(x, y, queue=queue))
    attraction, repulsion = (-(a - b).item() / (2 * step) for a, b in zip(values[0][1:], values[1][1:], strict=True))
    assert found.positive[0] == pytest.approx(attraction, rel=1e-6)
    assert found.negative[0] == pytest.approx(-repulsion, rel=1e-6)


def test_the_first_call_measures_alpha(caplog):
    x, y, hard = batch()
    loss = FMICLLoss("js", 0.8, "auto", "both")
    expected = loss.balance(x, y, hard).alpha
    assert loss.alpha == loss.hyperparameters["alpha"] == "auto"
    with caplog.at_level(logging.INFO):
        value = loss(x, y, hard)
    assert loss.alpha == loss.hyperparameters["alpha"] == expected and type(loss.alpha) is float
    assert [record.getMessage() for record in caplog.records] == [
        f"alpha=auto: alpha is {expected:.6g}, measured on the first batch"
    ]
    assert value.item() == FMICLLoss("js", 0.8, expected, "both")(x, y, hard).item()
    loss(y, x)
    assert loss.alpha == expected and len(caplog.records) == 1
    loss.alpha = "auto"  # measures again
    loss(y, x)
    assert loss.alpha == FMICLLoss("js", 0.8, 1.0, "both").balance(y, x).alpha != expected


@pytest.mark.parametrize("block_size", [None, 3])
def test_alpha_is_measured_in_every_mode_of_the_caller(block_size):
    x, y, _ = batch(dtype=torch.float32)
    expected = FMICLLoss("vlc", 0.8).balance(x, y).alpha

    def measured(x, y):
        loss = FMICLLoss("vlc", 0.8, "auto", block_size=block_size)
        loss(x, y)
        return loss.alpha

    with torch.no_grad():
        assert measured(x, y) == pytest.approx(expected, rel=1e-12)
    with torch.inference_mode():
        assert measured(x.clone(), y.clone()) == pytest.approx(expected, rel=1e-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert measured(x.requires_grad_(), y) == pytest.approx(expected, rel=1e-12)
    assert x.grad is None


def test_auto_survives_copies():
    x, y, _ = batch()
    loss = FMICLLoss("kl", "auto", "auto")
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), FMICLLoss(**loss.hyperparameters)):
        assert (other.alpha, other.gamma) == ("auto", 20.0)
        other(x, y)
        assert other.alpha == loss.balance(x, y).alpha
        again = pickle.loads(pickle.dumps(other))
        assert again.alpha == other.alpha == FMICLLoss(**other.hyperparameters).alpha


@pytest.mark.parametrize("block_size", [None, 2])
def test_a_first_batch_without_negative_pairs_leaves_alpha_to_the_next(block_size):
    x, y, _ = batch()
    loss = FMICLLoss("kl", 0.8, "auto", block_size=block_size)
    one_text = torch.zeros(7, 1, dtype=torch.long)
    with pytest.warns(UserWarning, match="no negative pair"):
        terms = loss.terms(x, y, text_ids=one_text)
        assert loss.balance(x, y, text_ids=one_text) == Balance()
    assert terms.negative == 0 and terms.positive > 0
    loss(x[:1], y[:1])
    assert loss.alpha == "auto"
    loss(x, y)
    assert loss.alpha == loss.balance(x, y).alpha


@pytest.mark.parametrize("block_size", [None, 2])
def test_rows_that_are_not_finite_leave_alpha_to_the_next_batch(block_size):
    x, y, _ = batch()
    loss = FMICLLoss("kl", 0.8, "auto", block_size=block_size)
    assert loss(x * math.nan, y).isnan() and loss.alpha == "auto"


HINGE = FDivergence.from_convex(lambda u: (u - 0.5).clamp_min(0).square(), "hinge")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda x, y: FMICLLoss("rkl", 1.0, "auto"), ("alpha=auto", "rkl is 0", "pass gamma and alpha")),
        (lambda x, y: FMICLLoss("jeffrey", 1.0, "auto"), ("alpha=auto", "jeffrey is 0")),
        (lambda x, y: FMICLLoss("neyman", "auto"), ("gamma=auto", "neyman is -1")),
        (lambda x, y: FMICLLoss(HINGE, 1.0, "auto"), ("alpha=auto", "hinge is nan")),
        (lambda x, y: setattr(FMICLLoss("jeffrey", 1.0), "alpha", "auto"), ("alpha=auto", "jeffrey is 0")),
        (lambda x, y: FMICLLoss("jeffrey", 1.0).balance(x, y), ("alpha=auto", "jeffrey is 0")),
        (lambda x, y: FMICLLoss("kl", 900.0, "auto")(x[2:], y[2:]), ("alpha=auto", "conjugate' 0 of", "gamma")),
        (lambda x, y: FMICLLoss("kl", 900.0, "auto", block_size=3)(x[2:], y[2:]), ("conjugate' 0 of negative",)),
        (lambda x, y: FMICLLoss("js", 1.0, "auto", "cross_view", "cosine")(x, x), ("conjugate' inf of negative",)),
        (lambda x, y: FMICLLoss("kl").balance(x * math.nan, y).alpha, ("score' nan", "conjugate' nan")),
        (lambda x, y: Balance().alpha, ("alpha=auto", "negative pair")),
        (lambda x, y: FMICLLoss("kl", 1.0, "automatic"), ("alpha must be auto or a finite number > 0", "'automatic'")),
        (lambda x, y: FMICLLoss("kl", -1.0), ("gamma must be auto or a finite number > 0", "-1.0")),
        (lambda x, y: AlignUniformLoss("auto"), ("gamma must be a finite number > 0", "'auto'")),
        (
            lambda x, y: FMICLLoss("kl", "auto", similarity=Similarity("own", lambda p, g: g * p, is_log_ratio=False)),
            ("gamma=auto", "own"),
        ),
    ],
)  # fmt: skip
def test_where_no_alpha_or_gamma_exists(build, words):
    x = torch.eye(8, dtype=torch.float64)
    x[0, 1] = 3.0  # cosine 0.95 to the next
    with pytest.raises(ValueError) as error:
        build(x, x.roll(1, 1) * 0.01 + x)
    message = f"{error.value}"
    assert all(word in message for word in words) and "\n" not in message, message


def test_balances_add_up():
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.rand(2, 400, generator=generator, dtype=torch.float64) + 1
    total = sum((Balance((p,), (n,)) for p, n in zip(positive.tolist(), negative.tolist(), strict=True)), Balance())
    ratios = (positive / negative).numpy()
    assert total.alpha == pytest.approx(np.exp(np.median(np.log(ratios))), rel=1e-12)
    chosen = np.random.default_rng(0).integers(400, size=(4000, 400))
    bootstrap = np.median(ratios[chosen], axis=1)
    assert total.relative_error == pytest.approx(bootstrap.std() / total.alpha, rel=0.15)
    assert (Balance((2.0,), (1.0,)) + Balance((4.0,), (2.0,))).relative_error == 0


def test_a_batch_with_near_duplicates_does_not_count():
    typical = [Balance((1.0,), (one,)) for one in (1e-12, 2e-12, 3e-12, 4e-12, 5e-12)]
    for outlier in (1e-3, 0.0, 1.0):
        alpha = sum([*typical, Balance((1.0,), (outlier,))], Balance()).alpha
        assert 2e11 < alpha < 5e11


# ---- gamma


@pytest.mark.parametrize("name", TAILS)
def test_gamma_auto(name):
    assert FMICLLoss(name, "auto").gamma == pytest.approx(20 / TAILS[name], rel=1e-6)
    loss = FMICLLoss("kl", 1.0)
    loss.divergence, loss.gamma = name, "auto"
    assert loss.gamma == FMICLLoss(name, "auto").gamma and loss.hyperparameters["gamma"] == "auto"


def separated(x, y, hard, negatives, ids=None, distance=lambda squared: squared):
    """(mean distance of negative pairs - mean of positive pairs) / variance of negative pairs, by loops."""
    positive, negative = ([-math.log(u) for u in each] for each in ratios(*lists(x, y, hard), negatives, ids, 1.0))
    positive, negative = (list(map(distance, each)) for each in (positive, negative))
    center = mean(negative)
    return (center - mean(positive)) / mean((value - center) ** 2 for value in negative)


def noisy_pairs(noise):
    """Rows x, y [40, 80] around a common direction, float64; with noise 20, opposite ones."""
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 40, 80, generator=generator, dtype=torch.float64)
    return x + 0.5, (x + 0.5 + noise * other if noise < 20 else -x)


@pytest.mark.parametrize("alpha", ["auto", 30.0])
@pytest.mark.parametrize("noise", [0.2, 3.0, 20.0])
@pytest.mark.parametrize("name", TAILS)
def test_gamma_auto_is_measured_at_the_first_call(name, noise, alpha, caplog):
    """1.25 separation / max(k, 1), for which 5 <= k gamma <= 20, and then alpha with this gamma."""
    x, y = noisy_pairs(noise)
    k, separation = TAILS[name], separated(x, y, None, "cross_view")
    assert {0.2: 1.25 * separation > 20, 3.0: 5 < 1.25 * separation < 19, 20.0: separation < 0}[noise]
    expected = min(max(1.25 * separation, 5) / max(k, 1), 20 / k)
    loss = FMICLLoss(name, "auto", alpha, "cross_view")
    assert loss.hyperparameters["gamma"] == "auto"
    with caplog.at_level(logging.INFO):
        value = loss(x.float(), y.float())
    assert loss.gamma == loss.hyperparameters["gamma"] == pytest.approx(expected, rel=1e-5)
    assert type(loss.gamma) is float
    assert caplog.messages[0] == f"gamma=auto: gamma is {loss.gamma:.6g}, measured on the first batch"
    given = FMICLLoss(name, loss.gamma, alpha, "cross_view")
    assert value.item() == given(x.float(), y.float()).item() and given.alpha == loss.alpha
    for again in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        again(*noisy_pairs(1.0))
        assert (again.gamma, again.alpha) == (loss.gamma, loss.alpha)
    loss.gamma = "auto"  # measures again
    loss(*noisy_pairs(1.0))
    assert loss.gamma == FMICLLoss(name, "auto", 1.0, "cross_view").gamma or loss.gamma != given.gamma


@pytest.mark.parametrize("block_size", [None, 3], ids=["matrix", "blocks"])
@pytest.mark.parametrize("with_hard", [False, True], ids=["pairs", "triplets"])
@pytest.mark.parametrize("negatives", IN_BATCH)
def test_distances_against_the_loops(negatives, with_hard, block_size, repeated):
    x, y, hard = batch()
    hard, ids = (hard, repeated) if with_hard else (None, repeated[:, :2])
    loss = FMICLLoss("pearson", "auto", "auto", negatives, block_size=block_size)
    found = loss.distances(x, y, hard, ids)
    positive, negative = ratios(*lists(x, y, hard), negatives, ids.tolist(), 1.0)
    assert found.positive == pytest.approx((-mean(map(math.log, positive)),), rel=1e-12)
    assert found.negative == pytest.approx((-mean(map(math.log, negative)),), rel=1e-12)
    assert found.separation == pytest.approx(separated(x, y, hard, negatives, ids.tolist()), rel=1e-9)
    assert loss.hyperparameters["gamma"] == "auto"
    loss.balance(x, y, hard, ids)
    assert (
        loss.gamma == pytest.approx(min(max(1.25 * found.separation / 2, 2.5), 10), rel=1e-12) and loss.alpha == "auto"
    )
    again = loss.gamma
    loss.balance(*noisy_pairs(0.1))
    assert loss.gamma == again


def test_separation_of_several_batches():
    x, y = noisy_pairs(1.5)
    loss = FMICLLoss("kl", 1.0, 1.0, "queue")
    parts = [loss.distances(x[rows], y[rows], queue=y) for rows in (slice(20), slice(20, 40))]
    whole = loss.distances(x, y, queue=y)
    assert (parts[0] + parts[1]).separation == pytest.approx(whole.separation, rel=1e-9)
    assert math.isnan(Distances().separation) and Distances((0.5,), (1.0,), (1.0,)).separation == math.inf


def test_gamma_auto_of_batches_and_similarities_of_other_kinds():
    x, y = noisy_pairs(1.5)
    loss = FMICLLoss("pearson", "auto", "auto", "cross_view")
    assert loss(x * math.nan, y).isnan() and loss.hyperparameters["gamma"] == loss.hyperparameters["alpha"] == "auto"
    assert loss(x[:1], y[:1]).isfinite() and loss.hyperparameters["gamma"] == "auto"
    laplace = Similarity("laplace", lambda product, gamma: -gamma * (2 - 2 * product).clamp_min(0).sqrt())
    loss = FMICLLoss("kl", "auto", "auto", "cross_view", laplace)
    loss(x, y)
    expected = 1.25 * separated(x, y, None, "cross_view", distance=math.sqrt)
    assert loss.gamma == pytest.approx(min(expected, 20), rel=1e-9)
    loss = FMICLLoss("kl", "auto", "auto", "cross_view", "cosine")
    loss(x, y)
    assert loss.gamma == 20 and "gamma" not in loss.hyperparameters


def test_gamma_auto_of_other_divergences_and_similarities():
    assert FMICLLoss(CHI_SQUARE, "auto").gamma == 10
    assert FMICLLoss(tsallis(1.25), "auto").gamma == 16
    cosine = FMICLLoss("jeffrey", "auto", similarity="cosine")  # does not use it
    assert "gamma" not in cosine.hyperparameters and cosine.gamma > 0


# ---- float32 at large alphas


def gradient_of(loss, x, y):
    leaves = [rows.clone().requires_grad_() for rows in (x, y)]
    terms = loss.terms(*leaves)
    return torch.stack(terms).detach().double(), torch.cat(torch.autograd.grad(terms.loss, leaves)).double()


@pytest.mark.parametrize("block_size", [None, 16])
@pytest.mark.parametrize(
    ("alpha", "cosine"),
    [("auto", 0.1), ("auto", 0.6), (1e12, 0.1), (1e12, 0.6), (1e30, 0.1), (1e37, 0.1), (1e60, 0.1)],
)
@pytest.mark.parametrize("divergence", [*TAILS, CHI_SQUARE], ids=named)
def test_float32_at_large_alphas(divergence, alpha, cosine, block_size):
    """Gradients within 1e-4 and values within 1e-5 of float64's, at embeddings whose r is near -36 and near -16."""
    generator = torch.Generator().manual_seed(0)
    common, rows, noise = (torch.randn(n, 256, generator=generator) for n in (1, 48, 48))
    x = rows + math.sqrt(cosine / (1 - cosine)) * common
    y = x + 0.3 * noise
    loss = FMICLLoss(divergence, "auto", alpha, block_size=block_size)
    if alpha == 1e60:
        loss.gamma *= 4  # r near -140
    single, gradient = gradient_of(loss, x, y)
    exact, exact_gradient = gradient_of(loss, x.double(), y.double())
    torch.testing.assert_close(single, exact, rtol=1e-5 if alpha != 1e60 else 1e-4, atol=0)
    assert exact_gradient.norm() > 0
    assert (gradient - exact_gradient).norm() < 1e-4 * exact_gradient.norm()


# ---- mutual information

STATES, SAME = 4, 0.75  # a joint distribution: the two views are equal with probability 0.75, else uniform


def exact_batch():
    """48 pairs in which each of the 16 pairs of states has its own share, and a queue in which each state has its own.

    With gamma, alpha of `exact_loss`, alpha e^r is the density ratio."""
    counts = [(i, j, 9 if i == j else 1) for i in range(STATES) for j in range(STATES)]
    states = torch.tensor([pair[:2] for pair in counts for _ in range(pair[2])])
    rows = torch.eye(STATES, dtype=torch.float64)
    return rows[states[:, 0]], rows[states[:, 1]], rows


ALPHA = STATES * SAME  # the ratio of equal states, r = 0
OTHER = STATES * (1 - SAME) / (STATES - 1)  # of different ones, r = -2 gamma
INFORMATION = SAME * math.log(ALPHA) + (1 - SAME) * math.log(OTHER)


@pytest.mark.parametrize("divergence", [*CURVATURES, CHI_SQUARE], ids=named)
def test_exact_density_ratios_give_the_mutual_information_and_alpha(divergence):
    x, y, queue = exact_batch()
    gamma = math.log(ALPHA / OTHER) / 2
    loss = FMICLLoss(divergence, gamma, ALPHA, "queue")
    assert loss.mutual_information(x, y, queue=queue).item() == pytest.approx(INFORMATION, rel=1e-12)
    assert loss.balance(x, y, queue=queue).alpha == pytest.approx(ALPHA, rel=1e-9)
    for wrong in (2 * gamma, gamma / 2):
        bound = FMICLLoss(divergence, wrong, ALPHA, "queue").mutual_information(x, y, queue=queue)
        assert bound.dtype == torch.float64 and bound < INFORMATION - 0.01
    for alpha in ("auto", 1.0, 1e12):  # does not depend on it
        other = FMICLLoss(divergence, gamma, alpha, "queue")
        assert other.mutual_information(x, y, queue=queue).item() == pytest.approx(INFORMATION, rel=1e-12)
        assert other.alpha == alpha


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize("negatives", IN_BATCH)
def test_mutual_information_against_the_loops(negatives, block_size, repeated):
    x, y, hard = batch()
    for rows, ids in ((hard, repeated), (None, repeated[:, :2])):
        positive, negative = ratios(*lists(x, y, rows), negatives, ids.tolist(), 0.8)
        for name, alpha in (("kl", 2.5), ("rkl", 2.5), ("js", 1e12)):
            loss = FMICLLoss(name, 0.8, alpha, negatives, block_size=block_size)
            expected = mean(map(math.log, positive)) - math.log(mean(negative))
            found = loss.mutual_information(x.requires_grad_(), y, rows, ids)
            assert found.item() == pytest.approx(expected, rel=1e-12) and not found.requires_grad


@pytest.mark.parametrize("negatives", IN_BATCH)
def test_mutual_information_of_infonce(negatives, repeated):
    """log N - loss, with the number N of candidates of each row."""
    x, y, hard = batch()
    for rows, ids in ((hard, repeated), (None, None)):
        tensors = lists(x, y, rows, ids)
        pairs = reference.negative_pairs(*tensors[:3], negatives, tensors[3])
        log_count = mean(math.log(1 + sum(k == i for k, _ in pairs)) for i in range(7))
        loss = reference.infonce(*tensors[:2], 0.3, negatives, tensors[2], tensors[3])
        found = InfoNCELoss(0.3, negatives).mutual_information(x, y, rows, ids)
        assert found.item() == pytest.approx(log_count - loss, rel=1e-12)


def test_mutual_information_of_a_similarity_in_place_of_the_score():
    """t = f'(u): e^t = u for kl, 1 + t/2 = u for pearson."""
    x, y, _ = batch()
    xs, ys = reference.unit(x.tolist()), reference.unit(y.tolist())
    pairs = [reference.inner(xs[i], ys[j]) for i in range(7) for j in range(7) if i != j]
    same = [reference.inner(a, b) for a, b in zip(xs, ys, strict=True)]
    for name, u in (("kl", math.exp), ("pearson", lambda t: 1 + t / 2)):
        expected = mean(math.log(u(t)) for t in same) - math.log(mean(map(u, pairs)))
        found = FMICLLoss(name, 1.0, 1.5, "cross_view", "cosine").mutual_information(x, y)
        assert found.item() == pytest.approx(expected, rel=1e-9)


def test_mutual_information_of_gaussians_is_bounded():
    """Angles with a von Mises-like noise: the bound at the measured alpha is below the truth, and most of it."""
    generator = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(2000, generator=generator, dtype=torch.float64)
    shift = torch.distributions.VonMises(torch.zeros(2000).double(), torch.full((2000,), 4.0).double())
    torch.manual_seed(0)
    other = angle + shift.sample()
    x, y = (torch.stack([a.cos(), a.sin()], dim=1) for a in (angle, other))
    # density ratio e^(4 cos) / I_0(4) = e^r e^4 / I_0(4) with gamma = 2
    i0 = torch.special.i0(torch.tensor(4.0, dtype=torch.float64))
    truth = (4 * torch.special.i1(torch.tensor(4.0, dtype=torch.float64)) / i0 - i0.log()).item()
    exact = FMICLLoss("js", 2.0, (math.exp(4) / i0).item(), "cross_view").mutual_information(x, y).item()
    automatic = FMICLLoss("js", 2.0, "auto", "cross_view").mutual_information(x, y).item()
    assert exact == pytest.approx(truth, abs=0.05) and automatic == pytest.approx(truth, abs=0.05)
    broad = FMICLLoss("js", 1.0, "auto", "cross_view").mutual_information(x, y).item()
    assert 0.5 * truth < broad < truth - 0.05


def test_other_objectives_and_batches_have_no_bound():
    x, y, _ = batch()
    assert AlignUniformLoss().mutual_information(x, y) is None and SpectralLoss().mutual_information(x, y) is None
    for alpha in ("auto", 2.0):
        assert FMICLLoss(alpha=alpha).mutual_information(x[:1], y[:1]).isnan()
    assert InfoNCELoss().mutual_information(x[:1], y[:1]) == 0
