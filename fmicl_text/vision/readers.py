"""The sets of images that paths name: a folder of images, a folder of tables, or files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from fmicl_text.errors import InputError
from fmicl_text.vision.folder_sets import read_image_folder, stream_set
from fmicl_text.vision.folders import IMAGE_SUFFIXES, SPLITS, TABLE_SUFFIXES, ImageFolder, read_folder
from fmicl_text.vision.hub_sets import is_configured, read_configured
from fmicl_text.vision.sets import attempt
from fmicl_text.vision.table_sets import has_images, read_tables, stream_tables, table_files
from fmicl_text.vision.tables import table_folder_files


def paths_of(given: Any, argument: str) -> list[str]:
    """The paths of an argument.

    Raises:
        InputError: It is not one or more paths.
    """
    paths = [given] if isinstance(given, str | os.PathLike) else given
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise InputError(f"{argument} must be one or more paths, got {given!r}")
    if not paths:
        raise InputError(f"{argument} must be one or more paths, got none")
    return [os.fspath(path) for path in paths]


def read_files(
    paths: Sequence[str],
    argument: str,
    config: str | None,
    image_column: str | None,
    label_column: str | None,
    train_classes: Sequence[str] = (),
    streaming: bool = False,
) -> dict[str, Any]:
    """The sets in a folder of images, a folder of tables, or files; of a folder of tables, an InputError for a set that
    cannot be read.

    Args:
        paths, argument: The argument and its value.
        config: Configuration of a folder whose README.md has some.
        train_classes: The training classes, if this is another set.
        streaming: Return an `ImageStream` instead of each `ImageSet`.
    """
    read = stream_tables if streaming else read_tables
    source = f"{argument}={' '.join(paths)}"
    columns = image_column, label_column
    if len(paths) == 1 and os.path.isdir(paths[0]):
        if is_configured(paths[0]):
            return read_configured(paths[0], config, *columns, source, streaming)
        if config is not None:
            raise InputError(f"dataset_config={config}: the README.md of {source} has no configurations")
        folder = read_folder(paths[0], argument)
        files = [os.path.join(one.path, name) for one in folder.walk() for name in one.tables]
        if not folder.total and not files:
            raise _no_images(folder, source)
        if not folder.total or (files and has_images(files[0], image_column)):
            if folder.total:
                raise InputError(
                    f"{source} has images, such as {next(folder.paths())}, and tables of images, such as {files[0]}: "
                    "pass the folder of the images, or the tables"
                )
            top = os.path.abspath(paths[0])
            names = [os.path.relpath(file, top) for file in files]
            splits = table_folder_files(names, SPLITS, source)
            return {
                split: attempt(read, [os.path.join(top, name) for name in some], *columns, paths[0])
                for split, some in splits.items()
            }
        sets = read_image_folder(folder, *columns, paths[0], source, train_classes)
        return {split: stream_set(one) for split, one in sets.items()} if streaming else sets
    if config is not None:
        raise InputError(f"dataset_config={config} applies only to a dataset, got {source}")
    return {"train": read(table_files(paths, argument), *columns, " ".join(paths))}


def _no_images(folder: ImageFolder, source: str) -> InputError:
    count, example = folder.others
    others = f", but {count} other files such as {example}" if count else ""
    accepted = " ".join(sorted((*IMAGE_SUFFIXES, *TABLE_SUFFIXES)))
    return InputError(f"{source} contains no images{others}; accepted are {accepted}")
