"""Images with or without classes, their split into training and held-out images, and the rows of the trainer."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import xxhash
from datasets.fingerprint import Hasher
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fmicl_text.errors import InputError
from fmicl_text.vision.augmentations import Draw, crop_boxes
from fmicl_text.vision.decoding import (
    image_name,
    open_image,
    opened,
    orientation,
    read_encoded,
    to_picture,
    upright_size,
)
from fmicl_text.vision.scan import num_threads, scan_images
from fmicl_text.vision.sources import ImageRows, ImageSource, find_images

logger = logging.getLogger(__name__)

LARGEST, MOST_BYTES = 96, 2**31  # pixels per side, bytes; larger images are not kept in memory
HELD_OUT = 5000  # held-out images by default, but at most a fifth
SECOND_KEY = np.uint64(0x9E3779B97F4A7C15)  # odd; the order of its multiples modulo 2^64 is unrelated to that of hashes
SAMPLE, SAMPLE_SIZE = 1000, 64  # images, and pixels per side, from which mean and deviation of image files are computed
Crop = tuple[float, float] | None  # range of a random crop's area as a fraction of the image; None: no crop


@dataclass(frozen=True)
class Images:
    """N images, in memory or in files that are decoded when they are needed.

    Args:
        labels: int64 [N], index into `classes`; -1 for an image without a class.
        classes: Names of the classes; () if there are none.
        channels: 1 for grayscale, 3 for RGB.
        source: File, folder or dataset of the images.
        hashes: A hash of each encoded image, uint64 [N].
        skipped: Names of the images that could not be read, with reasons.
        pixels: Images of one size in memory, uint8 [N, C, H, W]; None for files.
        rows: Dataset with the column `image` of encoded images.
        index: Row of each image in `rows`, int64 [N].
        folders: Folders from which image files may be read.
    """

    labels: Tensor
    classes: tuple[str, ...]
    channels: int
    source: str
    hashes: np.ndarray
    skipped: tuple[str, ...] = ()
    pixels: Tensor | None = None
    rows: Any = None
    index: np.ndarray | None = None
    folders: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: slice | Sequence[int] | np.ndarray) -> Images:
        """The given images: a slice, positions or a mask."""
        rows = rows if isinstance(rows, slice) or len(rows) else slice(0)
        chosen = np.arange(len(self))[rows if isinstance(rows, slice) else np.asarray(rows)]
        if len(chosen) == len(self) and (np.diff(chosen) == 1).all():
            return self  # without a copy of the pixels
        return replace(
            self,
            labels=self.labels[torch.from_numpy(chosen)],
            hashes=self.hashes[chosen],
            pixels=None if self.pixels is None else self.pixels[torch.from_numpy(chosen)],
            index=None if self.index is None else self.index[chosen],
        )

    def pictures(self, rows: Sequence[int], draft: int | None = None) -> list[Image.Image]:
        """The given images, of mode L or RGB; see `decoding.open_image` for `draft`. Files are decoded in parallel."""
        if self.pixels is not None:
            arrays = self.pixels[torch.as_tensor(rows)].movedim(1, -1).numpy()
            return [Image.fromarray(array[..., 0] if self.channels == 1 else array) for array in arrays]
        return self._decode(rows, lambda encoded, _: open_image(encoded, self.channels, self.folders, draft))

    def for_views(self, rows: Sequence[int], size: int, crop: Crop, seed: tuple[int, ...]) -> Tensor:
        """Input of `views.ImageViews` for the given rows: pixels in memory, uint8 [B, C, H, W], not yet cropped; two
        random crops of each file, uint8 [B, 2, C, size, size]. They are determined by the seed and by the image, not
        by its row."""
        if self.pixels is not None:
            return self.pixels[torch.as_tensor(rows)]
        crops = partial(two_crops, channels=self.channels, folders=self.folders, size=size, crop=crop)
        return torch.stack(self._decode(rows, lambda encoded, number: crops(encoded, seed=(*seed, number))))

    def _decode(self, rows: Sequence[int], function: Callable[[dict[str, Any], int], Any]) -> list[Any]:
        """function(encoded image, hash) of the given rows, in threads."""
        numbers = np.asarray(rows, np.int64)
        assert self.index is not None
        encoded, hashes = self.rows[self.index[numbers]]["image"], self.hashes[numbers].tolist()
        if len(numbers) < 2:
            return list(map(function, encoded, hashes))
        size = math.ceil(len(numbers) / (4 * num_threads()))  # for each task; one per image would cost as much as it
        parts = [slice(start, start + size) for start in range(0, len(numbers), size)]
        with ThreadPoolExecutor(num_threads()) as threads:
            return list(chain(*threads.map(lambda part: list(map(function, encoded[part], hashes[part])), parts)))

    def fingerprint(self) -> str:
        """A hash of the encoded images, their order and their labels."""
        return str(Hasher.hash([self.labels.numpy().tobytes(), self.channels, self.hashes.tobytes()]))

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the pixels in [0, 1], per channel.

        Of files, the pixels are those of center crops of 64 x 64 pixels of the first 1,000 images, which in the order
        of `load_images` are a random sample.
        """

        def sample(encoded: dict[str, Any], _: int) -> Tensor:
            return center_crop(open_image(encoded, self.channels, self.folders, SAMPLE_SIZE), SAMPLE_SIZE)

        counts = np.zeros((self.channels, 256), np.int64)
        total = len(self) if self.pixels is not None else min(SAMPLE, len(self))
        for start in range(0, total, 256):
            rows = range(start, min(start + 256, total))
            if self.pixels is not None:
                pixels = self.pixels[rows.start : rows.stop]
            else:
                pixels = torch.stack(self._decode(rows, sample))
            for channel, values in zip(counts, pixels.numpy().swapaxes(0, 1), strict=True):
                channel += np.bincount(values.ravel(), minlength=256)
        return mean_and_std(counts)


