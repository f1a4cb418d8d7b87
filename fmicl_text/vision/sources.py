"""Where images come from: folders, tables, datasets on the Hub. No image is decoded here."""

from __future__ import annotations

import glob
import logging
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import xxhash
from datasets.arrow_reader import ReadInstruction

from fmicl_text.errors import InputError
from fmicl_text.files import check_regular, matching
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

logger = logging.getLogger(__name__)

_HASHED_BYTES = 2**30  # larger files are identified in the cache by name, size and modification time
_CHUNK = 100_000
STREAM_BUFFER = 10_000  # images from which the next one of a stream is drawn
_SHARDS = 64  # of a streamed folder of images, for the workers
_IMAGE = datasets.Features({"image": datasets.Image(decode=False)})


@dataclass(frozen=True)
class ImageRows:
    """Encoded images and their classes.

    Args:
        rows: Dataset with the column `image`, of {bytes, path}.
        labels: int64 [N], index into `classes`; -1 for an image without a class.
        classes: Names of the classes, the same for all sets.
        source: File, folder or dataset.
        folders: Folders from which image files may be opened. For tables there are none, because a table could
            otherwise reference arbitrary local files.
        fingerprint: A hash of the order and the labels, and of the content of tables, or the path, size and
            modification time of every file of a folder.
    """

    rows: Any
    labels: np.ndarray
    classes: tuple[str, ...]
    source: str
    folders: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True)
class _Set:
    """`ImageRows` with codes and names of its own instead of those of the training classes."""

    rows: Any
    codes: np.ndarray
    names: list[str]
    source: str
    folders: tuple[str, ...] = ()
    key: str = ""
    labeled: bool = True  # it has a label column, or folders of classes


def find_images(
    train_file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    test_file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    test_split: str | None = None,
) -> dict[str, ImageRows]:
    """Find training images and, if there are any, the official test and validation images.

    Args:
        train_file: A folder of images, or one or more .parquet or .arrow files, patterns or folders of such files. In
            a folder of images, the class of an image is the name of the subfolder of the first level, however deep it
            lies; a folder without subfolders has no classes, nor have images beside the subfolders. Subfolders named
            train, val and test are splits if all are. Tables named `metadata` give the classes as in `datasets`.
        dataset_name: Hub name or local folder of a dataset. Exactly one of `dataset_name` and `train_file` is
            required.
        dataset_config: Configuration of the dataset.
        dataset_split: Training split, of a dataset or a folder.
        image_column: Column of encoded images; by default `image` or `img`, else the only column of images.
        label_column: Column of classes: ClassLabel, integers, booleans or names; missing, blank and -1 are no class.
            By default the only one of `tables.LABEL_NAMES`, else the only ClassLabel.
        test_file: Test images, as `train_file`. By default, those of a split test or validation of a local folder.
        test_split: Test split of the dataset or folder.

    Returns:
        {"train": ...} and possibly "test" and "validation". Only the classes of the training images exist.

    Raises:
        InputError: An argument or the data is invalid, or a test class is not a training class.
    """
    if (train_file is None) == (dataset_name is None):
        got = f"train_file={train_file} and dataset_name={dataset_name}"
        raise InputError(f"exactly one of train_file and dataset_name is needed, got {got}")
    if test_file is not None and test_split is not None:
        raise InputError(f"test_file={test_file} and test_split={test_split} are both given: pass one of them")
    if test_split == dataset_split:
        raise InputError(f"test_split={test_split} is also dataset_split")
    columns = image_column, label_column
    if dataset_name is None:
        found = _read_files(_paths(train_file, "train_file"), "train_file", dataset_config, *columns)
    elif os.path.isdir(dataset_name):
        found = _read_files([dataset_name], "dataset_name", dataset_config, *columns)
    else:
        wanted = dict.fromkeys(filter(None, (dataset_split, test_split)))
        found = {split: _read_hub(dataset_name, dataset_config, split, *columns) for split in wanted}
    sets = {"train": _select(found, dataset_split, "dataset_split")}
    if test_file is not None:
        _check_different(train_file or dataset_name, test_file)
        tests = _read_files(_paths(test_file, "test_file"), "test_file", None, *columns, _names(sets["train"]))
        sets["test"] = tests.get("test") or tests["train"]
    elif test_split is not None:
        sets["test"] = _select(found, test_split, "test_split")
    official = set(sets) - {"train"}
    if dataset_split == "train" and test_split is None:
        sets |= {split: one for split, one in found.items() if split not in sets and split in ("test", "validation")}
    return _with_common_classes(sets, official)


