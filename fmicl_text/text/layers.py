"""Training of the last layers only."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer
from torch import nn

from fmicl_text.errors import InputError


def train_last_layers(encoder: SentenceTransformer, number: int) -> None:
    """Freeze the embeddings and all but the last layers of a transformer, in place. What follows the layers (a final
    norm, dense layers after pooling) is trained.

    Adaptation changes mostly the last layers (arXiv 2508.03453), and the backward pass ends at the first trained one.

    Args:
        encoder: A transformer with pooling.
        number: Layers that are trained, from 1 to all of them.

    Raises:
        InputError: The number is out of this range, or the layers of the model cannot be found.
    """
    backbone: Any = encoder.transformers_model
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module)]
    layers = max(lists, key=len, default=nn.ModuleList())  # of equals the first, the outermost
    if not 1 <= number <= len(layers):
        raise InputError(f"trained_layers must be from 1 to {len(layers)}, the layers of the model; got {number}")
    first = next(iter(layers[len(layers) - number].parameters()))
    for parameter in backbone.parameters():  # in the order of the forward pass: embeddings, layers, final norm
        if parameter is first:
            break
        parameter.requires_grad_(False)
