"""The command line of recipes and scripts: options from a YAML file and from flags, errors in one line."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, Trainer, get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig

from fmicl_text.cli.checks import check_filled
from fmicl_text.cli.help import recipe_help
from fmicl_text.cli.identity import forget_measured, take_measured
from fmicl_text.cli.main import find_yaml, program_name
from fmicl_text.cli.streams import Stopped, discard, raise_signals
from fmicl_text.errors import InputError, Interrupted
from fmicl_text.files import DISK_FULL, check_regular, is_disk_full
from fmicl_text.training.args import FMICLTrainingArguments

DICTIONARIES = ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "accelerator_config")  # recorded options
FLAGS: set[str] = set()  # names of the options of this command line, for messages
# Options of transformers 4, SimCSE and sentence-transformers under another name here, and what replaces each.
RENAMED = {
    "adafactor": "optim=adafactor",
    "batch_size": "per_device_train_batch_size",
    "bf16_backend": "bf16=True",
    "cache_dir": "the environment variable HF_HOME",
    "config_name": "model_name_or_path",
    "dataset_config_name": "dataset_config",
    "dispatch_batches": 'accelerator_config={"dispatch_batches": ...}',
    "epochs": "num_train_epochs",
    "eval_batch_size": "per_device_eval_batch_size",
    "evaluation_strategy": "eval_strategy",
    "fp16_backend": "fp16=True",
    "fp16_opt_level": "fp16=True",
    "fsdp_min_num_params": 'fsdp_config={"min_num_params": ...}',
    "fsdp_transformer_layer_cls_to_wrap": 'fsdp_config={"transformer_layer_cls_to_wrap": ...}',
    "group_by_length": "train_sampling_strategy=group_by_length",
    "half_precision_backend": "fp16=True",
    "include_inputs_for_metrics": "an evaluator",
    "include_tokens_per_second": "the throughput in every log",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "lr": "learning_rate",
    "margin": "your own objective=package.module:Class",
    "max_length": "max_seq_length",
    "mlp_only_train": "head=simcse, which is never exported",
    "model_name": "model_name_or_path",
    "no_cuda": "use_cpu=True",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "pooler_type": "pooling",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_organization": "hub_model_id=organization/name",
    "push_to_hub_token": "`hf auth login` or the environment variable HF_TOKEN",
    "scale": "gamma=scale/2, or temperature=1/scale with objective=infonce",
    "sharded_ddp": "fsdp",
    "split_batches": 'accelerator_config={"split_batches": ...}',
    "temp": "temperature with objective=infonce; gamma=1/(2 temp) else",
    "tokenizer_name": "model_name_or_path",
    "torchdynamo": "torch_compile_backend",
    "train_batch_size": "per_device_train_batch_size",
    "use_auth_token": "`hf auth login` or the environment variable HF_TOKEN",
    "validation_file": "sts_dev_file",
    "warmup_ratio": "warmup_steps=0.1 for a tenth of all steps: a number below 1 is a fraction",
    "xpu_backend": "ddp_backend",
}


HYPERPARAMETERS = ("divergence", "tsallis_order", "gamma", "alpha", "temperature", "similarity", "negatives")
# What selects the checkpoint of a text run: a flag replaces what the file of --config has of these.
SELECTING = ("sts_dev_file", "retrieval_dev_folder", "held_out")
LOST_PEER = ("Connection closed by peer", "Connection reset by peer [")  # of gloo, with the address of the process


@contextmanager
def cli_errors(program: str | None = None) -> Iterator[None]:
    """Print an `InputError` in one line on stderr and exit with status 2. After a signal, in training or outside of it,
    print one line and exit with 128 + the signal number, as shells do. In a process that waits for one that has ended,
    print one line and exit with status 1. Other exceptions keep their traceback.

    Args:
        program: Name of the script; see `program_name`.
    """
    program = program_name(program)
    try:
        with raise_signals():
            yield
    except InputError as error:
        print(f"{program}: error: {add_dashes(printable(str(error)), FLAGS)}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        end_by_signal(program, str(stop), stop.signal_number)
    except Stopped as stop:
        end_by_signal(program, str(stop), stop.number)
    except KeyboardInterrupt:
        end_by_signal(program, str(Stopped(signal.SIGINT)), signal.SIGINT)
    except Exception as error:
        if any(sign in str(error) for sign in LOST_PEER):
            print(f"{program}: error: another process of this run has ended", file=sys.stderr)
            sys.exit(1)
        if not is_disk_full(error):
            raise
        where = getattr(error, "filename", None)
        print(f"{program}: error: {DISK_FULL}{f': {where}' if where else ''}", file=sys.stderr)
        sys.exit(2)


def end_by_signal(program: str, message: str, number: int) -> NoReturn:
    """Print a line and exit with 128 + the signal number."""
    try:
        print(f"{program}: {message}", file=sys.stderr, flush=True)
    except OSError:  # the terminal or the pipe is closed
        discard(sys.stderr)
    sys.exit(128 + number)


def printable(message: str) -> str:
    """A message in one line, with control characters, which a terminal would obey, as escapes."""
    line = " ".join(message.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def add_dashes(message: str, flags: Collection[str]) -> str:
    """Turn the argument names in a message of the library into flags.

    >>> add_dashes("train_file=a.txt: no such file; dataset_name is not given", {"train_file", "dataset_name"})
    '--train_file a.txt: no such file; --dataset_name is not given'

    Args:
        message: Arguments appear as `name=value`, or as `name` if it is the first word or contains an underscore.
        flags: Names of the options of the command line. Other names are not changed.
    """

    def flag(match: re.Match[str]) -> str:
        name, equals = match["name"], match["equals"]
        if name not in flags or not (equals or "_" in name or match.start() == 0):
            return match[0]
        return f"--{name}{' ' if equals else ''}"

    return re.sub(
        r"(?<![\w/.\-'\"])(?P<name>[a-z][a-z0-9_]*)(?:(?P<equals>=)(?=\S)|(?![\w/.\-='\"]*[\w/\-=]))", flag, message
    )


class HelpAll(argparse.Action):
    """`--help_all`: print all options and exit."""

    def __call__(self, parser: Any, *unused: Any) -> None:
        print(recipe_help(parser, parser.groups, everything=True), end="")
        parser.exit()


class ArgumentParser(HfArgumentParser):
    """The command line of a recipe or script. Errors raise `InputError`, which `cli_errors` prints in one line.

    Args:
        program: Name of the script; None uses the running one. Under `fmicl-text`, the sub-command is shown instead.
        description: The script's docstring, or a sentence about the recipe.
        groups: Dataclasses of a recipe whose fields become options: model, data, training arguments.
    """

    def __init__(self, program: str | None = None, description: str | None = None, groups: Sequence[Any] = ()) -> None:
        self.groups = groups
        formatter = argparse.RawDescriptionHelpFormatter
        name = program_name(program)
        super().__init__(groups, prog=name, description=description, formatter_class=formatter, allow_abbrev=False)
        if groups:
            text = "YAML file of options, or the name of a preset in recipes/configs. Flags override it."
            self.add_argument("--config", metavar="FILE", help=text)
            self.add_argument("--measured", help=argparse.SUPPRESS)  # of settings.yaml; see `take_measured`
            text = "Show all options, including those of transformers.TrainingArguments."
            self.add_argument("--help_all", nargs=0, default=argparse.SUPPRESS, action=HelpAll, help=text)

    def flags(self) -> set[str]:
        """All spellings of the options."""
        return {flag for action in self._actions for flag in action.option_strings}

    def format_help(self) -> str:
        return recipe_help(self, self.groups, everything=False) if self.groups else super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = self.with_underscores(list(sys.argv[1:] if args is None else args))
        check_filled(args)
        FLAGS.update(action.dest for action in self._actions if action.option_strings)
        return super().parse_known_args(args, namespace)

    def with_underscores(self, args: Sequence[str]) -> list[str]:
        """A command line whose flags are spelled with underscores, if the parser knows them so."""
        flags, spelled = self.flags(), []
        for word in args:
            name, equals, value = word.partition("=")
            underscored = f"--{name[2:].replace('-', '_')}"
            spelled.append(f"{underscored}{equals}{value}" if name.startswith("--") and underscored in flags else word)
        return spelled

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


@contextmanager
def flags_called(**flags: str) -> Iterator[None]:
    """Rename arguments in an `InputError`: with train_file="images", `train_file=x` becomes `images=x`. For scripts
    whose flags have different names from the arguments of the library."""
    try:
        yield
    except InputError as error:
        message = str(error)
        for argument, flag in flags.items():
            message = re.sub(rf"(?<![\w/.-])(--)?{argument}\b", rf"\1{flag}", message)
        raise InputError(message) from error


def parse_groups(
    groups: Sequence[Any],
    argv: Sequence[str] | None,
    preset_of: Callable[[Namespace], Path | None],
    check: Callable[[Namespace], None],
    description: str,
) -> Any:
    """Parse options into dataclasses. Flags override the file of --config, which overrides the preset.

    Args:
        groups: Classes of the dataclasses, the last one of training arguments.
        argv: Command line; None uses that of this process.
        preset_of: Returns a YAML file of defaults, or None, for the options that were given.
        check: Completes and checks the options before the dataclasses are built.
        description: Description of the recipe, for --help.

    Raises:
        InputError: An unknown key or flag, or a value that is not accepted. The message names it.
    """
    parser = ArgumentParser(description=description, groups=groups)
    argv = parser.with_underscores(list(sys.argv[1:] if argv is None else argv))
    check_filled(argv)
    on_command_line, _ = parser.parse_known_args(argv)
    if named_in(argv, ("measured",)):
        raise InputError("--measured can only be in a settings.yaml that a run wrote")
    from_file: list[str] = []
    if (name := on_command_line.config) is not None:
        from_file = yaml_flags(find_yaml(name, "configs/*"), known_flags(parser))
        if any(word.partition("=")[0] == "--objective" for word in argv):
            from_file = without_hyperparameters(from_file, on_command_line.objective, parser)
        if named_in(argv, SELECTING):
            from_file = [flag for flag in from_file if not named_in([flag], SELECTING)]
    check_filled(from_file)
    named, unknown = parser.parse_known_args([*from_file, *argv])
    if unknown:
        raise InputError(unknown_option(unknown[0], known_flags(parser)))
    if (preset_file := preset_of(named)) is not None:
        preset = yaml_flags(preset_file, known_flags(parser))
        if any(flag.startswith("--num_train_epochs") for flag in (*from_file, *argv)):
            preset.append("--max_steps=-1")  # the preset's max_steps would override the epochs
        from_file = [*preset, *from_file]
    namespace = parser.parse_args([*from_file, *argv])
    measured = namespace.measured
    del namespace.config, namespace.measured
    check_json(namespace)
    check(namespace)
    find_own_modules(on_command_line)
    try:
        parsed: Any = parser.parse_dict(vars(namespace))
    except (ValueError, TypeError, ArithmeticError, ImportError, RuntimeError, OSError) as error:
        raise InputError(" ".join(str(error).split())) from error
    if measured is not None:
        take_measured(json.loads(measured), resolved_settings(*parsed), parsed[-1], f"--config {name}")
    return parsed


def named_in(flags: Sequence[str], names: Sequence[str]) -> bool:
    """Whether one of the options `names` is among flags."""
    return any(flag.partition("=")[0].removeprefix("--") in names for flag in flags if flag.startswith("--"))


def without_hyperparameters(flags: list[str], objective: str, parser: ArgumentParser) -> list[str]:
    """The flags of a file without the hyperparameters of its objective, if the objective of the run is another one."""
    if parser.parse_known_args(flags)[0].objective == objective:
        return flags
    return [flag for flag in flags if flag.partition("=")[0].removeprefix("--") not in HYPERPARAMETERS]


def find_own_modules(on_command_line: Namespace) -> None:
    """Add the current folder to the end of sys.path if a flag names an object as package.module:name. A YAML file does
    not suffice: it must not run code that happens to be in the folder."""
    names = (on_command_line.objective, on_command_line.divergence)
    if any(":" in name for name in names if name) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def check_json(namespace: Namespace) -> None:
    """Raise `InputError` for a value that starts like a JSON object but is not valid JSON."""
    for name, value in vars(namespace).items():
        if isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except (ValueError, RecursionError) as error:
                raise InputError(f"--{name} {value:.80}: {error}") from error


def check_optimizer(args: FMICLTrainingArguments, own: tuple[type[Any], dict[str, Any]] | None = None) -> None:
    """Build optimizer and schedule for one weight, so that a mistake in their options is found before the data is
    read and before an old run is overwritten.

    Args:
        args: Training arguments.
        own: Optimizer class and its arguments, if transformers does not build it.

    Raises:
        InputError: Optimizer or schedule is not installed or does not accept its arguments.
    """
    layer: Any = torch.nn.Linear(1, 1)
    try:
        kind, kwargs = own or Trainer.get_optimizer_cls_and_kwargs(args, layer)
        check_optim_args(args, layer, kwargs)
        if "model" in kwargs or "params" in kwargs:  # depends on the layers of the model
            return
        schedule_kwargs: Any = args.lr_scheduler_kwargs
        get_scheduler(args.lr_scheduler_type, kind(layer.parameters(), **kwargs), 0, 1, schedule_kwargs)
    except InputError:
        raise
    except (ValueError, ImportError, TypeError, RuntimeError) as error:
        names = ("optim", "lr_scheduler_type", "optim_args", "lr_scheduler_kwargs")
        given = {name: getattr(args, name) for name in names if getattr(args, name)}
        asked = " ".join(f"--{name} {getattr(value, 'value', value)}" for name, value in given.items())
        raise InputError(f"{asked}: {' '.join(str(error).split())}") from error


def check_optim_args(args: FMICLTrainingArguments, layer: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise `InputError` for an option in --optim_args that has no effect on the optimizer."""
    given = str(args.optim_args or "").replace(" ", "")
    parts = [part for part in given.split(",") if part]
    for part in parts:
        others = copy.copy(args)
        others.optim_args = ",".join(other for other in parts if other != part) or None
        if Trainer.get_optimizer_cls_and_kwargs(others, layer)[1] == kwargs:
            raise InputError(
                f"--optim_args {part}: has no effect with --optim {getattr(args.optim, 'value', args.optim)}"
            )