@dataclass(frozen=True)
class ImageSets:
    """Images for training, for the scores and for the selection of a checkpoint; None if there are none."""

    train: Images
    test: Images | None = None
    validation: Images | None = None


def mean_and_std(counts: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels in [0, 1].

    Args:
        counts: Number of pixels of each of the 256 values, int64 [C, 256].

    Returns:
        The mean, and the standard deviation. A standard deviation below 1/255, the distance of two values, is replaced
        by 1, as for constant features in scikit-learn: dividing by it would only amplify noise.
    """
    means, deviations = [], []
    for channel in counts.tolist():  # exact integers
        total = sum(channel)
        first = sum(value * count for value, count in enumerate(channel))
        second = sum(value**2 * count for value, count in enumerate(channel))
        variance = (second * total - first**2) / (total * max(total - 1, 1))
        means.append(first / total / 255)
        deviations.append(variance**0.5 / 255 if variance >= 1 else 1.0)
    return tuple(means), tuple(deviations)


def check_channels(channels: int) -> None:
    """Raise `InputError` for a number of channels that images cannot be converted to."""
    if channels not in (1, 3):
        raise InputError(f"the model takes images of {channels} channels; supported are 1 (grayscale) and 3 (RGB)")


def load_images(
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
    max_train_samples: int | None = None,
    progress: bool = True,
) -> ImageSets:
    """Load images for training and evaluation. All are checked; those that cannot be decoded are skipped.

    The images are in a pseudo-random order that depends only on their content: a folder and a parquet file of the same
    images give the same rows, the same held-out images and the same statistics. Images of one size, at most 96
    pixels, are kept in memory.

    Args:
        train_file, dataset_name, dataset_config, dataset_split, image_column, label_column, test_file, test_split:
            See `sources.ImageSource`.
        channels: Convert all images to grayscale (1) or RGB (3).
        held_out: Number of images, stratified by class, that are held out as test images. By default 5,000, but at
            most a fifth. It does not apply to sources with test images.
        validation: Number of further images that are held out as validation images.
        max_train_samples: Train on this number of the other images, a random sample.
        progress: Show a progress bar.

    Raises:
        InputError: An argument or the data is invalid.
    """
    check_channels(channels)
    check_counts(held_out, validation, max_train_samples)
    source = ImageSource(
        train_file, dataset_name, dataset_config, dataset_split, image_column, label_column, test_file, test_split
    )
    sets, is_small = {}, {}
    for name, rows in find_images(source).items():
        sets[name], is_small[name] = read_images(rows, channels, progress)
    split = split_images(ImageSets(**sets), held_out, validation, max_train_samples)

    def loaded(name: str, images: Images) -> Images:
        return in_memory(images) if is_small.get(name, is_small["train"]) else images

    return ImageSets(
        loaded("train", split.train),
        split.test and loaded("test", split.test),
        split.validation and loaded("validation", split.validation),
    )


def load_digits(
    channels: int = 3, held_out: int | None = 360, validation: int = 0, max_train_samples: int | None = None
) -> ImageSets:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels; see `load_images`."""
    from sklearn.datasets import load_digits as load

    check_channels(channels)
    check_counts(held_out, validation, max_train_samples)
    digits = load()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)[:, None].repeat(channels, axis=1)
    hashes = np.array([xxhash.xxh3_64_intdigest(image[0].tobytes()) for image in pixels], np.uint64)
    labels = torch.from_numpy(digits.target).long()
    classes = tuple(str(name) for name in digits.target_names)
    images = Images(labels, classes, channels, "scikit-learn's digits", hashes, pixels=torch.from_numpy(pixels))
    return split_images(ImageSets(in_order(images)), held_out, validation, max_train_samples)


