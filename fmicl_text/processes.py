"""Whether all the processes are running that the launcher of this one was asked for.

accelerate does not pass the requested number on to the processes that it starts, so it is read from the command line of
the parent process.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from fmicl_text.errors import InputError

LAUNCH = "FMICL_TEXT_LAUNCH"  # environment variable with the `fmicl-text` command of this process and its children
# Environment variables with the number of processes, of torchrun, deepspeed and the launchers of MPI.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_processes(args: Any) -> None:
    """Check that all requested processes are running. On a CPU, `accelerate launch --cpu` silently starts only one.

    Args:
        args: Training arguments.

    Raises:
        InputError: Fewer are running. The message explains how to start the others.
    """
    from_environment = [int(value) for name in WORLD_SIZES if (value := os.environ.get(name, "")).isdecimal()]
    requested = max(*from_environment, launcher_processes(launcher_arguments(psutil.Process().parents())), 1)
    if requested > args.world_size:
        on_cpu = "on CPUs start them with `accelerate launch --multi_gpu --num_processes N`"
        raise InputError(
            f"{requested} processes were requested, but the world size is {args.world_size}: "
            + (on_cpu if args.device.type == "cpu" else "see `accelerate launch --help`")
        )


def launcher_arguments(parents: Sequence[psutil.Process]) -> list[str] | None:
    """The arguments of `accelerate launch`, in this process or in the command of a parent process; None without it."""
    if LAUNCH in os.environ:
        return list(json.loads(os.environ[LAUNCH])["launcher"])
    for parent in parents:
        with contextlib.suppress(psutil.Error):
            if (arguments := launch_arguments(parent.cmdline())) is not None:
                return arguments
    return None


def launch_arguments(command: list[str]) -> list[str] | None:
    """The arguments after `accelerate launch`, in any of its spellings; None for another command."""
    for i, word in enumerate(command):
        cli = Path(word).name == "accelerate" or word == "accelerate.commands.accelerate_cli"
        if cli and command[i + 1 : i + 2] == ["launch"]:
            return command[i + 2 :]
        if Path(word).name == "accelerate-launch" or word == "accelerate.commands.launch":
            return command[i + 1 :]
    return None


def launcher_processes(arguments: list[str] | None) -> int:
    """The number of processes that `accelerate launch` starts: from these arguments, else from its configuration file
    (by default that of `accelerate config`), else 1."""
    if arguments is None:
        return 1
    from accelerate.commands.config import default_config_file, load_config_from_file  # imports torch
    from accelerate.commands.launch import launch_command_parser

    with contextlib.suppress(SystemExit):  # arguments that accelerate itself would reject
        asked, _ = launch_command_parser().parse_known_args([*arguments, "script"])
        by_default = default_config_file if Path(default_config_file).is_file() and not asked.cpu else None
        file = asked.config_file or by_default
        return asked.num_processes or (load_config_from_file(file).num_processes if file else None) or 1
    return 1
