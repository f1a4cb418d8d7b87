"""The sets in a folder of images: encoded images, and the classes that subfolders or tables of metadata give."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice

import datasets
import numpy as np
import pyarrow as pa

from fmicl_text.errors import InputError
from fmicl_text.vision.folders import SPLITS, ImageFolder, classes_of, split_folders, with_images, without_wrappers
from fmicl_text.vision.metadata import read_metadata
from fmicl_text.vision.sets import IMAGE_FEATURES, ImageSet, ImageStream, hash_of

logger = logging.getLogger(__name__)

_CHUNK = 100_000
_SHARDS = 64  # of a streamed folder of images, for the workers


def read_image_folder(
    folder: ImageFolder,
    image_column: str | None,
    label_column: str | None,
    name: str,
    source: str,
    train_classes: Sequence[str],
) -> dict[str, ImageSet]:
    """The sets in a folder of images."""
    listed = read_metadata(folder, image_column, label_column, source)
    top = without_wrappers(folder, train_classes)
    splits = split_folders(top, source)
    if (count := folder.others[0] + sum(len(one.tables) for one in folder.walk())) > 0:
        example = folder.others[1] or "its tables"
        logger.warning("%s: %d files are not images and were ignored, such as %s", name, count, example)
    subfolders = with_images(top)
    if splits == {"train": top}:
        if split_names := [one for one in subfolders if SPLITS.get(one.lower()) == "train"]:
            rest = next(one for one in subfolders if one.lower() not in SPLITS)
            logger.warning(
                "%s: %s is read as a class, not as a split, because %s is not a split", name, split_names[0], rest
            )
    elif top.images:
        logger.warning("%s: %d images are not in the folder of a split and were ignored", name, len(top.images))
    sets: dict[str, ImageSet] = {}
    classes = list(train_classes)
    for split, below in sorted(splits.items(), key=lambda one: one[0] != "train"):
        part = without_wrappers(below, classes)
        if split == "train" and not classes:
            classes = list(with_images(part))
        if not below.total:
            continue
        about = name if splits == {"train": top} else below.path
        sets[split] = _folder_set(part, about) if listed is None else _listed_set(below, listed, about)
    return sets


def _folder_set(folder: ImageFolder, source: str) -> ImageSet:
    """The images of a folder, with subfolders as classes."""
    names: list[str] = []
    codes: list[np.ndarray] = []
    for name, part in classes_of(folder):
        codes.append(np.full(part.total, -1 if name is None else len(names), np.int64))
        names += [] if name is None else [name]
    if names and folder.images:
        logger.warning("%s: %d images are not in the folder of a class and have no class", source, len(folder.images))
    paths = chain.from_iterable(part.paths() for _, part in classes_of(folder))
    key = folder.fingerprint()
    rows, numbers = _path_rows(paths, key), np.concatenate(codes)
    return ImageSet(rows, numbers, names, source, (folder.path,), key, changed=folder.changed)


def stream_set(one: ImageSet) -> ImageStream:
    """The images of a folder, in a random order, because those of a class follow one another."""
    rows, label = one.rows, datasets.ClassLabel(names=one.names) if one.names else None
    if label is not None:
        rows = rows.add_column("label", pa.array(one.codes), feature=label)
    shards = min(_SHARDS, len(rows))
    stream = rows.shuffle(seed=0, keep_in_memory=True).to_iterable_dataset(num_shards=shards)
    key = hash_of(one.key, *one.names, one.codes.tobytes())
    return ImageStream(stream, label, one.source, one.folders, key, one.changed)


def _listed_set(folder: ImageFolder, listed: Mapping[str, str | None], source: str) -> ImageSet:
    """The images in a folder that tables of metadata list."""
    inside = os.path.join(folder.path, "")
    found = {path: name for path, name in listed.items() if path.startswith(inside)}
    if rest := sum(path not in found for path in folder.paths()):
        logger.warning("%s: %d images are not listed in the tables of metadata and were ignored", source, rest)
    if not found:
        raise InputError(f"{source}: its tables of metadata list no images")
    names = list(dict.fromkeys(name for name in found.values() if name is not None))
    numbers = {name: i for i, name in enumerate(names)} | {None: -1}
    codes = np.fromiter((numbers[name] for name in found.values()), np.int64, len(found))
    key = hash_of(folder.fingerprint(), *found)
    rows = _path_rows(iter(found), key)
    return ImageSet(rows, codes, names, source, (folder.path,), key, changed=folder.changed)


def _path_rows(paths: Iterator[str], key: str) -> datasets.Dataset:
    """Rows of images in files."""
    chunks = []
    while names := list(islice(paths, _CHUNK)):
        columns = [pa.nulls(len(names), pa.binary()), pa.array(names, pa.string())]
        chunks.append(pa.StructArray.from_arrays(columns, ["bytes", "path"]))
    table = pa.table({"image": pa.chunked_array(chunks)})
    return datasets.Dataset(
        datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=IMAGE_FEATURES), fingerprint=key
    )
