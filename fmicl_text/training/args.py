"""Training arguments: `transformers.TrainingArguments` plus the objective and its hyperparameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import HubStrategy
from transformers.utils import is_torch_xla_available

from fmicl_text.losses.balance import AUTO
from fmicl_text.losses.contrastive import IN_BATCH, OBJECTIVES, ContrastiveLoss, load_objective
from fmicl_text.losses.description import constructor_arguments
from fmicl_text.losses.distributed import GLOBAL_BATCH
from fmicl_text.losses.divergences import DIVERGENCES, tsallis
from fmicl_text.losses.similarity import SIMILARITIES

LENGTH_STRATEGIES = ("group_by_length", "batch_rebalance")  # values of train_sampling_strategy that need lengths
# transformers accepts values outside these ranges, but training later fails or gives wrong results.
RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("finite and at least 0", lambda n: 0 <= n < math.inf, ("learning_rate", "weight_decay", "max_grad_norm")),
    ("finite and above 0", lambda n: 0 < n < math.inf, ("num_train_epochs", "adam_epsilon")),
    ("finite and above 0", lambda n: 0 < n < math.inf, ("logging_steps", "eval_steps", "save_steps")),
    ("finite and at least 0", lambda n: 0 <= n < math.inf, ("warmup_steps", "eval_delay")),
    ("at least 0", lambda n: n >= 0, ("dataloader_num_workers",)),
    ("at least 2", lambda n: n >= 2, ("per_device_train_batch_size",)),
    ("at least 1", lambda n: n >= 1, ("gradient_accumulation_steps", "save_total_limit", "dataloader_prefetch_factor")),
    ("at least 1", lambda n: n >= 1, ("per_device_eval_batch_size", "ddp_timeout")),
    ("at least 1, or -1 for num_train_epochs", lambda n: n >= 1 or n == -1, ("max_steps",)),
    ("in [0, 1)", lambda n: 0 <= n < 1, ("adam_beta1", "adam_beta2")),
    ("from 0 to 4294967295", lambda n: 0 <= n < 2**32, ("seed", "data_seed")),
)
CHECKPOINTING_OPTIONS = {
    *("use_reentrant", "preserve_rng_state", "determinism_check", "context_fn", "debug"),
    *("every_n_layers", "offload"),
}
PAIR_NEGATIVES = "cross_view"  # measured in recipes/README.md, "Pairs and triplets"
NAMES = ("train_sampling_strategy", "log_level", "log_level_replica")  # transformers checks them in flags only
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
FIXED_ARGUMENTS: dict[str, Any] = {
    "auto_find_batch_size": False,  # the batch size changes the objective; mini_batch_size saves memory instead
    "enable_jit_checkpoint": False,  # SIGTERM already saves an exact checkpoint
    "ignore_data_skip": False,  # a resumed run would see different batches
    "restore_callback_states_from_checkpoint": True,  # early stopping would lose its count
    "dataloader_drop_last": True,  # a last batch of one has no negative
    "logging_nan_inf_filter": False,  # it would hide non-finite losses
    "neftune_noise_alpha": None,
    "remove_unused_columns": False,  # the collator reads the text
    "length_column_name": "length",  # of text that is tokenized before training
    "save_on_each_node": False,  # checkpoints need an output_dir that all machines share
    "parallelism_config": None,  # the loss needs complete embeddings of different rows in each process
    "use_liger_kernel": False,  # transformers would not apply it to an encoder inside another module
    "liger_kernel_config": None,
    "use_cache": False,  # of generation
    # There are no labels, and no loss is evaluated: an evaluator scores the encoder.
    "label_names": None,
    "label_smoothing_factor": 0.0,
    "average_tokens_across_devices": True,
    "do_predict": False,
    "bf16_full_eval": False,
    "fp16_full_eval": False,
    "prediction_loss_only": False,
    "include_for_metrics": [],
    "batch_eval_metrics": False,
    "eval_accumulation_steps": None,
    "eval_do_concat_batches": True,
    "eval_use_gather_object": False,
}
# Loggers of transformers: the module that each needs, and the package that has it.
LOGGERS = {
    **{name: (name, name) for name in ("clearml", "codecarbon", "dvclive", "mlflow", "neptune", "swanlab", "trackio")},
    **{name: (name, name) for name in ("dagshub", "tensorboard", "wandb")},
    "azure_ml": ("azureml", "azureml-sdk"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "flyte": ("flytekit", "flytekit"),
}
HIDDEN_TOKEN = "<HUB_TOKEN>"  # to_dict has this in place of a token, and of None
NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")  # schedules that ignore warmup_steps
NO_SCHEDULE_OPTIONS = ("constant", "constant_with_warmup")  # schedules that ignore lr_scheduler_kwargs
TARGETED_OPTIMIZERS = ("galore", "apollo")  # in the names of those that use optim_target_modules


@dataclass
class FMICLTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus the objective. A hyperparameter left at None takes the default of the objective's loss
    class; one that the objective does not accept raises an error.

    Changed defaults: the paper's text setting (batch 64, learning rate 3e-5, one epoch); two checkpoints kept; a log
    line every 25 steps; `per_device_eval_batch_size` None, which keeps the evaluator's batch size; `output_dir`
    runs/<objective>; `ddp_find_unused_parameters` off (every parameter gets a gradient); each process reads a stream
    itself (`dispatch_batches` off); and the values in `FIXED_ARGUMENTS`, which cannot be changed.
    """

    objective: str = field(
        default="fmicl",
        metadata={
            "help": f"Training objective: {', '.join(OBJECTIVES)}, or your own ContrastiveLoss as package.module:Class."
        },
    )
    divergence: str | None = field(
        default=None,
        metadata={
            "help": f"f-divergence for objective fmicl (default kl): {', '.join(DIVERGENCES)}, or your own as "
            "package.module:name."
        },
    )
    tsallis_order: float | None = field(
        default=None, metadata={"help": "Order of the Tsallis divergence, > 0 (default 3)."}
    )
    gamma: float | str | None = field(
        default=None,
        metadata={
            "metavar": "FLOAT|auto",
            "help": "Inverse width of the Gaussian similarity, > 0; auto (default) measures it.",
        },
    )
    alpha: float | str | None = field(
        default=None,
        metadata={
            "metavar": "FLOAT|auto",
            "help": "Weight of the negative term, > 0; auto (default) measures it.",
        },
    )
    temperature: float | None = field(default=None, metadata={"help": "InfoNCE temperature, > 0 (default 0.05)."})
    similarity: str | None = field(
        default=None,
        metadata={"help": "Similarity used by f-MICL (default gaussian).", "choices": list(SIMILARITIES)},
    )
    negatives: str | None = field(
        default=None,
        metadata={
            "help": "Which pairs are negatives: same_view (x_i, x_j), cross_view (x_i, y_j) or both (default "
            "same_view; pairs of texts, infonce, spectral: cross_view).",
            "choices": IN_BATCH,
        },
    )
    global_batch: str = field(
        default="gather",
        metadata={
            "help": "Share negatives across processes: gather; ring (less memory; not for infonce); none (local only).",
            "choices": GLOBAL_BATCH,
        },
    )
    mini_batch_size: int | None = field(
        default=None,
        metadata={"help": "Compute embeddings in mini-batches of this size (GradCache): same gradients, less memory."},
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": "Block size of the pairwise loss (default: automatic). Does not change the result."},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Early stopping: number of evaluations without improvement."}
    )
    resume_changed: bool = field(
        default=False,
        metadata={"help": "Allow resuming with different data, batch size or number of processes."},
    )
    skip_nonfinite: bool = field(
        default=False,
        metadata={"help": "Skip (and count) steps with a non-finite loss or gradient."},
    )
    check_disk_space: bool = field(
        default=True,
        metadata={"help": "Raise an error before training if the disk has too little space for the checkpoints."},
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Overwrite an existing run in output_dir."})

    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Examples per step and process, >= 2. Larger batches have more negatives."}
    )
    per_device_eval_batch_size: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Inputs per forward pass of the evaluator (default: the evaluator's own)."}
    )
    learning_rate: float = field(default=3e-5, metadata={"help": "Peak learning rate."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of epochs, unless max_steps is given."})
    logging_steps: float = field(default=25, metadata={"help": "Log every N steps."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Maximum number of checkpoints to keep (the best one is always kept)."}
    )
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop the last, smaller batch."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Restore callbacks when resuming."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not supported: the collator reads text."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Passed to DistributedDataParallel."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Not supported: it hides non-finite losses."})

    def __post_init__(self) -> None:
        self.choices: dict[str, tuple[Any, Any]] = {}
        self.read_numbers()
        if self.hub_token == HIDDEN_TOKEN:
            self.hub_token = None
        self.check_installed()
        with warnings.catch_warnings(action="ignore"):  # the trainer's own call warns
            self.output_dir = self.output_dir or f"runs/{self.objective_name}"
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch warns at every DataLoader otherwise
        try:
            with self.the_only_device():
                super().__post_init__()
                _ = self.device
        except ValueError as error:
            if not self.ddp_backend or "process group" not in str(error):
                raise
            alone = f"ddp_backend={self.ddp_backend} needs several processes: start them with `accelerate launch`"
            raise ValueError(alone) from error
        accelerator: Any = self.accelerator_config
        if accelerator.dispatch_batches is None:
            accelerator.dispatch_batches = False  # it would join streamed batches, which differ in padding
        if self.save_total_limit == 1 and self.metric_for_best_model and self.eval_strategy != "no":
            self.save_total_limit = 2  # the best and the latest: transformers would remove the latest at the end
        if str(self.resume_from_checkpoint).lower() == "false":
            self.resume_from_checkpoint = None
        self.check_ranges()
        with warnings.catch_warnings(action="ignore"):
            self.build_loss()

    @contextmanager
    def the_only_device(self) -> Iterator[None]:
        """Set use_cpu for a moment where there is no other device: transformers needs it for bf16, and accelerate to
        connect processes. Later it is the given value again, which is stored and may be used on another machine."""
        given = self.use_cpu
        if not torch.accelerator.is_available() and not is_torch_xla_available() and not self.deepspeed:
            self.use_cpu = True
        try:
            yield
        finally:
            self.use_cpu = given

    def read_numbers(self) -> None:
        """Convert numbers given as text, which the command line gives for arguments that are a number or a word."""
        for name in ("gamma", "alpha"):
            with suppress(ValueError):  # build_loss reports it
                if isinstance(value := getattr(self, name), str):
                    setattr(self, name, float(value))

    def check_ranges(self) -> None:
        """Raise ValueError for values with which training would later fail or give wrong results."""
        for words, accepts, names in RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not (isinstance(value, int | float) and accepts(value)):
                    raise ValueError(f"{name} must be {words}, got {value!r}")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError(f"{item.name} must be below 2^63, got {value}")
            if item.name in NAMES and value not in (accepted := item.metadata["choices"]):
                raise ValueError(f"{item.name} must be one of {', '.join(accepted)}; got {value}")
        if (mode := self.torch_compile_mode) is not None and mode not in COMPILE_MODES:
            raise ValueError(f"torch_compile_mode must be one of {', '.join(COMPILE_MODES)}; got {mode}")
        for name in (
            "dataloader_persistent_workers",
            "dataloader_multiprocessing_context",
            "dataloader_prefetch_factor",
        ):
            if getattr(self, name, None) and not self.dataloader_num_workers:
                raise ValueError(f"{name}={getattr(self, name)} needs dataloader_num_workers above 0")
        options: Any = self.activation_checkpointing_kwargs or {}
        if unknown := set(options) - CHECKPOINTING_OPTIONS:
            raise ValueError(f"activation_checkpointing_kwargs does not accept {sorted(unknown)[0]!r}")
        if options.get("offload") and self.device.type == "cpu":
            raise ValueError(f"activation_checkpointing_kwargs={options} needs a GPU to offload from")
        if self.fsdp and self.world_size == 1:
            raise ValueError(f"fsdp={self.fsdp} needs several processes: start them with `accelerate launch`")
        if (backend := self.torch_compile_backend) is not None and backend.upper() not in DynamoBackend.list():
            accepted = ", ".join(DynamoBackend.list()).lower()
            raise ValueError(f"torch_compile_backend must be one of {accepted}; got {backend}")
        for name in ("mini_batch_size", "block_size"):
            size, batch = getattr(self, name), self.per_device_train_batch_size
            if size is not None and not 1 <= size <= batch:
                raise ValueError(f"{name} must be from 1 to the batch size {batch}, got {size}")
        if self.mini_batch_size is not None and "lomo" in str(self.optim).lower():
            raise ValueError(
                f"mini_batch_size={self.mini_batch_size} is not supported with optim="
                f"{getattr(self.optim, 'value', self.optim)}, which steps in the backward pass"
            )
        self.check_ignored()
        precision = "fp16" if self.fp16 else "bf16" if self.bf16 else None
        if precision and self.mixed_precision != precision:
            raise ValueError(f"{precision}=True was set later, without effect: pass it to {type(self).__name__}")
        if self.hub_token is not None:
            raise ValueError(
                "hub_token is not accepted because arguments are saved to disk: use `hf auth login` or set HF_TOKEN"
            )
        for name, value in FIXED_ARGUMENTS.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)} is not supported; it must be {value}")
        if (strategy := HubStrategy(self.hub_strategy)) not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                f"hub_strategy={strategy.value} is not supported (it would upload optimizer and head); use end or "
                "every_save"
            )
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise ValueError(f"early_stopping_patience must be at least 1, got {self.early_stopping_patience}")
            if not self.load_best_model_at_end:
                raise ValueError(
                    f"early_stopping_patience={self.early_stopping_patience} needs load_best_model_at_end=True"
                )
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError(
                f"overwrite_output_dir=True would delete the checkpoint that "
                f"resume_from_checkpoint={self.resume_from_checkpoint} reads; pass only one of them"
            )

    def choose(self, **values: Any) -> None:
        """Set arguments that were left to the trainer."""
        for name, value in values.items():
            before, _ = self.choices.get(name, (getattr(self, name), None))
            self.choices[name] = before, value
            setattr(self, name, value)

    def forget_choices(self) -> None:
        """Undo `choose`, for another trainer with the same arguments. What was changed since is kept."""
        for name, (before, chosen) in self.choices.items():
            if getattr(self, name) == chosen:
                setattr(self, name, before)
        self.choices = {}

    def choose_negatives_of_pairs(self) -> None:
        """Use cross-view negatives for pairs of texts, unless negatives are given: a text is then compared with the
        others' positives, as in retrieval. `same_view`, the paper's setting, is meant for two views of one text."""
        if self.negatives is None and self.objective == "fmicl":
            self.choose(negatives=PAIR_NEGATIVES)

    @property
    def eval_batch_size(self) -> int:
        """As in the base class; recorded by some loggers."""
        return self.per_device_eval_batch_size or self.train_batch_size

    def check_ignored(self) -> None:
        """Raise ValueError for an option that transformers would ignore because of another one."""
        schedule, optim = (str(getattr(kind, "value", kind)) for kind in (self.lr_scheduler_type, self.optim))
        no_effect = f"has no effect with lr_scheduler_type={schedule}"
        if self.warmup_steps and schedule in NO_WARMUP:
            instead = "; use constant_with_warmup" if schedule == "constant" else ""
            raise ValueError(f"warmup_steps={self.warmup_steps} {no_effect}{instead}")
        if self.lr_scheduler_kwargs and schedule in NO_SCHEDULE_OPTIONS:
            raise ValueError(f"lr_scheduler_kwargs={self.lr_scheduler_kwargs} {no_effect}")
        for name, switch in {
            "activation_checkpointing_kwargs": "activation_checkpointing",
            "fsdp_config": "fsdp",
        }.items():
            if getattr(self, name) and not getattr(self, switch):
                raise ValueError(f"{name}={getattr(self, name)} has no effect without {switch}")
        if self.optim_target_modules and not any(name in optim for name in TARGETED_OPTIMIZERS):
            raise ValueError(f"optim_target_modules={self.optim_target_modules} has no effect with optim={optim}")
        if self.torch_empty_cache_steps is not None and self.mini_batch_size is not None:
            raise ValueError(
                f"torch_empty_cache_steps={self.torch_empty_cache_steps} is not supported with mini_batch_size="
                f"{self.mini_batch_size}"
            )
        if DebugOption.TPU_METRICS_DEBUG in self.debug:
            raise ValueError("debug=tpu_metrics_debug is not supported; it must be underflow_overflow")

    def check_installed(self) -> None:
        """Raise ValueError for an engine or a logger that is not installed, and for an unknown logger."""
        if self.deepspeed and find_spec("deepspeed") is None:
            raise ValueError(f"deepspeed={self.deepspeed} requires deepspeed: pip install deepspeed")
        names = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or ())
        names = [name for name in names if name not in ("none", "all")]
        for name in names:
            module, package = LOGGERS.get(name, (None, None))
            if module is not None and find_spec(module) is None:
                raise ValueError(f"report_to={name} requires {package}: pip install {package}")
            try:
                for logger in get_reporting_integration_callbacks([name]):
                    logger()
            except (ValueError, RuntimeError, ImportError) as error:  # an unknown name, or settings that are missing
                raise ValueError(f"report_to={name} cannot be used: {error}") from error

    @property
    def objective_name(self) -> str:
        """The objective with its divergence, if it has one: fmicl-kl, infonce, ..."""
        return self.build_loss().objective_name

    def loss_settings(self) -> dict[str, Any]:
        """The arguments that `build_loss` reads, by name."""
        kinds = (*OBJECTIVES.values(), load_objective(self.objective))
        known = {name for kind in kinds for name in constructor_arguments(kind)} | {"objective", "tsallis_order"}
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name in known}

    def build_loss(self) -> ContrastiveLoss:
        """The loss with these hyperparameters.

        Raises:
            ValueError: A hyperparameter is out of range, or the objective does not have it.
        """
        loss_class = load_objective(self.objective)
        accepted = constructor_arguments(loss_class)
        defaults = {item.name: item.default for item in fields(self)}
        given = {name: value for name, value in self.loss_settings().items() if value is not None}
        del given["objective"]
        given.pop("tsallis_order", None)
        for name, value in sorted(given.items()):
            if name not in accepted and value != defaults[name]:
                raise ValueError(
                    f"{name}={value} does not apply to objective={self.objective}, which accepts {list(accepted)}"
                )
        kwargs = {name: value for name, value in given.items() if name in accepted}
        if self.tsallis_order is not None:
            if self.divergence != "tsallis":
                raise ValueError(
                    f"tsallis_order={self.tsallis_order} needs divergence=tsallis, got divergence={self.divergence}"
                )
            kwargs["divergence"] = tsallis(self.tsallis_order)
        has_gamma = self.gamma not in (None, AUTO)
        if has_gamma and self.similarity is not None and not SIMILARITIES[self.similarity].uses_gamma:
            raise ValueError(f"gamma={self.gamma} does not apply to similarity={self.similarity}")
        try:
            return loss_class(**kwargs)
        except ValueError:  # a hyperparameter
            raise
        except Exception as error:  # any type, by the code of a user's class
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"objective={self.objective} cannot be built with {kwargs} ({reason})") from error