def read_images(found: ImageRows, channels: int, progress: bool = True) -> tuple[Images, bool]:
    """The images that can be decoded, in an order that depends only on their content, and whether they are of one size
    and small enough to be kept in memory.

    Raises:
        InputError: None can be decoded.
    """
    scan = scan_images(found, progress)
    names = {i: image_name(found.rows[i]["image"], found.folders, f"row {i + 1}") for i in scan.reasons}
    skipped = tuple(f"{name}: {scan.reasons[i]}" for i, name in names.items())
    index = np.setdiff1d(np.arange(len(scan.hashes)), list(scan.reasons))
    if not len(index):
        first = f"; {skipped[0]}" if skipped else ""
        raise InputError(f"{found.source}: none of {len(scan.hashes)} images can be read{first}")
    labels, hashes = torch.from_numpy(found.labels[index]).long(), scan.hashes[index]
    images = Images(
        labels, found.classes, channels, found.source, hashes, skipped, None, found.rows, index, found.folders
    )
    sizes = scan.sizes[index]
    num_bytes = len(index) * channels * int(sizes[0].prod(dtype=np.int64))
    is_small = sizes.max() <= LARGEST and num_bytes <= MOST_BYTES and (sizes == sizes[0]).all()
    return in_order(images), bool(is_small)


def in_memory(images: Images) -> Images:
    """The same images, of one size, decoded."""
    (first,) = images.pictures([0])
    pixels = torch.empty(len(images), images.channels, first.height, first.width, dtype=torch.uint8)
    for rows in torch.arange(len(images)).split(1024):
        pixels[rows] = torch.stack([to_tensor(picture) for picture in images.pictures(rows.tolist())])
    return replace(images, pixels=pixels, rows=None, index=None, folders=())


def in_order(images: Images) -> Images:
    """The images, sorted by their hashes: a pseudo-random order that depends only on their content."""
    return images.take(np.lexsort((images.labels.numpy(), images.hashes)))


# ---- training and held-out images


def check_counts(held_out: int | None, validation: int, max_train_samples: int | None) -> None:
    """Raise `InputError` for a number of images that is out of range for any data."""
    for name, value, least in (
        ("held_out", held_out, 0),
        ("validation", validation, 0),
        ("max_train_samples", max_train_samples, 1),
    ):
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")


