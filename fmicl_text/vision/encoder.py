"""Image encoders: any HF image model and one pooling rule."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel

from fmicl_text.errors import InputError
from fmicl_text.loading import folder_or_name, refuse_links, translate_loading_errors
from fmicl_text.vision.architectures import SmallStemResNet, freeze_positions, initialize_as_mocov3

logger = logging.getLogger(__name__)

IMAGE_POOLINGS = ("auto", "cls", "mean", "pooler")
FIRST_TOKEN = ("vit", "deit", "vit_mae", "vit_msn")  # their pooler is a random dense layer, built away
# Modules with weights that only the model's own pooler runs through, beside those named `pooler`.
POOLER_MODULE = {
    "clip_vision_model": "post_layernorm",
    "convnext": "layernorm",
    "convnextv2": "layernorm",
    "siglip_vision_model": "head",
}


class ImageEncoder(nn.Module):
    """An HF image model and the rule that makes one vector of its output.

    Args:
        backbone: What `AutoModel` gives. Fields of its config, which saving keeps, say what is not stock:
            `image_pooling`, and for training from scratch `small_image_stem` and `fixed_positions`.
        pooling: `auto` is the first token of ViT and DeiT, else the model's own pooler, else the mean. `cls`, `mean`
            and `pooler` overrule it.

    Raises:
        InputError: The model has no class token, or no pooler, to take; or it takes no images [B, C, H, W].

    Attributes:
        trust_remote_code: Whether the model's own code was run to build it, and may be to open a checkpoint of it.
    """

    trust_remote_code = False

    def __init__(self, backbone: PreTrainedModel, pooling: str | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        config = backbone.config
        self.pooling = pooling or getattr(config, "image_pooling", None) or "auto"
        if config.model_type == "siglip2_vision_model":  # the fixed-size SigLIP 2 checkpoints are of type siglip
            raise InputError(f"{config.model_type} takes patches and their mask, not images of one size")
        if self.pooling == "cls" and not has_class_token(backbone):
            raise InputError(f"--pooling cls: {config.model_type} has no class token; accepted: auto, mean, pooler")
        if self.pooling == "pooler" and config.model_type in FIRST_TOKEN:
            raise InputError(f"--pooling pooler: that of {config.model_type} is random; accepted: auto, cls, mean")
        config.image_pooling = self.pooling
        if self.pooling in ("cls", "mean") or config.model_type in FIRST_TOKEN:
            drop_pooler(backbone)
            unused = getattr(backbone, POOLER_MODULE.get(config.model_type, ""), None)
            if unused is not None:  # frozen, not removed: the model's forward still calls it
                unused.requires_grad_(False)
        for name, parameter in backbone.named_parameters():
            if name.endswith("mask_token"):  # DINOv2's and BEiT's, of masked training
                parameter.requires_grad_(False)
        if getattr(config, "fixed_positions", False):
            freeze_positions(backbone)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalized images [B, C, H, W] to embeddings [B, D]."""
        output = self.backbone(pixel_values=pixel_values)
        tokens, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        pooling = self.pooling
        if pooling == "auto":
            first = self.backbone.config.model_type in FIRST_TOKEN
            pooling = "cls" if first else "mean" if pooled is None else "pooler"
        if pooling == "cls":
            return tokens[:, 0]
        if pooling == "pooler":
            if pooled is None:
                raise InputError(f"--pooling pooler: {self.backbone.config.model_type} has no pooler")
            return pooled.flatten(1)
        return tokens.mean((2, 3)) if tokens.ndim == 4 else tokens.mean(1)

    @property
    def num_channels(self) -> int:
        """Channels of the images that it takes."""
        return int(getattr(self.backbone.config, "num_channels", 3))

    def width(self, image_size: int) -> int:
        """Number D of features, by a dry run: configs name it in five ways, some in none."""
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
                f"--image_size {image_size} does not fit {self.backbone.config.model_type}: {reason}"
            ) from error
        finally:
            self.train(training)

    def save_pretrained(
        self, folder: str | Path, processor: Any = None, state: dict[str, Tensor] | None = None
    ) -> None:
        """Write a folder that AutoModel, AutoModelForImageClassification and AutoImageProcessor open (with a
        small-image stem only `build_image_encoder` does).

        Args:
            folder: Made if need be.
            processor: The image processor, saved beside the model.
            state: Weights of the backbone, where an engine has sharded its own.
        """
        refuse_links(folder)
        self.backbone.save_pretrained(folder, state_dict=state)
        if processor is not None:
            processor.save_pretrained(folder)


