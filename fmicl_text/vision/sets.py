"""Encoded images and classes of one source, in memory or as a stream; the cache in which `datasets` keeps them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import xxhash

from fmicl_text.errors import InputError
from fmicl_text.files import is_disk_full
from fmicl_text.loading import cache_of
from fmicl_text.vision import tables

logger = logging.getLogger(__name__)

IMAGE_FEATURES = datasets.Features({"image": datasets.Image(decode=False)})
_HASHED_BYTES = 2**30  # larger files are identified in the cache by name, size and modification time


@dataclass(frozen=True)
class ImageSet:
    """`ImageRows` with codes and names of its own instead of those of the training classes."""

    rows: Any
    codes: np.ndarray
    names: list[str]
    source: str
    folders: tuple[str, ...] = ()
    key: str = ""
    labeled: bool = True  # it has a label column, or folders of classes
    changed: int = 0  # of an `ImageFolder`


@dataclass(frozen=True)
class ImageStream:
    """Encoded images that are read while training.

    Args:
        rows: `datasets.IterableDataset` with the column `image`, of {bytes, path}, and, if there are classes, `label`.
        label: Type of `label`, or None.
        source: File, folder or dataset.
        folders: As in `ImageRows`.
        fingerprint: Identifies content and order; None if unknown.
        changed: Of an `ImageFolder`.
    """

    rows: Any
    label: Any
    source: str
    folders: tuple[str, ...]
    fingerprint: str | None
    changed: int = 0


def attempt(read: Callable[..., Any], *arguments: Any) -> Any:
    """A set, or the error for one that cannot be read, because it may not be used."""
    try:
        return read(*arguments)
    except InputError as error:
        return error


def dataset_set(rows: Any, image: str, label: str | None, source: str, folders: tuple[str, ...], key: str) -> ImageSet:
    """The rows of a dataset with an image column and possibly a label column."""
    codes, names = np.full(len(rows), -1, np.int64), list[str]()
    if label is not None:
        cells = rows.select_columns([label]).with_format("arrow")[:][label]
        codes, names = tables.class_codes(cells, rows.features[label], label, source)
    images = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    images = images if image == "image" else images.rename_column(image, "image")
    if not folders and len(images):
        contents, paths = (pc.struct_field(images.data.column("image"), name) for name in ("bytes", "path"))
        if contents.null_count == len(contents) and paths.null_count < len(paths):
            raise InputError(
                f"{source}: column {image!r} has only paths of images, which are not opened, because a table could "
                "reference any local file: pass the folder of the images"
            )
    return ImageSet(images, codes, names, source, folders, hash_of(key, rows._fingerprint), label is not None)


def cache_folder(key: str) -> str:
    """The folder in the cache of `datasets` for rows that are identified by their content."""
    return os.path.join(datasets.config.HF_DATASETS_CACHE, "by_content", key)


def read_cached(read: Callable[[], Any], folder: str) -> Any:
    """read(), which writes its rows to a folder of the cache, or reads them from there. If what an earlier run wrote
    cannot be read, it is removed and written again."""
    was_complete = any(Path(folder).rglob("dataset_info.json"))
    try:
        return read()
    except Exception as error:
        if not was_complete or isinstance(error, InputError) or is_disk_full(error):
            raise
        logger.warning("the cache %s cannot be read and is written again: %s", folder, " ".join(str(error).split()))
        shutil.rmtree(folder)
        return read()


def content_key(files: Sequence[str]) -> str:
    """Identifies the content of files: a hash of it, or of their names, sizes and modification times if they are larger
    than 1 GiB in total."""
    found = [os.stat(file) for file in files]
    if sum(one.st_size for one in found) <= _HASHED_BYTES:
        return os.path.basename(cache_of(*files))
    times = [f"{os.path.abspath(file)} {one.st_size} {one.st_mtime_ns}" for file, one in zip(files, found, strict=True)]
    return hash_of(*times)


def hash_of(*parts: Any) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else f"{part}\0".encode(errors="surrogateescape"))
    return str(digest.hexdigest())


def explain(source: str, error: BaseException) -> str:
    """The reason why data cannot be loaded."""
    no_images = ("corresponds to no data", "BatchSize must be greater", "at least one example")  # of `datasets`
    if any(sign in str(error) for sign in no_images):
        return f"{source} contains no images"
    reason = str(error).partition("Example of usage")[0] or type(error).__name__
    if isinstance(error, ConnectionError):
        reason += "; without a network, pass a train_file or a dataset that is in the cache"
    return f"{source}: {reason}"
