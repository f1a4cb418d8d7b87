"""LoRA adapters (arXiv 2106.09685), by peft: few weights to train, and an encoder without adapters at the end."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor

from fmicl_text.errors import InputError

ADAPTER = "default"  # peft's name for a model's only adapter


def add_lora(encoder: SentenceTransformer, rank: int) -> None:
    """Put adapters of a rank into every linear layer of the encoder, in place, and freeze the rest.

    Raises:
        InputError: peft is not installed, or a rank below 1.
    """
    if rank < 1:
        raise InputError(f"--lora_rank must be at least 1, got {rank}")
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError("--lora_rank needs peft: pip install peft") from error
    encoder.add_adapter(
        LoraConfig(task_type="FEATURE_EXTRACTION", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    )


def is_adapter(name: str) -> bool:
    """Whether a weight of this name is an adapter's."""
    return ".lora_" in name


def merged(backbone: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a backbone without adapters that computes what the one with adapters does: W + scaling B A.

    Args:
        backbone: A Hugging Face model, with adapters or without.
        state: Its weights, by its names.
    """
    plain = {}
    for name, weight in state.items():
        layer, based, rest = name.partition(".base_layer.")
        if is_adapter(name):
            continue
        if based and rest == "weight":
            down, up = (state[f"{layer}.lora_{side}.{ADAPTER}.weight"] for side in "AB")
            scaling = backbone.get_submodule(layer).scaling[ADAPTER]
            weight = weight + scaling * (up @ down).to(weight.dtype)
        plain[f"{layer}.{rest}" if based else name] = weight
    return plain
