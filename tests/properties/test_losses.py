"""Properties of every loss on random batches, and comparison with its float64 reference implementation."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fmicl_text.losses.contrastive import IN_BATCH, OBJECTIVES, AlignUniformLoss, FMICLLoss, InfoNCELoss, SpectralLoss
from fmicl_text.losses.divergences import DIVERGENCES, tsallis
from tests import reference

pytestmark = pytest.mark.filterwarnings("ignore:divergence .* fails the uniformity condition")
RECORDS = st.sampled_from(list(DIVERGENCES.values())) | st.floats(0.1, 5).map(tsallis)


@st.composite
def batches(draw, least=2, most=7):
    """x, y, hard negatives or None [n, d] of small integers, so that equal, opposite and repeated rows are common."""
    n, d = draw(st.integers(least, most)), draw(st.integers(2, 5))
    with_hard = draw(st.booleans())
    rows = st.lists(st.integers(-3, 3), min_size=d, max_size=d).filter(any)
    x, y, hard = (torch.tensor(draw(st.lists(rows, min_size=n, max_size=n)), dtype=torch.float64) for _ in range(3))
    return x, y, hard if with_hard else None


GAMMAS, ALPHAS = st.floats(0.05, 3), st.floats(0.1, 1000)
NEGATIVES = st.sampled_from(IN_BATCH)
FMICL = st.builds(FMICLLoss, RECORDS, GAMMAS, ALPHAS, NEGATIVES)
OTHERS = {
    "infonce": st.builds(InfoNCELoss, st.floats(0.05, 2), NEGATIVES),
    "align_uniform": st.builds(AlignUniformLoss, GAMMAS, ALPHAS, NEGATIVES),
    "spectral": st.builds(SpectralLoss, ALPHAS, NEGATIVES),
}
LOSSES = st.one_of(FMICL, *OTHERS.values())


def same(loss, other, tensors, changed, bar=1e-10):
    terms, expected = other.terms(*changed), loss.terms(*tensors)
    scale = sum(abs(term.item()) for term in expected) + 1
    assert [term.item() for term in terms] == pytest.approx([term.item() for term in expected], abs=bar * scale)


def apply(change, tensors):
    return [None if tensor is None else change(tensor) for tensor in tensors]


def gradients(loss, batch):
    leaves = [rows.clone().requires_grad_() for rows in batch if rows is not None]
    return torch.cat(torch.autograd.grad(loss(*leaves), leaves))


@pytest.mark.slow
@settings(max_examples=80)
@given(LOSSES, batches())
def test_float32_gives_the_loss_and_the_gradient_of_float64(loss, batch):
    single = apply(lambda rows: rows.float(), batch)
    same(loss, loss, batch, single, bar=1e-5)
    exact = gradients(loss, batch)
    scale = exact.abs().max() + getattr(loss, "alpha", 1)
    torch.testing.assert_close(gradients(loss, single).double(), exact, rtol=0, atol=1e-5 * scale.item())


SPREAD = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])


@pytest.mark.parametrize("gamma", [20.0, 36.0])
def test_alignment_uniformity_of_opposite_rows(gamma):
    """float32 at r = -4 gamma."""
    loss = AlignUniformLoss(gamma)
    same(loss, loss, (SPREAD.double(), SPREAD.double()), (SPREAD, SPREAD), bar=1e-5)
    assert gradients(loss, (SPREAD, SPREAD)).isfinite().all()


@given(LOSSES, batches(), st.randoms(use_true_random=False))
def test_the_order_of_the_examples_changes_nothing(loss, batch, random):
    order = random.sample(range(len(batch[0])), len(batch[0]))
    same(loss, loss, batch, apply(lambda rows: rows[order], batch))


@given(LOSSES, batches(), st.integers(0, 9))
def test_a_rotation_of_all_rows_changes_nothing(loss, batch, seed):
    d = batch[0].shape[1]
    rotation, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    same(loss, loss, batch, apply(lambda rows: rows @ rotation, batch))


@given(LOSSES, batches(), st.lists(st.floats(1e-3, 1e3), min_size=7, max_size=7))
def test_the_length_of_a_row_changes_nothing(loss, batch, lengths):
    lengths = torch.tensor(lengths, dtype=torch.float64)[: len(batch[0]), None]
    same(loss, loss, batch, apply(lambda rows: rows * lengths, batch))


@given(LOSSES, batches(), st.sampled_from([None, 1, 3]))
def test_no_gradient_along_a_row(loss, batch, block_size):
    loss.block_size = block_size
    leaves = apply(lambda rows: rows.clone().requires_grad_(), batch)
    used = [rows for rows in leaves if rows is not None]
    for rows, gradient in zip(used, torch.autograd.grad(loss(*leaves), used), strict=True):
        along = torch.linalg.vecdot(rows, gradient).abs()
        assert (along <= 1e-9 * (1 + rows.norm(dim=1) * gradient.norm(dim=1))).all()


@given(LOSSES, st.integers(2, 6), st.integers(1, 5), st.booleans())
def test_a_collapsed_batch(loss, n, d, with_hard):
    """alpha f(0) for f-MICL (0 if that is infinite) and 0 for alignment + uniformity; log(number of candidates) for
    InfoNCE; inner products 1 for spectral."""
    x = torch.ones(n, d, dtype=torch.float64)
    candidates = (n - 1) * (2 if loss.negatives == "both" else 1) + n * with_hard
    expected = {InfoNCELoss: math.log(1 + candidates), SpectralLoss: getattr(loss, "alpha", 0) - 2}.get(type(loss), 0.0)
    if isinstance(loss, FMICLLoss):
        at_zero = {"js": math.log(2), "vlc_as_printed": 2, "jeffrey": 0, "rkl": 0, "neyman": 0}
        expected = loss.alpha * at_zero.get(loss.divergence.name, 1)
    assert loss(x, 2 * x, 3 * x if with_hard else None).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@st.composite
def text_ids(draw, n, with_hard):
    """[n, 2 or 3], often with the same text in several places."""
    width, largest = 3 if with_hard else 2, draw(st.sampled_from([0, 2, 6, 1000]))
    row = st.lists(st.integers(0, largest), min_size=width, max_size=width)
    return torch.tensor(draw(st.lists(row, min_size=n, max_size=n)))


@pytest.mark.slow
@settings(max_examples=80)
@given(FMICL | OTHERS["align_uniform"] | OTHERS["spectral"], batches(most=12), st.data())
def test_the_block_size_does_not_change_the_loss(loss, batch, data):
    x, y, hard = batch
    ids = data.draw(text_ids(len(x), hard is not None))
    assume(reference.negative_pairs(x, y, hard, loss.negatives, ids.tolist()))
    results = []
    for block_size in (None, data.draw(st.integers(1, len(x) + 1))):
        loss.block_size = block_size
        leaves = [rows.clone().requires_grad_() for rows in batch if rows is not None]
        terms = loss.terms(*leaves, text_ids=ids)
        results.append((torch.stack(terms).detach(), *torch.autograd.grad(terms.loss, leaves)))
    for full, blocks in zip(*results, strict=True):
        torch.testing.assert_close(blocks, full, rtol=1e-9, atol=1e-9 * (1 + results[0][0].abs().max().item()))


def by_reference(loss, x, y, hard, ids):
    kwargs = loss.hyperparameters
    options = {"negatives": loss.negatives, "hard": hard, "ids": ids}
    if isinstance(loss, InfoNCELoss):
        return reference.infonce(x, y, kwargs["temperature"], **options)
    if isinstance(loss, AlignUniformLoss):
        return reference.align_uniform(x, y, kwargs["gamma"], kwargs["alpha"], **options)
    if isinstance(loss, SpectralLoss):
        return reference.spectral(x, y, kwargs["alpha"], **options)
    return reference.fmicl(x, y, kwargs["divergence"], kwargs["gamma"], kwargs["alpha"], **options)


NAMED = {name: st.builds(FMICLLoss, st.just(name), GAMMAS, ALPHAS, NEGATIVES) for name in reference.GENERATORS}


@pytest.mark.parametrize("name", [*NAMED, *OTHERS])
@settings(max_examples=15)
@given(batch=batches(), data=st.data())
def test_every_objective_equals_its_reference(name, batch, data):
    """With repeated texts. If they leave no negative pair, the negative term is 0."""
    loss = data.draw((NAMED | OTHERS)[name])
    ids = data.draw(text_ids(len(batch[0]), batch[2] is not None))
    lists = [None if rows is None else rows.tolist() for rows in (*batch, ids)]
    if not reference.negative_pairs(*lists[:3], loss.negatives, lists[3]):
        with pytest.warns(UserWarning, match="no negative pair in a batch"):
            terms = loss.terms(*batch, text_ids=ids)
        rest = -terms.positive.item() if isinstance(loss, InfoNCELoss) else 0
        assert terms.negative.item() == pytest.approx(rest, abs=1e-9)
        return
    assert loss(*batch, ids).item() == pytest.approx(
        by_reference(loss, *lists), rel=1e-9, abs=1e-9 * loss.hyperparameters.get("alpha", 1)
    )


def test_every_objective_is_drawn():
    assert {"fmicl", *OTHERS} == set(OBJECTIVES)
