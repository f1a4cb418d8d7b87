"""The blockwise loss against autograd through whole matrices, its memory and its errors."""

import math
import time

import pytest
import torch

from fmicl_text import FDivergence, FMICLLoss
from fmicl_text.losses import blockwise
from fmicl_text.losses.blockwise import NEGATIVE_TERMS, blocks, distinct, ids_of_ranks, map_in_threads, pairs_of_blocks
from fmicl_text.losses.contrastive import IN_BATCH, OBJECTIVES, AlignUniformLoss, InfoNCELoss
from fmicl_text.losses.divergences import DIVERGENCES
from fmicl_text.losses.pairs import BLOCKWISE_FROM
from fmicl_text.losses.similarity import gradient_of_rows, unit_rows

pytestmark = pytest.mark.filterwarnings("ignore:divergence .* fails the uniformity condition")
BARS = {torch.float32: 1e-6, torch.float64: 1e-12}


def material(rows, dtype, width=16):
    generator = torch.Generator().manual_seed(rows)
    x, noise, hard = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(3))
    return [rows.to(dtype) for rows in (3 * x, x + 0.4 * noise, hard)]


def gradients(loss, *tensors):
    """Loss terms, and the gradient of 0.7 times the loss in every float tensor given, joined."""
    leaves = [t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    terms = loss.terms(*leaves)
    floats = [t for t in leaves if t is not None and t.is_floating_point()]
    return [term.item() for term in terms], torch.cat(torch.autograd.grad(0.7 * terms.loss, floats))


def agree(loss, plain, tensors, bar):
    terms, gradient = gradients(loss, *tensors)
    exact_terms, exact = gradients(plain, *tensors)
    assert exact.norm() > 1e-2
    assert (gradient - exact).norm() / exact.norm() < bar
    assert terms == pytest.approx(exact_terms, rel=10 * bar, abs=10 * bar)


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("negatives", IN_BATCH)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_equals_the_plain_loss(name, negatives, dtype):
    """37 rows in blocks of 8: the last block is smaller."""
    kwargs = {"divergence": name, "gamma": 1.0, "alpha": 4.0, "negatives": negatives}
    agree(FMICLLoss(**kwargs, block_size=8), FMICLLoss(**kwargs), material(37, dtype), BARS[dtype])


@pytest.mark.parametrize("block_size", [1, 5, 37, 100])
@pytest.mark.parametrize("negatives", IN_BATCH)
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "infonce"])
def test_hard_negatives_and_repeated_texts(name, negatives, block_size):
    """Texts recur within a block, in distant blocks, as positive, as hard negative of the same and of another row."""
    tensors = material(37, torch.float64)
    ids = torch.arange(37)[:, None] * 10 + torch.arange(3)
    ids[3, 0], ids[36, 0], ids[9, 1], ids[30, 2], ids[4, 2] = ids[2, 0], ids[1, 0], ids[20, 0], ids[7, 0], ids[4, 0]
    kwargs = {"negatives": negatives} | {"fmicl": {"divergence": "js", "gamma": 1.0, "alpha": 4.0}}.get(name, {})
    blockwise, plain = OBJECTIVES[name](**kwargs, block_size=block_size), OBJECTIVES[name](**kwargs)
    agree(blockwise, plain, [*tensors, ids], 1e-12)
    agree(blockwise, plain, [*tensors[:2], None, ids[:, :2]], 1e-12)
    agree(blockwise, plain, [*tensors[:2], None, ids[:, :1]], 1e-12)
    masked, unmasked = (plain(*tensors, text_ids) for text_ids in (ids, None))
    assert abs(masked - unmasked) > 1e-6


def test_cosine_and_a_custom_divergence():
    tensors = material(20, torch.float64)[:2]
    mine = FDivergence.from_convex(lambda u: u**1.5, "mine")
    for kwargs in ({"divergence": "pearson", "similarity": "cosine"}, {"divergence": mine, "gamma": 1.0}):
        agree(
            FMICLLoss(**kwargs, alpha=4.0, block_size=7),
            FMICLLoss(**kwargs, alpha=4.0),
            tensors,
            1e-9,
        )


@pytest.mark.parametrize("gamma", [0.5, 20.0, 36.0])
def test_alignment_uniformity_at_both_ends_of_gamma(gamma):
    """Far apart (three antipodal-ish rows) and coinciding: in float32 equal to float64."""
    spread = torch.tensor([[1.0, 0], [-0.5, 0.866], [-0.5, -0.866]])
    for rows in (spread, torch.ones(4, 3)):
        x, y = rows.clone(), rows.clone().roll(1, 0)
        single, double = (AlignUniformLoss(gamma)(x.to(d), y.to(d)) for d in (torch.float32, torch.float64))
        assert single.isfinite() and single.item() == pytest.approx(double.item(), rel=1e-5, abs=1e-5)


def test_chosen_automatically_for_large_batches(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "fmicl_text.losses.pairs.OnePass.apply", lambda *a: calls.append(len(a[3])) or (torch.zeros(()),) * 3
    )
    for rows in (BLOCKWISE_FROM - 1, BLOCKWISE_FROM):
        FMICLLoss("kl", 20.0, 1.0)(*[torch.randn(rows, 4)] * 2)
    assert calls == [BLOCKWISE_FROM]


