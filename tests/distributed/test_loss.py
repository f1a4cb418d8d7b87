"""The loss on several gloo processes with different rows equals one process's on the joined rows."""

import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist

from fmicl_text import FMICLLoss, InfoNCELoss
from fmicl_text.losses.balance import Distances, one_entry
from fmicl_text.losses.contrastive import IN_BATCH, OBJECTIVES, AlignUniformLoss
from fmicl_text.losses.divergences import DIVERGENCES
from fmicl_text.losses.similarity import unit_rows
from tests.support import one_fast, relative_error, run_ranks, words_missing

pytestmark = pytest.mark.filterwarnings("ignore:.*uniformity")
BARS = {torch.float32: 1e-6, torch.float64: 1e-12}
SPLITS = {"two uneven": [7, 4], "two even": [6, 6], "three": [4, 4, 4], "three uneven": [5, 4, 2], "one row": [8, 1]}


def material(rows, dtype, with_hard=False, repeat=False):
    """x, y, hard [rows, 6] and text ids; with `repeat`, texts that occur in both the first and the last rows."""
    generator = torch.Generator().manual_seed(rows)
    x, noise, hard = (torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    ids = torch.arange(rows)[:, None] * 10 + torch.arange(3)
    if repeat:
        ids[-1, 0], ids[-2, 1], ids[-1, 2], ids[1, 2] = ids[0, 0], ids[1, 1], ids[0, 0], ids[1, 0]
    return x, x + 0.5 * noise, hard if with_hard else None, ids if with_hard else ids[:, :2]


def gradients(loss, x, y, hard, ids):
    """Terms, and the gradients in the rows joined [V N, D]."""
    leaves = [rows.clone().requires_grad_() for rows in (x, y, hard) if rows is not None]
    terms = loss.terms(*leaves[:2], leaves[2] if hard is not None else None, ids)
    return torch.stack([term.detach() for term in terms]), torch.stack(torch.autograd.grad(terms.loss, leaves), dim=1)


def own_rows(rank, split, tensors):
    start = sum(split[:rank])
    return [None if tensor is None else tensor[start : start + split[rank]] for tensor in tensors]


def on_one_rank(rank, losses, split, tensors):
    return [gradients(loss, *own_rows(rank, split, tensors)) for loss in losses]


def on_all_ranks(split, losses, tensors):
    """Terms of every rank, and the gradients as DDP would average them, for each loss."""
    answers = run_ranks(len(split), on_one_rank, losses, split, tensors)
    for each in zip(*answers, strict=True):
        yield [terms for terms, _ in each], torch.cat([gradient for _, gradient in each]) / len(split)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("dtype", one_fast([torch.float64, torch.float32]), ids=str)
@pytest.mark.parametrize("split", one_fast(SPLITS.values()), ids=SPLITS)
def test_every_divergence_equals_one_process(split, dtype, strategy):
    tensors = material(sum(split), dtype)
    if strategy == "gather":  # no text is known to be equal to another
        tensors = (*tensors[:3], None)
    cases = [(name, negatives) for name in DIVERGENCES for negatives in IN_BATCH]
    spread = [FMICLLoss(name, 1.0, 4.0, negatives, global_batch=strategy) for name, negatives in cases]
    for case, (terms, gradient) in zip(cases, on_all_ranks(split, spread, tensors), strict=True):
        exact = gradients(FMICLLoss(case[0], 1.0, 4.0, case[1]), *tensors)
        assert relative_error(gradient, exact[1]) < BARS[dtype], case
        for each in terms:
            torch.testing.assert_close(each, exact[0], rtol=10 * BARS[dtype], atol=10 * BARS[dtype], msg=str(case))


@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "infonce"])
def test_hard_negatives_repeated_texts_and_blocks(name, block_size, strategy):
    split = [5, 4, 3]
    tensors = material(12, torch.float64, with_hard=True, repeat=True)
    kwargs = {"fmicl": {"divergence": "js", "gamma": 1.0, "alpha": 4.0}}.get(name, {})
    exact = gradients(OBJECTIVES[name](**kwargs), *tensors)
    unmasked = gradients(OBJECTIVES[name](**kwargs), *tensors[:3], None)
    assert relative_error(unmasked[1], exact[1]) > 1e-3
    spread = OBJECTIVES[name](**kwargs, block_size=block_size, global_batch=strategy)
    ((terms, gradient),) = on_all_ranks(split, [spread], tensors)
    assert relative_error(gradient, exact[1]) < 1e-12
    assert all(torch.allclose(each, exact[0], rtol=1e-11) for each in terms)


