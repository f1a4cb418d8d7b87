"""MoCo and MoCo v3: positives from a slow copy of the model, in MoCo negatives from a queue of what it gave.

Only where x and y come from differs from `FMICLTrainer`: x from the model, which learns, y from the copy, which follows
it. Every objective works with both.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fmicl_text.errors import InputError
from fmicl_text.losses.distributed import gather_rows, row_counts
from fmicl_text.losses.similarity import unit_rows
from fmicl_text.model import ContrastiveModel
from fmicl_text.training.trainer import FMICLTrainer

QUEUE = ("queue", "next_row")


class MomentumEncoder(nn.Module):
    """A copy of a model that gets no gradient, and the queue of what it gave last.

    Args:
        model: Encoder and projection head, as yet without a predictor.
        queue_size: Rows K of the queue, 0 for none. It starts with random directions, as MoCo's does.
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
    def follow(self, model: ContrastiveModel, momentum: float) -> None:
        """Every weight becomes momentum x itself + (1 - momentum) x the model's. Batch statistics stay its own."""
        theirs = dict(model.named_parameters())
        for name, weight in self.model.named_parameters():
            weight.lerp_(theirs[name], 1 - momentum)

    @torch.no_grad()
    def enqueue(self, rows: Tensor) -> None:
        """Put rows [N, D] in place of the oldest ones."""
        where = (self.next_row + torch.arange(len(rows), device=rows.device)) % len(self.queue)
        self.queue[where] = unit_rows(rows)
        self.next_row.add_(len(rows)).remainder_(len(self.queue))


def predictor_head(width: int) -> nn.Module:
    """MoCo v3's predictor, which the slow copy lacks: [N, width] to [N, width]."""
    hidden = [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, width))


class MomentumTrainer(FMICLTrainer):
    """As `FMICLTrainer`, with one view of each pair from a slow copy of the model; either view once.

        loss = (loss(q_1, k_2) + loss(q_2, k_1)) / 2        q from the model, k from the copy, without gradient

    MoCo (arXiv 1911.05722, 2003.04297) has a queue: the negatives of q_i are the copy's last outputs, of past batches.
    MoCo v3 (arXiv 2104.02057) has none, a predictor, and a momentum that rises to 1 as a cosine.

    Args:
        model: Encoder and head. The momentum encoder becomes a submodule: it is in checkpoints, not in exports.
        queue_size: Rows of the queue, at least those that one step adds, 2 x batch x processes, where the arguments
            say negatives `queue`; else 0.
        predictor: Whether the model gets one.
        encoder_momentum: Share of itself that the copy keeps at every step, in [0, 1].
        rising: Whether that rises to 1 over training.
        **kwargs: As for `FMICLTrainer`.

    Raises:
        InputError: A queue too small for what one step adds, or an engine that shards weights.
    """

    def __init__(
        self,
        model: ContrastiveModel,
        *args: Any,
        queue_size: int = 0,
        predictor: bool = False,
        encoder_momentum: float = 0.99,
        rising: bool = False,
        **kwargs: Any,
    ) -> None:
        self.encoder_momentum, self.rising = encoder_momentum, rising
        try:
            momentum_encoder = MomentumEncoder(model, queue_size)
        except RuntimeError as error:
            raise InputError(f"--queue_size {queue_size} embeddings of {model.width} do not fit memory") from error
        if predictor:
            model.predictor = predictor_head(model.width)
        model.momentum_encoder = momentum_encoder
        if queue_size:  # equal in all processes: no need to send it around at every step
            ignored = [f"momentum_encoder.{name}" for name in QUEUE]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        super().__init__(model, *args, **kwargs)
        added = 2 * self.args.train_batch_size * self.args.world_size
        if 0 < queue_size < added:
            raise InputError(f"--queue_size must be at least the {added} embeddings of one step, got {queue_size}")

    def check_engine(self) -> None:
        super().check_engine()
        engine = self.accelerator.distributed_type
        if engine in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise InputError(f"MoCo is not possible with {engine.value}, which shards the weights: use DDP")
        if self.args.mini_batch_size is not None:
            raise InputError("--mini_batch_size is not possible with MoCo")

    def resume_signature(self) -> dict[str, Any]:
        return super().resume_signature() | {"encoder_momentum": self.encoder_momentum, "rising": self.rising}

    def momentum_now(self) -> float:
        """Share of itself that the copy keeps at this step."""
        if not self.rising:
            return self.encoder_momentum
        progress = self.state.global_step / self.state.max_steps
        return 1 - (1 - self.encoder_momentum) * (1 + math.cos(math.pi * progress)) / 2

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self.micro_step == 0 and self.state.global_step > 0:  # at first they are equal
            momentum_encoder: Any = self.model.momentum_encoder
            momentum_encoder.follow(self.model, self.momentum_now())
        return super().training_step(model, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs.pop("text_ids", None)
        queries = self.embed(model, inputs)
        momentum_encoder: Any = self.model.momentum_encoder
        with torch.no_grad(), self.accelerator.autocast():
            keys = self.embed(momentum_encoder.model, inputs)
        queue = getattr(momentum_encoder, "queue", None)
        (query_1, query_2), (key_1, key_2) = queries.unbind(1), keys.unbind(1)
        loss = (
            self.compute_loss_from_embeddings((query_1, key_2), queue=queue)
            + self.compute_loss_from_embeddings((query_2, key_1), queue=queue)
        ) / 2
        if queue is not None:
            rows = keys.flatten(0, 1)
            momentum_encoder.enqueue(torch.cat(gather_rows(rows, row_counts(rows))))
        return (loss, {"embeddings": queries}) if return_outputs else loss