def split_images(
    sets: ImageSets, held_out: int | None = None, validation: int = 0, max_train_samples: int | None = None
) -> ImageSets:
    """Hold out test and validation images, unless the source itself has such images; see `load_images`.

    Raises:
        InputError: There are too few images, or the source has images of this kind.
    """
    train, test, validation_images = sets.train, sets.test, sets.validation
    for argument, value, kind, official in (
        ("held_out", held_out, "test", test),
        ("validation", validation, "validation", validation_images),
    ):
        if value and official is not None:
            given = f"{argument}={value} does not apply to {train.source}"
            raise InputError(f"{given}, which has {len(official)} {kind} images of its own")
    sizes = train.labels[train.labels >= 0].bincount()
    if train.classes and ((sizes > 0).sum() < 2 or sizes.max() < 2):
        reason = "all images are of one class" if len(sizes.nonzero()) < 2 else "every class has only one image"
        logger.warning("%s: %s; the classes are not used", train.source, reason)
        train = without_classes(train)
        test, validation_images = (part and without_classes(part) for part in (test, validation_images))
    if test is None:
        train, test = hold_out(train, held_out, "held_out")
    elif copies := int(np.isin(train.hashes, test.hashes).sum()):
        logger.warning("%s: %d training images are also in the test set", train.source, copies)
    if validation_images is None:
        train, validation_images = hold_out(train, validation, "validation")
    return ImageSets(train.take(slice(0, max_train_samples)), test, validation_images)


def without_classes(images: Images) -> Images:
    """The same images without classes."""
    return replace(images, classes=(), labels=torch.full_like(images.labels, -1))


