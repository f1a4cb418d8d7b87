"""Arguments of the text recipe."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field

from fmicl_text.cli.parser import check_optimizer, parse_groups, refuse_without_dataset
from fmicl_text.errors import InputError
from fmicl_text.quickstart import ENCODER, PAIRS, PRESET, SENTENCES
from fmicl_text.text.model import HEADS, POOLINGS
from fmicl_text.training.args import LENGTH_STRATEGIES, FMICLTrainingArguments

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
        default=True, metadata={"help": "Tokenize before training, into cached files; streamed text is never."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many rows."})
    max_seq_length: int = field(default=32, metadata={"help": "Tokens per text in training; longer ones are cut."})
    sts_dev_file: str | None = field(
        default=None, metadata={"help": "Graded pairs: .tsv or .csv with sentence1, sentence2, score; or SentEval's."}
    )

    def __post_init__(self) -> None:
        if self.max_seq_length < 3:  # [CLS], a word piece, [SEP]
            raise ValueError(f"--max_seq_length must be at least 3, got {self.max_seq_length}")


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
    kwargs = " ".join(f"{name}={value}" for name, value in args.build_loss().hyperparameters.items())
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    batch = str(args.per_device_train_batch_size) + (f" x {args.world_size}" if args.world_size > 1 else "")
    batch += f" in parts of {args.mini_batch_size}" if args.mini_batch_size else ""
    lines.append(
        f"{args.objective} {kwargs} | pooling {model_args.pooling or 'as the model says, else cls'}, head "
        f"{model_args.head}, learning rate {args.learning_rate:g}, batch {batch}, {length}, "
        f"seed {args.seed} -> {args.output_dir}"
    )
    return "\n".join(lines)
