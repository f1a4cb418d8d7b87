"""Training arguments: what `transformers.TrainingArguments` lacks, the objective and its hyperparameters."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from fmicl_text.losses.contrastive import IN_BATCH, OBJECTIVES, ContrastiveLoss
from fmicl_text.losses.distributed import GLOBAL_BATCH
from fmicl_text.losses.divergences import DIVERGENCES, tsallis
from fmicl_text.losses.similarity import SIMILARITIES

LENGTH_STRATEGIES = ("group_by_length", "batch_rebalance")  # of train_sampling_strategy, those that need lengths
# What transformers takes without a word, to train nonsense or to trip over it once the old run is gone.
NUMBERS: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("finite and at least 0", lambda n: 0 <= n < math.inf, ("learning_rate", "weight_decay", "max_grad_norm")),
    ("finite and above 0", lambda n: 0 < n < math.inf, ("num_train_epochs", "adam_epsilon")),
    ("finite and above 0", lambda n: 0 < n < math.inf, ("logging_steps", "eval_steps", "save_steps")),
    ("at least 0", lambda n: n >= 0, ("dataloader_num_workers",)),
    ("at least 2", lambda n: n >= 2, ("per_device_train_batch_size",)),
    ("at least 1", lambda n: n >= 1, ("gradient_accumulation_steps", "save_total_limit", "dataloader_prefetch_factor")),
    ("at least 1, or -1 for --num_train_epochs", lambda n: n >= 1 or n == -1, ("max_steps",)),
    ("in [0, 1)", lambda n: 0 <= n < 1, ("adam_beta1", "adam_beta2")),
    ("from 0 to 4294967295", lambda n: 0 <= n < 2**32, ("seed", "data_seed")),
)
ONLY = {
    "auto_find_batch_size": False,  # another batch is another objective; mini_batch_size leaves it
    "enable_jit_checkpoint": False,  # SIGTERM saves a checkpoint here anyway, one that is exact
    "ignore_data_skip": False,  # a resumed run would see other batches
    "restore_callback_states_from_checkpoint": True,  # early stopping would forget its patience
    "dataloader_drop_last": True,  # a last batch of one has no negative
    "logging_nan_inf_filter": False,  # it hides a broken run
    "neftune_noise_alpha": None,
    "remove_unused_columns": False,  # the collator reads the text
}


@dataclass
class FMICLTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus the objective. A hyperparameter left at None takes the default of the objective's loss
    class; one that the objective does not have raises an error.

    Changed defaults: the paper's text setting (batch 64, learning rate 3e-5, one epoch); STS scored every 125
    steps, the best checkpoint kept and loaded at the end, as in SimCSE; two checkpoints kept; a log line every 25
    steps; `output_dir` runs/<objective>; `ddp_find_unused_parameters` off (every parameter gets a gradient);
    each process reads a stream itself (`dispatch_batches` off); and the settings that `ONLY` holds, which cannot be
    changed.
    """

    objective: str = field(default="fmicl", metadata={"help": "What is minimized.", "choices": list(OBJECTIVES)})
    divergence: str | None = field(
        default=None, metadata={"help": "The f of f-MICL (default kl).", "choices": list(DIVERGENCES)}
    )
    tsallis_order: float | None = field(default=None, metadata={"help": "Order of tsallis, > 0 (default 3)."})
    gamma: float | None = field(
        default=None, metadata={"help": "1/(2 sigma^2) of the Gaussian similarity, > 0 (f-MICL's default 20)."}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Weight of the negative term, > 0 (f-MICL's default 409600)."}
    )
    temperature: float | None = field(default=None, metadata={"help": "InfoNCE's, > 0 (default 0.05)."})
    similarity: str | None = field(
        default=None, metadata={"help": "f-MICL's similarity (default gaussian).", "choices": list(SIMILARITIES)}
    )
    negatives: str | None = field(
        default=None,
        metadata={"help": "Negative pairs (default same_view; infonce, spectral cross_view).", "choices": IN_BATCH},
    )
    global_batch: str = field(
        default="gather",
        metadata={
            "help": "Negatives of all processes (gather, or ring: less memory, not infonce) or of each its own (none).",
            "choices": GLOBAL_BATCH,
        },
    )
    mini_batch_size: int | None = field(
        default=None,
        metadata={"help": "Examples embedded at once, so that memory does not grow with the batch; exact."},
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Rows of a block of pairs in the loss (default: chosen); exact."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better score."}
    )
    resume_changed: bool = field(
        default=False,
        metadata={"help": "Resume although data, batch or number of processes are others than the checkpoint's."},
    )
    skip_nonfinite: bool = field(
        default=False, metadata={"help": "Leave out and count steps whose loss is not finite, instead of stopping."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run that output_dir holds."})

    per_device_train_batch_size: int = field(default=64, metadata={"help": "Examples per step and device, >= 2."})
    learning_rate: float = field(default=3e-5, metadata={"help": "Peak learning rate of AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs, unless max_steps is given."})
    logging_steps: float = field(default=25, metadata={"help": "Log every so many steps."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to score STS: no, steps or epoch."})
    eval_steps: float | None = field(default=125, metadata={"help": "Score STS every so many steps."})
    save_steps: float = field(default=125, metadata={"help": "Save a checkpoint every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best one always."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(default="sts_spearman", metadata={"help": "Chooses the checkpoint."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Of metric_for_best_model."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop the last, smaller batch."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Must stay on: early stopping would forget its patience."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: the collator reads text."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "See torch's DDP."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay off: it hides a broken run."})

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or f"runs/{self.objective_name}"
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch warns at every DataLoader otherwise
        super().__post_init__()
        accelerator: Any = self.accelerator_config
        if accelerator.dispatch_batches is None:
            accelerator.dispatch_batches = False  # it joins streamed batches, which differ in padding
        if self.save_total_limit == 1 and self.metric_for_best_model and self.eval_strategy != "no":
            self.save_total_limit = 2  # the best and the newest: transformers would remove the newest at the end
        if str(self.resume_from_checkpoint).lower() == "false":
            self.resume_from_checkpoint = None
        self.check_ranges()
        with warnings.catch_warnings(action="ignore"):  # the trainer's own call warns
            self.build_loss()

    def check_ranges(self) -> None:
        """ValueError for what training could not do, before it starts.

        The base class would let each of these pass and fail, or go wrong silently, later on."""
        for words, accepts, names in NUMBERS:
            for name in names:
                value = getattr(self, name)
                if value is not None and not accepts(value):
                    raise ValueError(f"--{name} must be {words}, got {value}")
        if (backend := self.torch_compile_backend) is not None and backend.upper() not in DynamoBackend.list():
            accepted = ", ".join(DynamoBackend.list()).lower()
            raise ValueError(f"--torch_compile_backend must be one of {accepted}; got {backend}")
        for name in ("mini_batch_size", "block_size"):
            size, batch = getattr(self, name), self.per_device_train_batch_size
            if size is not None and not 1 <= size <= batch:
                raise ValueError(f"--{name} must be from 1 to the batch of {batch}, got {size}")
        if self.mini_batch_size is not None and "lomo" in str(self.optim).lower():
            raise ValueError(
                f"--mini_batch_size is not possible with --optim {self.optim}, which steps in the backward pass"
            )
        if self.hub_token is not None:
            raise ValueError(
                "--hub_token is refused, arguments end up in files: log in with `hf auth login`, or set HF_TOKEN"
            )
        for name, only in ONLY.items():
            if getattr(self, name) != only:
                raise ValueError(f"--{name} {getattr(self, name)} is not possible here: it must be {only}")
        if (strategy := HubStrategy(self.hub_strategy)) not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                f"--hub_strategy {strategy.value} would upload optimizer and head: accepted are end and every_save"
            )
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise ValueError(f"--early_stopping_patience must be at least 1, got {self.early_stopping_patience}")
            if not self.load_best_model_at_end:
                raise ValueError("--early_stopping_patience needs --load_best_model_at_end True")
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError("--overwrite_output_dir would remove what --resume_from_checkpoint reads: give one")

    @property
    def objective_name(self) -> str:
        """fmicl-kl, infonce, ...: the objective, with its divergence if it has one."""
        return f"fmicl-{self.divergence or 'kl'}" if self.objective == "fmicl" else self.objective

    def build_loss(self) -> ContrastiveLoss:
        """The loss that the hyperparameters describe.

        Raises:
            ValueError: A hyperparameter that is out of range, or that the objective does not have.
        """
        loss_class = OBJECTIVES[self.objective]
        names = ("divergence", "gamma", "alpha", "temperature", "similarity", "negatives", "block_size", "global_batch")
        hyperparameters = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        accepted = list(inspect.signature(loss_class).parameters)
        for name in hyperparameters:
            if name not in accepted:
                raise ValueError(f"--{name} means nothing to objective {self.objective}, which takes {accepted}")
        if self.tsallis_order is not None:
            if self.divergence != "tsallis":
                raise ValueError(f"--tsallis_order needs --divergence tsallis, got {self.objective_name}")
            hyperparameters["divergence"] = tsallis(self.tsallis_order)
        if self.similarity == "cosine" and self.gamma is not None:
            raise ValueError("--gamma means nothing to --similarity cosine")
        return loss_class(**hyperparameters)
