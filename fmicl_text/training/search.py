"""Hyperparameter search with the trainer: `transformers.Trainer.hyperparameter_search`, each trial as a run of its own.

Every trial has the loss of its hyperparameters and its own folder `run-<number>`, to which all protections of output
folders apply, and starts from the weights that the trainer had before the search.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.integrations import is_optuna_available
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import number_of_arguments

from fmicl_text.errors import InputError
from fmicl_text.training.callbacks import NonFiniteError
from fmicl_text.training.metrics import TrainingMetrics
from fmicl_text.training.output_dir import create_folder

if TYPE_CHECKING:
    from fmicl_text.training.trainer import FMICLTrainer

OPTIMIZER_ARGUMENTS = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim",
    "optim_args",
)
DIRECTIONS = {True: "maximize", False: "minimize"}  # by greater_is_better
RANGE = 10.0  # the default space is from value / RANGE to value * RANGE


def check_search(trainer: FMICLTrainer, backend: Any, options: Mapping[str, Any]) -> None:
    """Raise `InputError` for a search that this trainer cannot run."""
    backend = getattr(backend, "value", backend)
    if backend not in (None, "optuna"):
        raise InputError(f"backend={backend} is not supported; it must be optuna")
    if not is_optuna_available():
        raise InputError("hyperparameter_search requires optuna: pip install optuna")
    if options.get("n_jobs", 1) != 1:
        raise InputError(f"n_jobs={options['n_jobs']} is not supported: the trials share one trainer")
    if trainer.optimizer_is_given:
        raise InputError("hyperparameter_search builds an optimizer for each trial: do not pass optimizers")
    if trainer.args.push_to_hub:
        raise InputError("push_to_hub=True is not supported in hyperparameter_search: push the best encoder after it")


def default_space(trainer: FMICLTrainer) -> Callable[[Any], dict[str, float]]:
    """The learning rate and the numbers of the loss, from a tenth to ten times their present values. Numbers that an
    earlier training measured are measured again by every trial."""
    values = {} if trainer.optimizer_cls_and_kwargs else {"learning_rate": trainer.args.learning_rate}
    if not trainer.loss_is_given:
        found = trainer.loss.hyperparameters | {"tsallis_order": trainer.args.tsallis_order}
        for name, number in (("gamma", trainer.measured_gamma), ("alpha", trainer.measured_alpha)):
            if found.get(name) == number:
                found.pop(name, None)
        values |= {name: found[name] for name in trainer.args.loss_settings() if isinstance(found.get(name), float)}
    return lambda trial: {
        name: trial.suggest_float(name, value / RANGE, value * RANGE, log=True) for name, value in values.items()
    }


def metric_objective(trainer: FMICLTrainer) -> tuple[Callable[[Mapping[str, float]], float], str]:
    """The metric that selects checkpoints as the objective of a search, and the direction in which it improves. Runs
    the evaluator once, so that a mistake is found before the first trial.

    Raises:
        InputError: There are several metrics, and metric_for_best_model does not name one.
    """
    metrics, args = trainer.run_evaluator(), trainer.args
    name = args.metric_for_best_model or next(iter(metrics))
    if args.metric_for_best_model is None and len(metrics) > 1:
        known = ", ".join(key.removeprefix("eval_") for key in metrics)
        raise InputError(f"metric_for_best_model is required for hyperparameter_search; choose one of {known}")
    name = f"eval_{name.removeprefix('eval_')}"
    rises = not name.endswith("loss") if args.greater_is_better is None else args.greater_is_better
    return (lambda found: found[name]), DIRECTIONS[rises]


@contextmanager
def search_state(trainer: FMICLTrainer) -> Iterator[None]:
    """Within this context, the trainer's model can be built again. After it, model and arguments are as before."""
    model_init, trainer.values_before_search = trainer.model_init, {}
    if model_init is None:
        initial = copy.deepcopy(trainer.model)
        trainer.model_init = lambda: copy.deepcopy(initial)
    try:
        yield
    finally:
        vars(trainer.args).update(trainer.values_before_search)
        trainer.update_loss()
        reset_callbacks(trainer)
        trainer.model = trainer.model_wrapped = trainer.call_model_init()
        trainer._move_model_to_device(trainer.model, trainer.args.device)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.model_init, trainer.hp_search_backend, trainer.hp_name = model_init, None, None
        trainer._train_batch_size = trainer.args.train_batch_size
        trainer.create_accelerator_and_postprocess()