def test_half_precision_under_autocast():
    x, y, _ = (rows.bfloat16() for rows in material(32, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms, gradient = gradients(FMICLLoss("kl", 1.0, 4.0, block_size=8), x, y)
        exact_terms, exact = gradients(FMICLLoss("kl", 1.0, 4.0), x, y)
    assert terms == pytest.approx(exact_terms, rel=1e-6)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, exact)


def test_scaled_gradients_and_a_second_backward_pass():
    x, y, _ = (rows.requires_grad_() for rows in material(20, torch.float64))
    loss = FMICLLoss("kl", 1.0, 4.0, block_size=8)(x, y)
    (3 * loss).backward(retain_graph=True)
    expected = torch.autograd.grad(FMICLLoss("kl", 1.0, 4.0)(x, y), x)[0] * 3
    torch.testing.assert_close(x.grad, expected)
    with pytest.raises(RuntimeError, match="blockwise"):
        loss.backward()


def test_memory_is_linear():
    """No tensor of a pass over 3,000 rows is larger than the rows themselves, where the whole matrix has 9,000,000."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            tensors = output if isinstance(output, list | tuple) else [output]
            largest = max([largest, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
            return output

    x, y = (torch.randn(3000, 8, requires_grad=True) for _ in range(2))
    with Watch():
        FMICLLoss("kl", 20.0, 1.0, block_size=100)(x, y).backward()
    assert largest <= 3000 * 8


def test_gradient_of_rows_is_autograds():
    rows = (torch.randn(9, 4, dtype=torch.float64) * torch.logspace(-5, 5, 9)[:, None]).requires_grad_()
    upstream = torch.randn(9, 4, dtype=torch.float64)
    expected = torch.autograd.grad(unit_rows(rows), rows, upstream)[0]
    torch.testing.assert_close(gradient_of_rows(rows.detach(), unit_rows(rows).detach(), upstream), expected)


def test_zero_vectors_and_identical_views_stay_finite():
    x = torch.zeros(3, 4, requires_grad=True)
    loss = FMICLLoss("kl", 20.0, 1.0, block_size=2)(x, x)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_ids():
    own, hard = torch.tensor([[1, 2], [3, 4], [5, 1]]), torch.tensor([[7], [3], [8]])
    assert distinct(own, own).tolist() == [[False, True, False], [True, False, True], [False, True, False]]
    assert distinct(own, hard).tolist() == [[True, True, True], [True, False, True], [True, True, True]]
    (ids,) = ids_of_ranks(own, hard, [3])
    assert ids.own_recurs.tolist() == [True, True, True] and ids.hard_recurs.tolist() == [[False], [True], [False]]
    assert [(s.start, s.stop) for s in blocks(7, 3)] == [(0, 3), (3, 6), (6, 7)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FMICLLoss(block_size=0), "block_size .* 1, got 0"),
        (lambda: FMICLLoss(global_batch="all"), "global_batch .* none, gather, ring.* 'all'"),
        (lambda: AlignUniformLoss(gamma=37.0), "gamma .* 36.* 37.0"),
        (lambda: FMICLLoss()(*[torch.ones(3, 3)] * 2, text_ids=torch.zeros(3)), r"text_ids .* N = 3, got \[3\]"),
        (lambda: InfoNCELoss(global_batch="ring"), "global_batch .* none, gather; got 'ring'"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_value_of_very_many_pairs_keeps_its_digits():
    """16 million pairs whose terms are all 1 in float32: their mean is 1, not the 0.98 of a float32 running sum."""
    x = torch.nn.functional.normalize(torch.randn(4000, 256, generator=torch.Generator().manual_seed(0)), dim=1)
    terms = FMICLLoss("kl", 1e-9, 1.0, block_size=256).terms(x, x)
    assert math.isclose(terms.negative.item(), 1.0, rel_tol=1e-7)


@pytest.mark.parametrize("width", [0, 1, 2])
def test_masks_are_made_where_a_text_recurs_and_on_the_diagonal_only(monkeypatch, width):
    """64 rows in blocks of 8: 8 masks on the diagonal of 36 blocks. A text that recurs in blocks 0 and 5 adds one."""
    made = []
    monkeypatch.setattr("fmicl_text.losses.blockwise.distinct", lambda *a: made.append(1) or distinct(*a))
    x, y, _ = material(64, torch.float32)
    ids = torch.arange(64 * 2).view(64, 2)[:, :width]
    FMICLLoss("kl", 20.0, 1.0, block_size=8)(x, y, None, ids if width else None)
    assert len(made) == 8
    if width:
        ids[40, 0] = ids[0, 0]
        FMICLLoss("kl", 20.0, 1.0, block_size=8)(x, y, None, ids)
        assert len(made) == 8 + 9


def test_every_mode_of_the_caller():
    """no_grad, inference mode, the gradient of one view only, views of one tensor."""
    x, y, _ = material(20, torch.float64)
    loss, expected = FMICLLoss("kl", 1.0, 4.0, block_size=8), FMICLLoss("kl", 1.0, 4.0)(x, y)
    with torch.no_grad():
        assert loss(x, y).item() == pytest.approx(expected.item(), rel=1e-12)
    with torch.inference_mode():
        assert loss(x.clone(), y.clone()).item() == pytest.approx(expected.item(), rel=1e-12)
    both = torch.stack([x, y], dim=1).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(*both.unbind(1)), both)
    for k, leaf in enumerate(both.detach().unbind(1)):
        views = [x, y]
        views[k] = leaf.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(*views), views[k])[0], gradient[:, k])


@pytest.mark.parametrize("block_size", [None, 8])
def test_products_are_float32_whatever_the_encoder_uses(block_size):
    """The precision switches, as the conjugate sees them between the products."""
    switches, seen, kl = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul), [], DIVERGENCES["kl"]

    def conjugate(r):
        seen.append([switch.fp32_precision for switch in switches])
        return kl.conjugate(r)

    loss = FMICLLoss(FDivergence("spy", kl.f, kl.score, conjugate), 1.0, 4.0, block_size=block_size)
    seen.clear()
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch, low in zip(switches, ("tf32", "bf16"), strict=True):
            switch.fp32_precision = low
        loss(*material(16, torch.float32)[:2])
        assert seen and all(each == ["ieee", "ieee"] for each in seen)
        assert [switch.fp32_precision for switch in switches] == ["tf32", "bf16"]
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def test_negative_terms_of_other_views(monkeypatch):
    """A new entry of NEGATIVE_TERMS counts for the matrix and for the blocks."""
    monkeypatch.setitem(NEGATIVE_TERMS, "each_view", [("x", "x"), ("y", "y")])
    blockwise, plain, both = (
        FMICLLoss("js", 1.0, 4.0, block_size=7),
        FMICLLoss("js", 1.0, 4.0),
        FMICLLoss("js", 1.0, 4.0),
    )
    blockwise.negatives = plain.negatives = "each_view"
    both.negatives = "both"
    x, y = torch.randn(2, 20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.allclose(blockwise(x, y), plain(x, y), rtol=1e-12) and not torch.allclose(plain(x, y), both(x, y))
    exact = (FMICLLoss("js", 1.0, 4.0).terms(x, y).negative + FMICLLoss("js", 1.0, 4.0).terms(y, x).negative) / 2
    assert torch.allclose(plain.terms(x, y).negative, exact, rtol=1e-12)


# ---- blocks in threads


@pytest.fixture
def three_threads():
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("num_blocks", range(1, 12))
def test_each_pair_of_blocks_is_visited_once(num_blocks):
    half = list(pairs_of_blocks(num_blocks, num_blocks, half=True))
    assert sorted(half) == [(i, j) for i in range(num_blocks) for j in range(i, num_blocks)]
    for num_columns in (1, num_blocks, num_blocks + 3):
        every = list(pairs_of_blocks(num_blocks, num_columns, half=False))
        assert sorted(every) == [(i, j) for i in range(num_blocks) for j in range(num_columns)]
    assert all({*a}.isdisjoint(b) for a, b in zip(half[::2], half[1::2], strict=False) if num_blocks % 4 == 0)


@pytest.mark.slow
@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("negatives", IN_BATCH)
def test_threads_do_not_change_the_loss(negatives):
    tensors = [*material(70, torch.float32), torch.arange(210).view(70, 3) // 2]
    loss = FMICLLoss("js", 1.0, 4.0, negatives=negatives, block_size=8)
    terms, gradient = gradients(loss, *tensors)
    for _ in range(5):
        again, same = gradients(loss, *tensors)
        assert again == terms and torch.equal(same, gradient)
    exact = [rows.double() if rows.is_floating_point() else rows for rows in tensors]
    agree(loss, FMICLLoss("js", 1.0, 4.0, negatives=negatives), exact, 1e-12)
    torch.set_num_threads(1)
    alone_terms, alone = gradients(loss, *tensors)
    torch.set_num_threads(3)
    assert alone_terms == terms and torch.equal(alone, gradient)


def test_pairs_of_a_block_are_computed_in_their_order():
    """Earlier pairs take longer, so that each later one could overtake them."""
    pairs, order = list(pairs_of_blocks(6, 6, half=True)), []

    def slow_first(pair):
        time.sleep(0.02 / (1 + pairs.index(pair)))
        order.append(pair)
        return pair

    assert list(map_in_threads(slow_first, pairs, True, 4)) == pairs
    assert order != pairs
    for block in range(6):
        assert [pair for pair in order if block in pair] == [pair for pair in pairs if block in pair]


@pytest.mark.usefixtures("three_threads")
def test_an_error_in_a_thread_is_raised(monkeypatch):
    def broken(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(blockwise, "pair_block", broken)
    with pytest.raises(torch.OutOfMemoryError):
        FMICLLoss("js", 1.0, 4.0, block_size=8)(*material(64, torch.float32)[:2])
