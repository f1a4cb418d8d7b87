"""The help of the recipes. `--help` lists the options that users set, by purpose; `--help_all` lists all of them."""

from __future__ import annotations

import shutil
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Collection, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any

from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool

from fmicl_text.training.args import FIXED_ARGUMENTS

# Options by section. A text replaces the help of transformers; None keeps the help of the field.
TRAINING_SECTIONS: dict[str, dict[str, str | None]] = {
    "Objective": {
        "method": None,
        "queue_size": None,
        "encoder_momentum": None,
        "objective": None,
        "divergence": None,
        "tsallis_order": None,
        "gamma": None,
        "alpha": None,
        "temperature": None,
        "similarity": None,
        "negatives": None,
        "global_batch": None,
    },
    "Training": {
        "per_device_train_batch_size": None,
        "mini_batch_size": None,
        "block_size": None,
        "learning_rate": None,
        "lr_scheduler_type": "Learning rate schedule, such as constant, linear or cosine.",
        "warmup_steps": "Warmup steps; a number below 1 is a fraction of all steps.",
        "optim": "Optimizer, by its name in transformers.",
        "weight_decay": "Weight decay, not applied to biases and norms.",
        "momentum": None,
        "num_train_epochs": None,
        "max_steps": "Number of training steps; overrides --num_train_epochs.",
        "bf16": "bfloat16 mixed precision, on CPUs and on Ampere or newer GPUs.",
        "activation_checkpointing": "Recompute activations: less memory, 20% slower.",
        "train_sampling_strategy": None,
        "dataloader_num_workers": "Number of data-loading processes. Increase it if the GPU waits for data.",
        "skip_nonfinite": None,
        "seed": "Random seed of initialization, data order, dropout and views.",
        "use_cpu": "Train on the CPU even if there is a GPU.",
    },
    "Evaluation and checkpoints": {
        "eval_strategy": None,
        "eval_steps": "Evaluate every N steps.",
        "metric_for_best_model": None,
        "load_best_model_at_end": None,
        "early_stopping_patience": None,
        "save_strategy": "When to save a checkpoint: no, steps, epoch or best.",
        "save_steps": "Save a checkpoint every N steps.",
        "save_total_limit": None,
        "check_disk_space": None,
        "resume_from_checkpoint": "Checkpoint to resume from; True: the latest; auto: the latest, if there is one.",
        "resume_changed": None,
    },
    "Output and Hub": {
        "output_dir": "Folder for encoder, checkpoints and results (default: runs/<objective>).",
        "overwrite_output_dir": None,
        "logging_steps": None,
        "report_to": "Loggers, such as tensorboard or wandb.",
        "push_to_hub": "Upload the encoder to the Hub at every checkpoint and at the end of training.",
        "hub_model_id": "Repository on the Hub (default: the name of --output_dir).",
        "hub_private_repo": "Create the repository as private.",
    },
}
OPTIONS: dict[str, str | None] = {"config": None, "help": None, "help_all": None}
HIDDEN = {*FIXED_ARGUMENTS, "hub_token"}  # options that must not be changed
TYPES = {int: "INT", float: "FLOAT", string_to_bool: "BOOL", dict: "JSON"}
TRANSFORMERS_HELP = {field.name: field.metadata.get("help") for field in fields(TrainingArguments)}
FEW = 10  # maximum number of choices that `--help` lists
INDENT = 24


def recipe_help(parser: Any, groups: Sequence[Any], everything: bool) -> str:
    """The text of `--help` or `--help_all`.

    Args:
        parser: The parser of the recipe.
        groups: Dataclasses of the recipe's options: model, data, training arguments.
        everything: Include the options of transformers that `--help` omits.
    """
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    options = {action.dest: action for action in reversed(parser._actions)}  # reversed: --x, not --no_x
    options = {name: action for name, action in options.items() if name not in HIDDEN and action.help != SUPPRESS}
    sections = {"Model": names(groups[0]), "Data": names(groups[1]), **TRAINING_SECTIONS}
    chosen = set().union(*sections.values())
    if everything:
        sections["transformers.TrainingArguments"] = names(groups[2], chosen)
    lines = [f"usage: {parser.prog} [--config FILE] [--OPTION VALUE ...]", ""]
    lines += textwrap.wrap(parser.description, width)
    for title, texts in {"Options": OPTIONS, **sections}.items():
        lines += ["", f"{title}:"]
        for name, text in texts.items():
            if name in options:
                lines += describe(options[name], text, width, everything)
    lines.append("")
    if not everything:
        lines.append("All other options of transformers.TrainingArguments: --help_all")
    if parser.prog.startswith("fmicl-text"):
        lines.append("Flags of `accelerate launch`, such as --num_processes, are passed to it.")
    return "\n".join(lines) + "\n"


def names(group: Any, without: Collection[str] = ()) -> dict[str, str | None]:
    """Names of the fields of a dataclass, in the form of a section."""
    return dict.fromkeys(field.name for field in fields(group) if field.name not in without)


def describe(action: Action, text: str | None, width: int, everything: bool) -> list[str]:
    """Lines of an option: flag, type, text, choices and default.

    Args:
        action: The option.
        text: Help text that replaces the one of transformers.
        width: Characters per line.
        everything: List the choices, regardless of their number.
    """
    kind = "NAME" if action.choices else TYPES.get(action.type, "STR")
    is_switch = action.nargs == 0 or (action.nargs == "?" and action.default is False)
    flag = f"  --{action.dest}" if is_switch else f"  --{action.dest} {action.metavar or kind}"
    own = action.help if action.help != TRANSFORMERS_HELP.get(action.dest) else None
    text = (own or text or action.help or "").replace("%%", "%")
    choices = list(map(str, action.choices or ()))
    if any(choice not in text for choice in choices) and (everything or len(choices) <= FEW):
        text += f" One of: {', '.join(choices)}."
    if action.default not in (None, SUPPRESS, "", []) and "default" not in text.lower():
        text += f" (default: {action.default.value if isinstance(action.default, Enum) else action.default})"
    first = f"{flag:{INDENT - 2}}  "
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * INDENT, break_on_hyphens=False)
