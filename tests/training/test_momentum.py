"""MoCo and MoCo v3 on a tiny BERT: the momentum encoder, the pairs in the loss, the contents of a checkpoint."""

import math

import pytest
import torch
from torch.nn.functional import normalize as unit
from torch.testing import assert_close

from fmicl_text import InputError, TextContrastiveModel, build_text_encoder
from fmicl_text.losses.contrastive import OBJECTIVES, FMICLLoss
from fmicl_text.losses.divergences import DIVERGENCES
from fmicl_text.training.momentum import MomentumEncoder
from tests.support import make_momentum_trainer as make_trainer
from tests.support import one_fast, weights

pytestmark = pytest.mark.filterwarnings("ignore:divergence .* fails the uniformity condition")
MOCO, MOCOV3 = {"queue_size": 24}, {"predictor": True, "increase_momentum": True}


def objective(name):
    """Settings of an objective, or of a divergence."""
    return {"divergence": name} if name in DIVERGENCES else {"objective": name, "gamma": None, "alpha": None}


ALL = [*DIVERGENCES, *(name for name in OBJECTIVES if name != "fmicl")]


@pytest.mark.parametrize("method", [MOCO, MOCOV3], ids=["moco", "mocov3"])
@pytest.mark.parametrize("name", one_fast(ALL))
def test_every_objective_trains(bert_folder, tmp_path, name, method):
    trainer = make_trainer(bert_folder, tmp_path, method, max_steps=2, learning_rate=1e-4, **objective(name))
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert {
        "head.0.weight",
        "momentum_encoder.model.head.0.weight",
        "encoder.0.model.encoder.layer.0.output.dense.weight",
    } < moved
    assert not method.get("predictor") or {"predictor.0.weight", "predictor.3.weight"} < moved
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(first["loss_positive"] + first["loss_negative"], rel=1e-5)


def queue_by_loops(x, y, queue, divergence, gamma, alpha):
    """-mean f'(u(x_i, y_i)) + alpha mean over i, k of (f* o f')(u(x_i, queue_k)), one pair at a time."""
    x, y, queue = unit(x), unit(y), unit(queue)
    positive = sum(divergence.score(-gamma * (a - b).square().sum()) for a, b in zip(x, y, strict=True)) / len(x)
    pairs = [divergence.conjugate(-gamma * (a - b).square().sum()) for a in x for b in queue]
    return -positive + alpha * sum(pairs) / len(pairs)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_loss_against_a_queue(name):
    torch.manual_seed(0)
    x, y = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    queue = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    exact = queue_by_loops(x, y, queue, DIVERGENCES[name], 0.7, 3.0)
    loss = FMICLLoss(name, 0.7, 3.0, "queue")(x, y, queue=queue)
    assert_close(loss, exact, rtol=1e-12, atol=1e-12)
    gradients, expected = torch.autograd.grad(loss, (x, y)), torch.autograd.grad(exact, (x, y))
    for mine, theirs in zip(gradients, expected, strict=True):
        assert theirs.norm() > 1e-2
        assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_infonce_and_uniformity_against_a_queue():
    torch.manual_seed(0)
    x, y, queue = (torch.randn(n, 4, dtype=torch.float64) for n in (5, 5, 7))
    a, b, k = unit(x), unit(y), unit(queue)
    logits = torch.cat([(a * b).sum(1, keepdim=True), a @ k.T], dim=1) / 0.2
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(5, dtype=torch.long))
    assert_close(OBJECTIVES["infonce"](temperature=0.2, negatives="queue")(x, y, queue=queue), expected)
    spread = torch.exp(-2 * torch.cdist(a, k).square()).mean().log()
    expected = (a - b).square().sum(1).mean() + 0.5 * spread
    assert_close(OBJECTIVES["align_uniform"](gamma=2.0, alpha=0.5, negatives="queue")(x, y, queue=queue), expected)


@pytest.mark.parametrize("shape", [(0, 4), (7, 3), (4,)])
def test_a_queue_that_does_not_fit(shape):
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"queue must be \[K, 4\], K >= 1"):
        FMICLLoss(negatives="queue")(x, x, queue=torch.randn(shape))
    with pytest.raises(ValueError, match=r"queue .*same_view"):
        FMICLLoss()(x, x, queue=torch.randn(7, 4))
    with pytest.raises(ValueError, match="queue"):
        FMICLLoss(negatives="queue")(x, x)
    with pytest.raises(ValueError, match=r"hard_negatives|text_ids"):
        FMICLLoss(negatives="queue")(x, x, text_ids=torch.arange(5)[:, None], queue=torch.randn(7, 4))


