"""Two views of every image of a batch, and the presets of augmentations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fmicl_text.vision.augmentations import (
    Draw,
    Step,
    random_affine,
    random_blur,
    random_erase,
    random_flip,
    random_grayscale,
    random_jitter,
    random_noise,
    random_resized_crop,
    random_solarize,
    resize,
)


class ImageViews:
    """Makes two random, normalized views of each image of a batch.

    >>> views = ImageViews("cifar", size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    >>> views(torch.zeros(4, 3, 32, 32, dtype=torch.uint8)).shape
    torch.Size([4, 2, 3, 32, 32])

    Args:
        preset: Name of a preset in `VIEWS`.
        size: Height and width of the views.
        mean, std: Mean and standard deviation of the pixels in [0, 1], per channel.
        color: `exact` for torchvision's color jitter, `fast` for one matrix per image.
        channel_order: The channel of the image of each channel of the views, for models that take BGR. None keeps the
            order.

    Raises:
        ValueError: An unknown name, a size below 1, or a number of channels other than 1 and 3.
    """

    def __init__(
        self,
        preset: str,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        color: str = "exact",
        channel_order: Sequence[int] | None = None,
    ) -> None:
        if preset not in VIEWS:
            raise ValueError(f"preset must be one of {', '.join(VIEWS)}; got {preset!r}")
        if color not in ("exact", "fast"):
            raise ValueError(f"color must be exact or fast; got {color!r}")
        if size < 1:
            raise ValueError(f"size must be at least 1; got {size}")
        if len(mean) not in (1, 3) or len(std) != len(mean):
            raise ValueError(f"mean and std must have one or three values each; got {len(mean)} and {len(std)}")
        if channel_order is not None and sorted(channel_order) != list(range(len(mean))):
            raise ValueError(f"channel_order must be an order of {len(mean)} channels; got {channel_order}")
        self.preset, self.color = preset, color
        self.crop = CROPS[preset]
        self.steps = VIEWS[preset](color)
        self.size, self.mean, self.std = size, mean, std
        self.channel_order = None if channel_order is None else list(channel_order)

    def describe(self) -> dict[str, Any]:
        """Settings that are compared when training is resumed."""
        normalization = {"mean": list(self.mean), "std": list(self.std), "channel_order": self.channel_order}
        return {"views": self.preset, "color": self.color, **normalization}

    @torch.no_grad()
    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Views [B, 2, C, size, size] in float32.

        Args:
            images: Images [B, C, H, W], or two crops of each [B, 2, C, size, size], which are not cropped again; uint8
                or float in [0, 1].
            generator: A generator on the device of the images. None uses the global one.
        """
        cropped = images.ndim == 5
        originals = [as_pixels(part, len(self.mean)) for part in (images.unbind(1) if cropped else [images])]
        draw = Draw(images, generator)
        views = images.new_empty(len(images), 2, self.size, self.size, len(self.mean), dtype=torch.float32)
        # Autocast would compute the matrix products of the crop in bf16, with an error of 1/256 per pixel.
        with torch.autocast(images.device.type, enabled=False):
            for k, steps in enumerate(self.steps):
                view = originals[k % len(originals)]
                if self.crop is None:
                    view = resize(view, self.size)
                elif cropped:
                    view = random_flip(view, draw)
                else:
                    view = random_resized_crop(view, draw, self.size, self.crop)
                for step in steps:
                    view = step(view, draw)
                view = view if self.channel_order is None else view[:, self.channel_order]
                views[:, k] = normalize(view, self.mean, self.std).movedim(1, -1)
        return views.movedim(-1, -3)  # in the memory layout of `channels_last`


def as_pixels(images: Tensor, channels: int) -> Tensor:
    """Images as float32 in [0, 1], from uint8 or floats. Other integer types raise an error: their range is unknown."""
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8 or float in [0, 1], got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"images must be [B, {channels}, H, W], got {list(images.shape)}")
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean)/std, per channel."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def cifar_views(color: str) -> tuple[tuple[Step, ...], ...]:
    """Crop, flip, color jitter and grayscale (arXiv 2402.10150, appendix), with the strengths of MoCo v2 (arXiv
    2003.04297)."""
    steps: tuple[Step, ...] = (
        partial(random_jitter, strengths=(0.4, 0.4, 0.4, 0.1), probability=0.8, color=color),
        partial(random_grayscale, probability=0.2),
    )
    return steps, steps


def imagenet_views(color: str) -> tuple[tuple[Step, ...], ...]:
    """SimCLR (arXiv 2002.05709): like `cifar_views`, with stronger jitter and blur."""
    steps: tuple[Step, ...] = (
        partial(random_jitter, strengths=(0.8, 0.8, 0.8, 0.2), probability=0.8, color=color),
        partial(random_grayscale, probability=0.2),
        partial(random_blur, probability=0.5),
    )
    return steps, steps


def mocov3_views(color: str) -> tuple[tuple[Step, ...], ...]:
    """BYOL and MoCo v3 (arXiv 2104.02057): one view is always blurred, the other is sometimes solarized."""
    steps: tuple[Step, ...] = (
        partial(random_jitter, strengths=(0.4, 0.4, 0.2, 0.1), probability=0.8, color=color),
        partial(random_grayscale, probability=0.2),
    )
    first: Step = partial(random_blur, probability=1.0)
    second: tuple[Step, ...] = (partial(random_blur, probability=0.1), partial(random_solarize, probability=0.2))
    return (*steps, first), (*steps, *second)


def gray_views(color: str) -> tuple[tuple[Step, ...], ...]:
    """For handwritten characters: affine maps, jitter, noise and cutout; no flip, which would change the character."""
    steps: tuple[Step, ...] = (
        partial(random_affine, degrees=20, zoom=0.25, shear=0.2, shift=0.1),
        partial(random_jitter, strengths=(0.4, 0.4, 0.0, 0.0), probability=0.8, color=color),
        partial(random_noise, deviation=0.1),
        partial(random_erase, share=0.25),
    )
    return steps, steps


# Augmentations after the crop of each view, and the range of the crop's area as a fraction of the image.
VIEWS = {"cifar": cifar_views, "imagenet": imagenet_views, "mocov3": mocov3_views, "gray": gray_views}
CROPS: dict[str, tuple[float, float] | None] = {
    "cifar": (0.2, 1.0),
    "imagenet": (0.08, 1.0),
    "mocov3": (0.08, 1.0),
    "gray": None,
}
