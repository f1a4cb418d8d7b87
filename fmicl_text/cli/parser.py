"""The command line: YAML file first, flags win, what is wrong in one line."""

from __future__ import annotations

import argparse
import json
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from fmicl_text.cli.checks import check_filled
from fmicl_text.errors import InputError, Interrupted
from fmicl_text.training.args import FMICLTrainingArguments

FLAGS: set[str] = set()  # of this command line, for messages


@contextmanager
def cli_errors(program: str) -> Iterator[None]:
    """Print an `InputError` in one line on stderr and exit with status 2; `Interrupted` in one line and 128 + the
    signal's number, as shells do. Other exceptions keep their traceback."""
    try:
        yield
    except InputError as error:
        print(f"{program}: error: {add_dashes(' '.join(str(error).split()), FLAGS)}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"{program}: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal_number)


def add_dashes(message: str, flags: Collection[str]) -> str:
    """A message of the library, which names arguments, as the command line has them.

    >>> add_dashes("train_file=a.txt: no such file; dataset_name is not given", {"train_file", "dataset_name"})
    '--train_file a.txt: no such file; --dataset_name is not given'

    Args:
        message: Arguments in it are `name=value`, or `name` alone if that is the first word or has an underscore.
        flags: Names of the arguments that the command line has; others are left as they are.
    """

    def flag(match: re.Match[str]) -> str:
        name, equals = match["name"], match["equals"]
        if name not in flags or not (equals or "_" in name or match.start() == 0):
            return match[0]
        return f"--{name}{' ' if equals else ''}"

    return re.sub(
        r"(?<![\w/.\-'\"])(?P<name>[a-z][a-z0-9_]*)(?:(?P<equals>=)(?=\S)|(?![\w/.\-='\"]*[\w/\-=]))", flag, message
    )


