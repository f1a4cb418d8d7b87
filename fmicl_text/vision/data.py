"""Images and their classes: scikit-learn's digits, parquet files, image folders, data sets of the Hub.

Small ones of one size are held as one tensor, `LabelledImages`; others are read from where they lie whenever they are
needed, `ImageFiles`. Both give the same things.
"""

from __future__ import annotations

import glob
import io
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import torch
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from yaml import YAMLError

from fmicl_text.errors import InputError
from fmicl_text.loading import hub_revision, load_named_dataset
from fmicl_text.vision.augmentations import Draw, crop_boxes

FOLDERS_HINT = "; a folder must hold a folder of images for each of two or more classes"
NO_ROWS = ("corresponds to no data", "BatchSize must be greater", "contain any data files")  # says datasets of nothing
LARGEST = 96  # pixels; above it all images at once would not fit memory
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what PIL raises of broken files
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # PIL would run Ghostscript on others
Crop = tuple[float, float] | None  # shares of the area that a random crop covers; None: the whole image, always


@dataclass(frozen=True)
class LabelledImages:
    """Images of one size, and their classes.

    Args:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N], from 0 on.
        source: Where they are from.
        skipped: Of files that could not be read, which.
    """

    pixels: Tensor
    labels: Tensor
    source: str
    skipped: tuple[str, ...] = ()

    def take(self, rows: slice) -> LabelledImages:
        """A stretch of them."""
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows])

    def plain(self, rows: Sequence[int], size: int) -> Tensor:
        """What `views.plain_view` takes: pixels uint8 [B, C, H, W] of some rows; of files, the centre at `size`."""
        return self.pixels[torch.as_tensor(rows)]

    def for_views(self, rows: Sequence[int], size: int, crop: Crop, seed: tuple[int, ...]) -> Tensor:
        """What `views.ImageViews` takes: pixels [B, C, H, W] of some rows; of files, two random crops of each."""
        return self.pixels[torch.as_tensor(rows)]

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of the pixels in [0, 1], per channel."""
        return mean_and_std(self.pixels)


@dataclass(frozen=True)
class ImageFiles:
    """Images of any sizes, decoded whenever they are needed.

    Args:
        rows: A dataset of encoded images.
        column: The column that they are in.
        labels: int64 [N], from 0 on.
        channels: 1 for gray, 3 for RGB.
        source, skipped: As for `LabelledImages`.
        folders: Below which the files lie that rows name; see `image_folders`.
    """

    rows: Any
    column: str
    labels: Tensor
    channels: int
    source: str
    skipped: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    def take(self, rows: slice) -> ImageFiles:
        """A stretch of them."""
        return replace(self, rows=self.rows.select(range(len(self.labels))[rows]), labels=self.labels[rows])

    def decoded(self, rows: Sequence[int], make: Any) -> Tensor:
        """make(image, row) of some rows, joined; many are decoded side by side."""
        numbers = [int(row) for row in rows]
        encoded = [self.rows[row][self.column] for row in numbers]

        def one(image: dict[str, Any], row: int) -> Tensor:
            return make(opened(image, self.channels, self.folders), row)

        if len(numbers) == 1:
            return one(encoded[0], numbers[0])[None]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return torch.stack(list(threads.map(one, encoded, numbers)))

    def plain(self, rows: Sequence[int], size: int) -> Tensor:
        """The centres [B, C, size, size], the shorter side of each image resized to `size`."""
        return self.decoded(rows, lambda image, row: centre(image, size))

    def for_views(self, rows: Sequence[int], size: int, crop: Crop, seed: tuple[int, ...]) -> Tensor:
        """Two random crops of each row, resized, [B, 2, C, size, size]; a function of (seed, row)."""
        return self.decoded(rows, lambda image, row: two_crops(image, size, crop, (*seed, row)))

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of the pixels in [0, 1], per channel, from the first 500 images, small."""
        return mean_and_std(self.plain(range(min(500, len(self.labels))), 64))


Images = LabelledImages | ImageFiles


