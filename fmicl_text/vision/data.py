"""Images with class labels: scikit-learn's digits, parquet files, image folders, datasets on the Hub.

Small images of one size are kept in one tensor (`LabeledImages`); others are read lazily from disk (`ImageFiles`).
Both classes have the same methods.
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import torch
import xxhash
from datasets.fingerprint import Hasher
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fmicl_text.errors import InputError
from fmicl_text.files import check_regular
from fmicl_text.loading import cache_of, hub_revision, load_named_dataset, translate_dataset_errors
from fmicl_text.vision.augmentations import Draw, crop_boxes

FOLDERS_HINT = "; a folder must contain one subfolder of images per class, and at least two classes"
NO_ROWS = ("corresponds to no data", "BatchSize must be greater", "contain any data files")  # messages of `datasets`
LARGEST = 96  # pixels; larger images are not kept in memory
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # exceptions of PIL for invalid files
FORMATS = (
    "BMP",
    "GIF",
    "JPEG",
    "JPEG2000",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
)  # not EPS: PIL would run Ghostscript
Crop = tuple[float, float] | None  # range of a random crop's area as a fraction of the image; None: no crop


@dataclass(frozen=True)
class LabeledImages:
    """Images of one size in memory, with class labels.

    Args:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N], consecutive from 0.
        source: File, folder or dataset of the images.
        skipped: Names of the images that could not be read.
    """

    pixels: Tensor
    labels: Tensor
    source: str
    skipped: tuple[str, ...] = ()

    def take(self, rows: slice) -> LabeledImages:
        """A slice of the images."""
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows])

    def plain(self, rows: Sequence[int], size: int) -> Tensor:
        """Input of `views.plain_view` for the given rows: pixels, uint8 [B, C, H, W]."""
        return self.pixels[torch.as_tensor(rows)]

    def for_views(self, rows: Sequence[int], size: int, crop: Crop, seed: tuple[int, ...]) -> Tensor:
        """Input of `views.ImageViews` for the given rows: pixels, uint8 [B, C, H, W], not yet cropped."""
        return self.pixels[torch.as_tensor(rows)]

    def fingerprint(self) -> str:
        """A hash of the pixels and labels."""
        return str(Hasher.hash([self.labels.tolist(), list(self.pixels.shape), self.pixels.numpy().tobytes()]))

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the pixels in [0, 1], per channel."""
        return mean_and_std(self.pixels)


@dataclass(frozen=True)
class ImageFiles:
    """Images of any size with class labels, decoded when they are needed.

    Args:
        rows: Dataset of encoded images.
        column: Its image column.
        labels: int64 [N], consecutive from 0.
        channels: 1 for grayscale, 3 for RGB.
        source, skipped: As in `LabeledImages`.
        folders: Folders from which image files may be read; see `image_folders`.
        hashes: A hash of each encoded image, uint64 [N].
    """

    rows: Any
    column: str
    labels: Tensor
    channels: int
    source: str
    skipped: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    def take(self, rows: slice) -> ImageFiles:
        """A slice of the images."""
        selected = self.rows.select(range(len(self.labels))[rows])
        return replace(self, rows=selected, labels=self.labels[rows], hashes=self.hashes[rows])

    def fingerprint(self) -> str:
        """A hash of the encoded images and the labels."""
        return str(Hasher.hash([self.labels.tolist(), self.channels, self.hashes.tobytes()]))

    def decode(self, rows: Sequence[int], transform: Callable[[Image.Image, int], Tensor]) -> Tensor:
        """transform(image, row) of the given rows, stacked; several rows are decoded in parallel."""
        numbers = [int(row) for row in rows]
        encoded = [self.rows[row][self.column] for row in numbers]

        def decode_one(image: dict[str, Any], row: int) -> Tensor:
            return transform(decode_image(image, self.channels, self.folders), row)

        if len(numbers) == 1:
            return decode_one(encoded[0], numbers[0])[None]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return torch.stack(list(threads.map(decode_one, encoded, numbers)))

    def plain(self, rows: Sequence[int], size: int) -> Tensor:
        """Input of `views.plain_view` for the given rows: center crops, uint8 [B, C, size, size]."""
        return self.decode(rows, lambda image, row: center_crop(image, size))

    def for_views(self, rows: Sequence[int], size: int, crop: Crop, seed: tuple[int, ...]) -> Tensor:
        """Input of `views.ImageViews` for the given rows: two random crops of each, uint8 [B, 2, C, size, size]. They
        are determined by seed and row."""
        return self.decode(rows, lambda image, row: two_crops(image, size, crop, (*seed, row)))

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the pixels in [0, 1], per channel, of center crops of the first 500 images,
        resized to 64 x 64."""
        return mean_and_std(self.plain(range(min(500, len(self.labels))), 64))


Images = LabeledImages | ImageFiles


def mean_and_std(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels in [0, 1], given as uint8 [N, C, H, W]."""
    channels = pixels.transpose(0, 1).flatten(1).double() / 255
    return tuple(channels.mean(1).tolist()), tuple(channels.std(1).clamp_min(1e-3).tolist())


