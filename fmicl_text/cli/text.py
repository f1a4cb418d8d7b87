"""Options of the text recipe."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers.trainer_utils import IntervalStrategy

from fmicl_text.cli.parser import check_needs_dataset, check_optimizer, parse_groups
from fmicl_text.errors import InputError
from fmicl_text.losses.balance import AUTO
from fmicl_text.quickstart import ENCODER, PAIRS, PRESET, SENTENCES
from fmicl_text.text.held_out import check_limit
from fmicl_text.text.model import HEADS, POOLINGS
from fmicl_text.text.views import VIEWS, check_views
from fmicl_text.training.args import LENGTH_STRATEGIES, FMICLTrainingArguments
from fmicl_text.training.trainer import MEASURED_SCHEDULES

HELD_OUT = 2000
STSB = "stsb"  # the --sts_dev_file that is downloaded
PAPER_COMMAND = "fmicl-text train --config bert-base-kl"
DESCRIPTION = (
    "Train a sentence encoder with f-MICL. Without --model_name_or_path, the bundled small BERT is trained on the "
    "bundled sentences."
)


@dataclass
class ModelArguments:
    """The encoder and its training-only head."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Path or Hub ID of the encoder. By default the bundled small BERT."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model on the Hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow custom code shipped with the model. Review it first."}
    )
    pooling: str | None = field(
        default=None,
        metadata={
            "help": "Pooling. By default the model's own, else cls (decoders: lasttoken).",
            "choices": POOLINGS,
        },
    )
    head: str = field(
        default="none",
        metadata={
            "help": "Training-only projection head, not exported. The paper uses simcse (dense + tanh).",
            "choices": list(HEADS),
        },
    )
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Train only LoRA adapters of this rank, for large models; merged when saved."},
    )
    trained_layers: int | None = field(
        default=None,
        metadata={"help": "Train only the last N layers, to adapt a good encoder. Not with --lora_rank."},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantize frozen weights to 4 bits. Needs --lora_rank."}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Quantize frozen weights to 8 bits. Needs --lora_rank."}
    )
    dropout: float | None = field(
        default=None,
        metadata={"help": "Override all dropout probabilities, in [0, 1)."},
    )

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are mutually exclusive")
        if self.load_in and self.lora_rank is None:
            raise ValueError(f"load_in_{self.load_in}=True requires lora_rank")

    @property
    def load_in(self) -> str | None:
        """4bit, 8bit, or None without quantization."""
        return "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else None


@dataclass
class DataArguments:
    """Training text, and the data that select the checkpoint: sentence pairs with scores, search data, or a part of the
    training text."""

    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Training files, quoted patterns or folders: .txt, .csv, .tsv, .json, .jsonl (also as .gz, .bz2, "
            ".xz, .zst), .parquet or .arrow."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset to train on instead of a file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of --dataset_name."})
    dataset_split: str = field(default="train", metadata={"help": "Split of --dataset_name."})
    text_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns to train on: a text, a pair, or a pair and hard negatives. By default chosen by name, "
            "such as sent0 sent1 hard_neg, query answer, text."
        },
    )
    streaming: bool = field(default=False, metadata={"help": "Stream data too large for the disk. Needs --max_steps."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N rows."})
    max_seq_length: int = field(
        default=32,
        metadata={"help": "Tokens per text in training; longer texts are truncated."},
    )
    views: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": "How the two views of a text are made: dropout, crops (two spans), repeat, delete (random words); "
            "several are applied in turn. Default auto: crops for paragraphs, dropout for sentences.",
            "choices": ["auto", *VIEWS],
        },
    )
    prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Prompt prepended to every text, or two: of queries (first column) and of documents. By default "
            "the model's own; none for no prompt."
        },
    )
    sts_dev_file: str | None = field(
        default=None,
        metadata={
            "help": "Sentence pairs with scores (columns sentence1, sentence2, score) that select the best "
            f"checkpoint; {STSB} downloads STS-B dev."
        },
    )
    retrieval_dev_folder: str | None = field(
        default=None,
        metadata={
            "help": "Search data that selects the best checkpoint instead, by NDCG@10: queries.jsonl, corpus.jsonl and "
            "qrels.tsv in BEIR's format."
        },
    )
    held_out: int | None = field(
        default=None,
        metadata={
            "help": "Without such data, number of training texts that select the checkpoint instead "
            f"(default: {HELD_OUT:,}, at most a tenth)."
        },
    )

    def __post_init__(self) -> None:
        if self.views != ["auto"]:
            check_views(self.views)
        check_limit(self.num_held_out)
        if self.is_graded and self.held_out:
            name = "sts_dev_file" if self.sts_dev_file else "retrieval_dev_folder"
            raise ValueError(f"held_out={self.held_out} has no effect with {name}={getattr(self, name)}")
        if self.sts_dev_file and self.retrieval_dev_folder:
            raise ValueError(
                f"sts_dev_file={self.sts_dev_file} and retrieval_dev_folder={self.retrieval_dev_folder} are mutually "
                "exclusive"
            )
        if self.max_seq_length < 3:  # [CLS], one token, [SEP]
            raise ValueError(f"max_seq_length must be at least 3, got {self.max_seq_length}")

    @property
    def is_graded(self) -> bool:
        """Whether other data than the training text select the checkpoint."""
        return bool(self.sts_dev_file or self.retrieval_dev_folder)

    @property
    def num_held_out(self) -> int:
        """Maximum number of texts that are not trained on."""
        return 0 if self.is_graded else HELD_OUT if self.held_out is None else self.held_out