def test_the_copy_follows(bert_folder):
    model = TextContrastiveModel(build_text_encoder(bert_folder), "simcse")
    slow = MomentumEncoder(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    before = {name: weight.clone() for name, weight in slow.model.named_parameters()}
    slow.update_momentum(model, 0.9)
    assert len(before) > 20
    for name, weight in slow.model.named_parameters():
        assert not weight.requires_grad
        assert_close(weight, before[name] + 0.1, msg=name)


def test_the_queue_replaces_its_oldest_rows(bert_folder):
    slow = MomentumEncoder(TextContrastiveModel(build_text_encoder(bert_folder)), queue_size=5)
    random = slow.queue.clone()
    assert_close(random.norm(dim=1), torch.ones(5))
    rows = torch.randn(7, 32)
    slow.enqueue(rows[:3])
    assert_close(slow.queue, torch.cat([unit(rows[:3]), random[3:]]))
    slow.enqueue(rows[3:])
    assert_close(slow.queue, unit(rows[[5, 6, 2, 3, 4]]))


def test_momentum_rises_to_one(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path, MOCOV3, max_steps=4)
    seen = []
    follow = MomentumEncoder.update_momentum
    trainer.model.momentum_encoder.update_momentum = lambda model, momentum: (
        seen.append(momentum) or follow(trainer.model.momentum_encoder, model, momentum)
    )
    trainer.train()
    assert seen == pytest.approx([1 - 0.01 * (1 + math.cos(math.pi * t / 4)) / 2 for t in (1, 2, 3)])
    constant = make_trainer(bert_folder, tmp_path, MOCO)
    constant.state.global_step, constant.state.max_steps = 3, 4
    assert constant.momentum_schedule() == 0.99


def test_both_views_are_queries_and_the_copy_keys(no_dropout_folder, tmp_path):
    """The first step's loss and gradient, from the model's outputs by hand."""
    trainer = make_trainer(no_dropout_folder, tmp_path, MOCOV3, columns=("sent0", "sent1"), max_steps=1)
    outputs = {}

    def keep(name):
        def hook(module, args, output):
            outputs[name] = output.detach().clone().requires_grad_()
            if output.requires_grad:
                output.register_hook(lambda gradient: outputs.update(gradient=gradient))

        return hook

    trainer.model.register_forward_hook(keep("q"))
    trainer.model.momentum_encoder.model.register_forward_hook(keep("k"))
    trainer.train()
    q, k = (outputs[name].unflatten(0, (8, 2)) for name in "qk")
    assert not torch.equal(q, k)  # the predictor
    loss = (trainer.loss(q[:, 0], k[:, 1]) + trainer.loss(q[:, 1], k[:, 0])) / 2
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    (expected,) = torch.autograd.grad(loss, outputs["q"])
    assert expected.norm() > 1e-2
    assert_close(outputs["gradient"], expected)


@pytest.mark.parametrize("method", [MOCO, MOCOV3], ids=["moco", "mocov3"])
def test_a_resumed_run_ends_as_the_whole_one(bert_folder, tmp_path, method):
    settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    whole = make_trainer(bert_folder, tmp_path, method, **settings)
    whole.train()
    resumed = make_trainer(bert_folder, tmp_path, method, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert a.keys() == b.keys() and ("momentum_encoder.queue" in a) == ("queue_size" in method)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.filterwarnings("ignore:resuming is not exact")
def test_a_checkpoint_of_another_method_is_refused(bert_folder, tmp_path):
    make_trainer(bert_folder, tmp_path, MOCO, max_steps=1, save_strategy="steps", save_steps=1).train()
    other = make_trainer(bert_folder, tmp_path, MOCOV3)
    with pytest.raises(InputError, match="checkpoint-1 is incompatible"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_accumulation_moves_the_copy_once_a_step(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path, MOCO, gradient_accumulation_steps=2, max_steps=3)
    calls = []
    trainer.model.momentum_encoder.update_momentum = lambda model, momentum: calls.append(momentum)
    trainer.train()
    assert len(calls) == 2  # before the second and the third step
    assert trainer.model.momentum_encoder.next_row == 3 * 2 * 16 % 24


def test_what_is_refused(bert_folder, tmp_path):
    with pytest.raises(InputError, match=r"queue_size .* 16 .* 15"):
        make_trainer(bert_folder, tmp_path, {"queue_size": 15})
    with pytest.raises(InputError, match="mini_batch_size"):
        make_trainer(bert_folder, tmp_path, MOCO, mini_batch_size=4)
