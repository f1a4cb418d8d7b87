"""MoCo and MoCo v3: positives from a momentum encoder; in MoCo, negatives from a queue of its past outputs.

The difference from `FMICLTrainer` is the origin of x and y: x comes from the trained model, y from its exponential
moving average. Both support every objective.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from fmicl_text.errors import InputError
from fmicl_text.losses.distributed import gather_rows, row_counts
from fmicl_text.losses.similarity import unit_rows
from fmicl_text.model import ContrastiveModel
from fmicl_text.training.trainer import FMICLTrainer

QUEUE = ("queue", "next_row")


class MomentumEncoder(nn.Module):
    """An exponential moving average of a model, without gradient, and the queue of its past outputs.

    Args:
        model: Encoder and projection head, without a predictor.
        queue_size: Rows K of the queue, 0 for none. It starts with random directions, as in MoCo.
    """

    queue: Tensor
    next_row: Tensor

    def __init__(self, model: ContrastiveModel, queue_size: int = 0) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        if queue_size:
            generator = torch.Generator().manual_seed(0)  # the same in every process
            self.register_buffer("queue", unit_rows(torch.randn(queue_size, model.width, generator=generator)))
            self.register_buffer("next_row", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update_momentum(self, model: nn.Module, momentum: float) -> None:
        """Set every weight to momentum * itself + (1 - momentum) * the model's. Batch statistics are not averaged."""
        weights = dict(model.named_parameters())
        for name, weight in self.model.named_parameters():
            weight.lerp_(weights[name], 1 - momentum)

    @torch.no_grad()
    def enqueue(self, rows: Tensor) -> None:
        """Replace the oldest rows of the queue with rows [N, D]."""
        where = (self.next_row + torch.arange(len(rows), device=rows.device)) % len(self.queue)
        self.queue[where] = unit_rows(rows)
        self.next_row.add_(len(rows)).remainder_(len(self.queue))


def predictor_head(width: int) -> nn.Module:
    """MoCo v3's predictor, which the momentum encoder does not have: [N, width] to [N, width]."""
    hidden = [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, width))


