"""Image encoders: any Hugging Face image model with one pooling rule."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel

from fmicl_text.errors import InputError
from fmicl_text.loading import refuse_links, resolve_model_path, translate_loading_errors
from fmicl_text.vision.architectures import (
    SmallStemResNetConfig,
    current_config,
    freeze_positions,
    initialize_as_mocov3,
)

logger = logging.getLogger(__name__)

IMAGE_POOLINGS = ("auto", "cls", "mean", "pooler")
CLS_MODELS = ("vit", "deit", "vit_mae", "vit_msn")  # their pooler is a random dense layer, which is removed
# Modules that only the model's own pooler uses, besides those named `pooler`.
POOLER_MODULES = {
    "clip_vision_model": "post_layernorm",
    "convnext": "layernorm",
    "convnextv2": "layernorm",
    "siglip_vision_model": "head",
}


class ImageEncoder(nn.Module):
    """A Hugging Face image model and the pooling of its output to one vector.

    Args:
        backbone: A model of `AutoModel`. Its config, which is saved with it, may have the fields `image_pooling` and,
            for training from scratch, `fixed_positions`.
        pooling: `auto` is the class token for ViT, DeiT, ViT-MAE and ViT-MSN, else the model's own pooler if it has
            one, else the mean. `cls`, `mean` and `pooler` override it. None takes the config's `image_pooling`, or
            `auto`.

    Raises:
        InputError: The model lacks the class token or pooler that the pooling requires, or does not take images
            [B, C, H, W].

    Attributes:
        trust_remote_code: Whether custom code was run to build the model, and may be run to load its checkpoints.
    """

    trust_remote_code = False

    def __init__(self, backbone: PreTrainedModel, pooling: str | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        config = backbone.config
        self.pooling = pooling or getattr(config, "image_pooling", None) or "auto"
        if config.model_type == "siglip2_vision_model":  # SigLIP 2 checkpoints of fixed size have the type siglip
            raise InputError(f"{config.model_type} is not supported: it takes patches with a mask instead of images")
        if self.pooling == "cls" and not has_class_token(backbone):
            raise InputError(f"pooling=cls: {config.model_type} has no class token; use auto, mean or pooler")
        if self.pooling == "pooler" and config.model_type in CLS_MODELS:
            raise InputError(f"pooling=pooler: the pooler of {config.model_type} is random; use auto, cls or mean")
        config.image_pooling = self.pooling
        if self.pooling in ("cls", "mean") or config.model_type in CLS_MODELS:
            drop_pooler(backbone)
            unused = getattr(backbone, POOLER_MODULES.get(config.model_type, ""), None)
            if unused is not None:  # frozen instead of removed, because the model's forward calls it
                unused.requires_grad_(False)
        for name, parameter in backbone.named_parameters():
            if name.endswith("mask_token"):  # of DINOv2 and BEiT, for masked training
                parameter.requires_grad_(False)
        if getattr(config, "fixed_positions", False):
            freeze_positions(backbone)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalized images [B, C, H, W] to embeddings [B, D]."""
        output = self.backbone(pixel_values=pixel_values)
        tokens, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        pooling = self.pooling
        if pooling == "auto":
            use_cls = self.backbone.config.model_type in CLS_MODELS
            pooling = "cls" if use_cls else "mean" if pooled is None else "pooler"
        if pooling == "cls":
            return tokens[:, 0]
        if pooling == "pooler":
            if pooled is None:
                raise InputError(f"pooling=pooler: {self.backbone.config.model_type} has no pooler")
            return pooled.flatten(1)
        return tokens.mean((2, 3)) if tokens.ndim == 4 else tokens.mean(1)

    @property
    def num_channels(self) -> int:
        """Number of channels of the input images."""
        return int(getattr(self.backbone.config, "num_channels", 3))

    def width(self, image_size: int) -> int:
        """The number D of features, from a forward pass, because configs have no common name for it.

        Raises:
            InputError: The model does not accept images of this size.
        """
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return self(torch.zeros(1, self.num_channels, image_size, image_size)).shape[1]
        except InputError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"image_size={image_size} is not supported by {self.backbone.config.model_type}: {reason}"
            ) from error
        finally:
            self.train(training)

    def save_pretrained(
        self, folder: str | Path, processor: Any = None, state: dict[str, Tensor] | None = None
    ) -> None:
        """Write a folder that AutoModel, AutoModelForImageClassification and AutoImageProcessor can load. A model with
        the stem for small images also requires `import fmicl_text.vision.architectures`.

        Args:
            folder: Created if missing.
            processor: The image processor, saved with the model.
            state: Weights of the backbone, if its own are sharded.
        """
        refuse_links(folder)
        self.backbone.save_pretrained(folder, state_dict=state)
        if processor is not None:
            processor.save_pretrained(folder)


