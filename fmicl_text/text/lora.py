"""LoRA adapters (arXiv 2106.09685), by peft, over weights of 4 or 8 bits if asked for (QLoRA, arXiv 2305.14314): few
weights to train, and an encoder without adapters at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import BitsAndBytesConfig

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
    module: Any
    for module in encoder.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would repack 4-bit weights at an evaluation on
            module.support_avx512bf16_for_cpu = False  # such a CPU, and fail at the training step that follows
    encoder.add_adapter(
        LoraConfig(task_type="FEATURE_EXTRACTION", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    )


def quantization(load_in: str) -> Any:
    """The config that loads a model's linear layers in `4bit` (NF4) or `8bit`.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise InputError(f"--load_in_{load_in} needs bitsandbytes: pip install bitsandbytes")
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def is_adapter(name: str) -> bool:
    """Whether a weight of this name is an adapter's."""
    return ".lora_" in name


def base_weights(backbone: Any) -> str | None:
    """A hash of the weights that adapters leave as they are; None of a model without adapters."""
    state = backbone.state_dict()
    if not any(map(is_adapter, state)):
        return None
    digest = hashlib.sha256()
    for name in sorted(name for name in state if not is_adapter(name)):
        digest.update(state[name].cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def merged(backbone: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a backbone without adapters that computes what the one with adapters does: W + scaling B A, in
    float32 where W has fewer bits.

    Args:
        backbone: A Hugging Face model, with adapters or without.
        state: Its weights, by its names.
    """
    plain = {}
    for name, weight in state.items():
        layer, based, rest = name.partition(".base_layer.")
        if is_adapter(name) or (based and rest not in ("weight", "bias")):  # the others describe quantized weights
            continue
        if based and rest == "weight":
            module = backbone.get_submodule(layer)
            if not weight.is_floating_point():
                weight = all_bits(weight, module.get_base_layer(), state.get(f"{layer}.base_layer.SCB"))
            down, up = (state[f"{layer}.lora_{side}.{ADAPTER}.weight"] for side in "AB")
            weight = weight + module.scaling[ADAPTER] * (up @ down).to(weight)
        plain[f"{layer}.{rest}" if based else name] = weight
    return plain


@contextmanager
def plain_saving(backbone: Any, weights: dict[str, Tensor]) -> Iterator[None]:
    """Within, save_pretrained writes these weights. By itself a model with adapters would write these alone, and one of
    few bits its own state."""
    config, save = backbone.config, backbone.save_pretrained
    hidden = {"_hf_peft_config_loaded": False, "hf_quantizer": None}
    before = {name: backbone.__dict__[name] for name in hidden if name in backbone.__dict__}
    few_bits = config.__dict__.pop("quantization_config", None)
    backbone.__dict__.update({name: hidden[name] for name in before})
    backbone.save_pretrained = partial(save, state_dict=weights)
    try:
        yield
    finally:
        backbone.save_pretrained = save
        backbone.__dict__.update(before)
        if few_bits is not None:
            config.quantization_config = few_bits


def all_bits(weight: Tensor, layer: Any, scale: Tensor | None) -> Tensor:
    """A quantized weight of a layer of bitsandbytes in float32; `scale` [rows] is that of an 8-bit one."""
    if scale is not None:
        return weight * scale[:, None] / 127
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, layer.weight.quant_state).float()
