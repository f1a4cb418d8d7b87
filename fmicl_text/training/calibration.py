"""gamma="auto" and alpha="auto" in the trainer: measured before the first step, on batches of the training data, at the
encoder as it comes."""

from __future__ import annotations

import logging
import math
import os
import random
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from fmicl_text.errors import InputError
from fmicl_text.losses.balance import Balance, Distances, auto_gamma, is_auto, one_entry
from fmicl_text.losses.contrastive import ContrastiveLoss, FMICLLoss
from fmicl_text.training.args import LENGTH_STRATEGIES
from fmicl_text.training.interface import is_overridden

if TYPE_CHECKING:
    from fmicl_text.training.trainer import FMICLTrainer

MIN_BATCHES, MAX_BATCHES = 4, 32
MIN_BATCHES_OF_ALPHA = 8  # the order statistics of fewer are no measure of its error
STABLE = 0.05  # relative standard error of alpha
# Smaller batches are joined up to this number of rows: alpha depends on the closest negative pairs, which are rare, and
# the number of pairs grows with the square of the rows.
JOINED_ROWS = 64
# Below this ratio of repulsion and attraction, a constant added to every similarity changes only the positive term.
LITTLE_REPULSION = 0.05
logger = logging.getLogger(__name__)
# Arguments of a loader without workers, which would start for a few batches.
WORKERS = {
    "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None,
    "dataloader_multiprocessing_context": None,
}


