"""Graceful stop on SIGTERM and SIGINT: all processes finish the same step, save a checkpoint and end training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import TrainerCallback

from fmicl_text.errors import Interrupted
from fmicl_text.training.ranks import any_rank

if TYPE_CHECKING:
    from fmicl_text.training.trainer import FMICLTrainer

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def ignore_signals_in_worker(worker_init_fn: Callable[[int], None] | None, worker: int) -> None:
    """Initialize a DataLoader worker that ignores SIGTERM and SIGINT: the step in progress still needs its batch."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if worker_init_fn is not None:
        worker_init_fn(worker)


class GracefulStop(TrainerCallback):
    """After a signal: saves a checkpoint at the end of the step (or of the epoch, if this is its last step and an
    evaluation, save or log is due at the end of the epoch) and raises `Interrupted`. A second signal has its usual
    effect.

    Attributes:
        received: Number of the signal that this process received, or 0.
        stopped_by: Number of the signal on which all processes have agreed, or 0.
    """

    def __init__(self, trainer: FMICLTrainer) -> None:
        self.trainer = trainer
        self.received = self.stopped_by = 0

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Record the first SIGTERM or SIGINT instead of raising it. A signal that arrived too late for a checkpoint
        is raised again at the end. Signals that are ignored, as in background jobs of a shell, stay ignored."""
        if threading.current_thread() is not threading.main_thread():  # Python handles signals only there
            yield
            return
        before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
        before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def record(number: int, frame: Any) -> None:
            self.received = number
            restore()

        for number in before:
            signal.signal(number, record)
        try:
            yield
            restore()
            if self.received:
                signal.raise_signal(self.received)
        finally:
            restore()
            self.received = self.stopped_by = 0

    def agree(self, broken: torch.Tensor | None = None) -> bool:
        """Agree with all processes on whether any has received a signal, and whether the step is broken in any.

        Args:
            broken: A bool tensor on the device: whether the step is broken in this process.

        Returns:
            Whether the step is broken in any process. Every process must call this at the same point.
        """
        device = self.trainer.args.device
        flags = torch.stack(
            [
                torch.zeros((), dtype=torch.long, device=device) if broken is None else broken.long(),
                torch.tensor(self.received, device=device),
            ]
        )
        some_broken, self.stopped_by = any_rank(flags).tolist()
        return bool(some_broken)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due_at_epoch_end = "epoch" in (args.eval_strategy, args.save_strategy, args.logging_strategy)
        if self.stopped_by and not (due_at_epoch_end and float(state.epoch).is_integer()):
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.agree()  # for a signal during the last step
        if self.stopped_by:
            control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.is_in_train:
            self.agree()  # for a signal during the last evaluation
            if self.stopped_by:
                control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped_by:
            self.stop()

    def stop(self) -> NoReturn:
        """End training after a signal; the checkpoint has been written."""
        trainer: Any = self.trainer
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # flushes the loggers
        name, step = signal.Signals(self.stopped_by).name, trainer.state.global_step
        saved = trainer.checkpointer.folder(step)
        raise Interrupted(f"stopped by {name} after step {step}; saved {saved}", self.stopped_by, saved)
