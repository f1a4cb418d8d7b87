"""What the text recipe reads besides the training arguments, and how: YAML file first, command line wins."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from fmicl_text.errors import InputError, check_filled
from fmicl_text.model import HEADS, POOLINGS
from fmicl_text.quickstart import ENCODER, PAIRS, PRESET, SENTENCES
from fmicl_text.training_args import LENGTH_STRATEGIES, FMICLTrainingArguments

PAPER_COMMAND = "accelerate launch recipes/simcse_fmicl.py --config recipes/configs/text/bert-base-kl.yaml"


@dataclass
class ModelArguments:
    """The encoder and its head."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of the encoder (default: the small one in the package)."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model's folder brings along; read it first."}
    )
    pooling: str | None = field(
        default=None, metadata={"help": "Default: as the model says, else cls.", "choices": POOLINGS}
    )
    head: str = field(default="none", metadata={"help": "Head that only training sees.", "choices": list(HEADS)})
    lora_rank: int | None = field(
        default=None, metadata={"help": "Train LoRA adapters of this rank only; they are merged at the end."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Hold the weights that LoRA leaves alone in 4 bits."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Or in 8."})
    dropout: float | None = field(
        default=None, metadata={"help": "Sets every dropout probability of the model, in [0, 1)."}
    )

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("--load_in_4bit and --load_in_8bit exclude each other: give one")

    @property
    def load_in(self) -> str | None:
        """4bit, 8bit or None, all bits."""
        return "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else None


@dataclass
class DataArguments:
    """Training text, and the graded pairs that choose the checkpoint."""

    train_file: str | None = field(
        default=None,
        metadata={"help": ".txt, .csv, .tsv, .jsonl, these also .gz, or .parquet (default: the package's)."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub instead of a file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    text_column: str | None = field(
        default=None, metadata={"help": "Default: sent0, sent1[, hard_neg]; text; sentence; or the only column."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read while training; needs max_steps."})
    tokenize_once: bool = field(
        default=True, metadata={"help": "Tokenise before training, into cached files; streamed text is never."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many rows."})
    max_seq_length: int = field(default=32, metadata={"help": "Tokens per text in training; longer ones are cut."})
    sts_dev_file: str | None = field(
        default=None, metadata={"help": "Graded pairs: .tsv or .csv with sentence1, sentence2, score; or SentEval's."}
    )

    def __post_init__(self) -> None:
        if self.max_seq_length < 3:  # [CLS], a word piece, [SEP]
            raise ValueError(f"--max_seq_length must be at least 3, got {self.max_seq_length}")


class FlagParser(HfArgumentParser):
    """HfArgumentParser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse_args(
    argv: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, FMICLTrainingArguments]:
    """Arguments of the text recipe, from `--config FILE.yaml` (flat, the flags' names) and the command line, which
    wins. Where neither names a model, the package's small encoder and its preset come first.

    Raises:
        InputError: An unknown key or flag, or a value that is not accepted; names it.
    """

    def check(namespace: Namespace) -> None:
        fill_embedded(namespace)
        refuse_without_dataset(namespace, dataset_config=None, dataset_split="train")
        if namespace.streaming and namespace.max_steps <= 0:
            raise InputError(f"--streaming needs --max_steps (the length is not known), got {namespace.max_steps}")
        strategy = namespace.train_sampling_strategy
        if strategy in LENGTH_STRATEGIES and (namespace.streaming or not namespace.tokenize_once):
            raise InputError(
                f"--train_sampling_strategy {strategy} needs lengths before training: "
                "--streaming False, --tokenize_once True"
            )

    groups = (ModelArguments, DataArguments, FMICLTrainingArguments)
    parsed: tuple[ModelArguments, DataArguments, FMICLTrainingArguments]
    parsed = parse_groups(groups, argv, lambda named: None if named.model_name_or_path else PRESET, check)
    check_optimizer(parsed[-1])
    return parsed


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
    parser = FlagParser(groups, allow_abbrev=False)
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
        kind, knobs = own or Trainer.get_optimizer_cls_and_kwargs(args, layer)
        if "model" in knobs or "params" in knobs:  # of optimizers that look at the layers of the model
            return
        optimizer = kind(layer.parameters(), **knobs)
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


def fill_embedded(namespace: Namespace) -> None:
    """Name the package's own encoder, sentences and graded pairs where nothing else is named.

    Raises:
        InputError: A model of the user's own, but nothing to train it on.
    """
    model_named = namespace.model_name_or_path is not None
    namespace.model_name_or_path = namespace.model_name_or_path or str(ENCODER)
    if namespace.train_file is None and namespace.dataset_name is None:
        if model_named:
            raise InputError("--model_name_or_path needs text to train on: --train_file FILE or --dataset_name NAME")
        namespace.train_file = str(SENTENCES)
        namespace.sts_dev_file = namespace.sts_dev_file or str(PAIRS)


def announce(model_args: ModelArguments, data_args: DataArguments, args: FMICLTrainingArguments) -> str:
    """What is about to run; where the package's own encoder or text is used, that comes first."""
    lines = []
    if model_args.model_name_or_path == str(ENCODER):
        text = "its own sentences, no network" if data_args.train_file == str(SENTENCES) else "the text you named"
        lines.append(f"Embedded default: the package's small BERT on {text}. The paper's run: {PAPER_COMMAND}")
    knobs = " ".join(f"{name}={value}" for name, value in args.build_loss().knobs.items())
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    batch = str(args.per_device_train_batch_size) + (f" x {args.world_size}" if args.world_size > 1 else "")
    batch += f" in parts of {args.mini_batch_size}" if args.mini_batch_size else ""
    lines.append(
        f"{args.objective} {knobs} | pooling {model_args.pooling or 'as the model says, else cls'}, head "
        f"{model_args.head}, learning rate {args.learning_rate:g}, batch {batch}, {length}, "
        f"seed {args.seed} -> {args.output_dir}"
    )
    return "\n".join(lines)


def known_flags(parser: FlagParser) -> dict[str, bool]:
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
    settings |= training_args.build_loss().knobs
    return settings
