"""transformers' Trainer whose runs can be cut short at any moment and go on as if nothing had happened."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fmicl_text import checkpoints
from fmicl_text.errors import InputError, Interrupted
from fmicl_text.loss import ContrastiveLoss
from fmicl_text.pushing import PushingTrainer
from fmicl_text.training_args import FMICLTrainingArguments

T = TypeVar("T")
MUST_NOT_CHANGE = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps", "data")
SAME_NUMBERS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "mini_batch_size", "seed", "max_steps"),
    *("num_train_epochs", "learning_rate", "warmup_steps", "weight_decay", "save_only_model"),
)
SAME_CHOICES = ("objective_name", "optim", "lr_scheduler_type", "train_sampling_strategy")
PER_WEIGHT = 3.5  # bytes of a checkpoint over bytes of the weights: Adam's two moments, head, some for the rest


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


class StopAfterSaving(TrainerCallback):
    """After a signal: a checkpoint at the end of the step, or of the epoch where that ends with it and something is
    due, then the end."""

    def __init__(self, trainer: ResumingTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due_at_its_end = "epoch" in (str(args.eval_strategy.value), str(args.save_strategy.value))
        if self.trainer.stopped_by and not (due_at_its_end and float(state.epoch).is_integer()):
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stopped_by:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stopped_by:
            handler: Any = self.trainer.callback_handler
            handler.on_train_end(args, state, control)  # loggers write out what they hold
            name = signal.Signals(self.trainer.stopped_by).name
            saved = self.trainer.checkpoint_folder(state.global_step)
            told = f"stopped by {name} after step {state.global_step}; saved {saved}"
            raise Interrupted(told, self.trainer.stopped_by)


class ResumingTrainer(PushingTrainer):
    """The part of `FMICLTrainer` that saves checkpoints, finds them again and heeds signals.

    A checkpoint is written beside its place and moved there with a manifest of its files and of what must be the same
    for a run that goes on from it. `train(resume_from_checkpoint=...)` takes a folder; True or "auto", for the newest
    whole one ("auto" starts afresh where there is none). On SIGTERM and SIGINT every process ends the same step,
    together they save a checkpoint and raise `Interrupted`; a second signal does what it does without this.
    """

    loss: ContrastiveLoss
    args: FMICLTrainingArguments

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
        folder = Path(str(self.args.output_dir))
        checkpoint, passed_over = self.on_first(lambda: checkpoints.find_checkpoint(folder, resume_from_checkpoint))
        self.on_first(lambda: self.prepare_folder(folder))
        self.run = self.on_first(self.describe_run)
        if checkpoint is not None:
            differences = self.on_first(lambda: self.differences(checkpoint))
            with readable(checkpoint):
                state = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE))
                self.ended_early = checkpoints.stopped_early(state)
            for line in (*passed_over, *differences):
                warnings.warn(line, stacklevel=2)
        with self.heed_signals():
            return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def on_first(self, function: Callable[[], T]) -> T:
        """What a function gives in the first process, in all of them; so with its InputError."""
        answer: list[Any] = [None]
        if self.args.process_index == 0:
            try:
                answer = [function()]
            except InputError as error:
                answer = [error]
        if self.args.world_size > 1:
            broadcast_object_list(answer)
        if isinstance(answer[0], InputError):
            raise answer[0]
        return answer[0]

    def prepare_folder(self, folder: Path) -> None:
        """Clear away what a killed run left unfinished.

        Raises:
            InputError: The disk has no room for the checkpoints to come.
        """
        shutil.rmtree(folder / checkpoints.UNFINISHED, ignore_errors=True)
        if self.args.save_strategy == "no":
            return
        model: Any = self.model
        weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        to_come = max(1, (self.args.save_total_limit or 1) + 1 - len(checkpoints.checkpoints_in(folder)))
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        needed, free = to_come * PER_WEIGHT * weights, shutil.disk_usage(place).free
        if free < needed:
            raise InputError(
                f"--output_dir {folder}: {to_come} checkpoints take about {needed / 2**20:.0f} MiB, the disk has "
                f"{free / 2**20:.0f}; a smaller --save_total_limit, or --save_only_model True, takes less"
            )

    def describe_run(self) -> dict[str, Any]:
        """What a run that goes on from this one's checkpoints must have in common with it to end with the same
        weights."""
        args = self.args
        run: dict[str, Any] = {name: getattr(args, name) for name in SAME_NUMBERS}
        run |= {name: str(getattr(args, name)) for name in SAME_CHOICES}
        run |= {"processes": args.world_size, "precision": self.accelerator.mixed_precision}
        run |= {"threads": torch.get_num_threads()} if args.device.type == "cpu" else {}
        return run | self.loss.knobs | {"data": checkpoints.fingerprint(self.train_dataset)}

    def differences(self, checkpoint: Path) -> list[str]:
        """Lines that say why a run that goes on from a checkpoint will not end as the one that wrote it.

        Raises:
            InputError: Data, batches or processes are others, and that was not asked for.
        """
        then = checkpoints.run_of(checkpoint)
        if then["save_only_model"]:
            raise InputError(f"{checkpoint} holds a model only (--save_only_model), not what going on from it takes")
        differing = [name for name, value in self.run.items() if then.get(name, value) != value]
        told = {name: f"{name} {then[name]} -> {self.run[name]}" for name in differing}
        if (refused := [told[name] for name in MUST_NOT_CHANGE if name in told]) and not self.args.resume_changed:
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
        """The base class would look for the best checkpoint where it once was; the folder may have moved."""
        where = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None and self.state.best_global_step:
            best = Path(resume_from_checkpoint).parent / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return where

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The base class would train one more step of a run that has ended."""
        if self.ended_early or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def agree(self, broken: torch.Tensor) -> bool:
        """Whether the step is broken in some process. Every process asks, before each step of the optimizer; they agree
        on a signal, too, that one of them has got.

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
    def heed_signals(self) -> Iterator[None]:
        """Note SIGTERM and SIGINT, each once, for the end of the step."""
        if threading.current_thread() is not threading.main_thread():  # where Python has no signals
            yield
            return
        before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGINT)}

        def note(number: int, frame: Any) -> None:
            self.signalled = number
            signal.signal(number, before[signal.Signals(number)])

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.signalled = self.stopped_by = 0

    def checkpoint_folder(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """The base class would write into place, and take what a kill leaves there for a checkpoint."""
        place = self.checkpoint_folder(self.state.global_step)
        beside = place.parent / checkpoints.UNFINISHED / place.name
        self.store_flos()
        self.together(place, lambda: self.write_checkpoint(beside, place))
        self.together(place, lambda: self.finish_checkpoint(beside, place))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))

    def together(self, place: Path, function: Callable[[], None]) -> None:
        """Call a function in every process; where it fails in one, InputError in all."""
        failure = None
        try:
            function()
        except (OSError, SafetensorError, RuntimeError, InputError) as error:  # a full disk is any of the first three
            failure = str(getattr(error, "strerror", None) or str(error).strip().splitlines()[0])
        if failures := [text for text in gather_object([failure]) if text]:
            shutil.rmtree(place.parent / checkpoints.UNFINISHED, ignore_errors=True)  # room on a full disk
            good = self.on_first(lambda: checkpoints.newest_whole(place.parent))
            raise InputError(f"{place} could not be written: {failures[0]}; last good checkpoint: {good or 'none'}")

    def write_checkpoint(self, folder: Path, place: Path) -> None:
        """Everything that going on takes, but the manifest, into a folder beside the place where it will be."""
        state, args = self.state, self.args
        self.save_model(str(folder), _internal_call=True)
        best = self.checkpoint_folder(state.best_global_step or 0)
        if best == place or best.is_dir():
            state.best_model_checkpoint = str(best)
        if not args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        if args.should_save:
            callbacks: Any = [*self.callback_handler.callbacks, self.control]
            stateful = [one for one in callbacks if isinstance(one, ExportableState)]
            saved: Any = {type(one).__name__: one.state() for one in stateful}
            state.stateful_callbacks = saved
            state.save_to_json(str(folder / checkpoints.STATE))

    def finish_checkpoint(self, folder: Path, place: Path) -> None:
        """In the first process, once all have written: seal it, move it into place, remove what is too many."""
        if self.args.process_index != 0:
            return
        if self.args.world_size > 1 and not self.args.save_only_model:
            for rank in range(self.args.world_size):
                if not (folder / f"rng_state_{rank}.pth").is_file():
                    raise InputError(
                        f"process {rank} wrote elsewhere: --output_dir must be one folder for all machines"
                    )
        checkpoints.seal(folder, self.run)
        checkpoints.move_into_place(folder, place)
        limit = self.args.save_total_limit or sys.maxsize
        best = Path(str(self.state.best_model_checkpoint))
        now, found = self.state.global_step, checkpoints.checkpoints_in(place.parent)
        older = [path for path in found if checkpoints.step_of(path) < now]
        others = [path for path in older if path != best]
        kept = max(0, limit - 1 - (len(older) - len(others)))
        for path in others[: len(others) - kept]:
            checkpoints.remove(path)
        shutil.rmtree(folder.parent)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the encoder into a folder; what is there stays whole until all of it is written."""
        place = Path(str(output_dir or self.args.output_dir))
        if place.parent.name == checkpoints.UNFINISHED:
            super().save_model(str(place), _internal_call=True)
            return
        beside = place / checkpoints.UNFINISHED / "encoder"
        super().save_model(str(beside), _internal_call=True)
        if self.args.should_save:
            checkpoints.move_files(beside, place)
            shutil.rmtree(beside.parent)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if (damage := self.on_first(lambda: checkpoints.fault(best))) is None:
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
        raise NotImplementedError
