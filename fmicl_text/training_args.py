"""Training arguments: what `transformers.TrainingArguments` lacks, the objective and its knobs."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from fmicl_text.distributed import GLOBAL_BATCH
from fmicl_text.divergences import DIVERGENCES, tsallis
from fmicl_text.loss import IN_BATCH, OBJECTIVES, ContrastiveLoss
from fmicl_text.similarity import SIMILARITIES

LENGTH_STRATEGIES = ("group_by_length", "batch_rebalance")  # of train_sampling_strategy, those that need lengths
ONLY = {
    "auto_find_batch_size": False,  # another batch is another objective; mini_batch_size leaves it
    "dataloader_drop_last": True,  # a last batch of one has no negative
    "logging_nan_inf_filter": False,  # it hides a broken run
    "neftune_noise_alpha": None,
    "hub_token": None,  # log in with `hf auth login`, or set HF_TOKEN: arguments end up in files
    "remove_unused_columns": False,  # the collator reads the text
}


@dataclass
class FMICLTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus the objective. A knob left at None takes the default of the objective's loss class;
    a knob that the objective does not have is refused.

    Changed defaults: the paper's text setting (batch 64, learning rate 3e-5, one epoch); STS scored every 125
    steps, the best checkpoint kept and loaded at the end, as in SimCSE; two checkpoints kept; a log line every 25
    steps; `output_dir` runs/<objective>; `ddp_find_unused_parameters` off (every parameter gets a gradient);
    each process reads a stream itself (`dispatch_batches` off); and the settings that `ONLY` holds, which cannot be
    changed.
    """

    objective: str = field(default="fmicl", metadata={"help": "What is minimised.", "choices": list(OBJECTIVES)})
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
        self.check_ranges()
        with warnings.catch_warnings(action="ignore"):  # the trainer's own call warns
            self.build_loss()

    def check_ranges(self) -> None:
        """ValueError for what training could not do, before it starts.

        The base class would let each of these pass and fail, or go wrong silently, later on."""
        for name, lowest in {"per_device_train_batch_size": 2, "learning_rate": 0, "seed": 0}.items():
            if not getattr(self, name) >= lowest:
                raise ValueError(f"--{name} must be at least {lowest}, got {getattr(self, name)}")
        for name in ("mini_batch_size", "block_size"):
            size, batch = getattr(self, name), self.per_device_train_batch_size
            if size is not None and not 1 <= size <= batch:
                raise ValueError(f"--{name} must be from 1 to the batch of {batch}, got {size}")
        if self.mini_batch_size is not None and "lomo" in str(self.optim).lower():
            raise ValueError(
                f"--mini_batch_size is not possible with --optim {self.optim}, which steps in the backward pass"
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
        """The loss that the knobs describe.

        Raises:
            ValueError: A knob that is out of range, or that the objective does not have.
        """
        loss_class = OBJECTIVES[self.objective]
        names = ("divergence", "gamma", "alpha", "temperature", "similarity", "negatives", "block_size", "global_batch")
        knobs = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        accepted = list(inspect.signature(loss_class).parameters)
        for name in knobs:
            if name not in accepted:
                raise ValueError(f"--{name} means nothing to objective {self.objective}, which takes {accepted}")
        if self.tsallis_order is not None:
            if self.divergence != "tsallis":
                raise ValueError(f"--tsallis_order needs --divergence tsallis, got {self.objective_name}")
            knobs["divergence"] = tsallis(self.tsallis_order)
        if self.similarity == "cosine" and self.gamma is not None:
            raise ValueError("--gamma means nothing to --similarity cosine")
        return loss_class(**knobs)
