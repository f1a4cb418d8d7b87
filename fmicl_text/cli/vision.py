"""What the vision recipe reads; the paper's settings as defaults, scikit-learn's digits where no data is named."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fmicl_text.cli.parser import check_optimizer, parse_groups, refuse_without_dataset
from fmicl_text.errors import InputError
from fmicl_text.losses.contrastive import NEGATIVES
from fmicl_text.training.args import LENGTH_STRATEGIES, FMICLTrainingArguments
from fmicl_text.training.momentum import MomentumTrainer
from fmicl_text.training.trainer import FMICLTrainer
from fmicl_text.vision.architectures import IMAGE_CONFIGS
from fmicl_text.vision.encoder import IMAGE_POOLINGS
from fmicl_text.vision.views import VIEWS

METHODS = ("simclr", "moco", "mocov3")
DIGITS_PRESET = Path(__file__).parents[1] / "vision" / "digits.yaml"


@dataclass
class ImageModelArguments:
    """The encoder, its head, and the views that it sees."""

    architecture: str = field(
        default="resnet-18-small",
        metadata={"help": "Trained from random weights.", "choices": list(IMAGE_CONFIGS)},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of an image model to start from instead."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model's folder brings along; read it first."}
    )
    pooling: str | None = field(
        default=None, metadata={"help": "Default: as the model says, else auto.", "choices": IMAGE_POOLINGS}
    )
    head_dim: int = field(default=512, metadata={"help": "Width of the projection head, which only training sees."})
    image_size: int = field(default=32, metadata={"help": "Height and width of the views, in pixels."})
    views: str = field(default="cifar", metadata={"help": "Which random views.", "choices": list(VIEWS)})
    color: str = field(
        default="exact",
        metadata={"help": "Color jitter: torchvision's, or a faster one.", "choices": ["exact", "fast"]},
    )

    def __post_init__(self) -> None:
        for name in ("head_dim", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class ImageDataArguments:
    """Training images, and those held out to score the encoder."""

    train_file: str | None = field(
        default=None,
        metadata={"help": ".parquet, or a folder of class folders (default: scikit-learn's digits)."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub instead."})
    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    image_column: str = field(default="img", metadata={"help": "The column of images."})
    label_column: str = field(default="label", metadata={"help": "The column of classes; training does not see it."})
    held_out: int = field(default=5000, metadata={"help": "Last rows, held out: the encoder is scored on them."})
    validation: int = field(
        default=0, metadata={"help": "Rows before those, not trained on: scored during training, to choose by."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many rows only."})


@dataclass
class VisionTrainingArguments(FMICLTrainingArguments):
    """`FMICLTrainingArguments` with the paper's settings for images.

    Changed defaults: batch 512; SGD with momentum 0.9, weight decay 5e-4, learning rate 0.1 with a cosine; 800 epochs;
    gamma 1 and alpha 40 (InfoNCE: temperature 0.5); the k-NN score after every epoch; the last weights are kept;
    `output_dir` runs/vision-<objective>, with MoCo runs/vision-<method>-<objective>.
    """

    method: str = field(
        default="simclr", metadata={"help": "Where positives and negatives come from.", "choices": list(METHODS)}
    )
    queue_size: int | None = field(
        default=None, metadata={"help": "Past embeddings that are moco's negatives (default 4096)."}
    )
    encoder_momentum: float | None = field(
        default=None, metadata={"help": "Of moco's slow copy (default 0.99); in mocov3 it rises to 1."}
    )
    negatives: str | None = field(
        default=None,
        metadata={
            "help": "Negative pairs (default same_view; infonce, spectral cross_view; moco always queue).",
            "choices": NEGATIVES,
        },
    )
    momentum: float = field(default=0.9, metadata={"help": "Of --optim sgd and lars."})
    per_device_train_batch_size: int = field(default=512, metadata={"help": "Examples per step and device, >= 2."})
    learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate."})
    optim: str = field(default="sgd", metadata={"help": "lars, or one of transformers; sgd has momentum here."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Of the weights, not of biases and norms."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "A schedule of transformers."})
    num_train_epochs: float = field(default=800.0, metadata={"help": "Epochs, unless max_steps is given."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to score: no, steps or epoch."})
    save_strategy: str = field(default="no", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    load_best_model_at_end: bool = field(
        default=False, metadata={"help": "End with the best checkpoint; needs --validation."}
    )
    metric_for_best_model: str | None = field(default="knn_accuracy", metadata={"help": "Chooses the checkpoint."})

    def __post_init__(self) -> None:
        if self.objective == "fmicl":
            self.alpha = 40.0 if self.alpha is None else self.alpha
            if self.gamma is None and self.similarity != "cosine":
                self.gamma = 1.0
        elif self.objective == "infonce" and self.temperature is None:
            self.temperature = 0.5
        if self.mini_batch_size is not None:
            raise ValueError("--mini_batch_size is not possible with images: batch normalization needs the whole batch")
        self.settle_method()
        prefix = "" if self.method == "simclr" else f"{self.method}-"
        self.output_dir = self.output_dir or f"runs/vision-{prefix}{self.objective_name}"  # beside a text run's
        optim, self.optim = self.optim, "sgd" if self.optim == "lars" else self.optim  # which transformers lacks
        super().__post_init__()
        self.optim = optim

    def settle_method(self) -> None:
        """Defaults of the method; ValueError for a hyperparameter that it does not have, or out of range."""
        if self.method == "moco":
            self.negatives = self.negatives or "queue"
            self.queue_size = 4096 if self.queue_size is None else self.queue_size
        if self.method != "simclr":
            self.encoder_momentum = 0.99 if self.encoder_momentum is None else self.encoder_momentum
        if (self.negatives == "queue") != (self.method == "moco"):
            raise ValueError(
                f"--negatives {self.negatives} means nothing to --method {self.method}: only moco has a queue"
            )
        if self.method == "moco" and self.objective == "fmicl":
            warnings.warn(
                "f-MICL's negative term pushes queries away from all keys of a queue alike, their positives among them "
                "while keys lie close together: on scikit-learn's digits the encoder got worse. --method mocov3, or "
                "--objective infonce, does not do that.",
                stacklevel=2,
            )
        if self.queue_size is not None and self.method != "moco":
            raise ValueError(f"--queue_size means nothing to --method {self.method}, which has no queue")
        if self.encoder_momentum is not None and self.method == "simclr":
            raise ValueError("--encoder_momentum means nothing to --method simclr, which has no slow copy")
        if self.queue_size is not None and self.queue_size < 1:
            raise ValueError(f"--queue_size must be at least 1, got {self.queue_size}")
        if self.encoder_momentum is not None and not 0 <= self.encoder_momentum <= 1:
            raise ValueError(f"--encoder_momentum must be in [0, 1], got {self.encoder_momentum}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--momentum must be in [0, 1), got {self.momentum}")

    def trainer_class(self) -> Callable[..., FMICLTrainer]:
        """What trains by the method, with its hyperparameters."""
        if self.method == "simclr":
            return FMICLTrainer
        slow = partial(
            MomentumTrainer, encoder_momentum=0.99 if self.encoder_momentum is None else self.encoder_momentum
        )
        if self.method == "moco":
            return partial(slow, queue_size=4096 if self.queue_size is None else self.queue_size)
        return partial(slow, predictor=True, rising=True)

    def optimizer_class_and_kwargs(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """What transformers would build otherwise, or lacks; None for its own.

        Raises:
            InputError: --optim lars without the package that has it.
        """
        kwargs = {"lr": self.learning_rate, "momentum": self.momentum}
        if self.optim == "sgd":
            return torch.optim.SGD, kwargs
        if self.optim == "lars":
            try:
                from pytorch_optimizer import LARS
            except ImportError as error:
                raise InputError("--optim lars needs pytorch-optimizer: pip install pytorch-optimizer") from error
            return LARS, kwargs
        return None


def parse_vision_args(
    argv: Sequence[str] | None = None,
) -> tuple[ImageModelArguments, ImageDataArguments, VisionTrainingArguments]:
    """Arguments of the vision recipe, as `arguments.parse_groups` reads them. Where no data is named, scikit-learn's
    digits and their preset come first.

    Raises:
        InputError: An unknown key or flag, or a value that is not accepted; names it.
    """

    def check(namespace: Namespace) -> None:
        if namespace.train_file is not None and namespace.dataset_name is not None:
            raise InputError("exactly one of --train_file and --dataset_name is needed, got both")
        refuse_without_dataset(namespace, dataset_split="train")
        if namespace.train_sampling_strategy in LENGTH_STRATEGIES:
            raise InputError(f"--train_sampling_strategy {namespace.train_sampling_strategy}: images have no length")
        if namespace.load_best_model_at_end and not namespace.validation:
            raise InputError(
                "--load_best_model_at_end True would choose the checkpoint by the images that the run is scored on: "
                "keep others aside with --validation N"
            )

    def preset_of(named: Namespace) -> Path | None:
        return DIGITS_PRESET if named.train_file is None and named.dataset_name is None else None

    groups = (ImageModelArguments, ImageDataArguments, VisionTrainingArguments)
    parsed: tuple[ImageModelArguments, ImageDataArguments, VisionTrainingArguments]
    parsed = parse_groups(groups, argv, preset_of, check)
    check_optimizer(parsed[-1], parsed[-1].optimizer_class_and_kwargs())
    return parsed
