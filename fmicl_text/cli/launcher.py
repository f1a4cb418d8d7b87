"""How this process was launched: the command that resumes the run."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from fmicl_text.processes import LAUNCH, launch_arguments

SHELLS = ("sh", "bash", "dash", "zsh", "fish", "csh", "tcsh", "ksh")


def resume_command(checkpoint: str, overwrite: bool = False) -> str:
    """The command that started this run, with --resume_from_checkpoint set to a checkpoint or to `auto`.

    Args:
        checkpoint: The checkpoint, or `auto`.
        overwrite: Whether overwrite_output_dir was set, which may be in the file of --config.
    """
    if LAUNCH in os.environ:
        program, *rest = json.loads(os.environ[LAUNCH])["command"]
        words = [executable(program), *rest]
    else:
        words = launched_command(psutil.Process().parents()) or [executable("python"), *sys.argv]
    words = without(words, "--overwrite_output_dir", "--resume_from_checkpoint")
    if overwrite and any(word.partition("=")[0] == "--config" for word in words):
        words += ["--overwrite_output_dir", "False"]
    return shlex.join([*words, "--resume_from_checkpoint", checkpoint])


def launched_command(parents: Sequence[psutil.Process]) -> list[str] | None:
    """The command of `accelerate launch` or `torchrun` that started this script; None without one. A launcher of
    another script, which started this one by itself, does not count."""
    last = None
    for parent in parents:
        with contextlib.suppress(psutil.Error):
            command = parent.cmdline()
            if command and Path(command[0]).name not in SHELLS and any(runs_this_script(word) for word in command[1:]):
                last = command  # mpirun, deepspeed, srun, torch.distributed.launch, timeout, ...
            for program, arguments in (
                ([executable("accelerate"), "launch"], launch_arguments(command)),
                ([executable("torchrun")], torchrun_arguments(command)),
            ):
                if arguments is not None and any(runs_this_script(word) for word in arguments):
                    return [*program, *arguments]
    return last


def torchrun_arguments(command: list[str]) -> list[str] | None:
    """The arguments after `torchrun`, in any of its spellings; None for another command."""
    for i, word in enumerate(command):
        if Path(word).name == "torchrun" or word == "torch.distributed.run":
            return command[i + 1 :]
    return None


def runs_this_script(word: str) -> bool:
    """Whether a word of a command is the path of the running script, or its module; no word is that of `python -c`."""
    script = Path(sys.argv[0])
    if script.name in ("", "-c"):
        return False
    return Path(word).name == script.name or word.rpartition(".")[2] == script.stem


def executable(name: str) -> str:
    """The name of a program of this Python environment, with its folder unless the shell would find the same one."""
    own = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    return str(own) if own.is_file() and (found is None or Path(found).resolve() != own.resolve()) else name


def without(words: list[str], *flags: str) -> list[str]:
    """A command without some flags, spelled with underscores or dashes, and their values."""
    kept: list[str] = []
    dropping = False
    for word in words:
        name, _, value = word.partition("=")
        is_flag = name.startswith("--") and f"--{name[2:].replace('-', '_')}" in flags
        dropping = (is_flag and not value) or (dropping and not word.startswith("--"))
        if not dropping and not is_flag:
            kept.append(word)
    return kept