@contextmanager
def trial_state(trainer: FMICLTrainer, trial: Any) -> Iterator[None]:
    """Within this context, the trainer has the hyperparameters of a trial, and its folder as `output_dir`. The folder
    gets the trial's trainer_state.json, even if it was pruned or had a non-finite loss."""
    if trial is None or trainer.hp_search_backend is None:
        trainer.update_arguments()
        yield
        return
    from optuna import TrialPruned  # installed, since there is a trial

    apply_trial(trainer, trial)
    reset_callbacks(trainer)
    trainer.metrics = TrainingMetrics()
    if trainer.model is None:  # released after the previous trial
        trainer.model = trainer.call_model_init(trial)
    args = trainer.args
    parent = args.output_dir
    args.output_dir = str(trial_folder(trainer, trial))
    trainer.output_dir.used = None  # checked anew
    try:
        yield
        trainer.objective = trainer.compute_objective(
            dict(trainer.evaluate())
        )  # of the weights that training ends with
        trainer.save_state()
    except (TrialPruned, NonFiniteError):
        create_folder(args.output_dir)
        trainer.save_state()
        raise
    finally:
        args.output_dir = parent


def trial_folder(trainer: FMICLTrainer, trial: Any) -> Path:
    """The folder of a trial: its name from `hp_name`, else run-<number>, in the folder of the trainer."""
    name = f"run-{trial.number}" if trainer.hp_name is None else trainer.hp_name(trial)
    if not isinstance(name, str) or Path(name).name != name or name in trainer.trial_names:
        raise InputError(f"hp_name must return a different file name for each trial, got {name!r}")
    trainer.trial_names.add(name)
    return Path(str(trainer.args.output_dir)) / name


def apply_trial(trainer: FMICLTrainer, trial: Any) -> None:
    """Set the arguments to the hyperparameters of a trial, and build its loss. The base class also sets them, but after
    it has seeded the model, and with a cast that turns warmup_steps=0.1 into 0.

    Raises:
        InputError: A hyperparameter is out of range, or has no effect.
    """
    args = trainer.args
    vars(args).update(trainer.values_before_search)  # a value that only the previous trial set
    params = trainer.hp_space(trial)
    takes_trial = number_of_arguments(trainer.model_init) == 1  # and may read hyperparameters of its own from it
    if not isinstance(params, Mapping):
        raise InputError(f"hp_space must return a dict of arguments, got {type(params).__name__}")
    known = {item.name for item in fields(args)} - {"output_dir"}
    for name, value in params.items():
        if name not in known:
            if takes_trial and name != "output_dir":
                continue
            raise InputError(f"hp_space sets {name}, which is not an argument that a trial can change")
        if trainer.loss_is_given and name in args.loss_settings():
            raise InputError(f"hp_space sets {name}, which has no effect because loss was passed to the trainer")
        if trainer.optimizer_cls_and_kwargs and name in OPTIMIZER_ARGUMENTS:
            raise InputError(f"hp_space sets {name}, which has no effect because optimizer_cls_and_kwargs was passed")
        before = getattr(args, name)
        trainer.values_before_search.setdefault(name, before)
        try:
            setattr(args, name, type(before)(value) if isinstance(before, Enum) else value)
        except ValueError as error:
            raise InputError(f"trial {trial.number}: {name}: {error}") from error
    try:
        trainer.update_arguments()
    except ValueError as error:
        raise InputError(f"trial {trial.number}: {error}") from error


def reset_callbacks(trainer: FMICLTrainer) -> None:
    """Forget what callbacks have counted in an earlier training, such as evaluations without improvement."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ExportableState):
            vars(callback).update(vars(type(callback)(**callback.state()["args"])))
