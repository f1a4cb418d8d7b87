"""The interface that the trainer shares with transformers' Trainer: arguments and methods that it does not use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fmicl_text.errors import InputError
from fmicl_text.training.args import FMICLTrainingArguments

EVALUATORS = "pass evaluator=, such as evaluation.STSEvaluator(pairs) or a function of the encoder"
# Arguments of transformers' Trainer that have no use here, and what to pass instead.
NOT_USED = {
    "eval_dataset": EVALUATORS,
    "compute_metrics": EVALUATORS,
    "preprocess_logits_for_metrics": EVALUATORS,
    "compute_loss_func": "pass loss=, or override compute_loss",
    "processing_class": "the encoder has a tokenizer of its own; inputs of another form need data_collator=",
    "tokenizer": "the encoder has a tokenizer of its own; inputs of another form need data_collator=",
}
EVALUATES = "evaluation calls the evaluator; override evaluate"
# Methods of transformers' Trainer that this one does not call, and what to override instead.
NOT_CALLED = {
    **dict.fromkeys(("prediction_step", "evaluation_loop", "get_eval_dataloader", "get_test_dataloader"), EVALUATES),
    "_get_eval_sampler": EVALUATES,
    "create_optimizer_and_scheduler": "override create_optimizer and create_scheduler",
    "create_model_card": "override push_to_hub",
    "_save": "override write_encoder",
    "_push_from_checkpoint": "override push_folder",
}


def is_overridden(kind: type, base: type, hook: str) -> bool:
    """Whether a class has another version of a method than its base."""
    return getattr(kind, hook) is not getattr(base, hook)


def check_interface(kind: type, base: type, args: Any, given: Mapping[str, Any]) -> None:
    """Check what the trainer is constructed with.

    Args:
        kind: Its class.
        base: `FMICLTrainer`.
        args: Training arguments.
        given: All arguments by name.

    Raises:
        InputError: An argument of `transformers.Trainer`, or a method of a subclass, would not be used.
    """
    if not isinstance(args, FMICLTrainingArguments):
        raise InputError(
            "args must be FMICLTrainingArguments, which accepts all of transformers.TrainingArguments, got "
            f"{type(args).__name__}"
        )
    args.forget_choices()
    check_arguments(args)
    for name, instead in NOT_USED.items():
        own = getattr(given["model"], "tokenizer", None)
        if given[name] is not None and not (name in ("processing_class", "tokenizer") and given[name] is own):
            raise InputError(f"{name} is not used by {kind.__name__}: {instead}")
    if given["data_collator"] is not None and not callable(given["data_collator"]):
        got = type(given["data_collator"]).__name__
        raise InputError(f"data_collator must be a function, got {got}: pass training data as train_dataset=")
    if given["model"] is not None and given["model_init"] is not None:
        raise InputError("model and model_init are mutually exclusive")
    for name, instead in NOT_CALLED.items():
        evaluates = instead == EVALUATES and is_overridden(kind, base, "evaluate")
        if is_overridden(kind, base, name) and not evaluates:
            raise InputError(f"{kind.__name__}.{name} would not be called: {instead}")
    if given["loss"] is not None:
        defaults = {item.name: item.default for item in fields(args)}
        for name, value in args.loss_settings().items():
            if value != defaults[name]:
                raise InputError(f"{name}={value} has no effect because loss is passed: set it in the loss")


def check_arguments(args: FMICLTrainingArguments) -> None:
    """Raise `InputError` for values that were set after the arguments were made, and are out of range."""
    try:
        args.output_dir = args.output_dir or f"runs/{args.objective_name}"
        args.check_ranges()
        args.build_loss()
    except ValueError as error:
        raise InputError(str(error)) from error


def set_evaluation_batch(args: FMICLTrainingArguments, evaluator: Any) -> None:
    """Give the batch size for evaluation to the evaluator.

    Raises:
        InputError: The evaluator has none, so that the argument would have no effect.
    """
    if args.per_device_eval_batch_size is None:
        return
    if not hasattr(evaluator, "batch_size"):
        raise InputError(
            f"per_device_eval_batch_size={args.per_device_eval_batch_size} has no effect: the evaluator has no "
            "batch_size"
        )
    evaluator.batch_size = args.per_device_eval_batch_size