class CalibrationCallback(TrainerCallback):
    """Before the first step, measures gamma and alpha if they are "auto", and logs them, alpha with its relative
    standard error.

    A run that is resumed has the numbers of its checkpoint; see `Checkpointer.choose`.
    """

    def __init__(self, trainer: FMICLTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, loss = self.trainer, self.trainer.loss
        readable = is_repeatable(trainer.train_dataset) and not is_replaced(trainer)
        if not isinstance(loss, FMICLLoss) or not can_balance(loss) or not readable:
            return
        is_resumed = trainer.checkpointer.resumed_from is not None
        if not is_resumed and loss.gamma == trainer.measured_gamma:  # in an earlier training, of other weights
            loss.gamma = "auto"
        if not is_resumed and loss.alpha == trainer.measured_alpha:
            loss.alpha = "auto"
        measures_gamma = loss.gamma_is_auto
        if not measures_gamma and not is_auto(loss.alpha):
            return
        if measures_gamma:
            measure_gamma(trainer, kwargs["model"])
            trainer.measured_gamma = loss.gamma
            trainer.log({"gamma": loss.gamma})
        if is_auto(loss.alpha):
            self.choose_alpha(loss, measure_balance(trainer, kwargs["model"]))
        trainer.checkpointer.update_loss_signature()

    def choose_alpha(self, loss: FMICLLoss, balance: Balance) -> None:
        """Set and log alpha.

        Raises:
            InputError: No finite alpha balances attraction and repulsion.
        """
        try:
            self.trainer.measured_alpha = loss.alpha = balance.alpha
        except ValueError as error:
            raise InputError(str(error)) from error
        spread = balance.relative_error
        self.trainer.log({"alpha": balance.alpha} | ({} if spread is None else {"alpha_relative_error": spread}))


def warn_of_little_repulsion(loss: ContrastiveLoss, *batch: Tensor | None) -> None:
    """Log a warning if a given alpha leaves almost no repulsion at a batch, the arguments of `FMICLLoss.balance`. Every
    process must call this."""
    if not isinstance(loss, FMICLLoss) or not can_balance(loss) or is_auto(loss.alpha) or loss.negatives == "queue":
        return
    with warnings.catch_warnings(action="ignore"):  # the loss has warned of a batch without negative pairs
        balance = loss.balance(*batch)  # type: ignore[arg-type]
    with suppress(ValueError):  # there is no finite alpha
        if loss.alpha < LITTLE_REPULSION * balance.alpha and int(os.environ.get("RANK", "0")) == 0:
            logger.warning(
                "alpha=%g with gamma=%g leaves almost no repulsion at this encoder, %.1g times the attraction; "
                "alpha=auto would be %.2g",
                *(loss.alpha, loss.gamma, loss.alpha / balance.alpha, balance.alpha),
            )


def can_balance(loss: FMICLLoss) -> bool:
    """Whether attraction and repulsion balance at some alpha."""
    try:
        loss.require_finite_alpha()
    except ValueError:
        return False
    return True


def is_repeatable(rows: Any) -> bool:
    """Whether reading some rows leaves all rows for training. A stream of the user may be read only once; the loss
    then measures both on its first batch."""
    return not isinstance(rows, IterableDataset) or hasattr(rows, "fingerprint")


def is_replaced(trainer: FMICLTrainer) -> bool:
    """Whether batches are embedded in another way, without `loss_arguments` to match. The loss then measures
    both on its first batch."""
    return overrides(trainer, "training_step", "compute_loss", "embed")


def overrides(trainer: FMICLTrainer, *methods: str) -> bool:
    """Whether the trainer has another version of one of the methods than the class that its `loss_arguments` is of."""
    owner = next(one for one in type(trainer).__mro__ if "loss_arguments" in vars(one))
    return any(name in vars(trainer) or is_overridden(type(trainer), owner, name) for name in methods)


def measure_gamma(trainer: FMICLTrainer, model: nn.Module) -> None:
    """Set the gamma of the trainer's loss by the `Distances` of the first batches; see `measure_balance`."""
    loss: Any = trainer.loss
    total = Distances()
    with closing(loss_arguments(trainer, model)) as batches:
        for calls in batches:
            total += one_entry(sum((loss.distances(*arguments) for arguments in calls), Distances()))
            if len(total.positive) >= MIN_BATCHES:
                break
    if not math.isnan(total.separation):
        loss.gamma = auto_gamma(loss.divergence, loss.similarity, total.separation)


def measure_balance(trainer: FMICLTrainer, model: nn.Module) -> Balance:
    """The `Balance` of the trainer's loss over the first batches of the training data, in training mode and without
    gradient: until the relative standard error of alpha is below `STABLE`, but at least `MIN_BATCHES_OF_ALPHA`.

    Every process must call this. Random states, and the weights and buffers of the model, are as before.
    """
    loss: Any = trainer.loss
    total = Balance()
    with closing(loss_arguments(trainer, model)) as batches:
        for calls in batches:
            total += one_entry(sum((loss.balance(*arguments) for arguments in calls), Balance()))
            error = total.relative_error
            if len(total.positive) >= MIN_BATCHES_OF_ALPHA and error is not None and error < STABLE:
                break
    return total


def loss_arguments(trainer: FMICLTrainer, model: nn.Module) -> Generator[Any, None, None]:
    """The arguments of each call of the loss in one batch, for the first batches, at most `MAX_BATCHES`, without
    gradient; small batches are joined. Close it, also after the last."""
    past = list[Tensor]()
    with (
        torch.no_grad(),
        unchanged(trainer, model),
        trainer.explain_out_of_memory(),
        closing(first_batches(trainer)) as batches,
    ):
        model.train()
        waiting: list[Any] = []
        entries = 0
        for trainer.micro_step, batch in enumerate(batches):
            inputs = trainer.make_views(trainer._prepare_inputs(batch))
            trainer.seed_dropout()
            waiting.append(trainer.loss_arguments(model, inputs, past))
            if is_enough(trainer, waiting):
                yield joined(waiting)
                waiting, entries = [], entries + 1
                if entries == MAX_BATCHES:
                    return
        if waiting:
            yield joined(waiting)


def is_enough(trainer: FMICLTrainer, batches: Sequence[Any]) -> bool:
    """Whether the calls of some batches have `JOINED_ROWS` rows, or cannot be joined with those of others: negatives of
    a queue, and batches that are not random rows, whose pairs are closer than those of different batches."""
    args: Any = trainer.args
    own_order = overrides(trainer, "get_train_dataloader", "_get_train_sampler")
    has_queue = any(call[-1] is not None for calls in batches for call in calls)
    if args.train_sampling_strategy in LENGTH_STRATEGIES or own_order or has_queue or not all(batches):
        return True
    processes = args.world_size if trainer.loss.global_batch == "gather" else 1
    return sum(len(calls[0][0]) for calls in batches) * processes >= JOINED_ROWS


def joined(batches: Sequence[Any]) -> Any:
    """The calls of several batches as those of one batch."""
    if len(batches) == 1:
        return batches[0]
    return [
        tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*calls, strict=True))
        for calls in zip(*batches, strict=True)
    ]


def first_batches(trainer: FMICLTrainer) -> Generator[Any, None, None]:
    """The batches of the first epoch, from a loader of their own without workers."""
    loaders = trainer.accelerator._dataloaders
    count, sampler = len(loaders), trainer.length_sampler
    args: Any = trainer.args
    before = {name: getattr(args, name) for name in WORKERS}
    vars(args).update(WORKERS)
    try:
        loader: Any = trainer.get_train_dataloader()
    finally:
        vars(args).update(before)
        del loaders[count:]
        trainer.length_sampler = sampler
    try:
        yield from loader
    finally:
        if hasattr(loader, "end"):
            loader.end()  # accelerate would take it for the loader of the training


@contextmanager
def unchanged(trainer: FMICLTrainer, model: nn.Module) -> Generator[None, None, None]:
    """After this context, random states, the buffers and the mode of the model are as before."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    was_training, python, numpy = model.training, random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        model.train(was_training)
        trainer.micro_step = 0
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
