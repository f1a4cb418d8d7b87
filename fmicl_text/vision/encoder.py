"""Image encoders: any Hugging Face image model with one pooling rule."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from fmicl_text.errors import InputError
from fmicl_text.loading import refuse_links, resolve_model_path, translate_loading_errors
from fmicl_text.vision.architectures import (
    SmallStemResNetConfig,
    current_config,
    freeze_positions,
    initialize_as_mocov3,
)
from fmicl_text.vision.preprocessing import Preprocessing

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
            [B, C, H, W] of one or three channels.

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
        if self.num_channels not in (1, 3):
            raise InputError(f"{config.model_type}: num_channels={self.num_channels} is not supported; use 1 or 3")
        if self.pooling == "cls" and not has_class_token(backbone):
            raise InputError(f"pooling=cls: {config.model_type} has no class token; use auto, mean or pooler")
        if self.pooling == "pooler" and config.model_type in CLS_MODELS:
            raise InputError(f"pooling=pooler: the pooler of {config.model_type} is random; use auto, cls or mean")
        config.image_pooling = self.pooling
        if config.model_type == "vit_mae":
            config.mask_ratio = 0.0  # the default leaves out three quarters of the patches at random, in eval mode too
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
        return self.pool(self.backbone(pixel_values=pixel_values))[0]

    def pool(self, output: Any) -> tuple[Tensor, str]:
        """Embeddings [B, D] of the output of the backbone, and the same as Python code: an attribute of the output."""
        tokens, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        pooling = self.pooling
        if pooling == "auto":
            use_cls = self.backbone.config.model_type in CLS_MODELS
            pooling = "cls" if use_cls else "mean" if pooled is None else "pooler"
        if pooling == "cls":
            return tokens[:, 0], "last_hidden_state[:, 0]"
        if pooling == "pooler":
            if pooled is None:
                raise InputError(f"pooling=pooler: {self.backbone.config.model_type} has no pooler")
            return pooled.flatten(1), "pooler_output.flatten(1)"
        if tokens.ndim == 4:
            return tokens.mean((2, 3)), "last_hidden_state.mean((2, 3))"
        return tokens.mean(1), "last_hidden_state.mean(1)"

    @property
    def num_channels(self) -> int:
        """Number of channels of the input images."""
        return int(getattr(self.backbone.config, "num_channels", 3))

    @property
    def image_size(self) -> int | None:
        """Height and width of the images that the model's config names; None if it names none, or no squares."""
        size = getattr(self.backbone.config, "image_size", None)
        sides = set(size) if isinstance(size, list | tuple) else {size}
        return sides.pop() if len(sides) == 1 else None

    def width(self, image_size: int) -> int:
        """The number D of features, from a forward pass, because configs have no common name for it.

        Raises:
            InputError: The model does not accept images of this size.
        """
        return self.pool_blank(image_size, image_size)[0].shape[1]

    def feature_expression(self, image_size: int) -> str:
        """The features as Python code, an attribute of the output of `AutoModel`: `last_hidden_state[:, 0]`.

        Raises:
            InputError: The model does not accept images of this size.
        """
        return self.pool_blank(image_size, image_size)[1]

    def check_shapes(self, preprocessing: Preprocessing) -> None:
        """Check that the model accepts what an image processor makes of pictures of any shape.

        Raises:
            InputError: The model does not accept images of its size; or the processor does not crop to a square, and
                the model accepts squares only.
        """
        self.width(preprocessing.size)
        wide = preprocessing([Image.new("RGB" if self.num_channels == 3 else "L", (96, 64))])[0]
        height, width = wide.shape[1:]
        try:
            self.pool_blank(height, width)
        except InputError as error:
            name = type(preprocessing.processor).__name__
            raise InputError(f"{error}; {name} does not crop pictures to squares: set do_center_crop") from error

    def pool_blank(self, height: int, width: int) -> tuple[Tensor, str]:
        """Embedding [1, D] of a blank image, in evaluation mode, and its expression; see `pool`."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                pixels = torch.zeros(1, self.num_channels, height, width)
                return self.pool(self.backbone(pixel_values=pixels))
        except InputError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            size = height if height == width else f"{height} x {width}"
            raise InputError(
                f"image_size={size} is not supported by {self.backbone.config.model_type}: {reason}"
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
    """An image encoder with random weights from a config, such as those in `IMAGE_CONFIGS`, which is not modified."""
    config = copy.deepcopy(config)
    with translate_loading_errors(config.model_type):
        backbone = AutoModel.from_config(config)
    if getattr(config, "fixed_positions", False):
        initialize_as_mocov3(backbone)
    return ImageEncoder(backbone, pooling)


def has_small_stem(config: PreTrainedConfig) -> bool:
    """Whether a config specifies the ResNet stem for small images."""
    return isinstance(config, SmallStemResNetConfig)
