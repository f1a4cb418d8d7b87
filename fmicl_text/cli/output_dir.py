"""What a recipe does around training: claim the output folder, leave a record."""

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
from fmicl_text.training.checkpoint import checkpoints_in, find_checkpoint, remove
from fmicl_text.training.trainer import FMICLTrainer

RESULTS_FILE, SETTINGS_FILE, CURVE_FILE = "results.json", "settings.yaml", "training_curve.png"
LOCK_FILE = ".lock"
FOLDER_LOCKS: dict[Path, BaseFileLock] = {}  # of this process
IGNORED_KEYS = {"output_dir": None, "resume_from_checkpoint": None}  # settings that do not change what is trained


def check_processes(args: FMICLTrainingArguments) -> None:
    """Refuse to train with fewer processes than the launcher was asked for: accelerate on a CPU silently starts one, or
    several that know nothing of each other and write into the same folder.

    Raises:
        InputError: Says how many there are and how to get the others.
    """
    launched = launcher_arguments(psutil.Process().parents())
    asked = max(int(os.environ.get("WORLD_SIZE", 1)), launcher_processes(launched))
    if asked > args.world_size:
        on_cpu = "on CPUs start them with `accelerate launch --multi_gpu --num_processes N` and give --use_cpu True"
        raise InputError(
            f"{asked} processes were asked for, but this one trains with {args.world_size}: "
            + (on_cpu if args.device.type == "cpu" else "see `accelerate launch --help`")
        )


def claim_output_dir(args: FMICLTrainingArguments) -> None:
    """Make the output folder this run's own, or refuse one that holds something that this run would overwrite.

    Raises:
        InputError: It holds a run, a checkpoint or a model and neither --overwrite_output_dir nor
            --resume_from_checkpoint was given; it is no folder that can be written to; another process trains into it;
            or the checkpoint to go on from is not there, or damaged.
    """
    folder = Path(str(args.output_dir))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file, not a folder")
    held = [name for name in (RESULTS_FILE, "modules.json", "config.json") if (folder / name).exists()]
    held += [path.name for path in folder.glob("checkpoint-*")]
    if held and not args.overwrite_output_dir and not args.resume_from_checkpoint:
        raise InputError(
            f"--output_dir {folder} already holds {held[0]}: name another folder, or add --overwrite_output_dir"
            + (" or --resume_from_checkpoint auto" if "checkpoint" in held[-1] else "")
        )
    if args.process_index == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            FOLDER_LOCKS[folder] = FileLock(folder / LOCK_FILE)
            FOLDER_LOCKS[folder].acquire(timeout=0)  # held until the process ends, however it ends
        except Timeout as error:
            raise InputError(f"--output_dir {folder}: another process is training into it") from error
        except OSError as error:
            raise InputError(f"--output_dir {folder} cannot be written to: {error.strerror}") from error
        refuse_links(folder)
        find_checkpoint(folder, args.resume_from_checkpoint)  # before the data are read, which can take long


def is_finished(args: FMICLTrainingArguments, settings: Mapping[str, Any]) -> bool:
    """Whether a run that is to be gone on with has ended, with these very settings: nothing is left to do."""
    results = Path(str(args.output_dir)) / RESULTS_FILE
    if not args.resume_from_checkpoint or not results.is_file():
        return False
    try:
        then = dict(json.loads(results.read_text(encoding="utf-8"))["settings"])
    except (
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ):  # not one of ours, or damaged: it is written anew at the end
        return False
    now = json.loads(json.dumps(dict(settings)))
    return {**then, **IGNORED_KEYS} == {**now, **IGNORED_KEYS}


def run_training(trainer: FMICLTrainer) -> None:
    """Train, from the checkpoint that the arguments say.

    Raises:
        InputError: See `FMICLTrainer`.
        Interrupted: After a signal; says how to go on.
    """
    trainer.add_callback(ClearOutputDir())
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except Interrupted as stop:
        if trainer.args.save_only_model:  # nothing goes on from that
            raise
        newest = stop.checkpoint == checkpoints_in(stop.checkpoint.parent)[-1]
        told = f"{stop}. To go on: {resume_command('auto' if newest else str(stop.checkpoint))}"
        raise Interrupted(told, stop.signal_number, stop.checkpoint) from stop


class ClearOutputDir(TrainerCallback):
    """At the last moment before training: a mistake in anything that comes before then costs the old run nothing."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clear_output_dir(args)


def clear_output_dir(args: FMICLTrainingArguments) -> None:
    """With --overwrite_output_dir, remove checkpoints and results of the run that the folder holds, nothing else."""
    if args.overwrite_output_dir and args.process_index == 0:
        folder = Path(str(args.output_dir))
        (folder / RESULTS_FILE).unlink(missing_ok=True)
        for checkpoint in checkpoints_in(folder):
            remove(checkpoint)


def end_together(trainer: FMICLTrainer) -> None:
    """Leave the other processes when all are done: torch may abort in one that is gone while others still talk."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def save_run(trainer: FMICLTrainer, after: Mapping[str, float]) -> None:
    """Write the encoder, settings.yaml, training_curve.png, the model card and, last, results.json into the output
    folder.

    Args:
        trainer: After training; its `facts` are set.
        after: Metrics of the encoder that is saved.

    Raises:
        InputError: The disk is full, for one.
    """
    results = Path(str(trainer.args.output_dir)) / RESULTS_FILE
    trainer.together(results, lambda: trainer.save_model(_internal_call=True))
    trainer.together(results, lambda: write_record(trainer, after))


def write_record(trainer: FMICLTrainer, after: Mapping[str, float]) -> None:
    """What `save_run` writes beside the encoder, in the first process."""
    if not trainer.is_world_process_zero():
        return
    folder, args, run = Path(str(trainer.args.output_dir)), trainer.args, run_record(trainer, after)
    settings_text = yaml.safe_dump(dict(run["settings"]), sort_keys=False, allow_unicode=True)
    write_atomic(folder / SETTINGS_FILE, settings_text)
    (score, *_) = after
    plot_training_curve(run["log_history"], folder / CURVE_FILE, f"{args.objective_name}, seed {args.seed}", score)
    write_card(run, folder, trainer.hub_model_id)
    write_json(folder / RESULTS_FILE, run)
