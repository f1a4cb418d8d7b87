"""The trainer on a tiny BERT: its logs, the weights it updates, the files it saves, and known pitfalls."""

import math
import os
import re
import statistics
import warnings
from itertools import pairwise

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from transformers import Trainer

from fmicl_text import FMICLTrainingArguments, InputError, TextContrastiveModel, build_text_encoder
from fmicl_text.evaluation.evaluator import STSEvaluator
from fmicl_text.text.collator import TokenCollator
from fmicl_text.text.tokenization import tokenize_dataset
from fmicl_text.training.momentum import MomentumTrainer
from fmicl_text.training.trainer import FMICLTrainer, NonFiniteError
from tests.support import make_trainer, same, sentences, sts_pairs, trained, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*views of every text are identical")


@pytest.mark.parametrize(
    "kwargs", [{}, {"objective": "infonce", "gamma": None, "alpha": None}], ids=["fmicl", "infonce"]
)
def test_training_moves_every_parameter_and_logs_the_terms(bert_folder, tmp_path, kwargs):
    trainer = make_trainer(bert_folder, tmp_path, head="simcse", **kwargs)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    # The pooler is frozen. A key's bias shifts all scores of a softmax alike: its true gradient is 0.
    still = [n for n in before if torch.equal(before[n], after[n]) and not n.endswith("key.bias")]
    assert not [n for n in still if not any(k in n for k in ("word_embeddings", "position_embeddings", ".pooler."))]
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(first["loss_positive"] + first["loss_negative"], rel=1e-5)
    assert 0 < first["alignment"] < 4 and -8 < first["uniformity"] < 0
    assert all(math.isfinite(v) for entry in trainer.state.log_history for v in entry.values())


def test_one_forward_pass_per_step_over_both_views(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path, max_steps=2)
    shapes = []
    trainer.model.encoder[0].register_forward_hook(lambda m, a, out: shapes.append(out["token_embeddings"].shape[0]))
    trainer.train()
    assert shapes == [16, 16]


def test_the_gradient_reaches_the_encoder_through_both_views(bert_folder, tmp_path):
    """The gradient that reaches the forward pass is that of the loss with respect to x and y."""
    trainer = make_trainer(bert_folder, tmp_path, max_steps=1)
    outputs = []

    def keep(module, args, output):
        output.retain_grad()
        outputs.append(output)

    trainer.model.register_forward_hook(keep)
    trainer.train()
    x, y = (view.detach().requires_grad_() for view in outputs[0].unflatten(0, (8, 2)).unbind(1))
    expected = torch.autograd.grad(trainer.loss(x, y), (x, y))
    for view, gradient in zip(outputs[0].grad.unflatten(0, (8, 2)).unbind(1), expected, strict=True):
        assert gradient.norm() > 1e-2
        torch.testing.assert_close(view, gradient)


def test_logged_values_are_means_since_the_last_log(bert_folder, tmp_path):
    each, pooled = (trained(make_trainer(bert_folder, tmp_path, logging_steps=steps)) for steps in (1, 2))
    for name in ("loss", "alignment", "uniformity", "loss_negative"):
        single = [entry[name] for entry in each.state.log_history if name in entry]
        mean = [entry[name] for entry in pooled.state.log_history if name in entry]
        assert mean == pytest.approx([(single[0] + single[1]) / 2, (single[2] + single[3]) / 2], rel=1e-4)