class ArgumentParser(HfArgumentParser):
    """The command line of a recipe or script. Errors raise `InputError`, which `cli_errors` prints in one line.

    Args:
        program: Name of the script; None: of the running one.
        description: The script's docstring.
        groups: Dataclasses whose fields become flags.
    """

    def __init__(self, program: str | None = None, description: str | None = None, groups: Any = None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter if groups is None else argparse.ArgumentDefaultsHelpFormatter
        super().__init__(groups, prog=program, description=description, formatter_class=formatter, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        check_filled(args)
        FLAGS.update(action.dest for action in self._actions)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


@contextmanager
def flags_called(**names: str) -> Iterator[None]:
    """Turn `--train_file` in an `InputError` into `--images` where train_file="images" is given: what loads data and
    models names the recipes' flags."""
    try:
        yield
    except InputError as error:
        message = str(error)
        for theirs, ours in names.items():
            message = message.replace(f"--{theirs}", f"--{ours}")
        raise InputError(message) from error


def parse_groups(
    groups: Any,
    argv: Sequence[str] | None,
    preset_of: Callable[[Namespace], Path | None],
    check: Callable[[Namespace], None],
) -> Any:
    """Dataclasses from flags, the last of them training arguments: preset first, then --config, then the command line.

    Args:
        groups: Their classes.
        argv: The command line, by default this process's.
        preset_of: What is named, to the YAML file of flags that comes first, or None.
        check: Completes and checks all flags before the dataclasses do.

    Raises:
        InputError: An unknown key or flag, or a value that is not accepted; names it.
    """
    parser = ArgumentParser(groups=groups)
    parser.add_argument("--config", help="YAML file of flags; the command line wins.")
    argv = list(sys.argv[1:] if argv is None else argv)
    check_filled(argv)
    config, _ = parser.parse_known_args(argv)
    from_file = yaml_flags(Path(config.config), known_flags(parser)) if config.config is not None else []
    check_filled(from_file)
    named, unknown = parser.parse_known_args([*from_file, *argv])
    if unknown:
        raise InputError(f"unknown argument {unknown[0]} (--help lists those there are)")
    if (preset_file := preset_of(named)) is not None:
        preset = yaml_flags(preset_file, known_flags(parser))
        if any(flag.startswith("--num_train_epochs") for flag in (*from_file, *argv)):
            preset.append("--max_steps=-1")  # which would win over the epochs asked for
        from_file = [*preset, *from_file]
    namespace = parser.parse_args([*from_file, *argv])
    del namespace.config
    check_json(namespace)
    check(namespace)
    try:
        parsed = parser.parse_dict(vars(namespace))
        get_reporting_integration_callbacks(parsed[-1].report_to)  # refuses a logger that is not there
        return parsed
    except (ValueError, TypeError, ArithmeticError, ImportError, RuntimeError, OSError) as error:
        raise InputError(" ".join(str(error).split())) from error


def check_json(namespace: Namespace) -> None:
    """InputError for a value that begins as JSON and is none."""
    for name, value in vars(namespace).items():
        if isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise InputError(f"--{name} {value}: {error}") from error


def check_optimizer(args: FMICLTrainingArguments, own: tuple[type[Any], dict[str, Any]] | None = None) -> None:
    """A dry run of what training will build first, once the run that it replaces is gone.

    Args:
        args: They name optimizer and schedule.
        own: Optimizer and options that are not transformers'.

    Raises:
        InputError: Either is not installed, or does not take the options given.
    """
    layer: Any = torch.nn.Linear(1, 1)
    try:
        kind, kwargs = own or Trainer.get_optimizer_cls_and_kwargs(args, layer)
        if "model" in kwargs or "params" in kwargs:  # of optimizers that look at the layers of the model
            return
        optimizer = kind(layer.parameters(), **kwargs)
        schedule_knobs: Any = args.lr_scheduler_kwargs
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 1, schedule_knobs)
    except (ValueError, ImportError, TypeError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        options = {"optim_args": args.optim_args, "lr_scheduler_kwargs": args.lr_scheduler_kwargs}
        given = "".join(f" --{name} {value}" for name, value in options.items() if value)
        schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        asked = f"--optim {getattr(args.optim, 'value', args.optim)} --lr_scheduler_type {schedule}{given}"
        raise InputError(f"{asked}: {' '.join(str(error).split())}") from error


def refuse_without_dataset(namespace: Namespace, **defaults: str | None) -> None:
    """InputError for flags that only --dataset_name gives a meaning."""
    for name, default in defaults.items():
        if namespace.dataset_name is None and getattr(namespace, name) != default:
            raise InputError(f"--{name} means nothing without --dataset_name")


def known_flags(parser: ArgumentParser) -> dict[str, bool]:
    """The names that a YAML file may hold, and whether a list may be the value."""
    return {action.dest: action.nargs == "+" for action in parser._actions if action.dest not in ("help", "config")}


class LoaderWithoutAliases(yaml.SafeLoader):
    """YAML's safe loader without `*name`: a few lines of these can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias, *name, is not accepted")
        return super().compose_node(parent, index)


def yaml_flags(path: Path, known: Mapping[str, bool]) -> list[str]:
    """A flat YAML file as command-line flags; keys with a null value are left out.

    Raises:
        InputError: The file is missing, is no flat mapping, or holds a key that is unknown or there twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.load(text, LoaderWithoutAliases)
    # ValueError: no UTF-8; a date such as 0-0-0. AttributeError, LookupError: tags of what is no date, number, ...
    except (OSError, ValueError, AttributeError, LookupError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise InputError(f"--config {path}: expected `flag: value` lines, got {type(settings).__name__}")
    if settings.get("trust_remote_code"):
        raise InputError(f"--config {path}: trust_remote_code counts on the command line only, whoever wrote the file")
    if unknown := [key for key in settings if key not in known]:
        raise InputError(f"--config {path}: unknown key {unknown[0]}")
    document: Any = yaml.compose(text, yaml.SafeLoader)
    keys = [key.value for key, _ in document.value]
    if twice := [key for key in settings if keys.count(key) > 1]:
        raise InputError(f"--config {path}: {twice[0]} is there twice")
    flags = []
    for key, value in settings.items():
        if value is False and key.endswith("_strategy"):
            value = "no"  # YAML reads an unquoted no as False
        if isinstance(value, list) and known[key]:
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={json.dumps(value, default=str) if isinstance(value, dict) else value}")
    return flags


def resolved_settings(model_args: Any, data_args: Any, training_args: FMICLTrainingArguments) -> dict[str, Any]:
    """Every setting of a run that is ours, or differs from what transformers would do, as `--config` reads it back."""
    settings = {**vars(model_args), **vars(data_args)}
    del settings["trust_remote_code"]  # to be asked for anew
    ours = {
        name
        for kind in type(training_args).__mro__
        if issubclass(kind, FMICLTrainingArguments)
        for name in kind.__annotations__
    }
    for item in fields(training_args):
        value = getattr(training_args, item.name)
        if item.name.endswith("_token"):
            continue
        if item.name in ours or (isinstance(value, str | int | float) and value != item.default):
            settings[item.name] = value.value if isinstance(value, Enum) else value
    settings |= training_args.build_loss().hyperparameters
    return settings
