"""The output folder of a recipe: checked before training, filled with the encoder and the run record after it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmicl_text.cli.identity import (
    input_hashes,
    is_incidental,
    paths_of,
    same_setting,
    settings_to_repeat,
    with_measured,
)
from fmicl_text.cli.launcher import resume_command
from fmicl_text.cli.parser import FLAGS, add_dashes, printable
from fmicl_text.errors import InputError, Interrupted
from fmicl_text.evaluation.plots import plot_training_curve
from fmicl_text.evaluation.report import write_json
from fmicl_text.files import content_hash, move_files
from fmicl_text.hub.model_card import CARD, write_card, wrote_card
from fmicl_text.hub.run_record import run_record
from fmicl_text.training.args import FMICLTrainingArguments
from fmicl_text.training.checkpoint import UNFINISHED, checkpoints_in
from fmicl_text.training.output_dir import (
    COMPLETE,
    CURVE_FILE,
    REPLACED,
    RESULTS_FILE,
    SETTINGS_FILE,
    check_output_dir,
    complete_save,
    read_results,
    resolve_output_dir,
    settings_text,
)
from fmicl_text.training.ranks import on_main_process
from fmicl_text.training.trainer import FMICLTrainer
from fmicl_text.training.verdict import Scores, give_verdict


def claim_output_dir(args: FMICLTrainingArguments, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Check, before anything is read, that this run may write into the output folder.

    Args:
        args: Training arguments.
        settings: Resolved settings of the run.
        defaults: Default values of all options; settings omit some that have them.

    Returns:
        Whether the folder contains the results of this very run, and the run is to be resumed.

    Raises:
        InputError: See `check_output_dir`.
    """

    def check() -> bool:
        for name in ("train_file", "test_file", "dataset_name", "retrieval_dev_folder"):
            for path in paths_of(settings.get(name)):
                check_outside(args.output_dir, f"{name}={path}", path)
        complete_save(args.output_dir)
        finished = bool(args.resume_from_checkpoint)
        finished = finished and is_finished(
            args.output_dir, settings, defaults, args.world_size, str(args.mixed_precision)
        )
        check_output_dir(args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir, finished)
        return finished

    return on_main_process(check)


def check_outside(output_dir: Any, source: str, data: Any) -> None:
    """Raise `InputError` if the output folder is in a folder of training data, which would read it as data."""
    if data and os.path.isdir(data) and resolve_output_dir(output_dir).is_relative_to(Path(data).resolve()):
        raise InputError(f"output_dir={output_dir} is in the folder of {source}, and would be read as data")


def is_finished(
    output_dir: Any,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any],
    processes: int | None = None,
    precision: str | None = None,
) -> bool:
    """Whether the results in an output folder are those of a run with these settings."""
    try:
        results = read_results(resolve_output_dir(output_dir))
    except OSError as error:
        raise InputError(f"output_dir={output_dir}: {RESULTS_FILE} cannot be read: {error.strerror}") from error
    if not results:
        return False
    saved, now = results["settings"], json.loads(json.dumps(dict(settings)))
    measured = with_measured(results, saved)  # of settings.yaml
    saved = saved | {name: value for name, value in measured.items() if now.get(name) == value}
    known = [name for name in defaults if not is_incidental(name)]
    same = all(same_setting(saved.get(name, defaults[name]), now.get(name, defaults[name])) for name in known)
    same = same and processes in (None, results.get("processes", processes))
    same = same and precision in (None, results.get("precision", precision))  # that of the launcher is no setting
    if not same or not isinstance(recorded := results.get("inputs", {}), dict):
        return False
    found = input_hashes(settings)
    return all(found.get(name, value) == value for name, value in recorded.items())


