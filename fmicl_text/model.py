"""The trained module, base of every modality: an encoder plus a training-only projection head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fmicl_text.errors import InputError
from fmicl_text.loading import explain

TRAINING_FILE = "training_only.safetensors"  # in a checkpoint: the weights that are not part of the encoder


class ContrastiveModel(nn.Module):
    """The module that the trainer optimizes: encoder, then the head, then MoCo v3's predictor if there is one.

    A new modality subclasses this: it states what its inputs are called and implements `embed`, `backbone`, `describe`,
    `save_encoder` and `open_encoder`.

    Args:
        encoder: The part that is evaluated, saved and exported.
        head: From the encoder's embeddings to those that the loss sees, [B, D'] to [B, width]. Stored in checkpoints,
            never in the exported encoder.
        width: Size of the embeddings that the loss sees.

    Attributes:
        modality: Name in records and model cards.
        unit: The unit of the logged throughput, in the plural.
        view_input: Name of the tensor in a batch that `FMICLTrainer(views=...)` turns into views; None if the collator
            makes them.
        model_input: Name under which these views reach the encoder.
    """

    modality: str
    unit: str
    view_input: str | None = None
    model_input: str | None = None

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
        """The encoder's embeddings [B, D'] of inputs [B, ...]."""
        raise NotImplementedError

    def count(self, inputs: dict[str, Tensor]) -> Tensor:
        """The number of `unit` in a batch [B, V, ...]; a scalar."""
        raise NotImplementedError

    @property
    def backbone(self) -> Any:
        """The Hugging Face model inside the encoder."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Facts about the encoder for the run record and the model card: base_model, base_revision, pooling, size."""
        raise NotImplementedError

    def describe_training(self) -> dict[str, Any]:
        """Settings of the model that affect training and are not in the weights of a checkpoint."""
        dropout = {name: value for name, value in self.backbone.config.to_dict().items() if "drop" in name}
        return dropout | self.describe()

    def save_encoder(self, folder: str, state: dict[str, Tensor]) -> None:
        """Write the encoder into a folder, with the weights in `state`, a state dict of this module."""
        raise NotImplementedError

    def open_encoder(self, folder: str) -> nn.Module:
        """Load the encoder that `save_encoder` wrote into a folder. Custom code runs only if it did for this one."""
        raise NotImplementedError

    def is_exported(self, name: str) -> bool:
        """Whether `save_encoder` writes the weight of this name."""
        return name.startswith("encoder.")

    @property
    def loads_exported(self) -> bool:
        """Whether a checkpoint's encoder holds this module's own weights, as opposed to merged ones."""
        return True

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Called by the trainer for `activation_checkpointing`: less memory, the same gradient, dropout included.

        Raises:
            InputError: The architecture does not support it (MPNet and ALBERT, for example).
        """
        try:
            self.backbone.activation_checkpointing_enable(**kwargs)
        except ValueError as error:
            raise InputError(f"activation_checkpointing=True is not supported: {error}") from error

    def save_training_only(self, folder: str, state: dict[str, Tensor]) -> None:
        """Write the weights in `state` that are not part of the exported encoder, if any, into a checkpoint folder."""
        if weights := {name: weight for name, weight in state.items() if not self.is_exported(name)}:
            safetensors.torch.save_file(weights, Path(folder) / TRAINING_FILE)

    def load_checkpoint(self, folder: str) -> None:
        """Load all weights from a checkpoint folder, in place.

        Raises:
            InputError: The checkpoint is corrupted, or was written with another model, head or method.
        """
        own = self.state_dict()
        state: dict[str, Tensor] = {}
        if self.loads_exported:
            state = {f"encoder.{name}": weight for name, weight in self.open_encoder(folder).state_dict().items()}
        else:
            own = {name: weight for name, weight in own.items() if not self.is_exported(name)}
        if (file := Path(folder) / TRAINING_FILE).is_file():
            try:
                state |= safetensors.torch.load_file(file)
            except SafetensorError as error:
                raise InputError(f"{file}: {explain(error)}") from error
        if differing := sorted(state.keys() ^ own.keys()):
            where = "this run" if differing[0] in state else "the checkpoint"
            raise InputError(f"{folder} does not fit: {where} has no {differing[0]} (another head or method?)")
        if other := next((name for name, weight in state.items() if weight.shape != own[name].shape), None):
            shapes = f"{other} is {list(state[other].shape)} in the checkpoint and {list(own[other].shape)} in this run"
            raise InputError(f"{folder} does not fit: {shapes} (another model, or size of head, adapters or queue?)")
        self.load_state_dict(state, strict=False)
