"""Image models to train from scratch: ResNets, also with a stem for small images, and MoCo v3's ViT."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ConvNextImageProcessorPil,
    PreTrainedConfig,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
)


class SmallStemResNetConfig(ResNetConfig):
    """The config of `SmallStemResNet`. Its model type is registered with transformers when this module is imported;
    without this module, transformers reports that it does not recognize the type."""

    model_type = "resnet_small_stem"


class SmallStemResNet(ResNetModel):
    """A ResNet with a stem for small images: a 3 x 3 convolution of stride 1, no max-pooling (SimCLR, arXiv 2002.05709,
    appendix B.9). The stock stem reduces a 32 x 32 image to 8 x 8."""

    config_class = SmallStemResNetConfig

    def __init__(self, config: SmallStemResNetConfig) -> None:
        super().__init__(config)
        stem: Any = self.embedder
        old = stem.embedder.convolution
        stem.embedder.convolution = nn.Conv2d(old.in_channels, old.out_channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.embedder.convolution.weight, mode="fan_out", nonlinearity="relu")
        stem.pooler = nn.Identity()


class SmallStemResNetForImageClassification(ResNetForImageClassification):
    """A `SmallStemResNet` with a linear classifier, for fine-tuning."""

    config_class = SmallStemResNetConfig

    def __init__(self, config: SmallStemResNetConfig) -> None:
        super().__init__(config)
        self.resnet = SmallStemResNet(config)


AutoConfig.register(SmallStemResNetConfig.model_type, SmallStemResNetConfig, exist_ok=True)
AutoModel.register(SmallStemResNetConfig, SmallStemResNet, exist_ok=True)
AutoModelForImageClassification.register(SmallStemResNetConfig, SmallStemResNetForImageClassification, exist_ok=True)
AutoImageProcessor.register(
    SmallStemResNetConfig, image_processor_classes={"pil": ConvNextImageProcessorPil}, exist_ok=True
)


def current_config(config: Any) -> Any:
    """The config of an image encoder, converted if an earlier version wrote it: a ResNet with the field
    `small_image_stem`."""
    fields = config.to_dict()
    if not fields.pop("small_image_stem", False) or isinstance(config, SmallStemResNetConfig):
        return config
    return SmallStemResNetConfig.from_dict({name: value for name, value in fields.items() if name != "model_type"})


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine position embeddings [1, 1 + height * width, dim]; the first, of the class token, is zero.

    MoCo v3 (arXiv 2104.02057): sine and cosine of each coordinate at dim/4 frequencies 10000^(-4k/dim)."""
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    x, y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    angles_x, angles_y = (coordinate.flatten()[:, None] * frequencies for coordinate in (x, y))
    grid = torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=1)
    return torch.cat([torch.zeros(1, dim), grid])[None]


def initialize_as_mocov3(backbone: Any) -> None:
    """Initialize a ViT like MoCo v3: sine-cosine position embeddings, Xavier-uniform linear layers, a class token near
    zero."""
    embeddings = backbone.embeddings
    projection = embeddings.patch_embeddings.projection
    rows, columns = (size // patch for size, patch in zip(
        pair(backbone.config.image_size), pair(backbone.config.patch_size), strict=True
    ))  # fmt: skip
    with torch.no_grad():
        embeddings.position_embeddings.copy_(sincos_positions(rows, columns, backbone.config.hidden_size))
        nn.init.normal_(embeddings.cls_token, std=1e-6)
        bound = math.sqrt(6 / (projection.in_channels * math.prod(projection.kernel_size) + projection.out_channels))
        nn.init.uniform_(projection.weight, -bound, bound)
        nn.init.zeros_(projection.bias)
        for module in backbone.layers.modules():
            if isinstance(module, nn.Linear):  # q, k and v are separate layers here, which gives MoCo v3's scale
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)


def freeze_positions(backbone: Any) -> None:
    """Freeze the position embeddings and the patch projection, which stabilizes training (MoCo v3). A saved model does
    not store this, so it is applied at every load."""
    backbone.embeddings.position_embeddings.requires_grad_(False)
    backbone.embeddings.patch_embeddings.projection.requires_grad_(False)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width from the size in a config."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def resnet(depths: Sequence[int], layer_type: str, widths: Sequence[int], small: bool, **fields: Any) -> ResNetConfig:
    """The config of a ResNet, with the stem for small images or the stock stem."""
    fields.setdefault("embedding_size", min(64, widths[0]))
    kind = SmallStemResNetConfig if small else ResNetConfig
    return kind(depths=list(depths), layer_type=layer_type, hidden_sizes=list(widths), **fields)


def mocov3_vit_small(image_size: int = 224) -> ViTConfig:
    """MoCo v3's ViT-S: 12 blocks, 12 heads (instead of 6), width 384."""
    config = ViTConfig(
        image_size=image_size,
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=1536,
        layer_norm_eps=1e-6,  # as in MoCo v3's code; the stock default is 1e-12
    )
    config.fixed_positions = True
    return config


IMAGE_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "resnet-18": lambda: resnet((2, 2, 2, 2), "basic", (64, 128, 256, 512), small=False),
    "resnet-18-small": lambda: resnet((2, 2, 2, 2), "basic", (64, 128, 256, 512), small=True),
    "resnet-8-small": lambda: resnet(  # trains in minutes on a CPU: the first block halves the resolution
        (1, 1, 1), "basic", (32, 64, 128), small=True, embedding_size=16, downsample_in_first_stage=True
    ),
    "resnet-50": lambda: resnet((3, 4, 6, 3), "bottleneck", (256, 512, 1024, 2048), small=False),
    "vit-small": mocov3_vit_small,
    "digits": lambda: resnet((1, 1, 1), "basic", (32, 64, 128), small=False),
}