def _paths(given: Any, argument: str) -> list[str]:
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


def _check_different(train: Any, test: Any) -> None:
    """Raise `InputError` if a test file or folder is a training file or folder."""
    known = set(map(os.path.realpath, _paths(train, "train_file")))
    if same := [path for path in _paths(test, "test_file") if os.path.realpath(path) in known]:
        raise InputError(f"test_file={same[0]} is also train_file")


def _read_files(
    paths: Sequence[str],
    argument: str,
    config: str | None,
    image_column: str | None,
    label_column: str | None,
    train_classes: Sequence[str] = (),
    streaming: bool = False,
) -> dict[str, Any]:
    """The sets in a folder of images, a folder of tables, or files.

    Args:
        paths, argument: The argument and its value.
        config: Configuration of a folder whose README.md has some.
        train_classes: The training classes, if this is another set.
        streaming: Return an `ImageStream` instead of each `_Set`.
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
                split: read_tables([os.path.join(top, name) for name in some], *columns, paths[0])
                for split, some in splits.items()
            }
        sets = _read_image_folder(folder, *columns, paths[0], source, train_classes)
        return {split: _stream_set(one) for split, one in sets.items()} if streaming else sets
    if config is not None:
        raise InputError(f"dataset_config={config} applies only to a dataset, got {source}")
    return {"train": read_tables(_table_files(paths, argument), *columns, " ".join(paths))}


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
) -> dict[str, _Set]:
    """The sets in a folder of images."""
    listed = _read_metadata(folder, image_column, label_column, source)
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
    sets: dict[str, _Set] = {}
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


def _folder_set(folder: ImageFolder, source: str) -> _Set:
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
    return _Set(_path_rows(paths, key), np.concatenate(codes), names, source, (folder.path,), key)


def _listed_set(folder: ImageFolder, listed: Mapping[str, str | None], source: str) -> _Set:
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
    key = _hash(folder.fingerprint(), *found)
    return _Set(_path_rows(iter(found), key), codes, names, source, (folder.path,), key)


def _path_rows(paths: Iterator[str], key: str) -> datasets.Dataset:
    """Rows of images in files."""
    chunks = []
    while names := list(islice(paths, _CHUNK)):
        columns = [pa.nulls(len(names), pa.binary()), pa.array(names, pa.string())]
        chunks.append(pa.StructArray.from_arrays(columns, ["bytes", "path"]))
    table = pa.table({"image": pa.chunked_array(chunks)})
    return datasets.Dataset(
        datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=_IMAGE), fingerprint=key
    )


def _read_metadata(
    folder: ImageFolder, image_column: str | None, label_column: str | None, source: str
) -> dict[str, str | None] | None:
    """The class of each image that the tables of metadata list, by path, as `datasets` defines them; None without
    tables with a label column.

    Raises:
        InputError: A table cannot be read, or names a file outside its folder.
    """
    found: dict[str, str | None] = {}
    has_classes = False
    for one in folder.walk():
        if len(one.metadata) > 1:
            raise InputError(f"{source}: {one.path} contains {' and '.join(one.metadata)}: leave one of them")
        for name in one.metadata:
            path = os.path.join(one.path, name)
            with tables.reading(path):
                rows = _metadata_table(path)
            features = {field.name: tables.feature_of(field, rows.schema.metadata) for field in rows.schema}
            files = _file_names(features, image_column, path)
            label = tables.label_column(features, label_column, files, path)
            if label is None:
                continue
            has_classes = True
            codes, names = tables.class_codes(rows[label], features[label], label, path)
            for row, file in enumerate(rows[files].to_pylist()):
                found[_inside(one.path, file, path)] = None if codes[row] < 0 else names[codes[row]]
    if not has_classes:
        for argument, value, allowed in (
            ("image_column", image_column, "image"),
            ("label_column", label_column, "label"),
        ):
            if value not in (None, allowed):
                raise InputError(
                    f"{argument}={value} does not apply to {source}: the folder has no table metadata.csv with classes"
                )
    return found if has_classes else None


def _metadata_table(path: str) -> pa.Table:
    with open(path, "rb") as file:
        if path.endswith(".csv"):
            convert = pyarrow.csv.ConvertOptions(null_values=[""], strings_can_be_null=True)
            return pyarrow.csv.read_csv(file, convert_options=convert)
        return pyarrow.json.read_json(file) if path.endswith(".jsonl") else pq.read_table(file)


def _file_names(features: Mapping[str, Any], image_column: str | None, path: str) -> str:
    """The column of file names of a table of metadata."""
    found = [name for name in features if name == "file_name" or name.endswith("_file_name")]
    if image_column not in (None, "image"):
        found = [name for name in found if name == f"{image_column}_file_name"]
    if "file_name" in found:
        return "file_name"
    if len(found) != 1:
        reason = f"columns {' and '.join(found)} name files: select one" if found else "no column of file names"
        raise InputError(f"{path}: {reason} (file_name, or NAME_file_name for image_column=NAME)")
    return found[0]


def _inside(folder: str, name: Any, table: str) -> str:
    """The path of a file that a table in the same folder names.

    Raises:
        InputError: It is not in the folder.
    """
    path = os.path.normpath(str(name).replace("\\", "/"))
    if not isinstance(name, str) or "://" in name or os.path.isabs(path) or path.split("/")[0] in ("..", "."):
        raise InputError(f"{table}: Invalid metadata file_name {name!r}: it must be a path inside the folder")
    return os.path.join(folder, path)


# ---- tables


def _has_images(file: str, image_column: str | None) -> bool:
    try:
        return bool(tables.image_column(tables.file_features(file), image_column, file))
    except InputError:
        return False


def _read_tables(files: Sequence[str], image_column: str | None, label_column: str | None, source: str) -> _Set:
    """The rows of .parquet and .arrow files of the same columns."""
    builder = _table_builder(files, image_column, label_column, source, streaming=False)
    with translate_dataset_errors(partial(_explain, source)):
        builder.download_and_prepare()
        rows = builder.as_dataset("train")
    return _dataset_set(
        rows, "image", "label" if "label" in rows.features else None, source, (), builder.config.content
    )


def _table_builder(
    files: Sequence[str], image_column: str | None, label_column: str | None, source: str, streaming: bool
) -> tables.ImageTables:
    """A builder of the image and label columns of files."""
    features = [tables.file_features(file) for file in files]
    about = source if len(files) == 1 else files[0]
    image = tables.image_column(features[0], image_column, about)
    label = tables.label_column(features[0], label_column, image, about)
    for file, others in zip(files, features, strict=True):
        tables.image_column(others, image, file)
        if label is not None:
            tables.label_column(others, label, image, file)
    kinds = [one[label] for one in features if label is not None and tables.kind_of(one[label]) != "null"]
    for file, kind in zip(files, kinds, strict=False):
        if kind != kinds[0] and datasets.ClassLabel in (type(kind), type(kinds[0])):
            raise InputError(f"{source}: the classes of column {label!r} of {file} are not those of {files[0]}")
    feature = next(iter(kinds), datasets.Value("string"))
    content = _hash(_content_key(files), image, label, repr(feature))
    cache_dir = None if streaming else os.path.join(datasets.config.HF_DATASETS_CACHE, "by_content", content)
    return tables.ImageTables({"train": files}, image, label, feature, content, cache_dir)


def _content_key(files: Sequence[str]) -> str:
    """Identifies the content of files: a hash of it, or of their names, sizes and modification times if they are larger
    than 1 GiB in total."""
    found = [os.stat(file) for file in files]
    if sum(one.st_size for one in found) <= _HASHED_BYTES:
        return os.path.basename(cache_of(*files))
    times = [f"{os.path.abspath(file)} {one.st_size} {one.st_mtime_ns}" for file, one in zip(files, found, strict=True)]
    return _hash(*times)


def _hash(*parts: Any) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else f"{part}\0".encode(errors="surrogateescape"))
    return str(digest.hexdigest())


def _dataset_set(rows: Any, image: str, label: str | None, source: str, folders: tuple[str, ...], key: str) -> _Set:
    """The rows of a dataset with an image column and possibly a label column."""
    codes, names = np.full(len(rows), -1, np.int64), list[str]()
    if label is not None:
        cells = rows.select_columns([label]).with_format("arrow")[:][label]
        codes, names = tables.class_codes(cells, rows.features[label], label, source)
    images = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    images = images if image == "image" else images.rename_column(image, "image")
    if not folders and len(images):
        cells = images.data.column("image")
        if all(pa.compute.struct_field(chunk, "bytes").null_count == len(chunk) for chunk in cells.chunks):
            raise InputError(
                f"{source}: column {image!r} has only paths of images, which are not opened, because a table could "
                "reference any local file: pass the folder of the images"
            )
    return _Set(images, codes, names, source, folders, _hash(key, rows._fingerprint), label is not None)


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
    with translate_dataset_errors(partial(_explain, source)):
        builder = datasets.load_dataset_builder(folder, config)
        files = list(chain.from_iterable(split_files(folder, builder, source.partition("=")[0]).values()))
        key = _content_key(sorted(files)) if files else ""
        cache_dir = os.path.join(datasets.config.HF_DATASETS_CACHE, "by_content", key) if files else None
        found = datasets.load_dataset(folder, config, cache_dir=cache_dir, streaming=streaming)
        read = _hub_stream if streaming else _hub_set
        return {
            SPLITS.get(split, split): read(rows, image_column, label_column, f"{folder} [{split}]", folder, key)
            for split, rows in found.items()
        }


def _read_hub(name: str, config: str | None, split: str, image_column: str | None, label_column: str | None) -> _Set:
    """A split of a dataset on the Hub."""
    source = "/".join(filter(None, (name, config))) + f" [{split}]"
    with translate_dataset_errors(partial(_explain, source)):
        rows = datasets.load_dataset(name, config, split=split)
        if (commit := hub_revision(rows)) is not None:
            source = f"{source} @{commit}"
        return _hub_set(rows, image_column, label_column, source, name, "")


def _hub_set(rows: Any, image_column: str | None, label_column: str | None, source: str, name: str, key: str) -> _Set:
    image = tables.image_column(rows.features, image_column, source)
    label = tables.label_column(rows.features, label_column, image, source)
    return _dataset_set(rows, image, label, source, _image_folders(rows, name), key)


# ---- streams


@dataclass(frozen=True)
class ImageStream:
    """Encoded images that are read while training.

    Args:
        rows: `datasets.IterableDataset` with the column `image`, of {bytes, path}, and, if there are classes, `label`.
        label: Type of `label`, or None.
        source: File, folder or dataset.
        folders: As in `ImageRows`.
        fingerprint: Identifies content and order; None if unknown.
    """

    rows: Any
    label: Any
    source: str
    folders: tuple[str, ...]
    fingerprint: str | None


def stream_images(
    train_file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    argument: str = "train_file",
) -> dict[str, ImageStream]:
    """Streams of images: arguments as of `find_images`. Only the start of the data is read.

    Args:
        argument: Name of the argument `train_file` in messages.

    Returns:
        {"train": ...} and, of local folders, possibly "test" and "validation".

    Raises:
        InputError: An argument or the data is invalid.
    """
    columns = image_column, label_column
    if dataset_name is not None and not os.path.isdir(dataset_name):
        source = "/".join(filter(None, (dataset_name, dataset_config))) + f" [{dataset_split}]"
        with translate_dataset_errors(partial(_explain, source)):
            rows = datasets.load_dataset(dataset_name, dataset_config, split=dataset_split, streaming=True)
            key = stream_fingerprint(dataset_name, dataset_config)
            key = None if key is None else _hash(key, dataset_config, dataset_split)
            return {"train": _hub_stream(rows, *columns, source, dataset_name, key)}
    given, name = (train_file, argument) if dataset_name is None else (dataset_name, "dataset_name")
    found = _read_files(_paths(given, name), name, dataset_config, *columns, streaming=True)
    split = dataset_split if dataset_split in found else SPLITS.get(dataset_split.lower(), dataset_split)
    if split not in found:
        hint = "; a stream has no parts of splits" if "[" in split or "+" in split else ""
        raise InputError(f"dataset_split={dataset_split}: no such split; there are {' '.join(found)}{hint}")
    return {"train": found[split]} | (found if split == "train" else {})


def _stream_tables(
    files: Sequence[str], image_column: str | None, label_column: str | None, source: str
) -> ImageStream:
    """The rows of .parquet and .arrow files."""
    builder = _table_builder(files, image_column, label_column, source, streaming=True)
    rows = builder.as_streaming_dataset("train")
    return ImageStream(rows, builder.info.features.get("label"), source, (), builder.config.content)


def _stream_set(one: _Set) -> ImageStream:
    """The images of a folder, in a random order, because those of a class follow one another."""
    rows, label = one.rows, datasets.ClassLabel(names=one.names) if one.names else None
    if label is not None:
        rows = rows.add_column("label", pa.array(one.codes), feature=label)
    shards = min(_SHARDS, len(rows))
    stream = rows.shuffle(seed=0, keep_in_memory=True).to_iterable_dataset(num_shards=shards)
    return ImageStream(stream, label, one.source, one.folders, _hash(one.key, *one.names, one.codes.tobytes()))


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
    return ImageStream(rows, feature, source, folders, None if key is None else _hash(key, source, image, label))


def first_rows(
    count: int, train: ImageStream, test: ImageStream | None = None, validation: ImageStream | None = None
) -> dict[str, ImageRows]:
    """The first images of streams, in a shuffled order, as rows that are kept in the cache of `datasets`.

    Args:
        count: At most this number of images of each.
        train, test, validation: The streams.

    Returns:
        {"train": ...} and possibly "test" and "validation". Classes are those that occur in any of them.

    Raises:
        InputError: A stream cannot be read or contains no images.
    """
    streams = {"train": train, "test": test, "validation": validation}
    sets = {split: _first_set(one, count) for split, one in streams.items() if one is not None}
    classes = tables.sorted_classes({name for one in sets.values() for name in _names(one)})
    return {split: _as_rows(one, classes) for split, one in sets.items()}


def _first_set(stream: ImageStream, count: int) -> _Set:
    key = _hash(stream.fingerprint or uuid.uuid4().hex, count, STREAM_BUFFER)
    rows = stream.rows.shuffle(seed=0, buffer_size=STREAM_BUFFER).take(count)
    features = _IMAGE | ({} if stream.label is None else {"label": stream.label})
    with translate_dataset_errors(partial(_explain, stream.source)):
        found = datasets.Dataset.from_generator(
            partial(iter, rows),
            features=datasets.Features(features),
            cache_dir=os.path.join(datasets.config.HF_DATASETS_CACHE, "by_content"),
            fingerprint=key,
        )
    label = None if stream.label is None else "label"
    return _dataset_set(found, "image", label, stream.source, stream.folders, key)


def _image_folders(rows: Any, name: str) -> tuple[str, ...]:
    """Folders from which the image files of an image folder of `datasets` may be read: the folder `name` and the caches
    of the Hub."""
    if rows.info.builder_name != "imagefolder":
        return ()
    caches = (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    return os.path.realpath(name), *map(os.path.abspath, caches)


def _explain(source: str, error: BaseException) -> str:
    """The reason why data cannot be loaded."""
    no_images = ("corresponds to no data", "BatchSize must be greater", "at least one example")  # of `datasets`
    if any(sign in str(error) for sign in no_images):
        return f"{source} contains no images"
    return f"{source}: {str(error).partition('Example of usage')[0] or type(error).__name__}"


# ---- sets


def _select(sets: Mapping[str, _Set], split: str, argument: str) -> _Set:
    """A split, or parts of splits as `datasets` writes them: train[:80%], train+validation.

    Raises:
        InputError: There is no such split.
    """
    name = split if split in sets else SPLITS.get(split.lower(), split)
    if name in sets:
        return sets[name]
    try:
        found = ReadInstruction.from_spec(split).to_absolute({name: len(one.codes) for name, one in sets.items()})
    except (ValueError, AssertionError) as error:
        raise InputError(f"{argument}={split}: no such split; there are {' '.join(sets)}") from error
    names = list(dict.fromkeys(chain.from_iterable(sets[part.splitname].names for part in found)))
    rows, codes = [], []
    for part in found:
        one, chosen = sets[part.splitname], slice(part.from_, part.to)
        rows.append(one.rows.select(range(len(one.codes))[chosen]))
        codes.append(_recoded(one, names)[chosen])
    first = sets[found[0].splitname]
    folders = tuple(dict.fromkeys(chain.from_iterable(sets[part.splitname].folders for part in found)))
    key = _hash(split, *(one.key for one in sets.values()))
    joined = rows[0] if len(rows) == 1 else datasets.concatenate_datasets(rows)
    return _Set(joined, np.concatenate(codes), names, f"{first.source} [{split}]", folders, key)


def _names(one: _Set) -> list[str]:
    """The names of the classes that occur."""
    return [one.names[i] for i in np.unique(one.codes) if i >= 0]


def _recoded(one: _Set, names: Sequence[str]) -> np.ndarray:
    """The classes as indices into other names; -1 for those that are not among them."""
    numbers = {name: i for i, name in enumerate(names)}
    lookup = np.array([*(numbers.get(name, -1) for name in one.names), -1], np.int64)
    return lookup[one.codes]


def _with_common_classes(sets: Mapping[str, _Set], official: set[str]) -> dict[str, ImageRows]:
    """The sets with the classes of the training images.

    Args:
        sets: train, and possibly test and validation.
        official: Those that arguments select; others without fitting classes are not used.

    Raises:
        InputError: A set that is selected has a class that the training images lack, or no classes.
    """
    train = sets["train"]
    classes = tables.sorted_classes(_names(train))
    if len(classes) < 2:
        only = f"one class only, {classes[0]!r}" if classes else "no classes"
        logger.warning("%s: the images have %s: scores that need classes are not computed", train.source, only)
        classes = ()
    used = {"train": train}
    for split, one in sets.items():
        names = _names(one)
        unknown = [name for name in names if name not in classes] if classes else []
        reason = f"{train.source} has no class {unknown[0]!r}" if unknown else None
        if classes and not names:
            reason = "its images have no classes"
        if reason is None:
            used[split] = one
        elif split in official:
            raise InputError(f"{one.source} cannot be the {split} set: {reason}")
        else:
            logger.warning("%s is not used as the %s set: %s", one.source, split, reason)
    if "test" not in used and "validation" in used:
        used["test"] = used.pop("validation")
    return {split: _as_rows(one, classes) for split, one in used.items()}


def _as_rows(one: _Set, classes: tuple[str, ...]) -> ImageRows:
    labels = _recoded(one, classes)
    fingerprint = _hash(one.key, *classes, labels.tobytes())
    return ImageRows(one.rows, labels, classes, one.source, one.folders, fingerprint)