SAVE_STEPS = 125  # SimCSE's
STS_METRIC = "sts_spearman"
PRIMARY_METRIC = "loss"  # stands for the primary metric of the evaluator


@dataclass
class TextTrainingArguments(FMICLTrainingArguments):
    """`FMICLTrainingArguments` with SimCSE's model selection: evaluation every 125 steps, and the best checkpoint is
    loaded at the end. Single texts are in batches of similar length."""

    train_sampling_strategy: str = field(
        default=AUTO,
        metadata={
            "help": "random, sequential, batch_rebalance or group_by_length (less padding). Default auto: the latter, "
            "but random for pairs and streams.",
            "choices": [AUTO, "random", "sequential", "batch_rebalance", "group_by_length"],
        },
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float | None = field(default=125, metadata={"help": "Evaluate every N steps."})
    save_steps: float = field(
        default=SAVE_STEPS, metadata={"help": "Save a checkpoint every N steps, a multiple of --eval_steps."}
    )
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Load the best checkpoint at the end of training."}
    )
    metric_for_best_model: str | None = field(
        default=STS_METRIC, metadata={"help": "Metric that selects the best checkpoint."}
    )
    greater_is_better: bool | None = field(
        default=True, metadata={"help": "Whether a higher metric_for_best_model is better."}
    )

    def __post_init__(self) -> None:
        if self.eval_strategy == "no" or self.save_strategy == "no":
            self.load_best_model_at_end = False  # there is no score to select by, or no checkpoint to load
        if self.eval_strategy == "epoch" and self.save_strategy == "steps":
            self.save_strategy = "epoch"
        if self.save_steps == SAVE_STEPS and self.eval_steps and SAVE_STEPS % self.eval_steps:
            self.save_steps = self.eval_steps  # checkpoints are saved at evaluations
        super().__post_init__()

    def choose_sampling(self, num_columns: int, streaming: bool) -> None:
        """Replace `train_sampling_strategy=auto`. Batches of similar length are faster than random ones. For single
        texts they are as accurate; for pairs, scores vary more between seeds (recipes/README.md, "Speed").

        Args:
            num_columns: Text columns of the training data.
            streaming: Whether the data are streamed, so that their lengths are unknown.
        """
        if self.train_sampling_strategy == AUTO:
            single = num_columns == 1 and not streaming
            self.train_sampling_strategy = "group_by_length" if single else "random"


GROUPS = (ModelArguments, DataArguments, TextTrainingArguments)


