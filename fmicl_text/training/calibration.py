"""gamma="auto" and alpha="auto" in the trainer: measured before the first step, on batches of the training data, at the
encoder as it comes."""

from __future__ import annotations

import logging
import math
import os
import random
import warnings
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from fmicl_text.errors import InputError
from fmicl_text.losses.balance import Balance, Distances, auto_gamma, is_auto
from fmicl_text.losses.contrastive import ContrastiveLoss, FMICLLoss
from fmicl_text.training.interface import is_overridden

if TYPE_CHECKING:
    from fmicl_text.training.trainer import FMICLTrainer

MIN_BATCHES, MAX_BATCHES = 4, 32
STABLE = 0.05  # relative standard error of alpha
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
    owner = next(one for one in type(trainer).__mro__ if "loss_arguments" in vars(one))
    hooks = ("training_step", "compute_loss", "embed")
    return any(name in vars(trainer) or is_overridden(type(trainer), owner, name) for name in hooks)


def measure_gamma(trainer: FMICLTrainer, model: nn.Module) -> None:
    """Set the gamma of the trainer's loss by the `Distances` of the first batches; see `measure_balance`."""
    loss: Any = trainer.loss
    total = Distances()
    with closing(loss_arguments(trainer, model)) as batches:
        for arguments in batches:
            total += loss.distances(*arguments)
            if len(total.positive) >= MIN_BATCHES:
                break
    if not math.isnan(total.separation):
        loss.gamma = auto_gamma(loss.divergence, loss.similarity, total.separation)


def measure_balance(trainer: FMICLTrainer, model: nn.Module) -> Balance:
    """The `Balance` of the trainer's loss over the first batches of the training data, in training mode and without
    gradient: until the relative standard error of alpha is below `STABLE`, but at least `MIN_BATCHES`.

    Every process must call this. Random states, and the weights and buffers of the model, are as before.
    """
    loss: Any = trainer.loss
    total = Balance()
    with closing(loss_arguments(trainer, model)) as batches:
        for arguments in batches:
            total += loss.balance(*arguments)
            error = total.relative_error
            if len(total.positive) >= MIN_BATCHES and error is not None and error < STABLE:
                break
    return total


def loss_arguments(trainer: FMICLTrainer, model: nn.Module) -> Generator[Any, None, None]:
    """The arguments of the loss in the first batches, without gradient, of at most `MAX_BATCHES`. Close it, also after
    the last."""
    past = list[Tensor]()
    with (
        torch.no_grad(),
        unchanged(trainer, model),
        trainer.explain_out_of_memory(),
        closing(first_batches(trainer)) as batches,
    ):
        model.train()
        for trainer.micro_step, batch in enumerate(islice(batches, MAX_BATCHES)):
            inputs = trainer.make_views(trainer._prepare_inputs(batch))
            trainer.seed_dropout()
            yield from trainer.loss_arguments(model, inputs, past)


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
