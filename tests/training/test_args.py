"""Every argument of transformers is used as documented, or another value than the default is refused in one line."""

import json
from dataclasses import fields

import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from fmicl_text import FMICLTrainer, FMICLTrainingArguments, InputError, build_text_encoder
from fmicl_text.evaluation.evaluator import STSEvaluator
from fmicl_text.training.args import FIXED_ARGUMENTS, LOGGERS, RANGES
from tests.support import make_trainer, sentences, sts_pairs, trained

# Of the arguments: "used" by this trainer or by the base class; "fixed" to one value; "checked" against other
# arguments; "passed" to torch, accelerate, a logger or the Hub; "unused" by every trainer, for scripts only.
KINDS = {
    "output_dir": "used",
    "per_device_train_batch_size": "used",
    "num_train_epochs": "used",
    "max_steps": "used",
    "learning_rate": "used",
    "lr_scheduler_type": "used",
    "lr_scheduler_kwargs": "checked",
    "warmup_steps": "checked",
    "optim": "used",
    "optim_args": "used",
    "weight_decay": "used",
    "adam_beta1": "used",
    "adam_beta2": "used",
    "adam_epsilon": "used",
    "optim_target_modules": "checked",
    "gradient_accumulation_steps": "used",
    "average_tokens_across_devices": "fixed",
    "max_grad_norm": "used",
    "label_smoothing_factor": "fixed",
    "bf16": "used",
    "fp16": "used",
    "bf16_full_eval": "fixed",
    "fp16_full_eval": "fixed",
    "tf32": "passed",
    "activation_checkpointing": "used",
    "activation_checkpointing_kwargs": "checked",
    "gradient_checkpointing": "used",
    "gradient_checkpointing_kwargs": "checked",
    "torch_compile": "passed",
    "torch_compile_backend": "checked",
    "torch_compile_mode": "checked",
    "use_liger_kernel": "fixed",
    "liger_kernel_config": "fixed",
    "use_cache": "fixed",
    "neftune_noise_alpha": "fixed",
    "torch_empty_cache_steps": "checked",
    "auto_find_batch_size": "fixed",
    "logging_strategy": "used",
    "logging_steps": "used",
    "logging_first_step": "used",
    "log_on_each_node": "used",
    "logging_nan_inf_filter": "fixed",
    "include_num_input_tokens_seen": "checked",
    "log_level": "used",
    "log_level_replica": "used",
    "disable_tqdm": "used",
    "report_to": "checked",
    "run_name": "passed",
    "project": "passed",
    "trackio_space_id": "passed",
    "trackio_bucket_id": "passed",
    "trackio_static_space_id": "passed",
    "eval_strategy": "used",
    "eval_steps": "used",
    "eval_delay": "used",
    "per_device_eval_batch_size": "used",
    "prediction_loss_only": "fixed",
    "eval_on_start": "used",
    "eval_do_concat_batches": "fixed",
    "eval_use_gather_object": "fixed",
    "eval_accumulation_steps": "fixed",
    "include_for_metrics": "fixed",
    "batch_eval_metrics": "fixed",
    "save_only_model": "used",
    "save_strategy": "used",
    "save_steps": "used",
    "save_on_each_node": "fixed",
    "save_total_limit": "used",
    "enable_jit_checkpoint": "fixed",
    "push_to_hub": "used",
    "hub_token": "checked",
    "hub_private_repo": "used",
    "hub_model_id": "used",
    "hub_strategy": "checked",
    "hub_always_push": "used",
    "hub_revision": "used",
    "load_best_model_at_end": "used",
    "metric_for_best_model": "used",
    "greater_is_better": "used",
    "ignore_data_skip": "fixed",
    "restore_callback_states_from_checkpoint": "fixed",
    "full_determinism": "used",
    "seed": "used",
    "data_seed": "used",
    "use_cpu": "used",
    "accelerator_config": "passed",
    "parallelism_config": "fixed",
    "dataloader_drop_last": "fixed",
    "dataloader_num_workers": "used",
    "dataloader_pin_memory": "passed",
    "dataloader_persistent_workers": "checked",
    "dataloader_prefetch_factor": "checked",
    "dataloader_multiprocessing_context": "checked",
    "dataloader_in_order": "passed",
    "remove_unused_columns": "fixed",
    "label_names": "fixed",
    "train_sampling_strategy": "used",
    "length_column_name": "fixed",
    "ddp_find_unused_parameters": "passed",
    "ddp_bucket_cap_mb": "passed",
    "ddp_broadcast_buffers": "passed",
    "ddp_static_graph": "passed",
    "ddp_backend": "passed",
    "ddp_timeout": "passed",
    "fsdp": "checked",
    "fsdp_config": "checked",
    "deepspeed": "checked",
    "debug": "checked",
    "skip_memory_metrics": "used",
    "do_train": "unused",
    "do_eval": "unused",
    "do_predict": "fixed",
    "resume_from_checkpoint": "used",
    "local_rank": "passed",
}
OTHER_VALUES = {None: "x", 0: 1, 1: 0, "length": "n"}  # than a default
CHECKED = {
    "lr_scheduler_kwargs": ({"x": 1}, {"lr_scheduler_type": "constant"}),
    "warmup_steps": (10, {"lr_scheduler_type": "constant"}),
    "optim_target_modules": ("all-linear", {}),
    "activation_checkpointing_kwargs": ({"every_n_layers": 2}, {}),
    "gradient_checkpointing_kwargs": ({"x": 1}, {"activation_checkpointing": True}),
    "torch_compile_backend": ("x", {}),
    "torch_compile_mode": ("x", {}),
    "torch_empty_cache_steps": (2, {"mini_batch_size": 4}),
    "report_to": ("x", {}),
    "hub_token": ("x", {}),
    "hub_strategy": ("checkpoint", {}),
    "dataloader_persistent_workers": (True, {}),
    "dataloader_prefetch_factor": (2, {}),
    "dataloader_multiprocessing_context": ("fork", {}),
    "fsdp": ("full_shard", {}),
    "deepspeed": ("nosuch.json", {}),
    "fsdp_config": ({"min_num_params": 1}, {}),
    "debug": ("tpu_metrics_debug", {}),
}