def parse_args(
    argv: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, TextTrainingArguments]:
    """Options of the text recipe from the command line and the YAML file of `--config`. If neither names a model, the
    bundled encoder and its preset are the defaults.

    Raises:
        InputError: An unknown key or flag, or a value that is not accepted. The message names it.
    """

    def check(namespace: Namespace) -> None:
        fill_bundled(namespace)
        check_needs_dataset(namespace, dataset_config=None, dataset_split="train")
        if namespace.streaming and namespace.max_steps <= 0:
            raise InputError(f"--streaming needs --max_steps (the length is unknown), got {namespace.max_steps}")
        if namespace.metric_for_best_model in (STS_METRIC, PRIMARY_METRIC):
            namespace.metric_for_best_model = STS_METRIC if namespace.sts_dev_file else PRIMARY_METRIC
        strategy = namespace.train_sampling_strategy
        if strategy in LENGTH_STRATEGIES and namespace.streaming:
            raise InputError(
                f"--train_sampling_strategy {strategy} needs the lengths before training: use random, or "
                "--streaming False"
            )

    parsed: tuple[ModelArguments, DataArguments, TextTrainingArguments]
    parsed = parse_groups(GROUPS, argv, lambda named: None if named.model_name_or_path else PRESET, check, DESCRIPTION)
    check_optimizer(parsed[-1])
    return parsed


def fill_bundled(namespace: Namespace) -> None:
    """Use the bundled encoder, sentences and STS pairs if the options name no others.

    Raises:
        InputError: A model is given without training data.
    """
    model_named = namespace.model_name_or_path is not None
    namespace.model_name_or_path = namespace.model_name_or_path or str(ENCODER)
    if namespace.train_file is None and namespace.dataset_name is None:
        if model_named:
            raise InputError("--model_name_or_path needs training data: --train_file FILE or --dataset_name NAME")
        namespace.train_file = [str(SENTENCES)]
        if not (namespace.retrieval_dev_folder or namespace.held_out):
            namespace.sts_dev_file = namespace.sts_dev_file or str(PAIRS)


def announce(model_args: ModelArguments, data_args: DataArguments, args: TextTrainingArguments) -> str:
    """A summary of the run, preceded by a notice if the bundled encoder is used."""
    lines = []
    if model_args.model_name_or_path == str(ENCODER):
        bundled = data_args.train_file == [str(SENTENCES)]
        files = " ".join(data_args.train_file or [])
        text = "the bundled sentences (offline)" if bundled else files or data_args.dataset_name
        lines.append(f"Training the bundled small BERT on {text}. The paper's run: {PAPER_COMMAND}")
    hyperparameters = args.build_loss().hyperparameters
    if args.negatives is None:
        hyperparameters.pop("negatives", None)  # chosen when the columns of the training text are known
    loss = " ".join(f"{name}={value}" for name, value in hyperparameters.items())
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    batch = str(args.per_device_train_batch_size) + (f" x {args.world_size}" if args.world_size > 1 else "")
    batch += f" in mini-batches of {args.mini_batch_size}" if args.mini_batch_size else ""
    lines.append(
        f"{args.objective} {loss} | pooling {model_args.pooling or 'of the model'}, head "
        f"{model_args.head}, learning rate {args.learning_rate:g}, batch {batch}, {length}, "
        f"seed {args.seed} -> {args.output_dir}"
    )
    return "\n".join(lines)


def without_evaluation(args: TextTrainingArguments, reason: str) -> None:
    """Train without evaluations and selection of a checkpoint.

    Args:
        args: Changed.
        reason: Why there is nothing to evaluate on.

    Raises:
        InputError: An option needs evaluations.
    """
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    metric = args.metric_for_best_model
    for name, value, needed in (
        ("save_strategy", "best", args.save_strategy == "best"),
        ("lr_scheduler_type", schedule, schedule in MEASURED_SCHEDULES),
        ("early_stopping_patience", args.early_stopping_patience, args.early_stopping_patience is not None),
        ("eval_on_start", True, args.eval_on_start),
        ("metric_for_best_model", metric, metric not in (None, PRIMARY_METRIC)),
    ):
        if needed:
            raise InputError(f"{name}={value} needs evaluations: pass sts_dev_file ({reason})")
    args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
