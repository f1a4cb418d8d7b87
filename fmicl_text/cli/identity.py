"""What identifies a run: its settings, and the content of the files that they name. Measured numbers hold for one
identity."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmicl_text.errors import InputError
from fmicl_text.files import content_hash, matching
from fmicl_text.losses.balance import AUTO, is_auto
from fmicl_text.training.args import FMICLTrainingArguments

# Settings that do not affect the result of a run, and beginnings of their names.
INCIDENTAL = ("output_dir", "block_size", "activation_checkpointing", "check_disk_space", "local_rank")
INCIDENTAL_PREFIXES = (
    *("logging_", "log_", "hub_", "push_to_hub", "report_to", "run_name", "disable_tqdm", "project", "trackio_"),
    *("dataloader_", "resume_", "overwrite_output_dir", "skip_memory_metrics", "include_", "save_", "ddp_", "do_"),
    *(
        "per_device_eval_batch_size",
        "eval_accumulation_steps",
        "eval_do_concat",
        "prediction_loss",
        "torch_empty_cache",
    ),
)

INPUTS = ("train_file", "test_file", "sts_dev_file", "retrieval_dev_folder", "dataset_name", "model_name_or_path")
LARGE = 2**30  # bytes; the content of larger inputs is not hashed
# Beginnings of the names of settings that do not affect what gamma and alpha measure: the encoder as it comes on the
# first batches. Neither does alpha.
LATER_PREFIXES = (
    *("alpha", "learning_rate", "weight_decay", "max_grad_norm", "max_steps", "num_train_epochs", "warmup_", "optim"),
    *("lr_scheduler", "adam_", "momentum", "encoder_momentum", "early_stopping", "eval_", "metric_for_best_model"),
    *("greater_is_better", "load_best_model_at_end", "skip_nonfinite", "probes"),
)


def is_incidental(name: str) -> bool:
    """Whether a setting does not affect the result of a run."""
    return name in INCIDENTAL or name.startswith(INCIDENTAL_PREFIXES)


def input_hashes(settings: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the files and folders that settings name, by setting. Above 1 GiB, only the names, sizes and times of
    the files count."""
    found = {}
    for name in INPUTS:
        hashes = [hash_ for path in paths_of(settings.get(name)) if (hash_ := input_hash(path)) is not None]
        if hashes:
            found[name] = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    return found


def paths_of(value: Any) -> list[str]:
    """The paths of a setting: none, one, or several, with the files that match a pattern."""
    given = [value] if isinstance(value, str) else value or []
    return [path for one in given for path in ([one] if os.path.lexists(one) else matching(one))]


def input_hash(path: str) -> str | None:
    """The hash of a file or folder; None for other names."""
    if os.path.isfile(path):
        status = os.stat(path)
        return content_hash(path) if status.st_size < LARGE else f"{status.st_size} bytes, {status.st_mtime_ns} ns"
    if not os.path.isdir(path):
        return None
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    total, digest = 0, hashlib.sha256()
    for file in files:
        status = file.stat()
        total += status.st_size
        digest.update(os.fsencode(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n"))
    if total < LARGE:
        return hashlib.sha256(content_hash(*files, root=path).encode()).hexdigest()
    return digest.hexdigest()


def same_setting(saved: Any, now: Any) -> bool:
    """Whether two values of a setting are equal, or two paths (or lists of paths) to the same files."""
    if isinstance(now, list) and len(now) == 1 and isinstance(saved, str):  # written by a version with one file only
        saved = [saved]
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        return all(map(same_setting, saved, now))
    if saved == now or not (isinstance(saved, str) and isinstance(now, str)):
        return bool(saved == now)
    return os.path.exists(now) and os.path.realpath(saved) == os.path.realpath(now)


def with_measured(run: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the numbers that a run measured for those that are "auto"."""
    return {
        name: run["hyperparameters"].get(name, value) if is_auto(value) else value for name, value in settings.items()
    }


def settings_to_repeat(run: Mapping[str, Any], args: FMICLTrainingArguments) -> dict[str, Any]:
    """The content of settings.yaml: the settings of a run with the numbers that it measured. `measured` has these
    numbers too, and the `measurement_hash` for which they hold.

    Args:
        run: The record of the run.
        args: Its training arguments.
    """
    settings = run["settings"] | dict.fromkeys(getattr(args, "taken_numbers", ()), AUTO)
    found = with_measured(run, settings)
    measured = {name: found[name] for name in ("gamma", "alpha") if found.get(name) != settings.get(name)}
    return found | ({"measured": measured | {"for": measurement_hash(settings, args)}} if measured else {})


def measurement_hash(settings: Mapping[str, Any], args: FMICLTrainingArguments) -> str:
    """A hash of all that the measured gamma and alpha depend on: settings, the content of the files that they name, the
    number of processes and the precision.

    Args:
        settings: As `resolved_settings` returns them, where gamma is a number only if it was given.
        args: The training arguments of these settings.
    """
    known = dict(settings) | input_hashes(settings)
    known = {name: known[name] for name in known if not is_incidental(name) and not name.startswith(LATER_PREFIXES)}
    known |= {"processes": args.world_size, "precision": str(args.mixed_precision)}
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]


def forget_measured(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The content of settings.yaml with "auto" in place of the numbers that a run measured, except those that have been
    changed since. `measured` is checked.

    Args:
        settings: Content of the file.
        where: Its name, for messages.

    Raises:
        InputError: `measured` is not as `settings_to_repeat` has it.
    """
    measured = settings.get("measured") or {}
    numbers = {name: measured[name] for name in measured if name != "for"} if isinstance(measured, Mapping) else {"": 0}
    for name, number in numbers.items():
        if name not in ("gamma", "alpha") or not isinstance(number, float) or not 0 < number < math.inf:
            raise InputError(f"{where}: measured must be as a run wrote it, got {measured!r:.80}")
    return dict(settings) | {name: AUTO for name, number in numbers.items() if settings.get(name) == number}


def take_measured(
    measured: Mapping[str, Any], settings: Mapping[str, Any], args: FMICLTrainingArguments, where: str
) -> None:
    """Use the gamma and alpha that were measured in an earlier run where they are "auto", if nothing has changed that
    they depend on. Else print that they are measured again.

    Args:
        measured: See `settings_to_repeat`.
        settings: Resolved settings of this run.
        args: Its training arguments, which are changed. Their `taken_numbers` are the names of those that are used.
        where: Where `measured` is from.
    """
    names = [name for name in measured if name != "for" and is_auto(getattr(args, name))]
    if measured.get("for") == measurement_hash(settings, args):
        vars(args).update({name: measured[name] for name in names}, taken_numbers=names)
    elif names and args.process_index == 0:
        verbs = ("was", "is") if len(names) == 1 else ("were", "are")
        was = f"{verbs[0]} measured for other settings or data, and {verbs[1]} measured again"
        print(f"{where}: its {' and '.join(names)} {was}")
