"""Large batches in little memory: mini_batch_size does not change the gradient."""

from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset

from fmicl_text import FMICLTrainingArguments, InputError
from fmicl_text.losses.divergences import DIVERGENCES
from fmicl_text.training.trainer import FMICLTrainer
from tests.support import Gradients, make_trainer, one_fast, relative_error, run_trainer, sentences

pytestmark = [
    pytest.mark.filterwarnings("ignore:divergence .* fails the uniformity condition"),
    pytest.mark.filterwarnings("ignore:.*views of every text are identical"),
]
BARS = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", one_fast([torch.float64, torch.float32]), ids=str)
@pytest.mark.parametrize("name", one_fast(DIVERGENCES))
def test_without_dropout_it_is_the_whole_batch(no_dropout_folder, tmp_path, name, dtype):
    """16 pairs, 5 at a time, also in blocks of 4."""
    settings = {"divergence": name, "per_device_train_batch_size": 16, "dtype": dtype, "head": "simcse"}
    (exact,), _, loss = run_trainer(no_dropout_folder, tmp_path, **settings)
    for block_size in (None, 4):
        (gradient,), _, cached_loss = run_trainer(
            no_dropout_folder, tmp_path, mini_batch_size=5, block_size=block_size, **settings
        )
        assert relative_error(gradient, exact) < BARS[dtype]
        assert cached_loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("objective", ["infonce", "align_uniform", "spectral"])
def test_the_other_objectives(no_dropout_folder, tmp_path, objective):
    settings = {"objective": objective, "gamma": None, "alpha": None, "dtype": torch.float64}
    (exact,), _, _ = run_trainer(no_dropout_folder, tmp_path, **settings)
    (gradient,), _, _ = run_trainer(no_dropout_folder, tmp_path, mini_batch_size=3, **settings)
    assert relative_error(gradient, exact) < 1e-12


def gradients_with_dropout(folder, output_dir, step, dtype=torch.float32, **settings):
    """Gradients of two accumulated micro-batches of 8, by training_step or by a substitute for it."""
    trainer = make_trainer(
        folder, output_dir, head="simcse", dataset=Dataset.from_dict({"text": sentences(16)}), optim="sgd",
        max_steps=1, max_grad_norm=0.0, gradient_accumulation_steps=2, mini_batch_size=3, **settings,
    )  # fmt: skip
    trainer.model.to(dtype)
    trainer.cached_training_step = step.__get__(trainer)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.steps[0]


def step_with_the_graph_kept(trainer, model, inputs):
    """The same mini-batches and dropout, embedded once, with all graphs in memory."""
    model.train()
    text_ids = inputs.pop("text_ids")
    parts = []
    for k, start in enumerate(range(0, 8, 3)):
        trainer.seed_dropout(k)
        parts.append(trainer.embed(model, {name: value[start : start + 3] for name, value in inputs.items()}))
    loss = trainer.compute_loss_from_embeddings(torch.cat(parts).unbind(1), text_ids) / 2
    trainer.accelerator.backward(loss)
    return loss.detach()


@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_with_dropout_it_is_the_graph_kept(bert_folder, tmp_path, dtype):
    """Accumulation and a head included."""
    exact = gradients_with_dropout(bert_folder, tmp_path, step_with_the_graph_kept, dtype)
    cached = gradients_with_dropout(bert_folder, tmp_path, FMICLTrainer.cached_training_step, dtype)
    assert relative_error(cached, exact) < BARS[dtype]


def test_with_bf16_it_is_the_graph_kept(bert_folder, tmp_path):
    exact = gradients_with_dropout(bert_folder, tmp_path, step_with_the_graph_kept, bf16=True)
    cached = gradients_with_dropout(bert_folder, tmp_path, FMICLTrainer.cached_training_step, bf16=True)
    assert relative_error(cached, exact) < 1e-6
    single = gradients_with_dropout(bert_folder, tmp_path, FMICLTrainer.cached_training_step)
    assert relative_error(cached, single) > 1e-3  # bf16 was on


def test_without_the_replay_of_dropout_it_is_wrong(bert_folder, tmp_path, monkeypatch):
    exact = gradients_with_dropout(bert_folder, tmp_path, step_with_the_graph_kept)
    monkeypatch.setattr(FMICLTrainer, "seed_dropout", lambda *args, **kwargs: None)
    cached = gradients_with_dropout(bert_folder, tmp_path, FMICLTrainer.cached_training_step)
    assert relative_error(cached, exact) > 0.1