def hold_out(images: Images, count: int | None, argument: str) -> tuple[Images, Images | None]:
    """The remaining images, and `count` images, of which each class has its share; None for 0.

    They are chosen by a second pseudo-random number of their content. Images without a class are not held out if others
    have one. Copies of a held-out image are in neither part.

    Raises:
        InputError: There are too few images.
    """
    labels, hashes = images.labels.numpy(), images.hashes
    candidates = np.flatnonzero(labels >= 0) if images.classes else np.arange(len(images))
    distinct = candidates[np.unique(hashes[candidates], return_index=True)[1]]
    copies_apart = most_held_out(labels[distinct]) > 0
    if copies_apart:
        candidates = distinct
    most = most_held_out(labels[candidates])
    count = min(HELD_OUT, len(candidates) // 5, most) if count is None else count
    if count > most:
        kind = "distinct image" if copies_apart else "image"
        each = " of each class" if images.classes else ""
        limit = f"{argument} must be at most {most} for {images.source}"
        raise InputError(f"{limit}, so that one {kind}{each} is trained on; got {count}")
    if not count:
        return images, None
    candidates = candidates[np.argsort(hashes[candidates] * SECOND_KEY, kind="stable")]
    chosen = np.sort(candidates[stratified(labels[candidates], count)])
    stays = np.ones(len(images), bool)
    stays[chosen] = False
    if copies_apart:
        stays &= ~np.isin(hashes, hashes[chosen])
        if removed := len(images) - stays.sum() - count:
            logger.warning("%s: %s copies of held-out images are not trained on", images.source, removed)
    else:
        logger.warning("%s: all images of a class are copies; copies of held-out images are trained on", images.source)
    return images.take(stays), images.take(chosen)


def most_held_out(labels: np.ndarray) -> int:
    """How many images can be held out if at least one of each class is trained on."""
    return len(labels) - len(np.unique(labels))


def stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """The positions, in ascending order, of `count` images: the first of each class, in proportion to its size (by the
    largest remainders), but not all of a class."""
    _, kinds, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    taken = np.minimum(count * sizes // len(labels), sizes - 1)
    while missing := count - taken.sum():
        open_classes = np.flatnonzero(taken < sizes - 1)
        remainders = (count * sizes - taken * len(labels))[open_classes]
        taken[open_classes[np.argsort(-remainders, kind="stable")[:missing]]] += 1
    by_class = np.argsort(kinds, kind="stable")
    number = np.empty(len(labels), np.int64)  # of each image within its class
    number[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.flatnonzero(number < taken[kinds])


# ---- rows of the trainer


class TrainingRows(Dataset):
    """Map-style dataset for the trainer: row i is the input of `ImageViews` for image i.

    Args:
        images: The training images.
        size, crop: Settings of the views; see `Images.for_views`.
        seed: Seed of the crops of image files, which differ in each epoch.
    """

    def __init__(self, images: Images, size: int, crop: Crop, seed: int) -> None:
        self.images, self.size, self.crop, self.seed = images, size, crop, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # persistent workers have copies of this object

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of an epoch, counted from 0."""
        self.epoch.fill_(epoch)

    def fingerprint(self) -> str:
        """A hash of the images, their labels and the settings."""
        return str(Hasher.hash([self.images.fingerprint(), self.size, self.crop]))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images.for_views([i], self.size, self.crop, (self.seed, int(self.epoch)))[0]


def collate_images(rows: list[Tensor]) -> dict[str, Tensor]:
    """Collate rows into a batch {images: [B, ...]}."""
    return {"images": torch.stack(rows)}


# ---- crops


def to_tensor(image: Image.Image) -> Tensor:
    """The pixels of a picture, uint8 [C, H, W]."""
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def center_crop(image: Image.Image, size: int) -> Tensor:
    """The largest central square, resized to uint8 [C, size, size]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return resized_crop(image, size, (left, top, left + side, top + side))


def resized_crop(image: Image.Image, size: int, box: tuple[float, float, float, float]) -> Tensor:
    """A box (left, top, right, bottom), resized with antialiasing to uint8 [C, size, size]."""
    left, top, right, bottom = box
    x, y = math.floor(left), math.floor(top)
    part = image.crop((x, y, math.ceil(right), math.ceil(bottom)))  # `resize` would blend in adjacent pixels
    inner = (left - x, top - y, min(right - x, part.width), min(bottom - y, part.height))
    return to_tensor(part.resize((size, size), Image.Resampling.BILINEAR, box=inner))


def two_crops(
    encoded: dict[str, Any], channels: int, folders: tuple[str, ...], size: int, crop: Crop, seed: tuple[int, ...]
) -> Tensor:
    """Two random crops of an encoded image, drawn as in `augmentations.random_resized_crop` and resized to uint8
    [2, C, size, size]; without `crop`, the complete image twice.

    A JPEG image is decoded at 1/2, 1/4 or 1/8 of its size if each side of both crops then has at least `size` pixels.
    """
    with opened(read_encoded(encoded, folders), image_name(encoded, folders)) as image:
        width, height = upright_size(image)
        boxes = draw_boxes(width, height, crop, seed)
        smallest = min(min(right - left, bottom - top) for left, top, right, bottom in boxes)
        scale = next(scale for scale in (8, 4, 2, 1) if smallest >= scale * size or scale == 1)
        turn = orientation(image)
        picture = to_picture(image, channels, min(width, height) // scale)
    scale = scale if picture.size != (width, height) else 1  # other formats than JPEG
    # The last column of a draft may be narrower than the others. A mirrored picture begins with it.
    x = picture.width - width / scale if turn in (2, 3, 6, 7) else 0.0
    y = picture.height - height / scale if turn in (3, 4, 7, 8) else 0.0
    return torch.stack(
        [
            resized_crop(picture, size, (left / scale + x, top / scale + y, right / scale + x, bottom / scale + y))
            for left, top, right, bottom in boxes
        ]
    )


def draw_boxes(width: int, height: int, crop: Crop, seed: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Two random boxes (left, top, right, bottom) in an image of this size; without `crop`, the complete image."""
    if crop is None:
        return [(0, 0, width, height)] * 2
    number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    draw = Draw(torch.empty(2), torch.Generator().manual_seed(number))
    boxes = torch.stack(crop_boxes(draw, height, width, crop), dim=1).tolist()
    return [
        (round(left), round(top), round(left) + round(box_width), round(top) + round(box_height))
        for top, left, box_height, box_width in boxes
    ]
