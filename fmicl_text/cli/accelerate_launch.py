"""Start a recipe in this process, or in several processes with `accelerate launch`."""

from __future__ import annotations

import os
import signal
import sys
from argparse import ArgumentError
from collections.abc import Collection, Mapping
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import psutil
from accelerate.commands.config import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from fmicl_text.cli.main import find_yaml, record_launch, run_script
from fmicl_text.cli.parser import ArgumentParser, cli_errors
from fmicl_text.errors import InputError

HELP = {"-h", "--help", "--help_all"}
NOT_PASSED = {"--module", "--no_python", "--no-python"}  # flags of the launcher that select the kind of script
# Options of the launcher, and their values, that do not require `accelerate launch`.
ONE_PROCESS = {
    "num_processes": (1,),
    "num_machines": (1,),
    "mixed_precision": ("no", "fp16", "bf16"),
    "dynamo_backend": ("no",),
}


def launch(script: Path, arguments: list[str], groups: tuple[type, ...]) -> None:
    """Run a recipe, in this process if one process is requested and accelerate has no configuration file.

    Args:
        script: The recipe.
        arguments: Flags of the recipe and of `accelerate launch`.
        groups: Dataclasses of the recipe's options.

    Raises:
        SystemExit: With the exit status of the recipe, or 2 for flags that accelerate does not accept.
    """
    with cli_errors():
        for_launcher, for_script = split_arguments(arguments, launcher_flags(), ArgumentParser(groups=groups).flags())
        asked = parse_launcher_arguments([*for_launcher, str(script), *for_script])
        if asked.config_file is not None:
            for_launcher.append(f"--config_file={asked.config_file}")
        record_launch([*sys.argv[1:2], *arguments], for_launcher)
        configured = asked.config_file is not None or (Path(default_config_file).is_file() and not asked.cpu)
        if not HELP.isdisjoint(for_script) or (not configured and one_process(asked)):
            if asked.mixed_precision:
                os.environ["ACCELERATE_MIXED_PRECISION"] = asked.mixed_precision
            run_script(script, for_script)
        else:
            if not configured:
                fill_defaults(asked)
            launch_processes(asked)


def launcher_flags() -> dict[str, bool]:
    """The flags of `accelerate launch`, and whether each takes a value."""
    actions = launch_command_parser()._actions
    flags = {flag: action.nargs != 0 for action in actions for flag in action.option_strings if flag.startswith("--")}
    return {flag: takes_value for flag, takes_value in flags.items() if flag not in NOT_PASSED}


def split_arguments(
    arguments: list[str], launcher: Mapping[str, bool], own: Collection[str]
) -> tuple[list[str], list[str]]:
    """Split arguments into those of the launcher and those of the script.

    >>> split_arguments(["--gamma", "5", "--cpu", "--tee", "2"], {"--cpu": False, "--tee": True}, {"--gamma"})
    (['--cpu', '--tee', '2'], ['--gamma', '5'])

    Args:
        arguments: Both, in any order.
        launcher: Flags of the launcher, and whether each takes a value.
        own: Flags of the script. It also gets the flags that both accept.

    Raises:
        InputError: The value of a launcher's flag is missing.
    """
    for_launcher: list[str] = []
    for_script: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag not in launcher or flag in own:
            for_script.append(word)
            continue
        for_launcher.append(word)
        if launcher[flag] and not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise InputError(f"argument {flag}: expected one argument")
            for_launcher.append(value)
    return for_launcher, for_script


def parse_launcher_arguments(command: list[str]) -> Any:
    """Parse the options of `accelerate launch`.

    Raises:
        InputError: A value is not accepted.
    """
    parser = launch_command_parser()
    parser.exit_on_error = False
    try:
        asked = parser.parse_args(command)
    except ArgumentError as error:
        raise InputError(str(error)) from error
    if asked.config_file is not None:
        asked.config_file = str(find_yaml(asked.config_file, "accelerate"))
        if not Path(asked.config_file).is_file():
            raise InputError(f"--config_file {asked.config_file}: no such file")
    return asked


def one_process(asked: Any) -> bool:
    """Whether the options of the launcher request only one process and, optionally, a precision."""
    default = vars(launch_command_parser().parse_args([asked.training_script, *asked.training_script_args]))
    given = {name: value for name, value in vars(asked).items() if value != default[name] and name != "nondefault"}
    return all(value in ONE_PROCESS.get(name, ()) for name, value in given.items())


def fill_defaults(asked: Any) -> None:
    """Set the options that `accelerate launch` otherwise sets with a warning. Several processes without a specified
    engine become MULTI_GPU, which also covers several processes on CPUs."""
    asked.num_machines = asked.num_machines or 1
    asked.mixed_precision = asked.mixed_precision or "no"
    asked.dynamo_backend = asked.dynamo_backend or "no"
    if not any((asked.multi_gpu, asked.tpu, asked.use_deepspeed, asked.use_fsdp, asked.use_megatron_lm)):
        asked.num_processes = asked.num_processes or 1
        asked.multi_gpu = asked.num_processes > 1 and not asked.cpu


def launch_processes(asked: Any) -> None:
    """Run `accelerate launch`, without a traceback of the launcher if the script fails.

    Args:
        asked: Options of the launcher.

    Raises:
        InputError: accelerate does not accept the combination of options, or a package for it is missing.
        SystemExit: A process failed; with its exit status, or 128 + the number of the signal that ended it.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on_signal)  # torchrun replaces this handler with its own
    try:
        launch_command(asked)
        return
    except CalledProcessError as error:
        status = error.returncode
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
    except SignalException as error:
        status = -error.sigval
    except (AssertionError, ImportError, ValueError) as error:
        raise InputError(f"accelerate launch: {error}") from error
    sys.exit(128 - status if status < 0 else status)


def pass_on_signal(number: int, frame: Any) -> None:
    """Forward SIGTERM while accelerate waits for one process. Otherwise the launcher would end and the process would
    keep running. Ctrl-C reaches the process directly."""
    children = psutil.Process().children()
    if not children:
        sys.exit(128 + number)
    if number == signal.SIGTERM:
        for child in children:
            child.send_signal(number)
