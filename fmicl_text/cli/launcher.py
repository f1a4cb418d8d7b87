"""What started this process: `accelerate launch`, how many processes it was asked for, the command to type again."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser


def launcher_arguments(parents: Sequence[psutil.Process]) -> list[str] | None:
    """What follows `accelerate launch` in the command of a parent process; None without one."""
    for parent in parents:
        with contextlib.suppress(psutil.Error):
            if (arguments := launch_arguments(parent.cmdline())) is not None:
                return arguments
    return None


def launch_arguments(command: list[str]) -> list[str] | None:
    """What follows `accelerate launch`, in any of its spellings, in a command; None for another command."""
    for i, word in enumerate(command):
        cli = Path(word).name == "accelerate" or word == "accelerate.commands.accelerate_cli"
        if cli and command[i + 1 : i + 2] == ["launch"]:
            return command[i + 2 :]
        if Path(word).name == "accelerate-launch" or word == "accelerate.commands.launch":
            return command[i + 1 :]
    return None


def launcher_processes(arguments: list[str] | None) -> int:
    """--num_processes of `accelerate launch` with these arguments, or of its configuration file, by default that of
    `accelerate config`; 1 if none says. accelerate hands it on to nobody."""
    if arguments is None:
        return 1
    with contextlib.suppress(SystemExit):  # arguments that accelerate itself would refuse
        asked, _ = launch_command_parser().parse_known_args(arguments)
        by_default = default_config_file if Path(default_config_file).is_file() and not asked.cpu else None
        file = asked.config_file or by_default
        return asked.num_processes or (load_config_from_file(file).num_processes if file else None) or 1
    return 1


def resume_command(checkpoint: str) -> str:
    """The command that started this run, with the flag that makes it go on from a checkpoint, or `auto`."""
    arguments = launcher_arguments(psutil.Process().parents())
    words = ["python", *sys.argv] if arguments is None else ["accelerate", "launch", *arguments]
    words = without(words, "--overwrite_output_dir", "--resume_from_checkpoint")
    return shlex.join([*words, "--resume_from_checkpoint", checkpoint])


def without(words: list[str], *flags: str) -> list[str]:
    """A command without some flags and their values."""
    kept: list[str] = []
    dropping = False
    for word in words:
        name, _, value = word.partition("=")
        dropping = (name in flags and not value) or (dropping and not word.startswith("--"))
        if not dropping and name not in flags:
            kept.append(word)
    return kept
