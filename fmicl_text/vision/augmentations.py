"""Batched, on-device image augmentations with independent random parameters for every image.

Images are [B, C, H, W] in [0, 1], C = 1 or 3. The formulas are those of torchvision, whose transforms apply one set of
parameters to all images of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

LUMA_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601
# RGB to luma and two chroma axes, in which the fast hue shift is a rotation.
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


class Draw:
    """Independent random numbers for each of B images.

    Args:
        images: The batch, which determines B and the device.
        generator: A generator on that device. None uses the global one.
    """

    def __init__(self, images: Tensor, generator: torch.Generator | None) -> None:
        self.count, self.device, self.generator = len(images), images.device, generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """[B, *shape], uniform in [low, high)."""
        numbers = torch.rand(self.count, *shape, device=self.device, generator=self.generator)
        return low + (high - low) * numbers

    def chance(self, probability: float) -> Tensor:
        """[B], True with this probability."""
        return self.uniform(0, 1) < probability

    def normal(self, *shape: int) -> Tensor:
        """[B, *shape], standard normal."""
        return torch.randn(self.count, *shape, device=self.device, generator=self.generator)


Step = Callable[[Tensor, Draw], Tensor]


def crop_boxes(
    draw: Draw, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width of a random crop of each image, [B] each, integers.

    Like torchvision's RandomResizedCrop: the first of ten draws that fits, else the largest center crop with an aspect
    ratio in range."""
    area = height * width * draw.uniform(*scale, 10)
    aspect = draw.uniform(math.log(ratio[0]), math.log(ratio[1]), 10).exp()
    rows, columns = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (rows >= 1) & (rows <= height) & (columns >= 1) & (columns <= width)
    first = fits.float().argmax(1, keepdim=True)
    fallback_rows = min(height, round(width / ratio[0]))
    fallback_columns = min(width, round(height * ratio[1]))
    any_fits = fits.any(1)
    rows = torch.where(any_fits, rows.gather(1, first)[:, 0], fallback_rows)
    columns = torch.where(any_fits, columns.gather(1, first)[:, 0], fallback_columns)
    free_rows, free_columns = height - rows, width - columns
    top = torch.where(any_fits, (draw.uniform(0, 1) * (free_rows + 1)).floor(), (free_rows / 2).floor())
    left = torch.where(any_fits, (draw.uniform(0, 1) * (free_columns + 1)).floor(), (free_columns / 2).floor())
    return top, left, rows, columns