def run_training(trainer: FMICLTrainer) -> None:
    """Train, from the checkpoint in the arguments if there is one.

    Raises:
        InputError: See `FMICLTrainer.train`.
        Interrupted: After a signal, with the command that resumes.
    """
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except Interrupted as stop:
        if trainer.args.save_only_model:  # such a checkpoint cannot be resumed from
            raise
        latest = stop.checkpoint == checkpoints_in(stop.checkpoint.parent)[-1]
        command = resume_command("auto" if latest else str(stop.checkpoint), trainer.args.overwrite_output_dir)
        message = f"{stop}. To resume: {command}"
        raise Interrupted(message, stop.signal_number, stop.checkpoint) from stop


def end_together(trainer: FMICLTrainer) -> None:
    """Disconnect all processes at once: torch may abort if one exits while others are still communicating."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def judge_run(trainer: FMICLTrainer, before: Scores | None) -> None:
    """Compare the encoder after training, which was just evaluated, with the one before, unless the training did so
    because it selects checkpoints.

    Args:
        trainer: After training, with its `metadata` set.
        before: Scores before training; None without evaluation data.
    """
    if before is not None and trainer.scores is not None and not trainer.step_zero.is_candidate:
        give_verdict(trainer, before, trainer.scores)


def print_verdict(trainer: FMICLTrainer) -> None:
    """Print the last line of a run, in the main process."""
    if trainer.verdict is not None:
        print_rank0(trainer.args, f"Verdict: {add_dashes(printable(trainer.verdict.text), FLAGS)}")


def save_run(trainer: FMICLTrainer, after: Mapping[str, float]) -> None:
    """Write the encoder, settings.yaml, training_curve.png, the model card and results.json to the output folder. The
    files are moved there when all are complete.

    Args:
        trainer: After training, with its `metadata` set.
        after: Metrics of the encoder that is saved.

    Raises:
        InputError: A file could not be written, for example because the disk is full.
    """
    folder = Path(str(trainer.args.output_dir))
    results, files = folder / RESULTS_FILE, folder / UNFINISHED / "final"
    trainer.checkpointer.write_or_raise(results, lambda: trainer.write_encoder(files))
    trainer.checkpointer.write_or_raise(results, lambda: write_record(trainer, after, files))


def write_record(trainer: FMICLTrainer, after: Mapping[str, float], files: Path) -> None:
    """Add the other files of `save_run` to the encoder in the folder `files`, and move all of them to the output
    folder, in the main process."""
    if not trainer.is_world_process_zero():
        return
    folder, args, run = Path(str(trainer.args.output_dir)), trainer.args, run_record(trainer, after)
    (files / SETTINGS_FILE).write_text(settings_text(settings_to_repeat(run, args)), encoding="utf-8")
    chosen = f"eval_{args.metric_for_best_model}".replace("eval_eval_", "eval_")  # the metric that selects
    score = chosen if chosen in after else next(iter(after), None)
    plot_training_curve(
        run["log_history"], files / CURVE_FILE, f"{trainer.loss.objective_name}, seed {args.seed}", score
    )
    if not (folder / CARD).exists() or wrote_card(folder / CARD):
        write_card(run, files, trainer.hub_model_id or folder.resolve().name)
    card = {"card": content_hash(files / CARD)} if (files / CARD).is_file() else {}
    write_json(files / RESULTS_FILE, run | card)
    shutil.rmtree(folder / COMPLETE, ignore_errors=True)
    files.rename(folder / COMPLETE)  # from here on, `complete_save` completes the save after a kill
    (folder / REPLACED).unlink(missing_ok=True)
    move_files(folder / COMPLETE, folder)
    shutil.rmtree(folder / UNFINISHED)


def finished_message(args: FMICLTrainingArguments) -> str:
    """What is printed if there is nothing to train."""
    push = f"; to upload it: fmicl-text push {args.output_dir} {args.hub_model_id or 'you/name'}"
    return f"{args.output_dir} already contains this finished run; nothing to do{push if args.push_to_hub else ''}"


def print_rank0(args: FMICLTrainingArguments, message: str) -> None:
    """Print in the main process only."""
    if args.process_index == 0:
        print(message)