def has_class_token(backbone: PreTrainedModel) -> bool:
    """Whether the first token is none of the image's; CLIP calls it class_embedding, all others cls_token."""
    names = [name for name, _ in backbone.named_parameters()]
    return any(name.endswith(("cls_token", "class_embedding")) for name in names)


def drop_pooler(backbone: Any) -> None:
    """Remove a pooler with weights: no gradient would reach them, and DDP stops on such parameters."""
    pooler = getattr(backbone, "pooler", None)
    if isinstance(pooler, nn.Module) and list(pooler.parameters()):
        backbone.pooler = None


def build_image_encoder(
    model_name_or_path: str,
    revision: str | None = None,
    pooling: str | None = None,
    trust_remote_code: bool = False,
) -> ImageEncoder:
    """An image encoder from a folder or the Hub, in float32; of CLIP and SigLIP the vision tower.

    Args:
        model_name_or_path: Folder or Hub name of any Hugging Face image model, or what `save_pretrained` wrote.
        revision: Branch, tag or commit on the Hub.
        pooling: One of `IMAGE_POOLINGS`; None takes what the folder says, or `auto`.
        trust_remote_code: Run Python code that comes with the model; without, such a model is refused.

    Raises:
        InputError: The model is not there, is damaged, needs code of its own, or is no image model.
    """
    name, code = folder_or_name(model_name_or_path), {"trust_remote_code": trust_remote_code}
    with translate_loading_errors(f"--model_name_or_path {model_name_or_path}"):
        config = AutoConfig.from_pretrained(name, revision=revision, **code)
        config = getattr(config, "vision_config", config)
        loader: Any = SmallStemResNet if has_small_stem(config) else AutoModel
        model = loader.from_pretrained(name, config=config, revision=revision, dtype=torch.float32, **code)
    if not hasattr(model, "main_input_name") or model.main_input_name != "pixel_values":
        raise InputError(f"--model_name_or_path {model_name_or_path}: {config.model_type} is no image model")
    encoder = ImageEncoder(model, pooling)
    encoder.trust_remote_code = trust_remote_code
    return encoder


def new_image_encoder(config: Any, pooling: str | None = None) -> ImageEncoder:
    """An image encoder with random weights from a config, such as those of `IMAGE_CONFIGS`."""
    with translate_loading_errors(config.model_type):
        backbone = SmallStemResNet(config) if has_small_stem(config) else AutoModel.from_config(config)
    if getattr(config, "fixed_positions", False):
        initialize_as_mocov3(backbone)
    return ImageEncoder(backbone, pooling)


def pixel_statistics(
    model_name_or_path: str, channels: int, revision: str | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of pixels in [0, 1], per channel, that a model's image processor says; None without
    one for so many channels, and for one that is code of the model's own."""
    try:
        processor = AutoImageProcessor.from_pretrained(model_name_or_path, revision=revision, trust_remote_code=False)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        if "trust_remote_code" in str(error):
            logger.warning("%s: its image processor is Python code, which is never run here", model_name_or_path)
        return None
    return (mean, std) if len(mean) == len(std) == channels else None


def has_small_stem(config: PreTrainedConfig) -> bool:
    """Whether a config asks for the ResNet stem for small images."""
    return bool(getattr(config, "small_image_stem", False))
