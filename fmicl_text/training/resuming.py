"""transformers' Trainer whose runs can be cut short at any moment and go on as if nothing had happened."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fmicl_text.errors import InputError, Interrupted
from fmicl_text.training import checkpoint as checkpoints
from fmicl_text.training.saving import SavingTrainer

SIGNALS = (signal.SIGTERM, signal.SIGINT)
RESUME_KEYS_STRICT = (
    "processes",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "data",
    "adapters_over",
)


@contextmanager
def readable(checkpoint: str | Path) -> Iterator[None]:
    """Turn whatever a file that is not what it says raises (it is JSON, or read with weights_only) into InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise InputError(f"{checkpoint} cannot be read: {type(error).__name__} {reason}") from error


def ignore_signals_in_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """Start a worker of a DataLoader that outlives the signals which its process group gets: the step that they are to
    end needs its batch."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)


class StopAfterSaving(TrainerCallback):
    """After a signal: a checkpoint at the end of the step, or of the epoch where that ends with it and something is
    due, then the end."""

    def __init__(self, trainer: ResumingTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due_at_its_end = "epoch" in (args.eval_strategy, args.save_strategy, args.logging_strategy)
        if self.trainer.stopped_by and not (due_at_its_end and float(state.epoch).is_integer()):
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stopped_by:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stopped_by:
            self.trainer.stop()


class ResumingTrainer(SavingTrainer):
    """The part of `FMICLTrainer` that goes on from checkpoints and heeds signals.

    `train(resume_from_checkpoint=...)` takes a folder; True or "auto", for the newest whole one ("auto" starts afresh
    where there is none). On SIGTERM and SIGINT every process ends the same step, together they save a checkpoint and
    raise `Interrupted`; a second signal does what it does without this.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.signalled = self.stopped_by = 0  # signal numbers: of this process, agreed by all
        self.ended_early = False
        super().__init__(*args, **kwargs)
        self.add_callback(StopAfterSaving(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the base class.

        Raises:
            InputError: No such checkpoint; it is damaged, or of a run with other data, batches or processes; or no room
                for checkpoints on the disk.
            Interrupted: After a signal; the checkpoint is written.
        """
        self.ended_early = False
        folder = Path(str(self.args.output_dir))
        checkpoint, skipped = self.on_main_process(lambda: checkpoints.find_checkpoint(folder, resume_from_checkpoint))
        self.on_main_process(lambda: self.prepare_folder(folder))
        self.run = self.on_main_process(self.resume_signature)
        if checkpoint is not None:
            then = self.on_main_process(lambda: checkpoints.run_of(checkpoint))
            differences = self.differences(checkpoint, then)
            with readable(checkpoint):
                state = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE))
            same_callbacks = then.get("callbacks", self.run["callbacks"]) == self.run["callbacks"]
            self.ended_early = checkpoints.stopped_early(state) and same_callbacks
            for line in (*skipped, *differences):
                warnings.warn(line, stacklevel=2)
        with self.handle_signals():
            return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def differences(self, checkpoint: Path, then: dict[str, Any]) -> list[str]:
        """Lines that say why a run that goes on from a checkpoint will not end as the one that wrote it.

        Args:
            checkpoint: Its folder.
            then: What its manifest says of the run that wrote it.

        Raises:
            InputError: Data, batches or processes are others, and that was not asked for.
        """
        if then.get("save_only_model"):
            raise InputError(f"{checkpoint} holds a model only (--save_only_model), not what going on from it takes")
        same = self.run | {"save_only_model": False}  # as then, and of no matter to the weights
        differing = [name for name, value in same.items() if then.get(name, value) != value]
        told = {name: f"{name} {then[name]} -> {self.run[name]}" for name in differing}
        if (refused := [told[name] for name in RESUME_KEYS_STRICT if name in told]) and not self.args.resume_changed:
            raise InputError(
                f"{checkpoint} is of another run: {', '.join(refused)}; go on with the same, or give "
                "--resume_changed True, and the result is neither run's"
            )
        return [f"not exact: {checkpoint} was written with {', '.join(told.values())}"] if told else []

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """The base class would look for the best checkpoint only where it once was; the folder may have moved."""
        where = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None and self.state.best_global_step:
            best = Path(resume_from_checkpoint).parent / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best.is_dir():
                self.state.best_model_checkpoint = str(best)
            elif self.state.best_model_checkpoint is None:
                told = f"{best}, the best so far, is gone: training ends with a better one, or the last"
                warnings.warn(told, stacklevel=2)
        return where

    def _load_callback_state(self) -> None:
        """The base class would take the callbacks' settings, too, from the checkpoint: a patience given now, for one,
        would mean nothing."""
        settings = self.callback_settings()
        super()._load_callback_state()
        for callback in self.callback_handler.callbacks:
            vars(callback).update(settings.get(type(callback).__name__, {}))

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = partial(ignore_signals_in_worker, inner.worker_init_fn)
        return loader

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """With --eval_on_start (only it skips the scheduler) the base class would do so at every resume, too, at the
        cost of early stopping's patience."""
        if skip_scheduler and self.state.global_step:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """With --save_strategy best the base class saves if this says so."""
        return super()._determine_best_metric(metrics, trial) or self.stopped_by != 0

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The last moment that knows the last weights: a signal may have come in the last evaluation."""
        self.agree(torch.zeros((), dtype=torch.bool, device=self.args.device))
        if self.stopped_by:
            if not self.checkpoint_folder(self.state.global_step).is_dir():
                model: Any = self.model
                self._save_checkpoint(model)
            self.stop()
        return super()._finalize_training(*args, **kwargs)

    def stop(self) -> NoReturn:
        """Leave training after a signal; the checkpoint is written."""
        handler: Any = self.callback_handler
        handler.on_train_end(self.args, self.state, self.control)  # loggers write out what they hold
        name, step = signal.Signals(self.stopped_by).name, self.state.global_step
        saved = self.checkpoint_folder(step)
        raise Interrupted(f"stopped by {name} after step {step}; saved {saved}", self.stopped_by, saved)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The base class would train one more step of a run that has ended."""
        if self.ended_early or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def agree(self, broken: torch.Tensor) -> bool:
        """Whether the step is broken in some process. Every process asks, before each step of the optimizer and at the
        end; they agree on a signal, too, that one of them has got.

        Args:
            broken: A bool on the device: whether it is in this process.
        """
        if self.args.world_size == 1:
            self.stopped_by = self.signalled
            return bool(broken)
        flags = torch.stack([broken.long(), torch.tensor(self.signalled, device=broken.device)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        some_broken, self.stopped_by = flags.tolist()
        return bool(some_broken)

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Note the first SIGTERM or SIGINT for the end of the step; at the end, send one again that nothing heeded. One
        that is ignored, as a shell has it for what runs in the background, stays ignored."""
        if threading.current_thread() is not threading.main_thread():  # where Python has no signals
            yield
            return
        before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
        before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number: int, frame: Any) -> None:
            self.signalled = number
            restore()

        for number in before:
            signal.signal(number, note)
        try:
            yield
            restore()
            if self.signalled:
                signal.raise_signal(self.signalled)
        finally:
            restore()
            self.signalled = self.stopped_by = 0

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if (damage := self.on_main_process(lambda: checkpoints.fault(best))) is None:
            self.load_weights(str(best))
        else:
            told = f"{best} is damaged ({damage}): training ends with its last weights, not with the best"
            warnings.warn(told, stacklevel=2)
            self.state.best_global_step = self.state.global_step

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_weights(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with readable(str(checkpoint)):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(str(checkpoint)):
            super()._load_rng_state(checkpoint)

    def load_weights(self, checkpoint: str) -> None:
        """Take all weights of a checkpoint folder, in place."""
        self.model.load_checkpoint(checkpoint)
