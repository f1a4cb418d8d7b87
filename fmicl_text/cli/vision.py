"""Options of the vision recipe."""

from __future__ import annotations

import warnings
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fmicl_text.cli.parser import check_needs_dataset, check_optimizer, parse_groups
from fmicl_text.errors import InputError
from fmicl_text.losses.contrastive import NEGATIVES
from fmicl_text.model import ContrastiveModel
from fmicl_text.training.args import LENGTH_STRATEGIES, FMICLTrainingArguments
from fmicl_text.training.momentum import MomentumModel, MomentumTrainer
from fmicl_text.training.trainer import MEASURED_SCHEDULES, FMICLTrainer
from fmicl_text.vision.architectures import IMAGE_CONFIGS
from fmicl_text.vision.encoder import IMAGE_POOLINGS
from fmicl_text.vision.views import VIEWS

LOWER_IS_BETTER = ("alignment", "uniformity")  # of the metrics without classes
METHODS = ("simclr", "moco", "mocov3")
DIGITS_PRESET = Path(__file__).parents[1] / "vision" / "digits.yaml"
DESCRIPTION = (
    "Train an image encoder with f-MICL on two random views of every image. Without --train_file or --dataset_name, "
    "the data is scikit-learn's digits."
)


@dataclass
class ImageModelArguments:
    """The encoder, its projection head, and the augmentations."""

    architecture: str = field(
        default="resnet-18-small",
        metadata={
            "help": "Architecture, trained from scratch. The small ResNets are for images of about 32 pixels.",
            "choices": list(IMAGE_CONFIGS),
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Path or Hub ID of an image model to start from instead."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model on the Hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow custom code shipped with the model. Review it first."}
    )
    pooling: str | None = field(
        default=None,
        metadata={"help": "Pooling. By default the model's own, or auto if it has none.", "choices": IMAGE_POOLINGS},
    )
    head_dim: int = field(default=512, metadata={"help": "Width of the training-only projection head."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Input height and width in pixels (default: the model's own, else 32)."},
    )
    views: str = field(default="cifar", metadata={"help": "Augmentation policy.", "choices": list(VIEWS)})
    color: str = field(
        default="exact",
        metadata={"help": "Color jitter: exact (as in torchvision) or fast.", "choices": ["exact", "fast"]},
    )

    def __post_init__(self) -> None:
        if self.image_size is None and self.model_name_or_path is None:
            self.image_size = 32
        for name in ("head_dim", "image_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass
class ImageDataArguments:
    """Training images, and images that are held out to evaluate the encoder."""

    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Folder of images, if any with a subfolder per class; .parquet or .arrow files."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset to train on instead."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of --dataset_name."})
    dataset_split: str = field(default="train", metadata={"help": "Split of --dataset_name."})
    test_file: list[str] | None = field(
        default=None, metadata={"help": "Test images, as --train_file (default: those of a test or val folder)."}
    )
    test_split: str | None = field(default=None, metadata={"help": "Split of --dataset_name with test images."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images. By default found by its type."})
    label_column: str | None = field(
        default=None, metadata={"help": "Column of classes, which are used for evaluation only."}
    )
    streaming: bool = field(default=False, metadata={"help": "Stream data too large for the disk. Needs --max_steps."})
    held_out: int | None = field(
        default=None,
        metadata={"help": "Number of test images taken from the others (default: 5000, at most a fifth)."},
    )
    validation: int = field(default=0, metadata={"help": "Number of further images held out to select the checkpoint."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on N images only, drawn at random."})
    probes: bool = field(default=True, metadata={"help": "Table of probes at the end, with raw pixels."})


@dataclass
class VisionTrainingArguments(FMICLTrainingArguments):
    """`FMICLTrainingArguments` with the paper's settings for images.

    Changed defaults: batch 512; SGD with momentum 0.9, weight decay 5e-4, learning rate 0.1 with a cosine schedule; 800
    epochs; temperature 0.5 for InfoNCE; k-NN evaluation after every epoch; no checkpoints;
    `output_dir` runs/vision-<objective>, with MoCo runs/vision-<method>-<objective>.
    """

    method: str = field(
        default="simclr",
        metadata={
            "help": "simclr (negatives from the batch), moco (from a queue) or mocov3 (momentum encoder, no queue).",
            "choices": list(METHODS),
        },
    )
    queue_size: int | None = field(
        default=None, metadata={"help": "Number of past embeddings that moco uses as negatives. Default 4096."}
    )
    encoder_momentum: float | None = field(
        default=None, metadata={"help": "Momentum of the momentum encoder. Default 0.99; mocov3 increases it to 1."}
    )
    temperature: float | None = field(default=None, metadata={"help": "InfoNCE temperature, > 0 (default 0.5)."})
    negatives: str | None = field(
        default=None,
        metadata={
            "help": "Which pairs are negatives: same_view (x_i, x_j), cross_view (x_i, y_j), both, or queue for moco "
            "(default same_view; infonce, spectral: cross_view).",
            "choices": NEGATIVES,
        },
    )
    mini_batch_size: int | None = field(default=None, metadata={"help": SUPPRESS})  # not supported
    momentum: float = field(default=0.9, metadata={"help": "Momentum of --optim sgd and lars."})
    per_device_train_batch_size: int = field(
        default=512, metadata={"help": "Examples per step and process, >= 2. Larger batches have more negatives."}
    )
    learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate."})
    optim: str = field(
        default="sgd", metadata={"help": "Optimizer: sgd, lars for large batches, or any other in transformers."}
    )
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay, not applied to biases and norms."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    num_train_epochs: float = field(default=800.0, metadata={"help": "Number of epochs, unless max_steps is given."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="no", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    load_best_model_at_end: bool = field(
        default=False, metadata={"help": "Load the best checkpoint at the end of training. Needs validation images."}
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "Metric that selects the best checkpoint (default: the k-NN accuracy)."}
    )

    def __post_init__(self) -> None:
        self.read_numbers()
        if self.load_best_model_at_end and self.eval_strategy == "no":
            raise ValueError("load_best_model_at_end=True needs eval_strategy=steps or epoch, got no")
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"  # the evaluator's primary metric
        if self.greater_is_better is None and str(self.metric_for_best_model).removeprefix("eval_") in LOWER_IS_BETTER:
            self.greater_is_better = False
        if self.load_best_model_at_end and self.save_strategy == "no":
            self.save_strategy = self.eval_strategy  # checkpoints are saved at evaluations
        if self.objective == "infonce" and self.temperature is None:
            self.temperature = 0.5
        if self.mini_batch_size is not None:
            raise ValueError(
                f"mini_batch_size={self.mini_batch_size} is not supported for images: batch normalization needs the "
                "full batch"
            )
        self.settle_method()
        prefix = "" if self.method == "simclr" else f"{self.method}-"
        self.output_dir = (
            self.output_dir or f"runs/vision-{prefix}{self.objective_name}"
        )  # not the folder of a text run
        optim, self.optim = self.optim, "sgd" if self.optim == "lars" else self.optim  # transformers has no lars
        super().__post_init__()
        self.optim = optim

    def settle_method(self) -> None:
        """Set the defaults of the method.

        Raises:
            ValueError: A hyperparameter does not apply to the method, or is out of range.
        """
        if self.method == "moco":
            self.negatives = self.negatives or "queue"
            self.queue_size = 4096 if self.queue_size is None else self.queue_size
        if self.method != "simclr":
            self.encoder_momentum = 0.99 if self.encoder_momentum is None else self.encoder_momentum
        if (self.negatives == "queue") != (self.method == "moco"):
            raise ValueError(
                f"negatives={self.negatives} does not apply to method={self.method}: negatives=queue is required with "
                "moco and not supported otherwise"
            )
        if self.method == "moco" and self.objective == "fmicl" and self.alpha not in (None, "auto"):
            warnings.warn(
                f"method=moco, alpha={self.alpha}: while keys are close together, f-MICL repels a query from all keys "
                "of the queue equally, including those close to its positive. On scikit-learn's digits, alpha=40 made "
                "the encoder worse, and alpha=auto did not.",
                stacklevel=2,
            )
        if self.queue_size is not None and self.method != "moco":
            raise ValueError(f"queue_size={self.queue_size} does not apply to method={self.method}, which has no queue")
        if self.encoder_momentum is not None and self.method == "simclr":
            raise ValueError(
                f"encoder_momentum={self.encoder_momentum} does not apply to method=simclr, which has no momentum "
                "encoder"
            )
        if self.queue_size is not None and self.queue_size < 1:
            raise ValueError(f"queue_size must be at least 1, got {self.queue_size}")
        if self.encoder_momentum is not None and not 0 <= self.encoder_momentum <= 1:
            raise ValueError(f"encoder_momentum must be in [0, 1], got {self.encoder_momentum}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")

    def build_trainer(self, model: ContrastiveModel, **kwargs: Any) -> FMICLTrainer:
        """The trainer of the method, with its hyperparameters; `kwargs` as in `FMICLTrainer`."""
        if self.method == "simclr":
            return FMICLTrainer(model, self, **kwargs)
        is_v3 = self.method == "mocov3"
        momentum_model = MomentumModel(model, queue_size=self.queue_size or 0, predictor=is_v3)
        momentum = 0.99 if self.encoder_momentum is None else self.encoder_momentum
        return MomentumTrainer(momentum_model, self, encoder_momentum=momentum, increase_momentum=is_v3, **kwargs)

    def optimizer_class_and_kwargs(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """Class and arguments of sgd, which transformers builds without momentum, and of lars, which it does not have;
        None for the other optimizers.

        Raises:
            InputError: pytorch-optimizer, which has LARS, is not installed.
        """
        kwargs = {"lr": self.learning_rate, "momentum": self.momentum}
        if self.optim == "sgd":
            return torch.optim.SGD, kwargs
        if self.optim == "lars":
            try:
                from pytorch_optimizer import LARS
            except ImportError as error:
                raise InputError("optim=lars needs pytorch-optimizer: pip install pytorch-optimizer") from error
            return LARS, kwargs
        return None

    def check_without_evaluation(self) -> None:
        """Raise `InputError` for an option that needs scores, in a run without held-out images."""
        schedule = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        for name, value, needs_scores in (
            ("save_strategy", "best", self.save_strategy == "best"),
            ("lr_scheduler_type", schedule, schedule in MEASURED_SCHEDULES),
            ("eval_on_start", True, self.eval_on_start),
            ("metric_for_best_model", self.metric_for_best_model, self.metric_for_best_model is not None),
        ):
            if needs_scores:
                raise InputError(f"{name}={value} needs scores of held-out images: set held_out or validation")


GROUPS = (ImageModelArguments, ImageDataArguments, VisionTrainingArguments)


def parse_vision_args(
    argv: Sequence[str] | None = None,
) -> tuple[ImageModelArguments, ImageDataArguments, VisionTrainingArguments]:
    """Options of the vision recipe from the command line and the YAML file of `--config`. If neither names data, the
    preset of scikit-learn's digits provides the defaults.

    Raises:
        InputError: An unknown key or flag, or a value that is not accepted. The message names it.
    """

    def check(namespace: Namespace) -> None:
        if namespace.train_file is not None and namespace.dataset_name is not None:
            raise InputError("--train_file and --dataset_name are mutually exclusive, got both")
        check_needs_dataset(namespace, dataset_config=None, dataset_split="train", test_split=None)
        if namespace.test_file is not None and namespace.train_file is None:
            raise InputError("--test_file requires --train_file")
        if namespace.streaming and namespace.max_steps <= 0:
            raise InputError(f"--streaming needs --max_steps (the length is unknown), got {namespace.max_steps}")
        if namespace.train_sampling_strategy in LENGTH_STRATEGIES:
            raise InputError(f"--train_sampling_strategy {namespace.train_sampling_strategy}: images have no length")

    def preset_of(named: Namespace) -> Path | None:
        return DIGITS_PRESET if named.train_file is None and named.dataset_name is None else None

    parsed: tuple[ImageModelArguments, ImageDataArguments, VisionTrainingArguments]
    parsed = parse_groups(GROUPS, argv, preset_of, check, DESCRIPTION)
    check_optimizer(parsed[-1], parsed[-1].optimizer_class_and_kwargs())
    return parsed
