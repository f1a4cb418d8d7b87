"""FMICLTrainer: transformers' Trainer for losses on pairs of embeddings."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Sampler

from fmicl_text.errors import InputError
from fmicl_text.model import ContrastiveModel
from fmicl_text.training.args import LENGTH_STRATEGIES, FMICLTrainingArguments
from fmicl_text.training.callbacks import CollapseMonitor, NonFiniteError, SkippedStepsCallback, describe_views
from fmicl_text.training.checkpoint import latest_valid_checkpoint
from fmicl_text.training.metrics import TrainingMetrics
from fmicl_text.training.position import LengthSampler, SetEpochCallback
from fmicl_text.training.resuming import ResumingTrainer


class FMICLTrainer(ResumingTrainer):
    """Trains a `ContrastiveModel` on batches [examples, views, ...] with one forward pass per step; with
    `mini_batch_size` with two, of which one keeps a graph of a mini-batch at a time (GradCache, arXiv 2101.06983).

    Dropout is drawn from a generator seeded by (seed, step, micro-step, process, mini-batch): processes differ, and a
    mini-batch's second pass repeats its first.

    Args:
        model: Encoder and head.
        args: Objective, its hyperparameters, and everything of `transformers.TrainingArguments`.
        train_dataset: Rows for the collator.
        data_collator: Rows to {token tensors [B, V, T], text_ids}, such as `text.collator.TextViewCollator`.
        views: Images [B, C, H, W] and a generator to views [B, V, C, S, S], such as `vision.views.ImageViews`, for
            batches of {images}: made on the device, from a generator seeded as dropout is.
        evaluator: Encoder to metrics, such as `evaluation.sts.STSEvaluator`; its `dataset` is what the base class
            asks for when it is to evaluate during training. Metrics are logged as `eval_<name>`.
        **kwargs: As for `transformers.Trainer`.

    Logged with each loss, as means since the last log: loss_positive and loss_negative (their sum is the loss, that of
    all processes' rows unless global_batch is none), and of this process's batches, with dropout, after the head,
    alignment, uniformity, effective_rank and mean_cosine (of the first 512 rows, the last two of the last batch), and
    tokens or images a second; and, once there is one, the number of steps left out because something was not finite
    (nonfinite_steps, and in fp16 overflow_steps). Warned of: a collapse, when it begins.
    """

    # The base class would take a model whose forward has **kwargs for one that scales its own loss, and skip the
    # division by the accumulation steps.
    loss_is_scaled_for_ga = False

    model: ContrastiveModel
    args: FMICLTrainingArguments

    def __init__(
        self,
        model: ContrastiveModel,
        args: FMICLTrainingArguments,
        train_dataset: Any = None,
        data_collator: Callable[..., Any] | None = None,
        evaluator: Any = None,
        views: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        if args.eval_strategy != "no" and evaluator is None:
            raise ValueError("evaluation during training needs an evaluator; or set eval_strategy='no'")
        batch = args.train_batch_size * args.world_size
        if isinstance(train_dataset, Sized) and len(train_dataset) < batch:
            raise InputError(f"{len(train_dataset)} training examples do not fill one batch of {batch}")
        self.loss = args.build_loss()
        self.evaluator = evaluator
        self.views = views
        self.metrics = TrainingMetrics()
        self.views_checked = False
        self.losses: list[Tensor] = []  # of this step's micro-batches
        self.last_views: tuple[Tensor, Tensor] | None = None
        self.finite_loss = torch.zeros((), device=args.device)
        self.micro_step = 0
        self.length_sampler: LengthSampler | None = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=getattr(evaluator, "dataset", None),
            data_collator=data_collator,
            **kwargs,
        )
        for callback in (SetEpochCallback(self), SkippedStepsCallback(), CollapseMonitor()):
            self.add_callback(callback)
        self.check_engine()

    @property
    def skipped_steps(self) -> SkippedStepsCallback:
        """The counter; the base class replaces it when it goes on from a checkpoint."""
        return next(one for one in self.callback_handler.callbacks if isinstance(one, SkippedStepsCallback))

    def resume_signature(self) -> dict[str, Any]:
        run = super().resume_signature() | self.model.describe_training() | getattr(self.views, "describe", dict)()
        return dict(json.loads(json.dumps(run, default=str)))  # as the manifest will give it back

    def check_engine(self) -> None:
        """InputError for what the launcher asked for and this trainer, or this machine, cannot do."""
        if self.args.n_gpu > 1:
            raise InputError(
                f"one process sees {self.args.n_gpu} GPUs and cannot split a contrastive batch over them: start one "
                f"process per GPU, accelerate launch --multi_gpu --num_processes {self.args.n_gpu}"
            )
        if self.accelerator.mixed_precision == "fp16" and self.args.device.type == "cpu":
            raise InputError("mixed precision fp16 needs a GPU; on a CPU bf16 (--bf16 True) or none")
        for engine, enabled in {"FSDP": self.is_fsdp_enabled, "DEEPSPEED": self.is_deepspeed_enabled}.items():
            if os.environ.get(f"ACCELERATE_USE_{engine}") == "true" and not enabled:
                got = self.accelerator.distributed_type.value
                raise InputError(f"{engine} was asked for, but on {self.args.device.type} accelerate gives {got}")
        if self.is_fsdp_enabled and (self.args.load_best_model_at_end or self.args.resume_from_checkpoint):
            raise InputError(
                "with FSDP a checkpoint cannot be read back into training here: --load_best_model_at_end False, no "
                "--resume_from_checkpoint"
            )
        engine = self.accelerator.distributed_type
        if self.args.mini_batch_size is not None and engine in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise InputError(
                f"--mini_batch_size {self.args.mini_batch_size} is not possible with {engine.value}: it takes several "
                "backward passes per step; use plain processes (DDP)"
            )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Gradients of one micro-batch; its loss divided by the number of micro-batches, as the base class has it."""
        with self.explain_out_of_memory(), torch.random.fork_rng(devices=[]):  # samplers draw from the state outside
            if self.args.mini_batch_size is None:
                self.seed_dropout()
                loss = super().training_step(model, inputs, num_items_in_batch)
            else:
                model.train()
                optimizer: Any = self.optimizer
                if callable(getattr(optimizer, "train", None)):  # schedule-free ones
                    optimizer.train()
                loss = self.cached_step(model, self._prepare_inputs(inputs))
        self.micro_step += 1
        if self.args.skip_nonfinite:  # the log's mean is one over the steps that were taken
            self.finite_loss = torch.where(loss.isfinite(), loss, self.finite_loss)
            return self.finite_loss.clone()
        return loss

    def step_seed(self, *more: int) -> int:
        """A seed that is a function of where training stands: seed, step, micro-step, process."""
        where = [self.args.seed, self.state.global_step, self.micro_step, self.args.process_index, *more]
        return int(np.random.SeedSequence(where).generate_state(1, np.uint64)[0])

    def seed_dropout(self, mini_batch: int = 0) -> None:
        """Make the masks of the next forward pass a function of where training stands."""
        torch.manual_seed(self.step_seed(mini_batch))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.views is not None:
            rows = inputs.pop(str(self.model.view_input))
            generator = torch.Generator(rows.device).manual_seed(self.step_seed())
            inputs[str(self.model.model_input)] = self.views(rows, generator)
        self.metrics.count_inputs(self.model.unit, self.model.count(inputs))
        return inputs

    def cached_step(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Embed every mini-batch without a graph, take the loss's gradient in the embeddings, then embed again with the
        same dropout and send that gradient back. Processes exchange gradients once, at the last mini-batch."""
        text_ids = inputs.pop("text_ids", None)
        columns = {name: value.split(self.args.mini_batch_size) for name, value in inputs.items()}
        mini_batches = [dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True)]
        with torch.no_grad():
            embeddings = torch.cat(
                [self.embed_mini_batch(model, mini_batch, k) for k, mini_batch in enumerate(mini_batches)]
            )
        views = [view.requires_grad_() for view in embeddings.unbind(1)]
        loss = self.compute_loss_from_embeddings(views, text_ids) / self.current_gradient_accumulation_steps
        gradients = zip(*(g.split(self.args.mini_batch_size) for g in torch.autograd.grad(loss, views)), strict=True)
        del embeddings, views
        for k, (mini_batch, parts) in enumerate(zip(mini_batches, gradients, strict=True)):
            last = k == len(mini_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                surrogate = (self.embed_mini_batch(model, mini_batch, k) * torch.stack(parts, dim=1)).sum()
                self.accelerator.backward(surrogate)
        return loss.detach()

    def embed_mini_batch(self, model: nn.Module, mini_batch: dict[str, Tensor], k: int) -> Tensor:
        """Embeddings [b, V, D] of mini-batch k, the same each time within a micro-step."""
        self.seed_dropout(k)
        return self.embed(model, mini_batch)

    @contextmanager
    def explain_out_of_memory(self) -> Iterator[None]:
        """Turn an allocation that fails into one line with the options that help."""
        try:
            yield
        except RuntimeError as error:  # torch.OutOfMemoryError among them
            if not isinstance(error, torch.OutOfMemoryError) and "t allocate memory" not in str(error):
                raise
            batch, mini_batch, block = self.args.train_batch_size, self.args.mini_batch_size, self.args.block_size
            help_for_loss = f", --block_size (now {block or 'automatic'}) takes the loss in smaller blocks"
            raise InputError(
                f"out of memory at step {self.state.global_step + 1}: --mini_batch_size (now {mini_batch or batch}) "
                f"embeds the batch of {batch} in parts{help_for_loss if self.args.objective != 'infonce' else ''}; "
                "the result stays as it is"
            ) from error

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch. accelerate's autocast covers the model's forward only; the loss is float32."""
        text_ids = inputs.pop("text_ids", None)
        embeddings = self.embed(model, inputs)
        loss = self.compute_loss_from_embeddings(embeddings.unbind(1), text_ids)
        return (loss, {"embeddings": embeddings}) if return_outputs else loss

    def compute_loss_from_embeddings(
        self, views: Sequence[Tensor], text_ids: Tensor | None = None, queue: Tensor | None = None
    ) -> Tensor:
        """The loss of V views, embeddings [B, D] each, checked, its parts recorded for the log."""
        x, y, *others = views
        terms = self.loss.terms(x, y, others[0] if others else None, text_ids, queue)
        self.losses.append(terms.loss.detach())
        self.last_views = x.detach(), y.detach()
        self.check_views(x, y)
        if not self.args.skip_nonfinite or terms.loss.isfinite():
            self.metrics.add(terms, x, y)
        return terms.loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy in LENGTH_STRATEGIES and "length" not in (getattr(dataset, "column_names", None) or []):
            raise InputError(f"--train_sampling_strategy {strategy} needs text tokenized before training")
        if strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        lengths = dataset.with_format("numpy")["length"][:].tolist()
        self.length_sampler = LengthSampler(batch, lengths, self.args.seed)
        return self.length_sampler

    def embed(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Embeddings [B, V, D] of a batch [B, V, ...]: flattened, one forward, unflattened."""
        shape = next(iter(inputs.values())).shape[:2]
        return model({name: value.flatten(0, 1) for name, value in inputs.items()}).unflatten(0, shape)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As the base class, which asks for it before every step of the optimizer; the moment to see whether loss and
        gradient are finite, for it would take the step whatever they are, and save the weights."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        broken = ~torch.stack(self.losses).isfinite().all()
        scaled = self.accelerator.scaler is not None  # fp16: the scaler leaves out steps whose gradient overflows
        if not scaled:
            broken |= ~torch.as_tensor(grad_norm, device=broken.device).isfinite()
        if self.agree(broken):
            self.skip_step(grad_norm, scaled)
        return grad_norm

    def skip_step(self, grad_norm: Any, scaled: bool) -> None:
        """With --skip_nonfinite, take the gradients away and count the step; else NonFiniteError, in all processes."""
        loss = torch.stack(self.losses).mean().item()
        broken = next((name for name, buffer in self.model.named_buffers() if not buffer.isfinite().all()), None)
        if self.args.skip_nonfinite and broken is None:
            self.skipped_steps.nonfinite_steps += 1
            if not scaled:
                for weight in self.model.parameters():
                    weight.grad = None
            return
        views = "" if self.last_views is None else f", {describe_views(self.loss, *self.last_views)}"
        checkpoint = latest_valid_checkpoint(Path(str(self.args.output_dir))) or "none was saved"
        raise NonFiniteError(
            f"loss is {loss} and gradient norm {float(grad_norm)} at step {self.state.global_step + 1} "
            f"({self.args.objective_name}, {self.loss.hyperparameters}{views}"
            + (f", {broken} is not finite" if broken else "")
            + f"): lower --learning_rate, --gamma or --alpha; last good checkpoint: {checkpoint}"
        )

    def check_views(self, x: Tensor, y: Tensor) -> None:
        """Warn once, at the first batch, if the views are the same: nothing would pull positives together."""
        if not self.views_checked and torch.equal(x, y):
            warnings.warn(
                "the two views of every text are identical: the model has no dropout (ModernBERT's default, for one). "
                "Set it with --dropout 0.1, or train on pairs of texts (columns sent0, sent1).",
                stacklevel=2,
            )
        self.views_checked = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the base class, with what `metrics` holds beside the loss."""
        if "loss" in logs:
            logs |= self.metrics.take() | self.skipped_steps.counts()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The evaluator's metrics of the encoder, without head or dropout.

        The base class's loop would report the loss, which says nothing without dropout, and its DataLoader would
        draw from the random state, so that evaluating changed the training that follows."""
        if eval_dataset is not None or self.evaluator is None:
            raise ValueError("evaluate() scores what the trainer's evaluator holds: pass evaluator= to the trainer")
        metrics = self.run_evaluator(metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def run_evaluator(self, prefix: str = "eval") -> dict[str, float]:
        """The evaluator's metrics, neither logged nor shown to callbacks.

        Raises:
            InputError: --metric_for_best_model is none of them.
        """
        with self.unsharded_state_dict(), self.metrics.pause():
            measured = self.evaluator(self.model.encoder)
        if self.args.world_size > 1:  # early stopping and the choice of a checkpoint must not differ by a last digit
            (measured,) = broadcast_object_list([measured])
        metrics = {f"{prefix}_{name}": value for name, value in measured.items()}
        wanted = str(self.args.metric_for_best_model).removeprefix("eval_")
        if self.args.metric_for_best_model and f"{prefix}_{wanted}" not in metrics:
            known = ", ".join(name.removeprefix(f"{prefix}_") for name in metrics)
            raise InputError(f"--metric_for_best_model {wanted} is not measured; there are {known}")
        return metrics

    @contextmanager
    def unsharded_state_dict(self) -> Iterator[None]:
        """FSDP shards the weights, and gathers them only for calls of the whole model: the encoder is a part of it."""
        model: Any = self.model
        if not isinstance(model, FSDPModule):
            yield
            return
        model.unshard()
        try:
            yield
        finally:
            model.reshard()