@pytest.mark.parametrize("negatives", IN_BATCH)
@pytest.mark.parametrize("split", one_fast(SPLITS.values()), ids=SPLITS)
def test_infonce_equals_one_process(split, negatives):
    tensors = material(sum(split), torch.float64, with_hard=True, repeat=True)
    exact = gradients(InfoNCELoss(0.5, negatives), *tensors)
    ((terms, gradient),) = on_all_ranks(split, [InfoNCELoss(0.5, negatives, global_batch="gather")], tensors)
    assert relative_error(gradient, exact[1]) < 1e-12
    assert all(torch.allclose(each, exact[0], rtol=1e-11) for each in terms)


# ---- incorrect variants, which must be detected


def wrong_variants(rank, split, tensors):
    """Gradients of this rank's rows with three errors: no factor W, other rows as constants, own negatives only."""
    x, y, _, ids = own_rows(rank, split, tensors)
    right = gradients(FMICLLoss("kl", 1.0, 4.0, global_batch="gather"), x, y, None, ids)[1]
    per_rank = gradients(FMICLLoss("kl", 1.0, 4.0), x, y, None, ids)[1]
    everyone = [torch.empty_like(x) for _ in split]
    dist.all_gather(everyone, x)
    leaf_x, leaf_y = x.clone().requires_grad_(), y.clone().requires_grad_()
    columns = torch.cat([leaf_x if k == rank else rows for k, rows in enumerate(everyone)])
    r = -(unit_rows(leaf_x)[:, None] - unit_rows(columns)[None]).square().sum(-1)
    keep = torch.arange(len(columns)) != torch.arange(len(x))[:, None] + rank * len(x)
    positive = -(unit_rows(leaf_x) - unit_rows(leaf_y)).square().sum(-1)
    loss = -positive.mean() + 4.0 * torch.where(keep, r.expm1(), 0).sum() / keep.sum()
    rows_only = torch.stack(torch.autograd.grad(loss, (leaf_x, leaf_y)), dim=1)
    return right / len(split), rows_only, per_rank


def test_the_wrong_variants_fail_the_same_test():
    split = [6, 6]
    tensors = material(12, torch.float64)
    exact = gradients(FMICLLoss("kl", 1.0, 4.0), *tensors)[1]
    answers = run_ranks(2, wrong_variants, split, tensors)
    for variant in zip(*answers, strict=True):
        assert relative_error(torch.cat(variant) / 2, exact) > 0.1


# ---- communication


def count_collectives(rank, loss, split, tensors):
    x, y, hard, ids = own_rows(rank, split, tensors)
    x, y = x.requires_grad_(), y.requires_grad_()
    counts = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        value = loss(x, y, hard, ids)
    counts.append(sum(event.count for event in profile.key_averages() if event.key.startswith(("gloo:", "c10d::"))))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        value.backward()
    counts.append(sum(event.count for event in profile.key_averages() if event.key.startswith(("gloo:", "c10d::"))))
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_no_collective_in_the_backward_pass(strategy):
    tensors = material(12, torch.float32)
    for forward, backward in run_ranks(2, count_collectives, FMICLLoss("kl", global_batch=strategy), [6, 6], tensors):
        assert forward > 0 and backward == 0
    for forward, backward in run_ranks(2, count_collectives, InfoNCELoss(global_batch="gather"), [6, 6], tensors):
        assert forward > 0 and backward > 0  # the counter does see collectives


@pytest.mark.parametrize("block_size", [None, 2])
def test_equal_texts_everywhere_leave_the_positive_term(block_size):
    split, tensors = [3, 2], material(5, torch.float64)
    tensors = (*tensors[:3], torch.zeros(5, 1, dtype=torch.long))
    for loss in (FMICLLoss("kl", 1.0, 4.0, block_size=block_size), AlignUniformLoss(block_size=block_size)):
        with pytest.warns(UserWarning, match="no negative pair in a batch of 5"):
            exact = gradients(loss, *tensors)
        assert exact[0][2] == 0 and exact[1].norm() > 0
        loss.global_batch = "gather"
        answers = run_ranks(2, without_warnings, on_one_rank, [loss], split, tensors)
        torch.testing.assert_close(torch.cat([gradient for ((_, gradient),) in answers]) / 2, exact[1])
        for ((terms, _),) in answers:
            torch.testing.assert_close(terms, exact[0])


# ---- alpha, and the mutual information


