"""Training images that are streamed: decoded and cropped while training, without a copy on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import partial
from itertools import count, cycle
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from datasets.distributed import split_dataset_by_node
from datasets.fingerprint import Hasher
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fmicl_text.errors import InputError
from fmicl_text.loading import translate_dataset_errors
from fmicl_text.vision.data import Crop, ImageSets, check_channels, check_counts, read_images, split_images, two_crops
from fmicl_text.vision.decoding import UnreadableImageError, read_encoded
from fmicl_text.vision.sets import ImageStream
from fmicl_text.vision.sources import STREAM_BUFFER, ImageSource, first_rows, stream_images

logger = logging.getLogger(__name__)

START = 10_000  # images at the start of a stream from which statistics and scores are computed
MOST_WORKERS = 1024


def load_image_stream(
    train_file: Any = None,
    dataset_name: str | os.PathLike[str] | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    test_file: Any = None,
    test_split: str | None = None,
    channels: int = 3,
    held_out: int | None = None,
    validation: int = 0,
    progress: bool = True,
) -> tuple[ImageStream, ImageSets]:
    """A stream of training images, and the images for statistics and scores.

    The latter are the first 10,000 images of the stream in a shuffled order (more, if `held_out` and `validation` are
    more than half of them), from which test and validation images are held out. They are stored in the cache of
    `datasets`. Of an official test set, at most this number is used.

    Args:
        train_file, dataset_name, dataset_config, dataset_split, image_column, label_column, test_file, test_split:
            See `sources.ImageSource`.
        channels, held_out, validation, progress: See `data.load_images`.

    Raises:
        InputError: An argument or the data is invalid.
    """
    check_channels(channels)
    check_counts(held_out, validation, None)
    source = ImageSource(
        train_file, dataset_name, dataset_config, dataset_split, image_column, label_column, test_file, test_split
    )
    streams = stream_images(source)
    official = {"test"} if test_file is not None or test_split is not None else set()
    found = first_rows(max(START, 2 * ((held_out or 0) + validation)), **streams, official=official)
    sets = {split: read_images(rows, channels, progress)[0] for split, rows in found.items()}
    return streams["train"], split_images(ImageSets(**sets), held_out, validation)


class StreamedRows(IterableDataset):
    """Iterable dataset for the trainer: without end, the inputs of `ImageViews` of a stream of images, two crops of
    each image, uint8 [2, C, size, size].

    The stream is shuffled in a buffer of 10,000 images, in each pass in another order. The crops are determined by
    seed, pass and image. Images that cannot be decoded are skipped. Each process reads its share of the stream.

    Args:
        stream: The images.
        excluded: Image sets of which the test and validation images are not trained on.
        channels: 1 for grayscale, 3 for RGB.
        size, crop: Settings of the views; see `data.two_crops`.
        seed: Seed of the order and of the crops.
        batch_size: Batch size per process.
        max_train_samples: Use only the first images of the stream, without those that are excluded.

    Raises:
        InputError: While it is read, if the stream cannot be read, or no image of a pass can be trained on.
    """

    def __init__(
        self,
        stream: ImageStream,
        excluded: ImageSets | None,
        channels: int,
        size: int,
        crop: Crop,
        seed: int,
        batch_size: int,
        max_train_samples: int | None = None,
    ) -> None:
        parts = [] if excluded is None else [excluded.test, excluded.validation]
        hashes = [part.hashes for part in parts if part is not None]
        self.excluded = np.unique(np.concatenate([*hashes, np.zeros(0, np.uint64)]))
        self.source, self.folders, self.content = stream.source, stream.folders, stream.fingerprint
        self.channels, self.size, self.crop, self.seed, self.batch_size = channels, size, crop, seed, batch_size
        self.max_train_samples = max_train_samples
        rows = stream.rows.select_columns(["image"])
        if max_train_samples is not None:
            if len(self.excluded):
                rows = rows.filter(partial(is_used, excluded=self.excluded, folders=self.folders))
            rows = rows.take(max_train_samples)
        is_distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if is_distributed else (0, 1)
        self.stream = split_dataset_by_node(rows, self.rank, self.world_size) if self.world_size > 1 else rows
        # Of each worker, which has a copy of this object: the number of images that could not be decoded, and whether
        # it has no images to train on.
        self.unreadable = torch.zeros(MOST_WORKERS, dtype=torch.long).share_memory_()
        self.has_none = torch.zeros(MOST_WORKERS, dtype=torch.bool).share_memory_()

    @property
    def num_skipped(self) -> int:
        """Number of images that could not be decoded, in all workers and passes of this process."""
        return int(self.unreadable.sum())

    def fingerprint(self) -> str | None:
        """A hash of the content and order of the rows; None if unknown."""
        if self.content is None:
            return None
        settings = [self.channels, self.size, self.crop, self.seed, self.max_train_samples]
        return str(Hasher.hash([self.content, self.excluded.tobytes(), *settings]))

    def __iter__(self) -> Iterator[Tensor | None]:
        images = self.images()
        if self.world_size == 1:
            yield from images
            return
        # accelerate takes `batch_size` rows for each process in turn. Those of other processes are not decoded here.
        for process in cycle(range(self.world_size)):
            for _ in range(self.batch_size):
                if process != self.rank:
                    yield None
                elif (image := next(images, None)) is not None:
                    yield image
                else:
                    return

    def images(self) -> Iterator[Tensor]:
        """The rows of this process and worker."""
        worker = get_worker_info()
        number, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        buffer_size = max(STREAM_BUFFER // min(num_workers, self.stream.num_shards), 1)
        shuffled = self.stream.shuffle(seed=self.seed, buffer_size=buffer_size)
        self.has_none[number] = False
        for epoch in count():
            shuffled.set_epoch(epoch)
            num_used, reason = 0, "its images are held out"
            for encoded in self.encoded(shuffled):
                try:
                    if (crops := self.crops(encoded, epoch)) is not None:
                        num_used += 1
                        yield crops
                except UnreadableImageError as error:
                    if not int(self.unreadable[number]):
                        logger.warning("%s: images that cannot be read are skipped, such as %s", self.source, error)
                    self.unreadable[number] += 1
                    reason = str(error)
            if not num_used:
                self.has_none[number] = True
                if self.has_none[:num_workers].all():
                    raise InputError(f"{self.source}: no image can be trained on: {reason}")
                return  # the other workers have images

    def crops(self, encoded: Any, epoch: int) -> Tensor | None:
        """Two crops of an image; None for an image that is not trained on."""
        content = read_encoded(encoded, self.folders)
        number = xxhash.xxh3_64_intdigest(content)
        if contains(self.excluded, number):
            return None
        image = {"bytes": content, "path": encoded.get("path")}
        return two_crops(image, self.channels, self.folders, self.size, self.crop, (self.seed, epoch, number))

    def encoded(self, rows: Any) -> Iterator[Any]:
        """The encoded images of one pass."""
        encoded = iter(rows)
        while True:
            with translate_dataset_errors(self.explain):
                row = next(encoded, None)
            if row is None:
                return
            yield row["image"]

    def explain(self, error: BaseException) -> str:
        """The message for an error of the stream."""
        return f"{self.source} cannot be read: {type(error).__name__}: {error}"


def contains(hashes: np.ndarray, number: int) -> bool:
    """Whether a number is among sorted hashes, uint64 [N]."""
    place = int(np.searchsorted(hashes, np.uint64(number)))
    return place < len(hashes) and int(hashes[place]) == number


def is_used(row: Any, excluded: np.ndarray, folders: tuple[str, ...]) -> bool:
    """Whether the image of a row is not excluded. One that cannot be read is reported later."""
    try:
        return not contains(excluded, xxhash.xxh3_64_intdigest(read_encoded(row["image"], folders)))
    except UnreadableImageError:
        return True