def split(
    images: Images, held_out: int, max_train_samples: int | None = None, validation: int = 0
) -> tuple[Images, Images, Images | None]:
    """Training, test and validation images. The last `held_out` rows are the test images, the `validation` rows before
    them are the validation images (None for 0), and at most `max_train_samples` of the rows before these are the
    training images.

    Raises:
        InputError: A part would be empty or contain only one class.
    """
    total = len(images.labels)
    if not 1 <= held_out < total:
        raise InputError(f"held_out must be from 1 to {total - 1} for {images.source}, got {held_out}")
    if not 0 <= validation < total - held_out:
        raise InputError(f"validation must be below {total - held_out} for {images.source}, got {validation}")
    if max_train_samples is not None and max_train_samples < 1:
        raise InputError(f"max_train_samples must be at least 1, got {max_train_samples}")
    first = total - held_out - validation
    train = images.take(slice(0, first if max_train_samples is None else min(first, max_train_samples)))
    test = images.take(slice(total - held_out, total))
    validation_images = images.take(slice(first, total - held_out)) if validation else None
    for part in (train, test, validation_images):
        if part is not None and len(part.labels.unique()) < 2:
            raise InputError(f"{images.source}: only one class among {len(part.labels)} images; at least 2 are needed")
    return train, test, validation_images


