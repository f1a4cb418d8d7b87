"""Features of images. Pictures are decoded and preprocessed in threads, ahead of the encoder."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fmicl_text.vision.data import Images
from fmicl_text.vision.preprocessing import Preprocessing
from fmicl_text.vision.scan import num_threads
from fmicl_text.vision.views import ImageViews

PART = 16  # rows per task of a thread
VIEW_BLOCK = 64  # images whose random views are drawn together
T = TypeVar("T")


def encode_images(
    encoder: nn.Module, images: Images, preprocessing: Preprocessing, batch_size: int = 512, progress: bool = True
) -> Tensor:
    """Features [N, D] of N >= 1 images, in their order, in float32 on the CPU.

    Args:
        encoder: Maps pixel values [B, C, H, W] to features [B, D]. It runs in evaluation mode and is then returned to
            its previous mode.
        images: The images.
        preprocessing: What the encoder receives of a picture; see `open_preprocessing`.
        batch_size: Images per forward pass.
        progress: Show a progress bar, removed at the end.
    """
    blocks = encode_blocks(encoder, images, torch.arange(len(images)), preprocessing, batch_size, progress)
    return torch.cat([features for _, features in blocks])


def encode_blocks(
    encoder: nn.Module,
    images: Images,
    rows: Tensor,
    preprocessing: Preprocessing,
    batch_size: int = 512,
    progress: bool = True,
    draft: int | None = None,
    kept: dict[Any, Any] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (rows [B], features [B, D]) of the given rows of the images, as `encode_images`.

    Args:
        encoder, images, preprocessing, batch_size, progress: As in `encode_images`.
        rows: Row numbers.
        draft: Decode JPEG files at a reduced size of at least this many pixels; see `Images.pictures`.
        kept: A dictionary in which the preprocessed images are kept for later calls with the same rows.
    """

    device, batches = device_of(encoder), batches_of(rows, batch_size)

    def prepare(part: Tensor) -> Tensor | list[Tensor]:
        key = (id(images), *part.tolist())
        if kept is not None and key in kept:
            return kept[key]
        values = preprocessing([images.pictures([row], draft)[0] for row in part.tolist()])
        if kept is not None:
            kept[key] = values
        return values

    with evaluation_mode(encoder), closing(read_ahead(prepare, batches, progress)) as prepared:
        for batch, parts in zip(batches, prepared, strict=True):
            yield batch, embed(encoder, parts, device)


def encode_views(
    encoder: nn.Module, images: Images, rows: Tensor, views: ImageViews, progress: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (rows [B], features [B, 2, D]) of two random views of the given rows, always the same views.

    They are drawn for blocks of `VIEW_BLOCK` images, with a seed that is the first row. To get the same views of an
    image, pass complete blocks of the rows."""
    device, batches = device_of(encoder), batches_of(rows, VIEW_BLOCK)

    def prepare(part: Tensor) -> Tensor:
        return torch.cat([images.for_views([row], views.size, views.crop, (0,)) for row in part.tolist()])

    with evaluation_mode(encoder), closing(read_ahead(prepare, batches, progress)) as prepared:
        for batch, parts in zip(batches, prepared, strict=True):
            generator = torch.Generator(device).manual_seed(int(batch[0]))
            pairs = views(torch.cat(parts).to(device), generator)
            yield batch, embed(encoder, [pairs.flatten(0, 1)], device).unflatten(0, (-1, 2))


def batches_of(rows: Tensor, size: int) -> list[Tensor]:
    """Rows in batches of a size; an empty list for no rows."""
    return list(rows.split(size)) if len(rows) else []


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Within this context, the module is in evaluation mode."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def device_of(encoder: nn.Module) -> torch.device:
    """The device of a module's parameters; the CPU if it has none."""
    return next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))


@torch.no_grad()
def embed(encoder: nn.Module, parts: list[Tensor | list[Tensor]], device: torch.device) -> Tensor:
    """Features [B, D] of pixel values that are given in parts; images of different shapes are encoded by shape."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts) and len({part.shape[1:] for part in tensors}) == 1:
        return encoder(torch.cat(tensors).to(device)).float().cpu()
    pixels = [image for part in parts for image in part]
    features: list[Tensor] = [torch.empty(0)] * len(pixels)
    for shape in {image.shape for image in pixels}:
        places = [i for i, image in enumerate(pixels) if image.shape == shape]
        encoded = encoder(torch.stack([pixels[i] for i in places]).to(device)).float().cpu()
        for i, row in zip(places, encoded, strict=True):
            features[i] = row
    return torch.stack(features)


def read_ahead(function: Callable[[Tensor], T], batches: Sequence[Tensor], progress: bool) -> Generator[list[T]]:
    """For every batch of rows, function of each `PART` rows, computed in threads while the caller uses the batch
    before. The processes of a machine share its cores."""
    waiting: deque[list[Future[T]]] = deque()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine, set by launchers
    threads = ThreadPoolExecutor(max(1, num_threads() // processes))
    try:
        for batch in tqdm(batches, desc="encode", leave=False, disable=not progress):
            waiting.append([threads.submit(function, part) for part in batch.split(PART)])
            if len(waiting) > 1:
                yield [future.result() for future in waiting.popleft()]
        if waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        threads.shutdown(cancel_futures=True)