class MomentumModel(ContrastiveModel):
    """A model with its momentum encoder, its queue and its predictor. The exported encoder contains none of them.

    Args:
        model: Encoder and head, of any modality. It is trained in place.
        queue_size: Rows of the queue for MoCo (arXiv 1911.05722, 2003.04297), 0 for none.
        predictor: Whether the model gets MoCo v3's predictor (arXiv 2104.02057).

    Raises:
        InputError: The queue does not fit into memory.
    """

    model: ContrastiveModel

    def __init__(self, model: ContrastiveModel, queue_size: int = 0, predictor: bool = False) -> None:
        super().__init__(model.encoder, model.head, model.width)
        # Not a submodule: its encoder and head already are, and each weight must have one name in the state dict.
        object.__setattr__(self, "model", model)
        self.modality, self.unit = model.modality, model.unit
        if predictor:
            self.predictor = predictor_head(model.width)
        try:
            self.momentum_encoder = MomentumEncoder(model, queue_size)
        except RuntimeError as error:
            raise InputError(
                f"queue_size={queue_size} embeddings of width {model.width} do not fit into memory"
            ) from error
        if queue_size:  # equal in all processes, so that DDP need not send it at every step
            ignored = [f"momentum_encoder.{name}" for name in QUEUE]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, ignored)

    @property
    def queue(self) -> Tensor | None:
        """The queue [K, D], or None."""
        return getattr(self.momentum_encoder, "queue", None)

    @property
    def skips_padding(self) -> bool:
        return self.model.skips_padding

    @skips_padding.setter
    def skips_padding(self, value: bool) -> None:
        self.model.skips_padding = value

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        return self.model.embed(features)

    def count(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model.count(inputs)

    @property
    def backbone(self) -> Any:
        return self.model.backbone

    def describe(self) -> dict[str, Any]:
        return self.model.describe()

    def describe_training(self) -> dict[str, Any]:
        return self.model.describe_training()

    def save_encoder(self, folder: str, state: dict[str, Tensor]) -> None:
        self.model.save_encoder(folder, state)

    def open_encoder(self, folder: str) -> nn.Module:
        return self.model.open_encoder(folder)

    def is_exported(self, name: str) -> bool:
        return self.model.is_exported(name)

    @property
    def loads_exported(self) -> bool:
        return self.model.loads_exported

    def make_views(self, views: Any, inputs: dict[str, Tensor], generator: Any) -> dict[str, Tensor]:
        return self.model.make_views(views, inputs, generator)

    def split(self, inputs: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
        return self.model.split(inputs, size)

    def join(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return self.model.join(parts)

    def prepare_data(self, train_dataset: Any, views: Any = None) -> tuple[Any, Any]:
        return self.model.prepare_data(train_dataset, views)


class UpdateMomentumCallback(TrainerCallback):
    """Moves the momentum encoder toward the model before every step except the first, at which they are equal."""

    def __init__(self, trainer: MomentumTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            model: Any = self.trainer.model
            model.momentum_encoder.update_momentum(model, self.trainer.momentum_schedule())


class MomentumTrainer(FMICLTrainer):
    """An `FMICLTrainer` that takes one view of each pair from a momentum encoder. Each view is used once as the query:

        loss = (loss(q_1, k_2) + loss(q_2, k_1)) / 2        q from the model, k from the momentum encoder

    MoCo uses a queue: the negatives of q_i are past outputs of the momentum encoder. MoCo v3 has no queue, but
    a predictor and a momentum that increases to 1.

    Args:
        model: A `MomentumModel`. A queue needs room for the 2 x batch x processes rows that one step adds, and
            negatives `queue` in the arguments.
        encoder_momentum: Momentum of the moving average, in [0, 1].
        increase_momentum: Whether the momentum increases to 1 along a half cosine over training.
        **kwargs: See `FMICLTrainer`.

    Raises:
        InputError: The queue is too small for one step, the engine shards weights, or `mini_batch_size` is set.
    """

    model: MomentumModel

    def __init__(
        self,
        model: MomentumModel | None = None,
        *args: Any,
        encoder_momentum: float = 0.99,
        increase_momentum: bool = False,
        **kwargs: Any,
    ) -> None:
        self.encoder_momentum, self.increase_momentum = encoder_momentum, increase_momentum
        super().__init__(model, *args, **kwargs)
        self.add_callback(UpdateMomentumCallback(self))
        added = 2 * self.args.train_batch_size * self.args.world_size
        queue = self.model.queue
        if queue is not None and len(queue) < added:
            raise InputError(f"queue_size must be at least the {added} embeddings of one step, got {len(queue)}")

    def check_engine(self) -> None:
        if self.args.mini_batch_size is not None:
            raise InputError("mini_batch_size is not supported with MoCo")
        super().check_engine()
        engine = self.accelerator.distributed_type
        if engine in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise InputError(f"MoCo is not supported with {engine.value}, which shards the weights: use DDP")

    def resume_signature(self) -> dict[str, Any]:
        momentum = {"encoder_momentum": self.encoder_momentum, "increase_momentum": self.increase_momentum}
        return super().resume_signature() | momentum

    def momentum_schedule(self) -> float:
        """The momentum of the moving average at this step."""
        if not self.increase_momentum:
            return self.encoder_momentum
        progress = self.state.global_step / self.state.max_steps
        return 1 - (1 - self.encoder_momentum) * (1 + math.cos(math.pi * progress)) / 2

    def loss_arguments(
        self, model: nn.Module, inputs: dict[str, Tensor], past: list[Tensor]
    ) -> list[tuple[Tensor | None, ...]]:
        """As in the base class. The keys of past batches are the queue, which at first contains random directions; the
        first batch has none."""
        inputs.pop("text_ids", None)
        encoder: Any = self.model.momentum_encoder
        (query_1, query_2), (key_1, key_2) = (self.embed(part, inputs).unbind(1) for part in (model, encoder.model))
        queue = None
        if self.model.queue is not None:
            queue = torch.cat([*past, key_1[:0]])[-len(self.model.queue) :]
            rows = torch.cat([key_1, key_2])
            past.append(torch.cat(gather_rows(rows, row_counts(rows))))
            if not len(queue):
                return []
        return [(query, key, None, None, queue) for query, key in ((query_1, key_2), (query_2, key_1))]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs.pop("text_ids", None)
        queries = self.embed(model, inputs)
        encoder: Any = self.model.momentum_encoder
        with torch.no_grad(), self.accelerator.autocast():
            keys = self.embed(encoder.model, inputs)
        queue = self.model.queue
        (query_1, query_2), (key_1, key_2) = queries.unbind(1), keys.unbind(1)
        first = self.compute_loss_from_embeddings((query_1, key_2), queue=queue)
        loss = (first + self.compute_loss_from_embeddings((query_2, key_1), queue=queue)) / 2
        if queue is not None:
            rows = keys.flatten(0, 1)
            encoder.enqueue(torch.cat(gather_rows(rows, row_counts(rows))))
        return (loss, {"embeddings": queries}) if return_outputs else loss
