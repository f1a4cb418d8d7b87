"""Graceful stop on SIGTERM, SIGINT, SIGHUP: all processes finish the same step, save a checkpoint and end training."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import TrainerCallback

from fmicl_text.errors import Interrupted
from fmicl_text.training.ranks import any_rank

if TYPE_CHECKING:
    from fmicl_text.training.trainer import FMICLTrainer

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Where a program raises SIGPIPE for a write to a closed pipe, as `cli_errors` does, it ends training likewise.
HANDLED = (*SIGNALS, signal.SIGPIPE)


def ignore_signals_in_worker(worker_init_fn: Callable[[int], None] | None, worker: int) -> None:
    """Initialize a DataLoader worker that ignores signals while its parent (the trainer's process or its fork server)
    runs: the step in progress still needs its batch. Workers are killed when training ends; see `Workers`.

    Args:
        worker_init_fn: The DataLoader's own initialization.
        worker: Number of the worker.
    """
    parent = os.getppid()

    def ignore(number: int, frame: Any) -> None:
        if os.getppid() != parent:
            os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, ignore)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if worker_init_fn is not None:
        worker_init_fn(worker)


class Workers:
    """The worker processes of a DataLoader, which can be killed even if they are stuck."""

    def __init__(self) -> None:
        self.processes: list[Any] = []

    def watch(self, loader: Any) -> None:
        """Remember the workers that a DataLoader starts, and let them ignore signals. While they start, signals are
        blocked, in them too: a signal to all processes would end a worker that does not yet ignore it, and a fork
        server, without which workers end."""
        start = loader._get_iterator

        def start_and_remember() -> Any:
            context = loader.multiprocessing_context or multiprocessing.get_context()
            if loader.num_workers and context.get_start_method() != "fork":
                resource_tracker.ensure_running()  # its start would unblock signals
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                iterator = start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self.processes = list(getattr(iterator, "_workers", []))
            return iterator

        loader._get_iterator = start_and_remember
        loader.worker_init_fn = partial(ignore_signals_in_worker, loader.worker_init_fn)

    def kill(self) -> None:
        """Kill the workers that still run. Torch's handler of SIGCHLD would report them as an error."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main_thread else None
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []
        if in_main_thread:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


class GracefulStop(TrainerCallback):
    """After a signal: saves a checkpoint at the end of the step (or of the epoch, if this is its last step and an
    evaluation, save or log is due at the end of the epoch) and raises `Interrupted`. A second SIGTERM or
    SIGINT has its usual effect.

    Attributes:
        received: Number of the signal that this process received, or 0.
        stopped_by: Number of the signal on which all processes have agreed, or 0.
        workers: The workers that load the training data.
    """

    def __init__(self, trainer: FMICLTrainer) -> None:
        self.trainer = trainer
        self.workers = Workers()
        self.received = self.stopped_by = 0

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Record the first signal instead of raising it. A second SIGTERM or SIGINT kills the workers, which may be
        stuck, and has its usual effect. A signal that arrived too late for a checkpoint is raised again at the end.
        Signals that are ignored, as in background jobs of a shell, stay ignored."""
        if threading.current_thread() is not threading.main_thread():  # Python handles signals only there
            try:
                yield
            finally:
                self.workers.kill()
            return
        before: dict[int, Any] = {number: signal.getsignal(number) or signal.SIG_DFL for number in HANDLED}
        before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def end(number: int, frame: Any) -> None:
            restore()
            self.workers.kill()
            signal.raise_signal(number)

        def record(number: int, frame: Any) -> None:
            self.received = number
            for other in before:  # a closed terminal sends SIGHUP and fails writes: that is not a second request
                signal.signal(other, end if other in (signal.SIGTERM, signal.SIGINT) else signal.SIG_IGN)

        for number in before:
            signal.signal(number, record)
        try:
            yield
            restore()
            if self.received:
                signal.raise_signal(self.received)
        finally:
            restore()
            self.workers.kill()
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