def mean_and_std(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of bytes [N, C, H, W] as numbers in [0, 1], per channel."""
    channels = pixels.transpose(0, 1).flatten(1).double() / 255
    return tuple(channels.mean(1).tolist()), tuple(channels.std(1).clamp_min(1e-3).tolist())


def split(
    images: Images, held_out: int, most: int | None = None, validation: int = 0
) -> tuple[Images, Images, Images | None]:
    """Rows to train on, the last `held_out` rows, and the `validation` rows before these (None for none); of the first,
    at most `most`.

    Raises:
        InputError: Nothing would be left of one of them, or it would hold one class only.
    """
    total = len(images.labels)
    if not 1 <= held_out < total:
        raise InputError(f"{images.source}: --held_out must be from 1 to {total - 1}, got {held_out}")
    if not 0 <= validation < total - held_out:
        raise InputError(f"{images.source}: --validation must be below {total - held_out}, got {validation}")
    if most is not None and most < 1:
        raise InputError(f"--max_train_samples must be at least 1, got {most}")
    first = total - held_out - validation
    train = images.take(slice(0, first if most is None else min(first, most)))
    test = images.take(slice(total - held_out, total))
    chosen_by = images.take(slice(first, total - held_out)) if validation else None
    for part in (train, test, chosen_by):
        if part is not None and len(part.labels.unique()) < 2:
            raise InputError(f"{images.source}: one class only in {len(part.labels)} images, nothing to tell apart")
    return train, test, chosen_by


class TrainingRows(Dataset):
    """What the trainer's DataLoader reads: row i is what `ImageViews` takes of image i.

    Args:
        images: To train on.
        size, crop: Of the views; see `ImageFiles.for_views`.
        seed: Of the crops of files, which differ from epoch to epoch.
    """

    def __init__(self, images: Images, size: int, crop: Crop, seed: int) -> None:
        self.images, self.size, self.crop, self.seed, self.epoch = images, size, crop, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by `position.SetEpochCallback`; epochs count from 0."""
        self.epoch = epoch

    def fingerprint(self) -> str:
        """A hash of all labels and of 100 images, from the first to the last."""
        some = torch.linspace(0, len(self) - 1, 100).long().tolist()
        pixels = self.images.for_views(some, self.size, None, ())
        return str(Hasher.hash([self.images.labels.tolist(), self.size, self.crop, pixels.numpy().tobytes()]))

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, i: int) -> Tensor:
        return self.images.for_views([i], self.size, self.crop, (self.seed, self.epoch))[0]


def collate_images(rows: list[Tensor]) -> dict[str, Tensor]:
    """Rows to the batch {images: [B, ...]}."""
    return {"images": torch.stack(rows)}


def load_digits() -> LabelledImages:
    """scikit-learn's 1,797 handwritten digits, gray, 8 x 8, in a random order that is always the same: as they come,
    a writer's digits stand together."""
    from sklearn.datasets import load_digits as load

    found = load()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels = torch.from_numpy(found.images[order] * (255 / 16)).round().to(torch.uint8)[:, None]
    return LabelledImages(pixels, torch.from_numpy(found.target[order]).long(), "scikit-learn's digits")


def check_channels(images: Images, channels: int) -> None:
    """InputError for images of other channels than an encoder takes; those of files are turned into what it takes."""
    held = images.channels if isinstance(images, ImageFiles) else images.pixels.shape[1]
    if held != channels:
        raise InputError(f"{images.source}: images of {held} channels, the model takes {channels}")


