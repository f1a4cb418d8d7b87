"""The trained module, base class of all modalities: an encoder plus a training-only projection head."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fmicl_text.errors import InputError
from fmicl_text.loading import loading_error_message

TRAINING_FILE = "training_only.safetensors"  # in a checkpoint: weights that are not part of the encoder


# Entries of a model's config that do not affect its output.
NOT_COMPARED = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache")


class ContrastiveModel(nn.Module):
    """The module that the trainer optimizes: the encoder, the head, and the predictor of MoCo v3 if there is one.

    A new modality subclasses this: it names its inputs and implements `embed`, `count`, `backbone`, `describe`,
    `save_encoder` and `open_encoder`.

    Args:
        encoder: The part that is evaluated, saved and exported.
        head: Maps the encoder's embeddings [B, D] to the loss's input [B, width]. Stored in checkpoints, never in the
            exported encoder.
        width: Dimension of the loss's input.

    Attributes:
        modality: Name of the modality in run records and model cards.
        unit: Unit of the logged throughput, in the plural.
        view_input: Name of the tensor in a batch from which `FMICLTrainer(views=...)` makes the views; None if
            `make_views` makes them from the whole batch, or the collator makes them.
        model_input: Name under which the encoder receives these views.
        skips_padding: Whether texts of similar length may go through the encoder together, in several passes. The
            trainer sets False where processes wait for each other in a pass, or batches need equal shapes.
    """

    modality: str
    unit: str
    view_input: str | None = None
    model_input: str | None = None
    skips_padding = True

    def __init__(self, encoder: Any, head: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.width = width
        self.predictor: nn.Module = nn.Identity()

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Inputs [B, ...] to embeddings [B, width]."""
        return self.predictor(self.head(self.embed(features)))

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        """The encoder's embeddings [B, D] of inputs [B, ...]."""
        raise NotImplementedError

    def count(self, inputs: dict[str, Tensor]) -> Tensor:
        """The number of `unit` in a batch [B, V, ...]; a scalar."""
        raise NotImplementedError

    @property
    def backbone(self) -> Any:
        """The Hugging Face model inside the encoder."""
        raise NotImplementedError

    def make_views(self, views: Any, inputs: dict[str, Tensor], generator: Any) -> dict[str, Tensor]:
        """A batch whose inputs [B, ...] are replaced by views [B, V, ...].

        Args:
            views: The `views` of the trainer.
            inputs: A batch of the collator.
            generator: A generator on the device of the batch.
        """
        rows = inputs.pop(str(self.view_input))
        return inputs | {str(self.model_input): views(rows, generator)}

    def split(self, inputs: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
        """A batch [B, ...] in parts of `size` examples, each as the collator makes a batch of these examples."""
        return split_rows(inputs, size)

    def join(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The opposite of `split`."""
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def pad(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch [B, V, ...] with padding that makes batches of fewer different shapes, for `torch_compile`."""
        return inputs

    def describe(self) -> dict[str, Any]:
        """Properties of the encoder for the run record and the model card: base_model, base_revision, pooling, size."""
        raise NotImplementedError

    def describe_training(self) -> dict[str, Any]:
        """Settings of the model that affect training and are not stored in the weights of a checkpoint."""
        config = {name: value for name, value in self.backbone.config.to_dict().items() if name not in NOT_COMPARED}
        dropout = {name: value for name, value in config.items() if "drop" in name}
        others = json.dumps({name: value for name, value in config.items() if name not in dropout}, default=str)
        return dropout | self.describe() | {"config": hashlib.sha256(others.encode()).hexdigest()[:16]}

    def save_encoder(self, folder: str, state: dict[str, Tensor]) -> None:
        """Write the encoder to a folder, with the weights in `state`, a state dict of this module."""
        raise NotImplementedError

    def open_encoder(self, folder: str) -> nn.Module:
        """Load the encoder that `save_encoder` wrote. Custom code runs only if it was allowed for this encoder."""
        raise NotImplementedError

    def is_exported(self, name: str) -> bool:
        """Whether `save_encoder` writes the weight of this name."""
        return name.startswith("encoder.")

    @property
    def loads_exported(self) -> bool:
        """Whether the encoder in a checkpoint stores this module's own weights, as opposed to merged ones."""
        return True

    def prepare_data(self, train_dataset: Any, views: Any = None) -> tuple[Any, Any]:
        """The training data and the collator, if the trainer is given none; see `FMICLTrainer`.

        Args:
            train_dataset, views: Those of the trainer.

        Raises:
            InputError: This modality has no default collator.
        """
        raise InputError(f"data_collator is required to train on {self.unit}")

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Enable activation checkpointing, which saves memory and leaves gradients unchanged. Called by the trainer.

        Raises:
            InputError: The architecture does not support it (MPNet and ALBERT, for example).
        """
        try:
            self.backbone.activation_checkpointing_enable(**kwargs)
        except (ValueError, AttributeError) as error:
            raise InputError(f"activation_checkpointing=True is not supported: {error}") from error

    def save_training_only(self, folder: str, state: dict[str, Tensor]) -> None:
        """Write the weights in `state` that are not part of the exported encoder, if any, to a checkpoint folder."""
        if weights := {name: weight for name, weight in state.items() if not self.is_exported(name)}:
            safetensors.torch.save_file(weights, Path(folder) / TRAINING_FILE)

    def load_checkpoint(self, folder: str) -> None:
        """Load all weights from a checkpoint folder, in place.

        Raises:
            InputError: The checkpoint is corrupted, or was saved with another model, head or method.
        """
        own = self.state_dict()
        state: dict[str, Tensor] = {}
        if self.loads_exported:
            try:
                encoder = self.open_encoder(folder)
            except InputError as error:
                reason = str(error).removeprefix(f"model_name_or_path={folder}: ")
                raise InputError(f"resume_from_checkpoint={folder}: {reason}") from error
            state = {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}
        else:
            own = {name: weight for name, weight in own.items() if not self.is_exported(name)}
        if (file := Path(folder) / TRAINING_FILE).is_file():
            try:
                state |= safetensors.torch.load_file(file)
            except SafetensorError as error:
                raise InputError(f"{file}: {loading_error_message(error)}") from error
        if differing := sorted(state.keys() ^ own.keys()):
            where = "this run" if differing[0] in state else "the checkpoint"
            raise InputError(f"{folder} is incompatible: {where} has no {differing[0]} (another head or method?)")
        if other := next((name for name, weight in state.items() if weight.shape != own[name].shape), None):
            shapes = f"{other} is {list(state[other].shape)} in the checkpoint and {list(own[other].shape)} in this run"
            hint = "another model, or another size of head, adapters or queue?"
            raise InputError(f"{folder} is incompatible: {shapes} ({hint})")
        self.load_state_dict(state, strict=False)


def num_rows(inputs: Mapping[str, Tensor]) -> int:
    """The number of examples B of a batch [B, ...]."""
    return len(next(iter(inputs.values())))


def split_rows(inputs: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """A batch [B, ...] in parts of `size` examples; the last may have fewer."""
    parts = zip(*(value.split(size) for value in inputs.values()), strict=True)
    return [dict(zip(inputs, part, strict=True)) for part in parts]