def arguments(output_dir="x", **settings):
    return FMICLTrainingArguments(str(output_dir), **({"use_cpu": True, "disable_tqdm": True} | settings))


def test_every_argument_of_transformers_has_a_kind():
    """If this fails after an upgrade: decide what the new argument does here, and add it to the table."""
    assert {field.name for field in fields(TrainingArguments)} == KINDS.keys()
    assert {name for name, kind in KINDS.items() if kind == "fixed"} == FIXED_ARGUMENTS.keys()
    in_trainer = {"include_num_input_tokens_seen"}
    assert {name for name, kind in KINDS.items() if kind == "checked"} - in_trainer == CHECKED.keys()


@pytest.mark.parametrize("name", FIXED_ARGUMENTS)
def test_another_value_of_a_fixed_argument_is_refused(name):
    default = FIXED_ARGUMENTS[name]
    other = ["loss"] if isinstance(default, list) else OTHER_VALUES[default]
    with pytest.raises(ValueError, match=rf"^{name}=.* is not supported; it must be "):
        arguments(**{name: other})
    assert getattr(arguments(), name) == default


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize("name", CHECKED)
def test_a_value_without_effect_is_refused(name):
    value, others = CHECKED[name]
    with pytest.raises(ValueError, match=rf"^(--)?{name.replace('gradient', 'activation')}\b"):
        arguments(**{name: value}, **others)