def read_out(rank, losses, split, tensors, queue=None):
    """Balance, mutual information, and alpha and terms of a loss whose alpha is "auto"."""
    x, y, hard, ids = own_rows(rank, split, tensors)
    found = []
    for loss in losses:
        batch = (x, y, None, None, queue) if loss.negatives == "queue" else (x, y, hard, ids)
        balance, information = loss.balance(*batch), loss.mutual_information(*batch)
        loss.alpha = "auto"
        found.append((balance, information, torch.stack(loss.terms(*batch)), loss.alpha))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("split", [[7, 5], [5, 4, 3]], ids=str)
def test_alpha_and_mutual_information_equal_those_of_one_process(split, block_size, strategy):
    tensors = material(12, torch.float64, with_hard=True, repeat=True)
    queue = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names, kinds = ("kl", "js", "pearson", "sh", "tsallis", "vlc"), (*IN_BATCH, "queue")
    makers = [partial(FMICLLoss, name, 1.0, 4.0, kind, block_size=block_size) for name in names for kind in kinds]
    answers = run_ranks(len(split), read_out, [make(global_batch=strategy) for make in makers], split, tensors, queue)
    exact = read_out(0, [make() for make in makers], [12], tensors, queue)
    for each in answers:
        for (balance, information, terms, alpha), expected in zip(each, exact, strict=True):
            assert balance.positive == pytest.approx(expected[0].positive, rel=1e-12)
            assert balance.negative == pytest.approx(expected[0].negative, rel=1e-12)
            torch.testing.assert_close(information, expected[1], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(terms, expected[2], rtol=1e-11, atol=1e-12)
            assert alpha == balance.alpha == pytest.approx(expected[3], rel=1e-12)
    assert all(of_rank[3] == first[3] for each in answers for of_rank, first in zip(each, answers[0], strict=True))


def test_alpha_of_processes_that_keep_their_negatives_apart():
    """With global_batch none, the mean of the processes' batches; a process without negative pairs does not count."""
    x, y, _, ids = material(12, torch.float64)
    ids[8:] = ids[8]
    loss = FMICLLoss("vlc", 1.0, 4.0)
    parts = [loss.balance(x[:4], y[:4]), loss.balance(x[4:8], y[4:8])]
    expected = parts[0] + parts[1]
    for ((balance, _, _, alpha),) in run_ranks(3, without_warnings, read_out, [loss], [4, 4, 4], (x, y, None, ids)):
        assert balance.positive == pytest.approx((sum(expected.positive) / 2,), rel=1e-12)
        assert alpha == pytest.approx(one_entry(expected).alpha, rel=1e-12)


def measured_gamma(rank, losses, split, tensors):
    x, y, *_ = own_rows(rank, split, tensors)
    return [(loss(x, y), loss.gamma)[1] for loss in losses]


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_gamma_equals_that_of_one_process(strategy):
    split, tensors = [6, 4, 2], material(12, torch.float64)
    (expected,) = measured_gamma(0, [FMICLLoss("js")], [12], tensors)
    assert 5 <= expected < 20
    found = run_ranks(3, measured_gamma, [FMICLLoss("js", global_batch=strategy)], split, tensors)
    assert all(gamma == found[0][0] == pytest.approx(expected, rel=1e-12) for (gamma,) in found)


def test_gamma_of_processes_that_keep_their_negatives_apart():
    x, y, *_ = material(12, torch.float64)
    loss = FMICLLoss("js", 1.0, 1.0)
    separation = sum((loss.distances(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)), Distances()).separation
    for (gamma,) in run_ranks(3, measured_gamma, [FMICLLoss("js")], [4, 4, 4], (x, y, None, None)):
        assert gamma == pytest.approx(min(max(1.25 * separation, 5), 20), rel=1e-12)


def information_of_infonce(rank, split, tensors):
    return InfoNCELoss(0.3, global_batch="gather").mutual_information(*own_rows(rank, split, tensors))


def test_mutual_information_of_infonce_equals_one_process():
    split, tensors = [5, 4, 3], material(12, torch.float64, with_hard=True, repeat=True)
    expected = InfoNCELoss(0.3).mutual_information(*tensors)
    for found in run_ranks(3, information_of_infonce, split, tensors):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def without_warnings(rank, function, *arguments):
    with warnings.catch_warnings(action="ignore"):
        return function(rank, *arguments)


@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("block_size", [None, 2])
def test_several_hard_negatives(block_size, strategy):
    split, (x, y, _, ids) = [5, 4, 3], material(12, torch.float64, with_hard=True, repeat=True)
    hard = torch.randn(12, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = torch.cat([ids, 1000 + torch.arange(24).view(12, 2)], dim=1)
    ids[0, 3], ids[11, 4] = ids[10, 0], ids[2, 1]
    for loss in (FMICLLoss("js", 1.0, 4.0, "both", block_size=block_size), InfoNCELoss(0.3)):
        leaves = [rows.clone().requires_grad_() for rows in (x, y, hard)]
        exact = loss.terms(*leaves, ids)
        loss.global_batch = strategy if isinstance(loss, FMICLLoss) else "gather"
        parts = torch.autograd.grad(exact.loss, leaves)
        answers = run_ranks(3, with_hard_on_one_rank, loss, split, (x, y, hard, ids))
        for terms, _ in answers:
            torch.testing.assert_close(terms, torch.stack(exact).detach())
        for k, part in enumerate(parts):
            torch.testing.assert_close(torch.cat([gradient[k] for _, gradient in answers]) / 3, part)


def with_hard_on_one_rank(rank, loss, split, tensors):
    x, y, hard, ids = own_rows(rank, split, tensors)
    leaves = [rows.clone().requires_grad_() for rows in (x, y, hard)]
    terms = loss.terms(*leaves, ids)
    return torch.stack([term.detach() for term in terms]), torch.autograd.grad(terms.loss, leaves)


def one_rank_without_negatives(rank):
    """InfoNCE if the only row of rank 0 shares a text with every other row; f-MICL likewise."""
    ids = torch.tensor([[[1, 2]], [[1, 3], [2, 4]]][rank])
    x = torch.randn(len(ids), 4, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    losses = InfoNCELoss(global_batch="gather"), FMICLLoss(global_batch="gather")
    return [loss(x, x.detach(), None, ids).item() for loss in losses]


def test_a_rank_without_negatives_does_not_stop_the_others():
    first, second = run_ranks(2, one_rank_without_negatives)
    assert first == second and all(torch.tensor(first).isfinite())


def without_rows(rank, strategy):
    try:
        FMICLLoss(global_batch=strategy)(*[torch.ones(3 * rank, 4)] * 2)
    except ValueError as error:
        return f"{error}"


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_a_rank_without_rows_is_named_by_all(strategy):
    for message in run_ranks(2, without_rows, strategy):
        assert not words_missing(message, ("process", "[0, 3]")), message


@pytest.mark.parametrize("split", [[6, 6], [5, 4, 2]], ids=str)
def test_against_a_queue(split):
    """Every objective, the queue the same in all processes; uniformity's logarithm is of all processes' mean."""
    x, y, _, _ = material(sum(split), torch.float64)
    queue = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    makers = [partial(FMICLLoss, name, 1.0, 4.0, "queue") for name in DIVERGENCES]
    makers += [partial(loss_class, negatives="queue") for name, loss_class in OBJECTIVES.items() if name != "fmicl"]
    spread = [make(global_batch="gather") for make in makers]
    answers = run_ranks(len(split), queue_on_one_rank, spread, split, (x, y), queue)
    for make, each in zip(makers, zip(*answers, strict=True), strict=True):
        terms, gradient = queue_gradients(make(), x, y, queue)
        assert relative_error(torch.cat([of_rank for _, of_rank in each]) / len(split), gradient) < 1e-12, make
        for of_rank, _ in each:
            torch.testing.assert_close(of_rank, terms, rtol=1e-11, atol=1e-11)


def queue_gradients(loss, x, y, queue):
    leaves = [rows.clone().requires_grad_() for rows in (x, y)]
    terms = loss.terms(*leaves, queue=queue)
    return torch.stack([term.detach() for term in terms]), torch.stack(torch.autograd.grad(terms.loss, leaves), dim=1)


def queue_on_one_rank(rank, losses, split, tensors, queue):
    return [queue_gradients(loss, *own_rows(rank, split, tensors), queue) for loss in losses]


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_all_rows_of_one_process_are_one_text(strategy):
    x, y, hard, ids = material(8, torch.float64)
    ids[:4] = ids[0]
    spread = [FMICLLoss("kl", 1.0, 4.0, negatives, global_batch=strategy) for negatives in IN_BATCH]
    for loss, (terms, gradient) in zip(spread, on_all_ranks([4, 4], spread, (x, y, hard, ids)), strict=True):
        exact = gradients(FMICLLoss("kl", 1.0, 4.0, loss.negatives), x, y, hard, ids)
        assert relative_error(gradient, exact[1]) < 1e-12
        for each in terms:
            torch.testing.assert_close(each, exact[0], rtol=1e-11, atol=1e-11)