def sgd_step(folder, output_dir, **settings):
    """Weights before and after one step of plain SGD without clipping."""
    trainer = make_trainer(
        folder, output_dir, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, max_steps=1,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", **settings
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    return before, weights(trainer)


@pytest.mark.slow
def test_accumulation_averages_the_micro_batches(no_dropout_folder, tmp_path):
    """2 x 8 sentences in one step = the mean of the two gradients of 8; not their sum, not a batch of 16."""
    texts = sentences(16)
    columns = ("sent0", "sent1")

    def rows(start, stop):
        return Dataset.from_dict({"sent0": texts[start:stop], "sent1": sentences(16, seed=5)[start:stop]})

    steps = []
    for dataset, accumulation in [(rows(0, 16), 2), (rows(0, 8), 1), (rows(8, 16), 1)]:
        before, after = sgd_step(
            no_dropout_folder, tmp_path, columns=columns, dataset=dataset, gradient_accumulation_steps=accumulation
        )
        steps.append(torch.cat([(after[n] - before[n]).flatten() for n in before]))
    both, first, second = steps
    assert first.norm() > 1e-3
    assert (both - (first + second) / 2).norm() / both.norm() < 1e-5


def test_identical_views_are_warned_of(no_dropout_folder, bert_folder, tmp_path):
    with pytest.warns(UserWarning, match="identical because the model has no dropout"):
        make_trainer(no_dropout_folder, tmp_path, max_steps=1).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(bert_folder, tmp_path, max_steps=1).train()


def test_triplets_use_the_hard_negative(bert_folder, tmp_path):
    """With a hard negative equal to the anchor's text masked out, and a far one in the sum: losses differ."""
    texts = {"sent0": sentences(16, 1), "sent1": sentences(16, 2), "hard_neg": sentences(16, 3)}
    trainer = make_trainer(
        bert_folder, tmp_path, columns=tuple(texts), dataset=Dataset.from_dict(texts), max_steps=1, logging_steps=1
    )
    seen = []
    terms = trainer.loss.terms
    trainer.loss.terms = lambda *args: seen.append([tensor.shape for tensor in args[:4]]) or terms(*args)
    trainer.train()
    assert seen == [[(8, 32), (8, 32), (8, 1, 32), (8, 3)]]


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_several_hard_negatives(bert_folder, tmp_path, mini_batch_size):
    """Rows of five texts: the loss receives three hard negatives per example."""
    columns = ("sent0", "sent1", "negative_1", "negative_2", "negative_3")
    rows = Dataset.from_dict({name: sentences(16, seed) for seed, name in enumerate(columns)})
    trainer = make_trainer(
        bert_folder, tmp_path, columns=columns, dataset=rows, max_steps=1, mini_batch_size=mini_batch_size
    )
    seen = []
    trainer.loss.terms = lambda *a, terms=trainer.loss.terms: seen.append([t.shape for t in a[:4]]) or terms(*a)
    before = weights(trainer)
    trainer.train()
    assert seen == [[(8, 32), (8, 32), (8, 3, 32), (8, 5)]]
    assert not same(before, weights(trainer))


def test_bf16_trains_with_a_float32_loss(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path, bf16=True, max_steps=2)
    dtypes = []
    terms = trainer.loss.terms
    trainer.loss.terms = lambda *args: dtypes.append((out := terms(*args)).positive.dtype) or out
    before = weights(trainer)
    trainer.train()
    assert dtypes == [torch.float32] * 2
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert not same(before, weights(trainer))


def test_evaluation_leaves_training_as_it_was(bert_folder, tmp_path):
    with_it = make_trainer(bert_folder, tmp_path, evaluate=True)
    with_it.evaluate()
    with_it.train()
    without = trained(make_trainer(bert_folder, tmp_path))
    assert [entry for entry in with_it.state.log_history if "eval_sts_spearman" in entry]
    assert same(weights(with_it), weights(without))


@pytest.mark.slow
def test_best_checkpoint_is_chosen_by_sts_and_opens_as_a_sentence_transformer(bert_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fmicl_text.training.verdict.NOISE", -1e9)  # that of 12 pairs is large
    monkeypatch.setattr(STSEvaluator, "smallest_differences", {"sts_spearman": -1e9})  # and no step is better than 0
    trainer = make_trainer(
        bert_folder, tmp_path, head="simcse", evaluate=True, max_steps=8, learning_rate=5e-3,
        save_strategy="steps", save_steps=2, save_total_limit=2, load_best_model_at_end=True, save_only_model=True,
    )  # fmt: skip
    trainer.train()
    scores = {e["step"]: e["eval_sts_spearman"] for e in trainer.state.log_history if "eval_sts_spearman" in e}
    best = max(scores, key=scores.get)
    assert trainer.state.best_global_step == best
    assert trainer.evaluate()["eval_sts_spearman"] == pytest.approx(scores[best], abs=1e-9)
    folder = trainer.state.best_model_checkpoint
    assert STSEvaluator(sts_pairs(), progress=False)(SentenceTransformer(folder, device="cpu"))[
        "sts_spearman"
    ] == pytest.approx(scores[best], abs=1e-9)
    assert "training_only.safetensors" in os.listdir(folder)
    assert "training_args.bin" not in os.listdir(folder)  # a pickle that can contain a Hub token
    trainer.save_model(str(tmp_path / "final"))
    assert "training_only.safetensors" not in os.listdir(tmp_path / "final")


def test_the_metric_that_chooses_must_be_measured(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path, evaluate=True, metric_for_best_model="accuracy")
    with pytest.raises(InputError, match=r"metric_for_best_model=accuracy .*sts_spearman, "):
        trainer.evaluate()


def test_a_checkpoint_without_a_head_is_no_checkpoint_of_a_run_with_one(bert_folder, tmp_path):
    make_trainer(bert_folder, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(InputError, match=r"checkpoint-1 .*checkpoint has no head.0.bias"):
        make_trainer(bert_folder, tmp_path, head="simcse", max_steps=1).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


def test_early_stopping_needs_the_best_model(tmp_path):
    with pytest.raises(ValueError, match=r"early_stopping_patience=2 .*load_best_model_at_end=True"):
        FMICLTrainingArguments(str(tmp_path), early_stopping_patience=2, load_best_model_at_end=False)


@pytest.mark.slow
def test_resume_is_bit_identical_head_included(bert_folder, tmp_path):
    settings = {"head": "simcse", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(bert_folder, tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(bert_folder, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert same(weights(whole), weights(resumed))


def test_a_loss_that_is_not_finite_stops_the_run(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path, max_steps=6, save_strategy="steps", save_steps=1)
    forward, calls = trainer.model.forward, []

    def breaks_at_step_3(features):
        calls.append(1)
        return forward(features) * (math.nan if len(calls) == 3 else 1.0)

    trainer.model.forward = breaks_at_step_3
    with pytest.raises(
        NonFiniteError,
        match=r"loss is nan and gradient norm nan at step 3 \(fmicl-kl, .* not finite\).*: .*checkpoint-2$",
    ):
        trainer.train()
    kept = sorted(name for name in os.listdir(tmp_path) if name.startswith("checkpoint"))
    assert kept == ["checkpoint-1", "checkpoint-2"]
    assert all(p.isfinite().all() for p in build_text_encoder(str(tmp_path / "checkpoint-2")).parameters())


def test_weights_that_are_not_finite_are_not_written(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path)
    next(trainer.model.parameters()).data[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"word_embeddings.weight is not finite; nothing was written"):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


def test_a_data_set_smaller_than_a_batch_is_refused(bert_folder, tmp_path):
    with pytest.raises(InputError, match=r"5 training examples .* batch of 8"):
        make_trainer(bert_folder, tmp_path, dataset=Dataset.from_dict({"text": sentences(5)}))


PRIVATE_OVERRIDES = {
    "_get_output_dir": "the folder of a trial is the output_dir while the trial trains",
    "_determine_best_metric": "with save_strategy best the base class would drop the save that a signal needs",
    "_get_grad_norm": "callbacks do not get the norm, and clipping hides an overflow from them",
    "_get_train_sampler": "the base class's length-grouped order is lost at a resume",
    "_load_best_model": "a checkpoint contains an exported encoder, and may be corrupted",
    "_load_from_checkpoint": "a checkpoint contains an exported encoder, not the wrapper's state dict",
    "_save_checkpoint": "the base class writes into place, so that a kill leaves what looks like a checkpoint",
}


def test_private_overrides_are_few_and_exist_in_transformers():
    """If transformers renamed a method, the override would never be called."""
    assert FMICLTrainer.__mro__[1] is Trainer
    for trainer in (FMICLTrainer, MomentumTrainer):
        ours = {name for name in vars(trainer) if re.match("_[a-z]", name)}
        assert ours == (set(PRIVATE_OVERRIDES) if trainer is FMICLTrainer else set())
    assert len(PRIVATE_OVERRIDES) <= 8 and set(PRIVATE_OVERRIDES) <= set(vars(Trainer))


def test_an_evaluator_is_asked_for(bert_folder, tmp_path):
    with pytest.raises(ValueError, match="eval_strategy=steps needs an evaluator"):
        make_trainer(bert_folder, tmp_path, eval_strategy="steps")
    with pytest.raises(ValueError, match="pass evaluator= to the trainer"):
        make_trainer(bert_folder, tmp_path).evaluate()


def test_length_grouped_batches_are_the_same_in_every_epoch_that_is_repeated(bert_folder, tmp_path):
    """Batches contain similar lengths; the order differs between epochs, and is a function of seed and epoch alone."""
    encoder = build_text_encoder(bert_folder)
    rows = tokenize_dataset(Dataset.from_dict({"text": sentences(400)}), encoder.tokenizer, ["text"], 32)
    lengths = rows["length"][:]

    def batches(sampler):
        order = list(sampler)
        assert sorted(order) == list(range(400))
        return [order[i : i + 8] for i in range(0, 400, 8)]

    def spread(some):
        return sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in some) / len(some)

    trainer = make_trainer(bert_folder, tmp_path, dataset=rows, train_sampling_strategy="group_by_length")
    sampler = trainer._get_train_sampler()
    first = batches(sampler)
    plain = [list(range(i, i + 8)) for i in range(0, 400, 8)]
    assert spread(first) < spread(plain) / 3
    assert lengths[first[0][0]] == max(lengths)
    means = [statistics.mean(lengths[i] for i in batch) for batch in first[1:]]
    assert 0.25 < statistics.mean(a > b for a, b in pairwise(means)) < 0.75  # not from long to short
    sampler.set_epoch(1)
    second = batches(sampler)
    assert first != second == batches(sampler)
    torch.manual_seed(99)
    again = make_trainer(
        bert_folder, tmp_path, dataset=rows, train_sampling_strategy="group_by_length"
    )._get_train_sampler()
    again.set_epoch(1)
    assert batches(again) == second


def test_length_grouping_trains_and_resumes_in_its_second_epoch(bert_folder, tmp_path):
    encoder = build_text_encoder(bert_folder)
    rows = tokenize_dataset(Dataset.from_dict({"text": sentences(40)}), encoder.tokenizer, ["text"], 32)
    settings = {
        "max_steps": 10,
        "save_strategy": "steps",
        "save_steps": 7,
        "train_sampling_strategy": "group_by_length",
    }
    runs = []
    for name in ("whole", "resumed"):
        trainer = make_trainer(bert_folder, tmp_path / name, dataset=rows, **settings)
        trainer.data_collator = TokenCollator(encoder.tokenizer)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7") if runs else None)
        runs.append(weights(trainer))
    assert same(*runs)


def test_length_grouping_of_text_is_refused(bert_folder, tmp_path):
    with pytest.raises(InputError, match="train_sampling_strategy=group_by_length"):
        make_trainer(bert_folder, tmp_path, train_sampling_strategy="group_by_length").train()


def test_gathered_weights_of_an_engine_are_saved(bert_folder, tmp_path, monkeypatch):
    """With sharded parameters, the module's own parameters must not be written."""
    trainer = make_trainer(bert_folder, tmp_path, head="simcse")
    whole = {
        name: weight + 1 if weight.is_floating_point() else weight
        for name, weight in trainer.model.state_dict().items()
    }
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "is_fsdp_enabled", True)
        patch.setattr(trainer.accelerator, "get_state_dict", lambda model: whole)
        trainer.write_encoder(tmp_path / "checkpoint-1", training_only=True)
    other = TextContrastiveModel(build_text_encoder(bert_folder), head="simcse")
    other.load_checkpoint(str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(weight, whole[name]) for name, weight in other.state_dict().items())
    trainer.save_model(str(tmp_path / "own"))
    own = build_text_encoder(str(tmp_path / "own")).state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in trainer.model.encoder.state_dict().items())


def test_engines_that_this_process_cannot_be_are_refused(bert_folder, tmp_path, monkeypatch):
    trainer = make_trainer(bert_folder, tmp_path, mini_batch_size=4)
    trainer.args._n_gpu = 2
    with pytest.raises(InputError, match="--multi_gpu --num_processes 2"):
        trainer.check_engine()
    trainer.args._n_gpu = 0
    for engine in ("FSDP", "DEEPSPEED"):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{engine}", "true")
            with pytest.raises(InputError, match=f"{engine} was requested.* NO"):
                trainer.check_engine()
    trainer.is_fsdp_enabled = True
    trainer.args.load_best_model_at_end = True
    with pytest.raises(InputError, match=r"FSDP.*load_best_model_at_end=False"):
        trainer.check_engine()
    trainer.args.load_best_model_at_end = False
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(InputError, match=r"mini_batch_size=4 .* FSDP"):
        trainer.check_engine()
