"""Saves, finds, compares and loads the checkpoints of a trainer."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fmicl_text.errors import InputError
from fmicl_text.evaluation.report import float32_products, library_versions
from fmicl_text.losses.balance import is_auto
from fmicl_text.losses.contrastive import ContrastiveLoss
from fmicl_text.losses.objectives import PairObjective
from fmicl_text.text.tokenization import RepeatedStream
from fmicl_text.training.checkpoint import (
    STATE,
    UNFINISHED,
    checkpoints_in,
    dataset_fingerprint,
    find_checkpoint,
    latest_valid_checkpoint,
    move_into_place,
    remove_checkpoint,
    saved_run,
    step_of,
    stopped_early,
    validate_checkpoint,
    write_manifest,
    wrote_checkpoint,
)
from fmicl_text.training.interface import is_overridden
from fmicl_text.training.parts import part_size
from fmicl_text.training.ranks import on_main_process, run_on_all_ranks
from fmicl_text.training.verdict import ScoreRecord

if TYPE_CHECKING:
    from fmicl_text.training.trainer import FMICLTrainer

logger = logging.getLogger(__name__)

RESUME_KEYS = (  # arguments that affect the final weights
    *("per_device_train_batch_size", "gradient_accumulation_steps", "mini_batch_size", "train_sampling_strategy"),
    *("seed", "data_seed", "max_steps", "num_train_epochs", "skip_nonfinite"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "momentum", "weight_decay", "max_grad_norm"),
    *("eval_strategy", "eval_steps", "eval_delay", "load_best_model_at_end", "metric_for_best_model"),
    *("greater_is_better", "optim_target_modules", "torch_compile"),
)
ACCELERATOR_KEYS = ("split_batches", "even_batches", "use_seedable_sampler")
# Entries of the resume signature that may differ when a finished run is started again.
VERSIONS = ("torch", "transformers", "fmicl_text")
INCIDENTAL_KEYS = ("threads", "device", "float32_products", "dataloader_num_workers", "callbacks", *VERSIONS)
# Arguments that do not affect the final weights; a change is reported.
HARMLESS_KEYS = ("save_strategy", "save_steps")
LAYOUT = ("processes", "per_device_train_batch_size")
# Entries of the resume signature that must be equal unless `resume_changed` is given; for the layout, their product.
RESUME_KEYS_STRICT = (*LAYOUT, "gradient_accumulation_steps", "data", "adapters_over")
# Bytes per element of quantized weights, which are saved in float32: a uint8 contains two 4-bit weights.
SAVED_BYTES = {torch.uint8: 8, torch.int8: 4}
MARGIN = 1.05  # for tokenizer, scheduler, random states and records, in addition to the weights


class Checkpointer:
    """The checkpoints of one trainer.

    A checkpoint is written into a temporary folder and renamed into place with a manifest, which lists its files and
    the resume signature: everything that a resumed run must share with the one that wrote it.

    Attributes:
        resumed_from: The checkpoint that this training was resumed from, or None.
        pass_start: The step at which the current pass over the data began.
    """

    def __init__(self, trainer: FMICLTrainer) -> None:
        self.trainer = trainer
        self.resumed_from: Path | None = None
        self.run: dict[str, Any] = {}  # the resume signature
        self.saved: dict[str, Any] = {}  # the signature of the checkpoint
        self.pass_start = 0
        self.changes: dict[str, str] = {}  # entries that differ from the checkpoint's signature, as text

    @property
    def output_dir(self) -> Path:
        return Path(str(self.trainer.args.output_dir))

    def folder(self, step: int) -> Path:
        """The checkpoint folder of a step."""
        return self.output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    # Before training

    def choose(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        """The checkpoint to resume from, validated and compared with this run; None to start from scratch.

        Warns:
            UserWarning: For a corrupted checkpoint that was skipped, and if resuming is not exact.

        Raises:
            InputError: The checkpoint does not exist, is corrupted, or belongs to a run with other data or batches; or
                there is too little space on the disk.
        """
        checkpoint, skipped = on_main_process(lambda: find_checkpoint(self.output_dir, resume_from_checkpoint))
        on_main_process(self.prepare_output_dir)
        if checkpoint is not None:
            self.take_automatic_values(on_main_process(lambda: saved_run(checkpoint)))
        self.run = on_main_process(self.trainer.resume_signature)
        self.resumed_from, self.changes = checkpoint, {}
        if checkpoint is not None:
            saved = on_main_process(lambda: saved_run(checkpoint))
            for message in (*skipped, *self.compare(checkpoint, saved)):
                warnings.warn(message, stacklevel=3)
        return checkpoint

    def prepare_output_dir(self) -> None:
        """Delete the unfinished files of a killed run, and check the disk space.

        Raises:
            InputError: Too little space on the disk for the next checkpoints.
        """
        args, folder = self.trainer.args, self.output_dir
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        if not args.check_disk_space:
            return
        encoder, checkpoint = self.sizes()
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        to_come = max(1, (args.save_total_limit or 1) + 1 - len(checkpoints_in(folder)))
        needed = encoder + (0 if args.save_strategy == "no" else to_come * checkpoint)
        free = shutil.disk_usage(place).free
        if free < needed:
            what = "the encoder needs" if args.save_strategy == "no" else f"{to_come} checkpoints need"
            raise InputError(
                f"output_dir={folder}: {what} about {needed / 2**20:.0f} MiB in total, but the disk has only "
                f"{free / 2**20:.0f} MiB left; reduce save_total_limit, or set save_only_model=True or "
                "check_disk_space=False"
            )

    def sizes(self) -> tuple[float, float]:
        """The sizes of the saved encoder and of a checkpoint, in bytes. Adapters are merged into the encoder, quantized
        weights are saved in float32, and the optimizer has a state of the weights that are trained."""
        model, args = self.trainer.model, self.trainer.args
        encoder = other = 0
        for name, weight in model.state_dict().items():
            size = weight.numel() * SAVED_BYTES.get(weight.dtype, weight.element_size())
            encoder, other = (encoder + size, other) if model.is_exported(name) else (encoder, other + size)
        trained = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)
        optimizer = 0.0 if args.save_only_model else trained * optimizer_state_ratio(self.trainer)
        return MARGIN * encoder, MARGIN * (encoder + other + optimizer)

    def resume_signature(self) -> dict[str, Any]:
        """Everything that a resumed run must share with this one to end with the same weights."""
        trainer, args, rows = self.trainer, self.trainer.args, self.trainer.train_dataset
        run: dict[str, Any] = {name: getattr(args, name, None) for name in (*RESUME_KEYS, *HARMLESS_KEYS)}
        run |= loss_signature(trainer.loss)
        accelerator: Any = args.accelerator_config
        run |= {name: getattr(accelerator, name) for name in ACCELERATOR_KEYS}
        run |= {"processes": args.world_size, "precision": trainer.accelerator.mixed_precision}
        run |= {"device": args.device.type, "float32_products": float32_products(args.device.type)}
        run |= {"threads": torch.get_num_threads()} if args.device.type == "cpu" else {}
        run |= workers_of_order(rows, args.dataloader_num_workers)
        run |= {"callbacks": self.callback_settings(), "save_only_model": args.save_only_model}
        installed = library_versions()
        run |= {"data": dataset_fingerprint(rows), **{name: installed.get(name) for name in VERSIONS}}
        for part in (trainer.data_collator, trainer.evaluator):
            run |= getattr(part, "describe", dict)()
        run |= trainer.model.describe_training() | getattr(trainer.views, "describe", dict)()
        return dict(json.loads(json.dumps(run, default=str)))  # as read from a manifest

    def take_automatic_values(self, saved: dict[str, Any]) -> None:
        """Use the alpha that was measured when the run began, and its gamma, where they are "auto" and the objective is
        the same."""
        loss = cast(Any, self.trainer.loss)
        now = loss_signature(loss)
        same = {"objective_name", "negatives", *loss.hyperparameters} - {"gamma", "alpha", "global_batch"}
        if any(saved.get(name) != now.get(name) for name in same):
            return
        if is_auto(now.get("gamma")):
            self.trainer.measured_gamma = loss.gamma = saved.get("gamma", loss.gamma)
        same_gamma = saved.get("gamma") == loss.hyperparameters.get("gamma")
        if is_auto(now.get("alpha")) and same_gamma and saved.get("alpha") is not None:
            self.trainer.measured_alpha = loss.alpha = saved["alpha"]

    def update_loss_signature(self) -> None:
        """Note the numbers that were measured, if gamma or alpha was "auto"."""
        if is_auto(self.run.get("alpha")) or is_auto(self.run.get("gamma")):
            self.run |= json.loads(json.dumps(loss_signature(self.trainer.loss), default=str))

    def callback_settings(self) -> dict[str, dict[str, Any]]:
        """Constructor arguments of the callbacks whose state is stored in checkpoints, by class name."""
        callbacks = [one for one in self.trainer.callback_handler.callbacks if isinstance(one, ExportableState)]
        callbacks = [one for one in callbacks if not isinstance(one, ScoreRecord)]  # older checkpoints have none
        return {type(one).__name__: one.state()["args"] for one in callbacks}

    def compare(self, checkpoint: Path, saved: dict[str, Any]) -> list[str]:
        """Messages that explain why resuming from a checkpoint is not exact.

        Args:
            checkpoint: Its folder.
            saved: The resume signature in its manifest.

        Raises:
            InputError: Data, batches or processes differ, and `resume_changed` is not set.
        """
        if saved.get("save_only_model"):
            raise InputError(f"{checkpoint} contains the model only (save_only_model=True) and cannot be resumed from")
        self.saved = saved
        now = self.run | {"save_only_model": False}  # does not affect the weights
        differing = [name for name, value in now.items() if saved.get(name, value) != value]
        self.changes = changes = {name: f"{name} {saved[name]} -> {self.run[name]}" for name in differing}
        self.trainer.parts.size, layout = self.layout_change(checkpoint, saved)
        self.run["examples_per_seed"] = self.trainer.parts.size
        is_plateau = "reduce_lr_on_plateau" in changes.get("lr_scheduler_type", "")
        if other := changes.get("optim") or (changes["lr_scheduler_type"] if is_plateau else None):
            raise InputError(
                f"{checkpoint} contains the state of another optimizer or schedule: {other}; resume with the original "
                "one, or start a new run from its weights"
            )
        strict = [changes[name] for name in RESUME_KEYS_STRICT if name in changes]
        if strict and not self.trainer.args.resume_changed:
            raise InputError(
                f"{checkpoint} was written by a different run: {', '.join(strict)}; resume with the original settings"
                f"{self.fitting_batch(saved)}, or pass resume_changed=True (the result will match neither run)"
            )
        inexact = [*layout, *(change for name, change in changes.items() if name not in HARMLESS_KEYS)]
        harmless = [change for name, change in changes.items() if name in HARMLESS_KEYS]
        if harmless:
            logger.warning("%s was written with %s", checkpoint, ", ".join(harmless))
        messages = [f"resuming is not exact: {checkpoint} was written with {', '.join(inexact)}"] if inexact else []
        if saved.get("pass_start") and not hasattr(self.trainer.train_dataset, "__len__"):
            messages.append(
                f"resuming is not exact: at {checkpoint} train_dataset, a stream, had been read to its end and begun "
                "again, but where it continues is known only of streams without end"
            )
        return messages

    def layout_change(self, checkpoint: Path, saved: dict[str, Any]) -> tuple[int, list[str]]:
        """The examples per part of a batch, see `Parts`, and what is inexact because of the layout. A layout with as
        many examples in the batch of all processes is removed from the changes."""
        args = self.trainer.args
        batch, processes, saved = args.train_batch_size, args.world_size, self.run | saved
        was = int(saved["processes"])
        size = part_size(batch, processes, saved)
        if size is None or (processes != was and not self.keeps_batches()):
            return batch, []
        if processes == was:
            return size, []
        for name in (*LAYOUT, "threads"):
            self.changes.pop(name, None)
        if args.process_index == 0:
            logger.warning(
                "%s was written with batches of processes x examples = %d x %d; now %d x %d, the same batches",
                *(checkpoint, was, batch * processes // was, processes, batch),
            )
        split = size < int(saved.get("examples_per_seed", saved["per_device_train_batch_size"]))
        return size, [f"dropout masks and augmentations are drawn for {size} examples at a time"] if split else []

    def fitting_batch(self, saved: dict[str, Any]) -> str:
        """What to pass for the batches of the checkpoint with this number of processes, if it differs."""
        saved, processes = self.run | saved, self.trainer.args.world_size
        total = saved["processes"] * saved["per_device_train_batch_size"]
        if saved["processes"] == processes or total % processes or not self.keeps_batches():
            return ""
        return f" or per_device_train_batch_size={total // processes}"

    def keeps_batches(self) -> bool:
        """Whether another number of processes can have the same batches and the same loss. Not with a loss of each
        process's own batch (which one that overrides `terms` may be), a stream of which each process may read its own
        shards, or a sampler that uses the global random state."""
        loss, rows = self.trainer.loss, self.trainer.train_dataset
        own = loss.global_batch == "none" or is_overridden(type(loss), ContrastiveLoss, "terms")
        shards = isinstance(rows, IterableDataset) and not isinstance(rows, RepeatedStream)
        accelerator: Any = self.trainer.args.accelerator_config
        return not own and not shards and accelerator.use_seedable_sampler and not accelerator.split_batches

    def is_done(self, checkpoint: Path, max_steps: int) -> bool:
        """Whether a checkpoint's run has ended: no step is left, or early stopping with these settings ended it.

        Raises:
            InputError: It has ended with other settings, so nothing would be trained with the current ones.
        """
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        settings = saved_run(checkpoint).get("callbacks", self.run["callbacks"])
        done = state.global_step >= max_steps or (stopped_early(state) and settings == self.run["callbacks"])
        others = [change for name, change in self.changes.items() if name not in (*INCIDENTAL_KEYS, *HARMLESS_KEYS)]
        if done and others and not self.trainer.args.resume_changed:
            raise InputError(
                f"{checkpoint} is the last checkpoint of a run that finished with other settings: {', '.join(others)}; "
                "choose another output_dir, or pass resume_changed=True to load its weights"
            )
        return done

    # During training

    def save(self) -> None:
        """Write the checkpoint of this step. Every process must call this.

        Raises:
            InputError: In every process, if one could not write. The previous checkpoints are unchanged.
        """
        place = self.folder(self.trainer.state.global_step)
        temporary = place.parent / UNFINISHED / place.name
        self.trainer.store_flos()
        self.write_or_raise(place, lambda: self.write(temporary, place))
        self.write_or_raise(place, lambda: self.finish(temporary, place))

    def write_or_raise(self, place: Path, function: Any) -> None:
        """Call a function that writes `place` in every process; raise `InputError` in all if it fails in any."""
        if (reason := run_on_all_ranks(function)) is None:
            return
        shutil.rmtree(place.parent / UNFINISHED, ignore_errors=True)  # frees space on a full disk
        good = on_main_process(lambda: latest_valid_checkpoint(place.parent))
        raise InputError(f"{place} could not be written: {reason}; last good checkpoint: {good or 'none'}")

    def write(self, folder: Path, place: Path) -> None:
        """Write everything but the manifest into a temporary folder; `place` is where the checkpoint will be."""
        trainer, args, state = self.trainer, self.trainer.args, self.trainer.state
        trainer.write_encoder(folder, training_only=True)
        best, known = self.folder(state.best_global_step or -1), state.best_model_checkpoint
        if best == place or (best.is_dir() and (known is None or not Path(known).is_dir())):
            state.best_model_checkpoint = str(best)
        if not args.save_only_model:
            trainer._save_optimizer_and_scheduler(str(folder))
            trainer._save_scaler(str(folder))
            trainer._save_rng_state(str(folder))
        if args.should_save:
            callbacks: Any = [*trainer.callback_handler.callbacks, trainer.control]
            stateful = [one for one in callbacks if isinstance(one, ExportableState)]
            saved: Any = {type(one).__name__: one.state() for one in stateful}
            state.stateful_callbacks = saved
            state.save_to_json(str(folder / STATE))

    def finish(self, folder: Path, place: Path) -> None:
        """Write the manifest, move the checkpoint into place and delete old ones beyond `save_total_limit`, in the main
        process, once all processes have written their files."""
        args = self.trainer.args
        if args.process_index != 0:
            return
        if args.world_size > 1 and not args.save_only_model:
            for rank in range(args.world_size):
                if not (folder / f"rng_state_{rank}.pth").is_file():
                    raise InputError(
                        f"process {rank} wrote to a different folder; output_dir must be shared by all machines"
                    )
        self.update_loss_signature()  # alpha may have been measured on the first batch
        write_manifest(folder, self.run | {"pass_start": self.pass_start})
        move_into_place(folder, place)
        limit = args.save_total_limit or sys.maxsize
        best = Path(str(self.trainer.state.best_model_checkpoint))
        now = self.trainer.state.global_step
        found = [path for path in checkpoints_in(place.parent) if wrote_checkpoint(path)]
        older = [path for path in found if step_of(path) < now]
        others = [path for path in older if path != best]
        kept = max(0, limit - 1 - (len(older) - len(others)))
        for path in others[: max(0, len(others) - kept)]:
            remove_checkpoint(path)
        shutil.rmtree(folder.parent)

    # When resuming, and at the end

    def locate_best(self) -> None:
        """Find the best checkpoint next to the one resumed from: the folder may have been moved since."""
        state = self.trainer.state
        if self.resumed_from is None or not state.best_global_step:
            return
        best = self.resumed_from.parent / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)
        elif state.best_model_checkpoint is None:
            warnings.warn(
                f"{best}, the best checkpoint so far, is missing: training will end with a better checkpoint if one "
                "is found, else with the last weights",
                stacklevel=2,
            )

    def load_best(self) -> None:
        """Load the best checkpoint of the run; if it is corrupted, warn and keep the current weights."""
        state = self.trainer.state
        best = Path(str(state.best_model_checkpoint))
        if (problem := on_main_process(lambda: validate_checkpoint(best))) is None:
            self.trainer.model.load_checkpoint(str(best))
        else:
            warnings.warn(f"{best} is corrupted ({problem}): using the last weights instead of the best", stacklevel=2)
            state.best_global_step = state.global_step


def loss_signature(loss: ContrastiveLoss) -> dict[str, Any]:
    """Everything that two runs must share to have the same loss."""
    signature: dict[str, Any] = {"objective_name": loss.objective_name} | loss.hyperparameters
    return signature | {"loss_class": class_name(loss), "objective_values": objective_values(loss)}


def class_name(loss: ContrastiveLoss) -> str:
    """The module and class of a loss: two modules may each have a class of one name."""
    return f"{type(loss).__module__}:{type(loss).__qualname__}"


def objective_values(loss: ContrastiveLoss) -> list[float] | None:
    """Similarities and terms of a loss at inner products of 0.9 (positive) and 0.1 (negative), to six digits. They
    differ if a user-defined divergence, similarity or objective of the same name has changed. None if the loss is not a
    mean over pairs."""
    try:
        objective = loss.objective
    except NotImplementedError:  # of a loss that overrides `terms`
        return None
    if not isinstance(objective, PairObjective):
        return None
    products = torch.tensor([0.9, 0.1], dtype=torch.float64)
    positive, negative = loss.similarity.of_product(products, loss.gamma)
    pair = objective.pair(negative)
    values = (positive, negative, objective.score(positive), pair, objective.outer(pair))
    return [float(f"{float(value):.6g}") for value in values]


def optimizer_state_ratio(trainer: Any) -> float:
    """The size of the optimizer's state relative to the weights, measured in one step of a small weight; 2, as for
    Adam, if it cannot be built for one."""
    weight = torch.nn.Parameter(torch.ones(64, 64))
    weight.grad = torch.ones_like(weight)
    given: Any = trainer.optimizer_cls_and_kwargs
    if trainer.optimizer is not None:
        given = type(trainer.optimizer), trainer.optimizer.defaults
    try:
        with torch.random.fork_rng(devices=[]):
            kind, kwargs = given or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
            kwargs = {name: value for name, value in kwargs.items() if name not in ("model", "params")}
            optimizer = kind([weight], **kwargs)
            optimizer.step()
    except Exception:  # any type, by third-party optimizers
        return 2.0
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in state) / (weight.numel() * weight.element_size())


def workers_of_order(rows: Any, workers: int) -> dict[str, int]:
    """The number of DataLoader workers if the order of rows depends on it. A stream of one shard is read by one worker,
    but a worker shuffles it in another order than the main process."""
    if not isinstance(rows, IterableDataset):
        return {}
    shards = getattr(getattr(rows, "stream", rows), "num_shards", workers)
    return {"dataloader_num_workers": min(workers, 1) if shards == 1 else workers}