def has_class_token(backbone: PreTrainedModel) -> bool:
    """Whether the first token is a class token, which CLIP names class_embedding and all others cls_token."""
    names = [name for name, _ in backbone.named_parameters()]
    return any(name.endswith(("cls_token", "class_embedding")) for name in names)


def drop_pooler(backbone: Any) -> None:
    """Remove a pooler with weights: they would get no gradient, and DDP raises an error for such parameters."""
    pooler = getattr(backbone, "pooler", None)
    if isinstance(pooler, nn.Module) and list(pooler.parameters()):
        backbone.pooler = None


def build_image_encoder(
    model_name_or_path: str,
    revision: str | None = None,
    pooling: str | None = None,
    trust_remote_code: bool = False,
) -> ImageEncoder:
    """An image encoder in float32 from a folder or the Hub. For CLIP and SigLIP it is the vision tower.

    Args:
        model_name_or_path: Folder or Hub name of any Hugging Face image model, or a folder from `save_pretrained`.
        revision: Branch, tag or commit on the Hub.
        pooling: One of `IMAGE_POOLINGS`. None takes the model's own, or `auto` if it does not specify one.
        trust_remote_code: Run custom code that comes with the model. Otherwise such a model raises an error.

    Raises:
        InputError: The model does not exist, is corrupted, requires custom code, or is not an image model.
    """
    name, code = resolve_model_path(model_name_or_path), {"trust_remote_code": trust_remote_code}
    with translate_loading_errors(f"model_name_or_path={model_name_or_path}"):
        config = AutoConfig.from_pretrained(name, revision=revision, **code)
        config = current_config(getattr(config, "vision_config", config))
        model = AutoModel.from_pretrained(name, config=config, revision=revision, dtype=torch.float32, **code)
    if not hasattr(model, "main_input_name") or model.main_input_name != "pixel_values":
        raise InputError(f"model_name_or_path={model_name_or_path}: {config.model_type} is not an image model")
    encoder = ImageEncoder(model, pooling)
    encoder.trust_remote_code = trust_remote_code
    return encoder


def new_image_encoder(config: Any, pooling: str | None = None) -> ImageEncoder:
    """An image encoder with random weights from a config, such as those in `IMAGE_CONFIGS`."""
    with translate_loading_errors(config.model_type):
        backbone = AutoModel.from_config(config)
    if getattr(config, "fixed_positions", False):
        initialize_as_mocov3(backbone)
    return ImageEncoder(backbone, pooling)


def pixel_statistics(
    model_name_or_path: str, channels: int, revision: str | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of pixels in [0, 1], per channel, from a model's image processor; None if it has no
    processor for this number of channels, or one that is custom code."""
    try:
        processor = AutoImageProcessor.from_pretrained(model_name_or_path, revision=revision, trust_remote_code=False)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    except Exception as error:  # of any type, for an invalid preprocessor_config.json
        if "trust_remote_code" in str(error):
            logger.warning("%s: its image processor is custom Python code, which is not run", model_name_or_path)
        return None
    return (mean, std) if len(mean) == len(std) == channels else None


def has_small_stem(config: PreTrainedConfig) -> bool:
    """Whether a config specifies the ResNet stem for small images."""
    return isinstance(config, SmallStemResNetConfig)
