"""The image model that is trained: an image encoder plus a training-only projection head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fmicl_text.errors import InputError
from fmicl_text.loading import hub_commit, hub_name
from fmicl_text.model import TRAINING_FILE, ContrastiveModel
from fmicl_text.vision.encoder import ImageEncoder, build_image_encoder, has_small_stem

BACKBONE = "encoder.backbone."


def projection_head(width: int, dim: int) -> nn.Module:
    """The paper's head of three layers with batch normalization, as in SimCLR v2: [B, width] to [B, dim] (arXiv
    2402.10150, appendix)."""
    layers: list[nn.Module] = []
    for inputs in (width, dim):
        layers += [nn.Linear(inputs, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(dim, dim))


def open_head(folder: str, width: int) -> nn.Module:
    """Load the projection head, for features of the given width, from a checkpoint folder.

    Raises:
        InputError: The folder is not a checkpoint of an image model.
    """
    try:
        weights = load_file(Path(folder) / TRAINING_FILE)
        state = {name.removeprefix("head."): weight for name, weight in weights.items() if name.startswith("head.")}
        head = projection_head(width, len(state["0.weight"]))
        head.load_state_dict(state)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} is not a checkpoint of an image model: no head in {TRAINING_FILE}") from error
    return head.eval()


class ImageContrastiveModel(ContrastiveModel):
    """An image encoder plus a training-only projection head.

    Args:
        encoder: The part that is evaluated, saved and exported.
        image_size: Height and width of the input images.
        head_dim: Width of the head, and dimension of the loss's input.
        processor: The image processor, saved with the encoder.
    """

    modality, unit = "image", "images"
    view_input, model_input = "images", "pixel_values"

    def __init__(self, encoder: ImageEncoder, image_size: int, head_dim: int, processor: Any = None) -> None:
        super().__init__(encoder, projection_head(encoder.width(image_size), head_dim), head_dim)
        self.processor, self.image_size = processor, image_size
        self.feature = encoder.feature_expression(image_size)

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        """Features [B, D] of {pixel_values: [B, C, H, W]}."""
        return self.encoder(features["pixel_values"])

    def count(self, inputs: dict[str, Tensor]) -> Tensor:
        shape = inputs["pixel_values"].shape
        return torch.tensor(shape[0] * shape[1])

    @property
    def backbone(self) -> Any:
        return self.encoder.backbone

    def describe(self) -> dict[str, Any]:
        backbone, channels = self.encoder.backbone, self.encoder.num_channels
        stock = type(backbone).__module__.startswith("transformers.")
        return {
            "modality": self.modality,
            "base_model": hub_name(backbone.name_or_path),
            "base_revision": hub_commit(backbone),
            "pooling": self.encoder.pooling,
            "feature": self.feature,
            "size": self.image_size,
            "channels": channels,
            "processor": self.processor is not None,
            "small_image_stem": has_small_stem(backbone.config),
            "custom_code": not stock and not has_small_stem(backbone.config),
            "pipeline": stock and channels == 3 and self.processor is not None,
        }

    def save_encoder(self, folder: str, state: dict[str, Tensor]) -> None:
        weights = {name.removeprefix(BACKBONE): weight for name, weight in state.items() if name.startswith(BACKBONE)}
        self.encoder.save_pretrained(folder, self.processor, weights)

    def open_encoder(self, folder: str) -> nn.Module:
        return build_image_encoder(folder, trust_remote_code=self.encoder.trust_remote_code)