class TrainingRows(Dataset):
    """Map-style dataset for the trainer: row i is the input of `ImageViews` for image i.

    Args:
        images: The training images.
        size, crop: Settings of the views; see `ImageFiles.for_views`.
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
        return len(self.images.labels)

    def __getitem__(self, i: int) -> Tensor:
        return self.images.for_views([i], self.size, self.crop, (self.seed, int(self.epoch)))[0]


def collate_images(rows: list[Tensor]) -> dict[str, Tensor]:
    """Collate rows into a batch {images: [B, ...]}."""
    return {"images": torch.stack(rows)}


def load_digits() -> LabeledImages:
    """scikit-learn's 1,797 handwritten digits, grayscale, 8 x 8, in a fixed random order, because the original order
    groups them by writer."""
    from sklearn.datasets import load_digits as load

    digits = load()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = torch.from_numpy(digits.images[order] * (255 / 16)).round().to(torch.uint8)[:, None]
    return LabeledImages(pixels, torch.from_numpy(digits.target[order]).long(), "scikit-learn's digits")


def check_channels(images: Images, channels: int) -> None:
    """Raise `InputError` unless images have the number of channels that an encoder takes. `load_images` converts them,
    `load_digits` does not."""
    found = images.channels if isinstance(images, ImageFiles) else images.pixels.shape[1]
    if found != channels:
        raise InputError(f"{images.source}: the model takes {channels}-channel images, got {found}-channel images")


def load_images(
    train_file: str | None = None,
    dataset_name: str | None = None,
    dataset_split: str = "train",
    image_column: str = "img",
    label_column: str = "label",
    channels: int = 3,
) -> Images:
    """Load images from a parquet file, a folder or the Hub, in one tensor if all have the same size, at most 96
    pixels.

    Args:
        train_file: .parquet file, or folder with one subfolder of images per class.
        dataset_name: Hub name or local folder of a dataset. Exactly one of `dataset_name` and `train_file` is
            required.
        dataset_split: Split of `dataset_name`.
        image_column: Image column; that of a `train_file` folder is always `image`.
        label_column: Class column, of integers or names.
        channels: Convert all images to grayscale (1) or RGB (3).

    Raises:
        InputError: An argument or the data is invalid. Individual images that cannot be read are skipped.
    """
    if (train_file is None) == (dataset_name is None):
        got = f"train_file={train_file} and dataset_name={dataset_name}"
        raise InputError(f"exactly one of train_file and dataset_name is needed, got {got}")
    source = str(train_file or f"{dataset_name} [{dataset_split}]")
    if train_file is not None:
        check_regular(train_file, f"train_file={train_file}")
    is_folder = train_file is not None and os.path.isdir(train_file)

    def explain(error: BaseException) -> str:
        no_images = any(sign in str(error) for sign in NO_ROWS)
        return f"{source} contains no images" if no_images else f"{source}: {error}"

    with translate_dataset_errors(explain):
        if train_file is None:
            rows = load_named_dataset(str(dataset_name), None, dataset_split)
        elif is_folder:
            metadata = sorted(str(path) for path in Path(train_file).rglob("metadata.*") if path.is_file())
            cache_dir = cache_of(*metadata) if metadata else None
            rows = datasets.load_dataset("imagefolder", data_dir=train_file, split="train", cache_dir=cache_dir)
            image_column = "image"
        elif train_file.endswith(".parquet") and os.path.isfile(train_file):
            rows = datasets.load_dataset(
                "parquet", data_files=glob.escape(train_file), split="train", cache_dir=cache_of(train_file)
            )
        else:
            raise InputError(f"train_file={train_file}: no such folder or .parquet file")
    for argument, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in rows.column_names:
            hint = FOLDERS_HINT if is_folder and argument == "label_column" else ""
            raise InputError(
                f"{source} has no column {column!r} ({argument}); its columns are {rows.column_names}{hint}"
            )
    classes = read_classes(rows, label_column, source)
    names = {label: i for i, label in enumerate(sorted(set(classes)))}
    try:
        images = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    except (pa.ArrowException, TypeError, ValueError) as error:
        kind = column_kind(rows, image_column)
        message = f"{source}: column {image_column!r} (image_column) must contain images, got {kind}"
        raise InputError(message) from error
    if (commit := hub_revision(rows)) is not None:
        source = f"{source} @{commit}"
    folders = image_folders(rows, str(train_file or dataset_name))
    kept, skipped, pixels, hashes = read_all(images, image_column, channels, source, folders)
    labels = torch.tensor([names[classes[i]] for i in kept])
    if pixels is not None:
        return LabeledImages(pixels, labels, source, tuple(skipped))
    readable = images.select(kept) if skipped else images
    return ImageFiles(readable, image_column, labels, channels, source, tuple(skipped), folders, hashes)


def image_folders(rows: Any, name: str) -> tuple[str, ...]:
    """Folders from which image files may be read: the folder `name` and the caches of the Hub. For datasets other than
    image folders there are none, because a table could otherwise reference arbitrary local files."""
    if rows.info.builder_name != "imagefolder":
        return ()
    caches = (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    return os.path.realpath(name), *map(os.path.abspath, caches)


def read_classes(rows: Any, column: str, source: str) -> list[Any]:
    """The class of every row.

    Raises:
        InputError: The classes are neither integers nor names, or one is missing.
    """
    kind = column_kind(rows, column)
    if not (isinstance(rows.features[column], datasets.ClassLabel) or "int" in kind or kind in ("string", "bool")):
        raise InputError(f"{source}: column {column!r} (label_column) must contain integers or names, got {kind}")
    classes: list[Any] = rows[column][:]
    if None in classes:
        raise InputError(f"{source}: row {classes.index(None) + 1} of column {column!r} (label_column) is empty")
    return classes


def column_kind(rows: Any, column: str) -> str:
    """The type of a column: int64, string, List, ..."""
    kind = rows.features[column]
    return str(kind.dtype) if isinstance(kind, datasets.Value) else type(kind).__name__


def read_all(
    rows: Any, column: str, channels: int, source: str, folders: tuple[str, ...] = ()
) -> tuple[list[int], list[str], Tensor | None, np.ndarray]:
    """Read every image once.

    Returns:
        Indices of the N images that can be read; names of the others; pixels [N, C, H, W], or None if the images
        differ in size or are larger than `LARGEST`; and a hash of each encoded image, uint64 [N].
    """
    kept: list[int] = []
    hashes: list[int] = []
    skipped: list[str] = []
    pixels: list[Tensor] | None = []
    size = None
    for i, row in enumerate(tqdm(rows, desc="read images", leave=False)):
        encoded = row[column] or {"bytes": b"", "path": None}
        try:
            image = decode_image(encoded, channels, folders, check_only=pixels is None)
        except UNREADABLE:
            skipped.append(encoded["path"] or f"row {i + 1}")
            continue
        kept.append(i)
        hashes.append(xxhash.xxh3_64_intdigest(encoded["bytes"] or Path(encoded["path"]).read_bytes()))
        size = size or image.size
        if pixels is not None and image.size == size and max(size) <= LARGEST:
            pixels.append(to_tensor(image))
        else:
            pixels = None
    if not kept:
        raise InputError(f"{source}: none of {len(rows)} images can be read")
    return kept, skipped, None if pixels is None else torch.stack(pixels), np.array(hashes, np.uint64)


def decode_image(
    image: dict[str, Any], channels: int, folders: tuple[str, ...] = (), check_only: bool = False
) -> Image.Image:
    """Decode an image to grayscale or RGB, with transparent pixels blended with white.

    Args:
        image: Its bytes, or its path below one of the `folders`.
        channels: 1 for grayscale, 3 for RGB.
        folders: Folders from which files may be read.
        check_only: Only check that the image can be decoded, without converting it. JPEG files are decoded at an eighth
            of their size, in a third of the time.
    """
    is_file = image["path"] and not image["bytes"]
    path = os.path.normpath(image["path"] or "")
    if is_file and not any(path.startswith(os.path.join(folder, "")) for folder in folders):
        raise OSError(f"{path} is not in the image folder")
    with Image.open(path if is_file else io.BytesIO(image["bytes"] or b""), formats=FORMATS) as opened:
        if check_only:
            opened.draft("RGB", (1, 1))
            opened.load()
            return opened.copy()
        opaque: Image.Image = opened
        if opened.mode in ("P", "LA", "PA", "RGBA"):
            opaque = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened.convert("RGBA"))
        return opaque.convert("RGB" if channels == 3 else "L")


def to_tensor(image: Image.Image) -> Tensor:
    """The pixels of an image, uint8 [C, H, W]."""
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def resized_crop(image: Image.Image, size: int, left: float, top: float, width: float, height: float) -> Tensor:
    """A box, resized with antialiasing to uint8 [C, size, size]. `resize(box=...)` would blend in adjacent pixels."""
    left, top = round(left), round(top)
    box = image.crop((left, top, left + round(width), top + round(height)))
    return to_tensor(box.resize((size, size), Image.Resampling.BILINEAR))


def center_crop(image: Image.Image, size: int) -> Tensor:
    """The largest central square, resized to uint8 [C, size, size]."""
    side = min(image.size)
    return resized_crop(image, size, (image.width - side) // 2, (image.height - side) // 2, side, side)


def two_crops(image: Image.Image, size: int, crop: Crop, seed: tuple[int, ...]) -> Tensor:
    """Two random crops, drawn as in `augmentations.random_resized_crop` and resized to uint8 [2, C, size, size];
    without `crop`, the complete image twice."""
    if crop is None:
        return resized_crop(image, size, 0, 0, *image.size).expand(2, -1, -1, -1)
    number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    draw = Draw(torch.empty(2), torch.Generator().manual_seed(number))
    boxes = torch.stack(crop_boxes(draw, image.height, image.width, crop), dim=1).tolist()
    return torch.stack([resized_crop(image, size, left, top, width, height) for top, left, height, width in boxes])
