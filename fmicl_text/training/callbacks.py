"""Callbacks of the trainer: epochs of samplers, non-finite losses, collapse, resuming, pushes to the Hub."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy

from fmicl_text.errors import InputError
from fmicl_text.evaluation.geometry import direction_shares, effective_rank, mean_cosine
from fmicl_text.losses.contrastive import ContrastiveLoss
from fmicl_text.losses.similarity import unit_rows
from fmicl_text.training.checkpoint import latest_valid_checkpoint
from fmicl_text.training.output_dir import clear_output_dir

if TYPE_CHECKING:
    from fmicl_text.training.trainer import FMICLTrainer

ROWS = 512  # of a batch; enough pairs for a message
OPTIMIZER_SETTINGS = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "momentum",
    "optim_args",
)
FEW_ROWS = 32  # the effective rank of a smaller batch is small and noisy
PATIENCE = 16  # steps
HIGH_RANK = 0.5  # share of the batch; the effective rank of a good sentence encoder is above it (45 of 64)


class NonFiniteError(InputError):
    """The loss, a gradient or a weight is NaN or infinity. The weights were not updated and nothing was saved."""


@torch.no_grad()
def describe_views(loss: ContrastiveLoss, x: Tensor, y: Tensor) -> str:
    """The range of the similarity over pairs of rows of two views [N, D], or the number of rows that are not finite."""
    rows = torch.cat([x[:ROWS], y[:ROWS]])
    if num_bad := int((~rows.isfinite()).any(1).sum()):
        return f"{num_bad} of {len(rows)} embeddings not finite"
    rows = unit_rows(rows)
    values = loss.similarity.pairwise(rows, rows, loss.gamma)
    return f"{loss.similarity.symbol} from {values.min().item():.4g} to {values.max().item():.4g}"


class ClearCallback(TrainerCallback):
    """With `overwrite_output_dir`, removes the old run right before training, so that an error before that keeps it."""

    def __init__(self, trainer: FMICLTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.overwrite_output_dir and state.is_world_process_zero and not self.trainer.checkpointer.resumed_from:
            clear_output_dir(Path(str(args.output_dir)))


class SetEpochCallback(TrainerCallback):
    """Sets the epoch of the length sampler and of the dataset, which accelerate does not do with several processes, and
    resets the trainer's per-step state. Notes at which step each pass over the data begins."""

    def __init__(self, trainer: FMICLTrainer) -> None:
        self.trainer = trainer
        self.is_resumed = False  # and its first pass has not begun

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_resumed = self.trainer.checkpointer.resumed_from is not None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch, checkpointer = int(state.epoch or 0), self.trainer.checkpointer
        checkpointer.pass_start = checkpointer.saved.get("pass_start", 0) if self.is_resumed else state.global_step
        self.is_resumed = False
        self.trainer.shared_epoch.fill_(epoch)
        if self.trainer.length_sampler is not None:
            self.trainer.length_sampler.set_epoch(epoch)
        dataset: Any = self.trainer.train_dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.micro_step = 0
        self.trainer.losses = []


