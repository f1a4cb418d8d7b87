"""What a recipe does around training: claim the output folder, leave a record."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers.trainer_utils import get_last_checkpoint

from fmicl_text.card import write_card
from fmicl_text.errors import InputError
from fmicl_text.evaluation.plots import plot_training_curve
from fmicl_text.evaluation.report import write_json
from fmicl_text.record import run_record
from fmicl_text.trainer import FMICLTrainer
from fmicl_text.training_args import FMICLTrainingArguments

RESULTS_FILE, SETTINGS_FILE, CURVE_FILE = "results.json", "settings.yaml", "training_curve.png"


def check_processes(args: FMICLTrainingArguments) -> None:
    """Refuse to train with fewer processes than the launcher was asked for: accelerate on a CPU silently starts one, or
    several that know nothing of each other and write into the same folder.

    Raises:
        InputError: Says how many there are and how to get the others.
    """
    asked = max(int(os.environ.get("WORLD_SIZE", 1)), launcher_processes(psutil.Process().parents()))
    if asked > args.world_size:
        on_cpu = "on CPUs start them with `accelerate launch --multi_gpu --num_processes N` and give --use_cpu True"
        raise InputError(
            f"{asked} processes were asked for, but this one trains with {args.world_size}: "
            + (on_cpu if args.device.type == "cpu" else "see `accelerate launch --help`")
        )


def launcher_processes(parents: list[psutil.Process]) -> int:
    """--num_processes of the `accelerate launch` among the parent processes, or of its configuration file, by default
    that of `accelerate config`; 1 if none says. accelerate hands it on to nobody."""
    for parent in parents:
        try:
            command = parent.cmdline()
        except psutil.Error:
            continue
        arguments = launch_arguments(command)
        if arguments is None:
            continue
        with contextlib.suppress(SystemExit):  # arguments that accelerate itself would refuse
            asked, _ = launch_command_parser().parse_known_args(arguments)
            by_default = default_config_file if Path(default_config_file).is_file() and not asked.cpu else None
            file = asked.config_file or by_default
            return asked.num_processes or (load_config_from_file(file).num_processes if file else None) or 1
    return 1


def launch_arguments(command: list[str]) -> list[str] | None:
    """What follows `accelerate launch`, in any of its spellings, in a command; None for another command."""
    for i, word in enumerate(command):
        cli = Path(word).name == "accelerate" or word == "accelerate.commands.accelerate_cli"
        if cli and command[i + 1 : i + 2] == ["launch"]:
            return command[i + 2 :]
        if Path(word).name == "accelerate-launch" or word == "accelerate.commands.launch":
            return command[i + 1 :]
    return None


def claim_output_dir(args: FMICLTrainingArguments) -> None:
    """Make the output folder, or refuse one that holds something that this run would overwrite.

    Raises:
        InputError: It holds a run, a checkpoint or a model and neither --overwrite_output_dir nor
            --resume_from_checkpoint was given; or it is no folder that can be written to.
    """
    folder = Path(str(args.output_dir))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file, not a folder")
    held = [name for name in (RESULTS_FILE, "modules.json", "config.json") if (folder / name).exists()]
    held += [path.name for path in folder.glob("checkpoint-*")]
    if held and not args.overwrite_output_dir and not args.resume_from_checkpoint:
        raise InputError(
            f"--output_dir {folder} already holds {held[0]}: name another folder, or add --overwrite_output_dir"
            + (" or --resume_from_checkpoint True" if "checkpoint" in held[-1] else "")
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output_dir {folder} cannot be written to")


def clear_output_dir(args: FMICLTrainingArguments) -> None:
    """With --overwrite_output_dir, remove the checkpoints and results of the run that the folder holds, nothing else.

    For the last moment before training: a mistake in the data or the model then costs the old run nothing."""
    if args.overwrite_output_dir and args.process_index == 0:
        folder = Path(str(args.output_dir))
        for path in [folder / RESULTS_FILE, *folder.glob("checkpoint-*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def checkpoint_to_resume(args: FMICLTrainingArguments) -> str | None:
    """The checkpoint folder that --resume_from_checkpoint names; the newest in the output folder for `True`.

    Raises:
        InputError: There is none.
    """
    named = args.resume_from_checkpoint
    if named is None or str(named).lower() == "false":
        return None
    newest = str(named).lower() == "true"
    folder = get_last_checkpoint(args.output_dir) if newest and Path(str(args.output_dir)).is_dir() else named
    if folder is None or not (Path(folder) / "trainer_state.json").is_file():
        where = f"{args.output_dir} holds none" if newest else f"{named} is none"
        raise InputError(f"--resume_from_checkpoint {named}: no checkpoint to resume from, {where}")
    return str(folder)


def data_facts(data: Any) -> dict[str, Any]:
    """What a run says and records of its training text (`text.data.TextData`); unknown, when streaming, is left out."""
    facts = {
        "source": data.source,
        "columns": " ".join(data.columns),
        "rows": None if data.num_skipped is None else len(data.dataset),
        "blank rows skipped": data.num_skipped,
        "share of duplicates": None if data.duplicate_share is None else round(data.duplicate_share, 4),
    }
    return {name: value for name, value in facts.items() if value is not None}


def scored_on(
    name: str,
    dataset_id: str | None = None,
    task: str | None = None,
    split: str | None = None,
    revision: str | None = None,
) -> dict[str, str | None]:
    """What metrics are of, for the record and the card.

    Args:
        name: For people.
        dataset_id, task, split, revision: Where the data can be looked up on the Hub, and its commit; MTEB's name.
    """
    return {"name": name, "dataset_id": dataset_id, "task": task, "split": split, "revision": revision}


def save_run(trainer: FMICLTrainer, after: Mapping[str, float]) -> None:
    """Write the encoder, settings.yaml, training_curve.png, the model card and, last, results.json into the output
    folder.

    Args:
        trainer: After training; its `facts` are set.
        after: Metrics of the encoder that is saved.
    """
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return
    folder, args, run = Path(str(trainer.args.output_dir)), trainer.args, run_record(trainer, after)
    settings_text = yaml.safe_dump(dict(run["settings"]), sort_keys=False, allow_unicode=True)
    (folder / SETTINGS_FILE).write_text(settings_text, encoding="utf-8")
    (score, *_) = after
    plot_training_curve(run["log_history"], folder / CURVE_FILE, f"{args.objective_name}, seed {args.seed}", score)
    write_card(run, folder, trainer.hub_model_id)
    write_json(folder / RESULTS_FILE, run)
