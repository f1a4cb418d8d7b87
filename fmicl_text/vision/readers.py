"""Readers of folders of images, tables and datasets: encoded images and the classes of one source."""

from __future__ import annotations

import glob
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from fmicl_text.errors import InputError
from fmicl_text.files import check_regular, is_disk_full, matching
from fmicl_text.loading import cache_of, hub_revision, split_files, stream_fingerprint, translate_dataset_errors
from fmicl_text.vision import tables
from fmicl_text.vision.folders import (
    IMAGE_SUFFIXES,
    SPLITS,
    TABLE_SUFFIXES,
    ImageFolder,
    classes_of,
    read_folder,
    split_folders,
    with_images,
    without_wrappers,
)
from fmicl_text.vision.metadata import read_metadata

logger = logging.getLogger(__name__)

IMAGE_FEATURES = datasets.Features({"image": datasets.Image(decode=False)})
_HASHED_BYTES = 2**30  # larger files are identified in the cache by name, size and modification time
_CHUNK = 100_000
_SHARDS = 64  # of a streamed folder of images, for the workers


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
    read_tables = _stream_tables if streaming else _read_tables
    source = f"{argument}={' '.join(paths)}"
    columns = image_column, label_column
    if len(paths) == 1 and os.path.isdir(paths[0]):
        if _is_configured(paths[0]):
            return _read_configured(paths[0], config, *columns, source, streaming)
        if config is not None:
            raise InputError(f"dataset_config={config}: the README.md of {source} has no configurations")
        folder = read_folder(paths[0], argument)
        files = [os.path.join(one.path, name) for one in folder.walk() for name in one.tables]
        if not folder.total and not files:
            raise _no_images(folder, source)
        if not folder.total or (files and _has_images(files[0], image_column)):
            if folder.total:
                raise InputError(
                    f"{source} has images, such as {next(folder.paths())}, and tables of images, such as {files[0]}: "
                    "pass the folder of the images, or the tables"
                )
            top = os.path.abspath(paths[0])
            names = [os.path.relpath(file, top) for file in files]
            splits = tables.table_folder_files(names, SPLITS, source)
            return {
                split: _attempt(read_tables, [os.path.join(top, name) for name in some], *columns, paths[0])
                for split, some in splits.items()
            }
        sets = _read_image_folder(folder, *columns, paths[0], source, train_classes)
        return {split: _stream_set(one) for split, one in sets.items()} if streaming else sets
    if config is not None:
        raise InputError(f"dataset_config={config} applies only to a dataset, got {source}")
    return {"train": read_tables(_table_files(paths, argument), *columns, " ".join(paths))}


def _attempt(read: Callable[..., Any], *arguments: Any) -> Any:
    """A set, or the error for one that cannot be read, because it may not be used."""
    try:
        return read(*arguments)
    except InputError as error:
        return error


def _no_images(folder: ImageFolder, source: str) -> InputError:
    count, example = folder.others
    others = f", but {count} other files such as {example}" if count else ""
    accepted = " ".join(sorted((*IMAGE_SUFFIXES, *TABLE_SUFFIXES)))
    return InputError(f"{source} contains no images{others}; accepted are {accepted}")


def _table_files(paths: Sequence[str], argument: str) -> list[str]:
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


# ---- folders of images


def _read_image_folder(
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


def _stream_set(one: ImageSet) -> ImageStream:
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


# ---- tables


def _has_images(file: str, image_column: str | None) -> bool:
    try:
        return bool(tables.image_column(tables.file_features(file), image_column, file))
    except InputError:
        return False


def _read_tables(files: Sequence[str], image_column: str | None, label_column: str | None, source: str) -> ImageSet:
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


def _stream_tables(
    files: Sequence[str], image_column: str | None, label_column: str | None, source: str
) -> ImageStream:
    """The rows of .parquet and .arrow files."""
    options = _table_options(files, image_column, label_column, source)
    with translate_dataset_errors(partial(explain, source)):
        builder = tables.ImageTables(**options, cache_dir=None)
        rows = builder.as_streaming_dataset("train")
    return ImageStream(rows, builder.info.features.get("label"), source, (), builder.config.content)


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
    content = hash_of(_content_key(files), image, label, repr(feature))
    return {"splits": {"train": files}, "image": image, "label": label, "label_feature": feature, "content": content}


def _content_key(files: Sequence[str]) -> str:
    """Identifies the content of files: a hash of it, or of their names, sizes and modification times if they are larger
    than 1 GiB in total."""
    found = [os.stat(file) for file in files]
    if sum(one.st_size for one in found) <= _HASHED_BYTES:
        return os.path.basename(cache_of(*files))
    times = [f"{os.path.abspath(file)} {one.st_size} {one.st_mtime_ns}" for file, one in zip(files, found, strict=True)]
    return hash_of(*times)


# ---- datasets


def _is_configured(folder: str) -> bool:
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


def _read_configured(
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
        key = _content_key(sorted(files)) if files else ""
        cache_dir = cache_folder(key) if files else None
        load = partial(datasets.load_dataset, folder, config, cache_dir=cache_dir, streaming=streaming)
        found = load() if streaming or cache_dir is None else read_cached(load, cache_dir)
        read = _hub_stream if streaming else _hub_set
        sets: dict[str, Any] = {}
        for split, rows in found.items():
            usual = SPLITS.get(split.lower(), split)
            about = f"{folder} [{split}]"
            sets[split if usual in sets or usual in found else usual] = _attempt(
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


def _image_folders(rows: Any, name: str) -> tuple[str, ...]:
    """Folders from which the image files of an image folder of `datasets` may be read: the folder `name` and the caches
    of the Hub."""
    if rows.info.builder_name != "imagefolder":
        return ()
    caches = (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    return os.path.realpath(name), *map(os.path.abspath, caches)


def explain(source: str, error: BaseException) -> str:
    """The reason why data cannot be loaded."""
    no_images = ("corresponds to no data", "BatchSize must be greater", "at least one example")  # of `datasets`
    if any(sign in str(error) for sign in no_images):
        return f"{source} contains no images"
    reason = str(error).partition("Example of usage")[0] or type(error).__name__
    if isinstance(error, ConnectionError):
        reason += "; without a network, pass a train_file or a dataset that is in the cache"
    return f"{source}: {reason}"


def _check_hub_name(name: str) -> None:
    """Raise `InputError` for a path instead of the name of a dataset."""
    if os.path.exists(name):
        raise InputError(f"dataset_name={name} is a file: pass it as train_file")
    if name.startswith((".", "/", "~")):
        raise InputError(f"dataset_name={name}: no such folder")


def hash_of(*parts: Any) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else f"{part}\0".encode(errors="surrogateescape"))
    return str(digest.hexdigest())
