"""Small images as one tensor: scikit-learn's digits, parquet files, image folders, data sets of the Hub."""

from __future__ import annotations

import glob
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fmicl_text.errors import InputError

LARGEST = 96  # pixels; above it all images at once would not fit memory


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

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of the pixels in [0, 1], per channel."""
        channels = self.pixels.transpose(0, 1).flatten(1).double() / 255
        return tuple(channels.mean(1).tolist()), tuple(channels.std(1).clamp_min(1e-3).tolist())

    def split(self, held_out: int, most: int | None = None) -> tuple[LabelledImages, LabelledImages]:
        """The first rows, at most `most` of them, and the last `held_out`.

        Raises:
            InputError: Nothing would be left of one of them, or it would hold one class only.
        """
        if not 1 <= held_out < len(self.pixels):
            raise InputError(f"{self.source}: --held_out must be from 1 to {len(self.pixels) - 1}, got {held_out}")
        if most is not None and most < 1:
            raise InputError(f"--max_train_samples must be at least 1, got {most}")
        parts = []
        first = len(self.pixels) - held_out
        for rows in (slice(0, first if most is None else min(first, most)), slice(first, None)):
            parts.append(LabelledImages(self.pixels[rows], self.labels[rows], self.source))
            if len(parts[-1].labels.unique()) < 2:
                raise InputError(
                    f"{self.source}: one class only in {len(parts[-1].labels)} images, nothing to tell apart"
                )
        return parts[0], parts[1]


class ImageRows(Dataset):
    """What the trainer's DataLoader reads: row i is {image, label}."""

    def __init__(self, images: LabelledImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images.pixels)

    def __getitem__(self, i: int) -> Tensor:
        return self.images.pixels[i]


def collate_images(rows: list[Tensor]) -> dict[str, Tensor]:
    """Images [C, H, W] to the batch {images: [B, C, H, W]}."""
    return {"images": torch.stack(rows)}


def load_digits() -> LabelledImages:
    """scikit-learn's 1,797 handwritten digits, grey, 8 x 8, in a random order that is always the same: as they come,
    a writer's digits stand together."""
    from sklearn.datasets import load_digits as load

    found = load()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels = torch.from_numpy(found.images[order] * (255 / 16)).round().to(torch.uint8)[:, None]
    return LabelledImages(pixels, torch.from_numpy(found.target[order]).long(), "scikit-learn's digits")


def load_images(
    train_file: str | None = None,
    dataset_name: str | None = None,
    split: str = "train",
    image_column: str = "img",
    label_column: str = "label",
    channels: int = 3,
) -> LabelledImages:
    """Images of one size, at most 96 pixels, from a parquet file, a folder of class folders, or the Hub.

    Args:
        train_file: .parquet, or a folder with a folder of images for each class.
        dataset_name: Hub name; exactly one of this and `train_file`.
        split: Of `dataset_name`.
        image_column: Its images (a folder's are `image`).
        label_column: Its classes, whole numbers or names.
        channels: 1 for grey, 3 for RGB; whatever the mode of an image, it is turned into this.

    Raises:
        InputError: For every fault of the arguments or the data, in one line. An image that cannot be read is skipped.
    """
    if (train_file is None) == (dataset_name is None):
        raise InputError(
            f"exactly one of --train_file and --dataset_name is needed, got {train_file} and {dataset_name}"
        )
    source = str(train_file or f"{dataset_name} [{split}]")
    try:
        if train_file is None:
            rows = datasets.load_dataset(dataset_name, split=split)
        elif Path(train_file).is_dir():
            rows = datasets.load_dataset("imagefolder", data_dir=train_file, split="train")
            image_column = "image"
        elif train_file.endswith(".parquet") and Path(train_file).is_file():
            rows = datasets.load_dataset("parquet", data_files=glob.escape(train_file), split="train")
        else:
            raise InputError(f"--train_file {train_file}: no such folder or .parquet file")
    except (DatasetsError, ValueError, OSError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: {' '.join(str(error.__cause__ or error).split())[:300]}") from error
    for flag, column in (("--image_column", image_column), ("--label_column", label_column)):
        if column not in rows.column_names:
            raise InputError(f"{source} has no column {column!r} ({flag}), its columns are {rows.column_names}")
    classes = rows[label_column][:]
    names = {label: i for i, label in enumerate(sorted(set(classes)))}
    images = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    pixels, labels, skipped = decode_all(images, image_column, [names[label] for label in classes], channels, source)
    return LabelledImages(pixels, labels, source, tuple(skipped))


def decode_all(
    rows: Any, column: str, labels: list[int], channels: int, source: str
) -> tuple[Tensor, Tensor, list[str]]:
    """Pixels [N, C, H, W] and labels [N] of the images that can be read, and the names of the others."""
    pixels, kept, skipped = [], [], []
    for i, row in enumerate(tqdm(rows, desc="decode images", leave=False)):
        try:
            pixels.append(decode(row[column], channels))
            kept.append(labels[i])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            skipped.append(row[column].get("path") or f"row {i + 1}")
    if not pixels:
        raise InputError(f"{source}: none of {len(labels)} images can be read")
    sizes = {tuple(image.shape[1:]) for image in pixels}
    if len(sizes) > 1 or max(max(size) for size in sizes) > LARGEST:
        shown = ", ".join(f"{height} x {width}" for height, width in sorted(sizes)[:3])
        raise InputError(f"{source}: images must all have one size of at most {LARGEST} pixels, got {shown}")
    return torch.stack(pixels), torch.tensor(kept), skipped


def decode(image: dict[str, Any], channels: int) -> Tensor:
    """One encoded image as uint8 [C, H, W]; transparency on white."""
    with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as opened:
        opaque: Image.Image = opened
        if opened.mode in ("P", "LA", "PA", "RGBA"):
            opaque = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened.convert("RGBA"))
        array = np.array(opaque.convert("RGB" if channels == 3 else "L"))
    return torch.from_numpy(array if channels == 3 else array[..., None]).permute(2, 0, 1)