def check_needs_dataset(namespace: Namespace, **defaults: str | None) -> None:
    """Raise `InputError` if an option that requires --dataset_name is set and --dataset_name is not."""
    for name, default in defaults.items():
        if namespace.dataset_name is None and getattr(namespace, name) != default:
            raise InputError(f"--{name} requires --dataset_name")


def unknown_option(flag: str, known: Mapping[str, bool]) -> str:
    """The message for a flag that this command line does not have. It names what replaces an option that other programs
    have.

    Args:
        flag: As it was given.
        known: Names of the options that there are.
    """
    name = flag.partition("=")[0].removeprefix("--").replace("-", "_")
    instead = RENAMED.get(name, "")
    option = re.match(r"\w*", instead)[0]  # type: ignore[index]
    if instead and ("_" not in option or option in known):
        return f"--{name} is not an option: use {instead}"
    return f"unknown argument {flag} (--help lists the options)"


def known_flags(parser: argparse.ArgumentParser) -> dict[str, bool]:
    """Keys that a YAML file may contain, and whether their values may be lists."""
    skipped = ("help", "help_all", "config")
    return {action.dest: action.nargs == "+" for action in parser._actions if action.dest not in skipped}


class LoaderWithoutAliases(yaml.SafeLoader):
    """YAML's safe loader without aliases (`*name`), with which a few lines can expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported")
        return super().compose_node(parent, index)


def yaml_flags(path: Path, known: Mapping[str, bool]) -> list[str]:
    """Flags from a flat YAML file. Keys with a null value are skipped.

    Raises:
        InputError: The file does not exist, is not a flat mapping, or has an unknown or duplicate key.
    """
    check_regular(path, f"--config {path}")
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.load(text, LoaderWithoutAliases)
    # ValueError: not UTF-8, or a date such as 0-0-0. AttributeError, LookupError: tags such as !!int on other values
    except (OSError, ValueError, AttributeError, LookupError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise InputError(f"--config {path}: expected `flag: value` lines, got {type(settings).__name__}")
    if settings.get("trust_remote_code"):
        raise InputError(f"--config {path}: trust_remote_code can only be set on the command line")
    if unknown := [key for key in settings if key not in known]:
        message = unknown_option(str(unknown[0]), known)
        raise InputError(f"--config {path}: {message.replace('unknown argument', 'unknown key')}")
    settings = forget_measured(settings, f"--config {path}")
    document: Any = yaml.compose(text, yaml.SafeLoader)
    keys = [key.value for key, _ in document.value]
    if twice := [key for key in settings if keys.count(key) > 1]:
        raise InputError(f"--config {path}: key {twice[0]} appears twice")
    flags = []
    for key, value in settings.items():
        if value is False and key.endswith("_strategy"):
            value = "no"  # YAML reads an unquoted no as False
        if isinstance(value, list) and known[key]:
            # With =, a single value may begin with dashes.
            flags += [f"--{key}={value[0]}"] if len(value) == 1 else [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={json.dumps(value, default=str) if isinstance(value, dict) else value}")
    return flags


def default_settings(*groups: Any) -> dict[str, Any]:
    """The default value of every option, in the form of `resolved_settings`.

    Args:
        groups: Dataclasses of options.
    """
    found = {item.name: item.default for group in groups for item in fields(group) if item.default is not MISSING}
    found = {name: value.value if isinstance(value, Enum) else value for name, value in found.items()}
    found.pop("trust_remote_code", None)
    return found


def resolved_settings(model_args: Any, data_args: Any, training_args: FMICLTrainingArguments) -> dict[str, Any]:
    """Settings of a run, in the form that `--config` reads: all options of this project, and those of transformers
    that differ from its defaults."""
    settings = {**vars(model_args), **vars(data_args)}
    del settings["trust_remote_code"]  # must be given on the command line again
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
        if item.name == "accelerator_config":  # what differs from the defaults
            usual = AcceleratorConfig(dispatch_batches=False).to_dict()
            value = {key: entry for key, entry in value.to_dict().items() if entry != usual[key]} or None
        plain = isinstance(value, str | int | float) or item.name in DICTIONARIES
        if item.name in ours or (plain and value != item.default):
            settings[item.name] = value.value if isinstance(value, Enum) else value
    hyperparameters = training_args.build_loss().hyperparameters
    settings |= {name: value for name, value in hyperparameters.items() if name in ours}
    if training_args.negatives is None and training_args.objective == "fmicl" and hasattr(data_args, "text_columns"):
        settings["negatives"] = None  # chosen by the columns of the training text
    if training_args.divergence is not None:
        settings["divergence"] = training_args.divergence  # with its module
    return settings
