"""Non-finite numbers stop training before they reach the weights, or the step is skipped; collapse gives a warning."""

import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from fmicl_text.errors import Interrupted
from fmicl_text.losses.contrastive import FMICLLoss, InfoNCELoss
from fmicl_text.training.callbacks import CollapseMonitor, describe_views
from fmicl_text.training.trainer import NonFiniteError
from tests.support import Signal, breaking, make_trainer, same, weights


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(bert_folder, tmp_path, value):
    trainer = breaking(
        make_trainer(bert_folder, tmp_path, lr_scheduler_type="constant"), step=3, value=value, gradient=True
    )
    with pytest.raises(
        NonFiniteError, match=r"loss is -?\d.* and gradient norm (nan|inf) at step 3 .*, r from -\d.*learning_rate"
    ):
        trainer.train()
    two_steps = make_trainer(bert_folder, tmp_path, lr_scheduler_type="constant", max_steps=2)
    two_steps.train()
    assert trainer.state.global_step == 2 and same(weights(trainer), weights(two_steps))


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_left_out_are_counted_and_change_no_weight(bert_folder, tmp_path, gradient, accumulation):
    settings = {
        "max_steps": 3,
        "skip_nonfinite": True,
        "gradient_accumulation_steps": accumulation,
        "weight_decay": 0.1,
    }
    trainer = breaking(make_trainer(bert_folder, tmp_path, **settings), step=accumulation + 1, gradient=gradient)
    seen = []
    step = AcceleratedOptimizer.step

    def remember(optimizer, *args):
        before = weights(trainer)
        step(optimizer, *args)
        seen.append(same(before, weights(trainer)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratedOptimizer, "step", remember)
        trainer.train()
    assert seen == [False, True, False]
    counts = [entry.get("nonfinite_steps") for entry in trainer.state.log_history if "loss" in entry]
    assert counts == [None, 1, 1]
    assert all(weight.isfinite().all() for weight in weights(trainer).values())


def test_batch_statistics_that_broke_are_not_trained_on_with(bert_folder, tmp_path):
    """Skipping a step does not undo the changes of the forward pass to buffers."""
    trainer = make_trainer(bert_folder, tmp_path, skip_nonfinite=True)
    trainer.model.register_buffer("running_mean", torch.tensor([math.nan]), persistent=False)
    breaking(trainer, step=1)
    with pytest.raises(NonFiniteError, match="running_mean is not finite"):
        trainer.train()


def test_an_overflow_of_fp16_is_left_to_the_scaler_and_logged(bert_folder, tmp_path):
    """fp16 needs a GPU, so its scaler is simulated: it skips step 2, whose gradient is inf."""
    trainer = breaking(make_trainer(bert_folder, tmp_path, max_steps=3), step=2, value=math.inf, gradient=True)
    trainer.accelerator.scaler = SimpleNamespace(scale=lambda loss: loss)
    skipped = property(lambda self: trainer.state.global_step == 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratedOptimizer, "step_was_skipped", skipped)
        patch.setattr(AcceleratedOptimizer, "step", lambda *args: None)
        patch.setattr(trainer, "_save_scaler", lambda folder: None)
        trainer.train()
    assert [e.get("overflow_steps") for e in trainer.state.log_history if "loss" in e] == [None, 1, 1]


def test_a_loss_that_is_not_finite_stops_fp16_too_in_whichever_micro_step(bert_folder, tmp_path):
    trainer = breaking(make_trainer(bert_folder, tmp_path, max_steps=2, gradient_accumulation_steps=2), step=1)
    trainer.accelerator.scaler = SimpleNamespace(scale=lambda loss: loss)
    with pytest.raises(NonFiniteError, match="at step 1"):
        trainer.train()


@pytest.mark.slow
def test_a_run_that_was_cut_short_counts_on_and_knows_its_highest_rank(bert_folder, tmp_path):
    settings = {"skip_nonfinite": True, "max_steps": 8}
    cut = breaking(make_trainer(bert_folder, tmp_path, **settings), step=2)
    cut.add_callback(Signal(4))
    with pytest.raises(Interrupted):
        cut.train()
    resumed = make_trainer(bert_folder, tmp_path, **settings)
    resumed.train(resume_from_checkpoint="auto")
    counts = [entry.get("nonfinite_steps") for entry in resumed.state.log_history if "loss" in entry]
    assert counts == [None, *[1] * 7]
    watch = CollapseMonitor()
    for step, rank in enumerate((50.0, 49.0, 25.0)):
        watch.look(64, step, rank, 0.1)
    state = json.loads(json.dumps(watch.state()))
    later = CollapseMonitor(**state["args"])
    vars(later).update(state["attributes"])
    assert "highest so far 50.0, before training 50.0" in later.check(24.0, 0.1, 3, 64)


def test_the_range_of_the_similarity_is_told():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert describe_views(FMICLLoss(gamma=5.0), x, x) == "r from -20 to 0"
    assert describe_views(InfoNCELoss(temperature=0.5), x, x) == "r from -4 to 0"
    assert describe_views(FMICLLoss(similarity="cosine"), x, 3 * x) == "cosine from -1 to 1"
    assert describe_views(FMICLLoss(), x, x * torch.tensor([[1.0], [math.inf]])) == "1 of 4 embeddings not finite"


def told(ranks, cosines=None, batch=64):
    """The steps at which a log of these values gives a warning."""
    watch, args, steps = CollapseMonitor(), SimpleNamespace(train_batch_size=batch), []
    cosines = cosines or [0.1] * len(ranks)
    for step, (rank, cosine) in enumerate(zip(ranks, cosines, strict=True)):
        logs = {"effective_rank": rank, "mean_cosine": cosine}
        with warnings.catch_warnings(record=True, action="always") as caught:
            watch.on_log(args, SimpleNamespace(global_step=step), None, logs=logs)
        steps += [step] * len(caught)
    return steps


def test_a_collapse_is_told_of_once_when_it_begins():
    assert told([31.7, 24.5, 15.8, 8.9, 7.1, 6.4, 6.3, 5.6]) == [3]  # rkl on digits
    assert told([3.6, 1.4, 1.3, 1.3]) == [1]  # neyman on digits
    assert told([30.0, 8.0, 20.0, 9.0, 30.0, 5.0]) == [1, 3, 5]
    assert told([9.0] * 3, [0.2, 0.995, 0.999]) == [1]
    assert told([30.0, 1.2, 1.3, 1.2, 1.25, 1.1]) == [1]  # a small gain is no recovery
    assert told([9.0] * 5, [0.2, 0.995, 0.993, 0.995, 0.996]) == [1]


def test_another_training_is_compared_with_its_own_start(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path, per_device_train_batch_size=32, max_steps=2, learning_rate=1e-2)
    trainer.train()
    watch = next(one for one in trainer.callback_handler.callbacks if isinstance(one, CollapseMonitor))
    first = watch.start
    trainer.train()
    assert watch.start != first and watch.looked_at == 2


def test_what_is_no_collapse():
    assert told([1.3, 1.9, 4.0, 20.0, 35.0], [0.995, 0.993, 0.9, 0.3, 0.1]) == []  # many encoders before training
    assert told([30.0, 28.0, 20.0, 14.0]) == []  # of 64 rows, not high at the start
    assert told([40.0, 45.0, 30.0, 21.0]) == []
    assert told([1.4, *[1.3] * 10], [0.995] * 11) == []  # of which the first steps change little
    assert told([1.3] * 17, [0.995] * 17) == [16]
    assert told([31.7, 1.0], batch=8) == []
    CollapseMonitor().on_log(SimpleNamespace(train_batch_size=64), None, None, logs={"eval_sts_spearman": 80.0})


def test_the_words_name_what_helps():
    watch = CollapseMonitor()
    watch.check(30.0, 0.1, 25)
    words = watch.check(5.0, 0.4, 50)
    assert words.startswith(
        "step 50: embeddings are collapsing, effective rank 5.0 (highest so far 30.0), mean cosine 0.400"
    )
    assert all(word in words for word in ("kl, js, pearson, vlc", "learning_rate", "alpha"))


def test_a_good_encoder_that_loses_half_of_its_rank_is_told_of():
    """all-MiniLM-L6-v2 with the paper's alpha of 409600: 45 of 64 before training, 20 at step 25."""
    assert told([45.0, 40.0, 31.0, 20.0]) == [3]


def test_the_first_steps_are_looked_at_whatever_is_logged(bert_folder, tmp_path):
    """Steps 1, 2, 4, 8; the last log is at step 9. The embeddings of step 1 are those before training."""
    trainer = make_trainer(
        bert_folder, tmp_path, max_steps=9, logging_steps=9, per_device_train_batch_size=32, learning_rate=0.0,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    looks, look = [], CollapseMonitor.look
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CollapseMonitor, "look", lambda self, *seen: looks.append(seen) or look(self, *seen))
        trainer.train()
    assert [step for _, step, _, _ in looks] == [1, 2, 4, 8, 9] and {rows for rows, *_ in looks} == {32}
    (monitor,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, CollapseMonitor))
    assert monitor.start == looks[0][2:] and 1 < monitor.start[0] < 32 and monitor.looked_at == 9


def test_a_collapse_in_the_first_steps_is_told_of_before_the_first_log(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path, max_steps=4, logging_steps=9, per_device_train_batch_size=32)
    forward, calls = trainer.model.forward, []

    def collapsing(features):
        calls.append(1)
        out = forward(features)
        return out if len(calls) < 4 else out * 1e-3 + 1.0

    trainer.model.forward = collapsing
    with pytest.warns(UserWarning, match="step 4: embeddings are collapsing, effective rank 1.0 .*before training"):
        trainer.train()


def test_small_batches_and_moderate_cosines_are_no_collapse():
    assert told([31.7, 1.0], batch=31) == [] and told([31.7, 1.0], batch=32) == [1]
    assert told([9.0] * 3, [0.2, 0.95, 0.96]) == []
