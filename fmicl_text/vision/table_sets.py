"""The set in .parquet and .arrow files, which are found by paths and patterns."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets

from fmicl_text.errors import InputError
from fmicl_text.files import check_regular, matching
from fmicl_text.loading import translate_dataset_errors
from fmicl_text.vision import tables
from fmicl_text.vision.folders import IMAGE_SUFFIXES, TABLE_SUFFIXES
from fmicl_text.vision.sets import (
    ImageSet,
    ImageStream,
    cache_folder,
    content_key,
    dataset_set,
    explain,
    hash_of,
    read_cached,
)


def table_files(paths: Sequence[str], argument: str) -> list[str]:
    """The .parquet and .arrow files among paths and patterns, in this order.

    Raises:
        InputError: A path is not such a file, a pattern matches none, or a file is given twice.
    """
    found: list[str] = []
    for path in paths:
        check_regular(path, f"{argument}={path}")
        if os.path.isdir(path):
            raise InputError(f"{argument}: only one folder can be given, got {' '.join(paths)}")
        if not os.path.lexists(path) and glob.has_magic(path):
            if not (files := [file for file in matching(path) if not os.path.isdir(file)]):
                raise InputError(f"{argument}={path}: no file matches this pattern")
            found += files
        else:
            found.append(path)
    for file in found:
        if not os.path.isfile(file) or os.path.splitext(file)[1].lower() not in TABLE_SUFFIXES:
            hint = ": pass its folder" if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES else ""
            reason = f"no such folder, .parquet or .arrow file{hint}"
            raise InputError(f"{argument}={file}: {reason}")
    count = Counter(map(os.path.realpath, found))
    if twice := [file for file in found if count[os.path.realpath(file)] > 1]:
        raise InputError(f"{argument}={twice[0]} is given twice")
    return found


def has_images(file: str, image_column: str | None) -> bool:
    try:
        return bool(tables.image_column(tables.file_features(file), image_column, file))
    except InputError:
        return False


def read_tables(files: Sequence[str], image_column: str | None, label_column: str | None, source: str) -> ImageSet:
    """The rows of .parquet and .arrow files of the same columns."""
    options = _table_options(files, image_column, label_column, source)
    folder = cache_folder(options["content"])

    def read() -> Any:
        builder = tables.ImageTables(**options, cache_dir=folder)
        builder.download_and_prepare()
        return builder.as_dataset("train")

    with translate_dataset_errors(partial(explain, source)):
        rows = read_cached(read, folder)
    return dataset_set(rows, "image", "label" if "label" in rows.features else None, source, (), options["content"])


def stream_tables(files: Sequence[str], image_column: str | None, label_column: str | None, source: str) -> ImageStream:
    """The rows of .parquet and .arrow files."""
    options = _table_options(files, image_column, label_column, source)
    with translate_dataset_errors(partial(explain, source)):
        builder = tables.ImageTables(**options, cache_dir=None)
        rows = builder.as_streaming_dataset("train")
    return ImageStream(rows, builder.info.features.get("label"), source, (), builder.config.content)


def _table_options(
    files: Sequence[str], image_column: str | None, label_column: str | None, source: str
) -> dict[str, Any]:
    """Arguments of `tables.ImageTables` for the image and label columns of files."""
    features = [tables.file_features(file) for file in files]
    about = source if len(files) == 1 else files[0]
    image = tables.image_column(features[0], image_column, about)
    label = tables.label_column(features[0], label_column, image, about)
    for file, others in zip(files, features, strict=True):
        tables.image_column(others, image, file)
        if label is not None:
            tables.label_column(others, label, image, file)
    kinds = {} if label is None else {file: one[label] for file, one in zip(files, features, strict=True)}
    kinds = {file: kind for file, kind in kinds.items() if tables.kind_of(kind) != "null"}
    first, feature = next(iter(kinds.items()), ("", datasets.Value("string")))
    for file, kind in kinds.items():
        if not tables.are_comparable(kind, feature):
            raise InputError(f"{source}: the classes of column {label!r} of {file} are not those of {first}")
    content = hash_of(content_key(files), image, label, repr(feature))
    return {"splits": {"train": files}, "image": image, "label": label, "label_feature": feature, "content": content}
