"""transformers' Trainer whose checkpoints are whole or not there, and whose folder stays whole while it is written."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fmicl_text.errors import InputError
from fmicl_text.files import move_files
from fmicl_text.losses.contrastive import ContrastiveLoss
from fmicl_text.model import ContrastiveModel
from fmicl_text.training import checkpoint as checkpoints
from fmicl_text.training.args import FMICLTrainingArguments
from fmicl_text.training.callbacks import NonFiniteError
from fmicl_text.training.pushing import PushingTrainer

T = TypeVar("T")
SAME = (  # arguments that decide the weights at the end
    *("per_device_train_batch_size", "gradient_accumulation_steps", "mini_batch_size", "train_sampling_strategy"),
    *("seed", "data_seed", "max_steps", "num_train_epochs", "objective_name", "skip_nonfinite"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "momentum", "weight_decay", "max_grad_norm"),
    *("eval_strategy", "eval_steps", "eval_delay", "load_best_model_at_end", "metric_for_best_model"),
    "greater_is_better",
)
PER_WEIGHT = 3.5  # bytes of a checkpoint over bytes of the weights: Adam's two moments, head, some for the rest
MODEL_ONLY = 1.5


class SavingTrainer(PushingTrainer):
    """The part of `FMICLTrainer` that writes.

    A checkpoint is written beside its place and moved there with a manifest of its files and of what must be the same
    for a run that goes on from it.
    """

    model: ContrastiveModel
    loss: ContrastiveLoss
    args: FMICLTrainingArguments
    run: dict[str, Any]

    def on_main_process(self, function: Callable[[], T]) -> T:
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
        per_weight = MODEL_ONLY if self.args.save_only_model else PER_WEIGHT
        needed, free = to_come * per_weight * weights, shutil.disk_usage(place).free
        if free < needed:
            raise InputError(
                f"--output_dir {folder}: {to_come} checkpoints take about {needed / 2**20:.0f} MiB, the disk has "
                f"{free / 2**20:.0f}; a smaller --save_total_limit, or --save_only_model True, takes less"
            )

    def resume_signature(self) -> dict[str, Any]:
        """What a run that goes on from this one's checkpoints must have in common with it to end with the same
        weights."""
        args = self.args
        run: dict[str, Any] = {name: getattr(args, name, None) for name in SAME}
        run |= {"processes": args.world_size, "precision": self.accelerator.mixed_precision}
        run |= {"threads": torch.get_num_threads()} if args.device.type == "cpu" else {}
        run |= self.loss.hyperparameters | {"callbacks": self.callback_settings()}
        run |= {"data": checkpoints.fingerprint(self.train_dataset), "save_only_model": args.save_only_model}
        return run

    def callback_settings(self) -> dict[str, dict[str, Any]]:
        """By class, what the callbacks were built with, of those that checkpoints hold the state of."""
        callbacks = [one for one in self.callback_handler.callbacks if isinstance(one, ExportableState)]
        return {type(one).__name__: one.state()["args"] for one in callbacks}

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
            good = self.on_main_process(lambda: checkpoints.latest_valid_checkpoint(place.parent))
            raise InputError(f"{place} could not be written: {failures[0]}; last good checkpoint: {good or 'none'}")

    def write_checkpoint(self, folder: Path, place: Path) -> None:
        """Everything that going on takes, but the manifest, into a folder beside the place where it will be."""
        state, args = self.state, self.args
        super().save_model(str(folder), _internal_call=True)
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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the encoder as a SentenceTransformer folder. The base class would write the wrapper's bare state
        dict, and a pickle of the arguments that can hold a Hub token.

        Args:
            output_dir: The folder, by default that of the arguments.
            state_dict: Whole weights of the model, where an engine has sharded its own."""
        if not self.args.should_save:  # with FSDP every process gets here
            return
        state = self.model.state_dict() if state_dict is None else state_dict
        broken = [name for name, weight in state.items() if not weight.isfinite().all()]
        if broken:
            raise NonFiniteError(f"step {self.state.global_step}: {broken[0]} is not finite; nothing was written")
        folder = str(output_dir or self.args.output_dir)
        self.model.save_encoder(folder, state)
        if Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR):
            self.model.save_training_only(folder, state)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the encoder into a folder; what is there stays whole until all of it is written."""
        place = Path(str(output_dir or self.args.output_dir))
        beside = place / checkpoints.UNFINISHED / "encoder"
        super().save_model(str(beside), _internal_call=True)
        if self.args.should_save:
            move_files(beside, place)
            shutil.rmtree(beside.parent)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()
