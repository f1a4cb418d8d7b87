"""The sets of a dataset on the Hub, or of a local folder whose README.md configures its data as on the Hub."""

from __future__ import annotations

import os
from functools import partial
from itertools import chain
from typing import Any

import datasets
import huggingface_hub

from fmicl_text.errors import InputError
from fmicl_text.loading import hub_revision, split_files, stream_fingerprint, translate_dataset_errors
from fmicl_text.vision import tables
from fmicl_text.vision.folders import SPLITS
from fmicl_text.vision.sets import (
    ImageSet,
    ImageStream,
    attempt,
    cache_folder,
    content_key,
    dataset_set,
    explain,
    hash_of,
    read_cached,
)


def is_configured(folder: str) -> bool:
    """Whether the README.md of a folder configures its data, in which case `datasets` reads it."""
    readme = os.path.join(folder, "README.md")
    if not os.path.isfile(readme):
        return False
    try:
        found = huggingface_hub.metadata_load(readme) or {}
    except Exception as error:  # of YAML, any type
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{readme}: its metadata is not valid YAML: {reason}") from error
    return bool({"configs", "dataset_info"} & set(found))


def read_configured(
    folder: str,
    config: str | None,
    image_column: str | None,
    label_column: str | None,
    source: str,
    streaming: bool,
) -> dict[str, Any]:
    """The sets, or streams, of a local folder that its README.md configures."""
    if any(mark in os.path.abspath(folder) for mark in ("[", "::")):
        raise InputError(f"{source}: a folder with README.md and [ or :: in its path cannot be read: rename it")
    with translate_dataset_errors(partial(explain, source)):
        builder = datasets.load_dataset_builder(folder, config)
        files = list(chain.from_iterable(split_files(folder, builder, source.partition("=")[0]).values()))
        key = content_key(sorted(files)) if files else ""
        cache_dir = cache_folder(key) if files else None
        load = partial(datasets.load_dataset, folder, config, cache_dir=cache_dir, streaming=streaming)
        found = load() if streaming or cache_dir is None else read_cached(load, cache_dir)
        read = _hub_stream if streaming else _hub_set
        sets: dict[str, Any] = {}
        for split, rows in found.items():
            usual = SPLITS.get(split.lower(), split)
            about = f"{folder} [{split}]"
            sets[split if usual in sets or usual in found else usual] = attempt(
                read, rows, image_column, label_column, about, folder, key
            )
        return sets


def read_hub(name: str, config: str | None, split: str, image_column: str | None, label_column: str | None) -> ImageSet:
    """A split of a dataset on the Hub."""
    _check_hub_name(name)
    source = "/".join(filter(None, (name, config))) + f" [{split}]"
    with translate_dataset_errors(partial(explain, source)):
        rows = datasets.load_dataset(name, config, split=split)
        if (commit := hub_revision(rows)) is not None:
            source = f"{source} @{commit}"
        return _hub_set(rows, image_column, label_column, source, name, "")


def stream_hub(
    name: str, config: str | None, split: str, image_column: str | None, label_column: str | None
) -> ImageStream:
    """A split of a dataset on the Hub, streamed."""
    _check_hub_name(name)
    source = "/".join(filter(None, (name, config))) + f" [{split}]"
    with translate_dataset_errors(partial(explain, source)):
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        key = stream_fingerprint(name, config)
        key = None if key is None else hash_of(key, config, split)
        return _hub_stream(rows, image_column, label_column, source, name, key)


def _hub_set(
    rows: Any, image_column: str | None, label_column: str | None, source: str, name: str, key: str
) -> ImageSet:
    image = tables.image_column(rows.features, image_column, source)
    label = tables.label_column(rows.features, label_column, image, source)
    return dataset_set(rows, image, label, source, _image_folders(rows, name), key)


def _hub_stream(
    rows: Any, image_column: str | None, label_column: str | None, source: str, name: str, key: str | None
) -> ImageStream:
    """The rows of a dataset that is streamed."""
    rows = rows if rows.features is not None else rows._resolve_features()
    if not rows.features:
        raise InputError(f"{source} contains no images")
    image = tables.image_column(rows.features, image_column, source)
    label = tables.label_column(rows.features, label_column, image, source)
    folders = _image_folders(rows, name)
    if folders and not os.path.isdir(name):
        raise InputError(f"{source}: image files on the Hub cannot be streamed: use streaming=False")
    feature = None if label is None else rows.features[label]
    names = {image: "image"} | ({} if label is None else {label: "label"})
    rows = rows.select_columns(list(names)).cast_column(image, datasets.Image(decode=False))
    rows = rows.rename_columns({old: new for old, new in names.items() if old != new})
    return ImageStream(rows, feature, source, folders, None if key is None else hash_of(key, source, image, label))


def _image_folders(rows: Any, name: str) -> tuple[str, ...]:
    """Folders from which the image files of an image folder of `datasets` may be read: the folder `name` and the caches
    of the Hub."""
    if rows.info.builder_name != "imagefolder":
        return ()
    caches = (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    return os.path.realpath(name), *map(os.path.abspath, caches)


def _check_hub_name(name: str) -> None:
    """Raise `InputError` for a path instead of the name of a dataset."""
    if os.path.exists(name):
        raise InputError(f"dataset_name={name} is a file: pass it as train_file")
    if name.startswith((".", "/", "~")):
        raise InputError(f"dataset_name={name}: no such folder")
