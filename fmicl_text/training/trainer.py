"""FMICLTrainer: transformers' Trainer for losses on pairs of embeddings."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from numbers import Number
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import BestRun, IntervalStrategy, TrainOutput

from fmicl_text.errors import InputError
from fmicl_text.evaluation.sharing import all_processes
from fmicl_text.files import DISK_FULL, is_disk_full, move_files
from fmicl_text.hub.model_card import write_card
from fmicl_text.hub.run_record import run_record, scores_at
from fmicl_text.hub.upload import BackgroundPush, create_repository, push
from fmicl_text.losses.contrastive import ContrastiveLoss
from fmicl_text.model import ContrastiveModel, split_rows
from fmicl_text.processes import check_processes
from fmicl_text.text.model import TextContrastiveModel, build_text_encoder
from fmicl_text.training.args import LENGTH_STRATEGIES, FMICLTrainingArguments
from fmicl_text.training.cached_step import cached_step
from fmicl_text.training.calibration import CalibrationCallback, warn_of_little_repulsion
from fmicl_text.training.callbacks import (
    ClearCallback,
    CollapseMonitor,
    FiniteCheckCallback,
    LookCallback,
    NonFiniteError,
    PushCallback,
    ResumeCallback,
    SetEpochCallback,
    SkippedStepsCallback,
)
from fmicl_text.training.checkpoint import STATE, UNFINISHED
from fmicl_text.training.checkpointer import Checkpointer
from fmicl_text.training.epochs import for_live_workers
from fmicl_text.training.interface import check_arguments, check_interface, is_overridden, set_evaluation_batch
from fmicl_text.training.metrics import TrainingMetrics
from fmicl_text.training.output_dir import REPLACED, OutputDir, create_folder, remove_empty
from fmicl_text.training.parts import Parts, keep_statistics, without_ddp
from fmicl_text.training.sampler import SeededLengthSampler
from fmicl_text.training.search import check_search, default_space, metric_objective, search_state, trial_state
from fmicl_text.training.signals import GracefulStop
from fmicl_text.training.verdict import ScoreRecord, Scores, StepZeroCallback, Verdict

READ_ONCE = ("early_stopping_patience", "per_device_eval_batch_size")  # when the trainer is made
MEASURED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # follow metric_for_best_model


class FMICLTrainer(Trainer):
    """Trains an encoder on batches [examples, views, ...], with one forward pass for all views.

    >>> from fmicl_text import FMICLTrainer, FMICLTrainingArguments, build_text_encoder
    >>> encoder = build_text_encoder("bert-base-uncased")                         # doctest: +SKIP
    >>> args = FMICLTrainingArguments("runs/js", divergence="js")                 # doctest: +SKIP
    >>> FMICLTrainer(encoder, args, train_dataset=["A sentence.", ...]).train()   # doctest: +SKIP

    Args:
        model: A `SentenceTransformer`, its name or folder, or a `ContrastiveModel` (an encoder with a head, such as
            `TextContrastiveModel` or `ImageContrastiveModel`).
        args: The objective, its hyperparameters, and all of `transformers.TrainingArguments`.
        data_collator: Maps rows to {tensors [B, V, ...], text_ids [B, V]}, such as `text.TextViewCollator`.
        train_dataset: For text: a list of texts, of pairs or of triplets, or a `datasets.Dataset` with such columns;
            for other modalities or with a `data_collator`: rows for the collator.
        model_init: Instead of `model`, a function without arguments or of a trial that returns one. Called by every
            `train`; see `transformers.Trainer`.
        evaluator: Any callable that maps the encoder to a dict of numbers or to a number, such as an evaluator of
            sentence-transformers, `evaluation.STSEvaluator` or a function. Metrics are logged as `eval_<name>`.
        loss: A `ContrastiveLoss`, instead of the objective in the arguments.
        views: Maps inputs [B, ...] and a generator to views [B, V, ...], computed on the device, such as
            `vision.ImageViews` and `text.TextViews`. By default those of the collator, if it has some; for texts
            without a `data_collator`, `text.views.choose_views` chooses.
        tokenizer: Not supported, as are the other arguments of `transformers.Trainer` in `NOT_USED`. The error names
            what to pass instead.
        callbacks: See `transformers.Trainer`.
        optimizers: See `transformers.Trainer`.
        optimizer_cls_and_kwargs: See `transformers.Trainer`.

    Every forward pass draws its dropout masks from a generator seeded by (seed, step, micro-step, process,
    mini-batch): processes differ, a resumed run repeats them, and with `mini_batch_size` so does the second pass. See
    `Parts` for a run that is resumed with another number of processes.

    Logged with each loss, as means since the last log: loss_positive and loss_negative (their sum is the loss, over the
    rows of all processes unless global_batch is none), and for this process's batches, with dropout, after the head:
    alignment, uniformity, mutual_information (an estimate of a lower bound, in nats), effective_rank and mean_cosine
    (on the first 512 rows; the last three for the last batch), the throughput, and the number of skipped steps, if any.

    `train(resume_from_checkpoint=...)` takes a folder, or True or "auto" for the latest valid checkpoint ("auto" starts
    from scratch if there is none). On SIGTERM, SIGINT and SIGHUP all processes finish the same step, save a checkpoint
    and raise `Interrupted`.

    Attributes:
        metadata: Facts for the model card and the run record that the trainer cannot know; see `hub.run_record`.
        scores: Those of the evaluator's last call.
        verdict: Whether training made the encoder better; None without an evaluator or `load_best_model_at_end`.
    """

    # The base class would assume that a model whose forward accepts **kwargs scales its own loss, and would not divide
    # the loss by the accumulation steps.
    loss_is_scaled_for_ga = False

    model: ContrastiveModel
    args: FMICLTrainingArguments

    def __init__(
        self,
        model: ContrastiveModel | SentenceTransformer | str | None = None,
        args: FMICLTrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., Any] | None = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Any = None,
        *,
        evaluator: Callable[[Any], Mapping[str, float] | float] | None = None,
        loss: ContrastiveLoss | None = None,
        views: Callable[[Any, torch.Generator], Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        given = dict(locals())
        args = FMICLTrainingArguments() if args is None else args
        check_interface(type(self), FMICLTrainer, args, given)
        check_processes(args)
        if views is not None and not callable(views):
            raise InputError(f"views must be a callable such as TextViews, got {views!r:.80}")
        if args.eval_strategy != "no" and evaluator is None and not is_overridden(type(self), FMICLTrainer, "evaluate"):
            strategy = IntervalStrategy(args.eval_strategy).value
            raise InputError(f"eval_strategy={strategy} needs an evaluator; pass one, or eval_strategy='no'")
        self.model_init: Any = model_init
        self.raw_dataset = train_dataset if data_collator is None else None
        self.given_views = views
        self.train_dataset: Any = train_dataset
        self.shared_epoch = torch.zeros((), dtype=torch.long).share_memory_()  # for workers that live on
        self.data_collator: Any = data_collator
        if model_init is None:
            module: Any = self.with_data(model)
        elif optimizers != (None, None):
            raise InputError("optimizers cannot be used with model_init, which makes new weights for every training")
        else:
            set_seed(args.seed)
            module = self.call_model_init()
        self.args = args
        self.check_batch()
        self.loss_is_given = loss is not None
        self.choose_negatives()
        self.loss_settings = args.loss_settings()
        self.loss: ContrastiveLoss = args.build_loss() if loss is None else loss
        set_evaluation_batch(args, evaluator)
        if (counted := args.include_num_input_tokens_seen) != "no" and module.unit != "tokens":
            raise InputError(f"include_num_input_tokens_seen={counted} does not apply to {module.unit}")
        if counted != "no" and self.views is not None:  # the base class counts tokens before the views are made
            raise InputError(f"include_num_input_tokens_seen={counted} does not apply to views of texts")
        self.values_before_search: dict[str, Any] = {}
        self.trial_names: set[str] = set()
        self.evaluator = evaluator
        self.metadata: dict[str, Any] = {}
        self.scores: Scores | None = None
        self.verdict: Verdict | None = None
        self.step_zero = StepZeroCallback(self, is_overridden(type(self), FMICLTrainer, "evaluate"))
        self.metrics = TrainingMetrics()
        self.checkpointer = Checkpointer(self)
        self.output_dir = OutputDir(args)
        self.graceful_stop = GracefulStop(self)
        self.background_push: BackgroundPush | None = None
        self.length_sampler: SeededLengthSampler | None = None
        self.losses: list[Tensor] = []  # of this step's micro-batches, divided by their number
        self.grad_norm: Any = None
        self.last_views: tuple[Tensor, Tensor] | None = None
        self.finite_loss = torch.zeros((), device=args.device)
        self.micro_step = 0
        self.parts = Parts(args.train_batch_size)
        self.views_checked = False
        self.measured_gamma: float | None = None
        self.measured_alpha: float | None = None
        self.optimizer_is_given = optimizers[0] is not None
        new_folders = create_folder(args.output_dir)  # the base class would fail for a link to a missing folder
        try:
            super().__init__(
                model=module,
                args=args,
                train_dataset=self.train_dataset,
                eval_dataset=[],  # required by the base class to evaluate
                data_collator=self.data_collator,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            )
        except (ValueError, RuntimeError, ImportError) as error:  # arguments that do not go together
            raise InputError(" ".join(str(error).split())) from error
        finally:
            remove_empty(new_folders)  # until training begins
        self.model_init = model_init  # the base class would build the model again
        if args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        for callback in (
            *(
                self.step_zero,
                ClearCallback(self),
                SetEpochCallback(self),
                ResumeCallback(self),
                CalibrationCallback(self),
                FiniteCheckCallback(self),
                SkippedStepsCallback(),
                ScoreRecord(),
            ),
            *(CollapseMonitor(), LookCallback(self), PushCallback(self), self.graceful_stop),
        ):
            self.add_callback(callback)
        self.check_engine()
        self.model.skips_padding = not (args.torch_compile or self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self.read_once = {name: getattr(args, name) for name in READ_ONCE}

    @property
    def views(self) -> Callable[[Any, torch.Generator], Any] | None:
        """What makes the views of a batch: the argument, or that of the collator; None if the collator makes them."""
        return getattr(self.data_collator, "views", None) if self.given_views is None else self.given_views

    @property
    def skipped_steps(self) -> SkippedStepsCallback:
        """The counter; the base class replaces it when it resumes from a checkpoint."""
        return next(one for one in self.callback_handler.callbacks if isinstance(one, SkippedStepsCallback))

    @property
    def score_record(self) -> ScoreRecord:
        """The scores for the verdict; replaced likewise."""
        return next(one for one in self.callback_handler.callbacks if isinstance(one, ScoreRecord))

    def check_engine(self) -> None:
        """Raise `InputError` for a launcher configuration that this trainer or this machine does not support."""
        if self.args.n_gpu > 1:
            raise InputError(
                f"one process sees {self.args.n_gpu} GPUs and cannot split a contrastive batch across them: start one "
                f"process per GPU with `accelerate launch --multi_gpu --num_processes {self.args.n_gpu}`"
            )
        if self.accelerator.mixed_precision == "fp16" and self.args.device.type == "cpu":
            raise InputError("mixed precision fp16 needs a GPU; on a CPU use bf16=True or no mixed precision")
        for engine, enabled in {"FSDP": self.is_fsdp_enabled, "DEEPSPEED": self.is_deepspeed_enabled}.items():
            if os.environ.get(f"ACCELERATE_USE_{engine}") == "true" and not enabled:
                got = self.accelerator.distributed_type.value
                raise InputError(f"{engine} was requested, but on {self.args.device.type} accelerate provides {got}")
        if self.is_fsdp_enabled and (self.args.load_best_model_at_end or self.args.resume_from_checkpoint):
            raise InputError(
                "loading a checkpoint is not supported with FSDP: set load_best_model_at_end=False and do not pass "
                "resume_from_checkpoint"
            )
        engine = self.accelerator.distributed_type
        for hook in ("compute_loss", "compute_loss_context_manager"):
            if self.args.mini_batch_size is not None and is_overridden(type(self), FMICLTrainer, hook):
                raise InputError(
                    f"mini_batch_size={self.args.mini_batch_size} is not supported with a {hook} of your own, which "
                    "sees the whole batch: override compute_loss_from_embeddings, or pass loss"
                )
        if self.args.mini_batch_size is not None and engine in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise InputError(
                f"mini_batch_size={self.args.mini_batch_size} is not supported with {engine.value}, because it needs "
                "several backward passes per step; use plain processes (DDP)"
            )

    def with_data(self, model: Any) -> ContrastiveModel:
        """A model as `ContrastiveModel`, the data and the collator prepared for it, if the trainer is given none."""
        model = contrastive_model(model)
        if self.raw_dataset is not None:
            self.train_dataset, self.data_collator = model.prepare_data(self.raw_dataset, self.given_views)
        return model

    def call_model_init(self, trial: Any = None) -> Any:
        """As in the base class, for models of all kinds that the trainer accepts."""
        try:
            model = super().call_model_init(trial)
        except RuntimeError as error:
            if "model_init should" not in str(error):
                raise
            raise InputError(str(error)) from error
        return self.with_data(model)

    def check_batch(self) -> None:
        """Raise `InputError` if the training data are fewer than one batch."""
        rows, batch = self.train_dataset, self.args.train_batch_size * self.args.world_size
        if isinstance(rows, Sized) and len(rows) < batch:
            raise InputError(
                f"{len(rows)} training examples are fewer than one batch of {batch}: reduce per_device_train_batch_size"
            )

    def choose_negatives(self) -> None:
        """Choose the negatives of pairs, unless the arguments or a given loss have some."""
        if not self.loss_is_given and num_columns(self.data_collator) > 1:
            self.args.choose_negatives_of_pairs()

    def update_arguments(self) -> None:
        """Check arguments that have changed since the trainer was made, and use them.

        Raises:
            InputError: A value is out of range, or only read when the trainer is made.
        """
        check_arguments(self.args)
        for name, value in self.read_once.items():
            if (now := getattr(self.args, name)) != value:
                raise InputError(f"{name}={now} has no effect now: set it before the trainer is made")
        self._train_batch_size = self.parts.size = self.args.train_batch_size
        self.check_batch()
        self.update_loss()

    def update_loss(self) -> None:
        """Build the loss again if the arguments have changed since it was built."""
        self.choose_negatives()
        settings = self.args.loss_settings()
        if not self.loss_is_given and settings != self.loss_settings:
            self.loss, self.loss_settings = self.args.build_loss(), settings
            self.measured_gamma = self.measured_alpha = None  # numbers of the new loss are given

    # Training

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], Any] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        backend: Any = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """Search hyperparameters with optuna; see `transformers.Trainer.hyperparameter_search`. `model_init` is
        optional. Every trial starts from the weights that the trainer has now and trains in its own folder,
        `run-<number>` in `output_dir`. After the search, weights and arguments are as before it.

        Args:
            hp_space: Maps a trial to values of training arguments, such as {"alpha": trial.suggest_float(...)}. By
                default, the learning rate and the numbers of the loss (not those that are "auto"), from a tenth to ten
                times their present values.
            compute_objective: Maps metrics to the number that is optimized; by default `metric_for_best_model` of the
                weights that a trial ends with.
            n_trials: Number of trials.
            direction: "maximize" or "minimize". By default as `greater_is_better` says; required with
                `compute_objective`.
            backend: "optuna", or None.
            hp_name: Maps a trial to the name of its folder.
            **kwargs: Options of `optuna.create_study` and `Study.optimize`. A trial with a non-finite loss fails, and
                the search continues.

        Raises:
            InputError: An argument is not supported, or a trial changes something without effect.
        """
        check_search(self, backend, kwargs)
        if self.evaluator is None and not is_overridden(type(self), FMICLTrainer, "evaluate"):
            raise InputError("hyperparameter_search needs an evaluator")
        if compute_objective is None:
            compute_objective, improving = metric_objective(self)
            direction = direction or improving
            if direction != improving:
                raise InputError(
                    f"direction={direction} would search for the worst value of "
                    f"metric_for_best_model={self.args.metric_for_best_model}; it must be {improving}"
                )
        elif direction is None:
            raise InputError("direction is required with compute_objective: maximize or minimize")
        if self.args.world_size == 1:
            kwargs.setdefault("catch", (NonFiniteError,))
        self.trial_names = set()
        with search_state(self):
            try:
                return super().hyperparameter_search(
                    hp_space or default_space(self), compute_objective, n_trials, direction, "optuna", hp_name, **kwargs
                )
            except ValueError as error:
                if "No trials are completed" not in str(error):
                    raise
                raise InputError("no trial of the search was completed: all had a non-finite loss") from error

    def _get_output_dir(self, trial: Any) -> str:
        """The folder of this training: that of the trial, during one."""
        return str(self.args.output_dir)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """See `transformers.Trainer.train`. A finished run that is resumed only loads its final weights.

        With `load_best_model_at_end` and an evaluator, the encoder before training is evaluated too, and the run ends
        with it unless the best step is better by more than the noise; `best_global_step` is then 0. See `verdict`.

        Raises:
            InputError: The checkpoint does not exist, is corrupted, or belongs to a run with other data or batches, or
                to a finished run with other settings; the output folder contains another run, or another process trains
                into it; a DataLoader worker was killed; or there is too little space on the disk.
            NonFiniteError: The loss or a gradient is not finite.
            Interrupted: After a signal; a checkpoint was saved.
        """
        with trial_state(self, trial), self.hold_output_dir(resume_from_checkpoint):
            self.verdict = None
            checkpoint = self.checkpointer.choose(resume_from_checkpoint)
            if checkpoint is not None:
                max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
                if self.checkpointer.is_done(checkpoint, max_steps):
                    return self.load_finished(checkpoint)
            try:
                with self.graceful_stop.handle_signals():
                    path = None if checkpoint is None else str(checkpoint)
                    output = super().train(path, trial, ignore_keys_for_eval)
            except InputError as error:
                if "DataLoader worker" not in str(error):
                    raise
                reason = str(error).strip().splitlines()[-1].partition("InputError: ")[2]  # after its traceback
                raise InputError(reason) from error
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker (pid"):
                    raise
                reason = " ".join(str(error).split()).rstrip(".")
                raise InputError(
                    f"{reason}; if memory ran out, reduce dataloader_num_workers or dataloader_prefetch_factor"
                ) from error
            except UnpicklingError as error:  # a file that matches the manifest but has invalid content
                raise InputError(f"{checkpoint} cannot be read: a file is corrupted or contains code") from error
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
                self.state.best_global_step = self.state.global_step  # its checkpoint is missing
            self.step_zero.conclude()
            return output

    def hold_output_dir(self, resume_from_checkpoint: str | bool | None = None) -> AbstractContextManager[None]:
        """A context within which no other process trains into the output folder.

        Args:
            resume_from_checkpoint: As for `train`.

        Raises:
            InputError: Training would overwrite something, or another process is training into the folder.
        """
        return self.output_dir.hold(resume_from_checkpoint)

    def load_finished(self, checkpoint: Path) -> TrainOutput:
        """Load state and weights of the run that ended with this checkpoint, without training."""
        self.state = TrainerState.load_from_json(str(checkpoint / STATE))
        self._load_from_checkpoint(str(checkpoint))
        self.step_zero.restore()
        self.checkpointer.locate_best()
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self.checkpointer.load_best()
        self.step_zero.conclude()
        return TrainOutput(self.state.global_step, float("nan"), {})

    def get_train_dataloader(self) -> Any:
        """As in the base class; workers ignore signals that end training because the last step needs their batch, and
        the epoch reaches workers that live on."""
        if self.train_dataset is None:
            raise InputError("train_dataset is required to train")
        rows = self.train_dataset
        try:
            if self.args.dataloader_persistent_workers:
                self.train_dataset = for_live_workers(rows, self.shared_epoch)
            loader: Any = super().get_train_dataloader()
        finally:
            self.train_dataset = rows
        self.graceful_stop.workers.watch(getattr(loader, "base_dataloader", loader))
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """As in the base class, except for length-grouped batches, whose order it does not reproduce on resume."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy in LENGTH_STRATEGIES and "length" not in (getattr(dataset, "column_names", None) or []):
            raise InputError(f"train_sampling_strategy={strategy} needs text that is tokenized before training")
        if strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        lengths = dataset.with_format("numpy")["length"][:].tolist()
        self.length_sampler = SeededLengthSampler(
            batch, lengths, self.args.seed if self.args.data_seed is None else self.args.data_seed
        )
        return self.length_sampler

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute the gradients of one micro-batch; returns its loss divided by the number of micro-batches."""
        with self.explain_out_of_memory(), torch.random.fork_rng(devices=[]):  # samplers use the global random state
            self.parts.clear()
            inputs = self.make_views(self._prepare_inputs(inputs))
            self.metrics.count_inputs(self.model.unit, self.model.count(inputs))
            if self.args.mini_batch_size is None:
                self.seed_dropout()
                loss = super().training_step(model, inputs, num_items_in_batch)
            else:
                loss = self.cached_training_step(model, inputs)
        self.micro_step += 1
        self.losses.append(loss)
        if self.args.skip_nonfinite:  # the logged mean covers only the steps that were taken
            self.finite_loss = torch.where(loss.isfinite(), loss, self.finite_loss)
            return self.finite_loss.clone()
        return loss

    def make_views(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch whose inputs [B, ...] are replaced by views [B, V, ...], if the trainer has `views`."""
        if self.views is None:
            return inputs
        device = next(iter(inputs.values())).device

        def views_of(part: dict[str, Any], k: int) -> dict[str, Any]:
            generator = torch.Generator(device).manual_seed(self.step_seed(part=k))
            return self.model.make_views(self.views, part, generator)

        parts = self.parts.split(self.model, inputs)
        return self.model.join([views_of(part, k) for k, part in enumerate(parts)])

    def cached_training_step(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Like `training_step`, in mini-batches of `mini_batch_size` examples; see `cached_step`."""
        model.train()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):  # schedule-free optimizers
            optimizer.train()
        text_ids = inputs.pop("text_ids", None)
        size = int(self.args.mini_batch_size or 0)
        mini_batches = [
            (mini_batch, k, i)
            for k, part in enumerate(self.parts.split(self.model, inputs))
            for i, mini_batch in enumerate(split_rows(part, size))
        ]

        def embed(mini_batch: dict[str, Tensor], k: int, i: int) -> Tensor:
            self.seed_dropout(i, k)  # the same masks in both passes
            return self.embed_part(model, mini_batch, k)

        return cached_step(
            mini_batches,
            embed,
            lambda views: self.compute_loss_from_embeddings(views, text_ids) / self.current_gradient_accumulation_steps,
            self.accelerator.backward,
            lambda: self.accelerator.no_sync(model),
        )

    def step_seed(self, *more: int, part: int = 0) -> int:
        """A seed determined by (seed, step, micro-step, index of a part in the batch of all processes, *more)."""
        part += self.args.process_index * self.parts.number(self.args.train_batch_size)
        where = [self.args.seed, self.state.global_step, self.micro_step, part, *more]
        return int(np.random.SeedSequence(where).generate_state(1, np.uint64)[0])

    def seed_dropout(self, mini_batch: int = 0, part: int = 0) -> None:
        """Seed the dropout masks of the next forward pass."""
        on_cpu = self.args.device.type == "cpu"  # there torch.manual_seed takes 0.8 ms, for devices that are absent
        seed_all = torch.default_generator.manual_seed if on_cpu else torch.manual_seed
        seed_all(self.step_seed(mini_batch, part=part))

    def embed(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Embeddings [B, V, D] of a batch [B, V, ...], in one forward pass; after a change of the number of processes
        possibly in several, see `Parts`."""
        parts = self.parts.split(self.model, inputs)
        if len(parts) > 1:
            embeddings = []
            for k, part in enumerate(parts):
                with self.parts.random_state(k, partial(self.seed_dropout, part=k), self.args.device):
                    embeddings.append(self.embed_part(model, part, k))
            return torch.cat(embeddings)
        shape = next(iter(inputs.values())).shape[:2]
        if compiled := self.args.torch_compile:
            inputs = self.model.pad(inputs)
        embeddings = model({name: value.flatten(0, 1) for name, value in inputs.items()}).unflatten(0, shape)
        return embeddings.clone() if compiled else embeddings  # the next call of a CUDA graph overwrites its output

    def embed_part(self, model: nn.Module, inputs: dict[str, Tensor], k: int) -> Tensor:
        """Embeddings [B, V, D] of the k-th part of a batch."""
        if k == 0:
            return self.embed(model, inputs)
        with keep_statistics(model):
            return self.embed(without_ddp(model), inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch. accelerate's autocast covers the model's forward pass only; the loss is float32."""
        text_ids = inputs.pop("text_ids", None)
        embeddings = self.embed(model, inputs)
        loss = self.compute_loss_from_embeddings(embeddings.unbind(1), text_ids)
        return (loss, {"embeddings": embeddings}) if return_outputs else loss

    def compute_loss_from_embeddings(
        self, views: Sequence[Tensor], text_ids: Tensor | None = None, queue: Tensor | None = None
    ) -> Tensor:
        """The loss of V views [B, D], with its terms recorded for the log.

        Args:
            views: x, y and K >= 0 hard negatives.
            text_ids: [B, V], equal where texts are equal.
            queue: Negatives [K, D], for MoCo.
        """
        x, y, *hard = views
        negatives = torch.stack(hard, dim=1) if hard else None
        terms = self.loss.terms(x, y, negatives, text_ids, queue)
        self.last_views = x.detach(), y.detach()
        if not self.views_checked:
            self.check_views(x, y)
            if getattr(self.loss, "alpha", None) != self.measured_alpha:
                warn_of_little_repulsion(self.loss, x, y, negatives, text_ids, queue)
            self.views_checked = True
        if not self.args.skip_nonfinite or terms.loss.isfinite():
            self.metrics.add(terms, x, y, text_ids)
        return terms.loss

    def loss_arguments(
        self, model: nn.Module, inputs: dict[str, Tensor], past: list[Tensor]
    ) -> list[tuple[Tensor | None, ...]]:
        """The arguments (x, y, hard_negatives, text_ids, queue) of each call of the loss in one training step, without
        gradient, from which gamma and alpha are measured.

        Args:
            model: As for `compute_loss`.
            inputs: As for `compute_loss`.
            past: Empty at the first batch; for what later batches need, such as negatives of a queue.
        """
        text_ids = inputs.pop("text_ids", None)
        size = self.args.mini_batch_size or self.args.train_batch_size
        x, y, *hard = torch.cat([self.embed(model, part) for part in split_rows(inputs, size)]).unbind(1)
        return [(x, y, torch.stack(hard, dim=1) if hard else None, text_ids, None)]

    def check_views(self, x: Tensor, y: Tensor) -> None:
        """Warn if the two views of the first batch are identical: positives then have no gradient."""
        if torch.equal(x, y):
            reason = (
                "both views of every text are identical because the model has no dropout (ModernBERT's default, for "
                "example): set dropout=0.1 in build_text_encoder or in the recipe, use other views (crops, repeat, "
                "delete), or train on pairs of texts"
            )
            if self.model.modality == "image":
                reason = (
                    "both views of every image have the same embedding: the encoder does not distinguish images, or "
                    "the augmentation does not change them"
                )
            warnings.warn(reason, stacklevel=2)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Record the norm for `FiniteCheckCallback`, because clipping hides an overflow before callbacks run."""
        self.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.grad_norm

    @contextmanager
    def explain_out_of_memory(self) -> Iterator[None]:
        """Convert an out-of-memory error into one line that names the options that help."""
        try:
            yield
        except RuntimeError as error:  # includes torch.OutOfMemoryError
            if not isinstance(error, torch.OutOfMemoryError) and "t allocate memory" not in str(error):
                raise
            batch, mini_batch, block = self.args.train_batch_size, self.args.mini_batch_size, self.args.block_size
            blocks = f", block_size (now {block or 'automatic'}) splits the loss into smaller blocks"
            raise InputError(
                f"out of memory at step {self.state.global_step + 1}: mini_batch_size (now {mini_batch or batch}) "
                f"splits the batch of {batch}{blocks if self.args.objective != 'infonce' else ''}; the result does not "
                "change"
            ) from error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the base class, with the training metrics next to the loss."""
        if "loss" in logs:
            logs |= self.metrics.take(self.loss) | self.skipped_steps.counts()
        super().log(logs, start_time)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As in the base class. A schedule that follows the evaluations waits for the metric to rise or to fall as
        `greater_is_better` says, unless `lr_scheduler_kwargs` has a mode."""
        args, given = self.args, dict(self.args.lr_scheduler_kwargs or {})  # type: ignore[arg-type]
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        if kind not in MEASURED_SCHEDULES or "mode" in given or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        choose_metric(args, self.evaluator)
        if args.metric_for_best_model == "loss" and self.evaluator is not None:
            self.run_evaluator()  # the first call may name the metric
        before = args.lr_scheduler_kwargs
        args.lr_scheduler_kwargs = given | {"mode": "max" if args.greater_is_better else "min"}
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        finally:
            args.lr_scheduler_kwargs = before

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the encoder, without head and dropout, with the evaluator. Logs and returns the metrics.

        The base class's loop would report the loss, which is not meaningful without dropout, and its DataLoader would
        draw from the random state, so that evaluating would change the training that follows."""
        if eval_dataset is not None or self.evaluator is None:
            raise InputError(
                "evaluate() runs the trainer's evaluator: pass evaluator= to the trainer, not eval_dataset="
            )
        metrics = self.run_evaluator(metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported."""
        raise InputError(
            "predict is not supported: encode inputs with the encoder, as trainer.model.encoder.encode(texts)"
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: it would replace the card by one that knows nothing about the run."""
        raise InputError(
            "create_model_card is not supported: push_to_hub writes the card, as hub.model_card.write_card"
        )

    def run_evaluator(self, prefix: str = "eval") -> dict[str, float]:
        """Evaluate the encoder with the evaluator, without logging. Returns the metrics.

        Raises:
            InputError: The evaluator returned something other than numbers, or metric_for_best_model is not among them.
        """
        evaluator: Any = self.evaluator
        # In a layer of sharded weights processes wait for each other, so all need as many batches.
        sharded = self.is_deepspeed_enabled or any(isinstance(one, FSDPModule) for one in self.model.modules())
        shared = all_processes(not sharded)
        with self.unsharded_parameters(), self.metrics.pause(), torch.random.fork_rng(devices=[]), shared:
            measured = evaluator(self.model.encoder)
        choose_metric(self.args, evaluator)
        measured = {"score": measured} if isinstance(measured, Number) else measured
        try:
            if not isinstance(measured, Mapping) or not all(isinstance(one, Number) for one in measured.values()):
                raise TypeError
            measured = {str(name): float(value) for name, value in measured.items()}
        except (TypeError, OverflowError) as error:
            raise InputError(f"evaluator must return a dict of numbers or a number, got {measured!r:.200}") from error
        if self.args.world_size > 1:  # rounding must not affect early stopping and the best checkpoint
            (measured,) = broadcast_object_list([measured])
        metrics = {f"{prefix}_{name}": value for name, value in measured.items()}
        wanted = str(self.args.metric_for_best_model).removeprefix("eval_")
        if self.args.metric_for_best_model and f"{prefix}_{wanted}" not in metrics:
            known = ", ".join(name.removeprefix(f"{prefix}_") for name in metrics)
            raise InputError(f"metric_for_best_model={wanted} is not available; choose one of {known}")
        self.scores = self.step_zero.scores_of(measured)
        return metrics

    @contextmanager
    def unsharded_parameters(self) -> Iterator[None]:
        """Within this context, the encoder has its full weights. FSDP gathers the sharded weights only in calls of the
        model, not of the encoder alone."""
        model: Any = self.model
        if not isinstance(model, FSDPModule):
            yield
            return
        model.unshard()
        try:
            yield
        finally:
            model.reshard()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """With save_strategy="best" the base class saves only if this is True; a pending signal needs a checkpoint.

        A new best step is saved even if no save is due, because its weights could not be loaded at the end."""
        is_new_best = super()._determine_best_metric(metrics, trial)
        if is_new_best and self.args.load_best_model_at_end:
            self.control.should_save = True
            self.score_record.best = None if self.scores is None else dict(vars(self.scores))
        return is_new_best or self.graceful_stop.stopped_by != 0

    # Saving and loading

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Save atomically. In the base class, an interrupted write leaves a folder that looks like a checkpoint."""
        self.checkpointer.save()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load all weights. The base class expects a single state dict, which checkpoints do not contain."""
        self.step_zero.keep_weights()
        self.model.load_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Load the best checkpoint, unless it is corrupted."""
        self.checkpointer.load_best()

    def resume_signature(self) -> dict[str, Any]:
        """Everything that a resumed run must share with this one; subclasses add their own settings."""
        return self.checkpointer.resume_signature()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the encoder into a folder, whose files are replaced only when all new ones are complete.

        Raises:
            InputError: Without `output_dir`: another process is training into the trainer's folder, or it contains
                another run or model. The disk is full.

        The base class would write the wrapper's state dict, and a pickle of the arguments that can contain a token."""
        if output_dir is None and not self.output_dir.held:
            with self.output_dir.hold(None, check=not _internal_call):
                return self.save_model(None, _internal_call)
        place = Path(str(output_dir or self.args.output_dir))
        temporary = place / UNFINISHED / f"encoder-{os.getpid()}"
        try:
            self.write_encoder(temporary)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            remove_empty([temporary.parent, temporary.parent.parent])
            if is_disk_full(error):
                raise InputError(f"{place} could not be written: {DISK_FULL}") from error
            if isinstance(error, NotADirectoryError | FileExistsError | PermissionError):
                raise InputError(f"{place} could not be written: {error.strerror}") from error
            raise
        if self.args.should_save:
            move_files(temporary, place)
            (place / REPLACED).unlink(missing_ok=True)
            remove_empty([temporary.parent, temporary.parent.parent])
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()

    def write_encoder(self, folder: Path, training_only: bool = False) -> None:
        """Write the encoder into a folder. Every process must call this: engines gather sharded weights.

        Args:
            folder: Created if necessary.
            training_only: Also write the weights that are not exported (head, momentum encoder), for a checkpoint.

        Raises:
            NonFiniteError: A weight is NaN or infinity; nothing was written.
        """
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        wrapped: Any = self.model_wrapped
        state = self.accelerator.get_state_dict(wrapped) if sharded else self.model.state_dict()
        if not self.args.should_save:
            return
        broken = [name for name, weight in state.items() if not weight.isfinite().all()]
        if broken:
            raise NonFiniteError(f"step {self.state.global_step}: {broken[0]} is not finite; nothing was written")
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_encoder(str(folder), state)
        if training_only:
            self.model.save_training_only(str(folder), state)

    # Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository that `push_to_hub` writes to, before training, so that a wrong name or a missing token
        or permission is found early."""
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
            private = self.args.hub_private_repo if private is None else private
            self.hub_model_id: Any = create_repository(name, private, exist_ok=True, token=token)
            self.background_push = BackgroundPush()

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str | None:
        """Save the encoder and upload it with its model card. The head, the optimizer and the run record stay local.

        Returns:
            The URL of the commit; None in other processes, and if not blocking.

        Raises:
            HubError: The Hub could not be reached or rejected the upload. If not blocking, this is logged as a warning.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder, state = Path(str(self.args.output_dir)), self.state
        ended_with_the_best = self.args.load_best_model_at_end and 0 < state.max_steps <= state.global_step
        step = state.best_global_step if ended_with_the_best else state.global_step
        return self.push_folder(folder, commit_message or "Upload encoder", step or 0, blocking, revision, token)

    def push_folder(
        self,
        folder: Path,
        message: str,
        step: int,
        blocking: bool,
        revision: str | None = None,
        token: str | None = None,
    ) -> str | None:
        """Upload a folder that contains the encoder of a step, with a model card."""
        write_card(run_record(self, scores_at(self, step)), folder, self.hub_model_id)
        options: dict[str, Any] = {"message": message, "revision": revision or self.args.hub_revision, "token": token}
        options |= {"private": self.args.hub_private_repo, "exist_ok": True}
        options |= {"trust_remote_code": bool(getattr(self.model.encoder, "trust_remote_code", False))}
        background: Any = self.background_push
        if blocking:
            background.wait()
            return push(folder, str(self.hub_model_id), **options)
        background.start(folder, str(self.hub_model_id), **options)
        return None


def contrastive_model(model: ContrastiveModel | SentenceTransformer | str) -> ContrastiveModel:
    """Convert the `model` argument of the trainer to a `ContrastiveModel`.

    Raises:
        InputError: The model is of another type.
    """
    if isinstance(model, ContrastiveModel):
        return model
    encoder = build_text_encoder(model) if isinstance(model, str) else model
    if not isinstance(encoder, SentenceTransformer):
        hint = "pass model or model_init" if model is None else "open it with build_text_encoder(name)"
        raise InputError(
            "model must be a SentenceTransformer, its name, or a ContrastiveModel such as ImageContrastiveModel, got "
            f"{type(model).__name__}: {hint}"
        )
    return TextContrastiveModel(encoder)


def num_columns(data_collator: Any) -> int:
    """The number of text columns of a collator; 0 if it has none."""
    return len(getattr(data_collator, "columns", ()))


def choose_metric(args: FMICLTrainingArguments, evaluator: Any) -> None:
    """Select the best checkpoint by an evaluator's primary metric, unless the arguments name a metric. Evaluators of
    sentence-transformers have one, which may be set by their first call."""
    primary = getattr(evaluator, "primary_metric", None)
    if primary and args.metric_for_best_model in (None, "loss"):
        args.choose(
            metric_for_best_model=primary, greater_is_better=bool(getattr(evaluator, "greater_is_better", True))
        )