class ResumeCallback(TrainerCallback):
    """Completes what the base class restores from a checkpoint.

    The base class restores settings along with the state, so an early-stopping patience and intervals of logging,
    evaluation and saving that are given now would have no effect. It evaluates again with `eval_on_start`, which would
    count toward the patience, and it looks for the best checkpoint only at its original path.
    """

    def __init__(self, trainer: FMICLTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpointer = self.trainer.checkpointer
        if checkpointer.resumed_from is None:
            return
        settings = checkpointer.run["callbacks"]
        for callback in self.trainer.callback_handler.callbacks:
            vars(callback).update(settings.get(type(callback).__name__, {}))
        state.compute_steps(args, state.max_steps)
        if checkpointer.changes:
            apply_optimizer_settings(self.trainer, kwargs["optimizer"], kwargs["lr_scheduler"])
        args.eval_on_start = args.eval_on_start and state.global_step == 0
        checkpointer.locate_best()


def apply_optimizer_settings(trainer: FMICLTrainer, optimizer: Any, scheduler: Any) -> None:
    """Set the options of an optimizer whose state, and with it their old values, was loaded from a checkpoint. An
    optimizer that was passed to the trainer has its own."""
    args, saved = trainer.args, trainer.checkpointer.saved
    if trainer.optimizer_is_given or trainer.checkpointer.changes.keys().isdisjoint(OPTIMIZER_SETTINGS):
        return
    given: Any = trainer.optimizer_cls_and_kwargs
    kwargs = (given or trainer.get_optimizer_cls_and_kwargs(args, trainer.model))[1]  # type: ignore[arg-type]
    old, new = float(saved.get("learning_rate", args.learning_rate)), float(args.learning_rate)
    for i, group in enumerate(optimizer.param_groups):
        group.update({name: value for name, value in kwargs.items() if name in group and name not in ("lr", "params")})
        decays = i == 0 or bool(group.get("weight_decay"))  # biases and norms are in groups without
        if decays and "weight_decay" in trainer.checkpointer.changes:
            group["weight_decay"] = args.weight_decay
        for name in ("lr", "initial_lr"):
            if name in group and old not in (0, new):
                group[name] = group[name] * new / old
    inner = getattr(scheduler, "scheduler", scheduler)
    for name in ("base_lrs", "_last_lr"):
        if old not in (0, new) and getattr(inner, name, None):
            setattr(inner, name, [rate * new / old for rate in getattr(inner, name)])


class FiniteCheckCallback(TrainerCallback):
    """Before every optimizer step: stops, or with `skip_nonfinite` skips the step, if any process has a non-finite loss
    or gradient. The base class would take the step and save the weights."""

    def __init__(self, trainer: FMICLTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        losses = trainer.losses or [trainer.finite_loss]  # none if a subclass has its own training_step
        broken = ~torch.stack(losses).isfinite().all()
        if trainer.accelerator.scaler is None:  # in fp16 the scaler skips steps whose gradients overflow
            broken |= ~torch.as_tensor(trainer.grad_norm, device=broken.device).isfinite()
        if trainer.graceful_stop.agree(broken):
            self.skip_step(args, state)

    def skip_step(self, args: Any, state: Any) -> None:
        """With `skip_nonfinite`, drop the gradients and count the step; else raise NonFiniteError in all processes."""
        trainer = self.trainer
        buffer = next((name for name, value in trainer.model.named_buffers() if not value.isfinite().all()), None)
        if args.skip_nonfinite and buffer is None:
            trainer.skipped_steps.nonfinite_steps += 1
            if trainer.accelerator.scaler is None:
                for weight in trainer.model.parameters():
                    weight.grad = None
            return
        loss = sum(loss.item() for loss in trainer.losses)
        views = "" if trainer.last_views is None else f", {describe_views(trainer.loss, *trainer.last_views)}"
        checkpoint = latest_valid_checkpoint(Path(str(args.output_dir))) or "none was saved"
        raise NonFiniteError(
            f"loss is {loss} and gradient norm {float(trainer.grad_norm)} at step {state.global_step + 1} "
            f"({trainer.loss.objective_name}, {trainer.loss.hyperparameters}{views}"
            + (f", {buffer} is not finite" if buffer else "")
            + f"): reduce learning_rate, gamma or alpha; last good checkpoint: {checkpoint}"
        )


class SkippedStepsCallback(TrainerCallback, ExportableState):
    """Counts skipped steps, across all resumed parts of a run.

    Attributes:
        nonfinite_steps: Steps whose loss or gradient was not finite; `FiniteCheckCallback` counts them.
        overflow_steps: Steps that fp16's gradient scaler skipped.
    """

    def __init__(self) -> None:
        self.nonfinite_steps = self.overflow_steps = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.overflow_steps += kwargs["optimizer"].step_was_skipped

    def counts(self) -> dict[str, int]:
        """The counts that are not 0, for the log."""
        return {name: count for name, count in vars(self).items() if count}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": dict(vars(self))}


class CollapseMonitor(TrainerCallback, ExportableState):
    """Warns when the effective rank and the mean cosine of a step's embeddings show that they start to collapse.

    Collapse means an effective rank below 2, below a third of the highest so far, or below half of its value before
    training if that is high (over `HIGH_RANK` of the batch), or a mean cosine above 0.99. A value that has improved
    since the last look gives no warning, because many pretrained encoders start with such values; those have
    `PATIENCE` steps to improve. `LookCallback` looks at steps 1, 2, 4, 8, ..., and every log is a look. Batches smaller
    than `FEW_ROWS` are not checked.
    """

    def __init__(self) -> None:
        self.start: tuple[float, float] | None = None  # rank and cosine at step 1: of the encoder before training
        self.highest = 0.0
        self.before: tuple[float, float] | None = None
        self.warned = False
        self.looked_at = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:  # not resumed
            vars(self).update(vars(type(self)()))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if {"effective_rank", "mean_cosine"} <= logs.keys():
            self.look(args.train_batch_size, state.global_step, logs["effective_rank"], logs["mean_cosine"])

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": dict(vars(self))}

    def look(self, rows: int, step: int, rank: float, cosine: float) -> None:
        """Warn if the embeddings of a step have begun to collapse, once per step."""
        if rows < FEW_ROWS or step == self.looked_at:
            return
        if self.before is None and step <= 1:
            self.start = rank, cosine
        self.looked_at = step
        if (message := self.check(rank, cosine, step, rows)) is not None:
            warnings.warn(message, stacklevel=2)

    def check(self, rank: float, cosine: float, step: int, rows: int = FEW_ROWS) -> str | None:
        """The warning for a step; None if there is no problem or a warning was already issued."""
        self.highest = max(self.highest, rank)
        start_rank, start_cosine = self.start or (math.inf, 0.0)
        high = start_rank if HIGH_RANK * min(rows, ROWS) < start_rank < math.inf else 0.0
        is_low, is_close = rank < max(2.0, self.highest / 3, high / 2), cosine > 0.99
        low = is_low and (self.before is not None and rank <= self.before[0])
        close = is_close and (self.before is not None and cosine >= self.before[1])
        if step < PATIENCE and (start_rank < 2 or start_cosine > 0.99):
            low = close = False
        self.before = rank, cosine
        is_new = (low or close) and not self.warned
        self.warned = low or close or (self.warned and (is_low or is_close))
        if not is_new:
            return None
        known = f"highest so far {self.highest:.1f}" + (f", before training {start_rank:.1f}" if self.start else "")
        return (
            f"step {step}: embeddings are collapsing, effective rank {rank:.1f} ({known}), "
            f"mean cosine {cosine:.3f}. Try a divergence that satisfies the uniformity condition (kl, js, pearson, "
            "vlc), a smaller learning_rate, or alpha=auto"
        )


class LookCallback(TrainerCallback):
    """Shows the collapse monitor the embeddings of steps 1, 2, 4, 8, ..., most of which are not logged."""

    def __init__(self, trainer: FMICLTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, views = state.global_step, self.trainer.last_views
        if step & (step - 1) or views is None or len(views[0]) < 2:
            return
        rows = views[0][:ROWS]
        if not rows.isfinite().all():  # of a step that was skipped
            return
        monitor = next(one for one in self.trainer.callback_handler.callbacks if isinstance(one, CollapseMonitor))
        rank, cosine = effective_rank(direction_shares(rows)).item(), mean_cosine(rows).item()
        monitor.look(args.train_batch_size, step, rank, cosine)


class PushCallback(TrainerCallback):
    """Pushes the encoder in each checkpoint to the Hub while training continues, and waits for the last push at the
    end. The base class would push an incomplete folder, without modules.json, pooling and model card."""

    def __init__(self, trainer: FMICLTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        push = self.trainer.background_push
        if push is None or not state.is_world_process_zero or args.hub_strategy == HubStrategy.END:
            return
        if args.hub_always_push or not push.busy:
            folder = self.trainer.checkpointer.folder(state.global_step)
            message = f"Training in progress, step {state.global_step}"
            self.trainer.push_folder(folder, message, state.global_step, blocking=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.background_push is not None:
            self.trainer.background_push.wait()
