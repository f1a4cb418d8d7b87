"""The output folder of a recipe: locked before training, filled with the encoder and the run record after it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml
from filelock import BaseFileLock, FileLock, Timeout
from transformers import TrainerCallback

from fmicl_text.cli.launcher import launcher_arguments, launcher_processes, resume_command
from fmicl_text.errors import InputError, Interrupted
from fmicl_text.evaluation.plots import plot_training_curve
from fmicl_text.evaluation.report import write_json
from fmicl_text.files import write_atomic
from fmicl_text.hub.model_card import write_card
from fmicl_text.hub.run_record import run_record
from fmicl_text.loading import refuse_links
from fmicl_text.training.args import FMICLTrainingArguments
from fmicl_text.training.checkpoint import checkpoints_in, find_checkpoint, remove_checkpoint
from fmicl_text.training.trainer import FMICLTrainer

RESULTS_FILE, SETTINGS_FILE, CURVE_FILE = "results.json", "settings.yaml", "training_curve.png"
LOCK_FILE = ".lock"
FOLDER_LOCKS: dict[Path, BaseFileLock] = {}  # locks of this process
IGNORED_KEYS = {"output_dir": None, "resume_from_checkpoint": None}  # settings that do not affect the result


def check_processes(args: FMICLTrainingArguments) -> None:
    """Check that all requested processes are running. On a CPU, accelerate may silently start only one, or several that
    are not connected and write to the same folder.

    Raises:
        InputError: Fewer are running. The message explains how to start the others.
    """
    launched = launcher_arguments(psutil.Process().parents())
    requested = max(int(os.environ.get("WORLD_SIZE", 1)), launcher_processes(launched))
    if requested > args.world_size:
        on_cpu = "on CPUs start them with `accelerate launch --multi_gpu --num_processes N` and pass --use_cpu True"
        raise InputError(
            f"{requested} processes were requested, but the world size is {args.world_size}: "
            + (on_cpu if args.device.type == "cpu" else "see `accelerate launch --help`")
        )


def claim_output_dir(args: FMICLTrainingArguments) -> None:
    """Create and lock the output folder, or raise if it contains something that this run would overwrite.

    Raises:
        InputError: It contains a run, a checkpoint or a model and neither --overwrite_output_dir nor
            --resume_from_checkpoint was given; it is not writable; another training process is using it; or the
            checkpoint to resume from is missing or corrupted.
    """
    folder = Path(str(args.output_dir))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file, not a folder")
    found = [name for name in (RESULTS_FILE, "modules.json", "config.json") if (folder / name).exists()]
    found += [path.name for path in folder.glob("checkpoint-*")]
    if found and not args.overwrite_output_dir and not args.resume_from_checkpoint:
        raise InputError(
            f"--output_dir {folder} already contains {found[0]}: choose another folder, or pass --overwrite_output_dir"
            + (" or --resume_from_checkpoint auto" if "checkpoint" in found[-1] else "")
        )
    if args.process_index == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            FOLDER_LOCKS[folder] = FileLock(folder / LOCK_FILE)
            FOLDER_LOCKS[folder].acquire(timeout=0)  # released when the process ends, for any reason
        except Timeout as error:
            raise InputError(f"--output_dir {folder}: another training process is using it") from error
        except OSError as error:
            raise InputError(f"--output_dir {folder} is not writable: {error.strerror}") from error
        refuse_links(folder)
        find_checkpoint(folder, args.resume_from_checkpoint)  # before the data is read, which can take a long time


def is_finished(args: FMICLTrainingArguments, settings: Mapping[str, Any]) -> bool:
    """Whether a run that is to be resumed has finished with these settings."""
    results = Path(str(args.output_dir)) / RESULTS_FILE
    if not args.resume_from_checkpoint or not results.is_file():
        return False
    try:
        saved = dict(json.loads(results.read_text(encoding="utf-8"))["settings"])
    except (ValueError, KeyError, TypeError, RecursionError):  # not ours, or corrupted; rewritten at the end
        return False
    now = json.loads(json.dumps(dict(settings)))
    return {**saved, **IGNORED_KEYS} == {**now, **IGNORED_KEYS}


def run_training(trainer: FMICLTrainer) -> None:
    """Train, from the checkpoint in the arguments if there is one.

    Raises:
        InputError: See `FMICLTrainer.train`.
        Interrupted: After a signal, with the command that resumes.
    """
    trainer.add_callback(ClearOutputDir())
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except Interrupted as stop:
        if trainer.args.save_only_model:  # such a checkpoint cannot be resumed from
            raise
        latest = stop.checkpoint == checkpoints_in(stop.checkpoint.parent)[-1]
        message = f"{stop}. To resume: {resume_command('auto' if latest else str(stop.checkpoint))}"
        raise Interrupted(message, stop.signal_number, stop.checkpoint) from stop


class ClearOutputDir(TrainerCallback):
    """Clears the folder right before training, so that an error before that does not delete the old run."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clear_output_dir(args)


def clear_output_dir(args: FMICLTrainingArguments) -> None:
    """With --overwrite_output_dir, remove checkpoints and results of the run in the folder, nothing else."""
    if args.overwrite_output_dir and args.process_index == 0:
        folder = Path(str(args.output_dir))
        (folder / RESULTS_FILE).unlink(missing_ok=True)
        for checkpoint in checkpoints_in(folder):
            remove_checkpoint(checkpoint)


def end_together(trainer: FMICLTrainer) -> None:
    """Disconnect all processes at once: torch may abort if one exits while others are still communicating."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def save_run(trainer: FMICLTrainer, after: Mapping[str, float]) -> None:
    """Write the encoder, settings.yaml, training_curve.png, the model card and, last, results.json to the output
    folder.

    Args:
        trainer: After training, with its `metadata` set.
        after: Metrics of the encoder that is saved.

    Raises:
        InputError: A file could not be written, for example because the disk is full.
    """
    results = Path(str(trainer.args.output_dir)) / RESULTS_FILE
    trainer.checkpointer.write_or_raise(results, lambda: trainer.save_model(_internal_call=True))
    trainer.checkpointer.write_or_raise(results, lambda: write_record(trainer, after))


def write_record(trainer: FMICLTrainer, after: Mapping[str, float]) -> None:
    """Write the files of `save_run` other than the encoder, in the main process."""
    if not trainer.is_world_process_zero():
        return
    folder, args, run = Path(str(trainer.args.output_dir)), trainer.args, run_record(trainer, after)
    settings_text = yaml.safe_dump(dict(run["settings"]), sort_keys=False, allow_unicode=True)
    write_atomic(folder / SETTINGS_FILE, settings_text)
    score = next(iter(after), None)
    plot_training_curve(
        run["log_history"], folder / CURVE_FILE, f"{trainer.loss.objective_name}, seed {args.seed}", score
    )
    write_card(run, folder, trainer.hub_model_id)
    write_json(folder / RESULTS_FILE, run)


def print_rank0(args: FMICLTrainingArguments, message: str) -> None:
    """Print in the main process only."""
    if args.process_index == 0:
        print(message)
