"""The trainer on several gloo processes: gradients, dropout and communication, compared with one process."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import TrainerCallback, ViTConfig

from fmicl_text import build_text_encoder
from fmicl_text.cli.vision import VisionTrainingArguments
from fmicl_text.losses.divergences import DIVERGENCES
from fmicl_text.text.collator import TokenCollator
from fmicl_text.text.tokenization import tokenize_dataset
from fmicl_text.vision.data import Images, TrainingRows, collate_images
from fmicl_text.vision.encoder import new_image_encoder
from fmicl_text.vision.model import ImageContrastiveModel
from tests.support import (
    PAIR_COLUMNS,
    TINY_VIT,
    Gradients,
    make_momentum_trainer,
    make_trainer,
    one_fast,
    padded_pairs,
    relative_error,
    run_trainer,
    run_trainers,
    sentences,
    weights,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*uniformity"),
    pytest.mark.filterwarnings("ignore:.*views of every text are identical"),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", one_fast([torch.float64, torch.float32]), ids=str)
def test_two_processes_of_8_are_one_of_16(no_dropout_folder, tmp_path, dtype):
    """Five steps of SGD without dropout: gradients, logged losses and the final weights."""
    settings = {"max_steps": 5, "dtype": dtype, "rows": 80}
    one = run_trainer(no_dropout_folder, tmp_path, per_device_train_batch_size=16, **settings)
    for strategy in ("gather", "ring"):
        for two in run_trainers(2, no_dropout_folder, tmp_path, global_batch=strategy, **settings):
            bar = 1e-6 if dtype == torch.float32 else 1e-12
            assert all(relative_error(a, b) < 30 * bar for a, b in zip(two[0], one[0], strict=True))
            assert relative_error(two[0][0], one[0][0]) < bar
            assert max((two[1][n] - one[1][n]).abs().max() for n in one[1]) < 1e-6
            assert two[2] == pytest.approx(one[2], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", one_fast(DIVERGENCES))
def test_cached_on_two_processes_equals_one_plain_one(no_dropout_folder, tmp_path, name):
    settings = {"divergence": name, "dtype": torch.float64}
    (exact,), _, loss = run_trainer(no_dropout_folder, tmp_path, per_device_train_batch_size=16, **settings)
    for (gradient,), _, each in run_trainers(2, no_dropout_folder, tmp_path, mini_batch_size=3, **settings):
        assert relative_error(gradient, exact) < 1e-12
        assert each == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_infonce_on_two_processes(no_dropout_folder, tmp_path):
    settings = {"objective": "infonce", "gamma": None, "alpha": None, "dtype": torch.float64}
    (exact,), _, _ = run_trainer(no_dropout_folder, tmp_path, per_device_train_batch_size=16, **settings)
    for (gradient,), _, _ in run_trainers(2, no_dropout_folder, tmp_path, mini_batch_size=3, **settings):
        assert relative_error(gradient, exact) < 1e-12


@pytest.mark.slow
def test_negatives_of_each_its_own_is_another_gradient(no_dropout_folder, tmp_path):
    (exact,), _, _ = run_trainer(no_dropout_folder, tmp_path, per_device_train_batch_size=16)
    for (gradient,), _, _ in run_trainers(2, no_dropout_folder, tmp_path, global_batch="none"):
        assert relative_error(gradient, exact) > 0.05


def first_embeddings(folder, output_dir):
    """Embeddings of the first step; every rank is given the same sentences."""
    trainer = make_trainer(folder, output_dir, dataset=Dataset.from_dict({"text": sentences(8) * 2}), max_steps=1,
                           train_sampling_strategy="sequential")  # fmt: skip
    seen = []
    trainer.model.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    trainer.train()
    return seen[0]


@pytest.mark.slow
def test_dropout_masks_differ_between_processes(bert_folder, tmp_path):
    first, second = run_trainers(2, bert_folder, tmp_path, function=first_embeddings)
    assert first.shape == second.shape
    assert not torch.isclose(first, second).all(1).any()


def gradient_exchanges(folder, output_dir, **settings):
    """How many times one step with three buckets' worth of parameters is all-reduced outside the loss."""
    calls, all_reduce = [], dist.all_reduce
    trainer = make_trainer(folder, output_dir, columns=PAIR_COLUMNS, dataset=padded_pairs(32), max_steps=1, **settings)

    def hook(state, bucket):
        calls.append(bucket.index())
        work = all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    class Register(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            trainer.model_wrapped.register_comm_hook(None, hook)

    trainer.add_callback(Register())
    trainer.train()
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", one_fast([2, 1]))
def test_one_exchange_of_gradients_per_step(no_dropout_folder, tmp_path, accumulation):
    settings = {"mini_batch_size": 2, "gradient_accumulation_steps": accumulation}
    for calls in run_trainers(2, no_dropout_folder, tmp_path, function=gradient_exchanges, **settings):
        assert calls and len(calls) == len(set(calls))


@pytest.mark.slow
def test_streamed_text_is_the_same_batch(no_dropout_folder, tmp_path):
    """Batches of different padding on the two processes included."""
    settings = {"max_steps": 4, "rows": 64, "dtype": torch.float64}
    one = run_trainer(no_dropout_folder, tmp_path, per_device_train_batch_size=16, **settings)
    for two in run_trainers(2, no_dropout_folder, tmp_path, streaming=True, **settings):
        assert all(relative_error(a, b) < 1e-11 for a, b in zip(two[0], one[0], strict=True))


def scored(folder, output_dir):
    trainer = make_trainer(folder, output_dir, evaluate=True)
    trainer.evaluator = lambda encoder: {"sts_spearman": float(os.environ["RANK"])}
    return trainer.run_evaluator()


@pytest.mark.slow
def test_the_score_of_the_first_process_counts(bert_folder, tmp_path):
    assert run_trainers(2, bert_folder, tmp_path, function=scored) == [{"eval_sts_spearman": 0.0}] * 2


def length_grouped(folder, output_dir, checkpoint=None):
    encoder = build_text_encoder(folder)
    rows = tokenize_dataset(Dataset.from_dict({"text": sentences(64)}), encoder.tokenizer, ["text"], 32)
    trainer = make_trainer(
        folder, output_dir, dataset=rows, max_steps=10, save_strategy="steps", save_steps=6,
        train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer.data_collator = TokenCollator(encoder.tokenizer)
    trainer.train(resume_from_checkpoint=checkpoint)
    return weights(trainer)


@pytest.mark.slow
def test_length_grouping_resumes_exactly_in_its_second_epoch(bert_folder, tmp_path):
    """4 steps an epoch; the checkpoint is in the middle of the second."""
    whole = run_trainers(2, bert_folder, tmp_path / "whole", function=length_grouped)
    checkpoint = str(tmp_path / "whole" / "checkpoint-6")
    resumed = run_trainers(2, bert_folder, tmp_path / "resumed", checkpoint, function=length_grouped)
    for a, b in zip(whole, resumed, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def momentum_run(folder, output_dir, method, dtype=torch.float64, **settings):
    """As `run_trainer`, with MoCo's trainer; including the weights of the momentum encoder and the queue. The predictor
    is linear, because batch statistics differ between processes."""
    trainer = make_momentum_trainer(
        folder, output_dir, method, rows=80, columns=PAIR_COLUMNS, max_grad_norm=0.0, max_steps=5,
        train_sampling_strategy="sequential", learning_rate=0.1, **settings,
    )  # fmt: skip
    if method.get("predictor"):
        torch.manual_seed(1)
        trainer.model.predictor = torch.nn.Linear(32, 32)
    trainer.model.to(dtype)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.steps, {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs", [{"divergence": "js"}, {"objective": "infonce"}, {"objective": "align_uniform"}], ids=str
)
@pytest.mark.parametrize(
    "method", [{"queue_size": 40}, {"predictor": True, "increase_momentum": True}], ids=["moco", "mocov3"]
)
def test_moco_on_two_processes(no_dropout_folder, tmp_path, method, kwargs):
    """Five steps: gradients and all stored tensors, including the queue in its order."""
    if "objective" in kwargs:
        kwargs = kwargs | {"gamma": None, "alpha": None}
    one = momentum_run(no_dropout_folder, tmp_path, method, per_device_train_batch_size=16, **kwargs)
    for two in run_trainers(2, no_dropout_folder, tmp_path, method, function=momentum_run, **kwargs):
        assert all(relative_error(a, b) < 1e-10 for a, b in zip(two[0], one[0], strict=True))
        assert all(torch.allclose(two[1][name], one[1][name], atol=1e-9) for name in one[1])


def vision_run(output_dir, method, **settings):
    """Weights after three steps of a ViT without batch statistics, on deterministic views."""
    args = VisionTrainingArguments(
        str(output_dir), max_steps=3, eval_strategy="no", lr_scheduler_type="constant", max_grad_norm=0.0,
        weight_decay=0, train_sampling_strategy="sequential", disable_tqdm=True, use_cpu=True, method=method,
        queue_size=64 if method == "moco" else None, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ImageContrastiveModel(new_image_encoder(ViTConfig(**TINY_VIT)), 32, head_dim=8)
    model.head = torch.nn.Linear(model.head[0].in_features, 8)
    pixels = torch.randint(0, 256, (48, 3, 32, 32), dtype=torch.uint8)
    images = Images(torch.arange(48) % 3, ("a", "b", "c"), 3, "noise", np.arange(48, dtype=np.uint64), pixels=pixels)
    rows = TrainingRows(images, 32, None, seed=0)

    def views(images, generator):
        return torch.stack([images.float() / 255, images.flip(-1).float().square() / 65025], dim=1)

    trainer = args.build_trainer(model, train_dataset=rows, data_collator=collate_images, views=views)
    if method == "mocov3":
        trainer.model.predictor = torch.nn.Linear(8, 8)
    trainer.model.double()
    trainer.model.register_forward_pre_hook(lambda module, args: ({"pixel_values": args[0]["pixel_values"].double()},))
    if method != "simclr":
        copy = trainer.model.momentum_encoder.model
        copy.register_forward_pre_hook(lambda module, args: ({"pixel_values": args[0]["pixel_values"].double()},))
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*f-MICL.*queue")
@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "moco", "mocov3"])
def test_images_on_two_processes(tmp_path, method):
    one = vision_run(tmp_path, method, per_device_train_batch_size=16)
    start = vision_run(tmp_path, method, per_device_train_batch_size=16, learning_rate=0.0)
    for two in run_trainers(2, tmp_path, method, function=vision_run, per_device_train_batch_size=8):
        assert all(torch.allclose(two[name], one[name], atol=1e-9) for name in one)
    assert max((one[name] - start[name]).abs().max() for name in one) > 1e-2


class RankDependent:
    """An evaluator whose scores differ between processes: better in the first, worse in the second."""

    primary_metric = "score"

    def __call__(self, encoder):
        sign = 1 - 2 * dist.get_rank()
        self.calls = getattr(self, "calls", -1) + 1
        self.observations = np.tile([-1.0, 1.0], 25) + sign * self.calls
        return {"score": float(self.observations.mean())}

    def metric_of(self, observations):
        return float(observations.mean())


def judged(folder, output_dir):
    """The verdict, the best step and the final weights of a run whose processes start with different weights."""
    trainer = make_trainer(
        folder, output_dir, evaluate=True, load_best_model_at_end=True, save_strategy="steps", save_steps=2,
        metric_for_best_model=None,
    )  # fmt: skip
    trainer.evaluator = RankDependent()
    next(trainer.model.encoder.parameters()).data.add_(1e-3 * dist.get_rank())
    trainer.run_evaluator()
    trainer.train()
    return vars(trainer.verdict), trainer.state.best_global_step, weights(trainer)


@pytest.mark.slow
def test_all_processes_have_the_verdict_of_the_first(bert_folder, tmp_path):
    (verdict, best, one), (other_verdict, other_best, other) = run_trainers(2, bert_folder, tmp_path, function=judged)
    assert verdict == other_verdict and verdict["outcome"] == "better" and best == other_best == 4
    assert (verdict["before"], verdict["after"], verdict["standard_error"]) == (0.0, 2.0, pytest.approx(0, abs=1e-9))
    assert all(torch.equal(one[name], other[name]) for name in one)