def test_dropout_differs_between_steps_micro_batches_and_mini_batches(bert_folder, tmp_path):
    """The same sentence everywhere: every forward pass embeds it differently, and a second run repeats the first."""
    runs = []
    for _ in range(2):
        trainer = make_trainer(
            bert_folder, tmp_path, dataset=Dataset.from_dict({"text": [*["a dog runs"] * 15, "the cat"]}),
            train_sampling_strategy="sequential", max_steps=3, gradient_accumulation_steps=2, mini_batch_size=4,
            per_device_train_batch_size=8,
        )  # fmt: skip
        seen, seeds, terms, embed = [], [], trainer.loss.terms, trainer.embed
        trainer.loss.terms = lambda x, y, *_, terms=terms, seen=seen: seen.append(x.detach()) or terms(x, y)
        trainer.embed = lambda *a, embed=embed, seeds=seeds: seeds.append(torch.initial_seed()) or embed(*a)
        trainer.train()
        runs.append((seen, seeds))
    assert runs[0][1] == runs[1][1]
    assert torch.equal(torch.cat(runs[0][0]), torch.cat(runs[1][0]))
    assert len(set(runs[0][1])) == 3 * 2 * 2  # steps, micro-steps, mini-batches; each drawn twice
    for each in runs[0][0]:
        assert len(each.unique(dim=0)) == len(each)


def test_samplers_draw_from_an_untouched_random_state(bert_folder, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    trainer = make_trainer(bert_folder, tmp_path, max_steps=1)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    torch.manual_seed(5)
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, batch)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("field", ["mini_batch_size", "block_size"])
@pytest.mark.parametrize("value", [0, -1, 9])
def test_sizes_out_of_range_are_named(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"{field} .* 8, got {value}$"):
        FMICLTrainingArguments(str(tmp_path), per_device_train_batch_size=8, **{field: value})
    FMICLTrainingArguments(str(tmp_path), per_device_train_batch_size=8, use_cpu=True, **{field: 8})


def test_block_size_means_nothing_to_infonce(tmp_path):
    with pytest.raises(ValueError, match=r"block_size=8 .* objective=infonce"):
        FMICLTrainingArguments(str(tmp_path), objective="infonce", block_size=8)
    with pytest.raises(ValueError, match="global_batch must be one of none, gather; got 'ring'"):
        FMICLTrainingArguments(str(tmp_path), objective="infonce", global_batch="ring")


@pytest.mark.parametrize(
    "failure",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
     RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to")],
    ids=["gpu", "cpu"],
)  # fmt: skip
def test_out_of_memory_names_the_two_options(bert_folder, tmp_path, failure):
    trainer = make_trainer(bert_folder, tmp_path, mini_batch_size=4)

    def full(*args):
        raise failure

    trainer.model.forward = full
    with pytest.raises(InputError, match=r"step 1: mini_batch_size \(now 4\).* 8, block_size \(now automatic\)"):
        trainer.train()


def test_another_runtime_error_stays_what_it_is(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path)
    trainer.model.forward = lambda *args: torch.zeros(2, 3) @ torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer.train()


def test_fp16_on_a_processor_is_refused(bert_folder, tmp_path):
    with pytest.raises(InputError, match=r"fp16 .* bf16=True") if not torch.cuda.is_available() else nullcontext():
        make_trainer(bert_folder, tmp_path, fp16=True)


@pytest.mark.slow
def test_training_again_draws_the_same_dropout(bert_folder, tmp_path):
    losses = []
    for _ in range(2):
        trainer = make_trainer(bert_folder, tmp_path, max_steps=1)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        for _ in range(2):
            trainer.model.load_state_dict(start, strict=False)
            trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1])
    first = make_trainer(bert_folder, tmp_path, max_steps=1)
    first.train()
    assert losses[0] == losses[1] == first.state.log_history[0]["loss"]


def test_schedule_free_optimizers_are_told_to_train(bert_folder, tmp_path):
    trainer, calls = make_trainer(bert_folder, tmp_path, max_steps=2, mini_batch_size=4), []
    trainer.create_optimizer()
    trainer.optimizer.train = lambda: calls.append(1)
    trainer.optimizer.eval = lambda: None
    trainer.train()
    assert len(calls) >= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mini_batch_size": 4, "optim": "lomo"}, r"mini_batch_size=4 .* optim="),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
    ],
)
def test_what_cannot_go_together(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        FMICLTrainingArguments(str(tmp_path), use_cpu=True, **settings)