def load_images(
    train_file: str | None = None,
    dataset_name: str | None = None,
    split: str = "train",
    image_column: str = "img",
    label_column: str = "label",
    channels: int = 3,
) -> Images:
    """Images from a parquet file, a folder of class folders, or the Hub; as one tensor if they all have one size of at
    most 96 pixels.

    Args:
        train_file: .parquet, or a folder with a folder of images for each class.
        dataset_name: Hub name; exactly one of this and `train_file`.
        split: Of `dataset_name`.
        image_column: Its images (a folder's are `image`).
        label_column: Its classes, whole numbers or names.
        channels: 1 for gray, 3 for RGB; whatever the mode of an image, it is turned into this.

    Raises:
        InputError: For every fault of the arguments or the data, in one line. An image that cannot be read is skipped.
    """
    if (train_file is None) == (dataset_name is None):
        raise InputError(
            f"exactly one of --train_file and --dataset_name is needed, got {train_file} and {dataset_name}"
        )
    source = str(train_file or f"{dataset_name} [{split}]")
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it logs of a fault is in the exception
    try:
        if train_file is None:
            rows = load_named_dataset(str(dataset_name), None, split)
        elif Path(train_file).is_dir():
            rows = datasets.load_dataset("imagefolder", data_dir=train_file, split="train")
            image_column = "image"
        elif train_file.endswith(".parquet") and Path(train_file).is_file():
            rows = datasets.load_dataset("parquet", data_files=glob.escape(train_file), split="train")
        else:
            raise InputError(f"--train_file {train_file}: no such folder or .parquet file")
    except (DatasetsError, ValueError, OSError, RuntimeError, YAMLError, UnpicklingError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        if any(sign in reason for sign in NO_ROWS):
            reason = "it holds no images"
        raise InputError(f"{source}: {reason}") from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
    for flag, column in (("--image_column", image_column), ("--label_column", label_column)):
        if column not in rows.column_names:
            hint = "" if flag == "--image_column" or not train_file or not Path(train_file).is_dir() else FOLDERS_HINT
            raise InputError(f"{source} has no column {column!r} ({flag}), its columns are {rows.column_names}{hint}")
    classes = read_classes(rows, label_column, source)
    names = {label: i for i, label in enumerate(sorted(set(classes)))}
    try:
        images = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    except (pa.ArrowException, TypeError, ValueError) as error:
        kind = column_kind(rows, image_column)
        raise InputError(f"{source}: column {image_column!r} (--image_column) must hold images, got {kind}") from error
    if (commit := hub_revision(rows)) is not None:
        source = f"{source} @{commit}"
    folders = image_folders(rows, str(train_file or dataset_name))
    kept, skipped, pixels = read_all(images, image_column, channels, source, folders)
    numbers = torch.tensor([names[classes[i]] for i in kept])
    if pixels is not None:
        return LabelledImages(pixels, numbers, source, tuple(skipped))
    readable = images.select(kept) if skipped else images
    return ImageFiles(readable, image_column, numbers, channels, source, tuple(skipped), folders)


def image_folders(rows: Any, named: str) -> tuple[str, ...]:
    """Folders below which the files may lie that rows name: what was named, and the caches of what the Hub has; of
    others than image folders none, for anyone who writes a table can name any file of this machine in it."""
    if rows.info.builder_name != "imagefolder":
        return ()
    caches = (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    return os.path.realpath(named), *map(os.path.abspath, caches)


def read_classes(rows: Any, column: str, source: str) -> list[Any]:
    """The class of every row.

    Raises:
        InputError: They are neither whole numbers nor names, or one is missing.
    """
    kind = column_kind(rows, column)
    if not (isinstance(rows.features[column], datasets.ClassLabel) or "int" in kind or kind in ("string", "bool")):
        raise InputError(f"{source}: column {column!r} (--label_column) must hold whole numbers or names, got {kind}")
    classes: list[Any] = rows[column][:]
    if None in classes:
        raise InputError(f"{source}: row {classes.index(None) + 1} of column {column!r} (--label_column) is empty")
    return classes


def column_kind(rows: Any, column: str) -> str:
    """int64, string, List, ...: what a column holds."""
    kind = rows.features[column]
    return str(kind.dtype) if isinstance(kind, datasets.Value) else type(kind).__name__


def read_all(
    rows: Any, column: str, channels: int, source: str, folders: tuple[str, ...] = ()
) -> tuple[list[int], list[str], Tensor | None]:
    """Every image once: numbers of those that can be read, names of the others, and pixels [N, C, H, W], None if sizes
    differ or are large."""
    kept: list[int] = []
    skipped: list[str] = []
    pixels: list[Tensor] | None = []
    size = None
    for i, row in enumerate(tqdm(rows, desc="read images", leave=False)):
        encoded = row[column] or {"bytes": b"", "path": None}
        try:
            image = opened(encoded, channels, folders, check_only=pixels is None)
        except UNREADABLE:
            skipped.append(encoded["path"] or f"row {i + 1}")
            continue
        kept.append(i)
        size = size or image.size
        if pixels is not None and image.size == size and max(size) <= LARGEST:
            pixels.append(as_tensor(image))
        else:
            pixels = None
    if not kept:
        raise InputError(f"{source}: none of {len(rows)} images can be read")
    return kept, skipped, None if pixels is None else torch.stack(pixels)


def opened(
    image: dict[str, Any], channels: int, folders: tuple[str, ...] = (), check_only: bool = False
) -> Image.Image:
    """One encoded image, decoded, in gray or RGB; transparency on white. To check it only, a JPEG is read at an
    eighth of its size, in a third of the time. A file is opened only below `folders`."""
    in_a_file = image["path"] and not image["bytes"]
    path = os.path.normpath(image["path"] or "")
    if in_a_file and not any(path.startswith(os.path.join(folder, "")) for folder in folders):
        raise OSError(f"{path} is not in the image folder")
    with Image.open(path if in_a_file else io.BytesIO(image["bytes"] or b""), formats=FORMATS) as found:
        if check_only:
            found.draft("RGB", (1, 1))
            found.load()
            return found.copy()
        opaque: Image.Image = found
        if found.mode in ("P", "LA", "PA", "RGBA"):
            opaque = Image.alpha_composite(Image.new("RGBA", found.size, "white"), found.convert("RGBA"))
        return opaque.convert("RGB" if channels == 3 else "L")


def as_tensor(image: Image.Image) -> Tensor:
    """uint8 [C, H, W]."""
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def cut(image: Image.Image, size: int, left: float, top: float, width: float, height: float) -> Tensor:
    """A box resized with antialias to uint8 [C, size, size]; `resize(box=...)` alone blends in what surrounds it."""
    left, top = round(left), round(top)
    box = image.crop((left, top, left + round(width), top + round(height)))
    return as_tensor(box.resize((size, size), Image.Resampling.BILINEAR))


def centre(image: Image.Image, size: int) -> Tensor:
    """The central square, as long as the shorter side, resized to uint8 [C, size, size]."""
    side = min(image.size)
    return cut(image, size, (image.width - side) // 2, (image.height - side) // 2, side, side)


def two_crops(image: Image.Image, size: int, crop: Crop, seed: tuple[int, ...]) -> Tensor:
    """Two random crops as `augmentations.random_resized_crop` draws them, resized, uint8 [2, C, size, size]; without
    `crop` twice the whole image."""
    if crop is None:
        return cut(image, size, 0, 0, *image.size).expand(2, -1, -1, -1)
    number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    draw = Draw(torch.empty(2), torch.Generator().manual_seed(number))
    boxes = torch.stack(crop_boxes(draw, image.height, image.width, crop), dim=1).tolist()
    return torch.stack([cut(image, size, left, top, width, height) for top, left, height, width in boxes])
