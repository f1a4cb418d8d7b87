"""What a model's image processor does to pictures: one function for training, evaluation and the saved encoder."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from fmicl_text.errors import InputError
from fmicl_text.loading import loading_error_message, quiet_loading, resolve_model_path

logger = logging.getLogger(__name__)

# Width and height of the pictures on which a processor is tried. Some cut large pictures into several images.
SHAPES = ((97, 97), (1000, 1000), (1600, 500), (500, 1600))
SIZES = ("size", "crop_size", "pad_size")  # settings of a processor
LARGEST = 8192  # pixels; a larger size is an error in a file, and would need more memory than there is
LEFT, RIGHT = (51, 102, 204), (230, 140, 20)  # two colors by which the affine map is checked


class Preprocessing:
    """The pixels that a model receives: pictures through its image processor.

    >>> preprocessing = new_preprocessing(32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    >>> preprocessing([Image.new("RGB", (50, 40), "white")])[0, :, 0, 0]
    tensor([2., 2., 2.])

    Random views are not made by the processor. They are square images of the same size, normalized by the same affine
    map, which is measured on pictures of one color: whatever the processor does (rescale, offset, normalize, exchange
    channels), y[c] = (x[channel_order[c]] - mean[c]) / std[c] for pixels x in [0, 1].

    Args:
        processor: An image processor of transformers.
        channels: Number of channels of the model's input, 1 or 3.

    Raises:
        ValueError: Its output for square pictures is not an image [1, channels, size, size] of one size.
        InputError: Its output is not an affine map of the pixels.

    Attributes:
        size: Height and width of the output of square pictures.
        mean, std: Mean and standard deviation of each channel of the output, for pixels in [0, 1].
        channel_order: The channel of the picture of each channel of the output; None if they are the same.
    """

    def __init__(self, processor: Any, channels: int) -> None:
        self.processor, self.channels = processor, channels
        size = square_size(processor, channels)
        if size is None:
            raise ValueError(f"the output of {type(processor).__name__} for square pictures is not one square")
        self.size = size
        self.mean, self.std, self.channel_order = affine_map(processor, channels, size)

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor | list[Tensor]:
        """The input of the model: float32 [B, C, size, size].

        Args:
            pictures: Pictures in mode RGB, or L for one channel.

        Returns:
            A list of [C, H, W] if the shapes differ, because the processor keeps the shape of pictures.
        """
        outputs = [output_of(self.processor, self.channels, picture) for picture in pictures]
        same = len({output.shape for output in outputs}) == 1
        return torch.stack(outputs) if same else outputs


def output_of(processor: Any, channels: int, picture: Image.Image) -> Tensor:
    """The output [C, H, W] of a processor for one picture; alone, because some processors pad the pictures of a batch.

    Raises:
        ValueError: It is not an image of this number of channels.
    """
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[:2] != (1, channels):
        shape = list(getattr(pixels, "shape", []))
        raise ValueError(f"{type(processor).__name__} gives {shape} instead of [1, {channels}, H, W]")
    return pixels[0].float()


def plain_picture(color: Sequence[int], width: int, height: int | None = None) -> Image.Image:
    """A picture of one color, in mode RGB or L; square without a height."""
    mode, value = ("RGB", tuple(color)) if len(color) == 3 else ("L", color[0])
    return Image.new(mode, (width, height or width), value)


def square_size(processor: Any, channels: int) -> int | None:
    """Height and width of the output of a processor for square pictures; None if it is not a square, or depends on the
    size of the picture.

    Raises:
        ValueError: The output for a square, wide or tall picture is not an image of this number of channels.
    """
    outputs = [output_of(processor, channels, plain_picture((128,) * channels, *shape)) for shape in SHAPES]
    sides = {side for output in outputs[:2] for side in output.shape[1:]}
    return sides.pop() if len(sides) == 1 else None


def affine_map(
    processor: Any, channels: int, size: int
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...] | None]:
    """Mean, standard deviation and order of the channels of a processor's output, see `Preprocessing`.

    Raises:
        InputError: The output is not an affine map of the pixels.
    """

    def center(color: Sequence[int]) -> Tensor:
        return output_of(processor, channels, plain_picture(color, size))[:, size // 2, size // 2].double()

    black = center((0,) * channels)
    # Column k is the change of the output from black to the full channel k.
    matrix = torch.stack([center(full) - black for full in (255 * torch.eye(channels, dtype=torch.int64)).tolist()], 1)
    order = matrix.abs().argmax(1)
    slope = matrix.gather(1, order[:, None])[:, 0]

    left, right = LEFT[:channels], (RIGHT if size > 1 else LEFT)[:channels]
    picture = plain_picture(right, size)
    picture.paste(plain_picture(left, size), (-(size // 2), 0))
    row = output_of(processor, channels, picture)[:, size // 2].double()
    expected = [black + matrix @ torch.tensor(color, dtype=torch.float64) / 255 for color in (left, right)]
    difference = row[:, [size // 8, -1 - size // 8]] - torch.stack(expected, 1)
    unmixed = (matrix.abs() > slope.abs()[:, None] / 1000).sum(1).eq(1).all()
    if not (unmixed and slope.gt(0).all() and difference.abs().le(slope[:, None] / 100).all()):
        raise InputError(
            f"the output of {type(processor).__name__} is not (x - mean)/std for pixels x, which random views require"
        )
    channel_order = None if order.tolist() == list(range(channels)) else tuple(order.tolist())
    return tidy(-black / slope), tidy(1 / slope), channel_order


def tidy(values: Tensor) -> tuple[float, ...]:
    """Numbers of six digits, without the rounding errors of float32: 0.485 instead of 0.48499998."""
    return tuple(0.0 if abs(value) < 1e-6 else float(f"{value:.6g}") for value in values.tolist())


def open_preprocessing(
    model_name_or_path: str, channels: int, image_size: int | None = None, revision: str | None = None
) -> Preprocessing | None:
    """The preprocessing of a model in a folder or on the Hub, by its own image processor.

    Args:
        model_name_or_path: Folder or Hub name.
        channels: Number of channels of the model's input, 1 or 3.
        image_size: Height and width of the model's input. None takes the processor's own. If it differs, the sizes of
            resize and crop are scaled in proportion; if the processor does not resize, or not to a square, the shorter
            side is resized to `image_size` and the center is cropped.
        revision: Branch, tag or commit on the Hub.

    Returns:
        None if the model has no image processor, one of custom code, which is not run, or one whose output is not an
        image of this number of channels. A warning in the log gives the reason.

    Raises:
        InputError: The processor has no size of its own, cannot be set to `image_size`, or is not an affine map of the
            pixels.
    """
    source = f"model_name_or_path={model_name_or_path}"
    check_size(image_size or 1)
    try:
        with quiet_loading():
            processor = AutoImageProcessor.from_pretrained(
                resolve_model_path(model_name_or_path), revision=revision, trust_remote_code=False
            )
            settings = processor.to_dict() | {"do_convert_rgb": channels == 3}
            settings.pop("auto_map", None)  # the code is not saved with the encoder
            if (largest := largest_side(settings)) > LARGEST:
                raise ValueError(f"its size is {largest} pixels, more than {LARGEST}")
            own = square_size(open_settings(settings), channels)
    except InputError:
        raise
    except Exception as error:  # of any type, for an invalid preprocessor_config.json
        message = loading_error_message(error).partition(" Should have a ")[0]  # followed by the names of all models
        reason = f"its image processor is not used: {message}"
        if "trust_remote_code" in str(error):
            reason = "its image processor is custom Python code, which is not run"
        elif "Can't load image processor" in str(error):
            reason = "no image processor was found (preprocessor_config.json)"
        logger.warning("%s: %s", model_name_or_path, reason)
        return None
    if image_size is None and own is None:
        raise InputError(f"{source}: its image processor {type(processor).__name__} has no square size; set image_size")
    try:
        for changes in [{}] if image_size in (None, own) else sizes(settings, own, int(image_size or 0)):
            try:
                preprocessing = Preprocessing(open_settings(settings | changes), channels)
            except InputError:
                raise
            except Exception:  # of any type, for a size that this processor does not accept
                continue
            if preprocessing.size == (image_size or own):
                return preprocessing
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    raise InputError(f"image_size={image_size}: {type(processor).__name__} of {model_name_or_path} does not accept it")


def check_size(image_size: int) -> None:
    """Raise `InputError` for an image size that is out of range."""
    if not 1 <= image_size <= LARGEST:
        raise InputError(f"image_size={image_size} must be from 1 to {LARGEST}")


def largest_side(settings: dict[str, Any]) -> float:
    """The largest side to which a processor's settings resize, crop or pad; 0 if they name none."""
    named = [settings[name] for name in SIZES if isinstance(settings.get(name), dict)]
    sides = [size.get(side) for size in named for side in ("height", "width", "shortest_edge")]
    sides += [size.get("longest_edge") for size in named if not size.get("shortest_edge")]  # else a limit, if at all
    return max((side for side in sides if isinstance(side, int | float)), default=0)


def sizes(settings: dict[str, Any], own: int | None, image_size: int) -> Iterator[dict[str, Any]]:
    """Settings that may give a processor another size, from the closest to its own on."""
    square = {"height": image_size, "width": image_size}
    names = [name for name in SIZES if isinstance(settings.get(name), dict)]
    if own is not None:
        yield {
            name: {key: value and max(1, round(value * image_size / own)) for key, value in settings[name].items()}
            for name in names
        }
    yield {"do_resize": True, "size": {"shortest_edge": image_size}, "do_center_crop": True, "crop_size": square}
    yield {"do_resize": True, "size": square, "do_center_crop": False}


def new_preprocessing(size: int, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
    """The preprocessing of a model that is trained from scratch: the shorter side is resized to `size` and the center
    is cropped, by an image processor that every version of transformers has.

    Args:
        size: Height and width of the model's input.
        mean, std: Mean and standard deviation of the pixels in [0, 1]; one value per channel, of which there are 1 or
            3.

    Raises:
        InputError: The size is out of range.
    """
    check_size(size)
    settings = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": len(mean) == 3,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": int(Image.Resampling.BILINEAR),
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    return Preprocessing(open_settings(settings), len(mean))


def open_settings(settings: dict[str, Any]) -> Any:
    """The image processor of these settings, opened like a saved one: with the backend that a user gets."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings))
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