def test_a_value_outside_of_its_range_is_refused():
    for _, _, names in RANGES:
        for name in names:
            with pytest.raises(ValueError, match=name):
                arguments(**{name: -2})


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_ignore_the_warmup_are_named(schedule):
    settings = {"lr_scheduler_type": schedule, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(ValueError, match=rf"warmup_steps=0\.1 has no effect with lr_scheduler_type={schedule}$"):
        arguments(warmup_steps=0.1, **settings)
    with pytest.raises(ValueError, match=f"{schedule} requires an eval strategy"):
        arguments(lr_scheduler_type=schedule)
    assert arguments(**settings).greater_is_better is False  # of the loss; an evaluator's metric is chosen later
    with pytest.raises(ValueError, match="use constant_with_warmup"):
        arguments(lr_scheduler_type="constant", warmup_steps=2)


def test_loggers_that_are_not_installed_are_named_at_once(monkeypatch):
    assert LOGGERS.keys() == INTEGRATION_TO_CALLBACK.keys() - {"kubeflow"}  # which needs a variable, not a package
    monkeypatch.setattr("fmicl_text.training.args.find_spec", lambda name: None)
    for name, (_, package) in LOGGERS.items():
        for report_to in (name, [name], ["none", name]):
            with pytest.raises(ValueError, match=f"^report_to={name} requires {package}: pip install {package}$"):
                arguments(report_to=report_to)
    assert arguments(report_to="none").report_to == []


def test_an_engine_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("fmicl_text.training.args.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^deepspeed=zero2\.json requires deepspeed: pip install deepspeed$"):
        arguments(deepspeed="zero2.json")
    with pytest.raises(ValueError, match="needs a GPU to offload from"):
        arguments(activation_checkpointing=True, activation_checkpointing_kwargs={"offload": True})


def test_loggers_that_cannot_run_are_named(monkeypatch):
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    with pytest.raises(ValueError, match=r"report_to=kubeflow cannot be used: .*KUBEFLOW_TRAINER_SERVER_URL"):
        arguments(report_to="kubeflow")
    with pytest.raises(ValueError, match=r"report_to=nosuch cannot be used: .*tensorboard"):
        arguments(report_to=["tensorboard", "nosuch"])


# ---- arguments that the trainer gives to others


@pytest.mark.slow
def test_the_batch_size_for_evaluation_is_that_of_the_evaluator(bert_folder, tmp_path):
    def trainer(evaluator, **settings):
        args = arguments(tmp_path, per_device_train_batch_size=8, **settings)
        return FMICLTrainer(build_text_encoder(bert_folder), args, train_dataset=sentences(16), evaluator=evaluator)

    seen = []
    pairs = sts_pairs()
    for evaluator, default in [
        (STSEvaluator(pairs, progress=False), 64),
        (EmbeddingSimilarityEvaluator(pairs["sentence1"], pairs["sentence2"], pairs["score"]), 16),
    ]:
        assert trainer(evaluator).evaluator.batch_size == default
        own = trainer(evaluator, per_device_eval_batch_size=5)
        own.model.encoder[0].register_forward_hook(lambda m, a, out: seen.append(len(out["token_embeddings"])))
        own.evaluate()
        assert max(seen) == 5 and own.args.eval_batch_size == 5
        seen.clear()
    for evaluator in (None, lambda encoder: 0.5):
        with pytest.raises(InputError, match="per_device_eval_batch_size=5 has no effect"):
            trainer(evaluator, per_device_eval_batch_size=5)


def learning_rates(folder, output_dir, values, **settings):
    """The logged learning rates of 6 steps with an evaluation of these values after each."""
    measured = iter(values)
    args = arguments(
        output_dir, per_device_train_batch_size=8, max_steps=6, learning_rate=1e-3, logging_steps=1,
        eval_strategy="steps", eval_steps=1, save_strategy="no", lr_scheduler_type="reduce_lr_on_plateau", **settings
    )  # fmt: skip
    trainer = FMICLTrainer(
        build_text_encoder(folder), args, train_dataset=sentences(64), evaluator=lambda encoder: {"x": next(measured)}
    )
    trainer.train()
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


@pytest.mark.slow
def test_the_plateau_schedule_waits_for_the_metric_to_improve(bert_folder, tmp_path):
    rising, falling = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    wait = {"patience": 1, "factor": 0.1}
    constant, reduced = [1e-3] * 6, [1e-3] * 3 + [1e-4] * 2 + [1e-5]
    for values, greater, kwargs, expected in [
        (rising, True, wait, constant),
        (falling, True, wait, reduced),
        (rising, False, wait, reduced),
        (falling, False, wait, constant),
        (rising, True, wait | {"mode": "min"}, reduced),
    ]:
        rates = learning_rates(
            bert_folder, tmp_path, values, metric_for_best_model="x", greater_is_better=greater,
            lr_scheduler_kwargs=kwargs,
        )  # fmt: skip
        assert rates == pytest.approx(expected), (values, greater, kwargs)
    with pytest.raises(InputError, match="metric_for_best_model=loss is not available; choose one of x"):
        learning_rates(bert_folder, tmp_path, rising)


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_the_mode_follows_the_primary_metric_of_an_evaluator(bert_folder, tmp_path, schedule):
    """Which some evaluators name in their first call."""

    class Evaluator:
        greater_is_better = True
        primary_metric = None

        def __call__(self, encoder):
            self.primary_metric = "x"
            return {"x": 0.5}

    args = arguments(
        tmp_path, per_device_train_batch_size=8, max_steps=1, eval_strategy="steps", eval_steps=1, save_strategy="no",
        lr_scheduler_type=schedule,
    )  # fmt: skip
    trainer = FMICLTrainer(build_text_encoder(bert_folder), args, train_dataset=sentences(64), evaluator=Evaluator())
    trainer.train()
    assert trainer.lr_scheduler.mode == "max" and trainer.args.lr_scheduler_kwargs is None


def test_the_seed_of_the_data_orders_batches_of_similar_length(bert_folder, tmp_path):
    rows = [{"text": text} for text in sentences(64)]
    orders = []
    for settings in ({"seed": 1}, {"seed": 2, "data_seed": 1}, {"seed": 1, "data_seed": 2}):
        trainer = make_trainer(bert_folder, tmp_path, train_sampling_strategy="group_by_length", **settings)
        dataset = trainer.train_dataset.add_column("length", [len(row["text"].split()) for row in rows])
        orders.append(list(trainer._get_train_sampler(dataset)))
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("options", [{"every_n_layers": 2}, {"use_reentrant": False}])
def test_options_of_activation_checkpointing_train(bert_folder, tmp_path, options):
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": options}
    plain, checkpointed = (
        trained(make_trainer(bert_folder, tmp_path, max_steps=1, **given)) for given in ({}, settings)
    )
    first, second = (
        [entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (plain, checkpointed)
    )
    assert first == second


def test_tokens_seen_are_counted_for_text_only(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path, max_steps=2, include_num_input_tokens_seen="non_padding")
    trainer.train()
    counts = [entry["num_input_tokens_seen"] for entry in trainer.state.log_history if "loss" in entry]
    assert 0 < counts[0] < counts[1] <= 2 * 2 * 8 * 14
    model = trainer.model
    model.unit = "images"
    with pytest.raises(InputError, match="include_num_input_tokens_seen=all does not apply to images"):
        FMICLTrainer(model, arguments(tmp_path, include_num_input_tokens_seen=True))


def test_arguments_are_made_from_what_they_are_written_as():
    args = FMICLTrainingArguments("x", divergence="js", use_cpu=True, lr_scheduler_kwargs={})
    for written in (args.to_dict(), json.loads(args.to_json_string())):
        assert FMICLTrainingArguments(**written).to_dict() == args.to_dict()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is another device")
def test_without_another_device_the_cpu_needs_no_flag():
    """transformers raises for bf16 without use_cpu, which would also keep a later run with these settings off a GPU."""
    args = FMICLTrainingArguments(output_dir="x", bf16=True)
    assert (args.device.type, args.n_gpu, args.mixed_precision, args.use_cpu) == ("cpu", 0, "bf16", False)
    assert args.to_dict()["use_cpu"] is False


def test_a_backend_of_processes_needs_several(tmp_path):
    with pytest.raises(ValueError, match=r"ddp_backend=gloo needs several processes: .*accelerate launch"):
        FMICLTrainingArguments(str(tmp_path), ddp_backend="gloo", use_cpu=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [("train_sampling_strategy", "group_by_lenght"), ("train_sampling_strategy", "auto"), ("log_level", "loud")],
)
def test_a_name_that_transformers_does_not_check_is_refused(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"^{option} must be one of .*; got {value}$"):
        FMICLTrainingArguments(str(tmp_path), **{option: value})
