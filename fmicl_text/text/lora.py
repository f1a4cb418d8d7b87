"""LoRA adapters (arXiv 2106.09685) with peft, optionally over weights quantized to 4 or 8 bits (QLoRA, arXiv
2305.14314). The saved encoder contains no adapters: they are merged into its weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file

from fmicl_text.errors import InputError
from fmicl_text.files import read_json

ADAPTER = "default"  # peft's default adapter name


def add_lora(encoder: SentenceTransformer, rank: int) -> None:
    """Add adapters of the given rank to every linear layer of the encoder, in place, and freeze the other weights.

    Raises:
        InputError: The rank is below 1, or peft is not installed.
    """
    if rank < 1:
        raise InputError(f"lora_rank must be at least 1, got {rank}")
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError(f"lora_rank={rank} requires peft: pip install peft") from error
    module: Any
    for module in encoder.modules():
        # On CPUs with AVX512-BF16, bitsandbytes would repack 4-bit weights in eval mode and fail in the next step.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    backbone: Any = encoder[0].model
    pooler = [name for name, _ in backbone.named_modules() if re.match(r"pooler(\.|$)", name)]  # gets no gradient
    config = LoraConfig(
        task_type="FEATURE_EXTRACTION", r=rank, lora_alpha=2 * rank, target_modules="all-linear",
        exclude_modules=pooler or None, fan_in_fan_out=any(isinstance(module, Conv1D) for module in backbone.modules()),
    )  # fmt: skip
    try:
        encoder.add_adapter(config)
    except (ImportError, ValueError) as error:  # a version of peft that transformers does not support
        raise InputError(f"lora_rank={rank}: {' '.join(str(error).split())}") from error


def adapter_base(model_name_or_path: str, revision: str | None = None) -> tuple[str, str | None]:
    """Name and revision of the model that a folder or Hub name of adapters was trained on; of the model itself if it
    has no adapters."""
    file = find_adapter_config_file(model_name_or_path, revision=revision)
    return (
        (model_name_or_path, revision)
        if file is None
        else (str(read_json(Path(file))["base_model_name_or_path"]), None)
    )


def open_adapters(backbone: Any, source: str, merge: bool) -> None:
    """Make the adapters that a model was saved with trainable, or merge them into its weights, in place. Models without
    adapters are not changed.

    Args:
        backbone: A Hugging Face model.
        source: The argument and its value, which begin the message.
        merge: Whether to merge them.

    Raises:
        InputError: They are not LoRA adapters of linear layers, the only kind that can be merged when saving.
    """
    adapters = getattr(backbone, "peft_config", None) or {}
    if not adapters:
        return
    names = [name for name, _ in backbone.named_parameters()]
    ends = (f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight")
    other = [name for name in names if (is_adapter(name) and not name.endswith(ends)) or ".modules_to_save." in name]
    if set(adapters) != {ADAPTER} or other or not any(map(is_adapter, names)):
        kinds = ", ".join(sorted(str(getattr(one.peft_type, "value", one.peft_type)) for one in adapters.values()))
        found = f" ({other[0]})" if other else ""
        raise InputError(
            f"{source} has adapters ({kinds}) that are not plain LoRA of linear layers{found}: merge them into its "
            "weights with peft and save the model"
        )
    backbone._weight_conversions = None  # the adapter's, which would rename the merged weights when they are saved
    if not merge:
        for name, weight in backbone.named_parameters():
            weight.requires_grad_(is_adapter(name))
        return
    weights = merge_adapters(backbone, backbone.state_dict())
    for name, module in list(backbone.named_modules()):
        if hasattr(module, "get_base_layer"):
            backbone.set_submodule(name, module.get_base_layer())
    backbone.load_state_dict(weights)
    backbone.requires_grad_(True)
    backbone._hf_peft_config_loaded = False
    del backbone.peft_config


def quantization_config(load_in: str) -> Any:
    """The config for loading a model's linear layers in `4bit` (NF4) or `8bit`.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise InputError(f"load_in={load_in} requires bitsandbytes: pip install bitsandbytes")
    kept = ["pooler"]  # no adapter, so that it is saved as it is
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute, llm_int8_skip_modules=kept
    )


def is_adapter(name: str) -> bool:
    """Whether the weight of this name belongs to an adapter."""
    return ".lora_" in name


def base_weights_hash(backbone: Any) -> str | None:
    """A hash of the weights that are not part of adapters; None for a model without adapters."""
    state = backbone.state_dict()
    if not any(map(is_adapter, state)):
        return None
    digest = hashlib.sha256()
    for name in sorted(name for name in state if not is_adapter(name)):
        digest.update(state[name].cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def merge_adapters(backbone: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an equivalent backbone without adapters: W + scaling B A for each weight W that has an adapter,
    in float32 if W is quantized.

    Args:
        backbone: A Hugging Face model, with or without adapters.
        state: Its state dict.
    """
    merged = {}
    for name, weight in state.items():
        layer, based, rest = name.partition(".base_layer.")
        if is_adapter(name) or (based and rest not in ("weight", "bias")):  # the others are quantization state
            continue
        if based and rest == "weight":
            module = backbone.get_submodule(layer)
            if not weight.is_floating_point():
                weight = dequantize(weight, module.get_base_layer(), state.get(f"{layer}.base_layer.SCB"))
            down, up = (state[f"{layer}.lora_{side}.{ADAPTER}.weight"] for side in "AB")
            change = module.scaling[ADAPTER] * (up @ down).to(weight)
            weight = weight + (change.T if module.fan_in_fan_out else change)  # GPT-2's Conv1D is transposed
        merged[f"{layer}.{rest}" if based else name] = weight
    return merged


@contextmanager
def save_with_weights(backbone: Any, weights: dict[str, Tensor]) -> Iterator[None]:
    """Within this context, `save_pretrained` of the backbone writes these weights. By default, a model with adapters
    writes only the adapters, and a quantized one its quantized state."""
    config, save = backbone.config, backbone.save_pretrained
    hidden = {"_hf_peft_config_loaded": False, "hf_quantizer": None}
    before = {name: backbone.__dict__[name] for name in hidden if name in backbone.__dict__}
    quantization = config.__dict__.pop("quantization_config", None)
    backbone.__dict__.update({name: hidden[name] for name in before})
    backbone.save_pretrained = partial(save, state_dict=weights)
    try:
        yield
    finally:
        backbone.save_pretrained = save
        backbone.__dict__.update(before)
        if quantization is not None:
            config.quantization_config = quantization


def dequantize(weight: Tensor, layer: Any, scale: Tensor | None) -> Tensor:
    """The float32 weight of a quantized bitsandbytes layer; `scale` [rows] is the scale of an 8-bit weight."""
    if scale is not None:
        return weight * scale[:, None] / 127
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, layer.weight.quant_state).float()