def resize_weights(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Weights [B, size, source] that resize the interval [start, start + length) of an axis to `size` pixels.

    The matrix form of bilinear `interpolate(antialias=True)` of the crop: triangular filters, widened to a target pixel
    when downscaling, and zero outside the interval."""
    scale = length / size
    center = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * scale[:, None]
    pixel = torch.arange(source, device=start.device) + 0.5
    support = scale.clamp_min(1)[:, None, None]
    weights = (1 - (pixel - center[..., None]).abs() / support).clamp_min(0)
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])
    weights = weights * inside[:, None]
    return weights / weights.sum(-1, keepdim=True)


def random_flip(images: Tensor, draw: Draw, probability: float = 0.5) -> Tensor:
    """Flip horizontally with the given probability."""
    return torch.where(draw.chance(probability)[:, None, None, None], images.flip(-1), images)


def random_resized_crop(images: Tensor, draw: Draw, size: int, scale: tuple[float, float], flip: float = 0.5) -> Tensor:
    """A random crop of each image, resized to [B, C, size, size] with antialiasing and randomly flipped."""
    top, left, rows, columns = crop_boxes(draw, images.shape[-2], images.shape[-1], scale)
    vertical = resize_weights(top, rows, images.shape[-2], size)
    horizontal = resize_weights(left, columns, images.shape[-1], size)
    horizontal = torch.where(draw.chance(flip)[:, None, None], horizontal.flip(1), horizontal)
    lines = vertical @ images.transpose(1, 2).flatten(2)  # [B, size, C W]; this layout avoids copies of the weights
    cropped = lines.unflatten(2, images.shape[1::2]).flatten(1, 2) @ horizontal.transpose(1, 2)
    return cropped.unflatten(1, (size, images.shape[1])).transpose(1, 2)


def grayscale(images: Tensor) -> Tensor:
    """Luma [B, 1, H, W] of RGB images."""
    return (images * images.new_tensor(LUMA_WEIGHTS)[:, None, None]).sum(1, keepdim=True)


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * images + (1 - factor) * other, clamped to [0, 1]; factor [B]."""
    return torch.lerp(other, images, factor[:, None, None, None]).clamp(0, 1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with black; factor [B] >= 0, where 1 leaves an image unchanged."""
    return (images * factor[:, None, None, None]).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean gray of each image; factor [B] >= 0."""
    gray = grayscale(images) if images.shape[1] == 3 else images
    return blend(images, gray.mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image in grayscale; factor [B] >= 0."""
    return blend(images, grayscale(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotate the HSV hue by a fraction of the circle; shift [B] in [-1/2, 1/2]."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    divisor = torch.where(chroma == 0, 1, chroma)
    saturation = chroma / torch.where(value == 0, 1, value)
    to_red, to_green, to_blue = ((value - channel) / divisor for channel in (red, green, blue))
    sector = torch.where(
        value == red, to_blue - to_green, torch.where(value == green, 2 + to_red - to_blue, 4 + to_green - to_red)
    )
    hue = (sector / 6 + shift[:, None, None]) % 1.0
    # Channel n of 5, 3, 1 is V - V S max(0, min(k, 4 - k, 1)), k = (n + 6 H) mod 6.
    k = (hue[:, None] * 6 + images.new_tensor([5.0, 3.0, 1.0])[:, None, None]) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def random_jitter(images: Tensor, draw: Draw, strengths: Sequence[float], probability: float, color: str) -> Tensor:
    """With the given probability, change brightness, contrast and saturation by factors in 1 ± strength and hue by a
    shift in ± strength, in a random order. `fast` applies them in a fixed order, as one matrix, and clamps once. For
    grayscale images, only brightness and contrast change."""
    ranges = [(max(0.0, 1 - strength), 1 + strength) for strength in strengths[:3]] + [(-strengths[3], strengths[3])]
    factors = [draw.uniform(*limits) for limits in ranges]
    chosen = draw.chance(probability)
    count = 4 if images.shape[1] == 3 else 2
    order = draw.uniform(0, 1, count).argsort(1)
    if color == "fast" and count == 4:
        return torch.where(chosen[:, None, None, None], jitter_by_matrix(images, *factors), images)
    jittered = images.clone()
    for place in range(count):
        for i, adjust in enumerate(ADJUSTMENTS[:count]):
            rows = (chosen & (order[:, place] == i)).nonzero()[:, 0]
            jittered[rows] = adjust(jittered[rows], factors[i][rows])
    return jittered


def jitter_by_matrix(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """The four changes as one affine map of each image's colors. Hue is a rotation of the chroma plane of YIQ, which
    preserves luma; it approximates the shift of the HSV hue."""
    to_yiq = images.new_tensor(YIQ)
    angle = -2 * math.pi * hue  # in the direction of increasing HSV hue
    turn = images.new_zeros(len(images), 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
    gray = images.new_tensor(LUMA_WEIGHTS).expand(3, 3)
    saturate = torch.lerp(gray, torch.eye(3, device=images.device), saturation[:, None, None])
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq @ saturate * (brightness * contrast)[:, None, None]
    mean_gray = images.mean((2, 3)) @ images.new_tensor(LUMA_WEIGHTS)
    offset = (1 - contrast) * brightness * mean_gray
    return torch.baddbmm(offset[:, None, None], matrix, images.flatten(2)).view_as(images).clamp(0, 1)


def random_grayscale(images: Tensor, draw: Draw, probability: float) -> Tensor:
    """Convert RGB images to grayscale with the given probability; images of one channel are unchanged."""
    if images.shape[1] == 1:
        return images
    return torch.where(draw.chance(probability)[:, None, None, None], grayscale(images), images)


def random_blur(images: Tensor, draw: Draw, probability: float, sigma: tuple[float, float] = (0.1, 2.0)) -> Tensor:
    """Blur images with the given probability; sigma in pixels, kernel size a tenth of the image, reflected borders."""
    size = images.shape[-1]
    reach = max(1, size // 20)
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    kernel = torch.softmax(-offsets.square() / (2 * draw.uniform(*sigma)[:, None].square()), dim=1)
    batch, channels = images.shape[:2]
    weight = kernel.repeat_interleave(channels, 0)[:, None]
    rows = functional.pad(images, (reach, reach, reach, reach), mode="reflect").flatten(0, 1)[None]
    rows = functional.conv2d(rows, weight[:, :, None, :], groups=batch * channels)
    blurred = functional.conv2d(rows, weight[:, :, :, None], groups=batch * channels)[0].view_as(images)
    return torch.where(draw.chance(probability)[:, None, None, None], blurred, images)


def random_solarize(images: Tensor, draw: Draw, probability: float) -> Tensor:
    """Invert values >= 1/2 with the given probability."""
    inverted = torch.where(images >= 0.5, 1 - images, images)
    return torch.where(draw.chance(probability)[:, None, None, None], inverted, images)


def random_affine(images: Tensor, draw: Draw, degrees: float, zoom: float, shear: float, shift: float) -> Tensor:
    """Random rotation, scale, shear and translation (a fraction of the width); borders are black."""
    angle = draw.uniform(-math.radians(degrees), math.radians(degrees))
    scale, slant = draw.uniform(1 - zoom, 1 + zoom), draw.uniform(-shear, shear)
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    rows = (cosine, slant * cosine - sine, 2 * draw.uniform(-shift, shift))
    columns = (sine, slant * sine + cosine, 2 * draw.uniform(-shift, shift))
    theta = torch.stack([torch.stack(rows, 1), torch.stack(columns, 1)], 1)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def random_noise(images: Tensor, draw: Draw, deviation: float) -> Tensor:
    """Add Gaussian noise of the given standard deviation and clamp to [0, 1]."""
    return (images + deviation * draw.normal(*images.shape[1:])).clamp(0, 1)


def random_erase(images: Tensor, draw: Draw, share: float) -> Tensor:
    """Cutout: one random black square, whose side is a fraction of the width."""
    width = images.shape[-1]
    side = max(1, round(share * width))
    corner = (draw.uniform(0, 1, 2) * (width - side + 1)).floor()
    along = torch.arange(width, device=images.device)
    inside = (along >= corner[..., None]) & (along < corner[..., None] + side)  # [B, 2, width]
    return images * ~(inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images to [B, C, size, size] with antialiasing, without cropping."""
    if images.shape[-2:] == (size, size):
        return images
    return functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
